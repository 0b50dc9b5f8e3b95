"""LongBio-style tasks: a long text of made-up biographies, and one question about one or two of the people in it.

The idea is that of LongBioBench (arXiv 2506.02921): what is asked for and what surrounds it are of one kind, so that
nothing but the question tells them apart. Its words are not used here. Subsets:

- `standard`: every fact in one fixed wording, with the full name in it.
- `paraphrase`: in other wordings, inverted or embedded.
- `pronoun`: the name stands in a biography's first sentence only. In the bundled model's language, which has no such
  pronouns, that sentence gives the person a calling, and "the teacher" is spoken of from there on.
- `multi_hop`: the fact asked for is told by reference to somebody else, whose biography has it.
- `calculation`: in English the years between two births; the bundled model's language has no words for that, there
  it is asked which of two people was born first (guessing is right half of the time).
- `not_stated`: the fact asked for is left out, and the instruction says what to answer then. All subsets have the same
  instruction.

No two people of a prompt have the same name, so a name and a topic have one answer. Whose biography is asked for stands
at a seeded depth, spread evenly over samples; others fill the prompt, as many as fit. In English a life has six topics.
In the bundled model's language it has five, for there is no word for the city of work; that language has 24 names per
split, and its model was trained on facts far apart, so five lines of story, without names, follow each of the others.

`recast` puts single facts into the form of continuous NIAH (`tasks.niah`), to score heads with, as arXiv 2604.02650
does. This module knows text and tokenizers; it refuses to know models and scores. Cost: every biography passes the
tokenizer once per prompt it stands in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from lccp_interp.schema import Case, Item, LccpError, Span
from lccp_interp.tasks.biographies import FORMS, Book, Cast, Sentence, book, spellings
from lccp_interp.tasks.items import MATERIALS, Piece, PromptWriter, derived_seed, natural_material
from lccp_interp.tasks.pieces import PieceEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUBSETS = (*FORMS, "multi_hop", "calculation", "not_stated")
ABOUT_TWO = ("multi_hop", "calculation")
"""Subsets whose questions want a fact of each of two people."""

BENCHMARK = "LongBio-style"
MAX_NEW_TOKENS = {"english": 32, "organism": 16}
ANSWERS = ("needle", "answer")
"""What a recast case is to answer: the needle sentence itself (arXiv 2604.02650), or only the value in it."""

CUE = "\nQuestion: "


def build_items(
    writer: PromptWriter,
    *,
    subsets: Sequence[str] | None = None,
    lengths: Sequence[int],
    samples: int = 10,
    seed: int = 0,
    material: str = "english",
    split: str = "eval",
) -> list[Item]:
    """Questions about biographies, in the order subset, length, sample.

    Args:
        writer: of the tokenizer; with a chat template or without.
        subsets: out of `SUBSETS`; None for all.
        lengths: tokens of prompt and answer budget together, at most.
        samples: per subset and length. The places of what is asked for are spread evenly over them.
        seed: of people, facts and places. Every item is a function of it and its own subset, length and sample.
        material: `english` or `organism`, the bundled model's language.
        split: `eval`, or `train` for fine-tuning; they share no name, no value and no wording.

    Raises:
        LccpError: an unknown subset, material or split; a length that has no room for a question and one distractor, or
            more room than there are names.

    Example:
        >>> items = build_items(PromptWriter(tokenizer), lengths=[4096], samples=2)      # doctest: +SKIP
        >>> items[0].item_id, items[0].references                                        # doctest: +SKIP
        ('longbio-standard-4096-0', ('14 May 1960', 'May 14, 1960'))
    """
    chosen = _known(SUBSETS if subsets is None else subsets, SUBSETS, "subset")
    told_in = book(material, split)
    if not lengths or len(set(lengths)) != len(lengths):
        raise LccpError(f"{BENCHMARK} wants at least one length and none twice, got {list(lengths)}")
    if samples < 1:
        raise LccpError(f"samples must be at least 1, got {samples}")
    return [
        _item(writer, told_in, subset, length, sample, seed)
        for subset, length, sample in itertools.product(chosen, lengths, range(samples))
    ]


@dataclass(frozen=True)
class _Question:
    """One question: the people it is about (the first ones of the cast), their biographies, and the answer."""

    text: str
    answer: str
    references: tuple[str, ...]
    grader: str
    biographies: tuple[Sequence[Sentence], ...]
    evidence: tuple[Sentence, ...]


def _item(writer: PromptWriter, told_in: Book, subset: str, length: int, sample: int, seed: int) -> Item:
    item_id = f"longbio-{subset}-{length}-{sample}"
    own_seed = derived_seed("longbio", told_in.material, told_in.split, seed, subset, length, sample)
    cast = _cast(told_in, subset, own_seed)
    question = _ask(cast, subset, Random(f"question {own_seed}"))
    own = [_pieces(biography, question.evidence) for biography in question.biographies]
    closing = Piece(f"\nQuestion: {question.text}\nAnswer:")
    depths = _depths(sample, derived_seed("longbio depths", told_in.material, told_in.split, seed, subset, length))

    def write(n: int) -> list[Piece]:
        context = [[Piece(f"\n{cast.line(j)}")] for j in range(n)]
        places = (round(depth * n) for depth in depths)
        # The later one first, so that the places of the others hold.
        for place, pieces in sorted(zip(places, own, strict=False), key=lambda pair: -pair[0]):
            context.insert(place, pieces)
        return [Piece(told_in.instruction), *itertools.chain.from_iterable(context), closing]

    budget = MAX_NEW_TOKENS[told_in.material]
    _, draft = writer.fit(write, length=length, max_new_tokens=budget, what=f"{BENCHMARK} {subset}")
    return Item(
        item_id=item_id,
        benchmark=BENCHMARK,
        subset=subset,
        length=length,
        prompt_ids=draft.ids,
        references=question.references,
        target=f" {question.answer}",
        grader=question.grader,
        max_new_tokens=budget,
        stop=("\n",),
        evidence=draft.evidence,
        seed=seed,
    )


def _cast(told_in: Book, subset: str, seed: int) -> Cast:
    """The people of an item; for a calculation the first two are born in different years, else there is none."""
    form = subset if subset in FORMS else "standard"
    for attempt in itertools.count():
        cast = Cast(told_in, form, seed=derived_seed(seed, attempt), n_asked=2 if subset in ABOUT_TWO else 1)
        if subset != "calculation" or cast.birth_year(0) != cast.birth_year(1):
            return cast
    raise AssertionError("unreachable")


def _ask(cast: Cast, subset: str, rng: Random) -> _Question:
    """The question of a subset; it is about person 0, or about persons 0 and 1."""
    told_in = cast.book
    if subset == "calculation":
        return _calculation(cast, rng)
    topic = rng.choice(list(told_in.topics))
    text = told_in.topics[topic].question.format(name=cast.name(0))
    # The bundled model's language has one way to write an answer; an English one may stand in a sentence.
    grader = "exact" if told_in.material == "organism" else "string_match_part"
    if subset == "not_stated":
        nothing = told_in.not_stated
        return _Question(text, nothing, (nothing,), grader, (cast.biography(0, drop=topic),), ())
    if subset == "multi_hop":
        link, fact = cast.tell(0, topic, same_as=1), cast.tell(1, topic)
        biographies = (cast.biography(0, instead=link), cast.biography(1))
        return _Question(text, fact.value, _accepted(told_in, topic, fact), grader, biographies, (link, fact))
    fact, own = cast.tell(0, topic), cast.biography(0)
    evidence = (own[0], fact) if subset == "pronoun" else (fact,)
    return _Question(text, fact.value, _accepted(told_in, topic, fact), grader, (own,), evidence)


def _calculation(cast: Cast, rng: Random) -> _Question:
    told_in = cast.book
    first, second = rng.sample((0, 1), 2)
    text = told_in.calculation.format(name=cast.name(first), other=cast.name(second))
    years = cast.birth_year(0), cast.birth_year(1)
    if told_in.material == "organism":
        answer = cast.name(years.index(min(years)))
        references: tuple[str, ...] = (answer,)
    else:
        answer = str(abs(years[0] - years[1]))
        references = (answer, f"{answer} years")
    biographies = (cast.biography(0), cast.biography(1))
    evidence = (cast.tell(0, told_in.birth), cast.tell(1, told_in.birth))
    return _Question(text, answer, references, "exact", biographies, evidence)


def _accepted(told_in: Book, topic: str, fact: Sentence) -> tuple[str, ...]:
    return spellings(fact.value) if topic == told_in.birth else (fact.value,)


def _pieces(biography: Sequence[Sentence], evidence: Sequence[Sentence]) -> list[Piece]:
    return [
        Piece(f"{' ' if n else chr(10)}{sentence.text}", evidence=sentence in evidence)
        for n, sentence in enumerate(biography)
    ]


def _depths(sample: int, seed: int) -> tuple[float, float]:
    """Depths (0..1) of the first and the second biography asked for; over samples each of them is spread evenly.

    They are the points of a Halton sequence (bases 2 and 3), shifted by the seed: however many samples there are, no
    part of the prompt is left out, and the depth of one sample does not depend on how many there are.
    """
    rng = Random(f"depths {seed}")
    return tuple((rng.random() + _radical_inverse(sample, base)) % 1.0 for base in (2, 3))  # type: ignore[return-value]


def _radical_inverse(n: int, base: int) -> float:
    """The digits of n in `base`, mirrored behind the point."""
    value, weight = 0.0, 1.0
    while n:
        n, digit = divmod(n, base)
        weight /= base
        value += digit * weight
    return value


def _known(given: Sequence[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    for name in given:
        if name not in known:
            raise LccpError(f"unknown {what} {name!r} of {BENCHMARK}; known: {', '.join(known)}")
    if not given or len(set(given)) != len(given):
        raise LccpError(f"{BENCHMARK} wants at least one {what} and none twice, got {', '.join(given) or 'none'}")
    return tuple(given)


# ---------------------------------------------------------------------------------------------------------------------
# Single facts as needles
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongBioGrid:
    """Single facts of biographies as needles: every length x depth x sample x subset (see `CaseGrid`).

    Attributes:
        lengths: total lengths, tokens of prompt and answer together; every case has exactly so many.
        depths: places of the biography asked for, percent of the context.
        samples: people asked for; in the bundled model's language each depth has people of its own, in English all
            depths share them, so that their prompts begin alike.
        subsets: out of `standard`, `paraphrase`, `pronoun`.
        answer: `needle`, the sentence itself (the paper's form), or `answer`, the value in it.
        material: `english`, `organism`, or `auto`: what the tokenizer is made for.
        seed: of people and facts.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    samples: int = 1
    subsets: tuple[str, ...] = ("standard",)
    answer: str = "needle"
    material: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _known(self.subsets, FORMS, "single-needle subset")
        if not self.lengths or not self.depths:
            raise LccpError("a grid needs at least one length and one depth (--lengths 256,1024 --depths 0,50,100)")
        if len(set(self.lengths)) != len(self.lengths) or len(set(self.depths)) != len(self.depths):
            raise LccpError(f"lengths {self.lengths} or depths {self.depths} name a value twice")
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise LccpError(f"depth {depth:g} is outside 0-100; depths are percent of the context")
        if min(self.lengths) < 1 or self.samples < 1:
            raise LccpError(f"lengths and samples must be at least 1, got {self.lengths} and {self.samples}")
        if self.answer not in ANSWERS:
            raise LccpError(f"unknown answer {self.answer!r}; known: {', '.join(ANSWERS)}")
        if self.material not in ("auto", *MATERIALS):
            raise LccpError(f"unknown material {self.material!r}; known: auto, {', '.join(MATERIALS)}")

    @property
    def n_cases(self) -> int:
        """How many cases the grid has."""
        return len(self.lengths) * len(self.depths) * self.samples * len(self.subsets)

    def config(self) -> dict[str, Any]:
        """The grid as plain JSON values; equal grids have equal configs."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"task": "longbio", **values, "depths": [float(depth) for depth in self.depths]}

    def build(self, tokenizer: PreTrainedTokenizerBase) -> list[Case]:
        """All cases; see `recast`."""
        return recast(self, tokenizer)


def recast(grid: LongBioGrid, tokenizer: PreTrainedTokenizerBase) -> list[Case]:
    """Single facts in the form of continuous NIAH: `{context}\\nQuestion: {question}\\nAnswer:`, in the order length,
    subset, sample, depth.

    The context is biographies and nothing else; what is asked for is never a biography's first sentence, so that its
    tokens are the same in the text and as the answer. A case is `length` tokens exactly: the last biography behind the
    needle's (at depth 100, before it) is cut where the count falls. The biography stands where the one before it ends
    nearest below depth x context.

    Raises:
        SpanError: the tokenizer cannot hold a needle without loss, or gives it no border of its own.
        LccpError: a length has no room for a context, or more room than there are names.
    """
    material = natural_material(tokenizer) if grid.material == "auto" else grid.material
    encoder = PieceEncoder(tokenizer)
    return list(_cases(grid, book(material), encoder))


def _cases(grid: LongBioGrid, told_in: Book, encoder: PieceEncoder) -> Iterator[Case]:
    contexts: dict[str, _Context] = {}
    for length, subset, sample, depth in itertools.product(
        grid.lengths, grid.subsets, range(grid.samples), grid.depths
    ):
        own = f"s{sample}" if told_in.material == "english" else f"s{sample}d{depth:g}"
        name = f"{subset}-{own}"
        if name not in contexts:
            seed = derived_seed("longbio recast", told_in.material, grid.seed, name)
            contexts[name] = _Context(Cast(told_in, subset, seed=seed), grid.answer, encoder)
        context = contexts[name]
        prompt_ids, needle, source = context.place(length, depth / 100)
        yield Case(
            case_id=f"longbio-{subset}-{length}-d{depth:g}-{sample}",
            task="longbio",
            length=length,
            depth_fraction=depth / 100,
            needle_id=f"{context.topic}-{name}",
            haystack_id=f"longbio-{name}",
            sample=sample,
            seed=grid.seed,
            prompt_ids=tuple(prompt_ids),
            answer_ids=tuple(context.answer),
            needle=needle,
            source=source,
            question=context.question(len(prompt_ids)),
        )


class _Context:
    """Person 0 of a cast, who is asked for, and the lines around, in tokens."""

    def __init__(self, cast: Cast, answer: str, encoder: PieceEncoder) -> None:
        self._cast, self._encoder = cast, encoder
        self.topic = Random(f"topic {cast.seed}").choice(list(cast.book.topics))
        biography = cast.biography(0, not_first=self.topic)
        at = next(n for n, sentence in enumerate(biography) if sentence.topic == self.topic)
        fact = biography[at]
        self._in_front = encoder.start(biography[0].text)
        self._in_line, *rest = encoder.middle(
            [f"\n{biography[0].text}", *(f" {sentence.text}" for sentence in biography[1:])]
        )
        self._before = list(itertools.chain.from_iterable(rest[: at - 1]))
        self._after = list(itertools.chain.from_iterable(rest[at:]))
        parts = ("", f" {fact.text}", "")
        if answer == "answer":
            parts = (f" {fact.head.rstrip()}", f" {fact.value}", fact.tail)
        self._head, self.answer, tail = encoder.middle(parts)
        self._needle = [*self._head, *self.answer, *tail]
        encoder.check(self._needle, fact.text, f"the needle {fact.text!r}")
        encoder.check(self.answer, parts[1], f"the answer {parts[1]!r}")
        question = cast.book.topics[self.topic].question.format(name=cast.name(0))
        (self._closing,) = encoder.middle([f"{CUE}{question}\nAnswer:"])
        self._asked = encoder.inside(self._closing, CUE, question)
        self._opening = encoder.start(cast.line(0))
        self._lines: list[list[int]] = []
        self._n_tokens = 0

    def place(self, length: int, depth_fraction: float) -> tuple[list[int], Span, Span]:
        """The prompt that with its answer is `length` tokens, and where needle and source stand in it."""
        fixed = [*self._encoder.prefix, *self._before, *self._needle, *self._after, *self._closing, *self.answer]
        room = length - len(fixed) - max(len(self._in_line), len(self._in_front))
        if room < 1:
            raise LccpError(
                f"length {length} has no room for a context: a biography, its question and answer take "
                f"{length - room} tokens; ask for at least {length - room + 64}"
            )
        self._encode(length)
        # The line that opens the document has no line break before it.
        ends = itertools.accumulate(map(len, [self._opening, *self._lines[1:]]))
        n_before = sum(1 for _ in itertools.takewhile(lambda end: end <= depth_fraction * room, ends))
        if depth_fraction >= 1:
            n_before = len(self._lines)
        before = list(itertools.chain.from_iterable([self._opening, *self._lines[1:n_before]][:n_before]))
        opening = self._in_line if before else self._in_front
        room = length - len(fixed) - len(opening)
        before = before[:room]
        lead = [*self._encoder.prefix, *before, *opening, *self._before]
        needle = Span(len(lead), len(lead) + len(self._needle))
        source = Span(needle.start + len(self._head), needle.start + len(self._head) + len(self.answer))
        behind = list(itertools.chain.from_iterable(self._lines[n_before:]))[: room - len(before)]
        return [*lead, *self._needle, *self._after, *behind, *self._closing], needle, source

    def question(self, n_prompt: int) -> Span | None:
        """Where the question stands in a prompt of `n_prompt` tokens."""
        return None if self._asked is None else self._asked.shifted(n_prompt - len(self._closing))

    def _encode(self, n_tokens: int) -> None:
        """Encode lines until there are enough for any prompt of `n_tokens`."""
        while self._n_tokens < n_tokens:
            known = len(self._lines)
            self._lines += self._encoder.middle([f"\n{self._cast.line(j)}" for j in range(known, known + 32)])
            self._n_tokens = sum(map(len, self._lines[1:]))
