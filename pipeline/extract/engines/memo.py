"""What was found out about a network on this machine, so that it need not be found out again.

A memo is a convenience: a missing, damaged or unwritable one costs a probe and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "timm", "numpy", "openvino", "onnxruntime", "tlpipe")
_CODE = ("half.py", "fold.py", "engines/*.py")


def user_cache() -> Path:
    """The folder that this tool may keep things in between runs of a user: made when needed."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given:
        base = Path(given)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ".cache"
    return base / "tlpipe"


def work_key(facts: Mapping[str, Any], device: torch.device) -> str:
    """sha256 of all that decides how fast and how exact engines compute a network here.

    Args:
        facts: of the network and its batches, JSON-able.
        device: where it runs.
    """
    told = {
        "facts": facts,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: installed_version(name) for name in _PACKAGES},
        "code": _code_digest(),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def installed_version(package: str) -> str:
    """Version of an installed package; "" where it is not installed. Does not import it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


class Memo:
    """What is known of one network; every change is written at once.

    Args:
        key: of the network; see `work_key`. "" for a memo that is forgotten.

    Attributes:
        facts: JSON-able.
    """

    def __init__(self, key: str) -> None:
        self._path = user_cache() / "engines" / f"{key}.json" if key else None
        self.facts: dict[str, Any] = _read(self._path)

    def note(self, **facts: Any) -> None:
        """Add to what is known."""
        self.facts |= facts
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Written aside: another process never reads half a memo.
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                json.dump(self.facts, file)
            Path(file.name).replace(self._path)
        except OSError:
            return  # a full disk or a read-only home: it is measured again next time


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


@cache
def _cpu_name() -> str:
    """Model of the CPU; what is missing in it is made up for by the architecture's name."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {models[0] if models else name}"


@cache
def _code_digest() -> str:
    """sha256 of the code that half precision and the engines are made by."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for pattern in _CODE:
        for path in sorted(folder.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()
