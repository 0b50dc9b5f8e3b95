"""Watching a training from outside: every checkpoint folder is scored as soon as it is whole.

A folder is whole when its config, tokenizer and weights are there in full length, when none of its files has changed
for a while, and, where the Trainer wrote it (`training_args.bin`), when the `trainer_state.json` is there that it
writes last. What is not whole is looked at again; what stays broken is named once and the others go on; what is removed
before it could be scored (`save_total_limit`) is named, too. Scoring is a sweep's (`score_grid`): what is done is
skipped, so a watch may be ended and begun again at any time, and the run folder is an ordinary one.

This module knows folders; it refuses to know the training. Cost: a directory listing per look, one scoring per
checkpoint, on whatever device it is given: a training that needs all GPUs wants it on another machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lccp_interp.checkpoints import list_checkpoints, verify_folder
from lccp_interp.checkpoints.tokens import Counting
from lccp_interp.monitor.summary import Summary, summarise
from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import Run, driving
from lccp_interp.sweep import DEFAULT_METRICS, Execution, Progress, score_grid

if TYPE_CHECKING:
    from lccp_interp.tasks.grids import CaseGrid

UNFINISHED = ("tmp-", "tmp_", ".")
"""How names of folders begin that somebody is still writing (transformers and accelerate rename them when done)."""

STOPS = ("saturated",)

SETTLE_S = 5.0
"""Seconds for which the files of a folder must not have changed."""

TRAINER_PATIENCE_S = 600.0
"""A Trainer's folder without a trainer state that has not changed for so long was saved on its own and is whole."""

FAULT_PATIENCE_S = 60.0
"""A folder that is not whole is called broken when it has not changed for so long: a large shard takes its time."""

SCORED, BROKEN, VANISHED, UNDONE = "scored", "broken", "vanished", "unfinished"


@dataclass(frozen=True)
class Seen:
    """What became of one checkpoint folder.

    `kind` is `scored` (with its `summary`), `broken` or `unfinished` (with a `reason`), or `vanished`.
    """

    kind: str
    checkpoint: str
    summary: Summary | None = None
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        head = {"event": self.kind, "checkpoint": self.checkpoint}
        return head | (self.summary.record() if self.summary is not None else {"reason": self.reason})

    def line(self) -> str:
        """One line for people."""
        return self.summary.line() if self.summary is not None else f"{self.checkpoint}: {self.kind}: {self.reason}"


