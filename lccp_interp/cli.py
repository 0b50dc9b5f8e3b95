"""The command line: `lccp demo | score | plan | check | heads | figures | report | organism train`.

Each command parses its options, calls one function of the package and prints what came back. It refuses to compute
anything itself. Results go to standard output (tables for people, JSON or CSV for scripts), progress and messages to
standard error. Exit codes: 0 done, 2 a mistake of input or an interruption (one line says what, where and what to do;
`--debug` shows the traceback). Heavy imports live inside the commands, so that `lccp --help` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from lccp_interp.capture.verdict import SelfCheck
    from lccp_interp.store import Run

app = typer.Typer(
    name="lccp",
    help="Retrieval heads across the checkpoints of long-context continual pre-training.",
    epilog="Start with `lccp demo`. Every command has --help; add --debug to any of them for tracebacks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
organism_app = typer.Typer(help="The small trained trajectory that ships with the project.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")

EXIT_INPUT = 2
_debug = False


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"
    csv = "csv"


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as `lccp score --out` made it.")]
LengthOption = Annotated[
    int | None, typer.Option(help="Context length in tokens at which heads are compared; default: the run's longest.")
]
FormatOption = Annotated[Format, typer.Option("--format", help="table for people, json or csv for scripts.")]
NeedlesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help='One {"needle", "question", "answer"} per line; default: the bundled language. '
        "The answer is part of the needle (the whole needle for the paper's form).",
    ),
]
HaystackOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE|DIR", help="Text file or folder of *.txt; default: the bundled language."),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEMPLATE",
        help=r"Template with {context} and {question}, \n for line breaks; default: the paper's "
        r"'{context}\nQuestion: {question}\nAnswer:'.",
    ),
]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn `LccpError` and Ctrl-C into one line on standard error and exit code 2."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except LccpError as error:
            if _debug:
                raise
            print(f"lccp: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_INPUT) from None
        except KeyboardInterrupt:
            if _debug:
                raise
            print("lccp: interrupted; what is finished stays, the same command resumes", file=sys.stderr)
            raise typer.Exit(EXIT_INPUT) from None
        except BrokenPipeError:
            # `lccp heads ... | head` closes the pipe early; that is no mistake.
            sys.stderr.close()
            raise typer.Exit(0) from None
        except OSError as error:
            if _debug:
                raise
            print(f"lccp: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
            raise typer.Exit(EXIT_INPUT) from None

    return wrapper


def main() -> None:
    """Entry point of the `lccp` command; `--debug` may stand anywhere."""
    global _debug
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    # On a shared machine threads that spin while they wait starve each other; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    _debug = "--debug" in arguments
    app(args=[argument for argument in arguments if argument != "--debug"], prog_name="lccp")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Ours in one line; those of libraries are for programmers and are shown with --debug."""
    if category is UserWarning or _debug:
        print(f"lccp: warning: {message}", file=sys.stderr)


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Run folder to write.")] = Path("runs/demo"),
    samples: Annotated[int, typer.Option(min=1, help="Needles (with a haystack each) per length and depth.")] = 4,
    length: Annotated[int, typer.Option(help="Context length in tokens at which heads are compared.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of needles and haystacks.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Score the bundled trajectory, draw the figures and write the report."""
    from lccp_interp.checkpoints import bundled_trajectory
    from lccp_interp.sweep import score as score_run

    checkpoints = bundled_trajectory()
    with progress_bar("scoring") as progress:
        run = score_run(checkpoints, out, samples=samples, seed=seed, device=device, progress=progress)
    _draw(run, out / "figures", length, ("pdf", "svg", "png"))
    path = _write_report(run, None, length)
    for heading, text in _findings(run, length):
        print(f"{heading}: {text}\n")
    print(f"report:  {path}\nfigures: {out / 'figures'}\ntables:  lccp heads {out} --length {length}")


@app.command()
@guarded
def score(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", help="Checkpoint folders, or folders of checkpoints.")
    ],
    out: Annotated[Path, typer.Option(help="Run folder to write, or to resume.")],
    lengths: Annotated[str, typer.Option(help="Total lengths in tokens.")] = "256,512,1024,2048,4096",
    depths: Annotated[str, typer.Option(help="Places of the needle, percent of the context.")] = "0,25,50,75,100",
    samples: Annotated[int, typer.Option(min=1, help="Haystacks per needle.")] = 4,
    needles: NeedlesOption = None,
    haystack: HaystackOption = None,
    prompt: PromptOption = None,
    metrics: Annotated[str, typer.Option(help="Head metrics.")] = "retrieval,wu,copy,needle_mass",
    mode: Annotated[
        str,
        typer.Option(
            help="teacher_forced: one pass over prompt and answer (arXiv 2604.02650); generate: greedy decoding, and "
            "only right answers count (arXiv 2404.15574)."
        ),
    ] = "teacher_forced",
    tokens: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COUNT", help="Tokens seen by a checkpoint, e.g. step100=1.2B; may be repeated."),
    ] = None,
    tokens_per_step: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Tokens per training step, where names only tell steps.")
    ] = None,
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
    output_format: FormatOption = Format.table,
) -> None:
    """Score every attention head of every checkpoint on needle-in-a-haystack prompts.

    Interrupt it at any time: finished units stay, and the same command resumes.
    """
    from lccp_interp.checkpoints import find_checkpoints, parse_count
    from lccp_interp.sweep import score as score_run
    from lccp_interp.tasks.haystack import read_haystack
    from lccp_interp.tasks.niah import read_needles

    found = find_checkpoints(
        checkpoints,
        tokens=_token_table(tokens or []),
        tokens_per_step=None if tokens_per_step is None else parse_count(tokens_per_step),
    )
    length_list = [parse_count(item) for item in _items(lengths, "--lengths")]
    depth_list = [_number(item, "--depths") for item in _items(depths, "--depths")]
    metric_list = _items(metrics, "--metrics")
    facts = None if needles is None else read_needles(needles)
    text = None if haystack is None else read_haystack(haystack)
    with progress_bar("scoring") as progress:
        run = score_run(
            found,
            out,
            lengths=length_list,
            depths=depth_list,
            samples=samples,
            needles=facts,
            haystack=text,
            prompt=None if prompt is None else prompt.replace("\\n", "\n"),
            metrics=metric_list,
            mode=mode,
            seed=seed,
            device=device,
            dtype=dtype,
            device_map=device_map,
            sharing=sharing,
            chunk_tokens=chunk_tokens,
            self_check=self_check,
            progress=progress,
        )
    _print_scored(run, out, [checkpoint.name for checkpoint in found], output_format)


