"""From a data source to what a training starts from: who learns, who chooses, who scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import DataSource
from pipeline.data.names import counted
from pipeline.data.splits import stratified_split
from pipeline.errors import DataError, EmptySourceError, UnknownNameError, UsageError
from pipeline.finetune.images import Images
from pipeline.finetune.settings import Settings
from pipeline.heads.features import HeadInputs, StoredFeatures
from pipeline.heads.folds import Fold
from pipeline.sweep.prepare import Prepared
from pipeline.sweep.protocol import Protocol, plan_protocol

_HOLDOUT, _HOLDOUT_OF_MANY, _MANY = 0.2, 0.1, 50_000


@dataclass(frozen=True)
class TrainingData:
    """Labelled images with their protocol.

    Attributes:
        samples: ids, labels, splits, digests and class codes, as heads have them, without
            features; its protocol has one part that chooses, or none.
        images: the files, row by row.
        source: name, spec, layout and the like, for the record.
        failures: why samples were left out, by id.
    """

    samples: Prepared
    images: Images
    source: dict[str, Any]
    failures: dict[str, str]

    @property
    def fold(self) -> Fold:
        """Who trains and who chooses; nobody may choose."""
        folds = self.samples.protocol.folds
        return folds[0] if folds else Fold(self.samples.protocol.train, np.array([], np.intp))


def load_data(
    source: DataSource,
    settings: Settings,
    label: str | None = None,
    *,
    on_plan: Callable[[int, int], None] = lambda *_: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> TrainingData:
    """Read every labelled image once, leave out those that cannot be read, and plan who does what.

    Args:
        source: the images.
        settings: seed, threads and memory.
        label: label column; None for "label" or the only one.
        on_plan: is told how many images there are, and how many of them to read.
        on_progress: is told how many more were read.

    Raises:
        UsageError: unknown column.
        DataError: no labels, no train split, too few classes, or no image can be read.
    """
    column = choose_column(source, label)
    place = source.label_columns.index(column)
    has_splits = any(sample.split for sample in source.samples)
    labelled = [sample for sample in source.samples if sample.labels[place] is not None]
    chosen = [sample for sample in labelled if sample.split or not has_splits]
    if not chosen:
        raise DataError(f"No sample of {source.spec} has a label in column {column!r}.")
    images = Images(
        [sample.file for sample in chosen],
        n_threads=settings.n_threads,
        cache_bytes=settings.cache_bytes,
    )
    on_plan(len(chosen), len(chosen))
    digests, failed = images.scan(on_progress)
    if len(failed) == len(chosen):
        row, why = next(iter(failed.items()))
        raise EmptySourceError(
            f"None of the {len(chosen):,} images of {source.spec} can be used; the first one, "
            f"{chosen[row].id}: {why}"
        )
    kept = [row for row in range(len(chosen)) if row not in failed]
    images.keep(kept)
    usable = [chosen[row] for row in kept]
    inputs = HeadInputs(
        features=StoredFeatures((), (), (np.arange(len(usable)),)),
        ids=np.array([sample.id for sample in usable], dtype=object),
        labels=np.array([sample.labels[place] for sample in usable], dtype=object),
        splits=np.array([sample.split if has_splits else "train" for sample in usable]),
        digests=np.array(
            [list(one) for row, one in enumerate(digests) if row not in failed], np.uint8
        ),
        blocks=(),
        label_column=column,
        notes=source_notes(source, column, len(labelled), len(chosen), len(failed), has_splits),
    )
    return TrainingData(
        plan_training(inputs, source.split_origin, settings.seed),
        images,
        {"name": source.name, "spec": source.spec, "layout": source.layout},
        {chosen[row].id: why for row, why in failed.items()},
    )


def choose_column(source: DataSource, label: str | None) -> str:
    """The label column to learn.

    Raises:
        DataError: there are no labels.
        UsageError: there is no such column, or several and none is called "label".
    """
    columns = source.label_columns
    if not columns:
        raise DataError(
            f"{source.spec} has no labels, so there is nothing to learn.\n"
            "  Sort the images into one folder a class, or list them in a CSV file with the "
            "columns path and label."
        )
    if label is not None and label not in columns:
        raise UnknownNameError("label column", label, columns)
    if label is None and "label" not in columns and len(columns) > 1:
        raise UsageError(
            f"{source.spec} has several label columns: {', '.join(columns)}.\n"
            f"  Say which one to learn:  --label {columns[0]}"
        )
    return label or ("label" if "label" in columns else columns[0])


def plan_training(inputs: HeadInputs, split_origin: str, seed: int) -> Prepared:
    """Class codes and protocol, as heads have them, but for the part that chooses.

    Args:
        inputs: labelled samples.
        split_origin: how their splits came about.
        seed: of what is held out.

    Raises:
        DataError: no train split, or too few classes.
    """
    protocol = plan_protocol(inputs.ids, inputs.labels, inputs.splits, seed=seed)
    learned = set(inputs.labels[protocol.refit])
    known = tuple(sorted(learned))
    unseen = tuple(sorted(set(inputs.labels[protocol.test]) - learned))
    index = {name: code for code, name in enumerate((*known, *unseen))}
    codes = np.array([index[name] for name in inputs.labels], dtype=np.int64)
    if protocol.kind == "folds":
        protocol = _one_holdout(protocol, inputs.ids, inputs.labels, seed)
    return Prepared(inputs, protocol, codes, known, unseen, split_origin, seed)


def _one_holdout(
    protocol: Protocol, ids: NDArray[Any], labels: NDArray[Any], seed: int
) -> Protocol:
    """A fifth of train instead of folds: a training is too dear to be done five times."""
    train = protocol.train
    fraction = _HOLDOUT_OF_MANY if len(train) > _MANY else _HOLDOUT
    held_out = stratified_split(
        [str(name) for name in ids[train]], labels[train].tolist(), fraction, seed
    )
    fold = Fold(train[~held_out], train[held_out])
    n_held_out = len(fold.choose)
    if not n_held_out or len(set(labels[fold.fit])) < 2:
        nothing = "nothing (no class has a sample to spare)"
        return replace(protocol, folds=(), kind="none", chosen_by=nothing)
    words = f"{fraction:.0%} of train (stratified, seed {seed}, {n_held_out:,} samples)"
    return replace(protocol, folds=(fold,), kind="holdout", chosen_by=words)


def source_notes(
    source: DataSource,
    column: str,
    n_labelled: int,
    n_chosen: int,
    n_failed: int,
    has_splits: bool,
) -> list[str]:
    """What was left out of a data source, and why.

    Args:
        source: the images.
        column: of the labels.
        n_labelled: samples with a label.
        n_chosen: of them, those in a split, where there are splits.
        n_failed: of them, those that cannot be read.
        has_splits: whether any sample is in a split.
    """
    notes = list(source.notes)
    n_all = len(source.samples)
    if n_labelled < n_all:
        notes.append(
            f"{n_all - n_labelled:,} of {counted(n_all, 'sample')} without a label in column "
            f"{column!r}: left out."
        )
    if n_chosen < n_labelled:
        notes.append(f"{counted(n_labelled - n_chosen, 'sample')} in no split: left out.")
    if n_failed:
        notes.append(f"{counted(n_failed, 'image')} cannot be read: left out.")
    if not has_splits:
        notes.append("The data has no splits: every sample is taken as train.")
    return notes


def training_notes(data: TrainingData) -> list[str]:
    """What a user should know of the data before believing a score."""
    samples = data.samples
    notes = samples.notes()
    fit, choose = samples.inputs.labels[data.fold.fit], samples.inputs.labels[data.fold.choose]
    unlearned = set(choose) - set(fit)
    if unlearned:
        n_wrong = int(np.isin(choose, sorted(unlearned)).sum())
        notes.append(
            f"{counted(n_wrong, 'sample')} that choose are of classes that nothing is trained on: "
            "they count as errors."
        )
    if samples.protocol.kind == "none":
        notes.append(
            "No sample could be held out: the state after the last epoch was kept, and a learning "
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
