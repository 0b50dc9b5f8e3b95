"""Text to tokens, piece by piece, so that the place of every piece is known without searching for it.

Tokenizers see words only in their surroundings: SentencePiece puts a blank before the first word of a text, byte-level
BPE has other tokens for "The" and " The". A piece is therefore encoded behind an *anchor* that keeps to itself (the
anchor's own tokens come out unchanged in front), and what follows the anchor is the piece as it looks in mid-text.
Borders of pieces are borders of tokens; elsewhere the tokens are the tokenizer's own.

This module refuses to know what a piece means. It costs one batched call of the tokenizer per list of pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from lccp_interp.schema import Span, SpanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("a", ".", "\n", "0", "é")
"""Tried in this order until one keeps to itself in front of the piece."""


class PieceEncoder:
    """Encodes text pieces for one tokenizer (fast or not, byte-level or SentencePiece, with or without BOS)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def name(self) -> str:
        """The tokenizer's name for messages."""
        return f"{type(self.tokenizer).__name__} of {self.tokenizer.name_or_path or 'unknown origin'}"

    @cached_property
    def prefix(self) -> list[int]:
        """Special tokens that the tokenizer puts in front of every text (BOS), often none."""
        whole = self._encode(["a"], special=True)[0]
        bare = self._encode(["a"])[0]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
        return []

    def start(self, text: str) -> list[int]:
        """Tokens of `text` at the beginning of a document, without special tokens."""
        return self._encode([text])[0]

    def middle(self, pieces: Sequence[str], *, after: str | None = None) -> list[list[int]]:
        """Tokens of each piece as it stands in mid-text.

        Args:
            pieces: texts; an empty one has no tokens.
            after: what stands before the piece, if that is known and short (a line break); tried as first anchor.

        Raises:
            SpanError: no anchor keeps to itself before a piece, so its tokens have no border of their own; or the
                piece has no tokens at all.
        """
        anchors = ANCHORS if after is None else (after, *(a for a in ANCHORS if a != after))
        done: dict[int, list[int]] = {index: [] for index, piece in enumerate(pieces) if not piece}
        dropped: set[int] = set()
        for anchor in anchors:
            open_pieces = [index for index in range(len(pieces)) if index not in done]
            if not open_pieces:
                break
            head = self._encode([anchor])[0]
            encoded = self._encode([anchor + pieces[index] for index in open_pieces])
            for index, ids in zip(open_pieces, encoded, strict=True):
                if ids[: len(head)] == head and len(ids) > len(head):
                    done[index] = ids[len(head) :]
                elif ids == head:
                    dropped.add(index)
        for index, piece in enumerate(pieces):
            if index not in done and index in dropped:
                raise SpanError(
                    f"the tokenizer ({self.name}) gives {_shown(piece)} no tokens of its own in mid-text: "
                    "it drops every character of it; write it with characters that it keeps"
                )
            if index not in done:
                raise SpanError(
                    f"the tokenizer ({self.name}) gives {_shown(piece)} no tokens of its own in mid-text "
                    f"(tried behind {', '.join(map(repr, anchors))}); rephrase it so that it begins at a word"
                )
        return [done[index] for index in range(len(pieces))]

    def check(self, ids: Sequence[int], text: str, what: str) -> None:
        """Raise unless `ids` decode to `text` (blanks at the ends aside): the proof that a span holds what it claims.

        Raises:
            SpanError: naming `what`, the text wanted and the text that the tokens give.
        """
        decoded = self.decode(ids)
        if decoded.strip() != text.strip():
            raise SpanError(
                f"{what} cannot be placed under this tokenizer ({self.name}): {_shown(text)} becomes "
                f"{_shown(decoded)} in tokens; use text that this tokenizer keeps without loss"
            )

    def inside(self, ids: Sequence[int], before: str, text: str) -> Span | None:
        """The tokens of a piece that hold characters of `text`, where it stands in the piece behind `before`.

        Told from what the piece's first tokens decode to, one more at a time, and proved by decoding the span.

        Returns:
            Positions within `ids`; a token that `text` shares with what stands beside it belongs to it. None where the
            tokens do not decode to the text, so that nobody could say.
        """
        start = 0
        end: int | None = None
        for n in range(1, len(ids) + 1):
            decoded = self.decode(ids[:n]).lstrip()
            if before.lstrip().startswith(decoded) or not decoded:
                start = n
            if decoded.startswith((before + text).lstrip()):
                end = n
                break
        if end is None or end <= start or text not in self.decode(ids[start:end]):
            return None
        return Span(start, end)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special tokens written out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        # verbose=False: a haystack longer than the model's context is meant, it is cut later.
        encoded = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
