"""Heads side by side: checkpoints, runs and published lists; ties; survival of a cohort; key/value groups."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from synthetic import N_HEADS, N_LAYERS, PLANTED, write_run

from lccp_interp.checkpoints import bundled_trajectory
from lccp_interp.dynamics.comparison import by_kv_head, compare, kv_heads_of, survival
from lccp_interp.dynamics.heads import head_sample, score_table, stability
from lccp_interp.dynamics.ranking import membership, rank_biased_overlap, rbo_by_chance
from lccp_interp.imports import import_heads
from lccp_interp.schema import NULL_SUFFIX, LccpError
from lccp_interp.store import Run

CLEAR = 0.2
"""A threshold that no planted head is near to; one of them hovers around 0.1."""

FINAL = {pair for pair, level in PLANTED.items() if level(15) > CLEAR}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("comparison") / "run", lengths=[256], n_needles=4)


def slow_rbo(a, b, p):
    """Webber et al.'s Eq. 30 for two rankings without ties, given as lists of names, to the depth of the shorter."""
    k = min(len(a), len(b))
    agreement = [len({*a[:d]} & {*b[:d]}) / d for d in range(1, k + 1)]
    return (1 - p) / p * sum(agreement[d - 1] * p**d for d in range(1, k + 1)) + agreement[-1] * p**k


def scores_of(ranking, items):
    return np.array([len(ranking) - ranking.index(item) if item in ranking else math.nan for item in items])


def orders(scores):
    """All rankings that break the ties of `scores`."""
    groups = [np.flatnonzero(scores == value).tolist() for value in np.unique(scores)[::-1]]
    for chosen in itertools.product(*(itertools.permutations(group) for group in groups)):
        yield list(itertools.chain(*chosen))


def test_rank_biased_overlap_by_hand():
    # <a b c d> and <b a d e>, p = 0.5: A = 0, 1, 2/3, 3/4, so
    # 0.5 * (0 + 0.5 * 1 + 0.25 * 2/3 + 0.125 * 3/4) + 0.0625 * 3/4 = 0.427083...
    a, b = scores_of("abcd", "abcde"), scores_of("bade", "abcde")
    assert rank_biased_overlap(a, b, p=0.5) == pytest.approx(0.5 * (0.5 + 1 / 6 + 3 / 32) + 3 / 64)
    assert rank_biased_overlap(a, a) == pytest.approx(1)
    assert rank_biased_overlap(scores_of("ab", "abcd"), scores_of("cd", "abcd")) == 0


def test_rank_biased_overlap_equals_the_formula():
    rng = np.random.default_rng(0)
    for n_items, length, p in ((3, 3, 0.9), (40, 40, 0.9), (400, 400, 0.9), (400, 400, 0.98), (40, 7, 0.8)):
        a = list(rng.permutation(n_items))
        b = list(rng.permutation(n_items)[:length])
        got = rank_biased_overlap(scores_of(a, range(n_items)), scores_of(b, range(n_items)), p=p)
        assert got == pytest.approx(slow_rbo(a, b, p), abs=1e-10)


def test_ties_are_averaged_over_all_their_orders():
    a, b = np.array([3.0, 1, 1, 0, 0]), np.array([0.0, 0, 2, 2, 5])
    every = [slow_rbo(one, other, 0.7) for one in orders(a) for other in orders(b)]
    assert rank_biased_overlap(a, b, p=0.7) == pytest.approx(np.mean(every))
    top = [len({*one[:2]} & {*other[:2]}) for one in orders(a) for other in orders(b)]
    two = np.array([2])
    assert (membership(a, two) * membership(b, two)).sum() == pytest.approx(np.mean(top))


def test_unrelated_rankings_agree_by_chance():
    rng = np.random.default_rng(0)
    drawn = [rank_biased_overlap(rng.random(60), rng.random(60)) for _ in range(400)]
    assert rbo_by_chance(60, 60) == pytest.approx(np.mean(drawn), abs=3 * np.std(drawn) / 20)


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [math.nan] * 3])
def test_what_ranks_nothing_has_no_overlap(scores):
    assert math.isnan(rank_biased_overlap(np.array(scores), np.arange(3.0)))
    with pytest.raises(LccpError, match=r"p of rank-biased overlap must lie between 0 and 1, got 1"):
        rank_biased_overlap(np.array(scores), np.arange(3.0), p=1)


