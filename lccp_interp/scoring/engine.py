"""The engine: run cases through a model and turn every layer's rows into head scores on the way.

There are two ways through a set of cases, and the cheaper one is taken. *Together*: cases of one total length share a
batch; their answers end at the same position, so no padding is ever needed and the rows of the longest answer hold
those of the others. *Along the prefix tree*: one case after another, each only from where it leaves the one before,
long ones in chunks. The scores are the same to float tolerance.

Rows are reduced inside the forward pass, layer by layer, on the layer's device; what leaves the device is one float32
number per metric and head. It refuses to know files and trajectories. Cost: at most one prefill per case, plus E x T
attention per layer for E answer tokens; a pass that runs out of memory is repeated in smaller pieces. Through another
library (`backend`) every prompt runs whole, with its T x T attention.

Metrics that declare more cost more: the question's rows a few queries, values a product per layer, the question without
content a pass over its tokens behind the context (a whole prefill for models that cannot go on from a cache).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.prefill import CHUNK_TOKENS, Prefill, out_of_memory, release_memory
from lccp_interp.capture.readout import LogitReader
from lccp_interp.capture.rows import AttentionCall, RowSink, edit_attention
from lccp_interp.capture.views import LIBRARIES, OWN, check_backend, prove_values, row_reader
from lccp_interp.schema import NULL_SUFFIX, Case, CaseResult, LccpError, Span
from lccp_interp.scoring.metrics import (
    AttentionRows,
    HeadMetric,
    MetricFunction,
    RowsOf,
    SpanOf,
    check_cases,
    select_metrics,
)
from lccp_interp.tasks.decoys import decoy_spans
from lccp_interp.tasks.pieces import PieceEncoder
from lccp_interp.tasks.prefixes import tokens_run, walk

BATCH_TOKENS = 4096
"""Tokens per forward pass; longer prompts go one by one. More buys nothing on a CPU and costs memory."""

PASS_TOKENS = 256
"""What one more forward pass costs, in tokens: the walk has a pass per case, batches have fewer."""

Sharing = Literal["auto", "on", "off"]


def score_cases(
    model: HookedModel,
    cases: Sequence[Case],
    metrics: Mapping[str, HeadMetric | MetricFunction],
    *,
    sharing: Sharing = "auto",
    batch_tokens: int = BATCH_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
    backend: str = OWN,
    on_tokens: Callable[[int], None] | None = None,
) -> list[CaseResult]:
    """Score every head on every case, teacher-forced.

    Args:
        model: the checkpoint, loaded.
        cases: prompts with spans; any lengths, any order.
        metrics: by the name they get in the results; a plain function reads the rows of the answer (`HeadMetric`).
        sharing: whether cases run along their prefix tree; `auto` where that is cheaper and the model's cache can be
            cropped. A model whose cache cannot be cropped runs every prompt whole, with a warning if that costs.
        batch_tokens: tokens per forward pass of a batch (at least one case goes in).
        chunk_tokens: tokens per forward pass of a long prompt.
        backend: whose attention is scored: `transformers` (our tap), `transformer_lens` or `nnsight`, which run every
            prompt whole, so that `sharing` and `chunk_tokens` mean nothing to them.
        on_tokens: told the lengths of the cases as they are finished, for progress.

    Returns:
        One result per case, in the order of `cases`. Beside each metric stands its null, `NAME@decoy`: the mean of the
        same metric over decoy spans of the source's length elsewhere in the prompt; NaN where there is no room, the
        score itself where a metric asks about no span.

    Raises:
        LccpError: NaN logits, naming the checkpoint and the case; a model none of whose layers has attention; out of
            memory in the smallest chunks; a metric that cases, model or backend do not have the means for; an unknown
            backend, or a model that its library does not support.
    """
    chosen = select_metrics(metrics)
    check_cases(cases, chosen)
    check_backend(backend)
    reader = logit_reader(model, chosen)
    if backend != OWN and reader is not None:
        prove_values(model, backend)
    done: dict[int, CaseResult] = {}
    prefill = Prefill(model, chunk_tokens=chunk_tokens)

    def finish(index: int, result: CaseResult) -> None:
        done[index] = result
        if on_tokens is not None:
            on_tokens(cases[index].length)

    # A question without content is run behind its case's own context, which a batch does not leave behind.
    calibrated = any(metric.needs_null_query for metric in chosen.values()) and model.shares_prefixes
    if backend == OWN and (calibrated or shares(model, cases, sharing, batch_tokens)):
        for visit in walk(cases):
            if sharing == "off":
                prefill.forget()
            finish(visit.index, score_alone(prefill, cases[visit.index], chosen, reader))
        return [done[index] for index in range(len(cases))]
    for batch in _batches(cases, batch_tokens):
        together = [cases[index] for index in batch]
        chunked = backend == OWN and model.shares_prefixes
        if len(batch) == 1 and together[0].length > chunk_tokens and chunked:
            results = [score_alone(prefill, together[0], chosen, reader)]
        else:
            results = _score_together(prefill, together, chosen, reader, backend)
        prefill.forget()
        for index, result in zip(batch, results, strict=True):
            finish(index, result)
    return [done[index] for index in range(len(cases))]


def shares(
    model: HookedModel, cases: Sequence[Case], sharing: Sharing = "auto", batch_tokens: int = BATCH_TOKENS
) -> bool:
    """Whether `score_cases` runs these cases along their prefix tree."""
    if sharing == "off" or len(cases) < 2:
        return False
    visits = walk(cases)
    naive = sum(visit.fed for visit in visits)
    cost_shared = tokens_run(visits) + PASS_TOKENS * len(cases)
    cheaper = cost_shared < naive + PASS_TOKENS * len(_batches(cases, batch_tokens))
    if not model.shares_prefixes and (cheaper or sharing == "on"):
        warnings.warn(
            f"checkpoint {model.name}: {model.sharing_obstacle}, so prompts are run whole: {naive:,} tokens where "
            f"shared prefixes would leave {tokens_run(visits):,}",
            stacklevel=2,
        )
    return model.shares_prefixes and (cheaper or sharing == "on")


def _batches(cases: Sequence[Case], batch_tokens: int) -> list[list[int]]:
    """Indices of cases of one total length, at most `batch_tokens` tokens together."""
    by_length: dict[int, list[int]] = {}
    for index, case in enumerate(cases):
        by_length.setdefault(case.length, []).append(index)
    batches = []
    for n_tokens, indices in sorted(by_length.items()):
        size = max(1, batch_tokens // n_tokens)
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    return batches


def logit_reader(model: HookedModel, metrics: Mapping[str, HeadMetric]) -> LogitReader | None:
    """What reads values as logits, if a metric needs it.

    Raises:
        LccpError: the model's values cannot be read so.
    """
    return LogitReader.of(model) if any(metric.needs_values for metric in metrics.values()) else None


def score_alone(
    prefill: Prefill, case: Case, metrics: Mapping[str, HeadMetric], reader: LogitReader | None
) -> CaseResult:
    """Score one case behind whatever the cache shares with it; `reader` is `logit_reader` of model and metrics."""
    reduced = _Reduced([case], metrics, reader)
    reduced.run_null_queries(prefill)
    ids = case.prompt_ids + case.answer_ids[:-1]
    with reduced.reading_values(prefill.model):
        logits = prefill.run(ids, len(ids) - reduced.n_rows, reduced.add)
    return reduced.results(prefill.model, logits[None])[0]


def _score_together(
    prefill: Prefill,
    cases: Sequence[Case],
    metrics: Mapping[str, HeadMetric],
    reader: LogitReader | None,
    backend: str,
) -> list[CaseResult]:
    """Score cases of one total length in one forward pass; one by one, if that does not fit."""
    model = prefill.model
    reduced = _Reduced(cases, metrics, reader)
    try:
        reduced.run_null_queries(prefill, backend)
        options: dict[str, Any] = {} if reader is None else {"values": reduced.add_values}
        if backend != OWN:
            options["backend"] = backend
        logits = model.answer_logits(reduced.sequences, reduced.n_rows, reduced.add, **options)
        return reduced.results(model, logits)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if backend != OWN and len(cases) == 1:
            raise LccpError(
                f"checkpoint {model.name}: out of memory on {cases[0].length} tokens through {LIBRARIES[backend]}, "
                f"which runs every prompt whole; use backend {OWN!r}, or shorter --lengths"
            ) from error
    release_memory()
    if backend != OWN:
        return [result for case in cases for result in _score_together(prefill, [case], metrics, reader, backend)]
    if len(cases) == 1:
        # Whole it did not fit: begin with halves.
        prefill.chunk_tokens = min(prefill.chunk_tokens, -(-cases[0].length // 2))
    return [score_alone(prefill, case, metrics, reader) for case in cases]


NULL_QUERY = "N/A"
"""The question without content (arXiv 2506.09944)."""


def null_query(tokenizer: Any, case: Case) -> tuple[tuple[int, ...], int]:
    """The case's prompt up to the end of its question, which asks nothing, and where that begins.

    Blanks and line breaks that the question's first and last tokens hold stay.
    """
    assert case.question is not None
    start, end = case.question.start, case.question.end
    encoder = PieceEncoder(tokenizer)
    # Decoded behind the token before it, for on its own a piece may lose its blank.
    before = encoder.decode(case.prompt_ids[start - 1 : start])
    text = encoder.decode(case.prompt_ids[start - 1 : end])[len(before) :]
    blank, tail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    (ids,) = encoder.middle([f"{blank}{NULL_QUERY}{tail}"])
    return (*case.prompt_ids[:start], *ids), start


@dataclass(frozen=True)
class _Spans:
    """What one kind of span is in a case: the span itself, and the decoys of its length."""

    own: Span
    decoys: tuple[Span, ...]


class _Reduced:
    """The rows of one pass, reduced to one `[case, metric, head]` tensor per layer, left on the layer's device.

    Every metric comes first, then the null of each. Only what some metric declares is computed.
    """

    def __init__(self, cases: Sequence[Case], metrics: Mapping[str, HeadMetric], reader: LogitReader | None) -> None:
        self.cases, self.metrics, self._reader = cases, metrics, reader
        self.sequences = torch.tensor([case.prompt_ids + case.answer_ids for case in cases])
        self.n_events = [len(case.answer_ids) for case in cases]
        kinds = {(metric.rows, metric.span) for metric in metrics.values()}
        self._spans = [{kind: _spans(case, *kind) for kind in kinds} for case in cases]
        self._asks = any(metric.rows == "question" for metric in metrics.values())
        self._calibrates = any(metric.needs_null_query for metric in metrics.values())
        self.n_rows = max(self.sequences.shape[1] - 1 - self._first_row(case) for case in cases)
        """Of the last positions fed, whose rows are read."""
        self.names = [*metrics, *(name + NULL_SUFFIX for name in metrics)]
        self._layers: dict[int, Tensor] = {}
        self._waiting: tuple[int, Tensor] | None = None
        self._null: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in cases]

    def _first_row(self, case: Case) -> int:
        """The first position whose row is read: where the question begins, or where the answer is predicted."""
        return case.question.start if self._asks and case.question is not None else len(case.prompt_ids) - 1

    def run_null_queries(self, prefill: Prefill, backend: str = OWN) -> None:
        """Run each case's prompt with a question without content, if a metric compares with that.

        Of its rows the mean is kept, at the keys of the spans that are asked about.
        """
        if not self._calibrates:
            return
        for case, spans, null in zip(self.cases, self._spans, self._null, strict=True):
            asked = [
                span for (rows, _), kind in spans.items() if rows == "question" for span in (kind.own, *kind.decoys)
            ]
            places = torch.tensor(sorted({place for span in asked for place in range(span.start, span.end)}))
            ids, start = null_query(prefill.model.tokenizer, case)
            sink = _mean_at(places, null)
            if backend == OWN:
                prefill.run(ids, start, sink)
                continue
            with torch.inference_mode():
                row_reader(prefill.model, backend)(torch.tensor([ids]), torch.arange(start, len(ids)), 1, sink)

    @contextlib.contextmanager
    def reading_values(self, model: HookedModel) -> Iterator[None]:
        """A context in which layers are reduced once their values are known, if a metric reads them."""
        if self._reader is None:
            yield
            return
        with edit_attention(model.model, self._with_values):
            yield

    def _with_values(self, call: AttentionCall) -> Tensor:
        if self._waiting is not None:
            self.add_values(call.layer, call.value)
        return call.output

    def add(self, layer: int, weights: Tensor) -> None:
        """The sink: weights `[case, head, row, key]` of one layer."""
        if self._reader is None:
            self._reduce(layer, weights, None)
        else:
            self._waiting = layer, weights

    def add_values(self, layer: int, values: Tensor) -> None:
        """The sink of values `[case, kv_head, key, d_value]`, told after that of the same layer's rows."""
        assert self._waiting is not None
        (waiting, weights), self._waiting = self._waiting, None
        assert waiting == layer
        self._reduce(layer, weights, values)

    def _reduce(self, layer: int, weights: Tensor, values: Tensor | None) -> None:
        on_device = self.sequences.to(weights.device)
        per_case = []
        for index, (ids, case_weights) in enumerate(zip(on_device, weights, strict=True)):
            events = self._events(index, layer, ids, case_weights, None if values is None else values[index])
            rows: dict[str, AttentionRows] = {"events": events}
            if self._asks:
                rows["question"] = self._question(index, layer, ids, case_weights)
            per_case.append(self._score(index, rows))
        self._layers[layer] = torch.stack(per_case)

    def _events(self, index: int, layer: int, ids: Tensor, weights: Tensor, values: Tensor | None) -> AttentionRows:
        n = self.n_events[index]
        gain = None if self._reader is None or values is None else self._reader.gains(layer, values, ids[-n:])
        return AttentionRows(weights[:, -n:], ids[:-n], ids[-n:], self.cases[index].source, gain)

    def _question(self, index: int, layer: int, ids: Tensor, weights: Tensor) -> AttentionRows:
        """Rows of the question's tokens; keys end with it."""
        case = self.cases[index]
        assert case.question is not None
        start, end = case.question.start, case.question.end
        first = weights.shape[2] - weights.shape[1]
        null = None
        if self._calibrates:
            places, means = self._null[index][layer]
            null = weights.new_full((weights.shape[0], end), torch.nan)
            null[:, places] = means
        own = weights[:, start - first : end - first, :end]
        return AttentionRows(own, ids[:end], ids[start + 1 : end + 1], case.source, null_weights=null)

    def _score(self, index: int, rows: Mapping[str, AttentionRows]) -> Tensor:
        """Every metric and its null, `[2 * metric, head]`."""
        read = {(kind, view.source): view for kind, view in rows.items()}

        def over(metric: HeadMetric, span: Span) -> AttentionRows:
            key = metric.rows, span
            if key not in read:
                read[key] = rows[metric.rows].over(span)
            return read[key]

        scores, nulls = [], []
        for metric in self.metrics.values():
            spans = self._spans[index][metric.rows, metric.span]
            score = metric(over(metric, spans.own))
            scores.append(score)
            if not metric.about_span:
                nulls.append(score)
            elif spans.decoys:
                nulls.append(torch.stack([metric(over(metric, decoy)) for decoy in spans.decoys]).mean(0))
            else:
                nulls.append(torch.full_like(score, torch.nan))
        return torch.stack([*scores, *nulls])

    def results(self, model: HookedModel, logits: Tensor) -> list[CaseResult]:
        """One result per case; `logits` `[case, event, vocabulary]` of the longest answer's events."""
        if not self._layers:
            raise LccpError(f"checkpoint {model.name}: no attention layer reported any rows; nothing could be scored")
        logits = logits.cpu()
        layers = tuple(sorted(self._layers))
        scores = torch.stack([self._layers[layer].float().cpu() for layer in layers], dim=2).numpy()
        results = []
        for index, (case, n) in enumerate(zip(self.cases, self.n_events, strict=True)):
            answer_logits, answer_ids = logits[index, -n:], self.sequences[index, -n:]
            if n_bad := int(answer_logits.isnan().sum()):
                half = model.dtype != "float32"
                raise LccpError(
                    f"checkpoint {model.name}, case {case.case_id}: {n_bad} of {answer_logits.numel()} logits are NaN; "
                    + (f"try --dtype float32 ({model.dtype} now)" if half else "its weights are broken")
                )
            loss = torch.nn.functional.cross_entropy(answer_logits, answer_ids, reduction="none")
            results.append(
                CaseResult(
                    case_id=case.case_id,
                    layers=layers,
                    scores={name: scores[index, m] for m, name in enumerate(self.names)},
                    answer_loss_nats=loss.numpy(),
                    greedy_ids=tuple(answer_logits.argmax(dim=-1).tolist()),
                )
            )
        return results


def _spans(case: Case, rows: RowsOf, span: SpanOf) -> _Spans:
    """Decoys for the question's tokens are in what they all see: the text before the question."""
    own = case.needle if span == "needle" else case.source
    end = case.question.start if rows == "question" and case.question is not None else None
    return _Spans(own, decoy_spans(case, length=len(own), before=end))


def _mean_at(places: Tensor, null: dict[int, tuple[Tensor, Tensor]]) -> RowSink:
    """A sink that keeps, of each layer, the mean row at some keys, `[head, place]`."""

    def keep(layer: int, weights: Tensor) -> None:
        at = places.to(weights.device)
        null[layer] = at, weights[0].mean(dim=1)[:, at]

    return keep
