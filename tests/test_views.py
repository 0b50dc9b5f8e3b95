"""Three views of one model: the same weights, the same attention, the same scores, and nothing done to the model."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import tiny_model

from lccp_interp.capture import views
from lccp_interp.capture.model import HookedModel, load_model
from lccp_interp.schema import Case, LccpError, Span
from lccp_interp.scoring.engine import score_cases
from lccp_interp.scoring.metrics import METRICS
from lccp_interp.store import Run
from lccp_interp.sweep import score

OTHERS = ("transformer_lens", "nnsight")
# TransformerLens reads the number of key heads also where the architecture has no such setting.
FAMILIES = {"llama": {}, "qwen3": {}, "gpt_neox": {"num_key_value_heads": 4}, "hunyuan_v1_moe": {}}


def hooked(model_type, tokenizer, **changes) -> HookedModel:
    return HookedModel(tiny_model(model_type, **changes), tokenizer, f"tiny-{model_type}")


@pytest.fixture(scope="module")
def family(tokenizer):
    """Function from a model type to its model, made once; do not change it."""
    made = {}

    def get(model_type):
        if model_type not in made:
            made[model_type] = hooked(model_type, tokenizer, **FAMILIES[model_type])
        return made[model_type]

    return get


@pytest.fixture
def llama(tokenizer):
    """A model of one's own."""
    return hooked("llama", tokenizer)


def prompt(batch=2, n_tokens=40):
    return torch.randint(0, 600, (batch, n_tokens), generator=torch.Generator().manual_seed(1))


def logits_of(model, backend):
    return model.answer_logits(prompt(), 5, lambda layer, weights: None, backend=backend)


