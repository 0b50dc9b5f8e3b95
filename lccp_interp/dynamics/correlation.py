"""How well cheap signals follow dear ones over the checkpoints of a run, tested as few, trending points demand.

The paper correlates NIAH score, answer perplexity and retrieval heads with benchmark results after light fine-tuning
(arXiv 2604.02650, Tables 3, 4, 6 and 7): Pearson r of six checkpoints. Two curves that both rise correlate, whatever
they have to do with each other, so a p-value of the *levels* says next to nothing under a trend: permuting a trending
series breaks its trend too, and the null that this makes is not the question. It is shown because the paper shows it.
Beside it stand

- `detrended`: what is left of both series after least squares on log tokens;
- `differences`: the steps from checkpoint to checkpoint, after the drift per log token is taken out of them.

Their p-values come from permutations of one series before its trend is removed again. What may be permuted depends on
the noise, which so few points do not tell: if it is new at every checkpoint, the residuals; if it adds up, the steps.
Both are done and the larger p is reported. docs/calibration.md holds what that is worth: of 2,000 pairs of independent
series (6 to 19 checkpoints, trends in log tokens, autoregressive noise of strength 0 to 1) the paper's test calls 89 %
significant at 0.05, `detrended` 4.0 %, `differences` 3.6 %, one or the other 5.9 %. It does not help where the trend is
not one of log tokens: on two curves that rise and level off they are fooled in 14 % and 12 %.

This module knows series; it refuses to know models and pictures. Cost: n! permutations up to n = 8, else 9999 draws,
per cheap series and transform; a hundredth of a second each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, rankdata
from scipy.stats import t as student_t

from lccp_interp.dynamics.probe_choice import MEAN
from lccp_interp.dynamics.published import published_correlations
from lccp_interp.dynamics.selection import choose
from lccp_interp.dynamics.series import IMPORT_HINT, SeriesPair, align
from lccp_interp.schema import LccpError

Array = NDArray[np.float64]

METHODS = ("pearson", "spearman", "kendall")
TRANSFORMS = ("levels", "detrended", "differences")

MIN_N = 4
"""With fewer values no correlation is reported: the smallest p of 3 is 1 in 3."""

MIN_LAG_N = 8
"""With fewer steps a shifted correlation is not reported: lags compete for the few points there are."""

EXACT_UP_TO = 8
"""So many values are permuted in all ways (40,320), more at random."""

SCHEMA = {
    "cheap": pl.String,
    "probe": pl.String,
    "transform": pl.String,
    "method": pl.String,
    "n": pl.Int64,
    "r": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "p": pl.Float64,
    "p_kind": pl.String,
    "q": pl.Float64,
    "p_t": pl.Float64,
    "published_r": pl.Float64,
    "published_p": pl.Float64,
    "reason": pl.String,
}

PUBLISHED_COLUMNS = ("p_t", "published_r", "published_p")
"""Columns of Pearson levels only."""

_TINY = 1e-9
"""Below this share of a series' range a number is rounding."""


@dataclass(frozen=True)
class Draws:
    """How much is drawn: permutations where n is above 8, bootstrap resamples, their seed, the level of intervals."""

    n_perm: int = 9999
    n_boot: int = 1000
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.n_perm < 99 or self.n_boot < 1 or not 0 < self.confidence < 1:
            raise LccpError(
                f"n_perm must be at least 99, n_boot at least 1 and confidence between 0 and 1, got {self.n_perm}, "
                f"{self.n_boot} and {self.confidence}; the usual ones are 9999, 1000 and 0.95"
            )


