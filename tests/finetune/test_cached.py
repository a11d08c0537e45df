"""Training from stored activations: the same as ordinary training, without the images."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.errors import MismatchError, ResourceError, UsageError
from pipeline.extract.extractor import Settings as ExtractSettings
from pipeline.extract.extractor import extract
from pipeline.finetune import Settings
from pipeline.finetune.bundle import load_network
from pipeline.finetune.cached import Activations, StoredBatches, check_store, mixed_order
from pipeline.finetune.checkpoint import StoppedError
from pipeline.finetune.fit import Watcher
from pipeline.finetune.network import Classifier, make_head, make_trunk
from pipeline.finetune.top import SplitPoint, find_split, make_top
from pipeline.runs.comparison import read_contenders
from pipeline.store import open_store
from tests.finetune.conftest import SIZE

LAST = {"policy": "last:1", "cached": True}


@pytest.fixture(scope="session")
def vit():
    return load_backbone("timm:test_vit", weights="random", image_size=SIZE)


@pytest.fixture
def cached(train, tmp_path):
    """Train from stored activations, `last:1` unless told otherwise."""

    def run(*, settings=None, **arguments):
        arguments = {"cache_dir": tmp_path / "cache"} | arguments
        return train(settings={**LAST, **(settings or {})}, **arguments)

    return run


def stored_of(network, images, split):
    with torch.inference_mode():
        return network.feature_net((split.layer,), split.pooling)(images)[0].half().float()


def state(run):
    return {name: value.clone() for name, value in run.network.state_dict().items()}


# The top of a network


@pytest.mark.parametrize(
    ("name", "size", "n_last"),
    [
        ("torchvision:resnet18", 32, 1),
        ("timm:test_efficientnet", 32, 3),
        ("timm:test_vit", 32, 2),
        ("timm:test_convnext", 32, 1),
        ("torchvision:swin_t", 64, 1),  # channels last
        ("timm:vit_small_patch16_dinov3", 32, 1),  # rotary embeddings are made below
    ],
)
def test_the_top_of_any_network_gives_what_the_whole_gives(name, size, n_last):
    network = load_backbone(name, weights="random", image_size=size)
    split = find_split(network, f"last:{n_last}")
    whole = Classifier(make_trunk(network), make_head(network.trace.n_features, 3))
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    stored = stored_of(network, images, split)

    top = make_top(whole, split, images, stored)

    with torch.inference_mode():
        assert tuple(stored.shape[1:]) == split.shape
        torch.testing.assert_close(top(stored), whole(images), rtol=0.02, atol=1e-3)


def test_nothing_below_the_split_point_is_computed(backbone):
    split = find_split(backbone, "last:1")
    whole = Classifier(make_trunk(backbone), make_head(backbone.trace.n_features, 3))
    images = torch.randn(2, 3, SIZE, SIZE)
    stored = stored_of(backbone, images, split)
    top = make_top(whole, split, images, stored)
    devices = {}
    for name, module in top.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, i, o, name=name: devices.update({name: o.device})
            )

    top(stored)

    assert devices.pop("trunk.conv_stem") == torch.device("meta")
    assert set(devices.values()) == {torch.device("cpu")}
    assert all(name.startswith(("trunk.blocks.4", "trunk.conv_head", "head")) for name in devices)


def test_what_the_top_learns_the_whole_has_learned(backbone):
    split = find_split(backbone, "last:1")
    whole = Classifier(make_trunk(backbone), make_head(backbone.trace.n_features, 3))
    images = torch.randn(2, 3, SIZE, SIZE)
    stored = stored_of(backbone, images, split)
    top = make_top(whole, split, images, stored)

    with torch.no_grad():
        for parameter in top.parameters():
            parameter.mul_(1.1)
        top.trunk.bn2.running_mean.add_(0.5)

    assert torch.equal(whole.trunk.bn2.running_mean, top.trunk.bn2.running_mean)
    assert torch.equal(whole.trunk.conv_head.weight, top.trunk.conv_head.weight)


class Skips(nn.Module):
    """Looks past the split point: its last block also takes what went into the one before."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, images):
        first = self.a(images)
        return (self.c(self.b(first)) + first).mean((2, 3))


def test_a_network_that_looks_past_the_split_point_is_refused():
    split = SplitPoint("b", (3, 8, 8), {"a": (3, 8, 8)}, False, (3, 8, 8))
    whole = Classifier(Skips(), make_head(3, 2)).eval()
    images = torch.randn(2, 3, 8, 8)
    stored = whole.trunk.b(whole.trunk.a(images)).detach()

    with pytest.raises(UsageError, match="cannot go on from the stored activations of b alone"):
        make_top(whole, split, images, stored)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("full", "trains the whole depth of a network"),
        ("bitfit", "Use --cached with --policy last:N or head"),
        ("last:5", "leaves none frozen: this network has 5 blocks"),
        ("last:9", "Use --policy last:4 or less, or leave --cached out"),
    ],
)
def test_policies_without_a_frozen_bottom_are_refused(backbone, policy, text):
    with pytest.raises(UsageError, match=text):
        find_split(backbone, policy)


