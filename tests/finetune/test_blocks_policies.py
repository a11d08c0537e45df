"""What a policy trains: gradients and buffers of real networks tell."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.backbones import load_backbone
from pipeline.errors import UnknownNameError, UsageError
from pipeline.finetune import Settings
from pipeline.finetune.blocks import find_blocks
from pipeline.finetune.network import Classifier, make_head, make_trunk
from pipeline.finetune.policies import MissingExtraError, make_policy

NAMES = ["resnet18", "efficientnet_lite0", "timm:test_vit", "timm:test_convnext"]


@pytest.fixture(scope="module", params=NAMES)
def backbone(request):
    return load_backbone(request.param, weights="random", image_size=64)


@pytest.fixture(scope="module")
def vit():
    return load_backbone("timm:test_vit", weights="random", image_size=64)


def build(backbone, **settings):
    """A network under a policy, as the trainer sets it up for an epoch."""
    network = Classifier(make_trunk(backbone), make_head(backbone.trace.n_features, 3))
    blocks = find_blocks(network.trunk, backbone.stages, 64, 64)
    return network, make_policy(network, blocks, Settings(**settings))


def learn(network):
    """Names of the trunk's parameters with a gradient, and of all that a step changed."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    outputs = network(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    (outputs * torch.arange(1.0, 4)).square().sum().backward()
    with_gradient = {name for name, p in network.trunk.named_parameters() if p.grad is not None}
    changed = {name for name, v in network.state_dict().items() if not torch.equal(v, before[name])}
    return with_gradient, changed


def parameters(network):
    return {name for name, _ in network.trunk.named_parameters()}


def statistics(network):
    return {name for name, _ in network.named_buffers() if "running" in name or "tracked" in name}


@pytest.mark.parametrize(
    ("settings", "keeps_statistics"),
    [
        ({"policy": "full"}, True),
        ({"policy": "full", "batchnorm": "train"}, False),
        ({"policy": "scratch"}, False),
    ],
)
def test_full_trains_every_parameter_and_scratch_every_statistic(
    settings, keeps_statistics, backbone
):
    network, policy = build(backbone, **settings)

    policy.apply(network, 0, 1)
    with_gradient, changed = learn(network)

    assert with_gradient == parameters(network)
    assert changed == (set() if keeps_statistics else statistics(network))
    assert policy.n_trained(network) == sum(p.numel() for p in network.parameters())


def test_head_leaves_the_backbone_alone(backbone):
    network, policy = build(backbone, policy="head")

    policy.apply(network, 0, 1)
    with_gradient, changed = learn(network)

    assert with_gradient == changed == set()
    assert all(p.grad is not None for p in network.head.parameters())
    assert not any(module.training for module in network.trunk.modules())


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_last_trains_exactly_what_runs_after_the_stage_before(backbone, batchnorm):
    network, policy = build(backbone, policy="last:1", batchnorm=batchnorm)
    bottom, last = backbone.stages[-2], backbone.stages[-1]

    policy.apply(network, 0, 1)
    with_gradient, changed = learn(network)

    # Everything that the output of the stage before does not depend on, by differentiating it.
    probe = Classifier(make_trunk(backbone), nn.Identity())
    kept = []
    probe.trunk.get_submodule(bottom).register_forward_hook(lambda *got: kept.append(got[2]))
    probe(torch.randn(2, 3, 64, 64))
    kept[0].square().sum().backward()
    below = {name for name, p in probe.trunk.named_parameters() if p.grad is not None}
    assert with_gradient == parameters(network) - below
    assert any(name.startswith(last) for name in with_gradient)
    expected = {
        name for name in statistics(network)
        if name.removeprefix("trunk.").rpartition(".")[0] + ".weight" in with_gradient
    }  # fmt: skip
    assert changed == (expected if batchnorm == "train" else set())


