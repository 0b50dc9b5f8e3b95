"""The organism: its language and tokenizer, its trainer, and the trajectory that ships with the project."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lccp_interp.organism import language
from lccp_interp.organism.recipe import RECIPES, find_recipe
from lccp_interp.organism.tokenizer import build_tokenizer, piece_ids, save_tokenizer, vocabulary
from lccp_interp.organism.train import checkpoint_table, head_dropout, lr_factor, orthogonalise, pick_rung, train
from lccp_interp.schema import LccpError, Needle

BUNDLED = Path(__file__).parents[1] / "data" / "trajectory"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@settings(max_examples=300, deadline=None)
@given(text=st.text())
@example(text="Mara's ☂\r\n  code\t▁ \0 <s> é  Theodore amber river. \n\n The  ")
@example(text="")
@example(text=" ")
@example(text="\0\0 \x01\x01")
@example(text="👩‍👩‍👧 naïve\x85\u2028end")
def test_tokenizer_is_lossless_on_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from([*language.PIECES, "\n", "\t", "é", "☂"]), max_size=12))
def test_tokenizer_is_lossless_on_mixtures_of_words_and_bytes(tokenizer, words):
    text = "".join(words)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_saved_tokenizer_loads_with_auto_tokenizer_and_has_offsets(tmp_path, recwarn):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    encoded = loaded("Mara's code\nis 407.", return_offsets_mapping=True)
    assert loaded.decode(encoded["input_ids"]) == "Mara's code\nis 407."
    assert encoded["offset_mapping"][:4] == [(0, 4), (4, 6), (6, 11), (11, 12)]
    assert not recwarn.list


def test_vocabulary_has_every_byte_and_no_token_twice():
    words = vocabulary()
    assert len(words) == len(set(words)) == 256 + len(language.PIECES)


# ---------------------------------------------------------------------------------------------------------------------
# Language
# ---------------------------------------------------------------------------------------------------------------------

WRITERS = [language.question_document, language.repeat_document, language.story_document]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("n_tokens", [65, 129, 257, 1025])
def test_every_piece_of_a_document_is_one_token_of_the_tokenizer(tokenizer, writer, n_tokens):
    ids = piece_ids()
    for trial in range(5):
        document = writer(Random(f"{n_tokens}-{trial}"), n_tokens)
        assert len(document.pieces) == len(document.weights) == n_tokens
        assert [ids[piece] for piece in document.pieces] == tokenizer.encode(document.text).ids


def test_answers_weigh_one_and_fresh_payload_nothing():
    document = language.question_document(Random("weights"), 512)
    answered = set()
    for match in re.finditer(r"\nAnswer:( .+?)\.(?=\n|$)", document.text):
        start = len(language.split_pieces(document.text[: match.start(1)]))
        n_pieces = len(language.split_pieces(match[1]))
        assert document.weights[start : start + n_pieces] == [language.COPY_WEIGHT] * n_pieces
        answered.add(match[1])
    assert answered
    context = document.text[: document.text.index("\nQuestion:")]
    for answer in answered:
        start = len(language.split_pieces(context[: context.index(answer + ".")]))
        n_pieces = len(language.split_pieces(answer))
        assert document.weights[start : start + n_pieces] == [language.FRESH_WEIGHT] * n_pieces


def test_first_token_of_an_answer_can_weigh_more():
    plain = language.question_document(Random("weights"), 512)
    heavy = language.question_document(Random("weights"), 512, first_weight=3.0)
    assert plain.pieces == heavy.pieces
    firsts = [i for i, weight in enumerate(heavy.weights) if weight == 3.0]
    assert len(firsts) == heavy.text.count("\nAnswer:")
    assert all(heavy.pieces[i - 1] == ":" for i in firsts)
    assert [w for i, w in enumerate(heavy.weights) if i not in firsts] == [
        w for i, w in enumerate(plain.weights) if i not in firsts
    ]


def test_haystack_ends_even_when_every_pair_is_to_be_avoided():
    everything = " ".join([*language.NAMES, *(topic.attribute for topic in language.TOPICS)])
    text = language.haystack(200, seed=0, avoid=[Needle(needle=everything, question="?", answer="Mara")])
    assert not any(f" {topic.attribute} " in text for topic in language.TOPICS)


def test_only_what_stood_earlier_is_asked_for_at_full_weight():
    document = language.repeat_document(Random("repeat"), 512)
    for i, (piece, weight) in enumerate(zip(document.pieces, document.weights, strict=True)):
        if weight == language.COPY_WEIGHT and i > 100:  # the left edge may cut a first mention off
            assert piece in document.pieces[:i]


def test_needles_are_distinct_facts_that_contain_their_answer():
    drawn = language.needles(60, seed=7)
    assert drawn == language.needles(60, seed=7) != language.needles(60, seed=8)
    for needle in drawn:
        assert needle.needle.count(needle.answer) == 1
        assert len(language.split_pieces(" " + needle.answer)) >= 5
    assert len({needle.question.split()[0] for needle in drawn}) >= 3


def test_needles_refuse_a_negative_number():
    with pytest.raises(LccpError, match="cannot draw -1 needles"):
        language.needles(-1, seed=0)


@pytest.mark.parametrize("n_tokens", [1, 300, 9000])
def test_haystack_is_long_enough_deterministic_and_made_of_sentences(tokenizer, n_tokens):
    text = language.haystack(n_tokens, seed=3)
    assert text == language.haystack(n_tokens, seed=3) != language.haystack(n_tokens, seed=4)
    assert len(tokenizer.encode(text).ids) >= n_tokens
    assert text.endswith(".")
    assert "\n" not in text
    assert "  " not in text


def test_haystack_avoids_the_needles_pairs_but_shares_their_names_and_attributes():
    drawn = language.needles(10, seed=1)
    text = language.haystack(20_000, seed=1, avoid=drawn)
    for needle in drawn:
        ((attribute, name),) = language._pairs_in(needle.needle)
        told = [f"{attribute} of {name} is", f"{name}'s {attribute} is", f"For {name} the {attribute} is"]
        assert not any(form in text for form in told)
        assert name in text
        assert f" {attribute} " in text


@pytest.mark.parametrize("bad", [{"n_tokens_hint": 0}, {"n_tokens_hint": 10, "fact_every": 0.0}])
def test_haystack_refuses_numbers_that_are_not_positive(bad):
    with pytest.raises(LccpError, match="give positive numbers"):
        language.haystack(**bad, seed=0)


def test_language_and_recipe_import_without_torch():
    import subprocess
    import sys

    code = "import sys, lccp_interp.organism.language, lccp_interp.organism.recipe, lccp_interp.organism.tokenizer;"
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Recipe and trainer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", RECIPES)
def test_checkpoints_are_in_order_at_whole_steps_with_names_of_their_own(size):
    table = checkpoint_table(find_recipe(size))
    seen = [entry["tokens_seen"] for entry in table]
    assert seen == sorted(set(seen))
    assert len({entry["name"] for entry in table}) == len(table)
    assert [entry["name"] for entry in table] == sorted(entry["name"] for entry in table)
    for stage in find_recipe(size).stages:
        assert sum(rung.share for rung in stage.rungs) == pytest.approx(1.0)


def test_unknown_size_lists_the_known_ones_and_the_nearest():
    with pytest.raises(LccpError, match=r"'smal': known sizes are tiny, small.*did you mean 'small'\?"):
        find_recipe("smal")


def test_climb_waits_for_the_gate_and_then_shares_what_is_left():
    stage = find_recipe("small").stages[0]
    lengths = {
        gate_step: [
            pick_rung(stage, n_steps=100, seed=0, step=step, gate_step=gate_step).context_length for step in range(100)
        ]
        for gate_step in (50, 80, None)
    }
    assert lengths[None] == [64] * 100
    assert lengths[50] == [64] * 50 + [128] * 20 + [256] * 30
    assert lengths[80] == [64] * 80 + [128] * 8 + [256] * 12


def test_interleaved_lengths_come_in_their_shares_and_depend_on_the_seed():
    stage = find_recipe("small").stages[1]
    drawn = [pick_rung(stage, n_steps=400, seed=0, step=step, gate_step=None).context_length for step in range(400)]
    other = [pick_rung(stage, n_steps=400, seed=1, step=step, gate_step=None).context_length for step in range(400)]
    assert drawn != other
    for rung in stage.rungs:
        assert drawn.count(rung.context_length) / 400 == pytest.approx(rung.share, abs=0.07)


def test_learning_rate_warms_up_stays_and_decays():
    stage = find_recipe("small").stages[1]
    assert lr_factor(stage, tokens=0) < 0.001
    assert lr_factor(stage, tokens=stage.warmup_tokens) == stage.lr_scale
    assert lr_factor(stage, tokens=stage.n_tokens - stage.decay_tokens) == stage.lr_scale
    assert lr_factor(stage, tokens=stage.n_tokens) == pytest.approx(stage.lr_scale * stage.final_lr_scale)


def test_orthogonalise_brings_singular_values_near_one():
    import torch

    stack = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(stack))
    assert values.min() > 0.5
    assert values.max() < 1.5
    torch.testing.assert_close(orthogonalise(stack.mT), orthogonalise(stack).mT)


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("organism") / "undisturbed", seed=3, size="tiny")


def test_training_leaves_a_trajectory_and_no_state(undisturbed):
    trajectory = json.loads((undisturbed / "trajectory.json").read_text())
    assert trajectory["seed"] == 3
    assert trajectory["size"] == "tiny"
    assert trajectory["checkpoints"] == checkpoint_table(RECIPES["tiny"])
    folders = {entry["path"] for entry in trajectory["checkpoints"]}
    assert {path.name for path in undisturbed.iterdir()} == folders | {"trajectory.json"}


@pytest.mark.parametrize("stop_at_step", [1, 5, 8, 9, 13, 16])
def test_interrupted_and_resumed_equals_undisturbed_to_the_bit(tmp_path, undisturbed, stop_at_step):
    def interrupt(done: int, total: int, message: str) -> None:
        if done == stop_at_step * RECIPES["tiny"].stages[0].tokens_per_step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, seed=3, size="tiny", progress=interrupt)
    assert (tmp_path / ".state").exists()
    train(tmp_path, seed=3, size="tiny")
    assert _contents(tmp_path) == _contents(undisturbed)


def test_same_seed_same_bits_other_seed_others(tmp_path, undisturbed):
    again, other = train(tmp_path / "again", seed=3, size="tiny"), train(tmp_path / "other", seed=4, size="tiny")
    assert _contents(again) == _contents(undisturbed)
    weights = "04-lccp-2K/model.safetensors"
    assert _contents(other)[weights] != _contents(undisturbed)[weights]


def test_resuming_really_continues(tmp_path):
    steps: list[int] = []

    def interrupt(done: int, total: int, message: str) -> None:
        steps.append(done // RECIPES["tiny"].stages[0].tokens_per_step)
        if len(steps) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, size="tiny", progress=interrupt)
    train(tmp_path, size="tiny", progress=interrupt)
    assert steps == [*range(1, 11), *range(9, 17)]  # from the state saved at the end of the first stage


def test_finished_run_returns_at_once(undisturbed):
    before = _contents(undisturbed)

    def forbidden(done: int, total: int, message: str) -> None:
        raise AssertionError("a finished run was trained again")

    assert train(undisturbed, seed=3, size="tiny", progress=forbidden) == undisturbed
    assert _contents(undisturbed) == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 4, "size": "tiny"}, r"holds an organism run with seed 3, expected seed 4: give another --out"),
        ({"seed": 3, "size": "small"}, r"size 'tiny', expected size 'small'"),
        ({"seed": 3, "size": "tiny", "threads": 2}, r"threads 1, expected threads 2"),
    ],
)
def test_folder_of_another_run_is_refused(undisturbed, other, message):
    with pytest.raises(LccpError, match=message):
        train(undisturbed, **other)


def test_folder_of_an_interrupted_other_run_is_refused(tmp_path):
    def interrupt(done: int, total: int, message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, seed=1, size="tiny", progress=interrupt)
    with pytest.raises(LccpError, match="seed 1, expected seed 2"):
        train(tmp_path, seed=2, size="tiny")


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LccpError, match="holds no organism run"):
        train(tmp_path, size="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("bad", [{"seed": -1}, {"threads": 0}])
def test_bad_numbers_are_refused(tmp_path, bad):
    with pytest.raises(LccpError, match="expected seed >= 0 and threads >= 1"):
        train(tmp_path, size="tiny", **bad)


def test_head_dropout_silences_whole_heads_and_leaves_no_hook():
    import torch

    from lccp_interp.organism.train import build_model

    recipe = RECIPES["tiny"]
    torch.manual_seed(0)
    model = build_model(recipe, rope_theta=1e4).eval()
    seen = []
    layer = model.model.layers[0].self_attn.o_proj
    tokens = torch.arange(12)[None].repeat(64, 1)
    with head_dropout(model, 0.5, torch.Generator().manual_seed(0)):
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(tokens)
    handle.remove()
    silent = seen[0].unflatten(-1, (recipe.size.n_heads, recipe.size.d_head)).abs().sum((1, 3)) == 0
    assert 0.3 < silent.float().mean() < 0.7
    assert not layer._forward_pre_hooks


# ---------------------------------------------------------------------------------------------------------------------
# The bundled trajectory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    return json.loads((BUNDLED / "trajectory.json").read_text())


def test_bundled_trajectory_is_what_the_recipe_says(bundled):
    from lccp_interp.organism.train import DEFAULT_SEED

    assert bundled["seed"] == DEFAULT_SEED
    assert bundled["size"] == "small"
    assert bundled["recipe"] == json.loads(json.dumps(RECIPES["small"].as_dict()))
    assert bundled["checkpoints"] == checkpoint_table(RECIPES["small"])
    stages = [entry["stage"] for entry in bundled["checkpoints"]]
    assert stages.count("pretrain") >= 3
    assert stages.count("lccp") >= 12


def test_bundled_trajectory_fits_in_fifteen_megabytes():
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) <= 15_000_000


def test_bundled_configs_agree_with_the_trajectory(bundled):
    for entry in bundled["checkpoints"]:
        config = json.loads((BUNDLED / entry["path"] / "config.json").read_text())
        assert config["rope_parameters"]["rope_theta"] == entry["rope_theta"]
        assert config["max_position_embeddings"] >= entry["context_length"]
        assert (BUNDLED / entry["path"] / "tokenizer.json").read_text() == build_tokenizer().to_str()
    assert bundled["checkpoints"][-1]["context_length"] == 4096


def test_bundled_checkpoint_loads_and_answers_a_question(bundled):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = BUNDLED / bundled["checkpoints"][-1]["path"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    right = total = 0
    for needle in language.needles(8, seed=11):
        before, after = language.haystack(100, seed=1, avoid=[needle]), language.haystack(100, seed=2, avoid=[needle])
        prompt = f"{before}\n{needle.needle}\n{after}\nQuestion: {needle.question}\nAnswer:"
        asked, answer = tokenizer(prompt)["input_ids"], tokenizer(" " + needle.answer)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
        right += int((logits.argmax(-1) == torch.tensor(answer)).sum())
        total += len(answer)
    assert right / total > 0.7


@pytest.mark.slow
def test_the_recipe_grows_the_bundled_trajectory_again(bundled, tmp_path):
    """Two minutes: the first bundled checkpoint, from nothing. Other processors may round differently, so: nearly."""
    import torch
    from safetensors.torch import load_file

    weights = Path(bundled["checkpoints"][0]["path"]) / "model.safetensors"

    class Enough(Exception):
        pass

    def stop(done, total, message):
        if (tmp_path / "run" / weights).exists():
            raise Enough

    with pytest.raises(Enough):
        train(tmp_path / "run", seed=bundled["seed"], progress=stop)
    grown = load_file(tmp_path / "run" / weights)
    for name, expected in load_file(BUNDLED / weights).items():
        likeness = torch.cosine_similarity(grown[name].float().flatten(), expected.float().flatten(), dim=0)
        assert likeness > 0.99, name