@app.command()
@guarded
def plan(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...", help="Checkpoint folders, or folders of them; a config.json alone is enough."
        ),
    ],
    lengths: Annotated[str, typer.Option(help="Total lengths in tokens.")] = "256,512,1024,2048,4096",
    depths: Annotated[str, typer.Option(help="Places of the needle, percent of the context.")] = "0,25,50,75,100",
    samples: Annotated[int, typer.Option(min=1, help="Haystacks per needle.")] = 4,
    needles: NeedlesOption = None,
    haystack: HaystackOption = None,
    prompt: PromptOption = None,
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
        int | None, typer.Option(min=1, help="Attention rows read per prompt; default: tokens of the longest answer.")
    ] = None,
    sharing: Annotated[
        str, typer.Option(help="Run what prompts have in common once: auto (where it is cheaper), on, off.")
    ] = "auto",
    chunk_tokens: Annotated[int, typer.Option(help="Tokens per forward pass of a long prompt.")] = 4096,
    output_format: FormatOption = Format.table,
) -> None:
    """Say what a study runs and what memory it takes, before anything runs.

    KV cache and working memory are added up over a model that has shapes and no weights.
    """
    from lccp_interp.checkpoints import parse_count
    from lccp_interp.plan import find_configs, memory_here, parse_memory, plan_study, planning_tokenizer
    from lccp_interp.sweep import CASES_PER_SHARD, Execution
    from lccp_interp.tasks.haystack import read_haystack
    from lccp_interp.tasks.niah import PAPER_PROMPT, NiahGrid, read_needles

    configs = find_configs(checkpoints)
    grid = NiahGrid(
        lengths=tuple(parse_count(item) for item in _items(lengths, "--lengths")),
        depths=tuple(_number(item, "--depths") for item in _items(depths, "--depths")),
        samples=samples,
        needles=None if needles is None else read_needles(needles),
        haystack=None if haystack is None else read_haystack(haystack),
        prompt=PAPER_PROMPT if prompt is None else prompt.replace("\\n", "\n"),
        seed=seed,
    )
    execution = Execution(sharing=sharing, chunk_tokens=chunk_tokens)
    counter, notes = planning_tokenizer([folder for _, folder in configs], tokenizer)
    with progress_bar("planning") as progress:
        planned = plan_study(
            grid,
            counter,
            configs,
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
        _print_records(planned.as_record(), output_format)
    else:
        _print_records(planned.rows(), output_format)


@app.command()
@guarded
def check(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Checkpoint folders, folders of checkpoints, or hub ids; with --random also model types (llama).",
        ),
    ],
    random: Annotated[
        bool,
        typer.Option("--random", help="Read only config.json and make weights up: can its architecture be captured?"),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompt, and of random weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.")] = "auto",
    output_format: FormatOption = Format.table,
) -> None:
    """Prove on a short random prompt that a model's attention is captured rightly; exit code 2 if it is not.

    Rows sum to 1, equal the model's own eager attention, make the output, and the output feeds the logits.
    """
    from lccp_interp.capture.model import folder_name, load_model
    from lccp_interp.capture.selfcheck import random_model, self_check
    from lccp_interp.capture.verdict import finding_rows

    records: list[dict[str, Any]] = []
    for folder in _check_folders(checkpoints):
        record: dict[str, Any] = {"checkpoint": folder_name(folder), "passed": False, "error": None}
        records.append(record)
        try:
            if random:
                model = random_model(folder, seed=seed, device=device, dtype=dtype)
            else:
                model = load_model(folder, device=device, dtype=dtype)
            checked = self_check(model, seed=seed)
            record |= checked.as_record()
            if output_format is Format.table:
                _print_check(checked)
            checked.require()
        except LccpError as error:
            if _debug:
                raise
            record["error"] = str(error)
            print(f"lccp: {error}", file=sys.stderr, flush=True)
    if output_format is Format.json:
        _print_records(records, output_format)
    elif output_format is Format.csv:
        _print_records([row for record in records for row in finding_rows(record)], output_format)
    if n_failed := sum(not record["passed"] for record in records):
        if len(records) > 1:
            print(f"lccp: {n_failed} of {len(records)} checkpoints fail", file=sys.stderr)
        raise typer.Exit(EXIT_INPUT)


