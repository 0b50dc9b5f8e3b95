"""`python -m benchmarks.soak [--minutes 10]`: a sweep that is killed over and over, held against an undisturbed one.

A small trajectory with random weights is scored once in peace. Then the same sweep is begun in another folder and its
driver is sent SIGKILL, at moments drawn at random: half of them by the clock, half of them just before the n-th time
that it touches a file of the run, where a torn file would come from. Each time it is started again, until it ends by
itself; then all begins anew in a new folder until the time is up. With the executor `pool` its workers are killed, too.
All the while a reader opens the run and reads every part; in the end every table must be byte for byte that of the
undisturbed run, with no unit lost, none doubled, and nothing left over.

To pay the seconds of importing torch once, drivers are forked from a server that has imported everything and done
nothing. This module refuses to know what is in a table. Cost: the minutes asked for, and half a minute to begin with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "soak.json"
PAGE = HERE / "soak.md"

N_CHECKPOINTS, N_SHARDS = 20, 10
CASES_PER_SHARD = 4
LENGTH = 128
DEPTHS = (0, 25, 50, 75, 100)
TITLE = "Crash safety: a sweep that is killed over and over"
CLOSING = (
    "Wall time is that of the killed sweeps together, *in peace* what as many undisturbed ones take, measured on",
    "a machine that others used, too. Their difference, shared out among the kills, is what a kill costs: loading",
    "and checking a model anew (a pool: importing torch in each worker), and the unit that was under way.",
    "",
)


@dataclass(frozen=True)
class Study:
    """The sweep that is run: how many checkpoints, shards of cases each, and by whom."""

    checkpoints: str
    n_shards: int = N_SHARDS
    executor: str = "here"
    workers: int = 1

    @property
    def samples(self) -> int:
        """Haystacks per depth, so that there are `n_shards` shards of cases."""
        return self.n_shards * CASES_PER_SHARD // len(DEPTHS)


@dataclass
class Tally:
    """What happened in one sweep, killed as it was."""

    kills_by_clock: int = 0
    kills_at_files: int = 0
    kills_of_workers: int = 0
    resumes: int = 0
    wall_s: float = 0.0
    readings: int = 0
    torn: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Of drivers, in whatever way."""
        return self.kills_by_clock + self.kills_at_files


def make_trajectory(folder: Path, n_checkpoints: int = N_CHECKPOINTS) -> Path:
    """Tiny random checkpoints with the organism's tokenizer, in a folder with a trajectory.json."""
    from transformers import AutoTokenizer

    from lccp_interp.capture import architectures
    from lccp_interp.organism.tokenizer import save_tokenizer

    entries = []
    for index in range(n_checkpoints):
        name = f"step{index + 1}"
        place = folder / name
        place.mkdir(parents=True)
        save_tokenizer(place)
        vocabulary = len(AutoTokenizer.from_pretrained(place))
        model = architectures.tiny_model(
            architectures.named("llama"), seed=index, num_hidden_layers=3, vocab_size=vocabulary
        )
        model.save_pretrained(place)
        entries.append({"name": name, "path": name, "tokens_seen": 1000 * (index + 1), "stage": "lccp"})
    (folder / "trajectory.json").write_text(json.dumps({"name": "soak", "checkpoints": entries}))
    return folder


