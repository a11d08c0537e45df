"""CSV and Parquet manifests: a path, labels and a split a row.

The column ``path`` is needed; ``split`` is optional; every other one is a label column. All labels
are text, so the number 1 of a Parquet file and the "1" of a CSV file are the same class.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.folders import absolute, source_name
from pipeline.data.names import counted, quoted, to_id
from pipeline.data.samples import SPLIT_ALIASES, DataSource, Sample
from pipeline.errors import DataError, EmptySourceError, ManifestError

N_SHOWN = 5
"""How many offending rows an error lists."""

N_PROBED = 20
"""How many files are looked for, to tell a wrong root from a few missing files."""

_UNUSUAL_PATH = re.compile(r"^[/.]|//|/\.|[\\\x00:]|/$|[^\x00-\x7f]", re.MULTILINE)
"""Somewhere in lines of paths: one that may not be its own id. One search is quick."""


@dataclass
class Table:
    """A manifest's columns as text.

    Attributes:
        columns: name -> values, one a row; None where there is none.
        place: says where a row stands, such as "line 3".
        notes: what was left out while reading.
    """

    columns: dict[str, list[str | None]]
    place: Callable[[int], str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rows:
    """What a manifest says of its samples; no image was looked for.

    Attributes:
        samples: one a path, in the manifest's order.
        label_columns: every column but the path's and the split's.
        has_split: whether there is a split column.
        notes: what was left out, or taken as something else.
    """

    samples: list[Sample]
    label_columns: tuple[str, ...]
    has_split: bool
    notes: list[str]


def open_manifest(file: Path, spec: str, root: Path | None = None) -> DataSource:
    """List the samples of a manifest; no image is looked for but a few.

    Args:
        file: a ``.csv`` or ``.parquet`` file.
        spec: what the user typed.
        root: the folder that paths are relative to; the manifest's own by default.

    Raises:
        ManifestError: it cannot be read, lacks a column, or contradicts itself.
        EmptySourceError: it has no row.
    """
    root = absolute(file.parent if root is None else root)
    rows = read_rows(file, root)
    return DataSource(
        name=source_name(file.with_suffix("")),
        spec=spec,
        root=root,
        layout="manifest",
        samples=rows.samples,
        label_columns=rows.label_columns,
        split_origin="given" if any(sample.split for sample in rows.samples) else "none",
        notes=[*rows.notes, *_wrong_root_notes(rows.samples, root)],
    )


def read_rows(file: Path, root: Path, keys: Sequence[str] = ("path",)) -> Rows:
    """Read a manifest.

    Args:
        file: a ``.csv`` or ``.parquet`` file.
        root: the absolute folder that paths are relative to.
        keys: columns that may name the samples, the first that is there does: "path" is resolved
            from the root, "id" is taken as it is.

    Raises:
        ManifestError: it cannot be read, lacks a column, or contradicts itself.
        EmptySourceError: it has no row.
    """
    is_parquet = file.suffix.lower() == ".parquet"
    table = read_parquet(file, keys) if is_parquet else read_csv(file, keys)
    key_column = _key_column(table.columns, keys)
    if key_column is None:
        raise ManifestError(
            f"{file} has no column {' or '.join(map(repr, keys))}. "
            f"Found: {quoted(table.columns, 10)}.\n"
            f"  Every row needs the path of an image, relative to {root}."
        )
    split_column = _find_column(table.columns, "split")
    label_columns = tuple(c for c in table.columns if c not in (key_column, split_column))
    if not table.columns[key_column]:
        raise EmptySourceError(f"{file} lists no image: it has a header, but no row.")
    texts = _key_texts(file, table, key_column)
    notes: list[str] = []
    if key_column.casefold() == "id":
        ids = files = [to_id(text) for text in texts]
    else:
        ids, files, notes = _resolve_paths(file, table, texts, root)
    splits = _read_splits(file, table, split_column, len(ids))
    labels = zip(*(table.columns[c] for c in label_columns), strict=True)
    rows = labels if label_columns else itertools.repeat((), len(ids))
    samples = [Sample(*row) for row in zip(ids, files, rows, splits, strict=True)]
    samples, repeated = _without_repeats(file, samples, table.place)
    notes = [*table.notes, *notes, *repeated]
    return Rows(samples, label_columns, split_column is not None, notes)


def read_csv(file: Path, keys: Sequence[str] = ("path",)) -> Table:
    """Read a CSV file: UTF-8 with or without a byte order mark, ``,`` ``;`` or tabs between.

    Args:
        file: the CSV file.
        keys: columns that may name the samples; the one that does is left as it stands.

    Raises:
        ManifestError: it is not UTF-8, not CSV, or a row has too many or too few fields.
    """
    try:
        rows, lines = _csv_rows(file, keys)
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{file} is not UTF-8 text (byte {error.start}).\n"
            "  Save it as UTF-8; in a spreadsheet: Save as, CSV UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error.strerror}.") from error
    if not rows:
        raise ManifestError(f"{file} is empty. Expected a header line, such as: path,label,split")
    header = [name.strip() for name in rows.pop(0)]
    lines.pop(0)
    _check_row_lengths(file, header, rows, lines)
    raw = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    return _table(file, header, raw, lambda row: f"line {lines[row]}", keys)


def _csv_rows(file: Path, keys: Sequence[str]) -> tuple[list[list[str]], list[int]]:
    """Every row that is not blank, and the line on which it ends."""
    rows: list[list[str]] = []
    lines: list[int] = []
    delimiter = _delimiter(file, keys)
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
        except csv.Error as error:
            raise ManifestError(
                f"{file}, line {reader.line_num}, is not valid CSV: {error}."
            ) from error
    return rows, lines


def _delimiter(file: Path, keys: Sequence[str]) -> str:
    """The character between the header's fields: the one that leaves a column of paths."""
    with file.open("rb") as data:
        start = data.read(4096)
    header = start.decode("utf-8-sig", "replace").splitlines()[:1]
    for delimiter in ",;\t":
        cells = next(csv.reader(header, delimiter=delimiter), [])
        if any(cell.strip().casefold() in keys for cell in cells):
            return delimiter
    return ","


