"""What a figure cannot be drawn without, whether a run has it, and which command adds it.

It refuses to know pictures. Cost: a look at the kinds of cases, probes and scores.
"""

from __future__ import annotations

import polars as pl

from lccp_interp.dynamics.correlation import paper_layout
from lccp_interp.dynamics.curves import CORPUS_BENCHMARKS
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.agreement_panels import why_no_agreement
from lccp_interp.figures.causal_panels import why_no_check, why_no_dates
from lccp_interp.figures.interference_panels import ADD_INTERFERENCE
from lccp_interp.schema import LccpError

GRID, PROBES, CORPUS, INTERFERENCE = "grid", "probes", "corpus", "interference"
ABLATIONS, ABLATED_TRAJECTORY, METRICS = "ablations", "ablated trajectory", "metrics"
STEPS, PAPER_PROBES = "steps", "paper probes"

ADD_GRID = "`lccp score CHECKPOINT... --out RUN` makes a run that has them"
ADD_PROBES = "`lccp probe RUN --sft` adds them"
ADD_CHECKPOINTS = "`lccp score CHECKPOINT... --out RUN` adds others"
ADD_CORPUS = "`lccp probe RUN --corpus FILE` adds it"


def why_not(need: str, tables: RunTables) -> str:
    """Why a figure that needs this cannot be drawn of a run, with the command that adds it; empty where it can.

    Args:
        need: `grid` (cases by length and depth), `probes` (scores of benchmarks), `corpus` (corpus perplexity),
            `ablations`, `ablated trajectory` (of two or more checkpoints), `metrics` (two or more of heads), `steps`
            (two or more checkpoints), `paper probes` (what the paper's correlations are of), all of which come with a
            grid; or `interference`.
        tables: of the run.

    Example:
        >>> why_not("probes", RunTables(Run.open("runs/demo")))   # doctest: +SKIP
        'no results after fine-tuning; `lccp probe RUN --sft` adds them'
    """
    if need == INTERFERENCE:
        return _no_interference(tables)
    if not tables.has_grid:
        return f"no needle-in-a-haystack cases by length and depth; {ADD_GRID}"
    if need == GRID:
        return ""
    if need == METRICS:
        return why_no_agreement(tables)
    if need in (ABLATIONS, ABLATED_TRAJECTORY):
        return why_no_check(tables) if need == ABLATIONS else why_no_dates(tables)
    if need == STEPS:
        return "" if tables.scored.height > 1 else f"it has one scored checkpoint; {ADD_CHECKPOINTS}"
    is_corpus = pl.col("benchmark").is_in(CORPUS_BENCHMARKS)
    wanted = is_corpus & (pl.col("metric") == "ppl") if need == CORPUS else ~is_corpus
    if tables.run.probes.filter(wanted).head(1).collect().height:
        return _no_paper_probes(tables) if need == PAPER_PROBES else ""
    return f"no corpus perplexity; {ADD_CORPUS}" if need == CORPUS else f"no results after fine-tuning; {ADD_PROBES}"


def _no_paper_probes(tables: RunTables) -> str:
    try:
        wide = paper_layout(tables.correlations).filter(quantity="r").drop("cheap", "quantity", "average")
    except LccpError as error:
        return str(error)
    if wide.select(pl.any_horizontal(pl.all().is_not_nan().any())).item():
        return ""
    return "too few checkpoints have results for a correlation; `lccp probe RUN --sft` adds more"


def _no_interference(tables: RunTables) -> str:
    try:
        found = tables.interference
        if found is None:
            return f"no interference run; {ADD_INTERFERENCE} makes one"
        return "" if found.cells.height else "its interference run has no cases"
    except LccpError as error:
        return f"its interference run cannot be read: {error}"
