"""The report on learning dynamics: survival, comparisons, groups, probes; and the reason where one cannot be had."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from synthetic import PLANTED, write_run

from lccp_interp.dynamics import RunTables, by_kv_head, compare
from lccp_interp.imports import import_heads
from lccp_interp.report import findings, write_report
from lccp_interp.report.drawn import reason
from lccp_interp.report.heads import comparison_section, groups_section, survival_section
from lccp_interp.report.levels import correlation_section, saturation_section
from lccp_interp.schema import CaseResult
from lccp_interp.store import PROBES_SCHEMA, Run, append_probes

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("report") / "my-run", lengths=(256, 1024), n_needles=4)


@pytest.fixture(scope="module")
def text(run: Run) -> str:
    return write_report(run).read_text(encoding="utf-8")


def _copied(run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.path, tmp_path / "copy"))


def _cells(html: str) -> list[list[str]]:
    """Rows of all tables."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows if "<td" in row]


def test_every_link_leads_to_a_section(text: str) -> None:
    links = re.findall(r'<a href="#([^"]+)"', text)
    assert links == re.findall(r'<h2 id="([^"]+)"', text)
    assert {"survival", "comparison", "groups", "saturation", "correlation", "stability"} <= set(links)
    for figure in ("saturation_curves", "cohort_survival", "reference_comparison"):
        assert f'<figure id="{figure}">' in text


def test_the_page_names_no_folder_of_the_machine(run: Run, text: str) -> None:
    assert str(run.path.parent) not in text
    note = reason(run, f"no checkpoint of {run.path} is at its path; looked at somewhere/3/config.json & more")
    assert "no checkpoint of my-run is at its path; looked at pretrain-3.6M/config.json &amp; more" in note


# --- survival


def test_survival_is_told_in_words(run: Run) -> None:
    said = {finding.heading: finding.text for finding in findings(RunTables(run))}
    assert said["Survival"] == (
        "Of the 5 initial heads 4 are alive at the end; 2 of the 6 retrieval heads at the end became so in LCCP."
    )


def test_survival_is_a_table_beside_its_figure(run: Run) -> None:
    tables = RunTables(run)
    rows = _cells(survival_section(tables))
    assert len(rows) == 13
    assert rows[0][:4] == ["pretrain-3.6M", "base", "5 of 5", "100 %"]
    last = tables.census.row(-1, named=True)
    share = 100 * last["n_newborn"] / last["n_retrieval_heads"]
    assert rows[-1][2] == f"{last['n_from_base']} of 5"
    assert rows[-1][-1] == f"{last['n_newborn']} ({share:.0f} %)"


def test_a_head_that_dies_is_not_among_the_survivors(run: Run) -> None:
    alive = [row[2] for row in _cells(survival_section(RunTables(run)))]
    # 0-3 dies at number 9, that is six checkpoints after the base.
    assert 5 - int(alive[6].split()[0]) >= 1
    assert PLANTED[0, 3](9) < 0.1 < PLANTED[0, 3](8)


# --- comparisons


def test_every_checkpoint_stands_against_the_base(run: Run) -> None:
    rows = _cells(comparison_section(RunTables(run)))
    expected = compare(run)
    assert [row[0] for row in rows] == expected["checkpoint"].to_list()
    shares = (expected["overlap"] / expected["top_k"]).to_list()
    assert [row[2] for row in rows] == [f"{share:.3f}" for share in shares]
    assert [row[7] for row in rows] == [f"{rho:.3f}" for rho in expected["spearman"]]


def test_without_imported_lists_the_page_says_how_to_get_one(run: Run) -> None:
    assert "No head list is imported into this run; lccp import KIND FILE --into RUN" in comparison_section(
        RunTables(run)
    )


