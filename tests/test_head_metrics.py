"""Metrics that need more than the answer's rows: by hand, against slow twins, and through the engine."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import planted
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lccp_interp.capture import readout
from lccp_interp.capture.model import HookedModel, load_model
from lccp_interp.capture.readout import LogitReader
from lccp_interp.checkpoints import bundled_trajectory
from lccp_interp.schema import Case, LccpError, Span, SpanError
from lccp_interp.scoring import engine
from lccp_interp.scoring.engine import null_query, score_cases
from lccp_interp.scoring.generate import score_generated
from lccp_interp.scoring.metrics import (
    METRICS,
    AttentionRows,
    HeadMetric,
    dla,
    entropy,
    locos,
    needle_mass,
    qrscore,
    register_metric,
    select_metrics,
    sink_mass,
    streaming,
)
from lccp_interp.store import CASES_SCHEMA, QUESTION_COLUMNS, Run, RunWriter, cases_frame, cases_from_frame
from lccp_interp.sweep import score_grid
from lccp_interp.tasks.decoys import decoy_spans
from lccp_interp.tasks.interference import InterferenceGrid
from lccp_interp.tasks.longbio import LongBioGrid
from lccp_interp.tasks.niah import NiahGrid

ALL = tuple(METRICS)
FREE = ("dla", "sink_mass", "entropy", "streaming")
"""Those that ask about no span."""


def made_rows(weights, *, source, gain=None, null=None, n_answer=None):
    n_events, n_keys = weights.shape[1:]
    ids = torch.arange(100, 100 + n_keys)
    return AttentionRows(weights, ids, ids[-n_events:], source, gain, null)


# --- by hand


def test_hand_computed_qrscore_drops_what_lies_far_below():
    # Differences over six needle tokens: five 0.1 and one -0.4; mean 1/60, sigma 0.186, so -0.4 is out and 0.5 is left.
    weights = torch.full((1, 2, 8), 0.1)
    null = torch.zeros(1, 8)
    null[0, 3] = 0.5
    assert qrscore(made_rows(weights, source=Span(1, 7), null=null)).tolist() == pytest.approx([0.5])
    # With -0.1 in its place mean and sigma are 1/15 and 0.075: -0.1 is 2.24 sigma below, and out again.
    null[0, 3] = 0.2
    assert qrscore(made_rows(weights, source=Span(1, 7), null=null)).tolist() == pytest.approx([0.5])
    # Of two tokens none can lie two sigma below.
    assert qrscore(made_rows(weights, source=Span(3, 5), null=null)).tolist() == pytest.approx([0.0], abs=1e-7)


def test_hand_computed_locos_and_dla():
    weights = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]]])
    gain = torch.tensor([[[2.0, 10.0, -5.0, 99.0], [1.0, 5.0, 1.0, 2.0]]])
    rows = made_rows(weights, source=Span(1, 2), gain=gain)
    # Event 0 sees three keys: 3 - 1/2 (1 - 1) = 3; event 1 four: 1 - 1/3 (0.1 + 0.3 + 0.8) = 0.6.
    assert locos(rows).tolist() == pytest.approx([1.8])
    assert dla(rows).tolist() == pytest.approx([(3 + 2.2) / 2])


def test_hand_computed_controls():
    weights = torch.tensor([[[0.5, 0.0, 0.25, 0.25, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]]])
    rows = made_rows(weights, source=Span(1, 2))
    assert sink_mass(rows).tolist() == pytest.approx([0.35])
    assert entropy(rows).tolist() == pytest.approx([(1.5 * math.log(2) + math.log(5)) / 2])
    # Sink key 0, recent key 3 of event 0 and 4 of event 1.
    assert streaming(rows, sink=1, recent=1).tolist() == pytest.approx([(0.75 + 0.4) / 2])
    assert streaming(rows).tolist() == pytest.approx([1.0])


# --- slow twins


def slow_score(name, row, gain, null, source, position):
    """One metric of one event row by its definition, for those that are means over rows."""
    seen = range(position + 1)
    needle = [j for j in seen if source.start <= j < source.end]
    others = [j for j in seen if j not in needle]
    if name == "locos":
        inside, outside = (sum(row[j] * gain[j] for j in part) for part in (needle, others))
        return inside - (len(needle) / len(others) * outside if others else 0)
    if name == "dla":
        return sum(row[j] * gain[j] for j in seen)
    if name == "sink_mass":
        return row[0]
    if name == "entropy":
        return -sum(p * math.log(p) for p in row if p > 0)
    near = [j for j in seen if j < 4 or position - j < 64]
    return sum(row[j] for j in near) / sum(row)


def slow_qrscore(rows_of_head, null, source):
    places = range(source.start, source.end)
    differences = [sum(row[j] for row in rows_of_head) / len(rows_of_head) - null[j] for j in places]
    mean = sum(differences) / len(differences)
    sigma = math.sqrt(sum((value - mean) ** 2 for value in differences) / len(differences))
    return sum(value for value in differences if value >= mean - 2 * sigma)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_metrics_equal_their_slow_twins(data):
    n_keys = data.draw(st.integers(3, 120))
    n_events = data.draw(st.integers(1, min(5, n_keys - 1)))
    start = data.draw(st.integers(0, n_keys - n_events - 1))
    source = Span(start, data.draw(st.integers(start + 1, n_keys - n_events)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    weights = torch.rand(2, n_events, n_keys, generator=generator) ** 4
    weights = weights * (torch.arange(n_keys) <= torch.arange(n_keys - n_events, n_keys)[:, None])
    weights = weights / weights.sum(-1, keepdim=True)
    gain = torch.randn(2, n_events, n_keys, generator=generator)
    null = torch.rand(2, n_keys, generator=generator) / n_keys
    rows = made_rows(weights, source=source, gain=gain, null=null)
    for name in ("locos", *FREE):
        expected = [
            sum(
                slow_score(name, row, gains, null, source, n_keys - n_events + t)
                for t, (row, gains) in enumerate(zip(head_rows, head_gains, strict=True))
            )
            / n_events
            for head_rows, head_gains in zip(weights.tolist(), gain.tolist(), strict=True)
        ]
        assert METRICS[name](rows).tolist() == pytest.approx(expected, abs=1e-5), name
    expected = [slow_qrscore(*pair, source) for pair in zip(weights.tolist(), null.tolist(), strict=True)]
    assert qrscore(rows).tolist() == pytest.approx(expected, abs=1e-5)


def test_permuting_heads_permutes_scores():
    generator = torch.Generator().manual_seed(0)
    weights, gain = torch.rand(2, 6, 4, 11, generator=generator)
    null = torch.rand(6, 11, generator=generator)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    for name, metric in METRICS.items():
        straight = metric(made_rows(weights, source=Span(2, 6), gain=gain, null=null))
        mixed = metric(made_rows(weights[order], source=Span(2, 6), gain=gain[order], null=null[order]))
        assert torch.equal(mixed, straight[order]), name


# --- through the engine


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def cases(tokenizer):
    return NiahGrid(lengths=(110, 150), depths=(0, 50, 100), samples=2).build(tokenizer)


@torch.no_grad()
def slow_engine(model, case):
    """Every metric of one case from full eager passes, head by head: {metric: {layer: [head]}}, and of decoys."""
    inner = model.model.model
    ids = torch.tensor([case.prompt_ids + case.answer_ids])
    asked = case.question
    na_ids = model.tokenizer(" N/A", add_special_tokens=False)["input_ids"]
    values = {}
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda module, given, out, n=n: values.__setitem__(n, out[0]))
        for n, layer in enumerate(inner.layers)
    ]
    null_ids = torch.tensor([[*case.prompt_ids[: asked.start], *na_ids]])
    null_maps = model.model(null_ids, output_attentions=True).attentions
    maps = model.model(ids[:, :-1], output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    config = model.model.config
    d_head, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    events = range(len(case.prompt_ids) - 1, case.length - 1)
    decoys = {
        "locos": decoy_spans(case, length=len(case.needle)),
        "qrscore": decoy_spans(case, length=len(case.needle), before=asked.start),
    }
    found = {name: {} for name in (*ALL[4:], "locos@decoy", "qrscore@decoy")}
    for n, layer in enumerate(inner.layers):
        per_head = {name: [] for name in found}
        for head in range(config.num_attention_heads):
            kv = head // group
            v = values[n][:, kv * d_head : (kv + 1) * d_head]
            out = layer.self_attn.o_proj.weight[:, head * d_head : (head + 1) * d_head]
            weights = maps[n][0, head]
            gains = {
                i: (v @ (out.T @ (model.model.lm_head.weight[int(ids[0, i + 1])] * inner.norm.weight))).tolist()
                for i in events
            }
            rows = {i: weights[i].tolist() for i in events}
            asking = [weights[i].tolist() for i in range(asked.start, asked.end)]
            null = null_maps[n][0, head, asked.start :].mean(0).tolist()

            def mean(name, span, rows=rows, gains=gains):
                return np.mean([slow_score(name, rows[i], gains[i], None, span, i) for i in events])

            for name in ("locos", *FREE):
                per_head[name].append(mean(name, case.needle))
            per_head["qrscore"].append(slow_qrscore(asking, null, case.needle))
            per_head["locos@decoy"].append(np.mean([mean("locos", span) for span in decoys["locos"]]))
            per_head["qrscore@decoy"].append(np.mean([slow_qrscore(asking, null, span) for span in decoys["qrscore"]]))
        for name, scores in per_head.items():
            found[name][n] = scores
    return found


def test_the_engine_equals_full_eager_passes(model, checkpoint, cases):
    eager = load_model(checkpoint)
    eager.model.set_attn_implementation("eager")
    for case, result in zip(cases, score_cases(model, cases, METRICS), strict=True):
        for name, by_layer in slow_engine(eager, case).items():
            for layer, expected in by_layer.items():
                assert result.scores[name][layer] == pytest.approx(expected, rel=1e-3, abs=1e-4), (name, layer)
        for name in FREE:
            np.testing.assert_array_equal(result.scores[name], result.scores[f"{name}@decoy"])


def equal_results(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.case_id == other.case_id
        np.testing.assert_allclose(one.answer_loss_nats, other.answer_loss_nats, atol=1e-4)
        for name in expected[0].scores:
            np.testing.assert_allclose(one.scores[name], other.scores[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "deepseek_v3"])
def test_chunks_and_shared_prefixes_give_the_same(cases, tokenizer, model_type):
    more = {"n_positions": 256} if model_type == "gpt2" else {}
    model = HookedModel(tiny_model(model_type, vocab_size=len(tokenizer), **more), tokenizer, model_type)
    alone = score_cases(model, cases, METRICS, sharing="off", batch_tokens=1)
    equal_results(score_cases(model, cases, METRICS, sharing="on", chunk_tokens=40), alone)
    # Without what needs a second prompt, cases also go together in batches.
    batched = select_metrics([name for name in METRICS if name != "qrscore"])
    for result, expected in zip(score_cases(model, cases, batched, sharing="off"), alone, strict=True):
        for name, scores in result.scores.items():
            np.testing.assert_allclose(scores, expected.scores[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_model_that_cannot_share_is_calibrated_too(model, cases):
    whole = dataclasses.replace(model, cache_fault="its cache is doubted")
    assert not whole.shares_prefixes
    equal_results(score_cases(whole, cases, METRICS, sharing="off"), score_cases(model, cases, METRICS))


def test_metrics_of_events_cost_nothing_more(model, cases, monkeypatch):
    """No values, no question's rows and no second prompt are run for metrics that do not declare them."""

    def refuse(*args, **kwargs):
        raise AssertionError("asked for without need")

    monkeypatch.setattr(LogitReader, "of", refuse)
    monkeypatch.setattr(engine, "edit_attention", refuse)
    monkeypatch.setattr(engine, "null_query", refuse)
    shapes = set()

    def record(rows):
        shapes.add(rows.weights.shape[1])
        assert rows.logit_gain is None
        assert rows.null_weights is None
        return rows.weights[:, :, 0].mean(-1)

    score_cases(model, cases, {**select_metrics(["retrieval", "needle_mass", "entropy"]), "mine": record})
    assert shapes == {len(case.answer_ids) for case in cases}
    with pytest.raises(AssertionError, match="without need"):
        score_cases(model, cases, select_metrics(["dla"]))