@app.command()
@guarded
def heads(
    run: RunArgument,
    metric: Annotated[str, typer.Option(help="Head metric.")] = "retrieval",
    length: LengthOption = None,
    checkpoint: Annotated[str | None, typer.Option(help="Only this checkpoint; 'last' for the last one.")] = None,
    top: Annotated[
        int | None, typer.Option(min=0, help="Only the best N; 0 for all. Default: 20 in a table, all in json and csv.")
    ] = None,
    output_format: FormatOption = Format.table,
) -> None:
    """List heads by score, best first, with bootstrap intervals."""
    from lccp_interp.dynamics.heads import head_records
    from lccp_interp.store import Run

    records = head_records(Run.open(run), metric=metric, length=length, checkpoint=checkpoint)
    if top is None:
        top = 20 if output_format is Format.table else 0
    shown = records[:top] if top else records
    _print_records(shown, output_format)
    if len(shown) < len(records) and output_format is Format.table:
        print(f"... and {len(records) - len(shown)} more (--top 0 shows all)", file=sys.stderr)


@app.command()
@guarded
def figures(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures; default: RUN/figures.")] = None,
    formats: Annotated[str, typer.Option(help="pdf, svg, png.")] = "pdf,svg,png",
    length: LengthOption = None,
) -> None:
    """Draw the paper's figures from a run."""
    from lccp_interp.store import Run

    chosen = _items(formats, "--formats")
    for item in chosen:
        if item not in ("pdf", "svg", "png"):
            raise LccpError(f"unknown figure format {item!r}; known: pdf, svg, png")
    for path in _draw(Run.open(run), out or run / "figures", length, tuple(chosen)):
        print(path)


