"""The figure of agreement as data: which head metrics rank the heads alike, as two halves of one square.

Numbers are those of `lccp_interp.dynamics.agreement`; it refuses to know how they are drawn. Cost: that of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.agreement import held_metrics, metric_agreement
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.style import format_number

Array = NDArray[np.float64]

ADD_METRICS = "`lccp score CHECKPOINT... --metrics retrieval,copy,locos --out ANOTHER_RUN` makes a run with several"


@dataclass(frozen=True)
class AgreementMap:
    """Every two metrics of a run at one checkpoint.

    `spearman` is `[metric, metric]` below the diagonal, `overlap` (the share of the top heads in both lists) above it;
    all else is NaN, as is what is undefined, which `undefined` tells apart: it holds (row, column).
    """

    checkpoint: str
    length: int
    metrics: tuple[str, ...]
    spearman: Array
    overlap: Array
    undefined: tuple[tuple[int, int], ...]
    top_k: int
    by_chance: float
    n_heads: int
    n: int
    rows: pl.DataFrame

    def text(self, row: int, column: int) -> str:
        """What stands in a cell: the rank correlation below the diagonal, the number of shared heads above it."""
        if row == column or (row, column) in self.undefined:
            return ""
        if row > column:
            return f"{self.spearman[row, column]:.2f}"
        return format_number(self.overlap[row, column] * self.top_k, 2)


def why_no_agreement(tables: RunTables) -> str:
    """Why there is nothing to agree; empty where there is."""
    held = held_metrics(tables.run)
    if len(held) > 1:
        return ""
    return f"it holds one head metric only ({', '.join(held) or 'none'}); {ADD_METRICS}"


def agreement_map(tables: RunTables, checkpoint: str | None = None) -> AgreementMap:
    """The agreement at `checkpoint` (None: the last scored one), at the length and mode of `tables`.

    Raises:
        LccpError: unknown checkpoint, or fewer than two metrics.
    """
    rows = metric_agreement(
        tables.run, length=tables.head_length, mode=tables.read_mode, checkpoint=checkpoint or "last"
    )
    metrics = list(dict.fromkeys([*rows["metric"], *rows["other"]]))
    spearman, overlap = np.full((2, len(metrics), len(metrics)), np.nan)
    undefined = []
    for row in rows.iter_rows(named=True):
        one, other = metrics.index(row["metric"]), metrics.index(row["other"])
        top_k = row["top_k"] or 0
        spearman[other, one] = row["spearman"]
        overlap[one, other] = row["overlap"] / top_k if top_k else np.nan
        if np.isnan(row["spearman"]):
            undefined.append((other, one))
        if np.isnan(overlap[one, other]):
            undefined.append((one, other))
    return AgreementMap(
        checkpoint=rows["checkpoint"][0],
        length=rows["length"][0],
        metrics=tuple(metrics),
        spearman=spearman,
        overlap=overlap,
        undefined=tuple(undefined),
        top_k=max(rows["top_k"].drop_nulls(), default=0),
        by_chance=float(rows["overlap_by_chance"].max() or 0.0),  # type: ignore[arg-type]
        n_heads=int(rows["n_heads"].max() or 0),  # type: ignore[arg-type]
        n=int(rows["n"].max() or 0),  # type: ignore[arg-type]
        rows=rows,
    )
