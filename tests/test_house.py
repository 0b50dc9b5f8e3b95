"""The shape of the house: imports run one way along the data flow, and reading tables needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lccp_interp"
FLOW = (
    "schema", "checkpoints", "organism", "tasks", "capture", "scoring", "plan", "store", "imports", "sweep",
    "interventions", "behaviour", "dynamics", "figures", "report", "monitor", "study", "demo", "cli",
)  # fmt: skip
MAX_LINES = 600


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("lccp_interp.")}
    return rooms


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_down_the_flow(path):
    assert room(path) in FLOW, f"{room(path)} has no place in the flow; give it one"
    for other in imported_rooms(path):
        assert FLOW.index(other) <= FLOW.index(room(path)), f"{path.name} imports {other}, which is downstream"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_and_stays_readable(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= MAX_LINES


@pytest.mark.parametrize(
    "module",
    [
        "store",
        "imports",
        "checkpoints",
        "tasks.niah",
        "tasks.interference",
        "tasks.longbio",
        "tasks.ruler",
        "tasks.mrcr",
        "scoring.graders",
        "dynamics",
        "figures",
        "report",
        "monitor.watch",
        "demo",
        "cli",
    ],
)
def test_reading_tables_needs_no_torch(module):
    code = f"import sys, lccp_interp.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, lccp_interp; print(sorted(m for m in sys.modules if m.startswith('lccp_interp.')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
