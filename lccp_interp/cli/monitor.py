"""The command that watches a training from outside: `watch`.

It parses its options, calls one function of the package and prints what comes back, line by line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lccp_interp.cli.terminal import (
    EXIT_INPUT,
    ChatOption,
    DepthsOption,
    Format,
    FormatOption,
    HaystackOption,
    LengthsOption,
    MetricsOption,
    NeedlesOption,
    PromptOption,
    SamplesOption,
    TaskOption,
    app,
    guarded,
    items,
)
from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from lccp_interp.monitor.watch import Seen


@app.command()
@guarded
def watch(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where a training writes its checkpoint folders.")],
    out: Annotated[Path, typer.Option(help="Run folder to write, or to go on with.")],
    task: TaskOption = "niah",
    lengths: LengthsOption = "1024,4096",
    depths: DepthsOption = "0,33,67,100",
    samples: SamplesOption = 2,
    needles: NeedlesOption = None,
    haystack: HaystackOption = None,
    prompt: PromptOption = None,
    chat: ChatOption = False,
    metrics: MetricsOption = "retrieval,wu,copy,needle_mass",
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
    chunk_tokens: Annotated[int, typer.Option(help="Tokens per forward pass of a long prompt.")] = 4096,
    every: Annotated[float, typer.Option(help="Seconds between two looks at the folder.")] = 30.0,
    settle: Annotated[
        float, typer.Option(help="Seconds for which a checkpoint's files must not have changed to be whole.")
    ] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, score what is whole, and end.")] = False,
    stop_when: Annotated[
        str | None, typer.Option(metavar="saturated", help="End when the answer's loss at the longest length is.")
    ] = None,
    output_format: FormatOption = Format.table,
) -> None:
    """Score each checkpoint folder as a training completes it; end it with Ctrl-C, and the same command goes on.

    One line per checkpoint: retrieval heads, mean score of the initial ones, answer perplexity, verdict.
    """
    from lccp_interp.checkpoints import parse_count
    from lccp_interp.cli.grids import GridOptions, grid_of
    from lccp_interp.cli.sources import token_counts
    from lccp_interp.monitor.watch import watch as watch_folder
    from lccp_interp.sweep import Execution

    if output_format is Format.csv:
        raise LccpError("--format csv: a watch prints lines as they come; take table, or json for one object per line")
    options = GridOptions(
        lengths=lengths,
        depths=depths,
        distances="",
        interferences="",
        samples=samples,
        needles=needles,
        haystack=haystack,
        prompt=prompt,
        chat=chat,
        seed=seed,
    )
    if task == "interference":
        raise LccpError("a watch follows heads over a grid of lengths and depths; take --task niah or longbio")
    seen = watch_folder(
        folder,
        out,
        grid_of(task, options, context),
        tokens=token_counts(tokens or []),
        tokens_per_step=None if tokens_per_step is None else parse_count(tokens_per_step),
        metrics=items(metrics, "--metrics"),
        dtype=dtype,
        execution=Execution(device=device, chunk_tokens=chunk_tokens),
        every_s=every,
        settle_s=settle,
        once=once,
        stop_when=stop_when,
        tell=_printer(output_format),
    )
    if not seen:
        print(f"lccp: {folder} holds no checkpoint yet", file=sys.stderr)
    if any(each.kind == "broken" for each in seen):
        raise typer.Exit(EXIT_INPUT)


def _printer(output_format: Format) -> Callable[[Seen], None]:
    """Prints what became of a folder as soon as it is known: results on standard output, the rest on standard error."""

    def tell(seen: Seen) -> None:
        if output_format is Format.json:
            print(json.dumps(seen.record(), ensure_ascii=False, allow_nan=False), flush=True)
        else:
            print(seen.line(), file=sys.stdout if seen.summary is not None else sys.stderr, flush=True)

    return tell
