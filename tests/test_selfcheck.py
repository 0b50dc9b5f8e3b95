"""The self-check passes what is sound, names layer and head of what is not, and puts everything back."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoConfig, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from lccp_interp.capture import rows as tap
from lccp_interp.capture.architectures import named, tiny_model
from lccp_interp.capture.model import HookedModel, load_model, read_architecture
from lccp_interp.capture.selfcheck import random_model, self_check
from lccp_interp.capture.verdict import Finding, SelfCheck
from lccp_interp.checkpoints import verify_folder
from lccp_interp.schema import LccpError

TINY = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def hooked(model_type="llama", *, dtype=torch.float32, **changes):
    model = tiny_model(named(model_type), **changes).to(dtype)
    return HookedModel(model=model, tokenizer=None, name=model_type)


def failed(checked):
    """Findings that failed, by name."""
    return {finding.name: finding for finding in checked.findings if not finding.passed}


@pytest.fixture
def model():
    return hooked()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = ALL_ATTENTION_FUNCTIONS[tap.TAP_NAME]
    yield
    assert ALL_ATTENTION_FUNCTIONS[tap.TAP_NAME] is before


# Grouped queries; soft-cap; window; sinks; latent keys; linear layers between; learned positions.
SOUND = ("llama", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "gpt2", "hunyuan_v1_moe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", SOUND)
def test_sound_models_pass(model_type, dtype):
    model = hooked(model_type, dtype=dtype)
    kernel = model.model.config._attn_implementation
    checked = self_check(model)
    assert failed(checked) == {}
    assert checked.passed
    assert checked.require() is checked
    assert [finding.name for finding in checked.findings] == [
        "logits are finite", "logits stay as they are", "rows sum to 1", "rows see no future", "rows equal eager",
        "rows make the output", "output feeds the logits",
    ]  # fmt: skip
    assert checked.attention_layers == ((1, 3) if model_type == "qwen3_next" else (0, 1, 2, 3))
    assert checked.n_layers == 4
    assert checked.kernel == model.model.config._attn_implementation == kernel
    assert checked.shares_prefixes == (model_type != "qwen3_next")
    if dtype is torch.float32:
        assert all(finding.limit <= 1e-5 for finding in checked.findings if finding.name.startswith("rows"))
    assert not model.model.get_input_embeddings()._forward_hooks
    assert json.loads(json.dumps(checked.as_record(), allow_nan=False))["passed"] is True


def test_the_prompt_is_seeded(model):
    assert self_check(model, seed=3) == self_check(model, seed=3) != self_check(model, seed=4)


def test_a_model_with_few_positions_gets_a_short_prompt():
    assert self_check(hooked("gpt2", n_positions=16)).passed


def test_every_one_of_many_layers_is_silenced():
    model = hooked(num_hidden_layers=19)
    assert self_check(model).passed
    with torch.no_grad():
        model.model.model.layers[18].self_attn.o_proj.weight.zero_()
    finding = failed(self_check(model))["output feeds the logits"]
    assert (finding.layer, finding.head, finding.error) == (18, None, 0.0)


def test_without_logits_to_keep(model, monkeypatch):
    forward = model.model.forward

    def narrow(input_ids, past_key_values=None, use_cache=None, output_attentions=False):
        return forward(
            input_ids, past_key_values=past_key_values, use_cache=use_cache, output_attentions=output_attentions
        )

    monkeypatch.setattr(model.model, "forward", narrow)
    assert self_check(model).passed


def test_offloaded_weights(model):
    accelerate = pytest.importorskip("accelerate")
    here = self_check(model)
    away = HookedModel(accelerate.cpu_offload(model.model, torch.device("cpu")), None, "llama")
    assert next(away.model.parameters()).device.type == "meta"
    assert self_check(away).passed
    assert self_check(away) == here


def test_what_cannot_be_checked(model):
    with pytest.raises(LccpError, match="prompt of 8 tokens or more, got n_tokens=7"):
        self_check(model, n_tokens=7)
    with pytest.raises(LccpError, match=r"llama runs in float64; .* --dtype float32"):
        self_check(hooked(dtype=torch.float64))
    with pytest.raises(
        LccpError, match=r"checkpoint diffllama fails on a prompt of 48 random tokens: .* more than once"
    ):
        self_check(HookedModel(tiny_model(refused("diffllama")), None, "diffllama"))
    with pytest.raises(LccpError, match=r"checkpoint mamba \(MambaForCausalLM\) has no attention layer"):
        self_check(HookedModel(tiny_model(refused("mamba")), None, "mamba"))


def refused(model_type):
    from lccp_interp.capture.architectures import REFUSED

    return next(row.architecture for row in REFUSED if row.architecture.model_type == model_type)


# --- It fails when it should, and says where -------------------------------------------------------------------------


def test_broken_weights_are_named(model):
    attention = model.model.model.layers[2].self_attn
    with torch.no_grad():
        attention.q_proj.weight[3 * attention.head_dim] = torch.nan  # head 3
    checked = self_check(model)
    (finding,) = checked.findings
    assert (finding.layer, finding.head, finding.passed) == (2, 3, False)
    assert not checked.shares_prefixes
    with pytest.raises(
        LccpError, match=r"at layer 2, head 3: .* logits are NaN .*layers\.2\.self_attn\.q_proj\.weight"
    ):
        checked.require()
    assert json.loads(json.dumps(checked.as_record(), allow_nan=False))["findings"][0]["error"] is None


def test_broken_values_are_named(model):
    attention = model.model.model.layers[1].self_attn
    with torch.no_grad():
        attention.v_proj.weight[attention.head_dim] = torch.inf  # key-value head 1: query heads 2 and 3
    (finding,) = self_check(model).findings
    assert (finding.layer, finding.head) == (1, 2)
    assert "model.layers.1.self_attn.v_proj.weight holds NaN or infinite numbers" in finding.text


def test_an_overflow_asks_for_another_dtype():
    model = hooked(dtype=torch.float16)
    with torch.no_grad():
        model.model.lm_head.weight.fill_(60000)
    (finding,) = self_check(model).findings
    assert "float16 overflows; try --dtype float32" in finding.text
    assert finding.where == ""


@pytest.fixture
def break_eager(monkeypatch):
    """Function (change of weights `[batch, head, query, key]`, layer): Llama's eager attention with it in one layer."""
    sound = modeling_llama.eager_attention_forward

    def install(change, layer=1):
        def broken(module, query, key, value, attention_mask, **kwargs):
            output, weights = sound(module, query, key, value, attention_mask, **kwargs)
            if module.layer_idx == layer:
                weights = change(weights)
            return output, weights

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", broken)

    return install


