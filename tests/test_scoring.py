"""Head metrics against slow, obvious twins and hand-computed cases; the engine against one-by-one eager runs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lccp_interp.capture.model import HookedModel, load_model
from lccp_interp.schema import Case, LccpError, Span
from lccp_interp.scoring.engine import score_cases
from lccp_interp.scoring.metrics import AttentionRows, copy, needle_mass, retrieval, select_metrics, wu
from lccp_interp.sweep import DEFAULT_METRICS
from lccp_interp.tasks.decoys import decoy_spans

METRICS = select_metrics(DEFAULT_METRICS)
NAMES = tuple(METRICS)


def attending(positions, n_keys):
    """Rows `[head, event, key]` whose arg-max are `positions` `[head][event]`: 0.6 there, the rest spread evenly."""
    weights = torch.full((len(positions), len(positions[0]), n_keys), 0.4 / (n_keys - 1))
    for head, events in enumerate(positions):
        for event, position in enumerate(events):
            weights[head, event, position] = 0.6
    return weights


# Prompt 0..7, source 2..6 holds 5 6 5 7; the answer 5 6 5 7 follows, keys 8.. are earlier answer tokens.
PROMPT = [9, 6, 5, 6, 5, 7, 3, 4]
ANSWER = [5, 6, 5, 7]
SOURCE = Span(2, 6)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([2, 3, 4, 5], {"retrieval": 1.0, "wu": 1.0, "copy": 1.0}),  # copies every token from its own place
        ([4, 3, 2, 5], {"retrieval": 1.0, "wu": 1.0, "copy": 0.5}),  # right tokens, the two 5s swapped
        ([2, 1, 4, 0], {"retrieval": 1 / 3, "wu": 0.5, "copy": 0.5}),  # the 6 outside the source does not count
        ([3, 4, 5, 2], {"retrieval": 0.0, "wu": 0.0, "copy": 0.0}),  # always one too far: induction in the wrong place
        ([8, 9, 10, 10], {"retrieval": 0.0, "wu": 0.0, "copy": 0.0}),  # looks at the answer so far
    ],
)
def test_hand_computed_scores(positions, expected):
    rows = AttentionRows(attending([positions], 11), torch.tensor(PROMPT), torch.tensor(ANSWER), SOURCE)
    for name, value in expected.items():
        assert METRICS[name](rows).tolist() == pytest.approx([value]), name


def test_hand_computed_needle_mass():
    rows = AttentionRows(attending([[2, 0]], 5), torch.tensor([1, 2, 3, 4]), torch.tensor([3, 4]), Span(2, 4))
    # Event 0: 0.6 + 0.1 in the source; event 1: 0.1 + 0.1.
    assert needle_mass(rows).tolist() == pytest.approx([0.45])


def test_an_answer_longer_than_its_source_can_exceed_one_only_by_wu():
    answer = [5, 5, 5]
    rows = AttentionRows(attending([[1, 1, 1]], 5), torch.tensor([9, 5, 8]), torch.tensor(answer), Span(1, 2))
    assert (wu(rows).item(), retrieval(rows).item(), copy(rows).item()) == (3.0, 1.0, 1.0)


def slow_scores(weights, prompt, answer, source):
    """Every metric by its definition, in plain Python loops."""
    source_ids = prompt[source.start : source.end]
    scores = {name: [] for name in NAMES}
    aligned = slow_alignment(source_ids, answer)
    for head in weights.tolist():
        copied, wu_score, exact, mass = set(), 0.0, 0.0, 0.0
        for t, (row, token) in enumerate(zip(head, answer, strict=True)):
            best = max(range(len(row)), key=lambda j: (row[j], -j))
            if source.start <= best < source.end and prompt[best] == token:
                copied.add(token)
                wu_score += 1 / len(source)
            if aligned[t] is not None and best == source.start + aligned[t]:
                exact += 1 / len(source)
            mass += sum(row[source.start : source.end]) / len(answer)
        scores["retrieval"].append(len(copied & set(source_ids)) / len(set(source_ids)))
        scores["wu"].append(wu_score)
        scores["copy"].append(exact)
        scores["needle_mass"].append(mass)
    return scores


def slow_alignment(source, answer):
    """Longest common run first, then left and right of it, by brute force."""
    best = (0, 0, 0)
    for a in range(len(source)):
        for b in range(len(answer)):
            n = 0
            while a + n < len(source) and b + n < len(answer) and source[a + n] == answer[b + n]:
                n += 1
            if n > best[0]:
                best = (n, a, b)
    n, a, b = best
    if n == 0:
        return [None] * len(answer)
    left = slow_alignment(source[:a], answer[:b])
    right = [None if i is None else i + a + n for i in slow_alignment(source[a + n :], answer[b + n :])]
    return [*left, *range(a, a + n), *right]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_metrics_equal_their_slow_twins(data):
    n_prompt = data.draw(st.integers(2, 12))
    start = data.draw(st.integers(0, n_prompt - 1))
    source = Span(start, data.draw(st.integers(start + 1, n_prompt)))
    tokens = st.integers(0, 4)
    prompt = data.draw(st.lists(tokens, min_size=n_prompt, max_size=n_prompt))
    answer = data.draw(st.lists(tokens, min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    weights = torch.rand(3, len(answer), n_prompt + len(answer) - 1, generator=generator) ** 6
    weights = weights / weights.sum(-1, keepdim=True)
    rows = AttentionRows(weights, torch.tensor(prompt), torch.tensor(answer), source)
    expected = slow_scores(weights, prompt, answer, source)
    for name, metric in METRICS.items():
        assert metric(rows).tolist() == pytest.approx(expected[name], abs=1e-5), name


def test_permuting_heads_permutes_scores():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(6, 4, 11, generator=generator).softmax(-1)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    ids = torch.tensor(PROMPT), torch.tensor(ANSWER)
    for metric in METRICS.values():
        straight = metric(AttentionRows(weights, *ids, SOURCE))
        assert torch.equal(metric(AttentionRows(weights[order], *ids, SOURCE)), straight[order])


def test_wrong_shapes_are_refused():
    with pytest.raises(Exception, match="event"):
        AttentionRows(torch.rand(2, 3, 9), torch.tensor(PROMPT), torch.tensor(ANSWER), SOURCE)


def test_unknown_metrics_list_the_known_and_suggest():
    assert list(select_metrics(["wu", "copy"])) == ["wu", "copy"]
    with pytest.raises(LccpError, match=r"unknown metric 'retreival'; known: retrieval, .*did you mean 'retrieval'\?"):
        select_metrics(["retreival"])
    with pytest.raises(LccpError, match="no metric asked for"):
        select_metrics([])


def random_cases(n, *, vocabulary=600, seed=0, lengths=(60, 90)):
    generator = np.random.default_rng(seed)
    cases = []
    for index in range(n):
        length = int(generator.choice(lengths))
        ids = [int(token) for token in generator.integers(0, vocabulary, size=length)]
        n_answer = int(generator.integers(1, 7))
        start = int(generator.integers(0, length - 2 * n_answer))
        ids[length - n_answer :] = ids[start : start + n_answer]
        cases.append(
            Case(
                case_id=f"c{index}",
                task="niah",
                length=length,
                depth_fraction=0.5,
                needle_id="n0",
                haystack_id="h0",
                sample=0,
                seed=seed,
                prompt_ids=tuple(ids[: length - n_answer]),
                answer_ids=tuple(ids[length - n_answer :]),
                needle=Span(max(0, start - 5), min(start + n_answer + 5, length - n_answer)),
                source=Span(start, start + n_answer),
            )
        )
    return cases


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


def test_the_engine_equals_one_by_one_eager_runs(model):
    cases = random_cases(9)
    results = score_cases(model, cases, METRICS, batch_tokens=250)
    model.model.set_attn_implementation("eager")
    for case, result in zip(cases, results, strict=True):
        ids = torch.tensor([case.prompt_ids + case.answer_ids])
        with torch.inference_mode():
            output = model.model(ids, output_attentions=True)
        at = slice(len(case.prompt_ids) - 1, case.length - 1)
        log_probabilities = output.logits[0, at].log_softmax(-1)
        losses = [-log_probabilities[t, token].item() for t, token in enumerate(case.answer_ids)]
        assert result.case_id == case.case_id
        assert result.layers == (0, 1, 2)
        assert result.answer_loss_nats == pytest.approx(losses, abs=1e-4)
        assert result.answer_ppl == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        assert result.greedy_ids == tuple(output.logits[0, at].argmax(-1).tolist())
        for layer, full in enumerate(output.attentions):
            weights = full[0, :, at, : case.length - 1]
            expected = slow_scores(weights, case.prompt_ids, case.answer_ids, case.source)
            decoys = [slow_scores(weights, case.prompt_ids, case.answer_ids, span) for span in decoy_spans(case)]
            for name in NAMES:
                assert result.scores[name][layer] == pytest.approx(expected[name], abs=1e-5), (name, layer)
                null = np.mean([decoy[name] for decoy in decoys], axis=0)
                assert result.scores[f"{name}@decoy"][layer] == pytest.approx(null, abs=1e-5), (name, layer)
    model.model.set_attn_implementation("sdpa")


def test_decoys_are_spans_of_the_source_length_beside_the_needle():
    for case in random_cases(30):
        spans = decoy_spans(case, 20)
        assert spans == decoy_spans(case, 20)
        for span in spans:
            assert len(span) == len(case.source)
            assert span.start >= 0
            assert span.end <= case.needle.start or case.needle.end <= span.start
            assert span.end <= len(case.prompt_ids)
    starts = {span.start for span in decoy_spans(random_cases(1)[0], 2000)}
    case = random_cases(1)[0]
    possible = case.needle.start - len(case.source) + 1, len(case.prompt_ids) - len(case.source) - case.needle.end + 1
    assert len(starts) == sum(max(0, count) for count in possible)


def test_no_room_for_a_decoy_is_undefined_and_not_zero(model):
    case = random_cases(1)[0]
    crowded = dataclasses.replace(case, needle=Span(0, len(case.prompt_ids)))
    (result,) = score_cases(model, [crowded], METRICS)
    for name in NAMES:
        assert np.isnan(result.scores[f"{name}@decoy"]).all()
        assert np.isfinite(result.scores[name]).all()


def test_order_and_batching_do_not_matter(model):
    cases = random_cases(8)
    straight = {r.case_id: r for r in score_cases(model, cases, METRICS)}
    for other in (score_cases(model, cases[::-1], METRICS), score_cases(model, cases, METRICS, batch_tokens=1)):
        for result in other:
            twin = straight[result.case_id]
            assert result.answer_loss_nats == pytest.approx(twin.answer_loss_nats, abs=1e-5)
            for name in NAMES:
                np.testing.assert_allclose(result.scores[name], twin.scores[name], atol=1e-5)


def test_progress_counts_every_token(model):
    cases, seen = random_cases(7), []
    score_cases(model, cases, select_metrics(["wu"]), on_tokens=seen.append)
    assert sum(seen) == sum(case.length for case in cases)


def test_nan_logits_name_checkpoint_and_case(checkpoint):
    model = load_model(checkpoint)
    with torch.no_grad():
        model.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(
        LccpError, match=r"checkpoint tokens-1M, case c0: \d+ of \d+ logits are NaN; its weights are broken"
    ):
        score_cases(model, random_cases(1), METRICS)


def test_a_model_without_attention_rows_is_an_error(model):
    """Never an empty table: a model whose layers report nothing (all linear attention, say) is refused by name."""

    class Silent(HookedModel):
        def answer_logits(self, input_ids, n_answer, sink):
            return torch.zeros(*input_ids.shape[:1], n_answer, 600)

    silent = Silent(model.model, model.tokenizer, "silent")
    with pytest.raises(LccpError, match="checkpoint silent: no attention layer reported any rows"):
        score_cases(silent, random_cases(1), METRICS)


def test_a_planted_head_is_found_among_flat_ones():
    """Head 2 looks at each answer token's very source, the others at nothing in particular."""
    found = []
    for case in random_cases(20):
        weights = torch.full((4, len(case.answer_ids), case.length - 1), 1.0 / case.length)
        for t in range(len(case.answer_ids)):
            weights[2, t, case.source.start + t] = 0.9
        prompt, answer = torch.tensor(case.prompt_ids), torch.tensor(case.answer_ids)
        found.append(retrieval(AttentionRows(weights, prompt, answer, case.source)).tolist())
    means = np.mean(found, axis=0)
    assert means[2] == 1.0
    assert (np.delete(means, 2) < 0.1).all()


def test_random_weights_have_no_retrieval_heads(model):
    """The arg-max of an untrained head falls on the needle about as often as chance has it."""
    results = score_cases(model, random_cases(60, lengths=(200,)), select_metrics(["retrieval"]))
    assert np.mean([result.scores["retrieval"] for result in results], axis=0).max() < 0.1
