"""What sections of a report share: an interactive figure with title and caption, a reason in place of a table.

It knows which figure needs how much room on a narrow screen; it refuses to know where in the page anything stands.
Cost: that of the figure.
"""

from __future__ import annotations

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.report.page import escape, figure_block
from lccp_interp.store import Run

MIN_WIDTH_PX = {
    "ppl_heatmaps": 640,
    "head_heatmaps": 640,
    "depth_curves": 640,
    "head_lives": 600,
    "saturation_curves": 680,
    "probe_scores": 680,
    "corpus_ppl": 640,
    "interference_heatmaps": 640,
    "interference_curves": 520,
    "cohort_survival": 640,
    "causal_check": 680,
    "metric_agreement": 560,
}
"""Below this a figure scrolls sideways; others go down to a phone's width."""


def drawn(tables: RunTables, name: str) -> str:
    """Figure `name` of `lccp_interp.figures.FIGURES` as HTML."""
    from lccp_interp.figures import FIGURES, caption, interactive

    entry = FIGURES[name]
    number = "" if entry.paper_figure is None else f" (as Figure {entry.paper_figure} of the paper)"
    figure = getattr(interactive, name)(tables)
    return figure_block(
        name, entry.title + number, figure, caption(name, tables), min_width_px=MIN_WIDTH_PX.get(name, 330)
    )


def reason(run: Run, error: object) -> str:
    """Why a thing is not shown, as a note."""
    return f'<p class="note">{escape(shareable(run, error))}</p>'


def shareable(run: Run, error: object) -> str:
    """`error` with folders named without their paths: a report is sent to others."""
    text = str(error)
    rows = run.checkpoints.select("path", "name").drop_nulls().rows()
    for path, name in sorted([(str(run.path), run.path.resolve().name), *rows], key=lambda row: -len(row[0])):
        text = text.replace(path, name)
    return text
