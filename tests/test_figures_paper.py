"""Figures at print size: widths, sizes of type, nothing that overlaps or is cut off; tables as LaTeX, CSV, Markdown."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import re
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic import write_run
from test_figures_behaviour import add_probes, write_interference
from test_figures_causal import ablate

from lccp_interp.dynamics import RunTables
from lccp_interp.dynamics.published import PUBLISHED_AVERAGES, published_correlations
from lccp_interp.figures import FIGURES, FORMATS, TABLES, draw_figures, interactive, left_out, paper, style
from lccp_interp.figures.paper.canvas import SMALL_POINTS, text_inches
from lccp_interp.figures.paper.tables import TABLE_FORMATS, latex_text
from lccp_interp.schema import CaseResult, LccpError
from lccp_interp.store import Run

SERIES = (
    ("RULER", "qa", "sft pass@3"),
    ("RULER", "niah_multikey_3", "sft pass@3"),
    ("MRCR", "2needle", "sft best@3"),
    ("LongBio", "standard", "sft pass@3"),
    ("LongBio", "paraphrase", "sft pass@3"),
)
PROBES = [
    (i, benchmark, subset, 1024, metric, 0.1 + 0.03 * i + 0.05 * math.sin(i * (2 + k)), 16, 0.1)
    for k, (benchmark, subset, metric) in enumerate(SERIES)
    for i in range(3, 16)
]
CORPORA = [
    (i, "corpus-ppl", corpus, 2048, "ppl", level - 0.3 * math.log(i - 2), 8, 0.2)
    for corpus, level in (("books", 9.0), ("code", 30.0))
    for i in range(3, 16)
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> RunTables:
    """A run that has the numbers for everything."""
    folder = tmp_path_factory.mktemp("paper") / "run"
    write_run(folder, lengths=(256, 1024), n_needles=4)
    write_interference(folder / "interference")
    ablate(add_probes(folder, [*PROBES, *CORPORA]))
    return RunTables(Run.open(folder))


def _odd(kind: str, path: Path) -> RunTables:
    long = [f"organisation/some-very-long-model-name-13B@step_{i * 100_000}" for i in range(16)]

    def undefined(i: int, result: CaseResult) -> CaseResult:
        scores = {metric: values.copy() for metric, values in result.scores.items()}
        scores["retrieval"][1, :3] = np.nan
        return CaseResult(result.case_id, result.layers, scores, result.answer_loss_nats, (0, 0, 0))

    def many_metrics(i: int, result: CaseResult) -> CaseResult:
        rng = np.random.default_rng(i)
        scores = result.scores["retrieval"]
        made = {
            f"some_metric_{k}": (scores + rng.normal(0, 0.02 * k, scores.shape)).astype(np.float32) for k in range(13)
        }
        return CaseResult(
            result.case_id, result.layers, {"retrieval": scores, **made}, result.answer_loss_nats, result.greedy_ids
        )

    options = {
        "long names, nine lengths": {"names": long, "lengths": [2**k for k in range(8, 17)], "n_needles": 1},
        "undefined heads": {"change": undefined, "lengths": (256, 1024), "n_needles": 3},
        "fourteen metrics": {"change": many_metrics, "lengths": (256,), "n_needles": 3, "only": [15]},
        "one checkpoint": {"only": [0], "lengths": (256,), "n_needles": 1},
    }[kind]
    return RunTables(write_run(path, **options))  # type: ignore[arg-type]


ODD_FIGURES = {
    "long names, nine lengths": (
        "ppl_heatmaps",
        "niah_trajectory",
        "depth_curves",
        "head_heatmaps",
        "saturation_curves",
    ),
    "undefined heads": ("ppl_heatmaps", "head_heatmaps", "retrieval_heads", "head_lives", "metric_agreement"),
    "fourteen metrics": ("metric_agreement",),
}
"""What each odd run strains; other runs strain every figure."""


def _texts(figure: Figure) -> list[tuple[Text, np.ndarray]]:
    """Every text that is drawn, with its left, lower, right, upper edge in points."""
    figure.canvas.draw()
    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                hidden |= {tick.label1, tick.label2}
    drawn = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    per_point = figure.dpi / 72
    return [(text, text.get_window_extent().extents / per_point) for text in drawn if text not in hidden]


def _faults(figure: Figure) -> list[str]:
    """What a printer would send back."""
    width, height = figure.get_size_inches() * 72
    texts = _texts(figure)
    found = [
        f"{one.get_text()!r} overlaps {other.get_text()!r}"
        for (one, a), (other, b) in combinations(texts, 2)
        if min(a[2], b[2]) - max(a[0], b[0]) > 0.5 and min(a[3], b[3]) - max(a[1], b[1]) > 1.0
    ]
    found += [
        f"{text.get_text()!r} is cut off"
        for text, (left, lower, right, upper) in texts
        if left < -0.7 or lower < -0.7 or right > width + 0.7 or upper > height + 0.7
    ]
    return found + [
        f"{text.get_text()!r} is {text.get_fontsize()} points" for text, _ in texts if not 7 <= text.get_fontsize() <= 9
    ]


def test_faults_are_found() -> None:
    figure = Figure(figsize=(3, 1))
    for x, y, text, size in ((0.1, 0.5, "first words", 8), (0.2, 0.5, "second", 8), (0.9, 0.1, "far too long", 8)):
        figure.text(x, y, text, fontsize=size)
    figure.text(0.1, 0.9, "tiny", fontsize=5)
    assert _faults(figure) == [
        "'first words' overlaps 'second'", "'far too long' is cut off", "'tiny' is 5.0 points",
    ]  # fmt: skip


# --- one and two columns


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_room_in_either_width(name: str, columns: int, tables: RunTables) -> None:
    figure = getattr(paper, name)(tables, columns=columns)
    assert figure.get_figwidth() == {1: paper.SINGLE_COLUMN_INCHES, 2: paper.DOUBLE_COLUMN_INCHES}[columns]
    assert figure.get_figheight() < 9.5
    assert _faults(figure) == []


@pytest.mark.parametrize("kind", ["long names, nine lengths", "undefined heads", "fourteen metrics", "one checkpoint"])
def test_odd_runs_have_room(kind: str, tmp_path: Path) -> None:
    own = _odd(kind, tmp_path / "run")
    absent = {name for names in left_out(own).values() for name in names}
    strained = ODD_FIGURES.get(kind, tuple(FIGURES))
    for name in set(strained) - absent:
        for columns in (1, 2):
            assert _faults(getattr(paper, name)(own, columns=columns)) == [], (name, columns)


@pytest.mark.parametrize("columns", [1, 2])
def test_files_are_as_wide_as_the_column_and_hold_no_pictures(columns: int, tables: RunTables, tmp_path: Path) -> None:
    draw_figures(tables, tmp_path, formats=("pdf", "svg"), columns=columns)
    points = 72 * paper.page_width(columns)
    files = list(tmp_path.glob("fig*.*"))
    assert len(files) == 2 * 9
    for path in tmp_path.glob("*.pdf"):
        content = path.read_bytes()
        (width,) = re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+) ", content)
        assert float(width) == pytest.approx(points, abs=0.01), path.name
        assert b"/Subtype /Image" not in content, path.name
        assert b"/FontFile2" in content, path.name
        assert b"/Type3" not in content, path.name
    for path in tmp_path.glob("*.svg"):
        text = path.read_text()
        assert float(re.findall(r'<svg [^>]*width="([\d.]+)pt"', text)[0]) == pytest.approx(points, abs=0.01)
        assert "<image" not in text, path.name


def test_other_widths_are_refused(tables: RunTables, tmp_path: Path) -> None:
    for draw in (lambda: paper.head_lives(tables, columns=3), lambda: draw_figures(tables, tmp_path, columns=0)):
        with pytest.raises(LccpError, match="a figure spans 1 or 2 columns of a page, got"):
            draw()
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_measured_as_it_is_drawn() -> None:
    figure = Figure(figsize=(4, 1))
    with_rc = "03-pretrain 4.92M (base)"
    text = figure.text(0, 0.5, with_rc, fontsize=SMALL_POINTS, family="DejaVu Sans")
    assert text_inches(with_rc) == pytest.approx(text.get_window_extent().width / figure.dpi, rel=0.05)


# --- colours


def test_a_checkpoint_has_one_colour_in_every_figure(tables: RunTables) -> None:
    def colours(figure: Figure) -> dict[str, str]:
        handles = {line.get_label(): line.get_color() for axis in figure.axes for line in axis.lines}
        return {name.removesuffix(" (base)"): colour for name, colour in handles.items() if name[0] != "_"}

    depth = colours(paper.depth_curves(tables))
    interference = colours(paper.interference_curves(tables))
    shared = set(depth) & set(interference)
    assert len(shared) >= 2
    assert {name: depth[name] for name in shared} == {name: interference[name] for name in shared}
    names = tables.checkpoints["checkpoint"].to_list()
    expected = dict(zip(names, style.checkpoint_colours(tables.run, names), strict=True))
    assert depth == {name: expected[name] for name in depth}
    on_screen = {
        trace.name: trace.line.color for trace in interactive.depth_curves(tables).data if trace.text is not None
    }
    assert on_screen == depth
    assert len(set(expected.values())) == len(names)


def test_checkpoints_before_the_base_are_grey(tables: RunTables) -> None:
    names = tables.checkpoints["checkpoint"].to_list()
    for name, colour in zip(names, style.checkpoint_colours(tables.run, names), strict=True):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert (red == green == blue) == (names.index(name) < names.index(tables.base))
    assert len(set(style.checkpoint_colours(tables.run, ["a stranger", names[0]]))) == 2


# --- tables


def test_table_5_is_the_stability_with_the_published_below(tables: RunTables) -> None:
    made = paper.stability_table(tables)
    rows = tables.stability
    assert len(made.rows) == rows.height + 5
    for shown, row in zip(made.rows, rows.iter_rows(named=True), strict=False):
        assert shown[:2] == (row["from_checkpoint"], row["to_checkpoint"])
        assert float(shown[-1]) == pytest.approx(row["spearman"], abs=5e-5)
    assert made.rows[-5:][0] == ("0B", "20B", "24/30", "0.88", "0.7316")
    assert [title for _, title in made.groups] == ["this run", "published: Hunyuan-A13B, arXiv 2604.02650"]
    assert "Metric" not in made.caption
    assert "metric retrieval at 1K tokens, mean over 20 cases, teacher-forced" in made.caption


@pytest.mark.parametrize(
    ("name", "quantity", "number"),
    [
        ("niah_correlation_table", "r", 3), ("head_correlation_table", "r", 4), ("niah_p_table", "p", 6),
        ("head_p_table", "p", 7),
    ],
)  # fmt: skip
def test_tables_of_correlation_stand_beside_the_published(
    name: str, quantity: str, number: int, tables: RunTables
) -> None:
    made = getattr(paper, name)(tables)
    known = published_correlations().filter(pl.col(f"{quantity}_table") == number)
    assert TABLES[name].paper_figure == number
    (start, ours), (middle, theirs) = made.groups
    assert (start, ours, theirs) == (0, "this run", "published: Hunyuan-A13B, arXiv 2604.02650")
    mine = {row[0]: dict(zip(made.columns, row, strict=True)) for row in made.rows[:middle]}
    printed = {row[0]: dict(zip(made.columns, row, strict=True)) for row in made.rows[middle:]}
    for row in known.iter_rows(named=True):
        assert float(printed[row["paper_name"]][row["benchmark"]]) == row[f"published_{quantity}"]
        probe = {"RULER": "RULER/qa", "MRCR": "MRCR/2needle", "LongBio": "LongBio/mean"}[row["benchmark"]]
        found = tables.correlations.filter(
            pl.col("cheap") == row["cheap"], pl.col("transform") == "levels", pl.col("probe").str.starts_with(probe)
        )
        value = found["r" if quantity == "r" else "p_t"][0]
        assert float(mine[row["paper_name"]][row["benchmark"]]) == pytest.approx(value, abs=5e-5)
        if quantity == "r":
            assert float(printed[row["paper_name"]]["average"]) == PUBLISHED_AVERAGES[row["cheap"]]
    assert ("average" in made.columns) == (quantity == "r")
    assert "n = 13 checkpoints (published: 6)" in made.caption


def test_published_averages_are_those_of_the_rounded_numbers() -> None:
    means = published_correlations().group_by("cheap").agg(pl.col("published_r").mean())
    for cheap, mean in means.iter_rows():
        assert PUBLISHED_AVERAGES[cheap] == pytest.approx(mean, abs=2e-4)


def _cells(latex: str) -> list[list[str]]:
    body = latex.split("\\toprule")[1].split("\\bottomrule")[0]
    lines = [line.strip().removesuffix("\\\\").strip() for line in body.splitlines() if "&" in line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", line)] for line in lines]


def test_a_table_says_the_same_in_every_form(tables: RunTables, tmp_path: Path) -> None:
    made = paper.causal_check_table(tables)
    rows = [list(row) for row in made.rows]
    assert _cells(made.latex()) == [[latex_text(cell) for cell in row] for row in [list(made.columns), *rows]]
    assert list(csv.reader(io.StringIO(made.csv()))) == [list(made.columns), *rows]
    lines = made.markdown().splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2 : 2 + len(rows)]] == rows
    assert made.frame.rows() == [tuple(row) for row in rows]
    assert made.latex().count("{") == made.latex().count("}")
    for kind in TABLE_FORMATS:
        path = made.save(tmp_path / "deep" / f"table.{kind}")
        assert path.read_text().count("lccp-1.2M") >= 3
    with pytest.raises(LccpError, match=r"unknown format 'xls'.*tex, csv, md"):
        made.save(tmp_path / "table.xls")


def test_nothing_in_a_table_is_a_command() -> None:
    made = paper.PaperTable("t", "50 % of \\x{y}", ("a|b", "c"), (("x_1 & <b>", "~^#$"),), ((0, "g|h_i"),))
    latex = made.latex()
    assert r"x\_1 \& \textless{}b\textgreater{} & \textasciitilde{}\textasciicircum{}\#\$ \\" in latex
    assert r"50 \% of \textbackslash{}x\{y\}" in latex
    assert r"\multicolumn{2}{l}{g\textbar{}h\_i} \\" in latex
    assert "| x_1 & &lt;b> | ~^#$ |" in made.markdown()
    assert "| a\\|b | c |" in made.markdown()


def test_what_a_table_lacks_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256,), n_needles=3, only=[0])
    reasons = {name: why for why, names in left_out(run).items() for name in names}
    assert reasons["stability_table"].startswith("it has one scored checkpoint; `lccp score CHECKPOINT... --out RUN`")
    assert reasons["niah_p_table"] == "no results after fine-tuning; `lccp probe RUN --sft` adds them"
    whole = write_run(tmp_path / "whole", lengths=(256,), n_needles=3)
    other = add_probes(whole.path, [row for row in PROBES if row[1] == "MRCR"][:2])
    reasons = {name: why for why, names in left_out(other).items() for name in names}
    assert "probe_scores" not in reasons
    assert reasons["niah_correlation_table"].startswith("too few checkpoints have results for a correlation; `lccp")


# --- everything into a folder


def test_all_formats_are_written_at_once(tables: RunTables, tmp_path: Path) -> None:
    written = draw_figures(tables, tmp_path, formats=("html", "csv", "tex"))
    names = {path.name for path in written}
    assert {"table3_niah_correlations.csv", "table5_stability.tex", "agreement_table.csv"} <= names
    assert {"fig1_probe_scores.html", "causal_dates.html", "captions.txt"} <= names
    assert len(written) == len(FIGURES) + 2 * len(TABLES) + 1
    assert sorted(FORMATS) == sorted(("pdf", "svg", "png", "html", "tex", "csv", "md"))
    assert "table7_head_p_values: p of the two-sided t test" in written[-1].read_text()
    page = (tmp_path / "causal_dates.html").read_text()
    assert 'src="plotly.min.js"' in page
    assert "https://cdn" not in page
    assert len(page) < 1_000_000
    assert (tmp_path / "plotly.min.js").stat().st_size > 1_000_000


# --- pictures of figures for the screen


def _figure() -> go.Figure:
    return go.Figure(go.Scatter(y=[1, 2, 3]), layout={"height": 300})


def test_without_kaleido_one_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_kaleido(name: str, *rest: object) -> object:
        return None if name == "kaleido" else find(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(importlib.util, "find_spec", without_kaleido)
    with pytest.raises(LccpError, match=r"becomes png by kaleido, which is missing; install lccp_interp\[export\]"):
        interactive.save(_figure(), tmp_path / "figure.png")
    assert interactive.save(_figure(), tmp_path / "figure.html").stat().st_size > 500
    assert not (tmp_path / "figure.png").exists()


def test_without_a_browser_one_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_chrome(self: go.Figure, **options: object) -> bytes:
        raise RuntimeError("\n\nKaleido requires Google Chrome to be installed.\n")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setattr(go.Figure, "to_image", no_chrome)
    with pytest.raises(LccpError, match=r"draws pdf in a browser and found none; install Chromium \(apt-get install"):
        interactive.save(_figure(), tmp_path / "figure.pdf")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LccpError, match=r"unknown format 'gif'.*html, png, svg, pdf"):
        interactive.save(_figure(), tmp_path / "figure.gif")


@pytest.mark.browser
def test_a_screen_figure_becomes_a_picture(tables: RunTables, tmp_path: Path) -> None:
    if importlib.util.find_spec("kaleido") is None or shutil.which("chromium") is None:
        pytest.skip("needs kaleido (extra `export`) and Chromium")
    path = interactive.save(interactive.retrieval_heads(tables), tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_png_of_paper_figures_have_the_dots_of_their_width(tables: RunTables, tmp_path: Path) -> None:
    path = paper.save(paper.retrieval_heads(tables), tmp_path / "figure.png", dpi=100)
    content = path.read_bytes()
    assert int.from_bytes(content[16:20]) == 330
    assert content == paper.save(paper.retrieval_heads(tables), path, dpi=100).read_bytes()
