"""What feeds a head: path patching from each earlier head to one head's query, key or value, and to nothing else.

The prompt is read once. Then a sender's output is replaced by what it puts out on a corrupted prompt, all other heads
and MLPs are held at what they put out before (`frozen`), and one input of the receiver, its query, key or value, is
made of the residual stream so changed; its other two inputs are the usual ones. What the receiver's score loses is the
weight of the edge. This is path patching in the sense of Wang et al. 2022, "Interpretability in the Wild"
(arXiv 2211.00593), with every path but the residual stream blocked. Differences: what is lost is a head metric of the
receiver (its attention on the needle, or what it adds to the answer's logit) where they take the logits at the end, so
that nothing behind the receiver blurs it; and single edges are not additive: the receiver's norm and softmax see one
change at a time, and two feeders that stand in for each other are both found light. `HeadGraph.together` has the loss
when all earlier heads are replaced at once.

Depth 2 asks the same of the feeders that were found: a sender's change reaches one input of a feeder, the feeder's
output so changed one input of the target, and the loss is the target's.

Grouped-query heads share keys and values: an edge into a head's key is one into its group's, of which this head's loss
is read. Layers that choose their keys by an indexer keep the choice of the usual pass. It refuses to know statistics
beyond the mean and its interval, files, and which heads are worth asking about. Cost per case: three short passes, and
one copy of the prompt through the layers asked about per sender, `pass_tokens` tokens at a time; twice that for each
feeder's input at depth 2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.readout import LogitReader
from lccp_interp.capture.rows import AttentionCall, output_of, row_weights
from lccp_interp.interventions.answers import other_cases
from lccp_interp.interventions.frozen import Change, Frozen, QueryKeyValue
from lccp_interp.interventions.graph import HeadEdge, HeadGraph, Route, edges_of
from lccp_interp.interventions.heads import Head, check_heads, head_text, known_heads
from lccp_interp.interventions.hooks import head_outputs, mean_outputs
from lccp_interp.schema import Case, LccpError
from lccp_interp.scoring.engine import score_cases
from lccp_interp.scoring.metrics import AttentionRows, HeadMetric, select_metrics

if TYPE_CHECKING:
    import polars as pl

KINDS = ("resample", "needle", "mean")
"""What a sender puts out instead: what it does at the same position of another case; of the same prompt with another
case's needle, cut or repeated to as many tokens, in its needle's place; its mean over all positions of all cases."""

INPUTS = ("q", "k", "v")

PASS_TOKENS = 8192
"""Tokens per held pass: as many senders go together as fit."""

MAX_FEEDERS = 4
"""Feeders of a target that depth 2 asks about."""


def head_graph(
    model: HookedModel,
    cases: Sequence[Case],
    heads: Sequence[Head],
    *,
    metric: str | HeadMetric = "needle_mass",
    kind: str = "resample",
    depth: int = 1,
    max_feeders: int = MAX_FEEDERS,
    pass_tokens: int = PASS_TOKENS,
    on_tokens: Callable[[int], None] | None = None,
) -> HeadGraph:
    """Which earlier heads feed some heads, by input.

    Args:
        model: the checkpoint, loaded.
        cases: what it is asked; all of one length.
        heads: the targets.
        metric: what a target may lose, a metric of the answer's rows: `needle_mass`, `retrieval`, `copy`... hear of its
            query and key; `dla` and `locos` (in logits before the final norm's division) of its value, too.
        kind: one of `KINDS`.
        depth: 1, or 2 for what feeds the feeders as well.
        max_feeders: at depth 2, how many inputs of feeders are followed per target: those with the greatest weights
            whose interval leaves out 0.
        pass_tokens: tokens per held pass.
        on_tokens: told the lengths of the cases as they are finished, once per depth.

    Returns:
        Every edge from every head of an earlier layer, clear or not; at depth 2 those into the feeders, too.

    Raises:
        LccpError: heads that the model does not have or that no head can feed, a metric that reads other rows or values
            that the model's architecture hides, cases of several lengths, or layers that cannot be held.

    Example:
        >>> from lccp_interp.capture.model import load_model
        >>> from lccp_interp.checkpoints import bundled_trajectory
        >>> from lccp_interp.tasks.niah import NiahGrid
        >>> model = load_model(bundled_trajectory()[-1].path)
        >>> cases = NiahGrid(lengths=(128,), depths=(50,), samples=2).build(model.tokenizer)
        >>> graph = head_graph(model, cases, [(3, 6)])
        >>> graph.table().height                            # 24 earlier heads, query and key
        48
    """
    chosen = _metric(metric)
    targets, known = list(dict.fromkeys(heads)), known_heads(model.model.config)
    check_heads(targets, known, f"checkpoint {model.name}")
    _check_fed(targets, known, model.name)
    _check_asked(cases, kind, depth)
    reader = LogitReader.of(model) if chosen.needs_values else None
    study = _Study(model, chosen, reader, kind, pass_tokens, on_tokens or (lambda n_tokens: None))
    prompts = study.prompts(cases)
    clusters = [(case.needle_id, case.haystack_id) for case in cases]
    losses: dict[Route, list[float]] = defaultdict(list)
    usual: dict[Head, list[float]] = defaultdict(list)
    together: dict[tuple[Head, str], list[float]] = defaultdict(list)
    for prompt in prompts:
        for target, score in study.usual(prompt, targets).items():
            usual[target].append(score)
        for route, loss in study.direct(prompt, targets):
            losses[route].append(loss)
        for end, loss in study.together(prompt, targets):
            together[end].append(loss)
        study.advance(prompt.case.length)
    edges = edges_of(losses, clusters)
    if depth == 2:
        followed = _feeders(edges, targets, known, max_feeders)
        further: dict[Route, list[float]] = defaultdict(list)
        for prompt in study.prompts(cases) if followed else ():
            for route, loss in study.through(prompt, followed):
                further[route].append(loss)
            study.advance(prompt.case.length)
        edges += edges_of(further, clusters)
    return HeadGraph(
        model.name,
        chosen.name,
        kind,
        {head: _mean(scores) for head, scores in usual.items()},
        {end: _mean(own) for end, own in together.items()},
        tuple(edges),
        len(cases),
        cases[0].length,
    )


def logit_contributions(model: HookedModel, cases: Sequence[Case]) -> pl.DataFrame:
    """What every head adds to the answer's logit: the metrics `dla` and `locos`, mean over cases.

    Args:
        model: the checkpoint, loaded.
        cases: prompts with spans.

    Returns:
        Columns layer, head, dla (all that the head adds), locos (what it adds from the needle, less its share of the
        rest), n (cases), by layer and head; logits before the final norm's division.

    Raises:
        LccpError: no cases, or what `score_cases` raises.

    Example:
        >>> logit_contributions(model, cases).sort("dla").tail(3)           # doctest: +SKIP
    """
    import polars as pl

    if not cases:
        raise LccpError(
            "what heads add to an answer's logit is a mean over cases, and there are none; give at least one"
        )
    names = ("dla", "locos")
    results = score_cases(model, cases, select_metrics(names))
    means = {name: np.stack([result.scores[name] for result in results]).mean(axis=0) for name in names}
    return pl.DataFrame(
        [
            {"layer": layer, "head": head, **{name: float(means[name][row, head]) for name in names}, "n": len(results)}
            for row, layer in enumerate(results[0].layers)
            for head in range(means["dla"].shape[1])
        ]
    )


@dataclass(frozen=True)
class _Prompt:
    """One case's usual pass, and what every head puts out instead."""

    case: Case
    frozen: Frozen
    corrupted: dict[Head, Tensor]


@dataclass(frozen=True)
class _Study:
    """One model, one metric, one kind of corruption."""

    model: HookedModel
    metric: HeadMetric
    reader: LogitReader | None
    kind: str
    pass_tokens: int
    advance: Callable[[int], None]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs of a target that its metric hears of."""
        return INPUTS if self.reader is not None else ("q", "k")

    def prompts(self, cases: Sequence[Case]) -> Iterator[_Prompt]:
        heads = known_heads(self.model.model.config)
        means: dict[Head, Tensor] = {}
        others: Sequence[Case] = cases
        if self.kind == "mean":
            means = mean_outputs(self.model, [_fed(case) for case in cases], heads)
        else:
            others = other_cases(cases)
        for case, other in zip(cases, others, strict=True):
            ids = _fed(case)
            if self.kind == "mean":
                corrupted = {head: mean.expand(len(ids), -1) for head, mean in means.items()}
            else:
                read = _fed(other) if self.kind == "resample" else _with_other_needle(case, other)
                corrupted = head_outputs(self.model, torch.tensor([read]), heads)
            yield _Prompt(case, Frozen.of(self.model, torch.tensor([ids])), corrupted)

    def usual(self, prompt: _Prompt, targets: Sequence[Head]) -> dict[Head, float]:
        """The targets' scores with nothing changed."""
        layers = {layer for layer, _ in targets}
        scores = {layer: self._scores(prompt, prompt.frozen.calls[layer])[0] for layer in layers}
        return {(layer, head): float(scores[layer][head]) for layer, head in targets}

    def direct(self, prompt: _Prompt, targets: Sequence[Head]) -> Iterator[tuple[Route, float]]:
        """What each target loses by each single edge from an earlier head."""
        last = max(layer for layer, _ in targets)
        senders = sorted(head for head in prompt.corrupted if head[0] < last)
        changes = [{sender: prompt.corrupted[sender]} for sender in senders]
        for index, target, name, loss in self._losses(prompt, changes, targets):
            if senders[index][0] < target[0]:
                yield Route(senders[index], target, name, target, name), loss

    def together(self, prompt: _Prompt, targets: Sequence[Head]) -> Iterator[tuple[tuple[Head, str], float]]:
        """What each target loses when all earlier heads are replaced at once."""
        layers = sorted({layer for layer, _ in targets})
        changes = [{head: own for head, own in prompt.corrupted.items() if head[0] < layer} for layer in layers]
        for index, target, name, loss in self._losses(prompt, changes, targets):
            if layers[index] == target[0]:
                yield (target, name), loss

    def through(self, prompt: _Prompt, followed: Sequence[Route]) -> Iterator[tuple[Route, float]]:
        """What each target loses by each edge into one input of a feeder, which hands it on by the followed route."""
        for feeder in sorted({route.sender for route in followed}):
            onward = [route for route in followed if route.sender == feeder]
            senders = sorted(head for head in prompt.corrupted if head[0] < feeder[0])
            for batch in self._batches([{sender: prompt.corrupted[sender]} for sender in senders], prompt):
                given = prompt.frozen.inputs_under([change for _, change in batch], [feeder[0]])[feeder[0]]
                for name in INPUTS:
                    outputs = _outputs(_with_input(prompt.frozen.calls[feeder[0]], given, name), feeder[1])
                    changes: list[Change] = [{feeder: own} for own in outputs]
                    targets = sorted({route.target for route in onward})
                    for index, target, target_input, loss in self._losses(prompt, changes, targets):
                        if any((route.target, route.input) == (target, target_input) for route in onward):
                            yield Route(senders[batch[index][0]], feeder, name, target, target_input), loss

    def _losses(
        self, prompt: _Prompt, changes: Sequence[Change], targets: Sequence[Head]
    ) -> Iterator[tuple[int, Head, str, float]]:
        """(number of the change, target, input, what the target loses by the change in that input)."""
        usual = self.usual(prompt, targets)
        layers = sorted({layer for layer, _ in targets})
        for batch in self._batches(changes, prompt):
            given = prompt.frozen.inputs_under([change for _, change in batch], layers)
            for layer in layers:
                for name in self.inputs:
                    call = _with_input(prompt.frozen.calls[layer], given[layer], name)
                    scores = self._scores(prompt, call).tolist()
                    for (index, _), own in zip(batch, scores, strict=True):
                        for target in (head for head in targets if head[0] == layer):
                            yield index, target, name, usual[target] - own[target[1]]

    def _batches(self, changes: Sequence[Change], prompt: _Prompt) -> Iterator[list[tuple[int, Change]]]:
        size = max(1, self.pass_tokens // prompt.frozen.input_ids.shape[1])
        numbered = list(enumerate(changes))
        for start in range(0, len(numbered), size):
            yield numbered[start : start + size]

    @torch.inference_mode()
    def _scores(self, prompt: _Prompt, call: AttentionCall) -> Tensor:
        """The metric `[sequence, head]` of a layer's call, read where the answer is predicted."""
        case = prompt.case
        weights = row_weights(call, torch.arange(len(case.prompt_ids) - 1, call.query.shape[2]))
        prompt_ids, answer_ids = (
            torch.tensor(ids, device=weights.device) for ids in (case.prompt_ids, case.answer_ids)
        )
        source = case.needle if self.metric.span == "needle" else case.source
        scores = []
        for own, value in zip(weights, call.value, strict=True):
            gain = None if self.reader is None else self.reader.gains(call.layer, value, answer_ids)
            scores.append(self.metric(AttentionRows(own, prompt_ids, answer_ids, source, gain)).float().cpu())
        return torch.stack(scores)


def _with_input(call: AttentionCall, given: QueryKeyValue, name: str) -> AttentionCall:
    """A layer's usual call for as many sequences as are given, with one input, `q`, `k` or `v`, as given."""
    n = given[0].shape[0]
    usual = (part.expand(n, *part.shape[1:]) for part in (call.query, call.key, call.value))
    query, key, value = (other if name == own else part for own, part, other in zip(INPUTS, usual, given, strict=True))
    return replace(call, query=query, key=key, value=value)


@torch.inference_mode()
def _outputs(call: AttentionCall, head: int) -> Tensor:
    """What one head makes of a call, `[sequence, token, d_head]`."""
    return output_of(call)[:, :, head]


def _feeders(edges: Sequence[HeadEdge], targets: Sequence[Head], known: Sequence[Head], most: int) -> list[Route]:
    """Of each target the routes that carry most, clear ones only, from heads that others stand before."""
    first = known[0][0]
    chosen: list[Route] = []
    for target in targets:
        into = [edge for edge in edges if edge.route.target == target and edge.route.sender[0] > first]
        clear = sorted((edge for edge in into if edge.is_clear), key=lambda edge: (-abs(edge.weight), edge.route))
        chosen += [edge.route for edge in clear[:most]]
    return chosen


def _fed(case: Case) -> list[int]:
    """The tokens that a model reads: all but the answer's last, which predicts nothing that is asked for."""
    return [*case.prompt_ids, *case.answer_ids[:-1]]


def _with_other_needle(case: Case, other: Case) -> list[int]:
    """What is fed of a case with another case's needle, cut or repeated to as many tokens, in the place of its own."""
    n, ids = len(case.needle), _fed(case)
    needle = other.prompt_ids[other.needle.start : other.needle.end]
    ids[case.needle.start : case.needle.end] = (needle * -(-n // len(needle)))[:n]
    return ids


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _metric(metric: str | HeadMetric) -> HeadMetric:
    if isinstance(metric, str):
        metric = select_metrics([metric])[metric]
    if metric.rows != "events":
        raise LccpError(
            f"metric {metric.name} reads the question's tokens; what feeds a head is measured where it answers: use "
            "needle_mass, retrieval, copy, dla or locos"
        )
    return metric


def _check_fed(targets: Sequence[Head], known: Sequence[Head], name: str) -> None:
    layers = sorted({layer for layer, _ in known})
    if unfed := [head for head in targets if head[0] == layers[0]]:
        later = f"layers {layers[1]}-{layers[-1]}" if len(layers) > 2 else f"layer {layers[-1]}"
        ask = f"ask about a head of {later}" if len(layers) > 1 else "it has one layer with attention only"
        raise LccpError(
            f"head {head_text(unfed)} of {name} stands in layer {layers[0]}, the first with attention: no head feeds "
            f"it; {ask}"
        )


def _check_asked(cases: Sequence[Case], kind: str, depth: int) -> None:
    if kind not in KINDS:
        raise LccpError(f"unknown kind of patching {kind!r}; known: {', '.join(KINDS)}")
    if depth not in (1, 2):
        raise LccpError(f"depth must be 1 (what feeds the head) or 2 (and what feeds its feeders), got {depth}")
    lengths = sorted({case.length for case in cases})
    if len(lengths) != 1:
        got = f"cases of {', '.join(map(str, lengths))} tokens" if lengths else "no cases"
        raise LccpError(f"what feeds a head is measured on cases of one length, got {got}; choose one length")
