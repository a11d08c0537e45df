"""Large JPEGs decoded exactly and at a part of their size: rate, features and accuracy.

Photographs are scikit-learn's two, enlarged with grain, or in full detail side by side. A data set
of small images is enlarged and given grain, too. Times are of one core, decoding and resizing.
"""

from __future__ import annotations

import argparse
import io
import time

import _bench
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.backbones import load_backbone
from pipeline.backbones.backbone import Backbone
from pipeline.data.builtin import FASHION_MNIST_PACKAGE
from pipeline.data.decode import FAST_MARGIN, decode_image
from pipeline.data.idx import read_idx

Pixels = NDArray[np.uint8]
Least = tuple[int, int] | None

# 2048 is twice what a resize to 256 needs at a quarter, 1024 at a half.
SIZES = [(4000, 3000), (2731, 2048), (2048, 1536), (1600, 1200), (1365, 1024)]
PARTS = [8, 4, 2]
ENLARGED_SIDE = 2048  # of a square image of the data set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=16, help="of each size and kind")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000, help="of the data set")
    arguments = parser.parse_args()
    _bench.print_header("Decoding of large JPEGs: exact and fast")
    backbone = load_backbone("efficientnet_lite0")
    photos_table(backbone, arguments.photos, arguments.repeats)
    accuracy_table(backbone, arguments.images)


def photos_table(backbone: Backbone, n_photos: int, repeats: int) -> None:
    """Rates and cosines for each size, kind of photograph and part of its size."""
    rows = []
    for width, height in SIZES:
        for kind, make in (("enlarged", enlarged), ("full detail", side_by_side)):
            rng = np.random.default_rng(0)
            files = [encode(make(rng, k % 2, width, height)) for k in range(n_photos)]
            exact = features(backbone, [prepared(backbone, file, None) for file in files])
            for part in PARTS:
                margin = height / part / min(backbone.preprocess.least_size)
                if margin < 1:
                    continue
                least = at_part(part, height, width)
                fast = features(backbone, [prepared(backbone, file, least) for file in files])
                alike = cosines(exact, fast)
                ratios = [
                    seconds(backbone, files[:4], None) / seconds(backbone, files[:4], least)
                    for _ in range(repeats)
                ]
                rows.append(
                    [
                        f"{width}×{height}",
                        kind,
                        f"{np.mean([len(file) for file in files]) / 1e6:.1f}",
                        f"1/{part}",
                        f"{margin:.2f}" + (" *" if part == default_part(margin * part) else ""),
                        _bench.spread(ratios),
                        f"{np.median(alike):.4f}",
                        f"{alike.min():.4f}",
                    ]
                )
    _bench.print_table(
        ["size", "photographs", "MB", "decoded at", "times the size needed",
         "images/s, fast : exact", "median cosine", "smallest"],
        rows,
    )  # fmt: skip
    print(f"\n* what `--decode fast` does: the least part at which {FAST_MARGIN} times are left")


def accuracy_table(backbone: Backbone, n_images: int) -> None:
    """What a linear head loses on an enlarged data set."""
    name, small, labels = data_set(n_images)
    ways: dict[str, Least] = {"exact": None}
    for part in PARTS:
        times = ENLARGED_SIDE / part / min(backbone.preprocess.least_size)
        ways[f"1/{part}, {times:g} times"] = at_part(part, ENLARGED_SIDE, ENLARGED_SIDE)
    parts: dict[str, list[NDArray[np.float32]]] = {way: [] for way in ways}
    rng = np.random.default_rng(0)
    for start in range(0, len(small), 32):
        batch = small[start : start + 32]
        files = [encode(grained(rng, blown_up(image))) for image in batch]
        for way, least in ways.items():
            images = [prepared(backbone, file, least) for file in files]
            parts[way].append(features(backbone, images))
    features_of = {way: np.concatenate(rows) for way, rows in parts.items()}
    exact = features_of["exact"]
    rows = [
        [
            way,
            percent(are_right(found, found, labels)),
            percent(are_right(exact, found, labels)),
            f"{np.median(cosines(exact, found)):.4f}",
            f"{cosines(exact, found).min():.4f}",
        ]
        for way, found in features_of.items()
    ]
    print(
        f"\n{len(labels):,} images of {name}, enlarged to {ENLARGED_SIDE}×{ENLARGED_SIDE}; "
        "logistic regression, 5 folds\n"
    )
    _bench.print_table(
        ["decoded at", "accuracy, %", "fitted on exact, %", "median cosine", "smallest"], rows
    )


