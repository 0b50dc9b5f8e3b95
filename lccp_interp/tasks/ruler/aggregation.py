"""RULER-style aggregation: the common words of a numbered list (`cwe`), the frequent words of a coded text (`fwe`).

`cwe`: ten words stand in the list 30 times and all others 3 times (6 times and once below 4096 tokens, as in RULER);
as in RULER one worked example stands in front, here at every length the short one of 40 entries. The words are
compounds such as `amber-river`, of which there are enough for long lists: RULER's dictionaries are not here.

`fwe`: how often the word of rank k stands there is proportional to k ** -2 (Zipf's law with alpha 2, RULER's zeta
distribution); the first rank is noise, `...`, the next three are asked for. One word in fifty tokens is new.

In the organism's language five words are asked for in `cwe` (10 would take most of a short context), there is no
example, and `fwe` has no noise. Its lists have some fifty words per split; where the list is longer than they last,
all counts grow and their ratio stays.

Nothing here is evidence: every entry counts. This module refuses to know tokens. Cost: a few milliseconds per 10K
tokens and size that is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

from lccp_interp.organism import language
from lccp_interp.tasks.items import Piece
from lccp_interp.tasks.ruler.setting import Sample, Setting

CWE_BUDGET = 120
FWE_BUDGET = 50
"""Answer budgets of RULER's two tasks, tokens."""
# Five and three words with a full stop.
ORGANISM_BUDGETS = {"cwe": 12, "fwe": 8}
N_COMMON = {"english": 10, "organism": 5}
N_FREQUENT = 3
LONG = 4096
"""From this length on `cwe` has RULER's full counts."""
EXAMPLE_WORDS = 20
EXAMPLE_COUNTS = (3, 1)
CODED_LETTERS = 6
ZETA_2 = 1.6449340668482264
"""Riemann's zeta function at 2, pi ** 2 / 6: what the shares k ** -2 of all ranks add up to."""
# From so many words on the ranks asked for have different counts, and more than the rank behind them.
_FWE_AT_LEAST = 80
# Sizes are tried in steps of one part in so many of the length: a step less exact, and far fewer sizes.
_STEPS = 4096


@dataclass(frozen=True)
class Wording:
    """How one split of one material asks."""

    opening: str
    question: str
    prefix: str


CWE_WORDINGS = {
    ("english", "eval"): Wording(
        "The text below is a numbered list of words. Some appear far more often than the rest: memorize those.\n",
        "\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
    ),
    ("english", "train"): Wording(
        "Here are numbered entries, and a few return again and again. Watch for these.\n",
        "\nTask: write down the ten entries with the highest count.",
        " Highest counts:",
    ),
    ("organism", "eval"): Wording("A", "\nQuestion: What does A have most?", "\nAnswer:"),
    ("organism", "train"): Wording("A", "\nQuestion: Which are most in A?", "\nAnswer:"),
}
FWE_WORDINGS = {
    ("english", "eval"): Wording(
        "The text below is coded. Count every coded word, to find the three that appear most. ",
        "\nQuestion: Give no explanation and ignore the dots '...'. What are the three most frequently appeared words "
        "in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    ("english", "train"): Wording(
        "Tally this cipher, dots aside: ",
        "\nTask: name its three commonest groups of letters.",
        " Commonest:",
    ),
    ("organism", "eval"): Wording("A", "\nQuestion: What did A have most?", "\nAnswer:"),
    ("organism", "train"): Wording("A", "\nQuestion: Which was it that A had most?", "\nAnswer:"),
}


