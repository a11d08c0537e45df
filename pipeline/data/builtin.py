"""Data sets that need no download: scikit-learn's digits and Fashion-MNIST."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.folders import absolute
from pipeline.data.idx import read_idx
from pipeline.data.names import class_folders
from pipeline.data.samples import DataSource
from pipeline.data.written import (
    is_out_of_space,
    open_written,
    write_images,
    write_marker,
    write_once,
)
from pipeline.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

FASHION_MNIST_PACKAGE = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files."""

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_IDX_PREFIXES = {"train": "train", "test": "t10k"}


def open_digits(cache_dir: Path) -> DataSource:
    """scikit-learn's 1,797 handwritten digits, as grey images of 8×8 pixels."""
    folder = cache_dir / "data" / "digits"
    write_once(folder, _write_digits)
    return open_written(folder, "digits", "digits")


def _write_digits(folder: Path) -> None:
    from PIL.Image import fromarray
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Ink is 0..16.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    n_images = write_images(
        folder,
        (
            (f"{label}/{i:04d}.png", fromarray(image))
            for i, (image, label) in enumerate(zip(pixels, digits.target, strict=True))
        ),
    )
    write_marker(folder, n_images)


def open_fashion_mnist(cache_dir: Path, folder: Path | None, spec: str) -> DataSource:
    """Zalando's 60,000 + 10,000 pictures of clothes, as grey images of 28×28 pixels.

    Args:
        cache_dir: the images are written below it once.
        folder: holds the four IDX files, plain or gzipped; None looks in the usual places.
        spec: what the user typed.

    Raises:
        DataError: the files are nowhere, or damaged.
        UsageError: ``folder`` does not hold them.
    """
    name = "fashion-mnist"
    if folder is not None:
        _check_has_idx_files(folder)
        name = f"fashion-mnist-{_files_digest(folder)}"
    written = cache_dir / "data" / name

    def build(unfinished: Path) -> None:
        source = folder or _find_fashion_mnist(cache_dir)
        n_images = write_images(unfinished, _fashion_mnist_images(source))
        write_marker(unfinished, n_images)

    write_once(written, build)
    return open_written(written, spec, "fashion-mnist")


def _fashion_mnist_images(source: Path) -> Iterator[tuple[str, Image]]:
    from PIL.Image import fromarray

    folders = class_folders(FASHION_MNIST_CLASSES)
    for split, prefix in _IDX_PREFIXES.items():
        images_file = _idx_file(source, f"{prefix}-images-idx3-ubyte")
        labels_file = _idx_file(source, f"{prefix}-labels-idx1-ubyte")
        images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
        if len(images) != len(labels):
            raise DataError(
                f"{images_file} holds {len(images):,} images, but {labels_file} {len(labels):,} "
                "labels.\n  Fetch the four files again, from one place."
            )
        if len(labels) and labels.max() >= len(folders):
            raise DataError(
                f"{labels_file} holds the label {labels.max()}; expected 0 to {len(folders) - 1}."
            )
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            yield f"{split}/{folders[label]}/{i:05d}.png", fromarray(image)


def _find_fashion_mnist(cache_dir: Path) -> Path:
    """The first usual place with all four files, or else torchvision's download."""
    downloads = cache_dir / "data" / "torchvision"
    places = [FASHION_MNIST_PACKAGE, downloads / "FashionMNIST" / "FashionMNIST" / "raw"]
    for root in (downloads, os.environ.get("TLPIPE_DATA")):
        if root:
            places.append(Path(root) / "FashionMNIST" / "raw")
    for place in places:
        if not _missing_idx_files(place):
            return place
    _download_fashion_mnist(downloads / "FashionMNIST")
    return downloads / "FashionMNIST" / "FashionMNIST" / "raw"


def _download_fashion_mnist(folder: Path) -> None:
    def build(unfinished: Path) -> None:
        from torchvision.datasets import FashionMNIST

        try:
            # It talks on stdout, which belongs to results.
            with redirect_stdout(sys.stderr):
                FashionMNIST(unfinished, download=True)
        except (RuntimeError, OSError) as error:
            if is_out_of_space(error):
                raise
            raise DataError(
                f"Fashion-MNIST is not on this machine, and its download failed:\n"
                f"  {str(error).strip().splitlines()[-1]}\n"
                "  On Debian and Ubuntu:  apt install dataset-fashion-mnist\n"
                "  Or put its four files into a folder (train-images-idx3-ubyte.gz, "
                "train-labels-idx1-ubyte.gz,\n  t10k-images-idx3-ubyte.gz, "
                "t10k-labels-idx1-ubyte.gz) and name it:  fashion-mnist:FOLDER"
            ) from error

    write_once(folder, build)


def _idx_file(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"


def _idx_files(folder: Path) -> list[Path]:
    return [
        _idx_file(folder, f"{prefix}-{kind}-ubyte")
        for prefix in _IDX_PREFIXES.values()
        for kind in ("images-idx3", "labels-idx1")
    ]


def _missing_idx_files(folder: Path) -> list[str]:
    return [file.name for file in _idx_files(folder) if not file.is_file()]


def _check_has_idx_files(folder: Path) -> None:
    missing = _missing_idx_files(folder)
    if missing:
        raise UsageError(
            f"{folder} does not hold Fashion-MNIST: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not there.\n"
            "  Expected its four files, gzipped or not."
        )


def _files_digest(folder: Path) -> str:
    """Tells one folder of files from another, and from itself once a file has changed."""
    facts = [str(absolute(folder))]
    for file in _idx_files(folder):
        status = file.stat()
        facts.append(f"{file.name}:{status.st_size}:{status.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogatepass")).hexdigest()[:8]
