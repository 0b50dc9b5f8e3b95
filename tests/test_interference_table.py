"""Distance and interference as groups of outcomes: the means are those of a loop, other runs are refused both ways."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import checkpoints, results, write_run

from lccp_interp.dynamics import interference_table, outcome_table
from lccp_interp.schema import Case, LccpError, Span
from lccp_interp.store import Run, RunWriter, result_frames


def interference_run(path) -> Run:
    batch = [
        Case(
            f"interference-{distance}-i{before}-s{sample}", "interference", distance + before + 9 + sample, 0.5,
            f"s{sample}", f"h{sample}", sample, 0, tuple(range(8)), (1, 2, 3), Span(1, 5), Span(2, 5),
            distance=distance, interference=before,
        )
        for distance in (64, 256)
        for before in (0, 512)
        for sample in range(5)
    ]  # fmt: skip
    trajectory = checkpoints()[2:5]
    writer = RunWriter(path, {"task": "interference", "seed": 0, "mode": "teacher_forced"}, batch)
    writer.add_checkpoints(trajectory)
    answers = {case.case_id: case.answer_ids for case in batch}
    for i, checkpoint in enumerate(trajectory):
        scores, outcomes = result_frames(
            checkpoint, "teacher_forced", results(i, batch, np.random.default_rng(i)), answers
        )
        writer.append(checkpoint.name, 0, scores=scores, outcomes=outcomes)
    return Run.open(path)


def test_means_over_cells_are_those_of_a_loop(tmp_path):
    run = interference_run(tmp_path / "run")
    table = interference_table(run)
    assert table.height == 3 * 4
    assert set(table["n"]) == {5}
    cases = {row["case_id"]: row for row in run.cases.iter_rows(named=True)}
    outcomes = run.outcomes.collect().to_dicts()
    for row in table.iter_rows(named=True):
        ppls = [
            outcome["answer_ppl"]
            for outcome in outcomes
            if outcome["checkpoint"] == row["checkpoint"]
            and cases[outcome["case_id"]]["distance"] == row["distance"]
            and cases[outcome["case_id"]]["interference"] == row["interference"]
        ]
        assert row["answer_ppl"] == pytest.approx(sum(ppls) / 5, rel=1e-6)
        assert row["answer_ppl_low"] <= row["answer_ppl"] <= row["answer_ppl_high"]


def test_each_table_refuses_the_other_task(tmp_path):
    with pytest.raises(
        LccpError, match=r"no cases of task 'niah' \(it has: interference\); score with --task niah, or"
    ):
        outcome_table(interference_run(tmp_path / "run"))
    with pytest.raises(LccpError, match=r"no cases of task 'interference' \(it has: niah\); score with --task interf"):
        interference_table(write_run(tmp_path / "other", only=(3,)))
