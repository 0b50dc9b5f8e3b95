"""The command that looks after a run folder: `verify`.

It parses its options, calls one function of the package and prints what came back; it refuses to compute anything.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from typing import Annotated

import typer

from lccp_interp.cli.terminal import EXIT_INPUT, Format, FormatOption, RunArgument, app, guarded, print_records


@app.command()
@guarded
def verify(
    run: RunArgument,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Remove what is damaged or left; the command that made it then makes it again."),
    ] = False,
    output_format: FormatOption = Format.table,
) -> None:
    """Read every file of a run to its last row; the table shows those that are not whole, json and csv all."""
    from lccp_interp import store

    findings = store.repair(run) if repair else store.verify(run)
    unsound = [finding for finding in findings if not finding.is_good]
    shown = findings
    if output_format is Format.table:
        shown = [finding for finding in findings if finding.why]
    if shown or output_format is not Format.table:
        print_records([asdict(finding) for finding in shown], output_format)
    counts = Counter(finding.state for finding in findings)
    told = ", ".join(f"{counts[state]} {state}" for state in store.STATES if counts[state])
    print(f"{run}: {len(findings)} files: {told}", file=sys.stderr)
    if removed := sorted({finding.again for finding in findings if finding.state == store.REMOVED and finding.again}):
        print(f"what was removed is made again by the command that made it: {', '.join(removed)}", file=sys.stderr)
    if unsound:
        advice = "`lccp verify RUN --repair` removes what is damaged or left" if not repair else "mend run.json"
        print(f"lccp: {len(unsound)} of {len(findings)} files are not whole; {advice}", file=sys.stderr)
        raise typer.Exit(EXIT_INPUT)
