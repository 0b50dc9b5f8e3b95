"""What all paper figures share: page widths, look, vector heat maps, the token axis, writing to a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lccp_interp.dynamics.tables import InterferenceTables, RunTables
from lccp_interp.figures import style
from lccp_interp.store import replacing

SINGLE_COLUMN_INCHES = 3.3
DOUBLE_COLUMN_INCHES = 6.8

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
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
    """Write `figure` to `path`; the ending says the format. Fonts are embedded, and no date makes files differ.

    Example:
        >>> save(retrieval_heads(run), "figure5.pdf")   # doctest: +SKIP
    """
    path = Path(path)
    kind = path.suffix.lstrip(".")
    metadata: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})
    with mpl.rc_context(RC), replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=dpi, metadata=metadata, bbox_inches="tight", pad_inches=0.03)
    return path


def canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.04)  # type: ignore[union-attr,call-arg]
    return figure


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
    """Vector cells with white seams; undefined cells hatched and named."""
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
        if matrix.size <= 100:
            axis.text(column, row, "n/a", ha="center", va="center", fontsize=5)
    axis.set_xlim(-0.5, n_columns - 0.5)
    axis.set_ylim(n_rows - 0.5, -0.5)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)
    return mesh


def colorbar(figure: Figure, mesh: Any, axes: Sequence[Axes], label: str) -> Any:
    bar = figure.colorbar(mesh, ax=list(axes), label=label, fraction=0.04, pad=0.015, aspect=25)
    solids: Any = bar.solids
    solids.set_rasterized(False)
    solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    return bar


def ppl_ticks(axis: Any, scale: style.PplScale) -> None:
    at, text = scale.ticks
    axis.set_ticks(at, labels=text)


def short_name(tables: RunTables | InterferenceTables, name: str) -> str:
    return style.short_names(tables.checkpoints["checkpoint"].to_list(), 17)[name]


def panel_title(tables: RunTables | InterferenceTables, name: str) -> str:
    tokens = tables.checkpoints.filter(pl.col("checkpoint") == name)["tokens_seen"][0]
    base = ", base" if name == tables.base else ""
    place = style.place_in_training(tables.checkpoints, tables.base, tokens)
    return f"{short_name(tables, name)}\n({place}{base})"


def say_why(axis: Axes, why: str) -> None:
    """The reason where nothing can be drawn."""
    axis.text(0.5, 0.5, f"n/a: {why}", transform=axis.transAxes, ha="center", va="center", color=style.MUTED)
    axis.set_xticks([])
    axis.set_yticks([])


def base_gap(axis: Axes, gap: float | None) -> None:
    """The break between the base and the rest of a logarithmic axis of tokens; nothing where `gap` is None."""
    if gap is not None:
        axis.text(
            gap, 0, "//", transform=axis.get_xaxis_transform(), ha="center", va="center", fontsize=6,
            bbox={"facecolor": "white", "linewidth": 0, "pad": 0.6},
        )  # fmt: skip


def token_axis(axes: Sequence[Axes], tables: RunTables) -> style.TokenAxis:
    """Ticks, label and the shaded last stage on axes that share x; the stage is named in the uppermost."""
    scale = style.TokenAxis.of(tables.checkpoints, tables.base)
    for axis in axes:
        token_ticks(axis, tables, scale)
    axes[-1].set_xlabel(scale.label)
    stage = style.last_stage(tables.checkpoints, tables.base)
    if stage is not None:
        name, start, _ = stage
        left = scale.at([start])[0]
        axes[0].text(
            left, 1.01, f" {style.stage_name(name)} →", transform=axes[0].get_xaxis_transform(),
            ha="left", va="bottom", fontsize=6.5, color=style.MUTED,
        )  # fmt: skip
        axes[0].text(
            left, 1.01, "base ", transform=axes[0].get_xaxis_transform(),
            ha="right", va="bottom", fontsize=6.5, color=style.MUTED,
        )  # fmt: skip
    return scale


def token_ticks(axis: Axes, tables: RunTables, scale: style.TokenAxis) -> None:
    """Ticks of one axis of tokens; the last stage shaded behind it from its base on, unless the axis begins there."""
    axis.set_xlim(*scale.limits)
    axis.set_xticks(scale.tick_at, scale.tick_text)
    stage = style.last_stage(tables.checkpoints, tables.base)
    if stage is not None and (left := scale.at([stage[1]])[0]) > 0:
        axis.axvspan(left, scale.limits[1], color=style.STAGE_SHADE, zorder=0, linewidth=0)
        axis.axvline(left, color=style.MUTED, linewidth=0.6, linestyle=(0, (4, 2)), zorder=1)
