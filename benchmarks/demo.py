"""Time and peak memory of `lccp demo`, as a whole process, set-up not counted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure() -> dict[str, Any]:
    """Run the demo into a temporary folder; returns seconds, peak MiB and what was scored."""
    import polars as pl

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "lccp_interp.cli", "demo", "--out", str(out)])
        _, status, usage = os.wait4(process.pid, 0)
        elapsed = time.perf_counter() - start
        if status:
            raise RuntimeError(f"lccp demo ended with status {status}")
        from lccp_interp.store import Run

        run = Run.open(out)
        return {
            "seconds": elapsed,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_mib": usage.ru_maxrss / 1024,
            "checkpoints": run.checkpoints.height,
            "cases": run.cases.height,
            "prompt_tokens": int(run.cases["length"].sum()) * run.checkpoints.height,
            "score_rows": run.scores.select(pl.len()).collect().item(),
            "report_mib": (out / "report.html").stat().st_size / 2**20,
        }


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
