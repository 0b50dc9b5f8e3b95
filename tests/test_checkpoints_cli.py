"""The command line's way to checkpoints: `lccp checkpoints`, and the sources of other commands."""

from __future__ import annotations

import csv
import io
import json

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from lccp_interp.checkpoints import parse_bytes
from lccp_interp.cli import main  # noqa: F401  # registers the commands
from lccp_interp.cli.sources import search_options
from lccp_interp.cli.terminal import app
from lccp_interp.schema import LccpError
from tests.fake_hub import FakeHub

REPOSITORY = "EleutherAI/pythia-14m"


@pytest.fixture
def hub(make_checkpoint, monkeypatch, tmp_path, tmp_path_factory):
    root = tmp_path_factory.mktemp("revisions")
    with FakeHub() as fake:
        for step in (1, 2, 3):
            fake.add(REPOSITORY, f"step{step}", make_checkpoint(f"step{step}", seed=step, root=root))
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "own-cache"))
        monkeypatch.setenv("LCCP_CACHE", str(tmp_path / "cache"))
        yield fake


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_checkpoints_lists_what_a_hub_has(hub):
    records = json.loads(run("checkpoints", REPOSITORY, "--format", "json").stdout)
    assert [(one["name"], one["tokens_seen"], one["source"]) for one in records] == [
        (f"step{step}", step * 2_097_152, f"{REPOSITORY}@step{step}") for step in (1, 2, 3)
    ]
    assert all(len(one["hash"]) == 64 and one["bytes"] > 10_000 and one["fault"] == "" for one in records)
    rows = list(csv.DictReader(io.StringIO(run("checkpoints", f"{REPOSITORY}@step2", "--format", "csv").stdout)))
    assert [row["name"] for row in rows] == ["step2"]
    table = run("checkpoints", REPOSITORY, "--revisions", "step[13]").stdout
    assert "step1" in table
    assert "step2" not in table


def test_checkpoints_lists_folders_that_are_broken(trajectory, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    records = json.loads(run("checkpoints", trajectory, tmp_path, "--format", "json").stdout)
    assert [one["name"] for one in records] == ["pretrain-0", "lccp-1", "lccp-2", "broken"]
    assert "is no model config" in records[-1]["fault"]


def test_score_takes_revisions_and_a_budget(hub, tmp_path):
    (tmp_path / "tokens.csv").write_text("name,tokens\nstep1,1000\nstep2,2000\nelsewhere,3\n")
    size = json.loads(run("checkpoints", REPOSITORY, "--format", "json").stdout)[0]["bytes"]
    grid = ["--lengths", "128", "--depths", "50", "--samples", "1", "--device", "cpu", "--no-self-check"]
    source, budget = f"{REPOSITORY}@step1,step2", ["--disk-budget", str(2 * size)]
    run("score", source, "--out", tmp_path / "run", *grid, "--tokens", tmp_path / "tokens.csv", *budget)
    written = json.loads((tmp_path / "run" / "run.json").read_text())["checkpoints"]
    assert [(one["name"], one["tokens_seen"], one["source"]) for one in written] == [
        (f"step{step}", step * 1000, f"{REPOSITORY}@step{step}") for step in (1, 2)
    ]
    assert (hub.refs[REPOSITORY]["step1"], "model.safetensors") in hub.sent
    assert (hub.refs[REPOSITORY]["step3"], "model.safetensors") not in hub.sent


def test_check_and_plan_take_revisions(hub):
    checked = json.loads(run("check", f"{REPOSITORY}@step2", "--device", "cpu", "--format", "json").stdout)
    assert [(one["checkpoint"], one["passed"]) for one in checked] == [("step2", True)]
    sent = sum(n for (_, name), n in hub.sent.items() if name.endswith("safetensors"))
    planned = run("plan", f"{REPOSITORY}@step1,step3", "--lengths", "128", "--memory", "8").stdout
    assert "step1" in planned
    assert sum(n for (_, name), n in hub.sent.items() if name.endswith("safetensors")) == sent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ["=3"], "tokens_per_step": "x"}, "'x' is no number of tokens"),
        ({"tokens_per_step": "stage1=4M,8M"}, "--tokens-per-step '8M': write NAME=COUNT, like stage2=4M"),
        ({"stage_before": ["stage2"]}, "--stage-before 'stage2': write NAME=COUNT, like stage2=3.9T"),
        ({"tokens": ["nowhere.csv"]}, "nowhere.csv is no table of tokens"),
        ({"revisions": " ,"}, "--revisions is empty"),
    ],
)
def test_options_that_cannot_be_read(options, message):
    with pytest.raises(LccpError, match=message):
        search_options(**options)


@pytest.mark.parametrize("text", ["lots", "40iB", "-3GB", ""])
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(LccpError, match="is no size; write it like 40GB"):
        parse_bytes(text)


def test_a_folder_that_is_not_there_is_no_list(tmp_path):
    assert "no checkpoint folder at" in run("checkpoints", tmp_path / "none", code=2).stderr
