import pytest
import torch

from pipeline.backbones.catalogue import parse_spec
from pipeline.backbones.facts import backbone_trace, empty_network, input_size
from pipeline.backbones.layers import Trace, find_stages, trace


def numbered(prefix, numbers):
    return tuple(f"{prefix}{number}" for number in numbers)


STAGES = {
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "vgg11": numbered("features.", (2, 5, 7, 10, 12, 15, 17, 20)),
    "alexnet": numbered("features.", (2, 5, 7, 9, 12)),
    "efficientnet_b0": numbered("features.", range(1, 8)),
    "mobilenet_v2": numbered("features.", range(1, 18)),
    "mobilenet_v3_small": numbered("features.", range(1, 12)),
    "mnasnet0_5": numbered("layers.", range(8, 14)),
    "vit_b_16": numbered("encoder.layers.encoder_layer_", range(12)),
    "swin_t": numbered("features.", (1, 3, 5, 7)),
    "swin_v2_t": numbered("features.", (1, 3, 5, 7)),
    "convnext_tiny": numbered("features.", (1, 3, 5, 7)),
    "maxvit_t": numbered("blocks.", range(4)),
    "densenet121": numbered("features.denseblock", range(1, 5)),
    "regnet_y_400mf": numbered("trunk_output.block", range(1, 5)),
    "squeezenet1_0": numbered("features.", (2, 3, 4, 6, 7, 8, 9, 11, 12)),
    "googlenet": numbered("inception", ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")),
    "inception_v3": numbered(
        "Mixed_", ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
    ),
    "shufflenet_v2_x0_5": ("stage2", "stage3", "stage4"),
    "efficientnet_lite0": numbered("blocks.", range(7)),
    "timm:vit_tiny_patch16_224": numbered("blocks.", range(12)),
    "timm:resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "timm:swin_tiny_patch4_window7_224": numbered("layers.", range(4)),
    "timm:vgg11": numbered("features.", (2, 5, 7, 10, 12, 15, 17, 20)),
    "timm:pit_ti_224": numbered("transformers.", range(3)),
    "timm:xcit_nano_12_p8_224": numbered("blocks.", range(12)),
    "timm:cait_xxs24_224": numbered("blocks.", range(24)),
    "pixels": (),
}


@pytest.mark.parametrize("spec", STAGES)
def test_stages_are_the_blocks_of_the_trunk_in_the_order_in_which_they_run(spec):
    _, stages = backbone_trace(parse_spec(spec))
    assert stages == STAGES[spec]


def test_lists_of_lists_of_blocks_are_looked_through():
    _, stages = backbone_trace(parse_spec("timm:twins_pcpvt_small"))
    assert stages[:4] == ("blocks.0.0", "blocks.0.1", "blocks.0.2", "blocks.1.0")
    assert stages[-1] == "blocks.3.2"


@pytest.mark.parametrize("spec", ["squeezenet1_1", "vgg11", "vit_b_32", "shufflenet_v2_x0_5"])
def test_the_classifier_is_what_gives_the_logits(spec):
    found = parse_spec(spec)
    traced, _ = backbone_trace(found)
    logits = empty_network(found)(torch.empty(1, 3, *input_size(found), device="meta"))
    classifier = empty_network(found).get_submodule(traced.classifier)
    assert logits.shape == (1, getattr(classifier, "out_features", None) or classifier.out_channels)


def test_a_network_that_needs_numbers_is_traced_with_numbers():
    class Picky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 1)
            self.fc = torch.nn.Linear(4, 2)

        def forward(self, images):
            assert images.sum().item() == 0
            return self.fc(self.conv(images).mean((2, 3)))

    traced = trace(Picky().eval().requires_grad_(False), 8, 8)
    assert traced.shapes == {"conv": (4, 8, 8), "fc": (2,)}
    assert (traced.classifier, traced.n_features) == ("fc", 4)


def test_a_network_without_maps_has_no_stages():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    assert find_stages(network, trace(network, 4, 4)) == ()
    assert find_stages(network, Trace({}, frozenset(), "1", 48)) == ()
