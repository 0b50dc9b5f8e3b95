"""Ask a model, grade what it writes, and say how often it is right.

Of every item one greedy answer and some samples are written (`decoding`), cut at the item's stop strings and graded by
its grader. The tables say, for each benchmark, subset and length:

- `greedy`: the mean score of the greedy answers;
- `pass@k`: the chance that at least one of k samples is right, that is, scores 1. With n >= k samples it is estimated
  as in Chen et al. 2021 (arXiv 2107.03374), without bias; with n = k it says whether any is right;
- `best@k`: the expected greatest score of k samples, the same estimate for scores between 0 and 1. Where the grader
  knows only right and wrong it is `pass@k`, and left out.

Scores are shares, 0..1, as graders give them; published tables have percent. Every text is kept: `answers_frame`. It
refuses to know checkpoints and files. Cost: that of writing the answers; the statistics take milliseconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lccp_interp.schema import Item, LccpError
from lccp_interp.scoring.graders import GRADERS
from lccp_interp.store import PROBES_SCHEMA

if TYPE_CHECKING:
    from lccp_interp.behaviour.decoding import Sharing, Stopped, Stream
    from lccp_interp.capture.model import HookedModel

N_SAMPLES = 3
"""Samples per item: the paper reports Pass@3 (arXiv 2604.02650)."""

TEMPERATURE = 0.7
"""Of the samples; the paper names none."""

GRADED = ("mrcr", "string_match_all")
"""Graders whose scores may lie between wrong and right, so that `best@k` says more than `pass@k`."""

N_RESAMPLES = 2000
"""Bootstrap resamples of the items behind an interval."""

ANSWERS_SCHEMA: dict[str, Any] = {
    "item_id": pl.String,
    "benchmark": pl.String,
    "subset": pl.String,
    "length": pl.Int64,
    "sample": pl.Int64,
    "text": pl.String,
    "score": pl.Float64,
    "n_tokens": pl.Int64,
    "stopped": pl.String,
}
"""One row per text; `sample` is null for the greedy one."""

SUMMARY_SCHEMA: dict[str, Any] = {
    name: kind for name, kind in PROBES_SCHEMA.items() if name not in ("checkpoint", "tokens_seen")
}
"""A probe's rows before anybody says of which checkpoint they are."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One text that a model wrote.

    `text` ends before the stop string, if one stopped it (`stopped` is `stop`; else `end` of text or `budget`), and has
    no special tokens.
    `n_tokens` counts all that was written, with what stopped it. `score` is the grader's, 0..1.
    """

    text: str
    n_tokens: int
    stopped: Stopped
    score: float


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model wrote to one item: the greedy answer, if it was asked for, and the samples in their order."""

    item_id: str
    greedy: Answer | None
    samples: tuple[Answer, ...]


