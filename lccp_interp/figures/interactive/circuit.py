"""Circuits on the screen: which earlier heads feed a head's query, key and value."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lccp_interp.figures import style
from lccp_interp.figures.circuit_panels import COLOURS, MAX_EDGES, NAMES, Line, bow, circuit_panels, said
from lccp_interp.figures.interactive.canvas import BOTTOM_LEGEND, layout
from lccp_interp.interventions.graph import HeadGraph

DASHES = {"q": "dash", "k": "solid", "v": "dot"}
LAYER_PX = 105
NODE_PX = 15
USUAL_WIDTH_PX = 800
"""Of all panels together, which says how far apart columns stand until the page decides."""

WIDEST_PX = 7.0


def circuit(graphs: HeadGraph | Sequence[HeadGraph], *, max_edges: int = MAX_EDGES) -> go.Figure:
    """Which earlier heads feed which, as in `paper.circuit`; weights and intervals under the pointer.

    Raises:
        LccpError: graphs of different metrics.
    """
    made = circuit_panels(graphs, max_edges)
    titles = [
        f"{html.escape(panel.graph.checkpoint)}<br><span style='font-size:11px'>{html.escape(panel.subtitle)}</span>"
        for panel in made.panels
    ]
    figure = make_subplots(1, len(made.panels), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.05)
    aspect = USUAL_WIDTH_PX / len(made.panels) / len(made.columns) / LAYER_PX
    for column, panel in enumerate(made.panels, start=1):
        place: dict[str, Any] = {"row": 1, "col": column}
        for line in panel.lines:
            figure.add_trace(_trace(line, aspect), **place)
        figure.add_trace(
            go.Scatter(
                x=[node.x for node in panel.nodes],
                y=[node.y for node in panel.nodes],
                text=[node.label for node in panel.nodes],
                mode="markers+text",
                marker={
                    "size": 2 * NODE_PX,
                    "color": [style.INK if node.is_target else "white" for node in panel.nodes],
                    "line": {"color": style.INK, "width": 1},
                },
                textfont={"color": ["white" if node.is_target else style.INK for node in panel.nodes], "size": 12},
                hoverinfo="skip",
                showlegend=False,
            ),
            **place,
        )
        if not panel.lines:
            figure.add_annotation(
                x=0.5, y=0.5, xref="x domain", yref="y domain", text="no clear edge", showarrow=False,
                font={"color": style.MUTED, "size": 12}, exclude_empty_subplots=False, **place,
            )  # fmt: skip
    for name in made.inputs:
        look: dict[str, Any] = {"color": COLOURS[name], "dash": DASHES[name], "width": 3}
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="lines", line=look, name=f"into its {NAMES[name]}"), row=1, col=1
        )
    bare: dict[str, Any] = {"showgrid": False, "zeroline": False, "fixedrange": True}
    figure.update_xaxes(
        title="head", tickvals=list(range(len(made.columns))), ticktext=[str(number) for number in made.columns],
        range=[-0.6, len(made.columns) - 0.4], **bare,
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(made.layers), range=[made.layers[0] - 0.4, made.layers[-1] + 0.4],
        **(bare | {"showgrid": True, "gridcolor": style.STAGE_SHADE, "gridwidth": 10}),
    )  # fmt: skip
    figure.update_yaxes(title="layer", col=1)
    height = 210 + LAYER_PX * max(len(made.layers) - 1, 1)
    return layout(figure, height=height, plot_bgcolor="white", **(BOTTOM_LEGEND | {"margin": {"t": 64, "b": 96}}))


def _trace(line: Line, aspect: float) -> go.Scatter:
    """A bowed line with a head at its end: an arrow where it helps, a bar where it hinders."""
    points = bow(line, shorten=(NODE_PX + 4) / LAYER_PX, aspect=aspect)
    colour, width = COLOURS[line.input], 1 + (WIDEST_PX - 1) * line.width
    return go.Scatter(
        x=points[:, 0],
        y=points[:, 1],
        mode="lines+markers",
        line={"color": colour, "width": width, "dash": DASHES[line.input]},
        marker={
            "symbol": "arrow" if line.helps else "line-ew",
            "angleref": "previous",
            "size": [0.0] * (len(points) - 1) + [9 + width],
            "color": colour,
            "line": {"color": colour, "width": 0 if line.helps else 2},
            "opacity": 1,
        },
        text=said(line),
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )
