"""Which results of a run a correlation is made with: few series that say different things, out of all that it holds.

One metric per benchmark, subset and length: of a probe's own (`sft greedy`, `sft pass@3`, `sft best@3`) the first of
`pass@k`, `best@k`, `greedy`, per study; for MRCR, whose grades are shares of a text, `best@k` comes first; of other
metrics the one with the most results. Where a benchmark has several subsets their mean is one more series, as arXiv
2604.02650 averages LongBio. Perplexities of long documents are not among them: they need no fine-tuning, so they are
cheap series.

`score_records` gives results their intervals. This module refuses to know heads. It costs nothing.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from lccp_interp.dynamics.resampling import share_interval
from lccp_interp.dynamics.selection import CORPUS_BENCHMARKS, NOT_SCORES, named
from lccp_interp.schema import LccpError

PREFERRED = ("pass@", "best@", "greedy")
"""Kinds of a probe's own metrics, the one that is shown first."""

PREFERRED_OF_GRADED = ("best@", "pass@", "greedy")
GRADED_BENCHMARK = "mrcr"
"""Benchmarks whose name begins so grade answers by how much of a text is right; a pass is a text without a fault."""

MEAN = "mean"
"""In place of a subset: the mean over the subsets of a benchmark."""

PREFERRED_PPL = ("ppl", "pooled_ppl")

_OWN_METRIC = re.compile(r"(?:(?P<study>.*) )?(?P<kind>greedy|pass@|best@)(?P<k>\d*)")
_SERIES = ("benchmark", "subset", "length", "metric")


def probe_series(probes: pl.DataFrame, *, like: Sequence[str] | None = None) -> pl.DataFrame:
    """The probe results to correlate with, as a series table named benchmark/subset/length/metric.

    Args:
        probes: columns as in `PROBES_SCHEMA`.
        like: glob patterns on the names, upper and lower case alike (`*pass@3`, `longbio*/mean/*`); None means the
            choice that the module describes. With patterns every metric and every mean may be had.

    Returns:
        Columns checkpoint, tokens_seen, name, value; parts of a name that are not known are left out of it.

    Raises:
        LccpError: a pattern that matches nothing.

    Example:
        >>> rows = pl.DataFrame({"checkpoint": ["a"] * 2, "tokens_seen": [0] * 2, "benchmark": ["RULER"] * 2,
        ...     "subset": ["qa"] * 2, "length": [None] * 2, "metric": ["sft greedy", "sft pass@3"],
        ...     "score": [0.5, 0.7]})
        >>> probe_series(rows).rows()
        [('a', 0, 'RULER/qa/sft pass@3', 0.7)]
        >>> probe_series(rows, like=["*greedy"]).rows()
        [('a', 0, 'RULER/qa/sft greedy', 0.5)]
    """
    asked = probes.filter(~pl.col("benchmark").is_in(CORPUS_BENCHMARKS))
    if like is None:
        return _table(_with_means(_one_metric_each(asked)))
    table = _table(_with_means(asked))
    names = table["name"].unique(maintain_order=True).to_list()
    chosen: set[str] = set()
    for pattern in like:
        found = fnmatch.filter([name.lower() for name in names], pattern.lower())
        if not found:
            raise LccpError(
                f"--probe {pattern!r} matches no probe result; there are {named(names, 12) or 'none'}"
                " (* stands for any text: --probe '*pass@3')"
            )
        chosen.update(found)
    return table.filter(pl.col("name").str.to_lowercase().is_in(chosen))


def corpus_series(probes: pl.DataFrame) -> pl.DataFrame:
    """Perplexities of long documents (`CORPUS_BENCHMARKS`), `ppl` where there is one, as `probe_series` gives others.

    Example:
        >>> rows = pl.DataFrame({"checkpoint": ["a"] * 3, "tokens_seen": [0] * 3, "benchmark": ["LongPPL"] * 3,
        ...     "subset": ["books"] * 3, "length": [4096] * 3, "metric": ["pooled_ppl", "ppl", "key_tokens"],
        ...     "score": [3.1, 3.0, 17.0]})
        >>> corpus_series(rows).rows()
        [('a', 0, 'LongPPL/books/4096/ppl', 3.0)]
    """
    of_corpora = probes.filter(pl.col("benchmark").is_in(CORPUS_BENCHMARKS), ~pl.col("metric").is_in(NOT_SCORES))
    rank = {metric: i for i, metric in enumerate(PREFERRED_PPL)}
    ranked = of_corpora.with_columns(
        rank=pl.col("metric").replace_strict(rank, default=len(rank), return_dtype=pl.Int64)
    )
    best = pl.col("rank") == pl.col("rank").min().over("benchmark", "subset", "length")
    return _table(ranked.filter(best).drop("rank").with_columns(is_mean=pl.lit(False)))


