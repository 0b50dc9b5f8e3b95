"""Head scores that others published.

They come as Wu et al.'s JSON (`{"layer-head": [score per trial, ...]}`, arXiv 2404.15574), as DuoAttention's table
(`full_attention_heads.tsv`, arXiv 2410.10819: one line per layer, one tab-separated number per key/value head), or as
a plain CSV (layer, head, score). They are kept in a run folder under `imported/`, and their file's name, hash and date
in run.json under `imports`. This module refuses to know what the heads do. Cost: one pass over the file in Python.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import t as student_t

from lccp_interp.imports.files import brief, csv_rows, index, number, read_json, read_text, record_import
from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError
from lccp_interp.store import Run, file_stem, is_whole, write_part

HEADS_SCHEMA: dict[str, Any] = {
    "source": pl.String,
    "kind": pl.String,
    "layer": pl.Int64,
    "head": pl.Int64,
    "score": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "n": pl.Int64,
}
"""An imported head list; `n` (trials) is null where the file does not tell. Heads of kind `duo` are key/value heads."""

HEAD_KINDS = {".json": "wu", ".tsv": "duo", ".csv": "heads-csv"}
"""Kinds of head lists by the ending that such a file has."""

CONFIDENCE = 0.95
IMPORTED = "imported"
"""Folder of the imported head lists in a run."""


def read_heads(path: str | Path, kind: str | None = None) -> pl.DataFrame:
    """Read a published head list.

    Args:
        path: the file.
        kind: `wu`, `duo` or `heads-csv`; None means by the file's ending (.json, .tsv, .csv).

    Returns:
        Columns as in `HEADS_SCHEMA`, sorted by layer, head. For `wu` the score is the mean over trials, n their number,
        and the interval Student's at 95 % over trials (NaN below two; trials share needles, so it is too narrow). For
        `duo` the score is DuoAttention's gate of a key/value head and there is no interval.

    Raises:
        LccpError: an unknown kind, or a malformed file: the message says which line or key, and what was expected.

    Example:
        >>> read_heads("llama-2-7b-80k.json").sort("score").tail(1)   # doctest: +SKIP
    """
    path = Path(path)
    if kind is None:
        kind = HEAD_KINDS.get(path.suffix.lower())
        if kind is None:
            endings = ", ".join(f"{ending} ({name})" for ending, name in HEAD_KINDS.items())
            raise LccpError(f"{path}: no head list by its ending; known are {endings}; or name the kind")
    if kind not in _HEAD_READERS:
        raise LccpError(f"unknown kind of head list {kind!r}; known are {', '.join(_HEAD_READERS)}")
    rows = list(_HEAD_READERS[kind](path))
    for row in rows:
        row |= {"source": path.name, "kind": kind}
    return pl.DataFrame(rows, schema=HEADS_SCHEMA).sort("layer", "head")


def _read_wu(path: Path) -> Iterable[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise LccpError(f'{path}: expected one JSON object {{"layer-head": [score, ...], ...}}, got {brief(content)}')
    seen: dict[tuple[int, int], str] = {}
    for key, trials in content.items():
        match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", key, re.ASCII)
        if not match:
            raise LccpError(f'{path}: key {key!r} names no head; expected "layer-head", like "16-19"')
        pair = (int(match[1]), int(match[2]))
        if pair in seen:
            raise LccpError(f"{path}: keys {seen[pair]!r} and {key!r} name the same head; keep one")
        seen[pair] = key
        if not isinstance(trials, list):
            raise LccpError(f"{path}: key {key!r}: expected a list of scores, one per trial, got {brief(trials)}")
        for i, trial in enumerate(trials, start=1):
            if type(trial) not in (int, float) or not abs(trial) <= sys.float_info.max:
                raise LccpError(f"{path}: key {key!r}, trial {i}: expected a finite number, got {brief(trial)}")
        score, low, high = _mean_interval(np.asarray(trials, dtype=np.float64))
        yield {"layer": pair[0], "head": pair[1], "score": score, "ci_low": low, "ci_high": high, "n": len(trials)}


def _mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and Student's interval; NaN where there are too few values."""
    n = len(values)
    if n < 2:
        return (float(values[0]) if n else math.nan), math.nan, math.nan
    mean = float(values.mean())
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def _read_duo(path: Path) -> Iterable[dict[str, Any]]:
    lines = read_text(path).rstrip("\n").split("\n")
    width = len(lines[0].split("\t"))
    for layer, line in enumerate(lines):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != width:
            raise LccpError(
                f"{path} line {layer + 1}: expected {width} tab-separated numbers (one per key/value head, as in line "
                f"1), got {len(cells)}"
            )
        for head, cell in enumerate(cells):
            score = number(cell, f"{path} line {layer + 1}, column {head + 1}")
            if math.isnan(score):
                raise LccpError(f"{path} line {layer + 1}, column {head + 1}: expected a finite number, got {cell!r}")
            yield {"layer": layer, "head": head, "score": score, "ci_low": math.nan, "ci_high": math.nan, "n": None}


