"""Commands that read a run folder and load no model.

`heads`, `compare`, `agreement`, `across`, `import`, `figures`, `report`, `correlate`, `budget`, `saturation`.

Each parses its options, calls one function of the package and prints what came back; it refuses to compute anything.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lccp_interp.cli.terminal import Format, FormatOption, LengthOption, RunArgument, app, guarded, items, print_records
from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError

if TYPE_CHECKING:
    import polars as pl

    from lccp_interp.store import Run

ModeOption = Annotated[
    str | None,
    typer.Option(help="teacher_forced or generate; default: teacher_forced where the run holds it, else the other."),
]
ThresholdOption = Annotated[float, typer.Option(help="Score above which a head is a retrieval head.")]
RuleOption = Annotated[
    str,
    typer.Option(help="above-null: a retrieval head is also above its null, where decoys were measured; or threshold."),
]


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
    threshold: ThresholdOption = RETRIEVAL_THRESHOLD,
    rule: RuleOption = "above-null",
    retrieval_only: Annotated[
        bool, typer.Option("--retrieval-only", help="Only retrieval heads (column retrieves).")
    ] = False,
    mode: ModeOption = None,
    output_format: FormatOption = Format.table,
) -> None:
    """List heads by score, best first, with bootstrap intervals, and whether each is a retrieval head."""
    from lccp_interp.dynamics.heads import head_records
    from lccp_interp.store import Run

    records = head_records(
        Run.open(run),
        metric=metric,
        length=length,
        mode=mode,
        checkpoint=checkpoint,
        threshold=threshold,
        rule=rule.replace("-", " "),
    )
    undefined = sum(record["score"] is None for record in records)
    if undefined == len(records):
        raise LccpError(
            f"{run}: all {undefined} scores of {metric} are undefined (NaN, or no case counts); look at the outcomes, "
            "or try another --metric, --length or --mode"
        )
    if undefined:
        where = "left out" if retrieval_only else "listed last"
        print(f"{undefined} of {len(records)} scores are undefined (NaN, or no case counts): {where}", file=sys.stderr)
    if retrieval_only:
        records = [record for record in records if record["retrieves"]]
        if not records:
            raise LccpError(f"{run}: no head is a retrieval head ({metric} above {threshold:g}); lower --threshold")
    if top is None:
        top = 20 if output_format is Format.table else 0
    shown = records[:top] if top else records
    print_records(shown, output_format)
    if len(shown) < len(records) and output_format is Format.table:
        print(f"... and {len(records) - len(shown)} more (--top 0 shows all)", file=sys.stderr)


@app.command()
@guarded
def compare(
    run: RunArgument,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT|FILE|imported:NAME|RUN",
            help="What every checkpoint is compared with: one of the run, a published head list (.json, .tsv, .csv), "
            "an imported one, or another run (RUN:CHECKPOINT for one checkpoint of it). Default: the base checkpoint.",
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Size of the top lists; default: 30, but at most a quarter of the heads.")
    ] = None,
    length: LengthOption = None,
    metric: Annotated[str, typer.Option(help="Head metric.")] = "retrieval",
    threshold: ThresholdOption = RETRIEVAL_THRESHOLD,
    rule: RuleOption = "above-null",
    reference_threshold: Annotated[
        float | None, typer.Option(help="The same for the reference, where its scale is another.")
    ] = None,
    by_kv_head: Annotated[
        bool, typer.Option("--by-kv-head", help="Compare groups of heads that share a key/value head.")
    ] = False,
    n_kv_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Key/value heads per layer; default: as in a checkpoint's config.json."),
    ] = None,
    mode: ModeOption = None,
    output_format: FormatOption = Format.table,
) -> None:
    """Compare the heads of every checkpoint with a reference: overlap of the top heads, Jaccard, RBO, Spearman."""
    from lccp_interp.dynamics.comparison import compare as compare_run
    from lccp_interp.imports import records
    from lccp_interp.store import Run

    comparison = compare_run(
        Run.open(run),
        reference,
        metric=metric,
        length=length,
        mode=mode,
        top_k=top,
        threshold=threshold,
        rule=rule.replace("-", " "),
        reference_threshold=reference_threshold,
        by_kv=by_kv_head,
        n_kv_heads=n_kv_heads,
    )
    if not comparison["n_heads"].sum():
        raise LccpError(
            f"{run}: nothing to compare: at no checkpoint is a head of {metric} defined both there and in the "
            "reference; look at `lccp heads`, or choose another --reference"
        )
    if output_format is Format.table:
        print(f"{metric} at {comparison['length'][0]} tokens; n_heads heads, n cases", file=sys.stderr)
        comparison = comparison.drop("stage", "metric", "length")
    print_records(records(comparison), output_format)


@app.command()
@guarded
def across(
    run: RunArgument,
    other: Annotated[
        Path,
        typer.Argument(metavar="OTHER", help="A run over the same cases, such as RUN/sft/sft/heads of `lccp probe`."),
    ],
    metric: Annotated[str, typer.Option(help="Head metric.")] = "retrieval",
    length: LengthOption = None,
    mode: ModeOption = None,
    threshold: ThresholdOption = RETRIEVAL_THRESHOLD,
    rule: RuleOption = "above-null",
    every: Annotated[
        bool, typer.Option("--all", help="All heads; default: those that were born, died or may have.")
    ] = False,
    output_format: FormatOption = Format.table,
) -> None:
    """Say which heads were born and died between two runs over the same cases, checkpoint by checkpoint."""
    import polars as pl

    from lccp_interp.dynamics.paired import paired_census, paired_heads
    from lccp_interp.store import Run

    table = paired_heads(
        Run.open(run),
        Run.open(other),
        metric=metric,
        length=length,
        mode=mode,
        threshold=threshold,
        rule=rule.replace("-", " "),
    )
    shown = table if every else table.filter(pl.col("event").is_in(["birth", "death", "undecided"]))
    print_table(shown.drop("stage", "metric") if output_format is Format.table else shown, output_format)
    for row in paired_census(table).iter_rows(named=True):
        print(
            f"{row['checkpoint']}: {row['n_births']} born, {row['n_deaths']} died, {row['n_stay']} stay, "
            f"{row['n_undecided']} undecided, of {row['n_heads']} heads",
            file=sys.stderr,
        )


@app.command()
@guarded
def agreement(
    run: RunArgument,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", "--metric", metavar="NAMES", help="Separated by commas; default: all of the run."),
    ] = None,
    length: LengthOption = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Only this checkpoint; 'last' for the last one. Default: all.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Size of the top lists; default: 30, but at most a quarter of the heads.")
    ] = None,
    mode: ModeOption = None,
    output_format: FormatOption = Format.table,
) -> None:
    """Whether the run's head metrics mean the same heads: rank correlation and shared top heads of every pair."""
    from lccp_interp.dynamics.agreement import metric_agreement
    from lccp_interp.store import Run

    asked = None if metrics is None else items(metrics, "--metrics")
    opened = Run.open(run)
    table = metric_agreement(opened, metrics=asked, length=length, checkpoint=checkpoint, mode=mode, top_k=top)
    if output_format is Format.table:
        print(f"at {table['length'][0]} tokens; n_heads heads, n cases", file=sys.stderr)
        table = table.drop("length")
    print_table(table, output_format)


