"""The causal check on a model whose one retrieval head is known, and its parts against slow twins."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import planted
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lccp_interp.capture.model import load_model
from lccp_interp.dynamics.causal import CAUSAL_SCHEMA, causal_table, important_from
from lccp_interp.dynamics.resampling import draw_resamples
from lccp_interp.dynamics.selection import niah_cases
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.interventions import answers as answers_module
from lccp_interp.interventions.answers import other_cases, outcomes_without
from lccp_interp.interventions.causal import ABLATIONS_SCHEMA, ablate_heads, ablation_rows, ablation_studies
from lccp_interp.interventions.choice import chosen_cases, head_sets, ranked_heads, set_sizes
from lccp_interp.interventions.hooks import mask_span
from lccp_interp.report.causes import causes_section
from lccp_interp.schema import LccpError
from lccp_interp.store import Run, cases_from_frame
from lccp_interp.sweep import score
from lccp_interp.tasks.niah import NiahGrid, build_cases

COPY = "1-3"
NAMES = ["step-0", "step-1", "step-2", "step-3"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Four checkpoints; in the first the copy head looks anywhere."""
    folder = tmp_path_factory.mktemp("planted")
    root = planted.save_trajectory(folder / "models", [False, True, True, True])
    return score(
        root,
        folder / "run",
        lengths=[96, 128],
        depths=[0, 50, 100],
        samples=2,
        needles=planted.NEEDLES,
        haystack=planted.filler(120),
        prompt=planted.PROMPT,
        self_check=False,
    )


