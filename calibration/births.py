"""Births and deaths where there are none, and where there are: false events per head and step, planted ones found.

Each cell is many heads of one expected score, drawn as `cases` says, put through `bootstrap_means` and `trace_lives` as
a run's are. False events are counted per head and step (a step is from one checkpoint to the next); a settled and a
provisional one are two numbers, since a provisional event is shown and not counted. A planted event is *found* if a
settled event of its kind stands at its checkpoint or the one after.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.cases import Design, draw_values
from lccp_interp.dynamics.births import Life, trace_lives
from lccp_interp.dynamics.resampling import (
    bootstrap_means,
    draw_resamples,
    mean_defined,
    percentile_interval,
    resampled_means,
)

TITLE = "Births and deaths of retrieval heads"
SEED = 20260
N_BOOT = 1000
LEVELS = (0.0, 0.02, 0.05, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.13, 0.15, 0.2, 0.3, 0.6, 0.9)
"""Expected scores of stationary heads; thick around the thresholds 0.05 and 0.1."""

TOKENS = (1, 3, 6)
"""Distinct tokens of the answer."""

CHECKPOINTS = (6, 12, 19)
"""The shorter series are the beginnings of the longest."""

PLANTED = (0.3, 0.5, 0.8)
PLANTED_CHECKPOINTS, PLANTED_AT = 12, 6

DESIGNS = ((20, 20), (60, 60), (120, 120), (60, 12), (120, 8), (20, 4), (60, 4))
"""Cases and clusters; the bundled runs have 20 and 20 at each length."""

FEW_CLUSTERS = 8
"""Below so many, power is reported but promised to nobody."""

HEADS = 200
"""Per cell: of 3600 steps at 19 checkpoints, 36 make 1 %."""

MEMORY = 0.5
MAX_FALSE, MIN_FOUND = 0.01, 0.95

RULES = ("now", "before")
"""`before`: plain percentile intervals, and a checkpoint was high or low only where its own interval said so, too."""

UP, DOWN = 0.1, 0.05
Table = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def tables(values: NDArray[np.float32], design: Design, seed: int) -> dict[str, Table]:
    """Score, ci_low and ci_high, each `[head, checkpoint]`, with expanded intervals and with plain percentiles."""
    n_checkpoints, n_cases, n_heads = values.shape
    flat = values.transpose(1, 0, 2).reshape(n_cases, n_checkpoints * n_heads)
    resamples = draw_resamples(design.clusters, n_boot=N_BOOT, seed=seed)
    plain = np.concatenate(
        [
            np.array(percentile_interval(resampled_means(flat[:, i : i + 2048], resamples), resamples.confidence))
            for i in range(0, flat.shape[1], 2048)
        ],
        axis=1,
    )
    found = {"expanded": bootstrap_means(flat, resamples)[:3], "plain": (mean_defined(flat)[0], *plain)}
    return {
        name: tuple(column.reshape(n_checkpoints, n_heads).T for column in columns)  # type: ignore[misc]
        for name, columns in found.items()
    }


def series(found: dict[str, Table]) -> dict[str, Table]:
    """What `trace_lives` is given by each of `RULES`.

    The rule before this one is the present one on scores that are left undefined (or moved to the threshold) where it
    would have taken a checkpoint for *between*; only which heads were alive from the start can differ by it.

    Example:
        >>> one = np.array([0.0, 0.2, 0.2]), np.array([0.0, 0.04, 0.1]), np.array([0.1, 0.3, 0.3])
        >>> series({"expanded": one, "plain": one})["before"][0]
        array([0.05,  nan, 0.2 ])
    """
    score, low, high = found["plain"]
    masked = np.where((score > UP) & ~(low > DOWN), np.nan, score)
    masked = np.where((score < DOWN) & ~(high < UP), DOWN, masked)
    return {"now": found["expanded"], "before": (masked, low, high)}


def count(lives: Sequence[Life]) -> tuple[int, int]:
    """Settled and provisional events of one head.

    Example:
        >>> count([Life(None, 3), Life(5, 8, True)])
        (2, 1)
    """
    n_events = sum((life.born is not None) + (life.died is not None) for life in lives)
    # A head alive from a start too short to be sure of is provisional without an event.
    n_provisional = sum(life.provisional and (life.born, life.died) != (None, None) for life in lives)
    return n_events - n_provisional, n_provisional


def is_found(lives: Sequence[Life], kind: str, at: int) -> bool:
    """Whether a settled event of `kind` stands at checkpoint `at` or the next.

    Example:
        >>> is_found([Life(7, None)], "birth", 6), is_found([Life(7, None, True)], "birth", 6)
        (True, False)
    """
    for life in lives:
        event = life.born if kind == "birth" else life.died
        settled = not life.provisional or (kind == "birth" and life.died is not None)
        if event in (at, at + 1) and settled:
            return True
    return False


def stationary(design: Design, n_heads: int, seed: int) -> list[dict[str, Any]]:
    """False events of heads that never change, one record per rule, number of checkpoints, k and level."""
    cells = list(itertools.product(TOKENS, LEVELS))
    level = np.repeat([level for _, level in cells], n_heads)[:, None] * np.ones(max(CHECKPOINTS))
    n_tokens = np.repeat([k for k, _ in cells], n_heads)
    values = draw_values(level, n_tokens, design, np.random.default_rng(seed))
    records = []
    found = series(tables(values, design, seed))
    for rule, n_checkpoints in [*itertools.product(["now"], CHECKPOINTS), ("before", CHECKPOINTS[-1])]:
        score, low, high = found[rule]
        first = slice(n_checkpoints)
        counted = np.array(
            [count(trace_lives(score[i, first], low[i, first], high[i, first])) for i in range(len(score))]
        )
        for (k, p), (settled, provisional) in zip(
            cells, counted.reshape(len(cells), n_heads, 2).sum(axis=1).tolist(), strict=True
        ):
            records.append(
                {
                    "rule": rule,
                    "checkpoints": n_checkpoints,
                    "tokens": k,
                    "level": p,
                    "steps": n_heads * (n_checkpoints - 1),
                    "settled": settled,
                    "provisional": provisional,
                }
            )
    return records


def planted(design: Design, n_heads: int, seed: int) -> list[dict[str, Any]]:
    """Planted births and deaths found, one record per rule, k, level and kind."""
    cells = list(itertools.product(TOKENS, PLANTED, ("birth", "death")))
    later = np.arange(PLANTED_CHECKPOINTS) >= PLANTED_AT
    level = np.repeat(np.array([p * (later == (kind == "birth")) for _, p, kind in cells]), n_heads, axis=0)
    n_tokens = np.repeat([k for k, _, _ in cells], n_heads)
    values = draw_values(level, n_tokens, design, np.random.default_rng(seed))
    records = []
    for rule, (score, low, high) in series(tables(values, design, seed)).items():
        for number, (k, p, kind) in enumerate(cells):
            heads = range(number * n_heads, (number + 1) * n_heads)
            found = sum(is_found(trace_lives(score[i], low[i], high[i]), kind, PLANTED_AT) for i in heads)
            records.append({"rule": rule, "tokens": k, "level": p, "kind": kind, "heads": n_heads, "found": int(found)})
    return records


def simulate(design: Design, n_heads: int, seed: int) -> dict[str, Any]:
    """The record of one design."""
    return {
        "cases": design.n_cases,
        "clusters": design.n_clusters,
        "memory": design.memory,
        "seed": seed,
        "heads": n_heads,
        "stationary": stationary(design, n_heads, seed),
        "planted": planted(design, n_heads, seed),
    }


def measure(say: Callable[[str], Any], *, quick: bool = False) -> list[dict[str, Any]]:
    """One record per design and memory, with its cells; two processes share the work."""
    n_heads = 10 if quick else HEADS
    jobs = [
        (Design(*cases_and_clusters, memory), n_heads, SEED + 10 * number + int(memory == 0))
        for number, cases_and_clusters in enumerate(DESIGNS[:1] if quick else DESIGNS)
        for memory in (MEMORY, 0.0)
    ]
    records = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        # The pool starts its processes when it is first used: a quick look does without them.
        each = map if quick else pool.map
        for record in each(simulate, *zip(*jobs, strict=True)):
            say(f"  {record['cases']} cases in {record['clusters']} clusters, memory {record['memory']}")
            records.append(record)
    return records


def rate(cells: Sequence[dict[str, Any]], *kinds: str) -> float:
    """Events per head and step over all `cells`."""
    return float(sum(cell[kind] for cell in cells for kind in kinds) / sum(cell["steps"] for cell in cells))


def worst(cells: Sequence[dict[str, Any]], *kinds: str) -> dict[str, Any]:
    """The cell with the highest rate."""
    return max(cells, key=lambda cell: rate([cell], *kinds))


def of(cells: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The cells that have these values."""
    return [cell for cell in cells if all(cell[key] == value for key, value in wanted.items())]


