"""`tlpipe extract` on a GPU: whole runs beside the network alone and decoding alone.

The files are JPEG photographs of 500×375. Networks have random weights, read from a file. The
network alone is torch's own, run on images that are on the GPU already: as most people run it
(NCHW, float32), in channels-last float16, and compiled. Decoding alone is ours in threads, and
nvJPEG's in batches. The whole runs are the command with each of --decode; steady state leaves out
what it says that it spent on loading, planning and choosing an engine. The bound of a run is the
slower of decoding (of hybrid decoding: both together) and the fastest network alone.

Needs no network connection. Nothing new is begun after --budget seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _bench import (
    ROOT,
    TLPIPE,
    Done,
    checked,
    extract_option,
    first_photos,
    make_photos,
    photo_path,
    print_header,
    print_table,
    run,
)

# The most important ones first: time may run out.
NETWORKS = ("resnet50", "vit_b_16", "efficientnet_b0")
DECODERS = ("cpu", "hybrid", "gpu")
VARIANTS = ("eager, NCHW, float32", "eager, channels-last, float16", "compiled, the same")
# Stages of the command's timings that come one after the other once it is running.
STEADY = ("waiting", "copying", "network", "stalled")
CPU, GPU = "CPU threads, ours", "GPU, nvJPEG"


@dataclass
class Bench:
    """One run of this benchmark.

    Attributes:
        folder: scratch.
        options: of the command line.
        device: "cuda", or "cpu" to try the script itself.
        deadline: when nothing new is begun, on the monotonic clock.
        skipped: what was left out, and why.
        targets: rows of the last table: what, target, found, verdict.
    """

    folder: Path
    options: argparse.Namespace
    device: str
    deadline: float
    skipped: list[str] = field(default_factory=list)
    targets: list[list[str]] = field(default_factory=list)

    def has_time(self, what: str) -> bool:
        """Whether something new may begin; notes what may not."""
        if time.monotonic() < self.deadline:
            return True
        self.skipped.append(f"{what}: --budget {self.options.budget:g} is spent")
        return False

    @property
    def environment(self) -> dict[str, str]:
        """What processes keep between runs goes into the scratch folder."""
        user = self.folder / "user"
        (user / "tmp").mkdir(parents=True, exist_ok=True)
        return {"XDG_CACHE_HOME": str(user), "TMPDIR": str(user / "tmp")}

    def side(self, name: str, script: str = "gpu.py", **arguments: Any) -> Done:
        """Run a function of a benchmark in a process of its own."""
        path = ROOT / "benchmarks" / script
        words = [sys.executable, path, "--side", name, "--arguments", json.dumps(arguments)]
        return run(words, self.environment)

    def ours(self, data: Path, card: Path, *words: str) -> Done:
        """Run `tlpipe extract` into a new cache folder."""
        cache = self.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        described = json.loads(card.read_text())
        network = ["--backbone", described["backbone"], "--weights", described["file"]]
        batch = ["--batch-size", "8"] if self.options.dry_run else []
        command = [*TLPIPE, "extract", data, *network, *batch, *words, "--cache", cache, "--json"]
        return run(command, self.environment)

    def judge(self, what: str, value: float | None, at_least: float, digits: int = 2) -> None:
        """A row of the last table."""
        if value is None:
            self.targets.append([what, f"≥ {at_least:,}", "—", "not measured"])
        else:
            verdict = "met" if value >= at_least else "missed"
            self.targets.append([what, f"≥ {at_least:,}", f"{value:,.{digits}f}", verdict])


def make_copies(folder: Path, n_files: int, n_photos: int) -> None:
    """Files of ten classes, no two of the same bytes: photographs with a comment in each."""
    photos = folder.with_name("photos")
    make_photos(photos, n_photos)
    data = [photo_path(photos, i).read_bytes() for i in range(n_photos)]
    for i in range(n_files):
        path = photo_path(folder, i)
        path.parent.mkdir(parents=True, exist_ok=True)
        comment = b"\xff\xfe\x00\x0a" + i.to_bytes(8, "big")
        photo = data[i % n_photos]
        path.write_bytes(photo[:2] + comment + photo[2:])


def measure(bench: Bench) -> None:
    """Everything, and its tables."""
    data = bench.folder / "files"
    make_copies(data, bench.options.images, bench.options.photos)
    decoding = measure_decoding(bench, data)
    for network in bench.options.networks.split(","):
        if not bench.has_time(network):
            continue
        card = make_card(bench, data, network)
        alone = measure_alone(bench, card)
        whole = measure_whole(bench, data, card, network, decoding, alone)
        judge(bench, network, decoding, alone, whole)


def make_card(bench: Bench, data: Path, network: str) -> Path:
    """The network's weights in a file, and how it is called."""
    path = bench.folder / f"{network}.json"
    few = str(first_photos(data, min(32, bench.options.images)))
    arguments = {"data": few, "backbone": network, "weights": "random", "to": str(path)}
    checked(bench.side("card", "extract.py", **arguments))
    return path


