"""The organism's language: facts, stories and repeats, written as text whose every token has a known loss weight.

What it does: draws words, facts ("The motto of Mara is amber river ... ."), filler sentences, lists quoted again and
whole training documents from a seed; and, for the tasks layer, :func:`needles` and :func:`haystack`.
What it refuses to know: torch, tokenizer files, models, training schedules. A *piece* here is a piece of text that the
tokenizer turns into exactly one token; the tokenizer is built from :data:`PIECES`, and a test holds the two together.
What it costs: about a microsecond per token; a document of 4096 tokens takes a few milliseconds.

Every draw is an exact function of its seed: Python's Mersenne Twister seeded with a string (hashed by SHA-512, hence
the same on every platform and in every process).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from lccp_interp.schema import LccpError, Needle

# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """Mara Tom Ines Paul Nora Emil Ruth Igor Lena Hugo Vera Otto Cleo Ivan Dora Felix Alma Boris Edith Frank
    Greta Henry Irma Jonas Karin Louis Mina Niels Olga Peter Queenie Ralf Sonia Tariq Ursula Victor Wanda Xavier
    Yara Zeno Amir Bella Carlos Dina Esther Farid Gloria Hassan"""
)
CITIES = _words(
    """Oslo Lima Cairo Quito Tunis Accra Paris Delhi Tokyo Kyoto Rome Milan Dublin Vienna Prague Warsaw Lisbon Madrid
    Athens Ankara Nairobi Havana Boston Denver Austin Toronto Sydney Perth Seoul Hanoi"""
)
MONTHS = _words("January February March April May June July August September October November December")
HOBBIES = _words(
    """chess rowing knitting painting hiking sailing fencing baking juggling dancing fishing skating carving weaving
    pottery archery gardening singing diving climbing boxing cycling surfing yoga"""
)
MAJORS = _words(
    """physics botany history algebra law medicine music geology drama logic optics ethics genetics geometry zoology
    finance"""
)
NOUNS = _words(
    """river stone lamp garden bridge horse letter window forest candle mirror wagon barrel ladder feather basket
    needle engine teacher farmer sailor doctor painter baker hunter miller lawyer robin falcon rabbit badger otter
    kettle hammer anchor blanket compass drum violin coin"""
)
ADJECTIVES = _words(
    """amber quiet heavy golden narrow silent gentle broken frozen hollow bright crimson dusty eager faint humble
    ancient clever"""
)
# Words that occur in lists only; NOUNS and ADJECTIVES occur in lists and in the filler alike.
LIST_WORDS = _words(
    """apple velvet copper marble cedar lemon thunder pepper saddle ribbon walnut cotton ginger tunnel pillow orchid
    tiger cactus magnet pebble puzzle rocket salmon shovel spider tablet ticket tomato turtle urchin valley wallet
    whistle willow zipper acorn bamboo beacon bishop bottle button camel canvas carpet castle cherry cobra cookie
    coral cradle dagger desert dragon"""
)
VERBS = _words("found carried watched followed painted crossed counted praised moved opened guarded visited")
PLACES = _words("harbour market tower station chapel mill meadow village")
ADVERBS = _words("slowly again early together late twice")
PREPOSITIONS = _words("near behind under beyond")

# A few of these are not used by any form below: they are there for the tasks built from this language.
_FUNCTION_WORDS = _words(
    """The A In It For Tell Which What Who When Where Question Answer University Do On Later Nobody Please"""
)
_LOWER_FUNCTION_WORDS = _words(
    """the a of is are in at on and was it for me does have had you recall born grew up grow did studied study majored
    major enjoys enjoy most by with to that then who what which when where exactly remember give"""
)

# ---------------------------------------------------------------------------------------------------------------------
# Topics: what may be said of a name
# ---------------------------------------------------------------------------------------------------------------------

_STATEMENTS = (
    "The {attribute} of {name} is",
    "The {attribute} of {name} is",
    "{name}'s {attribute} is",
    "For {name} the {attribute} is",
)
_QUESTIONS = (
    "What is the {attribute} of {name}?",
    "What is {name}'s {attribute}?",
    "Which {attribute} does {name} have?",
    "Do you recall the {attribute} of {name}?",
    "Please give me {name}'s {attribute}.",
)


@dataclass(frozen=True)
class Topic:
    """One thing that can be said of a name: ``attribute`` identifies it, ``kind`` says what its answers look like."""

    attribute: str
    kind: str
    statements: tuple[str, ...] = _STATEMENTS
    questions: tuple[str, ...] = _QUESTIONS


_LIST_TOPICS = tuple(
    Topic(attribute, kind)
    for kind, attributes in (
        ("words", "motto password song slogan riddle recipe"),
        ("cities", "route journey tour"),
        ("hobbies", "week schedule programme"),
        ("digits", "code badge account"),
        ("date", "wedding debut visit"),
    )
    for attribute in attributes.split()
)
_LIFE_TOPICS = (
    Topic("birthday", "date", ("{name} was born on",), ("When was {name} born?", "What is {name}'s birthday?")),
    Topic("home", "city", ("{name} grew up in",), ("Where did {name} grow up?", "What is the home of {name}?")),
    Topic("university", "university", ("{name} studied at the",), ("Where did {name} study?",)),
    Topic("major", "major", ("{name} majored in",), ("What did {name} major in?", "What is {name}'s major?")),
    Topic("hobby", "hobby", ("{name} enjoys",), ("What does {name} enjoy most?", "What is the hobby of {name}?")),
)
TOPICS = _LIST_TOPICS + _LIFE_TOPICS


def _pieces_of_the_language() -> tuple[str, ...]:
    """Every word in the forms the language writes: after a space, and bare where a line may begin with it."""
    lower = (
        *HOBBIES, *MAJORS, *NOUNS, *ADJECTIVES, *LIST_WORDS, *VERBS, *PLACES, *ADVERBS, *PREPOSITIONS,
        *_LOWER_FUNCTION_WORDS, *(topic.attribute for topic in TOPICS), *"0123456789",
    )  # fmt: skip
    spaced = (*lower, *CITIES, *MONTHS, *NAMES, *_FUNCTION_WORDS)
    bare = (*NAMES, *_FUNCTION_WORDS)
    # A one-letter word at the beginning of a line is its byte.
    return tuple(dict.fromkeys([*(" " + word for word in spaced), *(word for word in bare if len(word) > 1), "'s"]))


PIECES: tuple[str, ...] = _pieces_of_the_language()
"""The pieces longer than one byte, in the tokenizer's order; each is one token wherever the language writes it."""

