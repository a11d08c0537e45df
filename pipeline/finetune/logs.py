"""TensorBoard and MLflow: where they are installed and asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.errors import UnknownNameError
from pipeline.finetune.policies import MissingExtraError

LOGS = ("tensorboard", "mlflow")

Log = Callable[[dict[str, Any]], None]

_VALUES = ("train_loss", "val_loss", "val_top1", "lr", "images_per_second")


@contextmanager
def open_log(kind: str | None, folder: Path, settings: dict[str, Any]) -> Iterator[Log]:
    """A function that is given every entry of the curve.

    Args:
        kind: one of ``LOGS``; None for nowhere.
        folder: of the runs; TensorBoard's files go to ``tensorboard`` in it.
        settings: of the training.

    Raises:
        UnknownNameError: there is no such log.
        MissingExtraError: its package is not installed.
    """
    if kind is None:
        yield lambda _: None
    elif kind == "tensorboard":
        try:
            tensorboard = import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise _missing("tensorboard") from error
        with tensorboard.SummaryWriter(str(folder / "tensorboard")) as writer:

            def write(entry: dict[str, Any]) -> None:
                for name, value in _values(entry).items():
                    writer.add_scalar(name, value, entry["epoch"])

            yield write
    elif kind == "mlflow":
        try:
            mlflow = import_module("mlflow")
        except ImportError as error:
            raise _missing("mlflow") from error
        with mlflow.start_run():
            mlflow.log_params(settings)
            yield lambda entry: mlflow.log_metrics(_values(entry), step=entry["epoch"])
    else:
        raise UnknownNameError("log", kind, LOGS)


def _values(entry: dict[str, Any]) -> dict[str, float]:
    return {name: entry[name] for name in _VALUES if entry[name] is not None}


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        f"--log {package} needs the package {package}, which is not installed.\n"
        f"  Install it:  pip install {package}"
    )
