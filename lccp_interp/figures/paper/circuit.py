"""Circuits on paper: which earlier heads feed a head's query, key and value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from numpy.typing import NDArray

from lccp_interp.figures import style
from lccp_interp.figures.circuit_panels import COLOURS, MAX_EDGES, NAMES, Circuit, Line, Panel, bow, circuit_panels
from lccp_interp.figures.paper.canvas import RC, SMALL_POINTS, canvas, key
from lccp_interp.interventions.graph import HeadGraph

DASHES: dict[str, Any] = {"q": (0, (3, 1.5)), "k": "-", "v": (0, (1, 1.2))}
NODE_INCHES = 0.13
"""Radius of a head."""

LAYER_INCHES = 0.75
WIDEST_POINTS = 3.2
THINNEST_POINTS = 0.5


def circuit(graphs: HeadGraph | Sequence[HeadGraph], *, columns: int = 2, max_edges: int = MAX_EDGES) -> Figure:
    """Which earlier heads feed which: layers upwards, an edge as wide as its weight, dashed and coloured by its input.

    Args:
        graphs: one per panel, of one metric; from `lccp_interp.interventions.circuits.head_graph`.
        columns: of a page, 1 or 2.
        max_edges: per panel, the strongest of those whose interval leaves out 0.

    Raises:
        LccpError: graphs of different metrics.

    Example:
        >>> save(circuit([before, after]), "circuit.pdf")   # doctest: +SKIP
    """
    made = circuit_panels(graphs, max_edges)
    n_across = min(len(made.panels), columns)
    n_down = math.ceil(len(made.panels) / n_across)
    height = 0.65 + n_down * (0.55 + LAYER_INCHES * max(len(made.layers) - 1, 1))
    with mpl.rc_context(RC):
        figure = canvas(columns, height)
        grid = figure.subplots(n_down, n_across, sharex=True, sharey=True, squeeze=False)
        axes = list(grid.flat)
        for axis in axes[len(made.panels) :]:
            axis.remove()
        for axis, panel in zip(axes, made.panels, strict=False):
            _prepare(axis, panel, made)
        for row in grid:
            row[0].set_ylabel("layer")
        for axis in axes[max(0, len(made.panels) - n_across) : len(made.panels)]:
            axis.set_xlabel("head")
            axis.tick_params(labelbottom=True)
        key(figure, _legend(made), side=False)
        # Edges end at the rim of a head: how far apart heads stand on paper has to be known first.
        figure.draw_without_rendering()
        for axis, panel in zip(axes, made.panels, strict=False):
            _draw(axis, panel, made)
    return figure


def _prepare(axis: Axes, panel: Panel, made: Circuit) -> None:
    axis.set_title(f"{panel.graph.checkpoint}\n{panel.subtitle}", fontsize=SMALL_POINTS)
    axis.set_xlim(-0.6, len(made.columns) - 0.4)
    axis.set_ylim(made.layers[0] - 0.35, made.layers[-1] + 0.35)
    axis.set_xticks(range(len(made.columns)), [str(number) for number in made.columns])
    axis.set_yticks(made.layers)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for layer in made.layers:
        axis.axhline(layer, color=style.STAGE_SHADE, linewidth=9, zorder=0)


def _draw(axis: Axes, panel: Panel, made: Circuit) -> None:
    origin, one = axis.transData.transform([(0, 0), (1, 1)])
    column, layer = (one - origin) / axis.figure.dpi
    for line in panel.lines:
        _draw_line(axis, line, bow(line, shorten=(NODE_INCHES + 0.02) / layer, aspect=column / layer))
    for node in panel.nodes:
        face, ink = (style.INK, "white") if node.is_target else ("white", style.INK)
        axis.plot(
            [node.x], [node.y], linestyle="", marker="o", markersize=2 * NODE_INCHES * 72, zorder=3, clip_on=False,
            markerfacecolor=face, markeredgecolor=style.INK, markeredgewidth=0.7,
        )  # fmt: skip
        axis.text(
            node.x, node.y, node.label, color=ink, ha="center", va="center_baseline", fontsize=SMALL_POINTS, zorder=4
        )
    if not panel.lines:
        middle = (made.layers[0] + made.layers[-1]) / 2 - (0.25 if len(made.layers) == 1 else 0)
        axis.text((len(made.columns) - 1) / 2, middle, "no clear edge", ha="center", va="center", color=style.MUTED)


def _draw_line(axis: Axes, line: Line, points: NDArray[np.float64]) -> None:
    look: dict[str, Any] = {
        "color": COLOURS[line.input],
        "linewidth": THINNEST_POINTS + (WIDEST_POINTS - THINNEST_POINTS) * line.width,
        "zorder": 2,
    }
    axis.plot(points[:-1, 0], points[:-1, 1], linestyle=DASHES[line.input], dash_capstyle="butt", **look)
    head = "-|>,head_width=0.16,head_length=0.3" if line.helps else "|-|,widthA=0,widthB=0.4"
    end: dict[str, Any] = {"arrowstyle": head, "mutation_scale": 8 + 5 * line.width, "shrinkA": 0, "shrinkB": 0}
    arrow = FancyArrowPatch(tuple(points[-3]), tuple(points[-1]), joinstyle="miter", capstyle="butt", **(look | end))
    axis.add_patch(arrow)


def _legend(made: Circuit) -> list[Any]:
    handles: list[Any] = [
        Line2D([], [], color=COLOURS[name], linestyle=DASHES[name], linewidth=1.6, label=f"into its {NAMES[name]}")
        for name in made.inputs
    ]
    if made.hinders:
        handles.append(
            Line2D([], [], color=style.MUTED, linewidth=0.9, marker="|", markersize=6, markevery=[1], label="hinders")
        )
    if made.greatest:
        widest = style.format_number(made.greatest, 2)
        handles.append(Line2D([], [], color=style.MUTED, linewidth=WIDEST_POINTS, label=f"{widest} lost without it"))
    handles.append(
        Line2D([], [], linestyle="", marker="o", markersize=7, color=style.INK, label="head that is asked about")
    )
    return handles
