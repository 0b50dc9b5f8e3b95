"""Decoys: spans of a case's own prompt, as long as its source, in which there is nothing to retrieve.

What a head scores on them is what it scores by chance in this very text: the null of its retrieval score. This module
draws spans; it refuses to know scores. Cost: a few random numbers per case.
"""

from __future__ import annotations

import random

from lccp_interp.schema import Case, Span

N_DECOYS = 2
"""Decoys per case. Cases are many, and it is their mean that is compared."""


def decoy_spans(
    case: Case, n: int = N_DECOYS, *, length: int | None = None, before: int | None = None
) -> tuple[Span, ...]:
    """Spans of the source's length within the prompt that do not touch the needle; the same ones for the same case.

    Args:
        case: whose prompt.
        n: how many, drawn with replacement.
        length: tokens of each, if not the source's.
        before: position that they must end at or before; None for the prompt's end.

    Returns:
        `n` spans, or none where the prompt has no room for any beside its needle.

    Example:
        >>> case = Case("c1", "niah", 9, 0.5, "n", "h", 0, 0, (7,) * 8, (1, 2), Span(0, 5), Span(2, 4))
        >>> [(span.start, span.end) for span in decoy_spans(case, 3)]
        [(6, 8), (5, 7), (6, 8)]
    """
    length = len(case.source) if length is None else length
    end = len(case.prompt_ids) if before is None else before
    starts = [*range(0, case.needle.start - length + 1), *range(case.needle.end, end - length + 1)]
    if not starts:
        return ()
    draw = random.Random(f"{case.seed} {case.case_id}")
    return tuple(Span(start, start + length) for start in draw.choices(starts, k=n))
