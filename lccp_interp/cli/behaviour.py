"""Commands that ask models and grade their answers: `probe`.

Each parses its options, calls one function of the package and prints what came back; it refuses to compute anything.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lccp_interp.cli.sources import DiskBudgetOption, PickleOption, TrustOption, access_of
from lccp_interp.cli.terminal import Format, FormatOption, RunArgument, app, guarded, items, print_records, progress_bar
from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    import polars as pl

    from lccp_interp.behaviour.mixture import Length
    from lccp_interp.store import Run


@app.command()
@guarded
def probe(
    run: RunArgument,
    sft: Annotated[
        bool, typer.Option("--sft", help="Fine-tune every checkpoint lightly first; else it is asked as it is.")
    ] = False,
    tasks: Annotated[
        str,
        typer.Option(
            help="longbio, ruler, mrcr (their usual subsets), or single ones like ruler-vt; none with --data."
        ),
    ] = "longbio,ruler,mrcr",
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="ruler:PATH|mrcr:PATH", help="Ask official data too, never trained on; may be repeated."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of prompt and answer, or bands: 1024 or 512-1024; default: the paper's band, from "
            "half to all of the longest length that the run's heads are scored at."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Items per task and length.")] = 20,
    k: Annotated[int, typer.Option("--k", min=0, help="Sampled answers per item, for pass@k; 0: greedy only.")] = 3,
    temperature: Annotated[float, typer.Option(help="Of the sampled answers.")] = 0.7,
    train_samples: Annotated[
        int, typer.Option(min=1, help="Training items per task and length; the paper trains on 440,000 in all.")
    ] = 12,
    epochs: Annotated[float, typer.Option(help="Passes over the training items.")] = 2.0,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="At the beginning, then a cosine to a quarter; default: 2e-5 x 4096 / hidden size, ten times "
            "that for LoRA."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Training items per step; with --lm-eval documents per pass.")
    ] = 8,
    method: Annotated[str, typer.Option(help="full, lora, or auto: full up to 1B parameters.")] = "auto",
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA's adapters.")] = 16,
    keep: Annotated[bool, typer.Option("--keep", help="Keep what was trained, under RUN/sft.")] = False,
    heads: Annotated[
        bool,
        typer.Option("--heads", help="Score the heads behind fine-tuning too, on the run's cases, under RUN/sft."),
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again where fine-tuning diverged before.")] = False,
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAMES", help="Only these checkpoints, separated by commas.")
    ] = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Where the checkpoints are now, if they were moved; may be repeated."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of this probe in the run; default: sft, or base without --sft.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask inside the tokenizer's chat template.")] = False,
    material: Annotated[
        str, typer.Option(help="english, organism (the bundled language), or auto: by the tokenizer.")
    ] = "auto",
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            "--corpus",
            metavar="FILE|DIR",
            help="Read long documents instead and take their perplexity and LongPPL; questions, repeats and stories "
            "are in the bundled language; may be repeated.",
        ),
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="With --corpus: documents of each.")] = 8,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Run these tasks of lm-evaluation-harness instead (extra eval), separated by commas.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --lm-eval: folder of task definitions of your own.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="With --lm-eval: examples before each question; default: the task's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --lm-eval: only so many documents per task, for a trial.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of items, samples and fine-tuning.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.")] = "auto",
    disk_budget: DiskBudgetOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
    output_format: FormatOption = Format.table,
) -> None:
    """Ask every checkpoint questions over long prompts, after light fine-tuning if asked; results join the run.

    Interrupt it at any time: finished checkpoints stay, and the same command resumes.
    """
    from lccp_interp.behaviour.probe import ProbeStudy, failures
    from lccp_interp.behaviour.probe import probe as probe_run
    from lccp_interp.behaviour.sft import SftRecipe
    from lccp_interp.store import Run

    opened = Run.open(run)
    where: dict[str, Any] = {
        "checkpoints": None if only is None else items(only, "--only"),
        "folders": checkpoints,
        "device": device,
        "dtype": dtype,
        "access": access_of(trust_remote_code, allow_pickle, disk_budget),
    }
    if sft and (lm_eval is not None or corpus):
        raise LccpError("--lm-eval and --corpus take the checkpoints as they are; leave out --sft")
    if lm_eval is not None:
        harness: dict[str, Any] = {
            "include_path": include_path,
            "num_fewshot": num_fewshot,
            "limit": limit,
            "batch_size": batch_size,
        }
        table = _with_lm_eval(opened, items(lm_eval, "--lm-eval"), seed=seed, **harness, **where)
    elif corpus:
        table = _of_corpora(opened, corpus, lengths, documents=documents, seed=seed, **where)
    else:
        recipe = SftRecipe(
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            method=method,
            lora_rank=lora_rank,
            seed=seed,
        )
        study = ProbeStudy(
            name=name or ("sft" if sft else "base"),
            tasks=() if tasks == "none" else tuple(items(tasks, "--tasks")),
            data=tuple(data or ()),
            lengths=_lengths(opened, lengths),
            samples=samples,
            train_samples=train_samples,
            sft=recipe if sft else None,
            k=k,
            temperature=temperature,
            chat=chat,
            material=material,
            seed=seed,
        )
        with progress_bar("probing") as progress:
            table = probe_run(opened, study, keep=keep, heads=heads, retry=retry, progress=progress, **where)
        for reason in failures(opened, study.name).values():
            print(f"lccp: failed: {reason} (its results are missing; --retry tries again)", file=sys.stderr)
    _print(table, output_format)


def _with_lm_eval(run: Run, tasks: list[str], **options: Any) -> pl.DataFrame:
    from lccp_interp.behaviour.harness import probe_with_lm_eval

    with progress_bar("lm-eval") as progress:
        return probe_with_lm_eval(run, tasks, progress=progress, **options)


def _of_corpora(run: Run, corpora: list[str], length: str | None, **options: Any) -> pl.DataFrame:
    from lccp_interp.behaviour.corpora import probe_corpora
    from lccp_interp.checkpoints import parse_count

    tokens = None if length is None else parse_count(length)
    with progress_bar("reading") as progress:
        return probe_corpora(run, corpora, length=tokens, progress=progress, **options)


def _lengths(run: Run, asked: str | None) -> tuple[Length, ...]:
    """What was asked for, or the paper's band: from half to all of the longest length of the run."""
    from lccp_interp.behaviour.mixture import Length

    if asked is not None:
        return tuple(Length.parse(item) for item in items(asked, "--lengths"))
    longest = run.cases["length"].max()
    if not isinstance(longest, int):
        raise LccpError(f"{run.path} has no cases, so no length to go by; give --lengths")
    return (Length(max(1, longest // 2), longest),)


def _print(table: pl.DataFrame, output_format: Format) -> None:
    from lccp_interp.dynamics.probe_choice import score_records

    records = score_records(table)
    if output_format is Format.table:
        records = [{key: value for key, value in record.items() if key != "tokens_seen"} for record in records]
    print_records(records, output_format)
