"""Actors on a Ray cluster: each a process on some node, with the processors and GPUs it asks for.

An actor that dies, or whose node does, is lost: its pending answer becomes an error, and a new actor is asked for,
which starts as soon as some node has room. Ray's own restarts and retries are off: which unit is done again is the
driver's decision. The actors end with their driver. All nodes need this package, and the run folder and checkpoints
under the same paths. It refuses to know units. Cost: milliseconds per unit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import warnings
from typing import Any

from lccp_interp.schema import LccpError
from lccp_interp.sweep.driver import Hear
from lccp_interp.sweep.units import Report, Study, Task, Worker

ROOM_S = 15.0
"""Seconds after which somebody who waits for room on the cluster is told so."""


ANSWER_S = 10.0
"""Seconds that a cluster has to answer."""


class Actor:
    """A worker, as Ray holds it: one method works, another tells meanwhile how far it is."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._news: list[Report] = []

    def open(self, study: Study) -> Report:
        """Become ready."""
        warnings.showwarning = lambda message, category, *_: (
            self._news.append(Report("warning", text=str(message))) if category is UserWarning else None
        )
        try:
            self._worker = study.worker()
        except LccpError as error:
            return Report("failed", text=str(error))
        return self._worker.ready()

    def do(self, task: Task) -> Report:
        """Do one task."""
        assert self._worker is not None
        return self._worker.do(task, self._news.append)

    def news(self) -> list[Report]:
        """What there was to tell since the last time."""
        # Taken from the front, so that what is added meanwhile stays.
        return [self._news.pop(0) for _ in range(len(self._news))]


class RayFleet:
    """Workers on a Ray cluster, which is joined, or started on this machine if there is none."""

    def __init__(self, study: Study) -> None:
        """Join the cluster.

        Raises:
            LccpError: Ray is not installed, or there is no cluster at the address.
        """
        self._study = study
        self._ray, self._joined_here = _join(study.execution.ray_address)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, tuple[int, bool]] = {}
        self._asked: dict[int, float] = {}
        self._told = set[int]()
        self._n_started = 0

    def start(self) -> int:
        """Ask for an actor; it is ready once a node has room for it."""
        execution = self._study.execution
        remote = self._ray.remote(concurrency_groups={"news": 1})(Actor).options(
            num_cpus=execution.cpus_per_worker or 1,
            num_gpus=execution.gpus_per_worker or 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        worker = self._n_started
        self._n_started += 1
        self._actors[worker] = actor = remote.remote()
        self._pending[actor.open.remote(self._study)] = (worker, False)
        self._asked[worker] = time.monotonic()
        return worker

    def give(self, worker: int, task: Task) -> None:
        """Call the actor."""
        self._pending[self._actors[worker].do.remote(task)] = (worker, False)

    def wait(self, hear: Hear, timeout_s: float) -> None:
        """Hear answers that have come, and ask those who work how far they are."""
        if not self._pending:
            time.sleep(timeout_s)
            return
        answered, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        if not answered:
            self._complain(hear)
            self._ask_for_news()
        for answer in answered:
            self._hear(answer, hear)

    def _hear(self, answer: Any, hear: Hear) -> None:
        worker, is_news = self._pending.pop(answer)
        if worker not in self._actors:
            return
        self._asked.pop(worker, None)
        try:
            said = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            if not is_news:
                self._remove(worker)
                hear(worker, Report("lost", text=_why(error)))
            return
        for report in said if is_news else [said]:
            hear(worker, report)

    def _ask_for_news(self) -> None:
        asked = {worker for worker, is_news in self._pending.values() if is_news}
        for worker, is_news in list(self._pending.values()):
            if not is_news and worker not in asked and worker not in self._asked:
                news = self._actors[worker].news.options(concurrency_group="news").remote()
                self._pending[news] = (worker, True)

    def _complain(self, hear: Hear) -> None:
        late = [worker for worker, since in self._asked.items() if time.monotonic() - since > ROOM_S]
        for worker in set(late) - self._told:
            self._told.add(worker)
            execution = self._study.execution
            wants = f"{execution.cpus_per_worker or 1} CPUs and {execution.gpus_per_worker or 0:g} GPUs"
            free = self._ray.available_resources()
            has = f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"
            hear(worker, Report("note", text=f"not ready yet: asks for {wants}, the Ray cluster has {has} free"))

    def _remove(self, worker: int) -> None:
        actor = self._actors.pop(worker)
        self._asked.pop(worker, None)
        with contextlib.suppress(Exception):  # it is usually dead already
            self._ray.kill(actor)

    def stop(self) -> None:
        """End all actors, and leave the cluster if this call joined it."""
        for worker in list(self._actors):
            self._remove(worker)
        self._pending.clear()
        if self._joined_here:
            self._ray.shutdown()


def _join(address: str | None) -> tuple[Any, bool]:
    """Ray, and whether this call joined or started the cluster; one that the caller has joined is used as it is."""
    # A cluster that is started here reports its use to nobody; actors without GPUs see what GPUs there are.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise LccpError("executor 'ray' needs Ray; install it with pip install 'lccp_interp[ray]'") from error
    if ray.is_initialized():
        return ray, False
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("local", "auto"):
        _require_answer(address)
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, error) from error
    return ray, True


def _require_answer(address: str) -> None:
    """Refuse an address where nobody answers: Ray itself would try for minutes, and then end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> LccpError:
    text = " ".join(str(error).split())
    return LccpError(
        f"no Ray cluster at {address!r}: {text[:200]}; start one (`ray start --head`), or leave --ray-address out"
    )


def _why(error: Exception) -> str:
    """The last line of what Ray tells, which is the error itself, or what became of the actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if type(error).__name__.startswith("RayTaskError") else " ".join(lines)
    return text if len(text) <= 300 else f"{text[:297]}..."
