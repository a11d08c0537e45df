"""Several label columns learned at once: one trunk, a softmax a column, labels that are missing."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from pipeline.data import open_source
from pipeline.errors import (
    CorruptStoreError,
    DataError,
    MismatchError,
    TooFewSamplesError,
    UnknownNameError,
    UsageError,
)
from pipeline.finetune import Settings
from pipeline.finetune.blocks import Blocks
from pipeline.finetune.bundle import load_network
from pipeline.finetune.checkpoint import StoppedError
from pipeline.finetune.data import load_data, training_notes
from pipeline.finetune.fit import Watcher
from pipeline.finetune.network import Classifier
from pipeline.finetune.objective import MultiTask
from pipeline.finetune.policies import Policy
from pipeline.finetune.trainer import Hooks, Trainer
from pipeline.heads.tasks import NO_LABEL
from pipeline.runs.bundle import load_bundle
from pipeline.runs.tasks import MEAN_NOTE
from pipeline.sweep.multitask import fit_multitask
from tests.finetune.test_training import Points, weights, without_seconds

N_CLASSES = (3, 2)
BOTH = ("species", "light")


def write_table(folder, *, n=36, drop=lambda i: i % 5 == 0, splits=()):
    """A CSV file of images whose colour tells the species, and whose brightness the light."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for i in range(n):
        values = rng.integers(0, 60, (36, 36, 3)) + 60 * (i // 3 % 2)
        values[..., i % 3] += 110
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{i:02d}.png")
        light = "" if drop(i) else ("dark", "bright")[i // 3 % 2]
        row = [f"{i:02d}.png", "abc"[i % 3], light, f"scene {i // 4}"]
        rows.append([*row, splits[i % len(splits)]] if splits else row)
    header = ["path", *BOTH, "scene", *(["split"] if splits else [])]
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / "table.csv"


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "table")


def targets_of(n=12, seed=0):
    """Codes of two tasks, a third of the second one's missing."""
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, k, n) for k in N_CLASSES], axis=1)
    codes[::3, 1] = NO_LABEL
    return torch.from_numpy(codes)


def logits_of(n=12, seed=0):
    return torch.randn(n, sum(N_CLASSES), generator=torch.Generator().manual_seed(seed))


def loss_of(objective, logits, targets):
    _, shares = objective.mix(torch.zeros(len(targets), 3, 4, 4), targets)
    return objective.loss(logits, shares)


# The loss


def test_each_task_counts_its_labelled_samples_and_tasks_count_alike():
    logits, targets = logits_of(), targets_of()
    has_light = targets[:, 1] != NO_LABEL
    species = functional.cross_entropy(logits[:, :3], targets[:, 0])
    light = functional.cross_entropy(logits[has_light, 3:], targets[has_light, 1])

    equal = loss_of(MultiTask(Settings(), N_CLASSES), logits, targets)
    uncertain = loss_of(MultiTask(Settings(task_weights="uncertainty"), N_CLASSES), logits, targets)

    torch.testing.assert_close(equal, (species + light) / 2)
    torch.testing.assert_close(uncertain, species + light)


@pytest.mark.parametrize(
    "settings", [{}, {"mixup": 0.4, "label_smoothing": 0.1}, {"task_weights": "uncertainty"}]
)
def test_the_losses_of_pieces_and_of_processes_add_up(settings):
    objective = MultiTask(Settings(**settings), N_CLASSES)
    for parameter in objective.parameters:
        nn.init.constant_(parameter, 0.7)
    logits, targets = logits_of(), targets_of()
    torch.manual_seed(0)
    inputs, shares = objective.mix(torch.zeros(12, 3, 4, 4), targets)
    whole = objective.loss(logits, shares)

    pieces = [
        objective.loss(some, wanted) * len(some) / 12
        for some, wanted in zip(logits.split(5), shares.split(5), strict=True)
    ]

    torch.testing.assert_close(sum(pieces), whole)
    if not settings.get("mixup"):
        parts = [
            (some, objective.mix(inputs[: len(some)], codes, targets)[1])
            for some, codes in zip(logits.split(7), targets.split(7), strict=True)
        ]
        total = sum(objective.loss(some, wanted) * len(some) / 12 for some, wanted in parts)
        torch.testing.assert_close(total, whole)


