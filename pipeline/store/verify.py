"""``tlpipe verify``: is every byte of a store what was committed, and does it all fit together?"""

from __future__ import annotations

import hashlib
import math
import os
import shlex
from collections.abc import Callable, Hashable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError, ResourceError, StoreError, StoreFormatError
from pipeline.store.hdf5 import DENIED, attribute, not_damage, open_file
from pipeline.store.key import open_regular
from pipeline.store.leftovers import QUARANTINE_FOLDER, leftovers, quarantined
from pipeline.store.manifest import (
    BACKUP_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    FileInfo,
    Manifest,
    parse_manifest,
    read_manifest,
    repair_command,
)
from pipeline.store.samples_file import read_samples_file
from pipeline.store.shard import KIND as SHARD_KIND
from pipeline.store.shard import open_features, read_digests, read_log
from pipeline.store.state import SHARD_FOLDER, apply_log, check_file, check_size, shard_path
from pipeline.store.table import DIGEST_BYTES, LogEntry, SampleTable, Status
from pipeline.store.view import VIEW_FILE, hindrance
from pipeline.store.view_check import compare_view, is_comparable

Digests = dict[int, NDArray[np.uint8]]
T = TypeVar("T")

# A store that is being written is looked at again until nothing has changed underneath.
_TRIES = 20
_READ_BYTES = 8_000_000

