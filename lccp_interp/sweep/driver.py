"""The driver of a sweep: hands units to workers, hears what becomes of them, and replaces workers that are lost.

Whoever does the work is a `Fleet`: this process, a pool, or actors on a cluster. The first worker that has loaded a
checkpoint checks it, the others wait for that: one model speaks for the trajectory, so that the verdict on its cache,
which decides how prompts are run, is one and the same for every unit. It refuses to know models and tables. Cost: a
message there and one back per unit.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import RunWriter
from lccp_interp.sweep.log import Ledger
from lccp_interp.sweep.schedule import TRIES, Schedule, Unit
from lccp_interp.sweep.units import Report, Task

POLL_S = 1.0
"""Seconds between looks at workers that say nothing."""

VISIBLE_S = 10.0
"""Seconds that a part may take to be seen here once its worker has written it: network file systems are slow."""

LOSSES = 10
"""Workers lost one after another, with nothing done in between, that end a sweep: it is not one unit's fault."""

Hear = Callable[[int, Report], None]


class Fleet(Protocol):
    """Workers, known by number. What they say reaches the driver inside `wait`."""

    def start(self) -> int:
        """Start a worker; it reports `ready`, or is `lost`."""

    def give(self, worker: int, task: Task) -> None:
        """Have a ready worker do a task; it reports `done`, `proved`, `failed` or `refused`, or is `lost`."""

    def wait(self, hear: Hear, timeout_s: float) -> None:
        """Pass on what was said since; return when there was something, at the latest after `timeout_s` seconds."""

    def stop(self) -> None:
        """End all workers, whatever they do."""


class Driver:
    """One call of a sweep."""

    def __init__(
        self, fleet: Fleet, n_workers: int, schedule: Schedule, checkpoints: Mapping[str, Checkpoint], ledger: Ledger,
        writer: RunWriter,
    ) -> None:  # fmt: skip
        self._fleet, self._n_workers, self._schedule = fleet, n_workers, schedule
        self._checkpoints, self._ledger, self._writer = checkpoints, ledger, writer
        self._starting, self._idle, self._alive = set[int](), list[int](), set[int]()
        self._prover: int | None = None
        self._cache_fault: str | None = None
        self._stillborn = self._in_a_row = 0
        self._unit_s, self._load_s = list[float](), list[float]()
        self._warned = set[str]()

    def run(self) -> dict[str, str]:
        """Do all units; returns what went wrong, by checkpoint.

        Raises:
            LccpError: a model that fails its self-check, workers that cannot be started or do not share the folder.
        """
        try:
            while self._schedule.is_open:
                self._man()
                self._hand_out()
                self._fleet.wait(self._hear, POLL_S)
        finally:
            self._fleet.stop()
        return self._schedule.failures

    def _man(self) -> None:
        """Have as many workers as there is work for."""
        wanted = min(self._n_workers, self._schedule.n_waiting + len(self._schedule.running))
        while len(self._alive) < wanted:
            worker = self._fleet.start()
            self._alive.add(worker)
            self._starting.add(worker)

    def _hand_out(self) -> None:
        load_units = 1.0
        if self._unit_s and self._load_s:
            load_units = statistics.fmean(self._load_s) / max(statistics.fmean(self._unit_s), 1e-3)
        for worker in list(self._idle):
            if self._cache_fault is None and self._prover is not None:
                return
            unit = self._schedule.next(worker, load_units=load_units)
            if unit is None:
                continue
            self._idle.remove(worker)
            if self._cache_fault is None:
                self._prover = worker
                self._ledger.tell(unit.checkpoint)
                self._fleet.give(worker, Task(self._checkpoints[unit.checkpoint]))
            else:
                self._score(worker, unit)

    def _score(self, worker: int, unit: Unit) -> None:
        self._ledger.begin(unit)
        task = Task(self._checkpoints[unit.checkpoint], unit.shard, self._cache_fault or "")
        self._fleet.give(worker, task)

    def _hear(self, worker: int, report: Report) -> None:
        if worker not in self._alive:
            return
        unit = self._schedule.running.get(worker)
        if report.load_s is not None and unit is not None:
            self._load_s.append(report.load_s)
            self._ledger.log(f"worker {worker} loaded {unit.checkpoint} in {report.load_s:.1f} s")
        if report.kind == "warning":
            if report.text not in self._warned:
                self._warned.add(report.text)
                warnings.warn(report.text, stacklevel=2)
        elif report.kind == "note":
            self._ledger.tell(report.text)
            self._ledger.log(f"worker {worker}: {report.text}")
        elif report.kind == "ready":
            self._starting.discard(worker)
            self._idle.append(worker)
            self._stillborn = 0
            self._ledger.log(f"worker {worker} ready: {report.text}")
        elif report.kind == "lost":
            self._lose(worker, report.text)
        elif report.kind == "refused":
            raise LccpError(report.text)
        elif unit is None:
            # A word of a worker that has no task: it could not start, or a count of tokens came late.
            if report.kind == "failed":
                raise LccpError(report.text)
        elif report.kind == "tokens":
            self._ledger.advance(unit, report.n_tokens)
        elif report.kind == "proved":
            self._prover, self._cache_fault = None, report.text
            if report.record is not None:
                self._writer.record_execution(report.record)
            self._ledger.log(f"self-check of {unit.checkpoint} by worker {worker} in {report.seconds:.1f} s")
            self._score(worker, unit)
        else:
            self._close(worker, unit, report)

    def _close(self, worker: int, unit: Unit, report: Report) -> None:
        """A unit is done, or has failed."""
        if self._prover == worker:
            self._prover = None
        self._idle.append(worker)
        if report.kind == "failed":
            self._schedule.fail(worker, report.text)
            self._ledger.take_back(unit)
            self._ledger.log(f"failed {unit} on worker {worker}: {report.text}")
            return
        self._require_part(unit)
        self._in_a_row = 0
        self._schedule.finish(worker)
        self._ledger.finish(unit)
        took = report.text or f"in {report.seconds:.1f} s"
        if not report.text:
            self._unit_s.append(report.seconds)
        self._ledger.log(f"unit {unit} done by worker {worker} {took} ({self._ledger.state()})")

    def _require_part(self, unit: Unit) -> None:
        deadline = time.monotonic() + VISIBLE_S
        while not self._writer.is_done(unit.checkpoint, unit.shard):
            if time.monotonic() > deadline:
                raise LccpError(
                    f"a worker has done {unit}, but its parts are not in {self._writer.path}; put the run folder where "
                    "all workers see the same files"
                )
            time.sleep(0.2)

    def _lose(self, worker: int, reason: str) -> None:
        """A worker is gone; what it did is given back."""
        self._alive.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        if self._prover == worker:
            self._prover = None
        if worker in self._starting:
            self._starting.discard(worker)
            self._stillborn += 1
            self._ledger.log(f"worker {worker} lost before it was ready ({reason})")
            if self._stillborn >= TRIES and not self._alive:
                raise LccpError(f"{self._stillborn} workers one after another could not be started: {reason}")
            if self._stillborn >= TRIES:
                self._n_workers = len(self._alive)  # those that are there go on
            return
        unit = self._schedule.running.get(worker)
        again = self._schedule.lose(worker, reason)
        if unit is None:
            self._ledger.log(f"worker {worker} lost without a unit ({reason})")
            return
        self._ledger.take_back(unit)
        tries = self._schedule.tries(unit)
        what = f"given back (lost {tries} of {TRIES} times)" if again else "given up"
        self._ledger.log(f"worker {worker} lost with unit {unit} ({reason}); {what}")
        self._in_a_row += 1
        if self._in_a_row >= max(LOSSES, 3 * self._n_workers):
            raise LccpError(f"{self._in_a_row} workers were lost one after another and nothing was done: {reason}")
