"""Correlation over checkpoints: the paper's numbers, slow twins, invariance under trends, refusals, calibration."""

from __future__ import annotations

import csv
import io
import itertools
import json

import numpy as np
import polars as pl
import pytest
from scipy.stats import kendalltau, pearsonr, spearmanr
from synthetic import write_run

from calibration.correlation import false_alarms
from lccp_interp.dynamics import (
    Draws,
    census,
    correlate,
    lead_lag,
    outcome_table,
    paper_layout,
    published_correlations,
    run_series,
    score_table,
)
from lccp_interp.dynamics.correlation import METHODS, pearson_t_p, permutations, transformed
from lccp_interp.dynamics.series import log_of_tokens
from lccp_interp.schema import LccpError
from lccp_interp.store import PROBES_SCHEMA, Run, append_probes

PAPER_TOKENS = (0, 20, 50, 100, 150, 200)
SCIPY = {"pearson": pearsonr, "spearman": spearmanr, "kendall": kendalltau}
FEW = Draws(n_perm=199, n_boot=50)


def series(name, values, tokens=None, names=None):
    n = len(values)
    return pl.DataFrame(
        {
            "checkpoint": names or [f"c{i}" for i in range(n)],
            "tokens_seen": list(tokens or range(1, n + 1)),
            "name": name,
            "value": np.asarray(values, float),
        }
    )


def random_pair(n, seed=0, *, ties=False):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2, n))
    return np.round(values) if ties else values


def row_of(table, transform="levels"):
    return table.filter(transform=transform).row(0, named=True)


# --- the paper's numbers


@pytest.mark.parametrize(
    "row", published_correlations().to_dicts(), ids=lambda row: f"{row['cheap']} {row['benchmark']}"
)
def test_the_papers_p_values_follow_from_its_r_at_n_6(row):
    # r has four digits, so p is known to about 1e-4.
    assert row["n"] == 6
    assert pearson_t_p(row["published_r"], 6) == pytest.approx(row["published_p"], abs=1e-4)


def test_published_averages_are_those_of_the_paper():
    averages = dict(published_correlations().group_by("cheap").agg(pl.col("published_r").mean()).rows())
    for cheap, average in [
        ("niah_score", 0.7486),
        ("answer_ppl", -0.8210),
        ("n_retrieval_heads", 0.7428),
        ("mean_initial_score", 0.7878),
    ]:
        assert averages[cheap] == pytest.approx(average, abs=1e-4)


def test_p_t_is_scipys():
    x, y = random_pair(6)
    row = row_of(correlate(series("x", x), series("y", y)))
    assert row["p_t"] == pytest.approx(pearsonr(x, y).pvalue)
    assert pearson_t_p(1.0, 6) == 0


def test_published_numbers_stand_beside_pearson_levels_only():
    x, y = random_pair(6)
    for name, expected in [("RULER/qa/65536/accuracy", -0.9115), ("mrcr", -0.9231), ("HELMET/recall", None)]:
        table = correlate(series("answer_ppl", x), series(name, y))
        levels = row_of(table)["published_r"]
        assert levels == expected if expected else np.isnan(levels)
        assert np.isnan(row_of(table, "detrended")["published_r"])
    table = correlate(series("answer_ppl", x), series("RULER", y), method="spearman")
    assert table["published_r"].is_nan().all()
    assert table["p_t"].is_nan().all()


def test_paper_layout_sets_the_users_numbers_beside_the_published():
    rng = np.random.default_rng(3)
    cheap = pl.concat(
        [series(name, rng.normal(size=6), PAPER_TOKENS) for name in ("answer_ppl", "niah_score", "other")]
    )
    probes = pl.concat([series(name, rng.normal(size=6), PAPER_TOKENS) for name in ("RULER/qa", "LongBio", "HELMET")])
    table = correlate(cheap, probes)
    layout = paper_layout(table)
    assert layout.columns == ["cheap", "quantity", "RULER/qa", "LongBio", "average"]
    assert layout["cheap"].to_list() == ["niah_score"] * 5 + ["answer_ppl"] * 5
    assert layout["quantity"].to_list()[:5] == ["r", "published r", "p", "published p", "n"]
    numbers = {row["quantity"]: row for row in layout.filter(cheap="niah_score").to_dicts()}
    assert numbers["published r"]["RULER/qa"] == 0.8552
    assert numbers["published p"]["LongBio"] == 0.3151
    assert numbers["n"]["RULER/qa"] == 6
    mine = table.filter(cheap="niah_score", probe="LongBio", transform="levels").row(0, named=True)
    assert (numbers["r"]["LongBio"], numbers["p"]["LongBio"]) == (mine["r"], mine["p_t"])
    assert numbers["r"]["average"] == pytest.approx((numbers["r"]["RULER/qa"] + mine["r"]) / 2)
    with pytest.raises(
        LccpError, match=r"no pair of this table is in the paper's Tables 3 and 4: .*lccp probe RUN --sft"
    ):
        paper_layout(correlate(cheap))


