"""Features are what the plain model computes: same module, same preprocessing, end to end."""

import pytest
import timm
import torch
from torchvision.models import get_model, get_model_weights

from pipeline.backbones import load_backbone


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(one.flatten(1), other.flatten(1)).min().item()


def features_of(backbone, photo_pixels):
    images = torch.stack([backbone.preprocess(pixels) for pixels in photo_pixels.values()])
    with torch.inference_mode():
        (features,) = backbone.feature_net()(backbone.preprocess.normalise(images))
    return features


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_penultimate_is_what_torchvisions_classifier_sees(name):
    backbone = load_backbone(name, weights="random", image_size=64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (features,) = backbone.feature_net()(images)
        classifier = backbone.module.get_submodule(backbone.trace.classifier)
        if isinstance(classifier, torch.nn.Linear):
            torch.testing.assert_close(classifier(features), backbone.module(images))
        else:
            assert torch.equal(features, backbone.module.features(images).mean((2, 3)))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "deit_tiny_distilled_patch16_224"])
def test_penultimate_is_what_timms_classifier_sees(name):
    backbone = load_backbone(f"timm:{name}", weights="random")
    steps = backbone.preprocess
    images = torch.randn(2, 3, steps.height, steps.width)
    with torch.inference_mode():
        (features,) = backbone.feature_net()(images)
        plain = backbone.module.forward_head(
            backbone.module.forward_features(images), pre_logits=True
        )
    assert torch.equal(features, plain)


def test_torchvision_end_to_end(photos, photo_pixels):
    backbone = load_backbone("resnet18", weights="random")
    plain = get_model("resnet18", weights=None).eval()
    plain.load_state_dict(backbone.module.state_dict())
    plain.fc = torch.nn.Identity()
    transform = get_model_weights("resnet18").DEFAULT.transforms()
    with torch.inference_mode():
        expected = plain(torch.stack([transform(photo) for photo in photos.values()]))
    assert cosine(features_of(backbone, photo_pixels), expected) >= 0.9999


@pytest.mark.parametrize("spec", ["efficientnet_lite0", "timm:vit_tiny_patch16_224"])
def test_timm_end_to_end(spec, photos, photo_pixels):
    bundled = spec == "efficientnet_lite0"
    backbone = load_backbone(spec, weights="default" if bundled else "random")
    name = "tf_efficientnet_lite0" if bundled else "vit_tiny_patch16_224"
    plain = timm.create_model(name, num_classes=0).eval()
    plain.load_state_dict(backbone.module.state_dict(), strict=False)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=plain))
    with torch.inference_mode():
        expected = plain(torch.stack([transform(photo) for photo in photos.values()]))
    assert cosine(features_of(backbone, photo_pixels), expected) >= 0.9999