def test_every_checkpoint_against_the_base(run):
    table = compare(run, threshold=CLEAR)
    assert table["checkpoint"].to_list() == run.checkpoints["name"].to_list()
    assert set(table["reference"]) == {"pretrain-3.6M"}
    assert set(table["top_k"]) == {8}
    assert set(table["n_heads"]) == {N_LAYERS * N_HEADS}
    assert set(table["n"]) == {20}
    base = table.row(3, named=True)
    assert (base["overlap"], base["jaccard"], base["spearman"]) == (8.0, 1.0, pytest.approx(1))
    assert base["rbo"] == pytest.approx(1, abs=1e-3)  # two of the noise heads are tied
    last = table.row(-1, named=True)
    assert last["overlap_by_chance"] == 2.0
    assert last["rbo_by_chance"] == pytest.approx(rbo_by_chance(32, 32))
    assert last["n_retrieval_heads"] == len(FINAL)
    # Base heads: (2, 1), (3, 4), (0, 3), (2, 5); of them (0, 3) is dead at the end, and (1, 6), (3, 0) are new.
    assert last["n_reference_heads"] == 4
    assert last["jaccard"] == 3 / 6


def test_against_the_checkpoint_before_it_is_table_5(run):
    steps = stability(score_table(run), top_k=5)
    for row in steps.tail(3).iter_rows(named=True):
        compared = compare(run, row["from_checkpoint"], top_k=5).row(
            by_predicate=pl.col("checkpoint") == row["to_checkpoint"], named=True
        )
        assert compared["overlap"] == row["overlap"]
        assert compared["spearman"] == pytest.approx(row["spearman"])
        assert compared["overlap_by_chance"] == row["overlap_by_chance"]


def test_overlap_does_not_count_ties_by_their_number(tmp_path):
    def zero_but(change):
        def of(i, result):
            scores = np.zeros((N_LAYERS, N_HEADS), np.float32)
            scores[0, 0] = 0.5 if i < 8 else 0
            scores[3, 7] = 0.5 if i >= 8 else 0
            change(i, scores)
            return type(result)(
                result.case_id, result.layers, {"retrieval": scores}, result.answer_loss_nats, result.greedy_ids
            )

        return of

    sparse = write_run(
        tmp_path / "sparse", lengths=[256], n_needles=1, only=[3, 15], change=zero_but(lambda i, s: None)
    )
    row = compare(sparse).row(-1, named=True)
    # One head leads, seven of the other 31 fill the top 8 at random: (0, 0) and (3, 7) meet zeros, 30 zeros each other.
    assert row["overlap"] == pytest.approx(2 * 7 / 31 + 30 * (7 / 31) ** 2)
    assert row["jaccard"] == 0
    flat = write_run(
        tmp_path / "flat", lengths=[256], n_needles=1, only=[3, 15], change=zero_but(lambda i, s: s.fill(0))
    )
    row = compare(flat).row(-1, named=True)
    assert [name for name in ("overlap", "rbo", "spearman", "jaccard") if not math.isnan(row[name])] == []
    assert row["n_heads"] == 32


def test_a_head_that_is_not_above_its_null_retrieves_nothing(tmp_path):
    def with_null(i, result):
        scores = result.scores["retrieval"]
        null = scores * (np.arange(N_LAYERS)[:, None] != 2)  # only layer 2 scores more on needles than on decoys
        return replace(result, scores={"retrieval": scores, "retrieval" + NULL_SUFFIX: null})

    decoys = write_run(tmp_path / "run", lengths=[256], n_needles=4, only=[3, 14, 15], change=with_null)
    row = compare(decoys, threshold=CLEAR).row(-1, named=True)
    # Of FINAL only (2, 1) and (2, 5) are in layer 2, and both are heads of the base.
    assert (row["n_retrieval_heads"], row["n_reference_heads"], row["jaccard"]) == (2, 2, 1.0)