# --- r, p and intervals against slow twins


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ties", [False, True])
def test_r_is_scipys(method, ties):
    x, y = random_pair(12, seed=1, ties=ties)
    row = row_of(correlate(series("x", x), series("y", y), method=method, draws=FEW))
    assert row["r"] == pytest.approx(SCIPY[method](x, y).statistic)
    assert row["n"] == 12


def slow_transform(values, log_tokens, transform):
    """Residuals by least squares, one series at a time."""
    if transform == "levels":
        return np.asarray(values)
    if transform == "detrended":
        slope, intercept = np.polyfit(log_tokens, values, 1)
        return np.asarray(values) - intercept - slope * log_tokens
    steps, gaps = np.diff(values), np.diff(log_tokens)
    return steps - gaps * (steps @ gaps) / (gaps @ gaps)


def slow_p(x, y, log_tokens, transform, method):
    """All permutations in a loop, with scipy's statistic; the larger p of the two nulls under a trend."""
    target = slow_transform(y, log_tokens, transform)

    def statistic(values):
        return abs(SCIPY[method](np.round(slow_transform(values, log_tokens, transform), 9), target).statistic)

    observed = statistic(x)
    if transform == "levels":
        nulls = [[np.asarray(order) for order in itertools.permutations(x)]]
    else:
        residuals = slow_transform(x, log_tokens, "detrended")
        steps = slow_transform(x, log_tokens, "differences")
        nulls = [
            [np.asarray(order) for order in itertools.permutations(residuals)],
            [np.concatenate([[0], np.cumsum(order)]) for order in itertools.permutations(steps)],
        ]
    return max(np.mean([statistic(values) >= observed - 1e-9 for values in null]) for null in nulls)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("transform", ["levels", "detrended", "differences"])
def test_p_of_few_checkpoints_counts_all_permutations(method, transform):
    x, y = random_pair(5, seed=2)
    x = x + 0.8 * y
    tokens = [0, 10, 20, 50, 100]
    row = row_of(correlate(series("x", x, tokens), series("y", y, tokens), method=method), transform)
    log_tokens = np.log(np.array(tokens) + 10)
    assert row["p"] == pytest.approx(slow_p(x, y, log_tokens, transform, method))
    assert row["p_kind"] == ("exact permutation" if transform == "levels" else "all permutations")
    assert row["n"] == (4 if transform == "differences" else 5)


def test_more_than_eight_values_are_drawn_and_the_identity_is_counted():
    x, _ = random_pair(12)
    row = row_of(correlate(series("x", x), series("y", x), draws=FEW))
    assert row["p_kind"] == "permutation, 199 draws"
    assert row["r"] == pytest.approx(1)
    assert row["p"] == pytest.approx(1 / 200)
    again = row_of(correlate(series("x", x), series("y", x), draws=FEW))
    assert again == pytest.approx(row, nan_ok=True)


def test_permutations_of_eight_are_all_and_of_nine_are_drawn():
    order, whole = permutations(8, 99, 0)
    assert whole
    assert len({tuple(row) for row in order.tolist()}) == len(order) == 40320
    order, whole = permutations(9, 99, 0)
    assert not whole
    assert order.shape == (99, 9)
    assert (np.sort(order, axis=1) == np.arange(9)).all()


