"""Half precision where the network bears it: chosen on photographs, not on trust.

bf16 has eight bits of precision. Most networks do not notice; some lose detail in their first
layers and carry the error to the end (EfficientNet-Lite0 on blurred crops of photographs: the
worst cosine to float32 features is 0.87). Keeping those first stages in float32 mends it for a
fraction of the cost of float32 throughout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from pipeline.backbones.features import FeatureNet
from pipeline.backbones.preprocess import Preprocess
from pipeline.data.decode import decode_image

MIN_COSINE = 0.999
"""What half precision is to keep of every layer, against float32; flat images may fall below."""

_PROBE_COSINE = 0.9993
"""What it must keep on the photographs of the probe: other images are not the probe."""

_MAX_FLOAT32_STAGES = 2
_AFTER = " after "
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_bf16(net: FeatureNet, preprocess: Preprocess, stages: Sequence[str]) -> str:
    """The fastest bf16 precision of a CPU that gives the features of float32.

    Args:
        net: frozen, float32, on the CPU.
        preprocess: of its input.
        stages: of its backbone, in the order in which they run.

    Returns:
        "bf16"; "bf16 after STAGE", where everything up to that stage stays in float32; or "fp32".
    """
    images = preprocess.normalise(torch.stack([preprocess(image) for image in probe_images()]))
    images = images.contiguous(memory_format=torch.channels_last)
    exact = at_precision(net, "fp32", images[:1])
    with torch.inference_mode():
        expected = exact(images)
        for stage in ("", *stages[:_MAX_FLOAT32_STAGES]):
            precision = f"bf16{_AFTER}{stage}" if stage else "bf16"
            found = at_precision(net, precision, images[:1])(images.to(input_dtype(precision)))
            if all(
                _min_cosine(*pair) >= _PROBE_COSINE for pair in zip(found, expected, strict=True)
            ):
                return precision
    return "fp32"


def at_precision(net: FeatureNet, precision: str, example: torch.Tensor) -> FeatureNet:
    """A copy of a frozen float32 network that computes in ``precision``, channels-last.

    Args:
        net: the network.
        precision: "fp32", "bf16", "fp16" or "bf16 after STAGE".
        example: (1, 3, H, W) float32, to find what runs up to that stage.
    """
    name, _, stage = precision.partition(_AFTER)
    dtype = _DTYPES[name]
    net = copy.deepcopy(net)
    if dtype != torch.float32:
        kept = _modules_until(net, f"network.{stage}", example) if stage else set()
        _cast(net, dtype, kept)
    return net.to(memory_format=torch.channels_last)


def input_dtype(precision: str) -> torch.dtype:
    """What a network at ``precision`` takes."""
    return torch.float32 if _AFTER in precision else _DTYPES[precision]


def probe_images() -> Iterator[torch.Tensor]:
    """(3, H, W) uint8: scikit-learn's two photographs, whole and in small, hence blurred, crops."""
    for name in ("china.jpg", "flower.jpg"):
        pixels = decode_image(files("sklearn.datasets.images").joinpath(name).read_bytes()).pixels
        yield pixels
        for top, left, side in ((20, 40, 160), (150, 260, 110), (90, 420, 200)):
            yield pixels[:, top : top + side, left : left + side].contiguous()


def _modules_until(net: nn.Module, stage: str, example: torch.Tensor) -> set[str]:
    """Names of the modules that have finished once ``stage`` has."""
    finished: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: finished.append(name))
        for name, module in net.named_modules()
    ]
    try:
        with torch.inference_mode():
            net(example)
    finally:
        for handle in handles:
            handle.remove()
    return set(finished[: finished.index(stage) + 1])


def _cast(net: nn.Module, dtype: torch.dtype, kept: set[str]) -> None:
    """Cast all but the modules named in ``kept``; the others then take whatever they are given."""
    exact = {name: copy.deepcopy(net.get_submodule(name)) for name in kept}
    net.to(dtype)
    if not kept:
        return
    for name, module in net.named_modules():
        if name in kept:
            module.float().load_state_dict(exact[name].state_dict())
        elif module._parameters and not any(other.startswith(f"{name}.") for other in kept):
            module.register_forward_pre_hook(
                lambda _, inputs: tuple(_as(value, dtype) for value in inputs)
            )


def _as(value: Any, dtype: torch.dtype) -> Any:
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_real else value


def _min_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.float().flatten(1), b.float().flatten(1)).min().item()
