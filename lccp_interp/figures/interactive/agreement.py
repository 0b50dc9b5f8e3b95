"""Agreement of head metrics for the screen: rank correlation below the diagonal, shared top heads above it."""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.agreement_panels import AgreementMap, agreement_map
from lccp_interp.figures.interactive.canvas import Marks, colourscale, layout, plain
from lccp_interp.store import Run

MAX_WRITTEN = 14
"""With more metrics the cells are too small for numbers; the pointer shows them."""


def metric_agreement(run: Run | RunTables, *, checkpoint: str | None = None) -> go.Figure:
    """Whether head metrics rank the heads alike, at one checkpoint.

    Arguments and errors as in `lccp_interp.figures.paper.metric_agreement`.
    """
    made = agreement_map(RunTables.of(run), checkpoint)
    names = [html.escape(name) for name in made.metrics]
    figure = go.Figure()
    bars: Any = {"thickness": 12, "outlinewidth": 0, "len": 1.0, "xref": "paper"}
    halves = (
        (made.overlap, style.SCORES, (0, 1), f"above:<br>share of<br>top {made.top_k}", 1.01),
        (made.spearman, style.CORRELATION, (-1, 1), "below:<br>rank<br>correlation", 1.12),
    )
    for matrix, colours, (low, high), title, x in halves:
        bar = {"title": {"text": title, "font": {"size": 11}}, "x": x}
        figure.add_trace(
            go.Heatmap(
                z=[plain(row) for row in matrix], text=_hover(made, names), hoverinfo="text", hoverongaps=False,
                zmin=low, zmax=high, colorscale=colourscale(colours), xgap=1, ygap=1, colorbar=bars | bar,
            )
        )  # fmt: skip
    marks = Marks()
    for row, column in made.undefined:
        marks.cell(0, row, column, fillcolor=style.UNDEFINED, line={"color": "white", "width": 1}, layer="below")
    for row in range(len(names)):
        for column in range(len(names)):
            text = "n/a" if (row, column) in made.undefined else made.text(row, column)
            if text and len(names) <= MAX_WRITTEN:
                strong = (abs(made.spearman[row, column]) if row > column else made.overlap[row, column]) > 0.6
                font = {"size": 11, "color": "white" if strong else style.INK}
                marks.notes.append(
                    {"x": column, "y": row, "xref": "x", "yref": "y", "text": text, "showarrow": False, "font": font}
                )
    marks.put(figure)
    ticks = {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False, "zeroline": False}
    figure.update_xaxes(range=[-0.5, len(names) - 0.5], tickangle=-90, automargin=True, **ticks)
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], automargin=True, **ticks)
    return layout(
        figure, height=max(360, 130 + 38 * len(names)), plot_bgcolor="white",
        margin={"l": 62, "r": 170, "t": 48, "b": 52},
    )  # fmt: skip


def _hover(made: AgreementMap, names: list[str]) -> list[list[str]]:
    found = {(row["metric"], row["other"]): row for row in made.rows.iter_rows(named=True)}
    texts = []
    for row in range(len(names)):
        line = []
        for column in range(len(names)):
            pair = found.get((made.metrics[min(row, column)], made.metrics[max(row, column)]))
            line.append("" if pair is None else _pair(pair, names[row], names[column]))
        texts.append(line)
    return texts


def _pair(pair: dict[str, Any], one: str, other: str) -> str:
    ends = f"{style.format_number(pair['ci_low'])} to {style.format_number(pair['ci_high'])}"
    return (
        f"<b>{one} and {other}</b><br>rank correlation {style.format_number(pair['spearman'])} (95 % interval {ends})"
        f"<br>{style.format_number(pair['overlap'])} of the top {pair['top_k']} in both, "
        f"{style.format_number(pair['overlap_by_chance'])} by chance<br>{pair['n_heads']} heads, n = {pair['n']}"
    )