Unusable = StoreError | ResourceError


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as it must be.

    Attributes:
        where: the file, relative to the store's folder.
        what: what is wrong; reads on after the file's name.
        remedy: the command that mends it.
    """

    where: str
    what: str
    remedy: str


@dataclass
class VerifyReport:
    """What was found in a store.

    Attributes:
        folder: the store.
        content: whether every byte was read; otherwise shards by size and structure only.
        manifest: what the store was compared with; None where both copies are damaged.
        problems: what is wrong.
        notes: what is worth knowing and not wrong.
        n_shards: shards that the store names.
        n_rows: rows in them.
        n_unused_rows: rows that no sample uses.
        n_samples: samples in the table.
        n_ok: samples with features.
        n_pending: samples that wait to be embedded.
        n_failed: samples that could not be embedded.
        n_bytes_read: of the files that were read to the last byte.
    """

    folder: Path
    content: bool
    manifest: Manifest | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_shards: int = 0
    n_rows: int = 0
    n_unused_rows: int = 0
    n_samples: int = 0
    n_ok: int = 0
    n_pending: int = 0
    n_failed: int = 0
    n_bytes_read: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, where: str, what: str, remedy: str = "") -> None:
        """Report a problem; a repair mends it unless another remedy is given."""
        self.problems.append(Problem(where, what, remedy or repair_command(self.folder)))

    def add_error(self, path: Path, error: Unusable, consequence: str = "") -> None:
        """Report what an exception says of the file at ``path``; a repair mends only damage."""
        remedy = ""
        if not _is_damage(error):
            denied = isinstance(error.__cause__, OSError) and error.__cause__.errno in DENIED
            remedy = f"chmod u+r {shlex.quote(str(path))}" if denied else _command(self.folder)
        # The first line says what is wrong with which file, the others what mends it.
        what = str(error).splitlines()[0].removeprefix(str(path)).lstrip(": ")
        self.add(path.relative_to(self.folder).as_posix(), what + consequence, remedy)


def verify_store(
    folder: Path, *, content: bool = False, on_progress: Callable[[int], None] | None = None
) -> VerifyReport:
    """Check a store; possible at any time, also while it is being written.

    Args:
        folder: the store.
        content: read every byte: the sha256 of every shard, every feature, all of
            ``features.h5``. Otherwise shards are checked by their size and structure, and the
            rest to the last byte.
        on_progress: is told how many more bytes were read.

    Raises:
        StoreError: there is no store, or it is of another tool or of a newer release.
    """
    return Verifier(folder, content=content, on_progress=on_progress).verify()


def _is_damage(error: Unusable) -> bool:
    """Whether a file is not what it must be, rather than that it cannot be read now and here."""
    return isinstance(error, CorruptStoreError | StoreFormatError)


def _command(folder: Path) -> str:
    return f"tlpipe verify {shlex.quote(str(folder))}"


class Verifier:
    """Checks one store, as often as is asked.

    Each time every file is compared with its sha256; what bytes of a known sha256 hold is looked
    into only once.

    Args:
        folder: the store.
        content: as in :func:`verify_store`.
        on_progress: as in :func:`verify_store`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        content: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.folder = folder
        self.content = content
        self._on_progress = on_progress or (lambda _: None)
        self._n_bytes_read = 0
        self._known: dict[Hashable, Any] = {}
        self._compared: set[FileInfo] = set()

    def verify(self) -> VerifyReport:
        """See :func:`verify_store`."""
        self._n_bytes_read = 0
        self._compared = set()
        for _ in range(_TRIES):
            report = VerifyReport(self.folder, self.content)
            report.manifest = find_manifest(self.folder, report)
            if report.manifest is not None:
                self._check(report.manifest, report)
            if report.ok or find_manifest(self.folder) == report.manifest:
                break
        report.n_bytes_read = self._n_bytes_read
        return report

    def _check(self, manifest: Manifest, report: VerifyReport) -> None:
        report.n_shards = len(manifest.shards)
        report.n_rows = sum(shard.n for shard in manifest.shards)
        table = self._table(manifest, report)
        digests, damaged = self._shards(manifest)
        self._check_view(manifest, table, report)
        if table is not None:
            index = positions(table)
            for shard in unfolded(manifest):
                if shard.number in digests:
                    apply_log(table, index, self._log(shard))
            _check_samples(manifest, table, digests, report)
        for shard, error in damaged.items():
            n = 0 if table is None else int(np.count_nonzero(table.shards == shard.number))
            relied_on = f" {counted(n, 'sample')} with features in it." if n else ""
            report.add_error(shard_path(self.folder, shard), error, relied_on)
        report.notes += _extra_files(self.folder, manifest)

    def _table(self, manifest: Manifest, report: VerifyReport) -> SampleTable | None:
        """The samples table as it was written; None where it cannot be used."""
        file = manifest.samples
        if file is None:
            report.add("samples-*.h5", f"is missing: {MANIFEST_FILE} names no samples table.")
            return None
        path = self.folder / file.file
        try:
            self._read(path, file)
            read = partial(read_samples_file, path, file.n)
            return deepcopy(self._once(file, lambda: self._try_hdf5(path, file, read)))
        except (StoreError, ResourceError) as error:
            report.add_error(path, error)
            return None

    def _shards(self, manifest: Manifest) -> tuple[Digests, dict[FileInfo, Unusable]]:
        """The digest of every row of the good shards, by number; what is wrong with the others."""
        digests: Digests = {}
        damaged: dict[FileInfo, Unusable] = {}
        for shard in manifest.shards:
            try:
                digests[shard.number] = self._shard(shard, manifest)
            except (StoreError, ResourceError) as error:
                damaged[shard] = error
        return digests, damaged

    def _shard(self, shard: FileInfo, manifest: Manifest) -> NDArray[np.uint8]:
        """(n_rows, 32) digests of the images that the rows were made from.

        Raises:
            StoreError: the shard is missing, damaged, not what it should be, or not readable here.
            ResourceError: it cannot be read now.
        """
        path = shard_path(self.folder, shard)
        is_unfolded = shard.number > manifest.folded
        if self.content or is_unfolded:
            self._read(path, shard)
        else:
            check_size(path, shard)
        if is_unfolded:
            self._try_hdf5(path, shard, lambda: self._log(shard))
        look = partial(self._look_into, path, shard, manifest)
        return self._once(shard, lambda: self._try_hdf5(path, shard, look))

    def _try_hdf5(self, path: Path, file: FileInfo, read: Callable[[], T]) -> T:
        """Read a file of known sha256.

        Where HDF5 fails on the bytes that were committed, that is no damage but a matter of this
        machine, or of the HDF5 on it.
        """
        try:
            return read()
        except CorruptStoreError as error:
            if not isinstance(error.__cause__, OSError | RuntimeError | KeyError):
                raise
            self._read(path, file)
            why = str(error).removeprefix(f"{path} ")
            raise StoreError(
                f"{path} holds the bytes that were committed, and yet {why}; see whether another "
                "machine or a newer h5py can read it."
            ) from error

    def _look_into(self, path: Path, shard: FileInfo, manifest: Manifest) -> NDArray[np.uint8]:
        with open_file(path, SHARD_KIND) as file:
            key = attribute(file, "key")
        if key not in (None, manifest.key):  # None in version 1
            raise StoreFormatError(f"{path} holds features of another recipe.")
        with open_features(path, shard, manifest) as layers:
            for name, values in layers.items():
                n_bad = _n_not_finite(values) if self.content else 0
                if n_bad:
                    raise CorruptStoreError(
                        f"{path} has NaN or infinity in {n_bad:,} of {shard.n:,} rows of layer "
                        f"{name!r}, where nothing but finite numbers may be."
                    )
        return row_digests(path, shard)

    def _log(self, shard: FileInfo) -> list[LogEntry]:
        return self._once(("log", shard), lambda: read_log(shard_path(self.folder, shard)))

    def _check_view(
        self, manifest: Manifest, table: SampleTable | None, report: VerifyReport
    ) -> None:
        """Check ``features.h5`` against the samples table that it was made from."""
        path = self.folder / VIEW_FILE
        try:
            if not is_comparable(path, manifest):
                report.notes.append(
                    f"{VIEW_FILE} was written by another release and is not compared; it is for "
                    "other programs only."
                )
            elif self.content and table is not None and _rows_exist(manifest, table):
                self._compare_view(path, manifest, table)
        except (StoreError, ResourceError) as error:
            if os.path.lexists(path):
                report.add_error(path, error)
            else:  # perhaps since a moment ago
                report.notes.append(self._why_no_view(manifest, table))

    def _why_no_view(self, manifest: Manifest, table: SampleTable | None) -> str:
        none = f"There is no {VIEW_FILE} for plain HDF5 readers"
        where = shlex.quote(str(self.folder))
        if table is not None and (why := hindrance(manifest, table)):
            return (
                f"{none}: its {why}. To merge small shards:  tlpipe compact {where}  To make one "
                f"file of any store:  tlpipe pack {where} FILE.h5"
            )
        return f"{none}; the next tlpipe extract that comes to its end writes it."

    def _compare_view(self, path: Path, manifest: Manifest, table: SampleTable) -> None:
        try:
            with open_regular(path) as file:
                found = file.read()
        except OSError as error:
            damage = CorruptStoreError(f"{path} cannot be read: {error.strerror}.")
            raise not_damage(path, error) or damage from error
        self._was_read(len(found))
        key = (VIEW_FILE, hashlib.sha256(found).digest(), manifest.samples, manifest.shards)
        self._once(key, lambda: compare_view(path, found, manifest, table))

    def _read(self, path: Path, file: FileInfo) -> None:
        """Compare all bytes of a file with what was recorded of it; once a verification."""
        if file not in self._compared:
            check_file(path, file)
            self._was_read(file.size_bytes)
            self._compared.add(file)

    def _was_read(self, size_bytes: int) -> None:
        self._n_bytes_read += size_bytes
        self._on_progress(size_bytes)

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        known: T = self._known[key]
        return known


