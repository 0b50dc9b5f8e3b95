"""The figure of results after fine-tuning as data: a panel per benchmark, a line per subset, their mean.

Both kinds of figures and the report draw this; it refuses to know how. A benchmark has many metrics and lengths, a
panel one of each: of the metrics `pass@k` (for MRCR, whose answers are graded, `best@k`), else `greedy`, as correlation
chooses (`dynamics.probe_choice`), of others the one with the most results; of the lengths the one that most checkpoints
have, the longest of several. Cost: one scan of the probe results.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.curves import LOWER_IS_BETTER
from lccp_interp.dynamics.probe_choice import GRADED_BENCHMARK, PREFERRED, PREFERRED_OF_GRADED
from lccp_interp.dynamics.resampling import share_interval
from lccp_interp.dynamics.selection import CORPUS_BENCHMARKS, run_probes
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.style import TokenAxis, format_length

Array = NDArray[np.float64]

PAPER_ORDER = ("ruler", "mrcr", "longbio")
"""Beginnings of the benchmarks of arXiv 2604.02650, Figure 1, in its order; others come after them."""

MAX_PANELS = 9
MAX_SUBSETS = 6
"""More subsets than this are drawn alike, and only their mean has a name."""

OF_A_STUDY = re.compile(r"(?:(?P<study>.+) )?(?P<metric>(?P<kind>greedy|pass@|best@)(?P<k>\d*))")


@dataclass(frozen=True)
class ProbeLine:
    """One subset of a benchmark over the checkpoints that have it, or the mean over all subsets.

    `tokens`, `score`, `stderr`, `low`, `high` are `[checkpoint]`; the last two are the ends of a 95 % interval, NaN
    where neither a standard error nor a number of items is known. `n` is 0 where that is not known.
    """

    subset: str
    metric: str
    checkpoints: tuple[str, ...]
    tokens: Array
    score: Array
    stderr: Array
    n: NDArray[np.int64]
    low: Array
    high: Array


@dataclass(frozen=True)
class ProbePanel:
    """A benchmark in one study.

    `study` is empty for imported results, `tuned` says whether its checkpoints were fine-tuned. `top` is the highest
    score that can be (1 or 100), None where that is not known. `mean` is there where there are several lines.
    `other_lengths` are those that are not drawn.
    """

    benchmark: str
    study: str
    tuned: bool
    length: int | None
    lines: tuple[ProbeLine, ...]
    mean: ProbeLine | None
    top: float | None
    other_lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """The benchmark, and its subset if there is only one."""
        only = self.lines[0].subset if len(self.lines) == 1 else ""
        return f"{self.benchmark} {only}".rstrip()

    @property
    def metric(self) -> str:
        """What is drawn."""
        return " or ".join(dict.fromkeys(line.metric for line in self.lines))

    @property
    def about(self) -> str:
        """Study, metric and length in a few words."""
        at = None if self.length is None else f"{format_length(self.length)} tokens"
        return ", ".join(part for part in (self.study, self.metric, at) if part)

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the score's axis: all points and drawn bands, with a margin."""
        drawn = self.lines if self.mean is None else (self.mean,)
        ends = np.concatenate(
            [line.score for line in self.lines] + [e for line in drawn for e in (line.low, line.high)]
        )
        low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
        margin = 0.06 * (high - low) or 0.05 * (abs(high) or 1.0)
        return low - margin, high + margin


def probe_panels(tables: RunTables) -> list[ProbePanel]:
    """All panels of a run: fine-tuned studies first, then others, then imported results; the paper's benchmarks first.

    Raises:
        LccpError: probe results of checkpoints that the run does not have.
    """
    scored = tables.checkpoints["checkpoint"]
    rows = run_probes(tables.run).filter(~pl.col("benchmark").is_in(CORPUS_BENCHMARKS))
    rows = rows.filter(pl.col("checkpoint").is_in(scored.implode()), pl.col("score").is_finite())
    studies = {s["name"]: s["config"].get("sft") is not None for s in tables.run.manifest.get("probe_studies", [])}
    found = [OF_A_STUDY.fullmatch(metric) for metric in rows["metric"]]
    rows = rows.with_columns(
        study=pl.Series([match["study"] or "" if match else "" for match in found], dtype=pl.String),
        own=pl.Series(
            [match["metric"] if match else metric for match, metric in zip(found, rows["metric"], strict=True)],
            dtype=pl.String,
        ),
        subset=pl.col("subset").fill_null(""),
    )
    panels = [
        _panel(str(benchmark), str(study), studies.get(str(study), str(study) == "sft"), part)
        for (benchmark, study), part in rows.group_by("benchmark", "study", maintain_order=True)
    ]
    return sorted(panels, key=_rank)


