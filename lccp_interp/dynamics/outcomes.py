"""What the model answered, over checkpoints: NIAH score and answer perplexity, with intervals.

The two curves of arXiv 2604.02650, Figures 2, 3 and 7: the score (percent of needles that are copied without a fault)
reaches its ceiling early, the perplexity of the answer keeps falling. This module knows tables; it refuses to know
heads and pictures. Cost: one scan of the outcome parts and one matrix product per group of cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.resampling import Resamples, bootstrap_means, check_bootstrap, draw_resamples
from lccp_interp.dynamics.selection import (
    case_ids,
    choose,
    choose_mode,
    interference_cases,
    niah_cases,
    of_known_cases,
    scored_checkpoints,
    warn_of_copies,
)
from lccp_interp.schema import LccpError
from lccp_interp.store import Run

PPL_AVERAGES = ("mean_ppl", "exp_mean")
MEASURES = ("niah_score", "answer_ppl", "loss_nats")


def outcome_table(
    run: Run,
    *,
    by: Sequence[str] = ("length",),
    ppl: str = "mean_ppl",
    mode: str | None = None,
    confidence: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """NIAH score, answer perplexity and answer loss per checkpoint and group of cases (arXiv 2604.02650, Fig. 2, 3, 7).

    The NIAH score is the percentage of cases whose greedy answer is right in every token. The perplexity of a sample is
    exp(mean loss per answer token); how the paper averages it within a cell is not stated, so it is an option:
    `mean_ppl` averages the perplexities of the samples (a few hopeless samples weigh heavily), `exp_mean` is exp of the
    mean of their losses (their geometric mean, never larger).

    Args:
        run: an opened run.
        by: columns of the cases that make the groups, for example `("length",)` or `("length", "depth_fraction")`;
            `()` pools all.
        ppl: `mean_ppl` (default) or `exp_mean`.
        mode: one that the run holds; None means `teacher_forced`, or else the one it holds. In mode `generate` a case
            is right whose written answer begins with the gold one; the perplexity is that of the gold one.
        confidence: level of the intervals, in (0, 1).
        n_boot: number of resamples.
        seed: of the resamples.

    Returns:
        Columns checkpoint, tokens_seen, stage, the columns of `by`, niah_score (percent), niah_score_low,
        niah_score_high, answer_ppl, answer_ppl_low, answer_ppl_high, loss_nats (per answer token), loss_nats_low,
        loss_nats_high, n (cases with a defined loss), ci_over (`clusters` or `cases`); sorted by tokens_seen and `by`.
        Groups without a case at a checkpoint have n = 0 and NaN.

    Raises:
        LccpError: unknown column in `by`, unknown `ppl` or `mode`, or numbers out of range.

    Example:
        >>> outcome_table(Run.open("runs/demo"), by=("length",)).head(3)   # doctest: +SKIP
    """
    return _table(run, niah_cases(run), by, ppl, mode, confidence, n_boot, seed)


def interference_table(
    run: Run,
    *,
    ppl: str = "mean_ppl",
    mode: str | None = None,
    confidence: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """Score, perplexity and loss over distance and interference, per checkpoint (arXiv 2604.02650, Figures 8 and 9).

    Distance is how many tokens lie between needle and question, interference how many before the needle.

    Args:
        run: an opened run of task `interference`.
        ppl, mode, confidence, n_boot, seed: as in `outcome_table`.

    Returns:
        As `outcome_table`, with the columns distance and interference (tokens) for groups.

    Raises:
        LccpError: a run of another task, or as `outcome_table`.

    Example:
        >>> interference_table(Run.open("runs/demo/interference")).head(3)   # doctest: +SKIP
    """
    return _table(run, interference_cases(run), ("distance", "interference"), ppl, mode, confidence, n_boot, seed)


def _table(
    run: Run,
    cases: pl.DataFrame,
    by: Sequence[str],
    ppl: str,
    mode: str | None,
    confidence: float,
    n_boot: int,
    seed: int,
) -> pl.DataFrame:
    check_bootstrap(confidence, n_boot)
    choose("ppl", ppl, PPL_AVERAGES, "outcome_table")
    mode = choose_mode(run, mode)
    for column in by:
        choose("column of by", column, cases.columns, f"the cases of {run.path}")
    if len(set(by)) != len(by):
        raise LccpError(f"by names a column twice: {', '.join(by)}; name each once")
    checkpoints = scored_checkpoints(run, mode)
    measured = case_measures(run, mode)
    parts = []
    groups = cases.partition_by(*by, as_dict=True, maintain_order=True) if by else {(): cases}
    for key, members in groups.items():
        clusters = np.unique(members["cluster"].to_numpy(), return_inverse=True)[1]
        resamples = draw_resamples(clusters, n_boot=n_boot, seed=seed, confidence=confidence)
        columns = _summarise(dense_measures(measured, checkpoints, members), resamples, ppl)
        labels = [pl.lit(value, members.schema[column]).alias(column) for column, value in zip(by, key, strict=True)]
        parts.append(
            checkpoints.with_columns(
                *labels,
                *(pl.Series(name, column) for name, column in columns.items()),
                pl.lit(resamples.ci_over).alias("ci_over"),
            )
        )
    return pl.concat(parts).sort("tokens_seen", "checkpoint", *by)


def _summarise(
    values: dict[str, NDArray[np.float64]], resamples: Resamples, ppl: str
) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
    """Mean, interval and n of each measure over the cases of one group, per checkpoint."""
    columns: dict[str, NDArray[np.float64] | NDArray[np.int64]] = {}
    n = np.zeros(0, np.int64)
    for name in MEASURES:
        geometric = name == "answer_ppl" and ppl == "exp_mean"
        mean, low, high, n = bootstrap_means(values["loss_nats" if geometric else name].T, resamples)
        bounds = np.stack([mean, low, high])
        if geometric:
            bounds = np.exp(np.minimum(bounds, math.log(np.finfo(np.float64).max)))
        columns |= dict(zip((name, f"{name}_low", f"{name}_high"), bounds, strict=True))
    return {**columns, "n": n}


def case_measures(run: Run, mode: str) -> pl.DataFrame:
    """What every checkpoint did in every case: columns checkpoint, case_id and those of `MEASURES`, one row each.

    Warns of rows that are there twice (the last one is kept) and of rows of cases that the run does not have.
    """
    found = run.collect(
        run.outcomes.filter(pl.col("mode") == mode).select(
            "checkpoint",
            "case_id",
            loss_nats=pl.col("answer_loss_nats").list.mean().cast(pl.Float64),
            answer_ppl=pl.col("answer_ppl").cast(pl.Float64),
            niah_score=pl.col("greedy_exact").cast(pl.Float64) * 100,
        )
    )
    found = of_known_cases(run, "outcomes", found, case_ids(run))
    once = found.unique(("checkpoint", "case_id"), keep="last", maintain_order=True)
    warn_of_copies(run, "outcomes", found.height - once.height)
    return once


def dense_measures(
    measured: pl.DataFrame, checkpoints: pl.DataFrame, cases: pl.DataFrame, measures: Sequence[str] = MEASURES
) -> dict[str, NDArray[np.float64]]:
    """Each measure of `case_measures` as an array `[checkpoint, case]`, NaN where there is no outcome."""
    indexed = measured.join(checkpoints.select("checkpoint").with_row_index("i"), on="checkpoint").join(
        cases.select("case_id").with_row_index("j"), on="case_id"
    )
    dense = {}
    for name in measures:
        array = np.full((checkpoints.height, cases.height), np.nan)
        array[indexed["i"].to_numpy(), indexed["j"].to_numpy()] = indexed[name].fill_null(float("nan")).to_numpy()
        dense[name] = array
    return dense
