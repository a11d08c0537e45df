"""A softmax layer trained by gradient steps."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.utils.metaestimators import available_if

from pipeline.heads.base import Array, solver_device
from pipeline.heads.gradient import GradientHead, Indices
from pipeline.heads.partial import partial_inputs, partial_weights, takes_parts
from pipeline.heads.streaming.softmax import SoftmaxSteps


class LinearHead(GradientHead):
    """Softmax regression by gradient steps from zero weights (Oquab et al., DINOv2, 2023, B.3).

    Args:
        lr: the learning rate at its highest; it falls to zero along a cosine.
        weight_decay: of the weights; decoupled for AdamW, added to the gradient for SGD.
        epochs: passes over the samples.
        batch_size: samples a step.
        warmup: share of the steps in which the learning rate rises.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        label_smoothing: share of each target that is spread evenly over the classes.
        class_weight: None, "balanced" or {class: weight}.
        seed: of the order of the samples and of their views.
        device: "cpu", "cuda[:N]" or "auto".

    Attributes:
        weight_: (n_classes, n_features) float32.
        bias_: (n_classes,) float32.
        n_iter_: epochs that were run; with :meth:`partial_fit`, parts that were gone through.
    """

    _steps: SoftmaxSteps | None = None

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        weight_decay: float = 1e-2,
        epochs: int = 20,
        batch_size: int = 128,
        warmup: float = 0.0,
        optimizer: str = "adamw",
        label_smoothing: float = 0.0,
        class_weight: Any = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.warmup = warmup
        self.optimizer = optimizer
        self.label_smoothing = label_smoothing
        self.class_weight = class_weight
        self.seed = seed
        self.device = device

    @available_if(takes_parts)  # type: ignore[untyped-decorator]
    def partial_fit(
        self,
        X: Array,
        y: Array,
        classes: Array | None = None,
        sample_weight: Array | None = None,
    ) -> Self:
        """Go once through a part of the samples; the next part goes on from there.

        As nobody knows where the end is, the learning rate neither rises nor falls: it is ``lr``.
        After :meth:`fit` it goes on from the weights found, without the optimizer's momentum.

        Args:
            X: (n_samples, n_features).
            y: (n_samples,).
            classes: all there will be; needed with the first part.
            sample_weight: (n_samples,).

        Raises:
            ValueError: parameters or samples that do not fit.
            ArithmeticError: the parameters are not finite any more: ``lr`` is too large.
            AttributeError: there is no such method where ``class_weight`` is "balanced".
        """
        self.check_params()
        X, index = partial_inputs(self, X, y, classes)
        weights = partial_weights(self, index, sample_weight)
        steps = self._begun(X.shape[1])
        order = np.random.default_rng([self.seed, steps.n_steps]).permutation(len(X))
        for batch in np.split(order, range(self.batch_size, len(X), self.batch_size)):
            steps.step(X[batch], index[batch], weights[batch])
        if failure := steps.failure(0):
            raise ArithmeticError(failure)
        self.weight_, self.bias_ = steps.arrays(0)
        self.n_iter_ = getattr(self, "n_iter_", 0) + 1
        self.converged_ = True
        return self

    def _begun(self, n_features: int) -> SoftmaxSteps:
        """The layer as earlier parts left it."""
        if self._steps is None:
            self._steps = SoftmaxSteps(
                [self.member()], n_features, len(self.classes_),
                optimizer=self.optimizer, device=solver_device(self.device),
            )  # fmt: skip
            if hasattr(self, "weight_"):
                self._steps.set_arrays(0, self.weight_, self.bias_)
        self._steps.settings = [self.member()]
        return self._steps

    def _learn(self, X: Array, index: Indices, sample_weight: Array | None) -> Self:
        self._steps = None
        return super()._learn(X, index, sample_weight)
