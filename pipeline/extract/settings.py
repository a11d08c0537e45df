"""How to embed."""

from __future__ import annotations

from dataclasses import dataclass

ENGINES = ("auto", "eager", "inductor", "onnxruntime", "openvino")
DECODERS = ("cpu", "fast", "gpu", "hybrid")


@dataclass(frozen=True)
class Settings:
    """How to embed. The first block decides values and is part of the recipe, the rest is not.

    Attributes:
        layers: names of layers; "all" for every stage and the penultimate features.
        pooling: of stages: "avg", "max", "gem", "cls" or "none".
        precision: "auto", "fp32", "bf16" or "fp16".
        storage: "float16" or "float32".
        n_views: deterministic views of each image, of which the first is the plain one.
        decode: "cpu"; "fast" for large JPEG files at a fraction of their size; "gpu" for JPEG files
            on the GPU, or "hybrid" for some of them there.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        devices: several of them, each with a process of its own; () for the one above.
        engine: what runs the network, one of ``ENGINES``.
        batch_size: images in a batch; None for one that suits the device.
        n_threads: decoding threads; None for one a core.
    """

    layers: tuple[str, ...] = ("penultimate",)
    pooling: str = "avg"
    precision: str = "auto"
    storage: str = "float16"
    n_views: int = 1
    decode: str = "cpu"

    device: str = "auto"
    devices: tuple[str, ...] = ()
    engine: str = "auto"
    batch_size: int | None = None
    n_threads: int | None = None