def correlate(
    cheap: pl.DataFrame,
    probes: pl.DataFrame | None = None,
    *,
    method: str = "pearson",
    transforms: Sequence[str] = TRANSFORMS,
    common: bool = False,
    draws: Draws | None = None,
) -> pl.DataFrame:
    """Correlate every cheap series with every probe series over checkpoints.

    The interval is a percentile bootstrap over checkpoints (over steps for `differences`). At n = 6 it is too narrow,
    and under a trend its points are not independent: read it as a sketch.

    Args:
        cheap: long table with columns checkpoint, tokens_seen (training tokens), name, value.
        probes: the same of the dear results; None correlates the cheap series among themselves, each pair once.
        method: `pearson`, `spearman` (average ranks) or `kendall` (tau-b).
        transforms: any of `levels`, `detrended`, `differences`.
        common: let each pair use the checkpoints that both its series have; else a series that lacks one is refused.
        draws: numbers of permutations and resamples, seed, confidence; None means `Draws()`.

    Returns:
        One row per pair and transform: cheap, probe, transform, method, n (checkpoints, or steps for `differences`), r,
        ci_low, ci_high, p (two-sided permutation test; the module says of what), p_kind (`exact permutation`, `all
        permutations` of residuals, which are not quite exchangeable, or `permutation, N draws`), q
        (Benjamini-Hochberg over the p of the whole table), p_t (the paper's test, t with n - 2 degrees of freedom, for
        Pearson levels), published_r and published_p (arXiv 2604.02650, where the pair corresponds; levels, Pearson; of
        another model, and beside a benchmark named `...-style`, made in its manner, of other data too),
        reason (why a number is NaN, or how many checkpoints are undefined; empty else).

    Raises:
        LccpError: missing columns, unknown method or transform, checkpoints that do not match (both sides are named),
            a series with two values at a checkpoint, checkpoints that share a token count or have two.

    Example:
        >>> def series(name, values):
        ...     return pl.DataFrame({"checkpoint": list("abcdef"), "tokens_seen": [0, 20, 50, 100, 150, 200],
        ...                          "name": name, "value": values})
        >>> score = series("niah_score", [40.0, 90.0, 100.0, 100.0, 100.0, 100.0])
        >>> ruler = series("RULER", [68.7, 75.0, 78.0, 79.4, 79.0, 79.2])
        >>> correlate(score, ruler).select("transform", "n", pl.col("r", "p").round(3)).rows()
        [('levels', 6, 0.97, 0.033), ('detrended', 6, 0.954, 0.075), ('differences', 5, 0.925, 0.042)]
    """
    draws = draws or Draws()
    choose("method", method, METHODS, "correlate")
    for transform in transforms:
        choose("transform", transform, TRANSFORMS, "correlate")
    rows = []
    for pair in align(cheap, probes, common=common):
        rows += [_row(pair, transform, method, draws) for transform in transforms]
    return _beside_published(_with_q(pl.DataFrame(rows, schema=SCHEMA)))


def lead_lag(
    cheap: pl.DataFrame,
    probes: pl.DataFrame | None = None,
    *,
    max_lag: int = 2,
    method: str = "pearson",
    common: bool = False,
    draws: Draws | None = None,
) -> pl.DataFrame:
    """Correlate the steps of every cheap series with the steps that every probe makes some checkpoints later.

    Lags count checkpoints, not tokens: with uneven checkpoints a lag is no span of training.

    Args:
        cheap, probes, method, common, draws: as in `correlate`.
        max_lag: largest lag in checkpoints, both ways.

    Returns:
        The columns of `correlate` without the paper's (p_t, published_r, published_p), behind a column lag; at lag
        k > 0 the cheap metric leads by k checkpoints. All rows are of `differences`. Where fewer than 8 steps overlap
        r is NaN and `reason` says so.

    Raises:
        LccpError: as `correlate`; `max_lag` below 1.
    """
    draws = draws or Draws()
    choose("method", method, METHODS, "lead_lag")
    if max_lag < 1:
        raise LccpError(f"max_lag must be at least 1, got {max_lag}; at lag 0 use correlate")
    rows = []
    for pair in align(cheap, probes, common=common):
        for lag in range(-max_lag, max_lag + 1):
            shifted = pair.shifted(lag)
            rows.append({"lag": lag, **_row(shifted, "differences", method, draws, min_n=MIN_LAG_N)})
    schema = {"lag": pl.Int64, **{name: kind for name, kind in SCHEMA.items() if name not in PUBLISHED_COLUMNS}}
    return _with_q(pl.DataFrame(rows, schema=schema))