def find_manifest(folder: Path, report: VerifyReport | None = None) -> Manifest | None:
    """The manifest to go by: that of ``store.json``, or its copy's; None where both are damaged.

    Args:
        folder: the store.
        report: is told what is wrong with either.

    Raises:
        StoreError: there is neither, or ``store.json`` is of another tool or of a newer release.
    """
    report = report or VerifyReport(folder, content=False)
    # The copy first: it is written last, so it is never ahead of what is read after it.
    copy = _read_copy(folder / BACKUP_FILE)
    main = _read_copy(folder / MANIFEST_FILE)
    if main.manifest is None:
        return _replacement(folder, main, copy, report)
    if copy.error is not None:
        report.add_error(folder / BACKUP_FILE, copy.error)
    elif copy.manifest is None:
        report.notes.append(f"There is no {BACKUP_FILE}; the next commit writes it.")
    elif copy.manifest.key != main.manifest.key:
        report.add(BACKUP_FILE, "belongs to a store of another recipe.")
    elif copy.manifest.age > main.manifest.age:
        report.add(MANIFEST_FILE, f"is older than its copy {BACKUP_FILE}: it was put back.")
        return copy.manifest
    elif copy.manifest == main.manifest and copy.data != main.data:
        report.notes.append(f"{MANIFEST_FILE} and {BACKUP_FILE} say the same in other bytes.")
    elif copy.data != main.data:
        report.notes.append(f"{BACKUP_FILE} is not the latest; the next commit renews it.")
    return main.manifest


