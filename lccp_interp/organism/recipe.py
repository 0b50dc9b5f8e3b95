"""The organism's recipe: sizes, stages and checkpoints, as frozen data that is written into every trajectory.

What it does: names what is trained and for how long. What it refuses to know: how (:mod:`lccp_interp.organism.train`).
What it costs: nothing to import; ``small`` takes about 730 CPU seconds to follow.

All counts are in tokens and every step of a stage takes the same number of them, so a checkpoint at N tokens is a
checkpoint at an exact step, fixed before the run begins.

How ``small`` was chosen: from about a dozen runs, all with seed 0 and most stopped early, by looking at accuracy and
at per-head retrieval scores; lccp was then lengthened from 1.6M to 2.6M tokens, since the scores of a first full run
were still rising at its end, and the recipe was run unchanged with seed 1. Seed 0 is therefore the seed it was chosen
on, and what only seed 0 shows is no finding. No choice was tested by itself, with several seeds. Those made on
purpose: length is raised only after copying has begun (after 2.5-3.8M tokens; earlier trials that lengthened before
never copied); whole heads are dropped out only after that moment, at the end of pretraining, so that more of them
share the work (from the start it seemed to delay copying); short contexts stay mixed into lccp (earlier trials on
long ones alone collapsed); an answer's first token, the one that has to be searched for, weighs more there.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from typing import Any

from lccp_interp.schema import LccpError


@dataclass(frozen=True)
class Size:
    """The shape of the model, in the words of a Llama config; ``d_*`` are widths."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int