def test_an_imported_list_of_another_model_is_shown_and_not_compared(run: Run, tmp_path: Path) -> None:
    folder = _copied(run, tmp_path)
    scores = {f"{layer}-{head}": [(layer + head) / 16] * 3 for layer in range(3) for head in range(5)}
    (tmp_path / "other.json").write_text(json.dumps(scores))
    import_heads(folder, "wu", tmp_path / "other.json")
    html = comparison_section(RunTables(Run.open(folder)))
    assert "<h4>other</h4>" in html
    assert "wu from other.json: 3 layers x 5 heads, 15 scores, 3 trials per head; 12 above 0.1" in html
    assert "It is not compared with this run: architectures differ: copy has 4 layers x 8 heads" in html
    assert ["2-4", "0.375", "3"] in _cells(html)
    assert str(tmp_path) not in html


def test_an_imported_list_of_the_same_shape_is_compared(run: Run, tmp_path: Path) -> None:
    folder = _copied(run, tmp_path)
    last = RunTables(run).scores.filter(pl.col("checkpoint") == "lccp-1.2M")
    scores = {f"{layer}-{head}": [score] for layer, head, score in last.select("layer", "head", "score").iter_rows()}
    (tmp_path / f"{EVIL.replace('/', '|')}.json").write_text(json.dumps(scores))
    import_heads(folder, "wu", tmp_path / f"{EVIL.replace('/', '|')}.json")
    html = comparison_section(RunTables(Run.open(folder)))
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    against = [row for row in _cells(html) if row[0] == "lccp-1.2M"]
    assert len(against) == 2  # the base, the list
    assert against[1][2] == against[1][7] == "1.000"


def test_a_torn_imported_list_is_told(run: Run, tmp_path: Path) -> None:
    folder = _copied(run, tmp_path)
    (tmp_path / "torn.json").write_text(json.dumps({"0-0": [0.5], "0-1": [0.1]}))
    import_heads(folder, "wu", tmp_path / "torn.json")
    (folder / "imported" / "torn.parquet").write_bytes(b"PAR1")
    assert "torn.parquet is not a whole Parquet file" in comparison_section(RunTables(Run.open(folder)))


# --- groups


def _with_configs(run: Run, tmp_path: Path, n_kv_heads: int) -> Run:
    """A copy of the run whose checkpoints are folders with a config."""
    folder = _copied(run, tmp_path)
    manifest = json.loads((folder / "run.json").read_text())
    for checkpoint in manifest["checkpoints"]:
        checkpoint["path"] = str(tmp_path / "weights" / checkpoint["name"])
        Path(checkpoint["path"]).mkdir(parents=True)
        (Path(checkpoint["path"]) / "config.json").write_text(
            json.dumps({"model_type": "llama", "num_key_value_heads": n_kv_heads})
        )
    (folder / "run.json").write_text(json.dumps(manifest))
    return Run.open(folder)


def test_heads_are_grouped_by_key_value_head(run: Run, tmp_path: Path) -> None:
    tables = RunTables(_with_configs(run, tmp_path, 2))
    html = groups_section(tables)
    assert "4 heads share each of the 2 key/value heads of a layer" in html
    rows = {row[0]: row for row in _cells(html)}
    groups = by_kv_head(tables.scores, 2).filter(pl.col("checkpoint") == "lccp-1.2M")
    for group in groups.iter_rows(named=True):
        row = rows[f"{group['layer']}-kv{group['kv_head']}"]
        assert row[4:6] == [f"{group['max_score']:.3f}", f"{group['layer']}-{group['best_head']}"]
    assert rows["3-kv1"][1] == "4 to 7"
    assert rows["3-kv1"][5] == "3-4"  # planted, grows to 0.9
    assert f"{groups.filter(pl.col('max_score') > 0.1).height} at the end" in html


def test_groups_need_a_config_and_sharing(run: Run, tmp_path: Path) -> None:
    assert "no checkpoint of my-run is at its path any more" in groups_section(RunTables(run))
    whole = RunTables(_with_configs(run, tmp_path, 8))
    assert "Each of the 8 heads of a layer has a key/value head of its own." in groups_section(whole)


# --- probes


