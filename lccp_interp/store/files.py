"""Files of a run folder: written whole or not at all, and checked before they are believed.

A file is written under a temporary name beside its place, fsynced and renamed, so that a reader sees the old file or
the new one and a kill at any moment leaves either a whole file or none. A file that something else tore, edited or
wrote is named, with what it holds and what to do, before a reader stumbles over it. This module knows paths, JSON and
Parquet; it refuses to know what numbers mean, and it mends nothing. Cost: two fsyncs per file written, a footer per
part read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from lccp_interp.schema import LccpError
from lccp_interp.store.processes import reason, temporary_beside

UNREADABLE = (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""What polars raises on damaged bytes."""

DIGEST = "lccp_rows_sha256"
"""Under which a part carries the digest of its rows."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is fsynced and renamed onto `path`.

    A reader sees the old file or the new one, never a part of it. On an exception the temporary file is removed.

    Raises:
        LccpError: the file cannot be written (no room, no right, a folder of that name).
    """
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, pl.exceptions.PolarsError) as error:
        if (why := reason(error)) is None:
            raise
        raise LccpError(f"cannot write {path}: {why}; choose another place, or make room") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def part_name(checkpoint: str, shard: int) -> str:
    """File name of a unit's part; a name that is no plain file name is made one, with a hash to keep it unique.

    Example:
        >>> part_name("lccp-1.2M", 3)
        'lccp-1.2M.0003.parquet'
    """
    return f"{file_stem(checkpoint)}.{shard:04d}.parquet"


def file_stem(name: str) -> str:
    """`name` if it is a plain file name, else one made of it, with a hash to keep it unique.

    Example:
        >>> file_stem("lm-eval"), file_stem("a/b")
        ('lm-eval', 'a_b-c14cddc0')
    """
    slug = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")
    if slug != name or len(slug) > 100:
        slug = f"{slug[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return slug


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
        raise LccpError(f"{part} is not a whole Parquet file ({first_line(error)}); {remedy}") from error
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
                raise LccpError(f"{part} cannot be read ({first_line(cause)}); {remedy}") from error
        raise


def write_part(frame: pl.DataFrame, part: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a table as one immutable Parquet file that carries the digest of its rows.

    The same rows give the same bytes, in whatever pieces they come and in whatever process.

    Args:
        frame: of columns of numbers, truth values, texts and lists of them.
        part: where it goes; a file that is there is replaced.
        metadata: more that the file shall carry.

    Raises:
        LccpError: the file cannot be written (no room, no right).
    """
    frame = frame.rechunk()
    carried = {**(metadata or {}), DIGEST: rows_digest(frame)}
    with replacing(part) as temporary:
        frame.write_parquet(temporary, metadata=carried)


def rows_digest(frame: pl.DataFrame) -> str:
    """SHA-256 of a table's names, types and values, whatever library keeps them and however they are packed.

    Example:
        >>> one, two = pl.DataFrame({"a": ["x", None]}), pl.DataFrame({"a": ["x", ""]})
        >>> rows_digest(one) == rows_digest(one), rows_digest(one) == rows_digest(two)
        (True, False)
    """
    digest = hashlib.sha256()
    for column in frame:
        digest.update(f"{column.name}:{column.dtype}:{column.len()}\n".encode())
        _add_values(digest, column)
    return digest.hexdigest()


def _add_values(digest: hashlib._Hash, column: pl.Series) -> None:
    digest.update(column.is_null().to_numpy().tobytes())
    held = column.drop_nulls()
    if isinstance(held.dtype, pl.List):
        digest.update(held.list.len().to_numpy().tobytes())
        _add_values(digest, held.filter(held.list.len() > 0).explode())
    elif held.dtype == pl.String:
        digest.update(held.str.len_bytes().to_numpy().tobytes())
        digest.update("".join(held.to_list()).encode())
    else:
        digest.update(held.to_numpy().tobytes())


def is_sound(part: Path, frame: pl.DataFrame) -> bool | None:
    """Whether the rows read from a part are those that were written; None if it carries no digest."""
    carried = pl.read_parquet_metadata(part).get(DIGEST)
    return None if carried is None else carried == rows_digest(frame)


def first_line(error: BaseException) -> str:
    """What an error says in its first line."""
    return str(error).partition("\n")[0]
