"""What scheduling costs: units of known length on a pool and on Ray, with more and more workers.

The units wait instead of computing: on a machine with few cores, or with other guests, units that compute slow each
other down, and what is asked here is what is lost between units. Everything else is what a sweep does: its driver, its
schedule, its pipes and actors. A unit's effect is a file that says when it began and ended, in place of its part.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine
from lccp_interp.schema import Checkpoint
from lccp_interp.sweep.driver import Driver, Fleet
from lccp_interp.sweep.execution import Execution
from lccp_interp.sweep.log import Ledger
from lccp_interp.sweep.schedule import Schedule, Unit
from lccp_interp.sweep.units import Report, Study, Task, Tell, Worker

TITLE = "Scheduling a sweep: units per second against workers"
EXECUTORS = ("pool", "ray")
WORKERS = (1, 2, 4)
UNIT_S = 10.0
UNITS_PER_WORKER = 4
TARGET = 0.05
"""What may be lost to scheduling."""


class WaitingStudy(Study):
    """A study whose units take `UNIT_S` seconds of waiting."""

    def worker(self) -> Worker:
        """One that waits."""
        return WaitingWorker(self.run)


class WaitingWorker(Worker):
    """Waits, and writes down when."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def do(self, task: Task, tell: Tell) -> Report:
        """Wait as long as the file `unit_s` says."""
        if task.shard is None:
            return Report("proved")
        begun = time.time()
        time.sleep(float((self._run / "unit_s").read_text()))
        mark = {"worker": os.getpid(), "begun": begun, "ended": time.time()}
        (self._run / f"{task.checkpoint.name}.{task.shard}.json").write_text(json.dumps(mark))
        return Report("done", seconds=mark["ended"] - begun)


class Marks:
    """What the driver asks of a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_done(self, checkpoint: str, shard: int) -> bool:
        """Whether the unit has left its mark."""
        return (self.path / f"{checkpoint}.{shard}.json").is_file()


@contextlib.contextmanager
def cluster(executor: str, n_workers: int) -> Iterator[None]:
    """Ray with room for the workers: those that wait need no core of their own."""
    if executor != "ray":
        yield
        return
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local", num_cpus=n_workers, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    try:
        yield
    finally:
        ray.shutdown()


def fleet_of(study: Study) -> Fleet:
    """The fleet that a sweep would use."""
    if study.execution.executor == "ray":
        from lccp_interp.sweep.cluster import RayFleet

        return RayFleet(study)
    from lccp_interp.sweep.pool import Pool

    return Pool(study)


def run_units(executor: str, n_workers: int, unit_s: float, per_worker: int) -> dict[str, Any]:
    """One record: what became of the workers' time between their first and their last unit."""
    todo = {f"c{index}": list(range(per_worker)) for index in range(n_workers)}
    units = {Unit(name, shard): 1 for name, shards in todo.items() for shard in shards}
    with tempfile.TemporaryDirectory() as folder, cluster(executor, n_workers):
        path = Path(folder)
        (path / "unit_s").write_text(str(unit_s))
        execution = Execution(executor=executor, workers=n_workers, gpus_per_worker=0.0)
        named = {name: Checkpoint(name, path, index) for index, name in enumerate(todo)}
        ledger = Ledger(path, units, set(), lambda done, total, message: None)
        start = time.time()
        fleet = fleet_of(WaitingStudy(path, "", execution, "cpu"))
        driver = Driver(fleet, n_workers, Schedule(todo), named, ledger, Marks(path))  # type: ignore[arg-type]
        failures = driver.run()
        marks = [json.loads(file.read_text()) for file in path.glob("c*.json")]
    if failures or len(marks) != len(units):
        raise RuntimeError(f"{len(marks)} of {len(units)} units done; {failures}")
    by_worker: dict[int, list[dict[str, float]]] = {}
    for mark in marks:
        by_worker.setdefault(mark["worker"], []).append(mark)
    there_s = sum(max(m["ended"] for m in done) - min(m["begun"] for m in done) for done in by_worker.values())
    busy_s = sum(mark["ended"] - mark["begun"] for mark in marks)
    return {
        "executor": executor,
        "workers": n_workers,
        "used": len(by_worker),
        "units": len(units),
        "unit_s": unit_s,
        "units_per_s": len(units) / (there_s / len(by_worker)),
        "lost": 1 - busy_s / there_s,
        "start_s": min(mark["begun"] for mark in marks) - start,
        "load": os.getloadavg()[0] / machine.cores(),
    }


def measure(say: Callable[[str], Any], *, quick: bool = False) -> list[dict[str, Any]]:
    """One record per executor and number of workers."""
    records = []
    for executor in EXECUTORS:
        for n_workers in WORKERS[:2] if quick else WORKERS:
            records.append(run_units(executor, n_workers, *((0.3, 3) if quick else (UNIT_S, UNITS_PER_WORKER))))
            say(f"  {records[-1]}")
    return records


def table(records: list[dict[str, Any]]) -> list[str]:
    """The records as Markdown."""
    first = records[0]
    lines = [
        f"Units of {first['unit_s']:g} s that wait, {first['units'] // first['workers']} per worker, on one machine. "
        "Lost: the share of the workers' time between their first and their last unit in which they did none; target: "
        f"below {TARGET:.0%}. Until the first unit begins, processes start (and in a sweep import torch and load a "
        "model, which is not counted here). Load: processes that wanted to run, per core, so above 1 the machine was "
        "crowded.",
        "",
        "| executor | workers | units/s | of the ideal | lost | until the first unit, s | load |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        ideal = r["workers"] / r["unit_s"]
        lines.append(
            f"| {r['executor']} | {r['workers']} | {r['units_per_s']:.3f} | {r['units_per_s'] / ideal:.1%} | "
            f"**{r['lost']:.2%}** | {r['start_s']:.1f} | {r['load']:.1f} |"
        )
    return lines
