"""How long a large run takes to analyse: from the parts on disk to every table, a process's first call and all."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lccp_interp.schema import Case, CaseResult, Checkpoint, Span

TITLE = "Analysing a large run"
N_CHECKPOINTS, N_LAYERS, N_HEADS = 20, 32, 32
SIZES = {25: 5.0, 123: 20.0}
"""Cases per checkpoint, and the seconds that the analysis may take; 41 thousand score rows each case."""


def write_run(folder: Path, n_cases: int) -> Any:
    """A made-up run: a few heads rise, all others are noise; the first quarter is an earlier stage."""
    from lccp_interp.store import Run, RunWriter, result_frames

    rng = np.random.default_rng(0)
    cases = [
        Case(f"c{i}", "niah", 4096, 0.5, f"n{i}", f"h{i}", i, 0, tuple(range(20)), (1, 2, 3), Span(1, 5), Span(2, 5))
        for i in range(n_cases)
    ]
    stages = ["pretrain"] * (N_CHECKPOINTS // 4) + ["lccp"] * (N_CHECKPOINTS - N_CHECKPOINTS // 4)
    checkpoints = [
        Checkpoint(f"{stage}-{i}", folder / str(i), (i + 1) * 10**9, stage, (i + 1) * 10**9, f"{i:064x}")
        for i, stage in enumerate(stages)
    ]
    writer = RunWriter(folder, {"made up": n_cases}, cases)
    writer.add_checkpoints(checkpoints)
    rising = rng.choice(N_LAYERS * N_HEADS, 40, replace=False)
    for i, checkpoint in enumerate(checkpoints):
        results = []
        for case in cases:
            scores = rng.uniform(0, 0.05, (N_LAYERS * N_HEADS)).astype(np.float32)
            scores[rising] += np.linspace(0, 0.8, len(rising)) * (1 - np.exp(-i / 6))
            null = rng.uniform(0, 0.05, (N_LAYERS, N_HEADS)).astype(np.float32)
            named = {"retrieval": scores.reshape(N_LAYERS, N_HEADS), "retrieval@decoy": null}
            loss = (3 * np.exp(-i / 5) + rng.exponential(0.05, 3)).astype(np.float32)
            results.append(CaseResult(case.case_id, tuple(range(N_LAYERS)), named, loss, case.answer_ids))
        answers = {case.case_id: case.answer_ids for case in cases}
        frames = result_frames(checkpoint, "teacher_forced", results, answers)
        writer.append(checkpoint.name, 0, scores=frames[0], outcomes=frames[1])
    return Run.open(folder)


def analyses(run: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; each reads from the disk anew."""
    from lccp_interp.dynamics import RunTables, compare, correlate, run_series, saturation_table

    def heads() -> None:
        tables = RunTables(run)
        _ = tables.scores, tables.census, tables.lives, tables.events, tables.stability, tables.by_depth

    return {
        "heads, census, births and deaths, stability, outcomes": heads,
        "saturation": lambda: saturation_table(run),
        "correlation": lambda: correlate(*run_series(run)[:1]),
        "comparison with the base": lambda: compare(run),
    }


def measure(say: Callable[[str], Any], *, quick: bool = False) -> list[dict[str, Any]]:
    """One record per size: rows, and seconds of each analysis."""
    import polars as pl

    records = []
    for n_cases, limit_s in {3: 5.0}.items() if quick else SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            run = write_run(Path(folder) / "run", n_cases)
            seconds = {}
            for name, analyse in analyses(run).items():
                start = time.perf_counter()
                analyse()
                seconds[name] = time.perf_counter() - start
            rows = run.scores.select(pl.len()).collect().item()
        records.append({"cases": n_cases, "rows": rows, "seconds": seconds, "limit_s": limit_s})
        say(f"  {records[-1]}")
    return records


def table(records: list[dict[str, Any]]) -> list[str]:
    """The records as Markdown."""
    names = list(records[0]["seconds"])
    rows = [
        f"| {r['rows']:,} | "
        + " | ".join(f"{r['seconds'][name]:.1f}" for name in names)
        + f" | **{sum(r['seconds'].values()):.1f}** | {r['limit_s']:g} |"
        for r in records
    ]
    return [
        f"Made-up runs of {N_CHECKPOINTS} checkpoints and {N_LAYERS} x {N_HEADS} heads, scores and nulls, from the "
        "Parquet parts to the tables, with 1000 resamples. Seconds; each analysis once, reading from the disk anew.",
        "",
        "| score rows | " + " | ".join(names) + " | all | target |",
        "|---:|" + "---:|" * (len(names) + 2),
        *rows,
    ]