def left_out(probes: pl.DataFrame, *chosen: pl.DataFrame) -> list[str]:
    """Names of the results in `probes` that stand in none of the series tables `chosen`."""
    held = {name for table in chosen for name in table["name"]}
    names = _table(probes.with_columns(is_mean=pl.lit(False)))["name"].unique(maintain_order=True).to_list()
    return [name for name in names if name not in held]


def _one_metric_each(probes: pl.DataFrame) -> pl.DataFrame:
    """The rows of the chosen metric of each benchmark, subset, length and study."""
    best: dict[tuple[object, ...], tuple[tuple[object, ...], str]] = {}
    counted = probes.group_by(_SERIES).len().sort(_SERIES)
    for benchmark, subset, length, metric, n_results in counted.rows():
        own = _OWN_METRIC.fullmatch(metric)
        study, rank = None, (0, -n_results)
        if own is not None:
            graded = benchmark.lower().startswith(GRADED_BENCHMARK)
            order = PREFERRED_OF_GRADED if graded else PREFERRED
            study, rank = own["study"] or "", (order.index(own["kind"]), -int(own["k"] or 0))
        key = (benchmark, subset, length, study)
        best[key] = min(best.get(key, ((*rank, metric), metric)), ((*rank, metric), metric))
    kept = [(*key[:3], metric) for key, (_, metric) in best.items()]
    chosen = pl.DataFrame(kept, schema={name: probes.schema[name] for name in _SERIES}, orient="row")
    return probes.join(chosen, on=_SERIES, how="semi", nulls_equal=True, maintain_order="left")


def _with_means(probes: pl.DataFrame) -> pl.DataFrame:
    """`probes` with the mean over subsets, where all of them have a score, as rows of subset `mean`."""
    named_subsets = probes.filter(pl.col("subset").is_not_null()).filter(
        (pl.col("subset") != MEAN).all().over("benchmark")
    )
    series = ("benchmark", "length", "metric")
    means = (
        named_subsets.with_columns(n_subsets=pl.col("subset").n_unique().over(series))
        .filter(pl.col("n_subsets") > 1)
        .group_by("checkpoint", "tokens_seen", *series, "n_subsets", maintain_order=True)
        .agg(pl.col("score").mean(), n_here=pl.col("subset").n_unique())
        .filter(pl.col("n_here") == pl.col("n_subsets"))
        .with_columns(subset=pl.lit(MEAN), is_mean=pl.lit(True))
    )
    columns = ("checkpoint", "tokens_seen", *_SERIES, "score")
    whole = probes.with_columns(is_mean=pl.lit(False)).select(*columns, "is_mean")
    return pl.concat([whole, means.select(*columns, "is_mean")], how="vertical_relaxed")


def _table(rows: pl.DataFrame) -> pl.DataFrame:
    """The series table of rows with a column is_mean, sorted by name's parts, means behind the subsets."""
    name = pl.concat_str(
        pl.col("benchmark"), pl.col("subset"), pl.col("length").cast(pl.String), pl.col("metric"),
        separator="/", ignore_nulls=True,
    )  # fmt: skip
    return rows.sort("benchmark", "is_mean", "subset", "length", "metric", "tokens_seen").select(
        "checkpoint", "tokens_seen", name.alias("name"), pl.col("score").cast(pl.Float64).alias("value")
    )


def score_records(probes: pl.DataFrame) -> list[dict[str, Any]]:
    """Results as dictionaries with 95 % intervals (`ci_low`, `ci_high`, None where nothing is known).

    Scores of 0..1 are taken as shares (`resampling.share_interval`); others have 1.96 standard errors to each side.

    Args:
        probes: columns as in `PROBES_SCHEMA`.

    Example:
        >>> rows = pl.DataFrame({"metric": ["greedy"], "score": [0.5], "n": [16], "stderr": [0.125]})
        >>> score_records(rows)[0]["ci_low"].__round__(2)
        0.28
    """
    low, high = np.full((2, probes.height), np.nan)
    is_share = (probes["score"].is_between(0, 1) & ~probes["metric"].str.contains("ppl|key_tokens")).to_numpy()
    for chosen, top in ((is_share, 1.0), (~is_share, None)):
        part = probes.filter(pl.Series(chosen))
        stderr = part["stderr"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        n = part["n"].fill_null(0).to_numpy()
        low[chosen], high[chosen] = share_interval(part["score"].to_numpy(), stderr, n, top)
    return probes.with_columns(ci_low=pl.Series(low).fill_nan(None), ci_high=pl.Series(high).fill_nan(None)).to_dicts()