def test_dropout_of_a_frozen_bottom_is_off_and_of_the_top_on():
    backbone = load_backbone("vgg11", weights="random", image_size=32)
    network = Classifier(make_trunk(backbone), make_head(4096, 2))
    policy = make_policy(
        network, find_blocks(network.trunk, backbone.stages, 32, 32), Settings(policy="last:1")
    )

    policy.apply(network, 0, 1)

    assert network.trunk.get_submodule("classifier.2").training
    assert not network.trunk.get_submodule("features.1").training


def test_without_its_classifier_a_trunk_gives_the_penultimate_layer(backbone):
    images = torch.randn(2, 3, 64, 64)

    with torch.inference_mode():
        (expected,) = backbone.feature_net()(images)
        found = make_trunk(backbone)(images)

    torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=0)
    assert not any(p.requires_grad for p in backbone.module.parameters())


@pytest.mark.parametrize("policy", ["bitfit", "norm"])
def test_small_policies_train_their_kind_alone(backbone, policy):
    network, made = build(backbone, policy=policy)

    made.apply(network, 0, 1)
    with_gradient, changed = learn(network)

    modules = dict(network.trunk.named_modules())
    owners = {name: modules[name.rpartition(".")[0]] for name in with_gradient}
    assert with_gradient
    assert changed == set()
    if policy == "bitfit":
        biases = {name for name in parameters(network) if name.endswith("bias")}
        assert with_gradient == biases
    else:
        assert all(isinstance(m, _BatchNorm | nn.LayerNorm) for m in owners.values())


def test_gradual_thaws_from_the_top_and_all_of_it_by_half_time(vit):
    network, policy = build(vit, policy="gradual")

    counts = []
    for epoch in range(8):
        policy.apply(network, epoch, 8)
        counts.append(sum(p.requires_grad for p in network.trunk.parameters()))

    n_all = len(parameters(network))
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[1] < n_all
    assert set(counts[4:]) == {n_all}


def test_more_blocks_than_there_are(vit):
    with pytest.raises(UsageError) as caught:
        build(vit, policy="last:99")

    assert "more blocks than the 6 that this network has: blocks.0" in str(caught.value)
    assert "--policy last:6 or less, or --policy full" in str(caught.value)


def test_a_network_without_blocks_or_parameters():
    pixels = load_backbone("pixels:8")

    with pytest.raises(UsageError, match="cannot be told apart"):
        build(pixels, policy="last:1")
    with pytest.raises(UsageError, match="finds nothing to train"):
        build(pixels, policy="full")


def test_lora(vit):
    pytest.importorskip("peft")
    network, policy = build(vit, policy="lora")
    network.eval()
    images = torch.randn(2, 3, 64, 64)
    before = network(images)

    policy.apply(network, 0, 1)
    with_gradient, _ = learn(network)

    assert with_gradient
    assert all("lora_" in name for name in with_gradient)
    network.eval()
    torch.testing.assert_close(network(images), before)


def test_lora_without_peft_says_what_to_install(vit, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)

    with pytest.raises(MissingExtraError, match=r"pip install 'tlpipe\[lora\]'"):
        build(vit, policy="lora")


@pytest.mark.parametrize("policy", ["last", "last:0", "last:-1", "last:x"])
def test_last_needs_a_number(policy):
    with pytest.raises(UsageError, match="expected last:N, such as last:2"):
        Settings(policy=policy)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"policy": "ful"}, "Did you mean: full"),
        ({"augment": "tivial"}, "Did you mean: trivial"),
        ({"optimizer": "adam"}, "Did you mean: adamw"),
        ({"epochs": 0}, "epochs is 0; expected 1 or more"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; expected 0 to 1"),
        ({"lr": float("nan")}, "lr is nan; expected a number above 0"),
        ({"budget_seconds": -1}, "budget_seconds is -1"),
    ],
)
def test_settings_that_make_no_sense(values, said):
    with pytest.raises((UsageError, UnknownNameError), match=said):
        Settings(**values)
