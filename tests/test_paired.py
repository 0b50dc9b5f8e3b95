"""Heads across a step: paired differences, events only where the whole interval says so, mismatches refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic import write_run

from lccp_interp.dynamics.paired import paired_census, paired_heads
from lccp_interp.dynamics.selection import head_values
from lccp_interp.schema import LccpError


def tuned(i, result):
    """Fine-tuning gives head 0-0 a score of 0.5, takes that of 2-1, and lifts 3-7 to where noise may be all."""
    rng = np.random.default_rng(list(result.case_id.encode()))
    scores = result.scores["retrieval"].copy()
    scores[0, 0] = 0.5 + rng.normal(0, 0.02)
    scores[2, 1] = 0.0
    scores[3, 7] = 2.5 if result.case_id.endswith("-0") else 0.0  # one needle of eight
    return replace(result, scores=dict.fromkeys(result.scores, scores))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("paired")
    options = {"lengths": (256, 1024), "only": (0, 3, 8)}
    return write_run(root / "base", **options), write_run(root / "sft", **options, change=tuned)


def events(table, checkpoint):
    return {(r["layer"], r["head"]): r["event"] for r in table.filter(checkpoint=checkpoint).iter_rows(named=True)}


def test_births_and_deaths_across_the_step(runs):
    table = paired_heads(*runs)
    assert table["checkpoint"].unique(maintain_order=True).to_list() == ["pretrain-0.5M", "pretrain-3.6M", "lccp-0.5M"]
    at_base = events(table, "pretrain-3.6M")
    assert at_base[0, 0] == "birth"
    assert at_base[2, 1] == "death"
    assert at_base[3, 4] == "stays"
    assert at_base[3, 7] == "undecided"
    assert at_base[1, 1] == ""
    # Before its birth in training there is nothing of 2-1 to take.
    assert events(table, "pretrain-0.5M")[2, 1] == ""
    counts = paired_census(table).row(1, named=True)
    assert (counts["n_births"], counts["n_deaths"], counts["n_undecided"], counts["n_heads"]) == (1, 1, 1, 32)


def test_differences_equal_a_loop_over_cases(runs):
    table = paired_heads(*runs, length=256)
    one, two = (head_values(run, metric="retrieval", length=256, mode=None) for run in runs)
    for row in table.iter_rows(named=True):
        i = one.checkpoints["checkpoint"].to_list().index(row["checkpoint"])
        k = one.heads.tolist().index([row["layer"], row["head"]])
        differences = [float(b) - float(a) for a, b in zip(one.values[i, :, k], two.values[i, :, k], strict=True)]
        assert row["change"] == pytest.approx(sum(differences) / len(differences), abs=1e-9)
        assert row["after"] - row["before"] == pytest.approx(row["change"], abs=1e-7)
        assert row["ci_low"] <= row["change"] <= row["ci_high"]
        assert row["n"] == len(differences)


def test_a_run_beside_itself_has_no_events(runs):
    table = paired_heads(runs[0], runs[0])
    assert set(table["event"]) == {"stays", ""}
    assert table["change"].to_list() == [0.0] * table.height


def test_undefined_scores_are_left_out_on_both_sides(tmp_path, runs):
    def forget(i, result):
        if result.case_id.endswith("-0"):
            nothing = np.full_like(result.scores["retrieval"], np.nan)
            return replace(result, scores=dict.fromkeys(result.scores, nothing))
        return result

    other = write_run(tmp_path / "nan", lengths=(256, 1024), only=(3,), change=forget)
    table = paired_heads(runs[0], other)
    assert set(table["n"]) == {35}
    assert set(table["change"]) == {0.0}
    assert table["checkpoint"].unique().to_list() == ["pretrain-3.6M"]


def test_what_cannot_be_paired_is_refused(tmp_path, runs):
    with pytest.raises(LccpError, match=r"have no scored checkpoint in common: .*lccp-0.5M and pretrain-1.5M"):
        paired_heads(runs[0], write_run(tmp_path / "others", lengths=(256, 1024), only=(1,)))
    with pytest.raises(LccpError, match="asked other cases at 1024 tokens"):
        paired_heads(runs[0], write_run(tmp_path / "cases", lengths=(256, 1024), n_needles=3, only=(3,)))

    def cut(i, result):
        return replace(
            result, layers=result.layers[:2], scores={name: values[:2] for name, values in result.scores.items()}
        )

    with pytest.raises(LccpError, match=r"has 32 heads in 4 layers, .* has 16 in 2; compare runs of one architecture"):
        paired_heads(runs[0], write_run(tmp_path / "small", lengths=(256, 1024), only=(3,), change=cut))


def test_the_command_lists_what_changed(lccp, runs):
    code, out, err = lccp("across", runs[0].path, runs[1].path, "--format", "json")
    assert code == 0
    rows = json.loads(out)
    assert {row["event"] for row in rows} == {"birth", "death", "undecided"}
    assert "pretrain-3.6M: 1 born, 1 died, " in err
    code, out, _ = lccp("across", runs[0].path, runs[1].path, "--all", "--format", "csv")
    assert len(out.splitlines()) == 1 + 3 * 32
