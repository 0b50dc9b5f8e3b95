"""The figures of `paper` for the screen: plotly, with values under the pointer.

Same names, same tables, same colours as `lccp_interp.figures.paper`; each function takes a `Run` or its `RunTables`
and returns a plotly `Figure`. Text that comes from a run (names of checkpoints, stages, metrics) is escaped, as plotly
reads a subset of HTML in labels. Cost: milliseconds beside the tables.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.life_rows import RIBBON_HALF_HEIGHT, LifeRow, life_kind_labels, life_rows
from lccp_interp.schema import RETRIEVAL_THRESHOLD
from lccp_interp.store import Run

Values = pl.Series | NDArray[np.float64]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
GRID = "#ececec"
MAX_NAMED_CELLS = 150
PANEL_GAP_PX = 75
BOTTOM_LEGEND: dict[str, Any] = {
    "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
    "margin": {"l": 62, "r": 16, "t": 40, "b": 104},
}


def _layout(figure: go.Figure, **options: Any) -> go.Figure:
    defaults = {"margin": {"l": 62, "r": 16, "t": 48, "b": 52}, "legend": {"font": {"size": 11}}}
    figure.update_layout(
        template="none",
        font={"family": FONT, "size": 12, "color": style.INK},
        paper_bgcolor="white",
        hoverlabel={"font": {"family": FONT, "size": 12}, "bgcolor": "white"},
        **(defaults | options),
    )
    # Titles of panels come from make_subplots with size 16; other annotations have sizes of their own.
    figure.for_each_annotation(lambda note: note.update(font={"size": 12}) if note.font.size == 16 else None)
    return figure


def _band(figure: go.Figure, x: Sequence[float], low: Values, high: Values, colour: str, **place: Any) -> None:
    """A translucent band; gaps where it is undefined."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    shared = {"x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    group = {"legendgroup": place.pop("group", None)}
    figure.add_trace(go.Scatter(y=_plain(low), **shared, **group), **place)
    figure.add_trace(
        go.Scatter(y=_plain(high), fill="tonexty", fillcolor=f"rgba({red},{green},{blue},0.15)", **shared, **group),
        **place,
    )


def _plain(values: Values) -> list[float | None]:
    """Numbers for JSON, undefined ones as None (plotly draws a gap)."""
    return [None if value is None or not math.isfinite(value) else float(value) for value in values]


def _panel_titles(tables: RunTables, names: Sequence[str]) -> list[str]:
    tokens = dict(tables.checkpoints.select("checkpoint", "tokens_seen").iter_rows())
    shown = style.short_names(tables.checkpoints["checkpoint"].to_list(), 22)
    titles = []
    for name in names:
        base = ", base" if name == tables.base else ""
        place = style.place_in_training(tables.checkpoints, tables.base, tokens[name])
        titles.append(f"{html.escape(shown[name])}<br><span style='font-size:11px'>{place}{base}</span>")
    return titles


