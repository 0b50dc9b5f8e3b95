"""Tiny random models and checkpoint folders, built from configs; nothing is downloaded."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lccp_interp import cli
from lccp_interp.capture import architectures
from lccp_interp.organism.tokenizer import save_tokenizer

torch.set_num_threads(1)


def tiny_model(
    model_type: str, *, seed: int = 0, weight_std: float | None = None, **changes: object
) -> torch.nn.Module:
    """A random decoder of `model_type` out of the table of architectures, with 3 layers and 4 heads."""
    architecture = architectures.named(model_type)
    if weight_std is not None:
        architecture = dataclasses.replace(architecture, weight_std=weight_std)
    if "layer_types" in architecture.changes:
        changes = {"layer_types": list(architecture.changes["layer_types"])[:3], **changes}
    return architectures.tiny_model(architecture, seed=seed, num_hidden_layers=3, **changes)


@pytest.fixture
def lccp(capsys, monkeypatch):
    """Runs the command line in this process; gives (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lccp", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """Function (name, seed, **config changes) -> folder of a tiny random Llama with the organism's tokenizer."""

    def make(name: str = "step-1", *, seed: int = 0, root: Path | None = None, **changes: object) -> Path:
        folder = (root or tmp_path_factory.mktemp("checkpoints")) / name
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(folder)
        vocab_size = len(AutoTokenizer.from_pretrained(folder))
        # Weights large enough that heads attend to single tokens.
        model = tiny_model("llama", seed=seed, weight_std=0.3, vocab_size=vocab_size, **changes)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint) -> Path:
    """One tiny random checkpoint folder; do not change it."""
    return make_checkpoint("tokens-1M", seed=1)


@pytest.fixture(scope="session")
def trajectory(make_checkpoint, tmp_path_factory) -> Path:
    """Folder of three tiny random checkpoints with a trajectory.json; do not change it."""
    root = tmp_path_factory.mktemp("trajectory")
    entries = []
    for index, stage in enumerate(["pretrain", "lccp", "lccp"]):
        name = f"{stage}-{index}"
        make_checkpoint(name, seed=10 + index, root=root)
        entries.append({"name": name, "path": name, "tokens_seen": 1000 * (index + 1), "stage": stage})
    (root / "trajectory.json").write_text(json.dumps({"name": "tiny", "checkpoints": entries}))
    return root


@pytest.fixture(scope="session")
def tokenizer(checkpoint) -> PreTrainedTokenizerBase:
    """The organism's tokenizer."""
    return AutoTokenizer.from_pretrained(checkpoint)
