"""RULER-style question answering (`qa`): one document has the answer, all others distract.

RULER asks SQuAD's and HotpotQA's questions, whose data is not here. A user's own questions (`read_questions`) are asked
in the same way: their documents among those of other questions. Without any, documents are made up: in English short
articles about towns that do not exist, in the organism's language lives of its people and, when all have been told,
stories about nobody.

Users' questions are asked in their order. They fall to the two splits by their first document, so that questions about
the same one are in the same; distractors come from the question's own split, and begin again behind their end, as
RULER's do. This module refuses to know tokens. Cost: a
few milliseconds per 10K tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from lccp_interp.organism import language
from lccp_interp.schema import LccpError
from lccp_interp.tasks.filler import ADJECTIVES, NOUNS
from lccp_interp.tasks.items import Piece, derived_seed
from lccp_interp.tasks.ruler.questions import UserQuestion
from lccp_interp.tasks.ruler.setting import SPLITS, Sample, Setting, cycled, hidden

BUDGET = 32
"""Answer budget of RULER's question answering, tokens."""
# A date has seven tokens.
ORGANISM_BUDGET = 12


@dataclass(frozen=True)
class Wording:
    """How one split speaks of documents."""

    opening: str
    document: str
    closing: str
    question: str
    prefix: str


WORDINGS = {
    "eval": Wording(
        opening="Answer the question from the documents below. Give the answer alone, without any other words.",
        document="Document {number}:",
        closing="\n\nAnswer the question from the documents above. Give the answer alone, without any other words.",
        question="\n\nQuestion: {question}",
        prefix=" Answer:",
    ),
    "train": Wording(
        opening="Some notes follow. Look the matter up in them.",
        document="Note {number}",
        closing="\n\nThe notes end here. A short reply will do.",
        question="\n\nAsked: {question}",
        prefix=" Reply:",
    ),
}

