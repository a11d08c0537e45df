"""torchvision's classification sets, with their official splits.

A set that comes as image files is used where it lies; one that comes as arrays is written out once.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.folders import absolute, ordered_by_id
from pipeline.data.names import class_folders, to_id
from pipeline.data.samples import DataSource, Sample
from pipeline.data.written import (
    is_out_of_space,
    open_written,
    write_images,
    write_marker,
    write_once,
)
from pipeline.errors import DataError, UnknownNameError

Arguments = Mapping[str, object]


@dataclass(frozen=True)
class OfficialSet:
    """How to ask ``torchvision.datasets`` for a set.

    Attributes:
        constructor: name of the class.
        splits: our split -> the arguments that select it; "" for a set without splits.
        is_downloadable: whether torchvision can still fetch it.
        folder: where below the root it lies; given where asking for a missing set would create it.
    """

    constructor: str
    splits: Mapping[str, Arguments]
    is_downloadable: bool = True
    folder: str = ""


def _flag(**more: object) -> dict[str, Arguments]:
    return {"train": {"train": True, **more}, "test": {"train": False, **more}}


def _named(**names: str) -> dict[str, Arguments]:
    return {split: {"split": name} for split, name in names.items()}


_TRAIN_TEST = _named(train="train", test="test")
_TRAIN_VAL_TEST = _named(train="train", val="val", test="test")
_WHOLE: dict[str, Arguments] = {"": {}}

SETS = {
    "Caltech101": OfficialSet("Caltech101", _WHOLE, folder="caltech101"),
    "Caltech256": OfficialSet("Caltech256", _WHOLE, folder="caltech256"),
    "CIFAR10": OfficialSet("CIFAR10", _flag()),
    "CIFAR100": OfficialSet("CIFAR100", _flag()),
    "CLEVRClassification": OfficialSet("CLEVRClassification", _TRAIN_VAL_TEST),
    "Country211": OfficialSet("Country211", _named(train="train", val="valid", test="test")),
    "DTD": OfficialSet("DTD", _TRAIN_VAL_TEST),
    "EMNIST": OfficialSet("EMNIST", _flag(split="balanced")),
    "EMNIST-byclass": OfficialSet("EMNIST", _flag(split="byclass")),
    "EMNIST-bymerge": OfficialSet("EMNIST", _flag(split="bymerge")),
    "EMNIST-digits": OfficialSet("EMNIST", _flag(split="digits")),
    "EMNIST-letters": OfficialSet("EMNIST", _flag(split="letters")),
    "EMNIST-mnist": OfficialSet("EMNIST", _flag(split="mnist")),
    "EuroSAT": OfficialSet("EuroSAT", _WHOLE),
    "FashionMNIST": OfficialSet("FashionMNIST", _flag()),
    "FER2013": OfficialSet("FER2013", _TRAIN_TEST, is_downloadable=False),
    "FGVCAircraft": OfficialSet("FGVCAircraft", _TRAIN_VAL_TEST),
    "Flowers102": OfficialSet("Flowers102", _TRAIN_VAL_TEST),
    "Food101": OfficialSet("Food101", _TRAIN_TEST),
    "GTSRB": OfficialSet("GTSRB", _TRAIN_TEST),
    "ImageNet": OfficialSet(
        "ImageNet", _named(train="train", val="val"), is_downloadable=False, folder="train"
    ),
    "Imagenette": OfficialSet("Imagenette", _named(train="train", val="val")),
    "INaturalist": OfficialSet(
        "INaturalist",
        {"train": {"version": "2021_train_mini"}, "val": {"version": "2021_valid"}},
        folder="2021_train_mini",
    ),
    "KMNIST": OfficialSet("KMNIST", _flag()),
    "MNIST": OfficialSet("MNIST", _flag()),
    "OxfordIIITPet": OfficialSet("OxfordIIITPet", _named(train="trainval", test="test")),
    "PCAM": OfficialSet("PCAM", _TRAIN_VAL_TEST),
    "Places365": OfficialSet("Places365", _named(train="train-standard", val="val")),
    "QMNIST": OfficialSet("QMNIST", _flag()),
    "RenderedSST2": OfficialSet("RenderedSST2", _TRAIN_VAL_TEST),
    "SEMEION": OfficialSet("SEMEION", _WHOLE),
    "StanfordCars": OfficialSet("StanfordCars", _TRAIN_TEST, is_downloadable=False),
    "STL10": OfficialSet("STL10", _TRAIN_TEST),
    "SUN397": OfficialSet("SUN397", _WHOLE),
    "SVHN": OfficialSet("SVHN", _TRAIN_TEST),
    "USPS": OfficialSet("USPS", _flag()),
}
"""Name -> how to ask for it. Sets for detection, video, stereo or pairs of images are not here."""

_ABSENT = (RuntimeError, OSError)
"""What torchvision raises where a set is not there, or its download fails."""

_UNREADABLE = (
    ValueError, AssertionError, EOFError, LookupError, TypeError, ImportError,
    pickle.UnpicklingError,
)  # fmt: skip
"""What it raises where a set is there, but cannot be read."""


def open_torchvision(name: str, cache_dir: Path, spec: str) -> DataSource:
    """List a torchvision set: from a folder that has it already, or else from its download.

    Folders are ``<cache>/data/torchvision`` and ``$TLPIPE_DATA``, and one called as the set in
    either.

    Raises:
        UnknownNameError: there is no such set.
        DataError: it is nowhere and cannot be downloaded, or cannot be read.
    """
    name = _known_name(name)
    written = cache_dir / "data" / name.lower()
    if written.exists():
        return open_written(written, spec, f"torchvision:{name}")
    root, splits = _find(name, cache_dir)
    listed = {split: _image_files(dataset) for split, dataset in splits.items()}
    if any(files is None for files in listed.values()):
        write_once(written, lambda folder: _write(folder, splits))
        return open_written(written, spec, f"torchvision:{name}")
    samples = [
        sample
        for split, dataset in splits.items()
        for sample in _samples_in_place(listed[split] or [], class_names(dataset), root, split)
    ]
    samples, notes = ordered_by_id(samples)
    return DataSource(
        name=name.lower(),
        spec=spec,
        root=root,
        layout=f"torchvision:{name}",
        samples=samples,
        label_columns=("label",),
        split_origin="none" if set(splits) == {""} else "given",
        notes=notes,
    )


def _known_name(name: str) -> str:
    by_lower = {known.lower(): known for known in SETS}
    by_letters = {known.replace("-", ""): known for known in by_lower}
    lower = name.strip().lower()
    found = by_lower.get(lower) or by_lower.get(by_letters.get(lower.replace("-", ""), ""))
    if found is None:
        raise UnknownNameError(
            "torchvision classification set", lower, by_lower, f"Known: {', '.join(SETS)}."
        )
    return found


def _find(name: str, cache_dir: Path) -> tuple[Path, dict[str, Any]]:
    """The root that holds a set, and its opened splits."""
    official = SETS[name]
    downloads = absolute(cache_dir / "data" / "torchvision")
    own = downloads / official.constructor
    roots = [own, downloads]
    if os.environ.get("TLPIPE_DATA"):
        shared = absolute(Path(os.environ["TLPIPE_DATA"]).expanduser())
        roots += [shared / official.constructor, shared]
    for root in roots:
        if (root / official.folder).is_dir():
            try:
                return root, _open_all(name, root)
            except _ABSENT:
                continue
    if own.exists():
        raise DataError(
            f"{own} does not hold torchvision's {name}, laid out as "
            f"torchvision.datasets.{official.constructor} expects it.\n"
            "  Put the missing files there, or remove the folder to have the set downloaded."
        )
    if not official.is_downloadable:
        raise DataError(_not_here(name, own, "torchvision cannot download it"))
    write_once(own, lambda unfinished: _download(name, unfinished, own))
    return own, _open_all(name, own)


def _open_all(name: str, root: Path, **more: object) -> dict[str, Any]:
    from torchvision import datasets

    constructor = getattr(datasets, SETS[name].constructor)
    if SETS[name].is_downloadable:
        more = {"download": False, **more}
    try:
        return {
            split: constructor(str(root), **arguments, **more)
            for split, arguments in SETS[name].splits.items()
        }
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise DataError(
            f"torchvision's {name} below {root} cannot be read: {reason}.\n"
            "  Remove it to have it downloaded again, or mend what the message names."
        ) from error


def _download(name: str, unfinished: Path, place: Path) -> None:
    try:
        # It talks on stdout, which belongs to results.
        with redirect_stdout(sys.stderr):
            _open_all(name, unfinished, download=True)
    except (*_ABSENT, DataError) as error:
        if is_out_of_space(error):
            raise
        lines = str(error.__cause__ or error).strip().splitlines()
        reason = f"its download failed: {lines[-1] if lines else type(error).__name__}"
        raise DataError(_not_here(name, place, reason)) from error


def _not_here(name: str, place: Path, reason: str) -> str:
    constructor = SETS[name].constructor
    return (
        f"torchvision's {name} is not on this machine, and {reason}\n"
        f"  Put its files, laid out as torchvision.datasets.{constructor} expects them, into\n"
        f"  {place}\n"
        "  or into the folder that the environment variable TLPIPE_DATA names."
    )


def class_names(dataset: Any) -> list[str]:
    """One name a class, unlike every other; [] where the set only has numbers.

    ImageNet gives every class a tuple of names: the first is taken, all where two classes share
    it, and the class's number is added where that does not tell them apart either.
    """
    for attribute in ("classes", "categories", "all_categories"):
        classes = getattr(dataset, attribute, None)
        if classes is not None:
            break
    else:
        return []
    synonyms = [(c,) if isinstance(c, str) else tuple(c) for c in classes]
    first = Counter(names[0] for names in synonyms)
    names = [n[0] if first[n[0]] == 1 else ", ".join(n) for n in synonyms]
    repeated = Counter(names)
    return [n if repeated[n] == 1 else f"{n} ({i})" for i, n in enumerate(names)]


def _label(target: Any, classes: Sequence[str]) -> str | None:
    if target is None:
        return None
    return classes[int(target)] if classes else str(int(target))


def _image_files(dataset: Any) -> list[tuple[str, Any]] | None:
    """(file, target) of every image, or None where the set does not come as files."""
    if type(dataset).__name__ in ("Caltech101", "Caltech256"):
        return _caltech_files(dataset)
    if type(dataset).__name__ == "INaturalist":
        return [
            (f"{dataset.root}/{dataset.all_categories[category]}/{file}", category)
            for category, file in dataset.index
        ]
    for attribute in ("_image_files", "_images"):
        files = getattr(dataset, attribute, None)
        if files is not None:
            return list(zip(map(str, files), dataset._labels, strict=True))
    for attribute in ("_samples", "samples", "imgs"):
        pairs = getattr(dataset, attribute, None)
        if pairs and isinstance(pairs[0][0], str | Path):
            return [(str(file), target) for file, target in pairs]
    return None


def _caltech_files(dataset: Any) -> list[tuple[str, Any]]:
    n_classes = type(dataset).__name__.removeprefix("Caltech")
    folder = Path(dataset.root) / f"{n_classes}_ObjectCategories"
    prefixes = [
        "image_" if n_classes == "101" else f"{i:03d}_"
        for i in range(1, len(dataset.categories) + 1)
    ]
    return [
        (str(folder / dataset.categories[y] / f"{prefixes[y]}{index:04d}.jpg"), y)
        for y, index in zip(dataset.y, dataset.index, strict=True)
    ]


def _samples_in_place(
    files: Sequence[tuple[str, Any]], classes: Sequence[str], root: Path, split: str
) -> Iterator[Sample]:
    for file, target in files:
        relative = Path(file).relative_to(root).as_posix()
        yield Sample(to_id(relative), file, (_label(target, classes),), split)


def _write(folder: Path, splits: Mapping[str, Any]) -> None:
    n_images = write_images(
        folder,
        (
            named
            for split, dataset in splits.items()
            for named in _named_images(dataset, f"{split}/" if split else "")
        ),
    )
    write_marker(folder, n_images)


def _named_images(dataset: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Images of one split, named ``<class>/<number>.png``; those without a label have no class."""
    classes = class_names(dataset)
    folders = class_folders(classes)
    for i in range(len(dataset)):
        image, target = dataset[i]
        label = _label(target, folders)
        yield f"{prefix}{'' if label is None else f'{label}/'}{i:05d}.png", image
