"""Interventions on heads against slow twins: a hook on the output projection's input, and attention written by hand."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.prefill import Prefill
from lccp_interp.capture.rows import TAP_NAME, tap_rows
from lccp_interp.interventions.heads import check_heads, head_text, known_heads, parse_heads
from lccp_interp.interventions.hooks import (
    head_outputs,
    mask_span,
    mean_outputs,
    patch_heads,
    record_heads,
    replace_heads,
    scale_heads,
    zero_heads,
)
from lccp_interp.interventions.paths import patch_paths
from lccp_interp.schema import LccpError, Span

FAMILIES = ("llama", "qwen3", "gpt_neox", "hunyuan_v1_moe", "mistral", "gemma3_text")
HEADS = [(0, 1), (2, 3), (2, 0)]
D_HEAD = 8
N_TOKENS = 40
TOLERANCE = 2e-5


@pytest.fixture(params=FAMILIES)
def model(request):
    return HookedModel(tiny_model(request.param), None, request.param)


@pytest.fixture
def llama():
    return HookedModel(tiny_model("llama"), None, "llama")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def prompt(seed=0, n_tokens=N_TOKENS, batch=1):
    return torch.randint(3, 700, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **inputs):
    return model.model(input_ids=ids, use_cache=False, **inputs).logits


def projections(model):
    """Output projection of each layer's attention."""
    found = {}
    for name, module in model.model.named_modules():
        if name.endswith((".self_attn.o_proj", ".attention.dense")):
            found[int(name.split("layers.")[1].split(".")[0])] = module
    assert sorted(found) == [0, 1, 2]
    return found


