"""``tlpipe verify``: is a feature store what was written, and what mends it if not."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, format_bytes, output_options, printable
from pipeline.commands.extract import DEFAULT_BACKBONE
from pipeline.commands.extract import command as extract
from pipeline.errors import EXIT_DONE, StoreError, TlpipeError, UsageError
from pipeline.extract.settings import DECODERS

if TYPE_CHECKING:
    from pipeline.store.manifest import Manifest
    from pipeline.store.repair import RepairReport
    from pipeline.store.verify import VerifyReport

FOLDER_LAYOUTS = ("classes", "splits", "flat")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--content", is_flag=True, help="Read every byte, and every feature.")
@click.option("--repair", is_flag=True, help="Read every byte, and mend what can be mended.")
@output_options
def command(store: Path, content: bool, repair: bool, as_json: bool, quiet: bool) -> int:
    """Check that a feature store or a packed file is what was written, and say what mends it.

    Checked are the manifest and its copy, the samples table, every shard's size and structure, and
    that each sample's features were made from its image; with --content every byte of every file,
    and that all features are finite. The backbone at hand is compared with the one that made the
    features. A store can be checked while it is being written. The exit code is 4 if there are
    problems.

    --repair moves damaged files to STORE/quarantine/ and deletes none. The next extract embeds the
    samples that were in them, and no others.

    \b
    Examples:
      tlpipe verify cache/photos/resnet50-1f3a9c02
      tlpipe verify cache/photos/resnet50-1f3a9c02 --content
      tlpipe verify cache/photos/resnet50-1f3a9c02 --repair
    """
    console = Console(as_json=as_json, quiet=quiet)
    if store.is_file():
        return _verify_pack(console, store, content=content, repair=repair)
    from pipeline.store.repair import repair_store
    from pipeline.store.verify import verify_store

    repaired = None
    with _progress(store, hidden=quiet or not (content or repair)) as on_progress:
        if repair:
            repaired = repair_store(store, on_progress=on_progress)
            report = repaired.after
        else:
            report = verify_store(store, content=content, on_progress=on_progress)
    _print(console, report, repaired)
    manifest = report.manifest
    weights = None if manifest is None else weights_at_hand(manifest)
    if weights is not None:
        _show(console, "backbone", [weights.summary, *weights.differences])
    forgot = repaired is not None and repaired.forgot
    if report.ok:
        mended = repaired is not None and repaired.done
        console.result("No problem is left." if mended else "No problem was found.")
    for note in report.notes:
        console.note(f"Note: {printable(note)}")
    again = "" if manifest is None else extract_command(store, manifest)
    if forgot:
        console.note("Labels and splits may be missing until the data is extracted again.")
        again += " --verify content"
    if report.ok and (report.n_pending or forgot):
        console.note("Options that choose images, such as --limit, are not kept: add yours.")
        console.next_steps([again, *_relabel_again(store, repaired)])
    elif report.ok and report.content:
        console.note(f"To check the images too:  {again} --verify content")
    console.document(_document(report, repaired, weights, again))
    return EXIT_DONE if report.ok else StoreError.exit_code


def _relabel_again(store: Path, repaired: RepairReport | None) -> list[str]:
    """Commands that set again what was lost with the samples table."""
    if repaired is None or repaired.before.manifest is None or repaired.after.manifest is None:
        return []
    kept = repaired.after.manifest.relabelled
    lost = (file for name, file in repaired.before.manifest.relabelled.items() if name not in kept)
    return [
        f"tlpipe relabel {shlex.quote(str(store))} {shlex.quote(printable(file))}"
        for file in dict.fromkeys(lost)
    ]


def _verify_pack(console: Console, path: Path, *, content: bool, repair: bool) -> int:
    """The same for a file of ``tlpipe pack``, which cannot be mended but only made again."""
    if repair:
        raise UsageError(
            f"{path} is a packed file: it can be made again from its store, not repaired.\n"
            f"  tlpipe verify {shlex.quote(str(path))} --content"
        )
    from pipeline.store.pack import pack_problems

    problems = pack_problems(path, content=content)
    console.result(str(path))
    _show(
        console, "checked", ["every byte" if content else "structure; --content reads every byte"]
    )
    for problem in problems or ["No problem was found."]:
        console.result(problem)
    document = {"path": str(path), "ok": not problems, "content": content, "problems": problems}
    console.document(document)
    return StoreError.exit_code if problems else EXIT_DONE


@contextmanager
def _progress(store: Path, *, hidden: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr over the bytes of the shards."""
    if hidden:
        yield None
        return
    size_bytes = sum(path.stat().st_size for path in store.glob("shards/*.h5"))
    label = f"Reading {format_bytes(size_bytes)}"
    with click.progressbar(length=size_bytes, label=label, file=sys.stderr) as bar:
        yield bar.update


