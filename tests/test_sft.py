"""Light fine-tuning: the loss is the answers' alone, the seed decides, failures are said, nothing else is touched."""

from __future__ import annotations

import builtins
import math
import random

import numpy as np
import pytest
import torch

from lccp_interp.behaviour.sft import SftDiverged, SftRecipe, fine_tune, training_examples
from lccp_interp.capture.model import load_model
from lccp_interp.schema import Item, LccpError
from lccp_interp.tasks.items import Piece, PromptWriter


def make_items(tokenizer, n: int = 12) -> list[Item]:
    writer = PromptWriter(tokenizer)
    items = []
    facts = zip(["Mara", "Tom", "Ines", "Paul"] * 3, ["Oslo", "Lima", "Cairo"] * 4, strict=True)
    for i, (name, city) in enumerate(facts):
        pieces = [Piece(f"{name} grew up in"), Piece(f" {city}.", True), Piece("\nQuestion: Where?\nAnswer:")]
        draft = writer.draft(pieces)
        items.append(Item(f"i{i}", "b", "s", 64, draft.ids, (city,), f" {city}", "exact", 8, ("\n",), draft.evidence))
    return items[:n]


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.model.parameters()])


def test_examples_end_as_answers_end(tokenizer):
    item = make_items(tokenizer, 1)[0]
    example = training_examples([item], tokenizer)[0]
    assert example.ids[: example.n_prompt] == item.prompt_ids
    # This tokenizer has no end-of-text token, so the stop string ends the answer.
    assert tokenizer.decode(list(example.ids[example.n_prompt :])) == " Oslo\n"


def test_the_loss_is_that_of_the_answers(checkpoint):
    model = load_model(checkpoint)
    items = make_items(model.tokenizer, 5)
    total, count = 0.0, 0
    for example in training_examples(items, model.tokenizer):
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            log_p = model.model(ids).logits[0].log_softmax(-1)
        for position in range(example.n_prompt, len(example.ids)):
            total -= float(log_p[position - 1, example.ids[position]])
            count += 1
    result = fine_tune(model, items, SftRecipe(epochs=1, batch_size=5, learning_rate=1e-6))
    assert result.losses_nats == pytest.approx((total / count,), rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_learns_and_the_seed_decides(checkpoint, method):
    recipe = SftRecipe(epochs=6, batch_size=4, method=method, lora_rank=4, seed=3)
    runs = []
    for seed in (3, 3, 4):
        model = load_model(checkpoint)
        before = weights(model).clone()
        result = fine_tune(model, make_items(model.tokenizer), SftRecipe(**{**recipe.config(), "seed": seed}))
        assert result.losses_nats[-1] < result.losses_nats[0]
        assert len(result.losses_nats) == 18
        after = weights(result.model)
        assert after.shape == before.shape
        assert not torch.equal(after, before)
        assert not result.model.model.training
        assert not any(p.requires_grad for p in result.model.model.parameters())
        runs.append(after)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_learning_rate_goes_with_the_inverse_of_the_width(checkpoint):
    model = load_model(checkpoint).model
    width = model.config.hidden_size
    assert SftRecipe().resolved(model).learning_rate == pytest.approx(2e-5 * 4096 / width)
    assert SftRecipe(method="lora").resolved(model).learning_rate == pytest.approx(2e-4 * 4096 / width)
    assert SftRecipe(learning_rate=0.1).resolved(model).learning_rate == 0.1
    assert SftRecipe().resolved(model).method == "full"


def test_the_schedule_ends_at_a_quarter(checkpoint):
    from lccp_interp.behaviour import sft

    model = load_model(checkpoint)
    seen = []
    original = sft._trainer

    def spy(*args):
        trainer = original(*args)
        seen.append(trainer)
        return trainer

    sft._trainer = spy
    try:
        fine_tune(model, make_items(model.tokenizer), SftRecipe(batch_size=1, learning_rate=0.004))
    finally:
        sft._trainer = original
    rates = [entry["learning_rate"] for entry in seen[0].state.log_history if "learning_rate" in entry]
    # The rate is logged before each of 24 steps: cosine from the whole to a quarter.
    expected = [0.004 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * step / 24))) for step in range(24)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_random_states_are_left_alone(checkpoint):
    def draw():
        return torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002

    def seed():
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        random.seed(5)

    seed()
    expected = draw()
    seed()
    model = load_model(checkpoint)
    fine_tune(model, make_items(model.tokenizer, 2), SftRecipe(epochs=1, method="lora", lora_rank=2))
    assert draw() == expected


@pytest.mark.parametrize(("method", "file"), [("full", "model.safetensors"), ("lora", "adapter_model.safetensors")])
def test_the_result_is_kept_where_asked(checkpoint, tmp_path, method, file):
    model = load_model(checkpoint)
    result = fine_tune(
        model, make_items(model.tokenizer, 4), SftRecipe(method=method, lora_rank=2), keep=tmp_path / "tuned"
    )
    assert (tmp_path / "tuned" / file).is_file()
    if method == "full":
        assert torch.equal(weights(load_model(tmp_path / "tuned")), weights(result.model))


def test_a_tuned_model_can_be_captured(checkpoint):
    model = load_model(checkpoint)
    tuned = fine_tune(model, make_items(model.tokenizer, 4), SftRecipe(method="lora", lora_rank=2)).model
    rows = tuned.attention_rows(torch.tensor([[1, 2, 3, 4]]), [-1])
    assert sorted(rows) == [0, 1, 2]
    assert torch.allclose(rows[0].sum(-1), torch.ones(1))


def test_progress_counts_steps(checkpoint):
    model = load_model(checkpoint)
    told = []
    fine_tune(model, make_items(model.tokenizer, 4), SftRecipe(batch_size=2), on_step=lambda *x: told.append(x))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_divergence_is_told_with_its_loss(checkpoint):
    model = load_model(checkpoint)
    with pytest.raises(
        SftDiverged, match=r"checkpoint tokens-1M: fine-tuning diverged, its loss went from .* try a smaller"
    ) as error:
        fine_tune(
            model, make_items(model.tokenizer), SftRecipe(epochs=5, learning_rate=50.0, batch_size=2, max_grad_norm=1e9)
        )
    assert not error.value.loss_nats < 1


def test_bad_recipes_and_empty_mixtures(checkpoint):
    with pytest.raises(LccpError, match="unknown method 'prefix' of fine-tuning; known: auto, full, lora"):
        SftRecipe(method="prefix")
    with pytest.raises(LccpError, match="epochs above 0"):
        SftRecipe(epochs=0)
    with pytest.raises(LccpError, match="learning rate must be above 0, got -1"):
        SftRecipe(learning_rate=-1)
    with pytest.raises(LccpError, match=r"final_lr_scale is a share of the learning rate, 0\.\.1, got 2"):
        SftRecipe(final_lr_scale=2)
    with pytest.raises(LccpError, match="the mixture is empty"):
        fine_tune(load_model(checkpoint), [])


@pytest.mark.parametrize(("package", "method"), [("trl", "full"), ("peft", "lora")])
def test_a_missing_package_says_what_to_install(checkpoint, monkeypatch, package, method):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    model = load_model(checkpoint)
    items = make_items(model.tokenizer, 2)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(LccpError, match=rf"{package}.*install lccp_interp\[train\]"):
        fine_tune(model, items, SftRecipe(method=method))
