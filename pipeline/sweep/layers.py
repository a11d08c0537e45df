"""Which layers a head sees: as a user asks for them, or as ridge regression finds them useful."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.errors import UnknownNameError
from pipeline.heads.scaling import fit_scaler
from pipeline.heads.solvers.ridge import fit_ridge
from pipeline.sweep.grids import GRIDS
from pipeline.sweep.prepare import Prepared
from pipeline.sweep.proposals import Grid
from pipeline.sweep.search import Search

EACH, ALL, AUTO = "each", "all", "auto"

LayerSet = tuple[str, ...]


@dataclass(frozen=True)
class LayerChoice:
    """What `auto` found.

    Attributes:
        layers: the chosen ones.
        alone: score of each layer by itself, by name.
        relevance: share of each layer in the joint fit, by name; they sum to 1.
        nested: score of the most relevant layer, of the two most relevant, and so on.
        metric: what the scores are.
    """

    layers: LayerSet
    alone: dict[str, float]
    relevance: dict[str, float]
    nested: list[float]
    metric: str

    def note(self) -> str:
        """For people."""
        scores = ", ".join(f"{name} {value:.3f}" for name, value in self.alone.items())
        return (
            f"Layers chosen by ridge regression: {', '.join(self.layers)}. "
            f"{self.metric} of each alone: {scores}."
        )


def layers_to_read(asked: Sequence[str]) -> list[str] | None:
    """What has to be read from the stores; None for their default.

    Args:
        asked: "each", "all", "auto" and sets of layers, separated by commas.
    """
    if not asked:
        return None
    if {EACH, ALL, AUTO} & set(asked):
        return ["all"]
    return list(dict.fromkeys(name for one in asked for name in names_of(one)))


def names_of(text: str) -> list[str]:
    """``"layer3, layer4"`` -> its parts."""
    return [name.strip() for name in text.split(",") if name.strip()]


def layer_sets(names: Sequence[str], asked: Sequence[str]) -> list[LayerSet]:
    """Sets of layers to try, but for `auto`; each once.

    Args:
        names: ``HeadInputs.layer_names``.
        asked: as for :func:`layers_to_read`; () for all that was read.

    Raises:
        UnknownNameError: a layer that is not there.
    """
    sets: list[LayerSet] = []
    for one in asked or [ALL]:
        if one == EACH:
            sets += [(name,) for name in names]
        elif one == ALL:
            sets.append(tuple(names))
        elif one != AUTO:
            sets.append(_named(names, names_of(one)))
    return list(dict.fromkeys(sets))


def _named(names: Sequence[str], wanted: Sequence[str]) -> LayerSet:
    """Layers by their names; without the number of a store, those of every store."""
    for name in wanted:
        if not any(name in (full, _bare(full)) for full in names):
            raise UnknownNameError(
                "layer", name, names, "tlpipe inspect STORE lists the layers of a store."
            )
    return tuple(full for full in names if full in wanted or _bare(full) in wanted)


def _bare(name: str) -> str:
    number, colon, rest = name.partition(":")
    return rest if colon and number.isdecimal() else name


def choose_layers(data: Prepared, search: Search) -> LayerChoice:
    """Select layers as groups, in the spirit of Head2Toe (Evci et al., 2022, section 3).

    One ridge regression on all layers, each normalised to the same total variance, says how much of
    the prediction rests on each: the length of its block of coefficients. Layers are then added in
    that order, and the samples that choose say where to stop.

    Args:
        data: features of all layers, and a protocol with samples that choose.
        search: of the same data.
    """
    names = data.inputs.layer_names
    alone = {name: _score(search, (name,)) for name in names}
    relevance = _relevance(data)
    order = sorted(names, key=lambda name: -relevance[name])
    nested = [
        alone[order[0]] if n == 1 else _score(search, _in_order(names, order[:n]))
        for n in range(1, len(order) + 1)
    ]
    best = int(np.argmax(nested))
    chosen = _in_order(names, order[: best + 1])
    top = max(alone, key=lambda name: alone[name])
    if alone[top] >= nested[best]:
        chosen = (top,)
    return LayerChoice(chosen, alone, relevance, nested, search.metric)


def _in_order(names: Sequence[str], chosen: Sequence[str]) -> LayerSet:
    return tuple(name for name in names if name in chosen)


def _score(search: Search, layers: LayerSet) -> float:
    """The best score of ridge regression on these layers."""
    found = search.run(Grid("ridge", GRIDS["quick"]["ridge"], [(layers, "standardise")]))
    return found.best.rank(search.metric)[0]


def _relevance(data: Prepared) -> dict[str, float]:
    """Lengths of the layers' blocks of coefficients in one joint fit, as shares."""
    inputs, rows = data.inputs, data.protocol.folds[0].fit
    X = fit_scaler(inputs.X[rows], "standardise", inputs.widths)(inputs.X[rows])
    ends = np.cumsum((0, *inputs.widths))
    for start, stop in pairwise(ends):
        X[:, start:stop] /= np.sqrt(stop - start)
    penalties = np.geomspace(1e-4, 1e2, 13) * len(X)
    y = np.unique(data.codes[rows], return_inverse=True)[1]
    path = fit_ridge(X, y, penalties)
    coef = path.coef[int(np.argmin(path.loo_error))]
    lengths = [float(np.linalg.norm(coef[:, start:stop])) for start, stop in pairwise(ends)]
    total = sum(lengths) or 1.0
    return {name: n / total for name, n in zip(inputs.layer_names, lengths, strict=True)}
