"""Every row of the table of architectures: captured rows against eager maps, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from lccp_interp.capture.architectures import (
    ARCHITECTURES,
    REFUSED,
    WINDOW,
    kernel,
    layer_kinds,
    named,
    render,
    tiny_config,
    tiny_model,
)
from lccp_interp.capture.model import HookedModel, load_model, state_layers
from lccp_interp.capture.prefill import Prefill
from lccp_interp.capture.rows import _layer, _Tap, tap_rows
from lccp_interp.organism.tokenizer import save_tokenizer
from lccp_interp.schema import Case, LccpError, Span
from lccp_interp.scoring.engine import score_cases
from lccp_interp.scoring.metrics import select_metrics

TOLERANCE = 1e-5
N_TOKENS, N_FIRST, N_PADDING = 40, 25, 7
KINDS_WITHOUT_ATTENTION = {"linear_attention", "conv", "moe"}


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(architecture):
    return tiny_model(architecture)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def prompts(*, seed=0):
    """Two random prompts; token ids from 3 on are no model's special ones."""
    return torch.randint(3, 700, (2, N_TOKENS), generator=torch.Generator().manual_seed(seed))


def layers_with_attention(config):
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [layer for layer, kind in enumerate(kinds) if kind not in KINDS_WITHOUT_ATTENTION]


def tapped(model, rows, ids, **inputs):
    """Output of a pass and the rows by layer; each layer reports once."""
    got = {}

    def sink(layer, weights):
        assert layer not in got
        got[layer] = weights

    with tap_rows(model, torch.tensor(rows), sink):
        output = model(ids, **inputs)
    assert sorted(got) == layers_with_attention(model.config)
    return output, got


