"""tlpipe: pay for the backbone once, then everything else is cheap.

    data/ ──> extract/ ──> store/ ──> heads/ ──> runs/ ──> report/
    samples   backbone     HDF5       estimators  metrics,  pages
      │       (frozen)       │           ▲        the model
      │                      └──> sweep/ ┘   selection over many settings
      └──────────> finetune/ ──────────────> runs/          the backbone itself is trained

``data`` finds samples, ``backbones`` knows frozen networks, ``extract`` runs one over the other
into a feature ``store``; ``heads`` are estimators fitted on stored features, ``sweep`` chooses
between their settings, ``finetune`` trains what was frozen, ``runs`` keeps and compares the
results, ``report`` shows them, ``commands`` is the command line.

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
    from pipeline.sweep.fit import fit_head

__version__ = "0.1.0"

__all__ = [
    "Store",
    "extract",
    "fit_head",
    "load_backbone",
    "load_bundle",
    "open_source",
    "open_store",
]

_HOME = {
    "Store": "pipeline.store",
    "extract": "pipeline.extract.extractor",
    "fit_head": "pipeline.sweep.fit",
    "load_backbone": "pipeline.backbones",
    "load_bundle": "pipeline.runs.bundle",
    "open_source": "pipeline.data",
    "open_store": "pipeline.store",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
