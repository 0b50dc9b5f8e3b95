"""Attention heads on paper: scores of all of them, retrieval heads over training, births and deaths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.life_rows import RIBBON_HALF_HEIGHT, LifeRow, life_kind_labels, life_rows
from lccp_interp.figures.paper.canvas import (
    NORMAL_POINTS,
    RC,
    SMALL_POINTS,
    canvas,
    colorbar,
    colormap,
    heatmap,
    key,
    long_side,
    name_undefined,
    page_width,
    panel_grid,
    panel_title,
    token_axis,
)
from lccp_interp.schema import RETRIEVAL_THRESHOLD
from lccp_interp.store import Run


def head_heatmaps(run: Run | RunTables, *, columns: int = 2, max_panels: int = style.MAX_PANELS) -> Figure:
    """Scores of all heads, layers x heads, a panel per checkpoint (arXiv 2604.02650, Figure 4).

    Retrieval heads are framed.
    """
    tables = RunTables.of(run)
    panels = style.select_panels(tables.scored, tables.base, max_panels)
    layers = sorted(tables.scores["layer"].unique())
    heads = sorted(tables.scores["head"].unique())
    parts = [tables.scores.filter(pl.col("checkpoint") == name) for name in panels]
    matrices, framed = (
        [style.cell_matrix(part, layers, heads, "layer", "head", column) for part in parts]
        for column in ("score", "retrieves")
    )
    _, high = style.defined_range(matrices, (0.0, 1.0))
    with mpl.rc_context(RC):
        most = (6, 3) if len(heads) <= 16 else (3, 2)
        n_columns = min(len(panels), most[0] if columns == 2 else most[1])
        n_rows = math.ceil(len(panels) / n_columns)
        inches = (page_width(columns) - (1.0 if columns == 2 else 0.4)) / n_columns - 0.05
        above = 0.4 if columns == 2 else 0.8
        figure = canvas(columns, above + n_rows * (0.5 + min(max(inches * len(layers) / len(heads), 0.7), 2.2)))
        axes = panel_grid(figure, len(panels), n_columns)
        norm = Normalize(0.0, max(high, RETRIEVAL_THRESHOLD))
        for axis, name, matrix, retrieves in zip(axes, panels, matrices, framed, strict=True):
            mesh = heatmap(axis, matrix, colormap(style.SCORES), norm)
            frame: Any = {"fill": False, "edgecolor": style.COLOURS["newborn"]}
            frame["linewidth"] = 0.8 if len(heads) <= 16 else 0.4
            for row, column in np.argwhere(retrieves == 1):
                axis.add_patch(Rectangle((column - 0.44, row - 0.44), 0.88, 0.88, **frame))
            axis.set_title(panel_title(tables, name, inches), fontsize=SMALL_POINTS)
            for set_ticks, values in ((axis.set_xticks, heads), (axis.set_yticks, layers)):
                shown = range(0, len(values), math.ceil(len(values) / (8 if inches > 0.9 else 6)))
                set_ticks(shown, [str(values[i]) for i in shown])
        figure.supxlabel("head", fontsize=NORMAL_POINTS)
        figure.supylabel("layer", fontsize=NORMAL_POINTS)
        name_undefined(figure, matrices)
        long_side(colorbar(figure, mesh, axes, f"{tables.metric} score")).set_major_locator(MaxNLocator(5))
    return figure


def retrieval_heads(run: Run | RunTables, *, columns: int = 1) -> Figure:
    """Number of retrieval heads and mean score of the initial ones against tokens (arXiv 2604.02650, Figure 5)."""
    tables = RunTables.of(run)
    counts = tables.census
    with mpl.rc_context(RC):
        figure = canvas(columns, 3.4)
        upper, lower = figure.subplots(2, 1, sharex=True)
        scale = token_axis([upper, lower], tables)
        x = scale.at(counts["tokens_seen"])
        from_base, total = counts["n_from_base"].to_numpy(), counts["n_retrieval_heads"].to_numpy()
        upper.fill_between(
            x, 0, from_base, color=style.COLOURS["from_base"], alpha=0.75, linewidth=0, label="initial heads"
        )
        upper.fill_between(x, from_base, total, color=style.COLOURS["newborn"], alpha=0.75, linewidth=0, label="others")
        upper.plot(x, total, color=style.INK, marker="o", label="all")
        upper.set_ylim(0, max(1.0, total.max() * 1.1))
        upper.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        upper.set_ylabel("retrieval heads")
        key(figure, *upper.get_legend_handles_labels(), side=False)
        mean, colour = counts["mean_initial_score"], style.COLOURS["initial_mean"]
        lower.plot(x, mean, color=colour, marker="o")
        lower.fill_between(
            x, counts["mean_initial_low"], counts["mean_initial_high"], color=colour, alpha=0.2, linewidth=0
        )
        lower.set_ylabel("mean score of\ninitial heads")
        n_initial = int(counts["n_initial"][0])
        if n_initial == 0:
            lower.text(0.5, 0.5, "n/a: no initial heads", transform=lower.transAxes, ha="center", color=style.MUTED)
            lower.set_yticks([])
        else:
            lower.set_ylim(0, None)
    return figure


def head_lives(run: Run | RunTables, *, columns: int = 2) -> Figure:
    """Births and deaths: a ribbon per head whose thickness is its score, coloured where the head lives.

    The rule for births and deaths stands in `lccp_interp.dynamics.births`.
    """
    tables = RunTables.of(run)
    rows, _ = life_rows(tables)
    with mpl.rc_context(RC):
        figure = canvas(columns, (1.1 if columns == 2 else 1.4) + 0.21 * max(len(rows), 3))
        axis = figure.subplots()
        scale = token_axis([axis], tables)
        x = np.array(scale.at(tables.scored["tokens_seen"]))
        for y, row in enumerate(rows):
            _draw_life(axis, y, row, x, scale)
        axis.set_ylim(max(len(rows), 1) - 0.4, -0.6)
        axis.set_yticks(range(len(rows)), [row.name for row in rows])
        axis.set_ylabel("head (layer-head)")
        axis.tick_params(axis="y", length=0)
        if not rows:
            axis.text(0.5, 0.5, "no head came to life", transform=axis.transAxes, ha="center", color=style.MUTED)
        right = axis.secondary_yaxis("right")
        right.set_yticks(range(len(rows)), [f"{row.peak:.2f}" for row in rows])
        right.tick_params(length=0, labelcolor=style.MUTED)
        right.set_ylabel("peak score", color=style.MUTED)
        right.spines["right"].set_visible(False)
        key(figure, _life_legend(tables, rows), side=False)
    return figure


def _draw_life(axis: Axes, y: int, row: LifeRow, x: NDArray[np.float64], scale: style.TokenAxis) -> None:
    half = np.nan_to_num(row.score) * RIBBON_HALF_HEIGHT / max(1.0, row.peak)
    axis.plot([x[0], x[-1]], [y, y], color=style.UNDEFINED, linewidth=0.5, zorder=1.5)
    axis.fill_between(x, y - half, y + half, color="#bdbdbd", linewidth=0, zorder=2)
    for segment in row.segments:
        span = slice(segment.start, segment.end)
        colour = style.COLOURS[segment.kind]
        axis.plot(x[span], np.full(len(x[span]), y), color=colour, linewidth=0.9, solid_capstyle="butt", zorder=2.5)
        axis.fill_between(x[span], y - half[span], y + half[span], color=colour, linewidth=0, zorder=3)
    for mark in row.marks:
        colour = style.COLOURS[mark.kind]
        birth = mark.kind == "birth"
        axis.plot(
            scale.at([mark.tokens_seen]), [y], linestyle="", zorder=4, clip_on=False,
            marker="o" if birth else "X", markersize=4.5 if birth else 5, markeredgewidth=0.8,
            markeredgecolor=colour if mark.provisional else "white",
            markerfacecolor="white" if mark.provisional else colour,
        )  # fmt: skip


def _life_legend(tables: RunTables, rows: Sequence[LifeRow]) -> list[Any]:
    stage = style.last_stage(tables.checkpoints, tables.base)
    labels = life_kind_labels(None if stage is None else style.stage_name(stage[0]))
    used = {segment.kind for row in rows for segment in row.segments}
    handles: list[Any] = [Patch(color=style.COLOURS[kind], label=text) for kind, text in labels.items() if kind in used]
    marks = [mark for row in rows for mark in row.marks]
    for kind, marker in (("birth", "o"), ("death", "X")):
        for provisional in sorted({mark.provisional for mark in marks if mark.kind == kind}):
            colour = style.COLOURS[kind]
            look: dict[str, Any] = (
                {"markerfacecolor": "white", "markeredgecolor": colour} if provisional else {"markeredgecolor": "white"}
            )
            label = f"{kind} (provisional)" if provisional else kind
            handles.append(Line2D([], [], linestyle="", marker=marker, markersize=5, color=colour, label=label, **look))
    return handles
