"""Torch's own compiler: ahead of time on CPUs, just in time with CUDA graphs on GPUs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.extract.engines.artefacts import keep
from pipeline.extract.engines.engine import EngineError, Work, first_line, prepared
from pipeline.extract.engines.memo import user_cache

_FILE = "model.pt2"


class InductorEngine:
    """Runs the network compiled.

    On a CPU the compiled network is kept as a library that loads in milliseconds. On a GPU the
    compiler's own cache is kept, which leaves some seconds to each run.

    Args:
        work: what to compute.

    Raises:
        EngineError: there is no C++ compiler, or the network cannot be compiled.
    """

    name = "inductor"

    def __init__(self, work: Work) -> None:
        self.details: dict[str, Any] = {"version": torch.__version__}
        # Its own default is in the folder for temporary files, which others may write to.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "inductor"))
        try:
            on_cpu = work.device.type == "cpu"
            self._model = _ahead_of_time(work) if on_cpu else _just_in_time(work)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise EngineError(
                f"Torch cannot compile this network here: {first_line(error)}.\n"
                "  Use --engine auto or eager."
            ) from error

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Engine`."""
        with torch.inference_mode():
            return tuple(self._model(images))


_Model = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def _ahead_of_time(work: Work) -> _Model:
    from torch import _inductor

    folder = keep(InductorEngine.name, work, lambda folder: _compile(work, folder))
    model: _Model = _inductor.aoti_load_package(str(folder / _FILE))
    return model


def _compile(work: Work, folder: Path) -> None:
    from torch import _inductor

    # It says that there is no GPU, which nobody asked about.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    images = torch.zeros(work.batch_shape, dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(prepared(work), (images,), strict=False)
        _inductor.aoti_compile_and_package(
            exported, package_path=str(folder / _FILE), inductor_configs={"freezing": True}
        )


def _just_in_time(work: Work) -> _Model:
    compiled = torch.compile(prepared(work), mode="reduce-overhead", dynamic=False)

    def run(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Earlier outputs may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return compiled(images)  # type: ignore[no-any-return]

    # Compiled now, so that what goes wrong is told here.
    images = torch.zeros(work.batch_shape, dtype=torch.uint8, device=work.device)
    with torch.inference_mode():
        run(images)
    return run
