"""``store.json``: the one file that says which files are the store. Replacing it is the commit.

``store.backup.json`` is a copy, written after it, from which ``tlpipe verify --repair`` can restore
a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import stat
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import CorruptStoreError, ResourceError, StoreError, StoreFormatError
from pipeline.store.durable import write_durably
from pipeline.store.hdf5 import FORMAT_VERSION, check_version, not_damage
from pipeline.store.key import canonical_json, open_regular, recipe_key

MANIFEST_FILE = "store.json"
BACKUP_FILE = "store.backup.json"
STORE_FORMAT = "tlpipe-feature-store"

_SHARD_FILE = re.compile(r"[0-9]{6,}\.h5")
_SAMPLES_FILE = re.compile(r"samples-[0-9]{6,}\.h5")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FEATURE_DTYPES = ("float16", "float32")

MAX_MANIFEST_BYTES = 100_000_000
MAX_AXES = 8
# Far below what an int32 holds: a store that is read can go on being written.
MAX_NUMBER = 2**30
# An HDF5 superblock.
_MIN_FILE_BYTES = 48
# Offset, digest, size, time, split, status, shard and row.
_MIN_SAMPLE_BYTES = 66


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


def file_info(name: str, data: bytes | memoryview, n: int) -> FileInfo:
    """What is recorded of a file that holds ``data``."""
    return FileInfo(name, hashlib.sha256(data).hexdigest(), len(data), n)


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
        relabelled: columns (and "split") that ``tlpipe relabel`` set, and from which file; a later
            extraction keeps them.
        next_shard: number of the next shard; none is ever used twice.
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
    relabelled: dict[str, str] = field(default_factory=dict)
    next_shard: int = 1

    @property
    def size_bytes(self) -> int:
        """Of the shards and the samples table."""
        files = self.shards if self.samples is None else (*self.shards, self.samples)
        return sum(file.size_bytes for file in files)

    def with_shard(self, shard: FileInfo) -> Manifest:
        """The same store with one more shard."""
        return replace(self, shards=(*self.shards, shard), next_shard=shard.number + 1)

    def row_bytes(self) -> int:
        """Bytes of one sample's features, all layers and views."""
        return self.n_views * sum(
            math.prod(layer.shape) * np.dtype(layer.dtype).itemsize
            for layer in self.layers.values()
        )

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
            "next_shard": self.next_shard,
            "relabelled": self.relabelled,
            "provenance": self.provenance,
        }
        document["checksum"] = _checksum(document)
        return document

    def write(self, folder: Path) -> None:
        """Commit: replace ``store.json`` by this, and then its copy.

        Raises:
            ResourceError: the disk is full or fails; nothing is committed.
            StoreError: the folder cannot be written to; nothing is committed.
        """
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        write_durably(folder / MANIFEST_FILE, text.encode())
        # The commit has happened. A copy that stays behind is renewed by the next one.
        with suppress(ResourceError, StoreError):
            write_durably(folder / BACKUP_FILE, text.encode())

    @property
    def age(self) -> tuple[int, int]:
        """Grows with every commit that adds a shard or replaces the samples table."""
        return self.next_shard, 0 if self.samples is None else self.samples.number


def repair_command(folder: Path) -> str:
    """What mends a damaged store."""
    return f"tlpipe verify {shlex.quote(str(folder))} --repair"


def is_store(path: Path) -> bool:
    """Whether ``path`` is a folder with a ``store.json``, or with the copy of one that is lost.

    Raises:
        ResourceError: that cannot be told now. A store taken for none would be written over.
        StoreError: the folder may not be looked into.
    """
    return any(_is_file(path / name) for name in (MANIFEST_FILE, BACKUP_FILE))


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if (told := not_damage(path, error)) is not None:
            raise told from error
    return False


