"""The notebooks run from top to bottom, and what is kept of them is small, whole and says nothing of a machine."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from synthetic import write_run

from lccp_interp.checkpoints import bundled_trajectory
from lccp_interp.schema import LccpError

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
EXPLORE = NOTEBOOKS / "01_explore_heads.ipynb"
KEPT_EXECUTED = sorted(set(NOTEBOOKS.glob("*.ipynb")) - {EXPLORE})
FINE_TUNING = re.compile(r"\bprobe\(")

# Messaging between kernel and client leaves sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def _read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def _execute(path: Path) -> nbformat.NotebookNode:
    return NotebookClient(_read(path), timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _shown(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """Types of what each code cell shows; streams by their names."""
    return [
        {kind for output in cell.outputs for kind in output.get("data", [output.get("name", output.output_type)])}
        for cell in _code(notebook)
    ]


def _need_bundled() -> None:
    try:
        bundled_trajectory()
    except LccpError as missing:
        pytest.skip(str(missing))


def test_explore_heads_is_kept_without_outputs() -> None:
    # It shows the reader's own run/demo where there is one.
    assert not any(cell.outputs for cell in _code(_read(EXPLORE)))


@pytest.mark.parametrize("path", KEPT_EXECUTED, ids=lambda path: path.stem)
def test_kept_outputs_are_whole_and_small(path: Path) -> None:
    cells = _code(_read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < 400_000
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} <= {"stdout"}
    text = path.read_text(encoding="utf-8")
    places = (tempfile.gettempdir(), str(Path.home()), str(NOTEBOOKS.parent))
    for telling in (*places, "Warning", "plotly.js"):
        assert telling not in text


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_links_between_files_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in _read(path).cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", KEPT_EXECUTED, ids=lambda path: path.stem)
def test_notebook_shows_again_what_is_kept_of_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _need_bundled()
    kept = _read(path)
    if any(FINE_TUNING.search(cell.source) for cell in _code(kept)) and importlib.util.find_spec("trl") is None:
        pytest.skip("fine-tuning needs the extra `train`")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert _shown(_execute(path)) == _shown(kept)


def test_explore_heads_on_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", n_needles=4)
    monkeypatch.setenv("LCCP_NOTEBOOK_RUN", str(run.path))
    shown = _shown(_execute(EXPLORE))
    assert sum("image/png" in kinds for kinds in shown) == 3
    assert sum("application/vnd.plotly.v1+json" in kinds for kinds in shown) == 1
    assert sum("text/html" in kinds for kinds in shown) >= 4


def test_explore_heads_from_the_bundled_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _need_bundled()
    monkeypatch.setenv("LCCP_NOTEBOOK_RUN", str(tmp_path / "none"))
    monkeypatch.setenv("LCCP_NOTEBOOK_SAMPLES", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert len(_shown(_execute(EXPLORE))) == 8