def _read_heads_csv(path: Path) -> Iterable[dict[str, Any]]:
    seen: dict[tuple[int, int], int] = {}
    for line, row in csv_rows(path, required=("layer", "head", "score")):
        where = f"{path} line {line}"
        pair = (index(row["layer"], f"{where}, layer"), index(row["head"], f"{where}, head"))
        if pair in seen:
            raise LccpError(
                f"{where}: layer {pair[0]} head {pair[1]} stands in line {seen[pair]} too; keep one score per head "
                "(of a table over several checkpoints or metrics, the lines of one)"
            )
        seen[pair] = line
        n = row.get("n")
        numbers = {
            name: number(row[name], f"{where}, {name}") if row.get(name) else math.nan
            for name in ("score", "ci_low", "ci_high")
        }
        yield {"layer": pair[0], "head": pair[1], "n": index(n, f"{where}, n") if n else None} | numbers


_HEAD_READERS: dict[str, Callable[[Path], Iterable[dict[str, Any]]]] = {
    "wu": _read_wu,
    "duo": _read_duo,
    "heads-csv": _read_heads_csv,
}


def list_shape(heads: pl.DataFrame) -> tuple[int, int] | None:
    """(layers, heads per layer) of a list that names every head of a model; None for one that names some.

    Example:
        >>> list_shape(pl.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1]}))
        (2, 2)
        >>> list_shape(pl.DataFrame({"layer": [0, 0, 1], "head": [0, 1, 0]})) is None
        True
    """
    if heads.is_empty():
        return None
    n_layers, n_heads = int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1  # type: ignore[arg-type]
    return (n_layers, n_heads) if heads.height == n_layers * n_heads > 1 else None


def summarise_heads(heads: pl.DataFrame, *, threshold: float = RETRIEVAL_THRESHOLD) -> dict[str, Any]:
    """What a head list holds: source, kind, shape (null where it names only some heads), number of heads, of those with
    a defined score and of those above `threshold`, trials per head.

    Example:
        >>> heads = pl.DataFrame({"source": "x.csv", "kind": "heads-csv", "layer": [0, 1], "head": [0, 0],
        ...                       "score": [0.4, 0.0], "n": [9, 9]})
        >>> summarise_heads(heads)["n_above_threshold"]
        1
    """
    shape = list_shape(heads)
    score = heads["score"].fill_nan(None)
    trials = heads["n"].drop_nulls()
    return {
        "source": heads["source"][0] if heads.height else None,
        "kind": heads["kind"][0] if heads.height else None,
        "n_layers": shape[0] if shape else None,
        "n_heads_per_layer": shape[1] if shape else None,
        "n_heads": heads.height,
        "n_defined": score.count(),
        "threshold": threshold,
        "n_above_threshold": int((score > threshold).sum()),
        "min_trials": trials.min(),
        "max_trials": trials.max(),
    }


def top_heads(heads: pl.DataFrame, top: int | None = None) -> pl.DataFrame:
    """The list best first, ties by layer and head, undefined scores last; with `top` only so many."""
    ranked = heads.sort(
        pl.col("score").fill_nan(None), "layer", "head", descending=[True, False, False], nulls_last=True
    )
    return ranked if top is None else ranked.head(top)


def import_heads(into: str | Path, kind: str | None, path: str | Path, *, name: str | None = None) -> pl.DataFrame:
    """Keep a head list in the run folder `into`, as `imported/NAME.parquet`, and note in run.json where it is from.

    Args:
        into: a run folder; its scores need not fit the list until they are compared.
        kind, path: as in `read_heads`.
        name: under which it is kept; None means the file's name without its ending.

    Returns:
        The list.

    Raises:
        LccpError: no run there, a malformed file, or another list under that name.

    Example:
        >>> import_heads("runs/demo", "wu", "llama-2-7b-80k.json")   # doctest: +SKIP
    """
    path, run = Path(path), Run.open(into)
    heads = read_heads(path, kind)
    name = name or path.stem
    target = _imported_path(run, name)
    if is_whole(target):
        if not pl.read_parquet(target).equals(heads):
            raise LccpError(f"{target} is there with other scores; give another --name, or delete it first")
    else:
        write_part(heads, target)
    record_import(run, name=name, kind=str(heads["kind"][0]), path=path, table=target, rows=heads.height)
    return heads


def imported_names(run: Run) -> list[str]:
    """Names of the head lists that were imported into `run`."""
    records = [record for record in run.manifest.get("imports", []) if record["table"].startswith(f"{IMPORTED}/")]
    return sorted({record["name"] for record in records})


def imported_heads(run: Run, name: str) -> pl.DataFrame:
    """The head list that was imported into `run` as `name`, columns as in `HEADS_SCHEMA`.

    Raises:
        LccpError: there is none of that name (those that are there are listed), or its file is torn.
    """
    path = _imported_path(run, name)
    if not path.is_file():
        known = ", ".join(imported_names(run)) or "none"
        raise LccpError(
            f"run {run.path} has no imported head list {name!r}; it has: {known}; "
            f"add one with `lccp import KIND FILE --into {run.path}`"
        )
    if not is_whole(path):
        raise LccpError(f"{path} is not a whole Parquet file; import its file again")
    return pl.read_parquet(path)


def _imported_path(run: Run, name: str) -> Path:
    return run.path / IMPORTED / f"{file_stem(name)}.parquet"
