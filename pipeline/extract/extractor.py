"""Embed a data source into a feature store; only what is new or changed."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.names import counted, to_id
from pipeline.data.samples import DataSource, Sample
from pipeline.errors import DataError, EmptySourceError, UsageError
from pipeline.extract.place import (
    check_source_writable,
    check_writable,
    is_gone,
    is_place,
    kept_beside,
    place_of,
    store_folder,
)
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

# Of a relabelled column: samples that came later have the data source's values.
_IN_PART = ", in part"


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
    limit: int | None = None,
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
        limit: the limit that ``source`` was opened with: samples that it lacks for that are not
            gone.
        verify_content: read every file instead of trusting size and modification time.
        on_plan: is told the number of samples and how many of them have to be read.
        on_progress: is told how many more samples are done.
        on_note: is told, in a sentence each, what is worth knowing before anything is embedded.
        should_stop: asked after each batch; what was done so far is committed and kept.

    Raises:
        DataError: there is no image, or none that can be decoded.
        UsageError: the limit would drop samples that `tlpipe relabel` said something of.
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
        check_source_writable(cache_dir, source)
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
    described = _described(source, limit)
    with StoreWriter(folder, recipe, layers, described, provenance=told) as writer:
        with timings.spent("planning"):
            plan = _plan(writer, source, described, verify_content=verify_content)
            _begin(writer, source, plan, described, on_note)
        report.read_all = plan.reads_all
        report.n_removed = plan.n_removed
        report.n_cached = len(source.samples) - len(plan.todo)
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


def _described(source: DataSource, limit: int | None) -> dict[str, Any]:
    """What a store says of its data source; of a limit only where it may have left samples out."""
    described: dict[str, Any] = {
        "name": source.name,
        "spec": to_id(source.spec),
        **place_of(source),
        "layout": source.layout,
        "split_origin": source.split_origin,
    }
    if limit is not None and limit in Counter(sample.split for sample in source.samples).values():
        described["limit"] = limit
    return described


def _plan(
    writer: StoreWriter,
    source: DataSource,
    described: Mapping[str, Any],
    *,
    verify_content: bool,
) -> Plan:
    """What has to be done, if that does not lose what was set by hand.

    Raises:
        UsageError: samples of a relabelled store would be dropped for a limit only.
    """
    manifest = writer.manifest
    plan = make_plan(
        source,
        writer.table,
        verify_content=verify_content,
        is_elsewhere=manifest.source.get("root") != described["root"],
        relabelled=manifest.relabelled,
    )
    if manifest.relabelled and plan.n_removed and "limit" in described:
        shown = shlex.quote(str(writer.folder))
        raise UsageError(
            f"With --limit {described['limit']}, {counted(plan.n_removed, 'sample')} would leave "
            f"{writer.folder}, and what `tlpipe relabel` set for them would be lost.\n"
            "  Extract without --limit, or into another cache:  --cache FOLDER\n"
            f"  Or give up what was set:  tlpipe relabel {shown} --reset"
        )
    return plan


def _begin(
    writer: StoreWriter,
    source: DataSource,
    plan: Plan,
    described: dict[str, Any],
    on_note: Callable[[str], None],
) -> None:
    """Make the data source's samples those of the store; what is still valid stays."""
    known, marks = writer.manifest.source, writer.manifest.relabelled
    if not is_place(known, source):
        on_note(_brought_text(writer.folder, known, described))
    if marks:
        if plan.n_added:
            marks = {
                name: f"{file.removesuffix(_IN_PART)}{_IN_PART}" for name, file in marks.items()
            }
        on_note(_relabelled_text(writer.folder, marks, plan))
    if SPLIT in marks:
        origin = str(known.get("split_origin", ""))
        file = marks[SPLIT].removesuffix(_IN_PART)
        described["split_origin"] = (
            split_origin(file, source.split_origin) if plan.n_added else origin
        )
    writer.begin(plan.table, source=described, relabelled=marks)


def _brought_text(folder: Path, known: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    """Where the data of a store was, and where it is now."""
    was, now = (str(where.get("manifest") or where.get("root")) for where in (known, described))
    if was == now:
        was, now = str(known.get("root")), str(described["root"])
    state = "is gone" if is_gone(known) else "has the same images"
    return f"{folder} was made from {was}, which {state}; it is that of {now} now."


def _relabelled_text(folder: Path, marks: Mapping[str, str], plan: Plan) -> str:
    """Which columns are not the data source's, and how to have those again."""
    columns: dict[str, list[str]] = {}
    for column, file in marks.items():
        columns.setdefault(file, []).append(column)
    parts = [f"{', '.join(names)} from {file}" for file, names in columns.items()]
    text = f"As set by `tlpipe relabel`: {'; '.join(parts)}. "
    if plan.n_added:
        text += f"The data source's for {counted(plan.n_added, 'new sample')}. "
    if plan.n_removed:
        n_left = counted(plan.n_removed, "sample")
        text += f"{n_left} left the data source, and what was set for them is lost. "
    return (
        f"{text}To take the data source's again:  tlpipe relabel {shlex.quote(str(folder))} --reset"
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
