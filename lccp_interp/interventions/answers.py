"""What a model answers with some of its heads silenced.

Prompts share their prefixes within one set of heads, never across sets: keys and values are made under what is
silenced. A head that is resampled from another case, or blind to the needle, does otherwise in every case, so those
prompts are run whole. This module knows one loaded model; it refuses to know files and which heads are worth silencing.
Cost: one prefill per case and set; for `mean` one more per case; for `resample` one more per case and the outputs of
every head asked for on one prompt; for `blind` eager attention in the layers concerned.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.prefill import Prefill
from lccp_interp.interventions.heads import Head
from lccp_interp.interventions.hooks import (
    head_outputs,
    mask_span,
    mean_outputs,
    patch_heads,
    replace_heads,
    zero_heads,
)
from lccp_interp.schema import Case, LccpError
from lccp_interp.tasks.prefixes import walk

Context = contextlib.AbstractContextManager[None]


def outcomes_without(
    model: HookedModel,
    cases: Sequence[Case],
    sets: Sequence[Sequence[Head]],
    *,
    kind: str = "zero",
    on_tokens: Callable[[int], None] | None = None,
) -> list[list[tuple[float, bool]]]:
    """What a model answers with sets of heads silenced, one set at a time.

    Args:
        model: the checkpoint, loaded.
        cases: what it is asked; for `resample` all of one length.
        sets: of heads; an empty one leaves the model intact.
        kind: as in `ablate_heads`.
        on_tokens: told the lengths of the cases as they are finished, once per set.

    Returns:
        For each set, (answer loss in nats per token, whether the greedy answer is right in every token) per case.

    Raises:
        LccpError: heads that the model does not have, NaN logits, one case only to resample from.

    Example:
        >>> outcomes_without(model, cases, [[], [(2, 2), (3, 3)]])    # doctest: +SKIP
    """
    advance = on_tokens or (lambda n_tokens: None)
    if kind in ("resample", "blind"):
        return _case_by_case(model, cases, sets, kind, advance)
    found = []
    for context in _contexts(model, cases, sets, kind):
        with context:
            found.append(_answers(model, cases, advance))
    return found


def _contexts(
    model: HookedModel, cases: Sequence[Case], sets: Sequence[Sequence[Head]], kind: str
) -> Iterator[Context]:
    means = {}
    if kind == "mean" and (needed := sorted({head for heads in sets for head in heads})):
        means = mean_outputs(model, [_fed(case) for case in cases], needed)
    for heads in sets:
        if not heads:
            yield contextlib.nullcontext()
        elif kind == "mean":
            yield replace_heads(model, {head: means[head] for head in heads})
        else:
            yield zero_heads(model, heads)


def _answers(model: HookedModel, cases: Sequence[Case], advance: Callable[[int], None]) -> list[tuple[float, bool]]:
    """One answer per case, prompts sharing their prefixes: all of them are run under the same intervention."""
    prefill = Prefill(model)
    found: dict[int, tuple[float, bool]] = {}
    for visit in walk(cases):
        case = cases[visit.index]
        found[visit.index] = _judge(model, case, prefill.run(_fed(case), len(case.prompt_ids) - 1, None))
        advance(case.length)
    return [found[index] for index in range(len(cases))]


def _case_by_case(
    model: HookedModel, cases: Sequence[Case], sets: Sequence[Sequence[Head]], kind: str, advance: Callable[[int], None]
) -> list[list[tuple[float, bool]]]:
    """Where heads are silenced otherwise in each case, each prompt has a cache of its own for each set."""
    needed = sorted({head for heads in sets for head in heads})
    found: list[list[tuple[float, bool]]] = [[] for _ in sets]
    others = other_cases(cases) if kind == "resample" else cases
    for case, other in zip(cases, others, strict=True):
        outputs: dict[Head, Tensor] = {}
        if kind == "resample" and needed:
            outputs = head_outputs(model, torch.tensor([_fed(other)]), needed)
        for answers, heads in zip(found, sets, strict=True):
            context: Context = contextlib.nullcontext()
            if heads and kind == "resample":
                context = patch_heads(model, {head: outputs[head] for head in heads})
            elif heads:
                context = mask_span(model, heads, case.needle)
            with context:
                logits = Prefill(model).run(_fed(case), len(case.prompt_ids) - 1, None)
            answers.append(_judge(model, case, logits))
            advance(case.length)
    return found


def other_cases(cases: Sequence[Case]) -> list[Case]:
    """For each case the next one that hides another needle; where there is none, the next one.

    Raises:
        LccpError: there is one case only.
    """
    if len(cases) < 2:
        raise LccpError("resample ablation takes a head's output from another case, and there is one only; ask for two")
    found = []
    for index, case in enumerate(cases):
        following = [*cases[index + 1 :], *cases[:index]]
        found.append(next((other for other in following if other.needle_id != case.needle_id), following[0]))
    if any(case.needle_id == other.needle_id for case, other in zip(cases, found, strict=True)):
        warnings.warn(
            "all cases hide one needle: resampled heads bring its answer along; use several needles or another --kind",
            stacklevel=3,
        )
    return found


def _fed(case: Case) -> list[int]:
    """The tokens that a model reads: all but the answer's last, which predicts nothing that is asked for."""
    return [*case.prompt_ids, *case.answer_ids[:-1]]


def _judge(model: HookedModel, case: Case, logits: Tensor) -> tuple[float, bool]:
    logits = logits.cpu()
    if logits.isnan().any():
        raise LccpError(
            f"checkpoint {model.name}, case {case.case_id}: logits are NaN; try --dtype float32 ({model.dtype} now)"
        )
    answer = torch.tensor(case.answer_ids)
    loss = torch.nn.functional.cross_entropy(logits, answer)
    return float(loss), bool((logits.argmax(-1) == answer).all())
