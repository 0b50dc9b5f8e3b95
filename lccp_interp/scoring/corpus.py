"""Corpus perplexity: how well a checkpoint predicts long documents, and the tokens in them that need a long context.

Two numbers per document. *Corpus PPL* (arXiv 2604.02650, Figure 6) is exp of the mean loss over all its tokens.
*LongPPL* (arXiv 2410.23771) is the same over its key tokens only: those that a long context makes much likelier,
log P(x | all before) - log P(x | a short context) > alpha, and likely, log P(x | all before) > beta. The short contexts
come from windows that slide by `step` tokens, so that a token has `short_context` to `short_context + step - 1` tokens
before it; the first `short_context` tokens are never key. Which average a paper takes over documents is seldom said:
`mean_document_ppl` (the mean of the documents' perplexities) and `pooled_ppl` (exp of the mean over all tokens) are
both here, and both go into the tables.

This module refuses to know where documents come from and where results go. Memory: the keys and values of one document
and the logits of `logit_tokens` positions. Cost: each document once; for LongPPL (short_context + step) / step times
more. Models whose layers carry a state run a document once for every `logit_tokens` of it, and say so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from beartype import beartype
from jaxtyping import Bool, Float, jaxtyped
from torch import Tensor

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.prefill import CHUNK_TOKENS, Prefill
from lccp_interp.schema import LccpError
from lccp_interp.tasks.corpus import TokenDocument

LOGIT_TOKENS = 1024
"""Positions whose logits are held at a time: 0.6 GB in float32 for a vocabulary of 150,000."""

_ROWS = 128
"""Positions whose probabilities are normalised at a time; the temporaries of a whole pass would double its logits."""


@dataclass(frozen=True)
class LongPpl:
    """Which tokens are key tokens; the defaults are those of arXiv 2410.23771.

    Attributes:
        alpha: nats by which the long context must make a token likelier.
        beta: log probability (nats) that it must have with the long context.
        short_context: tokens of the short context at least; documents must be longer.
        step: tokens by which the windows of the short context slide.
    """

    alpha: float = 2.0
    beta: float = -2.0
    short_context: int = 4096
    step: int = 1024

    def __post_init__(self) -> None:
        if self.short_context < 1 or self.step < 1:
            raise LccpError(
                f"LongPPL with a short context of {self.short_context} tokens in steps of {self.step}: both must be at "
                "least 1"
            )


@dataclass(frozen=True)
class DocumentLoss:
    """What one checkpoint made of one document.

    Attributes:
        doc_id: the document's name.
        n_tokens: how many of its tokens were predicted.
        loss_nats: mean loss over them.
        key_positions: positions of its key tokens; None if nobody looked for them.
        key_loss_nats: mean loss over those; NaN if there are none.
    """

    doc_id: str
    n_tokens: int
    loss_nats: float
    key_positions: tuple[int, ...] | None = None
    key_loss_nats: float = math.nan


def score_corpus(
    model: HookedModel,
    documents: Sequence[TokenDocument],
    *,
    long_ppl: LongPpl | None = None,
    key_positions: Mapping[str, Sequence[int]] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    logit_tokens: int = LOGIT_TOKENS,
    on_tokens: Callable[[int], None] | None = None,
) -> list[DocumentLoss]:
    """Losses of every document, and of its key tokens.

    Args:
        model: the checkpoint, loaded.
        documents: in tokens of its tokenizer.
        long_ppl: look for key tokens with the model itself; None does not.
        key_positions: key tokens found before (`DocumentLoss.key_positions` of another checkpoint, by name of
            document): with them all checkpoints of a run are held against the same tokens. Not with `long_ppl`.
        chunk_tokens: tokens per forward pass where no logits are needed.
        logit_tokens: positions whose logits are held at a time.
        on_tokens: told the number of tokens of each document as it is finished, for progress.

    Returns:
        One result per document, in their order.

    Raises:
        LccpError: a loss that is no number (checkpoint, document and position are named), a document no longer than
            the short context, key positions that are missing or outside their document, or out of memory.

    Example:
        >>> from lccp_interp.capture.model import load_model                                     # doctest: +SKIP
        >>> results = score_corpus(load_model("runs/step-100"), documents, long_ppl=LongPpl())   # doctest: +SKIP
        >>> mean_document_ppl([result.loss_nats for result in results])                          # doctest: +SKIP
        11.3
    """
    if long_ppl is not None and key_positions is not None:
        raise LccpError("key tokens are given and to be looked for as well; leave out one")
    if logit_tokens < 1:
        raise LccpError(f"logit_tokens must be at least 1, got {logit_tokens}")
    for document in documents:
        _check(document, long_ppl, key_positions)
    if not model.shares_prefixes and any(len(document.ids) > logit_tokens for document in documents):
        warnings.warn(
            f"checkpoint {model.name}: {model.sharing_obstacle}, so a document is run whole for every {logit_tokens} "
            "tokens of it; more logit_tokens make it cheaper and take more memory",
            stacklevel=2,
        )
    prefill = Prefill(model, chunk_tokens=chunk_tokens)
    results = []
    for document in documents:
        losses = token_losses(prefill, document, first=document.first_scored, logit_tokens=logit_tokens)
        keys: tuple[int, ...] | None = None
        if long_ppl is not None:
            keys = _key_positions(prefill, document, losses, long_ppl, logit_tokens)
        elif key_positions is not None:
            keys = tuple(key_positions[document.doc_id])
        prefill.forget()
        at = [position - document.first_scored for position in keys or ()]
        results.append(
            DocumentLoss(
                doc_id=document.doc_id,
                n_tokens=len(losses),
                loss_nats=float(losses.astype(np.float64).mean()),
                key_positions=keys,
                key_loss_nats=float(losses[at].astype(np.float64).mean()) if at else math.nan,
            )
        )
        if on_tokens is not None:
            on_tokens(len(document.ids))
    return results


def _check(
    document: TokenDocument, long_ppl: LongPpl | None, key_positions: Mapping[str, Sequence[int]] | None
) -> None:
    name, n_tokens = document.doc_id, len(document.ids)
    if n_tokens <= document.first_scored:
        raise LccpError(f"document {name} has {n_tokens} tokens, none of them to predict; give a longer one")
    if long_ppl is not None and n_tokens <= long_ppl.short_context:
        raise LccpError(
            f"document {name} has {n_tokens} tokens, LongPPL needs more than its short context of "
            f"{long_ppl.short_context}; give longer documents or a shorter short_context"
        )
    if key_positions is not None:
        if name not in key_positions:
            raise LccpError(f"no key tokens are given for document {name}; look for them in the same documents")
        outside = [at for at in key_positions[name] if not document.first_scored <= at < n_tokens]
        if outside:
            raise LccpError(
                f"document {name}: key token {outside[0]} is outside positions {document.first_scored} to "
                f"{n_tokens - 1}; look for them in the same documents"
            )


def token_losses(
    prefill: Prefill, document: TokenDocument, *, first: int, logit_tokens: int = LOGIT_TOKENS
) -> Float[np.ndarray, " token"]:
    """Loss of every token of a document from position `first` on, with everything before it as context.

    Args:
        prefill: of the model; keeps the keys and values of the document.
        document: the tokens.
        first: position of the first token wanted, at least 1.
        logit_tokens: positions whose logits are held at a time.

    Returns:
        float32 `[len(ids) - first]`, nats.

    Raises:
        LccpError: a loss that is no number, or out of memory.
    """
    parts = []
    for begin in range(first, len(document.ids), logit_tokens):
        end = min(begin + logit_tokens, len(document.ids))
        # The logits of token t stand at t - 1; the last token predicts nothing that is asked for.
        logits = prefill.run(document.ids[: end - 1], begin - 1, None)
        parts.append(_losses(logits, torch.tensor(document.ids[begin:end], device=logits.device)).cpu().numpy())
    losses = np.concatenate(parts)
    if not np.isfinite(losses).all():
        at = first + int(np.flatnonzero(~np.isfinite(losses))[0])
        half = prefill.model.dtype != "float32"
        raise LccpError(
            f"checkpoint {prefill.model.name}, document {document.doc_id}: the loss of token {at} is no number; "
            + (f"try --dtype float32 ({prefill.model.dtype} now)" if half else "its weights are broken")
        )
    return losses


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Float32 `[position]` from logits `[position, vocabulary]`."""
    parts = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(part, ids, reduction="none") for part, ids in parts])


