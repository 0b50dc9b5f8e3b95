"""Births and deaths of retrieval heads: score series turned into lives, such that noise alone gives no events.

A head that hovers around the threshold of 0.1 crosses it at every other checkpoint. So a birth needs more than a
crossing, and likewise a death. The rule, for the scores and intervals of one head over the checkpoints in order:

- A checkpoint is *high* when score > `up` and, where decoys were measured, the head is above its null there (so that a
  living head is a retrieval head of the census), *low* when score < `down`. All else, and an undefined score, is
  *between* and decides nothing. Intervals enter where checkpoints are compared; an undefined one is no evidence.
- A head that is high at the first `hold` checkpoints was alive from the start; its birth is not in the data.
- A head that is not alive is **born** at the first checkpoint from which on it is high `hold` times in a row and has
  visibly risen: since the start or its last death there was a checkpoint with score <= `up` whose ci_high lies below
  the ci_low of all these `hold` checkpoints.
- A living head **dies** at the first checkpoint from which on it is low `hold` times in a row and has visibly fallen:
  during its life there was a high checkpoint whose ci_low lies above the ci_high of all these `hold` checkpoints.
- A head that is high `hold` times in a row without having visibly risen, and never scored below `down` before, counts
  as alive from the start too: it cannot be told from one that was there all the time. If it did score below `down`,
  nothing is said: neither that it was there nor that it was born.
- Where fewer than `hold` checkpoints are left at the right end and all of them agree, the event is *provisional*:
  shown, flagged, not to be counted.

How often noise alone passes this rule and how often a planted birth does is measured in docs/calibration.md. To ask of
every single checkpoint that its own interval lies beyond the other threshold, too, lets less noise pass, but dates the
birth of a growing head later and misses more weak ones; noise stays within its bound without it. With fewer than about
eight clusters weak births are missed; where the answer is a single token, 20 cases are few.

The module knows tables of scores; it refuses to know where they come from. It costs nothing beside scoring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError

LIVES_SCHEMA = {
    "layer": pl.Int64,
    "head": pl.Int64,
    "n_life": pl.Int64,
    "born_checkpoint": pl.String,
    "born_tokens": pl.Int64,
    "died_checkpoint": pl.String,
    "died_tokens": pl.Int64,
    "peak_score": pl.Float64,
    "peak_low": pl.Float64,
    "peak_high": pl.Float64,
    "peak_tokens": pl.Int64,
    "final_score": pl.Float64,
    "provisional": pl.Boolean,
}
EVENTS_SCHEMA = {
    "kind": pl.String,
    "layer": pl.Int64,
    "head": pl.Int64,
    "n_life": pl.Int64,
    "checkpoint": pl.String,
    "tokens_seen": pl.Int64,
    "after_tokens": pl.Int64,
    "stage": pl.String,
    "score": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "provisional": pl.Boolean,
}


@dataclass(frozen=True, slots=True)
class Life:
    """Indices of checkpoints between which a head lived: `[born, died)`.

    `born` is None for a head alive from the start, `died` None for one alive at the end. `provisional` means that the
    last of its events still waits for its `hold` checkpoints.
    """

    born: int | None
    died: int | None
    provisional: bool = False


def check_rule(up: float, down: float, hold: int) -> None:
    """Refuse thresholds that are no hysteresis and a hold below 1."""
    if not down <= up:
        raise LccpError(f"the down-threshold must not lie above the up-threshold, got down={down}, up={up}")
    if hold < 1:
        raise LccpError(f"hold must be at least 1 checkpoint, got {hold}; the usual number is 2")


def trace_lives(
    score: NDArray[np.float64],
    ci_low: NDArray[np.float64],
    ci_high: NDArray[np.float64],
    *,
    may_retrieve: NDArray[np.bool_] | None = None,
    up: float = RETRIEVAL_THRESHOLD,
    down: float = 0.05,
    hold: int = 2,
) -> list[Life]:
    """Lives of one head; the rule stands at the top of this module.

    Args:
        score, ci_low, ci_high: one value per checkpoint, in order, NaN where undefined.
        may_retrieve: whether the head's null lets it be high, per checkpoint; None means everywhere.
        up: score above which a head counts as high.
        down: score below which it counts as low.
        hold: how many checkpoints in a row must agree.

    Example:
        >>> score = np.array([0.0, 0.02, 0.3, 0.4, 0.4, 0.01, 0.0])
        >>> trace_lives(score, score - 0.02, score + 0.02)
        [Life(born=2, died=5, provisional=False)]
    """
    check_rule(up, down, hold)
    high = score > up if may_retrieve is None else (score > up) & may_retrieve
    low = score < down
    n = len(score)
    found: list[Life] = []
    alive = bool(n and high[:hold].all())
    born: int | None = None
    short_start = alive and n < hold
    seemed_alive = False  # high for `hold` checkpoints without having visibly risen, before any settled life
    since = 0  # start of the spell (life or absence) in which evidence is sought
    for i in range(1, n):
        run = slice(i, i + hold)
        short = n - i < hold
        before = slice(since, i)
        if not alive and high[run].all():
            below = ci_high[before][score[before] <= up]
            if (below < ci_low[run].min()).any():
                alive, born, since, seemed_alive = True, i, i, False
                if short:
                    found.append(Life(born, None, True))
                    return found
            elif not found:
                seemed_alive = seemed_alive or not (short or (score[before] < down).any())
        elif (alive or seemed_alive) and low[run].all():
            above = ci_low[before][high[before]]
            if (above > ci_high[run].max()).any():
                found.append(Life(born, i, short))
                alive, born, since, seemed_alive = False, None, i, False
                if short:
                    return found
    if alive or seemed_alive:
        found.append(Life(born, None, short_start))
    return found


def lives(table: pl.DataFrame, *, up: float = RETRIEVAL_THRESHOLD, down: float = 0.05, hold: int = 2) -> pl.DataFrame:
    """Lives of all heads that ever were retrieval heads, by the rule at the top of this module.

    The thresholds 0.1 and 0.05 are for scores that are fractions (`retrieval`, `copy`, `needle_mass`).

    Args:
        table: from `score_table` (one metric, one length).
        up: score above which a head counts as high (the paper's 0.1).
        down: score below which it counts as low; at most `up`.
        hold: how many checkpoints in a row must agree.

    Returns:
        One row per life, sorted by birth, layer, head: layer, head, n_life (1, or 2 and more for a rebirth),
        born_checkpoint and born_tokens (null: alive from the start), died_checkpoint and died_tokens (null: alive at
        the end), peak_score with its interval peak_low to peak_high and peak_tokens (within the life), final_score (at
        the last checkpoint of the table), provisional (the last event of the row rests on fewer than `hold`
        checkpoints).

    Raises:
        LccpError: `down` above `up`, `hold` below 1, a table with several metrics or lengths, two checkpoints with one
            token count or one checkpoint with two, or a head that has several scores at a checkpoint.

    Example:
        >>> table = pl.DataFrame({
        ...     "checkpoint": ["a", "b", "c"], "tokens_seen": [0, 10, 20], "stage": ["train"] * 3, "layer": [1] * 3,
        ...     "head": [4] * 3, "score": [0.0, 0.5, 0.6], "ci_low": [0.0, 0.4, 0.5], "ci_high": [0.01, 0.6, 0.7]})
        >>> lives(table).select("layer", "head", "born_checkpoint", "peak_score").rows()
        [(1, 4, 'b', 0.6)]
    """
    check_rule(up, down, hold)
    for column in ("metric", "length"):
        if column in table.columns and table[column].n_unique() > 1:
            known = ", ".join(map(str, table[column].unique().sort().to_list()))
            raise LccpError(f"births and deaths are read at one {column}, the table holds {known}; filter it first")
    names, tokens, _ = _checkpoints(table)
    rows = []
    for (layer, head), (score, low, high, may_retrieve) in _series(table, names).items():
        found = trace_lives(score, low, high, may_retrieve=may_retrieve, up=up, down=down, hold=hold)
        for n_life, life in enumerate(found, start=1):
            span = slice(life.born or 0, len(names) if life.died is None else life.died)
            peak = span.start + int(np.nanargmax(score[span]))
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "n_life": n_life,
                    "born_checkpoint": None if life.born is None else names[life.born],
                    "born_tokens": None if life.born is None else tokens[life.born],
                    "died_checkpoint": None if life.died is None else names[life.died],
                    "died_tokens": None if life.died is None else tokens[life.died],
                    "peak_score": float(score[peak]),
                    "peak_low": float(low[peak]),
                    "peak_high": float(high[peak]),
                    "peak_tokens": tokens[peak],
                    "final_score": float(score[-1]),
                    "provisional": life.provisional,
                }
            )
    return pl.DataFrame(rows, schema=LIVES_SCHEMA).sort("born_tokens", "layer", "head", "n_life", nulls_last=False)


def events(table: pl.DataFrame, *, up: float = RETRIEVAL_THRESHOLD, down: float = 0.05, hold: int = 2) -> pl.DataFrame:
    """Births and deaths one by one: `lives` in long form. Arguments and errors are those of `lives`.

    Returns:
        One row per event, sorted by tokens_seen, layer, head: kind (`birth` or `death`), layer, head, n_life,
        checkpoint and tokens_seen (the first at which it shows), after_tokens (the checkpoint before: the event lies
        between the two), stage, score with its interval ci_low to ci_high (at that checkpoint), provisional.

    Example:
        >>> table = pl.DataFrame({
        ...     "checkpoint": ["a", "b", "c"], "tokens_seen": [0, 10, 20], "stage": ["train"] * 3, "layer": [1] * 3,
        ...     "head": [4] * 3, "score": [0.0, 0.5, 0.6], "ci_low": [0.0, 0.4, 0.5], "ci_high": [0.01, 0.6, 0.7]})
        >>> events(table).select("kind", "tokens_seen", "after_tokens").rows()
        [('birth', 10, 0)]
    """
    names, tokens, stages = _checkpoints(table)
    place = {name: index for index, name in enumerate(names)}
    series = _series(table, names)
    rows = []
    for life in lives(table, up=up, down=down, hold=hold).iter_rows(named=True):
        score, low, high, _ = series[life["layer"], life["head"]]
        for kind, field in (("birth", "born"), ("death", "died")):
            name = life[f"{field}_checkpoint"]
            if name is None:
                continue
            i = place[name]
            rows.append(
                {
                    "kind": kind,
                    "layer": life["layer"],
                    "head": life["head"],
                    "n_life": life["n_life"],
                    "checkpoint": name,
                    "tokens_seen": tokens[i],
                    "after_tokens": tokens[i - 1],
                    "stage": stages[i],
                    "score": float(score[i]),
                    "ci_low": float(low[i]),
                    "ci_high": float(high[i]),
                    # Only the last event of a life can be provisional.
                    "provisional": life["provisional"] and (kind == "death" or life["died_checkpoint"] is None),
                }
            )
    return pl.DataFrame(rows, schema=EVENTS_SCHEMA).sort("tokens_seen", "layer", "head", "n_life")


def _checkpoints(table: pl.DataFrame) -> tuple[list[str], list[int], list[str]]:
    """Names, tokens seen and stages in order of tokens; refuses what leaves that order open."""
    ordered = table.select("checkpoint", "tokens_seen", "stage").unique().sort("tokens_seen", "checkpoint")
    for column in ("checkpoint", "tokens_seen"):
        twice = ordered.filter(pl.col(column).is_duplicated())
        if twice.height:
            rows = "; ".join(f"{name!r} at {seen} tokens" for name, seen in twice.select(ordered.columns[:2]).rows())
            raise LccpError(
                f"births and deaths need one token count per checkpoint and no two alike, the table has {rows}; "
                "tell the checkpoints apart with --tokens NAME=COUNT"
            )
    return ordered["checkpoint"].to_list(), ordered["tokens_seen"].to_list(), ordered["stage"].to_list()


def _series(
    table: pl.DataFrame, names: list[str]
) -> dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]]:
    """Score, ci_low, ci_high and `may_retrieve` of every head over `names`, NaN where the table has no row."""
    place = {name: index for index, name in enumerate(names)}
    key = ("checkpoint", "layer", "head")
    twice = table.filter(pl.struct(key).is_duplicated()).select(key)
    if twice.height:
        name, layer, head = twice.row(0)
        raise LccpError(
            f"a head has one score per checkpoint, the table has several for {twice.unique().height}, the first being "
            f"head {layer}-{head} at {name!r}; filter it to one metric, length and mode"
        )
    heads = table.select("layer", "head").unique().sort("layer", "head")
    at_head = table.select("layer", "head").join(
        heads.with_row_index("i"), on=["layer", "head"], how="left", maintain_order="left"
    )["i"]
    at_checkpoint = [place[name] for name in table["checkpoint"]]
    if "above_null" not in table.columns:
        table = table.with_columns(above_null=pl.lit(None, pl.Boolean))
    may_retrieve = np.ones((heads.height, len(names)), bool)
    may_retrieve[at_head.to_numpy(), at_checkpoint] = table["above_null"].fill_null(True).to_numpy()
    dense = np.full((3, heads.height, len(names)), np.nan)
    for array, column in zip(dense, ("score", "ci_low", "ci_high"), strict=True):
        array[at_head.to_numpy(), at_checkpoint] = table[column].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    return {pair: (dense[0, i], dense[1, i], dense[2, i], may_retrieve[i]) for i, pair in enumerate(heads.rows())}