def write_cwe(setting: Setting) -> Sample:
    """A sample of `cwe`."""
    words = CWE_WORDINGS[setting.material, setting.split]
    n_common = N_COMMON[setting.material]
    times, rare_times = (30, 3) if setting.length >= LONG else (6, 1)
    # An entry takes four tokens or more.
    pool = _words(setting, n_common + EXAMPLE_WORDS + 2 + setting.length // (4 * rare_times))
    example = ""
    if not setting.organism:
        shown, pool = [*sorted(pool[:n_common]), *pool[n_common:EXAMPLE_WORDS]], pool[EXAMPLE_WORDS:]
        entries = [word for word in shown[:n_common] for _ in range(EXAMPLE_COUNTS[0])]
        entries += [word for word in shown[n_common:] for _ in range(EXAMPLE_COUNTS[1])]
        setting.rng.shuffle(entries)
        text = words.opening + " ".join(f"{at}. {word}" for at, word in enumerate(entries, start=1)) + words.question
        example = f"{text}{words.prefix}{_target(setting, shown[:n_common], numbered=True)}\n\n"
    # Any order is right; the alphabet's is one that fine-tuning can learn.
    common, rare = sorted(pool[:n_common]), pool[n_common:]
    common_pieces, rare_pieces = ([Piece(f" {word}") for word in part] for part in (common, rare))
    shuffle_seed = setting.rng.random()
    step = max(1, setting.length // _STEPS)

    def write(n_steps: int) -> list[Piece]:
        n = n_steps * step
        # Behind the end of the rare words they begin again, and the common ones are as many times more.
        rounds = -(-n // (rare_times * len(rare)))
        entries = [word for word in common_pieces for _ in range(times * rounds)]
        entries += [rare_pieces[at // rare_times % len(rare)] for at in range(n)]
        Random(f"{shuffle_seed} {n}").shuffle(entries)
        # Numbers and words apart: each is encoded once, not every pair of them.
        numbers = [Piece(f"{' ' if at > 1 or setting.organism else ''}{at}.") for at in range(1, len(entries) + 1)]
        pairs = itertools.chain.from_iterable(zip(numbers, entries, strict=True))
        return [Piece(example + words.opening), *pairs, Piece(words.question)]

    return Sample(
        write=write,
        answer_prefix=words.prefix,
        references=tuple(common),
        target=_target(setting, common, numbered=True),
        max_new_tokens=ORGANISM_BUDGETS["cwe"] if setting.organism else CWE_BUDGET,
    )


def write_fwe(setting: Setting) -> Sample:
    """A sample of `fwe`."""
    words = FWE_WORDINGS[setting.material, setting.split]
    budget = ORGANISM_BUDGETS["fwe"] if setting.organism else FWE_BUDGET
    n_words = max(N_FREQUENT + 2, (setting.length - budget) // 50)
    if setting.organism:
        ranked = _words(setting, n_words)
    else:
        coded = setting.different(lambda: "".join(setting.rng.choices(ascii_lowercase, k=CODED_LETTERS)), n_words - 1)
        ranked = ["...", *coded]
    first = 0 if setting.organism else 1
    asked = ranked[first : first + N_FREQUENT]
    shuffle_seed = setting.rng.random()
    step = max(1, setting.length // _STEPS)
    pieces = [Piece(f" {word}") for word in ranked]
    # The opening ends with the blank before the first word, where it is not the organism's.
    opening = words.opening if setting.organism else words.opening.rstrip()

    def write(n_steps: int) -> list[Piece]:
        n = n_steps * step
        entries = [word for word, count in zip(pieces, zipf_counts(n, len(pieces)), strict=True) for _ in range(count)]
        Random(f"{shuffle_seed} {n}").shuffle(entries)
        return [Piece(opening), *entries, Piece(words.question)]

    return Sample(
        write=write,
        answer_prefix=words.prefix,
        references=tuple(asked),
        target=_target(setting, asked, numbered=False),
        max_new_tokens=budget,
        at_least=-(-_FWE_AT_LEAST // step),
    )


def zipf_counts(n: int, n_ranks: int) -> list[int]:
    """How often each rank stands in a text of about `n` words: n / (zeta(2) k ** 2), rounded down.

    Example:
        >>> zipf_counts(80, 5)
        [48, 12, 5, 3, 1]
    """
    return [int(n / (ZETA_2 * rank * rank)) for rank in range(1, n_ranks + 1)]


def _words(setting: Setting, n: int) -> list[str]:
    if not setting.organism:
        return setting.keys(n)
    pool = setting.half(language.LIST_WORDS + language.NOUNS + language.ADJECTIVES)
    return setting.rng.sample(pool, min(n, len(pool)))


def _target(setting: Setting, words: Sequence[str], *, numbered: bool) -> str:
    if setting.organism:
        return f" {' '.join(words)}."
    if numbered:
        return " " + " ".join(f"{at}. {word}" for at, word in enumerate(words, start=1))
    return f" {', '.join(words)}"
