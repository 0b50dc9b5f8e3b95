"""What a run says, in sentences: every number comes from the tables, none from a template's optimism.

A finding describes; it tests nothing. Where a thing cannot be said (no retrieval heads, a score of zero, an unfinished
run) that is the sentence. This module refuses to know HTML: it returns plain text, to be escaped by whoever shows it.
Cost: nothing beside `RunTables`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import polars as pl

from lccp_interp.dynamics.heads import stability
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.style import format_length, format_number, format_tokens, head_name, stage_name
from lccp_interp.report.causes import causal_words
from lccp_interp.report.verdict import LengthVerdict, in_words, verdicts

NEAR_FINAL = 0.95
"""Share of its final value at which the NIAH score counts as nearly there."""

HIGH_SCORE = 80.0
"""NIAH score (percent) from which on levelling off may be called a ceiling."""

MAX_LISTED = 24
"""Beyond so many births or deaths a sentence counts them; the table names them."""

FEW_CLUSTERS = 8
"""Below so many pairs of needle and haystack, percentile intervals are visibly too narrow."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A heading of a few words and one or more sentences of plain text."""

    heading: str
    text: str


def findings(tables: RunTables, found: list[LengthVerdict] | None = None) -> list[Finding]:
    """All findings, the most important first; `found` are the `verdicts` where they are at hand.

    Example:
        >>> for finding in findings(RunTables(Run.open("runs/demo"))):   # doctest: +SKIP
        ...     print(finding.heading, "-", finding.text)
    """
    made = [
        Finding("Verdict", in_words(verdicts(tables) if found is None else found, tables.head_length)),
        Finding("Do the heads cause it?", causal_words(tables)),
        _count(tables),
        _births_and_deaths(tables),
        _survival(tables),
        _strongest(tables),
        _score_against_ppl(tables),
        _ranking(tables),
        _depth(tables),
    ]
    return [finding for finding in made if finding is not None]


def cautions(tables: RunTables) -> list[str]:
    """What a reader should hold against the findings."""
    said = []
    listed, scored = tables.run.checkpoints.height, tables.scored.height
    if scored < listed:
        said.append(f"The run is not finished: {scored} of {listed} checkpoints are scored at this length.")
    resamples = tables.sample.resamples
    if resamples.ci_over == "cases":
        said.append(
            "There are fewer than three pairs of needle and haystack: intervals are over single cases, which are not "
            "independent, and are too narrow."
        )
    elif resamples.n_units < FEW_CLUSTERS:
        said.append(
            f"Intervals rest on {resamples.n_units} pairs of needle and haystack only and are somewhat too narrow; "
            "score with more samples before relying on them."
        )
    if scored < 3:
        said.append("Births and deaths need at least three checkpoints.")
    undefined = tables.scores.filter(pl.col("score").is_nan()).height
    if undefined:
        said.append(f"{undefined} of {tables.scores.height} head scores are undefined (no case measured them).")
    return said


def _tokens_of(tables: RunTables, name: str) -> int:
    return int(tables.checkpoints.filter(pl.col("checkpoint") == name)["tokens_seen"][0])


def when(tables: RunTables, tokens: int) -> str:
    """A point of training in words: tokens of the last stage from its base on, all tokens before.

    After a long pretraining the tokens of LCCP would vanish in three digits of the total.
    """
    start = _tokens_of(tables, tables.base)
    stages = tables.checkpoints["stage"]
    if stages.n_unique() < 2 or tokens <= start:
        return f"{format_tokens(tokens)} tokens"
    return f"{format_tokens(tokens - start)} {stage_name(stages[-1])} tokens"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _is_are(n: int) -> str:
    return "is" if n == 1 else "are"


def _ends(tables: RunTables) -> tuple[str, str]:
    """Base and last checkpoint among those with head scores."""
    names = tables.scored["checkpoint"].to_list()
    return (tables.base if tables.base in names else names[0]), names[-1]


def _count(tables: RunTables) -> Finding:
    base, last = _ends(tables)
    rows = {row["checkpoint"]: row for row in tables.census.iter_rows(named=True)}
    n_base, n_last = rows[base]["n_retrieval_heads"], rows[last]["n_retrieval_heads"]
    text = (
        f"At the base checkpoint {base} ({format_tokens(_tokens_of(tables, base))} tokens) {n_base} of "
        f"{rows[base]['n_heads']} heads {_is_are(n_base)} retrieval heads ({tables.metric} {tables.rule} "
        f"at {format_length(tables.head_length)} tokens); at the last checkpoint {last} "
        f"({when(tables, _tokens_of(tables, last))}) there {_is_are(n_last)} {n_last}."
    )
    if n_base:
        before, after = rows[base]["mean_initial_score"], rows[last]["mean_initial_score"]
        trend = "rises" if after > before else "falls"
        kept = rows[last]["n_from_base"]
        whose = "The initial head is" if n_base == 1 else f"Of the initial heads {kept} {_is_are(kept)}"
        state = ("one still" if kept else "no longer one") if n_base == 1 else "still among them"
        text += f" {whose} {state}; their mean score {trend} from {before:.2f} to {after:.2f}."
    return Finding("Number of retrieval heads", text)


