"""The wheel holds what the demo needs and runs without the checkout; dependencies are bounded by what was tested."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"]]
OPTIONAL = [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_the_trajectory(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    own = [path for path in (ROOT / "lccp_interp").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in own} >= {".py", ".js", ".css", ".typed"}
    for path in own:
        assert str(path.relative_to(ROOT)) in names
    trajectory = ROOT / "data" / "trajectory"
    for path in trajectory.rglob("*"):
        if path.is_file():
            inside = f"lccp_interp/organism/trajectory/{path.relative_to(trajectory)}"
            assert zipfile.ZipFile(wheel).read(inside) == path.read_bytes()
    assert {name.split("/")[0] for name in names} == {"lccp_interp", f"lccp_interp-{PROJECT['version']}.dist-info"}
    assert wheel.stat().st_size < 20 * 2**20


def test_the_wheel_runs_without_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    study = tmp_path / "study.yaml"
    study.write_text(
        "out: run\ncheckpoints: bundled\nmetrics: [retrieval]\nfigures: false\nreport: true\n"
        "tasks: [{task: niah, lengths: [128], depths: [50], samples: 2}]\n"
    )
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert python("-c", "import lccp_interp; print(lccp_interp.__file__)").startswith(str(site))
    assert "100% scored" in python("-m", "lccp_interp.cli", "run", "study.yaml")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("requirement", REQUIRED + OPTIONAL, ids=str)
def test_every_dependency_is_bounded_on_both_sides(requirement):
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators == {">=", "<"}, f"{requirement} wants the versions it was tested with"


def locked() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): Version(version) for name, _, version in pins}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("requirement", REQUIRED + OPTIONAL, ids=str)
def test_the_tested_set_is_within_the_bounds(requirement):
    version = locked().get(normal(requirement.name))
    if version is None:
        # Named in the lock's head: what `make test` does not install.
        assert normal(requirement.name) == "lm-eval"
        return
    assert requirement.specifier.contains(version), f"requirements.lock has {requirement.name} {version}"


def test_the_lock_pins_all_it_names_and_the_makefile_has_its_torch():
    pins = locked()
    assert len(pins) > 100
    torch = re.search(r"^TORCH\s*\?= torch==(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    assert pins["torch"].public == torch[1]
