"""Saturation: curves with a known truth are found, verdicts are the rule's, and bad input gets one clear line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.optimize import least_squares
from synthetic import checkpoints, write_run

from calibration.saturation import draw, simulate_coverage
from lccp_interp.dynamics import (
    RunTables,
    deceptive_saturation,
    metric_names,
    metric_series,
    outcome_table,
    saturation_records,
    saturation_table,
    score_table,
)
from lccp_interp.dynamics.curves import MetricCurve, metric_curves
from lccp_interp.dynamics.fits import (
    MODELS,
    aicc,
    choose_fit,
    curve_shape,
    find_saturation,
    fit_curves,
    median_slope,
    noise_variance,
    trend_p_value,
)
from lccp_interp.dynamics.saturation import (
    IMPROVING,
    SATURATED,
    SATURATION_SCHEMA,
    UNKNOWN,
    compare,
    judge,
    judge_and_fit,
)
from lccp_interp.report import findings
from lccp_interp.schema import SCHEMA_VERSION, LccpError
from lccp_interp.store import PROBES_SCHEMA, Run

TOKENS = np.array([0.0, 1, 2, 4, 8, 16, 32, 64, 128])


def curve(values, tokens=TOKENS, *, error=0.0, metric="answer_ppl", seed=0, higher_is_better=False):
    """A curve of our own making; `error` is the standard error of each value."""
    values = np.asarray(values, float)
    deviations = np.random.default_rng(seed).normal(size=(300, len(values))) * error
    names = tuple(f"c{i}" for i in range(len(values)))
    n = np.full(len(values), 20)
    return MetricCurve(metric, 1024, None, higher_is_better, names, np.asarray(tokens, float), values, n, deviations)


def noise(error, n=9, seed=1):
    return np.random.default_rng(seed).normal(size=n) * error


# The shapes


@pytest.mark.parametrize("exponent", [0.3, 1.0, 4.0, math.inf])
def test_a_shape_starts_at_one_and_has_made_its_share_at_the_saturation_point(exponent):
    shape = curve_shape(np.array([0.0, 30.0]), np.array(30.0), np.array(exponent), 0.9)
    np.testing.assert_allclose(shape, [1, 0.1], rtol=1e-9)


def test_planted_parameters_are_found():
    made = fit_curves(TOKENS, 2 + 7 * np.exp(-TOKENS / 10), np.ones(9), higher_is_better=False, share=0.9)
    exponential = made[1].parameters
    assert exponential["c"] == pytest.approx(2, abs=1e-3)
    assert exponential["a"] == pytest.approx(7, abs=1e-3)
    assert exponential["tau"] == pytest.approx(10, rel=1e-3)
    assert made[1].tokens_at_share == pytest.approx(10 * math.log(10), rel=1e-3)

    power = fit_curves(TOKENS, 80 - 50 * (1 + TOKENS / 5) ** -1.3, np.ones(9), higher_is_better=True)[2].parameters
    assert power["c"] == pytest.approx(80, abs=0.1)
    assert power["a"] == pytest.approx(-50, abs=0.1)
    assert power["s"] == pytest.approx(5, rel=0.02)
    assert power["b"] == pytest.approx(1.3, rel=0.02)

    values = np.r_[99.0, 3 * np.log(TOKENS[1:]) + 20]
    line = fit_curves(TOKENS, values, np.ones(9), higher_is_better=True)[0]
    assert line.parameters == {"A": pytest.approx(3), "B": pytest.approx(20)}
    assert line.fitted[0] == 99


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_is_least_squares(seed):
    """Against scipy's solver from many starts, on noisy data with unequal weights."""
    rng = np.random.default_rng(seed)
    values = 3 + 6 * np.exp(-TOKENS / rng.uniform(3, 40)) + rng.normal(size=9) * 0.3
    variance = rng.uniform(0.2, 2, 9)
    fits = fit_curves(TOKENS, values, variance, higher_is_better=False)

    def exponential(p):
        return (values - p[0] - p[1] * np.exp(-TOKENS / math.exp(p[2]))) / np.sqrt(variance)

    starts = itertools.product([2.0, 4.0], [3.0, 8.0], np.log([1.0, 5.0, 20.0, 80.0]))
    best = min(2 * least_squares(exponential, start).cost for start in starts)
    assert fits[1].rss == pytest.approx(best, rel=1e-3)
    weight = 1 / np.sqrt(variance[1:])
    design = np.stack([np.log(TOKENS[1:]), np.ones(8)], axis=1) * weight[:, None]
    slope, intercept = np.linalg.lstsq(design, values[1:] * weight, rcond=None)[0]
    assert fits[0].parameters == {"A": pytest.approx(slope), "B": pytest.approx(intercept)}


