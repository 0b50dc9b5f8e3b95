"""Initial heads and newcomers on the screen: survival of a cohort, who is alive, every checkpoint against the base."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.cohorts import MEASURES, Cohort, base_comparison, cohort
from lccp_interp.figures.interactive.canvas import (
    BOTTOM_LEGEND,
    band,
    checkpoint_hover,
    layout,
    plain,
    token_axis,
    value_axis,
)
from lccp_interp.store import Run

MAX_BAR_LABELS = 20
X_LINE: dict[str, Any] = {
    "showgrid": False, "zeroline": False, "showline": True, "linecolor": style.INK, "linewidth": 1,
}  # fmt: skip


def cohort_survival(run: Run | RunTables) -> go.Figure:
    """Share of the base checkpoint's retrieval heads still alive, and how many of those alive are newcomers."""
    tables = RunTables.of(run)
    made = cohort(tables)
    figure = make_subplots(1, 2, horizontal_spacing=0.11)
    _survival(figure, tables, made)
    _shares(figure, tables, made)
    figure.update_layout(legend_traceorder="normal")
    return layout(figure, height=400, plot_bgcolor="white", barmode="stack", bargap=0.15, **BOTTOM_LEGEND)


def _survival(figure: go.Figure, tables: RunTables, made: Cohort) -> None:
    figure.update_xaxes(title={"text": "tokens since the base", "standoff": 8}, row=1, col=1, **X_LINE)
    value_axis(figure, "initial heads alive (%)", 1, range=[-3, 107], tickvals=[0, 25, 50, 75, 100])
    if made.why_no_curve:
        _empty(figure, made.why_no_curve, "x", "y", 1)
        return
    rows, colour = made.rows, style.COLOURS["from_base"]
    x = [float(tokens) for tokens in rows["tokens_since_base"]]
    ticks = style.nice_ticks(0, x[-1], 4)
    figure.update_xaxes(
        range=[-0.03 * x[-1], 1.03 * x[-1]], tickvals=ticks, ticktext=[style.format_tokens(tick) for tick in ticks],
        ticks="outside", ticklen=4, row=1, col=1,
    )  # fmt: skip
    alive, low, high = (100 * rows[name].to_numpy() for name in ("survival", "ci_low", "ci_high"))
    band(figure, x, low, high, colour, row=1, col=1)
    hover = [
        f"{where}<br>{row['n_alive']} of {row['n_cohort']} initial heads alive<br>95 % interval "
        f"{style.format_number(100 * row['ci_low'])} to {style.format_number(100 * row['ci_high'])} %"
        for where, row in zip(checkpoint_hover(tables, rows), rows.iter_rows(named=True), strict=True)
    ]
    figure.add_trace(
        go.Scatter(
            x=x, y=plain(alive), mode="lines+markers", showlegend=False, text=hover, hoverinfo="text",
            line={"color": colour, "width": 2}, marker={"size": 6},
        ),
        row=1, col=1,
    )  # fmt: skip


def _shares(figure: go.Figure, tables: RunTables, made: Cohort) -> None:
    figure.update_xaxes(title={"text": "tokens since the base, by checkpoint", "standoff": 8}, row=1, col=2, **X_LINE)
    value_axis(figure, "share of retrieval heads (%)", 1, 2, range=[0, 111], tickvals=[0, 25, 50, 75, 100])
    if made.why_no_heads:
        _empty(figure, made.why_no_heads, "x2", "y2", 2)
        return
    rows = made.rows
    total = rows["n_retrieval_heads"].to_numpy()
    where = checkpoint_hover(tables, rows)
    for column, label, kind in (
        ("n_from_base", "initial heads", "from_base"),
        ("n_newborn", "later ones", "newborn"),
    ):
        hover = [
            f"{at}<br>{n} of {of} retrieval heads: {label}"
            for at, n, of in zip(where, rows[column], total, strict=True)
        ]
        figure.add_trace(
            go.Bar(
                x=list(range(rows.height)), y=plain(100 * rows[column].to_numpy() / np.maximum(total, 1)), name=label,
                marker={"color": style.COLOURS[kind], "line": {"width": 0}}, text=None, hovertext=hover,
                hoverinfo="text",
            ),
            row=1, col=2,
        )  # fmt: skip
    shown = list(range(0, rows.height, math.ceil(rows.height / MAX_BAR_LABELS)))
    names = [style.format_tokens(rows["tokens_since_base"][i]) if i else "base" for i in shown]
    figure.update_xaxes(tickvals=shown, ticktext=names, tickangle=-90 if len(shown) > 5 else 0, row=1, col=2)
    figure.add_trace(
        go.Scatter(
            x=shown, y=[102 if total[i] else 2 for i in shown], text=[str(total[i]) for i in shown], mode="text",
            textposition="top center", textfont={"size": 10}, hoverinfo="skip", showlegend=False, cliponaxis=False,
        ),
        row=1, col=2,
    )  # fmt: skip


