"""The HTML of a report: escaping, tables, figures, one page without a single request to the network.

Everything that comes from a run passes through `html.escape`; data of figures is JSON in which `<`, `>` and `&` are
written as escapes, so that no name can close its script element. A content security policy forbids every connection.
This module refuses to know what the numbers mean.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from plotly.offline import get_plotlyjs

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; "
    "img-src data: blob:; font-src data:"
)

MAX_OPEN_ROWS = 60
"""A longer table is folded: a click opens it."""

STYLE = """
:root { --ink: #1d1d1f; --muted: #63636b; --line: #dcdce0; --soft: #f6f6f8; --accent: #0072b2; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.8rem 0 .7rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 2rem 0 .3rem; }
h4 { font-size: .92rem; margin: 1.3rem 0 .2rem; overflow-wrap: anywhere; }
p, li, dd { max-width: 46rem; overflow-wrap: break-word; }
.meta, figcaption, .note { color: var(--muted); font-size: .875rem; line-height: 1.5; }
.meta { margin: 0 0 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; margin: 0 0 1rem; }
.nb { white-space: nowrap; }
a { color: var(--accent); }
dl.findings { margin: 0; } dl.findings dd { margin: .1rem 0 0; }
dl.findings dt { font-weight: 650; margin-top: .95rem; }
.cautions { background: #fff8e8; border-left: 3px solid #e69f00; padding: .6rem 1rem; margin: 1.2rem 0;
  max-width: 46rem; }
.cautions p { margin: .2rem 0; font-size: .92rem; }
figure { margin: 0 0 1.2rem; } figcaption { max-width: 50rem; padding: .3rem 0 0; overflow-wrap: break-word; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.plot { width: 100%; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .6rem 0 .4rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { white-space: normal; min-width: 4.2em; border-bottom: 1px solid var(--ink);
  vertical-align: bottom; font-weight: 600; background: #fff; }
th.text, td.text { text-align: left; }
td:first-child, th:first-child { padding-left: 0; }
tr.group td { text-align: left; font-weight: 600; padding-top: .9rem; }
tr.mark td { background: var(--soft); }
pre { background: var(--soft); padding: .8rem 1rem; font-size: .8rem; line-height: 1.45; overflow-x: auto;
  border-radius: 4px; }
details summary { cursor: pointer; }
@media (max-width: 40rem) { main { padding: 1.2rem 1rem 3rem; } h1 { font-size: 1.5rem; } body { font-size: 15.5px; } }
@page { margin: 14mm; }
@media print {
  main { max-width: none; padding: 0; } nav { display: none; } h2, h3, h4, dt { break-after: avoid; }
  figure, tr { break-inside: avoid; } .scroll { overflow: visible; } .plot { min-width: 0 !important; }
  table { font-size: .62rem; } th, td { padding: .2rem .35rem; white-space: normal; } body { font-size: 11pt; }
  .modebar-container { display: none !important; } pre { white-space: pre-wrap; }
}
"""

DRAW = """
(function () {
  const touch = window.matchMedia("(pointer: coarse)").matches;
  for (const data of document.querySelectorAll("script.figure-data")) {
    const figure = JSON.parse(data.textContent), place = document.getElementById(data.dataset.place);
    // On a touch screen a drag must scroll the page, not zoom the figure.
    if (touch) figure.layout.dragmode = false;
    Plotly.newPlot(place, figure.data, figure.layout, {responsive: true, displaylogo: false,
      displayModeBar: touch ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]});
  }
  // Paper is laid out after this event, so a figure cannot ask how wide its place will be.
  const setWidth = (size) => document.querySelectorAll(".plot").forEach((place) => Plotly.relayout(place, size));
  window.addEventListener("beforeprint", () => setWidth({width: 640, autosize: false}));
  window.addEventListener("afterprint", () => setWidth({width: null, autosize: true}));
})();
"""


def escape(value: object) -> str:
    """`value` as text that HTML shows as it is.

    Example:
        >>> escape("<script>")
        '&lt;script&gt;'
    """
    return html.escape(str(value), quote=True)


def prose(text: object) -> str:
    """`text` escaped; short words with hyphens (heads such as 12-3, names of checkpoints) stay on one line.

    Example:
        >>> prose("head 12-3 & co")
        'head <span class="nb">12-3</span> &amp; co'
    """
    words = re.split(r"( )", escape(text))
    return "".join(re.sub(r"^([\w.]+(?:-[\w.]+)+)", _keep, word) if len(word) <= 30 else word for word in words)


def _keep(match: re.Match[str]) -> str:
    return f'<span class="nb">{match[1]}</span>'


def script_safe(json_text: str) -> str:
    """JSON in which nothing can end a script element or begin a comment; it parses to the same value.

    Example:
        >>> script_safe('"</script>"')
        '"\\\\u003c/script\\\\u003e"'
    """
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    for character, escaped in escapes.items():
        json_text = json_text.replace(character, escaped)
    return json_text


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    text_columns: Sequence[int] = (0,),
    marked: Sequence[int] = (),
    appended: tuple[str, Sequence[Sequence[object]]] | None = None,
) -> str:
    """A table that scrolls sideways on narrow screens.

    Args:
        columns: headings.
        rows: cells, shown as `str`; None is a dash.
        text_columns: indices of columns that are aligned left.
        marked: indices of rows that are shaded.
        appended: a heading and more rows, set off below (for example published values).
    """

    def cell(tag: str, i: int, value: object) -> str:
        kind = ' class="text"' if i in text_columns else ""
        return f"<{tag}{kind}>{'–' if value is None else escape(value)}</{tag}>"

    def line(row: Sequence[object], kind: str = "") -> str:
        return f"<tr{kind}>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>"

    head = "".join(cell("th", i, name) for i, name in enumerate(columns))
    body = "".join(line(row, ' class="mark"' if i in marked else "") for i, row in enumerate(rows))
    if appended is not None:
        title, more = appended
        body += f'<tr class="group"><td colspan="{len(columns)}">{escape(title)}</td></tr>' + "".join(map(line, more))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(body: str, n_rows: int, what: str) -> str:
    """`body` as it is, or to be opened by a click where it is long.

    Example:
        >>> folded("<p>", 3, "rows"), folded("<p>", 100, "rows")
        ('<p>', '<details><summary>All 100 rows</summary><p></details>')
    """
    return body if n_rows <= MAX_OPEN_ROWS else f"<details><summary>All {n_rows} {what}</summary>{body}</details>"


def figure_block(name: str, title: str, figure: Any, text: str, *, min_width_px: int) -> str:
    """A plotly figure with its title and caption; narrow screens scroll it sideways below `min_width_px`."""
    height = int(figure.layout.height)
    return (
        f'<figure id="{escape(name)}"><h3>{escape(title)}</h3><div class="scroll">'
        f'<div class="plot" id="plot-{escape(name)}" style="height:{height}px;min-width:{min_width_px}px"></div></div>'
        f"<figcaption>{prose(text)}</figcaption>"
        f'<script type="application/json" class="figure-data" data-place="plot-{escape(name)}">'
        f"{script_safe(figure.to_json())}</script></figure>"
    )


def page(title: str, body: str) -> str:
    """The whole document, with plotly.js inside."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{get_plotlyjs()}</script>\n<script>{DRAW}</script>\n</body>\n</html>\n"
    )