@app.command("import")
@guarded
def import_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="Head scores: wu, duo, heads-csv. Benchmark results: lm-eval, helmet, ruler, opencompass; probes-csv, "
            "probes-json for plain tables. Left out (or auto): told from the file, where only one fits.",
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="Where they are; of lm-eval, helmet and ruler also a folder.", show_default=False
        ),
    ] = None,
    into: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run folder that keeps it; without it, FILE is only shown.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in the run; default: made of the file's.")] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="THEIRS=OURS",
            help="Which checkpoint of the run is meant; THEIRS= leaves it out; may be repeated.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Of which checkpoint all results are, where the file tells none or one.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Context length in tokens, for a ruler summary whose path tells none.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the best heads are shown.")] = 10,
    output_format: FormatOption = Format.table,
) -> None:
    """Bring in head scores that others published, or benchmark results of checkpoints."""
    import polars as pl

    from lccp_interp import imports

    if file is None:
        kind, file = imports.AUTO, Path(kind)
        if str(file) in imports.KINDS and not file.exists():
            raise LccpError(f"import {file}: give the file too, `lccp import {file} FILE`")
    if kind == imports.AUTO:
        kind = imports.guess_kind(file)
    kept: dict[str, Any] | None = None
    summary: dict[str, Any]
    if kind in imports.PROBE_KINDS:
        pairs = _pairs(mapping or [])
        if into is None and pairs:
            raise LccpError("--map tells which checkpoints of a run are meant; add --into RUN")
        results = imports.read_results(file, kind, checkpoint=checkpoint, length=length)
        for part in results:
            if part.left_out:
                told = imports.name_some(part.left_out)
                print(f"lccp: {part.path}: left out {len(part.left_out)} that are no scores: {told}", file=sys.stderr)
        if into is None:
            shown = pl.concat([part.rows for part in results])
        else:
            added = imports.add_results(into, results, mapping=pairs, name=name)
            shown = added.probes
            kept = {"run": str(into), "name": added.names[0] if len(added.names) == 1 else list(added.names)}
        summary = {"file": file.name, "kind": kind, "rows": shown.height}
        left_out = sum(len(part.left_out) for part in results)
        if left_out:
            summary["left_out"] = left_out
    elif kind in imports.HEAD_KINDS.values():
        for option, given in (("--map", mapping), ("--checkpoint", checkpoint), ("--length", length)):
            if given:
                raise LccpError(
                    f"{option} is for benchmark results ({', '.join(imports.PLAIN_KINDS)}), not for {kind}; those of "
                    f"harnesses are {', '.join(imports.HARNESS_READERS)}"
                )
        heads = imports.read_heads(file, kind)
        if into is not None:
            heads = imports.import_heads(into, kind, file, name=name)
            kept = {"run": str(into), "name": name or file.stem}
        shown, summary = imports.top_heads(heads, top).drop("source", "kind"), imports.summarise_heads(heads)
    else:
        near = difflib.get_close_matches(kind, imports.KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; or leave it out"
        raise LccpError(f"unknown kind {kind!r}; known are {', '.join(imports.KINDS)}{hint}")
    records = imports.records(shown)
    if output_format is Format.json:
        print_records({**summary, "kept": kept, "records": records}, output_format)
        return
    print_records(records, output_format)
    if output_format is Format.table:
        told = ", ".join(f"{key} {value}" for key, value in summary.items() if value is not None)
        where = "not kept: add --into RUN"
        if kept is not None:
            names = kept["name"] if isinstance(kept["name"], str) else imports.name_some(kept["name"], 3)
            where = f"kept in {kept['run']} as {names}"
        print(f"{told}; {where}", file=sys.stderr)


def _pairs(mapping: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in mapping:
        theirs, equals, ours = item.rpartition("=")
        if not (theirs and equals):
            raise LccpError(f"--map {item!r}: expected THEIRS=OURS, like step100=lccp-20K, or THEIRS= to leave it out")
        if theirs in pairs:
            raise LccpError(f"--map names {theirs!r} twice; keep one")
        pairs[theirs] = ours
    return pairs


@app.command()
@guarded
def figures(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures; default: RUN/figures.")] = None,
    formats: Annotated[
        str, typer.Option(help="Figures: pdf, svg, png, or html to look into; tables: tex, csv, md.")
    ] = "pdf,svg,png,html,tex,csv,md",
    columns: Annotated[
        int | None, typer.Option(help="Of a page that pdf, svg and png span: 1 or 2; default: what suits each figure.")
    ] = None,
    length: LengthOption = None,
) -> None:
    """Draw the paper's figures and tables from a run, those that it has the numbers for."""
    from lccp_interp.dynamics.tables import RunTables
    from lccp_interp.figures import FORMATS, draw_figures, left_out
    from lccp_interp.store import Run

    chosen = items(formats, "--formats")
    for item in chosen:
        if item not in FORMATS:
            raise LccpError(f"unknown figure format {item!r}; known: {', '.join(FORMATS)}")
    tables = RunTables(Run.open(run), length)
    for path in draw_figures(tables, out or run / "figures", formats=chosen, columns=columns):
        print(path)
    for reason, names in left_out(tables).items():
        print(f"lccp: not drawn: {', '.join(names)}: {reason}", file=sys.stderr)


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


@app.command()
@guarded
def correlate(
    run: RunArgument,
    length: LengthOption = None,
    stage: Annotated[
        str | None, typer.Option(help="Only this stage and the checkpoint before it, tokens counted from there.")
    ] = None,
    method: Annotated[str, typer.Option(help="pearson, spearman or kendall.")] = "pearson",
    common: Annotated[
        bool, typer.Option("--common", help="Use the checkpoints that both series of a pair have; else refuse gaps.")
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="The layout of the paper's Tables 3, 4, 6, 7, its numbers beside yours.")
    ] = False,
    lead_lag: Annotated[
        int | None, typer.Option(metavar="CHECKPOINTS", help="Steps against steps, shifted by up to so many.")
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Only probe results whose name matches, like '*pass@3' or 'longbio*/mean/*'; may be repeated. "
            "Default: one metric per benchmark and subset, and the mean over subsets.",
        ),
    ] = None,
    mode: ModeOption = None,
    output_format: FormatOption = Format.table,
) -> None:
    """Correlate cheap metrics with probe results: levels, detrended and differences, with exact small-n tests."""
    from lccp_interp.dynamics import correlation
    from lccp_interp.dynamics.probe_choice import left_out
    from lccp_interp.dynamics.selection import named
    from lccp_interp.dynamics.series import IMPORT_HINT, run_series
    from lccp_interp.store import Run

    opened = Run.open(run)
    cheap, found = run_series(opened, length=length, stage=stage, mode=mode, probes_like=probe or None)
    probes = None if found.is_empty() else found
    if lead_lag is not None:
        table = correlation.lead_lag(cheap, probes, max_lag=lead_lag, method=method, common=common)
    else:
        table = correlation.correlate(cheap, probes, method=method, common=common)
    if table["r"].is_nan().all():
        reasons = table["reason"].unique(maintain_order=True).to_list()
        more = f"; and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
        raise LccpError(
            f"{run}: no correlation is defined ({'; '.join(reasons[:3])}{more}); score or import more checkpoints"
        )
    if paper:
        table = correlation.paper_layout(table)
    print_table(table, output_format)
    unused = left_out(opened.probes.collect(), cheap, found)
    if unused:
        chosen = "--probe chooses others" if probe is None else "without --probe one metric per subset is taken"
        print(f"left out {len(unused)} more series of results ({named(unused, 3)}); {chosen}", file=sys.stderr)
    if probes is None:
        print(
            f"{run} holds no probe results: the cheap metrics are correlated among themselves; {IMPORT_HINT}",
            file=sys.stderr,
        )


