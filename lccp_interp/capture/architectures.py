"""Which architectures can be captured, as data: the tests run this table and the documentation is written from it.

Capture has no code per family. What differs between them is what a config says (windows, soft-caps, sinks, latent
keys, layers without attention), so one row here is a model type with the few settings that make a tiny random model of
it. Every row of `ARCHITECTURES` is held against eager attention, with padding, behind caches and in half precision;
every row of `REFUSED` is held to its message. This module knows how to build such models; it refuses to know how they
are captured. Cost: importing it loads no torch, a tiny model takes some milliseconds.

    python -m lccp_interp.capture.architectures > docs/architectures.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 700
WINDOW = 16
"""Tokens of the tiny models' sliding windows and chunks: short, so that short prompts reach beyond them."""

WEIGHT_STD = 0.17
"""Of the random weights: large enough that attention is uneven, small enough that float32 noise stays below 1e-5."""

QUIETER_STD = 0.12
"""Where that noise is larger: squared activations, recurrent states, norms without limits."""

COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 8192,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Settings of every tiny model; a config that does not know one keeps it without effect."""


@dataclass(frozen=True)
class Architecture:
    """One model type, and how to make a tiny model of it.

    Attributes:
        model_type: as in `config.json`.
        title: the name by which people know it.
        changes: config settings that differ from `COMMON`.
        notable: what capture has to get right here, or leaves out.
        weight_std: of the random weights.
    """

    model_type: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    notable: str = ""
    weight_std: float = WEIGHT_STD


@dataclass(frozen=True)
class Refusal:
    """A model type that is not captured: the tiny model, and words of the message that says so."""

    architecture: Architecture
    message: str


_WINDOW = {"sliding_window": WINDOW}
_MIXED = {**_WINDOW, "layer_types": ("sliding_attention", "full_attention") * 2}
_LINEAR = {"layer_types": ("linear_attention", "full_attention") * 2}
_CONVOLUTION = {"layer_types": ("conv", "full_attention") * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
_INDEXED = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 8}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_MAMBA2 = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}

_SLIDES = "sliding window"
_ALTERNATES = "sliding and full layers in turn"
_LEAVES_OUT_LINEAR = "linear-attention layers left out"

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", "Llama"),
    Architecture(
        "llama4_text",
        "Llama 4 (text)",
        {**_LOCAL_EXPERTS, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 48},
        "chunked attention; every fourth layer without RoPE; mixture of experts",
    ),
    Architecture("mistral", "Mistral", _WINDOW, _SLIDES),
    Architecture("ministral", "Ministral", _MIXED, _ALTERNATES),
    Architecture("ministral3", "Ministral 3"),
    Architecture("mixtral", "Mixtral", {**_LOCAL_EXPERTS, **_WINDOW}, "sliding window; mixture of experts"),
    Architecture("qwen2", "Qwen2, Qwen2.5", {**_MIXED, "use_sliding_window": True}, _ALTERNATES),
    Architecture("qwen2_moe", "Qwen2-MoE", {**_EXPERTS, "shared_expert_intermediate_size": 24}, "mixture of experts"),
    Architecture("qwen3", "Qwen3", notable="norms on queries and keys"),
    Architecture("qwen3_moe", "Qwen3-MoE", _EXPERTS, "mixture of experts"),
    Architecture(
        "qwen3_next",
        "Qwen3-Next",
        {**_EXPERTS, **_DELTA, **_LINEAR, "shared_expert_intermediate_size": 24},
        f"{_LEAVES_OUT_LINEAR}; gated attention",
        weight_std=QUIETER_STD,
    ),
    Architecture(
        "qwen3_5_text",
        "Qwen3.5 (text)",
        {**_DELTA, **_LINEAR},
        f"{_LEAVES_OUT_LINEAR}; gated attention",
        weight_std=QUIETER_STD,
    ),
    Architecture(
        "qwen3_5_moe_text",
        "Qwen3.5-MoE (text)",
        {**_EXPERTS, **_DELTA, **_LINEAR, "shared_expert_intermediate_size": 24},
        f"{_LEAVES_OUT_LINEAR}; gated attention",
        weight_std=QUIETER_STD,
    ),
    Architecture("gemma", "Gemma"),
    Architecture("gemma2", "Gemma 2", {**_MIXED, "query_pre_attn_scalar": 8}, f"soft-cap; {_ALTERNATES}"),
    Architecture("gemma3_text", "Gemma 3 (text)", {**_MIXED, "query_pre_attn_scalar": 8}, _ALTERNATES),
    Architecture(
        "gemma3n_text",
        "Gemma 3n (text)",
        {
            **_MIXED,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": (0.0,) * 4,
        },
        "layers that share keys and values",
    ),
    Architecture(
        "gemma4_text",
        "Gemma 4 (text)",
        {
            **_MIXED,
            "global_head_dim": 16,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        "two head sizes; layers that share keys and values",
        weight_std=QUIETER_STD,
    ),
    Architecture("vaultgemma", "VaultGemma", {**_MIXED, "query_pre_attn_scalar": 8}, f"soft-cap; {_ALTERNATES}"),
    Architecture("phi", "Phi-1, Phi-1.5, Phi-2", {"num_key_value_heads": 4}),
    Architecture("phi3", "Phi-3, Phi-4", _WINDOW, f"{_SLIDES}; fused projections"),
    Architecture("phimoe", "Phi-3.5-MoE", {**_LOCAL_EXPERTS, **_WINDOW}, "sliding window; mixture of experts"),
    Architecture("olmo", "OLMo", {"num_key_value_heads": 4}, weight_std=0.15),
    Architecture("olmo2", "OLMo 2", notable="norms on queries and keys"),
    Architecture("olmo3", "OLMo 3", _MIXED, _ALTERNATES),
    Architecture("olmoe", "OLMoE", _EXPERTS, "mixture of experts"),
    Architecture("olmo_hybrid", "OLMo Hybrid", {**_DELTA, **_LINEAR}, _LEAVES_OUT_LINEAR, weight_std=QUIETER_STD),
    Architecture("flex_olmo", "FlexOlmo", _EXPERTS, "mixture of experts"),
    Architecture("gpt_neox", "GPT-NeoX (Pythia)", notable="partial RoPE"),
    Architecture("gpt2", "GPT-2", _GPT2, "learned positions"),
    Architecture("gpt_bigcode", "GPT-BigCode (StarCoder)", _GPT2, "multi-query attention"),
    Architecture("opt", "OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "learned positions"),
    Architecture("hunyuan_v1_moe", "HunYuan v1 MoE (Hunyuan-A13B)", {**_EXPERTS, "moe_topk": 2}, "mixture of experts"),
    Architecture("hunyuan_v1_dense", "HunYuan v1 dense"),
    Architecture("hy_v3", "Hy3", _EXPERTS, "mixture of experts", weight_std=QUIETER_STD),
    Architecture(
        "hy_v4", "Hy4", {**_EXPERTS, **_LATENT, **_INDEXED}, "keys chosen by an indexer; attention sinks; latent keys"
    ),
    Architecture("deepseek_v2", "DeepSeek V2", {**_ROUTED_EXPERTS, **_LATENT}, "latent attention"),
    Architecture("deepseek_v3", "DeepSeek V3, R1", {**_ROUTED_EXPERTS, **_LATENT}, "latent attention"),
    Architecture(
        "deepseek_v32",
        "DeepSeek V3.2",
        {**_ROUTED_EXPERTS, **_LATENT, **_INDEXED},
        "keys chosen by an indexer; latent attention",
    ),
    Architecture("minicpm3", "MiniCPM3", _LATENT, "latent attention"),
    Architecture("youtu", "Youtu-LLM", _LATENT, "latent attention"),
    Architecture(
        "longcat_flash",
        "LongCat-Flash",
        {
            **_LATENT,
            "num_hidden_layers": 4,
            "n_routed_experts": 4,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 24,
            "ffn_hidden_size": 48,
            "zero_expert_num": 1,
        },
        "latent attention; its two attentions per block count as two layers",
    ),
    Architecture("gpt_oss", "gpt-oss", {**_LOCAL_EXPERTS, **_MIXED}, f"attention sinks; {_ALTERNATES}"),
    Architecture("mimo_v2_flash", "MiMo-V2-Flash", {**_ROUTED_EXPERTS, **_MIXED}, "attention sinks; two head sizes"),
    Architecture("smollm3", "SmolLM3", notable="every fourth layer without RoPE"),
    Architecture("glm", "GLM-4 (9B)"),
    Architecture("glm4", "GLM-4-0414"),
    Architecture("glm4_moe", "GLM-4-MoE (GLM-4.5)", _ROUTED_EXPERTS, "mixture of experts"),
    Architecture("glm4_moe_lite", "GLM-4.7-Flash", {**_ROUTED_EXPERTS, **_LATENT}, "latent attention"),
    Architecture(
        "glm_moe_dsa",
        "GLM-5",
        {**_ROUTED_EXPERTS, **_LATENT, **_INDEXED},
        "keys chosen by an indexer; latent attention",
    ),
    Architecture("minimax_m2", "MiniMax-M2", _LOCAL_EXPERTS, "mixture of experts"),
    Architecture("granite", "Granite", {"attention_multiplier": 0.35}),
    Architecture("granitemoe", "Granite MoE", {**_LOCAL_EXPERTS, "attention_multiplier": 0.35}, "mixture of experts"),
    Architecture(
        "granitemoehybrid",
        "Granite 4 hybrid",
        {**_LOCAL_EXPERTS, **_MAMBA2, **_LINEAR, "attention_multiplier": 0.35, "shared_intermediate_size": 24},
        _LEAVES_OUT_LINEAR,
    ),
    Architecture("ernie4_5", "ERNIE 4.5"),
    Architecture(
        "ernie4_5_moe",
        "ERNIE 4.5 MoE",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
        "mixture of experts",
    ),
    Architecture("seed_oss", "Seed-OSS"),
    Architecture("exaone4", "EXAONE 4", _MIXED, f"{_ALTERNATES}; the full ones without RoPE"),
    Architecture("exaone_moe", "EXAONE MoE", {**_EXPERTS, **_MIXED, "num_shared_experts": 1}, _ALTERNATES),
    Architecture("starcoder2", "StarCoder2", _WINDOW, _SLIDES),
    Architecture("stablelm", "StableLM", notable="partial RoPE"),
    Architecture("cohere", "Cohere (Command R)"),
    Architecture("cohere2", "Cohere 2 (Command R7B, A)", _MIXED, f"{_ALTERNATES}; the full ones without RoPE"),
    Architecture("persimmon", "Persimmon", {"num_key_value_heads": 4}, "partial RoPE"),
    Architecture("bitnet", "BitNet", weight_std=0.15),
    Architecture("nemotron", "Nemotron", notable="partial RoPE", weight_std=QUIETER_STD),
    Architecture("arcee", "Arcee (AFM)"),
    Architecture("afmoe", "Arcee Trinity", {**_EXPERTS, **_MIXED}, f"gated attention; {_ALTERNATES}"),
    Architecture("apertus", "Apertus"),
    Architecture("helium", "Helium"),
    Architecture("nanochat", "nanochat", notable="norms on queries and keys"),
    Architecture("dots1", "dots.llm1", {**_ROUTED_EXPERTS, **_MIXED}, _ALTERNATES),
    Architecture("cwm", "CWM", {**_MIXED, "bos_token_id": 1}, _ALTERNATES),
    Architecture("hyperclovax", "HyperCLOVA X", {"attention_multiplier": 0.35}),
    Architecture("jais2", "Jais 2"),
    Architecture("solar_open", "Solar Open", _ROUTED_EXPERTS, "mixture of experts"),
    Architecture("lfm2", "LFM2", _CONVOLUTION, "convolution layers left out"),
    Architecture(
        "lfm2_moe", "LFM2-MoE", {**_EXPERTS, **_CONVOLUTION, "num_dense_layers": 1}, "convolution layers left out"
    ),
    Architecture("bamba", "Bamba", {**_MAMBA2, "attn_layer_indices": (1, 3)}, "Mamba layers left out"),
    Architecture(
        "jamba",
        "Jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
        },
        "Mamba layers left out",
    ),
    Architecture("falcon_h1", "Falcon-H1", {**_MAMBA2, "mamba_d_ssm": 64}, "each layer's Mamba half left out"),
    Architecture(
        "kimi_linear",
        "Kimi Linear",
        {
            **_LOCAL_EXPERTS,
            **_LATENT,
            **_LINEAR,
            "moe_intermediate_size": 24,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        },
        f"{_LEAVES_OUT_LINEAR}; latent attention",
        weight_std=0.15,
    ),
    Architecture(
        "nemotron_h",
        "Nemotron-H, Nemotron 3",
        {
            "layers_block_type": ("mamba", "attention", "moe", "attention"),
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
        "Mamba and expert layers left out",
    ),
)
"""Captured, and tested to be."""

_OUTSIDE = "does not route attention through transformers' AttentionInterface"
_STATES_ONLY = "has no attention layers"
_BOTH_WAYS = "attends in both directions"
_ENCODER = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

REFUSED: tuple[Refusal, ...] = (
    Refusal(Architecture("bloom", "BLOOM"), _OUTSIDE),
    Refusal(Architecture("falcon", "Falcon"), _OUTSIDE),
    Refusal(Architecture("mpt", "MPT", {"d_model": 32, "n_heads": 4, "n_layers": 4}), _OUTSIDE),
    Refusal(Architecture("gptj", "GPT-J", {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4}), _OUTSIDE),
    Refusal(Architecture("rwkv", "RWKV"), _OUTSIDE),
    Refusal(Architecture("mamba", "Mamba"), _STATES_ONLY),
    Refusal(Architecture("mamba2", "Mamba 2", {"num_heads": 8, "head_dim": 8, "expand": 2}), _STATES_ONLY),
    Refusal(Architecture("bert", "BERT"), _BOTH_WAYS),
    Refusal(Architecture("roberta", "RoBERTa", {"pad_token_id": 1}), _BOTH_WAYS),
    Refusal(Architecture("t5", "T5 (encoder-decoder)", _ENCODER), "is an encoder-decoder"),
    Refusal(Architecture("diffllama", "DiffLlama"), "runs layer 0's attention more than once in a forward pass"),
    Refusal(Architecture("hrm_text", "HRM-Text"), "runs layer 0's attention more than once in a forward pass"),
    Refusal(
        Architecture("zamba2", "Zamba 2", {"layers_block_type": ("linear_attention", "hybrid") * 2}),
        "does not know which layer it is in",
    ),
    Refusal(
        Architecture("deepseek_v4", "DeepSeek V4", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "its keys are not tokens",
    ),
    Refusal(
        Architecture(
            "minimax_m3_vl_text",
            "MiniMax-M3 (text)",
            {**_LOCAL_EXPERTS, "layer_types": ("minimax_m3_sparse", "full_attention") * 2},
        ),
        "choose keys by block_indices, which the tap does not know",
    ),
)
"""Not captured, and tested to be refused in these words when a case is to be scored (what to do follows them)."""


def named(model_type: str) -> Architecture:
    """The row of `ARCHITECTURES` for a model type.

    Raises:
        KeyError: there is none.

    Example:
        >>> named("hunyuan_v1_moe").title
        'HunYuan v1 MoE (Hunyuan-A13B)'
    """
    return {architecture.model_type: architecture for architecture in ARCHITECTURES}[model_type]


def tiny_config(architecture: Architecture, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model: `COMMON`, then the architecture's own settings, then `changes`.

    Example:
        >>> tiny_config(named("mistral")).sliding_window
        16
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[architecture.model_type]
    # What a config works out itself cannot be set.
    common = {name: value for name, value in COMMON.items() if not isinstance(getattr(kind, name, None), property)}
    settings = {**common, **architecture.changes, **changes}
    # Configs ask for lists and change them; the table's tuples stay as they are.
    return kind(**{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()})


def tiny_model(architecture: Architecture, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model on the CPU, in evaluation mode; the same for the same seed.

    Args:
        architecture: a row of the table, or one's own.
        seed: of the random weights; torch's global generator is left as it was.
        changes: config settings, over the architecture's.

    Example:
        >>> tiny_model(named("gemma2")).config._attn_implementation     # soft-cap: it has no other
        'eager'
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = _build(tiny_config(architecture, **changes))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=architecture.weight_std)
            else:
                # Norms, biases and sinks start out all alike, and would hide that one of them is left out.
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def kernel(architecture: Architecture) -> str:
    """The attention kernel that transformers picks for the architecture: `sdpa`, or `eager` where it has no other.

    Example:
        >>> kernel(named("gpt_oss"))    # attention sinks
        'eager'
    """
    import torch

    with torch.device("meta"):
        return str(_build(tiny_config(architecture)).config._attn_implementation)


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """What each layer keeps of the past, as transformers' caches see it: `full_attention`, `linear_attention`...

    Example:
        >>> layer_kinds(tiny_config(named("olmo3")))
        ['sliding_attention', 'full_attention', 'sliding_attention', 'full_attention']
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds = get_layer_types_and_kwargs(config)[0]
    own = getattr(config, "layer_types", None) or kinds
    # To a cache, layers that are all experts look like those that use another layer's keys.
    return [name if name in ("moe", "mlp") else kind for name, kind in zip(own, kinds, strict=True)]


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_config(config, dtype=torch.float32)


