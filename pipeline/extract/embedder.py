"""A backbone made ready to embed images: network folded, recipe known, engine chosen."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import pipeline
from pipeline.backbones.backbone import Backbone, FeatureNet
from pipeline.extract.engines.choose import check_installed, choose_engine
from pipeline.extract.engines.engine import Engine, Work, enough_memory
from pipeline.extract.engines.memo import Memo, installed_version, work_key
from pipeline.extract.fold import fold_batchnorm
from pipeline.extract.forward import FrozenForward, Handle, n_on_the_way
from pipeline.extract.gpu_decode import check_decoder
from pipeline.extract.half import choose_bf16
from pipeline.extract.precision import resolve_device, resolve_precision
from pipeline.extract.recall import REQUEST, WATCHED, watched_files, weights_files
from pipeline.extract.recipe import build_recipe
from pipeline.extract.settings import Settings
from pipeline.extract.views import make_views
from pipeline.store.manifest import LayerInfo

GPU_BATCH_SIZE = 256

# On CPUs what a small batch leaves in the caches counts for more than the calls that it saves:
# two cores embed as many images a second in batches of 8 and 16, and fewer in batches of 32.
_IMAGES_A_CORE = 8
_CPU_BATCH_SIZES = (16, 64)

_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "h5py")


class Embedder:
    """A backbone ready to embed images with given settings.

    Args:
        backbone: the frozen network.
        settings: layers, pooling, precision and the like.
        request: digest of the request that it was loaded for; see :mod:`pipeline.extract.recall`.
        n_images: how many there are at most: a batch need not be larger.

    Attributes:
        net: the chosen layers.
        recipe: everything that decides the features' values.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: Settings,
        request: str = "",
        *,
        n_images: int | None = None,
    ) -> None:
        self.backbone = backbone
        self._request = request
        self._settings = settings
        # As the file was when its weights were read: it may be replaced while images are embedded.
        self._watched = watched_files(weights_files(backbone.file))
        self.device = resolve_device(settings.device)
        check_installed(settings.engine)
        check_decoder(settings.decode, self.device)
        batch_size = settings.batch_size or default_batch_size(self.device)
        self.batch_size = batch_size if n_images is None else max(1, min(batch_size, n_images))
        self.n_threads = settings.n_threads or os.cpu_count() or 1
        size = (backbone.preprocess.height, backbone.preprocess.width)
        self.net: FeatureNet = fold_batchnorm(
            backbone.feature_net(settings.layers, settings.pooling),
            torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)),
        )
        precision, until = resolve_precision(
            settings.precision, self.device, self.net, self._find_until
        )
        self.recipe = build_recipe(
            backbone,
            self.net,
            precision=precision,
            storage=settings.storage,
            n_views=settings.n_views,
            decode=settings.decode,
        )
        self._work = Work(
            self.net,
            backbone.preprocess,
            self.device,
            precision,
            until,
            self.batch_size,
            f"{self._key}-{precision}-{self.batch_size}",
        )
        self._engine_figures: dict[str, Any] = {}
        self._chosen: FrozenForward | None = None

    @property
    def layers(self) -> dict[str, LayerInfo]:
        """Shape and dtype of what is stored, by layer."""
        storage = str(self.recipe["storage"])
        return {name: LayerInfo(self.net.shapes[name], storage) for name in self.net.layers}

    @property
    def n_on_the_way(self) -> int:
        """How many batches may be submitted before the first result is asked for."""
        return n_on_the_way(self.device)

    @property
    def least_size(self) -> tuple[int, int] | None:
        """Height and width that images must have where they may be decoded at a part of theirs."""
        return self.backbone.preprocess.least_size if self._settings.decode == "fast" else None

    def make_input(self, pixels: torch.Tensor, digest: bytes) -> torch.Tensor:
        """From (3, H, W) uint8 pixels and the digest of the file to the network's input.

        Returns:
            (n_views, 3, height, width) uint8.
        """
        return make_views(pixels, self.backbone.preprocess, self._settings.n_views, digest)

    def prepare(
        self,
        images: list[torch.Tensor],
        n_images: int,
        preferred: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Choose and build what runs the network; without this it is torch as it is.

        Args:
            images: (3, height, width) uint8 each: the first batch of the job.
            n_images: how many images will go through the network in all.
            preferred: what provenance says of the engine that the store's other rows come from.

        Returns:
            What a user should know of the choice, a sentence each.

        Raises:
            EngineError: the engine that was asked for cannot be used.
            ResourceError: there is too little memory.
        """
        with enough_memory(self.device, self.batch_size):
            choice = choose_engine(
                self._work,
                torch.stack([image.cpu() for image in images]).permute(0, 2, 3, 1),
                n_images,
                asked=self._settings.engine,
                preferred=preferred,
            )
            self._work = choice.work
            self._engine_figures = choice.figures
            self._chosen = self._make_forward(choice.engine)
        return choice.notes

    @property
    def copying_seconds(self) -> float:
        """Spent so far on making batches of images and sending them to the device."""
        return 0.0 if self._chosen is None else self._chosen.copying_seconds

    @property
    def note(self) -> str:
        """What happened on the way that a user should know; "" where nothing did."""
        return "" if self._chosen is None else self._chosen.note

    def submit(self, images: list[torch.Tensor]) -> Handle:
        """Send a batch on its way; see :class:`~pipeline.extract.forward.FrozenForward`."""
        return self._forward.submit(images)

    def forward(
        self, images: list[torch.Tensor]
    ) -> tuple[dict[str, NDArray[np.floating]], dict[int, str]]:
        """See :class:`~pipeline.extract.forward.FrozenForward`."""
        return self._forward(images)

    def provenance(self) -> dict[str, Any]:
        """What is worth knowing about a run and never part of the recipe."""
        settings = self._settings
        recalled = {
            REQUEST: self._request,
            WATCHED: self._watched,
        }
        engine = dict(self._engine_figures)
        if self.note:
            engine["note"] = self.note
        is_cuda = self.device.type == "cuda"
        return {
            **(recalled if self._request else {}),
            "backbone": dict(self.backbone.origin),
            "asked": {
                "layers": list(settings.layers),
                "precision": settings.precision,
                "decode": settings.decode,
            },
            "device": torch.cuda.get_device_name(self.device) if is_cuda else str(self.device),
            **({"engine": engine} if engine else {}),
            "batch_size": self.batch_size,
            "n_threads": self.n_threads,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "versions": {
                "tlpipe": pipeline.__version__,
                "python": platform.python_version(),
                **{name: installed_version(name) for name in _LIBRARIES},
            },
        }

    @property
    def _forward(self) -> FrozenForward:
        if self._chosen is None:
            self._chosen = self._make_forward(None)
        return self._chosen

    def _make_forward(self, engine: Engine | None) -> FrozenForward:
        return FrozenForward(
            self.net,
            self.backbone.preprocess,
            device=self.device,
            precision=self._work.precision,
            storage=str(self.recipe["storage"]),
            batch_size=self.batch_size,
            until=self._work.until,
            engine=engine,
        )

    @cached_property
    def _key(self) -> str:
        """Digest of what decides how fast and how exact the network is computed here."""
        facts = {
            "backbone": self.backbone.name,
            "weights": self.backbone.weights_digest,
            "layers": self.net.layers,
            "pooling": self.net.pooling,
            "preprocess": self.backbone.preprocess.to_dict(),
        }
        return work_key(facts, self.device)

    def _find_until(self) -> str | None:
        """See :func:`~pipeline.extract.half.choose_bf16`; looked up where it was found before."""
        memo = Memo(self._key)
        names = dict(self.net.named_modules())
        known = memo.facts.get("float32_until", 0)
        if known is None or (isinstance(known, str) and known in names):
            return known
        until = choose_bf16(self.net, self.backbone.preprocess, self.backbone.stages, self.device)
        memo.note(float32_until=until)
        return until


def default_batch_size(device: torch.device) -> int:
    """Images in a batch where nobody says how many."""
    if device.type != "cpu":
        return GPU_BATCH_SIZE
    least, most = _CPU_BATCH_SIZES
    return min(max(least, _IMAGES_A_CORE * torch.get_num_threads()), most)
