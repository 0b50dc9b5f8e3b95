"""The report's sections on heads against heads: who of the base survives, who is like whom, groups, neighbours.

They arrange the tables of `dynamics.comparison` and `dynamics.heads`; nothing is computed here but shares. Where a
table cannot be had (another architecture, no config at hand) the reason stands in its place. Cost: a comparison per
imported list, a tenth of a second each.
"""

from __future__ import annotations

import warnings
from typing import Any

import polars as pl

from lccp_interp.dynamics.comparison import IMPORTED_PREFIX, by_kv_head, compare, kv_heads_of
from lccp_interp.dynamics.published import PUBLISHED_STABILITY
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.agreement_panels import agreement_map
from lccp_interp.figures.cohorts import base_comparison, cohort
from lccp_interp.figures.needs import METRICS, why_not
from lccp_interp.figures.style import format_length, format_number, format_tokens, head_name, place_in_training
from lccp_interp.imports import imported_heads, imported_names, summarise_heads, top_heads
from lccp_interp.report.drawn import drawn, reason
from lccp_interp.report.page import escape, folded, table
from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError

TOP_IMPORTED = 10
MAX_GROUPS = 16
"""So many groups of heads are listed, those with the highest scores."""


def survival_section(tables: RunTables) -> str:
    """The figure of survival and newcomers, and its numbers."""
    made = cohort(tables)
    rows = [
        (
            row["checkpoint"],
            "base" if not row["tokens_since_base"] else format_tokens(row["tokens_since_base"]),
            f"{row['n_alive']} of {row['n_cohort']}",
            _percent(row["survival"]),
            _percents(row["ci_low"], row["ci_high"]),
            row["n_retrieval_heads"],
            _share(row["n_from_base"], row["n_retrieval_heads"]),
            _share(row["n_newborn"], row["n_retrieval_heads"]),
        )
        for row in made.rows.iter_rows(named=True)
    ]
    columns = ("checkpoint", "tokens since the base", "initial heads alive", "survival", "95 % interval")
    return (
        '<h2 id="survival">Initial heads and newcomers</h2>'
        f'<p class="note">{escape(_cohort_note(made.n_initial))} At {format_length(tables.head_length)} tokens.</p>'
        + drawn(tables, "cohort_survival")
        + table((*columns, "retrieval heads", "initial", "later ones"), rows, text_columns=(0, 2, 4, 6, 7))
    )


def _cohort_note(n_initial: int) -> str:
    if n_initial == 0:
        return "The base checkpoint has no retrieval head, so there is no cohort to follow; all heads are later ones."
    return (
        "Initial heads are the retrieval heads of the base checkpoint; all others are later ones. The share is taken "
        "at each checkpoint by itself, so a head that falls below the threshold and rises again is out and then in."
    )


def comparison_section(tables: RunTables) -> str:
    """Every checkpoint against the base, then against every head list that was imported into the run."""
    made = base_comparison(tables)
    heading = '<h2 id="comparison">Against the base and against imported lists</h2>'
    if made.why_not:
        base = reason(tables.run, made.why_not)
    else:
        base = drawn(tables, "reference_comparison") + _comparison_table(tables, made.rows)
    names = imported_names(tables.run)
    none = (
        '<p class="note">No head list is imported into this run; lccp import KIND FILE --into RUN adds one, and it is '
        "then compared here.</p>"
    )
    return f"{heading}{base}<h3>Imported head lists</h3>{''.join(_imported(tables, name) for name in names) or none}"


def _comparison_table(tables: RunTables, rows: pl.DataFrame) -> str:
    """Rows of `compare` with the two overlaps as shares."""
    cells = [
        (
            row["checkpoint"],
            place_in_training(tables.checkpoints, tables.base, row["tokens_seen"]),
            _number(row["overlap"]),
            _number(row["overlap_by_chance"]),
            _number(row["jaccard"]),
            _number(row["rbo"]),
            _number(row["rbo_by_chance"]),
            _number(row["spearman"]),
            row["n_retrieval_heads"],
            row["n_heads"],
        )
        for row in rows.iter_rows(named=True)
    ]
    top_k = rows["top_k"].drop_nulls().to_list()
    columns = (
        "checkpoint",
        "tokens",
        f"share of top {max(top_k, default=0)}",
        "by chance",
        "Jaccard",
        "RBO",
        "by chance",
        "Spearman",
    )
    marked = [i for i, row in enumerate(rows.iter_rows(named=True)) if row["checkpoint"] == row["reference"]]
    return table((*columns, "retrieval heads", "heads compared"), cells, marked=marked)


