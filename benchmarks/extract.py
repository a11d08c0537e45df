"""`tlpipe extract` beside a plain loop, lightly and embetter: same photographs, weights, transform.

Each side is a process of its own; the sides take turns, so that a noisy neighbour troubles all of
them. None may use a GPU, each has torch's own number of threads. The networks are EfficientNet-
Lite0 with ImageNet weights and ResNet-50 with random ones, read by every side from the same file.

- plain: ImageFolder, DataLoader and a float32 loop, as a careful user writes it;
- lightly: its LightlyDataset, and the `embed` that its command calls, with its workers: one a core;
- embetter: its ImageLoader and TimmEncoder, given the weights; it leaves BatchNorm in training
  mode, so its features are others;
- ours: the command.

Steady state leaves out start-up: of ours, what the command says that it spent on loading, planning
and choosing an engine; of the others, everything until their second batch was done. The slower
sides are given fewer photographs; whole processes are compared on the same ones.

lightly and embetter are measured where a Python has them: --lightly-python, --embetter-python. The
OpenVINO extra is measured where this script's own Python has it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
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
    print_header,
    print_table,
    run,
    spread,
    version_in,
)

# The first one needs a user's cache in which nothing is.
PARTS = ("whole", "lite0", "resnet50", "rerun", "backbones", "memory")
PACKAGES = ("torch", "torchvision", "timm", "pillow", "torchcodec", "onnxruntime", "openvino")
BATCH_SIZE = 32
PLAIN_WORKERS = (0, 2)
# Stages of the command's timings that come one after the other once it is running.
STEADY = ("waiting", "copying", "network", "stalled")
# Engines that need a package of their own.
NEEDS = {"openvino": "openvino", "onnxruntime": "onnxruntime"}


@dataclass(frozen=True)
class Network:
    """A network of the comparison.

    Attributes:
        backbone: our name for it.
        weights: our name for its weights.
        n_plain: photographs for the slower sides.
        n_ours: photographs for ours.
        at_least: what is asked of the ratio to the better of plain loop and lightly.
        with_openvino: the same, with the OpenVINO extra.
    """

    backbone: str
    weights: str
    n_plain: int
    n_ours: int
    at_least: float
    with_openvino: float


@dataclass
class Bench:
    """One run of this benchmark.

    Attributes:
        folder: scratch.
        options: of the command line.
        targets: rows of the last table: what, target, found, verdict.
    """

    folder: Path
    options: argparse.Namespace
    targets: list[list[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """No GPU, and a user's cache of this benchmark's own, which its processes share."""
        user = self.folder / "user"
        (user / "tmp").mkdir(parents=True, exist_ok=True)
        return {
            "CUDA_VISIBLE_DEVICES": "",
            "XDG_CACHE_HOME": str(user),
            "TMPDIR": str(user / "tmp"),  # where torch's compiler would put its files
        }

    def forget(self) -> None:
        """As on a machine that has never run the command."""
        shutil.rmtree(self.folder / "user", ignore_errors=True)

    @cached_property
    def photos(self) -> Path:
        """The photographs of 500×375."""
        folder = self.folder / "photos"
        make_photos(folder, self.options.images)
        return folder

    @cached_property
    def engines(self) -> list[str]:
        """Names for ``--engine``; [""] where the command has no such option."""
        option = extract_option("engine")
        names = list(getattr(option.type, "choices", ())) if option else [""]
        return [name for name in names if NEEDS.get(name) is None or find_spec(NEEDS[name])]

    def side(self, name: str, python: str = sys.executable, **arguments: Any) -> Done:
        """Run one of the functions in SIDES in a process of its own."""
        words = [python, Path(__file__), "--side", name, "--arguments", json.dumps(arguments)]
        return run(words, self.environment)

    def ours(self, data: Path, *words: str, keep: bool = False) -> Done:
        """Run `tlpipe extract` into a cache folder that is new, unless it is to be kept."""
        cache = self.folder / "cache"
        if not keep:
            shutil.rmtree(cache, ignore_errors=True)
        command = [*TLPIPE, "extract", data, *words, "--cache", cache, "--json"]
        return run(command, self.environment)

    def add_target(self, what: str, values: list[float], target: float, unit: str = "×") -> None:
        """A row of the last table; more is better of ratios, and less of what has another unit."""
        middle = statistics.median(values)
        at_least = unit in ("×", "")
        met = middle >= target if at_least else middle <= target
        sign = "≥" if at_least else "≤"
        found = f"{spread(values)}{unit and f' {unit}'}"
        self.targets.append([what, f"{sign} {target:g} {unit}".strip(), found, _verdict(met)])


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


# Steady state of one network


def compare(bench: Bench, network: Network) -> None:
    """Every side, several times, in turn; the rates of their parts; what comes out of it."""
    sides = _sides(bench, network)
    done: dict[str, list[Done]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    refused: dict[str, str] = {}
    for _ in range(bench.options.repeats):
        for name, start in sides.items():
            if name.startswith("embetter") and done[name]:
                continue  # one image at a time: it is slow, and nothing is compared with it
            one = start()
            if one.exit_code:
                refused[name] = one.complaint
            else:
                done[name].append(one)
        _measure_parts(bench, network, rates, refused)
    documents = {name: [one.document for one in ones] for name, ones in done.items()}
    steady = {name: list(map(_steady_rate, found)) for name, found in documents.items()}
    peers = [name for name in steady if name.startswith(("plain", "lightly"))]
    if not peers or refused.keys() & set(peers):
        sys.exit(f"A side that ours is compared with failed: {refused}")
    rivals = [max(values) for values in zip(*(steady[name] for name in peers), strict=True)]
    parity = _parity(bench, documents)
    print(f"\n{network.backbone}\n")
    print_table(
        ["side", "images/s, steady", "× better of peers", "whole, s", "of photos", "MB", "cosine"],
        [
            [
                name,
                spread(steady[name], 1),
                spread(_ratios(steady[name], rivals)),
                spread([one.seconds for one in ones], 1),
                f"{_n_images(documents[name][0]):,}",
                f"{statistics.median(one.peak_megabytes for one in ones):.0f}",
                parity.get(name, "—"),
            ]
            for name, ones in done.items()
        ],
    )
    print()
    print_table(["alone", "images/s"], [[name, spread(found, 1)] for name, found in rates.items()])
    for name, complaint in refused.items():
        print(f"Not measured: {name}: {complaint}")
    _judge(bench, network, steady, rivals, rates, documents)


def _sides(bench: Bench, network: Network) -> dict[str, Callable[[], Done]]:
    """Name -> what runs it once."""
    options = bench.options
    few = str(first_photos(bench.photos, min(network.n_plain, options.images)))
    many = first_photos(bench.photos, min(network.n_ours, options.images))
    card = str(_card(bench, network))
    sides: dict[str, Callable[[], Done]] = {}
    for n_workers in PLAIN_WORKERS:
        name = f"plain, {n_workers} workers"
        sides[name] = _starting(bench, "plain", name, few, card, n_workers=n_workers)
    if version := version_in(options.lightly_python, "lightly"):
        name = f"lightly {version}, {os.cpu_count()} workers"
        sides[name] = _starting(
            bench, "lightly", name, few, card, options.lightly_python, n_workers=os.cpu_count()
        )
    else:
        print(f"No lightly in {options.lightly_python}: left out (see --lightly-python).")
    version = version_in(options.embetter_python, "embetter")
    if version and json.loads(Path(card).read_text())["library"] == "timm":
        fewer = str(first_photos(bench.photos, min(96, options.images)))
        name = f"embetter {version}"
        sides[name] = _starting(bench, "embetter", name, fewer, card, options.embetter_python)
    elif version:
        print(f"embetter knows timm's networks only: left out for {network.backbone}.")
    else:
        print(f"No embetter in {options.embetter_python}: left out (see --embetter-python).")
    words = ["--backbone", network.backbone, "--weights", _weights(bench, network)]
    for engine in _engines_to_show(bench):
        sides[_ours(engine)] = _starting_ours(bench, many, [*words, *_engine_words(engine)], engine)
    return sides


def _starting(
    bench: Bench, side: str, name: str, data: str, card: str, python: str = sys.executable,
    **arguments: Any,
) -> Callable[[], Done]:  # fmt: skip
    to = str(_features_of(bench, name))
    return lambda: bench.side(side, python, data=data, card=card, to=to, **arguments)


def _starting_ours(bench: Bench, data: Path, words: list[str], engine: str) -> Callable[[], Done]:
    """A run of ours whose features are kept as the others' are."""

    def start() -> Done:
        done = bench.ours(data, *words)
        if not done.exit_code:
            to = str(_features_of(bench, _ours(engine)))
            checked(bench.side("export", store=done.document["store"], to=to))
        return done

    return start


