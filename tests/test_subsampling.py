"""How cheap a monitor may be: a slow twin, the choice of heads and of the cheapest, refusals, the command."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from scipy.stats import pearsonr, spearmanr
from synthetic import write_run

from lccp_interp.dynamics import advice, budget, census, score_table
from lccp_interp.dynamics.heads import is_retrieval_head
from lccp_interp.dynamics.subsampling import MEASURES, _curves, _Study
from lccp_interp.schema import LccpError

LENGTHS = (1024, 4096)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("budget") / "run", lengths=LENGTHS, n_needles=4)


@pytest.fixture(scope="module")
def table(run):
    return budget(run, n_draws=100)


def losses(run, length):
    """Mean loss of each case at each checkpoint, `[case][checkpoint]`, by dictionaries."""
    found = {
        (row["case_id"], row["tokens_seen"]): float(np.mean(row["answer_loss_nats"]))
        for row in run.outcomes.collect().iter_rows(named=True)
    }
    cases = sorted(run.cases.filter(length=length)["case_id"])
    tokens = sorted({at for _, at in found})
    return np.array([[found[case, at] for at in tokens] for case in cases])


def test_every_choice_has_a_row_with_its_price(run, table):
    outcome_rows = table.filter(measure="loss_nats")
    assert outcome_rows.select("length", "n_cases").rows() == [
        (length, size) for length in (4096, 1024) for size in (1, 2, 4, 8, 16, 20)
    ]
    assert set(table["n"]) == {16}
    assert (table["tokens_per_checkpoint"] == table["length"] * table["n_cases"]).all()
    # The paper's probe: 0.25 billion tokens, two epochs.
    assert table["sft_share"].to_list() == pytest.approx((table["tokens_per_checkpoint"] / 500_000_000).to_list())
    assert table["measure"].unique(maintain_order=True).to_list() == list(MEASURES)


@pytest.mark.parametrize(("method", "statistic"), [("pearson", pearsonr), ("spearman", spearmanr)])
def test_quantiles_are_those_of_drawn_curves(run, method, statistic):
    rows = budget(run, measures=["loss_nats"], n_cases=[3], n_draws=40, seed=7, method=method)
    full = losses(run, 4096).mean(axis=0)
    for length in LENGTHS:
        values = losses(run, length)
        draws = np.random.default_rng([7, length, 3]).multinomial(3, np.full(20, 1 / 20), size=40)
        slow = sorted(statistic(np.repeat(values, times, axis=0).mean(axis=0), full).statistic for times in draws)
        row = rows.filter(length=length).row(0, named=True)
        assert row["r_low"] == pytest.approx(slow[int(0.05 * 39)], abs=1e-6)
        assert row["r_median"] == pytest.approx(slow[int(0.5 * 39)], abs=1e-6)


def test_more_cases_follow_the_full_curve_better(table):
    for measure in ("answer_ppl", "loss_nats", "n_retrieval_heads", "mean_initial_score"):
        low = table.filter(pl.col("measure") == measure, pl.col("length") == 4096, pl.col("n_heads").fill_null(5) == 5)
        assert low["r_low"][-1] > low["r_low"][0]
        assert low["r_low"][-1] <= low["r_median"][-1] <= 1


def test_heads_followed_are_the_best_of_the_base_checkpoint(run, table):
    base = score_table(run, length=4096).filter(checkpoint="pretrain-3.6M")
    assert base.filter(pl.col("score") > 0.1).height == 5
    rows = table.filter(measure="mean_initial_score")
    assert rows["n_heads"].unique().sort().to_list() == [1, 4, 5]
    # Head (2, 1) is the best at the base and stays at 0.75: alone it only shows noise.
    alone = rows.filter(n_heads=1, n_cases=20, length=4096).row(0, named=True)
    together = rows.filter(n_heads=5, n_cases=20, length=4096).row(0, named=True)
    assert alone["r_median"] < together["r_median"]
    asked = budget(run, measures=["mean_initial_score"], n_heads=[2, 99], n_cases=[4], n_draws=20)
    assert asked["n_heads"].to_list() == [2, 5, 2, 5]
    assert table.filter(pl.col("measure") != "mean_initial_score")["n_heads"].is_null().all()


def test_one_case_and_all_heads_is_the_curve_of_that_case(tmp_path):
    run = write_run(tmp_path / "one", lengths=(256,), n_needles=1, change=only_depth_zero_counts)
    rows = budget(run, measures=["mean_initial_score", "niah_score"], n_draws=20)
    # Four of five cases are undefined: a draw of one case has a curve only if it is the fifth.
    one = rows.filter(measure="mean_initial_score", n_cases=1).row(0, named=True)
    assert 0 < one["n_undefined"] < 20
    assert np.isnan(one["r_low"])
    assert one["reason"] == f"{one['n_undefined']} of 20 draws flat or undefined at a checkpoint"
    assert not one["reaches"]


def only_depth_zero_counts(_, result):
    if "-d0-" in result.case_id:
        return result
    return dataclasses.replace(result, scores={name: np.full_like(v, np.nan) for name, v in result.scores.items()})


def test_the_cheapest_that_reaches_the_level_is_marked(table):
    for measure in MEASURES:
        rows = table.filter(measure=measure)
        reaching = rows.filter(pl.col("r_low") >= 0.95)
        assert rows["reaches"].to_list() == (rows["r_low"].fill_nan(-1) >= 0.95).to_list()
        best = rows.filter("cheapest")
        assert best.height == min(1, reaching.height)
        if best.height:
            assert best["tokens_per_checkpoint"][0] == reaching["tokens_per_checkpoint"].min()
    assert table.filter("cheapest").height > 0


def test_a_level_above_the_cheapest_costs_more(run, table):
    lax = table.filter("cheapest", measure="loss_nats").row(0, named=True)
    strict = budget(run, measures=["loss_nats"], level=(lax["r_low"] + 1) / 2, n_draws=100).filter("cheapest")
    assert strict["tokens_per_checkpoint"][0] > lax["tokens_per_checkpoint"]


def test_detrended_is_harder_than_levels(run):
    low = {
        transform: budget(run, measures=["loss_nats"], n_cases=[1], transform=transform, n_draws=50)["r_low"].to_list()
        for transform in ("levels", "detrended", "differences")
    }
    for levels, detrended, differences in zip(*low.values(), strict=True):
        assert detrended < levels
        assert differences < levels


def test_shorter_reference_leaves_longer_cases_out(run):
    assert set(budget(run, measures=["niah_score"], length=1024, n_draws=20)["length"]) == {1024}


def test_how_it_lies_on_disk_changes_nothing(tmp_path, run, table):
    other = write_run(tmp_path / "reversed", lengths=LENGTHS, n_needles=4, n_shards=5, reverse=True)
    again = budget(other, n_draws=100)
    # The order in which numbers are summed may differ in the last digit.
    assert_frame_equal(again, table, abs_tol=1e-9)


def test_without_a_full_curve_one_row_says_why(tmp_path):
    def silent(_, result):
        return dataclasses.replace(
            result,
            scores={name: np.zeros_like(values) for name, values in result.scores.items()},
            greedy_ids=(1, 2, 3),
        )

    run = write_run(tmp_path / "silent", lengths=(256,), n_needles=1, change=silent)
    table = budget(run, measures=["niah_score", "n_retrieval_heads", "mean_initial_score"], n_draws=20)
    assert table["reason"].to_list() == [
        "the full curve has no variance",
        "the full curve has no variance",
        "the full curve is defined at 0 checkpoints, needs 4",
    ]
    assert table["r_median"].is_nan().all()
    assert not table["reaches"].any()
    assert advice(table, level=0.95)[0] == ("niah_score: nothing tried reaches 0.95 (the full curve has no variance)")


def test_few_checkpoints_and_bad_numbers_are_refused(tmp_path, run):
    few = write_run(tmp_path / "few", lengths=(256,), n_needles=1, only=[0, 1, 2])
    with pytest.raises(
        LccpError, match="has 3 scored checkpoints; a curve needs at least 4 to be compared: score more"
    ):
        budget(few)
    for arguments, message in [
        ({"level": 1.0}, "level must lie between 0 and 1, got 1.0"),
        ({"measures": ["loss"]}, "unknown measure 'loss' in budget"),
        ({"transform": "diff"}, "unknown transform 'diff' in budget"),
        ({"n_draws": 5}, "n_draws must be at least 20"),
        ({"n_cases": [0]}, r"n_cases must be numbers from 1 on, got \[0\]"),
        ({"length": 999}, "has no cases of 999 tokens; it has 1024, 4096"),
    ]:
        with pytest.raises(LccpError, match=message):
            budget(run, **arguments)


def test_advice_names_the_choice_and_its_price(table):
    row = table.filter("cheapest", measure="loss_nats").row(0, named=True)
    sentence = next(text for text in advice(table, level=0.95) if text.startswith("loss_nats"))
    assert f"{row['n_cases']} case" in sentence
    assert f"of {row['length']} tokens" in sentence
    assert f"{row['tokens_per_checkpoint']:,} tokens per checkpoint" in sentence
    assert "of the SFT probe's 500,000,000" in sentence
    assert len(advice(table, level=0.95)) == len(MEASURES)


def test_command(lccp, run):
    code, out, err = lccp("budget", run.path, "--measures", "loss_nats", "--format", "json")
    assert (code, err) == (0, "")
    records = json.loads(out)
    assert len(records) == 12
    assert sum(record["cheapest"] for record in records) == 1
    code, out, _ = lccp("budget", run.path, "--measures", "loss_nats,niah_score")
    assert code == 0
    assert "tokens_per_checkpoint" in out
    assert "of the SFT probe's 500,000,000" in out
    code, _, err = lccp("budget", run.path, "--measures", "loss")
    assert code == 2
    assert "unknown measure 'loss' in budget" in err
    assert err.count("\n") == 1


def test_heads_are_those_of_the_census(tmp_path):
    """Heads of layers 0 and 1 score as much on decoys: they count for nothing, drawn or not."""

    def with_decoys(i, result):
        scores = result.scores["retrieval"]
        jitter = 0.02 * (int(result.case_id.rsplit("-", 1)[1]) % 3 - 1)
        null = np.where(np.arange(len(scores))[:, None] < 2, scores + jitter, 0.0).astype(np.float32)
        return dataclasses.replace(result, scores={**result.scores, "retrieval@decoy": null})

    run = write_run(tmp_path / "run", lengths=(256,), n_needles=4, change=with_decoys)
    study = _Study(run, 256, "retrieval", "teacher_forced")
    found = census(score_table(run))
    table = score_table(run).filter(checkpoint="pretrain-3.6M").sort("layer", "head")
    initial = np.flatnonzero(is_retrieval_head(table).to_numpy())
    assert sorted(study.initial_heads) == initial.tolist()
    assert len(initial) == found["n_initial"][0] < (table["score"] > 0.1).sum()
    values = study.head_values(256)
    everything = np.ones((1, len(values)))
    count = _curves(values, everything, "n_retrieval_heads", None, study.may_retrieve(256))[0]
    assert count.tolist() == found["n_retrieval_heads"].to_list()
    mean = _curves(values, everything, "mean_initial_score", study.initial_heads, None)[0]
    np.testing.assert_allclose(mean, found["mean_initial_score"].to_numpy(), rtol=1e-6)
    assert budget(run, measures=["n_retrieval_heads"], n_draws=20, n_cases=[4]).height == 1