def test_a_fit_never_goes_the_wrong_way():
    log_linear, *others = fit_curves(TOKENS, np.arange(9.0), np.ones(9), higher_is_better=False)
    assert log_linear.parameters["A"] == 0
    assert log_linear.rss == pytest.approx(((np.arange(1, 9.0) - 4.5) ** 2).sum())  # its base is free
    for fit in others:
        assert fit.gain == 0
        assert fit.rss == pytest.approx(((np.arange(9.0) - 4) ** 2).sum())


def test_aicc_by_hand_and_where_it_is_undefined():
    assert aicc(4.0, 8, 4) == pytest.approx(8 * math.log(0.5) + 8 + 40 / 3)
    assert math.isnan(aicc(4.0, 5, 4))
    five = fit_curves(TOKENS[:5], np.array([9.0, 7, 5, 4, 3.5]), np.ones(5), higher_is_better=False)
    assert all(math.isnan(fit.aicc) for fit in five)
    assert choose_fit(five).n_free == 4  # not the power law, which passes through everything
    assert choose_fit(five).rss == min(fit.rss for fit in five if fit.n_free == 4)


@pytest.mark.parametrize(
    ("values", "model"),
    [
        (3 + 6 * np.exp(-TOKENS / 8), "exponential"),
        (3 + 6 * (1 + TOKENS / 2) ** -0.8, "power law"),
        (np.r_[30.0, 20 - 3 * np.log(TOKENS[1:])], "log-linear"),
    ],
)
def test_aicc_chooses_the_shape_that_made_the_data(values, model):
    found = find_saturation(TOKENS, values + noise(0.005), np.zeros((200, 9)), higher_is_better=False)
    assert found.best.model == model
    assert [fit.model for fit in found.fits] == list(MODELS)
    assert (found.margin > 0) == (model == "log-linear")


# Noise


def test_scatter_beyond_the_cases_is_measured():
    rng = np.random.default_rng(0)
    tokens = np.linspace(0, 100, 60)
    shapes = curve_shape(tokens, np.geomspace(1, 1000, 40), np.full(40, math.inf), 0.95)
    truth = 5 * np.exp(-tokens / 20)
    case_variance = np.full(60, 0.01)
    _, none = noise_variance(truth + rng.normal(size=60) * 0.08, shapes, case_variance, 1)
    total, extra = noise_variance(truth + rng.normal(size=60) * 0.5, shapes, case_variance, 1)
    assert none == 0
    assert math.sqrt(extra) == pytest.approx(0.49, rel=0.2)
    np.testing.assert_allclose(total, 0.01 + extra)


def test_a_checkpoint_without_spread_does_not_rule_the_fit():
    """At a ceiling all cases agree; their variance of 0 must not become an infinite weight."""
    shapes = curve_shape(TOKENS, np.geomspace(1, 1000, 40), np.full(40, math.inf), 0.95)
    total, _ = noise_variance(5 * np.exp(-TOKENS / 20), shapes, np.r_[np.full(8, 0.16), 0.0], 1)
    assert total.min() == pytest.approx(0.01)


# The interval


def test_interval_holds_the_truth_and_narrows_with_noise():
    truth = 8 * math.log(20)
    widths = []
    for error in (0.02, 0.2):
        values = 3 + 6 * np.exp(-TOKENS / 8) + noise(error)
        deviations = noise(error, 300 * 9, seed=2).reshape(300, 9)
        found = find_saturation(TOKENS, values, deviations, higher_is_better=False)
        assert found.ci_low < truth < found.ci_high
        widths.append(found.ci_high / found.ci_low)
    assert widths[0] < 1.5
    assert widths[1] > 2 * widths[0]


