"""Initial heads and newcomers on paper: survival of a cohort, who is alive, every checkpoint against the base."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.cohorts import MEASURES, Cohort, base_comparison, cohort
from lccp_interp.figures.paper.canvas import (
    RC,
    SMALL_POINTS,
    axis_inches,
    canvas,
    key,
    roomy,
    token_axis,
    wrapped,
)
from lccp_interp.store import Run

CHANCE: Any = {"color": style.MUTED, "linewidth": 0.9, "linestyle": (0, (3, 2)), "zorder": 1.8}
MAX_BAR_LABELS = 18
"""Beyond so many checkpoints not every bar has its name and its number."""


def cohort_survival(run: Run | RunTables, *, columns: int = 2) -> Figure:
    """Share of the base checkpoint's retrieval heads still alive, and how many of those alive are newcomers.

    Example:
        >>> save(cohort_survival(Run.open("runs/demo")), "survival.pdf")   # doctest: +SKIP
    """
    tables = RunTables.of(run)
    made = cohort(tables)
    with mpl.rc_context(RC):
        figure = canvas(columns, 2.35 if columns == 2 else 4.4)
        left, right = figure.subplots(*((1, 2) if columns == 2 else (2, 1)))
        _draw_survival(left, made)
        _draw_shares(right, made)
    return figure


def _draw_survival(axis: Axes, made: Cohort) -> None:
    axis.set_ylabel("initial heads alive (%)")
    axis.set_xlabel("tokens since the base checkpoint")
    if made.why_no_curve:
        _empty(axis, made.why_no_curve)
        return
    rows, colour = made.rows, style.COLOURS["from_base"]
    last = float(rows["tokens_since_base"].max())  # type: ignore[arg-type]
    x = rows["tokens_since_base"].to_numpy()
    alive, low, high = (100 * rows[name].to_numpy() for name in ("survival", "ci_low", "ci_high"))
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(x, alive, color=colour, marker="o")
    axis.set_xlim(-0.03 * last, 1.03 * last)
    ticks = style.nice_ticks(0, last, 4)
    axis.set_xticks(*roomy(ticks, [style.format_tokens(tick) for tick in ticks], axis_inches(axis), (0, last)))
    axis.set_ylim(-3, 105)
    axis.set_yticks([0, 25, 50, 75, 100])
    title = f"survival of the {made.n_initial} initial head{'s' * (made.n_initial != 1)}"
    axis.set_title(title, loc="left", fontsize=SMALL_POINTS)


def _draw_shares(axis: Axes, made: Cohort) -> None:
    axis.set_ylabel("share of retrieval heads (%)")
    axis.set_xlabel("tokens since the base, checkpoint by checkpoint")
    if made.why_no_heads:
        _empty(axis, made.why_no_heads)
        return
    rows = made.rows
    total = rows["n_retrieval_heads"].to_numpy()
    initial, newborn = (100 * rows[name].to_numpy() / np.maximum(total, 1) for name in ("n_from_base", "n_newborn"))
    x = np.arange(rows.height)
    axis.bar(x, initial, width=0.82, color=style.COLOURS["from_base"], linewidth=0, label="initial heads")
    axis.bar(x, newborn, bottom=initial, width=0.82, color=style.COLOURS["newborn"], linewidth=0, label="later ones")
    shown = range(0, rows.height, math.ceil(rows.height / MAX_BAR_LABELS))
    for i in shown:
        axis.text(i, 101.5 if total[i] else 1.5, str(total[i]), ha="center", va="bottom", fontsize=SMALL_POINTS)
    names = [style.format_tokens(rows["tokens_since_base"][i]) if i else "base" for i in shown]
    axis.set_xticks(list(shown), names, rotation=90 if len(names) > 8 else 0)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.7, rows.height - 0.3)
    axis.set_ylim(0, 110)
    axis.set_yticks([0, 25, 50, 75, 100])
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0, handlelength=1, columnspacing=1)


def _empty(axis: Axes, why: str) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    text = wrapped(f"n/a: {why}", axis_inches(axis), SMALL_POINTS)
    axis.text(
        0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=style.MUTED, fontsize=SMALL_POINTS
    )


def reference_comparison(run: Run | RunTables, *, columns: int = 2) -> Figure:
    """Overlap of top heads, Jaccard index, rank-biased overlap and Spearman of every checkpoint against the base.

    Dashed is what unrelated rankings would have.

    Example:
        >>> save(reference_comparison(Run.open("runs/demo")), "comparison.pdf")   # doctest: +SKIP
    """
    tables = RunTables.of(run)
    made = base_comparison(tables)
    with mpl.rc_context(RC):
        if made.why_not:
            figure = canvas(columns, 0.6)
            axis = figure.subplots()
            axis.spines[["left", "bottom"]].set_visible(False)
            _empty(axis, made.why_not)
            return figure
        figure = canvas(columns, 3.4 if columns == 2 else 5.6)
        grid = figure.subplots(*((2, 2) if columns == 2 else (4, 1)), sharex=True, squeeze=False)
        for column in range(grid.shape[1]):
            scale = token_axis(list(grid[:, column]), tables)
        x = scale.at(made.rows["tokens_seen"])
        for axis, (name, label) in zip(grid.flat, MEASURES.items(), strict=True):
            values = made.rows[name].to_numpy()
            axis.plot(x, made.rows[f"{name}_by_chance"].to_numpy(), **CHANCE)
            axis.plot(x, values, color=style.COLOURS["from_base"], marker="o", zorder=3)
            axis.set_ylabel(label)
            finite = values[np.isfinite(values)]
            axis.set_ylim(min(-0.05, *(finite - 0.05), -0.05), 1.05)
            if not finite.size:
                axis.text(0.5, 0.5, "n/a", transform=axis.transAxes, ha="center", color=style.MUTED)
        handles = [
            Line2D([], [], color=style.COLOURS["from_base"], marker="o", label="against the base"),
            Line2D([], [], label="by chance", **CHANCE),
        ]
        key(figure, handles, side=False)
    return figure
