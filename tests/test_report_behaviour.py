"""The report on behaviour: results after fine-tuning, heads across that step, corpus perplexity, interference."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_run
from test_figures_behaviour import add_probes, probe_rows, write_interference

from lccp_interp.dynamics import RunTables, paired_census, paired_heads
from lccp_interp.report import write_report
from lccp_interp.report.behaviour import corpus_section, interference_section, probes_section
from lccp_interp.report.levels import correlation_section
from lccp_interp.schema import CaseResult
from lccp_interp.store import Run

EVIL = "<script>alert(1)</script>"


def tuned(i: int, result: CaseResult) -> CaseResult:
    """Fine-tuning gives head 0-0 a score of 0.5 and takes that of 2-1."""
    rng = np.random.default_rng(list(result.case_id.encode()))
    scores = result.scores["retrieval"].copy()
    scores[0, 0] = 0.5 + rng.normal(0, 0.02)
    scores[2, 1] = 0.0
    return replace(result, scores=dict.fromkeys(result.scores, scores))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("bare") / "my-run", lengths=(256, 1024), n_needles=4)


@pytest.fixture(scope="module")
def run(bare: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("behaviour") / "my-run"
    shutil.copytree(bare.path, folder)
    write_interference(folder / "interference")
    write_run(folder / "sft" / "light" / "heads", lengths=(256, 1024), n_needles=4, only=(3, 8), change=tuned)
    made = add_probes(folder, probe_rows())
    failed = {"checkpoint": "lccp-0.2M", "study": "sft", "error": f"diverged at step 7 {EVIL}", "loss_nats": "inf"}
    (folder / "probes" / "sft-lccp-0.2M.failed.json").write_text(json.dumps(failed))
    return made


@pytest.fixture(scope="module")
def tables(run: Run) -> RunTables:
    return RunTables(run)


def _cells(html: str) -> list[list[str]]:
    """Rows of all tables."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows if "<td" in row]


def test_a_run_without_these_numbers_says_how_to_get_them(bare: Run) -> None:
    tables = RunTables(bare)
    assert "No results after fine-tuning; lccp probe RUN --sft adds them." in probes_section(tables)
    assert "No corpus perplexity; lccp probe RUN --corpus FILE adds it." in corpus_section(tables)
    assert (
        "No interference run; lccp score CHECKPOINT... --task interference --out RUN/interference makes one."
        in interference_section(tables)
    )


def test_scores_stand_with_their_errors_and_items(tables: RunTables) -> None:
    html = probes_section(tables)
    heads = [re.sub(r"\s", " ", head) for head in re.findall(r"<th[^>]*>(.*?)</th>", html)]
    assert heads[2:6] == [
        "MRCR-style 2needle, best@3, 1K, n = 16",
        "LongBio-style standard, pass@3, 1K, n = 16",
        "LongBio-style paraphrase, pass@3, 1K, n = 16",
        "LongBio-style mean, 1K, n = 32",
    ]
    rows = _cells(html)
    base = next(row for row in rows if row[0] == "pretrain-3.6M")
    assert base[2:] == ["0.490 ± 0.050", "0.320 ± 0.100", "0.220 ± 0.100", "0.270 ± 0.071"]
    assert ["lccp-1.2M", "+1.2M", "45.0 ± 1.5"] in rows  # percent, of the imported benchmark
    assert "<h3>Study sft, after fine-tuning</h3>" in html
    assert "<h3>Imported results</h3>" in html
    assert not any(row[0] == "pretrain-0.5M" for row in rows if len(row) < 9)


def test_fine_tuning_that_failed_is_told(tables: RunTables, bare: Run, tmp_path: Path) -> None:
    html = probes_section(tables)
    assert "study sft, lccp-0.2M: diverged at step 7 &lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert EVIL not in html
    folder = Path(shutil.copytree(bare.path, tmp_path / "run"))
    (folder / "probes").mkdir()
    (folder / "probes" / "sft-a.failed.json").write_text("{")
    (folder / "probes" / "sft-b.failed.json").write_text("[1]")
    html = probes_section(RunTables(Run.open(folder)))  # there are no results at all
    assert "sft-a.failed.json cannot be read" in html
    assert "sft-b.failed.json cannot be read" in html


