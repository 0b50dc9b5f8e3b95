"""RULER-style variable tracking (`vt`): who has a value, where it is handed on from one variable to the next.

`VAR AAAAA = 12345`, then `VAR BBBBB = VAR AAAAA` and so on over four hops, in order, between lines of noise; all five
variables are asked for. As in RULER one worked example with a chain of its own stands in front. In the organism's
language people have codes ("The code of Tom is the code of Mara."), and there is no example: it would take most of a
short context.

This module refuses to know tokens. Cost: microseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from lccp_interp.tasks.ruler.niah import NOISE, ORGANISM_NOISE, TRAIN_NOISE
from lccp_interp.tasks.ruler.setting import Sample, Setting, hidden, message

N_HOPS = 4
BUDGET = 30
"""Answer budget of RULER's variable tracking, tokens."""
# Five names and a full stop are six tokens.
ORGANISM_BUDGET = 12
EXAMPLE_NOISE_LINES = 5


@dataclass(frozen=True)
class Wording:
    """How one split of one material speaks of variables."""

    first: str
    hop: str
    opening: str
    question: str
    prefix: str


WORDINGS = {
    ("english", "eval"): Wording(
        first="VAR {name} = {value}",
        hop="VAR {name} = VAR {before}",
        opening="The text below hides chain(s) of variable assignment. Memorize them and track every variable.\n",
        question="\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        prefix=" Answer: According to the chain(s) of variable assignment in the text above, {n} variables are "
        "assigned the value {value}, they are:",
    ),
    ("english", "train"): Wording(
        first="Let {name} hold {value}.",
        hop="Let {name} hold what {before} holds.",
        opening="Some of these lines fill boxes. Keep book of what each box holds.\n",
        question="\nTask: name every box with {value} inside.",
        prefix=" The {n} boxes:",
    ),
    ("organism", "eval"): Wording(
        first="The code of {name} is {value}.",
        hop="The code of {name} is the code of {before}.",
        opening="",
        question="\nQuestion: Who had the code {value}?",
        prefix="\nAnswer:",
    ),
    ("organism", "train"): Wording(
        first="{name}'s code is {value}.",
        hop="{name}'s code is that of {before}.",
        opening="",
        question="\nQuestion: Which have {value} for a code?",
        prefix="\nAnswer:",
    ),
}


def write_vt(setting: Setting) -> Sample:
    """A sample of `vt`."""
    words = WORDINGS[setting.material, setting.split]
    if setting.organism:
        noise = ORGANISM_NOISE[setting.split]
        names = setting.keys(N_HOPS + 1)
        value = setting.drawn(lambda: setting.number(6))
        example = ""
    else:
        noise = NOISE if setting.split == "eval" else TRAIN_NOISE
        names, example_names = (_variables(setting, n_letters) for n_letters in (5, 3))
        value, example_value = setting.different(lambda: setting.number(5), 2)
        example = _example(setting, words, noise, example_names, example_value)
    chain = [(line, True) for line in _chain(words, names, value)]
    depths = _depths(setting)
    question = words.question.format(value=value)
    return Sample(
        write=lambda n: message(example + words.opening, hidden([noise] * n, chain, depths), question, glue="\n"),
        answer_prefix=words.prefix.format(n=len(names), value=value),
        references=tuple(names),
        target=_target(setting, names),
        max_new_tokens=ORGANISM_BUDGET if setting.organism else BUDGET,
    )


def _variables(setting: Setting, n_letters: int) -> list[str]:
    return setting.different(lambda: "".join(setting.rng.choices(ascii_uppercase, k=n_letters)), N_HOPS + 1)


def _chain(words: Wording, names: Sequence[str], value: str) -> list[str]:
    hops = [words.hop.format(name=name, before=before) for before, name in itertools.pairwise(names)]
    return [words.first.format(name=names[0], value=value), *hops]


def _depths(setting: Setting) -> list[float]:
    return sorted(setting.rng.random() for _ in range(N_HOPS + 1))


def _target(setting: Setting, names: Sequence[str]) -> str:
    return f" {' '.join(names)}" + ("." if setting.organism else "")


def _example(setting: Setting, words: Wording, noise: str, names: Sequence[str], value: str) -> str:
    """A whole small sample with its answer, and an empty line."""
    chain = [(line, False) for line in _chain(words, names, value)]
    lines = hidden([noise] * EXAMPLE_NOISE_LINES, chain, _depths(setting))
    pieces = message(words.opening, lines, words.question.format(value=value), glue="\n")
    prefix = words.prefix.format(n=len(names), value=value)
    return "".join(piece.text for piece in pieces) + prefix + _target(setting, names) + "\n\n"
