"""Commands that load models: `demo`, `score`, `plan`, `check`, `organism train`.

Each parses its options, calls one function of the package and prints what came back; it refuses to compute anything.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lccp_interp.cli import terminal
from lccp_interp.cli.execution import (
    CpusPerWorkerOption,
    DetachOption,
    ExecutorOption,
    GpusPerWorkerOption,
    RayAddressOption,
    SlurmOption,
    ThreadsOption,
    WorkersOption,
    worker_options,
)
from lccp_interp.cli.sources import (
    BranchOption,
    CacheOption,
    DiskBudgetOption,
    PickleOption,
    RevisionsOption,
    SourcesArgument,
    StageBeforeOption,
    TokensOption,
    TokensPerStepOption,
    TrustOption,
    search_options,
)
from lccp_interp.cli.terminal import (
    EXIT_INPUT,
    ChatOption,
    DepthsOption,
    DistancesOption,
    Format,
    FormatOption,
    HaystackOption,
    InterferencesOption,
    LengthsOption,
    MetricsOption,
    NeedlesOption,
    PromptOption,
    SamplesOption,
    TaskOption,
    app,
    guarded,
    items,
    organism_app,
    print_records,
    progress_bar,
)
from lccp_interp.schema import Checkpoint, LccpError

if TYPE_CHECKING:
    from lccp_interp.capture.verdict import SelfCheck
    from lccp_interp.store import Run


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Run folder to write.")] = Path("runs/demo"),
    samples: Annotated[int, typer.Option(min=1, help="Needles (with a haystack each) per length and depth.")] = 4,
    length: Annotated[int, typer.Option(help="Context length in tokens at which heads are compared.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of needles and haystacks.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Head scores only; without interference, corpora, fine-tuning and removed heads."),
    ] = False,
) -> None:
    """Score and probe the bundled trajectory, draw the figures and write the report.

    Interrupt it at any time: what is finished stays, and the same command resumes.
    """
    from lccp_interp.cli.runs import findings_of
    from lccp_interp.demo import demo_study
    from lccp_interp.study import run_study

    def note(text: str) -> None:
        print(f"lccp: {text}", file=sys.stderr)

    study = demo_study(out, samples=samples, length=length, seed=seed, device=device, quick=quick)
    if not (quick or any(probe.probe == "ask" for probe in study.probes)):
        note("without fine-tuning: the packages trl, peft and datasets are missing (install lccp_interp[train])")
    run = run_study(study, bar=progress_bar, note=note)
    for heading, text in findings_of(run, length):
        print(f"{heading}: {text}\n")
    print(f"report:  {out / 'report.html'}\nfigures: {out / 'figures'}\ntables:  lccp heads {out} --length {length}")


@app.command()
@guarded
def score(
    context: typer.Context,
    checkpoints: SourcesArgument,
    out: Annotated[Path, typer.Option(help="Run folder to write, or to resume.")],
    task: TaskOption = "niah",
    lengths: LengthsOption = "256,512,1024,2048,4096",
    depths: DepthsOption = "0,25,50,75,100",
    distances: DistancesOption = "256,1024",
    interferences: InterferencesOption = "0,256,512,1024,2048",
    samples: SamplesOption = 4,
    needles: NeedlesOption = None,
    haystack: HaystackOption = None,
    prompt: PromptOption = None,
    chat: ChatOption = False,
    metrics: MetricsOption = "retrieval,wu,copy,needle_mass",
    mode: Annotated[
        str,
        typer.Option(
            help="teacher_forced: one pass over prompt and answer (arXiv 2604.02650); generate: greedy decoding, and "
            "only right answers count (arXiv 2404.15574)."
        ),
    ] = "teacher_forced",
    backend: Annotated[
        str, typer.Option(help="Whose attention is scored: transformers (our tap), transformer_lens, nnsight.")
    ] = "transformers",
    revisions: RevisionsOption = None,
    branch: BranchOption = None,
    tokens: TokensOption = None,
    tokens_per_step: TokensPerStepOption = None,
    stage_before: StageBeforeOption = None,
    cache: CacheOption = None,
    disk_budget: DiskBudgetOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
    seed: Annotated[int, typer.Option(help="Seed of needles, haystacks and where a sample begins.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="auto spreads the layers over all devices, then memory and disk.")
    ] = None,
    sharing: Annotated[
        str, typer.Option(help="Run what prompts have in common once: auto (where it is cheaper), on, off.")
    ] = "auto",
    chunk_tokens: Annotated[int, typer.Option(help="Tokens per forward pass of a long prompt.")] = 4096,
    self_check: Annotated[
        bool, typer.Option(help="Prove first that the model's attention is captured rightly (`lccp check`).")
    ] = True,
    executor: ExecutorOption = "here",
    workers: WorkersOption = 1,
    cpus_per_worker: CpusPerWorkerOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
    threads: ThreadsOption = None,
    ray_address: RayAddressOption = None,
    slurm: SlurmOption = None,
    detach: DetachOption = False,
    output_format: FormatOption = Format.table,
) -> None:
    """Score every attention head of every checkpoint on needle-in-a-haystack prompts.

    Interrupt it at any time: finished units stay, and the same command resumes.
    """
    from lccp_interp.checkpoints import find_checkpoints, parse_bytes
    from lccp_interp.cli.grids import GridOptions, grid_of
    from lccp_interp.study import run_status
    from lccp_interp.sweep import Execution, score_grid

    searched = search_options(
        revisions=revisions,
        branch=branch,
        tokens=tokens,
        tokens_per_step=tokens_per_step,
        stage_before=stage_before,
        cache=cache,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    found = find_checkpoints(checkpoints, **searched)
    options = GridOptions(
        lengths=lengths,
        depths=depths,
        distances=distances,
        interferences=interferences,
        samples=samples,
        needles=needles,
        haystack=haystack,
        prompt=prompt,
        chat=chat,
        seed=seed,
    )
    grid = grid_of(task, options, context)
    with progress_bar("scoring") as progress:
        run = score_grid(
            found,
            out,
            grid,
            metrics=items(metrics, "--metrics"),
            mode=mode,
            backend=backend,
            dtype=dtype,
            execution=Execution(
                device,
                device_map,
                sharing,
                chunk_tokens,
                self_check,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                cache=cache,
                disk_budget_bytes=parse_bytes(disk_budget),
                **worker_options(
                    executor=executor,
                    workers=workers,
                    cpus_per_worker=cpus_per_worker,
                    gpus_per_worker=gpus_per_worker,
                    threads=threads,
                    ray_address=ray_address,
                    slurm=slurm,
                    detach=detach,
                ),
            ),
            progress=progress,
        )
    if detach and run_status(out)["done"] < 1:
        print(
            f"lccp: SLURM has the jobs; `lccp status {out}` tells how far they are, and the same command without "
            "--detach waits for them",
            file=sys.stderr,
        )
        return
    _print_scored(run, out, [checkpoint.name for checkpoint in found], output_format)


@app.command()
@guarded
def plan(
    context: typer.Context,
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Checkpoint folders, or folders of them (a config.json alone is enough), or revisions on a hub.",
        ),
    ],
    task: TaskOption = "niah",
    lengths: LengthsOption = "256,512,1024,2048,4096",
    depths: DepthsOption = "0,25,50,75,100",
    distances: DistancesOption = "256,1024",
    interferences: InterferencesOption = "0,256,512,1024,2048",
    samples: SamplesOption = 4,
    needles: NeedlesOption = None,
    haystack: HaystackOption = None,
    prompt: PromptOption = None,
    chat: ChatOption = False,
    metrics: MetricsOption = "retrieval,wu,copy,needle_mass",
    seed: Annotated[int, typer.Option(help="Seed of needles, haystacks and where a sample begins.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (the config's own), float32, bfloat16, float16.")] = "auto",
    memory: Annotated[
        str | None,
        typer.Option(metavar="GIB|NxGIB", help="Memory of the devices: 80, 2x80; default: the GPUs of this machine."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Whose tokenizer counts; default: the checkpoints' own.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Attention rows read per prompt; default: what the metrics read.")
    ] = None,
    sharing: Annotated[
        str, typer.Option(help="Run what prompts have in common once: auto (where it is cheaper), on, off.")
    ] = "auto",
    chunk_tokens: Annotated[int, typer.Option(help="Tokens per forward pass of a long prompt.")] = 4096,
    cache: CacheOption = None,
    output_format: FormatOption = Format.table,
) -> None:
    """Say what a study runs and what memory it takes, before anything runs.

    KV cache and working memory are added up over a model that has shapes and no weights.
    """
    from lccp_interp.cli.grids import GridOptions, grid_of
    from lccp_interp.plan import memory_here, parse_memory, plan_study, planning_tokenizer
    from lccp_interp.sweep import CASES_PER_SHARD, Execution

    configs = _configs(checkpoints, cache)
    options = GridOptions(
        lengths=lengths,
        depths=depths,
        distances=distances,
        interferences=interferences,
        samples=samples,
        needles=needles,
        haystack=haystack,
        prompt=prompt,
        chat=chat,
        seed=seed,
    )
    grid = grid_of(task, options, context)
    execution = Execution(sharing=sharing, chunk_tokens=chunk_tokens)
    counter, notes = planning_tokenizer([folder for _, folder in configs], tokenizer)
    with progress_bar("planning") as progress:
        planned = plan_study(
            grid,
            counter,
            configs,
            metrics=items(metrics, "--metrics"),
            cases_per_shard=CASES_PER_SHARD,
            dtype=dtype,
            chunk_tokens=execution.chunk_tokens,
            sharing=execution.sharing,  # type: ignore[arg-type]  # checked by Execution
            n_rows=rows,
            memory=memory_here() if memory is None else parse_memory(memory),
            notes=notes,
            progress=progress,
        )
    if output_format is Format.table:
        print(planned.text())
    elif output_format is Format.json:
        print_records(planned.as_record(), output_format)
    else:
        print_records(planned.rows(), output_format)


@app.command()
@guarded
def check(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Checkpoint folders, folders of checkpoints, revisions on a hub (organisation/name@revision), or hub "
            "ids; with --random also model types (llama).",
        ),
    ],
    random: Annotated[
        bool,
        typer.Option("--random", help="Read only config.json and make weights up: can its architecture be captured?"),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompt, and of random weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.")] = "auto",
    cache: CacheOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
    output_format: FormatOption = Format.table,
) -> None:
    """Prove on a short random prompt that a model's attention is captured rightly; exit code 2 if it is not.

    Rows sum to 1, equal the model's own eager attention, make the output, and the output feeds the logits.
    """
    from lccp_interp.capture.model import folder_name, load_model
    from lccp_interp.capture.selfcheck import random_model, self_check
    from lccp_interp.capture.verdict import finding_rows
    from lccp_interp.checkpoints import Depot

    records: list[dict[str, Any]] = []
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    depot = Depot(cache=cache, **trust)
    for found in _check_folders(checkpoints, cache, trust):
        folder = found if isinstance(found, str) else str(found.path)
        name = folder_name(found) if isinstance(found, str) else found.name
        record: dict[str, Any] = {"checkpoint": name, "passed": False, "error": None}
        records.append(record)
        try:
            if random:
                model = random_model(folder, seed=seed, device=device, dtype=dtype)
            else:
                with contextlib.nullcontext() if isinstance(found, str) else depot.hold(found):
                    model = load_model(folder, device=device, dtype=dtype, **trust)
            checked = self_check(replace(model, name=name), seed=seed)
            record |= checked.as_record()
            if output_format is Format.table:
                _print_check(checked)
            checked.require()
        except LccpError as error:
            if terminal.debugging:
                raise
            record["error"] = str(error)
            print(f"lccp: {error}", file=sys.stderr, flush=True)
    if output_format is Format.json:
        print_records(records, output_format)
    elif output_format is Format.csv:
        print_records([row for record in records for row in finding_rows(record)], output_format)
    if n_failed := sum(not record["passed"] for record in records):
        if len(records) > 1:
            print(f"lccp: {n_failed} of {len(records)} checkpoints fail", file=sys.stderr)
        raise typer.Exit(EXIT_INPUT)


@organism_app.command("train")
@guarded
def organism_train(
    out: Annotated[Path, typer.Option(help="Folder for the trajectory; an unfinished one is resumed.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    size: Annotated[str, typer.Option(help="Size of the recipe; `small` is the bundled one.")] = "small",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; results are exact per seed and thread count.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Train the organism from scratch: short contexts first, then long-context continual pre-training."""
    from lccp_interp.organism.train import train

    with progress_bar("training") as progress:
        folder = train(out, seed=seed, size=size, threads=threads, device=device, progress=progress)
    print(folder)


