"""What the head explorer draws from, as compact arrays: every metric, checkpoint and head of a run at one length.

It turns tables into arrays and words once, so that the widget needs no kernel to redraw. It refuses to know widgets and
models, and imports no torch. Cost: one `score_table` per metric (its bootstrap is most of it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.saturation import format_tokens
from lccp_interp.dynamics.selection import choose_metric
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.schema import NULL_SUFFIX, RETRIEVAL_THRESHOLD, LccpError

STATISTICS = ("score", "ci_low", "ci_high", "n")
PAPER_METRIC = "retrieval"


@dataclass(frozen=True)
class HeadArrays:
    """Scores of all heads of a run at one length.

    Attributes:
        tables: of the run at that length and of the metric that says which head is a retrieval head.
        metrics: names.
        checkpoints: columns checkpoint, tokens_seen, stage, in order of tokens.
        layers, heads: true layer indices and head indices, in order.
        values: float32 `[statistic, metric, checkpoint, layer, head]`, statistics as in `STATISTICS`, NaN where a score
            is undefined.
        retrieves: bool `[checkpoint, layer, head]`, whether it is a retrieval head.
    """

    tables: RunTables
    metrics: tuple[str, ...]
    checkpoints: pl.DataFrame
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    values: NDArray[np.float32]
    retrieves: NDArray[np.bool_]

    @classmethod
    def of(cls, tables: RunTables, metric: str) -> HeadArrays:
        """The arrays of a run; heads are judged by the metric `retrieval`, or by `metric` in a run without it.

        Raises:
            LccpError: an unknown metric, length or mode, or nothing scored at that length.
        """
        held = scored_metrics(tables)
        choose_metric(metric, held, tables.run)
        judge = PAPER_METRIC if PAPER_METRIC in held else metric
        own = {name: RunTables(tables.run, tables.length, name, tables.mode) for name in held}
        if tables.metric in own:
            own[tables.metric] = tables
        frames = {name: one.scores for name, one in own.items()}
        every = pl.concat(
            [frame.select("checkpoint", "tokens_seen", "stage", "layer", "head") for frame in frames.values()]
        )
        checkpoints = every.select("checkpoint", "tokens_seen", "stage").unique().sort("tokens_seen", "checkpoint")
        names = checkpoints["checkpoint"].to_list()
        layers, heads = (tuple(int(i) for i in every[axis].unique().sort()) for axis in ("layer", "head"))
        places = [{key: i for i, key in enumerate(axis)} for axis in (names, layers, heads)]
        shape = (len(names), len(layers), len(heads))
        values = np.full((len(STATISTICS), len(held), *shape), np.nan, np.float32)
        retrieves = np.zeros(shape, bool)
        for m, name in enumerate(held):
            frame = frames[name]
            at = tuple(
                np.array([place[key] for key in frame[axis]], np.int64)
                for place, axis in zip(places, ("checkpoint", "layer", "head"), strict=True)
            )
            for s, statistic in enumerate(STATISTICS):
                values[s, m][at] = frame[statistic].cast(pl.Float32).to_numpy()
            if name == judge:
                retrieves[at] = frame["retrieves"].to_numpy() > 0
        return cls(own[judge], tuple(held), checkpoints, layers, heads, values, retrieves)

    @property
    def judge(self) -> str:
        """The metric that says which head is a retrieval head, and when it was born."""
        return self.tables.metric

    @cached_property
    def names(self) -> list[str]:
        """Names of the checkpoints, in order of tokens."""
        return [str(name) for name in self.checkpoints["checkpoint"]]

    @cached_property
    def packed(self) -> bytes:
        """`values` as little-endian float32, then `retrieves` as one byte each."""
        return self.values.astype("<f4").tobytes() + self.retrieves.astype(np.uint8).tobytes()

    def strongest(self, metric: str, checkpoint: str) -> tuple[int, int]:
        """(layer, head) of the highest score; the first head where none is defined."""
        scores = self.values[0, self.metrics.index(metric), self.names.index(checkpoint)]
        if np.isnan(scores).all():
            return self.layers[0], self.heads[0]
        row, column = np.unravel_index(np.nanargmax(scores), scores.shape)
        return self.layers[row], self.heads[column]

    def describe(self) -> dict[str, Any]:
        """All but the numbers, as JSON: names, axis, colour scales, births and deaths."""
        base = self.tables.base if self.tables.base in self.names else self.names[0]
        axis = style.TokenAxis.of(self.checkpoints, base)
        stage = style.last_stage(self.checkpoints, base)
        return {
            "shape": list(self.values.shape),
            "length": style.format_length(self.tables.head_length),
            "metrics": list(self.metrics),
            "layers": list(self.layers),
            "heads": list(self.heads),
            "judge": self.judge,
            "rule": f"{self.judge} {self.tables.rule}",
            "threshold": RETRIEVAL_THRESHOLD,
            "scales": {name: self._scale(m) for m, name in enumerate(self.metrics)},
            "checkpoints": [
                {"name": name, "tokens": format_tokens(tokens), "stage": style.stage_name(kind), "x": x}
                for (name, tokens, kind), x in zip(
                    self.checkpoints.rows(), axis.at(self.checkpoints["tokens_seen"]), strict=True
                )
            ],
            "axis": {"at": list(axis.tick_at), "text": list(axis.tick_text), "label": axis.label},
            "stage": None if stage is None else {"name": style.stage_name(stage[0]), "x": axis.at([stage[1]])[0]},
            "events": self._events(),
            "stories": self._stories(),
        }

    def _scale(self, metric: int) -> list[float]:
        """Ends of a metric's colour scale, the same at every checkpoint."""
        low, high = style.defined_range([self.values[0, metric].astype(np.float64)], (0.0, 0.0))
        low, high = min(0.0, low), high if high > 0 else RETRIEVAL_THRESHOLD
        step = np.diff(style.nice_ticks(low, high, 4)[:2])
        # Up to the next tick, so that the bar says where it ends.
        return [low, float(f"{math.ceil(high / step[0] - 1e-6) * step[0]:.6g}") if step.size else high]

    def _events(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": event["layer"],
                "head": event["head"],
                "kind": event["kind"],
                "checkpoint": self.names.index(event["checkpoint"]),
                "provisional": event["provisional"],
            }
            for event in self.tables.events.iter_rows(named=True)
        ]

    def _stories(self) -> dict[str, str]:
        """In words, by `layer-head`, when each head lived."""
        tokens = self.checkpoints["tokens_seen"].to_list()

        def between(name: str) -> str:
            i = self.names.index(name)
            return f"between {format_tokens(tokens[i - 1])} and {format_tokens(tokens[i])} tokens"

        told: dict[str, list[str]] = {}
        for life in self.tables.lives.sort("layer", "head", "n_life").iter_rows(named=True):
            born, died = life["born_checkpoint"], life["died_checkpoint"]
            text = "a retrieval head from the start" if born is None else f"born {between(born)}"
            if died is not None:
                text += f", died {between(died)}"
            told.setdefault(style.head_name(life["layer"], life["head"]), []).append(
                text + (" (provisional)" if life["provisional"] else "")
            )
        return {head: "; ".join(lives) for head, lives in told.items()}


