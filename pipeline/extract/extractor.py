"""Embed a data source into a feature store; only what is new or changed."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray

import pipeline
from pipeline.backbones.backbone import Backbone, FeatureNet
from pipeline.data.names import to_id
from pipeline.data.samples import DataSource, Sample
from pipeline.errors import DataError, EmptySourceError
from pipeline.extract.fold import fold_batchnorm
from pipeline.extract.forward import FrozenForward
from pipeline.extract.loader import Loaded, load, load_in_order
from pipeline.extract.place import check_writable, kept_beside, root_text, store_folder
from pipeline.extract.plan import Plan, make_plan
from pipeline.extract.precision import resolve_device, resolve_precision
from pipeline.extract.recipe import build_recipe
from pipeline.store.manifest import LayerInfo, is_store
from pipeline.store.relabel import SPLIT, split_origin
from pipeline.store.table import LogEntry, Status
from pipeline.store.writer import StoreWriter

CPU_BATCH_SIZE = 32
GPU_BATCH_SIZE = 256

# Known images fill no batch: past this many samples of any kind, what there is gets written.
GATHERED_SAMPLES = 1024


@dataclass(frozen=True)
class Settings:
    """How to embed. The first block decides values and is part of the recipe, the rest is not.

    Attributes:
        layers: names of layers; "all" for every stage and the penultimate features.
        pooling: of stages: "avg", "max", "gem", "cls" or "none".
        precision: "auto", "fp32", "bf16" or "fp16".
        storage: "float16" or "float32".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        batch_size: images in a batch; None for one that suits the device.
        n_threads: decoding threads; None for one a core.
    """

    layers: tuple[str, ...] = ("penultimate",)
    pooling: str = "avg"
    precision: str = "auto"
    storage: str = "float16"

    device: str = "auto"
    batch_size: int | None = None
    n_threads: int | None = None


@dataclass
class ExtractReport:
    """What a run did.

    Attributes:
        store: the feature store.
        n_samples: samples of the data source.
        n_cached: samples whose features were there and current.
        n_embedded: images that went through the network.
        n_linked: samples whose bytes were embedded already, under this or another id.
        n_decoded: images that were decoded.
        read_all: whether every file was read, also those that seemed current.
        n_removed: samples that left the data source since the last run.
        failures: why a sample has no features, by id.
        notes: how many images were converted, by what was done to them.
        n_labels: different labels of each label column of the store.
        seconds: of the whole run.
        interrupted: whether it was asked to stop before the end.
    """

    store: Path
    n_samples: int = 0
    n_cached: int = 0
    n_embedded: int = 0
    n_linked: int = 0
    n_decoded: int = 0
    read_all: bool = False
    n_removed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    n_labels: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False


class Embedder:
    """A backbone ready to embed files with given settings.

    Attributes:
        net: the chosen layers.
        recipe: everything that decides the features' values.
    """

    def __init__(self, backbone: Backbone, settings: Settings) -> None:
        self.backbone = backbone
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
        return {
            "backbone": dict(self.backbone.origin),
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


def extract(
    source: DataSource,
    backbone: Backbone,
    settings: Settings | None = None,
    *,
    cache_dir: Path = Path("cache"),
    verify_content: bool = False,
    on_plan: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_note: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ExtractReport:
    """Embed every image of ``source`` that the store does not hold yet.

    Args:
        source: what to embed.
        backbone: the frozen network.
        settings: layers, pooling, precision and the like.
        cache_dir: where stores are kept.
        verify_content: read every file instead of trusting size and modification time.
        on_plan: is told the number of samples and how many of them have to be read.
        on_progress: is told how many more samples are done.
        on_note: is told, in a sentence each, what is worth knowing before anything is embedded.
        should_stop: asked after each batch; what was done so far is committed and kept.

    Raises:
        DataError: there is no image, or none that can be decoded.
        StoreError: the store cannot be written to, or is damaged.
        LockedError: another process writes to the store.
        ResourceError: out of disk space or memory; what was committed is kept.
    """
    started = time.perf_counter()
    check_writable(cache_dir)
    if not source.samples:
        raise EmptySourceError(f"{source.spec} has no image.")
    embedder = Embedder(backbone, settings or Settings())
    folder = store_folder(cache_dir, source, embedder.recipe)
    if not is_store(folder):
        _tell_what_is_kept(folder, source, embedder, on_note)
    report = ExtractReport(folder, n_samples=len(source.samples))
    with StoreWriter(
        folder,
        embedder.recipe,
        embedder.layers,
        _described(source),
        provenance=embedder.provenance(),
    ) as writer:
        plan = _begin(writer, source, report, verify_content=verify_content, on_note=on_note)
        if on_plan is not None:
            on_plan(len(source.samples), len(plan.todo))
        samples = [source.samples[i] for i in plan.todo]
        if samples:
            _embed(samples, embedder, writer, report, on_progress, should_stop)
        writer.finish()
        table = writer.table
        assert table is not None
        failed = np.flatnonzero(table.statuses == Status.FAILED)
        report.failures = {table.ids[i]: table.reasons[i] for i in failed.tolist()}
        report.n_labels = {name: len(column.categories) for name, column in table.labels.items()}
    report.seconds = time.perf_counter() - started
    if len(report.failures) == report.n_samples:
        raise DataError(
            f"None of the {report.n_samples} images of {source.spec} can be used.\n"
            + "\n".join(f"  {i}: {why}" for i, why in list(report.failures.items())[:5])
        )
    return report


def _tell_what_is_kept(
    folder: Path, source: DataSource, embedder: Embedder, on_note: Callable[[str], None]
) -> None:
    """Say how the store that is about to be made differs from the one that is there already."""
    kept, differences = kept_beside(folder, source, embedder.recipe)
    if differences:
        on_note(f"{kept} is kept: it differs in {'; '.join(differences)}. Extracting beside it.")


def _described(source: DataSource) -> dict[str, Any]:
    """What a store says of its data source."""
    return {
        "name": source.name,
        "spec": to_id(source.spec),
        "root": root_text(source),
        "layout": source.layout,
        "split_origin": source.split_origin,
    }


def _begin(
    writer: StoreWriter,
    source: DataSource,
    report: ExtractReport,
    *,
    verify_content: bool,
    on_note: Callable[[str], None],
) -> Plan:
    """Make the data source's samples those of the store; what is still valid stays."""
    known, relabelled = writer.manifest.source, writer.manifest.relabelled
    described = _described(source)
    moved = known.get("root") != described["root"]
    plan = make_plan(
        source,
        writer.table,
        verify_content=verify_content,
        is_elsewhere=moved,
        relabelled=relabelled,
    )
    if relabelled:
        on_note(_relabelled_text(writer.folder, relabelled))
    if SPLIT in relabelled and plan.n_added:
        described["split_origin"] = split_origin(relabelled[SPLIT], source.split_origin)
    elif SPLIT in relabelled:
        described["split_origin"] = known.get("split_origin", "")
    writer.begin(plan.table, source=described)
    report.read_all = verify_content or moved
    report.n_removed = plan.n_removed
    report.n_cached = len(source.samples) - len(plan.todo)
    return plan