def _imported(tables: RunTables, name: str) -> str:
    """What an imported list holds, and each checkpoint against it or the reason why not."""
    title = f"<h4>{escape(name)}</h4>"
    try:
        heads = imported_heads(tables.run, name)
    except LccpError as error:
        return title + reason(tables.run, error)
    facts = summarise_heads(heads)
    shape = "some heads only"
    if facts["n_layers"]:
        shape = f"{facts['n_layers']} layers x {facts['n_heads_per_layer']} heads"
    trials = ""
    if facts["max_trials"]:
        lowest, highest = facts["min_trials"], facts["max_trials"]
        trials = f", {highest if lowest == highest else f'{lowest} to {highest}'} trials per head"
    what = (
        f"{facts['kind']} from {facts['source']}: {shape}, {facts['n_defined']} scores{trials}; "
        f"{facts['n_above_threshold']} above {facts['threshold']:g}. Its {TOP_IMPORTED} highest:"
    )
    best = [
        (head_name(row["layer"], row["head"]), _number(row["score"]), row["n"])
        for row in top_heads(heads, TOP_IMPORTED).iter_rows(named=True)
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # identical weights are told by the command
            rows = compare(
                tables.run, f"{IMPORTED_PREFIX}{name}", metric=tables.metric, length=tables.head_length,
                mode=tables.read_mode, by_kv=facts["kind"] == "duo",
            )  # fmt: skip
        against = _comparison_table(tables, rows.with_columns(pl.col("overlap", "overlap_by_chance") / pl.col("top_k")))
    except LccpError as error:
        against = reason(tables.run, f"It is not compared with this run: {error}")
    return f'{title}<p class="note">{escape(what)}</p>{table(("head", "score", "trials"), best)}{against}'


def groups_section(tables: RunTables) -> str:
    """Heads by key/value head: grouped-query attention lets several heads read the same keys."""
    heading = '<h2 id="groups">Heads by key/value head</h2>'
    try:
        n_kv_heads = kv_heads_of(tables.run)
        grouped = by_kv_head(tables.scores, n_kv_heads)
    except LccpError as error:
        return heading + reason(tables.run, error)
    n_heads = int(tables.scores["head"].max()) + 1  # type: ignore[arg-type]
    if n_kv_heads == n_heads:
        return f'{heading}<p class="note">Each of the {n_heads} heads of a layer has a key/value head of its own.</p>'
    names = tables.scored["checkpoint"].to_list()
    base, last = tables.base if tables.base in names else names[0], names[-1]
    keys = ["layer", "kv_head"]
    wide = (
        grouped.filter(pl.col("checkpoint") == last)
        .select(*keys, "max_score", "mean_score", "best_head")
        .join(
            grouped.filter(pl.col("checkpoint") == base).select(*keys, base_score="max_score", base_head="best_head"),
            on=keys, how="left",
        )
    )  # fmt: skip
    size = n_heads // n_kv_heads
    counts = [
        grouped.filter(pl.col("checkpoint") == name, pl.col("max_score") > RETRIEVAL_THRESHOLD).height
        for name in (base, last)
    ]
    shown = top_groups(wide)
    rows = [
        (
            f"{row['layer']}-kv{row['kv_head']}",
            f"{row['kv_head'] * size} to {(row['kv_head'] + 1) * size - 1}",
            _number(row["base_score"]),
            _head_or_dash(row["layer"], row["base_head"]),
            _number(row["max_score"]),
            _head_or_dash(row["layer"], row["best_head"]),
            _number(row["mean_score"]),
        )
        for row in shown.iter_rows(named=True)
    ]
    left_out = wide.height - shown.height
    hidden = f" {left_out} groups with lower scores, or none, are left out." if left_out else ""
    columns = ("group", "heads", "best at the base", "which", "best at the end", "which", "mean at the end")
    return (
        f'{heading}<p class="note">{size} heads share each of the {n_kv_heads} key/value heads of a layer. Groups '
        f"whose best head scores above {RETRIEVAL_THRESHOLD:g}: {counts[0]} of {wide.height} at the base, "
        f"{counts[1]} at the end ({format_length(tables.head_length)} tokens).{hidden}</p>"
        + table(columns, rows, text_columns=(0, 1, 3, 5))
    )


def top_groups(groups: pl.DataFrame) -> pl.DataFrame:
    """Up to `MAX_GROUPS` groups by their best score at the base or at the end, highest first; none that score 0."""
    ranked = groups.with_columns(highest=pl.max_horizontal(pl.col("max_score", "base_score").fill_nan(None)))
    order = ranked.filter(pl.col("highest") > 0).sort("highest", "layer", "kv_head", descending=[True, False, False])
    return order.head(MAX_GROUPS)


def _head_or_dash(layer: int, head: int | None) -> str | None:
    return None if head is None else head_name(layer, head)


def agreement_section(tables: RunTables) -> str:
    """Whether the run's head metrics mean the same heads, at its last checkpoint."""
    heading = '<h2 id="agreement">Do other metrics name the same heads?</h2>'
    if why := why_not(METRICS, tables):
        return heading + reason(tables.run, f"{why[0].upper()}{why[1:]}.".replace("`", ""))
    try:
        figure = drawn(tables, "metric_agreement")
        found = agreement_map(tables)
    except LccpError as error:
        return heading + reason(tables.run, error)
    rows = [
        (
            row["metric"],
            row["other"],
            _number(row["spearman"]),
            f"{_number(row['ci_low']) or 'n/a'} to {_number(row['ci_high']) or 'n/a'}",
            f"{row['overlap']:.3g}/{row['top_k']}",
            f"{row['overlap_by_chance']:.3g}",
            row["n_heads"],
        )
        for row in found.rows.iter_rows(named=True)
    ]
    columns = ("metric", "and", "rank correlation", "95 % interval", "top heads in common", "by chance", "heads")
    note = (
        '<p class="note">Metrics called retrieval scores measure different things, and none stands for another: '
        "this is how far two of them rank the heads alike.</p>"
    )
    made = table(columns, rows, text_columns=(0, 1, 3))
    return heading + note + figure + folded(made, len(rows), "pairs")


def stability_section(tables: RunTables) -> str:
    """Each checkpoint against the next (arXiv 2604.02650, Table 5), the published numbers below."""
    rows = [
        (
            row["from_checkpoint"],
            row["to_checkpoint"],
            f"{row['overlap']:.3g}/{row['top_k']}",
            f"{row['overlap'] / row['top_k']:.2f}",
            f"{row['overlap_by_chance'] / row['top_k']:.2f}",
            format_number(row["spearman"]),
            row["n_heads"],
        )
        for row in tables.stability.iter_rows(named=True)
    ]
    published = [
        (start, end, f"{overlap}/30", f"{overlap / 30:.2f}", f"{30 / 1024:.2f}", f"{rho:.4f}", 1024)
        for start, end, overlap, rho in PUBLISHED_STABILITY
    ]
    columns = ("from", "to", "top heads in common", "share", "share by chance", "Spearman of all heads", "heads")
    title = "Published, for orientation: Hunyuan-A13B, arXiv 2604.02650, Table 5 (another model, other token counts)"
    return (
        '<h2 id="stability">Stability of the ranking</h2><p class="note">Each checkpoint against the next. The '
        "number of top heads compared is a quarter of all, at most the paper's 30. Where few heads score at all, the "
        "lower part of the ranking is noise: Spearman's rho is low for that reason. Of heads with equal scores (often "
        "0) at the end of a top list each counts for its chance to be in it.</p>"
        + table(columns, rows, text_columns=(0, 1), appended=(title, published))
    )


def _number(value: Any) -> str | None:
    """Three decimals, so that columns align; None (a dash) where undefined."""
    return None if value is None or value != value else f"{value:.3f}"


def _percent(share: float | None) -> str | None:
    return None if share is None or share != share else f"{100 * share:.0f} %"


def _percents(low: float, high: float) -> str | None:
    return None if low != low else f"{100 * low:.0f} to {100 * high:.0f} %"


def _share(part: int, whole: int) -> str | None:
    return f"{part} ({100 * part / whole:.0f} %)" if whole else None