def read_manifest(folder: Path, name: str = MANIFEST_FILE) -> Manifest:
    """Read and check ``store.json``, or its backup.

    Raises:
        StoreError: there is no store.
        StoreFormatError: the file is not a store's, or of a version this release does not read.
        CorruptStoreError: its bytes differ from what was written.
    """
    path = folder / name
    try:
        with open_regular(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > MAX_MANIFEST_BYTES:
                raise StoreFormatError(f"{path} is too large for what it is: {size_bytes:,} bytes.")
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        if name == MANIFEST_FILE and is_store(folder):
            raise CorruptStoreError(
                f"{folder} has lost its {name}. Restore it from its copy:\n"
                f"  {repair_command(folder)}"
            ) from None
        why = f"it has no {name}" if folder.exists() else "there is no such folder"
        raise StoreError(
            f"{folder} is not a feature store: {why}.\n  List the stores of the cache:  tlpipe ls"
        ) from None
    except OSError as error:
        other = StoreError(f"{path} cannot be read ({error.strerror}).")
        raise not_damage(path, error) or other from error
    try:
        return parse_manifest(path, data)
    except CorruptStoreError as error:
        raise CorruptStoreError(
            f"{error}\n  Restore it from its copy:\n  {repair_command(folder)}"
        ) from error


def parse_manifest(path: Path, data: bytes) -> Manifest:
    """The manifest in ``data``, which came from ``path``; see :func:`read_manifest`."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path} is damaged: it is not JSON any more.") from error
    if not isinstance(document, dict) or document.get("format") != STORE_FORMAT:
        raise StoreFormatError(f"{path} is not a feature store of tlpipe.")
    check_version(path, document.get("format_version"))
    try:
        if document.get("checksum") != _checksum(document):
            raise CorruptStoreError(
                f"{path} was changed after it was written: its checksum does not fit."
            )
        return _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StoreFormatError(
            f"{path} lacks a field or has one of another kind: {error}"
        ) from error


def _parse(document: dict[str, Any]) -> Manifest:
    recipe = dict(document["recipe"])
    if document["key"] != recipe_key(recipe):
        raise ValueError("the key is not that of the recipe")
    samples = document["samples"]
    shards = tuple(_file_info(shard, _SHARD_FILE) for shard in document["shards"])
    last = max((shard.number for shard in shards), default=0)
    if document["format_version"] == 1:
        document = {**document, "next_shard": last + 1, "relabelled": {}}
    manifest = Manifest(
        key=document["key"],
        recipe=recipe,
        layers={_layer_name(name): _layer(document, name) for name in document["layer_order"]},
        n_views=_natural(document["n_views"]),
        source=dict(document["source"]),
        samples=None if samples is None else _file_info(samples, _SAMPLES_FILE),
        folded=_natural(document["folded"]),
        shards=shards,
        provenance=dict(document["provenance"]),
        relabelled={str(k): str(v) for k, v in dict(document["relabelled"]).items()},
        next_shard=_natural(document["next_shard"]),
    )
    _check_counts(manifest, last)
    _check_recipe(recipe)
    return manifest


def _check_recipe(recipe: dict[str, Any]) -> None:
    """What is said of the recipe is shown and compared: it has to be of the right kind."""
    kinds: dict[str, type] = {
        "backbone": str, "weights": str, "pooling": str, "precision": str, "storage": str,
        "layers": list, "preprocess": dict, "decoding": dict,
    }  # fmt: skip
    for name, kind in kinds.items():
        if name in recipe and not isinstance(recipe[name], kind):
            raise ValueError(f"recipe field {name!r}")
    if not all(isinstance(name, str) for name in recipe.get("layers", [])):
        raise ValueError("recipe field 'layers'")


def _check_counts(manifest: Manifest, last: int) -> None:
    """Nothing may be promised that the files are too small to hold."""
    if len({shard.number for shard in manifest.shards}) != len(manifest.shards):
        raise ValueError("a shard is listed twice")
    if not manifest.layers or not manifest.n_views:
        raise ValueError("there is no layer or no view")
    if not last < manifest.next_shard <= MAX_NUMBER + 1 or manifest.folded >= manifest.next_shard:
        raise ValueError("next_shard or folded does not fit the shards")
    for shard in manifest.shards:
        if shard.n * (manifest.row_bytes() + 32) > shard.size_bytes:
            raise ValueError(f"{shard.file} is too small for {shard.n:,} rows")
    samples = manifest.samples
    if samples is not None and samples.n * _MIN_SAMPLE_BYTES > samples.size_bytes:
        raise ValueError(f"{samples.file} is too small for {samples.n:,} samples")


def _layer_name(name: Any) -> str:
    # HDF5 reads "/" and "." in a name as a path.
    if not isinstance(name, str) or not name or set(name) <= {"."} or set(name) & {"/", "\0"}:
        raise ValueError(f"layer name {name!r}")
    return name


def _layer(document: dict[str, Any], name: str) -> LayerInfo:
    layer = document["layers"][name]
    shape = tuple(_natural(n) for n in layer["shape"])
    if layer["dtype"] not in _FEATURE_DTYPES:
        raise ValueError(f"dtype {layer['dtype']!r} of layer {name!r}")
    if not 1 <= len(shape) <= MAX_AXES or 0 in shape:
        raise ValueError(f"shape {shape} of layer {name!r}")
    return LayerInfo(shape, layer["dtype"])


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
    if not 0 < info.number <= MAX_NUMBER:
        raise ValueError(f"file number {info.number}")
    if info.size_bytes < _MIN_FILE_BYTES:
        raise ValueError(f"size of {info.file}: {info.size_bytes} bytes")
    return info


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**48:
        raise ValueError(f"{value!r} is not a count")
    return value


def _checksum(document: dict[str, Any]) -> str:
    body = {name: value for name, value in document.items() if name != "checksum"}
    return hashlib.sha256(canonical_json(body)).hexdigest()
