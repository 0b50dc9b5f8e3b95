"""Figures of behaviour: results after fine-tuning, corpus perplexity, interference; and a run without them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from synthetic import checkpoints, results, write_run

from lccp_interp.dynamics import RunTables, interference_table, saturation_table
from lccp_interp.dynamics.resampling import share_interval
from lccp_interp.figures import FIGURES, caption, draw_figures, interactive, left_out, paper
from lccp_interp.figures.corpus_panels import corpus_panels
from lccp_interp.figures.interference_panels import InterferenceAxis
from lccp_interp.figures.probe_panels import ProbePanel, best_metric, probe_axis, probe_panels
from lccp_interp.schema import Case, LccpError, Span
from lccp_interp.store import PROBES_SCHEMA, Run, RunWriter, append_probes, result_frames

EVIL = "<script>alert(1)</script>"
BEHAVIOUR = ("probe_scores", "corpus_ppl", "interference_heatmaps", "interference_curves")


def add_probes(folder: Path, rows: list[tuple], name: str = "made") -> Run:
    """Rows of (number of the checkpoint, benchmark, subset, length, metric, score, n, stderr), added to a run."""
    listed = checkpoints()
    full = [(listed[i].name, listed[i].tokens_seen, *rest) for i, *rest in rows]
    frame = pl.DataFrame(full, schema=PROBES_SCHEMA, orient="row")
    append_probes(folder, name, frame)
    return Run.open(folder)


def write_interference(path: Path, *, only: tuple[int, ...] = (3, 6, 15), names: list[str] | None = None) -> Run:
    """Two distances x three interference lengths x five samples, three checkpoints."""
    batch = [
        Case(
            f"interference-{distance}-i{before}-s{sample}", "interference", 1000 + distance + before, 0.5,
            f"s{sample}", f"h{sample}", sample, 0, tuple(range(8)), (1, 2, 3), Span(1, 5), Span(2, 5),
            distance=distance, interference=before,
        )
        for distance in (64, 1024)
        for before in (0, 512, 2048)
        for sample in range(5)
    ]  # fmt: skip
    trajectory = [checkpoints(names)[i] for i in only]
    writer = RunWriter(path, {"task": "interference", "seed": 0, "mode": "teacher_forced"}, batch)
    writer.add_checkpoints(trajectory)
    answers = {case.case_id: case.answer_ids for case in batch}
    for i, checkpoint in zip(only, trajectory, strict=True):
        scores, outcomes = result_frames(
            checkpoint, "teacher_forced", results(i, batch, np.random.default_rng(i)), answers
        )
        writer.append(checkpoint.name, 0, scores=scores, outcomes=outcomes)
    return Run.open(path)


def probe_rows() -> list[tuple]:
    """A study of three benchmarks at all checkpoints from the base on, greedy, sampled and graded."""
    rows: list[tuple] = []
    for i in range(3, 16):
        for k, subset in enumerate(("standard", "paraphrase")):
            share = 0.2 + 0.04 * i - 0.1 * k
            rows += [
                (i, "LongBio-style", subset, 1024, "sft greedy", share / 2, 16, 0.1),
                (i, "LongBio-style", subset, 1024, "sft pass@3", share, 16, 0.1),
            ]
        rows += [
            (i, "MRCR-style", "2needle", 1024, "sft pass@3", 0.1, 16, 0.05),
            (i, "MRCR-style", "2needle", 1024, "sft best@3", 0.4 + 0.03 * i, 16, 0.05),
            (i, "hellaswag", None, None, "acc_norm", 30.0 + i, 1000, 1.5),
        ]
        rows += [
            (i, "corpus-ppl", corpus, 2048, metric, level - 0.3 * math.log(max(i - 3, 0.1)), 8, 0.2)
            for corpus, level in (("books", 9.0), ("code", 3.0))
            for metric in ("ppl", "pooled_ppl")
        ]
        rows.append((i, "LongPPL", "books", 2048, "key_tokens", 40.0, 8, 1.0))
    rows.append((5, "LongBio-style", "standard", 512, "sft pass@3", 0.9, 16, 0.1))
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("behaviour") / "run"
    write_run(folder, lengths=(256, 1024), n_needles=4)
    write_interference(folder / "interference")
    return add_probes(folder, probe_rows())


@pytest.fixture(scope="module")
def tables(run: Run) -> RunTables:
    return RunTables(run)


@pytest.fixture(scope="module")
def panels(tables: RunTables) -> dict[str, ProbePanel]:
    return {panel.benchmark: panel for panel in probe_panels(tables)}


# --- what is drawn of which run


def test_every_figure_of_the_paper_has_its_number() -> None:
    numbers = {entry.paper_figure: name for name, entry in FIGURES.items() if entry.paper_figure is not None}
    assert sorted(numbers) == list(range(1, 10))
    assert [numbers[i] for i in (1, 6, 8, 9)] == list(BEHAVIOUR)


def test_a_whole_run_has_all_figures(tables: RunTables, tmp_path: Path) -> None:
    assert list(left_out(tables).values()) == [["causal_check", "causal_check_table", "causal_dates"]]
    written = draw_figures(tables, tmp_path, formats=("svg",))
    assert len(written) == len(FIGURES) - 2 + 1
    for name in BEHAVIOUR:
        assert json.loads(getattr(interactive, name)(tables).to_json())["layout"]["height"] > 200


def test_figures_without_numbers_are_left_out_with_the_command_that_adds_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256,), n_needles=3)
    written = draw_figures(run, tmp_path / "out", formats=("svg",))
    assert len(written) == len(FIGURES) - len(BEHAVIOUR) - 2 + 1
    said = written[-1].read_text()
    paper_tables = "niah_correlation_table, head_correlation_table, niah_p_table, head_p_table"
    assert f"Left out: probe_scores, {paper_tables}: no results after fine-tuning; `lccp probe RUN --sft` adds" in said
    assert "Left out: corpus_ppl: no corpus perplexity; `lccp probe RUN --corpus FILE` adds it." in said
    assert (
        "Left out: interference_heatmaps, interference_curves: no interference run; "
        "`lccp score CHECKPOINT... --task interference --out RUN/interference` makes one." in said
    )
    causal = ["causal_check", "causal_dates"]
    assert {name for name in _absent(run) if not name.endswith("_table")} == {*BEHAVIOUR, *causal}


def _absent(run: Run) -> list[str]:
    return [name for names in left_out(run).values() for name in names]


def test_corpus_perplexity_alone_is_no_result_after_fine_tuning(tmp_path: Path) -> None:
    write_run(tmp_path / "run", lengths=(256,), n_needles=3)
    run = add_probes(tmp_path / "run", [row for row in probe_rows() if row[1] in ("corpus-ppl", "LongPPL")])
    absent = _absent(run)
    assert "probe_scores" in absent
    assert "corpus_ppl" not in absent


def test_an_interference_run_has_two_figures(tmp_path: Path) -> None:
    run = write_interference(tmp_path / "run")
    written = draw_figures(run, tmp_path / "out", formats=("svg",))
    assert [path.name for path in written] == [
        "fig8_interference_heatmaps.svg", "fig9_interference_curves.svg", "captions.txt",
    ]  # fmt: skip
    assert "no needle-in-a-haystack cases by length and depth; `lccp score CHECKPOINT..." in written[-1].read_text()


def test_the_command_names_what_it_did_not_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lccp_interp.cli import main

    run = write_interference(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["lccp", "figures", str(run.path), "--formats", "svg"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == str(run.path / "figures" / "captions.txt")
    assert shown.err.startswith("lccp: not drawn: probe_scores, ppl_heatmaps, ")
    assert shown.err.count("\n") == 1


def test_a_companion_that_cannot_be_read_is_told(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.path, tmp_path / "run"))
    shutil.rmtree(folder / "interference" / "outcomes")
    (reason,) = [why for why, names in left_out(Run.open(folder)).items() if "interference_curves" in names]
    assert reason.startswith("its interference run cannot be read: run")
    assert "holds no finished outcomes yet" in reason


def test_a_run_without_any_numbers_is_an_error(tmp_path: Path) -> None:
    write_interference(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "outcomes")
    with pytest.raises(LccpError, match=r"run has no numbers for any figure: .*no needle-in-a-haystack cases"):
        draw_figures(Run.open(tmp_path / "run"), tmp_path / "out")


# --- results after fine-tuning


def test_panels_have_the_metric_that_correlation_takes(panels: dict[str, ProbePanel]) -> None:
    assert list(panels) == ["MRCR-style", "LongBio-style", "hellaswag"]
    assert panels["LongBio-style"].about == "sft, pass@3, 1K tokens"
    assert panels["MRCR-style"].about == "sft, best@3, 1K tokens"
    assert panels["hellaswag"].about == "acc_norm"
    assert [panel.tuned for panel in panels.values()] == [True, True, False]
    assert [panel.top for panel in panels.values()] == [1.0, 1.0, 100.0]
    assert panels["LongBio-style"].other_lengths == (512,)
    assert best_metric(["greedy", "pass@1", "pass@10"], "RULER") == "pass@10"


def test_lines_are_the_rows_and_their_mean(panels: dict[str, ProbePanel]) -> None:
    panel = panels["LongBio-style"]
    assert [line.subset for line in panel.lines] == ["standard", "paraphrase"]
    for k, line in enumerate(panel.lines):
        np.testing.assert_allclose(line.score, [0.2 + 0.04 * i - 0.1 * k for i in range(3, 16)])
        assert line.tokens.tolist() == [float(c.tokens_seen) for c in checkpoints()[3:]]
    assert panel.mean is not None
    np.testing.assert_allclose(panel.mean.score, [0.15 + 0.04 * i for i in range(3, 16)])
    # Two errors of 0.1 of independent items: sqrt(0.02) / 2.
    np.testing.assert_allclose(panel.mean.stderr, math.sqrt(0.02) / 2)
    assert set(panel.mean.n) == {32}
    assert panels["MRCR-style"].mean is None


def test_a_mean_needs_all_subsets(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.path, tmp_path / "run"))
    more = [(i, "LongBio-style", "pronoun", 1024, "sft pass@3", 0.3, None, None) for i in (3, 9)]
    (panel,) = [p for p in probe_panels(RunTables(add_probes(folder, more, "more"))) if p.benchmark == "LongBio-style"]
    assert panel.mean is not None
    assert list(panel.mean.checkpoints) == ["pretrain-3.6M", "lccp-0.6M"]
    assert set(panel.mean.n) == {0}  # of one subset it is not known
    assert np.isnan(panel.mean.stderr).all()
    assert np.isnan(panel.mean.low).all()


def test_studies_without_fine_tuning_have_panels_of_their_own(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.path, tmp_path / "run"))
    more = [(i, "LongBio-style", "standard", 1024, "base pass@3", 0.1, 16, 0.05) for i in (3, 9, 15)]
    made = probe_panels(RunTables(add_probes(folder, more, "base")))
    assert [(panel.benchmark, panel.study, panel.tuned) for panel in made] == [
        ("MRCR-style", "sft", True),
        ("LongBio-style", "sft", True),
        ("LongBio-style", "base", False),
        ("hellaswag", "", False),
    ]
    manifest = json.loads((folder / "run.json").read_text())
    manifest["probe_studies"] = [{"name": "base", "config": {"sft": {"epochs": 2}}}]
    (folder / "run.json").write_text(json.dumps(manifest))
    assert [panel.study for panel in probe_panels(RunTables(Run.open(folder)))][:1] == ["base"]  # it says so itself


def test_intervals_of_yes_or_no_items_are_wilsons() -> None:
    z, n, right = 1.96, 20, np.array([0, 7, 20])
    share = right / n
    error = np.sqrt(share * (1 - share) / (n - 1))
    low, high = share_interval(share, error, np.full(3, n), 1.0)
    for k, items in enumerate((n, n - 1, n)):  # the sample's error is that of one item less
        p = share[k]
        ends = np.roots([1 + z * z / items, -2 * p - z * z / items, p * p])
        np.testing.assert_allclose([low[k], high[k]], np.sort(ends), atol=1e-9)
    percent = share_interval(100 * share, 100 * error, np.full(3, n), 100.0)
    np.testing.assert_allclose(percent, (100 * low, 100 * high))
    np.testing.assert_allclose(share_interval(np.array([7.0]), np.array([0.5]), np.array([0]), None), [[6.02], [7.98]])


def test_both_forms_draw_the_panels(tables: RunTables, panels: dict[str, ProbePanel]) -> None:
    made = list(panels.values())
    scale = probe_axis(tables, made)
    axes = paper.probe_scores(tables).axes
    assert [axis.get_title() for axis in axes] == [
        "MRCR-style 2needle\nsft, best@3, 1K tokens", "LongBio-style\nsft, pass@3, 1K tokens", "hellaswag\nacc_norm",
    ]  # fmt: skip
    for axis, panel in zip(axes, made, strict=True):
        lines = [line for line in axis.lines if line.get_marker() == "o"]
        wanted = [*panel.lines, *([panel.mean] if panel.mean is not None else [])]
        for line, expected in zip(lines, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(line.get_ydata()), expected.score)
            np.testing.assert_allclose(np.asarray(line.get_xdata()), scale.at(list(expected.tokens)))
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["standard", "paraphrase", "mean"]
    traces = [trace for trace in interactive.probe_scores(tables).data if trace.text is not None]
    assert [trace.name for trace in traces if trace.showlegend] == ["standard", "paraphrase", "mean"]
    np.testing.assert_allclose(np.array(traces[0].y, dtype=float), panels["MRCR-style"].lines[0].score)


def test_of_many_subsets_only_the_mean_has_a_name(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.path, tmp_path / "run"))
    more = [(i, "RULER-style", f"s{k}", 1024, "sft greedy", 0.5, 4, 0.1) for i in (3, 9) for k in range(13)]
    tables = RunTables(add_probes(folder, more, "ruler"))
    axis = paper.probe_scores(tables).axes[0]
    assert axis.get_title().startswith("RULER-style\nsft, greedy")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["mean of 13 subsets"]


def test_names_of_probes_cannot_become_markup(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.path, tmp_path / "run"))
    more = [(i, EVIL, f"{EVIL}{k}", 1024, f"{EVIL} x", 0.5, 4, 0.1) for i in (3, 9) for k in range(2)]
    more += [(i, "corpus-ppl", EVIL, 64, "ppl", 2.0 + 0.1 * i, 4, 0.1) for i in range(3, 12)]
    tables = RunTables(add_probes(folder, more, "evil"))
    for name in BEHAVIOUR:
        assert EVIL not in json.dumps(getattr(interactive, name)(tables).to_dict(), default=str)


# --- corpus perplexity


def test_the_line_is_the_one_of_the_table(tables: RunTables) -> None:
    books, code = corpus_panels(tables)
    assert [line.corpus for panel in (books, code) for line in panel.lines] == ["books", "code"]  # 9 and 3: far apart
    table = saturation_table(tables.run, metrics=["probe:corpus-ppl/books:ppl"])
    line = books.lines[0]
    a, b = table["log_linear_a"][0], table["log_linear_b"][0]
    # Made as 9 - 0.3 ln(steps) with 100K tokens per step.
    assert a == pytest.approx(-0.3, abs=1e-6)
    assert b == pytest.approx(9 + 0.3 * math.log(100_000), abs=1e-5)
    after = line.drawn_tokens > 0
    np.testing.assert_allclose(line.fitted[after], a * np.log(line.drawn_tokens[after]) + b)
    assert line.formula == "−0.3 ln N + 12.5"
    np.testing.assert_allclose(line.high - line.values, 1.96 * 0.2, rtol=0.1)


def test_corpora_that_are_alike_share_an_axis(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.path, tmp_path / "run"))
    for part in (folder / "probes").iterdir():
        part.unlink()
    rows = [(i, "corpus-ppl", name, 64, "ppl", level - 0.1 * i, 4, None) for i in range(3, 7)
            for name, level in (("one", 5.0), ("two", 6.0))]  # fmt: skip
    tables = RunTables(add_probes(folder, rows))
    (panel,) = corpus_panels(tables)
    assert [line.corpus for line in panel.lines] == ["one", "two"]
    assert [line.formula for line in panel.lines] == ["", ""]  # four checkpoints: no fit
    assert np.isnan(panel.lines[0].low).all()
    axes = paper.corpus_ppl(tables).axes
    points = [line for line in axes[0].lines if line.get_marker() == "o" and len(np.asarray(line.get_ydata())) == 3]
    np.testing.assert_allclose(np.asarray(points[0].get_ydata()), [4.6, 4.5, 4.4])
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["one", "two"]


# --- interference


def test_heat_maps_show_the_cells(tables: RunTables) -> None:
    cells = interference_table(Run.open(tables.run.path / "interference"))
    for name, mesh in zip(
        ("pretrain-3.6M", "lccp-0.3M", "lccp-1.2M"), paper.interference_heatmaps(tables).axes, strict=False
    ):
        own = cells.filter(checkpoint=name).sort("distance", "interference")["answer_ppl"].to_numpy()
        drawn = np.asarray(mesh.collections[0].get_array()).reshape(2, 3)
        np.testing.assert_allclose(drawn, np.log10(np.log(own)).reshape(2, 3))
        assert mesh.get_ylim() == (-0.5, 1.5)  # the largest distance on top
    trace = interactive.interference_heatmaps(tables).data[0]
    assert "1K tokens after the needle, 2K before it" in trace.text[1][2]


def test_curves_are_at_the_largest_distance_or_the_chosen_one(tables: RunTables) -> None:
    cells = interference_table(Run.open(tables.run.path / "interference"))
    for chosen, distance in ((None, 1024), (64, 64)):
        axis = paper.interference_curves(tables, distance=chosen).axes[0]
        own = cells.filter(checkpoint="lccp-0.3M", distance=distance).sort("interference")["answer_ppl"].to_numpy()
        np.testing.assert_allclose(np.asarray(axis.lines[1].get_ydata()), np.log10(np.log(own)))
        traces = [t for t in interactive.interference_curves(tables, distance=chosen).data if t.text is not None]
        np.testing.assert_allclose(np.array(traces[1].y, dtype=float), np.log10(np.log(own)))
    assert [t.name for t in traces] == ["pretrain-3.6M (base)", "lccp-0.3M", "lccp-1.2M"]
    with pytest.raises(LccpError, match=r"no cases at a distance of 65 tokens; it has 64, 1024"):
        paper.interference_curves(tables, distance=65)


def test_without_a_companion_the_figure_says_how_to_make_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256,), n_needles=2, only=[0])
    with pytest.raises(LccpError, match=r"no interference run beside it; `lccp score .* --out RUN/interference` makes"):
        paper.interference_curves(run)


def test_lengths_that_crowd_stand_on_a_logarithmic_axis() -> None:
    near = InterferenceAxis.of([0, 512, 1024, 2048])
    assert not near.is_log
    assert near.at([1024]).tolist() == [1024.0]
    wide = InterferenceAxis.of([0, 128, 1024, 65536])
    assert wide.is_log
    assert wide.suffix == " (logarithmic)"
    np.testing.assert_allclose(wide.at([0, 128, 384]), [0, 1, 2])
    assert wide.ticks[1] == ["0", "128", "1K", "64K"]
    alone = InterferenceAxis.of([0])
    assert alone.limits[0] < alone.at([0])[0] < alone.limits[1]


# --- odd runs


@pytest.mark.parametrize(
    ("only", "rows", "said"),
    [
        ((3,), [(3, "RULER", "qa", None, "sft greedy", 0.0, None, None), (3, "corpus-ppl", None, None, "ppl", 3.0, None,
                                                                          None)], "RULER qa, sft, greedy."),
        ((0, 3, 8), [(0, "RULER", "qa", None, "sft greedy", 0.0, 4, 0.0), (0, "corpus-ppl", "b", None, "ppl", 3.0, 2,
                                                                           None)], "none is defined from the base"),
        ((3, 8), [(8, "RULER", "qa", None, "sft greedy", math.nan, 4, None), (8, "corpus-ppl", "b", 64, "ppl", math.nan,
                                                                              2, None)], "no score of a scored"),
        ((3, 8, 9, 10, 11), [(i, name, "b", 64, "ppl", 4.0 + i, 1, math.nan) for name in ("corpus-ppl", "other")
                             for i in (3, 8, 9, 10, 11)], "other b, ppl, 64 tokens, n = 1."),
    ],
    ids=["one checkpoint", "before the base only", "undefined", "perplexity that rises"],
)  # fmt: skip
def test_odd_results_are_drawn(only: tuple[int, ...], rows: list[tuple], said: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", lengths=(256,), n_needles=3, only=only)
    tables = RunTables(add_probes(tmp_path / "run", rows))
    texts = []
    for name in ("probe_scores", "corpus_ppl"):
        paper.save(getattr(paper, name)(tables), tmp_path / f"{name}.svg")
        json.loads(getattr(interactive, name)(tables).to_json())
        texts.append(caption(name, tables))
    assert said in " ".join(texts)


# --- captions


def test_captions_say_what_was_measured(tables: RunTables) -> None:
    probes = caption("probe_scores", tables)
    assert "MRCR-style 2needle, sft, best@3, 1K tokens, n = 16;" in probes
    assert "LongBio-style, sft, pass@3, 1K tokens, n = 16 in each of 2 subsets (the run has 512 too)" in probes
    assert "A benchmark called ...-style has items made after the published one's definition, not its data" in probes
    corpus = caption("corpus_ppl", tables)
    assert "books (8 documents of 2K tokens), code (8 documents of 2K tokens)" in corpus
    assert "Corpora whose perplexities are far apart have an axis each" in corpus
    assert "LongPPL" not in corpus
    assert "5 cases per cell, teacher-forced" in caption("interference_heatmaps", tables)
    assert "at an absolute distance of 1K tokens" in caption("interference_curves", tables)
