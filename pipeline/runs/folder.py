"""Making and reading run folders: a run is wholly there or not at all, and never overwritten."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptStoreError, ResourceError, StoreError, StoreFormatError

RUN_FILE = "run.json"
RUN_FORMAT = "tlpipe-run"
RUN_FORMAT_VERSION = 1
METRICS_FILE = "metrics.jsonl"

# The folder of a training that is not done yet lies among the runs, under a name of its own.
TRAINING_PREFIX = ".finetune-"
CHECKPOINT_FILE = "checkpoint.pt"

# What of a comparison is done, until all of it is.
COMPARISON_PREFIX = ".compare-"

_MAX_JSON_BYTES = 256_000_000
_TRIES = 100


def create_run(parent: Path, stem: str, write: Callable[[Path], None]) -> Path:
    """Make the run folder ``parent/stem-NNNN``, numbered after those that are there.

    Args:
        parent: made where it does not exist.
        stem: what the run is called; characters that a file name should not have are replaced.
        write: puts the run's files into the folder it is given, which is renamed when it is done.

    Returns:
        The run's path.

    Raises:
        ResourceError: the disk is full.
        StoreError: the folder cannot be written to.
    """
    aside = parent / f".{safe_name(stem)}-{secrets.token_hex(4)}.tmp"
    try:
        aside.mkdir(parents=True)
        write(aside)
        for file in aside.iterdir():
            _sync(file)
        return _publish(aside, parent, safe_name(stem))
    except OSError as error:
        raise _write_error(parent, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish(aside: Path, parent: Path, stem: str) -> Path:
    """Rename to the first free number; another process may take one in between."""
    pattern = re.compile(re.escape(stem) + r"-(\d{4,})")
    for _ in range(_TRIES):
        names = (pattern.fullmatch(path.name) for path in parent.iterdir())
        number = 1 + max((int(match[1]) for match in names if match), default=0)
        run = parent / f"{stem}-{number:04d}"
        try:
            aside.rename(run)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            continue
        if os.name != "nt":
            _sync(parent)
        return run
    raise FileExistsError(errno.EEXIST, "too many runs are being made at once", str(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(parent: Path, error: OSError) -> ResourceError | StoreError:
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return StoreError(
            f"The run cannot be written to {parent} ({reason}).\n  Give another folder with --out."
        )
    return ResourceError(
        f"Writing the run to {parent} failed ({reason}); nothing is left of it.\n"
        "  Free some space or give another folder with --out, then run the same command again."
    )


def safe_name(text: str) -> str:
    """``text`` as part of a file name: letters, digits and ``._+-`` only, at most 100 of them."""
    return re.sub(r"[^\w.+-]+|^\.+", "-", text, flags=re.ASCII).strip("-")[:100] or "run"


def write_json(path: Path, document: Any) -> None:
    """Write JSON that every reader takes: ASCII, no NaN."""
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="ascii")


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """Read a JSON object that may come from a stranger.

    Args:
        path: the file.
        expected: the value of its "format".

    Raises:
        StoreFormatError: there is no such file, or it is of another format or a newer version.
        CorruptStoreError: not JSON.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptStoreError(f"{path} has {path.stat().st_size:,} bytes: no file of ours.")
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreFormatError(
            f"{path.parent} is not a run: it has no {path.name}.\n  List the runs:  tlpipe ls"
        ) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path} is not valid JSON ({error}).") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != expected:
        raise StoreFormatError(f"{path} has format {found!r}, expected {expected!r}.")
    version = document.get("format_version")
    if version != RUN_FORMAT_VERSION:
        raise StoreFormatError(
            f"{path} has format version {version!r}; this release reads {RUN_FORMAT_VERSION}. "
            "Upgrade tlpipe to read a newer one."
        )
    return dict(document)


def read_run(path: Path) -> dict[str, Any]:
    """What ``run.json`` of the run at ``path`` holds.

    Raises:
        StoreError: there is no run, or not one of ours.
    """
    return read_json(Path(path) / RUN_FILE, RUN_FORMAT)