def _features_of(bench: Bench, name: str) -> Path:
    return bench.folder / f"{name.replace(' ', '-').replace(',', '')}.npz"


def _ours(engine: str) -> str:
    return f"ours, {engine}" if engine else "ours"


def _engine_words(engine: str) -> list[str]:
    return ["--engine", engine] if engine else []


def _engines_to_show(bench: Bench) -> list[str]:
    shown = [name for name in bench.engines if name != "onnxruntime"]
    if bench.engines != [""] and "openvino" not in bench.engines:
        print("No openvino in this Python: left out.")
    return shown


def _steady_rate(document: dict[str, Any]) -> float:
    """Images a second once it runs, of a side's document or the command's."""
    if "timings" not in document:
        return float(document["images_per_second"])
    seconds = sum(document["timings"].get(stage, 0.0) for stage in STEADY)
    return float(document["n_embedded"] / seconds)


def _n_images(document: dict[str, Any]) -> int:
    return int(document.get("n_embedded", 0) or document["n_images"])


def _ratios(values: list[float], rivals: list[float]) -> list[float]:
    """Of the same turn each; a side that failed in some turns has fewer."""
    return [value / rival for value, rival in zip(values, rivals, strict=False)]


def _measure_parts(
    bench: Bench, network: Network, rates: dict[str, list[float]], refused: dict[str, str]
) -> None:
    """Decoding alone, and the network alone with each engine."""
    card = str(_card(bench, network))
    data = str(first_photos(bench.photos, min(320, bench.options.images)))
    found = checked(bench.side("decoding", data=data, card=card)).document
    for name, rate in found.items():
        rates[name].append(rate)
    for engine in [name for name in bench.engines if name != "auto"]:
        name = f"network, {engine}" if engine else "network"
        done = bench.side(
            "network", data=data, card=card, engine=engine, seconds=bench.options.seconds
        )
        if done.exit_code:
            refused[name] = done.complaint
        else:
            rates[name].append(done.document["images_per_second"])


