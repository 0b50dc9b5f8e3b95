"""The tap: attention weights of chosen query positions, at the cost of a forward pass.

transformers hands every attention call of a supporting model (post-RoPE query, key, value, mask, scaling and the
model's own keyword arguments) to a function registered under a name. The tap registers one that lets the model's fast
kernel compute the output untouched and then calls *the model's own* eager attention on the few query rows asked for.
The weights so obtained are exactly the model's (its grouping of heads, soft-cap, sinks, sliding window), and a prompt
of T tokens costs E x T numbers per head instead of T x T.

An edit may take the place of a layer's output in the same function (`edit_attention`): what it gets is per head, before
the output projection, of the prompt and of every decoded token alike.

It knows one forward pass; it refuses to know what the rows mean, or why an output is edited. Cost per layer: one E x T
product beside the kernel's own T x T, and E x T floats of memory per head until the sink has reduced them. Queries
behind a cache and models that know only eager attention are run in blocks of queries, so that no T x T map is ever
held.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lccp_interp.schema import LccpError

TAP_NAME = "lccp_rows"
FLASH_KERNELS = ("flash_attention_2", "flash_attention_3")
KERNELS = ("sdpa", "eager", *FLASH_KERNELS)
RowSink = Callable[[int, Tensor], None]
"""Receives (layer index, weights `[batch, head, event, key]` in float32) once per attention layer."""

CACHED_QUERIES = 1024
"""Queries per block behind a cache, where no kernel does it whole: few enough to skip most of the keys after them."""

EAGER_BYTES = 2**28
"""Bytes of attention map held at a time where eager attention is the model's only one."""


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in one forward pass, as an edit gets it.

    Attributes:
        layer: true layer index.
        first_query: position of the first query, counted from the first token fed (behind a cache not 0).
        module: the model's attention module.
        query: `[batch, head, query, d]`, post-RoPE.
        key, value: `[batch, kv_head, key, d]`; the last key is that of the last query.
        mask: what the kernel was given; None for plain causal attention.
        kernel: one of `KERNELS`.
        options: the other keyword arguments of the call.
        output: `[batch, query, head, d_head]`, before the output projection. An edit hands back another tensor of this
            shape and never changes this one.
    """

    layer: int
    first_query: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kernel: str
    options: dict[str, Any]
    output: Tensor


Edit = Callable[[AttentionCall], Tensor]
"""Makes a layer's output `[batch, query, head, d_head]` of a call, in every attention layer of every pass."""


@dataclass
class _Tap:
    rows: Tensor | None
    sink: RowSink
    kernel: str
    model: PreTrainedModel | None = None
    edits: tuple[Edit, ...] = ()
    first_query: int = 0
    """Tokens that were fed before the forward pass that is under way."""
    called: set[int] = field(default_factory=set)
    """Layers whose attention was called in the forward pass that is under way."""
    n_keys: set[int] = field(default_factory=set)
    """Numbers of keys that masks were made for: those of tokens, one per kind of layer and pass."""


_OPEN: ContextVar[tuple[_Tap, ...]] = ContextVar("lccp_open_taps", default=())
"""Taps whose contexts are entered, the innermost last; several models may have one."""

_ACTIVE: ContextVar[_Tap | None] = ContextVar("lccp_active_tap", default=None)
"""The tap of the model that is running."""


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


def _causal(rows: Tensor, n_queries: int, n_keys: int) -> Tensor:
    """Bool `[1, 1, row, key]`: what the last `n_queries` of `n_keys` tokens see, for some of them."""
    positions = rows + (n_keys - n_queries)
    return (torch.arange(n_keys, device=rows.device)[None, :] <= positions[:, None])[None, None]


