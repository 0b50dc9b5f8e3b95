"""Agreement of metrics: against scipy and counting by hand, with ties, gaps and its command."""

from __future__ import annotations

import dataclasses
import json
import zlib

import numpy as np
import pytest
import synthetic
from scipy.stats import spearmanr
from typer.testing import CliRunner

from lccp_interp.cli.runs import app
from lccp_interp.dynamics.agreement import AGREEMENT_SCHEMA, metric_agreement
from lccp_interp.dynamics.heads import score_table
from lccp_interp.schema import LccpError

LAST = 15


def differing(i, result):
    """`wu` ranks the heads the other way round, `copy` is noise of its own, `needle_mass` is the same for all."""
    scores = result.scores["retrieval"]
    noise = np.random.default_rng([zlib.crc32(result.case_id.encode()), i]).normal(size=scores.shape)
    others = {"wu": -scores, "copy": noise.astype(np.float32), "needle_mass": np.full_like(scores, 0.5)}
    return dataclasses.replace(result, scores={"retrieval": scores, **others, "copy@decoy": scores})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("agreement") / "run"
    return synthetic.write_run(path, lengths=(256, 1024), only=(3, 9, LAST), change=differing)


@pytest.fixture(scope="module")
def table(run):
    return metric_agreement(run)


def scores_of(run, metric, checkpoint, length=1024):
    return score_table(run, metric=metric, length=length).filter(checkpoint=checkpoint)["score"].to_numpy()


def test_every_pair_of_metrics_at_every_checkpoint(table):
    assert dict(table.schema) == AGREEMENT_SCHEMA
    pairs = table.select("metric", "other").unique()
    assert pairs.height == 6
    assert table.height == 6 * 3
    assert not any("@" in name for row in pairs.rows() for name in row)
    assert table["length"].unique().to_list() == [1024]
    assert table["n_heads"].unique().to_list() == [32]
    assert table["n"].unique().to_list() == [40]
    assert table["tokens_seen"].is_sorted()


def test_numbers_equal_scipy_and_counting(run, table):
    for row in table.to_dicts():
        one, other = (scores_of(run, row[name], row["checkpoint"]) for name in ("metric", "other"))
        if "needle_mass" in (row["metric"], row["other"]):
            # Where all heads are alike nothing is ranked.
            assert np.isnan([row["spearman"], row["overlap"], row["ci_low"]]).all()
            continue
        assert row["spearman"] == pytest.approx(spearmanr(one, other).statistic)
        tops = [set(np.argsort(-scores)[: row["top_k"]]) for scores in (one, other)]
        assert row["top_k"] == 8
        assert row["overlap"] == pytest.approx(len(tops[0] & tops[1]))
        assert row["overlap_by_chance"] == 8 * 8 / 32
        assert row["ci_low"] <= row["ci_high"]


def test_opposites_and_equals(run, tmp_path):
    opposite = metric_agreement(run, metrics=["retrieval", "wu"], checkpoint="last").row(0, named=True)
    assert [opposite[name] for name in ("spearman", "ci_low", "ci_high", "overlap")] == pytest.approx([-1, -1, -1, 0])
    same = synthetic.write_run(tmp_path / "same", lengths=(256,), only=(LAST,))
    for row in metric_agreement(same).to_dicts():
        assert [row[name] for name in ("spearman", "ci_low", "ci_high")] == pytest.approx([1, 1, 1])
        assert row["overlap"] == row["top_k"] == 8


def test_ties_are_broken_in_the_mean(tmp_path):
    def few(i, result):
        """Two heads are told apart by either metric, the other thirty tie."""
        one = np.zeros_like(result.scores["retrieval"])
        one[0, 0], one[0, 1] = 1, 0.5
        other = np.zeros_like(one)
        other[0, 0] = 1
        return dataclasses.replace(result, scores={"retrieval": one, "wu": other})

    run = synthetic.write_run(tmp_path / "run", lengths=(256,), only=(LAST,), change=few)
    (row,) = metric_agreement(run, top_k=2).to_dicts()
    # The second place of `wu` is one of 31 at random.
    assert row["overlap"] == pytest.approx(1 + 1 / 31)


def test_undefined_scores_leave_the_pair_fewer_heads(tmp_path):
    def gap(i, result):
        holed = result.scores["wu"].copy()
        holed[0, :3] = np.nan
        return dataclasses.replace(result, scores={"retrieval": result.scores["retrieval"], "wu": holed})

    run = synthetic.write_run(tmp_path / "run", lengths=(256,), only=(LAST,), change=gap)
    (row,) = metric_agreement(run).to_dicts()
    assert (row["n_heads"], row["top_k"]) == (29, 7)
    assert row["spearman"] == pytest.approx(1)


def test_what_is_asked_for_must_be_there(run):
    with pytest.raises(LccpError, match=r"unknown metric 'retreival' in .* did you mean 'retrieval'"):
        metric_agreement(run, metrics=["retreival", "wu"])
    for few in (["wu"], ["wu", "wu"]):
        with pytest.raises(LccpError, match="agreement is between at least two different metrics, got wu"):
            metric_agreement(run, metrics=few)
    with pytest.raises(LccpError, match="unknown checkpoint 'lost'"):
        metric_agreement(run, checkpoint="lost")


def test_the_command(run):
    def asked(*options):
        result = CliRunner().invoke(app, ["agreement", str(run.path), *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    records = json.loads(asked("--format", "json", "--checkpoint", "last", "--length", "256"))
    assert [record["length"] for record in records] == [256] * 6
    assert sum(record["spearman"] is None for record in records) == 3
    pair = json.loads(asked("--metrics", "copy,retrieval", "--top", "3", "--format", "json", "--checkpoint", "last"))
    assert [(record["metric"], record["other"], record["top_k"]) for record in pair] == [("copy", "retrieval", 3)]
    assert "overlap_by_chance" in asked()
