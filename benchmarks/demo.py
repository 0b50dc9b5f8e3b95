"""Time and peak memory of `lccp demo`, as a whole process, set-up not counted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TITLE = "The demo"


def measure(say: Callable[[str], Any], *, quick: bool = False) -> dict[str, Any]:
    """Run the demo into a temporary folder, head scores first; returns seconds, peak MiB and what was scored.

    `quick` leaves out interference, corpora and fine-tuning.
    """
    import polars as pl

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        heads = _run(out, "--quick")
        whole = None if quick else _run(out)
        from lccp_interp.store import Run

        run = Run.open(out)
        record = {
            **heads,
            "whole": whole,
            "checkpoints": run.checkpoints.height,
            "cases": run.cases.height,
            "prompt_tokens": int(run.cases["length"].sum()) * run.checkpoints.height,
            "longest": int(run.cases["length"].max()),
            "score_rows": run.scores.select(pl.len()).collect().item(),
            "probe_rows": run.probes.select(pl.len()).collect().item(),
            "report_mib": (out / "report.html").stat().st_size / 2**20,
        }
    say(f"  {record}")
    return record


def _run(out: Path, *options: str) -> dict[str, float]:
    """One process of the command; what is there already is not done again."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "lccp_interp.cli", "demo", "--out", str(out), *options])
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - start
    if status:
        raise RuntimeError(f"lccp demo ended with status {status}")
    return {
        "seconds": elapsed,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }


def table(record: dict[str, Any]) -> list[str]:
    """The record as Markdown."""
    lines = [
        f"`lccp demo --quick`: {record['checkpoints']} checkpoints x {record['cases']} cases "
        f"({record['prompt_tokens'] / 1e6:.1f} M prompt tokens, up to {record['longest']} a case, "
        f"{record['score_rows']:,} scores), figures and report: **{record['seconds']:.0f} s** "
        f"({record['cpu_seconds']:.0f} s of processor time), peak memory **{record['peak_mib'] / 1024:.2f} GiB**.",
    ]
    if record.get("whole"):
        whole = record["whole"]
        lines += [
            "",
            f"The rest of `lccp demo` (interference, corpora, fine-tuning and answers, {record['probe_rows']:,} probe "
            f"results; figures and report again): **{whole['seconds']:.0f} s** ({whole['cpu_seconds']:.0f} s of "
            f"processor time), peak memory **{whole['peak_mib'] / 1024:.2f} GiB**, report "
            f"{record['report_mib']:.1f} MiB.",
        ]
    return lines
