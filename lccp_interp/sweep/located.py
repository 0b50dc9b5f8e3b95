"""Where the checkpoints of a run are now: found again, with the very weights that were scored, and loaded from there.

For whatever asks a run's checkpoints again (probes, ablations). It refuses to know what is asked. Cost: one hash of
each checkpoint's files; of one that comes from a hub, its download when its turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lccp_interp.checkpoints import Depot, checkpoint_hash, common_tokenizer, find_checkpoints
from lccp_interp.checkpoints.hub import COMMIT
from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import Run

if TYPE_CHECKING:
    from lccp_interp.capture.model import HookedModel


@dataclass(frozen=True)
class Access:
    """How checkpoints are come by when a run asks them again.

    Attributes:
        trust_remote_code: as in `load_model`.
        allow_pickle: as in `load_model`.
        disk_budget_bytes: room for weights of a hub; None evicts only when the disk is full.
    """

    trust_remote_code: bool = False
    allow_pickle: bool = False
    disk_budget_bytes: int | None = None

    @property
    def trust(self) -> dict[str, Any]:
        """What finding and loading take."""
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}


def find_run_checkpoints(
    run: Run, names: Sequence[str] | None, folders: Sequence[str | Path] | None, access: Access | None = None
) -> list[Checkpoint]:
    """Checkpoints of a run, found on disk, with the weights that the run knows.

    Args:
        run: an opened run.
        names: of the checkpoints asked for; None means all.
        folders: where the checkpoints are now, if not where run.json says: folders of checkpoints, matched by name.
        access: how they are come by; None for safetensors and no code of their own.

    Raises:
        LccpError: a name that the run does not have, a checkpoint that is not there or has other weights, or several
            tokenizers.

    Example:
        >>> find_run_checkpoints(Run.open("runs/demo"), ["18-lccp-2.62M"], None)   # doctest: +SKIP
    """
    trust = (access or Access()).trust
    known = {row["name"]: row for row in run.checkpoints.iter_rows(named=True)}
    for name in names or ():
        if name not in known:
            raise LccpError(f"{run.path} has no checkpoint {name!r}; it has {', '.join(known)}")
    elsewhere: dict[str, Path] = {}
    if folders:
        # Folders that were moved out of their trajectory may not tell their tokens; the run does.
        places = [place for folder in map(Path, folders) for place in (folder, *folder.glob("*/"))]
        tokens = {name: row["tokens_seen"] for name, row in known.items() if name in {place.name for place in places}}
        elsewhere = {found.name: found.path for found in find_checkpoints(list(folders), tokens=tokens, **trust)}
    chosen = []
    for name, row in known.items():
        if names is not None and name not in names:
            continue
        path = elsewhere.get(name, Path(row["path"]))
        if not path.is_dir() and row.get("source") is not None:
            # Found on another machine, or into a cache that is gone: its config and tokenizer, and no weights.
            (again,) = find_checkpoints([_pinned(row["source"], path)], **trust)
            if row["hash"] is not None and again.hash != row["hash"]:
                raise LccpError(
                    f"checkpoint {name!r} ({row['source']}) has other weights now than those scored in {run.path} "
                    f"({row['hash'][:12]}...); score it into a new run"
                )
            path = again.path
        if not path.is_dir():
            raise LccpError(
                f"checkpoint {name!r} of {run.path} is no longer at {path}; say where it is with --checkpoints DIR"
            )
        # What comes from a hub is verified when its turn comes.
        source, branch = row.get("source"), row.get("branch")
        if source is None and row["hash"] is not None and checkpoint_hash(path) != row["hash"]:
            raise LccpError(
                f"checkpoint {name!r} at {path} has other weights than those scored in {run.path} "
                f"({row['hash'][:12]}...); restore it, or score it into a new run"
            )
        chosen.append(
            Checkpoint(name, path, row["tokens_seen"], row["stage"], row["stage_tokens"], row["hash"], source, branch)
        )
    if not chosen:
        raise LccpError(f"{run.path} has no checkpoints; score some first (`lccp score`)")
    common_tokenizer(chosen)
    return chosen


def _pinned(source: str, path: Path) -> str:
    """The revision of a hub by the commit that was scored: its name may mean another one by now."""
    repository, _, revision = source.partition("@")
    return f"{repository}@{path.name if COMMIT.fullmatch(path.name) else revision}"


def load_located(
    checkpoint: Checkpoint, *, device: str = "auto", dtype: str = "auto", access: Access | None = None
) -> HookedModel:
    """Load a checkpoint of a run; one that comes from a hub is fetched and verified first, where it was found.

    Args:
        checkpoint: from `find_run_checkpoints`.
        device, dtype: as in `load_model`.
        access: how it is come by; None for safetensors and no code of its own.

    Raises:
        LccpError: as `Depot.hold` and `load_model`.

    Example:
        >>> model = load_located(find_run_checkpoints(run, None, None)[-1])   # doctest: +SKIP
    """
    from lccp_interp.capture.model import load_model

    access = access or Access()
    cache = None if checkpoint.source is None else checkpoint.path.parents[1]
    depot = Depot(cache=cache, budget_bytes=access.disk_budget_bytes, **access.trust)
    with depot, depot.hold(checkpoint) as local:
        return replace(load_model(local.path, device=device, dtype=dtype, **access.trust), name=checkpoint.name)
