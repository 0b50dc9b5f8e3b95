"""Continuous needle-in-a-haystack: one fact hidden in long text, then the question, then the answer to be scored.

The prompt has the form of arXiv 2604.02650,
`[context before]\\n{needle}\\n[context after]\\nQuestion: {question}\\nAnswer:`, followed by the answer, over a grid of
total length x depth x needle x sample. Prompt and answer together are exactly `length` tokens of the checkpoint's own
tokenizer, and the spans of needle and source are placed by construction and proved by decoding them; nothing is
searched for afterwards.

This module knows text and tokenizers; it refuses to know models and scores. Cost: one pass of the tokenizer over each
haystack, then list joining.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lccp_interp.organism import language
from lccp_interp.schema import Case, LccpError, Needle, Span, SpanError
from lccp_interp.tasks.haystack import Haystack, pick_starts
from lccp_interp.tasks.pieces import PieceEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_PROMPT = "{context}\nQuestion: {question}\nAnswer:"
"""Prompt of arXiv 2604.02650 up to the answer cue."""


@dataclass(frozen=True)
class NiahGrid:
    """What to ask: every length x depth x needle x sample.

    Attributes:
        lengths: total lengths, tokens of prompt and answer together.
        depths: places of the needle, percent of the context (0 = in front, 100 = right before the question).
        samples: haystacks per needle. With the organism's language (no `needles`) each sample and depth has a needle
            and a haystack of its own.
        needles: facts of the user, or None for facts in the organism's language.
        haystack: text to hide them in, or None for text in the organism's language.
        prompt: template with `{context}` and `{question}`; the answer follows it.
        seed: of needles, haystacks and where in the haystack a sample begins.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    samples: int = 1
    needles: tuple[Needle, ...] | None = None
    haystack: str | None = None
    prompt: str = PAPER_PROMPT
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or not self.depths:
            raise LccpError("a grid needs at least one length and one depth (--lengths 256,1024 --depths 0,50,100)")
        if len(set(self.lengths)) != len(self.lengths) or len(set(self.depths)) != len(self.depths):
            raise LccpError(f"lengths {self.lengths} or depths {self.depths} name a value twice")
        for length in self.lengths:
            if length < 1:
                raise LccpError(f"a length is a number of tokens above 0, got {length}")
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise LccpError(f"depth {depth:g} is outside 0-100; depths are percent of the context")
        if self.samples < 1:
            raise LccpError(f"samples must be at least 1, got {self.samples}")
        if self.needles is not None and not self.needles:
            raise LccpError("the list of needles is empty; give at least one {needle, question, answer}")
        for field in ("{context}", "{question}"):
            if self.prompt.count(field) != 1:
                raise LccpError(f"the prompt template must hold {field} exactly once, got {self.prompt!r}")
        if self.prompt.index("{context}") > self.prompt.index("{question}"):
            raise LccpError(f"the prompt template must hold {{context}} before {{question}}, got {self.prompt!r}")

    @property
    def n_cases(self) -> int:
        """How many cases the grid has."""
        return len(self.lengths) * len(self.depths) * self.samples * len(self.needles or (None,))

    def config(self) -> dict[str, Any]:
        """The grid as plain JSON values, texts by their hashes; equal grids have equal configs."""
        return {
            "task": "niah",
            "lengths": list(self.lengths),
            "depths": [float(depth) for depth in self.depths],
            "samples": self.samples,
            "needles": "organism" if self.needles is None else _digest([asdict(needle) for needle in self.needles]),
            "haystack": "organism" if self.haystack is None else _digest(self.haystack),
            "prompt": self.prompt,
            "seed": self.seed,
        }


def read_needles(path: Path) -> tuple[Needle, ...]:
    """Needles from a JSONL file, one `{"needle": ..., "question": ..., "answer": ...}` per line.

    Raises:
        LccpError: no such file, no needles, a line that is no JSON object, or a field missing, empty, or an answer that
            is not part of its needle; always with file and line.
    """
    if not path.is_file():
        raise LccpError(f"no needle file at {path}; give JSONL with needle, question and answer in each line")
    needles = []
    try:
        # Not splitlines: it also cuts at separators that may stand inside a JSON string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise LccpError(f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LccpError(f"{path}:{number}: no JSON ({error}); each line is one JSON object") from error
        if not isinstance(entry, dict):
            raise LccpError(f"{path}:{number}: expected a JSON object, got {type(entry).__name__}")
        for field in ("needle", "question", "answer"):
            if field not in entry:
                hint = "; repeat the needle as the answer for the paper's form" if field == "answer" else ""
                raise LccpError(f"{path}:{number}: field {field!r} is missing (has {', '.join(sorted(entry))}){hint}")
        try:
            needles.append(Needle(entry["needle"], entry["question"], entry["answer"]))
        except LccpError as error:
            raise LccpError(f"{path}:{number}: {error}") from error
    if not needles:
        raise LccpError(f"{path} holds no needles; give JSONL with needle, question and answer in each line")
    return tuple(needles)