def probe_axis(tables: RunTables, panels: Sequence[ProbePanel]) -> TokenAxis:
    """The axis of tokens: from the first checkpoint with a result, or from the base if that comes first."""
    first = min((line.tokens[0] for panel in panels for line in panel.lines), default=0)
    start = tables.checkpoints.filter(pl.col("checkpoint") == tables.base)["tokens_seen"][0]
    return TokenAxis.of(tables.checkpoints.filter(pl.col("tokens_seen") >= min(first, start)), tables.base)


def _rank(panel: ProbePanel) -> tuple[bool, bool, str, int, str]:
    name = panel.benchmark.lower()
    place = next((i for i, known in enumerate(PAPER_ORDER) if name.startswith(known)), len(PAPER_ORDER))
    return not panel.tuned, not panel.study, panel.study, place, name


def _panel(benchmark: str, study: str, tuned: bool, rows: pl.DataFrame) -> ProbePanel:
    lengths = rows.group_by("length").agg(pl.col("checkpoint").n_unique()).rows()
    length = max(lengths, key=lambda row: (row[1], row[0] or 0))[0]
    at_length = rows.filter(pl.col("length").eq_missing(pl.lit(length)))
    top = _top(rows)
    usual = _most_said(at_length)
    lines = []
    for (subset,), part in at_length.group_by("subset", maintain_order=True):
        metric = best_metric(part["own"].unique().to_list(), benchmark) or usual
        own = part.filter(pl.col("own") == metric).sort("tokens_seen")
        if own.height:
            lines.append(_line(str(subset), metric, own, top))
    others = tuple(sorted(other for other, _ in lengths if other is not None and other != length))
    mean = _mean(lines, top) if len(lines) > 1 else None
    return ProbePanel(benchmark, study, tuned, length, tuple(lines), mean, top, others)


def best_metric(metrics: Sequence[str], benchmark: str) -> str:
    """The one to draw of the metrics of a study, empty where none is of this package's making.

    Example:
        >>> best_metric(["greedy", "pass@1", "pass@3", "best@3"], "RULER-style"), best_metric(["em"], "RULER")
        ('pass@3', '')
        >>> best_metric(["greedy", "pass@3", "best@3"], "MRCR-style")
        'best@3'
    """
    order = PREFERRED_OF_GRADED if benchmark.lower().startswith(GRADED_BENCHMARK) else PREFERRED
    known = [match for match in map(OF_A_STUDY.fullmatch, metrics) if match]
    ranked = [(order.index(m["kind"]), -int(m["k"] or 0), m["metric"]) for m in known]
    return min(ranked)[2] if ranked else ""


def _most_said(rows: pl.DataFrame) -> str:
    """The metric with the most rows, the first in the alphabet of several."""
    counted = rows.group_by("own").len().rows()
    return str(min(counted, key=lambda row: (-row[1], row[0]))[0])


def _top(rows: pl.DataFrame) -> float | None:
    """1 for shares, 100 for percentages, None for perplexities and whatever else is no share."""
    if any(word in metric.lower() for metric in rows["own"].unique() for word in LOWER_IS_BETTER):
        return None
    low, high = float(rows["score"].min()), float(rows["score"].max())  # type: ignore[arg-type]
    return None if low < 0 or high > 100 else 1.0 if high <= 1 else 100.0


def _line(subset: str, metric: str, rows: pl.DataFrame, top: float | None) -> ProbeLine:
    score = rows["score"].to_numpy()
    stderr = rows["stderr"].fill_null(math.nan).to_numpy()
    n = rows["n"].fill_null(0).to_numpy()
    low, high = share_interval(score, stderr, n, top)
    tokens = rows["tokens_seen"].to_numpy().astype(np.float64)
    return ProbeLine(subset, metric, tuple(rows["checkpoint"]), tokens, score, stderr, n, low, high)


def _mean(lines: Sequence[ProbeLine], top: float | None) -> ProbeLine:
    """The mean over subsets at the checkpoints that all have; their items are others, so their errors are too."""
    shared = [name for name in lines[0].checkpoints if all(name in line.checkpoints for line in lines)]
    rows = [[line.checkpoints.index(name) for name in shared] for line in lines]
    score, stderr, n, tokens = (
        np.array([getattr(line, name)[at] for line, at in zip(lines, rows, strict=True)])
        for name in ("score", "stderr", "n", "tokens")
    )
    mean, error = score.mean(axis=0), np.sqrt((stderr**2).sum(axis=0)) / len(lines)
    items = np.where((n > 0).all(axis=0), n.sum(axis=0), 0)
    low, high = share_interval(mean, error, items, top)
    return ProbeLine("mean", "", tuple(shared), tokens[0], mean, error, items, low, high)