def eager_rows(model, rows, ids, **inputs):
    """The slow, obvious way: all maps of the model's own eager attention, then some of their rows."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = [full for full in model(ids, output_attentions=True, **inputs).attentions if full is not None]
    model.set_attn_implementation(before)
    return {layer: full[:, :, rows] for layer, full in zip(layers_with_attention(model.config), maps, strict=True)}


def assert_same(got, expected):
    assert list(got) == list(expected)
    for layer, weights in got.items():
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, expected[layer], atol=TOLERANCE, rtol=0, msg=lambda m: f"{layer}: {m}")  # noqa: B023


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_rows_are_eager_and_logits_untouched(model):
    ids, rows = prompts(), [0, 3, 20, 38, 39]
    output, got = tapped(model, rows, ids, use_cache=False)
    assert_close(output.logits, model(ids, use_cache=False).logits)
    assert_same(got, eager_rows(model, rows, ids, use_cache=False))
    for weights in got.values():
        # Uneven, or a wrong row could not be told from a right one.
        assert weights[:, :, -1].max() > 1 / WINDOW


def test_left_padding(model):
    ids, rows = prompts(), [20, 38, 39]
    mask = torch.ones_like(ids)
    mask[0, :N_PADDING] = 0
    inputs = {"attention_mask": mask, "use_cache": False}
    output, got = tapped(model, rows, ids, **inputs)
    # Queries that are padding themselves see nothing; what comes of them is nobody's answer.
    assert_close(output.logits[:, N_PADDING:], model(ids, **inputs).logits[:, N_PADDING:])
    assert_same(got, eager_rows(model, rows, ids, **inputs))
    assert all(weights[0, :, :, :N_PADDING].max() == 0 for weights in got.values())


def test_behind_the_models_own_cache(model):
    first, rest = prompts().split([N_FIRST, N_TOKENS - N_FIRST], dim=1)

    def cache():
        return model(first, use_cache=True).past_key_values

    output, got = tapped(model, [0, 14], rest, past_key_values=cache(), use_cache=True)
    assert_close(output.logits, model(rest, past_key_values=cache(), use_cache=True).logits)
    assert_same(got, eager_rows(model, [0, 14], rest, past_key_values=cache(), use_cache=True))


def test_in_pieces_behind_a_cache_that_is_cropped(model):
    ids = prompts()
    other = torch.cat([ids[:, :N_FIRST], prompts(seed=1)[:, N_FIRST:]], dim=1)
    # Without a config all layers keep all keys, sliding ones too.
    cache = DynamicCache()
    if obstacle := state_layers(model.config):
        with pytest.raises((IndexError, ValueError)):
            model(ids[:, :N_FIRST], past_key_values=cache, use_cache=True)
        assert "carry a state that cannot be cropped" in obstacle
        return
    tapped(model, [0], ids[:, :N_FIRST], past_key_values=cache, use_cache=True)
    for whole in (ids, other):
        output, got = tapped(model, [0, 14], whole[:, N_FIRST:], past_key_values=cache, use_cache=True)
        assert_close(output.logits, model(whole, use_cache=False).logits[:, N_FIRST:])
        assert_same(got, eager_rows(model, [N_FIRST, 39], whole, use_cache=False))
        cache.crop(N_FIRST - N_TOKENS)
        assert cache.get_seq_length() == N_FIRST


@pytest.mark.parametrize("chunk_tokens", [4096, 9])
def test_the_passes_of_scoring(model, architecture, chunk_tokens):
    """Logits and rows of the last five tokens only, whole and in chunks, behind what an earlier prompt has left."""
    hooked = HookedModel(model, None, architecture.model_type)
    ids = prompts()
    plain, expected = tapped(model, range(N_TOKENS), ids, use_cache=False)
    together = {}
    logits = hooked.answer_logits(torch.cat([ids, ids[:, :1]], 1), 5, together.__setitem__)
    torch.testing.assert_close(logits, plain.logits[:, -5:], atol=TOLERANCE, rtol=TOLERANCE)
    prefill = Prefill(hooked, chunk_tokens=chunk_tokens)
    prefill.run([*ids[0, :30].tolist(), 5, 6], 31, None)
    alone = {}
    logits = prefill.run(ids[0].tolist(), N_TOKENS - 5, alone.__setitem__)
    torch.testing.assert_close(logits, plain.logits[0, -5:], atol=TOLERANCE, rtol=TOLERANCE)
    assert sorted(together) == sorted(alone) == sorted(expected)
    for layer, rows in expected.items():
        torch.testing.assert_close(together[layer], rows[:, :, -5:], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(alone[layer], rows[:1, :, -5:], atol=TOLERANCE, rtol=0)


def test_half_precision(architecture):
    model = tiny_model(architecture).to(torch.bfloat16)
    _, got = tapped(model, [0, 20, 39], prompts(), use_cache=False)
    for weights in got.values():
        assert weights.dtype == torch.float32
        sums = weights.sum(-1)
        if "sinks" in architecture.notable:
            assert sums.min() > 0
            assert sums.max() <= 1 + TOLERANCE
        else:
            assert_close(sums, torch.ones_like(sums))


def test_windows_and_chunks_are_shorter_than_the_prompts(architecture):
    config = tiny_config(architecture)
    kinds = set(layer_kinds(config))
    if "sliding" in architecture.notable:
        assert "sliding_attention" in kinds
    if "sliding_attention" in kinds:
        assert config.sliding_window == WINDOW < N_FIRST
    if "chunked_attention" in kinds:
        assert config.attention_chunk_size == WINDOW


def test_the_table():
    types = [architecture.model_type for architecture in ARCHITECTURES]
    refused = [refusal.architecture.model_type for refusal in REFUSED]
    assert len(set(types + refused)) == len(types) + len(refused)
    assert len(types) >= 30
    with pytest.raises(KeyError):
        named("llamoid")


def test_kernels_come_from_the_models():
    found = {architecture.model_type: kernel(architecture) for architecture in ARCHITECTURES}
    assert {name for name, kind in found.items() if kind == "eager"} == {
        "gemma2", "vaultgemma", "gpt_oss", "mimo_v2_flash", "hy_v4",
    }  # fmt: skip


def test_a_tiny_model_is_the_same_for_the_same_seed():
    before = torch.random.get_rng_state()
    one, again, other = (tiny_model(named("llama"), seed=seed)(prompts()).logits for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert tiny_model(named("llama"), num_hidden_layers=2).config.num_hidden_layers == 2


def test_importing_the_table_loads_no_torch():
    code = "import sys, lccp_interp.capture.architectures; print({'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_the_documentation_is_this_table():
    committed = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
    assert committed.read_text() == render(), "run: python -m lccp_interp.capture.architectures > docs/architectures.md"


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.architecture.model_type)
def test_refused_with_the_reason(refusal, tmp_path):
    tiny_model(refusal.architecture).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    ids = prompts()[0].tolist()
    case = Case("c", "niah", N_TOKENS, 0.0, "n", "h", 0, 0, tuple(ids[:-2]), tuple(ids[-2:]), Span(3, 6), Span(4, 6))
    with pytest.raises(LccpError) as caught:
        score_cases(load_model(tmp_path), [case], select_metrics(["retrieval"]))
    message = str(caught.value)
    assert refusal.message in message
    assert "\n" not in message


def test_a_flash_kernel_is_not_trusted_to_choose_keys():
    attention = tiny_model(named("deepseek_v32")).model.layers[1].self_attn
    tap = _Tap(rows=None, sink=print, kernel="flash_attention_2")
    with pytest.raises(LccpError, match="lets kernel 'flash_attention_2' choose keys by indices"):
        _layer(attention, torch.zeros(1, 4, N_TOKENS, 8), tap, indices=torch.zeros(1, N_TOKENS, 8))


def test_a_layer_may_be_run_again_in_the_next_pass_only():
    model, layers = tiny_model(named("llama")), []
    with tap_rows(model, torch.tensor([0]), lambda layer, weights: layers.append(layer)):
        model(prompts())
        model(prompts())
    assert layers == [0, 1, 2, 3] * 2
    assert not model.base_model._forward_pre_hooks
