"""Stores become one matrix: the right rows, in the right order, or a clear refusal."""

import numpy as np
import pytest

from pipeline.errors import DataError, MismatchError, UnknownNameError, UsageError
from pipeline.heads.features import load_inputs
from tests.heads.toy_stores import cycle, make_store, splits_of


@pytest.fixture
def layers():
    rng = np.random.default_rng(0)
    return {"low": rng.normal(size=(12, 3)), "penultimate": rng.normal(size=(12, 5))}


@pytest.fixture
def labels():
    return cycle(["cat", "dög"], 12)


@pytest.fixture
def store(tmp_path, layers, labels):
    return make_store(tmp_path / "a", layers, {"label": labels}, splits_of(8, n_test=4))


def test_penultimate_is_the_default_layer(store, layers):
    inputs = load_inputs([store])

    assert inputs.blocks[0].layers == ("penultimate",)
    assert inputs.X.dtype == np.float32
    np.testing.assert_array_equal(inputs.X, layers["penultimate"].astype(np.float16))


def test_all_layers_stand_side_by_side(store, layers):
    inputs = load_inputs([store], layers=["all"])

    assert inputs.widths == (3, 5)
    expected = np.hstack([layers["low"], layers["penultimate"]]).astype(np.float16)
    np.testing.assert_array_equal(inputs.X, expected)


def test_layers_come_in_the_order_they_were_named(store, layers):
    inputs = load_inputs([store], layers=["penultimate", "low", "penultimate"])

    assert inputs.blocks[0].layers == ("penultimate", "low")
    np.testing.assert_array_equal(inputs.X[:, 5:], layers["low"].astype(np.float16))


def test_every_layer_where_there_is_no_penultimate(tmp_path, layers, labels):
    del layers["penultimate"]
    store = make_store(tmp_path / "b", layers, {"label": labels}, splits_of(12))

    assert load_inputs([store]).blocks[0].layers == ("low",)


def test_unknown_layer_offers_close_ones(store):
    with pytest.raises(UnknownNameError, match=r"Unknown layer 'penultimat'.\n.*penultimate"):
        load_inputs([store], layers=["penultimat"])


def test_maps_are_refused(tmp_path, labels):
    store = make_store(
        tmp_path / "b", {"maps": np.zeros((12, 2, 3, 3))}, {"label": labels}, splits_of(12)
    )

    with pytest.raises(UsageError, match=r"maps of shape \(2, 3, 3\)[^$]*--pooling avg"):
        load_inputs([store])


def test_samples_without_label_or_split_are_left_out(tmp_path, layers, labels):
    labels[3] = None
    splits = [*splits_of(8, n_test=3), ""]
    store = make_store(tmp_path / "b", layers, {"label": labels}, splits)

    inputs = load_inputs([store])

    assert len(inputs.X) == 10
    assert "00003.png" not in inputs.ids
    assert inputs.notes == [
        "1 of 12 samples without a label in column 'label': left out.",
        "1 sample in no split: left out.",
    ]
    np.testing.assert_array_equal(
        inputs.X[-1], layers["penultimate"][10].astype(np.float16).astype(np.float32)
    )


def test_without_any_split_everything_is_train(tmp_path, layers, labels):
    store = make_store(tmp_path / "b", layers, {"label": labels}, [""] * 12)

    inputs = load_inputs([store])

    assert set(inputs.splits) == {"train"}
    assert inputs.notes == ["The store has no splits: every sample is taken as train."]


def test_store_without_labels_says_how_to_give_some(tmp_path, layers):
    store = make_store(tmp_path / "b", layers, {}, [""] * 12)

    with pytest.raises(DataError, match=r"has no labels[^$]*one folder a class[^$]*extract again"):
        load_inputs([store])


def test_column_of_missing_labels_is_no_column(tmp_path, layers):
    store = make_store(tmp_path / "b", layers, {"label": [None] * 12}, splits_of(12))

    with pytest.raises(DataError, match="has a label in column 'label'"):
        load_inputs([store])


def test_label_column_must_be_chosen_among_several(tmp_path, layers, labels):
    columns = {"species": labels, "sex": cycle(["f", "m", "m"], 12)}
    store = make_store(tmp_path / "b", layers, columns, splits_of(12))

    assert load_inputs([store], label="sex").labels[:3].tolist() == ["f", "m", "m"]
    with pytest.raises(
        UsageError, match=r"several label columns: species, sex.\n.*--label species"
    ):
        load_inputs([store])
    with pytest.raises(UnknownNameError, match="Did you mean: species"):
        load_inputs([store], label="specie")


def test_column_called_label_is_the_default(tmp_path, layers, labels):
    columns = {"sex": cycle(["f", "m", "m"], 12), "label": labels}
    store = make_store(tmp_path / "b", layers, columns, splits_of(12))

    assert load_inputs([store]).label_column == "label"


def test_stores_are_joined_by_sample_whatever_their_order(tmp_path, store, layers, labels):
    order = np.random.default_rng(1).permutation(12)[:9]
    ids = [f"{i:05d}.png" for i in order]
    other = make_store(
        tmp_path / "b",
        {"top": layers["low"][order] * 2},
        {"label": [labels[i] for i in order]},
        [""] * 9,
        ids=ids,
        backbone="other",
    )

    inputs = load_inputs([store, other], layers=["low", "top"])

    assert sorted(inputs.ids) == sorted(ids)
    assert set(inputs.splits) == {"train", "test"}
    np.testing.assert_allclose(inputs.X[:, 3:], inputs.X[:, :3] * 2, rtol=1e-3)
    assert inputs.notes == ["3 of 12 samples not in every store: left out."]
    assert [block.key for block in inputs.blocks] == [store.key, other.key]


def test_same_id_of_another_image_is_another_sample(tmp_path, store, layers, labels):
    other = make_store(
        tmp_path / "b",
        layers,
        {"label": labels},
        splits_of(12),
        contents=[f"other {i}" for i in range(12)],
    )

    with pytest.raises(MismatchError, match="share no labelled sample: neither id nor image"):
        load_inputs([store, other])


def test_store_that_has_none_of_the_layers_is_refused(tmp_path, store, layers, labels):
    other = make_store(
        tmp_path / "b", {"top": layers["low"]}, {"label": labels}, splits_of(12), backbone="other"
    )

    with pytest.raises(UsageError, match="has none of the layers low; it has: top"):
        load_inputs([store, other], layers=["low"])


def test_digest_of_the_data_depends_on_images_and_labels_only(tmp_path, layers, labels):
    def digest(name, labels, contents=None, order=range(12)):
        store = make_store(
            tmp_path / name,
            {"penultimate": layers["penultimate"][list(order)]},
            {"label": [labels[i] for i in order]},
            splits_of(12),
            ids=[f"{i}.png" for i in order],
            contents=[(contents or "image") + str(i) for i in order],
        )
        return load_inputs([store]).digest()

    first = digest("one", labels)

    assert digest("two", labels, order=range(11, -1, -1)) == first
    assert digest("three", labels, contents="edited") != first
    assert digest("four", ["cat", *labels[1:-1], "cat"]) != first
