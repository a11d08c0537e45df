"""Embed a data source into a feature store; only what is new or changed."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.names import to_id
from pipeline.data.samples import DataSource, Sample
from pipeline.errors import DataError, EmptySourceError
from pipeline.extract.place import check_writable, kept_beside, root_text, store_folder
from pipeline.extract.plan import Plan, make_plan
from pipeline.extract.recall import Request, recall
from pipeline.extract.timings import Timings
from pipeline.store.manifest import is_store
from pipeline.store.relabel import SPLIT, split_origin
from pipeline.store.table import LogEntry, Status
from pipeline.store.writer import StoreWriter

if TYPE_CHECKING:
    import torch

    from pipeline.backbones.backbone import Backbone
    from pipeline.extract.embedder import Embedder
    from pipeline.extract.loader import Loaded

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
        timings: where they went.
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
    timings: Timings = field(default_factory=Timings)
    interrupted: bool = False


def extract(
    source: DataSource,
    backbone: Backbone | Request,
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
        backbone: the frozen network; or how to load it, which is then done only if there is
            something to embed.
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
    settings = settings or Settings()
    request = backbone.digest(settings) if isinstance(backbone, Request) else ""
    known = recall(cache_dir, source, request) if request and not verify_content else None
    embedder, timings = None, Timings()
    if known is None:
        with timings.spent("loading"):
            embedder = _load_embedder(backbone, settings, request)
        recipe, layers = embedder.recipe, embedder.layers
    else:
        recipe, layers = known.recipe, known.layers
    folder = store_folder(cache_dir, source, recipe)
    if not is_store(folder):
        _tell_what_is_kept(folder, source, recipe, on_note)
    report = ExtractReport(folder, n_samples=len(source.samples), timings=timings)
    told = None if embedder is None else embedder.provenance()
    with StoreWriter(folder, recipe, layers, _described(source), provenance=told) as writer:
        with timings.spent("planning"):
            plan = _begin(writer, source, report, verify_content=verify_content, on_note=on_note)
        if on_plan is not None:
            on_plan(len(source.samples), len(plan.todo))
        samples = [source.samples[i] for i in plan.todo]
        if samples:
            if embedder is None:
                with timings.spent("loading"):
                    embedder = _load_embedder(backbone, settings, request)
                writer.make_with(embedder.recipe, embedder.provenance())
            _embed(samples, embedder, writer, report, on_progress, should_stop)
        with timings.spent("writing"):
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
            + "\n".join(f"  {i!r}: {why}" for i, why in list(report.failures.items())[:5])
        )
    return report


def _load_embedder(backbone: Backbone | Request, settings: Settings, request: str) -> Embedder:
    """Import torch, load the network where it is not there yet, and make it ready."""
    from pipeline.extract.embedder import Embedder

    if isinstance(backbone, Request):
        from pipeline.backbones import load_backbone

        backbone = load_backbone(**vars(backbone))
    return Embedder(backbone, settings, request)


def _tell_what_is_kept(
    folder: Path, source: DataSource, recipe: dict[str, Any], on_note: Callable[[str], None]
) -> None:
    """Say how the store that is about to be made differs from the one that is there already."""
    kept, differences = kept_beside(folder, source, recipe)
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
    timings = report.timings
    timings.n_threads = embedder.n_threads
    gathered: list[tuple[Sample, Loaded]] = []
    images: dict[bytes, torch.Tensor] = {}
    pairs = zip(samples, timings.waiting_for(loaded), strict=True)
    for k, (sample, one) in enumerate(pairs, start=1):
        timings.reading += one.reading_seconds
        timings.decoding += one.decoding_seconds
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
        with report.timings.spent("network"):
            features, refused = embedder.forward(list(images.values()))
    with report.timings.spent("writing"):
        _record(gathered, list(images), features, refused, writer, report)


def _record(
    gathered: list[tuple[Sample, Loaded]],
    digests: list[bytes],
    features: dict[str, NDArray[np.floating]],
    refused: dict[int, str],
    writer: StoreWriter,
    report: ExtractReport,
) -> None:
    """Write what became of each sample; features are of the images with these digests."""
    position = {digest: i for i, digest in enumerate(digests)}
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
