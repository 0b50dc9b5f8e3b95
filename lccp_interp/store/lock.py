"""Who may write: one driver per run folder, one editor of run.json at a time.

Finished units need no lock (a part is there or not, and every writer would write the same bytes); what needs one is
the driver, so that nobody pays twice for the same work, and whoever reads run.json to write it back changed. Both are
kernel locks (`flock`) on a file of the run folder that says who holds it: freed by the kernel when the holder dies, by
whatever death, and never held by a child that it forked. Reading a run never takes one.

Where the file system keeps no such locks (some Lustre and FUSE mounts), holding is a lease instead: the file is made
exclusively and touched every `BEAT_S` seconds. A holder on the same machine is asked after by its process; one on
another has left when nothing was touched for `LEASE_S` seconds by the file system's clock, and may be taken over.
Should a holder have slept that long (a machine that was suspended), two drivers can be at work for a while: both write
the same parts, so time is lost and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lccp_interp.schema import LccpError
from lccp_interp.store.processes import began, clock_of, is_alive, is_temporary, machine, reason, remove_orphans

DRIVER_LOCK = ".driver.lock"
EDIT_LOCK = ".run.json.lock"
LOCKS = (DRIVER_LOCK, EDIT_LOCK)
"""Files in a run folder that are no part of the run."""

STUDY_FILE = "study.json"
"""What a study asked (`lccp_interp.study`); written before run.json is."""

EDIT_WAIT_S = 60.0
"""How long an edit of run.json waits for another; one takes milliseconds."""
LEASE_S = 120.0
BEAT_S = 20.0
_POLL_S = 0.02
_NOT_HERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What flock says on a file system that keeps no locks."""

_driven: ContextVar[frozenset[Path]] = ContextVar("_driven", default=frozenset())
_descriptors: set[int] = set()


def _forget_in_child() -> None:
    """A lock belongs to every process that has its file open: a worker must not outlive its driver as a holder."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def driving(path: str | Path) -> Iterator[None]:
    """Be the one driver of the run folder at `path` as long as the block runs; what killed writers left is removed.

    The folder is made if it is not there, and removed again if the block leaves it empty. Within the block the same
    thread may say it again; workers of a driver do not say it at all. In a folder that this user cannot write to there
    is no lock and no driver: a finished run may be asked for, and the first thing that would be written says so.

    Raises:
        LccpError: another process drives it (host, process, since when), or the folder cannot be used.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, driving(folder):
        ...     print([path.name for path in Path(folder).iterdir()])
        ['.driver.lock']
    """
    folder = Path(path)
    if folder.resolve() in _driven.get():
        yield
        return
    refuse_strangers(folder)
    is_new = not folder.exists()
    make_folder(folder)
    try:
        with _driver_lock(folder):
            token = _driven.set(_driven.get() | {folder.resolve()})
            remove_orphans(folder)
            try:
                yield
            finally:
                _driven.reset(token)
                remove_orphans(folder)
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def driver_of(path: str | Path) -> dict[str, Any] | None:
    """Who drives the run folder at `path`: host, pid, since (ISO 8601, UTC); None if nobody does. Takes no lock.

    Example:
        >>> driver_of("no/such/folder") is None
        True
    """
    file = Path(path) / DRIVER_LOCK
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # A shared lock for an instant: it is refused if a driver holds the file.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno not in _NOT_HERE or _Lease(file).is_left():
            return None
    finally:
        os.close(descriptor)
    return {key: value for key, value in _read(file).items() if key in ("host", "pid", "since")}


@contextlib.contextmanager
def _driver_lock(folder: Path) -> Iterator[None]:
    if not os.access(folder, os.W_OK):
        yield
        return
    lock = _Lock(folder / DRIVER_LOCK)
    for _ in range(3):
        # Who asks who the driver is holds the file for an instant; that is no refusal.
        if lock.take():
            break
        time.sleep(_POLL_S)
    else:
        raise LccpError(
            f"{folder} is being worked on by {lock.holder()}; wait until it is done, or end it there (finished units "
            "stay), or choose another folder"
        )
    with lock:
        yield


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Be the one who reads and writes back files of a run folder; others wait their turn.

    Raises:
        LccpError: another process has held it for `EDIT_WAIT_S` seconds (it is named), or the folder cannot be written.
    """
    if not os.access(folder, os.W_OK):
        yield  # nothing can be written here, and who tries to is told
        return
    lock = _Lock(folder / EDIT_LOCK)
    until = time.monotonic() + EDIT_WAIT_S
    while not lock.take():
        if time.monotonic() > until:
            raise LccpError(
                f"{folder / 'run.json'} has been held for {EDIT_WAIT_S:.0f} s by {lock.holder()}; if that process is "
                "stopped, let it go on or end it, and type the same command again"
            )
        time.sleep(_POLL_S)
    with lock:
        yield


