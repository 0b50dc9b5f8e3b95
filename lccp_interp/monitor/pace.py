"""When to observe: every so many steps or tokens, but never so often that observing costs more than its share.

The cases of an observation stay the same over a run, or its curve would mean nothing; so where the share cannot be kept
the interval is stretched, to a multiple of the one asked for. An observation is due at a mark (a multiple of the
interval) once training has gone on long enough since the last one that the cost of that one, held against both, is
within the budget. Whoever wants the same steps in every repetition asks for no budget: the clock then decides nothing.

This module knows steps and seconds; it refuses to know models. It costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lccp_interp.schema import LccpError


@dataclass
class Pace:
    """The clock of a monitor.

    Attributes:
        every_steps: steps between observations, at least 1; None where tokens count.
        every_tokens: tokens between observations; None where steps count.
        budget: largest share of the time that observing may take, in (0, 1]; None for as often as asked.
        clock: seconds, as `time.perf_counter`.

    Example:
        >>> seconds = iter([0.0, 0.0, 1.0, 1.0, 50.0, 101.0])
        >>> pace = Pace(every_steps=10, budget=0.01, clock=lambda: next(seconds))
        >>> pace.begin(step=0, tokens=0)
        >>> pace.observed(0, 0, seconds=1.0)       # at 0 s
        >>> pace.passed(10, 0), pace.affords(10)   # at 1 s: a second of 2 would be half of the time
        (True, False)
        >>> pace.passed(15, 0), pace.passed(20, 0)
        (False, True)
    """

    every_steps: int | None = 100
    every_tokens: int | None = None
    budget: float | None = 0.01
    clock: Callable[[], float] = time.perf_counter
    spent: float = 0.0
    """Seconds spent observing."""
    last_step: int | None = None
    """Step of the last observation."""
    _began: float = 0.0
    _last_end: float = 0.0
    _last_cost: float = 0.0
    _mark: int = 0
    _interval: int | None = None
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        given = [each for each in (self.every_steps, self.every_tokens) if each is not None]
        if len(given) != 1 or given[0] < 1:
            raise LccpError(
                f"a monitor observes every so many steps or every so many tokens, one of the two and at least 1; got "
                f"every_steps={self.every_steps}, every_tokens={self.every_tokens}"
            )
        if self.budget is not None and not 0 < self.budget <= 1:
            raise LccpError(
                f"budget is the share of the time that observing may take, above 0 and at most 1, got {self.budget}; "
                "the usual one is 0.01, None observes as often as asked"
            )

    def begin(self, *, step: int, tokens: int) -> None:
        """Start the clock where training starts, or goes on."""
        self._began = self._last_end = self.clock()
        self._mark = self._marks(step, tokens)

    def passed(self, step: int, tokens: int) -> bool:
        """Whether a mark was reached or passed since the last call; all ranks of a training agree on it."""
        mark = self._marks(step, tokens)
        before, self._mark = self._mark, mark
        return mark > before

    def affords(self, step: int) -> bool:
        """Whether an observation like the last one would now keep to the budget."""
        if self.budget is None or self.last_step is None or self._last_cost == 0:
            return True
        trained = self.clock() - self._last_end
        return trained >= self._last_cost * (1 - self.budget) / self.budget

    def observed(self, step: int, tokens: int, *, seconds: float) -> None:
        """Note an observation that has just ended and took `seconds`."""
        self.spent += seconds
        self._interval = None if self.last_step is None else step - self.last_step
        self.last_step, self._last_cost, self._last_end = step, seconds, self.clock()
        self._mark = max(self._mark, self._marks(step, tokens))

    @property
    def interval_steps(self) -> int | None:
        """Steps between the last two observations."""
        return self._interval

    @property
    def cost_share(self) -> float:
        """Share of the time since `begin` that went into observing."""
        elapsed = self._last_end - self._began
        return self.spent / elapsed if elapsed > 0 else 1.0

    def held_back(self, step: int, last_step: int | None) -> str:
        """What to tell of a mark at which nothing is observed for lack of budget; empty where it was told before.

        Args:
            step: where training is.
            last_step: where it will end, if that is known.
        """
        assert self.budget is not None
        assert self.last_step is not None
        trained = self.clock() - self._last_end
        steps = max(1, step - self.last_step)
        per_step = trained / steps
        needed = self._last_cost * (1 - self.budget) / self.budget
        next_step = self.last_step + -(-needed // per_step) if per_step > 0 else step
        budget = f"{100 * self.budget:.3g} %"
        if last_step is not None and next_step > last_step and "never" not in self._told:
            self._told |= {"never", "stretched"}
            return (
                f"the budget of {budget} cannot be met: an observation takes {self._last_cost:.3g} s, and training "
                f"ends before {needed:.3g} s of it have gone by; only the last step will be observed (take fewer or "
                "shorter cases, or a larger budget)"
            )
        if "stretched" not in self._told:
            self._told.add("stretched")
            share = self._last_cost / (self._last_cost + trained)
            return (
                f"an observation takes {self._last_cost:.3g} s, {100 * share:.3g} % of {steps} steps; to keep to "
                f"{budget} the next one waits until about step {next_step:.0f}"
            )
        return ""

    def _marks(self, step: int, tokens: int) -> int:
        return step // self.every_steps if self.every_steps is not None else tokens // (self.every_tokens or 1)
