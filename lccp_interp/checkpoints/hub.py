"""A hub of checkpoints: which revisions a repository has, which files they have, and those files.

It speaks to the hub through huggingface_hub (its endpoint, its token, its offline mode) and checks every byte against
the hub's own listing. Files are fetched by plain HTTP, so that a download that was cut goes on where it stopped, in the
next process too. Whatever the hub answers, no name out of it becomes a path: repositories are kept under a name made
here, revisions under their commit, files only under plain file names. It refuses to know what is done with the files.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lccp_interp.checkpoints.folders import is_plain_name, safetensors_bytes
from lccp_interp.schema import LccpError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
_TRIES = 5
_TIMEOUT_SECONDS = 30.0
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 300.0
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class HubFile:
    """A file of a revision, as the hub lists it. `sha256` is known of large files, `git_sha1` of all."""

    name: str
    size: int
    git_sha1: str
    sha256: str | None = None


class Stopped(Exception):
    """A download was asked to stop; what it has stays."""


def is_offline() -> bool:
    """Whether huggingface_hub was told to stay off the network (`HF_HUB_OFFLINE=1`)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def list_revisions(repository: str) -> dict[str, str]:
    """Commit by name of every branch and tag.

    Raises:
        LccpError: no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with _explained(repository):
        refs = _patiently(lambda: HfApi().list_repo_refs(repository))
    found = {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)}
    for name, commit in found.items():
        if not COMMIT.fullmatch(commit):
            raise LccpError(f"the hub gives {commit!r} for revision {name!r} of {repository}, which is no commit")
    return found


def list_files(repository: str, commit: str) -> list[HubFile]:
    """The files at the top of a revision; folders in it, and names that are no plain file names, are left out.

    Raises:
        LccpError: no such revision, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _explained(repository, commit):
        entries = _patiently(lambda: list(HfApi().list_repo_tree(repository, revision=commit)))
    return [
        HubFile(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
        for entry in entries
        if isinstance(entry, RepoFile) and is_plain_name(entry.path)
    ]


def download(
    repository: str,
    commit: str,
    file: HubFile,
    target: Path,
    *,
    part: Path,
    stop: Callable[[], bool] = lambda: False,
    on_bytes: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Fetch one file to `target`, by way of `part`, whose bytes are kept when it is cut and used when it goes on.

    Args:
        repository: `organisation/name`.
        commit: of the revision.
        file: its listing; size and hash must agree.
        target: where the whole file goes.
        part: where it grows; nobody else may write there.
        stop: asked after every chunk; true ends it with `Stopped`.
        on_bytes: told the bytes of every chunk.

    Raises:
        LccpError: the hub cannot be reached, the disk is full, or the bytes are not those that the hub lists.
    """
    resumed = part.exists() and part.stat().st_size > 0
    try:
        _fetch(repository, commit, file, part, stop, on_bytes)
    except _OtherBytesError:
        # Bytes kept from an earlier time may have been damaged; a file that came in one go is wrong at its source.
        if not resumed:
            raise
        _fetch(repository, commit, file, part, stop, on_bytes)
    os.replace(part, target)


class _OtherBytesError(LccpError):
    """What came is not what the hub lists."""


def _fetch(
    repository: str,
    commit: str,
    file: HubFile,
    part: Path,
    stop: Callable[[], bool],
    on_bytes: Callable[[int], None],
) -> None:
    """Grow `part` to the whole file and check it; what is not the listed file is deleted."""
    try:
        _grow(repository, commit, file, part, stop, on_bytes)
        if fault := _fault(file, part):
            where = f"{file.name} of {repository}@{commit[:12]}"
            raise _OtherBytesError(f"{where} {fault}; nothing of it was kept, try again")
    except _OtherBytesError:
        part.unlink()
        raise


def _grow(
    repository: str,
    commit: str,
    file: HubFile,
    part: Path,
    stop: Callable[[], bool],
    on_bytes: Callable[[int], None],
) -> None:
    """Append to `part` until it is as long as the file should be."""
    from huggingface_hub import errors

    size = part.stat().st_size if part.exists() else 0
    if size > file.size:
        part.unlink()
        size = 0
    header_checked = file.sha256 is None or not file.name.endswith(".safetensors")
    failures = 0
    while size < file.size or not part.exists():
        before = size
        try:
            for reached in _chunks(repository, commit, file, part, size, on_bytes):
                size, failures = reached, 0
                if stop():
                    raise Stopped
                header_checked = header_checked or _header_fits(repository, commit, file, part)
        except errors.OfflineModeIsEnabled:
            with _explained(repository, commit):
                raise
        # Its base class covers broken connections and bad answers of whichever HTTP library the hub client uses.
        except errors.HTTPError as error:
            size = part.stat().st_size if part.exists() else 0
            failures += 1
            if not _is_transient(error) or failures >= _TRIES:
                with _explained(repository, commit):
                    raise
            _pause(error, failures)
            continue
        except OSError as error:
            raise _disk_error(error, file, part) from error
        if size == before and size < file.size:
            failures += 1
            if failures >= _TRIES:
                raise LccpError(f"{file.name} of {repository}@{commit[:12]} ends at {size} of {file.size} bytes")


def _chunks(
    repository: str, commit: str, file: HubFile, part: Path, start: int, on_bytes: Callable[[int], None]
) -> Iterator[int]:
    """Ask for the bytes from `start` on, append them, and yield the size so far."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hf_hub_url(repository, file.name, revision=commit, endpoint=constants.ENDPOINT)
    with (
        get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as response,
        open(part, "ab") as out,
    ):
        hf_raise_for_status(response)
        if response.status_code != 206:
            # The server does not do ranges: from the beginning.
            out.truncate(0)
            start = 0
        size = start
        # Chunks as they come: what would wait here for a larger one is lost when the connection is cut.
        for chunk in response.iter_bytes():
            # Never more than is listed: a hub that lies must not fill the disk.
            kept = chunk[: file.size - size + 1]
            out.write(kept)
            out.flush()
            size += len(kept)
            on_bytes(len(kept))
            yield size
            if size > file.size:
                return


def _header_fits(repository: str, commit: str, file: HubFile, part: Path) -> bool:
    """Check a safetensors file by its first bytes, before the rest is fetched; false while they are not whole."""
    if part.stat().st_size < 8:
        return False
    where = f"{file.name} of {repository}@{commit[:12]}"
    try:
        expected = safetensors_bytes(part, file.size)
    except ValueError as error:
        raise _OtherBytesError(f"{where} is no safetensors file: {error}; leave that revision out") from error
    if expected is not None and expected != file.size:
        raise _OtherBytesError(
            f"{where} is truncated on the hub: {file.size} bytes, its header asks for {expected}; leave that revision "
            "out"
        )
    return expected is not None


def _fault(file: HubFile, path: Path) -> str:
    """In which way a fetched file is not the one listed; empty if it is."""
    size = path.stat().st_size
    if size != file.size:
        return f"came with {size} bytes or more, the hub lists {file.size}"
    with open(path, "rb") as handle:
        if file.sha256 is not None:
            got, expected = hashlib.file_digest(handle, "sha256").hexdigest(), file.sha256
        else:
            # How git names a file's content.
            digest = hashlib.sha1(f"blob {size}\0".encode())
            digest.update(handle.read())
            got, expected = digest.hexdigest(), file.git_sha1
    return "" if got == expected else f"came with hash {got[:16]}..., the hub lists {expected[:16]}..."


def _status(error: Exception) -> int | None:
    """The hub's answer; None if the connection broke before there was one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: Exception) -> bool:
    status = _status(error)
    return status is None or status in (408, 429) or status >= 500


def _pause(error: Exception, failures: int) -> None:
    """Wait before asking again: as long as the hub says, else longer every time."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    longest = _FIRST_PAUSE_SECONDS * 2**failures
    time.sleep(min(float(asked), _LONGEST_PAUSE_SECONDS) if asked.isdigit() else longest)


def _patiently(ask: Callable[[], _Answer]) -> _Answer:
    """Ask the hub again when it is busy: a trajectory of many revisions soon meets its limit of questions per time."""
    from huggingface_hub import errors

    for failures in itertools.count(1):
        try:
            return ask()
        except errors.HTTPError as error:
            if failures >= _TRIES or _status(error) is None or not _is_transient(error):
                raise
            _pause(error, failures)
    raise AssertionError("not reached")


def _disk_error(error: OSError, file: HubFile, part: Path) -> LccpError:
    import shutil

    free = shutil.disk_usage(part.parent).free if part.parent.is_dir() else 0
    return LccpError(
        f"{file.name} ({file.size} bytes) cannot be written to {part.parent}: {error.strerror or error}, {free} bytes "
        "are free there; make room, or give another folder with --cache, or less with --disk-budget"
    )


@contextmanager
def _explained(repository: str, revision: str | None = None) -> Iterator[None]:
    """Errors of the hub and of the way there, in one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise LccpError(
            f"{repository} is gated on {constants.ENDPOINT}: ask for access on its page, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise LccpError(
            f"{constants.ENDPOINT} has no repository {repository}, nor is there such a folder; check the name (a "
            "private one needs `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise LccpError(
            f"{repository} has no revision {revision}; `lccp checkpoints {repository}` lists them"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise LccpError(
            f"{repository} is not on this disk and the hub is switched off (HF_HUB_OFFLINE); unset it to fetch it"
        ) from error
    except errors.HTTPError as error:
        raise LccpError(
            f"the hub at {constants.ENDPOINT} cannot be used for {repository}: {_one_line(error)}; try again, or set "
            "HF_HUB_OFFLINE=1 to use what is on this disk"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise LccpError(
            f"the hub at {constants.ENDPOINT} gives no sensible answer for {repository}: {_one_line(error)}"
        ) from error


def _one_line(error: Any) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
