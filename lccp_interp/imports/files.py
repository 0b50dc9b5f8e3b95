"""Files of others: text, CSV and JSON read strictly, and what run.json says of a file that was imported.

A file that is not what it should be is refused with the line or key that is wrong; nothing is guessed, rounded or left
out here. This module refuses to know what a file is about. Cost: one pass over the file in Python.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from lccp_interp.schema import LccpError
from lccp_interp.store import Run, editing


def csv_rows(
    path: Path, *, required: Sequence[str], known: Sequence[str] | None = None
) -> Iterable[tuple[int, dict[str, str]]]:
    """Line number and stripped cells of each row of a CSV with a header; empty lines are passed over."""
    reader = csv.reader(read_text(path).splitlines(keepends=True), strict=True)
    header: list[str] | None = None
    rows = 0
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if header is None:
                header = cells
                check_columns(f"{path} line {reader.line_num}", header, required, known)
                continue
            if len(cells) != len(header):
                raise LccpError(
                    f"{path} line {reader.line_num}: expected {len(header)} cells ({', '.join(header)}), "
                    f"got {len(cells)}"
                )
            rows += 1
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise LccpError(f"{path} line {reader.line_num}: no CSV ({error}); separate cells by commas") from None
    if not rows:
        raise LccpError(f"{path}: no rows; expected a header with {', '.join(required)} and a line for each score")


def check_columns(where: str, got: Sequence[str], required: Sequence[str], known: Sequence[str] | None) -> None:
    missing = [name for name in required if name not in got]
    unknown = [name for name in got if known is not None and name not in known]
    twice = [name for name in got if got.count(name) > 1]
    if missing:
        raise LccpError(f"{where}: no column {missing[0]!r}; expected {', '.join(required)}, got {', '.join(got)}")
    if unknown:
        raise LccpError(f"{where}: unknown column {unknown[0]!r}; known are {', '.join(known or ())}")
    if twice:
        raise LccpError(f"{where}: column {twice[0]!r} stands there twice; keep one")


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LccpError(f"{path} cannot be read: {error.strerror or error}; give the file to import") from None
    except UnicodeDecodeError as error:
        raise LccpError(f"{path} is no text in UTF-8 (byte {error.start}); give the file to import") from None
    if not text.strip():
        raise LccpError(f"{path} is empty; give the file to import")
    return text


def read_json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise LccpError(f"{path}: key {twice!r} stands there twice; keep one")
        return content

    try:
        return json.loads(read_text(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise LccpError(f"{path} line {error.lineno}: no JSON ({error.msg}); give the file as it came") from None
    except (ValueError, RecursionError) as error:
        raise LccpError(f"{path}: cannot be read as JSON ({error}); give the file as it came") from None


def number(cell: Any, where: str) -> float:
    """A finite number, or NaN where `nan` is written."""
    try:
        if isinstance(cell, bool):
            raise ValueError
        value = float(cell)
    except (ValueError, TypeError, OverflowError):
        raise LccpError(f"{where}: expected a number, got {brief(cell)}") from None
    if math.isinf(value):
        raise LccpError(f"{where}: expected a finite number, got {brief(cell)}")
    return value


def index(cell: Any, where: str) -> int:
    """A whole number, 0 or more; a JSON integer or digits."""
    if isinstance(cell, bool) or not re.fullmatch(r"\d{1,18}", str(cell), re.ASCII):
        raise LccpError(f"{where}: expected a whole number, 0 or more, got {brief(cell)}")
    return int(cell)


def brief(value: object) -> str:
    """A value as an error message shows it, cut short."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed_names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def records(table: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows as `lccp import --format json` prints them: undefined numbers are None, as JSON knows no NaN."""
    floats = [name for name, dtype in table.schema.items() if dtype == pl.Float64]
    return table.with_columns(pl.col(floats).fill_nan(None)).to_dicts()


def record_import(run: Run, *, name: str, kind: str, path: Path, table: Path, rows: int, **more: Any) -> None:
    record = {
        "name": name,
        "kind": kind,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "table": table.relative_to(run.path).as_posix(),
        "rows": rows,
        **more,
    }
    with editing(run.path) as manifest:
        imports = manifest.setdefault("imports", [])
        if all({key: value for key, value in old.items() if key != "imported"} != record for old in imports):
            imports.append({**record, "imported": datetime.now(UTC).isoformat(timespec="seconds")})
