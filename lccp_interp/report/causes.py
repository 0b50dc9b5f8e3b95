"""The report's section on causes: what becomes of retrieval without the heads that do it.

It arranges `dynamics.causal_table`, in words, figures and tables; nothing is computed here. Cost: a bootstrap over the
cases of each ablation study.
"""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from lccp_interp.dynamics.causal import LEAST, important_from
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.causal_panels import causal_check_panels, causal_date_lines, why_no_check, why_no_dates
from lccp_interp.figures.style import format_length, format_number, place_in_training
from lccp_interp.interventions.causal import ablation_studies
from lccp_interp.report.drawn import drawn, reason, shareable
from lccp_interp.report.page import escape, folded, prose, table
from lccp_interp.schema import LccpError

LOSS, EXACT = "loss_nats", "greedy_exact"


def causal_words(tables: RunTables) -> str:
    """What the causal check says, in sentences; where there is none, the command that makes one."""
    if why := why_no_check(tables):
        return _absent(tables, why)
    try:
        made = causal_check_panels(tables)
        table = tables.causal(made.study)
    except LccpError as error:
        return _absent(tables, str(error))
    at = f" of {format_length(made.length)} tokens" if made.length else ""
    text = f"{_in_words(table, made.checkpoint)} That rests on {made.n} cases{at} and {made.n_draws} random sets."
    if why_no_dates(tables):
        return f"{text} From when on they matter was not asked: lccp ablate RUN --only all."
    dated = causal_date_lines(tables)
    at = f", at {format_length(dated.length)} tokens" if dated.length != made.length and dated.length else ""
    return f"{text} {_dates_in_words(tables.causal(dated.study), at)}"


def _absent(tables: RunTables, why: str) -> str:
    return f"Not checked: {shareable(tables.run, why)}.".replace("`", "")


def causes_section(tables: RunTables) -> str:
    """The best heads removed against as many random ones: figures, then every study of the run in words and numbers."""
    heading = '<h2 id="causes">Do the heads cause it?</h2>'
    if why := why_no_check(tables):
        return heading + reason(tables.run, f"{why[0].upper()}{why[1:]}.".replace("`", ""))
    note = (
        '<p class="note">Answers to the run\'s own cases without the best heads, beside answers without as many random '
        "heads of the same layers. Beyond random: how much more the loss (nats per answer token) rises without the "
        "best, with a 95 % bootstrap interval over cases and random sets.</p>"
    )
    parts = [drawn(tables, "causal_check")]
    if not why_no_dates(tables):
        parts.append(drawn(tables, "causal_dates"))
    for study in ablation_studies(tables.run):
        try:
            parts.append(_study(tables, study))
        except LccpError as error:
            parts.append(reason(tables.run, error))
    return heading + note + "".join(parts)


def _study(tables: RunTables, study: str) -> str:
    found = tables.causal(study)
    loss = found.filter(outcome=LOSS)
    exact = {(row["checkpoint"], row["heads"]): row for row in found.filter(outcome=EXACT).iter_rows(named=True)}
    rows = []
    for row in loss.iter_rows(named=True):
        right = exact.get((row["checkpoint"], row["heads"]))
        rows.append(
            (
                row["checkpoint"],
                place_in_training(tables.checkpoints, tables.base, row["tokens_seen"]),
                row["k"],
                _heads(row["heads"]),
                *(_percent(right, name) for name in ("intact", "removed", "random")),
                *(format_number(row[name]) for name in ("intact", "removed", "random", "beyond")),
                _interval(row),
                "" if row["layer_matched"] else "not all layer-matched",
            )
        )
    columns = (
        "checkpoint", "tokens", "k", "heads removed", "exact with all", "without these", "without random",
        "loss with all", "without these", "without random", "beyond random", "95 % interval", "note",
    )  # fmt: skip
    title = f"{study}: {loss['kind'][0]} ablation, n = {loss['n'][0]} cases"
    told = _in_words(found, found["checkpoint"][-1])
    if found["checkpoint"].n_unique() > 1:
        told += f" {_dates_in_words(found)}"
    made = table(columns, rows, text_columns=(0, 3, 11, 12))
    return f"<h3>{escape(title)}</h3><p>{prose(told)}</p>{folded(made, len(rows), 'rows')}"


def _in_words(table: pl.DataFrame, checkpoint: str) -> str:
    """The clearest set of one checkpoint: what its removal does, and whether that is more than chance."""
    loss, exact = (table.filter(checkpoint=checkpoint, outcome=outcome) for outcome in (LOSS, EXACT))
    best = (
        loss.with_columns(pl.col("beyond_low").fill_nan(None))
        .sort("beyond_low", descending=True, nulls_last=True)
        .row(0, named=True)
    )
    right = exact.filter(heads=best["heads"]).row(0, named=True)
    heads = _heads(best["heads"])
    text = (
        f"At {checkpoint} exact answers go from {_percent(right, 'intact')} to {_percent(right, 'removed')} without "
        f"{heads}, and to {_percent(right, 'random')} without as many random heads of the same layers; the answer's "
        f"loss rises by {format_number(best['harm'])} nats without them, {format_number(best['beyond'])} "
        f"({_interval(best)}) more than without random ones."
    )
    if not best["layer_matched"]:
        text += " Some random sets lie in other layers."
    if right["beyond_low"] > LEAST:
        return f"{text} So retrieval needs these heads."
    if (best["beyond_low"] or math.nan) > LEAST:
        return f"{text} So the answer's certainty needs these heads; of exact answers that is not shown."
    return f"{text} That the highest-scoring heads do the work is not shown."


def _dates_in_words(table: pl.DataFrame, at_length: str = "") -> str:
    """From which checkpoint on which sets matter, by exact answers and by the loss."""
    sentences = []
    for outcome, what in ((EXACT, "for exact answers"), (LOSS, "for the loss")):
        since: dict[str, list[str]] = {}
        for row in important_from(table, outcome=outcome).iter_rows(named=True):
            if row["checkpoint"] is not None:
                name = row["heads"] if row["set"] == "single" else str(row["k"])
                since.setdefault(row["checkpoint"], []).append(name)
        is_single = bool((table["set"] == "single").all())
        told = "; ".join(
            f"{'head' if is_single else 'the best'} {_listed(names)} from {at} on" for at, names in since.items()
        )
        sentences.append(f"{what} {told or 'none'}")
    return f"They matter more than random heads{at_length}: {'; and '.join(sentences)}."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _heads(heads: str) -> str:
    named = heads.split(" ")
    return ", ".join(named) if len(named) <= 6 else f"{', '.join(named[:5])} and {len(named) - 5} more"


def _percent(row: dict[str, Any] | None, name: str) -> str:
    return "-" if row is None or math.isnan(row[name]) else f"{100 * row[name]:.0f} %"


def _interval(row: dict[str, Any]) -> str:
    if math.isnan(row["beyond_low"]):
        return "-"
    return f"{format_number(row['beyond_low'])} to {format_number(row['beyond_high'])}"
