"""The fleet of one: this very process does the work, as it is asked to."""

from __future__ import annotations

from lccp_interp.sweep.driver import Hear
from lccp_interp.sweep.units import Task, Worker


class Here:
    """This process as a fleet. What a worker raises is raised."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._task: Task | None = None
        self._ready = False

    def start(self) -> int:
        """There is one worker, number 0, and it is ready."""
        return 0

    def give(self, worker: int, task: Task) -> None:
        """Keep the task until `wait`."""
        self._task = task

    def wait(self, hear: Hear, timeout_s: float) -> None:
        """Do the task."""
        task, self._task = self._task, None
        if task is not None:
            hear(0, self._worker.do(task, lambda report: hear(0, report)))
        elif not self._ready:
            self._ready = True
            hear(0, self._worker.ready())

    def stop(self) -> None:
        """Let go of the model."""
        self._worker.close()
