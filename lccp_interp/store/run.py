"""A run folder, opened for reading.

Tables are read lazily and only the columns that are asked for; each part is looked at before it is believed. This
module refuses to write anything. Cost: run.json when it is opened, a footer per part when a table is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from lccp_interp.schema import LccpError
from lccp_interp.store.files import check_parts, collect, columns_of
from lccp_interp.store.manifest import RESTORE, check_entries, checkpoint_frame, read_manifest
from lccp_interp.store.tables import (
    CASES_SCHEMA,
    OPTIONAL_COLUMNS,
    PROBES_SCHEMA,
    QUESTION_COLUMNS,
    REDO_PART,
    TABLES,
    TASK_COLUMNS,
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
        return cls(path, read_manifest(path))

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config of the study."""
        return dict(self.manifest["config"])

    @property
    def checkpoints(self) -> pl.DataFrame:
        """Columns name, path, tokens_seen, stage, stage_tokens, hash, branch, source; sorted by tokens_seen.

        `branch` and `source` (where on a hub it came from) are null where there is none, and in older runs.

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
            "branch": pl.String,
            "source": pl.String,
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
