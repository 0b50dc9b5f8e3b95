"""The sweep: every checkpoint of a trajectory scored on the same cases, into a run folder, resumable at any point.

The unit of work is (checkpoint, shard of cases). Units whose parts exist are skipped, a checkpoint all of whose units
are done is not even loaded. The first model that is loaded has to prove that its attention is captured rightly before
anything is scored. This module joins the stages up to the store; it refuses to know what becomes of the tables. Cost:
one load per checkpoint, at most one prefill per case and checkpoint (generate mode: and the tokens it decodes).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lccp_interp.checkpoints import (
    checkpoint_hash,
    common_tokenizer,
    find_checkpoints,
    read_config,
    refuse_ambiguous,
)
from lccp_interp.schema import Case, CaseResult, Checkpoint, LccpError, Needle
from lccp_interp.store import Run, RunWriter, cases_from_frame, result_frames
from lccp_interp.tasks.decoys import N_DECOYS

if TYPE_CHECKING:
    from lccp_interp.capture.model import HookedModel
    from lccp_interp.scoring.metrics import HeadMetric
    from lccp_interp.tasks.grids import CaseGrid

CASES_PER_SHARD = 64
"""Cases per unit of work: what an interruption can cost at most."""

DEFAULT_METRICS = ("retrieval", "wu", "copy", "needle_mass")
MODES = ("teacher_forced", "generate")
SHARING = ("auto", "on", "off")

Progress = Callable[[int, int, str], None]
"""Told (tokens done, tokens in all, what is going on); tokens are what the time goes into."""


@dataclass(frozen=True)
class _Unit:
    checkpoint: Checkpoint
    shard: int
    cases: Sequence[Case]

    @property
    def n_tokens(self) -> int:
        return sum(case.length for case in self.cases)


@dataclass(frozen=True)
class Execution:
    """How the work is done; none of it changes what a study is, so a run may be resumed with another one.

    Attributes:
        device: `auto`, `cpu`, `cuda`, ...; see `load_model`.
        device_map: as in transformers, `auto` to spread the layers over all devices; None for one device.
        sharing: whether cases run along their prefix tree, `auto`, `on` or `off`; see `score_cases`.
        chunk_tokens: tokens per forward pass of a long prompt, at least 1.
        self_check: whether the first model has to prove that its attention is captured rightly.
    """

    device: str = "auto"
    device_map: str | None = None
    sharing: str = "auto"
    chunk_tokens: int = 4096
    self_check: bool = True

    def __post_init__(self) -> None:
        if self.sharing not in SHARING:
            raise LccpError(f"unknown sharing {self.sharing!r}; known: {', '.join(SHARING)}")
        if self.chunk_tokens < 1:
            raise LccpError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}; the usual number is 4096")


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
    execution = Execution(device, device_map, sharing, chunk_tokens, self_check)
    return score_grid(
        checkpoints,
        out,
        grid,
        metrics=metrics,
        mode=mode,
        backend=backend,
        dtype=dtype,
        execution=execution,
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
        execution: how the work is done; None for the defaults.
        progress: as in `score`.

    Returns:
        The run, opened for reading.

    Raises:
        LccpError: as in `score`.

    Example:
        >>> grid = InterferenceGrid(distances=(256,), interferences=(0, 1024))            # doctest: +SKIP
        >>> run = score_grid(bundled_trajectory(), "runs/interference", grid)            # doctest: +SKIP
    """
    from lccp_interp.capture.model import load_model, load_tokenizer, resolve
    from lccp_interp.capture.prefill import release_memory
    from lccp_interp.scoring.generate import MAX_NEW_TOKENS
    from lccp_interp.scoring.metrics import check_cases, select_metrics

    if mode not in MODES:
        raise LccpError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    execution = execution or Execution()
    _check_backend(backend, mode, execution)
    checkpoints = _resolve(checkpoints)
    chosen = select_metrics(metrics)
    report = progress or (lambda done, total, message: None)
    tokenizer_id = common_tokenizer(checkpoints)
    device, dtype = resolve(execution.device, dtype, checkpoints[0].path)
    report(0, 0, "building cases")
    cases = grid.build(load_tokenizer(checkpoints[0].path))
    check_cases(cases, chosen)
    longest = max(case.length for case in cases)
    for checkpoint in checkpoints:
        _check_lengths(checkpoint, longest, MAX_NEW_TOKENS if mode == "generate" else 0)
    _check_vocabulary(checkpoints, cases)
    config = {
        **grid.config(),
        "mode": mode,
        "metrics": list(chosen),
        "backend": backend,
        "dtype": dtype,
        "tokenizer": tokenizer_id,
        "decoys": N_DECOYS,
        "cases_per_shard": CASES_PER_SHARD,
    }
    writer = RunWriter(out, config, cases)
    writer.add_checkpoints(checkpoints)
    work = _Work(writer, cases, chosen, execution, report)
    work.plan(checkpoints)
    cache_fault: str | None = None
    for checkpoint in checkpoints:
        if not work.open_units(checkpoint):
            continue
        work.tell(checkpoint.name)
        model = load_model(checkpoint.path, device=device, dtype=dtype, device_map=execution.device_map)
        if cache_fault is None:
            cache_fault = _prove(model, writer, execution)
        work.do(replace(model, cache_fault=cache_fault), checkpoint)
        # Two checkpoints of a large model may not fit side by side.
        del model
        release_memory()
    work.tell("done", whole=True)
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
    cases = cases_from_frame(run.cases)
    writer = RunWriter(out, {**run.config, "change": change}, cases)
    writer.add_checkpoints([replace(checkpoint, hash=None)])
    report = progress or (lambda done, total, message: None)
    work = _Work(writer, cases, select_metrics(run.config["metrics"]), execution, report)
    work.plan([checkpoint])
    if work.open_units(checkpoint):
        fault = _prove(model, writer, execution)
        work.do(replace(model, cache_fault=fault), checkpoint)
    work.tell("done", whole=True)
    return Run.open(out)