def _check_row_lengths(
    file: Path, header: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[int]
) -> None:
    wrong = [i for i, row in enumerate(rows) if len(row) != len(header)]
    if wrong:
        shown = ", ".join(
            f"line {lines[i]} has {counted(len(rows[i]), 'field')}" for i in wrong[:N_SHOWN]
        )
        raise ManifestError(
            f"{file}: the header has {counted(len(header), 'field')}, but {shown}"
            f"{_and_more(len(wrong))}.\n"
            "  Put a name with a comma in it between double quotes."
        )


def read_parquet(file: Path, keys: Sequence[str] = ("path",)) -> Table:
    """Read a Parquet file.

    Args:
        file: the Parquet file.
        keys: columns that may name the samples; the one that does is left as it stands.

    Raises:
        ManifestError: pyarrow is not installed, or the file is not Parquet.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ManifestError(
            f"{file} is a Parquet file, and pyarrow, which reads them, is not installed.\n"
            "  Install it:  pip install 'tlpipe[parquet]'"
        ) from error
    try:
        with pq.ParquetFile(file) as parquet:
            fields = list(parquet.schema_arrow)
            nested = [f.name for f in fields if _is_nested(f.type)]
            content = parquet.read(columns=[f.name for f in fields if f.name not in nested])
            raw = [content.column(i).to_pylist() for i in range(content.num_columns)]
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"Cannot read {file}: {error.strerror}.") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{file} is not a readable Parquet file: {error}") from error
    table = _table(file, content.column_names, raw, lambda row: f"row {row + 1}", keys)
    if nested:
        table.notes.append(f"Columns {quoted(nested)} hold no text or numbers: left out.")
    return table


def _is_nested(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _table(
    file: Path,
    header: Sequence[str],
    raw: Sequence[Sequence[Any]],
    place: Callable[[int], str],
    keys: Sequence[str],
) -> Table:
    """Clean text columns from raw ones; columns without a name are row numbers, left out."""
    key_column = _key_column(header, keys)
    repeated = sorted({name for name in header if header.count(name) > 1 and name})
    if repeated:
        raise ManifestError(f"{file} has more than one column called {quoted(repeated)}.")
    notes = []
    columns: dict[str, list[str | None]] = {}
    for name, values in zip(header, raw, strict=True):
        if not name or re.fullmatch(r"Unnamed: \d+|__index_level_\d+__", name):
            notes.append(f"A column {'without a name' if not name else repr(name)} left out.")
            continue
        is_key = name == key_column
        name = unicodedata.normalize("NFC", name)
        if is_key:
            # As it stands: a file's name may begin or end with a space.
            columns[name] = [str(v) if v is not None and str(v).strip() else None for v in values]
            continue
        texts = {value: _text(value) for value in set(values)}
        if _are_whole_floats(texts.values()):
            texts = {value: text and text[:-2] for value, text in texts.items()}
            notes.append(f"Column {name!r}: labels such as '1.0' were taken as '1'.")
        columns[name] = [texts[value] for value in values]
    return Table(columns, place, notes)


def _text(value: object) -> str | None:
    """A label or split as text; None where it is missing: null, blank or NaN."""
    if value is None:
        return None
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    text = unicodedata.normalize("NFC", str(value).strip())
    return None if text.lower() in ("", "nan") else text


def _are_whole_floats(texts: Iterable[str | None]) -> bool:
    """Whether a column of whole numbers went through floats, as pandas does for missing values."""
    present = [text for text in texts if text is not None]
    return bool(present) and all(re.fullmatch(r"-?\d+\.0", text) for text in present)


def _key_column(columns: Iterable[str], keys: Sequence[str]) -> str | None:
    columns = list(columns)
    found = (_find_column(columns, key) for key in keys)
    return next((column for column in found if column is not None), None)


def _find_column(columns: Iterable[str], wanted: str) -> str | None:
    """A column by name; in another case only where nothing has the exact name."""
    columns = list(columns)
    if wanted in columns:
        return wanted
    return next((name for name in columns if name.casefold() == wanted), None)


def _read_splits(file: Path, table: Table, column: str | None, n_rows: int) -> list[str]:
    if column is None:
        return [""] * n_rows
    values = table.columns[column]
    splits = {text: SPLIT_ALIASES.get(text.casefold()) if text else "" for text in set(values)}
    unknown = sorted(str(text) for text, split in splits.items() if split is None)
    if unknown:
        row = next(i for i, text in enumerate(values) if splits[text] is None)
        raise ManifestError(
            f"{file}, {table.place(row)}: the split is {values[row]!r}. Expected 'train', 'val' or "
            f"'test', or nothing.\n  Unknown splits in the file: {quoted(unknown)}."
        )
    return [splits[text] or "" for text in values]


def _key_texts(file: Path, table: Table, column: str) -> list[str]:
    values = table.columns[column]
    blank = [i for i, value in enumerate(values) if value is None]
    if blank:
        shown = ", ".join(table.place(i) for i in blank[:N_SHOWN])
        raise ManifestError(f"{file} has no {column} in {shown}{_and_more(len(blank))}.")
    return [str(value) for value in values]


def _resolve_paths(
    file: Path, table: Table, paths: list[str], root: Path
) -> tuple[list[str], list[str], list[str]]:
    """Ids, files and notes for a column of paths; see :func:`_below_root` for what is accepted."""
    texts, notes = _with_slashes(paths, root)
    prefix = f"{str(root).rstrip('/')}/"
    roots = dict.fromkeys((root.as_posix(), root.resolve().as_posix()))
    if not _UNUSUAL_PATH.search("\n".join(texts)):
        return texts, [prefix + text for text in texts], notes
    ids: list[str] = []
    files: list[str] = []
    outside: list[int] = []
    for i, text in enumerate(texts):
        below = _below_root(text, roots)
        if below is None:
            outside.append(i)
            continue
        below = _spelt_as_on_disk(below, prefix)
        ids.append(to_id(below))
        files.append(prefix + below)
    if outside:
        shown = "\n".join(f"    {table.place(i)}: {paths[i]!r}" for i in outside[:N_SHOWN])
        raise ManifestError(
            f"{file}: {counted(len(outside), 'path')} not below the root {root}:\n{shown}"
            f"{_and_more(len(outside))}\n"
            "  Paths are relative to the root; give another root, or move the images below it."
        )
    return ids, files, notes


def _below_root(text: str, roots: Iterable[str]) -> str | None:
    """The way from the root to a path, normalised; None where it leaves the root, or cannot be."""
    if "\x00" in text or "://" in text or re.match(r"[A-Za-z]:[\\/]", text):
        return None
    normal = posixpath.normpath(text)
    for root in roots:
        if normal.startswith(f"{root.rstrip('/')}/"):
            return normal[len(root.rstrip("/")) + 1 :]
    if normal.startswith(("/", "../")) or normal in ("..", "."):
        return None
    return normal


def _with_slashes(texts: list[str], root: Path) -> tuple[list[str], list[str]]:
    r"""``cats\1.jpg`` from a manifest made on Windows -> ``cats/1.jpg``, with a note."""
    first = next((text for text in texts if "\\" in text), None)
    if first is None or any("/" in text for text in texts) or os.path.lexists(root / first):
        return texts, []
    return [text.replace("\\", "/") for text in texts], ["Backslashes in paths taken as '/'."]


def _spelt_as_on_disk(below: str, prefix: str) -> str:
    """A path with accents as the disk composes them; a manifest may have been typed elsewhere."""
    forms = dict.fromkeys((below, *(unicodedata.normalize(f, below) for f in ("NFC", "NFD"))))
    if len(forms) == 1:
        return below
    return next((form for form in forms if os.path.lexists(prefix + form)), below)


def _without_repeats(
    file: Path, samples: list[Sample], place: Callable[[int], str]
) -> tuple[list[Sample], list[str]]:
    """Each id once; rows that repeat one are dropped, rows that contradict one are an error."""
    first: dict[str, int] = {}
    repeated: list[int] = []
    for i, sample in enumerate(samples):
        if first.setdefault(sample.id, i) != i:
            repeated.append(i)
    if not repeated:
        return samples, []
    clashes = [
        (first[samples[i].id], i)
        for i in repeated
        if (samples[i].labels, samples[i].split)
        != (samples[first[samples[i].id]].labels, samples[first[samples[i].id]].split)
    ]
    if clashes:
        shown = "\n".join(
            f"    {place(a)}: {_row_text(samples[a])}\n    {place(b)}: {_row_text(samples[b])}"
            for a, b in clashes[:N_SHOWN]
        )
        raise ManifestError(
            f"{file}: {counted(len(clashes), 'path')} given twice with other labels or another "
            f"split:\n{shown}{_and_more(len(clashes))}\n  Keep one row of each path."
        )
    names = quoted(dict.fromkeys(samples[i].id for i in repeated))
    note = f"{counted(len(repeated), 'row')} dropped, for a path that was listed before: {names}."
    drop = set(repeated)
    return [s for i, s in enumerate(samples) if i not in drop], [note]


def _row_text(sample: Sample) -> str:
    labels = ", ".join("no label" if label is None else repr(label) for label in sample.labels)
    return f"{sample.id!r}: {labels or 'no label'}{f' in {sample.split}' if sample.split else ''}"


def _wrong_root_notes(samples: Sequence[Sample], root: Path) -> list[str]:
    step = max(1, len(samples) // N_PROBED)
    probed = samples[::step][:N_PROBED]
    if any(os.path.lexists(sample.file) for sample in probed):
        return []
    return [
        f"None of {counted(len(probed), 'listed file')} looked for is there, such as "
        f"{quoted([probed[0].id])}: is {root} the folder that the paths start from?"
    ]


def _and_more(n: int) -> str:
    return f" and {n - N_SHOWN:,} more" if n > N_SHOWN else ""
