"""What every RULER-style subset is given, and what it gives back: a `Setting` and a `Sample`.

A subset is a function from `Setting` (length, material, split, a random generator of its own, text to hide things in)
to `Sample` (a prompt of any size, with what to answer). The two splits are disjoint halves: of a fixed list every
second entry (`Setting.half`), of what is made up on the spot what a hash of it says (`Setting.drawn`). This module
refuses to know any subset. It costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from lccp_interp.organism import language
from lccp_interp.tasks.filler import compounds
from lccp_interp.tasks.items import Piece, derived_seed
from lccp_interp.tasks.ruler.questions import UserQuestion

SPLITS = ("eval", "train")

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """For one item.

    Attributes:
        subset: its name.
        length: tokens of prompt and answer budget together.
        material: `english` or `organism`.
        split: `eval` or `train`.
        rng: for this item alone.
        text: sentences to hide needles in, without blanks around them.
        start: which of them comes first.
        index: of the sample among those of its subset and length.
        questions: of the user's, for `qa`; none for generated documents.
    """

    subset: str
    length: int
    material: str
    split: str
    rng: Random
    text: Sequence[str]
    start: int = 0
    index: int = 0
    questions: Sequence[UserQuestion] = ()

    @property
    def organism(self) -> bool:
        """Whether to write in the bundled model's language."""
        return self.material == "organism"

    @property
    def stride(self) -> slice:
        """Every second entry of a list, those of this split."""
        return slice(SPLITS.index(self.split), None, 2)

    def half(self, pool: Sequence[T]) -> Sequence[T]:
        """The entries of `pool` that belong to this split."""
        return pool[self.stride]

    def drawn(self, draw: Callable[[], str]) -> str:
        """The first of the texts that `draw` gives that belongs to this split; half of all texts do."""
        while True:
            text = draw()
            if SPLITS[derived_seed("split", text) % 2] == self.split:
                return text

    def different(self, draw: Callable[[], str], n: int) -> list[str]:
        """`n` different texts of this split."""
        found: dict[str, None] = {}
        while len(found) < n:
            found[self.drawn(draw)] = None
        return list(found)

    def number(self, n_digits: int) -> str:
        """A number of so many digits; those of needles are drawn with `different` or `drawn`."""
        return str(self.rng.randint(10 ** (n_digits - 1), 10**n_digits - 1))

    def keys(self, n: int) -> list[str]:
        """`n` different keys (fewer where there are not so many): names in the organism's language, else compounds."""
        if self.organism:
            names = self.half(language.NAMES)
            return self.rng.sample(names, min(n, len(names)))
        return compounds(self.rng, n, half=self.stride)

    def sentences(self, n: int) -> list[str]:
        """`n` sentences of the text from `start` on; behind its end it begins again."""
        return [self.text[(self.start + at) % len(self.text)] for at in range(n)]


@dataclass(frozen=True)
class Sample:
    """A question whose context can have any size.

    Attributes:
        write: the user's message of size n, as `PromptWriter.fit` wants it.
        answer_prefix: what the answer goes on from.
        references: right answers.
        target: a right answer as it follows the prompt, with its leading blank.
        max_new_tokens: RULER's answer budget, or one in its place.
        at_least: smallest size that makes sense.
        grader: name of the grader.
    """

    write: Callable[[int], Sequence[Piece]]
    answer_prefix: str
    references: tuple[str, ...]
    target: str
    max_new_tokens: int
    at_least: int = 1
    grader: str = "string_match_all"


def message(
    opening: str, parts: Sequence[tuple[str, bool]], question: str, *, glue: str = " ", first: str = "\n"
) -> list[Piece]:
    """Opening, context and question as pieces.

    Args:
        opening: text in front, or nothing.
        parts: texts of the context and whether they are evidence.
        question: text behind, with the white space before it.
        glue: between two parts.
        first: between opening and context.
    """
    pieces = [Piece(opening)] if opening else []
    for at, (text, evidence) in enumerate(parts):
        before = glue if at else first if opening else ""
        pieces.append(Piece(before + text, evidence))
    pieces.append(Piece(question))
    return pieces


def hidden(
    context: Sequence[str], needles: Sequence[tuple[str, bool]], depths: Sequence[float]
) -> list[tuple[str, bool]]:
    """`context` with the needles between its parts.

    Args:
        context: texts.
        needles: texts, and whether they are evidence.
        depths: ascending, 0..1, one per needle: 0 is in front of the context, 1 behind it.

    Example:
        >>> hidden(["a", "b"], [("X", True), ("Y", False)], [0.0, 0.5])
        [('X', True), ('a', False), ('Y', False), ('b', False)]
    """
    parts: list[tuple[str, bool]] = []
    at = 0
    for needle, depth in zip(needles, depths, strict=True):
        until = int(depth * len(context))
        parts += [(text, False) for text in context[at:until]]
        parts.append(needle)
        at = until
    return parts + [(text, False) for text in context[at:]]


def cycled(pool: Sequence[T], n: int) -> list[T]:
    """The first `n` of `pool`, which begins again behind its end."""
    return [pool[at % len(pool)] for at in range(n)]


def listed(words: Sequence[str], *, last: str = "and ") -> str:
    """`a, b, and c`, as RULER's questions join their keys.

    Example:
        >>> listed(["a"]), listed(["a", "b", "c"])
        ('a', 'a, b, and c')
    """
    return ", ".join([*words[:-1], f"{last if len(words) > 1 else ''}{words[-1]}"])
