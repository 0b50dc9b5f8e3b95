"""The run folder: immutable Parquet parts, one per unit of work, and a `run.json` that says how they came to be.

A unit of work is (checkpoint, shard of cases). Its part files are written under a temporary name, fsynced and renamed:
that a part exists means that it is done, so resuming and parallel writers need no locks, and a kill at any moment
leaves either a whole part or none. This module knows tables and files; it refuses to know models, prompts or
statistics, and imports no torch. Writing a part costs two fsyncs; reading is lazy (polars) and touches only the
columns that are asked for.

Layout of a run folder:
    run.json          schema version, resolved config and its hash, versions, git commit, seeds, checkpoints
    cases.parquet     one row per case: the prompt's tokens, the answer's tokens, the exact spans, columns of the task
    scores/           checkpoint, tokens_seen, case_id, mode, metric, layer, head, value
    outcomes/         checkpoint, tokens_seen, case_id, mode, answer_loss_nats, answer_ppl, greedy_exact, ...
    probes/           checkpoint, tokens_seen, benchmark, subset, length, metric, score, n, stderr
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from lccp_interp.parts import check_entries, check_parts, checkpoint_frame, collect, columns_of, is_whole
from lccp_interp.schema import SCHEMA_VERSION, Case, CaseResult, Checkpoint, LccpError, Span

CASES_SCHEMA: dict[str, Any] = {
    "case_id": pl.String,
    "task": pl.String,
    "length": pl.Int64,
    "depth_fraction": pl.Float64,
    "needle_id": pl.String,
    "haystack_id": pl.String,
    "sample": pl.Int64,
    "seed": pl.Int64,
    "prompt_ids": pl.List(pl.Int32),
    "answer_ids": pl.List(pl.Int32),
    "needle_start": pl.Int64,
    "needle_end": pl.Int64,
    "source_start": pl.Int64,
    "source_end": pl.Int64,
    "distance": pl.Int64,
    "interference": pl.Int64,
    "question_start": pl.Int64,
    "question_end": pl.Int64,
}
TASK_COLUMNS = ("distance", "interference")
"""Columns of cases that belong to one task: null in the others, and not there in runs made before that task was."""
QUESTION_COLUMNS = ("question_start", "question_end")
"""Where the question stands: null where it is not known, and not there in runs made before it was kept."""

SCORES_SCHEMA: dict[str, Any] = {
    "checkpoint": pl.String,
    "tokens_seen": pl.Int64,
    "case_id": pl.String,
    "mode": pl.String,
    "metric": pl.String,
    "layer": pl.Int32,
    "head": pl.Int32,
    "value": pl.Float32,
}
OUTCOMES_SCHEMA: dict[str, Any] = {
    "checkpoint": pl.String,
    "tokens_seen": pl.Int64,
    "case_id": pl.String,
    "mode": pl.String,
    "answer_loss_nats": pl.List(pl.Float32),
    "answer_ppl": pl.Float64,
    "greedy_exact": pl.Boolean,
    "token_accuracy": pl.Float64,
    "rouge1_recall": pl.Float64,
    "generated": pl.String,
}
TABLES: dict[str, dict[str, Any]] = {"scores": SCORES_SCHEMA, "outcomes": OUTCOMES_SCHEMA}
OPTIONAL_COLUMNS = ("token_accuracy", "rouge1_recall", "generated")
"""Columns that another writer's parts may lack: nothing over checkpoints is read from them."""

REDO_PART = "run the scoring command again after deleting it, it redoes this part"
RESTORE = "restore it, or score into a new folder"
PROBES_SCHEMA: dict[str, Any] = {
    "checkpoint": pl.String,
    "tokens_seen": pl.Int64,
    "benchmark": pl.String,
    "subset": pl.String,
    "length": pl.Int64,
    "metric": pl.String,
    "score": pl.Float64,
    "n": pl.Int64,
    "stderr": pl.Float64,
}
"""Benchmark results per checkpoint. Null where there is none or it is not known: subset, length (tokens), n, stderr."""

PROBE_KEY = ("checkpoint", "benchmark", "subset", "length", "metric")
"""What a probe result is of; a run holds one score for each."""

PROVENANCE_PACKAGES = ("lccp_interp", "torch", "transformers", "tokenizers", "numpy", "polars", "safetensors")

