"""What the conversations of `mrcr` are made of: requests, and pieces of writing that answer them.

A `Writing` is one material (English, or the language of the bundled model) in one split. Evaluation and training share
no form, no topic, no person, no request wording and, in English, no sentence template; what they share are common
nouns, adjectives, places and days (and in the bundled model's language its few sentence forms). Pieces are drawn line
by line from templates, so the pieces of one request resemble each other as siblings do: behind the right hash, a wrong
sibling is graded 0.10 on average in English and 0.40 in the bundled model's language (at most 0.7 in 1,050 pairs each).

This module refuses to know tokens and conversations. Cost: microseconds per piece.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from string import ascii_letters, digits
from typing import Literal

from lccp_interp.organism import language
from lccp_interp.schema import LccpError
from lccp_interp.tasks.items import MATERIALS

Split = Literal["eval", "train"]
SPLITS: tuple[Split, ...] = ("eval", "train")

HASH_CHARACTERS = 10
"""Length of the string that the answer begins with; as in OpenAI's MRCR."""


@dataclass(frozen=True)
class Form:
    """A kind of writing: one of `openings`, `n_lines` different ones of `lines`, one of `closings`."""

    name: str
    openings: tuple[str, ...]
    lines: tuple[str, ...]
    closings: tuple[str, ...]
    n_lines: int = 4
    joint: str = " "


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


_EVAL_FORMS = (
    Form(
        "poem",
        _lines("""O {adjective} {topic} beside the {thing},
            I dreamt of {topic} all in {colour},
            Who sang to the {topic} of {place}?"""),
        _lines("""they wake when the {thing} grows {adjective},
            and {person} hums to a {adjective} {thing};
            the wind of {place} has carried them {number} miles,
            {colour} as the {thing}, {colour} as the {thing},
            no {thing} can tell what the {thing} forgot,
            a {adjective} light lies over the {thing},
            and {day} goes by like a {adjective} {thing},
            under the {thing} they wait for {person},"""),
        _lines("""and that is the song of the {topic}.
            sleep, {adjective} {topic}, till {day}.
            so {person} keeps the {topic} still."""),
        joint="\n",
    ),
    Form(
        "letter",
        _lines("""Dear {person}, I must tell you about the {topic} of {place}.
            Dear {person}, you asked me in {month} about my {topic}.
            Dear {person}, the {topic} have come to {place} at last."""),
        _lines("""On {day} I put {number} of them next to the {adjective} {thing}.
            My neighbour {person} wants to trade a {thing} for the {colour} ones.
            The {thing} you sent me is {adjective}, and so is the {thing}.
            We shall travel to {place} by {month} if the {thing} holds.
            Tell {person} that the {adjective} {thing} is still in the {thing}.
            It cost me {number} coins and a {colour} {thing}.
            Nobody here has forgotten the {thing} of {person}.
            I keep the {colour} {thing} under the {adjective} {thing}."""),
        _lines("""Write soon, yours, {person}.
            With love from {place}, {person}.
            Your {adjective} friend, {person}."""),
    ),
    Form(
        "recipe",
        _lines("""Biscuits in the shape of {topic}, as baked in {place}.
            A {adjective} pie for friends of {topic}, after {person}.
            Soup to be served with {topic} on a {day}."""),
        _lines("""Take {number} spoons of {colour} flour and a {adjective} bowl.
            Stir for {number} minutes with the {thing} of a baker.
            Leave it under a {thing} until it looks {adjective}.
            Add {number} drops of honey from {place}.
            Cover the dough with a {colour} cloth and a {thing}.
            Heat the oven until the {thing} turns {colour}.
            Press a {thing} into the middle, then a {adjective} {thing}.
            Wash the {thing} in cold water from {place}."""),
        _lines("""Serve it to {number} guests beside a {adjective} {thing}.
            It keeps until {day} in a {colour} {thing}.
            {person} likes it best in {month}."""),
    ),
    Form(
        "news item",
        _lines("""{place}, in {month}: the {topic} are back in the news.
            The council of {place} voted about {topic} on {day}.
            Thieves have taken {number} {topic} from a {thing} in {place}."""),
        _lines("""A witness, {person}, saw a {colour} {thing} near the station.
            The damage is put at {number} coins and one {adjective} {thing}.
            Traffic towards {place} stood still behind a {adjective} {thing}.
            The mayor called the {thing} a {adjective} surprise.
            A spokesman pointed to a {thing} that was {adjective} in {month}.
            Police found {number} boxes and a {colour} {thing}.
            Schools in {place} will stay closed until {day}.
            Experts led by {person} measured the {thing} again."""),
        _lines("""The inquiry goes on in {place}.
            A vote is due on {day}.
            {person} would not comment."""),
    ),
    Form(
        "blog post",
        _lines("""Why I changed my mind about {topic}, by {person}.
            There are {number} things that nobody told you about {topic}.
            A weekend in {place} with nothing but {topic}."""),
        _lines("""First, get yourself a {adjective} {thing}; mine is {colour}.
            My old {thing} broke on {day}, so I learned this the hard way.
            People in {place} swear by the {adjective} {thing}.
            I asked {person}, who has tried {number} of them.
            If your {thing} is {adjective}, wait until {month}.
            Here is the trick: never mix a {thing} with a {colour} {thing}.
            It took me {number} days and a {adjective} {thing} to see it.
            Somebody in {place} sold me the {thing} for {number} coins."""),
        _lines("""What is your {adjective} {thing}? Tell me below.
            Next week: the {thing} of {person}.
            See you on {day}, friends."""),
    ),
)