def answer_items(
    model: HookedModel,
    items: Sequence[Item],
    *,
    n_samples: int = N_SAMPLES,
    temperature: float = TEMPERATURE,
    top_p: float = 1.0,
    greedy: bool = True,
    seed: int = 0,
    batch_tokens: int | None = None,
    sharing: Sharing = "auto",
    on_item: Callable[[int], None] | None = None,
) -> list[Answers]:
    """Let a model answer every item, and grade what it wrote.

    The texts do not depend on which other items are asked, in which order or in which batches, as far as logits do not
    (`lccp_interp.behaviour.sampling` says when they do).

    Args:
        model: the checkpoint, loaded.
        items: questions of any lengths, in any order, each with an item_id of its own.
        n_samples: sampled answers per item, 0 or more.
        temperature: of the samples, above 0.
        top_p: 0 < top_p <= 1; below 1 only the likeliest tokens are drawn that reach this probability together.
        greedy: whether to write the greedy answer too.
        seed: of the samples.
        batch_tokens: tokens whose keys and values are held at once, at least one prompt's with its answers; None for
            `decoding.BATCH_TOKENS`. Out of memory, it is halved.
        sharing: whether prompts are read along their prefix tree; `auto` where that saves 30 % of their tokens or more
            and the model's cache can be cropped. The answers are the same.
        on_item: told the tokens of every item's prompt as its answers are finished, for progress.

    Returns:
        One `Answers` per item, in the order of `items`.

    Raises:
        LccpError: an option out of its range, nothing to write, an unknown grader, an item_id twice; NaN logits; out of
            memory on a single answer.

    Example:
        >>> answers = answer_items(model, items)                    # doctest: +SKIP
        >>> answers[0].greedy.text, answers[0].greedy.score         # doctest: +SKIP
        (' Oslo.', 1.0)
    """
    from lccp_interp.behaviour.decoding import BATCH_TOKENS, Writer, streams_of

    batch_tokens = BATCH_TOKENS if batch_tokens is None else batch_tokens
    _check_options(n_samples, temperature, top_p, greedy, batch_tokens, sharing)
    _check_items(items)
    streams = streams_of(items, greedy=greedy, n_samples=n_samples, seed=seed)
    written: dict[int, list[Answer]] = {index: [] for index in range(len(items))}
    per_item = n_samples + greedy

    def finish(batch: Sequence[Stream]) -> None:
        for stream in batch:
            own = written[stream.index]
            own.append(_graded(stream))
            if len(own) == per_item and on_item is not None:
                on_item(len(stream.item.prompt_ids))

    Writer(model, temperature=temperature, top_p=top_p, batch_tokens=batch_tokens).write(
        streams, sharing=sharing, on_done=finish
    )
    return [
        Answers(item.item_id, own[0] if greedy else None, tuple(own[int(greedy) :]))
        for item, own in zip(items, written.values(), strict=True)
    ]


def _graded(stream: Stream) -> Answer:
    assert stream.stopped is not None
    score = float(GRADERS[stream.item.grader](stream.text, stream.item.references))
    return Answer(stream.text, len(stream.ids), stream.stopped, score)


