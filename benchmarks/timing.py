"""Times taken side by side: every round runs each pass once, every second round in reversed order (A B, B A, ...).

A ratio is taken within a round, where both passes meet the same machine; the median of the rounds is reported with
their smallest and largest. Drift over a round and over the whole measurement cancels that way, bursts do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Rounds = list[dict[str, float]]


def seconds(run: Callable[[], Any], sync: Callable[[], Any] = lambda: None) -> float:
    """Wall time of one call; `sync` waits for a device."""
    sync()
    start = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - start


def interleave(clocked: Mapping[str, Callable[[], float]], n_rounds: int) -> Rounds:
    """One dictionary of seconds per round; `clocked` runs one pass each and returns its seconds."""
    names = list(clocked)
    return [
        {name: clocked[name]() for name in (names if index % 2 == 0 else reversed(names))} for index in range(n_rounds)
    ]


def n_rounds_for(round_s: float, *, at_least: int, at_most: int, budget_s: float) -> int:
    """As many rounds as the budget pays, within limits.

    Example:
        >>> [n_rounds_for(round_s, at_least=7, at_most=25, budget_s=30) for round_s in (0.1, 2.0, 20.0)]
        [25, 15, 7]
    """
    return max(at_least, min(at_most, int(budget_s / round_s)))


def median(rounds: Rounds, name: str) -> float:
    """Median seconds of one pass."""
    return statistics.median(one[name] for one in rounds)


def ratio(rounds: Rounds, name: str, base: str) -> dict[str, float]:
    """How `name` compares with `base`, round by round: median, smallest and largest.

    Example:
        >>> ratio([{"a": 2.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 9.0, "b": 3.0}], "a", "b")
        {'median': 3.0, 'min': 2.0, 'max': 3.0}
    """
    ratios = [one[name] / one[base] for one in rounds]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def spread(values: Mapping[str, float], digits: int = 3) -> str:
    """`median (min..max)` of a ratio."""
    return f"**{values['median']:.{digits}f}** ({values['min']:.{digits}f}..{values['max']:.{digits}f})"
