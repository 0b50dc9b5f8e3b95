"""Retrieval heads over the checkpoints of a run: scores with intervals, their number, and how stable they are.

The measures follow "Revealing the Learning Dynamics of Long-Context Continual Pre-training" (arXiv 2604.02650,
Figures 4 and 5, Table 5) and, for the retrieval score itself, Wu et al. (arXiv 2404.15574). What is added: one fixed
length per question, and intervals from a bootstrap over pairs of needle and haystack. `births.py` turns the scores
into births and deaths. This module refuses to know models and pictures, and imports neither torch nor a plotting
library. Cost: one scan of the score parts and one matrix product per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

from lccp_interp.dynamics.births import events, lives
from lccp_interp.dynamics.ranking import membership
from lccp_interp.dynamics.resampling import (
    Resamples,
    bootstrap_means,
    draw_resamples,
    mean_defined,
    percentile_interval,
    resampled_means,
)
from lccp_interp.dynamics.selection import HeadValues, base_checkpoint, choose, head_values
from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError
from lccp_interp.store import Run

__all__ = [
    "HeadSample",
    "census",
    "events",
    "head_records",
    "head_sample",
    "lives",
    "score_table",
    "stability",
]

RULES = ("above null", "threshold")
PAPER_TOP_K = 30
"""How many top heads Table 5 of arXiv 2604.02650 compares (of 32 layers x 32 heads)."""


class HeadSample:
    """Per-case values of one metric at one length together with the resamples that give their intervals.

    Keep it when several statistics should share one set of resamples; `score_table` and `census` do.
    """

    def __init__(self, values: HeadValues, resamples: Resamples) -> None:
        self.values = values
        self.resamples = resamples

    def table(self) -> pl.DataFrame:
        """One row per checkpoint and head; the columns are those of `score_table`."""
        values = self.values
        n_checkpoints, n_cases, n_heads = values.values.shape
        flat = values.values.transpose(1, 0, 2).reshape(n_cases, n_checkpoints * n_heads)
        mean, low, high, n = bootstrap_means(flat, self.resamples)
        null = values.null.transpose(1, 0, 2).reshape(n_cases, n_checkpoints * n_heads)
        repeated = values.checkpoints.select(pl.all().repeat_by(n_heads).explode())
        return repeated.with_columns(
            metric=pl.lit(values.metric),
            length=pl.lit(values.length, dtype=pl.Int64),
            layer=pl.Series(np.tile(values.heads[:, 0], n_checkpoints)),
            head=pl.Series(np.tile(values.heads[:, 1], n_checkpoints)),
            score=pl.Series(mean),
            ci_low=pl.Series(low),
            ci_high=pl.Series(high),
            n=pl.Series(n),
            null_score=pl.Series(mean_defined(null)[0]),
            above_null=pl.Series(
                [None if np.isnan(bound) else bool(bound > 0) for bound in self._above_null_by.ravel()],
                dtype=pl.Boolean,
            ),
            ci_over=pl.lit(self.resamples.ci_over),
        )

    @cached_property
    def _above_null_by(self) -> NDArray[np.float64]:
        """Lower end of the paired interval of score - null, `[checkpoint, head]`; NaN where there is none.

        Always from the same draws: who is a retrieval head does not depend on how finely intervals are asked for.
        """
        values = self.values
        n_checkpoints, n_cases, n_heads = values.values.shape
        if np.isnan(values.null).all():
            return np.full((n_checkpoints, n_heads), np.nan)
        # Paired: a score and its null come from the same cases.
        excess = (values.values - values.null).transpose(1, 0, 2).reshape(n_cases, n_checkpoints * n_heads)
        _, lower, _, _ = bootstrap_means(excess, draw_resamples(values.clusters))
        return lower.reshape(n_checkpoints, n_heads)

    @property
    def may_retrieve(self) -> NDArray[np.bool_]:
        """Whether a head's null lets it be a retrieval head, `[checkpoint, head]`: not if it was measured and reached.

        With the threshold on the score this is the rule of `is_retrieval_head`, for arrays.
        """
        return np.isnan(self._above_null_by) | (self._above_null_by > 0)

    def mean_of_heads(self, heads: Sequence[tuple[int, int]]) -> pl.DataFrame:
        """Mean score of a fixed set of (layer, head) at every checkpoint.

        Returns:
            Columns checkpoint, mean, ci_low, ci_high; NaN where no head of the set is defined.
        """
        wanted = set(heads)
        chosen = np.array([tuple(pair) in wanted for pair in self.values.heads.tolist()])
        means, lows, highs = [], [], []
        for per_case in self.values.values[:, :, chosen]:
            # Mean over cases first, then over heads: a head counts once however many cases define it.
            score, _ = mean_defined(per_case)
            means.append(_mean_over_heads(score[None, :])[0])
            if self.resamples.n_units < 2 or not chosen.any():
                low = high = np.array([np.nan])
            else:
                draws = _mean_over_heads(resampled_means(per_case, self.resamples))
                low, high = percentile_interval(draws[:, None], self.resamples.level)
            lows.append(low[0])
            highs.append(high[0])
        return self.values.checkpoints.select("checkpoint").with_columns(
            mean=pl.Series(means, dtype=pl.Float64),
            ci_low=pl.Series(lows, dtype=pl.Float64),
            ci_high=pl.Series(highs, dtype=pl.Float64),
        )


def _mean_over_heads(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis without NaN; NaN where nothing is defined."""
    return mean_defined(scores.T)[0]


