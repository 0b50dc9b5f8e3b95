"""Corpus perplexity: documents of exact lengths, and losses against one full pass per token."""

from __future__ import annotations

import json
import math
import statistics
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from conftest import tiny_model
from external import external
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lccp_interp.capture.model import HookedModel, load_model
from lccp_interp.capture.prefill import Prefill
from lccp_interp.organism.language import split_pieces
from lccp_interp.schema import LccpError
from lccp_interp.scoring.corpus import (
    DocumentLoss,
    LongPpl,
    key_tokens,
    mean_document_ppl,
    pooled_ppl,
    probe_rows,
    score_corpus,
    short_losses,
    token_losses,
)
from lccp_interp.store import PROBES_SCHEMA
from lccp_interp.tasks.corpus import (
    ORGANISM_KINDS,
    TextDocument,
    TokenDocument,
    organism_corpus,
    read_corpus,
    token_documents,
)

# Documents.


def test_documents_of_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("\ufeffSecond.\n")
    (tmp_path / "a.md").write_text("First.")
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"text": "Third\u2028still third."}, ensure_ascii=False) + '\n\n{"id": 7, "text": "Fourth."}\n'
    )
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "other.bin").write_bytes(b"\xff")
    found = read_corpus(tmp_path)
    assert found == [
        TextDocument("a.md", "First."),
        TextDocument("b.txt", "Second.\n"),
        TextDocument("c.jsonl:1", "Third\u2028still third."),
        TextDocument("7", "Fourth."),
    ]
    assert read_corpus(tmp_path / "a.md") == [found[0]]
    assert read_corpus(tmp_path / "c.jsonl") == found[2:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", r"corpus .*x\.txt is empty \(1 files read\)"),
        ("x.txt", b"ab\xff", r"corpus .*x\.txt is not UTF-8 \(byte 2\); convert it"),
        ("x.jsonl", b'{"text": "a"}\n{', r"x\.jsonl:2: no JSON"),
        ("x.jsonl", b'{"txt": "a"}', r"""x\.jsonl:1: expected a JSON object with a non-empty string 'text'"""),
        ("x.jsonl", b'["a"]', r"x\.jsonl:1: expected a JSON object with a non-empty string 'text'"),
    ],
)
def test_corpora_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LccpError, match=message):
        read_corpus(tmp_path / name)


def test_no_corpus(tmp_path):
    with pytest.raises(LccpError, match=r"no corpus at .*nowhere; give a text file"):
        read_corpus(tmp_path / "nowhere")


TEXTS = [
    TextDocument("long", "Mara found a stone. " * 20),
    TextDocument("short", "It was."),
    TextDocument("x", "a" * 40),
]


def test_documents_are_cut_to_the_length(tokenizer):
    found = token_documents(TEXTS, tokenizer, length=30)
    assert [document.doc_id for document in found] == ["long", "x"]
    assert [len(document.ids) for document in found] == [30, 30]
    assert list(found[0].ids) == tokenizer(TEXTS[0].text)["input_ids"][:30]
    assert [document.first_scored for document in found] == [1, 1]
    assert token_documents(TEXTS, tokenizer, length=30, documents=1) == found[:1]
    whole = token_documents(TEXTS, tokenizer, length=None)
    assert [list(document.ids) for document in whole] == [tokenizer(text.text)["input_ids"] for text in TEXTS]


def test_windows_slide_over_documents(tokenizer):
    ids = tuple(tokenizer(TEXTS[0].text)["input_ids"])
    found = token_documents(TEXTS[:2], tokenizer, length=30, stride=20)
    n_full = (len(ids) - 30) // 20 + 1
    assert [document.doc_id for document in found] == [f"long@{start}" for start in range(0, 20 * n_full, 20)]
    assert [document.ids for document in found] == [ids[start : start + 30] for start in range(0, 20 * n_full, 20)]
    assert len(token_documents(TEXTS[:2], tokenizer, length=30, stride=1)) == len(ids) - 29


def test_documents_after_the_last_one_needed_are_not_read(tokenizer):
    def texts():
        yield TEXTS[0]
        raise AssertionError("read on")

    assert len(token_documents(texts(), tokenizer, length=10, documents=1)) == 1


