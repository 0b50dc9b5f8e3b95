"""The sweep over a trajectory: what is scored (`study`), how (`execution`), by whom (`driver` and the fleets).

A sweep is cut into units, (checkpoint, shard of cases). The part files of a unit are its only effect, so that any unit
may be done by anybody, in any order, and again: in this process (`here`), by processes of this machine (`pool`), by
actors on a Ray cluster (`cluster`), or by SLURM jobs (`slurm`). The tables are the same bytes.
"""

from __future__ import annotations

from lccp_interp.sweep.execution import (
    CASES_PER_SHARD,
    DEFAULT_METRICS,
    EXECUTORS,
    MODES,
    SHARING,
    Execution,
    Progress,
)
from lccp_interp.sweep.located import Access, find_run_checkpoints, load_located
from lccp_interp.sweep.study import score, score_grid, score_like

__all__ = [
    "CASES_PER_SHARD",
    "DEFAULT_METRICS",
    "EXECUTORS",
    "MODES",
    "SHARING",
    "Access",
    "Execution",
    "Progress",
    "find_run_checkpoints",
    "load_located",
    "score",
    "score_grid",
    "score_like",
]
