"""The observer: the heads of a model while it trains, every so many steps, from a loop of one's own.

An observation asks the same few cases each time (`DEFAULT_GRID`, or a grid of one's own), scores every head as `lccp
score` does, and enters the result in a run folder as a checkpoint called `step-000400`: `lccp heads`, `lccp report` and
all else read it. The model is left as it was found (`quiet.undisturbed`), so training goes on to the same weights, bit
for bit. What fails is told and noted, and kills nothing unless asked to.

Under DDP the ranks share the cases, under FSDP all ranks run all of them (`wrapped`); either way *every* rank calls the
observer, and the first one writes. An error on one rank is told by all. (But a rank that breaks off in the middle of a
sharded pass leaves the others waiting in it, as in training.)

It refuses to know trainers. Cost: a forward pass over the cases, of at most `chunk_tokens` tokens at a time, logged as
share of the time; beyond the budget the interval is stretched (`pace`).
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lccp_interp.capture.selfcheck import self_check
from lccp_interp.monitor.book import METRIC, MODE, SAME_LOSS_NATS, Book
from lccp_interp.monitor.pace import Pace
from lccp_interp.monitor.quiet import undisturbed
from lccp_interp.monitor.summary import Heads, Summary, heads_to_follow
from lccp_interp.monitor.wrapped import Ranks, TrainedModel, full_precision, trained_model
from lccp_interp.schema import Case, CaseResult, Checkpoint, LccpError
from lccp_interp.scoring.engine import score_cases
from lccp_interp.scoring.metrics import check_cases, select_metrics
from lccp_interp.store import Run
from lccp_interp.sweep import DEFAULT_METRICS
from lccp_interp.tasks.decoys import N_DECOYS
from lccp_interp.tasks.grids import CaseGrid
from lccp_interp.tasks.niah import NiahGrid

DEFAULT_GRID = NiahGrid(lengths=(1024, 4096), depths=(0, 33, 67, 100), samples=2)
"""Eight cases at each of two lengths: what the subsampling study affords.