def _print(console: Console, report: VerifyReport, repaired: RepairReport | None) -> None:
    """Say what was done and looked at, what is wrong and what mends it."""
    console.result(str(report.folder))
    if repaired is not None:
        _show(console, "found", [f"{p.where} {p.what}" for p in repaired.before.problems])
        _show(console, "repaired", repaired.done)
    skipped = f", {report.n_failed:,} skipped" if report.n_failed else ""
    pending = f", {report.n_pending:,} not embedded" if report.n_pending else ""
    read = format_bytes(report.n_bytes_read)
    samples = f"{report.n_samples:,}: {report.n_ok:,} with features{skipped}{pending}"
    if report.n_samples == 0 and any(p.where.startswith("samples") for p in report.problems):
        samples = "unknown: the samples table cannot be read"
    quickly = f"structure and sizes ({read} read); --content reads every byte"
    _show(console, "samples", [samples])
    _show(console, "shards", [f"{report.n_shards:,} with {report.n_rows:,} rows"])
    _show(console, "checked", [f"every byte ({read})" if report.content else quickly])
    _show(console, "PROBLEM", [f"{p.where} {p.what}" for p in report.problems])
    _show(console, "mended by", list(dict.fromkeys(p.remedy for p in report.problems)))


def _show(console: Console, name: str, lines: list[str]) -> None:
    """Print lines beside the name of what they tell of."""
    for k, line in enumerate(lines):
        console.result(f"  {'' if k else name:<10} {printable(line)}")


def _document(
    report: VerifyReport, repaired: RepairReport | None, weights: Weights | None, again: str
) -> dict[str, Any]:
    """Everything that was found, as plain values for JSON."""
    counts = {name: value for name, value in vars(report).items() if name.startswith("n_")}
    return {
        "path": str(report.folder),
        "ok": report.ok,
        "content": report.content,
        **counts,
        "problems": [vars(problem) for problem in report.problems],
        "notes": report.notes,
        "backbone": None if weights is None else vars(weights),
        "repaired": [] if repaired is None else repaired.done,
        "found": [] if repaired is None else [vars(p) for p in repaired.before.problems],
        "extract": again,
    }


@dataclass(frozen=True)
class Weights:
    """The backbone at hand against the recipe's.

    Attributes:
        state: "same", "other" or "unknown".
        summary: a sentence about it.
        differences: what differs, a line each.
    """

    state: str
    summary: str
    differences: list[str] = field(default_factory=list)


def weights_at_hand(manifest: Manifest) -> Weights:
    """Compare the backbone as it is now with the recipe's; nothing is downloaded."""
    try:
        now = _recipe_now(manifest)
    except (ImportError, TlpipeError) as error:
        why = str(error).splitlines()[0]
        return Weights("unknown", f"not compared: {why}")
    from pipeline.store.key import recipe_differences

    then = {name: manifest.recipe.get(name) for name in now}
    differences = recipe_differences(then, now)
    if not differences:
        return Weights("same", f"{now['backbone']} at hand is the recipe's")
    summary = (
        f"{now['backbone']} at hand is not the recipe's. The features stay what the recipe says; "
        "the next extract puts others beside them, in a store of their own:"
    )
    return Weights("other", summary, differences)


