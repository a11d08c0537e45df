"""The contract between stages: a folder of immutable HDF5 shards. FORMAT.md is its specification.

Reading needs only this package, numpy and h5py::

    store = open_store("cache/flowers/resnet50-1f3a9c02")
    X = store.features(split="train")          # lazy; X[:100] reads 100 rows, np.asarray(X) all
    y = store.labels(split="train")            # aligned with X
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.store.pack import pack_store
    from pipeline.store.reader import Batch, FeatureArray, Store, open_store
    from pipeline.store.table import SampleTable, Status
    from pipeline.store.unpack import unpack_store
    from pipeline.store.writer import StoreWriter

__all__ = [
    "Batch",
    "FeatureArray",
    "SampleTable",
    "Status",
    "Store",
    "StoreWriter",
    "open_store",
    "pack_store",
    "unpack_store",
]

_HOME = {
    "Batch": "reader",
    "FeatureArray": "reader",
    "SampleTable": "table",
    "Status": "table",
    "Store": "reader",
    "StoreWriter": "writer",
    "open_store": "reader",
    "pack_store": "pack",
    "unpack_store": "unpack",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"pipeline.store.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