def measure_decoding(bench: Bench, data: Path) -> dict[str, float]:
    """Images a second of decoding alone, by what decodes."""
    n_files = min(4_000, bench.options.images)
    files = [str(photo_path(data, i)) for i in range(n_files)]
    found: dict[str, float] = {}
    rows = []
    for name, arguments in ((CPU, {"device": "cpu"}), (GPU, {"device": "cuda"})):
        done = bench.side("decoding", files=files, **arguments)
        if done.exit_code:
            rows.append([name, "not available"])
            bench.skipped.append(f"decoding alone, {name}: {done.complaint}")
        else:
            found[name] = done.document["images_per_second"]
            rows.append([name, f"{found[name]:,.0f}"])
    print("Decoding alone\n")
    print_table(["decoder", "images/s"], rows)
    return found


def measure_alone(bench: Bench, card: Path) -> dict[str, tuple[float, float]]:
    """Images a second and peak GPU memory in MB of the network alone, by variant."""
    found: dict[str, tuple[float, float]] = {}
    for variant in VARIANTS:
        what = f"{card.stem} alone, {variant}"
        if not bench.has_time(what):
            continue
        done = bench.side(
            "alone", card=str(card), variant=variant, device=bench.device,
            batch_size=2 if bench.options.dry_run else 256, seconds=bench.options.seconds,
        )  # fmt: skip
        if done.exit_code:
            bench.skipped.append(f"{what}: {done.complaint}")
        else:
            found[variant] = (done.document["images_per_second"], done.document["peak_megabytes"])
    return found


@dataclass(frozen=True)
class Whole:
    """A run of the command.

    Attributes:
        images_per_second: steady state.
        engine: what ran the network.
        seconds: of the whole process.
        peak_megabytes: of GPU memory; None where it is not known.
        least_cosine: to the features of the CPU in float32; None where that was not measured.
    """

    images_per_second: float
    engine: str
    seconds: float
    peak_megabytes: float | None
    least_cosine: float | None


def measure_whole(
    bench: Bench,
    data: Path,
    card: Path,
    network: str,
    decoding: dict[str, float],
    alone: dict[str, tuple[float, float]],
) -> dict[str, Whole]:
    """Runs of the command, by how they decode; prints the network's tables."""
    fastest = max((rate for rate, _ in alone.values()), default=None)
    rows = [
        [name, f"{rate:,.0f}", "", "", "", f"{peak:,.0f}", ""]
        for name, (rate, peak) in alone.items()
    ]
    exact = exact_features(bench, data, card)
    found: dict[str, Whole] = {}
    for decoder in DECODERS:
        one = measure_one(bench, data, card, decoder, exact)
        if isinstance(one, str):
            rows.append([f"whole, --decode {decoder}", "not available", *[""] * 5])
            bench.skipped.append(f"{network}, whole, --decode {decoder}: {one}")
            continue
        found[decoder] = one
        bound = bound_of(decoder, decoding, fastest)
        rows.append(
            [
                f"whole, --decode {decoder}, {one.engine}",
                f"{one.images_per_second:,.0f}",
                f"{one.images_per_second / fastest:.2f}" if fastest else "—",
                f"{one.images_per_second / bound:.2f}" if bound else "—",
                f"{one.seconds:.1f}",
                "—" if one.peak_megabytes is None else f"{one.peak_megabytes:,.0f}",
                "—" if one.least_cosine is None else f"{one.least_cosine:.5f}",
            ]
        )
    print(f"\n{network}\n")
    columns = ["what", "images/s", "of fastest alone", "of bound", "process, s", "GPU MB", "cosine"]
    print_table(columns, rows)
    return found


