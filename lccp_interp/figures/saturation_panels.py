"""The saturation figure as data: per metric the points, the fitted curve, the 95 % point and the verdict in words.

Both kinds of figures draw this; it refuses to know how. Statistics are those of `lccp_interp.dynamics.saturation`, with
its defaults, so that figure and table agree. Cost: that of the table, a tenth of a second per metric.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lccp_interp.dynamics.curves import (
    HEAD_COUNT,
    INITIAL_SCORE,
    LOSS_NATS,
    NIAH_SCORE,
    MetricCurve,
    corpus_name,
    metric_curves,
    metric_names,
)
from lccp_interp.dynamics.fits import LOG_LINEAR, Fit, curve_values
from lccp_interp.dynamics.saturation import IMPROVING, SATURATED, UNKNOWN, judge_and_fit
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.style import MUTED, format_tokens, nice_ticks

Array = NDArray[np.float64]

SHARE = 0.95
N_DRAWN = 240

METRICS = {
    NIAH_SCORE: ("NIAH score (%)", 0.0, 100.0),
    LOSS_NATS: ("answer loss (nats)", 0.0, math.inf),
    HEAD_COUNT: ("retrieval heads", 0.0, math.inf),
    INITIAL_SCORE: ("mean score of\ninitial heads", 0.0, 1.0),
}
"""What is drawn, in this order: the label of the axis, the least and the largest value that can be."""

CORPUS = ("corpus perplexity", 1.0, math.inf)
"""The same of the perplexity of long documents, the first corpus by name; it stands last, where the run has one."""

VERDICT_COLOURS = {SATURATED: "#00795a", IMPROVING: "#b45309", UNKNOWN: MUTED}


@dataclass(frozen=True)
class SaturationPanel:
    """One metric over the tokens since the base checkpoint.

    `tokens`, `values`, `low`, `high` are `[checkpoint]`, defined values only, the last two the ends of a 95 % interval
    over resampled cases (NaN where nothing is known of it). `fits` are the curves to draw, the chosen one first: its
    name and its `[N_DRAWN]` values at `drawn_tokens`. `point` is where 95 % of its gain is made, NaN where that is not
    within the data; `interval` is None without a gain, and its upper end infinite where it is open. `note` says either
    in a few words, `reason` is the sentence of the table.
    """

    metric: str
    label: str
    checkpoints: tuple[str, ...]
    tokens: Array
    values: Array
    low: Array
    high: Array
    drawn_tokens: Array = field(repr=False)
    fits: tuple[tuple[str, Array], ...] = field(repr=False)
    point: float
    interval: tuple[float, float] | None
    verdict: str
    note: str
    reason: str


def saturation_panels(tables: RunTables) -> list[SaturationPanel]:
    """The panels of a run, heads and answers at the length of `tables`.

    Raises:
        LccpError: two checkpoints share a token count.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # twins and few checkpoints: tables and verdicts say so
        corpus = corpus_name(metric_names(tables.run))
        wanted = [*METRICS, *([corpus] if corpus else [])]
        curves = metric_curves(tables.run, metrics=wanted, length=tables.head_length, mode=tables.read_mode)
    by_name = {curve.metric: curve for curve in reversed(curves)}  # of a corpus read at two lengths the shorter one
    return [_panel(by_name[name]) for name in wanted if name in by_name]


def _panel(curve: MetricCurve) -> SaturationPanel:
    label, least, most = METRICS.get(curve.metric, CORPUS)
    row, found = judge_and_fit(curve, share=SHARE)
    defined = np.isfinite(curve.values)
    tokens, values, deviations = curve.tokens[defined], curve.values[defined], curve.deviations[:, defined]
    low, high = np.full(len(values), np.nan), np.full(len(values), np.nan)
    if deviations.any():
        low, high = (np.clip(values + np.quantile(deviations, q, axis=0), least, most) for q in (0.025, 0.975))
    drawn_tokens = curve_tokens(tokens)
    fits: tuple[tuple[str, Array], ...] = ()
    if found is not None:
        chosen: list[Fit] = [found.best]
        if found.best.model != LOG_LINEAR:
            chosen.append(found.fit(LOG_LINEAR))
        fits = tuple((fit.model, curve_values(fit, drawn_tokens)) for fit in chosen)
    interval = None
    if row["ci_low"] is not None:
        interval = (float(row["ci_low"]), math.inf if row["ci_high"] is None else float(row["ci_high"]))
    point = math.nan if row["tokens_at_share"] is None else float(row["tokens_at_share"])
    return SaturationPanel(
        curve.metric, label, tuple(np.array(curve.checkpoints)[defined]), tokens, values, low, high, drawn_tokens, fits,
        point, interval, row["verdict"], _note(point, interval, row["reason"]), row["reason"],
    )  # fmt: skip


