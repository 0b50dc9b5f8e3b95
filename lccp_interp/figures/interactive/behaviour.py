"""Behaviour on the screen: results after fine-tuning, and the perplexity of whole documents."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.corpus_panels import CorpusLine, CorpusPanel, corpus_panels
from lccp_interp.figures.interactive.canvas import (
    BOTTOM_LEGEND,
    band,
    base_gap,
    layout,
    plain,
    say_why,
    stage_shade,
    subplot_axes,
    value_axis,
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

PROBE_PANEL_PX = 265
CORPUS_PANEL_PX = 250


def probe_scores(run: Run | RunTables, *, max_panels: int = MAX_PANELS) -> go.Figure:
    """Results after light fine-tuning against training tokens, a panel per benchmark (Figure 1 of the paper)."""
    tables = RunTables.of(run)
    panels = probe_panels(tables)[:max_panels]
    if not panels:
        return say_why("no probe results")
    n_columns = min(3, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    height = 130 + PROBE_PANEL_PX * n_rows
    figure = make_subplots(
        n_rows, n_columns, horizontal_spacing=0.07,
        vertical_spacing=85 / (height - 130) if n_rows > 1 else 0,
        subplot_titles=[
            f"{html.escape(panel.name)}<br><span style='font-size:11px'>{html.escape(panel.about)}</span>"
            for panel in panels
        ],
    )  # fmt: skip
    scale = probe_axis(tables, panels)
    shown: set[str] = set()
    for i, panel in enumerate(panels):
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        _draw_probe(figure, panel, scale, place, shown)
        stage_shade(figure, tables, scale, **place)
        value_axis(figure, "score" if place["col"] == 1 else "", place["row"], place["col"], range=panel.limits)
    figure.update_xaxes(
        range=scale.limits, tickvals=scale.tick_at, ticktext=scale.tick_text, showgrid=False,
        zeroline=False, showline=True, linecolor=style.INK, linewidth=1, ticks="outside", ticklen=4,
    )  # fmt: skip
    for column in range(1, n_columns + 1):
        lowest = max(i for i in range(len(panels)) if i % n_columns == column - 1) // n_columns + 1
        figure.update_xaxes(title={"text": "training tokens", "standoff": 8}, row=lowest, col=column)
    bottom = {**BOTTOM_LEGEND, "margin": {"l": 62, "r": 16, "t": 60, "b": 104}}
    return layout(figure, height=round(height), plot_bgcolor="white", **bottom)


def _draw_probe(
    figure: go.Figure, panel: ProbePanel, scale: style.TokenAxis, place: dict[str, int], shown: set[str]
) -> None:
    several = panel.mean is not None
    named = several and len(panel.lines) <= MAX_SUBSETS
    for line, colour in zip(panel.lines, style.kind_colours(len(panel.lines)), strict=True):
        look = {"color": colour, "width": 1.3 if several else 2}
        _draw_line(figure, panel, line, scale, place, look, band_too=not several, label=named, shown=shown)
    if panel.mean is not None:
        look = {"color": style.INK, "width": 2.4}
        _draw_line(figure, panel, panel.mean, scale, place, look, band_too=True, label=True, shown=shown)


def _draw_line(
    figure: go.Figure,
    panel: ProbePanel,
    line: ProbeLine,
    scale: style.TokenAxis,
    place: dict[str, int],
    look: dict[str, Any],
    *,
    band_too: bool,
    label: bool,
    shown: set[str],
) -> None:
    x = scale.at(list(line.tokens))
    if band_too:
        band(figure, x, line.low, line.high, look["color"], **place)
    what = html.escape(f"{panel.benchmark} {line.subset}".rstrip())
    hover = [
        f"<b>{html.escape(name)}</b>, {style.format_tokens(tokens)} tokens<br>{what}: {html.escape(line.metric)} "
        f"{style.format_number(score)}<br>95 % interval {style.format_number(low)} to {style.format_number(high)}"
        + (f"<br>n = {n}" if n else "")
        for name, tokens, score, low, high, n in zip(
            line.checkpoints, line.tokens, line.score, line.low, line.high, line.n, strict=True
        )
    ]
    name = html.escape(line.subset) if label else None
    # The same subset has one colour and one entry in the legend, panels of other subsets have their own.
    key = html.escape(f"{line.subset} {look['color']}")
    figure.add_trace(
        go.Scatter(
            x=x, y=plain(line.score), mode="lines+markers", text=hover, hoverinfo="text", line=look,
            marker={"size": 5}, name=name, legendgroup=key, showlegend=label and key not in shown,
        ),
        **place,
    )  # fmt: skip
    shown.add(key)


def corpus_ppl(run: Run | RunTables) -> go.Figure:
    """Corpus perplexity against tokens with PPL = A log N + B, linear and logarithmic (Figure 6 of the paper)."""
    panels = corpus_panels(RunTables.of(run))
    if not panels:
        return say_why("no corpus perplexity from the base checkpoint on")
    height = 140 + (CORPUS_PANEL_PX if len(panels) <= 2 else CORPUS_PANEL_PX * 0.75) * len(panels)
    figure = make_subplots(
        len(panels), 2, shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.04,
        vertical_spacing=min(0.5, 55 / (height - 140)) if len(panels) > 1 else 0,
    )  # fmt: skip
    tokens = np.concatenate([line.tokens for panel in panels for line in panel.lines])
    names = list(dict.fromkeys(line.corpus for panel in panels for line in panel.lines))
    colours = dict(zip(names, style.kind_colours(len(names)), strict=True))
    for column, is_log in enumerate((False, True), start=1):
        scale = SinceBaseAxis(tokens, is_log)
        at, text = scale.ticks
        figure.update_xaxes(
            range=scale.limits, tickvals=at, ticktext=text, tickangle=0, showgrid=False, zeroline=False,
            showline=True, linecolor=style.INK, linewidth=1, ticks="outside", ticklen=4, col=column,
        )  # fmt: skip
        title = f"tokens since the base{' (logarithmic)' if is_log else ''}"
        figure.update_xaxes(title={"text": title, "standoff": 8}, row=len(panels), col=column)
        for row, panel in enumerate(panels, start=1):
            place = {"row": row, "col": column}
            for line in panel.lines:
                _draw_corpus(figure, panel, line, scale, place, colours[line.corpus])
            base_gap(figure, scale.gap, **place)
    for row, panel in enumerate(panels, start=1):
        value_axis(figure, panel.label, row)
        figure.update_yaxes(range=panel.limits, row=row)
        figure.update_yaxes(showgrid=False, row=row, col=2)
        _formulas(figure, panel, row, colours)
    return layout(figure, height=round(height), plot_bgcolor="white", margin={"l": 62, "r": 16, "t": 40, "b": 60})


def _draw_corpus(
    figure: go.Figure,
    panel: CorpusPanel,
    line: CorpusLine,
    scale: SinceBaseAxis,
    place: dict[str, int],
    colour: str,
) -> None:
    if line.fitted.size:
        drawn = line.drawn_tokens > 0
        figure.add_trace(
            go.Scatter(
                x=plain(scale.at(line.drawn_tokens)[drawn]), y=plain(line.fitted[drawn]), mode="lines",
                line={"color": colour, "width": 1.5}, hoverinfo="skip", showlegend=False,
            ),
            **place,
        )  # fmt: skip
    known = np.isfinite(line.low)
    hover = [
        f"<b>{html.escape(name)}</b>, {style.format_tokens(tokens)} tokens since the base<br>"
        f"{html.escape(line.corpus)}: {panel.label} {style.format_number(value)}<br>95 % interval "
        f"{style.format_number(low)} to {style.format_number(high)}<br>n = {line.n} documents"
        for name, tokens, value, low, high in zip(
            line.checkpoints, line.tokens, line.values, line.low, line.high, strict=True
        )
    ]
    figure.add_trace(
        go.Scatter(
            x=plain(scale.at(line.tokens)), y=plain(line.values), mode="markers", name=html.escape(line.corpus),
            showlegend=False, text=hover, hoverinfo="text",
            marker={
                "size": 6, "line": {"color": colour, "width": 1.2},
                "color": ["white" if tokens == 0 else colour for tokens in line.tokens],
            },
            error_y={
                "type": "data", "symmetric": True, "thickness": 1, "width": 0, "color": colour,
                "array": np.where(known, line.high - line.values, 0.0).tolist(),
            },
        ),
        **place,
    )  # fmt: skip


def _formulas(figure: go.Figure, panel: CorpusPanel, row: int, colours: dict[str, str]) -> None:
    """The corpora and their fits above the left panel, each in its colour."""
    told = [
        f"<span style='color:{colours[line.corpus]}'><b>{html.escape(line.corpus)}</b> {line.formula}</span>"
        for line in panel.lines
    ]
    x, y = subplot_axes(2 * row - 2)
    figure.add_annotation(
        x=0, y=1.0, xref=f"{x} domain", yref=f"{y} domain", xanchor="left", yanchor="bottom", showarrow=False,
        text=" · ".join(told), font={"size": 11},
    )  # fmt: skip