_PIECE = re.compile(r"'s| ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9]")


def split_pieces(text: str) -> list[str]:
    """Split text of this language into its pieces, one per token.

    Only for text that this module wrote: unknown words come back whole, where the tokenizer would fall to bytes.

    >>> split_pieces("Mara's code is 407.")
    ['Mara', "'s", ' code', ' is', ' 4', '0', '7', '.']
    """
    return _PIECE.findall(text)


# ---------------------------------------------------------------------------------------------------------------------
# Facts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """A statement about a name and the question that asks for it; ``lead`` is the statement up to the answer."""

    name: str
    attribute: str
    lead: str
    answer: str
    question: str

    @property
    def pair(self) -> tuple[str, str]:
        """(attribute, name): what a question asks for, and what two facts of one context must not share."""
        return self.attribute, self.name

    @property
    def statement(self) -> str:
        """The whole sentence, with its full stop."""
        return f"{self.lead} {self.answer}."


def _draw_answer(rng: Random, kind: str) -> str:
    if kind == "words":
        return " ".join(rng.sample(LIST_WORDS + NOUNS + ADJECTIVES, 6))
    if kind == "cities":
        return " ".join(rng.sample(CITIES, 5))
    if kind == "hobbies":
        return " ".join(rng.sample(HOBBIES, 5))
    if kind == "digits":
        return "".join(rng.choice("0123456789") for _ in range(6))
    if kind == "date":
        return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1900, 2029)}"
    if kind == "university":
        return f"University of {rng.choice(CITIES)}"
    return rng.choice({"city": CITIES, "major": MAJORS, "hobby": HOBBIES}[kind])


