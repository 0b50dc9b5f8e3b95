"""Interventions on single heads: zero, mean and resample ablation, scaling, patching, masking of a span of keys.

A head is (layer, head), the true layer index and the number of the query head; what is changed is its output before the
output projection, where heads have not been added up yet. All of it happens in the model's attention function, so it
holds for grouped queries, sliding windows, experts and decoding behind a cache alike, and needs no name of a weight.
Every intervention is a context manager: it holds within its block, nests, and leaves the model as it was, also after an
exception. Positions count from the first token fed, over all passes behind one cache, padding included.

Keys and values in a cache were made under whatever was changed when they were made: use a cache only within one
intervention. This module refuses to know why heads are changed. Cost: one copy of a layer's output per intervention;
`mask_span` runs the layer's eager attention once more, in blocks of queries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.rows import AttentionCall, edit_attention, output_without
from lccp_interp.interventions.heads import Head, check_heads, known_heads
from lccp_interp.schema import LccpError, Span

HeadOutputs = Mapping[Head, Tensor]
"""A head's outputs before the output projection, `[token, d_head]` each."""


def zero_heads(model: HookedModel, heads: Sequence[Head]) -> contextlib.AbstractContextManager[None]:
    """Zero ablation: within this context the heads add nothing to the residual stream.

    Raises:
        LccpError: a head that the model does not have, or an architecture that cannot be captured.

    Example:
        >>> with zero_heads(model, [(2, 2), (3, 3)]):        # doctest: +SKIP
        ...     logits = model.forward(ids, 1).logits
    """
    return _edited(model, heads, lambda call, own: own.zero_())


def scale_heads(model: HookedModel, heads: Sequence[Head], factor: float) -> contextlib.AbstractContextManager[None]:
    """Amplify heads: within this context their outputs are multiplied by `factor` (0: zero ablation, 1: nothing).

    Raises:
        LccpError: as `zero_heads`.

    Example:
        >>> with scale_heads(model, [(2, 2)], 2.0):          # doctest: +SKIP
        ...     logits = model.forward(ids, 1).logits
    """
    return _edited(model, heads, lambda call, own: own.mul_(factor))


def replace_heads(model: HookedModel, outputs: HeadOutputs) -> contextlib.AbstractContextManager[None]:
    """Mean ablation: within this context each head's output is one vector `[d_head]` at every position.

    Args:
        model: the checkpoint, loaded.
        outputs: the vectors, from `mean_outputs`.

    Raises:
        LccpError: as `zero_heads`, or a vector of another width.

    Example:
        >>> with replace_heads(model, mean_outputs(model, prompts, [(2, 2)])):   # doctest: +SKIP
        ...     logits = model.forward(ids, 1).logits
    """

    def replace(call: AttentionCall, own: Tensor) -> None:
        vectors = [outputs[call.layer, head] for head in _of_layer(outputs, call.layer)]
        _check_width(vectors, own, call.layer)
        own.copy_(torch.stack(vectors).to(own).expand_as(own))

    return _edited(model, list(outputs), replace)


def patch_heads(
    model: HookedModel, outputs: HeadOutputs, positions: Sequence[int] | None = None
) -> contextlib.AbstractContextManager[None]:
    """Patching and resample ablation: within this context heads put out what they put out on another prompt.

    Args:
        model: the checkpoint, loaded.
        outputs: `[token, d_head]` per head, from `head_outputs` on the other prompt; token t goes to position t.
        positions: where; None means at every position that is fed. Elsewhere the heads are left alone.

    Raises:
        LccpError: as `zero_heads`, an output of another width, or a position beyond the other prompt (when it is fed).

    Example:
        >>> clean = head_outputs(model, clean_ids, [(2, 2)])            # doctest: +SKIP
        >>> with patch_heads(model, clean, positions=[40, 41]):         # doctest: +SKIP
        ...     logits = model.forward(corrupted_ids, 1).logits
    """
    chosen = None if positions is None else torch.tensor(sorted(set(positions)), dtype=torch.long)

    def patch(call: AttentionCall, own: Tensor) -> None:
        places = torch.arange(call.first_query, call.first_query + own.shape[1])
        if chosen is not None:
            places = places[torch.isin(places, chosen)]
        heads = _of_layer(outputs, call.layer)
        if not len(places):
            return
        n_tokens = min(outputs[call.layer, head].shape[0] for head in heads)
        if int(places[-1]) >= n_tokens:
            raise LccpError(
                f"checkpoint {model.name}: position {int(places[-1])} is to be patched, the other prompt's outputs end "
                f"at {n_tokens - 1}; take them from a prompt as long, or name the positions"
            )
        vectors = [outputs[call.layer, head][places] for head in heads]
        _check_width(vectors, own, call.layer)
        own[:, (places - call.first_query).to(own.device)] = torch.stack(vectors, dim=1).to(own)

    return _edited(model, list(outputs), patch)


def mask_span(
    model: HookedModel, heads: Sequence[Head], span: Span, queries: Sequence[int] | None = None
) -> contextlib.AbstractContextManager[None]:
    """Blind heads to a span of the prompt, the needle for example: within this context they attend past it.

    Their attention logits at these keys are the lowest number there is, so the other keys share what the span had; a
    query that sees nothing else puts out 0. The model's own eager attention does it. Rows that are captured within
    this context still show what the head would have attended to.

    Args:
        model: the checkpoint, loaded.
        heads: which to blind; all others, of the same layers too, see the span.
        span: positions of keys.
        queries: positions of queries that are blind; None means all.

    Raises:
        LccpError: as `zero_heads`, or a static cache, among whose keys the span cannot be told.

    Example:
        >>> with mask_span(model, [(2, 2)], case.needle):     # doctest: +SKIP
        ...     logits = model.forward(ids, 1).logits
    """
    chosen = None if queries is None else torch.tensor(sorted(set(queries)), dtype=torch.long)

    def blind(call: AttentionCall, own: Tensor) -> None:
        places = torch.arange(call.first_query, call.first_query + own.shape[1])
        kept = places >= 0 if chosen is None else torch.isin(places, chosen)
        # Queries before the span do not see it.
        kept &= places >= span.start
        if not len(span) or not kept.any():
            return
        rows = kept.nonzero()[:, 0].to(own.device)
        own[:, rows] = output_without(call, _heads_of(heads, call.layer), (span.start, span.end))[:, rows]

    return _edited(model, heads, blind)


