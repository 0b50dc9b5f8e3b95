"""Learning dynamics from the tables of a run: heads over time, births and deaths, outcomes. No torch, no pictures."""

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
from lccp_interp.dynamics.outcomes import outcome_table
from lccp_interp.dynamics.selection import base_checkpoint
from lccp_interp.dynamics.tables import RunTables

__all__ = [
    "HeadSample",
    "RunTables",
    "base_checkpoint",
    "census",
    "events",
    "head_records",
    "head_sample",
    "lives",
    "outcome_table",
    "score_table",
    "stability",
]
