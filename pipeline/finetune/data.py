"""From a data source to what a training starts from: who learns, who chooses, who scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import DataSource, Sample
from pipeline.data.names import counted
from pipeline.data.splits import stratified_split
from pipeline.errors import (
    DataError,
    EmptySourceError,
    UnknownNameError,
    UsageError,
)
from pipeline.finetune.images import Images
from pipeline.finetune.parallel import ALONE, Team
from pipeline.finetune.settings import Settings
from pipeline.heads.features import HeadInputs, StoredFeatures
from pipeline.heads.folds import Fold
from pipeline.heads.tasks import NO_LABEL, Task, strata
from pipeline.sweep.columns import LabelColumn
from pipeline.sweep.prepare import Prepared
from pipeline.sweep.protocol import Protocol, plan_protocol, split_by_group

Array = NDArray[Any]

_HOLDOUT = 0.2


@dataclass(frozen=True)
class TrainingData:
    """Labelled images with their protocol.

    Attributes:
        samples: ids, labels, splits, digests and class codes, as heads have them, without
            features; its protocol has one part that chooses, or none. Of several label columns,
            codes are (n_samples, n_tasks), and the columns know the classes.
        columns: what is learned.
        images: the files, row by row.
        source: name, spec, layout and the like, for the record.
        failures: why samples were left out, by id.
    """

    samples: Prepared
    columns: tuple[LabelColumn, ...]
    images: Images
    source: dict[str, Any]
    failures: dict[str, str]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The label columns with their classes, in the order of the outputs."""
        return tuple(column.task for column in self.columns)

    @property
    def fold(self) -> Fold:
        """Who trains and who chooses; nobody may choose."""
        folds = self.samples.protocol.folds
        return folds[0] if folds else Fold(self.samples.protocol.train, np.array([], np.intp))


def load_data(
    source: DataSource,
    settings: Settings,
    label: str | Sequence[str] | None = None,
    *,
    groups: str | None = None,
    on_plan: Callable[[int, int], None] = lambda *_: None,
    on_progress: Callable[[int], None] = lambda _: None,
    team: Team = ALONE,
) -> TrainingData:
    """Read every labelled image once, leave out those that cannot be read, and plan who does what.

    Args:
        source: the images.
        settings: seed, threads and memory.
        label: one label column or several; None for "label" or the only one.
        groups: column of samples that belong together and are never parted.
        on_plan: is told how many images there are, and how many of them to read.
        on_progress: is told how many more were read.
        team: processes that read a part of the images each.

    Raises:
        UsageError: unknown column.
        DataError: no labels, no train split, too few classes, or no image can be read.
    """
    columns = choose_columns(source, label)
    has_splits = any(sample.split for sample in source.samples)
    has_label = is_labelled(_labels_of(source.samples, source, columns))
    labelled = [source.samples[row] for row in np.flatnonzero(has_label)]
    chosen = [sample for sample in labelled if sample.split or not has_splits]
    if not chosen:
        raise no_labels(source, columns)
    images = Images(
        [sample.file for sample in chosen],
        n_threads=settings.n_threads,
        cache_bytes=settings.cache_bytes,
    )
    on_plan(len(chosen), len(team.part(np.arange(len(chosen)))))
    digests, failed = images.scan(on_progress, team)
    if len(failed) == len(chosen):
        row, why = next(iter(failed.items()))
        raise EmptySourceError(
            f"None of the {len(chosen):,} images of {source.spec} can be used; the first one, "
            f"{chosen[row].id}: {why}"
        )
    kept = [row for row in range(len(chosen)) if row not in failed]
    images.keep(kept)
    usable = [chosen[row] for row in kept]
    ids = [sample.id for sample in usable]
    labels = _labels_of(usable, source, columns)
    group_of = None
    if groups is not None:
        group_of = group_names(ids, _labels_of(usable, source, [groups])[groups])
    inputs = HeadInputs(
        features=StoredFeatures((), (), (np.arange(len(usable)),)),
        ids=np.array(ids, dtype=object),
        labels=strata(labels),
        splits=np.array([sample.split if has_splits else "train" for sample in usable]),
        digests=np.array(
            [list(one) for row, one in enumerate(digests) if row not in failed], np.uint8
        ),
        blocks=(),
        label_column=" + ".join(columns),
        groups=group_of,
        notes=source_notes(source, columns, len(labelled), len(chosen), len(failed), has_splits),
        columns=labels if len(labels) > 1 else {},
    )
    return TrainingData(
        *plan_training(inputs, source.split_origin, settings, groups),
        images,
        {"name": source.name, "spec": source.spec, "layout": source.layout},
        {chosen[row].id: why for row, why in failed.items()},
    )


