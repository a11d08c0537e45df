"""The recipe: everything that decides a feature's value, and nothing else."""

from __future__ import annotations

from typing import Any

from pipeline.backbones.backbone import Backbone, FeatureNet
from pipeline.data.decode import DECODING

RECIPE_SCHEMA = 1


def build_recipe(
    backbone: Backbone, net: FeatureNet, *, precision: str, storage: str
) -> dict[str, Any]:
    """The recipe of features of ``net``.

    Args:
        backbone: the frozen network with its preprocessing.
        net: its chosen layers and pooling.
        precision: "fp32", "bf16" or "fp16".
        storage: dtype that features are stored with, "float16" or "float32".
    """
    return {
        "schema": RECIPE_SCHEMA,
        "backbone": backbone.name,
        "weights": backbone.weights_digest,
        "layers": list(net.layers),
        "pooling": net.pooling,
        "decoding": dict(DECODING),
        "preprocess": backbone.preprocess.to_dict(),
        "views": 1,
        "precision": precision,
        "storage": storage,
    }