def _rows_mask(
    mask: Tensor | None, rows: Tensor, query: Tensor, key: Tensor, kernel: str, sliding_window: int | None
) -> Tensor:
    """Additive float32 mask `[batch or 1, 1, row, key]` of the chosen query rows.

    A mask of None stands for plain causal attention, so it has to be spelt out here; flash kernels get the window as
    a number and the padding as `[batch, key]`.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    if kernel in FLASH_KERNELS:
        allowed = _causal(rows, n_queries, n_keys)
        if sliding_window is not None:
            positions = rows + (n_keys - n_queries)
            near = torch.arange(n_keys, device=rows.device)[None, :] > positions[:, None] - sliding_window
            allowed = allowed & near
        if mask is not None:
            allowed = allowed & mask.to(rows.device).bool()[:, None, None, -n_keys:]
    elif mask is None:
        allowed = _causal(rows, n_queries, n_keys)
    else:
        allowed = mask[:, :, rows.to(mask.device), :n_keys]
        if allowed.dtype != torch.bool:
            return allowed.float()
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, lowest)


def _sliced(kwargs: dict[str, Any], rows: Tensor, n_queries: int) -> dict[str, Any]:
    """The call's keyword arguments for some of its query rows: a position bias has one row per query."""
    bias = kwargs.get("position_bias")
    if isinstance(bias, Tensor) and bias.shape[-2] == n_queries:
        return {**kwargs, "position_bias": bias[..., rows.to(bias.device), :]}
    return kwargs