@pytest.mark.parametrize("task_weights", ["equal", "uncertainty"])
def test_a_batch_without_a_label_of_a_task_teaches_nothing_of_it(task_weights):
    objective = MultiTask(Settings(task_weights=task_weights, label_smoothing=0.1), N_CLASSES)
    logits, targets = logits_of().requires_grad_(), targets_of()
    targets[:, 1] = NO_LABEL

    loss_of(objective, logits, targets).backward()

    assert torch.count_nonzero(logits.grad[:, :3]) > 0
    assert torch.count_nonzero(logits.grad[:, 3:]) == 0
    for parameter in objective.parameters:
        assert parameter.grad[0] != 0 == parameter.grad[1]


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_of_a_mixed_pair_the_labelled_share_counts(settings):
    objective = MultiTask(Settings(**settings), N_CLASSES)
    targets = targets_of()
    n_labelled = (targets != NO_LABEL).sum(dim=0)
    torch.manual_seed(2)

    _, shares = objective.mix(torch.rand(12, 3, 16, 16), targets)

    species, light = shares[:, :3].sum(dim=1), shares[:, 3:].sum(dim=1) * n_labelled[1] / 12
    torch.testing.assert_close(species, torch.ones(12))
    has_label = (targets[:, 1] != NO_LABEL).float()
    share = light[(has_label == 1) & (has_label.roll(1) == 0)][0]
    assert 0 < share < 1
    torch.testing.assert_close(light, has_label * share + has_label.roll(1) * (1 - share))
    torch.testing.assert_close(shares[:, 3:].sum(), torch.tensor(12.0))


def test_weights_are_learned_to_what_the_losses_ask_for():
    objective = MultiTask(Settings(task_weights="uncertainty"), N_CLASSES)
    logits, targets = logits_of() * 3, targets_of()
    has_light = targets[:, 1] != NO_LABEL
    losses = [
        functional.cross_entropy(logits[:, :3], targets[:, 0]),
        functional.cross_entropy(logits[has_light, 3:], targets[has_light, 1]),
    ]
    optimizer = torch.optim.Adam(objective.parameters, lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss_of(objective, logits, targets).backward()
        optimizer.step()

    # exp(-s) loss + s / 2 is least where s = log(2 loss)
    assert objective.task_weights == pytest.approx([float(1 / (2 * x)) for x in losses], rel=1e-2)


def test_scores_are_means_over_the_tasks_that_have_labels():
    logits, targets = logits_of(), targets_of()
    objective = MultiTask(Settings(), N_CLASSES)
    has_light = targets[:, 1] != NO_LABEL
    right = [
        (logits[:, :3].argmax(dim=1) == targets[:, 0]).double().mean(),
        (logits[has_light, 3:].argmax(dim=1) == targets[has_light, 1]).double().mean(),
    ]

    loss, top1 = objective.scores(logits, targets)

    assert top1 == pytest.approx(float(sum(right)) / 2)
    assert loss == pytest.approx(float(loss_of(objective, logits, targets)), rel=1e-5)
    targets[:, 1] = NO_LABEL
    assert objective.scores(logits, targets)[1] == pytest.approx(float(right[0]))


# The loop


class TwoLabels(Points):
    """Points with their cloud, and on which side of a line they are where that is known."""

    def __init__(self, n=48, seed=0, batch_size=12):
        super().__init__(n, seed, batch_size)
        side = (self.points[:, 0] > 1).long()
        side[::4] = NO_LABEL
        self.targets = torch.stack([self.targets, side], dim=1)


def make_trainer(*, hooks=None, **settings):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(2, 8), nn.ReLU())
    network = Classifier(trunk, nn.Sequential(nn.Linear(8, sum(N_CLASSES))))
    names = frozenset(name for name, _ in trunk.named_parameters())
    policy = Policy("full", Blocks((), {"": 0, "0": 0, "1": 0}), names, 0, True)
    chosen = Settings(**{"batch_size": 12, "epochs": 4, "task_weights": "uncertainty", **settings})
    return Trainer(
        network, policy, chosen, TwoLabels(), TwoLabels(30, seed=1),
        MultiTask(chosen, N_CLASSES), lr=0.05, hooks=hooks or Hooks(),
    )  # fmt: skip