def find_run_checkpoints(
    run: Run, names: Sequence[str] | None, folders: Sequence[str | Path] | None
) -> list[Checkpoint]:
    """Checkpoints of a run, found on disk, with the weights that the run knows.

    Args:
        run: an opened run.
        names: of the checkpoints asked for; None means all.
        folders: where the checkpoints are now, if not where run.json says: folders of checkpoints, matched by name.

    Raises:
        LccpError: a name that the run does not have, a checkpoint that is not there or has other weights, or several
            tokenizers.

    Example:
        >>> find_run_checkpoints(Run.open("runs/demo"), ["18-lccp-2.62M"], None)   # doctest: +SKIP
    """
    known = {row["name"]: row for row in run.checkpoints.iter_rows(named=True)}
    for name in names or ():
        if name not in known:
            raise LccpError(f"{run.path} has no checkpoint {name!r}; it has {', '.join(known)}")
    elsewhere: dict[str, Path] = {}
    if folders:
        # Folders that were moved out of their trajectory may not tell their tokens; the run does.
        places = [place for folder in map(Path, folders) for place in (folder, *folder.glob("*/"))]
        tokens = {name: row["tokens_seen"] for name, row in known.items() if name in {place.name for place in places}}
        elsewhere = {found.name: found.path for found in find_checkpoints(list(folders), tokens=tokens)}
    chosen = []
    for name, row in known.items():
        if names is not None and name not in names:
            continue
        path = elsewhere.get(name, Path(row["path"]))
        if not path.is_dir():
            raise LccpError(
                f"checkpoint {name!r} of {run.path} is no longer at {path}; say where it is with --checkpoints DIR"
            )
        if row["hash"] is not None and checkpoint_hash(path) != row["hash"]:
            raise LccpError(
                f"checkpoint {name!r} at {path} has other weights than those scored in {run.path} "
                f"({row['hash'][:12]}...); restore it, or score it into a new run"
            )
        chosen.append(Checkpoint(name, path, row["tokens_seen"], row["stage"], row["stage_tokens"], row["hash"]))
    if not chosen:
        raise LccpError(f"{run.path} has no checkpoints; score some first (`lccp score`)")
    common_tokenizer(chosen)
    return chosen


