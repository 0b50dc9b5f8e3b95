"""Attention heads on the screen: scores of all of them, retrieval heads over training, births and deaths."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.interactive.canvas import (
    BOTTOM_LEGEND,
    Marks,
    band,
    checkpoint_hover,
    colourscale,
    layout,
    panel_grid,
    panel_titles,
    plain,
    token_axis,
    value_axis,
)
from lccp_interp.figures.life_rows import RIBBON_HALF_HEIGHT, LifeRow, life_kind_labels, life_rows
from lccp_interp.schema import RETRIEVAL_THRESHOLD
from lccp_interp.store import Run


def head_heatmaps(run: Run | RunTables, *, max_panels: int = style.MAX_PANELS) -> go.Figure:
    """Scores of all heads, a panel per checkpoint, retrieval heads framed (arXiv 2604.02650, Figure 4)."""
    tables = RunTables.of(run)
    panels = style.select_panels(tables.scored, tables.base, max_panels)
    layers, heads = sorted(tables.scores["layer"].unique()), sorted(tables.scores["head"].unique())
    panel_height = max(200, min(420, 26 * len(layers) + 90))
    figure, n_rows, n_columns = panel_grid(panel_titles(tables, panels), panel_height=panel_height)
    marks = Marks()
    highest = RETRIEVAL_THRESHOLD
    for i, name in enumerate(panels):
        rows = tables.scores.filter(pl.col("checkpoint") == name)
        matrix, low, high, n, retrieves = (
            style.cell_matrix(rows, layers, heads, "layer", "head", column)
            for column in ("score", "ci_low", "ci_high", "n", "retrieves")
        )
        highest = max(highest, style.defined_range([matrix], (0.0, 0.0))[1])
        hover = [
            [
                f"<b>{html.escape(name)}</b><br>head {style.head_name(layer, head)} (layer-head)<br>"
                f"{html.escape(tables.metric)} {style.format_number(matrix[r, c])} "
                f"[{style.format_number(low[r, c])}, {style.format_number(high[r, c])}]<br>n = {n[r, c]:.0f}"
                for c, head in enumerate(heads)
            ]
            for r, layer in enumerate(layers)
        ]
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        figure.add_trace(
            go.Heatmap(
                z=[plain(row) for row in matrix], text=hover, hoverinfo="text", coloraxis="coloraxis", xgap=1, ygap=1
            ),
            **place,
        )
        frame = {"color": style.COLOURS["newborn"], "width": 2 if len(heads) <= 16 else 1}
        for row, column in np.argwhere(retrieves == 1).tolist():
            marks.cell(i, row, column, line=frame)
        marks.undefined(matrix, i)
    for update, values in ((figure.update_xaxes, heads), (figure.update_yaxes, layers)):
        shown = list(range(0, len(values), math.ceil(len(values) / 12)))
        update(tickvals=shown, ticktext=[str(values[j]) for j in shown], showgrid=False, zeroline=False)
    figure.update_xaxes(range=[-0.5, len(heads) - 0.5])
    figure.update_yaxes(range=[len(layers) - 0.5, -0.5])
    for row in range(1, n_rows + 1):
        figure.update_yaxes(title_text="layer", row=row, col=1)
    for column in range(1, n_columns + 1):
        figure.update_xaxes(title_text="head", row=n_rows, col=column)
    bar = {
        "title": {"text": f"{html.escape(tables.metric)}<br>score", "font": {"size": 11}},
        "thickness": 12,
        "outlinewidth": 0,
    }
    marks.put(figure)
    return layout(
        figure,
        plot_bgcolor="white",
        coloraxis={"colorscale": colourscale(style.SCORES), "cmin": 0, "cmax": highest, "colorbar": bar},
    )


def retrieval_heads(run: Run | RunTables) -> go.Figure:
    """Number of retrieval heads and mean score of the initial ones against tokens (arXiv 2604.02650, Figure 5)."""
    tables = RunTables.of(run)
    counts = tables.census
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    scale = token_axis(figure, tables, rows=2)
    x, where = scale.at(counts["tokens_seen"]), checkpoint_hover(tables, counts)
    for column, label, kind in (("n_from_base", "initial heads", "from_base"), ("n_newborn", "others", "newborn")):
        hover = [f"{at}<br>{value} {label}" for at, value in zip(where, counts[column], strict=True)]
        figure.add_trace(
            go.Scatter(
                x=x, y=counts[column].to_list(), stackgroup="heads", name=label, mode="lines",
                text=hover, hoverinfo="text",
                line={"width": 0.5, "color": style.COLOURS[kind]}, fillcolor=style.COLOURS[kind],
            ),
            row=1, col=1,
        )  # fmt: skip
    total = counts["n_retrieval_heads"].to_list()
    hover = [f"{at}<br>{value} retrieval heads" for at, value in zip(where, total, strict=True)]
    figure.add_trace(
        go.Scatter(
            x=x, y=total, name="all", mode="lines+markers", line={"color": style.INK, "width": 2}, marker={"size": 5},
            text=hover, hoverinfo="text",
        ),
        row=1, col=1,
    )  # fmt: skip
    colour = style.COLOURS["initial_mean"]
    columns = ("mean_initial_score", "mean_initial_low", "mean_initial_high")
    hover = [
        f"{at}<br>mean score of initial heads {style.format_number(mean)} [{style.format_number(low)}, "
        f"{style.format_number(high)}]"
        for at, (mean, low, high) in zip(where, counts.select(columns).iter_rows(), strict=True)
    ]
    band(figure, x, counts["mean_initial_low"], counts["mean_initial_high"], colour, row=2, col=1)
    figure.add_trace(
        go.Scatter(
            x=x, y=plain(counts["mean_initial_score"]), mode="lines+markers", showlegend=False, text=hover,
            hoverinfo="text", line={"color": colour, "width": 2}, marker={"size": 5},
        ),
        row=2, col=1,
    )  # fmt: skip
    value_axis(figure, "retrieval heads", 1, range=[0, max(1, *total) * 1.15], dtick=max(1, math.ceil(max(total) / 5)))
    value_axis(figure, "mean score of initial heads", 2, rangemode="tozero")
    if int(counts["n_initial"][0]) == 0:
        figure.update_yaxes(tickvals=[], row=2, col=1)
        figure.add_annotation(
            x=0.5, y=0.5, xref="x2 domain", yref="y2 domain", text="n/a: no initial heads", showarrow=False
        )
    return layout(figure, height=530, plot_bgcolor="white", **BOTTOM_LEGEND)


def head_lives(run: Run | RunTables) -> go.Figure:
    """Births and deaths: a ribbon per head whose thickness is its score, coloured where the head lives."""
    tables = RunTables.of(run)
    rows, _ = life_rows(tables)
    figure = make_subplots(1, 1)
    scale = token_axis(figure, tables)
    x = np.array(scale.at(tables.scored["tokens_seen"]))
    stage = style.last_stage(tables.checkpoints, tables.base)
    labels = life_kind_labels(None if stage is None else html.escape(style.stage_name(stage[0])))
    named: set[str] = set()
    for y, row in enumerate(rows):
        half = np.nan_to_num(row.score) * RIBBON_HALF_HEIGHT / max(1.0, row.peak)
        _ribbon(figure, x, y, half, "#bdbdbd")
        for segment in row.segments:
            span = slice(segment.start, segment.end)
            label = labels[segment.kind]
            rank = list(labels).index(segment.kind)
            _ribbon(
                figure, x[span], y, half[span], style.COLOURS[segment.kind], None if label in named else label, rank
            )
            named.add(label)
        hover = [
            f"{at}<br>head {row.name}: {html.escape(tables.metric)} {style.format_number(score)}"
            for at, score in zip(checkpoint_hover(tables, tables.scored), row.score, strict=True)
        ]
        figure.add_trace(
            go.Scatter(x=x, y=[y] * len(x), mode="markers", marker={"size": 12, "opacity": 0}, text=hover,
                       hoverinfo="text", showlegend=False)
        )  # fmt: skip
    _life_marks(figure, rows, scale)
    value_axis(
        figure, "head (layer-head)", 1, range=[max(len(rows), 1) - 0.4, -0.6], tickvals=list(range(len(rows))),
        ticktext=[row.name for row in rows], ticklabelstandoff=4,
    )  # fmt: skip
    figure.update_yaxes(showgrid=False, ticks="")
    if not rows:
        figure.add_annotation(
            x=0.5, y=0.5, xref="x domain", yref="y domain", text="no head came to life", showarrow=False
        )
    return layout(figure, height=180 + 26 * max(len(rows), 4), plot_bgcolor="white", **BOTTOM_LEGEND)


def _ribbon(
    figure: go.Figure,
    x: NDArray[np.float64],
    y: int,
    half: NDArray[np.float64],
    colour: str,
    label: str | None = None,
    rank: int = 0,
) -> None:
    """A filled outline around `y`, and a thin line so that thin parts stay visible."""
    figure.add_trace(
        go.Scatter(
            x=[*x, *x[::-1]], y=[*(y - half), *(y + half)[::-1]], fill="toself", fillcolor=colour, mode="lines",
            line={"width": 1, "color": colour}, hoverinfo="skip", name=label, showlegend=label is not None,
            legendrank=1 + rank,
        )
    )  # fmt: skip


def _life_marks(figure: go.Figure, rows: Sequence[LifeRow], scale: style.TokenAxis) -> None:
    for kind, symbol in (("birth", "circle"), ("death", "x")):
        for provisional in (False, True):
            marks = [
                (y, row, mark)
                for y, row in enumerate(rows)
                for mark in row.marks
                if mark.kind == kind and mark.provisional == provisional
            ]
            if not marks:
                continue
            label = f"{kind} (provisional)" if provisional else kind
            figure.add_trace(
                go.Scatter(
                    x=scale.at([mark.tokens_seen for _, _, mark in marks]), y=[y for y, _, _ in marks], mode="markers",
                    name=label, hoverinfo="text",
                    text=[
                        f"<b>{label}</b> of head {row.name}<br>at {style.format_tokens(mark.tokens_seen)} tokens, "
                        f"score {style.format_number(mark.score)}"
                        for _, row, mark in marks
                    ],
                    marker={
                        "symbol": f"{symbol}-open" if provisional else symbol, "size": 10, "color": style.COLOURS[kind],
                        "line": {"width": 1.5, "color": style.COLOURS[kind] if provisional else "white"},
                    },
                )
            )  # fmt: skip
