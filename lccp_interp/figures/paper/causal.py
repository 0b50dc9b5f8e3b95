"""The causal check on paper: answers without the best heads and without random ones, over k and over training."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.causal_panels import (
    CausalCheck,
    CausalPanel,
    DatedLine,
    causal_check_panels,
    causal_date_lines,
)
from lccp_interp.figures.paper.canvas import (
    RC,
    SMALL_POINTS,
    axis_inches,
    canvas,
    category_ticks,
    key,
    roomy,
    token_axis,
    wrapped,
)
from lccp_interp.store import Run

RANDOM: Any = {"color": style.MUTED, "linestyle": (0, (4, 1.6)), "marker": "s", "markersize": 2.6, "linewidth": 1.0}
BAND: Any = {"alpha": 0.18, "linewidth": 0}
LITTLE: Any = {"color": style.MUTED, "linewidth": 0.7, "linestyle": (0, (1, 2)), "zorder": 1.5}


def causal_check(
    run: Run | RunTables, *, columns: int = 2, study: str | None = None, checkpoint: str | None = None
) -> Figure:
    """Loss, exact answers and perplexity without the k best heads, beside as many random heads of the same layers.

    Args:
        run: an opened run with ablations (`lccp ablate`).
        columns: of a page, 1 or 2.
        study: one of its ablation studies; None means the one with most sizes of sets.
        checkpoint: one of the study's; None means its last.

    Raises:
        LccpError: no ablations, or no such study or checkpoint.

    Example:
        >>> save(causal_check(Run.open("runs/demo")), "causal.pdf")   # doctest: +SKIP
    """
    made = causal_check_panels(RunTables.of(run), study, checkpoint)
    with mpl.rc_context(RC):
        figure = canvas(columns, 2.2 if columns == 2 else 4.6)
        axes = list(np.ravel(figure.subplots(*((1, 3) if columns == 2 else (3, 1)), sharex=columns == 1)))
        for axis, panel in zip(axes, made.panels, strict=True):
            _draw_check(axis, panel, made)
        what = "head removed (layer-head)" if made.is_single else "heads removed, k"
        for axis in axes if columns == 2 else axes[-1:]:
            axis.set_xlabel(what)
        key(figure, _check_legend(made), side=False)
    return figure


def _draw_check(axis: Axes, panel: CausalPanel, made: CausalCheck) -> None:
    colour = style.metric_colour(panel.outcome)
    parts: tuple[tuple[Any, Any, Any, Any], ...] = (
        (panel.random, panel.random_low, panel.random_high, RANDOM),
        (panel.best, panel.best_low, panel.best_high, {"color": colour, "marker": "o"}),
    )
    for i, (middle, low, high, look) in enumerate(parts):
        if made.is_single:
            x = made.places + (0.14 if i else -0.14)
            axis.vlines(x, low, high, color=look["color"], linewidth=0.9)
            axis.plot(x, middle, **look | {"linestyle": ""})
        else:
            axis.fill_between(made.places, low, high, color=look["color"], **BAND)
            axis.plot(made.places, middle, **look)
    if made.is_single:
        axis.axhline(panel.intact, **LITTLE)
        axis.set_xlim(-0.6, len(made.places) - 0.4)
        category_ticks(axis, made.texts, axis_inches(axis))
    else:
        margin = 0.04 * (made.places[-1] - made.places[0])
        limits = (float(made.places[0] - margin), float(made.places[-1] + margin))
        axis.set_xlim(*limits)
        axis.set_xticks(*roomy(made.places.tolist(), made.texts, axis_inches(axis), limits))
    axis.set_ylabel(panel.label)
    if panel.outcome == "greedy_exact":
        axis.set_ylim(-4, 104)
    elif panel.outcome == "loss_nats":
        axis.set_ylim(0, None)
        axis.yaxis.set_major_locator(MaxNLocator(5))
    else:
        _logarithmic(axis)


def _logarithmic(axis: Axes) -> None:
    """A logarithmic axis of perplexities from 1 on, with few round ticks."""
    axis.set_yscale("log")
    axis.set_ylim(1, None)
    axis.yaxis.set_major_locator(FixedLocator(style.log_ppl_ticks(axis.get_ylim()[1])))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: style.format_ppl_tick(value)))


def _check_legend(made: CausalCheck) -> list[Line2D]:
    best = "without the head" if made.is_single else "without the k best heads"
    layers = " of the same layers" if made.layer_matched else ""
    other = f"without another head{layers}" if made.is_single else f"without k random heads{layers}"
    handles = [
        Line2D([], [], color=style.INK, marker="o", label=best),
        Line2D([], [], label=other, **RANDOM),
    ]
    if made.is_single:
        handles = [Line2D([], [], **look) for look in (_lineless(handle) for handle in handles)]
        handles.append(Line2D([], [], label="with all heads", **LITTLE))
    return handles


def _lineless(handle: Line2D) -> dict[str, Any]:
    return {"linestyle": "", "color": handle.get_color(), "marker": handle.get_marker(), "label": handle.get_label()}


def causal_dates(run: Run | RunTables, *, columns: int = 2, study: str | None = None) -> Figure:
    """How much more is lost without the best heads than without random ones, over training tokens.

    Above the loss, below exact answers; a ring marks from when on a set of heads is important (`important_from`), the
    dotted line the harm that is little.

    Args:
        run: an opened run with ablations at two or more checkpoints (`lccp ablate RUN --only all`).
        columns: of a page, 1 or 2.
        study: one of its ablation studies; None means the one with most checkpoints.

    Raises:
        LccpError: no such study.

    Example:
        >>> save(causal_dates(Run.open("runs/demo")), "causal_dates.pdf")   # doctest: +SKIP
    """
    tables = RunTables.of(run)
    made = causal_date_lines(tables, study)
    with mpl.rc_context(RC):
        figure = canvas(columns, 3.6 if columns == 2 else 4.1)
        axes = list(figure.subplots(len(made.panels), 1, sharex=True))
        scale = token_axis(axes, tables)
        for axis, (_, label, lines, little) in zip(axes, made.panels, strict=True):
            axis.axhline(little, **LITTLE)
            for line in lines:
                _draw_dated(axis, line, scale)
            axis.set_ylabel(label)
            axis.yaxis.set_major_locator(MaxNLocator(5))
        title = "head removed" if made.is_single else "heads removed, k"
        handles = [
            Line2D([], [], color=line.colour, marker="o", label=line.name.replace(" ", "\n"))
            for line in made.panels[0][2]
        ]
        handles.append(Line2D([], [], **_ring("none"), label="important from"))
        key(figure, handles, title=wrapped(title, 1.2, SMALL_POINTS))
    return figure


def _draw_dated(axis: Axes, line: DatedLine, scale: style.TokenAxis) -> None:
    x = scale.at(line.tokens)
    axis.fill_between(x, line.low, line.high, color=line.colour, alpha=0.1, linewidth=0)
    axis.plot(x, line.beyond, color=line.colour, marker="o", markersize=2.4)
    if line.since is not None:
        look = _ring("white" if line.provisional else line.colour)
        axis.plot(x[line.since], line.beyond[line.since], zorder=4, **look)


def _ring(face: str) -> dict[str, Any]:
    return {
        "linestyle": "", "marker": "D", "markersize": 5.5, "markerfacecolor": face, "markeredgecolor": style.INK,
        "markeredgewidth": 0.9,
    }  # fmt: skip