def test_undefined_heads_are_left_out_and_counted(tmp_path, run):
    reference = score_table(run).filter(checkpoint="lccp-1.2M").select("layer", "head", "score")
    holes = reference.with_columns(
        score=pl.when(layer=0).then(float("nan")).when(layer=1).then(None).otherwise("score")
    )
    row = compare(run, holes).row(-1, named=True)
    assert (row["n_heads"], row["top_k"], row["spearman"]) == (16, 4, pytest.approx(1))
    row = compare(run, reference.with_columns(score=float("nan"))).row(-1, named=True)
    assert (row["n_heads"], row["top_k"]) == (0, None)
    assert math.isnan(row["overlap"])


def test_against_a_list_that_names_some_heads(tmp_path, run):
    top = score_table(run).filter(checkpoint="lccp-1.2M").sort("score", descending=True).head(5)
    file = tmp_path / "best.csv"
    top.select("layer", "head", "score").write_csv(file)
    row = compare(run, file, top_k=30).row(-1, named=True)
    # The list has five places; the run ranks all its heads.
    assert (row["top_k"], row["overlap"], row["n_heads"]) == (5, 5.0, 5)
    assert row["overlap_by_chance"] == 25 / 32
    assert row["rbo"] == pytest.approx(1)
    import_heads(run.path, None, file)
    kept = compare(Run.open(run.path), "imported:best", top_k=30)
    assert set(kept["reference"]) == {"imported:best"}
    assert kept.drop("reference").equals(compare(run, file, top_k=30).drop("reference"))


def test_against_another_run(tmp_path, run):
    other = write_run(tmp_path / "other", lengths=[256], n_needles=2, only=[14, 15])
    both = compare(run, other)
    assert both.filter(pl.col("reference").is_not_null()).select("checkpoint", "reference").rows() == [
        ("lccp-1.1M", f"{other.path}:lccp-1.1M"),
        ("lccp-1.2M", f"{other.path}:lccp-1.2M"),
    ]
    alone = both.row(0, named=True)
    assert (alone["n_heads"], alone["n_reference_heads"], math.isnan(alone["rbo"])) == (0, None, True)
    assert compare(run, other.path).equals(both)
    one = compare(run, f"{other.path}:lccp-1.2M")
    assert one["reference"].null_count() == 0
    assert one.row(-1) == both.row(-1)
    with pytest.raises(LccpError, match=r"unknown checkpoint 'x' in .*other: known are lccp-1\.1M, lccp-1\.2M"):
        compare(run, f"{other.path}:x")
    with pytest.raises(LccpError, match="has no cases of 256 tokens; it has 1024"):
        compare(run, write_run(tmp_path / "longer", lengths=[1024], n_needles=1, only=[15]))


def whole(n_layers, n_heads, **more):
    rows = [(i, j, (7 * i + 3 * j) % 11 / 10) for i in range(n_layers) for j in range(n_heads)]
    return pl.DataFrame(rows, schema=["layer", "head", "score"], orient="row").with_columns(**more)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (whole(32, 32), r"architectures differ: .* has 4 layers x 8 heads, the given table has 32 layers x 32 heads;"),
        (whole(4, 4), r"4 layers x 8 heads, the given table has 4 layers x 4 heads; compare models of one"),
        (whole(4, 4, kind=pl.lit("duo")), r"4 layers x 4 heads; DuoAttention scores key/value heads: add --by-kv-head"),
        (whole(5, 8).tail(2), r"the given table names layer 4 head 6, but .*run has 4 layers x 8 heads; give a list"),
        (whole(4, 8).drop("score"), r"the given table has no column 'score'; a head list needs layer, head, score"),
        (pl.concat([whole(4, 8)] * 2), r"the given table has several scores for layer 0 head 0; keep one per head"),
        ("lccp", r"unknown reference 'lccp': .*run has pretrain-0\.5M, .*; or give another run's folder, or the file"),
        ("imported:x", r"no imported head list 'x'"),
    ],
)  # fmt: skip
def test_references_that_do_not_fit_are_refused(run, reference, message):
    with pytest.raises(LccpError, match=message) as error:
        compare(run, reference)
    assert "\n" not in str(error.value)