def _colourscale(colours: Sequence[str]) -> list[list[float | str]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def _token_axis(figure: go.Figure, tables: RunTables, rows: int = 1) -> style.TokenAxis:
    """Token ticks and the shaded last stage on `rows` stacked axes."""
    scale = style.TokenAxis.of(tables.checkpoints, tables.base)
    figure.update_xaxes(
        range=scale.limits, tickvals=scale.tick_at, ticktext=scale.tick_text, tickangle=0,
        showgrid=False, zeroline=False,
        showline=True, linecolor=style.INK, linewidth=1, ticks="outside", ticklen=4,
    )  # fmt: skip
    figure.update_xaxes(title={"text": scale.label, "standoff": 8}, row=rows, col=1)
    stage = style.last_stage(tables.checkpoints, tables.base)
    if stage is not None:
        name, start, _ = stage
        left = scale.at([start])[0]
        for row in range(1, rows + 1):
            figure.add_vrect(
                x0=left,
                x1=scale.limits[1],
                fillcolor=style.STAGE_SHADE,
                line_width=0,
                layer="below",
                row=row,
                col=1,
                exclude_empty_subplots=False,
            )
            figure.add_vline(
                x=left,
                line={"color": style.MUTED, "width": 1, "dash": "dash"},
                row=row,
                col=1,
                exclude_empty_subplots=False,
            )
        figure.add_annotation(
            x=left, y=1, yref="y domain", yanchor="bottom", xanchor="left", showarrow=False,
            text=f"{html.escape(style.stage_name(name))} →", font={"size": 11, "color": style.MUTED}, row=1, col=1,
        )  # fmt: skip
    return scale


def _value_axis(figure: go.Figure, title: str, row: int, column: int = 1, **options: Any) -> None:
    figure.update_yaxes(
        title={"text": title, "standoff": 6}, row=row, col=column, gridcolor=GRID, zeroline=False, showline=True,
        linecolor=style.INK, linewidth=1, ticks="outside", ticklen=4, automargin=True, **options,
    )  # fmt: skip


def _ppl_axis(scale: style.PplScale) -> dict[str, Any]:
    at, text = scale.ticks
    return {"range": scale.limits, "tickvals": at, "ticktext": text}


def _checkpoint_hover(tables: RunTables, rows: pl.DataFrame) -> list[str]:
    return [
        f"<b>{html.escape(name)}</b>, {style.format_tokens(tokens)} tokens"
        for name, tokens in rows.select("checkpoint", "tokens_seen").iter_rows()
    ]


def _subplot_axes(i: int) -> tuple[str, str]:
    """Names of the i-th subplot's axes, as annotations and shapes want them."""
    number = "" if i == 0 else str(i + 1)
    return f"x{number}", f"y{number}"


def _panels(titles: Sequence[str], *, panel_height: int) -> tuple[go.Figure, int, int]:
    """Subplots in rows of three, as many rows as it takes; returns the figure and its numbers of rows and columns."""
    n_columns = min(3, len(titles))
    n_rows = math.ceil(len(titles) / n_columns)
    figure = make_subplots(
        n_rows,
        n_columns,
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=PANEL_GAP_PX / (n_rows * panel_height) if n_rows > 1 else 0,
    )
    figure.update_layout(height=100 + n_rows * panel_height)
    return figure, n_rows, n_columns


class _Marks:
    """Rectangles and notes on cells of subplots, put on the figure at once: one by one plotly takes quadratic time."""

    def __init__(self) -> None:
        self.shapes: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []

    def cell(self, i: int, row: int, column: int, **look: Any) -> None:
        """A rectangle around one cell of the i-th subplot."""
        x, y = _subplot_axes(i)
        edges = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5, "xref": x, "yref": y}
        self.shapes.append({"type": "rect", **edges, **look})

    def undefined(self, matrix: NDArray[np.float64], i: int) -> None:
        """Undefined cells are grey and say so."""
        x, y = _subplot_axes(i)
        note = {"xref": x, "yref": y, "text": "n/a", "showarrow": False, "font": {"size": 9, "color": style.MUTED}}
        for row, column in np.argwhere(~np.isfinite(matrix)).tolist():
            self.cell(i, row, column, fillcolor=style.UNDEFINED, line={"color": "white", "width": 1}, layer="below")
            if matrix.size <= MAX_NAMED_CELLS:
                self.notes.append({"x": column, "y": row, **note})

    def put(self, figure: go.Figure) -> None:
        """Add everything to `figure`."""
        figure.update_layout(
            shapes=[*figure.layout.shapes, *self.shapes], annotations=[*figure.layout.annotations, *self.notes]
        )


