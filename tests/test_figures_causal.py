"""Figures of the causal check and of agreement between metrics: they draw their tables, for odd studies too."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from synthetic import checkpoints, write_run

from lccp_interp.dynamics import RunTables, important_from, metric_agreement
from lccp_interp.figures import TABLES, caption, draw_figures, interactive, left_out, paper, style
from lccp_interp.figures.agreement_panels import agreement_map
from lccp_interp.figures.causal_panels import causal_check_panels, causal_date_lines, check_study, dates_study
from lccp_interp.interventions.causal import ABLATIONS_SCHEMA
from lccp_interp.report import write_report
from lccp_interp.report.causes import causal_words, causes_section
from lccp_interp.schema import CaseResult, LccpError
from lccp_interp.store import Run, write_json

EVIL = "<script>alert(1)</script>"
BEST = ("3-4", "2-1", "1-6", "3-0")
OTHERS = ("3-1", "2-2", "1-1", "3-2")
FROM = 5
"""Number of the checkpoint from which on the best heads matter."""


def ablate(
    run: Run,
    study: str = "zero-1024-planted",
    *,
    only: Sequence[int] = range(3, 16),
    length: int = 1024,
    k: Sequence[int] = (1, 2, 4),
    n_draws: int = 4,
    single: bool = False,
    harmless: bool = False,
) -> Run:
    """Add a study: from checkpoint `FROM` on 2 nats and every answer are lost without the best heads, else nothing."""
    cases = run.cases.filter(length=length)["case_id"].to_list()
    sets = [
        ("single" if single else "top", [head] if single else list(BEST[:head])) for head in (BEST if single else k)
    ]
    for i in only:
        checkpoint = checkpoints()[i]
        rng = np.random.default_rng(i)
        rows = []

        def answers(harm: float, i: int = i, rng: np.random.Generator = rng) -> list[tuple[float, bool]]:
            harm = harm if i >= FROM and not harmless else 0.0
            return [(0.1 + harm + float(rng.exponential(0.02)), harm < 1) for _ in cases]

        shared = {"study": study, "checkpoint": checkpoint.name, "tokens_seen": checkpoint.tokens_seen, "kind": "zero"}
        blank = {"draw": None, "matched_to": None, "layer_matched": None}

        def add(made: list[tuple[float, bool]], rows: list = rows, shared: dict = shared, **columns: object) -> None:
            for case, (loss, exact) in zip(cases, made, strict=True):
                rows.append({**shared, "case_id": case, "loss_nats": loss, "greedy_exact": exact, **columns})

        add(answers(0.0), **blank, set="none", k=0, heads="")
        for role, heads in sets:
            named = " ".join(heads)
            add(answers(2.0), **blank, set=role, k=len(heads), heads=named)
            for draw in range(n_draws):
                other = " ".join(OTHERS[draw : draw + 1] if single else OTHERS[: len(heads)])
                add(
                    answers(0.02), set="random", k=len(heads), draw=draw, heads=other, matched_to=named,
                    layer_matched=True,
                )  # fmt: skip
        (run.path / "ablations").mkdir(exist_ok=True)
        pl.DataFrame(rows, schema=ABLATIONS_SCHEMA).write_parquet(
            run.path / "ablations" / f"{study}.{checkpoint.name}.parquet"
        )
    manifest = Run.open(run.path).manifest
    manifest.setdefault("ablations", []).append({"name": study, "config": {"kind": "zero", "length": length}})
    write_json(run.path / "run.json", manifest)
    return Run.open(run.path)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> RunTables:
    run = write_run(tmp_path_factory.mktemp("causal") / "run", lengths=(256, 1024), n_needles=4)
    return RunTables(ablate(run))


# --- over k


def test_the_check_is_its_table(tables: RunTables) -> None:
    made = causal_check_panels(tables)
    assert (made.checkpoint, made.texts, made.n, made.n_draws) == ("lccp-1.2M", ("0", "1", "2", "4"), 20, 4)
    table = tables.causal(made.study).filter(checkpoint="lccp-1.2M")
    for panel in made.panels:
        unit = 100 if panel.outcome == "greedy_exact" else 1
        rows = table.filter(outcome=panel.outcome)
        np.testing.assert_allclose(panel.best, unit * np.append(rows["intact"][0], rows["removed"]))
        np.testing.assert_allclose(panel.random_high, unit * np.append(rows["intact_high"][0], rows["random_high"]))
        assert (panel.best_low <= panel.best).all()
        assert (panel.best <= panel.best_high).all()
    loss, exact, ppl = made.panels
    assert loss.best[-1] - loss.best[0] == pytest.approx(2, abs=0.05)
    assert exact.best.tolist() == [100, 0, 0, 0]
    assert exact.random.tolist() == pytest.approx([100] * 4)
    np.testing.assert_allclose(ppl.best, np.exp(loss.best))


@pytest.mark.parametrize("columns", [1, 2])
def test_both_forms_draw_the_check(tables: RunTables, columns: int) -> None:
    made = causal_check_panels(tables)
    axes = paper.causal_check(tables, columns=columns).axes
    for axis, panel in zip(axes, made.panels, strict=True):
        random, best = axis.lines
        np.testing.assert_allclose(np.asarray(best.get_ydata()), panel.best)
        np.testing.assert_allclose(np.asarray(random.get_ydata()), panel.random)
        assert best.get_color() == style.metric_colour(panel.outcome)
        assert len(axis.collections) == 2  # a band each
    traces = [trace for trace in interactive.causal_check(tables).data if trace.text is not None]
    assert len(traces) == 6
    np.testing.assert_allclose(np.array(traces[1].y, dtype=float), made.panels[0].best)
    assert "without 3-4 2-1" in traces[1].text[2]
    assert "with all heads" in traces[1].text[0]


def test_single_heads_stand_side_by_side(tmp_path: Path) -> None:
    run = ablate(write_run(tmp_path / "run", lengths=(1024,), n_needles=3, only=[15]), single=True, only=[15])
    own = RunTables(run)
    assert causal_check_panels(own).texts == BEST
    axis = paper.causal_check(own).axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == list(BEST)
    assert all(line.get_linestyle() == "None" for line in axis.lines[:2])
    assert "without each head by itself" in caption("causal_check", own)
    assert interactive.causal_check(own).layout.xaxis.ticktext == BEST
    (reason,) = [why for why, names in left_out(own).items() if names == ["causal_dates"]]
    assert reason.startswith("heads were removed at one checkpoint only; `lccp ablate RUN --only all`")


# --- over training


def test_the_dates_are_those_of_the_table(tables: RunTables) -> None:
    made = causal_date_lines(tables)
    for outcome, _, lines, little in made.panels:
        since = important_from(tables.causal(made.study), outcome=outcome)
        assert [line.name for line in lines] == ["1", "2", "4"]
        assert little == pytest.approx(5 if outcome == "greedy_exact" else 0.05)
        for line, row in zip(lines, since.iter_rows(named=True), strict=True):
            assert line.since is not None
            assert line.checkpoints[line.since] == row["checkpoint"] == checkpoints()[FROM].name
            assert line.low[line.since] > little >= line.low[line.since - 1]


def test_both_forms_mark_the_dates(tables: RunTables) -> None:
    at = checkpoints()[FROM].tokens_seen
    scale = style.TokenAxis.of(tables.checkpoints, tables.base)
    for axis in paper.causal_dates(tables).axes:
        diamonds = [line for line in axis.lines if line.get_marker() == "D"]
        assert [float(np.asarray(line.get_xdata())[0]) for line in diamonds] == scale.at([at]) * 3
    traces = [trace for trace in interactive.causal_dates(tables).data if trace.text is not None]
    assert len(traces) == 6
    for trace in traces:
        (i,) = [i for i, symbol in enumerate(trace.marker.symbol) if symbol == "diamond"]
        assert "important from here on" in trace.text[i]


def test_heads_that_never_matter_have_no_date(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(1024,), n_needles=3)
    own = RunTables(ablate(run, harmless=True))
    assert all(line.since is None for _, _, lines, _ in causal_date_lines(own).panels for line in lines)
    assert not [line for axis in paper.causal_dates(own).axes for line in axis.lines if line.get_marker() == "D"]
    said = causal_words(own)
    assert "That the highest-scoring heads do the work is not shown." in said
    assert "for exact answers none; and for the loss none" in said


# --- which study


def test_the_study_at_the_length_of_the_figures_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256, 1024), n_needles=3)
    ablate(run, "short", length=256)
    ablate(run, "few", k=(1,), only=[15])
    run = ablate(run, "many", only=[14, 15])
    assert check_study(RunTables(run, 1024)) == "many"
    assert check_study(RunTables(run, 256)) == "short"
    assert dates_study(RunTables(run, 1024)) == "short"  # thirteen checkpoints are more than two
    with pytest.raises(LccpError, match="has no ablation study 'none'; it has short, few, many"):
        paper.causal_check(run, study="none")
    with pytest.raises(LccpError, match=r"study many has no checkpoint 'x'; it has lccp-1\.1M, lccp-1\.2M"):
        interactive.causal_check(run, study="many", checkpoint="x")


def test_without_ablations_the_command_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256,), n_needles=3)
    reasons = left_out(run)
    assert reasons["no heads were removed yet; `lccp ablate RUN` removes some"] == [
        "causal_check", "causal_check_table", "causal_dates",
    ]  # fmt: skip
    assert causal_words(RunTables(run)) == "Not checked: no heads were removed yet; lccp ablate RUN removes some."
    with pytest.raises(LccpError, match="`lccp ablate RUN` removes some"):
        paper.causal_check(run)


def test_a_broken_part_is_a_reason_not_an_end(tmp_path: Path) -> None:
    run = ablate(write_run(tmp_path / "run", lengths=(1024,), n_needles=3), only=[14, 15])
    next((run.path / "ablations").glob("*.parquet")).write_bytes(b"PAR1 cut off")
    own = RunTables(Run.open(run.path))
    (reason,) = [why for why, names in left_out(own).items() if "causal_check" in names]
    assert "delete it and run `lccp ablate` again" in reason
    html = causes_section(own)
    assert "delete it and run lccp ablate again" in html
    assert str(tmp_path) not in html


# --- in words


def test_the_report_says_what_the_check_found(tables: RunTables, tmp_path: Path) -> None:
    said = causal_words(tables)
    assert said.startswith("At lccp-1.2M exact answers go from 100 % to 0 % without 3-4")
    assert "and to 100 % without as many random heads of the same layers" in said
    assert "So retrieval needs these heads. That rests on 20 cases of 1K tokens and 4 random sets." in said
    first = checkpoints()[FROM].name
    assert f"for exact answers the best 1, 2 and 4 from {first} on; and for the loss the best 1, 2 and 4 from" in said
    text = write_report(tables.run, tmp_path / "page.html", length=1024).read_text()
    assert text.index("So retrieval needs these heads") < text.index('id="levels"')
    for name in ("causal_check", "causal_dates", "metric_agreement"):
        assert f'<figure id="{name}">' in text


def test_captions_say_n_length_and_mode(tables: RunTables) -> None:
    for name in ("causal_check", "causal_dates"):
        assert "n = 20 cases of 1K tokens, teacher-forced, 4 random sets each" in caption(name, tables)
    assert "mean over 20 cases of 1K tokens, teacher-forced" in caption("metric_agreement", tables)


# --- agreement of metrics


def _differing(i: int, result: CaseResult) -> CaseResult:
    """`wu` ranks the heads the other way round, `needle_mass` is the same for all."""
    scores = result.scores["retrieval"]
    others = {"wu": -scores, "copy": scores, "needle_mass": np.full_like(scores, 0.5)}
    return dataclasses.replace(result, scores={"retrieval": scores, **others})


@pytest.fixture(scope="module")
def differing(tmp_path_factory: pytest.TempPathFactory) -> RunTables:
    folder = tmp_path_factory.mktemp("agreement")
    return RunTables(write_run(folder / "run", lengths=(256,), n_needles=3, change=_differing))


def test_the_map_is_the_table_of_agreement(differing: RunTables) -> None:
    made = agreement_map(differing)
    assert made.checkpoint == "lccp-1.2M"
    at = {name: i for i, name in enumerate(made.metrics)}
    for row in metric_agreement(differing.run, checkpoint="last").iter_rows(named=True):
        one, other = at[row["metric"]], at[row["other"]]
        assert one < other
        np.testing.assert_equal(made.spearman[other, one], row["spearman"])
        np.testing.assert_equal(made.overlap[one, other], row["overlap"] / row["top_k"])
    assert made.text(at["wu"], at["copy"]) == "-1.00"
    assert made.text(at["copy"], at["retrieval"]) in ("8", "1.00")
    assert np.isnan(made.spearman[np.triu_indices(4)]).all()
    assert np.isnan(made.overlap[np.tril_indices(4)]).all()
    assert len(made.undefined) == 6  # a metric that is the same everywhere agrees with none


def test_both_forms_draw_the_map(differing: RunTables) -> None:
    made = agreement_map(differing)
    axis = paper.metric_agreement(differing).axes[0]
    shared, rho = (np.ma.getdata(mesh.get_array()).reshape(4, 4) for mesh in axis.collections)
    np.testing.assert_allclose(rho, made.spearman)
    np.testing.assert_allclose(shared, made.overlap)
    written = {text.get_text() for text in axis.texts}
    assert "-1.00" in written
    assert sum(patch.get_hatch() is not None for patch in axis.patches) == 6
    figure = interactive.metric_agreement(differing)
    np.testing.assert_allclose(np.array(figure.data[1].z, dtype=float), made.spearman)
    assert "rank correlation -1 (95 % interval" in figure.data[1].text[made.metrics.index("wu")][0]
    assert sum(note.text == "n/a" for note in figure.layout.annotations) == 6


def test_one_metric_agrees_with_nothing(tmp_path: Path) -> None:
    def lone(i: int, result: CaseResult) -> CaseResult:
        return dataclasses.replace(result, scores={"retrieval": result.scores["retrieval"]})

    run = write_run(tmp_path / "run", lengths=(256,), n_needles=3, change=lone)
    (reason,) = [why for why, names in left_out(run).items() if "metric_agreement" in names]
    assert reason.startswith("it holds one head metric only (retrieval); `lccp score CHECKPOINT... --metrics ")
    with pytest.raises(LccpError, match=r"got retrieval; the run holds retrieval; `lccp score CHECKPOINT... --metrics"):
        paper.metric_agreement(run)


def test_names_of_metrics_and_studies_cannot_become_markup(tmp_path: Path) -> None:
    def evil(i: int, result: CaseResult) -> CaseResult:
        scores = result.scores["retrieval"]
        return dataclasses.replace(result, scores={"retrieval": scores, f"{EVIL}&$x_1$": -scores})

    numbers = (3, 9, 15)
    run = write_run(tmp_path / "run", lengths=(256,), n_needles=3, change=evil, only=numbers)
    run = ablate(run, "evil", length=256, only=numbers)
    manifest = Run.open(run.path).manifest
    manifest["ablations"][-1]["config"]["kind"] = EVIL
    write_json(run.path / "run.json", manifest)
    for part in (run.path / "ablations").glob("*.parquet"):
        pl.read_parquet(part).with_columns(kind=pl.lit(EVIL)).write_parquet(part)
    own = RunTables(Run.open(run.path))
    text = write_report(own.run).read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    for name in ("metric_agreement", "causal_check", "causal_dates"):
        assert EVIL not in json.dumps(getattr(interactive, name)(own).to_dict(), default=str)
    draw_figures(own, tmp_path / "out", formats=("svg", "html", "tex", "md", "csv"))
    for path in (tmp_path / "out").iterdir():
        if path.suffix in (".html", ".md", ".svg") and path.name != "plotly.min.js":
            assert "<script>alert" not in path.read_text(), path.name
    assert r"\textless{}script\textgreater{}" in (tmp_path / "out" / "agreement_table.tex").read_text()


def test_tables_are_registered_with_what_they_need(tables: RunTables) -> None:
    absent = {name for names in left_out(tables).values() for name in names}
    assert set(TABLES) - absent == {"stability_table", "causal_check_table", "agreement_table"}
    made = paper.causal_check_table(tables)
    assert len(made.rows) == 3 * 13
    assert made.rows[-1][:5] == ("lccp-1.2M", "the best 4", "100 %", "0 %", "100 %")
    assert math.isclose(float(made.rows[-1][8]), 2, abs_tol=0.1)