def exact_features(bench: Bench, data: Path, card: Path) -> Path | None:
    """Features of the first photographs on the CPU in float32; None without time for them."""
    what = f"{card.stem} on the CPU"
    if not bench.has_time(what):
        return None
    few = first_photos(data, min(128, bench.options.images))
    engine = ["--engine", "eager"] if extract_option("engine") else []
    done = bench.ours(few, card, "--device", "cpu", "--precision", "fp32", *engine)
    if done.exit_code:
        bench.skipped.append(f"{what}: {done.complaint}")
        return None
    path = bench.folder / "exact.npz"
    checked(bench.side("export", "extract.py", store=done.document["store"], to=str(path)))
    return path


def measure_one(
    bench: Bench, data: Path, card: Path, decoder: str, exact: Path | None
) -> Whole | str:
    """One run of the command; or why it is not to be had."""
    if time.monotonic() > bench.deadline:
        return f"--budget {bench.options.budget:g} is spent"
    option = extract_option("decode")
    known = getattr(option.type, "choices", (decoder,)) if option else ("cpu",)
    if decoder not in known:
        return f"tlpipe extract has no --decode {decoder}"
    words = ["--device", bench.device, *(["--decode", decoder] if option else [])]
    with watching_memory() as peak:
        done = bench.ours(data, card, *words)
    if done.exit_code:
        return done.complaint
    document = done.document
    seconds = sum(document["timings"].get(stage, 0.0) for stage in STEADY)
    engine = document.get("engine") or "the command's engine"
    least = None
    if exact is not None:
        path = bench.folder / "whole.npz"
        checked(bench.side("export", "extract.py", store=document["store"], to=str(path)))
        paths = [str(exact), str(path)]
        least = checked(bench.side("cosines", "extract.py", paths=paths)).document["cosines"][0][0]
    return Whole(
        document["n_embedded"] / seconds,
        str(engine.get("name") if isinstance(engine, dict) else engine),
        done.seconds,
        peak[0] if peak else None,
        least,
    )


def bound_of(decoder: str, decoding: dict[str, float], fastest: float | None) -> float | None:
    """Images a second that a run cannot pass; None where a part of it was not measured."""
    names = {"cpu": [CPU], "gpu": [GPU], "hybrid": [CPU, GPU]}[decoder]
    if fastest is None or not set(names) <= decoding.keys():
        return None
    return min(fastest, sum(decoding[name] for name in names))


def judge(
    bench: Bench,
    network: str,
    decoding: dict[str, float],
    alone: dict[str, tuple[float, float]],
    whole: dict[str, Whole],
) -> None:
    """Rows of the last table; the run with the best decoding counts."""
    fastest = max((rate for rate, _ in alone.values()), default=None)
    best = max(whole, key=lambda decoder: whole[decoder].images_per_second, default=None)
    rate = whole[best].images_per_second if best else None
    if network == "vit_b_16":
        share = rate / fastest if rate and fastest else None
        bench.judge("vit_b_16, whole against the network alone", share, 0.95)
    if network == "resnet50":
        bound = bound_of(best, decoding, fastest) if best else None
        share = rate / bound if rate and bound else None
        bench.judge("resnet50, whole against min(decoding, network)", share, 0.85)
        bench.judge("resnet50, whole, images/s (on an H200 with 16 cores)", rate, 12_000, 0)
    for decoder, one in whole.items():
        what = f"{network}, --decode {decoder}, least cosine to the CPU"
        bench.judge(what, one.least_cosine, 0.999, 5)


@contextmanager
def watching_memory() -> Iterator[list[float]]:
    """The most GPU memory, in MB, that was used at a time, over what was used before.

    The list stays empty where nvidia-smi is not to be had.
    """
    peak: list[float] = []
    before = _used_megabytes()
    stop = threading.Event()

    def watch() -> None:
        while before is not None and not stop.wait(0.1):
            used = _used_megabytes()
            if used is not None:
                peak[:] = [max(used - before, *peak)] if peak else [used - before]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _used_megabytes() -> float | None:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    # Of the first GPU, in MiB; the command uses no other.
    first = done.stdout.split()[0]
    return float(first) * 1.048576 if first.isdigit() else None


