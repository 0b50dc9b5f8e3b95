"""How a sweep is carried out: device and prompts, and by whom. None of it changes what a study is.

It refuses to know studies, checkpoints and tables; other modules read it, it calls nothing and costs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lccp_interp.schema import LccpError

CASES_PER_SHARD = 64
"""Cases per unit of work: what an interruption can cost at most."""

DEFAULT_METRICS = ("retrieval", "wu", "copy", "needle_mass")
MODES = ("teacher_forced", "generate")
SHARING = ("auto", "on", "off")
EXECUTORS = ("here", "pool", "ray", "slurm")

Progress = Callable[[int, int, str], None]
"""Told (tokens done, tokens in all, what is going on); tokens are what the time goes into."""


@dataclass(frozen=True)
class Execution:
    """How the work is done; none of it changes what a study is, so a run may be resumed with another one.

    The tables have the same bytes whichever executor does the work and however many workers there are, as long as
    device, kind of processor and `threads` are the same: sums taken by another number of threads, or on another
    device, may differ in the last digits. What was used is on record in run.json.

    Attributes:
        device: `auto`, `cpu`, `cuda`, ...; see `load_model`. For workers `auto` is their GPUs, if they are given any.
        device_map: as in transformers, `auto` to spread the layers over all devices; None for one device, or for
            workers with several GPUs `auto`.
        sharing: whether cases run along their prefix tree, `auto`, `on` or `off`; see `score_cases`.
        chunk_tokens: tokens per forward pass of a long prompt, at least 1.
        self_check: whether the first model has to prove that its attention is captured rightly.
        executor: `here` (this process), `pool` (processes of this machine), `ray` (a Ray cluster), `slurm` (one job
            per checkpoint).
        workers: how many units are done at the same time, at least 1; for `slurm` the most jobs at the same time. None
            for 1, and for as many jobs as SLURM has room for.
        cpus_per_worker: processors each worker asks for; None for 1.
        gpus_per_worker: GPUs each worker gets; more than 1 spread the layers, less than 1 share a GPU. None for one
            where this machine (`pool`) has any, and for none elsewhere.
        threads: threads torch computes with in each worker; None for `cpus_per_worker`, and for torch's own choice
            `here`.
        ray_address: of the Ray cluster, `auto` for the one this machine belongs to; None for RAY_ADDRESS, or if that
            is not set, for Ray on this machine alone.
        slurm: parameters of the jobs, by their names in submitit (`partition`, `time` in minutes, `mem_gb`,
            `gpus_per_node`, ...). `cluster=local` runs the jobs on this machine instead.
        detach: whether to come back once the jobs are submitted (`slurm` only).
        trust_remote_code: whether modelling code that a checkpoint brings may be run.
        allow_pickle: whether weights may be read from pickle files.
        cache: folder for checkpoints that are downloaded; None for the usual one.
        disk_budget_bytes: what downloaded checkpoints may take on disk; None for no limit.

    Raises:
        LccpError: an unknown name, a number out of range, or an option of another executor.

    Example:
        >>> Execution(executor="pool", workers=2).workers
        2
    """

    device: str = "auto"
    device_map: str | None = None
    sharing: str = "auto"
    chunk_tokens: int = 4096
    self_check: bool = True
    executor: str = "here"
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    threads: int | None = None
    ray_address: str | None = None
    slurm: Mapping[str, Any] = field(default_factory=dict)
    detach: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    cache: str | Path | None = None
    disk_budget_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.sharing not in SHARING:
            raise LccpError(f"unknown sharing {self.sharing!r}; known: {', '.join(SHARING)}")
        if self.executor not in EXECUTORS:
            near = difflib.get_close_matches(self.executor, EXECUTORS, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise LccpError(f"unknown executor {self.executor!r}; known: {', '.join(EXECUTORS)}{meant}")
        if self.chunk_tokens < 1:
            raise LccpError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}; the usual number is 4096")
        for name in ("workers", "cpus_per_worker", "threads", "disk_budget_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LccpError(f"{name} must be at least 1, got {value}")
        gpus = self.gpus_per_worker
        if gpus is not None and (gpus < 0 or (gpus > 1 and gpus != int(gpus))):
            raise LccpError(f"gpus_per_worker must be a whole number, or a share of one GPU like 0.5; got {gpus:g}")
        self._refuse_options_of_others()

    @property
    def n_workers(self) -> int:
        """Workers to begin with."""
        return self.workers or 1

    def _refuse_options_of_others(self) -> None:
        local = self.executor == "here"
        for option, given, executors in (
            ("workers", self.n_workers > 1 and local, EXECUTORS[1:]),
            ("cpus_per_worker", self.cpus_per_worker is not None and local, EXECUTORS[1:]),
            ("gpus_per_worker", self.gpus_per_worker is not None and local, EXECUTORS[1:]),
            ("ray_address", self.ray_address is not None and self.executor != "ray", ("ray",)),
            ("slurm", bool(self.slurm) and self.executor != "slurm", ("slurm",)),
            ("detach", self.detach and self.executor != "slurm", ("slurm",)),
        ):
            if given:
                raise LccpError(
                    f"{option} is an option of executor {' or '.join(executors)}, got executor {self.executor!r}; "
                    f"add --executor {executors[0]}, or leave {option} out"
                )

    @property
    def n_threads(self) -> int | None:
        """Threads that torch computes with; None for its own choice."""
        if self.threads is not None or self.executor == "here":
            return self.threads
        return self.cpus_per_worker or 1
