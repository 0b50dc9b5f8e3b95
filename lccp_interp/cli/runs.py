"""Commands that read a run folder and load no model: `heads`, `figures`, `report`.

Each parses its options, calls one function of the package and prints what came back; it refuses to compute anything.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lccp_interp.cli.terminal import Format, FormatOption, LengthOption, RunArgument, app, guarded, items, print_records
from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from lccp_interp.store import Run


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
    print_records(shown, output_format)
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

    chosen = items(formats, "--formats")
    for item in chosen:
        if item not in ("pdf", "svg", "png"):
            raise LccpError(f"unknown figure format {item!r}; known: pdf, svg, png")
    for path in draw(Run.open(run), out or run / "figures", length, tuple(chosen)):
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

    print(page_of(Run.open(run), out, length))


def findings_of(run: Run, length: int | None) -> Sequence[tuple[str, str]]:
    from lccp_interp.dynamics.tables import RunTables
    from lccp_interp.report import findings

    return [(finding.heading, finding.text) for finding in findings(RunTables(run, length))]


def draw(run: Run, out: Path, length: int | None, formats: tuple[str, ...]) -> list[Path]:
    from lccp_interp.figures import draw_figures

    return draw_figures(run, out, formats=formats, length=length)


def page_of(run: Run, out: Path | None, length: int | None) -> Path:
    from lccp_interp.report import write_report

    return write_report(run, out, length=length)
