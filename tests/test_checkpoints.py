"""Finding, ordering and verifying checkpoint folders."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from lccp_interp.checkpoints import checkpoint_hash, find_checkpoints, parse_count, tokenizer_hash, verify_folder
from lccp_interp.checkpoints.folders import combined_hash
from lccp_interp.schema import LccpError


def test_trajectory_json_gives_order_stage_and_tokens(trajectory):
    found = find_checkpoints([trajectory])
    assert [(c.name, c.tokens_seen, c.stage) for c in found] == [
        ("pretrain-0", 1000, "pretrain"),
        ("lccp-1", 2000, "lccp"),
        ("lccp-2", 3000, "lccp"),
    ]
    assert len({c.hash for c in found}) == 3


def test_a_single_folder_of_a_trajectory_keeps_its_tokens(trajectory):
    (found,) = find_checkpoints([trajectory / "lccp-1"])
    assert find_checkpoints(str(trajectory / "lccp-1"))[0].hash == found.hash
    assert (found.name, found.tokens_seen, found.stage) == ("lccp-1", 2000, "lccp")


@pytest.mark.parametrize(
    ("name", "tokens_per_step", "expected"),
    [
        ("lccp-1.2M", None, 1_200_000),
        ("stage2-ingredient1-step11931-tokens50B", None, 50_000_000_000),
        ("checkpoint-400", 1000, 400_000),
        ("step143000", 2_097_152, 143000 * 2_097_152),
        ("iter_0001000", 10, 10_000),
        ("OLMo-2-7B-step1000-tokens5B", None, 5_000_000_000),
        ("llama-7B-step100", 1000, 100_000),
        ("run-1.5Btokens", None, 1_500_000_000),
    ],
)
def test_tokens_from_names(make_checkpoint, name, tokens_per_step, expected):
    folder = make_checkpoint(name)
    assert find_checkpoints([folder], tokens_per_step=tokens_per_step)[0].tokens_seen == expected


def test_tokens_from_trainer_state(make_checkpoint):
    folder = make_checkpoint("mine")
    (folder / "trainer_state.json").write_text(json.dumps({"num_input_tokens_seen": 777, "global_step": 3}))
    assert find_checkpoints([folder])[0].tokens_seen == 777


def test_explicit_tokens_win(trajectory):
    found = find_checkpoints([trajectory], tokens={"lccp-2": 5})
    assert [c.name for c in found] == ["lccp-2", "pretrain-0", "lccp-1"]


def test_a_lone_checkpoint_needs_no_tokens(make_checkpoint):
    assert find_checkpoints([make_checkpoint("final")])[0].tokens_seen == 0


def test_unknown_tokens_of_several_say_what_to_type(make_checkpoint, tmp_path):
    for name in ("alpha", "beta"):
        make_checkpoint(name, root=tmp_path)
    with pytest.raises(LccpError, match=r"cannot tell how many tokens checkpoint 'alpha'.*--tokens alpha=1.2B"):
        find_checkpoints([tmp_path])


def test_equal_tokens_are_refused(trajectory):
    with pytest.raises(LccpError, match="'lccp-1' and 'lccp-2' both have 2000 tokens"):
        find_checkpoints([trajectory], tokens={"lccp-2": 2000})


def test_stray_token_name(trajectory):
    with pytest.raises(LccpError, match="--tokens names 'nope'; the checkpoints are"):
        find_checkpoints([trajectory], tokens={"nope": 1})


def test_a_path_that_leaves_the_trajectory_folder_is_refused(trajectory, tmp_path):
    entries = [{"name": "x", "path": "../elsewhere", "tokens_seen": 1}]
    (tmp_path / "trajectory.json").write_text(json.dumps({"checkpoints": entries}))
    with pytest.raises(LccpError, match=r"'\.\./elsewhere' leaves the folder"):
        find_checkpoints([tmp_path])


def test_parse_count():
    assert parse_count("1.2M") == 1_200_000
    assert parse_count("20b") == 20_000_000_000
    with pytest.raises(LccpError, match="'many' is no number of tokens"):
        parse_count("many")


def broken(checkpoint, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    change(folder)
    return folder


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f), "no checkpoint folder at"),
        (lambda f: (f / "config.json").unlink(), "it has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is no model config"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights: expected model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickled weights"),
        (lambda f: truncate(f / "model.safetensors"), r"truncated or damaged: \d+ bytes, its header asks for \d+"),
        (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "is no whole safetensors file"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    ],
)
def test_a_broken_folder_says_what_is_wrong(checkpoint, tmp_path, change, message):
    with pytest.raises(LccpError, match=message):
        verify_folder(broken(checkpoint, tmp_path, change))


def test_a_models_size_is_not_its_token_count(make_checkpoint, tmp_path):
    for name in ("llama-7B-step100", "llama-7B-step200"):
        make_checkpoint(name, root=tmp_path)
    with pytest.raises(LccpError, match="cannot tell how many tokens"):
        find_checkpoints([tmp_path])


def test_hash_tells_weights_and_configs_apart(make_checkpoint):
    one, same, other = make_checkpoint(seed=3), make_checkpoint(seed=3), make_checkpoint(seed=4)
    assert checkpoint_hash(one) == checkpoint_hash(same) != checkpoint_hash(other)
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert checkpoint_hash(one) == checkpoint_hash(same)
    (same / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_theta": 2e6}}))
    assert checkpoint_hash(one) != checkpoint_hash(same)


def test_tokenizer_hash_sees_every_file(make_checkpoint):
    folder = make_checkpoint("tokens-9M")
    before = tokenizer_hash(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    assert tokenizer_hash(folder) != before


def test_a_link_keeps_its_own_name(checkpoint, tmp_path):
    link = tmp_path / "tokens-3M"
    link.symlink_to(checkpoint)
    assert find_checkpoints([link])[0].name == "tokens-3M"


def test_the_same_folder_twice(checkpoint):
    with pytest.raises(LccpError, match="is given twice"):
        find_checkpoints([checkpoint, f"{checkpoint}/../{checkpoint.name}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no trajectory table: "),
        ('{"checkpoints": []}', "lists no checkpoints"),
        ('{"checkpoints": 3}', "is no trajectory table"),
        ('{"checkpoints": [{"name": "a", "path": "a", "tokens_seen": true}]}', "True is no number of tokens"),
        ('{"checkpoints": [{"name": "a", "path": "a", "tokens_seen": 1e999}]}', "inf is no number of tokens"),
        ('{"checkpoints": [{"name": "a", "path": "a", "tokens_seen": 1, "stage_tokens": "1M"}]}', "'1M' is no number"),
    ],
)
def test_a_broken_trajectory_table(tmp_path, content, message):
    (tmp_path / "trajectory.json").write_text(content)
    with pytest.raises(LccpError, match=message):
        find_checkpoints([tmp_path])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors.index.json", "", "is no index of weight shards"),
        ("model.safetensors.index.json", '{"weight_map": {"w": "../x"}}', "no plain file name"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"w": "gone"}}',
            "lacks 1 of 1 weight shards: gone; copy them again",
        ),
        ("trainer_state.json", "", "is no trainer state"),
        ("config.json", "[]", "must be a JSON object with a model_type"),
    ],
)
def test_broken_side_files(checkpoint, tmp_path, file, content, message):
    folder = broken(checkpoint, tmp_path, lambda f: (f / file).write_text(content))
    with pytest.raises(LccpError, match=message):
        find_checkpoints([folder])


def test_two_sets_of_weights_in_one_folder(checkpoint, tmp_path):
    def shard(folder):
        shutil.copy(folder / "model.safetensors", folder / "model-1.safetensors")
        index = {"weight_map": {"w": "model-1.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(LccpError, match=r"has two sets of weights: model.safetensors, and the shards of .*delete one"):
        verify_folder(broken(checkpoint, tmp_path, shard))


def test_a_hash_is_that_of_the_listed_files(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    file = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert checkpoint_hash(checkpoint) == combined_hash(config, [file])


def test_branches_in_a_trajectory_json(trajectory, tmp_path):
    root = tmp_path / "branches"
    shutil.copytree(trajectory, root)
    table = json.loads((root / "trajectory.json").read_text())
    for entry, branch in zip(table["checkpoints"], (None, "a", "b"), strict=True):
        entry["branch"] = branch
    (root / "trajectory.json").write_text(json.dumps(table))
    with pytest.raises(LccpError, match=r"lccp has 2 branches \(a, b\)"):
        find_checkpoints([root])
    assert [c.name for c in find_checkpoints([root], branch="b")] == ["pretrain-0", "lccp-2"]
