"""A whole study of revisions on a hub: scored, asked and robbed of heads, with the room of two checkpoints."""

from __future__ import annotations

import contextlib
import shutil

import pytest
from huggingface_hub import constants

from lccp_interp.checkpoints import hub as hub_client
from lccp_interp.checkpoints.shelf import default_cache
from lccp_interp.interventions.causal import ablate_heads
from lccp_interp.interventions.tracing import trace_circuit
from lccp_interp.schema import LccpError
from lccp_interp.store import Run
from lccp_interp.study import check_study, run_study
from tests.fake_hub import FakeHub

REPOSITORY = "EleutherAI/pythia-14m"


@pytest.fixture
def hub(make_checkpoint, tmp_path_factory, tmp_path, monkeypatch):
    root = tmp_path_factory.mktemp("hub-study")
    with FakeHub() as fake:
        for step in (1, 2, 3):
            fake.add(REPOSITORY, f"step{step}", make_checkpoint(f"step{step}", seed=40 + step, root=root))
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        url = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "own-cache"))
        monkeypatch.setattr(hub_client, "_FIRST_PAUSE_SECONDS", 0.0)
        monkeypatch.setenv("LCCP_CACHE", str(tmp_path / "default-cache"))
        fake.n_weight_bytes = (root / "step1" / "model.safetensors").stat().st_size
        yield fake


def study_of(tmp_path, hub, **changes):
    return check_study(
        {
            "out": str(tmp_path / "run"),
            "checkpoints": {
                "sources": [f"{REPOSITORY}@step*"],
                "cache": str(tmp_path / "cache"),
                "disk_budget": str(2 * hub.n_weight_bytes),
            },
            "tasks": [{"task": "niah", "lengths": [96], "depths": [50], "samples": 2}],
            "metrics": ["retrieval"],
            "figures": False,
            "report": False,
            **changes,
        }
    )


def silent(study):
    return run_study(study, bar=lambda name: contextlib.nullcontext(lambda done, total, message: None))


def weights_in(folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_a_study_of_revisions_is_scored_asked_and_robbed_of_heads(hub, tmp_path):
    stages = {
        "probes": [
            {"probe": "corpus", "corpora": ["stories"], "length": 64, "documents": 2},
            {"probe": "ask", "sft": False, "tasks": ["longbio-standard"], "lengths": [320], "samples": 1, "k": 0},
        ],
        "ablations": [{"k": [1], "n_cases": 2, "n_draws": 1, "checkpoints": "ends"}],
    }
    run = silent(study_of(tmp_path, hub, **stages))
    assert run.checkpoints["source"].to_list() == [f"{REPOSITORY}@step{step}" for step in (1, 2, 3)]
    assert run.scores.collect()["checkpoint"].n_unique() == 3
    probed = run.probes.collect()
    assert set(probed["benchmark"]) >= {"corpus-ppl", "LongBio-style"}
    assert set(probed["checkpoint"]) == {"step1", "step2", "step3"}
    trace_circuit(run, [(1, 0)], n_cases=2)
    # Asking again obeys the study's cache and its budget.
    assert weights_in(tmp_path / "cache") <= 2 * hub.n_weight_bytes
    assert not (tmp_path / "default-cache").exists()
    sent = hub.sent.copy()
    silent(study_of(tmp_path, hub, **stages))
    assert {key: n for key, n in (hub.sent - sent).items() if key[1].endswith(".safetensors")} == {}


def test_a_run_of_revisions_is_found_again_after_its_cache_is_gone(hub, tmp_path):
    run = silent(study_of(tmp_path, hub))
    shutil.rmtree(tmp_path / "cache")
    rows = ablate_heads(run.path, k=[1], n_cases=2, n_draws=1, checkpoints="last")
    assert set(rows["checkpoint"]) == {"step3"}
    assert weights_in(default_cache()) == hub.n_weight_bytes
    assert not (tmp_path / "cache").exists()


def test_a_revision_that_was_replaced_is_refused(hub, make_checkpoint, tmp_path):
    run = silent(study_of(tmp_path, hub))
    shutil.rmtree(tmp_path / "cache")
    hub.add(REPOSITORY, "step3", make_checkpoint("step3", seed=99, root=tmp_path / "other"))
    with pytest.raises(LccpError, match=r"'step3'.* has other weights now than those scored"):
        ablate_heads(run.path, k=[1], n_cases=2, n_draws=1, checkpoints="last")
    assert Run.open(run.path).manifest.get("ablations", []) == []  # refused before anything was begun


def test_the_commit_that_was_scored_is_found_again_whatever_its_name_means_now(hub, make_checkpoint, tmp_path):
    """Also of several repositories, whose revisions go by longer names."""
    other = "EleutherAI/pythia-31m"
    hub.add(other, "step9", make_checkpoint("step9", seed=49, root=tmp_path / "other"))
    study = study_of(tmp_path, hub)
    sources = {"sources": [f"{REPOSITORY}@step1", f"{other}@step9"], "cache": str(tmp_path / "cache")}
    run = silent(study.model_copy(update={"checkpoints": study.checkpoints.model_copy(update=sources)}))
    assert run.checkpoints["name"].to_list() == ["pythia-14m@step1", "pythia-31m@step9"]
    shutil.rmtree(tmp_path / "cache")
    hub.refs[other]["step9"] = hub.refs[REPOSITORY]["step2"]  # moved on to other weights
    hub.trees[other, hub.refs[other]["step9"]] = hub.trees[REPOSITORY, hub.refs[REPOSITORY]["step2"]]
    rows = ablate_heads(run.path, k=[1], n_cases=2, n_draws=1, checkpoints="all")
    assert set(rows["checkpoint"]) == {"pythia-14m@step1", "pythia-31m@step9"}