# Training


@pytest.mark.parametrize("policy", ["last:1", "last:2", "head"])
def test_cached_training_ends_where_ordinary_training_ends(train, cached, policy):
    settings = {"policy": policy, "epochs": 3, "lr": 3e-3}

    plain = train(settings=settings)
    fast = cached(settings=settings)

    for one, other in zip(plain.curve, fast.curve, strict=True):
        assert other["val_loss"] == pytest.approx(one["val_loss"], rel=0.01)
    assert (fast.n_trained, fast.n_parameters) == (plain.n_trained, plain.n_parameters)
    ids = [run.results[0].predictions.ids.tolist() for run in (fast, plain)]
    assert ids[0] == ids[1]
    start = train(settings={"policy": policy, "epochs": 1, "lr": 1e-12})
    before, after, wanted = state(start), state(fast), state(plain)
    for name, value in before.items():
        is_trained = not torch.allclose(value, wanted[name], atol=1e-7)
        assert is_trained != torch.equal(value, after[name]) or not value.is_floating_point()


def test_a_transformer_is_trained_with_its_batchnorm_free_top(train, cached, vit):
    plain = train(network=vit, settings={"policy": "last:2"})
    fast = cached(network=vit, settings={"policy": "last:2"})

    assert fast.curve[-1]["val_loss"] == pytest.approx(plain.curve[-1]["val_loss"], rel=0.01)


def test_batchnorm_statistics_follow_as_they_do_in_ordinary_training(train, cached):
    settings = {"policy": "last:1", "batchnorm": "train"}

    plain, fast = state(train(settings=settings)), state(cached(settings=settings))

    torch.testing.assert_close(
        fast["trunk.bn2.running_var"], plain["trunk.bn2.running_var"], rtol=0.01, atol=1e-6
    )
    assert torch.equal(fast["trunk.bn1.running_var"], plain["trunk.bn1.running_var"])


def test_training_and_scoring_read_no_image(cached, photos):
    def on_plan(what, *_):
        if what == "Training":
            shutil.rmtree(photos)

    run = cached(watcher=Watcher(on_plan=on_plan))

    assert not photos.exists()
    assert len(run.curve) == 3
    assert run.metrics["top1"].value >= 0


def test_the_saved_network_is_whole(cached, photos):
    run = cached()
    path = run.save()

    bundle = load_network(path)
    files = [str(photos / name) for name in run.results[0].predictions.ids]
    probabilities, usable, failures = bundle.classify(files, device="cpu")

    assert (len(usable), failures) == (len(files), {})
    found = np.array(bundle.classes)[probabilities.argmax(axis=1)]
    assert found.tolist() == run.results[0].predictions.predicted.tolist()
    document = json.loads((path / "run.json").read_text())
    assert document["settings"]["cached"] is True
    assert list(open_store(document["stores"][0]).layers) == ["blocks.3"]
    seconds = document["seconds"]
    assert seconds["embed"] > 0
    parts = sum(value for name, value in seconds.items() if name != "total")
    assert seconds["total"] == pytest.approx(parts, abs=1e-3)
    (contender,) = read_contenders(path)  # counts the embedding once, as the store tells it
    assert contender.extract_seconds > 0
    assert contender.fit_seconds == pytest.approx(seconds["total"] - seconds["embed"])


def test_a_second_training_embeds_nothing_and_says_no_size(cached):
    notes, plans = [], []
    watcher = Watcher(note=notes.append, on_plan=lambda *told: plans.append(told))

    cached(watcher=watcher)
    sizes = [note for note in notes if "bytes" in note]
    notes.clear()
    cached(watcher=watcher)

    assert sizes == [note for note in sizes if "30 images take 11,520 bytes in" in note]
    assert len(sizes) == 1
    assert not [note for note in notes if "bytes" in note]
    assert [todo for what, _, todo in plans if what == "Embedding"] == [30, 0]


