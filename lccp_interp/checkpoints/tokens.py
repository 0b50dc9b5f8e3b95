"""How many tokens a checkpoint has seen, counted over all stages of its training.

A name tells a step or the tokens of a stage; steps begin again with every stage. What a step is worth, and what came
before a stage, is said by the user, by a table, or known of a public family of models; where neither is, the last
checkpoint of the stage before is taken for its end, with a warning. An explicit table always wins. It refuses to guess
anything else.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lccp_interp.checkpoints.folders import read_json
from lccp_interp.checkpoints.names import NameParts, parse_count, parse_name, stage_rank
from lccp_interp.schema import LccpError

_SMOLLM3_STEP = 2_359_296


@dataclass(frozen=True)
class Family:
    """What is published of the steps of a public trajectory.

    Attributes:
        repository: pattern of its names on the hub.
        tokens_per_step: tokens per optimizer step.
        first_step: by stage, the step it began at, for stages whose steps count on from the stage before.
        tokens_before: by stage, tokens of all stages before it, for stages whose steps begin again.
    """

    repository: str
    tokens_per_step: int
    first_step: Mapping[str, int] = field(default_factory=dict)
    tokens_before: Mapping[str, int] = field(default_factory=dict)


FAMILIES = (
    # Biderman et al. 2023 (arXiv 2304.01373): every model is trained with 1024 sequences of 2048 tokens per step.
    Family(r"EleutherAI/pythia-\d+(\.\d+)?[mb](-deduped)?", 2_097_152),
    # The model card of HuggingFaceTB/SmolLM3-3B-checkpoints: 2,359,296 tokens per step; stages of 3,450,000, 4,200,000
    # and 4,720,000 steps, counted on; the long-context stages count from 0.
    Family(
        r"HuggingFaceTB/SmolLM3-3B-checkpoints",
        _SMOLLM3_STEP,
        first_step={"stage1": 0, "stage2": 3_450_000, "stage3": 4_200_000},
        tokens_before={"lc-4k-to-32k": 4_720_000 * _SMOLLM3_STEP},
    ),
)


def family_of(repository: str | None) -> Family | None:
    """What is known of a repository's steps.

    Example:
        >>> family_of("EleutherAI/pythia-1.4b-deduped").tokens_per_step, family_of("mine/own")
        (2097152, None)
    """
    return next((family for family in FAMILIES if repository and re.fullmatch(family.repository, repository)), None)


@dataclass(frozen=True)
class TokenTable:
    """An explicit table: tokens seen over all stages by checkpoint name, and the stages it names."""

    tokens: Mapping[str, int] = field(default_factory=dict)
    stages: Mapping[str, str] = field(default_factory=dict)


def read_token_table(file: str | Path) -> TokenTable:
    """Read a table of tokens seen: CSV with a header `name,tokens[,stage]`, or JSON.

    Args:
        file: `*.csv`, or `*.json` with a list of `{"name", "tokens", "stage"}` or an object of counts by name.

    Raises:
        LccpError: no such file, a column or count that is missing, a name that stands there twice.

    Example:
        >>> read_token_table("trajectory.csv").tokens["step1000"]   # doctest: +SKIP
        2097152000
    """
    file = Path(file)
    rows: Any
    if file.suffix.lower() == ".csv":
        try:
            with open(file, encoding="utf-8-sig", newline="") as handle:
                rows = list(csv.DictReader(handle))
        except (OSError, ValueError, csv.Error) as error:
            raise LccpError(f"{file} is no table of tokens: {error}; write one with columns name,tokens") from error
    else:
        rows = read_json(file, "table of tokens")
        if isinstance(rows, dict):
            rows = [{"name": name, "tokens": tokens} for name, tokens in rows.items()]
    tokens: dict[str, int] = {}
    stages: dict[str, str] = {}
    for number, row in enumerate(rows if isinstance(rows, list) else [None], start=1):
        if not isinstance(row, dict) or not row.get("name") or row.get("tokens") in (None, ""):
            raise LccpError(f"{file}, row {number}: a table of tokens has name and tokens (and stage), got {row!r}")
        name = str(row["name"])
        if name in tokens:
            raise LccpError(f"{file}, row {number}: {name!r} stands there twice; keep one row")
        tokens[name] = parse_count(str(row["tokens"]))
        if row.get("stage"):
            stages[name] = str(row["stage"])
    return TokenTable(tokens, stages)


@dataclass(frozen=True)
class Counting:
    """What the user says about tokens.

    Attributes:
        tokens: tokens seen over all stages, by name of a checkpoint.
        table: the same out of a file, which may name more checkpoints than there are.
        tokens_per_step: of every stage, or by stage.
        stage_tokens_before: by stage, tokens of all stages before it.
        branch: the branch to follow, where a stage has several.
    """

    tokens: Mapping[str, int] = field(default_factory=dict)
    table: TokenTable = field(default_factory=TokenTable)
    tokens_per_step: int | Mapping[str, int] | None = None
    stage_tokens_before: Mapping[str, int] = field(default_factory=dict)
    branch: str | None = None

    def per_step(self, stage: str | None, family: Family | None) -> int | None:
        """Tokens per step in a stage."""
        if isinstance(self.tokens_per_step, Mapping):
            if stage is not None and stage in self.tokens_per_step:
                return self.tokens_per_step[stage]
        elif self.tokens_per_step is not None:
            return self.tokens_per_step
        return None if family is None else family.tokens_per_step


@dataclass(frozen=True)
class Counted:
    """Tokens over all stages, and in its own stage; None where that is not known. `lacking` says what is missing."""

    seen: int | None
    in_stage: int | None = None
    lacking: str = ""


class Counter:
    """Counts the tokens of checkpoints that belong together: those of one repository, or of the folders given.

    Example:
        >>> names = ["stage1-step100-tokens5B", "stage2-step10-tokens1B"]
        >>> counter = Counter(names, Counting(stage_tokens_before={"stage2": 6 * 10**9}))
        >>> counter.count(names[1])
        Counted(seen=7000000000, in_stage=1000000000, lacking='')
    """

    def __init__(self, names: Iterable[str], counting: Counting, repository: str | None = None) -> None:
        self._parts = {name: parse_name(name) for name in names}
        self._counting, self._family = counting, family_of(repository)
        self._place = repository or "these checkpoints"
        self._before: dict[str, int | None] = {}

    def count(self, name: str, *, step: int | None = None) -> Counted:
        """Tokens of one checkpoint; `step` is what its trainer's state says, and wins over its name."""
        parts = parse_name(name)
        if step is None:
            step = parts.step
        explicit = self._counting.tokens.get(name, self._counting.table.tokens.get(name))
        in_stage = self._in_stage(parts, step)
        if explicit is not None:
            return Counted(explicit, in_stage if parts.stage else None)
        if in_stage is None:
            what = "name a count or a step" if step is None else "say what a step is worth"
            return Counted(None, None, f"its name does not {what}")
        if parts.stage is None:
            return Counted(in_stage)
        before = self._tokens_before(parts.stage)
        if before is None:
            return Counted(None, in_stage, f"what came before {parts.stage} is not known")
        return Counted(before + in_stage, in_stage)

    def _in_stage(self, parts: NameParts, step: int | None) -> int | None:
        if parts.tokens is not None:
            return parts.tokens
        per_step = self._counting.per_step(parts.stage, self._family)
        if step is None or per_step is None:
            return None
        began = self._family.first_step.get(parts.stage or "", 0) if self._family else 0
        return max(step - began, 0) * per_step

    def _tokens_before(self, stage: str) -> int | None:
        if stage not in self._before:
            self._before[stage] = self._find_before(stage)
        return self._before[stage]

    def _find_before(self, stage: str) -> int | None:
        """Tokens of all stages before one: as the user says, as is published, or up to the last checkpoint of them."""
        if stage in self._counting.stage_tokens_before:
            return self._counting.stage_tokens_before[stage]
        rank = stage_rank(stage)
        if rank == (0, 1):
            return 0
        if self._family and stage in self._family.tokens_before:
            return self._family.tokens_before[stage]
        per_step = self._counting.per_step(stage, self._family)
        if self._family and stage in self._family.first_step and per_step:
            return self._family.first_step[stage] * per_step
        earlier = {parts.stage for parts in self._parts.values() if parts.stage} - {stage}
        ranked = sorted((other, name) for name in earlier if (other := stage_rank(name)) and rank and other < rank)
        # A gap in the numbers hides a stage.
        if not ranked or (rank and rank[0] == 0 and ranked[-1][0] != (0, rank[1] - 1)):
            return None
        return self._end_of(ranked[-1][1], stage)

    def _end_of(self, earlier: str, stage: str) -> int | None:
        members = {name: parts for name, parts in self._parts.items() if parts.stage == earlier}
        branches = {parts.branch for parts in members.values()}
        if len(branches) > 1:
            # Which of them the next stage began from, or whether from their mean, no name tells.
            members = {name: parts for name, parts in members.items() if parts.branch == self._counting.branch}
        counted = {name: tokens for name, parts in members.items() if (tokens := self._in_stage(parts, parts.step))}
        before = self._tokens_before(earlier)
        if not counted or before is None:
            return None
        last = max(counted, key=counted.__getitem__)
        total = before + counted[last]
        warnings.warn(
            f"{stage} of {self._place} is taken to begin after {total} tokens, where the last checkpoint of {earlier} "
            f"stands ({last!r}); say otherwise with --stage-before {stage}=COUNT",
            stacklevel=2,
        )
        return total


def lacking_tokens(unknown: Sequence[tuple[str, NameParts, str]], n_found: int) -> str:
    """The error for checkpoints whose tokens are not known: the first one's fault, and what to type."""
    name, parts, fault = unknown[0]
    how = f"say it with --tokens {name}=1.2B, or --tokens-per-step N where names carry steps"
    if parts.stage and "came before" in fault:
        how = (
            f"say it with --stage-before {parts.stage}=COUNT (0 counts from the start of that stage), or give a table "
            "with --tokens FILE.csv"
        )
    elif parts.stage:
        how = f"say it with --tokens {name}=1.2B, --tokens FILE.csv, or --tokens-per-step {parts.stage}=N"
    return (
        f"cannot tell how many tokens checkpoint {name!r} has seen ({len(unknown)} of {n_found} are unknown): {fault}; "
        f"{how}"
    )
