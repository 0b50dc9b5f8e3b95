"""SLURM jobs, through submitit: one per checkpoint with all its open shards, as an array.

A job reads the run folder, checks its own model, scores one shard after another and leaves parts, which are its only
effect: the driver counts them. There is nobody to ask before scoring, since jobs may start days apart, so each job
checks the model it has loaded, and refuses for itself. A job that is preempted or runs out of time is queued again by
SLURM and goes on where it was; one that dies is submitted again, a few times. Whoever comes back later waits for the
jobs that are still there before it submits others. What jobs print stands in RUN/slurm. Parameters go to submitit as
they are. Cost: a job, an import of torch, a load and a self-check per checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import RunWriter, replacing
from lccp_interp.sweep.execution import Execution
from lccp_interp.sweep.log import Ledger
from lccp_interp.sweep.schedule import TRIES, Unit
from lccp_interp.sweep.units import Study, Task, unheard

FOLDER = "slurm"
"""In the run folder: what jobs are sent, print and give back, and `jobs.json`, which jobs there are."""

POLL_S = {"slurm": 10.0}
"""Seconds between looks at jobs; a fraction where they run on this machine."""

GENERIC = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
"""submitit's own parameters; all others are SLURM's, and are given its prefix."""

FORGOTTEN_S = 3600.0
"""SLURM forgets jobs in time: one that it does not know so long after it was submitted is over."""

A_DAY_MIN = 24 * 60
REQUEUES = 100
"""Times that a job which runs out of time is queued again: it goes on where it was."""


@dataclass(frozen=True)
class Job:
    """All open shards of a checkpoint; called, it does them."""

    study: Study
    of: Checkpoint
    shards: Sequence[int]

    def __call__(self) -> dict[str, Any]:
        """Score what is not done yet; returns `failed`, a text or None, and `record` for run.json."""
        worker = self.study.worker()
        try:
            proved = worker.do(Task(self.of), unheard)
            if proved.kind != "proved":
                return {"failed": proved.text, "record": None}
            for shard in self.shards:
                report = worker.do(Task(self.of, shard, proved.text), unheard)
                if report.kind == "failed":
                    return {"failed": report.text, "record": proved.record}
        finally:
            worker.close()
        return {"failed": None, "record": proved.record}

    def checkpoint(self) -> Any:
        """What submitit queues when SLURM takes the job away: the same; shards that are done are skipped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_jobs(
    study: Study,
    todo: Mapping[str, Sequence[int]],
    checkpoints: Mapping[str, Checkpoint],
    ledger: Ledger,
    writer: RunWriter,
) -> dict[str, str]:
    """Submit a job for each checkpoint in `todo` and wait for them; with `detach` come back at once.

    Returns:
        What went wrong, by checkpoint.

    Raises:
        LccpError: submitit is not installed, there is no SLURM here, or a parameter that submitit does not know.
    """
    jobs = _Jobs(study, todo, checkpoints, ledger, writer)
    if study.execution.detach:
        jobs.leave_out_submitted()
        jobs.submit(len(todo))
        return {}
    try:
        jobs.wait()
    except BaseException:
        jobs.cancel()
        raise
    return jobs.failures


