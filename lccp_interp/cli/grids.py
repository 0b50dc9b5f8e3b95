"""From options to a grid: which task is asked for, which options belong to it, and what they say.

It refuses to score. To add a task: a line in `OWN_OPTIONS` and one in `_BUILDERS`. Importing it costs nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lccp_interp.cli.terminal import items, number
from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from lccp_interp.tasks.grids import CaseGrid

OWN_OPTIONS = {
    "niah": ("lengths", "depths"),
    "interference": ("distances", "interferences"),
    "longbio": ("lengths", "depths"),
}
"""Options that say what a task varies; they are refused with another task that does not know them."""


@dataclass(frozen=True)
class GridOptions:
    """The options of `lccp score` that say what is asked, as they were typed."""

    lengths: str
    depths: str
    distances: str
    interferences: str
    samples: int
    needles: Path | None
    haystack: Path | None
    prompt: str | None
    chat: bool
    seed: int


def grid_of(task: str, options: GridOptions, context: typer.Context) -> CaseGrid:
    """The grid that `options` describe.

    Args:
        task: its name.
        options: as they were typed, defaults filled in.
        context: of the command; knows which options were typed.

    Raises:
        LccpError: an unknown task, an option of another task, or any mistake in the options.
    """
    if task not in _BUILDERS:
        raise LccpError(f"unknown task {task!r}; known: {', '.join(_BUILDERS)}")
    foreign = {name for names in OWN_OPTIONS.values() for name in names} - set(OWN_OPTIONS[task])
    for name in sorted(foreign):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            owners = " or ".join(owner for owner, names in OWN_OPTIONS.items() if name in names)
            raise LccpError(
                f"--{name} belongs to --task {owners}; --task {task} takes "
                f"{' and '.join(f'--{own}' for own in OWN_OPTIONS[task])}"
            )
    return _BUILDERS[task](options)


def _counts(text: str, option: str) -> tuple[int, ...]:
    from lccp_interp.checkpoints import parse_count

    return tuple(parse_count(item) for item in items(text, option))


def _sources(options: GridOptions) -> dict[str, Any]:
    """What every grid over needles takes."""
    from lccp_interp.tasks.haystack import read_haystack
    from lccp_interp.tasks.needles import PAPER_PROMPT, read_needles

    return {
        "samples": options.samples,
        "needles": None if options.needles is None else read_needles(options.needles),
        "haystack": None if options.haystack is None else read_haystack(options.haystack),
        "prompt": PAPER_PROMPT if options.prompt is None else options.prompt.replace("\\n", "\n"),
        "chat": options.chat,
        "seed": options.seed,
    }


def _niah(options: GridOptions) -> CaseGrid:
    from lccp_interp.tasks.niah import NiahGrid

    return NiahGrid(
        lengths=_counts(options.lengths, "--lengths"),
        depths=tuple(number(item, "--depths") for item in items(options.depths, "--depths")),
        **_sources(options),
    )


def _interference(options: GridOptions) -> CaseGrid:
    from lccp_interp.tasks.interference import InterferenceGrid

    return InterferenceGrid(
        distances=_counts(options.distances, "--distances"),
        interferences=_counts(options.interferences, "--interferences"),
        **_sources(options),
    )


def _longbio(options: GridOptions) -> CaseGrid:
    from lccp_interp.tasks.longbio import LongBioGrid

    given = {"needles": options.needles, "haystack": options.haystack, "prompt": options.prompt, "chat": options.chat}
    for name, value in given.items():
        if value:
            raise LccpError(
                f"--task longbio writes its biographies and its prompt itself; leave out --{name}, or take --task niah"
            )
    return LongBioGrid(
        lengths=_counts(options.lengths, "--lengths"),
        depths=tuple(number(item, "--depths") for item in items(options.depths, "--depths")),
        samples=options.samples,
        seed=options.seed,
    )


_BUILDERS: dict[str, Callable[[GridOptions], CaseGrid]] = {
    "niah": _niah,
    "interference": _interference,
    "longbio": _longbio,
}
