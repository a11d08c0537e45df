"""Which samples fit and which choose: the rules that keep the test split out of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.data.names import counted, quoted
from pipeline.data.splits import stratified_split
from pipeline.errors import DataError, TooFewSamplesError
from pipeline.heads.folds import Fold

Array = NDArray[Any]
Indices = NDArray[np.intp]

N_FOLDS = 5
FOLDS_BELOW = 2_000
LARGE_ABOVE = 50_000


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


def plan_protocol(
    ids: Array, labels: Array, splits: Array, *, seed: int, groups: Array | None = None
) -> Protocol:
    """Decide how settings are chosen.

    The given val split where there is one; else five stratified folds below 2,000 training
    samples; else a stratified fifth of train (a tenth above 50,000). The choice does not depend
    on the order of the samples. With groups, all samples of one are on the same side.

    Args:
        ids: (n_samples,).
        labels: (n_samples,), class names.
        splits: (n_samples,), "train", "val" or "test".
        seed: of the part of train that is held out.
        groups: (n_samples,), such as patients or scenes; None where samples are independent.

    Raises:
        DataError: there is no train split, or a group is in two splits.
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
    if groups is not None:
        _check_groups(groups, splits)
    refit = np.concatenate([train, val])
    of_groups = "" if groups is None else f" of {counted(len(set(groups[train])), 'group')}"
    if len(val):
        folds, kind = [Fold(train, val)], "val"
        chosen_by = f"val (given, {len(val):,} samples)"
    elif len(train) < FOLDS_BELOW:
        folds, kind = (
            (
                stratified_folds(train, ids, labels, seed=seed)
                if groups is None
                else group_folds(train, ids, labels, groups, N_FOLDS, seed=seed)
            ),
            "folds",
        )
        chosen_by = f"{len(folds)} stratified folds of train ({len(train):,} samples{of_groups})"
    else:
        fraction = 0.1 if len(train) > LARGE_ABOVE else 0.2
        if groups is None:
            held_out = stratified_split(
                [str(name) for name in ids[train]], labels[train].tolist(), fraction, seed
            )
            folds = [Fold(train[~held_out], train[held_out])]
        else:
            folds = group_folds(train, ids, labels, groups, round(1 / fraction), seed=seed)[:1]
        kind = "holdout"
        n_held_out = sum(len(fold.choose) for fold in folds)
        chosen_by = (
            f"{fraction:.0%} of train (stratified, seed {seed}, {n_held_out:,} samples{of_groups})"
        )
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


def group_folds(
    rows: Indices, ids: Array, labels: Array, groups: Array, n_folds: int, *, seed: int
) -> list[Fold]:
    """Part rows into at most ``n_folds`` with about equal shares of every class, groups whole.

    Args:
        rows: to be parted.
        ids: (n_samples,).
        labels: (n_samples,).
        groups: (n_samples,).
        n_folds: at most; as many as there are groups where there are fewer.
        seed: of the assignment.

    Returns:
        None at all where there is one group, or one sample of every class.
    """
    n_folds = min(n_folds, len(set(groups[rows])))
    if n_folds < 2:
        return []
    ordered = np.array(sorted(rows, key=lambda row: str(ids[row])), dtype=np.intp)
    codes = np.unique(labels[ordered], return_inverse=True)[1]
    n_folds = min(n_folds, int(np.bincount(codes).max()))
    if n_folds < 2:
        return []
    parts = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    return [
        Fold(np.sort(ordered[fit]), np.sort(ordered[choose]))
        for fit, choose in parts.split(ordered, codes, np.array([str(g) for g in groups[ordered]]))
    ]


def split_by_group(
    ids: Array, labels: Array, splits: Array, groups: Array, *, seed: int
) -> NDArray[np.str_]:
    """Splits of the same samples whose test part holds a fifth of the groups, whole.

    Takes the place of a test split that was made sample by sample; val, if any, becomes train.
    """
    rows = np.flatnonzero(splits != "")
    folds = group_folds(rows, ids, labels, groups, N_FOLDS, seed=seed)
    if not folds:
        raise TooFewSamplesError(
            "All samples are of one group, so none can be held out.\n"
            "  Name another column with --group-column, or leave it out."
        )
    made = np.array(splits, dtype="U5")
    made[folds[0].fit], made[folds[0].choose] = "train", "test"
    return made


def _check_groups(groups: Array, splits: Array) -> None:
    """Refuse given splits that tear groups apart."""
    seen: dict[str, set[str]] = {}
    for group, split in zip(groups.tolist(), splits.tolist(), strict=True):
        if split:
            seen.setdefault(str(group), set()).add(split)
    torn = sorted(group for group, names in seen.items() if len(names) > 1)
    if torn:
        raise DataError(
            f"{counted(len(torn), 'group')} of {len(seen):,} have samples in more than one split "
            f"({quoted(name.removeprefix('= ') for name in torn)}): what was learned on one would "
            "be scored on the same.\n"
            "  Mend the splits:  tlpipe relabel\n  Or leave --group-column out."
        )


def _hash(seed: int, name: str) -> bytes:
    text = f"{seed}:{name}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).digest()
