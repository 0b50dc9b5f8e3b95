"""The command line as a newcomer and as a script meet it: help, JSON, one-line errors, exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lccp_interp import cli

GRID = ["--lengths", "128,192", "--depths", "0,100", "--samples", "2"]


@pytest.fixture(scope="module")
def scored(trajectory, tmp_path_factory):
    from lccp_interp.sweep import score

    out = tmp_path_factory.mktemp("cli") / "run"
    score(trajectory, out, lengths=[128, 192], depths=[0, 100], samples=2)
    return out


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["demo"],
        ["score"],
        ["plan"],
        ["check"],
        ["heads"],
        ["compare"],
        ["import"],
        ["figures"],
        ["report"],
        ["correlate"],
        ["budget"],
        ["saturation"],
        ["verify"],
        ["probe"],
        ["ablate"],
        ["across"],
        ["organism", "train"],
    ],
)
def test_every_command_explains_itself(lccp, command):
    code, out, _ = lccp(*command, "--help")
    assert code == 0
    assert "Usage: lccp" in out


def test_help_imports_nothing_heavy():
    heavy = ("torch", "transformers", "polars", "plotly", "matplotlib")
    code = f"import sys, lccp_interp.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_score_then_heads(lccp, trajectory, tmp_path):
    code, out, _ = lccp("score", trajectory, "--out", tmp_path / "run", *GRID, "--format", "json")
    assert code == 0
    summary = json.loads(out)
    assert summary["cases"] == 8
    assert summary["checkpoints"] == ["pretrain-0", "lccp-1", "lccp-2"]
    code, out, _ = lccp("heads", tmp_path / "run", "--format", "json")
    records = json.loads(out)
    assert code == 0
    assert len(records) == 3 * 12
    assert set(records[0]) >= {
        "checkpoint", "tokens_seen", "metric", "layer", "head", "score", "ci_low", "ci_high", "n",
    }  # fmt: skip
    assert [r["score"] for r in records] == sorted((r["score"] for r in records), reverse=True)


def test_heads_formats_and_filters(lccp, scored):
    _, out, _ = lccp(
        "heads", scored, "--format", "csv", "--checkpoint", "last", "--top", "5", "--metric", "needle_mass"
    )
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 5
    assert {row["checkpoint"] for row in rows} == {"lccp-2"}
    _, out, err = lccp("heads", scored)
    assert "score" in out
    assert "more (--top 0 shows all)" in err


def test_figures_and_report(lccp, scored, tmp_path):
    code, out, _ = lccp("figures", scored, "--out", tmp_path, "--formats", "svg")
    assert code == 0
    files = [Path(line) for line in out.splitlines()]
    assert len(files) >= 6
    assert all(file.stat().st_size > 0 for file in files)
    code, out, _ = lccp("report", scored, "--out", tmp_path / "report.html")
    assert code == 0
    assert "</html>" in (tmp_path / "report.html").read_text()


def damaged(checkpoint, tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    change(folder)
    return folder


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def write(path, text):
    path.write_text(text)
    return path


def replace_text(file, old, new):
    file.write_text(file.read_text().replace(old, new))


def break_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NEEDLE = '{"needle": "x is one two.", "question": "x?", "answer": "one two"}'

# (what is wrong, arguments made from (checkpoint folder, tmp_path), text that the message must hold)
BAD_INPUT = {
    "no such folder": (lambda c, t: [t / "none"], "no checkpoint folder at"),
    "no weights": (lambda c, t: [damaged(c, t, lambda f: (f / "model.safetensors").unlink())], "has no weights"),
    "no tokenizer": (lambda c, t: [damaged(c, t, lambda f: (f / "tokenizer.json").unlink())], "has no tokenizer"),
    "truncated": (lambda c, t: [damaged(c, t, lambda f: truncate(f / "model.safetensors"))], "truncated or damaged"),
    "unknown model type": (
        lambda c, t: [damaged(c, t, lambda f: replace_text(f / "config.json", '"llama"', '"llamoid"'))],
        "llamoid",
    ),
    "needle field missing": (
        lambda c, t: [c, "--needles", write(t / "n.jsonl", NEEDLE + '\n{"needle": "x"}')],
        "n.jsonl:2: field 'question' is missing",
    ),
    "needle field empty": (
        lambda c, t: [c, "--needles", write(t / "n.jsonl", NEEDLE.replace('"x?"', '""'))],
        "n.jsonl:1: a needle's field 'question' must be a non-empty string",
    ),
    "answer not in needle": (
        lambda c, t: [c, "--needles", write(t / "n.jsonl", NEEDLE.replace('"one two"', '"three"'))],
        "the answer 'three' is not part of its needle",
    ),
    "empty haystack": (lambda c, t: [c, "--haystack", write(t / "h.txt", " \n")], "is empty"),
    "short haystack": (
        lambda c, t: [c, "--haystack", write(t / "h.txt", "Too short."), "--lengths", "256"],
        "tokens, ",
    ),
    "length without room": (lambda c, t: [c, "--lengths", "12"], "has no room for a context"),
    "depth out of range": (lambda c, t: [c, "--depths", "0,120"], "depth 120 is outside 0-100"),
    "depth no number": (lambda c, t: [c, "--depths", "mid"], "--depths: 'mid' is no number"),
    "length no number": (lambda c, t: [c, "--lengths", "long"], "'long' is no number of tokens"),
    "unknown metric": (lambda c, t: [c, "--metrics", "retreival"], "did you mean 'retrieval'?"),
    "bad token table": (lambda c, t: [c, "--tokens", "abc"], "write NAME=COUNT"),
    "bad device": (lambda c, t: [c, "--device", "quantum"], "device 'quantum' cannot be used"),
    "NaN logits": (lambda c, t: [damaged(c, t, break_weights)], "logits are NaN"),
    "other files in the folder": (
        lambda c, t: [c] if write(t / "run" / "notes.txt", "mine") else [],
        "holds files but no run",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line_and_exit_code_2(lccp, checkpoint, tmp_path, name):
    build, message = BAD_INPUT[name]
    if name == "other files in the folder":
        (tmp_path / "run").mkdir()
    arguments = build(checkpoint, tmp_path)
    grid = [] if "--lengths" in arguments else ["--lengths", "128"]
    code, out, err = lccp("score", *arguments, *grid, "--out", tmp_path / "run")
    assert code == 2
    assert message in err
    assert err.startswith("lccp: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err + out


def test_another_study_in_the_folder(lccp, trajectory, scored):
    code, _, err = lccp("score", trajectory, "--out", scored, "--lengths", "256")
    assert code == 2
    assert "holds another study" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heads", "nowhere"], "no run at nowhere"),
        (["report", "nowhere"], "no run at nowhere"),
        (["figures", "nowhere"], "no run at nowhere"),
    ],
)
def test_commands_on_no_run(lccp, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = lccp(*arguments)
    assert code == 2
    assert message in err


def test_mistakes_after_scoring(lccp, scored):
    for arguments, message in [
        (["heads", scored, "--metric", "retreival"], "retrieval"),
        (["heads", scored, "--length", "999"], "128, 192"),
        (["heads", scored, "--checkpoint", "first"], "unknown checkpoint 'first' in"),
        (["figures", scored, "--formats", "gif"], "unknown figure format 'gif'; known: pdf, svg, png"),
        (["report", scored, "--length", "999"], "128, 192"),
    ]:
        code, _, err = lccp(*arguments)
        assert code == 2, arguments
        assert message in err
        assert err.count("\n") == 1


def test_debug_shows_the_traceback(capsys, monkeypatch):
    from lccp_interp.schema import LccpError

    monkeypatch.setattr(sys, "argv", ["lccp", "heads", "nowhere", "--debug"])
    with pytest.raises(LccpError, match="no run at nowhere"):
        cli.main()


def test_ctrl_c_keeps_finished_parts_and_says_how_to_resume(trajectory, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lccp_interp.cli", "score", str(trajectory), "--out", str(out)]
    command += ["--lengths", "2048", "--samples", "40", "--depths", "0,50,100"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(out.glob("scores/*.parquet")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "interrupted" in err
    assert "resumes" in err
    assert "Traceback" not in err
    assert list(out.glob("scores/*.parquet"))
    assert not list(out.rglob("*.tmp"))
