"""Series over checkpoints: of a run's cheap metrics and probe results, and how two of them are put side by side.

A series table is long: checkpoint, tokens_seen, name, value. Cheap is what the checkpoint itself tells, perplexities of
long documents among it; dear is what asks for fine-tuning or a benchmark (`probe_choice.py` says which of those). Pairs
are only made of the same checkpoints; one that a series lacks is an error unless asked for, and a value that is not
finite is left out with a word about it. This module computes no statistic of two series. Cost: the tables of heads and
outcomes, once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.heads import census, score_table
from lccp_interp.dynamics.outcomes import outcome_table
from lccp_interp.dynamics.probe_choice import corpus_series, probe_series
from lccp_interp.dynamics.selection import choose, choose_length, choose_mode, named, run_probes, warn_of_twins
from lccp_interp.schema import LccpError
from lccp_interp.store import Run

Array = NDArray[np.float64]

SERIES_COLUMNS = ("checkpoint", "tokens_seen", "name", "value")
IMPORT_HINT = "make probe results with `lccp probe RUN --sft`, or import some with `lccp import FILE --into RUN`"


@dataclass(frozen=True)
class SeriesPair:
    """Two series over the same checkpoints, in order of tokens, all values finite.

    `cheap` and `probe` are float64 `[checkpoint]`, the log tokens natural logs of training tokens. They differ only in
    a shifted pair. `reason` says what was left out.
    """

    cheap_name: str
    probe_name: str
    cheap: Array
    probe: Array
    cheap_log_tokens: Array
    probe_log_tokens: Array
    reason: str = ""

    @property
    def n(self) -> int:
        """Number of checkpoints."""
        return int(self.cheap.size)

    def shifted(self, lag: int) -> SeriesPair:
        """The pair with the probe `lag` checkpoints later (earlier where negative), on the overlap."""
        size = max(self.n - abs(lag), 0)
        at_cheap, at_probe = max(-lag, 0), max(lag, 0)
        here, there = slice(at_cheap, at_cheap + size), slice(at_probe, at_probe + size)
        return SeriesPair(
            self.cheap_name,
            self.probe_name,
            self.cheap[here],
            self.probe[there],
            self.cheap_log_tokens[here],
            self.probe_log_tokens[there],
            self.reason,
        )


def log_of_tokens(tokens_seen: NDArray[np.int64]) -> Array:
    """Natural log of training tokens; where a count is 0, the smallest other count is added to all.

    The paper's first checkpoint has 0 tokens of its stage, whose log is not defined.

    Example:
        >>> np.exp(log_of_tokens(np.array([0, 20, 50]))).round(6)
        array([20., 40., 70.])
    """
    tokens = np.asarray(tokens_seen, np.float64)
    positive = tokens[tokens > 0]
    offset = positive.min() if positive.size and positive.size < tokens.size else 0.0
    return np.log(np.maximum(tokens + offset, 1.0))


def align(cheap: pl.DataFrame, probes: pl.DataFrame | None, *, common: bool = False) -> list[SeriesPair]:
    """Every cheap series with every probe series, or with every other cheap one where `probes` is None.

    Args:
        cheap, probes: columns checkpoint, tokens_seen, name, value.
        common: let each pair use the checkpoints that both its series have.

    Returns:
        Pairs in the order in which the series first stand in their tables.

    Raises:
        LccpError: the reasons are those of `correlate`.
    """
    tables = {"cheap metrics": cheap} | ({} if probes is None else {"probe results": probes})
    for what, table in tables.items():
        _check(table, what)
    order = _ordered(tables)
    if not common:
        _refuse_gaps(tables, order)
    tokens = order["tokens_seen"].to_numpy()
    first = _dense(cheap, order)
    if probes is None:
        names = list(itertools.combinations(first, 2))
        second = first
    else:
        second = _dense(probes, order)
        names = list(itertools.product(first, second))
    if not names:
        raise LccpError(f"there is one series only ({', '.join(first)}); {IMPORT_HINT}, or add a cheap metric")
    return [_pair(one, first[one], other, second[other], tokens) for one, other in names]


def _check(table: pl.DataFrame, what: str) -> None:
    missing = [column for column in SERIES_COLUMNS if column not in table.columns]
    if missing:
        raise LccpError(
            f"the table of {what} lacks {', '.join(missing)}; it has {', '.join(table.columns)}; "
            f"a series table has the columns {', '.join(SERIES_COLUMNS)}"
        )
    if table.is_empty():
        raise LccpError(f"the table of {what} is empty; give at least one series")
    unnamed = table.filter(pl.any_horizontal(pl.col("checkpoint", "tokens_seen", "name").is_null()))
    if unnamed.height:
        raise LccpError(f"{what}: {unnamed.height} rows lack a checkpoint, tokens_seen or name; fill them in")
    twice = table.filter(table.select("name", "checkpoint").is_duplicated())
    if twice.height:
        raise LccpError(
            f"{what}: {twice['name'][0]} has {twice.filter(name=twice['name'][0]).height} rows that share a checkpoint "
            f"(first {twice['checkpoint'][0]!r}); keep one value for each"
        )


def _ordered(tables: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """Checkpoints of all tables in order of tokens, one row each."""
    order = (
        pl.concat([table.select("checkpoint", pl.col("tokens_seen").cast(pl.Int64)) for table in tables.values()])
        .unique()
        .sort("tokens_seen", "checkpoint")
    )
    for column, other in (("checkpoint", "token counts"), ("tokens_seen", "checkpoints")):
        shared = order.filter(pl.col(column).is_duplicated())
        if shared.height:
            rows = named([f"{name} at {tokens}" for name, tokens in shared.rows()])
            raise LccpError(f"one {column} with several {other}: {rows}; mend the tokens_seen of these checkpoints")
    negative = order.filter(pl.col("tokens_seen") < 0)
    if negative.height:
        raise LccpError(
            f"checkpoint {negative['checkpoint'][0]!r} has {negative['tokens_seen'][0]} tokens; count from 0"
        )
    return order


def _refuse_gaps(tables: dict[str, pl.DataFrame], order: pl.DataFrame) -> None:
    held = {what: set(table["checkpoint"]) for what, table in tables.items()}
    names = order["checkpoint"].to_list()
    if len({frozenset(checkpoints) for checkpoints in held.values()}) > 1:
        listed = "; ".join(
            f"{what} have {named([name for name in names if name in checkpoints])}"
            for what, checkpoints in held.items()
        )
        raise LccpError(f"checkpoints do not match: {listed}; rename them, or use the common ones with --common")
    for what, table in tables.items():
        for name, rows in table.group_by("name", maintain_order=True):
            lacking = [checkpoint for checkpoint in names if checkpoint not in set(rows["checkpoint"])]
            if lacking:
                raise LccpError(
                    f"checkpoints do not match: {name[0]} of the {what} lacks {named(lacking)} of "
                    f"{named(names)}; add them, or use the common ones with --common"
                )


def _dense(table: pl.DataFrame, order: pl.DataFrame) -> dict[str, Array]:
    """Values of each series over the checkpoints of `order`; NaN where missing or not finite."""
    values = pl.col("value").cast(pl.Float64)
    wide = order.select("checkpoint").join(
        table.select("checkpoint", "name", values).pivot("name", index="checkpoint", values="value"),
        on="checkpoint",
        how="left",
        maintain_order="left",
    )
    arrays = {name: wide[name].fill_null(float("nan")).to_numpy() for name in wide.columns if name != "checkpoint"}
    return {name: np.where(np.isfinite(array), array, np.nan) for name, array in arrays.items()}


def _pair(one: str, first: Array, other: str, second: Array, tokens: NDArray[np.int64]) -> SeriesPair:
    defined = ~(np.isnan(first) | np.isnan(second))
    log_tokens = log_of_tokens(tokens[defined])
    left_out = int(np.count_nonzero(~defined))
    reason = f"{left_out} of {tokens.size} checkpoints undefined or missing" if left_out else ""
    return SeriesPair(one, other, first[defined], second[defined], log_tokens, log_tokens, reason)


def run_series(
    run: Run,
    *,
    length: int | None = None,
    stage: str | None = None,
    metric: str = "retrieval",
    mode: str | None = None,
    probes_like: Sequence[str] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The cheap metrics of a run at one length, and its probe results, as series tables.

    Args:
        run: an opened run.
        length: of the cases in tokens; None means the run's longest.
        stage: only the checkpoints of this stage and the last one before it, tokens counted from that one on (as the
            paper does from its 0B); None means all checkpoints and all tokens. One trend in log tokens rarely fits
            two stages.
        metric: head metric behind the census.
        mode: as in `outcome_table`.
        probes_like: glob patterns on the names of probe series; None means one metric per benchmark and subset, and
            the means over subsets (`probe_series`).

    Returns:
        cheap, probes. The cheap series are niah_score (percent), answer_ppl, n_retrieval_heads, mean_initial_score
        (over the retrieval heads of the base checkpoint, arXiv 2604.02650, Figure 5), mean_retrieval_score (over all
        heads), and the perplexities of long documents (benchmarks `corpus-ppl` and `LongPPL`), which need no
        fine-tuning. These and the probe series are named benchmark/subset/length/metric, without what is not known.
        `probes` has no rows where the run holds no probe results.

    Raises:
        LccpError: unknown length, stage, metric or mode; nothing scored; a pattern that matches no probe series.

    Warns:
        Checkpoints with identical weights: they count as several points and are one.

    Example:
        >>> cheap, probes = run_series(Run.open("runs/demo"))   # doctest: +SKIP
    """
    mode = choose_mode(run, mode)
    length = choose_length(run, length)
    # Means only: one resample is the fewest that these tables draw.
    outcomes = outcome_table(run, by=("length",), mode=mode, n_boot=1).filter(pl.col("length") == length)
    scores = score_table(run, metric=metric, length=length, mode=mode, n_boot=1)
    over_heads = scores.group_by("checkpoint", "tokens_seen").agg(
        mean_retrieval_score=pl.col("score").fill_nan(None).mean()
    )
    warn_of_twins(run, outcomes["checkpoint"].to_list())
    results = run_probes(run)
    cheap = pl.concat(
        [
            _melted(outcomes, ("niah_score", "answer_ppl")),
            _melted(census(scores), ("n_retrieval_heads", "mean_initial_score")),
            _melted(over_heads, ("mean_retrieval_score",)),
            corpus_series(results),
        ]
    )
    probes = probe_series(results, like=probes_like)
    if stage is None:
        return cheap, probes
    tokens = _tokens_of_stage(run, stage)
    return _recounted(cheap, tokens), _recounted(probes, tokens)


