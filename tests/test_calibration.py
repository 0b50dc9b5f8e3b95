"""Calibration: the simulations are what they say, their bounds can fail, and the planted head is found."""

from __future__ import annotations

import doctest
import json
from importlib import import_module

import numpy as np
import planted
import polars as pl
import pytest

from calibration import births, cases, intervals, random_models, run
from lccp_interp.dynamics import census, events, lives, score_table
from lccp_interp.dynamics.births import trace_lives
from lccp_interp.dynamics.resampling import bootstrap_means, draw_resamples, expanded_level
from lccp_interp.sweep import score

# --- the made-up cases


def test_expected_scores_are_the_levels_and_steps_those_of_the_answer():
    level = np.repeat([[0.1], [0.5], [0.1], [0.5]], 200, axis=0) * np.ones(3)
    n_tokens = np.repeat([1, 1, 4, 4], 200)
    values = cases.draw_values(level, n_tokens, cases.Design(40, 8), np.random.default_rng(0))
    assert values.shape == (3, 40, 800)
    assert set(np.unique(values[:, :, n_tokens == 4])) == {0, 0.25, 0.5, 0.75, 1}
    assert set(np.unique(values[:, :, n_tokens == 1])) == {0, 1}
    means = values.mean(axis=(0, 1)).reshape(4, 200).mean(axis=1)
    assert means == pytest.approx([0.1, 0.5, 0.1, 0.5], abs=0.015)


def _alike(design: cases.Design) -> tuple[float, float]:
    """Correlation of a head's scores between two checkpoints, and between neighbours of one cluster."""
    values = cases.draw_values(np.full((400, 2), 0.4), np.full(400, 3), design, np.random.default_rng(1))
    first, second = values - values.mean()
    variance = (first**2).mean()
    clusters = design.clusters
    same = np.equal.outer(clusters, clusters) & ~np.eye(len(clusters), dtype=bool)
    products = np.einsum("ih,jh->ij", first, first) / first.shape[1]
    return float((first * second).mean() / variance), float(products[same].mean() / variance)


def test_cases_are_the_same_at_every_checkpoint_and_alike_within_clusters():
    fresh, kept = _alike(cases.Design(20, 4, memory=0.0)), _alike(cases.Design(20, 4, memory=0.5))
    assert abs(fresh[0]) < 0.03
    assert 0.3 < kept[0] < 0.5
    assert 0.1 < fresh[1] < 0.4
    assert abs(_alike(cases.Design(20, 4, cluster_share=0.0))[1]) < 0.03


# --- births


def test_counting_equals_the_public_tables():
    """The simulation calls the parts of `score_table` and `events` directly; on one series both must say the same."""
    design = cases.Design(20, 20)
    level = np.array([[0.0] * 5 + [0.4] * 5, [0.5] * 5 + [0.0] * 5, [0.1] * 10, [0.0] * 9 + [0.6]])
    values = cases.draw_values(level, np.array([3, 3, 1, 3]), design, np.random.default_rng(3))
    found, n_events = births.series(births.tables(values, design, 0))["now"], 0
    for head, (one, low, high) in enumerate(zip(*found, strict=True)):
        table = pl.DataFrame(
            {
                "checkpoint": [f"c{i}" for i in range(10)],
                "tokens_seen": range(10),
                "stage": "train",
                "layer": 0,
                "head": head,
                "score": one,
                "ci_low": low,
                "ci_high": high,
            }
        )
        own = trace_lives(one, low, high)
        flags = events(table)["provisional"].to_list()
        assert births.count(own) == (flags.count(False), flags.count(True))
        assert births.is_found(own, "birth", 5) == (lives(table)["born_tokens"].is_in([5, 6]).any())
        n_events += len(flags)
    assert n_events >= 3


def test_a_series_is_counted_from_its_beginning():
    design = cases.Design(12, 12)
    records = births.stationary(design, 4, seed=0)
    by = {(r["rule"], r["checkpoints"]) for r in records}
    assert by == {("now", n) for n in births.CHECKPOINTS} | {("before", 19)}
    assert all(r["steps"] == 4 * (r["checkpoints"] - 1) for r in records)


def _record(settled: int, found: int, n_clusters: int = 20, memory: float = 0.5) -> dict:
    stationary = [
        {"rule": rule, "checkpoints": n, "tokens": 3, "level": p, "steps": 100, "settled": s, "provisional": 0}
        for rule, n, s in [("now", 6, 0), ("now", 12, 0), ("now", 19, settled), ("before", 19, 9)]
        for p, s in [(0.1, s), (0.5, 0)]
    ]
    planted_cells = [
        {"rule": rule, "tokens": k, "level": p, "kind": event, "heads": 100, "found": found}
        for rule in births.RULES
        for k in births.TOKENS
        for p in births.PLANTED
        for event in ("birth", "death")
    ]
    cells = {"stationary": stationary, "planted": planted_cells}
    return {"cases": 20, "clusters": n_clusters, "memory": memory, "seed": 1, "heads": 100, **cells}


