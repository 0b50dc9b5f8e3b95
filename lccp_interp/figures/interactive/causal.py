"""The causal check for the screen: answers without the best heads and without random ones, over k and over training."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.causal_panels import CausalCheck, CausalPanel, causal_check_panels, causal_date_lines
from lccp_interp.figures.interactive.canvas import BOTTOM_LEGEND, band, layout, plain, token_axis, value_axis
from lccp_interp.store import Run


def causal_check(run: Run | RunTables, *, study: str | None = None, checkpoint: str | None = None) -> go.Figure:
    """Loss, exact answers and perplexity without the k best heads, beside as many random heads of the same layers.

    Arguments and errors as in `lccp_interp.figures.paper.causal_check`.
    """
    made = causal_check_panels(RunTables.of(run), study, checkpoint)
    figure = make_subplots(1, 3, horizontal_spacing=0.09)
    for column, panel in enumerate(made.panels, start=1):
        _draw_check(figure, panel, made, column)
        exact = panel.outcome == "greedy_exact"
        options: dict[str, Any] = {"range": [-4, 104]} if exact else {"rangemode": "tozero"}
        if panel.outcome == "answer_ppl":
            ends = np.concatenate([panel.best, panel.best_high, panel.random_high])
            ticks = style.log_ppl_ticks(1.15 * style.defined_range([ends], (1.0, 10.0))[1])
            options = {"type": "log", "tickvals": ticks, "ticktext": [style.format_ppl_tick(tick) for tick in ticks]}
        value_axis(figure, panel.label, 1, column, **options)
    figure.update_xaxes(
        tickvals=made.places.tolist(), ticktext=[html.escape(text) for text in made.texts], showgrid=False,
        zeroline=False, showline=True, linecolor=style.INK, ticks="outside", ticklen=4, tickangle=0,
        title={"text": "head removed (layer-head)" if made.is_single else "heads removed, k", "standoff": 8},
    )  # fmt: skip
    return layout(figure, height=380, plot_bgcolor="white", **BOTTOM_LEGEND)


def _draw_check(figure: go.Figure, panel: CausalPanel, made: CausalCheck, column: int) -> None:
    place = {"row": 1, "col": column}
    unit = " %" if panel.outcome == "greedy_exact" else ""
    parts = (
        ("random heads", panel.random, panel.random_low, panel.random_high, style.MUTED, "dash"),
        ("best heads", panel.best, panel.best_low, panel.best_high, style.metric_colour(panel.outcome), "solid"),
    )
    for name, middle, low, high, colour, dash in parts:
        hover = [
            f"<b>without {html.escape(heads) if name == 'best heads' else f'{len(heads.split())} random heads'}</b>"
            f"<br>{panel.label.split(' (')[0]} {style.format_number(value)}{unit}"
            f"<br>95 % interval {style.format_number(at)} to {style.format_number(to)}<br>n = {made.n}"
            if heads
            else f"<b>with all heads</b><br>{panel.label.split(' (')[0]} {style.format_number(value)}{unit}"
            for heads, value, at, to in zip(made.heads, middle, low, high, strict=True)
        ]
        spread: dict[str, Any] = {}
        if made.is_single:
            up, down = plain(high - middle), plain(middle - low)
            spread = {"error_y": {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "width": 0}}
        else:
            band(figure, made.places.tolist(), low, high, colour, group=name, **place)
        figure.add_trace(
            go.Scatter(
                x=made.places.tolist(), y=plain(middle), mode="markers" if made.is_single else "lines+markers",
                name=f"without {name}", legendgroup=name, showlegend=column == 1, text=hover, hoverinfo="text",
                line={"color": colour, "width": 2, "dash": dash}, marker={"size": 6, "color": colour}, **spread,
            ),
            **place,
        )  # fmt: skip


def causal_dates(run: Run | RunTables, *, study: str | None = None) -> go.Figure:
    """How much more is lost without the best heads than without random ones, over training tokens.

    Diamonds mark from when on a set is important. Arguments and errors as in `lccp_interp.figures.paper.causal_dates`.
    """
    tables = RunTables.of(run)
    made = causal_date_lines(tables, study)
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    scale = token_axis(figure, tables, rows=2)
    for row, (outcome, label, lines, little) in enumerate(made.panels, start=1):
        place = {"row": row, "col": 1}
        unit = " % points" if outcome == "greedy_exact" else " nats"
        figure.add_hline(y=little, line={"color": style.MUTED, "width": 1, "dash": "dot"}, **place)
        for line in lines:
            x, name = scale.at(line.tokens), html.escape(line.name)
            hover = [
                f"<b>{html.escape(at)}</b>, {style.format_tokens(tokens)} tokens<br>without {html.escape(heads)}: "
                f"{style.format_number(value)}{unit} more than without random heads"
                f"<br>95 % interval {style.format_number(low)} to {style.format_number(high)}"
                f"{'<br><b>important from here on</b>' if i == line.since else ''}"
                for i, (at, tokens, heads, value, low, high) in enumerate(
                    zip(line.checkpoints, line.tokens, line.heads, line.beyond, line.low, line.high, strict=True)
                )
            ]
            band(figure, x, line.low, line.high, line.colour, group=name, **place)
            symbols = ["diamond" if i == line.since else "circle" for i in range(len(x))]
            if line.provisional and line.since is not None:
                symbols[line.since] = "diamond-open"
            figure.add_trace(
                go.Scatter(
                    x=x, y=plain(line.beyond), mode="lines+markers", name=name, legendgroup=name, showlegend=row == 1,
                    text=hover, hoverinfo="text", line={"color": line.colour, "width": 2},
                    marker={"symbol": symbols, "size": [12 if i == line.since else 5 for i in range(len(x))]},
                ),
                **place,
            )  # fmt: skip
        value_axis(figure, label.replace("\n", "<br>"), row)
    title = "head removed " if made.is_single else "heads removed, k "
    return layout(figure, height=560, plot_bgcolor="white", legend_title_text=title, **BOTTOM_LEGEND)
