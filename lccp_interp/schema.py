"""The nouns that every stage shares: checkpoints, needles, spans, cases and what a model answered.

Stages meet only at these frozen dataclasses and at the tables of `lccp_interp.store`. This module imports nothing of
ours and no torch, so that tables can be read and drawn on a machine without it. It refuses to know how anything here
is made, measured or stored. It costs nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1
"""Version of the run folder. A reader refuses a newer one."""

RETRIEVAL_THRESHOLD = 0.1
"""Score above which a head is a retrieval head (arXiv 2604.02650, section on retrieval heads; arXiv 2404.15574)."""

NULL_SUFFIX = "@decoy"
"""Ends the name of a metric's null in the tables: the same metric on decoy spans, where nothing is to be retrieved."""


class LccpError(Exception):
    """A mistake of input that the person at the keyboard can mend.

    Its text is one line: what was got, what was expected, where, and what to do. The command line prints it without a
    traceback and exits with 2.
    """


class SpanError(LccpError):
    """The tokens of a needle or of its answer could not be placed exactly under a tokenizer."""


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of token positions, `start <= position < end`.

    Example:
        >>> span = Span(3, 7)
        >>> len(span), 6 in span, 7 in span
        (4, True, False)
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"a span needs 0 <= start <= end, got [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start

    def shifted(self, by: int) -> Span:
        """The range `by` positions further on."""
        return Span(self.start + by, self.end + by)

    def __contains__(self, position: object) -> bool:
        return isinstance(position, int) and self.start <= position < self.end


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact to hide, the question that asks for it, and the part of the fact that answers it.

    `answer` is a substring of `needle`; in the paper's form (continuous NIAH) it is the whole needle.

    Example:
        >>> Needle("The code of Mara is 7 4 1.", "What is the code of Mara?", "7 4 1").answer
        '7 4 1'
    """

    needle: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("needle", "question", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise LccpError(f"a needle's field {name!r} must be a non-empty string, got {value!r}")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise LccpError(f"a needle's field {name!r} holds half a character (a lone surrogate): {value!r}")
        _ = self.answer_start

    @property
    def answer_start(self) -> int:
        """Index of the answer's first character in the stripped needle.

        Raises:
            LccpError: the answer is not part of the needle, or stands in it more than once as words of its own, so that
                nobody could say which one is the source.
        """
        text, answer = self.needle.strip(), self.answer.strip()
        places = [match.start() for match in re.finditer(f"(?={re.escape(answer)})", text)]
        if not places:
            raise LccpError(
                f"the answer {answer!r} is not part of its needle {text!r}; "
                "copy it from the needle word by word, or repeat the whole needle as the answer"
            )
        words = [at for at in places if _is_word(text, at, at + len(answer))]
        if len(words or places) > 1:
            raise LccpError(
                f"the answer {answer!r} stands {len(words or places)} times in its needle {text!r}; "
                "rephrase the needle so that it stands there once"
            )
        return (words or places)[0]


def _is_word(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is not cut out of longer words or numbers."""
    before, after = text[start - 1 : start], text[end : end + 1]
    return not (before.isalnum() and text[start].isalnum()) and not (after.isalnum() and text[end - 1].isalnum())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One set of weights of a training run.

    `tokens_seen` counts training tokens over all stages, `stage_tokens` those of its own stage; `hash` is the SHA-256
    of its config and weight files. `branch` names the line of training it lies on, where one start has several (the
    ingredients of a soup). `source` says where on a hub it comes from, `organisation/name@revision`; None is a folder.
    """

    name: str
    path: Path
    tokens_seen: int
    stage: str = "train"
    stage_tokens: int | None = None
    hash: str | None = None
    source: str | None = None
    branch: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt with its answer and the exact places of needle and source.

    `prompt_ids` holds every token up to and including the answer cue, `answer_ids` what should follow; together they
    are `length` tokens. `needle` and `source` are positions in `prompt_ids`; *source* is the part of the needle that
    the answer copies. `distance` (tokens between needle and question) and `interference` (tokens of context before the
    needle) are what a grid of them asks for; None in other tasks. `question` are the positions of the question's own
    tokens, without the words around it; None where they are not known (runs made before they were kept).
    """

    case_id: str
    task: str
    length: int
    depth_fraction: float
    needle_id: str
    haystack_id: str
    sample: int
    seed: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    needle: Span
    source: Span
    distance: int | None = None
    interference: int | None = None
    question: Span | None = None

    def __post_init__(self) -> None:
        if not self.answer_ids:
            raise LccpError(f"case {self.case_id}: the answer has no tokens")
        if not (self.needle.start <= self.source.start < self.source.end <= self.needle.end <= len(self.prompt_ids)):
            raise SpanError(
                f"case {self.case_id}: source {self.source} must lie in needle {self.needle} "
                f"within a prompt of {len(self.prompt_ids)} tokens"
            )
        asked = self.question
        if asked is not None and not self.needle.end <= asked.start < asked.end <= len(self.prompt_ids):
            raise SpanError(
                f"case {self.case_id}: question {asked} must follow needle {self.needle} within a prompt of "
                f"{len(self.prompt_ids)} tokens"
            )


@dataclass(frozen=True, slots=True)
class Item:
    """One question that a model answers in its own words, and how the answer is graded.

    `prompt_ids` ends where the answer begins; with `max_new_tokens`, the room left for the answer, it is at most
    `length` tokens where the prompt was written for that length (official data keeps the length it came with).
    `target` is a right answer as the text that follows the prompt, with its leading blank: what fine-tuning trains
    towards. `evidence` says where in `prompt_ids` the facts stand that the answer needs, as far as they are known by
    construction. `grader` is a name out of `lccp_interp.scoring.graders.GRADERS`.
    """

    item_id: str
    benchmark: str
    subset: str
    length: int
    prompt_ids: tuple[int, ...]
    references: tuple[str, ...]
    target: str
    grader: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    evidence: tuple[Span, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.references or self.max_new_tokens < 1:
            raise LccpError(
                f"item {self.item_id}: an item needs a prompt, a reference and room for an answer, got "
                f"{len(self.prompt_ids)} tokens, {len(self.references)} references, {self.max_new_tokens} new tokens"
            )
        for span in self.evidence:
            if span.end > len(self.prompt_ids):
                raise SpanError(
                    f"item {self.item_id}: evidence {span} lies outside a prompt of {len(self.prompt_ids)} tokens"
                )


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What one model did on one case.

    `scores[metric]` is a float32 array `[layer, head]`, rows in the order of `layers` (true layer indices, for models
    in which not every layer has attention), NaN where the case does not count. `answer_loss_nats` is float32
    `[answer_token]`, of the gold answer in every mode. `greedy_ids` are the likeliest tokens: teacher-forced, one
    behind each prefix of the answer; in generate mode what the model wrote, as long as that is. Only generate mode has
    `generated` (that text) and `rouge1_recall` (the share of the source's words in it, 0..1).
    """

    case_id: str
    layers: tuple[int, ...]
    scores: dict[str, np.ndarray] = field(repr=False)
    answer_loss_nats: np.ndarray = field(repr=False)
    greedy_ids: tuple[int, ...] = ()
    rouge1_recall: float | None = None
    generated: str | None = None

    @property
    def answer_ppl(self) -> float:
        """exp of the mean loss per answer token (nats), the perplexity of the answer."""
        import math

        return math.exp(float(self.answer_loss_nats.mean()))
