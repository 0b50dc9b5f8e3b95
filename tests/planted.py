"""A transformer made by hand that retrieves with exactly one head: nothing is trained, every weight follows from codes.

GPT-2 with two layers of four heads. Each token and each position has a code, `CODE` numbers of +1 and -1 that add up to
0; the residual stream has one block of width `CODE` for each thing that is known about a position:

    token | own position | position before | token before | what to say next

Layer 0, head 0 attends to the position before (its query is the code of the position before, its keys are the codes of
positions) and writes that token's code into the block *token before*. Layer 1, head 3 is an induction head: its query
is the code of the token, its keys are the codes of the tokens before, so it attends to what followed this token earlier
and writes it into *what to say next*, which the unembedding reads. That head copies the needle; no other writes
anything, and they attend to the first position, to their own, or to the one before. Blocks have mean 0 and one norm
each, so layer norm is a known constant at every place, which the weights undo. The MLPs are zero.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lccp_interp.organism.language import PIECES
from lccp_interp.organism.tokenizer import save_tokenizer
from lccp_interp.schema import Needle

CODE = 64
BLOCKS = ("token", "position", "position_before", "token_before", "next")
N_LAYERS, N_HEADS, N_POSITIONS = 2, 4, 512
D_MODEL = CODE * len(BLOCKS)
D_HEAD = D_MODEL // N_HEADS
COPY_HEAD = (1, 3)
SHARPNESS = 12.0
"""Of queries: two codes share at most about 36 of 64, so the right key leads by more than 40 nats."""

ROLES = {
    (0, 0): "previous", (0, 1): "first", (0, 2): "self", (0, 3): "first",
    (1, 0): "previous", (1, 1): "self", (1, 2): "first", (1, 3): "induction",
}  # fmt: skip
WRITES = {(0, 0): "token_before", (1, 3): "next"}
QUERY_AND_KEY = {
    "previous": ("position_before", "position"),
    "self": ("position", "position"),
    "induction": ("token", "token_before"),
}

ANSWERS = (
    "amber river stone candle cedar",
    "lemon falcon meadow thunder walnut",
    "copper garden orchid tiger marble",
)
CUE = " exactly"
NEEDLES = tuple(Needle(f"The motto was{CUE} {answer}.", "What was the motto?", answer) for answer in ANSWERS)
PROMPT = "{context}\n{question}\nThe motto was" + CUE
"""Ends with the word that stands before the answer in the needle, so that the first token can be copied, too."""


def codes(n: int, rng: np.random.Generator) -> torch.Tensor:
    """`n` codes `[n, CODE]` of +1 and -1, as many of one as of the other."""
    balanced = np.repeat([1.0, -1.0], CODE // 2)
    return torch.tensor(np.stack([rng.permutation(balanced) for _ in range(n)]), dtype=torch.float32)


def block(name: str) -> slice:
    """Where a block lies in the residual stream."""
    start = CODE * BLOCKS.index(name)
    return slice(start, start + CODE)


def planted_model(n_tokens: int, *, seed: int = 0) -> GPT2LMHeadModel:
    """The model of this module for a vocabulary of `n_tokens`; `seed` draws the codes."""
    config = GPT2Config(
        vocab_size=n_tokens,
        n_positions=N_POSITIONS,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_inner=8,
        layer_norm_epsilon=1e-8,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    rng = np.random.default_rng(seed)
    tokens, positions = codes(n_tokens, rng), codes(N_POSITIONS, rng)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight[:, block("token")] = tokens
        model.transformer.wpe.weight[:, block("position")] = positions
        # The first position has none before it and attends to itself.
        model.transformer.wpe.weight[:, block("position_before")] = positions[[0, *range(N_POSITIONS - 1)]]
        model.lm_head.weight[:, block("next")] = tokens
        for (layer, head), role in ROLES.items():
            # Three blocks are filled when layer 0 reads, four when layer 1 does; layer norm divides by this.
            std = ((3 + layer) * CODE / D_MODEL) ** 0.5
            attention = model.transformer.h[layer].attn
            q, k, v = (
                slice(part * D_MODEL + head * D_HEAD, part * D_MODEL + head * D_HEAD + CODE) for part in range(3)
            )
            same = torch.eye(CODE)
            if role == "first":
                attention.c_attn.bias[q] = SHARPNESS * positions[0]
                attention.c_attn.weight[block("position"), k] = std * same
            else:
                query, key = QUERY_AND_KEY[role]
                attention.c_attn.weight[block(query), q] = SHARPNESS * std * same
                attention.c_attn.weight[block(key), k] = std * same
            if (layer, head) in WRITES:
                attention.c_attn.weight[block("token"), v] = std * same
                attention.c_proj.weight[head * D_HEAD : head * D_HEAD + CODE, block(WRITES[layer, head])] = same
    return model


def save_planted(folder: Path, *, seed: int = 0, copies: bool = True) -> Path:
    """Write the model as a checkpoint folder with the organism's tokenizer; without `copies`, its head looks anywhere.

    What is taken out then is the copy head's query: all its scores are equal, so it spreads over all positions.
    """
    folder.mkdir(parents=True)
    save_tokenizer(folder)
    model = planted_model(len(AutoTokenizer.from_pretrained(folder)), seed=seed)
    if not copies:
        layer, head = COPY_HEAD
        with torch.no_grad():
            model.transformer.h[layer].attn.c_attn.weight[:, head * D_HEAD : (head + 1) * D_HEAD] = 0.0
    model.save_pretrained(folder)
    return folder


def save_trajectory(root: Path, copies: list[bool]) -> Path:
    """A trajectory of planted models; where `copies` is false the copy head's query is taken out."""
    entries = []
    for number, able in enumerate(copies):
        name = f"step-{number}"
        save_planted(root / name, copies=able)
        # Equal weights at every step are meant: the config tells them apart, so that nobody is warned of a mistake.
        config = root / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "step": number}))
        entries.append({"name": name, "path": name, "tokens_seen": 1000 * number, "stage": "train"})
    (root / "trajectory.json").write_text(json.dumps({"name": "planted", "checkpoints": entries}))
    return root


def filler(n_sentences: int, *, seed: int = 0) -> str:
    """Sentences of the organism's words that hold no word of a needle or of the prompt."""
    taken = set(" ".join([*(needle.needle for needle in NEEDLES), PROMPT]).replace(".", " ").split())
    words = [piece[1:] for piece in PIECES if piece[0] == " " and piece[1:].isalpha() and piece[1:] not in taken]
    rng = np.random.default_rng(seed)
    return " ".join(" ".join(["The", *rng.choice(words, 7)]) + "." for _ in range(n_sentences))