@app.command()
@guarded
def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="HTML file; default: RUN/report.html.")] = None,
    length: LengthOption = None,
) -> None:
    """Write one self-contained HTML report: the findings in words, then figures and tables."""
    from lccp_interp.store import Run

    print(_write_report(Run.open(run), out, length))


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


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with tokens done, elapsed time and ETA on standard error; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=32),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int, message: str) -> None:
            bar.update(task, completed=done, total=total or None, description=f"{what} {message}")

        yield advance


def _findings(run: Run, length: int | None) -> Sequence[tuple[str, str]]:
    from lccp_interp.dynamics.tables import RunTables
    from lccp_interp.report import findings

    return [(finding.heading, finding.text) for finding in findings(RunTables(run, length))]


def _draw(run: Run, out: Path, length: int | None, formats: tuple[str, ...]) -> list[Path]:
    from lccp_interp.figures import draw_figures

    return draw_figures(run, out, formats=formats, length=length)


def _write_report(run: Run, out: Path | None, length: int | None) -> Path:
    from lccp_interp.report import write_report

    return write_report(run, out, length=length)


def _print_scored(run: Run, out: Path, names: Sequence[str], output_format: Format) -> None:
    cases = run.cases.height
    if output_format is Format.table:
        print(f"{out}: {len(names)} checkpoints x {cases} cases; next: lccp heads {out}; lccp report {out}")
    elif output_format is Format.json:
        _print_records({"run": str(out), "checkpoints": names, "cases": cases}, output_format)
    else:
        _print_records([{"run": str(out), "checkpoint": name, "cases": cases} for name in names], output_format)


def _check_folders(paths: Sequence[str]) -> list[str]:
    """Checkpoints as given, and those in the folders given; what is wrong with one is found on loading it."""
    found = []
    for path in map(Path, paths):
        inner = [] if (path / "config.json").is_file() or not path.is_dir() else sorted(path.glob("*/config.json"))
        if path.is_dir() and not inner and not (path / "config.json").is_file():
            raise LccpError(f"{path} holds no checkpoint: it has no config.json, nor has a folder in it")
        found += [str(file.parent) for file in inner] or [str(path)]
    return found


def _print_check(checked: SelfCheck) -> None:
    print(checked.summary())
    _print_records(checked.rows(), Format.table)
    how = "run once where they share a beginning" if checked.shares_prefixes else "run whole"
    print(f"prompts are {how}: {checked.sharing}\n", flush=True)


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise LccpError(f"{option} is empty; separate values by commas")
    return items


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise LccpError(f"{option}: {text!r} is no number; separate values by commas, like 0,25,50") from None


def _token_table(entries: Sequence[str]) -> dict[str, int]:
    from lccp_interp.checkpoints import parse_count

    table = {}
    for entry in entries:
        name, equals, count = entry.rpartition("=")
        if not equals:
            raise LccpError(f"--tokens {entry!r}: write NAME=COUNT, like step100=1.2B")
        table[name] = parse_count(count)
    return table


def _print_records(records: Sequence[Mapping[str, Any]] | Mapping[str, Any], output_format: Format) -> None:
    if output_format is Format.json:
        print(json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False))
        return
    assert not isinstance(records, Mapping)
    if output_format is Format.csv:
        import csv

        writer = csv.DictWriter(sys.stdout, fieldnames=list(records[0]) if records else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in records[0] if records else ():
        table.add_column(name, justify="left" if isinstance(records[0][name], str) else "right")
    for record in records:
        # Text, not markup: names come from folders and may hold brackets.
        table.add_row(*(Text(_cell(name, value)) for name, value in record.items()))
    # Into a pipe or a file nothing is cut to a terminal's width.
    Console(width=None if sys.stdout.isatty() else 250).print(table)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int) and name.startswith("tokens"):
        return f"{value:,}"
    return str(value)


if __name__ == "__main__":
    main()
