"""Answers written together against a slow loop that writes them one by one, and the tables made of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lccp_interp.behaviour import decoding, evaluate
from lccp_interp.behaviour.evaluate import (
    ANSWERS_SCHEMA,
    SUMMARY_SCHEMA,
    Answer,
    Answers,
    answer_items,
    answers_frame,
    best_of_k,
    bootstrap_interval,
    pass_at_k,
    summarise,
)
from lccp_interp.behaviour.sampling import cumulative, draw, uniforms
from lccp_interp.capture import architectures
from lccp_interp.capture.model import HookedModel, load_model
from lccp_interp.capture.prefill import Prefill
from lccp_interp.schema import Item, LccpError
from lccp_interp.store import PROBES_SCHEMA

BUDGET = 9
ENDS = tuple(range(5, 680, 40))
STOPS = (" the", "a", ".")


def item(prompt, name="i0", **changes):
    fields = {
        "item_id": name, "benchmark": "B-style", "subset": "s", "length": 64, "prompt_ids": tuple(prompt),
        "references": ("x",), "target": " x", "grader": "string_match_part", "max_new_tokens": BUDGET,
    }  # fmt: skip
    return Item(**{**fields, **changes})


def random_items(n_tokens, *, seed=0):
    """Prompts of different lengths; some share a beginning of 30 tokens, some have stop strings."""
    rng = random.Random(seed)
    shared = [rng.randrange(10, n_tokens) for _ in range(30)]
    items = []
    for index in range(8):
        own = [rng.randrange(10, n_tokens) for _ in range(rng.randrange(1, 25))]
        prompt = shared + own if index % 2 else own
        budget = rng.choice((1, BUDGET, BUDGET + 4))
        items.append(item(prompt, f"i{index}", max_new_tokens=budget, stop=STOPS if index % 3 == 0 else ()))
    return items


def hooked(model_type, tokenizer, *, seed=0, **changes):
    return ending(tiny_model(model_type, seed=seed, vocab_size=len(tokenizer), **changes), tokenizer)


def ending(model, tokenizer):
    model.generation_config.eos_token_id = list(ENDS)
    return HookedModel(model.eval(), tokenizer, model.config.model_type)


@torch.inference_mode()
def slow_answer(model, item, sample, *, temperature=0.7, seed=0):
    """One answer, with nothing kept from one step to the next: (text, tokens written, what stopped it)."""
    numbers = [] if sample is None else uniforms(seed, item.item_id, sample, item.max_new_tokens).tolist()
    ids = []
    while True:
        logits = model.model(torch.tensor([[*item.prompt_ids, *ids]]), use_cache=False).logits[0, -1].tolist()
        if sample is None:
            token = max(range(len(logits)), key=logits.__getitem__)
        else:
            weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
            left = numbers[len(ids)] * sum(weights)
            token = 0
            while left >= weights[token]:
                left -= weights[token]
                token += 1
        ids.append(token)
        text = model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if places := [text.find(stop) for stop in item.stop if stop in text]:
            return text[: min(places)], len(ids), "stop"
        if token in ENDS:
            return text, len(ids), "end"
        if len(ids) == item.max_new_tokens:
            return text, len(ids), "budget"


def slow_answers(model, items, *, n_samples=2):
    return [[slow_answer(model, item, sample) for sample in (None, *range(n_samples))] for item in items]


def written(answers):
    """What was written, without its grade."""
    return [
        [(answer.text, answer.n_tokens, answer.stopped) for answer in (own.greedy, *own.samples)] for own in answers
    ]


@pytest.fixture(scope="module")
def llama(tokenizer):
    return hooked("llama", tokenizer, weight_std=0.3)


@pytest.fixture(scope="module")
def items(tokenizer):
    return random_items(len(tokenizer))


@pytest.fixture(scope="module")
def expected(llama, items):
    return slow_answers(llama, items)


PADDED = (
    "llama", "gpt_neox", "qwen3", "gpt2", "mistral", "gemma3_text", "llama4_text", "gpt_oss", "deepseek_v3",
)  # fmt: skip
"""Rotary, partial rotary and learned positions; windows, chunks, sinks and latent keys."""


@pytest.mark.parametrize("model_type", PADDED)
def test_together_as_alone(model_type, tokenizer, items):
    model = hooked(model_type, tokenizer)
    alone = slow_answers(model, items)
    assert not decoding.padding_obstacle(model)
    for options in ({"sharing": "on"}, {"sharing": "off"}, {"sharing": "off", "batch_tokens": 130}):
        assert written(answer_items(model, items, n_samples=2, **options)) == alone


def test_layers_that_share_keys(tokenizer, items):
    whole = architectures.tiny_model(architectures.named("gemma3n_text"), vocab_size=len(tokenizer))
    model = ending(whole, tokenizer)
    assert model.model.config.num_kv_shared_layers == 2
    assert written(answer_items(model, items, n_samples=2)) == slow_answers(model, items)


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2"])
def test_models_whose_past_is_a_state_go_one_prompt_at_a_time(model_type, tokenizer, items):
    model = hooked(model_type, tokenizer)
    with pytest.warns(UserWarning, match=f"{model_type}: its .* state that cannot be cropped, so answers are") as told:
        answers = answer_items(model, items, n_samples=2)
    assert len(told) == 1
    assert written(answers) == slow_answers(model, items)
    assert answer_items(model, items[:1], n_samples=2) == answers[:1]  # nothing lost, nothing to say


def test_a_model_that_cannot_go_on_behind_a_cache_reads_all_again(llama, items, expected):
    broken = dataclasses.replace(llama, cache_fault="its cache is broken for the test")
    twice = items + [dataclasses.replace(item, item_id=f"{item.item_id}-again") for item in items]
    n_tokens = sum(len(item.prompt_ids) for item in twice)
    with pytest.warns(UserWarning, match="its cache is broken") as told:
        assert written(answer_items(broken, twice, n_samples=2)[: len(items)]) == expected
    (warning,) = told
    assert str(warning.message).startswith(
        "checkpoint llama: its cache is broken for the test, so answers are written one prompt at a time, and "
        f"{n_tokens} tokens are read where "
    )


def test_positions_that_depend_on_the_batch_are_not_padded(tokenizer, items, monkeypatch):
    stretched = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = hooked("llama", tokenizer, rope_parameters=stretched)
    with pytest.warns(UserWarning, match=r"llama: its rotary positions \(dynamic\) depend on the longest prompt"):
        assert written(answer_items(model, items, n_samples=2)) == slow_answers(model, items)
    plain = hooked("llama", tokenizer)
    forward = plain.model.forward
    monkeypatch.setattr(plain.model, "forward", lambda input_ids, **options: forward(input_ids, **options))
    assert decoding.padding_obstacle(plain) == "it takes no positions from outside"


def test_the_slow_answers_end_in_every_way(expected):
    stopped = Counter(stopped for own in expected for _, _, stopped in own)
    assert min(stopped["stop"], stopped["end"], stopped["budget"]) >= 1, stopped


def test_texts_do_not_depend_on_company_or_order(llama, items, expected):
    """Whatever else is asked, in whatever batches: the same texts."""
    rng = random.Random(1)
    for batch_tokens in (1, 100, 333, 10**6):
        order = list(range(len(items)))
        rng.shuffle(order)
        cut = rng.randrange(1, len(items))
        for chosen in (order[:cut], order[cut:]):
            answers = answer_items(llama, [items[i] for i in chosen], n_samples=2, batch_tokens=batch_tokens)
            assert [own.item_id for own in answers] == [items[i].item_id for i in chosen]
            assert written(answers) == [expected[i] for i in chosen]
    more = answer_items(llama, items, n_samples=4, greedy=False)
    assert [own.greedy for own in more] == [None] * len(items)
    texts = [[(one.text, one.n_tokens, one.stopped) for one in own.samples[:2]] for own in more]
    assert texts == [own[1:] for own in expected]
    other = answer_items(llama, items, n_samples=2, seed=1)
    assert [own.greedy for own in other] == [own.greedy for own in answer_items(llama, items, n_samples=0)]
    assert [own.samples for own in other] != [own.samples for own in answer_items(llama, items, n_samples=2)]


@pytest.fixture
def fed(llama):
    """Shapes `[row, token]` of all that the model is fed."""
    shapes = []
    handle = llama.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape))
    )
    yield shapes
    handle.remove()


def reading(shapes):
    return sum(n_tokens for _, n_tokens in shapes if n_tokens > 1)


def test_each_prompt_is_read_once_and_shared_beginnings_too(llama, tokenizer, fed):
    rng = random.Random(2)
    document = [rng.randrange(10, len(tokenizer)) for _ in range(40)]
    questions = [[rng.randrange(10, len(tokenizer)) for _ in range(5)] for _ in range(4)]
    items = [item(document + question, f"q{n}") for n, question in enumerate(questions)]
    assert len({question[0] for question in questions}) == 4
    results = {}
    for sharing, n_read in (("off", 4 * 45), ("on", 40 + 4 * 5), ("auto", 40 + 4 * 5)):
        fed.clear()
        results[sharing] = answer_items(llama, items, sharing=sharing)
        assert reading(fed) == n_read
    assert results["on"] == results["off"] == results["auto"]
    fed.clear()
    answer_items(llama, [item(question, f"q{n}") for n, question in enumerate(questions)])
    assert reading(fed) == 4 * 5


def test_answers_that_are_the_same_so_far_are_one_row(llama, items, fed):
    (own,) = answer_items(llama, [dataclasses.replace(items[0], stop=())], n_samples=5, temperature=1e-4)
    assert len({own.greedy, *own.samples}) == 1
    assert all(rows == 1 for rows, _ in fed)
    fed.clear()
    chosen = dataclasses.replace(items[0], stop=(), max_new_tokens=6)
    (own,) = answer_items(llama, [chosen], n_samples=5, temperature=2.0)
    assert len({one.text for one in own.samples}) == 5
    rows = [rows for rows, n_tokens in fed if n_tokens == 1]
    assert max(rows) == 6


def test_finished_answers_hold_nobody_up(llama, items, fed):
    short, long = (dataclasses.replace(items[1], item_id=f"n{n}", stop=(), max_new_tokens=n) for n in (3, 13))
    answers = answer_items(llama, [short, long], n_samples=0, sharing="off")
    assert [own.greedy.n_tokens for own in answers] == [3, 13]
    steps = [rows for rows, n_tokens in fed if n_tokens == 1]
    assert steps == [2] * 2 + [1] * 10
    fed.clear()
    answer_items(llama, [short], n_samples=0)
    assert len(fed) == 1 + 2


def crowded(monkeypatch, n_rows):
    """Out of memory on more rows than that; returns the numbers of rows that were tried."""
    tried, step = [], decoding._CachedRows.step

    def limited(self, parents, tokens):
        tried.append(len(parents))
        if len(parents) > n_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return step(self, parents, tokens)

    monkeypatch.setattr(decoding._CachedRows, "step", limited)
    return tried


def test_out_of_memory_halves_the_batch(llama, items, expected, monkeypatch):
    tried, told = crowded(monkeypatch, 5), []
    assert written(answer_items(llama, items, n_samples=2, on_item=told.append)) == expected
    assert max(tried) > 8
    assert tried.count(max(tried)) == 1  # what did not fit is not tried again
    assert sorted(told) == sorted(len(item.prompt_ids) for item in items)


def test_out_of_memory_while_reading_halves_the_batch_too(llama, items, expected, monkeypatch):
    feed, reads = Prefill._feed, []

    def limited(self, ids, *rest):
        reads.append(len(ids))
        if 3 <= len(reads) <= 4:
            raise MemoryError
        return feed(self, ids, *rest)

    monkeypatch.setattr(Prefill, "_feed", limited)
    assert written(answer_items(llama, items, n_samples=2)) == expected
    assert len(reads) > len(items) + 2


def test_out_of_memory_on_one_answer_says_what_to_do(llama, items, monkeypatch):
    crowded(monkeypatch, 0)
    message = (
        rf"checkpoint llama, item i1: out of memory on one answer of up to \d+ tokens to a prompt of "
        rf"{len(items[1].prompt_ids)} \(CUDA out of memory.*\); try --dtype bfloat16, --device-map auto"
    )
    chosen = dataclasses.replace(items[1], max_new_tokens=4, stop=())
    with pytest.raises(LccpError, match=message):
        answer_items(llama, [chosen], n_samples=2)


def test_other_errors_are_not_taken_for_want_of_memory(llama, items, monkeypatch):
    def step(self, parents, tokens):
        raise RuntimeError("something else")

    monkeypatch.setattr(decoding._CachedRows, "step", step)
    with pytest.raises(RuntimeError, match="something else"):
        answer_items(llama, items)


def test_logits_that_are_not_numbers(tokenizer, items):
    model = hooked("llama", tokenizer)
    with torch.no_grad():
        model.model.lm_head.weight[7] = torch.nan
    with pytest.raises(LccpError, match=r"checkpoint llama, item i\d: logits are NaN behind 0 tokens of the answer"):
        answer_items(model, items)
    half = HookedModel(model.model.to(torch.bfloat16), tokenizer, "llama")
    with pytest.raises(LccpError, match=r"try --dtype float32 \(bfloat16 now\)"):
        answer_items(half, items)


def test_half_precision(tokenizer, items):
    model = hooked("llama", tokenizer, weight_std=0.3)
    half = HookedModel(model.model.to(torch.bfloat16), tokenizer, "llama")
    answers = answer_items(half, items)
    assert all(
        1 <= one.n_tokens <= i.max_new_tokens for i, own in zip(items, answers, strict=True) for one in own.samples
    )


def test_progress_and_grades(llama, items, monkeypatch):
    told = []
    monkeypatch.setitem(evaluate.GRADERS, "counted", lambda text, references: len(text) / 1000)
    asked = [dataclasses.replace(item, grader="counted") for item in items]
    answers = answer_items(llama, asked, n_samples=2, batch_tokens=200, on_item=told.append)
    assert sorted(told) == sorted(len(item.prompt_ids) for item in items)
    for own in answers:
        assert [one.score for one in (own.greedy, *own.samples)] == [
            len(one.text) / 1000 for one in (own.greedy, *own.samples)
        ]


def test_the_bundled_model_answers(tokenizer):
    from lccp_interp.checkpoints import bundled_trajectory
    from lccp_interp.tasks.niah import NiahGrid, build_cases

    model = load_model(bundled_trajectory()[-1].path)
    cases = build_cases(NiahGrid(lengths=(256,), depths=(0, 50, 100), samples=4), model.tokenizer)
    texts = [model.tokenizer.decode(case.answer_ids) for case in cases]
    items = [
        item(case.prompt_ids, case.case_id, references=(text.strip(),), max_new_tokens=20, stop=("\n",), length=256)
        for case, text in zip(cases, texts, strict=True)
    ]
    answers = answer_items(model, items)
    scores = [own.greedy.score for own in answers]
    assert np.mean(scores) > 0.5
    assert {own.greedy.stopped for own in answers} == {"stop"}
    (row,) = summarise(answers, items, k=3).filter(pl.col("metric") == "pass@3").rows(named=True)
    assert row["score"] == np.mean([max(one.score for one in own.samples) for own in answers])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": -1}, "n_samples must be 0 or more, got -1"),
        ({"temperature": 0}, r"temperature must be above 0 \(greedy answers have none\), got 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1 \(1 keeps every token\), got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"sharing": "maybe"}, "sharing must be auto, on or off, got 'maybe'"),
        ({"greedy": False, "n_samples": 0}, "there is nothing to write: ask for the greedy answer, or for n_samples"),
    ],
)
def test_options_out_of_range(llama, items, options, message):
    with pytest.raises(LccpError, match=message):
        answer_items(llama, items, **options)


def test_items_that_cannot_be_graded_or_told_apart(llama, items):
    with pytest.raises(LccpError, match=r"item i0: unknown grader 'string_match_al'; known: .*\(did you mean"):
        answer_items(llama, [dataclasses.replace(items[0], grader="string_match_al")])
    with pytest.raises(LccpError, match="item i0 is there twice; give every item an item_id of its own"):
        answer_items(llama, [items[0], items[0]])
    assert answer_items(llama, []) == []


# Sampling.


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, 0.5]])
    row = cumulative(logits, temperature=0.5)
    drawn = np.bincount(draw(row.expand(20_000, 5), uniforms(3, "a", 0, 20_000).tolist()), minlength=5)
    shares = np.exp(logits[0].double().numpy() * 2)
    shares /= shares.sum()
    assert drawn[2] == 0
    # Four standard deviations.
    assert np.all(np.abs(drawn / 20_000 - shares) <= 4 * np.sqrt(shares * (1 - shares) / 20_000))


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=9), st.floats(0.01, 1), st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=200)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(logits, top_p, uniform):
    row = cumulative(torch.tensor([logits], dtype=torch.float64), temperature=1.0, top_p=top_p)
    shares = np.exp(logits) / np.exp(logits).sum()
    kept = np.flatnonzero(np.diff(row[0].numpy(), prepend=0.0) > 0)
    assert shares[kept].sum() >= top_p - 1e-9
    assert shares[kept].sum() - shares[kept].min() < top_p + 1e-9
    assert set(draw(row.expand(2, -1), [uniform, float(np.nextafter(1, 0))])) <= set(kept.tolist())


def test_every_sample_of_every_item_has_numbers_of_its_own():
    series = [tuple(uniforms(*key, 4)) for key in itertools.product((0, 1), ("a", "b"), (0, 1))]
    assert len({number for numbers in series for number in numbers}) == 32
    assert tuple(uniforms(0, "a", 0, 9)[:4]) == series[0]
    assert all(0 <= number < 1 for numbers in series for number in numbers)


# Pass@k and the tables.

grades = st.lists(st.sampled_from((0.0, 0.25, 0.5, 1.0)), min_size=1, max_size=6)


@given(grades, st.integers(1, 6))
def test_both_are_means_over_all_choices_of_k(scores, k):
    if k > len(scores):
        with pytest.raises(LccpError, match=rf"k must lie between 1 and .* \({len(scores)}\), got {k}"):
            best_of_k(scores, k)
        return
    choices = list(itertools.combinations(scores, k))
    assert best_of_k(scores, k) == pytest.approx(np.mean([max(choice) for choice in choices]))
    assert pass_at_k(scores, k) == pytest.approx(np.mean([1.0 in choice for choice in choices]))
    n, c = len(scores), scores.count(1.0)
    assert pass_at_k(scores, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))
    assert pass_at_k(scores, n) == float(1.0 in scores)
    assert pass_at_k(scores, k, right=0.5) >= pass_at_k(scores, k)


def made(item_id, greedy, *samples):
    answers = [None if score is None else Answer(f"{item_id} {score}", 3, "end", score) for score in (greedy, *samples)]
    return Answers(item_id, answers[0], tuple(answers[1:]))


@pytest.fixture
def table():
    """Two cells, one of a grader of shares, by hand."""
    items = [
        item((1, 2), "a", subset="late", length=128), item((1, 2), "b", subset="late", length=64),
        item((1, 2), "c", subset="late", length=64), item((1, 2), "d", subset="early", grader="mrcr"),
    ]  # fmt: skip
    answers = [made("a", 1.0, 0, 0, 0), made("b", 0.0, 1, 0, 0), made("c", 1.0, 0, 0, 0), made("d", 0.4, 0.5, 0.2, 0)]
    return answers, items


def test_the_summary_by_hand(table):
    frame = summarise(*table, k=2)
    assert dict(frame.schema) == SUMMARY_SCHEMA
    assert [name for name in PROBES_SCHEMA if name not in SUMMARY_SCHEMA] == ["checkpoint", "tokens_seen"]
    third = pytest.approx(1 / 3)
    assert frame.rows() == [
        ("B-style", "late", 64, "greedy", 0.5, 2, 0.5),
        ("B-style", "late", 64, "pass@2", third, 2, third),
        ("B-style", "late", 128, "greedy", 1.0, 1, None),
        ("B-style", "late", 128, "pass@2", 0.0, 1, None),
        ("B-style", "early", 64, "greedy", 0.4, 1, None),
        ("B-style", "early", 64, "pass@2", 0.0, 1, None),
        ("B-style", "early", 64, "best@2", pytest.approx(0.4), 1, None),
    ]
    assert summarise(*table)["metric"].unique().sort().to_list() == ["best@3", "greedy", "pass@3"]


def test_intervals_hold_the_mean(table):
    frame = summarise(*table, intervals=True)
    assert list(frame.columns) == [*SUMMARY_SCHEMA, "ci_low", "ci_high"]
    assert frame.row(0)[-2:] == (0.0, 1.0)
    assert np.isnan(frame.row(2)[-2:]).all()
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval((rng.random(50) < 0.3).astype(float))
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199


def test_every_text_is_kept(table):
    answers, items = table
    frame = answers_frame(answers, items)
    assert dict(frame.schema) == ANSWERS_SCHEMA
    assert frame.height == 16
    assert frame.row(0) == ("a", "B-style", "late", 128, None, "a 1.0", 1.0, 3, "end")
    assert frame.row(13) == ("d", "B-style", "early", 64, 0, "d 0.5", 0.5, 3, "end")
    without = answers_frame([dataclasses.replace(answers[0], greedy=None)], items[:1])
    assert without["sample"].to_list() == [0, 1, 2]
    assert answers_frame([], []).schema == frame.schema


def test_answers_of_other_items_are_refused(table):
    answers, items = table
    for function in (answers_frame, summarise):
        with pytest.raises(LccpError, match="4 answers do not belong to these 3 items; give the items"):
            function(answers, items[:3])
        with pytest.raises(LccpError, match="do not belong"):
            function(answers, items[::-1])
    with pytest.raises(LccpError, match=r"k must lie between 1 and the number of samples \(3\), got 4; write more"):
        summarise(answers, items, k=4)


def test_tables_need_no_torch():
    code = "import sys, lccp_interp.behaviour.evaluate; print({'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