class Server:
    """A process that has imported everything and forks a driver for each job; closes with its block."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parent,
            env=environment,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def drive(
        self, study: Study, out: Path, *, kill_after_s: float | None = None, kill_at_file: int | None = None,
        kill_worker_after_s: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Run one driver; returns how it ended: {killed, error, seconds, worker_killed}."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {
            "study": asdict(study),
            "out": str(out),
            "kill_after_s": kill_after_s,
            "kill_at_file": kill_at_file,
            "kill_worker_after_s": kill_worker_after_s,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended with exit code {self._process.wait(timeout=60)}")
        return dict(json.loads(line))


def serve() -> None:
    """Fork a driver for each line of standard input, kill it when its time has come, and tell how it ended."""
    import torch

    import lccp_interp.capture.model
    import lccp_interp.capture.selfcheck
    import lccp_interp.scoring.engine
    import lccp_interp.sweep
    import lccp_interp.tasks.niah  # noqa: F401

    torch.set_num_threads(1)
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        began = time.monotonic()
        with tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                _drive(job, errors.fileno())
            killed_worker = False
            due, worker_due = job["kill_after_s"], job["kill_worker_after_s"]
            while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
                age = time.monotonic() - began
                if due is not None and age > due:
                    os.kill(child, signal.SIGKILL)
                if worker_due is not None and age > worker_due and not killed_worker:
                    killed_worker = _kill_a_child_of(child)
                time.sleep(0.001)
            errors.seek(0)
            answer = {
                "killed": os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) == signal.SIGKILL,
                "worker_killed": killed_worker,
                "error": errors.read().strip() if ended[1] else "",
                "seconds": time.monotonic() - began,
            }
        os.write(answers, (json.dumps(answer) + "\n").encode())


def _drive(job: dict[str, Any], errors: int) -> None:
    """What a driver does; never returns."""
    code = 1
    try:
        os.dup2(errors, 2)
        if job["kill_at_file"] is not None:
            die_at_file(job["out"], job["kill_at_file"])
        from lccp_interp.sweep import Execution, score_grid
        from lccp_interp.tasks.niah import NiahGrid

        study = Study(**job["study"])
        grid = NiahGrid(lengths=(LENGTH,), depths=DEPTHS, samples=study.samples)
        score_grid(
            study.checkpoints,
            job["out"],
            grid,
            cases_per_shard=CASES_PER_SHARD,
            execution=Execution(device="cpu", executor=study.executor, workers=study.workers),
        )
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def die_at_file(folder: str, n: int) -> None:
    """Have this process killed by itself just before it touches a file under `folder` for the `n`-th time."""
    left = n

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"):
            return
        if str(arguments[0]).startswith(folder):
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _kill_a_child_of(pid: int) -> bool:
    """Kill one of the workers of a driver, the youngest; False if it has none yet."""
    children = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                command = (entry / "cmdline").read_bytes()
                if b"serve(" in command:
                    children.append(int(entry.name))
    if not children:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(max(children), signal.SIGKILL)
    return True


class Reader(threading.Thread):
    """Reads the run over and over while it is written; whatever it cannot read is torn."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.readings = 0
        self.torn: list[str] = []
        self._over = threading.Event()

    def run(self) -> None:
        """Read until told to stop."""
        while not self._over.wait(0.2):
            self.look()

    def stop(self) -> None:
        """Read once more and end."""
        self._over.set()
        self.join()
        self.look()

    def look(self) -> None:
        """Read all that is there once."""
        import polars as pl

        from lccp_interp.schema import LccpError
        from lccp_interp.store import Run
        from lccp_interp.store.files import is_sound

        if not (self.folder / "run.json").is_file():
            return
        try:
            run = Run.open(self.folder)
            _ = run.checkpoints
            for part in sorted(self.folder.rglob("*.parquet")):
                if not is_sound(part, pl.read_parquet(part)):
                    self.torn.append(f"{part}: other rows than were written")
                self.readings += 1
            for table in ("scores", "outcomes"):
                if any((self.folder / table).glob("*.parquet")):
                    getattr(run, table).collect()
        except (LccpError, OSError, pl.exceptions.PolarsError) as error:
            self.torn.append(str(error))


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[Reader]:
    """A reader at work as long as the block runs."""
    reader = Reader(folder)
    reader.start()
    try:
        yield reader
    finally:
        reader.stop()


