"""Head metrics: what the attention rows of one case say about each head of one layer.

A metric is a pure function from `AttentionRows` to one float32 per head. The *row* of answer token t is the query
position that predicts it; its *attended position* is the arg-max over the keys that it may see. Source is the part of
the needle that the answer copies; a case in which nothing is copied scores 0.

What a metric needs beyond the rows of the answer, it declares as a `HeadMetric`: rows of the question's tokens, what
keys would add to the answer's logit, the same rows under a question without content. What no metric asks for is not
computed. Metrics measure different things and keep their own names; how far they agree is a table of
`dynamics.agreement`. `scoring.types` has the head types that want a prompt of their own.

Nothing here reads files, keeps state (but for the names of metrics) or averages over cases. Cost: one arg-max over
`[head, event, key]` shared by all metrics, the rest is `[head, event]`; `locos` and `dla` a product with the values.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from lccp_interp.schema import NULL_SUFFIX, Case, LccpError, Span

SINK_TOKENS = 4
"""First tokens that `streaming` counts as the sink (as many as StreamingLLM keeps, arXiv 2309.17453)."""

RECENT_TOKENS = 64
"""Last tokens that `streaming` counts as recent."""


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class AttentionRows:
    """Attention of one layer's heads at the copy events of one case, or at the tokens of its question.

    Attributes:
        weights: float32 `[head, event, key]`, each row sums to 1 (or less, beside an attention sink); event t predicts
            answer token t. The last event stands at the last key, the others right before it.
        prompt_ids: int64 `[token]`, on the device of the weights; keys beyond them are earlier answer tokens.
        answer_ids: int64 `[event]`, what follows each row's own token: the answer, or the rest of the question.
        source: the part of the prompt that is asked about: what the answer copies, or for a metric that declares
            `span="needle"` the whole needle.
        logit_gain: float32 `[head, event, key]`, what all of a head's attention on a key would add to the logit of the
            event's answer token (`capture.readout`); only for a metric that declares `needs_values`.
        null_weights: float32 `[head, key]`, attention under a question without content, mean over its tokens, NaN at
            keys that are in no span asked about; only for a metric that declares `needs_null_query`.
    """

    weights: Float[Tensor, "head event key"]
    prompt_ids: Int[Tensor, " token"]
    answer_ids: Int[Tensor, " event"]
    source: Span
    logit_gain: Float[Tensor, "head event key"] | None = None
    null_weights: Float[Tensor, "head key"] | None = None

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

    @cached_property
    def seen(self) -> Bool[Tensor, "event key"]:
        """Whether a key stands at or before the row's own position."""
        n_events, n_keys = self.weights.shape[1:]
        keys = torch.arange(n_keys, device=self.weights.device)
        return keys[None, :] <= keys[n_keys - n_events :, None]

    @property
    def source_ids(self) -> Int[Tensor, " source"]:
        """Token ids of the source."""
        return self.prompt_ids[self.source.start : self.source.end]


MetricFunction = Callable[[AttentionRows], Tensor]
"""Takes the rows of one case in one layer, gives float32 `[head]`."""

RowsOf = Literal["events", "question"]
SpanOf = Literal["source", "needle"]


@dataclass(frozen=True)
class HeadMetric:
    """A metric by name, with what its function needs; calling it calls the function.

    Attributes:
        name: in the tables.
        function: from the rows of one case and layer to float32 `[head]`; it changes nothing.
        rows: `events`, the positions that predict the answer, or `question`, those of the question's own tokens.
        span: what `rows.source` is: the needle's part that the answer copies (`source`), or the whole `needle`.
        needs_values: whether it reads `rows.logit_gain`; only of events.
        needs_null_query: whether it reads `rows.null_weights`; only of the question. Costs a pass more per case.
        about_span: whether the score depends on `rows.source`. One that does not is the same on a decoy span: its null
            is the score itself, so that no head is ever above it.

    Raises:
        LccpError: a name that a table could not hold, or needs that contradict each other.
    """

    name: str
    function: MetricFunction
    rows: RowsOf = "events"
    span: SpanOf = "source"
    needs_values: bool = False
    needs_null_query: bool = False
    about_span: bool = True

    def __post_init__(self) -> None:
        if not self.name or NULL_SUFFIX in self.name or "," in self.name:
            raise LccpError(f"metric name {self.name!r}: expected a text without a comma and without {NULL_SUFFIX!r}")
        for field, known in (("rows", get_args(RowsOf)), ("span", get_args(SpanOf))):
            if getattr(self, field) not in known:
                got = getattr(self, field)
                raise LccpError(f"metric {self.name}: {field} must be {' or '.join(known)}, got {got!r}")
        if self.needs_values and self.rows != "events":
            raise LccpError(f"metric {self.name}: needs_values goes with rows='events', the tokens of an answer")
        if self.needs_null_query and self.rows != "question":
            raise LccpError(f"metric {self.name}: needs_null_query goes with rows='question'")

    def __call__(self, rows: AttentionRows) -> Tensor:
        return self.function(rows)


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