def test_bounds_can_fail():
    assert births.failures([_record(1, 95)]) == []
    (line,) = births.failures([_record(2, 95)])
    assert line == (
        "20 cases in 20 clusters, memory 0.5, 19 checkpoints: 2.00 % (p = 0.1, k = 3) false events per step"
    )
    assert births.failures([_record(2, 95, memory=0.0)]) == [], "one cell may, as long as the mean does not"
    assert births.failures([_record(3, 95, memory=0.0)]) == [
        "20 cases in 20 clusters, memory 0, 19 checkpoints: 1.50 % over all heads"
    ]
    lines = births.failures([_record(0, 94)])
    assert len(lines) == 16, "all but the two at 0.3 of a single token"
    assert lines[0] == "20 cases in 20 clusters, memory 0.5: birth at 0.5 with k = 1 found in 94.0 %"
    assert births.failures([_record(0, 0, n_clusters=4)]) == []
    bad = {"cases": 20, "clusters": 20, "tokens": 6, "level": 0.3, "n": 100, "expanded": 89, "plain": 99}
    assert intervals.failures([bad]) == ["20 cases in 20 clusters, p = 0.3, k = 6: covered 89.0 %"]
    head = {"family": "llama", "weight_std": 0.3, "length": 128, "retrieval_heads": 1, "events": 0}
    assert random_models.failures([head]) == ["llama, std 0.3, 128 tokens: 1 retrieval heads, 0 events"]


def test_wider_percentiles_for_few_units():
    assert expanded_level(0.95, 0) == expanded_level(0.95, 1) == 0.95
    levels = [expanded_level(0.95, n) for n in (3, 4, 8, 20, 100)]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] > 0.95
    # Four values: 95 % asks for all but the outermost resamples, so the bounds are those of the values themselves.
    _, low, high, _ = bootstrap_means(np.array([[0.0], [0.2], [0.6], [1.0]]), draw_resamples(np.arange(4), n_boot=9999))
    assert (low[0], high[0]) == pytest.approx((0.0, 1.0))


# --- the page and the script


def test_the_page_shows_the_numbers_that_are_kept():
    kept = run.read()
    assert set(kept) == set(run.PARTS), "run make calibrate"
    assert run.PAGE.read_text() == run.render(kept), "run make calibrate"


def test_an_unknown_part_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "birth"])
    assert f"no part 'birth'; known: {', '.join(run.PARTS)}" in capsys.readouterr().err


@pytest.mark.parametrize("name", run.PARTS)
def test_examples_of_the_parts_run(name):
    for module in (import_module(f"calibration.{name}"), cases):
        assert doctest.testmod(module).failed == 0


def test_a_quick_run_shows_tables_and_writes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(run, "PAGE", tmp_path / "page.md")
    run.main(["--only", "births,intervals", "--quick"])
    shown = capsys.readouterr().out
    assert "| 20 / 20 | 0.5 |" in shown
    assert "| 60 / 60 | 6 |" in shown
    assert not list(tmp_path.iterdir())


def test_records_of_other_parts_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(run, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(intervals, "DESIGNS", intervals.DESIGNS[:1])
    monkeypatch.setattr(intervals, "ROUNDS", 1)
    run.RESULTS.write_text(
        '{"births": ' + json.dumps(run.entry([_record(2, 100), _record(0, 100, memory=0.0)], 3)) + "}"
    )
    run.main(["--only", "intervals"])
    page = run.PAGE.read_text()
    assert page.index(f"## {births.TITLE}") < page.index(f"## {intervals.TITLE}")
    assert "Bounds that do not hold:\n\n- 20 cases in 20 clusters, memory 0.5, 19 checkpoints: 2.00 %" in page


# --- models


def test_random_weights_have_no_retrieval_heads():
    records = random_models.measure(lambda text: None, quick=True)
    assert random_models.failures(records) == []
    assert {record["models"] for record in records} == {2}
    assert all(0 < record["highest"] < 0.1 for record in records)
    assert all(record["above_threshold"] == 0 for record in records)


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory):
    """Seven checkpoints of the hand-built model; its head copies at the third, fourth and fifth only."""
    folder = tmp_path_factory.mktemp("planted")
    root = planted.save_trajectory(folder / "models", [False, False, True, True, True, False, False])
    return score(
        root,
        folder / "run",
        lengths=[128, 256],
        depths=[0, 50, 100],
        samples=2,
        needles=planted.NEEDLES,
        haystack=planted.filler(100),
        prompt=planted.PROMPT,
        device="cpu",
    )


@pytest.mark.parametrize("length", [128, 256])
def test_a_planted_copy_head_is_the_only_retrieval_head(planted_run, length):
    table = score_table(planted_run, length=length)
    able = table.filter(pl.col("checkpoint").is_in(["step-2", "step-3", "step-4"]))
    assert able.filter(layer=1, head=3)["score"].to_list() == [1.0] * 3
    assert able.filter(layer=1, head=3)["above_null"].all()
    others = able.filter((pl.col("layer") != 1) | (pl.col("head") != 3))
    assert (others.height, others["score"].max()) == (21, 0.0)
    for metric in ("wu", "copy", "needle_mass"):
        exact = score_table(planted_run, length=length, metric=metric).filter(checkpoint="step-3", layer=1, head=3)
        assert exact["score"][0] == pytest.approx(1.0, abs=1e-5)
    assert census(table)["n_retrieval_heads"].to_list() == [0, 0, 1, 1, 1, 0, 0]


def test_the_planted_head_answers_and_without_it_nothing_does(planted_run):
    right = planted_run.outcomes.group_by("checkpoint").agg(pl.col("greedy_exact").mean()).sort("checkpoint").collect()
    assert right["greedy_exact"].to_list() == [0, 0, 1, 1, 1, 0, 0]


def test_birth_and_death_of_the_planted_head(planted_run):
    found = lives(score_table(planted_run, length=256))
    columns = ["layer", "head", "born_checkpoint", "died_checkpoint", "peak_score", "provisional"]
    assert found.select(columns).rows() == [(*planted.COPY_HEAD, "step-2", "step-5", 1.0, False)]


# --- all of it


@pytest.mark.slow
@pytest.mark.parametrize("name", run.PARTS)
def test_every_bound_holds(name):
    module = run.part(name)
    assert module.failures(module.measure(lambda text: None)) == []