def draw_fact(rng: Random, topic: Topic, name: str) -> Fact:
    """Say something new about ``name``: random statement form, random answer, random way to ask for it."""
    words = {"attribute": topic.attribute, "name": name}
    return Fact(
        name=name,
        attribute=topic.attribute,
        lead=rng.choice(topic.statements).format(**words),
        answer=_draw_answer(rng, topic.kind),
        question=rng.choice(topic.questions).format(**words),
    )


def draw_facts(rng: Random, n: int, *, topics: Sequence[Topic] = TOPICS, taken: set[tuple[str, str]]) -> list[Fact]:
    """Draw up to ``n`` facts with pairs not in ``taken`` (which grows): every second one shares a name or an attribute.

    The sharing is what makes a question need both halves of its pair: matching the name alone, or the attribute alone,
    finds a wrong fact.
    """
    facts: list[Fact] = []
    for _ in range(4 * n):
        if len(facts) == n:
            break
        topic, name = rng.choice(topics), rng.choice(NAMES)
        if facts and rng.random() < 0.5:
            other = rng.choice(facts)
            if rng.random() < 0.5:
                name = other.name
            else:
                topic = next(t for t in TOPICS if t.attribute == other.attribute)
        if (topic.attribute, name) not in taken:
            taken.add((topic.attribute, name))
            facts.append(draw_fact(rng, topic, name))
    return facts


def filler_sentence(rng: Random) -> str:
    """One sentence of a story, about 6-12 tokens: grammatical, of no consequence."""
    noun, other = rng.choice(NOUNS), rng.choice(NOUNS)
    verb, adjective, place = rng.choice(VERBS), rng.choice(ADJECTIVES), rng.choice(PLACES)
    form = rng.randrange(6)
    if form == 0:
        return f"The {adjective} {noun} {verb} the {other} {rng.choice(PREPOSITIONS)} the {place}."
    if form == 1:
        return f"{rng.choice(NAMES)} {verb} a {adjective} {noun} in {rng.choice(CITIES)}."
    if form == 2:
        return f"In {rng.choice(MONTHS)} the {noun} {verb} the {place} {rng.choice(ADVERBS)}."
    if form == 3:
        return f"It was {adjective} and the {noun} {verb} the {other}."
    if form == 4:
        return f"Later {rng.choice(NAMES)} {verb} the {noun} with {rng.choice(NAMES)}."
    return f"Nobody {verb} the {noun} that was in the {place}."


# ---------------------------------------------------------------------------------------------------------------------
# Training documents
# ---------------------------------------------------------------------------------------------------------------------

FRESH_WEIGHT = 0.0
"""Loss weight of payload drawn at random just now: nothing could predict it, so nothing is asked."""
TEXT_WEIGHT = 0.3
"""Loss weight of ordinary text: the filler, the statements' own words, the questions."""
TOKENS_PER_FACT = 100.0
"""In haystacks, and in training documents unless told otherwise, about one fact stands in so many tokens."""
COPY_WEIGHT = 1.0
"""Loss weight of tokens that stand earlier in the context and are asked for again: answers and quotations."""

Segment = tuple[str, float]


@dataclass(frozen=True)
class Document:
    """A training document of an exact number of tokens: ``pieces[i]`` weighs ``weights[i]`` in the loss as a target."""

    pieces: list[str]
    weights: list[float]

    @property
    def text(self) -> str:
        """The document as it would be read."""
        return "".join(self.pieces)


def _fact_segments(fact: Fact) -> list[Segment]:
    return [(fact.lead, TEXT_WEIGHT), (" " + fact.answer, FRESH_WEIGHT), (".", TEXT_WEIGHT)]


def _question_segments(fact: Fact, first_weight: float) -> list[Segment]:
    """The paper's prompt form, with the answer's full stop so that the model also learns where an answer ends."""
    first, *rest = split_pieces(f" {fact.answer}.")
    return [
        (f"\nQuestion: {fact.question}\nAnswer:", TEXT_WEIGHT),
        (first, first_weight),
        ("".join(rest), COPY_WEIGHT),
    ]


def _n_pieces(segments: Sequence[Segment]) -> int:
    return sum(len(split_pieces(text)) for text, _ in segments)