def differences(disturbed: Path, undisturbed: Path) -> list[str]:
    """What tells two run folders apart that should hold the same tables, and what was left over in the first."""
    wrong = []
    one, other = ({path.relative_to(run): path for path in _files(run)} for run in (disturbed, undisturbed))
    parts = {name for name in (*one, *other) if name.suffix == ".parquet"}
    for name in sorted(parts):
        if name not in one:
            wrong.append(f"{name} is lost")
        elif name not in other:
            wrong.append(f"{name} is too many")
        elif one[name].read_bytes() != other[name].read_bytes():
            wrong.append(f"{name} has other bytes")
    wrong += [f"{name} is left over" for name in sorted(set(one) - set(other) - parts)]
    manifests = [json.loads((run / "run.json").read_text()) for run in (disturbed, undisturbed)]
    wrong += [f"run.json: {key} differs" for key in ("config", "checkpoints") if manifests[0][key] != manifests[1][key]]
    return wrong


def _files(run: Path) -> Iterator[Path]:
    return (path for path in run.rglob("*") if path.is_file())


def doubled(run: Path) -> int:
    """Rows of the scores that stand there twice."""
    import polars as pl

    from lccp_interp.store import Run

    keys = ["checkpoint", "case_id", "mode", "metric", "layer", "head"]
    scores = Run.open(run).scores.select(keys)
    return int(scores.select(pl.len() - pl.struct(keys).n_unique()).collect().item())


def disturb(
    server: Server, study: Study, out: Path, undisturbed: Path, *, draw: random.Random, mean_s: float,
    kills: int | None = None, until: float | None = None,
) -> Tally:  # fmt: skip
    """Drive one sweep to its end through kills.

    Args:
        server: forks the drivers.
        study: what they do.
        out: a new folder.
        undisturbed: a run of the same study that nobody disturbed.
        draw: the moments.
        mean_s: seconds a driver lives, on average, if it is killed by the clock.
        kills: after so many the driver is left alone; None for no such limit.
        until: by `time.monotonic`, after which it is left alone.

    Returns:
        What happened.
    """
    tally, began = Tally(), time.monotonic()
    with reading(out) as reader:
        while True:
            at_peace = (kills is not None and tally.kills >= kills) or (until is not None and time.monotonic() > until)
            moment: dict[str, Any] = {}
            if not at_peace:
                life_s = draw.uniform(0, 2 * mean_s)
                moment = draw.choice([{"kill_after_s": life_s}, {"kill_at_file": draw.randint(1, 60)}])
                if study.executor == "pool":
                    moment["kill_worker_after_s"] = draw.uniform(0, life_s)
            ended = server.drive(study, out, **moment)
            tally.kills_of_workers += ended["worker_killed"]
            if ended["error"] and not ended["killed"]:
                tally.wrong.append(ended["error"])
                break
            if not ended["killed"]:
                break
            tally.kills_at_files += "kill_at_file" in moment
            tally.kills_by_clock += "kill_at_file" not in moment
            tally.resumes += 1
    tally.wall_s = time.monotonic() - began
    tally.readings, tally.torn = reader.readings, reader.torn
    if not tally.wrong:
        tally.wrong = differences(out, undisturbed)
        if n_doubled := doubled(out):
            tally.wrong.append(f"{n_doubled} rows are doubled")
    return tally


def soak(place: Path, *, minutes: float, seed: int = 0, say: Any = print) -> list[dict[str, Any]]:
    """Disturb sweeps for some minutes; returns one record per executor."""
    trajectory = make_trajectory(place / "trajectory")
    records = []
    with Server() as server:
        for executor, workers, share in (("here", 1, 0.5), ("pool", 2, 0.5)):
            study = Study(str(trajectory), executor=executor, workers=workers)
            undisturbed = place / f"undisturbed-{executor}"
            ended = server.drive(study, undisturbed)
            if ended["error"]:
                raise RuntimeError(ended["error"])
            say(f"{executor}: undisturbed in {ended['seconds']:.1f} s")
            records.append(_round(server, study, place, undisturbed, minutes * share, seed, ended["seconds"], say))
    if wrong := differences(place / "undisturbed-pool", place / "undisturbed-here"):
        raise RuntimeError(f"the executors disagree: {wrong[0]}")
    return records