def test_the_four_metrics_are_the_same_beside_all_others(model, cases):
    four = select_metrics(["retrieval", "wu", "copy", "needle_mass"])
    for one, other in zip(score_cases(model, cases, four), score_cases(model, cases, METRICS), strict=True):
        for name in one.scores:
            np.testing.assert_allclose(one.scores[name], other.scores[name], atol=1e-5)


def test_the_question_without_content(model, cases):
    for case in cases:
        ids, start = null_query(model.tokenizer, case)
        text = model.tokenizer.decode(ids)
        assert ids[:start] == case.prompt_ids[: case.question.start]
        assert text.endswith("\nQuestion: N/A")


def test_what_the_model_writes_is_scored_as_the_same_answer_given():
    trained = load_model(bundled_trajectory()[-1].path)
    cases = NiahGrid(lengths=(256,), depths=(50, 100), samples=3).build(trained.tokenizer)
    forced = score_cases(trained, cases, METRICS)
    n_equal = 0
    for case, one, other in zip(cases, score_generated(trained, cases, METRICS), forced, strict=True):
        if other.greedy_ids == case.answer_ids:
            n_equal += 1
            for name in other.scores:
                np.testing.assert_allclose(one.scores[name], other.scores[name], rtol=1e-3, atol=1e-3, err_msg=name)
    assert n_equal


