"""Answers on the screen: perplexity over length and depth, score and perplexity over training."""

from __future__ import annotations

import html

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.interactive.canvas import (
    BOTTOM_LEGEND,
    GRID,
    Marks,
    band,
    checkpoint_hover,
    layout,
    panel_grid,
    panel_titles,
    plain,
    ppl_axis,
    ppl_colours,
    token_axis,
    value_axis,
)
from lccp_interp.store import Run


def ppl_heatmaps(run: Run | RunTables, *, max_panels: int = style.MAX_PANELS) -> go.Figure:
    """Answer perplexity over context length and needle depth, a panel per checkpoint (arXiv 2604.02650, Figure 2)."""
    tables = RunTables.of(run)
    panels = style.select_panels(tables.checkpoints, tables.base, max_panels)
    depths = sorted(tables.by_depth["depth_fraction"].unique())
    lengths = [style.format_length(length) for length in tables.lengths]
    depth_names = [f"{100 * depth:.0f}" for depth in depths]
    figure, n_rows, n_columns = panel_grid(panel_titles(tables, panels), panel_height=230)
    marks = Marks()
    scale = style.PplScale.of(tables.by_depth.filter(pl.col("checkpoint").is_in(panels))["answer_ppl"])
    for i, name in enumerate(panels):
        rows = tables.by_depth.filter(pl.col("checkpoint") == name)
        ppl = style.cell_matrix(rows, depths, tables.lengths, "depth_fraction", "length", "answer_ppl")
        score = style.cell_matrix(rows, depths, tables.lengths, "depth_fraction", "length", "niah_score")
        n = style.cell_matrix(rows, depths, tables.lengths, "depth_fraction", "length", "n")
        hover = [
            [
                f"<b>{html.escape(name)}</b><br>{lengths[c]} tokens, depth {depth_names[r]} %<br>"
                f"answer perplexity {style.format_number(ppl[r, c])}<br>NIAH score {style.format_number(score[r, c])} %"
                f"<br>n = {n[r, c]:.0f}"
                for c in range(len(lengths))
            ]
            for r in range(len(depths))
        ]
        figure.add_trace(
            go.Heatmap(
                z=[plain(row) for row in scale.places(ppl)], text=hover, hoverinfo="text", coloraxis="coloraxis",
                xgap=1, ygap=1, hoverongaps=True,
            ),
            row=i // n_columns + 1, col=i % n_columns + 1,
        )  # fmt: skip
        marks.undefined(ppl, i)
    figure.update_xaxes(tickvals=list(range(len(lengths))), ticktext=lengths, showgrid=False, zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(depths))), ticktext=depth_names, autorange="reversed", showgrid=False, zeroline=False
    )
    for row in range(1, n_rows + 1):
        figure.update_yaxes(title_text="needle depth (%)", row=row, col=1)
    for column in range(1, n_columns + 1):
        figure.update_xaxes(title_text="length (tokens)", row=n_rows, col=column)
    marks.put(figure)
    return layout(figure, plot_bgcolor="white", coloraxis=ppl_colours(scale))


