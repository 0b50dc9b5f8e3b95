"""What a head would do by its weights alone: does it copy what it attends to, does it attend to what equals its token?

Elhage et al. 2021 ("A Mathematical Framework for Transformer Circuits", transformer-circuits.pub/2021/framework) read
two matrices of tokens x tokens off a head. The OV circuit says what attending to token t adds to the logit of each
token; the QK circuit how well a query at token t likes each token as its key. A head copies where the former's large
numbers stand on its diagonal, and matches tokens where the latter's do. Two summaries of a diagonal, for either:

- the sum of the eigenvalues over the sum of their absolute values (that paper's copying score), -1..1, about 0 for
  random weights: does the matrix tend to map tokens onto themselves?
- the share of tokens whose own number is the greatest of their row, 0..1, 1 / tokens by chance.

How a head is given a token: every component of the model is silenced and each token run as a prompt of its own, so the
layer reads the token's embedding through its own norm (divided by what that embedding has for a scale), and query, key
and value are read where the model hands them to attention: grouped, fused and normed as they are. A prompt of one token
stands at position 0, where rotary positions turn nothing: what the QK circuit says is about content only, and a head
that lives by position (the token before) scores nothing. Learned positions add that of the first place to every token.
An output goes through the projection and the unembedding as in `capture.readout`: with the final norm's weight, without
its division, without biases of the projection. Keys, and outputs, are taken less their mean, for a softmax does not
hear of it.

Later heads of a trained model hardly ever read bare embeddings. With `embed_layers=n` the first n layers are not
silenced, and what they make of the token alone stands for it, as Wang et al. 2022 (arXiv 2211.00593) do with the first
MLP. What other tokens bring into a real residual stream stays unseen.

`through` asks about composition: keys are made of what an earlier head writes when it attends to a token, alone in the
stream. A head that matches through a previous-token head attends to what followed its own token: an induction head.

It refuses to know prompts. Cost: a pass over `max_tokens` single tokens and a product of tokens x tokens per head, both
in blocks of `BLOCK_TOKENS`; all layers' queries, keys and values of the tokens stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.readout import LogitReader
from lccp_interp.capture.rows import AttentionCall, edit_attention
from lccp_interp.interventions.frozen import changed_outputs, components, contains, layer_components
from lccp_interp.interventions.heads import Head, check_heads, head_text, known_heads
from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    import polars as pl

MAX_TOKENS = 2048
BLOCK_TOKENS = 4096
ROUNDING = 1e-5
"""Of a layer's numbers: a head whose are smaller does nothing but round."""

Given = dict[int, tuple[Tensor, Tensor, Tensor]]
"""By layer, query `[token, head, d]`, key `[token, kv_head, d]` and value `[token, kv_head, d_value]`, float32."""


@torch.inference_mode()
def copying_scores(
    model: HookedModel, *, embed_layers: int = 0, max_tokens: int = MAX_TOKENS, seed: int = 0
) -> pl.DataFrame:
    """Whether heads copy: does attending to a token raise that token's logit?

    Args:
        model: the checkpoint, loaded.
        embed_layers: first layers that belong to the embedding; 0 for none.
        max_tokens: of a larger vocabulary so many tokens are drawn, without special ones.
        seed: of the draw.

    Returns:
        Columns layer, head, ov_copying (-1..1), ov_top (0..1), n_tokens; by layer and head.

    Raises:
        LccpError: fewer than 2 tokens, components that cannot be silenced, or what `LogitReader` raises.

    Example:
        >>> from lccp_interp.capture.model import load_model
        >>> from lccp_interp.checkpoints import bundled_trajectory
        >>> copying_scores(load_model(bundled_trajectory()[-1].path), max_tokens=200).columns
        ['layer', 'head', 'ov_copying', 'ov_top', 'n_tokens']
    """
    tokens = plain_tokens(model, max_tokens, seed)
    reader = LogitReader.of(model)
    rows = []
    for layer, (query, _, value) in sorted(_given(model, tokens, embed_layers).items()):
        # A unit of each number of a head's output, read as logits: `[head, token, d_value]`.
        units = torch.eye(value.shape[2], device=value.device).expand(value.shape[1], -1, -1)
        read = torch.cat([reader.gains(layer, units, block) for block in tokens.split(BLOCK_TOKENS)], dim=1)
        scores = _diagonals(_per_head(value, query.shape[1]), read)
        rows += [_row(layer, head, own, "ov_copying", "ov_top", len(tokens)) for head, own in enumerate(scores)]
    return _frame(rows)


