"""The walk along the prefix tree and chunked prefill, against the same prompts run whole and one by one."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lccp_interp.capture.model import HookedModel, load_model
from lccp_interp.capture.prefill import Prefill
from lccp_interp.schema import Case, LccpError, Needle, Span
from lccp_interp.scoring.engine import score_cases, shares
from lccp_interp.scoring.metrics import select_metrics
from lccp_interp.sweep import DEFAULT_METRICS
from lccp_interp.tasks.niah import NiahGrid, build_cases
from lccp_interp.tasks.prefixes import tokens_run, walk

METRICS = select_metrics(DEFAULT_METRICS)
TOLERANCE = 1e-5
TEXT = " ".join(f"The {a} {b} stood by the {c}." for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx")
NEEDLES = (
    Needle("The code of Mara is 4 0 7.", "What is the code of Mara?", "4 0 7"),
    Needle("The harbour of Tessin opens in May.", "When does the harbour of Tessin open?", "in May"),
    Needle("Old Varn hid a silver heron.", "What did old Varn hide?", "a silver heron"),
)


def plain_case(prompt, answer=(9,), name="c"):
    length = len(prompt) + len(answer)
    return Case(name, "niah", length, 0.0, "n", "h", 0, 0, tuple(prompt), tuple(answer), Span(0, 1), Span(0, 1))


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def grid(tokenizer):
    """Length x depth over three needles."""
    return build_cases(NiahGrid(lengths=(120, 200), depths=(0, 40, 100), needles=NEEDLES, haystack=TEXT), tokenizer)


def interference(cases):
    """The text before the needle grows, what comes after it stays."""
    whole = next(case for case in cases if case.length == 200 and case.depth_fraction == 1)
    grown = []
    for cut in (0, 30, 60, 90):
        # Text is taken away right before the needle, so that all begin alike.
        keep = whole.needle.start - cut
        prompt = whole.prompt_ids[:keep] + whole.prompt_ids[whole.needle.start :]
        needle = Span(keep, keep + len(whole.needle))
        source = Span(whole.source.start - cut, whole.source.end - cut)
        changes = {"length": whole.length - cut, "prompt_ids": prompt, "needle": needle, "source": source}
        grown.append(dataclasses.replace(whole, case_id=f"i{cut}", question=None, **changes))
    return grown


def questions(cases):
    """Several questions on one context, one of them twice."""
    first = next(case for case in cases if case.length == 200)
    asked = [first, dataclasses.replace(first, case_id="again")]
    for index in range(3):
        tail = tuple((token + index) % 600 for token in first.prompt_ids[-12:])
        prompt = first.prompt_ids[:-12] + tail
        asked.append(dataclasses.replace(first, case_id=f"q{index}", prompt_ids=prompt, question=None))
    return asked


def equal_results(got, expected):
    assert [result.case_id for result in got] == [result.case_id for result in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.layers == other.layers
        assert one.greedy_ids == other.greedy_ids
        np.testing.assert_allclose(one.answer_loss_nats, other.answer_loss_nats, atol=2e-5)
        for name in METRICS:
            np.testing.assert_allclose(one.scores[name], other.scores[name], atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["length x depth", "interference", "questions"])
@pytest.mark.parametrize("chunk_tokens", [16, 4096])
def test_shared_prefixes_equal_one_by_one(model, grid, kind, chunk_tokens):
    cases = {"length x depth": grid, "interference": interference(grid), "questions": questions(grid)}[kind]
    cases = random.Random(0).sample(cases, len(cases))
    alone = score_cases(model, cases, METRICS, sharing="off", batch_tokens=1)
    equal_results(score_cases(model, cases, METRICS, sharing="on", chunk_tokens=chunk_tokens), alone)
    visits = walk(cases)
    assert tokens_run(visits) < 0.75 * sum(visit.fed for visit in visits)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "gpt_neox", "hunyuan_v1_moe"])
def test_other_architectures_share_prefixes_too(grid, tokenizer, model_type):
    model = HookedModel(tiny_model(model_type, vocab_size=len(tokenizer)), tokenizer, model_type)
    assert model.shares_prefixes
    alone = score_cases(model, grid, METRICS, sharing="off", batch_tokens=1)
    equal_results(score_cases(model, grid, METRICS, sharing="on", chunk_tokens=50), alone)


def slow_tokens(cases):
    """Nodes of the tree of fed tokens; the queries of the copy events are run for every case."""
    seen, total = set(), 0
    for case in sorted(cases, key=lambda case: case.prompt_ids + case.answer_ids[:-1]):
        fed = case.prompt_ids + case.answer_ids[:-1]
        for n in range(1, len(fed) + 1):
            total += fed[:n] not in seen or n >= len(case.prompt_ids)
            seen.add(fed[:n])
    return total


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=9), st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_walk_runs_every_edge_of_the_tree_once(prompts, shuffle):
    cases = [plain_case(prompt) for prompt in prompts]
    visits = walk(cases)
    assert sorted(visit.index for visit in visits) == list(range(len(cases)))
    assert tokens_run(visits) == slow_tokens(cases)
    shuffle.shuffle(cases)
    assert tokens_run(walk(cases)) == slow_tokens(cases)


def test_large_token_ids_keep_their_order():
    cases = [plain_case([70_000, 1]), plain_case([255, 1]), plain_case([256, 1]), plain_case([70_000, 2])]
    assert [visit.index for visit in walk(cases)] == [1, 2, 0, 3]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 100])
def test_chunks_give_the_rows_and_logits_of_the_whole(model, chunk_tokens):
    ids = torch.randint(0, 600, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    whole, chunked = {}, {}
    expected = Prefill(model).run(ids, 80, whole.__setitem__)
    got = Prefill(model, chunk_tokens=chunk_tokens).run(ids, 80, chunked.__setitem__)
    scale = TOLERANCE * expected.abs().max().item()
    torch.testing.assert_close(got, expected, atol=scale, rtol=0)
    with torch.inference_mode():
        plain = model.model(torch.tensor([ids])).logits[0, 80:]
    torch.testing.assert_close(expected, plain, atol=scale, rtol=0)
    assert chunked[0].shape == (1, model.n_heads, 10, 90)
    for layer in range(model.n_layers):
        torch.testing.assert_close(chunked[layer], whole[layer], atol=TOLERANCE, rtol=0)


@pytest.fixture
def passes(model):
    """Lengths of the passes that the model is put through."""
    lengths = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield lengths
    hook.remove()


def test_only_what_is_new_is_run(model, passes):
    prefill = Prefill(model, chunk_tokens=4)
    prefill.run([1, 2, 3, 4, 5, 6], 5, None)
    prefill.run([1, 2, 3, 9, 9, 9, 9], 6, None)
    prefill.run([1, 2, 3, 9, 9, 9, 9, 8], 7, None)  # a decoding step
    prefill.run([1, 2, 3, 9, 9, 9, 9, 8], 2, None)  # rows asked for again must pass again
    assert passes == [2, 4, 4, 1, 6]


def test_progress_and_order_are_those_of_the_cases(model, grid):
    seen = []
    results = score_cases(model, grid, METRICS, sharing="on", on_tokens=seen.append)
    assert [result.case_id for result in results] == [case.case_id for case in grid]
    assert sorted(seen) == sorted(case.length for case in grid)


def test_sharing_is_chosen_where_it_is_cheaper(model, grid):
    short = [plain_case(np.random.default_rng(i).integers(0, 600, 64).tolist()) for i in range(8)]
    long = [plain_case([*range(500), *([i] * 500)]) for i in range(8)]
    assert not shares(model, short)
    assert shares(model, short, "on")
    assert shares(model, long)
    assert not shares(model, long, "off")
    assert not shares(model, long[:1], "on")


@pytest.fixture(scope="module")
def hybrid(tokenizer):
    """A model with convolution layers between its attention layers."""
    kinds = ["conv", "full_attention", "full_attention"]
    return HookedModel(tiny_model("lfm2", vocab_size=len(tokenizer), layer_types=kinds), tokenizer, "hybrid")


def test_a_state_that_cannot_be_cropped_runs_prompts_whole_and_says_so(hybrid, grid):
    alone = score_cases(hybrid, grid, METRICS, sharing="off", batch_tokens=1)
    assert alone[0].layers == (1, 2)
    with pytest.warns(UserWarning, match=r"hybrid: its conv layers carry a state that cannot be cropped, so prompts"):
        equal_results(score_cases(hybrid, grid, METRICS, sharing="on", chunk_tokens=50), alone)


def test_a_state_is_carried_on_by_decoding(hybrid):
    ids = torch.randint(0, 600, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    prefill = Prefill(hybrid, chunk_tokens=8)
    prefill.run(ids[:30], 29, None)
    for n in range(31, 41):
        logits = prefill.run(ids[:n], n - 1, None)
    with torch.inference_mode():
        expected = hybrid.model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)
    again = prefill.run(ids[:20], 19, None)  # shorter: from the beginning
    with torch.inference_mode():
        expected = hybrid.model(torch.tensor([ids[:20]])).logits[0, -1]
    torch.testing.assert_close(again[0], expected, atol=1e-4, rtol=0)


def test_a_fault_found_in_the_cache_turns_sharing_off(model, grid):
    doubted = dataclasses.replace(model, cache_fault="its cache gives other logits")
    assert not doubted.shares_prefixes
    with pytest.warns(UserWarning, match="its cache gives other logits, so prompts are run whole: 5,"):
        score_cases(doubted, grid * 2, METRICS, sharing="on")


def test_a_cache_found_wrong_is_not_even_used_to_decode(model, passes):
    prefill = Prefill(dataclasses.replace(model, cache_fault="its cache gives other logits"))
    for n in (5, 6, 7):
        prefill.run(list(range(n)), n - 1, None)
    assert passes == [5, 6, 7]


def short_of_memory(model, monkeypatch, limit, error=torch.OutOfMemoryError):
    """From now on a pass of more than `limit` tokens finds no memory."""
    forward = HookedModel.forward
    asked = []

    def failing(self, input_ids, n_logits, **options):
        asked.append(input_ids.numel())
        if input_ids.numel() > limit:
            raise error("CUDA out of memory. Tried to allocate 7 GiB\nmore lines")
        return forward(self, input_ids, n_logits, **options)

    monkeypatch.setattr(HookedModel, "forward", failing)
    return asked


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_out_of_memory_is_tried_again_in_smaller_chunks(model, grid, monkeypatch, sharing):
    expected = score_cases(model, grid, METRICS, sharing="off", batch_tokens=1)
    asked = short_of_memory(model, monkeypatch, 100)
    equal_results(score_cases(model, grid, METRICS, sharing=sharing), expected)
    assert max(asked) > 100
    # What was learnt once holds for the cases after it.
    assert sum(n > 100 for n in asked) <= (6 if sharing == "on" else len(grid))


def test_a_cpu_without_memory_is_recognised(model, grid, monkeypatch):
    message = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    short_of_memory(model, monkeypatch, 100, error=lambda _: RuntimeError(message))
    assert len(score_cases(model, grid, METRICS)) == len(grid)


def test_no_memory_at_all_is_reported(model, grid, monkeypatch):
    short_of_memory(model, monkeypatch, 10)
    message = (
        r"checkpoint tokens-1M: out of memory on \d+ tokens, in chunks of 64 tokens \(CUDA out of memory. Tried to "
        r"allocate 7 GiB\); try --dtype bfloat16, --device-map auto"
    )
    with pytest.raises(LccpError, match=message):
        score_cases(model, grid, METRICS)


def test_no_memory_for_a_model_that_must_run_whole(hybrid, grid, monkeypatch):
    short_of_memory(hybrid, monkeypatch, 10)
    with pytest.raises(LccpError, match="out of memory on 119 tokens, and its layers allow no chunks"):
        score_cases(hybrid, grid[:1], METRICS)


def test_other_errors_are_not_taken_for_lack_of_memory(model, monkeypatch):
    def fail(self, *args, **options):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(HookedModel, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Prefill(model).run([1, 2], 1, None)


def test_prefill_mistakes(model):
    with pytest.raises(LccpError, match="chunk_tokens must be at least 1, got 0"):
        Prefill(model, chunk_tokens=0)
    with pytest.raises(IndexError, match="row 2 is outside a prompt of 2 tokens"):
        Prefill(model).run([1, 2], 2, None)


@pytest.mark.filterwarnings("ignore:.*meta device:UserWarning")
@pytest.mark.parametrize("where", ["auto", "offloaded"])
def test_weights_spread_over_devices_give_the_same_scores(model, checkpoint, grid, where):
    """The first layer on the disk, the last two in memory: each runs where its weights are brought to."""
    layers = {f"model.layers.{layer}": "disk" if layer == 0 else "cpu" for layer in range(3)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    spread = load_model(checkpoint, device_map="auto" if where == "auto" else {**layers, **rest, "lm_head": "disk"})
    if where == "offloaded":
        assert spread.model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert spread.device.type == "cpu"
    expected = score_cases(model, grid, METRICS)
    for sharing in ("on", "off"):
        equal_results(score_cases(spread, grid, METRICS, sharing=sharing, chunk_tokens=64), expected)


def test_half_precision_is_scored_in_float32(checkpoint, grid):
    half = load_model(checkpoint, dtype="bfloat16")
    whole = score_cases(half, grid, METRICS, sharing="off")
    shared = score_cases(half, grid, METRICS, sharing="on", chunk_tokens=64)
    for one, other in zip(shared, whole, strict=True):
        assert all(values.dtype == np.float32 for values in one.scores.values())
        assert one.answer_loss_nats.dtype == np.float32
        assert np.isfinite(one.answer_loss_nats).all()
        # Half-precision keys and values differ in their last bits with the shape of the pass.
        np.testing.assert_allclose(one.scores["needle_mass"], other.scores["needle_mass"], atol=0.05)
