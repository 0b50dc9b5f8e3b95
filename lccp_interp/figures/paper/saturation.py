"""Saturation on paper: each metric with its fitted curve, the 95 % point, the verdict."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lccp_interp.dynamics.curves import HEAD_COUNT
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.paper.canvas import (
    NORMAL_POINTS,
    RC,
    SMALL_POINTS,
    axis_inches,
    base_gap,
    canvas,
    key,
    page_width,
    roomy,
    wrapped,
)
from lccp_interp.figures.saturation_panels import (
    VERDICT_COLOURS,
    SaturationPanel,
    SinceBaseAxis,
    saturation_panels,
)
from lccp_interp.store import Run

BAND: Any = {"color": "#d7ecdf", "linewidth": 0, "zorder": 0}
OPEN_BAND: Any = BAND | {"color": "#edf6f0"}
CHOSEN: Any = {"linewidth": 1.3, "zorder": 3}
LOG_LINE: Any = {"linewidth": 0.9, "linestyle": (0, (4, 1.6)), "zorder": 2.5, "alpha": 0.75}
POINT: Any = {"color": "#00795a", "linewidth": 0.9, "zorder": 2}


def saturation_curves(run: Run | RunTables, *, columns: int = 2) -> Figure:
    """Metrics against tokens since the base, linear (left) and logarithmic (right), with what was fitted to them.

    The rule behind the verdicts stands in `lccp_interp.dynamics.saturation`.

    Example:
        >>> save(saturation_curves(Run.open("runs/demo")), "saturation.pdf")   # doctest: +SKIP
    """
    panels = saturation_panels(RunTables.of(run))
    room = page_width(columns) - 0.75
    titles = [wrapped(_title(panel), room, SMALL_POINTS) for panel in panels]
    with mpl.rc_context(RC):
        # A metric without a value needs room for a sentence only; a title has its lines in the room of the row.
        n_lines = [title.count("\n") + 1 for title in titles]
        heights = [(1.15 if panel.values.size else 0.05) + 0.14 * n for panel, n in zip(panels, n_lines, strict=True)]
        figure = canvas(columns, (0.6 if columns == 2 else 0.8) + sum(heights) + 0.1 * len(panels))
        grid = figure.subplots(
            len(panels), 2, squeeze=False, sharex="col", sharey="row", gridspec_kw={"height_ratios": heights}
        )
        tokens = np.concatenate([panel.tokens for panel in panels])
        for column, is_log in enumerate((False, True)):
            scale = SinceBaseAxis(tokens, is_log)
            for panel, axis in zip(panels, grid[:, column], strict=True):
                _draw_panel(axis, panel, scale)
        for panel, axis, title in zip(panels, grid[:, 0], titles, strict=True):
            axis.set_ylabel(panel.label if panel.values.size else "")
            colour = VERDICT_COLOURS[panel.verdict]
            made = axis.set_title(title, loc="left", color=colour, fontsize=SMALL_POINTS, pad=3, linespacing=1.2)
            made.set_in_layout(False)  # it stands over both columns: the other's empty title keeps its room
        for axis, n in zip(grid[:, 1], n_lines, strict=True):
            axis.set_title("\n".join([" "] * n), fontsize=SMALL_POINTS, pad=3, linespacing=1.2)
        figure.align_ylabels(grid[:, 0])
        figure.supxlabel("tokens since the base checkpoint (right: logarithmic)", fontsize=NORMAL_POINTS)
        key(figure, _legend(panels), side=False, above=True)
    return figure


def _title(panel: SaturationPanel) -> str:
    """Verdict, what it rests on, and the chosen curve; the reason where there is nothing to draw."""
    if not panel.values.size:
        return f"{panel.label.replace(chr(10), ' ')}: n/a, {panel.reason}"
    curve = f"; curve: {panel.fits[0][0]}" if panel.fits else ""
    return f"{panel.verdict}: {panel.note}{curve}"


def _draw_panel(axis: Axes, panel: SaturationPanel, scale: SinceBaseAxis) -> None:
    at, text = scale.ticks
    axis.set_xticks(*roomy(at, text, axis_inches(axis), scale.limits))
    axis.set_xlim(*scale.limits)
    if not panel.values.size:
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.patch.set_visible(False)
        return
    base_gap(axis, scale.gap)
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=panel.metric == HEAD_COUNT))
    if panel.interval is not None:
        low, high = panel.interval
        axis.axvspan(scale.clip(low), scale.clip(high), **(OPEN_BAND if math.isinf(high) else BAND))
    if np.isfinite(panel.point):
        axis.axvline(scale.clip(panel.point), **POINT)
    x = scale.at(panel.drawn_tokens)
    inside = panel.drawn_tokens > 0 if scale.is_log else np.full(len(x), True)
    for i, (_, y) in enumerate(panel.fits):
        axis.plot(x[inside], y[inside], color=style.metric_colour(panel.metric), **(LOG_LINE if i else CHOSEN))
    _draw_points(axis, panel, scale)
    _limit(axis, panel)


def _draw_points(axis: Axes, panel: SaturationPanel, scale: SinceBaseAxis) -> None:
    places = scale.at(panel.tokens)
    axis.vlines(places, panel.low, panel.high, color=style.INK, linewidth=0.7, zorder=3.5)
    base = panel.tokens == 0
    dot: Any = {"linestyle": "", "marker": "o", "markersize": 3, "markeredgewidth": 0.7, "color": style.INK}
    axis.plot(places[~base], panel.values[~base], zorder=4, **dot)
    axis.plot(places[base], panel.values[base], zorder=4, markerfacecolor="white", **dot)


def _limit(axis: Axes, panel: SaturationPanel) -> None:
    """Limits from the points: a line that says nothing about the first tokens must not flatten them."""
    ends = np.concatenate([panel.values, panel.low, panel.high])
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    margin = 0.08 * (high - low) or max(abs(high), 1.0) * 0.1
    axis.set_ylim(low - margin, high + margin)


def _legend(panels: list[SaturationPanel]) -> list[Any]:
    measured: Any = {"linestyle": "", "marker": "o", "color": style.INK, "markersize": 3}
    handles: list[Any] = [
        Line2D([], [], label="measured, 95 % interval", **measured),
        Line2D([], [], label="base", markerfacecolor="white", **measured),
    ]
    if any(panel.fits for panel in panels):
        handles.append(Line2D([], [], label="chosen curve", color=style.INK, **CHOSEN))
    if any(len(panel.fits) > 1 for panel in panels):
        handles.append(Line2D([], [], label="A log N + B", color=style.INK, **LOG_LINE))
    if any(panel.interval for panel in panels):
        handles.append(Patch(label="95 % point, interval", facecolor=BAND["color"], edgecolor=POINT["color"]))
    return handles