def _births_and_deaths(tables: RunTables) -> Finding:
    events = tables.events
    stages = tables.scored["stage"].unique(maintain_order=True).to_list()
    where = f"In the last stage ({stage_name(stages[-1])})" if len(stages) > 1 else "Over the run"
    own = events.filter(pl.col("stage") == stages[-1])
    settled = own.filter(~pl.col("provisional"))
    sentences = []
    for kind, verb in (("birth", "born"), ("death", "lost")):
        some = settled.filter(pl.col("kind") == kind)
        if some.is_empty():
            sentences.append(f"{where if kind == 'birth' else 'and'} no head was {verb}")
            continue
        listed = "; ".join(
            f"{_listing([_event_name(row) for row in rows.iter_rows(named=True)], some.height)} "
            f"{_between(tables, after, until)}"
            for (after, until), rows in some.group_by("after_tokens", "tokens_seen", maintain_order=True)
        )
        n = _plural(some.height, "head")
        lead = f"{where} {n}" if kind == "birth" else n
        sentences.append(f"{lead} {'was' if some.height == 1 else 'were'} {verb}: {listed}")
    text = (", " if sentences[1].startswith("and") else ". ").join(sentences) + "."
    waiting = own.height - settled.height
    if waiting:
        text += (
            f" {_plural(waiting, 'more event')} at the last checkpoint {_is_are(waiting)} provisional and not counted."
        )
    if len(stages) > 1:
        earlier = events.filter(pl.col("stage") != stages[-1], ~pl.col("provisional"))
        kinds = earlier["kind"].to_list()
        births, deaths = kinds.count("birth"), kinds.count("death")
        if births or deaths:
            text += f" Before it there {'was' if births == 1 else 'were'} {_plural(births, 'birth')} and "
            text += f"{_plural(deaths, 'death')}."
        else:
            text += " Before it there was no birth and no death."
    return Finding("Births and deaths", text)


def _event_name(event: dict[str, Any]) -> str:
    again = " (again)" if event["kind"] == "birth" and event["n_life"] > 1 else ""
    return head_name(event["layer"], event["head"]) + again


def _listing(names: list[str], n_in_all: int) -> str:
    """Names in words; only their number where the sentence would hold more than `MAX_LISTED`."""
    if n_in_all > MAX_LISTED:
        return str(len(names))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _between(tables: RunTables, after: int, until: int) -> str:
    """The interval in which an event lies."""
    if after == _tokens_of(tables, tables.base) and tables.checkpoints["stage"].n_unique() > 1:
        return f"within the first {when(tables, until)}"
    early, late = when(tables, after).split(" ", 1), when(tables, until).split(" ", 1)
    # The unit once, where both share it.
    return (
        f"between {early[0]} and {' '.join(late)}"
        if early[1] == late[1]
        else f"between {' '.join(early)} and {' '.join(late)}"
    )


def _survival(tables: RunTables) -> Finding | None:
    base, last = _ends(tables)
    if base == last:
        return None
    row = tables.census.filter(pl.col("checkpoint") == last).row(0, named=True)
    alive, initial, total, later = (row[f"n_{name}"] for name in ("from_base", "initial", "retrieval_heads", "newborn"))
    stages = tables.scored["stage"].unique(maintain_order=True).to_list()
    when_born = f"in {stage_name(stages[-1])}" if len(stages) > 1 else "since then"
    if initial:
        text = f"Of the {_plural(initial, 'initial head')} {alive} {_is_are(alive)} alive at the end"
    else:
        text = f"The base checkpoint {base} has no retrieval head, so there is no initial head to survive"
    if total:
        text += f"; {later} of the {_plural(total, 'retrieval head')} at the end became so {when_born}"
    elif initial:
        text += "; there is no retrieval head at the end"
    return Finding("Survival", f"{text}.")


def _strongest(tables: RunTables) -> Finding | None:
    _, last = _ends(tables)
    rows = tables.scores.filter(pl.col("checkpoint") == last, pl.col("score").is_not_nan())
    if rows.is_empty():
        return None
    best = rows.sort("score", "layer", "head", descending=[True, False, False]).row(0, named=True)
    interval = (
        f" (95 % interval {best['ci_low']:.2f} to {best['ci_high']:.2f})" if math.isfinite(best["ci_low"]) else ""
    )
    text = (
        f"Head {head_name(best['layer'], best['head'])} (layer-head) ends strongest, with a {tables.metric} score of "
        f"{best['score']:.2f}{interval} over {_plural(best['n'], 'case')}."
    )
    life = tables.lives.filter(pl.col("layer") == best["layer"], pl.col("head") == best["head"]).sort("n_life")
    if life.is_empty():
        return Finding("Strongest head", f"{text} By the rule for births it never came to life.")
    born = life.row(-1, named=True)
    if born["born_checkpoint"] is None:
        text += " It was there from the first checkpoint on."
    else:
        text += f" It was born at {born['born_checkpoint']} ({when(tables, born['born_tokens'])})."
    return Finding("Strongest head", text)


