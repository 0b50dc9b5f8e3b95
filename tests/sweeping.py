"""What the tests of executors share: the small study, its undisturbed tables, and faults that come at a set moment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from lccp_interp.sweep import Execution, score_grid
from lccp_interp.tasks.niah import NiahGrid

N_UNITS = 9
"""Three checkpoints, three shards of two cases."""

GRID = NiahGrid(lengths=(640,), depths=(0, 50, 100), samples=2, seed=3)
SHARD = 2


SLOW = {"sharing": "on", "chunk_tokens": 4}
"""Many small passes: half a second per unit, long enough to be hit in the middle of one."""


def sweep(trajectory, out, *, progress=None, **execution):
    """Score the small study; one thread, so that sums are taken in one order."""
    options = Execution(threads=1, **{**SLOW, **execution})
    return score_grid(trajectory, out, GRID, cases_per_shard=SHARD, execution=options, progress=progress)


def parts(run: Path) -> dict[str, bytes]:
    """The bytes of every part file, by its place in the run folder."""
    found = {f"{table}/{part.name}": part for table in ("scores", "outcomes") for part in (run / table).iterdir()}
    return {name: part.read_bytes() for name, part in sorted(found.items())}


def log_of(run: Path) -> list[str]:
    """The lines of the log, without their times."""
    log = run / "log.txt"
    return [line.partition(" ")[2] for line in log.read_text().splitlines()] if log.is_file() else []


def done_units(run: Path) -> list[str]:
    """The units that the log calls done, in order, as often as it does."""
    return [match[1] for line in log_of(run) if (match := re.match(r"unit (\S+) done", line))]


def process_of(run: Path, worker: int) -> int:
    """The process that a worker is, by the log."""
    return next(
        int(match[1]) for line in log_of(run) if (match := re.match(rf"worker {worker} ready: process (\d+)", line))
    )


class At:
    """Does something once, from a thread, as soon as a condition holds; tells whether it came to that."""

    def __init__(self, condition, act, *, within_s: float = 60.0):
        self.happened, self._over = False, threading.Event()
        self._condition, self._act, self._until = condition, act, time.monotonic() + within_s
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self):
        while not self._over.is_set() and time.monotonic() < self._until:
            if self._condition():
                self.happened = True
                self._act()
                return
            time.sleep(0.02)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


def kill(pid: int) -> None:
    """End a process as the out-of-memory killer does."""
    os.kill(pid, signal.SIGKILL)


def driver(trajectory, out, **execution) -> subprocess.Popen:
    """The same sweep, driven by a process of its own."""
    code = (
        "from pathlib import Path\n"
        "import sweeping\n"
        f"sweeping.sweep(Path({str(trajectory)!r}), Path({str(out)!r}), **{execution!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)


def wait_for(condition, *, within_s: float = 60.0) -> bool:
    """Whether a condition came to hold in time."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
