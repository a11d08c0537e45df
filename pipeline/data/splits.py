"""Held-out splits and limits: chosen by a hash of each id, whatever the order of the samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.data.names import counted, quoted
from pipeline.data.samples import SPLITS, DataSource, Sample, main_labels
from pipeline.errors import UsageError

_Hashes = tuple[NDArray[np.uint64], NDArray[np.uint64]]


def stratified_split(
    ids: Sequence[str], labels: Sequence[str | None], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Which samples to hold out: the same share of every class.

    Within a class, samples are ordered by ``sha256(f"{seed}:{id}")`` and the first
    ``round(n * fraction)`` are held out: at least one where there are two, never all. So the
    choice depends on neither the order of the samples nor on other classes, and adding samples
    moves few of the others.

    Args:
        ids: (n_samples,), unique.
        labels: (n_samples,); samples whose label is None are never held out.
        fraction: share to hold out, 0 <= fraction < 1; 0 holds out nothing.
        seed: another seed holds out other samples.

    Returns:
        (n_samples,), bool; True where a sample is held out.

    Raises:
        UsageError: ``fraction`` is outside of its range.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"The share to hold out is {fraction}; expected 0 <= share < 1.")
    if not ids or fraction == 0:
        return np.zeros(len(ids), dtype=bool)
    ranks, codes, sizes = _class_ranks(_hash_ids(ids, seed), labels)
    n_held_out = np.rint(sizes * fraction)
    n_held_out = np.minimum(np.maximum(n_held_out, 1), sizes - 1)
    is_labelled = np.fromiter((label is not None for label in labels), bool, len(ids))
    held_out: NDArray[np.bool_] = (ranks < n_held_out[codes]) & is_labelled
    return held_out


def stratified_limit(
    ids: Sequence[str], labels: Sequence[str | None], limit: int, seed: int
) -> NDArray[np.bool_]:
    """Which samples to keep where only ``limit`` may stay: classes keep their proportions.

    Every sample has a place in one order, its rank in its class over the size of the class, and
    the first ``limit`` stay. So a smaller limit always keeps a subset of what a larger one keeps.

    Args:
        ids: (n_samples,), unique.
        labels: (n_samples,); None counts as a class of its own.
        limit: how many to keep, at least one.
        seed: another seed keeps other samples.

    Returns:
        (n_samples,), bool; True where a sample stays.
    """
    if len(ids) <= limit:
        return np.ones(len(ids), dtype=bool)
    hashes = _hash_ids(ids, seed)
    ranks, codes, sizes = _class_ranks(hashes, labels)
    order = np.lexsort((*hashes, (ranks + 0.5) / sizes[codes]))
    stays = np.zeros(len(ids), dtype=bool)
    stays[order[:limit]] = True
    return stays


def _hash_ids(ids: Sequence[str], seed: int) -> _Hashes:
    """The first 128 bits of every id's hash, as two columns of 64, the lower one first."""
    prefix = f"{seed}:"
    digests = b"".join(
        hashlib.sha256((prefix + id).encode("utf-8", "surrogatepass")).digest()[:16] for id in ids
    )
    hashes = np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)
    return hashes[:, 1], hashes[:, 0]


