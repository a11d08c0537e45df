import pytest
import torch

from pipeline.backbones import load_backbone
from pipeline.errors import UnknownNameError, UsageError


@pytest.fixture(scope="module")
def resnet():
    return load_backbone("resnet18", weights="random", image_size=64)


@pytest.fixture(scope="module")
def vit():
    return load_backbone("timm:test_vit", weights="random")


@pytest.fixture(scope="module")
def swin():
    return load_backbone("swin_t", weights="random", image_size=64)


@pytest.fixture(scope="module")
def torchvision_vit():
    return load_backbone("vit_b_32", weights="random")


def images_for(backbone, n=2):
    generator = torch.Generator().manual_seed(0)
    steps = backbone.preprocess
    return torch.randn(n, 3, steps.height, steps.width, generator=generator)


def run(backbone, layers, pooling="avg"):
    net = backbone.feature_net(layers, pooling)
    with torch.inference_mode():
        outputs = net(images_for(backbone))
    assert {n: tuple(o.shape[1:]) for n, o in zip(net.layers, outputs, strict=True)} == net.shapes
    assert all(output.dtype == torch.float32 for output in outputs)
    return dict(zip(net.layers, outputs, strict=True))


def test_all_is_every_stage_and_the_penultimate_layer(resnet):
    net = resnet.feature_net(["layer2", "all"])
    assert net.layers == ("layer2", "layer1", "layer3", "layer4", "penultimate")
    assert net.shapes["layer3"] == (256,)


def test_a_stage_is_what_the_plain_network_computes(resnet):
    with torch.inference_mode():
        module, x = resnet.module, images_for(resnet)
        map1 = module.layer1(module.maxpool(module.relu(module.bn1(module.conv1(x)))))
    outputs = run(resnet, ["layer1"], "none")
    assert torch.equal(outputs["layer1"], map1)
    assert torch.equal(run(resnet, ["layer1"], "avg")["layer1"], map1.flatten(2).mean(2))
    assert torch.equal(run(resnet, ["layer1"], "max")["layer1"], map1.amax((2, 3)))


def test_any_module_path_is_a_layer(resnet):
    outputs = run(resnet, ["layer3.0.conv1", "penultimate"])
    assert outputs["layer3.0.conv1"].shape == (2, 256)


def test_a_layer_is_read_before_it_is_overwritten_in_place(resnet):
    """ReLU works in place on what bn1 gave."""
    assert run(resnet, ["bn1"], "none")["bn1"].min() < 0
    assert run(resnet, ["bn1"], "avg")["bn1"].abs().sum() > 0


def test_one_pass_gives_what_single_passes_give(resnet):
    together = run(resnet, ["all"], "gem")
    for layer in resnet.stages:
        assert torch.equal(together[layer], run(resnet, [layer], "gem")[layer])


def test_tokens_are_pooled_without_the_class_token(vit):
    tokens = run(vit, ["blocks.2"], "none")["blocks.2"]
    assert tokens.shape == (2, 101, 64)
    assert torch.equal(run(vit, ["blocks.2"], "cls")["blocks.2"], tokens[:, 0])
    torch.testing.assert_close(run(vit, ["blocks.2"])["blocks.2"], tokens[:, 1:].mean(1))


def test_torchvisions_class_token_is_known_too(torchvision_vit):
    layers = ["encoder.layers.encoder_layer_11", "penultimate"]
    net = torchvision_vit.feature_net(layers, "cls")
    assert set(net.shapes.values()) == {(768,)}


def test_channels_last_maps_are_recognised(swin):
    maps = run(swin, ["features.1"], "none")["features.1"]
    assert maps.shape == (2, 96, 16, 16)
    torch.testing.assert_close(run(swin, ["features.1"])["features.1"], maps.mean((2, 3)))


def test_a_class_token_is_not_invented(resnet, swin):
    for backbone, layer in ((resnet, "layer1"), (swin, "features.1")):
        with pytest.raises(UsageError, match=f'layer "{layer}" has none.*\n.*avg, max, gem'):
            backbone.feature_net([layer], "cls")


def test_attention_gives_the_first_of_its_outputs(torchvision_vit):
    layer = "encoder.layers.encoder_layer_0.self_attention"
    assert torchvision_vit.feature_net([layer]).shapes == {layer: (768,)}


def test_the_logits_of_a_timm_network_are_a_layer(vit):
    outputs = run(vit, ["head"])
    with torch.inference_mode():
        assert torch.equal(outputs["head"], vit.module(images_for(vit)))


@pytest.mark.parametrize("spec", ["resnet18", "timm:test_vit", "squeezenet1_1", "pixels"])
def test_half_precision_networks_give_float32(spec):
    weights = "default" if spec == "pixels" else "random"
    backbone = load_backbone(spec, weights=weights, image_size=96 if ":" in spec else 64)
    net = backbone.feature_net(["all"]).to(torch.bfloat16)
    with torch.inference_mode():
        outputs = net(images_for(backbone).to(torch.bfloat16))
    assert all(output.dtype == torch.float32 for output in outputs)


def test_casting_a_feature_net_leaves_its_backbone_alone(resnet):
    resnet.feature_net(["all"]).to(torch.float16)
    assert next(resnet.module.parameters()).dtype == torch.float32


def test_nothing_of_a_batch_outlives_its_forward_pass(resnet):
    net = resnet.feature_net(["all"])
    with torch.inference_mode():
        net(images_for(resnet))
    kept = [tap.value for tap in (*net._taps.values(), net._input_tap)]
    assert kept == [None] * 5


def test_it_is_one_graph_for_the_compiler(resnet):
    """Graph breaks would cost most of what compiling gains; tracing needs no compiler."""
    found = torch.export.export(resnet.feature_net(["all"]), (images_for(resnet),))
    assert len(found.graph_signature.user_outputs) == 5


def test_an_unknown_layer_is_answered_with_close_ones(resnet):
    with pytest.raises(UnknownNameError, match=r"layer of torchvision:resnet18 'layer5'") as caught:
        resnet.feature_net(["layer5"])
    assert "layer4" in str(caught.value)
    assert "tlpipe backbones torchvision:resnet18" in str(caught.value)


def test_a_module_that_does_not_give_one_row_an_image_is_no_layer():
    backbone = load_backbone("vit_b_32", weights="random")
    with pytest.raises(UsageError, match="cannot be stored"):
        backbone.feature_net(
            ["encoder.layers"[:7] + ".layers.encoder_layer_0.self_attention.out_proj"]
        )


def test_an_unknown_pooling_is_answered_with_the_known_ones(resnet):
    with pytest.raises(UnknownNameError, match="Did you mean: avg"):
        resnet.feature_net(["layer1"], "average")


def test_pooling_without_anything_to_pool_is_explained(resnet):
    with pytest.raises(UsageError, match="Pooling applies to stages:  --layers layer4"):
        resnet.feature_net(["penultimate"], "max")


def test_no_layer_at_all_is_refused(resnet):
    with pytest.raises(UsageError, match="No layer was named"):
        resnet.feature_net([])


def test_one_layer_may_be_named_without_a_list(resnet):
    assert resnet.feature_net("layer1").layers == ("layer1",)
