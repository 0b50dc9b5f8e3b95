"""Which worker does which unit: nothing lost, nothing done twice at once, few loads; workers that die in any order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lccp_interp.sweep.schedule import TRIES, Schedule, Unit


def every(units):
    return {Unit(name, shard) for name, shards in units.items() for shard in shards}


def sizes(most):
    return st.dictionaries(st.sampled_from("abcd"), st.integers(0, most).map(lambda n: list(range(n))), min_size=1)


@given(units=sizes(6), n_workers=st.integers(1, 5), choices=st.randoms(use_true_random=False), load=st.floats(0, 9))
def test_whatever_dies_every_unit_is_done_once_or_given_up_by_name(units, n_workers, choices, load):
    schedule, done, next_worker = Schedule(units), [], n_workers
    workers, losses = set(range(n_workers)), {}
    while schedule.is_open:
        for worker in sorted(workers - set(schedule.running)):
            schedule.next(worker, load_units=load)
        running = list(schedule.running.values())
        assert len(running) == len(set(running)), "a unit in two places"
        assert running, "work waits, workers are idle, and nobody begins"
        worker = choices.choice(sorted(schedule.running))
        unit = schedule.running[worker]
        what = choices.choice(["finish", "finish", "lose"])
        if what == "finish":
            assert schedule.finish(worker) == unit
            done.append(unit)
        else:
            losses[unit] = losses.get(unit, 0) + 1
            workers.remove(worker)
            workers.add(next_worker)
            next_worker += 1
            assert schedule.lose(worker, "killed") == (
                losses[unit] < TRIES and unit.checkpoint not in schedule.failures
            )
    assert len(done) == len(set(done))
    left = every(units) - set(done)
    assert {unit.checkpoint for unit in left} <= set(schedule.failures)
    assert set(schedule.failures) <= {unit.checkpoint for unit, n in losses.items() if n >= TRIES}


@given(units=sizes(8), n_workers=st.integers(1, 5))
def test_undisturbed_workers_of_one_pace_load_few_checkpoints(units, n_workers):
    schedule = Schedule(units)
    loads, before = 0, dict.fromkeys(range(n_workers))
    while schedule.is_open:
        for worker in range(n_workers):
            unit = schedule.next(worker, load_units=0)
            if unit is not None:
                loads += unit.checkpoint != before[worker]
                before[worker] = unit.checkpoint
        for worker in list(schedule.running):
            schedule.finish(worker)
    n_checkpoints = sum(bool(shards) for shards in units.values())
    # One load each, and as many again as workers came to help at the end.
    assert n_checkpoints <= loads <= n_checkpoints + (n_workers - 1) * max(1, n_checkpoints)


def test_a_worker_stays_with_what_it_has_loaded():
    schedule = Schedule({"a": [0, 1], "b": [0, 1], "c": [0]})
    assert schedule.next(1) == ("a", 0)
    assert schedule.next(2) == ("b", 0)
    for worker, following in ((1, ("a", 1)), (2, ("b", 1)), (1, ("c", 0))):
        schedule.finish(worker)
        assert schedule.next(worker) == following
    schedule.finish(2)
    assert schedule.next(2) is None
    assert schedule.n_waiting == 0
    assert schedule.is_open


def test_others_are_joined_only_where_loading_pays():
    schedule = Schedule({"a": [0, 1, 2, 3]})
    schedule.next(1)
    assert schedule.next(2, load_units=3.5) is None
    assert schedule.next(2, load_units=3) == ("a", 1)
    # Two waiting units for two workers: a third would have one to itself.
    assert schedule.next(3, load_units=1.5) is None
    schedule.lose(1, "killed")
    schedule.lose(2, "killed")
    # Nobody is left there: whatever loading costs.
    assert schedule.next(3, load_units=99) == ("a", 1)


def test_a_checkpoint_that_fails_is_given_up_and_named():
    schedule = Schedule({"a": [0, 1, 2], "b": [0]})
    for worker in (1, 2, 3):
        schedule.next(worker, load_units=0)
    assert schedule.running[3] == ("a", 1)
    assert schedule.fail(1, "cannot be loaded") == ("a", 0)
    assert schedule.failures == {"a": "cannot be loaded"}
    assert schedule.next(1) is None
    # What another does of it may finish; lost, it is not begun again.
    assert not schedule.lose(3, "killed")
    schedule.finish(2)
    assert not schedule.is_open


def test_a_unit_that_kills_its_workers_is_named():
    schedule = Schedule({"a": [0, 7]}, tries=2)
    schedule.next(1)
    assert schedule.lose(1, "killed by signal 9")
    schedule.next(2)
    assert schedule.tries(Unit("a", 0)) == 1
    assert not schedule.lose(2, "killed by signal 11")
    assert schedule.failures == {"a": "shard 0: 2 workers were lost with it, the last one: killed by signal 11"}


def test_a_busy_worker_is_given_nothing():
    schedule = Schedule({"a": [0, 1]})
    schedule.next(1)
    with pytest.raises(AssertionError, match="worker 1 still does a/0"):
        schedule.next(1)