def test_interval_does_not_depend_on_units():
    values = 3 + 6 * np.exp(-TOKENS / 8) + noise(0.1)
    deviations = noise(0.1, 300 * 9, seed=2).reshape(300, 9)
    one = find_saturation(TOKENS, values, deviations, higher_is_better=False)
    other = find_saturation(1e9 * TOKENS, 7 - 100 * values, 100 * deviations, higher_is_better=True)
    assert other.best.model == one.best.model
    assert other.ci_low == pytest.approx(1e9 * one.ci_low, rel=0.02)
    assert other.ci_high == pytest.approx(1e9 * one.ci_high, rel=0.02)


def test_noise_alone_is_a_gain_in_one_of_twenty():
    """The p-value of no gain is a p-value: below 0.05 in about 5 % of flat curves."""
    small = []
    for seed in range(80):
        rng = np.random.default_rng(seed)
        found = find_saturation(
            TOKENS, rng.normal(size=9), rng.normal(size=(200, 9)), higher_is_better=False, seed=seed
        )
        small.append(found.p_no_gain <= 0.05)
    assert 0.005 <= np.mean(small) <= 0.125


def test_same_seed_same_interval():
    drawn = draw(np.random.default_rng(3), "power law")
    one, other = (
        find_saturation(drawn.tokens, drawn.values, drawn.deviations, higher_is_better=False, seed=4) for _ in "ab"
    )
    assert (one.ci_low, one.ci_high, one.p_no_gain) == (other.ci_low, other.ci_high, other.p_no_gain)


@pytest.mark.slow
@pytest.mark.parametrize(("share", "n", "seed"), [(0.95, 800, 0), (0.9, 400, 1)])
def test_intervals_cover_the_truth(share, n, seed):
    record = simulate_coverage(n, seed=seed, share=share)
    for group in ("all", "within the data"):
        assert 0.90 <= record[group].covered <= 0.98, record
    for family in ("exponential", "power law"):
        # Two standard errors of 200 curves above 0.98.
        assert 0.90 <= record[family].covered <= 0.995, record
    # An interval that never closed would cover everything and say nothing.
    assert record["9 to 19 checkpoints"].closed > 0.2
    assert record["all"].wrongly_saturated < 0.02
    assert record["all"].wrongly_improving < 0.08


# The slope test


def test_trend_against_all_orders():
    for values in ([3, 1, 2, 5, 4], [1, 1, 2, 2, 3], [0, 0, 0, 1]):
        pairs = list(itertools.combinations(range(len(values)), 2))

        def score(order, pairs=pairs):
            return sum(int(np.sign(order[j] - order[i])) for i, j in pairs)

        orders = [score(order) for order in itertools.permutations(values)]
        expected = np.mean([s >= score(values) for s in orders])
        assert trend_p_value(np.array(values, float), higher_is_better=True) == pytest.approx(expected)
        assert trend_p_value(-np.array(values, float), higher_is_better=False) == pytest.approx(expected)


def test_trend_of_nothing_and_of_a_long_tied_series():
    assert trend_p_value(np.ones(6), higher_is_better=True) == 1
    assert math.isnan(trend_p_value(np.ones(1), higher_is_better=True))
    assert trend_p_value(np.repeat(np.arange(6.0), 2), higher_is_better=True) < 1e-4
    assert trend_p_value(np.repeat(np.arange(6.0), 2), higher_is_better=False) > 0.99


def test_median_slope_by_hand():
    assert median_slope(np.array([0.0, 1, 3]), np.array([0.0, 2, 3])) == 1.0  # slopes 2, 1, 0.5
    assert math.isnan(median_slope(np.array([1.0]), np.array([1.0])))


# Verdicts