def promised(record: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Whether a planted event of this cell must be found: see the words below the table."""
    return record["clusters"] >= FEW_CLUSTERS and (cell["level"] >= 0.5 or cell["tokens"] > 1 or record["cases"] >= 60)


def failures(records: Sequence[dict[str, Any]]) -> list[str]:
    """Bounds that do not hold."""
    lines = []
    for record in records:
        where = f"{record['cases']} cases in {record['clusters']} clusters, memory {record['memory']:g}"
        for n in CHECKPOINTS:
            cells = of(record["stationary"], rule="now", checkpoints=n)
            highest = worst(cells, "settled")
            if record["memory"] == MEMORY and rate([highest], "settled") > MAX_FALSE:
                lines.append(f"{where}, {n} checkpoints: {cell_words(highest, 'settled')} false events per step")
            if rate(cells, "settled") > MAX_FALSE:
                lines.append(f"{where}, {n} checkpoints: {100 * rate(cells, 'settled'):.2f} % over all heads")
        for cell in of(record["planted"], rule="now"):
            if promised(record, cell) and cell["found"] < MIN_FOUND * cell["heads"]:
                share = 100 * cell["found"] / cell["heads"]
                lines.append(
                    f"{where}: {cell['kind']} at {cell['level']} with k = {cell['tokens']} found in {share:.1f} %"
                )
    return lines


def cell_words(cell: dict[str, Any], *kinds: str) -> str:
    """A rate, of settled events if nothing is said, and the cell it belongs to."""
    kinds = kinds or ("settled",)
    return f"{100 * rate([cell], *kinds):.2f} % (p = {cell['level']:g}, k = {cell['tokens']})"


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """The records as Markdown."""
    first = records[0]
    return [
        f"Scores are drawn per case as in `calibration/cases.py`: k = {', '.join(map(str, TOKENS))} distinct answer "
        "tokens, the same cases at every checkpoint, latent variance 20 % of the cluster and 20 % of the case. "
        f"*Memory* is the part of that variance that stays from checkpoint to checkpoint: {MEMORY:g} is like the "
        "bundled runs, 0 draws all of it anew and is harsher than a run. The default rule (up 0.1, down 0.05, hold 2), "
        f"{N_BOOT} resamples; {first['heads']} heads per cell; seeds {records[0]['seed']} to {records[-1]['seed']}.",
        "",
        "### False events of heads that do not change",
        "",
        "Births and deaths per head and step, in percent. Expected scores p = "
        + ", ".join(f"{level:g}" for level in LEVELS)
        + "; *mean* is over all p and k at 19 checkpoints, *worst* the worst of these cells. Bounds: 1 % settled in "
        f"the worst cell at memory {MEMORY:g}, 1 % in the mean at memory 0. *Before* is the rule as it was: plain "
        "percentile intervals, and a checkpoint was high (low) only if its own interval lay above 0.05 (below 0.1).",
        "",
        "| cases / clusters | memory | mean | worst, 6 checkpoints | worst, 12 | worst, 19 | settled and provisional, "
        "worst of 19 | before: mean | before: worst of 19 |",
        "|---|---:|---:|---|---|---|---|---:|---|",
        *(_false_row(record) for record in records),
        "",
        "### Planted events found within one checkpoint",
        "",
        f"A score of 0 becomes 0.3, 0.5 or 0.8 at checkpoint {PLANTED_AT + 1} of {PLANTED_CHECKPOINTS} (birth) or the "
        "reverse (death). Percent found; memory "
        f"{MEMORY:g}. Each entry is births / deaths, in brackets by the rule as it was before. Bound: 95 % where "
        f"there are at least {FEW_CLUSTERS} clusters, but for 0.3 with a single token and fewer than 60 cases.",
        "",
        "| cases / clusters | k | 0.3 | 0.5 | 0.8 |",
        "|---|---:|---|---|---|",
        *(_found_row(record, k) for record in of(records, memory=MEMORY) for k in TOKENS),
        "",
        *_reading(records),
    ]


def _false_row(record: dict[str, Any]) -> str:
    now = {n: of(record["stationary"], rule="now", checkpoints=n) for n in CHECKPOINTS}
    before = of(record["stationary"], rule="before", checkpoints=CHECKPOINTS[-1])
    both = ("settled", "provisional")
    entries = [
        f"{record['cases']} / {record['clusters']}",
        f"{record['memory']:g}",
        f"{100 * rate(now[19], 'settled'):.3f}",
        *(cell_words(worst(now[n], "settled"), "settled") for n in CHECKPOINTS),
        cell_words(worst(now[19], *both), *both),
        f"{100 * rate(before, 'settled'):.3f}",
        cell_words(worst(before, "settled"), "settled"),
    ]
    return f"| {' | '.join(entries)} |"


def _found_row(record: dict[str, Any], k: int) -> str:
    def shares(rule: str, level: float) -> str:
        cells = of(record["planted"], rule=rule, tokens=k, level=level)
        return " / ".join(
            f"{100 * of(cells, kind=kind)[0]['found'] / record['heads']:.0f}" for kind in ("birth", "death")
        )

    entries = [f"{shares('now', level)} ({shares('before', level)})" for level in PLANTED]
    return f"| {record['cases']} / {record['clusters']} | {k} | {' | '.join(entries)} |"


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    def over(memory: float) -> list[dict[str, Any]]:
        return [c for r in of(records, memory=memory) for c in of(r["stationary"], rule="now", checkpoints=19)]

    def named(few: bool) -> str:
        lines = [
            f"{r['cases']} / {r['clusters']} {cell['kind']} at {cell['level']:g}, k = {cell['tokens']}"
            for r in of(records, memory=MEMORY)
            for cell in of(r["planted"], rule="now")
            if (r["clusters"] < FEW_CLUSTERS) == few and cell["found"] < MIN_FOUND * cell["heads"]
        ]
        return "; ".join(lines) or "nothing"

    def above(cells: Sequence[dict[str, Any]]) -> str:
        high = [cell for cell in cells if rate([cell], "settled") > MAX_FALSE]
        longest = f", with answers of at most {max(c['tokens'] for c in high)} distinct tokens" if high else ""
        return f"{len(high)} of its {len(cells)} cells{longest}"

    like_run, anew = over(MEMORY), over(0.0)
    return [
        f"How to read it. Where cases repeat themselves as in a run, {100 * rate(like_run, 'settled'):.3f} % of the "
        f"steps of unchanging heads show a settled event, in the worst cell {cell_words(worst(like_run, 'settled'))}. "
        f"Drawn anew at every checkpoint it is {100 * rate(anew, 'settled'):.3f} %, and the worst cell "
        f"{cell_words(worst(anew, 'settled'))}; above 1 % lie {above(anew)}. Provisional events are more frequent; "
        "that is why nothing counts them.",
        "",
        f"Found in less than 95 %, with {FEW_CLUSTERS} clusters or more: {named(False)}. With fewer: {named(True)}. "
        "Expanded intervals keep noise out where clusters are few and cost power there; a run that shall show weak "
        f"births wants {FEW_CLUSTERS} needles or more.",
        "",
        "Not covered: noise that lasts for several checkpoints and then goes (to this rule that is a life), and slow "
        "growth, whose birth is dated where the score has passed 0.1 and lies visibly above an earlier one.",
    ]
