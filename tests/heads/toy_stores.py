"""Real stores of made-up features, written in milliseconds."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.store import Store, open_store
from pipeline.store.manifest import LayerInfo
from pipeline.store.table import SPLIT_NAMES, LabelColumn, LogEntry, SampleTable, Status
from pipeline.store.writer import StoreWriter

ORIGIN = {"spec": "toy", "weights": "default", "image_size": None, "seed": 0}


def make_store(
    folder: Path,
    layers: dict[str, np.ndarray],
    labels: dict[str, Sequence[str | None]],
    splits: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    contents: Sequence[str] | None = None,
    backbone: str = "toy",
    dtype: str = "float16",
    n_views: int = 1,
) -> Store:
    """Write and open a store.

    Args:
        folder: made.
        layers: (n, ...) features by layer; with several views (n, n_views, ...).
        labels: labels by column.
        splits: of each sample.
        ids: of each sample; numbered by default.
        contents: equal where the images are; the ids by default.
        backbone: goes into the recipe, and so into the key.
        dtype: of the stored features.
        n_views: views a sample.
    """
    ids = list(ids) if ids is not None else [f"{i:05d}.png" for i in range(len(splits))]
    layers = {name: values if n_views > 1 else values[:, None] for name, values in layers.items()}
    infos = {name: LayerInfo(values.shape[2:], dtype) for name, values in layers.items()}
    nowhere = np.full(len(ids), -1, np.int64)
    table = SampleTable.pending(
        ids,
        nowhere,
        nowhere.copy(),
        np.array([SPLIT_NAMES.index(split) for split in splits], np.uint8),
        {name: LabelColumn.of(list(column)) for name, column in labels.items()},
    )
    recipe = {"schema": 1, "backbone": backbone}
    source = {"name": "toys", "spec": "toys/", "root": "toys", "split_origin": "given"}
    made_by = {"backbone": ORIGIN}
    with StoreWriter(folder, recipe, infos, source, provenance=made_by, n_views=n_views) as writer:
        writer.begin(table)
        for i, content in enumerate(contents if contents is not None else ids):
            digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()
            row = {name: values[i].astype(dtype) for name, values in layers.items()}
            writer.add(LogEntry(ids[i], Status.OK, digest, 1, 1), row)
        writer.finish()
    return open_store(folder)


def blobs(
    labels: Sequence[str], *, n_features: int = 8, noise: float = 0.5, seed: int = 0
) -> np.ndarray:
    """(n, n_features): one cloud of points a class, around a random centre of unit variance."""
    rng = np.random.default_rng(seed)
    centres = {name: rng.normal(size=n_features) for name in sorted(set(labels))}
    points = [centres[name] + noise * rng.normal(size=n_features) for name in labels]
    return np.array(points)


def cycle(names: Sequence[str], n: int) -> list[str]:
    """``n`` items, the names in turn."""
    return [names[i % len(names)] for i in range(n)]


def splits_of(n_train: int, n_val: int = 0, n_test: int = 0) -> list[str]:
    return ["train"] * n_train + ["val"] * n_val + ["test"] * n_test
