"""Which backbones there are: a name -> the library that knows it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal

from pipeline.backbones import DEFAULT_BACKBONE
from pipeline.errors import UnknownNameError, UsageError

Family = Literal["bundled", "pixels", "torchvision", "timm"]

BUNDLED = (DEFAULT_BACKBONE,)
PIXELS_SIZE = 32
LIST_COMMAND = "List them with:  tlpipe backbones  or  tlpipe backbones PATTERN"


@dataclass(frozen=True)
class Spec:
    """A backbone as a user named it.

    Attributes:
        family: who knows it.
        architecture: its name there; for pixels their number a side.
        tag: which of its weights; "" for the default ones.
    """

    family: Family
    architecture: str
    tag: str = ""

    @property
    def name(self) -> str:
        """The canonical name, without the weights."""
        if self.family == "bundled":
            return self.architecture
        return f"{self.family}:{self.architecture}"


def parse_spec(spec: str) -> Spec:
    """Understand "resnet50", "resnet50:TAG", "torchvision:…", "timm:…", "pixels:64" and the like.

    A bare name is the bundled network's, then torchvision's, then timm's.

    Raises:
        UnknownNameError: nobody knows the name or the tag; close matches are offered.
        UsageError: a part of it makes no sense.
    """
    head, _, rest = spec.partition(":")
    if head == "pixels":
        return Spec("pixels", str(_pixels_size(rest)))
    if spec in BUNDLED:
        return Spec("bundled", spec)
    if head == "timm":
        return _timm_spec(spec, rest)
    if head == "torchvision":
        name, _, tag = rest.partition(":")
        return _torchvision_spec(spec, name, tag)
    if head in torchvision_names():
        return _torchvision_spec(spec, head, rest)
    if not rest and spec.partition(".")[0] in {*timm_names(), *_renamed_in_timm()}:
        return _timm_spec(spec, spec)
    raise _unknown(spec)


@cache
def torchvision_names() -> tuple[str, ...]:
    """Names of torchvision's image classifiers."""
    from torchvision import models

    return tuple(models.list_models(module=models))


@cache
def torchvision_tags(name: str) -> tuple[str, ...]:
    """Names of the weights of a torchvision classifier, the default ones first."""
    from torchvision.models import get_model_weights

    weights = get_model_weights(name)
    tags = [entry.name for entry in weights]
    return (weights.DEFAULT.name, *(tag for tag in tags if tag != weights.DEFAULT.name))


@cache
def timm_names() -> tuple[str, ...]:
    """Names of timm's architectures, without tags."""
    import timm

    return tuple(timm.list_models())


@cache
def timm_tags(name: str) -> tuple[str, ...]:
    """Names of the weights of a timm architecture, the default ones first; () if it has none."""
    from timm.models import get_pretrained_cfg, list_pretrained

    default = get_pretrained_cfg(name)
    if default is None:
        return ()
    tags = [full.partition(".")[2] for full in list_pretrained(f"{name}.*")]
    if list_pretrained(name):
        tags.append("")
    if default.has_weights and default.tag:
        tags.insert(0, default.tag)
    return tuple(dict.fromkeys(tag for tag in tags if tag))


def all_names() -> list[str]:
    """Canonical names of every backbone: bundled, pixels, torchvision, timm."""
    return [
        *BUNDLED,
        f"pixels:{PIXELS_SIZE}",
        *(f"torchvision:{name}" for name in torchvision_names()),
        *(f"timm:{name}" for name in timm_names()),
    ]


def matching_names(pattern: str) -> list[str]:
    """Canonical names that match a glob ("*resnet*50*"), or hold a piece of text; any case."""
    pattern = pattern.lower()
    if not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    return [name for name in all_names() if fnmatchcase(name.lower(), pattern)]


def smallest_of_each_family() -> list[str]:
    """Canonical names: one torchvision classifier of each module that defines some."""
    from torchvision.models import get_model_builder, get_model_weights

    families: dict[str, tuple[int, str]] = {}
    for name in torchvision_names():
        n_parameters = get_model_weights(name).DEFAULT.meta["num_params"]
        module = get_model_builder(name).__module__
        families[module] = min(families.get(module, (n_parameters, name)), (n_parameters, name))
    return [f"torchvision:{name}" for _, name in families.values()]


def names_by_parameters(n_parameters: int) -> list[str]:
    """Canonical names of the torchvision classifiers with exactly so many parameters."""
    from torchvision.models import get_model_weights

    return [
        f"torchvision:{name}"
        for name in torchvision_names()
        if get_model_weights(name).DEFAULT.meta["num_params"] == n_parameters
    ]


def _renamed_in_timm() -> dict[str, str | None]:
    from timm.models import get_deprecated_models

    renamed: dict[str, str | None] = get_deprecated_models()
    return renamed


def _pixels_size(text: str) -> int:
    if not text:
        return PIXELS_SIZE
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UsageError(
            f'"pixels:{text}" is not understood; expected pixels or pixels:SIZE, such as pixels:64.'
        )
    return int(text)


def _torchvision_spec(spec: str, name: str, tag: str) -> Spec:
    if name not in torchvision_names():
        raise UnknownNameError("backbone", spec, _with_bare_names(), LIST_COMMAND)
    if tag == "DEFAULT":
        tag = ""
    if tag and tag not in torchvision_tags(name):
        raise UnknownNameError(f"weights of torchvision:{name}", tag, torchvision_tags(name))
    return Spec("torchvision", name, tag)


def _timm_spec(spec: str, full: str) -> Spec:
    current = _renamed_in_timm().get(full) or full
    name, _, tag = current.partition(".")
    if name not in timm_names():
        raise UnknownNameError("backbone", spec, _with_bare_names(), LIST_COMMAND)
    if tag and tag not in timm_tags(name):
        raise UnknownNameError(f"weights of timm:{name}", tag, timm_tags(name))
    return Spec("timm", name, tag)


def _unknown(spec: str) -> UnknownNameError:
    return UnknownNameError("backbone", spec, _with_bare_names(), LIST_COMMAND)


def _with_bare_names() -> list[str]:
    """Names as they may be typed; timm's only where torchvision has no such name."""
    bare = dict.fromkeys(torchvision_names())
    also = [name for name in timm_names() if name not in bare]
    return [*BUNDLED, "pixels", *bare, *also, *all_names()]