def test_one_checkpoint_is_not_compared_with_itself(tmp_path):
    single = write_run(tmp_path / "single", lengths=[256], n_needles=1, only=[3])
    with pytest.raises(LccpError, match=r"one scored checkpoint, 'pretrain-3\.6M'; compare it with another run"):
        compare(single)
    assert compare(single, whole(4, 8)).height == 1


def test_checkpoints_of_the_same_weights_are_named(tmp_path):
    twins = write_run(tmp_path / "twins", lengths=[256], n_needles=1, only=[3, 14, 15])
    for entry in twins.manifest["checkpoints"][-2:]:
        entry["hash"] = "same"
    with pytest.warns(UserWarning, match=r"lccp-1\.1M, lccp-1\.2M of .* hold identical weights"):
        compare(twins)


def test_scores_by_key_value_head():
    nan = math.nan
    table = pl.DataFrame(
        {"checkpoint": ["a"] * 8, "layer": [0] * 4 + [1] * 4, "head": [0, 1, 2, 3] * 2, "n": [5, 3, 9, 9, 0, 0, 7, 7],
         "score": [0.2, 0.6, 0.3, 0.3, nan, nan, nan, 0.1]}
    )  # fmt: skip
    grouped = by_kv_head(table, 2)
    assert grouped.select("layer", "kv_head", "best_head", "n_heads", "n").rows() == [
        (0, 0, 1, 2, 3), (0, 1, 2, 2, 9), (1, 0, None, 0, None), (1, 1, 3, 1, 7),
    ]  # fmt: skip
    assert grouped["max_score"].to_list() == pytest.approx([0.6, 0.3, nan, 0.1], nan_ok=True)
    assert grouped["mean_score"].to_list() == pytest.approx([0.4, 0.3, nan, 0.1], nan_ok=True)
    with pytest.raises(LccpError, match="3 key/value heads do not divide the 4 heads of a layer"):
        by_kv_head(table, 3)
    with pytest.raises(LccpError, match="a table does not tell the number of key/value heads; give n_kv_heads"):
        by_kv_head(table)


def test_key_value_heads_of_a_run_equal_a_loop(run):
    scores = score_table(run)
    grouped = by_kv_head(run, 2)
    assert grouped.height == 16 * N_LAYERS * 2
    for row in grouped.sample(20, seed=0).iter_rows(named=True):
        members = scores.filter(
            pl.col("checkpoint") == row["checkpoint"],
            pl.col("layer") == row["layer"],
            pl.col("head").is_in([4 * row["kv_head"] + i for i in range(4)]),
        )
        assert members.height == 4
        assert row["max_score"] == members["score"].max()
        assert row["mean_score"] == pytest.approx(members["score"].mean())


