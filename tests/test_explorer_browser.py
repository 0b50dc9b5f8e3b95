"""The head explorer in a real JupyterLab, in Chromium: mouse, keyboard, slider, and what Python sees of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import polars as pl
import pytest
from synthetic import write_run
from transformers import AutoTokenizer

from lccp_interp.schema import CaseResult

TOKEN = "explorer"
EVIL = "<img src=x onerror=window.hacked=1>"

pytestmark = pytest.mark.browser


def write_notebook(path: Path, *sources: str) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@contextlib.contextmanager
def jupyter_lab(root: Path, home: Path) -> Iterator[str]:
    """Address of a JupyterLab that serves `root`, with settings of its own in `home`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Nobody is there to answer whether news are wanted.
    settings = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    places = {name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    environment = os.environ | places | {"IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"}
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(home / "settings")
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={root}",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", f"--IdentityProvider.token={TOKEN}",
        "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--expose-app-in-browser",
    ]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(address, server, home / "log")
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)  # its kernels, too
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(10)


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=2).close()
            return
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start: {log.read_text()[-2000:]}")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine; install it (apt-get install chromium) to look at the explorer")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def open_notebook(page: Any, address: str, name: str) -> None:
    """Open a notebook without the side bar and run all of its cells."""
    page.goto(f"{address}/doc/tree/{name}?token={TOKEN}")
    page.wait_for_function("window.jupyterapp && document.querySelector('.jp-Notebook .jp-CodeCell')")
    page.wait_for_function(
        "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60_000
    )
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector(".lccp-explorer .lccp-cell", timeout=60_000)


NOTEBOOK = """
from lccp_interp import Run, load_model
from lccp_interp.figures.explorer import HeadExplorer
explorer = HeadExplorer(Run.open({run!r}), model=load_model({model!r}, device="cpu"))
explorer
"""


def lose_a_head(i: int, result: CaseResult) -> CaseResult:
    """Head 0-0 has no score at any checkpoint, head 2-1 none at the third."""
    scores = {name: values.copy() for name, values in result.scores.items()}
    for values in scores.values():
        values[0, 0] = np.nan
        values[2, 1] = np.nan if i == 2 else values[2, 1]
    return replace(result, scores=scores)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[str]:
    """A JupyterLab with `explore.ipynb` on a run whose names are markup, and a tiny model."""
    root = tmp_path_factory.mktemp("notebooks")
    run = write_run(
        tmp_path_factory.mktemp("explorer") / "run",
        names=[f"{EVIL}{i}" for i in range(16)],
        lengths=(256,),
        n_needles=3,
        change=lose_a_head,
    )
    # The needle's text, too, is markup.
    ids = AutoTokenizer.from_pretrained(checkpoint)(f"x{EVIL}").input_ids
    cases = pl.read_parquet(run.path / "cases.parquet")
    cases = cases.with_columns(
        prompt_ids=pl.Series([ids] * cases.height, dtype=pl.List(pl.Int32)), needle_id=EVIL + pl.col("needle_id")
    )
    cases.with_columns(needle_end=pl.lit(len(ids), pl.Int64)).write_parquet(run.path / "cases.parquet")
    write_notebook(
        root / "explore.ipynb",
        NOTEBOOK.format(run=str(run.path), model=str(checkpoint)),
        "import json; print('SELECTION', json.dumps(explorer.selection))",
        "explorer.layer, explorer.head = 2, 1; explorer.metric = 'copy'",
    )
    with jupyter_lab(root, tmp_path_factory.mktemp("home")) as address:
        yield address


def selection(page: Any) -> dict[str, Any]:
    """The selection as Python prints it, by running the second cell."""
    before = page.locator(".jp-CodeCell >> nth=1 >> .jp-InputPrompt").inner_text()
    run_cell(page, 1)
    page.wait_for_function(
        "old => { const text = document.querySelectorAll('.jp-CodeCell')[1].querySelector('.jp-InputPrompt').innerText;"
        " return text !== old && !text.includes('*'); }",
        arg=before,
    )
    printed = page.locator(".jp-CodeCell >> nth=1 >> .jp-OutputArea-output").inner_text()
    return json.loads(printed.removeprefix("SELECTION"))


