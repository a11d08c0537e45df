"""Half precision where the network bears it: chosen on images, not on trust.

bf16 has eight bits of precision. Most networks do not notice; some lose detail in their first
layers and carry the error to the end (EfficientNet-Lite0 on blurred crops of photographs: the
worst cosine to float32 features is 0.87 when it is simply cast). Three things mend that at almost
no cost:

- the first convolutions stay in float32, as few as the probe allows;
- on CPUs a convolution adds its bias in float32, before the result is rounded;
- the weights of a convolution are rounded so that the sum of each spatial kernel is kept: what a
  kernel makes of an even patch, which is most of a photograph, is then hardly rounded at all.
"""

from __future__ import annotations

import copy
import gzip
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pipeline.backbones.features import FeatureNet
from pipeline.backbones.preprocess import Preprocess
from pipeline.data.decode import decode_image

MIN_COSINE = 0.999
"""What half precision is to keep of every layer, against float32; flat images may fall below."""

_PROBE_COSINE = 0.9995
"""What it must keep on the images of the probe: others are not the probe."""

_N_DIGITS = 10
_MAX_FLOAT32_CONVOLUTIONS = 5
_MAX_FLOAT32_STAGES = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Net = TypeVar("Net", bound=nn.Module)


def choose_bf16(
    net: FeatureNet, preprocess: Preprocess, stages: Sequence[str], device: torch.device
) -> str | None:
    """How much of a network has to stay in float32 for bf16 to give the features of float32.

    Args:
        net: frozen, float32, on the CPU.
        preprocess: of its input.
        stages: of its backbone, in the order in which they run.
        device: where it will run.

    Returns:
        Name of the first module that can be computed in bf16; "" for the whole network; None where
        neither the first convolutions nor the first stages in float32 are enough.
    """
    images = preprocess.normalise(torch.stack([preprocess(image) for image in probe_images()]))
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    exact = at_precision(net, "fp32", "", images[:1])
    with torch.inference_mode():
        expected = exact(images)
        for until in ends_of_float32(exact, stages, images[:1]):
            half = at_precision(net, "bf16", until, images[:1])
            found = half(images.to(input_dtype("bf16", until)))
            if min_cosine(found, expected) >= _PROBE_COSINE:
                return until
    return None


def at_precision(net: Net, precision: str, until: str, example: torch.Tensor) -> Net:
    """A copy of a frozen float32 network that computes in ``precision``, channels-last.

    Args:
        net: the network.
        precision: "fp32", "bf16" or "fp16".
        until: name of a module: everything that is done before it starts stays in float32; "" for
            nothing.
        example: (1, 3, H, W) float32, on the device where the copy will run.

    Returns:
        A network on the example's device; it takes images of `input_dtype`.
    """
    dtype = DTYPES[precision]
    net = copy.deepcopy(net).to(example.device)
    if dtype != torch.float32:
        kept = done_before(net, until, example) if until else set()
        rounded = _half_convolutions(net, kept) if _has_half_convolution(dtype, example) else set()
        _cast(net, dtype, kept, rounded)
    return net.to(memory_format=torch.channels_last)


def input_dtype(precision: str, until: str) -> torch.dtype:
    """What a network made by `at_precision` takes."""
    return torch.float32 if until else DTYPES[precision]


def done_before(net: nn.Module, until: str, example: torch.Tensor) -> set[str]:
    """Names of the modules that have finished when the module ``until`` starts.

    Args:
        net: the network.
        until: name of one of its modules.
        example: (1, 3, H, W) float32, what it is run with to see.
    """
    order = _Order.of(net, example)
    finished = set(order.finished[: order.n_finished_before[until]])
    # A part of one may never run itself: attention uses its projection's weights directly.
    parts = {name: name.split(".") for name, _ in net.named_modules()}
    return {
        name
        for name, steps in parts.items()
        if any(".".join(steps[: k + 1]) in finished for k in range(len(steps)))
    }