def enlarged(rng: np.random.Generator, which: int, width: int, height: int) -> Pixels:
    """A random part of a photograph, with grain."""
    photo = load_sample_images().images[which]
    left, top = rng.integers(0, 240), rng.integers(0, 127)
    part = Image.fromarray(photo[top : top + 300, left : left + 400])
    return grained(rng, np.asarray(part.resize((width, height), Image.Resampling.BICUBIC)))


def side_by_side(rng: np.random.Generator, which: int, width: int, height: int) -> Pixels:
    """A photograph and its mirror images, without end, from a random point on."""
    photo = load_sample_images().images[which]
    pair = np.concatenate([photo, photo[:, ::-1]], axis=1)
    four = np.concatenate([pair, pair[::-1]], axis=0)
    rows = (rng.integers(len(four)) + np.arange(height)) % len(four)
    columns = (rng.integers(four.shape[1]) + np.arange(width)) % four.shape[1]
    return np.asarray(four[rows][:, columns])


def grained(rng: np.random.Generator, pixels: Pixels) -> Pixels:
    """The grain of a camera: the same in all channels, four grey levels deep."""
    grain = rng.normal(0, 4, pixels.shape[:2]).astype(np.float32)
    return (pixels + grain[..., None]).clip(0, 255).astype(np.uint8)


def blown_up(grey: Pixels) -> Pixels:
    """(side, side, 3) pixels of a small grey image: each becomes a square with sharp edges."""
    size = (ENLARGED_SIDE, ENLARGED_SIDE)
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.NEAREST).convert("RGB"))


def data_set(n_images: int) -> tuple[str, Pixels, NDArray[np.integer]]:
    """Name, (n, height, width) images and labels: Fashion-MNIST where Debian has installed it."""
    if FASHION_MNIST_PACKAGE.exists():
        images, labels = (
            read_idx(FASHION_MNIST_PACKAGE / f"t10k-{part}-ubyte.gz", n_dims)
            for part, n_dims in (("images-idx3", 3), ("labels-idx1", 1))
        )
        return "Fashion-MNIST", images[:n_images], labels[:n_images]
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return "digits", images[:n_images], digits.target[:n_images]


def encode(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def at_part(part: int, height: int, width: int) -> tuple[int, int]:
    """What to ask the decoder for to get 1/part of an image of this size."""
    return height // (part * FAST_MARGIN), width // (part * FAST_MARGIN)


def default_part(times: float) -> int:
    """The part that the decoder chooses where an image has so many times the size needed."""
    return next((part for part in PARTS if times >= part * FAST_MARGIN), 1)


def prepared(backbone: Backbone, file: bytes, least: Least) -> torch.Tensor:
    """(3, height, width), uint8: as a loader's thread does it."""
    return backbone.preprocess(decode_image(file, least=least).pixels)


def features(backbone: Backbone, images: list[torch.Tensor]) -> NDArray[np.float32]:
    """(n, n_features), penultimate, in float32."""
    net = backbone.feature_net(("penultimate",)).to(memory_format=torch.channels_last)
    found = []
    with torch.inference_mode():
        for batch in torch.stack(images).split(32):
            found.append(net(backbone.preprocess.normalise(batch))[0].numpy())
    return np.concatenate(found)


def cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,): of each row with its counterpart."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.asarray((first * second).sum(axis=1) / norms)


def are_right(
    fitted_on: NDArray[np.float32], scored_on: NDArray[np.float32], labels: NDArray[np.integer]
) -> NDArray[np.bool_]:
    """(n,): which images are told right by a head that has not seen them."""
    right = np.zeros(len(labels), bool)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    for train, test in folds.split(fitted_on, labels):
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        head.fit(fitted_on[train], labels[train])
        right[test] = head.predict(scored_on[test]) == labels[test]
    return right


def percent(right: NDArray[np.bool_]) -> str:
    """Accuracy with its standard error."""
    return f"{100 * right.mean():.1f} ± {100 * right.std() / len(right) ** 0.5:.1f}"


def seconds(backbone: Backbone, files: list[bytes], least: Least) -> float:
    """Of one core, for decoding and resizing; what other processes do does not count."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.process_time()
    for file in files:
        prepared(backbone, file, least)
    spent = time.process_time() - started
    torch.set_num_threads(n_threads)
    return spent


if __name__ == "__main__":
    main()