def _eager_output(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """The model's eager attention over blocks of queries; the same numbers, without a T x T map."""
    eager = eager_function(module)
    batch, n_heads, n_queries, _ = query.shape
    block = max(1, EAGER_BYTES // (4 * batch * n_heads * key.shape[2]))
    outputs = []
    for start in range(0, n_queries, block):
        rows = torch.arange(start, min(start + block, n_queries), device=query.device)
        block_mask = _rows_mask(mask, rows, query, key, "eager", None).to(query.dtype)
        # A float32 minimum becomes -inf in half precision, and a row of nothing but -inf becomes NaN.
        block_mask = block_mask.clamp(min=torch.finfo(query.dtype).min)
        own = _sliced(kwargs, rows, n_queries)
        outputs.append(eager(module, query[:, :, start : start + block], key, value, block_mask, **own)[0])
    return torch.cat(outputs, dim=1)


class _NeedsTheModule(Exception):
    """An eager attention asked for more of its module than how the heads are grouped."""


class _Ungrouped:
    """A module as eager attention sees it when there is one key head for each query head.

    What it asks for beyond that may be per query head (sinks, say), which grouped queries would not match.
    """

    def __init__(self, module: nn.Module) -> None:
        self.num_key_value_groups = 1
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        raise _NeedsTheModule(name)


_WHOLE_MODULE: set[Callable[..., Any]] = set()
"""Eager attentions that were found to ask for more of their module."""


def _weights(
    eager: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Eager attention's weights `[batch, head, row, key]`, where possible without repeating the keys for every head.

    To a key head, the rows of its group of query heads are as good as more rows of one head.
    """
    batch, n_heads, n_rows, d_head = query.shape
    groups = n_heads // key.shape[1]
    plain = mask.shape[1] == 1 and all(
        name in ("position_ids", "cache_position") for name, value in kwargs.items() if isinstance(value, Tensor)
    )
    if plain and groups > 1 and groups == getattr(module, "num_key_value_groups", 1) and eager not in _WHOLE_MODULE:
        grouped = query.reshape(batch, key.shape[1], groups * n_rows, d_head)
        try:
            _, weights = eager(_Ungrouped(module), grouped, key, value, mask.repeat(1, 1, groups, 1), **kwargs)
        except _NeedsTheModule:
            _WHOLE_MODULE.add(eager)
        else:
            assert weights is not None
            return weights.reshape(batch, n_heads, n_rows, -1)
    _, weights = eager(module, query, key, value, mask, **kwargs)
    assert weights is not None
    return weights


def row_weights(call: AttentionCall, rows: Tensor) -> Tensor:
    """The attention weights of some queries of a call, as the model's own eager attention makes them.

    Args:
        call: of one layer; its query, key and value may be others than the layer was given, also of more sequences.
        rows: Int `[row]`, queries within the call.

    Returns:
        Float32 `[batch, head, row, key]`, on the call's device.
    """
    query, key = call.query, call.key
    rows = rows.to(query.device)
    mask = _rows_mask(call.mask, rows, query, key, call.kernel, call.options.get("sliding_window"))
    # In float32, for half-precision logits tie, also where a training has switched autocast on; of the values one
    # column is enough, the product is not used.
    with _without_autocast(query.device.type):
        return _weights(
            eager_function(call.module), call.module, query[:, :, rows].float(), key.float(),
            call.value[..., :1].float(), mask, **_sliced(call.options, rows, query.shape[2]),
        ).float()  # fmt: skip


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Computation as it is written; a device that knows no autocast (one without numbers) computes so anyway."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def output_of(call: AttentionCall) -> Tensor:
    """What the layer's kernel makes of a call's query, key and value, `[batch, query, head, d_head]`."""
    return _kernel_output(call.kernel, call.module, call.query, call.key, call.value, call.mask, **call.options)


def _kernel_output(
    kernel: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    if kernel == "eager":
        return _eager_output(module, query, key, value, mask, **kwargs)
    if kernel == "sdpa":
        return _sdpa_output(module, query, key, value, mask, **kwargs)
    return _flash_output(kernel, module, query, key, value, mask, **kwargs)


def output_without(call: AttentionCall, heads: Sequence[int], span: tuple[int, int]) -> Tensor:
    """What some heads of a call make of their keys if those of a span are not there.

    It is the model's own eager attention with the span masked, so the other keys share what the span had. A query that
    sees nothing else attends to nothing: its output is 0.

    Args:
        call: of one layer.
        heads: indices of query heads in the layer.
        span: positions `start <= key < end`, counted from the first token fed.

    Returns:
        `[batch, query, len(heads), d_head]` in the output's dtype.
    """
    query, key, kwargs = call.query, call.key, call.options
    batch, n_heads, n_queries, _ = query.shape
    first_key = call.first_query + n_queries - key.shape[2]
    if first_key < 0:
        raise LccpError(
            f"layer {call.layer} was given {key.shape[2]} keys for {call.first_query + n_queries} tokens (a static "
            "cache?): where the span stands among them is not known; run with a DynamicCache, or without a cache"
        )
    start, end = (min(max(place - first_key, 0), key.shape[2]) for place in span)
    block = max(1, EAGER_BYTES // (4 * batch * n_heads * key.shape[2]))
    outputs = []
    for begin in range(0, n_queries, block):
        rows = torch.arange(begin, min(begin + block, n_queries), device=query.device)
        mask = _rows_mask(call.mask, rows, query, key, call.kernel, kwargs.get("sliding_window")).clone()
        mask[..., start:end] = torch.finfo(torch.float32).min
        blind = (mask <= torch.finfo(query.dtype).min).all(-1)  # [batch or 1, head or 1, row]
        mask = mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
        output = eager_function(call.module)(
            call.module, query[:, :, rows], key, call.value, mask, **_sliced(kwargs, rows, n_queries)
        )[0]
        output = output.masked_fill(blind.transpose(1, 2).unsqueeze(-1), 0)
        outputs.append(output[:, :, list(heads)])
    return torch.cat(outputs, dim=1).to(call.output.dtype)


def _sdpa_output(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """transformers' sdpa attention; causal queries behind a cache keep a fast kernel and need no mask of the whole."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    n_queries, n_keys = query.shape[2], key.shape[2]
    if mask is not None or n_queries in (1, n_keys) or kwargs.get("position_bias") is not None:
        return sdpa(module, query, key, value, mask, **kwargs)[0]
    if query.device.type == "cuda":
        # torch dispatches this bias to flash attention, which aligns causal queries with the last keys.
        return sdpa(module, query, key, value, causal_lower_right(n_queries, n_keys), **kwargs)[0]
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and not kwargs.get("dropout"):
        return _two_part_output(query, key, value, kwargs.get("scaling"))
    outputs = []
    for start in range(0, n_queries, CACHED_QUERIES):
        stop = min(start + CACHED_QUERIES, n_queries)
        seen = n_keys - n_queries + stop
        allowed = _causal(torch.arange(stop - start, device=query.device), stop - start, seen)
        block = sdpa(module, query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], allowed, **kwargs)
        outputs.append(block[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _two_part_output(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention behind a cache on a CPU: over the cached keys without a mask, over the new ones causally.

    The parts are joined by their log-sum-exps, which is exact, and takes half of what a mask does.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    batch, n_heads, n_queries, d_head = query.shape
    n_kv_heads, n_cached = key.shape[1], key.shape[2] - n_queries
    groups = n_heads // n_kv_heads
    # Without a mask the queries of a group of heads are as good as more queries of one head: no key is repeated.
    grouped = query.reshape(batch, n_kv_heads, groups * n_queries, d_head)
    cached, cached_lse = attend(grouped, key[:, :, :n_cached], value[:, :, :n_cached], 0.0, False, scale=scale)
    new_key, new_value = (part[:, :, n_cached:].repeat_interleave(groups, dim=1) for part in (key, value))
    new, new_lse = attend(query, new_key, new_value, 0.0, True, scale=scale)
    share = torch.sigmoid(cached_lse.reshape(batch, n_heads, n_queries) - new_lse).unsqueeze(-1)
    joined = torch.lerp(new.float(), cached.reshape(query.shape).float(), share.float())
    return joined.to(query.dtype).transpose(1, 2).contiguous()


def _flash_output(kernel: str, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """An installed flash kernel, which looks its own name up in the model's config."""
    config: Any = module.config
    config._attn_implementation_internal = kernel
    try:
        return ALL_ATTENTION_FUNCTIONS[kernel](module, *args, **kwargs)[0]
    finally:
        config._attn_implementation_internal = TAP_NAME


def _chosen_keys(mask: Tensor | None, query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
    """Bool mask of the keys that a sparse layer's indexer, `[batch, query, choice]`, leaves to each query.

    Such layers narrow the mask themselves for the kernels they know by name and hand any other one the indices.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    chosen = torch.zeros((*indices.shape[:2], n_keys), dtype=torch.bool, device=indices.device)
    chosen.scatter_(-1, indices.long(), True)
    seen = _causal(torch.arange(n_queries, device=indices.device), n_queries, n_keys) if mask is None else mask
    return seen & chosen[:, None]


def _layer(module: nn.Module, key: Tensor, tap: _Tap, **kwargs: Any) -> int:
    """Index of the layer that calls; refuses what is no layer's one attention over the prompt's tokens."""
    name = type(module).__name__
    if not kwargs.get("is_causal", True) or not getattr(module, "is_causal", True):
        raise LccpError(
            f"{name} attends in both directions; copy events are read from decoders, whose tokens see only what stands "
            "before them"
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None or layer < 0:
        raise LccpError(f"{name} does not know which layer it is in (layer_idx {layer}): its rows cannot be told apart")
    if layer in tap.called:
        raise LccpError(
            f"{name} runs layer {layer}'s attention more than once in a forward pass: no one pattern is the layer's, "
            "and its rows cannot be captured"
        )
    tap.called.add(layer)
    for choice in ("block_indices", "indices") if tap.kernel in FLASH_KERNELS else ("block_indices",):
        if kwargs.get(choice) is not None:
            raise LccpError(
                f"{name} lets kernel {tap.kernel!r} choose keys by {choice}, which the tap does not know: its rows "
                "cannot be captured"
            )
    if tap.n_keys and key.shape[2] not in tap.n_keys:
        raise LccpError(
            f"{name} attends to {key.shape[2]} keys in layer {layer} where {max(tap.n_keys)} tokens were read: its "
            "keys are not tokens, and its rows cannot be captured"
        )
    return int(layer)


def _tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    tap = _ACTIVE.get()
    if tap is None:
        raise LccpError(f"attention implementation {TAP_NAME!r} was called outside of `tap_rows`; set another one")
    layer = _layer(module, key, tap, **kwargs)
    eager_function(module)  # refuses what has none
    if (indices := kwargs.pop("indices", None)) is not None:
        attention_mask = _chosen_keys(attention_mask, query, key, indices)
    output = _kernel_output(tap.kernel, module, query, key, value, attention_mask, **kwargs)
    call = AttentionCall(layer, tap.first_query, module, query, key, value, attention_mask, tap.kernel, kwargs, output)
    if tap.rows is not None:
        tap.sink(layer, row_weights(call, tap.rows))
    for edit in tap.edits:
        call = replace(call, output=edit(call))
    return call.output, None


def _tapped_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask for the active kernel; None for plain causal attention, behind a cache too."""
    tap = _ACTIVE.get()
    if tap is not None and "kv_length" in kwargs:
        tap.n_keys.add(int(kwargs["kv_length"]))
    if tap is not None and tap.kernel in FLASH_KERNELS:
        return flash_attention_mask(*args, **kwargs)
    if not args and _is_plain_causal(**kwargs):
        return None
    return sdpa_mask(*args, **kwargs)


def _is_plain_causal(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> bool:
    return (
        allow_is_causal_skip
        and mask_function is causal_mask_function
        and local_size is None
        and (attention_mask is None or bool(attention_mask.all()))
        and kv_offset == 0
        and int(q_offset) + q_length == kv_length
    )


AttentionInterface.register(TAP_NAME, _tapped_attention)
AttentionMaskInterface.register(TAP_NAME, _tapped_mask)


@contextlib.contextmanager
def tap_rows(model: PreTrainedModel, rows: Tensor | None, sink: RowSink) -> Iterator[None]:
    """Within this context, every forward pass of `model` also hands the weights of `rows` to `sink`.

    Args:
        model: a decoder that transformers routes through its attention interface.
        rows: Int `[event]`, query positions within the forward pass, 0 <= row < number of its tokens; None to read
            nothing and only run as the tap does (bounded masks behind a cache, eager attention in blocks).
        sink: called in every attention layer with (layer index, float32 weights `[batch, head, event, key]`). It
            should reduce them: what it keeps stays in memory.

    The rows are computed in float32 from the queries and keys of the model's own dtype. The model's attention
    implementation is restored afterwards, also after an exception.

    Raises:
        LccpError: the architecture cannot be captured, or its current implementation is none of `KERNELS`.
    """
    with _tapped(model, rows, sink, ()):
        yield


@contextlib.contextmanager
def edit_attention(model: PreTrainedModel, edit: Edit) -> Iterator[None]:
    """Within this context, every attention layer of `model` returns `edit(call)` in place of its output.

    Contexts nest: an inner edit gets what the outer one made. Rows that are read within are those of the queries and
    keys that the layer was given; what an edit in this very layer makes of them they do not show.

    Raises:
        LccpError: as `tap_rows`.
    """
    outer = _outer(model)
    rows, sink = (None, _no_rows) if outer is None else (outer.rows, outer.sink)
    with _tapped(model, rows, sink, (edit,)):
        yield


def _no_rows(layer: int, weights: Tensor) -> None:
    raise AssertionError("rows were captured though none were asked for")


def _outer(model: PreTrainedModel) -> _Tap | None:
    """The innermost tap that is open on `model`."""
    return next((tap for tap in reversed(_OPEN.get()) if tap.model is model), None)


@contextlib.contextmanager
def _tapped(model: PreTrainedModel, rows: Tensor | None, sink: RowSink, edits: tuple[Edit, ...]) -> Iterator[None]:
    before = kernel = model.config._attn_implementation
    outer = _outer(model) if before == TAP_NAME else None
    if outer is not None and (outer.rows is None or edits):
        kernel, edits = outer.kernel, (*outer.edits, *edits)
    if kernel not in KERNELS:
        raise LccpError(
            f"{type(model).__name__} runs attention implementation {kernel!r}; rows are captured over "
            f"{', '.join(map(repr, KERNELS))}: load it with load_model(...), or call "
            "model.set_attn_implementation('sdpa')"
        )
    if not model._can_set_attn_implementation():
        raise LccpError(
            f"{type(model).__name__} does not route attention through transformers' AttentionInterface: its rows "
            "cannot be captured"
        )
    tap = _Tap(rows=rows, sink=sink, kernel=kernel, model=model, edits=edits)

    def begin_pass(module: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        # Also where another model's tap was opened later.
        _ACTIVE.set(tap)
        tap.called.clear()
        past = options.get("past_key_values")
        # Of a past without keys nobody edits by position.
        with contextlib.suppress(ValueError):
            tap.first_query = 0 if past is None or not tap.edits else int(past.get_seq_length())

    model.set_attn_implementation(TAP_NAME)
    opened, active = _OPEN.set((*_OPEN.get(), tap)), _ACTIVE.set(tap)
    new_pass = model.base_model.register_forward_pre_hook(begin_pass, with_kwargs=True)
    try:
        yield
    finally:
        new_pass.remove()
        _ACTIVE.reset(active)
        _OPEN.reset(opened)
        model.set_attn_implementation(before)
