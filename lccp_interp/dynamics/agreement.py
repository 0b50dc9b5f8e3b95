"""Do head metrics mean the same heads? Every pair of metrics of a run, per checkpoint: rank correlation, top lists.

Metrics that are called retrieval scores measure different things (arg-max copies, attention mass, logits carried), and
none stands for another here; this table says how far two of them rank the heads alike. Head types that retrieve
nothing (`entropy`, `sink_mass`, `streaming`) serve as controls. Heads are ranked by their mean over cases; the top
lists break ties at random, in the mean (`ranking`).

Intervals resample pairs of needle and haystack, the same draws for both metrics. The noise of a resample pulls rank
correlations towards 0, so they lie somewhat low, and may end below the correlation itself where few cases are behind
it. This module knows tables; it refuses to know models. Cost: one scan of the score parts per metric, one ranking of
the heads per metric, checkpoint and resample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

from lccp_interp.dynamics.heads import effective_top_k, spearman
from lccp_interp.dynamics.ranking import membership, ranks_nothing
from lccp_interp.dynamics.resampling import (
    Resamples,
    draw_resamples,
    mean_defined,
    percentile_interval,
    resampled_means,
)
from lccp_interp.dynamics.selection import HeadValues, choose, choose_metric, head_values
from lccp_interp.schema import NULL_SUFFIX, LccpError
from lccp_interp.store import Run

AGREEMENT_SCHEMA = {
    "checkpoint": pl.String,
    "tokens_seen": pl.Int64,
    "length": pl.Int64,
    "metric": pl.String,
    "other": pl.String,
    "spearman": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "top_k": pl.Int64,
    "overlap": pl.Float64,
    "overlap_by_chance": pl.Float64,
    "n_heads": pl.Int64,
    "n": pl.Int64,
}


def metric_agreement(
    run: Run,
    *,
    metrics: Sequence[str] | None = None,
    length: int | None = None,
    checkpoint: str | None = None,
    mode: str | None = None,
    top_k: int | None = None,
    confidence: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """How far every two metrics of a run rank the heads alike.

    Args:
        run: an opened run.
        metrics: at least two; None means all that the run holds, in the order it was asked for them.
        length, mode: as in `score_table`.
        checkpoint: only this one; `last` means the last scored one.
        top_k: size of the top lists; None means min(30, a quarter of the heads).
        confidence, n_boot, seed: of the intervals.

    Returns:
        Columns checkpoint, tokens_seen, length, metric, other, spearman (over the heads that both define; NaN where a
        metric is the same for all), ci_low, ci_high, top_k, overlap (heads in both top lists), overlap_by_chance
        (top_k^2 / heads), n_heads (defined in both), n (cases behind them). One row per checkpoint and pair.

    Raises:
        LccpError: fewer than two metrics, an unknown metric, checkpoint, length or mode.

    Example:
        >>> metric_agreement(Run.open("runs/demo"), checkpoint="last")   # doctest: +SKIP
    """
    names = _chosen(run, metrics)
    found = [head_values(run, metric=name, length=length, mode=mode) for name in names]
    scored = found[0].checkpoints["checkpoint"].to_list()
    wanted = scored
    if checkpoint is not None:
        last = checkpoint == "last" and "last" not in scored
        wanted = [scored[-1] if last else choose("checkpoint", checkpoint, scored, str(run.path))]
    resamples = draw_resamples(found[0].clusters, n_boot=n_boot, seed=seed, confidence=confidence)
    rows: list[dict[str, Any]] = []
    for at, (name, tokens) in enumerate(found[0].checkpoints.select("checkpoint", "tokens_seen").rows()):
        if name not in wanted:
            continue
        rankings = [_Ranking.of(values, at, resamples) for values in found]
        rows += [
            {
                "checkpoint": name,
                "tokens_seen": tokens,
                "length": found[0].length,
                "metric": names[one],
                "other": names[other],
                **_measures(rankings[one], rankings[other], resamples, top_k),
            }
            for one, other in combinations(range(len(names)), 2)
        ]
    return pl.DataFrame(rows, schema=AGREEMENT_SCHEMA)


def held_metrics(run: Run) -> list[str]:
    """The head metrics that a run holds, without their nulls, in the order it was asked for them.

    Example:
        >>> held_metrics(Run.open("runs/demo"))   # doctest: +SKIP
        ['retrieval', 'wu', 'copy', 'needle_mass']
    """
    held = run.collect(run.scores.select(pl.col("metric").unique()))["metric"].sort().to_list()
    known = [name for name in held if not name.endswith(NULL_SUFFIX)]
    asked = list(run.config.get("metrics", ()))
    known.sort(key=lambda name: asked.index(name) if name in asked else len(asked))
    return known


def _chosen(run: Run, metrics: Sequence[str] | None) -> list[str]:
    known = held_metrics(run)
    names = known if metrics is None else [choose_metric(name, known, run) for name in metrics]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        more = "" if len(known) > 1 else "; `lccp score CHECKPOINT... --metrics NAMES --out ANOTHER_RUN` measures more"
        raise LccpError(
            f"{run.path}: agreement is between at least two different metrics, got {', '.join(names) or 'none'}; the "
            f"run holds {', '.join(known)}{more}"
        )
    return names


@dataclass(frozen=True)
class _Ranking:
    """Scores `[head]` of one metric at one checkpoint, in every resample `[resample, head]`, and the cases behind."""

    heads: NDArray[np.int64]
    scores: NDArray[np.float64]
    draws: NDArray[np.float64]
    n: int

    @classmethod
    def of(cls, values: HeadValues, at: int, resamples: Resamples) -> _Ranking:
        per_case = values.values[at]
        scores, n = mean_defined(per_case)
        return cls(values.heads, scores, resampled_means(per_case, resamples), int(n.max(initial=0)))


def _measures(one: _Ranking, other: _Ranking, resamples: Resamples, top_k: int | None) -> dict[str, Any]:
    if not np.array_equal(one.heads, other.heads):
        raise LccpError("the metrics are of different heads; score them in one run")
    both = ~np.isnan(one.scores) & ~np.isnan(other.scores)
    mine, theirs = one.scores[both], other.scores[both]
    n_heads = int(both.sum())
    low = high = math.nan
    if resamples.n_units >= 2 and n_heads >= 2:
        draws = _row_spearman(one.draws[:, both], other.draws[:, both])
        bounds = percentile_interval(draws[:, None], resamples.level)
        low, high = float(bounds[0][0]), float(bounds[1][0])
    k = effective_top_k(top_k, n_heads) if n_heads else None
    no_ranking = ranks_nothing(mine) or ranks_nothing(theirs)
    overlap = math.nan
    if k is not None and not no_ranking:
        overlap = float((membership(mine, np.array([k])) * membership(theirs, np.array([k]))).sum())
    return {
        "spearman": spearman(mine, theirs),
        "ci_low": low,
        "ci_high": high,
        "top_k": k,
        "overlap": overlap,
        "overlap_by_chance": k * k / n_heads if k is not None else math.nan,
        "n_heads": n_heads,
        "n": min(one.n, other.n),
    }


def _row_spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rho of each pair of rows; NaN where one is constant or holds NaN."""
    ranks = [rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (a, b)]
    spread = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
    defined = ~np.isnan(a).any(axis=1) & ~np.isnan(b).any(axis=1) & (spread > 0)
    rho = (ranks[0] * ranks[1]).sum(axis=1) / np.where(spread > 0, spread, 1)
    return np.where(defined, rho, np.nan)