def run_cell(page: Any, number: int) -> None:
    page.evaluate(
        """number => {
          const notebook = window.jupyterapp.shell.currentWidget.content;
          notebook.activeCellIndex = number;
          notebook.deselectAll();
          void window.jupyterapp.commands.execute('notebook:run-cell');
        }""",
        number,
    )


ACTIVE_CELL = "window.jupyterapp.shell.currentWidget.content.activeCellIndex"


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-label') || ''")


@pytest.mark.parametrize("width_px", [1280, 390])
def test_explorer_in_jupyterlab(lab: str, width_px: int) -> None:
    requests: list[str] = []
    problems: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width_px, "height": 1400})
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        open_notebook(page, lab, "explore.ipynb")
        explorer = page.locator(".lccp-explorer")

        # The third cell has run: what Python set is what the page shows.
        page.wait_for_selector('[role="gridcell"][aria-selected="true"][aria-label^="head 2-1: copy"]')
        assert explorer.get_by_label("Metric", exact=True).input_value() == "copy"

        lost = explorer.locator('[role="gridcell"][aria-label="head 0-0: copy undefined"]')
        assert "repeating-linear-gradient" in lost.evaluate("cell => getComputedStyle(cell).backgroundImage")
        assert explorer.locator("polyline").count() == 2  # the line is broken where there is no score

        # The mouse.
        explorer.locator('[role="gridcell"][aria-label^="head 1-0:"]').click()
        assert (selection(page)["layer"], selection(page)["head"]) == (1, 0)
        assert "Head 1-0 over training" in explorer.inner_text()

        # The keyboard: JupyterLab must not take the arrows for its cells.
        explorer.locator('[role="gridcell"][tabindex="0"]').focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        assert focused(page).startswith("head 2-1: copy 0.7")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        page.keyboard.press("Control+End")
        assert focused(page).startswith("head 3-7: ")
        chosen = selection(page)
        assert (chosen["layer"], chosen["head"], chosen["retrieval_head"]) == (2, 1, True)

        # The slider, by keys.
        page.get_by_label("Checkpoint", exact=True).focus()
        cell = page.evaluate(ACTIVE_CELL)
        page.keyboard.press("ArrowDown")
        assert page.get_by_label("Checkpoint", exact=True).input_value() == "14"
        assert page.evaluate(ACTIVE_CELL) == cell
        page.keyboard.press("Home")
        page.wait_for_timeout(400)
        assert selection(page)["checkpoint"] == f"{EVIL}0"
        assert selection(page)["score"] < 0.05
        assert page.get_by_label("Checkpoint", exact=True).get_attribute("aria-valuetext") == f"{EVIL}0, 500K tokens"

        # A case: Python is asked for its attention, and answers.
        page.get_by_label("Case of 256 tokens").select_option(index=1)
        page.wait_for_selector('.lccp-attention[aria-busy="false"] .lccp-text')
        assert page.locator(".lccp-needle .lccp-source .lccp-token").count() == 3
        assert EVIL in page.locator(".lccp-text .lccp-needle").text_content().replace("\n", "")
        assert EVIL in page.get_by_label("Case of 256 tokens").inner_text()
        page.get_by_label("Copy event").select_option("1")
        page.wait_for_selector('.lccp-attention[aria-busy="false"] .lccp-text .lccp-query')
        assert selection(page)["case_id"] == "niah-256-d0-s0-0"

        # A head that the tiny model does not have is a sentence, not a traceback.
        explorer.locator('[role="gridcell"][aria-label^="head 2-6:"]').click()
        page.wait_for_selector(".lccp-problem:has-text('has 4 heads in a layer')")

        assert explorer.evaluate("box => box.scrollWidth <= box.clientWidth")
        assert page.evaluate("window.hacked") is None
        assert explorer.locator("img").count() == 0
        assert EVIL in explorer.inner_text()
    assert problems == []
    assert [url for url in requests if not url.startswith((lab, lab.replace("http", "ws"), "data:", "blob:"))] == []
