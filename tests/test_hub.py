"""Trajectories on a hub: found without weights, fetched when their turn comes, evicted when the room is needed."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save

from lccp_interp.capture.model import load_model
from lccp_interp.checkpoints import Depot, checkpoint_hash, find_checkpoints, list_checkpoints
from lccp_interp.checkpoints import hub as hub_client
from lccp_interp.checkpoints.shelf import Lock, Shelf, default_cache, stock
from lccp_interp.schema import LccpError
from tests.fake_hub import FakeHub

REPOSITORY = "EleutherAI/pythia-14m"
TOKENS_PER_STEP = 2_097_152


@pytest.fixture(scope="session")
def folders(make_checkpoint, tmp_path_factory) -> list[Path]:
    """Five tiny random checkpoints with one tokenizer; do not change them."""
    root = tmp_path_factory.mktemp("hub-folders")
    return [make_checkpoint(f"step{step}", seed=20 + step, root=root) for step in range(1, 6)]


@pytest.fixture
def hub(folders, monkeypatch, tmp_path):
    """A hub with five revisions of a tiny model and `main`, which is the last of them; the only one there is."""
    with FakeHub() as fake:
        for folder in folders:
            fake.add(REPOSITORY, folder.name, folder)
        fake.refs[REPOSITORY]["main"] = fake.refs[REPOSITORY]["step5"]
        point_at(fake, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "own-cache"))
        yield fake


def point_at(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_client, "_FIRST_PAUSE_SECONDS", 0.0)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def find(cache, *patterns, **options):
    source = f"{REPOSITORY}@{','.join(patterns)}" if patterns else f"{REPOSITORY}@step*"
    return find_checkpoints([source], cache=cache, **options)


def weights_under(folder: Path) -> int:
    """Bytes of weights on the disk, whole or not."""
    total = 0
    for file in folder.rglob("*.safetensors*"):
        with contextlib.suppress(FileNotFoundError):  # it was just renamed or evicted
            total += file.stat().st_size
    return total


def n_weight_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_revisions_are_found_without_their_weights(hub, cache, folders):
    found = find(cache)
    assert [(c.name, c.tokens_seen) for c in found] == [(f"step{n}", n * TOKENS_PER_STEP) for n in range(1, 6)]
    assert [c.source for c in found] == [f"{REPOSITORY}@step{n}" for n in range(1, 6)]
    assert [c.hash for c in found] == [checkpoint_hash(folder) for folder in folders]
    assert weights_under(cache) == 0
    assert not any(name.endswith(".safetensors") for _, name in hub.sent)
    assert (found[0].path / "tokenizer.json").read_bytes() == (folders[0] / "tokenizer.json").read_bytes()


def test_files_that_revisions_share_are_fetched_and_kept_once(hub, cache):
    found = find(cache)
    assert sum(path.endswith("tokenizer.json") for path in hub.requests) == 1
    again = len(hub.requests)
    assert find(cache) == found
    assert hub.requests[again:] == [f"/api/models/{REPOSITORY}/refs"]
    assert len({(c.path / "tokenizer.json").stat().st_ino for c in found}) == 1


def test_all_revisions_are_those_whose_names_tell_a_step(hub, cache):
    with pytest.warns(UserWarning, match=r"left out 1 revisions of EleutherAI/pythia-14m .* no step: main"):
        found = find_checkpoints([REPOSITORY], cache=cache)
    assert [c.name for c in found] == [f"step{n}" for n in range(1, 6)]
    assert [c.name for c in find_checkpoints([REPOSITORY], revisions=["step[12]"], cache=cache)] == ["step1", "step2"]
    assert [c.name for c in find(cache, hub.refs[REPOSITORY]["step3"])] == [hub.refs[REPOSITORY]["step3"]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"{REPOSITORY}@step9", r"has no revision 'step9'; it has 6, such as step1, .*lccp checkpoints"),
        ("nobody/nothing", "has no repository nobody/nothing, nor is there such a folder"),
        (f"{REPOSITORY}@", "names no revision behind the @"),
        ("a..b/c@step1", "is no name of a hub repository"),
    ],
)
def test_what_is_not_there(hub, cache, source, message):
    with pytest.raises(LccpError, match=message):
        find_checkpoints([source], cache=cache)


def test_a_hub_that_cannot_be_reached(cache, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LccpError, match=r"the hub at http://127.0.0.1:9 cannot be used .* HF_HUB_OFFLINE=1"):
        find(cache)


def test_a_busy_hub_is_asked_again(hub, cache, folders):
    hub.busy = 3
    found = find(cache, "step1")
    assert hub.busy == 0
    hub.busy = 3
    with Depot(cache=cache) as depot, depot.hold(found[0]) as local:
        assert checkpoint_hash(local.path) == checkpoint_hash(folders[0])
    hub.busy = 10_000
    with pytest.raises(LccpError, match=r"the hub at .* cannot be used .*429"):
        find(cache, "step2")


def test_held_weights_are_those_of_the_revision(hub, cache, folders):
    (found, *_) = find(cache)
    with Depot(cache=cache) as depot, depot.hold(found) as local:
        assert local.path == found.path
        assert checkpoint_hash(local.path) == found.hash
        assert load_model(local.path, device="cpu").n_layers == 3
        here, there = load_file(local.path / "model.safetensors"), load_file(folders[0] / "model.safetensors")
        assert all((here[name] == there[name]).all() for name in there)


def test_a_local_folder_passes_through(checkpoint, cache):
    (found,) = find_checkpoints([checkpoint])
    with Depot(cache=cache, budget_bytes=1) as depot, depot.hold(found) as local:
        assert local is found
    assert not cache.exists()


def test_many_revisions_need_the_room_of_two(hub, cache, folders):
    room = 2 * n_weight_bytes(folders[0])
    peak = 0

    def measure():
        nonlocal peak
        peak = max(peak, weights_under(cache))

    hub.on_chunk = measure
    found = find(cache)
    with Depot(cache=cache, budget_bytes=room) as depot:
        depot.expect(found)
        for checkpoint in found:
            with depot.hold(checkpoint) as local:
                measure()
                assert (local.path / "model.safetensors").is_file()
                if depot._ahead is not None:
                    depot._ahead.join()
                measure()
    assert room / 2 < peak <= room
    for checkpoint, folder in zip(found, folders, strict=True):
        assert hub.sent[checkpoint.path.name, "model.safetensors"] == n_weight_bytes(folder)
    # What was evicted is the weights alone, and only where the room was needed.
    assert [(c.path / "model.safetensors").exists() for c in found] == [False, False, False, True, True]
    assert all((c.path / "config.json").is_file() for c in found)


def test_150_revisions_need_the_room_of_two(hub, cache, folders):
    repository, files = "org/long", {file.name: file.read_bytes() for file in folders[0].iterdir()}
    weights = save({"w": np.zeros(8000, np.float32)})
    for step in range(150):
        files["model.safetensors"] = weights[:-4] + step.to_bytes(4, "little")
        hub.add_files(repository, f"step{step}", dict(files))
    peaks = []
    hub.on_chunk = lambda: peaks.append(weights_under(cache))
    found = find_checkpoints([repository], tokens_per_step=1, cache=cache)
    assert len(found) == len({checkpoint.hash for checkpoint in found}) == 150
    del peaks[:]
    with Depot(cache=cache, budget_bytes=2 * len(weights)) as depot:
        depot.expect(found)
        for checkpoint in found:
            with depot.hold(checkpoint) as local:
                if depot._ahead is not None:
                    depot._ahead.join()
                peaks.append(weights_under(cache))
                assert (local.path / "model.safetensors").read_bytes()[-4:] == checkpoint.tokens_seen.to_bytes(
                    4, "little"
                )
    assert len(weights) < max(peaks) <= 2 * len(weights)
    assert sum(file.stat().st_size for file in cache.rglob("*.safetensors*")) <= 2 * len(weights)


def test_the_next_one_comes_while_one_is_held(hub, cache):
    found = find(cache)
    with Depot(cache=cache) as depot:
        depot.expect(found)
        with depot.hold(found[0]):
            depot._ahead.join()
            assert Shelf.read(found[1].path).is_whole()
            assert not Shelf.read(found[2].path).is_whole()
    with Depot(cache=cache, prefetch=False) as depot:
        depot.expect(found)
        with depot.hold(found[2]):
            assert depot._ahead is None


def test_without_a_budget_nothing_is_evicted(hub, cache):
    found = find(cache)
    with Depot(cache=cache, prefetch=False) as depot:
        for checkpoint in found:
            with depot.hold(checkpoint):
                pass
    before = sum(hub.sent.values())
    with Depot(cache=cache, prefetch=False) as depot:
        for checkpoint in found:
            with depot.hold(checkpoint):
                pass
    assert sum(hub.sent.values()) == before


def test_a_budget_too_small_for_one_checkpoint(hub, cache, folders):
    size = n_weight_bytes(folders[0])
    found = find(cache)
    message = rf"a disk budget of {size - 1} bytes is too small: the weights of .*@\w+ alone have {size} .*{2 * size}"
    with Depot(cache=cache, budget_bytes=size - 1) as depot:
        with pytest.raises(LccpError, match=message):
            depot.expect(found)
        with pytest.raises(LccpError, match=message), depot.hold(found[0]):
            pass
    with pytest.raises(LccpError, match="must be more than 0 bytes, got 0"):
        Depot(budget_bytes=0)


def test_holding_two_in_the_room_of_one_is_refused_and_does_not_hang(hub, cache, folders):
    first, second, *_ = find(cache)
    with (
        Depot(cache=cache, budget_bytes=n_weight_bytes(folders[0])) as depot,
        depot.hold(first),
        pytest.raises(LccpError, match=r"has no room for .* beside the 1 checkpoints that are held"),
        depot.hold(second),
    ):
        pass


def test_a_cut_download_goes_on_where_it_stopped(hub, cache, folders):
    size = n_weight_bytes(folders[0])
    (found, *_) = find(cache)
    hub.cut_after["model.safetensors"] = 100_000
    with Depot(cache=cache) as depot, depot.hold(found):  # every answer is cut; each brings 100,000 bytes more
        pass
    assert hub.sent[found.path.name, "model.safetensors"] == size
    assert sum("model.safetensors" in path for path in hub.requests) == -(-size // 100_000)


def test_a_download_goes_on_in_the_next_process(hub, cache, folders):
    size = n_weight_bytes(folders[0])
    (found, *_) = find(cache)
    hub.pause_seconds = 0.02
    code = (
        "import sys; from lccp_interp.checkpoints import Depot, find_checkpoints\n"
        f"(one,) = find_checkpoints(['{REPOSITORY}@step1'], cache={str(cache)!r})\n"
        f"with Depot(cache={str(cache)!r}) as depot, depot.hold(one): pass"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    killed = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(lambda: hub.sent[found.path.name, "model.safetensors"] > size // 4)
    killed.kill()
    killed.wait()
    part = found.path / "model.safetensors.part"
    kept = part.stat().st_size
    assert 0 < kept < size
    hub.pause_seconds = 0.0
    time.sleep(0.1)
    hub.sent.clear()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert hub.sent[found.path.name, "model.safetensors"] <= size - kept
    assert checkpoint_hash(found.path) == found.hash


THROUGH = """
import sys
from lccp_interp.checkpoints import Depot, checkpoint_hash, find_checkpoints
source, cache, budget = sys.argv[1:]
found = find_checkpoints([source], cache=cache)
with Depot(cache=cache, budget_bytes=int(budget)) as depot:
    depot.expect(found)
    print("begins", flush=True)
    for checkpoint in found:
        with depot.hold(checkpoint) as local:
            assert checkpoint_hash(local.path) == checkpoint.hash, checkpoint.name
