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
    NORMAL_POINTS,
    RC,
    SMALL_POINTS,
    axis_inches,
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
    roomy,
    short_name,
    wrapped,
)
from lccp_interp.store import Run


def interference_heatmaps(run: Run | RunTables, *, columns: int = 2, max_panels: int = style.MAX_PANELS) -> Figure:
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
        n_columns = n_columns if columns == 2 else min(n_columns, 2)
        n_rows = math.ceil(len(names) / n_columns)
        inches = (page_width(columns) - (1.2 if columns == 2 else 0.6)) / n_columns - 0.05
        above = 0.5 if columns == 2 else 0.9
        figure = canvas(columns, above + n_rows * (0.75 + 0.17 * min(max(len(distances), 3), 8)))
        axes = panel_grid(figure, len(names), n_columns)
        for axis, name, matrix in zip(axes, names, matrices, strict=True):
            mesh = heatmap(axis, scale.places(matrix), colormap(style.PERPLEXITY), Normalize(scale.low, scale.high))
            axis.set_title(panel_title(own, name, inches), fontsize=SMALL_POINTS)
            category_ticks(axis, [style.format_length(value) for value in lengths], inches)
            shown = range(0, len(distances), math.ceil(len(distances) / 8))
            axis.set_yticks(shown, [style.format_length(distances[i]) for i in shown])
            axis.invert_yaxis()
        figure.supxlabel("interference: tokens before the needle", fontsize=NORMAL_POINTS)
        figure.supylabel("distance: tokens after it", fontsize=NORMAL_POINTS)
        name_undefined(figure, matrices)
        ppl_ticks(long_side(colorbar(figure, mesh, axes, "answer perplexity")), scale, page_width(columns) - 0.6)
    return figure


def interference_curves(
    run: Run | RunTables,
    *,
    columns: int = 2,
    distance: int | None = None,
    max_checkpoints: int = style.MAX_PANELS,
) -> Figure:
    """Answer perplexity against interference length at one distance, a line per checkpoint (Figure 9 of the paper).

    Args:
        run: an interference run, or one with a companion.
        columns: of a page, 1 or 2.
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
        figure = canvas(columns, 2.4 if columns == 2 else 2.9)
        axis = figure.subplots()
        whole = RunTables.of(run).run
        for name, colour in zip(names, style.checkpoint_colours(whole, names), strict=True):
            rows = drawn.filter(checkpoint=name).sort("interference")
            x = across.at(rows["interference"])
            middle, low, high = (scale.places(rows[f"answer_ppl{end}"]) for end in ("", "_low", "_high"))
            base = " (base)" if name == own.base else ""
            axis.plot(x, middle, color=colour, marker="o", label=short_name(own, name, 1.3) + base)
            axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        axis.set_xticks(*roomy(*across.ticks, axis_inches(axis), across.limits))
        axis.set_xlim(*across.limits)
        label = f"interference: tokens before the needle{across.suffix}"
        axis.set_xlabel(wrapped(label, axis_inches(axis)))
        axis.set_ylim(*scale.limits)
        axis.set_ylabel("answer perplexity")
        ppl_ticks(axis.yaxis, scale)
        axis.set_title(f"distance {style.format_length(chosen)} tokens", loc="left", fontsize=SMALL_POINTS)
        key(figure, *axis.get_legend_handles_labels(), title="checkpoint")
    return figure