ORPHAN_AGE_S = 3600
"""A temporary file older than this belongs to nobody who is still writing."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is fsynced and renamed onto `path`.

    A reader sees the old file or the new one, never a part of it. On an exception the temporary file is removed.

    Raises:
        LccpError: the file cannot be written (no room, no right, a folder of that name).
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
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
    except OSError as error:
        raise LccpError(
            f"cannot write {path}: {error.strerror or error}; choose another place, or make room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved config (JSON with sorted keys), the identity of a study.

    Example:
        >>> config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


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


def provenance() -> dict[str, Any]:
    """Versions, git commit and machine of this moment, for `run.json`."""
    versions = {}
    for package in PROVENANCE_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).resolve().parent
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": commit,
    }


def cases_frame(cases: Sequence[Case]) -> pl.DataFrame:
    """Table of cases, one row each, columns as in `CASES_SCHEMA`."""
    rows = [
        {
            "case_id": case.case_id,
            "task": case.task,
            "length": case.length,
            "depth_fraction": case.depth_fraction,
            "needle_id": case.needle_id,
            "haystack_id": case.haystack_id,
            "sample": case.sample,
            "seed": case.seed,
            "prompt_ids": list(case.prompt_ids),
            "answer_ids": list(case.answer_ids),
            "needle_start": case.needle.start,
            "needle_end": case.needle.end,
            "source_start": case.source.start,
            "source_end": case.source.end,
            **{name: getattr(case, name) for name in TASK_COLUMNS},
            **{name: getattr(case.question, name.removeprefix("question_"), None) for name in QUESTION_COLUMNS},
        }
        for case in cases
    ]
    return pl.DataFrame(rows, schema=CASES_SCHEMA)


def cases_from_frame(frame: pl.DataFrame) -> list[Case]:
    """The inverse of `cases_frame`."""
    return [
        Case(
            case_id=row["case_id"],
            task=row["task"],
            length=row["length"],
            depth_fraction=row["depth_fraction"],
            needle_id=row["needle_id"],
            haystack_id=row["haystack_id"],
            sample=row["sample"],
            seed=row["seed"],
            prompt_ids=tuple(row["prompt_ids"]),
            answer_ids=tuple(row["answer_ids"]),
            needle=Span(row["needle_start"], row["needle_end"]),
            source=Span(row["source_start"], row["source_end"]),
            **{name: row.get(name) for name in TASK_COLUMNS},
            question=None if row.get("question_start") is None else Span(row["question_start"], row["question_end"]),
        )
        for row in frame.iter_rows(named=True)
    ]


def result_frames(
    checkpoint: Checkpoint, mode: str, results: Sequence[CaseResult], answers: Mapping[str, Sequence[int]]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Long tables (scores, outcomes) of one unit's results.

    Args:
        checkpoint: whose results these are.
        mode: `teacher_forced` or `generate`.
        results: one per case.
        answers: answer token ids by case id, to judge the greedy path: exact if it is the answer, or, where the model
            wrote on its own, begins with it.
    """
    score_parts = []
    outcome_rows = []
    for result in results:
        for metric, values in result.scores.items():
            n_heads = values.shape[1]
            score_parts.append(
                pl.DataFrame(
                    {
                        "case_id": pl.Series([result.case_id]).new_from_index(0, values.size),
                        "metric": pl.Series([metric]).new_from_index(0, values.size),
                        "layer": [layer for layer in result.layers for _ in range(n_heads)],
                        "head": list(range(n_heads)) * len(result.layers),
                        "value": values.reshape(-1),
                    }
                )
            )
        answer = tuple(answers[result.case_id])
        # What a model wrote may be shorter or longer than the answer; teacher-forced there is a token for each.
        teacher_forced = result.generated is None
        correct = sum(got == expected for got, expected in zip(result.greedy_ids, answer, strict=teacher_forced))
        outcome_rows.append(
            {
                "checkpoint": checkpoint.name,
                "tokens_seen": checkpoint.tokens_seen,
                "case_id": result.case_id,
                "mode": mode,
                "answer_loss_nats": result.answer_loss_nats.tolist(),
                "answer_ppl": result.answer_ppl,
                "greedy_exact": correct == len(answer),
                "token_accuracy": correct / len(answer),
                "rouge1_recall": result.rouge1_recall,
                "generated": result.generated,
            }
        )
    scores = pl.concat(score_parts).with_columns(
        checkpoint=pl.lit(checkpoint.name), tokens_seen=pl.lit(checkpoint.tokens_seen), mode=pl.lit(mode)
    )
    return (
        scores.select(pl.col(name).cast(dtype) for name, dtype in SCORES_SCHEMA.items()),
        pl.DataFrame(outcome_rows, schema=OUTCOMES_SCHEMA),
    )