def _check_options(
    n_samples: int, temperature: float, top_p: float, greedy: bool, batch_tokens: int, sharing: str
) -> None:
    for name, value, right, wanted in (
        ("n_samples", n_samples, n_samples >= 0, "0 or more"),
        ("temperature", temperature, 0 < temperature < float("inf"), "above 0 (greedy answers have none)"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (1 keeps every token)"),
        ("batch_tokens", batch_tokens, batch_tokens >= 1, "at least 1"),
        ("sharing", sharing, sharing in ("auto", "on", "off"), "auto, on or off"),
    ):
        if not right:
            raise LccpError(f"{name} must be {wanted}, got {value!r}")
    if not greedy and not n_samples:
        raise LccpError("there is nothing to write: ask for the greedy answer, or for n_samples of 1 or more")


def _check_items(items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.item_id in seen:
            raise LccpError(f"item {item.item_id} is there twice; give every item an item_id of its own")
        seen.add(item.item_id)
        if item.grader not in GRADERS:
            near = difflib.get_close_matches(item.grader, GRADERS, n=1)
            raise LccpError(
                f"item {item.item_id}: unknown grader {item.grader!r}; known: {', '.join(sorted(GRADERS))}"
                + (f" (did you mean {near[0]!r}?)" if near else "")
            )


def best_of_k(scores: Sequence[float], k: int) -> float:
    """The expected greatest score of k samples of one item, estimated without bias from n >= k.

    The mean of the maximum over all choices of k of the n: the i-th smallest is the greatest of C(i - 1, k - 1) of the
    C(n, k) choices.

    Raises:
        LccpError: k below 1, or more than there are samples.

    Example:
        >>> best_of_k([0.2, 0.8, 0.4], 3), round(best_of_k([0.2, 0.8, 0.4], 2), 6)
        (0.8, 0.666667)
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise LccpError(f"k must lie between 1 and the number of samples ({n}), got {k}; write more samples")
    if k == n:
        return float(max(scores))
    return float(sum(comb(i, k - 1) * score for i, score in enumerate(sorted(scores)))) / comb(n, k)


def pass_at_k(scores: Sequence[float], k: int, *, right: float = 1.0) -> float:
    """The chance that one of k samples of an item is right: 1 - C(n - c, k) / C(n, k) for c right ones of n.

    Args:
        scores: of the item's n samples, 0..1.
        k: 1 <= k <= n.
        right: the score from which a sample is right; 1 for graders of right and wrong.

    Raises:
        LccpError: k below 1, or more than there are samples.

    Example:
        >>> pass_at_k([1, 0, 0], 3), round(pass_at_k([1, 0, 0], 1), 6), pass_at_k([0.9, 0.5, 0], 3)
        (1.0, 0.333333, 0.0)
    """
    return best_of_k([float(score >= right) for score in scores], k)


def answers_frame(answers: Sequence[Answers], items: Sequence[Item]) -> pl.DataFrame:
    """Every text, one row each, columns as in `ANSWERS_SCHEMA`; `answers` and `items` in one order."""
    rows: list[tuple[Any, ...]] = []
    for item, own in _paired(answers, items):
        about = (item.item_id, item.benchmark, item.subset, item.length)
        texts: list[tuple[int | None, Answer]] = [] if own.greedy is None else [(None, own.greedy)]
        texts += enumerate(own.samples)
        rows += [(*about, sample, one.text, one.score, one.n_tokens, one.stopped) for sample, one in texts]
    return pl.DataFrame(rows, schema=ANSWERS_SCHEMA, orient="row")


def summarise(
    answers: Sequence[Answers], items: Sequence[Item], *, k: int | None = None, intervals: bool = False
) -> pl.DataFrame:
    """Mean scores per benchmark, subset and length.

    Args:
        answers: of `answer_items`.
        items: the same items in the same order.
        k: samples behind `pass@k` and `best@k`; None for as many as were written.
        intervals: whether to add `ci_low` and `ci_high`, a 95 % bootstrap interval of the mean over items.

    Returns:
        Columns as in `SUMMARY_SCHEMA`, in the order in which the subsets came, by length: metric (`greedy`, `pass@k`,
        `best@k` for `GRADED` graders), score (0..1), n (items), stderr (of the mean over items; null for one item).

    Raises:
        LccpError: answers and items that do not belong together; fewer samples than k.

    Example:
        >>> summarise(answers, items)["metric", "score"].rows()     # doctest: +SKIP
        [('greedy', 0.75), ('pass@3', 0.85)]
    """
    cells: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for item, own in _paired(answers, items):
        metrics = cells.setdefault((item.benchmark, item.subset, item.length), {})
        for metric, score in _metrics(own, item.grader, k).items():
            metrics.setdefault(metric, []).append(score)
    places = list(dict.fromkeys((benchmark, subset) for benchmark, subset, _ in cells))
    rows = []
    for cell in sorted(cells, key=lambda cell: (places.index(cell[:2]), cell[2])):
        for metric, scores in cells[cell].items():
            n = len(scores)
            stderr = float(np.std(scores, ddof=1)) / n**0.5 if n > 1 else None
            interval = bootstrap_interval(scores) if intervals else ()
            rows.append((*cell, metric, float(np.mean(scores)), n, stderr, *interval))
    bounds = {"ci_low": pl.Float64, "ci_high": pl.Float64} if intervals else {}
    return pl.DataFrame(rows, schema={**SUMMARY_SCHEMA, **bounds}, orient="row")


def _metrics(answers: Answers, grader: str, k: int | None) -> dict[str, float]:
    """What one item adds to each metric."""
    metrics = {} if answers.greedy is None else {"greedy": answers.greedy.score}
    if scores := [answer.score for answer in answers.samples]:
        k = len(scores) if k is None else k
        metrics[f"pass@{k}"] = pass_at_k(scores, k)
        if grader in GRADED:
            metrics[f"best@{k}"] = best_of_k(scores, k)
    return metrics


def bootstrap_interval(scores: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over items, drawn with replacement; NaN for a single item.

    Where every item scores the same it has no width, which says nothing about items that were not asked.

    Example:
        >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
        >>> round(low, 1), round(high, 1)
        (0.4, 0.6)
    """
    if len(scores) < 2:
        return float("nan"), float("nan")
    values = np.asarray(scores, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(N_RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _paired(answers: Sequence[Answers], items: Sequence[Item]) -> list[tuple[Item, Answers]]:
    if [own.item_id for own in answers] != [item.item_id for item in items]:
        raise LccpError(
            f"{len(answers)} answers do not belong to these {len(items)} items; give the items that were answered, in "
            "their order"
        )
    return list(zip(items, answers, strict=True))
