"""What engines build, kept in the user's cache folder between runs.

An artefact is a folder of files. It is built aside and renamed, and every file is compared with the
digest that was recorded before anything is loaded from it; a damaged one is made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.extract.engines.engine import EngineError, Work
from pipeline.extract.engines.memo import user_cache

_DIGESTS = "digests.json"

# Each is as large as the network; those that were used last stay.
_ABANDONED_SECONDS = 24 * 3600
_MAX_KEPT = 12


def artefact_folder(engine: str, work: Work) -> Path:
    """Where the artefact of an engine for some work is kept, whether it is there or not."""
    told = [engine, work.key, work.precision, work.until, work.batch_size, torch.get_num_threads()]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    return user_cache() / "engines" / f"{engine}-{key}"


def is_kept(engine: str, work: Work) -> bool:
    """Whether there is an artefact; whether it is sound is seen when it is used."""
    return (artefact_folder(engine, work) / _DIGESTS).exists()


def keep(engine: str, work: Work, build: Callable[[Path], None]) -> Path:
    """The folder of an artefact, which is built if it is not there or not sound.

    Args:
        engine: name of the engine.
        work: what it computes.
        build: writes the files into an empty folder.

    Raises:
        EngineError: it cannot be written.
    """
    folder = artefact_folder(engine, work)
    try:
        if not _is_sound(folder):
            _build(folder, build)
            _prune(folder.parent)
        folder.touch()
    except OSError as error:
        raise EngineError(
            f"What the engine {engine} builds cannot be kept in {folder.parent}: "
            f"{error.strerror or error}.\n  Use --engine eager, or set XDG_CACHE_HOME."
        ) from error
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        build(aside)
        digests = {path.name: _digest(path) for path in sorted(aside.iterdir())}
        (aside / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            aside.rename(folder)
        except OSError:  # another process was faster
            if not _is_sound(folder):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_sound(folder: Path) -> bool:
    try:
        digests = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        return bool(digests) and all(_digest(folder / n) == d for n, d in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prune(folder: Path) -> None:
    """Remove the artefacts that were not used for longest."""
    kept = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(kept, key=lambda path: path.stat().st_mtime)[:-_MAX_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*"):  # of a process that was killed
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
