"""The engine: run cases through a model and turn every layer's rows into head scores on the way.

There are two ways through a set of cases, and the cheaper one is taken. *Together*: cases of one total length share a
batch; their answers end at the same position, so no padding is ever needed and the rows of the longest answer hold
those of the others. *Along the prefix tree*: one case after another, each only from where it leaves the one before,
long ones in chunks. The scores are the same to float tolerance.

Rows are reduced inside the forward pass, layer by layer, on the layer's device; what leaves the device is one float32
number per metric and head. It refuses to know files and trajectories. Cost: at most one prefill per case, plus E x T
attention per layer for E answer tokens; a pass that runs out of memory is repeated in smaller pieces.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.prefill import CHUNK_TOKENS, Prefill, out_of_memory, release_memory
from lccp_interp.schema import NULL_SUFFIX, Case, CaseResult, LccpError
from lccp_interp.scoring.metrics import AttentionRows, HeadMetric
from lccp_interp.tasks.decoys import decoy_spans
from lccp_interp.tasks.prefixes import tokens_run, walk

BATCH_TOKENS = 4096
"""Tokens per forward pass; longer prompts go one by one. More buys nothing on a CPU and costs memory."""

PASS_TOKENS = 256
"""What one more forward pass costs, in tokens: the walk has a pass per case, batches have fewer."""

Sharing = Literal["auto", "on", "off"]


def score_cases(
    model: HookedModel,
    cases: Sequence[Case],
    metrics: Mapping[str, HeadMetric],
    *,
    sharing: Sharing = "auto",
    batch_tokens: int = BATCH_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
    on_tokens: Callable[[int], None] | None = None,
) -> list[CaseResult]:
    """Score every head on every case, teacher-forced.

    Args:
        model: the checkpoint, loaded.
        cases: prompts with spans; any lengths, any order.
        metrics: functions by the name they get in the results.
        sharing: whether cases run along their prefix tree; `auto` where that is cheaper and the model's cache can be
            cropped. A model whose cache cannot be cropped runs every prompt whole, with a warning if that costs.
        batch_tokens: tokens per forward pass of a batch (at least one case goes in).
        chunk_tokens: tokens per forward pass of a long prompt.
        on_tokens: told the lengths of the cases as they are finished, for progress.

    Returns:
        One result per case, in the order of `cases`. Beside each metric stands its null, `NAME@decoy`: the mean of the
        same metric over decoy spans of the source's length elsewhere in the prompt; NaN where there is no room.

    Raises:
        LccpError: NaN logits, naming the checkpoint and the case; a model none of whose layers has attention; out of
            memory in the smallest chunks.
    """
    done: dict[int, CaseResult] = {}
    prefill = Prefill(model, chunk_tokens=chunk_tokens)

    def finish(index: int, result: CaseResult) -> None:
        done[index] = result
        if on_tokens is not None:
            on_tokens(cases[index].length)

    if shares(model, cases, sharing, batch_tokens):
        for visit in walk(cases):
            finish(visit.index, score_alone(prefill, cases[visit.index], metrics))
        return [done[index] for index in range(len(cases))]
    for batch in _batches(cases, batch_tokens):
        chosen = [cases[index] for index in batch]
        if len(batch) == 1 and chosen[0].length > chunk_tokens and model.shares_prefixes:
            results = [score_alone(prefill, chosen[0], metrics)]
        else:
            results = _score_together(prefill, chosen, metrics)
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


def score_alone(prefill: Prefill, case: Case, metrics: Mapping[str, HeadMetric]) -> CaseResult:
    """Score one case behind whatever the cache shares with it."""
    reduced = _Reduced([case], metrics)
    ids = case.prompt_ids + case.answer_ids[:-1]
    logits = prefill.run(ids, len(case.prompt_ids) - 1, reduced.add)
    return reduced.results(prefill.model, logits[None])[0]


def _score_together(prefill: Prefill, cases: Sequence[Case], metrics: Mapping[str, HeadMetric]) -> list[CaseResult]:
    """Score cases of one total length in one forward pass; one by one, if that does not fit."""
    model = prefill.model
    reduced = _Reduced(cases, metrics)
    try:
        return reduced.results(model, model.answer_logits(reduced.sequences, max(reduced.n_events), reduced.add))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    release_memory()
    if len(cases) == 1:
        # Whole it did not fit: begin with halves.
        prefill.chunk_tokens = min(prefill.chunk_tokens, -(-cases[0].length // 2))
    return [score_alone(prefill, case, metrics) for case in cases]


class _Reduced:
    """The rows of one pass, reduced to one `[case, metric, head]` tensor per layer, left on the layer's device.

    Every metric comes first, then the null of each.
    """

    def __init__(self, cases: Sequence[Case], metrics: Mapping[str, HeadMetric]) -> None:
        self.cases, self.metrics = cases, metrics
        self.sequences = torch.tensor([case.prompt_ids + case.answer_ids for case in cases])
        self.n_events = [len(case.answer_ids) for case in cases]
        self.decoys = [decoy_spans(case) for case in cases]
        self.names = [*metrics, *(name + NULL_SUFFIX for name in metrics)]
        self._layers: dict[int, Tensor] = {}

    def add(self, layer: int, weights: Tensor) -> None:
        """The sink: weights `[case, head, event, key]` of one layer."""
        on_device = self.sequences.to(weights.device)
        per_case = []
        for index, (ids, case_weights) in enumerate(zip(on_device, weights, strict=True)):
            n = self.n_events[index]
            rows = AttentionRows(case_weights[:, -n:], ids[:-n], ids[-n:], self.cases[index].source)
            decoys = [rows.over(span) for span in self.decoys[index]]
            values = [metric(rows) for metric in self.metrics.values()]
            for metric in self.metrics.values():
                nulls = [metric(decoy) for decoy in decoys]
                values.append(torch.stack(nulls).mean(0) if nulls else torch.full_like(values[0], torch.nan))
            per_case.append(torch.stack(values))
        self._layers[layer] = torch.stack(per_case)

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
