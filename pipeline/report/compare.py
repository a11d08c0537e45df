"""The page of a comparison: frozen features and fine-tuning against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.report.heads import confusion_plot, difference_text, number_text, score_text
from pipeline.report.page import Page, log_axis, seconds_text

_NEAR = 0.95
_SHOWN_FAILURES = 20
_COLOURS = ("#2f6fed", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d", "#5c940d", "#495057")


def compare_page(document: Mapping[str, Any]) -> str:
    """HTML of a comparison's ``run.json``.

    Args:
        document: what the file holds.
    """
    from plotly.graph_objects import Figure

    lines = document["lines"]
    question = "Frozen or fine-tuned" if any(line["is_tuned"] for line in lines) else "Which head"
    page = Page(f"{question}: {document.get('data') or 'runs compared'}")
    page.paragraph(document["verdict"])
    page.paragraph(
        f"{_scored_words(document)} ({document['split_origin']}). "
        "Settings were chosen on other samples; the table is in the order of its scores, the "
        "verdict takes the best on validation.",
        quiet=True,
    )
    page.heading("Table")
    columns, rows = compare_table(document)
    page.table(columns, rows)
    page.heading("Accuracy against seconds")
    figure = Figure()
    _points(figure, lines)
    page.plot(figure)
    if any(line["curve"] for line in lines):
        page.heading("While training: start, slope, asymptote")
        figure = Figure()
        _curves(figure, lines)
        page.plot(figure)
        page.table(*_curve_table(lines))
    if document.get("sizes"):
        page.heading("Accuracy against training samples")
        figure = Figure()
        _sizes(figure, document["sizes"])
        page.plot(figure)
        page.items([size_words(curve) for curve in document["sizes"]])
    for confusion in document.get("confusions", ()):
        page.heading(
            f"Confusion on {confusion['scored_on']} of the best on validation, {confusion['name']}"
        )
        figure = Figure()
        confusion_plot(figure, confusion)
        page.plot(figure)
    notes = [*document["notes"]]
    notes += [f"{name} failed: {why}" for name, why in document.get("failures", {}).items()]
    skipped = list(document.get("skipped", {}).items())
    notes += [f"Skipped {name}: {why}" for name, why in skipped[:_SHOWN_FAILURES]]
    if len(skipped) > _SHOWN_FAILURES:
        notes.append(f"{len(skipped) - _SHOWN_FAILURES:,} more images were skipped.")
    if notes:
        page.heading("Notes")
        page.items(notes)
    page.heading("How it was made")
    page.code(str(document.get("command", "")))
    page.items([line["path"] for line in lines])
    return page.html()


def _scored_words(document: Mapping[str, Any]) -> str:
    """Where the lines were scored; of each label column where that is not the same."""
    of_label = {line["label"]: line for line in document["lines"]}
    said = {
        label: f"scored on {line['scored_on']}; samples: "
        + ", ".join(f"{name} {n:,}" for name, n in line["n_samples"].items() if n)
        for label, line in of_label.items()
    }
    first = next(iter(said.values()))
    if len(set(said.values())) == 1:
        return f"{first[0].upper()}{first[1:]}"
    return ". ".join(f"{label}: {words}" for label, words in said.items())


def _curve_table(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Start, slope and asymptote of each training, in numbers."""
    columns = [
        "training", "at the start", "after the first epoch", "best", "epoch of the best",
        f"seconds to {100 * _NEAR:.0f} % of the best",
    ]  # fmt: skip
    rows = []
    for line in lines:
        curve = [entry for entry in line["curve"] if entry.get("val_top1") is not None]
        if not curve:
            continue
        best = max(curve, key=lambda entry: entry["val_top1"])
        near = next(e for e in curve if e["val_top1"] >= _NEAR * best["val_top1"])
        rows.append(
            [
                line["name"],
                *(
                    number_text(next((e["val_top1"] for e in curve if e["epoch"] == epoch), None))
                    for epoch in (0, 1)
                ),
                number_text(best["val_top1"]),
                str(best["epoch"]),
                seconds_text(near["seconds"]),
            ]
        )
    return columns, rows