def test_saturated():
    row = judge(curve(3 + 6 * np.exp(-TOKENS / 4) + noise(0.05), error=0.05))
    assert row["verdict"] == SATURATED
    assert row["ci_low"] <= row["tokens_at_share"] <= row["ci_high"] < 64
    assert row["reason"].startswith("95 % of the fitted gain (exponential) is made by 1")
    assert "of 128 tokens; the last 5 checkpoints show no improvement (Mann-Kendall p = " in row["reason"]


def test_still_improving_without_a_plateau():
    row = judge(curve(np.r_[30.0, 20 - 3 * np.log(TOKENS[1:])] + noise(0.05), error=0.05))
    assert row["verdict"] == IMPROVING
    assert row["model"] == "log-linear"
    assert (row["tokens_at_share"], row["ci_high"]) == (None, None)
    assert row["log_linear_a"] == pytest.approx(-3, abs=0.1)
    assert row["reason"].startswith("A log N + B with A = -3, which has no plateau, fits best (AICc lower by ")


def test_still_improving_when_the_plateau_lies_far_beyond():
    tokens = np.linspace(0, 100, 9)
    row = judge(curve(10 * np.exp(-tokens / 150) + noise(0.01), tokens, error=0.01))
    assert row["verdict"] == IMPROVING
    assert row["tokens_at_share"] is None
    assert row["ci_low"] == row["tokens_last"] == 100
    assert row["reason"].startswith(
        "95 % of the fitted gain (exponential) is not made by the last checkpoint (100 tokens); the last 5 checkpoints "
    )


def test_cannot_tell_below_five_checkpoints():
    for n, words in ((0, "it is undefined at all 0 checkpoints"), (1, "1 checkpoint has"), (4, "4 checkpoints have")):
        row = judge(curve(10 - TOKENS[:n], TOKENS[:n]))
        assert row["verdict"] == UNKNOWN
        assert row["n"] == n
        assert row["reason"].startswith(words)
        assert math.isnan(row["p_no_gain"])
    assert judge(curve(10 - TOKENS[:5], TOKENS[:5]))["model"] is not None


def test_cannot_tell_without_a_gain():
    flat = judge(curve(np.full(9, 100.0), metric="niah_score", higher_is_better=True))
    assert (flat["verdict"], flat["reason"]) == (
        UNKNOWN, "it is 100 at all 9 checkpoints: there is no gain to saturate",
    )  # fmt: skip
    noisy = judge(curve(5 + noise(0.3), error=0.3))
    assert noisy["verdict"] == UNKNOWN
    assert noisy["reason"].startswith("no gain beyond noise (from 5.1 to 5.11, p = ")
    worse = judge(curve(5 + np.sqrt(TOKENS)))
    assert worse["verdict"] == UNKNOWN
    assert worse["reason"].startswith("it gets worse, from 5 to 16.3 (Mann-Kendall p = ")
    for row in (noisy, worse):
        assert [row[name] for name in ("tokens_at_share", "ci_low", "ci_high")] == [None] * 3


def test_a_gain_that_only_the_order_shows_is_a_gain():
    """Scores that rise at every checkpoint by less than their error: no curve stands out, the order does."""
    row = judge(curve(np.arange(9.0), error=20.0, metric="niah_score", higher_is_better=True))
    assert row["p_no_gain"] == pytest.approx(2 / math.factorial(9))
    assert "no gain" not in row["reason"]


def test_cannot_tell_when_the_interval_is_too_wide():
    row = judge(curve(3 + 6 * np.exp(-TOKENS / 30) + noise(0.9, seed=5), error=0.9))
    assert row["verdict"] == UNKNOWN
    assert row["ci_low"] < row["tokens_at_share"] < 128
    assert row["ci_high"] is None
    assert "beyond the last checkpoint (128 tokens), best guess 93.1; the last 5 checkpoints still" in row["reason"]


def test_a_step_is_neither_saturated_nor_improving():
    """0 for half the time, then 100: no shape waits, so the curve runs off to the right while the order says done."""
    values = np.r_[np.zeros(7), np.full(8, 100.0)]
    row = judge(curve(values, np.linspace(0, 140, 15), metric="niah_score", higher_is_better=True))
    assert row["verdict"] == UNKNOWN
    assert row["reason"].endswith("; but the last 8 checkpoints show no improvement (Mann-Kendall p = 1)")


