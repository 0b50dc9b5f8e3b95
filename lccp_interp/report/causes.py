"""The report's section on causes: what becomes of retrieval without the heads that do it.

It arranges `dynamics.causal_table`; nothing is computed here. Cost: a bootstrap over the cases of each ablation study.
"""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from lccp_interp.dynamics.causal import causal_table, important_from
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.style import format_number, place_in_training
from lccp_interp.report.drawn import reason
from lccp_interp.report.page import escape, prose, table
from lccp_interp.schema import LccpError

LOSS, EXACT = "loss_nats", "greedy_exact"


def causes_section(tables: RunTables) -> str:
    """The best heads removed against as many random ones, every study of the run; in words first."""
    heading = '<h2 id="causes">Do the heads cause it?</h2>'
    studies = [str(entry["name"]) for entry in tables.run.manifest.get("ablations", [])]
    if not studies:
        return f'{heading}<p class="note">No heads were removed yet: lccp ablate RUN.</p>'
    note = (
        '<p class="note">Answers to the run\'s own cases without the best heads, beside answers without as many random '
        "heads of the same layers. Beyond random: how much more the loss (nats per answer token) rises without the "
        "best, with a 95 % bootstrap interval over cases and random sets.</p>"
    )
    parts = []
    for study in studies:
        try:
            parts.append(_study(tables, study))
        except LccpError as error:
            parts.append(reason(tables.run, error))
    return heading + note + "".join(parts)


def _study(tables: RunTables, study: str) -> str:
    found = causal_table(tables.run, study)
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
    return f"<h3>{escape(title)}</h3><p>{prose(_in_words(loss, exact))}</p>" + table(
        columns, rows, text_columns=(0, 3, 11, 12)
    )


def _in_words(loss: pl.DataFrame, exact: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The last checkpoint's clearest set, and from when on it matters."""
    last = loss.filter(pl.col("checkpoint") == loss["checkpoint"][-1])
    best = last.sort("beyond_low", descending=True, nulls_last=True).row(0, named=True)
    right = exact.get((best["checkpoint"], best["heads"]))
    answers = (
        f" Exact answers go from {_percent(right, 'intact')} to {_percent(right, 'removed')}, and to "
        f"{_percent(right, 'random')} without random heads."
        if right
        else ""
    )
    text = (
        f"At {best['checkpoint']} the loss rises by {format_number(best['harm'])} nats without "
        f"{_heads(best['heads'])}, {format_number(best['beyond'])} ({_interval(best)}) more than without "
        f"random heads.{answers}"
    )
    if loss["checkpoint"].n_unique() > 1:
        since = [
            f"{row['heads'] or 'the best ' + str(row['k'])} from {row['checkpoint']} on"
            for row in important_from(loss).iter_rows(named=True)
            if row["checkpoint"] is not None
        ]
        text += f" They matter beyond random: {'; '.join(since)}." if since else " None matters beyond random for long."
    return text


def _heads(heads: str) -> str:
    named = heads.split(" ")
    return ", ".join(named) if len(named) <= 6 else f"{', '.join(named[:5])} and {len(named) - 5} more"


def _percent(row: dict[str, Any] | None, name: str) -> str:
    return "-" if row is None or math.isnan(row[name]) else f"{100 * row[name]:.0f} %"


def _interval(row: dict[str, Any]) -> str:
    if math.isnan(row["beyond_low"]):
        return "-"
    return f"{format_number(row['beyond_low'])} to {format_number(row['beyond_high'])}"
