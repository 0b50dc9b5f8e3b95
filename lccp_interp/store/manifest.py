"""run.json: what a run is, how it came to be, and the checkpoints it has.

It is read whole, checked, and changed in one way only: under a lock, read again, written beside and renamed. This
module refuses to know what studies mean. Cost: milliseconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from lccp_interp.schema import SCHEMA_VERSION, LccpError
from lccp_interp.store.files import UNREADABLE, first_line, write_json
from lccp_interp.store.lock import holding

RESTORE = "restore it, or score into a new folder"
PROVENANCE_PACKAGES = ("lccp_interp", "torch", "transformers", "tokenizers", "numpy", "polars", "safetensors")


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved config (JSON with sorted keys), the identity of a study.

    Example:
        >>> config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def provenance() -> dict[str, Any]:
    """Versions, git commit and machine of this moment, for `run.json`."""
    versions = {}
    for package in PROVENANCE_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).resolve().parent
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": commit,
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """What the run.json of the run folder at `path` holds.

    Raises:
        LccpError: no run there, a run of a newer schema, or an unreadable file.
    """
    manifest_path = path / "run.json"
    if not manifest_path.is_file():
        raise LccpError(f"no run at {path}: it has no run.json; make one with `lccp score CHECKPOINT... --out {path}`")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise TypeError("it is no object")
        version = int(manifest["schema_version"])
        if version <= SCHEMA_VERSION and not (
            isinstance(manifest["config"], dict) and isinstance(manifest["checkpoints"], list)
        ):
            raise TypeError("config must be an object and checkpoints a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise LccpError(f"{manifest_path} cannot be read ({why}); {RESTORE}") from error
    if version > SCHEMA_VERSION:
        raise LccpError(
            f"{manifest_path} has schema version {version}, this lccp_interp reads up to {SCHEMA_VERSION}; "
            "upgrade lccp_interp"
        )
    return manifest


@contextlib.contextmanager
def editing(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield what run.json holds, and write back what the block makes of it; edits of other processes wait meanwhile.

    All that changes run.json goes this way. If the block raises or changes nothing, nothing is written.

    Raises:
        LccpError: as `read_manifest`, another process that does not let go, or a folder that cannot be written.

    Example:
        >>> with editing("runs/demo") as manifest:                                    # doctest: +SKIP
        ...     manifest.setdefault("imports", []).append({"name": "ruler"})
    """
    folder = Path(path)
    read_manifest(folder)  # no run, no lock
    with holding(folder):
        manifest = read_manifest(folder)
        before = json.dumps(manifest)
        yield manifest
        if json.dumps(manifest) != before:
            write_json(folder / "run.json", manifest)


def check_entries(entries: Sequence[Any], where: Path, remedy: str) -> None:
    """Refuse checkpoints of a run.json that have no name and tokens of their own.

    Raises:
        LccpError: what is wrong with which entry of `where`; `remedy` says what to do about a damaged one.

    Example:
        >>> check_entries([{"name": "a", "tokens_seen": 5}, {"name": "b", "tokens_seen": 6}], Path("run.json"), "")
    """
    owners: dict[tuple[str, object], str] = {}
    for number, entry in enumerate(entries, 1):
        name, tokens = (entry.get("name"), entry.get("tokens_seen")) if isinstance(entry, dict) else (entry, None)
        if not isinstance(name, str) or isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise LccpError(
                f"{where}: checkpoint {number} of {len(entries)} has name {_brief(name)} and tokens_seen "
                f"{_brief(tokens)}, expected a text and a whole number from 0 on; {remedy}"
            )
        if ("name", name) in owners:
            raise LccpError(f"{where}: two checkpoints have the name {name!r}; give each its own there")
        if ("tokens_seen", tokens) in owners:
            raise LccpError(
                f"{where}: checkpoints {owners['tokens_seen', tokens]!r} and {name!r} have the same tokens_seen, "
                f"{tokens}; give each its own there, as `lccp score` does with --tokens NAME=COUNT"
            )
        owners |= {("name", name): name, ("tokens_seen", tokens): name}


def checkpoint_frame(entries: Sequence[Mapping[str, Any]], schema: Mapping[str, Any], where: Path) -> pl.DataFrame:
    """Entries of a run.json that passed `check_entries` as a table, sorted by tokens_seen.

    Raises:
        LccpError: a value of another type than its column.
    """
    try:
        return pl.DataFrame(list(entries), schema=dict(schema)).sort("tokens_seen", "name")
    except (TypeError, *UNREADABLE) as error:
        raise LccpError(
            f"{where}: a checkpoint has a field of another type than expected ({first_line(error)}); mend it there"
        ) from error


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
