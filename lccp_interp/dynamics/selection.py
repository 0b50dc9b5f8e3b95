"""Which part of a run a question is about: its checkpoints in order, one length, one metric, one mode.

Everything over time is read at ONE length: pooling lengths mixes easy and hard cases whose proportions differ between
runs, and shows deaths that never happened. This module reads tables lazily and hands out dense arrays; it refuses to
know statistics and pictures. Cost: one filtered scan of the score parts.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.schema import NULL_SUFFIX, LccpError
from lccp_interp.store import Run

GRID_TASKS = ("niah", "longbio")
"""Tasks whose cases lie on a grid of lengths and depths, one needle each: what heads are read on."""

INTERFERENCE_TASK = "interference"
PAPER_MODE = "teacher_forced"

CORPUS_BENCHMARKS = ("corpus-ppl", "LongPPL")
"""Benchmarks of reading long documents: they ask nothing and need no fine-tuning."""

NOT_SCORES = ("key_tokens",)
"""Metrics of those that count what was read; they say nothing of a checkpoint and are no curve."""


def choose(what: str, got: str, known: Sequence[str], where: str) -> str:
    """Return `got` if it is one of `known`, else raise an error that lists them and suggests the nearest.

    Example:
        >>> choose("metric", "retrieval", ["retrieval", "wu"], "runs/demo")
        'retrieval'
    """
    if got in known:
        return got
    nearest = difflib.get_close_matches(got, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise LccpError(f"unknown {what} {got!r} in {where}: known are {', '.join(known) or 'none'}{hint}")


def choose_metric(got: str, known: Sequence[str], run: Run) -> str:
    """`got` if the run holds this head metric.

    Raises:
        LccpError: it does not; the ones it holds, the nearest, and the command that measures another.
    """
    try:
        return choose("metric", got, known, str(run.path))
    except LccpError as error:
        if "did you mean" in str(error):
            raise
        raise LccpError(
            f"{error}; a run keeps the metrics it was scored with, `lccp score CHECKPOINT... --metrics {got} --out "
            "ANOTHER_RUN` measures this one if there is one of its name"
        ) from None


def base_checkpoint(checkpoints: pl.DataFrame) -> str:
    """Name of the base checkpoint: the last before the last stage, or the first where there is one stage only.

    It is the study's "0B" (arXiv 2604.02650): the model as it enters long-context continual pre-training.

    Args:
        checkpoints: columns `checkpoint` (or `name`), `tokens_seen`, `stage`; repeated rows do no harm.

    Raises:
        LccpError: the table has no rows.

    Example:
        >>> base_checkpoint(pl.DataFrame({
        ...     "checkpoint": ["a", "b", "c"], "tokens_seen": [1, 2, 3], "stage": ["pretrain", "pretrain", "lccp"]}))
        'b'
    """
    if checkpoints.is_empty():
        raise LccpError("no checkpoints: the table is empty; score at least one checkpoint")
    name = "checkpoint" if "checkpoint" in checkpoints.columns else "name"
    ordered = checkpoints.select(name, "tokens_seen", "stage").unique().sort("tokens_seen", name)
    earlier = ordered.filter(pl.col("stage").ne_missing(pl.lit(ordered["stage"][-1])))
    return str(earlier[name][-1] if earlier.height else ordered[name][0])


def niah_cases(run: Run) -> pl.DataFrame:
    """The needle-in-a-haystack cases of `run`, without their tokens, sorted by case id.

    The column `cluster` numbers the pairs of needle and haystack.

    Raises:
        LccpError: the run has none.
    """
    return _cases_of(run, GRID_TASKS, "score with --task niah, or read it with `lccp figures`")


def interference_cases(run: Run) -> pl.DataFrame:
    """The cases of `run` on the grid of distance and interference, as `niah_cases` gives others."""
    return _cases_of(run, (INTERFERENCE_TASK,), "score with --task interference")


def _cases_of(run: Run, tasks: Sequence[str], hint: str) -> pl.DataFrame:
    cases = run.cases.filter(pl.col("task").is_in(tasks)).drop("prompt_ids", "answer_ids").sort("case_id")
    if cases.is_empty():
        others = ", ".join(sorted(run.cases["task"].unique())) or "none"
        raise LccpError(f"run {run.path} has no cases of task {tasks[0]!r} (it has: {others}); {hint}")
    pairs = cases.select("needle_id", "haystack_id").unique().sort("needle_id", "haystack_id").with_row_index("cluster")
    return cases.join(pairs, on=["needle_id", "haystack_id"], how="left", maintain_order="left")


def choose_length(run: Run, length: int | None) -> int:
    """`length` if the run has cases of it, its longest length for None.

    Raises:
        LccpError: unknown length; the known ones are listed.
    """
    known = sorted(niah_cases(run)["length"].unique().to_list())
    if length is None:
        return int(known[-1])
    if length not in known:
        raise LccpError(
            f"run {run.path} has no cases of {length} tokens; it has {', '.join(map(str, known))}; "
            "choose one of them or score that length"
        )
    return length


def choose_mode(run: Run, mode: str | None) -> str:
    """`mode` if the run holds outcomes of it; for None the paper's (`teacher_forced`), or the one that the run holds.

    Raises:
        LccpError: unknown mode; the known ones are listed.
    """
    known = run.collect(run.outcomes.select(pl.col("mode").unique()))["mode"].sort().to_list()
    if mode is None:
        return PAPER_MODE if PAPER_MODE in known else str(known[0])
    return choose("mode", mode, known, str(run.path))


def scored_checkpoints(run: Run, mode: str) -> pl.DataFrame:
    """Columns checkpoint, tokens_seen, stage of the checkpoints that hold outcomes in `mode`, in order of tokens.

    Checkpoints that are entered in the run but not scored yet are left out, and with a warning those that hold outcomes
    and are not entered.

    Raises:
        LccpError: no checkpoint that holds outcomes is entered in the run.
    """
    held = run.collect(run.outcomes.filter(pl.col("mode") == mode).group_by("checkpoint").len())
    return _entered(run, held, "outcomes")


def _entered(run: Run, held: pl.DataFrame, table: str) -> pl.DataFrame:
    """Columns checkpoint, tokens_seen, stage of those of `held` (columns checkpoint, len) that run.json has."""
    listed = run.checkpoints.select(pl.col("name").alias("checkpoint"), "tokens_seen", "stage")
    strangers = held.filter(~pl.col("checkpoint").is_in(listed["checkpoint"].implode())).sort("checkpoint")
    known = listed.filter(pl.col("checkpoint").is_in(held["checkpoint"].implode())).sort("tokens_seen", "checkpoint")
    if strangers.height:
        names = named(strangers["checkpoint"].to_list())
        what = f"{strangers['len'].sum()} rows of checkpoints that run.json does not have ({names})"
        if known.is_empty():
            raise LccpError(f"{run.path / table} holds only {what}; restore run.json, or score into a new folder")
        # Where the warning is counted as raised decides what is a repetition: here, so that a report says it once.
        warnings.warn(
            f"{run.path / table} holds {what}: left out; enter them in run.json, or score them again", stacklevel=1
        )
    return known


def run_probes(run: Run) -> pl.DataFrame:
    """The probe results of `run`, columns as in `PROBES_SCHEMA`, all of checkpoints that the run has.

    Raises:
        LccpError: results of other checkpoints, or of one with other tokens_seen.
    """
    probes = run.probes.collect()
    listed = run.checkpoints.select(pl.col("name").alias("checkpoint"), known="tokens_seen")
    beside = probes.select("checkpoint", "tokens_seen").join(listed, on="checkpoint", how="left", maintain_order="left")
    strangers = beside.filter(pl.col("known").is_null())
    if strangers.height:
        raise LccpError(
            f"{run.path / 'probes'} has scores of {named(strangers['checkpoint'].unique().sort().to_list())} "
            f"({strangers.height} rows), which the run {run.path} does not have; it has "
            f"{named(listed['checkpoint'].to_list(), 20)}; import them anew with --map THEIRS=OURS"
        )
    other = beside.filter(pl.col("tokens_seen") != pl.col("known")).unique(maintain_order=True)
    if other.height:
        name, theirs, ours = other.row(0)
        more = f" (and {other.height - 1} more checkpoints alike)" if other.height > 1 else ""
        raise LccpError(
            f"{run.path / 'probes'} has {name} at {theirs} tokens_seen, {run.path / 'run.json'} at {ours}{more}; mend "
            "the wrong one"
        )
    return probes


def warn_of_twins(run: Run, names: Sequence[str]) -> None:
    """Warn of checkpoints among `names` with the same weights: they are kept, and are no further evidence."""
    hashed = run.checkpoints.filter(pl.col("name").is_in(names), pl.col("hash").is_not_null(), pl.col("hash") != "")
    for twins in hashed.group_by("hash", maintain_order=True).agg("name")["name"]:
        if len(twins) > 1:
            warnings.warn(
                f"checkpoints {named(twins.to_list())} of {run.path} hold identical weights: they count as "
                f"{len(twins)} points and are one",
                stacklevel=1,
            )


def named(names: Sequence[str], most: int = 8) -> str:
    """The names in a row, of many only the first.

    Example:
        >>> named(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class HeadValues:
    """Per-case values of one metric at one length, as a dense array.

    `values` is `[checkpoint, case, head]` (NaN where undefined or not scored yet), `checkpoints` a table with columns
    checkpoint, tokens_seen, stage in the order of the first axis, `heads` an array `[head, 2]` of (layer, head) in the
    order of the last, `clusters` the cluster number of each case. `null` has the shape of `values`: the same metric on
    decoy spans of the same prompts, all NaN in a run that holds none.
    """

    metric: str
    length: int
    mode: str
    checkpoints: pl.DataFrame
    heads: NDArray[np.int64]
    clusters: NDArray[np.int64]
    values: NDArray[np.float32]
    null: NDArray[np.float32]


def head_values(
    run: Run, *, metric: str = "retrieval", length: int | None = None, mode: str | None = None
) -> HeadValues:
    """Read the values of every head in every case of one length.

    Args:
        run: an opened run.
        metric: one of the run's metrics.
        length: total length of the cases in tokens; None means the longest of the run.
        mode: one that the run holds; None means `teacher_forced`, or else the one it holds.

    Raises:
        LccpError: unknown metric, length or mode (the known ones are listed), or nothing scored at that length.
    """
    known = run.collect(run.scores.select(pl.col("metric").unique()))["metric"].sort().to_list()
    metric = choose_metric(metric, known, run)
    mode = choose_mode(run, mode)
    length = choose_length(run, length)
    cases = niah_cases(run).filter(pl.col("length") == length)
    all_ids = case_ids(run)
    others = all_ids.filter(~all_ids.is_in(cases["case_id"].implode()))
    long = run.collect(
        run.scores.filter(
            pl.col("metric").is_in([metric, metric + NULL_SUFFIX]),
            pl.col("mode") == mode,
            # Not only those of the length: rows of cases that the run does not have must not vanish in silence.
            ~pl.col("case_id").is_in(others.implode()),
        ).select("checkpoint", "case_id", "layer", "head", "value", is_null=pl.col("metric") != metric)
    )
    long = of_known_cases(run, "scores", long, cases["case_id"])
    if long.is_empty():
        raise LccpError(f"run {run.path} has no {metric} scores at {length} tokens in mode {mode} yet; finish scoring")
    checkpoints = _entered(run, long.group_by("checkpoint").len(), "scores")
    heads = long.select("layer", "head").unique().sort("layer", "head")
    indexed = (
        long.join(checkpoints.select("checkpoint").with_row_index("i"), on="checkpoint")
        .join(cases.select("case_id").with_row_index("j"), on="case_id")
        .join(heads.with_row_index("k"), on=["layer", "head"])
    )
    both = np.full((2, checkpoints.height, cases.height, heads.height), np.nan, np.float32)
    at = [indexed[axis].to_numpy() for axis in ("is_null", "i", "j", "k")]
    at[0] = at[0].astype(np.int64)
    both[tuple(at)] = indexed["value"].to_numpy()
    seen = np.zeros(both.shape, bool)
    seen[tuple(at)] = True
    warn_of_copies(run, "scores", len(at[0]) - int(np.count_nonzero(seen)))
    # One infinite value would make a mean of everything; it counts as undefined.
    both[np.isinf(both)] = np.nan
    clusters = np.unique(cases["cluster"].to_numpy(), return_inverse=True)[1]
    return HeadValues(metric, length, mode, checkpoints, heads.to_numpy().astype(np.int64), clusters, *both)


def case_ids(run: Run) -> pl.Series:
    """Ids of all cases of the run, of any task; reads no tokens."""
    path = run.path / "cases.parquet"
    return pl.scan_parquet(path).select("case_id").collect()["case_id"] if path.is_file() else run.cases["case_id"]


def of_known_cases(run: Run, table: str, rows: pl.DataFrame, known: pl.Series) -> pl.DataFrame:
    """The rows whose case_id is `known`; with a warning that counts the others, which no case explains."""
    is_known = pl.col("case_id").is_in(known.implode())
    strangers = rows.filter(~is_known)
    if strangers.is_empty():
        return rows
    warnings.warn(
        f"{run.path / table} holds {strangers.height} rows of cases that cases.parquet does not have "
        f"({named(strangers['case_id'].unique().sort().to_list(), 3)}): left out; restore cases.parquet, or score into "
        "a new folder",
        stacklevel=1,
    )
    return rows.filter(is_known)


def warn_of_copies(run: Run, table: str, n_twice: int) -> None:
    """Warn of `n_twice` rows that tell what another row tells, too: a part was copied."""
    if n_twice:
        warnings.warn(
            f"{run.path / table} holds {n_twice} rows that say the same thing as another row, or contradict it: the "
            "one in the last part by name counts; delete the copied part",
            stacklevel=1,
        )


def with_outcomes(run: Run, found: HeadValues) -> HeadValues:
    """`found` without checkpoints that hold head scores and no outcomes, with a warning that names them."""
    scored = scored_checkpoints(run, found.mode)["checkpoint"].to_list()
    names = found.checkpoints["checkpoint"].to_list()
    lone = [name for name in names if name not in scored]
    if not lone:
        return found
    warnings.warn(
        f"{named(lone)} of {run.path} hold head scores but no outcomes: left out; finish scoring them", stacklevel=1
    )
    kept = [row for row, name in enumerate(names) if name in scored]
    return replace(found, checkpoints=found.checkpoints[kept], values=found.values[kept], null=found.null[kept])