def test_drawn_p_is_near_the_exact_t_test_of_normal_levels():
    x, y = random_pair(15, seed=5)
    row = row_of(correlate(series("x", x), series("y", x + 2 * y)))
    assert row["p"] == pytest.approx(row["p_t"], abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_interval_is_a_percentile_bootstrap_over_checkpoints(method):
    x, y = random_pair(9, seed=3)
    draws = Draws(n_perm=99, n_boot=60, seed=4, confidence=0.9)
    row = row_of(correlate(series("x", x), series("y", y), method=method, draws=draws))
    index = np.random.default_rng(4).integers(0, 9, (60, 9))
    slow = [SCIPY[method](x[i], y[i]).statistic for i in index]
    assert [row["ci_low"], row["ci_high"]] == pytest.approx(np.quantile(slow, [0.05, 0.95]).tolist())


def test_transformed_is_least_squares_on_log_tokens():
    rng = np.random.default_rng(0)
    log_tokens = np.log([3.0, 4.0, 9.0, 27.0, 30.0])
    for values in rng.normal(size=(3, 5)):
        for transform in ("levels", "detrended", "differences"):
            expected = slow_transform(values, log_tokens, transform)
            np.testing.assert_allclose(transformed(values, log_tokens, transform), expected, atol=1e-12)


@pytest.mark.parametrize("transform", ["detrended", "differences"])
def test_a_trend_in_log_tokens_changes_nothing(transform):
    x, y = random_pair(6)
    log_tokens = log_of_tokens(np.array(PAPER_TOKENS))
    plain = row_of(correlate(series("x", x, PAPER_TOKENS), series("y", y, PAPER_TOKENS)), transform)
    steep = row_of(
        correlate(
            series("x", 7 + 30 * log_tokens + x, PAPER_TOKENS), series("y", -5 - 20 * log_tokens + y, PAPER_TOKENS)
        ),
        transform,
    )
    for number in ("r", "p", "ci_low", "ci_high"):
        assert steep[number] == pytest.approx(plain[number], abs=1e-6)


def test_two_trends_fool_the_levels_and_not_the_rest():
    x, y = random_pair(8, seed=11)
    log_tokens = np.log(np.arange(1, 9))
    table = correlate(series("x", 20 * log_tokens + x), series("y", 20 * log_tokens + y))
    assert row_of(table)["p"] < 0.001
    assert row_of(table, "detrended")["p"] > 0.05
    assert row_of(table, "differences")["p"] > 0.05


def test_equal_steps_are_ties():
    # Three equal steps and, of the other series, three that rounding alone would tell apart.
    x = [0.0, 0.1, 0.2, 0.3, 0.7, 0.6]
    y = [0.0, 0.3, 0.6, 0.9, 0.5, 2.0]
    tokens = [1, 2, 4, 8, 16, 32]
    row = row_of(correlate(series("x", x, tokens), series("y", y, tokens), method="kendall"), "differences")
    expected = kendalltau([1, 1, 1, 4, -1], [3, 3, 3, -4, 15]).statistic
    assert row["r"] == pytest.approx(expected)


def test_q_is_benjamini_hochberg_over_the_defined_p_of_the_table():
    rng = np.random.default_rng(8)
    cheap = pl.concat([series("a", rng.normal(size=6)), series("flat", np.ones(6))])
    probes = pl.concat([series(name, rng.normal(size=6)) for name in "uvw"])
    table = correlate(cheap, probes)
    defined = table.filter(pl.col("p").is_not_nan())
    assert defined.height == 9
    p = defined["p"].to_numpy()
    # By hand: the smallest of p_(j) * m / j over all j at or above its rank.
    slow = [min(q * 9 / np.sum(p <= q) for q in p if q >= own) for own in p]
    np.testing.assert_allclose(defined["q"].to_numpy(), np.minimum(slow, 1))
    assert table.filter(pl.col("p").is_nan())["q"].is_nan().all()


# --- rows and their order


def test_without_probes_each_pair_of_cheap_metrics_stands_once():
    cheap = pl.concat([series(name, random_pair(6, seed)[0]) for seed, name in enumerate("abc")])
    pairs = correlate(cheap).select("cheap", "probe").unique(maintain_order=True).rows()
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]
    with pytest.raises(LccpError, match=r"there is one series only \(a\); make probe results with"):
        correlate(cheap.filter(name="a"))


def test_order_of_rows_changes_nothing():
    x, y = random_pair(7)
    cheap, probes = series("x", x), series("y", y)
    shuffled = correlate(cheap.reverse(), probes.sample(fraction=1, shuffle=True, seed=1))
    assert shuffled.equals(correlate(cheap, probes), null_equal=True)


