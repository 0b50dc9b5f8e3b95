"""The commands that change heads: `ablate` looks at what is left of retrieval, `circuit` at what feeds a head.

Each parses its options, calls one function of the package and prints what came back; it refuses to compute anything.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lccp_interp.cli.sources import DiskBudgetOption, PickleOption, TrustOption, access_of
from lccp_interp.cli.terminal import Format, FormatOption, RunArgument, app, guarded, items, print_records, progress_bar
from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from lccp_interp.interventions.graph import HeadGraph

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
    disk_budget: DiskBudgetOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
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
            access=access_of(trust_remote_code, allow_pickle, disk_budget),
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


@app.command()
@guarded
def circuit(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RUN", help="Run folder, checkpoint, folder of checkpoints, or a repository on a hub."
        ),
    ],
    heads: Annotated[str, typer.Argument(metavar="HEAD", help="layer-head, like 2-2; several separated by commas.")],
    metric: Annotated[
        str,
        typer.Option(
            help="What the head may lose: needle_mass, retrieval, copy... by its query and key; dla or locos by its "
            "value, too."
        ),
    ] = "needle_mass",
    kind: Annotated[
        str,
        typer.Option(
            help="What an earlier head sends instead: resample (what it does in another case), needle (with another "
            "needle), mean."
        ),
    ] = "resample",
    depth: Annotated[int, typer.Option(help="1: what feeds the head; 2: and what feeds its feeders.")] = 1,
    length: Annotated[
        int | None, typer.Option(help="Of the cases, in tokens; default: the run's longest, or 256.")
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="At most so many.")] = 12,
    only: Annotated[
        str, typer.Option("--only", metavar="all|last|NAMES", help="Checkpoints, separated by commas.")
    ] = "last",
    top: Annotated[int, typer.Option(min=1, help="Clear edges to show and draw, the strongest, per checkpoint.")] = 12,
    whole: Annotated[bool, typer.Option("--all", help="Print every edge, clear or not.")] = False,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: .pdf, .svg or .png for paper, .html for the screen.")
    ] = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Where a run's checkpoints are now, if they were moved; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of needles and haystacks where there is no run.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.")] = "auto",
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
    output_format: FormatOption = Format.table,
) -> None:
    """Which earlier heads feed a head's query, key or value? Path patching, one edge at a time.

    The weight of an edge is what the head loses when this edge alone carries something else. Edges are clear where the
    95 % interval leaves out 0.
    """
    from lccp_interp.interventions.heads import parse_heads
    from lccp_interp.interventions.tracing import trace_circuit
    from lccp_interp.sweep import Access

    ending = None if figure is None else _ending(figure)
    names = only if only in ("all", "last") else items(only, "--only")
    with progress_bar("tracing") as progress:
        graphs = trace_circuit(
            source,
            parse_heads(heads),
            checkpoints=names,
            length=length,
            n_cases=cases,
            metric=metric,
            kind=kind,
            depth=depth,
            folders=checkpoints,
            seed=seed,
            device=device,
            dtype=dtype,
            access=Access(trust_remote_code, allow_pickle),
            progress=progress,
        )
    rows = [
        {"checkpoint": graph.checkpoint, **row}
        for graph in graphs
        for row in (graph if whole else graph.strongest(top)).table().to_dicts()
    ]
    onward = () if depth == 2 else ("depth", "target", "target_input")
    left_out = () if output_format is not Format.table else (*onward, "n_clusters")
    print_records([{name: row[name] for name in row if name not in left_out} for row in rows], output_format)
    if not rows:
        print("no edge is clear; --all prints them all", file=sys.stderr)
    for graph in graphs:
        for line in _carried(graph):
            print(line, file=sys.stderr)
    if figure is not None:
        if ending == "html":
            from lccp_interp.figures import interactive
            from lccp_interp.figures.interactive.circuit import circuit as draw_on_screen

            interactive.save(draw_on_screen(graphs, max_edges=top), figure)
        else:
            from lccp_interp.figures import paper
            from lccp_interp.figures.paper.circuit import circuit as draw_on_paper

            paper.save(draw_on_paper(graphs, max_edges=top), figure)
        print(f"figure: {figure}", file=sys.stderr)


def _ending(figure: Path) -> str:
    """The format of a figure by its file's ending; told before anything is computed."""
    known = ("pdf", "svg", "png", "html")
    ending = figure.suffix.lstrip(".")
    if ending not in known:
        raise LccpError(f"--figure {figure}: unknown ending {ending!r}; known: {', '.join(known)}")
    return ending


def _carried(graph: HeadGraph) -> list[str]:
    """What the heads have, and how much of it all earlier heads carry."""
    lines = []
    for head, usual in graph.usual.items():
        inputs = {"q": "query", "k": "key", "v": "value"}
        own = [edge for edge in graph.edges if edge.route.target == head and edge.route.depth == 1]
        parts = [
            f"{graph.together[head, name]:.3f} by its {inputs[name]}"
            for name in inputs
            if (head, name) in graph.together
        ]
        lines.append(
            f"{graph.checkpoint}: {graph.metric} of {head[0]}-{head[1]} is {usual:.3f}; without all earlier heads it "
            f"loses {', '.join(parts)}; {sum(edge.is_clear for edge in own)} of {len(own)} edges are clear"
        )
    return lines
