"""Behaviour on paper: results after fine-tuning, and the perplexity of whole documents."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.corpus_panels import CorpusLine, CorpusPanel, corpus_panels
from lccp_interp.figures.paper.canvas import (
    NORMAL_POINTS,
    RC,
    SMALL_POINTS,
    axis_inches,
    base_gap,
    canvas,
    key,
    n_across,
    page_width,
    roomy,
    say_why,
    token_ticks,
    wrapped,
)
from lccp_interp.figures.probe_panels import (
    MAX_PANELS,
    MAX_SUBSETS,
    ProbeLine,
    ProbePanel,
    probe_axis,
    probe_panels,
)
from lccp_interp.figures.saturation_panels import SinceBaseAxis
from lccp_interp.store import Run

COLUMNS = 3


def probe_scores(run: Run | RunTables, *, columns: int = 2, max_panels: int = MAX_PANELS) -> Figure:
    """Results after light fine-tuning against training tokens, a panel per benchmark (arXiv 2604.02650, Figure 1).

    A line per subset and their mean. Up to `max_panels` panels; which metric and length each shows stands in
    `lccp_interp.figures.probe_panels`.

    Example:
        >>> save(probe_scores(Run.open("runs/demo")), "figure1.pdf")   # doctest: +SKIP
    """
    tables = RunTables.of(run)
    panels = probe_panels(tables)[:max_panels]
    with mpl.rc_context(RC):
        n_columns = min(COLUMNS if columns == 2 else 1, max(len(panels), 1))
        n_rows = max(math.ceil(len(panels) / n_columns), 1)
        n_named = max((len(panel.lines) for panel in panels if len(panel.lines) <= MAX_SUBSETS), default=0)
        figure = canvas(columns, 0.4 + n_rows * (2.0 + 0.13 * math.ceil(n_named / 2)))
        grid = figure.subplots(n_rows, n_columns, squeeze=False)
        axes = list(grid.flat)
        for axis in axes[max(len(panels), 1) :]:
            axis.remove()
        if not panels:
            say_why(axes[0], "no probe results")
        scale = probe_axis(tables, panels)
        for axis, panel in zip(axes, panels, strict=False):
            token_ticks(axis, tables, scale)
            _draw_probe(axis, panel, scale)
        for row in range(n_rows):
            grid[row, 0].set_ylabel("score")
        figure.supxlabel(wrapped(scale.label, page_width(columns) - 0.3), fontsize=NORMAL_POINTS)
    return figure


def _draw_probe(axis: Axes, panel: ProbePanel, scale: style.TokenAxis) -> None:
    for line, colour in zip(panel.lines, style.kind_colours(len(panel.lines)), strict=True):
        named = 1 < len(panel.lines) <= MAX_SUBSETS
        look: dict[str, Any] = {"color": colour, "linewidth": 0.9, "label": line.subset if named else None}
        _draw_line(axis, line, scale, **look, markersize=2.2, band=len(panel.lines) == 1)
    inches = axis_inches(axis)
    if panel.mean is not None:
        label = "mean" if len(panel.lines) <= MAX_SUBSETS else f"mean of {len(panel.lines)} subsets"
        _draw_line(axis, panel.mean, scale, color=style.INK, linewidth=1.6, markersize=3, label=label, band=True)
        labels = axis.get_legend_handles_labels()[1]
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=n_across(labels, inches + 0.3, beside=0.27),
            handlelength=1.1, columnspacing=0.8, handletextpad=0.5,
        )  # fmt: skip
    about = wrapped(panel.about, inches, SMALL_POINTS)
    axis.set_title(f"{panel.name}\n{about}", fontsize=SMALL_POINTS, pad=3, linespacing=1.25)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.set_ylim(*panel.limits)


def _draw_line(axis: Axes, line: ProbeLine, scale: style.TokenAxis, *, band: bool, **look: Any) -> None:
    x = scale.at(list(line.tokens))
    axis.plot(x, line.score, marker="o", **look)
    if band:
        axis.fill_between(x, line.low, line.high, color=look["color"], alpha=0.15, linewidth=0)


def corpus_ppl(run: Run | RunTables, *, columns: int = 2) -> Figure:
    """Corpus perplexity against tokens with PPL = A log N + B, linear and logarithmic (arXiv 2604.02650, Figure 6).

    A line per corpus, all in one panel unless they are far apart; LongPPL, where the run has it, below.

    Example:
        >>> save(corpus_ppl(Run.open("runs/demo")), "figure6.pdf")   # doctest: +SKIP
    """
    panels = corpus_panels(RunTables.of(run))
    with mpl.rc_context(RC):
        below = 0.4 if columns == 2 else 1.0
        figure = canvas(columns, below + (1.75 if len(panels) <= 2 else 1.2) * max(len(panels), 1))
        if not panels:
            say_why(figure.subplots(), "no corpus perplexity from the base checkpoint on")
            return figure
        grid = figure.subplots(len(panels), 2, squeeze=False, sharex="col", sharey="row")
        tokens = np.concatenate([line.tokens for panel in panels for line in panel.lines])
        names = list(dict.fromkeys(line.corpus for panel in panels for line in panel.lines))
        colours = dict(zip(names, style.kind_colours(len(names)), strict=True))
        for column, is_log in enumerate((False, True)):
            scale = SinceBaseAxis(tokens, is_log)
            for panel, axis in zip(panels, grid[:, column], strict=True):
                axis.set_xticks(*roomy(*scale.ticks, axis_inches(axis), scale.limits))
                axis.set_xlim(*scale.limits)
                base_gap(axis, scale.gap)
                for line in panel.lines:
                    _draw_corpus(axis, line, scale, colours[line.corpus])
        for panel, axis in zip(panels, grid[:, 0], strict=True):
            axis.set_ylabel(panel.label)
            axis.yaxis.set_major_locator(MaxNLocator(4))
            axis.yaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_ylim(*panel.limits)
        figure.supxlabel("tokens since the base checkpoint (right: logarithmic)", fontsize=NORMAL_POINTS)
        _name_corpora(figure, dict(zip(grid[:, 1], panels, strict=True)), columns)
        figure.align_ylabels(grid[:, 0])
    return figure


def _name_corpora(figure: Figure, panels: dict[Axes, CorpusPanel], columns: int) -> None:
    """Corpora with their formulas: beside each panel, or above them all in a figure over one column."""
    if columns == 2:
        for axis in panels:
            axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=1.2, labelspacing=0.8)
        return
    handles, labels = [], []
    for axis, panel in panels.items():
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.append(handle)
            labels.append(f"{panel.label}, {label}".replace("\n", ": "))
    key(figure, handles, labels, above=True)


def _draw_corpus(axis: Axes, line: CorpusLine, scale: SinceBaseAxis, colour: str) -> None:
    x = scale.at(line.tokens)
    axis.vlines(x, line.low, line.high, color=colour, linewidth=0.7, alpha=0.6)
    label = f"{line.corpus}\n{line.formula}" if line.formula else line.corpus
    base = line.tokens == 0
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "color": colour, "markeredgewidth": 0.8}
    axis.plot(x[~base], line.values[~base], label=label, **dot)
    axis.plot(x[base], line.values[base], markerfacecolor="white", **dot)
    if line.fitted.size:
        drawn = line.drawn_tokens > 0
        axis.plot(scale.at(line.drawn_tokens)[drawn], line.fitted[drawn], color=colour, linewidth=1.0)