def _tokens_of_stage(run: Run, stage: str) -> pl.DataFrame:
    """Columns checkpoint, tokens_seen: the checkpoints of a stage behind the last one before it, counted from that."""
    checkpoints = run.checkpoints.select(pl.col("name").alias("checkpoint"), "tokens_seen", "stage")
    choose("stage", stage, checkpoints["stage"].unique(maintain_order=True).to_list(), str(run.path))
    of_stage = checkpoints.filter(pl.col("stage") == stage)
    base = checkpoints.filter(pl.col("tokens_seen") < of_stage["tokens_seen"].min()).tail(1)
    start = base["tokens_seen"][0] if base.height else 0
    return pl.concat([base, of_stage]).select("checkpoint", pl.col("tokens_seen") - start)


def _recounted(table: pl.DataFrame, tokens: pl.DataFrame) -> pl.DataFrame:
    return table.drop("tokens_seen").join(tokens, on="checkpoint", maintain_order="left").select(SERIES_COLUMNS)


def _melted(table: pl.DataFrame, columns: tuple[str, ...]) -> pl.DataFrame:
    return (
        table.select("checkpoint", "tokens_seen", *(pl.col(column).cast(pl.Float64) for column in columns))
        .unpivot(columns, index=["checkpoint", "tokens_seen"], variable_name="name", value_name="value")
        .with_columns(pl.col("value").fill_null(float("nan")))
        .sort("tokens_seen", maintain_order=True)
        .sort(pl.col("name").replace_strict({column: i for i, column in enumerate(columns)}), maintain_order=True)
    )