@dataclass(frozen=True)
class Run:
    """A run folder, opened for reading.

    Example:
        >>> run = Run.open("runs/demo")                                           # doctest: +SKIP
        >>> run.scores.filter(metric="retrieval").collect()                       # doctest: +SKIP

    Raises:
        LccpError: no run there, a run of a newer schema, or an unreadable file.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open the run folder at `path`."""
        path = Path(path)
        manifest_path = path / "run.json"
        if not manifest_path.is_file():
            raise LccpError(
                f"no run at {path}: it has no run.json; make one with `lccp score CHECKPOINT... --out {path}`"
            )
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            if not isinstance(manifest, dict):
                raise TypeError("it is no object")
            version = int(manifest["schema_version"])
            if version <= SCHEMA_VERSION and not (
                isinstance(manifest["config"], dict) and isinstance(manifest["checkpoints"], list)
            ):
                raise TypeError("config must be an object and checkpoints a list")
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise LccpError(f"{manifest_path} cannot be read ({why}); {RESTORE}") from error
        if version > SCHEMA_VERSION:
            raise LccpError(
                f"{manifest_path} has schema version {version}, this lccp_interp reads up to {SCHEMA_VERSION}; "
                "upgrade lccp_interp"
            )
        return cls(path, manifest)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config of the study."""
        return dict(self.manifest["config"])

    @property
    def checkpoints(self) -> pl.DataFrame:
        """Columns name, path, tokens_seen, stage, stage_tokens, hash; sorted by tokens_seen.

        Raises:
            LccpError: an entry of run.json without a name or tokens, or two with the same.
        """
        schema = {
            "name": pl.String,
            "path": pl.String,
            "tokens_seen": pl.Int64,
            "stage": pl.String,
            "stage_tokens": pl.Int64,
            "hash": pl.String,
        }
        entries, where = self.manifest["checkpoints"], self.path / "run.json"
        check_entries(entries, where, RESTORE)
        return checkpoint_frame(entries, schema, where)

    @property
    def cases(self) -> pl.DataFrame:
        """All cases, columns as in `CASES_SCHEMA`; null where a task or an older run has none."""
        path = self.path / "cases.parquet"
        if not path.is_file():
            raise LccpError(f"run {self.path} has no cases.parquet; score into a new folder")
        later = (*TASK_COLUMNS, *QUESTION_COLUMNS)
        columns_of(path, [name for name in CASES_SCHEMA if name not in later], RESTORE)
        frame = collect(pl.scan_parquet(path), [path], RESTORE)
        older = [pl.lit(None, CASES_SCHEMA[name]).alias(name) for name in later if name not in frame.columns]
        return frame.with_columns(older).select(*CASES_SCHEMA, pl.exclude(CASES_SCHEMA))

    @property
    def scores(self) -> pl.LazyFrame:
        """Per-case head scores of every finished unit, columns as in `SCORES_SCHEMA`."""
        return self._scan("scores")

    @property
    def outcomes(self) -> pl.LazyFrame:
        """Per-case outcomes of every finished unit, columns as in `OUTCOMES_SCHEMA`."""
        return self._scan("outcomes")

    @property
    def probes(self) -> pl.LazyFrame:
        """Benchmark results per checkpoint, columns as in `PROBES_SCHEMA`; no rows where none were added."""
        parts = sorted((self.path / "probes").glob("*.parquet"))
        check_parts(parts, PROBES_SCHEMA, "delete it and add its results again")
        return pl.scan_parquet(parts) if parts else pl.LazyFrame(schema=PROBES_SCHEMA)

    def _scan(self, table: str) -> pl.LazyFrame:
        parts = sorted((self.path / table).glob("*.parquet"))
        if not parts:
            raise LccpError(
                f"run {self.path} holds no finished {table} yet; finish it with the command that began it "
                f"(`lccp score ... --out {self.path}`)"
            )
        check_parts(parts, [name for name in TABLES[table] if name not in OPTIONAL_COLUMNS], REDO_PART)
        return pl.scan_parquet(parts)

    def collect(self, query: pl.LazyFrame) -> pl.DataFrame:
        """The rows of a query of `scores` or `outcomes`.

        Raises:
            LccpError: a part is damaged inside; it is named.
        """
        return collect(query, sorted(part for table in TABLES for part in (self.path / table).glob("*")), REDO_PART)


def append_probes(run_path: str | Path, name: str, frame: pl.DataFrame) -> Path:
    """Add benchmark results to the run at `run_path` as one immutable part, whatever study the run is of.

    Args:
        run_path: a run folder.
        name: of the part; one that is there is left alone if it holds the same rows, and refused if it does not.
        frame: columns and types as in `PROBES_SCHEMA`, at least one row.

    Returns:
        The part's path.

    Raises:
        LccpError: no run there, a checkpoint that the run does not have or has with other tokens, a missing
            benchmark, metric or score (an undefined score is NaN), or results that the run or `frame` itself already
            holds.

    Example:
        >>> append_probes("runs/demo", "ruler", frame)   # doctest: +SKIP
    """
    run = Run.open(run_path)
    if dict(frame.schema) != PROBES_SCHEMA or frame.is_empty():
        raise ValueError(f"probes {name!r}: got {frame.schema} with {frame.height} rows")
    part = run.path / "probes" / f"{file_stem(name)}.parquet"
    if is_whole(part):
        if pl.read_parquet(part).equals(frame):
            return part
        raise LccpError(f"{part} is there with other results; parts are never changed, so choose another name")
    _check_probes(run, name, frame)
    with replacing(part) as temporary:
        frame.write_parquet(temporary)
    return part


def _check_probes(run: Run, name: str, frame: pl.DataFrame) -> None:
    for column in ("checkpoint", "tokens_seen", "benchmark", "metric", "score"):
        if frame[column].null_count():
            row = int(frame[column].is_null().arg_max() or 0)
            raise LccpError(f"probes {name!r}: row {row + 1} has no {column}; give one (an undefined score is NaN)")
    known = dict(run.checkpoints.select("name", "tokens_seen").rows())
    for checkpoint, tokens in frame.select("checkpoint", "tokens_seen").unique(maintain_order=True).rows():
        if checkpoint not in known:
            raise LccpError(
                f"probes {name!r}: the run {run.path} has no checkpoint {checkpoint!r}; it has {', '.join(known)}"
            )
        if known[checkpoint] != tokens:
            raise LccpError(
                f"probes {name!r}: checkpoint {checkpoint!r} has {tokens} tokens, in {run.path} {known[checkpoint]}; "
                "mend the wrong one"
            )
    twice = frame.filter(frame.select(PROBE_KEY).is_duplicated()).select(PROBE_KEY)
    where = "twice in the new results"
    if twice.is_empty():
        twice = frame.join(run.probes.collect(), on=PROBE_KEY, how="semi", nulls_equal=True).select(PROBE_KEY)
        where = f"already in {run.path / 'probes'}"
    if twice.height:
        what = ", ".join(f"{column} {value}" for column, value in twice.row(0, named=True).items() if value is not None)
        raise LccpError(f"probes {name!r}: {what} is {where} ({twice.height} such rows); keep one score for each")


class RunWriter:
    """A run folder, opened for writing by one study.

    Opening the same folder with the same config resumes it; with another config it is refused, so that two studies
    never mix. Checkpoints may be added at any time.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], cases: Sequence[Case]) -> None:
        """Create the run at `path`, or resume it.

        Raises:
            LccpError: the folder holds another study (the differing keys are named) or files that are no run.
        """
        self.path = Path(path)
        self.config = dict(config)
        frame = cases_frame(cases)
        if (self.path / "run.json").is_file():
            self.manifest = Run.open(self.path).manifest
            self._refuse_other_study(frame)
            self._remove_orphans()
            return
        if self.path.is_dir() and any(self.path.iterdir()):
            raise LccpError(f"{self.path} holds files but no run.json; choose an empty or new folder for --out")
        self.manifest = {
            "schema_version": SCHEMA_VERSION,
            "config_hash": config_hash(self.config),
            "config": self.config,
            **provenance(),
            "checkpoints": [],
        }
        # run.json first: without it a folder is no run, and nothing else in it would be believed.
        write_json(self.path / "run.json", self.manifest)
        self._write_cases(frame)

    def _write_cases(self, frame: pl.DataFrame) -> None:
        with replacing(self.path / "cases.parquet") as temporary:
            frame.write_parquet(temporary)

    def _remove_orphans(self) -> None:
        """Remove what a killed writer left; a young file may belong to one that is still at work."""
        for orphan in self.path.rglob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - orphan.stat().st_mtime > ORPHAN_AGE_S:
                    orphan.unlink()

    def _refuse_other_study(self, frame: pl.DataFrame) -> None:
        old = self.manifest["config"]
        differing = sorted(key for key in {*old, *self.config} if old.get(key) != self.config.get(key))
        if differing:
            key = differing[0]
            raise LccpError(
                f"{self.path} holds another study: {', '.join(differing)} differ "
                f"({key}: there {_short(old.get(key))}, asked {_short(self.config.get(key))}); "
                "choose another --out, or repeat the options it was made with"
            )
        if not is_whole(self.path / "cases.parquet"):
            # Killed between run.json and the cases, which follow from the config.
            self._write_cases(frame)
            return
        held = Run(self.path, self.manifest).cases
        # A run that does not say where its questions stand may be resumed.
        unknown = [name for name in QUESTION_COLUMNS if held[name].is_null().all()]
        if not held.drop(unknown).equals(frame.drop(unknown)):
            raise LccpError(
                f"{self.path} holds other cases under the same options (another version of lccp_interp wrote it?); "
                "choose another --out"
            )

    def add_checkpoints(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Enter `checkpoints` in run.json.

        Raises:
            LccpError: a name that is there with other weights, config or tokens, or a token count that another has.
        """
        self.manifest = Run.open(self.path).manifest  # another writer may have added to it
        known = {entry["name"]: entry for entry in self.manifest["checkpoints"]}
        for checkpoint in checkpoints:
            entry = {**asdict(checkpoint), "path": str(checkpoint.path)}
            old = known.get(checkpoint.name)
            if old is not None and (old["hash"], old["tokens_seen"]) != (entry["hash"], entry["tokens_seen"]):
                raise LccpError(
                    f"checkpoint {checkpoint.name!r} was scored in {self.path} with other weights, config or tokens "
                    f"(there {old['tokens_seen']} tokens, {_short(old['hash'])}; now {entry['tokens_seen']} tokens, "
                    f"{_short(entry['hash'])}); choose another --out"
                )
            same_count = [e["name"] for e in known.values() if e["tokens_seen"] == entry["tokens_seen"]]
            if old is None and same_count:
                raise LccpError(
                    f"checkpoint {checkpoint.name!r} has {entry['tokens_seen']} tokens seen, as {same_count[0]!r} in "
                    f"{self.path} has; tell them apart with --tokens NAME=COUNT"
                )
            known[checkpoint.name] = entry
        ordered = sorted(known.values(), key=lambda entry: (entry["tokens_seen"], entry["name"]))
        if ordered != self.manifest["checkpoints"]:
            self.manifest["checkpoints"] = ordered
            write_json(self.path / "run.json", self.manifest)

    def record_execution(self, record: Mapping[str, Any]) -> None:
        """Add to run.json how and where a part of the work was done (one record per call of the sweep that did any)."""
        self.manifest = Run.open(self.path).manifest  # another writer may have added to it
        self.manifest.setdefault("executions", []).append(dict(record))
        write_json(self.path / "run.json", self.manifest)

    def is_done(self, checkpoint: str, shard: int) -> bool:
        """Whether the unit's parts are there and whole."""
        return all(is_whole(self.path / table / part_name(checkpoint, shard)) for table in TABLES)

    def append(self, checkpoint: str, shard: int, *, scores: pl.DataFrame, outcomes: pl.DataFrame) -> None:
        """Write the parts of one unit; tables must have the columns of `TABLES` and at least one row."""
        for table, frame in (("outcomes", outcomes), ("scores", scores)):
            if dict(frame.schema) != TABLES[table] or frame.is_empty():
                raise ValueError(f"{table} of {checkpoint} shard {shard}: got {frame.schema} with {frame.height} rows")
            with replacing(self.path / table / part_name(checkpoint, shard)) as temporary:
                frame.write_parquet(temporary)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
