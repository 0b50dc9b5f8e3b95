"""What a worker does, wherever it runs: open the run, load a checkpoint once, score its shards one after another.

A unit of work is (checkpoint, shard of cases); its part files are its only effect, so a unit may be done again, or by
somebody else, at any time. A worker reads what it needs from the run folder and knows nothing of other workers. Cost:
one load per checkpoint it is given, at most one prefill per case (generate mode: and the tokens it decodes).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lccp_interp.checkpoints import Depot
from lccp_interp.schema import Case, CaseResult, Checkpoint, LccpError
from lccp_interp.store import Run, RunWriter, cases_from_frame, result_frames
from lccp_interp.sweep.execution import Execution

if TYPE_CHECKING:
    from lccp_interp.capture.model import HookedModel
    from lccp_interp.scoring.metrics import HeadMetric


@dataclass(frozen=True)
class Study:
    """What a worker has to know to do units of a run; small, and sent to other processes as it is.

    Attributes:
        run: the run folder, absolute; all workers see it at this path.
        config_hash: of the run that is meant.
        execution: how the work is done.
        device: where the worker's models go.
        ahead: the checkpoints in the order in which they will be needed, so that the next can be fetched meanwhile.
    """

    run: Path
    config_hash: str
    execution: Execution
    device: str
    ahead: tuple[Checkpoint, ...] = ()

    def worker(self) -> Worker:
        """A worker for this study, opened where it is to work.

        Raises:
            LccpError: the run folder is not there, or is another run.
        """
        return Worker.open(self)


@dataclass(frozen=True)
class Task:
    """What a worker is asked to do: a shard of the cases; or to load the checkpoint and check it (`shard` None).

    `cache_fault` is what the check of the first model found against running prompts in pieces.
    """

    checkpoint: Checkpoint
    shard: int | None = None
    cache_fault: str = ""


@dataclass(frozen=True)
class Report:
    """What a worker says.

    Attributes:
        kind: `ready`; `tokens`, `note`, `warning`, then one of `proved`, `done`, `failed`, `refused` per task; `lost`
            is said of a worker by those who miss it.
        text: a note, a warning, what failed, or what a check found against running prompts in pieces.
        n_tokens: tokens done since the last report.
        seconds: that the task took, without loading.
        load_s: that loading took; None if the checkpoint was there.
        record: how the work is done, for run.json.
    """

    kind: str
    text: str = ""
    n_tokens: int = 0
    seconds: float = 0.0
    load_s: float | None = None
    record: dict[str, Any] | None = None


Tell = Callable[[Report], None]


def unheard(report: Report) -> None:
    """Nobody listens: how far the work is can be read from the parts."""


def shards_of(cases: Sequence[Case], config: dict[str, Any]) -> list[Sequence[Case]]:
    """The cases of a study, cut into its shards."""
    size = int(config["cases_per_shard"])
    return [cases[start : start + size] for start in range(0, len(cases), size)]


class Worker:
    """Does units of one study, one at a time."""

    def __init__(self, study: Study, writer: RunWriter, cases: Sequence[Case], metrics: dict[str, HeadMetric]) -> None:
        self._study, self._writer, self._metrics = study, writer, metrics
        self._mode, self._backend = str(writer.config["mode"]), str(writer.config["backend"])
        self._answers = {case.case_id: case.answer_ids for case in cases}
        self._shards = shards_of(cases, writer.config)
        self._holding = contextlib.ExitStack()
        self._loaded: tuple[str, HookedModel] | None = None
        self._tell: Tell = unheard
        self._thread = threading.get_ident()
        execution = study.execution
        self._depot = Depot(
            cache=execution.cache,
            budget_bytes=execution.disk_budget_bytes,
            allow_pickle=execution.allow_pickle,
            trust_remote_code=execution.trust_remote_code,
            note=self._note,
        )
        self._depot.expect(study.ahead)

    @classmethod
    def open(cls, study: Study) -> Worker:
        """A worker with nothing but the study: cases and names of metrics are read from the run folder.

        Raises:
            LccpError: the run folder is not there, or is another run.
        """
        from lccp_interp.scoring.metrics import select_metrics

        where = f"a worker on {os.uname().nodename}"
        try:
            run = Run.open(study.run)
        except LccpError as error:
            raise LccpError(
                f"{where} does not see the run folder ({error}); put it where all workers see it under the same path"
            ) from error
        if run.manifest["config_hash"] != study.config_hash:
            raise LccpError(
                f"{where} sees another run at {study.run}; put the run folder where all workers see the same files"
            )
        cases = cases_from_frame(run.cases)
        return cls(study, RunWriter(run.path, run.config, cases), cases, select_metrics(run.config["metrics"]))

    @staticmethod
    def ready() -> Report:
        """That this worker is there, and where."""
        return Report("ready", text=f"process {os.getpid()} on {os.uname().nodename}")

    def keep(self, checkpoint: Checkpoint, model: HookedModel) -> None:
        """Take over a model that is loaded already, as that checkpoint."""
        self._loaded = (checkpoint.name, model)

    def close(self) -> None:
        """Let go of the model, and fetch nothing any more."""
        self._unload()
        self._depot.close()

    def _unload(self) -> None:
        from lccp_interp.capture.prefill import release_memory

        # Two checkpoints of a large model may not fit side by side.
        self._loaded = None
        release_memory()
        self._holding.close()

    def _note(self, text: str) -> None:
        # Only this thread may speak; what is fetched ahead is nobody's news.
        if threading.get_ident() == self._thread:
            self._tell(Report("note", text=text))

    def do(self, task: Task, tell: Tell) -> Report:
        """Do one task; what the person at the keyboard can mend is reported, anything else is raised."""
        self._tell, self._thread = tell, threading.get_ident()
        with _threads(self._study.execution.n_threads):
            return self._do(task, tell)

    def _do(self, task: Task, tell: Tell) -> Report:
        name, shard = task.checkpoint.name, task.shard
        # A worker that was lost may have finished its unit with its last breath.
        if shard is not None and self._writer.is_done(name, shard):
            return Report("done", text="was there")
        try:
            load_s = self._load(task.checkpoint)
        except LccpError as error:
            return Report("failed", text=str(error))
        assert self._loaded is not None
        model = self._loaded[1]
        start = time.perf_counter()
        if shard is None:
            return replace(self._prove(model), seconds=time.perf_counter() - start, load_s=load_s)
        try:
            results = self._score(replace(model, cache_fault=task.cache_fault), self._shards[shard], tell)
            scores, outcomes = result_frames(task.checkpoint, self._mode, results, self._answers)
            self._writer.append(name, shard, scores=scores, outcomes=outcomes)
        except LccpError as error:
            return Report("failed", text=f"shard {shard}: {error}")
        return Report("done", seconds=time.perf_counter() - start, load_s=load_s)

    def _load(self, checkpoint: Checkpoint) -> float | None:
        """Have the checkpoint in memory; returns the seconds it took, None if it was there."""
        from lccp_interp.capture.model import load_model

        if self._loaded is not None and self._loaded[0] == checkpoint.name:
            return None
        self._unload()
        execution, start = self._study.execution, time.perf_counter()
        device_map = execution.device_map or ("auto" if (execution.gpus_per_worker or 0) > 1 else None)
        with contextlib.ExitStack() as holding:
            local = holding.enter_context(self._depot.hold(checkpoint))
            model = load_model(
                local.path,
                device=self._study.device,
                dtype=str(self._writer.config["dtype"]),
                device_map=device_map,
                trust_remote_code=execution.trust_remote_code,
                allow_pickle=execution.allow_pickle,
            )
            if device_map is not None:
                # Layers that do not fit into memory are read from the folder at every pass.
                self._holding = holding.pop_all()
        self._loaded = (checkpoint.name, replace(model, name=checkpoint.name))
        return time.perf_counter() - start

    def _prove(self, model: HookedModel) -> Report:
        """Check the first model and say how the work is done.

        One model speaks for the trajectory: its checkpoints differ in numbers, and broken numbers show as NaN.
        """
        import torch

        from lccp_interp.capture.selfcheck import self_check

        execution = self._study.execution
        try:
            checked = self_check(model) if execution.self_check else None
            if checked is not None:
                checked.require()
        except LccpError as error:
            return Report("refused", text=f"{error}; nothing was scored (--no-self-check scores it all the same)")
        record = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "executor": execution.executor,
            "workers": execution.workers,
            "threads": torch.get_num_threads(),
            "device": str(model.device),
            "device_map": execution.device_map,
            "sharing": execution.sharing,
            "chunk_tokens": execution.chunk_tokens,
            "trust_remote_code": execution.trust_remote_code,
            "allow_pickle": execution.allow_pickle,
            "self_check": "skipped (--no-self-check)" if checked is None else checked.as_record(),
        }
        fault = "" if checked is None or checked.shares_prefixes else checked.sharing
        return Report("proved", text=fault, record=record)

    def _score(self, model: HookedModel, cases: Sequence[Case], tell: Tell) -> list[CaseResult]:
        from lccp_interp.scoring.engine import score_cases
        from lccp_interp.scoring.generate import score_generated

        def advance(n_tokens: int) -> None:
            tell(Report("tokens", n_tokens=n_tokens))

        chunk_tokens = self._study.execution.chunk_tokens
        if self._mode == "generate":
            return score_generated(model, cases, self._metrics, chunk_tokens=chunk_tokens, on_tokens=advance)
        sharing: Any = self._study.execution.sharing
        return score_cases(
            model,
            cases,
            self._metrics,
            sharing=sharing,
            chunk_tokens=chunk_tokens,
            backend=self._backend,
            on_tokens=advance,
        )


@contextlib.contextmanager
def _threads(n_threads: int | None) -> Iterator[None]:
    """Let torch compute with so many threads inside the block: sums are taken in another order by another number."""
    import torch

    before = torch.get_num_threads()
    if n_threads is None or n_threads == before:
        yield
        return
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