def scored_metrics(tables: RunTables) -> list[str]:
    """The metrics that the run holds at this length and mode, without their nulls.

    Raises:
        LccpError: nothing is scored at that length.
    """
    wanted = tables.cases.filter(length=tables.head_length)["case_id"]
    held = tables.run.collect(
        tables.run.scores.filter(
            pl.col("mode") == tables.read_mode,
            pl.col("case_id").is_in(wanted.implode()),
            ~pl.col("metric").str.ends_with(NULL_SUFFIX),
        ).select(pl.col("metric").unique())
    )["metric"]
    if held.is_empty():
        raise LccpError(f"run {tables.run.path} has no scores at {tables.head_length} tokens yet; finish scoring")
    # The paper's metric first: it is what one looks at first.
    return sorted((str(name) for name in held), key=lambda name: (name != PAPER_METRIC, name))


def case_labels(tables: RunTables) -> list[list[str]]:
    """[case_id, what it asks in a few words] of the cases of this length, by depth.

    The words are made of what tells the cases apart: depth, needle, haystack.
    """
    cases = tables.cases.filter(length=tables.head_length).sort("depth_fraction", "needle_id", "case_id")
    return [
        [row["case_id"], f"depth {100 * row['depth_fraction']:g} % · needle {row['needle_id']} · {row['case_id']}"]
        for row in cases.iter_rows(named=True)
    ]