def test_gradients_of_pieces_add_up_to_those_of_the_batch():
    whole, pieces = make_trainer(), make_trainer(micro_batch_size=5)

    whole.run()
    pieces.run()

    torch.testing.assert_close(weights(whole), weights(pieces), rtol=1e-4, atol=1e-5)
    assert pieces.objective.task_weights == pytest.approx(whole.objective.task_weights, rel=1e-3)
    assert whole.objective.task_weights != [1.0, 1.0]


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}, {"ema": 0.9}])
def test_learned_weights_go_on_where_they_were(settings):
    whole = make_trainer(**settings)
    whole.run()
    calls = iter([False] * 6 + [True])
    stopped = make_trainer(hooks=Hooks(should_stop=lambda: next(calls)), **settings)
    with pytest.raises(StoppedError):
        stopped.run()
    resumed = make_trainer(**settings)
    resumed.load_state(stopped.state())
    assert 0 < resumed.progress.step < whole.n_steps

    resumed.run()

    assert resumed.objective.task_weights == whole.objective.task_weights
    assert torch.equal(weights(whole), weights(resumed))
    assert without_seconds(whole.progress.curve) == without_seconds(resumed.progress.curve)


# From images to a run


def test_a_run_learns_both_and_is_whole(train, table):
    run = train(table, label=BOTH, settings={"epochs": 8, "lr": 5e-3})
    path = run.save(command="tlpipe finetune table.csv --label species --label light")
    document = json.loads((path / "run.json").read_text())
    card = json.loads((path / "card.json").read_text())

    tasks = [
        {"label": "species", "classes": ["a", "b", "c"]},
        {"label": "light", "classes": ["bright", "dark"]},
    ]
    assert card["tasks"] == tasks
    assert "classes" not in card
    assert [{k: task[k] for k in ("label", "classes")} for task in document["tasks"]] == tasks
    assert not {"classes", "confusion"} & set(document)
    assert document["label"] == "species + light"
    assert document["task_weights"] == [0.5, 0.5]
    assert sorted(file.name for file in path.iterdir()) == [
        "card.json", "metrics.jsonl", "model.safetensors", "predictions-light.csv",
        "predictions-species.csv", "run.json",
    ]  # fmt: skip
    species, light = (task["metrics"]["test"]["top1"] for task in document["tasks"])
    mean = (species["value"] + light["value"]) / 2
    assert document["metrics"]["test"]["top1"] == {"value": mean, "low": mean, "high": mean}
    assert mean > 0.8
    assert document["tasks"][0]["n_samples"] == {"test": 6, "train": 30}
    assert sum(document["tasks"][1]["n_samples"].values()) == 28
    notes = "\n".join(document["notes"])
    assert "8 of 36 samples without a label in column 'light': they count in the others" in notes
    assert MEAN_NOTE in notes


def test_a_saved_network_gives_the_probabilities_of_every_task(train, table):
    run = train(table, label=BOTH)
    bundle = load_network(run.save())

    assert bundle.tasks == run.tasks
    assert bundle.classes == ("a", "b", "c", "bright", "dark")
    for result, part in zip(run.results, (slice(0, 3), slice(3, 5)), strict=True):
        files = [str(table.parent / name) for name in result.predictions.ids]
        found, usable, _ = bundle.classify(files, device="cpu")
        assert len(usable) == len(files) > 0
        np.testing.assert_allclose(found[:, part].sum(axis=1), 1)
        np.testing.assert_allclose(
            found[:, part].max(axis=1), result.predictions.probability, atol=1e-6
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "last:1", "cached": True, "lr": None},
        {"policy": "gradual", "mixup": 0.2, "cutmix": 1.0, "task_weights": "uncertainty"},
        {"policy": "norm", "ema": 0.9, "hidden": (8,), "label_smoothing": 0.1},
    ],
)
def test_whatever_trains_one_column_trains_two(train, table, tmp_path, settings):
    run = train(table, label=BOTH, settings=settings, cache_dir=tmp_path / "cache")

    assert [set(result.scores) for result in run.results] == [{"test", "val"}] * 2
    assert np.isfinite([result.scores["val"]["nll"].value for result in run.results]).all()
    assert load_network(run.save()).tasks == run.tasks
    assert (run.task_weights == [0.5, 0.5]) == (run.settings.task_weights == "equal")