def ppl_heatmaps(run: Run | RunTables, *, max_panels: int = style.MAX_PANELS) -> go.Figure:
    """Answer perplexity over context length and needle depth, a panel per checkpoint (arXiv 2604.02650, Figure 2)."""
    tables = RunTables.of(run)
    panels = style.select_panels(tables.checkpoints, tables.base, max_panels)
    depths = sorted(tables.by_depth["depth_fraction"].unique())
    lengths = [style.format_length(length) for length in tables.lengths]
    depth_names = [f"{100 * depth:.0f}" for depth in depths]
    figure, n_rows, n_columns = _panels(_panel_titles(tables, panels), panel_height=230)
    marks = _Marks()
    scale = style.PplScale.of(tables.by_depth.filter(pl.col("checkpoint").is_in(panels))["answer_ppl"])
    for i, name in enumerate(panels):
        rows = tables.by_depth.filter(pl.col("checkpoint") == name)
        ppl = style.cell_matrix(rows, depths, tables.lengths, "depth_fraction", "length", "answer_ppl")
        score = style.cell_matrix(rows, depths, tables.lengths, "depth_fraction", "length", "niah_score")
        n = style.cell_matrix(rows, depths, tables.lengths, "depth_fraction", "length", "n")
        hover = [
            [
                f"<b>{html.escape(name)}</b><br>{lengths[c]} tokens, depth {depth_names[r]} %<br>"
                f"answer perplexity {style.format_number(ppl[r, c])}<br>NIAH score {style.format_number(score[r, c])} %"
                f"<br>n = {n[r, c]:.0f}"
                for c in range(len(lengths))
            ]
            for r in range(len(depths))
        ]
        figure.add_trace(
            go.Heatmap(
                z=[_plain(row) for row in scale.places(ppl)], text=hover, hoverinfo="text", coloraxis="coloraxis",
                xgap=1, ygap=1, hoverongaps=True,
            ),
            row=i // n_columns + 1, col=i % n_columns + 1,
        )  # fmt: skip
        marks.undefined(ppl, i)
    at, text = scale.ticks
    figure.update_xaxes(tickvals=list(range(len(lengths))), ticktext=lengths, showgrid=False, zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(depths))), ticktext=depth_names, autorange="reversed", showgrid=False, zeroline=False
    )
    for row in range(1, n_rows + 1):
        figure.update_yaxes(title_text="needle depth (%)", row=row, col=1)
    for column in range(1, n_columns + 1):
        figure.update_xaxes(title_text="length (tokens)", row=n_rows, col=column)
    marks.put(figure)
    return _layout(
        figure,
        plot_bgcolor="white",
        coloraxis={
            "colorscale": _colourscale(style.PERPLEXITY),
            "cmin": scale.low,
            "cmax": scale.high,
            "colorbar": {
                "title": {"text": "answer<br>perplexity", "font": {"size": 11}},
                "tickvals": at,
                "ticktext": text,
                "thickness": 12,
                "outlinewidth": 0,
            },
        },
    )


def niah_trajectory(run: Run | RunTables) -> go.Figure:
    """NIAH score and answer perplexity against training tokens, a line per length (arXiv 2604.02650, Figure 3)."""
    tables = RunTables.of(run)
    lengths = tables.lengths
    colours = style.spread_colours(style.PLASMA, len(lengths))
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    scale = _token_axis(figure, tables, rows=2)
    ppl = style.PplScale.of(*(tables.by_length[f"answer_ppl{end}"] for end in ("", "_low", "_high")))
    for length, colour in zip(lengths, colours, strict=True):
        rows = tables.by_length.filter(pl.col("length") == length)
        x, label = scale.at(rows["tokens_seen"]), style.format_length(length)
        for row, name, what in ((1, "niah_score", "NIAH score"), (2, "answer_ppl", "answer perplexity")):
            unit = " %" if row == 1 else ""
            hover = [
                f"{where}<br>{label} tokens: {what} {style.format_number(value)}{unit}"
                f"<br>95 % interval {style.format_number(low)} to {style.format_number(high)}<br>n = {n}"
                for where, value, low, high, n in zip(
                    _checkpoint_hover(tables, rows), rows[name], rows[f"{name}_low"], rows[f"{name}_high"], rows["n"],
                    strict=True,
                )
            ]  # fmt: skip
            middle, low, high = (
                rows[f"{name}{end}"].to_numpy() if row == 1 else ppl.places(rows[f"{name}{end}"])
                for end in ("", "_low", "_high")
            )
            _band(figure, x, low, high, colour, row=row, col=1, group=label)
            figure.add_trace(
                go.Scatter(
                    x=x, y=_plain(middle), mode="lines+markers", name=label, legendgroup=label, showlegend=row == 1,
                    line={"color": colour, "width": 2}, marker={"size": 5}, text=hover, hoverinfo="text",
                ),
                row=row, col=1,
            )  # fmt: skip
    _value_axis(figure, "NIAH score (%)", 1, range=[-4, 104])
    _value_axis(figure, "answer perplexity", 2, **_ppl_axis(ppl))
    return _layout(figure, height=550, legend_title_text="context length ", plot_bgcolor="white", **BOTTOM_LEGEND)