@torch.inference_mode()
def matching_scores(
    model: HookedModel,
    *,
    through: Head | None = None,
    embed_layers: int = 0,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> pl.DataFrame:
    """Whether heads match tokens: does a query at a token like the same token best as its key?

    Args:
        model: the checkpoint, loaded.
        through: an earlier head that writes the keys; None makes them of the tokens themselves.
        embed_layers: as in `copying_scores`.
        max_tokens: of a larger vocabulary so many tokens are drawn, without special ones.
        seed: of the draw.

    Returns:
        Columns layer, head, qk_matching (-1..1), qk_top (0..1), n_tokens; by layer and head, with `through` of later
        layers only.

    Raises:
        LccpError: as `copying_scores`, or a head to go through that the model does not have or that stands in its last
            layer.

    Example:
        >>> from lccp_interp.capture.model import load_model
        >>> from lccp_interp.checkpoints import bundled_trajectory
        >>> table = matching_scores(load_model(bundled_trajectory()[-1].path), through=(1, 1), max_tokens=200)
        >>> table["layer"].unique().sort().to_list()
        [2, 3, 4]
    """
    tokens = plain_tokens(model, max_tokens, seed)
    given = _given(model, tokens, embed_layers)
    keys = given if through is None else _given_through(model, given, through)
    rows = []
    for layer, (_, key, _) in sorted(keys.items()):
        query = given[layer][0]
        scores = _diagonals(query.transpose(0, 1), _per_head(key, query.shape[1]))
        rows += [_row(layer, head, own, "qk_matching", "qk_top", len(tokens)) for head, own in enumerate(scores)]
    return _frame(rows)


def plain_tokens(model: HookedModel, max_tokens: int, seed: int) -> Tensor:
    """Int64 `[token]`: all tokens of a vocabulary but special ones, or as many drawn from them, ascending.

    Raises:
        LccpError: fewer than 2 tokens asked for or there.
    """
    size = min(len(model.tokenizer), model.model.get_input_embeddings().weight.shape[0])
    special = set(model.tokenizer.all_special_ids)
    plain = torch.tensor([token for token in range(size) if token not in special])
    if max_tokens < 2 or len(plain) < 2:
        raise LccpError(f"circuits of tokens need at least 2 tokens, got {min(max_tokens, len(plain))}; ask for more")
    generator = torch.Generator().manual_seed(seed)
    return plain[torch.randperm(len(plain), generator=generator)[:max_tokens]].sort().values


def _given(model: HookedModel, tokens: Tensor, embed_layers: int) -> Given:
    """What layers are given of single tokens, with all components silenced but those of the first layers.

    Raises:
        LccpError: fewer first layers than none, or no others.
    """
    by_layer = layer_components(model, tokens[None, :1])
    if not 0 <= embed_layers < len(by_layer):
        raise LccpError(f"embed_layers must lie between 0 and {len(by_layer) - 1} in {model.name}, got {embed_layers}")
    held = [module for layer in by_layer[embed_layers:] for module in layer]
    found: dict[int, list[Tensor]] = {}

    def read(call: AttentionCall) -> Tensor:
        _append(found, call.layer, [part[:, :, 0].float() for part in (call.query, call.key, call.value)])
        return call.output

    with edit_attention(model.model, read), changed_outputs(held, lambda module, output: _mapped(output, _zeros)):
        for block in tokens.split(BLOCK_TOKENS):
            model.forward(block[:, None], 1)
    return {layer: (query, key, value) for layer, (query, key, value) in found.items()}


def _given_through(model: HookedModel, given: Given, through: Head) -> Given:
    """What later layers are given where the residual stream holds nothing but what one head writes of each token.

    One more sequence, in which the head writes nothing, tells what the projection's bias alone adds.
    """
    layer, head = through
    check_heads([through], known_heads(model.model.config), f"checkpoint {model.name}")
    if layer == max(given):
        raise LccpError(
            f"head {head_text([through])} of {model.name} stands in the last layer: no head comes after it to be "
            "composed with; name an earlier one"
        )
    query, _, value = given[layer]
    written = _per_head(value, query.shape[1])[head]
    found: dict[int, list[Tensor]] = {}
    block = written[:0]

    def edit(call: AttentionCall) -> Tensor:
        if call.layer > layer:
            parts = [part[:-1, :, 0].float() for part in (call.query, call.key, call.value)]
            _append(found, call.layer, parts)
        if call.layer != layer:
            return call.output
        output = torch.zeros_like(call.output)
        output[:-1, 0, head] = block.to(output)
        return output

    one = torch.zeros((1, 1), dtype=torch.long)
    held = components(model, one)
    writer = _writer(model, held, layer, one)

    def change(module: nn.Module, output: Any) -> Any:
        return _mapped(output, (lambda own: own - own[-1:]) if module is writer else _zeros)

    with edit_attention(model.model, edit), changed_outputs([*held, model.model.get_input_embeddings()], change):
        for block in written.split(BLOCK_TOKENS):
            model.forward(one.expand(len(block) + 1, -1), 1)
    return {own: (query, key, value) for own, (query, key, value) in found.items()}


def _append(found: dict[int, list[Tensor]], layer: int, parts: list[Tensor]) -> None:
    """Put a block of tokens behind those before."""
    before = found.get(layer)
    found[layer] = parts if before is None else [torch.cat(pair) for pair in zip(before, parts, strict=True)]


def _writer(model: HookedModel, held: list[nn.Module], layer: int, ids: Tensor) -> nn.Module:
    """The component that holds a layer's attention."""
    attention: dict[int, nn.Module] = {}

    def see(call: AttentionCall) -> Tensor:
        attention[call.layer] = call.module
        return call.output

    with edit_attention(model.model, see):
        model.forward(ids, 1)
    return next(module for module in held if contains(module, attention[layer]))


def _mapped(output: Any, change: Any) -> Any:
    """A component's output with what it adds to the residual stream, `[sequence, ..., d_model]`, changed."""
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() else output
    return type(output)(_mapped(part, change) for part in output) if isinstance(output, tuple | list) else output


_zeros = torch.zeros_like


def _per_head(part: Tensor, n_heads: int) -> Tensor:
    """Of `[token, kv_head, d]` the part of each query head, `[head, token, d]`."""
    return part.repeat_interleave(n_heads // part.shape[1], dim=1).transpose(0, 1)


def _diagonals(left: Tensor, right: Tensor) -> Iterator[tuple[float, float]]:
    """`diagonal_scores` of each head, both `[head, token, d]`; nothing where a head does nothing but round."""
    least = ROUNDING * float(right.norm())
    for own_left, own_right in zip(left, right, strict=True):
        silent = (own_right - own_right.mean(dim=0)).norm() <= least
        yield diagonal_scores(own_left, torch.zeros_like(own_right) if silent else own_right)


def diagonal_scores(left: Tensor, right: Tensor) -> tuple[float, float]:
    """What eigenvalues and diagonal say of the matrix left x right^T over tokens.

    Args:
        left: Float `[token, d]`, of the rows.
        right: Float `[token, d]`, of the columns; taken less its mean.

    Returns:
        Sum of the eigenvalues over the sum of their absolute values (0 where all are 0), and the share of rows whose
        greatest number stands on the diagonal.

    Example:
        >>> left, right = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        >>> diagonal_scores(left, right)       # less the mean [[1, -1], [0.5, -0.5]]: eigenvalues 0.5 and 0
        (1.0, 0.5)
    """
    centred = (right - right.mean(dim=0)).double()
    # The product the other way round, d x d, has the same eigenvalues but for zeros.
    values = np.linalg.eigvals((centred.T @ left.double()).cpu().numpy())
    size = float(np.abs(values).sum())
    best = torch.cat([(block.double() @ centred.T).argmax(dim=1) for block in left.split(BLOCK_TOKENS)])
    top = (best == torch.arange(len(best), device=best.device)).float().mean()
    return (float(values.real.sum()) / size if size else 0.0), float(top)


def _row(layer: int, head: int, scores: tuple[float, float], eigen: str, top: str, n_tokens: int) -> dict[str, Any]:
    return {"layer": layer, "head": head, eigen: scores[0], top: scores[1], "n_tokens": n_tokens}


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(rows)
