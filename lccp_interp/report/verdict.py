"""The verdict of a report: per length, is it saturated, is that deceptive, and which heads retrieve.

Verdicts are those of `dynamics.saturation` (rules over intervals and a trend test), heads those of `dynamics.heads`;
nothing is computed here. Cost: the fits of two curves and the head table per length, a second each.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from lccp_interp.dynamics.saturation import IMPROVING, SATURATED, deceptive_saturation
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.style import format_length, format_number, head_name
from lccp_interp.report.page import escape, table
from lccp_interp.schema import LccpError

MAX_NAMED = 6
"""So many retrieval heads of a length are named, the others counted."""


@dataclass(frozen=True, slots=True)
class LengthVerdict:
    """What is to be said of one length; `heads` are the retrieval heads of the last checkpoint, best first.

    `score`, `surety` are verdicts on the NIAH score and on the answer's loss or perplexity; `deceptive` is `yes`, `no`
    or `cannot tell`, and `sentence` says why. All are `cannot tell` where there is nothing to judge.
    """

    length: int
    final_score: float
    final_ppl: float
    score: str
    surety: str
    deceptive: str
    sentence: str
    heads: tuple[str, ...]
    n_born: int


def verdicts(tables: RunTables) -> list[LengthVerdict]:
    """The verdict at every length of a run, shortest first.

    Example:
        >>> [verdict.deceptive for verdict in verdicts(RunTables(Run.open("runs/demo")))]   # doctest: +SKIP
        ['no', 'no', 'no', 'no', 'no']
    """
    return [_verdict(tables.at(length)) for length in tables.lengths]


def _verdict(at: RunTables) -> LengthVerdict:
    length = at.head_length
    last = at.by_length.filter(pl.col("length") == length).row(-1, named=True)
    try:
        found = deceptive_saturation(at.run, length=length, mode=at.read_mode)
        score, surety = str(found.score["verdict"]), str(found.ppl["verdict"])
        deceptive, sentence = found.verdict, found.sentence
    except LccpError as error:
        score = surety = deceptive = "cannot tell"
        sentence = f"{error}."
    ends = at.scores.filter(checkpoint=at.scored["checkpoint"][-1], retrieves=True)
    ends = ends.sort("score", "layer", "head", descending=[True, False, False])
    births = at.events.filter(
        pl.col("kind") == "birth", ~pl.col("provisional"), pl.col("stage") == at.checkpoints["stage"][-1]
    )
    return LengthVerdict(
        length=length,
        final_score=last["niah_score"],
        final_ppl=last["answer_ppl"],
        score=score,
        surety=surety,
        deceptive=deceptive,
        sentence=sentence,
        heads=tuple(head_name(*head) for head in ends.select("layer", "head").iter_rows()),
        n_born=births.height,
    )


def in_words(found: list[LengthVerdict], length: int) -> str:
    """The verdict at one length, and of the other lengths in how many it is the same.

    Example:
        >>> one = LengthVerdict(256, 90.0, 1.1, "saturated", "still improving", "yes", "Because.", ("3-6",), 0)
        >>> print(in_words([one], 256).split(". ")[0])
        At 256 tokens the NIAH score is saturated (at 90 %), the answer's perplexity is still improving
    """
    (own,) = [verdict for verdict in found if verdict.length == length]
    text = (
        f"At {format_length(length)} tokens the NIAH score is {_state(own.score)} (at {own.final_score:.0f} %), the "
        f"answer's perplexity is {_state(own.surety)}. {own.sentence} {_heads_in_words(own)}"
    )
    if len(found) > 1:
        text += (
            f" Over all {len(found)} lengths: saturated {_at([v for v in found if v.score == SATURATED])}, still "
            f"improving {_at([v for v in found if v.score == IMPROVING])}; deceptive saturation "
            f"{_at([v for v in found if v.deceptive == 'yes'])}."
        )
    return text


def _state(verdict: str) -> str:
    return verdict if verdict in (SATURATED, IMPROVING) else "such that no verdict can be given"


def _at(some: list[LengthVerdict]) -> str:
    return f"at {', '.join(format_length(verdict.length) for verdict in some)}" if some else "at none"


def _heads_in_words(own: LengthVerdict) -> str:
    if not own.heads:
        return "No head is a retrieval head at the end."
    count = "One head retrieves" if len(own.heads) == 1 else f"{len(own.heads)} heads retrieve"
    return f"{count}: {_named(own.heads)}."


def _named(heads: tuple[str, ...]) -> str:
    more = f" and {len(heads) - MAX_NAMED} more" if len(heads) > MAX_NAMED else ""
    return ", ".join(heads[:MAX_NAMED]) + more


def verdict_table(found: list[LengthVerdict], stage: str) -> str:
    """The verdicts of all lengths as HTML, with the sentences behind them."""
    rows = [
        (
            format_length(verdict.length),
            f"{verdict.final_score:.0f} %",
            verdict.score,
            format_number(verdict.final_ppl),
            verdict.surety,
            verdict.deceptive,
            _named(verdict.heads) or "none",
            verdict.n_born,
        )
        for verdict in found
    ]
    columns = (
        "length", "final NIAH score", "saturated?", "final PPL", "surety saturated?", "deceptive?",
        "retrieval heads at the end", f"born in {stage}",
    )  # fmt: skip
    reasons = "".join(f"<li>{escape(verdict.sentence)}</li>" for verdict in found)
    return table(columns, rows, text_columns=(0, 2, 4, 5, 6)) + (
        f"<details><summary>Why</summary><ul class='note'>{reasons}</ul></details>"
    )