def test_a_late_second_rise_contradicts_the_curve():
    tokens = np.r_[0, np.geomspace(1, 200, 39)]
    values = 10 - 6 * (1 - np.exp(-tokens / 3)) - 0.6 * np.maximum(0, tokens - 100) / 100
    row = judge(curve(values + noise(0.1, 40), tokens, error=0.1))
    assert row["ci_high"] < 15
    assert row["verdict"] == UNKNOWN
    assert row["reason"].endswith("by 5.36 % of the gain, which contradicts the curve")


def test_undefined_checkpoints_are_named_and_left_out():
    values = 3 + 6 * np.exp(-TOKENS / 4)
    values[[2, 5]] = np.nan, np.inf
    row = judge(curve(values, error=0.05))
    assert row["n"] == 7
    assert row["reason"].endswith("; undefined or not scored at c2, c5")
    few = judge(curve(np.r_[1.0, np.full(5, np.nan)], TOKENS[:6]))
    assert few["reason"].startswith("1 checkpoint has a value from the base on, at least 5 are needed; undefined or ")
    assert few["reason"].endswith(" at c1, c2, c3, c4, c5")


def test_a_perplexity_that_fell_a_thousandfold_points_at_the_loss():
    values = 3 + 6000 * np.exp(-TOKENS * 3) + noise(0.01)
    assert judge(curve(values))["reason"].endswith("-fold, so nearly all of its gain is its first fall: see the loss")
    assert "fold" not in judge(curve(values, metric="loss_nats"))["reason"]


# Deceptive saturation


def record(verdict, low, high, metric="niah_score", **changes):
    return {
        "metric": metric, "length": 1024, "share": 0.95, "verdict": verdict, "tokens_at_share": low, "ci_low": low,
        "ci_high": high, "reason": "so it is", **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("score", "ppl", "verdict", "words"),
    [
        ((SATURATED, 1000, 2000), (SATURATED, 3000, 4000), "yes", "the intervals do not overlap"),
        ((SATURATED, 1000, 2000), (IMPROVING, 1500, None), "yes", "is still improving: so it is"),
        ((SATURATED, 1000, 2000), (UNKNOWN, 2500, None), "yes", "after 2.5K: the intervals do not overlap"),
        ((SATURATED, 1000, 2000), (UNKNOWN, 1500, None), "cannot tell", "after 1.5K: the intervals overlap"),
        ((SATURATED, 1000, 2000), (SATURATED, 1500, 4000), "cannot tell", "between 1.5K and 4K: the intervals overlap"),
        ((SATURATED, 3000, 4000), (SATURATED, 1000, 2000), "no", "which is earlier"),
        ((IMPROVING, 3000, None), (SATURATED, 1000, 2000), "no", "the NIAH score itself is still improving"),
        ((UNKNOWN, None, None), (SATURATED, 1000, 2000), "cannot tell", "for the NIAH score, so it is"),
        ((SATURATED, 1000, 2000), (UNKNOWN, None, None), "cannot tell", "for the answer perplexity, so it is"),
    ],
)
def test_deceptive_saturation_is_a_comparison_of_intervals(score, ppl, verdict, words):
    got, sentence = compare(record(*score), record(*ppl, metric="answer_ppl"))
    assert got == verdict
    assert words in sentence
    assert "at 1,024 tokens" in sentence
    assert sentence.endswith(".")


# Whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("saturation") / "run")


def test_one_row_per_metric(run):
    table = saturation_table(run, n_boot=100)
    assert dict(table.schema) == SATURATION_SCHEMA
    kinds = table.select("metric", "length", "depth_fraction").rows()
    assert kinds.count(("answer_ppl", 4096, None)) == 1
    assert sum(row[2] is not None for row in kinds) == 5
    assert {row[1] for row in kinds if row[0] == "loss_nats"} == {256, 1024, 4096}
    assert {row[0] for row in kinds} == set(metric_names(run)) - {"answer_ppl_by_depth"}
    assert table["n"].to_list() == [13] * table.height
    assert table["tokens_last"].unique().to_list() == [1_200_000]
    # The synthetic losses fall as exp(-i / 5): 95 % of that is made at step 15, and there are 12.
    loss = table.filter(metric="loss_nats", length=4096).row(0, named=True)
    assert loss["verdict"] == IMPROVING
    assert loss["reason"]


