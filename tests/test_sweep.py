"""The sweep from folders to a run: resumed equals undisturbed, sharding does not matter, nothing is done twice."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

import lccp_interp
from lccp_interp.checkpoints import find_checkpoints
from lccp_interp.schema import LccpError, Needle
from lccp_interp.store import Run
from lccp_interp.sweep import find_run_checkpoints, score

GRID = {"lengths": [128, 192], "depths": [0, 50, 100], "samples": 2}


def tables(path):
    run = Run.open(path)
    return run.scores.collect().sort("checkpoint", "case_id", "metric", "layer", "head"), run.outcomes.collect().sort(
        "checkpoint", "case_id"
    )


@pytest.fixture(scope="module")
def undisturbed(trajectory, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "undisturbed"
    score(trajectory, out, **GRID)
    return out


def test_every_case_of_every_checkpoint_is_scored(undisturbed):
    run = Run.open(undisturbed)
    scores, outcomes = tables(undisturbed)
    assert run.cases.height == 2 * 3 * 2
    assert outcomes.height == 3 * 12
    assert scores.height == 3 * 12 * 8 * 3 * 4  # checkpoints x cases x (metrics and their nulls) x layers x heads
    assert scores["value"].is_between(0, 1).all()
    assert outcomes["answer_ppl"].is_finite().all()
    assert run.checkpoints["stage"].to_list() == ["pretrain", "lccp", "lccp"]
    assert all(case["length"] == len(case["prompt_ids"]) + len(case["answer_ids"]) for case in run.cases.to_dicts())


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 300, 1500, 4000])
def test_interrupted_and_resumed_equals_undisturbed(trajectory, undisturbed, tmp_path, after):
    def interrupt(done, total, message):
        if done > after:
            raise Stop

    small_shards = tmp_path / "resumed"
    with pytest.raises(Stop):
        score(trajectory, small_shards, **GRID, cases_per_shard=5, progress=interrupt)
    score(trajectory, small_shards, **GRID, cases_per_shard=5)
    whole = tmp_path / "whole"
    score(trajectory, whole, **GRID, cases_per_shard=5)
    for part in sorted(whole.rglob("*.parquet")):
        assert part.read_bytes() == (small_shards / part.relative_to(whole)).read_bytes(), part.name


def test_sharding_does_not_matter(trajectory, undisturbed, tmp_path):
    score(trajectory, tmp_path / "run", **GRID, cases_per_shard=5)
    for sharded, whole in zip(tables(tmp_path / "run"), tables(undisturbed), strict=True):
        keys = [name for name, dtype in whole.schema.items() if not dtype.is_float() and not dtype.is_nested()]
        assert sharded.select(keys).equals(whole.select(keys))
        for name in set(whole.columns) & {"value", "answer_ppl"}:
            assert sharded[name].to_list() == pytest.approx(whole[name].to_list(), rel=1e-4, abs=1e-5)


def test_a_finished_run_loads_no_model(trajectory, undisturbed, monkeypatch):
    loaded = []
    monkeypatch.setattr("lccp_interp.capture.model.load_model", lambda *a, **k: loaded.append(a))
    before = {part: part.stat().st_mtime_ns for part in undisturbed.rglob("*.parquet")}
    score(trajectory, undisturbed, **GRID)
    assert loaded == []
    assert {part: part.stat().st_mtime_ns for part in undisturbed.rglob("*.parquet")} == before


def test_checkpoints_can_be_added_later(trajectory, undisturbed, tmp_path):
    found = find_checkpoints([trajectory])
    score(found[:1], tmp_path / "run", **GRID)
    score(found, tmp_path / "run", **GRID)
    for grown, whole in zip(tables(tmp_path / "run"), tables(undisturbed), strict=True):
        assert grown.equals(whole)


def test_progress_reaches_the_total(trajectory, tmp_path):
    seen = []
    score(trajectory, tmp_path / "run", **GRID, progress=lambda *report: seen.append(report))
    total = 3 * 6 * (128 + 192)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (total, total)


def test_own_needles_and_haystack(checkpoint, tmp_path):
    needle = Needle("The sky over Mara is green.", "What is the sky over Mara?", "green.")
    run = score(checkpoint, tmp_path / "run", lengths=[200], depths=[50], needles=[needle], haystack="It rained. " * 90)
    assert run.cases["needle_id"].unique().to_list() == ["n0"]
    assert run.config["needles"] != "organism"


def test_another_grid_in_the_same_folder_is_refused(trajectory, undisturbed):
    with pytest.raises(LccpError, match="holds another study: depths differ"):
        score(trajectory, undisturbed, **{**GRID, "depths": [0]})


def test_different_tokenizers_are_refused(make_checkpoint, tmp_path):
    for index in (1, 2):
        folder = make_checkpoint(f"tokens-{index}M", root=tmp_path)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    with pytest.raises(LccpError, match="'tokens-1M' and 'tokens-2M' have different tokenizers"):
        score(tmp_path, tmp_path / "run", **GRID)


def test_a_failing_checkpoint_leaves_the_others_done(trajectory, tmp_path, monkeypatch):
    from lccp_interp.capture import model as capture

    real = capture.load_model

    def load(path, **options):
        if path.name == "lccp-2":
            raise LccpError("checkpoint lccp-2 cannot be loaded")
        return real(path, **options)

    monkeypatch.setattr(capture, "load_model", load)
    with pytest.raises(LccpError, match="lccp-2"):
        score(trajectory, tmp_path / "run", **GRID)
    assert set(tables(tmp_path / "run")[0]["checkpoint"]) == {"pretrain-0", "lccp-1"}


def edited(checkpoint, tmp_path, **changes):
    folder = tmp_path / "tokens-1M"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    for key in [key for key, value in changes.items() if value is None]:
        del config[key], changes[key]
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_lengths_beyond_the_model(checkpoint, tmp_path):
    rotary = edited(checkpoint, tmp_path / "rotary", max_position_embeddings=64)
    message = r"made for 64 positions .*128 tokens are asked for; .*\(RoPE: rope_parameters {.*\"rope_theta\": 10000"
    with pytest.warns(UserWarning, match=message):
        score(rotary, tmp_path / "run", lengths=[128], depths=[0], samples=1)
    learned = edited(checkpoint, tmp_path / "learned", max_position_embeddings=64, rope_parameters=None)
    with pytest.raises(LccpError, match="has 64 learned positions, the cases ask for 128 tokens"):
        score(learned, tmp_path / "run2", lengths=[128], depths=[0], samples=1)
    with pytest.raises(LccpError, match="for 60 tokens, and 50 more may be written; ask for at most 14"):
        score(learned, tmp_path / "run2", lengths=[60], depths=[0], samples=1, mode="generate")


def test_a_tokenizer_larger_than_the_vocabulary(checkpoint, tmp_path):
    small = edited(checkpoint, tmp_path, vocab_size=300)
    with pytest.raises(LccpError, match="has 300 tokens in its vocabulary, its tokenizer gave token"):
        score(small, tmp_path / "run", **GRID)


def test_a_changed_rope_base_is_another_checkpoint(checkpoint, tmp_path):
    score(checkpoint, tmp_path / "run", **GRID)
    raised = edited(checkpoint, tmp_path, rope_parameters={"rope_theta": 2e6, "rope_type": "default"})
    with pytest.raises(LccpError, match="with other weights, config or tokens"):
        score(raised, tmp_path / "run", **GRID)


def test_auto_is_recorded_as_what_it_means_here(undisturbed):
    assert Run.open(undisturbed).config["dtype"] == "float32"


def test_public_names_are_there():
    for name in lccp_interp.__all__:
        assert getattr(lccp_interp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'scoer'"):
        _ = lccp_interp.scoer


def test_how_the_work_was_done_is_on_record(trajectory, tmp_path):
    small = {"lengths": [128], "depths": [50], "samples": 1}
    first, *_ = find_checkpoints([str(trajectory)])
    score(first, tmp_path / "run", **small)
    score(trajectory, tmp_path / "run", **small, self_check=False, sharing="off", chunk_tokens=512)
    score(trajectory, tmp_path / "run", **small)  # nothing is left to do, so nothing is recorded
    checked, skipped = json.loads((tmp_path / "run" / "run.json").read_text())["executions"]
    assert checked["self_check"]["passed"]
    assert checked["self_check"]["checkpoint"] == "pretrain-0"
    assert (checked["device"], checked["sharing"], checked["chunk_tokens"]) == ("cpu", "auto", 4096)
    assert skipped["self_check"] == "skipped (--no-self-check)"
    assert (skipped["sharing"], skipped["chunk_tokens"]) == ("off", 512)


def test_nothing_is_scored_by_a_model_that_fails_its_self_check(trajectory, tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward

    def broken(module, *args, **kwargs):
        output, weights = eager(module, *args, **kwargs)
        return output, weights.roll(1, dims=-1)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", broken)
    message = r"checkpoint pretrain-0 fails its self-check .*layer \d.*; nothing was scored \(--no-self-check"
    with pytest.raises(LccpError, match=message):
        score(trajectory, tmp_path / "run", **GRID)
    assert not list((tmp_path / "run").rglob("scores/*.parquet"))


def test_a_cache_that_fails_its_self_check_is_not_used(trajectory, tmp_path, monkeypatch):
    from lccp_interp.capture import selfcheck
    from lccp_interp.capture.prefill import Prefill

    real = selfcheck.self_check

    def doubting(model):
        return dataclasses.replace(real(model), shares_prefixes=False, sharing="its cache gives other logits")

    def refuse(*args):
        raise AssertionError("ran behind a cache")

    monkeypatch.setattr(selfcheck, "self_check", doubting)
    monkeypatch.setattr(Prefill, "run", refuse)
    with pytest.warns(UserWarning, match="its cache gives other logits, so prompts are run whole"):
        score(trajectory, tmp_path / "run", **GRID, sharing="on")


def test_prefixes_shared_or_not_the_tables_are_the_same(trajectory, tmp_path):
    facts = [Needle("The code of Mara is 4 0 7.", "What is the code of Mara?", "4 0 7")]
    text = " ".join(f"The {a} {b} stood by the {c}." for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx")
    for sharing in ("on", "off"):
        score(trajectory, tmp_path / sharing, **GRID, needles=facts, haystack=text, sharing=sharing, chunk_tokens=100)
    (scores, outcomes), (other_scores, other_outcomes) = tables(tmp_path / "on"), tables(tmp_path / "off")
    assert scores.drop("value").equals(other_scores.drop("value"))
    assert (scores["value"] - other_scores["value"]).abs().max() < 1e-5
    assert (outcomes["answer_ppl"] / other_outcomes["answer_ppl"] - 1).abs().max() < 1e-4


def test_generate_mode_fills_its_columns(trajectory, tmp_path):
    score(trajectory, tmp_path / "run", **GRID, mode="generate")
    scores, outcomes = tables(tmp_path / "run")
    assert set(scores["mode"]) == set(outcomes["mode"]) == {"generate"}
    assert outcomes["generated"].null_count() == outcomes["rouge1_recall"].null_count() == 0
    assert outcomes["rouge1_recall"].is_between(0, 1).all()
    missed = outcomes.filter(outcomes["rouge1_recall"] <= 0.5)["case_id"]
    assert scores.filter(scores["case_id"].is_in(missed.implode()))["value"].is_nan().any()
    with pytest.raises(LccpError, match="holds another study: mode differ"):
        score(trajectory, tmp_path / "run", **GRID)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sampling"}, "unknown mode 'sampling'; known: teacher_forced, generate"),
        ({"sharing": "maybe"}, "unknown sharing 'maybe'; known: auto, on, off"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
    ],
)
def test_mistaken_options(trajectory, tmp_path, options, message):
    with pytest.raises(LccpError, match=message):
        score(trajectory, tmp_path / "run", **GRID, **options)
    assert not (tmp_path / "run").exists()


def test_a_run_says_where_its_checkpoints_are_from_anywhere(trajectory, tmp_path, monkeypatch):
    monkeypatch.chdir(trajectory)
    run = score("pretrain-0", tmp_path / "run", lengths=[96], depths=[50], samples=1, metrics=["retrieval"])
    assert run.checkpoints["path"].to_list() == [str(trajectory / "pretrain-0")]
    monkeypatch.chdir(tmp_path)
    assert [one.name for one in find_run_checkpoints(run, None, None)] == ["pretrain-0"]