@app.command()
@guarded
def budget(
    run: RunArgument,
    level: Annotated[float, typer.Option(help="Correlation that 19 of 20 such monitors must reach.")] = 0.95,
    length: Annotated[
        int | None, typer.Option(help="Length in tokens of the full curve; default: the run's longest.")
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(
            "--measures",
            "--metrics",
            help="niah_score, answer_ppl, loss_nats, n_retrieval_heads, mean_initial_score; default: all.",
        ),
    ] = None,
    transform: Annotated[str, typer.Option(help="levels, detrended or differences.")] = "levels",
    mode: ModeOption = None,
    output_format: FormatOption = Format.table,
) -> None:
    """How many cases of which length give the run's curve, and what they cost beside an SFT probe."""
    from lccp_interp.dynamics import subsampling
    from lccp_interp.store import Run

    asked = items(measures, "--measures") if measures is not None else subsampling.MEASURES
    table = subsampling.budget(
        Run.open(run), level=level, length=length, measures=asked, transform=transform, mode=mode
    )
    print_table(table, output_format)
    if output_format is Format.table:
        for sentence in subsampling.advice(table, level=level):
            print(sentence)


@app.command()
@guarded
def saturation(
    run: RunArgument,
    length: Annotated[
        int | None,
        typer.Option(help="Length in tokens; default: the run's longest, and perplexity and loss at every length."),
    ] = None,
    share: Annotated[float, typer.Option(metavar="PERCENT", help="Share of the fitted gain that counts as done.")] = 95,
    metric: Annotated[
        str | None, typer.Option("--metric", "--metrics", metavar="NAMES", help="Separated by commas; default: all.")
    ] = None,
    mode: ModeOption = None,
    output_format: FormatOption = Format.table,
) -> None:
    """When each metric made most of its gain, with intervals, and whether it is done: one row and verdict each."""
    from lccp_interp.dynamics import saturation as dynamics
    from lccp_interp.store import Run

    if share < 1:
        raise LccpError(f"--share is in percent, got {share:g}; write {100 * share:g} for that part of the gain")
    opened = Run.open(run)
    metrics = None if metric is None else items(metric, "--metric")
    records = dynamics.saturation_records(opened, metrics=metrics, length=length, share=share / 100, mode=mode)
    if output_format is not Format.table:
        print_records(records, output_format)
        return
    print_records([{name: record[name] for name in dynamics.TABLE_COLUMNS} for record in records], output_format)
    for record in records:
        print(f"{dynamics.title(record)}: {record['verdict']}; {record['reason']}")
    if metrics is None:
        print(dynamics.deceptive_saturation(opened, length=length, share=share / 100, mode=mode).sentence)


def print_table(table: pl.DataFrame, output_format: Format) -> None:
    """Print a table of the package; NaN is null in JSON, and for people columns without a word are left out."""
    import polars as pl

    table = table.with_columns(pl.col(pl.Float64).fill_nan(None))
    if output_format is Format.table:
        if "sft_share" in table.columns:
            table = table.with_columns(
                sft_share=pl.col("sft_share").map_elements(lambda share: f"{100 * share:.2g} %", pl.String)
            )
        blank = table.select((pl.all().cast(pl.String).fill_null("") == "").all()).row(0, named=True)
        table = table.drop(name for name, is_blank in blank.items() if is_blank)
    print_records(table.to_dicts(), output_format)


def findings_of(run: Run, length: int | None) -> Sequence[tuple[str, str]]:
    from lccp_interp.dynamics.tables import RunTables
    from lccp_interp.report import findings

    return [(finding.heading, finding.text) for finding in findings(RunTables(run, length))]


def page_of(run: Run, out: Path | None, length: int | None) -> Path:
    from lccp_interp.report import write_report

    return write_report(run, out, length=length)