def keep_sums(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Round the weights of a convolution so that each spatial kernel keeps its sum.

    From the largest to the smallest, each weight takes over what rounding the one before it lost:
    every weight is off by about one rounding step, as before, but the sum only by that of the
    smallest. (EfficientNet-Lite0, the first two convolutions in float32, crops of photographs: the
    worst cosine of any layer is 0.9994, against 0.9990 with each weight rounded to the nearest.)

    Args:
        weight: (n_out, n_in, height, width) float32.
        dtype: what it will be stored in.

    Returns:
        The same shape, float32, of values that ``dtype`` holds.
    """
    if weight[0, 0].numel() == 1:
        return weight.to(dtype).float()
    kernels = weight.flatten(2)
    order = kernels.abs().argsort(dim=2, descending=True)
    values = kernels.gather(2, order)
    lost = torch.zeros_like(values[..., 0])
    for k in range(values.shape[2]):
        wanted = values[..., k] + lost
        values[..., k] = wanted.to(dtype).float()
        lost = wanted - values[..., k]
    return torch.empty_like(kernels).scatter_(2, order, values).view_as(weight)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module computes what `torch.nn.Conv2d` computes, or timm's Conv2dSame."""
    if type(module) is nn.Conv2d:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return _is_same(module)


def min_cosine(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The worst cosine of any row of any layer; nan where a value is not finite.

    Args:
        found: (n, ...) features by layer.
        expected: the same of the network that is right.
    """
    worst = 1.0
    for a, b in zip(found, expected, strict=True):
        a, b = a.double().flatten(1), b.double().flatten(1)
        cosines = torch.cosine_similarity(a, b)
        # Where a network gives zeros, zeros are right and have no direction.
        cosines[(a == 0).all(dim=1) & (b == 0).all(dim=1)] = 1.0
        lowest = cosines.min().item()
        if not lowest >= worst:  # also nan
            worst = lowest
        if worst != worst:
            break
    return worst


def probe_images() -> Iterator[torch.Tensor]:
    """(3, H, W) uint8: what comes with scikit-learn, sharp, blurred and flat.

    Two photographs, whole and in small, hence blurred, crops; and the ten digits, scanned, whose
    even areas half precision bears worse.
    """
    package = find_spec("sklearn")  # not imported, which would take most of a second
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "datasets"
    for name in ("china.jpg", "flower.jpg"):
        pixels = decode_image((folder / "images" / name).read_bytes()).pixels
        yield pixels
        for top, left, side in ((20, 40, 160), (150, 260, 110), (90, 420, 200)):
            yield pixels[:, top : top + side, left : left + side].contiguous()
    with gzip.open(folder / "data" / "digits.csv.gz", "rt") as lines:
        for line in islice(lines, _N_DIGITS):
            grey = torch.tensor([int(float(value)) for value in line.split(",")[:64]]) * 255 // 16
            yield grey.to(torch.uint8).view(1, 8, 8).expand(3, -1, -1).contiguous()


class HalfConv2d(nn.Conv2d):
    """A convolution in half precision that adds its bias in float32.

    ``torch.nn.Conv2d`` would have the bias in half precision too; the kernel under it (oneDNN) has
    no such need. A module of a network is turned into one where it stands, so its name, and the
    hooks of those who listen to it, stay.
    """

    is_same: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `torch.nn.Conv2d`; takes any floating point type."""
        input = input.to(self.weight.dtype)
        if self.is_same:
            # Only there where timm made this convolution.
            input = sys.modules["timm.layers.padding"].pad_same(
                input, self.kernel_size, self.stride, self.dilation
            )
        if torch.compiler.is_compiling():
            output = nn.functional.conv2d(
                input, self.weight, None, self.stride, self.padding, self.dilation, self.groups
            )
            if self.bias is None:
                return output
            return (output.float() + self.bias[:, None, None]).to(output.dtype)
        return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
            input,
            self.weight,
            self.bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            "none",
            [],
            "",
        )


@dataclass
class _Order:
    """In what order the modules of a network start and finish.

    Attributes:
        started: names, in order.
        finished: names, in order.
        n_finished_before: how many modules had finished when a module first started, by its name.
    """

    started: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    n_finished_before: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, net: nn.Module, example: torch.Tensor) -> _Order:
        """Run a network once to see."""
        order = cls()
        handles = []
        for name, module in net.named_modules():
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: order._start(name)),
                module.register_forward_hook(lambda *_, name=name: order.finished.append(name)),
            ]
        try:
            with torch.inference_mode():
                net(example)
        finally:
            for handle in handles:
                handle.remove()
        return order

    def _start(self, name: str) -> None:
        self.started.append(name)
        self.n_finished_before.setdefault(name, len(self.finished))


def ends_of_float32(net: nn.Module, stages: Sequence[str], example: torch.Tensor) -> list[str]:
    """Where float32 could end, first "" (nowhere), then after more and more of the network."""
    order = _Order.of(net, example)
    first_starts = list(order.n_finished_before)
    convolutions = [n for n in first_starts if isinstance(net.get_submodule(n), nn.Conv2d)]
    ends = ["", *convolutions[1 : 1 + _MAX_FLOAT32_CONVOLUTIONS]]
    for stage in stages[:_MAX_FLOAT32_STAGES]:
        n_finished = order.finished.index(f"network.{stage}") + 1
        after = (n for n in first_starts if order.n_finished_before[n] >= n_finished)
        ends += [next((n for n in after if net.get_submodule(n)._parameters), "")]
    return sorted(dict.fromkeys(ends), key=lambda end: order.n_finished_before.get(end, 0))


def _has_half_convolution(dtype: torch.dtype, example: torch.Tensor) -> bool:
    return (
        dtype == torch.bfloat16
        and example.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def _half_convolutions(net: nn.Module, kept: set[str]) -> set[str]:
    """Turn every plain convolution that is not ``kept`` into a `HalfConv2d`; their names."""
    changed = set()
    for name, module in net.named_modules():
        if name in kept or not is_plain_convolution(module):
            continue
        assert isinstance(module, nn.Conv2d)
        weight = keep_sums(module.weight.detach()).to(torch.bfloat16)
        module.weight = nn.Parameter(weight, requires_grad=False)
        is_same = _is_same(module)
        module.__class__ = HalfConv2d
        module.is_same = is_same  # type: ignore[assignment]
        changed.add(name)
    return changed


def _is_same(module: nn.Module) -> bool:
    """Whether this is timm's convolution that pads as TensorFlow does."""
    layers = sys.modules.get("timm.layers")  # not imported: then the network has none
    return layers is not None and type(module) is layers.Conv2dSame


def _cast(net: nn.Module, dtype: torch.dtype, kept: set[str], rounded: set[str]) -> None:
    """Cast all but ``kept``, which stay float32, and ``rounded``, which see to it themselves.

    Where something is kept, the others take whatever they are given.
    """
    for name, module in net.named_modules():
        if name in kept or name in rounded:
            continue
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    cast = tensor.detach().to(dtype)
                    tensors[key] = (
                        nn.Parameter(cast, requires_grad=False)
                        if isinstance(tensor, nn.Parameter)
                        else cast
                    )
        if not kept or not name or any(other.startswith(f"{name}.") for other in kept):
            continue
        if module._parameters:
            module.register_forward_pre_hook(
                lambda _, inputs: tuple(_as(value, dtype) for value in inputs)
            )


def _as(value: Any, dtype: torch.dtype) -> Any:
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_real else value
