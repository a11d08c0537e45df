from pathlib import Path

import pytest

from pipeline.store import Store
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """60 training samples and 30 to test, of three classes; two layers."""
    labels = cycle(["cat", "dög", "=cmd()"], 90)
    layers = {"low": blobs(labels, n_features=3), "penultimate": blobs(labels, n_features=5)}
    return make_store(tmp_path / "store", layers, {"label": labels}, splits_of(60, 0, 30))
