"""The command that removes heads and looks at what is left of retrieval: `ablate`.

It parses its options, calls one function of the package and prints what came back; it refuses to compute anything.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lccp_interp.cli.terminal import Format, FormatOption, RunArgument, app, guarded, items, print_records, progress_bar
from lccp_interp.schema import LccpError

SHOWN = (
    "checkpoint",
    "set",
    "k",
    "heads",
    "outcome",
    "intact",
    "removed",
    "random",
    "beyond",
    "beyond_low",
    "beyond_high",
)


@app.command()
@guarded
def ablate(
    run: RunArgument,
    heads: Annotated[
        str | None,
        typer.Option(metavar="2-2,3-3", help="layer-head, best first; default: each checkpoint's own best."),
    ] = None,
    k: Annotated[
        str | None, typer.Option("--k", "--top", help="How many of the best are removed together; default: 1,2,3,5,10.")
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Remove heads one at a time, from when on is each needed?")
    ] = False,
    draws: Annotated[int, typer.Option(min=1, help="Random sets of other heads in the same layers, per set.")] = 10,
    kind: Annotated[
        str,
        typer.Option(
            help="What a removed head puts out: zero, mean, resample (another case's), or blind (it alone does not see "
            "the needle)."
        ),
    ] = "zero",
    length: Annotated[int | None, typer.Option(help="Of the run's cases, in tokens; default: its longest.")] = None,
    cases: Annotated[int, typer.Option(min=1, help="At most so many of them.")] = 20,
    metric: Annotated[str, typer.Option(help="Whose scores say which heads are best.")] = "retrieval",
    only: Annotated[
        str, typer.Option("--only", metavar="all|last|NAMES", help="Checkpoints, separated by commas.")
    ] = "last",
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Where the checkpoints are now, if they were moved; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random sets.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.")] = "auto",
    output_format: FormatOption = Format.table,
) -> None:
    """Remove the best retrieval heads, and as many random ones: does retrieval go with the former only?

    Interrupt it at any time: finished checkpoints stay, and the same command resumes. Answers stay in RUN/ablations.
    """
    from lccp_interp.dynamics.causal import causal_table, important_from
    from lccp_interp.interventions.causal import ablate_heads
    from lccp_interp.interventions.heads import parse_heads
    from lccp_interp.store import Run

    names = only if only in ("all", "last") else items(only, "--only")
    with progress_bar("ablating") as progress:
        rows = ablate_heads(
            run,
            heads=None if heads is None else parse_heads(heads),
            k=None if k is None else [_size(item) for item in items(k, "--k")],
            n_draws=draws,
            kind=kind,
            each=each,
            length=length,
            n_cases=cases,
            metric=metric,
            checkpoints=names,
            folders=checkpoints,
            seed=seed,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    whole = causal_table(Run.open(run), rows["study"][0])
    table = whole.filter(whole["checkpoint"].is_in(rows["checkpoint"].unique().to_list()))
    if output_format is not Format.table:
        print_records(table.to_dicts(), output_format)
        return
    print_records(table.filter(table["outcome"] != "answer_ppl").select(SHOWN).to_dicts(), output_format)
    for outcome in ("greedy_exact", "loss_nats"):
        for row in important_from(table, outcome=outcome).to_dicts():
            print(_sentence(row), file=sys.stderr)


def _sentence(row: Mapping[str, Any]) -> str:
    what = f"without head {row['heads']}" if row["set"] == "single" else f"without the best {row['k']}"
    harm = "more exact answers lost" if row["outcome"] == "greedy_exact" else "a greater rise of the answer's loss"
    if row["checkpoint"] is None:
        return f"{what}: at none of {row['n_checkpoints']} checkpoints {harm} than without random heads"
    if row["n_checkpoints"] == 1:
        return f"{what}: {harm} than without random heads at {row['checkpoint']}"
    until = "" if row["at_end"] else ", no longer at the last"
    return f"{what}: {harm} than without random heads from {row['checkpoint']} on{until}"


def _size(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise LccpError(f"--k: {text!r} is no number of heads; separate them by commas, like 1,3,10") from None
