"""What names of checkpoints tell, and the tokens that are counted from it over stages and branches."""

from __future__ import annotations

import json

import pytest

from lccp_interp.checkpoints import (
    Found,
    find_checkpoints,
    list_checkpoints,
    parse_name,
    read_token_table,
)
from lccp_interp.checkpoints.tokens import Counter, Counting, TokenTable, family_of
from lccp_interp.schema import LccpError

B = 10**9
SMOLLM3 = 2_359_296


@pytest.mark.parametrize(
    ("name", "stage", "branch", "step", "tokens"),
    [
        ("step143000", None, None, 143_000, None),
        ("step0", None, None, 0, None),
        ("step1000-tokens4B", None, None, 1000, 4 * B),
        ("stage1-step928646-tokens3896B", "stage1", None, 928_646, 3896 * B),
        ("stage2-ingredient1-step11931-tokens50B", "stage2", "ingredient1", 11_931, 50 * B),
        ("stage2-ingredient12-step1", "stage2", "ingredient12", 1, None),
        ("stage3-step11921", "stage3", None, 11_921, None),
        ("stage1-step-40000", "stage1", None, 40_000, None),
        ("lc-4k-to-32k-step-20000", "lc-4k-to-32k", None, 20_000, None),
        ("it-mid-training", None, None, None, None),
        ("ckpt_358", None, None, 358, None),
        ("checkpoint-400", None, None, 400, None),
        ("iter_0001000", None, None, 1000, None),
        ("iter_0000000", None, None, 0, None),
        ("global_step1000", None, None, 1000, None),
        ("llama-7B-step100", None, None, 100, None),
        ("lccp-1.2M", None, None, None, 1_200_000),
        ("18-lccp-2.62M", None, None, None, 2_620_000),
        ("main", None, None, None, None),
        ("backstage2-step3", None, None, 3, None),
    ],
)
def test_names_of_public_trajectories(name, stage, branch, step, tokens):
    parts = parse_name(name)
    assert (parts.stage, parts.branch, parts.step, parts.tokens) == (stage, branch, step, tokens)


def count(names, name, repository=None, **said):
    return Counter(names, Counting(**said), repository).count(name)


def test_steps_of_the_first_stage_count_from_zero():
    assert count(["stage1-step10"], "stage1-step10", tokens_per_step=100).seen == 1000
    assert count(["step10"], "step10", tokens_per_step=100).seen == 1000


def test_steps_begin_again_with_every_stage():
    names = ["stage1-step10", "stage2-step10", "stage3-step10"]
    said = {"tokens_per_step": {"stage1": 100, "stage2": 50, "stage3": 10}}
    before = {"stage2": 2000, "stage3": 3000}
    counted = [count(names, name, stage_tokens_before=before, **said) for name in names]
    assert [(one.seen, one.in_stage) for one in counted] == [(1000, 1000), (2500, 500), (3100, 100)]


def test_the_last_checkpoint_of_the_stage_before_is_taken_for_its_end():
    names = ["stage1-step5-tokens20B", "stage1-step9-tokens40B", "stage2-step3-tokens5B"]
    with pytest.warns(
        UserWarning,
        match=r"stage2 of these checkpoints .* after 40000000000 tokens, .*\('stage1-step9-tokens40B'\).*--stage-b",
    ):
        assert count(names, names[2]).seen == 45 * B
    assert count(names, names[2], stage_tokens_before={"stage2": 41 * B}).seen == 46 * B


def test_a_stage_that_is_missing_in_between_is_not_skipped():
    names = ["stage1-step9-tokens40B", "stage3-step3-tokens5B"]
    counted = count(names, names[1])
    assert (counted.seen, counted.in_stage, counted.lacking) == (None, 5 * B, "what came before stage3 is not known")


def test_a_stage_after_branches_follows_the_branch_that_is_chosen():
    names = ["stage1-step9-tokens40B", "stage2-ingredient1-step1-tokens1B", "stage2-ingredient2-step1-tokens3B"]
    names.append("stage3-step1-tokens1B")
    with pytest.warns(UserWarning, match="is taken to begin after"):
        assert count(names, names[3], branch="ingredient2").seen == 44 * B
    assert count(names, names[3], stage_tokens_before={"stage2": 40 * B}).seen is None


def test_pythia_is_known():
    assert count(["step1000"], "step1000", "EleutherAI/pythia-1.4b-deduped").seen == 1000 * 2_097_152
    assert count(["step1000"], "step1000", "EleutherAI/pythia-1.4b-deduped", tokens_per_step=10).seen == 10_000
    assert family_of("EleutherAI/pythia-1.4b-deduped-v0") is None


def test_smollm3_is_known_over_its_stages():
    repository = "HuggingFaceTB/SmolLM3-3B-checkpoints"
    names = ["stage1-step-40000", "stage2-step-3480000", "stage3-step-4720000", "lc-4k-to-32k-step-20000"]
    counted = [count(names, name, repository) for name in names]
    assert [one.seen for one in counted] == [n * SMOLLM3 for n in (40_000, 3_480_000, 4_720_000, 4_740_000)]
    assert [one.in_stage for one in counted] == [n * SMOLLM3 for n in (40_000, 30_000, 520_000, 20_000)]
    with pytest.warns(UserWarning, match="lc-32k-to-64k of HuggingFaceTB/SmolLM3-3B-checkpoints is taken to begin"):
        last = count([*names, "lc-32k-to-64k-step-4000"], "lc-32k-to-64k-step-4000", repository)
    assert last.seen == 4_744_000 * SMOLLM3


@pytest.fixture
def folders(make_checkpoint, tmp_path):
    """Function (name, ...) -> folder with a tiny checkpoint of each name, all different."""

    def make(*names):
        for seed, name in enumerate(names):
            make_checkpoint(name, seed=seed, root=tmp_path)
        return tmp_path

    return make


