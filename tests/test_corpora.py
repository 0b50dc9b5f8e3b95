"""Corpus perplexity over a run: each checkpoint read once, key tokens held fixed, nothing done twice."""

from __future__ import annotations

import math
import shutil

import polars as pl
import pytest
import torch

from lccp_interp.behaviour.corpora import probe_corpora
from lccp_interp.capture.model import load_model
from lccp_interp.schema import LccpError
from lccp_interp.scoring import corpus as scoring
from lccp_interp.scoring.corpus import LongPpl
from lccp_interp.store import Run
from lccp_interp.sweep import score

OPTIONS = {"length": 96, "documents": 3, "long_ppl": LongPpl(alpha=0.01, beta=-50.0, short_context=8, step=8)}


@pytest.fixture(scope="module")
def scored(trajectory, tmp_path_factory):
    return score(
        trajectory, tmp_path_factory.mktemp("run") / "run", lengths=[64], depths=[50], samples=1, self_check=False
    )


@pytest.fixture
def run(scored, tmp_path) -> Run:
    shutil.copytree(scored.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


def test_the_perplexity_is_that_of_a_plain_pass(run, tmp_path, tokenizer):
    (tmp_path / "books").mkdir()
    for i in range(3):
        (tmp_path / "books" / f"{i}.txt").write_text(" ".join(f"The river {i} moved {j}." for j in range(60)))
    table = probe_corpora(run, [tmp_path / "books"], **OPTIONS)
    row = table.filter(checkpoint="lccp-1", benchmark="corpus-ppl", metric="ppl").row(0, named=True)
    assert (row["subset"], row["length"], row["n"]) == ("books", 96, 3)
    model = load_model(run.checkpoints.filter(name="lccp-1")["path"][0]).model
    ppls = []
    for i in range(3):
        ids = tokenizer((tmp_path / "books" / f"{i}.txt").read_text())["input_ids"][:96]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses = [-float(log_p[t - 1, ids[t]]) for t in range(1, 96)]
        ppls.append(math.exp(sum(losses) / len(losses)))
    assert row["score"] == pytest.approx(sum(ppls) / 3, rel=1e-4)


def test_all_checkpoints_are_held_against_the_same_tokens(run, monkeypatch):
    seen = {}
    original = scoring.score_corpus

    def spy(model, documents, **options):
        results = original(model, documents, **options)
        seen[model.name] = ({r.doc_id: r.key_positions for r in results}, options["long_ppl"] is not None)
        return results

    monkeypatch.setattr(scoring, "score_corpus", spy)
    table = probe_corpora(run, ["questions"], **OPTIONS)
    assert list(seen) == ["lccp-2", "pretrain-0", "lccp-1"]
    assert [looked for _, looked in seen.values()] == [True, False, False]
    assert seen["pretrain-0"][0] == seen["lccp-2"][0]
    assert sum(len(keys) for keys in seen["lccp-2"][0].values()) > 0
    assert table["checkpoint"].unique(maintain_order=True).to_list() == ["pretrain-0", "lccp-1", "lccp-2"]
    keys = table.filter(benchmark="LongPPL", metric="key_tokens")["score"]
    assert keys.n_unique() == 1


def test_nothing_is_read_twice_and_the_order_does_not_matter(run, scored, tmp_path, monkeypatch):
    whole = probe_corpora(run, ["questions", "stories"], **OPTIONS)
    shutil.copytree(scored.path, tmp_path / "other")
    calls = []
    original = scoring.score_corpus
    monkeypatch.setattr(
        scoring, "score_corpus", lambda model, *a, **o: calls.append(model.name) or original(model, *a, **o)
    )
    probe_corpora(tmp_path / "other", ["stories"], checkpoints=["pretrain-0"], **OPTIONS)
    assert calls == ["lccp-2", "pretrain-0"]  # the last says which tokens are key, and is not entered
    assert set(Run.open(tmp_path / "other").probes.collect()["checkpoint"]) == {"pretrain-0"}
    told = []
    again = probe_corpora(
        tmp_path / "other", ["questions", "stories"], progress=lambda *now: told.append(now), **OPTIONS
    )
    assert again.equals(whole)
    assert told[-1] == (5 * 288, 5 * 288, "done")  # six parts less the one that was there
    n_calls = len(calls)
    assert probe_corpora(tmp_path / "other", ["questions"], **OPTIONS).equals(
        whole.filter(pl.col("subset") == "questions")
    )
    assert len(calls) == n_calls


def test_mistakes_are_told(run, tmp_path):
    probe_corpora(run, ["stories"], checkpoints=["lccp-2"], **OPTIONS)
    with pytest.raises(
        LccpError, match=r"holds another corpus 'stories': length, sha256 differ \(length: there 96, asked 64\)"
    ):
        probe_corpora(run, ["stories"], **{**OPTIONS, "length": 64})
    with pytest.raises(LccpError, match="has no checkpoint 'lccp-7'"):
        probe_corpora(run, ["questions"], reference="lccp-7", **OPTIONS)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(LccpError, match="the corpus gives 0 documents of 96 tokens, 3 are needed"):
        probe_corpora(run, [tmp_path / "short.txt"], **OPTIONS)
