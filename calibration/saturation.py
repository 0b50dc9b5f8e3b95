"""How often the interval of the saturation point holds the truth, by seeded simulation.

A trajectory is drawn whose curve is known: exponential or power law, 6 to 19 checkpoints spaced evenly or doubling,
a saturation point anywhere from the first checkpoint to half again the last. Twenty cases are measured at all
checkpoints: each case is harder or easier throughout and has a scatter of its own, and the checkpoints may scatter
beyond that. `judge` sees what a study would see: means over cases and their resamples.

The coverage is that of the true point; an open upper end covers every later point. 800 curves take about a minute on
one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lccp_interp.dynamics.curves import MetricCurve
from lccp_interp.dynamics.fits import curve_shape
from lccp_interp.dynamics.saturation import IMPROVING, SATURATED, judge

TITLE = "Saturation points"
BOUNDS = (0.90, 0.98)
N_CASES = 20
SHARE = 0.95
TOKENS_LAST = 10**9


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
    n = int(rng.integers(6, 20))
    doubling = np.r_[0, np.geomspace(2.0 ** -min(n - 2, 7), 1, n - 1)]
    tokens = doubling if rng.random() < 0.5 else np.linspace(0, 1, n)
    saturation = math.exp(rng.uniform(math.log(tokens[1]), math.log(1.5)))
    exponent = math.inf if family == "exponential" else math.exp(rng.uniform(math.log(0.7), math.log(3)))
    curve = curve_shape(tokens, np.array(saturation), np.array(exponent), share)
    # Standard errors of 2 to 10 % of the gain from each of two sources: which cases, and their scatter.
    error = math.exp(rng.uniform(math.log(0.02), math.log(0.1)))
    per_case = error * math.sqrt(N_CASES) * (rng.normal(size=(N_CASES, 1)) + rng.normal(size=(N_CASES, n)))
    cases = curve + per_case
    values = cases.mean(axis=0) + error * rng.choice([0, 0.5, 1]) * rng.normal(size=n)
    weights = rng.multinomial(N_CASES, np.full(N_CASES, 1 / N_CASES), size=n_boot) / N_CASES
    deviations = (weights @ cases - cases.mean(axis=0)) * math.sqrt(N_CASES / (N_CASES - 1))
    return Drawn(family, saturation, tokens, values, deviations)


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
        n = len(drawn.tokens)
        curve = MetricCurve(
            "loss_nats", None, None, False, ("",) * n, drawn.tokens * TOKENS_LAST, drawn.values, np.full(n, N_CASES),
            drawn.deviations,
        )  # fmt: skip
        row = judge(curve, share=share, seed=i)
        # Where the interval is open at the last checkpoint it says no more than "later than that".
        truth = drawn.saturation * TOKENS_LAST
        is_open = row["ci_high"] is None
        low = row["ci_low"] or 0  # None where no gain was found: nothing is claimed
        covered = low <= truth and (is_open or truth <= row["ci_high"])
        hit = (
            covered,
            not is_open,
            row["verdict"] == SATURATED and truth > TOKENS_LAST,
            row["verdict"] == IMPROVING and truth <= TOKENS_LAST,
        )
        groups = ["all", drawn.family, "6 to 8 checkpoints" if len(drawn.tokens) <= 8 else "9 to 19 checkpoints"]
        for group in groups + ["within the data"] * (drawn.saturation <= 1):
            hits.setdefault(group, []).append(hit)
    return {group: Coverage.of(found) for group, found in sorted(hits.items())}


def measure(say: Callable[[str], Any], *, quick: bool = False) -> dict[str, dict[str, Any]]:
    """One record per group of curves."""
    n_curves = 40 if quick else 800
    say(f"  {n_curves} curves")
    return {group: asdict(coverage) for group, coverage in simulate_coverage(n_curves).items()}


def failures(records: dict[str, dict[str, Any]]) -> list[str]:
    """Coverages outside of what was asked for."""
    return [
        f"{group}: {100 * records[group]['covered']:.1f} % covered"
        for group in ("all", "within the data")
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
        f"{100 * BOUNDS[0]:g} to {100 * BOUNDS[1]:g} % of the 95 % intervals cover it, over all curves and over those "
        "whose point lies within the data.",
        "",
        "| curves | n | covered | interval closed | wrongly called saturated | wrongly called still improving |",
        "|---|---:|---:|---:|---:|---:|",
        *rows,
        "",
        "How to read it. An open interval says *later than this*; with few checkpoints most are open, and the verdict "
        "is *cannot tell*.",
    ]
