"""Needles in tokens: a fact, the question that asks for it and its answer, as they look inside a prompt.

A prompt has a *form*: the template around context and question, and whether the needle stands on a line of its own.
A `Fact` encodes one needle for one form and one tokenizer, part by part, and proves by decoding that its spans hold
what they claim. This module refuses to know haystacks, lengths and depths. Cost: a few tokenizer calls per needle.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lccp_interp.schema import LccpError, Needle, Span, SpanError
from lccp_interp.tasks.chat import Frame
from lccp_interp.tasks.pieces import PieceEncoder

PAPER_PROMPT = "{context}\nQuestion: {question}\nAnswer:"
"""Prompt of arXiv 2604.02650 up to the answer cue."""

WU_PROMPT = "{context}Based on the content of the book, Question: {question}\nAnswer:"
"""Prompt of the code published with arXiv 2404.15574."""


@dataclass(frozen=True, slots=True)
class PromptForm:
    """The text around context and question; `own_line` says whether line breaks set the needle off in the context."""

    template: str
    own_line: bool = True

    @property
    def opening(self) -> str:
        """The template's text before the context."""
        return self.template.partition("{context}")[0]

    @property
    def cue(self) -> str:
        """The template's text between context and question."""
        return self.template.partition("{context}")[2].partition("{question}")[0]

    def tail(self, question: str) -> str:
        """The template's text after the context, up to where the answer begins."""
        return self.template.partition("{context}")[2].replace("{question}", question)


FORMS = {"paper": PromptForm(PAPER_PROMPT), "wu": PromptForm(WU_PROMPT, own_line=False)}
"""Named forms: arXiv 2604.02650 sets the needle off with line breaks, arXiv 2404.15574 puts it between sentences."""


def prompt_form(prompt: str) -> PromptForm:
    """The form of that name, or the one of a template with `{context}` and `{question}` (needle on its own line).

    Raises:
        LccpError: neither a name nor a template.

    Example:
        >>> prompt_form("wu").own_line, prompt_form("{context} Q: {question} A:").own_line
        (False, True)
    """
    if prompt in FORMS:
        return FORMS[prompt]
    if "{" not in prompt:
        raise LccpError(
            f"unknown prompt {prompt!r}; give {' or '.join(FORMS)}, or a template with {{context}} and {{question}}"
        )
    for field in ("{context}", "{question}"):
        if prompt.count(field) != 1:
            raise LccpError(f"the prompt template must hold {field} exactly once, got {prompt!r}")
    if prompt.index("{context}") > prompt.index("{question}"):
        raise LccpError(f"the prompt template must hold {{context}} before {{question}}, got {prompt!r}")
    return PromptForm(prompt)


def read_needles(path: Path) -> tuple[Needle, ...]:
    """Needles from a JSONL file, one `{"needle": ..., "question": ..., "answer": ...}` per line.

    Raises:
        LccpError: no such file, no needles, a line that is no JSON object, or a field missing, empty, or an answer that
            is not part of its needle; always with file and line.
    """
    if not path.is_file():
        raise LccpError(f"no needle file at {path}; give JSONL with needle, question and answer in each line")
    needles = []
    try:
        # Not splitlines: it also cuts at separators that may stand inside a JSON string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise LccpError(f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LccpError(f"{path}:{number}: no JSON ({error}); each line is one JSON object") from error
        if not isinstance(entry, dict):
            raise LccpError(f"{path}:{number}: expected a JSON object, got {type(entry).__name__}")
        for field in ("needle", "question", "answer"):
            if field not in entry:
                hint = "; repeat the needle as the answer for the paper's form" if field == "answer" else ""
                raise LccpError(f"{path}:{number}: field {field!r} is missing (has {', '.join(sorted(entry))}){hint}")
        try:
            needles.append(Needle(entry["needle"], entry["question"], entry["answer"]))
        except LccpError as error:
            raise LccpError(f"{path}:{number}: {error}") from error
    if not needles:
        raise LccpError(f"{path} holds no needles; give JSONL with needle, question and answer in each line")
    return tuple(needles)


@dataclass(frozen=True)
class NeedleIds:
    """A needle's tokens in three parts, as it looks at one kind of place; `source` is what the answer copies."""

    before: list[int]
    source: list[int]
    after: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.before, *self.source, *self.after]


