"""Every table that figures and report draw from, computed once per run, length, metric and mode.

A cache with names, so that six figures and a report do not scan and resample the run six times. It holds no
statistics of its own. Cost: each table is computed on first use and kept.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from lccp_interp.dynamics.births import events, lives
from lccp_interp.dynamics.causal import causal_table
from lccp_interp.dynamics.correlation import correlate
from lccp_interp.dynamics.heads import HeadSample, census, head_sample, is_retrieval_head, stability
from lccp_interp.dynamics.outcomes import interference_table, outcome_table
from lccp_interp.dynamics.selection import (
    GRID_TASKS,
    INTERFERENCE_TASK,
    base_checkpoint,
    choose_length,
    choose_mode,
    niah_cases,
    with_outcomes,
)
from lccp_interp.dynamics.series import run_series
from lccp_interp.schema import RETRIEVAL_THRESHOLD
from lccp_interp.store import Run

INTERFERENCE_FOLDER = "interference"
"""In a run's folder: the run that asked its checkpoints on the grid of distance and interference."""


@dataclass(frozen=True)
class InterferenceTables:
    """Tables of `run`, an interference run.

    Example:
        >>> InterferenceTables(Run.open("runs/demo/interference")).cells   # doctest: +SKIP
    """

    run: Run

    @cached_property
    def mode(self) -> str:
        """The mode whose results are read."""
        return choose_mode(self.run, None)

    @cached_property
    def cells(self) -> pl.DataFrame:
        """`interference_table`."""
        return interference_table(self.run, mode=self.mode)

    @cached_property
    def checkpoints(self) -> pl.DataFrame:
        """Columns checkpoint, tokens_seen, stage of the scored checkpoints, in order of tokens."""
        return _checkpoints(self.cells)

    @cached_property
    def base(self) -> str:
        """Name of the base checkpoint among them."""
        return base_checkpoint(self.checkpoints)


@dataclass(frozen=True)
class RunTables:
    """Tables of `run` in one `mode` (None: `choose_mode`); those of heads at one `length` (None: the longest).

    Example:
        >>> tables = RunTables(Run.open("runs/demo"), length=1024)   # doctest: +SKIP
        >>> tables.lives                                             # doctest: +SKIP
    """

    run: Run
    length: int | None = None
    metric: str = "retrieval"
    mode: str | None = None

    @classmethod
    def of(cls, run: Run | RunTables, *, length: int | None = None) -> RunTables:
        """`run` itself if it is a `RunTables`, else its tables at `length`."""
        return run if isinstance(run, RunTables) else cls(run, length)

    def at(self, length: int) -> RunTables:
        """The same run at another length; its tables are kept, too."""
        if length == self.head_length:
            return self
        return self._others.setdefault(length, RunTables(self.run, length, self.metric, self.mode))

    @cached_property
    def _others(self) -> dict[int, RunTables]:
        return {}

    @cached_property
    def head_length(self) -> int:
        """The length in tokens at which heads are read."""
        return choose_length(self.run, self.length)

    @cached_property
    def read_mode(self) -> str:
        """The mode whose results are read."""
        return choose_mode(self.run, self.mode)

    @cached_property
    def cases(self) -> pl.DataFrame:
        """The needle-in-a-haystack cases, without their tokens."""
        return niah_cases(self.run)

    @cached_property
    def lengths(self) -> list[int]:
        """All lengths of the run, in tokens."""
        return [int(length) for length in sorted(self.cases["length"].unique())]

    @cached_property
    def sample(self) -> HeadSample:
        """Per-case values and resamples behind `scores`."""
        sample = head_sample(self.run, metric=self.metric, length=self.head_length, mode=self.read_mode)
        return HeadSample(with_outcomes(self.run, sample.values), sample.resamples)

    @cached_property
    def scores(self) -> pl.DataFrame:
        """`score_table`, with a column `retrieves`: whether the row is a retrieval head's."""
        table = self.sample.table()
        return table.with_columns(retrieves=is_retrieval_head(table).cast(pl.Float64))

    @cached_property
    def rule(self) -> str:
        """In words, what makes a retrieval head here."""
        measured = self.scores["above_null"].is_not_null().any()
        return f"score above {RETRIEVAL_THRESHOLD:g}" + (" and above its null on decoy spans" if measured else "")

    @cached_property
    def census(self) -> pl.DataFrame:
        """`census` with intervals."""
        return census(self.scores, sample=self.sample)

    @cached_property
    def stability(self) -> pl.DataFrame:
        """`stability` at the default number of top heads."""
        return stability(self.scores)

    @cached_property
    def lives(self) -> pl.DataFrame:
        """`lives` by the default rule."""
        return lives(self.scores)

    @cached_property
    def events(self) -> pl.DataFrame:
        """`events` by the default rule."""
        return events(self.scores)

    @cached_property
    def by_length(self) -> pl.DataFrame:
        """`outcome_table` per length."""
        return outcome_table(self.run, by=("length",), mode=self.read_mode)

    @cached_property
    def by_depth(self) -> pl.DataFrame:
        """`outcome_table` per length and depth."""
        return outcome_table(self.run, by=("length", "depth_fraction"), mode=self.read_mode)

    @cached_property
    def checkpoints(self) -> pl.DataFrame:
        """Columns checkpoint, tokens_seen, stage of the scored checkpoints, in order of tokens."""
        return _checkpoints(self.by_length)

    @cached_property
    def scored(self) -> pl.DataFrame:
        """Those of `checkpoints` that hold head scores at this length, in order of tokens."""
        return self.sample.values.checkpoints

    @cached_property
    def base(self) -> str:
        """Name of the base checkpoint."""
        return base_checkpoint(self.checkpoints)

    def causal(self, study: str) -> pl.DataFrame:
        """`causal_table` of one ablation study.

        Raises:
            LccpError: what `causal_table` raises.
        """
        if study not in self._causal:
            self._causal[study] = causal_table(self.run, study)
        return self._causal[study]

    @cached_property
    def _causal(self) -> dict[str, pl.DataFrame]:
        return {}

    @cached_property
    def correlations(self) -> pl.DataFrame:
        """`correlate` of the cheap series with the run's results, or among themselves where it has none.

        Raises:
            LccpError: what `run_series` and `correlate` raise.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # identical weights are told by the command
            cheap, found = run_series(self.run, length=self.head_length, metric=self.metric, mode=self.read_mode)
            # Benchmarks are dear: often only some checkpoints have them, and n says how many.
            return correlate(cheap, None if found.is_empty() else found, common=True)

    @cached_property
    def has_grid(self) -> bool:
        """Whether the run has cases on a grid of lengths and depths, which nearly all tables are of."""
        return bool(self.run.cases["task"].is_in(GRID_TASKS).any())

    @cached_property
    def interference(self) -> InterferenceTables | None:
        """Tables over distance and interference: of the run itself if that is its task, else of its companion.

        The companion is a run of its own in the folder `interference`; None where there is none.
        """
        if (self.run.cases["task"] == INTERFERENCE_TASK).any():
            return InterferenceTables(self.run)
        companion = self.run.path / INTERFERENCE_FOLDER
        return InterferenceTables(Run.open(companion)) if (companion / "run.json").is_file() else None


def _checkpoints(table: pl.DataFrame) -> pl.DataFrame:
    return table.select("checkpoint", "tokens_seen", "stage").unique().sort("tokens_seen", "checkpoint")