def test_a_length_is_respected(run):
    table = saturation_table(run, length=1024, n_boot=50)
    assert table["length"].unique().to_list() == [1024]


def test_series_agree_with_the_other_tables(run):
    long = metric_series(run, n_boot=400)
    outcomes = outcome_table(run).filter(pl.col("length") == 1024, pl.col("tokens_seen") >= 3_600_000)
    ours = long.filter(pl.col("metric") == "answer_ppl", pl.col("length") == 1024, pl.col("depth_fraction").is_null())
    np.testing.assert_allclose(ours["value"], outcomes["answer_ppl"])
    assert ours["n"].to_list() == outcomes["n"].to_list() == [40] * 13
    assert ours["checkpoint"].to_list() == outcomes["checkpoint"].to_list()
    assert ours["tokens_since_base"].to_list() == list(range(0, 1_300_000, 100_000))
    # The spread of clusters, widened for their small number, is that of the percentile interval.
    width = (outcomes["answer_ppl_high"] - outcomes["answer_ppl_low"]) / (2 * 1.96) * math.sqrt(8 / 7)
    np.testing.assert_allclose(ours["stderr"], width, rtol=0.25, atol=1e-4)

    scores = score_table(run).filter(pl.col("tokens_seen") >= 3_600_000)
    counts = scores.group_by("checkpoint", maintain_order=True).agg((pl.col("score") > 0.1).sum())["score"]
    assert long.filter(metric="n_retrieval_heads")["value"].to_list() == counts.to_list()
    base = scores.filter(pl.col("checkpoint") == "pretrain-3.6M", pl.col("score") > 0.1).select("layer", "head")
    initial = (
        scores.join(base, on=["layer", "head"]).group_by("checkpoint", maintain_order=True).agg(pl.col("score").mean())
    )
    np.testing.assert_allclose(long.filter(metric="mean_initial_score")["value"], initial["score"])


def test_the_fits_are_those_of_the_row():
    values = 3 + 6 * np.exp(-TOKENS / 4) + noise(0.05)
    values[3] = np.nan
    made = curve(values, error=0.05)
    row, found = judge_and_fit(made)
    assert row == judge(made) or str(row) == str(judge(made))
    assert row["model"] == found.best.model
    assert (row["ci_low"], row["ci_high"]) == (round(found.ci_low), round(found.ci_high))
    assert len(found.best.fitted) == row["n"] == 8
    for undecided in (curve(values[:4], TOKENS[:4]), curve(np.full(9, 7.0)), curve(np.full(9, np.nan))):
        assert judge_and_fit(undecided)[1] is None


def test_deceptive_saturation_of_a_run(tmp_path):
    """Scores that are perfect from the second checkpoint on, while losses fall on and on."""

    def change(i, result):
        loss = np.full(3, 2.5 - 0.12 * i, np.float32) + 0.02 * np.float32(int(result.case_id[-1]) % 3)
        right = i >= 5 or (i == 4 and int(result.case_id[-1]) < 6)
        return dataclasses.replace(result, answer_loss_nats=loss, greedy_ids=(1, 2, 3) if right else (0, 2, 3))

    run = write_run(tmp_path / "run", lengths=(1024,), change=change)
    found = deceptive_saturation(run, n_boot=200)
    assert found.verdict == "yes"
    assert found.score["verdict"] == SATURATED
    assert found.sentence.startswith(
        "Saturation is deceptive at 1,024 tokens: the NIAH score makes 95 % of its gain by "
    )
    assert "while the answer perplexity is still improving: " in found.sentence
    assert deceptive_saturation(run, ppl="loss_nats", n_boot=200).verdict == "yes"
    with pytest.raises(LccpError, match=r"unknown ppl 'loss' in deceptive_saturation: known are answer_ppl, loss_nats"):
        deceptive_saturation(run, ppl="loss")