def test_special_tokens_count_and_are_not_predicted():
    tokenizer = AutoTokenizer.from_pretrained(external("tokenizers/llama3"))
    bos = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 128000)])
    found = token_documents(TEXTS[:1], tokenizer, length=30, stride=20)
    assert len(found) > 1
    for document in found:
        assert len(document.ids) == 30
        assert document.ids[0] == 128000 == tokenizer.bos_token_id
        assert (document.n_special, document.first_scored) == (1, 1)
    assert found[0].ids[21:] == found[1].ids[1:10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 10_000}, r"gives 0 documents of 10000 tokens, at least 1 are needed \(3 read, the longest has \d+"),
        ({"length": 30, "documents": 3}, r"gives 2 documents of 30 tokens, 3 are needed"),
        ({"length": 30, "documents": 0}, "documents must be at least 1, got 0"),
        ({"length": 1}, "documents of 1 tokens have no token to predict"),
        ({"length": 30, "stride": 0}, "windows with stride 0 and length 30: give a stride from 1 upwards"),
        ({"length": None, "stride": 5}, "windows with stride 5 and length None"),
    ],
)
def test_documents_that_cannot_be_cut(tokenizer, options, message):
    with pytest.raises(LccpError, match=message):
        token_documents(TEXTS, tokenizer, **options)


@pytest.mark.parametrize("kind", ORGANISM_KINDS)
def test_the_bundled_corpora_have_the_length_asked_for(tokenizer, kind):
    texts = organism_corpus(kind, documents=3, length=200, seed=4)
    assert len({text.text for text in texts}) == 3
    documents = token_documents(texts, tokenizer, length=200, documents=3)
    for text, document in zip(texts, documents, strict=True):
        assert tokenizer.decode(list(document.ids), clean_up_tokenization_spaces=False) == text.text
        assert len(split_pieces(text.text)) == 200
    assert organism_corpus(kind, documents=2, length=200, seed=4) == texts[:2]
    assert not {text.text for text in organism_corpus(kind, documents=3, length=200, seed=5)} & {t.text for t in texts}


def test_bundled_corpora_that_cannot_be_drawn():
    with pytest.raises(LccpError, match="unknown kind of document 'story'; known: questions, repeats, stories"):
        organism_corpus("story", documents=1, length=10)
    with pytest.raises(LccpError, match="got 0 documents of 10 tokens: give at least 1 of at least 2"):
        organism_corpus("stories", documents=0, length=10)


# Losses. The slow way: for each token one full pass over what stands before it.