def test_rows_that_do_not_sum_to_1(model, break_eager):
    def halve(weights):
        weights[:, 2] /= 2
        return weights

    break_eager(halve)
    checked = self_check(model)
    finding = failed(checked)["rows sum to 1"]
    assert (finding.layer, finding.head) == (1, 2)
    assert finding.error == pytest.approx(0.5, abs=1e-5)
    with pytest.raises(
        LccpError,
        match=r"^checkpoint llama fails its self-check \(rows sum to 1\) at layer 1, head 2: rows do not sum to 1: .*"
        r"cannot be captured \[error 0\.5, limit 1e-05; float32, sdpa\]$",
    ):
        checked.require()


def test_rows_that_are_not_the_kernels(model, break_eager):
    def sharpen(weights):
        weights[:, 3] = weights[:, 3].square() / weights[:, 3].square().sum(-1, keepdim=True)
        return weights

    break_eager(sharpen, layer=3)
    findings = failed(self_check(model))
    assert set(findings) == {"rows make the output"}
    assert (findings["rows make the output"].layer, findings["rows make the output"].head) == (3, 3)


def test_a_kernel_that_swaps_heads(model, monkeypatch):
    sound = tap._sdpa_output

    def swapped(module, *args, **kwargs):
        output = sound(module, *args, **kwargs)
        return output[:, :, [1, 0, 2, 3]] if module.layer_idx == 2 else output

    monkeypatch.setattr(tap, "_sdpa_output", swapped)
    findings = failed(self_check(model))
    assert findings["rows make the output"].layer == 2
    assert findings["rows make the output"].head in (0, 1)
    assert "logits stay as they are" in findings


def test_rows_of_another_head_than_eager_reports(model, monkeypatch):
    sound = tap.eager_function

    def shuffled(module):
        def function(*args, **kwargs):
            output, weights = sound(module)(*args, **kwargs)
            return output, weights.flip(1) if module.layer_idx == 1 else weights

        return function

    monkeypatch.setattr(tap, "eager_function", shuffled)
    findings = failed(self_check(model))
    assert set(findings) == {"rows equal eager", "rows make the output"}
    assert findings["rows equal eager"].layer == 1
    assert findings["rows equal eager"].head is not None


def test_rows_that_see_the_future(model, monkeypatch):
    monkeypatch.setattr(
        tap, "_rows_mask", lambda mask, rows, query, key, *_: torch.zeros(1, 1, len(rows), key.shape[2])
    )
    finding = failed(self_check(model))["rows see no future"]
    assert finding.layer is not None
    assert finding.head is not None