def _context(rng: Random, facts: Sequence[Fact], n_tokens: int) -> list[Segment]:
    """At least ``n_tokens`` tokens of filler with the facts at random places, some on a line of their own."""
    needed = n_tokens - sum(_n_pieces(_fact_segments(fact)) for fact in facts)
    sentences: list[list[Segment]] = []
    while needed > 0:
        sentence = filler_sentence(rng)
        sentences.append([(sentence, TEXT_WEIGHT)])
        needed -= len(split_pieces(sentence))
    own_line: set[int] = set()
    for fact in facts:
        segments = _fact_segments(fact)
        sentences.insert(rng.randint(0, len(sentences)), segments)
        if rng.random() < 0.5:
            own_line.add(id(segments))
    out: list[Segment] = []
    for previous, sentence_segments in zip([None, *sentences], sentences, strict=False):
        if previous is not None:
            alone = id(previous) in own_line or id(sentence_segments) in own_line
            out.append(("\n", TEXT_WEIGHT) if alone or rng.random() < 0.1 else (" ", TEXT_WEIGHT))
        out.extend(sentence_segments)
    return _merge_spaces(out)


def _merge_spaces(segments: Sequence[Segment]) -> list[Segment]:
    """Move a separating space to the front of the segment it precedes, since tokens carry their space in front."""
    out: list[Segment] = []
    space = ""
    for text, weight in segments:
        if text == " ":
            space = " "
            continue
        out.append((space + text, weight))
        space = ""
    return out


def _finish(segments: Sequence[Segment], n_tokens: int) -> Document:
    """Cut to exactly ``n_tokens``, from the left: a document may begin in mid-sentence, but it ends where it ends."""
    pieces: list[str] = []
    weights: list[float] = []
    for text, weight in segments:
        found = split_pieces(text)
        pieces += found
        weights += [weight] * len(found)
    if len(pieces) < n_tokens:
        raise AssertionError(f"a document of {n_tokens} tokens was asked for and {len(pieces)} were written")
    return Document(pieces[-n_tokens:], weights[-n_tokens:])


def question_document(
    rng: Random, n_tokens: int, *, tokens_per_fact: float = TOKENS_PER_FACT, first_weight: float = COPY_WEIGHT
) -> Document:
    """Facts in filler, then questions in the paper's form; about one fact per
    ``tokens_per_fact`` tokens, at least two.

    ``first_weight`` is the loss weight of an answer's first token: the one that must be searched for by its question,
    where the others follow from the one before.

    A quarter of the documents asks once, as the evaluation does; the others ask about as much as fits in two fifths.
    """
    n_facts = max(2, round(n_tokens / tokens_per_fact * rng.uniform(0.5, 1.5)))
    facts = draw_facts(rng, n_facts, taken=set())
    rng.shuffle(facts)
    room = 0 if rng.random() < 0.25 and n_tokens >= 128 else int(0.4 * n_tokens)
    asked: list[Segment] = []
    left = n_tokens - sum(_n_pieces(_fact_segments(fact)) + 1 for fact in facts)
    used = 0
    for fact in facts:
        segments = _question_segments(fact, first_weight)
        cost = _n_pieces(segments)
        if used and (used + cost > room or used + cost > left):
            break
        asked += segments
        used += cost
    return _finish(_context(rng, facts, n_tokens - used) + asked, n_tokens)


def repeat_document(rng: Random, n_tokens: int) -> Document:
    """Lists of random words, quoted again later in the document: what repeats is predictable, what is new is not."""
    pools = (LIST_WORDS + NOUNS + ADJECTIVES, LIST_WORDS + NOUNS + ADJECTIVES, CITIES, HOBBIES, tuple("0123456789"))
    shown: list[str] = []
    out: list[Segment] = []
    used = 0
    while used < n_tokens:
        if shown and rng.random() < 0.55:
            first, _, rest = rng.choice(shown).partition(" ")
            segments = [("\nA", TEXT_WEIGHT), (f" {first}", FRESH_WEIGHT), (f" {rest}.", COPY_WEIGHT)]
        elif n_tokens >= 128 and rng.random() < 0.5:
            segments = [("\n" + filler_sentence(rng), TEXT_WEIGHT)]
        else:
            pool = rng.choice(pools)
            size = rng.randint(6, 16)
            words = [rng.choice(pool) for _ in range(size)]
            shown.append(" ".join(words))
            segments = [("\nA", TEXT_WEIGHT), (f" {shown[-1]}", FRESH_WEIGHT), (".", TEXT_WEIGHT)]
        out += segments
        used += _n_pieces(segments)
    return _finish(out, n_tokens)


