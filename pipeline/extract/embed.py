"""Embed a few files without a store, under the recipe that a head was fitted with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backbones import load_backbone
from pipeline.errors import MismatchError, WeightsError
from pipeline.extract.embedder import Embedder
from pipeline.extract.loader import Demand, load, load_in_order
from pipeline.extract.precision import resolve_device
from pipeline.extract.recipe import RECIPE_SCHEMA
from pipeline.extract.settings import Settings

MAX_BATCH_SIZE = 32


@dataclass(frozen=True)
class Embedded:
    """Features of the files that could be decoded.

    Attributes:
        layers: (n, ...) features by layer, in the order of ``indices``.
        indices: which of the files they are.
        failures: why a file could not be used, by index.
    """

    layers: dict[str, NDArray[np.floating]]
    indices: list[int]
    failures: dict[int, str]


def embedder_for(
    recipe: Mapping[str, Any],
    origin: Mapping[str, Any],
    *,
    n_files: int,
    device: str = "auto",
) -> Embedder:
    """Load the backbone of a recipe again and check that it is the same.

    Args:
        recipe: of the store that a head was fitted on.
        origin: arguments of ``load_backbone``, from the store's provenance.
        n_files: how many files will be embedded; few files make small batches.
        device: where to run.

    Raises:
        MismatchError: weights, preprocessing or decoding differ from the recipe's, or it is of
            another release.
        TlpipeError: the backbone cannot be loaded.
    """
    if recipe.get("schema") != RECIPE_SCHEMA:
        raise MismatchError(
            f"The head was fitted on features of recipe schema {_short(recipe.get('schema'))} "
            f"(precision {_short(recipe.get('precision'))}); this release of tlpipe makes features "
            f"of schema {RECIPE_SCHEMA}.\n  Extract again and fit again:  tlpipe extract DATA"
        )
    try:
        backbone = load_backbone(**origin)
    except WeightsError as error:
        raise WeightsError(
            f"{error}\n  The head needs the weights {str(recipe['weights'])[:12]}…, which were "
            f"{origin['weights']} when its features were extracted: put them back there."
        ) from error
    device_type = resolve_device(device).type
    precision = str(recipe["precision"])
    settings = Settings(
        layers=tuple(recipe["layers"]),
        pooling=str(recipe["pooling"]),
        precision="fp32" if device_type == "cpu" and precision == "fp16" else precision,
        storage=str(recipe["storage"]),
        decode="fast" if "fast" in recipe["decoding"] else "cpu",
        device=device,
        batch_size=max(1, min(MAX_BATCH_SIZE, n_files)),
    )
    embedder = Embedder(backbone, settings)
    # What a device cannot compute in, it may replace by something more exact. Of several views the
    # plain one is what a head is used with. Which processor decodes makes no difference to it.
    decoding = {name: value for name, value in recipe["decoding"].items() if name != "gpu"}
    expected = {**recipe, **{name: embedder.recipe[name] for name in ("precision", "views")}}
    expected["decoding"] = decoding
    for field, value in embedder.recipe.items():
        if value != expected.get(field):
            raise MismatchError(
                f"The head was fitted on features with {field} {_short(recipe.get(field))}, but "
                f"{backbone.name} now gives {_short(value)}.\n"
                "  Extract again and fit again, or restore what was there: the weights file, or "
                "the release of tlpipe."
            )
    return embedder


def embed_files(
    embedder: Embedder, files: Sequence[str], on_progress: Callable[[int], None] = lambda _: None
) -> Embedded:
    """Embed files in order; those that cannot be decoded are listed with the reason."""
    batches: list[dict[str, NDArray[np.floating]]] = []
    indices: list[int] = []
    failures: dict[int, str] = {}
    waiting: list[tuple[int, torch.Tensor]] = []

    def run() -> None:
        features, refused = embedder.forward([pixels for _, pixels in waiting])
        kept = [k for k in range(len(waiting)) if k not in refused]
        batches.append({name: values[kept] for name, values in features.items()})
        indices.extend(waiting[k][0] for k in kept)
        failures.update({waiting[k][0]: why for k, why in refused.items()})
        waiting.clear()

    load_one = partial(
        load, demands=[Demand(lambda _: False, embedder.make_input, embedder.least_size)]
    )
    stream = load_in_order(files, load_one, embedder.n_threads, 2 * embedder.batch_size)
    for i, one in enumerate(stream):
        on_progress(1)
        if one.failure:
            failures[i] = one.failure
            continue
        (views,) = one.pixels
        assert views is not None
        waiting.append((i, views[0]))
        if len(waiting) == embedder.batch_size:
            run()
    if waiting:
        run()
    layers = {
        name: np.concatenate([batch[name] for batch in batches])
        if batches
        else np.empty((0, *layer.shape), layer.dtype)
        for name, layer in embedder.layers.items()
    }
    return Embedded(layers, indices, failures)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