def test_fewer_than_five_checkpoints_warn(tmp_path):
    run = write_run(tmp_path / "run", lengths=(256,), only=[0, 3, 4, 5])
    with pytest.warns(UserWarning, match="fewer than 5 checkpoints from the base on") as caught:
        table = saturation_table(run, metrics=["niah_score"], n_boot=50)
    assert "niah_score at 256 tokens (n = 3); score more checkpoints" in str(caught[0].message)
    assert table["verdict"].to_list() == [UNKNOWN]
    assert table["n"].to_list() == [3]


def test_one_checkpoint_only(tmp_path):
    run = write_run(tmp_path / "run", lengths=(256,), only=[3])
    with pytest.warns(UserWarning, match="fewer than 5"):
        records = saturation_records(run, n_boot=50)
    assert {record["verdict"] for record in records} == {UNKNOWN}
    assert "1 checkpoint has a value" in records[0]["reason"]


def test_unscored_checkpoints_are_named(tmp_path):
    run = write_run(tmp_path / "run", lengths=(256,), only=[*range(4, 12), 13])
    rows = {row["metric"]: row for row in saturation_records(run, n_boot=50)}
    for metric in ("loss_nats", "n_retrieval_heads"):
        assert rows[metric]["n"] == 9
        assert rows[metric]["reason"].split(";")[-1] == (
            " undefined or not scored at pretrain-3.6M, lccp-0.9M, lccp-1.1M, lccp-1.2M, "
            "so the gain counts from the fitted value there"
        )


def test_initial_heads_need_the_base(tmp_path):
    run = write_run(tmp_path / "run", lengths=(256,), only=list(range(4, 12)))
    row = saturation_table(run, metrics=["mean_initial_score"], n_boot=50).row(0, named=True)
    assert row["n"] == 0
    assert row["verdict"] == UNKNOWN


def edited(run: Run, tmp_path: Path, edit) -> Run:
    """A copy of `run` with another manifest."""
    import shutil

    copy = tmp_path / "edited"
    shutil.copytree(run.path, copy)
    manifest = json.loads((copy / "run.json").read_text())
    edit(manifest)
    (copy / "run.json").write_text(json.dumps(manifest))
    return Run(copy, manifest)


def test_equal_token_counts_are_refused_and_named(run, tmp_path):
    bad = edited(run, tmp_path, lambda manifest: manifest["checkpoints"][6].update(tokens_seen=3_800_000))
    with pytest.raises(LccpError, match=r"checkpoints 'lccp-0.2M' and 'lccp-0.3M' have the same tokens_seen, 3800000"):
        saturation_table(bad)


def test_unordered_checkpoints_are_put_in_order(run, tmp_path):
    shuffled = edited(run, tmp_path, lambda manifest: manifest["checkpoints"].reverse())
    assert metric_series(shuffled, metrics=["loss_nats"], n_boot=50).equals(
        metric_series(run, metrics=["loss_nats"], n_boot=50)
    )


def test_identical_weights_are_named(run, tmp_path):
    twins = edited(run, tmp_path, lambda m: m["checkpoints"][9].update(hash=m["checkpoints"][8]["hash"]))
    with pytest.warns(UserWarning, match=r"checkpoints lccp-0.5M, lccp-0.6M of .* hold identical weights"):
        saturation_table(twins, metrics=["niah_score"], n_boot=50)


def test_unknown_names_are_refused(run):
    with pytest.raises(LccpError, match=r"unknown metric 'niah_scor' .* did you mean 'niah_score'\?"):
        saturation_table(run, metrics=["niah_scor"])
    with pytest.raises(LccpError, match=r"has no cases of 99 tokens; it has 256, 1024, 4096"):
        saturation_table(run, length=99)
    with pytest.raises(LccpError, match=r"share must lie between 0 and 1 .*, got 1; the usual ones are"):
        saturation_table(run, share=1.0)
    with pytest.raises(LccpError, match=r"confidence must lie between 0 and 1, got 95"):
        saturation_table(run, metrics=["niah_score"], confidence=95, n_boot=50)
    with pytest.raises(LccpError, match=r"a saturation point needs at least 5 checkpoints, got 3"):
        find_saturation(TOKENS[:3], TOKENS[:3], np.zeros((9, 3)), higher_is_better=True)


