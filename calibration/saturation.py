"""How often the interval of the saturation point holds the truth, by seeded simulation.

A trajectory is drawn whose curve is known: exponential or power law, 6 to 19 checkpoints spaced evenly or doubling,
a saturation point anywhere from the first checkpoint to half again the last. Twenty cases are measured at all
checkpoints: each case is harder or easier throughout and has a scatter of its own, and the checkpoints may scatter
beyond that. `judge` sees what a study would see: means over cases and their resamples.

A second simulation has scores in place of losses: a case is right or wrong, twenty of them, so that at either end of a
curve all are alike and resampling sees no spread. Its curves begin at 0 to 30 % and level off at 80 to 100 %; each case
is harder or easier throughout (half of a normal difficulty), and is right where that lies below the curve's quantile.

The coverage is that of the true point; an open upper end covers every later point. 1200 curves take about a minute on
one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from lccp_interp.dynamics.curves import MetricCurve, with_share_variance
from lccp_interp.dynamics.fits import curve_shape
from lccp_interp.dynamics.saturation import IMPROVING, SATURATED, judge

TITLE = "Saturation points"
BOUNDS = (0.90, 0.98)
N_CASES = 20
SHARE = 0.95
TOKENS_LAST = 10**9
SCORES = "scores of right and wrong"
BOUNDED = ("all", "within the data", SCORES)
"""Groups that the bounds are asked of."""


@dataclass(frozen=True)
class Drawn:
    """One simulated trajectory with its truth; tokens run from 0 to 1, in units of the last checkpoint."""

    family: str
    saturation: float
    tokens: np.ndarray
    values: np.ndarray
    deviations: np.ndarray


@dataclass(frozen=True)
class Coverage:
    """Shares of `n` curves: interval holds the truth, interval ends within the data, and the verdicts that err.

    `wrongly_saturated` is a truth beyond the last checkpoint called saturated, `wrongly_improving` a truth within the
    data called still improving.
    """

    n: int
    covered: float
    closed: float
    wrongly_saturated: float
    wrongly_improving: float

    @classmethod
    def of(cls, hits: list[tuple[bool, bool, bool, bool]]) -> Coverage:
        return cls(len(hits), *(round(float(np.mean(column)), 4) for column in zip(*hits, strict=True)))


def draw(rng: np.random.Generator, family: str, share: float = SHARE, n_boot: int = 400) -> Drawn:
    """Draw one trajectory of `family` (`exponential` or `power law`)."""
    tokens, saturation, curve = _truth(rng, family, share)
    n = len(tokens)
    # Standard errors of 2 to 10 % of the gain from each of two sources: which cases, and their scatter.
    error = math.exp(rng.uniform(math.log(0.02), math.log(0.1)))
    per_case = error * math.sqrt(N_CASES) * (rng.normal(size=(N_CASES, 1)) + rng.normal(size=(N_CASES, n)))
    cases = curve + per_case
    values = cases.mean(axis=0) + error * rng.choice([0, 0.5, 1]) * rng.normal(size=n)
    return Drawn(family, saturation, tokens, values, _deviations(rng, cases, n_boot))


def draw_score(rng: np.random.Generator, family: str, share: float = SHARE, n_boot: int = 400) -> Drawn:
    """Draw one trajectory of scores in percent, of cases that are right or wrong."""
    tokens, saturation, curve = _truth(rng, family, share)
    low, high = rng.uniform(0, 0.3), rng.uniform(0.8, 1)
    level = high - (high - low) * curve
    difficulty = math.sqrt(0.5) * (rng.normal(size=(N_CASES, 1)) + rng.normal(size=(N_CASES, len(tokens))))
    cases = 100.0 * (difficulty < ndtri(level))
    return Drawn(family, saturation, tokens, cases.mean(axis=0), _deviations(rng, cases, n_boot))


def _truth(rng: np.random.Generator, family: str, share: float) -> tuple[np.ndarray, float, np.ndarray]:
    """Tokens, saturation point and the curve, which falls from 1 towards 0."""
    n = int(rng.integers(6, 20))
    doubling = np.r_[0, np.geomspace(2.0 ** -min(n - 2, 7), 1, n - 1)]
    tokens = doubling if rng.random() < 0.5 else np.linspace(0, 1, n)
    saturation = math.exp(rng.uniform(math.log(tokens[1]), math.log(1.5)))
    exponent = math.inf if family == "exponential" else math.exp(rng.uniform(math.log(0.7), math.log(3)))
    return tokens, saturation, curve_shape(tokens, np.array(saturation), np.array(exponent), share)


def _deviations(rng: np.random.Generator, cases: np.ndarray, n_boot: int) -> np.ndarray:
    """What resampling adds to the means of `cases` `[case, checkpoint]`."""
    weights = rng.multinomial(N_CASES, np.full(N_CASES, 1 / N_CASES), size=n_boot) / N_CASES
    return (weights @ cases - cases.mean(axis=0)) * math.sqrt(N_CASES / (N_CASES - 1))


def simulate_coverage(n_curves: int = 800, *, seed: int = 0, share: float = SHARE) -> dict[str, Coverage]:
    """Coverage over `n_curves`, half of them exponential, half power laws.

    Returns:
        `all`, `exponential`, `power law`, `6 to 8 checkpoints`, `9 to 19 checkpoints`, and `within the data` (truths
        not beyond the last checkpoint) with a `Coverage` each.
    """
    rng = np.random.default_rng(seed)
    hits: dict[str, list[tuple[bool, bool, bool, bool]]] = {}
    for i in range(n_curves):
        drawn = draw(rng, ("exponential", "power law")[i % 2], share)
        hit = _hit(drawn, _curve(drawn, "loss_nats", higher_is_better=False), share, i)
        groups = ["all", drawn.family, "6 to 8 checkpoints" if len(drawn.tokens) <= 8 else "9 to 19 checkpoints"]
        for group in groups + ["within the data"] * (drawn.saturation <= 1):
            hits.setdefault(group, []).append(hit)
    return {group: Coverage.of(found) for group, found in sorted(hits.items())}


def simulate_scores(n_curves: int = 400, *, seed: int = 0, smooth: bool = True) -> Coverage:
    """Coverage over `n_curves` of scores; without `smooth` the variance is that of resamples alone."""
    rng = np.random.default_rng([seed, 1])
    hits = []
    for i in range(n_curves):
        drawn = draw_score(rng, ("exponential", "power law")[i % 2])
        curve = _curve(drawn, "niah_score", higher_is_better=True)
        if smooth:
            curve = with_share_variance(curve, N_CASES, whole=100, seed=i)
        hits.append(_hit(drawn, curve, SHARE, i))
    return Coverage.of(hits)


def _curve(drawn: Drawn, metric: str, *, higher_is_better: bool) -> MetricCurve:
    n = len(drawn.tokens)
    return MetricCurve(
        metric, None, None, higher_is_better, ("",) * n, drawn.tokens * TOKENS_LAST, drawn.values, np.full(n, N_CASES),
        drawn.deviations,
    )  # fmt: skip


def _hit(drawn: Drawn, curve: MetricCurve, share: float, seed: int) -> tuple[bool, bool, bool, bool]:
    """Whether the interval covers the truth, whether it is closed, and the two errors of the verdict."""
    row = judge(curve, share=share, seed=seed)
    # Where the interval is open at the last checkpoint it says no more than "later than that".
    truth = drawn.saturation * TOKENS_LAST
    is_open = row["ci_high"] is None
    low = row["ci_low"] or 0  # None where no gain was found: nothing is claimed
    return (
        low <= truth and (is_open or truth <= row["ci_high"]),
        not is_open,
        row["verdict"] == SATURATED and truth > TOKENS_LAST,
        row["verdict"] == IMPROVING and truth <= TOKENS_LAST,
    )


def measure(say: Callable[[str], Any], *, quick: bool = False) -> dict[str, dict[str, Any]]:
    """One record per group of curves."""
    n_curves = 40 if quick else 800
    say(f"  {n_curves} curves, {n_curves // 2} of scores")
    found = simulate_coverage(n_curves) | {
        SCORES: simulate_scores(n_curves // 2),
        f"{SCORES}, as resampled": simulate_scores(n_curves // 2, smooth=False),
    }
    return {group: asdict(coverage) for group, coverage in found.items()}


def failures(records: dict[str, dict[str, Any]]) -> list[str]:
    """Coverages outside of what was asked for."""
    return [
        f"{group}: {100 * records[group]['covered']:.1f} % covered"
        for group in BOUNDED
        if not BOUNDS[0] <= records[group]["covered"] <= BOUNDS[1]
    ]


def table(records: dict[str, dict[str, Any]]) -> list[str]:
    """The records as Markdown."""
    columns = ("covered", "closed", "wrongly_saturated", "wrongly_improving")
    rows = [
        f"| {group} | {r['n']} | " + " | ".join(f"{100 * r[column]:.1f} %" for column in columns) + " |"
        for group, r in records.items()
    ]
    return [
        f"Exponential and power-law curves over 6 to 19 checkpoints, {N_CASES} cases each; the point at which "
        f"{100 * SHARE:g} % of the gain is made lies anywhere from the first checkpoint to half again the last. Bound: "
        f"{100 * BOUNDS[0]:g} to {100 * BOUNDS[1]:g} % of the 95 % intervals cover it, over all curves, over those "
        "whose point lies within the data, and over curves of scores: shares of right answers, which begin at 0 to 30 "
        "% and level off at 80 to 100 %. *As resampled* is what those would have without the least variance of a "
        "smoothed share.",
        "",
        "| curves | n | covered | interval closed | wrongly called saturated | wrongly called still improving |",
        "|---|---:|---:|---:|---:|---:|",
        *rows,
        "",
        "How to read it. An open interval says *later than this*; with few checkpoints most are open, and the verdict "
        "is *cannot tell*.",
    ]
