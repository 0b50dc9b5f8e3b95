"""Which results a correlation is made with: one metric each, means over subsets, patterns, corpora among the cheap."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from synthetic import write_run

from lccp_interp.dynamics import Draws, correlate, paper_layout, run_series
from lccp_interp.dynamics.probe_choice import probe_series
from lccp_interp.schema import LccpError
from lccp_interp.store import PROBES_SCHEMA, append_probes

FEW = Draws(n_perm=199, n_boot=50)


def own_results(run, *, benchmarks=None, metrics=("sft greedy", "sft pass@3"), length=1024):
    """Results as a probe of a run leaves them; the score tells benchmark, subset and metric."""
    benchmarks = benchmarks or {"LongBio-style": ("standard", "pronoun"), "RULER-style": ("qa",)}
    series = [
        (name, subset, metric) for name, subsets in benchmarks.items() for subset in subsets for metric in metrics
    ]
    rng = np.random.default_rng(3)
    return pl.DataFrame(
        [
            {
                "checkpoint": name, "tokens_seen": tokens, "benchmark": benchmark, "subset": subset, "length": length,
                "metric": metric, "score": 0.1 * place + 0.01 * i + 0.02 * rng.random(), "n": 16, "stderr": 0.1,
            }
            for place, (benchmark, subset, metric) in enumerate(series)
            for i, (name, tokens) in enumerate(run.checkpoints.select("name", "tokens_seen").rows())
        ],
        schema=PROBES_SCHEMA,
    )  # fmt: skip


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A run with results of its own: two benchmarks, three metrics for MRCR, two corpora."""
    run = write_run(tmp_path_factory.mktemp("correlation") / "studied", lengths=(256,), n_needles=4)
    mrcr = own_results(run, benchmarks={"MRCR-style": ("2needle",)}, metrics=("sft greedy", "sft pass@3", "sft best@3"))
    corpora = own_results(
        run, benchmarks={"corpus-ppl": ("books", "code"), "LongPPL": ("books",)}, metrics=("pooled_ppl", "ppl")
    )
    keys = own_results(run, benchmarks={"LongPPL": ("books",)}, metrics=("key_tokens",))
    for name, frame in {"sft": own_results(run), "mrcr": mrcr, "corpora": corpora, "keys": keys}.items():
        append_probes(run.path, name, frame)
    return run


def test_one_metric_of_each_benchmark_and_the_mean_over_subsets(studied):
    _, probes = run_series(studied)
    assert probes["name"].unique(maintain_order=True).to_list() == [
        "LongBio-style/pronoun/1024/sft pass@3",
        "LongBio-style/standard/1024/sft pass@3",
        "LongBio-style/mean/1024/sft pass@3",
        "MRCR-style/2needle/1024/sft best@3",
        "RULER-style/qa/1024/sft pass@3",
    ]
    values = {name[0]: rows["value"].to_numpy() for name, rows in probes.group_by("name")}
    subsets = [values[f"LongBio-style/{subset}/1024/sft pass@3"] for subset in ("pronoun", "standard")]
    np.testing.assert_allclose(values["LongBio-style/mean/1024/sft pass@3"], np.mean(subsets, axis=0))


def test_patterns_choose_probe_series(studied):
    def names(*patterns):
        return run_series(studied, probes_like=patterns)[1]["name"].unique(maintain_order=True).to_list()

    assert names("longbio*/mean/*", "ruler*greedy") == [
        "LongBio-style/mean/1024/sft greedy",
        "LongBio-style/mean/1024/sft pass@3",
        "RULER-style/qa/1024/sft greedy",
    ]
    with pytest.raises(
        LccpError, match=r"--probe '\*accuracy' matches no probe result; there are LongBio-style/pronoun/"
    ):
        names("*accuracy")


def test_a_mean_needs_all_subsets(studied):
    rows = own_results(studied, metrics=("sft pass@3",))
    lacking = rows.filter((pl.col("subset") != "pronoun") | (pl.col("tokens_seen") > 3_600_000))
    mean = probe_series(lacking).filter(name="LongBio-style/mean/1024/sft pass@3")
    assert mean["tokens_seen"].min() == 3_700_000
    # A benchmark that brings a mean of its own keeps it.
    named = own_results(studied, benchmarks={"x": ("a", "b", "mean")}, metrics=("acc",))
    assert probe_series(named)["name"].n_unique() == 3


def test_studies_stay_apart_and_foreign_metrics_are_thinned_by_how_much_there_is(studied):
    metrics = ("raw greedy", "sft pass@1", "sft pass@3", "f1", "em")
    rows = own_results(studied, benchmarks={"QA": ("all",)}, metrics=metrics)
    rows = rows.filter((pl.col("metric") != "em") | (pl.col("tokens_seen") > 3_600_000))
    assert probe_series(rows)["name"].unique(maintain_order=True).to_list() == [
        "QA/all/1024/f1", "QA/all/1024/raw greedy", "QA/all/1024/sft pass@3",
    ]  # fmt: skip


def test_perplexities_of_long_documents_are_cheap(studied):
    cheap, probes = run_series(studied, stage="lccp")
    names = cheap["name"].unique(maintain_order=True).to_list()
    assert names[5:] == ["LongPPL/books/1024/ppl", "corpus-ppl/books/1024/ppl", "corpus-ppl/code/1024/ppl"]
    assert not probes["name"].str.contains("(?i)ppl|key_tokens").any()
    assert cheap.filter(name="corpus-ppl/code/1024/ppl")["tokens_seen"].to_list() == [100_000 * i for i in range(13)]
    made = correlate(cheap, probes, transforms=["levels"], draws=FEW)
    assert made.filter(cheap="corpus-ppl/books/1024/ppl").height == 5


def test_the_published_numbers_stand_beside_benchmarks_in_the_manner_of_the_papers(studied):
    made = correlate(*run_series(studied), transforms=["levels"], draws=FEW)
    row = made.filter(cheap="niah_score", probe="LongBio-style/mean/1024/sft pass@3").row(0, named=True)
    assert (row["published_r"], row["published_p"]) == (0.4977, 0.3151)
    wide = paper_layout(made)
    assert wide.columns[2:] == [
        "LongBio-style/mean/1024/sft pass@3", "MRCR-style/2needle/1024/sft best@3", "RULER-style/qa/1024/sft pass@3",
        "average",
    ]  # fmt: skip
    assert wide.filter(cheap="answer_ppl", quantity="published r")["average"][0] == pytest.approx(-0.8210, abs=1e-4)


def test_command_says_how_many_results_were_left_out(lccp, studied):
    code, out, err = lccp("correlate", studied.path, "--format", "json")
    assert code == 0
    assert len(json.loads(out)) == 8 * 5 * 3
    # Three greedy ones of LongBio and RULER, two of MRCR, three pooled perplexities, and the key tokens.
    assert err.startswith("left out 9 more series of results (LongBio-style/pronoun/1024/sft greedy, ")
    assert err.endswith("; --probe chooses others\n")
    code, out, err = lccp("correlate", studied.path, "--format", "json", "--probe", "*greedy", "--probe", "*best@3")
    assert {record["probe"].rsplit(" ", 1)[1] for record in json.loads(out)} == {"greedy", "best@3"}
    assert "without --probe one metric per subset is taken" in err
    code, _, err = lccp("correlate", studied.path, "--probe", "*bleu")
    assert code == 2
    assert "--probe '*bleu' matches no probe result" in err
