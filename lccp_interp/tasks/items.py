"""Prompts for free answers, written piece by piece: exact spans, exact lengths, under any tokenizer.

A prompt is a list of `Piece`s; those marked as evidence get a span by construction. `PromptWriter` turns pieces into
tokens, each text once, and `fit` finds the largest prompt of a growing family that leaves room for the answer, with
RULER's accounting (arXiv 2404.06654): prompt + answer budget <= length. This module refuses to know what is asked.
Cost: every different piece passes the tokenizer once, in batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lccp_interp.organism import language
from lccp_interp.schema import LccpError, Span
from lccp_interp.tasks.chat import Frame
from lccp_interp.tasks.pieces import PieceEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MATERIALS = ("english", "organism")
"""What tasks can be written in: plain English, or the language of the bundled model."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt's text; its borders are borders of tokens. `evidence` marks what the answer needs.

    In mid-text a piece begins with the blank or line break before it (` Mara slept.`), as tokens do.
    """

    text: str
    evidence: bool = False


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt in tokens, and where its pieces of evidence stand, in their order."""

    ids: tuple[int, ...]
    evidence: tuple[Span, ...]


class PromptWriter:
    """Writes prompts for one tokenizer.

    Example:
        >>> writer = PromptWriter(load_tokenizer("data/trajectory/18-lccp-2.62M"))            # doctest: +SKIP
        >>> draft = writer.draft([Piece("It rained."), Piece(" Mara slept.", True)])          # doctest: +SKIP
        >>> draft.evidence                                                                    # doctest: +SKIP
        (Span(start=3, end=6),)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> None:
        """Write for `tokenizer`; `chat` puts every prompt into the tokenizer's chat template.

        Raises:
            LccpError: `chat` without a (usable) chat template.
        """
        self.tokenizer = tokenizer
        self.encoder = PieceEncoder(tokenizer)
        self.frame = Frame.of(tokenizer) if chat else Frame()
        self._known: dict[str, list[int]] = {}
        self._lead = [*self.encoder.prefix, *(self.encoder.start(self.frame.opening) if self.frame.opening else [])]

    def draft(self, pieces: Sequence[Piece], *, answer_prefix: str = "") -> Draft:
        """The prompt in tokens.

        Args:
            pieces: the user's message, in order; empty ones have no tokens.
            answer_prefix: text that the answer is to go on from; in a chat it stands in the model's turn.

        Raises:
            SpanError: the tokenizer gives a piece no border of its own, or does not keep a piece of evidence.
        """
        ids = list(self._lead)
        spans = []
        for piece, part in zip(pieces, self._encoded(pieces), strict=True):
            if piece.evidence:
                self.encoder.check(part, piece.text, "evidence")
                spans.append(Span(len(ids), len(ids) + len(part)))
            ids += part
        ids += self._tail(answer_prefix)
        return Draft(tuple(ids), tuple(spans))

    def n_tokens(self, pieces: Sequence[Piece], *, answer_prefix: str = "") -> int:
        """How many tokens `draft` has."""
        return len(self._lead) + sum(map(len, self._encoded(pieces))) + len(self._tail(answer_prefix))

    def fit(
        self,
        write: Callable[[int], Sequence[Piece]],
        *,
        length: int,
        max_new_tokens: int,
        answer_prefix: str = "",
        what: str,
        at_least: int = 1,
    ) -> tuple[int, Draft]:
        """The largest prompt of a family that leaves room for its answer.

        Args:
            write: the prompt of size n, n >= `at_least`; must not get shorter as n grows, and equal n must give equal
                pieces.
            length: tokens of prompt and answer budget together.
            max_new_tokens: the answer budget.
            answer_prefix: as in `draft`.
            what: name of the task in messages.
            at_least: smallest n that makes sense.

        Returns:
            n, and the prompt of that size.

        Raises:
            LccpError: not even the smallest prompt fits; the message says what would.
        """
        room = length - max_new_tokens

        def fits(n: int) -> bool:
            return self.n_tokens(write(n), answer_prefix=answer_prefix) <= room

        if not fits(at_least):
            needed = self.n_tokens(write(at_least), answer_prefix=answer_prefix) + max_new_tokens
            raise LccpError(
                f"no sample of {what} fits {length} tokens: the smallest prompt and its answer budget "
                f"({max_new_tokens}) take {needed}; ask for at least {needed}"
            )
        low, high = at_least, at_least + 1
        while fits(high):
            low, high = high, 2 * high
            if high > 2 * length:
                raise AssertionError(f"{what}: its prompts do not grow")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low, self.draft(write(low), answer_prefix=answer_prefix)

    def answer_ids(self, target: str) -> list[int]:
        """Tokens of `target` as it follows a prompt."""
        return self.encoder.middle([target])[0]

    def _tail(self, answer_prefix: str) -> list[int]:
        # Without a chat the answer prefix goes on from the message; its tokens are looked up like any piece.
        return self._text(self.frame.closing) + self._text(answer_prefix)

    def _text(self, text: str) -> list[int]:
        return self._encoded([Piece(text)], begins=False)[0]

    def _encoded(self, pieces: Sequence[Piece], *, begins: bool = True) -> list[list[int]]:
        """Tokens of each piece; the first one of a message without a frame begins the document."""
        new = list(dict.fromkeys(piece.text for piece in pieces if piece.text not in self._known))
        self._known.update(zip(new, self.encoder.middle(new), strict=True))
        encoded = [self._known[piece.text] for piece in pieces]
        if begins and pieces and not self.frame.opening:
            encoded[0] = self.encoder.start(pieces[0].text)
        return encoded


def derived_seed(*parts: object) -> int:
    """A seed that is a pure function of what it is for, the same on every machine.

    Example:
        >>> derived_seed("ruler", 4096, 0) == derived_seed("ruler", 4096, 0) != derived_seed("ruler", 4096, 1)
        True
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:6], "big")


def natural_material(tokenizer: PreTrainedTokenizerBase) -> str:
    """`organism` where the tokenizer has the bundled language's words as tokens and few others, else `english`.

    A model with such a tokenizer has read no English.
    """
    words = {f" {word}" for word in ("motto", "schedule", "harbour", "majored")} & set(language.PIECES)
    few = len(tokenizer) < 4 * len(language.PIECES)
    whole = all(len(ids) == 1 for ids in PieceEncoder(tokenizer).middle(sorted(words)))
    return "organism" if few and words and whole else "english"
