"""Files of a run folder, checked before they are believed: whole, with the columns that are needed, of one kind.

A file that something else tore, edited or wrote is named, with what it holds and what to do, before a reader stumbles
over it. This module knows Parquet files and entries of run.json; it refuses to know what their numbers mean, and it
mends nothing. Cost: a footer per part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from lccp_interp.schema import LccpError

UNREADABLE = (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""What polars raises on damaged bytes."""


def is_whole(part: Path) -> bool:
    """Whether a Parquet file begins and ends as one; what does not was torn by something other than this package."""
    if not part.is_file() or part.stat().st_size < 8:
        return False
    with open(part, "rb") as handle:
        head = handle.read(4)
        handle.seek(-4, os.SEEK_END)
        return head == handle.read(4) == b"PAR1"


def columns_of(part: Path, needed: Collection[str], remedy: str) -> dict[str, Any]:
    """Columns and types of a Parquet file.

    Raises:
        LccpError: it is torn, or lacks one of the columns `needed`; `remedy` says what to do.
    """
    if not is_whole(part):
        raise LccpError(f"{part} is not a whole Parquet file; {remedy}")
    try:
        found = dict(pl.read_parquet_schema(part))
    except UNREADABLE as error:
        raise LccpError(f"{part} is not a whole Parquet file ({_first_line(error)}); {remedy}") from error
    missing = [name for name in needed if name not in found]
    if missing:
        raise LccpError(f"{part} has no column {', '.join(missing)}, it has {', '.join(found)}; {remedy}")
    return found


def check_parts(parts: Sequence[Path], needed: Collection[str], remedy: str) -> None:
    """Refuse parts that are torn, lack one of the columns `needed`, or differ in their columns.

    Raises:
        LccpError: the first such part, named; `remedy` says what to do.
    """
    first: dict[str, Any] = {}
    for part in parts:
        found = columns_of(part, needed, remedy)
        first = first or found
        for name in {**first, **found}:
            here, there = (columns.get(name, "nothing") for columns in (found, first))
            if here != there:
                raise LccpError(f"{part} has the column {name} as {here}, {parts[0].name} as {there}; {remedy}")


def collect(query: pl.LazyFrame, parts: Sequence[Path], remedy: str) -> pl.DataFrame:
    """The rows of a query of `parts`.

    Raises:
        LccpError: one of them cannot be read; `remedy` says what to do.
    """
    try:
        return query.collect()
    except UNREADABLE as error:
        for part in parts:
            try:
                pl.read_parquet(part)
            except UNREADABLE as cause:
                raise LccpError(f"{part} cannot be read ({_first_line(cause)}); {remedy}") from error
        raise


def check_entries(entries: Sequence[Any], where: Path, remedy: str) -> None:
    """Refuse checkpoints of a run.json that have no name and tokens of their own.

    Raises:
        LccpError: what is wrong with which entry of `where`; `remedy` says what to do about a damaged one.

    Example:
        >>> check_entries([{"name": "a", "tokens_seen": 5}, {"name": "b", "tokens_seen": 6}], Path("run.json"), "")
    """
    owners: dict[tuple[str, object], str] = {}
    for number, entry in enumerate(entries, 1):
        name, tokens = (entry.get("name"), entry.get("tokens_seen")) if isinstance(entry, dict) else (entry, None)
        if not isinstance(name, str) or isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise LccpError(
                f"{where}: checkpoint {number} of {len(entries)} has name {_brief(name)} and tokens_seen "
                f"{_brief(tokens)}, expected a text and a whole number from 0 on; {remedy}"
            )
        if ("name", name) in owners:
            raise LccpError(f"{where}: two checkpoints have the name {name!r}; give each its own there")
        if ("tokens_seen", tokens) in owners:
            raise LccpError(
                f"{where}: checkpoints {owners['tokens_seen', tokens]!r} and {name!r} have the same tokens_seen, "
                f"{tokens}; give each its own there, as `lccp score` does with --tokens NAME=COUNT"
            )
        owners |= {("name", name): name, ("tokens_seen", tokens): name}


def checkpoint_frame(entries: Sequence[Mapping[str, Any]], schema: Mapping[str, Any], where: Path) -> pl.DataFrame:
    """Entries of a run.json that passed `check_entries` as a table, sorted by tokens_seen.

    Raises:
        LccpError: a value of another type than its column.
    """
    try:
        return pl.DataFrame(list(entries), schema=dict(schema)).sort("tokens_seen", "name")
    except (TypeError, *UNREADABLE) as error:
        raise LccpError(
            f"{where}: a checkpoint has a field of another type than expected ({_first_line(error)}); mend it there"
        ) from error


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
