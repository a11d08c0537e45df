"""Which engine computes a job: the fastest that pays for its build and gives the right features."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch

from pipeline.extract.engines.artefacts import is_kept
from pipeline.extract.engines.eager import EagerEngine
from pipeline.extract.engines.engine import Engine, EngineError, Work, not_installed
from pipeline.extract.engines.memo import Memo
from pipeline.extract.half import MIN_COSINE, ends_of_float32, min_cosine

AUTO = "auto"

FP32_COSINE = 0.9999
"""What an engine is to keep of every layer of eager float32 where float32 was promised."""

# What was measured on a busy machine, or failed for want of a compiler, is tried again in the end.
_REMEMBERED_SECONDS = 30 * 24 * 3600

# Standard deviation of pixels, of 255. Blank images, whose features are small differences of large
# numbers, are no measure of an engine.
_MIN_CONTRAST = 4.0
_MIN_BATCHES = 4
_N_TIMED = 3
_SLOW_SECONDS = 1.0
_FIGURES = ("images_per_second", "parity")


@dataclass(frozen=True)
class Offer:
    """An engine that can be had.

    The figures are of EfficientNet-Lite0 and ResNet-50 on two cores; once an engine was measured
    for a network, what was measured counts.

    Attributes:
        make: builds the engine; raises `EngineError`.
        package: that it needs; "" for none.
        extra: of tlpipe, which installs it.
        build_seconds: what building costs the first time.
        kept_seconds: what it costs when its artefact is there.
        speedup: images a second in relation to eager, by kind of device and precision; where a
            device or a precision is missing, it is not tried.
    """

    make: Callable[[Work], Engine]
    package: str = ""
    extra: str = ""
    build_seconds: float = 0.0
    kept_seconds: float = 0.0
    speedup: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def is_installed(self) -> bool:
        """Whether its package is there; does not import it."""
        return not self.package or find_spec(self.package) is not None


def _from(module: str, name: str) -> Callable[[Work], Engine]:
    """Builds an engine whose module is imported only then."""

    def make(work: Work) -> Engine:
        found = getattr(import_module(f"pipeline.extract.engines.{module}"), name)
        return cast("Engine", found(work))

    return make


OFFERS: dict[str, Offer] = {
    "eager": Offer(EagerEngine),
    "inductor": Offer(
        _from("inductor", "InductorEngine"),
        build_seconds=30.0,
        kept_seconds=2.0,
        speedup={
            ("cpu", "fp32"): 1.2,
            ("cpu", "bf16"): 1.2,
            ("cuda", "fp32"): 1.2,
            ("cuda", "bf16"): 1.3,
            ("cuda", "fp16"): 1.3,
        },
    ),
    "onnxruntime": Offer(
        _from("onnx_runtime", "OnnxRuntimeEngine"),
        package="onnxruntime",
        extra="onnx",
        build_seconds=6.0,
        kept_seconds=0.5,
        speedup={("cpu", "fp32"): 1.8, ("cpu", "bf16"): 1.1},
    ),
    "openvino": Offer(
        _from("openvino", "OpenVinoEngine"),
        package="openvino",
        extra="openvino",
        build_seconds=3.0,
        kept_seconds=0.7,
        speedup={("cpu", "fp32"): 1.8, ("cpu", "bf16"): 1.6},
    ),
}


@dataclass
class Choice:
    """An engine, and how it was come by.

    Attributes:
        engine: ready to run.
        work: what it computes.
        notes: what a user should know of it, a sentence each.
        figures: for provenance.
    """

    engine: Engine
    work: Work
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def choose_engine(
    work: Work,
    images: torch.Tensor,
    n_images: int,
    *,
    asked: str = AUTO,
    preferred: Mapping[str, Any] | None = None,
    offers: Mapping[str, Offer] = OFFERS,
) -> Choice:
    """Choose and build the engine for a job.

    Args:
        work: what to compute.
        images: (n, height, width, 3) uint8, n ≤ batch_size: the first images of the job.
        n_images: how many there are in all.
        asked: "auto" or the name of an engine.
        preferred: the figures of an earlier choice, which the same features have to come from: it
            is taken without a probe where it can be built, and is of the same version.
        offers: engines by name.

    Raises:
        EngineError: the engine that was asked for is not there or does not give the features of
            float32.
    """
    notes: list[str] = []
    if preferred:
        work = _as_before(preferred, work)
        name = str(preferred.get("name"))
        if asked in (AUTO, name):
            try:
                engine = _offer(name, offers).make(work)
                if engine.details.get("version") != preferred.get("version"):
                    chooser = _Chooser(work, images, n_images, offers)
                    engine, work = chooser.only(name), chooser.work
                told = {key: preferred.get(key) for key in (*_FIGURES, "tried")}
                return Choice(engine, work, [], {**_named(engine, work), **told})
            except EngineError as error:
                if asked != AUTO:
                    raise
                why = str(error).splitlines()[0]
                notes = [f"What was embedded so far was computed by {name}. {why}"]
        else:
            notes = [f"What was embedded so far was computed by {name}; {asked} goes on."]
    chooser = _Chooser(work, images, n_images, offers)
    engine = chooser.best() if asked == AUTO else chooser.only(asked)
    if notes and asked == AUTO:
        notes = [f"{notes[0]} {engine.name} goes on."]
    return Choice(
        engine,
        chooser.work,
        notes + chooser.notes,
        {**_named(engine, chooser.work), **chooser.figures_of(engine.name), "tried": chooser.tried},
    )


def check_installed(asked: str) -> None:
    """Refuse an engine that cannot be had, before any image is read.

    Raises:
        EngineError: there is none of that name, or its package is missing.
    """
    if asked != AUTO and not (offer := _offer(asked, OFFERS)).is_installed:
        raise not_installed(asked, offer.extra)


class _Chooser:
    """One choice.

    Attributes:
        work: what to compute; with more of it in float32 where these images need that.
        memo: what is known of the network.
        tried: what was measured now, by engine.
        notes: why an engine was not taken.
    """

    def __init__(
        self, work: Work, images: torch.Tensor, n_images: int, offers: Mapping[str, Offer]
    ) -> None:
        self.work = work
        self.n = len(images)
        self.n_images = n_images
        self.offers = offers
        self.memo = Memo(work.key)
        self.tried: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._batch = torch.zeros(work.batch_shape, dtype=torch.uint8)
        self._batch[: self.n] = images
        self._batch = self._batch.to(work.device)
        contrast = images.float().flatten(1).std(dim=1)
        shows_something = (contrast >= _MIN_CONTRAST).nonzero()[:, 0]
        self._is_blank = len(shows_something) == 0
        self._judged = shows_something
        self._expected: tuple[torch.Tensor, ...] = ()

    def only(self, name: str) -> Engine:
        """The engine that was asked for.

        Raises:
            EngineError: see `choose_engine`.
        """
        eager = self._eager()
        if name == "eager" or self._is_blank:
            return eager if name == "eager" else _offer(name, self.offers).make(self.work)
        engine = _offer(name, self.offers).make(self.work)
        parity = self._parity(engine)
        if not self._is_right(parity):
            raise EngineError(f"{self._refuse(name, parity)}\n  Use --engine auto or eager.")
        self._learn(name, {**self.figures_of(name), "parity": parity})
        return engine

    def best(self) -> Engine:
        """The fastest engine that pays; eager where none does."""
        eager = self._eager()
        candidates = self._candidates()
        is_small = self.n_images < _MIN_BATCHES * self.work.batch_size
        if not candidates or is_small or self._is_blank or len(self._batch) < self.work.batch_size:
            return eager
        try:
            return self._fastest(eager, candidates)
        except torch.OutOfMemoryError:
            self.notes.append(f"{self.work.device} has too little memory to compare engines.")
            return eager

    def _eager(self) -> Engine:
        """Eager, with as much of the network in float32 as these images need.

        The probe that chose how much that is cannot know every kind of image.
        """
        work, make = self.work, _offer("eager", self.offers).make
        engine = make(work)
        if work.precision == "fp32" or self._is_blank:
            return engine
        parity = self._parity_in_memory(engine)
        self._learn("eager", {"parity": parity})
        if parity >= MIN_COSINE:
            return engine
        ends = ends_of_float32(work.net, (), torch.zeros(1, 3, *work.batch_shape[1:3]))
        for until in ends[ends.index(work.until) + 1 :] if work.until in ends else ():
            engine = make(replace(work, until=until))
            found = self._parity(engine)
            if found >= MIN_COSINE:
                self.work = replace(work, until=until)
                self._learn("eager", {"parity": found})
                break
        else:
            self.work = replace(work, precision="fp32", until="")
            engine = make(self.work)
            self._learn("eager", {"parity": 1.0})
        kept = f"everything before {self.work.until}" if self.work.until else "the whole network"
        self.notes.append(
            f"On these images {work.precision} falls to a cosine of {parity:.4f} to float32: "
            f"{kept} is computed in float32."
        )
        return engine

    def _parity_in_memory(self, engine: Engine) -> float:
        """The same as `_parity`, of fewer images where a GPU has no memory for a whole batch."""
        while True:
            try:
                return self._parity(engine)
            except torch.OutOfMemoryError:
                if len(self._batch) == 1:
                    raise
            self._batch = self._batch[: len(self._batch) // 2]
            self.n = min(self.n, len(self._batch))
            self._judged = self._judged[self._judged < self.n]
            self._expected = ()

    def _fastest(self, eager: Engine, candidates: list[str]) -> Engine:
        """The fastest of eager and those candidates that pay."""
        rate = self.figures_of("eager")["images_per_second"]
        if not rate:
            rate = self._rate(_seconds([eager], self._batch, n_timed=1)[0])
            self._learn("eager", {"images_per_second": rate})
        eager_seconds = self.work.batch_size / rate
        best, best_seconds = eager, eager_seconds
        for name in candidates:
            if not self._pays(name, best_seconds, eager_seconds):
                continue
            try:
                engine = self.offers[name].make(self.work)
                parity = self._parity(engine)
            except EngineError as error:
                if not isinstance(error.__cause__, OSError):  # a full disk may not be full again
                    self._learn(name, {"failed": str(error).splitlines()[0]})
                self.notes.append(f"{str(error).splitlines()[0]} {best.name} computes.")
                continue
            if not self._is_right(parity):
                self.notes.append(f"{self._refuse(name, parity)} {best.name} computes.")
                continue
            # Side by side: decoding may run beside both, or beside neither.
            best_seconds, seconds = _seconds([best, engine], self._batch)
            if best is eager:
                self._learn("eager", {"images_per_second": self._rate(best_seconds)})
            self._learn(name, {"parity": parity, "images_per_second": self._rate(seconds)})
            if seconds < best_seconds:
                best, best_seconds = engine, seconds
        return best

    def figures_of(self, name: str) -> dict[str, Any]:
        """What is known of an engine, from now or from before; None for what is not."""
        known = self._known().get(name, {})
        return {key: known.get(key) for key in _FIGURES}

    def _candidates(self) -> list[str]:
        """Engines other than eager that could compute this, the most promising first."""
        speedups = {
            name: self._speedup(name)
            for name, offer in self.offers.items()
            if offer.is_installed and self._speedup(name) > 1
        }
        return sorted(speedups, key=lambda name: -speedups[name])

    def _speedup(self, name: str) -> float:
        """Over eager: as measured, else as expected; 0 where it cannot or may not compute this."""
        expected = self.offers[name].speedup.get((self.work.device.type, self.work.precision), 0.0)
        known = self._known()
        if name not in known or not expected:
            return expected
        measured = known[name]
        if "failed" in measured:
            return 0.0
        rates = [known.get(one, {}).get("images_per_second") or 0 for one in (name, "eager")]
        return float(rates[0] / rates[1]) if all(rates) else expected

    def _pays(self, name: str, best_seconds: float, eager_seconds: float) -> bool:
        """Whether an engine is expected to save more than building it costs."""
        offer = self.offers[name]
        cost = offer.kept_seconds if is_kept(name, self.work) else offer.build_seconds
        saved_in_a_batch = best_seconds - eager_seconds / self._speedup(name)
        return saved_in_a_batch * self.n_images / self.work.batch_size > cost

    def _parity(self, engine: Engine) -> float:
        """The worst cosine of any layer of any of the images to eager float32."""
        found = [output[self._judged].clone() for output in engine(self._batch)]
        if not self._expected:
            exact = _offer("eager", OFFERS).make(replace(self.work, precision="fp32", until=""))
            self._expected = tuple(output[self._judged].clone() for output in exact(self._batch))
        return min_cosine(found, self._expected)

    def _is_right(self, parity: float) -> bool:
        return parity >= self._least

    @property
    def _least(self) -> float:
        return FP32_COSINE if self.work.precision == "fp32" else MIN_COSINE

    def _refuse(self, name: str, parity: float) -> str:
        """Remember that an engine is wrong; says so."""
        told = (
            f"Features of the engine {name} have a cosine of {parity:.4f} to those of float32, "
            f"where {self._least} is needed."
        )
        # JSON has no word for what is not a number.
        self._learn(name, {"parity": None if math.isnan(parity) else parity, "failed": told})
        return told

    def _rate(self, seconds: float) -> float:
        return round(self.work.batch_size / seconds, 1)

    def _known(self) -> dict[str, Any]:
        known = self.memo.facts.get("engines")
        return {
            name: figures
            for name, figures in (known if isinstance(known, dict) else {}).items()
            if isinstance(figures, dict)
            and all(isinstance(figures.get(key, 0), int | float | None) for key in _FIGURES)
            and isinstance(at := figures.get("at"), int)
            and time.time() - at < _REMEMBERED_SECONDS
        }

    def _learn(self, name: str, figures: dict[str, Any]) -> None:
        self.tried[name] = {**self.tried.get(name, {}), **figures}
        known = self._known()
        learnt = {**known.get(name, {}), **figures, "at": int(time.time())}
        self.memo.note(engines={**known, name: learnt})


def _offer(name: str, offers: Mapping[str, Offer]) -> Offer:
    if name not in offers:
        raise EngineError(f"There is no engine {name!r}. Known: {AUTO}, {', '.join(offers)}.")
    return offers[name]


def _as_before(preferred: Mapping[str, Any], work: Work) -> Work:
    """The work with as much in float32 as before, if that can be."""
    until = preferred.get("float32_until")
    if work.precision == "fp32" or preferred.get("precision") == "fp32":
        return replace(work, precision="fp32", until="")
    is_there = isinstance(until, str) and until in dict(work.net.named_modules())
    return replace(work, until=str(until)) if is_there else work


def _named(engine: Engine, work: Work) -> dict[str, Any]:
    return {
        "name": engine.name,
        **engine.details,
        "precision": work.precision,
        "float32_until": work.until,
    }


def _seconds(engines: list[Engine], batch: torch.Tensor, n_timed: int = _N_TIMED) -> list[float]:
    """Seconds that each engine takes for a batch: the best of a few, after one to warm up."""
    best = [float("inf")] * len(engines)
    for k in range(1 + n_timed):
        for i, engine in enumerate(engines):
            if batch.device.type == "cuda":
                torch.cuda.synchronize(batch.device)
            started = time.perf_counter()
            engine(batch)
            if batch.device.type == "cuda":
                torch.cuda.synchronize(batch.device)
            seconds = time.perf_counter() - started
            best[i] = min(best[i], seconds) if k else seconds
        if k and sum(best) > _SLOW_SECONDS:
            break
    return best
