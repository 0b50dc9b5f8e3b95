"""Executors: whoever does the work, and whatever dies meanwhile, the tables are the same bytes and nothing is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import sweeping
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeping import N_UNITS, At, done_units, kill, log_of, parts, process_of, sweep, wait_for

from lccp_interp.checkpoints import Depot, find_checkpoints
from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import Run, driving
from lccp_interp.sweep import Execution, driver, pool, score
from lccp_interp.sweep.log import Ledger
from lccp_interp.sweep.schedule import TRIES, Schedule, Unit
from lccp_interp.sweep.units import Report


@pytest.fixture(scope="module")
def undisturbed(trajectory, tmp_path_factory):
    """The parts of the small study, done in this process."""
    out = tmp_path_factory.mktemp("run") / "here"
    sweep(trajectory, out)
    return parts(out)


def test_a_pool_writes_the_same_bytes_and_tells_how_far_it_is(trajectory, undisturbed, tmp_path):
    told = []
    sweep(trajectory, tmp_path / "run", executor="pool", workers=2, progress=lambda *report: told.append(report))
    assert parts(tmp_path / "run") == undisturbed
    done = [done for done, _, _ in told]
    assert done == sorted(done)
    assert told[-1] == (18 * 640, 18 * 640, "done")
    assert len(set(done)) > N_UNITS  # it moves within a unit
    log = log_of(tmp_path / "run")
    assert log[0] == "started: executor pool, 2 workers, 3 checkpoints, 0 of 9 units, 0%"
    assert log[-1] == "finished (9 of 9 units, 100%)"
    assert sorted(done_units(tmp_path / "run")) == sorted(f"{one}/{shard}" for one in NAMES for shard in range(3))
    assert sum("self-check of pretrain-0" in line for line in log) == 1
    (record,) = Run.open(tmp_path / "run").manifest["executions"]
    assert (record["executor"], record["workers"], record["threads"]) == ("pool", 2, 1)
    assert record["self_check"]["passed"]


NAMES = ("pretrain-0", "lccp-1", "lccp-2")


def test_a_worker_that_is_killed_is_replaced_and_its_unit_done_again(trajectory, undisturbed, tmp_path):
    run = tmp_path / "run"
    with At(lambda: len(done_units(run)) >= 3, lambda: kill(process_of(run, 0))) as fault:
        sweep(trajectory, run, executor="pool", workers=2)
    assert fault.happened
    assert parts(run) == undisturbed
    assert len(done_units(run)) == len(set(done_units(run))) == N_UNITS
    lost = [line for line in log_of(run) if "worker 0 lost" in line]
    assert len(lost) == 1
    assert "killed by signal 9; out of memory?" in lost[0]
    assert any(line.startswith("worker 2 ready") for line in log_of(run))


def test_a_driver_that_is_killed_takes_its_workers_along_and_the_next_one_goes_on(trajectory, undisturbed, tmp_path):
    run = tmp_path / "run"
    first = sweeping.driver(trajectory, run, executor="pool", workers=2)
    assert wait_for(lambda: len(done_units(run)) >= 2)
    workers = [process_of(run, number) for number in (0, 1) if any(f"worker {number} ready" in x for x in log_of(run))]
    kill(first.pid)
    assert first.wait() == -9
    assert workers
    assert wait_for(lambda: not any(map(sweeping.is_alive, workers)), within_s=20), "workers outlive their driver"
    before = {part: part.stat().st_mtime_ns for part in run.glob("scores/*.parquet")}
    assert 0 < len(before) < N_UNITS
    sweep(trajectory, run, executor="pool", workers=2)
    assert parts(run) == undisturbed
    assert {part: part.stat().st_mtime_ns for part in before} == before, "finished units were done again"


@pytest.fixture
def in_workers(tmp_path, monkeypatch):
    """Have the processes of a pool run some code before anything else."""

    def plant(code: str) -> None:
        (tmp_path / "planted").mkdir()
        (tmp_path / "planted" / "sitecustomize.py").write_text(
            "import os\nfrom lccp_interp.sweep.units import Worker\nscore = Worker._score\n"
            f"def planted(self, model, cases, tell):\n    {code}\n    return score(self, model, cases, tell)\n"
            "Worker._score = planted\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path / "planted"))

    return plant


def test_a_unit_that_kills_its_workers_is_named_in_the_end(trajectory, undisturbed, tmp_path, in_workers):
    in_workers("if model.name == 'lccp-1' and cases[0].depth_fraction == 0.5: os.kill(os.getpid(), 11)")
    message = (
        r"^checkpoint 'lccp-1': shard \d: 3 workers were lost with it, the last one: killed by signal 11; "
        r"the other 1 of 2 checkpoints are done; finished units stay, the same command tries the rest again$"
    )
    with pytest.raises(LccpError, match=message):
        sweep([trajectory / "lccp-1", trajectory / "lccp-2"], tmp_path / "run", executor="pool", workers=1)
    made = parts(tmp_path / "run")
    assert {name for name in undisturbed if "lccp-2" in name} <= set(made)
    assert all(undisturbed[name] == content for name, content in made.items())
    assert sum("lost with unit lccp-1/" in line for line in log_of(tmp_path / "run")) == TRIES


def test_what_a_worker_died_of_is_told(trajectory, tmp_path, in_workers):
    in_workers("raise RuntimeError('the device is gone')")
    with pytest.raises(LccpError, match=r"'pretrain-0': shard 0: 3 workers .* the last one: RuntimeError: the device"):
        sweep(trajectory / "pretrain-0", tmp_path / "run", executor="pool")


@pytest.mark.parametrize("executor", [{}, {"executor": "pool", "workers": 2}], ids=["here", "pool"])
def test_a_checkpoint_that_fails_is_listed_and_the_others_go_on(trajectory, undisturbed, tmp_path, executor):
    broken = tmp_path / "broken"
    shutil.copytree(trajectory, broken)
    found = find_checkpoints([broken])
    weights = broken / "lccp-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    message = "lccp-1.*truncated.*; the other 2 of 3 checkpoints are done; finished units stay"
    with pytest.raises(LccpError, match=message) as caught:
        sweep(found, tmp_path / "run", **executor)
    assert "\n" not in str(caught.value)
    assert parts(tmp_path / "run") == {name: part for name, part in undisturbed.items() if "lccp-1" not in name}
    assert any(line.startswith("failed lccp-1/0 on worker") for line in log_of(tmp_path / "run"))
    # Mended, the same call does the rest.
    shutil.copy(trajectory / "lccp-1" / "model.safetensors", weights)
    sweep(found, tmp_path / "run", **executor)
    assert parts(tmp_path / "run") == undisturbed


def test_a_second_driver_is_refused_while_the_first_is_at_work(trajectory, tmp_path):
    with driving(tmp_path / "run"), ThreadPoolExecutor(1) as others:
        second = others.submit(sweep, trajectory, tmp_path / "run", executor="pool")
        with pytest.raises(LccpError, match="is being worked on by process"):
            second.result()


def test_a_warning_of_a_worker_is_given_once(trajectory, tmp_path, in_workers):
    in_workers("import warnings; warnings.warn('the cache is not used')")
    with pytest.warns(UserWarning, match="the cache is not used") as caught:
        sweep(trajectory, tmp_path / "run", executor="pool", workers=2)
    assert len(caught) == 1


def test_what_was_asked_for_reaches_depot_and_loader(trajectory, tmp_path, monkeypatch):
    from lccp_interp.capture import model as capture

    held, asked, real = [], [], capture.load_model
    hold = Depot.hold
    monkeypatch.setattr(Depot, "hold", lambda self, one: held.append((self.budget_bytes, one.name)) or hold(self, one))
    monkeypatch.setattr(capture, "load_model", lambda path, **given: asked.append(given) or real(path, **given))
    sweep(trajectory, tmp_path / "run", allow_pickle=True, disk_budget_bytes=10**9, cache=tmp_path / "cache")
    assert held == [(10**9, name) for name in NAMES]
    assert [given["allow_pickle"] for given in asked] == [True] * 3
    assert [given["trust_remote_code"] for given in asked] == [False] * 3
    assert Run.open(tmp_path / "run").manifest["executions"][0]["allow_pickle"] is True


def test_the_threads_are_given_back(trajectory, tmp_path):
    import torch

    torch.set_num_threads(2)
    try:
        sweep(trajectory, tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert Run.open(tmp_path / "run").manifest["executions"][0]["threads"] == 1


class Scripted:
    """A fleet without processes: what becomes of each task is drawn; a finished unit leaves a mark, as a part would."""

    def __init__(self, draw, effects):
        self._draw, self._effects, self._n, self._doing, self._new = draw, effects, 0, {}, []
        self.given = []

    def start(self):
        self._n += 1
        self._new.append(self._n)
        return self._n

    def give(self, worker, task):
        assert worker not in self._doing
        self.given.append((worker, task))
        self._doing[worker] = task

    def wait(self, hear, timeout_s):
        for worker in self._new:
            hear(worker, Report("ready", text="here"))
        self._new.clear()
        for worker, task in list(self._doing.items()):
            what = self._draw(["done", "done", "lost before", "lost after", "later", "late word"])
            if what == "later":
                continue
            if what == "late word":
                hear(worker, Report("tokens", n_tokens=3))
                continue
            del self._doing[worker]
            if task.shard is not None and what != "lost before":
                self._effects.append((task.checkpoint.name, task.shard))
            if what.startswith("lost"):
                hear(worker, Report("lost", text="killed"))
            else:
                hear(worker, Report("proved" if task.shard is None else "done", load_s=1.0, seconds=0.5))

    def stop(self):
        self._doing.clear()


class Marks:
    """A writer whose parts are marks."""

    def __init__(self, effects, path):
        self._effects, self.path = effects, path

    def is_done(self, checkpoint, shard):
        return (checkpoint, shard) in self._effects

    def record_execution(self, record):
        raise AssertionError("no record was sent")


@given(
    draws=st.randoms(use_true_random=False),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    n_workers=st.integers(1, 4),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_driver_sees_every_unit_through_whatever_dies(tmp_path, monkeypatch, draws, sizes, n_workers):
    todo = {f"c{index}": list(range(size)) for index, size in enumerate(sizes)}
    units = {Unit(name, shard): 10 for name, shards in todo.items() for shard in shards}
    effects, told = [], []
    fleet = Scripted(draws.choice, effects)
    ledger = Ledger(tmp_path, units, set(), lambda *report: told.append(report))
    named = {name: Checkpoint(name, tmp_path, index) for index, name in enumerate(todo)}
    monkeypatch.setattr(driver, "LOSSES", 1000)
    failures = driver.Driver(fleet, n_workers, Schedule(todo), named, ledger, Marks(effects, tmp_path)).run()
    undone = {unit.checkpoint for unit in units if unit not in effects}
    assert undone <= set(failures)
    # Nothing is scored before one model has proved itself, and no unit is begun after it was heard to be done.
    kinds = [task.shard is None for _, task in fleet.given]
    assert kinds[0]
    begun = [(task.checkpoint.name, task.shard) for _, task in fleet.given if task.shard is not None]
    assert all(begun.count(unit) <= TRIES for unit in units)
    assert all(0 <= done <= total == 10 * len(units) for done, total, _ in told)


def test_workers_that_cannot_start_end_the_sweep(tmp_path):
    class Stillborn(Scripted):
        def wait(self, hear, timeout_s):
            for worker in self._new:
                hear(worker, Report("lost", text="exit code 1"))
            self._new.clear()

    ledger = Ledger(tmp_path, {Unit("a", 0): 1}, set(), lambda *report: None)
    lead = driver.Driver(Stillborn(None, []), 2, Schedule({"a": [0]}), {}, ledger, Marks([], tmp_path))
    with pytest.raises(LccpError, match="3 workers one after another could not be started: exit code 1"):
        lead.run()


def test_workers_that_die_over_and_over_end_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "LOSSES", 5)
    todo = {name: [0] for name in "abcdefgh"}
    ledger = Ledger(tmp_path, {Unit(name, 0): 1 for name in todo}, set(), lambda *report: None)
    named = {name: Checkpoint(name, tmp_path, index) for index, name in enumerate(todo)}
    fleet = Scripted(lambda choices: "lost before", [])
    lead = driver.Driver(fleet, 1, Schedule(todo), named, ledger, Marks([], tmp_path))
    with pytest.raises(LccpError, match="5 workers were lost one after another and nothing was done: killed"):
        lead.run()


def test_a_run_folder_that_workers_do_not_share_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "VISIBLE_S", 0.3)
    ledger = Ledger(tmp_path, {Unit("a", 0): 1}, set(), lambda *report: None)
    fleet = Scripted(lambda choices: "done", elsewhere := [])
    named = {"a": Checkpoint("a", tmp_path, 1)}
    lead = driver.Driver(fleet, 1, Schedule({"a": [0]}), named, ledger, Marks([], tmp_path))
    with pytest.raises(LccpError, match=r"a worker has done a/0, but its parts are not in .* see the same files"):
        lead.run()
    assert elsewhere == [("a", 0)]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    ledger = Ledger(tmp_path / "nowhere", {Unit("a", 0): 4, Unit("a", 1): 4}, {Unit("a", 0)}, lambda *report: None)
    ledger.log("unheard")
    assert ledger.state() == "1 of 2 units, 50%"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "rya"}, "unknown executor 'rya'; known: here, pool, ray, slurm; did you mean 'ray'"),
        ({"workers": 2}, "workers is an option of executor pool or ray or slurm, got executor 'here'; add --executor"),
        ({"executor": "pool", "workers": 0}, "workers must be at least 1, got 0"),
        (
            {"executor": "pool", "gpus_per_worker": 1.5},
            "must be a whole number, or a share of one GPU like 0.5; got 1.5",
        ),
        ({"executor": "pool", "ray_address": "auto"}, "ray_address is an option of executor ray, got executor 'pool'"),
        ({"slurm": {"time": 60}}, "slurm is an option of executor slurm, got executor 'here'; add --executor slurm"),
        ({"executor": "ray", "detach": True}, "detach is an option of executor slurm, got executor 'ray'"),
    ],
)
def test_mistaken_options(options, message):
    with pytest.raises(LccpError, match=message):
        Execution(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:1"}, "names one device of this machine, workers get theirs by --gpus-per-worker"),
        ({"device": "cpu", "gpus_per_worker": 1}, "--gpus-per-worker 1 does not go with --device cpu"),
        ({"device": "cuda", "executor": "ray"}, "the workers are given no GPU; add --gpus-per-worker 1"),
        ({"workers": 2, "gpus_per_worker": 2}, r"2 workers with 2 GPUs each need 4, this machine has 3"),
    ],
)
def test_mistaken_devices(trajectory, tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(LccpError, match=message):
        sweep(trajectory, tmp_path / "run", **{"executor": "pool", **options})


def test_each_worker_of_a_pool_has_its_own_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert pool._gpus(2, 2.0) == ["4,5", "6,7"]
    assert pool._gpus(3, 1.0) == ["4", "5", "6"]
    assert pool._gpus(4, 0.5) == ["4", "4", "5", "5"]
    assert pool._gpus(4, 0.0) == []


def test_a_function_of_ones_own_stays_in_this_process(trajectory, tmp_path):
    def mine(rows):
        return rows.weights.mean(dim=(1, 2))

    with pytest.raises(LccpError, match=r"metric 'mine' is a function of this process, .* or use executor 'here'"):
        score(trajectory, tmp_path / "run", metrics={"mine": mine}, executor="pool")
    assert not (tmp_path / "run").exists()


def test_a_script_needs_no_guard_around_its_call(trajectory, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from lccp_interp import score\n"
        f"score({str(trajectory / 'lccp-1')!r}, {str(tmp_path / 'run')!r}, lengths=[128], depths=[50], samples=1, "
        "executor='pool')\nprint('once')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "once\n"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["executions"][0]["executor"] == "pool"


def test_the_command_line_says_by_whom(lccp, trajectory, tmp_path, monkeypatch):
    from lccp_interp.cli.execution import worker_options

    asked = []
    monkeypatch.setattr("lccp_interp.sweep.score_grid", lambda *args, execution, **options: asked.append(execution))
    monkeypatch.setattr("lccp_interp.study.run_status", lambda run: {"done": 0.5})
    options = "--executor slurm --workers 3 --cpus-per-worker 4 --gpus-per-worker 2 --threads 1 --detach"
    slurm = ["--slurm", "partition=gpu", "--slurm", "time=90", "--slurm", "mem_gb=0.5"]
    code, _, err = lccp("score", trajectory, "--out", tmp_path / "run", *options.split(), *slurm)
    assert code == 0
    assert "SLURM has the jobs; `lccp status" in err
    (execution,) = asked
    assert (execution.executor, execution.workers, execution.n_threads, execution.detach) == ("slurm", 3, 1, True)
    assert (execution.cpus_per_worker, execution.gpus_per_worker) == (4, 2.0)
    assert execution.slurm == {"partition": "gpu", "time": 90, "mem_gb": 0.5}
    given = dict.fromkeys(("cpus_per_worker", "gpus_per_worker", "threads", "ray_address"))
    with pytest.raises(LccpError, match="--slurm 'gpu': write KEY=VALUE, like partition=gpu or time=600"):
        worker_options(executor="slurm", workers=1, slurm=["gpu"], detach=False, **given)


def test_no_jobs_are_told_of_where_there_was_nothing_to_do(lccp, trajectory, tmp_path):
    grid = ["--lengths", "96", "--depths", "50", "--samples", "1", "--metrics", "retrieval"]
    command = ["score", trajectory / "pretrain-0", "--out", tmp_path / "run", *grid]
    assert lccp(*command)[0] == 0
    code, out, err = lccp(*command, "--executor", "slurm", "--slurm", "cluster=local", "--detach")
    assert (code, err) == (0, "")
    assert "1 checkpoints x 1 cases" in out


def test_a_failed_checkpoint_is_one_line_and_exit_code_2(lccp, trajectory, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(trajectory, broken)
    config = json.loads((broken / "lccp-1" / "config.json").read_text())
    (broken / "lccp-1" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    small = ["--lengths", "128", "--depths", "50", "--samples", "1"]
    code, out, err = lccp("score", broken, "--out", tmp_path / "run", *small)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("lccp: checkpoint")
    assert "lacks" in err
    assert "the other 2 of 3 checkpoints are done" in err
    assert len(list((tmp_path / "run" / "scores").iterdir())) == 2
    code, _, err = lccp("score", trajectory, "--out", tmp_path / "other", *small, "--workers", "2")
    assert code == 2
    assert err.startswith("lccp: workers is an option of executor pool or ray or slurm, got executor 'here'")


def test_the_benchmark_of_scheduling_runs_what_it_says():
    from benchmarks import scaling

    record = scaling.run_units("pool", 2, 0.2, 2)
    assert (record["units"], record["used"]) == (4, 2)
    assert 0 <= record["lost"] < 1
    assert record["units_per_s"] <= 2 / 0.2
    assert "| pool | 2 |" in scaling.table([record])[-1]


def test_what_lies_in_the_working_directory_is_not_imported(trajectory, tmp_path, monkeypatch):
    """It may be the folder of a checkpoint that somebody else made."""
    for name in ("polars", "torch", "lccp_interp"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the working directory ran')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    sweep(trajectory / "pretrain-0", tmp_path / "run", executor="pool", workers=1)
    assert len(parts(tmp_path / "run")) == 6
