"""The tap against the model's own eager attention, on several architectures with different attention."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import tiny_model
from torch.nn.attention.bias import causal_lower_right
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lccp_interp.capture import rows as tap
from lccp_interp.capture.model import HookedModel, flash_kernel, load_model
from lccp_interp.capture.rows import TAP_NAME, edit_attention, tap_rows
from lccp_interp.schema import LccpError

ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "hunyuan_v1_moe")
TOLERANCE = 1e-5
FIELD = "_attn_implementation_internal"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param)


def prompts(model, *, batch=2, n_tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, n_tokens), generator=generator)


def eager_rows(model, ids, rows, **inputs):
    """The slow, obvious way: full maps of every layer, then pick rows."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        maps = model(ids, output_attentions=True, **inputs).attentions
    model.set_attn_implementation(before)
    return {layer: full[:, :, rows] for layer, full in enumerate(maps)}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_rows_equal_eager_and_logits_are_untouched(model, kernel):
    model.set_attn_implementation(kernel)
    ids, rows = prompts(model), [0, 3, 20, 39]
    with torch.inference_mode():
        plain = model(ids).logits
        got = {}
        with tap_rows(model, torch.tensor(rows), got.__setitem__):
            tapped = model(ids).logits
    expected = eager_rows(model, ids, rows)
    assert sorted(got) == sorted(expected) == [0, 1, 2]
    assert model.config._attn_implementation == kernel
    torch.testing.assert_close(tapped, plain, atol=TOLERANCE, rtol=0)
    for layer, weights in got.items():
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, expected[layer], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=TOLERANCE, rtol=0)
    model.set_attn_implementation("sdpa")


def test_rows_with_left_padding(model):
    ids, rows = prompts(model), [38, 39]
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    got = {}
    with torch.inference_mode(), tap_rows(model, torch.tensor(rows), got.__setitem__):
        model(ids, attention_mask=mask)
    for layer, expected in eager_rows(model, ids, rows, attention_mask=mask).items():
        torch.testing.assert_close(got[layer], expected, atol=TOLERANCE, rtol=0)
        assert got[layer][0, :, :, :7].abs().max() == 0


def test_rows_behind_a_cache(model):
    ids = prompts(model, batch=1)
    got = {}
    with torch.inference_mode():
        cache = model(ids[:, :30], use_cache=True).past_key_values
        with tap_rows(model, torch.tensor([0, 9]), got.__setitem__):
            model(ids[:, 30:], past_key_values=cache)
    for layer, expected in eager_rows(model, ids, [30, 39]).items():
        n_keys = got[layer].shape[-1]  # a sliding layer's cache has dropped the oldest keys
        torch.testing.assert_close(got[layer], expected[..., -n_keys:], atol=TOLERANCE, rtol=0)


def test_no_row_attends_to_the_future(model):
    got = {}
    with torch.inference_mode(), tap_rows(model, torch.tensor([5]), got.__setitem__):
        model(prompts(model))
    assert all(weights[..., 6:].abs().max() == 0 for weights in got.values())


def test_a_sliding_window_is_seen_in_the_rows():
    model = tiny_model("gemma3_text")
    got = {}
    with torch.inference_mode(), tap_rows(model, torch.tensor([39]), got.__setitem__):
        model(prompts(model))
    assert got[0][..., :23].abs().max() == 0 < got[1][..., :23].abs().min()


def test_the_implementation_is_restored_after_an_exception(model):
    def fail(layer, weights):
        raise RuntimeError("sink failed")

    with pytest.raises(RuntimeError, match="sink failed"), tap_rows(model, torch.tensor([0]), fail):
        model(prompts(model))
    assert model.config._attn_implementation == "sdpa"
    model(prompts(model))


def test_rows_go_through_half_precision_in_float32():
    model = tiny_model("llama").to(torch.bfloat16)
    got = {}
    with torch.inference_mode(), tap_rows(model, torch.tensor([39]), got.__setitem__):
        model(prompts(model))
    assert all(weights.dtype == torch.float32 for weights in got.values())


