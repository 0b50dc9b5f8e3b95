"""Where checkpoints live: folders, patterns of folders, repositories on a hub; and what lies there.

A source is text as people type it. Looking at one tells for every checkpoint its name, its folder, its size and its
hash, and what is wrong with it; it refuses to know how far training was. Folders cost a read of their weights, for the
hash; a hub costs configs and tokenizers.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lccp_interp.checkpoints import hub
from lccp_interp.checkpoints.folders import checkpoint_hash, read_json, verify_folder, weight_files
from lccp_interp.checkpoints.names import parse_name
from lccp_interp.checkpoints.shelf import (
    MANIFEST,
    Shelf,
    hub_cache_revisions,
    hub_cache_snapshot,
    recall_revisions,
    remember_revisions,
    repository_folder,
    stock,
)
from lccp_interp.schema import LccpError

_PARALLEL_LOOKS = 8


@dataclass(frozen=True)
class Entry:
    """A line of trajectory.json."""

    name: str
    path: str
    tokens_seen: int
    stage: str = "train"
    stage_tokens: int | None = None
    branch: str | None = None


@dataclass(frozen=True)
class Seen:
    """A checkpoint as it lies there; `fault` says why it cannot be used.

    `siblings` are the names of all checkpoints that belong with it, found or not.
    """

    name: str
    path: Path
    n_bytes: int = 0
    hash: str | None = None
    fault: str = ""
    entry: Entry | None = None
    source: str | None = None
    repository: str | None = None
    siblings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trust:
    """What is taken from a source beyond safetensors and JSON: pickled weights, Python files."""

    allow_pickle: bool = False
    trust_remote_code: bool = False


def split_source(source: str | Path) -> tuple[str, list[str] | None] | None:
    """Repository and revisions of a source on a hub, None for all of them; None for one on this machine.

    `organisation/name` is a repository if there is no such folder, nor a folder `organisation`.

    Example:
        >>> split_source("org/name"), split_source("org/name@step1,step2*"), split_source("runs/step-*")
        (('org/name', None), ('org/name', ['step1', 'step2*']), None)
    """
    if isinstance(source, Path) or Path(source).exists():
        return None
    text = source.removeprefix("hf://")
    repository, at, revisions = text.partition("@")
    if not hub.REPOSITORY.fullmatch(repository) or (not at and text == source and Path(text).parent.is_dir()):
        return None
    asked = [item.strip() for item in revisions.split(",") if item.strip()]
    if at and not asked:
        raise LccpError(f"{source!r} names no revision behind the @; write {repository}@main, or leave the @ out")
    return repository, asked or None


def look_at_folders(source: str | Path, trust: Trust) -> list[Seen]:
    """The checkpoints in a folder (or that are the folder), or in all folders that a pattern matches.

    Raises:
        LccpError: a pattern that matches no folder, a folder without checkpoints, a broken trajectory.json.
    """
    text = str(source)
    if not Path(text).exists() and glob.has_magic(text):
        folders = [Path(match) for match in sorted(glob.glob(text)) if Path(match).is_dir()]
        if not folders:
            raise LccpError(f"no folder matches {text!r}; quote the pattern, or give checkpoint folders")
        return [seen for folder in folders for seen in _in_folder(folder, trust)]
    return _in_folder(Path(source), trust)


def _in_folder(path: Path, trust: Trust) -> list[Seen]:
    if not path.exists():
        raise LccpError(
            f"no checkpoint folder at {path}; give folders with config.json, *.safetensors and a tokenizer, or a "
            "repository on a hub, organisation/name"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        table = path / "trajectory.json"
        if table.is_file():
            return [_look(path / entry.path, entry, trust) for entry in _entries(table)]
        folders = sorted(child for child in path.iterdir() if (child / "config.json").is_file())
        if not folders:
            raise LccpError(
                f"{path} holds no checkpoint: it has no config.json, nor has a folder in it; give checkpoint folders "
                "in Hugging Face form, or a folder of them"
            )
        return [_look(folder, None, trust) for folder in folders]
    table = path.parent / "trajectory.json"
    entries = _entries(table) if table.is_file() and path.is_dir() else []
    listed = next((entry for entry in entries if (path.parent / entry.path).resolve() == path.resolve()), None)
    return [_look(path, listed, trust)]


def _look(path: Path, entry: Entry | None, trust: Trust) -> Seen:
    # A link keeps its own name: `step-100 -> blobs/abc` is step-100.
    name = entry.name if entry else Path(os.path.abspath(path)).name
    try:
        verify_folder(path, allow_pickle=trust.allow_pickle)
        n_bytes = sum(file.stat().st_size for file in weight_files(path, allow_pickle=trust.allow_pickle))
        return Seen(name, path, n_bytes, checkpoint_hash(path), entry=entry)
    except LccpError as error:
        return Seen(name, path, fault=str(error), entry=entry)


def _entries(table: Path) -> list[Entry]:
    content = read_json(table, "trajectory table")
    try:
        entries = [_entry(item, table.parent) for item in content["checkpoints"]]
    except (ValueError, KeyError, TypeError) as error:
        raise LccpError(
            f"{table} is no trajectory table ({error!r}); each checkpoint needs name, path, tokens_seen"
        ) from error
    if not entries:
        raise LccpError(f"{table} lists no checkpoints; each needs name, path, tokens_seen")
    return entries


def _entry(item: Any, folder: Path) -> Entry:
    if not isinstance(item["name"], str) or not isinstance(item["path"], str):
        raise TypeError("name and path must be strings")
    if not (folder / item["path"]).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"path {item['path']!r} leaves the folder")
    counts = [item["tokens_seen"], item.get("stage_tokens")]
    for count in counts:
        if isinstance(count, bool) or not (count is None or (isinstance(count, int | float) and 0 <= count < 2**63)):
            raise ValueError(f"{count!r} is no number of tokens")
    return Entry(
        name=item["name"],
        path=item["path"],
        tokens_seen=int(counts[0]),
        stage=str(item.get("stage", "train")),
        stage_tokens=None if counts[1] is None else int(counts[1]),
        branch=None if item.get("branch") is None else str(item["branch"]),
    )


def look_at_hub(
    repository: str,
    asked: Sequence[str] | None,
    *,
    cache: Path,
    trust: Trust,
    wanted: Callable[[str], bool] = lambda name: True,
    counted: Iterable[str] = (),
) -> list[Seen]:
    """Revisions of a repository, in the order of the listing, with their configs and tokenizers on this disk.

    Args:
        repository: `organisation/name`.
        asked: names or patterns of revisions; None for all whose names say how far training was.
        cache: root of the depot.
        trust: what is taken beyond safetensors.
        wanted: whether a revision is looked at at all.
        counted: names whose tokens are told elsewhere, which need no step in them.

    Raises:
        LccpError: no such repository or revision, or the hub cannot be reached.
    """
    repository_folder(cache, repository)
    offline = hub.is_offline()
    if offline:
        revisions = {**hub_cache_revisions(repository), **recall_revisions(cache, repository)}
        if not revisions:
            raise LccpError(
                f"nothing of {repository} is on this disk and the hub is switched off (HF_HUB_OFFLINE); unset it to "
                "fetch revisions, or give --cache with the folder that has them"
            )
    else:
        revisions = hub.list_revisions(repository)
        remember_revisions(cache, repository, revisions)
    names = [name for name in _chosen(repository, revisions, asked, set(counted)) if wanted(name)]
    commits = {name: revisions.get(name, name) for name in names}
    if offline:
        names = _on_disk(repository, commits, asked, cache)
    siblings = tuple(revisions)

    def look(name: str) -> Seen:
        source = f"{repository}@{name}"
        path = cache / repository.replace("/", "--") / commits[name]
        try:
            if offline and not (path / MANIFEST).is_file():
                path = hub_cache_snapshot(repository, commits[name]) or path
                seen = _look(path, None, trust)
                return Seen(name, path, seen.n_bytes, seen.hash, seen.fault, None, source, repository, siblings)
            shelf = stock(
                cache,
                repository,
                commits[name],
                allow_pickle=trust.allow_pickle,
                trust_remote_code=trust.trust_remote_code,
            )
            owned = hub_cache_snapshot(repository, shelf.commit, shelf.files)
            size = shelf.n_bytes or sum(file.size for file in shelf.files if file.name in shelf.weights)
            return Seen(name, owned or shelf.path, size, shelf.hash, "", None, source, repository, siblings)
        except LccpError as error:
            return Seen(name, path, 0, None, f"revision {name!r}: {error}", None, source, repository, siblings)

    with ThreadPoolExecutor(_PARALLEL_LOOKS) as pool:
        return list(pool.map(look, names))


def _chosen(repository: str, revisions: dict[str, str], asked: Sequence[str] | None, counted: set[str]) -> list[str]:
    """Names of the revisions asked for; of all, those that say how far training was."""
    if asked is None:
        placed = [name for name in revisions if parse_name(name).places or name in counted]
        left = [name for name in revisions if name not in placed]
        if placed and left:
            warnings.warn(
                f"left out {len(left)} revisions of {repository} whose names tell no step: {', '.join(left[:5])}",
                stacklevel=2,
            )
        return placed or left
    chosen: list[str] = []
    for pattern in asked:
        matches = [name for name in revisions if fnmatch.fnmatchcase(name, pattern)]
        if not matches and hub.COMMIT.fullmatch(pattern):
            matches = [pattern]
        if not matches:
            known = ", ".join(list(revisions)[:5])
            raise LccpError(
                f"{repository} has no revision {pattern!r}; it has {len(revisions)}, such as {known} "
                f"(`lccp checkpoints {repository}` lists them)"
            )
        chosen += [name for name in matches if name not in chosen]
    return chosen


def _on_disk(repository: str, commits: dict[str, str], asked: Sequence[str] | None, cache: Path) -> list[str]:
    """Without a hub: the revisions that are whole on this disk; one that was asked for by its name has to be."""
    here = []
    for name, commit in commits.items():
        path = cache / repository.replace("/", "--") / commit
        shelved = (path / MANIFEST).is_file() and Shelf.read(path).is_whole()
        if shelved or _is_whole(hub_cache_snapshot(repository, commit)):
            here.append(name)
    missing = [name for name in commits if name not in here]
    named = [name for name in missing if asked is not None and name in asked]
    if named or not here:
        raise LccpError(
            f"{len(missing)} of {len(commits)} revisions of {repository} are not on this disk "
            f"({', '.join((named or missing)[:3])}), and the hub is switched off (HF_HUB_OFFLINE); unset it to fetch "
            "them"
        )
    if missing:
        warnings.warn(
            f"the hub is switched off: {len(missing)} of {len(commits)} revisions of {repository} are not on this disk "
            f"and are left out ({', '.join(missing[:3])})",
            stacklevel=2,
        )
    return here


def _is_whole(path: Path | None) -> bool:
    if path is None:
        return False
    try:
        verify_folder(path, allow_pickle=True)
    except LccpError:
        return False
    return True