class Fact:
    """A needle in tokens, with all of the prompt that is not context.

    Attributes:
        label: name for messages.
        lead: what stands in front of the context: special tokens, the chat's and the template's opening.
        opens_document: whether that is special tokens only.
        in_text: the needle behind other text.
        in_front: the needle at the very beginning of the context.
        joint: tokens between text and the needle that follows it, a line break or nothing.
        tail: the question, up to where the answer begins.
        asked: where in `tail` the question's own tokens stand; None where the tokenizer does not let one say.
        answer: the answer as it follows there.
    """

    def __init__(
        self, label: str, needle: Needle, form: PromptForm, encoder: PieceEncoder, *, frame: Frame | None = None
    ) -> None:
        """Encode `needle`.

        Raises:
            SpanError: the tokenizer cannot hold needle or answer without loss, gives them no border of their own, or
                writes the answer with other tokens behind the question than inside the needle.
        """
        frame = frame or Frame()
        self.label = label
        text, answer, at = needle.needle.strip(), needle.answer.strip(), needle.answer_start
        opening = frame.opening + form.opening
        tail = form.tail(needle.question.strip()) + frame.closing
        self.opens_document = not opening
        self.lead = encoder.prefix + (encoder.start(opening) if opening else [])
        self.joint = encoder.middle(["\n"])[0] if form.own_line else []
        self._place_needle(text, answer, at, form, encoder)
        # After the cue the answer follows a blank, or what already ends the cue; within a script without blanks, where
        # the source follows another character directly, it may follow the cue directly too.
        ways = [answer] if tail[-1:].isspace() else [f" {answer}"]
        if text[at - 1 : at].strip():
            ways.append(answer)
        self.tail = encoder.middle([tail])[0]
        self.asked = encoder.inside(self.tail, form.cue, needle.question.strip())
        forms = encoder.middle(list(dict.fromkeys(ways)), after="\n" if tail.endswith("\n") else None)
        shared = [ids for ids in forms if set(ids) & set(self.in_text.source)]
        if not shared:
            raise SpanError(
                f"{label}: its answer {answer!r} has no token in common with itself inside the needle under this "
                f"tokenizer ({encoder.name}), so no head could score; rephrase the needle so that there the answer "
                f"follows {'a line break' if tail.endswith(chr(10)) else 'a blank'}, or give a longer answer"
            )
        self.answer = shared[0]
        for place in (self.in_text, self.in_front):
            encoder.check(place.source, answer, f"the answer of {label}")
            encoder.check(place.ids, text, label)
        encoder.check(self.answer, answer, f"the answer of {label} after the prompt")

    def question(self, n_prompt: int) -> Span | None:
        """Where the question stands in a prompt of `n_prompt` tokens, which the tail ends."""
        return None if self.asked is None else self.asked.shifted(n_prompt - len(self.tail))

    def _place_needle(self, text: str, answer: str, at: int, form: PromptForm, encoder: PieceEncoder) -> None:
        # The blank before the answer belongs to its first word, as it does after the answer cue.
        head = text[:at].rstrip(" ")
        source = text[len(head) : at] + answer
        inner, rest = encoder.middle([source, text[at + len(answer) :]])

        def opened_by(first: list[int]) -> NeedleIds:
            return NeedleIds(first, inner, rest) if head else NeedleIds([], first, rest)

        first = head or source
        at_line = opened_by(encoder.middle([first], after="\n")[0])
        self.in_text = at_line if form.own_line else opened_by(encoder.middle([f" {first}"])[0])
        self.in_front = opened_by(encoder.start(first)) if self.opens_document else at_line


def check_sources(samples: int, needles: tuple[Needle, ...] | None) -> None:
    """Refuse what no grid over needles can be made of.

    Raises:
        LccpError: no samples, or an empty list of needles.
    """
    if samples < 1:
        raise LccpError(f"samples must be at least 1, got {samples}")
    if needles is not None and not needles:
        raise LccpError("the list of needles is empty; give at least one {needle, question, answer}")


def source_config(
    *, samples: int, needles: tuple[Needle, ...] | None, haystack: str | None, prompt: str, chat: bool, seed: int
) -> dict[str, Any]:
    """What a grid's texts come from, as plain JSON values; long texts by their hashes."""
    form = prompt_form(prompt)
    config: dict[str, Any] = {
        "samples": samples,
        "needles": "organism" if needles is None else _digest([asdict(needle) for needle in needles]),
        "haystack": "organism" if haystack is None else _digest(haystack),
        "prompt": form.template,
        "seed": seed,
    }
    # Entered only where they are not the default: runs made before these settings existed can be resumed.
    if not form.own_line:
        config["needle_place"] = "between sentences"
    if chat:
        config["chat"] = True
    return config


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
