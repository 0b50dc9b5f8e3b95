"""Agreement of head metrics on paper: rank correlation below the diagonal, shared top heads above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.agreement_panels import AgreementMap, agreement_map
from lccp_interp.figures.paper.canvas import (
    RC,
    SMALL_POINTS,
    canvas,
    colorbar,
    colormap,
    name_undefined,
    page_width,
    text_inches,
)
from lccp_interp.store import Run


def metric_agreement(run: Run | RunTables, *, columns: int = 1, checkpoint: str | None = None) -> Figure:
    """Whether head metrics rank the heads alike, at one checkpoint.

    Below the diagonal Spearman's rho over all heads, above it how many heads are in both top lists.

    Args:
        run: an opened run with two or more head metrics.
        columns: of a page, 1 or 2.
        checkpoint: one of the run; None means the last scored one.

    Raises:
        LccpError: one metric only, or an unknown checkpoint.

    Example:
        >>> save(metric_agreement(Run.open("runs/demo")), "agreement.pdf")   # doctest: +SKIP
    """
    made = agreement_map(RunTables.of(run), checkpoint)
    n = len(made.metrics)
    with mpl.rc_context(RC):
        names = max(map(text_inches, made.metrics)) + 0.15
        most = page_width(columns) - names - (1.6 if columns == 2 else 0.1)
        side = min(most, max(0.42 * n, 1.4))
        figure = canvas(columns, side + names + (0.1 if columns == 2 else 1.0))
        axis = figure.subplots()
        axis.set_aspect("equal")
        shared = _half(axis, made.overlap, style.SCORES, (0.0, 1.0))
        rho = _half(axis, made.spearman, style.CORRELATION, (-1.0, 1.0))
        _frame(axis, made)
        if side / n >= text_inches("-0.00") + 0.02:
            _write(axis, made)
        shares = colorbar(figure, shared, [axis], f"above: share of the top {made.top_k}")
        correlations = colorbar(figure, rho, [axis], "below: rank correlation")
        shares.set_ticks([0, 0.25, 0.5, 0.75, 1])
        correlations.set_ticks([-1, -0.5, 0, 0.5, 1])
        if made.undefined:
            name_undefined(figure, [made.spearman[tuple(zip(*made.undefined, strict=True))]])
    return figure


def _half(axis: Axes, matrix: NDArray[np.float64], colours: Sequence[str], ends: tuple[float, float]) -> Any:
    edges = np.arange(len(matrix) + 1) - 0.5
    shown = np.ma.masked_invalid(matrix)
    return axis.pcolormesh(
        edges, edges, shown, cmap=colormap(colours), norm=Normalize(*ends), edgecolors="white", linewidth=0.5
    )


def _frame(axis: Axes, made: AgreementMap) -> None:
    """Names of the metrics at the left and below; undefined cells hatched, the diagonal empty."""
    n = len(made.metrics)
    look: Any = {"facecolor": style.UNDEFINED, "edgecolor": "white", "hatch": "////", "linewidth": 0.5}
    for row, column in made.undefined:
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **look))
    axis.set_xlim(-0.5, n - 0.5)
    axis.set_ylim(n - 0.5, -0.5)
    axis.set_xticks(range(n), made.metrics, rotation=90)
    axis.set_yticks(range(n), made.metrics)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _write(axis: Axes, made: AgreementMap) -> None:
    for row, column in np.ndindex(made.spearman.shape):
        text = made.text(row, column)
        if text:
            strong = abs(made.spearman[row, column]) > 0.6 if row > column else made.overlap[row, column] > 0.6
            colour = "white" if strong else style.INK
            axis.text(column, row, text, ha="center", va="center", fontsize=SMALL_POINTS, color=colour)
