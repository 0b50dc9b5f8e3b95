"""Plain filler: English words, and sentences about nothing in particular, drawn from a seed.

What a task hides its facts in when the user gives no text: some five hundred words in a dozen sentence forms, no names,
no numbers. `compounds` makes keys such as `amber-river` out of the same words. This module refuses to know tasks and
tokenizers. Cost: a few microseconds per sentence.
"""

from __future__ import annotations

from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# No word begins or ends another one of the two lists: a compound is never part of another one.
ADJECTIVES = _words(
    """ample ancient austere bashful bitter blunt brave brisk brittle broken calm candid careful cheerful chilly clever
    coarse cosmic crisp crooked crude curious dapper dense distant drowsy dusty eager elegant empty faded faint famous
    fancy fierce flat foggy formal fragile frank frosty frugal gentle giddy gloomy golden graceful grim gritty hasty
    hollow humble icy idle jolly keen lavish lazy lively lonely loyal lunar mellow merry mild modest muddy narrow neat
    nimble noisy odd pale patient peculiar placid plain polite prompt proud quaint quiet rapid rare rigid robust rough
    rural rusty serene shallow shy silent simple sleepy slender smooth sober solemn spare stale steep stern sturdy
    subtle sudden sullen swift tame tender thirsty tidy timid tiny tranquil upright urban vague vast vivid wary weary
    wicked witty wooden worthy zealous"""
)
NOUNS = _words(
    """acorn almond anchor anvil apron atlas badger bakery balcony banjo barrel basket beacon bell bicycle blanket
    bonnet bottle bracelet branch bridge bucket button cabin camel candle canvas carpet castle cellar chimney cinder
    clover cobbler compass copper corridor cottage cradle crystal curtain dagger dairy desert donkey dragon drawer
    engine envelope falcon feather ferry fiddle forest fountain furnace galley garden gazebo glacier goblet granite
    guitar hammock harbor harvest hedge helmet hinge hornet island jacket jigsaw journal jungle kettle kitchen ladder
    lagoon lantern lemon lizard locket magnet mantle marble meadow mirror monk muffin museum napkin necklace needle
    nest nutmeg oasis olive orchard otter oven oyster paddle palace parcel parrot pebble pepper piano pigeon pillow
    planet plaza pocket pottery prairie pulley puzzle quarry quill rabbit raft ribbon river rocket saddle sailor salad
    scarf school shovel signal skillet sparrow spindle squirrel stable statue sunset tailor teapot temple thimble ticket
    timber tower trumpet tunnel turnip turtle umbrella valley velvet village violin volcano wagon walnut whistle widow
    window wrench zebra zipper"""
)
VERBS = _words(
    """admired blocked borrowed brushed buried carried circled cleaned counted covered crossed described discovered
    drew examined fetched followed forgot greeted guarded hid ignored lifted measured mended missed moved noticed opened
    painted passed polished praised pushed reached repaired replaced shook sketched touched watched weighed"""
)
_PLACES = (
    "at the edge of the field", "behind the mill", "beside the canal", "beyond the last houses", "by the open gate",
    "close to the market", "down by the water", "in the back room", "in the north of the valley", "near the crossroads",
    "on the far bank", "on top of the hill", "outside the station", "under a row of lime trees", "under the bridge",
    "within sight of the coast",
)  # fmt: skip
_TIMES = (
    "after a long pause", "after the rain", "all through the spring", "at dawn", "before supper",
    "by the end of the week", "early in the year", "every other evening", "in those days", "late in the autumn",
    "not long ago", "on most mornings", "once the snow had gone", "shortly before noon", "the winter before",
    "towards midnight",
)  # fmt: skip
_ADVERBS = _words("again almost barely gladly gradually never often quietly rarely slowly soon twice usually")
_FORMS = (
    "The {adjective} {noun} {verb} the {other} {place}.",
    "{Time} the {noun} {verb} {a_adjective} {other}.",
    "Nobody {verb} the {noun} that stood {place}.",
    "It was {adjective} {place}, and the {noun} {adverb} {verb} the {other}.",
    "{A_adjective} {noun} {adverb} {verb} the {other}, which was {adjective2}.",
    "Whoever {verb} the {noun} must have {verb2} the {other} as well.",
    "{Time}, while the {noun} was {adjective}, someone {verb} {a_adjective2} {other} {place}.",
    "There is {a_adjective} {noun} {place}.",
    "The {noun} {place} was more {adjective} than the {other}.",
    "Without the {noun} the {other} {place} looked {adjective}.",
    "People said that the {noun} {adverb} {verb} the {other}.",
    "{Time} somebody {verb} the {noun} and left the {other} {place}.",
)
# Past participles differ from the past tense; such verbs stay out of the one form that needs them.
_IRREGULAR = frozenset({"drew", "forgot", "hid", "shook"})


def filler_sentences(n: int, *, seed: int) -> list[str]:
    """`n` sentences of English filler, each a few tokens over ten; the first ones are the same for every `n`.

    Example:
        >>> filler_sentences(2, seed=2) == filler_sentences(5, seed=2)[:2]
        True
    """
    rng = Random(f"filler-{seed}")
    return [_sentence(rng) for _ in range(n)]


def _sentence(rng: Random) -> str:
    noun, other = rng.sample(NOUNS, 2)
    adjective, adjective2 = rng.sample(ADJECTIVES, 2)
    verb, verb2 = rng.choice(VERBS), rng.choice([verb for verb in VERBS if verb not in _IRREGULAR])
    time = rng.choice(_TIMES)
    return rng.choice(_FORMS).format(
        noun=noun, other=other, adjective=adjective, adjective2=adjective2, verb=verb, verb2=verb2,
        adverb=rng.choice(_ADVERBS), place=rng.choice(_PLACES), Time=time[0].upper() + time[1:],
        a_adjective=_with_article(adjective), a_adjective2=_with_article(adjective2),
        A_adjective=_with_article(adjective).capitalize(),
    )  # fmt: skip


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' and not word.startswith('uni') else 'a'} {word}"


def compounds(rng: Random, n: int, *, half: slice = slice(None)) -> list[str]:
    """`n` different keys of two words each, or as many as there are; none is part of another.

    Args:
        rng: draws them.
        n: how many at most.
        half: of the adjectives and of the nouns, those to be used; disjoint halves have no key in common.

    Example:
        >>> compounds(Random(1), 2)
        ['dusty-sunset', 'tiny-quill']
    """
    adjectives, nouns = ADJECTIVES[half], NOUNS[half]
    firsts, n_pairs = (*adjectives, *nouns), len(adjectives) * len(nouns)
    # Adjective and noun as long as there are such pairs, then two nouns.
    pairs = rng.sample(range(n_pairs), min(n, n_pairs))
    if n > n_pairs:
        rest = [
            at
            for at in range(n_pairs, len(firsts) * len(nouns))
            if at % len(nouns) != at // len(nouns) - len(adjectives)
        ]
        pairs += rng.sample(rest, min(n - n_pairs, len(rest)))
    return [f"{firsts[at // len(nouns)]}-{nouns[at % len(nouns)]}" for at in pairs]
