"""The figures of `paper` for the screen: plotly, with values under the pointer.

Same names, same tables, same colours as `lccp_interp.figures.paper`; each function takes a `Run` or its `RunTables`
and returns a plotly `Figure`. Text that comes from a run (names of checkpoints, stages, metrics) is escaped, as plotly
reads a subset of HTML in labels. Cost: milliseconds beside the tables.
"""

from lccp_interp.figures.interactive.agreement import metric_agreement
from lccp_interp.figures.interactive.behaviour import corpus_ppl, probe_scores
from lccp_interp.figures.interactive.canvas import save
from lccp_interp.figures.interactive.causal import causal_check, causal_dates
from lccp_interp.figures.interactive.circuit import circuit
from lccp_interp.figures.interactive.cohorts import cohort_survival, reference_comparison
from lccp_interp.figures.interactive.heads import head_heatmaps, head_lives, retrieval_heads
from lccp_interp.figures.interactive.interference import interference_curves, interference_heatmaps
from lccp_interp.figures.interactive.levels import depth_curves, niah_trajectory, ppl_heatmaps
from lccp_interp.figures.interactive.saturation import saturation_curves

__all__ = [
    "causal_check",
    "causal_dates",
    "circuit",
    "cohort_survival",
    "corpus_ppl",
    "depth_curves",
    "head_heatmaps",
    "head_lives",
    "interference_curves",
    "interference_heatmaps",
    "metric_agreement",
    "niah_trajectory",
    "ppl_heatmaps",
    "probe_scores",
    "reference_comparison",
    "retrieval_heads",
    "saturation_curves",
    "save",
]