# --- heads that are there, and none where there are none


@pytest.fixture(scope="module")
def planted_cases(tokenizer):
    grid = NiahGrid(
        lengths=(160, 260),
        depths=(0, 50, 100),
        needles=planted.NEEDLES,
        haystack=planted.filler(200),
        prompt=planted.PROMPT,
    )
    return grid.build(tokenizer)


def test_the_planted_copy_head_is_found(tmp_path, planted_cases):
    model = load_model(planted.save_planted(tmp_path / "copies"))
    results = score_cases(model, planted_cases, METRICS)
    layer, head = planted.COPY_HEAD
    for name in ("retrieval", "wu", "copy", "needle_mass", "locos", "dla"):
        scores = np.mean([result.scores[name] for result in results], axis=0)
        null = np.mean([result.scores[f"{name}@decoy"] for result in results], axis=0)
        assert np.unravel_index(scores.argmax(), scores.shape) == (layer, head), name
        others = np.delete(scores.ravel(), layer * planted.N_HEADS + head)
        assert scores[layer, head] > 5 * np.abs(others).max(), name
        if name not in FREE:
            assert scores[layer, head] > 5 * abs(null[layer, head]), name


def test_a_head_that_writes_nothing_has_no_logits(tmp_path, planted_cases):
    """All heads but two have no output; what they look at is not counted by `locos` and `dla`."""
    model = load_model(planted.save_planted(tmp_path / "copies"))
    silent = [place for place in planted.ROLES if place not in planted.WRITES]
    for result in score_cases(model, planted_cases[:2], select_metrics(["locos", "dla", "sink_mass"])):
        for name in ("locos", "dla"):
            assert [result.scores[name][place] for place in silent] == [0.0] * len(silent)
        assert max(result.scores["sink_mass"][place] for place in silent) > 0.9


