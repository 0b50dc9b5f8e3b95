"""What checkpoints and hubs may not do: run code, unpickle, or write outside the places they are given."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lccp_interp.behaviour.corpora import probe_corpora
from lccp_interp.behaviour.mixture import Length
from lccp_interp.behaviour.probe import ProbeStudy, probe
from lccp_interp.capture.model import load_model, load_tokenizer, read_architecture
from lccp_interp.checkpoints import Depot, checkpoint_hash, find_checkpoints, verify_folder
from lccp_interp.checkpoints.folders import is_plain_name, weight_names
from lccp_interp.checkpoints.shelf import MANIFEST, Shelf, repository_folder
from lccp_interp.interventions.causal import ablate_heads
from lccp_interp.interventions.tracing import trace_circuit
from lccp_interp.schema import LccpError
from lccp_interp.sweep import Access, Execution, score_grid
from lccp_interp.tasks.niah import NiahGrid
from tests.fake_hub import FakeHub

REPOSITORY = "org/model"
ALLOWED = "--allow-pickle"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "own-cache"))
        yield fake


def written(root: Path) -> set[Path]:
    return {file for file in root.rglob("*") if file.is_file()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


class Bomb:
    """Unpickled without care it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def pickled(checkpoint, tmp_path) -> Path:
    """The checkpoint with its weights in a pickle."""
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_model(checkpoint, device="cpu").model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def bomb(pickled, tmp_path) -> Path:
    """A pickle that runs a command when it is unpickled without care; returns what the command would make."""
    target = tmp_path / "exploded"
    with open(pickled / "pytorch_model.bin", "wb") as handle:
        pickle.dump({"model.norm.weight": Bomb(target)}, handle)
    return target


def test_pickles_are_refused_unless_asked_for(pickled, checkpoint):
    for use in (verify_folder, load_model, lambda folder: find_checkpoints([folder])):
        with pytest.raises(LccpError, match=rf"only pickled .*which can run code .*{ALLOWED}"):
            use(pickled)
    model = load_model(pickled, device="cpu", allow_pickle=True)
    assert model.from_pickle
    assert not load_model(checkpoint, device="cpu", allow_pickle=True).from_pickle
    theirs = load_model(checkpoint, device="cpu").model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.model.state_dict().items())
    (found,) = find_checkpoints([pickled], allow_pickle=True)
    assert found.hash == checkpoint_hash(pickled) != checkpoint_hash(checkpoint)


def test_a_pickle_that_runs_code_does_not_run_it_even_if_pickles_are_allowed(pickled, bomb):
    with pytest.raises(LccpError, match="cannot be loaded"):
        load_model(pickled, device="cpu", allow_pickle=True)
    assert not bomb.exists()
    with open(pickled / "pytorch_model.bin", "rb") as handle:
        pickle.load(handle)
    assert bomb.exists()  # the bomb is real


def test_hashing_a_pickle_does_not_unpickle_it(pickled, bomb):
    assert len(checkpoint_hash(pickled)) == 64
    find_checkpoints([pickled], allow_pickle=True)
    assert not bomb.exists()


def test_safetensors_win_where_both_are_there(pickled, checkpoint, bomb):
    shutil.copy(checkpoint / "model.safetensors", pickled)
    model = load_model(pickled, device="cpu", allow_pickle=True)
    assert not model.from_pickle
    assert not bomb.exists()


def test_a_truncated_pickle(pickled):
    file = pickled / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LccpError, match="truncated or damaged: its directory of tensors is missing"):
        find_checkpoints([pickled], allow_pickle=True)


def test_a_trainers_other_pickles_are_no_weights(pickled):
    (pickled / "pytorch_model.bin").rename(pickled / "training_args.bin")
    with pytest.raises(LccpError, match="only pickled weights"):
        verify_folder(pickled, allow_pickle=True)


def test_pickles_of_a_hub_are_refused_before_they_are_fetched(hub, pickled, tmp_path):
    commit = hub.add(REPOSITORY, "step1", pickled)
    with pytest.raises(LccpError, match=rf"only pickled weights .*{ALLOWED}"):
        find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache")
    assert (commit, "pytorch_model.bin") not in hub.sent
    (found,) = find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache", allow_pickle=True)
    assert found.hash == checkpoint_hash(pickled)
    with Depot(cache=tmp_path / "cache", allow_pickle=True) as depot, depot.hold(found) as local:
        assert load_model(local.path, device="cpu", allow_pickle=True).from_pickle


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_name("ran").touch()
Path({trace!r}).touch()

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(checkpoint, tmp_path) -> Path:
    """A checkpoint of a type of its own, whose code leaves a trace when it runs."""
    folder = tmp_path / "with-code"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["MineForCausalLM"],
        "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    return folder