def _note(point: float, interval: tuple[float, float] | None, reason: str) -> str:
    """The 95 % point in a few words; without a gain the beginning of the reason."""
    if interval is None:
        return reason.split(";")[0].split(" (")[0]
    low, high = interval
    if math.isinf(high):
        ends = f"interval from {format_tokens(low)} on, open" if low > 0 else "interval open at both ends"
    else:
        ends = f"interval {format_tokens(low)} to {format_tokens(high)}"
    at = "not within the data" if math.isnan(point) else f"at {format_tokens(point)}"
    return f"{100 * SHARE:g} % of the gain {at} ({ends})"


def curve_tokens(tokens: Array) -> Array:
    """Where curves are drawn: close enough on a linear and on a logarithmic axis."""
    if len(tokens) < 2:
        return np.zeros(0)
    first, last = tokens[tokens > 0].min(), tokens.max()
    return np.unique(
        np.concatenate([np.linspace(0, last, N_DRAWN // 2), np.geomspace(first / 3, last, N_DRAWN - N_DRAWN // 2)])
    )


@dataclass(frozen=True)
class SinceBaseAxis:
    """An axis of the tokens since the base checkpoint, linear or logarithmic.

    A logarithmic one has no place for the base, so it stands by itself at the left end, behind `gap`.
    """

    tokens: Array
    is_log: bool

    @property
    def _first(self) -> float:
        after = self.tokens[self.tokens > 0]
        return float(after.min()) if after.size else 1.0

    @property
    def _last(self) -> float:
        return max(float(self.tokens.max(initial=0.0)), 1.0)

    @property
    def _base_place(self) -> float:
        return math.log10(self._first) - 0.18 * max(math.log10(self._last / self._first), 1.0)

    @property
    def gap(self) -> float | None:
        """The place between the base and the rest of a logarithmic axis; None on a linear one."""
        return (self._base_place + math.log10(self._first)) / 2 if self.is_log else None

    def at(self, tokens: Array | Sequence[float]) -> Array:
        """Places on the axis; on a logarithmic one 0 is at the base, and tokens left of the gap are NaN."""
        values = np.asarray(tokens, dtype=np.float64)
        if not self.is_log:
            return values
        places = np.log10(np.where(values > 0, values, self._first))
        places = np.where(places >= (self.gap or 0.0), places, np.nan)
        return np.where(values > 0, places, self._base_place)

    def clip(self, tokens: float) -> float:
        """The place of `tokens`, at the nearest end where the axis does not hold it."""
        if tokens > self._last:
            return self.limits[1]
        place = float(self.at([tokens])[0])
        return self.limits[0] if math.isnan(place) or tokens <= 0 else place

    @property
    def limits(self) -> tuple[float, float]:
        """Left and right end, with a margin."""
        low, high = (self._base_place, math.log10(self._last)) if self.is_log else (0.0, self._last)
        return low - 0.04 * (high - low), high + 0.04 * (high - low)

    @property
    def ticks(self) -> tuple[list[float], list[str]]:
        """Places and texts of about five ticks."""
        if not self.is_log:
            at = nice_ticks(0, self._last, 4)
            return list(at), [format_tokens(tick) for tick in at]
        powers = range(math.floor(math.log10(self._first)), math.ceil(math.log10(self._last)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            ticks = [step * 10.0**power for power in powers for step in steps]
            ticks = [tick for tick in ticks if self._first <= tick <= self._last]
            if len(ticks) <= 5:
                break
        shown = ticks[:: math.ceil(len(ticks) / 6)] if ticks else []
        return [self._base_place, *np.log10(shown)], ["0", *(format_tokens(tick) for tick in shown)]