def _empty(figure: go.Figure, why: str, x: str, y: str, column: int) -> None:
    """The reason where a panel would be; an invisible point makes plotly draw its axes."""
    figure.add_trace(go.Scatter(x=[None], y=[None], showlegend=False), row=1, col=column)
    figure.update_xaxes(tickvals=[], row=1, col=column)
    figure.update_yaxes(tickvals=[], row=1, col=column)
    figure.add_annotation(
        x=0.5, y=0.5, xref=f"{x} domain", yref=f"{y} domain", text=_wrapped(f"n/a: {why}"), showarrow=False,
        font={"size": 12, "color": style.MUTED},
    )  # fmt: skip


def _wrapped(text: str, width: int = 42) -> str:
    """Escaped text in lines of about `width` characters."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(html.escape(line) for line in lines)


def reference_comparison(run: Run | RunTables) -> go.Figure:
    """Overlap of top heads, Jaccard index, rank-biased overlap and Spearman of every checkpoint against the base."""
    tables = RunTables.of(run)
    made = base_comparison(tables)
    if made.why_not:
        figure = make_subplots(1, 1)
        _empty(figure, made.why_not, "x", "y", 1)
        return layout(figure, height=200, plot_bgcolor="white")
    figure = make_subplots(len(MEASURES), 1, shared_xaxes=True, vertical_spacing=0.035)
    scale = token_axis(figure, tables, rows=len(MEASURES))
    x, where = scale.at(made.rows["tokens_seen"]), checkpoint_hover(tables, made.rows)
    for row, (name, label) in enumerate(MEASURES.items(), start=1):
        _measure(figure, made.rows, name, label, x, where, row)
    return layout(figure, height=130 + 150 * len(MEASURES), plot_bgcolor="white", **BOTTOM_LEGEND)


def _measure(
    figure: go.Figure, rows: pl.DataFrame, name: str, label: str, x: list[float], where: list[str], row: int
) -> None:
    place = {"row": row, "col": 1}
    values, chance = rows[name].to_numpy(), rows[f"{name}_by_chance"].to_numpy()
    figure.add_trace(
        go.Scatter(
            x=x, y=plain(chance), mode="lines", name="by chance", legendgroup="chance", showlegend=row == 1,
            line={"color": style.MUTED, "width": 1.4, "dash": "dash"}, hoverinfo="skip",
        ),
        **place,
    )  # fmt: skip
    hover = [
        f"{at}<br>{label} {style.format_number(value)}, by chance {style.format_number(expected)}"
        for at, value, expected in zip(where, values, chance, strict=True)
    ]
    figure.add_trace(
        go.Scatter(
            x=x, y=plain(values), mode="lines+markers", name="against the base", legendgroup="base",
            showlegend=row == 1, line={"color": style.COLOURS["from_base"], "width": 2}, marker={"size": 6},
            text=hover, hoverinfo="text",
        ),
        **place,
    )  # fmt: skip
    finite = values[np.isfinite(values)]
    value_axis(figure, label, row, range=[min(0.0, float(finite.min(initial=0.0))) - 0.06, 1.06])
    if not finite.size:
        number = "" if row == 1 else str(row)
        figure.add_annotation(
            x=0.5, y=0.5, xref=f"x{number} domain", yref=f"y{number} domain", text="n/a", showarrow=False
        )