class _Jobs:
    """The jobs of one call."""

    def __init__(
        self,
        study: Study,
        todo: Mapping[str, Sequence[int]],
        checkpoints: Mapping[str, Checkpoint],
        ledger: Ledger,
        writer: RunWriter,
    ) -> None:
        self.failures: dict[str, str] = {}
        self._study, self._ledger, self._writer, self._checkpoints = study, ledger, writer, checkpoints
        self._open = {name: list(shards) for name, shards in todo.items()}
        self._queue = list(todo)
        self._running: dict[str, Any] = {}
        self._lost = dict.fromkeys(todo, 0)
        self._recorded = False
        self._listed = study.run / FOLDER / "jobs.json"
        self.is_local = study.execution.slurm.get("cluster", "slurm") != "slurm"
        # A folder of its own for each call: what others have left there is never read.
        self._executor = _executor(study.execution, study.run / FOLDER / uuid.uuid4().hex[:8])

    def wait(self) -> None:
        """See all jobs through."""
        poll_s = POLL_S.get(str(self._study.execution.slurm.get("cluster", "slurm")), 0.3)
        for job_id in self._left_before().values():
            self._ledger.log(f"waiting for job {job_id} of an earlier call")
            self._ledger.tell(f"job {job_id}")
            while not self._is_over(self._executor.job_class(self._study.run / FOLDER, job_id)):
                self._count()
                time.sleep(poll_s)
        self._count()
        # Elsewhere the array keeps to `workers`; on this machine nobody but us does.
        room = self._study.execution.n_workers if self.is_local else len(self._queue)
        while self._queue or self._running:
            self.submit(room - len(self._running))
            for name in [name for name, job in self._running.items() if job.done()]:
                self._close(name, self._running.pop(name))
            self._count()
            if self._running:
                time.sleep(poll_s)

    def leave_out_submitted(self) -> None:
        """Do not submit again what an earlier call has submitted and SLURM still has."""
        for name, job_id in self._left_before().items():
            job = self._executor.job_class(self._study.run / FOLDER, job_id)
            if name in self._queue and not self._is_over(job):
                self._queue.remove(name)
                self._running[name] = job
                self._ledger.log(f"job {job_id} of an earlier call has {name}")

    def submit(self, n_jobs: int) -> None:
        """Submit the next jobs, as one array."""
        names = [name for name in self._queue[: max(0, n_jobs)] if self._open[name]]
        self._queue = self._queue[max(0, n_jobs) :]
        if not names:
            return
        with self._executor.batch():
            for name in names:
                # A job has one checkpoint: nothing is fetched ahead.
                job = Job(replace(self._study, ahead=()), self._checkpoints[name], tuple(self._open[name]))
                self._running[name] = self._executor.submit(job)
        ids = {name: self._running[name].job_id for name in names}
        self._ledger.log("submitted " + ", ".join(f"{name} as job {job_id}" for name, job_id in ids.items()))
        with replacing(self._listed) as temporary:
            temporary.write_text(json.dumps({name: job.job_id for name, job in self._running.items()}, indent=2) + "\n")

    def cancel(self) -> None:
        """End the jobs of this call: nobody waits for them."""
        for job in self._running.values():
            with contextlib.suppress(Exception):
                job.cancel()

    def _left_before(self) -> dict[str, str]:
        """Ids of jobs that an earlier call submitted, by checkpoint. What they give back is not read."""
        if self.is_local or not self._listed.is_file():
            return {}
        try:
            listed = json.loads(self._listed.read_text(encoding="utf-8"))
            return {str(name): str(job_id) for name, job_id in listed.items()}
        except (ValueError, AttributeError):
            return {}

    def _is_over(self, job: Any) -> bool:
        """Whether a job of an earlier call is neither waiting nor running."""
        if job.done():
            return True
        return job.state == "UNKNOWN" and time.time() - self._listed.stat().st_mtime > FORGOTTEN_S

    def _count(self) -> None:
        """Tell of the parts that have come."""
        for name, shards in self._open.items():
            for shard in [shard for shard in shards if self._writer.is_done(name, shard)]:
                shards.remove(shard)
                self._ledger.finish(Unit(name, shard))
                self._ledger.log(f"unit {name}/{shard} done ({self._ledger.state()})")

    def _close(self, name: str, job: Any) -> None:
        """A job is over, one way or another."""
        self._count()
        try:
            result = job.result()
        except Exception as error:  # whatever it died of
            reason = _last_line(error)
        else:
            if result["record"] is not None and not self._recorded:
                self._recorded = True
                self._writer.record_execution(result["record"])
            if result["failed"] is not None:
                self.failures[name] = result["failed"]
                self._ledger.log(f"failed {name} in job {job.job_id}: {result['failed']}")
                return
            if not self._open[name]:
                return
            reason = f"its parts are not in {self._writer.path}, which all nodes must see under this path"
        self._lost[name] += 1
        again = self._lost[name] < TRIES
        self._ledger.log(f"job {job.job_id} of {name} lost ({reason}); {'submitted again' if again else 'given up'}")
        if again:
            self._queue.append(name)
        else:
            self.failures[name] = f"{TRIES} jobs were lost with it, the last one: {reason}; see {self._listed.parent}"


def _executor(execution: Execution, folder: Path) -> Any:
    """submitit's executor, with the parameters of the jobs."""
    try:
        import submitit
    except ImportError as error:
        raise LccpError("executor 'slurm' needs submitit; install it with pip install 'lccp_interp[slurm]'") from error
    given = dict(execution.slurm)
    cluster = str(given.pop("cluster", "slurm"))
    parameters: dict[str, Any] = {"name": "lccp", "cpus_per_task": execution.cpus_per_worker or 1}
    if execution.gpus_per_worker:
        parameters["gpus_per_node"] = max(1, int(execution.gpus_per_worker))
    if not {"time", "timeout_min"} & set(given):
        parameters["timeout_min"] = A_DAY_MIN
    if execution.workers is not None:
        parameters["slurm_array_parallelism"] = execution.workers
    parameters |= {key if key in GENERIC else f"slurm_{key}": value for key, value in given.items()}
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=REQUEUES)
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise LccpError(
            f"executor 'slurm': {text[:300]}; parameters go by submitit's names, --slurm cluster=local runs the jobs "
            "on this machine"
        ) from error
    return executor


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    text = lines[-1] if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
