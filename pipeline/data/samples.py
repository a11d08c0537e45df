"""What goes in: samples, and the data source that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val", "test")

SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What people call the splits, in lower case -> what we call them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data source; nothing of it has been read yet.

    Attributes:
        id: path relative to the data root, POSIX separators, Unicode NFC; unique in its source.
        file: where the bytes are, as the operating system spells it.
        labels: one label a column of the source's ``label_columns``; None where it is missing.
        split: "train", "val", "test", or "" where the sample belongs to no split.
    """

    id: str
    file: str
    labels: tuple[str | None, ...] = ()
    split: str = ""


@dataclass(frozen=True)
class DataSource:
    """A list of samples with one name.

    Attributes:
        name: names the folder in the cache; letters, digits, ``._-`` only.
        spec: what the user typed, such as "data/flowers" or "digits".
        root: the folder that sample ids are relative to.
        layout: "classes", "splits", "flat", "manifest" or the name of a built-in.
        samples: ordered by id, or as the manifest orders them.
        label_columns: names of the label columns; () for an unlabelled source.
        split_origin: how the splits came about, for people: "given", "none", or how they were made.
        notes: things worth telling the user about what was found or left out.
    """

    name: str
    spec: str
    root: Path
    layout: str
    samples: list[Sample]
    label_columns: tuple[str, ...] = ()
    split_origin: str = "none"
    notes: list[str] = field(default_factory=list)


def main_labels(samples: Sequence[Sample], label_columns: Sequence[str]) -> list[str | None]:
    """Labels in the column that splits are stratified by: "label", or else the first one."""
    if not label_columns:
        return [None] * len(samples)
    column = label_columns.index("label") if "label" in label_columns else 0
    return [sample.labels[column] for sample in samples]