@jaxtyped(typechecker=beartype)
def qrscore(rows: AttentionRows) -> Float[Tensor, " head"]:
    """Query-focused retrieval score of QRHead (arXiv 2506.09944), calibrated.

    Of each needle token: the attention it gets from the question's tokens, their mean, minus the same under the
    question "N/A". Needle tokens whose difference lies below the needle's mean - 2 sigma (of all its tokens) are
    dropped, the others summed. In -1..1. The paper finds its heads by the attention as it is and calibrates where it
    ranks passages with them; here one number is both.

    Example:
        >>> weights = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.1, 0.5, 0.2, 0.2]]])  # needle at 1..2, question at 2..3
        >>> rows = AttentionRows(weights, torch.tensor([5, 7, 8, 9]), torch.tensor([9, 6]), Span(1, 3),
        ...                      null_weights=torch.tensor([[0.5, 0.1, 0.3, 0.1]]))
        >>> qrscore(rows)                                             # (0.4 - 0.1) + (0.2 - 0.3)
        tensor([0.2000])
    """
    null = rows.null_weights
    if null is None:
        raise LccpError("qrscore reads rows.null_weights; declare it with needs_null_query=True")
    inside = slice(rows.source.start, rows.source.end)
    calibrated = rows.weights[:, :, inside].mean(dim=1) - null[:, inside]
    mean, sigma = calibrated.mean(dim=-1, keepdim=True), calibrated.std(dim=-1, correction=0, keepdim=True)
    return calibrated.masked_fill(calibrated < mean - 2 * sigma, 0).sum(dim=-1)


@jaxtyped(typechecker=beartype)
def locos(rows: AttentionRows) -> Float[Tensor, " head"]:
    """Logit contribution score of LOCOS (arXiv 2607.01002): what a head carries from the needle to the answer's logit.

    phi_j = alpha_j u_y^T W_O v_j is what key j adds, through the head, to the logit of answer token y. The score is the
    sum of phi over the needle minus (|needle| / |off-needle|) times the sum over the other keys that the row may see,
    mean over the answer's tokens. In logits before the final norm's division, so of one model to be ranked, not a
    fraction; `capture.readout` says what u_y and W_O are. Finds heads that retrieve without copying token by token.

    Example:
        >>> weights, gain = torch.tensor([[[0.2, 0.6, 0.2]]]), torch.tensor([[[1.0, 3.0, -1.0]]])
        >>> locos(AttentionRows(weights, torch.tensor([5, 7, 8]), torch.tensor([7]), Span(1, 2), logit_gain=gain))
        tensor([1.8000])
    """
    phi, seen = _contributions(rows), rows.seen
    needle = torch.zeros_like(seen)
    needle[:, rows.source.start : rows.source.end] = True
    needle, others = needle & seen, seen & ~needle
    share = needle.sum(dim=-1) / others.sum(dim=-1).clamp(min=1)
    return ((phi * needle).sum(dim=-1) - share * (phi * others).sum(dim=-1)).mean(dim=-1)


@jaxtyped(typechecker=beartype)
def dla(rows: AttentionRows) -> Float[Tensor, " head"]:
    """Direct logit attribution: what a head adds to the answer token's logit, wherever it looks.

    The sum of `locos`'s phi over all keys, mean over the answer's tokens, in the same unit. (The term is of the
    transformer-circuits literature, see Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".)

    Example:
        >>> weights, gain = torch.tensor([[[0.2, 0.6, 0.2]]]), torch.tensor([[[1.0, 3.0, -1.0]]])
        >>> dla(AttentionRows(weights, torch.tensor([5, 7, 8]), torch.tensor([7]), Span(1, 2), logit_gain=gain))
        tensor([1.8000])
    """
    return _contributions(rows).sum(dim=-1).mean(dim=-1)


def _contributions(rows: AttentionRows) -> Tensor:
    """phi `[head, event, key]`."""
    if rows.logit_gain is None:
        raise LccpError("locos and dla read rows.logit_gain; declare a metric of it with needs_values=True")
    return rows.weights * rows.logit_gain


@jaxtyped(typechecker=beartype)
def sink_mass(rows: AttentionRows) -> Float[Tensor, " head"]:
    """Attention on the first token, mean over the answer's tokens: the attention sink of arXiv 2309.17453. In 0..1.

    Example:
        >>> weights = torch.tensor([[[0.1, 0.8, 0.1, 0.0], [0.3, 0.1, 0.5, 0.1]]])
        >>> sink_mass(AttentionRows(weights, torch.tensor([5, 7, 8]), torch.tensor([7, 8]), Span(1, 3)))
        tensor([0.2000])
    """
    return rows.weights[:, :, 0].mean(dim=-1)


@jaxtyped(typechecker=beartype)
def entropy(rows: AttentionRows) -> Float[Tensor, " head"]:
    """Entropy of the attention (nats), mean over the answer's tokens: 0 for one key, ln(keys) for all alike.

    Example:
        >>> weights = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]])
        >>> entropy(AttentionRows(weights, torch.tensor([5, 7]), torch.tensor([7, 8]), Span(1, 2)))   # ln 2 / 2
        tensor([0.3466])
    """
    return torch.special.entr(rows.weights).sum(dim=-1).mean(dim=-1)