def test_code_of_a_checkpoint_is_not_run_unless_asked_for(with_code, tmp_path, monkeypatch):
    for use in (load_model, read_architecture):
        with pytest.raises(LccpError, match=r"\(auto_map in its config.json\), .*--trust-remote-code"):
            use(with_code)
    assert not (tmp_path / "trace").exists()


def test_code_of_a_checkpoint_runs_if_asked_for_and_is_on_record(with_code, checkpoint, tmp_path, monkeypatch):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = load_model(with_code, device="cpu", trust_remote_code=True)
    assert (tmp_path / "trace").exists()
    assert model.runs_remote_code
    assert not load_model(checkpoint, device="cpu", trust_remote_code=True).runs_remote_code


def test_code_beside_a_type_that_transformers_knows_is_not_run(with_code, tmp_path):
    config = json.loads((with_code / "config.json").read_text())
    (with_code / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert not load_model(with_code, device="cpu").runs_remote_code
    assert not (tmp_path / "trace").exists()


def test_code_of_a_tokenizer_is_not_run(checkpoint, tmp_path):
    folder = tmp_path / "tokenizer-code"
    shutil.copytree(checkpoint, folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.MineTokenizer", None]}}
    file.write_text(json.dumps(config))
    (folder / "mine.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    with pytest.raises(LccpError, match=r"\(auto_map in its tokenizer_config.json\).*--trust-remote-code"):
        load_tokenizer(folder)
    assert not (tmp_path / "trace").exists()


def test_code_of_a_hub_is_fetched_only_if_asked_for(hub, with_code, tmp_path):
    commit = hub.add(REPOSITORY, "step1", with_code)
    (found,) = find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache")
    assert not (found.path / "mine.py").exists()
    assert (commit, "mine.py") not in hub.sent
    (found,) = find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache", trust_remote_code=True)
    assert (found.path / "mine.py").is_file()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a/b", "..", ".hidden", "C:x", "a\\b", "a\nb", ""]
)
def test_shards_of_an_index_are_plain_file_names(checkpoint, tmp_path, name):
    assert not is_plain_name(name)
    index = {"weight_map": {"w": name}}
    with pytest.raises(LccpError, match="no plain file name"):
        weight_names({"model.safetensors.index.json", name}, lambda file: index, "here")
    folder = tmp_path / "folder"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LccpError, match="no plain file name"):
        load_model(folder, device="cpu")


def test_names_in_a_hubs_listing_never_become_paths(hub, checkpoint, tmp_path):
    files = files_of(checkpoint)
    commit = hub.add_files(REPOSITORY, "step1", files)
    for name in ("../../evil.py", "/tmp/lccp-evil.py", "sub/evil.py", "..", "evil\\..\\x.py"):
        hub.extra_entries.append({"type": "file", "path": name, "size": 4, "oid": "0" * 40})
        hub.trees[REPOSITORY, commit][name] = b"evil"
    (found,) = find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache", trust_remote_code=True)
    with Depot(cache=tmp_path / "cache") as depot, depot.hold(found):
        pass
    assert not [file for file in written(tmp_path) if "evil" in file.name]
    assert {file.relative_to(tmp_path).parts[0] for file in written(tmp_path)} == {"cache"}


@pytest.mark.parametrize("revision", ["../../../up", "refs/pr/1", "a/../../b", "/abs"])
def test_names_of_revisions_never_become_paths(hub, checkpoint, tmp_path, revision):
    commit = hub.add(REPOSITORY, revision, checkpoint)
    (found,) = find_checkpoints([f"{REPOSITORY}@{revision}"], cache=tmp_path / "cache")
    assert found.name == revision
    assert found.path == tmp_path / "cache" / "org--model" / commit
    with Depot(cache=tmp_path / "cache") as depot, depot.hold(found):
        pass
    assert {file.relative_to(tmp_path).parts[0] for file in written(tmp_path)} == {"cache"}


def test_what_is_no_commit_is_refused(hub, checkpoint, tmp_path):
    hub.add(REPOSITORY, "step1", checkpoint, commit="../../../up")
    with pytest.raises(LccpError, match=r"the hub gives '\.\./\.\./\.\./up' for revision 'step1' .* no commit"):
        find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache")
    assert written(tmp_path) == set()


@pytest.mark.parametrize("repository", ["../up", "org/..", "org", "a/b/c", "/abs/x", "org/na me"])
def test_what_is_no_repository_is_refused(repository, tmp_path):
    with pytest.raises(LccpError, match="is no name of a hub repository; write organisation/name"):
        repository_folder(tmp_path, repository)


@pytest.mark.parametrize("oid", ["../../up", "../../" + "a" * 40, ""])
def test_hashes_of_a_hub_never_become_paths(hub, checkpoint, tmp_path, monkeypatch, oid):
    whole = hub._entry
    monkeypatch.setattr(hub, "_entry", lambda name, content: {**whole(name, content), "oid": oid})
    hub.add(REPOSITORY, "step1", checkpoint)
    with pytest.raises(LccpError, match=f"the hub gives {re.escape(repr(oid))} as hash of"):
        find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache")
    assert {file.name for file in written(tmp_path)} <= {"lccp_revisions.json"}


def test_a_hub_that_sends_more_than_it_lists_does_not_fill_the_disk(hub, checkpoint, tmp_path):
    hub.add(REPOSITORY, "step1", checkpoint)
    (found,) = find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache")
    size = (checkpoint / "model.safetensors").stat().st_size
    tree = hub.trees[REPOSITORY, found.path.name]
    tree["model.safetensors"] = tree["model.safetensors"] + bytes(3_000_000)
    written_bytes = []

    def measure() -> None:
        with contextlib.suppress(FileNotFoundError):
            written_bytes.append((found.path / "model.safetensors.part").stat().st_size)

    hub.on_chunk, hub.pause_seconds = measure, 0.001
    with (
        Depot(cache=tmp_path / "cache") as depot,
        pytest.raises(LccpError, match=f"or more, the hub lists {size}"),
        depot.hold(found),
    ):
        pass
    assert size // 2 < max(written_bytes) <= size + 1
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_the_access_token_goes_to_the_hub_alone(hub, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    commit = hub.add(REPOSITORY, "step1", checkpoint)
    with FakeHub() as storage:
        storage.add(REPOSITORY, "step1", checkpoint)
        hub.large_files_at = storage.url
        (found,) = find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache")
        with Depot(cache=tmp_path / "cache") as depot, depot.hold(found) as local:
            assert checkpoint_hash(local.path) == found.hash
        assert storage.sent[commit, "model.safetensors"] > 0
        assert set(hub.authorizations) == {"Bearer hf_secret"}
        assert set(storage.authorizations) == {None}
    assert not [file for file in written(tmp_path) if b"hf_secret" in file.read_bytes()]


def test_a_tampered_shelf_evicts_nothing_outside_itself(hub, checkpoint, tmp_path):
    hub.add(REPOSITORY, "step1", checkpoint)
    (found,) = find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache")
    precious = tmp_path / "cache" / "precious.safetensors"
    precious.write_text("mine")
    manifest = json.loads((found.path / MANIFEST).read_text())
    manifest["weights"] = ["../../precious.safetensors"]
    manifest["files"][0] |= {"name": "../../precious.safetensors", "sha256": "0" * 64}
    (found.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LccpError, match="is no manifest of a downloaded revision"):
        Shelf.read(found.path)
    assert precious.read_text() == "mine"


def test_archives_are_not_unpacked(hub, checkpoint, tmp_path):
    archive = tmp_path / "model.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(checkpoint, arcname="model")
    folder = tmp_path / "archived"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.move(archive, folder / "model.tar")
    before = written(folder)
    with pytest.raises(LccpError, match="has no weights"):
        find_checkpoints([folder])
    with pytest.raises(LccpError, match="no checkpoint folder at"):
        find_checkpoints([folder / "model.tar"])
    assert written(folder) == before
    commit = hub.add(REPOSITORY, "step1", folder)
    with pytest.raises(LccpError, match="has no weights"):
        find_checkpoints([f"{REPOSITORY}@step1"], cache=tmp_path / "cache")
    assert (commit, "model.tar") not in hub.sent


@pytest.mark.parametrize(("name", "n_rows"), [("security.md", 30), ("crash_safety.md", 14)])
def test_every_line_of_a_page_of_promises_names_tests_that_there_are(name, n_rows):
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / name).read_text()
    rows = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("| What", "|---"))]
    assert len(rows) >= n_rows
    for row in rows:
        last = row.rstrip("| ").rpartition("|")[2]
        named = re.findall(r"`(?:(test_\w+\.py))?::(test_\w+)`", last)
        assert named, row
        file = ""
        for given, test in named:
            file = given or file
            assert f"def {test}(" in (tests / file).read_text(), (file, test)


def test_code_of_a_checkpoint_is_asked_for_wherever_a_run_asks_it_again(with_code, tmp_path, monkeypatch):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    grid = NiahGrid(lengths=(96,), depths=(50,), samples=2)
    trusting = Execution(trust_remote_code=True)
    run = score_grid(with_code, tmp_path / "run", grid, metrics=["retrieval"], execution=trusting)
    again = {
        "circuit": partial(trace_circuit, run, [(1, 0)], n_cases=2),
        "ablations": partial(ablate_heads, run, k=[1], n_cases=1, n_draws=1),
        "corpora": partial(probe_corpora, run, ["stories"], length=64, documents=1),
        "questions": partial(
            probe, run, ProbeStudy(tasks=("longbio-standard",), lengths=(Length(320, 320),), samples=1, k=0, sft=None)
        ),
    }
    for ask in again.values():
        with pytest.raises(LccpError, match="--trust-remote-code"):
            ask()
        answered = ask(access=Access(trust_remote_code=True))
        assert len(answered)
