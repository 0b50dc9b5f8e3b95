"""Bootstrap intervals for means over cases, clustered by needle and haystack.

Cases that share a needle and a haystack are not independent, so resamples draw whole clusters (pairs of needle and
haystack) with replacement. One set of resamples serves every head, checkpoint and metric of a call: differences
between two of them are then paired. A resample is a row of integer weights over cases, and all resampled means are
one matrix product.

Plain percentiles of resampled means are too narrow where few units are drawn: by sqrt(n / (n - 1)), and by the normal
quantile standing where Student's should. So the percentiles are taken further out, at the level that makes up for both
(the expanded percentile interval of Hesterberg, "What Teachers Should Know About the Bootstrap", The American
Statistician 69, 2015). With 20 units that is 96.8 % in place of 95 %, with 4 all but the outermost draws. What it
cannot mend: 3 units have ten different draws, whose whole range covers about 80 %; values that are all alike give an
interval of width 0. docs/calibration.md measures both.

This module knows arrays; it refuses to know runs and tables. Cost: `n_boot x cases x columns` multiplications, in
blocks of columns so that memory stays bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from lccp_interp.schema import LccpError

MIN_CLUSTERS = 3
"""With fewer clusters than this, resampling them says nothing; single cases are resampled instead."""

BLOCK_COLUMNS = 2048


@dataclass(frozen=True)
class Resamples:
    """Weights `[resample, case]` of a bootstrap, and what was drawn.

    `ci_over` is `"clusters"` or `"cases"`, `n_units` how many of them there are, `confidence` how often the intervals
    should cover, `level` at which percentiles of these resamples do so.
    """

    weights: NDArray[np.float64]
    ci_over: str
    n_units: int
    confidence: float

    @property
    def level(self) -> float:
        """What to give `percentile_interval` so that its interval covers `confidence`, see `expanded_level`."""
        return expanded_level(self.confidence, self.n_units)


def expanded_level(confidence: float, n_units: int) -> float:
    """Level of the percentile interval that covers `confidence` when `n_units` units are resampled.

    The tails are Phi(-sqrt(n / (n - 1)) x t), t being Student's quantile of `confidence` at n - 1 degrees of freedom
    (Hesterberg 2015). Below two units there is nothing to make up for: `confidence` itself.

    Example:
        >>> [round(expanded_level(0.95, n_units), 4) for n_units in (4, 20, 1000)]
        [0.9998, 0.9682, 0.9504]
    """
    if n_units < 2:
        return confidence
    quantile = t.ppf((1 + confidence) / 2, n_units - 1) * np.sqrt(n_units / (n_units - 1))
    return float(norm.cdf(quantile) - norm.cdf(-quantile))


def check_bootstrap(confidence: float, n_boot: int) -> None:
    """Refuse a confidence outside (0, 1) and fewer than 1 resample."""
    if not 0 < confidence < 1:
        raise LccpError(f"confidence must lie between 0 and 1, got {confidence}; the usual one is 0.95")
    if n_boot < 1:
        raise LccpError(f"n_boot must be at least 1, got {n_boot}; the usual number is 1000")


def draw_resamples(
    clusters: NDArray[np.int64], *, n_boot: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Resamples:
    """Draw bootstrap weights over cases, whole clusters at a time.

    With G clusters a resample draws G of them with replacement; a case weighs as often as its cluster was drawn.
    With fewer than `MIN_CLUSTERS` clusters, cases are drawn instead and `ci_over` says so.

    Args:
        clusters: cluster number of each case, shape `[case]`, integers 0..G-1.
        n_boot: number of resamples.
        seed: of the draw.
        confidence: how often the intervals to be taken should cover, in (0, 1).

    Raises:
        LccpError: `confidence` or `n_boot` out of range.

    Example:
        >>> resamples = draw_resamples(np.array([0, 0, 1, 2]), n_boot=5)
        >>> resamples.weights.shape, resamples.ci_over, resamples.n_units
        ((5, 4), 'clusters', 3)
        >>> bool((resamples.weights[:, 0] == resamples.weights[:, 1]).all())
        True
    """
    check_bootstrap(confidence, n_boot)
    n_units = int(clusters.max()) + 1 if clusters.size else 0
    ci_over = "clusters"
    if n_units < MIN_CLUSTERS:
        clusters, n_units, ci_over = np.arange(clusters.size), clusters.size, "cases"
    if n_units == 0:
        return Resamples(np.zeros((n_boot, 0)), ci_over, 0, confidence)
    counts = np.random.default_rng(seed).multinomial(n_units, np.full(n_units, 1 / n_units), size=n_boot)
    return Resamples(counts[:, clusters].astype(np.float64), ci_over, n_units, confidence)


def mean_defined(values: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean over the first axis of the values that are not NaN, and how many they are; NaN where there is none.

    Example:
        >>> mean_defined(np.array([[1.0, np.nan], [3.0, np.nan]]))
        (array([ 2., nan]), array([2, 0]))
    """
    defined = ~np.isnan(values)
    n = defined.sum(axis=0)
    total = np.where(defined, values, 0).sum(axis=0, dtype=np.float64)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan), n


