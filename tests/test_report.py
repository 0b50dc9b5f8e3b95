"""The report: findings that match the tables, one file without requests, text that cannot become markup."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_run

from lccp_interp.dynamics import RunTables
from lccp_interp.report import findings, write_report
from lccp_interp.report.findings import cautions, near_final, when
from lccp_interp.report.page import prose, script_safe, table
from lccp_interp.schema import CaseResult, LccpError
from lccp_interp.store import Run

EVIL = "<script>alert(1)</script>"
N_FIGURES = 10
"""Of a run without results, corpora, interference and ablations."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("report") / "my-run")


@pytest.fixture(scope="module")
def text(run: Run) -> str:
    return write_report(run).read_text(encoding="utf-8")


class _Page(HTMLParser):
    """Elements, attributes and visible text of a page; the content of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)


def _by_heading(run: Run, length: int | None = None) -> dict[str, str]:
    return {finding.heading: finding.text for finding in findings(RunTables(run, length))}


def test_findings_say_what_was_planted(run: Run) -> None:
    said = _by_heading(run)
    assert said["Number of retrieval heads"].startswith(
        "At the base checkpoint pretrain-3.6M (3.6M tokens) 5 of 32 heads are retrieval heads (retrieval score "
        "above 0.1 at 4K tokens); at the last checkpoint lccp-1.2M (1.2M LCCP tokens) there are"
    )
    assert said["Births and deaths"].startswith(
        "In the last stage (LCCP) 3 heads were born: 1-6 between 300K and 400K LCCP tokens; 3-0 between 600K and 700K "
        "LCCP tokens; 2-5 (again) between 800K and 900K LCCP tokens. 2 heads were lost: 2-5 between 100K and 200K LCCP "
        "tokens; 0-3 between 500K and 600K LCCP tokens."
    )
    assert said["Births and deaths"].endswith("Before it there were 2 births and 0 deaths.")
    assert said["Strongest head"].startswith("Head 3-4 (layer-head) ends strongest, with a retrieval score of 0.9")
    assert said["Strongest head"].endswith("It was born at pretrain-3.6M (3.6M tokens).")
    assert "at depth 50 % hardest" in said["Depth of the needle"]


def test_score_against_perplexity_is_described(run: Run) -> None:
    said = _by_heading(run)["Score against perplexity"]
    near = near_final(RunTables(run), 4096)
    assert near.checkpoint == "lccp-0.7M"
    assert near.loss_last < near.loss_then
    assert "first reaches 95 % of its final value (100 %) at lccp-0.7M (700K LCCP tokens)" in said
    assert "still falls from" in said
    assert "a description, not a test" in said


def _with_losses(path: Path, loss: float, right: bool) -> Run:
    def answer(i: int, result: CaseResult) -> CaseResult:
        losses = np.full(3, loss, np.float32)
        return CaseResult(result.case_id, result.layers, result.scores, losses, (1, 2, 3) if right else (0, 0, 0))

    return write_run(path, lengths=(256, 1024), n_needles=3, change=answer)


def test_nothing_copied_is_said_so(tmp_path: Path) -> None:
    said = _by_heading(_with_losses(tmp_path / "run", 2.0, right=False))["Score against perplexity"]
    assert said == "The NIAH score at 1K tokens ends at 0 %: no needle is copied. Nor is one at any other length."


def test_perplexity_that_does_not_fall_is_not_called_deceptive(tmp_path: Path) -> None:
    said = _by_heading(_with_losses(tmp_path / "run", 0.1, right=True))["Score against perplexity"]
    assert "does not fall any more" in said
    assert "deceptive" not in said


def test_no_heads_no_births(tmp_path: Path) -> None:
    def silence(i: int, result: CaseResult) -> CaseResult:
        scores = {metric: np.zeros_like(values) for metric, values in result.scores.items()}
        return CaseResult(result.case_id, result.layers, scores, result.answer_loss_nats, result.greedy_ids)

    run = write_run(tmp_path / "run", lengths=(256,), n_needles=3, change=silence)
    said = _by_heading(run)
    assert "0 of 32 heads are retrieval heads" in said["Number of retrieval heads"]
    assert "no head was born, and no head was lost" in said["Births and deaths"]
    assert "no head came to life" in write_report(run).read_text()


def test_cautions(run: Run, tmp_path: Path) -> None:
    assert cautions(RunTables(run)) == []
    unfinished = write_run(tmp_path / "run", lengths=(256,), n_needles=2, only=[0, 1])
    said = " ".join(cautions(RunTables(unfinished)))
    assert "not finished: 2 of 16 checkpoints" in said
    assert "fewer than three pairs" in said
    assert "at least three checkpoints" in said
    few = RunTables(write_run(tmp_path / "few", lengths=(256,), n_needles=4))
    assert "rest on 4 pairs of needle and haystack only" in " ".join(cautions(few))


def test_points_of_training_count_from_the_base(run: Run) -> None:
    tables = RunTables(run)
    assert when(tables, 3_700_000) == "100K LCCP tokens"
    assert when(tables, 2_500_000) == "2.5M tokens"


def test_report_is_one_file_without_requests(run: Run, text: str) -> None:
    assert len(text.encode()) < 8_000_000
    page = _Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert [path.name for path in run.path.iterdir() if path.suffix == ".tmp"] == []


def test_findings_come_before_figures_and_tables(text: str) -> None:
    order = ("findings", "levels", "checkpoints", "saturation", "heads", "lives", "causes", "correlation", "provenance")
    places = [text.index(f'<h2 id="{name}"') for name in order]
    assert places == sorted(places)


def test_report_holds_all_figures_with_data_and_captions(text: str) -> None:
    page = _Page(text)
    figures = [attributes for tag, attributes in page.elements if attributes.get("class") == "figure-data"]
    assert len(figures) == N_FIGURES
    places = {attributes.get("id") for _, attributes in page.elements}
    assert {figure["data-place"] for figure in figures} <= places
    loaded = [json.loads(script) for script in page.scripts[:N_FIGURES]]
    assert all(figure["data"] and figure["layout"]["height"] for figure in loaded)
    assert text.count("<figcaption>") == N_FIGURES


def test_published_numbers_are_labelled(text: str) -> None:
    assert "Published, for orientation: Hunyuan-A13B, arXiv 2604.02650, Table 5" in text
    assert "0.7316" in text
    assert "24/30" in text


def test_provenance_is_there(run: Run, text: str) -> None:
    assert run.manifest["config_hash"] in text
    assert run.manifest["versions"]["polars"] in text
    assert "1000 resamples over clusters, seed 0" in text


def test_names_from_a_run_cannot_become_markup(tmp_path: Path) -> None:
    names = [f"{EVIL}{i}&\"'" for i in range(16)]
    run = write_run(tmp_path / EVIL.replace("/", "|"), lengths=(256,), n_needles=3, names=names)
    text = write_report(run).read_text(encoding="utf-8")
    page = _Page(text)
    assert len([tag for tag, _ in page.elements if tag == "script"]) == N_FIGURES + 2
    assert "<script>alert" not in text
    assert EVIL in " ".join(page.words)
    for script in page.scripts[:N_FIGURES]:
        assert not re.search(r"[<>]", script)
        json.loads(script)


def test_report_goes_where_it_is_told_and_replaces_as_a_whole(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "page.html"
    assert write_report(run, out, length=256) == out
    assert "at 256 tokens" in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    with pytest.raises(LccpError, match="no cases of 7 tokens"):
        write_report(run, out, length=7)
    assert "at 256 tokens" in out.read_text()


def test_report_of_a_single_stage_and_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lengths=(256,), n_needles=1, only=[0])
    assert "Births and deaths need at least three checkpoints." in write_report(run).read_text()


def test_pieces_of_html() -> None:
    assert script_safe(json.dumps(EVIL)) == '"\\u003cscript\\u003ealert(1)\\u003c/script\\u003e"'
    assert json.loads(script_safe(json.dumps({"a": "<&>\u2028"}))) == {"a": "<&>\u2028"}
    assert prose("3-4, and <b>") == '<span class="nb">3-4</span>, and &lt;b&gt;'
    rows = table(("a<", "b"), [(None, "<x>")], appended=("More & more", [(1, 2)]))
    assert "a&lt;" in rows
    assert "<td>&lt;x&gt;</td>" in rows
    assert "–" in rows
    assert 'colspan="2">More &amp; more' in rows


@pytest.mark.browser
@pytest.mark.parametrize("width_px", [1280, 390])
def test_report_in_a_browser(run: Run, text: str, width_px: int) -> None:
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no Chromium on this machine; install it (apt-get install chromium) to look at the report")
    from playwright.sync_api import sync_playwright

    requests, problems = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width_px, "height": 800})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto((run.path / "report.html").as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 10")
        wide = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert wide <= width_px


def test_saturation_and_correlation_have_sections_with_reasons(run: Run, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "page.html", length=256).read_text()
    for link in ("saturation", "correlation"):
        assert f'href="#{link}"' in text
        assert f'id="{link}"' in text
    saturation, correlation = text.split('id="saturation"')[1].split('id="correlation"')
    assert "answer_ppl at 256 tokens" in saturation
    assert any(f"<li>niah_score at 256 tokens: {verdict}" in saturation for verdict in ("sat", "still", "cannot"))
    assert "The run holds no probe results" in correlation
    assert "mean_initial_score" in correlation
    assert "0.8552" in correlation  # Table 3: NIAH score against RULER
