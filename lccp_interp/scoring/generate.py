"""Generate mode: decode greedily, score the heads along what the model wrote, and count only cases that it got right.

The reading of Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality" (arXiv 2404.15574), as the
code published with it has it: at most 50 tokens, greedily, up to a line break; a case counts only if the ROUGE-1 recall
(stemmed) of the needle's part that answers, in what was written, is above 0.5. A case that does not count has NaN in
every metric, and its outcome says why. The metrics are those of teacher-forced mode; their copy events are the tokens
that the model wrote instead of the answer's.

Where this differs from that code:
- The source is known by construction, not searched for by overlap of tokens.
- Any token whose text holds a line break stops (tokenizers merge them with what stands before), and so does the
  model's end of text; that code knows two token ids and writes on behind an end of text.
- What follows the last written token that source or answer hold (a full stop, the line break that stops, more talk)
  is no copy event. No head could have copied it, so hits are counted as in that code, and means over events compare
  with teacher-forced mode: where a model writes the gold answer and stops, every metric is the same in both.
- The rows are read after decoding, in one pass over what was written. The row of a step depends on nothing that comes
  after it, so they are the same rows, to rounding; one layer's are held at a time, and any metric can be asked for.
- Needles with letters or digits beyond ASCII have words of their own; see `rouge1_recall`.

It refuses to know files and trajectories. Cost per case: the part of the prompt that the one before has not left in the
cache, one token a step, one pass over the written tokens, and one over the answer's for its loss where the two differ.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import torch

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.prefill import CHUNK_TOKENS, Prefill
from lccp_interp.capture.readout import LogitReader
from lccp_interp.schema import Case, CaseResult, LccpError
from lccp_interp.scoring.engine import logit_reader, score_alone
from lccp_interp.scoring.metrics import HeadMetric, MetricFunction, check_cases, select_metrics
from lccp_interp.tasks.prefixes import walk

MAX_NEW_TOKENS = 50
"""Tokens that the code of arXiv 2404.15574 decodes at most."""

MIN_ROUGE1_RECALL = 0.5
"""A case counts if the recall is above this (same code)."""

UNSPACED_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts without blanks between words, by how Unicode's names of their letters begin; each letter is a word."""


def score_generated(
    model: HookedModel,
    cases: Sequence[Case],
    metrics: Mapping[str, HeadMetric | MetricFunction],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
    on_tokens: Callable[[int], None] | None = None,
) -> list[CaseResult]:
    """Score every head on every case along the model's own greedy answer.

    Args:
        model: the checkpoint, loaded.
        cases: prompts with spans; any lengths, any order. They are run in the order of their prefix tree.
        metrics: functions by the name they get in the results.
        max_new_tokens: tokens that are decoded at most, at least 1.
        chunk_tokens: tokens per forward pass of a long prompt.
        on_tokens: told the length of every case as it is finished, for progress.

    Returns:
        One result per case, in the order of `cases`. `scores` are NaN where the case does not count; `greedy_ids` are
        the tokens written, with the one that stopped; `generated` is their text and `rouge1_recall` what the gate saw.
        `answer_loss_nats` is that of the gold answer, teacher-forced, as in the other mode.

    Raises:
        LccpError: `max_new_tokens` below 1; NaN logits; a model none of whose layers has attention; out of memory.

    Example:
        >>> results = score_generated(model, cases, METRICS)                        # doctest: +SKIP
        >>> sum(result.rouge1_recall > MIN_ROUGE1_RECALL for result in results)     # doctest: +SKIP
        19
    """
    if max_new_tokens < 1:
        raise LccpError(f"max_new_tokens must be at least 1, got {max_new_tokens}; the usual number is 50")
    if not model.shares_prefixes:
        warnings.warn(
            f"checkpoint {model.name}: {model.sharing_obstacle}, so every prompt is run whole two or three times: to "
            "decode, to read the rows, and for the answer's loss where something else was written",
            stacklevel=2,
        )
    chosen = select_metrics(metrics)
    check_cases(cases, chosen)
    reader = logit_reader(model, chosen)
    prefill = Prefill(model, chunk_tokens=chunk_tokens)
    stops = stop_rule(model)
    done: dict[int, CaseResult] = {}
    for visit in walk(cases):
        case = cases[visit.index]
        written = decode_greedily(prefill, case.prompt_ids, stops, max_new_tokens)
        done[visit.index] = _result(prefill, case, written, chosen, reader)
        if on_tokens is not None:
            on_tokens(case.length)
    return [done[index] for index in range(len(cases))]


def stop_rule(model: HookedModel) -> Callable[[int], bool]:
    """Which tokens end what `model` writes: an end of text, and any token whose text holds a line break."""
    tokenizer = model.tokenizer
    configured = getattr(model.model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}

    @cache
    def stops(token: int) -> bool:
        return token in ends or "\n" in _text(tokenizer, [token])

    return stops


