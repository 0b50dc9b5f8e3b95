"""A pool of processes on this machine: each a fresh interpreter behind a pipe of its own.

Fresh, not forked: a fork of a process that has used torch or a GPU hangs or crashes. And started by name, so that a
script that calls the sweep needs no `if __name__ == "__main__"`. A worker whose pipe breaks is lost, whatever it died
of; a worker whose driver is gone ends by itself. It refuses to know units. Cost: starting a worker takes the seconds
that importing torch takes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from lccp_interp.schema import LccpError
from lccp_interp.sweep.driver import Hear
from lccp_interp.sweep.units import Report, Study, Task

END_S = 5.0
"""Seconds that a worker has to end before it is killed."""


@dataclass
class _Process:
    process: subprocess.Popen[bytes]
    connection: Connection
    slot: int
    last_words: str = ""


class Pool:
    """Workers of this machine. With GPUs, each sees its own and no other."""

    def __init__(self, study: Study) -> None:
        """No worker yet.

        Raises:
            LccpError: more GPUs are asked for than this machine has.
        """
        self._study = study
        self._processes: dict[int, _Process] = {}
        self._n_started = 0
        self._gpus = _gpus(study.execution.n_workers, study.execution.gpus_per_worker or 0.0)

    def start(self) -> int:
        """Start a process."""
        slot = min(set(range(len(self._processes) + 1)) - {one.slot for one in self._processes.values()})
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot]
        with theirs:
            process = subprocess.Popen(
                # -P: what lies in the working directory, beside a checkpoint perhaps, is no module of ours.
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Ctrl-C is for the driver; what becomes of workers is its business.
                start_new_session=True,
                env=environment,
            )
        connection = Connection(ours.detach())
        worker = self._n_started
        self._n_started += 1
        self._processes[worker] = _Process(process, connection, slot)
        with contextlib.suppress(OSError):  # it is dead already, which `wait` finds out
            connection.send(self._study)
        return worker

    def give(self, worker: int, task: Task) -> None:
        """Send the task."""
        with contextlib.suppress(OSError):
            self._processes[worker].connection.send(task)

    def wait(self, hear: Hear, timeout_s: float) -> None:
        """Hear what came through the pipes."""
        workers: dict[Any, int] = {one.connection: number for number, one in self._processes.items()}
        ready: list[Any] = wait(list(workers), timeout_s)
        for connection in ready:
            worker = workers[connection]
            try:
                report = connection.recv()
            except (EOFError, OSError):
                hear(worker, Report("lost", text=self._bury(worker)))
                continue
            if report.kind == "lost":
                self._processes[worker].last_words = report.text
            else:
                hear(worker, report)

    def stop(self) -> None:
        """End all workers."""
        for one in self._processes.values():
            one.process.terminate()
        for worker in list(self._processes):
            self._bury(worker)

    def _bury(self, worker: int) -> str:
        """Have the process gone; returns what it died of."""
        one = self._processes.pop(worker)
        one.connection.close()
        try:
            code = one.process.wait(END_S)
        except subprocess.TimeoutExpired:
            one.process.kill()
            code = one.process.wait()
        if one.last_words:
            return one.last_words
        if code < 0:
            memory = "; out of memory?" if -code == signal.SIGKILL else ""
            return f"killed by signal {-code}{memory}"
        return f"exit code {code}"


def _gpus(n_workers: int, gpus_per_worker: float) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker; empty if they get none."""
    if not gpus_per_worker:
        return []
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    if n_workers * gpus_per_worker > len(visible):
        raise LccpError(
            f"{n_workers} workers with {gpus_per_worker:g} GPUs each need {n_workers * gpus_per_worker:g}, this "
            f"machine has {len(visible)}; use fewer workers, or --gpus-per-worker "
            f"{len(visible) / n_workers if visible else 0:.2g}"
        )
    if gpus_per_worker < 1:
        return [visible[int(index * gpus_per_worker)] for index in range(n_workers)]
    each = int(gpus_per_worker)
    return [",".join(visible[index * each : (index + 1) * each]) for index in range(n_workers)]


def serve(descriptor: int) -> None:
    """What a worker's process runs: one task after another, until it is ended."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    connection = Connection(descriptor)

    def tell(report: Report) -> None:
        try:
            connection.send(report)
        except OSError:
            os._exit(1)  # nobody is there to hear it

    warnings.showwarning = lambda message, category, *_: (
        tell(Report("warning", text=str(message))) if category is UserWarning else None
    )
    try:
        study = connection.recv()
        try:
            worker = study.worker()
        except LccpError as error:
            tell(Report("failed", text=str(error)))
            return
        tell(worker.ready())
        while True:
            tell(worker.do(connection.recv(), tell))
    except EOFError:
        return
    except Exception as error:
        # Memory or a device may be in any state now; a fresh process tries again.
        tell(Report("lost", text=_described(error)))
        raise


def _described(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _end_with(driver: int) -> None:
    """End this process as soon as its driver is gone, in the middle of whatever it does."""
    while os.getppid() == driver:
        time.sleep(0.5)
    os._exit(1)