@contextlib.contextmanager
def by_projection(model, heads, change):
    """The slow twin: `change(layer, head, slice [batch, token, d_head])` of the output projection's input."""

    def hook(layer):
        def changed(module, inputs):
            whole = inputs[0].clone()
            for own, head in heads:
                if own == layer:
                    part = slice(head * D_HEAD, (head + 1) * D_HEAD)
                    whole[..., part] = change(layer, head, whole[..., part])
            return (whole,)

        return changed

    handles = [module.register_forward_pre_hook(hook(layer)) for layer, module in projections(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def slices(model, ids, heads):
    """What the output projection gets from each head, `[token, d_head]`."""
    got = {}

    def keep(layer, head, part):
        got[layer, head] = part[0].clone()
        return part

    with by_projection(model, heads, keep):
        logits(model, ids)
    return got


def assert_close(one, other):
    torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def test_zero_ablation_is_a_zeroed_slice_and_leaves_no_trace(model):
    ids = prompt(batch=2)
    before = logits(model, ids)
    implementation = model.model.config._attn_implementation
    with zero_heads(model, HEADS):
        got = logits(model, ids)
    with by_projection(model, HEADS, lambda layer, head, part: torch.zeros_like(part)):
        expected = logits(model, ids)
    assert_close(got, expected)
    assert (got - before).abs().max() > 100 * TOLERANCE
    assert torch.equal(logits(model, ids), before)
    assert model.model.config._attn_implementation == implementation


def test_zero_ablation_is_zeroed_columns_of_the_projection(llama):
    ids = prompt()
    with zero_heads(llama, HEADS):
        got = logits(llama, ids)
    for layer, head in HEADS:
        projections(llama)[layer].weight[:, head * D_HEAD : (head + 1) * D_HEAD] = 0
    assert_close(got, logits(llama, ids))


def test_scaling(model):
    ids = prompt()
    intact = logits(model, ids)
    with scale_heads(model, HEADS, 2.5):
        got = logits(model, ids)
    with by_projection(model, HEADS, lambda layer, head, part: 2.5 * part):
        assert_close(got, logits(model, ids))
    assert (got - intact).abs().max() > 100 * TOLERANCE
    with scale_heads(model, HEADS, 1.0):
        assert_close(logits(model, ids), intact)


def test_mean_ablation(model):
    reference = [prompt(seed, n_tokens)[0].tolist() for seed, n_tokens in ((1, 30), (2, 50))]
    means = mean_outputs(model, reference, HEADS)
    all_slices = [slices(model, torch.tensor([ids]), HEADS) for ids in reference]
    for head in HEADS:
        assert_close(means[head], torch.cat([part[head] for part in all_slices]).mean(0))
    last = mean_outputs(model, reference, HEADS, positions=[-1, 0])
    for head in HEADS:
        assert_close(last[head], torch.cat([part[head][[-1, 0]] for part in all_slices]).mean(0))
    ids = prompt(batch=2)
    with replace_heads(model, means):
        got = logits(model, ids)
    with by_projection(model, HEADS, lambda layer, head, part: means[layer, head].expand_as(part)):
        assert_close(got, logits(model, ids))


@pytest.mark.parametrize("positions", [None, [5, 17, 39]])
def test_patching_from_another_prompt(model, positions):
    clean, corrupted = prompt(1), prompt(2)
    outputs = head_outputs(model, clean, HEADS)
    twin = slices(model, clean, HEADS)
    for head in HEADS:
        assert_close(outputs[head], twin[head])
    with patch_heads(model, outputs, positions):
        got = logits(model, corrupted)

    def patched(layer, head, part):
        part = part.clone()
        chosen = range(N_TOKENS) if positions is None else positions
        for position in chosen:
            part[:, position] = twin[layer, head][position]
        return part

    with by_projection(model, HEADS, patched):
        expected = logits(model, corrupted)
    assert_close(got, expected)
    intact = logits(model, corrupted)
    assert (got - intact).abs().max() > 100 * TOLERANCE
    # Every head's own output, patched in, changes nothing.
    own = head_outputs(model, corrupted, known_heads(model.model.config))
    with patch_heads(model, own):
        assert_close(logits(model, corrupted), intact)


@contextlib.contextmanager
def attention_by_hand(model, heads, span, queries=None):
    """Attention head by head, query by query; for `heads` the keys in `span` do not exist."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        output = torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        for head in range(query.shape[1]):
            blind = (module.layer_idx, head) in heads
            for row in range(query.shape[2]):
                weights = key[:, head // groups] @ query[:, head, row, :, None] * scaling
                weights = weights[..., 0] + attention_mask[:, 0, row]
                if blind and (queries is None or row in queries):
                    weights[:, span.start : span.end] = -torch.inf
                visible = weights.max(-1).values > torch.finfo(weights.dtype).min / 2
                shares = torch.softmax(weights, -1).nan_to_num(0) * visible[:, None]
                output[:, row, head] = (shares[:, None] @ value[:, head // groups])[:, 0]
        return output, None

    before = model.model.config._attn_implementation
    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", eager_mask)
    model.model.set_attn_implementation("by_hand")
    try:
        yield
    finally:
        model.model.set_attn_implementation(before)


@pytest.mark.parametrize("span", [Span(0, 6), Span(20, 27)])
@pytest.mark.parametrize("queries", [None, [30, 39]])
def test_masking_a_span_is_attention_without_its_keys(model, span, queries):
    ids = prompt(batch=2)
    intact = logits(model, ids)
    with attention_by_hand(model, [], span):
        assert_close(logits(model, ids), intact)  # by hand and with nothing masked it is the model itself
    with mask_span(model, HEADS, span, queries):
        got = logits(model, ids)
    with attention_by_hand(model, HEADS, span, queries):
        expected = logits(model, ids)
    assert_close(got, expected)
    # Out of a window of 16 tokens nothing of the early span is seen at the end.
    unseen = model.name in ("mistral", "gemma3_text") and span.end < 10 and queries is not None
    moved = (got - logits(model, ids))[:, -1].abs().max()
    assert moved < TOLERANCE if unseen else moved > 10 * TOLERANCE


def test_masking_in_blocks_of_queries_and_over_eager_attention(llama, monkeypatch):
    ids, span = prompt(), Span(8, 14)
    with mask_span(llama, HEADS, span):
        whole = logits(llama, ids)
    monkeypatch.setattr("lccp_interp.capture.rows.EAGER_BYTES", 4 * 4 * N_TOKENS * 7)
    with mask_span(llama, HEADS, span):
        assert_close(logits(llama, ids), whole)
    llama.model.set_attn_implementation("eager")
    with mask_span(llama, HEADS, span):
        assert_close(logits(llama, ids), whole)


def test_masking_in_half_precision(llama):
    """A query that sees nothing but the span is 0, not undefined; the rest is what float32 makes of it, rounded."""
    ids, span = prompt(), Span(0, 6)
    with mask_span(llama, HEADS, span):
        expected = head_outputs(llama, ids, [(0, 1)])[0, 1]
    llama.model.bfloat16()
    with mask_span(llama, HEADS, span):
        got = head_outputs(llama, ids, [(0, 1)])[0, 1]
    assert got.dtype == torch.bfloat16
    assert not got[:6].any()
    assert not expected[:6].any()
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)


def test_masking_where_heads_have_sinks():
    """The sink keeps its logit: what the span had is shared by the other keys and the sink."""
    model = HookedModel(tiny_model("gpt_oss"), None, "gpt_oss")
    ids, span = prompt(), Span(30, 34)
    weights = model.attention_rows(ids, range(N_TOKENS))
    values = {}

    def keep(module, query, key, value, *args, **kwargs):
        values[module.layer_idx] = value
        return tap(module, query, key, value, *args, **kwargs)

    tap = AttentionInterface._global_mapping[TAP_NAME]
    AttentionInterface.register(TAP_NAME, keep)
    try:
        with mask_span(model, [(0, 1)], span):
            got = head_outputs(model, ids, [(0, 1)])[0, 1]
    finally:
        AttentionInterface.register(TAP_NAME, tap)
    row = weights[0][0, 1, -1]
    open_share = 1 - row[span.start : span.end].sum()
    left = row.clone()
    left[span.start : span.end] = 0
    assert_close(got[-1], (left / open_share) @ values[0][0, 0])


@pytest.mark.parametrize("intervene", ["zero", "scale", "mean", "patch", "mask"])
def test_decoding_behind_a_cache_equals_reading_it_all_again(model, intervene):
    ids = prompt(3, 30)
    contexts = {
        "zero": lambda: zero_heads(model, HEADS),
        "scale": lambda: scale_heads(model, HEADS, 3.0),
        "mean": lambda: replace_heads(model, mean_outputs(model, prompt(4).tolist(), HEADS)),
        "patch": lambda: patch_heads(model, head_outputs(model, prompt(5, 60), HEADS)),
        "mask": lambda: mask_span(model, HEADS, Span(4, 25)),
    }
    with contexts[intervene]():
        # The model's own cache, which in sliding layers has dropped the oldest keys, and one that keeps all.
        for cache in (DynamicCache(config=model.model.config), DynamicCache()):
            step, written = ids, ids
            for _ in range(8):
                output = model.model(input_ids=step, past_key_values=cache, use_cache=True)
                step = output.logits[:, -1:].argmax(-1)
                assert_close(output.logits[:, -1], logits(model, written)[:, -1])
                written = torch.cat([written, step], dim=1)


def test_prompts_in_chunks_and_behind_shared_prefixes(model):
    first, second = prompt(6)[0].tolist(), prompt(7)[0].tolist()
    second[:25] = first[:25]
    means = mean_outputs(model, [first], HEADS)
    for context in (
        lambda: zero_heads(model, HEADS),
        lambda: replace_heads(model, means),
        lambda: mask_span(model, HEADS, Span(3, 12)),
    ):
        with context():
            prefill = Prefill(model, chunk_tokens=9)
            for ids in (first, second):
                assert_close(prefill.run(ids, 35, None), logits(model, torch.tensor([ids]))[0, 35:])


def test_interventions_nest_and_come_off_one_by_one(llama):
    ids = prompt()
    intact = logits(llama, ids)
    with zero_heads(llama, [(0, 1)]):
        once = logits(llama, ids)
        with scale_heads(llama, [(2, 3), (0, 1)], 2.0):
            got = logits(llama, ids)
        assert torch.equal(logits(llama, ids), once)
    assert torch.equal(logits(llama, ids), intact)
    factors = {(0, 1): 0.0, (2, 3): 2.0}
    with by_projection(llama, list(factors), lambda layer, head, part: part * factors[layer, head]):
        assert_close(got, logits(llama, ids))


def test_the_model_is_restored_after_exceptions(llama):
    ids = prompt()
    intact = logits(llama, ids)
    with pytest.raises(IndexError), zero_heads(llama, HEADS), scale_heads(llama, HEADS, 3.0):
        logits(llama, torch.tensor([[700]]))
    short = head_outputs(llama, prompt(1, 10), HEADS)
    message = "position 39 is to be patched, the other prompt's outputs end at 9"
    with pytest.raises(LccpError, match=message), patch_heads(llama, short):
        logits(llama, ids)
    assert torch.equal(logits(llama, ids), intact)
    assert llama.model.config._attn_implementation == "sdpa"
    assert not llama.model.base_model._forward_pre_hooks


def test_rows_are_read_under_interventions_in_either_order(llama):
    """Silencing a head of the first layer changes what the later ones attend to."""
    ids = prompt()
    intact = llama.attention_rows(ids, [-1])
    with zero_heads(llama, [(0, 1)]):
        within = llama.attention_rows(ids, [-1])
    around = {}
    with tap_rows(llama.model, torch.tensor([N_TOKENS - 1]), around.__setitem__), zero_heads(llama, [(0, 1)]):
        logits(llama, ids)
    for layer in (0, 1, 2):
        assert_close(within[layer], around[layer])
    assert_close(within[0], intact[0])
    assert (within[2] - intact[2]).abs().max() > 100 * TOLERANCE


def test_two_models_at_a_time():
    one, other = (HookedModel(tiny_model("llama", seed=seed), None, f"seed-{seed}") for seed in (0, 1))
    ids = prompt()
    plain = logits(other, ids)
    with zero_heads(one, HEADS):
        expected = logits(one, ids)
        assert torch.equal(logits(other, ids), plain)
        with scale_heads(other, HEADS, 2.0):
            assert torch.equal(logits(one, ids), expected)
            assert not torch.equal(logits(other, ids), plain)
        assert torch.equal(logits(one, ids), expected)


def test_recording_sees_every_pass(llama):
    ids = prompt()
    whole = slices(llama, ids, [(1, 2)])[1, 2]
    seen = []
    with record_heads(llama, [(1, 2)], lambda head, first, output: seen.append((head, first, output[0].clone()))):
        Prefill(llama, chunk_tokens=16).run(ids[0].tolist(), N_TOKENS - 1, None)
    assert [(head, first) for head, first, _ in seen] == [((1, 2), 0), ((1, 2), 16), ((1, 2), 24)]
    assert_close(torch.cat([output for _, _, output in seen]), whole)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([(3, 0)], "has no heads 3-0: it has heads 0-3 in layers 0-2;"),
        ([(0, 1), (0, 4), (-1, 0)], "has no heads 0-4, -1-0: it has heads 0-3 in layers 0-2;"),
        ([(layer, 31) for layer in range(16, 28)], "23-31 and 4 more: it has heads 0-3"),
        ([], "no heads to change in checkpoint llama"),
    ],
)
def test_heads_that_do_not_exist(llama, heads, message):
    with pytest.raises(LccpError, match=message), zero_heads(llama, heads):
        pass
    assert llama.model.config._attn_implementation == "sdpa"


def test_outputs_of_another_architecture(llama):
    wide = {(0, 1): torch.zeros(16)}
    message = r"layer 0: the heads put out vectors of 8 numbers, got \[16\]"
    with pytest.raises(LccpError, match=message), replace_heads(llama, wide):
        logits(llama, prompt())


def test_layers_without_attention_have_no_heads():
    config = tiny_model("qwen3_next").config
    layers = {layer for layer, _ in known_heads(config)}
    assert layers == {layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"}
    with pytest.raises(LccpError, match="has no heads 0-0: it has heads 0-3 in layers 1;"):
        check_heads([(0, 0)], known_heads(config), "qwen")


def test_heads_in_words():
    assert parse_heads("2-2,3-3") == parse_heads(" 2-2  3-3 ") == [(2, 2), (3, 3)]
    assert head_text(parse_heads("16-19,11-15")) == "16-19, 11-15"
    for text, message in [
        ("2:2", "'2:2' is no head; write layer-head"),
        ("", "no heads are named"),
        ("1-1,2-2,1-1", "heads are named twice: 1-1;"),
    ]:
        with pytest.raises(LccpError, match=message):
            parse_heads(text)


# Path patching


def direct_by_hand(model, ids, clean, heads):
    """The residual stream before the last norm, and what the heads' own layers write more than usual, added up."""
    got, states = {}, {}
    base = model.model.base_model
    last_norm = base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, layer=layer: got.__setitem__(layer, inputs[0]))
        for layer, module in projections(model).items()
    ]
    handles.append(last_norm.register_forward_pre_hook(lambda module, inputs: states.__setitem__("end", inputs[0])))
    logits(model, ids)
    for handle in handles:
        handle.remove()
    end = states["end"]
    for layer in sorted({layer for layer, _ in heads}):
        projection, usual = projections(model)[layer], got[layer]
        changed = usual.clone()
        for own, head in heads:
            if own == layer:
                changed[..., head * D_HEAD : (head + 1) * D_HEAD] = clean[own, head]
        block = base.layers[layer]
        # Gemma puts a norm between attention and residual stream.
        behind = block.post_attention_layernorm if model.name == "gemma3_text" else (lambda written: written)
        end = end + behind(projection(changed)) - behind(projection(usual))
    return model.model.get_output_embeddings()(last_norm(end))


