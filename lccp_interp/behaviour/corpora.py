"""Corpus perplexity of every checkpoint of a run: long documents read, nothing asked; results join the run's probes.

Beside the perplexity over all tokens stands LongPPL, that over the tokens which need a long context. Which tokens those
are is asked of one checkpoint, the last by default, and held fixed: were each checkpoint measured on key tokens of its
own, the curve would compare different texts. A checkpoint whose results are there is not read again. This module
refuses to know how losses are computed. Cost: one load per checkpoint, one pass over the documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import PROBES_SCHEMA, Run, append_probes, file_stem, is_whole, write_json
from lccp_interp.sweep import Access, find_run_checkpoints, load_located
from lccp_interp.tasks.corpus import ORGANISM_KINDS, TokenDocument, organism_corpus, read_corpus, token_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lccp_interp.scoring.corpus import LongPpl


@dataclass(frozen=True)
class _Corpus:
    """A corpus in tokens, and what a run has to remember of it."""

    run: Run
    name: str
    documents: list[TokenDocument]
    config: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.run.path / "corpora" / f"{file_stem(self.name)}.json"

    @property
    def n_tokens(self) -> int:
        return sum(len(document.ids) for document in self.documents)

    def part(self, checkpoint: Checkpoint) -> str:
        return f"corpus-{self.name}-{checkpoint.name}"

    def is_done(self, checkpoint: Checkpoint) -> bool:
        return is_whole(self.run.path / "probes" / f"{file_stem(self.part(checkpoint))}.parquet")

    def keys(self) -> dict[str, list[int]] | None:
        """Positions of the key tokens per document, once they were found."""
        if not self.path.is_file():
            return None
        known = json.loads(self.path.read_text(encoding="utf-8"))
        differing = sorted(key for key in self.config if known["config"].get(key) != self.config[key])
        if differing:
            key = differing[0]
            raise LccpError(
                f"{self.run.path} holds another corpus {self.name!r}: {', '.join(differing)} differ ({key}: there "
                f"{json.dumps(known['config'].get(key))}, asked {json.dumps(self.config[key])}); repeat its options, "
                "or name the file otherwise"
            )
        return {str(name): list(positions) for name, positions in known["key_positions"].items()}


def probe_corpora(
    run: str | Path | Run,
    corpora: Sequence[str | Path],
    *,
    length: int | None = None,
    documents: int = 8,
    stride: int | None = None,
    long_ppl: LongPpl | None = None,
    reference: str | None = None,
    checkpoints: Sequence[str] | None = None,
    folders: Sequence[str | Path] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    access: Access | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> pl.DataFrame:
    """Perplexity of the checkpoints of a run on long documents, added to its probes.

    Args:
        run: a run folder; its checkpoints are loaded from where run.json says they are.
        corpora: files or folders (`tasks.corpus.read_corpus`), or `questions`, `repeats`, `stories` in the bundled
            language.
        length: tokens of every document; None means the longest length that the run's heads are scored at.
        documents: how many of each corpus.
        stride: cut documents into windows that begin so many tokens apart; None takes the beginning of each.
        long_ppl: how key tokens are found; None means a short context of a sixteenth of the length, in steps of
            half of that (a 64K document as in arXiv 2410.23771: 4096; its step there is 1024).
        reference: checkpoint that says which tokens are key; None means the last one of the run.
        checkpoints, folders: as in `probe`.
        device, dtype: as in `load_model`.
        access: how checkpoints of a hub, with pickles or code of their own are come by; see `Access`.
        seed: of documents in the bundled language.
        progress: told (tokens done, tokens in all, message).

    Returns:
        The rows of the `probes` table: benchmarks `corpus-ppl` and `LongPPL`, subset the corpus, metrics `ppl` (mean
        over documents), `pooled_ppl`, and `key_tokens`.

    Raises:
        LccpError: documents that are missing or too short, a corpus of this name with other options in the run, or what
            `probe` says of checkpoints.

    Example:
        >>> probe_corpora("runs/demo", ["questions"], length=2048)   # doctest: +SKIP
    """
    from lccp_interp.capture.model import load_tokenizer
    from lccp_interp.scoring.corpus import LongPpl, probe_rows, score_corpus

    opened = run if isinstance(run, Run) else Run.open(run)
    report = progress or (lambda done, total, message: None)
    length = _longest(opened) if length is None else length
    long_ppl = long_ppl or LongPpl(short_context=max(1, length // 16), step=max(1, length // 32))
    reference = opened.checkpoints["name"][-1] if reference is None else reference
    chosen = find_run_checkpoints(opened, checkpoints, folders, access)
    (judge,) = [c for c in chosen if c.name == reference] or find_run_checkpoints(opened, [reference], folders, access)
    trusted = access is not None and access.trust_remote_code
    tokenizer = load_tokenizer(judge.path, trust_remote_code=trusted)
    options = {"length": length, "documents": documents, "stride": stride, "long_ppl": asdict(long_ppl), "seed": seed}
    found = [_read(opened, corpus, tokenizer, {**options, "reference": reference}) for corpus in corpora]
    # The judge goes first: what it calls key tokens, the others are measured on.
    order = [judge, *(checkpoint for checkpoint in chosen if checkpoint.name != judge.name)]
    todo = {
        checkpoint.name: [
            corpus
            for corpus in found
            if (checkpoint in chosen and not corpus.is_done(checkpoint))
            or (checkpoint is judge and corpus.keys() is None)
        ]
        for checkpoint in order
    }
    total = sum(corpus.n_tokens for corpora_left in todo.values() for corpus in corpora_left)
    done = 0
    for checkpoint in order:
        if not todo[checkpoint.name]:
            continue
        report(done, total, checkpoint.name)
        model = load_located(checkpoint, device=device, dtype=dtype, access=access)
        for corpus in todo[checkpoint.name]:

            def advance(n_tokens: int, name: str = checkpoint.name) -> None:
                nonlocal done
                done += n_tokens
                report(done, total, name)

            keys = corpus.keys()
            results = score_corpus(
                model,
                corpus.documents,
                long_ppl=long_ppl if keys is None else None,
                key_positions=keys,
                on_tokens=advance,
            )
            if keys is None:
                positions = {result.doc_id: list(result.key_positions or ()) for result in results}
                write_json(corpus.path, {"config": corpus.config, "key_positions": positions})
            if checkpoint in chosen and not corpus.is_done(checkpoint):
                rows = probe_rows(
                    results,
                    checkpoint=checkpoint.name,
                    tokens_seen=checkpoint.tokens_seen,
                    corpus=corpus.name,
                    length=length,
                )
                append_probes(opened.path, corpus.part(checkpoint), pl.DataFrame(rows, schema=PROBES_SCHEMA))
        del model
    report(total, total, "done")
    names = [corpus.name for corpus in found]
    return (
        Run.open(opened.path)
        .probes.filter(pl.col("benchmark").is_in(["corpus-ppl", "LongPPL"]), pl.col("subset").is_in(names))
        .filter(pl.col("checkpoint").is_in([checkpoint.name for checkpoint in chosen]))
        .collect()
        .sort("tokens_seen", "benchmark", "subset", "metric", maintain_order=True)
    )


def _read(run: Run, corpus: str | Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> _Corpus:
    """The documents of a corpus; what they say is part of what the run remembers."""
    length, n_documents = options["length"], options["documents"]
    if str(corpus) in ORGANISM_KINDS:
        name = str(corpus)
        texts = organism_corpus(name, documents=n_documents, length=length, seed=options["seed"])
    else:
        name, texts = Path(corpus).stem, read_corpus(corpus)
    tokens = token_documents(texts, tokenizer, length=length, documents=n_documents, stride=options["stride"])
    digest = hashlib.sha256(json.dumps([document.ids for document in tokens]).encode()).hexdigest()
    return _Corpus(run, name, tokens, {**options, "documents": len(tokens), "sha256": digest})


def _longest(run: Run) -> int:
    longest = run.cases["length"].max()
    if not isinstance(longest, int):
        raise LccpError(f"{run.path} has no cases, so no length to go by; give a length")
    return longest
