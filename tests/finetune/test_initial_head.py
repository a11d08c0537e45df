"""Training that starts from a head fitted on cached features."""

import shutil

import numpy as np
import pytest
import torch

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.errors import MismatchError, StoreError
from pipeline.finetune import Settings
from pipeline.finetune.checkpoint import StoppedError
from pipeline.finetune.fit import Watcher
from pipeline.finetune.initial import _steady, head_module
from pipeline.heads import make_head
from pipeline.heads.calibration import fit_temperature
from pipeline.heads.model import HeadModel
from pipeline.heads.scaling import fit_scaler
from pipeline.heads.tasks import Task
from pipeline.runs.bundle import load_bundle
from pipeline.sweep.fit import fit_head
from tests.finetune.conftest import SIZE, write_photos

SETTINGS = {
    "logreg": [{"C": 1.0}],
    "linear": [{"epochs": 3}],
    "ridge": None,
    "svm": [{"kernel": "linear", "C": 0.1}],
    "mlp": [{"epochs": 3, "hidden": [12, 6]}],
}


def network_logits(run, photos):
    """Of the network as it starts, for the images that were scored."""
    network = run.network.eval()
    return network, [str(photos / name) for name in run.results[0].predictions.ids]


@pytest.mark.parametrize("scaling", ["standardise", "l2", "none"])
@pytest.mark.parametrize("head", SETTINGS)
def test_folded_layers_give_the_models_probabilities(embed, head, scaling):
    store = embed()
    model = fit_head(store, head=head, scaling=scaling, settings=SETTINGS[head]).model
    X = np.asarray(store.features(layers=["penultimate"]), np.float32)

    # Other classes first, to see that outputs are put in order.
    module = head_module(model, [Task("label", ("c", "a", "b"))], path=store.path)

    with torch.inference_mode():
        logits = module(torch.from_numpy(X)).double()
    np.testing.assert_allclose(
        logits.softmax(dim=1).numpy(), model.predict_proba(X)[:, [2, 0, 1]], atol=2e-5
    )
    shift = logits.numpy() - (model.logits(X) / model.temperature)[:, [2, 0, 1]]
    np.testing.assert_allclose(shift, 0, atol=2e-3 * (1 + np.abs(logits.numpy()).max()))


@pytest.mark.parametrize("head", ["logreg", "svm"])
def test_two_classes_have_two_outputs(tmp_path, embed, head):
    store = embed(write_photos(tmp_path / "two", 8, "ab"))
    model = fit_head(store, head=head, settings=SETTINGS[head]).model
    X = np.asarray(store.features(layers=["penultimate"]), np.float32)

    module = head_module(model, [Task("label", ("a", "b"))], path=store.path)

    found = module(torch.from_numpy(X)).detach().softmax(dim=1)
    np.testing.assert_allclose(found.numpy(), model.predict_proba(X), atol=2e-5)


def test_at_the_first_step_the_network_is_the_run(embed, train, tmp_path):
    """Without its store the run's head is taken as it is: same probabilities, before training."""
    store = embed()
    fitted = fit_head(store, settings=[{"C": 1.0}])
    path = fitted.save(tmp_path / "runs")
    X = np.asarray(store.features("test", ["penultimate"]), np.float32)
    expected = load_bundle(path).predict_proba([X])
    shutil.rmtree(store.path)

    run = train(init_head=path, settings={"epochs": 1, "lr": 1e-12, "policy": "head"})

    assert list(run.results[0].predictions.ids) == store.ids("test")
    found = run.results[0].predictions.probability
    np.testing.assert_allclose(found, expected.max(axis=1), atol=1e-4)
    note = next(note for note in run.notes if note.startswith("The head starts as logreg of"))
    assert f"Its store {store.path} is not here, so it could not be fitted without the" in note
    assert run.best_epoch == 1  # the start has seen those who choose, and is no candidate


def test_with_its_store_the_setting_is_fitted_without_those_who_choose(embed, train, tmp_path):
    store = embed()
    fitted = fit_head(store, settings=[{"C": 1.0}])
    path = fitted.save(tmp_path / "runs")

    run = train(settings={"epochs": 1, "lr": 1e-12, "policy": "head"}, init_head="auto")

    document = run.to_dict()
    assert document["head_start"] == str(path)
    assert document["stores"] == [str(store.path)]
    assert document["head_seconds"] == fitted.seconds["total"] > 0
    note = next(note for note in run.notes if note.startswith("The head starts as logreg of"))
    assert "fitted again without the samples that choose" in note
    assert "--init-head none" in note
    # The same model by hand, on the samples that train.
    chose = set(_choosers(run, train, tmp_path))
    ids = np.array(store.ids("train"))
    rows = ~np.isin(ids, sorted(chose))
    X = np.asarray(store.features("train", ["penultimate"]), np.float32)
    y = np.array([("a", "b", "c").index(label) for label in store.labels("label", "train")])
    scaler = _steady(fit_scaler(X, "standardise"), X)  # of all of train, as with folds
    head = make_head("logreg", C=1.0).fit(scaler(X[rows]), y[rows])
    temperature = fit_temperature(head.logits(scaler(X[~rows])), y[~rows])
    model = HeadModel(scaler, head, temperature, ("a", "b", "c"))
    test = np.asarray(store.features("test", ["penultimate"]), np.float32)
    expected = model.predict_proba(test).max(axis=1)
    np.testing.assert_allclose(run.results[0].predictions.probability, expected, atol=1e-4)


