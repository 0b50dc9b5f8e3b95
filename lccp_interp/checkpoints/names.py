"""What the name of a checkpoint tells: its stage, its branch, its step, its tokens.

Names are those of folders and of revisions on a hub, as the public trajectories write them: Pythia `step143000`, OLMo
`stage2-ingredient1-step11931-tokens50B`, SmolLM3 `lc-4k-to-32k-step-20000`, Amber `ckpt_358`, CRFM `checkpoint-400`,
Megatron `iter_0001000`, DeepSpeed `global_step1000`. This module reads text only; it refuses to know what a step is
worth in tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lccp_interp.schema import LccpError

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TOKENS = re.compile(
    r"(?:tokens?[-_]?(\d+(?:\.\d+)?)([KMBT]?)|(\d+(?:\.\d+)?)([KMBT]?)[-_]?tok(?:en)?s?)(?![a-zA-Z0-9.])", re.IGNORECASE
)
_BARE_COUNT = re.compile(r"(?:^|[-_])(\d+(?:\.\d+)?)([KMBT])$")
_STEP = re.compile(r"(?:step|ckpt|checkpoint|iter)[-_]?0*(\d+)", re.IGNORECASE)
_STAGE = re.compile(r"(?<![A-Za-z0-9])stage[-_]?(\d+)(?![0-9])", re.IGNORECASE)
_LONG_CONTEXT = re.compile(r"(?<![A-Za-z0-9])lc-(\d+)k-to-(\d+)k(?![A-Za-z0-9])", re.IGNORECASE)
_BRANCH = re.compile(r"(?<![A-Za-z0-9])ingredient[-_]?(\d+)(?![0-9])", re.IGNORECASE)


def parse_count(text: str) -> int:
    """A number of tokens as people write it.

    Example:
        >>> parse_count("1.2M"), parse_count("20B"), parse_count("4096")
        (1200000, 20000000000, 4096)

    Raises:
        LccpError: it is no such number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", text.strip().replace("_", "").replace(",", ""), re.IGNORECASE)
    if not match:
        raise LccpError(f"{text!r} is no number of tokens; write it like 4096, 1.2M or 20B")
    return round(float(match[1]) * SUFFIXES[match[2].upper()])


def parse_bytes(text: str | None) -> int | None:
    """A size on disk as people write it.

    Example:
        >>> parse_bytes("40GB"), parse_bytes("1.5T"), parse_bytes("8GiB"), parse_bytes(None)
        (40000000000, 1500000000000, 8589934592, None)

    Raises:
        LccpError: it is no such size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise LccpError(f"{text!r} is no size; write it like 40GB, 500M or 1.5T")
    base = 1024 if match[3] else 1000
    return (
        round(float(match[1]) * base ** "KMGT".index(match[2].upper()) * base) if match[2] else round(float(match[1]))
    )


@dataclass(frozen=True, slots=True)
class NameParts:
    """What a name tells; None is what it does not.

    Attributes:
        stage: `stage2`, `lc-4k-to-32k`.
        branch: `ingredient1`.
        step: optimizer steps.
        tokens: tokens, of the stage if the name has one.
    """

    stage: str | None = None
    branch: str | None = None
    step: int | None = None
    tokens: int | None = None

    @property
    def places(self) -> bool:
        """Whether the name says how far training was."""
        return self.step is not None or self.tokens is not None


def parse_name(name: str) -> NameParts:
    """Read a name; a bare count elsewhere than at its end is more likely the model's size (`llama-7B-step100`).

    Example:
        >>> parse_name("stage2-ingredient1-step11931-tokens50B")
        NameParts(stage='stage2', branch='ingredient1', step=11931, tokens=50000000000)
        >>> parse_name("lc-4k-to-32k-step-20000").stage, parse_name("iter_0001000").step, parse_name("main").places
        ('lc-4k-to-32k', 1000, False)
    """
    stage = branch = step = tokens = None
    if match := _STAGE.search(name):
        stage = f"stage{int(match[1])}"
    elif match := _LONG_CONTEXT.search(name):
        stage = match[0].lower()
    if match := _BRANCH.search(name):
        branch = f"ingredient{int(match[1])}"
    if match := _STEP.search(name):
        step = int(match[1])
    if match := _TOKENS.search(name):
        tokens = parse_count((match[1] or match[3]) + (match[2] or match[4] or ""))
    elif step is None and (match := _BARE_COUNT.search(name)):
        tokens = parse_count(match[1] + match[2])
    return NameParts(stage, branch, step, tokens)


def stage_rank(stage: str) -> tuple[int, int] | None:
    """Where a stage stands in training: numbered stages, then long-context ones by the length they start from.

    Example:
        >>> sorted(["lc-32k-to-64k", "stage10", "lc-4k-to-32k", "stage2"], key=stage_rank)
        ['stage2', 'stage10', 'lc-4k-to-32k', 'lc-32k-to-64k']
        >>> stage_rank("lccp") is None
        True
    """
    if match := _STAGE.fullmatch(stage):
        return 0, int(match[1])
    if match := _LONG_CONTEXT.fullmatch(stage):
        return 1, int(match[1])
    return None