def head_sample(
    run: Run,
    *,
    metric: str = "retrieval",
    length: int | None = None,
    mode: str | None = None,
    confidence: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
) -> HeadSample:
    """Read one metric at one length and draw its resamples. Arguments and errors are those of `score_table`."""
    values = head_values(run, metric=metric, length=length, mode=mode)
    return HeadSample(values, draw_resamples(values.clusters, n_boot=n_boot, seed=seed, confidence=confidence))


def score_table(
    run: Run,
    *,
    metric: str = "retrieval",
    length: int | None = None,
    mode: str | None = None,
    confidence: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """Mean score of every head at every checkpoint, at one length, with a bootstrap interval.

    The score of a head is the mean over cases of its per-case value (arXiv 2604.02650, Eq. 1 for `retrieval`, averaged
    over samples). Intervals are percentiles over resampled clusters, a cluster being a pair of needle and haystack;
    below three clusters cases are resampled and the column `ci_over` says `cases`. With fewer than eight clusters they
    are still somewhat too narrow (docs/calibration.md). All heads and checkpoints share the resamples.

    Args:
        run: an opened run.
        metric: one of the run's metrics, for example `retrieval`, `wu`, `copy`, `needle_mass`.
        length: total length of the cases in tokens; None means the longest of the run. Lengths are never pooled.
        mode: one that the run holds; None means `teacher_forced` (the paper's), or else the one it holds. In mode
            `generate` a case counts only if the model's own answer passed the gate; `n` says how many did.
        confidence: level of the intervals, in (0, 1).
        n_boot: number of resamples.
        seed: of the resamples.

    Returns:
        Columns checkpoint, tokens_seen, stage, metric, length, layer, head, score, ci_low, ci_high, n, null_score (mean
        of the same metric on decoy spans of the same prompts), above_null (whether the paired 95 % interval of score -
        null lies above 0, by 1000 resamples whatever is asked for; null where no decoys were measured), ci_over (what
        is drawn); sorted by tokens_seen, layer, head. `score` is a
        fraction (0..1 for `retrieval`, `copy`, `needle_mass`; `wu` may pass 1), `n` the number of cases in which it is
        defined; without any the score is NaN. Checkpoints that are not scored at this length yet have no rows.

    Raises:
        LccpError: unknown metric, length or mode (the known ones are listed), or a confidence outside (0, 1).

    Example:
        >>> table = score_table(Run.open("runs/demo"), metric="retrieval", length=4096)   # doctest: +SKIP
        >>> table.filter(checkpoint="lccp-1.2M").sort("score", descending=True).head(3)   # doctest: +SKIP
    """
    return head_sample(
        run, metric=metric, length=length, mode=mode, confidence=confidence, n_boot=n_boot, seed=seed
    ).table()


def census(
    table: pl.DataFrame,
    *,
    threshold: float = RETRIEVAL_THRESHOLD,
    rule: str = "above null",
    base: str | None = None,
    sample: HeadSample | None = None,
) -> pl.DataFrame:
    """Number of retrieval heads and mean score of the initial ones, per checkpoint (arXiv 2604.02650, Figure 5).

    A retrieval head has score > `threshold` and is above its null; the paper asks for the threshold only. The *initial*
    heads are the retrieval heads of the base checkpoint. As they are chosen and averaged on the same cases, their mean
    at the base checkpoint itself is a little too high (whoever just passed the threshold by luck is in). The number of
    retrieval heads carries no interval: resampling pushes heads near the threshold over it on both sides and biases the
    count.

    Args:
        table: from `score_table`.
        threshold: above which a head is a retrieval head.
        rule: `above null` (where decoys were measured) or `threshold` (the paper's).
        base: name of the base checkpoint; None means the last before the last stage, or the first of one stage.
        sample: what `table` was made from (`head_sample`); without it the interval of the mean is NaN.

    Returns:
        Columns checkpoint, tokens_seen, stage, n_heads (with a defined score), n_retrieval_heads, n_from_base (of them
        those that are initial heads), n_newborn (the others), n_initial (number of initial heads), mean_initial_score,
        mean_initial_low, mean_initial_high (NaN without initial heads).

    Raises:
        LccpError: an empty table, an unknown rule, or a base checkpoint that is not in the table.

    Example:
        >>> table = pl.DataFrame({
        ...     "checkpoint": ["a", "a", "b", "b"], "tokens_seen": [0, 0, 9, 9], "stage": ["train"] * 4,
        ...     "layer": [0] * 4, "head": [0, 1, 0, 1], "score": [0.3, 0.0, 0.5, 0.2]})
        >>> census(table).select("checkpoint", "n_retrieval_heads", "n_newborn", "mean_initial_score").rows()
        [('a', 1, 0, 0.3), ('b', 2, 1, 0.5)]
    """
    names = table.select("checkpoint", "tokens_seen").unique().sort("tokens_seen", "checkpoint")["checkpoint"].to_list()
    base = base_checkpoint(table) if base is None else choose("base checkpoint", base, names, "the score table")
    table = table.with_columns(retrieves=is_retrieval_head(table, threshold=threshold, rule=rule))
    initial = table.filter("retrieves", pl.col("checkpoint") == base).select("layer", "head", initial=pl.lit(True))
    score = pl.col("score").fill_nan(None)
    marked = table.join(initial, on=["layer", "head"], how="left").with_columns(pl.col("initial").fill_null(False))
    counts = (
        marked.group_by("checkpoint", "tokens_seen", "stage")
        .agg(
            n_heads=score.count().cast(pl.Int64),
            n_retrieval_heads=pl.col("retrieves").sum().cast(pl.Int64),
            n_from_base=(pl.col("retrieves") & pl.col("initial")).sum().cast(pl.Int64),
            n_newborn=(pl.col("retrieves") & ~pl.col("initial")).sum().cast(pl.Int64),
            n_initial=pl.lit(initial.height, dtype=pl.Int64),
            mean_initial_score=score.filter(pl.col("initial")).mean().cast(pl.Float64).fill_null(float("nan")),
        )
        .sort("tokens_seen", "checkpoint")
    )
    nothing = pl.lit(float("nan"))
    if sample is None:
        return counts.with_columns(mean_initial_low=nothing, mean_initial_high=nothing)
    bounds = sample.mean_of_heads(initial.select("layer", "head").rows()).select(
        "checkpoint", mean_initial_low="ci_low", mean_initial_high="ci_high"
    )
    return counts.join(bounds, on="checkpoint", how="left", maintain_order="left")


def is_retrieval_head(
    table: pl.DataFrame, *, threshold: float = RETRIEVAL_THRESHOLD, rule: str = "above null"
) -> pl.Series:
    """Whether each row of a score table is a retrieval head's; an undefined score is none.

    Args:
        table: from `score_table`.
        threshold: the score has to exceed it.
        rule: `above null` asks also that the head be above its null, where decoys were measured; `threshold` does not.

    Raises:
        LccpError: an unknown rule.

    Example:
        >>> table = pl.DataFrame({"score": [0.3, 0.3, 0.05, float("nan")], "above_null": [True, False, True, None]})
        >>> is_retrieval_head(table).to_list(), is_retrieval_head(table, rule="threshold").to_list()
        ([True, False, False, False], [True, True, False, False])
    """
    choose("rule", rule, RULES, "the census")
    above = pl.col("score").is_not_nan() & (pl.col("score") > threshold)
    if rule == "above null" and "above_null" in table.columns:
        above = above & pl.col("above_null").fill_null(True)
    return table.select(above.alias("retrieves"))["retrieves"]


def count_heads(scores: NDArray[np.float64], may_retrieve: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Number of retrieval heads along the last axis: above the threshold, of those that may be; NaN if none is defined.

    Args:
        scores: `[..., head]`, NaN where undefined.
        may_retrieve: `HeadSample.may_retrieve`, `[..., head]`.

    Example:
        >>> count_heads(np.array([[0.3, 0.3, np.nan], [np.nan] * 3]), np.array([True, False, True]))
        array([ 1., nan])
    """
    defined = ~np.isnan(scores)
    above = (np.where(defined, scores, 0) > RETRIEVAL_THRESHOLD) & may_retrieve
    return np.where(defined.any(axis=-1), above.sum(axis=-1), np.nan)


def effective_top_k(top_k: int | None, n_heads: int) -> int:
    """How many top heads to compare: `top_k`, at most all; None means min(30, a quarter of the heads), at least 1.

    The paper compares 30 of 1024. In a small model 30 would be most of the heads and overlap by itself.

    Example:
        >>> effective_top_k(None, 1024), effective_top_k(None, 32), effective_top_k(30, 20)
        (30, 8, 20)
    """
    if top_k is None:
        return max(1, min(PAPER_TOP_K, n_heads // 4))
    if top_k < 1:
        raise LccpError(f"top_k must be at least 1, got {top_k}; the paper uses {PAPER_TOP_K}")
    return min(top_k, n_heads)


def stability(table: pl.DataFrame, *, top_k: int | None = None) -> pl.DataFrame:
    """How much the ranking of heads changes from each checkpoint to the next (arXiv 2604.02650, Table 5).

    Args:
        table: from `score_table`.
        top_k: size of the top list; None means min(30, a quarter of the heads). The column `top_k` states it.

    Returns:
        Columns from_checkpoint, to_checkpoint, from_tokens, to_tokens, top_k, overlap (heads in both top lists; where
        scores tie, the mean over all ways to break them), overlap_by_chance (expected under independent rankings,
        k^2 / n_heads), spearman (rank correlation over the heads defined in both, NaN if either is constant), n_heads.

    Raises:
        LccpError: `top_k` below 1.

    Example:
        >>> table = pl.DataFrame({
        ...     "checkpoint": ["a"] * 4 + ["b"] * 4, "tokens_seen": [0] * 4 + [9] * 4, "layer": [0] * 8,
        ...     "head": [0, 1, 2, 3] * 2, "score": [0.4, 0.3, 0.2, 0.1, 0.3, 0.4, 0.2, 0.1]})
        >>> stability(table, top_k=1).select("overlap", pl.col("spearman").round(3)).rows()
        [(0.0, 0.8)]
    """
    schema = {
        "from_checkpoint": pl.String,
        "to_checkpoint": pl.String,
        "from_tokens": pl.Int64,
        "to_tokens": pl.Int64,
        "top_k": pl.Int64,
        "overlap": pl.Float64,
        "overlap_by_chance": pl.Float64,
        "spearman": pl.Float64,
        "n_heads": pl.Int64,
    }
    ordered = table.select("checkpoint", "tokens_seen").unique().sort("tokens_seen", "checkpoint").rows()
    rows = []
    for (before, before_tokens), (after, after_tokens) in pairwise(ordered):
        later = table.filter(pl.col("checkpoint") == after).select("layer", "head", after="score")
        pair = (
            table.filter(pl.col("checkpoint") == before)
            .select("layer", "head", before="score")
            .join(later, on=["layer", "head"])
            .filter(pl.col("before").is_not_nan(), pl.col("after").is_not_nan())
        )
        k = effective_top_k(top_k, pair.height)
        scores = [pair[column].to_numpy() for column in ("before", "after")]
        in_both = np.prod([membership(values, np.array([k]))[0] for values in scores], axis=0)
        rows.append(
            {
                "from_checkpoint": before,
                "to_checkpoint": after,
                "from_tokens": before_tokens,
                "to_tokens": after_tokens,
                "top_k": k,
                "overlap": float(in_both.sum()),
                "overlap_by_chance": k * k / pair.height if pair.height else float("nan"),
                "spearman": spearman(*scores),
                "n_heads": pair.height,
            }
        )
    return pl.DataFrame(rows, schema=schema)


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's rho with average ranks for ties; NaN where scipy would warn (constant or fewer than two)."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def head_records(
    run: Run,
    *,
    metric: str = "retrieval",
    length: int | None = None,
    mode: str | None = None,
    checkpoint: str | None = None,
    top: int | None = None,
    threshold: float = RETRIEVAL_THRESHOLD,
    rule: str = "above null",
    confidence: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The records that `lccp heads RUN --format json` prints, best first.

    Args:
        run, metric, length, mode, confidence, n_boot, seed: as in `score_table`.
        checkpoint: keep only this one; `last` means the last scored one.
        top: keep only the first so many records.
        threshold, rule: which heads are retrieval heads, as in `is_retrieval_head`.

    Returns:
        Dictionaries with checkpoint, tokens_seen, metric, layer, head, score, ci_low, ci_high, n, retrieves (whether it
        is a retrieval head); by falling score, ties by order of checkpoints, layer, head; undefined scores (None, as
        JSON knows no NaN) last.

    Raises:
        LccpError: as `score_table`; an unknown checkpoint or rule; `top` below 1.

    Example:
        >>> head_records(Run.open("runs/demo"), top=1)[0]["score"]   # doctest: +SKIP
        0.93
    """
    if top is not None and top < 1:
        raise LccpError(f"top must be at least 1, got {top}; leave it out for all heads")
    table = score_table(
        run, metric=metric, length=length, mode=mode, confidence=confidence, n_boot=n_boot, seed=seed
    ).with_row_index("order")
    table = table.with_columns(retrieves=is_retrieval_head(table, threshold=threshold, rule=rule))
    if checkpoint is not None:
        known = table["checkpoint"].unique(maintain_order=True).to_list()
        if checkpoint == "last" and "last" not in known:
            checkpoint = known[-1]
        table = table.filter(pl.col("checkpoint") == choose("checkpoint", checkpoint, known, str(run.path)))
    numbers = ("score", "ci_low", "ci_high")
    ranked = table.with_columns(pl.col(numbers).fill_nan(None)).sort(
        "score", "order", descending=[True, False], nulls_last=True
    )
    columns = ("checkpoint", "tokens_seen", "metric", "layer", "head", *numbers, "n", "retrieves")
    return (ranked if top is None else ranked.head(top)).select(columns).to_dicts()