def test_features_that_are_all_but_dead_are_not_enlarged():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 6)) * [1e-3, 0, 1, 3, 3, 1000] + [0, 5, 2, 0, 0, 0]

    steady = _steady(fit_scaler(X, "standardise"), X)

    np.testing.assert_allclose(steady.scale, [3, 3, 3, 3, 3, 1000], rtol=0.15)
    np.testing.assert_allclose(steady.mean, X.mean(axis=0))
    # What wakes up by one moves no output further than what was awake.
    woken = steady(X + np.eye(6)[0]) - steady(X)
    assert np.abs(woken).max() < 1
    constant = np.ones((5, 2))
    np.testing.assert_array_equal(_steady(fit_scaler(constant, "standardise"), constant).scale, 1)
    unscaled = fit_scaler(X, "l2")
    assert _steady(unscaled, X) is unscaled


def _choosers(run, train, tmp_path):
    from pipeline.data.splits import stratified_split

    source = open_source(str(tmp_path / "photos"), cache_dir=tmp_path / "cache")
    samples = [sample for sample in source.samples if sample.split == "train"]
    held = stratified_split([s.id for s in samples], [s.labels[0] for s in samples], 0.2, 0)
    return [sample.id for sample, is_held in zip(samples, held, strict=True) if is_held]


def test_a_class_that_only_val_has_is_not_learned_from_those_who_choose(embed, train, tmp_path):
    folder = tmp_path / "given"
    write_photos(folder, 8, "ab", "train")
    write_photos(folder, 4, "abc", "val")
    write_photos(folder, 3, "abc", "test")
    path = fit_head(embed(folder), settings=[{"C": 1.0}]).save(tmp_path / "runs")

    for init_head in ("auto", path):
        run = train(
            folder, settings={"epochs": 1, "lr": 1e-12, "policy": "head"}, init_head=init_head
        )

        assert run.head == str(path)
        (note,) = [note for note in run.notes if note.startswith("The head starts as logreg of")]
        assert ", fitted again without the samples that choose. --init-head none" in note
        assert run.curve[0]["val_top1"] <= 2 / 3
        assert run.best_epoch == 0  # the start is a candidate: those who choose are new to it
        assert "c" not in run.results[0].predictions.predicted
        assert run.network.head[-1].weight[2].abs().max() < 1e-6


def test_a_class_that_a_head_never_saw_is_as_good_as_impossible(embed, tmp_path):
    store = embed(write_photos(tmp_path / "two", 8, "ab"))
    model = fit_head(store, settings=[{"C": 1.0}]).model
    X = np.asarray(store.features(layers=["penultimate"]), np.float32)
    tasks = [Task("label", ("a", "b", "c"))]

    found = head_module(model, tasks, path=store.path, partial=True)(torch.from_numpy(X))

    probabilities = found.detach().softmax(dim=1).numpy()
    assert 0 < probabilities[:, 2].max() < 1e-3
    np.testing.assert_allclose(probabilities[:, :2], model.predict_proba(X)[:, :2], atol=1e-3)
    with pytest.raises(MismatchError, match="has never seen a sample of 'c'"):
        head_module(model, tasks, path=store.path)


def test_why_a_head_could_not_be_fitted_again_is_said(embed, train, photos, tmp_path):
    store = embed()
    path = fit_head(store, settings=[{"C": 1.0}]).save(tmp_path / "runs")
    for i in range(4):
        shutil.copy(photos / "a" / "00.png", photos / "a" / f"copy{i}.png")

    run = train(settings={"epochs": 1, "policy": "head"}, init_head=path)

    note = next(note for note in run.notes if note.startswith("The head starts as logreg of"))
    assert f"Its store {store.path} lacks images that are trained on, so it could not be" in note
    assert "their scores flatter the first epochs" in note


