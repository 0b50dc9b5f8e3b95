"""Outside data in: head scores that others published, and benchmark results that were measured elsewhere.

Head lists come as Wu et al.'s JSON (`{"layer-head": [score per trial, ...]}`, arXiv 2404.15574), as DuoAttention's
table (`full_attention_heads.tsv`, arXiv 2410.10819: one line per layer, one tab-separated number per key/value head),
or as a plain CSV (layer, head, score). They are kept in a run folder under `imported/`. Benchmark results come as CSV
or JSON and become parts of `probes/`. Both leave their file's name, hash and date in run.json under `imports`.

A file that is not what it should be is refused with the line or key that is wrong; nothing is guessed, rounded or left
out. This module knows files and tables; it refuses to know models and statistics over time, and imports no torch. Cost:
one pass over the file in Python.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import t as student_t

from lccp_interp.checkpoints import parse_count
from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError
from lccp_interp.store import PROBES_SCHEMA, Run, append_probes, file_stem, is_whole, replacing, write_json

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

PROBE_KINDS = ("probes-csv", "probes-json")
PROBE_COLUMNS = tuple(PROBES_SCHEMA)
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
    content = _read_json(path)
    if not isinstance(content, dict) or not content:
        raise LccpError(f'{path}: expected one JSON object {{"layer-head": [score, ...], ...}}, got {_brief(content)}')
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
            raise LccpError(f"{path}: key {key!r}: expected a list of scores, one per trial, got {_brief(trials)}")
        for i, trial in enumerate(trials, start=1):
            if type(trial) not in (int, float) or not abs(trial) <= sys.float_info.max:
                raise LccpError(f"{path}: key {key!r}, trial {i}: expected a finite number, got {_brief(trial)}")
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
    lines = _read_text(path).rstrip("\n").split("\n")
    width = len(lines[0].split("\t"))
    for layer, line in enumerate(lines):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != width:
            raise LccpError(
                f"{path} line {layer + 1}: expected {width} tab-separated numbers (one per key/value head, as in line "
                f"1), got {len(cells)}"
            )
        for head, cell in enumerate(cells):
            score = _number(cell, f"{path} line {layer + 1}, column {head + 1}")
            if math.isnan(score):
                raise LccpError(f"{path} line {layer + 1}, column {head + 1}: expected a finite number, got {cell!r}")
            yield {"layer": layer, "head": head, "score": score, "ci_low": math.nan, "ci_high": math.nan, "n": None}


def _read_heads_csv(path: Path) -> Iterable[dict[str, Any]]:
    seen: dict[tuple[int, int], int] = {}
    for line, row in _csv_rows(path, required=("layer", "head", "score")):
        where = f"{path} line {line}"
        pair = (_index(row["layer"], f"{where}, layer"), _index(row["head"], f"{where}, head"))
        if pair in seen:
            raise LccpError(
                f"{where}: layer {pair[0]} head {pair[1]} stands in line {seen[pair]} too; keep one score per head "
                "(of a table over several checkpoints or metrics, the lines of one)"
            )
        seen[pair] = line
        n = row.get("n")
        numbers = {
            name: _number(row[name], f"{where}, {name}") if row.get(name) else math.nan
            for name in ("score", "ci_low", "ci_high")
        }
        yield {"layer": pair[0], "head": pair[1], "n": _index(n, f"{where}, n") if n else None} | numbers


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


def records(table: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows as `lccp import --format json` prints them: undefined numbers are None, as JSON knows no NaN."""
    floats = [name for name, dtype in table.schema.items() if dtype == pl.Float64]
    return table.with_columns(pl.col(floats).fill_nan(None)).to_dicts()


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
        with replacing(target) as temporary:
            heads.write_parquet(temporary)
    _record_import(run, name=name, kind=str(heads["kind"][0]), path=path, table=target, rows=heads.height)
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


def read_probes(path: str | Path, kind: str) -> pl.DataFrame:
    """Read benchmark results per checkpoint.

    A CSV with a header, or a JSON list of objects. Columns (keys): checkpoint, benchmark, metric, score; and, where
    they are known, tokens_seen (or tokens; `20B` is understood), subset, length (tokens), n, stderr. An undefined score
    is `nan` (in JSON null).

    Args:
        path: the file.
        kind: `probes-csv` or `probes-json`.

    Returns:
        Columns as in `PROBES_SCHEMA`, checkpoints as the file names them, tokens_seen null where it does not tell.

    Raises:
        LccpError: an unknown kind, or a malformed file: the message says which line or entry, and what was expected.

    Example:
        >>> read_probes("ruler.csv", "probes-csv")   # doctest: +SKIP
    """
    path = Path(path)
    required = ("checkpoint", "benchmark", "metric", "score")
    if kind == "probes-csv":
        listed = [
            (f"{path} line {line}", {name: cell or None for name, cell in row.items()})
            for line, row in _csv_rows(path, required=required, known=(*PROBE_COLUMNS, "tokens"))
        ]
    elif kind == "probes-json":
        listed = list(_json_records(path, required))
    else:
        raise LccpError(f"unknown kind of benchmark results {kind!r}; known are {', '.join(PROBE_KINDS)}")
    return pl.DataFrame([_probe_row(row, where) for where, row in listed], schema=PROBES_SCHEMA)