# The sides; each runs in a process of its own and gives a document


def decoding(files: list[str], device: str) -> dict[str, Any]:
    """Images a second from files to pixels: in our threads with the resize, or by nvJPEG."""
    from collections import deque

    if device == "cpu":
        from pipeline.backbones.preprocess import Preprocess
        from pipeline.extract.loader import Demand, load, load_in_order

        preprocess = Preprocess(224, 224, 256)
        demands = [Demand(lambda _: False, lambda pixels, _: preprocess(pixels)[None])]

        def decode_all(chosen: list[str]) -> None:
            n_threads = os.cpu_count() or 1
            stream = load_in_order(chosen, lambda file: load(file, demands), n_threads, 512)
            deque(stream, maxlen=0)

    else:
        import torch
        from torchcodec.decoders import decode_jpeg

        def decode_all(chosen: list[str]) -> None:
            for start in range(0, len(chosen), 128):
                batch = [Path(file).read_bytes() for file in chosen[start : start + 128]]
                decode_jpeg(batch, mode="RGB", device=device)
            torch.cuda.synchronize()

    decode_all(files[:256])  # libraries load, buffers grow
    started = time.perf_counter()
    decode_all(files)
    return {"images_per_second": len(files) / (time.perf_counter() - started)}


def alone(card: str, variant: str, device: str, batch_size: int, seconds: float) -> dict[str, Any]:
    """Images a second through torchvision's network, on images that are on the device."""
    import torch
    import torchvision

    described = json.loads(Path(card).read_text())
    network = torchvision.models.get_model(described["name"])
    network.load_state_dict(torch.load(described["file"], weights_only=True))
    for classifier in ("fc", "heads", "classifier"):
        if hasattr(network, classifier):
            setattr(network, classifier, torch.nn.Identity())
    on_gpu = device == "cuda"
    half = torch.float16 if on_gpu else torch.bfloat16
    dtype = torch.float32 if variant == VARIANTS[0] else half
    layout = torch.contiguous_format if variant == VARIANTS[0] else torch.channels_last
    network = network.eval().requires_grad_(False).to(device, dtype, memory_format=layout)
    images = torch.randn(batch_size, 3, *described["size"], device=device)
    images = images.to(dtype, memory_format=layout)
    model: Any = network
    if variant == VARIANTS[2]:
        # Trying the script itself on a CPU is not worth a compiler's minutes.
        how = {"mode": "reduce-overhead"} if on_gpu else {"backend": "eager"}
        model = torch.compile(network, dynamic=False, **how)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    with torch.inference_mode():
        for _ in range(5 if on_gpu else 1):
            model(images)
        wait()
        n_batches, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(4 if on_gpu else 1):  # else waiting for the clock would show
                model(images)
                n_batches += 1
            wait()
        rate = n_batches * batch_size / (time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else 0.0
    return {"images_per_second": rate, "peak_megabytes": peak}


SIDES: dict[str, Callable[..., dict[str, Any]]] = {"decoding": decoding, "alone": alone}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=30_000, help="files")
    parser.add_argument("--photos", type=int, default=1_000, help="different photographs in them")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of torchvision")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each network alone")
    parser.add_argument("--budget", type=float, default=400, help="nothing new begins after it")
    parser.add_argument("--dry-run", action="store_true", help="try the script itself on the CPU")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--arguments", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry_run:
        options.images, options.photos, options.seconds = 20, 10, 0.1
        options.budget = float("inf")
    return options


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(SIDES[options.side](**json.loads(options.arguments))))
        return
    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        print("No CUDA device: nothing is measured. To try the script itself:  --dry-run")
        return
    started = time.monotonic()
    print_header("Extraction on a GPU")
    device = "cpu" if options.dry_run else "cuda"
    name = "none (dry run)" if options.dry_run else torch.cuda.get_device_name()
    print(f"  GPU: {name}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder).resolve(), options, device, started + options.budget)
        measure(bench)
    for line in bench.skipped:
        print(f"Not measured: {line}")
    print("\nTargets\n")
    print_table(["what", "target", "found", "verdict"], bench.targets)
    print(f"\nAll of it took {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