def transformed(values: Array, log_tokens: Array, transform: str) -> Array:
    """Series or stack of series with the trend in log tokens removed.

    Args:
        values: `[..., checkpoint]`.
        log_tokens: `[checkpoint]`, rising.
        transform: `levels` (unchanged), `detrended` (residuals of least squares on 1 and log tokens) or `differences`
            (steps less drift times steps of log tokens, the drift by least squares).

    Returns:
        `[..., checkpoint]`, or `[..., checkpoint - 1]` for `differences`.

    Example:
        >>> x = np.log([1.0, 2.0, 4.0, 8.0])
        >>> np.abs(transformed(3 + 2 * x, x, "detrended")).max().round(6)
        np.float64(0.0)
        >>> transformed(np.array([0.0, 1.0, 0.0, 1.0]), np.arange(4.0), "differences").round(3)
        array([ 0.667, -1.333,  0.667])
    """
    if transform == "detrended":
        return values @ _residual_maker(np.stack([np.ones_like(log_tokens), log_tokens], axis=1))
    if transform == "differences":
        return np.diff(values) @ _residual_maker(np.diff(log_tokens)[:, None])
    return values


def _residual_maker(design: Array) -> Array:
    """Symmetric matrix that takes a vector to what least squares on `design` leaves of it."""
    q = np.linalg.qr(design)[0]
    return np.asarray(np.eye(len(design)) - q @ q.T)


@lru_cache(maxsize=32)
def permutations(n: int, n_perm: int, seed: int) -> tuple[NDArray[np.int64], bool]:
    """All permutations of n things, `[permutation, n]`, and True; above 8 things `n_perm` random ones, and False."""
    if n <= EXACT_UP_TO:
        return np.array(list(itertools.permutations(range(n)))), True
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(n) for _ in range(n_perm)]), False


def embedded(values: Array, method: str) -> Array:
    """Unit vectors `[..., k]` whose inner products are the correlations; zero vectors where there is no variance.

    Centred values for Pearson, centred ranks for Spearman, signs of all pairwise differences for Kendall's tau-b.
    """
    if method == "kendall":
        first, second = np.triu_indices(values.shape[-1], k=1)
        vectors = np.sign(values[..., second] - values[..., first])
    else:
        vectors = rankdata(values, axis=-1) if method == "spearman" else values
        vectors = vectors - vectors.mean(axis=-1, keepdims=True)
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(np.where(norm > _TINY, vectors / np.where(norm > _TINY, norm, 1), 0))


def rounded(values: Array) -> Array:
    """Values of a series of range about 1 without their rounding noise: equal steps stay ties for ranks and signs."""
    return np.round(values, 10)


def _scaled(values: Array) -> Array:
    """The series moved to mean 0 and scaled to range 1; all zeros if it is constant."""
    spread = float(np.ptp(values))
    constant = spread <= 1e-12 * float(np.abs(values).max())
    return np.zeros_like(values) if constant else (values - values.mean()) / spread


@lru_cache(maxsize=4)
def _null_vectors(
    values: tuple[float, ...], log_tokens: tuple[float, ...], transform: str, method: str, draws: Draws
) -> list[tuple[Array, bool]]:
    """Embedded series `[permutation, k]` as the null makes them, and whether they are all there are.

    For levels the permuted series. Else two sets: permuted residuals (noise that is new at every checkpoint) and sums
    of permuted steps (noise that adds up), the trend removed from each. Kept for the next probe of the same series.
    """
    series, x = np.array(values), np.array(log_tokens)
    order, whole = permutations(series.size, draws.n_perm, draws.seed)
    made = [(series[order], whole)]
    if transform != "levels":
        steps = transformed(series, x, "differences")
        order_steps, whole_steps = permutations(steps.size, draws.n_perm, draws.seed)
        walks = np.concatenate([np.zeros((len(order_steps), 1)), np.cumsum(steps[order_steps], axis=1)], axis=1)
        made = [(transformed(series, x, "detrended")[order], whole), (walks, whole_steps)]
    return [(embedded(rounded(transformed(stack, x, transform)), method), whole) for stack, whole in made]