def _labels_of(
    samples: Sequence[Sample], source: DataSource, columns: Sequence[str]
) -> dict[str, Array]:
    """(n_samples,) labels in each column, None where there is none."""
    places = {column: source.label_columns.index(column) for column in columns}
    return {
        column: np.array([sample.labels[place] for sample in samples], dtype=object)
        for column, place in places.items()
    }


def is_labelled(labels: Mapping[str, Array]) -> NDArray[np.bool_]:
    """(n_samples,) whether a sample has a label in any of the columns."""
    return np.array([label is not None for label in strata(labels)], dtype=bool)


def choose_columns(source: DataSource, label: str | Sequence[str] | None) -> tuple[str, ...]:
    """The label columns to learn.

    Raises:
        DataError: there are no labels.
        UsageError: there is no such column, one was named twice, or there are several, none is
            called "label", and none was named.
    """
    columns = source.label_columns
    if not columns:
        raise DataError(
            f"{source.spec} has no labels, so there is nothing to learn.\n"
            "  Sort the images into one folder a class, or list them in a CSV file with the "
            "columns path and label."
        )
    chosen = (label,) if isinstance(label, str) else tuple(label or ())
    for name in chosen:
        if name not in columns:
            raise UnknownNameError("label column", name, columns)
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"A label column was named twice: {', '.join(chosen)}.")
    if not chosen and "label" not in columns and len(columns) > 1:
        raise UsageError(
            f"{source.spec} has several label columns: {', '.join(columns)}.\n"
            f"  Say which one to learn:  --label {columns[0]}"
        )
    return chosen or ("label" if "label" in columns else columns[0],)


def check_group_column(groups: str, source: DataSource) -> None:
    """Raise UnknownNameError for a column that there is none of."""
    if groups not in source.label_columns:
        raise UnknownNameError("group column", groups, source.label_columns)


def no_labels(source: DataSource, columns: Sequence[str]) -> DataError:
    """What to raise where no sample can be used."""
    return DataError(f"No sample of {source.spec} has a label in {_columns_in_words(columns)}.")


def group_names(ids: Iterable[str], values: Iterable[str | None]) -> Array:
    """The group of each sample; one that names none is a group of its own."""
    return np.array(
        [f"alone {i}" if v is None else f"= {v}" for i, v in zip(ids, values, strict=True)],
        dtype=object,
    )


def plan_training(
    inputs: HeadInputs, split_origin: str, settings: Settings, groups: str | None = None
) -> tuple[Prepared, tuple[LabelColumn, ...]]:
    """Class codes and protocol, as heads have them, but for the part that chooses.

    All columns share the protocol: what is held out has equal shares of the classes of the first
    column, and of samples without a label there those of the next one.

    Args:
        inputs: labelled samples.
        split_origin: how their splits came about.
        settings: seed of what is held out, and whether anything is.
        groups: column that the groups are from, where samples have some.

    Raises:
        DataError: no train split, too few classes, or given splits that part a group.
    """
    seed = settings.seed
    if inputs.groups is not None and split_origin.startswith("made: "):
        splits = split_by_group(inputs.ids, inputs.labels, inputs.splits, inputs.groups, seed=seed)
        split_origin = f"made: a fifth of the groups of {groups} held out for test, seed {seed}"
        inputs = replace(inputs, splits=splits)
    protocol = plan_protocol(
        inputs.ids, inputs.labels, inputs.splits, seed=seed, groups=inputs.groups
    )
    labels = inputs.columns or {inputs.label_column: inputs.labels}
    columns = tuple(LabelColumn.of(name, column, protocol) for name, column in labels.items())
    if protocol.kind == "folds":
        protocol = _one_holdout(protocol, inputs, seed)
    if protocol.kind == "holdout" and not settings.hold_out:
        protocol = replace(protocol, folds=(), kind="none", chosen_by="nothing (as asked for)")
    if protocol.kind == "holdout" and not _leaves_two_classes(protocol.folds[0], columns):
        nothing = "nothing (no class has a sample to spare)"
        protocol = replace(protocol, folds=(), kind="none", chosen_by=nothing)
    codes = np.stack([column.codes for column in columns], axis=1)
    if len(columns) > 1:
        return Prepared(inputs, protocol, codes, (), (), split_origin, seed), columns
    known, unseen = columns[0].task.classes, columns[0].unseen
    return Prepared(inputs, protocol, codes[:, 0], known, unseen, split_origin, seed), columns


