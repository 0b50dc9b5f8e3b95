"""Has a metric stopped improving, since when, and how sure is that: one of three verdicts, each with its reason.

- **saturated**: the point at which (by default) 95 % of the fitted total gain is made lies within the data, and so does
  its whole 95 % interval.
- **still improving**: that interval reaches beyond the last checkpoint, the best fitting shape puts the point beyond or
  has no plateau (A log N + B, arXiv 2604.02650, Figure 6), and the later half of the checkpoints still improves (Mann
  and Kendall's test, one-sided p < 0.05). The shape alone does not decide: over few noisy checkpoints a line in log N
  often beats a curve that has long levelled off.
- **cannot tell**: all else: fewer than five checkpoints, no gain beyond noise, an interval that is too wide, or a curve
  and a trend that contradict each other. All shapes rise at once: a score that waits before it rises fits none well.

*Deceptive saturation*, the paper's word for a score that looks finished while perplexity still falls, is a comparison
of intervals: that of the score ends before that of the perplexity begins.

N is tokens since the base checkpoint. Fits and intervals are made in `fits.py`, curves in `curves.py`. This module
refuses to know pictures and models. Cost: about 0.1 s per curve.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from lccp_interp.dynamics.curves import (
    ANSWER_PPL,
    INITIAL_SCORE,
    LOSS_NATS,
    NIAH_SCORE,
    MetricCurve,
    metric_curves,
)
from lccp_interp.dynamics.fits import (
    LOG_LINEAR,
    MIN_CHECKPOINTS,
    Saturation,
    check_share,
    find_saturation,
    median_slope,
    trend_p_value,
)
from lccp_interp.dynamics.selection import choose, choose_length, named
from lccp_interp.store import Run

SATURATED, IMPROVING, UNKNOWN = "saturated", "still improving", "cannot tell"
VERDICTS = (SATURATED, IMPROVING, UNKNOWN)

ALPHA = 0.05
"""Level of the tests for a gain and for a trend."""

MAX_NAMED = 8
"""Of so many checkpoints without a value the reason gives the names; `metric_series` has all."""

WIDE_PPL = 10.0
"""Perplexity that falls further than this factor saturates by its first fall; the loss says more."""

SATURATION_SCHEMA = {
    "metric": pl.String,
    "length": pl.Int64,
    "depth_fraction": pl.Float64,
    "n": pl.Int64,
    "from": pl.Float64,
    "to": pl.Float64,
    "tokens_last": pl.Int64,
    "model": pl.String,
    "share": pl.Float64,
    "tokens_at_share": pl.Int64,
    "ci_low": pl.Int64,
    "ci_high": pl.Int64,
    "p_no_gain": pl.Float64,
    "slope_p": pl.Float64,
    "slope_n": pl.Int64,
    "verdict": pl.String,
    "reason": pl.String,
    "log_linear_a": pl.Float64,
    "log_linear_b": pl.Float64,
    "aicc_log_linear": pl.Float64,
    "aicc_exponential": pl.Float64,
    "aicc_power_law": pl.Float64,
}


TABLE_COLUMNS = (
    "metric", "length", "depth_fraction", "n", "from", "to", "model", "tokens_at_share", "ci_low", "ci_high", "slope_p",
    "verdict",
)  # fmt: skip
"""What a table for people shows; the reasons are too long for one."""


@dataclass(frozen=True)
class DeceptiveSaturation:
    """Whether the score looked finished before the perplexity was, in one sentence that can be quoted.

    `verdict` is `yes`, `no` or `cannot tell`; `score` and `ppl` are the rows of `saturation_table` it rests on.
    """

    verdict: str
    sentence: str
    score: dict[str, Any]
    ppl: dict[str, Any]


def saturation_table(
    run: Run,
    *,
    metrics: Sequence[str] | None = None,
    length: int | None = None,
    share: float = 0.95,
    mode: str | None = None,
    confidence: float = 0.95,
    n_boot: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """When each metric of a run made `share` of its total gain, and whether it is done.

    Warns if a metric has fewer than five checkpoints from the base on.

    Args:
        run: an opened run.
        metrics: which ones, from `metric_names`; None means all.
        length: total length in tokens; None means the longest of the run, and `answer_ppl` and
            `loss_nats` at every length.
        share: of the fitted gain from the base to the asymptote, in (0, 1).
        mode: as in `outcome_table`.
        confidence: level of the intervals, in (0, 1).
        n_boot: number of resamples.
        seed: of all random numbers.

    Returns:
        One row per metric (and length, depth). metric, length, depth_fraction (null where they do not apply), n
        (checkpoints with a value, from the base on), from and to (first and last value), tokens_last (of the last
        checkpoint; all tokens count from the base), model (of least AICc), share, tokens_at_share (null: not within
        the data, or undefined), ci_low, ci_high (null while ci_low is not: open, beyond the last checkpoint),
        p_no_gain (of a flat curve, by bootstrap and by Mann and Kendall's test of all checkpoints, corrected for being
        two), slope_p (one-sided, the later half of the checkpoints improves), slope_n (how many those are),
        verdict, reason (one sentence), log_linear_a, log_linear_b (of A log N + B, natural logarithm), and the AICc of
        the shapes. Undefined numbers are NaN.

    Raises:
        LccpError: unknown metric, length or mode (the known ones are listed), a share or confidence outside (0, 1),
            two checkpoints with the same tokens, probes of checkpoints that the run does not have.

    Example:
        >>> saturation_table(Run.open("runs/demo")).select("metric", "verdict")   # doctest: +SKIP
    """
    check_share(share)
    curves = metric_curves(run, metrics=metrics, length=length, mode=mode, n_boot=n_boot, seed=seed)
    rows = [judge(curve, share=share, confidence=confidence, seed=seed) for curve in curves]
    few = [f"{title(row)} (n = {row['n']})" for row in rows if 0 < row["n"] < MIN_CHECKPOINTS]
    if few:
        warnings.warn(
            f"fewer than {MIN_CHECKPOINTS} checkpoints from the base on, so saturation cannot be told for {len(few)} "
            f"of {len(rows)} curves: {named(few, 3)}; score more checkpoints",
            stacklevel=2,
        )
    return pl.DataFrame(rows, schema=SATURATION_SCHEMA)


def saturation_records(run: Run, **options: Any) -> list[dict[str, Any]]:
    """The rows of `saturation_table` as dictionaries, None where undefined: what `lccp saturation` prints.

    Example:
        >>> saturation_records(Run.open("runs/demo"), share=0.9)[0]["verdict"]   # doctest: +SKIP
        'saturated'
    """
    table = saturation_table(run, **options)
    return table.with_columns(pl.col(pl.Float64).fill_nan(None)).to_dicts()


def judge(curve: MetricCurve, *, share: float = 0.95, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """One row of `saturation_table`; `judge_and_fit` gives the fits too.

    Example:
        >>> tokens = np.array([0.0, 10, 20, 40, 80, 160, 320])
        >>> curve = MetricCurve("answer_ppl", 1024, None, False, tuple("abcdefg"), tokens,
        ...     3 + 5 * np.exp(-tokens / 15) + 0.01 * np.cos(tokens), np.full(7, 20), np.zeros((200, 7)))
        >>> judge(curve)["verdict"]
        'saturated'
    """
    return judge_and_fit(curve, share=share, confidence=confidence, seed=seed)[0]


def judge_and_fit(
    curve: MetricCurve, *, share: float = 0.95, confidence: float = 0.95, seed: int = 0
) -> tuple[dict[str, Any], Saturation | None]:
    """One row of `saturation_table` and the fits it rests on, for whoever draws them.

    Returns:
        The row, and the `Saturation` of the checkpoints with a value; None where nothing was fitted: fewer than five
        checkpoints, or all values alike.

    Example:
        >>> tokens = np.array([0.0, 10, 20, 40, 80, 160, 320])
        >>> curve = MetricCurve("answer_ppl", 1024, None, False, tuple("abcdefg"), tokens,
        ...     3 + 5 * np.exp(-tokens / 15) + 0.01 * np.cos(tokens), np.full(7, 20), np.zeros((200, 7)))
        >>> row, found = judge_and_fit(curve)
        >>> row["model"] == found.best.model
        True
    """
    defined = np.isfinite(curve.values)
    tokens, values = curve.tokens[defined], curve.values[defined]
    n = len(values)
    row: dict[str, Any] = {
        **dict.fromkeys(SATURATION_SCHEMA),
        "metric": curve.metric,
        "length": curve.length,
        "depth_fraction": curve.depth_fraction,
        "n": n,
        "from": float(values[0]) if n else math.nan,
        "to": float(values[-1]) if n else math.nan,
        "tokens_last": int(tokens[-1]) if n else None,
        "share": share,
        "verdict": UNKNOWN,
    }
    numbers = [name for name, kind in SATURATION_SCHEMA.items() if kind == pl.Float64 and row[name] is None]
    row |= dict.fromkeys((name for name in numbers if name != "depth_fraction"), math.nan)
    late = slice(n - late_count(n), n)
    note = _note(curve, defined, row)
    if n == 0:
        why = ": the base has no retrieval head to follow" if curve.metric == INITIAL_SCORE else ""
        row["reason"] = f"it is undefined at all {len(curve.checkpoints)} checkpoints{why}"
        return row, None
    if n < MIN_CHECKPOINTS:
        has = "1 checkpoint has" if n == 1 else f"{n} checkpoints have"
        row["reason"] = f"{has} a value from the base on, at least {MIN_CHECKPOINTS} are needed{note}"
        return row, None
    row["slope_n"] = late_count(n)
    row["slope_p"] = trend_p_value(values[late], higher_is_better=curve.higher_is_better)
    if np.ptp(values) == 0:
        row["reason"] = f"it is {_number(values[0])} at all {n} checkpoints: there is no gain to saturate{note}"
        return row, None
    found = find_saturation(
        tokens,
        values,
        curve.deviations[:, defined],
        higher_is_better=curve.higher_is_better,
        share=share,
        confidence=confidence,
        seed=seed,
    )
    row |= _columns(found, tokens[-1])
    # A curve test that tries all shapes and a trend test that knows none; the smaller counts twice (Bonferroni).
    p_trend = trend_p_value(values, higher_is_better=curve.higher_is_better)
    row["p_no_gain"] = min(1.0, 2 * min(found.p_no_gain, p_trend))
    gone = f"from {_number(values[0])} to {_number(values[-1])}"
    if row["p_no_gain"] > ALPHA or found.best.gain == 0:
        # Without a gain there is no point at which it is made.
        row |= dict.fromkeys(("tokens_at_share", "ci_low", "ci_high"))
        p_worse = trend_p_value(values, higher_is_better=not curve.higher_is_better)
        row["reason"] = f"no gain beyond noise ({gone}, p = {row['p_no_gain']:.2g}){note}"
        if p_worse < ALPHA:
            row["reason"] = f"it gets worse, {gone} (Mann-Kendall p = {p_worse:.2g}): no gain to saturate{note}"
        return row, found
    late_slope = median_slope(np.log(tokens[late]), values[late]) * (1 if curve.higher_is_better else -1)
    late_gain = late_slope * math.log(tokens[-1] / tokens[late][0])
    row["verdict"], reason = _verdict(row, found, float(tokens[late][0]), late_gain)
    row["reason"] = reason + note
    return row, found


def _note(curve: MetricCurve, defined: np.ndarray, row: dict[str, Any]) -> str:
    """What a reader should know beside the reason."""
    missing = [name for name, there in zip(curve.checkpoints, defined, strict=True) if not there]
    if missing:
        more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
        base = ", so the gain counts from the fitted value there" if not defined[0] else ""
        return f"; undefined or not scored at {', '.join(missing[:MAX_NAMED])}{more}{base}"
    if curve.metric == ANSWER_PPL and row["from"] > WIDE_PPL * row["to"] > 0:
        fold = _number(row["from"] / row["to"])
        return f"; perplexity fell {fold}-fold, so nearly all of its gain is its first fall: see the loss"
    return ""


def late_count(n: int) -> int:
    """How many checkpoints the slope test reads: the later half of `n`, at least 4 (3 could never be significant)."""
    return min(n, max(4, math.ceil(n / 2)))


def _columns(found: Saturation, last: float) -> dict[str, Any]:
    line = found.fit(LOG_LINEAR)
    at_share = found.best.tokens_at_share
    return {
        "model": found.best.model,
        "tokens_at_share": round(at_share) if at_share <= last else None,
        "ci_low": round(found.ci_low),
        "ci_high": round(found.ci_high) if math.isfinite(found.ci_high) else None,
        "log_linear_a": line.parameters["A"],
        "log_linear_b": line.parameters["B"],
    } | {f"aicc_{fit.model.replace('-', '_').replace(' ', '_')}": fit.aicc for fit in found.fits}


def _verdict(row: dict[str, Any], found: Saturation, late_start: float, late_gain: float) -> tuple[str, str]:
    """Verdict and reason; the rule stands at the top of this module.

    `late_gain` is what the checkpoints from `late_start` on gained, in units of the metric.
    """
    last, share = format_tokens(row["tokens_last"]), _percent(row["share"])
    improves = row["slope_p"] < ALPHA
    what = "still improve" if improves else "show no improvement"
    trend = f"the last {row['slope_n']} checkpoints {what} (Mann-Kendall p = {row['slope_p']:.2g})"
    low, high = format_tokens(found.ci_low), format_tokens(found.ci_high)
    if math.isfinite(found.ci_high):
        where = (
            f"{share} of the fitted gain ({found.best.model}) is made by {format_tokens(found.best.tokens_at_share)}"
        )
        text = f"{where} (interval {low} to {high}) of {last} tokens; {trend}"
        part = late_gain / found.best.gain
        if improves:
            text += f", by {_percent(part)} of the gain"
        if improves and found.ci_high < late_start and part > 1 - row["share"]:
            return UNKNOWN, f"{text}, which contradicts the curve"
        return SATURATED, text
    at_share = found.best.tokens_at_share
    is_beyond = at_share >= row["tokens_last"]
    if found.best.model == LOG_LINEAR:
        text = f"A log N + B with A = {_number(found.best.parameters['A'])}, which has no plateau, fits best"
        if math.isfinite(found.margin):
            text += f" (AICc lower by {found.margin:.1f})"
    elif found.ci_low >= row["tokens_last"]:
        text = f"{share} of the fitted gain ({found.best.model}) is not made by the last checkpoint ({last} tokens)"
    else:
        text = f"the interval of the {share} point runs from {low} beyond the last checkpoint ({last} tokens)"
        text += f", best guess {'beyond it' if is_beyond else format_tokens(at_share)}"
    if improves or not is_beyond:
        return IMPROVING if improves and is_beyond else UNKNOWN, f"{text}; {trend}"
    return UNKNOWN, f"{text}; but {trend}"


def deceptive_saturation(
    run: Run,
    *,
    length: int | None = None,
    ppl: str | None = None,
    share: float = 0.95,
    mode: str | None = None,
    confidence: float = 0.95,
    n_boot: int = 500,
    seed: int = 0,
) -> DeceptiveSaturation:
    """Whether the NIAH score saturated before the perplexity of the answer at the same length.

    `yes` if the score is saturated and its interval ends before that of the perplexity begins, or the perplexity is
    still improving by the end; `no` if the score is still improving, or the perplexity's interval ends before the
    score's begins; otherwise `cannot tell`. Gives no warnings: what is missing is in the sentence.

    Args:
        run, length, share, mode, confidence, n_boot, seed: as in `saturation_table`; length None means the longest.
        ppl: `answer_ppl` or `loss_nats` (its logarithm, averaged over cases as such); None means the perplexity, or
            the loss where the perplexity falls more than `WIDE_PPL`-fold and its first fall hides all else.

    Raises:
        LccpError: as `saturation_table`, and an unknown `ppl`.

    Example:
        >>> print(deceptive_saturation(Run.open("runs/demo"), length=1024).sentence)   # doctest: +SKIP
    """
    if ppl is not None:
        choose("ppl", ppl, (ANSWER_PPL, LOSS_NATS), "deceptive_saturation")
    score, perplexity, loss = metric_curves(
        run,
        metrics=[NIAH_SCORE, ANSWER_PPL, LOSS_NATS],
        length=choose_length(run, length),
        mode=mode,
        n_boot=n_boot,
        seed=seed,
    )
    if ppl is None:
        known = perplexity.values[np.isfinite(perplexity.values)]
        ppl = LOSS_NATS if known.size and known[0] > WIDE_PPL * known[-1] else ANSWER_PPL
    rows = [
        judge(curve, share=share, confidence=confidence, seed=seed)
        for curve in (score, perplexity if ppl == ANSWER_PPL else loss)
    ]
    verdict, sentence = compare(*rows)
    return DeceptiveSaturation(verdict, sentence, *rows)


def compare(score: dict[str, Any], ppl: dict[str, Any]) -> tuple[str, str]:
    """Verdict (`yes`, `no`, `cannot tell`) and sentence from the rows of a score and of a perplexity."""
    at = f"at {score['length']:,} tokens"
    share = _percent(score["share"])
    name = "answer perplexity" if ppl["metric"] == ANSWER_PPL else "answer loss"
    if score["verdict"] == UNKNOWN or (score["verdict"] == SATURATED and ppl["ci_low"] is None):
        which, row = ("NIAH score", score) if score["verdict"] == UNKNOWN else (name, ppl)
        return UNKNOWN, f"Whether saturation is deceptive {at} cannot be told: for the {which}, {row['reason']}."
    if score["verdict"] == IMPROVING:
        return "no", f"Saturation is not deceptive {at}: the NIAH score itself is still improving ({score['reason']})."
    made = (
        f"the NIAH score makes {share} of its gain by {format_tokens(score['tokens_at_share'])} tokens since the base "
        f"(interval {format_tokens(score['ci_low'])} to {format_tokens(score['ci_high'])})"
    )
    if ppl["verdict"] == IMPROVING:
        return "yes", f"Saturation is deceptive {at}: {made}, while the {name} is still improving: {ppl['reason']}."
    high = "beyond the last checkpoint" if ppl["ci_high"] is None else format_tokens(ppl["ci_high"])
    theirs = f"the {name} makes {share} of its own between {format_tokens(ppl['ci_low'])} and {high}"
    if ppl["ci_high"] is None:
        theirs = f"the {name} makes {share} of its own after {format_tokens(ppl['ci_low'])}"
    if score["ci_high"] < ppl["ci_low"]:
        return "yes", f"Saturation is deceptive {at}: {made}, {theirs}: the intervals do not overlap."
    if ppl["ci_high"] is not None and ppl["ci_high"] < score["ci_low"]:
        return "no", f"Saturation is not deceptive {at}: {made}, but {theirs}, which is earlier."
    return UNKNOWN, f"Whether saturation is deceptive {at} cannot be told: {made}, {theirs}: the intervals overlap."


def title(record: Mapping[str, Any]) -> str:
    """The metric of a record and where it was measured, in words.

    Example:
        >>> title({"metric": "answer_ppl", "length": 4096, "depth_fraction": 0.25})
        'answer_ppl at 4,096 tokens, depth 25 %'
    """
    at = "" if record["length"] is None else f" at {record['length']:,} tokens"
    depth = "" if record["depth_fraction"] is None else f", depth {100 * record['depth_fraction']:.4g} %"
    return f"{record['metric']}{at}{depth}"


def format_tokens(tokens: float) -> str:
    """A number of tokens in K, M, B or T, three significant digits.

    Example:
        >>> format_tokens(4_800_000), format_tokens(0), format_tokens(200e9), format_tokens(1024)
        ('4.8M', '0', '200B', '1.02K')
        >>> format_tokens(614_400), format_tokens(2_621_440)
        ('614K', '2.62M')
    """
    for power, unit in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if abs(tokens) >= 0.9995 * 10**power:
            return f"{tokens / 10**power:.3g}{unit}"
    return f"{tokens:.3g}"


def _number(value: float) -> str:
    """Three digits without an exponent for everyday numbers."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"
