"""What a command asked for before, and the recipe that came of it: known again without the network.

A backbone takes seconds to import and load, and its recipe follows from it. A store therefore keeps
a digest of the request that made it and what the weights file looked like. The same request, on the
same machine with the same versions and the same file, has the same recipe.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ResourceError, StoreError
from pipeline.store.key import canonical_json
from pipeline.store.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from pipeline.data.samples import DataSource
    from pipeline.extract.settings import Settings

REQUEST = "request"
WATCHED = "weights_files"

_LIBRARIES = ("torch", "torchvision", "timm", "torchcodec", "pillow", "numpy")
_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")
_CODE = ("backbones", "data", "extract")


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`~pipeline.backbones.load_backbone`, as a user gave them."""

    spec: str
    weights: str
    image_size: int | None
    seed: int

    def digest(self, settings: Settings) -> str:
        """sha256 of everything that a recipe follows from, but for the weights file itself."""
        package = Path(__file__).parents[1]
        file = Path(self.weights)
        told: dict[str, Any] = {
            "backbone": asdict(self),
            "weights": str(file.resolve()) if file.is_file() else "",
            "settings": [
                settings.layers, settings.pooling, settings.precision, settings.storage,
                settings.n_views, settings.decode, settings.device,
            ],
            "machine": [platform.node(), platform.python_version(), _has_gpu()],
            "versions": [metadata.version(name) for name in _LIBRARIES],
            "environment": [os.environ.get(name) for name in _ENVIRONMENT],
            "code": watched_files(
                path for folder in _CODE for path in sorted((package / folder).rglob("*.py"))
            ),
        }  # fmt: skip
        return hashlib.sha256(canonical_json(told)).hexdigest()


def recall(cache_dir: Path, source: DataSource, request: str) -> Manifest | None:
    """The manifest of a store that the same request made of data of the same name.

    Args:
        cache_dir: where stores are kept.
        source: the data source; only stores under its name are looked at.
        request: digest of the request.
    """
    for folder in sorted(cache_dir.glob(f"{source.name}*/*/")):
        try:
            manifest = read_manifest(folder)
        except (ResourceError, StoreError):  # told where it matters: when it is opened
            continue
        told = manifest.provenance
        if told.get(REQUEST) == request and _is_unchanged(told.get(WATCHED)):
            return manifest
    return None


def watched_files(paths: Iterable[Path]) -> list[list[Any]]:
    """Path, size in bytes and modification time in ns of each file, as they are now."""
    facts = []
    for path in paths:
        stat = path.stat()
        facts.append([str(path), stat.st_size, stat.st_mtime_ns])
    return facts


def weights_files(file: Path | None) -> list[Path]:
    """The weights file, and what decides in a Hugging Face cache which file that is."""
    if file is None:
        return []
    return (
        [file, *sorted((file.parents[2] / "refs").glob("*"))] if len(file.parents) > 2 else [file]
    )


def _is_unchanged(watched: Any) -> bool:
    try:
        return bool(watched_files(Path(path) for path, _, _ in watched) == watched)
    except (OSError, TypeError, ValueError):
        return False


def _has_gpu() -> bool:
    return any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/dxg", "/dev/kfd"))