def _json_records(path: Path, required: Sequence[str]) -> Iterable[tuple[str, dict[str, Any]]]:
    content = _read_json(path)
    if not isinstance(content, list) or not content:
        raise LccpError(
            f"{path}: expected a JSON list of objects with {', '.join(required)}, got {_brief(content)}; "
            "one object per score"
        )
    for i, row in enumerate(content, start=1):
        where = f"{path} entry {i}"
        if not isinstance(row, dict):
            raise LccpError(f"{where}: expected an object with {', '.join(required)}, got {_brief(row)}")
        _check_columns(where, list(row), required, (*PROBE_COLUMNS, "tokens"))
        score = row["score"]
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise LccpError(f"{where}, score: expected a number, or null where it is undefined, got {_brief(score)}")
        yield where, row | {"score": "nan" if score is None else score}


def _probe_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in ("checkpoint", "benchmark", "metric", "score"):
        if row[name] is None:
            hint = " (write nan where it is undefined)" if name == "score" else ""
            raise LccpError(f"{where}: {name} is empty; each row needs one{hint}")
    if row.get("tokens_seen") is not None and row.get("tokens") is not None:
        raise LccpError(f"{where}: tokens_seen and tokens are both given; keep one")
    tokens = row.get("tokens") if row.get("tokens_seen") is None else row["tokens_seen"]
    try:
        tokens_seen = None if tokens is None else parse_count(str(tokens))
    except LccpError as error:
        raise LccpError(f"{where}, tokens_seen: {error}") from None
    stderr = row.get("stderr")
    return {
        **{name: None if row.get(name) is None else str(row[name]) for name in ("checkpoint", "benchmark", "metric")},
        "subset": None if row.get("subset") is None else str(row["subset"]),
        "tokens_seen": tokens_seen,
        "score": _number(row["score"], f"{where}, score"),
        "stderr": None if stderr is None else _number(stderr, f"{where}, stderr"),
        **{name: None if row.get(name) is None else _index(row[name], f"{where}, {name}") for name in ("length", "n")},
    }


def match_checkpoints(names: Sequence[str], run: Run, mapping: Mapping[str, str] | None = None) -> dict[str, str]:
    """Which checkpoint of `run` each of `names` is.

    By `mapping` if it is there; else the checkpoint of that very name; else the one whose name, or whose folder's name,
    is the last part of theirs (upper and lower case are the same).

    Args:
        names: checkpoints as an outside file calls them (names or paths).
        run: an opened run.
        mapping: theirs -> ours.

    Returns:
        theirs -> ours, for all of `names`.

    Raises:
        LccpError: a name that matches none or several (the candidates are listed), two names that match the same
            checkpoint, or a mapping from or to something that is not there.

    Example:
        >>> match_checkpoints(["hf/Step-100"], run, {"hf/Step-100": "lccp-20K"})   # doctest: +SKIP
        {'hf/Step-100': 'lccp-20K'}
    """
    mapping = mapping or {}
    listed = run.checkpoints.select("name", "path").rows()
    ours = [name for name, _ in listed]
    for theirs, target in mapping.items():
        if theirs not in names:
            raise LccpError(f"--map {theirs}={target}: the file has no checkpoint {theirs!r}; it has {_list(names)}")
        if target not in ours:
            raise LccpError(f"--map {theirs}={target}: {run.path} has no checkpoint {target!r}; it has {_list(ours)}")
    found: dict[str, str] = {}
    for theirs in names:
        last = PurePath(theirs).name.casefold()
        near = [name for name, path in listed if last in (name.casefold(), PurePath(path or "").name.casefold())]
        if theirs in mapping:
            found[theirs] = mapping[theirs]
        elif theirs in ours:
            found[theirs] = theirs
        elif len(near) == 1:
            found[theirs] = near[0]
        else:
            problem = "matches several of" if near else "matches none of"
            raise LccpError(
                f"checkpoint {theirs!r} {problem} {run.path}: {_list(near or ours)}; say which one with "
                f"--map '{theirs}=NAME'"
            )
    for theirs, target in found.items():
        others = [other for other in found if found[other] == target and other != theirs]
        if others:
            raise LccpError(
                f"checkpoints {theirs!r} and {others[0]!r} are both {target!r} in {run.path}; "
                "tell them apart with --map theirs=ours"
            )
    return found