@pytest.fixture
def run(scored, tmp_path) -> Run:
    shutil.copytree(scored.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture(scope="module")
def checked(scored, tmp_path_factory):
    """A run with a study of k = 1 at every checkpoint."""
    path = tmp_path_factory.mktemp("checked") / "run"
    shutil.copytree(scored.path, path)
    rows = ablate_heads(path, k=[1], n_draws=3, n_cases=6, checkpoints="all")
    return rows, Run.open(path)


def test_removing_the_copy_head_destroys_retrieval_and_random_ones_do_not(checked):
    rows, run = checked
    assert dict(rows.schema) == ABLATIONS_SCHEMA
    assert rows.height == 4 * 6 * (1 + 1 + 3)
    assert rows["checkpoint"].unique(maintain_order=True).to_list() == NAMES
    able = rows.filter(pl.col("checkpoint") != "step-0")
    assert set(able.filter(set="top")["heads"]) == {COPY}
    assert not able.filter(set="top")["greedy_exact"].any()
    assert able.filter(set="none")["greedy_exact"].all()
    random = able.filter(set="random")
    assert random["greedy_exact"].all()
    assert set(random["heads"]) == {"1-0", "1-1", "1-2"}
    assert random["layer_matched"].all()
    assert not rows.filter(checkpoint="step-0", set="none")["greedy_exact"].any()
    # Each draw is asked about every case.
    assert set(random.group_by("checkpoint", "draw").len()["len"]) == {6}
    assert ablation_studies(run) == [rows["study"][0]]
    assert ablation_rows(run).equals(rows)


@pytest.mark.parametrize("kind", ["mean", "resample", "blind"])
def test_other_kinds_of_ablation_find_it_too(run, kind):
    rows = ablate_heads(run, k=[1], n_draws=2, kind=kind, length=96, n_cases=4)
    assert set(rows["checkpoint"]) == {"step-3"}
    exact = dict(rows.group_by("set").agg(pl.col("greedy_exact").mean()).iter_rows())
    assert exact == {"none": 1.0, "top": 0.0, "random": 1.0}


def test_single_heads_followed_over_checkpoints(run):
    heads = [(1, 3), (0, 0), (1, 2)]
    rows = ablate_heads(run, heads=heads, each=True, n_draws=3, n_cases=6, checkpoints="all")
    table = causal_table(Run.open(run.path))
    assert set(rows.filter(set="single")["heads"]) == {"1-3", "0-0", "1-2"}
    found = {row["heads"]: row for row in important_from(table, outcome="greedy_exact").to_dicts()}
    assert [found[head]["checkpoint"] for head in ("1-3", "0-0", "1-2")] == ["step-1", "step-1", None]
    # The loss tells of other harm too: of the head that the copy head reads, before that one copies.
    by_loss = {row["heads"]: row["checkpoint"] for row in important_from(table).to_dicts()}
    assert by_loss == {"1-3": "step-1", "0-0": "step-0", "1-2": None}
    assert found["1-3"]["tokens_seen"] == 1000
    assert found["1-3"]["at_end"]
    assert not found["1-3"]["provisional"]
    assert not found["1-2"]["at_end"]


# The parts


def twin(model, case, heads, change):
    """The slow, obvious way: one whole pass, the heads changed in what the output projection gets."""
    handles = []
    for layer, block in enumerate(model.model.model.layers):

        def changed(module, inputs, layer=layer):
            whole = inputs[0].clone()
            for own, head in heads:
                if own == layer:
                    whole[..., head * 8 : head * 8 + 8] = change(own, head, whole[..., head * 8 : head * 8 + 8])
            return (whole,)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(changed))
    ids = torch.tensor([case.prompt_ids + case.answer_ids])
    with torch.inference_mode():
        logits = model.model(ids[:, :-1]).logits[0, -len(case.answer_ids) :]
    for handle in handles:
        handle.remove()
    answer = ids[0, -len(case.answer_ids) :]
    loss = float(torch.nn.functional.cross_entropy(logits, answer))
    return loss, bool((logits.argmax(-1) == answer).all())


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_outcomes_equal_the_slow_twin(checkpoint, tokenizer, kind):
    model = load_model(checkpoint)
    cases = build_cases(NiahGrid(lengths=(96,), depths=(0, 50, 100), samples=2), tokenizer)
    sets = [[], [(0, 1), (2, 3)], [(1, 0)]]
    got = outcomes_without(model, cases, sets, kind=kind)
    every = [(layer, head) for layer in range(3) for head in range(4)]
    seen = []
    for case in cases:
        own = {}
        twin(model, case, every, lambda layer, head, part, own=own: own.setdefault((layer, head), part.clone()))
        seen.append(own)
    sources = [cases.index(other) for other in other_cases(cases)]
    for heads, answers in zip(sets, got, strict=True):
        for index, (case, answer) in enumerate(zip(cases, answers, strict=True)):
            changes = {
                "zero": lambda layer, head, part: torch.zeros_like(part),
                "mean": lambda layer, head, part: torch.cat([own[layer, head][0] for own in seen]).mean(0),
                "resample": lambda layer, head, part, index=index: seen[sources[index]][layer, head],
            }
            expected = twin(model, case, heads, changes[kind])
            assert answer[0] == pytest.approx(expected[0], abs=2e-5)
            assert answer[1] == expected[1]
    assert got[0] != got[1]


def test_the_intact_outcomes_are_those_of_the_run(checked):
    rows, run = checked
    ours = rows.filter(set="none").select("checkpoint", "case_id", "loss_nats", "greedy_exact")
    theirs = run.outcomes.select("checkpoint", "case_id", "answer_loss_nats", exact="greedy_exact").collect()
    both = ours.join(theirs, on=["checkpoint", "case_id"], how="left")
    assert both["exact"].equals(both["greedy_exact"])
    np.testing.assert_allclose(both["loss_nats"], both["answer_loss_nats"].list.mean(), atol=1e-4)


def test_resampling_takes_another_needle(scored):
    cases = [case for case in cases_from_frame(scored.cases) if case.length == 96]
    for case, other in zip(cases, other_cases(cases), strict=True):
        assert case.needle_id != other.needle_id
    same = [case for case in cases if case.needle_id == cases[0].needle_id]
    with pytest.warns(UserWarning, match="all cases hide one needle"):
        assert all(case is not other for case, other in zip(same, other_cases(same), strict=True))
    with pytest.raises(LccpError, match="there is one only; ask for two"):
        other_cases(cases[:1])


