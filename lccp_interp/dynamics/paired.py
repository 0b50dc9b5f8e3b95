"""Two runs over the same cases: which heads were born or died between them, checkpoint by checkpoint.

The two may be a trajectory before and after fine-tuning, or with and without something switched off. Both asked every
head the same cases, so differences are paired: their intervals come from one set of resamples over the differences. A
head is born across the step if it is a retrieval head only behind it and the whole interval of its change lies above 0;
deaths are the mirror image. This module refuses to know what lies between the runs. Cost: one scan of the score parts
of each.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from lccp_interp.dynamics.heads import HeadSample, is_retrieval_head
from lccp_interp.dynamics.resampling import bootstrap_means, draw_resamples
from lccp_interp.dynamics.selection import HeadValues, head_values
from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError
from lccp_interp.store import Run

PAIRED_COLUMNS = (
    "checkpoint", "tokens_seen", "stage", "metric", "length", "layer", "head", "before", "after", "change", "ci_low",
    "ci_high", "n", "event",
)  # fmt: skip


def paired_heads(
    before: Run,
    after: Run,
    *,
    metric: str = "retrieval",
    length: int | None = None,
    mode: str | None = None,
    threshold: float = RETRIEVAL_THRESHOLD,
    rule: str = "above null",
    confidence: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """How the score of every head changed between two runs, at the checkpoints that both hold.

    Args:
        before, after: opened runs over the same cases.
        metric, length, mode, confidence, n_boot, seed: as in `score_table`.
        threshold, rule: of a retrieval head, as in `census`.

    Returns:
        One row per checkpoint and head, sorted by tokens, layer, head: checkpoint, tokens_seen, stage, metric, length,
        layer, head, before, after (mean scores over the cases that both define, 0..1 for `retrieval`), change (after -
        before), ci_low, ci_high (of the change), n (those cases), event (`birth`, `death`, `stays` for a retrieval head
        on both sides, `undecided` for one on one side only whose change may be noise, empty else). Undefined is NaN.

    Raises:
        LccpError: runs without a common checkpoint, with other cases or heads, or what `score_table` raises.

    Example:
        >>> paired_heads(Run.open("runs/demo"), Run.open("runs/demo/sft")).filter(event="birth")   # doctest: +SKIP
    """
    first = head_values(before, metric=metric, length=length, mode=mode)
    second = head_values(after, metric=metric, length=first.length, mode=first.mode)
    _check(before, after, first, second)
    shared = first.checkpoints.join(second.checkpoints.select("checkpoint"), on="checkpoint", maintain_order="left")
    if shared.is_empty():
        raise LccpError(
            f"{before.path} and {after.path} have no scored checkpoint in common: "
            f"{', '.join(first.checkpoints['checkpoint'])} and {', '.join(second.checkpoints['checkpoint'])}"
        )
    one, two = (_at(values, shared) for values in (first, second))
    resamples = draw_resamples(first.clusters, n_boot=n_boot, seed=seed, confidence=confidence)
    tables = [HeadSample(values, resamples).table() for values in (one, two)]
    retrieves = [is_retrieval_head(table, threshold=threshold, rule=rule) for table in tables]
    both = ~(np.isnan(one.values) | np.isnan(two.values))
    means = [bootstrap_means(_flat(np.where(both, values.values, np.nan)), resamples)[0] for values in (one, two)]
    change, low, high, n = bootstrap_means(_flat(two.values.astype(np.float64) - one.values), resamples)
    table = (
        tables[0]
        .select("checkpoint", "tokens_seen", "stage", "metric", "length", "layer", "head")
        .with_columns(
            before=pl.Series(means[0]),
            after=pl.Series(means[1]),
            change=pl.Series(change),
            ci_low=pl.Series(low),
            ci_high=pl.Series(high),
            n=pl.Series(n),
            was=retrieves[0],
            now=retrieves[1],
        )
    )
    event = (
        pl.when(pl.col("was") & pl.col("now"))
        .then(pl.lit("stays"))
        .when(pl.col("now") & (pl.col("ci_low") > 0))
        .then(pl.lit("birth"))
        .when(pl.col("was") & (pl.col("ci_high") < 0))
        .then(pl.lit("death"))
        .when(pl.col("was") | pl.col("now"))
        .then(pl.lit("undecided"))
        .otherwise(pl.lit(""))
    )
    return table.with_columns(event=event).select(PAIRED_COLUMNS)


def paired_census(table: pl.DataFrame) -> pl.DataFrame:
    """How many heads were born, died and stayed between the two runs, per checkpoint.

    Args:
        table: from `paired_heads`.

    Returns:
        Columns checkpoint, tokens_seen, n_births, n_deaths, n_stay, n_undecided, n_heads.

    Example:
        >>> table = pl.DataFrame({"checkpoint": ["a"] * 3, "tokens_seen": [0] * 3, "event": ["birth", "stays", ""]})
        >>> paired_census(table).row(0)
        ('a', 0, 1, 0, 1, 0, 3)
    """
    names = {"n_births": "birth", "n_deaths": "death", "n_stay": "stays", "n_undecided": "undecided"}
    return (
        table.group_by("checkpoint", "tokens_seen", maintain_order=True)
        .agg(
            *((pl.col("event") == event).sum().cast(pl.Int64).alias(name) for name, event in names.items()),
            n_heads=pl.len().cast(pl.Int64),
        )
        .sort("tokens_seen", "checkpoint")
    )


def _check(before: Run, after: Run, first: HeadValues, second: HeadValues) -> None:
    if not np.array_equal(first.heads, second.heads):
        raise LccpError(
            f"{before.path} has {len(first.heads)} heads in {len(set(first.heads[:, 0]))} layers, {after.path} has "
            f"{len(second.heads)} in {len(set(second.heads[:, 0]))}; compare runs of one architecture"
        )
    columns = ("case_id", "prompt_ids", "answer_ids", "source_start", "source_end")
    ours, theirs = (run.cases.filter(length=first.length).select(columns) for run in (before, after))
    if not ours.equals(theirs):
        raise LccpError(
            f"{before.path} and {after.path} asked other cases at {first.length} tokens, so their heads cannot be "
            "paired; score both with the same options and seed"
        )


def _at(values: HeadValues, checkpoints: pl.DataFrame) -> HeadValues:
    """The values at some of the checkpoints, in their order."""
    places = {name: i for i, name in enumerate(values.checkpoints["checkpoint"])}
    chosen = [places[name] for name in checkpoints["checkpoint"]]
    return HeadValues(
        values.metric, values.length, values.mode, checkpoints, values.heads, values.clusters,
        values.values[chosen], values.null[chosen],
    )  # fmt: skip


def _flat(values: np.ndarray) -> np.ndarray:
    """`[checkpoint, case, head]` as `[case, checkpoint x head]`."""
    return values.transpose(1, 0, 2).reshape(values.shape[1], -1)