def import_probes(
    into: str | Path,
    kind: str,
    path: str | Path,
    *,
    mapping: Mapping[str, str] | None = None,
    name: str | None = None,
) -> pl.DataFrame:
    """Add the benchmark results of a file to the run folder `into`, and note in run.json where they are from.

    Args:
        into: a run folder that has these checkpoints.
        kind, path: as in `read_probes`.
        mapping: as in `match_checkpoints`.
        name: of the part under `probes/`; None means the file's name without its ending.

    Returns:
        The rows as they stand in the run: columns as in `PROBES_SCHEMA`, checkpoints as the run names them.

    Raises:
        LccpError: as `read_probes`, `match_checkpoints` and `store.append_probes`; or tokens that disagree with the
            run's.

    Example:
        >>> import_probes("runs/demo", "probes-csv", "ruler.csv", mapping={"step100": "lccp-20K"})   # doctest: +SKIP
    """
    path, run = Path(path), Run.open(into)
    theirs = read_probes(path, kind)
    matched = match_checkpoints(theirs["checkpoint"].unique(maintain_order=True).to_list(), run, mapping)
    tokens = dict(run.checkpoints.select("name", "tokens_seen").rows())
    for their_name, their_tokens in theirs.select("checkpoint", "tokens_seen").unique(maintain_order=True).rows():
        ours = matched[their_name]
        if their_tokens is not None and their_tokens != tokens[ours]:
            raise LccpError(
                f"{path}: checkpoint {their_name!r} has {their_tokens} tokens, but {ours!r} in {run.path} has "
                f"{tokens[ours]}; mend the file, or map it to the right one with --map '{their_name}=NAME'"
            )
    probes = (
        theirs.with_columns(pl.col("checkpoint").replace_strict(matched, return_dtype=pl.String))
        .with_columns(tokens_seen=pl.col("checkpoint").replace_strict(tokens, return_dtype=pl.Int64))
        .select(PROBE_COLUMNS)
    )
    name = name or path.stem
    part = append_probes(run.path, name, probes)
    _record_import(run, name=name, kind=kind, path=path, table=part, rows=probes.height, checkpoints=matched)
    return probes


def _record_import(run: Run, *, name: str, kind: str, path: Path, table: Path, rows: int, **more: Any) -> None:
    record = {
        "name": name,
        "kind": kind,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "table": table.relative_to(run.path).as_posix(),
        "rows": rows,
        **more,
    }
    manifest = Run.open(run.path).manifest  # another writer may have added to it
    imports = manifest.setdefault("imports", [])
    if any({key: value for key, value in old.items() if key != "imported"} == record for old in imports):
        return
    imports.append({**record, "imported": datetime.now(UTC).isoformat(timespec="seconds")})
    write_json(run.path / "run.json", manifest)


def _csv_rows(
    path: Path, *, required: Sequence[str], known: Sequence[str] | None = None
) -> Iterable[tuple[int, dict[str, str]]]:
    """Line number and stripped cells of each row of a CSV with a header; empty lines are passed over."""
    reader = csv.reader(_read_text(path).splitlines(keepends=True), strict=True)
    header: list[str] | None = None
    rows = 0
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if header is None:
                header = cells
                _check_columns(f"{path} line {reader.line_num}", header, required, known)
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


def _check_columns(where: str, got: Sequence[str], required: Sequence[str], known: Sequence[str] | None) -> None:
    missing = [name for name in required if name not in got]
    unknown = [name for name in got if known is not None and name not in known]
    twice = [name for name in got if got.count(name) > 1]
    if missing:
        raise LccpError(f"{where}: no column {missing[0]!r}; expected {', '.join(required)}, got {', '.join(got)}")
    if unknown:
        raise LccpError(f"{where}: unknown column {unknown[0]!r}; known are {', '.join(known or ())}")
    if twice:
        raise LccpError(f"{where}: column {twice[0]!r} stands there twice; keep one")


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LccpError(f"{path} cannot be read: {error.strerror or error}; give the file to import") from None
    except UnicodeDecodeError as error:
        raise LccpError(f"{path} is no text in UTF-8 (byte {error.start}); give the file to import") from None
    if not text.strip():
        raise LccpError(f"{path} is empty; give the file to import")
    return text


def _read_json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise LccpError(f"{path}: key {twice!r} stands there twice; keep one")
        return content

    try:
        return json.loads(_read_text(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise LccpError(f"{path} line {error.lineno}: no JSON ({error.msg}); give the file as it came") from None
    except (ValueError, RecursionError) as error:
        raise LccpError(f"{path}: cannot be read as JSON ({error}); give the file as it came") from None


def _number(cell: Any, where: str) -> float:
    """A finite number, or NaN where `nan` is written."""
    try:
        if isinstance(cell, bool):
            raise ValueError
        value = float(cell)
    except (ValueError, TypeError, OverflowError):
        raise LccpError(f"{where}: expected a number, got {_brief(cell)}") from None
    if math.isinf(value):
        raise LccpError(f"{where}: expected a finite number, got {_brief(cell)}")
    return value


def _index(cell: Any, where: str) -> int:
    """A whole number, 0 or more; a JSON integer or digits."""
    if isinstance(cell, bool) or not re.fullmatch(r"\d{1,18}", str(cell), re.ASCII):
        raise LccpError(f"{where}: expected a whole number, 0 or more, got {_brief(cell)}")
    return int(cell)


def _brief(value: object) -> str:
    """A value as an error message shows it, cut short."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
