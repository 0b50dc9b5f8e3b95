"""Heads and outcomes over checkpoints: hand-computed examples, slow twins, laws of the tables, texts of the errors."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr
from synthetic import DEPTHS, LENGTHS, N_HEADS, N_LAYERS, PLANTED, write_run

from lccp_interp.dynamics import (
    RunTables,
    base_checkpoint,
    census,
    head_records,
    head_sample,
    outcome_table,
    score_table,
    stability,
)
from lccp_interp.dynamics.resampling import bootstrap_means, draw_resamples, percentile_interval
from lccp_interp.schema import CaseResult, LccpError
from lccp_interp.store import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("synthetic") / "run")


def _table(scores: Sequence[Sequence[float]], stages: Sequence[str] | None = None) -> pl.DataFrame:
    """A score table from `[checkpoint][head]`, all heads in layer 0."""
    return pl.DataFrame(
        [
            {
                "checkpoint": f"c{i}",
                "tokens_seen": 10 * i,
                "stage": stages[i] if stages else "train",
                "layer": 0,
                "head": head,
                "score": score,
            }
            for i, row in enumerate(scores)
            for head, score in enumerate(row)
        ]
    )


# --- resampling


def _slow_bootstrap(values: NDArray[np.float64], weights: NDArray[np.float64]) -> list[list[float]]:
    """Means by explicit loops: repeat each case as often as it was drawn, leave NaN out, average."""
    draws = []
    for weight in weights:
        row = []
        for column in range(values.shape[1]):
            drawn: list[float] = []
            for case, times in enumerate(weight):
                drawn += [values[case, column]] * int(times)
            defined = [value for value in drawn if not np.isnan(value)]
            row.append(sum(defined) / len(defined) if defined else float("nan"))
        draws.append(row)
    return draws


def test_bootstrap_equals_explicit_loops() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((7, 3))
    values[2, 1] = values[:, 2] = np.nan
    values[6, 2] = 0.5
    resamples = draw_resamples(np.array([0, 0, 1, 1, 2, 2, 3]), n_boot=60, seed=3)
    mean, low, high, n = bootstrap_means(values, resamples)
    draws = np.array(_slow_bootstrap(values, resamples.weights))
    for column in range(3):
        defined = draws[~np.isnan(draws[:, column]), column]
        assert low[column] == pytest.approx(np.quantile(defined, (1 - resamples.level) / 2))
        assert high[column] == pytest.approx(np.quantile(defined, (1 + resamples.level) / 2))
        assert mean[column] == pytest.approx(np.nanmean(values[:, column]))
    assert n.tolist() == [7, 6, 1]


def test_clusters_are_drawn_whole() -> None:
    resamples = draw_resamples(np.array([0, 0, 1, 2, 2]), n_boot=100)
    assert resamples.ci_over == "clusters"
    assert (resamples.weights[:, 0] == resamples.weights[:, 1]).all()
    assert (resamples.weights[:, [0, 2, 3]].sum(axis=1) == 3).all()


def test_below_three_clusters_cases_are_drawn() -> None:
    resamples = draw_resamples(np.array([0, 0, 1, 1]), n_boot=100)
    assert (resamples.ci_over, resamples.n_units) == ("cases", 4)
    assert (resamples.weights.sum(axis=1) == 4).all()


def test_one_case_has_no_interval() -> None:
    mean, low, high, _ = bootstrap_means(np.array([[0.5]]), draw_resamples(np.array([0])))
    assert mean[0] == 0.5
    assert np.isnan([low[0], high[0]]).all()


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random((6, 11))
    resamples = draw_resamples(np.arange(6), n_boot=50)
    whole = bootstrap_means(values, resamples)
    monkeypatch.setattr("lccp_interp.dynamics.resampling.BLOCK_COLUMNS", 2)
    for ours, theirs in zip(whole, bootstrap_means(values, resamples), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    data = rng.normal(0.3, 0.1, (40, 400))
    _, low, high, _ = bootstrap_means(data, draw_resamples(np.arange(40), n_boot=400))
    assert 0.90 < ((low < 0.3) & (high > 0.3)).mean() < 0.98


def test_undefined_draws_are_left_out() -> None:
    draws = np.array([[0.0, np.nan], [1.0, np.nan], [np.nan, np.nan]])
    low, high = percentile_interval(draws, 0.5)
    assert (low[0], high[0]) == (0.25, 0.75)
    assert np.isnan([low[1], high[1]]).all()


@pytest.mark.parametrize(("confidence", "n_boot"), [(0.0, 10), (1.0, 10), (95, 10), (0.95, 0)])
def test_numbers_out_of_range_are_refused(run: Run, confidence: float, n_boot: int) -> None:
    with pytest.raises(LccpError, match=r"confidence must lie|n_boot must be"):
        score_table(run, confidence=confidence, n_boot=n_boot)


# --- score_table


def test_score_is_the_mean_over_the_cases_of_one_length(run: Run) -> None:
    table = score_table(run, length=1024, n_boot=50)
    row = table.filter(checkpoint="lccp-0.4M", layer=3, head=4).row(0, named=True)
    ids = run.cases.filter(pl.col("length") == 1024)["case_id"]
    values = run.scores.filter(
        pl.col("checkpoint") == "lccp-0.4M",
        pl.col("metric") == "retrieval",
        pl.col("layer") == 3,
        pl.col("head") == 4,
        pl.col("case_id").is_in(ids.implode()),
    ).collect()["value"]
    assert row["n"] == len(values) == len(DEPTHS) * 8
    assert row["score"] == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert row["ci_low"] < row["score"] < row["ci_high"]
    assert row["ci_over"] == "clusters"
    assert (row["metric"], row["length"]) == ("retrieval", 1024)


def test_columns_and_order_of_the_score_table(run: Run) -> None:
    table = score_table(run, n_boot=10)
    assert table.columns == [
        *("checkpoint", "tokens_seen", "stage", "metric", "length", "layer", "head"),
        *("score", "ci_low", "ci_high", "n", "null_score", "above_null", "ci_over"),
    ]
    assert table.height == 16 * N_LAYERS * N_HEADS
    assert table["length"].unique().to_list() == [max(LENGTHS)]
    assert table.equals(table.sort("tokens_seen", "layer", "head"))


def with_null(_: int, result: CaseResult) -> CaseResult:
    """Decoys on which every head scores 0.3, give or take what cases differ by."""
    jitter = 0.1 * (int(result.case_id.rsplit("-", 1)[1]) % 3 - 1)
    null = np.full((N_LAYERS, N_HEADS), 0.3 + jitter, np.float32)
    return dataclasses.replace(result, scores={**result.scores, "retrieval@decoy": null})


def test_a_head_that_is_not_above_its_null_is_no_retrieval_head(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256,), change=with_null)
    table = score_table(run, metric="retrieval", n_boot=200)
    last = table.filter(pl.col("checkpoint") == "lccp-1.2M")
    assert last["null_score"].to_list() == pytest.approx([0.3] * last.height, abs=0.05)
    above = last.filter("above_null").select("layer", "head").rows()
    # Planted at 0.75, 0.9 and 0.45 by then; (3, 0) and (2, 5) reach 0.3 and 0.35, which is about what chance gives.
    assert {(2, 1), (3, 4), (1, 6)} <= set(above)
    assert (3, 0) not in above
    counts = {rule: census(table, rule=rule)["n_retrieval_heads"][-1] for rule in ("above null", "threshold")}
    assert counts["above null"] == len(above) < counts["threshold"]
    assert score_table(run, metric="wu", n_boot=10)["above_null"].null_count() == table.height
    with pytest.raises(LccpError, match="unknown rule 'always' in the census: known are above null, threshold"):
        census(table, rule="always")


def test_how_parts_lie_on_disk_does_not_matter(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", n_shards=1, lengths=(256,), n_needles=3)
    other = write_run(tmp_path / "other", n_shards=4, reverse=True, lengths=(256,), n_needles=3)
    for tables in zip(
        (score_table(one), outcome_table(one), RunTables(one).lives, RunTables(one).census),
        (score_table(other), outcome_table(other), RunTables(other).lives, RunTables(other).census),
        strict=True,
    ):
        assert tables[0].equals(tables[1], null_equal=True)


def test_permuting_heads_permutes_the_rows(tmp_path: Path) -> None:
    order = np.random.default_rng(2).permutation(N_HEADS)

    def permute(i: int, result: CaseResult) -> CaseResult:
        scores = {metric: values[:, order] for metric, values in result.scores.items()}
        return CaseResult(result.case_id, result.layers, scores, result.answer_loss_nats, result.greedy_ids)

    plain = score_table(write_run(tmp_path / "plain", lengths=(256,), n_needles=3))
    mixed = score_table(write_run(tmp_path / "mixed", lengths=(256,), n_needles=3, change=permute))
    renamed = mixed.with_columns(head=pl.Series(order[mixed["head"].to_numpy()]))
    assert plain.equals(renamed.sort("tokens_seen", "layer", "head"), null_equal=True)


def test_undefined_values_are_left_out_and_counted(tmp_path: Path) -> None:
    def spoil(i: int, result: CaseResult) -> CaseResult:
        scores = {metric: values.copy() for metric, values in result.scores.items()}
        scores["retrieval"][0, 0] = np.nan
        if "-s0-" in result.case_id:
            scores["retrieval"][2, 1] = np.nan
        return CaseResult(result.case_id, result.layers, scores, result.answer_loss_nats, result.greedy_ids)

    run = write_run(tmp_path / "run", lengths=(256,), n_needles=4, change=spoil)
    table = score_table(run, n_boot=50)
    nothing = table.filter(layer=0, head=0)
    assert nothing["n"].to_list() == [0] * 16
    assert nothing["score"].is_nan().all()
    assert nothing["ci_low"].is_nan().all()
    assert table.filter(layer=2, head=1)["n"].to_list() == [15] * 16
    assert table.filter(layer=2, head=1, checkpoint="lccp-1.2M")["score"][0] > 0.7
    assert (census(table)["n_heads"] == N_LAYERS * N_HEADS - 1).all()
    assert stability(table)["n_heads"].unique().to_list() == [N_LAYERS * N_HEADS - 1]
    assert head_records(run, n_boot=10)[-1]["score"] is None


def test_checkpoints_without_scores_have_no_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256,), n_needles=2, only=[0, 3, 5])
    assert score_table(run)["checkpoint"].unique().to_list() != []
    assert score_table(run)["checkpoint"].n_unique() == 3
    assert score_table(run)["ci_over"].unique().to_list() == ["cases"]


def test_same_seed_same_interval_other_seed_another(run: Run) -> None:
    one, again, other = (score_table(run, n_boot=50, seed=seed) for seed in (0, 0, 1))
    assert one.equals(again)
    assert not one["ci_low"].equals(other["ci_low"])
    assert one["score"].equals(other["score"])


def test_unknown_names_list_the_known_ones(run: Run) -> None:
    with pytest.raises(LccpError, match=r"unknown metric 'retreival'.*copy, needle_mass, retrieval, wu.*'retrieval'\?"):
        score_table(run, metric="retreival")
    with pytest.raises(LccpError, match=r"no cases of 2048 tokens; it has 256, 1024, 4096"):
        score_table(run, length=2048)
    with pytest.raises(LccpError, match=r"unknown mode 'generate'.*teacher_forced"):
        score_table(run, mode="generate")
    with pytest.raises(LccpError, match=r"unknown checkpoint 'lccp-1.3M'.*did you mean 'lccp-1"):
        head_records(run, checkpoint="lccp-1.3M")
    with pytest.raises(LccpError, match="top must be at least 1, got 0"):
        head_records(run, top=0)


# --- base, census, stability


def test_base_is_the_last_checkpoint_before_the_last_stage(run: Run) -> None:
    assert base_checkpoint(run.checkpoints) == "pretrain-3.6M"
    assert base_checkpoint(_table([[0.0]] * 3)) == "c0"
    with pytest.raises(LccpError, match="no checkpoints"):
        base_checkpoint(_table([[0.0]]).clear())


def test_census_by_hand() -> None:
    table = _table([[0.5, 0.2, 0.0], [0.3, 0.05, 0.4]])
    assert census(table).select(
        "n_retrieval_heads", "n_from_base", "n_newborn", "n_initial", pl.col("mean_initial_score").round(6)
    ).rows() == [(2, 2, 0, 2, 0.35), (2, 1, 1, 2, 0.175)]
    assert census(table, threshold=0.45)["n_retrieval_heads"].to_list() == [1, 0]
    assert census(table, base="c1")["n_from_base"].to_list() == [1, 2]


def test_census_without_initial_heads_says_nan() -> None:
    counts = census(_table([[0.0, 0.1], [0.3, 0.4]]))
    assert counts["mean_initial_score"].is_nan().all()
    assert counts["n_newborn"].to_list() == [0, 2]
    with pytest.raises(LccpError, match="unknown base checkpoint 'c9'"):
        census(_table([[0.0]]), base="c9")


def test_census_interval_is_that_of_the_mean_over_initial_heads(run: Run) -> None:
    sample = head_sample(run, n_boot=80)
    counts = census(sample.table(), sample=sample)
    initial = [
        k
        for k, (layer, head) in enumerate(sample.values.heads.tolist())
        if (layer, head) in {(2, 1), (3, 4), (0, 3), (2, 5)}
    ]
    initial += [k for k, pair in enumerate(sample.values.heads.tolist()) if tuple(pair) == (1, 2)]
    per_case = sample.values.values[8][:, initial].astype(float)
    draws = [np.average(per_case, axis=0, weights=weight).mean() for weight in sample.resamples.weights]
    row = counts.row(8, named=True)
    assert row["n_initial"] == len(initial)
    assert row["mean_initial_score"] == pytest.approx(per_case.mean(), abs=1e-6)
    tails = (1 - sample.resamples.level) / 2, (1 + sample.resamples.level) / 2
    assert row["mean_initial_low"] == pytest.approx(np.quantile(draws, tails[0]), abs=1e-6)
    assert row["mean_initial_high"] == pytest.approx(np.quantile(draws, tails[1]), abs=1e-6)


def test_stability_by_hand_and_against_scipy() -> None:
    before, after = [0.9, 0.5, 0.3, 0.1, 0.0, 0.0], [0.8, 0.1, 0.6, 0.2, 0.0, 0.05]
    row = stability(_table([before, after]), top_k=2).row(0, named=True)
    assert (row["top_k"], row["overlap"], row["n_heads"]) == (2, 1, 6)
    assert row["overlap_by_chance"] == pytest.approx(4 / 6)
    assert row["spearman"] == pytest.approx(spearmanr(before, after).statistic)


def test_stability_of_constant_scores_is_undefined() -> None:
    assert np.isnan(stability(_table([[0.0, 0.0], [0.1, 0.2]]))["spearman"][0])
    assert stability(_table([[0.1, 0.2]])).is_empty()
    with pytest.raises(LccpError, match="top_k must be at least 1"):
        stability(_table([[0.1], [0.2]]), top_k=0)


# --- head_records


def test_head_records_hold_the_contract(run: Run) -> None:
    records = head_records(run, n_boot=20)
    assert list(records[0]) == [
        *("checkpoint", "tokens_seen", "metric", "layer", "head", "score", "ci_low", "ci_high", "n"),
        "retrieves",
    ]
    assert len(records) == 16 * N_LAYERS * N_HEADS
    scores = [record["score"] for record in records]
    assert scores == sorted(scores, reverse=True)
    assert (records[0]["layer"], records[0]["head"]) == (3, 4)
    assert head_records(run, n_boot=20, top=3) == records[:3]
    last = head_records(run, n_boot=20, checkpoint="lccp-1.2M")
    planted = {pair for pair, level in PLANTED.items() if level(15) > 0.1}
    assert {(record["layer"], record["head"]) for record in last[: len(planted)]} == planted


def test_ties_are_ordered_by_checkpoint_layer_head(tmp_path: Path) -> None:
    def flatten(i: int, result: CaseResult) -> CaseResult:
        scores = {metric: np.zeros_like(values) for metric, values in result.scores.items()}
        return CaseResult(result.case_id, result.layers, scores, result.answer_loss_nats, result.greedy_ids)

    records = head_records(write_run(tmp_path / "run", lengths=(256,), n_needles=1, change=flatten, only=[0, 1]))
    keys = [(record["tokens_seen"], record["layer"], record["head"]) for record in records]
    assert keys == sorted(keys)


# --- outcomes


def test_outcomes_by_hand(tmp_path: Path) -> None:
    losses = {"-s0-0": [0.0, 2.0], "-s1-1": [3.0, 3.0]}

    def answer(i: int, result: CaseResult) -> CaseResult:
        key = next(key for key in losses if result.case_id.endswith(key))
        right = key == "-s0-0"
        return CaseResult(
            result.case_id,
            result.layers,
            result.scores,
            np.array(losses[key], np.float32),
            (1, 2, 3) if right else (0, 2, 3),
        )

    run = write_run(tmp_path / "run", lengths=(256,), n_needles=2, change=answer, only=[0])
    row = outcome_table(run, by=("length", "depth_fraction")).row(0, named=True)
    assert (row["length"], row["depth_fraction"], row["n"]) == (256, 0.0, 2)
    assert row["niah_score"] == 50.0
    assert row["loss_nats"] == pytest.approx(2.0)
    assert row["answer_ppl"] == pytest.approx((np.e + np.e**3) / 2)
    geometric = outcome_table(run, by=("length", "depth_fraction"), ppl="exp_mean").row(0, named=True)
    assert geometric["answer_ppl"] == pytest.approx(np.e**2)
    assert geometric["answer_ppl_low"] <= geometric["answer_ppl"] <= geometric["answer_ppl_high"]
    assert outcome_table(run, by=())["n"].to_list() == [2 * len(DEPTHS)]


def test_outcomes_of_missing_cases_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256, 1024), n_needles=2)
    for part in (run.path / "outcomes").glob("lccp-1.2M.0001.parquet"):
        part.unlink()  # the second shard is the longer length
    table = outcome_table(run)
    row = table.filter(checkpoint="lccp-1.2M", length=1024).row(0, named=True)
    assert row["n"] == 0
    assert np.isnan([row["niah_score"], row["answer_ppl"], row["loss_nats"], row["answer_ppl_low"]]).all()
    assert table.filter(checkpoint="lccp-1.2M", length=256)["n"][0] == 10


def test_outcome_errors(run: Run) -> None:
    with pytest.raises(LccpError, match=r"unknown ppl 'mean_pl' in outcome_table.*did you mean 'mean_ppl'"):
        outcome_table(run, ppl="mean_pl")
    with pytest.raises(LccpError, match=r"unknown column of by 'lenght'.*did you mean 'length'"):
        outcome_table(run, by=("lenght",))
    with pytest.raises(LccpError, match="names a column twice"):
        outcome_table(run, by=("length", "length"))


def test_another_task_only_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256,), n_needles=1, only=[0])
    cases = run.cases.with_columns(task=pl.lit("ruler"))
    cases.write_parquet(run.path / "cases.parquet")
    with pytest.raises(LccpError, match=r"no cases of task 'niah' \(it has: ruler\)"):
        outcome_table(run)


# --- imports


def _loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_no_torch_downstream_of_the_store() -> None:
    loaded = _loaded_after(
        "import lccp_interp.dynamics.heads, lccp_interp.report\n"
        "import lccp_interp.figures.paper, lccp_interp.figures.interactive"
    )
    assert not loaded & {"torch", "transformers"}


def test_dynamics_imports_no_plotting() -> None:
    assert not _loaded_after("import lccp_interp.dynamics") & {"matplotlib", "plotly", "torch"}
    assert not _loaded_after("import lccp_interp.figures, lccp_interp.report.findings") & {"matplotlib.figure", "torch"}


def test_a_copied_part_is_counted_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256,), n_needles=2)
    whole = score_table(run, n_boot=10)
    part = run.path / "scores" / "lccp-0.5M.0001.parquet"
    shutil.copy(part, part.with_name("lccp-0.5M.0001-copy.parquet"))
    n_rows = pl.read_parquet(part).filter(pl.col("metric") == "retrieval").height
    with pytest.warns(UserWarning, match=f"scores holds {n_rows} rows that say the same thing as another row, or"):
        copied = score_table(run, n_boot=10)
    assert copied.equals(whole, null_equal=True)
    answers = outcome_table(run, n_boot=10)
    part = run.path / "outcomes" / part.name
    shutil.copy(part, part.with_name("lccp-0.5M.0001-copy.parquet"))
    with pytest.warns(UserWarning, match="outcomes holds 5 rows that say the same thing"):
        assert outcome_table(run, n_boot=10).equals(answers, null_equal=True)


def test_rows_of_cases_that_the_run_does_not_have_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256, 1024), n_needles=2)
    whole = score_table(run, length=256, n_boot=10)
    path = run.path / "cases.parquet"
    cases = pl.read_parquet(path)
    lost = cases.filter(pl.col("length") == 1024).sort("case_id")["case_id"][0]
    cases.filter(pl.col("case_id") != lost).write_parquet(path)
    n_rows = 16 * N_LAYERS * N_HEADS
    with pytest.warns(UserWarning, match=rf"scores holds {n_rows} rows of cases that .* \({lost}\): left out; restore"):
        assert score_table(run, length=256, n_boot=10).equals(whole, null_equal=True)
    with pytest.warns(UserWarning, match=rf"outcomes holds 16 rows of cases that .* \({lost}\): left out"):
        outcome_table(run, n_boot=10)