@pytest.fixture(scope="module")
def model(checkpoint) -> HookedModel:
    return load_model(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def documents() -> list[TokenDocument]:
    rng = np.random.default_rng(3)
    # Halves that repeat: later tokens are likelier with the first half in sight than without it.
    halves = [rng.integers(0, 688, size=24) for _ in range(3)]
    return [
        TokenDocument(f"d{index}", tuple(int(token) for token in np.concatenate([half, half[: 20 + index]])))
        for index, half in enumerate(halves)
    ]


@torch.inference_mode()
def slow_loss(model: HookedModel, context: tuple[int, ...], token: int) -> float:
    logits = model.model(torch.tensor([context])).logits[0, -1].double()
    return -float(logits.log_softmax(-1)[token])


def slow_losses(model, ids) -> list[float]:
    return [slow_loss(model, ids[:at], ids[at]) for at in range(1, len(ids))]


def slow_short(model, ids, n_short: int, step: int) -> list[float]:
    starts = [(at - n_short) // step * step for at in range(n_short, len(ids))]
    return [
        slow_loss(model, ids[start:at], ids[at]) for at, start in zip(range(n_short, len(ids)), starts, strict=True)
    ]


@pytest.mark.parametrize("logit_tokens", [1, 7, 1000])
@pytest.mark.parametrize("chunk_tokens", [3, 4096])
def test_losses_equal_one_pass_per_token(model, documents, logit_tokens, chunk_tokens):
    results = score_corpus(model, documents, logit_tokens=logit_tokens, chunk_tokens=chunk_tokens)
    for document, result in zip(documents, results, strict=True):
        assert result.doc_id == document.doc_id
        assert result.n_tokens == len(document.ids) - 1
        assert result.loss_nats == pytest.approx(statistics.fmean(slow_losses(model, document.ids)), abs=1e-5)
        assert result.key_positions is None
        assert math.isnan(result.key_loss_nats)
    losses = token_losses(Prefill(model, chunk_tokens=chunk_tokens), documents[0], first=5, logit_tokens=logit_tokens)
    np.testing.assert_allclose(losses, slow_losses(model, documents[0].ids)[4:], atol=2e-5)


@pytest.mark.parametrize(("n_short", "step"), [(8, 4), (5, 7), (1, 1), (30, 100)])
def test_short_contexts_equal_one_pass_per_token(model, documents, n_short, step):
    options = LongPpl(short_context=n_short, step=step)
    fast = short_losses(Prefill(model), documents[1], options, logit_tokens=3)
    np.testing.assert_allclose(fast, slow_short(model, documents[1].ids, n_short, step), atol=2e-5)


def test_long_ppl_equals_the_definition_token_by_token(model, documents):
    """With thresholds at which this random model has key tokens and others."""
    options = LongPpl(alpha=0.3, beta=-6.5, short_context=8, step=4)
    results = score_corpus(model, documents, long_ppl=options, logit_tokens=5)
    n_keys = 0
    for document, result in zip(documents, results, strict=True):
        long = dict(enumerate(slow_losses(model, document.ids), start=1))
        short = dict(enumerate(slow_short(model, document.ids, 8, 4), start=8))
        keys = [at for at in short if short[at] - long[at] > 0.3 and -long[at] > -6.5]
        assert result.key_positions == tuple(keys)
        n_keys += len(keys)
        if keys:
            assert result.key_loss_nats == pytest.approx(statistics.fmean(long[at] for at in keys), abs=1e-5)
    assert 0 < n_keys < sum(len(document.ids) - 8 for document in documents)


def test_key_tokens_of_another_checkpoint(model, documents, make_checkpoint):
    found = score_corpus(model, documents, long_ppl=LongPpl(alpha=0.3, beta=-6.5, short_context=8, step=4))
    keys = {result.doc_id: result.key_positions for result in found}
    assert score_corpus(model, documents, key_positions=keys) == found
    other = load_model(make_checkpoint("other", seed=9), device="cpu")
    for document, result in zip(documents, score_corpus(other, documents, key_positions=keys), strict=True):
        losses = slow_losses(other, document.ids)
        assert result.key_positions == keys[document.doc_id]
        if result.key_positions:
            mean = statistics.fmean(losses[at - 1] for at in result.key_positions)
            assert result.key_loss_nats == pytest.approx(mean, abs=1e-5)


def test_no_key_token_is_nan_with_its_count(model, documents):
    results = score_corpus(model, documents, long_ppl=LongPpl(alpha=1000, short_context=8, step=4))
    assert [result.key_positions for result in results] == [(), (), ()]
    rows = probe_rows(results, checkpoint="c", tokens_seen=1, corpus="books", length=None)
    assert [(row["benchmark"], row["metric"], row["n"]) for row in rows] == [
        ("corpus-ppl", "ppl", 3), ("corpus-ppl", "pooled_ppl", 3),
        ("LongPPL", "ppl", 0), ("LongPPL", "pooled_ppl", 0), ("LongPPL", "key_tokens", 3),
    ]  # fmt: skip
    assert math.isnan(rows[2]["score"])
    assert math.isnan(rows[3]["score"])
    assert rows[4]["score"] == 0


def test_logits_are_held_for_few_positions_only(model, documents, monkeypatch):
    """Over all passes no position's logits are made twice, and no pass makes more than asked for."""
    made = []
    forward = HookedModel.forward

    def counting(self, input_ids, n_logits, **options):
        output = forward(self, input_ids, n_logits, **options)
        made.append(output.logits.shape[1])
        return output

    monkeypatch.setattr(HookedModel, "forward", counting)
    score_corpus(model, documents[:1], logit_tokens=6)
    assert max(made) == 6
    assert sum(made) == len(documents[0].ids) - 1


def test_a_model_whose_cache_cannot_be_cropped_runs_documents_whole(documents):
    hybrid = HookedModel(tiny_model("qwen3_next", seed=2), tokenizer=None, name="hybrid")
    assert not hybrid.shares_prefixes
    vocabulary = hybrid.model.config.vocab_size
    document = TokenDocument("d", tuple(token % vocabulary for token in documents[0].ids))
    with pytest.warns(UserWarning, match="hybrid: its linear_attention layers .* for every 20 tokens of it"):
        (result,) = score_corpus(hybrid, [document], logit_tokens=20)
    assert result.loss_nats == pytest.approx(statistics.fmean(slow_losses(hybrid, document.ids)), abs=1e-4)


def test_key_tokens_by_hand():
    long = np.array([0.5, 0.5, 1.9, 2.0, 0.0])
    short = np.array([2.6, 2.5, 4.0, 9.0, 1.0])
    assert key_tokens(long, short).tolist() == [True, False, True, False, False]
    assert key_tokens(long, short, alpha=0.5, beta=-3).tolist() == [True] * 5


# Averages.


def test_averages_by_hand():
    losses, counts = [math.log(2), math.log(8)], [30, 10]
    assert mean_document_ppl(losses) == pytest.approx(5)
    assert pooled_ppl(losses, counts) == pytest.approx(2 ** ((30 * 1 + 10 * 3) / 40))
    assert math.isnan(mean_document_ppl([]))
    assert math.isnan(pooled_ppl([], []))


def test_rows_fit_the_table_of_probes():
    results = [
        DocumentLoss("a", 100, math.log(2), (5, 9), math.log(4)),
        DocumentLoss("b", 100, math.log(8), (), math.nan),
        DocumentLoss("c", 100, math.log(2), (7,), math.log(16)),
    ]
    rows = probe_rows(results, checkpoint="step-1", tokens_seen=10, corpus="books", length=101)
    frame = pl.DataFrame(rows, schema=PROBES_SCHEMA, strict=True)
    assert frame["subset"].unique().to_list() == ["books"]
    assert frame["length"].unique().to_list() == [101]
    by_name = {(row["benchmark"], row["metric"]): row for row in rows}
    ppl = by_name["corpus-ppl", "ppl"]
    assert ppl["score"] == pytest.approx(4)
    assert ppl["stderr"] == pytest.approx(statistics.stdev([2, 8, 2]) / math.sqrt(3))
    pooled = by_name["corpus-ppl", "pooled_ppl"]
    assert pooled["score"] == pytest.approx(2 ** (5 / 3))
    # Equal weights: the standard error of the mean loss, carried through exp.
    error = statistics.stdev([math.log(2), math.log(8), math.log(2)]) / math.sqrt(3)
    assert pooled["stderr"] == pytest.approx(pooled["score"] * error)
    assert (by_name["LongPPL", "ppl"]["score"], by_name["LongPPL", "ppl"]["n"]) == (pytest.approx(10), 2)
    assert by_name["LongPPL", "pooled_ppl"]["score"] == pytest.approx(2 ** (8 / 3))
    assert by_name["LongPPL", "key_tokens"]["score"] == pytest.approx(1)


def test_one_document_has_no_standard_error():
    (ppl, pooled) = probe_rows([DocumentLoss("a", 10, 1.0)], checkpoint="c", tokens_seen=1, corpus="books", length=11)
    assert ppl["score"] == pooled["score"] == pytest.approx(math.e)
    assert math.isnan(ppl["stderr"])
    assert math.isnan(pooled["stderr"])
    with pytest.raises(LccpError, match="no documents of corpus books were scored for checkpoint c"):
        probe_rows([], checkpoint="c", tokens_seen=1, corpus="books", length=11)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"long_ppl": LongPpl()}, "document d0 has 44 tokens, LongPPL needs more than its short context of 4096"),
        ({"long_ppl": LongPpl(short_context=8), "key_positions": {}}, "given and to be looked for as well"),
        ({"key_positions": {"d0": (3,)}}, "no key tokens are given for document d1"),
        ({"key_positions": {"d0": (44,)}}, "document d0: key token 44 is outside positions 1 to 43"),
        ({"logit_tokens": 0}, "logit_tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_scored(model, documents, options, message):
    with pytest.raises(LccpError, match=message):
        score_corpus(model, documents, **options)


def test_a_document_without_a_token_to_predict(model):
    with pytest.raises(LccpError, match="document d has 1 tokens, none of them to predict"):
        score_corpus(model, [TokenDocument("d", (5,))])


def test_short_contexts_that_make_no_sense():
    with pytest.raises(LccpError, match="short context of 0 tokens in steps of 1024: both must be at least 1"):
        LongPpl(short_context=0)


def test_a_loss_that_is_no_number_is_named(model, documents, monkeypatch):
    def broken(self, ids, rows_from, sink):
        logits = torch.zeros(len(ids) - rows_from, 688)
        logits[2] = math.nan
        return logits

    monkeypatch.setattr(Prefill, "run", broken)
    prefill = Prefill(SimpleNamespace(name="step-9", dtype="bfloat16"))
    with pytest.raises(
        LccpError, match=r"checkpoint step-9, document d0: the loss of token 6 is no number; try --dtype float32"
    ):
        token_losses(prefill, documents[0], first=4)
