"""OpenVINO on CPUs: the network converted once, in float32 or in bf16 behind a float32 start."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.backbones.features import FeatureNet
from pipeline.extract.engines.artefacts import keep
from pipeline.extract.engines.engine import (
    EngineError,
    Normalised,
    Work,
    check_on_cpu,
    first_line,
    not_installed,
)
from pipeline.extract.half import done_before, is_plain_convolution, keep_sums

# Larger than any activation, and still a bfloat16.
_HUGE = 3e38


class OpenVinoEngine:
    """Runs the network converted to OpenVINO: in two parts where it starts in float32.

    Args:
        work: what to compute.

    Raises:
        EngineError: not installed, or the network cannot be converted.
    """

    name = "openvino"

    def __init__(self, work: Work) -> None:
        check_on_cpu(self.name, work)
        try:
            # Importing OpenVINO would send its maker an event over the network; without this
            # package it does not. What a user embeds is nobody else's business.
            sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
            import openvino
        except ImportError as error:
            raise not_installed(self.name, "openvino") from error
        self.details: dict[str, Any] = {"version": openvino.__version__.split("-")[0]}
        folder = keep(self.name, work, lambda folder: _convert(openvino, work, folder))
        core = openvino.Core()
        self._requests = []
        try:
            for file in sorted(folder.glob("*.xml")):
                settings = {
                    "INFERENCE_PRECISION_HINT": "bf16" if "bf16" in file.stem else "f32",
                    "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                    "NUM_STREAMS": 1,
                }
                model = core.compile_model(core.read_model(file), "CPU", settings)
                self._requests.append(model.create_infer_request())
        except RuntimeError as error:
            raise EngineError(_cannot(error)) from error
        for first, second in zip(self._requests, self._requests[1:], strict=False):
            for i in range(len(first.model_outputs)):
                second.set_input_tensor(i, first.get_output_tensor(i))
        self._openvino = openvino

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Engine`."""
        tensor = self._openvino.Tensor(images.numpy(), shared_memory=True)
        self._requests[0].set_input_tensor(0, tensor)
        try:
            for request in self._requests:
                request.infer()
        except RuntimeError as error:
            raise EngineError(_cannot(error)) from error
        outputs = self._requests[-1].output_tensors
        return tuple(torch.from_numpy(output.data) for output in outputs)


class _Marked(nn.Module):
    """A network that also gives what goes into one of its modules, as its last output."""

    def __init__(self, model: Normalised, until: str) -> None:
        super().__init__()
        self.model = model
        self.until = until

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        marked: list[torch.Tensor] = []
        module = self.model.net.get_submodule(self.until)
        handle = module.register_forward_pre_hook(lambda _, inputs: marked.append(inputs[0]))
        try:
            return (*self.model(images), marked[0])
        finally:
            handle.remove()


def _convert(openvino: Any, work: Work, folder: Path) -> None:
    """Write the parts of the converted network, in the order in which they run."""
    net = copy.deepcopy(work.net)
    in_bf16 = work.precision != "fp32"
    if in_bf16:
        _round(net, done_before(net, work.until, work.example()) if work.until else set())
    plain = Normalised(net, work.preprocess, torch.float32)
    model = _Marked(plain, work.until) if work.until else plain
    images = torch.zeros(work.batch_shape, dtype=torch.uint8)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model.eval(), (images,), strict=False)
            converted = openvino.convert_model(exported)
            converted.reshape(list(work.batch_shape))
            parts = _split(openvino, converted) if work.until else [converted]
            if in_bf16:
                _keep_biases(openvino, parts[-1])
            for k, part in enumerate(parts):
                precision = "bf16" if in_bf16 and part is parts[-1] else "fp32"
                openvino.save_model(part, folder / f"{k}-{precision}.xml", compress_to_fp16=False)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        NotImplementedError,
        openvino.frontend.GeneralFailure,
        openvino.frontend.OpConversionFailure,
    ) as error:
        raise EngineError(_cannot(error)) from error


def _round(net: FeatureNet, kept: set[str]) -> None:
    """Round the weights of the convolutions that bf16 computes, better than OpenVINO would."""
    for name, module in net.named_modules():
        if name not in kept and is_plain_convolution(module):
            assert isinstance(module, nn.Conv2d)
            module.weight = nn.Parameter(keep_sums(module.weight.detach()), requires_grad=False)


def _split(openvino: Any, model: Any) -> list[Any]:
    """Cut a model in two where its last output is made; the first part is all that leads there.

    A precision can be asked of a whole model only.
    """
    from openvino import opset13 as ops

    *results, mark = model.get_results()
    before: set[str] = set()
    waiting = [mark.input(0).get_source_output().get_node()]
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() not in before:
            before.add(node.get_friendly_name())
            waiting += [one.get_source_output().get_node() for one in node.inputs()]
    crossing, parameters = [], []
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in before or node.get_type_name() == "Constant":
            continue
        for output in node.outputs():
            takers = [
                taker
                for taker in output.get_target_inputs()
                if taker.get_node().get_friendly_name() not in before
                and taker.get_node().get_friendly_name() != mark.get_friendly_name()
            ]
            if not takers:
                continue
            shape = output.get_partial_shape().to_shape()
            parameter = ops.parameter(shape, output.get_element_type())
            for taker in takers:
                taker.replace_source_output(parameter.output(0))
            crossing.append(ops.result(output))
            parameters.append(parameter)
    first = openvino.Model(crossing, model.get_parameters(), "start")
    return [first, openvino.Model(results, parameters, "rest")]


def _keep_biases(openvino: Any, model: Any) -> None:
    """Stop OpenVINO from rounding the biases of convolutions to bf16.

    It does so where it fuses a bias into the convolution before it; the fusion that happens in
    spite of a clamp in between, which changes no number, keeps the bias in float32.
    """
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Convolution", "GroupConvolution"):
            continue
        takers = list(node.output(0).get_target_inputs())
        if len(takers) == 1 and takers[0].get_node().get_type_name() == "Add":
            clamp = ops.clamp(node.output(0), -_HUGE, _HUGE)
            takers[0].replace_source_output(clamp.output(0))


def _cannot(error: Exception) -> str:
    return (
        f"OpenVINO cannot compute this network: {first_line(error)}.\n  Use --engine auto or eager."
    )