def _key_positions(
    prefill: Prefill, document: TokenDocument, long_losses: np.ndarray, options: LongPpl, logit_tokens: int
) -> tuple[int, ...]:
    first = max(options.short_context, document.first_scored)
    short = short_losses(prefill, document, options, logit_tokens=logit_tokens)[first - options.short_context :]
    is_key = key_tokens(long_losses[first - document.first_scored :], short, alpha=options.alpha, beta=options.beta)
    return tuple(int(at) for at in first + np.flatnonzero(is_key))


def short_losses(
    prefill: Prefill, document: TokenDocument, options: LongPpl, *, logit_tokens: int = LOGIT_TOKENS
) -> Float[np.ndarray, " token"]:
    """Loss of every token from position `short_context` on, with a short context only.

    Window w begins at position w x step and gives the losses of the `step` tokens behind its first `short_context`. As
    in the paper's code windows are cut out of the document as they are, without special tokens in front.

    Args:
        prefill, document, logit_tokens: as in `token_losses`.
        options: length and step of the windows.

    Returns:
        float32 `[len(ids) - short_context]`, nats.
    """
    n_short, n_ids = options.short_context, len(document.ids)
    parts = []
    for start in range(0, n_ids - n_short, options.step):
        window = TokenDocument(document.doc_id, document.ids[start : start + n_short + options.step])
        parts.append(token_losses(prefill, window, first=n_short, logit_tokens=logit_tokens))
    return np.concatenate(parts)


