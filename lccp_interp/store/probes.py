"""Benchmark results per checkpoint, added to a run whatever study it is of.

This module knows which results a run may hold beside each other; it refuses to know where they come from. Cost: one
reading of the results that the run has.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from lccp_interp.schema import LccpError
from lccp_interp.store.files import file_stem, is_whole, write_part
from lccp_interp.store.lock import holding
from lccp_interp.store.run import Run
from lccp_interp.store.tables import PROBE_KEY, PROBES_SCHEMA


def append_probes(run_path: str | Path, name: str, frame: pl.DataFrame) -> Path:
    """Add benchmark results to the run at `run_path` as one immutable part, whatever study the run is of.

    Args:
        run_path: a run folder.
        name: of the part; one that is there is left alone if it holds the same rows, and refused if it does not.
        frame: columns and types as in `PROBES_SCHEMA`, at least one row.

    Returns:
        The part's path.

    Raises:
        LccpError: no run there, a checkpoint that the run does not have or has with other tokens, a missing
            benchmark, metric or score (an undefined score is NaN), or results that the run or `frame` itself already
            holds.

    Example:
        >>> append_probes("runs/demo", "ruler", frame)   # doctest: +SKIP
    """
    run_path = Path(run_path)
    if dict(frame.schema) != PROBES_SCHEMA or frame.is_empty():
        raise ValueError(f"probes {name!r}: got {frame.schema} with {frame.height} rows")
    Run.open(run_path)  # no run, no lock
    part = run_path / "probes" / f"{file_stem(name)}.parquet"
    with holding(run_path):
        if not is_whole(part):
            _check_probes(Run.open(run_path), name, frame)
            write_part(frame, part)
        elif not pl.read_parquet(part).equals(frame):
            raise LccpError(f"{part} is there with other results; parts are never changed, so choose another name")
    return part


def _check_probes(run: Run, name: str, frame: pl.DataFrame) -> None:
    for column in ("checkpoint", "tokens_seen", "benchmark", "metric", "score"):
        if frame[column].null_count():
            row = int(frame[column].is_null().arg_max() or 0)
            raise LccpError(f"probes {name!r}: row {row + 1} has no {column}; give one (an undefined score is NaN)")
    known = dict(run.checkpoints.select("name", "tokens_seen").rows())
    for checkpoint, tokens in frame.select("checkpoint", "tokens_seen").unique(maintain_order=True).rows():
        if checkpoint not in known:
            raise LccpError(
                f"probes {name!r}: the run {run.path} has no checkpoint {checkpoint!r}; it has {', '.join(known)}"
            )
        if known[checkpoint] != tokens:
            raise LccpError(
                f"probes {name!r}: checkpoint {checkpoint!r} has {tokens} tokens, in {run.path} {known[checkpoint]}; "
                "mend the wrong one"
            )
    twice = frame.filter(frame.select(PROBE_KEY).is_duplicated()).select(PROBE_KEY)
    where = "twice in the new results"
    if twice.is_empty():
        twice = frame.join(run.probes.collect(), on=PROBE_KEY, how="semi", nulls_equal=True).select(PROBE_KEY)
        where = f"already in {run.path / 'probes'}"
    if twice.height:
        what = ", ".join(f"{column} {value}" for column, value in twice.row(0, named=True).items() if value is not None)
        raise LccpError(f"probes {name!r}: {what} is {where} ({twice.height} such rows); keep one score for each")
