"""The depot: weights come from a hub when their checkpoint's turn comes, and go again when the room is needed.

    depot = Depot(budget_bytes=40 * 10**9)
    depot.expect(checkpoints)                      # in the order in which they will be held
    for checkpoint in checkpoints:
        with depot.hold(checkpoint) as local:      # downloaded and verified
            model = load_model(local.path)

With a budget of two checkpoints, one is held while the next is fetched in the background: 150 revisions need the room
of two. Several processes, of one study or of several, may share a cache: each revision is fetched once, nobody evicts
what another one holds. Only what the depot itself fetched is ever deleted: a local folder, or a revision that lies in
the user's own cache of the hub client, is handed on as it is. It refuses to know what is done with a checkpoint.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path

from lccp_interp.checkpoints import hub
from lccp_interp.checkpoints.hub import COMMIT, HubFile, Stopped
from lccp_interp.checkpoints.shelf import (
    MANIFEST,
    Lock,
    Shelf,
    default_cache,
    recall_revisions,
    shelves,
    stock,
)
from lccp_interp.schema import Checkpoint, LccpError

_PARALLEL_FILES = 4
_POLL_SECONDS = (0.05, 0.3)
_NOTE_SECONDS = 5.0


class Depot:
    """Room for the weights of checkpoints that come from a hub.

    Args:
        cache: folder of the depot; None is `LCCP_CACHE`, else `~/.cache/lccp_interp`.
        budget_bytes: room for weights in that folder; None evicts only when the disk is full. Configs and tokenizers
            are not counted: they stay, those that revisions share once.
        prefetch: fetch the next expected checkpoint while one is held, where the budget has room for it.
        allow_pickle: whether pickled weights will do where there are no others.
        trust_remote_code: whether the Python files of a revision are fetched too.
        note: told in words what is fetched.

    Example:
        >>> with Depot(budget_bytes=40 * 10**9) as depot, depot.hold(checkpoint) as local:   # doctest: +SKIP
        ...     model = load_model(local.path)
    """

    def __init__(
        self,
        *,
        cache: str | Path | None = None,
        budget_bytes: int | None = None,
        prefetch: bool = True,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> None:
        if budget_bytes is not None and budget_bytes <= 0:
            raise LccpError(f"a disk budget must be more than 0 bytes, got {budget_bytes}")
        self.cache = default_cache() if cache is None else Path(cache)
        self.budget_bytes, self._prefetch = budget_bytes, prefetch
        self._allow_pickle, self._trust_remote_code = allow_pickle, trust_remote_code
        self._note = note or (lambda text: None)
        self._expected: list[Checkpoint] = []
        self._held: list[Path] = []
        self._ahead: threading.Thread | None = None
        self._ahead_of: Path | None = None
        self._closed = threading.Event()

    def expect(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Say in which order checkpoints will be held, so that the next one can be fetched ahead.

        Raises:
            LccpError: the budget is too small for one of them.
        """
        self._expected = list(checkpoints)
        for checkpoint in self._expected:
            if (checkpoint.path / MANIFEST).is_file():
                self._refuse_larger(Shelf.read(checkpoint.path))

    @contextlib.contextmanager
    def hold(self, checkpoint: Checkpoint) -> Iterator[Checkpoint]:
        """The checkpoint with its folder whole as long as the block lasts; fetched and verified if it is not there.

        A checkpoint without a source is a local folder and is handed on untouched.

        Raises:
            LccpError: the hub cannot be reached, what it gives is damaged, the budget is too small, the disk is full.
        """
        shelf = self._shelf(checkpoint)
        if shelf is None:
            yield checkpoint
            return
        if self._ahead is not None and self._ahead_of == shelf.path:
            self._ahead.join()
        lock = self._bring(shelf, wait=True)
        assert lock is not None
        self._held.append(shelf.path)
        try:
            self._start_ahead(checkpoint)
            yield replace(checkpoint, path=shelf.path)
        finally:
            shelf.mark_used()
            self._held.remove(shelf.path)
            lock.release()

    def close(self) -> None:
        """Stop fetching ahead; what was fetched stays for the next time."""
        self._closed.set()
        if self._ahead is not None:
            self._ahead.join()

    def __enter__(self) -> Depot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shelf(self, checkpoint: Checkpoint) -> Shelf | None:
        """Where a checkpoint goes in this depot; None if it has its own folder."""
        if checkpoint.source is None:
            return None
        known = checkpoint.path / MANIFEST
        if checkpoint.path.is_dir() and not known.is_file():
            return None
        if known.is_file() and checkpoint.path.parents[1].resolve() == self.cache.resolve():
            shelf = Shelf.read(checkpoint.path)
        else:
            # Found on another machine, or into another cache: the commit says what to fetch.
            shelf = self._restock(checkpoint)
        if checkpoint.hash is not None and shelf.hash != checkpoint.hash:
            raise LccpError(
                f"checkpoint {checkpoint.name!r} ({checkpoint.source}) has other weights or another config than when "
                f"it was found ({shelf.hash[:12]}... instead of {checkpoint.hash[:12]}...); find it again"
            )
        return shelf

    def _restock(self, checkpoint: Checkpoint) -> Shelf:
        repository, _, revision = str(checkpoint.source).partition("@")
        commit = checkpoint.path.name
        if not COMMIT.fullmatch(commit):
            known = recall_revisions(self.cache, repository) if hub.is_offline() else hub.list_revisions(repository)
            commit = known.get(revision, revision)
        return stock(
            self.cache,
            repository,
            commit,
            allow_pickle=self._allow_pickle,
            trust_remote_code=self._trust_remote_code,
        )

    def _start_ahead(self, current: Checkpoint) -> None:
        """Fetch in the background what follows `current`."""
        names = [checkpoint.name for checkpoint in self._expected]
        if not self._prefetch or current.name not in names or (self._ahead is not None and self._ahead.is_alive()):
            return
        for checkpoint in self._expected[names.index(current.name) + 1 :]:
            known = checkpoint.path / MANIFEST
            if checkpoint.source is not None and known.is_file():
                self._ahead_of = checkpoint.path
                self._ahead = threading.Thread(target=self._fetch_ahead, args=(checkpoint,), daemon=True)
                self._ahead.start()
                return

    def _fetch_ahead(self, checkpoint: Checkpoint) -> None:
        # What goes wrong here goes wrong again, and is said, when the checkpoint's turn comes.
        with contextlib.suppress(LccpError, OSError, Stopped):
            shelf = self._shelf(checkpoint)
            lock = None if shelf is None else self._bring(shelf, wait=False)
            if lock is not None:
                lock.release()

    def _bring(self, shelf: Shelf, *, wait: bool) -> Lock | None:
        """Make a shelf whole and lock it against eviction; None if that would mean waiting and `wait` is false."""
        self._refuse_larger(shelf)
        lock = shelf.lock()
        while True:
            if lock.take(alone=False):
                if shelf.is_whole():
                    return lock
                lock.release()
            if lock.take(alone=True):
                try:
                    holders = [] if shelf.is_whole() else self._make_room(shelf)
                    if not holders:
                        if not shelf.is_whole():
                            self._download(shelf, ahead=not wait)
                        # Changing the lock leaves a moment without it; look again.
                        continue
                finally:
                    lock.release()
                if wait:
                    self._refuse_waiting_for_myself(shelf, holders)
            if not wait:
                return None
            time.sleep(random.uniform(*_POLL_SECONDS))

    def _refuse_larger(self, shelf: Shelf) -> None:
        if self.budget_bytes is not None and shelf.n_bytes > self.budget_bytes:
            raise LccpError(
                f"a disk budget of {self.budget_bytes} bytes is too small: the weights of "
                f"{shelf.repository}@{shelf.commit[:12]} alone have {shelf.n_bytes} (one is fetched while another is "
                f"held with {2 * shelf.n_bytes}); give more with --disk-budget"
            )

    def _refuse_waiting_for_myself(self, shelf: Shelf, holders: Sequence[Path]) -> None:
        fetching = self._ahead is not None and self._ahead.is_alive()
        if not fetching and holders and set(holders) <= set(self._held):
            raise LccpError(
                f"a disk budget of {self.budget_bytes} bytes has no room for {shelf.repository}@{shelf.commit[:12]} "
                f"({shelf.n_bytes} bytes) beside the {len(holders)} checkpoints that are held; give more with "
                "--disk-budget"
            )

    def _make_room(self, shelf: Shelf) -> list[Path]:
        """Evict until the weights fit the budget and the disk, and reserve their room; else who holds too much.

        The caller holds the shelf's lock alone. What was held longest ago goes first; what was fetched and not held
        yet goes last.
        """
        gate = Lock(self.cache / ".locks" / "budget")
        gate.take(alone=True, wait=True)
        try:
            others = [other for other in shelves(self.cache) if other.path != shelf.path and other.bytes_taken]
            taken = sum(other.bytes_taken for other in others)
            coming = sum(other.bytes_taken - other.bytes_here for other in others)
            lacking = shelf.n_bytes - shelf.bytes_here + coming - shutil.disk_usage(self.cache).free
            if self.budget_bytes is not None:
                lacking = max(lacking, taken + shelf.n_bytes - self.budget_bytes)
            holders = []
            for other in sorted(others, key=lambda other: (not other.was_used(), other.last_used())):
                if lacking <= 0:
                    break
                lock = other.lock()
                if not lock.take(alone=True):
                    holders.append(other.path)
                    continue
                lacking -= other.bytes_taken
                other.evict()
                lock.release()
            if lacking <= 0:
                shelf.reserve()
                return []
            if not holders:
                raise LccpError(
                    f"the disk of {self.cache} is too full for {shelf.repository}@{shelf.commit[:12]}: its weights "
                    f"have {shelf.n_bytes} bytes, {lacking} more are needed; make room, or give another folder with "
                    "--cache"
                )
            return holders
        finally:
            gate.release()

    def _download(self, shelf: Shelf, *, ahead: bool) -> None:
        """Fetch the weights that are not there, several files at a time, and verify them."""
        missing = [file for file in shelf.large if not _is_there(shelf, file)]
        total, done = sum(file.size for file in missing), [shelf.part(file) for file in missing]
        arrived = sum(part.stat().st_size for part in done if part.exists())
        gate = threading.Lock()
        where = f"{shelf.repository}@{shelf.commit[:12]}"
        failed = threading.Event()

        def advance(n_bytes: int) -> None:
            nonlocal arrived
            with gate:
                arrived += n_bytes

        def fetch(file: HubFile) -> None:
            try:
                hub.download(
                    shelf.repository,
                    shelf.commit,
                    file,
                    shelf.path / file.name,
                    part=shelf.part(file),
                    stop=lambda: failed.is_set() or (ahead and self._closed.is_set()),
                    on_bytes=advance,
                )
            except BaseException:
                failed.set()
                raise

        self._note(f"fetching {where}: {total / 1e9:.2f} GB")
        pool = ThreadPoolExecutor(max(min(_PARALLEL_FILES, len(missing)), 1))
        try:
            jobs = [pool.submit(fetch, file) for file in missing]
            # Said from this thread, whoever listens.
            while _unfinished(jobs):
                self._note(f"fetching {where}: {arrived / 1e9:.2f} of {total / 1e9:.2f} GB")
            faults = [fault for job in jobs if (fault := job.exception()) is not None]
        finally:
            # Also for Ctrl-C, which lands here: the threads stop after the chunk they are at.
            failed.set()
            pool.shutdown()
        # One file's fault stops the others; say the fault, not the stopping.
        for fault in sorted(faults, key=lambda fault: isinstance(fault, Stopped)):
            raise fault
        shelf.mark_verified()


def _unfinished(jobs: Sequence[Future[None]]) -> bool:
    """Whether jobs still run after a while."""
    return bool(wait_for(jobs, timeout=_NOTE_SECONDS).not_done)


def _is_there(shelf: Shelf, file: HubFile) -> bool:
    """Whether a weight file lies there under its own name, which it gets only after its hash was checked."""
    path = shelf.path / file.name
    return path.is_file() and path.stat().st_size == file.size