_TRAIN_FORMS = (
    Form(
        "riddle",
        _lines("""What do {topic} and a {adjective} {thing} have in common?
            I am cousin to the {topic} and live behind a {thing}."""),
        _lines("""Cut me in {number} and I become a {colour} {thing}.
            In {month} I am {adjective}, later I am a {thing}.
            Ask {person}, who lost me in {place}.
            Neither {thing} nor {thing}, though {colour} all over.
            {person} carried me {number} times round a {thing}.
            Without a {adjective} {thing} I stay silent."""),
        _lines("""Name me before {day}.
            Who am I, {person}?"""),
        n_lines=3,
    ),
    Form(
        "speech",
        _lines("""Citizens of {place}, our {topic} deserve better.
            Friends, let me begin with {topic} and end with hope."""),
        _lines("""For {number} years the {adjective} {thing} has stood among us.
            I remember {person} raising a {colour} {thing} to the crowd.
            They promised us a {thing}; they gave us a {adjective} {thing}.
            From {place} to {place} the call is heard.
            By {month} we will have built {number} of them.
            Let no {thing} divide us, however {adjective}."""),
        _lines("""Long live {place}, and thank you.
            Vote for {person} this {day}."""),
        n_lines=3,
    ),
    Form(
        "diary entry",
        _lines("""{day}. Again those {topic}, again no sleep.
            {month}, evening. Counted {number} {topic} from my bed."""),
        _lines("""Breakfast with {person}, who spoke of a {adjective} {thing} only.
            Found the {colour} {thing} that I had hidden in {place}.
            Rain all day, the {thing} is {adjective}.
            Must remember to give {person} back the {thing}.
            Walked {number} steps to the {thing} and turned round.
            Am I becoming {adjective}, like the {thing}?"""),
        _lines("""To bed at {number}.
            Enough for today, {place} can wait."""),
        n_lines=3,
    ),
    Form(
        "postcard",
        _lines("""Greetings from {place}, where {topic} are everywhere!
            Hello {person}, thinking of you among the {topic}."""),
        _lines("""Our room has a {thing} with a view of a {colour} {thing}.
            Swam {number} times, saw one {adjective} {thing}.
            {person} bought a {thing} and regrets it.
            The food is {adjective}, the {thing} even more so.
            We leave for {place} after {day}.
            Please water the {colour} {thing}."""),
        _lines("""Kisses, {person}.
            Back in {month}!"""),
        n_lines=3,
    ),
    Form(
        "fairy tale",
        _lines("""Once upon a time {number} {topic} lived under a {thing}.
            There was a king in {place} who feared {topic}."""),
        _lines("""A witch called {person} turned them into a {adjective} {thing}.
            Every {day} the {thing} wept {colour} tears.
            Then came {person} with nothing but a {thing}.
            Three wishes were granted, all of them {adjective}.
            The road to {place} was guarded by a {colour} {thing}.
            For {number} nights the {thing} would not open."""),
        _lines("""And they lived in {place} ever after.
            That is why a {thing} is {colour} to this day."""),
        n_lines=3,
    ),
)