@jaxtyped(typechecker=beartype)
def streaming(rows: AttentionRows, sink: int = SINK_TOKENS, recent: int = RECENT_TOKENS) -> Float[Tensor, " head"]:
    """Share of the attention that stays within the first `sink` and the last `recent` tokens, mean over the answer's.

    Near 1 is what DuoAttention (arXiv 2410.10819) calls a streaming head, which needs no more of the past than that.
    That paper learns a gate per head; this reads the rows, so it is like it and not the same. In 0..1. Where prompts
    are not much longer than `sink + recent`, every head streams; for other sizes register it anew, with
    `functools.partial(streaming, sink=64, recent=256)`.

    Example:
        >>> weights = torch.tensor([[[0.2, 0.5, 0.1, 0.2]]])
        >>> rows = AttentionRows(weights, torch.tensor([5, 7, 8, 9]), torch.tensor([7]), Span(1, 3))
        >>> streaming(rows, sink=1, recent=1)
        tensor([0.4000])
    """
    n_events, n_keys = rows.weights.shape[1:]
    keys = torch.arange(n_keys, device=rows.weights.device)
    near = (keys[None, :] < sink) | (keys[None, :] > keys[n_keys - n_events :, None] - recent)
    kept = (rows.weights * near).sum(dim=-1)
    return (kept / rows.weights.sum(dim=-1)).mean(dim=-1)


METRICS: dict[str, HeadMetric] = {
    metric.name: metric
    for metric in (
        HeadMetric("retrieval", retrieval),
        HeadMetric("wu", wu),
        HeadMetric("copy", copy),
        HeadMetric("needle_mass", needle_mass),
        HeadMetric("qrscore", qrscore, rows="question", span="needle", needs_null_query=True),
        HeadMetric("locos", locos, span="needle", needs_values=True),
        HeadMetric("dla", dla, needs_values=True, about_span=False),
        HeadMetric("sink_mass", sink_mass, about_span=False),
        HeadMetric("entropy", entropy, about_span=False),
        HeadMetric("streaming", streaming, about_span=False),
    )
}
"""Every head metric by the name it has in the tables."""


def register_metric(
    name: str,
    function: MetricFunction,
    *,
    rows: RowsOf = "events",
    span: SpanOf = "source",
    needs_values: bool = False,
    needs_null_query: bool = False,
    about_span: bool = True,
) -> HeadMetric:
    """Add a metric of one's own to `METRICS`, so that it can be asked for by name; arguments as in `HeadMetric`.

    Raises:
        LccpError: the name is taken, or what `HeadMetric` raises.

    Example:
        >>> def last_source_token(rows):
        ...     return rows.weights[:, :, rows.source.end - 1].mean(dim=-1)
        >>> metric = register_metric("last_source_token", last_source_token)
        >>> list(select_metrics(["copy", "last_source_token"]))
        ['copy', 'last_source_token']
        >>> register_metric("copy", last_source_token)
        Traceback (most recent call last):
        lccp_interp.schema.LccpError: metric 'copy' is there already; choose another name
        >>> del METRICS["last_source_token"]
    """
    if name in METRICS:
        raise LccpError(f"metric {name!r} is there already; choose another name")
    METRICS[name] = HeadMetric(name, function, rows, span, needs_values, needs_null_query, about_span)
    return METRICS[name]


def select_metrics(names: Iterable[str] | Mapping[str, HeadMetric | MetricFunction]) -> dict[str, HeadMetric]:
    """The metrics called `names`, in that order; a mapping gives the functions itself.

    Args:
        names: out of `METRICS`; or metrics by name, a plain function being one of the answer's rows and the source.

    Raises:
        LccpError: an unknown name; the known ones are listed and the nearest is suggested.

    Example:
        >>> select_metrics({"mine": needle_mass})["mine"].rows
        'events'
    """
    if isinstance(names, Mapping):
        given = {
            name: replace(metric, name=name) if isinstance(metric, HeadMetric) else HeadMetric(name, metric)
            for name, metric in names.items()
        }
        return given or select_metrics(())
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


def check_cases(cases: Sequence[Case], metrics: Mapping[str, HeadMetric]) -> None:
    """Refuse metrics that read what the cases do not say.

    Raises:
        LccpError: a metric reads the question's tokens, and a case does not know where they are.
    """
    asking = [name for name, metric in metrics.items() if metric.rows == "question"]
    unknown = [case.case_id for case in cases if case.question is None]
    if asking and unknown:
        raise LccpError(
            f"metric {', '.join(asking)} reads the question's tokens, and {len(unknown)} of {len(cases)} cases do not "
            f"say where they stand (first {unknown[0]}; runs from before that was kept do not, nor do tokenizers that "
            "do not decode to the text); leave the metric out, or score into a new folder"
        )
