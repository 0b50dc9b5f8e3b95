"""Tiny random models and checkpoint folders, built from configs; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lccp_interp.organism.tokenizer import save_tokenizer

torch.set_num_threads(1)


def tiny_model(model_type: str, *, seed: int = 0, vocab_size: int = 700, **changes: object) -> torch.nn.Module:
    """A random decoder of `model_type` with 3 layers and 4 heads; large weights make its attention uneven."""
    from transformers import AutoConfig

    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 8192,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model_type == "hunyuan_v1_moe":
        settings |= {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 24}
    if model_type == "gemma3_text":
        settings |= {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """Function (name, seed, **config changes) -> folder of a tiny random Llama with the organism's tokenizer."""

    def make(name: str = "step-1", *, seed: int = 0, root: Path | None = None, **changes: object) -> Path:
        folder = (root or tmp_path_factory.mktemp("checkpoints")) / name
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(folder)
        vocab_size = len(AutoTokenizer.from_pretrained(folder))
        tiny_model("llama", seed=seed, vocab_size=vocab_size, **changes).save_pretrained(folder)
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
