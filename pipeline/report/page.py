"""A self-contained HTML page: headings, paragraphs, tables, plots; text is never markup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2024; background: #fff; margin: 0; }
main { max-width: 84rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; } .quiet { color: #5b6470; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; border-bottom: 1px solid #e3e6ea;
  white-space: nowrap; }
td.long { white-space: normal; min-width: 16rem; }
th { color: #5b6470; font-weight: 600; } tr.chosen td { font-weight: 600; background: #eef4ff; }
code { font: .9em ui-monospace, monospace; background: #f3f4f6; padding: .1rem .3rem; }
"""
_LONG = 40
_FINE_DECADES = 3


class Page:
    """A page that is written from top to bottom.

    Args:
        title: at its top and in the browser's tab.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []
        self._has_plot = False

    def heading(self, text: str) -> None:
        """Begin a part."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str, *, quiet: bool = False) -> None:
        """A paragraph; a quiet one is for the record."""
        kind = ' class="quiet"' if quiet else ""
        self._parts.append(f"<p{kind}>{escape(text)}</p>")

    def code(self, text: str) -> None:
        """A command."""
        self._parts.append(f"<p><code>{escape(text)}</code></p>")

    def items(self, texts: Sequence[str]) -> None:
        """A list."""
        self._parts.append("<ul>" + "".join(f"<li>{escape(t)}</li>" for t in texts) + "</ul>")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, chosen: int | None = None
    ) -> None:
        """A table; the row number ``chosen`` stands out."""
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = ""
        for i, row in enumerate(rows):
            kind = ' class="chosen"' if i == chosen else ""
            body += f"<tr{kind}>{''.join(map(_cell, row))}</tr>"
        self._parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def plot(self, figure: Figure) -> None:
        """A plot; the first one brings the library along."""
        self._parts.append(
            figure.to_html(
                full_html=False,
                include_plotlyjs=not self._has_plot,
                config={"displaylogo": False, "responsive": True},
            )
        )
        self._has_plot = True

    def html(self) -> str:
        """All of it."""
        title = escape(self._title)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head>\n"
            f"<body><main><h1>{title}</h1>\n{chr(10).join(self._parts)}\n</main></body></html>\n"
        )


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > _LONG else ""
    return f"<td{kind}>{escape(text)}</td>"


def seconds_text(seconds: float | None) -> str:
    """``0.0042`` -> ``"4.2 ms"``; "–" for None."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def bytes_text(size_bytes: float | None) -> str:
    """``2_400_000`` -> ``"2.4 MB"``; "–" for None."""
    if size_bytes is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} GB"


def log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis, labelled at 1, 2 and 5 times powers of ten, few enough to be read.

    Args:
        values: what it shows; those above 0 decide which labels there are.
    """
    shown = [value for value in values if value > 0] or [1.0]
    low, high = (math.log10(end) for end in (min(shown), max(shown)))
    steps = (1, 2, 5) if high - low < _FINE_DECADES else (1,)
    powers = range(math.floor(low) - 1, math.ceil(high) + 2)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.12g}" for tick in ticks]}
