"""Watching a folder: whole checkpoints are scored once, half-written, broken and vanished ones are survived."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lccp_interp.cli
from lccp_interp.cli.terminal import app
from lccp_interp.monitor import watch as watching
from lccp_interp.monitor.summary import summarise
from lccp_interp.monitor.watch import BROKEN, SCORED, UNDONE, VANISHED, watch
from lccp_interp.schema import LccpError
from lccp_interp.store import Run, driving
from lccp_interp.sweep import Execution, score_grid
from lccp_interp.tasks.niah import NiahGrid

GRID = NiahGrid(lengths=(96,), depths=(0, 100), samples=2)
OLD = {"settle_s": 0.0, "execution": Execution(self_check=False)}


@pytest.fixture
def ckpts(make_checkpoint, tmp_path):
    """A folder with two checkpoints of a training, copied so that a test may break them."""
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for step in (100, 200):
        make_checkpoint(f"checkpoint-{step}", seed=step, root=folder)
        age(folder / f"checkpoint-{step}", 1000 - step)
    return folder


def age(folder, seconds):
    """Make a folder's files so old."""
    then = time.time() - seconds
    for file in folder.iterdir():
        os.utime(file, (then, then))


class Turns:
    """A sleep that lets something happen in its place, once per turn; the last one interrupts."""

    def __init__(self, *turns):
        self.turns = list(turns)

    def __call__(self, seconds):
        if not self.turns:
            raise KeyboardInterrupt
        self.turns.pop(0)()


def kinds(seen):
    return [(one.kind, one.checkpoint) for one in seen]


def follow(folder, out, *turns, **options):
    """Watch until the turns are over; returns what was told."""
    told = []
    with pytest.raises(KeyboardInterrupt):
        watch(folder, out, GRID, tokens_per_step=10, tell=told.append, sleep=Turns(*turns), **(OLD | options))
    return told


def test_whole_checkpoints_are_scored_as_a_sweep_scores_them(ckpts, tmp_path):
    seen = watch(ckpts, tmp_path / "run", GRID, tokens_per_step=10, once=True, **OLD)
    assert kinds(seen) == [(SCORED, "checkpoint-100"), (SCORED, "checkpoint-200")]
    swept = score_grid(
        lccp_interp.find_checkpoints([ckpts], tokens_per_step=10), tmp_path / "swept", GRID, execution=OLD["execution"]
    )
    key = ["checkpoint", "case_id", "metric", "layer", "head"]
    ours = Run.open(tmp_path / "run").scores.collect().sort(key)
    assert ours.equals(swept.scores.collect().sort(key))
    assert [one.summary.tokens_seen for one in seen] == [1000, 2000]
    # The verdict is that of the run so far.
    assert seen[-1].summary.record() == summarise(swept, "checkpoint-200").record()


def test_new_ones_are_found_and_old_ones_not_done_again(ckpts, make_checkpoint, tmp_path, monkeypatch):
    calls = []
    scored = watching.score_grid
    monkeypatch.setattr(watching, "score_grid", lambda *a, **k: calls.append(a[0].name) or scored(*a, **k))
    told = follow(
        ckpts,
        tmp_path / "run",
        lambda: make_checkpoint("checkpoint-300", seed=3, root=ckpts),
        lambda: None,
        lambda: None,
    )
    assert kinds(told) == [(SCORED, f"checkpoint-{step}") for step in (100, 200, 300)]
    assert calls == ["checkpoint-100", "checkpoint-200", "checkpoint-300"]
    parts = {part: part.stat().st_mtime_ns for part in (tmp_path / "run" / "scores").iterdir()}
    # Begun again, it says where things stand and scores nothing twice.
    again = watch(ckpts, tmp_path / "run", GRID, tokens_per_step=10, once=True, **OLD)
    assert kinds(again) == kinds(told)
    assert {part: part.stat().st_mtime_ns for part in (tmp_path / "run" / "scores").iterdir()} == parts


