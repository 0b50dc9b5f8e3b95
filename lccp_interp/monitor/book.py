"""The monitor's run folder: observations entered as checkpoints, and their numbers at hand without reading all again.

What is written is an ordinary run (`lccp_interp.store`), so every tool works on it, and beside it `monitor.jsonl`: one
line per observation, with its numbers, its cost and what went wrong. A checkpoint's rows of the score table depend on
no other checkpoint, so they are made once, of the results in memory, and kept. This module refuses to know models.
Cost: per observation two small Parquet parts, and the bootstrap of one checkpoint per length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from lccp_interp.dynamics.heads import HeadSample
from lccp_interp.dynamics.resampling import draw_resamples
from lccp_interp.dynamics.selection import GRID_TASKS, HeadValues, niah_cases
from lccp_interp.monitor.summary import Heads, Summary, length_tables, summarise
from lccp_interp.schema import NULL_SUFFIX, Case, CaseResult, Checkpoint, LccpError
from lccp_interp.store import Run, RunWriter, driving, result_frames

METRIC = "retrieval"
"""By which heads are counted (arXiv 2604.02650)."""

MODE = "teacher_forced"
JOURNAL = "monitor.jsonl"
CASES_PER_PART = 64
"""As in a sweep."""

SAME_LOSS_NATS = 1e-3
"""Two observations of one step whose answer losses are further apart were made of different weights."""


class Book:
    """A run folder of observations, opened by the one process that writes it."""

    def __init__(
        self, out: Path, config: Mapping[str, Any], cases: Sequence[Case], initial: Heads | None = None
    ) -> None:
        """Open the run at `out`, or make it.

        Args:
            out: the run folder.
            config: of the study; another one in the folder is refused.
            cases: asked at every observation.
            initial: heads to follow; None for those of the first observation.

        Raises:
            LccpError: the folder holds another study, or the cases lie on no grid of lengths.
        """
        strangers = sorted({case.task for case in cases} - set(GRID_TASKS))
        if strangers:
            raise LccpError(f"a monitor asks cases of {' or '.join(GRID_TASKS)}, got task {strangers[0]!r}")
        self._cases, self._initial = list(cases), initial
        self._answers = {case.case_id: case.answer_ids for case in cases}
        with driving(out):
            self._writer = RunWriter(out, config, cases)
        self.run = Run.open(out)
        held = self.run.checkpoints["name"].to_list()
        self._done = [name for name in held if self._is_done(name)]
        self._tables = length_tables(self.run) if self._done else {}

    @property
    def observed(self) -> list[str]:
        """Names of the observations in the folder, in order of tokens."""
        return list(self._done)

    def record(self, how: Mapping[str, Any]) -> None:
        """Put on record how this process observes."""
        with driving(self.run.path):
            self._writer.record_execution(how)

    def keep(self, checkpoint: Checkpoint, results: Sequence[CaseResult]) -> Summary:
        """Write an observation and say what it shows.

        Raises:
            LccpError: the folder cannot be written, or holds another checkpoint of this name or these tokens.
        """
        with driving(self.run.path):
            self._writer.add_checkpoints([checkpoint])
            for shard, start in enumerate(range(0, len(results), CASES_PER_PART)):
                part = results[start : start + CASES_PER_PART]
                scores, outcomes = result_frames(checkpoint, MODE, part, self._answers)
                self._writer.append(checkpoint.name, shard, scores=scores, outcomes=outcomes)
        self._done.append(checkpoint.name)
        self.run = Run.open(self.run.path)
        for length, rows in self._rows(checkpoint, results).items():
            known = self._tables.get(length)
            table = rows if known is None else pl.concat([known, rows])
            self._tables[length] = table.sort("tokens_seen", "layer", "head", maintain_order=True)
        return summarise(self.run, checkpoint.name, tables=self._tables, initial=self._initial)

    def difference(self, name: str, results: Sequence[CaseResult]) -> float:
        """How far the answer losses of `results` are from those held for the observation `name`, at most, in nats."""
        held = self.run.collect(self.run.outcomes.filter(checkpoint=name).select("case_id", "answer_loss_nats"))
        losses = {case_id: np.array(loss) for case_id, loss in held.rows()}
        return max(float(np.abs(result.answer_loss_nats - losses[result.case_id]).max()) for result in results)

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the journal."""
        with open(self.run.path / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _is_done(self, name: str) -> bool:
        n_parts = -(-len(self._cases) // CASES_PER_PART)
        return all(self._writer.is_done(name, shard) for shard in range(n_parts))

    def _rows(self, checkpoint: Checkpoint, results: Sequence[CaseResult]) -> dict[int, pl.DataFrame]:
        """The score table's rows of one checkpoint by length, as `score_table` makes them."""
        by_id = {result.case_id: result for result in results}
        place = pl.DataFrame(
            {"checkpoint": [checkpoint.name], "tokens_seen": [checkpoint.tokens_seen], "stage": [checkpoint.stage]}
        )
        tables = {}
        for (length,), cases in niah_cases(self.run).group_by("length", maintain_order=True):
            own = [by_id[case_id] for case_id in cases["case_id"]]
            layers, n_heads = own[0].layers, own[0].scores[METRIC].shape[1]
            heads = np.array([(layer, head) for layer in layers for head in range(n_heads)], np.int64)
            values, null = (
                np.stack([result.scores[name].reshape(-1) for result in own])[None].astype(np.float32)
                for name in (METRIC, METRIC + NULL_SUFFIX)
            )
            clusters = np.unique(cases["cluster"].to_numpy(), return_inverse=True)[1]
            held = HeadValues(METRIC, int(length), MODE, place, heads, clusters, values, null)
            tables[int(length)] = HeadSample(held, draw_resamples(clusters)).table()
        return tables