def _recipe_now(manifest: Manifest) -> dict[str, Any]:
    """What the recipe would say today of the backbone, its weights and its preprocessing.

    Raises:
        ImportError: torch is not here.
        TlpipeError: the backbone cannot be had on this machine as it is.
    """
    origin = _origin(manifest)
    if not origin:
        raise StoreError("the store does not say how its backbone was loaded.")
    from pipeline.backbones import load_backbone
    from pipeline.extract.recipe import decoding_of

    if not _is_here(origin["spec"], origin["weights"]):
        raise StoreError(f"the weights of {manifest.recipe.get('backbone')} are not at hand.")
    backbone = load_backbone(**origin)
    return {
        "backbone": backbone.name,
        "weights": backbone.weights_digest,
        "preprocess": backbone.preprocess.to_dict(),
        "decoding": decoding_of(_asked(manifest)["decode"]),
    }


def _origin(manifest: Manifest) -> dict[str, Any]:
    """The arguments of ``load_backbone`` that a store was made with; {} where it names none."""
    kinds = {"spec": str, "weights": str, "image_size": int | None, "seed": int}
    origin = manifest.provenance.get("backbone")
    if not isinstance(origin, dict) or origin.keys() != kinds.keys():
        return {}
    return origin if all(isinstance(origin[k], kind) for k, kind in kinds.items()) else {}


def _is_here(spec: str, weights: str) -> bool:
    """Whether a backbone can be loaded without a download.

    Raises:
        UnknownNameError: the libraries at hand know no such backbone.
    """
    from pipeline.backbones.catalogue import parse_spec, timm_tags, torchvision_tags
    from pipeline.backbones.facts import (
        WEIGHTS_BUNDLED,
        WEIGHTS_CACHED,
        WEIGHTS_NOT_NEEDED,
        where_weights_are,
    )

    found = parse_spec(spec)
    if weights == "random" or Path(weights).is_file():
        return True
    if weights != "default":
        known = {"torchvision": torchvision_tags, "timm": timm_tags}.get(found.family)
        if known is None or weights not in known(found.architecture):
            return False
        found = replace(found, tag=weights)
    return where_weights_are(found) in (WEIGHTS_BUNDLED, WEIGHTS_CACHED, WEIGHTS_NOT_NEEDED)


def extract_command(store: Path, manifest: Manifest) -> str:
    """The command that goes on with a store, as far as the store tells."""
    recipe, source = manifest.recipe, manifest.source
    origin = _origin(manifest)
    if not origin or "spec" not in source:
        return "tlpipe extract DATA"
    data, root = str(source["spec"]), str(source.get("root"))
    asked = _asked(manifest)
    if source.get("layout") in FOLDER_LAYOUTS and not os.path.exists(data):  # noqa: PTH110
        data = root  # it was typed in another folder
    is_manifest = source.get("layout") == "manifest" and str(Path(data).resolve().parent) != root
    options = {
        "--backbone": origin["spec"],
        "--weights": origin["weights"],
        "--layers": ",".join(asked["layers"]),
        "--pooling": recipe.get("pooling"),
        "--image-size": origin["image_size"],
        "--precision": asked["precision"],
        "--dtype": recipe.get("storage"),
        "--views": manifest.n_views,
        "--decode": asked["decode"],
        "--seed": origin["seed"],
        "--limit": source.get("limit"),
        "--root": root if is_manifest else None,
        "--cache": store.parent.parent if len(store.parts) > 2 else store.resolve().parents[1],
    }
    defaults = {param.opts[0]: param.default for param in extract.params}
    defaults["--backbone"] = DEFAULT_BACKBONE
    words = ["tlpipe", "extract", data]
    for name, value in options.items():
        if value is not None and str(value) != str(defaults[name]):
            words += [name, str(value)]
    return shlex.join(words)


def _asked(manifest: Manifest) -> dict[str, Any]:
    """What was asked for, where that is not in a recipe: "all", "auto", how images are decoded."""
    layers = manifest.recipe.get("layers", ["penultimate"])
    precision = str(manifest.recipe.get("precision"))
    asked = manifest.provenance.get("asked")
    told = asked if isinstance(asked, dict) else {}
    words = told.get("layers")
    is_text = isinstance(words, list) and all(isinstance(word, str) for word in words)
    precisions = [word for word in (told.get("precision"), precision) if word in PRECISIONS]
    decode = told.get("decode")
    return {
        "layers": words if is_text else layers,
        "precision": next(iter(precisions), "auto"),
        "decode": decode if decode in DECODERS else "cpu",
    }
