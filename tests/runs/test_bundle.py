"""A saved model predicts as the fitted one did, and nothing else passes for one."""

import hashlib
import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import CorruptStoreError, MismatchError, StoreError, StoreFormatError
from pipeline.heads import HEADS
from pipeline.runs.bundle import load_bundle
from pipeline.sweep.fit import fit_head
from tests.heads.toy_stores import ORIGIN, blobs, cycle, make_store, splits_of

QUICK = {"linear": [{"epochs": 5}], "mlp": [{"epochs": 5, "hidden": 8}]}


@pytest.fixture
def run(store, tmp_path):
    return fit_head(store).save(tmp_path / "runs")


@pytest.mark.parametrize("scaling", ["standardise", "l2", "none"])
@pytest.mark.parametrize("head", HEADS)
def test_loaded_model_predicts_bit_for_bit(head, scaling, store, tmp_path):
    fitted = fit_head(store, head=head, scaling=scaling, layers=["all"], settings=QUICK.get(head))
    X = np.asarray(store.features("test"))

    bundle = load_bundle(fitted.save(tmp_path))

    expected = fitted.model.predict_proba(X)
    np.testing.assert_array_equal(bundle.predict_proba([X]), expected)
    np.testing.assert_array_equal(bundle.predict_proba({store.key: X}), expected)
    assert bundle.classes == fitted.classes
    assert bundle.inputs == fitted.inputs


@pytest.mark.parametrize("head", ["svm", "logreg"])
def test_linear_svm_and_two_classes(head, tmp_path):
    labels = cycle("ab", 40)
    made = make_store(
        tmp_path / "s", {"penultimate": blobs(labels)}, {"label": labels}, splits_of(30, 0, 10)
    )
    settings = [{"kernel": "linear", "C": 0.1}] if head == "svm" else None
    fitted = fit_head(made, head=head, settings=settings)
    X = np.asarray(made.features())

    bundle = load_bundle(fitted.save(tmp_path))

    np.testing.assert_array_equal(bundle.predict_proba([X]), fitted.model.predict_proba(X))


def test_bundle_needs_no_store(store, run):
    X = np.asarray(store.features("test", ["penultimate"]))
    shutil.rmtree(store.path)

    assert load_bundle(run).predict_proba([X]).shape == (30, 3)


def test_fresh_features_are_rounded_as_the_store_does(store, run):
    fresh = np.random.default_rng(0).normal(size=(4, 5))

    bundle = load_bundle(run)

    np.testing.assert_array_equal(
        bundle.predict_proba([fresh]), bundle.predict_proba([fresh.astype(np.float16)])
    )
    assert bundle.predict_proba([fresh[:0]]).shape == (0, 3)


def test_card_says_what_the_model_is(store, run):
    card = load_bundle(run).card

    assert card["head"] == "logreg"
    assert card["label"] == "label"
    assert card["inputs"][0]["recipe"] == store.recipe
    assert card["inputs"][0]["origin"] == ORIGIN
    assert card["inputs"][0]["layers"] == ["penultimate"]
    assert "root" not in card["inputs"][0]["source"]
    assert card["metrics"]["test"]["top1"]["value"] > 0.9
    assert len(card["data_digest"]) == 64


def test_features_of_another_recipe_are_refused(run):
    with pytest.raises(
        MismatchError, match=r"fitted on features of recipe \w{8} \(toy\), but these are of recipe"
    ):
        load_bundle(run).predict_proba({"ab" * 32: np.zeros((2, 5))})


def test_features_of_another_shape_are_refused(run):
    bundle = load_bundle(run)

    with pytest.raises(MismatchError, match=r"takes 5 features \(penultimate\), but .*\(2, 6\)"):
        bundle.predict_proba([np.zeros((2, 6))])
    with pytest.raises(MismatchError, match="takes 1 blocks of features, not 2"):
        bundle.predict_proba([np.zeros((2, 5)), np.zeros((2, 5))])


def test_blocks_of_different_length_are_refused(store, tmp_path):
    labels = cycle(["cat", "dög", "=cmd()"], 90)
    other = make_store(
        tmp_path / "o", {"top": blobs(labels)}, {"label": labels}, [""] * 90, backbone="other"
    )
    bundle = load_bundle(fit_head([store, other], layers=["all"]).save(tmp_path))

    assert bundle.predict_proba([np.zeros((2, 8)), np.zeros((2, 8))]).shape == (2, 3)
    with pytest.raises(MismatchError, match="different numbers of samples: 2, 3"):
        bundle.predict_proba([np.zeros((2, 8)), np.zeros((3, 8))])
    with pytest.raises(MismatchError, match=r"toy\), \w{8} \(other"):
        bundle.predict_proba({store.key: np.zeros((2, 8))})


