"""What the cohort and comparison figures draw: initial heads and newcomers, every checkpoint against the base.

Tables of `lccp_interp.dynamics.comparison` and `census` with the reason in place of what cannot be had. It refuses to
know how they are drawn. Cost: that of the tables, a tenth of a second each.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import polars as pl

from lccp_interp.dynamics.comparison import compare, survival
from lccp_interp.dynamics.ranking import jaccard_by_chance
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.schema import LccpError

MEASURES = {
    "overlap": "overlap of top heads",
    "jaccard": "Jaccard index",
    "rbo": "rank-biased overlap",
    "spearman": "Spearman's rho",
}
"""Measures of the comparison with the base and how their axes are called."""


@dataclass(frozen=True)
class Cohort:
    """The initial heads of a run over its checkpoints from the base on.

    `rows` has the columns of `survival` and, of `census`, n_retrieval_heads, n_from_base and n_newborn, and
    tokens_since_base. `why_no_curve` says why there is no survival curve, empty where there is one; `why_no_heads` why
    there is no share of newcomers.
    """

    base: str
    n_initial: int
    rows: pl.DataFrame
    why_no_curve: str
    why_no_heads: str


def cohort(tables: RunTables) -> Cohort:
    """The cohort of the base checkpoint (the first scored one where the base is not scored at this length)."""
    alive = survival(tables.scores, sample=tables.sample)
    counts = tables.census.select("checkpoint", "n_retrieval_heads", "n_from_base", "n_newborn")
    base, start = alive["checkpoint"][0], int(alive["tokens_seen"][0])
    rows = alive.join(counts, on="checkpoint", how="left", maintain_order="left").with_columns(
        tokens_since_base=pl.col("tokens_seen") - start
    )
    n_initial = int(alive["n_cohort"][0])
    curve, heads = "", ""
    if n_initial == 0:
        curve = f"the base checkpoint {base} has no retrieval head"
    elif rows.height == 1:
        curve = "there is no checkpoint after the base"
    if not rows["n_retrieval_heads"].sum():
        heads = "no retrieval head from the base on"
    return Cohort(base, n_initial, rows, curve, heads)


@dataclass(frozen=True)
class BaseComparison:
    """Every checkpoint against the base.

    `rows` has the columns of `compare`; overlap and overlap_by_chance are divided by top_k, and jaccard_by_chance and
    spearman_by_chance stand beside. It is empty where there is no comparison, and `why_not` says why.
    """

    rows: pl.DataFrame
    why_not: str


def base_comparison(tables: RunTables) -> BaseComparison:
    """The comparison of a run with its base checkpoint, at the length, metric and mode of `tables`."""
    if tables.scored.height < 2:
        return BaseComparison(pl.DataFrame(), "there is one scored checkpoint only, nothing to compare it with")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # identical weights are told by the command
            rows = compare(tables.run, metric=tables.metric, length=tables.head_length, mode=tables.read_mode)
    except LccpError as error:
        return BaseComparison(pl.DataFrame(), str(error))
    if not rows["n_heads"].sum():
        return BaseComparison(rows.clear(), "no head has a defined score both at the base and at another checkpoint")
    columns = ("n_retrieval_heads", "n_reference_heads", "n_heads")
    by_chance = [jaccard_by_chance(*row) for row in rows.select(columns).iter_rows()]
    rows = rows.with_columns(
        (pl.col("overlap", "overlap_by_chance") / pl.col("top_k")).fill_null(math.nan),
        jaccard_by_chance=pl.Series(by_chance, dtype=pl.Float64),
        spearman_by_chance=pl.lit(0.0),
    )
    return BaseComparison(rows, "")
