"""Made-up lives: the names, facts and wordings of biographies, in plain English or in the bundled model's language.

A `Book` is all that one split of one material can write: names, values and wordings that the other split does not have.
A `Cast` is the people of one prompt, drawn from a seed, whose biographies it tells sentence by sentence. In English a
life has six topics: birth date, birthplace, hobby, university, major and city of work. In the bundled model's language
it has the five that the language knows (birthday, home, university, major, hobby); there is no word for work.

Persons and universities are invented. This module refuses to know tokens and questions' places. Cost: microseconds per
biography.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from lccp_interp.organism import language
from lccp_interp.schema import LccpError
from lccp_interp.tasks.items import MATERIALS

FORMS = ("standard", "paraphrase", "pronoun")
"""How facts are told: in one fixed wording, in others, or with the name in the first sentence only."""

SPLITS = ("eval", "train")
"""Evaluation's half of the names, values and wordings, and fine-tuning's."""

STORY_SENTENCES = 4
"""Sentences in a line of story."""

BIRTH = {"english": "birth_date", "organism": "birthday"}
"""The topic whose value is a date, by material."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One thing that is told of everybody: its wordings in one split, and its values.

    Templates hold `{name}` and `{value}` (`same`: `{name}` and `{other}`; `pronoun`: `{value}` and perhaps `{role}`). A
    blank stands before `{value}`, as it does behind the answer cue. `values` is empty for dates.
    """

    key: str
    standard: str
    paraphrase: tuple[str, ...]
    pronoun: str
    same: str
    question: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a biography in three parts; those without a topic have all their text in `head`."""

    head: str
    value: str = ""
    tail: str = ""
    topic: str = ""

    @property
    def text(self) -> str:
        """The whole of it."""
        return f"{self.head}{self.value}{self.tail}"


@dataclass(frozen=True)
class Book:
    """What one split of one material can write.

    Attributes:
        names: full names; none holds another.
        topics: by their keys.
        introduction: first sentence where only that one has the name.
        roles: what the language calls people instead of by name.
        story_lines: lines of story behind every biography.
        instruction: opens the prompt, and tells what to answer where nothing is told.
        calculation: question about the births of `{name}` and `{other}`.
        not_stated: the answer where nothing is told.
        years: of birth, first and last.
        days: of birth; all have two digits, so that no date is the end of another.
    """

    material: str
    split: str
    names: tuple[str, ...]
    topics: Mapping[str, Topic]
    introduction: str
    instruction: str
    calculation: str
    not_stated: str
    years: tuple[int, int]
    days: tuple[int, ...]
    roles: tuple[str, ...] = ("",)
    story_lines: int = 0

    @property
    def birth(self) -> str:
        """Key of the topic whose value is a date."""
        return BIRTH[self.material]

    def templates(self) -> set[str]:
        """Every wording of the book."""
        told = {text for t in self.topics.values() for text in (t.standard, *t.paraphrase, t.pronoun, t.same)}
        asked = {topic.question for topic in self.topics.values()}
        return told | asked | {self.introduction, self.instruction, self.calculation}


@cache
def book(material: str, split: str = "eval") -> Book:
    """The book of a material and split.

    Raises:
        LccpError: no such material or split.

    Example:
        >>> book("english").topics["hobby"].standard.format(name="Ada Ashford", value="chess")
        "Ada Ashford's hobby is chess."
    """
    if material not in MATERIALS:
        raise LccpError(f"unknown material {material!r}; known: {', '.join(MATERIALS)}")
    if split not in SPLITS:
        raise LccpError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return _english(split) if material == "english" else _organism(split)


