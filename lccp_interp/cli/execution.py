"""Options that say by whom the work of a sweep is done, shared by the commands that start one.

It parses text into fields of `lccp_interp.sweep.Execution`, which refuses what does not go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lccp_interp.schema import LccpError

ExecutorOption = Annotated[
    str,
    typer.Option(
        help="Who does the work: here (this process), pool (processes of this machine), ray (a cluster), slurm (one "
        "job per checkpoint)."
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Units done at the same time, by as many workers; default: 1, with slurm as many as there is room for.",
    ),
]
CpusPerWorkerOption = Annotated[
    int | None, typer.Option(min=1, help="Processors, and threads, of each worker; default: 1.")
]
GpusPerWorkerOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="GPUs of each worker: several spread the layers, 0.5 lets two workers share one; default: one in a pool "
        "on a machine that has any, else none.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads torch computes with, per worker. Tables are the same to the last digit only where it is the "
        "same; default: --cpus-per-worker, and torch's own choice here.",
    ),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT|auto", help="Ray cluster to join; default: RAY_ADDRESS, or Ray on this machine alone."
    ),
]
SlurmOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Parameter of the jobs by submitit's name: partition=gpu, time=600 (minutes), mem_gb=64, account=...; "
        "cluster=local runs them on this machine; may be repeated.",
    ),
]
DetachOption = Annotated[
    bool, typer.Option("--detach", help="Come back once SLURM has the jobs; the same command without it waits.")
]


def worker_options(
    *,
    executor: str,
    workers: int | None,
    cpus_per_worker: int | None,
    gpus_per_worker: float | None,
    threads: int | None,
    ray_address: str | None,
    slurm: Sequence[str] | None,
    detach: bool,
) -> dict[str, Any]:
    """The options as fields of `Execution`.

    Raises:
        LccpError: an entry of `--slurm` that is no KEY=VALUE.

    Example:
        >>> given = dict(workers=1, cpus_per_worker=None, gpus_per_worker=None, threads=None, ray_address=None)
        >>> worker_options(executor="slurm", slurm=["partition=gpu", "time=90"], detach=False, **given)["slurm"]
        {'partition': 'gpu', 'time': 90}
    """
    return {
        "executor": executor,
        "workers": workers,
        "cpus_per_worker": cpus_per_worker,
        "gpus_per_worker": gpus_per_worker,
        "threads": threads,
        "ray_address": ray_address,
        "slurm": dict(_parameter(entry) for entry in slurm or ()),
        "detach": detach,
    }


def _parameter(entry: str) -> tuple[str, Any]:
    """A parameter of a job; what looks like a number is one."""
    key, equals, value = entry.partition("=")
    if not (key and equals):
        raise LccpError(f"--slurm {entry!r}: write KEY=VALUE, like partition=gpu or time=600")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value
