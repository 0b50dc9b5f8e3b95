"""One driver per run folder, one editor of run.json at a time, and locks that die with their holders."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import Run, RunWriter, driver_of, driving, editing, lock, processes
from lccp_interp.store.lock import DRIVER_LOCK, EDIT_LOCK

DRIVE = """
import sys
from lccp_interp.store import driving
with driving(sys.argv[1]):
    print("at work", flush=True)
    sys.stdin.read()
"""
DRIVE_WITH_A_CHILD = """
import os, sys, time
from lccp_interp.store import driving
with driving(sys.argv[1]):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""
EDIT = """
import sys
from lccp_interp.store import editing
print("ready", flush=True)
sys.stdin.readline()
for index in range(30):
    with editing(sys.argv[1]) as manifest:
        manifest.setdefault("notes", []).append(f"{sys.argv[2]}-{index}")
"""


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def end(process):
    process.kill()
    process.communicate()


@pytest.fixture
def run(tmp_path):
    RunWriter(tmp_path / "run", {"task": "niah"}, [])
    return tmp_path / "run"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_driver_is_told_who_the_first_is(run):
    other = start(DRIVE, run)
    try:
        assert other.stdout.readline() == "at work\n"
        who = driver_of(run)
        assert who is not None
        assert (who["pid"], who["host"]) == (other.pid, socket.gethostname())
        message = (
            rf"run is being worked on by process {other.pid} on {socket.gethostname()} since 20\d\d-.*\+00:00; wait "
            r"until it is done, or end it there \(finished units stay\), or choose another folder$"
        )
        with pytest.raises(LccpError, match=message), driving(run):
            pytest.fail("two drivers")
        Run.open(run)  # readers need no lock
    finally:
        other.communicate()  # it ends well
    assert driver_of(run) is None
    assert names(run) == ["cases.parquet", "run.json"]


def test_the_kernel_frees_what_a_killed_driver_held(run):
    other = start(DRIVE, run)
    other.stdout.readline()
    end(other)
    assert (run / DRIVER_LOCK).exists()
    assert driver_of(run) is None
    with driving(run):
        assert driver_of(run)["pid"] == os.getpid()


def test_a_worker_that_outlives_its_driver_does_not_hold_its_lock(run):
    other = start(DRIVE_WITH_A_CHILD, run)
    child = int(other.stdout.readline())
    try:
        other.kill()
        other.wait()
        with driving(run):
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        end(other)


def test_within_its_block_a_driver_may_say_it_again_and_another_thread_may_not(run):
    refused = []

    def second():
        try:
            with driving(run):
                pass
        except LccpError as error:
            refused.append(str(error))

    with driving(run):
        with driving(str(run)):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        assert driver_of(run) is not None  # the inner block has let go of nothing
    assert len(refused) == 1
    assert f"process {os.getpid()}" in refused[0]


def test_a_folder_that_comes_to_nothing_is_not_left_behind(tmp_path):
    with driving(tmp_path / "new"):
        assert names(tmp_path / "new") == [DRIVER_LOCK]
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with driving(tmp_path / "empty"):
        RunWriter(tmp_path / "empty", {}, [])
    assert names(tmp_path / "empty") == ["cases.parquet", "run.json"]


def test_nothing_is_put_into_a_folder_of_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LccpError, match=r"holds files but no run\.json; choose an empty or new folder"):
        driving(tmp_path).__enter__()
    assert names(tmp_path) == ["thesis.txt"]


def test_a_lock_file_that_leads_elsewhere_is_not_followed(run, tmp_path):
    for target in ("thesis.txt", "nothing"):
        (tmp_path / "thesis.txt").write_text("mine")
        (run / DRIVER_LOCK).symlink_to(tmp_path / target)
        with pytest.raises(LccpError, match=r"cannot write .*run: Too many levels of symbolic links"):
            driving(run).__enter__()
        assert (tmp_path / "thesis.txt").read_text() == "mine"
        assert not (tmp_path / "nothing").exists()
        (run / DRIVER_LOCK).unlink()


def test_what_a_driver_left_that_was_killed_at_the_very_beginning_is_no_obstacle(tmp_path):
    (tmp_path / DRIVER_LOCK).write_text("")
    (tmp_path / EDIT_LOCK).write_text("")
    (tmp_path / ".run.json.deadbeef-1-1.deadbeef.tmp").write_text('{"schema')
    with driving(tmp_path):
        RunWriter(tmp_path, {}, [])
    assert Run.open(tmp_path).config == {}


def test_edits_of_several_processes_are_all_kept(run):
    editors = [start(EDIT, run, name) for name in "abc"]
    for editor in editors:
        editor.stdout.readline()
    for editor in editors:
        editor.stdin.write("go\n")
        editor.stdin.flush()
    assert [editor.wait(timeout=60) for editor in editors] == [0, 0, 0]
    for editor in editors:
        editor.communicate()
    notes = json.loads((run / "run.json").read_text())["notes"]
    assert sorted(notes) == sorted(f"{name}-{index}" for name in "abc" for index in range(30))
    assert names(run) == ["cases.parquet", "run.json"]