OLMO = ("stage1-step9-tokens40B", "stage2-ingredient1-step3-tokens5B", "stage2-ingredient2-step3-tokens5B")


def test_two_branches_are_refused_and_one_is_followed(folders):
    root = folders(*OLMO)
    with (
        pytest.warns(UserWarning, match="is taken to begin after"),
        pytest.raises(
            LccpError, match=r"stage2 has 2 branches \(ingredient1, ingredient2\).*follow one with --branch ingredient1"
        ),
    ):
        find_checkpoints([root])
    found = find_checkpoints([root], branch="ingredient2", stage_tokens_before={"stage2": 40 * B})
    assert [(c.name, c.stage, c.branch, c.tokens_seen, c.stage_tokens) for c in found] == [
        (OLMO[0], "stage1", None, 40 * B, 40 * B),
        (OLMO[2], "stage2", "ingredient2", 45 * B, 5 * B),
    ]
    with pytest.raises(LccpError, match=r"--branch 'ingredient3' is none of the branches found: ingredient1, ingred"):
        find_checkpoints([root], branch="ingredient3", stage_tokens_before={"stage2": 0})


def test_a_stage_whose_beginning_is_unknown_says_what_to_type(folders):
    root = folders("stage2-step3-tokens5B", "stage2-step4-tokens6B")
    with pytest.raises(LccpError, match=r"what came before stage2 is not known; .* --stage-before stage2=COUNT"):
        find_checkpoints([root])
    found = find_checkpoints([root], stage_tokens_before={"stage2": 0})
    assert [c.tokens_seen for c in found] == [5 * B, 6 * B]


def test_a_step_whose_worth_is_unknown_says_what_to_type(folders):
    with pytest.raises(LccpError, match=r"does not say what a step is worth; .* --tokens-per-step N"):
        find_checkpoints([folders("step1", "step2")])


def test_steps_of_a_stage_whose_worth_is_unknown(folders):
    with pytest.raises(LccpError, match=r"'stage1-step1' .*--tokens-per-step stage1=N"):
        find_checkpoints([folders("stage1-step1", "stage1-step2")])


def test_an_explicit_table_wins_and_may_name_more(folders, tmp_path_factory):
    root = folders("step1", "step2-tokens9B", "mine")
    file = tmp_path_factory.mktemp("table") / "tokens.csv"
    file.write_text("name,tokens,stage\nstep1,1.5B,long\nstep2-tokens9B,3000,\nmine,7,\nelsewhere,1,\n")
    found = find_checkpoints([root], table=read_token_table(file))
    assert [(c.name, c.tokens_seen, c.stage) for c in found] == [
        ("mine", 7, "train"),
        ("step2-tokens9B", 3000, "train"),
        ("step1", 1_500_000_000, "long"),
    ]
    assert find_checkpoints([root], table=read_token_table(file), tokens={"mine": 99})[0].tokens_seen == 99


def test_tables_in_json(tmp_path):
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps({"step1": "2M", "step2": 5}))
    assert read_token_table(file) == TokenTable({"step1": 2_000_000, "step2": 5})
    file.write_text(json.dumps([{"name": "step1", "tokens": 4, "stage": "lc"}]))
    assert read_token_table(file) == TokenTable({"step1": 4}, {"step1": "lc"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "name,count\nstep1,3\n", r"row 1: a table of tokens has name and tokens \(and stage\), got"),
        ("a.csv", "name,tokens\nstep1,3\nstep1,4\n", r"row 2: 'step1' stands there twice"),
        ("a.csv", "name,tokens\nstep1,many\n", "'many' is no number of tokens"),
        ("a.json", "[3]", r"row 1: a table of tokens has name and tokens"),
        ("a.json", "3", r"row 1: a table of tokens has name and tokens"),
        ("a.json", "{", "is no table of tokens"),
    ],
)
def test_broken_tables(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(LccpError, match=message):
        read_token_table(tmp_path / name)
    with pytest.raises(LccpError, match="is no table of tokens"):
        read_token_table(tmp_path / "gone.csv")


def test_a_pattern_of_folders(folders):
    root = folders("step1", "step2", "other3")
    found = find_checkpoints([f"{root}/step*"], tokens_per_step=5)
    assert [(c.name, c.tokens_seen, c.source) for c in found] == [("step1", 5, None), ("step2", 10, None)]
    with pytest.raises(LccpError, match=r"no folder matches '.*/nope-"):
        find_checkpoints([f"{root}/nope-*"])


def test_the_same_weights_in_two_folders_are_flagged(make_checkpoint, tmp_path):
    for name, seed in (("step1", 1), ("step2", 2), ("step3", 1)):
        make_checkpoint(name, seed=seed, root=tmp_path)
    with pytest.warns(UserWarning, match="'step1' and 'step3' have the same weights and config"):
        found = find_checkpoints([tmp_path], tokens_per_step=1)
    assert len(found) == 3


def test_a_list_shows_what_a_search_refuses(folders):
    root = folders(*OLMO, "alpha")
    (root / "alpha" / "model.safetensors").unlink()
    (root / "broken").mkdir()
    listed = list_checkpoints([root], counting=Counting(stage_tokens_before={"stage2": 40 * B}))
    assert [(one.name, one.branch, one.tokens_seen) for one in listed] == [
        (OLMO[0], None, 40 * B),
        (OLMO[1], "ingredient1", 45 * B),
        (OLMO[2], "ingredient2", 45 * B),
        ("alpha", None, None),
    ]
    assert "has no weights" in listed[3].fault
    assert isinstance(listed[0], Found)
    assert listed[0].n_bytes == (root / OLMO[0] / "model.safetensors").stat().st_size
