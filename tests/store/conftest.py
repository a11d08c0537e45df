import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.store.manifest import LayerInfo
from pipeline.store.table import SPLIT_NAMES, LabelColumn, LogEntry, SampleTable, Status
from pipeline.store.writer import StoreWriter

RECIPE = {"schema": 1, "backbone": "toy", "precision": "fp32"}
LAYERS = {"low": LayerInfo((3,), "float32"), "top": LayerInfo((5,), "float16")}


def digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def features_of(text: str) -> dict[str, np.ndarray]:
    """Features that follow from the sample's content, so that any mix-up is seen."""
    rng = np.random.default_rng(int.from_bytes(digest_of(text)[:4], "big"))
    return {
        name: rng.normal(size=(1, *layer.shape)).astype(layer.dtype)
        for name, layer in LAYERS.items()
    }


def entry_of(sample_id: str, content: str | None = None) -> LogEntry:
    return LogEntry(sample_id, Status.OK, digest_of(content or sample_id), 100, 200)


def table_of(ids: list[str]) -> SampleTable:
    n = len(ids)
    nowhere = np.full(n, -1, np.int64)
    splits = np.array([SPLIT_NAMES.index("test" if i % 4 == 3 else "train") for i in range(n)])
    labels = {"label": LabelColumn.of([sample_id.split("/")[0] for sample_id in ids])}
    return SampleTable.pending(ids, nowhere, nowhere.copy(), splits.astype(np.uint8), labels)


def make_writer(folder: Path, **options) -> StoreWriter:
    return StoreWriter(folder, RECIPE, LAYERS, {"name": "toy", "root": "/nowhere"}, **options)


@pytest.fixture
def ids() -> list[str]:
    return [f"{'cat' if i % 2 else 'dög'}/{i:03d}.png" for i in range(20)]


@pytest.fixture
def store_folder(tmp_path: Path, ids: list[str]) -> Path:
    """A finished store of 20 samples in shards of 6 rows."""
    folder = tmp_path / "cache" / "toy" / "toy-1"
    with make_writer(folder, shard_rows=6) as writer:
        writer.begin(table_of(ids))
        for sample_id in ids:
            writer.add(entry_of(sample_id), features_of(sample_id))
        writer.finish()
    return folder
