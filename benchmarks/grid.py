"""The grid of 20 lengths x 10 depths x 3 needles: sharing prefixes against running every case by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing

TITLE = "Sharing prefixes over a grid, on a CPU"
TRAJECTORY = Path(__file__).resolve().parents[1] / "data" / "trajectory"
CHECKPOINT = sorted(path for path in TRAJECTORY.iterdir() if path.is_dir())[-1]
"""The last checkpoint of the bundled trajectory: it copies, so equal scores mean something."""

LENGTHS = tuple(range(100, 2001, 100))
N_DEPTHS, N_NEEDLES = 10, 3
ROUNDS = 5
ONE_BY_ONE = {"sharing": "off", "batch_tokens": 1}
WAYS: dict[str, dict[str, Any]] = {"naive": ONE_BY_ONE, "shared": {"sharing": "on"}}


def build(tokenizer: Any, lengths: Sequence[int]) -> list[Any]:
    """The cases: the same text and the same needles at every length and depth."""
    from lccp_interp.organism import language
    from lccp_interp.tasks.niah import NiahGrid, build_cases

    needles = tuple(language.needles(N_NEEDLES, seed=0))
    text = language.haystack(2 * max(lengths), seed=0, avoid=needles)
    depths = tuple(100 * step / (N_DEPTHS - 1) for step in range(N_DEPTHS))
    return build_cases(NiahGrid(lengths=tuple(lengths), depths=depths, needles=needles, haystack=text), tokenizer)


def measure(say: Callable[[str], Any], *, quick: bool = False) -> dict[str, Any]:
    """One record: tokens and seconds both ways, and by how much the scores differ."""
    import numpy as np

    from lccp_interp.capture.model import load_model
    from lccp_interp.scoring.engine import score_cases
    from lccp_interp.scoring.metrics import select_metrics
    from lccp_interp.sweep import DEFAULT_METRICS
    from lccp_interp.tasks.prefixes import tokens_run, walk

    model = load_model(CHECKPOINT, device="cpu")
    lengths = LENGTHS[:2] if quick else LENGTHS
    cases = build(model.tokenizer, lengths)
    visits = walk(cases)
    results: dict[str, Any] = {}
    metrics = select_metrics(DEFAULT_METRICS)

    def score(way: str) -> None:
        results[way] = score_cases(model, cases, metrics, **WAYS[way])

    def clock(way: str) -> Callable[[], float]:
        return lambda: timing.seconds(lambda: score(way))

    score_cases(model, cases[:4], metrics)
    rounds = timing.interleave({way: clock(way) for way in WAYS}, 2 if quick else ROUNDS)
    n_naive, n_shared = sum(visit.fed for visit in visits), tokens_run(visits)
    pairs = list(zip(results["naive"], results["shared"], strict=True))
    record = {
        "checkpoint": CHECKPOINT.name,
        "cases": len(cases),
        "lengths": [min(lengths), max(lengths), len(lengths)],
        "depths": N_DEPTHS,
        "needles": N_NEEDLES,
        "rounds": len(rounds),
        "naive_tokens": n_naive,
        "shared_tokens": n_shared,
        "token_ratio": n_shared / n_naive,
        "naive_s": timing.median(rounds, "naive"),
        "shared_s": timing.median(rounds, "shared"),
        "time_ratio": timing.ratio(rounds, "shared", "naive"),
        "largest_score_difference": {
            metric: max(float(np.abs(one.scores[metric] - other.scores[metric]).max()) for one, other in pairs)
            for metric in metrics
        },
        "other_answers": sum(one.greedy_ids != other.greedy_ids for one, other in pairs),
        "highest_score": max(float(one.scores["retrieval"].max()) for one, _ in pairs),
    }
    say(f"  {record}")
    return record


def table(record: dict[str, Any]) -> list[str]:
    """The record as Markdown."""
    low, high, n_lengths = record["lengths"]
    worst = record["largest_score_difference"]
    differences = ", ".join(f"{metric} {value:.1g}" for metric, value in worst.items())
    return [
        f"{n_lengths} lengths ({low} to {high} tokens) x {record['depths']} depths x {record['needles']} needles = "
        f"{record['cases']} cases in one text, scored by the bundled checkpoint `{record['checkpoint']}`, case by case "
        "and along the tree of their common beginnings. Time ratio: median and range of "
        f"{record['rounds']} rounds in turn. Targets: 0.55 of the tokens, 0.60 of the time, the same scores.",
        "",
        "| | one by one | shared | ratio |",
        "|---|---:|---:|---:|",
        f"| tokens run | {record['naive_tokens']:,} | {record['shared_tokens']:,} | **{record['token_ratio']:.3f}** |",
        f"| seconds | {record['naive_s']:.1f} | {record['shared_s']:.1f} | {timing.spread(record['time_ratio'])} |",
        "",
        f"Largest difference of any head's score on any case: {differences}. Greedy answers that differ: "
        f"{record['other_answers']} of {record['cases']}.",
    ]