def head_heatmaps(run: Run | RunTables, *, max_panels: int = style.MAX_PANELS) -> go.Figure:
    """Scores of all heads, a panel per checkpoint, retrieval heads framed (arXiv 2604.02650, Figure 4)."""
    tables = RunTables.of(run)
    panels = style.select_panels(tables.scored, tables.base, max_panels)
    layers, heads = sorted(tables.scores["layer"].unique()), sorted(tables.scores["head"].unique())
    panel_height = max(200, min(420, 26 * len(layers) + 90))
    figure, n_rows, n_columns = _panels(_panel_titles(tables, panels), panel_height=panel_height)
    marks = _Marks()
    highest = RETRIEVAL_THRESHOLD
    for i, name in enumerate(panels):
        rows = tables.scores.filter(pl.col("checkpoint") == name)
        matrix, low, high, n, retrieves = (
            style.cell_matrix(rows, layers, heads, "layer", "head", column)
            for column in ("score", "ci_low", "ci_high", "n", "retrieves")
        )
        highest = max(highest, style.defined_range([matrix], (0.0, 0.0))[1])
        hover = [
            [
                f"<b>{html.escape(name)}</b><br>head {style.head_name(layer, head)} (layer-head)<br>"
                f"{html.escape(tables.metric)} {style.format_number(matrix[r, c])} "
                f"[{style.format_number(low[r, c])}, {style.format_number(high[r, c])}]<br>n = {n[r, c]:.0f}"
                for c, head in enumerate(heads)
            ]
            for r, layer in enumerate(layers)
        ]
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        figure.add_trace(
            go.Heatmap(
                z=[_plain(row) for row in matrix], text=hover, hoverinfo="text", coloraxis="coloraxis", xgap=1, ygap=1
            ),
            **place,
        )
        frame = {"color": style.COLOURS["newborn"], "width": 2 if len(heads) <= 16 else 1}
        for row, column in np.argwhere(retrieves == 1).tolist():
            marks.cell(i, row, column, line=frame)
        marks.undefined(matrix, i)
    for update, values in ((figure.update_xaxes, heads), (figure.update_yaxes, layers)):
        shown = list(range(0, len(values), math.ceil(len(values) / 12)))
        update(tickvals=shown, ticktext=[str(values[j]) for j in shown], showgrid=False, zeroline=False)
    figure.update_xaxes(range=[-0.5, len(heads) - 0.5])
    figure.update_yaxes(range=[len(layers) - 0.5, -0.5])
    for row in range(1, n_rows + 1):
        figure.update_yaxes(title_text="layer", row=row, col=1)
    for column in range(1, n_columns + 1):
        figure.update_xaxes(title_text="head", row=n_rows, col=column)
    bar = {
        "title": {"text": f"{html.escape(tables.metric)}<br>score", "font": {"size": 11}},
        "thickness": 12,
        "outlinewidth": 0,
    }
    marks.put(figure)
    return _layout(
        figure,
        plot_bgcolor="white",
        coloraxis={"colorscale": _colourscale(style.SCORES), "cmin": 0, "cmax": highest, "colorbar": bar},
    )


