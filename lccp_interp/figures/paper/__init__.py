"""Figures for papers: matplotlib, vector throughout, fonts embedded, at column width.

The numbers of the figures are those of arXiv 2604.02650. Every function takes a `Run` (or the `RunTables` of one, to
share work) and returns a matplotlib `Figure` made without pyplot, so that nothing is global and no display is needed;
`save` writes it. Undefined cells are hatched, never left out. This module refuses to know statistics: it draws tables
of `lccp_interp.dynamics`. Cost: tens of milliseconds each beside the tables.
"""

from lccp_interp.figures.paper.behaviour import corpus_ppl, probe_scores
from lccp_interp.figures.paper.canvas import DOUBLE_COLUMN_INCHES, RC, SINGLE_COLUMN_INCHES, save
from lccp_interp.figures.paper.cohorts import cohort_survival, reference_comparison
from lccp_interp.figures.paper.heads import head_heatmaps, head_lives, retrieval_heads
from lccp_interp.figures.paper.interference import interference_curves, interference_heatmaps
from lccp_interp.figures.paper.levels import depth_curves, niah_trajectory, ppl_heatmaps
from lccp_interp.figures.paper.saturation import saturation_curves

__all__ = [
    "DOUBLE_COLUMN_INCHES",
    "RC",
    "SINGLE_COLUMN_INCHES",
    "cohort_survival",
    "corpus_ppl",
    "depth_curves",
    "head_heatmaps",
    "head_lives",
    "interference_curves",
    "interference_heatmaps",
    "niah_trajectory",
    "ppl_heatmaps",
    "probe_scores",
    "reference_comparison",
    "retrieval_heads",
    "saturation_curves",
    "save",
]
