"""Interference: how far the needle lies behind, and how much text lies before it, one apart from the other.

In a needle-in-a-haystack grid a deeper needle is nearer to the question and has more text before it. The modified form
of arXiv 2604.02650 moves them one by one: the *distance*, tokens between the needle's end and the question, is held
while the *interference*, tokens of context before the needle, grows. There is no other needle in the context.

Both are exact, so a prompt's length follows from them: it differs between needles by what needle, question and answer
take. A line break that sets the needle off counts with the text it stands beside; special tokens, the chat template
and a template's own opening count with neither. The text after the needle is the same at every interference, read from
a sentence that no text before the needle reaches, and a longer one goes on from a shorter one; so does the text before.
Both are cut where the count falls. Cells of one sample and needle therefore differ in nothing else, and share most of
their prefixes.

This module knows text and tokenizers; it refuses to know models and scores. Cost: one pass of the tokenizer over each
haystack, then list joining.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lccp_interp.organism import language
from lccp_interp.schema import Case, LccpError, Needle
from lccp_interp.tasks.chat import Frame
from lccp_interp.tasks.haystack import Haystack, pick_starts
from lccp_interp.tasks.items import derived_seed
from lccp_interp.tasks.needles import PAPER_PROMPT, Fact, check_sources, prompt_form, source_config
from lccp_interp.tasks.niah import needle_spans, organism_haystack
from lccp_interp.tasks.pieces import PieceEncoder
from lccp_interp.tasks.twins import refuse_twins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK = "interference"


@dataclass(frozen=True)
class InterferenceGrid:
    """What to ask: every distance x interference x needle x sample.

    Attributes:
        distances: tokens between needle and question; 0 has the question right behind the needle.
        interferences: tokens of context before the needle; 0 has the needle open the context.
        samples: haystacks per needle. With the organism's language (no `needles`) each sample has a needle and a
            haystack of its own.
        needles: facts of the user, or None for facts in the organism's language.
        haystack: text around them, or None for text in the organism's language without any facts.
        prompt: as in `NiahGrid`.
        seed: of needles, haystacks and where in the haystack a sample begins.
        chat: whether the prompt stands in the tokenizer's chat template.

    Example:
        >>> grid = InterferenceGrid(distances=(256, 512), interferences=(0, 256, 1024))
        >>> grid.n_cases
        6
    """

    distances: tuple[int, ...]
    interferences: tuple[int, ...]
    samples: int = 1
    needles: tuple[Needle, ...] | None = None
    haystack: str | None = None
    prompt: str = PAPER_PROMPT
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        for name, values in (("distances", self.distances), ("interferences", self.interferences)):
            if not values:
                raise LccpError(f"the grid has no {name}; give tokens, like --{name} 0,256,1024")
            if len(set(values)) != len(values):
                raise LccpError(f"{name} {values} name a value twice")
            if min(values) < 0:
                raise LccpError(f"{name} are tokens, 0 or more, got {min(values)}")
        check_sources(self.samples, self.needles)
        prompt_form(self.prompt)

    @property
    def n_cases(self) -> int:
        """How many cases the grid has."""
        return len(self.distances) * len(self.interferences) * self.samples * len(self.needles or (None,))

    def config(self) -> dict[str, Any]:
        """The grid as plain JSON values, texts by their hashes; equal grids have equal configs."""
        return {
            "task": TASK,
            "distances": list(self.distances),
            "interferences": list(self.interferences),
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
        """All cases, in the order sample, needle, interference, distance.

        `case.distance` and `case.interference` are exact; `depth_fraction` is the interference's share of both.

        Raises:
            SpanError: the tokenizer cannot hold a needle or its answer without loss, or gives it no border of its own.
            LccpError: a distance or an interference has room for a line break only, the haystack is too short or holds
                a needle itself, or `chat` is asked of a tokenizer without a chat template.

        Warns:
            UserWarning: an answer stands in the haystack itself.

        Example:
            >>> grid = InterferenceGrid(distances=(256,), interferences=(0, 1024))     # doctest: +SKIP
            >>> [(c.distance, c.interference) for c in grid.build(tokenizer)]          # doctest: +SKIP
            [(256, 0), (256, 1024)]
        """
        return list(_cases(self, PieceEncoder(tokenizer)))


@dataclass(frozen=True)
class _Around:
    """The text of one sample: before the needle it is read from one sentence, after it from another."""

    haystack: Haystack
    before: int
    after: int


def _cases(grid: InterferenceGrid, encoder: PieceEncoder) -> Iterator[Case]:
    needles = [_needles(grid, sample) for sample in range(grid.samples)]
    names = [f"s{sample}" for sample in range(grid.samples)] if grid.needles is None else None
    around = _texts(grid, needles, encoder)
    form = prompt_form(grid.prompt)
    frame = Frame.of(encoder.tokenizer) if grid.chat else Frame()
    facts: dict[str, Fact] = {}
    for sample, drawn in enumerate(needles):
        for index, needle in enumerate(drawn):
            name = names[sample] if names else f"n{index}"
            if name not in facts:
                facts[name] = Fact(f"needle {name}", needle, form, encoder, frame=frame)
            for interference, distance in itertools.product(grid.interferences, grid.distances):
                yield _case(grid, name, facts[name], around[sample], sample, interference, distance)


def _case(
    grid: InterferenceGrid, name: str, fact: Fact, around: _Around, sample: int, interference: int, distance: int
) -> Case:
    needle = fact.in_text if interference else fact.in_front
    lead = [*fact.lead, *_before(fact, around, interference)]
    after = _after(fact, around, distance)
    needle_span, source_span = needle_spans(needle, len(lead))
    prompt_ids = (*lead, *needle.ids, *after, *fact.tail)
    return Case(
        case_id=f"{TASK}-{distance}-i{interference}-{name}-{sample}",
        task=TASK,
        length=len(prompt_ids) + len(fact.answer),
        depth_fraction=interference / (interference + distance) if interference else 0.0,
        needle_id=name,
        haystack_id=f"{around.haystack.haystack_id}@{around.before}",
        sample=sample,
        seed=grid.seed,
        prompt_ids=prompt_ids,
        answer_ids=tuple(fact.answer),
        needle=needle_span,
        source=source_span,
        distance=distance,
        interference=interference,
        question=fact.question(len(prompt_ids)),
    )


def _before(fact: Fact, around: _Around, interference: int) -> list[int]:
    """Exactly `interference` tokens, the last of which set the needle off."""
    if not interference:
        return []
    _require_room(fact, "interference", interference)
    n_text = interference - len(fact.joint)
    before, _ = around.haystack.split(n_text, 1.0, start=around.before, opens_document=fact.opens_document)
    return before + fact.joint


def _after(fact: Fact, around: _Around, distance: int) -> list[int]:
    """Exactly `distance` tokens, the first of which set the needle off."""
    if not distance:
        return []
    _require_room(fact, "distance", distance)
    return around.haystack.split(distance, 0.0, start=around.after, own_line=bool(fact.joint))[1]


def _require_room(fact: Fact, what: str, n_tokens: int) -> None:
    if n_tokens <= len(fact.joint):
        raise LccpError(
            f"{what} {n_tokens} has no room for text beside the line break ({len(fact.joint)} tokens) at the needle; "
            f"ask for 0, or for at least {len(fact.joint) + 1}"
        )


def _needles(grid: InterferenceGrid, sample: int) -> Sequence[Needle]:
    """The needles of this sample: the user's, or one of its own in the organism's language."""
    return grid.needles or language.needles(1, seed=derived_seed(TASK, "needle", grid.seed, sample))


def _texts(grid: InterferenceGrid, needles: Sequence[Sequence[Needle]], encoder: PieceEncoder) -> list[_Around]:
    """The text of each sample."""
    longest_before, longest_after = max(grid.interferences), max(grid.distances)

    def around(haystack: Haystack, start: int) -> _Around:
        return _Around(haystack, start, haystack.sentence_after(start, longest_before))

    if grid.haystack is None:
        seeds = [derived_seed(TASK, "haystack", grid.seed, sample) for sample in range(grid.samples)]
        # Under any tokenizer a sentence of this language is far shorter than the reserve between the two texts.
        n_tokens = longest_before + longest_after + 512
        made = zip(seeds, needles, strict=True)
        return [
            around(organism_haystack(n_tokens, seed, drawn, encoder, fact_every=math.inf), 0) for seed, drawn in made
        ]
    own = [(f"n{index}", needle) for index, needle in enumerate(grid.needles or ())]
    drawn = [(f"s{sample}", some[0]) for sample, some in enumerate(needles)] if grid.needles is None else []
    refuse_twins(grid.haystack, dict([*own, *drawn]))
    haystack = Haystack(grid.haystack, encoder)
    n_tokens = longest_before + longest_after + haystack.longest_sentence
    seeds = [derived_seed(TASK, "start", grid.seed, sample) for sample in range(grid.samples)]
    return [around(haystack, start) for start in pick_starts(haystack, n_tokens, seeds)]
