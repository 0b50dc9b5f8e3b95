"""The terminal: the app and its shared options, errors in one line, progress bars, results as tables, JSON or CSV.

It refuses to know any command. Importing it costs typer; rich is loaded when something is drawn.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lccp_interp.schema import LccpError

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
debugging = False


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
LengthsOption = Annotated[str, typer.Option(help="Total lengths in tokens.")]
DepthsOption = Annotated[str, typer.Option(help="Places of the needle, percent of the context.")]
SamplesOption = Annotated[int, typer.Option(min=1, help="Haystacks per needle.")]
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
        metavar="paper|wu|TEMPLATE",
        help=r"paper: '{context}\nQuestion: {question}\nAnswer:' (default; arXiv 2604.02650); wu: that of arXiv "
        r"2404.15574; or a template with {context} and {question}, \n for line breaks.",
    ),
]
TaskOption = Annotated[
    str,
    typer.Option(
        help="niah: needle in a haystack, by length and depth; interference: by distance to the question and text "
        "before the needle; longbio: facts of made-up biographies, by length and depth."
    ),
]
DistancesOption = Annotated[
    str, typer.Option(help="--task interference: tokens between needle and question, each exact.")
]
InterferencesOption = Annotated[
    str, typer.Option(help="--task interference: tokens of context before the needle, each exact.")
]
MetricsOption = Annotated[
    str, typer.Option(help="Head metrics; also known: qrscore, locos, dla, sink_mass, entropy, streaming.")
]
ChatOption = Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn `LccpError` and Ctrl-C into one line on standard error and exit code 2."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except LccpError as error:
            if debugging:
                raise
            print(f"lccp: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_INPUT) from None
        except KeyboardInterrupt:
            if debugging:
                raise
            print("lccp: interrupted; what is finished stays, the same command resumes", file=sys.stderr)
            raise typer.Exit(EXIT_INPUT) from None
        except BrokenPipeError:
            # `lccp heads ... | head` closes the pipe early; that is no mistake.
            sys.stderr.close()
            raise typer.Exit(0) from None
        except OSError as error:
            if debugging:
                raise
            print(f"lccp: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
            raise typer.Exit(EXIT_INPUT) from None

    return wrapper


def main() -> None:
    """Entry point of the `lccp` command; `--debug` may stand anywhere."""
    global debugging
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    # On a shared machine threads that spin while they wait starve each other; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    debugging = "--debug" in arguments
    app(args=[argument for argument in arguments if argument != "--debug"], prog_name="lccp")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Ours in one line; those of libraries are for programmers and are shown with --debug."""
    if category is UserWarning or debugging:
        print(f"lccp: warning: {message}", file=sys.stderr)


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


def items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise LccpError(f"{option} is empty; separate values by commas")
    return items


def number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise LccpError(f"{option}: {text!r} is no number; separate values by commas, like 0,25,50") from None


def print_records(records: Sequence[Mapping[str, Any]] | Mapping[str, Any], output_format: Format) -> None:
    """Print records; a number that is not finite is null in JSON, empty in CSV and a dash in a table."""
    records = _finite(records)
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


def _finite(value: Any) -> Any:
    """`value` with None for each NaN and infinity in it, however deep."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int) and name.startswith("tokens"):
        return f"{value:,}"
    return str(value)
