"""Whatever makes it fast, features are those of the plain network with its official transform."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from timm.data import create_transform, resolve_data_config
from torch import nn

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.errors import UsageError
from pipeline.extract.embedder import Embedder
from pipeline.extract.extractor import Settings, extract
from pipeline.extract.fold import fold_batchnorm
from pipeline.extract.half import (
    MIN_COSINE,
    HalfConv2d,
    at_precision,
    choose_bf16,
    input_dtype,
    keep_sums,
)
from pipeline.extract.precision import resolve_device, resolve_precision
from pipeline.store import open_store


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two photographs and crops of them, as PNG files."""
    folder = tmp_path_factory.mktemp("photographs")
    for k, pixels in enumerate(load_sample_images().images):
        photo = Image.fromarray(pixels)
        photo.save(folder / f"{k}-whole.png")
        photo.crop((50, 40, 450, 380)).save(folder / f"{k}-crop.png")
        photo.resize((300, 500)).save(folder / f"{k}-tall.png")
    return folder


def plain_resnet18(backbone):
    network = torchvision.models.resnet18()
    network.load_state_dict(backbone.module.state_dict())
    network.fc = nn.Identity()
    return network, torchvision.models.ResNet18_Weights.DEFAULT.transforms()


def plain_timm(name):
    def make(backbone):
        network = timm.create_model(name)
        network.load_state_dict(backbone.module.state_dict())
        network.reset_classifier(0)
        return network, create_transform(**resolve_data_config(network.pretrained_cfg))

    return make


NETWORKS = {
    "resnet18": (("resnet18", "random"), plain_resnet18),
    "efficientnet_lite0": (("efficientnet_lite0", "default"), plain_timm("tf_efficientnet_lite0")),
    "vit": (
        ("timm:vit_tiny_patch16_224", "random"),
        plain_timm("vit_tiny_patch16_224"),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("precision", "least"), [("auto", 0.999), ("fp32", 0.9999)])
def test_features_equal_those_of_the_plain_network(photographs, tmp_path, name, precision, least):
    (spec, weights), plain = NETWORKS[name]
    backbone = load_backbone(spec, weights=weights)
    report = extract(
        open_source(str(photographs)),
        backbone,
        Settings(precision=precision, batch_size=4),
        cache_dir=tmp_path,
    )
    store = open_store(report.store)
    network, transform = plain(backbone)
    network.eval()
    with torch.inference_mode():
        images = [transform(Image.open(photographs / i).convert("RGB")) for i in store.ids()]
        expected = network(torch.stack(images)).flatten(1)
    found = torch.from_numpy(np.asarray(store.features()).astype(np.float32))
    assert torch.cosine_similarity(found, expected).min() >= least


def test_a_networks_half_precision_keeps_what_it_promises():
    backbone = load_backbone("efficientnet_lite0")
    net = fold_batchnorm(backbone.feature_net(("all",)), torch.randn(1, 3, 224, 224))
    until = choose_bf16(net, backbone.preprocess, backbone.stages, torch.device("cpu"))
    assert until, "bf16 throughout moves these features, as measured"
    digits = np.round(load_digits().images[:24] * 255 / 16).astype(np.uint8)
    images = [torch.from_numpy(digit).expand(3, -1, -1).contiguous() for digit in digits]
    images = backbone.preprocess.normalise(torch.stack([backbone.preprocess(i) for i in images]))
    with torch.inference_mode():
        expected = net(images)
        found = at_precision(net, "bf16", until, images[:1])(images)
    for name, a, b in zip(net.layers, found, expected, strict=True):
        assert torch.cosine_similarity(a, b).min() > MIN_COSINE, name


def test_everything_done_before_a_module_stays_in_float32():
    backbone = load_backbone("resnet18", weights="random", image_size=32)
    example = torch.randn(1, 3, 32, 32)
    until = "network.layer2.0.conv1"
    net = at_precision(backbone.feature_net(), "bf16", until, example).network
    assert net.conv1.weight.dtype == net.layer1[1].conv2.weight.dtype == torch.float32
    assert net.layer2[0].conv1.weight.dtype == net.layer4[1].bn2.weight.dtype == torch.bfloat16
    torch.testing.assert_close(net.conv1.weight, backbone.module.conv1.weight)
    assert input_dtype("bf16", until) == torch.float32
    assert input_dtype("bf16", "") == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_kernels_keep_their_sums(dtype):
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    rounded, nearest = keep_sums(weight, dtype), weight.to(dtype).float()
    assert torch.equal(rounded.to(dtype).float(), rounded)
    step = torch.finfo(dtype).eps * weight.abs().amax()
    assert (rounded - weight).abs().max() <= step
    errors = [(w - weight).sum((2, 3)).abs().mean() for w in (rounded, nearest)]
    assert errors[0] < errors[1] / 4
    assert torch.equal(keep_sums(weight[..., :1, :1], dtype), nearest[..., :1, :1])


def same_convolution():
    return timm.layers.Conv2dSame(4, 8, 3, stride=2, groups=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1),
        lambda: nn.Conv2d(4, 8, (3, 1), groups=4, dilation=2, bias=False),
        same_convolution,
    ],
)
def test_a_half_precision_convolution_adds_its_bias_in_float32(make):
    conv = make().eval().requires_grad_(False)
    if conv.bias is not None:
        conv.bias.fill_(1.001)  # bf16 has 1 and 1.0078
        conv.weight.mul_(1e-6)
    images = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    seen = []
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    half = at_precision(nn.Sequential(conv), "bf16", "", images)
    found, expected = half(images.bfloat16()), conv(images)
    assert type(half[0]) is HalfConv2d, "this torch has the operation"
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    assert seen[0] is found, "who listens to a convolution goes on hearing it"
    torch.testing.assert_close(found.float(), expected, rtol=8e-3, atol=2e-2)


