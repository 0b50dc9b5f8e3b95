"""Copying and matching by weights alone: slow twins over whole matrices, planted heads, random weights."""

from __future__ import annotations

import types

import planted
import pytest
import torch
from conftest import tiny_model

from lccp_interp.capture.model import HookedModel, load_model
from lccp_interp.interventions.weights import copying_scores, diagonal_scores, matching_scores, plain_tokens
from lccp_interp.schema import LccpError

N_TOKENS, N_HEADS, D_HEAD = 60, 4, 8


class Vocabulary(types.SimpleNamespace):
    """As much of a tokenizer as is asked for: tokens 0-2 are special."""

    all_special_ids = (0, 1, 2)

    def __len__(self):
        return N_TOKENS


def small(kind, **changes):
    return HookedModel(tiny_model(kind, vocab_size=N_TOKENS, **changes), Vocabulary(), kind)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def rms(x, module, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * module.weight


def parts(layer, x):
    """Query, key and value `[token, head, d]` of a Llama or Qwen3 layer, spelt out, and without any rotation."""
    attention = layer.self_attn
    x = rms(x, layer.input_layernorm)
    q, k, v = (
        (x @ own.weight.T).reshape(len(x), -1, D_HEAD) for own in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        q, k = rms(q, attention.q_norm), rms(k, attention.k_norm)
    return q, k, v


def by_hand(matrix):
    """Both scores of a whole matrix of tokens x tokens."""
    matrix = matrix.double() - matrix.double().mean(dim=1, keepdim=True)
    values = torch.linalg.eigvals(matrix)
    own = [row.argmax() == index for index, row in enumerate(matrix)]
    return float(values.real.sum() / values.abs().sum()), sum(map(float, own)) / len(own)


def read(table, first, second):
    return {(row["layer"], row["head"]): (row[first], row[second]) for row in table.to_dicts()}


def assert_equal(got, expected):
    assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "hunyuan_v1_moe"])