@dataclass(frozen=True)
class Rung:
    """A context length that a stage trains on, the share of the stage's steps that use it, and its head dropout.

    ``head_dropout`` is the probability in [0, 1) that a head is silenced in a layer for a whole document.
    """

    context_length: int
    share: float
    head_dropout: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one RoPE base.

    ``climb`` says how ``rungs`` are used: ``False`` draws one per step by its share; ``True`` climbs them in order,
    each for its share of the stage, but leaves the first only when the copy loss (mean over recent steps) is below
    ``gate_loss_nats``, since lengthening before copying has begun prevents it from beginning. What the gate takes
    longer, the other rungs share the loss of.

    ``checkpoints`` are tokens since the beginning of the stage; the last is its end. ``document_shares`` weigh
    questions, repeats and stories; a document of questions tells about one fact per ``tokens_per_fact`` tokens;
    ``first_answer_weight`` is the loss weight of an answer's first token. The learning
    rate (``lr_scale`` times the recipe's) warms up over ``warmup_tokens``, and falls over the last ``decay_tokens``
    to ``final_lr_scale`` of itself; ``weight_decay`` is Muon's, per unit of its learning rate.
    """

    name: str
    rope_theta: float
    tokens_per_step: int
    rungs: tuple[Rung, ...]
    climb: bool
    checkpoints: tuple[int, ...]
    document_shares: tuple[float, float, float]
    tokens_per_fact: float = 100.0
    first_answer_weight: float = 1.0
    lr_scale: float = 1.0
    warmup_tokens: int = 100_000
    decay_tokens: int = 0
    final_lr_scale: float = 0.1
    weight_decay: float = 0.0
    gate_loss_nats: float = 1.0

    @property
    def n_tokens(self) -> int:
        """Tokens of the whole stage."""
        return self.checkpoints[-1]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, except seed, threads and device."""

    size: Size
    stages: tuple[Stage, ...]
    muon_lr: float = 0.01
    muon_momentum: float = 0.95
    adam_lr: float = 0.004
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weights_dtype: str = "float16"
    max_context_length: int = 4096

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


_K = 1024


def _at_steps(tokens_per_step: int, *steps: int) -> tuple[int, ...]:
    return tuple(step * tokens_per_step for step in steps)


_TINY = Recipe(
    size=Size(n_layers=2, n_heads=2, n_kv_heads=1, d_head=8, d_model=16, d_mlp=32),
    stages=(
        Stage(
            "pretrain",
            rope_theta=1e4,
            tokens_per_step=256,
            rungs=(Rung(32, 0.5), Rung(64, 0.5, head_dropout=0.1)),
            climb=True,
            checkpoints=_at_steps(256, 4, 8),
            document_shares=(0.6, 0.3, 0.1),
            gate_loss_nats=100.0,
        ),
        Stage(
            "lccp",
            rope_theta=2e5,
            tokens_per_step=256,
            rungs=(Rung(64, 0.5), Rung(128, 0.5)),
            climb=False,
            checkpoints=_at_steps(256, 2, 4, 8),
            document_shares=(0.6, 0.3, 0.1),
            first_answer_weight=2.0,
            weight_decay=0.1,
        ),
    ),
)

_SMALL = Recipe(
    size=Size(n_layers=5, n_heads=8, n_kv_heads=4, d_head=16, d_model=64, d_mlp=128),
    stages=(
        Stage(
            "pretrain",
            rope_theta=1e4,
            tokens_per_step=4 * _K,
            rungs=(Rung(64, 0.5), Rung(128, 0.2), Rung(256, 0.3, head_dropout=0.2)),
            climb=True,
            checkpoints=_at_steps(4 * _K, 300, 600, 750, 950, 1200),
            document_shares=(0.6, 0.3, 0.1),
        ),
        Stage(
            "lccp",
            rope_theta=2e5,
            tokens_per_step=4 * _K,
            rungs=(Rung(256, 0.15), Rung(1024, 0.3), Rung(2048, 0.3), Rung(4096, 0.25)),
            climb=False,
            checkpoints=_at_steps(4 * _K, 5, 10, 20, 30, 45, 60, 80, 110, 150, 210, 290, 400, 520, 640),
            document_shares=(0.75, 0.2, 0.05),
            first_answer_weight=3.0,
            lr_scale=0.7,
            warmup_tokens=40_000,
            decay_tokens=320 * 4 * _K,
            weight_decay=0.1,
        ),
    ),
)

# About 13M parameters and 160M tokens, for one GPU. Its shape and schedule are scaled up from ``small`` by rule of
# thumb; nobody has tuned them, and no result of this project rests on it.
_MEDIUM = Recipe(
    size=Size(n_layers=8, n_heads=12, n_kv_heads=6, d_head=32, d_model=384, d_mlp=1024),
    stages=(
        Stage(
            "pretrain",
            rope_theta=1e4,
            tokens_per_step=64 * _K,
            rungs=(Rung(128, 0.5), Rung(256, 0.2), Rung(512, 0.3, head_dropout=0.1)),
            climb=True,
            checkpoints=_at_steps(64 * _K, 200, 500, 800, 1100, 1600),
            document_shares=(0.6, 0.3, 0.1),
            warmup_tokens=6_400 * _K,
        ),
        Stage(
            "lccp",
            rope_theta=5e5,
            tokens_per_step=128 * _K,
            rungs=(Rung(512, 0.15), Rung(2048, 0.3), Rung(4096, 0.3), Rung(8192, 0.25)),
            climb=False,
            checkpoints=_at_steps(128 * _K, 5, 10, 20, 30, 45, 60, 80, 100, 130, 170, 220, 280, 340, 400),
            document_shares=(0.75, 0.2, 0.05),
            first_answer_weight=3.0,
            lr_scale=0.5,
            warmup_tokens=2_560 * _K,
            decay_tokens=200 * 128 * _K,
            weight_decay=0.1,
        ),
    ),
    muon_lr=0.01,
    adam_lr=0.002,
    max_context_length=8192,
)

RECIPES: dict[str, Recipe] = {"tiny": _TINY, "small": _SMALL, "medium": _MEDIUM}


def find_recipe(size: str) -> Recipe:
    """Return the recipe of a size name.

    Raises: :class:`LccpError` listing the known names, with the nearest one, for an unknown name.

    >>> find_recipe("tiny").size.n_layers
    2
    """
    if size in RECIPES:
        return RECIPES[size]
    near = difflib.get_close_matches(size, RECIPES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise LccpError(f"unknown organism size {size!r}: known sizes are {', '.join(RECIPES)}{hint}")
