"""``store.json``: the one file that says which files are the store. Replacing it is the commit."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptStoreError, StoreError, StoreFormatError
from pipeline.store.durable import write_durably
from pipeline.store.hdf5 import FORMAT_VERSION
from pipeline.store.key import canonical_json, recipe_key

MANIFEST_FILE = "store.json"
STORE_FORMAT = "tlpipe-feature-store"

_SHARD_FILE = re.compile(r"\d{6,}\.h5")
_SAMPLES_FILE = re.compile(r"samples-\d{6,}\.h5")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FEATURE_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class LayerInfo:
    """Shape of one sample's features in one view, and the dtype they are stored with."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class FileInfo:
    """A file of the store, as recorded when it was committed.

    Attributes:
        file: name, without folder.
        sha256: of its bytes.
        size_bytes: its size.
        n: how many rows (shard) or samples (samples table) it holds.
    """

    file: str
    sha256: str
    size_bytes: int
    n: int

    @property
    def number(self) -> int:
        """The number in the file's name."""
        return int(self.file.removesuffix(".h5").removeprefix("samples-"))


@dataclass(frozen=True)
class Manifest:
    """What ``store.json`` holds.

    Attributes:
        key: sha256 of the recipe.
        recipe: everything that decides a feature's value.
        layers: by layer name, in the order in which they were extracted.
        n_views: views a sample.
        source: name, spec, root, layout and split_origin of the data source.
        samples: the samples table.
        folded: highest shard number whose log is already in the samples table.
        shards: in the order in which they were written.
        provenance: versions, device, engine and the like; never part of the key.
    """

    key: str
    recipe: dict[str, Any]
    layers: dict[str, LayerInfo]
    n_views: int
    source: dict[str, Any]
    samples: FileInfo | None = None
    folded: int = 0
    shards: tuple[FileInfo, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of the shards and the samples table."""
        files = self.shards if self.samples is None else (*self.shards, self.samples)
        return sum(file.size_bytes for file in files)

    def with_shard(self, shard: FileInfo) -> Manifest:
        """The same store with one more shard."""
        return replace(self, shards=(*self.shards, shard))

    def to_json(self) -> dict[str, Any]:
        """The JSON document, with its own checksum."""
        document: dict[str, Any] = {
            "format": STORE_FORMAT,
            "format_version": FORMAT_VERSION,
            "key": self.key,
            "recipe": self.recipe,
            "layers": {
                name: {"shape": list(layer.shape), "dtype": layer.dtype}
                for name, layer in self.layers.items()
            },
            "layer_order": list(self.layers),
            "n_views": self.n_views,
            "source": self.source,
            "samples": None if self.samples is None else vars(self.samples),
            "folded": self.folded,
            "shards": [vars(shard) for shard in self.shards],
            "provenance": self.provenance,
        }
        document["checksum"] = _checksum(document)
        return document

    def write(self, folder: Path) -> None:
        """Commit: replace ``store.json`` by this."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        write_durably(folder / MANIFEST_FILE, text.encode())


def is_store(path: Path) -> bool:
    """Whether ``path`` is a folder with a ``store.json``."""
    try:
        return (path / MANIFEST_FILE).is_file()
    except OSError:
        return False


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``store.json``.

    Raises:
        StoreError: there is no store.
        StoreFormatError: the file is not a store's, or of a version this release does not read.
        CorruptStoreError: its bytes differ from what was written.
    """
    path = folder / MANIFEST_FILE
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{folder} is not a feature store: it has no {MANIFEST_FILE}.\n"
            "  List the stores of the cache:  tlpipe ls"
        ) from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != STORE_FORMAT:
        raise StoreFormatError(f"{path} is not a feature store of tlpipe.")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreFormatError(
            f"{path} has format version {version}; this release reads {FORMAT_VERSION}.\n"
            "  A store of a newer release is read after:  pip install --upgrade tlpipe"
        )
    if document.get("checksum") != _checksum(document):
        raise CorruptStoreError(
            f"{path} was changed after it was written: its checksum does not fit."
        )
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreFormatError(
            f"{path} lacks a field or has one of another kind: {error}"
        ) from error


def _parse(document: dict[str, Any]) -> Manifest:
    layers = {}
    for name in document["layer_order"]:
        layer = document["layers"][name]
        shape = tuple(_natural(n) for n in layer["shape"])
        if layer["dtype"] not in _FEATURE_DTYPES:
            raise ValueError(f"dtype {layer['dtype']!r} of layer {name!r}")
        layers[str(name)] = LayerInfo(shape, layer["dtype"])
    recipe = dict(document["recipe"])
    if document["key"] != recipe_key(recipe):
        raise ValueError("the key is not that of the recipe")
    samples = document["samples"]
    return Manifest(
        key=document["key"],
        recipe=recipe,
        layers=layers,
        n_views=_natural(document["n_views"]),
        source=dict(document["source"]),
        samples=None if samples is None else _file_info(samples, _SAMPLES_FILE),
        folded=_natural(document["folded"]),
        shards=tuple(_file_info(shard, _SHARD_FILE) for shard in document["shards"]),
        provenance=dict(document["provenance"]),
    )


def _file_info(value: dict[str, Any], name: re.Pattern[str]) -> FileInfo:
    info = FileInfo(
        str(value["file"]),
        str(value["sha256"]),
        _natural(value["size_bytes"]),
        _natural(value["n"]),
    )
    # A name with a folder in it could point outside the store.
    if not name.fullmatch(info.file) or not _SHA256.fullmatch(info.sha256):
        raise ValueError(f"file {info.file!r}")
    return info


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**48:
        raise ValueError(f"{value!r} is not a count")
    return value


def _checksum(document: dict[str, Any]) -> str:
    body = {name: value for name, value in document.items() if name != "checksum"}
    return hashlib.sha256(canonical_json(body)).hexdigest()
