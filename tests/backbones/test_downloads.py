"""Weights that are not here: from the caches of torchvision and timm, or a plain error, fast."""

import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from pipeline.backbones import load_backbone
from pipeline.backbones.downloads import fetch_url
from pipeline.errors import WeightsError

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_torchvision_weights_that_are_cached_need_no_network(torch_home):
    backbone = load_backbone("squeezenet1_1", weights="random", seed=4)
    torch.save(backbone.module.state_dict(), torch_home / "squeezenet1_1-b8a52dc0.pth")
    cached = load_backbone("squeezenet1_1")
    assert cached.weights_digest == backbone.weights_digest
    assert cached.weights == "IMAGENET1K_V1"


def test_a_cached_file_that_is_cut_short_is_named(torch_home):
    file = torch_home / "squeezenet1_1-b8a52dc0.pth"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match="damaged or cut short") as caught:
        load_backbone("squeezenet1_1")
    assert str(file) in str(caught.value)


def test_weights_that_cannot_be_downloaded_leave_two_ways_out(torch_home):
    with pytest.raises(WeightsError, match="weights of some network are not on this") as caught:
        fetch_url(f"{NOWHERE}/net-0123abcd.pth", "some network")
    text = str(caught.value)
    assert str(torch_home / "net-0123abcd.pth") in text
    assert "--weights PATH" in text
    assert "--backbone efficientnet_lite0" in text
    assert not list(torch_home.iterdir())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hugging Face cache and a server that does not answer."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    return tmp_path


def test_timm_weights_that_are_cached_need_no_network(hub):
    backbone = load_backbone("timm:test_resnet", weights="random", seed=4)
    commit = "0" * 40
    repository = hub / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    save_file(backbone.module.state_dict(), repository / "snapshots" / commit / "model.safetensors")
    cached = load_backbone("timm:test_resnet")
    assert (cached.weights, cached.weights_digest) == ("r160_in1k", backbone.weights_digest)
    assert "state_dict" not in cached.module.pretrained_cfg


@pytest.mark.parametrize("offline", [False, True])
def test_timm_weights_that_cannot_be_downloaded_fail_fast(hub, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    started = time.monotonic()
    with pytest.raises(WeightsError, match=r"timm:test_resnet \(r160_in1k\) are not on") as caught:
        load_backbone("timm:test_resnet")
    assert time.monotonic() - started < 10
    assert str(hub / "models--timm--test_resnet.r160_in1k") in str(caught.value)
    assert "--backbone efficientnet_lite0" in str(caught.value)


def test_an_architecture_without_published_weights_says_so():
    with pytest.raises(WeightsError, match=r"no weights for it(.|\n)*--weights random"):
        load_backbone("timm:maxvit_tiny_pm_256")