def _with_probes(run: Run, tmp_path: Path, benchmark: str, every: int) -> Run:
    folder = _copied(run, tmp_path)
    rows = [
        (name, tokens, benchmark, "qa", 1024, "accuracy", 60.0 + 2.0 * i + (i % 3), 100, 1.0)
        for i, (name, tokens) in enumerate(run.checkpoints.select("name", "tokens_seen").rows()[3::every])
    ]
    order = ("checkpoint", "tokens_seen", "benchmark", "subset", "length", "metric", "score", "n", "stderr")
    frame = pl.DataFrame(rows, schema=list(order), orient="row").select(
        pl.col(name).cast(kind) for name, kind in PROBES_SCHEMA.items()
    )
    append_probes(folder, "probe", frame)
    return Run.open(folder)


def test_probes_of_some_checkpoints_are_correlated_and_laid_out_as_in_the_paper(run: Run, tmp_path: Path) -> None:
    html = correlation_section(RunTables(_with_probes(run, tmp_path, "RULER", every=2)))
    assert "In the paper's layout" in html
    rows = _cells(html)
    own = next(row for row in rows if row[:3] == ["niah_score", "RULER/qa/1024/accuracy", "levels"])
    assert own[3] == "7"  # of 16 checkpoints 7 have a probe
    laid_out = {tuple(row[:2]): row[2] for row in rows if len(row) == 4}
    assert laid_out["niah_score", "published r"] == "0.8552"
    assert laid_out["mean_initial_score", "published p"] == "0.0158"
    assert laid_out["answer_ppl", "n"] == "7"
    assert float(laid_out["niah_score", "r"]) == pytest.approx(float(own[4]), abs=1e-3)


def test_other_benchmarks_have_no_place_in_the_papers_layout(run: Run, tmp_path: Path) -> None:
    html = correlation_section(RunTables(_with_probes(run, tmp_path, "HELMET", every=1)))
    assert "no pair of this table is in the paper&#x27;s Tables 3 and 4" in html
    assert any(row[1] == "HELMET/qa/1024/accuracy" for row in _cells(html) if len(row) > 1)


def test_without_probes_there_is_no_layout(run: Run) -> None:
    html = correlation_section(RunTables(run))
    assert "In the paper's layout" not in html
    assert "The run holds no probe results" in html


# --- saturation


def test_the_saturation_figure_stands_by_its_table(run: Run) -> None:
    html = saturation_section(RunTables(run))
    assert html.index('id="saturation_curves"') < html.index("<table>")
    names = [row[0] for row in _cells(html)]
    assert "loss_nats, 1K" in names
    assert "answer_ppl, 1K, depth 50 %" in names


# --- odd runs


def _changed(kind: str) -> dict[str, object]:
    def change(i: int, result: CaseResult) -> CaseResult:
        fill = np.nan if kind == "all undefined" or (kind == "undefined from number 9 on" and i >= 9) else 0.0
        scores = {metric: np.full_like(values, fill) for metric, values in result.scores.items()}
        if kind == "undefined from number 9 on" and i < 9:
            scores = result.scores
        return CaseResult(result.case_id, result.layers, scores, result.answer_loss_nats, (0, 0, 0))

    return {"one checkpoint": {"only": [0]}, "two checkpoints": {"only": [3, 8]}}.get(kind, {"change": change})


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        ("one checkpoint", ("there is one scored checkpoint only", "there is no checkpoint after the base")),
        ("two checkpoints", ("at least 5 are needed",)),
        ("no retrieval heads", ("there is no cohort to follow", "no retrieval head from the base on")),
        ("all undefined", ("there is no cohort to follow", "no head has a defined score both at the base")),
        ("undefined from number 9 on", ("head scores are undefined", "undefined or not scored at")),
    ],
)
def test_a_page_comes_whatever_the_run_is(kind: str, reasons: tuple[str, ...], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256,), n_needles=3, **_changed(kind))  # type: ignore[arg-type]
    text = write_report(run).read_text(encoding="utf-8")
    for words in reasons:
        assert words in text
    assert len(re.findall('<h2 id="', text)) == 17
    assert len(text) < 8_000_000