def test_comparison_by_key_value_head(run):
    table = compare(run, "lccp-1.2M", by_kv=True, n_kv_heads=2, threshold=CLEAR)
    assert set(table["n_heads"]) == {8}
    last = table.row(-1, named=True)
    assert (last["jaccard"], last["rbo"]) == (1.0, pytest.approx(1))
    assert last["n_retrieval_heads"] == len({(layer, head // 4) for layer, head in FINAL})
    # A list of key/value heads stays as it is, one of query heads is grouped by its best, a short one too.
    best = score_table(run).filter(checkpoint="lccp-1.2M").select("layer", "head", "score")
    gates = by_kv_head(best, 2).select("layer", head="kv_head", score="max_score")
    for reference in (best, gates, gates.with_columns(kind=pl.lit("duo"))):
        assert (
            compare(run, reference, by_kv=True, n_kv_heads=2, threshold=CLEAR)
            .drop("reference")
            .equals(table.drop("reference"))
        )
    short = compare(run, best.filter(pl.col("score") > 0.5), by_kv=True, n_kv_heads=2).row(-1, named=True)
    assert (short["top_k"], short["overlap"], short["n_heads"]) == (2, 2.0, 2)
    with pytest.raises(LccpError, match="has 4 layers x 8 heads, the given table has 4 layers x 4 heads"):
        compare(run, whole(4, 4), by_kv=True, n_kv_heads=2)


def with_paths(run, *paths):
    """The run as if its checkpoints stood at `paths`."""
    listed = [{**entry, "path": str(path)} for entry, path in zip(run.manifest["checkpoints"], paths, strict=False)]
    return Run(run.path, {**run.manifest, "checkpoints": listed})


def test_key_value_heads_are_read_from_the_config(tmp_path, run):
    with pytest.raises(LccpError, match=r"no checkpoint of .*run is at its path any more \(looked at 16, e\.g\. some"):
        kv_heads_of(run)
    bundled = [checkpoint.path for checkpoint in bundled_trajectory()]
    assert kv_heads_of(with_paths(run, "gone", *bundled)) == 4
    for name, config in (("nested", {"text_config": {"num_key_value_heads": 2}}), ("silent", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "x", **config}))
    assert kv_heads_of(with_paths(run, tmp_path / "nested")) == 2
    with pytest.raises(LccpError, match=r"silent/config\.json does not tell num_key_value_heads \(got None\); give"):
        kv_heads_of(with_paths(run, tmp_path / "silent"))
    with pytest.raises(LccpError, match=r"differ in key/value heads: 2 in .*nested, 4 in .*; give --n-kv-heads N"):
        kv_heads_of(with_paths(run, tmp_path / "nested", bundled[0]))


def test_survival_of_the_planted_heads(run):
    sample = head_sample(run)
    table = sample.table()
    curve = survival(table, sample=sample, threshold=CLEAR)
    assert curve["checkpoint"][0] == "pretrain-3.6M"
    assert curve.height == 13
    assert set(curve["n_cohort"]) == {4}
    # Of the four base heads (2, 5) is dead from number 5 to 11, (0, 3) from number 9 on.
    alive = [sum(PLANTED[pair](i) > CLEAR for pair in ((2, 1), (3, 4), (0, 3), (2, 5))) for i in range(3, 16)]
    assert curve["n_alive"].to_list() == alive
    assert curve["survival"].to_list() == [n / 4 for n in alive]
    assert (curve["ci_low"] <= curve["survival"]).all()
    assert (curve["ci_high"] >= curve["survival"]).all()
    assert curve["ci_low"][0] == curve["ci_high"][0] == 1
    assert survival(table)["ci_low"].is_nan().all()
    last = survival(table, cohort="lccp-1.2M", sample=sample, threshold=CLEAR)
    assert last.select("n_cohort", "n_alive", "survival").rows() == [(len(FINAL), len(FINAL), 1.0)]
    with pytest.raises(LccpError, match=r"unknown cohort 'lccp-9M' in the score table: known are"):
        survival(table, cohort="lccp-9M")


def test_survival_intervals_equal_a_loop(run):
    sample = head_sample(run, n_boot=50)
    table = sample.table()
    curve = survival(table, sample=sample, threshold=0.35)
    weights, values = sample.resamples.weights, sample.values.values
    draws = []
    for weight in weights:
        means = [np.average(values[i], axis=0, weights=weight) for i in (3, 10)]
        cohort = means[0] > 0.35
        draws.append((cohort & (means[1] > 0.35)).sum() / cohort.sum())
    row = curve.row(7, named=True)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert row["ci_low"] < row["ci_high"]


def test_survival_without_a_cohort_or_with_undefined_scores(run):
    table = score_table(run)
    nobody = survival(table, threshold=2.0)
    assert nobody["survival"].is_nan().all()
    assert set(nobody["n_cohort"]) == {0}
    gone = table.with_columns(score=pl.when(checkpoint="lccp-1.2M", layer=2).then(float("nan")).otherwise("score"))
    last = survival(gone, threshold=CLEAR).row(-1, named=True)
    assert (last["n_cohort"], last["n_defined"], last["n_alive"], last["survival"]) == (4, 2, 1, 0.5)


def test_lccp_compare(lccp, run):
    code, out, _ = lccp("compare", run.path, "--reference", "lccp-1.2M", "--top", 5, "--format", "json")
    rows = json.loads(out)
    assert code == 0
    assert [row["checkpoint"] for row in rows] == run.checkpoints["name"].to_list()
    assert (rows[-1]["top_k"], rows[-1]["overlap"], rows[-1]["length"]) == (5, 5.0, 256)
    code, out, _ = lccp("compare", run.path, "--by-kv-head", "--n-kv-heads", 2, "--format", "csv")
    assert [row["n_heads"] for row in csv.DictReader(io.StringIO(out))] == ["8"] * 16
    code, out, err = lccp("compare", run.path, "--metric", "wu")
    assert (code, "overlap_by_chance" in out) == (0, True)
    assert "wu at 256 tokens" in err
    code, out, err = lccp("compare", run.path, "--by-kv-head")
    assert (code, out) == (2, "")
    assert "give --n-kv-heads N" in err


def test_lccp_import_then_compare(lccp, tmp_path, run):
    file = tmp_path / "published.json"
    file.write_text(json.dumps({f"{i}-{j}": [(i + j) / 16] * 3 for i in range(N_LAYERS) for j in range(N_HEADS)}))
    code, out, _ = lccp("import", "wu", file, "--top", 2, "--format", "json")
    shown = json.loads(out)
    assert code == 0
    assert (shown["n_heads"], shown["n_above_threshold"], shown["kept"]) == (32, 29, None)
    assert [(row["layer"], row["head"], row["n"]) for row in shown["records"]] == [(3, 7, 3), (2, 7, 3)]
    assert not (run.path / "imported" / "published.parquet").exists()
    code, out, err = lccp("import", "wu", file, "--into", run.path)
    assert (code, len(out.splitlines())) == (0, 11)
    assert f"kept in {run.path} as published" in err
    code, out, _ = lccp("compare", run.path, "--reference", "imported:published", "--format", "json")
    assert {row["reference"] for row in json.loads(out)} == {"imported:published"}
    code, out, err = lccp("compare", run.path, "--reference", "imported:other")
    assert (code, "it has: " in err) == (2, True)


def test_lccp_import_of_results(lccp, tmp_path, run):
    file = tmp_path / "ruler.csv"
    file.write_text("checkpoint,benchmark,metric,score\nstep9,ruler,accuracy,nan\n")
    code, out, _ = lccp("import", "probes-csv", file, "--format", "json")
    assert (code, json.loads(out)["records"][0]["score"]) == (0, None)
    code, _, err = lccp("import", "probes-csv", file, "--into", run.path)
    assert (code, err.count("\n"), "--map 'step9=NAME'" in err) == (2, 1, True)
    code, out, _ = lccp("import", "probes-csv", file, "--into", run.path, "--map", "step9=lccp-1.2M", "--format", "csv")
    assert (code, out.splitlines()[1]) == (0, "lccp-1.2M,4800000,ruler,,,accuracy,,,")
    assert Run.open(run.path).probes.collect()["checkpoint"].to_list() == ["lccp-1.2M"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["xls"], "unknown kind 'xls'; known are wu, duo, heads-csv, probes-csv, probes-json"),
        (["wu", "--map", "a=b"], "--map is for benchmark results (probes-csv, probes-json), not for wu"),
        (["probes-csv", "--into", "RUN", "--map", "a"], "--map 'a': expected THEIRS=OURS"),
        (["probes-csv", "--into", "RUN", "--map", "a=b", "--map", "a=c"], "--map names 'a' twice"),
        (["wu", "--into", "nowhere"], "no run at nowhere"),
    ],
)
def test_lccp_import_says_what_is_wrong(lccp, tmp_path, run, arguments, message):
    file = tmp_path / "a.json"
    file.write_text('{"0-0": [1]}')
    kind, *options = [str(run.path) if argument == "RUN" else argument for argument in arguments]
    code, out, err = lccp("import", kind, file, *options)
    assert (code, out) == (2, "")
    assert message in err
