"""When the monitor observes, against a clock that is turned by hand."""

from __future__ import annotations

import itertools

import pytest

from lccp_interp.monitor.pace import Pace
from lccp_interp.schema import LccpError


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def simulate(pace, clock, *, n_steps, step_s, observe_s, tokens_per_step=10):
    """Steps at which a training of so many seconds per step observes; what it tells on the way."""
    observed, told = [0], []
    pace.begin(step=0, tokens=0)
    clock.now += observe_s
    pace.observed(0, 0, seconds=observe_s)
    for step in range(1, n_steps + 1):
        clock.now += step_s
        if not pace.passed(step, step * tokens_per_step):
            continue
        if pace.affords(step):
            clock.now += observe_s
            pace.observed(step, step * tokens_per_step, seconds=observe_s)
            observed.append(step)
        elif message := pace.held_back(step, n_steps):
            told.append(message)
    return observed, told


def test_what_is_cheap_enough_comes_as_often_as_asked():
    clock = Clock()
    pace = Pace(every_steps=10, budget=0.01, clock=clock)
    observed, told = simulate(pace, clock, n_steps=50, step_s=1.0, observe_s=0.1)
    assert observed == [0, 10, 20, 30, 40, 50]
    assert not told
    assert pace.cost_share == pytest.approx(0.6 / 50.6)
    assert pace.interval_steps == 10


def test_what_is_too_dear_comes_at_multiples_and_keeps_to_the_budget():
    clock = Clock()
    pace = Pace(every_steps=10, budget=0.01, clock=clock)
    observed, told = simulate(pace, clock, n_steps=1000, step_s=1.0, observe_s=2.0)
    # 2 s are 1 % of 200: 198 s of training have to pass, and the marks lie 10 apart.
    assert observed == [0, 200, 400, 600, 800, 1000]
    assert told == [
        "an observation takes 2 s, 16.7 % of 10 steps; to keep to 1 % the next one waits until about step 198"
    ]
    intervals = [later - earlier for earlier, later in itertools.pairwise(observed)]
    assert all(2.0 / (2.0 + steps) <= 0.01 for steps in intervals)


def test_a_budget_that_cannot_be_met_is_told():
    clock = Clock()
    pace = Pace(every_steps=10, budget=0.01, clock=clock)
    observed, told = simulate(pace, clock, n_steps=60, step_s=1.0, observe_s=5.0)
    assert observed == [0]
    (message,) = told
    assert message.startswith(
        "the budget of 1 % cannot be met: an observation takes 5 s, and training ends before 495 s"
    )
    assert message.endswith("(take fewer or shorter cases, or a larger budget)")


def test_without_a_budget_the_clock_decides_nothing():
    clock = Clock()
    pace = Pace(every_steps=10, budget=None, clock=clock)
    observed, told = simulate(pace, clock, n_steps=30, step_s=0.001, observe_s=1000.0)
    assert observed == [0, 10, 20, 30]
    assert not told


def test_marks_of_tokens_are_crossed_not_hit():
    clock = Clock()
    pace = Pace(every_steps=None, every_tokens=25, budget=None, clock=clock)
    observed, _ = simulate(pace, clock, n_steps=10, step_s=1.0, observe_s=0.0)
    assert observed == [0, 3, 5, 8, 10]  # at 30, 50, 80 and 100 tokens


def test_a_resumed_training_goes_on_at_the_next_mark():
    pace = Pace(every_steps=10, budget=0.01, clock=Clock())
    pace.begin(step=17, tokens=170)
    assert [step for step in range(18, 41) if pace.passed(step, 10 * step)] == [20, 30, 40]
    # What an observation costs here is not known yet, so the first one is made.
    assert pace.affords(20)


@pytest.mark.parametrize("options", [{"every_steps": None}, {"every_steps": 0}, {"every_steps": 1, "every_tokens": 1}])
def test_one_interval_is_asked_for(options):
    with pytest.raises(LccpError, match="every so many steps or every so many tokens"):
        Pace(**options)


@pytest.mark.parametrize("budget", [0, -0.1, 1.5])
def test_a_budget_is_a_share(budget):
    with pytest.raises(LccpError, match=f"at most 1, got {budget}"):
        Pace(budget=budget)
