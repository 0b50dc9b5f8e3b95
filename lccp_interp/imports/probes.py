"""Benchmark results that were measured elsewhere, per checkpoint.

They come as CSV or JSON with a line or an object per score, or as an evaluation harness writes them (`harness`). Their
checkpoints are matched with a run's by name, and every file becomes a part of `probes/`; its name, hash and date stand
in run.json under `imports`, with the names of the scores that were left out. Nothing is guessed, rounded or rescaled,
and two results of the same thing are refused. This module refuses to know what a benchmark asks. Cost: one pass over
the file in Python, and one over the results that the run already has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import polars as pl

from lccp_interp.checkpoints import parse_count
from lccp_interp.imports.files import (
    brief,
    check_columns,
    csv_rows,
    index,
    listed_names,
    number,
    read_json,
    record_import,
)
from lccp_interp.imports.harness import FINDERS, HARNESS_READERS, NAMES_THE_MODEL, Results, read_ruler
from lccp_interp.schema import LccpError
from lccp_interp.store import PROBE_KEY, PROBES_SCHEMA, Run, append_probes, file_stem, is_whole

PLAIN_KINDS = ("probes-csv", "probes-json")
PROBE_KINDS = (*PLAIN_KINDS, *HARNESS_READERS)
"""Kinds of benchmark results: plain tables, and what the harnesses of these names write."""

PROBE_COLUMNS = tuple(PROBES_SCHEMA)


def read_results(
    path: str | Path, kind: str, *, checkpoint: str | None = None, length: int | None = None
) -> list[Results]:
    """Read benchmark results per checkpoint, and what of them had to be left out.

    `probes-csv` is a CSV with a header, `probes-json` a JSON list of objects. Columns (keys): checkpoint, benchmark,
    metric, score; and, where they are known, tokens_seen (or tokens; `20B` is understood), subset, length (tokens), n,
    stderr. An undefined score is `nan` (in JSON null). The other kinds are what harnesses write, see `harness`.

    Args:
        path: the file; of `lm-eval`, `helmet` and `ruler` also a folder of such files.
        kind: one of `PROBE_KINDS`.
        checkpoint: of which checkpoint all this is, where it tells of one model under another name or under none.
        length: context length in tokens, for a `ruler` summary whose path does not tell it.

    Returns:
        One for each file: rows with columns as in `PROBES_SCHEMA`, checkpoints as the file names them.

    Raises:
        LccpError: an unknown kind, a malformed file (the message says which line, entry or key, and what was expected),
            no checkpoint, or `checkpoint` for results of several.

    Example:
        >>> read_results("out/step-100", "ruler", checkpoint="lccp-20K")   # doctest: +SKIP
    """
    path = Path(path)
    if kind not in PROBE_KINDS:
        raise LccpError(f"unknown kind of benchmark results {kind!r}; known are {', '.join(PROBE_KINDS)}")
    if length is not None and kind != "ruler":
        raise LccpError(f"--length is for ruler, whose files do not tell the context length; not for {kind}")
    results = [_read_file(file, kind, length) for file in _files(path, kind)]
    return _named(path, results, checkpoint)


def read_probes(
    path: str | Path, kind: str, *, checkpoint: str | None = None, length: int | None = None
) -> pl.DataFrame:
    """Read benchmark results per checkpoint.

    Args:
        path, kind, checkpoint, length: as in `read_results`.

    Returns:
        Columns as in `PROBES_SCHEMA`, checkpoints as the file names them, tokens_seen null where it does not tell.

    Raises:
        LccpError: as `read_results`.

    Example:
        >>> read_probes("ruler.csv", "probes-csv")   # doctest: +SKIP
    """
    return pl.concat([results.rows for results in read_results(path, kind, checkpoint=checkpoint, length=length)])


def _files(path: Path, kind: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    if kind not in FINDERS:
        raise LccpError(f"{path} is a folder; of kind {kind} give a file")
    find, pattern = FINDERS[kind]
    found = find(path)
    if not found:
        raise LccpError(f"{path}: no results of kind {kind} in this folder; looked for {pattern}")
    return found


def _read_file(path: Path, kind: str, length: int | None) -> Results:
    if kind == "ruler":
        return read_ruler(path, length)
    if kind in HARNESS_READERS:
        return HARNESS_READERS[kind](path)
    required = ("checkpoint", "benchmark", "metric", "score")
    if kind == "probes-csv":
        listed = [
            (f"{path} line {line}", {name: cell or None for name, cell in row.items()})
            for line, row in csv_rows(path, required=required, known=(*PROBE_COLUMNS, "tokens"))
        ]
    else:
        listed = list(_json_records(path, required))
    return Results(path, kind, pl.DataFrame([_probe_row(row, where) for where, row in listed], schema=PROBES_SCHEMA))


def _named(path: Path, results: list[Results], checkpoint: str | None) -> list[Results]:
    """The results with a checkpoint in every row: `checkpoint` where it is given."""
    named = _checkpoints(results)
    if checkpoint is None:
        for part in results:
            if part.rows["checkpoint"].null_count():
                raise LccpError(
                    f"{part.path} does not tell of which checkpoint it is (looked for {NAMES_THE_MODEL[part.kind]}); "
                    "say --checkpoint NAME"
                )
        return results
    if len(named) > 1:
        raise LccpError(
            f"--checkpoint {checkpoint}: {path} has results of several: {listed_names(named)}; say which is which with "
            "--map THEIRS=OURS"
        )
    return [
        replace(
            part,
            rows=part.rows.with_columns(checkpoint=pl.lit(checkpoint)),
            called=next(iter(_checkpoints([part])), None),
        )
        for part in results
    ]


def _checkpoints(results: Sequence[Results]) -> list[str]:
    names = [name for part in results for name in part.rows["checkpoint"].drop_nulls().unique(maintain_order=True)]
    return list(dict.fromkeys(names))


def _json_records(path: Path, required: Sequence[str]) -> Iterable[tuple[str, dict[str, Any]]]:
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise LccpError(
            f"{path}: expected a JSON list of objects with {', '.join(required)}, got {brief(content)}; "
            "one object per score"
        )
    for i, row in enumerate(content, start=1):
        where = f"{path} entry {i}"
        if not isinstance(row, dict):
            raise LccpError(f"{where}: expected an object with {', '.join(required)}, got {brief(row)}")
        check_columns(where, list(row), required, (*PROBE_COLUMNS, "tokens"))
        score = row["score"]
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise LccpError(f"{where}, score: expected a number, or null where it is undefined, got {brief(score)}")
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
        "score": number(row["score"], f"{where}, score"),
        "stderr": None if stderr is None else number(stderr, f"{where}, stderr"),
        **{name: None if row.get(name) is None else index(row[name], f"{where}, {name}") for name in ("length", "n")},
    }


def match_checkpoints(names: Sequence[str], run: Run, mapping: Mapping[str, str] | None = None) -> dict[str, str]:
    """Which checkpoint of `run` each of `names` is.

    By `mapping` if it is there; else the checkpoint of that very name; else the one whose name, or whose folder's name,
    is the last part of theirs (upper and lower case are the same).

    Args:
        names: checkpoints as an outside file calls them (names or paths).
        run: an opened run.
        mapping: theirs -> ours; "" leaves theirs out.

    Returns:
        theirs -> ours, for all of `names` that are not left out.

    Raises:
        LccpError: a name that matches none or several (the candidates are listed), two names that match the same
            checkpoint, or a mapping from or to something that is not there.

    Example:
        >>> match_checkpoints(["hf/Step-100"], run, {"hf/Step-100": "lccp-20K"})   # doctest: +SKIP
        {'hf/Step-100': 'lccp-20K'}
    """
    mapping = mapping or {}
    _check_mapping(mapping, names, run)
    listed = run.checkpoints.select("name", "path").rows()
    ours = [name for name, _ in listed]
    found: dict[str, str] = {}
    for theirs in names:
        last = PurePath(theirs).name.casefold()
        near = [name for name, path in listed if last in (name.casefold(), PurePath(path or "").name.casefold())]
        if theirs in mapping:
            found |= {theirs: mapping[theirs]} if mapping[theirs] else {}
        elif theirs in ours:
            found[theirs] = theirs
        elif len(near) == 1:
            found[theirs] = near[0]
        else:
            problem = "matches several of" if near else "matches none of"
            raise LccpError(
                f"checkpoint {theirs!r} {problem} {run.path}: {listed_names(near or ours)}; say which one with "
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


def _check_mapping(mapping: Mapping[str, str], names: Sequence[str], run: Run) -> None:
    ours = run.checkpoints["name"].to_list()
    for theirs, target in mapping.items():
        if theirs not in names:
            raise LccpError(
                f"--map {theirs}={target}: the file has no checkpoint {theirs!r}; it has {listed_names(names)}"
            )
        if target and target not in ours:
            raise LccpError(
                f"--map {theirs}={target}: {run.path} has no checkpoint {target!r}; it has {listed_names(ours)}"
            )


def import_probes(
    into: str | Path,
    kind: str,
    path: str | Path,
    *,
    mapping: Mapping[str, str] | None = None,
    name: str | None = None,
    checkpoint: str | None = None,
    length: int | None = None,
) -> pl.DataFrame:
    """Add benchmark results to the run folder `into`, and note in run.json where they are from.

    Args:
        into: a run folder that has these checkpoints.
        kind, path, checkpoint, length: as in `read_results`.
        mapping: as in `match_checkpoints`.
        name: as in `add_results`.

    Returns:
        The rows as they stand in the run: columns as in `PROBES_SCHEMA`, checkpoints as the run names them.

    Raises:
        LccpError: as `read_results` and `add_results`.

    Example:
        >>> import_probes("runs/demo", "probes-csv", "ruler.csv", mapping={"step100": "lccp-20K"})   # doctest: +SKIP
    """
    Run.open(into)  # a wrong run is told before a large file is read
    results = read_results(path, kind, checkpoint=checkpoint, length=length)
    return add_results(into, results, mapping=mapping, name=name).probes


@dataclass(frozen=True)
class Added:
    """Results as they stand in a run, checkpoints as the run names them, and the names of their parts."""

    probes: pl.DataFrame
    names: tuple[str, ...]


def add_results(
    into: str | Path, results: Sequence[Results], *, mapping: Mapping[str, str] | None = None, name: str | None = None
) -> Added:
    """Add results that were read to the run folder `into`: one part under `probes/` for each file.

    All is checked before anything is written. A file that was imported before is left as it stands.

    Args:
        into: a run folder that has these checkpoints.
        results: from `read_results`.
        mapping: as in `match_checkpoints`.
        name: of the part, for one file. None means the file's name without its ending; of a harness its kind, the
            checkpoint, and the file's name (of `helmet` data set and length, of `ruler` the length), as harnesses give
            many files one name.

    Returns:
        The rows as they stand in the run, and the names of the parts.

    Raises:
        LccpError: as `match_checkpoints` and `store.append_probes`; tokens that disagree with the run's; a result that
            the run or another of the files has for the same checkpoint, benchmark, subset, length and metric (both
            files are named); or a file that was imported before for another checkpoint.

    Example:
        >>> add_results("runs/demo", read_results("out/", "helmet"), mapping={"step100": "lccp-20K"})   # doctest: +SKIP
    """
    run = Run.open(into)
    if name is not None and len(results) > 1:
        raise LccpError(f"--name {name}: there are {len(results)} files, and each needs its own; leave out --name")
    _check_mapping(mapping or {}, _checkpoints(results), run)
    fitted = [_fitted(part, run, mapping or {}, name) for part in results]
    if not (additions := [addition for addition in fitted if addition.matched]):
        raise LccpError("--map leaves out all checkpoints of the file; keep one")
    _refuse_overlap(run, additions)
    for addition in additions:
        if addition.is_known:
            continue
        part = append_probes(run.path, addition.name, addition.probes)
        left_out = addition.results.left_out
        record_import(
            run,
            name=addition.name,
            kind=addition.results.kind,
            path=addition.results.path,
            table=part,
            rows=addition.probes.height,
            checkpoints=addition.matched,
            **({"left_out": list(left_out)} if left_out else {}),
        )
    return Added(pl.concat([addition.probes for addition in additions]), tuple(addition.name for addition in additions))


@dataclass(frozen=True)
class _Addition:
    """Results of a file, fitted to a run and ready to be written under `name`."""

    results: Results
    probes: pl.DataFrame
    matched: dict[str, str]
    name: str
    is_known: bool


def _fitted(results: Results, run: Run, mapping: Mapping[str, str], name: str | None) -> _Addition:
    names = _checkpoints([results])
    matched = match_checkpoints(names, run, {name: ours for name, ours in mapping.items() if name in names})
    unwanted = [f"all of {name} (--map {name}=)" for name in names if name not in matched]
    theirs = results.rows.filter(pl.col("checkpoint").is_in(list(matched)))
    results = replace(results, rows=theirs, left_out=(*results.left_out, *unwanted))
    tokens = dict(run.checkpoints.select("name", "tokens_seen").rows())
    for their_name, their_tokens in theirs.select("checkpoint", "tokens_seen").unique(maintain_order=True).rows():
        ours = matched[their_name]
        if their_tokens is not None and their_tokens != tokens[ours]:
            raise LccpError(
                f"{results.path}: checkpoint {their_name!r} has {their_tokens} tokens, but {ours!r} in {run.path} has "
                f"{tokens[ours]}; mend the file, or map it to the right one with --map '{their_name}=NAME'"
            )
    probes = (
        theirs.with_columns(pl.col("checkpoint").replace_strict(matched, return_dtype=pl.String))
        .with_columns(tokens_seen=pl.col("checkpoint").replace_strict(tokens, return_dtype=pl.Int64))
        .select(PROBE_COLUMNS)
    )
    if results.called:
        matched = dict(zip([results.called], matched.values(), strict=False))  # none where it is left out
    known = None if name else _name_of_same(results, run, probes, matched)
    return _Addition(results, probes, matched, name or known or _default_name(results, probes), known is not None)


def _default_name(results: Results, probes: pl.DataFrame) -> str:
    stem = results.path.stem
    if results.kind in PLAIN_KINDS:
        return stem
    if results.kind == "ruler":
        stem = stem.replace("summary", str(probes["length"][0]), 1)
    if results.kind == "helmet":
        stem = f"{probes['subset'][0]}-{probes['length'][0]}"
    ours = probes["checkpoint"].unique(maintain_order=True)
    return "-".join([results.kind, *ours, stem] if len(ours) == 1 else [results.kind, stem])


def _name_of_same(results: Results, run: Run, probes: pl.DataFrame, matched: Mapping[str, str]) -> str | None:
    """The name under which this very file was imported before."""
    sha256 = hashlib.sha256(results.path.read_bytes()).hexdigest()
    for record in _records_of_parts(run):
        if (record["kind"], record["sha256"]) != (results.kind, sha256):
            continue
        part = run.path / record["table"]
        for theirs, ours in record.get("checkpoints", {}).items():
            if matched.get(theirs, ours) != ours:
                raise LccpError(
                    f"{results.path} was imported before with {theirs!r} as {ours!r}, not {matched[theirs]!r} (as "
                    f"{record['file']}); if that was wrong, delete {part} first"
                )
        if pl.read_parquet(part).equals(probes):
            return str(record["name"])
    return None


def _records_of_parts(run: Run) -> list[dict[str, Any]]:
    """What run.json says of the imported parts of `probes/` that are there."""
    records = [record for record in run.manifest.get("imports", []) if record["table"].startswith("probes/")]
    return [record for record in records if is_whole(run.path / record["table"])]


def _refuse_overlap(run: Run, additions: Sequence[_Addition]) -> None:
    """Refuse two results for one key, of which the second comes from `additions`."""
    files = {record["table"]: record["file"] for record in _records_of_parts(run)}
    there = []
    for path in sorted((run.path / "probes").glob("*.parquet")):
        if is_whole(path):
            file = files.get(path.relative_to(run.path).as_posix())
            there.append((path, f"{path} (from {file})" if file else str(path), pl.read_parquet(path)))
    for addition in additions:
        own = run.path / "probes" / f"{file_stem(addition.name)}.parquet"
        for path, where, frame in there:
            if path == own and frame.equals(addition.probes):
                continue
            both = addition.probes.join(frame, on=PROBE_KEY, how="inner", nulls_equal=True, suffix="_there")
            if both.height:
                row = both.row(0, named=True)
                what = ", ".join(f"{column} {row[column]}" for column in PROBE_KEY if row[column] is not None)
                raise LccpError(
                    f"{addition.results.path}: {what} is already in {where}: {row['score_there']:g} there, "
                    f"{row['score']:g} here ({both.height} such rows); keep one score for each"
                )
        there.append((addition.results.path, str(addition.results.path), addition.probes))