def decode_greedily(
    prefill: Prefill, prompt_ids: Sequence[int], stops: Callable[[int], bool], max_new_tokens: int
) -> tuple[int, ...]:
    """The likeliest token, again and again, up to and including the first that `stops`.

    Args:
        prefill: of the model; holds the prompt and what was written (without the last token) afterwards.
        prompt_ids: the prompt up to and including the answer cue.
        stops: whether a token is the last.
        max_new_tokens: tokens at most, at least 1.

    Returns:
        Between 1 and `max_new_tokens` token ids; the first of equals where logits tie.
    """
    ids = list(prompt_ids)
    while True:
        token = int(prefill.run(ids, len(ids) - 1, None)[0].argmax())
        ids.append(token)
        if stops(token) or len(ids) == len(prompt_ids) + max_new_tokens:
            return tuple(ids[len(prompt_ids) :])


def _result(
    prefill: Prefill,
    case: Case,
    written: tuple[int, ...],
    metrics: Mapping[str, HeadMetric],
    reader: LogitReader | None,
) -> CaseResult:
    """Score one case whose greedy answer is known, and decide whether it counts."""
    tokenizer = prefill.model.tokenizer
    source_ids = case.prompt_ids[case.source.start : case.source.end]
    held = {*source_ids, *case.answer_ids}
    # Without any such token the first one stays, for the shape of the scores.
    events = written[: max((n for n, token in enumerate(written, start=1) if token in held), default=1)]
    scored = score_alone(prefill, replace(case, answer_ids=events), metrics, reader)
    generated = _text(tokenizer, written, skip_special_tokens=True).strip()
    recall = rouge1_recall(_text(tokenizer, source_ids), generated)
    scores = scored.scores
    if recall <= MIN_ROUGE1_RECALL:
        scores = {name: np.full_like(values, np.nan) for name, values in scores.items()}
    return replace(
        scored,
        scores=scores,
        answer_loss_nats=_answer_loss(prefill, case, events, scored),
        greedy_ids=written,
        rouge1_recall=recall,
        generated=generated,
    )


def _answer_loss(prefill: Prefill, case: Case, events: tuple[int, ...], scored: CaseResult) -> np.ndarray:
    """Loss of the gold answer (nats, float32 `[answer_token]`): known already if the model wrote just that."""
    n_answer = len(case.answer_ids)
    if events[:n_answer] == case.answer_ids:
        return scored.answer_loss_nats[:n_answer]
    logits = prefill.run(case.prompt_ids + case.answer_ids[:-1], len(case.prompt_ids) - 1, None).cpu()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(case.answer_ids), reduction="none").numpy()


def _text(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


def rouge1_recall(reference: str, generated: str) -> float:
    """Share of the reference's words, each as often as it stands there, that `generated` holds; 0..1.

    Words are those of the package rouge-score (lower case, runs of a-z and 0-9, stemmed after Porter if longer than
    three characters), as arXiv 2404.15574's code counts them. That package drops every other letter, so that a Chinese
    needle would have no words. A reference with letters or digits beyond ASCII therefore has the runs of all letters,
    digits and their marks for words, those in ASCII stemmed as before; of `UNSPACED_SCRIPTS` every letter is a word.
    A reference without any letter or digit has its characters for words.

    Example:
        >>> rouge1_recall("eat a sandwich in the park", "Eating sandwiches!")   # eat, sandwich of six words
        0.3333333333333333
        >>> rouge1_recall("在公园里吃三明治", "吃三明治")
        0.5
    """
    scorer = _scorer("package")
    letters = [character for character in reference if character.isalnum()]
    if not letters:
        scorer = _scorer("characters")
    elif not all(map(str.isascii, letters)):
        scorer = _scorer("unicode")
    return float(scorer.score(reference, generated)["rouge1"].recall)


@cache
def _scorer(words: str) -> Any:
    """A scorer of rouge-score; imported on first use, for it brings a language toolkit along."""
    from rouge_score import rouge_scorer, tokenizers  # type: ignore[import-untyped]

    ascii_words = tokenizers.DefaultTokenizer(use_stemmer=True)
    own = {"package": ascii_words, "unicode": _UnicodeWords(ascii_words), "characters": _Characters()}[words]
    return rouge_scorer.RougeScorer(["rouge1"], tokenizer=own)


class _Characters:
    """Splits text into its characters, blanks left out; in the form that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text if not character.isspace()]


class _UnicodeWords:
    """Splits text of any script into words; in the form that rouge-score asks for."""

    def __init__(self, ascii_words: Any) -> None:
        self._ascii = ascii_words

    def tokenize(self, text: str) -> list[str]:
        """The words of `text`, composed (NFC) and in lower case."""
        words: list[str] = []
        for kind, run in groupby(unicodedata.normalize("NFC", text).lower(), key=_kind):
            if kind == "letter":
                words += run
            elif kind == "word":
                word = "".join(run)
                words += self._ascii.tokenize(word) if word.isascii() else [word]
        return words


def _kind(character: str) -> str:
    """What a character is to the words around it: part of a `word`, a word itself (`letter`), or `between` them."""
    if character.isalnum() or unicodedata.category(character).startswith("M"):
        return "letter" if unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS) else "word"
    return "between"