def test_random_weights_are_not_above_their_null(model, tokenizer):
    grid = NiahGrid(lengths=(200,), depths=(25, 50, 75), samples=20)
    names = [name for name in METRICS if name not in FREE]
    results = score_cases(model, grid.build(tokenizer), select_metrics(names))
    for name in names:
        excess = np.stack([result.scores[name] - result.scores[f"{name}@decoy"] for result in results])
        spread = excess.std(axis=0, ddof=1) / math.sqrt(len(results))
        # Twelve heads and six metrics: 4 standard errors are not reached by chance.
        assert (excess.mean(axis=0) < 4 * spread + 1e-6).all(), name


# --- from values to logits


def mean_free(vector):
    return vector - vector.mean()


LINEAR_PARTS = {
    "llama": lambda norm, moved: norm.weight * moved,
    "gemma": lambda norm, moved: (1 + norm.weight) * moved,
    "gpt2": lambda norm, moved: norm.weight * mean_free(moved),
    "cohere": lambda norm, moved: norm.weight * mean_free(moved),
}


@pytest.mark.parametrize("model_type", sorted(LINEAR_PARTS))
def test_dla_is_what_the_logit_loses_with_the_head(model_type, tokenizer, cases):
    """Of the last layer, whose MLP is taken out: before the norm's division the logit is linear in every head."""
    more = {"n_positions": 256} if model_type == "gpt2" else {}
    inner = tiny_model(model_type, vocab_size=len(tokenizer), **more)
    base = inner.base_model
    last = (base.h if model_type == "gpt2" else base.layers)[-1]
    norm = base.ln_f if model_type == "gpt2" else base.norm
    projection = last.attn.c_proj if model_type == "gpt2" else last.self_attn.o_proj
    with torch.no_grad():
        for parameter in last.mlp.parameters():
            parameter.zero_()
    hooked, case = HookedModel(inner, tokenizer, model_type), cases[0]
    (result,) = score_cases(hooked, [case], select_metrics(["dla"]))
    d_value = (projection.weight.shape[0 if model_type == "gpt2" else 1]) // hooked.n_heads

    def residual(silent_head):
        seen = {}

        def silence(module, inputs):
            (given,) = inputs
            given = given.clone()
            if silent_head is not None:
                given[..., silent_head * d_value : (silent_head + 1) * d_value] = 0
            return (given,)

        hooks = [
            projection.register_forward_pre_hook(silence),
            norm.register_forward_pre_hook(lambda module, inputs: seen.update(h=inputs[0][0])),
        ]
        with torch.inference_mode():
            inner(torch.tensor([case.prompt_ids + case.answer_ids[:-1]]))
        for hook in hooks:
            hook.remove()
        return seen["h"][len(case.prompt_ids) - 1 :]

    inner.requires_grad_(False)
    whole = residual(None)
    for head in range(hooked.n_heads):
        moved = whole - residual(head)
        lost = [
            float(inner.get_output_embeddings().weight[token] @ LINEAR_PARTS[model_type](norm, moved[t]))
            for t, token in enumerate(case.answer_ids)
        ]
        assert result.scores["dla"][-1][head] == pytest.approx(np.mean(lost), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("qwen3_next", r"Qwen3NextAttention \(layer 1\) has no linear module that is given the heads' outputs as they"),
        ("bitnet", r"BitNetAttention \(layer 0\) has no linear module"),
        ("minicpm3", "no final norm hands the unembedding its input"),
    ],
)
def test_what_is_not_linear_is_refused_by_name(model_type, message, tokenizer):
    model = HookedModel(tiny_model(model_type, vocab_size=len(tokenizer)), tokenizer, model_type)
    with pytest.raises(LccpError, match=rf"{message}.*leave out the metrics that read values \(locos, dla\)"):
        LogitReader.of(model)