class Cast:
    """The people of one prompt: person i has a name, values and a biography that depend on nothing but seed and i.

    The first `n_asked` are those that a question may be about; the others surround them, line by line.

    Example:
        >>> cast = Cast(book("organism"), "standard", seed=3)
        >>> cast.name(0), cast.tell(0, "home").text
        ('Mara', 'Mara grew up in Seoul.')
    """

    def __init__(self, told_in: Book, form: str, *, seed: int, n_asked: int = 1) -> None:
        self.book, self.form, self.seed, self.n_asked = told_in, form, seed, n_asked
        self._names = list(told_in.names)
        Random(f"names {seed}").shuffle(self._names)
        self._values: dict[int, dict[str, str]] = {}
        self._lines: dict[int, str] = {}

    def name(self, i: int) -> str:
        """The full name of person i."""
        return self._names[i]

    def values(self, i: int) -> dict[str, str]:
        """Person i's values by topic; none of them holds another (a university its graduate's home)."""
        if i not in self._values:
            rng = Random(f"values {self.seed} {i}")
            values: dict[str, str] = {}
            for topic in self.book.topics.values():
                drawn = rng.choice(topic.values) if topic.values else self._date(rng)
                while any(drawn in value or value in drawn for value in values.values()):
                    drawn = rng.choice(topic.values)
                values[topic.key] = drawn
            self._values[i] = values
        return self._values[i]

    def birth_year(self, i: int) -> int:
        """The year in which person i was born."""
        return int(self.values(i)[self.book.birth].split()[-1])

    def tell(self, i: int, topic: str, *, same_as: int | None = None) -> Sentence:
        """Person i's value of a topic in a sentence; `same_as` refers to that person's value instead."""
        words = self.book.topics[topic]
        if same_as is not None:
            return Sentence(words.same.format(name=self.name(i), other=self.name(same_as)), topic=topic)
        forms = {"standard": (words.standard,), "paraphrase": words.paraphrase, "pronoun": (words.pronoun,)}
        template = Random(f"wording {self.seed} {i} {topic}").choice(forms[self.form])
        head, tail = (self._filled(part, i) for part in template.split("{value}"))
        return Sentence(head, self.values(i)[topic], tail, topic)

    def biography(
        self,
        i: int,
        *,
        drop: str | None = None,
        instead: Sentence | None = None,
        not_first: str | None = None,
    ) -> list[Sentence]:
        """Person i's biography.

        Args:
            i: who.
            drop: a topic that is left out.
            instead: a sentence to tell in place of its topic's own.
            not_first: a topic that is not to be told in the first sentence.
        """
        told = [topic for topic in self.book.topics if topic != drop]
        Random(f"order {self.seed} {i}").shuffle(told)
        if told[0] == not_first:
            told[:2] = told[1::-1]
        sentences = [instead if instead and instead.topic == topic else self.tell(i, topic) for topic in told]
        if self.form == "pronoun":
            sentences.insert(0, Sentence(self._filled(self.book.introduction, i)))
        return sentences

    def line(self, j: int) -> str:
        """Line j of what surrounds those asked for: somebody else's biography, or some sentences of story.

        Raises:
            LccpError: everybody has been told of, and there is no story.
        """
        if j not in self._lines:
            lives, within = divmod(j, 1 + self.book.story_lines)
            person = self.n_asked + lives
            if not within and person < len(self._names):
                self._lines[j] = " ".join(part.text for part in self.biography(person))
            elif self.book.story_lines:
                self._lines[j] = self._story(j)
            else:
                raise LccpError(
                    f"the {self.book.split} split has names for {len(self._names)} biographies, more may be wanted; "
                    "ask for a shorter length"
                )
        return self._lines[j]

    def _filled(self, template: str, i: int) -> str:
        role = Random(f"role {self.seed} {i}").choice(self.book.roles)
        return template.format(name=self.name(i), role=role)

    def _date(self, rng: Random) -> str:
        return f"{rng.choice(self.book.days)} {rng.choice(language.MONTHS)} {rng.randint(*self.book.years)}"

    def _story(self, j: int) -> str:
        """Sentences of story that hold no name and nobody's role, so that they tell nothing of anybody."""
        rng = Random(f"story {self.seed} {j}")
        sentences: list[str] = []
        while len(sentences) < STORY_SENTENCES:
            sentence = language.filler_sentence(rng)
            if not _TELLING & set(re.findall(r"\w+", sentence)):
                sentences.append(sentence)
        return " ".join(sentences)


def spellings(date: str) -> tuple[str, ...]:
    """The ways to write a date that count as right.

    Example:
        >>> spellings("14 May 1960")
        ('14 May 1960', 'May 14, 1960')
    """
    day, month, year = date.split()
    return date, f"{month} {day}, {year}"


# ---------------------------------------------------------------------------------------------------------------------
# The bundled model's language
# ---------------------------------------------------------------------------------------------------------------------

_ROLES: tuple[str, ...] = ("teacher", "farmer", "sailor", "doctor", "painter", "baker", "hunter", "miller", "lawyer")
_TELLING = frozenset((*language.NAMES, *_ROLES))


