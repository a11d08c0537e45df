"""ONNX Runtime on CPUs, in float32: faster than torch there, and more exact than bf16."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.extract.engines.artefacts import keep
from pipeline.extract.engines.engine import (
    EngineError,
    Work,
    check_on_cpu,
    first_line,
    not_installed,
    prepared,
)


class OnnxRuntimeEngine:
    """Runs the network's ONNX graph.

    Args:
        work: what to compute; it is computed in float32, whatever its precision.

    Raises:
        EngineError: not installed, or the network cannot be exported.
    """

    name = "onnxruntime"

    def __init__(self, work: Work) -> None:
        check_on_cpu(self.name, work)
        try:
            import onnxruntime
        except ImportError as error:
            raise not_installed("onnxruntime", "onnx") from error
        self.details: dict[str, Any] = {"version": onnxruntime.__version__}
        folder = keep(self.name, work, lambda folder: _export(work, folder))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what goes wrong is raised
        # Spinning threads take the cores from those that decode.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                folder / _FILE, options, providers=["CPUExecutionProvider"]
            )
        except _onnx_errors() as error:
            raise EngineError(_cannot(error)) from error
        (self._input,) = (one.name for one in self._session.get_inputs())

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Engine`."""
        try:
            outputs = self._session.run(None, {self._input: images.numpy()})
        except _onnx_errors() as error:
            raise EngineError(_cannot(error)) from error
        return tuple(torch.from_numpy(np.asarray(output)) for output in outputs)


_FILE = "model.onnx"


def _export(work: Work, folder: Path) -> None:
    try:
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise not_installed("onnxruntime", "onnx") from error
    images = torch.zeros(work.batch_shape, dtype=torch.uint8)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = prepared(replace(work, precision="fp32", until=""))
            program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
            assert program is not None
            program.save(folder / _FILE)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise EngineError(_cannot(error)) from error


def _onnx_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        RuntimeError,
        state.RuntimeException,
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NotImplemented,
    )


def _cannot(error: Exception) -> str:
    return (
        f"ONNX Runtime cannot compute this network: {first_line(error)}.\n"
        "  Use --engine auto or eager."
    )