def test_path_patching_is_what_heads_write_directly(model):
    clean, corrupted = head_outputs(model, prompt(1), HEADS), prompt(2)
    usual = logits(model, corrupted)
    got = patch_paths(model, corrupted, clean, n_logits=3)
    assert_close(got, direct_by_hand(model, corrupted, clean, HEADS)[0, -3:])
    with patch_heads(model, clean):
        total = logits(model, corrupted)
    assert (got - usual[0, -3:]).abs().max() > 100 * TOLERANCE
    assert (got - total[0, -3:]).abs().max() > 100 * TOLERANCE
    assert torch.equal(logits(model, corrupted), usual)


def test_paths_from_the_last_layer_and_from_other_positions(llama):
    clean, corrupted = head_outputs(llama, prompt(1), [(2, 3)]), prompt(2)
    # Behind the last attention there is only its MLP: where that adds nothing, all effects are direct ones.
    mlp = llama.model.model.layers[2].mlp
    mlp.down_proj.weight.zero_()
    with patch_heads(llama, clean):
        assert_close(patch_paths(llama, corrupted, clean), logits(llama, corrupted)[0, -1:])
    # What a head writes at another position reaches no logits here directly.
    assert_close(patch_paths(llama, corrupted, clean, positions=[0, 20]), logits(llama, corrupted)[0, -1:])
