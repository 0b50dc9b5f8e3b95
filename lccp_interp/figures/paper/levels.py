"""Answers on paper: perplexity over length and depth, score and perplexity over training."""

from __future__ import annotations

import math

import matplotlib as mpl
import polars as pl
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.paper.canvas import (
    NORMAL_POINTS,
    RC,
    SMALL_POINTS,
    canvas,
    category_ticks,
    colorbar,
    colormap,
    heatmap,
    key,
    long_side,
    name_undefined,
    page_width,
    panel_grid,
    panel_title,
    ppl_ticks,
    short_name,
    token_axis,
)
from lccp_interp.store import Run


def ppl_heatmaps(run: Run | RunTables, *, columns: int = 2, max_panels: int = style.MAX_PANELS) -> Figure:
    """Answer perplexity over context length and needle depth, a panel per checkpoint (arXiv 2604.02650, Figure 2).

    One logarithmic colour scale for all panels; up to `max_panels` checkpoints from the base to the last, over one or
    two `columns` of a page.

    Example:
        >>> save(ppl_heatmaps(Run.open("runs/demo")), "figure2.pdf")   # doctest: +SKIP
    """
    tables = RunTables.of(run)
    panels = style.select_panels(tables.checkpoints, tables.base, max_panels)
    depths = sorted(tables.by_depth["depth_fraction"].unique())
    matrices = [
        style.cell_matrix(
            tables.by_depth.filter(pl.col("checkpoint") == name),
            depths, tables.lengths, "depth_fraction", "length", "answer_ppl",
        )
        for name in panels
    ]  # fmt: skip
    scale = style.PplScale.of(*matrices)
    with mpl.rc_context(RC):
        n_columns = min(len(panels), 6 if columns == 2 else 3)
        n_rows = math.ceil(len(panels) / n_columns)
        inches = (page_width(columns) - (1.1 if columns == 2 else 0.5)) / n_columns - 0.05
        figure = canvas(columns, (0.6 if columns == 2 else 0.95) + 1.3 * n_rows)
        axes = panel_grid(figure, len(panels), n_columns)
        norm = Normalize(scale.low, scale.high)
        for axis, name, matrix in zip(axes, panels, matrices, strict=True):
            mesh = heatmap(axis, scale.places(matrix), colormap(style.PERPLEXITY), norm)
            axis.set_title(panel_title(tables, name, inches), fontsize=SMALL_POINTS)
            category_ticks(axis, [style.format_length(value) for value in tables.lengths], inches)
            shown = range(0, len(depths), math.ceil(len(depths) / 6))
            axis.set_yticks(shown, [f"{100 * depths[i]:.0f}" for i in shown])
        figure.supxlabel("context length (tokens)", fontsize=NORMAL_POINTS)
        figure.supylabel("needle depth (%)", fontsize=NORMAL_POINTS)
        name_undefined(figure, matrices)
        ppl_ticks(long_side(colorbar(figure, mesh, axes, "answer perplexity")), scale, page_width(columns) - 0.6)
    return figure


def niah_trajectory(run: Run | RunTables, *, columns: int = 2) -> Figure:
    """NIAH score and answer perplexity against training tokens, a line per length (arXiv 2604.02650, Figure 3).

    Bands are bootstrap intervals over needles and haystacks.
    """
    tables = RunTables.of(run)
    lengths = style.pick_evenly(tables.lengths, 7)
    colours = style.spread_colours(style.PLASMA, len(lengths))
    with mpl.rc_context(RC):
        figure = canvas(columns, 3.6 if columns == 2 else 3.9)
        upper, lower = figure.subplots(2, 1, sharex=True)
        scale = token_axis([upper, lower], tables)
        drawn = tables.by_length.filter(pl.col("length").is_in(lengths))
        ppl = style.PplScale.of(drawn["answer_ppl"], drawn["answer_ppl_low"], drawn["answer_ppl_high"])
        for length, colour in zip(lengths, colours, strict=True):
            rows = drawn.filter(pl.col("length") == length)
            x = scale.at(rows["tokens_seen"])
            score, score_low, score_high = (rows[f"niah_score{end}"].to_numpy() for end in ("", "_low", "_high"))
            middle, low, high = (ppl.places(rows[f"answer_ppl{end}"]) for end in ("", "_low", "_high"))
            upper.plot(x, score, color=colour, marker="o", label=style.format_length(length))
            upper.fill_between(x, score_low, score_high, color=colour, alpha=0.15, linewidth=0)
            lower.plot(x, middle, color=colour, marker="o")
            lower.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        upper.set_ylim(-4, 104)
        upper.set_ylabel("NIAH score (%)")
        lower.set_ylim(*ppl.limits)
        lower.set_ylabel("answer perplexity")
        ppl_ticks(lower.yaxis, ppl)
        key(figure, *upper.get_legend_handles_labels(), title="context length")
    return figure


def depth_curves(
    run: Run | RunTables, *, columns: int = 2, max_panels: int = 5, max_checkpoints: int = style.MAX_PANELS
) -> Figure:
    """Answer perplexity against needle depth, a panel per length, a line per checkpoint (Figure 7 of the paper)."""
    tables = RunTables.of(run)
    lengths = style.pick_evenly(tables.lengths, max_panels)
    names = style.select_panels(tables.checkpoints, tables.base, max_checkpoints)
    colours = style.checkpoint_colours(tables.run, names)
    drawn = tables.by_depth.filter(pl.col("length").is_in(lengths), pl.col("checkpoint").is_in(names))
    scale = style.PplScale.of(drawn["answer_ppl"], drawn["answer_ppl_low"], drawn["answer_ppl_high"])
    with mpl.rc_context(RC):
        n_columns = min(len(lengths), 5 if columns == 2 else 2)
        n_rows = math.ceil(len(lengths) / n_columns)
        figure = canvas(columns, 2.1 if columns == 2 else 0.9 + 1.35 * n_rows)
        axes = panel_grid(figure, len(lengths), n_columns)
        for axis, length in zip(axes, lengths, strict=True):
            for name, colour in zip(names, colours, strict=True):
                rows = drawn.filter(pl.col("length") == length, pl.col("checkpoint") == name).sort("depth_fraction")
                depth = rows["depth_fraction"].to_numpy() * 100
                middle, low, high = (scale.places(rows[f"answer_ppl{end}"]) for end in ("", "_low", "_high"))
                axis.plot(depth, middle, color=colour, marker="o", label=short_name(tables, name, 1.3))
                axis.fill_between(depth, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.set_title(f"{style.format_length(length)} tokens")
            axis.set_xlim(-5, 105)
            axis.set_xticks([0, 50, 100] if n_columns > 3 or columns == 1 else [0, 25, 50, 75, 100])
        axes[0].set_ylim(*scale.limits)
        ppl_ticks(axes[0].yaxis, scale)
        figure.supylabel("answer perplexity", fontsize=NORMAL_POINTS)
        figure.supxlabel("needle depth (%)", fontsize=NORMAL_POINTS)
        key(figure, *axes[0].get_legend_handles_labels(), title="checkpoint", above=True)
    return figure
