"""The bridge to lm-evaluation-harness: a task of our own, offline, on every checkpoint; results join the run."""

from __future__ import annotations

import builtins
import json

import pytest

from lccp_interp.behaviour.harness import probe_with_lm_eval
from lccp_interp.schema import LccpError
from lccp_interp.store import Run
from lccp_interp.sweep import score

TASK = """task: who_lives_where
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: generate_until
test_split: train
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def run(trajectory, tmp_path) -> Run:
    return score(trajectory, tmp_path / "run", lengths=[64], depths=[50], samples=1, self_check=False)


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"{name} grew up in {city}. Where?", "answer": city}
        for name, city in [("Mara", "Oslo"), ("Tom", "Lima"), ("Ines", "Cairo")]
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_results_of_every_checkpoint_join_the_run(run, tasks, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    told = []
    table = probe_with_lm_eval(
        run, ["who_lives_where"], include_path=tasks, progress=lambda *told_now: told.append(told_now)
    )
    assert table["checkpoint"].to_list() == ["pretrain-0", "lccp-1", "lccp-2"]
    assert set(table["benchmark"]) == {"who_lives_where"}
    assert set(table["metric"]) == {"exact_match"}
    assert set(table["n"]) == {3}
    assert told[-1] == (3, 3, "done")
    held = Run.open(run.path).probes.collect()
    assert held.height == 3
    folder = run.path / "lm_eval" / "lccp-1"
    samples = next(folder.glob("samples_who_lives_where_*.jsonl")).read_text().splitlines()
    assert len(samples) == 3
    # Again: nothing is evaluated, nothing doubled.
    stamp = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = probe_with_lm_eval(run, ["who_lives_where"], include_path=tasks)
    assert again.equals(table)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamp
    assert Run.open(run.path).probes.collect().height == 3


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_told_before_anything_is_loaded(run, tasks):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    with pytest.raises(LccpError, match=r"lm-eval has no task 'who_lives_wher'; did you mean who_lives_where"):
        probe_with_lm_eval(run, ["who_lives_wher"], include_path=tasks)
    with pytest.raises(LccpError, match="no folder of tasks at"):
        probe_with_lm_eval(run, ["x"], include_path=tasks / "none")


def test_without_the_package_or_a_task(run, monkeypatch):
    with pytest.raises(LccpError, match="--lm-eval names no task"):
        probe_with_lm_eval(run, [])
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(LccpError, match=r"--lm-eval needs the package lm-eval; install lccp_interp\[eval\]"):
        probe_with_lm_eval(run, ["x"])
