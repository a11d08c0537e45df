"""Folders of images: a class a folder, ``train/ val/ test/`` of class folders, or flat."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.names import IMAGE_EXTENSIONS, counted, quoted, safe_name, to_id
from pipeline.data.samples import SPLIT_ALIASES, DataSource, Sample
from pipeline.errors import DataError, EmptySourceError

IGNORED_FOLDERS = frozenset(
    ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
"""Left by systems and tools in people's folders; ignored like anything that starts with a dot."""

_EXTENSIONS = frozenset(IMAGE_EXTENSIONS)
_MANIFEST_EXTENSIONS = (".csv", ".parquet")

Above = tuple[tuple[int, int], "Above"] | tuple[()]
"""The folders above one, innermost first, as (device, inode): how a link loop is noticed."""


@dataclass
class Listing:
    """What a folder holds, or a tree of folders.

    Attributes:
        images: (path below the data root with ``/`` between its parts, file) of every image.
        folders: names of the folders directly inside, hidden ones left out.
        others: how many other files were seen, by extension.
        n_loops: how many links lead back to a folder above them.
    """

    images: list[tuple[str, str]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    n_loops: int = 0


@dataclass
class ClassTree:
    """A folder of class folders, scanned.

    Attributes:
        samples: images below class folders.
        loose: images beside the class folders, as unlabelled samples.
        empty: class folders without an image.
        others: how many other files were seen, by extension.
        n_loops: how many links lead back to a folder above them.
    """

    samples: list[Sample] = field(default_factory=list)
    loose: list[Sample] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    n_loops: int = 0


def open_folder(folder: Path, spec: str, cache_dir: Path | None = None) -> DataSource:
    """List the images of a folder, whichever of the three layouts it has.

    Args:
        folder: where the images are.
        spec: what the user typed.
        cache_dir: left out where it lies in the folder, for what it holds is ours.

    Raises:
        DataError: a folder cannot be read.
        EmptySourceError: there is no image.
    """
    root = absolute(folder)
    level = read_level(str(root))
    if cache_dir is not None and cache_dir.is_dir():
        ours = _identity(str(cache_dir))
        level.folders = [n for n in level.folders if _identity(f"{root}/{n}") != ours]
    splits = _split_folders(root, level.folders)
    source = _open_splits(root, spec, splits) if splits else _open_plain(root, spec, level)
    if splits:
        left_out = [name for name in level.folders if name not in splits]
        source.notes.extend(_left_out_of_splits(left_out, len(level.images)))
    return source


def _open_plain(root: Path, spec: str, level: Listing) -> DataSource:
    """A tree with a class a folder, or a flat folder of images without labels."""
    tree = scan_classes(str(root), level)
    notes = _tree_notes(tree)
    columns: tuple[str, ...] = ()
    if tree.samples:
        samples, layout, columns = tree.samples, "classes", ("label",)
        if tree.loose:
            notes.append(
                f"{counted(len(tree.loose), 'image')} beside the class folders left out, such as "
                f"{quoted([min(tree.loose, key=lambda s: s.id).id])}: no folder says the class."
            )
        notes += _wrapped_folder_notes(root, tree.samples)
    elif tree.loose:
        samples, layout = tree.loose, "flat"
        notes += _manifest_beside_notes(root, tree.others)
    else:
        raise EmptySourceError(_empty_text(root, tree.others))
    samples, repeated = ordered_by_id(samples)
    return DataSource(
        source_name(root), spec, root, layout, samples, columns, notes=notes + repeated
    )


def _open_splits(root: Path, spec: str, splits: dict[str, str]) -> DataSource:
    """``splits`` maps folder names to "train", "val" or "test"; labels are folder names below."""
    samples: list[Sample] = []
    notes: list[str] = []
    others: Counter[str] = Counter()
    has_classes = False
    for name, split in splits.items():
        folder = f"{root}/{name}"
        tree = scan_classes(folder, read_level(folder, f"{name}/"), f"{name}/", split)
        notes += _tree_notes(tree, f"{name}/")
        others += tree.others
        has_classes |= bool(tree.samples)
        samples += tree.samples
        if tree.loose and tree.samples:
            notes.append(
                f"{counted(len(tree.loose), 'image')} beside the class folders of {quoted([name])} "
                "left out: no folder says the class."
            )
        elif tree.loose:
            samples += tree.loose
        elif not tree.samples:
            notes.append(f"Split folder {quoted([name])} holds no image.")
    if not samples:
        raise EmptySourceError(_empty_text(root, others))
    if has_classes:
        samples = [Sample(s.id, s.file, s.labels or (None,), s.split) for s in samples]
    samples, repeated = ordered_by_id(samples)
    columns = ("label",) if has_classes else ()
    return DataSource(
        source_name(root), spec, root, "splits", samples, columns, "given", notes + repeated
    )


def _split_folders(root: Path, folders: Iterable[str]) -> dict[str, str]:
    """Which folders are splits: folder name -> split; empty where the layout is another.

    A folder called "train" beside other classes ("bus", "car", "train") is a class: it is a split
    where it holds folders itself, or where every folder beside it is named as a split too.
    """
    folders = list(folders)
    splits = {
        name: SPLIT_ALIASES[name.casefold()] for name in folders if name.casefold() in SPLIT_ALIASES
    }
    if not splits:
        return {}
    if len(splits) == len(folders):
        return splits
    trains = [name for name, split in splits.items() if split == "train"]
    has_class_folders = any(read_level(f"{root}/{name}").folders for name in trains)
    return splits if has_class_folders else {}


def scan_classes(folder: str, level: Listing, prefix: str = "", split: str = "") -> ClassTree:
    """Every image below ``folder``; the first folder on its way names its class.

    Args:
        folder: the folder of class folders.
        level: what it holds itself.
        prefix: the way from the data root to ``folder``, ending in "/", or "".
        split: the split of every sample.
    """
    above: Above = (_identity(folder), ())
    tree = ClassTree(others=level.others)
    tree.loose = [Sample(to_id(name), file, (), split) for name, file in level.images]
    for name in level.folders:
        below = read_tree(f"{folder}/{name}", f"{prefix}{name}/", above)
        labels = (to_id(name),)
        tree.samples += [Sample(to_id(path), file, labels, split) for path, file in below.images]
        tree.others += below.others
        tree.n_loops += below.n_loops
        if not below.images:
            tree.empty.append(name)
    return tree


def read_tree(folder: str, prefix: str, above: Above) -> Listing:
    """Every image in ``folder`` and below; links to folders are followed, loops are not."""
    tree = Listing()
    waiting: list[tuple[str, str, Above]] = [(folder, prefix, above)]
    while waiting:
        folder, prefix, above = waiting.pop()
        here = _identity(folder)
        if _is_above(here, above):
            tree.n_loops += 1
            continue
        level = read_level(folder, prefix)
        tree.images += level.images
        tree.others += level.others
        waiting += [
            (f"{folder}/{name}", f"{prefix}{name}/", (here, above)) for name in level.folders
        ]
    return tree


def read_level(folder: str, prefix: str = "") -> Listing:
    """What ``folder`` itself holds; images are told by their extension, nothing is opened.

    Raises:
        DataError: the folder cannot be read.
    """
    level = Listing()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                _sort_entry(entry, prefix, level)
    except OSError as error:
        raise DataError(
            f"Cannot read the folder {folder}: {error.strerror}.\n"
            "  Make it readable, or move it out of the data source."
        ) from error
    level.folders.sort()
    return level


def _sort_entry(entry: os.DirEntry[str], prefix: str, level: Listing) -> None:
    name = entry.name
    if name.startswith("."):
        return
    if _is_folder(entry):
        if name not in IGNORED_FOLDERS:
            level.folders.append(name)
        return
    dot = name.rfind(".")
    extension = name[dot:].lower() if dot > 0 else ""
    if extension in _EXTENSIONS and _is_file_or_broken_link(entry):
        level.images.append((prefix + name, entry.path))
    else:
        level.others[extension or "without extension"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file_or_broken_link(entry: os.DirEntry[str]) -> bool:
    """Not a pipe, socket or device: opening one could wait for ever."""
    try:
        if entry.is_file():
            return True
    except OSError:
        return True
    return entry.is_symlink() and not Path(entry.path).exists()


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = Path(folder).stat()
    except OSError as error:
        raise DataError(f"Cannot read the folder {folder}: {error.strerror}.") from error
    return status.st_dev, status.st_ino


def _is_above(folder: tuple[int, int], above: Above) -> bool:
    while above:
        if above[0] == folder:
            return True
        above = above[1]
    return False


def ordered_by_id(samples: Iterable[Sample]) -> tuple[list[Sample], list[str]]:
    """Samples sorted by id, each id once, and a note where some had the same.

    Two files share an id only where their names differ by Unicode composition alone.
    """
    kept: list[Sample] = []
    repeated: list[str] = []
    for sample in sorted(samples, key=lambda s: (s.id, s.file)):
        if kept and kept[-1].id == sample.id:
            repeated.append(sample.id)
        else:
            kept.append(sample)
    if not repeated:
        return kept, []
    return kept, [
        f"{counted(len(repeated), 'image')} left out, since another one has the same name but for "
        f"its Unicode composition: {quoted(repeated)}. Rename one of each two to keep both."
    ]


def absolute(folder: Path) -> Path:
    """The folder from the top of the file system; links stay links unless ``..`` is in the way."""
    return folder.resolve() if ".." in folder.parts else folder.absolute()


def source_name(folder: Path) -> str:
    """A name for the cache from a folder's; "data" is the cache's own, so its parent is added."""
    resolved = folder.resolve()
    name = safe_name(resolved.name)
    if name.casefold() == "data":
        return f"{safe_name(resolved.parent.name)}-{name}"
    return name


def _tree_notes(tree: ClassTree, prefix: str = "") -> list[str]:
    notes = []
    if tree.empty:
        empty = [prefix + name for name in tree.empty]
        notes.append(f"{counted(len(empty), 'folder')} without an image: {quoted(empty)}.")
    if tree.others and (tree.samples or tree.loose):
        n_others = sum(tree.others.values())
        where = f" in {prefix}" if prefix else ""
        notes.append(
            f"{counted(n_others, 'other file')} ignored{where} ({_extension_counts(tree.others)})."
        )
    if tree.n_loops:
        notes.append(
            f"{counted(tree.n_loops, 'link')} back to a folder above not followed: "
            "every image is listed once."
        )
    return notes


def _left_out_of_splits(folders: list[str], n_images: int) -> list[str]:
    notes = []
    if folders:
        notes.append(f"Left out, since they are not named as a split: {quoted(folders)}.")
    if n_images:
        notes.append(f"{counted(n_images, 'image')} beside the split folders left out.")
    return notes


def _wrapped_folder_notes(root: Path, samples: list[Sample]) -> list[str]:
    """A folder in a folder, as archives unpack: one class, and the real classes below it."""
    classes = {sample.labels[0] for sample in samples}
    below = {sample.id.split("/")[1] for sample in samples if sample.id.count("/") >= 2}
    if len(classes) > 1 or len(below) < 2:
        return []
    inner = root / samples[0].id.split("/")[0]
    return [f"The only class folder holds {len(below)} folders itself: did you mean {inner}?"]


def _manifest_beside_notes(root: Path, others: Counter[str]) -> list[str]:
    if not any(others[extension] for extension in _MANIFEST_EXTENSIONS):
        return []
    manifests = sorted(
        path.name for path in root.iterdir() if path.suffix.lower() in _MANIFEST_EXTENSIONS
    )
    if not manifests:
        return []
    return [
        f"No labels: the folder is flat. If {quoted(manifests)} names them, "
        "give that file as the data source."
    ]


def _extension_counts(others: Counter[str]) -> str:
    most = others.most_common(5)
    rest = sum(others.values()) - sum(n for _, n in most)
    parts = [f"{extension} {n:,}" for extension, n in most]
    return ", ".join(parts + ([f"others {rest:,}"] if rest else []))


def _empty_text(root: Path, others: Counter[str]) -> str:
    lines = [
        f"{root} holds no image.",
        f"  Looked in it and every folder below for {' '.join(IMAGE_EXTENSIONS)}, in any case.",
    ]
    if others:
        n_others = sum(others.values())
        lines.append(f"  Found {counted(n_others, 'other file')} ({_extension_counts(others)}).")
    else:
        lines.append("  Found no other file either.")
    return "\n".join(lines)