`lccp budget` on the bundled trajectory (19 checkpoints, full curve 20 cases of 4,096 tokens; `make demo`) asks how well
a monitor of fewer cases follows the full curve. With 8 cases of 4,096 tokens the answer's loss does so with r = 0.99 at
the 5 % quantile over draws (detrended: 0.97), the number of retrieval heads with 0.81; 16 cases would give 0.99 and
0.87, 4 cases 0.98 and 0.73. Of 1,024 tokens 8 cases give 0.95 and 0.72. So 8 cases tell when the loss has levelled off;
the number of heads at a single observation is rough, and births and deaths ask for several agreeing observations
anyway. A second seed (data/second_seed) gives the same picture: 0.99 and 0.76. Eight is also the number of clusters
below which the intervals behind births and deaths are too narrow.
"""

CHUNK_TOKENS = 1024
"""Tokens per forward pass: less than a training step holds, and without what a backward pass would need."""

GIVE_UP_AFTER = 3
"""Failures in a row after which nothing more is tried."""

ON_ERROR = ("warn", "raise")

log = logging.getLogger(__name__)


class HeadObserver:
    """Observes the heads of a model in training, into a run folder.

    Example:
        >>> observer = HeadObserver("runs/monitor", tokenizer, every_steps=100)           # doctest: +SKIP
        >>> for step, batch in enumerate(batches, start=1):                               # doctest: +SKIP
        ...     train_one_step(model, batch)
        ...     my_logger.log(observer.after_step(model, step=step, tokens_seen=step * tokens_per_step))
    """

    def __init__(
        self,
        out: str | Path,
        tokenizer: Any = None,
        *,
        every_steps: int | None = None,
        every_tokens: int | None = None,
        grid: CaseGrid | None = None,
        metrics: Sequence[str] | Mapping[str, Any] = DEFAULT_METRICS,
        initial_heads: Heads | str | Path | None = None,
        budget: float | None = 0.01,
        stage: str = "train",
        chunk_tokens: int = CHUNK_TOKENS,
        check: bool = True,
        on_error: str = "warn",
        tell: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Observe nothing yet.

        Args:
            out: the run folder; a training that is resumed goes on in it.
            tokenizer: of the model.
            every_steps: steps between observations; 100 if neither this nor `every_tokens` is given.
            every_tokens: tokens between observations, instead of steps.
            grid: what to ask; None for `DEFAULT_GRID`, in the organism's language, which any tokenizer can read.
            metrics: head metrics, as in `score`; `retrieval` is among them in any case.
            initial_heads: heads whose mean score is followed: (layer, head) pairs, or a run whose base checkpoint's
                retrieval heads they are; None for those of the first observation.
            budget: share of the time that observing may take; beyond it the interval is stretched to a multiple. None
                observes as often as asked, at the same steps in every repetition.
            stage: of the training, for the run's table of checkpoints.
            chunk_tokens: tokens per forward pass, at least 1.
            check: whether the model has to prove once that its attention is captured rightly (not where it is sharded).
            on_error: `warn` tells and notes what goes wrong in an observation and lets training go on; `raise` raises.
            tell: receives sentences for people; None for Python's `logging`.
            clock: in seconds.

        Raises:
            LccpError: numbers out of range, an unknown metric, or a run for `initial_heads` that cannot be read.
        """
        if on_error not in ON_ERROR:
            raise LccpError(f"unknown on_error {on_error!r}; known: {', '.join(ON_ERROR)}")
        if chunk_tokens < 1:
            raise LccpError(f"chunk_tokens must be at least 1, got {chunk_tokens}; the usual number is {CHUNK_TOKENS}")
        if every_steps is None and every_tokens is None:
            every_steps = 100
        self.out = Path(out)
        self.tokenizer = tokenizer
        self.grid = DEFAULT_GRID if grid is None else grid
        self.pace = Pace(every_steps, every_tokens, budget, clock)
        self.on_error, self.stage, self.chunk_tokens = on_error, stage, chunk_tokens
        self._check, self._clock = check, clock
        self._tell = log.warning if tell is None else tell
        self._metrics = select_metrics(metrics)
        self._metrics = select_metrics([METRIC]) | self._metrics if METRIC not in self._metrics else self._metrics
        self._initial: Heads | None
        if isinstance(initial_heads, str | Path):
            self._initial = heads_to_follow(Run.open(initial_heads))
        else:
            self._initial = initial_heads
        self._cases: list[Case] | None = None
        self._book: Book | None = None
        self._ranks = Ranks()
        self._cache_fault = ""
        self._failures = self._failures_in_row = 0
        self.last: Summary | None = None
        """What the last observation showed; on the first rank only."""

    def begin(
        self, model: nn.Module, *, step: int = 0, tokens_seen: int = 0, path: str | Path | None = None
    ) -> dict[str, float]:
        """Open the run folder, and observe the model as it enters training if the folder holds no observation yet.

        `after_step` does this by itself, with the model as it is after its first step.

        Args:
            model: what is trained, with its wrappers.
            step: steps done so far.
            tokens_seen: tokens seen so far, all stages together.
            path: of the folder where this model's weights are saved, if they are.

        Returns:
            Numbers to log, as `observe`; empty where nothing was observed.

        Raises:
            LccpError: a mistake of set-up, whatever `on_error` says: no tokenizer, cases that cannot be built, a run
                folder that holds another study.
        """
        self._ranks = Ranks.here()
        fault = None
        try:
            self._set_up(model)
        except LccpError as error:
            if self._ranks.size == 1:
                raise
            fault = str(error)
        if faults := [each for each in self._ranks.gather(fault) if each]:
            raise LccpError(faults[0])
        self.pace.begin(step=step, tokens=tokens_seen)
        is_new = self._ranks.from_first(self._book is not None and not self._book.observed)
        return self.observe(model, step=step, tokens_seen=tokens_seen, path=path) if is_new else {}

    def after_step(
        self,
        model: nn.Module,
        *,
        step: int,
        tokens_seen: int,
        last_step: int | None = None,
        path: str | Path | None = None,
    ) -> dict[str, float]:
        """Observe the model if it is time to. Call it on every rank after every optimizer step.

        Args:
            model: what is trained, with its wrappers.
            step: optimizer steps done so far.
            tokens_seen: tokens seen so far, all stages together.
            last_step: at which training will end, if that is known; it is observed in any case.
            path: of the folder where this model's weights are saved, if they are.

        Returns:
            Numbers to log, as `observe`; empty where nothing was observed, and on all ranks but the first.
        """
        if self._cases is None:
            return self.begin(model, step=step, tokens_seen=tokens_seen, path=path)
        is_last = step == last_step and self.pace.last_step != step
        if not self.pace.passed(step, tokens_seen) and not is_last:
            return {}
        is_due = self._ranks.is_first and self._failures_in_row < GIVE_UP_AFTER
        if is_due and not is_last and not self.pace.affords(step):
            is_due = False
            if message := self.pace.held_back(step, last_step):
                self._tell(f"monitor: {message}")
        if not self._ranks.from_first(is_due):
            return {}
        return self.observe(model, step=step, tokens_seen=tokens_seen, path=path)

    def observe(
        self, model: nn.Module, *, step: int, tokens_seen: int, path: str | Path | None = None
    ) -> dict[str, float]:
        """Observe the model now. Arguments as in `after_step`.

        Returns:
            Numbers to log, keys as in `RetrievalHeadMonitor`; empty on all ranks but the first. After a failure only
            `lccp/failures`.

        Raises:
            Exception: what went wrong, with `on_error="raise"`.
        """
        if self._cases is None:
            raise LccpError("the observer has not begun; call begin(model) or after_step(model, ...) first")
        began, peak = self._clock(), _peak_bytes(model)
        name = f"step-{step:06d}"
        failure: Exception | None = None
        logs: dict[str, float] = {}
        try:
            results = self._gathered(model, name)
            if self._book is not None:
                place = Path(name) if path is None else Path(path)
                logs = self._keep(self._book, Checkpoint(name, place, tokens_seen, self.stage), results)
        except Exception as error:  # whatever a model, a device or a disk raises: training is worth more
            failure = error
        seconds = self._clock() - began
        self.pace.observed(step, tokens_seen, seconds=seconds)
        if failure is not None:
            return self._failed(name, step, tokens_seen, failure)
        self._failures_in_row = 0
        if self._book is None:
            return {}
        logs |= self._cost(seconds, _peak_bytes(model) - peak)
        if self.last is not None:
            self._book.note({"step": step, **self.last.record(), **_costs(logs)})
        return logs

    def _set_up(self, model: nn.Module) -> None:
        """Build the cases; on the first rank, open the run folder."""
        if self.tokenizer is None:
            raise LccpError("the monitor has no tokenizer; give it one: tokenizer=...")
        inner = trained_model(model, self.tokenizer, "training")
        cases = self.grid.build(self.tokenizer)
        check_cases(cases, self._metrics)
        _check_positions(inner, cases)
        if self._ranks.is_first:
            config = {
                **self.grid.config(),
                "mode": MODE,
                "metrics": list(self._metrics),
                "backend": "transformers",
                "dtype": inner.dtype,
                "tokenizer": f"{type(self.tokenizer).__name__} of {len(self.tokenizer)} tokens",
                "decoys": N_DECOYS,
                "observed": "in training",
            }
            self._book = Book(self.out, config, cases, self._initial)
        self._cases = cases

    def _gathered(self, model: nn.Module, name: str) -> list[CaseResult]:
        """The results of all cases, in their order; on the first rank only."""
        assert self._cases is not None
        results: list[CaseResult] = []
        error: Exception | None = None
        is_sharded = False
        try:
            trained = trained_model(model, self.tokenizer, name)
            is_sharded = trained.is_sharded
            own = self._cases if is_sharded else self._ranks.share(self._cases)
            with undisturbed(model, trained.model):
                self._prove(trained)
                trained = replace(trained, cache_fault=self._cache_fault)
                results = score_cases(
                    trained, own, self._metrics, batch_tokens=self.chunk_tokens, chunk_tokens=self.chunk_tokens
                )
        except Exception as caught:  # to be told to the other ranks, which wait
            error = caught
        if self._ranks.size == 1:
            if error is not None:
                raise error
            return results
        sent = [] if is_sharded and not self._ranks.is_first else results
        gathered = self._ranks.gather((sent, None if error is None else f"{type(error).__name__}: {error}"))
        for rank, (_, told) in enumerate(gathered):
            if told is not None:
                raise LccpError(f"rank {rank} of {self._ranks.size}: {told}") from error
        by_id = {result.case_id: result for part, _ in gathered for result in part}
        return [by_id[case.case_id] for case in self._cases]

    def _prove(self, trained: TrainedModel) -> None:
        """Have the model prove once that its attention is captured rightly."""
        if not self._check:
            return
        checked = None
        if not trained.is_sharded:
            with full_precision(trained.model):
                checked = self_check(trained)
            checked.require()
            self._cache_fault = "" if checked.shares_prefixes else checked.sharing
        self._check = False
        if self._book is not None:
            self._book.record(
                {
                    "started": datetime.now(UTC).isoformat(timespec="seconds"),
                    "device": str(trained.device),
                    "ranks": self._ranks.size,
                    "sharded": trained.is_sharded,
                    "chunk_tokens": self.chunk_tokens,
                    "self_check": "skipped (sharded model)" if checked is None else checked.as_record(),
                }
            )

    def _keep(self, book: Book, checkpoint: Checkpoint, results: Sequence[CaseResult]) -> dict[str, float]:
        """Enter an observation; where this step was observed before, see whether it is the same."""
        if checkpoint.name not in book.observed:
            self.last = book.keep(checkpoint, results)
            return self.last.logs()
        self.last = None
        difference = book.difference(checkpoint.name, results)
        if difference > SAME_LOSS_NATS:
            self._tell(
                f"monitor: {checkpoint.name} was observed before, with other weights (answer losses differ by up to "
                f"{difference:.3g} nats): training was taken back and went another way; the older observation stands "
                f"in {self.out}, so take another folder if that matters"
            )
        return {"lccp/difference_nats": difference}

    def _cost(self, seconds: float, peak_raised: int) -> dict[str, float]:
        costs = {
            "lccp/seconds": seconds,
            "lccp/cost_share": self.pace.cost_share,
            "lccp/peak_raised_mb": max(0, peak_raised) / 2**20,
            "lccp/failures": float(self._failures),
        }
        if self.pace.interval_steps is not None:
            costs["lccp/interval_steps"] = float(self.pace.interval_steps)
        return costs

    def _failed(self, name: str, step: int, tokens_seen: int, error: Exception) -> dict[str, float]:
        """Tell of a failure and count it; raises it if asked to."""
        if self.on_error == "raise":
            raise error
        self._failures += 1
        self._failures_in_row += 1
        if not self._ranks.is_first:
            return {}
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        over = self._failures_in_row >= GIVE_UP_AFTER
        more = f"; that was {GIVE_UP_AFTER} times in a row, so nothing more is tried" if over else ""
        self._tell(f"monitor: {name} could not be observed, training goes on ({text}){more}")
        if self._book is not None:
            try:
                self._book.note({"step": step, "tokens_seen": tokens_seen, "failed": text})
            except OSError as full:
                self._tell(f"monitor: nor could that be noted in {self.out} ({full.strerror})")
        return {"lccp/failures": float(self._failures)}


def _costs(logs: Mapping[str, float]) -> dict[str, float]:
    """The numbers on the observation itself, without their prefix."""
    names = ("seconds", "cost_share", "peak_raised_mb", "interval_steps")
    return {name: logs[f"lccp/{name}"] for name in names if f"lccp/{name}" in logs}


def _check_positions(model: TrainedModel, cases: Sequence[Case]) -> None:
    """Refuse cases beyond a model's positions: in training that is a mistake, not an experiment."""
    limit = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(case.length for case in cases)
    if isinstance(limit, int) and longest > limit:
        raise LccpError(
            f"the model is made for {limit} positions (max_position_embeddings), the monitor's cases ask for "
            f"{longest} tokens; give it shorter ones: grid=NiahGrid(lengths=({limit},), depths=(0, 33, 67, 100), "
            "samples=2)"
        )


def _peak_bytes(model: nn.Module) -> int:
    """The highest memory so far: of the model's GPU, or of this process."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # In kilobytes, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
