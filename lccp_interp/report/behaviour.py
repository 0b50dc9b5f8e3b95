"""The report's sections on behaviour: results after fine-tuning, heads across that step, documents, interference.

They arrange tables of `dynamics` and what the figures draw; nothing is computed here. Where a run lacks the numbers,
one line says which command adds them. Cost: that of the figures; a scan of the head scores per fine-tuned run.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from lccp_interp.dynamics.paired import paired_census, paired_heads
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.corpus_panels import corpus_panels
from lccp_interp.figures.interference_panels import distance_rows, interference_of
from lccp_interp.figures.needs import CORPUS, INTERFERENCE, PROBES, why_not
from lccp_interp.figures.probe_panels import ProbeLine, ProbePanel, probe_panels
from lccp_interp.figures.style import format_length, format_number, place_in_training
from lccp_interp.report.drawn import drawn, reason
from lccp_interp.report.page import escape, table
from lccp_interp.schema import LccpError
from lccp_interp.store import Run

MAX_LISTED = 12
"""So many heads of a kind are named, the others counted."""


def probes_section(tables: RunTables) -> str:
    """Results after fine-tuning: figure, numbers, checkpoints where it failed, and heads across the step."""
    heading = '<h2 id="probes">After fine-tuning</h2>'
    if why := why_not(PROBES, tables):
        return heading + _absent(tables, why) + _failed(tables.run) + _across(tables)
    try:
        panels = probe_panels(tables)
        figure = drawn(tables, "probe_scores")
    except LccpError as error:
        return heading + reason(tables.run, error)
    studies = list(dict.fromkeys((panel.study, panel.tuned) for panel in panels))
    made = "".join(_scores(tables, [p for p in panels if p.study == study], study, tuned) for study, tuned in studies)
    return heading + figure + made + _failed(tables.run) + _across(tables)


def _absent(tables: RunTables, why: str) -> str:
    return reason(tables.run, f"{why[0].upper()}{why[1:]}.".replace("`", ""))


def _scores(tables: RunTables, panels: Sequence[ProbePanel], study: str, tuned: bool) -> str:
    """Rows are checkpoints, columns the lines of a study."""
    lines = [
        (panel, line) for panel in panels for line in (*panel.lines, *([panel.mean] if panel.mean is not None else []))
    ]
    columns = [_column(panel, line) for panel, line in lines]
    rows = []
    for name, tokens in tables.checkpoints.select("checkpoint", "tokens_seen").iter_rows():
        cells = [_cell(panel.top, line, name) for panel, line in lines]
        if any(cell is not None for cell in cells):
            rows.append((name, place_in_training(tables.checkpoints, tables.base, tokens), *cells))
    what = "Imported results" if not study else f"Study {study}, {'after' if tuned else 'without'} fine-tuning"
    return f"<h3>{escape(what)}</h3>" + table(("checkpoint", "tokens", *columns), rows)


def _column(panel: ProbePanel, line: ProbeLine) -> str:
    n = sorted({int(count) for count in line.n if count})
    items = "" if not n else f"n\u00a0=\u00a0{n[0]}" if n[0] == n[-1] else f"n\u00a0=\u00a0{n[0]} to {n[-1]}"
    length = None if panel.length is None else format_length(panel.length)
    return ", ".join(part for part in (f"{panel.benchmark} {line.subset}".strip(), line.metric, length, items) if part)


def _cell(top: float | None, line: ProbeLine, checkpoint: str) -> str | None:
    """The score with its standard error, shares of 1 with three decimals, percentages with one."""
    if checkpoint not in line.checkpoints:
        return None
    at = line.checkpoints.index(checkpoint)
    score, error = (
        format_number(value) if top is None else f"{value:.{3 if top == 1 else 1}f}"
        for value in (line.score[at], line.stderr[at])
    )
    return score if math.isnan(line.stderr[at]) else f"{score} ± {error}"


def _failed(run: Run) -> str:
    """Checkpoints whose fine-tuning diverged."""
    failed = []
    for path in sorted((run.path / "probes").glob("*.failed.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            failed.append(f"study {record['study']}, {record['checkpoint']}: {record['error']}")
        except (ValueError, KeyError, TypeError, OSError):
            failed.append(f"{path.name} cannot be read")
    if not failed:
        return ""
    told = "".join(f"<li>{escape(text)}</li>" for text in failed)
    return (
        '<h3>Fine-tuning that failed</h3><p class="note">These checkpoints have no results; lccp probe RUN --sft '
        f'--retry tries again.</p><ul class="note">{told}</ul>'
    )


def _across(tables: RunTables) -> str:
    """Heads before and after fine-tuning, for every run over the same cases that lies beside the fine-tuned weights."""
    found = sorted((tables.run.path / "sft").glob("*/heads/run.json"))
    return "".join(_step(tables, path.parent) for path in found)


def _step(tables: RunTables, folder: Path) -> str:
    heading = f"<h3>Heads across fine-tuning: study {escape(folder.parent.name)}</h3>"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # strangers and twins are told by the command
            heads = paired_heads(
                tables.run, Run.open(folder), metric=tables.metric, length=tables.head_length, mode=tables.read_mode
            )
    except LccpError as error:
        return heading + reason(tables.run, error)
    rows = [
        (
            row["checkpoint"],
            place_in_training(tables.checkpoints, tables.base, row["tokens_seen"]),
            row["n_stay"],
            row["n_births"],
            row["n_deaths"],
            row["n_undecided"],
            row["n_heads"],
            _named(heads, row["checkpoint"], "birth"),
            _named(heads, row["checkpoint"], "death"),
        )
        for row in paired_census(heads).iter_rows(named=True)
    ]
    columns = ("checkpoint", "tokens", "stay", "births", "deaths", "undecided", "heads", "born", "died")
    return (
        f'{heading}<p class="note">Retrieval heads ({escape(tables.rule)}) of each checkpoint before and after light '
        f"fine-tuning, over the same cases at {format_length(tables.head_length)} tokens. A birth is a retrieval head "
        "only after it, a death only before it, and the 95 % interval of the paired change must leave 0 out; else the "
        "head is undecided. So births and deaths here come from fine-tuning, not from training on.</p>"
        + table(columns, rows, text_columns=(0, 7, 8))
    )


def _named(heads: pl.DataFrame, checkpoint: str, event: str) -> str:
    own = heads.filter(pl.col("checkpoint") == checkpoint, pl.col("event") == event)
    own = own.sort(pl.col("change").abs(), descending=True)
    names = [f"{layer}-{head}" for layer, head in own.select("layer", "head").iter_rows()]
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def corpus_section(tables: RunTables) -> str:
    """Perplexity of whole documents: figure, fits and verdicts."""
    heading = '<h2 id="corpus">Corpus perplexity</h2>'
    if why := why_not(CORPUS, tables):
        return heading + _absent(tables, why)
    try:
        panels = corpus_panels(tables)
        figure = drawn(tables, "corpus_ppl")
    except LccpError as error:
        return heading + reason(tables.run, error)
    lines = [(panel.label, line) for panel in panels for line in panel.lines]
    rows = [
        (
            line.corpus,
            label,
            None if line.length is None else format_length(line.length),
            line.n,
            len(line.values),
            format_number(line.values[0]),
            format_number(line.values[-1]),
            line.formula or None,
            line.judged["model"],
            line.judged["verdict"],
        )
        for label, line in lines
    ]
    told = [f"{line.corpus}, {label}: {line.judged['verdict']}; {line.judged['reason']}" for label, line in lines]
    reasons = "".join(f"<li>{escape(text)}</li>" for text in told)
    columns = ("corpus", "measure", "length", "documents", "checkpoints", "from", "to", "A ln N + B", "chosen curve")
    return (
        heading
        + figure
        + table((*columns, "verdict"), rows, text_columns=(0, 1, 7, 8, 9))
        + f'<ul class="note">{reasons}</ul>'
    )


def interference_section(tables: RunTables) -> str:
    """Answer perplexity over distance and interference: both figures, and the ends of the curves as numbers."""
    heading = '<h2 id="interference">Interference</h2>'
    if why := why_not(INTERFERENCE, tables):
        return heading + _absent(tables, why)
    own = interference_of(tables)
    rows = []
    distances = sorted({int(value) for value in own.cells["distance"]})
    for distance in dict.fromkeys((distances[0], distances[-1])):
        at, _ = distance_rows(own, distance)
        for part in at.sort("tokens_seen", "interference").partition_by("checkpoint", maintain_order=True):
            first, last = part.row(0, named=True), part.row(-1, named=True)
            rows.append(
                (
                    f"{first['checkpoint']} (base)" if first["checkpoint"] == own.base else first["checkpoint"],
                    place_in_training(own.checkpoints, own.base, first["tokens_seen"]),
                    format_length(distance),
                    f"{_ppl(first)} at {format_length(first['interference'])}",
                    f"{_ppl(last)} at {format_length(last['interference'])}",
                    format_number(last["loss_nats"] - first["loss_nats"]),
                    f"{first['niah_score']:.0f} to {last['niah_score']:.0f} %",
                    first["n"],
                )
            )
    columns = ("checkpoint", "tokens", "distance", "PPL, least before", "PPL, most before", "loss added (nats)")
    return (
        f'{heading}<p class="note">The needle lies a fixed distance before the question while the text before it '
        "grows. Loss added is what the most text before the needle adds to the answer's loss, over the least.</p>"
        + drawn(tables, "interference_heatmaps")
        + drawn(tables, "interference_curves")
        + table((*columns, "NIAH score", "cases"), rows)
    )


def _ppl(row: dict[str, float]) -> str:
    low, high = format_number(row["answer_ppl_low"]), format_number(row["answer_ppl_high"])
    return f"{format_number(row['answer_ppl'])} [{low}, {high}]"
