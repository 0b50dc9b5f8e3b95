"""The mixture: which tasks a probe asks and trains on, by name, at which lengths.

Tasks are named `family` (its usual subsets) or `family-subset`, for example `longbio` or `ruler-niah_multikey_1`. A
length is a number of tokens or a band `512-1024`, over which the samples are spread evenly; arXiv 2604.02650 asks at
32K to 64K. Training items come from the training split of every task, which shares no needle, name or template with the
evaluation. This module refuses to know models. Cost: that of the tasks, mostly their tokenizer.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lccp_interp.schema import Item, LccpError
from lccp_interp.tasks.items import MATERIALS, natural_material

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lccp_interp.tasks.items import PromptWriter

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "longbio": ("lccp_interp.tasks.longbio", ("standard", "paraphrase", "pronoun")),
    "ruler": ("lccp_interp.tasks.ruler", ("qa",)),
    "mrcr": ("lccp_interp.tasks.mrcr", ("2needle",)),
}
"""Where each family is written, and the subsets that its bare name means: those of arXiv 2604.02650, Figure 1."""

DEFAULT_TASKS = tuple(FAMILIES)


@dataclass(frozen=True)
class Length:
    """Tokens of prompt and answer budget: one number, or a band with its ends."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise LccpError(f"a length is a number of tokens or a band like 512-1024, got {self.low}-{self.high}")

    @classmethod
    def parse(cls, text: str) -> Length:
        """Read `1024` or `512-1024`; counts may end in K.

        Example:
            >>> Length.parse("512-1024"), str(Length.parse("4096"))
            (Length(low=512, high=1024), '4096')
        """
        from lccp_interp.checkpoints import parse_count

        low, dash, high = text.partition("-")
        return cls(parse_count(low), parse_count(high if dash else low))

    def __str__(self) -> str:
        return str(self.high) if self.low == self.high else f"{self.low}-{self.high}"

    def spread(self, samples: int) -> list[int]:
        """The lengths of `samples` samples, evenly over the band.

        Example:
            >>> Length(500, 1000).spread(3), Length(8, 8).spread(2)
            ([500, 750, 1000], [8, 8])
        """
        if samples == 1:
            return [self.high]
        return [self.low + round(i * (self.high - self.low) / (samples - 1)) for i in range(samples)]


def find_tasks(names: Sequence[str]) -> list[tuple[str, str]]:
    """(family, subset) of every task named, in order, each once.

    Raises:
        LccpError: an unknown family or subset; the known ones are listed, with the nearest.

    Example:
        >>> find_tasks(["longbio-standard", "ruler"])
        [('longbio', 'standard'), ('ruler', 'qa')]
    """
    found: list[tuple[str, str]] = []
    for name in names:
        family, _, subset = name.partition("-")
        if family not in FAMILIES:
            near = difflib.get_close_matches(family, FAMILIES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LccpError(f"unknown task {name!r}: families are {', '.join(FAMILIES)}{hint}")
        known = importlib.import_module(FAMILIES[family][0]).SUBSETS
        if subset and subset not in known:
            near = difflib.get_close_matches(subset, known, n=1)
            hint = f"; did you mean {family}-{near[0]}?" if near else ""
            raise LccpError(f"unknown task {name!r}: {family} has {', '.join(known)}{hint}")
        found += [(family, one) for one in ([subset] if subset else FAMILIES[family][1])]
    return list(dict.fromkeys(found))


def build_mixture(
    writer: PromptWriter,
    tasks: Sequence[tuple[str, str]],
    lengths: Sequence[Length],
    *,
    samples: int,
    seed: int = 0,
    material: str = "auto",
    split: str = "eval",
) -> list[Item]:
    """All items of a split: every task x length x sample.

    Args:
        writer: for the models' tokenizer.
        tasks: from `find_tasks`.
        lengths: numbers or bands; items of a band carry its upper end as their length.
        samples: items per task and length, at least 1.
        seed: of everything that is drawn.
        material: `english`, `organism` (the bundled language), or `auto` by the tokenizer.
        split: `eval` or `train`.

    Returns:
        Items in the order task, length, sample; an item does not depend on which others are asked for.

    Raises:
        LccpError: an unknown material, no samples, or a length that no sample of a task fits.
    """
    if material not in ("auto", *MATERIALS):
        raise LccpError(f"unknown material {material!r}; known: auto, {', '.join(MATERIALS)}")
    if samples < 1:
        raise LccpError(f"samples must be at least 1, got {samples}")
    material = natural_material(writer.tokenizer) if material == "auto" else material
    items: list[Item] = []
    for family, subset in tasks:
        build = importlib.import_module(FAMILIES[family][0]).build_items
        for length in lengths:
            banded = length.low != length.high
            # In a band each sample has a length of its own, and is the first of it.
            made = build(
                writer,
                subsets=[subset],
                lengths=length.spread(samples) if banded else [length.high],
                samples=1 if banded else samples,
                seed=seed,
                material=material,
                split=split,
            )
            items += [replace(item, length=length.high) for item in made]
    return items


OFFICIAL = ("ruler", "mrcr")
"""Benchmarks whose own data can be read from files."""


def read_official(source: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None) -> list[Item]:
    """Items of official data, given as `ruler:PATH` (JSONL) or `mrcr:PATH` (Parquet or JSONL).

    Args:
        source: benchmark and file or folder.
        tokenizer: of the models.
        max_length: rows of MRCR that need more tokens are left out; RULER's files are of one length each.

    Raises:
        LccpError: an unknown benchmark, nothing there, or what `read_ruler` and `read_mrcr` say of a file.
    """
    benchmark, path = split_source(source)
    if benchmark == "ruler":
        from lccp_interp.tasks.ruler import read_ruler

        return read_ruler(path, tokenizer)
    from lccp_interp.tasks.mrcr import read_mrcr

    items = read_mrcr(path, tokenizer, max_length=max_length)
    if not items:
        raise LccpError(f"no row of {path} fits {max_length} tokens; ask for longer --lengths")
    return items


def split_source(source: str) -> tuple[str, Path]:
    """Benchmark and path of official data.

    Example:
        >>> split_source("ruler:.")[0]
        'ruler'
    """
    benchmark, colon, path = source.partition(":")
    if not colon or benchmark not in OFFICIAL:
        raise LccpError(f"official data {source!r}: write {' or '.join(f'{name}:PATH' for name in OFFICIAL)}")
    if not Path(path).exists():
        raise LccpError(f"official data {source!r}: there is nothing at {path}")
    return benchmark, Path(path)


def source_digest(source: str) -> str:
    """SHA-256 of the files behind official data: what tells one study from another, wherever the files lie."""
    _, path = split_source(source)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