def test_every_row_has_its_n_and_undefined_is_nan_with_the_reason():
    x, _ = random_pair(6)
    table = correlate(series("x", x), series("flat", np.full(6, 0.3)))
    assert table["n"].to_list() == [6, 6, 5]
    assert table.select(pl.col("r", "ci_low", "ci_high", "p", "q", "p_t").is_nan().all()).row(0) == (True,) * 6
    assert row_of(table)["reason"] == "flat: no variance"
    assert row_of(table, "detrended")["reason"] == "flat: no variance beside its trend"
    log_line = series("line", 3 + 2 * np.log(np.arange(1, 7)))
    table = correlate(series("x", x), log_line)
    assert np.isfinite(row_of(table)["r"])
    assert row_of(table, "differences")["reason"] == "line: no variance beside its trend"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_too_few_checkpoints_have_no_correlation(n):
    x, y = random_pair(n)
    table = correlate(series("x", x), series("y", y))
    assert table["r"].is_nan().all()
    assert row_of(table)["reason"] == f"{n} checkpoints, needs 4"
    assert row_of(table, "differences")["reason"] == f"{n - 1} steps, needs 4"


def test_undefined_values_are_left_out_and_counted():
    x, y = random_pair(7)
    whole = row_of(
        correlate(
            series("x", np.delete(x, [1, 4]), [1, 3, 4, 6, 7]), series("y", np.delete(y, [1, 4]), [1, 3, 4, 6, 7])
        )
    )
    x[1], y[4] = np.nan, np.inf
    row = row_of(correlate(series("x", x), series("y", y)))
    assert (row["n"], row["r"], row["p"]) == (5, pytest.approx(whole["r"]), pytest.approx(whole["p"]))
    assert row["reason"] == "2 of 7 checkpoints undefined or missing"


# --- lead and lag


def test_a_probe_that_follows_two_checkpoints_later_is_found():
    rng = np.random.default_rng(2)
    shocks = np.cumsum(rng.normal(size=16))
    cheap, probe = shocks[2:], shocks[:-2]
    table = lead_lag(series("x", cheap), series("y", probe), max_lag=3, draws=FEW)
    best = table.sort(pl.col("r").abs(), descending=True).row(0, named=True)
    assert best["lag"] == 2
    assert best["n"] == 11
    assert best["r"] > 0.9
    assert table["lag"].to_list() == list(range(-3, 4))
    assert lead_lag(series("y", probe), series("x", cheap), draws=FEW).filter(lag=-2)["r"][0] > 0.9


def test_lags_need_eight_steps():
    x, y = random_pair(10)
    table = lead_lag(series("x", x), series("y", y), max_lag=2, draws=FEW)
    assert table["n"].to_list() == [7, 8, 9, 8, 7]
    assert table["r"].is_nan().to_list() == [True, False, False, False, True]
    assert table["reason"][0] == "7 steps, needs 8"
    with pytest.raises(LccpError, match="max_lag must be at least 1, got 0; at lag 0 use correlate"):
        lead_lag(series("x", x), series("y", y), max_lag=0)


# --- refusals


def test_checkpoints_that_do_not_match_are_named_on_both_sides():
    x, y = random_pair(5)
    cheap, probes = series("x", x), series("y", y, names=["c0", "c1", "c2", "c3", "step-5"], tokens=[1, 2, 3, 4, 6])
    message = (
        "checkpoints do not match: cheap metrics have c0, c1, c2, c3, c4; probe results have c0, c1, c2, c3, step-5; "
        "rename them, or use the common ones with --common"
    )
    with pytest.raises(LccpError) as caught:
        correlate(cheap, probes)
    assert str(caught.value) == message
    table = correlate(cheap, probes, common=True)
    assert row_of(table)["n"] == 4
    assert row_of(table)["r"] == pytest.approx(pearsonr(x[:4], y[:4]).statistic)
    assert row_of(table)["reason"] == "2 of 6 checkpoints undefined or missing"


def test_a_gap_in_one_series_is_named():
    x, y = random_pair(5)
    probes = pl.concat([series("y", y), series("z", x).filter(pl.col("checkpoint") != "c3")])
    with pytest.raises(LccpError, match="z of the probe results lacks c3 of c0, c1, c2, c3, c4; add them, or"):
        correlate(series("x", x), probes)
    assert correlate(series("x", x), probes, common=True).filter(probe="z")["n"].to_list() == [4, 4, 3]


