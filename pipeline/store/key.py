"""Canonical JSON and the sha256 digests that name recipes and guard files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> bytes:
    """One spelling for equal values: sorted keys, no spaces, UTF-8, no NaN or infinity."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """The sha256 of the recipe's canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(recipe)).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hex digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
