"""What all paper figures share: page widths, look, vector heat maps, the token axis, writing to a file.

A figure spans one column of a page or two. Its text is 7 or 8 points high in either; what has no room at that size is
shortened, wrapped or left out (ticks), never made smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font, LoadFlags
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from lccp_interp.dynamics.tables import InterferenceTables, RunTables
from lccp_interp.figures import style
from lccp_interp.schema import LccpError
from lccp_interp.store import replacing

SINGLE_COLUMN_INCHES = 3.3
DOUBLE_COLUMN_INCHES = 6.8

NORMAL_POINTS = 8.0
SMALL_POINTS = 7.0
FONT = "DejaVu Sans"
MEASURED_POINTS = 100.0
GAP_INCHES = 0.06
"""Least room between two texts side by side."""

RC: Any = {
    "font.family": FONT,
    "font.size": NORMAL_POINTS,
    "axes.titlesize": NORMAL_POINTS,
    "axes.labelsize": NORMAL_POINTS,
    "xtick.labelsize": SMALL_POINTS,
    "ytick.labelsize": SMALL_POINTS,
    "legend.fontsize": SMALL_POINTS,
    "legend.title_fontsize": SMALL_POINTS,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": style.INK,
    "axes.labelcolor": style.INK,
    "text.color": style.INK,
    "xtick.color": style.INK,
    "ytick.color": style.INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # names of checkpoints may hold dollar signs
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "lccp_interp",
}


def save(figure: Figure, path: str | Path, *, dpi: int = 300) -> Path:
    """Write `figure` to `path`, as wide as it was made; the ending says the format.

    Fonts are embedded, and no date makes files differ.

    Example:
        >>> save(retrieval_heads(run), "figure5.pdf")   # doctest: +SKIP
    """
    path = Path(path)
    kind = path.suffix.lstrip(".")
    metadata: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})
    with mpl.rc_context(RC), replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=dpi, metadata=metadata)
    return path


def page_width(columns: int) -> float:
    """Inches of a figure that spans so many columns of a page.

    Raises:
        LccpError: neither 1 nor 2.

    Example:
        >>> page_width(1), page_width(2)
        (3.3, 6.8)
    """
    if columns not in (1, 2):
        raise LccpError(f"a figure spans 1 or 2 columns of a page, got {columns}")
    return SINGLE_COLUMN_INCHES if columns == 1 else DOUBLE_COLUMN_INCHES


@lru_cache(maxsize=4096)
def text_inches(text: str, points: float = SMALL_POINTS) -> float:
    """Width of a line of text.

    Example:
        >>> text_inches("iii") < text_inches("mmm") < text_inches("mmm", 8)
        True
    """
    font = _measure()
    font.set_text(text, 0.0, flags=LoadFlags.NO_HINTING)
    return font.get_width_height()[0] / 64 * points / MEASURED_POINTS / 72


@lru_cache(maxsize=1)
def _measure() -> FT2Font:
    """The font by itself: matplotlib's own instance keeps what was last done with it, and would draw otherwise."""
    font = FT2Font(findfont(FontProperties(family=FONT)))
    font.set_size(MEASURED_POINTS, 72)
    return font


def wrapped(text: str, inches: float, points: float = NORMAL_POINTS) -> str:
    """`text` in lines that have room, broken between words.

    Example:
        >>> wrapped("tokens since the base checkpoint", 1.5)
        'tokens since the base\\ncheckpoint'
    """
    lines: list[str] = []
    for word in text.split(" "):
        if lines and text_inches(f"{lines[-1]} {word}", points) <= inches:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def n_across(labels: Sequence[str], inches: float, *, beside: float = 0.34) -> int:
    """How many columns of a legend with these labels have room; `beside` inches each for mark and gap.

    Example:
        >>> n_across(["one", "two", "three"], 6.0), n_across(["one", "two", "three"], 0.5)
        (3, 1)
    """
    widths = [text_inches(label) + beside for label in labels]
    split = (n for n in range(len(widths), 1, -1) if sum(map(max, np.array_split(widths, n))) <= inches)
    return next(split, 1)


def axis_inches(axis: Axes) -> float:
    """About the width of an axis within its figure, before it is laid out."""
    spec = axis.get_subplotspec()
    n = 1 if spec is None else spec.get_gridspec().ncols
    return max((float(axis.figure.get_figwidth()) - 0.2) / n - 0.5, 0.6)  # type: ignore[union-attr]


