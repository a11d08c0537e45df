"""Embed a data source into feature stores; only what is new or changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.data.samples import DataSource
from pipeline.errors import DataError, EmptySourceError
from pipeline.extract.place import check_writable
from pipeline.extract.recall import Request
from pipeline.extract.recorder import Recorder
from pipeline.extract.settings import Settings
from pipeline.extract.target import ExtractReport, Target, targets_of
from pipeline.extract.timings import Timings

if TYPE_CHECKING:
    from pipeline.backbones.backbone import Backbone
    from pipeline.extract.stream import Unit

__all__ = ["ExtractReport", "Settings", "extract", "extract_all"]


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
    (report,) = extract_all(
        source,
        [backbone],
        settings,
        cache_dir=cache_dir,
        limit=limit,
        verify_content=verify_content,
        on_plan=on_plan,
        on_progress=on_progress,
        on_note=on_note,
        should_stop=should_stop,
    )
    return report


def extract_all(
    source: DataSource,
    backbones: Sequence[Backbone | Request],
    settings: Settings | None = None,
    *,
    cache_dir: Path = Path("cache"),
    limit: int | None = None,
    verify_content: bool = False,
    on_plan: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_note: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[ExtractReport]:
    """Embed with several backbones in one pass: every image is read and decoded once.

    Args:
        backbones: one or more; each has a store of its own.
        on_plan: is told the number of samples and how many have to be read, over all backbones.
        on_progress: likewise.

    See :func:`extract` for the others, and for what is raised.

    Returns:
        A report for each backbone.
    """
    started = time.perf_counter()
    check_writable(cache_dir)
    if not source.samples:
        raise EmptySourceError(f"{source.spec} has no image.")
    timings = Timings()
    targets = targets_of(
        source,
        backbones,
        settings or Settings(),
        cache_dir=cache_dir,
        limit=limit,
        trust=not verify_content,
        timings=timings,
    )
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(target.open(on_note))
            target.begin(verify_content=verify_content, on_note=on_note)
        n_todo = sum(len(target.plan.todo) for target in targets)
        if on_plan is not None:
            on_plan(len(source.samples) * len(targets), n_todo)
        n_done = _embed(source, targets, timings, on_progress, on_note, should_stop)
        with timings.spent("stalled"), timings.spent("writing"):
            for target in targets:
                target.finish(on_note)
    for target in targets:
        target.report.interrupted = n_done < n_todo
        target.report.seconds = time.perf_counter() - started
    reports = [target.report for target in targets]
    if all(len(report.failures) == report.n_samples for report in reports):
        failures = reports[0].failures
        raise DataError(
            f"None of the {len(failures)} images of {source.spec} can be used.\n"
            + "\n".join(f"  {i!r}: {why}" for i, why in list(failures.items())[:5])
        )
    return reports


def _embed(
    source: DataSource,
    targets: Sequence[Target],
    timings: Timings,
    on_progress: Callable[[int], None] | None,
    on_note: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> int:
    """Embed what the targets' plans say; gives how many samples were done, over all targets."""
    targets = [target for target in targets if len(target.plan.todo)]
    if not targets:
        return 0
    indices = np.unique(np.concatenate([target.plan.todo for target in targets]))
    files = [source.samples[i].file for i in indices.tolist()]
    wants = [np.isin(indices, target.plan.todo) for target in targets]
    for target in targets:
        target.writer.find(b"")  # the index of digests is built once, before threads read it

    def record(unit: Unit) -> None:
        with timings.spent("writing"):
            targets[unit.job].record(unit, indices[unit.files].tolist())
        if on_progress is not None:
            on_progress(len(unit.files))

    n_done = 0
    with Recorder() as recorder:
        for unit in _units(files, wants, targets, timings, on_note, should_stop):
            n_done += len(unit.files)
            with timings.spent("stalled"):
                recorder.put(partial(record, unit))
    return n_done


def _units(
    files: Sequence[str],
    wants: Sequence[NDArray[np.bool_]],
    targets: Sequence[Target],
    timings: Timings,
    on_note: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Iterator[Unit]:
    """Embed files in this process, or in one for each device."""
    with timings.spent("loading"):  # of torch, where the recipe was known without it
        from pipeline.extract.stream import Job, embed

    settings = targets[0].settings
    if len(settings.devices) > 1:
        from pipeline.extract.devices import embed_on_devices

        return embed_on_devices(
            files,
            [target.order(wanted) for target, wanted in zip(targets, wants, strict=True)],
            settings,
            timings,
            should_stop,
            lambda k, provenance: targets[k].made_with(provenance),
            on_note,
        )
    jobs = [
        Job(target.embedder, wanted, target.is_known, partial(target.prepare, on_note=on_note))
        for target, wanted in zip(targets, wants, strict=True)
    ]
    return embed(files, jobs, timings, should_stop, decode=settings.decode, on_note=on_note)