def resampled_means(values: NDArray[np.floating], resamples: Resamples) -> NDArray[np.float64]:
    """Mean of every column in every resample, NaN values left out.

    Args:
        values: `[case, column]`.
        resamples: weights over the same cases.

    Returns:
        `[resample, column]`; NaN where a resample holds no defined value of the column.
    """
    return _means_of_rows(values, resamples).T


def _means_of_rows(values: NDArray[np.floating], resamples: Resamples) -> NDArray[np.float64]:
    """`resampled_means` as `[column, resample]`, contiguous: what sorting wants."""
    columns = values.T.astype(np.float64)
    undefined = np.isnan(columns)
    if not undefined.any():
        return np.asarray(columns @ resamples.weights.T / resamples.weights.sum(axis=1))
    total = np.where(undefined, 0, columns) @ resamples.weights.T
    weight = (~undefined).astype(np.float64) @ resamples.weights.T
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan)


def percentile_interval(
    draws: NDArray[np.float64], confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Central percentile interval of every column of `draws` `[resample, column]`; NaN draws are left out.

    Example:
        >>> low, high = percentile_interval(np.arange(101.0)[:, None], 0.9)
        >>> round(float(low[0])), round(float(high[0]))
        (5, 95)
    """
    return _interval_of_rows(np.ascontiguousarray(draws.T), confidence)


def _interval_of_rows(draws: NDArray[np.float64], confidence: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`percentile_interval` for `[column, resample]`, which it may reorder."""
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    bounds = np.full((2, draws.shape[0]), np.nan)
    # One sum per row finds its NaN; rows that have some go their own way.
    whole = ~np.isnan(draws.sum(axis=1))
    ordered = draws if whole.all() else draws[whole]
    # Linear interpolation between order statistics, as `np.quantile` has it; sorted rows are three times as fast.
    ordered.sort(axis=1)
    for bound, tail in zip(bounds, tails, strict=True):
        place = tail * (draws.shape[1] - 1)
        below, above = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
        bound[whole] = below + (above - below) * (place - math.floor(place))
    for row in np.flatnonzero(~whole):
        if (defined := draws[row][~np.isnan(draws[row])]).size:
            bounds[:, row] = np.quantile(defined, tails)
    return bounds[0], bounds[1]


def bootstrap_means(
    values: NDArray[np.floating], resamples: Resamples
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean, expanded percentile interval and number of defined values of every column.

    With fewer than two units to resample the interval is NaN: one case says nothing about its own spread.

    Args:
        values: `[case, column]`, NaN where undefined.
        resamples: weights over the same cases.

    Returns:
        mean, low, high, n, each `[column]`.

    Example:
        >>> resamples = draw_resamples(np.arange(4), n_boot=200)
        >>> mean, low, high, n = bootstrap_means(np.array([[0.0], [1.0], [0.0], [1.0]]), resamples)
        >>> float(mean[0]), bool(low[0] < 0.5 < high[0]), int(n[0])
        (0.5, True, 4)
    """
    mean, n = mean_defined(values)
    low = np.full(values.shape[1], np.nan)
    high = low.copy()
    if resamples.n_units >= 2:
        for start in range(0, values.shape[1], BLOCK_COLUMNS):
            block = slice(start, start + BLOCK_COLUMNS)
            low[block], high[block] = _interval_of_rows(_means_of_rows(values[:, block], resamples), resamples.level)
    return mean, low, high, n


def share_interval(
    score: NDArray[np.float64], stderr: NDArray[np.float64], n: NDArray[np.int64], top: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % intervals of scores: Wilson's of a share, else 1.96 standard errors to each side.

    A share's standard error says how many yes-or-no items would have it, and Wilson's interval is that of so many. It
    stays within the scale, and where all items score alike, which leaves no standard error, it is that of `n` items
    instead of nothing.

    Args:
        score, stderr: `[checkpoint]`, the second NaN where it is not known.
        n: items, 0 where that is not known.
        top: the highest score that can be; None where the score is no share.

    Returns:
        Lower and upper ends, `[checkpoint]`; NaN where nothing is known.

    Example:
        >>> low, high = share_interval(np.array([0.5, 1.0]), np.array([0.125, 0.0]), np.array([16, 16]), 1.0)
        >>> low.round(2), high.round(2)
        (array([0.28, 0.81]), array([0.72, 1.  ]))
    """
    z = 1.96
    if top is None:
        return score - z * stderr, score + z * stderr
    share, error = score / top, stderr / top
    with np.errstate(divide="ignore", invalid="ignore"):
        alike = share * (1 - share) / error**2
        known = (error > 0) & (share > 0) & (share < 1)
        items = np.where(known, alike, np.where(n > 0, n, np.nan))
    centre = (share + z**2 / (2 * items)) / (1 + z**2 / items)
    half = z / (1 + z**2 / items) * np.sqrt(share * (1 - share) / items + z**2 / (4 * items**2))
    return top * np.clip(centre - half, 0, 1), top * np.clip(centre + half, 0, 1)