def test_a_newer_run_is_refused(run, tmp_path):
    newer = edited(run, tmp_path, lambda manifest: manifest.update(schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(LccpError, match="upgrade lccp_interp"):
        Run.open(newer.path)


# Probes


def probes(run: Run, tmp_path: Path, rows) -> Run:
    """A copy of `run` with probe rows, as a foreign tool might have left them."""
    copy = edited(run, tmp_path, lambda manifest: None)
    (copy.path / "probes").mkdir()
    pl.DataFrame(rows, schema=PROBES_SCHEMA, orient="row").write_parquet(copy.path / "probes" / "ruler.parquet")
    return copy


def probe_rows(metric="accuracy", names=None):
    stage = [c for c in checkpoints() if c.tokens_seen >= 3_600_000]
    values = 80 - 30 * np.exp(-np.arange(13) / 1.5)
    return [
        (name, c.tokens_seen, "ruler", "qa", 4096, metric, value, 500, 0.3)
        for name, c, value in zip(names or [c.name for c in stage], stage, values, strict=True)
    ]


def test_probe_scores_are_a_metric(run, tmp_path):
    with_probes = probes(run, tmp_path, probe_rows()[::-1])
    assert metric_names(with_probes)[-1] == "probe:ruler/qa:accuracy"
    row = saturation_table(with_probes, metrics=["probe:ruler/qa:accuracy"]).row(0, named=True)
    assert (row["length"], row["n"], row["verdict"]) == (4096, 13, SATURATED)
    assert row["ci_low"] <= 100_000 * 1.5 * math.log(20) <= row["ci_high"]


def test_a_probe_of_loss_is_better_when_lower(run, tmp_path):
    with_probes = probes(run, tmp_path, probe_rows(metric="ppl"))
    (made,) = metric_curves(with_probes, metrics=["probe:ruler/qa:ppl"])
    assert not made.higher_is_better


def test_probes_of_other_checkpoints_are_named(run, tmp_path):
    names = [f"step-{i}" for i in range(13)]
    with pytest.raises(LccpError, match=r"has scores of step-0, step-1, .*, which the run .* does not have"):
        saturation_table(probes(run, tmp_path, probe_rows(names=names)), n_boot=50)


def test_two_scores_of_one_checkpoint_are_named(run, tmp_path):
    with pytest.raises(LccpError, match=r"several scores of lccp-1.2M in .*; keep one for each"):
        saturation_table(probes(run, tmp_path, [*probe_rows(), probe_rows()[-1]]), n_boot=50)


# The report and the command line


def test_the_report_quotes_the_verdict(run):
    (finding,) = [finding for finding in findings(RunTables(run, 1024)) if finding.heading == "Verdict"]
    found = deceptive_saturation(run, length=1024)
    assert finding.text.startswith("At 1K tokens the NIAH score is ")
    assert f" {found.sentence} " in finding.text


def test_command(run, lccp):
    lccp = partial(lccp, "saturation", run.path)
    code, out, _ = lccp("--metric", "niah_score,loss_nats", "--length", "1024", "--share", "90", "--format", "json")
    assert code == 0
    records = json.loads(out)
    assert [record["metric"] for record in records] == ["niah_score", "loss_nats"]
    assert set(records[0]) == set(SATURATION_SCHEMA)
    assert records[0]["share"] == 0.9
    code, out, _ = lccp("--length", "1024")
    assert code == 0
    assert "loss_nats at 1,024 tokens: " in out
    assert "aturation is " in out.splitlines()[-1]
    code, _, err = lccp("--share", "0.95")
    assert code == 2
    assert "--share is in percent, got 0.95; write 95 for that part of the gain" in err
    code, _, err = lccp("--metric", "loss")
    assert code == 2
    assert "unknown metric 'loss'" in err