def test_an_attention_whose_output_is_not_used(model):
    def ignore(module, inputs, output):
        return torch.zeros_like(output[0]), output[1]

    model.model.model.layers[1].self_attn.register_forward_hook(ignore)
    checked = self_check(model)
    finding = failed(checked)["output feeds the logits"]
    assert (finding.layer, finding.error) == (1, 0.0)
    with pytest.raises(
        LccpError, match=r"\(output feeds the logits\) at layer 1: silencing .* \[error 0, at least 1e-06"
    ):
        checked.require()


def test_a_model_that_hides_its_maps(model, monkeypatch):
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda output_attentions=False, **inputs: forward(**inputs))
    finding = failed(self_check(model))["rows equal eager"]
    assert "reports 0 layers of attention, the tap 4" in finding.text


def test_all_is_put_back_after_an_exception(model, monkeypatch):
    forward, calls = model.model.forward, []

    def fail_in_eager(*args, **kwargs):
        calls.append(model.model.config._attn_implementation)
        if "output_attentions" in kwargs:
            raise RuntimeError("no more")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", fail_in_eager)
    with pytest.raises(RuntimeError, match="no more"):
        self_check(model)
    assert calls[-1] == "eager"
    assert model.model.config._attn_implementation == "sdpa"
    assert not model.model.get_input_embeddings()._forward_hooks


# --- Prompts in pieces -----------------------------------------------------------------------------------------------


def test_states_keep_prompts_whole():
    checked = self_check(hooked("qwen3_next"))
    assert (checked.passed, checked.shares_prefixes) == (True, False)
    assert checked.sharing == "its linear_attention layers carry a state that cannot be cropped"


def test_a_cache_that_is_not_cropped(model, monkeypatch):
    monkeypatch.setattr(DynamicCache, "crop", lambda self, tokens_to_remove: None)
    checked = self_check(model)
    assert (checked.passed, checked.shares_prefixes) == (True, False)


