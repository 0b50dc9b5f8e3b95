"""The figure of corpus perplexity as data: curves over the tokens since the base, with A log N + B through each.

Both kinds of figures and the report draw this; it refuses to know how. The fit is that of `saturation_table`, so that
figure and table agree: the base checkpoint, at N = 0, is no part of the line, and the line does not rise. Cost: two
fits per corpus, a fifth of a second each.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lccp_interp.dynamics.curves import PROBE, MetricCurve, metric_curves, metric_names
from lccp_interp.dynamics.fits import LOG_LINEAR, curve_values
from lccp_interp.dynamics.saturation import judge_and_fit
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.saturation_panels import curve_tokens

Array = NDArray[np.float64]

BENCHMARKS = {"corpus-ppl": "perplexity", "LongPPL": "LongPPL"}
"""Which probes are drawn, in this order, and how their axes are called."""

WIDE = 2.0
"""Where perplexities of corpora differ by more than so many times, each has a panel: on one axis all were flat."""

Z = 1.96


@dataclass(frozen=True)
class CorpusLine:
    """One corpus over the checkpoints from the base on.

    `tokens` (since the base), `values`, `low`, `high` are `[checkpoint]`, defined values only; the last two are 1.96
    standard errors over documents to each side. `fitted` is A log N + B at `drawn_tokens`, empty where there are too
    few checkpoints for a fit; `judged` is the row of `saturation_table`.
    """

    corpus: str
    length: int | None
    n: int
    checkpoints: tuple[str, ...]
    tokens: Array
    values: Array
    low: Array
    high: Array
    drawn_tokens: Array = field(repr=False)
    fitted: Array = field(repr=False)
    judged: dict[str, Any] = field(repr=False)

    @property
    def formula(self) -> str:
        """The fit in words, empty where there is none.

        Base 10 would be read into "log" by some, so it is written ln.
        """
        if not self.fitted.size:
            return ""
        a, b = self.judged["log_linear_a"], self.judged["log_linear_b"]
        return f"{a:.3g} ln N {'+' if b >= 0 else '−'} {abs(b):.3g}".replace("-", "−")


@dataclass(frozen=True)
class CorpusPanel:
    """The corpora that share an axis, of one kind of perplexity."""

    label: str
    lines: tuple[CorpusLine, ...]

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the axis of perplexity: from the points, not from a line that is far off at its beginning."""
        ends = np.concatenate([np.concatenate([line.values, line.low, line.high]) for line in self.lines])
        low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
        margin = 0.08 * (high - low) or 0.1
        return low - margin, high + margin


def corpus_panels(tables: RunTables) -> list[CorpusPanel]:
    """The panels of a run, without corpora that have no value from the base on.

    Raises:
        LccpError: probe results of checkpoints that the run does not have, or two checkpoints with one token count.
    """
    panels = []
    for benchmark, label in BENCHMARKS.items():
        wanted = [name for name in metric_names(tables.run) if _is_of(name, benchmark)]
        if not wanted:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # twins: tables and verdicts say so
            curves = metric_curves(tables.run, metrics=wanted, length=tables.head_length, mode=tables.read_mode)
        longest: dict[str, MetricCurve] = {}
        for curve in sorted(curves, key=lambda curve: curve.length or 0):
            longest[curve.metric] = curve
        lines = [_line(name, longest[name]) for name in wanted if np.isfinite(longest[name].values).any()]
        if not lines:
            continue
        highest, lowest = max(line.values.max() for line in lines), min(line.values.min() for line in lines)
        apart = [[line] for line in lines] if highest > WIDE * lowest else [lines]
        panels += [CorpusPanel(label, tuple(together)) for together in apart]
    return panels


def _is_of(name: str, benchmark: str) -> bool:
    place, _, metric = name.removeprefix(PROBE).rpartition(":")
    return name.startswith(PROBE) and metric == "ppl" and (place == benchmark or place.startswith(f"{benchmark}/"))


def _line(name: str, curve: MetricCurve) -> CorpusLine:
    corpus = name.removeprefix(PROBE).rpartition(":")[0].partition("/")[2] or "corpus"
    defined = np.isfinite(curve.values)
    tokens, values = curve.tokens[defined], curve.values[defined]
    spread = curve.deviations[:, defined].std(axis=0)
    spread = np.where(spread > 0, spread, np.nan)
    row, found = judge_and_fit(curve)
    drawn = curve_tokens(tokens)
    fitted = np.zeros(0) if found is None else curve_values(found.fit(LOG_LINEAR), drawn)
    return CorpusLine(
        corpus, curve.length, int(curve.n[defined].max()), tuple(np.array(curve.checkpoints)[defined]), tokens, values,
        values - Z * spread, values + Z * spread, drawn, fitted, row,
    )  # fmt: skip
