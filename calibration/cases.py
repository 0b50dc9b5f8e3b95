"""Made-up per-case retrieval scores that behave like real ones: coarse, clustered, and of the same cases every time.

A case's answer has k distinct tokens and the score is the share of them that the head looks at: 0, 1/k, ..., 1. Whether
a token is looked at depends on a latent difficulty with three normal parts: of the cluster (needle and haystack), of
the case, of the token. A fraction `memory` of each part's variance is the same at all checkpoints, since the cases are;
the rest is drawn anew at each. A token is hit if its difficulty lies below the quantile of the head's level, so the
expected score is that level exactly, whatever the shares.

In the bundled runs two checkpoints' per-case scores of one head correlate at 0.4 to 0.6 late in training (0.37 to 0.63
by length), and the variance over cases is about 0.2 p (1 - p), as with five tokens. This module knows arrays only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri


@dataclass(frozen=True)
class Design:
    """Which cases there are, and how alike: `n_clusters` of equal size, shares of the latent variance.

    Example:
        >>> Design(20, 4).clusters
        array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
    """

    n_cases: int
    n_clusters: int
    memory: float = 0.5
    cluster_share: float = 0.2
    case_share: float = 0.2

    @property
    def clusters(self) -> NDArray[np.int64]:
        """Cluster number of each case."""
        return np.arange(self.n_cases) % self.n_clusters


def draw_values(
    level: NDArray[np.float64], n_tokens: NDArray[np.int64], design: Design, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Per-case scores of many heads.

    Args:
        level: expected score `[head, checkpoint]`, 0..1.
        n_tokens: distinct tokens of the answer, `[head]`: heads stand for runs with answers of different length.
        design: the cases.
        rng: source of all draws.

    Returns:
        Scores `[checkpoint, case, head]`, as `HeadValues.values`.

    Example:
        >>> values = draw_values(np.full((2, 3), 0.3), np.array([1, 4]), Design(8, 8), np.random.default_rng(0))
        >>> values.shape, sorted(set(values[:, :, 0].ravel().tolist()))
        ((3, 8, 2), [0.0, 1.0])
    """
    n_heads, n_checkpoints = level.shape
    quantile = ndtri(level).astype(np.float32)[:, :, None]

    def part(share: float, n: int) -> NDArray[np.float32]:
        kept = rng.standard_normal((n_heads, 1, n), dtype=np.float32) * np.float32(np.sqrt(share * design.memory))
        new = rng.standard_normal((n_heads, n_checkpoints, n), dtype=np.float32)
        return kept + new * np.float32(np.sqrt(share * (1 - design.memory)))

    shared = part(design.case_share, design.n_cases)
    shared += part(design.cluster_share, design.n_clusters)[:, :, design.clusters]
    token_share = 1 - design.case_share - design.cluster_share
    hits = np.zeros(shared.shape, np.float32)
    for token in range(int(n_tokens.max())):
        hit = shared + part(token_share, design.n_cases) < quantile
        hits += hit & (n_tokens > token)[:, None, None]
    return (hits / n_tokens[:, None, None]).transpose(1, 2, 0)
