"""How cheap a monitor may be: which part of a study's cases gives the same curve over checkpoints, and what it costs.

From stored results only: a monitor that ran `n_cases` of one length is imitated by drawing that many of the stored
cases with replacement, many times. Its curve is correlated with the *full* one, that of all cases at the reference
length. What counts is the low end (the 5 % quantile over draws): a monitor is run once. Two things to know when reading
it. The full curve is itself one of few cases, and at its own length the drawn ones are part of it: a small study
flatters itself. Retrieval heads are those of the census, above the threshold and above their null; who is above the
null is taken from all cases of a length, since a few cases cannot tell. And two curves with the same trend agree
easily: `detrended` asks whether the monitor also sees what is not trend.

The price is the tokens of the prompts per checkpoint, each run from its beginning (shared prefixes cost less), against
the tokens that the paper's SFT probe trains on (arXiv 2604.02650: 0.25 billion, twice); a trained token costs about
three forward ones, and evaluating the probe comes on top. Fewer heads save no tokens, but rows and disk. This module
knows tables; it refuses to know models and pictures. Cost: one scan of the outcomes, one of the scores per length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.correlation import METHODS, MIN_N, TRANSFORMS, embedded, rounded, transformed
from lccp_interp.dynamics.heads import HeadSample, count_heads
from lccp_interp.dynamics.outcomes import case_measures, dense_measures
from lccp_interp.dynamics.published import SFT_PROBE_EPOCHS, SFT_PROBE_TOKENS
from lccp_interp.dynamics.resampling import draw_resamples, mean_defined
from lccp_interp.dynamics.selection import (
    base_checkpoint,
    choose,
    choose_length,
    choose_mode,
    head_values,
    niah_cases,
    scored_checkpoints,
    with_outcomes,
)
from lccp_interp.dynamics.series import log_of_tokens
from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError
from lccp_interp.store import Run

Array = NDArray[np.float64]

OUTCOME_MEASURES = ("niah_score", "answer_ppl", "loss_nats")
HEAD_MEASURES = ("n_retrieval_heads", "mean_initial_score")
MEASURES = (*OUTCOME_MEASURES, *HEAD_MEASURES)

LOW_QUANTILE = 0.05
"""The low end over draws that must reach the level: one monitor in twenty does worse."""

SCHEMA = {
    "measure": pl.String,
    "length": pl.Int64,
    "n_cases": pl.Int64,
    "n_heads": pl.Int64,
    "n": pl.Int64,
    "r_median": pl.Float64,
    "r_low": pl.Float64,
    "n_draws": pl.Int64,
    "n_undefined": pl.Int64,
    "tokens_per_checkpoint": pl.Int64,
    "sft_share": pl.Float64,
    "reaches": pl.Boolean,
    "cheapest": pl.Boolean,
    "reason": pl.String,
}


def budget(
    run: Run,
    *,
    level: float = 0.95,
    length: int | None = None,
    measures: Sequence[str] = MEASURES,
    n_cases: Sequence[int] | None = None,
    n_heads: Sequence[int] | None = None,
    transform: str = "levels",
    method: str = "pearson",
    metric: str = "retrieval",
    mode: str | None = None,
    n_draws: int = 200,
    seed: int = 0,
) -> pl.DataFrame:
    """Correlation of cheaper monitors' curves with the full one, and their price.

    Args:
        run: an opened run with at least four scored checkpoints.
        level: correlation that the low end over draws must reach, in (0, 1).
        length: of the full curve, in tokens; None means the run's longest. All lengths of the run up to it are tried.
        measures: any of niah_score (percent), answer_ppl (mean over cases), loss_nats (per answer token),
            n_retrieval_heads and mean_initial_score (over retrieval heads of the base checkpoint at `length`).
        n_cases: how many cases to draw; None means 1, 2, 4, ... and all that there are. More than there are is skipped.
        n_heads: how many initial heads to follow, the best at the base checkpoint; None means 1, 4 and all. Only for
            mean_initial_score; the choice uses all cases, so it takes one full measurement of the base checkpoint.
        transform, method: as in `correlate`.
        metric: head metric behind the head measures.
        mode: as in `outcome_table`.
        n_draws: number of draws of cases.
        seed: of the draws.

    Returns:
        One row per measure, length, n_heads and n_cases: n (checkpoints, steps for `differences`), r_median and r_low
        (median and 5 % quantile over draws; a draw without a correlation counts as worst; NaN if that is the
        quantile), n_draws, n_undefined (draws without a correlation), tokens_per_checkpoint (n_cases x length),
        sft_share (of the tokens that the paper's SFT probe trains on per checkpoint), reaches (r_low >= level),
        cheapest (the fewest tokens that reach it, then the fewest heads, per measure), reason (why r is NaN).

    Raises:
        LccpError: fewer than four scored checkpoints, unknown names, or numbers out of range.

    Example:
        >>> table = budget(Run.open("runs/demo"), level=0.95)                              # doctest: +SKIP
        >>> table.filter("cheapest").select("measure", "n_cases", "length", "sft_share")   # doctest: +SKIP
    """
    _check(level, n_cases, n_heads, n_draws)
    for measure in measures:
        choose("measure", measure, MEASURES, "budget")
    choose("transform", transform, TRANSFORMS, "budget")
    choose("method", method, METHODS, "budget")
    study = _Study(run, choose_length(run, length), metric, choose_mode(run, mode))
    n = study.checkpoints.height
    if n - (transform == "differences") < MIN_N:
        raise LccpError(
            f"run {run.path} has {n} scored checkpoints; a curve needs at least {MIN_N + (transform == 'differences')} "
            "to be compared: score more"
        )
    compare = _Comparison(transform, method, level, n_draws, seed)
    rows = []
    for measure in measures:
        rows += _rows_of(study, measure, compare, n_cases, n_heads)
    table = pl.DataFrame(rows, schema=SCHEMA).with_row_index("at")
    price = ("tokens_per_checkpoint", "n_heads", "length")
    best = table.filter("reaches").sort(price).unique("measure", keep="first", maintain_order=True)
    return table.with_columns(cheapest=pl.col("at").is_in(best["at"].implode())).select(*SCHEMA)


def _check(level: float, n_cases: Sequence[int] | None, n_heads: Sequence[int] | None, n_draws: int) -> None:
    if not 0 < level < 1:
        raise LccpError(f"level must lie between 0 and 1, got {level}; the usual one is 0.95")
    if n_draws < 20:
        raise LccpError(f"n_draws must be at least 20 to have a 5 % quantile, got {n_draws}; the usual number is 200")
    for name, numbers in (("n_cases", n_cases), ("n_heads", n_heads)):
        if numbers is not None and (not numbers or min(numbers) < 1):
            raise LccpError(f"{name} must be numbers from 1 on, got {list(numbers)}; leave it out for the usual ones")


@dataclass(frozen=True)
class _Study:
    """The stored per-case numbers of a run as dense arrays over the scored checkpoints."""

    run: Run
    length: int
    metric: str
    mode: str
    read: dict[int, tuple[NDArray[np.float32], NDArray[np.bool_]]] = field(default_factory=dict)

    @cached_property
    def checkpoints(self) -> pl.DataFrame:
        return scored_checkpoints(self.run, self.mode)

    @cached_property
    def cases(self) -> pl.DataFrame:
        return niah_cases(self.run).filter(pl.col("length") <= self.length).select("case_id", "length")

    @cached_property
    def log_tokens(self) -> Array:
        return log_of_tokens(self.checkpoints["tokens_seen"].to_numpy())

    @cached_property
    def lengths(self) -> list[int]:
        """The reference length first, then the others, longest first."""
        return sorted((int(length) for length in self.cases["length"].unique()), reverse=True)

    @cached_property
    def outcomes(self) -> pl.DataFrame:
        return case_measures(self.run, self.mode)

    def outcome_values(self, measure: str, length: int) -> Array:
        """`[case, checkpoint]`, NaN where there is none."""
        cases = self.cases.filter(pl.col("length") == length)
        return dense_measures(self.outcomes, self.checkpoints, cases, (measure,))[measure].T

    def head_values(self, length: int) -> NDArray[np.float32]:
        """`[case, checkpoint, head]`, heads in order of layer and head; NaN where there is none."""
        return self._heads(length)[0]

    def may_retrieve(self, length: int) -> NDArray[np.bool_]:
        """`HeadSample.may_retrieve` over the scored checkpoints, `[checkpoint, head]`."""
        return self._heads(length)[1]

    def _heads(self, length: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        if length not in self.read:
            found = head_values(self.run, metric=self.metric, length=length, mode=self.mode)
            found = with_outcomes(self.run, found)
            names = self.checkpoints["checkpoint"].to_list()
            places = [names.index(name) for name in found.checkpoints["checkpoint"]]
            _, n_cases, n_heads = found.values.shape
            values = np.full((n_cases, len(names), n_heads), np.nan, np.float32)
            values[:, places] = found.values.transpose(1, 0, 2)
            may = np.ones((len(names), n_heads), bool)
            may[places] = HeadSample(found, draw_resamples(found.clusters)).may_retrieve
            self.read[length] = values, may
        return self.read[length]

    @cached_property
    def initial_heads(self) -> NDArray[np.int64]:
        """Retrieval heads of the base checkpoint at the reference length, as places among all heads, best first."""
        base = self.checkpoints["checkpoint"].to_list().index(base_checkpoint(self.checkpoints))
        scores, _ = mean_defined(self.head_values(self.length)[:, base])
        retrieves = (np.nan_to_num(scores) > RETRIEVAL_THRESHOLD) & self.may_retrieve(self.length)[base]
        best_first = np.argsort(np.where(retrieves, -scores, np.inf), kind="stable")
        return best_first[: int(np.count_nonzero(retrieves))].astype(np.int64)


@dataclass(frozen=True)
class _Comparison:
    """How curves are compared."""

    transform: str
    method: str
    level: float
    n_draws: int
    seed: int

    def vectors(self, curves: Array, log_tokens: Array) -> Array:
        """Unit vectors of curves `[..., checkpoint]`; zeros where a curve is undefined or flat."""
        curves = curves - curves.mean(axis=-1, keepdims=True)
        spread = np.ptp(curves, axis=-1, keepdims=True)
        scaled = curves / np.where(spread > 0, spread, 1)
        return embedded(rounded(transformed(scaled, log_tokens, self.transform)), self.method)

    def subsets(self, n_all: int, n_chosen: int, length: int) -> Array:
        """Weights `[draw, case]`: how often each case was drawn, with replacement, as a new monitor's would be."""
        rng = np.random.default_rng([self.seed, length, n_chosen])
        return rng.multinomial(n_chosen, np.full(n_all, 1 / n_all), size=self.n_draws).astype(np.float64)


def _rows_of(
    study: _Study,
    measure: str,
    compare: _Comparison,
    n_cases: Sequence[int] | None,
    n_heads: Sequence[int] | None,
) -> list[dict[str, object]]:
    """All rows of one measure; the first length is the reference."""
    whole = _values(study, measure, study.length)
    heads = study.initial_heads if measure in HEAD_MEASURES else None
    is_count = measure == "n_retrieval_heads"
    may_retrieve = study.may_retrieve(study.length) if is_count else None
    reference = _curves(whole, np.ones((1, len(whole))), measure, heads, may_retrieve)[0]
    row = _label(measure, study.length, len(whole), heads) | _agreement(
        reference[None], reference, study.log_tokens, compare
    )
    if row["n_undefined"]:
        # Without a full curve there is nothing to compare with: one row says why.
        return [row]
    rows = []
    for length in study.lengths:
        values = _values(study, measure, length)
        may_retrieve = study.may_retrieve(length) if is_count else None
        for followed in _head_choices(study, measure, n_heads):
            for size in _sizes(len(values), n_cases):
                curves = _curves(values, compare.subsets(len(values), size, length), measure, followed, may_retrieve)
                agreement = _agreement(curves, reference, study.log_tokens, compare)
                rows.append(_label(measure, length, size, followed) | agreement)
    return rows


def _values(study: _Study, measure: str, length: int) -> NDArray[np.floating]:
    """Per-case numbers `[case, checkpoint]`, or `[case, checkpoint, head]` for the head measures."""
    return study.outcome_values(measure, length) if measure in OUTCOME_MEASURES else study.head_values(length)


def _label(measure: str, length: int, n_cases: int, heads: NDArray[np.int64] | None) -> dict[str, object]:
    """What a monitor is, and its price."""
    tokens = n_cases * length
    return {
        "measure": measure,
        "length": length,
        "n_cases": n_cases,
        "n_heads": len(heads) if heads is not None and measure == "mean_initial_score" else None,
        "tokens_per_checkpoint": tokens,
        "sft_share": tokens / (SFT_PROBE_TOKENS * SFT_PROBE_EPOCHS),
    }


def _sizes(n_all: int, asked: Sequence[int] | None) -> list[int]:
    """Numbers of cases to draw out of `n_all`.

    Example:
        >>> _sizes(20, None), _sizes(4, [2, 8])
        ([1, 2, 4, 8, 16, 20], [2])
    """
    if asked is not None:
        return sorted({size for size in asked if size <= n_all})
    return [*(2**power for power in range((n_all - 1).bit_length())), n_all]


def _head_choices(study: _Study, measure: str, asked: Sequence[int] | None) -> list[NDArray[np.int64] | None]:
    """Sets of heads to follow; [None] where the measure is not of chosen heads."""
    if measure != "mean_initial_score":
        return [None]
    heads = study.initial_heads
    sizes = {min(size, len(heads)) for size in asked or (1, 4, len(heads))}
    return [heads[:size] for size in sorted(sizes)]


def _means(values: NDArray[np.floating], weights: Array) -> Array:
    """Mean over the drawn cases, NaN left out: values `[case, ...]`, weights `[draw, case]` -> `[draw, ...]`."""
    defined = ~np.isnan(values)
    if defined.all():
        return np.asarray(np.tensordot(weights / weights.sum(axis=1, keepdims=True), values, axes=1))
    total = np.tensordot(weights, np.where(defined, values, 0).astype(np.float64), axes=1)
    count = np.tensordot(weights, defined.astype(np.float64), axes=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _curves(
    values: NDArray[np.floating],
    weights: Array,
    measure: str,
    heads: NDArray[np.int64] | None,
    may_retrieve: NDArray[np.bool_] | None,
) -> Array:
    """Curves `[draw, checkpoint]` of a measure over drawn cases; NaN where nothing is defined.

    `heads` are followed for the mean score, `may_retrieve` `[checkpoint, head]` is asked for the count.
    """
    if measure in OUTCOME_MEASURES:
        return _means(values, weights)
    if measure == "mean_initial_score":
        assert heads is not None
        if not heads.size:
            return np.full((len(weights), values.shape[1]), np.nan)
        # Over cases, then over heads, as the census does: a head counts once however many cases define it.
        scores = _means(values[:, :, heads], weights)
        known = ~np.isnan(scores)
        total, count = np.where(known, scores, 0).sum(axis=2), known.sum(axis=2)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)
    assert may_retrieve is not None
    return count_heads(_means(values, weights), may_retrieve)


def _agreement(curves: Array, reference: Array, log_tokens: Array, compare: _Comparison) -> dict[str, object]:
    """Correlation of drawn curves with the reference: median, low end, and what was undefined."""
    usable = np.isfinite(reference)
    n = max(int(usable.sum()) - (compare.transform == "differences"), 0)
    row: dict[str, object] = {"n": n, "n_draws": len(curves), "n_undefined": len(curves)}
    row |= {"r_median": float("nan"), "r_low": float("nan"), "reaches": False}
    if n < MIN_N:
        return row | {"reason": f"the full curve is defined at {int(usable.sum())} checkpoints, needs {MIN_N}"}
    full = compare.vectors(reference[usable], log_tokens[usable])
    if not full.any():
        return row | {"reason": "the full curve has no variance"}
    vectors = compare.vectors(curves[:, usable], log_tokens[usable])
    defined = vectors.any(axis=1)
    r = np.sort(np.where(defined, (vectors @ full).clip(-1, 1), -np.inf))
    low, median = (float(r[int(q * (r.size - 1))]) for q in (LOW_QUANTILE, 0.5))
    undefined = int(np.count_nonzero(~defined))
    return row | {
        "n_undefined": undefined,
        "r_median": median if np.isfinite(median) else float("nan"),
        "r_low": low if np.isfinite(low) else float("nan"),
        "reaches": low >= compare.level,
        "reason": "" if undefined == 0 else f"{undefined} of {r.size} draws flat or undefined at a checkpoint",
    }


def advice(table: pl.DataFrame, *, level: float) -> list[str]:
    """One sentence per measure of `budget`: the cheapest choice that reaches `level`, and its price.

    Example:
        >>> table = pl.DataFrame({"measure": ["loss_nats"], "cheapest": [True], "n_cases": [4], "length": [1024],
        ...     "n_heads": [None], "r_low": [0.97], "tokens_per_checkpoint": [4096], "sft_share": [4096 / 5e8]})
        >>> advice(table, level=0.95)
        ["loss_nats: 4 cases of 1024 tokens (5 % quantile of r 0.970), 4,096 tokens per checkpoint, 0.00082 % of the \
SFT probe's 500,000,000"]
    """
    sentences = []
    total = SFT_PROBE_TOKENS * SFT_PROBE_EPOCHS
    for (measure,), rows in table.group_by("measure", maintain_order=True):
        best = rows.filter("cheapest")
        if best.is_empty():
            found = rows["r_low"].drop_nans().to_list()
            best_low = f"best 5 % quantile of r {max(found):.3f}" if found else rows["reason"][0]
            sentences.append(f"{measure}: nothing tried reaches {level:g} ({best_low})")
            continue
        row = best.row(0, named=True)
        cases = "case" if row["n_cases"] == 1 else "cases"
        heads = f", {row['n_heads']} heads followed" if row["n_heads"] is not None else ""
        sentences.append(
            f"{measure}: {row['n_cases']} {cases} of {row['length']} tokens{heads} (5 % quantile of r "
            f"{row['r_low']:.3f}), {row['tokens_per_checkpoint']:,} tokens per checkpoint, "
            f"{100 * row['sft_share']:.2g} % of the SFT probe's {total:,}"
        )
    return sentences
