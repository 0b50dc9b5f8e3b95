"""The benchmarks' page and script; nothing is timed here."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu, run, timing


def test_the_page_shows_the_numbers_that_are_kept():
    kept = run.read(run.RESULTS), run.read(gpu.RESULTS)
    assert run.README.read_text() == run.render(*kept), "run make bench"
    front = run.FRONT.read_text()
    assert front == run.with_performance(front, run.performance(*kept)), "run make bench"


def test_rounds_are_run_there_and_back():
    order: list[str] = []

    def clock(name):
        return lambda: float(order.append(name) or len(order))

    rounds = timing.interleave({"a": clock("a"), "b": clock("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert rounds == [{"a": 1.0, "b": 2.0}, {"b": 3.0, "a": 4.0}, {"a": 5.0, "b": 6.0}]
    assert timing.ratio(rounds, "b", "a") == {"median": 1.2, "min": 0.75, "max": 2.0}


def test_without_a_gpu_the_script_says_so_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu.main(["--out", str(tmp_path / "out.json")])
    assert "No CUDA device here: nothing was measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_gpu_script_runs_every_stage_on_a_toy(tmp_path, capsys):
    out = tmp_path / "out.json"
    gpu.main(["--device", "cpu", "--tiny", "--out", str(out)])
    results = json.loads(out.read_text())
    assert list(results) == list(gpu.STAGES)
    assert all("skipped" not in record for stage in results.values() for record in stage["records"])
    page = "\n".join(gpu.table(results))
    assert all(heading in page for heading in gpu.HEADINGS.values())
    assert page in capsys.readouterr().out


def test_a_stage_without_time_or_memory_left_says_why():
    rig = gpu.Rig("cpu", tiny=True, clock_s=-1.0, say=lambda text: None)
    results: dict = {}
    gpu.run_stages(rig, ["lengths"], results, lambda current: None)
    assert results["lengths"]["records"] == [{"length": 0, "skipped": "no time left on the clock"}]
    assert "| all | skipped: no time left on the clock |" in "\n".join(gpu.table(results))
    assert gpu.guarded(rig, 64, 3.0, dict) == {"length": 64, "skipped": "3 s foreseen, 0 s left on the clock"}


def test_an_unknown_part_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "captur"])
    assert "no part 'captur'; known: capture, peers, grid, demo, analysis, scaling" in capsys.readouterr().err