def test_writers_of_one_run_in_many_threads_lose_nothing(run):
    def work(index):
        writer = RunWriter(run, {"task": "niah"}, [])
        writer.add_checkpoints([Checkpoint(f"c{index}", Path("c"), index)])
        writer.record_execution({"worker": index})

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manifest = json.loads((run / "run.json").read_text())
    assert [entry["name"] for entry in manifest["checkpoints"]] == [f"c{index}" for index in range(8)]
    assert sorted(record["worker"] for record in manifest["executions"]) == list(range(8))


def test_an_edit_that_fails_or_changes_nothing_writes_nothing(run):
    before = (run / "run.json").stat()

    def fail_halfway():
        with editing(run) as manifest:
            manifest["notes"] = ["half"]
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail_halfway()
    with editing(run) as manifest:
        manifest["config"] = dict(manifest["config"])
    after = (run / "run.json").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert names(run) == ["cases.parquet", "run.json"]


def test_an_edit_of_no_run_leaves_no_lock(tmp_path):
    with pytest.raises(LccpError, match="no run at"), editing(tmp_path):
        pytest.fail("there is nothing to edit")
    assert names(tmp_path) == []


def test_who_holds_run_json_for_too_long_is_named(run, monkeypatch):
    monkeypatch.setattr(lock, "EDIT_WAIT_S", 0.1)
    message = rf"run\.json has been held for 0 s by process {os.getpid()} on .*; if that process is stopped, let it go"
    with editing(run), pytest.raises(LccpError, match=message), editing(run):
        pytest.fail("two editors")


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that keeps no locks."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def holder(run, **changes):
    """A lock file that says who holds the run."""
    name = {"host": "node7", "pid": 7, "since": "2026-01-01T00:00:00+00:00", "machine": "00000000", "began": 1}
    (run / DRIVER_LOCK).write_text(json.dumps(name | changes))


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_driver_is_who_made_the_file(run):
    with driving(run):
        assert driver_of(run)["pid"] == os.getpid()
        assert threading.active_count() > 1
        free = lock._Lock(run / DRIVER_LOCK)
        assert not free.take()
        assert str(os.getpid()) in free.holder()
    assert driver_of(run) is None
    assert names(run) == ["cases.parquet", "run.json"]
    with editing(run) as manifest:
        manifest["notes"] = ["kept"]
    assert Run.open(run).manifest["notes"] == ["kept"]


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_holder_elsewhere_is_believed_until_it_falls_silent(run):
    holder(run)
    with pytest.raises(LccpError, match="is being worked on by process 7 on node7 since 2026-01-01"), driving(run):
        pytest.fail("two drivers")
    assert driver_of(run)["host"] == "node7"
    for age_s in (lock.LEASE_S + 60, -(lock.LEASE_S + 60)):  # silent for long; or before the clock was set back
        holder(run)
        os.utime(run / DRIVER_LOCK, (time.time() - age_s,) * 2)
        assert driver_of(run) is None
        with driving(run):
            assert driver_of(run)["pid"] == os.getpid()
    assert names(run) == ["cases.parquet", "run.json"]


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_dead_process_of_this_machine_holds_nothing(run):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    began = processes.began(dead.pid)
    dead.wait()
    holder(run, machine=processes.machine(), pid=dead.pid, began=began)
    with driving(run):
        pass
    # The same number, given to another process since.
    holder(run, machine=processes.machine(), pid=os.getpid(), began=1)
    with driving(run):
        pass
    holder(run, machine=processes.machine(), pid=os.getpid(), began=processes.began(os.getpid()))
    os.utime(run / DRIVER_LOCK, (0, 0))
    with pytest.raises(LccpError, match="is being worked on"):
        driving(run).__enter__()


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_holder_keeps_touching_its_file(run, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    with driving(run):
        os.utime(run / DRIVER_LOCK, (0, 0))
        deadline = time.monotonic() + 20
        while (run / DRIVER_LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (run / DRIVER_LOCK).stat().st_mtime > 0


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_slower_of_two_heirs_gives_back_what_is_not_left(run, monkeypatch):
    holder(run)
    os.utime(run / DRIVER_LOCK, (0, 0))
    rename = os.rename

    def quicker(source, target):
        holder(run, host="node8")  # another took it over in between
        rename(source, target)

    monkeypatch.setattr(os, "rename", quicker)
    with pytest.raises(LccpError, match="process 7 on node8"):
        driving(run).__enter__()
    assert json.loads((run / DRIVER_LOCK).read_text())["host"] == "node8"
    assert names(run) == [DRIVER_LOCK, "cases.parquet", "run.json"]