def _print_scored(run: Run, out: Path, names: Sequence[str], output_format: Format) -> None:
    cases = run.cases.height
    if output_format is Format.table:
        # The tables over training are read at one length and depth grid, which other tasks do not have.
        more = f"; next: lccp heads {out}; lccp report {out}" if run.config["task"] == "niah" else ""
        print(f"{out}: {len(names)} checkpoints x {cases} cases{more}")
    elif output_format is Format.json:
        print_records({"run": str(out), "checkpoints": names, "cases": cases}, output_format)
    else:
        print_records([{"run": str(out), "checkpoint": name, "cases": cases} for name in names], output_format)


def _configs(sources: Sequence[str], cache: Path | None) -> list[tuple[str, Path]]:
    """Name and folder of every config; of revisions on a hub only that and the tokenizer are fetched."""
    from lccp_interp.checkpoints import list_checkpoints
    from lccp_interp.checkpoints.sources import split_source
    from lccp_interp.plan import find_configs

    local = [source for source in sources if split_source(source) is None]
    found = list_checkpoints([source for source in sources if source not in local], cache=cache)
    for one in found:
        if one.hash is None:
            raise LccpError(one.fault)
    return [(one.name, one.path) for one in found] + (find_configs(local) if local else [])


def _check_folders(sources: Sequence[str], cache: Path | None, trust: dict[str, Any]) -> list[str | Checkpoint]:
    """Checkpoints as given, and those in the folders given; what is wrong with one is found on loading it."""
    from lccp_interp.checkpoints import find_checkpoints
    from lccp_interp.checkpoints.sources import split_source

    found: list[str | Checkpoint] = []
    for source in sources:
        # Without a revision it is the hub client's business, as everywhere in transformers.
        if "@" in source and split_source(source) is not None:
            found += find_checkpoints([source], cache=cache, **trust)
            continue
        path = Path(source)
        inner = [] if (path / "config.json").is_file() or not path.is_dir() else sorted(path.glob("*/config.json"))
        if path.is_dir() and not inner and not (path / "config.json").is_file():
            raise LccpError(f"{path} holds no checkpoint: it has no config.json, nor has a folder in it")
        found += [str(file.parent) for file in inner] or [str(path)]
    return found


def _print_check(checked: SelfCheck) -> None:
    print(checked.summary())
    print_records(checked.rows(), Format.table)
    how = "run once where they share a beginning" if checked.shares_prefixes else "run whole"
    print(f"prompts are {how}: {checked.sharing}\n", flush=True)
