"""tlpipe: pay for the backbone once, then everything else is cheap.

    data/ ──> extract/ ──> store/ ──> heads/ ──> runs/
    samples   backbone     HDF5       estimators  metrics, predictions, the model
              (frozen)       │           ▲
                             └──> sweep/ ┘   selection over many settings

``data`` finds samples, ``backbones`` knows frozen networks, ``extract`` runs one over the other
into a feature ``store``; ``heads`` are estimators fitted on stored features, ``sweep`` chooses
between their settings, ``runs`` keeps the results, ``commands`` is the command line.

Imports follow the arrows, and importing this package imports none of them: each public name
below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.backbones import load_backbone
    from pipeline.data import open_source
    from pipeline.extract.extractor import extract
    from pipeline.runs.bundle import load_bundle
    from pipeline.store import Store, open_store

__version__ = "0.1.0"

__all__ = ["Store", "extract", "load_backbone", "load_bundle", "open_source", "open_store"]

_HOME = {
    "Store": "pipeline.store",
    "extract": "pipeline.extract.extractor",
    "load_backbone": "pipeline.backbones",
    "load_bundle": "pipeline.runs.bundle",
    "open_source": "pipeline.data",
    "open_store": "pipeline.store",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
