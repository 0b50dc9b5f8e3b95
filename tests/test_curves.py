"""Curves of metrics: shares of right answers have no exact ends, heads are those of the census, probes as they are."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import polars as pl
import pytest
from synthetic import write_run
from test_saturation import TOKENS, curve, probe_rows, probes

from calibration.saturation import simulate_scores
from lccp_interp.dynamics import census, metric_names, metric_series, run_series, score_table
from lccp_interp.dynamics.curves import metric_curves, share_variance, with_share_variance
from lccp_interp.dynamics.saturation import judge_and_fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("curves") / "run", lengths=(256,), n_needles=4)


def test_a_share_has_the_variance_of_a_smoothed_one():
    """By hand: 20 independent cases, of which 0, 1, 10 and 20 are right, smoothed to 1, 2, 11 and 21 of 22."""
    right = np.array([0.0, 1, 10, 20])
    share, n = right / 20, np.full(4, 20)
    expected = [p * (1 - p) / 22 for p in (1 / 22, 2 / 22, 11 / 22, 21 / 22)]
    np.testing.assert_allclose(share_variance(share, share * (1 - share) / 20, n, 20), expected)
    # No checkpoint has spread: only the units are independent for sure.
    np.testing.assert_allclose(share_variance(np.zeros(2), np.zeros(2), np.full(2, 20), 4), [5 / 216, 5 / 216])
    # 40 cases in 8 clusters that vary as 16 independent ones would.
    known = share_variance(np.array([0.5, 0.0]), np.array([0.25 / 16, 0.0]), np.full(2, 40), 8)
    np.testing.assert_allclose(known[1], (1 / 18) * (17 / 18) / 18)
    # Cases that vary less than independent ones are still no more than they are.
    np.testing.assert_allclose(share_variance(np.array([0.5, 0]), np.array([1e-6, 0]), n[:2], 20)[1], expected[0])
    assert np.isnan(share_variance(np.array([0.5, np.nan]), np.array([0.01, 0]), n[:2], 20)).tolist() == [False, True]


def test_only_what_resampling_lacks_is_added():
    rng = np.random.default_rng(0)
    deviations = np.c_[np.zeros(4000), 11 * rng.normal(size=4000)]
    made = dataclasses.replace(
        curve([0.0, 50.0], TOKENS[:2], metric="niah_score", higher_is_better=True), deviations=deviations
    )
    smooth = with_share_variance(made, 20, whole=100, seed=3)
    assert smooth.deviations[:, 1] is not made.deviations[:, 1]
    np.testing.assert_array_equal(smooth.deviations[:, 1], deviations[:, 1])
    assert smooth.deviations[:, 0].std() == pytest.approx(100 * math.sqrt((1 / 22) * (21 / 22) / 22), rel=0.04)
    again, other = (with_share_variance(made, 20, whole=100, seed=seed).deviations for seed in (3, 4))
    assert np.array_equal(again, smooth.deviations)
    assert not np.array_equal(other, smooth.deviations)


def test_checkpoints_at_zero_do_not_rule_the_fit_of_a_score():
    """Scores that are 0 of 20 for long, in the order of a real run; its tokens are doubling, more or less."""
    right = [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 2, 3, 5]
    tokens = [0, 20, 41, 82, 123, 184, 246, 328, 451, 614, 860, 1188, 1638, 2130, 2621]
    rng = np.random.default_rng(0)
    cases = np.array([rng.permutation(20) < k for k in right]).T * 100.0
    weights = rng.multinomial(20, np.full(20, 1 / 20), size=500) / 20
    made = dataclasses.replace(
        curve(cases.mean(axis=0), tokens, metric="niah_score", higher_is_better=True),
        deviations=(weights @ cases - cases.mean(axis=0)) * math.sqrt(20 / 19),
    )
    _, raw = judge_and_fit(made)
    assert raw.best.fitted[-1] < made.values[-1] - made.deviations[:, -1].std()
    assert raw.extra_sd > 1
    smooth = with_share_variance(made, 20, whole=100, seed=0)
    _, found = judge_and_fit(smooth)
    # Within one standard error of the last value; the cases explain all scatter.
    assert found.best.fitted[-1] > made.values[-1] - smooth.deviations[:, -1].std()
    assert found.extra_sd == 0


def test_the_score_of_a_run_has_no_exact_end(tmp_path):
    def change(i, result):
        return dataclasses.replace(result, greedy_ids=(1, 2, 3) if i >= 8 else (0, 2, 3))

    run = write_run(tmp_path / "run", lengths=(256,), n_needles=4, change=change)
    table = metric_series(run, metrics=["niah_score"])
    assert table["value"].to_list() == [0.0] * 5 + [100.0] * 8
    # 20 cases, but nothing tells that more than the four pairs of needle and haystack are independent.
    np.testing.assert_allclose(table["stderr"], 100 * math.sqrt(5 / 216), rtol=0.15)
    assert metric_series(run, metrics=["niah_score"]).equals(table)


@pytest.mark.slow
def test_intervals_of_scores_cover_the_truth_and_need_the_smoothed_share():
    smooth, raw = simulate_scores(400), simulate_scores(400, smooth=False)
    assert 0.90 <= smooth.covered <= 0.98
    assert smooth.covered > raw.covered
    assert smooth.wrongly_saturated < 0.02
    assert smooth.wrongly_improving < 0.08


def with_decoys(i, result):
    """Decoys on which heads of layers 0 and 1 score as they do on needles, and by chance a little more or less."""
    scores = result.scores["retrieval"]
    jitter = 0.02 * (int(result.case_id.rsplit("-", 1)[1]) % 3 - 1)
    null = np.where(np.arange(len(scores))[:, None] < 2, scores + jitter, 0.05).astype(np.float32)
    return dataclasses.replace(result, scores={**result.scores, "retrieval@decoy": null})


def test_heads_are_counted_as_the_census_counts_them(tmp_path):
    run = write_run(tmp_path / "decoys", lengths=(256,), change=with_decoys)
    table = score_table(run).filter(pl.col("tokens_seen") >= 3_600_000)
    expected = census(table)
    by_threshold = census(table, rule="threshold")
    assert (expected["n_retrieval_heads"] < by_threshold["n_retrieval_heads"]).any()
    long = metric_series(run, metrics=["n_retrieval_heads", "mean_initial_score"], n_boot=50)
    for metric in ("n_retrieval_heads", "mean_initial_score"):
        np.testing.assert_allclose(long.filter(metric=metric)["value"], expected[metric])
    assert not np.allclose(expected["mean_initial_score"], by_threshold["mean_initial_score"])
    # Nor does it depend on how finely intervals are asked for.
    for options in ({"n_boot": 1}, {"n_boot": 333, "seed": 5, "confidence": 0.5}):
        assert score_table(run, **options)["above_null"].equals(score_table(run)["above_null"])
    cheap, _ = run_series(run, stage="lccp")
    for metric in ("n_retrieval_heads", "mean_initial_score"):
        np.testing.assert_allclose(cheap.filter(name=metric)["value"], expected[metric])


def test_a_probe_that_is_a_share_has_no_exact_end(run, tmp_path):
    """Its standard error of 0 at 100 % is one of 16 items that are all right."""
    rows = [(*row[:6], min(1.0, (row[6] - 50) / 28), 16, None) for row in probe_rows(metric="sft greedy")]
    rows = [(*row[:8], math.sqrt(row[6] * (1 - row[6]) / 15)) for row in rows]
    name = "probe:ruler/qa:sft greedy"
    (made,) = metric_curves(probes(run, tmp_path, rows), metrics=[name])
    error = made.deviations.std(axis=0)
    assert made.values[-1] == 1.0
    assert error[-1] == pytest.approx(math.sqrt((1 / 18) * (17 / 18) / 18), rel=0.1)
    assert error[1] == pytest.approx(rows[1][8], rel=0.15)


def test_probes_without_a_known_error_stay_without(run, tmp_path):
    rows = [(*row[:8], None) for row in probe_rows()]
    (made,) = metric_curves(probes(run, tmp_path, rows), metrics=["probe:ruler/qa:accuracy"])
    assert not made.deviations.any()


def test_counts_of_key_tokens_are_no_curve(run, tmp_path):
    rows = [(*row[:2], "LongPPL", "books", *row[4:]) for row in [*probe_rows("ppl"), *probe_rows("key_tokens")]]
    assert metric_names(probes(run, tmp_path, rows))[-1] == "probe:LongPPL/books:ppl"