def canvas(columns: int, height: float) -> Figure:
    """An empty figure over so many columns of a page, `height` inches high."""
    layout = _SteadyLayout(w_pad=0.03, h_pad=0.03, wspace=0.04, hspace=0.05)
    figure = Figure(figsize=(page_width(columns), height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


class _SteadyLayout(ConstrainedLayoutEngine):
    """Constrained layout on a fine grid: its solver's last digits differ from call to call, and so would the files."""

    def execute(self, fig: Any) -> Any:
        result = super().execute(fig)
        for axis in fig.axes:
            points = axis.get_position(original=True).get_points()
            # Not to the nearest: whole and half steps, where many edges lie, must not fall to either side.
            axis.set_position(Bbox(np.floor(points * 1e6 + 0.37) / 1e6))
            axis.set_in_layout(True)
        return result


def colormap(colours: Sequence[str]) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("lccp", list(colours))


def panel_grid(figure: Figure, n: int, columns: int) -> list[Axes]:
    """`n` axes in rows of `columns`; surplus ones are removed."""
    grid = figure.subplots(math.ceil(n / columns), min(columns, n), sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[n:]:
        axis.remove()
    # With shared axes only the lowest of a column is labelled; above a removed one that is another.
    for axis in axes[max(0, n - grid.shape[1]) : n]:
        axis.tick_params(labelbottom=True)
    return axes[:n]


def heatmap(axis: Axes, matrix: NDArray[np.float64], colormap: LinearSegmentedColormap, norm: Normalize) -> Any:
    """Vector cells with white seams; undefined cells are hatched, which `name_undefined` explains."""
    n_rows, n_columns = matrix.shape
    seam = 0.5 if max(matrix.shape) <= 16 else 0.15
    mesh = axis.pcolormesh(
        np.arange(n_columns + 1) - 0.5,
        np.arange(n_rows + 1) - 0.5,
        np.ma.masked_invalid(matrix),
        cmap=colormap,
        norm=norm,
        edgecolors="white",
        linewidth=seam,
    )
    undefined = np.argwhere(~np.isfinite(matrix))
    for row, column in undefined:
        axis.add_patch(
            Rectangle(
                (column - 0.5, row - 0.5),
                1,
                1,
                facecolor=style.UNDEFINED,
                edgecolor="white",
                hatch="////",
                linewidth=seam,
            )
        )
    axis.set_xlim(-0.5, n_columns - 0.5)
    axis.set_ylim(n_rows - 0.5, -0.5)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)
    return mesh


def name_undefined(figure: Figure, matrices: Sequence[NDArray[np.float64]]) -> None:
    """A legend for hatched cells, where there are any."""
    if any(not np.isfinite(matrix).all() for matrix in matrices):
        patch = Patch(facecolor=style.UNDEFINED, edgecolor="white", hatch="////", linewidth=0, label="n/a (undefined)")
        figure.legend(handles=[patch], loc="outside upper right", handlelength=1.4)


def colorbar(figure: Figure, mesh: Any, axes: Sequence[Axes], label: str) -> Any:
    """The scale of colours: at the right, or above the panels of a figure over one column."""
    is_wide = figure.get_figwidth() > SINGLE_COLUMN_INCHES
    place: Any = {"pad": 0.015, "aspect": 25} if is_wide else {"location": "top", "pad": 0.03, "aspect": 35}
    bar = figure.colorbar(mesh, ax=list(axes), label=label, fraction=0.04, **place)
    solids: Any = bar.solids
    solids.set_rasterized(False)
    solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    return bar


def long_side(bar: Any) -> Any:
    """The axis of a colour bar that holds its scale."""
    return bar.ax.yaxis if bar.orientation == "vertical" else bar.ax.xaxis


def ppl_ticks(axis: Any, scale: style.PplScale, inches: float | None = None) -> None:
    """Ticks of perplexities; of those that would touch on a horizontal axis `inches` long some are left out."""
    at, text = scale.ticks
    axis.set_ticks(*roomy(at, text, inches, (scale.low, scale.high)) if inches else (at, text))


def roomy(
    at: Sequence[float], text: Sequence[str], inches: float, limits: tuple[float, float]
) -> tuple[list[float], list[str]]:
    """The ticks whose texts have room side by side on an axis `inches` long: both ends first, then from the left.

    Example:
        >>> roomy([0, 1, 2, 3], ["0", "100K", "200K", "300K"], 0.8, (0, 3))
        ([0, 1, 3], ['0', '100K', '300K'])
    """
    half = [text_inches(words) / 2 for words in text]
    place = [inches * (value - limits[0]) / (limits[1] - limits[0]) for value in at]
    kept: list[int] = []
    for i in dict.fromkeys((0, len(at) - 1, *range(len(at)))) if at else ():
        if all(abs(place[i] - place[j]) >= half[i] + half[j] + GAP_INCHES for j in kept):
            kept.append(i)
    kept.sort()
    return [at[i] for i in kept], [text[i] for i in kept]


def category_ticks(axis: Axes, names: Sequence[str], inches: float) -> None:
    """Names below columns 0, 1, ...: upright where they would touch, and then no more of them than have room."""
    upright = max(map(text_inches, names), default=0.0) + GAP_INCHES > inches / max(len(names), 1)
    step = math.ceil(len(names) * 1.35 * SMALL_POINTS / (72 * inches)) if upright else 1
    shown = range(0, len(names), step)
    axis.set_xticks(list(shown), [names[i] for i in shown], rotation=90 if upright else 0)


def key(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str] | None = None, *, title: str | None = None,
    side: bool = True, above: bool = False,
) -> None:  # fmt: skip
    """The legend of a figure: at its right where it spans two columns and `side`, else below or `above`, in rows.

    Above where the whole figure has a label below: layout knows no order of the two.
    """
    labels = [str(handle.get_label()) for handle in handles] if labels is None else list(labels)
    if not labels:
        return
    if side and figure.get_figwidth() > SINGLE_COLUMN_INCHES:
        figure.legend(handles, labels, title=title, loc="outside right center")
        return
    n_columns = n_across(labels, figure.get_figwidth() - 0.1)
    look: Any = {"handlelength": 1.4, "columnspacing": 1.0, "borderpad": 0.1, "borderaxespad": 0.2, "title": title}
    where: Any = "outside upper center" if above else "outside lower center"
    figure.legend(handles, labels, loc=where, ncols=n_columns, **look)


def short_name(tables: RunTables | InterferenceTables, name: str, inches: float = 1.1) -> str:
    """The name of a checkpoint, shortened like all others to the room that there is."""
    names = tables.checkpoints["checkpoint"].to_list()
    for width in range(max(map(len, names)), 5, -1):
        short = style.short_names(names, width)
        if max(map(text_inches, short.values())) <= inches:
            break
    return short[name]


def panel_title(tables: RunTables | InterferenceTables, name: str, inches: float = 1.1) -> str:
    """The name of a checkpoint and its place in training, in two lines."""
    tokens = tables.checkpoints.filter(pl.col("checkpoint") == name)["tokens_seen"][0]
    base = ", base" if name == tables.base else ""
    place = style.place_in_training(tables.checkpoints, tables.base, tokens)
    return f"{short_name(tables, name, inches)}\n({place}{base})"


def say_why(axis: Axes, why: str) -> None:
    """The reason where nothing can be drawn."""
    text = wrapped(f"n/a: {why}", axis_inches(axis), SMALL_POINTS)
    axis.text(
        0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=style.MUTED, fontsize=SMALL_POINTS
    )
    axis.set_xticks([])
    axis.set_yticks([])


def base_gap(axis: Axes, gap: float | None) -> None:
    """The break between the base and the rest of a logarithmic axis of tokens; nothing where `gap` is None."""
    if gap is not None:
        axis.text(
            gap, 0, "//", transform=axis.get_xaxis_transform(), ha="center", va="center", fontsize=SMALL_POINTS,
            bbox={"facecolor": "white", "linewidth": 0, "pad": 0.6},
        )  # fmt: skip


def token_axis(axes: Sequence[Axes], tables: RunTables) -> style.TokenAxis:
    """Ticks, label and the shaded last stage on axes that share x; the stage is named in the uppermost."""
    scale = style.TokenAxis.of(tables.checkpoints, tables.base)
    for axis in axes:
        token_ticks(axis, tables, scale)
    axes[-1].set_xlabel(wrapped(scale.label, axis_inches(axes[-1])))
    stage = style.last_stage(tables.checkpoints, tables.base)
    if stage is not None:
        name, start, _ = stage
        left = scale.at([start])[0]
        axes[0].text(
            left, 1.01, f" {style.stage_name(name)} →", transform=axes[0].get_xaxis_transform(),
            ha="left", va="bottom", fontsize=SMALL_POINTS, color=style.MUTED,
        )  # fmt: skip
        axes[0].text(
            left, 1.01, "base ", transform=axes[0].get_xaxis_transform(),
            ha="right", va="bottom", fontsize=SMALL_POINTS, color=style.MUTED,
        )  # fmt: skip
    return scale


def token_ticks(axis: Axes, tables: RunTables, scale: style.TokenAxis) -> None:
    """Ticks of one axis of tokens; the last stage shaded behind it from its base on, unless the axis begins there."""
    axis.set_xlim(*scale.limits)
    axis.set_xticks(*roomy(scale.tick_at, scale.tick_text, axis_inches(axis), scale.limits))
    stage = style.last_stage(tables.checkpoints, tables.base)
    if stage is not None and (left := scale.at([stage[1]])[0]) > 0:
        axis.axvspan(left, scale.limits[1], color=style.STAGE_SHADE, zorder=0, linewidth=0)
        axis.axvline(left, color=style.MUTED, linewidth=0.6, linestyle=(0, (4, 2)), zorder=1)
