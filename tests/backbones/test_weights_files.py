import argparse
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.backbones import load_backbone
from pipeline.backbones.weights import load_weights, read_state_dict, weights_digest
from pipeline.errors import UnknownNameError, UsageError, WeightsError

NAME = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def state():
    return load_backbone(NAME, weights="random", seed=3).module.state_dict()


@pytest.fixture(scope="module")
def digest():
    return load_backbone(NAME, weights="random", seed=3).weights_digest


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))


def load_file(path):
    return load_backbone(NAME, weights=str(path))


def test_both_formats_give_the_same_weights(state, digest, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for file in tmp_path.iterdir():
        backbone = load_file(file)
        assert backbone.weights_digest == digest
        assert backbone.weights == str(file)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "teacher"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module._orig_mod."])
def test_wrappers_of_training_scripts_are_undone(key, prefix, tmp_path):
    net = small_net()
    state = {f"{prefix}{name}": values for name, values in net.state_dict().items()}
    checkpoint = {key: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(checkpoint, tmp_path / "c.pth")
    other = small_net()
    load_weights(
        other,
        read_state_dict(tmp_path / "c.pth"),
        classifiers=(),
        name="net",
        path=tmp_path / "c.pth",
    )
    assert weights_digest(other.state_dict()) == weights_digest(net.state_dict())


def test_a_projection_head_beside_the_backbone_is_left_out(state, digest, tmp_path):
    wrapped = {f"backbone.{name}": values for name, values in state.items()}
    torch.save({"teacher": {**wrapped, "head.mlp.0.weight": torch.ones(2, 2)}}, tmp_path / "d.pth")
    assert load_file(tmp_path / "d.pth").weights_digest == digest


def test_the_classifier_may_be_of_other_classes_or_missing(state, tmp_path):
    other = {**state, "fc.weight": torch.ones(7, 1024), "fc.bias": torch.ones(7)}
    missing = {name: values for name, values in state.items() if not name.startswith("fc.")}
    deeper = {**missing, "fc.1.weight": torch.ones(7, 1024), "fc.1.bias": torch.ones(7)}
    digests = set()
    for i, variant in enumerate((other, missing, deeper)):
        torch.save(variant, tmp_path / f"{i}.pth")
        backbone = load_file(tmp_path / f"{i}.pth")
        assert torch.equal(backbone.module.conv1[0].weight, state["conv1.0.weight"])
        assert not backbone.module.fc.weight.any()
        digests.add(backbone.weights_digest)
    assert len(digests) == 1


def test_old_files_without_counters_load(state, digest, tmp_path):
    old = {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_file(tmp_path / "old.pth").weights_digest == digest


def test_old_densenet_names_are_understood(tmp_path):
    backbone = load_backbone("densenet121", weights="random", image_size=64)
    old = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): values
        for name, values in backbone.module.state_dict().items()
    }
    torch.save(old, tmp_path / "d.pth")
    loaded = load_backbone("densenet121", weights=str(tmp_path / "d.pth"), image_size=64)
    assert loaded.weights_digest == backbone.weights_digest


def test_auxiliary_heads_are_left_out(tmp_path):
    backbone = load_backbone("googlenet", weights="random")
    aux = {"aux1.conv.conv.weight": torch.ones(1), "aux2.fc1.bias": torch.ones(1)}
    torch.save({**backbone.module.state_dict(), **aux}, tmp_path / "g.pth")
    loaded = load_backbone("googlenet", weights=str(tmp_path / "g.pth"))
    assert loaded.weights_digest == backbone.weights_digest


def test_position_embeddings_are_resampled_for_another_size(tmp_path):
    small = load_backbone("timm:test_vit", weights="random")
    save_file(small.module.state_dict(), tmp_path / "v.safetensors")
    file = str(tmp_path / "v.safetensors")
    assert load_backbone("timm:test_vit", weights=file).weights_digest == small.weights_digest
    large = load_backbone("timm:test_vit", weights=file, image_size=96)
    assert torch.equal(
        large.module.blocks[0].attn.qkv.weight, small.module.blocks[0].attn.qkv.weight
    )


def test_weights_of_another_network_are_refused_and_it_is_named(tmp_path):
    other = load_backbone("squeezenet1_1", weights="random")
    torch.save(other.module.state_dict(), tmp_path / "s.pth")
    with pytest.raises(WeightsError, match="does not fit torchvision:shufflenet") as caught:
        load_file(tmp_path / "s.pth")
    text = str(caught.value)
    assert "of 338 tensors missing: conv1.0.weight" in text
    assert "52 of 52 tensors unknown: features.0.weight" in text
    assert "as many parameters as torchvision:squeezenet1_1" in text


def test_one_tensor_of_another_shape_is_named(state, tmp_path):
    torch.save({**state, "conv1.0.weight": torch.zeros(3, 3)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"conv1\.0\.weight \(3, 3\) where \(24, 3, 3, 3\)"):
        load_file(tmp_path / "x.pth")


def test_weights_that_are_not_finite_are_refused(state, tmp_path):
    broken = torch.full((24, 3, 3, 3), torch.nan)
    torch.save({**state, "conv1.0.weight": broken}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"not finite in 1 of 338 tensors: conv1\.0\.weight"):
        load_file(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("part", [0.001, 0.3, 0.7, 0.999])
def test_a_file_that_is_cut_short_is_refused(state, tmp_path, suffix, part):
    file = tmp_path / f"w{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
    with pytest.raises(WeightsError, match=r"(damaged or cut short|not a weights file)"):
        load_file(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_anywhere_is_a_plain_error(tmp_path, zipped):
    file = tmp_path / "w.pth"
    torch.save(small_net().state_dict(), file, _use_new_zipfile_serialization=zipped)
    content, numbers = file.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[numbers.randrange(600)] = numbers.randrange(256)
        file.write_bytes(damaged)
        try:
            outcomes.add(type(read_state_dict(file)))
        except WeightsError:
            outcomes.add(WeightsError)
    assert outcomes <= {dict, WeightsError}
    assert WeightsError in outcomes


class Program:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = {"state_dict": state, "extra": Program()}
    torch.save(evil, tmp_path / "evil.pth")
    torch.save(evil, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "2.pkl").write_bytes(pickle.dumps(evil, protocol=2))
    (tmp_path / "4.pkl").write_bytes(pickle.dumps(evil, protocol=4))
    for name in ("evil.pth", "old.pth", "2.pkl", "4.pkl"):
        with pytest.raises(WeightsError, match=r"was refused: it holds more than tensors \(\w+"):
            load_file(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_network_is_refused_with_the_remedy(tmp_path):
    torch.save(small_net(), tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=r"safetensors\.torch\.save_file\(model\.state_dict\(\)"):
        load_file(tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html><html>'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_is_no_weights_file_is_named(content, text, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        load_file(tmp_path / "w.pth")
    assert text in str(caught.value)


def test_a_checkpoint_without_weights_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match=r"found epoch, optimizer(.|\n)*state_dict, model"):
        load_file(tmp_path / "c.pth")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(WeightsError, match="There is no weights file"):
        load_file(tmp_path / "none.pth")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(WeightsError, match=r"is a folder.*It holds: model\.safetensors"):
        load_file(tmp_path)


def test_a_mistyped_tag_is_answered_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="Did you mean: IMAGENET1K_V2, IMAGENET1K_V1"):
        load_backbone("resnet50", weights="IMAGENET1K")
    with pytest.raises(UsageError, match="IMAGENET1K_V1 and IMAGENET1K_V2 were named"):
        load_backbone("resnet50:IMAGENET1K_V1", weights="IMAGENET1K_V2")


def test_the_digest_follows_names_types_shapes_and_bytes():
    values = torch.arange(6.0)
    digests = {
        weights_digest(state)
        for state in (
            {"a": values},
            {"b": values},
            {"a": values.view(2, 3)},
            {"a": values.double()},
            {"a": values + 1},
        )
    }
    assert len(digests) == 5
    one, two = torch.ones(2), torch.zeros(())
    assert weights_digest({"a": one, "b": two}) == weights_digest({"b": two, "a": one})
    assert weights_digest({"a": torch.ones(2, 3).T}) == weights_digest({"a": torch.ones(3, 2)})
