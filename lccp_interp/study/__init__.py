"""A whole study from one file: what is asked of which checkpoints, and where; run again it does only what is missing.

`form` says what a study file may hold, `source` reads one and names every mistake with its line, `stages` runs it,
`status` says how far a run is. The room joins the calls of others; it refuses to score, ask or draw anything itself.
"""

from __future__ import annotations

from lccp_interp.study.source import check_study, read_study
from lccp_interp.study.stages import planned_stages, run_study
from lccp_interp.study.status import run_status

__all__ = ["check_study", "planned_stages", "read_study", "run_status", "run_study"]
