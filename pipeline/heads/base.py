"""What every head shares: scikit-learn's manners, and saving as plain arrays."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from pipeline.errors import CorruptStoreError, StoreFormatError
from pipeline.heads.folds import Fold, FoldResult, fit_one_by_one

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]


class Head(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier on features: scores one class a column, and saves to arrays.

    A subclass fits in ``fit``, scores in :meth:`logits`, and names its fitted arrays in
    :meth:`array_shapes`.

    Attributes:
        classes_: (n_classes,), sorted labels as they were given to ``fit``.
        n_features_in_: width of the features.
        converged_: False where the solver stopped before its tolerance was met.
    """

    classes_: Array
    n_features_in_: int
    converged_: bool

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Learn from X (n_samples, n_features) and y (n_samples,), weighted by (n_samples,)."""
        raise NotImplementedError

    @classmethod
    def try_settings(
        cls,
        settings: Sequence[Mapping[str, Any]],
        X: Array,
        y: Array,
        folds: Sequence[Fold],
        *,
        n_classes: int,
    ) -> Iterator[FoldResult]:
        """Fit every setting on every fold and score the fold's rows that choose.

        A head whose settings share their work does it once for all of them; this one fits each by
        itself. What a setting gives does not depend on the others beyond the solver's tolerance.

        Args:
            settings: parameters of the head.
            X: (n_samples, n_features) float32, scaled.
            y: (n_samples,), int class codes below ``n_classes``.
            folds: who fits and who chooses, rows of X.
            n_classes: columns of the logits.

        Yields:
            A result for every setting and fold, in any order; one that failed says so.
        """
        yield from fit_one_by_one(cls, settings, X, y, folds, n_classes)

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""

    def logits(self, X: Array) -> Array:
        """Score every class: (n_samples, n_classes), larger is likelier."""
        raise NotImplementedError

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Fitted arrays and the names of their axes.

        An axis of one name has one length across all arrays; "classes" and "features" are
        what they say, and "outputs" is n_classes, or 1 where there are two.
        """
        raise NotImplementedError

    def n_trained(self) -> int:
        """How many numbers were fitted."""
        check_is_fitted(self)
        return sum(int(np.size(getattr(self, name))) for name in self.array_shapes())

    def predict(self, X: Array) -> Array:
        """Return the likeliest class of each sample: (n_samples,)."""
        check_is_fitted(self)
        labels: Array = self.classes_[np.argmax(self.logits(X), axis=1)]
        return labels

    @classmethod
    def parameter_names(cls) -> list[str]:
        """Names that the constructor takes, in its order."""
        return list(inspect.signature(cls).parameters)

    def to_arrays(self) -> dict[str, Array]:
        """Everything that was fitted, as plain arrays; :meth:`from_arrays` is the way back."""
        check_is_fitted(self)
        arrays = {
            name.rstrip("_"): np.ascontiguousarray(getattr(self, name)).reshape(
                np.shape(getattr(self, name))
            )
            for name in self.array_shapes()
        }
        return arrays | _encode_classes(self.classes_)

    @classmethod
    def from_arrays(cls, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Self:
        """Rebuild a fitted head; no code is run and nothing is trusted.

        Args:
            params: constructor parameters.
            arrays: what :meth:`to_arrays` returned.

        Raises:
            StoreFormatError: a parameter that this head does not have.
            CorruptStoreError: an array is missing, not finite, or of a shape that does not fit.
        """
        unknown = sorted(set(params) - set(cls.parameter_names()))
        if unknown:
            raise StoreFormatError(
                f"{cls.__name__} has no parameter {unknown[0]!r}: was the model saved by a newer "
                f"version of tlpipe? It has: {', '.join(cls.parameter_names())}."
            )
        head = cls(**params)
        try:
            head.check_params()
        except (TypeError, ValueError) as error:
            raise CorruptStoreError(f"The model's {cls.__name__}: {error}.") from error
        head.classes_ = _decode_classes(arrays)
        lengths = {"classes": len(head.classes_)}
        lengths["outputs"] = 1 if len(head.classes_) == 2 else len(head.classes_)
        for name, axes in head.array_shapes().items():
            setattr(head, name, _checked_array(name.rstrip("_"), axes, arrays, lengths))
        head.n_features_in_ = lengths["features"]
        head.converged_ = True
        return head


def _checked_array(
    name: str, axes: tuple[str, ...], arrays: Mapping[str, Array], lengths: dict[str, int]
) -> Array:
    """One saved array, its axes measured against those seen so far (``lengths`` is extended)."""
    if name not in arrays:
        raise CorruptStoreError(f"The model has no array {name!r}; it holds: {_names(arrays)}.")
    array = arrays[name]
    if array.dtype.kind not in "fiu":
        raise CorruptStoreError(f"Array {name!r} of the model holds {array.dtype}, not numbers.")
    if array.ndim != len(axes) or any(
        lengths.setdefault(axis, n) != n for axis, n in zip(axes, array.shape, strict=False)
    ):
        expected = ", ".join(f"{axis} = {lengths.get(axis, 'any')}" for axis in axes)
        raise CorruptStoreError(
            f"Array {name!r} of the model has shape {array.shape}, expected ({expected})."
        )
    if not np.isfinite(array).all():
        raise CorruptStoreError(f"Array {name!r} of the model holds NaN or infinity.")
    return array


def _names(arrays: Mapping[str, Array]) -> str:
    return ", ".join(sorted(arrays)) or "nothing"


def _encode_classes(classes: Array) -> dict[str, Array]:
    """Class labels as numbers; text becomes one row of code points a class."""
    if classes.dtype.kind in "biuf":
        return {"classes": classes}
    text = np.array([str(label) for label in classes])
    return {"classes_text": text.view(np.uint32).reshape(len(text), -1)}


def _decode_classes(arrays: Mapping[str, Array]) -> Array:
    classes = arrays.get("classes")
    if classes is None and "classes_text" in arrays:
        points = arrays["classes_text"]
        if points.ndim != 2 or points.dtype != np.uint32 or (points > 0x10FFFF).any():
            raise CorruptStoreError("Array 'classes_text' of the model does not hold text.")
        points = np.ascontiguousarray(points)
        classes = points.view(f"U{points.shape[1]}").ravel() if points.shape[1] else None
    if classes is None or classes.ndim != 1 or classes.dtype.kind not in "biufU":
        raise CorruptStoreError("The model does not say which classes it knows.")
    if len(classes) < 2 or len(np.unique(classes)) != len(classes):
        raise CorruptStoreError(f"The model names {len(classes)} classes, expected 2 or more.")
    return classes


def solver_device(name: str) -> torch.device:
    """The torch device called ``name``; "auto" is the first GPU, or the CPU where there is none.

    Raises:
        ValueError: no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, expected auto, cpu or cuda[:N]") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but this machine has no GPU that torch can use")
    return device


def fit_inputs(head: Head, X: Array, y: Array) -> tuple[Array, NDArray[np.intp]]:
    """Check training data, set ``classes_`` and ``n_features_in_``.

    Returns:
        X as float32 or float64 (n_samples, n_features), and class indices (n_samples,).

    Raises:
        ValueError: what scikit-learn refuses, or fewer than two classes.
    """
    X, y = validate_data(head, X, y, dtype=[np.float32, np.float64])
    if np.asarray(y).dtype.kind not in "iub":
        # Whole numbers are classes, however many: scikit-learn would warn of a regression.
        check_classification_targets(y)
    head.classes_, index = np.unique(y, return_inverse=True)
    if len(head.classes_) < 2:
        raise ValueError(
            f"{type(head).__name__} needs samples of at least 2 classes, "
            f"but the data has only one class: {head.classes_[0]!r}"
        )
    return X, index


def predict_inputs(head: Head, X: Array) -> Array:
    """Check features to score: float32 or float64, (n_samples, n_features_in_)."""
    check_is_fitted(head)
    return np.asarray(validate_data(head, X, dtype=[np.float32, np.float64], reset=False))


def sample_weights(
    X: Array, y: Array, class_weight: Any, sample_weight: Any = None
) -> NDArray[np.float64]:
    """Weight of each sample (n_samples,): the product of its own and its class's."""
    weights = _check_sample_weight(sample_weight, X, dtype=np.float64)
    if class_weight is not None:
        weights = weights * compute_sample_weight(class_weight, y)
    return np.asarray(weights, dtype=np.float64)


def linear_logits(X: Array, coef: Array, intercept: Array) -> Array:
    """``X @ coef.T + intercept``; the single output of two classes gets a zero before it."""
    scores: Array = X @ coef.T + intercept
    if scores.shape[1] > 1:
        return scores
    return np.hstack([np.zeros_like(scores), scores])


def decision(logits: Array) -> Array:
    """scikit-learn's shape of a decision: (n_samples,) for two classes."""
    return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits


def softmax(logits: Array) -> NDArray[np.float64]:
    """Probabilities (n_samples, n_classes) in float64; -inf scores become exactly zero."""
    scores = np.asarray(logits, dtype=np.float64)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: NDArray[np.float64] = scores / scores.sum(axis=1, keepdims=True)
    return result
