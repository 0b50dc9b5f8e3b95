"""The ways of reading attention that are compared: one forward pass each, over the same tokens.

`plain` reads nothing. `capture` is ours. `eager` is transformers' `output_attentions`, `transformer_lens` its
`run_with_cache` on the pattern hooks, `wu` a loop in the manner of the public code of arXiv 2404.15574: a fast prefill,
then greedy decoding token by token with eager attention, and in Python a top-1 of the last row per layer and head. All
but `plain` reduce the rows to next to nothing (where each looks most; how much of it lies on a span, or whether it is a
hit), so that none is measured for keeping what another throws away. What opponents can be spared they are spared:
logits come from the last rows only, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lccp_interp.capture.rows import tap_rows

N_ROWS = 32
"""Copy rows read per pass, as many as a long answer has tokens."""

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1 << 17,
}
"""A Llama of about 25 M parameters with random weights; attention costs the same as with trained ones."""

Pass = Callable[[Tensor], Any]


def build_model() -> Any:
    """The CPU benchmarks' model, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def random_ids(length: int, vocab_size: int = SHAPE["vocab_size"]) -> Tensor:
    """Int `[1, length]`."""
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(length))


def reduce_rows(weights: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept of rows `[batch, head, row, key]`: the attended position, and the attention on the first tokens."""
    return weights.argmax(-1), weights[..., :N_ROWS].sum(-1)


def open_pass(kind: str, model: Any) -> Pass:
    """A function that runs one pass of `kind` over tokens `[1, token]`; `transformer_lens` takes the model over."""
    if kind == "transformer_lens":
        model = wrap_in_lens(model)
    run = KINDS[kind]

    def run_pass(ids: Tensor) -> Any:
        with torch.inference_mode():
            return run(model, ids)

    return run_pass


def plain(model: Any, ids: Tensor) -> None:
    """A prefill, logits of the last rows."""
    model(ids, use_cache=False, logits_to_keep=N_ROWS)


def capture(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """The same prefill with the tap on the last rows."""
    reduced = {}

    def sink(layer: int, weights: Tensor) -> None:
        reduced[layer] = reduce_rows(weights)

    with tap_rows(model, torch.arange(ids.shape[1] - N_ROWS, ids.shape[1]), sink):
        model(ids, use_cache=False, logits_to_keep=N_ROWS)
    return reduced


def eager(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """transformers' own way: the full maps of all layers, then their last rows."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        output = model(ids, output_attentions=True, use_cache=False, logits_to_keep=N_ROWS)
        return [reduce_rows(full[:, :, -N_ROWS:]) for full in output.attentions]
    finally:
        model.set_attn_implementation(before)


def wrap_in_lens(model: Any) -> Any:
    """A TransformerLens bridge around the model, which it changes in place."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    from benchmarks.grid import CHECKPOINT

    # The bridge wants some tokenizer; it is given ids and never uses it.
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    return TransformerBridge.boot_transformers("meta-llama/Llama-3", hf_model=model, tokenizer=tokenizer)


def transformer_lens(bridge: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`run_with_cache` filtered to the patterns; its `pos_slice` keeps views of the full maps and saves nothing."""
    _, cache = bridge.run_with_cache(
        ids,
        names_filter=lambda name: name.endswith("attn.hook_pattern"),
        return_cache_object=False,
        logits_to_keep=N_ROWS,
    )
    return [reduce_rows(full[:, :, -N_ROWS:]) for full in cache.values()]


def wu(model: Any, ids: Tensor) -> list[list[float]]:
    """Prefill, then as many greedy steps as the others read rows; scores as `[layer][head]`."""
    config = model.config
    prompt, before = ids[0], config._attn_implementation
    scores = [[0.0] * config.num_attention_heads for _ in range(config.num_hidden_layers)]
    cache = model(ids[:, :-N_ROWS], use_cache=True, logits_to_keep=1).past_key_values
    token = prompt[-N_ROWS]
    model.set_attn_implementation("eager")
    try:
        for _ in range(N_ROWS):
            output = model(token.view(1, 1), past_key_values=cache, use_cache=True, output_attentions=True)
            token = output.logits[0, -1].argmax()
            for layer, heads in enumerate(scores):
                for head in range(len(heads)):
                    for place in output.attentions[layer][0, head, -1].topk(1).indices:
                        if place < N_ROWS and token.item() == prompt[place].item():
                            heads[head] += 1 / N_ROWS
    finally:
        model.set_attn_implementation(before)
    return scores


KINDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "plain": plain,
    "capture": capture,
    "eager": eager,
    "transformer_lens": transformer_lens,
    "wu": wu,
}
