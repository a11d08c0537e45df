"""Reading weights without running code, fitting them to a network, and hashing them."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipeline.backbones.catalogue import names_by_parameters
from pipeline.errors import UnknownNameError, UsageError, WeightsError

StateDict = dict[str, torch.Tensor]

DEFAULT = "default"
RANDOM = "random"

# Where training scripts put the network's weights in a checkpoint, in order of preference.
CONTAINERS = ("state_dict", "model", "model_state_dict", "teacher")

# What wrappers put before every name: torch.compile, DataParallel, Lightning, SSL methods.
PREFIXES = ("_orig_mod.", "module.", "model.", "backbone.")
_MAX_PREFIXES = 4

_MAX_KEYS_SHOWN = 3

# What torch.load raises on files that are cut short or not weights at all.
_DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def weights_choice(
    name: str, weights: str, tag: str, tags: Sequence[str]
) -> tuple[str, Path | None]:
    """What a user means by ``--weights``: which published weights, or which file.

    Args:
        name: of the backbone.
        weights: "default", "random", one of the tags, or a path.
        tag: that the user put behind the backbone's name, or "".
        tags: that the backbone has, the default one first.

    Returns:
        The tag, which decides the preprocessing in any case ("" where there is none), and the
        file; None for published and for random weights.

    Raises:
        UnknownNameError: it is neither a tag nor looks like a path.
        UsageError: two tags were named.
    """
    chosen = tag or (tags[0] if tags else "")
    if weights in (DEFAULT, RANDOM):
        return chosen, None
    if weights in tags:
        if tag and tag != weights:
            raise UsageError(f"{name} cannot have two weights: {tag} and {weights} were named.")
        return weights, None
    path = Path(weights)
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        raise UnknownNameError(
            f"weights of {name}",
            weights,
            [DEFAULT, RANDOM, *tags],
            "A path to a .safetensors file or a PyTorch checkpoint is understood as well.",
        )
    return chosen, path


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let random weights depend on a seed and on nothing else, and leave no trace of it."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators too.
        torch.default_generator.manual_seed(seed)
        yield


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over tensors in name order: name, dtype, shape and bytes of each.

    It depends on the numbers only, so .pth and .safetensors files of equal tensors agree.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state_dict(path: Path) -> StateDict:
    """Read the tensors of a .safetensors file or a PyTorch checkpoint, never running code in it.

    Args:
        path: the format is told from the content. In a checkpoint the tensors may be at the top
            or under one of `CONTAINERS`.

    Raises:
        WeightsError: not here, cut short, no weights file, no tensors in it, or a pickle that
            would run code.
    """
    start = _first_bytes(path)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if not start.startswith((b"PK", b"\x80")):
        raise WeightsError(_not_weights(path, start))
    return _tensors_of(_read_checkpoint(path), path)


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pth"))
        found = f" It holds: {', '.join(files[:5])}." if files else ""
        raise WeightsError(f"{path} is a folder; expected a weights file.{found}")
    if not path.exists():
        raise WeightsError(
            f"There is no weights file {path}.\n"
            f"  Give a .safetensors file or a PyTorch checkpoint (.pth, .pt, .bin)."
        )
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error


def _not_weights(path: Path, start: bytes) -> str:
    if not start:
        return f"{path} is empty; expected a weights file. Download or copy it again."
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the file itself. Fetch it:  git lfs pull"
    return (
        f"{path} is not a weights file: it begins with {start[:24]!r}.\n"
        f"  Expected a .safetensors file or a PyTorch checkpoint (.pth, .pt, .bin)."
    )


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(_damaged(path, error)) from error


def _read_checkpoint(path: Path) -> Any:
    try:
        # Training scripts keep their options beside the weights; a Namespace is only a record.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about unusual pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refused(path, error)) from error
    except _DAMAGE as error:
        if "TorchScript" in str(error):
            raise WeightsError(_holds_code(path, "a TorchScript program")) from error
        raise WeightsError(_damaged(path, error)) from error


def _refused(path: Path, error: pickle.UnpicklingError) -> str:
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return _holds_code(path, named.group(1))
    if "Unsupported operand" in str(error):
        return _holds_code(path, "a pickle that torch.save did not write")
    return _damaged(path, error)


def _holds_code(path: Path, what: str) -> str:
    return (
        f"{path} was refused: it holds more than tensors ({what}), and reading that would run "
        f"code. Nothing of it was run.\n"
        f"  Expected a dictionary of tensors. Where the file comes from, save it with:\n"
        f"    safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
    )


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return (
        f"{path} is damaged or cut short ({path.stat().st_size:,} bytes: {reason}).\n"
        f"  Delete it and download or copy it again."
    )


def _tensors_of(checkpoint: Any, path: Path) -> StateDict:
    """The dictionary of tensors in a checkpoint, at the top or in a container."""
    content = checkpoint
    while isinstance(content, Mapping):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
        inner = [key for key in CONTAINERS if isinstance(content.get(key), Mapping)]
        if tensors and not inner:
            return tensors
        if not inner:
            break
        content = content[inner[0]]
    found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
    raise WeightsError(
        f"{path} holds no weights: found {found[:200] or 'nothing'}.\n"
        f"  Expected a dictionary of tensors, at the top or under {', '.join(CONTAINERS)}."
    )


def load_weights(
    module: nn.Module, state: StateDict, *, classifiers: Iterable[str], name: str, path: Path
) -> None:
    """Put weights into a network; every tensor but those of the classifier must fit exactly.

    A classifier of other classes than the network's is left out and the network's own set to
    zero: features do not depend on it.

    Args:
        module: the network.
        state: what was read, possibly with a wrapper's prefixes.
        classifiers: module paths of the classifiers.
        name: of the network, for messages.
        path: of the file, for messages.

    Raises:
        WeightsError: tensors are missing, unknown or of another shape, or not finite.
    """
    expected = module.state_dict()
    state = strip_prefixes(state, expected)
    ignored = tuple(_head_prefix(expected, classifier) for classifier in classifiers)
    usable = {key: state[key] for key in expected if _fits(state.get(key), expected[key])}
    for key, values in expected.items():
        if key.endswith("num_batches_tracked"):
            usable.setdefault(key, values)  # a counter of training steps; old files lack it
        elif ignored and key.startswith(ignored):
            usable.setdefault(key, torch.zeros_like(values))
    misshaped = [key for key in expected if key in state and key not in usable]
    missing = [key for key in expected if key not in state and key not in usable]
    unexpected = [k for k in state if k not in expected and not (ignored and k.startswith(ignored))]
    if misshaped or missing or unexpected:
        shapes = [
            f"{key} {tuple(state[key].shape)} where {tuple(expected[key].shape)} is expected"
            for key in misshaped
        ]
        raise WeightsError(
            f"{path} does not fit {name}.\n"
            + _listed("missing", missing, len(expected))
            + _listed("unknown", unexpected, len(state))
            + _listed("of another shape", shapes, len(expected))
            + _architecture_hint(state, name)
            + "  Expected the weights of the same architecture; only the classifier may differ."
        )
    _check_finite(usable, path)
    module.load_state_dict(usable)


def strip_prefixes(state: StateDict, expected: Iterable[str]) -> StateDict:
    """Undo what wrappers put before every name.

    Of a larger module (a projection head beside the backbone) only the network is kept.

    Args:
        state: names as they were saved.
        expected: names as the network has them.
    """
    expected = set(expected)
    best = max(_prefixes(state), key=lambda prefix: _n_matches(state, prefix, expected))
    if not best or _n_matches(state, best, expected) == 0:
        return state
    return {key.removeprefix(best): values for key, values in state.items() if key.startswith(best)}


def _prefixes(state: StateDict) -> list[str]:
    """Every chain of known prefixes that some name begins with, shortest first."""
    chains = [""]
    for chain in chains:
        for prefix in PREFIXES:
            longer = chain + prefix
            is_new = longer not in chains and longer.count(".") <= _MAX_PREFIXES
            if is_new and any(key.startswith(longer) for key in state):
                chains.append(longer)
    return chains


def _n_matches(state: StateDict, prefix: str, expected: set[str]) -> int:
    return sum(key.removeprefix(prefix) in expected for key in state if key.startswith(prefix))


def _head_prefix(expected: Mapping[str, Any], classifier: str) -> str:
    """Names of the classifier, and of what others put in its place, begin with this.

    ``fc`` may have become ``fc.1``; a ``classifier`` that holds nothing but ``classifier.1`` may
    have become a plain layer.
    """
    head = f"{classifier}."
    while "." in head[:-1]:
        parent = head[:-1].rpartition(".")[0] + "."
        others = [k for k in expected if k.startswith(parent) and not k.startswith(head)]
        if others:
            return head
        head = parent
    return head


def _architecture_hint(state: StateDict, name: str) -> str:
    """Name the architectures that have exactly as many parameters as a file."""
    counters = ("running_mean", "running_var", "num_batches_tracked")
    n_parameters = sum(v.numel() for key, v in state.items() if not key.endswith(counters))
    alike = [other for other in names_by_parameters(n_parameters) if other != name]
    return f"  It has as many parameters as {' or '.join(alike)}.\n" if alike else ""


def _fits(values: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return values is not None and values.shape == expected.shape


def _listed(what: str, keys: list[str], n_total: int) -> str:
    if not keys:
        return ""
    shown = ", ".join(keys[:_MAX_KEYS_SHOWN]) + (", …" if len(keys) > _MAX_KEYS_SHOWN else "")
    return f"  {len(keys)} of {n_total} tensors {what}: {shown}\n"


def _check_finite(state: StateDict, path: Path) -> None:
    broken = [
        key for key, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())
    ]
    if broken:
        raise WeightsError(
            f"{path} holds numbers that are not finite in {len(broken)} of {len(state)} tensors: "
            f"{', '.join(broken[:_MAX_KEYS_SHOWN])}.\n"
            f"  The training that wrote it has diverged; use an earlier checkpoint."
        )
