"""Learning dynamics from the tables of a run: heads over time, births and deaths, outcomes. No torch, no pictures."""

from lccp_interp.dynamics.agreement import metric_agreement
from lccp_interp.dynamics.causal import causal_table, important_from
from lccp_interp.dynamics.comparison import by_kv_head, compare, survival
from lccp_interp.dynamics.correlation import Draws, correlate, lead_lag, paper_layout
from lccp_interp.dynamics.curves import metric_curves, metric_names, metric_series
from lccp_interp.dynamics.heads import (
    HeadSample,
    census,
    events,
    head_records,
    head_sample,
    lives,
    score_table,
    stability,
)
from lccp_interp.dynamics.outcomes import interference_table, outcome_table
from lccp_interp.dynamics.paired import paired_census, paired_heads
from lccp_interp.dynamics.published import published_correlations
from lccp_interp.dynamics.saturation import (
    DeceptiveSaturation,
    deceptive_saturation,
    saturation_records,
    saturation_table,
)
from lccp_interp.dynamics.selection import base_checkpoint
from lccp_interp.dynamics.series import run_series
from lccp_interp.dynamics.subsampling import advice, budget
from lccp_interp.dynamics.tables import RunTables

__all__ = [
    "DeceptiveSaturation",
    "Draws",
    "HeadSample",
    "RunTables",
    "advice",
    "base_checkpoint",
    "budget",
    "by_kv_head",
    "causal_table",
    "census",
    "compare",
    "correlate",
    "deceptive_saturation",
    "events",
    "head_records",
    "head_sample",
    "important_from",
    "interference_table",
    "lead_lag",
    "lives",
    "metric_agreement",
    "metric_curves",
    "metric_names",
    "metric_series",
    "outcome_table",
    "paired_census",
    "paired_heads",
    "paper_layout",
    "published_correlations",
    "run_series",
    "saturation_records",
    "saturation_table",
    "score_table",
    "stability",
    "survival",
]