def test_copying_equals_the_whole_matrix(kind):
    model = small(kind)
    inner, unembedding = model.model.model, model.model.get_output_embeddings().weight
    tokens = torch.arange(3, N_TOKENS)
    scores = read(copying_scores(model), "ov_copying", "ov_top")
    assert list(scores) == [(layer, head) for layer in range(3) for head in range(N_HEADS)]
    for layer, module in enumerate(inner.layers):
        # HunYuan's norms of queries and keys do not touch the values.
        attention = module.self_attn
        x = rms(inner.embed_tokens.weight[tokens], module.input_layernorm)
        value = (x @ attention.v_proj.weight.T).reshape(len(tokens), -1, D_HEAD)
        for head in range(N_HEADS):
            out = attention.o_proj.weight[:, head * D_HEAD : (head + 1) * D_HEAD]
            matrix = value[:, head // 2] @ out.T @ (unembedding[tokens] * inner.norm.weight).T
            assert_equal(scores[layer, head], by_hand(matrix))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_matching_equals_the_whole_matrix(kind):
    model = small(kind)
    inner, tokens = model.model.model, torch.arange(3, N_TOKENS)
    scores = read(matching_scores(model), "qk_matching", "qk_top")
    for layer, module in enumerate(inner.layers):
        q, k, _ = parts(module, inner.embed_tokens.weight[tokens])
        for head in range(N_HEADS):
            assert_equal(scores[layer, head], by_hand(q[:, head] @ k[:, head // 2].T))


def test_fused_projections_layer_norms_and_biases():
    """GPT-NeoX: query, key and value of a head lie side by side in one projection."""
    model = small("gpt_neox")
    inner, tokens = model.model.gpt_neox, torch.arange(3, N_TOKENS)
    unembedding = model.model.get_output_embeddings().weight[tokens] * inner.final_layer_norm.weight
    unembedding = unembedding - unembedding.mean(dim=-1, keepdim=True)
    matching = read(matching_scores(model), "qk_matching", "qk_top")
    copying = read(copying_scores(model), "ov_copying", "ov_top")
    for layer, module in enumerate(inner.layers):
        x = module.attention.query_key_value(module.input_layernorm(inner.embed_in.weight[tokens]))
        q, k, v = x.reshape(len(tokens), N_HEADS, 3, D_HEAD).unbind(dim=2)
        for head in range(N_HEADS):
            out = module.attention.dense.weight[:, head * D_HEAD : (head + 1) * D_HEAD]
            assert_equal(matching[layer, head], by_hand(q[:, head] @ k[:, head].T))
            assert_equal(copying[layer, head], by_hand(v[:, head] @ out.T @ unembedding.T))


def test_matching_through_an_earlier_head():
    """Keys are made of what that head alone writes, its projection's bias left out."""
    model = small("llama")
    inner, tokens = model.model.model, torch.arange(3, N_TOKENS)
    for projection in (layer.self_attn.o_proj for layer in inner.layers):
        projection.bias = torch.nn.Parameter(torch.randn(32))
    embedded = inner.embed_tokens.weight[tokens]
    value = parts(inner.layers[0], embedded)[2][:, 1]
    written = value @ inner.layers[0].self_attn.o_proj.weight[:, 2 * D_HEAD : 3 * D_HEAD].T
    scores = read(matching_scores(model, through=(0, 2)), "qk_matching", "qk_top")
    assert list(scores) == [(layer, head) for layer in (1, 2) for head in range(N_HEADS)]
    for layer in (1, 2):
        q = parts(inner.layers[layer], embedded)[0]
        k = parts(inner.layers[layer], written)[1]
        for head in range(N_HEADS):
            assert_equal(scores[layer, head], by_hand(q[:, head] @ k[:, head // 2].T))


def test_first_layers_as_part_of_the_embedding():
    model = small("llama")
    inner, tokens = model.model.model, torch.arange(3, N_TOKENS)
    x = inner.embed_tokens.weight[tokens]
    first = inner.layers[0]
    value = parts(first, x)[2].repeat_interleave(2, dim=1).flatten(1)
    x = x + value @ first.self_attn.o_proj.weight.T
    x = x + first.mlp(rms(x, first.post_attention_layernorm))
    scores = read(matching_scores(model, embed_layers=1), "qk_matching", "qk_top")
    for layer in (1, 2):
        q, k, _ = parts(inner.layers[layer], x)
        for head in range(N_HEADS):
            assert_equal(scores[layer, head], by_hand(q[:, head] @ k[:, head // 2].T))
    q, k, _ = parts(first, inner.embed_tokens.weight[tokens])
    assert_equal(scores[0, 3], by_hand(q[:, 3] @ k[:, 1].T))
    with pytest.raises(LccpError, match="embed_layers must lie between 0 and 2 in llama, got 3"):
        copying_scores(model, embed_layers=3)


def test_a_planted_head_copies_and_matches_through_the_head_before_it(tmp_path):
    """The previous-token head writes each token where the induction head's key looks for it."""
    model = load_model(planted.save_planted(tmp_path / "copies"))
    copying = read(copying_scores(model), "ov_copying", "ov_top")
    matching = read(matching_scores(model), "qk_matching", "qk_top")
    through = read(matching_scores(model, through=(0, 0)), "qk_matching", "qk_top")
    by_chance = pytest.approx(0.0, abs=0.01)
    for head in planted.ROLES:
        assert copying[head] == ((pytest.approx(1.0), 1.0) if head == planted.COPY_HEAD else (0.0, by_chance))
        assert matching[head] == (0.0, by_chance)
        if head[0] == 1:
            assert through[head] == ((pytest.approx(1.0), 1.0) if head == planted.COPY_HEAD else (0.0, by_chance))
    elsewhere = read(matching_scores(model, through=(0, 1)), "qk_matching", "qk_top")
    assert elsewhere[planted.COPY_HEAD] == (0.0, by_chance)


def test_random_weights_neither_copy_nor_match():
    model = HookedModel(tiny_model("llama"), Vocabulary(), "llama")
    model.tokenizer.__class__ = type("Large", (Vocabulary,), {"__len__": lambda self: 700})
    for table, eigen, top in (
        (copying_scores(model), "ov_copying", "ov_top"),
        (matching_scores(model), "qk_matching", "qk_top"),
    ):
        assert table["n_tokens"].unique().to_list() == [697]
        assert abs(table[eigen].mean()) < 0.25
        assert table[eigen].abs().max() < 0.9
        assert table[top].mean() < 0.02


def test_tokens_are_drawn_without_special_ones_and_seeded():
    model = small("llama")
    drawn = plain_tokens(model, 10, 0)
    assert drawn.tolist() == sorted(set(drawn.tolist()) - {0, 1, 2})
    assert len(drawn) == 10
    assert torch.equal(drawn, plain_tokens(model, 10, 0))
    assert not torch.equal(drawn, plain_tokens(model, 10, 1))
    assert plain_tokens(model, 999, 5).tolist() == list(range(3, N_TOKENS))
    assert copying_scores(model, max_tokens=10)["n_tokens"].unique().to_list() == [10]
    with pytest.raises(LccpError, match="circuits of tokens need at least 2 tokens, got 1; ask for more"):
        matching_scores(model, max_tokens=1)


def test_blocks_of_tokens_change_nothing(monkeypatch):
    model = small("llama")
    whole = copying_scores(model), matching_scores(model), matching_scores(model, through=(0, 2))
    monkeypatch.setattr("lccp_interp.interventions.weights.BLOCK_TOKENS", 11)
    parts = copying_scores(model), matching_scores(model), matching_scores(model, through=(0, 2))
    for one, other in zip(whole, parts, strict=True):
        for row, expected in zip(other.to_dicts(), one.to_dicts(), strict=True):
            assert row == pytest.approx(expected, abs=1e-4)


def test_the_model_is_left_as_it_was():
    model = small("llama")
    ids = torch.arange(20)[None]
    before = model.model(ids).logits
    matching_scores(model, through=(1, 0))
    assert torch.equal(model.model(ids).logits, before)
    assert model.model.config._attn_implementation == "sdpa"


def test_what_cannot_be_asked():
    model = small("llama")
    with pytest.raises(LccpError, match="head 2-1 of llama stands in the last layer: no head comes after it"):
        matching_scores(model, through=(2, 1))
    with pytest.raises(LccpError, match="checkpoint llama has no heads 0-9"):
        matching_scores(model, through=(0, 9))
    gated = small("qwen3_next", layer_types=["linear_attention", "full_attention", "full_attention"])
    with pytest.raises(LccpError, match="has no linear module that is given the heads' outputs as they are"):
        copying_scores(gated)
    assert matching_scores(gated)["layer"].unique().sort().to_list() == [1, 2]


def test_scores_of_a_matrix_with_nothing_in_it():
    assert diagonal_scores(torch.zeros(3, 2), torch.ones(3, 2)) == (0.0, pytest.approx(1 / 3))