def build_cases(grid: NiahGrid, tokenizer: PreTrainedTokenizerBase) -> list[Case]:
    """All cases of a grid, in the order length, sample, needle, depth.

    Every case is `length` tokens exactly (prompt and answer). The context is opened at the sentence boundary nearest
    below depth x context; a needle at depth 0 opens the document, at depth 100 it stands right before the question.

    Raises:
        SpanError: the tokenizer cannot hold a needle or its answer without loss, or gives it no border of its own.
        LccpError: a length has no room for needle and question, or the haystack is too short.

    Example:
        >>> from lccp_interp.capture.model import load_tokenizer                             # doctest: +SKIP
        >>> cases = build_cases(NiahGrid(lengths=(256,)), load_tokenizer("data/trajectory/..."))  # doctest: +SKIP
    """
    return list(_cases(grid, PieceEncoder(tokenizer)))


def _cases(grid: NiahGrid, encoder: PieceEncoder) -> Iterator[Case]:
    material = _Material(grid, encoder)
    indices: Sequence[int | None] = [None] if grid.needles is None else range(len(grid.needles))
    for length, sample, index, depth in itertools.product(grid.lengths, range(grid.samples), indices, grid.depths):
        name, fact = material.fact(sample, index, depth)
        haystack, start = material.haystack(sample, depth)
        prompt_ids, needle_span, source_span = fact.place(length, depth / 100, haystack, start)
        yield Case(
            case_id=f"niah-{length}-d{_percent(depth)}-{name}-{sample}",
            task="niah",
            length=length,
            depth_fraction=depth / 100,
            needle_id=name,
            haystack_id=f"{haystack.haystack_id}@{start}",
            sample=sample,
            seed=grid.seed,
            prompt_ids=tuple(prompt_ids),
            answer_ids=tuple(fact.answer),
            needle=needle_span,
            source=source_span,
        )


class _Material:
    """Needles and haystacks of a grid, each made once.

    The user's needles and text are the same at every depth. In the organism's language they cost nothing, so every
    sample and depth draws its own: independent draws say more about a head than the same few needles moved about.
    """

    def __init__(self, grid: NiahGrid, encoder: PieceEncoder) -> None:
        self._grid, self._encoder = grid, encoder
        self._longest = max(grid.lengths)
        self._facts: dict[tuple[int, float] | int, tuple[str, _Fact]] = {}
        self._haystacks: dict[tuple[int, float] | int, Haystack] = {}
        self._own_text = None if grid.haystack is None else Haystack(grid.haystack, encoder)
        seeds = [_derived_seed(grid.seed, sample) for sample in range(grid.samples)]
        self._starts = (
            [0] * grid.samples if self._own_text is None else pick_starts(self._own_text, self._longest, seeds)
        )

    def needles(self, sample: int, depth: float) -> tuple[Needle, ...]:
        """The needles that may stand in the haystack of this sample and depth."""
        if self._grid.needles is not None:
            return self._grid.needles
        return tuple(language.needles(1, seed=_derived_seed(self._grid.seed, sample, float(depth))))

    def fact(self, sample: int, index: int | None, depth: float) -> tuple[str, _Fact]:
        key = (sample, depth) if index is None else index
        if key not in self._facts:
            name = f"s{sample}d{_percent(depth)}" if index is None else f"n{index}"
            needle = self.needles(sample, depth)[index or 0]
            self._facts[key] = name, _Fact(name, needle, self._grid.prompt, self._encoder)
        return self._facts[key]

    def haystack(self, sample: int, depth: float) -> tuple[Haystack, int]:
        """The haystack and the sentence that it is read from."""
        if self._own_text is not None:
            return self._own_text, self._starts[sample]
        key = (sample, float(depth)) if self._grid.needles is None else sample
        if key not in self._haystacks:
            seed = _derived_seed(self._grid.seed, *(key if isinstance(key, tuple) else (key,)))
            self._haystacks[key] = _organism_haystack(self._longest, seed, self.needles(sample, depth), self._encoder)
        return self._haystacks[key], 0


