"""What every benchmark prints above its table, and small helpers."""

from __future__ import annotations

import io
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click
    from PIL import Image

# As the command line does, and before torch is imported: threads that wait by spinning would make
# whatever else runs on the machine count double.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a benchmark measures its own checkout, installed or not
TLPIPE = [sys.executable, str(ROOT / "cli.py")]


def print_header(title: str) -> None:
    """The title, the machine and the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a file shows each table when it is there
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    print(f"{title}\n  machine: {machine()}\n  command: {shlex.join(words)}\n")


def machine() -> str:
    """Processor, cores, memory, system and Python."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{processor()}, {os.cpu_count()} cores, {memory_bytes / 2**30:.0f} GiB, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``"1.25 (1.20–1.31)"``: the median, and the smallest and largest."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


# Processes


@dataclass(frozen=True)
class Done:
    """A process that ended.

    Attributes:
        exit_code: as the shell would give it.
        output: what it printed.
        errors: what it printed to stderr.
        seconds: from its start to its end.
        peak_megabytes: the most memory that it, or one process that it started, ever had.
    """

    exit_code: int
    output: str
    errors: str
    seconds: float
    peak_megabytes: float

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document that it printed."""
        document: dict[str, Any] = json.loads(self.output)
        return document

    @property
    def complaint(self) -> str:
        """The line of stderr that says why it failed."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("Error")]
        return (errors or lines[-1:] or ["it said nothing"])[0].strip()


def run(words: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Done:
    """Run a process to its end, whatever its exit code.

    What calls this must stay small: a child's peak counts it in until it has loaded something else.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in words],
            stdout=output,
            stderr=errors,
            env={**os.environ, **(environment or {})},
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Done(
        process.returncode,
        *texts,
        seconds,
        usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3 / 1.024),
    )


def checked(done: Done) -> Done:
    """The same; a process that failed ends the benchmark."""
    if done.exit_code:
        sys.exit(f"A process failed ({done.exit_code}):\n{done.errors or done.output}")
    return done


def version_in(python: str | Path, package: str) -> str:
    """The version of a package that a Python has; "" for none."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = run([python, "-c", code])
    return "" if done.exit_code else done.output.strip()


def extract_option(name: str) -> click.Parameter | None:
    """An option of ``tlpipe extract``; None where it has none of this name."""
    from pipeline.commands.extract import command

    return next((option for option in command.params if f"--{name}" in option.opts), None)


# Photographs


def make_photos(folder: Path, n_photos: int, size: tuple[int, int] = (500, 375)) -> None:
    """JPEG files of ten classes, of about as many bytes as photographs of this size have.

    Each is another part of one of scikit-learn's two photographs, rescaled, perhaps flipped, with
    a little of a sensor's noise. The same number gives the same file; what is there is kept.

    Args:
        folder: gets ``class-0/000000.jpg``, ``class-1/000001.jpg`` and so on.
        n_photos: how many.
        size: width and height, pixels.
    """
    missing = [i for i in range(n_photos) if not photo_path(folder, i).exists()]
    for k in range(10):
        (folder / f"class-{k}").mkdir(parents=True, exist_ok=True)
    if missing:
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(_write_photo, folder, size), missing, chunksize=16))


def photo_path(folder: Path, i: int) -> Path:
    """Where `make_photos` keeps a photograph."""
    return folder / f"class-{i % 10}" / f"{i:06d}.jpg"


def first_photos(folder: Path, n_photos: int) -> Path:
    """A folder of the first ``n_photos`` of another, under the same names."""
    chosen = folder.with_name(f"{folder.name}-first-{n_photos}")
    for i in range(n_photos):
        path = photo_path(chosen, i)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.hardlink_to(photo_path(folder, i))
    return chosen


def _write_photo(folder: Path, size: tuple[int, int], i: int) -> None:
    path = photo_path(folder, i)
    aside = path.with_suffix(".part")
    aside.write_bytes(_photo(i, size))
    aside.replace(path)


def _photo(i: int, size: tuple[int, int]) -> bytes:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng([i, *size])
    whole = _sample_photos()[i % 2]
    width = rng.uniform(0.7, 1.0) * min(whole.width, whole.height * size[0] / size[1])
    height = width * size[1] / size[0]
    left, top = rng.uniform(0, whole.width - width), rng.uniform(0, whole.height - height)
    part = whole.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    pixels = np.asarray(part, np.float32)[:, :: rng.choice([1, -1])]
    pixels = pixels + rng.normal(0, 3, (*pixels.shape[:2], 1))  # of brightness: colour compresses
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@cache
def _sample_photos() -> list[Image.Image]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]