BAD_TABLES = {
    "missing column": (lambda t: t.drop("value"), "cheap metrics lacks value; it has checkpoint, tokens_seen, name; "),
    "empty": (lambda t: t.head(0), "the table of cheap metrics is empty"),
    "unnamed": (
        lambda t: t.with_columns(name=pl.lit(None, pl.String)),
        "5 rows lack a checkpoint, tokens_seen or name",
    ),
    "two values": (lambda t: pl.concat([t, t.head(1)]), "x has 2 rows that share a checkpoint (first 'c0')"),
    "shared tokens": (
        lambda t: t.with_columns(tokens_seen=pl.Series([1, 2, 2, 4, 5])),
        "one tokens_seen with several checkpoints: c1 at 2, c2 at 2; mend",
    ),
    "negative tokens": (
        lambda t: t.with_columns(tokens_seen=pl.Series([-1, 2, 3, 4, 5])),
        "checkpoint 'c0' has -1 tokens",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused_in_one_line(name):
    change, message = BAD_TABLES[name]
    cheap = change(series("x", random_pair(5)[0]))
    with pytest.raises(LccpError) as caught:
        correlate(cheap, cheap)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_checkpoint_with_two_token_counts_is_refused():
    x, y = random_pair(5)
    with pytest.raises(LccpError, match="one checkpoint with several token counts: c4 at 5, c4 at 6; mend"):
        correlate(series("x", x), series("y", y, [1, 2, 3, 4, 6]))


def test_unknown_names_and_numbers_out_of_range():
    cheap = series("x", random_pair(5)[0])
    with pytest.raises(LccpError, match=r"unknown method 'pearsons' in correlate: .*did you mean 'pearson'"):
        correlate(cheap, cheap, method="pearsons")
    with pytest.raises(LccpError, match="unknown transform 'detrend' in correlate"):
        correlate(cheap, cheap, transforms=["detrend"])
    with pytest.raises(LccpError, match="n_perm must be at least 99"):
        Draws(n_perm=10)


# --- runs and the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("correlation") / "run")


def probe_rows(run, benchmarks=("RULER", "MRCR"), *, drop=()):
    rng = np.random.default_rng(1)
    rows = [
        {
            "checkpoint": name,
            "tokens_seen": tokens,
            "benchmark": benchmark,
            "subset": "qa" if benchmark == "RULER" else None,
            "metric": "accuracy",
            "score": 60 + 2 * i + rng.normal(),
        }
        for benchmark in benchmarks
        for i, (name, tokens) in enumerate(run.checkpoints.select("name", "tokens_seen").rows())
        if name not in drop
    ]
    return pl.DataFrame(rows, schema=PROBES_SCHEMA)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("correlation") / "probed")
    append_probes(run.path, "mine", probe_rows(run))
    return run


def test_run_series_are_the_runs_own_tables(run):
    cheap, probes = run_series(run, length=1024)
    assert probes.is_empty()
    scores = score_table(run, length=1024, n_boot=1)
    outcomes = outcome_table(run, n_boot=1).filter(length=1024)
    expected = {
        "niah_score": outcomes["niah_score"],
        "answer_ppl": outcomes["answer_ppl"],
        "n_retrieval_heads": census(scores)["n_retrieval_heads"],
        "mean_initial_score": census(scores)["mean_initial_score"],
        "mean_retrieval_score": scores.group_by("tokens_seen").agg(pl.col("score").mean()).sort("tokens_seen")["score"],
    }
    assert cheap["name"].unique(maintain_order=True).to_list() == list(expected)
    for name, values in expected.items():
        rows = cheap.filter(name=name)
        assert rows["checkpoint"].to_list() == outcomes["checkpoint"].to_list()
        np.testing.assert_allclose(rows["value"].to_numpy(), values.cast(pl.Float64).to_numpy())


def test_probe_series_are_named_by_what_is_known(probed):
    _, probes = run_series(probed)
    assert probes["name"].unique(maintain_order=True).to_list() == ["MRCR/accuracy", "RULER/qa/accuracy"]
    assert probes.filter(name="MRCR/accuracy")["tokens_seen"].is_sorted()


def test_a_stage_is_counted_from_the_checkpoint_before_it(probed):
    cheap, probes = run_series(probed, stage="lccp")
    expected = ["pretrain-3.6M", *(f"lccp-{step / 10:.1f}M" for step in range(1, 13))]
    for name in ("niah_score", "mean_retrieval_score"):
        rows = cheap.filter(name=name)
        assert rows["checkpoint"].to_list() == expected
        assert rows["tokens_seen"].to_list() == [100_000 * step for step in range(13)]
    assert probes.filter(name="MRCR/accuracy")["tokens_seen"].max() == 1_200_000
    whole, _ = run_series(probed)
    assert cheap["value"].to_list() == whole.filter(pl.col("checkpoint").is_in(expected))["value"].to_list()
    # The first stage has nothing before it.
    assert run_series(probed, stage="pretrain")[0].filter(name="niah_score")["tokens_seen"][0] == 500_000
    with pytest.raises(LccpError, match=r"unknown stage 'lcp' in .*did you mean 'lccp'"):
        run_series(probed, stage="lcp")


def test_identical_weights_are_named(tmp_path):
    run = write_run(tmp_path / "twins")
    manifest = json.loads((run.path / "run.json").read_text())
    manifest["checkpoints"][5]["hash"] = manifest["checkpoints"][4]["hash"]
    (run.path / "run.json").write_text(json.dumps(manifest))
    with pytest.warns(
        UserWarning, match=r"checkpoints lccp-0.1M, lccp-0.2M of .* hold identical weights: they count as 2"
    ):
        run_series(Run.open(run.path))


def test_command_without_probes_says_so(lccp, run):
    code, out, err = lccp("correlate", run.path, "--format", "json", "--length", "1024")
    assert code == 0
    records = json.loads(out)
    assert len(records) == 10 * 3
    assert {record["transform"] for record in records} == {"levels", "detrended", "differences"}
    assert all(record["n"] in (15, 16) for record in records)
    assert err.count("\n") == 1
    assert "holds no probe results" in err
    assert "`lccp probe RUN --sft`, or import some with `lccp import FILE --into RUN`" in err


def test_command_with_probes(lccp, probed):
    code, out, err = lccp("correlate", probed.path, "--format", "csv", "--method", "kendall")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (code, err) == (0, "")
    assert len(rows) == 5 * 2 * 3
    assert {row["probe"] for row in rows} == {"MRCR/accuracy", "RULER/qa/accuracy"}
    code, out, _ = lccp("correlate", probed.path, "--paper")
    assert code == 0
    assert "published r" in out
    assert "0.855" in out
    code, out, _ = lccp("correlate", probed.path, "--stage", "lccp", "--format", "json")
    assert {record["n"] for record in json.loads(out)} == {12, 13}
    code, out, _ = lccp("correlate", probed.path, "--lead-lag", "1", "--format", "json")
    assert {record["lag"] for record in json.loads(out)} == {-1, 0, 1}


def test_command_refuses_a_gap_unless_told(lccp, tmp_path):
    run = write_run(tmp_path / "gap")
    append_probes(run.path, "mine", probe_rows(run, drop=("lccp-1.2M",)))
    code, _, err = lccp("correlate", run.path)
    assert code == 2
    assert "checkpoints do not match: cheap metrics have pretrain-0.5M, " in err
    assert err.count("\n") == 1
    code, out, _ = lccp("correlate", run.path, "--common", "--format", "json")
    assert code == 0
    assert {record["n"] for record in json.loads(out)} == {14, 15}
    code, _, err = lccp("correlate", run.path, "--method", "spearmann")
    assert code == 2
    assert "did you mean 'spearman'" in err


# --- calibration


def test_simulated_pairs_are_what_they_say():
    # A seed's first pairs: a fast look that the simulation itself works; the rates are held below.
    related = false_alarms(40, kind="related", seed=1)
    assert related["n"] == 40
    assert related["detrended"] > 0.6
    assert related["differences"] > 0.6


@pytest.mark.slow
def test_independent_trending_series_are_rarely_called_significant():
    rates = false_alarms(2000)
    assert rates["detrended"] <= 0.06
    assert rates["differences"] <= 0.06
    assert rates["either by q"] <= 0.06
    # What the tests are for: the same pairs in the paper's test.
    assert rates["pearson t"] > 0.5
