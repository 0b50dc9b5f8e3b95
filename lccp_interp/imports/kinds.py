"""Which kind of file it is that was given: guessed from what it holds, never from its ending, and only where one fits.

It refuses to read more than is needed to tell; the reader of the kind then says what is wrong with the file. Cost: the
file is parsed once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lccp_interp.imports.files import read_text
from lccp_interp.imports.harness import FINDERS, OPENCOMPASS_COLUMNS
from lccp_interp.imports.heads import HEAD_KINDS
from lccp_interp.imports.probes import PROBE_KINDS
from lccp_interp.schema import LccpError

KINDS = (*HEAD_KINDS.values(), *PROBE_KINDS)
"""All that can be imported: head lists and benchmark results."""

AUTO = "auto"

_COLUMNS = {
    "heads-csv": {"layer", "head", "score"},
    "probes-csv": {"checkpoint", "benchmark", "metric", "score"},
    "opencompass": set(OPENCOMPASS_COLUMNS),
}
_DUO_LINE = r"[-+0-9.e]+(\t[-+0-9.e]+)+"


def guess_kind(path: str | Path) -> str:
    """The only kind that fits the file or folder.

    Raises:
        LccpError: none fits, or several do.

    Example:
        >>> guess_kind("summary.csv")   # doctest: +SKIP
        'ruler'
    """
    path = Path(path)
    if path.is_dir():
        fitting = [kind for kind, (find, _) in FINDERS.items() if find(path)]
    else:
        text = read_text(path)
        try:
            fitting = _kinds_of_json(path, json.loads(text))
        except (ValueError, RecursionError):
            fitting = _kinds_of_lines(text.splitlines())
    if len(fitting) == 1:
        return fitting[0]
    problem = f"it may be any of {', '.join(fitting)}" if fitting else "it looks like none of the known kinds"
    known = fitting or (FINDERS if path.is_dir() else KINDS)
    raise LccpError(f"{path}: {problem}; name one: `lccp import KIND {path}` with {', '.join(known)}")


def _kinds_of_json(path: Path, content: Any) -> list[str]:
    if isinstance(content, list):
        return ["probes-json"] if content and isinstance(content[0], dict) and "benchmark" in content[0] else []
    if not isinstance(content, dict) or not content:
        return []
    kinds = []
    if isinstance(content.get("results"), dict):
        kinds.append("lm-eval")
    if isinstance(content.get("averaged_metrics"), dict) or path.name.endswith(".json.score"):
        kinds.append("helmet")
    if all(re.fullmatch(r"\d+-\d+", key, re.ASCII) for key in content):
        kinds.append("wu")
    return kinds


def _kinds_of_lines(lines: list[str]) -> list[str]:
    header = {cell.strip() for cell in lines[0].split(",")}
    kinds = [kind for kind, columns in _COLUMNS.items() if columns <= header]
    if any(line.startswith("Tasks,") for line in lines[:2]):
        kinds.append("ruler")
    if all(re.fullmatch(_DUO_LINE, line, re.ASCII | re.IGNORECASE) for line in lines if line.strip()):
        kinds.append("duo")
    return kinds
