"""Who is writing: temporary files that carry the name of their process, so that those of the dead can be told.

A temporary file is named after the machine, the process and when that process began. On the same machine the kernel
knows whether it lives, whatever the clock says; only for files of other machines does age decide, measured by the
clock of the file system. A machine here is a host, since it was last booted, seen from one space of process ids: two
containers on one host are two machines. This module refuses to know what the files hold. Cost: a look into /proc per
temporary file that was found.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
import uuid
from pathlib import Path

ORPHAN_AGE_S = 3600
"""A temporary file of another machine that differs by more than this from the file system's clock is nobody's."""

_PROC = Path("/proc")
_OWNED = re.compile(r"\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<began>\d+)\.[0-9a-f]{8}\.tmp$")

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@functools.cache
def machine() -> str:
    """8 hex digits that tell this machine from others, and from itself before it was booted."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):
        known.append((_PROC / "sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        known.append(os.readlink(_PROC / "self/ns/pid"))
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]


def began(pid: int) -> int:
    """When a process began, in ticks since boot; 0 where the system does not tell.

    A process that was killed and waits to be buried counts as gone.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        # The name of a process may hold blanks and brackets; what follows the last bracket is plain.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        with contextlib.suppress(PermissionError):
            os.kill(pid, 0)
        return 0
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return int(fields[19])


def is_alive(pid: int, since: int) -> bool:
    """Whether the process `pid` of this machine that began at `since` (0: unknown) still lives.

    Example:
        >>> is_alive(os.getpid(), began(os.getpid())), is_alive(os.getpid(), 1)
        (True, False)
    """
    try:
        now = began(pid)
    except ProcessLookupError:
        return False
    return not (now and since) or now == since


def temporary_beside(path: Path) -> Path:
    """A name for a temporary file in the folder of `path`, hidden, unique and with its writer's name in it.

    Example:
        >>> temporary_beside(Path("scores/a.parquet")).name.startswith(".a.parquet.")
        True
    """
    pid = os.getpid()
    return path.with_name(f".{path.name}.{machine()}-{pid}-{began(pid)}.{uuid.uuid4().hex[:8]}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a file is one that is being written, or was when its writer died."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def reason(error: Exception) -> str | None:
    """Why the system refused, in its own words, which polars keeps in a sentence of its own; None if it did not."""
    if told := _OS_ERROR.search(str(error)):
        return os.strerror(int(told[1]))
    return (error.strerror or str(error)) if isinstance(error, OSError) else None


def orphans(folder: Path) -> list[Path]:
    """Temporary files under `folder` whose writers are gone."""
    found = [Path(place, name) for place, _, names in os.walk(folder) for name in names if is_temporary(Path(name))]
    gone, foreign = [], []
    for path in found:
        owner = _OWNED.search(path.name)
        if owner is None or owner["machine"] != machine():
            foreign.append(path)
        elif not is_alive(int(owner["pid"]), int(owner["began"])):
            gone.append(path)
    now = clock_of(folder) if foreign else None
    for path in foreign:
        with contextlib.suppress(OSError):
            # A file from the future was left before the clock was set back.
            if now is not None and abs(now - path.stat().st_mtime) > ORPHAN_AGE_S:
                gone.append(path)
    return sorted(gone)


def remove_orphans(folder: Path) -> list[Path]:
    """Remove what killed writers left under `folder`, and nothing of a writer who lives; returns what was removed."""
    removed = []
    for path in orphans(folder):
        with contextlib.suppress(OSError):
            path.unlink()
            removed.append(path)
    return removed


def clock_of(folder: Path) -> float | None:
    """Seconds since 1970 by the clock that dates files in `folder`; None where nothing can be written there."""
    probe = temporary_beside(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
