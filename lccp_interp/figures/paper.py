"""Figures for papers: matplotlib, vector throughout, fonts embedded, at column width.

The numbers of the figures are those of arXiv 2604.02650. Every function takes a `Run` (or the `RunTables` of one, to
share work) and returns a matplotlib `Figure` made without pyplot, so that nothing is global and no display is needed;
`save` writes it. Undefined cells are hatched, never left out. This module refuses to know statistics: it draws tables
of `lccp_interp.dynamics`. Cost: tens of milliseconds each beside the tables.
"""

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
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.life_rows import RIBBON_HALF_HEIGHT, LifeRow, life_kind_labels, life_rows
from lccp_interp.schema import RETRIEVAL_THRESHOLD
from lccp_interp.store import Run, replacing

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


def _canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.04)  # type: ignore[union-attr,call-arg]
    return figure


def _colormap(colours: Sequence[str]) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("lccp", list(colours))


def _panel_grid(figure: Figure, n: int, columns: int) -> list[Axes]:
    """`n` axes in rows of `columns`; surplus ones are removed."""
    grid = figure.subplots(math.ceil(n / columns), min(columns, n), sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[n:]:
        axis.remove()
    # With shared axes only the lowest of a column is labelled; above a removed one that is another.
    for axis in axes[max(0, n - grid.shape[1]) : n]:
        axis.tick_params(labelbottom=True)
    return axes[:n]


def _heatmap(axis: Axes, matrix: NDArray[np.float64], colormap: LinearSegmentedColormap, norm: Normalize) -> Any:
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


def _colorbar(figure: Figure, mesh: Any, axes: Sequence[Axes], label: str) -> Any:
    bar = figure.colorbar(mesh, ax=list(axes), label=label, fraction=0.04, pad=0.015, aspect=25)
    solids: Any = bar.solids
    solids.set_rasterized(False)
    solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    return bar


def _ppl_ticks(axis: Any, scale: style.PplScale) -> None:
    at, text = scale.ticks
    axis.set_ticks(at, labels=text)


def _short_name(tables: RunTables, name: str) -> str:
    return style.short_names(tables.checkpoints["checkpoint"].to_list(), 17)[name]


def _panel_title(tables: RunTables, name: str) -> str:
    tokens = tables.checkpoints.filter(pl.col("checkpoint") == name)["tokens_seen"][0]
    base = ", base" if name == tables.base else ""
    place = style.place_in_training(tables.checkpoints, tables.base, tokens)
    return f"{_short_name(tables, name)}\n({place}{base})"


def _token_axis(axes: Sequence[Axes], tables: RunTables) -> style.TokenAxis:
    """Ticks, label and the shaded last stage on axes that share x; the stage is named in the uppermost."""
    scale = style.TokenAxis.of(tables.checkpoints, tables.base)
    for axis in axes:
        axis.set_xlim(*scale.limits)
        axis.set_xticks(scale.tick_at, scale.tick_text)
    axes[-1].set_xlabel(scale.label)
    stage = style.last_stage(tables.checkpoints, tables.base)
    if stage is not None:
        name, start, _ = stage
        left = scale.at([start])[0]
        for axis in axes:
            axis.axvspan(left, scale.limits[1], color=style.STAGE_SHADE, zorder=0, linewidth=0)
            axis.axvline(left, color=style.MUTED, linewidth=0.6, linestyle=(0, (4, 2)), zorder=1)
        axes[0].text(
            left, 1.01, f" {style.stage_name(name)} →", transform=axes[0].get_xaxis_transform(),
            ha="left", va="bottom", fontsize=6.5, color=style.MUTED,
        )  # fmt: skip
        axes[0].text(
            left, 1.01, "base ", transform=axes[0].get_xaxis_transform(),
            ha="right", va="bottom", fontsize=6.5, color=style.MUTED,
        )  # fmt: skip
    return scale


def ppl_heatmaps(run: Run | RunTables, *, max_panels: int = style.MAX_PANELS) -> Figure:
    """Answer perplexity over context length and needle depth, a panel per checkpoint (arXiv 2604.02650, Figure 2).

    One logarithmic colour scale for all panels; up to `max_panels` checkpoints from the base to the last.

    Example:
        >>> save(ppl_heatmaps(Run.open("runs/demo")), "figure2.pdf")   # doctest: +SKIP
    """
    tables = RunTables.of(run)
    panels = style.select_panels(tables.checkpoints, tables.base, max_panels)
    depths = sorted(tables.by_depth["depth_fraction"].unique())
    matrices = [
        style.cell_matrix(
            tables.by_depth.filter(pl.col("checkpoint") == name),
            depths, tables.lengths, "depth_fraction", "length", "answer_ppl",
        )
        for name in panels
    ]  # fmt: skip
    scale = style.PplScale.of(*matrices)
    with mpl.rc_context(RC):
        columns = min(len(panels), 6)
        figure = _canvas(DOUBLE_COLUMN_INCHES, 0.55 + 1.25 * math.ceil(len(panels) / columns))
        axes = _panel_grid(figure, len(panels), columns)
        norm = Normalize(scale.low, scale.high)
        for axis, name, matrix in zip(axes, panels, matrices, strict=True):
            mesh = _heatmap(axis, scale.places(matrix), _colormap(style.PERPLEXITY), norm)
            axis.set_title(_panel_title(tables, name), fontsize=6.5)
            axis.set_xticks(range(len(tables.lengths)), [style.format_length(value) for value in tables.lengths])
            axis.tick_params(axis="x", labelrotation=90 if len(tables.lengths) > 4 else 0)
            shown = range(0, len(depths), math.ceil(len(depths) / 6))
            axis.set_yticks(shown, [f"{100 * depths[i]:.0f}" for i in shown])
        figure.supxlabel("context length (tokens)", fontsize=7.5)
        axes[0].set_ylabel("needle depth (%)")
        bar = _colorbar(figure, mesh, axes, "answer perplexity")
        _ppl_ticks(bar.ax.yaxis, scale)
    return figure


def niah_trajectory(run: Run | RunTables) -> Figure:
    """NIAH score and answer perplexity against training tokens, a line per length (arXiv 2604.02650, Figure 3).

    Bands are bootstrap intervals over needles and haystacks.
    """
    tables = RunTables.of(run)
    lengths = style.pick_evenly(tables.lengths, 7)
    colours = style.spread_colours(style.PLASMA, len(lengths))
    with mpl.rc_context(RC):
        figure = _canvas(DOUBLE_COLUMN_INCHES * 0.75, 3.6)
        upper, lower = figure.subplots(2, 1, sharex=True)
        scale = _token_axis([upper, lower], tables)
        drawn = tables.by_length.filter(pl.col("length").is_in(lengths))
        ppl = style.PplScale.of(drawn["answer_ppl"], drawn["answer_ppl_low"], drawn["answer_ppl_high"])
        for length, colour in zip(lengths, colours, strict=True):
            rows = drawn.filter(pl.col("length") == length)
            x = scale.at(rows["tokens_seen"])
            score, score_low, score_high = (rows[f"niah_score{end}"].to_numpy() for end in ("", "_low", "_high"))
            middle, low, high = (ppl.places(rows[f"answer_ppl{end}"]) for end in ("", "_low", "_high"))
            upper.plot(x, score, color=colour, marker="o", label=style.format_length(length))
            upper.fill_between(x, score_low, score_high, color=colour, alpha=0.15, linewidth=0)
            lower.plot(x, middle, color=colour, marker="o")
            lower.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        upper.set_ylim(-4, 104)
        upper.set_ylabel("NIAH score (%)")
        lower.set_ylim(*ppl.limits)
        lower.set_ylabel("answer perplexity")
        _ppl_ticks(lower.yaxis, ppl)
        handles, labels = upper.get_legend_handles_labels()
        figure.legend(handles, labels, title="context length", loc="outside right center", title_fontsize=6.5)
    return figure


def head_heatmaps(run: Run | RunTables, *, max_panels: int = style.MAX_PANELS) -> Figure:
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
        columns = min(len(panels), 6 if len(heads) <= 16 else 3)
        n_rows = math.ceil(len(panels) / columns)
        width = (DOUBLE_COLUMN_INCHES - 0.9) / columns
        figure = _canvas(DOUBLE_COLUMN_INCHES, 0.35 + n_rows * (0.35 + min(2.2, width * len(layers) / len(heads))))
        axes = _panel_grid(figure, len(panels), columns)
        norm = Normalize(0.0, max(high, RETRIEVAL_THRESHOLD))
        for axis, name, matrix, retrieves in zip(axes, panels, matrices, framed, strict=True):
            mesh = _heatmap(axis, matrix, _colormap(style.SCORES), norm)
            frame: Any = {"fill": False, "edgecolor": style.COLOURS["newborn"]}
            frame["linewidth"] = 0.8 if len(heads) <= 16 else 0.4
            for row, column in np.argwhere(retrieves == 1):
                axis.add_patch(Rectangle((column - 0.44, row - 0.44), 0.88, 0.88, **frame))
            axis.set_title(_panel_title(tables, name), fontsize=6.5)
            for set_ticks, values in ((axis.set_xticks, heads), (axis.set_yticks, layers)):
                shown = range(0, len(values), math.ceil(len(values) / 8))
                set_ticks(shown, [str(values[i]) for i in shown])
        figure.supxlabel("head", fontsize=7.5)
        axes[0].set_ylabel("layer")
        _colorbar(figure, mesh, axes, f"{tables.metric} score").ax.yaxis.set_major_locator(MaxNLocator(5))
    return figure


def retrieval_heads(run: Run | RunTables) -> Figure:
    """Number of retrieval heads and mean score of the initial ones against tokens (arXiv 2604.02650, Figure 5)."""
    tables = RunTables.of(run)
    counts = tables.census
    with mpl.rc_context(RC):
        figure = _canvas(SINGLE_COLUMN_INCHES, 3.4)
        upper, lower = figure.subplots(2, 1, sharex=True)
        scale = _token_axis([upper, lower], tables)
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
        figure.legend(*upper.get_legend_handles_labels(), ncols=3, loc="outside lower center", handlelength=1.2)
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


def depth_curves(run: Run | RunTables, *, max_panels: int = 5, max_checkpoints: int = 6) -> Figure:
    """Answer perplexity against needle depth, a panel per length, a line per checkpoint (Figure 7 of the paper)."""
    tables = RunTables.of(run)
    lengths = style.pick_evenly(tables.lengths, max_panels)
    names = style.select_panels(tables.checkpoints, tables.base, max_checkpoints)
    colours = style.spread_colours(style.VIRIDIS, len(names))
    drawn = tables.by_depth.filter(pl.col("length").is_in(lengths), pl.col("checkpoint").is_in(names))
    scale = style.PplScale.of(drawn["answer_ppl"], drawn["answer_ppl_low"], drawn["answer_ppl_high"])
    with mpl.rc_context(RC):
        figure = _canvas(DOUBLE_COLUMN_INCHES, 2.1)
        axes = list(figure.subplots(1, len(lengths), sharey=True, squeeze=False).flat)
        for axis, length in zip(axes, lengths, strict=True):
            for name, colour in zip(names, colours, strict=True):
                rows = drawn.filter(pl.col("length") == length, pl.col("checkpoint") == name).sort("depth_fraction")
                depth = rows["depth_fraction"].to_numpy() * 100
                middle, low, high = (scale.places(rows[f"answer_ppl{end}"]) for end in ("", "_low", "_high"))
                axis.plot(depth, middle, color=colour, marker="o", label=_short_name(tables, name))
                axis.fill_between(depth, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.set_title(f"{style.format_length(length)} tokens")
            axis.set_xlim(-5, 105)
            axis.set_xticks([0, 50, 100] if len(lengths) > 3 else [0, 25, 50, 75, 100])
        axes[0].set_ylim(*scale.limits)
        axes[0].set_ylabel("answer perplexity")
        _ppl_ticks(axes[0].yaxis, scale)
        figure.supxlabel("needle depth (%)", fontsize=7.5)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, title="checkpoint", loc="outside right center", title_fontsize=6.5)
    return figure


def head_lives(run: Run | RunTables) -> Figure:
    """Births and deaths: a ribbon per head whose thickness is its score, coloured where the head lives.

    The rule for births and deaths stands in `lccp_interp.dynamics.births`.
    """
    tables = RunTables.of(run)
    rows, _ = life_rows(tables)
    with mpl.rc_context(RC):
        figure = _canvas(DOUBLE_COLUMN_INCHES * 0.75, 1.1 + 0.21 * max(len(rows), 3))
        axis = figure.subplots()
        scale = _token_axis([axis], tables)
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
        figure.legend(handles=_life_legend(tables, rows), loc="outside lower center", ncols=3, handlelength=1.4)
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