def test_convolutions_of_other_kinds_are_simply_cast():
    class Odd(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    circular = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    net = nn.Sequential(Odd(3, 3, 1), circular).eval().requires_grad_(False)
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    half = at_precision(net, "bf16", "", images)
    assert [type(module) for module in half] == [Odd, nn.Conv2d]
    torch.testing.assert_close(half(images.bfloat16()).float(), net(images), rtol=0.1, atol=0.1)


def test_a_convolution_that_is_a_layer_is_heard_in_half_precision():
    backbone = load_backbone("resnet18", weights="random", image_size=32)
    example = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net = backbone.feature_net(("conv1", "layer2.0.conv1", "penultimate"))
    with torch.inference_mode():
        expected = net(example)
        found = at_precision(net, "bf16", "", example[:1])(example.bfloat16())
    for a, b in zip(found, expected, strict=True):
        assert torch.cosine_similarity(a, b).min() > 0.99


@pytest.mark.parametrize(
    "spec", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "timm:resnet10t"]
)
def test_folding_batchnorm_changes_nothing(spec):
    backbone = load_backbone(spec, weights="random", image_size=64)
    net = backbone.feature_net(("all",))
    rng = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, not as initialised
            module.running_mean.copy_(torch.randn(module.num_features, generator=rng) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=rng) + 0.5)
            module.weight.copy_(torch.rand(module.num_features, generator=rng) + 0.5)
            module.bias.copy_(torch.randn(module.num_features, generator=rng) * 0.1)
    images = torch.randn(2, 3, 64, 64, generator=rng)
    folded = fold_batchnorm(net, images[:1])
    n_norms = [sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (net, folded)]
    assert n_norms[1] < n_norms[0]
    with torch.inference_mode():
        for a, b in zip(net(images), folded(images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class UsesAConvolutionTwice(nn.Module):
    layers, pooling, shapes = ("penultimate",), "avg", {"penultimate": (4,)}

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.norm.running_var.fill_(9.0)

    def forward(self, x):
        y = self.conv(x)
        return ((self.norm(y) + y).mean((2, 3)),)


def test_folding_is_left_alone_where_it_would_change_something():
    net = UsesAConvolutionTwice().eval().requires_grad_(False)
    x = torch.randn(1, 3, 4, 4)
    folded = fold_batchnorm(net, x)
    torch.testing.assert_close(folded(x)[0], net(x)[0])
    assert isinstance(folded.norm, nn.BatchNorm2d)


def test_the_backbone_itself_is_never_touched():
    backbone = load_backbone("resnet18", weights="random", image_size=32)
    before = {name: value.clone() for name, value in backbone.module.state_dict().items()}
    embedder = Embedder(backbone, Settings(precision="bf16", batch_size=2))
    embedder.forward([torch.zeros(3, 32, 32, dtype=torch.uint8)])
    for name, value in backbone.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not backbone.module.training


def test_without_a_gpu_auto_is_the_cpu():
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("spec", "until"),
    [
        ("vit_b_32", "network.encoder.layers.encoder_layer_1.ln_1"),
        ("timm:vit_tiny_patch16_224", "network.blocks.1.norm1"),
        ("mobilenet_v2", "network.features.2.conv.0.0"),
    ],
)
def test_the_start_can_stay_in_float32_in_any_network(spec, until):
    backbone = load_backbone(spec, weights="random")
    example = torch.randn(1, 3, backbone.preprocess.height, backbone.preprocess.width)
    net = backbone.feature_net()
    mixed = at_precision(net, "bf16", until, example)
    with torch.inference_mode():
        assert torch.cosine_similarity(net(example)[0], mixed(example)[0]).min() > 0.99


def test_auto_asks_where_float32_ends_only_if_it_matters():
    network, cpu = nn.Linear(1, 1), torch.device("cpu")

    def never():
        raise AssertionError("asked")

    assert resolve_precision("fp32", cpu, network, never) == ("fp32", "")
    assert resolve_precision("auto", cpu, nn.Identity(), never) == ("fp32", "")
    assert resolve_precision("auto", torch.device("cuda"), network, never) == ("fp16", "")
    assert resolve_precision("bf16", cpu, network, lambda: "x") == ("bf16", "x")
    assert resolve_precision("bf16", cpu, network, lambda: None) == ("bf16", "")
    assert resolve_precision("auto", cpu, network, lambda: None) == ("fp32", "")
    with pytest.raises(UsageError, match="--precision bf16 or fp32"):
        resolve_precision("fp16", cpu, network, never)
