"""What every table of faults is put to: the real command line on a small folder of photographs."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from pipeline.commands import main
from pipeline.store import Store, open_store

SMALL = ("--backbone", "pixels:8", "--batch-size", 4, "--json")


@dataclass(frozen=True)
class Ran:
    """What a command line gave back."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one document of ``--json``."""
        return json.loads(self.out)

    @property
    def store(self) -> Store:
        return open_store(self.document["store"])

    @property
    def features(self) -> dict[str, np.ndarray]:
        """Features by id, in the order of the store."""
        return dict(zip(self.store.ids(), np.asarray(self.store.features()), strict=True))


def write_photo(path: Path | str, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    """A smooth random image, another one for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_photos(suffix: str = ".png") -> Path:
    """Six photographs of two classes in the folder "photos"."""
    for i in range(6):
        write_photo(f"photos/{('iris', 'rose')[i % 2]}/{i}{suffix}", seed=i)
    return Path("photos")


def snapshot(*places: Path | str) -> dict[Path, tuple[int, int, bytes]]:
    """Time, mode and bytes of everything there, links unfollowed: what must never change."""
    roots = [Path(place) for place in places]
    found = [path for root in roots for path in (root, *root.rglob("*"))]
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_mode, _bytes(path)) for path in found}


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() and not path.is_symlink() else b""


def assert_same_features(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same samples in the same order with the same bytes."""
    assert list(found) == list(expected)
    for sample_id, row in expected.items():
        assert found[sample_id].tobytes() == row.tobytes(), sample_id


def tlpipe(*words: object) -> Ran:
    """Run a command line in this process."""
    out, err = StringIO(), StringIO()
    with (
        patch.object(sys, "argv", ["tlpipe", *map(str, words)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    return Ran(end.value.code, out.getvalue(), err.getvalue())


def extract(data: object = "photos", *words: object) -> Ran:
    """Extract in small batches, and see that what was extracted from is left as it was."""
    inputs = {place for place in (str(data), "photos") if Path(place).exists()}
    before = snapshot(*inputs)
    small = SMALL[2:] if "--backbone" in words else SMALL
    ran = tlpipe("extract", data, *small, *words)
    assert snapshot(*inputs) == before
    return ran


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Root may read and write everything, so step down for a moment."""
    if os.geteuid() != 0:
        yield
        return
    nobody = 65534
    os.setresuid(nobody, nobody, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photos(here):
    """The working directory's folder of six photographs of two classes."""
    return write_photos()


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """Features of ``photos`` by id, with nothing else beside them."""
    with chdir(tmp_path_factory.mktemp("good")):
        write_photos()
        return extract().features


@pytest.fixture
def shared_photos(good, monkeypatch):
    """As ``photos``, where every user may go.

    ``good`` has imported what a command imports: another user may not read where Python itself is.
    """
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        Path(folder).chmod(0o777)
        yield write_photos()
        monkeypatch.undo()
