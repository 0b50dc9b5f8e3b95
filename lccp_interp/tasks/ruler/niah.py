"""RULER-style needles in haystacks: the eight subsets whose name begins with `niah_`.

| subset | haystack | keys | values | asked for |
| --- | --- | --- | --- | --- |
| `niah_single_1` | the same five sentences again and again | 1 | numbers | the value |
| `niah_single_2` | text | 1 | numbers | the value |
| `niah_single_3` | text | 1 | UUIDs | the value |
| `niah_multikey_1` | text | 4 | numbers | one key's value |
| `niah_multikey_2` | needles | as many as fit | numbers | one key's value |
| `niah_multikey_3` | needles with UUIDs for keys | as many as fit | UUIDs | one key's value |
| `niah_multivalue` | text | 1 | 4 numbers | all four |
| `niah_multiquery` | text | 4 | numbers | all four |

In the organism's language a needle is a fact with a name for its key: "The code of Mara is 741093."; lists of words
stand for UUIDs. It has no more than some hundred such facts per split, so where needles are the haystack they are facts
of all kinds that are lists, those of the right kind first, and from about 4000 tokens on they repeat.

This module refuses to know tokens. Cost: a few milliseconds per 10K tokens of needles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from lccp_interp.organism import language
from lccp_interp.tasks.ruler.setting import Sample, Setting, cycled, hidden, listed, message

BUDGET = 128
"""Answer budget of RULER's needle tasks, tokens."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's noise, one line of it."""
TRAIN_NOISE = "Snow fell on roofs. Clouds were passing. Somebody hummed. Nothing else happened. So it went on."
ORGANISM_NOISE = {
    "eval": "It was golden and the river moved the stone. Nobody opened the barrel that was in the market.",
    "train": "In March the lamp crossed the village twice. The quiet horse watched the wagon near the mill.",
}

N_DEPTHS = 40
"""Needles stand at different ones of so many evenly spaced depths (RULER's number)."""

# How much context a needle takes at least, in tokens: bounds how many distractors are drawn.
_TOKENS_PER_NEEDLE = {"numbers": 10, "uuids": 30}
_TOKENS_PER_FACT = 8


@dataclass(frozen=True)
class Wording:
    """How one split speaks of needles; `kind` is a word such as number, `kinds` its plural."""

    statement: str
    opening: str
    openings: str
    question: str
    questions: str
    prefix: str
    prefixes: str


WORDINGS = {
    "eval": Wording(
        statement="One of the special magic {kinds} for {key} is: {value}.",
        opening="A special magic {kind} is hidden in the text below. Read it with care: it comes up later.",
        openings="Some special magic {kinds} are hidden in the text below. Read it with care: they come up later.",
        question="What is the special magic {kind} for {keys} mentioned in the provided text?",
        questions="What are all the special magic {kinds} for {keys} mentioned in the provided text?",
        prefix=" The special magic {kind} for {keys} mentioned in the provided text is",
        prefixes=" The special magic {kinds} for {keys} mentioned in the provided text are",
    ),
    "train": Wording(
        statement="Under {key} a clerk has entered {value}.",
        opening="Among these lines a clerk has made an entry. You will need its {kind}.",
        openings="Among these lines a clerk has made entries. You will need their {kinds}.",
        question="Which {kind} did that clerk enter under {keys}?",
        questions="Which {kinds} did that clerk enter under {keys}?",
        prefix=" Entered under {keys}:",
        prefixes=" Entered under {keys}:",
    ),
}

ORGANISM_WORDINGS = {
    "eval": (
        "The {attribute} of {key} is {value}.",
        "What is the {attribute} of {keys}?",
        "What are the {attribute} of {keys}?",
    ),
    "train": (
        "{key}'s {attribute} is {value}.",
        "Which {attribute} does {keys} have?",
        "Which {attribute} have {keys}?",
    ),
}
"""Statement, question for one value, question for several; two of the first three are forms of `language.TOPICS`."""


def write_niah(setting: Setting) -> Sample:
    """A sample of any subset `niah_*`."""
    subset = setting.subset.removeprefix("niah_")
    n_keys = 4 if subset in ("multikey_1", "multiquery") else 1
    n_values = 4 if subset == "multivalue" else 1
    n_asked = 4 if subset == "multiquery" else 1
    kind = "uuids" if subset in ("single_3", "multikey_3") else "numbers"
    of_needles = subset in ("multikey_2", "multikey_3")
    facts = (_OrganismFacts if setting.organism else _EnglishFacts)(setting, kind)
    if of_needles:
        asked_one, *others = facts.many(2 + setting.length // facts.tokens_per_needle)
        needles = [[asked_one]]
        distractors = [statement for _, _, statement in others]
    else:
        needles = facts.some(n_keys, n_values)
    evidence = {statement for group in needles[:n_asked] for _, _, statement in group}
    placed = [(statement, statement in evidence) for group in needles for _, _, statement in group]
    setting.rng.shuffle(placed)
    # A key's values are answered in the order in which they stand.
    order = [statement for statement, _ in placed]
    asked = [sorted(group, key=lambda fact: order.index(fact[2])) for group in needles[:n_asked]]
    depths = _depths(setting, len(placed))
    values = [value for group in asked for _, value, _ in group]
    asked_keys = [group[0][0] for group in asked]
    opening, question, prefix = facts.asking(asked_keys, len(values))

    def context(n: int) -> list[str]:
        if of_needles:
            return cycled(distractors, n)
        return [facts.noise] * n if subset == "single_1" else setting.sentences(n)

    glue = "\n" if of_needles or subset == "single_1" else " "
    return Sample(
        write=lambda n: message(opening, hidden(context(n), placed, depths), question, glue=glue),
        answer_prefix=prefix,
        references=tuple(values),
        target=facts.answer(values),
        max_new_tokens=facts.budget,
    )


def _depths(setting: Setting, n: int) -> list[float]:
    return sorted(place / (N_DEPTHS - 1) for place in setting.rng.sample(range(N_DEPTHS), n))


Fact = tuple[str, str, str]
"""Key, value, and the statement of both."""


class _EnglishFacts:
    """Keys and values as RULER has them: compounds and UUIDs, seven digits and UUIDs."""

    budget = BUDGET

    def __init__(self, setting: Setting, kind: str) -> None:
        self._setting = setting
        self._words = WORDINGS[setting.split]
        self._kind = kind
        self.tokens_per_needle = _TOKENS_PER_NEEDLE[kind]
        self.noise = NOISE if setting.split == "eval" else TRAIN_NOISE

    def some(self, n_keys: int, n_values: int) -> list[list[Fact]]:
        """For each of some keys its facts."""
        values = self._values(n_keys * n_values)
        return [
            [self._fact(key, value) for value in values[at * n_values : (at + 1) * n_values]]
            for at, key in enumerate(self._setting.keys(n_keys))
        ]

    def many(self, n: int) -> list[Fact]:
        """`n` facts of different keys (fewer where there are not so many), the one to ask for first."""
        keys = self._values(n) if self._kind == "uuids" else self._setting.keys(n)
        return [self._fact(key, value) for key, value in zip(keys, self._values(len(keys)), strict=True)]

    def asking(self, keys: Sequence[str], n_values: int) -> tuple[str, str, str]:
        """Opening, question and answer prefix."""
        words = self._words
        forms = (words.opening, words.question, words.prefix)
        if n_values > 1:
            forms = (words.openings, words.questions, words.prefixes)
        fields = {"kind": self._kind[:-1], "kinds": self._kind, "keys": listed(keys)}
        opening, question, prefix = (form.format(**fields) for form in forms)
        return opening, f"\n{question}", prefix

    def answer(self, values: Sequence[str]) -> str:
        """The values as they follow the prompt."""
        return f" {listed(values)}."

    def _values(self, n: int) -> list[str]:
        draw: Callable[[], str] = self._uuid if self._kind == "uuids" else lambda: self._setting.number(7)
        return self._setting.different(draw, n)

    def _uuid(self) -> str:
        return str(UUID(int=self._setting.rng.getrandbits(128), version=4))

    def _fact(self, key: str, value: str) -> Fact:
        return key, value, self._words.statement.format(kinds=self._kind, key=key, value=value)


class _OrganismFacts:
    """Facts of the organism's language: codes (and other numbers) of people, and lists of words in place of UUIDs."""

    # Four codes, the words between them and a full stop; a list of six words needs less.
    budget = 32
    tokens_per_needle = _TOKENS_PER_FACT

    def __init__(self, setting: Setting, kind: str) -> None:
        self._setting = setting
        self._statement, self._question, self._questions = ORGANISM_WORDINGS[setting.split]
        kinds = ("words", "cities", "hobbies") if kind == "uuids" else ("digits", "date")
        self._topics = [topic for topic in _LIST_TOPICS if topic.kind in kinds]
        self._others = [topic for topic in _LIST_TOPICS if topic not in self._topics]
        self._asked = setting.rng.choice([topic for topic in self._topics if topic.kind == kinds[0]])
        self.noise = ORGANISM_NOISE[setting.split]

    def some(self, n_keys: int, n_values: int) -> list[list[Fact]]:
        """For each of some names its facts, all of one topic."""
        values = self._setting.different(lambda: self._value(self._asked), n_keys * n_values)
        return [
            [self._fact(self._asked, name, value) for value in values[at * n_values : (at + 1) * n_values]]
            for at, name in enumerate(self._setting.keys(n_keys))
        ]

    def many(self, n: int) -> list[Fact]:
        """Up to `n` facts, the one to ask for first, then others of its kind, then those of other kinds."""
        asked = (self._asked, self._setting.keys(1)[0])
        pairs = [asked]
        for topics in (self._topics, self._others):
            more = [(t, name) for t in topics for name in self._setting.half(language.NAMES) if (t, name) != asked]
            pairs += self._setting.rng.sample(more, len(more))
        return [self._fact(t, name, self._setting.drawn(partial(self._value, t))) for t, name in pairs[:n]]

    def asking(self, keys: Sequence[str], n_values: int) -> tuple[str, str, str]:
        """Opening (none), question and answer prefix."""
        form = self._question if n_values == 1 else self._questions
        question = form.format(attribute=self._asked.attribute, keys=" and ".join(keys))
        return "", f"\nQuestion: {question}", "\nAnswer:"

    def answer(self, values: Sequence[str]) -> str:
        """The values as they follow the prompt."""
        return f" {' and '.join(values)}."

    def _value(self, topic: language.Topic) -> str:
        rng, half = self._setting.rng, self._setting.half
        if topic.kind == "digits":
            return "".join(rng.choice("0123456789") for _ in range(6))
        if topic.kind == "date":
            return f"{rng.randint(1, 28)} {rng.choice(language.MONTHS)} {rng.randint(1900, 2029)}"
        if topic.kind == "words":
            return " ".join(rng.sample(half(language.LIST_WORDS + language.NOUNS + language.ADJECTIVES), 6))
        return " ".join(rng.sample(half({"cities": language.CITIES, "hobbies": language.HOBBIES}[topic.kind]), 5))

    def _fact(self, topic: language.Topic, name: str, value: str) -> Fact:
        return name, value, self._statement.format(attribute=topic.attribute, key=name, value=value)


# The attributes that are told as "The code of Mara is ...".
_LIST_TOPICS = [topic for topic in language.TOPICS if topic.questions == language.TOPICS[0].questions]
