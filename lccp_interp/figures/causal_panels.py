"""What the causal figures draw: answers without the best heads and without random ones, over k and over training.

Tables of `lccp_interp.dynamics.causal`, cut into panels and lines. A run may hold several ablation studies; which one
is drawn stands in `check_study` and `dates_study`. It refuses to know how they are drawn. Cost: a bootstrap over the
cases of one study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.causal import LEAST, important_from
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.interventions.causal import ablation_rows, ablation_studies
from lccp_interp.schema import LccpError

Array = NDArray[np.float64]

ADD_ABLATIONS = "`lccp ablate RUN` removes some"
ADD_CHECKPOINTS = "`lccp ablate RUN --only all` removes them at every one"

LABELS = {
    "loss_nats": "answer loss (nats)",
    "greedy_exact": "exact answers (%)",
    "answer_ppl": "answer perplexity",
}
"""Outcomes in the order of their panels, and what their axes are called."""

BEYOND_LABELS = {
    "loss_nats": "loss added beyond\nrandom heads (nats)",
    "greedy_exact": "exact answers lost beyond\nrandom heads (% points)",
}
REMOVED_SCALE = ("#f6b26b", "#d55e00", "#6b2b00")
MAX_LINES = 6


@dataclass(frozen=True)
class CausalPanel:
    """One outcome at one checkpoint: `[place]` values with the ends of their 95 % intervals, exact answers in percent.

    The first place is the intact model where heads are removed together; a study of single heads has none.
    """

    outcome: str
    label: str
    best: Array
    best_low: Array
    best_high: Array
    random: Array
    random_low: Array
    random_high: Array
    intact: float


@dataclass(frozen=True)
class CausalCheck:
    """The causal check at one checkpoint: `heads[i]` are removed at `places[i]`, which the axis calls `texts[i]`.

    `is_single`: heads are removed one by one, so that places have no order.
    """

    study: str
    kind: str
    checkpoint: str
    length: int | None
    is_single: bool
    places: Array
    texts: tuple[str, ...]
    heads: tuple[str, ...]
    panels: tuple[CausalPanel, ...]
    n: int
    n_draws: int
    layer_matched: bool
    ci_over: str


@dataclass(frozen=True)
class DatedLine:
    """Harm beyond random of one set of heads over the checkpoints, in the unit of the panel.

    `since` is the place in `tokens` from which on it is important, None where never; `provisional` as in
    `important_from`.
    """

    name: str
    colour: str
    checkpoints: tuple[str, ...]
    heads: tuple[str, ...]
    tokens: tuple[int, ...]
    beyond: Array
    low: Array
    high: Array
    since: int | None
    provisional: bool


@dataclass(frozen=True)
class CausalDates:
    """From when on sets of heads matter: lines per outcome, and the harm that is little, in the same unit."""

    study: str
    kind: str
    length: int | None
    is_single: bool
    panels: tuple[tuple[str, str, tuple[DatedLine, ...], float], ...]
    n: int
    n_draws: int
    n_hidden: int
    ci_over: str


def why_no_check(tables: RunTables) -> str:
    """Why there is no causal check to draw; empty where there is one."""
    return _why_not(check_study, tables)


def why_no_dates(tables: RunTables) -> str:
    """Why there is no causal check over checkpoints to draw; empty where there is one."""
    return _why_not(dates_study, tables)


def _why_not(find: Callable[[RunTables], str], tables: RunTables) -> str:
    try:
        find(tables)
    except LccpError as error:
        return str(error)
    return ""


def check_study(tables: RunTables) -> str:
    """The study drawn over k: one at the length of `tables` if there is, of those the one with most sizes of sets.

    Raises:
        LccpError: the run has no ablations, or parts that cannot be read.
    """

    def worth(rows: pl.DataFrame) -> int:
        last = rows.filter(pl.col("checkpoint") == rows["checkpoint"][-1], pl.col("set") != "none")
        return last.select("set", "k", "heads").filter(pl.col("set") != "random").n_unique()

    return _best_study(tables, worth, at_least=1)


def dates_study(tables: RunTables) -> str:
    """The study drawn over training: the one with most checkpoints, of several one at the length of `tables`.

    Raises:
        LccpError: no study of two or more checkpoints, or parts that cannot be read.
    """
    return _best_study(tables, lambda rows: rows["checkpoint"].n_unique(), at_least=2)


def _best_study(tables: RunTables, worth: Callable[[pl.DataFrame], int], *, at_least: int) -> str:
    names = ablation_studies(tables.run)
    if not names:
        raise LccpError(f"no heads were removed yet; {ADD_ABLATIONS}")
    found = {name: worth(ablation_rows(tables.run, name)) for name in names}
    if max(found.values()) < at_least:
        raise LccpError(f"heads were removed at one checkpoint only; {ADD_CHECKPOINTS}")
    lengths = _lengths(tables)
    suited = [name for name in names if found[name] >= at_least]
    # Of equals the one begun last.
    order = (
        (lambda name: (found[name], lengths.get(name) == tables.head_length, names.index(name)))
        if at_least > 1
        else (lambda name: (lengths.get(name) == tables.head_length, found[name], names.index(name)))
    )
    return max(suited, key=order)


def _lengths(tables: RunTables) -> dict[str, int]:
    entries = tables.run.manifest.get("ablations", [])
    return {entry["name"]: entry.get("config", {}).get("length") for entry in entries}


def causal_check_panels(tables: RunTables, study: str | None = None, checkpoint: str | None = None) -> CausalCheck:
    """The answers of one checkpoint (None: the study's last) without heads, by how many, or by which one.

    Raises:
        LccpError: no such study or checkpoint of it.
    """
    chosen = check_study(tables) if study is None else study
    table = tables.causal(chosen)
    names = table["checkpoint"].unique(maintain_order=True).to_list()
    name = names[-1] if checkpoint is None else checkpoint
    if name not in names:
        raise LccpError(f"ablation study {chosen} has no checkpoint {name!r}; it has {', '.join(names)}")
    rows = table.filter(pl.col("checkpoint") == name)
    is_single = bool((rows["set"] == "single").all())
    if not is_single:
        rows = rows.filter(set="top").sort("k", maintain_order=True)
    first = rows.row(0, named=True)
    one = rows.filter(outcome="loss_nats")
    heads = tuple(one["heads"])
    sizes = [] if is_single else [0, *one["k"].to_list()]
    return CausalCheck(
        study=chosen,
        kind=first["kind"],
        checkpoint=name,
        length=_lengths(tables).get(chosen),
        is_single=is_single,
        places=np.arange(len(heads), dtype=np.float64) if is_single else np.log2(1 + np.array(sizes, dtype=np.float64)),
        texts=heads if is_single else tuple(map(str, sizes)),
        heads=heads if is_single else ("", *heads),
        panels=tuple(_panel(rows.filter(outcome=outcome), outcome, is_single) for outcome in LABELS),
        n=first["n"],
        n_draws=int(rows["n_draws"].max()),  # type: ignore[arg-type]
        layer_matched=bool(rows["layer_matched"].all()),
        ci_over=first["ci_over"],
    )


def _panel(rows: pl.DataFrame, outcome: str, is_single: bool) -> CausalPanel:
    unit = 100.0 if outcome == "greedy_exact" else 1.0
    first = rows.row(0, named=True)
    columns = {}
    for ours, theirs in (("best", "removed"), ("random", "random")):
        for end in ("", "_low", "_high"):
            values = rows[f"{theirs}{end}"].to_numpy()
            columns[f"{ours}{end}"] = unit * (values if is_single else np.append(first[f"intact{end}"], values))
    return CausalPanel(outcome=outcome, label=LABELS[outcome], intact=unit * first["intact"], **columns)


def causal_date_lines(tables: RunTables, study: str | None = None) -> CausalDates:
    """Harm beyond random over the checkpoints: a line per number of best heads, or per head of a study of single ones.

    Of more than `MAX_LINES` the ones with the greatest harm in the end are kept, in the order of the study.

    Raises:
        LccpError: no such study, or none of two or more checkpoints.
    """
    chosen = dates_study(tables) if study is None else study
    table = tables.causal(chosen)
    is_single = bool((table["set"] == "single").all())
    if not is_single:
        table = table.filter(set="top")
    key = "heads" if is_single else "k"
    every = table[key].unique(maintain_order=True).to_list()
    kept = _worst(table, key, every)
    colours = style.kind_colours(len(kept)) if is_single else style.spread_colours(REMOVED_SCALE, len(kept))
    first = table.row(0, named=True)
    panels = []
    for outcome, label in BEYOND_LABELS.items():
        own = table.filter(outcome=outcome)
        since = {row[key]: row for row in important_from(own, outcome=outcome).iter_rows(named=True)}
        unit = 100.0 if outcome == "greedy_exact" else 1.0
        lines = tuple(
            _line(own.filter(pl.col(key) == value), str(value), colour, unit, since[value])
            for value, colour in zip(kept, colours, strict=True)
        )
        panels.append((outcome, label, lines, unit * LEAST))
    return CausalDates(
        study=chosen,
        kind=first["kind"],
        length=_lengths(tables).get(chosen),
        is_single=is_single,
        panels=tuple(panels),
        n=first["n"],
        n_draws=int(table["n_draws"].max()),  # type: ignore[arg-type]
        n_hidden=len(every) - len(kept),
        ci_over=first["ci_over"],
    )


def _worst(table: pl.DataFrame, key: str, every: Sequence[int | str]) -> list[int | str]:
    if len(every) <= MAX_LINES:
        return list(every)
    last = table.filter(pl.col("checkpoint") == table["checkpoint"][-1], pl.col("outcome") == "loss_nats")
    order = last.with_columns(pl.col("beyond").fill_nan(-math.inf)).sort("beyond", descending=True)[key].to_list()
    return [value for value in every if value in order[:MAX_LINES]]


def _line(rows: pl.DataFrame, name: str, colour: str, unit: float, since: dict[str, object]) -> DatedLine:
    names = rows["checkpoint"].to_list()
    return DatedLine(
        name=name,
        colour=colour,
        checkpoints=tuple(names),
        heads=tuple(rows["heads"]),
        tokens=tuple(rows["tokens_seen"]),
        beyond=unit * rows["beyond"].to_numpy(),
        low=unit * rows["beyond_low"].to_numpy(),
        high=unit * rows["beyond_high"].to_numpy(),
        since=None if since["checkpoint"] is None else names.index(since["checkpoint"]),
        provisional=bool(since["provisional"]),
    )
