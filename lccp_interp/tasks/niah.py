"""Continuous needle-in-a-haystack: one fact hidden in long text, then the question, then the answer to be scored.

The grid is total length x depth x needle x sample. Prompt and answer together are exactly `length` tokens of the
checkpoint's own tokenizer, and the spans of needle and source are placed by construction and proved by decoding them;
nothing is searched for afterwards. Two prompts have names:

- `paper` (arXiv 2604.02650): `[context before]\\n{needle}\\n[context after]\\nQuestion: {question}\\nAnswer:`.
- `wu` (arXiv 2404.15574): `{context}Based on the content of the book, Question: {question}\\nAnswer:`, the needle
  between two sentences of the context, without line breaks. The rest of that setting is the grid's and the sweep's to
  say: 3 needles x 20 lengths evenly from 1000 to 50000 x 10 depths evenly from 0 to 100, in generate mode, which counts
  right answers only. The source is the part of the needle that answers (`real_needle` in the code published with it).
  Two things differ from that code: there a length counts the context and 200 tokens of room, here prompt and answer;
  there each needle has a text of its own, here a grid hides all of them in one.

With `chat` the whole prompt stands in the user's turn of the tokenizer's chat template and the answer in the model's.
Where that turn opens with a line break the answer follows without a blank, so its first word is the needle's own token
only if it opens a line there too, as whole needles do in the paper's form.

This module knows text and tokenizers; it refuses to know models and scores. Cost: one pass of the tokenizer over each
haystack, then list joining.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lccp_interp.organism import language
from lccp_interp.schema import Case, LccpError, Needle, Span
from lccp_interp.tasks.chat import Frame
from lccp_interp.tasks.haystack import Haystack, pick_starts
from lccp_interp.tasks.needles import (
    PAPER_PROMPT,
    Fact,
    NeedleIds,
    check_sources,
    prompt_form,
    read_needles,
    source_config,
)
from lccp_interp.tasks.pieces import PieceEncoder
from lccp_interp.tasks.twins import refuse_twins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PAPER_PROMPT", "NiahGrid", "build_cases", "organism_haystack", "read_needles"]


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
        prompt: `paper`, `wu`, or a template with `{context}` and `{question}`; the answer follows it.
        seed: of needles, haystacks and where in the haystack a sample begins.
        chat: whether the prompt stands in the tokenizer's chat template.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    samples: int = 1
    needles: tuple[Needle, ...] | None = None
    haystack: str | None = None
    prompt: str = PAPER_PROMPT
    seed: int = 0
    chat: bool = False

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
        check_sources(self.samples, self.needles)
        prompt_form(self.prompt)

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
            **source_config(
                samples=self.samples,
                needles=self.needles,
                haystack=self.haystack,
                prompt=self.prompt,
                chat=self.chat,
                seed=self.seed,
            ),
        }

    def build(self, tokenizer: PreTrainedTokenizerBase) -> list[Case]:
        """All cases; see `build_cases`."""
        return build_cases(self, tokenizer)


def build_cases(grid: NiahGrid, tokenizer: PreTrainedTokenizerBase) -> list[Case]:
    """All cases of a grid, in the order length, sample, needle, depth.

    Every case is `length` tokens exactly (prompt and answer). The context is opened at the sentence boundary nearest
    below depth x context; a needle at depth 0 opens the document, at depth 100 it stands right before the question.

    Raises:
        SpanError: the tokenizer cannot hold a needle or its answer without loss, or gives it no border of its own.
        LccpError: a length has no room for needle and question, the haystack is too short or holds a needle itself, or
            `chat` is asked of a tokenizer without a chat template.

    Warns:
        UserWarning: an answer stands in the haystack itself.

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
        prompt_ids, needle_span, source_span = _place(fact, length, depth / 100, haystack, start)
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
            question=fact.question(len(prompt_ids)),
        )