def test_rows_are_float32_inside_autocast():
    model = tiny_model("llama")
    calls, got = [], {}

    def keep_call(call):
        calls.append(call)
        return call.output

    # As in a training with mixed precision: the layers run in bfloat16, the rows are made of what they give.
    mixed = torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.inference_mode(), mixed, edit_attention(model, keep_call):  # noqa: SIM117
        with tap_rows(model, torch.tensor([39]), got.__setitem__):
            model(prompts(model))
    assert torch.equal(calls[0].value, calls[0].value.bfloat16().to(calls[0].value.dtype))
    for call in calls:
        keys = call.key.float().repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
        logits = torch.einsum("bhd,bhkd->bhk", call.query[:, :, 39].float(), keys) * call.module.scaling
        torch.testing.assert_close(got[call.layer][:, :, 0], logits.softmax(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("model_type", "kernel"), [("gemma2", "eager"), ("gpt_oss", "eager"), ("llama", "sdpa")])
def test_attention_in_blocks_equals_the_whole(monkeypatch, model_type, kernel):
    model = tiny_model(model_type)
    assert model.config._attn_implementation == kernel
    ids = prompts(model)
    with torch.inference_mode():
        plain = model(ids).logits
    monkeypatch.setattr(tap, "EAGER_BYTES", 2 * 4 * 40 * 4 * 7)  # seven queries of 2 x 4 heads x 40 keys
    monkeypatch.setattr(tap, "CACHED_QUERIES", 7)
    got = {}
    with torch.inference_mode():
        with tap_rows(model, None, got.__setitem__):
            first = model(ids[:, :12], past_key_values=DynamicCache())
        with tap_rows(model, torch.tensor([0, 27]), got.__setitem__):
            second = model(ids[:, 12:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), plain, atol=TOLERANCE, rtol=TOLERANCE)
    for layer, expected in eager_rows(model, ids, [12, 39]).items():
        torch.testing.assert_close(got[layer], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_queries", [2, 5, 11])
@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_every_way_behind_a_cache_is_masked_attention(monkeypatch, n_queries, n_kv_heads, dtype):
    """In two parts (CPU), with a lower-right bias (GPU), and in blocks (other devices, values of another size)."""
    module = tiny_model("llama").model.layers[0].self_attn
    module.num_key_value_groups = 4 // n_kv_heads
    generator = torch.Generator().manual_seed(n_queries)
    query = torch.randn(2, 4, n_queries, 8, generator=generator).to(dtype)
    key, value = (torch.randn(2, n_kv_heads, 12, 8, generator=generator).to(dtype) for _ in range(2))
    allowed = torch.ones(n_queries, 12, dtype=torch.bool).tril(12 - n_queries)[None, None]
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    expected, _ = sdpa(module, query, key, value, allowed, scaling=0.3)
    close = {"atol": TOLERANCE if dtype == torch.float32 else 0.02, "rtol": 0}
    torch.testing.assert_close(tap._sdpa_output(module, query, key, value, None, scaling=0.3), expected, **close)
    biased, _ = sdpa(module, query, key, value, causal_lower_right(n_queries, 12), scaling=0.3)
    torch.testing.assert_close(biased, expected, **close)
    monkeypatch.setattr(tap, "CACHED_QUERIES", 3)
    narrow = tap._sdpa_output(module, query, key, value[..., :4], None, scaling=0.3)
    torch.testing.assert_close(narrow, expected[..., :4], **close)


def flash_stand_in(seen):
    """An attention that takes what flash kernels take: no mask or `[batch, key]`, and the window as a number."""

    def attend(module, query, key, value, attention_mask, *, scaling, sliding_window=None, **kwargs):
        seen.append(module.config._attn_implementation)
        n_queries, n_keys = query.shape[2], key.shape[2]
        at = torch.arange(n_keys - n_queries, n_keys)[:, None]
        keys = torch.arange(n_keys)[None]
        allowed = (keys <= at) if sliding_window is None else (keys <= at) & (keys > at - sliding_window)
        allowed = allowed[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None].bool()
        groups = module.num_key_value_groups
        weights = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
        weights = weights.masked_fill(~allowed, -1e30).softmax(-1)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    return attend


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_rows_over_a_flash_kernel(monkeypatch, model_type, padded):
    model = tiny_model(model_type)
    ids, rows, seen = prompts(model), [30, 39], []
    mask = torch.ones_like(ids)
    mask[0, :7] = 1 - padded
    expected = eager_rows(model, ids, rows, attention_mask=mask)
    with torch.inference_mode():
        plain = model(ids, attention_mask=mask).logits
    mapping = ALL_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(mapping, "flash_attention_2", flash_stand_in(seen))
    got = {}
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: setattr(model.config, FIELD, name))
    model.set_attn_implementation("flash_attention_2")
    with torch.inference_mode(), tap_rows(model, torch.tensor(rows), got.__setitem__):
        tapped = model(ids, attention_mask=mask).logits
    assert seen == ["flash_attention_2"] * 3
    assert model.config._attn_implementation == "flash_attention_2"
    torch.testing.assert_close(tapped[:, 7:], plain[:, 7:], atol=TOLERANCE, rtol=TOLERANCE)
    for layer, weights in expected.items():
        torch.testing.assert_close(got[layer], weights, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("installed", "device", "dtype", "expected"),
    [
        ({2, 3}, "cuda", torch.bfloat16, "flash_attention_3"),
        ({2}, "cuda:1", torch.float16, "flash_attention_2"),
        (set(), "cuda", torch.bfloat16, ""),
        ({2, 3}, "cuda", torch.float32, ""),
        ({2, 3}, "cpu", torch.bfloat16, ""),
    ],
)
def test_the_newest_flash_kernel_that_can_run_is_taken(monkeypatch, installed, device, dtype, expected):
    for version in (2, 3):
        monkeypatch.setattr(f"transformers.utils.is_flash_attn_{version}_available", lambda v=version: v in installed)
    assert flash_kernel(torch.device(device), dtype) == expected


def test_other_kernels_are_refused():
    model = tiny_model("llama")
    model.set_attn_implementation("flex_attention")
    with (
        pytest.raises(LccpError, match="runs attention implementation 'flex_attention'"),
        tap_rows(model, torch.tensor([0]), lambda layer, weights: None),
    ):
        pass


def test_the_tap_outside_its_context_is_refused():
    model = tiny_model("llama")
    model.set_attn_implementation(TAP_NAME)
    with pytest.raises(LccpError, match="outside of `tap_rows`"):
        model(prompts(model))


def test_attention_rows_of_a_hooked_model(checkpoint):
    model = load_model(checkpoint)
    ids = prompts(model.model)
    rows = model.attention_rows(ids, [-1, 2])
    expected = eager_rows(model.model, ids, [39, 2])
    for layer in range(model.n_layers):
        torch.testing.assert_close(rows[layer], expected[layer], atol=TOLERANCE, rtol=0)
    with pytest.raises(IndexError, match="position 40 is outside a prompt of 40 tokens"):
        model.attention_rows(ids, [40])


def test_answer_logits_are_those_of_the_whole_pass(checkpoint):
    model = load_model(checkpoint)
    ids = prompts(model.model)
    captured = {}
    logits = model.answer_logits(ids, 6, captured.__setitem__)
    with torch.inference_mode():
        whole = model.model(ids).logits
    torch.testing.assert_close(logits, whole[:, 33:39], atol=TOLERANCE, rtol=0)
    assert captured[0].shape == (2, model.n_heads, 6, 39)


def test_load_model_settings(checkpoint):
    assert load_model(checkpoint).dtype == "float32"
    assert load_model(checkpoint, dtype="bfloat16").dtype == "bfloat16"
    mapped = load_model(checkpoint, device_map={"": "cpu"})
    assert isinstance(mapped, HookedModel)
    assert mapped.device.type == "cpu"


def test_load_model_mistakes(checkpoint, tmp_path):
    with pytest.raises(LccpError, match="unknown dtype 'int3'; known: auto, float32"):
        load_model(checkpoint, dtype="int3")
    with pytest.raises(LccpError, match="device 'cuda:77' cannot be used"):
        load_model(checkpoint, device="cuda:77")
    unknown = tmp_path / "unknown"
    shutil.copytree(checkpoint, unknown)
    config = (unknown / "config.json").read_text().replace('"llama"', '"llamoid"')
    (unknown / "config.json").write_text(config)
    with pytest.raises(LccpError, match=r"unknown cannot be loaded: .*llamoid"):
        load_model(unknown)


def edited_config(checkpoint, tmp_path, **changes):
    folder = tmp_path / "edited"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, r"has surplus \d+ weights of LlamaForCausalLM: model.layers.2"),
        ({"num_hidden_layers": 4}, r"lacks \d+ weights of LlamaForCausalLM: model.layers.3"),
        ({"intermediate_size": 24}, "edited"),
        ({"hidden_size": 0}, "edited cannot be loaded"),
    ],
)
def test_a_config_of_another_model_is_refused(checkpoint, tmp_path, capfd, changes, message):
    with pytest.raises(LccpError, match=message):
        load_model(edited_config(checkpoint, tmp_path, **changes))
    assert capfd.readouterr().err == ""


def test_a_bidirectional_model_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    model = BertLMHeadModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    ).eval()
    with (
        pytest.raises(LccpError, match="attends in both directions"),
        tap_rows(model, torch.tensor([0]), lambda layer, weights: None),
    ):
        model(torch.tensor([[1, 2, 3]]))


def test_missing_weights_are_never_filled_with_noise(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LccpError, match=r"lacks 1 weights of LlamaForCausalLM: model.layers.1.self_attn.q_proj"):
        load_model(folder)


def test_keys_are_repeated_only_for_heads_with_parameters_of_their_own():
    for model_type, whole in (("llama", False), ("hunyuan_v1_moe", False), ("mimo_v2_flash", True)):
        model = tiny_model(model_type)
        with torch.inference_mode(), tap_rows(model, torch.tensor([39]), lambda layer, weights: None):
            model(prompts(model))
        assert (tap.eager_function(model.model.layers[0].self_attn) in tap._WHOLE_MODULE) == whole
