"""A run folder, opened for writing by one study.

This module joins units to parts and refuses to mix studies; it refuses to know how a unit is scored. Cost: two fsyncs
per part, a short lock per change of run.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from lccp_interp.schema import SCHEMA_VERSION, Case, Checkpoint, LccpError
from lccp_interp.store.files import is_whole, part_name, write_json, write_part
from lccp_interp.store.lock import holding, make_folder, refuse_strangers
from lccp_interp.store.manifest import config_hash, editing, provenance, read_manifest
from lccp_interp.store.processes import remove_orphans
from lccp_interp.store.run import Run
from lccp_interp.store.tables import QUESTION_COLUMNS, TABLES, cases_frame


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
        if not (self.path / "run.json").is_file() and self._begin():
            self._write_cases(frame)
            return
        self.manifest = read_manifest(self.path)
        self._refuse_other_study(frame)
        remove_orphans(self.path)

    def _begin(self) -> bool:
        """Make the run folder; False if another process was quicker."""
        refuse_strangers(self.path)
        make_folder(self.path)
        with holding(self.path):
            if (self.path / "run.json").is_file():
                return False
            self.manifest = {
                "schema_version": SCHEMA_VERSION,
                "config_hash": config_hash(self.config),
                "config": self.config,
                **provenance(),
                "checkpoints": [],
            }
            # run.json first: without it a folder is no run, and nothing else in it would be believed.
            write_json(self.path / "run.json", self.manifest)
        return True

    def _write_cases(self, frame: pl.DataFrame) -> None:
        write_part(frame, self.path / "cases.parquet")

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
        self.manifest = read_manifest(self.path)
        if self._entries(checkpoints) == self.manifest["checkpoints"]:
            return
        with editing(self.path) as self.manifest:  # another writer may have added to it
            self.manifest["checkpoints"] = self._entries(checkpoints)

    def _entries(self, checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
        """The entries of run.json with those of `checkpoints` among them."""
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
        return sorted(known.values(), key=lambda entry: (entry["tokens_seen"], entry["name"]))

    def record_execution(self, record: Mapping[str, Any]) -> None:
        """Add to run.json how and where a part of the work was done (one record per call of the sweep that did any)."""
        with editing(self.path) as self.manifest:
            self.manifest.setdefault("executions", []).append(dict(record))

    def is_done(self, checkpoint: str, shard: int) -> bool:
        """Whether the unit's parts are there and whole."""
        return all(is_whole(self.path / table / part_name(checkpoint, shard)) for table in TABLES)

    def append(self, checkpoint: str, shard: int, *, scores: pl.DataFrame, outcomes: pl.DataFrame) -> None:
        """Write the parts of one unit; tables must have the columns of `TABLES` and at least one row."""
        for table, frame in (("outcomes", outcomes), ("scores", scores)):
            if dict(frame.schema) != TABLES[table] or frame.is_empty():
                raise ValueError(f"{table} of {checkpoint} shard {shard}: got {frame.schema} with {frame.height} rows")
            write_part(frame, self.path / table / part_name(checkpoint, shard))


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
