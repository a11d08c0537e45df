"""What the heads with ``partial_fit`` share: scikit-learn's contract for samples in parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.multiclass import _check_partial_fit_first_call
from sklearn.utils.validation import validate_data

from pipeline.heads.base import Array, Head, sample_weights


def takes_parts(head: Any) -> bool:
    """Whether samples can be taken in parts; of a ``partial_fit`` that is not there, why not."""
    if isinstance(getattr(head, "class_weight", None), str):
        raise AttributeError(
            f"class_weight is {head.class_weight!r}, but parts do not tell how many samples of "
            "each class there will be: partial_fit needs class_weight={class: weight}, or None"
        )
    return True


def keeps_sums(head: Any) -> bool:
    """The same of a head that is unfitted, or has the ``_sums`` of the parts so far."""
    if hasattr(head, "classes_") and head._sums is None:
        raise AttributeError(
            f"This {type(head).__name__} was fitted by fit or loaded, and keeps no sums that a "
            "part could be added to: begin with partial_fit on a clone of it"
        )
    return takes_parts(head)


def partial_inputs(
    head: Head, X: Array, y: Array, classes: Array | None
) -> tuple[Array, NDArray[np.intp]]:
    """Check a part of the training data; the first sets ``classes_`` and ``n_features_in_``.

    Args:
        head: that learns.
        X: (n_samples, n_features).
        y: (n_samples,).
        classes: all there will be; needed with the first part.

    Returns:
        X as float32 or float64, and class indices (n_samples,).

    Raises:
        ValueError: what scikit-learn refuses, fewer than two classes, or a label that is none of
            them.
    """
    if classes is not None and len(np.unique(classes)) < 2:
        raise ValueError(
            f"{type(head).__name__} needs at least 2 classes, but there is only one: {classes[0]!r}"
        )
    _check_partial_fit_first_call(head, classes)
    is_first = not hasattr(head, "n_features_in_")
    X, y = validate_data(head, X, y, dtype=[np.float32, np.float64], reset=is_first)
    unknown = np.setdiff1d(y, head.classes_)
    if len(unknown):
        raise ValueError(
            f"y holds {unknown[0]!r}, which is none of the {len(head.classes_)} classes that "
            "partial_fit was told of first"
        )
    return X, np.searchsorted(head.classes_, y)


def partial_weights(head: Head, index: NDArray[np.intp], sample_weight: Any) -> NDArray[np.float64]:
    """Weight of each sample (n_samples,): the product of its own and its class's.

    Args:
        head: after :func:`partial_inputs`; its ``class_weight`` is None or {class: weight}.
        index: (n_samples,), class indices; some classes may be missing.
        sample_weight: (n_samples,) or None.

    Raises:
        ValueError: weights below 0.
    """
    by_class = getattr(head, "class_weight", None) or {}
    factors = np.array([by_class.get(name, 1.0) for name in head.classes_.tolist()])
    own = sample_weights(index, index, None, sample_weight)
    weights: NDArray[np.float64] = own * factors[index]
    if (weights < 0).any():
        raise ValueError(f"sample_weight holds {weights.min()}, expected 0 or more")
    return weights