def test_cached_and_ordinary_training_have_the_same_protocol(train, table, tmp_path):
    arguments = {"label": BOTH, "groups": "scene", "cache_dir": tmp_path / "cache"}
    plain = train(table, settings={"policy": "last:1"}, **arguments)
    cached = train(table, settings={"policy": "last:1", "cached": True}, **arguments)

    assert cached.data_digest == plain.data_digest
    assert cached.chosen_by == plain.chosen_by
    assert cached.split_origin == plain.split_origin
    assert cached.results[1].n_samples == plain.results[1].n_samples
    assert cached.results[1].predictions.ids.tolist() == plain.results[1].predictions.ids.tolist()
    losses = [run.curve[-1]["val_loss"] for run in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_stopped_and_taken_up_with_learned_weights(train, table):
    arguments = {"label": BOTH, "settings": {"epochs": 3, "task_weights": "uncertainty"}}
    whole = train(table, **arguments)
    whole.checkpoint.remove()
    epochs = []
    watcher = Watcher(on_epoch=epochs.append, should_stop=lambda: len(epochs) == 2)
    with pytest.raises(StoppedError):
        train(table, watcher=watcher, **arguments)

    resumed = train(table, resume=True, **arguments)

    assert resumed.task_weights == whole.task_weights
    assert without_seconds(resumed.curve) == without_seconds(whole.curve)
    assert resumed.metrics_dict() == whole.metrics_dict()


def test_a_column_that_test_has_no_label_of_is_scored_on_val(train, tmp_path):
    splits = ("train", "train", "val", "test")
    table = write_table(tmp_path / "t", n=24, drop=lambda i: i % 4 == 3, splits=splits)

    run = train(table, label=BOTH)

    assert [result.scored_on for result in run.results] == ["test", "val"]
    assert run.scored_on == "val"
    assert "Warning: no test sample has a label in column 'light'." in run.notes
    run.save()


def test_one_label_is_a_run_as_ever(train, table):
    run = train(table, label=["species"])
    document = json.loads((run.save() / "run.json").read_text())

    assert document["label"] == "species"
    assert document["classes"] == ["a", "b", "c"]
    assert not {"tasks", "task_weights"} & set(document)
    assert document["metrics"]["test"]["top1"]["low"] < document["metrics"]["test"]["top1"]["high"]


# Groups


def test_no_group_is_ever_parted(table, tmp_path):
    source = open_source(str(table), cache_dir=tmp_path / "cache")
    scenes = {sample.id: sample.labels[2] for sample in source.samples}

    data = load_data(source, Settings(n_threads=2), BOTH, groups="scene")

    ids = data.samples.inputs.ids
    parts = [data.fold.fit, data.fold.choose, data.samples.protocol.test]
    found = [{scenes[name] for name in ids[rows]} for rows in parts]
    assert all(found)
    assert len(set.union(*found)) == sum(map(len, found))
    assert sum(map(len, parts)) == 36
    assert data.samples.split_origin == (
        "made: a fifth of the groups of scene held out for test, seed 0"
    )
    assert f"samples of {len(found[1])} group" in data.samples.protocol.chosen_by
    assert training_notes(data)


def test_given_splits_that_part_a_group_are_refused(train, tmp_path):
    table = write_table(tmp_path / "t", splits=("train", "test"))

    with pytest.raises(DataError, match="9 groups of 9 have samples in more than one split"):
        train(table, label="species", groups="scene")


# The head to start from


@pytest.fixture
def head_run(embed, table, tmp_path):
    """The store, and a run of a head that learned both columns on it."""
    store = embed(table)
    settings = [{"epochs": 3, "hidden": [12, 6]}]
    return store, fit_multitask(store, BOTH, settings=settings).save(tmp_path / "runs")


def test_a_head_that_learned_the_same_columns_is_the_start(train, table, head_run):
    store, path = head_run
    X = np.asarray(store.features("test", ["penultimate"]), np.float32)
    expected = load_bundle(path).predict_proba([X])
    shutil.rmtree(store.path)  # or it would be fitted again, without the samples that choose

    quick = {"epochs": 1, "lr": 1e-12, "policy": "head"}
    run = train(table, label=BOTH, init_head="auto", settings=quick)

    assert run.head == str(path)
    assert run.architecture.hidden == (12, 6)
    for result, part in zip(run.results, (slice(0, 3), slice(3, 5)), strict=True):
        rows = [store.ids("test").index(name) for name in result.predictions.ids]
        found = result.predictions.probability
        np.testing.assert_allclose(found, expected[rows, part].max(axis=1), atol=1e-4)


def test_such_a_head_is_fitted_again_without_the_samples_that_choose(train, table, head_run):
    _, path = head_run
    settings = {"epochs": 1, "lr": 1e-12, "policy": "head"}

    run = train(table, label=BOTH, init_head=path, settings=settings)

    assert "mlp" in run.notes[-2]
    assert "fitted again without the samples that choose" in run.notes[-2]
    plain = train(table, label=BOTH, settings={**settings, "hidden": (5,)}, init_head="auto")
    assert plain.head == "fresh"


def test_a_head_of_other_columns_is_refused(train, table, head_run):
    _, path = head_run

    for label in (BOTH[::-1], "species"):
        with pytest.raises(MismatchError) as caught:
            train(table, label=label, init_head=path)
        text = str(caught.value)
        assert "has learned species (3 classes) + light (2 classes), but this training" in text
        assert train(table, label=label, init_head="auto").head == "fresh"


# What cannot be


def test_columns_that_cannot_be_learned(train, tmp_path, table):
    with pytest.raises(UnknownNameError, match="Unknown label column 'lihgt'"):
        train(table, label=["species", "lihgt"])
    with pytest.raises(UsageError, match="was named twice: light, light"):
        train(table, label=["light", "light"])
    with pytest.raises(UnknownNameError, match="Unknown group column 'place'"):
        train(table, label=BOTH, groups="place")
    dark = write_table(tmp_path / "dark", drop=lambda i: i // 3 % 2)
    with pytest.raises(TooFewSamplesError) as caught:
        train(dark, label=BOTH)
    assert "labels of one class, 'dark' in column 'light'; at least two" in str(caught.value)
    blank = write_table(tmp_path / "blank", drop=lambda _: True)
    with pytest.raises(TooFewSamplesError, match="samples have no label in column 'light'"):
        train(blank, label=BOTH)


def test_options_that_need_one_label_or_several(train, table):
    with pytest.raises(UsageError, match="only 'species' is learned"):
        train(table, label="species", settings={"task_weights": "uncertainty"})
    with pytest.raises(UnknownNameError, match="Unknown task weighting 'learned'"):
        Settings(task_weights="learned")


@pytest.mark.parametrize(
    "tasks",
    [[], {}, "species", [{"label": "a"}], [{"label": "a", "classes": ["x"]}],
     [{"label": 1, "classes": ["x", "y"]}], [{"label": "a", "classes": ["x", "y"]}] * 2],
)  # fmt: skip
def test_a_card_whose_tasks_make_no_sense(train, table, tasks):
    path = train(table, label=BOTH, settings={"epochs": 1}).save()
    card = json.loads((path / "card.json").read_text())
    (path / "card.json").write_text(json.dumps({**card, "tasks": tasks}))

    with pytest.raises(CorruptStoreError, match="was it changed"):
        load_network(path)