def _round(
    server: Server, study: Study, place: Path, undisturbed: Path, minutes: float, seed: int, peace_s: float, say: Any
) -> dict[str, Any]:
    """Sweeps of one executor, disturbed until the minutes are over."""
    draw, tallies = random.Random(seed), []
    until = time.monotonic() + 60 * minutes
    # What a driver needs before its first unit must not eat its life.
    mean_s = 1.5 if study.executor == "here" else 20.0
    while not tallies or time.monotonic() < until:
        out = place / f"disturbed-{study.executor}-{len(tallies)}"
        tally = disturb(server, study, out, undisturbed, draw=draw, mean_s=mean_s, until=until)
        tallies.append(tally)
        say(f"{study.executor}: {tally.kills} kills, {tally.wall_s:.1f} s, {tally.wrong or 'the same bytes'}")
        shutil.rmtree(out)
    n_units = N_CHECKPOINTS * study.n_shards
    wrong = [fault for tally in tallies for fault in tally.wrong]
    total = {name: sum(getattr(tally, name) for tally in tallies) for name in
             ("kills_by_clock", "kills_at_files", "kills_of_workers", "resumes", "readings", "wall_s")}  # fmt: skip
    return {
        "executor": study.executor,
        "workers": study.workers,
        "sweeps": len(tallies),
        "units": n_units * len(tallies),
        **total,
        "torn": sum(len(tally.torn) for tally in tallies),
        "lost": sum(fault.endswith("is lost") for fault in wrong),
        "doubled": sum(fault.endswith(("is too many", "are doubled")) for fault in wrong),
        "other": sum(not fault.endswith(("is lost", "is too many", "are doubled")) for fault in wrong),
        "peace_s": peace_s * len(tallies),
        "faults": [fault for tally in tallies for fault in (*tally.torn, *tally.wrong)][:20],
    }


def render(measured: dict[str, Any]) -> str:
    """The records as a page of Markdown."""
    from benchmarks import machine

    doc = (__doc__ or "").split("\n\n")
    lines = [f"# {TITLE}", "", "Written by `make soak` from `soak.json`; a test holds this page to it.", ""]
    lines += [*doc[1].split("\n"), "", machine.line(measured), ""]
    heads = ["executor", "sweeps", "units", "drivers killed (by the clock, at a file)", "workers killed", "resumes",
             "parts read meanwhile", "torn", "units lost", "doubled", "other differences", "wall time",
             "in peace", "cost of a kill"]  # fmt: skip
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for record in measured["records"]:
        by_clock, at_files = record["kills_by_clock"], record["kills_at_files"]
        who = record["executor"] if record["workers"] == 1 else f"{record['executor']}, {record['workers']} workers"
        cells = [who, record["sweeps"], record["units"], f"{by_clock + at_files} ({by_clock}, {at_files})",
                 record["kills_of_workers"], record["resumes"], f"{record['readings']:,}", record["torn"],
                 record["lost"], record["doubled"], record["other"], f"{record['wall_s']:.0f} s",
                 f"{record['peace_s']:.0f} s",
                 f"{(record['wall_s'] - record['peace_s']) / max(1, by_clock + at_files):.1f} s"]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *CLOSING]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Soak, keep the records, render the page; exit code 1 if anything was torn, lost, doubled or different."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long sweeps are disturbed, default 10")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return
    from benchmarks import machine

    with tempfile.TemporaryDirectory() as place:
        records = soak(
            Path(place), minutes=options.minutes, seed=options.seed, say=lambda text: print(text, flush=True)
        )
    measured = machine.entry(records)
    RESULTS.write_text(json.dumps(measured, indent=2) + "\n")
    PAGE.write_text(render(measured))
    print(PAGE.read_text())
    if any(record[key] for record in records for key in ("torn", "lost", "doubled", "other")):
        sys.exit("soak: something was torn, lost, doubled or different; see faults in benchmarks/soak.json")


if __name__ == "__main__":
    main()
