"""What a figure cannot be drawn without, whether a run has it, and which command adds it.

It refuses to know pictures. Cost: a look at the kinds of cases and probes.
"""

from __future__ import annotations

import polars as pl

from lccp_interp.dynamics.curves import CORPUS_BENCHMARKS
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.interference_panels import ADD_INTERFERENCE
from lccp_interp.schema import LccpError

GRID, PROBES, CORPUS, INTERFERENCE = "grid", "probes", "corpus", "interference"

ADD_GRID = "`lccp score CHECKPOINT... --out RUN` makes a run that has them"
ADD_PROBES = "`lccp probe RUN --sft` adds them"
ADD_CORPUS = "`lccp probe RUN --corpus FILE` adds it"


def why_not(need: str, tables: RunTables) -> str:
    """Why a figure that needs this cannot be drawn of a run, with the command that adds it; empty where it can.

    Args:
        need: `grid` (cases by length and depth), `probes` (scores of benchmarks), `corpus` (corpus perplexity), all of
            which come with a grid; or `interference`.
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
    is_corpus = pl.col("benchmark").is_in(CORPUS_BENCHMARKS)
    wanted = is_corpus & (pl.col("metric") == "ppl") if need == CORPUS else ~is_corpus
    if tables.run.probes.filter(wanted).head(1).collect().height:
        return ""
    return f"no corpus perplexity; {ADD_CORPUS}" if need == CORPUS else f"no results after fine-tuning; {ADD_PROBES}"


def _no_interference(tables: RunTables) -> str:
    try:
        found = tables.interference
        if found is None:
            return f"no interference run; {ADD_INTERFERENCE} makes one"
        return "" if found.cells.height else "its interference run has no cases"
    except LccpError as error:
        return f"its interference run cannot be read: {error}"
