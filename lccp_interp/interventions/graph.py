"""A small graph of heads: which earlier heads feed a head's query, key and value, and how much each of them does.

A node is a head; an edge goes from a sender to one input of a receiver and weighs what the score of a head asked about
(the *target*) loses when this edge alone carries something else. Depth 1 ends in a target; depth 2 is one step before:
what feeds its feeders, weighed by the loss of the same target.

Intervals are Student's over the means of clusters of cases (pairs of needle and haystack), like those of the tables;
they are not adjusted for how many edges there are, so of a hundred edges that carry nothing five look clear at 95 %.
It refuses to know models, and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import t

from lccp_interp.interventions.heads import Head, head_text

CONFIDENCE = 0.95

TABLE_SCHEMA: dict[str, Any] = {
    "depth": pl.Int64,
    "sender": pl.String,
    "input": pl.String,
    "receiver": pl.String,
    "target": pl.String,
    "target_input": pl.String,
    "metric": pl.String,
    "usual": pl.Float64,
    "weight": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "share": pl.Float64,
    "n": pl.Int64,
    "n_clusters": pl.Int64,
}
"""`usual` is the target's score with nothing changed, `weight` what it loses, `share` weight / usual (NaN where that is
0); `target_input` is where an edge of depth 2 goes on to, the same as `input` at depth 1."""


@dataclass(frozen=True, order=True)
class Route:
    """From a sender into one input (`q`, `k`, `v`) of a receiver; at depth 2, from there into one of the target's."""

    sender: Head
    receiver: Head
    input: str
    target: Head
    target_input: str

    @property
    def depth(self) -> int:
        """1 where the receiver is the target, else 2."""
        return 1 if self.receiver == self.target else 2


@dataclass(frozen=True)
class HeadEdge:
    """A route with what it carries.

    Attributes:
        route: from where to where.
        weight: what the target's score loses, mean over cases; below 0 where it gains.
        low, high: 95 % interval; NaN with fewer than two clusters.
        n, n_clusters: cases, and pairs of needle and haystack among them.
    """

    route: Route
    weight: float
    low: float
    high: float
    n: int
    n_clusters: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class HeadGraph:
    """Which heads feed which, at one checkpoint.

    Attributes:
        checkpoint: its name.
        metric: what is lost, a head metric of the target.
        kind: what senders put out instead, one of `circuits.KINDS`.
        usual: the targets' scores with nothing changed, mean over cases.
        together: by target and input, what the target loses when all earlier heads send something else into that input
            at once, and only they: the rest comes by way of the embedding and the MLPs.
        edges: all that were measured.
        n_cases: how many cases they were measured on; 0 where that is not known.
        length: of the cases, tokens; 0 where that is not known.

    Example:
        >>> edge = HeadEdge(Route((0, 1), (2, 2), "k", (2, 2), "k"), 0.3, 0.2, 0.4, 12, 12)
        >>> graph = HeadGraph("step-1", "needle_mass", "resample", {(2, 2): 0.6}, {((2, 2), "k"): 0.5}, (edge,))
        >>> graph.table().select("sender", "input", "receiver", "weight", "share").rows()
        [('0-1', 'k', '2-2', 0.3, 0.5)]
    """

    checkpoint: str
    metric: str
    kind: str
    usual: Mapping[Head, float]
    together: Mapping[tuple[Head, str], float]
    edges: tuple[HeadEdge, ...]
    n_cases: int = 0
    length: int = 0

    @property
    def heads(self) -> list[Head]:
        """Every head that an edge begins or ends in, and the targets."""
        ends = {head for edge in self.edges for head in (edge.route.sender, edge.route.receiver)}
        return sorted(ends | set(self.usual))

    def strongest(self, n: int = 12, *, depth: int | None = None, least_share: float = 0.0) -> HeadGraph:
        """The graph of the `n` edges with the greatest weights, up or down, out of those whose interval leaves out 0.

        Args:
            n: at most so many.
            depth: of this depth only; None means of any.
            least_share: only edges whose weight is at least this share of the target's usual score.

        Example:
            >>> edge = HeadEdge(Route((0, 1), (2, 2), "k", (2, 2), "k"), 0.3, -0.2, 0.8, 3, 3)
            >>> HeadGraph("step-1", "needle_mass", "resample", {(2, 2): 0.6}, {}, (edge,)).strongest().edges
            ()
        """
        clear = [
            edge
            for edge in self.edges
            if edge.is_clear
            and depth in (None, edge.route.depth)
            and abs(edge.weight) >= least_share * abs(self.usual[edge.route.target])
        ]
        ranked = sorted(clear, key=lambda edge: (-abs(edge.weight), edge.route))
        return replace(self, edges=tuple(ranked[:n]))

    def table(self) -> pl.DataFrame:
        """One row per edge, columns as in `TABLE_SCHEMA`: depth 1 first, the greatest weights first."""
        rows = []
        for edge in sorted(self.edges, key=lambda edge: (edge.route.depth, -edge.weight, edge.route)):
            route, usual = edge.route, self.usual[edge.route.target]
            rows.append(
                {
                    "depth": route.depth,
                    "sender": head_text([route.sender]),
                    "input": route.input,
                    "receiver": head_text([route.receiver]),
                    "target": head_text([route.target]),
                    "target_input": route.target_input,
                    "metric": self.metric,
                    "usual": usual,
                    "weight": edge.weight,
                    "ci_low": edge.low,
                    "ci_high": edge.high,
                    "share": edge.weight / usual if usual else math.nan,
                    "n": edge.n,
                    "n_clusters": edge.n_clusters,
                }
            )
        return pl.DataFrame(rows, schema=TABLE_SCHEMA)


def edges_of(losses: Mapping[Route, Sequence[float]], clusters: Sequence[object]) -> list[HeadEdge]:
    """Edges from what each case lost on each route.

    Args:
        losses: one number per case, by route.
        clusters: what each case shares with others: those that are equal count as one.

    Example:
        >>> route = Route((0, 1), (2, 2), "k", (2, 2), "k")
        >>> (edge,) = edges_of({route: [0.1, 0.3, 0.2, 0.2]}, ["a", "b", "c", "c"])
        >>> round(edge.weight, 3), round(edge.low, 3), round(edge.high, 3), edge.n_clusters
        (0.2, 0.014, 0.386, 3)
    """
    names = list(dict.fromkeys(clusters))
    number = np.array([names.index(cluster) for cluster in clusters])
    edges = []
    for route, values in losses.items():
        array = np.asarray(values, dtype=np.float64)
        low, high = _interval(array, number)
        edges.append(HeadEdge(route, float(array.mean()), low, high, array.size, len(names)))
    return edges


def _interval(values: NDArray[np.float64], cluster: NDArray[np.int64]) -> tuple[float, float]:
    """Student's interval of a mean over cases of which those of one cluster go together."""
    n_clusters = int(cluster.max()) + 1
    if n_clusters < 2:
        return math.nan, math.nan
    # What each cluster adds to the mean beyond its share.
    excess = np.bincount(cluster, weights=values - values.mean()) / values.size
    variance = n_clusters / (n_clusters - 1) * float((excess**2).sum())
    reach = float(t.ppf((1 + CONFIDENCE) / 2, n_clusters - 1)) * math.sqrt(variance)
    return float(values.mean()) - reach, float(values.mean()) + reach
