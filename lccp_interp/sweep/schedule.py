"""Which worker does which unit: a plain data structure without processes, clocks or files.

A worker stays with the checkpoint it has loaded; one that has none takes a checkpoint that nobody works on, and joins
others at theirs only where so many units wait that loading it a second time pays. The unit of a worker that is lost is
given to another one, a few times at most. A checkpoint that fails is given up with the units it still has, the others
go on. It refuses to know what a unit is made of. Cost: a few comparisons per unit and checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

TRIES = 3
"""Workers that a unit may cost: one that kills its workers is named in the end, not tried for ever."""


class Unit(NamedTuple):
    """A shard of the cases, for one checkpoint."""

    checkpoint: str
    shard: int

    def __str__(self) -> str:
        return f"{self.checkpoint}/{self.shard}"


class Schedule:
    """The open units of a sweep, and who does what.

    Every unit is waiting, running on one worker, done, or given up with its checkpoint; none is ever in two places.

    Example:
        >>> schedule = Schedule({"a": [0, 1], "b": [0]})
        >>> schedule.next(1), schedule.next(2)
        (Unit(checkpoint='a', shard=0), Unit(checkpoint='b', shard=0))
        >>> schedule.lose(2, "killed")          # its unit waits again
        True
        >>> schedule.finish(1), schedule.next(1)
        (Unit(checkpoint='a', shard=0), Unit(checkpoint='a', shard=1))
    """

    def __init__(self, units: Mapping[str, Sequence[int]], *, tries: int = TRIES) -> None:
        """Take over the open shards of each checkpoint, checkpoints in the order they should be done."""
        self._waiting = {name: deque(shards) for name, shards in units.items() if shards}
        self._tries, self._lost = tries, dict[Unit, int]()
        self.running: dict[int, Unit] = {}
        self.loaded: dict[int, str] = {}
        self.failures: dict[str, str] = {}

    @property
    def n_waiting(self) -> int:
        """Units that nobody does yet."""
        return sum(map(len, self._waiting.values()))

    @property
    def is_open(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.running) or self.n_waiting > 0

    def next(self, worker: int, *, load_units: float = 1.0) -> Unit | None:
        """The next unit of an idle worker, which is then running; None if it should wait.

        Args:
            worker: any number of its own.
            load_units: what loading a checkpoint costs, in units. A worker joins others at theirs only where at least
                as many units wait for each of them.
        """
        assert worker not in self.running, f"worker {worker} still does {self.running[worker]}"
        name = self._choose(worker, load_units)
        if name is None:
            return None
        unit = Unit(name, self._waiting[name].popleft())
        self.running[worker], self.loaded[worker] = unit, name
        return unit

    def _choose(self, worker: int, load_units: float) -> str | None:
        waiting = [name for name, shards in self._waiting.items() if shards]
        if self.loaded.get(worker) in waiting:
            return self.loaded[worker]
        crews = {name: sum(other == name for other in self.loaded.values()) for name in waiting}
        for name in waiting:
            if crews[name] == 0:
                return name
        share = {name: len(self._waiting[name]) / crews[name] for name in waiting}
        busiest = max(waiting, key=lambda name: share[name], default=None)
        return busiest if busiest is not None and share[busiest] >= load_units else None

    def finish(self, worker: int) -> Unit:
        """The worker has done its unit."""
        return self.running.pop(worker)

    def fail(self, worker: int, reason: str) -> Unit:
        """The worker's unit cannot be done: its checkpoint is given up, what others do of it is let finish."""
        unit = self.running.pop(worker)
        self._give_up(unit, reason)
        return unit

    def lose(self, worker: int, reason: str) -> bool:
        """The worker is gone; True if a unit of its waits again, False if it had none or lost its last try."""
        self.loaded.pop(worker, None)
        unit = self.running.pop(worker, None)
        if unit is None or unit.checkpoint in self.failures:
            return False
        self._lost[unit] = self._lost.get(unit, 0) + 1
        if self._lost[unit] >= self._tries:
            n_lost = self._lost[unit]
            self._give_up(unit, f"shard {unit.shard}: {n_lost} workers were lost with it, the last one: {reason}")
            return False
        self._waiting.setdefault(unit.checkpoint, deque()).appendleft(unit.shard)
        return True

    def tries(self, unit: Unit) -> int:
        """Workers that were lost with this unit."""
        return self._lost.get(unit, 0)

    def _give_up(self, unit: Unit, reason: str) -> None:
        self.failures.setdefault(unit.checkpoint, reason)
        self._waiting.pop(unit.checkpoint, None)
