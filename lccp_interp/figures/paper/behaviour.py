"""Behaviour on paper: results after fine-tuning, and the perplexity of whole documents."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.corpus_panels import CorpusLine, corpus_panels
from lccp_interp.figures.paper.canvas import (
    DOUBLE_COLUMN_INCHES,
    RC,
    SINGLE_COLUMN_INCHES,
    base_gap,
    canvas,
    say_why,
    token_ticks,
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


def probe_scores(run: Run | RunTables, *, max_panels: int = MAX_PANELS) -> Figure:
    """Results after light fine-tuning against training tokens, a panel per benchmark (arXiv 2604.02650, Figure 1).

    A line per subset and their mean. Up to `max_panels` panels; which metric and length each shows stands in
    `lccp_interp.figures.probe_panels`.

    Example:
        >>> save(probe_scores(Run.open("runs/demo")), "figure1.pdf")   # doctest: +SKIP
    """
    tables = RunTables.of(run)
    panels = probe_panels(tables)[:max_panels]
    with mpl.rc_context(RC):
        n_columns = min(COLUMNS, max(len(panels), 1))
        n_rows = max(math.ceil(len(panels) / n_columns), 1)
        width = {1: SINGLE_COLUMN_INCHES, 2: 0.75 * DOUBLE_COLUMN_INCHES}.get(n_columns, DOUBLE_COLUMN_INCHES)
        figure = canvas(width, 0.35 + 1.95 * n_rows)
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
        figure.supxlabel(scale.label, fontsize=7.5)
    return figure


def _draw_probe(axis: Axes, panel: ProbePanel, scale: style.TokenAxis) -> None:
    for line, colour in zip(panel.lines, style.kind_colours(len(panel.lines)), strict=True):
        named = 1 < len(panel.lines) <= MAX_SUBSETS
        look: dict[str, Any] = {"color": colour, "linewidth": 0.9, "label": line.subset if named else None}
        _draw_line(axis, line, scale, **look, markersize=2.2, band=len(panel.lines) == 1)
    if panel.mean is not None:
        label = "mean" if len(panel.lines) <= MAX_SUBSETS else f"mean of {len(panel.lines)} subsets"
        _draw_line(axis, panel.mean, scale, color=style.INK, linewidth=1.6, markersize=3, label=label, band=True)
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handlelength=1.3, columnspacing=0.9, fontsize=6
        )
    axis.set_title(f"{panel.name}\n", fontsize=7.5, pad=3)
    axis.text(0.5, 1.025, panel.about, transform=axis.transAxes, ha="center", fontsize=6, color=style.MUTED)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.set_ylim(*panel.limits)


def _draw_line(axis: Axes, line: ProbeLine, scale: style.TokenAxis, *, band: bool, **look: Any) -> None:
    x = scale.at(list(line.tokens))
    axis.plot(x, line.score, marker="o", **look)
    if band:
        axis.fill_between(x, line.low, line.high, color=look["color"], alpha=0.15, linewidth=0)


def corpus_ppl(run: Run | RunTables) -> Figure:
    """Corpus perplexity against tokens with PPL = A log N + B, linear and logarithmic (arXiv 2604.02650, Figure 6).

    A line per corpus, all in one panel unless they are far apart; LongPPL, where the run has it, below.

    Example:
        >>> save(corpus_ppl(Run.open("runs/demo")), "figure6.pdf")   # doctest: +SKIP
    """
    panels = corpus_panels(RunTables.of(run))
    with mpl.rc_context(RC):
        figure = canvas(DOUBLE_COLUMN_INCHES, 0.4 + (1.75 if len(panels) <= 2 else 1.2) * max(len(panels), 1))
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
                axis.set_xticks(*scale.ticks)
                axis.set_xlim(*scale.limits)
                base_gap(axis, scale.gap)
                for line in panel.lines:
                    _draw_corpus(axis, line, scale, colours[line.corpus])
            grid[-1, column].set_xlabel(f"tokens since the base checkpoint{' (logarithmic)' if is_log else ''}")
        for panel, axis in zip(panels, grid[:, 0], strict=True):
            axis.set_ylabel(panel.label)
            axis.yaxis.set_major_locator(MaxNLocator(4))
            axis.set_ylim(*panel.limits)
        for axis in grid[:, 1]:
            axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=1.2, labelspacing=0.8)
        figure.align_ylabels(grid[:, 0])
    return figure


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