def compare_table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a comparison, for pages and terminals."""
    splits = {line["scored_on"] for line in document["lines"]}
    scored = f"{document['scored_on']} top-1" if len(splits) == 1 else "top-1"
    columns = [
        "what", f"{scored} [95 %]", "val top-1", "macro-F1", "ECE", "against the one above",
        "tried", "parameters trained", "extract", "fit", "total",
    ]  # fmt: skip
    rows = [
        [
            line["name"],
            score_text(line["top1"]),
            number_text(line["val_top1"]),
            number_text(line["macro_f1"]),
            number_text(line["ece"]),
            difference_text(line),
            _tried_text(line),
            "–" if line["n_trained"] is None else f"{line['n_trained']:,}",
            "none" if line["extract_seconds"] == 0 else seconds_text(line["extract_seconds"]),
            seconds_text(line["fit_seconds"]),
            seconds_text(line["total_seconds"]),
        ]
        for line in document["lines"]
    ]
    if any(line.get("device_seconds") for line in document["lines"]):
        columns.append("GPU time")
        for row, line in zip(rows, document["lines"], strict=True):
            used = line.get("device_seconds")
            row.append("none" if used is None else f"{seconds_text(used)} {line['device']}")
    return columns, rows


def _tried_text(line: Mapping[str, Any]) -> str:
    """What was tried before the last fit, what that took, and the budget of all where one is."""
    if "n_tried" not in line:  # of an older release
        return "–"
    what = "learning rate" if line["kind"] == "finetune" else "setting"
    parts = [f"{line['n_tried']} {what}{'s' if line['n_tried'] != 1 else ''}"]
    if line["n_tried"] > 1:
        parts.append(seconds_text(line["search_seconds"]))
    if line["budget_seconds"]:
        parts.append(f"budget {seconds_text(line['budget_seconds'])}")
    return ", ".join(parts)


def _seconds(line: Mapping[str, Any]) -> float:
    return float(line["fit_seconds"] if line["total_seconds"] is None else line["total_seconds"])


def _points(figure: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy with its interval against total seconds; a trained layer alone leaves all frozen."""
    for tuned, colour in ((False, _COLOURS[0]), (True, _COLOURS[1])):
        some = [line for line in lines if line["is_tuned"] == tuned]
        if not some:
            continue
        figure.add_scatter(
            x=[_seconds(line) for line in some],
            y=[line["top1"]["value"] for line in some],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [line["top1"]["high"] - line["top1"]["value"] for line in some],
                "arrayminus": [line["top1"]["value"] - line["top1"]["low"] for line in some],
                "thickness": 1.2,
            },
            mode="markers",
            name="trained network" if tuned else "frozen features",
            hovertext=[
                f"{escape(line['name'])}<br>{score_text(line['top1'])}, "
                f"{seconds_text(_seconds(line))}"
                for line in some
            ],
            hoverinfo="text",
            marker={"size": 10, "color": colour},
        )
    _layout(figure, "seconds, with the extraction", "accuracy, 95 % interval")
    figure.update_xaxes(**log_axis([_seconds(line) for line in lines]))


def _curves(figure: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """Validation accuracy against seconds of training; the best frozen head as a level."""
    colours = iter(_COLOURS * 4)
    for line in lines:
        curve = [entry for entry in line["curve"] if entry.get("val_top1") is not None]
        if curve:
            figure.add_scatter(
                x=[entry["seconds"] for entry in curve],
                y=[entry["val_top1"] for entry in curve],
                mode="lines+markers",
                name=escape(line["name"]),
                line={"color": next(colours)},
            )
    frozen = [line for line in lines if line["kind"] != "finetune" and line["val_top1"]]
    if frozen:
        best = max(frozen, key=lambda line: line["val_top1"])
        figure.add_hline(
            y=best["val_top1"],
            line={"dash": "dot", "color": "#495057"},
            annotation={"text": escape(best["name"]), "font": {"size": 12}},
        )
    _layout(figure, "seconds of training", "accuracy on validation")


def size_words(curve: Mapping[str, Any]) -> str:
    """Accuracy by training samples a class, and what finding it out took."""
    points = ", ".join(f"{p['n_per_class']:,}: {_point_text(p)}" for p in curve["points"])
    n_fits = curve["n_fits"]
    return (
        f"{curve['name']}, accuracy by training samples a class (mean ± 95 % over draws of "
        f"samples): {points}. Beside the table: "
        f"{n_fits:,} fit{'s' if n_fits != 1 else ''} in {seconds_text(curve['seconds'])}, "
        f"{curve['how']}."
    )


def _point_text(point: Mapping[str, Any]) -> str:
    """A mean with half the width of its interval; of a single draw there is none."""
    if point["low"] is None:
        return f"{point['mean']:.3f} (1 draw)"
    # The longer side: the other one may end at 0 or 1.
    half = max(point["high"] - point["mean"], point["mean"] - point["low"])
    return f"{point['mean']:.3f} ± {half:.3f}"


def _sizes(figure: Any, curves: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy by training samples a class."""
    for curve, colour in zip(curves, _COLOURS * 4, strict=False):
        points = curve["points"]
        sides = [
            [None if p["low"] is None else abs(p[side] - p["mean"]) for p in points]
            for side in ("high", "low")
        ]
        figure.add_scatter(
            x=[point["n_per_class"] for point in points],
            y=[point["mean"] for point in points],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": sides[0],
                "arrayminus": sides[1],
                "thickness": 1.2,
            },
            mode="lines+markers",
            name=escape(curve["name"]),
            line={"color": colour},
        )
    counts = sorted({point["n_per_class"] for curve in curves for point in curve["points"]})
    _layout(figure, "training samples a class", "accuracy on test, mean and 95 % over draws")
    figure.update_xaxes(type="log", tickvals=counts, ticktext=[f"{n:,}" for n in counts])


def _layout(figure: Any, x: str, y: str) -> None:
    figure.update_layout(
        template="simple_white",
        height=420,
        margin={"l": 70, "r": 30, "t": 20, "b": 60},
        xaxis={"title": {"text": x}},
        yaxis={"title": {"text": y}, "tickformat": ".3f"},
        showlegend=True,
    )