# The same attention


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_rows_and_logits_are_the_same(family, model_type, backend):
    model = family(model_type)
    own = model.attention_rows(prompt(), [0, 7, 39])
    seen = model.attention_rows(prompt(), [0, 7, -1], backend=backend)
    assert list(seen) == list(own) == [0, 1, 2]
    for layer, rows in own.items():
        assert rows.shape == seen[layer].shape == (2, 4, 3, 40)
        assert seen[layer].dtype == torch.float32
        torch.testing.assert_close(seen[layer], rows, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_of(model, backend), logits_of(model, "transformers"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", OTHERS)
def test_a_sliding_window_shorter_than_the_prompt_is_kept(tokenizer, backend):
    model = hooked("mistral", tokenizer)
    own, seen = model.attention_rows(prompt(), [39]), model.attention_rows(prompt(), [39], backend=backend)
    assert (own[1][..., : 40 - 16] == 0).all()
    for layer, rows in own.items():
        torch.testing.assert_close(seen[layer], rows, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", OTHERS)
def test_layers_keep_their_true_index_beside_layers_without_attention(tokenizer, backend):
    model = hooked("lfm2", tokenizer, layer_types=["conv", "full_attention", "conv"])
    own, seen = model.attention_rows(prompt(), [39]), model.attention_rows(prompt(), [39], backend=backend)
    assert list(own) == list(seen) == [1]
    torch.testing.assert_close(seen[1], own[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", OTHERS)
def test_half_precision_is_read_too(tokenizer, backend):
    model = HookedModel(tiny_model("llama").to(torch.bfloat16), tokenizer, "half")
    own, seen = model.attention_rows(prompt(), [39]), model.attention_rows(prompt(), [39], backend=backend)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], own[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("backend", OTHERS)
def test_padding_tokens_in_a_prompt_are_tokens(tokenizer, backend):
    """Ids are what they are, also the one that the library's tokenizer pads with."""
    model = hooked("llama", tokenizer)
    ids = prompt()
    ids[:, :6] = ids[:, -3:] = tokenizer.pad_token_id or 0
    own, seen = model.attention_rows(ids, [-1]), model.attention_rows(ids, [-1], backend=backend)
    assert own[0][..., :6].min() > 0
    torch.testing.assert_close(seen[2], own[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", [*FAMILIES, "deepseek_v3"])
def test_values_are_the_same(tokenizer, model_type):
    """What attention is a weighted mean of; TransformerLens shows latent attention's in a layout of its own."""
    model = hooked(model_type, tokenizer, **FAMILIES.get(model_type, {}))
    told = {}
    for backend in views.BACKENDS:
        order, values = [], {}

        def keep(layer, value, order=order, values=values):
            assert order[-1] == layer
            values[layer] = value.clone()

        model.answer_logits(
            prompt(), 5, lambda layer, _, order=order: order.append(layer), backend=backend, values=keep
        )
        told[backend] = values
    for backend in OTHERS:
        assert sorted(told[backend]) == [0, 1, 2]
        for layer, values in told["transformers"].items():
            assert values.shape[2] == 39
            torch.testing.assert_close(told[backend][layer], values, atol=1e-5, rtol=1e-5)


# The same scores


def cases(n=6):
    """Answers that copy a long source out of four different tokens, so that random heads hit them now and then."""
    generator = np.random.default_rng(0)
    made = []
    for index in range(n):
        length = int(generator.choice([50, 64]))
        ids = [int(token) for token in generator.integers(600, 604, size=length)]
        n_answer = int(generator.integers(4, 9))
        start = int(generator.integers(5, length - 2 * n_answer - 12))
        ids[length - n_answer :] = ids[start : start + n_answer]
        made.append(
            Case(
                case_id=f"c{index}",
                task="niah",
                length=length,
                depth_fraction=0.5,
                needle_id="n0",
                haystack_id="h0",
                sample=0,
                seed=0,
                prompt_ids=tuple(ids[: length - n_answer]),
                answer_ids=tuple(ids[length - n_answer :]),
                needle=Span(start - 5, start + n_answer + 5),
                source=Span(start, start + n_answer),
                question=Span(length - n_answer - 5, length - n_answer - 1),
            )
        )
    return made


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_metric_is_the_same(family, model_type, backend):
    model = family(model_type)
    own = score_cases(model, cases(), METRICS)
    seen = score_cases(model, cases(), METRICS, backend=backend, batch_tokens=150)
    for name in own[0].scores:
        values = np.stack([result.scores[name] for result in own])
        assert np.nanmax(np.abs(values)) > 0, f"{name}: nothing to compare"
        # Logits (locos, dla) are sums that may be large; the others are at most a few units.
        np.testing.assert_allclose(np.stack([result.scores[name] for result in seen]), values, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(own, seen, strict=True):
        assert (mine.case_id, mine.layers, mine.greedy_ids) == (theirs.case_id, theirs.layers, theirs.greedy_ids)
        np.testing.assert_allclose(theirs.answer_loss_nats, mine.answer_loss_nats, atol=1e-5)


def test_progress_counts_every_token_through_a_view(family):
    seen = []
    score_cases(family("llama"), cases(), METRICS, backend="nnsight", on_tokens=seen.append)
    assert sum(seen) == sum(case.length for case in cases())


def test_out_of_memory_a_view_goes_on_case_by_case_and_then_says_so(llama):
    limit = 2

    class Small(HookedModel):
        def answer_logits(self, input_ids, n_answer, sink, *, backend="transformers", values=None):
            if len(input_ids) >= limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().answer_logits(input_ids, n_answer, sink, backend=backend, values=values)

    small = Small(llama.model, llama.tokenizer, "small")
    expected = score_cases(llama, cases(), METRICS)
    for mine, theirs in zip(expected, score_cases(small, cases(), METRICS, backend="nnsight"), strict=True):
        np.testing.assert_allclose(theirs.scores["needle_mass"], mine.scores["needle_mass"], atol=1e-5)
    limit = 1
    with pytest.raises(
        LccpError,
        match=r"checkpoint small: out of memory on \d+ tokens through nnsight, which runs every prompt whole; use",
    ):
        score_cases(small, cases(), METRICS, backend="nnsight")


# The same weights, and the model as it was


def storages(*modules):
    tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_weight_is_copied(family, model_type):
    model = family(model_type)
    bridged, traced = model.bridge.original_model, model.nnsight._module
    own = {parameter.data_ptr() for parameter in model.model.parameters()}
    assert storages(traced) == storages(model.model)
    assert {parameter.data_ptr() for parameter in traced.parameters()} == own
    # TransformerLens gives an unembedding without a bias one of zeros, and splits what is one projection.
    allowed = 4 * model.model.config.vocab_size
    joint = [parameter for name, parameter in model.model.named_parameters() if "query_key_value" in name]
    allowed += sum(parameter.nbytes for parameter in joint)
    beyond = {address: size for address, size in storages(bridged).items() if address not in storages(model.model)}
    assert sum(beyond.values()) <= allowed
    assert own - {parameter.data_ptr() for parameter in joint} <= {item.data_ptr() for item in bridged.parameters()}
    # Modules are not shared: wrapping one leaves the model's alone.
    assert not set(model.model.modules()) & set(chain(bridged.modules(), traced.modules()))


def test_views_are_opened_once(llama):
    assert llama.bridge is llama.bridge
    assert llama.nnsight is llama.nnsight
    assert "bridge" not in dataclasses.replace(llama).__dict__


def test_an_edited_weight_is_edited_everywhere(llama):
    before = {backend: llama.attention_rows(prompt(), [39], backend=backend)[2] for backend in views.BACKENDS}
    with torch.no_grad():
        llama.model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    after = {backend: llama.attention_rows(prompt(), [39], backend=backend)[2] for backend in views.BACKENDS}
    for backend in views.BACKENDS:
        assert (after[backend] - before[backend]).abs().max() > 1e-2
        torch.testing.assert_close(after[backend], after["transformers"], atol=1e-5, rtol=0)


def test_gradients_arrive_at_the_models_weights_after_scoring_through_a_view(llama):
    score_cases(llama, cases(2), METRICS, backend="transformer_lens")
    llama.bridge(prompt(), return_type="loss").backward()
    assert llama.model.model.layers[1].self_attn.v_proj.weight.grad.abs().max() > 0


def test_folding_norms_in_the_bridge_leaves_the_models_weights(llama):
    before = {name: parameter.clone() for name, parameter in llama.model.named_parameters()}
    llama.bridge.enable_compatibility_mode()
    assert llama.bridge.blocks[0].ln1.weight.eq(1).all()
    for name, parameter in llama.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_weights_go_with_the_model_that_had_views(tokenizer):
    """A sweep holds one checkpoint at a time."""
    model = hooked("llama", tokenizer)
    for backend in OTHERS:
        logits_of(model, backend)
    weight = weakref.ref(model.model.lm_head.weight)
    del model
    gc.collect()
    assert weight() is None


class Stop(Exception):
    pass


def fingerprint(model):
    """All of a model that a library might change by hooking it."""
    kinds = [(name, type(module), module.forward) for name, module in model.model.named_modules()]
    hooks = [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in model.model.modules()]
    tokens = (model.tokenizer.padding_side, model.tokenizer.pad_token, model.tokenizer.eos_token, len(model.tokenizer))
    return kinds, hooks, model.model.config.to_dict(), model.model.config._attn_implementation, tokens


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("backend", OTHERS)
def test_the_model_is_left_as_it_was(llama, backend, implementation):
    llama.model.set_attn_implementation(implementation)
    before, rows, output = fingerprint(llama), llama.attention_rows(prompt(), [39]), llama.forward(prompt(), 5).logits
    seen = llama.attention_rows(prompt(), [39], backend=backend)

    def stop(layer, weights):
        if layer == 1:
            raise Stop

    with pytest.raises(Stop):
        llama.answer_logits(prompt(), 5, stop, backend=backend)
    assert fingerprint(llama) == before
    assert llama.model.config._attn_implementation == implementation
    assert torch.equal(llama.forward(prompt(), 5).logits, output)
    for layer, again in llama.attention_rows(prompt(), [39]).items():
        assert torch.equal(again, rows[layer])
    # Nor does the pass that stopped leave anything in the view.
    for layer, again in llama.attention_rows(prompt(), [39], backend=backend).items():
        assert torch.equal(again, seen[layer])


# Text


def test_text_goes_through_the_views_of_a_tokenizer_without_special_tokens(checkpoint):
    model = load_model(checkpoint)
    texts = ["Question: who?", "Question: who? Answer: who"]
    short, long = (model.tokenizer(text, return_tensors="pt").input_ids for text in texts)
    patterns = model.attention_rows(long, range(long.shape[1]))
    _, cache = model.bridge.run_with_cache(texts[1])
    torch.testing.assert_close(cache["blocks.2.attn.hook_pattern"], patterns[2], atol=1e-5, rtol=0)
    with model.nnsight.trace(texts[1]):
        pattern = model.nnsight.model.layers[2].self_attn.output[1].save()
    torch.testing.assert_close(pattern, patterns[2], atol=1e-5, rtol=0)
    # In a batch the shorter text is padded with a token of the vocabulary, which changes nothing.
    expected = model.forward(short, 1).logits[0, -1]
    with model.nnsight.trace(texts) as tracer:
        logits = tracer.result.logits.save()
    torch.testing.assert_close(logits[0, -1], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.bridge(texts)[0, short.shape[1] - 1], expected, atol=1e-4, rtol=0)


# What is refused


def test_a_model_type_that_transformer_lens_does_not_know_is_refused_by_name(tokenizer):
    model = hooked("helium", tokenizer)
    with pytest.raises(
        LccpError,
        match=r"checkpoint tiny-helium: TransformerLens does not support model type 'helium' \(HeliumForCausalLM\): "
        r"it has no adapter for it; use backend 'transformers' or 'nnsight'$",
    ):
        score_cases(model, cases(1), METRICS, backend="transformer_lens")
    own, seen = model.attention_rows(prompt(), [39]), model.attention_rows(prompt(), [39], backend="nnsight")
    torch.testing.assert_close(seen[2], own[2], atol=1e-5, rtol=0)


def test_a_model_that_transformer_lens_fails_on_is_refused_by_name(tokenizer):
    with pytest.raises(LccpError, match=r"TransformerLens does not support model type 'granitemoehybrid' .* it fails"):
        _ = hooked("granitemoehybrid", tokenizer, layer_types=["full_attention"] * 3).bridge


def test_nnsight_needs_to_be_told_where_attention_comes_out(llama, monkeypatch):
    monkeypatch.setattr(type(llama.model), "_can_record_outputs", {})
    monkeypatch.setattr(type(llama.model.model), "_can_record_outputs", {})
    with pytest.raises(
        LccpError,
        match=r"nnsight does not support model type 'llama' .*does not say which of its modules give attention "
        r"weights; use backend 'transformers'$",
    ):
        _ = llama.nnsight


def test_nnsight_on_another_kernel_than_eager_is_an_error_and_not_none(llama):
    llama.nnsight._module.set_attn_implementation("sdpa")
    with pytest.raises(LccpError, match="nnsight sees no attention weights in layer 0: its view runs 'sdpa' attention"):
        llama.attention_rows(prompt(), [39], backend="nnsight")
    assert llama.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows * 1.01, r"its attention is off by .* \(limit 0.001\) in layer 0"),
        (lambda rows: rows * torch.nan, r"its attention is off by nan"),
        (lambda rows: rows.no_such_method, "it fails with AttributeError: .*no_such_method"),
    ],
)
def test_a_view_that_reports_other_attention_is_refused(llama, change, message):
    def read(ids, rows, n_logits, sink):
        for layer, weights in llama.attention_rows(ids, rows.tolist()).items():
            sink(layer, change(weights))

    with pytest.raises(LccpError, match=f"nnsight does not support model type 'llama' .*: {message}.*; use backend"):
        views.prove(llama, "nnsight", read)


def test_a_view_that_leaves_out_layers_is_refused(llama):
    def read(ids, rows, n_logits, sink):
        sink(1, llama.attention_rows(ids, rows.tolist())[1])

    with pytest.raises(LccpError, match=r"it reports layers \[1\] where attention is in \[0, 1, 2\]"):
        views.prove(llama, "transformer_lens", read)


def test_a_view_that_shows_other_values_is_refused(llama, monkeypatch):
    def read(ids, rows, n_logits, sink, *, values=None):
        llama.answer_logits(torch.cat([ids, ids[:, :1]], 1), 1, sink, values=lambda layer, value: values(layer, -value))

    monkeypatch.setattr(views, "row_reader", lambda model, backend: read)
    with pytest.raises(LccpError, match=r"nnsight does not .* it shows other values in layer 0; leave out the metrics"):
        score_cases(llama, cases(1), METRICS, backend="nnsight")
    monkeypatch.setattr(views, "row_reader", lambda model, backend: {}.__getitem__)
    with pytest.raises(LccpError, match=r"nnsight does not .* its values are not found \(TypeError: .*leave out"):
        score_cases(llama, cases(1), METRICS, backend="nnsight")


def test_offloaded_weights_are_not_shared(llama):
    llama.model.lm_head.to("meta")
    with pytest.raises(LccpError, match=r"checkpoint tiny-llama is offloaded in part: .*use backend 'transformers'"):
        views.share_weights(llama)


def test_an_unknown_backend_lists_the_known_and_suggests(llama):
    message = r"unknown backend 'transformerlens'; known: transformers, .*; did you mean 'transformer_lens'\?"
    with pytest.raises(LccpError, match=message):
        score_cases(llama, cases(1), METRICS, backend="transformerlens")
    with pytest.raises(LccpError, match=message):
        llama.attention_rows(prompt(), [1], backend="transformerlens")


# In runs


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for backend in views.BACKENDS:
        score([checkpoint], root / backend, lengths=[96], depths=[0, 100], samples=1, backend=backend)
    return root


def test_a_run_says_by_which_backend_and_has_the_same_scores(runs):
    keys = ["case_id", "metric", "layer", "head"]
    tables = {}
    for backend in views.BACKENDS:
        run = Run.open(runs / backend)
        assert run.config["backend"] == backend
        tables[backend] = run.scores.collect().sort(keys)
    for backend in OTHERS:
        assert tables[backend].select(keys).equals(tables["transformers"].select(keys))
        np.testing.assert_allclose(tables[backend]["value"], tables["transformers"]["value"], atol=1e-5)


def test_another_backend_is_another_study(runs, checkpoint):
    with pytest.raises(LccpError, match="holds another study: backend differ"):
        score([checkpoint], runs / "nnsight", lengths=[96], depths=[0, 100], samples=1)


def test_what_other_libraries_do_not_do_is_refused_before_anything_is_written(checkpoint, tmp_path):
    for options, message in (
        ({"mode": "generate"}, "backend 'nnsight' scores --mode teacher_forced only, got 'generate'; use backend"),
        ({"sharing": "on"}, "nnsight runs every prompt whole; leave out --sharing on, or use backend 'transformers'"),
    ):
        with pytest.raises(LccpError, match=message):
            score([checkpoint], tmp_path / "run", lengths=[96], backend="nnsight", **options)
    assert not (tmp_path / "run").exists()


def test_the_command_line_passes_the_backend_on(checkpoint, tmp_path, lccp):
    lccp = partial(lccp, "score", checkpoint, "--out", tmp_path / "run")
    code, _, err = lccp("--backend", "lens")
    assert code == 2
    assert "unknown backend 'lens'; known: transformers, transformer_lens, nnsight" in err
    code, _, _ = lccp("--lengths", "96", "--depths", "0", "--samples", "1", "--backend", "nnsight")
    assert code == 0
    assert Run.open(tmp_path / "run").config["backend"] == "nnsight"
