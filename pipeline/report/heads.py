"""The page of a sweep: heads against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.heads import describe_layers, describe_setting
from pipeline.report.page import Page, bytes_text, log_axis, seconds_text

_INK, _ACCENT = "#5b6470", "#2f6fed"


def heads_page(run: Mapping[str, Any]) -> str:
    """HTML of a sweep's ``run.json``.

    Args:
        run: what the file holds.
    """
    from plotly.graph_objects import Figure

    source = ", ".join(run["stores"])
    page = Page(f"Heads on {source}")
    page.paragraph(f"{run['head']} is recommended: {run['why']}.")
    page.paragraph(
        f"Settings were chosen by {run['metric']} on {run['chosen_by']}; "
        f"{_scored_words(run)} Samples: "
        + ", ".join(f"{name} {n:,}" for name, n in run["n_samples"].items() if n)
        + f" ({run['split_origin']}).",
        quiet=True,
    )
    page.heading("Table")
    columns, rows = table_of(run)
    names = [line["head"] for line in run["heads"]]
    page.table(columns, rows, chosen=names.index(run["head"]))
    lines = [line for line in run["heads"] if line["top1"]]
    if lines:
        page.heading("Accuracy against seconds")
        figure = Figure()
        _scatter(figure, lines, chosen=str(run["head"]))
        page.plot(figure)
    if "confusion" in run and run["scored_on"]:
        page.heading(f"Confusion of {run['head']} on {run['scored_on']}")
        figure = Figure()
        confusion_plot(figure, run["confusion"])
        page.plot(figure)
    notes = [*run["notes"], *(f"{head}: {why}" for head, why in run["failures"].items())]
    notes += [
        f"{line['head']}: {note}"
        for line in run["heads"]
        if line["head"] != run["head"]
        for note in line["notes"]
    ]
    if notes:
        page.heading("Notes")
        page.items(notes)
    page.heading("How it was made")
    page.code(str(run.get("command", "")))
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    page.paragraph(versions, quiet=True)
    return page.html()


def _scored_words(run: Mapping[str, Any]) -> str:
    if run["scored_on"] == "test":
        return "the test split was scored once, by heads that were fitted on train and val."
    if run["scored_on"]:
        return "there is no test split, so that the same samples score, which flatters."
    return "nothing could be scored."


def table_of(run: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a sweep's table, best on validation first; for pages and terminals."""
    several = len({(tuple(line["layers"]), line["scaling"]) for line in run["heads"]}) > 1
    repeats = max(len(line["repeats"]) for line in run["heads"])
    scored = run["scored_on"] or "test"
    what = f"{scored} top-1 [95 %]" + (f", mean of {repeats}" if repeats > 1 else "")
    columns = ["head", f"val {run['metric']}", what, f"{scored} macro-F1", "NLL", "ECE"]
    columns += [f"against {run['head']}", "settings", "sweep", "predict 1,000", "memory", "model"]
    columns += ["best setting"] + (["features"] if several else [])
    rows = []
    for line in run["heads"]:
        scores = line["metrics"].get(line["scored_on"], {})
        row = [
            line["head"],
            number_text(line[f"val_{run['metric']}"]),
            score_text(line["top1"]),
            *(
                number_text(scores.get(name, {}).get("value"))
                for name in ("macro_f1", "nll", "ece")
            ),
            difference_text(line),
            f"{line['n_trials']}" + (f", {line['n_failed']} failed" if line["n_failed"] else ""),
            seconds_text(line["seconds"]),
            seconds_text(line["predict_seconds_per_1000"]),
            bytes_text(line["memory_bytes"]),
            bytes_text(line["size_bytes"]),
            describe_setting(line["setting"]),
        ]
        if several:
            row.append(f"{describe_layers(line['layers'])}, {line['scaling']}")
        rows.append(row)
    for head in run["failures"]:
        failed = ["failed" if column == "best setting" else "–" for column in columns]
        rows.append([head, *failed[1:]])
    return columns, rows


def difference_text(line: Mapping[str, Any]) -> str:
    """A paired difference in points of accuracy, with its interval and p-value."""
    if "difference" not in line:
        return "–"
    difference = line["difference"]
    return (
        f"{100 * difference['value']:+.1f} [{100 * difference['low']:+.1f}, "
        f"{100 * difference['high']:+.1f}] points, p = {line['p_value']:.2g}"
    )


def number_text(value: float | None) -> str:
    """Three decimals; "–" for None."""
    return "–" if value is None else f"{value:.3f}"


def score_text(score: Mapping[str, float] | None) -> str:
    """A value with its interval; "–" for None."""
    if score is None:
        return "–"
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _scatter(figure: Any, lines: Sequence[Mapping[str, Any]], *, chosen: str) -> None:
    """Accuracy with its interval against the seconds of the whole sweep, a point a head."""
    for line in lines:
        top1 = line["top1"]
        figure.add_scatter(
            x=[line["seconds"]],
            y=[top1["value"]],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [top1["high"] - top1["value"]],
                "arrayminus": [top1["value"] - top1["low"]],
                "thickness": 1.2,
            },
            mode="markers+text",
            text=[escape(line["head"])],
            textposition="middle right",
            hovertext=[
                f"{escape(line['head'])}: {score_text(top1)}<br>{seconds_text(line['seconds'])}, "
                f"model {bytes_text(line['size_bytes'])}<br>"
                f"{escape(describe_setting(line['setting']))}"
            ],
            hoverinfo="text",
            marker={"size": 10, "color": _ACCENT if line["head"] == chosen else _INK},
            showlegend=False,
        )
    scored = lines[0]["scored_on"]
    figure.update_layout(
        template="simple_white",
        height=420,
        margin={"l": 70, "r": 90, "t": 20, "b": 60},
        xaxis=log_axis([line["seconds"] for line in lines])
        | {"title": {"text": "seconds to choose, fit and score"}},
        yaxis={"title": {"text": f"accuracy on {scored}, 95 % interval"}, "tickformat": ".3f"},
    )


def confusion_plot(figure: Any, confusion: Mapping[str, Any]) -> None:
    """Counts, true class by row."""
    names = [escape(str(name)) or "(empty)" for name in confusion["classes"]]
    counts = confusion["counts"]
    shares = [[n / (sum(row) or 1) for n in row] for row in counts]
    few = len(names) <= 20
    figure.add_heatmap(
        x=list(range(len(names))),
        y=list(range(len(names))),
        z=shares,
        customdata=counts,
        text=counts if few else None,
        texttemplate="%{text}" if few else None,
        colorscale=[[0, "#ffffff"], [1, _ACCENT]],
        zmin=0,
        zmax=1,
        colorbar={"title": {"text": "share of the class"}},
        hovertemplate="true %{y}, predicted %{x}: %{customdata}<extra></extra>",
    )
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": names}
    figure.update_layout(
        template="simple_white",
        height=max(360, min(900, 34 * len(names) + 160)),
        margin={"l": 120, "t": 20, "b": 100},
        xaxis={"title": {"text": "predicted"}} | (ticks if len(names) <= 60 else {}),
        yaxis={"title": {"text": "true"}, "autorange": "reversed"}
        | (ticks if len(names) <= 60 else {}),
    )
