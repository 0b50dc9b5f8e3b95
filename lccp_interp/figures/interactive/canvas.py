"""What all figures for the screen share: layout, axes, bands, panels, marks on cells, writing to a file."""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from lccp_interp.dynamics.selection import choose
from lccp_interp.dynamics.tables import InterferenceTables, RunTables
from lccp_interp.figures import style
from lccp_interp.schema import LccpError
from lccp_interp.store import replacing

Values = pl.Series | NDArray[np.float64]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
GRID = "#ececec"
WIDTH_PX = 900
SCREEN_FORMATS = ("html", "png", "svg", "pdf")
EXPORT_HINT = (
    "install lccp_interp[export] (pip install 'kaleido>=1,<2'); or write html, or draw with lccp_interp.figures.paper, "
    "which need none"
)
MAX_NAMED_CELLS = 150
PANEL_GAP_PX = 75
BOTTOM_LEGEND: dict[str, Any] = {
    "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
    "margin": {"l": 62, "r": 16, "t": 40, "b": 104},
}


def layout(figure: go.Figure, **options: Any) -> go.Figure:
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


def save(figure: go.Figure, path: str | Path, *, scale: float = 2.0) -> Path:
    """Write `figure` to `path`: `html` to look into, or `png`, `svg`, `pdf` as the screen shows it.

    Beside an HTML file lies `plotly.min.js`, once per folder, so that it opens without a network. Pictures are made by
    kaleido (extra `export`) in a Chrome or Chromium; `lccp_interp.figures.paper` draws for print and needs neither.

    Args:
        figure: one of `lccp_interp.figures.interactive`.
        path: its ending says the format.
        scale: pixels of a PNG per pixel of the screen.

    Raises:
        LccpError: unknown ending, or kaleido or a browser missing (what to install).

    Example:
        >>> save(retrieval_heads(run), "figure5.html")   # doctest: +SKIP
    """
    path = Path(path)
    kind = choose("format", path.suffix.lstrip("."), SCREEN_FORMATS, "interactive.save")
    if kind == "html":
        library = path.with_name("plotly.min.js")
        if not library.exists():
            with replacing(library) as temporary:
                temporary.write_text(get_plotlyjs(), encoding="utf-8")
        text = figure.to_html(include_plotlyjs="directory", div_id=path.stem, config={"displaylogo": False})
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return path
    if importlib.util.find_spec("kaleido") is None:
        raise LccpError(f"{path}: a plotly figure becomes {kind} by kaleido, which is missing; {EXPORT_HINT}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        made = figure.to_image(format=kind, width=WIDTH_PX, scale=scale)
    except RuntimeError as error:
        if "Chrome" not in str(error):
            raise
        raise LccpError(
            f"{path}: kaleido draws {kind} in a browser and found none; install Chromium (apt-get install chromium) or "
            "run `plotly_get_chrome`; or write html, or draw with lccp_interp.figures.paper, which need none"
        ) from None
    with replacing(path) as temporary:
        temporary.write_bytes(made)
    return path


def band(figure: go.Figure, x: Sequence[float], low: Values, high: Values, colour: str, **place: Any) -> None:
    """A translucent band; gaps where it is undefined."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    shared = {"x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    group = {"legendgroup": place.pop("group", None)}
    figure.add_trace(go.Scatter(y=plain(low), **shared, **group), **place)
    figure.add_trace(
        go.Scatter(y=plain(high), fill="tonexty", fillcolor=f"rgba({red},{green},{blue},0.15)", **shared, **group),
        **place,
    )


def plain(values: Values) -> list[float | None]:
    """Numbers for JSON, undefined ones as None (plotly draws a gap)."""
    return [None if value is None or not math.isfinite(value) else float(value) for value in values]


def panel_titles(tables: RunTables | InterferenceTables, names: Sequence[str]) -> list[str]:
    tokens = dict(tables.checkpoints.select("checkpoint", "tokens_seen").iter_rows())
    shown = style.short_names(tables.checkpoints["checkpoint"].to_list(), 22)
    titles = []
    for name in names:
        base = ", base" if name == tables.base else ""
        place = style.place_in_training(tables.checkpoints, tables.base, tokens[name])
        titles.append(f"{html.escape(shown[name])}<br><span style='font-size:11px'>{place}{base}</span>")
    return titles


def colourscale(colours: Sequence[str]) -> list[list[float | str]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def token_axis(figure: go.Figure, tables: RunTables, rows: int = 1) -> style.TokenAxis:
    """Token ticks and the shaded last stage on `rows` stacked axes."""
    scale = style.TokenAxis.of(tables.checkpoints, tables.base)
    figure.update_xaxes(
        range=scale.limits, tickvals=scale.tick_at, ticktext=scale.tick_text, tickangle=0,
        showgrid=False, zeroline=False,
        showline=True, linecolor=style.INK, linewidth=1, ticks="outside", ticklen=4,
    )  # fmt: skip
    figure.update_xaxes(title={"text": scale.label, "standoff": 8}, row=rows, col=1)
    for row in range(1, rows + 1):
        stage_shade(figure, tables, scale, row=row, col=1)
    stage = style.last_stage(tables.checkpoints, tables.base)
    if stage is not None:
        figure.add_annotation(
            x=scale.at([stage[1]])[0], y=1, yref="y domain", yanchor="bottom", xanchor="left", showarrow=False,
            text=f"{html.escape(style.stage_name(stage[0]))} →", font={"size": 11, "color": style.MUTED}, row=1, col=1,
        )  # fmt: skip
    return scale


def stage_shade(figure: go.Figure, tables: RunTables, scale: style.TokenAxis, *, row: int, col: int) -> None:
    """The last stage shaded behind one panel from its base on, unless there is one stage or the axis begins there."""
    stage = style.last_stage(tables.checkpoints, tables.base)
    if stage is None or (left := scale.at([stage[1]])[0]) <= 0:
        return
    place: dict[str, Any] = {"row": row, "col": col, "exclude_empty_subplots": False}
    figure.add_vrect(x0=left, x1=scale.limits[1], fillcolor=style.STAGE_SHADE, line_width=0, layer="below", **place)
    figure.add_vline(x=left, line={"color": style.MUTED, "width": 1, "dash": "dash"}, **place)


def base_gap(figure: go.Figure, gap: float | None, *, row: int, col: int) -> None:
    """The break between the base and the rest of a logarithmic axis of tokens; nothing where `gap` is None.

    `row` and `col` are those of a figure of two columns.
    """
    if gap is not None:
        number = 2 * (row - 1) + col
        figure.add_annotation(
            x=gap, y=0, yref=f"y{number if number > 1 else ''} domain", text="//", showarrow=False, yanchor="middle",
            bgcolor="white", borderpad=0, font={"size": 10}, row=row, col=col,
        )  # fmt: skip


def say_why(why: str) -> go.Figure:
    """The reason where there is nothing to draw."""
    figure = go.Figure(go.Scatter(x=[None], y=[None], showlegend=False))
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(
        x=0.5, y=0.5, xref="paper", yref="paper", text=html.escape(f"n/a: {why}"), showarrow=False,
        font={"size": 12, "color": style.MUTED},
    )  # fmt: skip
    return layout(figure, height=200, plot_bgcolor="white")


def value_axis(figure: go.Figure, title: str, row: int | None, column: int | None = 1, **options: Any) -> None:
    figure.update_yaxes(
        title={"text": title, "standoff": 6}, row=row, col=column, gridcolor=GRID, zeroline=False, showline=True,
        linecolor=style.INK, linewidth=1, ticks="outside", ticklen=4, automargin=True, **options,
    )  # fmt: skip


def ppl_axis(scale: style.PplScale) -> dict[str, Any]:
    at, text = scale.ticks
    return {"range": scale.limits, "tickvals": at, "ticktext": text}


def ppl_colours(scale: style.PplScale) -> dict[str, Any]:
    """The colour axis of a heat map of answer perplexities."""
    at, text = scale.ticks
    bar = {
        "title": {"text": "answer<br>perplexity", "font": {"size": 11}},
        "tickvals": at,
        "ticktext": text,
        "thickness": 12,
        "outlinewidth": 0,
    }
    return {"colorscale": colourscale(style.PERPLEXITY), "cmin": scale.low, "cmax": scale.high, "colorbar": bar}


def checkpoint_hover(tables: RunTables, rows: pl.DataFrame) -> list[str]:
    return [
        f"<b>{html.escape(name)}</b>, {style.format_tokens(tokens)} tokens"
        for name, tokens in rows.select("checkpoint", "tokens_seen").iter_rows()
    ]


def subplot_axes(i: int) -> tuple[str, str]:
    """Names of the i-th subplot's axes, as annotations and shapes want them."""
    number = "" if i == 0 else str(i + 1)
    return f"x{number}", f"y{number}"


def panel_grid(titles: Sequence[str], *, panel_height: int) -> tuple[go.Figure, int, int]:
    """Subplots in rows of three (four: two of two); returns the figure and its numbers of rows and columns."""
    n_columns = 2 if len(titles) == 4 else min(3, len(titles))
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


class Marks:
    """Rectangles and notes on cells of subplots, put on the figure at once: one by one plotly takes quadratic time."""

    def __init__(self) -> None:
        self.shapes: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []

    def cell(self, i: int, row: int, column: int, **look: Any) -> None:
        """A rectangle around one cell of the i-th subplot."""
        x, y = subplot_axes(i)
        edges = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5, "xref": x, "yref": y}
        self.shapes.append({"type": "rect", **edges, **look})

    def undefined(self, matrix: NDArray[np.float64], i: int) -> None:
        """Undefined cells are grey and say so."""
        x, y = subplot_axes(i)
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