"""


def test_killed_at_any_moment_it_goes_on_within_the_budget(hub, cache, folders):
    size = n_weight_bytes(folders[0])
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    command = [sys.executable, "-c", THROUGH, f"{REPOSITORY}@step*", str(cache), str(2 * size)]
    moments = random.Random(0)
    hub.pause_seconds = 0.005
    for _ in range(5):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as killed:
            assert killed.stdout.readline() == b"begins\n"
            time.sleep(moments.uniform(0, 0.6))
            killed.kill()
        assert weights_under(cache) <= 2 * size
    hub.pause_seconds = 0.0
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert weights_under(cache) <= 2 * size
    assert not list(cache.rglob("*.part"))


def test_a_cache_that_may_only_be_read_serves_what_it_has(hub, cache, monkeypatch):
    first, second, *_ = find(cache)
    with Depot(cache=cache, prefetch=False) as depot, depot.hold(first):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("open", "replace", "link"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    found = find(cache)[0]
    with Depot(cache=cache, prefetch=False) as depot:
        with depot.hold(found) as local:
            assert local.path == first.path
        with pytest.raises(LccpError, match=r"nothing can be written to .*Read-only.* --cache"), depot.hold(second):
            pass


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        threading.Event().wait(0.01)


def test_bytes_kept_from_before_that_were_damaged_are_fetched_again(hub, cache):
    (found, *_) = find(cache)
    (found.path / "model.safetensors.part").write_bytes(b"\0" * 5000)
    hub.ignores_ranges = False
    with Depot(cache=cache) as depot, depot.hold(found):
        assert checkpoint_hash(found.path) == found.hash


def test_a_hub_without_ranges_begins_again(hub, cache):
    (found, *_) = find(cache)
    (found.path / "model.safetensors.part").write_bytes(b"\0" * 5000)
    hub.ignores_ranges = True
    with Depot(cache=cache) as depot, depot.hold(found):
        assert checkpoint_hash(found.path) == found.hash


def test_other_bytes_than_listed_are_refused(hub, cache):
    (found, *_) = find(cache)
    hub.damaged.add("model.safetensors")
    with Depot(cache=cache) as depot:
        with (
            pytest.raises(LccpError, match=r"model.safetensors of .* came with hash \w+\.\.\., the hub lists"),
            depot.hold(found),
        ):
            pass
        assert weights_under(cache) == 0
        hub.damaged.clear()
        with depot.hold(found):
            assert checkpoint_hash(found.path) == found.hash


def test_a_damaged_config_is_refused(hub, cache):
    hub.damaged.add("config.json")
    with pytest.raises(LccpError, match=r"revision 'step1': config.json of .* came with hash"):
        find(cache, "step1")


def test_a_file_truncated_on_the_hub_is_refused_before_it_is_fetched(hub, cache, folders):
    files = {file.name: file.read_bytes() for file in folders[0].iterdir()}
    whole = len(files["model.safetensors"])
    files["model.safetensors"] = files["model.safetensors"][:-1000]
    commit = hub.add_files(REPOSITORY, "step7", files)
    hub.pause_seconds = 0.005
    (found,) = find(cache, "step7")
    message = rf"truncated on the hub: {whole - 1000} bytes, its header asks for {whole}; leave that revision out"
    with Depot(cache=cache) as depot, pytest.raises(LccpError, match=message), depot.hold(found):
        pass
    assert hub.sent[commit, "model.safetensors"] < whole - 1000


def test_a_missing_shard_is_refused_when_finding(hub, cache, folders):
    files = {file.name: file.read_bytes() for file in folders[0].iterdir()}
    shard = files.pop("model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    hub.add_files(
        REPOSITORY, "step8", {**files, names[0]: shard, "model.safetensors.index.json": json.dumps(index).encode()}
    )
    with pytest.raises(LccpError, match=rf"revision 'step8': .* lacks 1 of 2 weight shards: {names[1]}"):
        find(cache, "step8")


def test_shards_are_fetched_together_and_give_one_hash(hub, cache, make_checkpoint, tmp_path):
    folder = tmp_path / "sharded"
    whole = make_checkpoint("whole", seed=9, root=tmp_path)
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    load_model(whole, device="cpu").model.save_pretrained(folder, max_shard_size="200KB")
    n_shards = len(list(folder.glob("*.safetensors")))
    hub.add(REPOSITORY, "step9", folder)
    (found,) = find(cache, "step9")
    with Depot(cache=cache) as depot, depot.hold(found) as local:
        assert len(list(local.path.glob("*.safetensors"))) == n_shards >= 2
        assert checkpoint_hash(local.path) == found.hash == checkpoint_hash(folder)


def test_the_same_weights_under_two_names_are_flagged_before_they_are_fetched(hub, cache):
    hub.add_files(REPOSITORY, "step6", hub.trees[REPOSITORY, hub.refs[REPOSITORY]["step2"]])
    with pytest.warns(UserWarning, match="'step2' and 'step6' have the same weights and config; one of them may have"):
        found = find(cache)
    assert len(found) == 6
    assert weights_under(cache) == 0
    listed = list_checkpoints([f"{REPOSITORY}@step*"], cache=cache)
    assert {one.name: one.same_as for one in listed} == dict.fromkeys([f"step{n}" for n in range(1, 6)]) | {
        "step6": "step2"
    }


def test_offline_finds_and_holds_what_is_on_the_disk(hub, cache, monkeypatch):
    found = find(cache)
    with Depot(cache=cache, prefetch=False) as depot:
        for checkpoint in found[:2]:
            with depot.hold(checkpoint):
                pass
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.warns(UserWarning, match=r"3 of 5 revisions of .* are not on this disk and are left out \(step3"):
        here = find(cache)
    assert here == found[:2]
    with Depot(cache=cache) as depot, depot.hold(here[1]) as local:
        assert checkpoint_hash(local.path) == found[1].hash
    with pytest.raises(LccpError, match=r"revisions of .* are not on this disk \(step4\), and the hub is switched off"):
        find(cache, "step1", "step4")
    with (
        Depot(cache=cache) as depot,
        pytest.raises(LccpError, match=r"is not on this disk and the hub is switched off \(HF_HUB_OFFLINE\)"),
        depot.hold(found[3]),
    ):
        pass
    with pytest.raises(LccpError, match="nothing of EleutherAI/pythia-14m is on this disk"):
        find(cache.parent / "elsewhere")
    assert len(hub.requests) == asked


def test_the_users_own_cache_is_used_and_never_touched(hub, cache, folders, tmp_path):
    commit = hub.refs[REPOSITORY]["step1"]
    own = tmp_path / "own-cache" / "models--EleutherAI--pythia-14m"
    shutil.copytree(folders[0], own / "snapshots" / commit)
    (own / "refs").mkdir()
    (own / "refs" / "step1").write_text(commit)
    before = {file: file.stat().st_mtime_ns for file in own.rglob("*")}
    found = find(cache, "step1", "step2", "step3")
    assert found[0].path == own / "snapshots" / commit
    with Depot(cache=cache, budget_bytes=n_weight_bytes(folders[0])) as depot:
        depot.expect(found)
        for checkpoint in found:
            with depot.hold(checkpoint) as local:
                assert checkpoint_hash(local.path) == checkpoint.hash
    assert {file: file.stat().st_mtime_ns for file in own.rglob("*")} == before
    assert hub.sent[commit, "model.safetensors"] == 0


def test_offline_the_users_own_cache_alone_will_do(hub, cache, folders, tmp_path, monkeypatch):
    commit = hub.refs[REPOSITORY]["step1"]
    own = tmp_path / "own-cache" / "models--EleutherAI--pythia-14m"
    shutil.copytree(folders[0], own / "snapshots" / commit)
    (own / "refs").mkdir()
    (own / "refs" / "step1").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (found,) = find(cache)
    assert (found.name, found.hash) == ("step1", checkpoint_hash(folders[0]))
    with Depot(cache=cache) as depot, depot.hold(found) as local:
        assert local.path == own / "snapshots" / commit


def test_a_checkpoint_found_elsewhere_is_fetched_into_this_depot(hub, cache, tmp_path, folders):
    found = find(tmp_path / "of-the-driver", "step2")[0]
    shutil.rmtree(tmp_path / "of-the-driver")
    with Depot(cache=cache) as depot, depot.hold(found) as local:
        assert local.path.is_relative_to(cache)
        assert checkpoint_hash(local.path) == found.hash == checkpoint_hash(folders[1])


def test_another_checkpoint_than_was_found_is_refused(hub, cache):
    from dataclasses import replace

    found = replace(find(cache, "step2")[0], hash="0" * 64)
    with (
        Depot(cache=cache) as depot,
        pytest.raises(LccpError, match="has other weights or another config than when it was found"),
        depot.hold(found),
    ):
        pass


def test_a_full_disk(hub, cache, monkeypatch, folders):
    found = find(cache)
    with Depot(cache=cache, prefetch=False) as depot:
        with depot.hold(found[0]):
            pass
        free = n_weight_bytes(folders[0]) // 2
        usage = shutil.disk_usage(cache)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with depot.hold(found[1]):  # what was used before makes room
            assert not (found[0].path / "model.safetensors").exists()
            with (
                pytest.raises(LccpError, match=r"has no room for|too full"),
                depot.hold(found[2]),
            ):
                pass
        shutil.rmtree(found[1].path)
        with (
            pytest.raises(LccpError, match=r"the disk of .* is too full for .*: its weights have \d+ bytes"),
            depot.hold(found[2]),
        ):
            pass


def test_a_disk_that_fills_up_on_the_way(hub, cache, monkeypatch):
    (found, *_) = find(cache)

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub_client, "open", lambda file, mode="r": Full(file, mode), raising=False)
    with (
        Depot(cache=cache) as depot,
        pytest.raises(
            LccpError, match=r"model.safetensors \(\d+ bytes\) cannot be written to .*No space left.*--cache"
        ),
        depot.hold(found),
    ):
        pass


HOLDER = """
import sys
from lccp_interp.checkpoints import Depot, checkpoint_hash, find_checkpoints
source, cache = sys.argv[1:]
(found,) = find_checkpoints([source], cache=cache)
print("found", flush=True)
sys.stdin.readline()
with Depot(cache=cache) as depot, depot.hold(found) as local:
    print(checkpoint_hash(local.path), flush=True)
    sys.stdin.readline()
