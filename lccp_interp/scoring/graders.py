"""How a free answer is graded: pure functions from what was written and what is right to a score between 0 and 1.

The definitions are those of the benchmarks: RULER's two (arXiv 2404.06654, the repository NVIDIA/RULER) and the one of
OpenAI's MRCR (the dataset card of openai/mrcr on Hugging Face); `exact` is the strict one for short answers. Published
RULER tables show 100 times the mean of these scores. This module refuses to know items and models and imports no torch.
Cost: microseconds, but `mrcr` compares texts and takes milliseconds for an answer of a page.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Sequence

from lccp_interp.schema import LccpError

Grader = Callable[[str, Sequence[str]], float]
"""(what was written, references) -> score in 0..1."""

MRCR_HASH_CHARACTERS = 10
"""Characters that an MRCR answer must begin with; they are the first ones of its reference (openai/mrcr)."""


def string_match_all(generated: str, references: Sequence[str]) -> float:
    """Share of the references that stand somewhere in what was written, whatever the case of letters.

    RULER's metric for all tasks but question answering, there times 100. A reference given twice counts twice.

    Args:
        generated: what the model wrote.
        references: at least one text.

    Returns:
        0..1.

    Raises:
        LccpError: no references, or one text instead of a list of them.

    Example:
        >>> string_match_all("They are 481 and 92.", ["481", "92", "7"])
        0.6666666666666666
    """
    return sum(_contained(generated, references)) / len(references)


def string_match_part(generated: str, references: Sequence[str]) -> float:
    """1 if any of the references stands somewhere in what was written, whatever the case of letters, else 0.

    RULER's metric for question answering, there times 100: the references are wordings of one answer.

    Args:
        generated: what the model wrote.
        references: at least one text.

    Returns:
        0 or 1.

    Raises:
        LccpError: no references, or one text instead of a list of them.

    Example:
        >>> string_match_part("It was founded in OSLO, I think.", ["Oslo", "Kristiania"])
        1.0
    """
    return float(any(_contained(generated, references)))


def mrcr(generated: str, references: Sequence[str]) -> float:
    """How much of the answer was written, if what was written begins with the hash that was asked for; else 0.

    The ratio of `difflib.SequenceMatcher(None, written, answer)`, in this order and with its default `autojunk`, both
    without the hash: what OpenAI's dataset card for MRCR publishes (openai/mrcr). There the hash is an argument of its
    own; here it is the reference's first `MRCR_HASH_CHARACTERS` characters, for a right answer is hash + text. Blanks
    in front of what was written are dropped first, which the card does not do: a base model's answer begins with one.

    Args:
        generated: what the model wrote.
        references: the right answer, hash in front; of several the best counts.

    Returns:
        0..1.

    Raises:
        LccpError: no references, one text instead of a list of them, or a reference shorter than its hash.

    Example:
        >>> mrcr("aYooSG8CQgOde to tapirs", ["aYooSG8CQgOde to tapirs"])
        1.0
        >>> mrcr("Ode to tapirs", ["aYooSG8CQgOde to tapirs"])
        0.0
    """
    return max(_mrcr(generated.lstrip(), reference) for reference in _checked(references))


def exact(generated: str, references: Sequence[str]) -> float:
    """1 if what was written is one of the references, else 0.

    Compared are texts in Unicode's composed form (NFC), case-folded, with single blanks for every run of white space,
    none at the ends, and without one full stop at the end. Articles and other punctuation count.

    Args:
        generated: what the model wrote.
        references: at least one text.

    Returns:
        0 or 1.

    Raises:
        LccpError: no references, or one text instead of a list of them.

    Example:
        >>> exact(" University of  Oslo.", ["university of Oslo"]), exact("in Oslo", ["Oslo"])
        (1.0, 0.0)
    """
    return float(_normal(generated) in {_normal(reference) for reference in _checked(references)})


GRADERS: dict[str, Grader] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "mrcr": mrcr,
    "exact": exact,
}
"""The graders by the names that items carry."""


def _contained(generated: str, references: Sequence[str]) -> list[bool]:
    written = generated.lower()
    return [reference.lower() in written for reference in _checked(references)]


def _mrcr(generated: str, reference: str) -> float:
    if len(reference) < MRCR_HASH_CHARACTERS:
        raise LccpError(
            f"an MRCR answer begins with a hash of {MRCR_HASH_CHARACTERS} characters, got {reference!r}; "
            "give the hash and the text as one reference"
        )
    expected_hash = reference[:MRCR_HASH_CHARACTERS]
    if not generated.startswith(expected_hash):
        return 0.0
    written, answer = generated.removeprefix(expected_hash), reference.removeprefix(expected_hash)
    return difflib.SequenceMatcher(None, written, answer).ratio()


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).removesuffix(".").rstrip()


def _checked(references: Sequence[str]) -> Sequence[str]:
    # A text is a sequence of texts to Python, and every one of its letters would count as a reference.
    if isinstance(references, str) or not references:
        raise LccpError(f"a grader needs a list of at least one reference, got {references!r}; write ['Oslo']")
    return references