@dataclass(frozen=True)
class _Copy:
    """What one of the two manifest files holds; nothing of all where there is no such file."""

    data: bytes = b""
    manifest: Manifest | None = None
    error: Unusable | None = None


def _read_copy(path: Path) -> _Copy:
    try:
        with open_regular(path) as file:
            data = file.read(min(os.fstat(file.fileno()).st_size, MAX_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return _Copy()
    except OSError as cause:
        error = not_damage(path, cause)
        error = error or CorruptStoreError(f"{path} cannot be read: {cause.strerror}.")
        error.__cause__ = cause
        return _Copy(error=error)
    try:
        return _Copy(data, parse_manifest(path, data))
    except StoreError as damage:
        return _Copy(data, error=damage)


def _replacement(folder: Path, main: _Copy, copy: _Copy, report: VerifyReport) -> Manifest | None:
    """What to go by where ``store.json`` cannot be used."""
    if copy.manifest is not None:
        intact = f" Its copy {BACKUP_FILE} is intact."
        if main.error is None:
            report.add(MANIFEST_FILE, "is missing." + intact)
        else:
            report.add_error(folder / MANIFEST_FILE, main.error, intact)
        return copy.manifest
    if isinstance(main.error, StoreFormatError):
        raise main.error
    if main.error is None and copy.error is None and not any(folder.glob(f"{SHARD_FOLDER}/*.h5")):
        read_manifest(folder)  # says that there is no store
    unread = {MANIFEST_FILE: main.error, BACKUP_FILE: copy.error}
    if any(error is not None and not _is_damage(error) for error in unread.values()):
        for name, error in unread.items():
            if error is not None:
                report.add_error(folder / name, error)
        return None
    where = shlex.quote(str(folder))
    report.add(
        MANIFEST_FILE,
        f"and its copy {BACKUP_FILE} are both damaged or missing: nothing says any more which "
        "bytes of the other files are right. Put one of the two back from a backup of your own; "
        "or set the store aside and run the same tlpipe extract again, which embeds everything.",
        f"mv {where} {shlex.quote(str(folder) + '-damaged')}",
    )
    return None


def unfolded(manifest: Manifest) -> list[FileInfo]:
    """The shards whose logs are not yet part of the samples table."""
    return [shard for shard in manifest.shards if shard.number > manifest.folded]


def positions(table: SampleTable) -> dict[str, int]:
    """Where each id stands in the table; shorter than the table if an id is there twice."""
    return {sample_id: i for i, sample_id in enumerate(table.ids)}


def row_digests(path: Path, shard: FileInfo) -> NDArray[np.uint8]:
    """(n_rows, 32) digests of the images that a shard's rows were made from."""
    return np.frombuffer(b"".join(read_digests(path, shard)), np.uint8).reshape(-1, DIGEST_BYTES)


def own_rows(table: SampleTable, digests: Mapping[int, NDArray[np.uint8]]) -> NDArray[np.bool_]:
    """(n_samples,) whether a sample's row exists and was made from the sample's image.

    Args:
        table: of the samples.
        digests: (n_rows, 32) of each shard to look for rows in, by number.
    """
    own = np.zeros(len(table), bool)
    ready = table.ready
    order = ready[np.argsort(table.shards[ready], kind="stable")]
    numbers = table.shards[order]
    for number, known in digests.items():
        start, stop = np.searchsorted(numbers, [number, number + 1])
        here = order[start:stop]
        here = here[(table.rows[here] >= 0) & (table.rows[here] < len(known))]
        own[here] = (known[table.rows[here]] == table.digests[here]).all(axis=1)
    return own


def _rows_exist(manifest: Manifest, table: SampleTable) -> bool:
    """Whether every sample's row lies within a shard of the manifest."""
    n_rows = {shard.number: shard.n for shard in manifest.shards}
    ready = table.ready
    shards, rows = table.shards[ready], table.rows[ready]
    limits = np.array([n_rows.get(number, 0) for number in shards.tolist()], np.int64)
    return bool(((rows >= 0) & (rows < limits)).all())


def _check_samples(
    manifest: Manifest, table: SampleTable, digests: Digests, report: VerifyReport
) -> None:
    """Check what the samples table says of each sample, with all logs applied."""
    assert manifest.samples is not None
    where = manifest.samples.file
    report.n_samples = len(table)
    report.n_ok = table.count(Status.OK)
    report.n_pending = table.count(Status.PENDING)
    report.n_failed = table.count(Status.FAILED)

    is_ok = table.statuses == Status.OK
    own = own_rows(table, digests)
    unknown = {shard.number for shard in manifest.shards} - digests.keys()
    elsewhere = is_ok & ~own & ~np.isin(table.shards, list(unknown))
    homeless = ~is_ok & ((table.shards != -1) | (table.rows != -1))
    failed = np.flatnonzero(table.statuses == Status.FAILED)
    unexplained = [i for i in failed.tolist() if not table.reasons.get(i)]
    n_twice = len(table) - len(positions(table))
    if n_twice:
        report.add(where, f"lists {counted(n_twice, 'sample')} twice.")
    if elsewhere.any():
        report.add(
            where, f"points to rows that are not the sample's own: {_some(table, elsewhere)}."
        )
    if homeless.any():
        report.add(where, f"points to a row of samples without features: {_some(table, homeless)}.")
    if unexplained:
        report.add(where, f"gives no reason for {counted(len(unexplained), 'failed sample')}.")

    used = table.shards[own].astype(np.int64) << 32 | table.rows[own]
    report.n_unused_rows = sum(map(len, digests.values())) - len(np.unique(used))
    if report.n_unused_rows:
        report.notes.append(
            f"{counted(report.n_unused_rows, 'row')} without a sample: the image left or changed. "
            f"To drop them:  tlpipe compact {shlex.quote(str(report.folder))}"
        )


def _some(table: SampleTable, chosen: NDArray[np.bool_]) -> str:
    """``12 samples, 'a/1.png' first``."""
    n = int(np.count_nonzero(chosen))
    return f"{counted(n, 'sample')}, {table.ids[int(np.argmax(chosen))]!r} first"


def counted(n: int, what: str) -> str:
    """``1 sample``, ``1,200 samples``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _n_not_finite(values: h5py.Dataset) -> int:
    """How many rows of (n_rows, ...) hold NaN or infinity; one piece in memory at a time."""
    n_rows = max(1, _READ_BYTES // max(1, values.dtype.itemsize * math.prod(values.shape[1:])))
    return sum(
        int(np.count_nonzero(~np.isfinite(block).reshape(len(block), -1).all(axis=1)))
        for block in (values[i : i + n_rows] for i in range(0, len(values), n_rows))
    )


def _extra_files(folder: Path, manifest: Manifest) -> list[str]:
    """Notes on files that the manifest does not name."""
    notes = []
    left = leftovers(folder, manifest)
    if left:
        notes.append(
            f"{counted(len(left), 'file')} beside the store, "
            f"{left[0].relative_to(folder).as_posix()} first: a run that goes on or was "
            "interrupted. The next writer removes what is left over."
        )
    aside = quarantined(folder)
    if aside:
        notes.append(
            f"{counted(len(aside), 'damaged file')} in quarantine. Once of no use:  "
            f"rm -r {shlex.quote(str(folder / QUARANTINE_FOLDER))}"
        )
    return notes