"""


def test_two_processes_that_hold_the_same_revision_fetch_it_once(hub, cache, folders):
    hub.pause_seconds = 0.01
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", HOLDER, f"{REPOSITORY}@step4", str(cache)],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(2)
        ]

        def everyone(go: str) -> list[str]:
            for process in both:
                process.stdin.write(go)
                process.stdin.flush()
            return [process.stdout.readline().strip() for process in both]

        assert everyone("") == ["found", "found"]
        # Both hold it at the same time.
        assert everyone("go\n") == [checkpoint_hash(folders[3])] * 2
        everyone("done\n")
    assert [process.returncode for process in both] == [0, 0]
    assert hub.sent[hub.refs[REPOSITORY]["step4"], "model.safetensors"] == n_weight_bytes(folders[3])


def test_what_another_one_holds_is_waited_for_and_not_evicted(hub, cache, folders):
    first, second, *_ = find(cache)
    size = n_weight_bytes(folders[0])
    with Depot(cache=cache, budget_bytes=size) as mine, Depot(cache=cache, budget_bytes=size) as other:
        got = threading.Event()

        def hold_second():
            with other.hold(second):
                got.set()

        with mine.hold(first):
            waiting = threading.Thread(target=hold_second)
            waiting.start()
            assert not got.wait(0.5)
            assert Shelf.read(first.path).is_whole()
        assert got.wait(30)
        waiting.join()
    assert not Shelf.read(first.path).is_whole()


def test_a_file_system_without_locks_is_named(hub, cache, monkeypatch):
    (found,) = find_checkpoints([f"{REPOSITORY}@step1"], cache=cache)

    def flock(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("lccp_interp.checkpoints.shelf.fcntl.flock", flock)
    with (
        Depot(cache=cache) as depot,
        pytest.raises(LccpError, match=r"keeps no locks \(No locks available\).*--cache"),
        depot.hold(found),
    ):
        raise AssertionError("it was held without a lock")


def test_a_lock_of_a_dead_process_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from lccp_interp.checkpoints.shelf import Lock\n"
        "assert Lock(Path(sys.argv[1])).take(alone=True); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    lock = Lock(tmp_path / "lock")
    assert not lock.take(alone=False)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert lock.take(alone=True)
    lock.release()


def test_where_the_depot_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LCCP_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("LCCP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "lccp_interp"


def test_weights_that_the_hub_keeps_as_small_files_stay(hub, cache, folders, monkeypatch):
    whole = hub._entry
    monkeypatch.setattr(
        hub, "_entry", lambda name, content: {k: v for k, v in whole(name, content).items() if k != "lfs"}
    )
    (found,) = find(cache, "step1")
    assert found.hash == checkpoint_hash(folders[0])
    assert stock(cache, REPOSITORY, found.path.name).n_bytes == 0
    with Depot(cache=cache, budget_bytes=1) as depot, depot.hold(found) as local:
        assert checkpoint_hash(local.path) == found.hash