def watch(
    folder: str | Path,
    out: str | Path,
    grid: CaseGrid | None = None,
    *,
    tokens: Mapping[str, int] | None = None,
    tokens_per_step: int | None = None,
    metrics: Sequence[str] | Mapping[str, Any] = DEFAULT_METRICS,
    dtype: str = "auto",
    execution: Execution | None = None,
    every_s: float = 30.0,
    settle_s: float = SETTLE_S,
    once: bool = False,
    stop_when: str | None = None,
    tell: Callable[[Seen], None] | None = None,
    progress: Progress | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Seen]:
    """Score each checkpoint folder in `folder` as it is completed, until interrupted.

    Args:
        folder: where a training writes checkpoint folders.
        out: the run folder, as in `score`.
        grid: what to ask; None for the cases of the monitor (`lccp_interp.monitor.observe.DEFAULT_GRID`).
        tokens: tokens seen by a checkpoint's name; wins over what is found in its folder.
        tokens_per_step: where names and trainer states tell only steps.
        metrics, dtype: as in `score`.
        execution: how the work is done; None for the defaults.
        every_s: seconds between two looks.
        settle_s: seconds for which the files of a folder must not have changed.
        once: look once, score what is whole, and return.
        stop_when: `saturated` returns once the answer's loss at the longest length is; None never does.
        tell: told what became of each folder, once.
        progress: as in `score`.
        sleep: waits for so many seconds.

    Returns:
        What became of the folders, in the order in which it was found out.

    Raises:
        LccpError: `out` holds another study or is driven by another process, an unknown `stop_when`, numbers out of
            range, or, with `once`, no such folder.

    Example:
        >>> watch("ckpts", "runs/watch", tokens_per_step=2**20, once=True)   # doctest: +SKIP
    """
    if stop_when is not None and stop_when not in STOPS:
        raise LccpError(f"unknown stop_when {stop_when!r}; known: {', '.join(STOPS)}")
    if every_s <= 0 or settle_s < 0:
        raise LccpError(f"got every_s={every_s:g} and settle_s={settle_s:g}: expected above 0 and at least 0")
    folder, out = Path(folder), Path(out)
    if once and not folder.is_dir():
        raise LccpError(f"no folder at {folder}; give the one that the training writes its checkpoints into")
    if grid is None:
        from lccp_interp.monitor.observe import DEFAULT_GRID

        grid = DEFAULT_GRID
    _refuse_other_study(out, grid, metrics)
    counting = Counting(tokens=dict(tokens or {}), tokens_per_step=tokens_per_step)
    work = _Work(out, grid, metrics, dtype, execution or Execution(), counting, progress)
    found: list[Seen] = []

    def note(seen: Seen) -> None:
        found.append(seen)
        if tell is not None:
            tell(seen)

    looks = _Looks(folder, settle_s)
    with driving(out):
        while True:
            for path, fault in looks.settled(sleep if once else None):
                seen = Seen(BROKEN, path.name, reason=fault) if fault else work.score(path)
                note(seen)
                if stop_when is not None and seen.summary is not None and seen.summary.verdict == stop_when:
                    return found
            for name in looks.vanished():
                note(Seen(VANISHED, name, reason="it was removed before it could be scored"))
            if once:
                for name, reason in looks.unfinished():
                    note(Seen(UNDONE, name, reason=reason))
                return found
            sleep(every_s)


def _refuse_other_study(out: Path, grid: CaseGrid, metrics: Sequence[str] | Mapping[str, Any]) -> None:
    """A mistake of set-up, told before the first checkpoint instead of at each."""
    if not (out / "run.json").is_file():
        return
    held = Run.open(out).config
    asked = json.loads(json.dumps({**grid.config(), "metrics": list(metrics)}))
    for key, value in asked.items():
        if held.get(key) != value:
            raise LccpError(
                f"{out} holds another study: {key} there is {json.dumps(held.get(key))}, asked {json.dumps(value)}; "
                "choose another --out, or repeat the options it was made with"
            )


@dataclass
class _Work:
    """Scoring one folder after another into one run."""

    out: Path
    grid: CaseGrid
    metrics: Sequence[str] | Mapping[str, Any]
    dtype: str
    execution: Execution
    counting: Counting
    progress: Progress | None

    def score(self, path: Path) -> Seen:
        """Score one whole folder; a mistake in it is told, not raised."""
        try:
            run = score_grid(
                self._checkpoint(path),
                self.out,
                self.grid,
                metrics=self.metrics,
                dtype=self.dtype,
                execution=self.execution,
                progress=self.progress,
            )
            # One model speaks for the trajectory.
            self.execution = replace(self.execution, self_check=False)
            return Seen(SCORED, path.name, summary=summarise(run, path.name))
        except Exception as error:  # a half-removed folder raises whatever its reader does; the others go on
            if not (path / "config.json").is_file():
                return Seen(VANISHED, path.name, reason="it was removed while it was being scored")
            text = str(error) if isinstance(error, LccpError) else f"{type(error).__name__}: {error}"
            return Seen(BROKEN, path.name, reason=text.splitlines()[0])

    def _checkpoint(self, path: Path) -> Checkpoint:
        (one,) = list_checkpoints([path], counting=self.counting)
        if one.hash is None:
            raise LccpError(one.fault)
        if one.tokens_seen is None:
            raise LccpError(
                f"cannot tell how many tokens it has seen ({one.fault}); say it with --tokens {one.name}=1.2B, or "
                "--tokens-per-step N"
            )
        return Checkpoint(
            one.name, one.path, one.tokens_seen, one.stage, one.stage_tokens, one.hash, one.source, one.branch
        )


