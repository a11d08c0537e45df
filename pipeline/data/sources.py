"""From what the user typed to a list of samples."""

from __future__ import annotations

import difflib
import gc
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline.data.builtin import open_digits, open_fashion_mnist
from pipeline.data.folders import open_folder
from pipeline.data.manifest import open_manifest
from pipeline.data.names import IMAGE_EXTENSIONS
from pipeline.data.samples import DataSource
from pipeline.data.splits import limited, with_splits
from pipeline.data.torchvision_sets import open_torchvision
from pipeline.errors import UnknownNameError, UsageError

BUILTINS = ("digits", "fashion-mnist", "torchvision:NAME")
ARCHIVE_EXTENSIONS = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")


def open_source(
    spec: str,
    *,
    cache_dir: Path = Path("cache"),
    root: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
) -> DataSource:
    """List the samples of a data source; no image is opened.

    A labelled source without splits gets a test split: the same share of every class, chosen by a
    hash of each id, so that the same images are held out whatever their order. Splits that come
    with the data are kept.

    Args:
        spec: a folder with a class a folder, or with ``train/ val/ test/``, or flat; a ``.csv`` or
            ``.parquet`` manifest; "digits", "fashion-mnist", "fashion-mnist:FOLDER" or
            "torchvision:NAME". A folder that is called as a built-in is "./digits".
        cache_dir: built-in sets are written out and downloaded below ``<cache_dir>/data``.
        root: the folder that a manifest's paths are relative to; its own by default.
        limit: at most so many samples of each split, classes in proportion.
        seed: another seed holds out, and limits to, other samples.
        test_fraction: share of each class to hold out for test where none is given.

    Raises:
        UsageError: ``spec`` is no data source, or an option does not fit it.
        DataError: the source is empty, cannot be read, or contradicts itself.
    """
    if not 0 <= test_fraction < 1:
        raise UsageError(f"The test fraction is {test_fraction}; expected 0 <= fraction < 1.")
    if limit is not None and limit < 1:
        raise UsageError(f"The limit is {limit}; expected at least one sample of each split.")
    with _no_garbage_collection():
        source = with_splits(_open(spec, Path(cache_dir), root), test_fraction, seed)
        return source if limit is None else limited(source, limit, seed)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Listing makes millions of objects and no cycles: looking for some takes two fifths of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open(spec: str, cache_dir: Path, root: Path | None) -> DataSource:
    path = Path(spec).expanduser() if spec.startswith("~") else Path(spec)
    if root is not None:
        _check_root(spec, path, root)
    builtin = _open_builtin(spec, cache_dir)
    if builtin is not None:
        return builtin
    # Not Path.exists, which raises for a name that is too long to be one.
    if not spec.strip() or not os.path.exists(path):  # noqa: PTH110
        raise _unknown(spec, path)
    if path.is_dir():
        _check_not_ours(path)
        return open_folder(path, spec, cache_dir)
    if _is_manifest(path):
        return open_manifest(path, spec, root)
    raise _wrong_file(path)


def _open_builtin(spec: str, cache_dir: Path) -> DataSource | None:
    name, _, rest = spec.partition(":")
    if spec == "digits":
        source = open_digits(cache_dir)
    elif name == "fashion-mnist" and (rest or ":" not in spec):
        source = open_fashion_mnist(cache_dir, Path(rest).expanduser() if rest else None, spec)
    elif name == "torchvision" and ":" in spec:
        source = open_torchvision(rest, cache_dir, spec)
    else:
        return None
    if Path(spec).is_dir():
        note = f"This is the built-in data set; for the folder of that name, give ./{spec}"
        source = replace(source, notes=[*source.notes, note])
    return source


def _check_root(spec: str, path: Path, root: Path) -> None:
    if not _is_manifest(path):
        raise UsageError(
            f"A root was given, but {spec} is no manifest.\n"
            "  Only the paths of a .csv or .parquet manifest are relative to a root."
        )
    if not root.is_dir():
        raise UsageError(f"The root {root} is not a folder. The manifest's paths start there.")


def _is_manifest(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".parquet") and not path.is_dir()


def _check_not_ours(folder: Path) -> None:
    """A store or a run given where images belong is a slip that has its own answer."""
    shown = shlex.quote(str(folder))
    if (folder / "store.json").is_file():
        raise UsageError(
            f"{folder} is a feature store, not a data source: its images are embedded already.\n"
            f"  To fit a head on it:  tlpipe fit-head {shown}"
        )
    if (folder / "run.json").is_file():
        raise UsageError(
            f"{folder} is a run, not a data source.\n  To see it:  tlpipe inspect {shown}"
        )


def _wrong_file(path: Path) -> UsageError:
    suffix = path.suffix.lower()
    if suffix in IMAGE_EXTENSIONS:
        return UsageError(
            f"{path} is one image; a data source is a folder or a manifest of many.\n"
            f"  To classify it:  tlpipe predict RUN {shlex.quote(str(path))}\n"
            f"  To embed what lies beside it, give its folder:  {shlex.quote(str(path.parent))}"
        )
    if suffix in ARCHIVE_EXTENSIONS:
        return UsageError(
            f"{path} is an archive.\n  Unpack it, and give the folder that it unpacks to."
        )
    return UsageError(
        f"{path} is not a data source: expected a folder of images, "
        "or a manifest that ends in .csv or .parquet."
    )


def _unknown(spec: str, path: Path) -> UnknownNameError:
    """Close matches come from the built-ins and from what lies beside the path."""
    beside = difflib.get_close_matches(path.name, _visible(path.parent), n=3, cutoff=0.7)
    return UnknownNameError(
        "data source",
        spec,
        [*BUILTINS, *(str(path.parent / name) for name in beside)],
        f"No such path exists, and the built-in ones are {', '.join(BUILTINS[:-1])} and "
        f"{BUILTINS[-1]}.",
    )


def _visible(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    except (OSError, ValueError):  # no such folder, or no possible name of one
        return []