@contextlib.contextmanager
def record_heads(
    model: HookedModel, heads: Sequence[Head], sink: Callable[[Head, int, Tensor], None]
) -> Iterator[None]:
    """Within this context, `sink` gets (head, position of the first token, output `[batch, token, d_head]`) per pass.

    Raises:
        LccpError: as `zero_heads`.
    """

    def record(call: AttentionCall, own: Tensor) -> None:
        for index, head in enumerate(_heads_of(heads, call.layer)):
            sink((call.layer, head), call.first_query, own[:, :, index])

    with _edited(model, heads, record):
        yield


@torch.inference_mode()
def head_outputs(model: HookedModel, input_ids: Tensor, heads: Sequence[Head]) -> dict[Head, Tensor]:
    """What heads put out on one prompt, before the output projection.

    Args:
        model: the checkpoint, loaded; under other interventions if they are entered.
        input_ids: Int `[1, token]`.
        heads: which.

    Returns:
        `[token, d_head]` per head, in the model's dtype on its device.

    Raises:
        LccpError: as `zero_heads`.

    Example:
        >>> head_outputs(model, ids, [(2, 2)])[2, 2].shape      # doctest: +SKIP
        torch.Size([40, 8])
    """
    kept: dict[Head, Tensor] = {}

    def keep(head: Head, first: int, output: Tensor) -> None:
        kept[head] = output[0].clone()

    with record_heads(model, heads, keep):
        model.forward(input_ids, 1)
    return kept


@torch.inference_mode()
def mean_outputs(
    model: HookedModel,
    prompts: Sequence[Sequence[int]],
    heads: Sequence[Head],
    positions: Sequence[int] | None = None,
) -> dict[Head, Tensor]:
    """The mean output of heads over a reference set of prompts, each position of each prompt with the same weight.

    Args:
        model: the checkpoint, loaded.
        prompts: token ids; of any lengths.
        heads: which.
        positions: only these positions of each prompt, negative ones from its end; None means all.

    Returns:
        Float32 `[d_head]` per head, on the model's device.

    Raises:
        LccpError: as `zero_heads`, no prompts, or a position outside one of them.

    Example:
        >>> means = mean_outputs(model, [case.prompt_ids for case in cases], [(2, 2)])    # doctest: +SKIP
    """
    if not prompts:
        raise LccpError("a mean over no prompts is not defined; give at least one reference prompt")
    sums: dict[Head, Tensor] = {}
    n_summed = 0
    for prompt in prompts:
        chosen = torch.arange(len(prompt)) if positions is None else torch.tensor(list(positions))
        if not len(chosen) or int(chosen.max()) >= len(prompt) or int(chosen.min()) < -len(prompt):
            raise LccpError(f"positions {list(positions or ())} do not lie in a prompt of {len(prompt)} tokens")
        n_summed += len(chosen)

        def add(head: Head, first: int, output: Tensor, chosen: Tensor = chosen) -> None:
            total = output[0, chosen.to(output.device)].float().sum(0)
            sums[head] = sums[head] + total if head in sums else total

        with record_heads(model, heads, add):
            model.forward(torch.tensor([list(prompt)]), 1)
    return {head: total / n_summed for head, total in sums.items()}


@contextlib.contextmanager
def _edited(
    model: HookedModel, heads: Sequence[Head], change: Callable[[AttentionCall, Tensor], Any]
) -> Iterator[None]:
    """`change(call, own)` may change `own`, a copy `[batch, query, head, d_head]` of the layer's heads in `heads`."""
    check_heads(heads, known_heads(model.model.config), f"checkpoint {model.name} ({type(model.model).__name__})")
    layers = {layer for layer, _ in heads}

    def edit(call: AttentionCall) -> Tensor:
        if call.layer not in layers:
            return call.output
        indices = _heads_of(heads, call.layer)
        if max(indices) >= call.output.shape[2]:
            raise LccpError(
                f"checkpoint {model.name}: layer {call.layer} has {call.output.shape[2]} heads, asked for head "
                f"{max(indices)}; heads count from 0"
            )
        own = call.output[:, :, indices]  # a list of indices copies
        change(call, own)
        output = call.output.clone()
        output[:, :, indices] = own
        return output

    with edit_attention(model.model, edit):
        yield


def _heads_of(heads: Sequence[Head], layer: int) -> list[int]:
    """Numbers of the heads in one layer, in the order of `heads`."""
    return [head for own, head in heads if own == layer]


def _of_layer(outputs: HeadOutputs, layer: int) -> list[int]:
    return _heads_of(list(outputs), layer)


def _check_width(vectors: Sequence[Tensor], own: Tensor, layer: int) -> None:
    widths = sorted({vector.shape[-1] for vector in vectors})
    if widths != [own.shape[-1]]:
        raise LccpError(
            f"layer {layer}: the heads put out vectors of {own.shape[-1]} numbers, got {widths}; take them from this "
            "model"
        )
