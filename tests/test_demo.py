"""The demo on tiny random checkpoints: every stage joins the run, a second call does nothing, no figure lacks data."""

from __future__ import annotations

import contextlib

import pytest

from lccp_interp import demo
from lccp_interp.checkpoints import find_checkpoints
from lccp_interp.figures import FIGURES, left_out
from lccp_interp.store import Run


@pytest.fixture
def small_demo(trajectory, monkeypatch):
    from lccp_interp import sweep

    monkeypatch.setattr(demo, "bundled_trajectory", lambda: find_checkpoints([trajectory]))
    original = sweep.score
    monkeypatch.setattr(
        sweep, "score", lambda *args, **options: original(*args, lengths=[64, 128], depths=[0, 100], **options)
    )
    monkeypatch.setattr(demo, "DISTANCES", (16, 32))
    monkeypatch.setattr(demo, "INTERFERENCES", (0, 32))
    monkeypatch.setattr(demo, "CORPORA", ("stories",))
    monkeypatch.setattr(demo, "CORPUS_LENGTH", 64)
    monkeypatch.setattr(demo, "CORPUS_DOCUMENTS", 2)
    monkeypatch.setattr(demo, "PROBE_TASKS", ("longbio-standard", "mrcr-2needle"))
    monkeypatch.setattr(demo, "PROBE_LENGTHS", "256-320")


def bars(opened):
    @contextlib.contextmanager
    def bar(name):
        opened.append(name)
        yield lambda done, total, message: None

    return bar


def test_every_stage_joins_the_run(small_demo, tmp_path):
    opened, notes = [], []
    run = demo.run_demo(tmp_path / "demo", samples=2, bar=bars(opened), note=notes.append)
    assert opened == ["scoring", "interference", "reading", "probing", "heads after"]
    assert notes == []
    assert set(run.probes.collect()["benchmark"]) == {"corpus-ppl", "LongPPL", "LongBio-style", "MRCR-style"}
    # From the base on: the last checkpoint of the stage before, and all of the last stage.
    assert run.probes.collect()["checkpoint"].unique().sort().to_list() == ["lccp-1", "lccp-2", "pretrain-0"]
    companion = Run.open(run.path / "interference")
    assert set(companion.cases["task"]) == {"interference"}
    assert Run.open(run.path / "sft" / "sft" / "heads").checkpoints["name"].to_list() == ["pretrain-0", "lccp-2"]
    # Nothing is missing for any figure.
    assert not left_out(run)
    assert len(FIGURES) >= 12
    stamps = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.parquet")}
    demo.run_demo(tmp_path / "demo", samples=2, bar=bars([]), note=notes.append)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*.parquet")} == stamps


def test_in_a_hurry_and_without_the_packages(small_demo, tmp_path, monkeypatch):
    opened, notes = [], []
    run = demo.run_demo(tmp_path / "demo", samples=1, quick=True, bar=bars(opened))
    assert opened == ["scoring"]
    assert run.probes.collect().is_empty()
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    run = demo.run_demo(tmp_path / "demo", samples=1, bar=bars(opened), note=notes.append)
    assert notes == [
        "without fine-tuning: the packages trl, peft and datasets are missing (install lccp_interp[train])"
    ]
    assert "LongBio-style" not in set(run.probes.collect()["benchmark"])
