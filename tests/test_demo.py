"""The demo on tiny random checkpoints: every stage joins the run, a second call does nothing, no figure lacks data."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest

from lccp_interp import demo
from lccp_interp.checkpoints import find_checkpoints
from lccp_interp.figures import FIGURES, TABLES, left_out
from lccp_interp.store import Run
from lccp_interp.study import run_study, stages


@pytest.fixture
def small_demo(trajectory, monkeypatch):
    monkeypatch.setattr(stages, "bundled_trajectory", lambda: find_checkpoints([trajectory]))
    smaller = {
        "LENGTHS": (64, 128), "DEPTHS": (0, 100), "DISTANCES": (16, 32), "INTERFERENCES": (0, 32),
        "CORPORA": ("stories",), "CORPUS_LENGTH": 64, "CORPUS_DOCUMENTS": 2,
        "PROBE_TASKS": ("longbio-standard", "mrcr-2needle"), "PROBE_LENGTHS": "256-320",
        "FORMATS": ("png", "csv"), "REMOVED": (1, 2), "N_CASES": 4, "N_DRAWS": 2,
    }  # fmt: skip
    for name, value in smaller.items():
        monkeypatch.setattr(demo, name, value)


def without_trl(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "trl" else found(name, *more))


def bars(opened):
    @contextlib.contextmanager
    def bar(name):
        opened.append(name)
        yield lambda done, total, message: None

    return bar


def test_every_stage_joins_the_run(small_demo, tmp_path):
    opened, notes = [], []
    study = demo.demo_study(tmp_path / "demo", samples=2, length=128)
    run = run_study(study, bar=bars(opened), note=notes.append)
    assert opened == [
        "scoring", "interference", "reading", "probing", "heads after", "removing heads", "figures", "report",
    ]  # fmt: skip
    assert notes == []
    assert set(run.probes.collect()["benchmark"]) == {"corpus-ppl", "LongPPL", "LongBio-style", "MRCR-style"}
    # From the base on: the last checkpoint of the stage before, and all of the last stage.
    assert run.probes.collect()["checkpoint"].unique().sort().to_list() == ["lccp-1", "lccp-2", "pretrain-0"]
    companion = Run.open(run.path / "interference")
    assert set(companion.cases["task"]) == {"interference"}
    assert Run.open(run.path / "sft" / "sft" / "heads").checkpoints["name"].to_list() == ["pretrain-0", "lccp-2"]
    # No figure lacks data; three checkpoints are too few for tables of correlations.
    absent = {name for names in left_out(run).values() for name in names}
    assert not absent & set(FIGURES)
    assert absent <= set(TABLES)
    assert len(FIGURES) >= 12
    assert (run.path / "report.html").is_file()
    stamps = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.parquet")}
    run_study(study, bar=bars([]), note=notes.append)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*.parquet")} == stamps


def test_in_a_hurry_first_and_whole_without_the_packages(small_demo, tmp_path, monkeypatch):
    opened = []
    quick = demo.demo_study(tmp_path / "demo", samples=1, length=128, quick=True)
    run = run_study(quick, bar=bars(opened))
    assert opened == ["scoring", "figures", "report"]
    assert run.probes.collect().is_empty()
    without_trl(monkeypatch)
    run = run_study(demo.demo_study(tmp_path / "demo", samples=1, length=128), bar=bars(opened))
    assert "LongBio-style" not in set(run.probes.collect()["benchmark"])
