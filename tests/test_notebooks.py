"""The notebooks run from top to bottom, on a run that is there and from the bundled checkpoints."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from synthetic import write_run

from lccp_interp.checkpoints import bundled_trajectory
from lccp_interp.schema import LccpError

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
EXPLORE = NOTEBOOKS / "01_explore_heads.ipynb"

# Messaging between kernel and client leaves sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def _execute(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    return NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()


def _shown(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """Types of what each code cell shows."""
    return [
        {kind for output in cell.outputs for kind in output.get("data", {})}
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_notebooks_are_kept_without_outputs() -> None:
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs"), path.name
        assert path.stat().st_size < 50_000


def test_explore_heads_on_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", n_needles=4)
    monkeypatch.setenv("LCCP_NOTEBOOK_RUN", str(run.path))
    shown = _shown(_execute(EXPLORE))
    assert sum("image/png" in kinds for kinds in shown) == 3
    assert sum("application/vnd.plotly.v1+json" in kinds for kinds in shown) == 1
    assert sum("text/html" in kinds for kinds in shown) >= 4


def test_explore_heads_from_the_bundled_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        bundled_trajectory()
    except LccpError as missing:
        pytest.skip(str(missing))
    monkeypatch.setenv("LCCP_NOTEBOOK_RUN", str(tmp_path / "none"))
    monkeypatch.setenv("LCCP_NOTEBOOK_SAMPLES", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert len(_shown(_execute(EXPLORE))) == 8