_TOPICS = _words("""tapirs rocks lanterns bicycles umbrellas clouds violins pumpkins otters bridges candles volcanoes
    beetles trains mushrooms lighthouses penguins hammocks glaciers kites turtles castles dragons buttons owls windmills
    pancakes islands robots teapots foxes comets puddles mirrors walruses gardens clocks feathers submarines snowmen
    ravens acorns carpets fountains lizards tunnels balloons cactuses hedgehogs pianos blankets spiders ladders
    dolphins pebbles ghosts chimneys sunflowers camels whistles zebras maps swings icicles badgers drums ferns wells
    moths skates barns lemons parrots chairs rainbows anvils squirrels scarves moons boats""")
_PERSONS = _words("""Amelia Bruno Celeste Dmitri Eleanor Farouk Giselle Henrik Imogen Jasper Katya Leopold Marigold
    Nikolai Ophelia Percival Quentin Rosalind Sebastian Theodora Ulrich Valentina Wilfred Ximena Yusuf Zelda""")
_POOLS = {  # none begins with a vowel: the templates write "a"
    "adjective": _words("""gentle stubborn hollow brittle curious patient crooked splendid weary nimble drowsy humble
        fearless sleepy polite shabby dazzling frozen secret noisy tender foggy solemn rusty merry pale clumsy
        restless majestic timid"""),
    "thing": _words("""kettle ladder harbour cushion lantern trumpet suitcase pillow chandelier wardrobe saddle
        compass barrel doorstep notebook thimble cradle staircase wheelbarrow cupboard telescope bucket meadow
        bookshelf sparrow hammer bonfire scarecrow gate basket lamp chimney violin fountain parcel bell"""),
    "colour": _words("crimson violet turquoise scarlet golden silver copper grey black yellow pink brown"),
    "place": _words("""Lisbon Bergen Tallinn Marrakesh Quito Kyoto Dundee Valparaiso Odessa Zanzibar Galway Trieste
        Winnipeg Hobart Cusco Bruges Nairobi Savannah Reykjavik Cadiz"""),
    "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": language.MONTHS,
    "number": tuple(str(number) for number in range(3, 98)),
}

_ORGANISM_FORMS = {
    "eval": ("song", "recipe", "route", "schedule", "slogan"),
    "train": ("motto", "riddle", "journey", "programme", "tour"),
}
_ORGANISM_WORDS = language.LIST_WORDS + language.NOUNS + language.ADJECTIVES


