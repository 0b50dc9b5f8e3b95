"""Haystacks: long filler text, in tokens, that can be opened at any sentence.

A `Haystack` cuts its text into sentences once and encodes each of them as it looks at the beginning of a document, in
mid-text and at the beginning of a line, so that a context of an exact number of tokens with a needle at a sentence
boundary is a matter of joining lists. It refuses to know needles and questions. Cost: one tokenizer call over
the whole text.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lccp_interp.schema import LccpError
from lccp_interp.tasks.pieces import PieceEncoder

# A sentence ends after . ! ? (and closing quotes) before white space, after the full-width marks, or with a paragraph.
_SENTENCE_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|(?<=\S)(?=[^\S\n]*\n\s*\n)""")
RUN_ON_CHARACTERS = 400
"""A longer stretch without a sentence end (code, tables) is cut at white space, or where it must be."""


def sentences(text: str) -> list[str]:
    """Cut `text` into sentences; joined they are the text again, white space leads the sentence it precedes.

    Example:
        >>> sentences("It rained. Mara slept! Why?")
        ['It rained.', ' Mara slept!', ' Why?']
    """
    cuts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(cuts) if text[start:end].strip()]
    parts: list[str] = []
    for piece in pieces:
        while len(piece) > RUN_ON_CHARACTERS:
            blanks = [match.start() for match in re.finditer(r"\s+", piece[1:RUN_ON_CHARACTERS])]
            cut = 1 + blanks[-1] if blanks else RUN_ON_CHARACTERS
            parts.append(piece[:cut])
            piece = piece[cut:]
        parts.append(piece)
    return parts


class HaystackText(str):
    """Text that remembers which files it was read from; everywhere else it is a `str` like any other.

    Attributes:
        files: (index of the first character, file) of every file, in order.
    """

    files: tuple[tuple[int, Path], ...]

    @classmethod
    def joined(cls, texts: Mapping[Path, str]) -> HaystackText:
        """The texts of several files, an empty line between them."""
        text = cls("\n\n".join(texts.values()))
        starts = itertools.accumulate((len(part) + 2 for part in texts.values()), initial=0)
        text.files = tuple(zip(starts, texts, strict=False))
        return text


def place_in(text: str, index: int) -> str:
    """Where the character at `index` stands, for messages: with its file if the text knows it.

    Example:
        >>> place_in("some text", 5)
        'character 5'
    """
    if not isinstance(text, HaystackText):
        return f"character {index}"
    start, file = max(entry for entry in text.files if entry[0] <= index)
    return f"{file}, character {index - start}"


def read_haystack(path: Path) -> HaystackText:
    """The text of a file, or of all *.txt and *.md files of a folder in the order of their names.

    Raises:
        LccpError: nothing there, no text in it, or bytes that are not UTF-8 (file and position).
    """
    if path.is_dir():
        files = sorted(file for pattern in ("*.txt", "*.md") for file in path.glob(pattern) if file.is_file())
    elif path.is_file():
        files = [path]
    else:
        raise LccpError(f"no haystack at {path}; give a text file or a folder of *.txt files")
    texts = {}
    for file in files:
        try:
            texts[file] = file.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise LccpError(
                f"haystack {file} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv"
            ) from error
    texts = {file: text for file, text in texts.items() if text}
    if not texts:
        raise LccpError(
            f"haystack {path} is empty ({len(files)} files read); give a text file or a folder of *.txt files"
        )
    return HaystackText.joined(texts)


