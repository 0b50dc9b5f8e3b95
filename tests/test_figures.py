"""Figures without pixels: they draw what the tables say, in vectors, for odd runs too, and leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
from synthetic import PLANTED, checkpoints, write_run

from lccp_interp.dynamics import RunTables
from lccp_interp.figures import FIGURES, TABLES, caption, draw_figures, interactive, left_out, paper, style
from lccp_interp.figures.life_rows import life_rows
from lccp_interp.schema import CaseResult, LccpError
from lccp_interp.store import Run

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> RunTables:
    return RunTables(write_run(tmp_path_factory.mktemp("figures") / "run", n_needles=4))


@pytest.fixture(scope="module")
def drawn(tables: RunTables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw_figures(tables, folder, formats=("pdf", "svg"))
    return folder


def _odd_run(kind: str, path: Path) -> Run:
    """Runs that strain the figures."""
    if kind == "one checkpoint":
        return write_run(path, lengths=(256,), n_needles=1, only=[0])
    if kind == "two checkpoints":
        return write_run(path, lengths=(256,), n_needles=1, only=[0, 15])
    if kind == "evil names":
        return write_run(path, lengths=(256,), n_needles=2, names=[f"{EVIL} $x_{i}$ & \"'" for i in range(16)])
    change = {"nothing retrieves": 0.0, "undefined scores": np.nan}[kind]

    def overwrite(i: int, result: CaseResult) -> CaseResult:
        scores = {metric: values.copy() for metric, values in result.scores.items()}
        if kind == "nothing retrieves":
            scores = {metric: np.zeros_like(values) for metric, values in scores.items()}
        else:
            scores["retrieval"][1, :3] = change
        return CaseResult(result.case_id, result.layers, scores, result.answer_loss_nats, (0, 0, 0))

    return write_run(path, lengths=(256, 1024), n_needles=3, change=overwrite, only=range(2, 9))


ODD = ("one checkpoint", "two checkpoints", "evil names", "nothing retrieves", "undefined scores")


def test_both_kinds_have_every_registered_figure() -> None:
    for name in FIGURES:
        assert callable(getattr(paper, name))
        assert callable(getattr(interactive, name))
    numbers = {name: entry.paper_figure for name, entry in FIGURES.items()}
    assert numbers == {
        "probe_scores": 1,
        "ppl_heatmaps": 2,
        "niah_trajectory": 3,
        "head_heatmaps": 4,
        "retrieval_heads": 5,
        "corpus_ppl": 6,
        "depth_curves": 7,
        "interference_heatmaps": 8,
        "interference_curves": 9,
        "saturation_curves": None,
        "head_lives": None,
        "cohort_survival": None,
        "reference_comparison": None,
        "causal_check": None,
        "causal_dates": None,
        "metric_agreement": None,
    }
    for name in TABLES:
        assert callable(getattr(paper, name))
    assert [entry.paper_figure for entry in TABLES.values() if entry.paper_figure] == [3, 4, 5, 6, 7]


def test_draw_figures_writes_what_it_says(tables: RunTables, tmp_path: Path) -> None:
    written = draw_figures(tables, tmp_path / "new" / "folder", formats=("png",))
    assert [path.name for path in written] == [
        *("fig2_ppl_heatmaps.png", "fig3_niah_trajectory.png", "fig4_head_heatmaps.png", "fig5_retrieval_heads.png"),
        *("fig7_depth_curves.png", "saturation_curves.png", "head_lives.png", "cohort_survival.png"),
        *("reference_comparison.png", "metric_agreement.png", "captions.txt"),
    ]
    assert all(path.stat().st_size > 500 for path in written)
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {path.name for path in written}


def test_paper_figures_are_vectors_with_embedded_fonts(drawn: Path) -> None:
    for path in drawn.glob("*.pdf"):
        content = path.read_bytes()
        assert b"/Subtype /Image" not in content, path.name
        assert b"/FontFile2" in content, path.name
        assert b"/Type3" not in content, path.name
    for path in drawn.glob("*.svg"):
        assert "<image" not in path.read_text(), path.name


def test_drawing_twice_gives_the_same_bytes(tables: RunTables, drawn: Path, tmp_path: Path) -> None:
    draw_figures(tables, tmp_path, formats=("pdf", "svg"))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (drawn / path.name).read_bytes(), path.name


def test_drawing_leaves_no_global_state(tables: RunTables) -> None:
    before = dict(mpl.rcParams)
    paper.head_lives(tables)
    assert dict(mpl.rcParams) == before
    code = "import sys, lccp_interp.figures.paper; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ODD)
def test_odd_runs_are_drawn(kind: str, tmp_path: Path) -> None:
    tables = RunTables(_odd_run(kind, tmp_path / "run"))
    draw_figures(tables, tmp_path / "out", formats=("svg",))
    absent = {name for names in left_out(tables).values() for name in names}
    for name in set(FIGURES) - absent:
        assert EVIL not in json.dumps(getattr(interactive, name)(tables).to_dict(), default=str)
        assert caption(name, tables)


def test_undefined_cells_are_named_not_hidden(tmp_path: Path) -> None:
    tables = RunTables(_odd_run("undefined scores", tmp_path / "run"))
    panels = min(style.MAX_PANELS, tables.scored.height)
    figure = paper.head_heatmaps(tables)
    hatched = [patch for axis in figure.axes for patch in axis.patches if patch.get_hatch()]
    assert len(hatched) == 3 * panels
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == ["n/a (undefined)"]
    assert sum(note.text == "n/a" for note in interactive.head_heatmaps(tables).layout.annotations) == 3 * panels


def test_heat_maps_show_the_table(tables: RunTables) -> None:
    panels = style.select_panels(tables.scored, tables.base)
    assert panels[0] == "pretrain-3.6M"
    assert panels[-1] == "lccp-1.2M"
    figure = interactive.head_heatmaps(tables)
    for panel, trace in zip(panels, figure.data, strict=True):
        scores = tables.scores.filter(checkpoint=panel).sort("layer", "head")["score"].to_numpy().reshape(4, 8)
        np.testing.assert_allclose(np.array(trace.z, dtype=float), scores)
    drawn = paper.head_heatmaps(tables).axes[0].collections[0].get_array()
    first = tables.scores.filter(checkpoint=panels[0]).sort("layer", "head")["score"].to_numpy().reshape(4, 8)
    np.testing.assert_allclose(np.asarray(drawn).reshape(4, 8), first)


def test_ppl_heat_maps_are_indexed_by_depth_and_length(tables: RunTables) -> None:
    trace = interactive.ppl_heatmaps(tables).data[0]
    rows = tables.by_depth.filter(checkpoint=tables.base)
    cell = rows.filter(pl.col("length") == 4096, pl.col("depth_fraction") == 0.25)["answer_ppl"][0]
    assert trace.z[1][2] == pytest.approx(style.PplScale.at(cell))
    assert "4K tokens, depth 25 %" in trace.text[1][2]


def test_trajectory_lines_are_the_outcomes(tables: RunTables) -> None:
    lines = [line for line in paper.niah_trajectory(tables).axes[0].lines if len(line.get_xdata()) == 16]
    for length, line in zip(tables.lengths, lines, strict=True):
        expected = tables.by_length.filter(pl.col("length") == length)["niah_score"]
        np.testing.assert_allclose(np.asarray(line.get_ydata()), expected)


def test_life_rows_hold_every_life_and_event(tables: RunTables) -> None:
    rows, hidden = life_rows(tables)
    assert hidden == 0
    assert {(row.layer, row.head) for row in rows} <= set(PLANTED)
    assert sum(len(row.segments) for row in rows) == tables.lives.height
    assert sum(len(row.marks) for row in rows) == tables.events.height
    assert rows[0].name == "0-3"
    assert rows[-1].name == "3-0"
    few, hidden = life_rows(tables, max_rows=2)
    assert (len(few), hidden) == (2, len(rows) - 2)
    assert {row.name for row in few} == {"2-1", "3-4"}


def test_colours_of_lives_say_where_they_began(tables: RunTables) -> None:
    kinds = {row.name: [segment.kind for segment in row.segments] for row in life_rows(tables)[0]}
    assert kinds["0-3"] == ["from_start"]
    assert kinds["2-5"] == ["from_start", "newborn"]
    assert kinds["3-4"] == ["from_base"]
    assert kinds["1-6"] == ["newborn"]


def test_captions_say_what_was_measured(tables: RunTables) -> None:
    text = caption("niah_trajectory", tables)
    assert "60 cases per checkpoint: lengths 256, 1K, 4K tokens, 5 depths, 4 pairs of needle and haystack" in text
    assert "teacher-forced" in text
    assert "95 % bootstrap intervals over 4 pairs" in text
    assert "Metric retrieval at 4K tokens" in caption("head_heatmaps", tables)
    assert "mean over 20 cases" in caption("head_lives", tables)


def test_another_length_is_another_figure(tables: RunTables, tmp_path: Path) -> None:
    written = draw_figures(tables.run, tmp_path, formats=("svg",), length=256)
    assert "Metric retrieval at 256 tokens" in written[-1].read_text()


def test_errors(tables: RunTables, tmp_path: Path) -> None:
    with pytest.raises(LccpError, match=r"unknown format 'jpg'.*pdf, svg, png"):
        draw_figures(tables, tmp_path, formats=("jpg",))
    with pytest.raises(LccpError, match=r"unknown figure 'head_live'.*did you mean 'head_lives'"):
        caption("head_live", tables)
    with pytest.raises(LccpError, match=r"no cases of 999 tokens; it has 256, 1024, 4096"):
        draw_figures(tables.run, tmp_path, length=999)
    with pytest.raises(LccpError, match="panels must be at least 2"):
        style.select_panels(tables.checkpoints, tables.base, 1)


# --- the axes


def _trajectory(pretrain: list[int], lccp: list[int]) -> pl.DataFrame:
    tokens = [*pretrain, *lccp]
    return pl.DataFrame(
        {
            "checkpoint": [f"c{i}" for i in range(len(tokens))],
            "tokens_seen": tokens,
            "stage": ["pretrain"] * len(pretrain) + ["lccp"] * len(lccp),
        }
    )


def test_token_axis_is_linear_where_the_last_stage_has_room() -> None:
    axis = style.TokenAxis.of(_trajectory([0, 50], [60, 100]), "c1")
    assert axis.at([0, 25, 50, 100]) == [0.0, 0.25, 0.5, 1.0]
    assert axis.label == "training tokens"


def test_token_axis_stretches_a_short_last_stage_and_says_so() -> None:
    frame = _trajectory([0, 20_000_000_000_000], [20_050_000_000_000, 20_200_000_000_000])
    axis = style.TokenAxis.of(frame, "c1")
    base, middle, end = axis.at([20_000_000_000_000, 20_100_000_000_000, 20_200_000_000_000])
    assert (base, end) == (pytest.approx(0.3), 1.0)
    assert middle == pytest.approx(0.65)
    assert "LCCP stretched" in axis.label
    assert "20T" in axis.tick_text
    assert "+100B" in axis.tick_text
    assert list(axis.tick_at) == sorted(axis.tick_at)


def test_synthetic_checkpoints_use_the_stretched_axis() -> None:
    listed = checkpoints()
    frame = _trajectory([c.tokens_seen for c in listed[:4]], [c.tokens_seen for c in listed[4:]])
    places = style.TokenAxis.of(frame, "c3").at(frame["tokens_seen"])
    assert places == sorted(places)
    assert min(b - a for a, b in pairwise(places)) > 0.05


def test_perplexity_axis_separates_values_near_one() -> None:
    at = style.PplScale.at
    assert at(1.1) - at(1.01) > 0.9 * (at(1.01) - at(1.001))
    assert at(1.0) == pytest.approx(-4.0)
    assert np.isnan(at(float("nan")))
    assert np.isnan(at(float("inf")))
    for low, high in ((1.0, 1e7), (1.001, 1.05), (1.53, 1.57), (2.0, 2.0), (1.2, 40.0)):
        places, texts = style.PplScale.of(np.array([low, high])).ticks
        assert len(places) == len(texts) <= 10
        assert len(texts) == len(set(texts))
    assert len(style.PplScale.of(np.array([1.53, 1.57])).ticks[0]) >= 2