def test_a_cache_that_forgets(model, monkeypatch):
    sound = DynamicCache.update

    def forgetful(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = sound(self, key_states, value_states, layer_idx, *args, **kwargs)
        return keys, torch.zeros_like(values) if layer_idx == 1 and keys.shape[2] > key_states.shape[2] else values

    monkeypatch.setattr(DynamicCache, "update", forgetful)
    checked = self_check(model)
    assert not checked.shares_prefixes
    assert re.match(r"a prompt run in two pieces gives other numbers \(by [\d.]+, limit 0\.0001\)", checked.sharing)


# --- Architectures from a bare config, and refusals before any weights are read --------------------------------------


def bare(folder, model_type, **settings):
    AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return folder


MOE = {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 24}


def test_a_bare_config_is_checked_with_random_weights(tmp_path):
    folder = bare(tmp_path / "moe", "hunyuan_v1_moe", **TINY, **MOE)
    before = torch.random.get_rng_state()
    model, again, other = (random_model(folder, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    checked = self_check(model)
    assert checked.passed
    assert (checked.checkpoint, checked.dtype) == ("moe", "float32")
    assert checked == self_check(again) != self_check(other)
    assert random_model(folder, dtype="bfloat16").dtype == "bfloat16"


def test_a_config_of_a_large_model_is_not_built(tmp_path):
    with pytest.raises(LccpError, match=r"asks for 6,738M parameters, random weights are made up to 200M; make num_"):
        random_model(bare(tmp_path, "llama"))
    with pytest.raises(LccpError, match=r"gives no model: .*; look at its config\.json"):
        random_model(bare(tmp_path, "llama", **{**TINY, "hidden_act": "nonsense"}))


REFUSED_BY_CONFIG = [
    ("t5", r"is an encoder-decoder \(t5\), .*give a decoder such as Llama, Qwen or HunYuan$"),
    ("vit", r"is no text decoder: transformers has no causal language model of type 'vit'; give a decoder"),
    ("bert", r"is an encoder \(model_type 'bert'\), which attends in both directions; give a decoder"),
    ("mamba", r"is a state-space or recurrent model \(mamba\) and has no attention layers, only linear_attention: .*"),
    ("bloom", r"\(BloomForCausalLM\) does not route attention through transformers' AttentionInterface: .*; give a"),
]


@pytest.mark.parametrize(("model_type", "message"), REFUSED_BY_CONFIG)
def test_refused_before_weights_or_tokenizer_are_looked_for(tmp_path, model_type, message):
    folder = bare(tmp_path, model_type)
    for load in (read_architecture, load_model, random_model):
        with pytest.raises(LccpError, match=message) as caught:
            load(folder)
        assert str(caught.value).startswith(f"checkpoint {tmp_path} ")
        assert "\n" not in str(caught.value)


def test_a_bert_that_decodes_is_no_encoder(tmp_path):
    assert read_architecture(bare(tmp_path, "bert", is_decoder=True)).is_decoder


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(LccpError, match=r"brings modelling code of its own .*, which is not run unless asked for"):
        load_model(tmp_path)


def test_missing_shards_are_named(checkpoint, tmp_path):
    folder = tmp_path / "sharded"
    load_model(checkpoint).model.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    shutil.copy(checkpoint / "tokenizer.json", folder)
    verify_folder(folder)
    shards[1].unlink()
    message = f"lacks 1 of {len(shards)} weight shards: {shards[1].name}"
    with pytest.raises(LccpError, match=message):
        load_model(folder)


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lccp_check(lccp):
    return partial(lccp, "check")


@pytest.fixture
def mixed(trajectory, tmp_path):
    """A folder of three checkpoints, the first sound, the second with NaN, the third cut short."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "mixed"
    for name in ("pretrain-0", "lccp-1", "lccp-2"):
        shutil.copytree(trajectory / name, folder / name)
    file = folder / "lccp-1" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.k_proj.weight"].fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    file = folder / "lccp-2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def test_check_prints_a_table(lccp_check, checkpoint):
    code, out, err = lccp_check(checkpoint)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "tokens-1M: passed (float32 over sdpa, attention in 3 of 3 layers)"
    assert lines[1].split() == ["check", "worst", "limit", "where", "verdict"]
    assert sum(line.rstrip().endswith(" ok") for line in lines) == 7
    assert "prompts are run once where they share a beginning: " in out


def test_check_of_a_folder_tells_all_and_exits_with_2(lccp_check, mixed):
    code, out, err = lccp_check(mixed)
    assert code == 2
    assert out.count("passed") == 1
    assert "lccp-1: 1 of 1 checks FAILED" in out
    first, second, last = err.splitlines()
    assert first.startswith("lccp: checkpoint lccp-1 fails its self-check (logits are finite) at layer 1, head 0: ")
    assert "truncated or damaged" in second
    assert last == "lccp: 2 of 3 checkpoints fail"


def test_check_for_scripts(lccp_check, mixed):
    code, out, _ = lccp_check(mixed, "--format", "json")
    records = {record["checkpoint"]: record for record in json.loads(out)}
    assert code == 2
    assert {name: record["passed"] for name, record in records.items()} == {
        "pretrain-0": True, "lccp-1": False, "lccp-2": False,
    }  # fmt: skip
    assert records["pretrain-0"]["error"] is None
    assert len(records["pretrain-0"]["findings"]) == 7
    assert records["pretrain-0"]["shares_prefixes"] is True
    assert "truncated" in records["lccp-2"]["error"]
    _, out, _ = lccp_check(mixed, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["check"] for row in rows if row["passed"] == "False"] == ["logits are finite", "load"]
    assert len(rows) == 7 + 1 + 1


def test_check_of_a_bare_config(lccp_check, tmp_path):
    folder = bare(tmp_path / "moe", "hunyuan_v1_moe", **TINY, **MOE)
    code, out, _ = lccp_check(folder, "--random", "--dtype", "bfloat16")
    assert code == 0
    assert out.startswith("moe: passed (bfloat16 over sdpa, attention in 3 of 3 layers)")
    code, _, err = lccp_check(folder)
    assert code == 2
    assert "has no weights" in err


def test_check_of_nothing(lccp_check, tmp_path):
    code, _, err = lccp_check(tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds no checkpoint" in err
    code, _, err = lccp_check(tmp_path / "gone")
    assert code == 2
    assert err.startswith("lccp: no checkpoint folder at ")


def test_a_folder_given_as_a_dot_has_its_name(lccp_check, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    assert lccp_check(".")[1].startswith("tokens-1M: passed")


def test_the_table_rounds_and_marks():
    finding = Finding("output feeds the logits", False, 0.0, 1e-6, 3, None, "it does not", at_least=True)
    checked = SelfCheck("step-1", "float32", "sdpa", 4, (0, 3), (finding,), True, "yes")
    assert checked.rows() == [
        {"check": "output feeds the logits", "worst": "0", "limit": "> 1.0e-06", "where": "layer 3",
         "verdict": "FAILED"}
    ]  # fmt: skip
    assert checked.summary() == "step-1: 1 of 1 checks FAILED (float32 over sdpa, attention in 2 of 4 layers)"


def test_a_model_type_of_the_table_needs_no_config_at_all():
    model = random_model("hunyuan_v1_moe", dtype="bfloat16")
    assert (model.name, model.dtype) == ("tiny random HunYuan v1 MoE (Hunyuan-A13B)", "bfloat16")
    assert self_check(random_model("gpt_oss")).passed
    with pytest.raises(LccpError, match="no checkpoint folder at hunyuan_v9"):
        random_model("hunyuan_v9")
