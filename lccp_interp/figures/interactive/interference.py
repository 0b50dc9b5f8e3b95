"""Interference on the screen: answer perplexity over what lies behind the needle and what lies before it."""

from __future__ import annotations

import html

import plotly.graph_objects as go

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.interactive.canvas import (
    BOTTOM_LEGEND,
    Marks,
    band,
    layout,
    panel_grid,
    panel_titles,
    plain,
    ppl_axis,
    ppl_colours,
    value_axis,
)
from lccp_interp.figures.interference_panels import InterferenceAxis, distance_rows, interference_of
from lccp_interp.store import Run


def interference_heatmaps(run: Run | RunTables, *, max_panels: int = style.MAX_PANELS) -> go.Figure:
    """Answer perplexity over absolute distance and interference length, a panel per checkpoint (Figure 8)."""
    own = interference_of(run)
    names = style.select_panels(own.checkpoints, own.base, max_panels)
    distances, lengths = (sorted(own.cells[column].unique()) for column in ("distance", "interference"))
    rows_text, columns_text = ([style.format_length(value) for value in values] for values in (distances, lengths))
    figure, n_rows, n_columns = panel_grid(panel_titles(own, names), panel_height=max(190, 90 + 26 * len(distances)))
    marks = Marks()
    scale = style.PplScale.of(own.cells.filter(own.cells["checkpoint"].is_in(names))["answer_ppl"])
    for i, name in enumerate(names):
        rows = own.cells.filter(checkpoint=name)
        ppl, low, high, n = (
            style.cell_matrix(rows, distances, lengths, "distance", "interference", value)
            for value in ("answer_ppl", "answer_ppl_low", "answer_ppl_high", "n")
        )
        hover = [
            [
                f"<b>{html.escape(name)}</b><br>{rows_text[r]} tokens after the needle, {columns_text[c]} before it<br>"
                f"answer perplexity {style.format_number(ppl[r, c])} [{style.format_number(low[r, c])}, "
                f"{style.format_number(high[r, c])}]<br>n = {n[r, c]:.0f}"
                for c in range(len(lengths))
            ]
            for r in range(len(distances))
        ]
        figure.add_trace(
            go.Heatmap(
                z=[plain(row) for row in scale.places(ppl)], text=hover, hoverinfo="text", coloraxis="coloraxis",
                xgap=1, ygap=1,
            ),
            row=i // n_columns + 1, col=i % n_columns + 1,
        )  # fmt: skip
        marks.undefined(ppl, i)
    figure.update_xaxes(
        tickvals=list(range(len(lengths))), ticktext=columns_text, showgrid=False, zeroline=False,
        tickangle=-90 if len(lengths) > 8 else 0,
    )  # fmt: skip
    figure.update_yaxes(tickvals=list(range(len(distances))), ticktext=rows_text, showgrid=False, zeroline=False)
    for row in range(1, n_rows + 1):
        figure.update_yaxes(title_text="tokens after the needle", row=row, col=1)
    for column in range(1, n_columns + 1):
        figure.update_xaxes(title_text="tokens before the needle", row=n_rows, col=column)
    marks.put(figure)
    return layout(figure, plot_bgcolor="white", coloraxis=ppl_colours(scale))


def interference_curves(
    run: Run | RunTables, *, distance: int | None = None, max_checkpoints: int = style.MAX_PANELS
) -> go.Figure:
    """Answer perplexity against interference length at one distance (None: the largest), a line per checkpoint."""
    own = interference_of(run)
    at_distance, chosen = distance_rows(own, distance)
    names = style.select_panels(own.checkpoints, own.base, max_checkpoints)
    drawn = at_distance.filter(at_distance["checkpoint"].is_in(names))
    scale = style.PplScale.of(drawn["answer_ppl"], drawn["answer_ppl_low"], drawn["answer_ppl_high"])
    across = InterferenceAxis.of(drawn["interference"])
    figure = go.Figure()
    whole = RunTables.of(run).run
    for name, colour in zip(names, style.checkpoint_colours(whole, names), strict=True):
        rows = drawn.filter(checkpoint=name).sort("interference")
        x = across.at(rows["interference"]).tolist()
        middle, low, high = (scale.places(rows[f"answer_ppl{end}"]) for end in ("", "_low", "_high"))
        shown = html.escape(name)
        band(figure, x, low, high, colour, group=shown)
        hover = [
            f"<b>{shown}</b><br>{row['interference']:,} tokens before the needle, {chosen:,} after it<br>"
            f"answer perplexity {style.format_number(row['answer_ppl'])} "
            f"[{style.format_number(row['answer_ppl_low'])}, {style.format_number(row['answer_ppl_high'])}]"
            f"<br>n = {row['n']}"
            for row in rows.iter_rows(named=True)
        ]
        base = " (base)" if name == own.base else ""
        figure.add_trace(
            go.Scatter(
                x=x, y=plain(middle), mode="lines+markers", name=shown + base, legendgroup=shown, text=hover,
                hoverinfo="text", line={"color": colour, "width": 2}, marker={"size": 6},
            )
        )  # fmt: skip
    at, text = across.ticks
    figure.update_xaxes(
        range=across.limits, tickvals=at, ticktext=text, tickangle=0, showgrid=False, zeroline=False, showline=True,
        linecolor=style.INK, linewidth=1, ticks="outside", ticklen=4,
        title={"text": f"tokens before the needle{across.suffix}", "standoff": 8},
    )  # fmt: skip
    value_axis(figure, "answer perplexity", None, None, **ppl_axis(scale))
    figure.add_annotation(
        x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom", showarrow=False, font={"size": 12},
        text=f"{style.format_length(chosen)} tokens after the needle",
    )  # fmt: skip
    # Six names take three rows of a narrow page.
    bottom = {**BOTTOM_LEGEND, "margin": {"l": 62, "r": 16, "t": 40, "b": 124}}
    return layout(figure, height=430, plot_bgcolor="white", **bottom)