def render() -> str:
    """The documentation of both tables, in Markdown; `docs/architectures.md` is this text.

    Example:
        >>> print(render().splitlines()[0])
        # Architectures
    """
    from lccp_interp.capture.model import state_layers

    lines = [_HEADING.format(n=len(ARCHITECTURES))]
    lines += [
        "| architecture | `model_type` | layers | kernel | prompts in pieces | notable |",
        "|---|---|---|---|---|---|",
    ]
    for architecture in ARCHITECTURES:
        config = tiny_config(architecture)
        kinds = ", ".join(_KINDS[kind] for kind in dict.fromkeys(layer_kinds(config)))
        pieces = "no" if state_layers(config) else "yes"
        lines.append(
            f"| {architecture.title} | `{architecture.model_type}` | {kinds} | {kernel(architecture)} | {pieces} | "
            f"{architecture.notable} |"
        )
    lines += [_REFUSED_HEADING, "| architecture | `model_type` | words of the message |", "|---" * 3 + "|"]
    for refusal in REFUSED:
        lines.append(f"| {refusal.architecture.title} | `{refusal.architecture.model_type}` | {refusal.message} |")
    return "\n".join(lines) + "\n"


_KINDS = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "indexed_attention": "indexed",
    "linear_attention": "(linear)",
    "conv": "(convolution)",
    "hybrid": "full beside a state",
    "dummy": "another layer's keys",
    "moe": "(experts)",
}

_HEADING = """# Architectures

Written by `python -m lccp_interp.capture.architectures > docs/architectures.md`, from the table that the tests run; a
test fails when the two differ.

## Captured

{n} architectures. Each is held, as a tiny random float32 model, against its own
`attn_implementation="eager", output_attentions=True`: the captured rows, and the logits against the model without the
tap, differ by at most 1e-5; in batches, with left padding, behind a cache, and at lengths beyond the sliding window.
Other model types that transformers routes through its attention interface may well work; the self-check on loading
decides.

- **layers**: kinds of layers in the tiny model, in order of appearance; those in parentheses have no attention
  weights and are left out of the rows. The others keep their true layer index.
- **kernel**: what transformers runs by default. `eager` means that the model knows no other (soft-cap, attention
  sinks); it is then run in blocks of queries.
- **prompts in pieces**: whether a prompt may be run in chunks behind a cache that is cropped to the beginning it shares
  with the prompt before. Where not, every prompt is run whole; the results are the same.
"""

_REFUSED_HEADING = """
## Refused

What has no attention weights over the prompt's tokens, or hides them from the attention interface, is refused before
anything is scored. Tested to be:
"""


if __name__ == "__main__":
    print(render(), end="")
