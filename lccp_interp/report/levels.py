"""The report's sections on levels: when each metric is saturated, and which go together.

They arrange the tables of `dynamics.saturation` and `dynamics.correlation`; nothing is computed here. Where a table
cannot be made (a single checkpoint, say), the reason stands in its place. Cost: that of the two tables, seconds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from lccp_interp.dynamics.correlation import paper_layout
from lccp_interp.dynamics.curves import PROBE
from lccp_interp.dynamics.probe_choice import left_out
from lccp_interp.dynamics.published import published_correlations
from lccp_interp.dynamics.saturation import saturation_records, title
from lccp_interp.dynamics.series import IMPORT_HINT, run_series
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.style import format_length, format_number, format_tokens
from lccp_interp.report.drawn import drawn, reason
from lccp_interp.report.page import escape, folded, table
from lccp_interp.schema import LccpError

SHARE = 0.95


def saturation_section(tables: RunTables) -> str:
    """One row per metric: the fitted curve, the tokens at 95 % of its gain, the verdict and its reason."""
    heading = '<h2 id="saturation">Saturation</h2>'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few checkpoints: the verdict says so
            records = saturation_records(tables.run, length=tables.head_length, share=SHARE, mode=tables.read_mode)
    except LccpError as error:
        return heading + reason(tables.run, error)
    # What the run measured itself stands open; results of benchmarks are many, and mostly short of checkpoints.
    own = [record for record in records if not record["metric"].startswith(PROBE)]
    others = [record for record in records if record["metric"].startswith(PROBE)]
    made = _saturation_table(own) + (
        f"<details><summary>{len(others)} more, from benchmarks</summary>{_saturation_table(others)}</details>"
        if others
        else ""
    )
    return (
        f'{heading}<p class="note">Over the tokens since the base checkpoint. Log-linear, exponential and power-law '
        "curves are fitted, AICc chooses; beside the point stands a Mann-Kendall test of the later half of the "
        f"n checkpoints that have a value.</p>{drawn(tables, 'saturation_curves')}{made}"
    )


def _saturation_table(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            _short_title(record),
            record["n"],
            _number(record["from"]),
            _number(record["to"]),
            record["model"] or "-",
            _tokens(record["tokens_at_share"]),
            _interval(record["ci_low"], record["ci_high"]),
            _number(record["slope_p"]),
            record["verdict"],
        )
        for record in records
    ]
    reasons = "".join(
        f"<li>{escape(title(record))}: {escape(record['verdict'])}; {escape(record['reason'])}</li>"
        for record in records
    )
    columns = ("metric", "n", "from", "to", "curve", f"tokens at {100 * SHARE:g} %", "95 % interval")
    return table((*columns, "trend p", "verdict"), rows, text_columns=(0, 4, 6, 8)) + f'<ul class="note">{reasons}</ul>'


def correlation_section(tables: RunTables) -> str:
    """Cheap metrics against probe results, or against each other; the published numbers below."""
    heading = '<h2 id="correlation">What goes together</h2>'
    try:
        cheap, found = run_series(tables.run, length=tables.head_length, metric=tables.metric, mode=tables.read_mode)
        made = tables.correlations
    except LccpError as error:
        return heading + reason(tables.run, error)
    rows = [
        (
            row["cheap"],
            row["probe"],
            row["transform"],
            row["n"],
            _number(row["r"]),
            f"{_number(row['ci_low'])} to {_number(row['ci_high'])}",
            _number(row["p"]),
            _number(row["q"]),
        )
        for row in made.with_columns(pl.col(pl.Float64).fill_nan(None)).iter_rows(named=True)
    ]
    missing = f" The run holds no probe results, so the cheap metrics stand against each other; {IMPORT_HINT}."
    others = len(left_out(tables.run.probes.collect(), cheap, found))
    unused = (
        f" One metric stands for each benchmark and subset; {others} more results are in the run "
        "(lccp correlate --probe takes others)."
    )
    missing = missing if found.is_empty() else unused if others else ""
    columns = ("metric", "against", "transform", "n", "Pearson r", "95 % interval", "p", "q")
    return (
        f'{heading}<p class="note">At {format_length(tables.head_length)} tokens. Two curves that rise always '
        "correlate in their levels; differences and residuals of the trend in log tokens ask for more. p by "
        f"permutation, q after Benjamini-Hochberg over the table.{escape(missing)}</p>"
        + folded(table(columns, rows, text_columns=(0, 1, 2, 5), appended=_published()), len(rows), "correlations")
        + ("" if found.is_empty() else _in_paper_layout(tables, made))
    )


def _in_paper_layout(tables: RunTables, made: pl.DataFrame) -> str:
    """The paper's Tables 3, 4, 6 and 7 with this run's numbers, where it has probes of those benchmarks."""
    heading = "<h3>In the paper's layout</h3>"
    try:
        wide = paper_layout(made)
    except LccpError as error:
        return heading + reason(tables.run, error)
    probes = wide.columns[2:]
    rows = [
        (row["cheap"], row["quantity"], *(_cell(row["quantity"], row[name]) for name in probes))
        for row in wide.iter_rows(named=True)
    ]
    return (
        f'{heading}<p class="note">Pearson r of the levels, p of the t test, as arXiv 2604.02650, Tables 3, 4, 6 and 7 '
        "(Hunyuan-A13B, six checkpoints). Its probes are run after light fine-tuning, at 32K to 64K tokens.</p>"
        + table(("metric", "", *probes), rows, text_columns=(0, 1))
    )


def _cell(quantity: str, value: float | None) -> str | None:
    if value is None or math.isnan(value):
        return None
    return f"{value:.0f}" if quantity == "n" else f"{round(value, 4) + 0.0:.4f}"


def _published() -> tuple[str, list[tuple[Any, ...]]]:
    rows = [
        (row["paper_name"], row["benchmark"], "levels", row["n"], row["published_r"], "", row["published_p"], "")
        for row in published_correlations().iter_rows(named=True)
    ]
    return "Published, for orientation: Hunyuan-A13B, arXiv 2604.02650, Tables 3, 4, 6 and 7", rows


def _short_title(record: Mapping[str, Any]) -> str:
    """The metric, its length and depth: the table has no room for a sentence."""
    depth = "" if record["depth_fraction"] is None else f", depth {100 * record['depth_fraction']:.4g} %"
    return record["metric"] + ("" if record["length"] is None else f", {format_length(record['length'])}") + depth


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else format_number(value)


def _interval(low: float | None, high: float | None) -> str:
    """An end beyond the data is open."""
    if _tokens(low) == "-":
        return "-"
    return f"{_tokens(low)} or later" if _tokens(high) == "-" else f"{_tokens(low)} to {_tokens(high)}"


def _tokens(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else format_tokens(round(value))