def test_heads_across_the_step_are_the_paired_census(run: Run, tables: RunTables) -> None:
    html = probes_section(tables).split("Heads across fine-tuning: study light")[1]
    rows = _cells(html)
    expected = paired_census(paired_heads(run, Run.open(run.path / "sft" / "light" / "heads")))
    assert [row[0] for row in rows] == ["pretrain-3.6M", "lccp-0.5M"] == expected["checkpoint"].to_list()
    columns = ("n_stay", "n_births", "n_deaths", "n_undecided", "n_heads")
    assert [tuple(map(int, row[2:7])) for row in rows] == expected.select(columns).rows()
    assert rows[0][7:] == ["0-0", "2-1"]
    assert "over the same cases at 1K tokens" in html
    at_256 = probes_section(RunTables(run, 256)).split("Heads across fine-tuning: study light")[1]
    assert "over the same cases at 256 tokens" in at_256


def test_heads_that_cannot_be_paired_leave_the_reason(bare: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bare.path, tmp_path / "run"))
    write_run(folder / "sft" / "light" / "heads", lengths=(1024,), n_needles=2, only=(3,))
    html = probes_section(RunTables(Run.open(folder)))
    assert "asked other cases at 1024 tokens, so their heads cannot be paired" in html
    assert str(tmp_path) not in html


def test_corpora_stand_with_their_fits(tables: RunTables) -> None:
    html = corpus_section(tables)
    books, code = _cells(html)
    assert books[:5] == ["books", "perplexity", "2K", "8", "13"]
    assert books[7] == "−0.3 ln N + 12.5"
    assert code[0] == "code"
    assert html.index('id="corpus_ppl"') < html.index("<table>")
    assert "<li>books, perplexity: " in html


def test_interference_stands_at_the_ends_of_its_curves(run: Run, tables: RunTables) -> None:
    html = interference_section(tables)
    rows = _cells(html)
    assert [(row[0], row[2]) for row in rows] == [
        (name, distance) for distance in ("64", "1K") for name in ("pretrain-3.6M (base)", "lccp-0.3M", "lccp-1.2M")
    ]
    cells = tables.interference.cells.filter(checkpoint="lccp-0.3M", distance=1024).sort("interference")
    row = rows[4]
    assert row[3].startswith(f"{cells['answer_ppl'][0]:.3g} [")
    assert row[4].endswith("] at 2K")
    assert float(row[5]) == pytest.approx(cells["loss_nats"][-1] - cells["loss_nats"][0], rel=1e-2)
    assert row[7] == "5"


def test_the_page_has_all_nine_figures_of_the_paper(run: Run, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "page.html").read_text(encoding="utf-8")
    assert sorted(map(int, re.findall(r"as Figure (\d) of the paper", text))) == list(range(1, 10))
    assert len(text.encode()) < 8_000_000
    assert re.findall(r'<a href="#([^"]+)"', text) == re.findall(r'<h2 id="([^"]+)"', text)
    assert "<script>alert" not in text


def test_probes_of_strangers_leave_a_reason(bare: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bare.path, tmp_path / "run"))
    add_probes(folder, probe_rows())
    manifest = json.loads((folder / "run.json").read_text())
    manifest["checkpoints"] = [row for row in manifest["checkpoints"] if row["name"] != "lccp-1.2M"]
    (folder / "run.json").write_text(json.dumps(manifest))
    tables = RunTables(Run.open(folder))
    with pytest.warns(UserWarning, match=r"lccp-1\.2M"):
        tables.checkpoints  # noqa: B018
    for section in (probes_section, corpus_section):
        assert "has scores of lccp-1.2M" in section(tables)
        assert str(tmp_path) not in section(tables)


def test_long_tables_are_folded(run: Run, bare: Run, tables: RunTables) -> None:
    html = correlation_section(tables)
    found = re.search(r"<summary>All (\d+) correlations</summary>", html)
    assert found is not None
    assert int(found[1]) > 60
    assert "<summary>" not in correlation_section(RunTables(bare))
