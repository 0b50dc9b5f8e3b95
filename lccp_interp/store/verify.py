"""Every file of a run folder read to its last row: is it whole, and does it hold what was written into it?

Readers look at footers only. Here each part is read wholly, its rows are compared with the digest that it carries, and
scores and outcomes with the unit that they are named after. What is broken can be removed on request; the command that
made it then makes it again, and only it. This module refuses to mend a file, to touch run.json, and to judge numbers.
Cost: one reading of the whole run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from lccp_interp.schema import LccpError
from lccp_interp.store.files import UNREADABLE, columns_of, first_line, is_sound, part_name
from lccp_interp.store.lock import driving
from lccp_interp.store.processes import orphans
from lccp_interp.store.run import Run
from lccp_interp.store.tables import (
    CASES_SCHEMA,
    OPTIONAL_COLUMNS,
    PROBES_SCHEMA,
    QUESTION_COLUMNS,
    TABLES,
    TASK_COLUMNS,
)

WHOLE, UNSIGNED, DAMAGED, STRAY, LEFT, REMOVED = "whole", "unsigned", "damaged", "stray", "left", "removed"
STATES = {
    WHOLE: "read wholly, its rows are those that were written",
    UNSIGNED: "read wholly, but it carries no digest (another program or an older version wrote it)",
    DAMAGED: "cannot be read, or holds other rows than were written",
    STRAY: "whole, but of a checkpoint that run.json does not have",
    LEFT: "a temporary file of a writer who is gone",
    REMOVED: "was damaged or left, and was removed",
}
"""What a file of a run can be found to be."""

_SHARD = re.compile(r"\.(\d{4,})\.parquet$")
_AGAIN = {
    "scores": "score again",
    "outcomes": "score again",
    "cases.parquet": "score again",
    "probes": "ask or import again",
    "generations": "ask again (`lccp probe`)",
    "ablations": "ablate again",
    "imported": "import its file again",
}


@dataclass(frozen=True)
class Finding:
    """What was found of one file.

    Attributes:
        file: its path in the run folder.
        state: one of `STATES`.
        rows: that it holds; None where they could not be read.
        why: what is wrong with it; empty if nothing is.
        again: what makes it anew once it is removed.
    """

    file: str
    state: str
    rows: int | None = None
    why: str = ""
    again: str = ""

    @property
    def is_good(self) -> bool:
        """Whether nothing has to be done about it."""
        return self.state in (WHOLE, UNSIGNED, REMOVED)


def verify(path: str | Path) -> list[Finding]:
    """Check every Parquet file of the run folder at `path`, and of the runs within it, thoroughly.

    Returns:
        One finding per file, in the order of their names.

    Raises:
        LccpError: no run there, or its run.json cannot be read.

    Example:
        >>> [finding for finding in verify("runs/demo") if not finding.is_good]   # doctest: +SKIP
        []
    """
    root = Path(path)
    findings = []
    for folder in [Path(place) for place, _, names in os.walk(root) if "run.json" in names or Path(place) == root]:
        findings += list(_findings(Run.open(folder), root))
    findings += [Finding(_within(file, root), LEFT, None, "its writer is gone") for file in orphans(root)]
    return sorted(findings, key=lambda finding: finding.file)


def repair(path: str | Path) -> list[Finding]:
    """Remove what `verify` finds damaged or left, so that the commands that made it make it again.

    Strays stay: their rows are whole, and it may be run.json that lacks something.

    Raises:
        LccpError: as `verify`, a file that cannot be removed, or another process at work on the run.

    Example:
        >>> repair("runs/demo")   # doctest: +SKIP
    """
    root = Path(path)
    Run.open(root)  # no run, no lock
    findings = []
    with driving(root):
        for finding in verify(root):
            if finding.state in (DAMAGED, LEFT):
                try:
                    (root / finding.file).unlink(missing_ok=True)
                except OSError as error:
                    raise LccpError(
                        f"cannot remove {root / finding.file}: {error.strerror}; make its folder writable"
                    ) from error
                finding = replace(finding, state=REMOVED)
            findings.append(finding)
    return findings


def _findings(run: Run, root: Path) -> Iterator[Finding]:
    names = dict(run.checkpoints.select("name", "tokens_seen").rows())
    cases_path = run.path / "cases.parquet"
    shards: list[list[str]] = []
    for part in _parts(run.path):
        table = part.relative_to(run.path).parts[0]
        found = _read(part, table)
        if isinstance(found, str):
            finding = Finding(_within(part, root), DAMAGED, None, found)
        else:
            finding = Finding(_within(part, root), *_judged(part, found))
            if part == cases_path:
                shards = _shards(found, run)
            elif table in TABLES and finding.is_good:
                finding = _fitted(finding, part, found, names, shards)
        yield replace(finding, again=_AGAIN.get(table, "make it again"))
    if not cases_path.is_file():
        yield Finding(_within(cases_path, root), DAMAGED, None, "it is not there", _AGAIN["cases.parquet"])


def _parts(folder: Path) -> list[Path]:
    """The Parquet files of one run, cases first, without those of runs within it."""
    found = []
    for place, below, names in os.walk(folder):
        below[:] = [name for name in below if not (Path(place, name) / "run.json").is_file()]
        found += [Path(place, name) for name in names if name.endswith(".parquet") and not name.startswith(".")]
    return sorted(found, key=lambda part: (part.parent != folder, part))


def _read(part: Path, table: str) -> pl.DataFrame | str:
    """All rows of a part, or why they cannot be had."""
    schema = {"cases.parquet": CASES_SCHEMA, "probes": PROBES_SCHEMA, **TABLES}.get(table, {})
    later = {*OPTIONAL_COLUMNS, *TASK_COLUMNS, *QUESTION_COLUMNS}
    try:
        columns_of(part, [name for name in schema if name not in later], "")
        return pl.read_parquet(part)
    except LccpError as error:
        return str(error).removeprefix(f"{part} ").removesuffix("; ")
    except UNREADABLE as error:
        return f"cannot be read ({first_line(error)})"


def _judged(part: Path, frame: pl.DataFrame) -> tuple[str, int, str]:
    match is_sound(part, frame):
        case None:
            return UNSIGNED, frame.height, ""
        case True:
            return WHOLE, frame.height, ""
    return DAMAGED, frame.height, "its rows are not those that were written"


def _shards(cases: pl.DataFrame, run: Run) -> list[list[str]]:
    """Case ids of each shard; none where the run does not say how many a shard has."""
    size = run.config.get("cases_per_shard")
    if not isinstance(size, int) or size < 1:
        return []
    ids = cases["case_id"].to_list()
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _fitted(
    finding: Finding, part: Path, frame: pl.DataFrame, names: dict[str, int], shards: list[list[str]]
) -> Finding:
    """The finding of a sound part of scores or outcomes, after a look at whether it is the unit it is named after."""
    units = frame.select("checkpoint", "tokens_seen").unique(maintain_order=True).rows()
    match = _SHARD.search(part.name)
    if len(units) != 1 or match is None or part.name != part_name(units[0][0], int(match[1])):
        held = ", ".join(f"{name}" for name, _ in units[:3])
        return replace(finding, state=DAMAGED, why=f"it holds {held or 'nothing'}, which is not what its name says")
    (checkpoint, tokens), shard = units[0], int(match[1])
    if checkpoint not in names:
        return replace(finding, state=STRAY, why=f"run.json has no checkpoint {checkpoint!r}")
    if names[checkpoint] != tokens:
        why = f"checkpoint {checkpoint!r} has {tokens} tokens in it, {names[checkpoint]} in run.json"
        return replace(finding, state=DAMAGED, why=why)
    if shards and (shard >= len(shards) or set(frame["case_id"].unique()) != set(shards[shard])):
        return replace(finding, state=DAMAGED, why=f"its cases are not those of shard {shard}")
    return finding


def _within(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()
