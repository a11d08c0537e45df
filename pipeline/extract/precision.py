"""Devices, and the arithmetic that is fast on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipeline.errors import UsageError


def resolve_device(device: str) -> torch.device:
    """A device that is there; "auto" takes a GPU before the CPU.

    Raises:
        UsageError: no such device, or it cannot be used with this installation of torch.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"Unknown device {device!r}. Known: auto, cpu, cuda, cuda:N, mps.")
    if found.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        why = "its driver is missing or too old" if built else "this torch was built without CUDA"
        raise UsageError(f"No CUDA device can be used: {why}.\n  Use --device cpu.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"There is no {device}: torch sees {torch.cuda.device_count()} GPU(s).")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("No MPS device can be used.\n  Use --device cpu.")
    return found


def resolve_precision(
    precision: str, device: torch.device, net: nn.Module, find: Callable[[], str | None]
) -> tuple[str, str]:
    """Name the arithmetic: "auto" takes the fastest that the device has and the network bears.

    Args:
        precision: "auto", "fp32", "bf16" or "fp16".
        device: where the network will run.
        net: frozen, float32.
        find: says before which module bf16 must not begin ("" for none), or None where that does
            not help; see :func:`~pipeline.extract.half.choose_bf16`. Asked only if it matters.

    Returns:
        "fp32", "bf16" or "fp16", and what ``find`` said, where bf16 was chosen.

    Raises:
        UsageError: the device does not compute in the precision asked for.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("CPUs are slow in fp16.\n  Use --precision bf16 or fp32.")
    if precision == "auto":
        if next(net.parameters(), None) is None:
            return "fp32", ""  # nothing to compute: nothing to gain
        if device.type == "cuda":
            return "fp16", ""  # as fast as bf16 there, and three bits more exact
        if device.type == "mps" or not _cpu_has_bf16():
            return "fp32", ""
        until = find()
        return ("fp32", "") if until is None else ("bf16", until)
    if precision == "bf16":
        return "bf16", find() or ""  # asked for: where nothing helps, it is done plainly
    return precision, ""


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; without, bf16 is slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)
