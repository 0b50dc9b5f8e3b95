"""Births and deaths: the rule by eye, planted events found, noise left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from synthetic import write_run

from lccp_interp.dynamics import RunTables, events, lives
from lccp_interp.dynamics.births import Life, trace_lives
from lccp_interp.schema import LccpError

NAN = float("nan")


def _lives(*score: float, half_width: float = 0.02, hold: int = 2) -> list[tuple[int | None, int | None, bool]]:
    """Lives of a head with these scores and symmetric intervals, as (born, died, provisional)."""
    array = np.array(score)
    found = trace_lives(array, array - half_width, array + half_width, hold=hold)
    return [(life.born, life.died, life.provisional) for life in found]


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ([0.0, 0.0, 0.3, 0.3, 0.3], [(2, None, False)]),  # a birth
        ([0.3, 0.3, 0.0, 0.0, 0.0], [(None, 2, False)]),  # alive from the start, dies
        ([0.3, 0.3, 0.3], [(None, None, False)]),  # alive throughout
        ([0.0, 0.0, 0.0], []),  # never
        ([0.0, 0.3, 0.0, 0.0], []),  # one lucky checkpoint is no birth
        ([0.3, 0.3, 0.0, 0.3, 0.3], [(None, None, False)]),  # one unlucky one no death
        ([0.0, 0.3, 0.3, 0.0, 0.0, 0.3, 0.3], [(1, 3, False), (5, None, False)]),  # rebirth
        ([0.0, 0.3, 0.3, 0.07, 0.07, 0.07], [(1, None, False)]),  # below up, not below down: lives on
        ([0.0, 0.0, 0.0, 0.3], [(3, None, True)]),  # only the last checkpoint says so
        ([0.3, 0.3, 0.3, 0.0], [(None, 3, True)]),
        ([0.09, 0.11, 0.12, 0.11], [(None, None, False)]),  # never visibly risen
        ([0.09, 0.11, 0.09, 0.11], []),  # hovers
        ([0.06, 0.09, 0.12, 0.2, 0.3], [(2, None, False)]),  # grows: visible from 0.12 (0.10 > 0.08)
        ([0.0, NAN, 0.3, 0.3], [(2, None, False)]),  # undefined decides nothing
        ([0.0, 0.3, NAN, 0.3, 0.3], [(3, None, False)]),
        ([NAN, NAN, NAN], []),
        ([0.3], [(None, None, True)]),
        ([], []),
    ],
)
def test_the_rule_by_eye(score: list[float], expected: list[tuple[int | None, int | None, bool]]) -> None:
    assert _lives(*score) == expected


def test_wide_intervals_give_no_events() -> None:
    assert _lives(0.0, 0.0, 0.3, 0.3, half_width=0.2) == []
    assert _lives(0.3, 0.3, 0.0, 0.0, half_width=0.2) == [(None, None, False)]
    score = np.array([0.0, 0.0, 0.5, 0.5])
    assert trace_lives(score, np.full(4, NAN), np.full(4, NAN)) == []


def test_intervals_count_where_checkpoints_are_compared() -> None:
    """A wide interval of its own does not keep a checkpoint from being high; that it overlaps the earlier ones does."""
    score = np.array([0.0, 0.0, 0.12, 0.12, 0.3])
    for reach, expected in ((0.09, [Life(2, None)]), (0.11, [Life(4, None, True)]), (0.295, [])):
        low = score - np.array([0.0, 0.0, reach, reach, reach])
        assert trace_lives(score, low, score + 0.01) == expected


def test_hold_asks_for_that_many_checkpoints() -> None:
    assert _lives(0.0, 0.3, 0.3, 0.0, 0.0, 0.0, hold=3) == []
    assert _lives(0.0, 0.3, 0.3, 0.3, 0.0, 0.0, 0.0, hold=3) == [(1, 4, False)]
    assert _lives(0.0, 0.3, hold=1) == [(1, None, False)]
    assert _lives(0.0, 0.0, 0.3, 0.3, hold=3) == [(2, None, True)]


def test_an_initial_life_that_ends_before_it_was_settled() -> None:
    # High from the second checkpoint on without having visibly risen, then visibly gone, then back.
    assert _lives(0.09, 0.13, 0.13, 0.0, 0.0, 0.3, 0.3) == [(None, 3, False), (5, None, False)]


def _noisy_runs(level: np.ndarray, n_cases: int, seed: int) -> list[list[Life]]:
    """Heads whose per-case values are drawn anew at every checkpoint around `level[head, checkpoint]`."""
    rng = np.random.default_rng(seed)
    found = []
    for head in level:
        values = rng.binomial(10, np.clip(head, 0, 1)[:, None], (len(head), n_cases)) / 10
        mean = values.mean(axis=1)
        error = 1.96 * values.std(axis=1, ddof=1) / np.sqrt(n_cases)
        found.append(trace_lives(mean, mean - error, mean + error))
    return found


@pytest.mark.parametrize("n_cases", [10, 20, 50])
def test_noise_around_the_threshold_gives_hardly_any_event(n_cases: int) -> None:
    stationary = np.repeat(np.linspace(0.0, 0.2, 300)[:, None], 17, axis=1)
    n_events = sum(
        (life.born is not None) + (life.died is not None)
        for lives_of_head in _noisy_runs(stationary, n_cases, seed=n_cases)
        for life in lives_of_head
        if not life.provisional
    )
    # 300 heads x 17 checkpoints, drawn anew each time: harsher than a run, whose checkpoints share their cases.
    assert n_events <= 0.04 * len(stationary)


def test_planted_births_are_found_in_noise() -> None:
    planted = np.zeros((200, 17))
    planted[:, 8:] = 0.3
    found = _noisy_runs(planted + 0.01, 20, seed=1)
    exact = sum(lives_of_head == [Life(8, None)] for lives_of_head in found)
    assert exact >= 195


def test_planted_lives_of_a_whole_run(tmp_path: Path) -> None:
    tables = RunTables(write_run(tmp_path / "run", lengths=(256,)))
    settled = tables.lives.filter(~pl.col("provisional"))
    assert settled.select("layer", "head", "n_life", "born_checkpoint", "died_checkpoint").rows() == [
        (0, 3, 1, None, "lccp-0.6M"),
        (2, 5, 1, None, "lccp-0.2M"),
        (2, 1, 1, "pretrain-2.5M", None),
        (3, 4, 1, "pretrain-3.6M", None),
        (1, 6, 1, "lccp-0.4M", None),
        (3, 0, 1, "lccp-0.7M", None),
        (2, 5, 2, "lccp-0.9M", None),
    ]
    strongest = settled.filter(layer=3, head=4).row(0, named=True)
    assert strongest["born_tokens"] == 3_600_000
    assert strongest["peak_score"] == pytest.approx(0.9, abs=0.05)
    assert strongest["peak_tokens"] >= 4_500_000
    assert settled.filter(layer=0, head=3)["final_score"][0] == pytest.approx(0.01, abs=0.01)
    happened = tables.events.filter(~pl.col("provisional"))
    assert happened.select("kind", "layer", "head", "after_tokens", "tokens_seen", "stage").rows() == [
        ("birth", 2, 1, 1_500_000, 2_500_000, "pretrain"),
        ("birth", 3, 4, 2_500_000, 3_600_000, "pretrain"),
        ("death", 2, 5, 3_700_000, 3_800_000, "lccp"),
        ("birth", 1, 6, 3_900_000, 4_000_000, "lccp"),
        ("death", 0, 3, 4_100_000, 4_200_000, "lccp"),
        ("birth", 3, 0, 4_200_000, 4_300_000, "lccp"),
        ("birth", 2, 5, 4_400_000, 4_500_000, "lccp"),
    ]


def _table(score: list[float], **columns: object) -> pl.DataFrame:
    n = len(score)
    frame = pl.DataFrame(
        {
            "checkpoint": [f"c{i}" for i in range(n)],
            "tokens_seen": [10 * i for i in range(n)],
            "stage": ["train"] * n,
            "layer": [0] * n,
            "head": [0] * n,
            "score": score,
            "ci_low": [value - 0.01 for value in score],
            "ci_high": [value + 0.01 for value in score],
        }
    )
    return frame.with_columns(**{name: pl.Series(name, values) for name, values in columns.items()})  # type: ignore[arg-type]


def test_order_of_rows_does_not_matter() -> None:
    table = _table([0.0, 0.2, 0.3, 0.0, 0.0])
    assert lives(table).equals(lives(table.sample(fraction=1, shuffle=True, seed=1)))
    assert events(table)["kind"].to_list() == ["birth", "death"]


def test_missing_rows_are_between() -> None:
    table = _table([0.0, 0.3, 0.3, 0.3])
    other = _table([0.0, 0.0, 0.0, 0.0]).with_columns(head=pl.lit(1, pl.Int64))
    assert lives(pl.concat([table.filter(pl.col("checkpoint") != "c2"), other]))["born_checkpoint"].to_list() == ["c3"]


def test_only_the_last_event_of_a_life_is_provisional() -> None:
    table = _table([0.0, 0.3, 0.3, 0.0])
    assert lives(table)["provisional"].to_list() == [True]
    assert events(table).select("kind", "provisional").rows() == [("birth", False), ("death", True)]


def test_events_and_peaks_carry_their_intervals() -> None:
    table = _table([0.0, 0.3, 0.5, 0.0, 0.0])
    assert lives(table).select("peak_score", "peak_low", "peak_high").row(0) == pytest.approx((0.5, 0.49, 0.51))
    found = events(table).select("score", "ci_low", "ci_high").rows()
    assert found == [pytest.approx((0.3, 0.29, 0.31)), pytest.approx((0.0, -0.01, 0.01))]


def test_no_lives_keep_the_columns() -> None:
    nothing = _table([0.0, 0.0])
    assert lives(nothing).is_empty()
    assert {"n_life", "provisional"} <= set(lives(nothing).columns)
    assert events(nothing).is_empty()


def test_errors() -> None:
    with pytest.raises(LccpError, match=r"down-threshold must not lie above the up-threshold, got down=0\.2, up=0\.1"):
        lives(_table([0.0]), down=0.2)
    with pytest.raises(LccpError, match="hold must be at least 1 checkpoint, got 0"):
        lives(_table([0.0]), hold=0)
    with pytest.raises(LccpError, match="read at one length, the table holds 256, 512"):
        lives(_table([0.0, 0.1], length=[256, 512]))
    with pytest.raises(LccpError, match=r"no two alike, the table has 'c1' at 10 tokens; 'c2' at 10 tokens; tell the"):
        lives(_table([0.0, 0.3, 0.3], tokens_seen=[0, 10, 10]))
    with pytest.raises(LccpError, match=r"one token count per checkpoint .* has 'c0' at 0 tokens; 'c0' at 10 tokens"):
        events(_table([0.0, 0.3], checkpoint=["c0", "c0"]))
    with pytest.raises(LccpError, match="the table has several for 2, the first being head 0-0 at 'c0'; filter it"):
        lives(pl.concat([_table([0.0, 0.3]), _table([0.1, 0.3])]))


def test_a_head_that_is_not_above_its_null_is_not_born():
    score = np.array([0.0, 0.0, 0.3, 0.4, 0.4, 0.4, 0.0, 0.0])
    low, high = score - 0.02, score + 0.02
    assert trace_lives(score, low, high) == [Life(2, 6, False)]
    above = np.array([True, True, False, False, True, True, True, True])
    assert trace_lives(score, low, high, may_retrieve=above) == [Life(4, 6, False)]
    assert trace_lives(score, low, high, may_retrieve=np.zeros(8, bool)) == []
    table = pl.DataFrame(
        {
            "checkpoint": list("abcdefgh"), "tokens_seen": range(8), "stage": ["train"] * 8, "layer": [0] * 8,
            "head": [0] * 8, "score": score, "ci_low": low, "ci_high": high, "above_null": above,
        }
    )  # fmt: skip
    assert lives(table)["born_checkpoint"].to_list() == ["e"]
    assert lives(table.with_columns(above_null=pl.lit(None, pl.Boolean)))["born_checkpoint"].to_list() == ["c"]
