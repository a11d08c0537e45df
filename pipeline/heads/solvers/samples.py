"""Samples with weights, as the gradient solvers take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.heads.tasks import NO_LABEL

Array = NDArray[Any]

_CHECKED_ROWS = 1024


@dataclass
class Samples:
    """Some rows of a matrix, without a copy of them.

    Attributes:
        x: (n_rows, n_features) or (n_rows, n_views, n_features), all rows.
        rows: (n,) of x; None for all of them.
        y: (n,) class indices; of several tasks (n, n_tasks), NO_LABEL where there is none.
        weights: (1 or n_members, n), each row of a mean of one.
    """

    x: Tensor
    rows: Tensor | None
    y: Tensor
    weights: NDArray[np.float64]

    @classmethod
    def check(
        cls,
        name: str,
        X: Array | Tensor,
        y: Array,
        rows: Array | None,
        weights: Array | None,
        n_members: int,
        n_classes: int | Sequence[int],
    ) -> Samples:
        """Samples that fit together.

        Args:
            name: of X, for people.
            X: all rows.
            y: (n_rows,), or (n_rows, n_tasks).
            rows: those that are meant; None for all.
            weights: (n_rows,) or (n_members, n_rows); None for ones.
            n_members: networks of the call.
            n_classes: labels are below it; of several tasks, one number a task.

        Raises:
            ValueError: no rows, values that are not finite, labels or weights that do not fit.
        """
        x = as_float32(X)
        labels = np.asarray(y)
        several = () if isinstance(n_classes, int) else (len(n_classes),)
        if x.ndim not in (2, 3) or not x.numel() or labels.shape != (len(x), *several):
            wanted = f"(n_samples, {several[0]})" if several else "(n_samples,)"
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and its labels {labels.shape}, expected "
                f"(n_samples, n_features) or (n_samples, n_views, n_features), and {wanted}"
            )
        check_finite(name, x)
        table = np.atleast_2d(np.asarray(np.ones(len(x)) if weights is None else weights, float))
        if table.shape not in {(1, len(x)), (n_members, len(x))} or not (table >= 0).all():
            raise ValueError(
                f"The weights of {name} have shape {table.shape}, expected ({len(x)},) or "
                f"({n_members}, {len(x)}), none negative or NaN"
            )
        if rows is not None:
            labels, table = labels[rows], table[:, rows]
        if not len(labels):
            raise ValueError(f"No rows of {name} were chosen, expected at least 1")
        for t, (lowest, bound) in enumerate(
            [(0, n_classes)] if isinstance(n_classes, int) else [(NO_LABEL, n) for n in n_classes]
        ):
            codes = labels.reshape(len(labels), -1)[:, t]
            if codes.dtype.kind not in "iu" or codes.min() < lowest or codes.max() >= bound:
                raise ValueError(
                    f"The labels of {name} are {codes.dtype} from {codes.min()} to {codes.max()}, "
                    f"expected class indices from {lowest} to {bound - 1}"
                )
        chosen = None if rows is None else torch.from_numpy(np.array(rows, np.int64, order="C"))
        return cls(x, chosen, torch.tensor(labels.astype(np.int64)), mean_one(table, name))

    def __len__(self) -> int:
        return len(self.y)

    def rows_at(self, places: Tensor) -> Tensor:
        """Rows of x of some places (n,) among the samples, where x lies."""
        rows = places if self.rows is None else self.rows[places]
        return rows.to(self.x.device)

    def to(self, device: torch.device) -> Samples:
        """The same with x on a GPU, if it takes no more than half of what is free there."""
        if device.type != "cuda" or self.x.device == device:
            return self
        free_bytes, _ = torch.cuda.mem_get_info(device)
        fits = self.x.numel() * self.x.element_size() * 2 <= free_bytes
        return replace(self, x=self.x.to(device)) if fits else self

    def weights_of(self, members: NDArray[np.intp], device: torch.device) -> Tensor:
        """(1 or n_members, n), float32."""
        table = self.weights if len(self.weights) == 1 else self.weights[members]
        return torch.tensor(table, dtype=torch.float32, device=device)


def as_float32(X: Array | Tensor) -> Tensor:
    """float32; a copy only where it is another type, or must not be written to."""
    if isinstance(X, Tensor):
        return X.detach().to(torch.float32)
    return torch.from_numpy(np.require(X, dtype=np.float32, requirements=["C", "W"]))


def check_finite(name: str, x: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: how many rows have one, and the first of them.
    """
    # A sum is finite only if all its terms are. In float64 torch copies what it sums.
    blocks = (x[start : start + _CHECKED_ROWS] for start in range(0, len(x), _CHECKED_ROWS))
    sums = [block.flatten(1).sum(dim=1, dtype=torch.float64) for block in blocks]
    bad = (~torch.isfinite(torch.cat(sums))).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad):,} of {len(x):,} rows of {name} hold NaN or infinity (the first is row "
            f"{int(bad[0])}), expected finite features. Look for damage with: tlpipe verify STORE"
        )


def mean_one(weights: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Rows of weights scaled to a mean of one, or ValueError where one is all zero."""
    means = weights.mean(axis=1, keepdims=True)
    if not (means > 0).all() or not np.isfinite(means).all():
        raise ValueError(
            f"The weights of {name} are all zero for member {int((~(means > 0)).argmax())}: "
            "it has no sample left"
        )
    result: NDArray[np.float64] = weights / means
    return result