@dataclass(frozen=True)
class Writing:
    """Requests and pieces of one material in one split.

    `forms` and `topics` are what can be asked for; `request` and `question` are templates, `labels` name the speakers
    where the conversation is written as plain text, and `stop` ends an answer there.
    """

    material: str
    forms: tuple[str, ...]
    topics: tuple[str, ...]
    persons: tuple[str, ...]
    request_form: str
    question_form: str
    labels: tuple[str, str]
    stop: tuple[str, ...]
    hash_alphabet: str
    hash_openings: str
    templates: tuple[Form, ...] = ()

    def request(self, form: str, topic: str) -> str:
        """What the user says to get a piece."""
        return self.request_form.format(form=form, topic=topic)

    def question(self, prepend: str, index: int, form: str, topic: str) -> str:
        """What the user says in the end; `index` counts from 1."""
        return self.question_form.format(prepend=prepend, index=index, ordinal=ordinal(index), form=form, topic=topic)

    def draw_hash(self, rng: Random) -> str:
        """A random string that the answer has to begin with."""
        rest = [rng.choice(self.hash_alphabet) for _ in range(HASH_CHARACTERS - 1)]
        return rng.choice(self.hash_openings) + "".join(rest)

    def draw_piece(self, rng: Random, form: str, topic: str) -> str:
        """A piece of writing; two draws differ almost always, and the caller makes sure."""
        if not self.templates:
            words = " ".join(rng.sample(_ORGANISM_WORDS, 6))
            sentence = language.filler_sentence(rng)
            while set(re.findall(r"\w+", sentence)) & (set(language.NAMES) - set(self.persons)):
                sentence = language.filler_sentence(rng)
            return f"The {words}. {sentence}"
        template = next(template for template in self.templates if template.name == form)
        chosen = [
            rng.choice(template.openings),
            *rng.sample(template.lines, template.n_lines),
            rng.choice(template.closings),
        ]
        return template.joint.join(self._filled(rng, line, topic) for line in chosen)

    def _filled(self, rng: Random, line: str, topic: str) -> str:
        def draw(slot: re.Match[str]) -> str:
            name = slot[1]
            if name == "topic":
                return topic
            return rng.choice(self.persons if name == "person" else _POOLS[name])

        return re.sub(r"\{(\w+)\}", draw, line)


def writing(material: str, split: str = "eval") -> Writing:
    """Everything that a conversation of `material` says in `split`.

    Raises:
        LccpError: an unknown material or split.

    Example:
        >>> writing("english").request("poem", "tapirs")
        'Write a poem about tapirs.'
        >>> print(writing("english").draw_piece(Random("a"), "recipe", "tapirs").split(".")[0])
        A majestic pie for friends of tapirs, after Sebastian
    """
    if material not in MATERIALS:
        raise LccpError(f"unknown material {material!r}; known: {', '.join(MATERIALS)}")
    if split not in SPLITS:
        raise LccpError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    half = SPLITS.index(split)
    if material == "organism":
        # The bundled model reads turns as questions and answers; its hashes are digits, which are tokens of their own.
        return Writing(
            material,
            forms=_ORGANISM_FORMS[split],
            topics=language.NAMES[half::2],
            persons=language.NAMES[half::2],
            request_form=("Please give me a {form} for {topic}.", "Tell me a {form} of {topic}.")[half],
            question_form=(
                "Please give me exactly {prepend} and then the {form} {index} for {topic}.",
                "Tell me {prepend} with the {form} of {topic} that was {index}.",
            )[half],
            labels=("Question", "Answer"),
            stop=("\n",),
            hash_alphabet=digits,
            hash_openings=_half(digits, half),
        )
    return Writing(
        material,
        forms=tuple(form.name for form in (_EVAL_FORMS, _TRAIN_FORMS)[half]),
        topics=_TOPICS[half::2],
        persons=_PERSONS[half::2],
        request_form=("Write a {form} about {topic}.", "Could you compose a {form} on the subject of {topic}?")[half],
        question_form=(
            "Prepend {prepend} to the {ordinal} (1 indexed) {form} about {topic}. "
            "Do not include any other text in your response.",
            "Repeat {form} number {index} on the subject of {topic}, counting from one, with {prepend} put directly "
            "in front of it and nothing else.",
        )[half],
        labels=("User", "Assistant"),
        stop=("\nUser:",),
        hash_alphabet=ascii_letters + digits,
        hash_openings=_half(ascii_letters + digits, half),
        templates=(_EVAL_FORMS, _TRAIN_FORMS)[half],
    )


def ordinal(number: int) -> str:
    """1st, 2nd, ... for 1 to 20.

    Example:
        >>> [ordinal(number) for number in (1, 2, 3, 4, 8)]
        ['1st', '2nd', '3rd', '4th', '8th']
    """
    return f"{number}{({1: 'st', 2: 'nd', 3: 'rd'}).get(number, 'th')}"


def _half(characters: Sequence[str], half: int) -> str:
    return "".join(characters[half::2])