def story_document(rng: Random, n_tokens: int) -> Document:
    """Filler and nothing to be asked, with lives told in passing."""
    facts = draw_facts(rng, max(1, n_tokens // 80), topics=_LIFE_TOPICS, taken=set())
    return _finish(_context(rng, facts, n_tokens), n_tokens)


def draw_document(
    rng: Random,
    n_tokens: int,
    *,
    shares: tuple[float, float, float],
    tokens_per_fact: float = TOKENS_PER_FACT,
    first_weight: float = COPY_WEIGHT,
) -> Document:
    """One training document of ``n_tokens`` tokens; ``shares`` weigh questions, repeats and stories.

    >>> len(draw_document(Random("a"), 128, shares=(0.6, 0.3, 0.1)).pieces)
    128
    """
    form = rng.choices(("questions", "repeats", "story"), weights=shares)[0]
    if form == "questions":
        return question_document(rng, n_tokens, tokens_per_fact=tokens_per_fact, first_weight=first_weight)
    return repeat_document(rng, n_tokens) if form == "repeats" else story_document(rng, n_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# What the tasks layer asks for
# ---------------------------------------------------------------------------------------------------------------------


def needles(n: int, *, seed: int) -> list[Needle]:
    """Draw ``n`` needles: a fact whose answer has 5 tokens or more, a question for it, and the answer.

    Arguments: ``n`` >= 0 needles; ``seed`` any integer. Pairs (attribute, name) are distinct until all have been used.
    Raises: :class:`LccpError` when ``n`` is negative.

    >>> first = needles(1, seed=0)[0]
    >>> first.answer in first.needle
    True
    """
    if n < 0:
        raise LccpError(f"cannot draw {n} needles: give a number from 0 upwards")
    rng = Random(f"needles-{seed}")
    pairs = [(topic, name) for topic in _LIST_TOPICS for name in NAMES]
    rng.shuffle(pairs)
    facts = [draw_fact(rng, *pairs[i % len(pairs)]) for i in range(n)]
    return [Needle(needle=fact.statement, question=fact.question, answer=fact.answer) for fact in facts]


def haystack(
    n_tokens_hint: int, *, seed: int, avoid: Sequence[Needle] = (), fact_every: float = TOKENS_PER_FACT
) -> str:
    """Write filler of at least ``n_tokens_hint`` tokens, with other facts in it, sentences separated by single spaces.

    About one fact per ``fact_every`` tokens; they share names and attributes with the needles, never both: no fact of
    the haystack has the (attribute, name) pair of a needle in ``avoid``.

    Arguments: ``n_tokens_hint`` > 0 in tokens of the organism's tokenizer; ``seed`` any integer.
    Raises: :class:`LccpError` when ``n_tokens_hint`` or ``fact_every`` is not positive.

    >>> len(split_pieces(haystack(300, seed=1))) >= 300
    True
    """
    if n_tokens_hint <= 0 or fact_every <= 0:
        raise LccpError(f"a haystack of {n_tokens_hint} tokens with a fact every {fact_every}: give positive numbers")
    rng = Random(f"haystack-{seed}")
    taken = {pair for needle in avoid for pair in _pairs_in(needle.needle)}
    out: list[str] = []
    n_tokens = 0
    recent: set[tuple[str, str]] = set(taken)
    while n_tokens < n_tokens_hint:
        facts = draw_facts(rng, 1, taken=recent) if rng.random() < 10.0 / fact_every else None
        if facts == []:  # most pairs have been told: begin again, saying new things of old names
            recent = set(taken)
        out.append(facts[0].statement if facts else filler_sentence(rng))
        n_tokens += len(split_pieces(out[-1]))
    return " ".join(out)


def _pairs_in(text: str) -> list[tuple[str, str]]:
    """The pairs a needle could be about, read off its words: every attribute with every name that occurs in it."""
    words = set(re.findall(r"[A-Za-z]+", text))
    return [(topic.attribute, name) for topic in TOPICS if topic.attribute in words for name in NAMES if name in words]
