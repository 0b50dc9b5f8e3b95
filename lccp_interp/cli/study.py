"""Commands over whole studies: `run`, `init`, `status`.

Each parses its options, calls one function of the package and prints what came back; it refuses to compute anything.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from lccp_interp.cli.sources import PickleOption, TrustOption
from lccp_interp.cli.terminal import Format, FormatOption, RunArgument, app, guarded, print_records, progress_bar
from lccp_interp.schema import LccpError


@app.command()
@guarded
def run(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY.yaml", help="Study file; `lccp init` writes a commented one.")
    ],
    out: Annotated[Path | None, typer.Option(help="Run folder, instead of the study's own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
    output_format: FormatOption = Format.table,
) -> None:
    """Do everything that a study file asks for and that is not done yet: scores, probes, ablations, figures, report.

    Interrupt it at any time: finished units stay, and the same command goes on.
    """
    from lccp_interp.study import planned_stages, read_study, run_status, run_study

    read = read_study(study, out=out)
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    if dry_run:
        planned = planned_stages(read, **trust)
        records: list[dict[str, Any]] = [{"stage": name, "does": what} for name, what in planned]
        print_records(records, output_format)
        return

    def note(text: str) -> None:
        print(f"lccp: {text}", file=sys.stderr)

    done = run_study(read, bar=progress_bar, note=note, **trust)
    _print_status(run_status(done.path), output_format)
    if read.report and output_format is Format.table:
        print(f"report: {done.path / 'report.html'}")


@app.command()
@guarded
def init(
    path: Annotated[Path, typer.Argument(metavar="[STUDY.yaml]", help="File to write.")] = Path("study.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a commented study file, which runs as it is on the bundled trajectory."""
    from lccp_interp.study.template import TEMPLATE

    if path.exists() and not force:
        raise LccpError(f"{path} is there already; choose another name, or write over it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEMPLATE, encoding="utf-8")
    print(f"{path}: edit it, then lccp run {path}")


@app.command()
@guarded
def status(run: RunArgument, output_format: FormatOption = Format.table) -> None:
    """Say how far a run is, who is at work on it, and when it may be done."""
    from lccp_interp.study import run_status

    _print_status(run_status(run), output_format)


def _print_status(found: dict[str, Any], output_format: Format) -> None:
    if output_format is Format.json:
        print_records(found, output_format)
        return
    rows = [
        {"task": task["task"], "folder": task["folder"] or ".", **checkpoint}
        for task in found["tasks"]
        for checkpoint in task["checkpoints"]
    ]
    if output_format is Format.csv:
        print_records(rows, output_format)
        return
    driver = found["driver"]
    at_work = "nobody is at work" if driver is None else f"process {driver['pid']} on {driver['host']} is at work"
    eta = "" if found["eta_s"] is None else f", about {timedelta(seconds=round(found['eta_s']))} to go"
    print(f"{found['run']}: {found['done']:.0%} scored, {at_work}{eta}")
    print_records(
        [
            {
                "task": task["task"],
                "folder": task["folder"] or ".",
                "checkpoints": len(task["checkpoints"]),
                "units done": f"{task['units_done']} of {task['units']}",
                "unfinished": _unfinished(task["checkpoints"]),
            }
            for task in found["tasks"]
        ],
        output_format,
    )
    if found["not_begun"]:
        print(f"not begun yet: {', '.join(found['not_begun'])}")
    for probe in found["probes"]:
        print(f"probe {probe['name']}: {probe['checkpoints']} checkpoints")
    if found["ablations"]:
        print(f"ablations: {', '.join(found['ablations'])}")
    for line in found["log"]:
        print(f"log: {line}")


def _unfinished(checkpoints: list[dict[str, Any]]) -> str:
    names = [one["name"] for one in checkpoints if one["units_done"] < one["units"]]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "-"
