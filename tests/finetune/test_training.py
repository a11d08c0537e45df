"""Training: what it gives, what it keeps, and how it ends where something is wrong."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.backbones import load_backbone
from pipeline.errors import (
    DataError,
    ResourceError,
    StoreError,
    TooFewSamplesError,
    UnknownNameError,
)
from pipeline.finetune import Settings
from pipeline.finetune.blocks import Blocks
from pipeline.finetune.bundle import load_network
from pipeline.finetune.checkpoint import StoppedError
from pipeline.finetune.fit import Watcher
from pipeline.finetune.images import Batch
from pipeline.finetune.network import Classifier
from pipeline.finetune.objective import Classification
from pipeline.finetune.optim import lr_factor, parameter_groups
from pipeline.finetune.policies import Policy
from pipeline.finetune.trainer import Hooks, Trainer
from tests.finetune.conftest import write_photos


class Points:
    """Points in the plane, three clouds: a source of batches that has nothing to do with images."""

    def __init__(self, n=48, seed=0, batch_size=12):
        rng = np.random.default_rng(seed)
        codes = np.arange(n) % 3
        points = rng.normal(size=(n, 2)) + 3 * np.eye(3)[codes][:, :2]
        self.points = torch.tensor(points, dtype=torch.float32)
        self.targets = torch.from_numpy(codes)
        self.batch_size = batch_size

    @property
    def n_steps(self):
        return len(self.points) // self.batch_size

    def training(self, epoch, first_step=0):
        order = np.random.default_rng(epoch).permutation(len(self.points))
        for rows in np.array_split(order, self.n_steps)[first_step:]:
            yield Batch(self.points[rows], self.targets[rows])

    def plain(self):
        yield Batch(self.points, self.targets)

    def to_device(self, inputs, device):
        return inputs.to(device)


class Hungry(nn.Linear):
    """Runs out of memory for more than ``most`` samples at once."""

    most = 5

    def forward(self, inputs):
        if torch.is_grad_enabled() and len(inputs) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().forward(inputs)


def make_trainer(layer=nn.Linear, *, lr=0.05, choose=True, hooks=None, **settings):
    torch.manual_seed(0)
    dropout = nn.Dropout(settings.pop("drop", 0.0))
    trunk = nn.Sequential(layer(2, 8), dropout, nn.ReLU())
    network = Classifier(trunk, nn.Sequential(nn.Linear(8, 3)))
    names = frozenset(name for name, _ in trunk.named_parameters())
    policy = Policy("full", Blocks((), {"": 0, "0": 0, "1": 0, "2": 0}), names, 0, True)
    chosen = Settings(batch_size=12, **{"epochs": 4, "weight_decay": 0.0, **settings})
    return Trainer(
        network, policy, chosen, Points(), Points(30, seed=1) if choose else None,
        Classification(chosen, 3), lr=lr, hooks=hooks or Hooks(),
    )  # fmt: skip


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.network.parameters()])


# The loop itself, on anything


def test_it_learns_and_keeps_the_best_epoch():
    trainer = make_trainer(epochs=6)

    progress = trainer.run()

    best = max(entry["val_top1"] for entry in progress.curve)
    assert best > 0.8 > progress.curve[0]["val_top1"]
    assert progress.curve[progress.best_epoch]["val_top1"] == best
    assert [entry["epoch"] for entry in progress.curve] == list(range(7))
    assert trainer._evaluate()[1] == best
    seconds = [entry["seconds"] for entry in progress.curve]
    assert seconds == sorted(seconds)


def test_gradients_of_pieces_add_up_to_those_of_the_batch():
    whole, pieces = make_trainer(), make_trainer(micro_batch_size=5)

    whole.run()
    pieces.run()

    torch.testing.assert_close(weights(whole), weights(pieces), rtol=1e-4, atol=1e-5)


def test_out_of_memory_accumulates_instead():
    told = []
    hungry = make_trainer(Hungry, hooks=Hooks(note=told.append))
    whole = make_trainer()

    hungry.run()
    whole.run()

    assert "too little memory for 12 images at once: gradients of 6" in told[0]
    assert "gradients of 3 at a time are added up" in told[1]
    torch.testing.assert_close(weights(hungry), weights(whole), rtol=1e-4, atol=1e-5)


def test_out_of_memory_for_a_single_image(monkeypatch):
    monkeypatch.setattr(Hungry, "most", 0)

    with pytest.raises(ResourceError) as caught:
        make_trainer(Hungry).run()

    assert "too little memory to train on a single image" in str(caught.value)
    assert "--policy last:1" in str(caught.value)


def test_a_loss_that_is_no_number_keeps_the_best_state():
    trainer = make_trainer(epochs=5)
    source, stop_at = trainer.train, 3

    class Poisoned(Points):
        def training(self, epoch, first_step=0):
            for batch in source.training(epoch, first_step):
                poison = float("nan") if epoch == stop_at else 0.0
                yield Batch(batch.inputs + poison, batch.targets)

    trainer.train = Poisoned()
    progress = trainer.run()

    assert [entry["epoch"] for entry in progress.curve] == [0, 1, 2, 3]
    assert "not a number at step 13 (epoch 4" in progress.note
    kept = progress.best_epoch
    assert f"training stopped, and the state after epoch {kept} was kept" in progress.note
    assert "--lr 0.005, --clip 0.5 or --precision fp32" in progress.note
    assert torch.isfinite(weights(trainer)).all()
    assert trainer._evaluate()[1] == progress.curve[progress.best_epoch]["val_top1"]


def test_a_loss_that_is_no_number_in_the_first_step_keeps_the_start():
    trainer = make_trainer()
    trainer.train.points.fill_(torch.nan)

    progress = trainer.run()

    assert progress.best_epoch == 0
    assert "training stopped, and the state at the start was kept." in progress.note


def test_an_evaluation_that_is_no_number_is_worse_than_any_that_is():
    trainer = make_trainer(epochs=2, lr=1e-9)
    choose = trainer.choose
    with torch.no_grad():  # answers that are never right, so that accuracy is 0 in every epoch
        choose.targets = trainer.network(choose.points).argmin(dim=1)
    n_seen = iter(range(9))

    def plain():
        poison = torch.nan if next(n_seen) == 1 else 0.0
        yield Batch(choose.points + poison, choose.targets)

    choose.plain = plain
    progress = trainer.run()

    assert [entry["val_top1"] for entry in progress.curve] == [0.0, 0.0, 0.0]
    assert progress.curve[1]["val_loss"] is None
    assert progress.best_epoch != 1
    assert math.isfinite(progress.best_score[1])


def test_patience_stops_and_says_so():
    trainer = make_trainer(epochs=50, lr=1e-9, patience=2)

    progress = trainer.run()

    assert progress.curve[-1]["epoch"] == 2
    assert progress.note == "Stopped after epoch 2 of 50: none of the last 2 was better."


def test_a_budget_ends_training_before_its_last_epoch():
    trainer = make_trainer(epochs=1_000_000, budget_seconds=0.5, patience=0)

    progress = trainer.run()

    assert progress.step < trainer.n_steps
    assert progress.note.startswith("The time was up in epoch ")
    assert progress.curve[-1]["lr"] < 0.05


def test_without_samples_that_choose_the_last_epoch_is_kept():
    progress = make_trainer(choose=False, epochs=3).run()

    assert progress.best_epoch == 3
    assert {entry["val_top1"] for entry in progress.curve} == {None}


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}, {"optimizer": "sgd"}, {"drop": 0.3}])
def test_state_that_is_loaded_in_the_middle_goes_on_to_the_same_end(settings):
    whole = make_trainer(**settings)
    whole.run()
    calls = iter([False] * 6 + [True])
    stopped = make_trainer(hooks=Hooks(should_stop=lambda: next(calls)), **settings)
    with pytest.raises(StoppedError):
        stopped.run()
    resumed = make_trainer(**settings)
    resumed.load_state(stopped.state())
    assert 0 < resumed.progress.step < whole.n_steps
    assert resumed.progress.step_in_epoch > 0

    resumed.run()

    assert torch.equal(weights(whole), weights(resumed))
    assert without_seconds(whole.progress.curve) == without_seconds(resumed.progress.curve)


def without_seconds(curve):
    return [
        {k: v for k, v in entry.items() if k not in ("seconds", "images_per_second")}
        for entry in curve
    ]


def test_the_moving_average_is_what_is_evaluated_and_kept():
    plain, averaged = make_trainer(lr=0.2), make_trainer(lr=0.2, ema=0.99)

    plain.run()
    averaged.run()

    assert not torch.equal(weights(plain), weights(averaged))
    assert plain.progress.curve[1]["train_loss"] == averaged.progress.curve[1]["train_loss"]


def test_the_pull_to_the_start_keeps_the_trunk_near():
    def distance(l2_sp):
        trainer = make_trainer(l2_sp=l2_sp, epochs=8, clip=0.0)
        start = trainer.network.trunk[0].weight.detach().clone()
        trainer.run()
        return float((trainer.network.trunk[0].weight.detach() - start).norm())

    assert distance(10.0) < 0.5 * distance(0.0)


# Learning rates and groups


def test_warm_up_and_cosine():
    factors = [lr_factor(i / 100, 0.1) for i in range(101)]

    assert factors[0] == 0
    assert max(factors) == pytest.approx(1) == factors[10]
    assert factors[-1] == pytest.approx(0)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_groups_decay_with_depth_and_spare_vectors():
    backbone = load_backbone("timm:test_vit", weights="random", image_size=32)
    from pipeline.finetune.blocks import find_blocks
    from pipeline.finetune.network import make_head, make_trunk
    from pipeline.finetune.policies import make_policy

    settings = Settings(weight_decay=0.3, layer_decay=0.5)
    network = Classifier(make_trunk(backbone), make_head(backbone.trace.n_features, 3))
    blocks = find_blocks(network.trunk, backbone.stages, 32, 32)
    groups = parameter_groups(network, make_policy(network, blocks, settings), settings)

    assert sorted({group["scale"] for group in groups}) == [0.5**i for i in range(6, -1, -1)]
    names = {id(p): name for name, p in network.named_parameters()}
    spared = {names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert {"trunk.pos_embed", "trunk.cls_token"} & set(names.values()) <= spared
    assert all(name.endswith("weight") for name in decayed)
    assert spared | decayed == set(names.values())
    scales = {names[id(p)]: group["scale"] for group in groups for p in group["params"]}
    assert scales["head.0.weight"] == scales["trunk.blocks.5.mlp.fc2.weight"] == 1
    assert scales["trunk.blocks.4.mlp.fc2.weight"] == 0.5


# From images to a run


def test_a_run_learns_and_is_whole(train, tmp_path):
    run = train(settings={"epochs": 6, "lr": 5e-3})
    path = run.save(command="tlpipe finetune photos")
    document = json.loads((path / "run.json").read_text())

    assert run.metrics["top1"].value >= 0.8
    assert path == tmp_path / "runs" / "finetune-full-timm-test_efficientnet-0001"
    assert sorted(file.name for file in path.iterdir()) == [
        "card.json", "metrics.jsonl", "model.safetensors", "predictions.csv", "run.json",
    ]  # fmt: skip
    assert document["kind"] == "finetune"
    assert document["n_trained"] == document["n_parameters"]
    assert document["chosen_by"] == "20% of train (stratified, seed 0, 6 samples)"
    assert document["scored_on"] == "test"
    assert (document["head_start"], document["head_seconds"]) == ("fresh", 0)
    assert document["stores"] == []
    assert set(document["seconds"]) == {"load", "search", "train", "score", "total"}
    assert np.array(document["confusion"]["counts"]).sum() == document["n_samples"]["test"] == 6
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert lines == document["curve"]
    assert len((path / "predictions.csv").read_text().splitlines()) == 7
    assert not list((tmp_path / "runs").glob(".finetune*"))


def test_a_saved_network_gives_the_same_probabilities(train, photos):
    run = train()
    bundle = load_network(run.save())
    kept = run.results[0].predictions
    files = [str(photos / name) for name in kept.ids]

    probabilities, usable, failures = bundle.classify(files, device="cpu")

    assert usable == list(range(6))
    assert failures == {}
    np.testing.assert_allclose(probabilities.max(axis=1), kept.probability, atol=1e-6)
    assert [bundle.classes[i] for i in probabilities.argmax(axis=1)] == list(kept.predicted)


@pytest.mark.parametrize("policy", ["head", "last:1", "gradual", "norm", "bitfit", "scratch"])
def test_every_policy_trains_and_is_loaded_again(train, policy):
    run = train(settings={"policy": policy, "epochs": 2, "augment": "trivial", "mixup": 0.2})

    bundle = load_network(run.save())

    assert bundle.card["classes"] == ["a", "b", "c"]
    assert math.isfinite(run.metrics["nll"].value)
    assert (run.n_trained < run.n_parameters) == (policy not in ("gradual", "scratch"))


def test_lora_is_merged_into_a_plain_network(train):
    pytest.importorskip("peft")
    vit = load_backbone("timm:test_vit", weights="random", image_size=32)
    run = train(network=vit, settings={"policy": "lora"})

    bundle = load_network(run.save())

    assert run.n_trained < run.n_parameters
    assert not [name for name in bundle.network.state_dict() if "lora" in name]


def test_the_same_seed_gives_the_same_run_and_another_another(train):
    settings = {"augment": "trivial", "dropout": 0.2, "cutmix": 1.0, "ema": 0.9}
    one, two = train(settings=settings), train(settings={**settings, "n_threads": 1})
    other = train(settings={**settings, "seed": 1})

    assert without_seconds(one.curve) == without_seconds(two.curve)
    assert one.metrics_dict() == two.metrics_dict()
    assert without_seconds(one.curve) != without_seconds(other.curve)


def test_a_learning_rate_is_searched_and_leaves_no_trace(train):
    found = train(settings={"lr": None, "policy": "last:1"})
    given = train(settings={"lr": found.lr, "policy": "last:1"})

    assert {trial["lr"] for trial in found.lr_trials} == {1e-4, 3e-4, 1e-3, 3e-3}
    best = min(found.lr_trials[-2:], key=lambda trial: trial["loss"])
    assert found.lr == best["lr"]
    assert found.seconds["search"] > 0 == given.seconds["search"]
    assert without_seconds(found.curve) == without_seconds(given.curve)
    assert found.curve[0]["seconds"] >= found.seconds["search"]


def test_given_val_chooses_and_classes_that_train_lacks_count_as_errors(train, tmp_path):
    folder = tmp_path / "given"
    write_photos(folder, 6, "ab", "train")
    write_photos(folder, 2, "abv", "val")
    write_photos(folder, 2, "abt", "test")

    run = train(folder)

    assert run.chosen_by == "val (given, 6 samples)"
    assert run.n_fit == 12
    assert run.tasks[0].classes == ("a", "b", "v")
    assert run.results[0].score_classes == ("a", "b", "v", "t")
    assert max(entry["val_top1"] for entry in run.curve[1:]) <= 4 / 6
    assert run.metrics["top1"].value <= 4 / 6
    notes = "\n".join(run.notes)
    assert "Only val has samples of 1 class" in notes
    assert "2 samples that choose are of classes that nothing is trained on" in notes
    assert "2 test samples of 1 class that train does not have" in notes


def test_a_folder_that_cannot_be_written_to_is_told_before_an_image_is_read(train, tmp_path):
    (tmp_path / "runs").write_text("a file")
    plans = []

    with pytest.raises(StoreError, match=r"runs cannot be made .*\n  Give another folder with --o"):
        train(watcher=Watcher(on_plan=lambda *told: plans.append(told)))

    assert plans == []


def test_images_that_cannot_be_read_are_left_out_and_listed(train, photos):
    (photos / "a" / "00.png").write_bytes(b"no image")

    run = train()

    assert list(run.failures) == ["a/00.png"]
    assert "1 image cannot be read: left out." in run.notes
    assert sum(run.n_samples.values()) == 29
    assert load_network(run.save()).classes == ("a", "b", "c")


def test_bad_data(train, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in write_photos(tmp_path / "one", 4, "a").rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())

    with pytest.raises(TooFewSamplesError, match="are of one class, 'a'"):
        train(tmp_path / "one")
    with pytest.raises(DataError, match="has no labels, so there is nothing to learn"):
        train(flat)
    with pytest.raises(UnknownNameError, match="Unknown label column 'colour'"):
        train(label="colour")
    for path in (tmp_path / "one").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="None of the 4 images"):
        train(tmp_path / "one")


def test_stopped_and_taken_up_through_the_library(train, tmp_path):
    whole = train(settings={"epochs": 3})
    whole.checkpoint.remove()
    epochs = []
    watcher = Watcher(on_epoch=epochs.append, should_stop=lambda: len(epochs) == 2)
    with pytest.raises(StoppedError, match="all of it is kept"):
        train(settings={"epochs": 3}, watcher=watcher)

    told = []
    resumed = train(settings={"epochs": 3}, resume=True, watcher=Watcher(note=told.append))

    assert told == ["Taken up at step 3 of 9."]
    assert without_seconds(resumed.curve) == without_seconds(whole.curve)
    assert resumed.metrics_dict() == whole.metrics_dict()
    train(settings={"epochs": 3}, watcher=Watcher(note=told.append))
    assert "--resume would have taken it up" in told[-1]
