"""Peak memory of `tlpipe extract` with few and with many images: it must not grow with them.

Images are small, so that rows gather as fast as they ever do. Each run is a process of its own
that embeds everything into a new store; runs with few and with many images alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from _bench import TLPIPE, print_header, print_table, spread
from PIL import Image

BACKBONES = {
    "raw pixels, 3,072 values": ["--backbone", "pixels:32"],
    "efficientnet_lite0 at 64 px, 1,280 values": ["--image-size", "64"],
}


def make_images(folder: Path, n_images: int) -> None:
    """Small JPEG files of ten classes."""
    rng = np.random.default_rng(0)
    for i in range(n_images):
        path = folder / f"class-{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(path)


def peak_megabytes(data: Path, words: list[str], cache: Path) -> float:
    """The most memory that a process which embeds ``data`` ever had, in MB."""
    process = subprocess.Popen(
        [*TLPIPE, "extract", str(data), *words, "--cache", str(cache), "--quiet"],
        stdout=subprocess.DEVNULL,
    )
    # This process must stay small: what is measured counts it in until the other one is loaded.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"tlpipe extract failed ({process.returncode})")
    shutil.rmtree(cache)
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)


def measure(
    folder: Path, sizes: tuple[int, int], words: list[str], repeats: int
) -> list[list[float]]:
    """Peaks in MB: for each size, one for each repeat."""
    peaks: list[list[float]] = [[], []]
    for _ in range(repeats):
        for size, found in zip(sizes, peaks, strict=True):
            found.append(peak_megabytes(folder / str(size), words, folder / "cache"))
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=1_000, help="images")
    parser.add_argument("--many", type=int, default=10_000, help="images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the peaks, nothing else")
    options = parser.parse_args()
    sizes = (options.few, options.many)
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            make_images(Path(folder) / str(size), size)
        peaks = {
            name: measure(Path(folder), sizes, words, options.repeats)
            for name, words in BACKBONES.items()
        }
    if options.json:
        print(json.dumps(peaks))
        return
    print_header("Peak memory of `tlpipe extract`, MB: median (least–most)")
    rows = []
    for name, (few, many) in peaks.items():
        more = statistics.median(many) - statistics.median(few)
        rows.append([name, spread(few, 0), spread(many, 0), f"{more:+.0f}"])
    print_table(
        ["backbone", f"{options.few:,} images", f"{options.many:,} images", "difference"], rows
    )
    print("\nTarget: a difference of less than 100 MB.")


if __name__ == "__main__":
    main()