@dataclass(frozen=True, slots=True)
class NearFinal:
    """When the NIAH score of a length was nearly final, and what its answer perplexity did from there on."""

    length: int
    final_score: float
    checkpoint: str | None
    tokens_seen: int | None
    ppl_then: float
    ppl_last: float
    loss_then: float
    loss_last: float


def near_final(tables: RunTables, length: int) -> NearFinal:
    """First checkpoint whose NIAH score is at least `NEAR_FINAL` of the last one's; none where the last is 0."""
    rows = tables.by_length.filter(pl.col("length") == length, pl.col("niah_score").is_not_nan())
    if rows.is_empty():
        nan = float("nan")
        return NearFinal(length, nan, None, None, nan, nan, nan, nan)
    last = rows.row(-1, named=True)
    final = last["niah_score"]
    reached = rows.filter(pl.col("niah_score") >= NEAR_FINAL * final)
    first = reached.row(0, named=True) if final > 0 else None
    return NearFinal(
        length=length,
        final_score=final,
        checkpoint=first["checkpoint"] if first else None,
        tokens_seen=first["tokens_seen"] if first else None,
        ppl_then=first["answer_ppl"] if first else float("nan"),
        ppl_last=last["answer_ppl"],
        loss_then=first["loss_nats"] if first else float("nan"),
        loss_last=last["loss_nats"],
    )


def _score_against_ppl(tables: RunTables) -> Finding:
    length = tables.head_length
    near = near_final(tables, length)
    heading = "Score against perplexity"
    lead = ""
    if near.checkpoint is None:
        lead = (
            f"The NIAH score at {format_length(length)} tokens ends at {near.final_score:.0f} %: no needle is copied. "
        )
        solved = [other for n in tables.lengths if (other := near_final(tables, n)).checkpoint is not None]
        if not solved:
            return Finding(heading, f"{lead}Nor is one at any other length.")
        near = solved[-1]
        lead += f"The longest length at which any is, is {format_length(near.length)}. "
    at = f"at {format_length(near.length)} tokens"
    text = (
        f"{lead}The NIAH score {at} first reaches {100 * NEAR_FINAL:.0f} % of its final value "
        f"({near.final_score:.0f} %) at {near.checkpoint} ({when(tables, near.tokens_seen or 0)})."
    )
    if near.checkpoint == tables.checkpoints["checkpoint"][-1]:
        return Finding(heading, f"{text} That is the last checkpoint: the score has not levelled off within the data.")
    change = near.loss_last - near.loss_then
    if change < 0:
        text += (
            f" From there to the end the answer's perplexity still falls from {format_number(near.ppl_then)} to "
            f"{format_number(near.ppl_last)} (loss {near.loss_then:.3f} to {near.loss_last:.3f} nats per token, "
            f"{100 * -change / near.loss_then:.0f} % less). "
        )
        if near.final_score >= HIGH_SCORE:
            text += (
                "The score looks finished while the model is still getting surer, as in the paper's deceptive "
                "saturation. This is a description, not a test; the test is in the verdict."
            )
        else:
            text += f"A final score of {near.final_score:.0f} % is no ceiling, so this says nothing about saturation."
    else:
        text += (
            f" From there to the end the answer's perplexity does not fall any more: {format_number(near.ppl_then)} "
            f"then, {format_number(near.ppl_last)} at the end. Both level off together, as far as this shows; it is a "
            "description, not a test."
        )
    return Finding(heading, text)


def _ranking(tables: RunTables) -> Finding | None:
    base, last = _ends(tables)
    if base == last:
        return None
    row = stability(tables.scores.filter(pl.col("checkpoint").is_in([base, last]))).row(0, named=True)
    text = (
        f"Of the {row['top_k']} highest-scoring heads of {base}, {row['overlap']:.3g} are among the "
        f"{row['top_k']} highest of {last} ({row['overlap_by_chance']:.1f} by chance); the rank correlation of all "
        f"{row['n_heads']} heads is {format_number(row['spearman'], 2)}."
    )
    return Finding("Same heads?", text)


def _depth(tables: RunTables) -> Finding | None:
    base, last = _ends(tables)
    length = tables.head_length
    rows = tables.by_depth.filter(pl.col("length") == length, pl.col("answer_ppl").is_not_nan())
    if rows["depth_fraction"].n_unique() < 2:
        return None

    def hardest(name: str) -> tuple[float, float, float]:
        own = rows.filter(pl.col("checkpoint") == name).sort("answer_ppl")
        return own["depth_fraction"][-1], own["answer_ppl"][-1], own["answer_ppl"][0]

    depth, worst, best = hardest(last)
    text = (
        f"At {format_length(length)} tokens the last checkpoint finds needles at depth {100 * depth:.0f} % hardest "
        f"(perplexity {format_number(worst)}, against {format_number(best)} at the easiest depth)"
    )
    if base != last and rows.filter(pl.col("checkpoint") == base).height:
        depth, worst, best = hardest(base)
        text += (
            f"; the base had most trouble at {100 * depth:.0f} % ({format_number(worst)} against {format_number(best)})"
        )
    return Finding("Depth of the needle", text + ".")
