"""`python tests/killed.py FOLDER STEP`: the life of a small run, killed between two touches of its files.

Moment after moment is tried, every STEP-th of them; with 1 there is no other.

Each life is a forked child that first reads what is there. The first is killed, a second is killed at a moment drawn at
random, and a third ends the work. Prints {"moments": the last that was tried, "faults": what was torn or came out other
than undisturbed, "left": how many temporary files the dead left in all}. It needs a process of its own: polars must not
have been used before a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.soak import Reader, die_at_file, differences
from lccp_interp.schema import Case, CaseResult, Checkpoint, Span
from lccp_interp.store import PROBES_SCHEMA, RunWriter, append_probes, driving, editing, result_frames

CASES = [
    Case(f"c{i}", "niah", 8, 0.5, f"n{i}", "h", 0, 0, (1, 2, 3, 4, 5, 6), (2, 3), Span(1, 4), Span(1, 3))
    for i in range(4)
]


def results(value: float, cases: list[Case]) -> list[CaseResult]:
    loss_nats, scores = np.array([0.5, 1.5], np.float32), np.full((2, 3), value, np.float32)
    return [CaseResult(case.case_id, (0, 2), {"retrieval": scores}, loss_nats, (2, 9)) for case in cases]


def live(folder: Path) -> None:
    """All that is ever written into a run: its beginning, checkpoints, units, results of benchmarks, records."""
    with driving(folder):
        writer = RunWriter(folder, {"task": "niah"}, CASES)
        for index, name in enumerate(["a", "b"]):
            checkpoint = Checkpoint(name, Path(name), 100 + index)
            writer.add_checkpoints([checkpoint])
            for shard in (0, 1):
                if not writer.is_done(name, shard):
                    done = results(shard, CASES[2 * shard : 2 * shard + 2])
                    answers = {case.case_id: case.answer_ids for case in CASES}
                    scores, outcomes = result_frames(checkpoint, "teacher_forced", done, answers)
                    writer.append(name, shard, scores=scores, outcomes=outcomes)
        row = {"checkpoint": "a", "tokens_seen": 100, "benchmark": "ruler", "metric": "accuracy", "score": 0.5}
        append_probes(folder, "ruler", pl.DataFrame([row], schema=PROBES_SCHEMA))
        with editing(folder) as manifest:
            manifest["imports"] = [{"name": "ruler"}]


def ended(what: Callable[[], None]) -> int:
    """Exit status of a forked child that does something; a negative one is the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            what()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_life(folder: Path, n: int) -> None:
    look(folder)
    die_at_file(str(folder), n)
    live(folder)


def look(folder: Path) -> None:
    """Read what a dead writer left before anything is done about it."""
    reader = Reader(folder)
    reader.look()
    assert not reader.torn, reader.torn


def main(place: Path, step: int) -> None:
    # A kill loses nothing that was written; fsync is for machines that lose power, and takes most of the time here.
    os.fsync = lambda descriptor: None
    reference = place / "reference"
    assert ended(lambda: live(reference)) == 0
    draw, faults, left, moment = random.Random(0), [], 0, 1 - step
    while True:
        moment += step
        folder = place / f"killed-{moment}"
        code = ended(lambda folder=folder, n=moment: killed_life(folder, n))
        if code == 0:
            break
        left += sum(path.name.endswith(".tmp") for path in folder.rglob(".*"))
        again = ended(lambda folder=folder: killed_life(folder, draw.randint(1, 40)))
        last = ended(lambda folder=folder: (look(folder), live(folder)))
        if code != -signal.SIGKILL or again not in (0, -signal.SIGKILL) or last != 0:
            faults.append(f"moment {moment}: {code}, {again}, {last}")
        faults += [f"moment {moment}: {fault}" for fault in differences(folder, reference)]
    print(json.dumps({"moments": moment - step, "faults": faults, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
