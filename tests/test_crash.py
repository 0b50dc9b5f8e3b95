"""Death, full disks, read-only folders and wrong clocks: nothing torn is ever read, and the same call goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest
from killed import CASES, live

from benchmarks import soak
from lccp_interp.schema import LccpError
from lccp_interp.store import (
    Run,
    RunWriter,
    append_probes,
    driving,
    editing,
    processes,
    repair,
    replacing,
    verify,
    write_part,
)

TESTS = Path(__file__).resolve().parent
FRAME = pl.DataFrame({"value": [float(index**0.5) for index in range(20_000)]})


def run_script(script, *arguments):
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def temporaries(folder):
    return sorted(path.name for path in folder.rglob(".*"))


# Killed


def killed_between_any_two_touches(folder, step):
    done = run_script([TESTS / "killed.py"], folder, step)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_any_touch_of_a_file_a_run_goes_on(tmp_path):
    found = killed_between_any_two_touches(tmp_path, 7)
    assert found["faults"] == []
    assert found["moments"] > 60
    assert found["left"] > 0  # some died with a temporary file in hand


@pytest.mark.slow
def test_killed_at_every_touch_of_a_file_a_run_goes_on(tmp_path):
    assert killed_between_any_two_touches(tmp_path, 1)["faults"] == []


def swept(place, *, kills, mean_s, n_checkpoints=3, n_shards=4):
    """A sweep that is killed so many times, after an undisturbed one."""
    study = soak.Study(str(soak.make_trajectory(place / "trajectory", n_checkpoints)), n_shards=n_shards)
    with soak.Server() as server:
        ended = server.drive(study, place / "undisturbed")
        assert ended["error"] == ""
        damaged = Path(shutil.copytree(place / "undisturbed", place / "damaged"))
        for part in (damaged / "scores").glob("*.0001.parquet"):
            part.write_bytes(part.read_bytes()[:-20] + b"PAR1")
        assert [finding.file for finding in repair(damaged) if finding.state == "removed"]
        assert server.drive(study, damaged)["error"] == ""
        assert soak.differences(damaged, place / "undisturbed") == []
        draw = random.Random(kills)
        while kills > 0:
            out = place / f"killed-{kills}"
            tally = soak.disturb(server, study, out, place / "undisturbed", draw=draw, mean_s=mean_s, kills=kills)
            assert (tally.torn, tally.wrong) == ([], [])
            assert tally.readings > 0
            assert temporaries(out) == []
            kills -= tally.kills
    assert {finding.state for finding in verify(place / "undisturbed")} == {"whole"}


def test_a_sweep_killed_at_random_ends_with_the_tables_of_an_undisturbed_one(tmp_path):
    swept(tmp_path, kills=10, mean_s=0.6, n_checkpoints=2)


@pytest.mark.slow
def test_a_sweep_killed_a_hundred_times_ends_with_the_tables_of_an_undisturbed_one(tmp_path):
    swept(tmp_path, kills=100, mean_s=0.6, n_checkpoints=5, n_shards=10)


def test_the_harness_sees_what_it_is_there_to_see(tmp_path):
    for name in ("one", "other"):
        live(tmp_path / name)
    assert soak.differences(tmp_path / "one", tmp_path / "other") == []
    run = tmp_path / "one"
    (run / "scores" / "a.0000.parquet").unlink()
    (run / "scores" / "a.0001.parquet").write_bytes((run / "scores" / "b.0001.parquet").read_bytes())
    (run / "scores" / ".b.tmp").write_text("half")
    with editing(run) as manifest:
        manifest["checkpoints"] = []
    assert soak.differences(run, tmp_path / "other") == [
        "scores/a.0000.parquet is lost",
        "scores/a.0001.parquet has other bytes",
        "scores/.b.tmp is left over",
        "run.json: checkpoints differs",
    ]
    assert soak.doubled(tmp_path / "other") == 0
    assert soak.doubled(run) == 12
    (run / "scores" / "a.0000.parquet").write_bytes(b"PAR1")
    reader = soak.Reader(run)
    reader.look()
    assert len(reader.torn) == 1


def test_the_page_of_the_soak_shows_the_numbers_that_are_kept():
    measured = json.loads(soak.RESULTS.read_text())
    assert soak.PAGE.read_text() == soak.render(measured), "run make soak"
    for record in measured["records"]:
        assert record["units"] >= 200
        assert record["resumes"] == record["kills_by_clock"] + record["kills_at_files"] > 0
        assert [record[key] for key in ("torn", "lost", "doubled", "other", "faults")] == [0, 0, 0, 0, []]


# A full disk

FILL = """
import resource, sys
from pathlib import Path
from killed import CASES, live
from lccp_interp.schema import LccpError
from lccp_interp.store import write_part
import test_crash