def _parity(bench: Bench, documents: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Name -> least and median cosine to the plain loop's features of the same photographs."""
    plain = f"plain, {PLAIN_WORKERS[0]} workers"
    names = [name for name in documents if name != plain]
    paths = [str(_features_of(bench, name)) for name in [plain, *names]]
    found = checked(bench.side("cosines", paths=paths)).document
    texts = [f"{least:.5f}, median {middle:.5f}" for least, middle in found["cosines"]]
    return dict(zip(names, texts, strict=True))


def _judge(
    bench: Bench,
    network: Network,
    steady: dict[str, list[float]],
    rivals: list[float],
    rates: dict[str, list[float]],
    documents: dict[str, list[dict[str, Any]]],
) -> None:
    """Rows of the last table."""
    ours = [name for name in steady if name.startswith("ours")]
    if not ours:
        return
    best = "ours, auto" if "ours, auto" in ours else ours[0]
    with_openvino = "ours, openvino" in ours
    # What auto would take without the extra.
    plain_best = "ours, inductor" if with_openvino and "ours, inductor" in ours else best
    what = f"{network.backbone}, steady"
    ratios = _ratios(steady[plain_best], rivals)
    bench.add_target(f"{what}, {plain_best}", ratios, network.at_least)
    if with_openvino:
        ratios = _ratios(steady[best], rivals)
        bench.add_target(f"{what}, {best}, OpenVINO installed", ratios, network.with_openvino)
    engine = _engine(documents[best][0])
    forward = rates.get(f"network, {engine}" if engine else "network")
    if not forward:
        print(f"No overlap: nothing measured {engine or 'the network'} alone.")
        return
    if engine:
        print(f"The command chose {engine}.")
    n_cores = os.cpu_count() or 1
    ideals = [
        1 / (1 / rate + 1 / (decoding * n_cores))
        for rate, decoding in zip(forward, rates["our decoding, 1 thread"], strict=True)
    ]
    overlaps = _ratios(steady[best], ideals)
    bench.add_target(f"{network.backbone}, overlap, {best}", overlaps, 0.90, "")


def _engine(document: dict[str, Any]) -> str:
    """The engine that a run of the command used, as far as it says so."""
    engine = document.get("engine", "")
    return str(engine.get("name", "") if isinstance(engine, dict) else engine)


def _networks(bench: Bench) -> dict[str, Network]:
    quick = bench.options.quick
    return {
        "lite0": Network("efficientnet_lite0", "default", 64 if quick else 192, 1_000, 6, 9),
        "resnet50": Network("resnet50", "random", 64 if quick else 128, 256, 4, 4.5),
    }


def _card(bench: Bench, network: Network) -> Path:
    """What the other sides need to know: the network's name, weights and transform."""
    path = bench.folder / f"{network.backbone}.json"
    if not path.exists():
        data = first_photos(bench.photos, BATCH_SIZE)
        checked(
            bench.side(
                "card", data=str(data), backbone=network.backbone, weights=network.weights,
                to=str(path),
            )
        )  # fmt: skip
    return path


def _weights(bench: Bench, network: Network) -> str:
    """For ``--weights``: what comes with the package, or the file that every side reads."""
    if network.weights == "default":
        return "default"
    return str(json.loads(_card(bench, network).read_text())["file"])


# Whole processes


def whole(bench: Bench) -> None:
    """Start-up counts: 200 photographs, and all of them, for the first time and later."""
    options = bench.options
    card = str(_card(bench, _networks(bench)["lite0"]))
    few, many = min(200, options.images // 2), options.images
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)

    def plain(n_photos: int, n_workers: int) -> None:
        data, to = str(first_photos(bench.photos, n_photos)), str(bench.folder / "whole.npz")
        done = bench.side("plain", data=data, card=card, to=to, n_workers=n_workers)
        seconds[n_photos, f"plain, {n_workers} workers"].append(checked(done).seconds)

    def ours(n_photos: int, name: str) -> None:
        done = checked(bench.ours(first_photos(bench.photos, n_photos)))
        seconds[n_photos, f"ours, {name}"].append(done.seconds)

    for n_photos in (few, many):
        bench.forget()
        ours(n_photos, "first run ever")
    for _ in range(options.repeats):
        for n_workers in PLAIN_WORKERS:
            plain(few, n_workers)
        ours(few, "later")
    workers = {n: statistics.median(seconds[few, f"plain, {n} workers"]) for n in PLAIN_WORKERS}
    better = min(workers, key=lambda n: workers[n])
    plain(many, better)  # once: it is long enough to be its own average
    for _ in range(options.repeats):
        ours(many, "later")

    print("\nWhole processes, efficientnet_lite0\n")
    print_table(
        ["photographs", "side", "seconds"],
        [[f"{n:,}", side, spread(found, 1)] for (n, side), found in sorted(seconds.items())],
    )
    for name, at_few, at_many in (("first run ever", 1, 3), ("later", 1, 4)):
        for n_photos, target in ((few, at_few), (many, at_many)):
            rival = statistics.median(seconds[n_photos, f"plain, {better} workers"])
            ratios = [rival / one for one in seconds[n_photos, f"ours, {name}"]]
            bench.add_target(f"{n_photos:,} photographs, whole process, {name}", ratios, target)


def rerun(bench: Bench) -> None:
    """Nothing changed: how long until that is known?"""
    n_photos = 500 if bench.options.quick else 10_000
    folder = bench.folder / "small"
    make_photos(folder, n_photos, (64, 48))
    data = first_photos(folder, n_photos)
    words = ["--image-size", "32"]
    first = checked(bench.ours(data, *words))
    later = []
    for _ in range(bench.options.repeats):
        again = checked(bench.ours(data, *words, keep=True))
        assert again.document["n_decoded"] == 0, again.document
        later.append(again.seconds)
    print("\nUnchanged rerun, seconds\n")
    what = f"{n_photos:,} small photographs"
    print_table(["what", "first run", "again"], [[what, f"{first.seconds:.1f}", spread(later)]])
    bench.add_target(f"{what}, unchanged rerun", later, 3, "s")


def backbones(bench: Bench) -> None:
    """Three networks in one pass over large photographs, and in three."""
    option = extract_option("backbone")
    if not getattr(option, "multiple", False):
        print("\nSeveral backbones in one pass: not available, --backbone is taken once.")
        return
    n_photos = 20 if bench.options.quick else bench.options.large
    data = bench.folder / "large"
    make_photos(data, n_photos, (1600, 1200))
    data = first_photos(data, n_photos)
    names = ("efficientnet_lite0", "mobilenet_v3_small", "resnet18")
    one, three = [], []
    for _ in range(bench.options.repeats):
        words = [word for name in names for word in ("--backbone", name)]
        done = bench.ours(data, *words, "--weights", "random")
        if done.exit_code:
            print(f"\nSeveral backbones in one pass: not available: {done.complaint}")
            return
        one.append(done.seconds)
        three.append(
            sum(
                checked(bench.ours(data, "--backbone", name, "--weights", "random")).seconds
                for name in names
            )
        )
    print(f"\nThree backbones, {n_photos:,} photographs of 1600×1200, whole processes, seconds\n")
    print_table(["one pass", "three runs"], [[spread(one, 1), spread(three, 1)]])
    ratios = [each / once for each, once in zip(three, one, strict=True)]
    bench.add_target("three backbones in one pass against three runs", ratios, 1.5)


def memory(bench: Bench) -> None:
    """Ten times as many images must not need more memory; one engine, so that it is the same."""
    few, many = (50, 500) if bench.options.quick else (500, 5_000)
    folder = bench.folder / "small"
    make_photos(folder, many, (64, 48))
    words = ["--image-size", "64", *(_engine_words("eager") if "eager" in bench.engines else [])]
    peaks: dict[int, list[float]] = defaultdict(list)
    for _ in range(bench.options.repeats):
        for n_photos in (few, many):
            done = checked(bench.ours(first_photos(folder, n_photos), *words))
            peaks[n_photos].append(done.peak_megabytes)
    print("\nPeak memory of ours, MB\n")
    print_table(
        [f"{few:,} photographs", f"{many:,} photographs"],
        [[spread(peaks[few], 0), spread(peaks[many], 0)]],
    )
    more = [after - before for before, after in zip(peaks[few], peaks[many], strict=True)]
    bench.add_target(f"peak memory, {many:,} photographs against {few:,}", more, 100, "MB more")


# The sides; each runs in a process of its own, perhaps of another Python, and gives a document


def card(data: str, backbone: str, weights: str, to: str) -> dict[str, Any]:
    """Write a network's weights, and its transform as other libraries call it."""
    import torch

    sys.path.insert(0, str(ROOT))
    from pipeline.backbones import load_backbone

    loaded = load_backbone(backbone, weights=weights)
    preprocess = loaded.preprocess
    if weights == "random":
        _calibrate(loaded.module, data, preprocess)
    file = Path(to).with_suffix(".pth")
    torch.save(loaded.module.state_dict(), file)
    in_timm = backbone == "efficientnet_lite0"
    document = {
        "library": "timm" if in_timm else "torchvision",
        "name": "tf_efficientnet_lite0" if in_timm else backbone,
        "backbone": backbone,
        "file": str(file),
        "size": [preprocess.height, preprocess.width],
        "resize": preprocess.resize,
        "interpolation": preprocess.interpolation,
        "mean": preprocess.mean,
        "std": preprocess.std,
    }
    Path(to).write_text(json.dumps(document))
    return document


def _calibrate(network: Any, data: str, preprocess: Any) -> None:
    """Give BatchNorm the statistics of photographs: random networks blow up without."""
    import torch

    from pipeline.data.decode import decode_image

    files = sorted(Path(data).rglob("*.jpg"))
    images = [preprocess(decode_image(file.read_bytes()).pixels) for file in files]
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None  # the plain average of what it has seen
    with torch.inference_mode():
        network(preprocess.normalise(torch.stack(images)))
    for norm in norms:
        norm.eval().momentum = 0.1


def plain(data: str, card: str, to: str, n_workers: int) -> dict[str, Any]:
    """What most people write."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    description = json.loads(Path(card).read_text())
    network = _network(description).eval()
    dataset = ImageFolder(data, _transform(description))
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=n_workers)
    features, ends = [], []
    with torch.inference_mode():
        for images, _ in loader:
            features.append(network(images).numpy())
            ends.append(time.perf_counter())
    ids = [_id(path, data) for path, _ in dataset.samples]
    np.savez(to, ids=ids, features=np.concatenate(features))
    return _timed(ends, len(dataset))


def lightly(data: str, card: str, to: str, n_workers: int) -> dict[str, Any]:
    """What `lightly-embed` does, with another network and transform than it would make."""
    import numpy as np
    import torch
    from lightly.data import LightlyDataset
    from lightly.embedding import SelfSupervisedEmbedding

    description = json.loads(Path(card).read_text())
    dataset = LightlyDataset(data, transform=_transform(description))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH_SIZE, shuffle=False, num_workers=n_workers
    )
    model = torch.nn.Module()
    model.backbone = _network(description)
    ends: list[float] = []
    model.backbone.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    encoder = SelfSupervisedEmbedding(model, None, None, None)
    features, _, names = encoder.embed(loader, device=torch.device("cpu"))
    np.savez(to, ids=[Path(name).as_posix() for name in names], features=features)
    return _timed(ends, len(dataset))


def embetter(data: str, card: str, to: str) -> dict[str, Any]:
    """embetter's own pipeline; where it would download weights, it is handed ours."""
    import numpy as np
    import timm
    from embetter.vision import ImageLoader, TimmEncoder

    description = json.loads(Path(card).read_text())
    timm.create_model = lambda *_, **__: _network(description)
    encoder = TimmEncoder(description["name"])
    files = sorted(str(path) for path in Path(data).rglob("*.jpg"))
    features, ends = [], []
    for start in range(0, len(files), BATCH_SIZE):
        images = ImageLoader().fit_transform(files[start : start + BATCH_SIZE])
        features.append(encoder.transform(images))
        ends.append(time.perf_counter())
    np.savez(to, ids=[_id(file, data) for file in files], features=np.concatenate(features))
    return _timed(ends, len(files))


def decoding(data: str, card: str) -> dict[str, Any]:
    """Images a second from a file to a network's input."""
    sys.path.insert(0, str(ROOT))
    from torchvision.datasets import ImageFolder

    from pipeline.backbones.preprocess import Preprocess
    from pipeline.extract.loader import Demand, load, load_in_order

    description = json.loads(Path(card).read_text())
    preprocess = Preprocess(
        *description["size"],
        description["resize"],
        description["interpolation"],
        tuple(description["mean"]),
        tuple(description["std"]),
    )
    dataset = ImageFolder(data, _transform(description))
    files = [path for path, _ in dataset.samples]

    demand = Demand(lambda _: False, lambda pixels, _: preprocess(pixels)[None])
    load_one = partial(load, demands=[demand])

    def ours(n_threads: int) -> Iterator[Any]:
        return load_in_order(files, load_one, n_threads, 2 * BATCH_SIZE)

    def rate(items: Callable[[], Iterator[Any]]) -> float:
        next(items())  # libraries load at the first image
        started = time.perf_counter()
        n_items = sum(1 for _ in items())
        return n_items / (time.perf_counter() - started)

    n_cores = os.cpu_count() or 1
    return {
        "Pillow and transform, 1 thread": rate(lambda: (dataset[i] for i in range(len(dataset)))),
        "our decoding, 1 thread": rate(lambda: ours(1)),
        f"our decoding, {n_cores} threads": rate(lambda: ours(n_cores)),
    }


def network(data: str, card: str, engine: str, seconds: float) -> dict[str, Any]:
    """Images a second through one of our engines, from decoded pixels to stored ones."""
    sys.path.insert(0, str(ROOT))
    from pipeline.backbones import load_backbone
    from pipeline.data.decode import decode_image
    from pipeline.extract.embedder import Embedder
    from pipeline.extract.extractor import Settings

    description = json.loads(Path(card).read_text())
    backbone = load_backbone(description["backbone"], weights=description["file"])
    embedder = Embedder(backbone, Settings(**({"engine": engine} if engine else {})))
    files = sorted(Path(data).rglob("*.jpg"))[: embedder.batch_size]
    images = [backbone.preprocess(decode_image(file.read_bytes()).pixels) for file in files]
    embedder.prepare(images, n_images=100_000, preferred=None)
    for _ in range(3):
        embedder.forward(images)
    n_batches, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        embedder.forward(images)
        n_batches += 1
    return {"images_per_second": n_batches * len(images) / (time.perf_counter() - started)}


def export(store: str, to: str) -> dict[str, Any]:
    """Features of one of our stores, as the other sides leave theirs."""
    import numpy as np

    sys.path.insert(0, str(ROOT))
    from pipeline.store import open_store

    opened = open_store(store)
    np.savez(to, ids=opened.ids(), features=opened.features()[:])
    return {}


def cosines(paths: list[str]) -> dict[str, Any]:
    """Least and median cosine of each file's features to the first file's."""
    import numpy as np

    files = [np.load(path) for path in paths]
    rows = [dict(zip(file["ids"].tolist(), file["features"], strict=True)) for file in files]
    found = []
    for other in rows[1:]:
        common = sorted(set(rows[0]) & set(other))
        a, b = (np.stack([each[i] for i in common]).astype(np.float64) for each in (rows[0], other))
        values = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        found.append([values.min(), np.median(values)])
    return {"cosines": found}


def _network(description: dict[str, Any]) -> Any:
    """The network without its classifier, as its own library makes it: in training mode."""
    import torch

    state = torch.load(description["file"], weights_only=True)
    if description["library"] == "timm":
        from timm.models import create_model

        network = create_model(description["name"])
        network.load_state_dict(state)
        network.reset_classifier(0)
    else:
        import torchvision

        network = torchvision.models.get_model(description["name"])
        network.load_state_dict(state)
        network.fc = torch.nn.Identity()
    return network


def _transform(description: dict[str, Any]) -> Any:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(
                description["resize"], transforms.InterpolationMode(description["interpolation"])
            ),
            transforms.CenterCrop(description["size"]),
            transforms.ToTensor(),
            transforms.Normalize(description["mean"], description["std"]),
        ]
    )