def test_the_proof_can_fail(model, monkeypatch):
    monkeypatch.setattr(readout, "_close", lambda one, other: False)
    with pytest.raises(LccpError, match=r"LlamaAttention \(layer 0\) makes more of its values"):
        LogitReader.of(model)


def test_the_reader_leaves_no_hooks(model):
    LogitReader.of(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
    assert model.model.config._attn_implementation == "sdpa"


# --- declaring


def test_declarations_that_contradict_themselves_are_refused():
    with pytest.raises(LccpError, match="metric m: rows must be events or question, got 'answer'"):
        HeadMetric("m", sink_mass, rows="answer")
    with pytest.raises(LccpError, match="metric m: span must be source or needle, got 'context'"):
        HeadMetric("m", sink_mass, span="context")
    with pytest.raises(LccpError, match="metric m: needs_values goes with rows='events'"):
        HeadMetric("m", sink_mass, rows="question", needs_values=True)
    with pytest.raises(LccpError, match="metric m: needs_null_query goes with rows='question'"):
        HeadMetric("m", sink_mass, needs_null_query=True)
    with pytest.raises(LccpError, match="metric name 'a@decoy': expected a text without a comma and without '@decoy'"):
        register_metric("a@decoy", sink_mass)
    assert tuple(METRICS) == ALL


def test_functions_say_what_they_were_not_given():
    bare = made_rows(torch.rand(1, 2, 5), source=Span(1, 3))
    with pytest.raises(LccpError, match=r"qrscore reads rows\.null_weights; declare it with needs_null_query=True"):
        qrscore(bare)
    with pytest.raises(LccpError, match="declare a metric of it with needs_values=True"):
        locos(bare)


def test_a_metric_of_ones_own_reaches_the_tables(tmp_path, checkpoint):
    grid = NiahGrid(lengths=(100,), depths=(50,))
    asked = HeadMetric("asked", needle_mass, rows="question", span="needle")
    run = score_grid(checkpoint, tmp_path / "run", grid, metrics={"asked": asked, "plain": needle_mass})
    held = set(run.scores.collect()["metric"])
    assert held == {"asked", "asked@decoy", "plain", "plain@decoy"}
    assert run.config["metrics"] == ["asked", "plain"]


# --- where the question stands


@pytest.mark.parametrize(
    "grid",
    [
        NiahGrid(lengths=(120,), depths=(0, 100), samples=2),
        NiahGrid(lengths=(120,), depths=(0, 50), prompt="wu"),
        NiahGrid(
            lengths=(120,),
            depths=(50,),
            needles=planted.NEEDLES,
            haystack=planted.filler(60),
            prompt="{context}{question} Say: ",
        ),
        NiahGrid(lengths=(220,), needles=planted.NEEDLES, haystack=planted.filler(60), depths=(50,)),
        InterferenceGrid(distances=(0, 30), interferences=(0, 40)),
        LongBioGrid(lengths=(300,), depths=(0, 100)),
    ],
    ids=["paper", "wu", "template", "own needles", "interference", "longbio"],
)
def test_the_question_is_known_by_construction(grid, tokenizer):
    for case in grid.build(tokenizer):
        asked = tokenizer.decode(case.prompt_ids[case.question.start : case.question.end]).strip()
        whole = tokenizer.decode(case.prompt_ids)
        if "Say:" in whole:
            assert asked in {needle.question for needle in planted.NEEDLES}
        else:
            assert asked == whole.rpartition("Question:")[2].removesuffix("\nAnswer:").strip()


def test_a_question_must_follow_the_needle(cases):
    with pytest.raises(SpanError, match=r"question Span\(start=0, end=3\) must follow needle"):
        dataclasses.replace(cases[2], question=Span(0, 3))


def test_runs_from_before_open_and_say_what_they_lack(tmp_path, model, cases):
    frame = cases_frame(cases)
    assert dict(frame.schema) == CASES_SCHEMA
    assert cases_from_frame(frame) == cases
    writer = RunWriter(tmp_path / "run", {"seed": 0}, cases)
    frame.drop(QUESTION_COLUMNS).write_parquet(writer.path / "cases.parquet")
    opened = Run.open(tmp_path / "run")
    assert dict(opened.cases.schema) == CASES_SCHEMA
    old = cases_from_frame(opened.cases)
    assert {case.question for case in old} == {None}
    RunWriter(tmp_path / "run", {"seed": 0}, cases)  # may be resumed
    score_cases(model, old[:1], select_metrics(["locos"]))
    with pytest.raises(
        LccpError, match=rf"metric qrscore reads the question's tokens, and 12 of 12 cases do not .*{old[0].case_id}"
    ):
        score_cases(model, old, METRICS)
    with pytest.raises(LccpError, match="metric qrscore reads the question's tokens"):
        score_generated(model, old, METRICS)
    other = [dataclasses.replace(case, seed=5) for case in cases]
    with pytest.raises(LccpError, match="holds other cases under the same options"):
        RunWriter(tmp_path / "run", {"seed": 0}, other)


def test_a_tokenizer_that_changes_the_question_leaves_it_unknown():
    from lccp_interp.tasks.pieces import PieceEncoder

    class Lossy:
        def decode(self, ids, **options):
            return "".join("?" if token > 3 else "abcd"[token] for token in ids)

    encoder = PieceEncoder(Lossy())
    assert encoder.inside([0, 1, 2, 3], "a", "bc") == Span(1, 3)
    assert encoder.inside([0, 1, 9, 3], "a", "bc") is None


def test_cases_without_a_question_are_plain():
    case = Case("c", "niah", 5, 0.0, "n", "h", 0, 0, (1, 2, 3, 4), (2,), Span(1, 2), Span(1, 2))
    assert case.question is None
