"""Saturation on the screen: each metric with its fitted curve, 95 % point and verdict."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lccp_interp.dynamics.curves import HEAD_COUNT
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.interactive.canvas import BOTTOM_LEGEND, base_gap, layout, plain, value_axis
from lccp_interp.figures.saturation_panels import (
    VERDICT_COLOURS,
    SaturationPanel,
    SinceBaseAxis,
    saturation_panels,
)
from lccp_interp.store import Run

PANEL_HEIGHT_PX = 175
EMPTY_SHARE = 0.3
BAND, OPEN_BAND = "#d7ecdf", "#edf6f0"
CHOSEN: dict[str, Any] = {"width": 2}
LOG_LINE: dict[str, Any] = {"width": 1.3, "dash": "dash"}


def saturation_curves(run: Run | RunTables) -> go.Figure:
    """Metrics against tokens since the base, linear (left) and logarithmic (right), with what was fitted to them."""
    panels = saturation_panels(RunTables.of(run))
    # A metric without a value needs room for a sentence only.
    heights = [1.0 if panel.values.size else EMPTY_SHARE for panel in panels]
    height = 150 + PANEL_HEIGHT_PX * sum(heights)
    figure = make_subplots(
        len(panels), 2, shared_xaxes=True,
        shared_yaxes=True, horizontal_spacing=0.04, row_heights=heights,
        vertical_spacing=min(38 / (height - 144), 1 / max(len(panels) - 1, 1)),
    )  # fmt: skip
    tokens = np.concatenate([panel.tokens for panel in panels])
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
            _draw_panel(figure, panel, scale, {"row": row, "col": column})
            if panel.values.size:
                base_gap(figure, scale.gap, row=row, col=column)
    for row, panel in enumerate(panels, start=1):
        value_axis(figure, panel.label.replace("\n", "<br>") if panel.values.size else "", row)
        figure.update_yaxes(**_limits(panel), row=row)
        figure.update_yaxes(showgrid=False, zeroline=False, row=row, col=2)
        _verdict(figure, panel, row)
    _legend(figure, panels)
    return layout(figure, height=round(height), plot_bgcolor="white", **BOTTOM_LEGEND)


def _draw_panel(figure: go.Figure, panel: SaturationPanel, scale: SinceBaseAxis, place: dict[str, int]) -> None:
    if not panel.values.size:
        figure.add_trace(go.Scatter(x=[None], y=[None], showlegend=False), **place)
        return
    if panel.interval is not None:
        low, high = panel.interval
        figure.add_vrect(
            x0=scale.clip(low), x1=scale.clip(high), fillcolor=OPEN_BAND if math.isinf(high) else BAND, line_width=0,
            layer="below", exclude_empty_subplots=False, **place,
        )  # fmt: skip
    if math.isfinite(panel.point):
        line = {"color": style.COLOURS["initial_mean"], "width": 1.5}
        figure.add_vline(x=scale.clip(panel.point), line=line, exclude_empty_subplots=False, **place)
    inside = panel.drawn_tokens > 0 if scale.is_log else np.full(len(panel.drawn_tokens), True)
    x = scale.at(panel.drawn_tokens)[inside]
    for i, (model, y) in enumerate(panel.fits):
        look = {"color": style.metric_colour(panel.metric)} | (LOG_LINE if i else CHOSEN)
        figure.add_trace(
            go.Scatter(x=plain(x), y=plain(y[inside]), mode="lines", line=look, hoverinfo="skip", name=model,
                       showlegend=False),
            **place,
        )  # fmt: skip
    _points(figure, panel, scale, place)


def _points(figure: go.Figure, panel: SaturationPanel, scale: SinceBaseAxis, place: dict[str, int]) -> None:
    name = panel.label.replace("\n", " ")
    hover = [
        f"<b>{html.escape(checkpoint)}</b>, {style.format_tokens(tokens)} tokens since the base<br>"
        f"{name} {style.format_number(value)}<br>95 % interval {style.format_number(low)} to "
        f"{style.format_number(high)}"
        for checkpoint, tokens, value, low, high in zip(
            panel.checkpoints, panel.tokens, panel.values, panel.low, panel.high, strict=True
        )
    ]
    known = np.isfinite(panel.low)
    bars = {
        "type": "data", "symmetric": False, "thickness": 1, "width": 0, "color": style.INK,
        "array": np.where(known, panel.high - panel.values, 0.0).tolist(),
        "arrayminus": np.where(known, panel.values - panel.low, 0.0).tolist(),
    }  # fmt: skip
    fills = ["white" if tokens == 0 else style.INK for tokens in panel.tokens]
    figure.add_trace(
        go.Scatter(
            x=plain(scale.at(panel.tokens)), y=plain(panel.values), mode="markers", error_y=bars, showlegend=False,
            marker={"size": 6, "color": fills, "line": {"color": style.INK, "width": 1.2}}, text=hover,
            hoverinfo="text",
        ),
        **place,
    )  # fmt: skip


def _limits(panel: SaturationPanel) -> dict[str, Any]:
    """Limits from the points: a line that says nothing about the first tokens must not flatten them."""
    if not panel.values.size:
        return {"showticklabels": False, "ticks": "", "showgrid": False, "range": [0, 1]}
    ends = np.concatenate([panel.values, panel.low, panel.high])
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    margin = 0.08 * (high - low) or max(abs(high), 1.0) * 0.1
    whole = {"tickformat": "d"} if panel.metric == HEAD_COUNT else {}
    return {"range": [low - margin, high + margin]} | whole


def _verdict(figure: go.Figure, panel: SaturationPanel, row: int) -> None:
    """The verdict above the left panel of a row, the chosen shape above the right one."""
    number = 2 * row - 1
    axes = {"xref": f"x{number if number > 1 else ''} domain", "yref": f"y{number if number > 1 else ''} domain"}
    shared: dict[str, Any] = {"showarrow": False, "yanchor": "bottom", "y": 1.0}
    colour = VERDICT_COLOURS[panel.verdict]
    text = f"<b>{panel.verdict}</b>"
    if panel.values.size:
        text += f": {html.escape(panel.note)}"
    figure.add_annotation(x=0, xanchor="left", text=text, font={"size": 11, "color": colour}, **axes, **shared)
    if panel.fits:
        other = {"xref": f"x{number + 1} domain", "yref": f"y{number + 1} domain"}
        font = {"size": 11, "color": style.metric_colour(panel.metric)}
        figure.add_annotation(x=1, xanchor="right", text=panel.fits[0][0], font=font, **other, **shared)
    if not panel.values.size:
        what = panel.label.replace("\n", " ")
        said = f" {what}: n/a, {html.escape(panel.reason)}"
        font = {"size": 11, "color": style.MUTED}
        figure.add_annotation(x=0, y=0.4, xanchor="left", text=said, font=font, showarrow=False, **axes)


def _legend(figure: go.Figure, panels: list[SaturationPanel]) -> None:
    """Entries by themselves: each curve is drawn many times and named once."""
    marker = {"size": 7, "line": {"color": style.INK, "width": 1.2}}
    entries: list[dict[str, Any]] = [
        {"name": "measured, 95 % interval", "mode": "markers", "marker": marker | {"color": style.INK}},
        {"name": "base", "mode": "markers", "marker": marker | {"color": "white"}},
    ]
    if any(panel.fits for panel in panels):
        entries.append({"name": "chosen curve", "mode": "lines", "line": {"color": style.INK} | CHOSEN})
    if any(len(panel.fits) > 1 for panel in panels):
        entries.append({"name": "A log N + B", "mode": "lines", "line": {"color": style.INK} | LOG_LINE})
    if any(panel.interval for panel in panels):
        square = {"symbol": "square", "size": 11, "color": BAND, "line": {"color": "#009e73", "width": 1}}
        entries.append({"name": "95 % point, interval", "mode": "markers", "marker": square})
    for entry in entries:
        figure.add_trace(go.Scatter(x=[None], y=[None], hoverinfo="skip", **entry), row=1, col=1)
