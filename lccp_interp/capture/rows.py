"""The tap: attention weights of chosen query positions, at the cost of a forward pass.

transformers hands every attention call of a supporting model (post-RoPE query, key, value, mask, scaling and the
model's own keyword arguments) to a function registered under a name. The tap registers one that lets the model's fast
kernel compute the output untouched and then calls *the model's own* eager attention on the few query rows asked for.
The weights so obtained are exactly the model's (its grouping of heads, soft-cap, sinks, sliding window), and a prompt
of T tokens costs E x T numbers per head instead of T x T.

It knows one forward pass; it refuses to know what the rows mean. Cost per layer: one E x T product beside the kernel's
own T x T, and E x T floats of memory per head until the sink has reduced them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from lccp_interp.schema import LccpError

TAP_NAME = "lccp_rows"
RowSink = Callable[[int, Tensor], None]
"""Receives (layer index, weights `[batch, head, event, key]` in float32) once per attention layer."""


@dataclass(frozen=True)
class _Tap:
    rows: Tensor
    sink: RowSink
    kernel: str


_ACTIVE: ContextVar[_Tap | None] = ContextVar("lccp_active_tap", default=None)


def eager_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention that `module`'s own modelling file defines.

    Raises:
        LccpError: the architecture does not route attention through transformers' attention interface.
    """
    home = sys.modules[type(module).__module__]
    function = getattr(home, "eager_attention_forward", None)
    if function is None:
        raise LccpError(
            f"{type(module).__name__} ({home.__name__}) has no eager_attention_forward: its attention weights cannot "
            "be captured; use an architecture that transformers routes through its AttentionInterface"
        )
    return function


def _rows_mask(mask: Tensor | None, rows: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Additive mask `[batch or 1, 1, event, key]` of the chosen query rows.

    With sdpa a mask of None stands for plain causal attention, so it has to be spelt out here.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        position = rows.to(key.device) + (n_keys - n_queries)
        allowed = torch.arange(n_keys, device=key.device)[None, :] <= position[:, None]
        allowed = allowed[None, None]
    else:
        mask = mask[:, :, rows.to(mask.device), :n_keys]
        if mask.dtype != torch.bool:
            return mask
        allowed = mask
    return torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, lowest)


def _tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    tap = _ACTIVE.get()
    if tap is None:
        raise LccpError(f"attention implementation {TAP_NAME!r} was called outside of `tap_rows`; set another one")
    if not kwargs.get("is_causal", True) or not getattr(module, "is_causal", True):
        raise LccpError(
            f"{type(module).__name__} attends in both directions; copy events are read from decoders, whose tokens see "
            "only what stands before them"
        )
    eager = eager_function(module)
    kernel = eager if tap.kernel == "eager" else sdpa_attention_forward
    output, _ = kernel(module, query, key, value, attention_mask, **kwargs)
    rows = tap.rows.to(query.device)
    mask = _rows_mask(attention_mask, rows, query, key)
    _, weights = eager(module, query[:, :, rows], key, value, mask, **kwargs)
    assert weights is not None
    tap.sink(int(module.layer_idx), weights.float())  # type: ignore[arg-type]
    return output, None


def _tapped_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    tap = _ACTIVE.get()
    base = eager_mask if tap is not None and tap.kernel == "eager" else sdpa_mask
    return base(*args, **kwargs)


AttentionInterface.register(TAP_NAME, _tapped_attention)
AttentionMaskInterface.register(TAP_NAME, _tapped_mask)


@contextlib.contextmanager
def tap_rows(model: PreTrainedModel, rows: Tensor, sink: RowSink) -> Iterator[None]:
    """Within this context, every forward pass of `model` also hands the weights of `rows` to `sink`.

    Args:
        model: a decoder that transformers routes through its attention interface.
        rows: Int `[event]`, query positions within the forward pass, 0 <= row < number of its tokens.
        sink: called in every attention layer with (layer index, float32 weights `[batch, head, event, key]`). It
            should reduce them: what it keeps stays in memory.

    The model's attention implementation is restored afterwards, also after an exception.

    Raises:
        LccpError: the architecture cannot be captured, or its current implementation is neither sdpa nor eager.
    """
    kernel = model.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise LccpError(
            f"{type(model).__name__} runs attention implementation {kernel!r}; rows are captured over 'sdpa' or "
            "'eager': load it with load_model(...), or call model.set_attn_implementation('sdpa')"
        )
    if not model._can_set_attn_implementation():
        raise LccpError(
            f"{type(model).__name__} does not route attention through transformers' AttentionInterface: its rows "
            "cannot be captured"
        )
    model.set_attn_implementation(TAP_NAME)
    token = _ACTIVE.set(_Tap(rows=rows, sink=sink, kernel=kernel))
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        model.set_attn_implementation(kernel)