live(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    write_part(test_crash.FRAME, Path(sys.argv[1]) / "scores" / "a.0007.parquet")
except LccpError as error:
    print(error)
"""


def test_a_file_that_has_no_room_is_named_and_leaves_nothing(tmp_path):
    done = run_script(["-c", FILL], tmp_path / "run")
    assert done.stdout == (
        f"cannot write {tmp_path / 'run' / 'scores' / 'a.0007.parquet'}: File too large; choose another place, or make "
        "room\n"
    ), done.stderr
    assert temporaries(tmp_path) == []
    assert {finding.state for finding in verify(tmp_path / "run")} == {"whole"}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(ballast):
    with open(ballast, "wb", buffering=0) as handle, contextlib.suppress(OSError):
        while True:
            handle.write(b"0" * 4096)


def tries_to_live(run):
    try:
        live(run)
    except LccpError as error:
        return [str(error)]
    return []


def test_a_disk_that_is_full_stops_a_run_that_goes_on_when_there_is_room(small_disk, tmp_path):
    live(tmp_path / "undisturbed")
    run, ballast, refused = small_disk / "run", small_disk / "ballast", []
    live(run)
    # Room for less and less, so that the disk is full at one place after another.
    for part in ("scores/a.0000.parquet", "outcomes/b.0001.parquet", "cases.parquet", "probes/ruler.parquet"):
        for free in (0, 4096, 8192, 12288):
            (run / part).unlink(missing_ok=True)
            fill(ballast)
            os.truncate(ballast, ballast.stat().st_size - free)
            before = (run / "run.json").read_bytes()
            refused += tries_to_live(run)
            assert temporaries(run) == []
            assert {finding.state for finding in verify(run) if finding.why != "it is not there"} == {"whole"}
            assert json.loads((run / "run.json").read_bytes()) == json.loads(before)
            ballast.unlink()
    assert len(refused) > 4
    assert all(message.endswith("No space left on device; choose another place, or make room") for message in refused)
    live(run)
    assert soak.differences(run, tmp_path / "undisturbed") == []


def test_a_full_disk_is_told_at_the_first_unit_that_does_not_fit(small_disk):
    with driving(small_disk / "run"):
        RunWriter(small_disk / "run", {"task": "niah"}, CASES)
        part = small_disk / "run" / "scores" / "a.0000.parquet"
        with pytest.raises(LccpError, match=r"cannot write .*a\.0000\.parquet: No space left on device"):
            write_part(pl.concat([FRAME.with_columns(more=pl.col("value").shuffle(seed=1))] * 3), part)
        assert not part.exists()
        assert temporaries(part.parent) == []


# A folder that cannot be written

READ_ONLY = """
import os, sys
from pathlib import Path
from killed import CASES, live, results
from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import Run, RunWriter, driver_of, driving, editing, result_frames

if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
run = Path(sys.argv[1])
live(run)  # finished: nothing is written, nothing is missing
print(Run.open(run).scores.collect().height, driver_of(run))
for attempt in (
    lambda writer: writer.add_checkpoints([Checkpoint("c", Path("c"), 300)]),
    lambda writer: writer.record_execution({}),
    lambda writer: writer.append("c", 0, **dict(zip(("scores", "outcomes"), result_frames(
        Checkpoint("c", Path("c"), 300), "teacher_forced", results(1.0, CASES), {case.case_id: (2, 3) for case in CASES}
    )))),
):
    with driving(run):
        try:
            attempt(RunWriter(run, {"task": "niah"}, CASES))
        except LccpError as error:
            print(error)
"""


def test_a_read_only_run_can_be_read_and_says_what_it_cannot_do(tmp_path):
    os.umask(os.umask(0) | 0)
    run = tmp_path / "run"
    live(run)
    folders = [run, *(path for path in run.rglob("*") if path.is_dir())]
    # Another user has to get at what pytest keeps to itself.
    above = [folder for folder in (tmp_path, *tmp_path.parents) if folder.stat().st_uid == os.getuid()]
    modes = {folder: folder.stat().st_mode for folder in (*folders, *above) if folder != Path("/")}
    try:
        for folder in modes:
            os.chmod(folder, 0o555 if folder in folders else modes[folder] | 0o055)
        done = run_script(["-c", READ_ONLY], run)
    finally:
        for folder, mode in modes.items():
            os.chmod(folder, mode)
    remedy = "Permission denied; choose another place, or make room"
    assert done.stdout.splitlines() == [
        "48 None",
        f"cannot write {run / 'run.json'}: {remedy}",
        f"cannot write {run / 'run.json'}: {remedy}",
        f"cannot write {run / 'outcomes' / 'c.0000.parquet'}: {remedy}",
    ], done.stderr
    assert {finding.state for finding in verify(run)} == {"whole"}


# Clocks


def owned(folder, *, machine=None, pid=None, began=None):
    """A temporary file as a process leaves it that is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.getpid() if pid is None else pid
    began = processes.began(pid) if began is None else began
    path = folder / f".a.0000.parquet.{machine or processes.machine()}-{pid}-{began}.{os.urandom(4).hex()}.tmp"
    path.write_bytes(b"half")
    return path


def dead_process():
    child = subprocess.Popen([sys.executable, "-c", ""])
    began = processes.began(child.pid)
    child.wait()
    return {"pid": child.pid, "began": began}


@pytest.mark.parametrize("off_s", [0, -10 * 365 * 86400, 10 * 365 * 86400], ids=["right", "far past", "future"])
def test_whatever_the_clock_says_the_living_keep_their_files_and_the_dead_do_not(tmp_path, off_s):
    living, dead = owned(tmp_path / "scores"), owned(tmp_path / "scores", **dead_process())
    reused = owned(tmp_path / "sft" / "deep", began=1)  # the number of a dead one, given to this process
    for path in (living, dead, reused):
        os.utime(path, (time.time() + off_s,) * 2)
    assert processes.remove_orphans(tmp_path) == sorted([dead, reused])
    assert living.exists()


@pytest.mark.parametrize(("off_s", "is_left"), [(0, False), (-1800, False), (1800, False), (-7200, True), (7200, True)])
def test_on_other_machines_age_decides_by_the_clock_of_the_file_system(tmp_path, monkeypatch, off_s, is_left):
    theirs = owned(tmp_path, machine="00000000", pid=1)
    os.utime(theirs, (time.time() + off_s,) * 2)
    # This machine's own clock is not asked.
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert processes.remove_orphans(tmp_path) == ([theirs] if is_left else [])
    assert processes.orphans(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ([] if is_left else [theirs.name])


def test_a_killed_process_that_waits_to_be_buried_is_dead():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    began = processes.began(child.pid)
    assert processes.is_alive(child.pid, began)
    child.kill()
    deadline = time.monotonic() + 20
    while processes.is_alive(child.pid, began) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not processes.is_alive(child.pid, began)
    child.wait()


def test_two_containers_on_one_host_are_two_machines(monkeypatch):
    monkeypatch.setattr(processes, "machine", processes.machine.__wrapped__)
    here = processes.machine()
    assert here == processes.machine()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert processes.machine() != here
    monkeypatch.undo()
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert processes.machine.__wrapped__() != here


def test_a_temporary_file_says_whose_it_is(tmp_path):
    with replacing(tmp_path / "x" / "a.json") as temporary:
        temporary.write_text("{}")
        assert f".{processes.machine()}-{os.getpid()}-" in temporary.name
        assert processes.orphans(tmp_path) == []
        assert len(processes.temporary_beside(tmp_path / ("x" * 209)).name) <= 255
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.json"]


def test_times_in_the_future_do_not_make_a_unit_open_or_done(tmp_path):
    live(tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (2**33,) * 2)
    writer = RunWriter(tmp_path / "run", {"task": "niah"}, CASES)
    assert all(writer.is_done(name, shard) for name in "ab" for shard in (0, 1))
    assert Run.open(tmp_path / "run").scores.collect().height == 48


def test_of_two_who_add_results_under_one_name_one_is_refused(tmp_path):
    live(tmp_path / "run")
    frame = pl.read_parquet(tmp_path / "run" / "probes" / "ruler.parquet").with_columns(subset=pl.lit("qa"))
    told = []

    def add(score):
        try:
            append_probes(tmp_path / "run", "same", frame.with_columns(score=pl.lit(score)))
        except LccpError as error:
            told.append(str(error))

    threads = [threading.Thread(target=add, args=(float(index % 2),)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 3
    assert all("is there with other results" in message for message in told)
    assert Run.open(tmp_path / "run").probes.filter(subset="qa").collect().height == 1