def _relabelled_text(folder: Path, relabelled: Mapping[str, str]) -> str:
    """Which columns are not the data source's, and how to have those again."""
    columns: dict[str, list[str]] = {}
    for column, file in relabelled.items():
        columns.setdefault(file, []).append(column)
    parts = [f"{', '.join(names)} from {file}" for file, names in columns.items()]
    return (
        f"As set by `tlpipe relabel`: {'; '.join(parts)}. To take the data source's again:  "
        f"tlpipe relabel {shlex.quote(str(folder))} --reset"
    )


def _embed(
    samples: list[Sample],
    embedder: Embedder,
    writer: StoreWriter,
    report: ExtractReport,
    on_progress: Callable[[int], None] | None,
    should_stop: Callable[[], bool],
) -> None:
    """Read ``samples`` in order and write what becomes of each, batch by batch."""
    writer.find(b"")  # the index of digests is built once, before threads read it
    loaded = embedder.load(
        (sample.file for sample in samples), lambda digest: writer.find(digest) is not None
    )
    gathered: list[tuple[Sample, Loaded]] = []
    images: dict[bytes, torch.Tensor] = {}
    for k, (sample, one) in enumerate(zip(samples, loaded, strict=True), start=1):
        report.n_decoded += one.pixels is not None
        for note in one.notes:
            report.notes[note] = report.notes.get(note, 0) + 1
        if one.pixels is not None and writer.find(one.digest) is None:
            images.setdefault(one.digest, one.pixels)
        gathered.append((sample, replace(one, pixels=None)))  # copies need no pixels of their own
        full = len(images) == embedder.batch_size or len(gathered) == GATHERED_SAMPLES
        if not full and k < len(samples):
            continue
        _write(gathered, images, embedder, writer, report)
        if on_progress is not None:
            on_progress(len(gathered))
        gathered, images = [], {}
        if should_stop():
            report.interrupted = k < len(samples)
            return


def _write(
    gathered: list[tuple[Sample, Loaded]],
    images: dict[bytes, torch.Tensor],
    embedder: Embedder,
    writer: StoreWriter,
    report: ExtractReport,
) -> None:
    """Run one batch and write what became of each sample that led up to it, in order."""
    features: dict[str, NDArray[np.floating]] = {}
    refused: dict[int, str] = {}
    if images:
        features, refused = embedder.forward(list(images.values()))
    position = {digest: i for i, digest in enumerate(images)}
    for sample, one in gathered:
        i = position.get(one.digest)
        failure = one.failure or (refused.get(i, "") if i is not None else "")
        entry = LogEntry(
            sample.id,
            Status.FAILED if failure else Status.OK,
            one.digest,
            one.size_bytes,
            one.mtime_ns,
            reason=failure or "; ".join(one.notes),
        )
        if failure:
            writer.fail(entry)
        elif writer.find(one.digest) is not None:
            writer.link(entry)
            report.n_linked += 1
        else:
            writer.add(entry, {name: values[i][None] for name, values in features.items()})
            report.n_embedded += 1
