"""Outputs of a network for all samples of a source."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.errors import ResourceError, UsageError
from pipeline.finetune.images import Batches
from pipeline.heads.tasks import Task, task_slices


def choose_precision(
    precision: str, device: torch.device, network: nn.Module
) -> torch.dtype | None:
    """The dtype of mixed precision; None for float32 throughout.

    "auto" is bfloat16 where the hardware multiplies it, else float16 on a GPU, else float32. On a
    CPU, only networks without convolutions but for one that makes patches: gradients of others
    take up to twice the time in bfloat16.

    Raises:
        UsageError: fp16 on a CPU.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("CPUs are slow in fp16.\n  Use --precision bf16 or fp32.")
    if precision in ("bf16", "fp16"):
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if precision == "fp32" or device.type == "mps":
        return None
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    if sum(isinstance(module, nn.Conv2d) for module in network.modules()) > 1:
        return None
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.bfloat16 if any(getattr(torch.cpu, c, bool)() for c in checks) else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Mixed precision; float32 for None."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found too little memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@torch.inference_mode()
def outputs_of(
    network: nn.Module,
    source: Batches,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Outputs (n_samples, …) float32, on the CPU, of all samples as they are, in order.

    Of several processes, each has those of its part, which may have no sample.

    Args:
        network: put into eval mode for it.
        source: of the samples.
        device: where the network is.
        dtype: of mixed precision; None for float32.

    Raises:
        ResourceError: the device has too little memory for a single sample.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    parts = []
    try:
        with closing(source.plain()) as batches, autocast(device, dtype):
            for batch in batches:
                parts += run_in_halves(network, source.to_device(batch.inputs, device))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(parts) if parts else torch.empty(0)


def run_in_halves(network: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of a batch on the CPU, float32; in halves where memory does not suffice.

    Raises:
        ResourceError: it does not for a single sample.
    """
    try:
        return [network(inputs).float().cpu()]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(inputs) == 1:
            raise ResourceError(
                f"{inputs.device} has too little memory for a single image.\n"
                "  Use a smaller --image-size or a smaller --backbone."
            ) from error
    if inputs.device.type == "cuda":
        torch.cuda.empty_cache()
    middle = len(inputs) // 2
    return run_in_halves(network, inputs[:middle]) + run_in_halves(network, inputs[middle:])


def probabilities_of(logits: torch.Tensor, tasks: Sequence[Task]) -> NDArray[np.float64]:
    """(n, n_outputs) logits -> probabilities of all tasks side by side, each a softmax."""
    slices = task_slices([len(task.classes) for task in tasks])
    parts = [logits[:, part].double().softmax(dim=1) for part in slices]
    probabilities: NDArray[np.float64] = torch.cat(parts, dim=1).numpy()
    return probabilities