def _id(path: str, data: str) -> str:
    return Path(path).relative_to(data).as_posix()


def _timed(ends: list[float], n_images: int) -> dict[str, Any]:
    """Rate after the second batch; the last one may be short."""
    n_left_out = min(2, len(ends) - 1)
    counted = n_images - n_left_out * BATCH_SIZE
    rate = counted / (ends[-1] - ends[n_left_out - 1])
    return {"n_images": n_images, "images_per_second": rate}


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    side.__name__: side
    for side in (card, plain, lightly, embetter, decoding, network, export, cosines)
}


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """The folder that was asked for, which is kept; else one that is not."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name).resolve()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=2_000, help="photographs of 500×375")
    parser.add_argument("--large", type=int, default=200, help="photographs of 1600×1200")
    parser.add_argument("--repeats", type=int, default=2, help="turns of every side")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each network alone")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="try it: few images, one repeat")
    parser.add_argument("--folder", type=Path, help="keep photographs and weights here")
    parser.add_argument("--lightly-python", default=sys.executable, help="a Python with lightly")
    parser.add_argument("--embetter-python", default=sys.executable, help="one with embetter")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--arguments", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.images, options.repeats, options.seconds = 100, 1, 1.0
    if unknown := set(options.only.split(",")) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    return options


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(SIDES[options.side](**json.loads(options.arguments))))
        return
    started = time.perf_counter()
    print_header("Extraction beside others: median (least–most)")
    found = [
        f"{name} {version}" for name in PACKAGES if (version := version_in(sys.executable, name))
    ]
    print(f"  versions: {', '.join(found)}\n")
    with scratch(options.folder) as folder:
        bench = Bench(folder, options)
        bench.forget()
        parts: dict[str, Callable[[], None]] = {
            **{name: lambda one=one: compare(bench, one) for name, one in _networks(bench).items()},
            **{
                part.__name__: lambda part=part: part(bench)
                for part in (whole, rerun, backbones, memory)
            },
        }
        for name in PARTS:
            if name in options.only.split(","):
                parts[name]()
        print("\nTargets\n")
        print_table(["what", "target", "found", "verdict"], bench.targets)
        print(f"\nAll of it took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