def _p_value(pair: SeriesPair, other: Array, r: float, transform: str, method: str, draws: Draws) -> tuple[float, str]:
    """Two-sided p of `r`, the larger over the nulls, and how it was had; `other` is the embedded probe."""
    largest, all_whole = 0.0, True
    key = tuple(_scaled(pair.cheap).tolist()), tuple(pair.cheap_log_tokens.tolist())
    for vectors, whole in _null_vectors(*key, transform, method, draws):
        null = vectors @ other
        as_extreme = int(np.count_nonzero(np.abs(null) >= abs(r) - _TINY))
        p = as_extreme / len(null) if whole else (1 + as_extreme) / (1 + len(null))
        largest, all_whole = max(largest, p), all_whole and whole
    if not all_whole:
        return largest, f"permutation, {draws.n_perm} draws"
    return largest, "exact permutation" if transform == "levels" else "all permutations"


def _interval(x: Array, y: Array, method: str, draws: Draws) -> tuple[float, float]:
    """Percentile bootstrap over pairs; resamples without variance are left out, NaN if they are most."""
    index = np.random.default_rng(draws.seed).integers(0, x.size, (draws.n_boot, x.size))
    first, second = embedded(x[index], method), embedded(y[index], method)
    defined = first.any(axis=1) & second.any(axis=1)
    if np.count_nonzero(defined) <= draws.n_boot / 2:
        return float("nan"), float("nan")
    tail = (1 - draws.confidence) / 2
    low, high = np.quantile(np.sum(first * second, axis=1)[defined].clip(-1, 1), [tail, 1 - tail])
    return float(low), float(high)


def _row(pair: SeriesPair, transform: str, method: str, draws: Draws, *, min_n: int = MIN_N) -> dict[str, Any]:
    """One row of the table, without what needs the other rows."""
    n = max(pair.n - (transform == "differences"), 0)
    nothing = dict.fromkeys(("r", "ci_low", "ci_high", "p", "p_t"), float("nan"))
    row = {"cheap": pair.cheap_name, "probe": pair.probe_name, "transform": transform, "method": method, "n": n}
    row |= {**nothing, "p_kind": "", "reason": pair.reason}
    if n < min_n:
        unit = "steps" if transform == "differences" else "checkpoints"
        return row | {"reason": "; ".join(filter(None, [f"{n} {unit}, needs {min_n}", pair.reason]))}
    x = rounded(transformed(_scaled(pair.cheap), pair.cheap_log_tokens, transform))
    y = rounded(transformed(_scaled(pair.probe), pair.probe_log_tokens, transform))
    flat = [name for name, values in ((pair.cheap_name, x), (pair.probe_name, y)) if np.ptp(values) < _TINY]
    if flat:
        after = "" if transform == "levels" else " beside its trend"
        return row | {"reason": "; ".join(filter(None, [f"{' and '.join(flat)}: no variance{after}", pair.reason]))}
    other = embedded(y, method)
    r = float(np.clip(embedded(x, method) @ other, -1, 1))
    row["r"] = r
    row["ci_low"], row["ci_high"] = _interval(x, y, method, draws)
    row["p"], row["p_kind"] = _p_value(pair, other, r, transform, method, draws)
    if transform == "levels" and method == "pearson":
        row["p_t"] = pearson_t_p(r, n)
    return row


def pearson_t_p(r: float, n: int) -> float:
    """Two-sided p of Pearson's r by Student's t with n - 2 degrees of freedom, the test of the paper's Tables 6 and 7.

    Example:
        >>> round(pearson_t_p(0.8552, 6), 4)
        0.0299
    """
    if abs(r) >= 1:
        return 0.0
    return float(2 * student_t.sf(abs(r) * np.sqrt((n - 2) / (1 - r * r)), n - 2))


def _with_q(table: pl.DataFrame) -> pl.DataFrame:
    """Benjamini-Hochberg over the defined p of the table."""
    p = table["p"].to_numpy()
    q = np.full(p.size, np.nan)
    defined = ~np.isnan(p)
    if defined.any():
        q[defined] = false_discovery_control(p[defined], method="bh")
    return table.with_columns(q=pl.Series(q, dtype=pl.Float64))


