"""The births-and-deaths chart as data: one row per head, its score ribbon, its lives, its marks.

Both kinds of figures draw this. It refuses to know how. Cost: nothing beside `RunTables`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.style import head_name

MAX_ROWS = 40
RIBBON_HALF_HEIGHT = 0.44


@dataclass(frozen=True)
class LifeMark:
    """A birth or death on the chart."""

    kind: str
    tokens_seen: int
    score: float
    provisional: bool


@dataclass(frozen=True)
class LifeSegment:
    """The part of a head's row in which it lived; `[start_tokens, end_tokens]`, `kind` is where it came from."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class LifeRow:
    """One head: its score at every checkpoint, and what happened to it.

    `segments` hold indices of checkpoints, end exclusive; `kind` is `from_start` (alive at the first checkpoint),
    `from_base` (born up to the base checkpoint) or `newborn` (born after it).
    """

    layer: int
    head: int
    score: NDArray[np.float64]
    segments: tuple[LifeSegment, ...]
    marks: tuple[LifeMark, ...]

    @property
    def name(self) -> str:
        """`layer-head`."""
        return head_name(self.layer, self.head)

    @property
    def peak(self) -> float:
        """The largest score of the head."""
        return float(np.nanmax(self.score))


def life_rows(tables: RunTables, *, max_rows: int = MAX_ROWS) -> tuple[list[LifeRow], int]:
    """Rows of the chart, earliest birth first, and how many heads were left out (those with the lowest peaks)."""
    lives = tables.lives
    names = tables.scores["checkpoint"].unique(maintain_order=True).to_list()
    place = {name: i for i, name in enumerate(names)}
    base = place.get(tables.base, 0)
    heads = lives.select("layer", "head").unique(maintain_order=True).rows()
    rows = []
    for layer, head in heads:
        own = lives.filter(pl.col("layer") == layer, pl.col("head") == head).sort("n_life")
        series = tables.scores.filter(pl.col("layer") == layer, pl.col("head") == head)
        score = np.full(len(names), np.nan)
        score[[place[name] for name in series["checkpoint"]]] = series["score"].to_numpy()
        segments = []
        for life in own.iter_rows(named=True):
            born = None if life["born_checkpoint"] is None else place[life["born_checkpoint"]]
            died = len(names) if life["died_checkpoint"] is None else place[life["died_checkpoint"]]
            kind = "from_start" if born is None else "from_base" if 0 < born <= base else "newborn"
            segments.append(LifeSegment(kind, born or 0, died))
        own_events = tables.events.filter(pl.col("layer") == layer, pl.col("head") == head)
        marks = [
            LifeMark(event["kind"], event["tokens_seen"], event["score"], event["provisional"])
            for event in own_events.iter_rows(named=True)
        ]
        rows.append(LifeRow(layer, head, score, tuple(segments), tuple(marks)))
    kept = sorted(rows, key=lambda row: -row.peak)[:max_rows]
    return [row for row in rows if row in kept], len(rows) - len(kept)


def life_kind_labels(stage: str | None) -> dict[str, str]:
    """What the colours of the chart mean, for the legend; `stage` is the last one, None if it is the only one."""
    if stage is None:
        return {"from_start": "alive from the start", "newborn": "born in the run"}
    return {"from_start": "alive from the start", "from_base": f"born before {stage}", "newborn": f"born in {stage}"}