Signature = tuple[tuple[str, int, int], ...]
"""Name, bytes and time of change (ns) of every file in a folder."""


@dataclass
class _Looks:
    """What was seen of the folders so far, and which of them are whole."""

    folder: Path
    settle_s: float
    since: dict[str, tuple[Signature, float]] = field(default_factory=dict)
    told: dict[str, Signature] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def settled(self, sleep: Callable[[float], None] | None) -> list[tuple[Path, str]]:
        """Folders to be told of now, in the order of their last change: whole ones, and broken ones with their fault.

        Args:
            sleep: waits until young folders have settled; None leaves them for the next look.
        """
        self._look()
        if sleep is not None and any(not self._is_quiet(name, self.settle_s) for name in self.since):
            sleep(self.settle_s)
            self._look()
        ready = []
        for name, (signature, _) in sorted(self.since.items(), key=lambda item: (_newest(item[1][0]), item[0])):
            if self.told.get(name) == signature:
                continue
            path = self.folder / name
            self.reasons[name] = reason = self._unfinished(path, name)
            if reason:
                continue
            fault = _fault(path)
            if fault and not self._is_quiet(name, max(self.settle_s, FAULT_PATIENCE_S)):
                self.reasons[name] = fault
                continue
            self.told[name] = signature
            ready.append((path, fault))
        return ready

    def vanished(self) -> list[str]:
        """Folders that are gone and were never told of; each once."""
        gone = [name for name in self.since if not (self.folder / name).is_dir()]
        for name in gone:
            del self.since[name]
            self.reasons.pop(name, None)
        return [name for name in gone if self.told.pop(name, None) is None]

    def unfinished(self) -> list[tuple[str, str]]:
        """Folders that are not whole yet, and why."""
        return [(name, reason) for name, reason in self.reasons.items() if reason]

    def _look(self) -> None:
        now = time.monotonic()
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith(UNFINISHED) or not path.is_dir():
                continue
            signature = _signature(path)
            if not any(name == "config.json" or name.endswith(".safetensors") for name, _, _ in signature):
                continue
            known = self.since.get(path.name)
            if known is None or known[0] != signature:
                self.since[path.name] = signature, now

    def _is_quiet(self, name: str, seconds: float) -> bool:
        """Whether nothing has changed for so long, by what was seen or by the files' own times."""
        signature, since = self.since[name]
        return time.monotonic() - since >= seconds or time.time() - _newest(signature) >= seconds

    def _unfinished(self, path: Path, name: str) -> str:
        """Why a folder is still being written, as far as one can tell; empty if it is not."""
        if not self._is_quiet(name, self.settle_s):
            return "its files have only just changed"
        is_trainers = (path / "training_args.bin").is_file() and not _is_json(path / "trainer_state.json")
        if is_trainers and not self._is_quiet(name, TRAINER_PATIENCE_S):
            return "the Trainer has not written its trainer_state.json yet"
        return ""


def _signature(path: Path) -> Signature:
    files = []
    try:
        for file in path.iterdir():
            if file.is_file():
                status = file.stat()
                files.append((file.name, status.st_size, status.st_mtime_ns))
    except FileNotFoundError:
        # It is being removed; what is gone is found out elsewhere.
        pass
    return tuple(sorted(files))


def _newest(signature: Signature) -> float:
    """Time of the last change in seconds."""
    return max((changed for _, _, changed in signature), default=0) / 1e9


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _fault(path: Path) -> str:
    """What is wrong with a folder that has settled; empty if nothing is."""
    try:
        verify_folder(path)
    except LccpError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return ""
