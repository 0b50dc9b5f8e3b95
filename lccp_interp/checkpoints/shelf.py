"""A shelf: the place of one revision in the depot. Config and tokenizer stay on it, the weights come and go.

`CACHE/organisation--name/COMMIT/` with the small files, `lccp_shelf.json` (which files the revision has, with sizes
and hashes as the hub lists them), the weights while they are there, and a note once they were verified. Small files
that revisions share are kept once and linked. Locks lie beside the shelves and are the kernel's, freed when their
process dies. It refuses to know when weights come and go; that is the depot's business.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lccp_interp.checkpoints import hub
from lccp_interp.checkpoints.folders import (
    PICKLE_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TOKENIZER_HASHED,
    combined_hash,
    file_sha256,
    is_pickled,
    is_plain_name,
    pickle_refusal,
    read_config,
    read_json,
    verify_weights,
    weight_names,
)
from lccp_interp.checkpoints.hub import COMMIT, HubFile
from lccp_interp.schema import LccpError

OURS = "lccp_"
MANIFEST = f"{OURS}shelf.json"
_VERIFIED, _RESERVED = f"{OURS}verified", f"{OURS}reserved"
_SMALL = ("config.json", "generation_config.json", "chat_template.jinja", SAFETENSORS_INDEX, PICKLE_INDEX)
_LOCKS, _SHARED, _REVISIONS = ".locks", ".shared", f"{OURS}revisions.json"
_MAX_SMALL_BYTES = 200_000_000
"""Of a config or a tokenizer file; a hub must not fill the disk before anything was asked for."""


def default_cache() -> Path:
    """Where revisions are kept if nobody says otherwise: `LCCP_CACHE`, else `lccp_interp` in the user's cache."""
    if chosen := os.environ.get("LCCP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lccp_interp"


def repository_folder(cache: Path, repository: str) -> Path:
    """Where the shelves of a repository are.

    Raises:
        LccpError: it is no name of a repository.

    Example:
        >>> repository_folder(Path("/cache"), "org/name").name
        'org--name'
        >>> repository_folder(Path("/cache"), "org/..")
        Traceback (most recent call last):
        lccp_interp.schema.LccpError: 'org/..' is no name of a hub repository; write organisation/name
    """
    if not hub.REPOSITORY.fullmatch(repository) or ".." in repository:
        raise LccpError(f"{repository!r} is no name of a hub repository; write organisation/name")
    return cache / repository.replace("/", "--")


@dataclass(frozen=True)
class Shelf:
    """One revision of a repository in the depot.

    `weights` are its weight files in the order of their names; those that the hub keeps as large files come and go,
    others (of toy models) stay with the small ones.
    """

    path: Path
    repository: str
    commit: str
    files: tuple[HubFile, ...]
    weights: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Shelf:
        """The shelf at `path`.

        Raises:
            LccpError: its manifest cannot be read or does not belong there.
        """
        content = read_json(path / MANIFEST, "manifest of a downloaded revision")
        try:
            files = tuple(HubFile(**item) for item in content["files"])
            shelf = cls(path, content["repository"], content["commit"], files, tuple(content["weights"]))
            plain = all(map(is_plain_name, (*shelf.weights, *(file.name for file in files))))
            if not plain or shelf.commit != path.name or not set(shelf.weights) <= {file.name for file in files}:
                raise ValueError("its names do not fit")
        except (KeyError, TypeError, ValueError) as error:
            raise LccpError(
                f"{path / MANIFEST} is no manifest of a downloaded revision ({error}); delete it"
            ) from error
        return shelf

    @cached_property
    def large(self) -> tuple[HubFile, ...]:
        """The weight files that come and go."""
        return tuple(file for file in self.files if file.name in self.weights and file.sha256 is not None)

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights when they are there."""
        return sum(file.size for file in self.large)

    @property
    def bytes_here(self) -> int:
        """Bytes of weights that are there, whole or not."""
        return sum(_size(path) for file in self.large for path in (self.path / file.name, self.part(file)))

    @property
    def bytes_taken(self) -> int:
        """Bytes to count with: those that are there, or all of them once they are on their way."""
        return self.n_bytes if (self.path / _RESERVED).exists() else self.bytes_here

    @cached_property
    def hash(self) -> str:
        """`checkpoint_hash` of the whole folder, from the hub's listing."""
        listed = {file.name: file.sha256 for file in self.files}
        hashes = [listed[name] or file_sha256(self.path / name) for name in self.weights]
        return combined_hash(read_config(self.path), hashes)

    def part(self, file: HubFile) -> Path:
        """Where a weight file grows."""
        return self.path / f"{file.name}.part"

    def is_whole(self) -> bool:
        """Whether all weights are there and were verified."""
        return (self.path / _VERIFIED).exists() and all(
            _size(self.path / file.name) == file.size for file in self.large
        )

    def was_used(self) -> bool:
        """Whether its weights were held since they came; what was only fetched ahead is kept longer."""
        with contextlib.suppress(OSError):
            return (self.path / _VERIFIED).read_text() == "used"
        return False

    def last_used(self) -> float:
        """When its weights last came or were held, seconds since the epoch."""
        with contextlib.suppress(OSError):
            return (self.path / _VERIFIED).stat().st_mtime
        return 0.0

    def reserve(self) -> None:
        """Count the weights as if they were all there."""
        (self.path / _RESERVED).touch()

    def mark_verified(self) -> None:
        """Note that the weights are whole.

        Raises:
            LccpError: they are not.
        """
        for file in self.large:
            verify_weights(self.path / file.name)
        (self.path / _VERIFIED).write_text("new")
        (self.path / _RESERVED).unlink(missing_ok=True)

    def mark_used(self) -> None:
        """Note that the weights were held; best effort, on a cache that may have become read-only."""
        with contextlib.suppress(OSError):
            (self.path / _VERIFIED).write_text("used")

    def evict(self) -> None:
        """Delete the weights; config and tokenizer stay. The caller holds the lock for itself."""
        (self.path / _VERIFIED).unlink(missing_ok=True)
        for file in self.large:
            (self.path / file.name).unlink(missing_ok=True)
            self.part(file).unlink(missing_ok=True)
        (self.path / _RESERVED).unlink(missing_ok=True)

    def lock(self) -> Lock:
        """The lock of this shelf, not taken yet."""
        return Lock(self.path.parents[1] / _LOCKS / f"{self.path.parent.name}--{self.commit}")


def stock(
    cache: Path, repository: str, commit: str, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Shelf:
    """The shelf of a revision with its small files on it, fetched if they are not there yet.

    Args:
        cache: root of the depot.
        repository: `organisation/name`.
        commit: of the revision, 40 hex digits.
        allow_pickle: whether pickled weights will do where there are no others.
        trust_remote_code: whether the revision's Python files are fetched too.

    Raises:
        LccpError: the hub cannot be reached, the revision is no checkpoint, or only pickles.
    """
    folder = repository_folder(cache, repository)
    if not COMMIT.fullmatch(commit):
        raise LccpError(f"{commit!r} is no commit of {repository}")
    path = folder / commit
    if (path / MANIFEST).is_file():
        shelf = Shelf.read(path)
    else:
        path.mkdir(parents=True, exist_ok=True)
        shelf = _list(path, repository, commit)
        write_json(path / MANIFEST, {**asdict(shelf), "path": None})
    if is_pickled(shelf.weights) and not allow_pickle:
        raise LccpError(f"{repository}@{commit[:12]} has no weights: {pickle_refusal(shelf.weights)}")
    if trust_remote_code:
        for file in shelf.files:
            if file.name.endswith(".py"):
                _fetch_small(path, repository, commit, file)
    return shelf


def _list(path: Path, repository: str, commit: str) -> Shelf:
    # What we keep beside the files of a revision cannot be one of them.
    files = {file.name: file for file in hub.list_files(repository, commit) if not file.name.startswith(OURS)}
    where = f"{repository}@{commit[:12]}"
    if "config.json" not in files:
        raise LccpError(f"{where} is no checkpoint: it has no config.json")
    if SAFETENSORS in files:
        # It is what transformers loads, whatever shards are left beside it.
        files.pop(SAFETENSORS_INDEX, None)
    if SAFETENSORS in files or SAFETENSORS_INDEX in files:
        files.pop(PICKLE_INDEX, None)
    for name in (*_SMALL, *TOKENIZER_HASHED):
        if name in files:
            _fetch_small(path, repository, commit, files[name])
    weights = weight_names(files, lambda name: read_json(path / name, "index of weight shards"), where)
    for name in weights:
        if files[name].sha256 is None:
            _fetch_small(path, repository, commit, files[name])
    code = [name for name in files if name.endswith(".py")]
    kept = sorted({*weights, *code, *(set(files) & {*_SMALL, *TOKENIZER_HASHED})})
    return Shelf(path, repository, commit, tuple(files[name] for name in kept), tuple(weights))


def _fetch_small(path: Path, repository: str, commit: str, file: HubFile) -> None:
    """Put a small file onto a shelf: the same bytes are fetched and kept once per repository."""
    if _size(path / file.name) == file.size:
        return
    if file.size > _MAX_SMALL_BYTES:
        raise LccpError(f"{file.name} of {repository}@{commit[:12]} has {file.size} bytes, too many for such a file")
    content = file.sha256 or file.git_sha1
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", content):
        raise LccpError(f"the hub gives {content!r} as hash of {file.name} of {repository}@{commit[:12]}")
    shared = path.parent / _SHARED / content
    lock = Lock(path.parents[1] / _LOCKS / f"small--{shared.name}")
    lock.take(alone=True, wait=True)
    try:
        if not shared.exists():
            shared.parent.mkdir(parents=True, exist_ok=True)
            hub.download(repository, commit, file, shared, part=shared.with_suffix(".part"))
        (path / file.name).unlink(missing_ok=True)
        try:
            os.link(shared, path / file.name)
        except OSError:
            shutil.copyfile(shared, path / file.name)
    finally:
        lock.release()


def shelves(cache: Path) -> Iterator[Shelf]:
    """All shelves of a depot that can be read."""
    for manifest in cache.glob(f"*/*/{MANIFEST}"):
        with contextlib.suppress(LccpError):
            yield Shelf.read(manifest.parent)


def remember_revisions(cache: Path, repository: str, revisions: dict[str, str]) -> None:
    """Keep what the hub listed, for a time without it."""
    folder = repository_folder(cache, repository)
    # A cache that may only be read does without.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _REVISIONS, {**recall_revisions(cache, repository), **revisions})


def recall_revisions(cache: Path, repository: str) -> dict[str, str]:
    """Commit by name of the revisions that the hub listed before."""
    file = repository_folder(cache, repository) / _REVISIONS
    content = read_json(file, "list of revisions") if file.is_file() else {}
    if not isinstance(content, dict):
        return {}
    return {str(name): commit for name, commit in content.items() if COMMIT.fullmatch(str(commit))}


def hub_cache_snapshot(repository: str, commit: str, files: Sequence[HubFile] = ()) -> Path | None:
    """The revision in the user's own cache of the hub client, if all `files` are there in their size."""
    path = _hub_cache_folder(repository) / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not (path / "config.json").is_file():
        return None
    needed = [file for file in files if not file.name.endswith(".py")]
    return path if all(_size(path / file.name) == file.size for file in needed) else None


def hub_cache_revisions(repository: str) -> dict[str, str]:
    """Commit by name of the revisions in the user's own cache of the hub client."""
    refs = _hub_cache_folder(repository) / "refs"
    found = {}
    for file in sorted(refs.rglob("*")) if refs.is_dir() else ():
        if file.is_file() and COMMIT.fullmatch(commit := file.read_text().strip()):
            found[file.relative_to(refs).as_posix()] = commit
    return found


def _hub_cache_folder(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


class Lock:
    """A lock between processes and threads on a file, shared or for oneself; the kernel frees it with its holder."""

    def __init__(self, file: Path) -> None:
        self._file, self._handle = file, -1

    def take(self, *, alone: bool, wait: bool = False) -> bool:
        """Take it, or change how it is held; false if others keep it.

        Raises:
            LccpError: it is wanted for oneself, and nothing can be written there; or the file system keeps no locks.
        """
        if self._handle < 0:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                if not alone:
                    # What cannot be written to can be read all the same: nothing is evicted there by us.
                    return True
                raise LccpError(
                    f"nothing can be written to {self._file.parent.parent} ({error.strerror or error}); give another "
                    "folder with --cache"
                ) from error
        try:
            fcntl.flock(self._handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            self.release()
            return False
        except OSError as error:
            self.release()
            raise LccpError(
                f"the file system of {self._file.parent.parent} keeps no locks ({error.strerror or error}), so that "
                "processes would take weights from each other; give a folder on another one with --cache"
            ) from error
        return True

    def release(self) -> None:
        """Give it back."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def write_json(file: Path, content: Any) -> None:
    """Write a small JSON file so that nobody ever reads half of it."""
    handle, staged = tempfile.mkstemp(dir=file.parent, suffix=".part")
    with open(handle, "w", encoding="utf-8") as out:
        json.dump(content, out, indent=1, default=str)
    os.replace(staged, file)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
