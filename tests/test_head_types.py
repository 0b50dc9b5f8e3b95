"""Head types on repeated random tokens: slow twins, a model whose heads are known, and prompts of the right form."""

from __future__ import annotations

from types import SimpleNamespace

import planted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lccp_interp.capture.model import load_model
from lccp_interp.schema import LccpError
from lccp_interp.scoring.types import HEAD_TYPES, head_types, repeated_tokens
from lccp_interp.tasks.pieces import PieceEncoder


def slow_types(weights, ids):
    """Every type of one head by its definition: sums over keys, mean over the queries that have any."""
    found = {name: [] for name in HEAD_TYPES}
    for i, row in enumerate(weights):
        earlier = [j for j in range(i) if ids[j] == ids[i]]
        if i > 0:
            found["previous_token"].append(row[i - 1])
        if earlier:
            found["duplicate_token"].append(sum(row[j] for j in earlier))
            found["induction"].append(row[earlier[-1] + 1])
            found["prefix_matching"].append(sum(row[j + 1] for j in earlier))
    return {name: sum(values) / len(values) if values else None for name, values in found.items()}


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_types_equal_their_slow_twins(data):
    ids = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=14))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    weights = torch.rand(2, len(ids), len(ids), generator=generator).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    for name, score in HEAD_TYPES.items():
        for got, head in zip(score(weights, torch.tensor(ids)).tolist(), weights.tolist(), strict=True):
            expected = slow_types(head, ids)[name]
            assert got == pytest.approx(float("nan") if expected is None else expected, abs=1e-5, nan_ok=True), name


def test_a_model_whose_heads_are_known(tmp_path):
    table = head_types(load_model(planted.save_planted(tmp_path / "copies")), n_prompts=3)
    scores = {(row["layer"], row["head"]): row for row in table.to_dicts()}
    assert set(scores) == set(planted.ROLES)
    for place, role in planted.ROLES.items():
        row = scores[place]
        assert row["n"] == 3
        assert (row["previous_token"] > 0.9) == (role == "previous"), place
        assert row["duplicate_token"] < 0.1
        if role == "induction":
            # It attends to all earlier places alike: of three repeats to the last one by 1, 1/2 and 1/3.
            assert row["prefix_matching"] > 0.95
            assert row["induction"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=0.03)
        else:
            assert max(row["induction"], row["prefix_matching"]) < 0.1, place


def test_random_weights_have_no_types(checkpoint):
    """All near what even attention would have: a mean of 1 / (i + 1), some more for three places than for one."""
    table = head_types(load_model(checkpoint), n_prompts=20)
    assert table.height == 12
    for name, most in {"previous_token": 0.2, "duplicate_token": 0.2, "induction": 0.1, "prefix_matching": 0.2}.items():
        assert 0 < table[name].max() < most, name


def test_the_table_is_the_mean_of_full_maps(checkpoint):
    model = load_model(checkpoint)
    ids = repeated_tokens(model, n_prompts=2, n_distinct=7, n_repeats=3, seed=4)
    maps = model.attention_rows(ids, range(21))
    table = head_types(model, n_prompts=2, n_distinct=7, n_repeats=3, seed=4)
    for row in table.to_dicts():
        twins = [slow_types(maps[row["layer"]][p, row["head"]].tolist(), ids[p].tolist()) for p in range(2)]
        for name in HEAD_TYPES:
            assert row[name] == pytest.approx(sum(twin[name] for twin in twins) / 2, abs=1e-5)


def test_tokens_in_front_of_every_text_are_neither_query_nor_key(checkpoint, monkeypatch):
    model = load_model(checkpoint)
    monkeypatch.setattr(PieceEncoder, "prefix", [3, 1])
    ids = repeated_tokens(model, n_prompts=1, n_distinct=6)
    fed = torch.cat([torch.tensor([[3, 1]]), ids], dim=1)
    maps = model.attention_rows(fed, range(2, fed.shape[1]))
    for row in head_types(model, n_prompts=1, n_distinct=6).to_dicts():
        twin = slow_types(maps[row["layer"]][0, row["head"], :, 2:].tolist(), ids[0].tolist())
        assert {name: row[name] for name in twin} == pytest.approx(twin, abs=1e-5)


def test_prompts_repeat_different_plain_tokens(checkpoint):
    model = load_model(checkpoint)
    ids = repeated_tokens(model, n_prompts=5, seed=1)
    assert ids.shape == (5, 100)
    assert torch.equal(ids, repeated_tokens(model, n_prompts=5, seed=1))
    assert not torch.equal(ids, repeated_tokens(model, n_prompts=5, seed=2))
    for row in ids.tolist():
        assert row == row[:25] * 4
        assert len(set(row)) == 25


def test_special_tokens_are_not_drawn(checkpoint):
    model = load_model(checkpoint)

    class Special(SimpleNamespace):
        def __len__(self):
            return 12

    few = type(model)(model.model, Special(all_special_ids=[0, 3, 11]), "few")
    assert set(repeated_tokens(few, n_prompts=4, n_distinct=9).flatten().tolist()) == {1, 2, *range(4, 11)}
    with pytest.raises(LccpError, match="10 different tokens asked for, few has 9; ask for fewer"):
        repeated_tokens(few, n_prompts=1, n_distinct=10)


@pytest.mark.parametrize("wrong", [{"n_prompts": 0}, {"n_distinct": 1}, {"n_repeats": 1}])
def test_too_little_is_refused(checkpoint, wrong):
    with pytest.raises(LccpError, match="head types need at least 1 prompt of 2 tokens twice, got"):
        head_types(load_model(checkpoint), **wrong)
