"""The engine: stream cases through a model and turn every layer's rows into head scores on the way.

Cases of one total length share a batch: their answers end at the same position, so no padding is ever needed and the
rows of the longest answer hold those of the others. Rows are reduced inside the forward pass, layer by layer, on the
layer's device; what leaves the device is one number per metric and head. It refuses to know files and trajectories.
Cost: one prefill per case, plus E x T attention per layer for E answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lccp_interp.capture.model import HookedModel
from lccp_interp.schema import Case, CaseResult, LccpError
from lccp_interp.scoring.metrics import AttentionRows, HeadMetric

BATCH_TOKENS = 4096
"""Tokens per forward pass; longer prompts go one by one. More buys nothing on a CPU and costs memory."""


def score_cases(
    model: HookedModel,
    cases: Sequence[Case],
    metrics: Mapping[str, HeadMetric],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_tokens: Callable[[int], None] | None = None,
) -> list[CaseResult]:
    """Score every head on every case, teacher-forced.

    Args:
        model: the checkpoint, loaded.
        cases: prompts with spans; any lengths, any order.
        metrics: functions by the name they get in the results.
        batch_tokens: tokens per forward pass (at least one case goes in).
        on_tokens: told the number of tokens of every finished batch, for progress.

    Returns:
        One result per case, in the order of `cases`.

    Raises:
        LccpError: NaN logits, naming the checkpoint and the case; or a model none of whose layers has attention.
    """
    by_length: dict[int, list[int]] = {}
    for index, case in enumerate(cases):
        by_length.setdefault(len(case.prompt_ids) + len(case.answer_ids), []).append(index)
    results: dict[int, CaseResult] = {}
    for n_tokens, indices in sorted(by_length.items()):
        per_batch = max(1, batch_tokens // n_tokens)
        for start in range(0, len(indices), per_batch):
            batch = indices[start : start + per_batch]
            scored = _score_batch(model, [cases[index] for index in batch], metrics)
            results.update(zip(batch, scored, strict=True))
            if on_tokens is not None:
                on_tokens(len(batch) * n_tokens)
    return [results[index] for index in range(len(cases))]


def _score_batch(model: HookedModel, cases: Sequence[Case], metrics: Mapping[str, HeadMetric]) -> list[CaseResult]:
    """Score cases of one total length in one forward pass."""
    sequences = torch.tensor([case.prompt_ids + case.answer_ids for case in cases])
    n_events = [len(case.answer_ids) for case in cases]
    # One [case, metric, head] tensor per layer, left on the layer's device until the pass is over.
    per_layer: dict[int, Tensor] = {}

    def reduce_layer(layer: int, weights: Tensor) -> None:
        on_device = sequences.to(weights.device)
        per_case = []
        for ids, case_weights, case, n in zip(on_device, weights, cases, n_events, strict=True):
            rows = AttentionRows(case_weights[:, -n:], ids[:-n], ids[-n:], case.source)
            per_case.append(torch.stack([metric(rows) for metric in metrics.values()]))
        per_layer[layer] = torch.stack(per_case)

    logits = model.answer_logits(sequences, max(n_events), reduce_layer).cpu()
    if not per_layer:
        raise LccpError(f"checkpoint {model.name}: no attention layer reported any rows; nothing could be scored")
    layers = tuple(sorted(per_layer))
    scores = torch.stack([per_layer[layer].cpu() for layer in layers], dim=2).numpy()
    results = []
    for index, (case, n) in enumerate(zip(cases, n_events, strict=True)):
        answer_logits, answer_ids = logits[index, -n:], sequences[index, -n:]
        if n_bad := int(answer_logits.isnan().sum()):
            raise LccpError(
                f"checkpoint {model.name}, case {case.case_id}: {n_bad} of {answer_logits.numel()} logits are NaN; "
                + ("its weights are broken" if model.dtype == "float32" else f"try --dtype float32 ({model.dtype} now)")
            )
        results.append(
            CaseResult(
                case_id=case.case_id,
                layers=layers,
                scores={name: scores[index, m] for m, name in enumerate(metrics)},
                answer_loss_nats=torch.nn.functional.cross_entropy(answer_logits, answer_ids, reduction="none").numpy(),
                greedy_ids=tuple(answer_logits.argmax(dim=-1).tolist()),
            )
        )
    return results