HEADS = st.tuples(st.integers(0, 3), st.integers(0, 5))


@given(st.lists(HEADS, min_size=1, max_size=8, unique=True), st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_random_sets_are_other_heads_of_the_same_layers(ranked, n_draws, seed):
    known = [(layer, head) for layer in range(4) for head in range(6)]
    sets = head_sets(ranked, known, [len(ranked)], each=False, n_draws=n_draws, seed=seed)
    assert [own.role for own in sets[:2]] == ["none", "top"]
    top = sets[1].heads
    layers = sorted(layer for layer, _ in top)
    enough = all(2 * layers.count(layer) <= 6 for layer in layers)
    for own in sets[2:]:
        assert own.matched_to == top
        assert len(set(own.heads)) == len(top)
        assert not set(own.heads) & set(top)
        assert own.layer_matched == enough
        if enough:
            assert sorted(layer for layer, _ in own.heads) == layers
    assert len({own.heads for own in sets}) == len(sets)
    assert len(sets) <= 2 + n_draws
    assert sets == head_sets(ranked, known, [len(ranked)], each=False, n_draws=n_draws, seed=seed)


def test_sizes():
    known = [(layer, head) for layer in range(5) for head in range(8)]
    assert set_sizes(None, None, known) == [1, 2, 3, 5, 10]
    assert set_sizes(None, None, known[:8]) == [1, 2, 3]
    assert set_sizes(None, known[:4], known) == [1, 2, 3, 4]
    assert set_sizes([5, 1, 5], None, known) == [1, 5]
    assert set_sizes(None, known[:30], known, each=True)[-1] == 30
    for arguments, message in [
        (([41], None), "k 41 is more than the 40 heads that the model has"),
        (([4], known[:3]), "k 4 is more than the 3 heads that are named"),
        (([21], None), "k 21 of 40 heads leaves 19 others, too few for a random set of 21; ask for at most 20"),
        (([0], None), "k is a number of heads above 0, got 0"),
    ]:
        with pytest.raises(LccpError, match=message):
            set_sizes(*arguments, known)


def test_ranking_and_choice_of_cases(scored):
    ranked = ranked_heads(scored, "retrieval", 128, NAMES)
    assert all(ranked[name][0] == planted.COPY_HEAD for name in NAMES[1:])
    by_hand = (
        scored.scores.filter(checkpoint="step-2", metric="needle_mass", mode="teacher_forced")
        .collect()
        .join(scored.cases.filter(length=96).select("case_id"), on="case_id")
        .group_by("layer", "head")
        .agg(pl.col("value").cast(pl.Float64).mean())
        .sort("value", "layer", "head", descending=[True, False, False])
    )
    assert ranked_heads(scored, "needle_mass", 96, ["step-2"])["step-2"] == by_hand.select("layer", "head").rows()
    cases = chosen_cases(scored, 96, 7)
    assert {case.length for case in cases} == {96}
    assert sorted(case.depth_fraction for case in cases) == [0, 0, 0, 0.5, 0.5, 1, 1]
    assert len(chosen_cases(scored, None, 100)) == 18
    assert {case.length for case in chosen_cases(scored, None, 3)} == {128}


def test_blind_heads_are_masked_case_by_case(checkpoint, tokenizer):
    model = load_model(checkpoint)
    cases = build_cases(NiahGrid(lengths=(96,), depths=(0, 50, 100), samples=2), tokenizer)
    heads = [(0, 1), (2, 3)]
    intact, got = outcomes_without(model, cases, [[], heads], kind="blind")
    for case, answer in zip(cases, got, strict=True):
        with mask_span(model, heads, case.needle):
            assert answer[0] == pytest.approx(twin(model, case, [], None)[0], abs=2e-5)
    assert intact == [pytest.approx(twin(model, case, [], None), abs=2e-5) for case in cases]
    assert all(one[0] != other[0] for one, other in zip(intact, got, strict=True))


# Interruptions and mistakes


def test_interrupted_and_resumed_equals_undisturbed(run, checked, monkeypatch):
    original, calls = answers_module.outcomes_without, []

    def die_at_the_second(model, *args, **kwargs):
        calls.append(model.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(model, *args, **kwargs)

    monkeypatch.setattr(answers_module, "outcomes_without", die_at_the_second)
    options = {"k": [1], "n_draws": 3, "n_cases": 6, "checkpoints": "all"}
    with pytest.raises(KeyboardInterrupt):
        ablate_heads(run, **options)
    assert ablation_rows(Run.open(run.path))["checkpoint"].unique().to_list() == ["step-0"]
    told = []
    again = ablate_heads(run, **options, progress=lambda *now: told.append(now))
    assert calls == ["step-0", "step-1", "step-1", "step-2", "step-3"]
    assert again.equals(checked[0])
    assert [now[0] for now in told] == sorted(now[0] for now in told)
    assert told[-1][0] == told[-1][1] == 4 * 5 * 6 * 128
    assert ablate_heads(run, **options).equals(again)
    assert len(calls) == 5
    # A part of the checkpoints is a part of the table; another study stands beside the first.
    assert ablate_heads(run, **{**options, "checkpoints": ["step-2"]}).equals(again.filter(checkpoint="step-2"))
    ablate_heads(run, k=[2], n_draws=2, n_cases=2, length=96)
    opened = Run.open(run.path)
    assert len(ablation_studies(opened)) == 2
    assert ablation_rows(opened)["k"].max() == 2
    assert ablation_rows(opened, again["study"][0]).equals(again)


def test_layers_with_too_few_other_heads_are_said(run):
    with pytest.warns(UserWarning, match="the layers of its 3 best heads have too few other heads"):
        rows = ablate_heads(run, heads=[(1, 3), (1, 2), (1, 1)], k=[3], n_draws=2, n_cases=1, length=96)
    assert not rows.filter(set="random")["layer_matched"].any()
    assert not causal_table(Run.open(run.path))["layer_matched"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": [(2, 0)]}, "checkpoint step-3 has no heads 2-0: it has heads 0-3 in layers 0-1;"),
        ({"heads": [(16, 19), (11, 15)]}, "has no heads 16-19, 11-15: it has heads 0-3 in layers 0-1;"),
        ({"k": [9]}, "k 9 is more than the 8 heads that the model has"),
        ({"k": [5]}, "k 5 of 8 heads leaves 3 others"),
        ({"kind": "noise"}, "unknown kind of ablation 'noise'; known: zero, mean, resample, blind"),
        ({"length": 100}, "has no cases of 100 tokens; it has 96, 128"),
        ({"n_draws": 0}, "draws and cases must be at least 1, got 0 and 20"),
        ({"metric": "qr"}, r"no scores of metric 'qr'; it has .*retrieval.*; `lccp score CHECKPOINT... --metrics qr"),
        ({"checkpoints": ["step-9"]}, "has no checkpoint 'step-9'; it has step-0"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(run, monkeypatch, options, message):
    monkeypatch.setattr("lccp_interp.capture.model.load_model", None)
    with pytest.raises(LccpError, match=message):
        ablate_heads(run, **options)
    assert not (run.path / "ablations").exists()
    assert "ablations" not in Run.open(run.path).manifest


def test_checkpoints_that_were_moved(run, scored, tmp_path):
    manifest = json.loads((run.path / "run.json").read_text())
    for entry in manifest["checkpoints"]:
        shutil.copytree(entry["path"], tmp_path / "moved" / entry["name"])
        entry["path"] = str(tmp_path / "gone" / entry["name"])
    (run.path / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(LccpError, match=r"is no longer at .*; say where it is with --checkpoints DIR"):
        ablate_heads(run.path, k=[1])
    rows = ablate_heads(run.path, k=[1], n_draws=1, n_cases=1, length=96, folders=[tmp_path / "moved"])
    assert rows.filter(set="top")["heads"].to_list() == [COPY]


def test_a_run_without_scores_of_a_checkpoint(run):
    for part in (run.path / "scores").glob("step-3.*"):
        part.unlink()
    with pytest.raises(LccpError, match=r"'step-3' has retrieval scores of 0 heads at 128 tokens .* finish it with"):
        ablate_heads(run, k=[1])
    ablate_heads(run, heads=[(1, 3)], n_draws=1, n_cases=1)


def test_reading_without_or_of_other_studies(run, checked):
    with pytest.raises(LccpError, match="has no ablations; make some with `lccp ablate"):
        ablation_rows(run)
    with pytest.raises(LccpError, match="has no ablation study 'x'; it has zero-128-"):
        ablation_rows(checked[1], "x")
    shutil.copytree(checked[1].path, run.path, dirs_exist_ok=True)
    part = next((run.path / "ablations").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(LccpError, match="is not a whole Parquet file; delete it and run `lccp ablate` again"):
        ablation_rows(Run.open(run.path))


# Statistics


def noisy(rows, seed=0):
    """The rows with answers drawn at random, so that every number matters."""
    rng = np.random.default_rng(seed)
    return rows.with_columns(
        loss_nats=pl.Series(rng.gamma(2.0, 1.0, rows.height)), greedy_exact=pl.Series(rng.random(rows.height) < 0.5)
    )


def test_the_table_against_loops(checked, monkeypatch):
    rows, run = checked
    rows = noisy(rows)
    monkeypatch.setattr("lccp_interp.dynamics.causal.ablation_rows", lambda run, study: rows)
    table = causal_table(run, n_boot=40, seed=3)
    assert dict(table.schema) == CAUSAL_SCHEMA
    assert table.height == 4 * 3
    own = rows.filter(checkpoint="step-2")
    clusters = dict(niah_cases(run).select("case_id", "cluster").iter_rows())
    ids = sorted(own["case_id"].unique())
    numbers = np.unique([clusters[case] for case in ids], return_inverse=True)[1]
    resamples = draw_resamples(numbers, n_boot=40, seed=3)
    drawn = np.random.default_rng([3, 1]).multinomial(3, np.full(3, 1 / 3), size=40)

    def mean(column, role, weights, draw=None):
        picked = own.filter(set=role) if draw is None else own.filter(set=role, draw=draw)
        values = dict(picked.select("case_id", column).iter_rows())
        return sum(weight * values[case] for weight, case in zip(weights, ids, strict=True)) / sum(weights)

    def beyond(outcome, weights, times):
        column = "greedy_exact" if outcome == "greedy_exact" else "loss_nats"
        shape = np.exp if outcome == "answer_ppl" else (lambda value: value)
        removed = shape(mean(column, "top", weights))
        random = sum(count * shape(mean(column, "random", weights, draw)) for draw, count in enumerate(times)) / 3
        return random - removed if outcome == "greedy_exact" else removed - random

    for outcome in ("loss_nats", "answer_ppl", "greedy_exact"):
        (row,) = table.filter(checkpoint="step-2", outcome=outcome).to_dicts()
        assert row["beyond"] == pytest.approx(beyond(outcome, [1] * 6, [1, 1, 1]))
        assert row["harm"] - row["random_harm"] == pytest.approx(row["beyond"])
        draws = [beyond(outcome, weights, times) for weights, times in zip(resamples.weights, drawn, strict=True)]
        tails = [(1 - resamples.level) / 2, (1 + resamples.level) / 2]
        np.testing.assert_allclose([row["beyond_low"], row["beyond_high"]], np.quantile(draws, tails))
        assert (row["n"], row["n_draws"], row["layer_matched"]) == (6, 3, True)
    losses = table.filter(checkpoint="step-2", outcome="loss_nats").to_dicts()[0]
    assert losses["intact"] == pytest.approx(own.filter(set="none")["loss_nats"].mean())


def test_importance_of_the_planted_head(checked):
    table = causal_table(checked[1])
    at_end = table.filter(checkpoint="step-3", outcome="greedy_exact").row(0, named=True)
    found = [at_end[name] for name in ("intact", "removed", "random", "beyond_low")]
    assert found == pytest.approx([1.0, 0.0, 1.0, 1.0])
    (row,) = important_from(table, outcome="greedy_exact").to_dicts()
    assert (row["set"], row["k"], row["checkpoint"], row["at_end"]) == ("top", 1, "step-1", True)


def lows(values):
    n = len(values)
    return pl.DataFrame(
        {
            "set": "top", "k": 1, "heads": [f"0-{i}" for i in range(n)], "outcome": "loss_nats",
            "checkpoint": [f"c{i}" for i in range(n)], "tokens_seen": list(range(n)),
            "beyond": [value + 1 for value in values], "beyond_low": values,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "hold", "expected"),
    [
        ([0.0, 1.0, 1.0, 1.0], 2, ("c1", True, False)),
        ([0.0, 1.0, 0.0, 1.0], 2, ("c3", True, True)),
        ([1.0, 1.0, 0.0, 0.0], 2, ("c0", False, False)),
        ([0.0, 1.0, 0.0, 0.0], 2, (None, False, False)),
        ([0.0, 1.0, 0.0, 0.0], 1, ("c1", False, False)),
        ([float("nan")], 2, (None, False, False)),
        ([0.04, 0.06], 2, ("c1", True, True)),
    ],
)
def test_important_from(values, hold, expected):
    (row,) = important_from(lows(values), hold=hold).to_dicts()
    assert (row["checkpoint"], row["at_end"], row["provisional"]) == expected
    assert row["n_checkpoints"] == len(values)


def test_mistakes_of_importance():
    with pytest.raises(LccpError, match="unknown outcome 'loss'; known: loss_nats"):
        important_from(lows([1.0]), outcome="loss")
    with pytest.raises(LccpError, match="hold must be at least 1"):
        important_from(lows([1.0]), hold=0)


# The command


def test_the_command(run, lccp):
    options = ["--k", "1", "--draws", "2", "--cases", "4", "--length", "96", "--only", "step-0,step-3"]
    code, out, err = lccp("ablate", run.path, *options)
    assert code == 0
    assert "step-3" in out
    assert "without the best 1: more exact answers lost than without random heads from step-3 on\n" in err
    code, out, _ = lccp("ablate", run.path, *options, "--format", "json")
    records = json.loads(out)
    assert [(r["checkpoint"], r["outcome"]) for r in records[3:]] == [
        ("step-3", outcome) for outcome in ("loss_nats", "answer_ppl", "greedy_exact")
    ]
    assert [records[-1][name] for name in ("intact", "removed", "random")] == pytest.approx([1.0, 0.0, 1.0])
    _, out, _ = lccp("ablate", run.path, *options, "--format", "csv")
    assert len(list(csv.DictReader(io.StringIO(out)))) == 6
    _, _, err = lccp("ablate", run.path, "--heads", "1-2", "--each", *options[2:-2])
    assert "without head 1-2: at none of 1 checkpoints more exact answers lost than without random heads" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "9:9"], "'9:9' is no head; write layer-head"),
        (["--heads", "9-9"], "has no heads 9-9: it has heads 0-3 in layers 0-1"),
        (["--k", "all"], "--k: 'all' is no number of heads"),
        (["--k", "100"], "k 100 is more than the 8 heads"),
        (["--metric", "nope"], "`lccp score CHECKPOINT... --metrics nope --out NEW_RUN` makes them"),
        (["--only", "step-7"], "has no checkpoint 'step-7'"),
    ],
)
def test_mistakes_at_the_command_line(run, lccp, options, message):
    code, out, err = lccp("ablate", run.path, *options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_reading_ablations_needs_no_torch():
    code = "import sys, lccp_interp.dynamics.causal; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_report_tells_it_in_words_first(checked, run):
    _, with_study = checked
    section = causes_section(RunTables(with_study, 128))
    assert re.search(r"loss rises by \d\S* nats without them", section)
    assert "So retrieval needs these heads." in section
    words = re.sub("<[^>]*>", "", section)
    assert "They matter more than random heads: for exact answers the best 1 from step-1 on" in words
    assert section.count("<tr") == 1 + 4
    assert "lccp ablate RUN" in causes_section(RunTables(run, 128))
