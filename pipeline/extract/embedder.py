"""A backbone made ready to embed files: its network folded, its recipe known."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import h5py
import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray

import pipeline
from pipeline.backbones.backbone import Backbone, FeatureNet
from pipeline.extract.extractor import Settings
from pipeline.extract.fold import fold_batchnorm
from pipeline.extract.forward import FrozenForward
from pipeline.extract.loader import Loaded, load, load_in_order
from pipeline.extract.precision import resolve_device, resolve_precision
from pipeline.extract.recall import REQUEST, WATCHED, watched_files, weights_files
from pipeline.extract.recipe import build_recipe
from pipeline.store.manifest import LayerInfo

CPU_BATCH_SIZE = 32
GPU_BATCH_SIZE = 256


class Embedder:
    """A backbone ready to embed files with given settings.

    Args:
        backbone: the frozen network.
        settings: layers, pooling, precision and the like.
        request: digest of the request that it was loaded for; see :mod:`pipeline.extract.recall`.

    Attributes:
        net: the chosen layers.
        recipe: everything that decides the features' values.
    """

    def __init__(self, backbone: Backbone, settings: Settings, request: str = "") -> None:
        self.backbone = backbone
        self._request = request
        self._asked = {"layers": list(settings.layers), "precision": settings.precision}
        self.device = resolve_device(settings.device)
        on_cpu = self.device.type == "cpu"
        self.batch_size = settings.batch_size or (CPU_BATCH_SIZE if on_cpu else GPU_BATCH_SIZE)
        self.n_threads = settings.n_threads or os.cpu_count() or 1
        size = (backbone.preprocess.height, backbone.preprocess.width)
        self.net: FeatureNet = fold_batchnorm(
            backbone.feature_net(settings.layers, settings.pooling),
            torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)),
        )
        precision = resolve_precision(
            settings.precision, self.device, self.net, backbone.preprocess, backbone.stages
        )
        self.recipe = build_recipe(
            backbone, self.net, precision=precision, storage=settings.storage
        )
        self._forward: FrozenForward | None = None

    @property
    def layers(self) -> dict[str, LayerInfo]:
        """Shape and dtype of what is stored, by layer."""
        storage = str(self.recipe["storage"])
        return {name: LayerInfo(self.net.shapes[name], storage) for name in self.net.layers}

    def load(self, files: Iterator[str], is_known: Callable[[bytes], bool]) -> Iterator[Loaded]:
        """Read and decode files in threads, in order."""
        load_one = partial(load, preprocess=self.backbone.preprocess, is_known=is_known)
        return load_in_order(files, load_one, self.n_threads, 2 * self.batch_size)

    def forward(
        self, images: list[torch.Tensor]
    ) -> tuple[dict[str, NDArray[np.floating]], dict[int, str]]:
        """See :class:`~pipeline.extract.forward.FrozenForward`."""
        if self._forward is None:
            self._forward = FrozenForward(
                self.net,
                self.backbone.preprocess,
                device=self.device,
                precision=str(self.recipe["precision"]),
                storage=str(self.recipe["storage"]),
                batch_size=self.batch_size,
            )
        return self._forward(images)

    def provenance(self) -> dict[str, Any]:
        """What is worth knowing about a run and never part of the recipe."""
        cuda = self.device.type == "cuda"
        recalled = {
            REQUEST: self._request,
            WATCHED: watched_files(weights_files(self.backbone.file)),
        }
        return {
            **(recalled if self._request else {}),
            "backbone": dict(self.backbone.origin),
            "asked": self._asked,
            "device": torch.cuda.get_device_name(self.device) if cuda else str(self.device),
            "batch_size": self.batch_size,
            "n_threads": self.n_threads,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "versions": {
                "tlpipe": pipeline.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "timm": timm.__version__,
                "numpy": np.__version__,
                "h5py": h5py.__version__,
            },
        }
