"""What ships in data/: small enough, readable, and free of anything that belongs to one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from lccp_interp.checkpoints import bundled_trajectory
from lccp_interp.dynamics import census, lives, score_table
from lccp_interp.store import Run

DATA = Path(__file__).resolve().parents[1] / "data"


def test_the_bundled_trajectory_has_two_stages_and_enough_checkpoints():
    found = bundled_trajectory()
    assert len(found) >= 16
    assert [c.stage for c in found] == sorted((c.stage for c in found), reverse=True)
    assert {c.stage for c in found} == {"pretrain", "lccp"}
    assert all((Path(c.path) / "model.safetensors").stat().st_size < 1_000_000 for c in found)


def test_the_second_seed_was_scored_like_the_demo():
    run = Run.open(DATA / "second_seed")
    assert run.cases.height >= 100
    assert run.checkpoints.height == len(bundled_trajectory())
    assert not any(Path(path).is_absolute() for path in run.checkpoints["path"])
    table = score_table(run, length=1024)
    counted = census(table)["n_retrieval_heads"].to_list()
    assert counted[0] == 0
    assert counted[-1] >= 4
    assert lives(table).height >= 4


@pytest.mark.parametrize("folder", ["trajectory", "second_seed"])
def test_data_stays_small(folder):
    assert sum(file.stat().st_size for file in (DATA / folder).rglob("*") if file.is_file()) < 15_000_000
