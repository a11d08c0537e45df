"""The recipe: everything that decides a feature's value, and nothing else."""

from __future__ import annotations

from typing import Any

from pipeline.backbones.backbone import Backbone, FeatureNet
from pipeline.data.decode import DECODING, FAST_DECODING
from pipeline.extract.views import views_recipe

RECIPE_SCHEMA = 2
"""2: a precision is what it promises; schema 1 also said after which stage bf16 began."""


def build_recipe(
    backbone: Backbone,
    net: FeatureNet,
    *,
    precision: str,
    storage: str,
    n_views: int = 1,
    decode: str = "cpu",
) -> dict[str, Any]:
    """The recipe of features of ``net``.

    Args:
        backbone: the frozen network with its preprocessing.
        net: its chosen layers and pooling.
        precision: "fp32", "bf16" or "fp16": what the features are to be as exact as. How a promise
            is kept, by which engine and with how much of the network in float32, is provenance.
        storage: dtype that features are stored with, "float16" or "float32".
        n_views: views of each image.
        decode: how images are decoded, see :class:`~pipeline.extract.settings.Settings`.
    """
    return {
        "schema": RECIPE_SCHEMA,
        "backbone": backbone.name,
        "weights": backbone.weights_digest,
        "layers": list(net.layers),
        "pooling": net.pooling,
        "decoding": decoding_of(decode),
        "preprocess": backbone.preprocess.to_dict(),
        "views": views_recipe(n_views),
        "precision": precision,
        "storage": storage,
    }


def decoding_of(decode: str) -> dict[str, object]:
    """What a recipe says of how images were decoded.

    Args:
        decode: as in :class:`~pipeline.extract.settings.Settings`.
    """
    if decode == "cpu":
        return dict(DECODING)
    if decode == "fast":
        return dict(FAST_DECODING)
    which = {"gpu": "plain", "hybrid": "some of the plain"}[decode]
    return {**DECODING, "gpu": {"version": 1, "method": "nvJPEG", "files": f"{which} JPEG"}}
