"""The prefix tree of a set of cases: in which order to run them so that every shared beginning is computed once.

The prompts of a grid begin alike: the same haystack up to the needle, the same context up to the question. Sorted by
their tokens and run one after another, each needs only what comes after its common prefix with the one before; all in
all every edge of the tree of prompts is run once. This module counts and orders tokens; it refuses to know models.
Cost: one sort and one comparison of neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lccp_interp.schema import Case


@dataclass(frozen=True)
class Visit:
    """One case on the walk through the tree.

    Attributes:
        index: of the case in the sequence that was given.
        kept: tokens at its beginning that the case visited before it has left in the cache.
        fed: tokens a model is fed for it when it runs alone, all but the answer's last; `fed - kept` are run.
    """

    index: int
    kept: int
    fed: int


def walk(cases: Sequence[Case]) -> list[Visit]:
    """The order in which to run `cases`, and how much of each is in the cache by then.

    The token that predicts the answer's first one is always run again: the copy events' queries have to pass.

    Example:
        >>> from lccp_interp.schema import Case, Span
        >>> def case(prompt):
        ...     return Case("c", "niah", len(prompt) + 1, 0.0, "n", "h", 0, 0, prompt, (9,), Span(0, 1), Span(0, 1))
        >>> [(v.index, v.kept, v.fed) for v in walk([case((1, 2, 5)), case((3, 4)), case((1, 2, 4, 6))])]
        [(2, 0, 4), (0, 2, 3), (1, 0, 2)]
    """
    return walk_tokens(
        [case.prompt_ids + case.answer_ids[:-1] for case in cases], [len(case.prompt_ids) for case in cases]
    )


def walk_tokens(sequences: Sequence[Sequence[int]], n_prompt: Sequence[int]) -> list[Visit]:
    """`walk` for plain sequences of tokens; the last of the first `n_prompt` tokens of each is always run.

    Example:
        >>> [(v.index, v.kept) for v in walk_tokens([(1, 2, 5), (1, 2, 4, 6)], [3, 4])]
        [(1, 0), (0, 2)]
    """
    fed = [np.asarray(ids, dtype=np.int32) for ids in sequences]
    # Big-endian bytes compare as the numbers do, and far faster than lists of them.
    order = sorted(range(len(fed)), key=lambda index: fed[index].astype(">i4").tobytes())
    visits = []
    before = np.empty(0, dtype=np.int32)
    for index in order:
        kept = min(common_prefix(before, fed[index]), n_prompt[index] - 1)
        visits.append(Visit(index=index, kept=kept, fed=len(fed[index])))
        before = fed[index]
    return visits


def tokens_run(visits: Sequence[Visit]) -> int:
    """Tokens that the walk runs, of the `sum(visit.fed for visit in visits)` that case by case would be run.

    Example:
        >>> tokens_run([Visit(0, 0, 100), Visit(1, 60, 100)])
        140
    """
    return sum(visit.fed - visit.kept for visit in visits)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginnings.

    Example:
        >>> common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
        2
    """
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n
