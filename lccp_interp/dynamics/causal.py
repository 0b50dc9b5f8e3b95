"""Whether the best heads do the work: what their removal costs beyond that of random heads, with intervals.

*Harm* is how much worse an answer gets: the rise of its loss (nats per token) or perplexity, the fall of exact answers
(a share, 0..1). Harm beyond random is the harm by a set of heads less the mean harm by random sets of as many heads
from the same layers. Those may be good heads too, only not the ones they stand beside, so the difference is rather too
small than too large. All sets answer the same cases, so differences are paired; a resample draws clusters of needle and
haystack, and beside them, with replacement, random sets: the interval holds the chance of both. Perplexities are
exp(mean loss) over cases.

A set of heads is *important from* the first checkpoint at which, and at those after it that `hold` asks for, the whole
interval of its harm beyond random lies above `LEAST`, so that neither noise nor a trifle counts. A rise of the loss may
come from anything that the heads do; a fall of exact answers says that retrieval needs them.

This module reads the table that `interventions.causal` wrote; it refuses to know models. Cost: one matrix product per
set.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.resampling import Resamples, draw_resamples, percentile_interval
from lccp_interp.dynamics.selection import niah_cases
from lccp_interp.interventions.causal import ablation_rows
from lccp_interp.schema import LccpError
from lccp_interp.store import Run

OUTCOMES = ("loss_nats", "answer_ppl", "greedy_exact")
LEAST = 0.05
"""Harm that is little: 0.05 nats per token (5 percent of perplexity), or 5 of 100 answers."""

CAUSAL_SCHEMA = {
    "study": pl.String, "checkpoint": pl.String, "tokens_seen": pl.Int64, "stage": pl.String, "kind": pl.String,
    "set": pl.String, "k": pl.Int64, "heads": pl.String, "outcome": pl.String,
    "intact": pl.Float64, "intact_low": pl.Float64, "intact_high": pl.Float64,
    "removed": pl.Float64, "removed_low": pl.Float64, "removed_high": pl.Float64,
    "random": pl.Float64, "random_low": pl.Float64, "random_high": pl.Float64,
    "harm": pl.Float64, "harm_low": pl.Float64, "harm_high": pl.Float64,
    "random_harm": pl.Float64, "random_harm_low": pl.Float64, "random_harm_high": pl.Float64,
    "beyond": pl.Float64, "beyond_low": pl.Float64, "beyond_high": pl.Float64,
    "n": pl.Int64, "n_draws": pl.Int64, "layer_matched": pl.Boolean, "ci_over": pl.String,
}  # fmt: skip


def causal_table(
    run: Run, study: str | None = None, *, confidence: float = 0.95, n_boot: int = 1000, seed: int = 0
) -> pl.DataFrame:
    """What the removal of heads costs, beside that of random heads, per checkpoint, set of heads and outcome.

    Args:
        run: an opened run with ablations (`lccp ablate`).
        study: one of its ablation studies; None means the one begun last.
        confidence: level of the intervals, in (0, 1).
        n_boot: number of resamples.
        seed: of the resamples.

    Returns:
        Columns study, checkpoint, tokens_seen, stage, kind, set (`top` or `single`), k, heads (`2-2 3-3`), outcome (one
        of `OUTCOMES`), intact, removed, random (the outcome's mean with all heads, without these, without random ones),
        harm, random_harm, beyond (harm less random harm), each of the six with its interval (`..._low`, `..._high`), n
        (cases), n_draws (random sets), layer_matched (whether all of these lie in the layers of the heads), ci_over
        (`clusters` or `cases`); sorted by tokens_seen, k and heads' place in the study. With one case intervals are
        NaN.

    Raises:
        LccpError: no such study, `confidence` or `n_boot` out of range, or rows of cases that the run does not have.

    Example:
        >>> causal_table(Run.open("runs/demo")).filter(outcome="loss_nats")   # doctest: +SKIP
    """
    rows = ablation_rows(run, study)
    clusters = niah_cases(run).select("case_id", "cluster")
    cases = rows.select("case_id").unique().join(clusters, on="case_id", how="left").sort("case_id")
    if cases["cluster"].null_count():
        stranger = cases.filter(pl.col("cluster").is_null())["case_id"][0]
        raise LccpError(
            f"{run.path / 'ablations'} holds rows of case {stranger!r}, which cases.parquet does not have; delete them "
            "and run `lccp ablate` again"
        )
    numbers = np.unique(cases["cluster"].to_numpy(), return_inverse=True)[1]
    resamples = draw_resamples(numbers, n_boot=n_boot, seed=seed, confidence=confidence)
    stages = dict(run.checkpoints.select("name", "stage").iter_rows())
    records = []
    for (name,), own in rows.group_by("checkpoint", maintain_order=True):
        intact = _values(own.filter(set="none"), cases)[:, 0]
        for (role, k, heads), best in own.filter(pl.col("set").is_in(["top", "single"])).group_by(
            "set", "k", "heads", maintain_order=True
        ):
            others = own.filter(set="random", matched_to=heads)
            values = (intact, _values(best, cases)[:, 0], _values(others, cases))
            shared = {
                "study": own["study"][0],
                "checkpoint": name,
                "tokens_seen": own["tokens_seen"][0],
                "stage": stages.get(str(name)),
                "kind": own["kind"][0],
                "set": role,
                "k": k,
                "heads": heads,
                "n": cases.height,
                "n_draws": values[2].shape[1],
                "layer_matched": bool(others["layer_matched"].all()),
                "ci_over": resamples.ci_over,
            }
            records += [{**shared, **record} for record in _outcomes(values, resamples, seed)]
    return pl.DataFrame(records, schema=CAUSAL_SCHEMA)


def important_from(
    table: pl.DataFrame, *, outcome: str = "loss_nats", hold: int = 2, least: float = LEAST
) -> pl.DataFrame:
    """From which checkpoint on each head, or each number of best heads, matters beyond random heads.

    Args:
        table: from `causal_table`.
        outcome: one of `OUTCOMES`.
        hold: checkpoints in a row whose interval of `beyond` must lie above `least`; where fewer are left, those there
            are.
        least: harm beyond random that counts, in the outcome's unit.

    Returns:
        One row per head of a study of single heads, else per k: set, k, heads (empty where they differ between
        checkpoints), outcome, checkpoint, tokens_seen (null where never), beyond (there), at_end (whether the interval
        lies above `least` at the last checkpoint), n_checkpoints, provisional (fewer than `hold` checkpoints to go by).

    Raises:
        LccpError: unknown outcome, or a hold below 1.

    Example:
        >>> table = pl.DataFrame({
        ...     "set": "single", "k": 1, "heads": "2-2", "outcome": "loss_nats", "checkpoint": ["a", "b", "c"],
        ...     "tokens_seen": [1, 2, 3], "beyond": [0.0, 2.0, 3.0], "beyond_low": [-1.0, 1.0, 2.0]})
        >>> important_from(table).select("heads", "checkpoint", "provisional").row(0)
        ('2-2', 'b', False)
    """
    if outcome not in OUTCOMES:
        raise LccpError(f"unknown outcome {outcome!r}; known: {', '.join(OUTCOMES)}")
    if hold < 1:
        raise LccpError(f"hold must be at least 1 checkpoint, got {hold}; the usual number is 2")
    records = []
    chosen = table.filter(outcome=outcome).with_columns(
        one=pl.when(pl.col("set") == "single").then(pl.col("heads")).otherwise(pl.lit(""))
    )
    for (role, k, _), own in chosen.group_by("set", "k", "one", maintain_order=True):
        own = own.sort("tokens_seen")
        # Undefined is not above; to polars NaN is the greatest number.
        above = (own["beyond_low"].fill_nan(None) > least).fill_null(False).to_list()
        found = next((i for i in range(len(above)) if above[i] and all(above[i : i + hold])), None)
        heads = own["heads"].unique()
        records.append(
            {
                "set": role,
                "k": k,
                "heads": heads[0] if len(heads) == 1 else "",
                "outcome": outcome,
                "checkpoint": None if found is None else own["checkpoint"][found],
                "tokens_seen": None if found is None else own["tokens_seen"][found],
                "beyond": None if found is None else own["beyond"][found],
                "at_end": above[-1],
                "n_checkpoints": own.height,
                "provisional": found is not None and found + hold > own.height,
            }
        )
    schema = {
        "set": pl.String, "k": pl.Int64, "heads": pl.String, "outcome": pl.String, "checkpoint": pl.String,
        "tokens_seen": pl.Int64, "beyond": pl.Float64, "at_end": pl.Boolean, "n_checkpoints": pl.Int64,
        "provisional": pl.Boolean,
    }  # fmt: skip
    return pl.DataFrame(records, schema=schema)


def _values(rows: pl.DataFrame, cases: pl.DataFrame) -> NDArray[np.float64]:
    """`[case, draw, outcome]`, loss and exactness, cases in the order of `cases`; NaN where there is no row."""
    draws = rows["draw"].unique().sort().to_list() or [None]
    values = np.full((cases.height, len(draws), 2), np.nan)
    places = {case: i for i, case in enumerate(cases["case_id"])}
    for case, draw, loss, exact in rows.select("case_id", "draw", "loss_nats", "greedy_exact").iter_rows():
        values[places[case], draws.index(draw)] = loss, exact
    return values


def _outcomes(
    values: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], resamples: Resamples, seed: int
) -> list[dict[str, object]]:
    """One record per outcome; `values` are intact and removed `[case, 2]` and random `[case, draw, 2]`."""
    n_cases, n_draws = values[2].shape[:2]
    n_boot = resamples.weights.shape[0]
    in_cases = resamples.weights / resamples.weights.sum(axis=1, keepdims=True)
    rng = np.random.default_rng([seed, 1])
    in_draws = rng.multinomial(n_draws, np.full(n_draws, 1 / n_draws), size=n_boot) / n_draws
    all_cases, all_draws = np.full((1, n_cases), 1 / n_cases), np.full((1, n_draws), 1 / n_draws)
    level = resamples.level
    records = []
    for outcome in OUTCOMES:
        point = _means(values, outcome, all_cases, all_draws)
        draws = _means(values, outcome, in_cases, in_draws)
        low, high = percentile_interval(np.stack(list(draws.values()), axis=1), level)
        record: dict[str, object] = {"outcome": outcome}
        for i, name in enumerate(point):
            record[name] = float(point[name][0])
            # One case says nothing about its own spread.
            defined = resamples.n_units > 1
            record |= {f"{name}_low": float(low[i]) if defined else np.nan}
            record |= {f"{name}_high": float(high[i]) if defined else np.nan}
        records.append(record)
    return records


def _means(
    values: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    outcome: str,
    in_cases: NDArray[np.float64],
    in_draws: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    """Means of one outcome in every resample, weights `[resample, case]` and `[resample, draw]` that sum to 1."""
    which = int(outcome == "greedy_exact")
    intact, removed, per_set = (in_cases @ part[..., which] for part in values)
    if outcome == "answer_ppl":
        intact, removed, per_set = np.exp(intact), np.exp(removed), np.exp(per_set)
    random = (per_set * in_draws).sum(axis=1)
    worse = -1 if outcome == "greedy_exact" else 1
    harm, random_harm = worse * (removed - intact), worse * (random - intact)
    return {
        "intact": intact,
        "removed": removed,
        "random": random,
        "harm": harm,
        "random_harm": random_harm,
        "beyond": harm - random_harm,
    }