def refuse_strangers(folder: Path) -> None:
    """Refuse a folder that holds files and is no run.

    Raises:
        LccpError: it does.
    """
    if not folder.is_dir() or (folder / "run.json").is_file():
        return
    # What a driver that was killed at its very beginning left is nobody's.
    if any(path.name not in (*LOCKS, STUDY_FILE) and not is_temporary(path) for path in folder.iterdir()):
        raise LccpError(f"{folder} holds files but no run.json; choose an empty or new folder for --out")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; an `LccpError` says why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> LccpError:
    return LccpError(f"cannot write {folder}: {reason(error)}; choose another place, or make room")


class _Lock:
    """A lock file, held by the kernel or, where that cannot be, by a lease; taken at most once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None
        self._pid = os.getpid()
        self._lease: _Lease | None = None

    def take(self) -> bool:
        """Try to take it; True if it is ours now."""
        try:
            return self._take()
        except OSError as error:
            raise _cannot_write(self.file.parent, error) from error

    def _take(self) -> bool:
        while True:
            try:
                descriptor, is_new = _open(self.file)
            except FileNotFoundError:
                if not self.file.parent.is_dir():
                    raise
                continue  # removed in between
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in _NOT_HERE:
                    self._lease = _Lease(self.file)
                    return self._lease.take(is_new=is_new)
                if isinstance(error, BlockingIOError):
                    return False
                raise
            if _is_file(self.file, descriptor):
                break
            os.close(descriptor)  # its last holder removed it before we held it
        self._descriptor = descriptor
        _descriptors.add(descriptor)
        _sign(self.file, _own_name())
        return True

    def holder(self) -> str:
        """Who holds it, in words."""
        content = _read(self.file)
        if "pid" not in content:
            return "another process"
        return f"process {content['pid']} on {content.get('host')} since {content.get('since')}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._pid != os.getpid():
            return  # a child that was forked inside the block
        if self._lease is not None:
            self._lease.give_back()
        if self._descriptor is not None:
            # Removed while it is still held: whoever opened it before sees that it is gone, and makes a new one.
            with contextlib.suppress(OSError):
                self.file.unlink()
            _descriptors.discard(self._descriptor)
            os.close(self._descriptor)


class _Lease:
    """A lock file that is ours because we made it, as long as we touch it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._content = _own_name()
        self._over = threading.Event()

    def take(self, *, is_new: bool) -> bool:
        """Try to hold it; `is_new`: this process has just made the file."""
        if not is_new and not (self._put_aside_if_left() and self._make()):
            return False
        _sign(self._file, self._content)
        threading.Thread(target=self._keep, daemon=True).start()
        return True

    def _make(self) -> bool:
        descriptor, is_new = _open(self._file)
        os.close(descriptor)
        return is_new

    def is_left(self) -> bool:
        """Whether nobody holds it any more."""
        try:
            touched = self._file.stat().st_mtime
        except FileNotFoundError:
            return True
        holder = _read(self._file)
        if holder.get("machine") == machine():
            return not is_alive(int(holder["pid"]), int(holder["began"]))
        now = clock_of(self._file.parent)
        return now is not None and abs(now - touched) > LEASE_S

    def _put_aside_if_left(self) -> bool:
        """Move a lock file that nobody holds out of the way."""
        try:
            left = self._file.read_bytes()
        except FileNotFoundError:
            return True
        if not self.is_left():
            return False
        aside = self._file.with_name(f"{self._file.name}.{uuid.uuid4().hex[:8]}")
        try:
            os.rename(self._file, aside)
            if aside.read_bytes() != left:
                # Another was quicker and holds it now.
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._file)
                return False
        except FileNotFoundError:
            return True
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _keep(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def give_back(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            # Shorter if the disk was full.
            if self._content.startswith(self._file.read_bytes()):
                self._file.unlink()


def _open(file: Path) -> tuple[int, bool]:
    """Open a lock file; the second is whether this call made it."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # a link would have another file written over
    try:
        return os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(file, flags), False


def _sign(file: Path, content: bytes) -> None:
    """Say in a lock file who holds it. Holding does not hang on it: on a full disk it stays empty."""
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.write(descriptor, content)
        finally:
            os.close(descriptor)


def _own_name() -> bytes:
    pid = os.getpid()
    name = {
        "host": socket.gethostname(),
        "pid": pid,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "began": began(pid),
    }
    return (json.dumps(name) + "\n").encode()


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_file(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
