"""What an extraction would do, and how long it would take: no store is written."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.data.samples import DataSource
from pipeline.errors import EmptySourceError
from pipeline.extract.plan import Plan
from pipeline.extract.recall import Request
from pipeline.extract.settings import Settings
from pipeline.extract.target import Target, targets_of
from pipeline.extract.timings import Timings
from pipeline.store.manifest import is_store, read_manifest
from pipeline.store.state import load_table

if TYPE_CHECKING:
    import torch

    from pipeline.backbones.backbone import Backbone

# Of a trial that decides the rate; one batch at least.
TRIAL_SECONDS = 5.0
_TRIAL_BATCHES = 16
# A row of the samples table and of a shard's log: digest, size, time, id and the like, twice.
_SAMPLE_BYTES = 300


@dataclass(frozen=True)
class StorePlan:
    """What one backbone would do.

    Attributes:
        store: the feature store.
        n_samples: samples of the data source.
        n_cached: samples whose features are there and current.
        n_todo: samples whose files would be read.
        n_removed: samples that would leave the store's list.
        bytes_needed: that the store would grow by, at most.
    """

    store: Path
    n_samples: int
    n_cached: int
    n_todo: int
    n_removed: int
    bytes_needed: int


@dataclass(frozen=True)
class Estimate:
    """What a run would do.

    Attributes:
        stores: one for each backbone.
        free_bytes: on the disk of the cache.
        n_files: files that would be read.
        n_tried: files of the trial; 0 where there is nothing to do.
        images_per_second: of the trial, all backbones together; 0.0 where there is nothing to do.
        seconds: until the run would end, without loading the network; 0.0 likewise.
        failures: why files of the trial cannot be used, by id.
        engines: what ran each network in the trial, by store.
        timings: of the trial.
    """

    stores: tuple[StorePlan, ...]
    free_bytes: int
    n_files: int
    n_tried: int
    images_per_second: float
    seconds: float
    failures: dict[str, str]
    engines: dict[str, str]
    timings: Timings

    @property
    def bytes_needed(self) -> int:
        """That all stores would grow by, at most."""
        return sum(store.bytes_needed for store in self.stores)

    @property
    def has_room(self) -> bool:
        """Whether the disk has room for that."""
        return self.bytes_needed <= self.free_bytes

    @property
    def bottleneck(self) -> str:
        """What would take most of the time of a run without its start."""
        return replace(self.timings, loading=0.0, choosing=0.0).bottleneck()


def estimate(
    source: DataSource,
    backbones: Sequence[Backbone | Request],
    settings: Settings | None = None,
    *,
    cache_dir: Path = Path("cache"),
    limit: int | None = None,
    verify_content: bool = False,
    trial_seconds: float = TRIAL_SECONDS,
    on_note: Callable[[str], None] = lambda _: None,
) -> Estimate:
    """Compare a data source with its stores, and embed some of what is missing for a trial.

    Args:
        source: what would be embedded.
        backbones: as in :func:`~pipeline.extract.extractor.extract_all`.
        settings: layers, pooling, precision and the like; of several devices, the first is tried.
        cache_dir: where stores are kept.
        limit: the limit that ``source`` was opened with.
        verify_content: every file would be read.
        trial_seconds: after which the trial ends; one batch is embedded in any case.
        on_note: is told, in a sentence each, what is worth knowing.

    Raises:
        DataError: there is no image.
        StoreError: a store is damaged.
    """
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
    plans = [_plan(target, verify_content) for target in targets]
    stores = tuple(_store_plan(*pair) for pair in zip(targets, plans, strict=True))
    todo = np.unique(np.concatenate([plan.todo for plan in plans]))
    existing = next(path for path in (cache_dir, *cache_dir.resolve().parents) if path.exists())
    n_tried, seconds, failures = _try(source, targets, plans, todo, timings, trial_seconds, on_note)
    seconds /= max(1, len((settings or Settings()).devices))
    return Estimate(
        stores=stores,
        free_bytes=shutil.disk_usage(existing).free,
        n_files=len(todo),
        n_tried=n_tried,
        images_per_second=len(todo) / seconds if seconds else 0.0,
        seconds=seconds,
        failures=failures,
        engines={
            str(target.folder): str(target.embedder.provenance().get("engine", {}).get("name", ""))
            for target, plan in zip(targets, plans, strict=True)
            if len(plan.todo)
        },
        timings=timings,
    )


def _plan(target: Target, verify_content: bool) -> Plan:
    """What would have to be done, by what can be read of the store."""
    known, manifest = None, None
    if is_store(target.folder):
        manifest = read_manifest(target.folder)
        known = load_table(target.folder, manifest)
    return target.compare(known, manifest, verify_content=verify_content)


def _store_plan(target: Target, plan: Plan) -> StorePlan:
    n_views, n_samples = target.settings.n_views, len(target.source.samples)
    row_bytes = n_views * sum(
        math.prod(layer.shape) * np.dtype(layer.dtype).itemsize for layer in target.layers.values()
    )
    return StorePlan(
        target.folder,
        n_samples,
        n_samples - len(plan.todo),
        len(plan.todo),
        plan.n_removed,
        len(plan.todo) * (row_bytes + _SAMPLE_BYTES),
    )


def _try(
    source: DataSource,
    targets: Sequence[Target],
    plans: Sequence[Plan],
    todo: NDArray[np.intp],
    timings: Timings,
    trial_seconds: float,
    on_note: Callable[[str], None],
) -> tuple[int, float, dict[str, str]]:
    """Embed some files, evenly spread; gives how many, seconds for all, and what failed."""
    pairs = [pair for pair in zip(targets, plans, strict=True) if len(pair[1].todo)]
    if not pairs:
        return 0, 0.0, {}
    from pipeline.extract.stream import Job, embed

    batch_size = max(target.embedder.batch_size for target, _ in pairs)
    n_tried = min(len(todo), _TRIAL_BATCHES * batch_size)
    tried = todo[np.linspace(0, len(todo) - 1, n_tried).astype(int)]
    jobs = []
    for target, plan in pairs:

        def begin(images: list[torch.Tensor], target: Target = target, plan: Plan = plan) -> None:
            n_passes = len(plan.todo) * target.settings.n_views
            for note in target.embedder.prepare(images, n_passes):
                on_note(note)

        jobs.append(Job(target.embedder, np.isin(tried, plan.todo), lambda _: False, begin))
    files = [source.samples[i].file for i in tried.tolist()]
    clock = _Clock(trial_seconds, timings)
    failures: dict[str, str] = {}
    for unit in embed(
        files, jobs, timings, clock.is_over, decode=targets[0].settings.decode, on_note=on_note
    ):
        clock.note(unit.job, len(unit.files))
        for k, one in zip(unit.files, unit.loaded, strict=True):
            if one.failure:
                failures[source.samples[tried[k]].id] = one.failure
    seconds = sum(clock.seconds_each(k) * len(plan.todo) for k, (_, plan) in enumerate(pairs))
    return max(clock.n_done.values()), seconds, failures


class _Clock:
    """How long units take, by job.

    Attributes:
        n_done: files by job.
    """

    def __init__(self, trial_seconds: float, timings: Timings) -> None:
        self.n_done: dict[int, int] = {}
        self._trial_seconds = trial_seconds
        self._timings = timings
        self._first: dict[int, float] = {}
        self._rest: dict[int, tuple[int, float]] = {}
        self._last = self._started = time.perf_counter()
        self._choosing = 0.0

    def is_over(self) -> bool:
        """Whether the trial has lasted long enough; what went before the first unit is not it."""
        return bool(self.n_done) and time.perf_counter() - self._started > self._trial_seconds

    def note(self, job: int, n_files: int) -> None:
        """A unit of so many files is there."""
        now = time.perf_counter()
        seconds = now - self._last - (self._timings.choosing - self._choosing)
        self._last, self._choosing = now, self._timings.choosing
        if not self.n_done:
            self._started = now
        self.n_done[job] = self.n_done.get(job, 0) + n_files
        if job not in self._first:  # this one also waited for threads and for memory
            self._first[job] = seconds / n_files
            return
        n, total = self._rest.get(job, (0, 0.0))
        self._rest[job] = n + n_files, total + seconds

    def seconds_each(self, job: int) -> float:
        """Of a file of a job, where others are read and decoded beside it."""
        if job in self._rest:
            n, total = self._rest[job]
            return total / n
        return self._first.get(job, 0.0)
