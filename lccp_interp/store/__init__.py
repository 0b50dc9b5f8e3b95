"""The run folder: immutable Parquet parts, one per unit of work, and a `run.json` that says how they came to be.

A unit of work is (checkpoint, shard of cases). Its part files are written under a temporary name, fsynced and renamed:
that a part exists means that it is done, so resuming and parallel workers need no locks, and a kill at any moment
leaves either a whole part or none. Two things are locked: a run has one driver at a time, and whoever changes run.json
holds it for that moment. Every part carries a digest of its rows, and the same rows give the same bytes. This package
knows tables and files; it refuses to know models, prompts or statistics, and imports no torch. Writing a part costs two
fsyncs; reading is lazy (polars) and touches only the columns that are asked for.

`tables` holds columns, `files` whole files and their checks, `processes` whose temporary files they are, `lock` who may
write, `manifest` run.json, `run` the reader, `writer` and `probes` the writers, `verify` the thorough look at it all.

Layout of a run folder:
    run.json          schema version, resolved config and its hash, versions, git commit, seeds, checkpoints
    cases.parquet     one row per case: the prompt's tokens, the answer's tokens, the exact spans, columns of the task
    scores/           checkpoint, tokens_seen, case_id, mode, metric, layer, head, value
    outcomes/         checkpoint, tokens_seen, case_id, mode, answer_loss_nats, answer_ppl, greedy_exact, ...
    probes/           checkpoint, tokens_seen, benchmark, subset, length, metric, score, n, stderr
    .driver.lock      who is at work on it, while somebody is
"""

from __future__ import annotations

from lccp_interp.store.files import (
    UNREADABLE,
    check_parts,
    collect,
    columns_of,
    file_stem,
    is_whole,
    part_name,
    replacing,
    write_json,
    write_part,
)
from lccp_interp.store.lock import driver_of, driving
from lccp_interp.store.manifest import RESTORE, check_entries, checkpoint_frame, config_hash, editing, provenance
from lccp_interp.store.probes import append_probes
from lccp_interp.store.run import Run
from lccp_interp.store.tables import (
    CASES_SCHEMA,
    OPTIONAL_COLUMNS,
    OUTCOMES_SCHEMA,
    PROBE_KEY,
    PROBES_SCHEMA,
    QUESTION_COLUMNS,
    REDO_PART,
    SCORES_SCHEMA,
    TABLES,
    TASK_COLUMNS,
    cases_frame,
    cases_from_frame,
    result_frames,
)
from lccp_interp.store.verify import DAMAGED, LEFT, REMOVED, STATES, STRAY, UNSIGNED, WHOLE, Finding, repair, verify
from lccp_interp.store.writer import RunWriter

__all__ = [
    "CASES_SCHEMA",
    "DAMAGED",
    "LEFT",
    "OPTIONAL_COLUMNS",
    "OUTCOMES_SCHEMA",
    "PROBES_SCHEMA",
    "PROBE_KEY",
    "QUESTION_COLUMNS",
    "REDO_PART",
    "REMOVED",
    "RESTORE",
    "SCORES_SCHEMA",
    "STATES",
    "STRAY",
    "TABLES",
    "TASK_COLUMNS",
    "UNREADABLE",
    "UNSIGNED",
    "WHOLE",
    "Finding",
    "Run",
    "RunWriter",
    "append_probes",
    "cases_frame",
    "cases_from_frame",
    "check_entries",
    "check_parts",
    "checkpoint_frame",
    "collect",
    "columns_of",
    "config_hash",
    "driver_of",
    "driving",
    "editing",
    "file_stem",
    "is_whole",
    "part_name",
    "provenance",
    "repair",
    "replacing",
    "result_frames",
    "verify",
    "write_json",
    "write_part",
]
