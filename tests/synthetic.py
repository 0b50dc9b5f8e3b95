"""A run folder made from numbers instead of a model: planted births and deaths, answers that get surer.

Four pretraining checkpoints and twelve of a second stage; 4 layers x 8 heads; three lengths x five depths x eight
needles. `PLANTED` says which head does what; every other head is noise around 0.01.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lccp_interp.schema import Case, CaseResult, Checkpoint, Span
from lccp_interp.store import Run, RunWriter, result_frames

LENGTHS = (256, 1024, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
N_LAYERS, N_HEADS = 4, 8
PRETRAIN_TOKENS = (500_000, 1_500_000, 2_500_000, 3_600_000)
LCCP_TOKENS = tuple(3_600_000 + 100_000 * step for step in range(1, 13))
METRICS = ("retrieval", "wu", "copy", "needle_mass")

# (layer, head) -> score by number of the checkpoint, 0..15; the base checkpoint is number 3.
PLANTED: dict[tuple[int, int], Callable[[int], float]] = {
    (2, 1): lambda i: 0.0 if i < 2 else 0.75,  # born in pretraining, stays
    (3, 4): lambda i: 0.0 if i < 3 else min(0.9, 0.3 + 0.06 * (i - 3)),  # born at the base, grows
    (1, 6): lambda i: 0.0 if i < 7 else 0.45,  # born in the last stage (number 7)
    (3, 0): lambda i: 0.0 if i < 10 else 0.3,  # born in the last stage (number 10)
    (0, 3): lambda i: 0.4 if i < 9 else 0.01,  # alive from the start, dies at number 9
    (2, 5): lambda i: 0.35 if i < 5 or i >= 12 else 0.0,  # alive, dies at 5, born again at 12
    (1, 2): lambda i: 0.09 + 0.02 * (i % 2),  # hovers around the threshold: no event
}


def checkpoints(names: Sequence[str] | None = None) -> list[Checkpoint]:
    """The sixteen checkpoints, optionally under other names."""
    tokens = [*PRETRAIN_TOKENS, *LCCP_TOKENS]
    listed = []
    for i, seen in enumerate(tokens):
        stage = "pretrain" if i < len(PRETRAIN_TOKENS) else "lccp"
        stage_tokens = seen if stage == "pretrain" else seen - PRETRAIN_TOKENS[-1]
        name = names[i] if names else f"{stage}-{stage_tokens / 1e6:.1f}M"
        listed.append(Checkpoint(name, Path("somewhere") / str(i), seen, stage, stage_tokens, f"{i:064x}"))
    return listed


def cases(lengths: Sequence[int] = LENGTHS, n_needles: int = 8) -> list[Case]:
    """One case per length, depth and needle; each needle has a haystack of its own."""
    return [
        Case(
            case_id=f"niah-{length}-d{100 * depth:g}-s{needle}-{needle}",
            task="niah",
            length=length,
            depth_fraction=depth,
            needle_id=f"s{needle}",
            haystack_id=f"h{needle}",
            sample=needle,
            seed=0,
            prompt_ids=tuple(range(8)),
            answer_ids=(1, 2, 3),
            needle=Span(1, 5),
            source=Span(2, 5),
        )
        for length in lengths
        for depth in DEPTHS
        for needle in range(n_needles)
    ]


def results(i: int, batch: Sequence[Case], rng: np.random.Generator) -> list[CaseResult]:
    """What checkpoint number `i` did on `batch`: longer and deeper in the middle is harder, later is easier."""
    made = []
    for case in batch:
        scores = rng.uniform(0, 0.02, (N_LAYERS, N_HEADS)).astype(np.float32)
        for (layer, head), level in PLANTED.items():
            scores[layer, head] = np.clip(level(i) + rng.normal(0, 0.05) * (level(i) > 0.02), 0, 1)
        hardness = np.log2(case.length / 128) / 5 * (1 + 0.5 * (1 - abs(2 * case.depth_fraction - 1)))
        loss = 2.5 * hardness * np.exp(-i / 5) + rng.exponential(0.02, 3)
        right = loss.mean() < 0.6
        made.append(
            CaseResult(
                case.case_id,
                tuple(range(N_LAYERS)),
                dict.fromkeys(METRICS, scores),
                loss.astype(np.float32),
                case.answer_ids if right else (0, 2, 3),
            )
        )
    return made


def write_run(
    path: Path,
    *,
    names: Sequence[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    n_needles: int = 8,
    n_shards: int = 2,
    reverse: bool = False,
    only: Sequence[int] | None = None,
    change: Callable[[int, CaseResult], CaseResult] = lambda i, result: result,
) -> Run:
    """Write the run. `n_shards` and `reverse` change how it lies on disk, `change` each result, nothing the truth."""
    batch = cases(lengths, n_needles)
    trajectory = checkpoints(names)
    writer = RunWriter(path, {"seed": 0, "lengths": list(lengths), "mode": "teacher_forced"}, batch)
    writer.add_checkpoints(trajectory)
    answers = {case.case_id: case.answer_ids for case in batch}
    for i, checkpoint in enumerate(trajectory):
        if only is not None and i not in only:
            continue
        found = [change(i, result) for result in results(i, batch, np.random.default_rng(i))]
        size = -(-len(found) // n_shards)
        for shard in range(n_shards):
            part = found[shard * size : (shard + 1) * size]
            scores, outcomes = result_frames(checkpoint, "teacher_forced", part, answers)
            if reverse:
                scores, outcomes = scores.reverse(), outcomes.reverse()
            writer.append(checkpoint.name, shard, scores=scores, outcomes=outcomes)
    return Run.open(path)