class _Work:
    """The units of a study, how far they are, and how one checkpoint's are done."""

    def __init__(
        self,
        writer: RunWriter,
        cases: Sequence[Case],
        metrics: dict[str, HeadMetric],
        execution: Execution,
        report: Progress,
    ) -> None:
        self._writer, self._metrics, self._execution, self._report = writer, metrics, execution, report
        self._mode, self._backend = str(writer.config["mode"]), str(writer.config["backend"])
        self._answers = {case.case_id: case.answer_ids for case in cases}
        self._shards = [cases[start : start + CASES_PER_SHARD] for start in range(0, len(cases), CASES_PER_SHARD)]
        self._done = self._total = 0

    def _units(self, checkpoint: Checkpoint) -> list[_Unit]:
        return [_Unit(checkpoint, index, shard) for index, shard in enumerate(self._shards)]

    def open_units(self, checkpoint: Checkpoint) -> list[_Unit]:
        """What is not done yet."""
        return [unit for unit in self._units(checkpoint) if not self._writer.is_done(checkpoint.name, unit.shard)]

    def plan(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Count the tokens of all units, and of those that are done."""
        for checkpoint in checkpoints:
            self._total += sum(unit.n_tokens for unit in self._units(checkpoint))
            self._done += sum(unit.n_tokens for unit in self._units(checkpoint))
            self._done -= sum(unit.n_tokens for unit in self.open_units(checkpoint))
        self.tell("resuming" if self._done else "starting")

    def tell(self, message: str, *, whole: bool = False) -> None:
        self._report(self._total if whole else self._done, self._total, message)

    def do(self, model: HookedModel, checkpoint: Checkpoint) -> None:
        """Score the open units of one checkpoint."""

        def advance(n_tokens: int) -> None:
            self._done += n_tokens
            self.tell(checkpoint.name)

        for unit in self.open_units(checkpoint):
            results = self._score(model, unit.cases, advance)
            scores, outcomes = result_frames(checkpoint, self._mode, results, self._answers)
            self._writer.append(checkpoint.name, unit.shard, scores=scores, outcomes=outcomes)

    def _score(self, model: HookedModel, cases: Sequence[Case], advance: Callable[[int], None]) -> list[CaseResult]:
        from lccp_interp.scoring.engine import score_cases
        from lccp_interp.scoring.generate import score_generated

        chunk_tokens = self._execution.chunk_tokens
        if self._mode == "generate":
            return score_generated(model, cases, self._metrics, chunk_tokens=chunk_tokens, on_tokens=advance)
        sharing: Any = self._execution.sharing
        return score_cases(
            model,
            cases,
            self._metrics,
            sharing=sharing,
            chunk_tokens=chunk_tokens,
            backend=self._backend,
            on_tokens=advance,
        )


def _check_backend(backend: str, mode: str, execution: Execution) -> None:
    """Refuse what other libraries do not do here."""
    from lccp_interp.capture.views import LIBRARIES, OWN, check_backend

    if check_backend(backend) == OWN:
        return
    if mode != "teacher_forced":
        raise LccpError(
            f"backend {backend!r} scores --mode teacher_forced only, got {mode!r}; use backend {OWN!r} for it"
        )
    if execution.sharing == "on":
        raise LccpError(f"{LIBRARIES[backend]} runs every prompt whole; leave out --sharing on, or use backend {OWN!r}")


def _prove(model: HookedModel, writer: RunWriter, execution: Execution) -> str:
    """Check the first model and put on record how the work is done; returns what keeps its prompts whole, if anything.

    One model speaks for the trajectory: its checkpoints differ in numbers, and broken numbers show as NaN.
    """
    from lccp_interp.capture.selfcheck import self_check

    checked = self_check(model) if execution.self_check else None
    if checked is not None:
        try:
            checked.require()
        except LccpError as error:
            raise LccpError(f"{error}; nothing was scored (--no-self-check scores it all the same)") from error
    writer.record_execution(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": str(model.device),
            "device_map": execution.device_map,
            "sharing": execution.sharing,
            "chunk_tokens": execution.chunk_tokens,
            "self_check": "skipped (--no-self-check)" if checked is None else checked.as_record(),
        }
    )
    return "" if checked is None or checked.shares_prefixes else checked.sharing


def _resolve(checkpoints: str | Path | Checkpoint | Sequence[str | Path | Checkpoint]) -> list[Checkpoint]:
    given = [checkpoints] if isinstance(checkpoints, (str, Path, Checkpoint)) else list(checkpoints)
    ready = [item for item in given if isinstance(item, Checkpoint)]
    if ready and len(ready) < len(given):
        raise LccpError("give either Checkpoint objects or paths, not both")
    if not ready:
        return find_checkpoints(list(map(str, given)))
    ready.sort(key=lambda checkpoint: (checkpoint.tokens_seen, checkpoint.name))
    refuse_ambiguous(ready)
    return ready


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = read_config(checkpoint.path)
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _check_lengths(checkpoint: Checkpoint, longest: int, written: int) -> None:
    """Refuse lengths beyond learned positions; warn where rotary positions let the model run on untrained ground."""
    config = _text_config(checkpoint)
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(limit, int) or longest + written <= limit:
        return
    if not any(key.startswith("rope") or key == "rotary_pct" for key in config):
        more = f", and {written} more may be written" if written else ""
        raise LccpError(
            f"checkpoint {checkpoint.name!r} has {limit} learned positions, the cases ask for {longest} tokens{more}; "
            f"ask for at most {limit - written}"
        )
    if longest <= limit:
        return
    warnings.warn(
        f"checkpoint {checkpoint.name!r} is made for {limit} positions (max_position_embeddings), {longest} tokens are "
        f"asked for; its scores there are extrapolation (RoPE: {_rope_setting(config)})",
        stacklevel=3,
    )


def _rope_setting(config: dict[str, Any]) -> str:
    """How a config sets its rotary positions, in the names of its own keys."""
    keys = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")
    return ", ".join(f"{key} {json.dumps(config[key])}" for key in keys if config.get(key) is not None) or "not set"


def _check_vocabulary(checkpoints: Sequence[Checkpoint], cases: Sequence[Case]) -> None:
    largest = max(max(*case.prompt_ids, *case.answer_ids) for case in cases)
    for checkpoint in checkpoints:
        size = _text_config(checkpoint).get("vocab_size")
        if isinstance(size, int) and largest >= size:
            raise LccpError(
                f"checkpoint {checkpoint.name!r} has {size} tokens in its vocabulary, its tokenizer gave token "
                f"{largest}; copy the tokenizer that belongs to it"
            )
