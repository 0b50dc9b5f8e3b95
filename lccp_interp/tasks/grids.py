"""What every grid of cases has in common: the little that a sweep has to know of a task.

A grid says what a study asks (plain JSON, so that runs can be told apart), how many cases that makes, and builds them
for a tokenizer. Whatever has these three can be scored by `lccp_interp.sweep.score_grid`. This module refuses to know
any task; it costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lccp_interp.schema import Case


class CaseGrid(Protocol):
    """A grid of cases, such as `NiahGrid`; usually a frozen dataclass that checks its fields when it is made."""

    @property
    def n_cases(self) -> int:
        """How many cases `build` makes."""
        ...

    def config(self) -> dict[str, Any]:
        """The grid as plain JSON values, long texts by their hashes.

        `task` names the task. Equal grids have equal configs and unequal grids unequal ones: a run folder holds one
        study, and the config is what tells studies apart. A setting that came later is entered only where it is not
        at its default, so that older runs can still be resumed.
        """
        ...

    def build(self, tokenizer: PreTrainedTokenizerBase) -> list[Case]:
        """All cases, the same ones in the same order on every call; their ids are all different.

        Neighbours in that order should begin alike: prefixes are shared within shards of neighbours.

        Raises:
            LccpError: what cannot be built, in one line.
        """
        ...
