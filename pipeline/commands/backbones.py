"""``tlpipe backbones``: which networks there are, and the layers of one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pipeline.backbones import DEFAULT_BACKBONE, PENULTIMATE
from pipeline.commands.console import Console, output_options

if TYPE_CHECKING:
    from pipeline.backbones.catalogue import Spec
    from pipeline.backbones.facts import Facts

MAX_ROWS = 40


@click.command("backbones")
@click.argument("pattern", required=False)
@click.option(
    "--modules", is_flag=True, help="With one NAME: every module path, not only the stages."
)
@output_options
def command(pattern: str | None, modules: bool, as_json: bool, quiet: bool) -> None:
    """List the backbones that can be used, or the layers of one.

    PATTERN is a piece of a name or a glob; an exact NAME shows its layers. Nothing is
    downloaded.

    \b
    Examples:
      tlpipe backbones                       a few to begin with
      tlpipe backbones resnet                every name with "resnet" in it
      tlpipe backbones 'timm:vit_*dinov2*'   a glob
      tlpipe backbones resnet50              its weights and layers
    """
    console = Console(as_json=as_json, quiet=quiet)
    if pattern is None:
        _show_first_choices(console)
        return
    from pipeline.backbones.catalogue import matching_names, parse_spec
    from pipeline.errors import UnknownNameError

    try:
        spec = parse_spec(pattern)
    except UnknownNameError:
        names = matching_names(pattern)
        if not names:
            raise
        _show_list(console, names)
        return
    _show_one(console, pattern, spec, modules=modules)


def _show_first_choices(console: Console) -> None:
    from pipeline.backbones.catalogue import (
        BUNDLED,
        smallest_of_each_family,
        timm_names,
        torchvision_names,
    )

    names = [*BUNDLED, "pixels", *smallest_of_each_family()]
    _show_list(console, names)
    console.note(
        f"These are the bundled ones and the smallest of each torchvision family; there are "
        f"{len(torchvision_names())} names of torchvision and {len(timm_names()):,} of timm."
    )
    console.next_steps(
        [
            "tlpipe backbones resnet                  names with a piece of text in them",
            f"tlpipe backbones {DEFAULT_BACKBONE}      weights and layers of one",
        ]
    )


def _show_list(console: Console, names: list[str]) -> None:
    from pipeline.backbones.facts import backbone_facts

    shown = [backbone_facts(name) for name in (names if console.as_json else names[:MAX_ROWS])]
    console.document({"n_matches": len(names), "backbones": [asdict(facts) for facts in shown]})
    console.table(
        ["name", "parameters", "features", "input", "weights here?"],
        [_row(facts) for facts in shown],
    )
    if len(names) > len(shown):
        console.note(
            f"{len(shown)} of {len(names):,} matching names are shown; a longer PATTERN shows "
            "others, and --json all of them."
        )


def _row(facts: Facts) -> tuple[str, ...]:
    return (
        facts.name,
        _millions(facts.n_parameters),
        f"{facts.n_features:,}",
        f"{facts.height}×{facts.width}",
        facts.weights,
    )


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number else "—"


def _show_one(console: Console, pattern: str, spec: Spec, *, modules: bool) -> None:
    from pipeline.backbones.catalogue import matching_names
    from pipeline.backbones.facts import backbone_facts, backbone_trace

    facts = backbone_facts(pattern)
    traced, stages = backbone_trace(spec)
    layers: dict[str, tuple[int, ...]] = {
        **(traced.shapes if modules else {stage: traced.shapes[stage] for stage in stages}),
        PENULTIMATE: (traced.n_features,),
    }
    document: dict[str, Any] = {**asdict(facts), "stages": list(stages), "layers": layers}
    console.document(document)
    console.result(f"{facts.name}: {_millions(facts.n_parameters)} parameters")
    console.result(f"input     {facts.height}×{facts.width} pixels")
    console.result(f"weights   {facts.weights}")
    if facts.tags:
        console.result(f"tags      {facts.tags[0]} (default){_others(facts.tags)}")
    console.table(
        ["layer", "shape"], [(name, "×".join(map(str, shape))) for name, shape in layers.items()]
    )
    if stages:
        console.note(_about_layers(len(traced.shapes), modules=modules))
    others = [name for name in matching_names(pattern) if name != spec.name]
    if others:
        console.note(
            f"{len(others)} more names hold it; list them:  tlpipe backbones '*{pattern}*'"
        )
    console.next_steps([f"tlpipe extract DATA --backbone {pattern}"])


def _others(tags: tuple[str, ...]) -> str:
    return "".join(f", {tag}" for tag in tags[1:])


def _about_layers(n_modules: int, *, modules: bool) -> str:
    if modules:
        return f'"{PENULTIMATE}" is what the network\'s own classifier sees.'
    return (
        f'"all" stands for these. Any of the {n_modules} module paths is a layer as well '
        f"(--modules lists them)."
    )
