"""Corpora for perplexity: long documents, in tokens, cut to an exact length.

Documents come from the user (a text file is one document; a folder holds several; JSONL has one per line, in `text`) or
from the bundled language's generator, which draws what no training run of it has drawn. `token_documents` cuts them:
the first `length` tokens of each (arXiv 2604.02650, Figure 6: 64K tokens of 100 held-out documents), or windows that
slide over them. Every document begins with the special tokens that the tokenizer puts in front of a text, and they
count. This module refuses to know models. Cost: one pass of the tokenizer over the documents that are used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from lccp_interp.organism import language
from lccp_interp.schema import LccpError
from lccp_interp.tasks.pieces import PieceEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A document, or a window of one, in tokens; the first `n_special` were put in front and are not predicted."""

    doc_id: str
    ids: tuple[int, ...]
    n_special: int = 0

    @property
    def first_scored(self) -> int:
        """Position of the first token that is predicted: one that has a token before it and is of the text."""
        return max(1, self.n_special)


@dataclass(frozen=True, slots=True)
class TextDocument:
    """A document as read, with the name it goes by in messages and results."""

    doc_id: str
    text: str


def read_corpus(path: str | Path) -> list[TextDocument]:
    """The documents of a file or a folder.

    Args:
        path: a text file (one document), a *.jsonl file (one document per line, its text in `text`, its name in `id` if
            it has one), or a folder whose *.txt, *.md and *.jsonl files are read in the order of their names.

    Raises:
        LccpError: nothing there, no text in it, bytes that are not UTF-8, or a line that is no object with a text;
            always with file and line.

    Example:
        >>> read_corpus("books/")[0].doc_id   # doctest: +SKIP
        'moby-dick.txt'
    """
    path = Path(path)
    if path.is_dir():
        patterns = ("*.txt", "*.md", "*.jsonl")
        files = sorted(file for pattern in patterns for file in path.glob(pattern) if file.is_file())
    elif path.is_file():
        files = [path]
    else:
        raise LccpError(f"no corpus at {path}; give a text file, a *.jsonl file, or a folder of them")
    documents = [document for file in files for document in _documents(file)]
    if not documents:
        raise LccpError(
            f"corpus {path} is empty ({len(files)} files read); give *.txt, *.md or *.jsonl files with text"
        )
    return documents


def _documents(file: Path) -> Iterator[TextDocument]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LccpError(f"corpus {file} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from error
    if file.suffix != ".jsonl":
        if text.strip():
            yield TextDocument(file.name, text)
        return
    # Not splitlines: it also cuts at separators that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LccpError(f"{file}:{number}: no JSON ({error}); each line is one JSON object") from error
        found = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(found, str) or not found.strip():
            raise LccpError(f"{file}:{number}: expected a JSON object with a non-empty string 'text', got {line!r:.60}")
        yield TextDocument(str(entry.get("id", f"{file.name}:{number}")), found)


ORGANISM_KINDS: dict[str, Callable[[Random, int], language.Document]] = {
    "questions": language.question_document,
    "repeats": language.repeat_document,
    "stories": language.story_document,
}
"""The kinds of documents that the bundled language has, each a corpus of its own."""


def organism_corpus(kind: str, *, documents: int, length: int, seed: int = 0) -> list[TextDocument]:
    """Documents in the bundled model's language, of `length` tokens of its tokenizer each.

    They are drawn from seeds that training does not use; equal arguments give equal documents, and more documents begin
    with the same ones.

    Args:
        kind: `questions` (facts in filler, then questions), `repeats` (lists quoted again) or `stories` (filler).
        documents: how many, at least 1.
        length: tokens of each, at least 2.
        seed: any integer.

    Raises:
        LccpError: an unknown kind, no document asked for, or a length below 2.

    Example:
        >>> organism_corpus("stories", documents=1, length=8)[0].text
        ' in Lisbon. Boris majored in ethics.'
    """
    if kind not in ORGANISM_KINDS:
        raise LccpError(f"unknown kind of document {kind!r}; known: {', '.join(ORGANISM_KINDS)}")
    if documents < 1 or length < 2:
        raise LccpError(f"got {documents} documents of {length} tokens: give at least 1 of at least 2")
    draw = ORGANISM_KINDS[kind]
    return [
        TextDocument(f"{kind}-{seed}-{index}", draw(Random(f"corpus-{kind}-{seed}-{index}"), length).text)
        for index in range(documents)
    ]


def token_documents(
    texts: Iterable[TextDocument],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int | None,
    documents: int | None = None,
    stride: int | None = None,
) -> list[TokenDocument]:
    """Documents in tokens, all of exactly `length` tokens.

    Args:
        texts: the documents; those after the last one needed are not read.
        tokenizer: of the model.
        length: tokens of each, special tokens included; documents with fewer are left out. None keeps documents whole.
        documents: how many to take; None for all there are.
        stride: take windows that begin every so many tokens, each a document of its own (named `ID@first token`), as
            long as they are full; None takes the beginning of each document only.

    Raises:
        LccpError: not a single document is that long, or fewer than asked for; a length, number or stride below its
            least value.

    Example:
        >>> token_documents(read_corpus("books/"), tokenizer, length=65536, documents=100)   # doctest: +SKIP
    """
    if stride is not None and (length is None or stride < 1):
        raise LccpError(f"windows with stride {stride} and length {length}: give a stride from 1 upwards and a length")
    if documents is not None and documents < 1:
        raise LccpError(f"documents must be at least 1, got {documents}")
    encoder = PieceEncoder(tokenizer)
    special = encoder.prefix
    if length is not None and length < max(1, len(special)) + 1:
        raise LccpError(f"documents of {length} tokens have no token to predict; ask for longer ones")
    found: list[TokenDocument] = []
    n_read = longest = 0
    for text in texts:
        ids = encoder.start(text.text)
        n_read, longest = n_read + 1, max(longest, len(special) + len(ids))
        for name, window in _windows(text.doc_id, ids, None if length is None else length - len(special), stride):
            found.append(TokenDocument(name, (*special, *window), len(special)))
            if len(found) == documents:
                return found
    if not found or documents is not None:
        long = "" if length is None else f" of {length} tokens"
        raise LccpError(
            f"the corpus gives {len(found)} documents{long}, {documents or 'at least 1'} are needed ({n_read} read, "
            f"the longest has {longest} tokens); give more or longer documents, ask for fewer, or let windows overlap"
        )
    return found


def _windows(name: str, ids: list[int], room: int | None, stride: int | None) -> Iterator[tuple[str, list[int]]]:
    if room is None:
        if len(ids) > 1:
            yield name, ids
        return
    for start in range(0, len(ids) - room + 1, stride or len(ids)):
        yield (name if stride is None else f"{name}@{start}"), ids[start : start + room]
