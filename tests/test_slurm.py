"""SLURM jobs, run by submitit on this machine: the tables of one process, through jobs that die; what SLURM is sent."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
from sweeping import At, done_units, kill, log_of, parts, sweep, wait_for

from lccp_interp.checkpoints import find_checkpoints
from lccp_interp.schema import LccpError
from lccp_interp.store import Run
from lccp_interp.sweep import Execution, slurm
from lccp_interp.sweep.units import Study

submitit = pytest.importorskip("submitit", reason="the extra `slurm` is not installed")

# submitit leaves its job's process to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LOCAL = {"executor": "slurm", "slurm": {"cluster": "local"}}


@pytest.fixture(scope="module")
def two(trajectory):
    """Two checkpoints: a job each."""
    return find_checkpoints([trajectory])[:2]


@pytest.fixture(scope="module")
def undisturbed(two, tmp_path_factory):
    """The parts of the first checkpoint, done in this process."""
    out = tmp_path_factory.mktemp("run") / "here"
    sweep(two[:1], out)
    return parts(out)


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_a_job_that_is_killed_is_submitted_again_and_goes_on(two, undisturbed, tmp_path):
    run = tmp_path / "run"

    def end_the_first_job():
        listed = json.loads((run / "slurm" / "jobs.json").read_text())
        for pid in children(int(listed["pretrain-0"])):
            kill(pid)

    with At(lambda: bool(done_units(run)), end_the_first_job) as fault:
        sweep(two[:1], run, **LOCAL)
    assert fault.happened
    assert parts(run) == undisturbed
    assert len(done_units(run)) == len(set(done_units(run))) == 3
    log = log_of(run)
    assert sum("of pretrain-0 lost" in line and "submitted again" in line for line in log) == 1
    assert log[-1] == "finished (3 of 3 units, 100%)"
    assert Run.open(run).manifest["executions"][0]["executor"] == "slurm"


def test_detached_jobs_are_left_to_themselves(two, undisturbed, tmp_path):
    run = tmp_path / "run"
    sweep(two[:1], run, detach=True, **LOCAL)
    assert any("submitted pretrain-0 as job" in line for line in log_of(run))
    assert not any("finished" in line for line in log_of(run))
    assert wait_for(lambda: len(list(run.glob("scores/*.parquet"))) == 3)
    assert parts(run) == undisturbed


def test_a_job_that_fails_is_named(two, tmp_path, monkeypatch):
    class Failing:
        job_id = "7"

        def __init__(self, result):
            self._result = result

        def done(self):
            return True

        def result(self):
            if isinstance(self._result, Exception):
                raise self._result
            return self._result

    class Executor:
        def __init__(self, results):
            self._results = results

        def batch(self):
            return contextlib.nullcontext()

        def submit(self, job):
            return Failing(self._results[job.of.name])

    results = {
        "pretrain-0": {"failed": "shard 2: NaN logits", "record": None},
        "lccp-1": submitit.core.utils.UncompletedJobError("Job (task=0) failed\nexit code -9"),
    }
    monkeypatch.setattr(slurm, "_executor", lambda execution, folder: Executor(results))
    with pytest.raises(LccpError, match=r"2 of 2 checkpoints failed: .*shard 2: NaN logits \| .*3 jobs .*exit code -9"):
        sweep(two, tmp_path / "run", **LOCAL)
    assert sum("of lccp-1 lost (exit code -9)" in line for line in log_of(tmp_path / "run")) == 3


def test_jobs_of_an_earlier_call_are_waited_for_and_not_read(two, tmp_path, monkeypatch):
    """What lies in a run folder may come from anybody: an id is asked about, a pickle is never opened."""
    seen = []

    class Earlier:
        def __init__(self, folder, job_id):
            seen.append(job_id)

        def done(self):
            return True

        def result(self):
            raise AssertionError("a pickle was opened")

    class Executor:
        job_class = Earlier

        def batch(self):
            raise LccpError("enough")

    monkeypatch.setattr(slurm, "_executor", lambda execution, folder: Executor())
    (tmp_path / "run").mkdir()
    for _ in range(2):
        with pytest.raises(LccpError, match="enough"):
            sweep(two, tmp_path / "run", executor="slurm")
        (tmp_path / "run" / "slurm").mkdir(exist_ok=True)
        (tmp_path / "run" / "slurm" / "jobs.json").write_text('{"pretrain-0": "4711"}')
    assert seen == ["4711"]


def test_what_slurm_is_asked_for(tmp_path, monkeypatch):
    """The sbatch file, as submitit writes it where there is a SLURM."""
    for command in ("srun", "sbatch"):
        (tmp_path / command).write_text("#!/bin/sh\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    options = {"partition": "gpu", "time": 600, "mem_gb": 64}
    execution = Execution(executor="slurm", workers=3, cpus_per_worker=4, gpus_per_worker=2, slurm=options)
    executor = slurm._executor(execution, tmp_path / "jobs")
    text = executor._executor._make_submission_file_text("true", "x")
    for line in ("partition=gpu", "time=600", "mem=64GB", "cpus-per-task=4", "gpus-per-node=2", "job-name=lccp"):
        assert f"#SBATCH --{line}\n" in text, line
    assert executor._executor.parameters["array_parallelism"] == 3
    assert "time=1440" in slurm._executor(Execution(executor="slurm"), tmp_path)._executor._make_submission_file_text(
        "", ""
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "executor 'slurm': .*--slurm cluster=local runs the jobs on this machine"),
        ({"cluster": "local", "partitoin": "gpu"}, "Unknown argument 'partitoin'"),
        ({"cluster": "elsewhere"}, "elsewhere"),
    ],
)
def test_what_submitit_does_not_know(two, tmp_path, options, message):
    with pytest.raises(LccpError, match=message) as caught:
        sweep(two, tmp_path / "run", executor="slurm", slurm=options)
    assert "\n" not in str(caught.value)


def test_a_job_that_slurm_takes_away_is_queued_as_it_was(two, tmp_path):
    study = Study(tmp_path, "", Execution(executor="slurm", slurm={"cluster": "local"}), "cpu")
    job = slurm.Job(study, two[0], (1, 2))
    assert job.checkpoint().function is job


def test_without_the_extra_it_is_named(two, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(LccpError, match=r"needs submitit; install it with pip install 'lccp_interp\[slurm\]'"):
        sweep(two, tmp_path / "run", executor="slurm")


class Queue:
    """What SLURM still has, as submitit tells: job ids by state; submits under new ids."""

    def __init__(self, states):
        self.states, self.submitted = states, []
        queue = self

        class Job:
            def __init__(self, folder, job_id):
                self.job_id, self.state = job_id, queue.states.get(job_id, "UNKNOWN")

            def done(self):
                return self.state not in ("PENDING", "RUNNING", "UNKNOWN")

        self.job_class = Job

    def batch(self):
        return contextlib.nullcontext()

    def submit(self, job):
        self.submitted.append(job.of.name)
        self.states[new := str(len(self.submitted))] = "PENDING"
        return self.job_class(None, new)


def test_detached_jobs_that_slurm_still_has_are_not_submitted_twice(two, tmp_path, monkeypatch):
    queue = Queue({})
    monkeypatch.setattr(slurm, "_executor", lambda execution, folder: queue)
    jobs = tmp_path / "run" / "slurm" / "jobs.json"
    for _ in range(2):
        sweep(two, tmp_path / "run", executor="slurm", detach=True)
        assert queue.submitted == ["pretrain-0", "lccp-1"]
        assert json.loads(jobs.read_text()) == {"pretrain-0": "1", "lccp-1": "2"}
    queue.states["1"] = "FAILED"
    sweep(two, tmp_path / "run", executor="slurm", detach=True)
    assert queue.submitted == ["pretrain-0", "lccp-1", "pretrain-0"]
    assert json.loads(jobs.read_text()) == {"pretrain-0": "3", "lccp-1": "2"}


def test_a_job_that_slurm_has_long_forgotten_is_not_waited_for(two, tmp_path, monkeypatch):
    queue = Queue({})
    monkeypatch.setattr(slurm, "_executor", lambda execution, folder: queue)
    sweep(two, tmp_path / "run", executor="slurm", detach=True)
    queue.states.clear()
    listed = tmp_path / "run" / "slurm" / "jobs.json"
    sweep(two, tmp_path / "run", executor="slurm", detach=True)
    assert len(queue.submitted) == 2  # submitted just now: SLURM may take a while to tell of it
    os.utime(listed, (0, listed.stat().st_mtime - 2 * slurm.FORGOTTEN_S))
    sweep(two, tmp_path / "run", executor="slurm", detach=True)
    assert len(queue.submitted) == 4
