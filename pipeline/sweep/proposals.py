"""What a sweep tries next: all of a grid, draws at random, or what earlier trials suggest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np

from pipeline.errors import UnknownNameError, UsageError
from pipeline.heads import HEADS
from pipeline.heads.scaling import SCALINGS
from pipeline.sweep.grids import Setting
from pipeline.sweep.space import Range, Space
from pipeline.sweep.trials import Candidate, Trial

SEARCHES = ("grid", "random", "optuna")
_AUTO = "auto"
_BATCH = 8

Frame = tuple[tuple[str, ...], str]
"""Layers and scaling: what candidates must share to be fitted on the same matrix."""


def scalings_of(head: str, asked: Sequence[str] = ()) -> list[str]:
    """Scalings to try with a head.

    Args:
        head: its name.
        asked: of ``pipeline.heads.scaling.SCALINGS``, "auto" for those that may suit the head; ()
            for its own default.

    Raises:
        UnknownNameError: no scaling is called so.
    """
    spec = HEADS[head]
    found: list[str] = []
    for scaling in asked or (spec.scaling,):
        if scaling not in (*SCALINGS, _AUTO):
            raise UnknownNameError("scaling", scaling, (*SCALINGS, _AUTO))
        found += spec.scalings if scaling == _AUTO else (scaling,)
    return list(dict.fromkeys(found))


def only_scaling(head: str, asked: Sequence[str] = ()) -> str:
    """The one scaling of a head that is fitted within a memory limit.

    Raises:
        UsageError: there are several.
    """
    found = scalings_of(head, asked)
    if len(found) > 1:
        raise UsageError(
            f"With --memory-limit one scaling is tried, not {', '.join(found)}.\n"
            f"  Name it:  --scaling {found[0]}"
        )
    return found[0]


class Proposals(Protocol):
    """Candidates of one head."""

    head: str
    has_edges: bool  # whether a best value at the end of what was tried is worth telling

    def next(self, n: int | None) -> list[Candidate]:
        """Some more of them, at most ``n``; none when it is done."""

    def tell(self, trial: Trial, value: float | None) -> None:
        """How one did: larger is better, None where it failed."""


class Grid:
    """Every setting in every frame.

    Args:
        head: whose candidates they are.
        settings: to try.
        frames: layers and scalings to try them with.
        spread: begin with settings that lie far apart, in every frame, as is right where the time
            may be up before the end.
    """

    has_edges = True

    def __init__(
        self,
        head: str,
        settings: Sequence[Setting],
        frames: Sequence[Frame],
        *,
        spread: bool = False,
    ) -> None:
        self.head = head
        pairs = list(product(frames, settings))
        if spread:
            pairs = [(frame, settings[i]) for i in _far_apart(len(settings)) for frame in frames]
        self._left = [
            Candidate(head, layers, scaling, dict(setting)) for (layers, scaling), setting in pairs
        ]

    def next(self, n: int | None) -> list[Candidate]:
        """Those that come next."""
        n = n or len(self._left)
        taken, self._left = self._left[:n], self._left[n:]
        return taken

    def tell(self, trial: Trial, value: float | None) -> None:
        """A grid does not learn."""


def _far_apart(n: int) -> list[int]:
    """0 … n - 1 in an order whose beginnings are evenly spread: by their bits, reversed."""
    n_bits = max(1, (n - 1).bit_length())
    order = sorted(range(1 << n_bits), key=lambda i: int(f"{i:0{n_bits}b}"[::-1], 2))
    return [i for i in order if i < n]


class Draws:
    """Settings drawn at random from a space.

    Args:
        head: whose candidates they are.
        space: what to draw from.
        frames: layers and scalings, drawn as well.
        n_trials: how many.
        seed: of the draws.
    """

    has_edges = False

    def __init__(
        self, head: str, space: Space, frames: Sequence[Frame], n_trials: int, seed: int
    ) -> None:
        self.head = head
        rng = np.random.default_rng([seed, *head.encode()])
        drawn = []
        for _ in range(n_trials if space or len(frames) > 1 else 1):
            frame = frames[int(rng.integers(len(frames)))]
            drawn.append((frame, {name: values.draw(rng) for name, values in space.items()}))
        self._left = [
            Candidate(head, layers, scaling, setting) for (layers, scaling), setting in drawn
        ]

    def next(self, n: int | None) -> list[Candidate]:
        """The next draws."""
        n = n or len(self._left)
        taken, self._left = self._left[:n], self._left[n:]
        return taken

    def tell(self, trial: Trial, value: float | None) -> None:
        """A draw does not learn."""


class Guided:
    """Settings that optuna's tree of Parzen estimators suggests, a few at a time.

    Bergstra et al., "Algorithms for hyper-parameter optimization", 2011.

    Args:
        head, space, frames, n_trials, seed: see :class:`Draws`.

    Raises:
        UsageError: optuna is not installed.
    """

    has_edges = False

    def __init__(
        self, head: str, space: Space, frames: Sequence[Frame], n_trials: int, seed: int
    ) -> None:
        optuna = _optuna()
        self.head, self._space, self._frames = head, space, frames
        self._left = n_trials if space or len(frames) > 1 else 1
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._failed = optuna.trial.TrialState.FAIL
        self._asked: dict[str, list[Any]] = {}

    def next(self, n: int | None) -> list[Candidate]:
        """What optuna would like to know."""
        n = min(self._left, n or _BATCH, _BATCH)
        self._left -= n
        return [self._ask() for _ in range(n)]

    def _ask(self) -> Candidate:
        asked = self._study.ask()
        at = asked.suggest_categorical("frame", list(range(len(self._frames))))
        setting = {name: _suggest(asked, name, values) for name, values in self._space.items()}
        layers, scaling = self._frames[at]
        candidate = Candidate(self.head, layers, scaling, setting)
        self._asked.setdefault(candidate.key(), []).append(asked)
        return candidate

    def tell(self, trial: Trial, value: float | None) -> None:
        """Let optuna know."""
        asked = self._asked[_without_seed(trial.candidate).key()].pop()
        if value is None or not math.isfinite(value):
            self._study.tell(asked, state=self._failed)
        else:
            self._study.tell(asked, value)


def _without_seed(candidate: Candidate) -> Candidate:
    setting = {name: value for name, value in candidate.setting.items() if name != "seed"}
    return Candidate(candidate.head, candidate.layers, candidate.scaling, setting)


def _suggest(asked: Any, name: str, values: Any) -> Any:
    if not isinstance(values, Range):
        return values.options[asked.suggest_categorical(name, list(range(len(values.options))))]
    if values.whole:
        return asked.suggest_int(name, int(values.low), int(values.high), log=True)
    return asked.suggest_float(name, values.low, values.high, log=True)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            "--search optuna needs optuna, which is not installed.\n"
            "  pip install 'tlpipe[tune]'    or take  --search random"
        ) from error
    return optuna


def check_search(name: str) -> None:
    """Refuse a search that there is none of, or that cannot be had.

    Raises:
        UnknownNameError, UsageError: it is not of :data:`SEARCHES`, or optuna is not installed.
    """
    if name not in SEARCHES:
        raise UnknownNameError("search", name, SEARCHES)
    if name == "optuna":
        _optuna()
