"""The sweep: every checkpoint of a trajectory scored on the same cases, into a run folder, resumable at any point.

The unit of work is (checkpoint, shard of cases). Units whose parts exist are skipped, a checkpoint all of whose units
are done is not even loaded. The first model that is loaded has to prove that its attention is captured rightly before
anything is scored. This module joins the stages up to the store; it refuses to know what becomes of the tables. Cost:
one load per checkpoint (and worker that helps with it), at most one prefill per case and checkpoint (generate mode: and
the tokens it decodes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lccp_interp.checkpoints import common_tokenizer
from lccp_interp.schema import Case, Checkpoint, LccpError, Needle
from lccp_interp.store import Run, RunWriter, cases_from_frame, driving
from lccp_interp.sweep.checks import (
    check_backend,
    check_lengths,
    check_metrics,
    check_vocabulary,
    ordered,
    placed,
    with_gpus,
)
from lccp_interp.sweep.driver import Driver, Fleet
from lccp_interp.sweep.execution import CASES_PER_SHARD, DEFAULT_METRICS, MODES, Execution, Progress
from lccp_interp.sweep.here import Here
from lccp_interp.sweep.log import Ledger
from lccp_interp.sweep.schedule import Schedule, Unit
from lccp_interp.sweep.units import Study, Worker, shards_of
from lccp_interp.tasks.decoys import N_DECOYS

if TYPE_CHECKING:
    from lccp_interp.capture.model import HookedModel
    from lccp_interp.scoring.metrics import HeadMetric
    from lccp_interp.tasks.grids import CaseGrid


def score(
    checkpoints: str | Path | Checkpoint | Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    lengths: Sequence[int] = (256, 512, 1024, 2048, 4096),
    depths: Sequence[float] = (0, 25, 50, 75, 100),
    samples: int = 4,
    needles: Sequence[Needle] | None = None,
    haystack: str | None = None,
    prompt: str | None = None,
    chat: bool = False,
    metrics: Sequence[str] | Mapping[str, Any] = DEFAULT_METRICS,
    mode: str = "teacher_forced",
    backend: str = "transformers",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    sharing: str = "auto",
    chunk_tokens: int = 4096,
    self_check: bool = True,
    executor: str = "here",
    workers: int | None = None,
    cases_per_shard: int = CASES_PER_SHARD,
    progress: Progress | None = None,
) -> Run:
    """Score the heads of every checkpoint on one grid of needle-in-a-haystack cases (other tasks: `score_grid`).

    Args:
        checkpoints: folders of checkpoints (or of trajectories), or `Checkpoint`s.
        out: the run folder; if it holds this very study, what is missing is done and nothing twice.
        lengths: total lengths, tokens of prompt and answer together.
        depths: places of the needle, percent of the context, 0..100.
        samples: haystacks per needle; in the organism's language, needles and haystacks per length and depth.
        needles: facts to hide; None draws them from the organism's language.
        haystack: text to hide them in; None writes it in the organism's language.
        prompt: `paper`, `wu`, or a template with `{context}` and `{question}`; None for the paper's form.
        chat: whether prompts stand in the tokenizer's chat template.
        metrics: names out of `lccp_interp.scoring.metrics.METRICS`; or a mapping of names to functions of one's own or
            `HeadMetric`s.
        mode: `teacher_forced` (arXiv 2604.02650) or `generate` (arXiv 2404.15574: greedy decoding, ROUGE-1 gate).
        backend: whose attention is scored: `transformers` (our tap), `transformer_lens` or `nnsight`; part of the
            study. The latter two know one mode, `teacher_forced`, and run every prompt whole.
        seed: of needles, haystacks and their order.
        device: `auto`, `cpu`, `cuda`, ...; see `load_model`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`; see `load_model`.
        device_map: `auto` spreads the layers over all devices, and over memory and disk where they do not fit.
        sharing: whether prompts share their prefixes: `auto`, `on` or `off`; see `score_cases`.
        chunk_tokens: tokens per forward pass of a long prompt.
        self_check: whether the first model has to prove that its attention is captured rightly.
        executor: who does the work: `here`, `pool`, `ray` or `slurm`; more options: `Execution` and `score_grid`.
        workers: how many units are done at the same time; more than 1 needs another executor than `here`.
        cases_per_shard: cases per unit of work, at least 1; part of the study.
        progress: told (tokens done, tokens in all, message).

    Returns:
        The run, opened for reading.

    Raises:
        LccpError: any mistake of input; finished units stay and the same call resumes.

    Example:
        >>> run = score(bundled_trajectory(), "runs/mine", lengths=[256, 1024])          # doctest: +SKIP
    """
    from lccp_interp.tasks.niah import PAPER_PROMPT, NiahGrid

    grid = NiahGrid(
        lengths=tuple(lengths),
        depths=tuple(depths),
        samples=samples,
        needles=None if needles is None else tuple(needles),
        haystack=haystack,
        prompt=PAPER_PROMPT if prompt is None else prompt,
        seed=seed,
        chat=chat,
    )
    execution = Execution(device, device_map, sharing, chunk_tokens, self_check, executor, workers)
    return score_grid(
        checkpoints,
        out,
        grid,
        metrics=metrics,
        mode=mode,
        backend=backend,
        dtype=dtype,
        execution=execution,
        cases_per_shard=cases_per_shard,
        progress=progress,
    )


def score_grid(
    checkpoints: str | Path | Checkpoint | Sequence[str | Path | Checkpoint],
    out: str | Path,
    grid: CaseGrid,
    *,
    metrics: Sequence[str] | Mapping[str, Any] = DEFAULT_METRICS,
    mode: str = "teacher_forced",
    backend: str = "transformers",
    dtype: str = "auto",
    execution: Execution | None = None,
    cases_per_shard: int = CASES_PER_SHARD,
    progress: Progress | None = None,
) -> Run:
    """Score the heads of every checkpoint on the cases of any grid, such as `NiahGrid` or `InterferenceGrid`.

    Args:
        checkpoints: as in `score`.
        out: the run folder, as in `score`.
        grid: whatever is a `lccp_interp.tasks.grids.CaseGrid`.
        metrics: as in `score`.
        mode: as in `score`.
        backend: as in `score`.
        dtype: as in `score`.
        execution: how the work is done, and by whom; None for the defaults, in this process.
        cases_per_shard: cases per unit of work, at least 1; part of the study.
        progress: as in `score`.

    Returns:
        The run, opened for reading.

    Raises:
        LccpError: as in `score`.

    Example:
        >>> grid = InterferenceGrid(distances=(256,), interferences=(0, 1024))            # doctest: +SKIP
        >>> run = score_grid(bundled_trajectory(), "runs/interference", grid)            # doctest: +SKIP
    """
    from lccp_interp.capture.model import load_tokenizer
    from lccp_interp.scoring.generate import MAX_NEW_TOKENS
    from lccp_interp.scoring.metrics import check_cases, select_metrics

    if mode not in MODES:
        raise LccpError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if cases_per_shard < 1:
        raise LccpError(f"cases_per_shard must be at least 1, got {cases_per_shard}; the usual number is 64")
    execution = with_gpus(execution or Execution())
    check_backend(backend, mode, execution)
    checkpoints = ordered(checkpoints, execution)
    chosen = select_metrics(metrics)
    check_metrics(chosen, execution)
    report = progress or _silent
    tokenizer_id = common_tokenizer(checkpoints)
    device, dtype = placed(execution, dtype, checkpoints[0].path)
    report(0, 0, "building cases")
    cases = grid.build(load_tokenizer(checkpoints[0].path, trust_remote_code=execution.trust_remote_code))
    check_cases(cases, chosen)
    longest = max(case.length for case in cases)
    for checkpoint in checkpoints:
        check_lengths(checkpoint, longest, MAX_NEW_TOKENS if mode == "generate" else 0)
    check_vocabulary(checkpoints, cases)
    config = {
        **grid.config(),
        "mode": mode,
        "metrics": list(chosen),
        "backend": backend,
        "dtype": dtype,
        "tokenizer": tokenizer_id,
        "decoys": N_DECOYS,
        "cases_per_shard": cases_per_shard,
    }
    with driving(Path(out)):
        writer = RunWriter(out, config, cases)
        writer.add_checkpoints(checkpoints)
        _carry_out(writer, cases, chosen, checkpoints, execution, device, report)
    return Run.open(out)


def score_like(
    run: Run,
    model: HookedModel,
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    change: str,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> Run:
    """Score a model that is loaded already on the very cases of another run, into a run folder of its own.

    For what was made of a checkpoint: fine-tuned, merged, pruned. `dynamics.paired_heads` compares the two runs.

    Args:
        run: whose cases, metrics and mode are used.
        model: what to score; its tokenizer must be that of the run.
        checkpoint: as which checkpoint it is entered, usually one of the run; its hash is not that of `model`.
        out: the run folder; checkpoints of one change may share it.
        change: what was done to the checkpoint; part of the study, so that changes never mix.
        execution: how the work is done (the model stays where it is); None for the defaults.
        progress: told (tokens done, tokens in all, message).

    Returns:
        The run at `out`, opened for reading.

    Raises:
        LccpError: `out` holds another study, or what scoring raises.

    Example:
        >>> score_like(run, tuned, checkpoint, "runs/demo/sft/heads", change="sft")   # doctest: +SKIP
    """
    from lccp_interp.scoring.metrics import select_metrics

    execution = execution or Execution()
    if execution.executor != "here":
        raise LccpError(
            f"a model that is loaded already is scored where it is, got executor {execution.executor!r}; leave it out"
        )
    cases = cases_from_frame(run.cases)
    with driving(Path(out)):
        writer = RunWriter(out, {**run.config, "change": change}, cases)
        writer.add_checkpoints([replace(checkpoint, hash=None)])
        metrics = select_metrics(run.config["metrics"])
        _carry_out(writer, cases, metrics, [checkpoint], execution, "", progress or _silent, model=model)
    return Run.open(out)


def _silent(done: int, total: int, message: str) -> None:
    """No progress is asked for."""


def _carry_out(
    writer: RunWriter,
    cases: Sequence[Case],
    metrics: dict[str, HeadMetric],
    checkpoints: Sequence[Checkpoint],
    execution: Execution,
    device: str,
    report: Progress,
    *,
    model: HookedModel | None = None,
) -> None:
    """Do the open units of a study, by whom `execution` says; `model` is the only checkpoint, loaded already."""
    shards = shards_of(cases, writer.config)
    lengths = [sum(case.length for case in shard) for shard in shards]
    units = [Unit(checkpoint.name, index) for checkpoint in checkpoints for index in range(len(shards))]
    done = {unit for unit in units if writer.is_done(unit.checkpoint, unit.shard)}
    ledger = Ledger(writer.path, {unit: lengths[unit.shard] for unit in units}, done, report)
    ledger.tell("resuming" if done else "starting")
    if ledger.n_open:
        todo: dict[str, list[int]] = {}
        for unit in units:
            if unit not in done:
                todo.setdefault(unit.checkpoint, []).append(unit.shard)
        # Workers may stand elsewhere than where a relative path begins.
        named = {one.name: replace(one, path=one.path.absolute()) for one in checkpoints}
        if execution.cache is not None:
            execution = replace(execution, cache=Path(execution.cache).absolute())
        ahead = tuple(checkpoint for name, checkpoint in named.items() if name in todo)
        study = Study(writer.path.absolute(), writer.manifest["config_hash"], execution, device, ahead)
        ledger.log(
            f"started: executor {execution.executor}, {execution.n_workers} workers, {len(todo)} checkpoints, "
            f"{ledger.state()}"
        )
        try:
            if execution.executor == "slurm":
                from lccp_interp.sweep.slurm import run_jobs

                failures = run_jobs(study, todo, named, ledger, writer)
            else:
                fleet = _fleet(study, writer, cases, metrics, checkpoints[0], model)
                failures = Driver(fleet, execution.n_workers, Schedule(todo), named, ledger, writer).run()
            _refuse_failures(failures, len(checkpoints))
        except BaseException as error:
            ledger.log(f"stopped: {error or type(error).__name__} ({ledger.state()})")
            raise
        if ledger.n_open:
            return  # submitted, and left to themselves
        ledger.log(f"finished ({ledger.state()})")
    ledger.tell("done", whole=True)


def _fleet(
    study: Study,
    writer: RunWriter,
    cases: Sequence[Case],
    metrics: dict[str, HeadMetric],
    checkpoint: Checkpoint,
    model: HookedModel | None,
) -> Fleet:
    if study.execution.executor == "pool":
        from lccp_interp.sweep.pool import Pool

        return Pool(study)
    if study.execution.executor == "ray":
        from lccp_interp.sweep.cluster import RayFleet

        return RayFleet(study)
    worker = Worker(study, writer, cases, metrics)
    if model is not None:
        worker.keep(checkpoint, model)
    return Here(worker)


def _refuse_failures(failures: Mapping[str, str], n_checkpoints: int) -> None:
    """One line about checkpoints that could not be scored; those that could are done."""
    if not failures:
        return
    named = [reason if name in reason else f"checkpoint {name!r}: {reason}" for name, reason in failures.items()]
    n_others = n_checkpoints - len(failures)
    others = f"; the other {n_others} of {n_checkpoints} checkpoints are done" if n_others else ""
    what = named[0] if len(named) == 1 else f"{len(named)} of {n_checkpoints} checkpoints failed: {' | '.join(named)}"
    raise LccpError(f"{what}{others}; finished units stay, the same command tries the rest again")
