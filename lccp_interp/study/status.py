"""How far a run is: units and tokens done per task and checkpoint, probes, who is at work, and when it may be finished.

It reads names of parts, the cases' lengths and the log, never the parts; so it may be asked while others write, and of
a run whose study file is gone. It refuses to judge results. Cost: a listing of the folder.
"""

from __future__ import annotations

import json
import math
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from lccp_interp.schema import LccpError
from lccp_interp.store import TABLES, Run, driver_of, part_name
from lccp_interp.store.lock import STUDY_FILE
from lccp_interp.sweep.log import LOG

RECENT_LINES = 5


def run_status(path: str | Path) -> dict[str, Any]:
    """The state of a run folder as plain JSON values.

    Args:
        path: a run folder, finished or not.

    Returns:
        run, done (share of the tokens, 0..1), driver (host, pid, since; None if nobody is at work), eta_s (seconds at
        the pace of this call's parts; None if it cannot be told or nobody is at work), tasks (a list of {task, folder,
        units, units_done, tokens, tokens_done, checkpoints: [{name, tokens_seen, units, units_done}]}), probes (a list
        of {name, checkpoints}), ablations, not_begun (tasks of its study that nobody has begun with), log (its last
        lines).

    Raises:
        LccpError: no run there, or one that cannot be read.

    Example:
        >>> run_status("runs/demo")["done"]   # doctest: +SKIP
        1.0
    """
    run = Run.open(path)
    folders = [run.path, *sorted(file.parent for file in run.path.glob("*/run.json"))]
    tasks = [_task(Run.open(folder), run.path) for folder in folders]
    tokens, tokens_done = (sum(task[key] for task in tasks) for key in ("tokens", "tokens_done"))
    driver = driver_of(run.path) or next((found for folder in folders[1:] if (found := driver_of(folder))), None)
    eta_s = None
    if driver is not None:
        rates = [rate for task in tasks if (rate := task.pop("_rate")) is not None]
        eta_s = (tokens - tokens_done) / sum(rates) if rates and sum(rates) > 0 else None
    for task in tasks:
        task.pop("_rate", None)
    return {
        "run": str(run.path),
        "done": tokens_done / tokens if tokens else 0.0,
        "driver": driver,
        "eta_s": eta_s,
        "tasks": tasks,
        "probes": _probes(run),
        "ablations": [str(entry.get("name")) for entry in run.manifest.get("ablations", [])],
        "not_begun": _not_begun(run),
        "log": _last_lines(run.path / LOG),
    }


def _task(run: Run, top: Path) -> dict[str, Any]:
    per_shard = int(run.config.get("cases_per_shard") or 64)
    try:
        lengths = run.cases["length"].to_list()
    except LccpError:
        lengths = []  # begun, and killed before its cases were written
    shards = [sum(lengths[start : start + per_shard]) for start in range(0, len(lengths), per_shard)]
    checkpoints: list[dict[str, Any]] = []
    tokens_done = 0
    finished: list[tuple[float, int]] = []
    for name, tokens_seen in run.checkpoints.select("name", "tokens_seen").iter_rows():
        n_done = 0
        for shard, tokens in enumerate(shards):
            parts = [run.path / table / part_name(name, shard) for table in TABLES]
            if all(part.is_file() for part in parts):
                n_done += 1
                tokens_done += tokens
                finished.append((max(part.stat().st_mtime for part in parts), tokens))
        checkpoints.append({"name": name, "tokens_seen": tokens_seen, "units": len(shards), "units_done": n_done})
    return {
        "task": run.config.get("task"),
        "folder": "" if run.path == top else run.path.name,
        "units": len(shards) * len(checkpoints),
        "units_done": sum(checkpoint["units_done"] for checkpoint in checkpoints),
        "tokens": sum(shards) * len(checkpoints),
        "tokens_done": tokens_done,
        "checkpoints": checkpoints,
        "_rate": _rate(finished, _since(run)),
    }


def _since(run: Run) -> float:
    """When the last call that did any work began, or an hour ago."""
    hour_ago = time.time() - 3600
    entries = run.manifest.get("executions") or [{}]
    try:
        return max(hour_ago, datetime.fromisoformat(str(entries[-1]["started"])).timestamp())
    except (KeyError, ValueError):
        return hour_ago


def _rate(finished: list[tuple[float, int]], since: float) -> float | None:
    """Tokens per second since then."""
    recent = [tokens for moment, tokens in finished if moment >= since]
    elapsed = time.time() - since
    return sum(recent) / elapsed if recent and elapsed > 0 and math.isfinite(elapsed) else None


def _probes(run: Run) -> list[dict[str, Any]]:
    table = run.probes.collect()
    found: dict[str, set[str]] = {}
    for benchmark, checkpoint in table.select("benchmark", "checkpoint").iter_rows():
        found.setdefault(benchmark, set()).add(checkpoint)
    return [{"name": name, "checkpoints": len(checkpoints)} for name, checkpoints in sorted(found.items())]


def _not_begun(run: Run) -> list[str]:
    """Tasks of the study behind a run, if there is one, that have no folder yet."""
    try:
        study = json.loads((run.path / STUDY_FILE).read_text(encoding="utf-8"))["study"]
        names = [str(task["name"] or task["task"]) for task in study["tasks"][1:]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if not (run.path / name / "run.json").is_file()]


def _last_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-RECENT_LINES:]
    except OSError:
        return []