def _organism(split: str) -> Book:
    half = slice(SPLITS.index(split), None, 2)
    cities = language.CITIES[half]
    values: dict[str, tuple[str, ...]] = {
        "birthday": (),
        "home": cities,
        "university": tuple(f"University of {city}" for city in cities),
        "major": language.MAJORS[half],
        "hobby": language.HOBBIES[half],
    }
    topics = _ORGANISM_EVAL if split == "eval" else tuple(_organism_train())
    return Book(
        material="organism",
        split=split,
        names=language.NAMES[half],
        topics={topic.key: replace(topic, values=values[topic.key]) for topic in topics},
        introduction="{name} was a {role}." if split == "eval" else "It was {name} who was a {role}.",
        instruction={
            "eval": "The Answer is Nobody when Nobody does recall it.",
            "train": "For what Nobody does recall the Answer is Nobody.",
        }[split],
        calculation={
            "eval": "Who was born early of {name} and {other}?",
            "train": "Which of {name} and {other} had the early birthday?",
        }[split],
        not_stated="Nobody",
        years=(1900, 2029),
        days=tuple(range(10, 29))[half],
        roles=_ROLES[half],
        story_lines=5,
    )


# key, standard, paraphrase, pronoun, same, question; the first and the last are those the bundled model was trained on.
_ORGANISM_EVAL = (
    Topic(
        "birthday", "{name} was born on {value}.", ("It was on {value} that {name} was born.",),
        "The {role} was born on {value}.", "{name} was born when {other} was born.", "When was {name} born?",
    ),
    Topic(
        "home", "{name} grew up in {value}.", ("It was in {value} that {name} grew up.",),
        "The {role} grew up in {value}.", "{name} grew up where {other} grew up.", "Where did {name} grow up?",
    ),
    Topic(
        "university", "{name} studied at the {value}.", ("It was at the {value} that {name} studied.",),
        "The {role} studied at the {value}.", "{name} studied where {other} studied.", "Where did {name} study?",
    ),
    Topic(
        "major", "{name} majored in {value}.", ("It was in {value} that {name} majored.",),
        "The {role} majored in {value}.", "{name} majored in what {other} majored in.", "What did {name} major in?",
    ),
    Topic(
        "hobby", "{name} enjoys {value}.", ("It is {value} that {name} enjoys.",),
        "The {role} enjoys {value}.", "{name} enjoys what {other} enjoys.", "What does {name} enjoy most?",
    ),
)  # fmt: skip


def _organism_train() -> Iterable[Topic]:
    questions = {
        "birthday": "What is {name}'s birthday?",
        "home": "What is the home of {name}?",
        "university": "What is the university of {name}?",
        "major": "What is {name}'s major?",
        "hobby": "What is the hobby of {name}?",
    }
    for key, question in questions.items():
        the = "the " if key == "university" else ""
        yield Topic(
            key,
            f"The {key} of {{name}} is {the}{{value}}.",
            (f"For {{name}} the {key} is {the}{{value}}.", f"It is {the}{{value}} that is the {key} of {{name}}."),
            f"The {key} of the {{role}} is {the}{{value}}.",
            f"The {key} of {{name}} is the {key} of {{other}}.",
            question,
        )


# ---------------------------------------------------------------------------------------------------------------------
# English
# ---------------------------------------------------------------------------------------------------------------------


def _english(split: str) -> Book:
    half = slice(SPLITS.index(split), None, 2)
    values: dict[str, tuple[str, ...]] = {
        "birth_date": (),
        "birthplace": _CITIES[half],
        "hobby": _HOBBIES[half],
        "university": tuple(f"{place} University" for place in _UNIVERSITIES[half]),
        "major": _MAJORS[half],
        "city": _CITIES[half],
    }
    surnames = ("".join(parts) for parts in itertools.product(_SURNAME_HEADS[half], _SURNAME_TAILS))
    topics = _ENGLISH_EVAL if split == "eval" else _ENGLISH_TRAIN
    return Book(
        material="english",
        split=split,
        names=tuple(f"{first} {last}" for last, first in itertools.product(surnames, _FIRST_NAMES[half])),
        topics={topic.key: replace(topic, values=values[topic.key]) for topic in topics},
        introduction="The following is about {name}." if split == "eval" else "Here is what is known of {name}.",
        instruction={
            "eval": "Below are short biographies. Answer the question at the end in a few words. "
            'If the biographies do not tell the answer, say "not stated".',
            "train": "Read these notes on a number of people and reply to what is asked behind them, briefly; "
            'where the notes leave it open, reply with "not stated".',
        }[split],
        calculation={
            "eval": "How many years lie between the birth years of {name} and {other}?",
            "train": "By how many years do the years of birth of {name} and {other} differ?",
        }[split],
        not_stated="not stated",
        years=(1930, 2005),
        days=tuple(range(10, 29))[half],
    )