def retrieval_heads(run: Run | RunTables) -> go.Figure:
    """Number of retrieval heads and mean score of the initial ones against tokens (arXiv 2604.02650, Figure 5)."""
    tables = RunTables.of(run)
    counts = tables.census
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    scale = _token_axis(figure, tables, rows=2)
    x, where = scale.at(counts["tokens_seen"]), _checkpoint_hover(tables, counts)
    for column, label, kind in (("n_from_base", "initial heads", "from_base"), ("n_newborn", "others", "newborn")):
        hover = [f"{at}<br>{value} {label}" for at, value in zip(where, counts[column], strict=True)]
        figure.add_trace(
            go.Scatter(
                x=x, y=counts[column].to_list(), stackgroup="heads", name=label, mode="lines",
                text=hover, hoverinfo="text",
                line={"width": 0.5, "color": style.COLOURS[kind]}, fillcolor=style.COLOURS[kind],
            ),
            row=1, col=1,
        )  # fmt: skip
    total = counts["n_retrieval_heads"].to_list()
    hover = [f"{at}<br>{value} retrieval heads" for at, value in zip(where, total, strict=True)]
    figure.add_trace(
        go.Scatter(
            x=x, y=total, name="all", mode="lines+markers", line={"color": style.INK, "width": 2}, marker={"size": 5},
            text=hover, hoverinfo="text",
        ),
        row=1, col=1,
    )  # fmt: skip
    colour = style.COLOURS["initial_mean"]
    columns = ("mean_initial_score", "mean_initial_low", "mean_initial_high")
    hover = [
        f"{at}<br>mean score of initial heads {style.format_number(mean)} [{style.format_number(low)}, "
        f"{style.format_number(high)}]"
        for at, (mean, low, high) in zip(where, counts.select(columns).iter_rows(), strict=True)
    ]
    _band(figure, x, counts["mean_initial_low"], counts["mean_initial_high"], colour, row=2, col=1)
    figure.add_trace(
        go.Scatter(
            x=x, y=_plain(counts["mean_initial_score"]), mode="lines+markers", showlegend=False, text=hover,
            hoverinfo="text", line={"color": colour, "width": 2}, marker={"size": 5},
        ),
        row=2, col=1,
    )  # fmt: skip
    _value_axis(figure, "retrieval heads", 1, range=[0, max(1, *total) * 1.15], dtick=max(1, math.ceil(max(total) / 5)))
    _value_axis(figure, "mean score of initial heads", 2, rangemode="tozero")
    if int(counts["n_initial"][0]) == 0:
        figure.update_yaxes(tickvals=[], row=2, col=1)
        figure.add_annotation(
            x=0.5, y=0.5, xref="x2 domain", yref="y2 domain", text="n/a: no initial heads", showarrow=False
        )
    return _layout(figure, height=530, plot_bgcolor="white", **BOTTOM_LEGEND)


def depth_curves(run: Run | RunTables, *, max_panels: int = 6, max_checkpoints: int = 6) -> go.Figure:
    """Answer perplexity against needle depth, a panel per length, a line per checkpoint (Figure 7 of the paper)."""
    tables = RunTables.of(run)
    lengths = style.pick_evenly(tables.lengths, max_panels)
    names = style.select_panels(tables.checkpoints, tables.base, max_checkpoints)
    colours = style.spread_colours(style.VIRIDIS, len(names))
    shown = style.short_names(tables.checkpoints["checkpoint"].to_list(), 18)
    titles = [f"{style.format_length(length)} tokens" for length in lengths]
    figure, n_rows, n_columns = _panels(titles, panel_height=230)
    drawn = tables.by_depth.filter(pl.col("length").is_in(lengths), pl.col("checkpoint").is_in(names))
    scale = style.PplScale.of(*(drawn[f"answer_ppl{end}"] for end in ("", "_low", "_high")))
    for i, length in enumerate(lengths):
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        for name, colour in zip(names, colours, strict=True):
            rows = tables.by_depth.filter(pl.col("length") == length, pl.col("checkpoint") == name).sort(
                "depth_fraction"
            )
            depth = (rows["depth_fraction"] * 100).to_list()
            low_places, high_places = (scale.places(rows[f"answer_ppl_{end}"]) for end in ("low", "high"))
            _band(figure, depth, low_places, high_places, colour, **place, group=html.escape(name))
            hover = [
                f"<b>{html.escape(name)}</b><br>{length} tokens, depth {at:.0f} %<br>answer perplexity "
                f"{style.format_number(value)} [{style.format_number(low)}, {style.format_number(high)}]<br>n = {n}"
                for at, value, low, high, n in zip(
                    depth, rows["answer_ppl"], rows["answer_ppl_low"], rows["answer_ppl_high"], rows["n"], strict=True
                )
            ]
            figure.add_trace(
                go.Scatter(
                    x=depth, y=_plain(scale.places(rows["answer_ppl"])), mode="lines+markers",
                    name=html.escape(shown[name]), legendgroup=html.escape(name), showlegend=i == 0,
                    text=hover, hoverinfo="text", line={"color": colour, "width": 2}, marker={"size": 5},
                ),
                **place,
            )  # fmt: skip
    figure.update_xaxes(range=[-5, 105], tickvals=[0, 25, 50, 75, 100], showgrid=False, zeroline=False, showline=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, showline=True, **_ppl_axis(scale))
    for row in range(1, n_rows + 1):
        figure.update_yaxes(title_text="answer perplexity", row=row, col=1)
    for column in range(1, n_columns + 1):
        figure.update_xaxes(title_text="needle depth (%)", row=n_rows, col=column)
    return _layout(figure, legend_title_text="checkpoint", plot_bgcolor="white")