class _Material:
    """Needles and haystacks of a grid, each made once.

    The user's needles and text are the same at every depth. In the organism's language they cost nothing, so every
    sample and depth draws its own: independent draws say more about a head than the same few needles moved about.
    """

    def __init__(self, grid: NiahGrid, encoder: PieceEncoder) -> None:
        self._grid, self._encoder = grid, encoder
        self._longest = max(grid.lengths)
        self._form = prompt_form(grid.prompt)
        self._frame = Frame.of(encoder.tokenizer) if grid.chat else Frame()
        self._facts: dict[tuple[int, float] | int, tuple[str, Fact]] = {}
        self._haystacks: dict[tuple[int, float] | int, Haystack] = {}
        self._own_text = None if grid.haystack is None else Haystack(grid.haystack, encoder)
        seeds = [_derived_seed(grid.seed, sample) for sample in range(grid.samples)]
        self._starts = (
            [0] * grid.samples if self._own_text is None else pick_starts(self._own_text, self._longest, seeds)
        )
        if grid.haystack is not None:
            refuse_twins(grid.haystack, self._all_needles())

    def _all_needles(self) -> dict[str, Needle]:
        if self._grid.needles is not None:
            return {f"n{index}": needle for index, needle in enumerate(self._grid.needles)}
        places = itertools.product(range(self._grid.samples), self._grid.depths)
        return {f"s{sample}d{_percent(depth)}": self.needles(sample, depth)[0] for sample, depth in places}

    def needles(self, sample: int, depth: float) -> tuple[Needle, ...]:
        """The needles that may stand in the haystack of this sample and depth."""
        if self._grid.needles is not None:
            return self._grid.needles
        return tuple(language.needles(1, seed=_derived_seed(self._grid.seed, sample, float(depth))))

    def fact(self, sample: int, index: int | None, depth: float) -> tuple[str, Fact]:
        key = (sample, depth) if index is None else index
        if key not in self._facts:
            name = f"s{sample}d{_percent(depth)}" if index is None else f"n{index}"
            needle = self.needles(sample, depth)[index or 0]
            self._facts[key] = name, Fact(f"needle {name}", needle, self._form, self._encoder, frame=self._frame)
        return self._facts[key]

    def haystack(self, sample: int, depth: float) -> tuple[Haystack, int]:
        """The haystack and the sentence that it is read from."""
        if self._own_text is not None:
            return self._own_text, self._starts[sample]
        key = (sample, float(depth)) if self._grid.needles is None else sample
        if key not in self._haystacks:
            seed = _derived_seed(self._grid.seed, *(key if isinstance(key, tuple) else (key,)))
            self._haystacks[key] = organism_haystack(self._longest, seed, self.needles(sample, depth), self._encoder)
        return self._haystacks[key], 0


def _place(
    fact: Fact, length: int, depth_fraction: float, haystack: Haystack, start: int
) -> tuple[list[int], Span, Span]:
    """The prompt that with its answer is `length` tokens, and where needle and source stand in it."""
    room = length - len(fact.lead) - len(fact.tail) - len(fact.answer)
    n_context = room - len(fact.joint) - max(len(fact.in_text.ids), len(fact.in_front.ids))
    if n_context < 1:
        raise LccpError(
            f"length {length} has no room for a context: {fact.label}, its question and answer take "
            f"{length - n_context} tokens; ask for at least {length - n_context + 32}"
        )
    own_line = bool(fact.joint)
    needle = fact.in_text
    before: list[int] = []
    after: list[int] = []
    if depth_fraction > 0:
        n_context = room - len(fact.joint) - len(needle.ids)
        before, after = haystack.split(
            n_context, depth_fraction, start=start, opens_document=fact.opens_document, own_line=own_line
        )
    if not before:
        # At depth 0, or where no sentence ends above the depth asked for, the needle opens the document.
        needle = fact.in_front
        before, after = haystack.split(room - len(needle.ids), 0.0, start=start, own_line=own_line)
    lead = [*fact.lead, *before, *(fact.joint if before else [])]
    return [*lead, *needle.ids, *after, *fact.tail], *needle_spans(needle, len(lead))


def needle_spans(needle: NeedleIds, at: int) -> tuple[Span, Span]:
    """Spans of the needle and of its source, where the needle begins at position `at`."""
    start = at + len(needle.before)
    return Span(at, at + len(needle.ids)), Span(start, start + len(needle.source))


def organism_haystack(
    n_tokens: int,
    seed: int,
    needles: Sequence[Needle],
    encoder: PieceEncoder,
    *,
    fact_every: float = language.TOKENS_PER_FACT,
) -> Haystack:
    """A haystack in the organism's language, long enough under any tokenizer.

    Other facts stand in it, one in about `fact_every` tokens (infinity: none), and never those of `needles`.
    """
    n_words = n_tokens + 64
    while True:
        haystack = Haystack(language.haystack(n_words, seed=seed, avoid=needles, fact_every=fact_every), encoder)
        if haystack.n_tokens >= n_tokens + 64:
            return haystack
        n_words *= 2


def _derived_seed(*parts: float) -> int:
    digest = hashlib.sha256("/".join(["niah", *map(str, parts)]).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _percent(depth: float) -> str:
    return f"{int(depth)}" if float(depth).is_integer() else repr(float(depth))
