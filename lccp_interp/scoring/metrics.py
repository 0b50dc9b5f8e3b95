"""Head metrics: what the attention rows of one case say about each head of one layer.

A metric is a pure function from `AttentionRows` to one float32 per head. The *row* of answer token t is the query
position that predicts it; its *attended position* is the arg-max over the keys that it may see. Source is the part of
the needle that the answer copies; a case in which nothing is copied scores 0. Nothing here reads files, keeps state or
averages over cases. Cost: one arg-max over `[head, event, key]` shared by all metrics, the rest is `[head, event]`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from lccp_interp.schema import LccpError, Span


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class AttentionRows:
    """Attention of one layer's heads at the copy events of one case.

    Attributes:
        weights: float32 `[head, event, key]`, each row sums to 1 (or less, beside an attention sink); event t predicts
            answer token t.
        prompt_ids: int64 `[token]`, on the device of the weights; keys beyond them are earlier answer tokens.
        answer_ids: int64 `[event]`.
        source: the part of the prompt that the answer copies.
    """

    weights: Float[Tensor, "head event key"]
    prompt_ids: Int[Tensor, " token"]
    answer_ids: Int[Tensor, " event"]
    source: Span

    @cached_property
    def attended(self) -> Int[Tensor, "head event"]:
        """Arg-max key position per head and event; the first of equals."""
        return self.weights.argmax(dim=-1)

    @cached_property
    def hits(self) -> Bool[Tensor, "head event"]:
        """Whether the attended position lies in the source and holds the token to be predicted."""
        in_source = (self.attended >= self.source.start) & (self.attended < self.source.end)
        token = self.prompt_ids[self.attended.clamp(max=self.prompt_ids.numel() - 1)]
        return in_source & (token == self.answer_ids)

    def over(self, source: Span) -> AttentionRows:
        """The same rows, read as if `source` were what the answer copies."""
        rows = replace(self, source=source)
        rows.__dict__["attended"] = self.attended  # where a head looks does not depend on it
        return rows

    @property
    def source_ids(self) -> Int[Tensor, " source"]:
        """Token ids of the source."""
        return self.prompt_ids[self.source.start : self.source.end]


HeadMetric = Callable[[AttentionRows], Tensor]


@jaxtyped(typechecker=beartype)
def retrieval(rows: AttentionRows) -> Float[Tensor, " head"]:
    """Retrieval score |g n k| / |k| of arXiv 2604.02650, Eq. 1.

    k is the set of the source's token ids, g the set of answer tokens whose row attends, by arg-max, to an equal token
    inside the source. Sets: a token copied twice counts once. In 0..1; where the tokenizer gives the answer's first
    word another token after the cue than in the needle (in the paper's form the needle opens a line), that token can
    not be hit and the score stays below 1.

    Example:
        >>> weights = torch.tensor([[[0.1, 0.8, 0.1, 0.0], [0.1, 0.8, 0.0, 0.1]]])  # one head, two events, four keys
        >>> rows = AttentionRows(weights, torch.tensor([5, 7, 8]), torch.tensor([7, 8]), Span(1, 3))
        >>> retrieval(rows)      # copies 7 of {7, 8}; for 8 it looks at 7
        tensor([0.5000])
    """
    distinct = rows.source_ids.unique()
    event_is_token = rows.answer_ids[:, None] == distinct[None, :]
    copied = (rows.hits[:, :, None] & event_is_token[None]).any(dim=1)
    return copied.sum(dim=-1).float() / distinct.numel()


@jaxtyped(typechecker=beartype)
def wu(rows: AttentionRows) -> Float[Tensor, " head"]:
    """Retrieval score as the reference code of arXiv 2404.15574 counts it.

    Every hit adds 1 / |source| (tokens, not distinct ids), repeats count, so that an answer longer than the source can
    score above 1. That code decodes and drops trials whose output misses the needle, as `generate.score_generated`
    does; teacher-forced, the answer is given and every case counts.

    Example:
        >>> weights = torch.tensor([[[0.1, 0.8, 0.1, 0.0], [0.1, 0.1, 0.7, 0.1]]])
        >>> wu(AttentionRows(weights, torch.tensor([5, 7, 8]), torch.tensor([7, 8]), Span(1, 3)))
        tensor([1.])
    """
    return rows.hits.sum(dim=-1).float() / len(rows.source)


@jaxtyped(typechecker=beartype)
def copy(rows: AttentionRows) -> Float[Tensor, " head"]:
    """Exact-source copy score: like `wu`, but the attended position must be the very source of the answer token.

    A head that looks at another occurrence of the same token in the source gets no credit. Answer and source are
    aligned as the longest run of equal tokens, then the rest left and right of it, so that a differing first token
    (other blanks in front) shifts nothing. In 0..1.

    Example:
        >>> weights = torch.tensor([[[0.1, 0.8, 0.1, 0.0], [0.0, 0.9, 0.1, 0.0]]])
        >>> copy(AttentionRows(weights, torch.tensor([5, 7, 7]), torch.tensor([7, 7]), Span(1, 3)))  # second 7 is at 2
        tensor([0.5000])
    """
    expected = torch.tensor(source_positions(rows.source_ids.tolist(), rows.answer_ids.tolist(), rows.source))
    found = rows.attended == expected.to(rows.attended.device)
    return found.sum(dim=-1).float() / len(rows.source)


def source_positions(source_ids: list[int], answer_ids: list[int], source: Span) -> list[int]:
    """Prompt position that each answer token copies, -1 for a token without one.

    Example:
        >>> source_positions([4, 7, 8], [3, 7, 8], Span(10, 13))
        [-1, 11, 12]
    """
    positions = [-1] * len(answer_ids)
    matcher = difflib.SequenceMatcher(a=source_ids, b=answer_ids, autojunk=False)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            positions[block.b + offset] = source.start + block.a + offset
    return positions


@jaxtyped(typechecker=beartype)
def needle_mass(rows: AttentionRows) -> Float[Tensor, " head"]:
    """Attention summed over the source, mean over the answer's tokens. In 0..1.

    Example:
        >>> weights = torch.tensor([[[0.1, 0.8, 0.1, 0.0], [0.1, 0.1, 0.7, 0.1]]])
        >>> needle_mass(AttentionRows(weights, torch.tensor([5, 7, 8]), torch.tensor([7, 8]), Span(1, 3)))
        tensor([0.8500])
    """
    return rows.weights[:, :, rows.source.start : rows.source.end].sum(dim=-1).mean(dim=-1)


METRICS: dict[str, HeadMetric] = {"retrieval": retrieval, "wu": wu, "copy": copy, "needle_mass": needle_mass}
"""Every head metric by the name it has in the tables."""


def select_metrics(names: Iterable[str]) -> dict[str, HeadMetric]:
    """The metrics called `names`, in that order.

    Raises:
        LccpError: an unknown name; the known ones are listed and the nearest is suggested.
    """
    chosen = {}
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LccpError(f"unknown metric {name!r}; known: {', '.join(METRICS)}{hint}")
        chosen[name] = METRICS[name]
    if not chosen:
        raise LccpError(f"no metric asked for; known: {', '.join(METRICS)}")
    return chosen