def head_lives(run: Run | RunTables) -> go.Figure:
    """Births and deaths: a ribbon per head whose thickness is its score, coloured where the head lives."""
    tables = RunTables.of(run)
    rows, _ = life_rows(tables)
    figure = make_subplots(1, 1)
    scale = _token_axis(figure, tables)
    x = np.array(scale.at(tables.scored["tokens_seen"]))
    stage = style.last_stage(tables.checkpoints, tables.base)
    labels = life_kind_labels(None if stage is None else html.escape(style.stage_name(stage[0])))
    named: set[str] = set()
    for y, row in enumerate(rows):
        half = np.nan_to_num(row.score) * RIBBON_HALF_HEIGHT / max(1.0, row.peak)
        _ribbon(figure, x, y, half, "#bdbdbd")
        for segment in row.segments:
            span = slice(segment.start, segment.end)
            label = labels[segment.kind]
            rank = list(labels).index(segment.kind)
            _ribbon(
                figure, x[span], y, half[span], style.COLOURS[segment.kind], None if label in named else label, rank
            )
            named.add(label)
        hover = [
            f"{at}<br>head {row.name}: {html.escape(tables.metric)} {style.format_number(score)}"
            for at, score in zip(_checkpoint_hover(tables, tables.scored), row.score, strict=True)
        ]
        figure.add_trace(
            go.Scatter(x=x, y=[y] * len(x), mode="markers", marker={"size": 12, "opacity": 0}, text=hover,
                       hoverinfo="text", showlegend=False)
        )  # fmt: skip
    _life_marks(figure, rows, scale)
    _value_axis(
        figure, "head (layer-head)", 1, range=[max(len(rows), 1) - 0.4, -0.6], tickvals=list(range(len(rows))),
        ticktext=[row.name for row in rows], ticklabelstandoff=4,
    )  # fmt: skip
    figure.update_yaxes(showgrid=False, ticks="")
    if not rows:
        figure.add_annotation(
            x=0.5, y=0.5, xref="x domain", yref="y domain", text="no head came to life", showarrow=False
        )
    return _layout(figure, height=180 + 26 * max(len(rows), 4), plot_bgcolor="white", **BOTTOM_LEGEND)


def _ribbon(
    figure: go.Figure,
    x: NDArray[np.float64],
    y: int,
    half: NDArray[np.float64],
    colour: str,
    label: str | None = None,
    rank: int = 0,
) -> None:
    """A filled outline around `y`, and a thin line so that thin parts stay visible."""
    figure.add_trace(
        go.Scatter(
            x=[*x, *x[::-1]], y=[*(y - half), *(y + half)[::-1]], fill="toself", fillcolor=colour, mode="lines",
            line={"width": 1, "color": colour}, hoverinfo="skip", name=label, showlegend=label is not None,
            legendrank=1 + rank,
        )
    )  # fmt: skip


def _life_marks(figure: go.Figure, rows: Sequence[LifeRow], scale: style.TokenAxis) -> None:
    for kind, symbol in (("birth", "circle"), ("death", "x")):
        for provisional in (False, True):
            marks = [
                (y, row, mark)
                for y, row in enumerate(rows)
                for mark in row.marks
                if mark.kind == kind and mark.provisional == provisional
            ]
            if not marks:
                continue
            label = f"{kind} (provisional)" if provisional else kind
            figure.add_trace(
                go.Scatter(
                    x=scale.at([mark.tokens_seen for _, _, mark in marks]), y=[y for y, _, _ in marks], mode="markers",
                    name=label, hoverinfo="text",
                    text=[
                        f"<b>{label}</b> of head {row.name}<br>at {style.format_tokens(mark.tokens_seen)} tokens, "
                        f"score {style.format_number(mark.score)}"
                        for _, row, mark in marks
                    ],
                    marker={
                        "symbol": f"{symbol}-open" if provisional else symbol, "size": 10, "color": style.COLOURS[kind],
                        "line": {"width": 1.5, "color": style.COLOURS[kind] if provisional else "white"},
                    },
                )
            )  # fmt: skip