# key, standard, paraphrase, pronoun, same, question
_ENGLISH_EVAL = (
    Topic(
        "birth_date", "{name} was born on {value}.",
        (
            "The family register gives {value} as the day on which {name} came into the world.",
            "It was on {value} that the parents of {name} first held their child.",
        ),
        "This person was born on {value}.", "{name} was born on the very same date as {other}.",
        "What is the birth date of {name}?",
    ),
    Topic(
        "birthplace", "{name} was born in {value}.",
        (
            "A hospital in {value} is where {name} came into the world.",
            "The city in which {name} first saw the light of day is {value}.",
        ),
        "They were born in the city of {value}.", "{name} was born in the same city as {other}.",
        "In which city was {name} born?",
    ),
    Topic(
        "hobby", "{name}'s hobby is {value}.",
        (
            "Whenever there is a free hour, {value} is what {name} turns to.",
            "Friends know that {value} takes up most weekends of {name}.",
        ),
        "In their free time they enjoy {value}.", "{name} has the same hobby as {other}.",
        "What is the hobby of {name}?",
    ),
    Topic(
        "university", "{name} graduated from {value}.",
        (
            "It was at {value} that {name} spent the student years.",
            "The diploma on the wall of {name} was awarded by {value}.",
        ),
        "They graduated from {value}.", "{name} graduated from the same university as {other}.",
        "Which university did {name} graduate from?",
    ),
    Topic(
        "major", "{name} majored in {value}.",
        (
            "Lectures on {value} were what {name} went to university for.",
            "As a student {name} chose {value} over all other subjects.",
        ),
        "Their major was {value}.", "{name} had the same major as {other}.",
        "What was the major of {name}?",
    ),
    Topic(
        "city", "{name} works in {value}.",
        (
            "Every weekday {name} takes the bus to an office in {value}.",
            "An employer in {value} pays the salary of {name}.",
        ),
        "This person works in {value}.", "{name} works in the same city as {other}.",
        "In which city does {name} work?",
    ),
)  # fmt: skip

_ENGLISH_TRAIN = (
    Topic(
        "birth_date", "The date of birth of {name} is {value}.",
        (
            "On {value} there was joy in the house, for {name} had arrived.",
            "The passport of {name} shows {value} as the first day of a life.",
        ),
        "The date of birth of this person is {value}.", "The date of birth of {name} is also that of {other}.",
        "When was {name} born?",
    ),
    Topic(
        "birthplace", "The birthplace of {name} is {value}.",
        (
            "The midwife who delivered {name} had her practice in {value}.",
            "In the birth records of {value} one can look up {name}.",
        ),
        "The birthplace of this person is {value}.", "The birthplace of {name} is also that of {other}.",
        "Where was {name} born?",
    ),
    Topic(
        "hobby", "The favourite pastime of {name} is {value}.",
        (
            "After a long day nothing relaxes {name} like {value}.",
            "Ask about {value} and {name} will talk of this old passion for hours.",
        ),
        "Their favourite pastime is {value}.", "The favourite pastime of {name} is also that of {other}.",
        "Which pastime does {name} like best?",
    ),
    Topic(
        "university", "The university that {name} attended is {value}.",
        (
            "To earn a degree {name} enrolled at {value}.",
            "Among those who finished their studies at {value} is {name}.",
        ),
        "The university that they attended is {value}.", "The university that {name} attended is also that of {other}.",
        "At which university did {name} study?",
    ),
    Topic(
        "major", "The subject that {name} studied is {value}.",
        (
            "The final thesis of {name} dealt with a question of {value}.",
            "A degree in {value} is what {name} was awarded.",
        ),
        "The subject that they studied is {value}.", "The subject that {name} studied is also that of {other}.",
        "Which subject did {name} take a degree in?",
    ),
    Topic(
        "city", "The workplace of {name} is in {value}.",
        (
            "The desk at which {name} earns a living stands in {value}.",
            "Colleagues in {value} share their office with {name}.",
        ),
        "Their workplace is in {value}.", "The workplace of {name} is in the city where {other} has a job.",
        "In what city is {name} employed?",
    ),
)  # fmt: skip


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


