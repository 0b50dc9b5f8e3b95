"""Rankings by score and how far two of them agree: membership in top lists, rank-biased overlap, Jaccard by chance.

Most heads of a small model score exactly 0, so ties are the rule. Nowhere does an item's number decide who is in front:
what is given is the mean over all ways to break the ties, each ranking on its own. Beside it stands what two unrelated
rankings, or two unrelated sets, would have.

Pure functions of arrays: this module refuses to know heads and tables. Cost: `items x 260` multiplications for
rank-biased overlap at p = 0.9.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from lccp_interp.schema import LccpError

RBO_P = 0.9
"""Persistence of rank-biased overlap: the first ten ranks then carry 86 % of the weight."""

NEGLIGIBLE = 1e-12


def rank_biased_overlap(a: NDArray[np.floating], b: NDArray[np.floating], *, p: float = RBO_P) -> float:
    """Extrapolated rank-biased overlap of two rankings by score (Webber, Moffat and Zobel 2010, Eq. 30).

    With A_d the agreement of the two top-d lists (their overlap / d) and k the length of the shorter ranking,
    RBO = (1 - p) sum_{d=1..k} p^(d-1) A_d + p^k A_k. With ties it is the mean over all ways to break them, so that a
    ranking with ties has less than 1 with itself.

    Args:
        a, b: scores of the same items, `[item]`, higher is better; NaN for an item that a ranking does not hold.
        p: persistence in (0, 1): the weight of rank d falls as p^d.

    Returns:
        0..1; NaN where a ranking is empty or all its items are tied.

    Raises:
        LccpError: `p` outside (0, 1).

    Example:
        Top-1 lists disagree, top-2 lists agree: (1 - 0.5) * (0 + 0.5 * 1) + 0.5^2 * 1 = 0.5.

        >>> rank_biased_overlap(np.array([0.9, 0.3]), np.array([0.2, 0.8]), p=0.5)
        0.5
    """
    weights = _rbo_weights(min(int((~np.isnan(x)).sum()) for x in (a, b)), p)
    if ranks_nothing(a) or ranks_nothing(b):
        return math.nan
    depths = np.arange(1, len(weights) + 1)
    agreement = (membership(a, depths) * membership(b, depths)).sum(axis=1) / depths
    return float(weights @ agreement)


def rbo_by_chance(n_items: int, depth: int, *, p: float = RBO_P) -> float:
    """Expected rank-biased overlap of independent rankings of `n_items`, known to `depth`: there A_d is d / n_items.

    Example:
        >>> round(rbo_by_chance(1024, 1024), 4)
        0.0098
    """
    weights = _rbo_weights(depth, p)
    return float(weights @ (np.arange(1, len(weights) + 1) / n_items))


def _rbo_weights(depth: int, p: float) -> NDArray[np.float64]:
    """Weight of the agreement at each depth 1, 2, ...; beyond the last one returned the weights are negligible."""
    if not 0 < p < 1:
        raise LccpError(f"p of rank-biased overlap must lie between 0 and 1, got {p}; the usual one is {RBO_P}")
    depth = min(depth, math.ceil(math.log(NEGLIGIBLE) / math.log(p)))
    weights = (1 - p) * p ** np.arange(depth, dtype=np.float64)
    weights[-1:] += p**depth
    return weights


def membership(scores: NDArray[np.floating], depths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probability `[depth, item]` that an item is among the top `depth` by score, ties being broken at random.

    Example:
        >>> membership(np.array([0.5, 0.0, 0.0]), np.array([1, 2])).tolist()
        [[1.0, 0.0, 0.0], [1.0, 0.5, 0.5]]
    """
    listed = ~np.isnan(scores)
    ordered = np.sort(scores[listed])
    ahead = len(ordered) - np.searchsorted(ordered, scores, side="right")
    tied = np.maximum(1, len(ordered) - np.searchsorted(ordered, scores, side="left") - ahead)
    return np.clip((depths[:, None] - ahead) / tied, 0, 1) * listed


def ranks_nothing(scores: NDArray[np.floating]) -> bool:
    """Whether the scores rank nothing: none are defined, or all are the same."""
    listed = scores[~np.isnan(scores)]
    return len(listed) == 0 or (len(listed) > 1 and bool(np.ptp(listed) == 0))


def jaccard_by_chance(n_one: int, n_other: int, n_items: int) -> float:
    """Expected Jaccard index of two random sets of so many of `n_items`; NaN where both are empty.

    Example:
        >>> jaccard_by_chance(1, 1, 4), jaccard_by_chance(0, 0, 4)
        (0.25, nan)
    """
    if n_one + n_other == 0 or max(n_one, n_other) > n_items:
        return math.nan
    shared = range(max(0, n_one + n_other - n_items), min(n_one, n_other) + 1)
    weights = hypergeom.pmf(list(shared), n_items, n_one, n_other)
    return float(sum(weight * both / (n_one + n_other - both) for weight, both in zip(weights, shared, strict=True)))
