"""Twins: needles and answers that stand in the haystack already, outside the needle that was put there.

A second copy of a needle makes its span a lie: a head may retrieve from the twin, rightly, and get no credit. So a
haystack that holds a needle is refused, and answers that stand in it on their own are counted and told. Blanks, line
breaks and capitals make no difference. This module refuses to know tokens. Cost: one pass over the text to fold it, and
a search at the speed of `str.find` for each needle and answer (10 MB of text: half a second).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from lccp_interp.schema import LccpError, Needle
from lccp_interp.tasks.haystack import place_in

SHOWN = 4
"""Needles that a message names before it goes on to count them."""


@dataclass(frozen=True)
class Twins:
    """How often a phrase stands in a text, and where it does first (index of the character that begins the word)."""

    n: int
    first: int


class FoldedText:
    """A text without differences of case and white space, to search in.

    Example:
        >>> FoldedText("It rained.  The\\nCODE is 7.").twins("the code")
        Twins(n=1, first=12)
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._folded = _folded(text)

    def twins(self, phrase: str) -> Twins | None:
        """Where `phrase` stands as words of its own; None where it does not."""
        wanted = _folded(phrase)
        n, first = 0, -1
        at = self._folded.find(wanted)
        while at >= 0 and wanted:
            if _is_apart(self._folded, at, at + len(wanted)):
                n, first = n + 1, at if first < 0 else first
            at = self._folded.find(wanted, at + 1)
        return Twins(n, self._unfolded(first)) if n else None

    def _unfolded(self, index: int) -> int:
        """Folding keeps the words and their number, so a place is found again by counting them."""
        words = re.finditer(r"\S+", self._text)
        return next(islice(words, self._folded.count(" ", 0, index), None)).start()


def refuse_twins(text: str, needles: Mapping[str, Needle]) -> None:
    """Refuse a haystack in which a needle stands already; warn where an answer does.

    Args:
        text: the haystack, without the needles that are to be put in.
        needles: by their names in messages.

    Raises:
        LccpError: a needle's text (without its last full stop) is in the haystack; how often, and where first.

    Warns:
        UserWarning: answers that are in the haystack, how often each, and where first.
    """
    folded = FoldedText(text)
    wholes: dict[str, Twins] = {}
    answers: dict[str, Twins] = {}
    for name, needle in needles.items():
        whole = _bare(needle.needle)
        if found := folded.twins(whole):
            wholes[f"{name} ({_shown(whole)})"] = found
        answer = _bare(needle.answer)
        if answer != whole and (found := folded.twins(answer)):
            answers[f"{name} ({_shown(answer)})"] = found
    if wholes:
        raise LccpError(
            f"the haystack holds needles itself: {_listed(wholes, text)}; a head that retrieves from there would get "
            "no credit, so take them out of the haystack or ask for other needles"
        )
    if answers:
        warnings.warn(
            f"the haystack holds answers itself: {_listed(answers, text)}; a head that copies from there gets no "
            "credit, so scores may come out too low",
            stacklevel=2,
        )


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _bare(text: str) -> str:
    return text.strip().rstrip(".!?。！？").rstrip() or text.strip()


def _is_apart(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is not cut out of a longer word or number, where the script has words."""
    cut_before = start > 0 and _joins(text[start - 1]) and _joins(text[start])
    return not cut_before and not (end < len(text) and _joins(text[end - 1]) and _joins(text[end]))


def _joins(character: str) -> bool:
    # Scripts without blanks between words have neither case nor digits of this kind.
    return character.isdigit() or character.lower() != character.upper()


def _listed(found: Mapping[str, Twins], text: str) -> str:
    parts = [
        f"{name} {twins.n} time{'s' if twins.n > 1 else ''} (first at {place_in(text, twins.first)})"
        for name, twins in islice(found.items(), SHOWN)
    ]
    return ", ".join(parts) + (f", and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 50 else f"{text[:47]}...")
