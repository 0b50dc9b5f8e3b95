"""A run as one self-contained HTML page: findings in words first, then figures, tables and provenance.

The page needs no network and no other file; it is meant to be mailed, printed and read on a phone. This module
arranges; statistics are in `lccp_interp.dynamics`, pictures in `lccp_interp.figures.interactive`. Cost: some
seconds, most of them fits and plotly, and 5 MB of plotly.js in every report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.style import (
    format_length,
    format_number,
    format_tokens,
    head_name,
    place_in_training,
    stage_name,
)
from lccp_interp.report.behaviour import corpus_section, interference_section, probes_section
from lccp_interp.report.causes import causes_section
from lccp_interp.report.drawn import drawn
from lccp_interp.report.findings import NEAR_FINAL, Finding, cautions, findings, near_final
from lccp_interp.report.heads import (
    agreement_section,
    comparison_section,
    groups_section,
    stability_section,
    survival_section,
)
from lccp_interp.report.levels import correlation_section, saturation_section
from lccp_interp.report.page import escape, page, prose, table
from lccp_interp.report.verdict import verdict_table, verdicts
from lccp_interp.store import Run, replacing

__all__ = ["Finding", "findings", "write_report"]


def write_report(run: Run, out: str | Path | None = None, *, length: int | None = None) -> Path:
    """Write the report of `run` as one HTML file.

    Args:
        run: an opened run; an unfinished one is reported as far as it got, and the report says so.
        out: the file; None means `report.html` in the run's folder. It is replaced as a whole or not at all.
        length: context length in tokens at which heads are read; None means the longest of the run.

    Returns:
        The file.

    Raises:
        LccpError: nothing scored yet, or an unknown length.

    Example:
        >>> write_report(Run.open("runs/demo"))   # doctest: +SKIP
        PosixPath('runs/demo/report.html')
    """
    path = run.path / "report.html" if out is None else Path(out)
    tables = RunTables(run, length)
    body = "\n".join([_head(tables), *(section(tables) for section, _, _ in SECTIONS)])
    text = page(f"Retrieval heads over training: {run.path.resolve().name}", body)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _head(tables: RunTables) -> str:
    first, last = tables.checkpoints.row(0, named=True), tables.checkpoints.row(-1, named=True)
    n_heads = tables.scores.select("layer", "head").n_unique()
    lengths = ", ".join(format_length(length) for length in tables.lengths)
    meta = (
        f"{tables.checkpoints.height} checkpoints, {format_tokens(first['tokens_seen'])} to "
        f"{format_tokens(last['tokens_seen'])} training tokens · {n_heads} heads · {tables.cases.height} "
        f"needle-in-a-haystack cases per checkpoint, lengths {lengths} tokens · heads are read with the metric "
        f"{tables.metric} at {format_length(tables.head_length)} tokens"
    )
    nav = "".join(f'<a href="#{link}">{name}</a>' for _, link, name in SECTIONS)
    return (
        f"<h1>Retrieval heads over training: {escape(tables.run.path.resolve().name)}</h1>"
        f'<p class="meta">{escape(meta)}</p><nav>{nav}</nav>'
    )


def _findings(tables: RunTables) -> str:
    found = verdicts(tables)
    items = "".join(f"<dt>{escape(f.heading)}</dt><dd>{prose(f.text)}</dd>" for f in findings(tables, found))
    doubts = "".join(f"<p>{escape(text)}</p>" for text in cautions(tables))
    box = f'<div class="cautions">{doubts}</div>' if doubts else ""
    by_length = verdict_table(found, stage_name(tables.checkpoints["stage"][-1]))
    return (
        f'<h2 id="findings">Findings</h2>{box}<dl class="findings">{items}</dl>'
        f"<h3>Verdict at every length</h3>{by_length}"
        f"<h3>When the score was nearly final, at every length</h3>{_near_final(tables)}"
    )


def _near_final(tables: RunTables) -> str:
    rows = []
    for length in tables.lengths:
        near = near_final(tables, length)
        rows.append(
            (
                format_length(length),
                f"{near.final_score:.0f} %",
                near.checkpoint,
                None if near.tokens_seen is None else _place(tables, near.tokens_seen),
                format_number(near.ppl_then),
                format_number(near.ppl_last),
                format_number(near.loss_then),
                format_number(near.loss_last),
            )
        )
    columns = (
        "length",
        "final NIAH score",
        f"{100 * NEAR_FINAL:.0f} % of it at",
        "tokens",
        "PPL then",
        "PPL at the end",
    )
    return table((*columns, "loss then (nats)", "loss at the end"), rows, text_columns=(0, 2))


def _levels(tables: RunTables) -> str:
    figures = ("niah_trajectory", "ppl_heatmaps", "depth_curves")
    return '<h2 id="levels">Answers over training</h2>' + "".join(drawn(tables, name) for name in figures)


def _heads(tables: RunTables) -> str:
    figures = ("retrieval_heads", "head_heatmaps")
    return '<h2 id="heads">Retrieval heads</h2>' + "".join(drawn(tables, name) for name in figures)


def _place(tables: RunTables, tokens: int) -> str:
    return place_in_training(tables.checkpoints, tables.base, tokens)


def _when(tables: RunTables, checkpoint: str | None, tokens: int | None) -> str | None:
    return None if checkpoint is None or tokens is None else f"{checkpoint} ({_place(tables, tokens)})"


def _lives(tables: RunTables) -> str:
    rows = [
        (
            head_name(life["layer"], life["head"]),
            life["n_life"],
            _when(tables, life["born_checkpoint"], life["born_tokens"]) or "from the start",
            _when(tables, life["died_checkpoint"], life["died_tokens"]) or "alive at the end",
            f"{life['peak_score']:.3f}",
            _place(tables, life["peak_tokens"]),
            format_number(life["final_score"]),
            "provisional" if life["provisional"] else "",
        )
        for life in tables.lives.iter_rows(named=True)
    ]
    columns = ("head", "life", "born", "died", "peak score", "at", "last score", "note")
    counts = []
    for length in tables.lengths:
        at = tables if length == tables.head_length else tables.at(length)
        settled = at.events.filter(~pl.col("provisional"))
        last = settled.filter(pl.col("stage") == tables.checkpoints["stage"][-1])
        counts.append(
            (
                format_length(length),
                at.census["n_retrieval_heads"][-1],
                (settled["kind"] == "birth").sum(),
                (settled["kind"] == "death").sum(),
                (last["kind"] == "birth").sum(),
                (last["kind"] == "death").sum(),
                at.events["provisional"].sum(),
            )
        )
    stage = stage_name(tables.checkpoints["stage"][-1])
    count_columns = (
        "length",
        "retrieval heads at the end",
        "births",
        "deaths",
        f"births in {stage}",
        f"deaths in {stage}",
    )
    empty = "<p>By this rule no head came to life at this length.</p>"
    return (
        f'<h2 id="lives">Births and deaths</h2><p class="note">Heads are named layer-head. One row per life, at '
        f"{format_length(tables.head_length)} tokens. A head is born when its score is above 0.1 at two checkpoints in "
        "a row and has visibly risen, it dies when its score is below 0.05 at two in a row and has visibly fallen "
        "(bootstrap intervals apart). Provisional: only the last checkpoint says so. Tokens with a plus count from the "
        "base checkpoint.</p>"
        + drawn(tables, "head_lives")
        + (table(columns, rows, text_columns=(0, 2, 3, 7)) if rows else empty)
        + "<h3>At every length</h3>"
        + table((*count_columns, "provisional"), counts)
    )


def _checkpoints(tables: RunTables) -> str:
    census = {row["checkpoint"]: row for row in tables.census.iter_rows(named=True)}
    outcomes = tables.by_length.filter(pl.col("length") == tables.head_length)
    best = {
        rows["checkpoint"][0]: rows.sort("score", descending=True, nulls_last=True).row(0, named=True)
        for rows in tables.scores.filter(pl.col("score").is_not_nan()).partition_by("checkpoint")
    }
    rows = []
    for outcome in outcomes.iter_rows(named=True):
        name = outcome["checkpoint"]
        count, top = census.get(name), best.get(name)
        rows.append(
            (
                f"{name} (base)" if name == tables.base else name,
                format_tokens(outcome["tokens_seen"]),
                stage_name(outcome["stage"]),
                f"{outcome['niah_score']:.0f} %",
                format_number(outcome["answer_ppl"]),
                format_number(outcome["loss_nats"]),
                outcome["n"],
                count and count["n_retrieval_heads"],
                count and format_number(count["mean_initial_score"]),
                top and f"{head_name(top['layer'], top['head'])} ({top['score']:.2f})",
            )
        )
    columns = ("checkpoint", "tokens", "stage", "NIAH score", "answer PPL", "loss (nats)", "cases", "retrieval heads")
    marked = [i for i, name in enumerate(outcomes["checkpoint"]) if name == tables.base]
    return (
        f'<h2 id="checkpoints">Checkpoints</h2><p class="note">At {format_length(tables.head_length)} tokens; initial '
        f"heads are the retrieval heads of the base checkpoint.</p>"
        + table(
            (*columns, "mean score of initial heads", "strongest head (score)"),
            rows,
            text_columns=(0, 2),
            marked=marked,
        )
    )


def _provenance(tables: RunTables) -> str:
    manifest = tables.run.manifest
    versions = manifest.get("versions", {})
    facts = [
        ("run folder", tables.run.path.resolve().name),
        ("created", manifest.get("created")),
        ("config hash", manifest.get("config_hash")),
        ("git commit of lccp_interp", manifest.get("git_commit")),
        ("Python", manifest.get("python")),
        *versions.items(),
        ("mode", tables.read_mode),
        *_seeds(manifest.get("config", {})),
        (
            "bootstrap",
            f"{len(tables.sample.resamples.weights)} resamples over {tables.sample.resamples.ci_over}, seed 0",
        ),
    ]
    weights = [
        (row["name"], f"{row['tokens_seen']:,}", stage_name(row["stage"]), (row["hash"] or "")[:16])
        for row in tables.run.checkpoints.iter_rows(named=True)
    ]
    config = json.dumps(manifest.get("config", {}), indent=2, ensure_ascii=False)
    return (
        '<h2 id="provenance">Provenance</h2>'
        + table(("what", "value"), facts, text_columns=(0, 1))
        + f"<details><summary>Config</summary><pre>{escape(config)}</pre></details>"
        + "<details><summary>Checkpoints and hashes of their weights</summary>"
        + table(("checkpoint", "training tokens", "stage", "SHA-256 (first 16)"), weights, text_columns=(0, 2, 3))
        + "</details>"
    )


def _seeds(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every seed in a config, however deep."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _seeds(value, f"{prefix}{key}.")
        elif "seed" in key:
            yield f"{prefix}{key}", value


SECTIONS: tuple[tuple[Callable[[RunTables], str], str, str], ...] = (
    (_findings, "findings", "Findings"),
    (_levels, "levels", "Answers"),
    (_checkpoints, "checkpoints", "Checkpoints"),
    (saturation_section, "saturation", "Saturation"),
    (probes_section, "probes", "After fine-tuning"),
    (corpus_section, "corpus", "Corpus perplexity"),
    (interference_section, "interference", "Interference"),
    (_heads, "heads", "Retrieval heads"),
    (_lives, "lives", "Births and deaths"),
    (survival_section, "survival", "Survival"),
    (causes_section, "causes", "Causes"),
    (correlation_section, "correlation", "What goes together"),
    (comparison_section, "comparison", "Comparisons"),
    (groups_section, "groups", "Key/value heads"),
    (agreement_section, "agreement", "Other metrics"),
    (stability_section, "stability", "Stability"),
    (_provenance, "provenance", "Provenance"),
)
"""The page in order: what makes a section, its anchor, its name in the navigation."""