@dataclass(frozen=True)
class _Form:
    """A needle's tokens in three parts, as it looks at one kind of place."""

    before: list[int]
    source: list[int]
    after: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.before, *self.source, *self.after]


class _Fact:
    """A needle in tokens, with the question and answer that belong to it."""

    def __init__(self, name: str, needle: Needle, prompt: str, encoder: PieceEncoder) -> None:
        self.label = f"needle {name}"
        text = needle.needle.strip()
        answer = needle.answer.strip()
        at = needle.answer_start
        # The blank before the answer belongs to its first word, as it does after the answer cue.
        head = text[:at].rstrip(" ")
        source = text[len(head) : at] + answer
        rest = text[at + len(answer) :]
        opening, _, tail = prompt.partition("{context}")
        tail = tail.replace("{question}", needle.question.strip())
        self.opens_document = not opening
        self.lead = encoder.prefix + (encoder.start(opening) if opening else [])
        self.line_break = encoder.middle(["\n"])[0]
        # After the cue the answer follows a blank, or what already ends the cue; within a script without blanks, where
        # the source follows another character directly, it may follow the cue directly too.
        ways = [answer] if tail[-1:].isspace() else [f" {answer}"]
        if text[at - 1 : at].strip():
            ways.append(answer)
        self.tail, *forms = encoder.middle([tail, *ways])
        # Within the text the needle opens a line; at depth 0 it opens the document.
        inner = encoder.middle([source, rest])
        if head:
            self.in_line = _Form(encoder.middle([head], after="\n")[0], *inner)
            self.in_front = self.in_line if opening else _Form(encoder.start(head), *inner)
        else:
            self.in_line = _Form([], encoder.middle([source], after="\n")[0], inner[1])
            self.in_front = self.in_line if opening else _Form([], encoder.start(source), inner[1])
        shared = [form for form in forms if set(form) & set(self.in_line.source)]
        if not shared:
            raise SpanError(
                f"{self.label}: its answer {answer!r} has no token in common with itself inside the needle under this "
                f"tokenizer ({encoder.name}), so no head could score; rephrase the needle so that a blank precedes it"
            )
        self.answer = shared[0]
        for form in (self.in_line, self.in_front):
            encoder.check(form.source, answer, f"the answer of {self.label}")
            encoder.check(form.ids, text, self.label)
        encoder.check(self.answer, answer, f"the answer of {self.label} after the prompt")

    def place(self, length: int, depth_fraction: float, haystack: Haystack, start: int) -> tuple[list[int], Span, Span]:
        """The prompt that with its answer is `length` tokens, and where needle and source stand in it."""
        room = length - len(self.lead) - len(self.tail) - len(self.answer)
        n_context = room - len(self.line_break) - max(len(self.in_line.ids), len(self.in_front.ids))
        if n_context < 1:
            raise LccpError(
                f"length {length} has no room for a context: {self.label}, its question and answer take "
                f"{length - n_context} tokens; ask for at least {length - n_context + 32}"
            )
        form = self.in_line
        before: list[int] = []
        after: list[int] = []
        if depth_fraction > 0:
            n_context = room - len(self.line_break) - len(form.ids)
            before, after = haystack.split(n_context, depth_fraction, start=start, opens_document=self.opens_document)
        if not before:
            # At depth 0, or where no sentence ends above the depth asked for, the needle opens the document.
            form = self.in_front
            before, after = haystack.split(room - len(form.ids), 0.0, start=start)
        lead = [*self.lead, *before, *(self.line_break if before else [])]
        needle = Span(len(lead), len(lead) + len(form.ids))
        source = Span(needle.start + len(form.before), needle.start + len(form.before) + len(form.source))
        return [*lead, *form.ids, *after, *self.tail], needle, source


def _organism_haystack(n_tokens: int, seed: int, needles: Sequence[Needle], encoder: PieceEncoder) -> Haystack:
    """A haystack in the organism's language, long enough under any tokenizer."""
    n_words = n_tokens + 64
    while True:
        haystack = Haystack(language.haystack(n_words, seed=seed, avoid=needles), encoder)
        if haystack.n_tokens >= n_tokens + 64:
            return haystack
        n_words *= 2


def _derived_seed(*parts: float) -> int:
    digest = hashlib.sha256("/".join(["niah", *map(str, parts)]).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _percent(depth: float) -> str:
    return f"{int(depth)}" if float(depth).is_integer() else repr(float(depth))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