def test_a_full_disk_is_told_before_anything_is_embedded(cached, monkeypatch):
    usage = namedtuple("usage", "total used free")(1, 1, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(ResourceError, match=r"take 11,520 bytes in .*has 1,000 bytes free"):
        cached()


def test_the_learning_rate_is_searched_on_activations(cached):
    run = cached(settings={"lr": None, "epochs": 1})

    assert len(run.lr_trials) == 6
    assert all(trial["loss"] for trial in run.lr_trials)


def test_stopped_while_embedding(cached):
    with pytest.raises(StoppedError, match="while activations were embedded; those that were"):
        cached(watcher=Watcher(should_stop=lambda: True))


def test_images_that_cannot_be_read_are_left_out_and_told(train, cached, photos):
    (photos / "a" / "03.png").write_bytes(b"no image")

    plain, fast = train(), cached()

    assert list(fast.failures) == list(plain.failures) == ["a/03.png"]
    assert fast.notes == plain.notes
    assert fast.data_digest == plain.data_digest


def test_stored_views_augment_and_the_same_seed_draws_the_same(cached):
    one, same = cached(settings={"n_views": 3}), cached(settings={"n_views": 3})
    plain = cached()

    assert [e["train_loss"] for e in one.curve] == [e["train_loss"] for e in same.curve]
    assert one.curve[-1]["train_loss"] != plain.curve[-1]["train_loss"]
    assert one.curve[0]["val_loss"] == pytest.approx(plain.curve[0]["val_loss"], rel=1e-6)


def test_stopped_and_taken_up_ends_the_same(cached):
    told = []
    stop = Watcher(on_progress=told.append, should_stop=lambda: sum(told) > 20)
    settings = {"n_views": 2, "checkpoint_seconds": 0.0}

    whole = cached(settings=settings)
    whole.checkpoint.remove()
    with pytest.raises(StoppedError):
        cached(settings=settings, watcher=stop)
    again = cached(settings=settings, resume=True)

    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"augment": "crop"}, "cannot be augmented anew"),
        ({"mixup": 0.2}, "mixup and CutMix"),
        ({"compile": True}, "torch.compile"),
        ({"cached": False, "n_views": 2}, "n_views is 2, but only cached training"),
    ],
)
def test_settings_that_need_images_are_refused(settings, text):
    with pytest.raises(UsageError, match=text):
        Settings(**{**LAST, "augment": "none", **settings})


# The store


@pytest.mark.parametrize(
    ("layers", "pooling", "weights", "text"),
    [
        ("blocks.2", "none", 0, r"holds layer blocks.2, but training goes on from blocks.3"),
        ("blocks.3", "avg", 0, r"holds layer blocks.3 as 48, but training needs it .*48×2×2"),
        ("blocks.3", "none", 1, r"with weights .{8}…, but timm:test_efficientnet with weights"),
    ],
)
def test_a_store_of_other_activations_is_refused(
    tmp_path, photos, backbone, layers, pooling, weights, text
):
    other = load_backbone("timm:test_efficientnet", weights="random", image_size=SIZE, seed=weights)
    source = open_source(str(photos))
    settings = ExtractSettings(layers=(layers,), pooling=pooling, n_threads=1)
    store = open_store(extract(source, other, settings, cache_dir=tmp_path / "cache").store)

    with pytest.raises(MismatchError, match=text) as caught:
        check_store(store, backbone, find_split(backbone, "last:1"))
    assert "--layers blocks.3 --pooling none" in str(caught.value)


@pytest.fixture
def activations(tmp_path, photos, backbone):
    settings = ExtractSettings(layers=("blocks.3",), pooling="none", n_views=2, n_threads=1)
    report = extract(open_source(str(photos)), backbone, settings, cache_dir=tmp_path / "cache")
    return lambda memory_bytes: Activations(open_store(report.store), "blocks.3", memory_bytes)


def batches_of(activations, rows):
    return StoredBatches(activations, rows, torch.from_numpy(rows), batch_size=4, seed=0)


def test_a_store_larger_than_memory_gives_every_sample_once(activations, monkeypatch):
    monkeypatch.setattr("pipeline.finetune.cached._STRETCH_BYTES", 2_000)
    rows = np.flatnonzero(np.arange(30) % 3)
    everything, little = activations(1_000_000), activations(4_000)
    whole = everything.read(rows, np.zeros(len(rows), np.intp))

    seen = list(batches_of(little, rows).training(epoch=1))
    plain = torch.cat([batch.inputs for batch in batches_of(little, rows).plain()])

    assert (everything.fits, little.fits) == (True, False)
    assert sorted(torch.cat([batch.targets for batch in seen]).tolist()) == rows.tolist()
    assert {len(batch.targets) for batch in seen} == {4}
    assert torch.equal(plain, whole)
    views = [everything.read(np.arange(30), np.full(30, view)) for view in (0, 1)]
    shown = [
        [k for k in (0, 1) if torch.equal(one, views[k][row])]
        for batch in seen
        for one, row in zip(batch.inputs, batch.targets.tolist(), strict=True)
    ]
    assert {k for found in shown for k in found} == {0, 1}
    assert all(shown)


@pytest.mark.parametrize("memory_bytes", [4_000, 1_000_000])
def test_an_epoch_goes_on_where_it_was_left(activations, memory_bytes):
    batches = batches_of(activations(memory_bytes), np.arange(30))

    whole = list(batches.training(epoch=2))
    rest = list(batches.training(epoch=2, first_step=3))

    assert len(rest) == len(whole) - 3
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)


def test_stretches_are_mixed_anew_in_every_epoch():
    one, other = (mixed_order(100, 8, 10, 3, seed=0, epoch=epoch) for epoch in (0, 1))

    assert np.sort(np.concatenate(one)).tolist() == list(range(100))
    assert np.concatenate(one).tolist() != np.concatenate(other).tolist()
    assert {len(part) for part in one} <= {7, 8}
    together = np.concatenate(one[:3])
    assert len(set((together // 10).tolist())) <= 4
