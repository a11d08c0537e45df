"""Canonical JSON and the sha256 digests that name recipes and guard files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

_BINARY = getattr(os, "O_BINARY", 0)


def canonical_json(value: Any) -> bytes:
    """One spelling for equal values: sorted keys, no spaces, UTF-8, no NaN or infinity."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """The sha256 of the recipe's canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(recipe)).hexdigest()


def recipe_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """A line for each field in which two recipes differ, as ``precision: fp32, now bf16``."""
    lines = []
    for name in sorted({*theirs, *ours}):
        old, new = theirs.get(name), ours.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"{name}.{line}" for line in recipe_differences(old, new)]
        elif old != new:
            lines.append(f"{name}: {_shown(old)}, now {_shown(new)}")
    return lines


def _shown(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:12]}…"


def file_sha256(path: Path) -> str:
    """The sha256 of a regular file's bytes, 64 hex digits, read in pieces."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; a pipe or a device, which could keep us waiting, is refused.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")