@pytest.mark.parametrize("name", ["card.json", "model.safetensors"])
def test_missing_file_is_told(name, run):
    (run / name).unlink()

    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        load_bundle(run)


def test_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(StoreFormatError, match=r"is not a run: it has no card.json\.\n  List the"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["card.json", "model.safetensors"])
def test_no_cut_or_flipped_file_is_served(name, run):
    data = (run / name).read_bytes()
    whole = load_bundle(run)
    X = np.random.default_rng(0).normal(size=(3, 5))
    for length in (0, 1, 9, len(data) // 2, len(data) - 3):
        (run / name).write_bytes(data[:length])
        with pytest.raises(StoreError):
            load_bundle(run)
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(data), 60):
        (run / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            bundle = load_bundle(run)
        except StoreError:
            continue
        # A card has no checksum of its own: what still loads must be whole.
        assert name == "card.json"
        assert bundle.predict_proba([X]).shape == whole.predict_proba([X]).shape


def test_model_of_another_run_is_refused(store, run, tmp_path):
    other = fit_head(store, settings=[{"C": 5.0}]).save(tmp_path / "runs")
    shutil.copy(other / "model.safetensors", run / "model.safetensors")

    with pytest.raises(CorruptStoreError, match=r"one of the two was changed or damaged"):
        load_bundle(run)


def forge(run, *, arrays=None, data=None, **fields):
    """Change a run and put the right checksum on it."""
    model = run / "model.safetensors"
    if arrays is not None:
        save_file({k: v for k, v in (load_file(model) | arrays).items() if v is not None}, model)
    if data is not None:
        model.write_bytes(data)
    card = json.loads((run / "card.json").read_text())
    card |= {"model_sha256": hashlib.sha256(model.read_bytes()).hexdigest()} | fields
    (run / "card.json").write_text(json.dumps(card))


class Trap:
    def __reduce__(self):
        return (print, ("code was run",))


def test_pickle_is_never_run(run, capsys):
    forge(run, data=pickle.dumps(Trap()))

    with pytest.raises(CorruptStoreError, match="not a safetensors file"):
        load_bundle(run)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format 'other', expected 'tlpipe-head'"),
        ({"format_version": 2}, "format version 2; this release reads 1. Upgrade"),
        ({"head": "transformer"}, "Unknown head 'transformer'[^$]*Upgrade tlpipe"),
        ({"head": "../../x"}, "Unknown head"),
        ({"head": 3}, "'head' is 3, expected text"),
        ({"params": {"colour": 1}}, "no parameter 'colour'"),
        ({"params": []}, "'params' is \\[\\], expected an object"),
        ({"classes": ["a", "b"]}, "but 2 are named"),
        ({"classes": [1, 2, 3]}, "expected strs"),
        ({"scaling": "whiten"}, "scales its features by 'whiten'"),
        ({"temperature": 0}, "expected a number above 0"),
        ({"temperature": True}, "expected a number"),
        ({"inputs": []}, "'inputs' is \\[\\]"),
        ({"inputs": [{}]}, "'layers' is None"),
        ({"arrays": {"head.coef": np.zeros((3, 9), np.float32)}}, "takes 9 features"),
        ({"arrays": {"head.coef": None}}, "no array 'coef'"),
        ({"arrays": {"head.classes": np.array([0, 1, 9])}}, "but 3 are named"),
        ({"arrays": {"scaling.scale": np.zeros(5)}}, "not above zero"),
        ({"arrays": {"scaling.mean": np.zeros(4)}}, "expected 5 float numbers"),
    ],
)
def test_hostile_card_or_arrays_are_refused(change, message, run):
    forge(run, **change)

    with pytest.raises(StoreError, match=message):
        load_bundle(run)


def test_deeply_nested_card_is_refused(run):
    (run / "card.json").write_text("[" * 200_000)

    with pytest.raises(CorruptStoreError, match="not valid JSON"):
        load_bundle(run)


def test_huge_header_is_refused(run):
    forge(run, data=(2**62).to_bytes(8, "little") + b"{}")

    with pytest.raises(CorruptStoreError, match="not a safetensors file"):
        load_bundle(run)
