"""``predictions.csv``: what was predicted for each scored sample."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

PREDICTIONS_FILE = "predictions.csv"
COLUMNS = ("id", "split", "label", "predicted", "probability")


@dataclass(frozen=True)
class Predictions:
    """Columns of one length.

    Attributes:
        ids: sample ids.
        splits: the split that each sample belongs to.
        labels: true classes.
        predicted: likeliest classes.
        probability: of the predicted class.
    """

    ids: NDArray[Any]
    splits: NDArray[Any]
    labels: NDArray[Any]
    predicted: NDArray[Any]
    probability: NDArray[Any]

    def write(self, path: Path) -> None:
        """Write a UTF-8 CSV file; a name that is no valid text is written with escapes."""
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for *names, probability in zip(
                self.ids, self.splits, self.labels, self.predicted, self.probability, strict=True
            ):
                writer.writerow([*names, f"{probability:.6f}"])