TOWN_STATEMENTS = {
    "eval": {
        "river": "{town} is a small town on the river {river}.",
        "founder": "It was founded by {founder}",
        "year": " in the year {year}.",
        "craft": "Its people make {craft}, which are sold as far as the coast.",
        "market": "On {day} there is a market below {landmark}.",
    },
    "train": {
        "river": "The settlement of {town} lies along a water called {river}.",
        "founder": "{founder} laid the first stone",
        "year": " there in {year}.",
        "craft": "From the workshops come {craft}.",
        "market": "Farmers meet on {day} beside {landmark}.",
    },
}
TOWN_QUESTIONS = {
    "eval": {
        "river": "Which river flows through {town}?",
        "founder": "Who founded {town}?",
        "year": "In which year was {town} founded?",
        "craft": "What do the people of {town} make?",
    },
    "train": {
        "river": "Along what water does {town} lie?",
        "founder": "Name whoever laid the first stone at {town}.",
        "year": "When did somebody lay the first stone of {town}?",
        "craft": "What comes from the workshops of {town}?",
    },
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# What may be asked; the market is told for length.
_ASKED = ("river", "founder", "year", "craft")

REGIONS = ("", "Great ", "High ", "Little ", "Lower ", "Market ", "New ", "North ", "Old ", "South ", "Upper ", "West ")
TOWN_STEMS = _words(
    """Alder Amber Ash Bar Birch Black Bram Brock Bur Cal Carl Clay Cold Crow Dal Dun Elm Fair Farn Fen Fox Glen Grims
    Hart Hazel Heather Hol Iver Ken Lang Lin Mar Mel Mill Nor Oak Pen Quar Raven Red Ros Sal Sand Stan Sten Thorn Tor
    Wal Wen Whit"""
)
TOWN_ENDS = _words(
    "beck borough bourne bridge by cliff combe cote dale field ford gate ham hurst ley mere minster mouth ness stead "
    "stow thorpe ton wick"
)
RIVERS = _words(
    """Aune Belm Carrow Derl Dove Eskar Fallow Gaunt Greer Harl Isk Jarrow Kell Lorn Loud Marl Nadd Orm Pell Quell Rime
    Sarn Sevel Tamble Tarn Ull Vane Weld Yarr Yeld"""
)
FOUNDERS = _words(
    "Ada Agnes Basil Cedric Daphne Edgar Flora Godfrey Hester Ivo Judith Lambert Maud Oswald Rosamund Wilfred"
)
FAMILIES = _words(
    """Ashby Barrow Colby Denham Elton Fanshaw Garrick Holt Ingram Jessop Kendrick Lovell Marchant Norwood Osgood Pryor
    Quint Radley Selwyn Tuttle Underhill Vickers Wainwright Yardley"""
)
CRAFTS = _words(
    """baskets beads bells bowls boxes bridles brushes buckles buttons candlesticks chairs clocks combs cups dolls fans
    flutes gloves hats jugs kites ladders masks mugs pipes plates shoes spoons toys trays vases whistles"""
)
MATERIALS = _words("brass chalk clay cork felt glass horn leather linen oak paper pewter slate straw tin wool")

DAYS = ("Mondays", "Tuesdays", "Wednesdays", "Thursdays", "Fridays", "Saturdays")

_LIFE = ("birthday", "home", "university", "major", "hobby")
_TOPICS = {topic.attribute: topic for topic in language.TOPICS if topic.attribute in _LIFE}
ORGANISM_FORMS = {
    # Statement and question per attribute; those of the first split are the ones that the bundled model has read.
    "eval": {name: (f"{topic.statements[0]} {{value}}.", topic.questions[0]) for name, topic in _TOPICS.items()},
    "train": {name: (f"{{name}}'s {name} is {{value}}.", f"Which {name} does {{name}} have?") for name in _TOPICS},
}
_SENTENCES_PER_STORY = 4
# Tokens that a document takes at least: bounds how many are written.
_TOKENS_PER_DOCUMENT = {"english": 30, "organism": 20}


def write_qa(setting: Setting) -> Sample:
    """A sample of `qa`."""
    if setting.questions:
        question, gold, distractors = _asked_by_the_user(setting)
    elif setting.organism:
        question, gold, distractors = _organism_lives(setting)
    else:
        question, gold, distractors = _towns(setting)
    depths = sorted(setting.rng.random() for _ in gold)
    evidence = [(document, True) for document in gold]

    def write(n: int) -> list[Piece]:
        # Size n has n - 1 documents beside those with the answer.
        documents = hidden(cycled(distractors, n - 1), evidence, depths)
        return _organism_message(question, documents) if setting.organism else _message(setting, question, documents)

    return Sample(
        write=write,
        answer_prefix="\nAnswer:" if setting.organism else WORDINGS[setting.split].prefix,
        references=question.answers,
        target=f" {min(question.answers, key=len)}" + ("." if setting.organism else ""),
        max_new_tokens=ORGANISM_BUDGET if setting.organism else BUDGET,
        grader="string_match_part",
    )


def _message(setting: Setting, question: UserQuestion, documents: Sequence[tuple[str, bool]]) -> list[Piece]:
    words = WORDINGS[setting.split]
    pieces = [Piece(words.opening)]
    for number, (document, evidence) in enumerate(documents, start=1):
        # Number and document apart: each is encoded once, wherever the document stands.
        pieces += [Piece(f"\n\n{words.document.format(number=number)}"), Piece(f"\n{document}", evidence)]
    return [*pieces, Piece(words.closing), Piece(words.question.format(question=question.question))]


def _organism_message(question: UserQuestion, documents: Sequence[tuple[str, bool]]) -> list[Piece]:
    pieces = [Piece(("\n" if at else "") + document, evidence) for at, (document, evidence) in enumerate(documents)]
    return [*pieces, Piece(f"\nQuestion: {question.question}")]


def _asked_by_the_user(setting: Setting) -> tuple[UserQuestion, Sequence[str], Sequence[str]]:
    mine = [q for q in setting.questions if SPLITS[derived_seed("split", q.documents[0]) % 2] == setting.split]
    question = mine[setting.index % len(mine)] if mine else setting.questions[0]
    others = dict.fromkeys(document for other in mine for document in other.documents)
    distractors = [document for document in others if document not in question.documents]
    if not distractors:
        raise LccpError(
            f"{len(mine)} of {len(setting.questions)} questions belong to the split {setting.split!r}, and no document "
            "of theirs is left to distract; give questions about more documents"
        )
    return question, question.documents, setting.rng.sample(distractors, len(distractors))


def _towns(setting: Setting) -> tuple[UserQuestion, Sequence[str], Sequence[str]]:
    rng, half = setting.rng, setting.half
    places = list(product(REGIONS, half(TOWN_STEMS), half(TOWN_ENDS)))
    n_documents = 2 + setting.length // _TOKENS_PER_DOCUMENT["english"]
    towns = ["".join(place) for place in rng.sample(places, min(n_documents, len(places)))]
    statements = TOWN_STATEMENTS[setting.split]
    documents, facts = [], []
    for town in towns:
        fact = {
            "town": town,
            "river": rng.choice(half(RIVERS)),
            "founder": f"{rng.choice(half(FOUNDERS))} {rng.choice(half(FAMILIES))}",
            "year": setting.drawn(lambda: str(rng.randint(1000, 1899))),
            "craft": f"{rng.choice(half(MATERIALS))} {rng.choice(half(CRAFTS))}",
            "day": rng.choice(DAYS),
            "landmark": f"the {rng.choice(half(ADJECTIVES))} {rng.choice(half(NOUNS))}",
        }
        facts.append(fact)
        documents.append("{river} {founder}{year} {craft} {market}".format(**statements).format(**fact))
    asked = rng.choice(_ASKED)
    text = TOWN_QUESTIONS[setting.split][asked].format(town=towns[0])
    return UserQuestion(text, (facts[0][asked],), (documents[0],)), documents[:1], documents[1:]


def _organism_lives(setting: Setting) -> tuple[UserQuestion, Sequence[str], Sequence[str]]:
    rng = setting.rng
    names = setting.keys(len(language.NAMES))
    forms = ORGANISM_FORMS[setting.split]
    asked = rng.choice(tuple(forms))
    lives = [_life(setting) for _ in names]
    documents = [
        " ".join(
            forms[attribute][0].format(name=name, value=life[attribute]) for attribute in rng.sample(_LIFE, len(_LIFE))
        )
        for name, life in zip(names, lives, strict=True)
    ]
    n_stories = max(0, setting.length // _TOKENS_PER_DOCUMENT["organism"] - len(documents))
    stories = [
        " ".join(setting.text[at % len(setting.text)] for at in range(begin, begin + _SENTENCES_PER_STORY))
        for begin in (setting.start + _SENTENCES_PER_STORY * story for story in range(n_stories))
    ]
    question = UserQuestion(forms[asked][1].format(name=names[0]), (lives[0][asked],), (documents[0],))
    return question, documents[:1], documents[1:] + stories


def _life(setting: Setting) -> dict[str, str]:
    rng, half = setting.rng, setting.half
    return {
        "birthday": setting.drawn(
            lambda: f"{rng.randint(1, 28)} {rng.choice(language.MONTHS)} {rng.randint(1900, 2029)}"
        ),
        "home": rng.choice(half(language.CITIES)),
        "university": f"University of {rng.choice(half(language.CITIES))}",
        "major": rng.choice(half(language.MAJORS)),
        "hobby": rng.choice(half(language.HOBBIES)),
    }