def _one_holdout(protocol: Protocol, inputs: HeadInputs, seed: int) -> Protocol:
    """A fifth of train instead of folds: a training is too dear to be done five times."""
    train = protocol.train
    if inputs.groups is None:
        held_out = stratified_split(
            [str(name) for name in inputs.ids[train]],
            inputs.labels[train].tolist(),
            _HOLDOUT,
            seed,
        )
        fold, share, of_groups = Fold(train[~held_out], train[held_out]), _HOLDOUT, ""
    else:
        fold = protocol.folds[0]
        share = len(fold.choose) / len(train)
        of_groups = f" of {counted(len(set(inputs.groups[fold.choose])), 'group')}"
    words = (
        f"{share:.0%} of train (stratified, seed {seed}, {len(fold.choose):,} samples{of_groups})"
    )
    return replace(protocol, folds=(fold,), kind="holdout", chosen_by=words)


def _leaves_two_classes(fold: Fold, columns: Sequence[LabelColumn]) -> bool:
    """Whether something is held out, and every column can still be learned without it."""
    left = (set(column.codes[fold.fit].tolist()) - {NO_LABEL} for column in columns)
    return len(fold.choose) > 0 and all(len(classes) > 1 for classes in left)


def source_notes(
    source: DataSource,
    columns: Sequence[str],
    n_labelled: int,
    n_chosen: int,
    n_failed: int,
    has_splits: bool,
) -> list[str]:
    """What was left out of a data source, and why.

    Args:
        source: the images.
        columns: of the labels.
        n_labelled: samples with a label in any of them.
        n_chosen: of them, those in a split, where there are splits.
        n_failed: of them, those that cannot be read.
        has_splits: whether any sample is in a split.
    """
    notes = list(source.notes)
    n_all = len(source.samples)
    if n_labelled < n_all:
        notes.append(
            f"{n_all - n_labelled:,} of {counted(n_all, 'sample')} without a label in "
            f"{_columns_in_words(columns)}: left out."
        )
    if n_chosen < n_labelled:
        notes.append(f"{counted(n_labelled - n_chosen, 'sample')} in no split: left out.")
    if n_failed:
        notes.append(f"{counted(n_failed, 'image')} cannot be read: left out.")
    if not has_splits:
        notes.append("The data has no splits: every sample is taken as train.")
    return notes


def _columns_in_words(columns: Sequence[str]) -> str:
    if len(columns) == 1:
        return f"column {columns[0]!r}"
    return f"any of the columns {', '.join(repr(column) for column in columns)}"


def training_notes(data: TrainingData) -> list[str]:
    """What a user should know of the data before believing a score."""
    samples = data.samples
    if len(data.columns) == 1:
        notes = samples.notes()
    else:
        notes = [*samples.inputs.notes, *samples.leak_notes()]
        for column in data.columns:
            notes += column.notes(samples.protocol)
    for column in data.columns:
        where = f" of column {column.task.label!r}" if len(data.columns) > 1 else ""
        notes += _unlearned_notes(column, data.fold, where)
    if samples.protocol.kind == "none":
        notes.append(
            "No sample was held out: the state after the last epoch was kept, and a learning "
            "rate that is not given is chosen by the training loss."
        )
    if not len(samples.protocol.test):
        notes.append(
            "Warning: there is no test split. The scores are of the samples that chose, and so "
            "too good."
            if len(data.fold.choose)
            else "Warning: there is no test split and no sample to spare: nothing was scored."
        )
    return notes


def _unlearned_notes(column: LabelColumn, fold: Fold, where: str) -> list[str]:
    """Whether samples choose that are of classes nothing is trained on."""
    choose = column.codes[fold.choose]
    n_wrong = int((~np.isin(choose, column.codes[fold.fit]) & (choose != NO_LABEL)).sum())
    if not n_wrong:
        return []
    return [
        f"{counted(n_wrong, 'sample')} that choose are of classes{where} that nothing is trained "
        "on: they count as errors."
    ]
