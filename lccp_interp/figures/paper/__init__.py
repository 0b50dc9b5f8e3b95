"""Figures and tables for papers: matplotlib, vector throughout, fonts embedded, one or two columns wide; LaTeX.

The numbers of the figures are those of arXiv 2604.02650. Every function takes a `Run` (or the `RunTables` of one, to
share work) and returns a matplotlib `Figure` made without pyplot, so that nothing is global and no display is needed;
`save` writes it. `columns=1` or `2` says how much of a page it spans; text is 7 to 8 points high in both. Undefined
cells are hatched, never left out. Functions that end in `_table` return a `PaperTable`, which writes itself. This
module refuses to know statistics: it draws tables of `lccp_interp.dynamics`. Cost: tens of milliseconds each beside the
tables.
"""

from lccp_interp.figures.paper.agreement import metric_agreement
from lccp_interp.figures.paper.behaviour import corpus_ppl, probe_scores
from lccp_interp.figures.paper.canvas import DOUBLE_COLUMN_INCHES, RC, SINGLE_COLUMN_INCHES, page_width, save
from lccp_interp.figures.paper.causal import causal_check, causal_dates
from lccp_interp.figures.paper.circuit import circuit
from lccp_interp.figures.paper.cohorts import cohort_survival, reference_comparison
from lccp_interp.figures.paper.heads import head_heatmaps, head_lives, retrieval_heads
from lccp_interp.figures.paper.interference import interference_curves, interference_heatmaps
from lccp_interp.figures.paper.levels import depth_curves, niah_trajectory, ppl_heatmaps
from lccp_interp.figures.paper.saturation import saturation_curves
from lccp_interp.figures.paper.tables import (
    PaperTable,
    agreement_table,
    causal_check_table,
    head_correlation_table,
    head_p_table,
    niah_correlation_table,
    niah_p_table,
    stability_table,
)

__all__ = [
    "DOUBLE_COLUMN_INCHES",
    "RC",
    "SINGLE_COLUMN_INCHES",
    "PaperTable",
    "agreement_table",
    "causal_check",
    "causal_check_table",
    "causal_dates",
    "circuit",
    "cohort_survival",
    "corpus_ppl",
    "depth_curves",
    "head_correlation_table",
    "head_heatmaps",
    "head_lives",
    "head_p_table",
    "interference_curves",
    "interference_heatmaps",
    "metric_agreement",
    "niah_correlation_table",
    "niah_p_table",
    "niah_trajectory",
    "page_width",
    "ppl_heatmaps",
    "probe_scores",
    "reference_comparison",
    "retrieval_heads",
    "saturation_curves",
    "save",
    "stability_table",
]
