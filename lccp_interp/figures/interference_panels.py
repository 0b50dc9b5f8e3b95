"""What the interference figures share: where their tables come from, which distance is read, the axis of lengths.

It refuses to know how they are drawn. Cost: that of `interference_table`, once per run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.tables import InterferenceTables, RunTables
from lccp_interp.figures.style import format_length
from lccp_interp.schema import LccpError
from lccp_interp.store import Run

CLOSEST = 0.045
"""Ticks of lengths are at least this part of the axis apart, or the axis becomes logarithmic."""

ADD_INTERFERENCE = "`lccp score CHECKPOINT... --task interference --out RUN/interference`"


def interference_of(run: Run | RunTables) -> InterferenceTables:
    """The tables over distance and interference that belong to a run.

    Raises:
        LccpError: it has none.
    """
    tables = RunTables.of(run)
    if tables.interference is None:
        raise LccpError(f"{tables.run.path} has no interference run beside it; {ADD_INTERFERENCE} makes one")
    return tables.interference


def distance_rows(tables: InterferenceTables, distance: int | None) -> tuple[pl.DataFrame, int]:
    """The rows at one distance (None: the largest), and the distance.

    Raises:
        LccpError: no such distance; the known ones are listed.
    """
    known = sorted(int(value) for value in tables.cells["distance"].unique())
    chosen = known[-1] if distance is None else distance
    if chosen not in known:
        raise LccpError(
            f"{tables.run.path} has no cases at a distance of {chosen} tokens; it has {', '.join(map(str, known))}"
        )
    return tables.cells.filter(pl.col("distance") == chosen), chosen


@dataclass(frozen=True)
class InterferenceAxis:
    """The axis of interference lengths: linear, or where ticks would crowd, log2(1 + length / the shortest one)."""

    lengths: tuple[int, ...]
    is_log: bool

    @classmethod
    def of(cls, lengths: pl.Series | Sequence[int]) -> InterferenceAxis:
        """The axis of these lengths, 0 among them or not."""
        known = tuple(sorted({int(length) for length in lengths}))
        gaps = np.diff(np.array(known, dtype=np.float64))
        return cls(known, bool(gaps.size and gaps.min() < CLOSEST * (known[-1] - known[0])))

    def at(self, lengths: pl.Series | Sequence[int]) -> NDArray[np.float64]:
        """Places of lengths."""
        values = np.asarray(lengths, dtype=np.float64)
        if not self.is_log:
            return values
        shortest = min((length for length in self.lengths if length > 0), default=1)
        return np.asarray(np.log2(1 + values / shortest))

    @property
    def ticks(self) -> tuple[list[float], list[str]]:
        """Places and texts: the lengths that were asked, every other one where they are many."""
        shown = self.lengths[:: math.ceil(len(self.lengths) / 10)]
        return [float(place) for place in self.at(shown)], [format_length(length) for length in shown]

    @property
    def limits(self) -> tuple[float, float]:
        """Left and right end, with a margin."""
        first, last = self.at([self.lengths[0], self.lengths[-1]])
        margin = 0.04 * (last - first) or 0.5
        return float(first - margin), float(last + margin)

    @property
    def suffix(self) -> str:
        """What the axis' title says of its scale."""
        return " (logarithmic)" if self.is_log else ""
