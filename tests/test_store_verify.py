"""Every file of a run read to its last row: what is damaged is found, named, removed on request and made again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from killed import CASES, live
from test_store_lock import DRIVE, start

from benchmarks.soak import differences
from lccp_interp.schema import LccpError
from lccp_interp.store import REMOVED, STATES, Run, RunWriter, driving, repair, verify, write_part
from lccp_interp.store.files import rows_digest

PART = "scores/a.0000.parquet"


@pytest.fixture
def run(tmp_path):
    live(tmp_path / "run")
    return tmp_path / "run"


def states(run):
    return {finding.file: finding.state for finding in verify(run)}


def unsound(run):
    return [(finding.file, finding.state, finding.why) for finding in verify(run) if not finding.is_good]


def test_a_sound_run_is_whole(run):
    found = states(run)
    assert set(found.values()) == {"whole"}
    parts = [
        f"{table}/{name}.000{shard}.parquet" for table in ("outcomes", "scores") for name in "ab" for shard in "01"
    ]
    assert sorted(found) == sorted(["cases.parquet", "probes/ruler.parquet", *parts])
    assert {finding.rows for finding in verify(run)} == {4, 1, 2, 12}


def flip(part):
    """Change one bit of every number in a part, as a dying disk does."""
    frame = pl.read_parquet(part)
    metadata = pl.read_parquet_metadata(part)
    frame.with_columns(value=pl.col("value") + 2**-20).write_parquet(
        part, metadata={key: value for key, value in metadata.items() if key.startswith("lccp")}
    )


@pytest.mark.parametrize(
    ("break_", "why"),
    [
        (lambda part: part.write_bytes(b""), "is not a whole Parquet file"),
        (lambda part: part.write_bytes(part.read_bytes()[:-9]), "is not a whole Parquet file"),
        (lambda part: part.write_bytes(b"PAR1" + b"\0" * 50 + b"PAR1"), "is not a whole Parquet file ("),
        (
            lambda part: part.write_bytes(part.read_bytes()[:4] + b"\xff" * 60 + part.read_bytes()[64:]),
            "cannot be read",
        ),
        (lambda part: pl.read_parquet(part).drop("value").write_parquet(part), "has no column value"),
        (flip, "its rows are not those that were written"),
        (
            lambda part: part.write_bytes(part.with_name("b.0000.parquet").read_bytes()),
            "it holds b, which is not what its name says",
        ),
        (
            lambda part: part.write_bytes(part.with_name("a.0001.parquet").read_bytes()),
            "its cases are not those of shard 0",
        ),
    ],
    ids=["empty", "torn", "garbage", "damaged inside", "without a column", "flipped", "another's", "another shard's"],
)
def test_damage_is_named_and_made_again(tmp_path, break_, why):
    for name in ("run", "sound"):
        live(tmp_path / name)
    run = tmp_path / "run"
    # A run that says how many cases its shards have.
    for folder in (run, tmp_path / "sound"):
        manifest = json.loads((folder / "run.json").read_text())
        manifest["config"]["cases_per_shard"] = 2
        (folder / "run.json").write_text(json.dumps(manifest))
    break_(run / PART)
    [(file, state, told)] = unsound(run)
    assert (file, state) == (PART, "damaged")
    assert told.startswith(why)
    assert [finding.file for finding in repair(run) if finding.state == REMOVED] == [PART]
    assert not (run / PART).exists()
    writer = RunWriter(run, Run.open(run).config, CASES)
    assert not writer.is_done("a", 0)
    assert writer.is_done("a", 1)
    (run / "run.json").write_bytes((tmp_path / "sound" / "run.json").read_bytes())
    scores, outcomes = (
        pl.read_parquet(tmp_path / "sound" / table / "a.0000.parquet") for table in ("scores", "outcomes")
    )
    writer.append("a", 0, scores=scores, outcomes=outcomes)
    assert differences(run, tmp_path / "sound") == []


def test_bytes_without_a_digest_are_only_read(run):
    pl.read_parquet(run / PART).write_parquet(run / PART)
    assert states(run)[PART] == "unsigned"
    assert unsound(run) == []


def test_what_run_json_does_not_know_is_told_and_stays(run):
    manifest = json.loads((run / "run.json").read_text())
    manifest["checkpoints"] = [entry for entry in manifest["checkpoints"] if entry["name"] == "b"]
    (run / "run.json").write_text(json.dumps(manifest))
    found = unsound(run)
    assert len(found) == 4
    assert found[0] == ("outcomes/a.0000.parquet", "stray", "run.json has no checkpoint 'a'")
    assert not [finding for finding in repair(run) if finding.state == REMOVED]
    assert len(unsound(run)) == 4


def test_what_the_dead_left_is_found_at_any_depth_and_cases_are_missed(run):
    (run / "cases.parquet").unlink()
    deep = run / "sft" / "short" / ".adapter.json.x.tmp"
    deep.parent.mkdir(parents=True)
    deep.write_text("half")
    os.utime(deep, (0, 0))
    assert unsound(run) == [
        ("cases.parquet", "damaged", "it is not there"),
        ("sft/short/.adapter.json.x.tmp", "left", "its writer is gone"),
    ]
    repair(run)
    assert not deep.exists()
    RunWriter(run, Run.open(run).config, CASES)  # the scoring command writes the cases again
    assert unsound(run) == []


def test_a_run_within_a_run_is_looked_at_on_its_own(run):
    live(run / "sft" / "heads")
    flip(run / "sft" / "heads" / PART)
    assert unsound(run) == [(f"sft/heads/{PART}", "damaged", "its rows are not those that were written")]
    assert len(states(run)) == 2 * len(states(run / "sft" / "heads"))


def test_nothing_is_removed_under_the_hands_of_a_driver(run):
    (run / PART).write_bytes(b"")
    other = start(DRIVE, run)
    try:
        other.stdout.readline()
        with pytest.raises(LccpError, match=rf"is being worked on by process {other.pid}"):
            repair(run)
    finally:
        other.communicate()
    assert (run / PART).exists()


def test_the_command_says_what_it_found(lccp, run):
    code, out, err = lccp("verify", run)
    assert (code, out, err) == (0, "", f"{run}: 10 files: 10 whole\n")
    (run / PART).write_bytes(b"")
    code, out, err = lccp("verify", run)
    assert code == 2
    assert PART in out
    assert "outcomes" not in out
    assert f"{run}: 10 files: 9 whole, 1 damaged\n" in err
    assert "lccp: 1 of 10 files are not whole; `lccp verify RUN --repair` removes what is damaged or left\n" in err
    code, out, err = lccp("verify", run, "--format", "json")
    assert code == 2
    records = json.loads(out)
    assert len(records) == 10
    assert {record["state"] for record in records} <= set(STATES)
    assert records[-4] == {
        "file": PART, "state": "damaged", "rows": None, "why": "is not a whole Parquet file", "again": "score again",
    }  # fmt: skip
    code, out, err = lccp("verify", run, "--repair")
    assert code == 0
    assert "what was removed is made again by the command that made it: score again\n" in err
    assert not (run / PART).exists()
    code, _, err = lccp("verify", run / "scores")
    assert (code, err) == (2, f"lccp: no run at {run / 'scores'}: it has no run.json; make one with `lccp score "
                              f"CHECKPOINT... --out {run / 'scores'}`\n")  # fmt: skip


WRITE = """
import sys
from pathlib import Path
from killed import live
live(Path(sys.argv[1]))
"""


def test_the_same_rows_give_the_same_bytes_in_every_process(run, tmp_path):
    here = Path(__file__).parent
    path = {"PYTHONPATH": f"{here}:{here.parent}", "POLARS_MAX_THREADS": "3", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "other")], check=True, env=path)
    assert differences(tmp_path / "other", run) == []


def test_the_same_rows_give_the_same_bytes_in_whatever_pieces(run, tmp_path):
    frame = pl.read_parquet(run / PART)
    pieces = pl.concat([frame[:3], frame[3:4], frame[4:]], rechunk=False)
    assert pieces.n_chunks() > 1
    write_part(pieces, tmp_path / "pieces.parquet")
    assert (tmp_path / "pieces.parquet").read_bytes() == (run / PART).read_bytes()


cells = {
    pl.Float32: st.floats(width=32, allow_nan=False) | st.none(),
    pl.Int64: st.integers(-3, 3) | st.none(),
    pl.Boolean: st.booleans() | st.none(),
    pl.String: st.text("ab", max_size=2) | st.none(),
    pl.List(pl.Int32): st.lists(st.integers(0, 2), max_size=2) | st.none(),
}


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_digests_tell_apart_what_rows_tell_apart(data):
    kind = data.draw(st.sampled_from(list(cells)))
    one, other = (data.draw(st.lists(cells[kind], max_size=3)) for _ in range(2))
    frames = [pl.DataFrame({"x": values}, schema={"x": kind}) for values in (one, other)]
    # The slow twin: the values as Python writes them, in which -0.0 and 0.0 differ.
    assert (rows_digest(frames[0]) == rows_digest(frames[1])) == (
        repr(frames[0]["x"].to_list()) == repr(frames[1]["x"].to_list())
    )


def test_digests_know_names_types_and_nan():
    frame = pl.DataFrame({"x": [1.0, float("nan"), None]})
    assert rows_digest(frame) == rows_digest(frame.clone())
    others = [frame.rename({"x": "y"}), frame.cast(pl.Float32), frame.fill_nan(None), frame.fill_null(float("nan"))]
    assert len({rows_digest(other) for other in (frame, *others)}) == 5
    nested = pl.DataFrame({"x": [[[1], []], [[2]]]})
    assert rows_digest(nested) != rows_digest(pl.DataFrame({"x": [[[1]], [[], [2]]]}))


def test_repair_may_be_asked_for_by_the_driver_itself(run):
    with driving(run):
        assert {finding.state for finding in repair(run)} == {"whole"}
