"""One backbone's store in a run: opened, compared with the data, and written to."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.names import counted, to_id
from pipeline.data.samples import DataSource
from pipeline.errors import UsageError
from pipeline.extract.place import (
    check_source_writable,
    is_gone,
    is_place,
    kept_beside,
    place_of,
    store_folder,
)
from pipeline.extract.plan import Plan, make_plan
from pipeline.extract.recall import REQUEST, WATCHED, Request, recall
from pipeline.extract.settings import Settings
from pipeline.extract.timings import Timings
from pipeline.store.manifest import Manifest, is_store, read_manifest
from pipeline.store.relabel import SPLIT, split_origin
from pipeline.store.table import LogEntry, SampleTable, Status
from pipeline.store.writer import StoreWriter

if TYPE_CHECKING:
    import torch

    from pipeline.backbones.backbone import Backbone
    from pipeline.extract.devices import Order
    from pipeline.extract.embedder import Embedder
    from pipeline.extract.stream import Unit

# Of the provenance: what a run asked for, which is true even if it finds nothing to do.
_ASKED = (REQUEST, WATCHED, "asked", "backbone")

# Of a relabelled column: samples that came later have the data source's values.
_IN_PART = ", in part"


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


class Target:
    """One backbone and its store.

    Args:
        source: the data.
        backbone: the frozen network, or how to load it, which is then done only when it is needed.
        settings: layers, pooling, precision and the like.
        cache_dir: where stores are kept.
        limit: the limit that ``source`` was opened with.
        trust: whether a store may say which recipe the same request had.
        timings: told where the time goes.

    Attributes:
        recipe: everything that decides the features' values.
        layers: what each row of the store holds.
        folder: the store.
        report: what was done so far.
        plan: what has to be done; set by :meth:`begin`.
    """

    plan: Plan

    def __init__(
        self,
        source: DataSource,
        backbone: Backbone | Request,
        settings: Settings,
        *,
        cache_dir: Path,
        limit: int | None,
        trust: bool,
        timings: Timings,
    ) -> None:
        self.source = source
        self.settings = settings
        self._backbone = backbone
        self._loader = backbone if isinstance(backbone, Request) else None
        self._timings = timings
        self._request = backbone.digest(settings) if isinstance(backbone, Request) else ""
        self._embedder: Embedder | None = None
        self._news: dict[str, Any] | None = None
        self._was_interrupted = False
        self._started = time.perf_counter()
        known = recall(cache_dir, source, self._request) if self._request and trust else None
        if known is None:
            check_source_writable(cache_dir, source)
        of: Embedder | Manifest = self.embedder if known is None else known
        self.recipe, self.layers = of.recipe, dict(of.layers)
        self.folder = store_folder(cache_dir, source, self.recipe)
        self.report = ExtractReport(self.folder, n_samples=len(source.samples), timings=timings)
        self._described = _described(source, limit)

    @property
    def embedder(self) -> Embedder:
        """The backbone, made ready: torch is imported and the network loaded at the first look."""
        if self._embedder is None:
            with self._timings.spent("loading"):
                from pipeline.extract.embedder import Embedder

                if isinstance(self._backbone, Request):
                    from pipeline.backbones import load_backbone

                    self._backbone = load_backbone(**vars(self._backbone))
                self._embedder = Embedder(
                    self._backbone,
                    self.settings,
                    self._request,
                    n_images=len(self.source.samples),
                )
        return self._embedder

    def open(self, on_note: Callable[[str], None]) -> StoreWriter:
        """The store's writer, not yet entered; says what is kept beside a new store."""
        told = {} if self._embedder is None else self._embedder.provenance()
        if is_store(self.folder):  # what made the rows that are there stays true of them
            found = read_manifest(self.folder).provenance
            told = {**found, **{name: told[name] for name in _ASKED if name in told}}
        else:
            kept, differences = kept_beside(self.folder, self.source, self.recipe)
            if differences:
                on_note(
                    f"{kept} is kept: it differs in {'; '.join(differences)}. Extracting beside it."
                )
        self.writer = StoreWriter(
            self.folder,
            self.recipe,
            self.layers,
            self._described,
            n_views=self.settings.n_views,
            provenance=told,
        )
        return self.writer

    def compare(
        self, known: SampleTable | None, manifest: Manifest | None, *, verify_content: bool
    ) -> Plan:
        """What has to be done, if that does not lose what was set by hand.

        Args:
            known: the store's samples; None for a new store.
            manifest: of the store; None where there is none.
            verify_content: read every file instead of trusting size and modification time.

        Raises:
            UsageError: samples of a relabelled store would be dropped for a limit only.
        """
        relabelled = {} if manifest is None else manifest.relabelled
        described = self._described
        plan = make_plan(
            self.source,
            known,
            verify_content=verify_content,
            is_elsewhere=manifest is not None and manifest.source.get("root") != described["root"],
            relabelled=relabelled,
        )
        if relabelled and plan.n_removed and "limit" in described:
            shown = shlex.quote(str(self.folder))
            raise UsageError(
                f"With --limit {described['limit']}, {counted(plan.n_removed, 'sample')} would "
                f"leave {self.folder}, and what `tlpipe relabel` set for them would be lost.\n"
                "  Extract without --limit, or into another cache:  --cache FOLDER\n"
                f"  Or give up what was set:  tlpipe relabel {shown} --reset"
            )
        return plan

    def begin(self, *, verify_content: bool, on_note: Callable[[str], None]) -> None:
        """Compare the data with the store, and make the data's samples those of the store.

        Raises:
            UsageError: samples of a relabelled store would be dropped for a limit only.
        """
        self._started = time.perf_counter()
        known = self.writer.table
        self._was_interrupted = known is not None and known.count(Status.PENDING) > 0
        with self._timings.spent("planning"):
            self.plan = self.compare(
                self.writer.table, self.writer.manifest, verify_content=verify_content
            )
            _begin(self.writer, self.source, self.plan, self._described, on_note)
        self.report.read_all = self.plan.reads_all
        self.report.n_removed = self.plan.n_removed
        self.report.n_cached = len(self.source.samples) - len(self.plan.todo)

    def prepare(self, images: list[torch.Tensor], on_note: Callable[[str], None]) -> None:
        """Choose what runs the network, on the first batch; the store says what was chosen."""
        n_passes = len(self.plan.todo) * self.settings.n_views
        for note in self.embedder.prepare(images, n_passes, self._engine_so_far):
            on_note(note)
        self.made_with(self.embedder.provenance())

    def made_with(self, provenance: Mapping[str, Any]) -> None:
        """Note what the rows to come are made with, before the next of them is written."""
        self._news = {**self.embedder.provenance(), **provenance}

    def _tell_news(self) -> None:
        """Only the thread that writes may change what the store says."""
        news, self._news = self._news, None
        if news is None:
            return
        before = self.writer.manifest.provenance
        engines = [*before.get("engines", [])] if isinstance(before.get("engines"), list) else []
        engines += [one for one in (before.get("engine"),) if one and one not in engines]
        if engines and _names(engines[-1]) == _names(news.get("engine")):
            engines.pop()
        kept = {"engines": engines} if engines else {}
        if "cost" in before:
            kept["cost"] = before["cost"]
        self.writer.make_with(self.recipe, {**news, **kept})

    def order(self, wants: NDArray[np.bool_]) -> Order:
        """What other processes have to do for this target.

        Args:
            wants: (n_files,) which of the files it embeds.

        Raises:
            UsageError: they cannot load its backbone.
        """
        from pipeline.extract.devices import Order

        if self._loader is None:
            raise UsageError(
                "Several devices need to know how to load the backbone: give a Request."
            )
        return Order(self._loader, self.recipe, self.folder, wants, self._engine_so_far)

    @property
    def _engine_so_far(self) -> Mapping[str, Any] | None:
        """What the rows that are there were made with, if those to come have to be, too.

        What was interrupted ends up as if it had not been. A store that was whole may go on with a
        faster engine than the one that was fast enough for a few images.
        """
        manifest = self.writer.manifest
        engine = manifest.provenance.get("engine") if manifest.shards else None
        if not isinstance(engine, dict):
            return None
        return engine if self._was_interrupted or engine.get("name") != "eager" else None

    def is_known(self, digest: bytes) -> bool:
        """Whether the store has the features of these bytes; any thread may ask."""
        return self.writer.find(digest) is not None

    def record(self, unit: Unit, indices: list[int]) -> None:
        """Write what became of each sample of a unit, in order.

        Args:
            unit: of this target.
            indices: which samples of the data its files are.
        """
        self._tell_news()
        position = {digest: i for i, digest in enumerate(unit.digests)}
        report = self.report
        for index, one in zip(indices, unit.loaded, strict=True):
            i = position.get(one.digest)
            failure = one.failure or (unit.refused.get(i, "") if i is not None else "")
            entry = LogEntry(
                self.source.samples[index].id,
                Status.FAILED if failure else Status.OK,
                one.digest,
                one.size_bytes,
                one.mtime_ns,
                reason=failure or "; ".join(one.notes),
            )
            report.n_decoded += one.was_decoded
            for note in one.notes:
                report.notes[note] = report.notes.get(note, 0) + 1
            if failure:
                self.writer.fail(entry)
            elif self.is_known(one.digest):
                self.writer.link(entry)
                report.n_linked += 1
            else:
                self.writer.add(entry, {name: rows[i] for name, rows in unit.features.items()})
                report.n_embedded += 1

    def finish(self, on_note: Callable[[str], None]) -> None:
        """Fold what was written into the samples table, and count what failed."""
        if self._embedder is not None and self._embedder.note:
            on_note(self._embedder.note)
            self.made_with({})
            self._tell_news()
        if self.report.n_embedded:
            self._tell_cost()
        self.writer.finish()
        table = self.writer.table
        assert table is not None
        failed = np.flatnonzero(table.statuses == Status.FAILED)
        self.report.failures = {table.ids[i]: table.reasons[i] for i in failed.tolist()}
        self.report.n_labels = {
            name: len(column.categories) for name, column in table.labels.items()
        }

    def _tell_cost(self) -> None:
        """Add up what the store's rows took, over all runs that were not killed."""
        provenance = self.writer.manifest.provenance
        cost = {
            "n_embedded": self.report.n_embedded,
            "seconds": round(time.perf_counter() - self._started, 2),
        }
        before = provenance.get("cost")
        if isinstance(before, dict) and all(
            isinstance(before.get(name), int | float) for name in cost
        ):
            cost = {name: round(before[name] + value, 2) for name, value in cost.items()}
        self.writer.make_with(self.recipe, {**provenance, "cost": cost})


def targets_of(
    source: DataSource,
    backbones: Sequence[Backbone | Request],
    settings: Settings,
    *,
    cache_dir: Path,
    limit: int | None,
    trust: bool,
    timings: Timings,
) -> list[Target]:
    """A target for each backbone; the arguments are those of :class:`Target`.

    Raises:
        UsageError: two of them have the same store.
    """
    targets = [
        Target(
            source,
            backbone,
            settings,
            cache_dir=cache_dir,
            limit=limit,
            trust=trust,
            timings=timings,
        )
        for backbone in backbones
    ]
    folders = [target.folder for target in targets]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise UsageError(f"A backbone was named twice, that of {twice[0]}. Name each once.")
    return targets


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


def _names(engine: Any) -> Any:
    """Of an engine's figures, what says that it is the same."""
    names = ("name", "version", "precision", "float32_until")
    return {name: engine.get(name) for name in names} if isinstance(engine, dict) else engine
