"""Which samples fit and which choose: the rules that keep the test split out of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.splits import stratified_split
from pipeline.errors import DataError, TooFewSamplesError

Array = NDArray[Any]
Indices = NDArray[np.intp]

N_FOLDS = 5
FOLDS_BELOW = 2_000
LARGE_ABOVE = 50_000


@dataclass(frozen=True)
class Fold:
    """One way to part the samples.

    Attributes:
        fit: rows that heads are fitted on.
        choose: rows that they are compared on.
    """

    fit: Indices
    choose: Indices


@dataclass(frozen=True)
class Protocol:
    """Who fits, who chooses, who scores.

    Attributes:
        folds: parts for selection; empty where nothing can be held out.
        kind: "val", "holdout", "folds" or "none".
        chosen_by: the same in words, such as "val (given, 360 samples)".
        train: rows of the train split.
        refit: rows that the final head is fitted on: train, and val where it was given.
        test: rows of the test split.
    """

    folds: tuple[Fold, ...]
    kind: str
    chosen_by: str
    train: Indices
    refit: Indices
    test: Indices


def plan_protocol(ids: Array, labels: Array, splits: Array, *, seed: int) -> Protocol:
    """Decide how settings are chosen.

    The given val split where there is one; else five stratified folds below 2,000 training
    samples; else a stratified fifth of train (a tenth above 50,000). The choice does not depend
    on the order of the samples.

    Args:
        ids: (n_samples,).
        labels: (n_samples,), class names.
        splits: (n_samples,), "train", "val" or "test".
        seed: of the part of train that is held out.

    Raises:
        DataError: there is no train split.
        TooFewSamplesError: train has fewer than two classes.
    """
    train, val, test = (np.flatnonzero(splits == name) for name in ("train", "val", "test"))
    if not len(train):
        found = ", ".join(sorted(set(splits.tolist()))) or "none"
        raise DataError(
            f"No labelled sample belongs to the train split; splits found: {found}.\n"
            "  Name one of the folders or manifest splits train."
        )
    classes = set(labels[train])
    if len(classes) < 2:
        raise TooFewSamplesError(
            f"All {len(train):,} training samples are of one class, {classes.pop()!r}; "
            "a head needs at least two.\n"
            "  Sort the images into one folder a class, or choose another column with --label."
        )
    refit = np.concatenate([train, val])
    if len(val):
        folds, kind = [Fold(train, val)], "val"
        chosen_by = f"val (given, {len(val):,} samples)"
    elif len(train) < FOLDS_BELOW:
        folds, kind = stratified_folds(train, ids, labels, seed=seed), "folds"
        chosen_by = f"{len(folds)} stratified folds of train ({len(train):,} samples)"
    else:
        fraction = 0.1 if len(train) > LARGE_ABOVE else 0.2
        held_out = stratified_split(
            [str(name) for name in ids[train]], labels[train].tolist(), fraction, seed
        )
        folds, kind = [Fold(train[~held_out], train[held_out])], "holdout"
        chosen_by = f"{fraction:.0%} of train (stratified, seed {seed}, {held_out.sum():,} samples)"
    folds = [fold for fold in folds if len(fold.choose) and len(set(labels[fold.fit])) > 1]
    if not folds:
        kind, chosen_by = "none", "nothing (no class has a sample to spare)"
    return Protocol(tuple(folds), kind, chosen_by, train, refit, test)


def stratified_folds(train: Indices, ids: Array, labels: Array, *, seed: int) -> list[Fold]:
    """Part train into at most five folds with equal shares of every class.

    Samples are dealt out in turn, ordered by class and within it by a hash of their id.
    """
    sizes = np.unique(labels[train], return_counts=True)[1]
    n_folds = min(N_FOLDS, int(sizes.max()))
    if n_folds < 2:
        return []
    ordered = sorted(train, key=lambda row: (labels[row], _hash(seed, str(ids[row]))))
    number = np.arange(len(ordered)) % n_folds
    rows = np.array(ordered, dtype=np.intp)
    return [Fold(np.sort(rows[number != i]), np.sort(rows[number == i])) for i in range(n_folds)]


def _hash(seed: int, name: str) -> bytes:
    text = f"{seed}:{name}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).digest()
