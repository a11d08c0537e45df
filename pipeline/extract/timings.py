"""Where the seconds of an extraction went, and what would help."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

T = TypeVar("T")

# Below this share of the time nothing is worth naming as the bottleneck.
_SHARE = 0.5


@dataclass
class Timings:
    """Seconds by stage.

    The first block is one after the other. The second runs beside it; reading and decoding are
    summed over their threads.

    Attributes:
        loading: importing the libraries and loading the network.
        planning: comparing the files with the store.
        choosing: trying which engine is fastest, and building it.
        waiting: for images that were not decoded yet.
        copying: images into batches, and to the device.
        network: the forward pass.
        stalled: waiting until features were written.
        reading: files, and hashing them.
        decoding: images, and making them the network's input.
        writing: shards, samples table, view.
        n_threads: threads that read and decode.
    """

    loading: float = 0.0
    planning: float = 0.0
    choosing: float = 0.0
    waiting: float = 0.0
    copying: float = 0.0
    network: float = 0.0
    stalled: float = 0.0

    reading: float = 0.0
    decoding: float = 0.0
    writing: float = 0.0
    n_threads: int = 1

    @contextmanager
    def spent(self, stage: str) -> Iterator[None]:
        """Count the seconds of the block for ``stage``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - started)

    def add(self, other: Timings) -> None:
        """Take in the times of a process beside this one: at once, but for what threads do."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            summed = field.name in ("reading", "decoding", "n_threads")
            setattr(self, field.name, mine + theirs if summed else max(mine, theirs))

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time until each is there is counted as waiting."""
        iterator = iter(items)
        while True:
            with self.spent("waiting"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def bottleneck(self) -> str:
        """What took most of the time and what would help, in a sentence; "" where nothing does."""
        stages = {
            "loading": "Loading the network took most of the time; more images pay for it.",
            "choosing": (
                "Choosing and building the engine took most of the time. It is remembered: the "
                "next run will not need it."
            ),
            "waiting": self._slow_input(),
            "copying": "Copying took most of the time. A larger --batch-size may help.",
            "network": (
                "The network took most of the time. A GPU, a smaller --image-size or a smaller "
                "backbone would help."
            ),
            "stalled": "Writing took most of the time. A faster disk for --cache would help.",
        }
        slowest = max(stages, key=lambda stage: float(getattr(self, stage)))
        total = self.planning + sum(float(getattr(self, stage)) for stage in stages)
        return stages[slowest] if getattr(self, slowest) > _SHARE * total else ""

    def _slow_input(self) -> str:
        if self.reading > self.decoding:
            return "Reading files took most of the time. A faster disk or a local copy would help."
        return (
            f"The network waited for images, which {self.n_threads} threads read and decode. More "
            "cores, smaller images or --decode fast would help."
        )

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return {name: round(value, 3) for name, value in asdict(self).items()}
