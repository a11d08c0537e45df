"""From stores to what every fit starts from: features, class codes, and who may see what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import pipeline
from pipeline.data.names import counted, quoted
from pipeline.heads.features import HeadInputs, load_inputs
from pipeline.heads.tasks import encode_labels
from pipeline.store import open_store
from pipeline.sweep.protocol import Protocol, plan_protocol, split_by_group

if TYPE_CHECKING:
    from pipeline.store import Store

Array = NDArray[Any]


@dataclass(frozen=True)
class Prepared:
    """Labelled features with their protocol.

    Attributes:
        inputs: features of every layer that may be used.
        protocol: who fits, who chooses, who scores.
        codes: (n_samples,), index of each label in ``known`` + ``unseen``.
        known: classes that are learned, sorted.
        unseen: classes that only test has, sorted.
        split_origin: how the splits came about.
        seed: of held-out parts and of everything random.
    """

    inputs: HeadInputs
    protocol: Protocol
    codes: NDArray[np.int64]
    known: tuple[str, ...]
    unseen: tuple[str, ...]
    split_origin: str
    seed: int

    def again(self, seed: int) -> Prepared:
        """The same samples, with other held-out parts."""
        protocol = plan_protocol(
            self.inputs.ids, self.inputs.labels, self.inputs.splits,
            seed=seed, groups=self.inputs.groups,
        )  # fmt: skip
        return replace(self, protocol=protocol, seed=seed)

    def n_samples(self) -> dict[str, int]:
        """Samples by split."""
        return {name: int((self.inputs.splits == name).sum()) for name in ("train", "val", "test")}

    def key(self) -> str:
        """sha256 of all that decides a trial's scores but the candidate and the seed."""
        inputs = self.inputs
        total = hashlib.sha256(inputs.digest().encode())
        versions = [metadata.version(name) for name in ("numpy", "scipy", "scikit-learn", "torch")]
        total.update(json.dumps([pipeline.__version__, *versions]).encode())
        for folder in ("heads", "sweep"):
            for file in sorted((Path(__file__).parents[1] / folder).rglob("*.py")):
                total.update(file.read_bytes())
        total.update(json.dumps([block.key for block in inputs.blocks]).encode())
        for column in (inputs.splits, inputs.groups):
            total.update(json.dumps([] if column is None else column.tolist()).encode())
        return total.hexdigest()

    def notes(self) -> list[str]:
        """What a user should know of the data before believing a score."""
        inputs, protocol = self.inputs, self.protocol
        notes = list(inputs.notes)
        if self.unseen:
            n_samples = int(np.isin(inputs.labels[protocol.test], self.unseen).sum())
            notes.append(
                f"{counted(n_samples, 'test sample')} of "
                f"{counted(len(self.unseen), 'class', 'classes')} "
                f"that train does not have ({quoted(self.unseen)}): counted as errors."
            )
        absent = sorted(set(inputs.labels[protocol.refit]) - set(inputs.labels[protocol.train]))
        if absent:
            notes.append(
                f"Only val has samples of {counted(len(absent), 'class', 'classes')} "
                f"({quoted(absent)})."
            )
        return notes + self.leak_notes()

    def leak_notes(self) -> list[str]:
        """Which images are in two splits, byte for byte."""
        inputs, protocol = self.inputs, self.protocol
        notes: list[str] = []
        # 64 of the 256 bits: compact, and never equal by chance.
        images = inputs.digests.view(np.uint64)[:, 0]
        for split, rows, others in (
            ("test", protocol.test, protocol.refit),
            ("val", np.setdiff1d(protocol.refit, protocol.train), protocol.train),
        ):
            n_shared = int(np.isin(images[rows], images[others]).sum())
            if n_shared:
                notes.append(
                    f"Warning: {n_shared:,} of {counted(len(rows), f'{split} image')} also in "
                    "train, byte for byte: the scores flatter."
                )
        return notes


def prepare(
    stores: Store | str | Path | Sequence[Store | str | Path],
    *,
    layers: Sequence[str] | None = None,
    label: str | None = None,
    groups: str | None = None,
    seed: int = 0,
) -> Prepared:
    """Plan the protocol and read the features.

    Args:
        stores, layers, label, groups, seed: see :func:`plan`.

    Raises:
        UsageError, DataError, StoreError: see :func:`plan`.
        ResourceError: the features do not fit into memory.
    """
    data = plan(stores, layers=layers, label=label, groups=groups, seed=seed)
    _ = data.inputs.X
    return data


def plan(
    stores: Store | str | Path | Sequence[Store | str | Path],
    *,
    layers: Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    groups: str | None = None,
    seed: int = 0,
) -> Prepared:
    """Find labelled features and plan the protocol; no feature is read yet.

    Args:
        stores: feature stores or their paths; several are joined by sample, features side by side.
        layers: layers to read; ("all",) for every one; None for "penultimate", or every one.
        label: label column; None for "label" or the only one. Of several, ``inputs.columns`` has
            the labels, and the codes are of what the samples are stratified by.
        groups: column of samples that belong together and are never parted. A test split that
            extraction made sample by sample is then made anew, by group.
        seed: of held-out parts.

    Raises:
        UsageError: unknown layer or column.
        DataError: no labels, no train split, too few classes, or given splits that part a group.
        StoreError: a store is damaged, or the stores share no sample.
    """
    several = stores if isinstance(stores, Sequence) and not isinstance(stores, str) else [stores]
    opened = [open_store(store) if isinstance(store, str | Path) else store for store in several]
    inputs = load_inputs(opened, layers=layers, label=label, groups=groups)
    split_origin = opened[0].split_origin
    if inputs.groups is not None and split_origin.startswith("made: "):
        splits = split_by_group(inputs.ids, inputs.labels, inputs.splits, inputs.groups, seed=seed)
        split_origin = f"made: a fifth of the groups of {groups} held out for test, seed {seed}"
        inputs = replace(inputs, splits=splits)
    protocol = plan_protocol(
        inputs.ids, inputs.labels, inputs.splits, seed=seed, groups=inputs.groups
    )
    codes, known, unseen = encode_labels(inputs.labels, protocol.refit, protocol.test)
    return Prepared(inputs, protocol, codes, known, unseen, split_origin, seed)
