"""Head types on repeated random tokens: what a head does when there is no text to understand.

The field's usual controls beside retrieval scores. A prompt is `n_distinct` random tokens, all different, `n_repeats`
times over (Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv 2209.11895, uses 25 tokens four times):
whatever a head attends to there, it does by position or by equality of tokens. Of every query i, with t its token:

- `previous_token`: attention on i - 1.
- `duplicate_token`: attention on the earlier places of t itself (all of them).
- `induction`: attention on the place right after the last earlier t.
- `prefix_matching`: attention on the places right after any earlier t, that paper's prefix matching score.

Each is a mean over the queries that have such a place, all in 0..1. Queries of the first repeat have none but the
previous token. A needle in a haystack is not needed, and none is asked about. It refuses to know files. Cost: one pass
over `n_prompts` short prompts; T x T weights of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.rows import tap_rows
from lccp_interp.schema import LccpError
from lccp_interp.tasks.pieces import PieceEncoder

if TYPE_CHECKING:
    import polars as pl

N_DISTINCT = 25
N_REPEATS = 4


@jaxtyped(typechecker=beartype)
def previous_token(weights: Float[Tensor, "head query key"], ids: Int[Tensor, " query"]) -> Float[Tensor, " head"]:
    """Attention on the token before, mean over the queries that have one (arXiv 2209.11895).

    Example:
        >>> weights = torch.tensor([[[1.0, 0.0, 0.0], [0.8, 0.2, 0.0], [0.0, 0.6, 0.4]]])
        >>> previous_token(weights, torch.tensor([5, 6, 5]))
        tensor([0.7000])
    """
    places = torch.arange(len(ids), device=ids.device)
    return _mean_on(weights, places[None, :] == places[:, None] - 1)


@jaxtyped(typechecker=beartype)
def duplicate_token(weights: Float[Tensor, "head query key"], ids: Int[Tensor, " query"]) -> Float[Tensor, " head"]:
    """Attention on the earlier places of the query's own token, mean over the queries that have any (arXiv 2211.00593).

    Example:
        >>> weights = torch.tensor([[[1.0, 0.0, 0.0], [0.8, 0.2, 0.0], [0.3, 0.6, 0.1]]])
        >>> duplicate_token(weights, torch.tensor([5, 6, 5]))
        tensor([0.3000])
    """
    return _mean_on(weights, _earlier_equal(ids))


@jaxtyped(typechecker=beartype)
def induction(weights: Float[Tensor, "head query key"], ids: Int[Tensor, " query"]) -> Float[Tensor, " head"]:
    """Attention on what followed the last earlier place of the query's token, mean over the queries that have one.

    Example:
        >>> weights = torch.tensor([[[1.0, 0.0, 0.0], [0.8, 0.2, 0.0], [0.3, 0.6, 0.1]]])
        >>> induction(weights, torch.tensor([5, 6, 5]))
        tensor([0.6000])
    """
    equal = _earlier_equal(ids)
    keys = torch.arange(len(ids), device=ids.device)
    last = torch.where(equal, keys, -1).amax(dim=-1, keepdim=True)
    return _mean_on(weights, _after(equal & (keys == last)))


@jaxtyped(typechecker=beartype)
def prefix_matching(weights: Float[Tensor, "head query key"], ids: Int[Tensor, " query"]) -> Float[Tensor, " head"]:
    """Attention on what followed any earlier place of the query's token (arXiv 2209.11895, prefix matching score).

    Example:
        >>> weights = torch.full((1, 5, 5), 0.2)
        >>> prefix_matching(weights, torch.tensor([5, 6, 5, 6, 5]))    # 0.2 for two queries, 0.4 for the last
        tensor([0.2667])
    """
    return _mean_on(weights, _after(_earlier_equal(ids)))


def _earlier_equal(ids: Tensor) -> Tensor:
    """Bool `[query, key]`: keys before the query that hold its token."""
    return (ids[:, None] == ids[None, :]).tril(-1)


def _after(places: Tensor) -> Tensor:
    """The places one further on: of keys before the query, so at most the query itself."""
    return places.roll(1, dims=1)


def _mean_on(weights: Tensor, places: Tensor) -> Tensor:
    """Weights summed over the marked keys, mean over the queries with any; NaN where no query has one."""
    marked = places.any(dim=-1)
    return (weights * places).sum(dim=-1)[:, marked].mean(dim=-1)


HEAD_TYPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "previous_token": previous_token,
    "duplicate_token": duplicate_token,
    "induction": induction,
    "prefix_matching": prefix_matching,
}
"""Every head type by its column: functions of weights `[head, query, key]` and token ids `[query]` of one prompt."""


def repeated_tokens(
    model: HookedModel, *, n_prompts: int, n_distinct: int = N_DISTINCT, n_repeats: int = N_REPEATS, seed: int = 0
) -> Tensor:
    """Prompts of random tokens, each `n_distinct` different ones over and over, without special tokens.

    Returns:
        Int64 `[prompt, n_distinct * n_repeats]`.

    Raises:
        LccpError: fewer than 1 prompt, 2 tokens or 2 repeats, or more tokens than the vocabulary has.
    """
    if n_prompts < 1 or n_distinct < 2 or n_repeats < 2:
        raise LccpError(
            f"head types need at least 1 prompt of 2 tokens twice, got {n_prompts} of {n_distinct} tokens "
            f"{n_repeats} times"
        )
    size = min(len(model.tokenizer), model.model.get_input_embeddings().weight.shape[0])
    plain = torch.tensor([token for token in range(size) if token not in set(model.tokenizer.all_special_ids)])
    if len(plain) < n_distinct:
        raise LccpError(f"{n_distinct} different tokens asked for, {model.name} has {len(plain)}; ask for fewer")
    generator = torch.Generator().manual_seed(seed)
    drawn = [plain[torch.randperm(len(plain), generator=generator)[:n_distinct]] for _ in range(n_prompts)]
    return torch.stack(drawn).repeat(1, n_repeats)


@torch.inference_mode()
def head_types(
    model: HookedModel,
    *,
    n_prompts: int = 8,
    n_distinct: int = N_DISTINCT,
    n_repeats: int = N_REPEATS,
    seed: int = 0,
) -> pl.DataFrame:
    """How much every head is of each type, on repeated random tokens.

    A tokenizer's beginning-of-text tokens stand in front of every prompt, as they do in text, and count as neither
    query nor key.

    Args:
        model: the checkpoint, loaded.
        n_prompts: random prompts; the scores are means over them.
        n_distinct: different tokens in a prompt.
        n_repeats: how often they stand in it.
        seed: of the tokens.

    Returns:
        Columns layer, head, previous_token, duplicate_token, induction, prefix_matching (0..1), n (prompts); by layer
        and head. Attention spread evenly would give `previous_token` the mean of 1 / (i + 1) over the queries i.

    Raises:
        LccpError: out of range, or a model none of whose layers has attention.

    Example:
        >>> from lccp_interp.capture.model import load_model
        >>> from lccp_interp.checkpoints import bundled_trajectory
        >>> table = head_types(load_model(bundled_trajectory()[-1].path), n_prompts=2)
        >>> table.columns
        ['layer', 'head', 'previous_token', 'duplicate_token', 'induction', 'prefix_matching', 'n']
    """
    import polars as pl

    tokens = repeated_tokens(model, n_prompts=n_prompts, n_distinct=n_distinct, n_repeats=n_repeats, seed=seed)
    front = torch.tensor(PieceEncoder(model.tokenizer).prefix, dtype=torch.long)
    ids = torch.cat([front.expand(n_prompts, -1), tokens], dim=1)
    found: dict[int, Tensor] = {}

    def reduce(layer: int, weights: Tensor) -> None:
        own = weights[..., len(front) :]
        per_prompt = [
            torch.stack([score(own[prompt], tokens[prompt].to(own.device)) for score in HEAD_TYPES.values()])
            for prompt in range(n_prompts)
        ]
        found[layer] = torch.stack(per_prompt).mean(dim=0)

    with tap_rows(model.model, torch.arange(len(front), ids.shape[1]), reduce):
        model.forward(ids, 1)
    if not found:
        raise LccpError(f"checkpoint {model.name}: no attention layer reported any rows; there are no heads")
    records = [
        {"layer": layer, "head": head, **dict(zip(HEAD_TYPES, scores, strict=True)), "n": n_prompts}
        for layer, by_type in sorted(found.items())
        for head, scores in enumerate(by_type.T.tolist())
    ]
    return pl.DataFrame(records)