def _benchmark() -> pl.Expr:
    """The paper's name of the benchmark of a probe series `benchmark/subset/...`; null for others.

    `RULER-style` and its like, written in the manner of a benchmark, stand beside it.
    """
    first = pl.col("probe").str.split("/").list.first().str.to_lowercase().str.strip_suffix("-style")
    names = {name.lower(): name for name in published_correlations()["benchmark"].unique()}
    return first.replace_strict(names, default=None, return_dtype=pl.String)


def _beside_published(table: pl.DataFrame) -> pl.DataFrame:
    """Fill published_r and published_p in the Pearson rows of levels whose pair the paper has."""
    published = published_correlations().select("cheap", "benchmark", "published_r", "published_p")
    same = (pl.col("transform") == "levels") & (pl.col("method") == "pearson")
    return (
        table.drop("published_r", "published_p")
        .with_columns(benchmark=pl.when(same).then(_benchmark()))
        .join(published, on=["cheap", "benchmark"], how="left", maintain_order="left")
        .with_columns(pl.col("published_r", "published_p").fill_null(float("nan")))
        .select(*SCHEMA)
    )


def _papers_subsets(rows: pl.DataFrame) -> list[str]:
    """Probes of `rows` to set beside the paper's: one subset, or their mean, of each benchmark, where there is one."""
    kept: list[str] = []
    probes = rows.select("probe", benchmark=_benchmark()).unique(maintain_order=True)
    for (benchmark,), part in probes.group_by("benchmark", maintain_order=True):
        names = part["probe"].to_list()
        for wanted in ("qa", MEAN) if benchmark == "RULER" else (MEAN,):
            of_subset = [name for name in names if wanted in name.split("/")[1:2]]
            if of_subset:
                names = of_subset
                break
        kept += names
    return kept


def paper_layout(table: pl.DataFrame) -> pl.DataFrame:
    """The paper's Tables 3, 6, 4 and 7 with the user's numbers beside the published ones.

    Only probes of RULER, MRCR and LongBio, or in their manner (`RULER-style`), are in it. The paper's are RULER's QA
    subset, MRCR and the mean of LongBio's subsets at 32K to 64K tokens after light fine-tuning, of a model of 80
    billion parameters; the user's are another model's, and those of `...-style` other data. Of several subsets their
    mean is taken where the table has it, for RULER the subset `qa`, else all.

    Args:
        table: from `correlate` with Pearson and `levels`.

    Returns:
        Columns cheap, quantity (`r`, `published r`, `p`, `published p`, `n`), one per probe series, average (over the
        probes, of r only, as in the paper; NaN else). p is that of the t test, as published.

    Raises:
        LccpError: no row of the table corresponds to one of the paper's.
    """
    rows = table.filter(pl.col("published_r").is_not_nan())
    if rows.is_empty():
        raise LccpError(
            "no pair of this table is in the paper's Tables 3 and 4: it needs Pearson levels of probes named RULER, "
            f"MRCR or LongBio, or RULER-style and so on; {IMPORT_HINT}"
        )
    rows = rows.filter(pl.col("probe").is_in(_papers_subsets(rows)))
    quantities = {"r": "r", "published r": "published_r", "p": "p_t", "published p": "published_p", "n": "n"}
    parts = []
    for quantity, column in quantities.items():
        wide = rows.pivot("probe", index="cheap", values=column)
        numbers = [name for name in wide.columns if name != "cheap"]
        average = pl.mean_horizontal(numbers) if quantity in ("r", "published r") else pl.lit(float("nan"))
        parts.append(
            wide.with_columns(pl.col(numbers).cast(pl.Float64)).select(
                "cheap", pl.lit(quantity).alias("quantity"), *numbers, average.alias("average")
            )
        )
    order = {name: i for i, name in enumerate(published_correlations()["cheap"].unique(maintain_order=True))}
    by_metric = pl.col("cheap").replace_strict(order, return_dtype=pl.Int64)
    return pl.concat(parts).sort(by_metric, maintain_order=True)