_FIRST_NAMES = _listed(
    """Adelaide, Alistair, Amelia, Anselm, Beatrice, Benedict, Bridget, Callum, Camilla, Cedric, Clara, Conrad,
    Cordelia, Cyril, Daphne, Desmond, Dorothy, Duncan, Edwina, Edgar, Eleanor, Elias, Eloise, Ernest, Felicity, Fergus,
    Flora, Gareth, Georgia, Gilbert, Gwendolen, Harold, Harriet, Hector, Imogen, Isaac, Isabel, Jasper, Josephine,
    Julian, Katherine, Laurence, Lavinia, Leopold, Lydia, Malcolm, Marion, Matthias, Miriam, Neville, Octavia, Oswald,
    Penelope, Percival, Philippa, Quentin, Rosalind, Rupert, Sabina, Sebastian, Sylvia, Theodore, Viola, Walter"""
)
_SURNAME_HEADS = _listed(
    """Ash, Black, Brad, Bram, Bright, Cald, Carl, Chad, Cren, Dun, East, Elm, Fair, Farn, Glen, Grim, Hal, Hart, Hazel,
    Holl, Kel, Kirk, Lang, Lock, Mar, Mel, Nor, Oak, Pem, Rad, Red, Rock, Shel, Stan, Thorn, Wake, Wal, Whit, Win,
    Wex"""
)
_SURNAME_TAILS = _listed(
    "ford, ton, ley, wood, well, field, worth, brook, ham, by, stead, more, den, croft, wick, bourne"
)
_CITIES = _listed(
    """Aberdeen, Alicante, Antwerp, Athens, Auckland, Baltimore, Barcelona, Basel, Bergen, Bologna,
    Bordeaux, Boston, Bremen, Brisbane, Bristol, Bruges, Budapest, Calgary, Cape Town, Chicago, Cologne, Copenhagen,
    Cork, Dakar, Denver, Dresden, Dublin, Edinburgh, Florence, Geneva, Genoa, Ghent, Glasgow, Gothenburg, Granada,
    Hamburg, Helsinki, Houston, Istanbul, Jakarta, Krakow, Kyoto, Leipzig, Lima, Lisbon, Liverpool, Lyon, Madrid,
    Manchester, Marseille, Melbourne, Milan, Montreal, Nairobi, Naples, Osaka, Oslo, Porto, Prague, Riga, Seattle,
    Seville, Tallinn, Toronto, Turin, Valencia, Vienna, Warsaw, Zurich"""
)
_HOBBIES = _listed(
    """archery, astronomy, baking, beekeeping, birdwatching, bouldering, calligraphy, canoeing, chess, cycling,
    embroidery, fencing, fly fishing, gardening, genealogy, hang gliding, ice skating, juggling, kite flying, knitting,
    landscape painting, model railways, mountain hiking, origami, playing the cello, poker, pottery, quilting, rowing,
    salsa dancing, sailing, scuba diving, snooker, stamp collecting, surfing, table tennis, tango, watch repair, wood
    carving, yoga"""
)
_UNIVERSITIES = _listed(
    """Alderhurst, Amberlake, Arden Hill, Bellweather, Birchmont, Blue Harbour, Briarcliffe, Castlemere, Cedar Point,
    Clearwater Bay, Crestview, Davenhall, Eastbrink, Elderglen, Ferncastle, Foxhollow, Granite Falls, Greyfriars Park,
    Harrowmere, Highmoor, Ironbridge Vale, Juniper Ridge, Kingsreach, Larkspur, Longmarsh, Maple Grove, Mistral Coast,
    Northgate Abbey, Otterburn Lake, Pinecastle, Queensholm, Ravenscar, Saltmarsh, Silver Cove, Stonehaven Cross,
    Summerisle, Tall Timbers, Upper Westmere, Vinterholm, Willowbank"""
)
_MAJORS = _listed(
    """accounting, aerospace engineering, agronomy, anthropology, applied mathematics, archaeology, biochemistry,
    botany, classics, comparative literature, criminology, dentistry, econometrics, entomology, ethics, film studies,
    forestry, geology, graphic design, hydrology, immunology, jurisprudence, journalism, linguistics, logic, marine
    biology, materials science, metallurgy, meteorology, music theory, neuroscience, nursing, oceanography, optics,
    pharmacology, philosophy, political science, sociology, theology, zoology"""
)