def _class_ranks(
    hashes: _Hashes, labels: Sequence[str | None]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Each sample's rank by hash within its class, its class's number, and the class sizes."""
    numbers: dict[str | None, int] = {}
    codes = np.fromiter(
        (numbers.setdefault(label, len(numbers)) for label in labels), np.int64, len(labels)
    )
    order = np.lexsort((*hashes, codes))
    sizes = np.bincount(codes).astype(np.int64)
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - starts[codes[order]]
    return ranks, codes, sizes


def with_splits(source: DataSource, test_fraction: float, seed: int) -> DataSource:
    """The source with a test split where it is labelled and has none, and notes on its classes.

    Splits that were given are kept as they are. Only a labelled source with no split at all, or
    with nothing but train, gets a test split. Validation is made later, by whoever fits.
    """
    labels = main_labels(source.samples, source.label_columns)
    given = {sample.split for sample in source.samples} - {""}
    is_labelled = any(label is not None for label in labels)
    if is_labelled and given <= {"train"} and test_fraction > 0:
        source = _with_test(source, labels, test_fraction, seed)
    elif is_labelled and not given:
        samples = [Sample(s.id, s.file, s.labels, "train") for s in source.samples]
        source = replace(source, samples=samples, split_origin="made: everything is train")
    else:
        notes = _given_split_notes(source.samples, given, is_labelled=is_labelled)
        origin = "given" if given else "none"
        source = replace(source, split_origin=origin, notes=source.notes + notes)
    return replace(source, notes=source.notes + _class_notes(source, labels))


def _with_test(
    source: DataSource, labels: Sequence[str | None], test_fraction: float, seed: int
) -> DataSource:
    """Hold out a test split of what is train, or of everything where nothing has a split."""
    has_train = any(sample.split for sample in source.samples)
    pool = [i for i, s in enumerate(source.samples) if s.split == "train" or not has_train]
    held_out = stratified_split(
        [source.samples[i].id for i in pool], [labels[i] for i in pool], test_fraction, seed
    )
    splits = [sample.split for sample in source.samples]
    for i, is_test in zip(pool, held_out.tolist(), strict=True):
        splits[i] = "test" if is_test else "train"
    samples = [
        Sample(sample.id, sample.file, sample.labels, split)
        for sample, split in zip(source.samples, splits, strict=True)
    ]
    origin = (
        f"made: {100 * test_fraction:g}% of each class held out for test, by id, seed {seed}"
        + ("; only train was given" if has_train else "")
    )
    sizes = Counter(labels[i] for i in pool)
    notes = _single_sample_notes([c for c, n in sizes.items() if c is not None and n == 1])
    if has_train and len(pool) < len(samples):
        notes.append(
            f"{counted(len(samples) - len(pool), 'sample')} in no split: "
            "embedded, but neither fitted on nor scored."
        )
    return replace(source, samples=samples, split_origin=origin, notes=source.notes + notes)


def _single_sample_notes(classes: Sequence[str]) -> list[str]:
    if not classes:
        return []
    if len(classes) == 1:
        return [
            f"Class {quoted(classes)} has one sample: it stays in train, "
            "so the test split cannot score it. Add a second one to have it scored."
        ]
    return [
        f"{len(classes):,} classes have one sample each ({quoted(sorted(classes))}): they stay in "
        "train, so the test split cannot score them. Add a second sample to have them scored."
    ]


def _given_split_notes(
    samples: Sequence[Sample], given: set[str], *, is_labelled: bool
) -> list[str]:
    """What is unusual about the splits that came with the data."""
    notes = []
    n_without = sum(not sample.split for sample in samples)
    if given and n_without:
        notes.append(
            f"{counted(n_without, 'sample')} in no split: "
            "embedded, but neither fitted on nor scored."
        )
    if is_labelled and given and "train" not in given:
        notes.append(f"No train split was given, only {' and '.join(sorted(given))}: kept so.")
    elif is_labelled and given == {"train", "val"}:
        notes.append("No test split was given, only train and val: kept so, nothing is tested.")
    return notes


def _class_notes(source: DataSource, labels: Sequence[str | None]) -> list[str]:
    """Missing labels, one class only, near-equal names, classes that a split lacks."""
    counts = Counter(
        (label, sample.split) for label, sample in zip(labels, source.samples, strict=True)
    )
    classes = {label for label, _ in counts if label is not None}
    notes = []
    n_missing = sum(n for (label, _), n in counts.items() if label is None)
    if source.label_columns and n_missing:
        notes.append(
            f"{counted(n_missing, 'sample')} without a label: embedded, but not used to fit or "
            "score a head."
        )
    if len(classes) == 1:
        notes.append(f"Only one class, {quoted(map(str, classes))}: a head needs at least two.")
    notes += _near_equal_notes({str(label) for label in classes})
    if source.split_origin == "given":
        notes += _split_class_notes(
            {
                split: {str(c) for c, s in counts if s == split and c is not None}
                for split in SPLITS
                if any(s == split for _, s in counts)
            }
        )
    return notes


def _near_equal_notes(classes: set[str]) -> list[str]:
    by_fold: dict[str, list[str]] = {}
    for name in sorted(classes):
        by_fold.setdefault(name.casefold(), []).append(name)
    return [
        f"Classes {quoted(names)} differ only by case: they are kept apart."
        for names in by_fold.values()
        if len(names) > 1
    ]


def _split_class_notes(classes: dict[str, set[str]]) -> list[str]:
    """Classes that one split has and another lacks; labels are matched by name throughout."""
    if "train" not in classes:
        return []
    notes = []
    for split in ("val", "test"):
        if not classes.get(split):
            continue  # no such split, or one without labels
        unseen = sorted(classes[split] - classes["train"])
        absent = sorted(classes["train"] - classes[split])
        if unseen:
            notes.append(f"In {split} but not in train, so never predicted: {quoted(unseen)}.")
        if absent:
            notes.append(f"In train but not in {split}, so not scored there: {quoted(absent)}.")
    return notes


def limited(source: DataSource, limit: int, seed: int) -> DataSource:
    """The source with at most ``limit`` samples of each split, in the same order.

    Raises:
        UsageError: ``limit`` is not positive.
    """
    if limit < 1:
        raise UsageError(f"The limit is {limit}; expected at least one sample of each split.")
    labels = main_labels(source.samples, source.label_columns)
    stays = np.zeros(len(source.samples), dtype=bool)
    kept = []
    for split in (*SPLITS, ""):
        rows = [i for i, sample in enumerate(source.samples) if sample.split == split]
        chosen = stratified_limit(
            [source.samples[i].id for i in rows], [labels[i] for i in rows], limit, seed
        )
        stays[np.asarray(rows, dtype=np.int64)[chosen]] = True
        if rows:
            kept.append(f"{int(chosen.sum()):,} of {len(rows):,} {split}".rstrip())
    if stays.all():
        return source
    samples = [s for s, stay in zip(source.samples, stays.tolist(), strict=True) if stay]
    note = f"Limited to {limit:,} a split, chosen by id, seed {seed}: {', '.join(kept)}."
    return replace(source, samples=samples, notes=[*source.notes, note])
