"""What a sweep tells while it works: tokens done for the progress bar, and a line per event in RUN/log.txt.

The log is for people: nothing reads it back, and where it cannot be written the work goes on. Each line is written
whole and the file is only ever appended to, by one driver after another. It refuses to know who does the work.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lccp_interp.sweep.execution import Progress
from lccp_interp.sweep.schedule import Unit

LOG = "log.txt"


class Ledger:
    """Tokens of all units, those done, those under way; tells the progress bar and the log.

    Tokens of a unit under way count as they are reported; if its worker is lost they are taken back.
    """

    def __init__(self, path: Path, tokens: Mapping[Unit, int], done: set[Unit], report: Progress) -> None:
        """A sweep over `tokens` per unit, of which `done` are there already; its run folder is `path`."""
        self._log, self._report = path / LOG, report
        self._tokens, self._open = tokens, set(tokens) - done
        self._total = sum(tokens.values())
        self._held = self._total - sum(tokens[unit] for unit in self._open)
        self._under_way: dict[Unit, int] = {}
        self._at_first, self._began = self._held, time.monotonic()
        self._is_new = True

    @property
    def n_open(self) -> int:
        """Units that are not done."""
        return len(self._open)

    def tell(self, message: str, *, whole: bool = False) -> None:
        """Tell the progress bar what is going on; `whole` that all is done."""
        done = self._total if whole else self._held + sum(self._under_way.values())
        self._report(done, self._total, message)

    def begin(self, unit: Unit) -> None:
        """A worker begins with a unit. The first one starts the clock: what went before was starting workers."""
        if self._is_new:
            self._began, self._is_new = time.monotonic(), False
        self.tell(unit.checkpoint)

    def advance(self, unit: Unit, n_tokens: int) -> None:
        """Some tokens of a unit are done."""
        if unit in self._open:
            self._under_way[unit] = min(self._tokens[unit], self._under_way.get(unit, 0) + n_tokens)
            self.tell(unit.checkpoint)

    def take_back(self, unit: Unit) -> None:
        """The unit has to be done again."""
        self._under_way.pop(unit, None)

    def finish(self, unit: Unit) -> None:
        """The unit is done."""
        self._under_way.pop(unit, None)
        if unit in self._open:
            self._open.remove(unit)
            self._held += self._tokens[unit]
            self.tell(unit.checkpoint)

    def state(self) -> str:
        """How far the sweep is, and how long it may still take at the pace of this call."""
        n_units = len(self._tokens)
        parts = [f"{n_units - self.n_open} of {n_units} units", f"{self._held / max(1, self._total):.0%}"]
        if eta_s := self.eta_s():
            parts.append(f"ETA {timedelta(seconds=round(eta_s))}")
        return ", ".join(parts)

    def eta_s(self) -> float | None:
        """Seconds that the rest may take at the pace of this call; None before anything was done."""
        done = self._held - self._at_first
        return (time.monotonic() - self._began) * (self._total - self._held) / done if done > 0 else None

    def log(self, event: str) -> None:
        """Append a line to the log."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        line = " ".join(event.split())
        with contextlib.suppress(OSError), open(self._log, "a", encoding="utf-8") as handle:
            handle.write(f"{stamp} {line}\n")