def test_a_half_written_folder_is_waited_for(ckpts, tmp_path):
    half = ckpts / "checkpoint-200"
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    told = follow(
        ckpts,
        tmp_path / "run",
        lambda: (half / "model.safetensors").write_bytes(weights[: len(weights) * 3 // 4]),
        lambda: (half / "model.safetensors").write_bytes(weights),
        lambda: None,
    )
    assert kinds(told) == [(SCORED, "checkpoint-100"), (SCORED, "checkpoint-200")]


def test_what_stays_broken_is_named_once_and_the_others_go_on(ckpts, tmp_path):
    (ckpts / "checkpoint-100" / "model.safetensors").write_bytes(b"\0" * 100)
    age(ckpts / "checkpoint-100", 500)
    told = follow(ckpts, tmp_path / "run", lambda: None, lambda: None)
    assert sorted(kinds(told)) == [(BROKEN, "checkpoint-100"), (SCORED, "checkpoint-200")]
    (broken,) = [one for one in told if one.kind == BROKEN]
    assert "model.safetensors" in broken.reason
    assert broken.line().startswith("checkpoint-100: broken: ")
    assert broken.record() == {"event": "broken", "checkpoint": "checkpoint-100", "reason": broken.reason}


def test_a_broken_one_that_is_mended_is_scored(ckpts, tmp_path):
    tokenizer = (ckpts / "checkpoint-100" / "tokenizer.json").read_bytes()
    (ckpts / "checkpoint-100" / "tokenizer.json").unlink()
    told = follow(
        ckpts,
        tmp_path / "run",
        lambda: (ckpts / "checkpoint-100" / "tokenizer.json").write_bytes(tokenizer),
    )
    assert kinds(told)[-1] == (SCORED, "checkpoint-100")
    assert [one.kind for one in told].count(BROKEN) == 1


def test_a_trainers_folder_is_whole_with_its_state(ckpts, tmp_path):
    folder = ckpts / "checkpoint-200"
    (folder / "training_args.bin").write_bytes(b"pickled")
    state = json.dumps({"global_step": 200, "num_input_tokens_seen": 777})
    told = follow(
        ckpts,
        tmp_path / "run",
        lambda: (folder / "trainer_state.json").write_text(state[:20]),
        lambda: (folder / "trainer_state.json").write_text(state),
    )
    assert kinds(told) == [(SCORED, "checkpoint-100"), (SCORED, "checkpoint-200")]
    assert told[-1].summary.tokens_seen == 777
    # One that was saved on its own and left alone has no state to wait for.
    (folder / "trainer_state.json").unlink()
    once = {"once": True, "tokens_per_step": 10, **OLD}
    assert kinds(watch(ckpts, tmp_path / "b", GRID, **once))[-1] == (UNDONE, "checkpoint-200")
    age(folder, 601)
    assert (SCORED, "checkpoint-200") in kinds(watch(ckpts, tmp_path / "c", GRID, **once))


def test_one_that_vanishes_is_named(ckpts, tmp_path, monkeypatch):
    shutil.copytree(ckpts / "checkpoint-200", ckpts / "checkpoint-50")
    (ckpts / "checkpoint-50" / "model.safetensors").write_bytes(b"half")
    told = follow(ckpts, tmp_path / "run", lambda: shutil.rmtree(ckpts / "checkpoint-50"), lambda: None)
    assert sorted(kinds(told)) == [
        (SCORED, "checkpoint-100"), (SCORED, "checkpoint-200"), (VANISHED, "checkpoint-50"),
    ]  # fmt: skip
    # In the middle of being scored.
    scored = watching.score_grid

    def removed_under_its_hands(checkpoint, *args, **kwargs):
        if checkpoint.name == "checkpoint-100":
            shutil.rmtree(checkpoint.path)
        return scored(checkpoint, *args, **kwargs)

    monkeypatch.setattr(watching, "score_grid", removed_under_its_hands)
    seen = watch(ckpts, tmp_path / "other", GRID, tokens_per_step=10, once=True, **OLD)
    assert kinds(seen) == [(VANISHED, "checkpoint-100"), (SCORED, "checkpoint-200")]


def test_files_that_have_only_just_changed_are_left_to_settle(ckpts, tmp_path):
    (ckpts / "checkpoint-200" / "config.json").touch()
    slept = []
    options = {"tokens_per_step": 10, "execution": Execution(self_check=False), "once": True}
    seen = watch(ckpts, tmp_path / "a", GRID, settle_s=30.0, sleep=slept.append, **options)
    assert slept == [30.0]
    assert kinds(seen) == [(SCORED, "checkpoint-100"), (UNDONE, "checkpoint-200")]
    assert seen[-1].reason == "its files have only just changed"


def test_names_that_say_unfinished_are_passed_over(ckpts, tmp_path):
    for name in ("tmp-checkpoint-300", ".checkpoint-300", "logs"):
        shutil.copytree(ckpts / "checkpoint-200", ckpts / name)
    for file in (ckpts / "logs").iterdir():
        file.unlink()
    (ckpts / "logs" / "events").write_text("no checkpoint")
    seen = watch(ckpts, tmp_path / "run", GRID, tokens_per_step=10, once=True, **OLD)
    assert [one.checkpoint for one in seen] == ["checkpoint-100", "checkpoint-200"]


def test_tokens_that_cannot_be_told_are_a_fault_of_the_folder(ckpts, tmp_path):
    seen = watch(ckpts, tmp_path / "run", GRID, tokens={"checkpoint-200": 5000}, once=True, **OLD)
    assert kinds(seen) == [(BROKEN, "checkpoint-100"), (SCORED, "checkpoint-200")]
    assert seen[0].reason.startswith("cannot tell how many tokens it has seen (")
    assert seen[0].reason.endswith("; say it with --tokens checkpoint-100=1.2B, or --tokens-per-step N")
    assert seen[1].summary.tokens_seen == 5000


def test_it_ends_when_the_verdict_is_as_asked(ckpts, tmp_path, monkeypatch):
    judge = watching.summarise

    def saturated_at_first_sight(run, name):
        found = judge(run, name)
        at = found.lengths[-1]
        object.__setattr__(at, "verdict", "saturated")
        return found

    monkeypatch.setattr(watching, "summarise", saturated_at_first_sight)
    seen = watch(ckpts, tmp_path / "run", GRID, tokens_per_step=10, stop_when="saturated", sleep=Turns(), **OLD)
    assert kinds(seen) == [(SCORED, "checkpoint-100")]


def test_mistakes_are_told_before_the_first_look(ckpts, tmp_path):
    with pytest.raises(LccpError, match="unknown stop_when 'never'; known: saturated"):
        watch(ckpts, tmp_path / "run", GRID, stop_when="never")
    with pytest.raises(LccpError, match="got every_s=0"):
        watch(ckpts, tmp_path / "run", GRID, every_s=0)
    with pytest.raises(LccpError, match="no folder at"):
        watch(tmp_path / "nowhere", tmp_path / "run", GRID, once=True)
    watch(ckpts, tmp_path / "run", GRID, tokens_per_step=10, once=True, **OLD)
    with pytest.raises(LccpError, match=r"holds another study: lengths there is \[96\], asked \[128\]"):
        watch(ckpts, tmp_path / "run", NiahGrid(lengths=(128,), depths=(0, 100), samples=2), once=True)


def test_a_folder_that_is_not_there_yet_is_waited_for(ckpts, tmp_path):
    told = follow(tmp_path / "later", tmp_path / "run", lambda: shutil.copytree(ckpts, tmp_path / "later"))
    assert [one.checkpoint for one in told] == ["checkpoint-100", "checkpoint-200"]


class TestCommand:
    OPTIONS = ("--lengths", "96", "--depths", "0,100", "--tokens-per-step", "10", "--settle", "0", "--once")

    def test_lines_for_people_and_for_scripts(self, ckpts, tmp_path):
        runner = CliRunner()
        result = runner.invoke(app, ["watch", str(ckpts), "--out", str(tmp_path / "run"), *self.OPTIONS])
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert lines[0].startswith("checkpoint-100 (1,000 tokens)  96: ")
        assert lines[-1].endswith("; cannot tell")
        result = runner.invoke(
            app, ["watch", str(ckpts), "--out", str(tmp_path / "run"), *self.OPTIONS, "--format", "json"]
        )
        records = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(record["event"], record["checkpoint"]) for record in records] == [
            ("scored", "checkpoint-100"),
            ("scored", "checkpoint-200"),
        ]
        assert records[0]["lengths"][0]["length"] == 96

    def test_a_broken_one_is_named_on_standard_error(self, ckpts, tmp_path):
        (ckpts / "checkpoint-100" / "config.json").write_text("{")
        age(ckpts / "checkpoint-100", 500)
        result = CliRunner().invoke(app, ["watch", str(ckpts), "--out", str(tmp_path / "run"), *self.OPTIONS])
        assert result.exit_code == 2
        assert "checkpoint-100: broken: " in result.stderr
        assert result.stdout.startswith("checkpoint-200")

    def test_what_it_does_not_do_is_refused(self, ckpts, tmp_path):
        runner, base = CliRunner(), ["watch", str(ckpts), "--out", str(tmp_path / "run")]
        assert "takes" not in runner.invoke(app, [*base, "--format", "csv"]).stdout
        assert "--format csv: a watch prints lines" in runner.invoke(app, [*base, "--format", "csv"]).stderr
        refused = runner.invoke(app, [*base, "--task", "interference"])
        assert refused.exit_code == 2
        assert "take --task niah or longbio" in refused.stderr

    def test_ctrl_c_and_a_second_watcher(self, ckpts, tmp_path):
        out = tmp_path / "run"
        command = [sys.executable, "-m", "lccp_interp.cli", "watch", str(ckpts), "--out", str(out), *self.OPTIONS[:-1]]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            first = process.stdout.readline()
            with pytest.raises(LccpError, match="is being worked on by process"), driving(out):
                pass
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert first.startswith("checkpoint-100")
        assert process.returncode == 2
        assert errors.strip().endswith("lccp: interrupted; what is finished stays, the same command resumes")
        assert "Traceback" not in errors
        assert Run.open(out).checkpoints.height == 2
        with driving(out):
            pass