def niah_trajectory(run: Run | RunTables) -> go.Figure:
    """NIAH score and answer perplexity against training tokens, a line per length (arXiv 2604.02650, Figure 3)."""
    tables = RunTables.of(run)
    lengths = tables.lengths
    colours = style.spread_colours(style.PLASMA, len(lengths))
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    scale = token_axis(figure, tables, rows=2)
    ppl = style.PplScale.of(*(tables.by_length[f"answer_ppl{end}"] for end in ("", "_low", "_high")))
    for length, colour in zip(lengths, colours, strict=True):
        rows = tables.by_length.filter(pl.col("length") == length)
        x, label = scale.at(rows["tokens_seen"]), style.format_length(length)
        for row, name, what in ((1, "niah_score", "NIAH score"), (2, "answer_ppl", "answer perplexity")):
            unit = " %" if row == 1 else ""
            hover = [
                f"{where}<br>{label} tokens: {what} {style.format_number(value)}{unit}"
                f"<br>95 % interval {style.format_number(low)} to {style.format_number(high)}<br>n = {n}"
                for where, value, low, high, n in zip(
                    checkpoint_hover(tables, rows), rows[name], rows[f"{name}_low"], rows[f"{name}_high"], rows["n"],
                    strict=True,
                )
            ]  # fmt: skip
            middle, low, high = (
                rows[f"{name}{end}"].to_numpy() if row == 1 else ppl.places(rows[f"{name}{end}"])
                for end in ("", "_low", "_high")
            )
            band(figure, x, low, high, colour, row=row, col=1, group=label)
            figure.add_trace(
                go.Scatter(
                    x=x, y=plain(middle), mode="lines+markers", name=label, legendgroup=label, showlegend=row == 1,
                    line={"color": colour, "width": 2}, marker={"size": 5}, text=hover, hoverinfo="text",
                ),
                row=row, col=1,
            )  # fmt: skip
    value_axis(figure, "NIAH score (%)", 1, range=[-4, 104])
    value_axis(figure, "answer perplexity", 2, **ppl_axis(ppl))
    return layout(figure, height=550, legend_title_text="context length ", plot_bgcolor="white", **BOTTOM_LEGEND)


def depth_curves(run: Run | RunTables, *, max_panels: int = 6, max_checkpoints: int = 6) -> go.Figure:
    """Answer perplexity against needle depth, a panel per length, a line per checkpoint (Figure 7 of the paper)."""
    tables = RunTables.of(run)
    lengths = style.pick_evenly(tables.lengths, max_panels)
    names = style.select_panels(tables.checkpoints, tables.base, max_checkpoints)
    colours = style.checkpoint_colours(tables.run, names)
    shown = style.short_names(tables.checkpoints["checkpoint"].to_list(), 18)
    titles = [f"{style.format_length(length)} tokens" for length in lengths]
    figure, n_rows, n_columns = panel_grid(titles, panel_height=230)
    drawn = tables.by_depth.filter(pl.col("length").is_in(lengths), pl.col("checkpoint").is_in(names))
    scale = style.PplScale.of(*(drawn[f"answer_ppl{end}"] for end in ("", "_low", "_high")))
    for i, length in enumerate(lengths):
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        for name, colour in zip(names, colours, strict=True):
            rows = tables.by_depth.filter(pl.col("length") == length, pl.col("checkpoint") == name).sort(
                "depth_fraction"
            )
            depth = (rows["depth_fraction"] * 100).to_list()
            low_places, high_places = (scale.places(rows[f"answer_ppl_{end}"]) for end in ("low", "high"))
            band(figure, depth, low_places, high_places, colour, **place, group=html.escape(name))
            hover = [
                f"<b>{html.escape(name)}</b><br>{length} tokens, depth {at:.0f} %<br>answer perplexity "
                f"{style.format_number(value)} [{style.format_number(low)}, {style.format_number(high)}]<br>n = {n}"
                for at, value, low, high, n in zip(
                    depth, rows["answer_ppl"], rows["answer_ppl_low"], rows["answer_ppl_high"], rows["n"], strict=True
                )
            ]
            figure.add_trace(
                go.Scatter(
                    x=depth, y=plain(scale.places(rows["answer_ppl"])), mode="lines+markers",
                    name=html.escape(shown[name]), legendgroup=html.escape(name), showlegend=i == 0,
                    text=hover, hoverinfo="text", line={"color": colour, "width": 2}, marker={"size": 5},
                ),
                **place,
            )  # fmt: skip
    figure.update_xaxes(range=[-5, 105], tickvals=[0, 25, 50, 75, 100], showgrid=False, zeroline=False, showline=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, showline=True, **ppl_axis(scale))
    for row in range(1, n_rows + 1):
        figure.update_yaxes(title_text="answer perplexity", row=row, col=1)
    for column in range(1, n_columns + 1):
        figure.update_xaxes(title_text="needle depth (%)", row=n_rows, col=column)
    return layout(figure, legend_title_text="checkpoint", plot_bgcolor="white")
