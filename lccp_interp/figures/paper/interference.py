"""Interference on paper: answer perplexity over what lies behind the needle and what lies before it."""

from __future__ import annotations

import math

import matplotlib as mpl
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.interference_panels import InterferenceAxis, distance_rows, interference_of
from lccp_interp.figures.paper.canvas import (
    DOUBLE_COLUMN_INCHES,
    RC,
    canvas,
    colorbar,
    colormap,
    heatmap,
    panel_grid,
    panel_title,
    ppl_ticks,
    short_name,
)
from lccp_interp.store import Run


def interference_heatmaps(run: Run | RunTables, *, max_panels: int = style.MAX_PANELS) -> Figure:
    """Answer perplexity over absolute distance and interference length, a panel per checkpoint (Figure 8 of the paper).

    One scale of colours for all panels; up to `max_panels` checkpoints from the base to the last.

    Raises:
        LccpError: neither an interference run nor one with a companion.

    Example:
        >>> save(interference_heatmaps(Run.open("runs/demo")), "figure8.pdf")   # doctest: +SKIP
    """
    own = interference_of(run)
    names = style.select_panels(own.checkpoints, own.base, max_panels)
    distances, lengths = (sorted(own.cells[column].unique()) for column in ("distance", "interference"))
    matrices = [
        style.cell_matrix(
            own.cells.filter(checkpoint=name), distances, lengths, "distance", "interference", "answer_ppl"
        )
        for name in names
    ]
    scale = style.PplScale.of(*matrices)
    with mpl.rc_context(RC):
        n_columns = len(names) if len(names) <= 4 else math.ceil(len(names) / 2)
        n_rows = math.ceil(len(names) / n_columns)
        figure = canvas(DOUBLE_COLUMN_INCHES, 0.5 + n_rows * (0.75 + 0.17 * min(max(len(distances), 3), 8)))
        axes = panel_grid(figure, len(names), n_columns)
        for axis, name, matrix in zip(axes, names, matrices, strict=True):
            mesh = heatmap(axis, scale.places(matrix), colormap(style.PERPLEXITY), Normalize(scale.low, scale.high))
            axis.set_title(panel_title(own, name), fontsize=6.5)
            axis.set_xticks(range(len(lengths)), [style.format_length(value) for value in lengths])
            axis.tick_params(axis="x", labelrotation=90 if len(lengths) > 6 else 0)
            shown = range(0, len(distances), math.ceil(len(distances) / 8))
            axis.set_yticks(shown, [style.format_length(distances[i]) for i in shown])
            axis.invert_yaxis()
        figure.supxlabel("interference: tokens before the needle", fontsize=7.5)
        figure.supylabel("distance: tokens after it", fontsize=7.5)
        ppl_ticks(colorbar(figure, mesh, axes, "answer perplexity").ax.yaxis, scale)
    return figure


def interference_curves(
    run: Run | RunTables, *, distance: int | None = None, max_checkpoints: int = style.MAX_PANELS
) -> Figure:
    """Answer perplexity against interference length at one distance, a line per checkpoint (Figure 9 of the paper).

    Args:
        run: an interference run, or one with a companion.
        distance: tokens between needle and question; None means the largest.
        max_checkpoints: so many lines, from the base to the last checkpoint.

    Raises:
        LccpError: no such distance, or neither an interference run nor one with a companion.

    Example:
        >>> save(interference_curves(Run.open("runs/demo"), distance=1024), "figure9.pdf")   # doctest: +SKIP
    """
    own = interference_of(run)
    at_distance, chosen = distance_rows(own, distance)
    names = style.select_panels(own.checkpoints, own.base, max_checkpoints)
    drawn = at_distance.filter(at_distance["checkpoint"].is_in(names))
    scale = style.PplScale.of(drawn["answer_ppl"], drawn["answer_ppl_low"], drawn["answer_ppl_high"])
    across = InterferenceAxis.of(drawn["interference"])
    with mpl.rc_context(RC):
        figure = canvas(DOUBLE_COLUMN_INCHES * 0.75, 2.4)
        axis = figure.subplots()
        for name, colour in zip(names, style.spread_colours(style.VIRIDIS, len(names)), strict=True):
            rows = drawn.filter(checkpoint=name).sort("interference")
            x = across.at(rows["interference"])
            middle, low, high = (scale.places(rows[f"answer_ppl{end}"]) for end in ("", "_low", "_high"))
            base = " (base)" if name == own.base else ""
            axis.plot(x, middle, color=colour, marker="o", label=short_name(own, name) + base)
            axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        axis.set_xticks(*across.ticks)
        axis.set_xlim(*across.limits)
        axis.set_xlabel(f"interference: tokens before the needle{across.suffix}")
        axis.set_ylim(*scale.limits)
        axis.set_ylabel("answer perplexity")
        ppl_ticks(axis.yaxis, scale)
        axis.set_title(f"distance {style.format_length(chosen)} tokens", loc="left", fontsize=7)
        figure.legend(*axis.get_legend_handles_labels(), title="checkpoint", loc="outside right center",
                      title_fontsize=6.5)  # fmt: skip
    return figure