@jaxtyped(typechecker=beartype)
def key_tokens(
    long_losses: Float[np.ndarray, " token"],
    short_losses: Float[np.ndarray, " token"],
    *,
    alpha: float | int = 2.0,
    beta: float | int = -2.0,
) -> Bool[np.ndarray, " token"]:
    """Which tokens are key tokens (arXiv 2410.23771): much likelier with the long context, and likely with it.

    Args:
        long_losses: loss with everything before as context, nats.
        short_losses: loss with the short context, nats.
        alpha: log P(long) - log P(short) must be above it.
        beta: log P(long) must be above it.

    Example:
        >>> long, short = np.array([0.1, 0.1, 2.5, 1.9]), np.array([3.0, 2.0, 9.0, 4.0])
        >>> key_tokens(long, short)
        array([ True, False, False,  True])
    """
    return (short_losses - long_losses > alpha) & (-long_losses > beta)


# ---------------------------------------------------------------------------------------------------------------------
# Averages over documents
# ---------------------------------------------------------------------------------------------------------------------


def mean_document_ppl(losses_nats: Sequence[float]) -> float:
    """Mean over documents of exp(mean loss of the document); NaN without documents.

    Example:
        >>> round(mean_document_ppl([0.0, math.log(3)]), 6)
        2.0
    """
    return _mean_and_error([math.exp(loss) for loss in losses_nats])[0]


def pooled_ppl(losses_nats: Sequence[float], n_tokens: Sequence[int]) -> float:
    """exp of the mean loss over the tokens of all documents together; NaN without documents.

    Example:
        >>> round(pooled_ppl([0.0, math.log(4)], [1, 1]), 6), round(pooled_ppl([0.0, math.log(4)], [0, 5]), 6)
        (2.0, 4.0)
    """
    return _pooled_and_error(losses_nats, n_tokens)[0]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over documents; NaN where there are too few."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else math.nan
    return mean, error


def _pooled_and_error(losses_nats: Sequence[float], n_tokens: Sequence[int]) -> tuple[float, float]:
    """The pooled perplexity and its standard error: documents are what was drawn, so they are what varies."""
    n, total = len(losses_nats), sum(n_tokens)
    if not total:
        return math.nan, math.nan
    mean = sum(loss * weight for loss, weight in zip(losses_nats, n_tokens, strict=True)) / total
    ppl = math.exp(mean)
    if n < 2:
        return ppl, math.nan
    spread = sum((weight / total * (loss - mean)) ** 2 for loss, weight in zip(losses_nats, n_tokens, strict=True))
    return ppl, ppl * math.sqrt(n / (n - 1) * spread)


def probe_rows(
    results: Sequence[DocumentLoss], *, checkpoint: str, tokens_seen: int, corpus: str, length: int | None
) -> list[dict[str, Any]]:
    """What `score_corpus` found, as rows of the table of probes.

    Args:
        results: of one checkpoint on one corpus.
        checkpoint, tokens_seen: which checkpoint it was.
        corpus: name of the corpus; the rows' subset.
        length: tokens of each document; None where they differ.

    Returns:
        Benchmark `corpus-ppl` with metrics `ppl` (mean over documents) and `pooled_ppl`, n documents. Where key tokens
        were looked for, benchmark `LongPPL` with the same two over the n documents that have any (NaN where none has),
        and `key_tokens`, their mean number per document. Standard errors are over documents, NaN for fewer than two.

    Example:
        >>> results = [DocumentLoss("a", 9, math.log(3)), DocumentLoss("b", 9, math.log(5))]
        >>> row = probe_rows(results, checkpoint="step-1", tokens_seen=1000, corpus="books", length=10)[0]
        >>> row["benchmark"], row["metric"], round(row["score"], 6), row["n"]
        ('corpus-ppl', 'ppl', 4.0, 2)
    """
    if not results:
        raise LccpError(f"no documents of corpus {corpus} were scored for checkpoint {checkpoint}; give at least one")

    def row(benchmark: str, metric: str, score: tuple[float, float], n: int) -> dict[str, Any]:
        value, error = score
        return {
            "checkpoint": checkpoint, "tokens_seen": tokens_seen, "benchmark": benchmark, "subset": corpus,
            "length": length, "metric": metric, "score": value, "n": n, "stderr": error,
        }  # fmt: skip

    def pair(benchmark: str, losses: Sequence[float], counts: Sequence[int]) -> list[dict[str, Any]]:
        return [
            row(benchmark, "ppl", _mean_and_error([math.exp(loss) for loss in losses]), len(losses)),
            row(benchmark, "pooled_ppl", _pooled_and_error(losses, counts), len(losses)),
        ]

    rows = pair("corpus-ppl", [result.loss_nats for result in results], [result.n_tokens for result in results])
    counted = [result for result in results if result.key_positions is not None]
    if counted:
        counts = [len(result.key_positions or ()) for result in counted]
        keyed = [result for result in counted if result.key_positions]
        rows += pair("LongPPL", [r.key_loss_nats for r in keyed], [len(r.key_positions or ()) for r in keyed])
        rows.append(row("LongPPL", "key_tokens", _mean_and_error(counts), len(counted)))
    return rows