class Haystack:
    """Filler text in tokens of one tokenizer, cut at sentences.

    Attributes:
        haystack_id: name of the text, a hash of its characters.
        n_tokens: how many tokens it has in mid-text form.
    """

    def __init__(self, text: str, encoder: PieceEncoder) -> None:
        self.haystack_id = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        self._encoder = encoder
        self._sentences = sentences(text)
        if not self._sentences:
            raise LccpError("the haystack is empty; give a text file or a folder of *.txt files")
        self._middle = encoder.middle(self._sentences)
        self._ends = list(itertools.accumulate(len(ids) for ids in self._middle))

    @property
    def n_tokens(self) -> int:
        """Tokens of the whole text."""
        return self._ends[-1]

    @property
    def longest_sentence(self) -> int:
        """Tokens of the longest sentence, and one: what reading may go beyond a count to the next sentence's begin."""
        return 1 + max(map(len, self._middle))

    def starts(self, n_context: int) -> int:
        """How many first sentences leave at least `n_context` tokens behind them.

        Raises:
            LccpError: the haystack has fewer tokens than that.
        """
        if self.n_tokens < n_context:
            raise LccpError(
                f"the haystack has {self.n_tokens} tokens, {n_context} are needed; "
                "give a longer text (--haystack) or ask for shorter prompts"
            )
        return bisect.bisect_right(self._ends, self.n_tokens - n_context) + 1

    def split(
        self,
        n_context: int,
        depth_fraction: float,
        *,
        start: int = 0,
        opens_document: bool = True,
        own_line: bool = True,
    ) -> tuple[list[int], list[int]]:
        """A context of exactly `n_context` tokens, opened at a sentence boundary.

        Args:
            n_context: tokens of both parts together, including the line break that opens the second.
            depth_fraction: 0..1; the first part ends at the sentence boundary nearest below that share of the
                context. At 1 it is the whole context, cut wherever the count falls; at 0 it is empty.
            start: index of the sentence to begin with (see `starts`).
            opens_document: whether nothing stands before the context (no text of the prompt's template).
            own_line: whether what is put between the parts stands on a line of its own.

        Returns:
            (before, after): token ids; `after` begins with a line break, or without `own_line` with the white space
            that stands before its sentence. An empty part has no tokens at all.

        Raises:
            LccpError: the haystack is too short from that sentence on.
        """
        if depth_fraction >= 1:
            return self._from(start, n_context, self._opening(start, opens_document)), []
        target = depth_fraction * n_context
        # From the second sentence on, mid-text lengths are the exact ones; only the first is encoded as a beginning.
        first = self._opening(start, opens_document)
        offset = self._ends[start] - len(first)
        n_sentences = 0
        if target >= len(first):
            n_sentences = bisect.bisect_right(self._ends, target + offset) - start
        before = [] if n_sentences == 0 else first + self._join(start + 1, start + n_sentences)
        after = start + n_sentences
        if after >= len(self._sentences):
            raise LccpError(
                "the haystack ends before the tokens that are still needed; give a longer text (--haystack)"
            )
        return before, self._from(after, n_context - len(before), self._reopening(after, own_line))

    def sentence_after(self, start: int, n_tokens: int) -> int:
        """Index of the first sentence that a text of `n_tokens` tokens, read from sentence `start` on, leaves whole."""
        if n_tokens == 0:
            return start
        # At the beginning of a document or a line the first sentence may have a token less, and the text reach further.
        shortest = min(len(self._opening(start, opens)) for opens in (True, False))
        return bisect.bisect_left(self._ends, self._ends[start] - shortest + n_tokens) + 1

    def _reopening(self, start: int, own_line: bool) -> list[int]:
        """Sentence `start` as it looks behind what was put between it and the sentence before."""
        if own_line:
            return self._encoder.middle(["\n"])[0] + self._opening(start, False)
        sentence = self._sentences[start]
        return self._middle[start] if sentence[:1].isspace() else self._encoder.middle([f" {sentence}"])[0]

    def _opening(self, start: int, opens_document: bool) -> list[int]:
        """Sentence `start` as it looks at the beginning of the document, or of a line."""
        sentence = self._sentences[start].lstrip()
        return self._encoder.start(sentence) if opens_document else self._encoder.middle([sentence], after="\n")[0]

    def _join(self, start: int, end: int) -> list[int]:
        return list(itertools.chain.from_iterable(self._middle[start:end]))

    def _from(self, start: int, n_tokens: int, opening: list[int]) -> list[int]:
        """Exactly `n_tokens` tokens: `opening`, which stands for sentence `start`, and the sentences after it."""
        end = bisect.bisect_left(self._ends, self._ends[start] + n_tokens - len(opening)) + 1
        ids = opening + self._join(start + 1, end)
        if len(ids) < n_tokens:
            raise LccpError(
                f"the haystack has {self.n_tokens} tokens, {n_tokens - len(ids)} more are needed; "
                "give a longer text (--haystack) or ask for shorter prompts"
            )
        return ids[:n_tokens]


def pick_starts(haystack: Haystack, n_context: int, seeds: Sequence[int]) -> list[int]:
    """First sentences of the samples, all different: the first reads from the top, the others from seeded places.

    Raises:
        LccpError: the haystack has fewer places to begin than there are samples.
    """
    # The last possible start is left out: at the beginning of a document its first sentence may have a token less.
    n_places = max(1, haystack.starts(n_context) - 1)
    if n_places < len(seeds):
        raise LccpError(
            f"the haystack ({haystack.n_tokens} tokens) has {n_places} places from which {n_context} tokens can be "
            f"read, {len(seeds)} samples are asked for; give a longer text (--haystack) or fewer --samples"
        )
    return [0, *random.Random(str(seeds)).sample(range(1, n_places), len(seeds) - 1)]
