"""Figures of learning dynamics: saturation, survival, comparison with the base draw what their tables say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import hypergeom
from synthetic import write_run

from lccp_interp.dynamics import RunTables, compare, saturation_table, survival
from lccp_interp.dynamics.fits import LOG_LINEAR, MODELS, curve_values, fit_curves
from lccp_interp.dynamics.ranking import jaccard_by_chance
from lccp_interp.figures import caption, interactive, paper
from lccp_interp.figures.cohorts import MEASURES, base_comparison, cohort
from lccp_interp.figures.saturation_panels import METRICS, SaturationPanel, SinceBaseAxis, saturation_panels
from lccp_interp.schema import CaseResult
from lccp_interp.store import PROBES_SCHEMA, Run, append_probes

NEW = ("saturation_curves", "cohort_survival", "reference_comparison")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> RunTables:
    return RunTables(write_run(tmp_path_factory.mktemp("dynamics") / "run", n_needles=5))


@pytest.fixture(scope="module")
def panels(tables: RunTables) -> dict[str, SaturationPanel]:
    return {panel.metric: panel for panel in saturation_panels(tables)}


def _silent(i: int, result: CaseResult) -> CaseResult:
    scores = {metric: np.zeros_like(values) for metric, values in result.scores.items()}
    return CaseResult(result.case_id, result.layers, scores, result.answer_loss_nats, result.greedy_ids)


# --- curves


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_curve_is_its_fit_at_the_checkpoints(higher_is_better: bool) -> None:
    tokens = np.array([0.0, 1, 2, 4, 8, 16, 32, 64])
    values = (-1 if higher_is_better else 1) * 5 * (1 + tokens / 3) ** -0.7 + 0.05 * np.cos(tokens)
    fits = fit_curves(tokens, values, np.ones(8), higher_is_better=higher_is_better)
    assert [fit.model for fit in fits] == list(MODELS)
    for fit in fits:
        drawn = curve_values(fit, tokens)
        # A log N + B says nothing about the base.
        assert math.isnan(drawn[0]) == (fit.model == LOG_LINEAR)
        np.testing.assert_allclose(drawn[1:], fit.fitted[1:], rtol=1e-6, atol=1e-9)
        assert curve_values(fit, tokens.reshape(2, 4)).shape == (2, 4)


# --- saturation


def test_panels_are_the_rows_of_the_table(tables: RunTables, panels: dict[str, SaturationPanel]) -> None:
    assert list(panels) == ["niah_score", "loss_nats", "n_retrieval_heads", "mean_initial_score"]
    table = saturation_table(tables.run, length=4096)
    for name, panel in panels.items():
        row = table.filter(pl.col("metric") == name, pl.col("depth_fraction").is_null()).row(0, named=True)
        assert (panel.verdict, panel.reason) == (row["verdict"], row["reason"])
        assert len(panel.values) == row["n"]
        assert (panel.values[0], panel.values[-1]) == (row["from"], row["to"])
        if row["model"] is not None:
            assert panel.fits[0][0] == row["model"]
            assert panel.fits[-1][0] == LOG_LINEAR
        if row["tokens_at_share"] is None:
            assert math.isnan(panel.point)
        else:
            assert panel.point == row["tokens_at_share"]
        if row["ci_low"] is None:
            assert panel.interval is None
            assert row["reason"].startswith(panel.note)
        else:
            assert panel.interval == (row["ci_low"], math.inf if row["ci_high"] is None else row["ci_high"])
        known = np.isfinite(panel.low)
        assert (panel.low[known] >= METRICS[name][1]).all()
        assert (panel.high[known] <= METRICS[name][2]).all()


def test_a_line_in_log_tokens_is_drawn_once(panels: dict[str, SaturationPanel]) -> None:
    chosen = {panel.fits[0][0]: len(panel.fits) for panel in panels.values() if panel.fits}
    assert len(chosen) >= 2  # else this run says nothing about the rule
    assert chosen.pop(LOG_LINEAR, 1) == 1
    assert set(chosen.values()) == {2}


def test_both_columns_hold_the_points(tables: RunTables, panels: dict[str, SaturationPanel]) -> None:
    axes = paper.saturation_curves(tables).axes
    assert len(axes) == 2 * len(panels)
    for row, panel in enumerate(panels.values()):
        for axis, is_log in zip(axes[2 * row : 2 * row + 2], (False, True), strict=True):
            later = next(line for line in axis.lines if line.get_marker() == "o")
            after = panel.tokens > 0
            np.testing.assert_allclose(np.asarray(later.get_ydata()), panel.values[after])
            expected = np.log10(panel.tokens[after]) if is_log else panel.tokens[after]
            np.testing.assert_allclose(np.asarray(later.get_xdata()), expected)
        assert axes[2 * row].get_title(loc="left").startswith(panel.verdict)
    figure = interactive.saturation_curves(tables)
    measured = [trace for trace in figure.data if trace.text is not None]
    assert len(measured) == 2 * len(panels)
    assert "tokens since the base<br>NIAH score (%)" in measured[0].text[1]
    said = " ".join(note.text for note in figure.layout.annotations)
    assert all(f"<b>{panel.verdict}</b>" in said for panel in panels.values())


def test_an_open_interval_is_shaded_to_the_end() -> None:
    axis = SinceBaseAxis(np.array([0.0, 10, 100]), is_log=False)
    assert axis.clip(math.inf) == axis.limits[1]
    assert axis.clip(0) == axis.limits[0]
    assert axis.clip(50) == 50


def test_the_base_stands_by_itself_on_a_logarithmic_axis() -> None:
    axis = SinceBaseAxis(np.array([0.0, 1e4, 1e6]), is_log=True)
    base, first, last = axis.at([0, 1e4, 1e6])
    assert (first, last) == (4.0, 6.0)
    assert axis.limits[0] < base < axis.gap < first
    assert math.isnan(axis.at([1])[0])  # behind the gap there is no place for tokens
    places, texts = axis.ticks
    assert (places[0], texts[0]) == (base, "0")
    assert texts[1:] == ["10K", "30K", "100K", "300K", "1M"]


@pytest.mark.parametrize("tokens", [[0.0], [0.0, 5.0], [0.0, 1e3, 1e12], []])
@pytest.mark.parametrize("is_log", [False, True])
def test_every_axis_has_room_and_few_ticks(tokens: list[float], is_log: bool) -> None:
    axis = SinceBaseAxis(np.array(tokens), is_log)
    places, texts = axis.ticks
    assert len(places) == len(texts) <= 8
    assert axis.limits[0] < axis.limits[1]
    assert len(set(texts)) == len(texts)


def test_corpus_perplexity_is_drawn_where_the_run_has_it(tables: RunTables, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tables.run.path, folder)
    listed = tables.run.checkpoints.select("name", "tokens_seen").rows()
    rows = [
        {
            "checkpoint": name, "tokens_seen": tokens, "benchmark": "corpus-ppl", "subset": corpus, "length": 2048,
            "metric": metric, "score": level - 0.1 * i, "n": 5, "stderr": 0.05,
        }
        for corpus, metric, level in (("code", "ppl", 9.0), ("books", "pooled_ppl", 7.0), ("books", "ppl", 5.0))
        for i, (name, tokens) in enumerate(listed)
    ]  # fmt: skip
    append_probes(folder, "corpora", pl.DataFrame(rows, schema=PROBES_SCHEMA))
    made = saturation_panels(RunTables(Run.open(folder)))
    assert [panel.metric for panel in made] == [*METRICS, "probe:corpus-ppl/books:ppl"]
    assert made[-1].label == "corpus perplexity"
    np.testing.assert_allclose(made[-1].values, 4.7 - 0.1 * np.arange(13))
    assert "Corpus perplexity: mean over documents of corpus-ppl/books." in caption(
        "saturation_curves", Run.open(folder)
    )


# --- survival


def test_the_cohort_is_the_survival_table(tables: RunTables) -> None:
    made = cohort(tables)
    expected = survival(tables.scores, sample=tables.sample)
    assert made.rows.select(expected.columns).equals(expected, null_equal=True)
    assert made.rows["tokens_since_base"].to_list() == list(range(0, 1_300_000, 100_000))
    assert made.n_initial == 5
    rows = made.rows
    assert (rows["n_from_base"] + rows["n_newborn"] == rows["n_retrieval_heads"]).all()
    assert rows["n_newborn"].to_list()[0] == 0
    assert rows["n_newborn"].to_list()[-1] > 0


def test_survival_and_shares_are_drawn(tables: RunTables) -> None:
    rows = cohort(tables).rows
    left, right = paper.cohort_survival(tables).axes
    np.testing.assert_allclose(np.asarray(left.lines[0].get_ydata()), 100 * rows["survival"].to_numpy())
    heights = np.array([bar.get_height() for bar in right.patches]).reshape(2, -1)
    np.testing.assert_allclose(heights.sum(axis=0), 100)
    np.testing.assert_allclose(heights[1], 100 * (rows["n_newborn"] / rows["n_retrieval_heads"]).to_numpy())
    assert [text.get_text() for text in right.texts] == [str(n) for n in rows["n_retrieval_heads"]]
    bars = [trace for trace in interactive.cohort_survival(tables).data if trace.type == "bar"]
    np.testing.assert_allclose(np.array([bar.y for bar in bars], dtype=float), heights)


def test_without_retrieval_heads_the_reason_stands_in_the_panels(tmp_path: Path) -> None:
    tables = RunTables(write_run(tmp_path / "run", lengths=(256,), n_needles=3, change=_silent))
    left, right = paper.cohort_survival(tables).axes
    assert "the base checkpoint pretrain-3.6M has no retrieval head" in left.texts[0].get_text().replace("\n", " ")
    assert "no retrieval head from the base on" in right.texts[0].get_text()
    said = " ".join(note.text for note in interactive.cohort_survival(tables).layout.annotations)
    assert "pretrain-3.6M has<br>no retrieval head" in said
    curves = {panel.metric: panel for panel in saturation_panels(tables)}
    assert not curves["mean_initial_score"].values.size
    shown = " ".join(axis.get_title(loc="left") for axis in paper.saturation_curves(tables).axes).replace("\n", " ")
    assert "the base has no retrieval head to follow" in shown


# --- comparison with the base


def test_the_comparison_is_the_table_of_the_base(tables: RunTables) -> None:
    rows, expected = base_comparison(tables).rows, compare(tables.run, length=4096)
    np.testing.assert_allclose(rows["overlap"], expected["overlap"] / expected["top_k"])
    for name in ("jaccard", "rbo", "spearman"):
        np.testing.assert_array_equal(rows[name], expected[name])
    grid = paper.reference_comparison(tables).axes
    for axis, name in zip(grid, MEASURES, strict=True):
        chance = next(line for line in axis.lines if line.is_dashed() and len(np.asarray(line.get_xdata())) == 16)
        measured = next(line for line in axis.lines if line.get_marker() == "o")
        np.testing.assert_array_equal(np.asarray(measured.get_ydata()), rows[name])
        np.testing.assert_array_equal(np.asarray(chance.get_ydata()), rows[f"{name}_by_chance"])
    lines = [trace for trace in interactive.reference_comparison(tables).data if trace.name == "against the base"]
    np.testing.assert_allclose(np.array([line.y for line in lines], dtype=float), rows.select(*MEASURES).to_numpy().T)


@pytest.mark.parametrize(("n_one", "n_other", "n_items"), [(3, 5, 12), (1, 9, 10), (4, 4, 4), (0, 3, 9), (10, 12, 16)])
def test_jaccard_by_chance_is_the_mean_over_random_sets(n_one: int, n_other: int, n_items: int) -> None:
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        one, other = (set(rng.choice(n_items, n, replace=False).tolist()) for n in (n_one, n_other))
        drawn.append(len(one & other) / len(one | other))
    assert jaccard_by_chance(n_one, n_other, n_items) == pytest.approx(np.mean(drawn), abs=0.01)
    assert hypergeom.pmf(range(n_one + 1), n_items, n_one, n_other).sum() == pytest.approx(1)


def test_one_checkpoint_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    tables = RunTables(write_run(tmp_path / "run", lengths=(256,), n_needles=2, only=[0]))
    made = base_comparison(tables)
    assert made.rows.is_empty()
    assert "there is one scored checkpoint only" in made.why_not
    assert "one scored checkpoint" in paper.reference_comparison(tables).axes[0].texts[0].get_text()
    assert "no checkpoint after the base" in paper.cohort_survival(tables).axes[0].texts[0].get_text()
    for name in NEW:
        assert caption(name, tables)
        json.dumps(getattr(interactive, name)(tables).to_plotly_json(), default=str)


# --- captions


def test_captions_say_what_was_measured(tables: RunTables) -> None:
    saturation = caption("saturation_curves", tables)
    assert "NIAH score, answer loss and heads at 4K tokens, 25 cases per checkpoint, teacher-forced" in saturation
    assert "5 pairs of needle and haystack" in saturation
    assert "documents" not in saturation
    alive = caption("cohort_survival", tables)
    assert "how many of the 5 initial heads (retrieval heads of the base checkpoint pretrain-3.6M" in alive
    assert "Metric retrieval at 4K tokens" in alive
    against = caption("reference_comparison", tables)
    assert "share of the top 8 of 32 heads" in against
    assert "mean over 25 cases" in against


def test_ties_are_told_where_the_base_has_less_than_all_with_itself(tables: RunTables, tmp_path: Path) -> None:
    assert "Ties count" not in caption("reference_comparison", tables)

    def few(i: int, result: CaseResult) -> CaseResult:
        scores = {metric: np.where(values < 0.05, 0, values) for metric, values in result.scores.items()}
        return CaseResult(result.case_id, result.layers, scores, result.answer_loss_nats, result.greedy_ids)

    tied = RunTables(write_run(tmp_path / "run", lengths=(256,), n_needles=3, change=few))
    own = base_comparison(tied).rows.filter(pl.col("checkpoint") == tied.base)["overlap"][0]
    assert own < 1
    assert f"the base has {100 * own:.0f} % with itself" in caption("reference_comparison", tied)
