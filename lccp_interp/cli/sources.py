"""Where commands take checkpoints from: their shared argument and options, and `lccp checkpoints`, which lists them.

It parses text into what `lccp_interp.checkpoints` asks for; it refuses to look for anything itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lccp_interp.cli.terminal import Format, FormatOption, app, guarded, items, print_records
from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from lccp_interp.sweep import Access

SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="CHECKPOINT...",
        help="Checkpoint folders, folders of them, patterns ('ckpts/step-*'), or revisions on a hub: organisation/name "
        "for all, organisation/name@step1,step2 or 'organisation/name@step*' for some.",
    ),
]
RevisionsOption = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Revisions of repositories given without an @: names or patterns, by commas."),
]
BranchOption = Annotated[
    str | None, typer.Option(help="Which branch to follow where a stage has several, e.g. ingredient1.")
]
TokensOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=COUNT|FILE",
        help="Tokens seen by a checkpoint, e.g. step100=1.2B, or a table of them: *.csv with name,tokens[,stage], or "
        "*.json; may be repeated, and wins over all names.",
    ),
]
TokensPerStepOption = Annotated[
    str | None,
    typer.Option(
        metavar="COUNT|STAGE=COUNT,...",
        help="Tokens per training step, where names only tell steps (known for Pythia and SmolLM3).",
    ),
]
StageBeforeOption = Annotated[
    list[str] | None,
    typer.Option(metavar="STAGE=COUNT", help="Tokens of all stages before one, e.g. stage2=3.9T; may be repeated."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where revisions are kept; default: LCCP_CACHE, or ~/.cache/lccp_interp."),
]
DiskBudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Room for downloaded weights, e.g. 40GB: the oldest go when it is needed; two checkpoints let one come "
        "while another is scored. Default: until the disk is full.",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that a checkpoint brings, with all that you may do on this machine; off unless given.",
    ),
]
PickleOption = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Take pickled weights where there are no safetensors; off unless given."),
]


def access_of(trust_remote_code: bool, allow_pickle: bool, disk_budget: str | None) -> Access:
    """The options of commands that ask a run's checkpoints again.

    Raises:
        LccpError: a budget that is no number of bytes.
    """
    from lccp_interp.checkpoints import parse_bytes
    from lccp_interp.sweep import Access

    return Access(trust_remote_code, allow_pickle, parse_bytes(disk_budget))


def search_options(
    *,
    revisions: str | None = None,
    branch: str | None = None,
    tokens: Sequence[str] | None = None,
    tokens_per_step: str | None = None,
    stage_before: Sequence[str] | None = None,
    cache: Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """The options as the keywords of `find_checkpoints`.

    Raises:
        LccpError: one that cannot be read.

    Example:
        >>> search_options(tokens=["step1=2M"], tokens_per_step="stage1=4M")["tokens"]
        {'step1': 2000000}
    """
    from lccp_interp.checkpoints import TokenTable, parse_count, read_token_table

    pairs = [entry for entry in tokens or () if "=" in entry]
    files = []
    for entry in tokens or ():
        if "=" in entry:
            continue
        if not entry.lower().endswith((".csv", ".json")):
            raise LccpError(f"--tokens {entry!r}: write NAME=COUNT, like step100=1.2B, or a table, *.csv or *.json")
        files.append(read_token_table(entry))
    per_step: int | dict[str, int] | None = None
    if tokens_per_step is not None and "=" in tokens_per_step:
        per_step = _counts(items(tokens_per_step, "--tokens-per-step"), "--tokens-per-step", "stage2=4M")
    elif tokens_per_step is not None:
        per_step = parse_count(tokens_per_step)
    return {
        "tokens": token_counts(pairs),
        "table": TokenTable(
            {name: count for table in files for name, count in table.tokens.items()},
            {name: stage for table in files for name, stage in table.stages.items()},
        ),
        "tokens_per_step": per_step,
        "stage_tokens_before": _counts(stage_before or (), "--stage-before", "stage2=3.9T"),
        "branch": branch,
        "revisions": None if revisions is None else items(revisions, "--revisions"),
        "cache": cache,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
    }


def token_counts(entries: Sequence[str]) -> dict[str, int]:
    """`NAME=COUNT` entries of `--tokens`.

    Raises:
        LccpError: an entry without a name or a count.
    """
    return _counts(entries, "--tokens", "step100=1.2B")


def _counts(entries: Sequence[str], option: str, example: str) -> dict[str, int]:
    from lccp_interp.checkpoints import parse_count

    table = {}
    for entry in entries:
        name, equals, count = entry.rpartition("=")
        if not equals:
            raise LccpError(f"{option} {entry!r}: write NAME=COUNT, like {example}")
        table[name] = parse_count(count)
    return table


@app.command("checkpoints")
@guarded
def list_sources(
    sources: SourcesArgument,
    revisions: RevisionsOption = None,
    tokens: TokensOption = None,
    tokens_per_step: TokensPerStepOption = None,
    stage_before: StageBeforeOption = None,
    cache: CacheOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
    output_format: FormatOption = Format.table,
) -> None:
    """List what is found: each checkpoint's stage, branch, tokens, size and hash; which are the same, which are broken.

    Of revisions on a hub configs and tokenizers are fetched, and no weights.
    """
    from lccp_interp.checkpoints import list_checkpoints
    from lccp_interp.checkpoints.tokens import Counting

    options = search_options(
        revisions=revisions,
        tokens=tokens,
        tokens_per_step=tokens_per_step,
        stage_before=stage_before,
        cache=cache,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    names = ("tokens", "table", "tokens_per_step", "stage_tokens_before", "branch")
    counting = Counting(**{name: options.pop(name) for name in names})
    records = [
        {
            "name": one.name,
            "stage": one.stage,
            "branch": one.branch or "",
            "tokens_seen": one.tokens_seen,
            "tokens_of_stage": one.stage_tokens,
            "bytes": one.n_bytes,
            "hash": (one.hash or "") if output_format is not Format.table else (one.hash or "")[:12],
            "same_as": one.same_as or "",
            "source": one.source or str(one.path),
            "fault": one.fault,
        }
        for one in list_checkpoints(sources, counting=counting, **options)
    ]
    print_records(records, output_format)