def test_the_same_head_of_another_run_takes_up_what_was_stopped(embed, train, tmp_path):
    store = embed()
    settings = {"epochs": 3, "policy": "head"}
    fit_head(store, settings=[{"C": 1.0}]).save(tmp_path / "runs")
    epochs, told = [], []
    watcher = Watcher(on_epoch=epochs.append, should_stop=lambda: len(epochs) == 2)
    with pytest.raises(StoppedError):
        train(settings=settings, init_head="auto", watcher=watcher)
    again = fit_head(store, settings=[{"C": 1.0}]).save(tmp_path / "runs")

    watcher = Watcher(note=told.append)
    run = train(settings=settings, init_head="auto", resume=True, watcher=watcher)

    assert run.head == str(again)
    assert told[-1] == "Taken up at step 3 of 9."
    other = fit_head(store, settings=[{"C": 0.1}]).save(tmp_path / "runs")
    assert train(settings=settings, init_head=other).checkpoint.path != run.checkpoint.path


def test_a_fine_tuned_network_is_no_head_to_start_from(train):
    path = train(settings={"epochs": 1, "policy": "head"}).save()

    with pytest.raises(MismatchError) as caught:
        train(init_head=path)

    assert f"{path} is a fine-tuned network; a training starts from a head" in str(caught.value)
    assert "Name a run of fit-head or sweep, or use --init-head none." in str(caught.value)


def test_policy_head_on_plain_views_sees_the_features_of_the_store(embed, backbone, photos):
    from pipeline.finetune.data import load_data
    from pipeline.finetune.evaluate import outputs_of
    from pipeline.finetune.images import ImageBatches
    from pipeline.finetune.network import make_trunk

    store = embed()
    source = open_source(str(photos), cache_dir=photos.parent / "cache")
    data = load_data(source, Settings(n_threads=2))
    rows = np.arange(len(data.samples.codes))
    images = ImageBatches(
        data.images, rows, data.samples.inputs.ids, torch.from_numpy(data.samples.codes),
        backbone.preprocess, lambda pixels, _: pixels, 8, 0,
    )  # fmt: skip

    features = outputs_of(make_trunk(backbone), images, torch.device("cpu")).flatten(1).numpy()

    assert store.ids() == data.samples.inputs.ids.tolist()
    expected = np.asarray(store.features(layers=["penultimate"]))
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
    assert fit_head(store).data_digest == data.samples.inputs.digest()


def test_auto_takes_the_best_that_fits_and_none_takes_none(embed, train, tmp_path):
    store = embed()
    fit_head(store, head="knn").save(tmp_path / "runs")
    fit_head(store, head="mlp", settings=SETTINGS["mlp"]).save(tmp_path / "runs")
    weak = fit_head(store, head="ridge", settings=[{"alpha": 1e9}]).save(tmp_path / "runs")
    strong = fit_head(store, settings=[{"C": 1.0}]).save(tmp_path / "runs")
    settings = {"epochs": 1}

    assert train(settings=settings, init_head="auto").head in (str(strong), str(weak))
    assert train(settings=settings, init_head="none").head == "fresh"
    assert train(settings={**settings, "policy": "scratch"}, init_head="auto").head == "fresh"
    deep = train(settings={**settings, "hidden": (12, 6)}, init_head="auto")
    assert "mlp" in deep.head


def test_a_head_of_another_backbone_size_or_layer_is_refused(embed, train, tmp_path, photos):
    other = load_backbone("timm:test_resnet", weights="random", image_size=SIZE)
    sized = load_backbone("timm:test_efficientnet", weights="random", image_size=64)
    reseeded = load_backbone("timm:test_efficientnet", weights="random", image_size=SIZE, seed=1)
    for network, said in (
        (other, "features of backbone timm:test_resnet, but this training has timm:test_eff"),
        (reseeded, "features of weights "),
        (sized, "features of preprocessing {'height': 64"),
    ):
        path = fit_head(embed(network=network)).save(tmp_path / "runs")
        with pytest.raises(MismatchError) as caught:
            train(init_head=path)
        assert said in str(caught.value)
        assert "--init-head none" in str(caught.value)
        assert train(init_head="auto", settings={"epochs": 1}).head == "fresh"


def test_heads_that_are_no_part_of_a_network_or_know_other_classes(embed, train, tmp_path):
    knn = fit_head(embed(), head="knn").save(tmp_path / "runs")
    more = embed(write_photos(tmp_path / "more", 6, "abcd"))
    four = fit_head(more).save(tmp_path / "runs")

    with pytest.raises(MismatchError, match=r"no part of a network \(KNNHead\)"):
        train(init_head=knn)
    with pytest.raises(MismatchError, match="knows 4 classes, and the data has 3: it has 'd'"):
        train(init_head=four)
    with pytest.raises(StoreError, match="is not a run"):
        train(init_head=tmp_path / "nowhere")
