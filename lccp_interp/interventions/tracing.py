"""From the name of a head to what feeds it, in one call: in the checkpoints of a run, of a trajectory, or in one.

A run's own cases are asked; checkpoints without a run are asked needles in the bundled language, one haystack each.
Nothing is written. This module knows runs and checkpoints; it refuses to know how an edge is measured (`circuits`), and
imports no torch before a checkpoint is loaded. Cost per checkpoint: one load, and `circuits.head_graph`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lccp_interp.interventions.choice import chosen_cases
from lccp_interp.interventions.heads import Head
from lccp_interp.schema import Case, Checkpoint, LccpError
from lccp_interp.store import Run
from lccp_interp.sweep import Access, Progress, find_run_checkpoints, load_located

if TYPE_CHECKING:
    from lccp_interp.capture.model import HookedModel
    from lccp_interp.interventions.graph import HeadGraph

LENGTH = 256
"""Tokens of a case where there is no run that says."""

DEPTHS = (0.0, 50.0, 100.0)
"""Of the needles of such cases, percent of the context."""

N_CASES = 12


def trace_circuit(
    source: str | Path | Run,
    heads: Sequence[Head],
    *,
    checkpoints: str | Sequence[str] = "last",
    length: int | None = None,
    n_cases: int = N_CASES,
    metric: str = "needle_mass",
    kind: str = "resample",
    depth: int = 1,
    max_feeders: int = 4,
    folders: Sequence[str | Path] | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    access: Access | None = None,
    progress: Progress | None = None,
) -> list[HeadGraph]:
    """Which earlier heads feed some heads, at some checkpoints.

    Args:
        source: a run, opened or its folder; or a checkpoint, or folder of checkpoints, or repository on a hub.
        heads: (layer, head).
        checkpoints: `all`, `last`, or names.
        length: of the cases in tokens; None means the run's longest, or `LENGTH` without a run.
        n_cases: at most so many, spread evenly over depths.
        metric, kind, depth, max_feeders: as in `head_graph`.
        folders: where a run's checkpoints are now, if not where run.json says.
        seed: of needles and haystacks where there is no run.
        device, dtype: as in `load_model`.
        access: how checkpoints of a hub, with pickles or code of their own are come by; see `Access`.
        progress: told (tokens done, tokens in all, message).

    Returns:
        One graph per checkpoint, in order of tokens.

    Raises:
        LccpError: a source, checkpoints, a length or heads that are not there, or what `head_graph` and loading raise.

    Example:
        >>> trace_circuit("runs/demo", [(2, 2)])[0].strongest().table()         # doctest: +SKIP
        >>> trace_circuit("data/trajectory", [(3, 6)], checkpoints="all")       # doctest: +SKIP
    """
    from lccp_interp.capture.prefill import release_memory
    from lccp_interp.capture.selfcheck import self_check
    from lccp_interp.interventions.circuits import head_graph

    if n_cases < 1:
        raise LccpError(f"cases must be at least 1, got {n_cases}")
    run = source if isinstance(source, Run) else Run.open(source) if (Path(source) / "run.json").is_file() else None
    cases = None if run is None else chosen_cases(run, length, n_cases)
    chosen = _checkpoints(source, run, checkpoints, folders, access or Access())
    report = progress or (lambda done, total, message: None)
    graphs: list[HeadGraph] = []
    done = 0
    for index, checkpoint in enumerate(chosen):
        model = load_located(checkpoint, device=device, dtype=dtype, access=access)
        if not index:
            self_check(model).require()
        if cases is None:
            cases = _own_cases(model, LENGTH if length is None else length, n_cases, seed)
        total = len(chosen) * len(cases) * cases[0].length * depth

        def advance(n_read: int, name: str = checkpoint.name, total: int = total) -> None:
            nonlocal done
            done += n_read
            report(done, total, name)

        graph = head_graph(
            model,
            cases,
            heads,
            metric=metric,
            kind=kind,
            depth=depth,
            max_feeders=max_feeders,
            on_tokens=advance,
        )
        graphs.append(replace(graph, checkpoint=checkpoint.name))
        # Two checkpoints of a large model may not fit side by side.
        del model
        release_memory()
    return graphs


def _checkpoints(
    source: str | Path | Run,
    run: Run | None,
    names: str | Sequence[str],
    folders: Sequence[str | Path] | None,
    access: Access,
) -> list[Checkpoint]:
    from lccp_interp.checkpoints import find_checkpoints

    if run is not None:
        known = run.checkpoints["name"].to_list()
        wanted = None if names == "all" else known[-1:] if names == "last" else _listed(names)
        return find_run_checkpoints(run, wanted or None, folders, access)
    assert not isinstance(source, Run)
    found = find_checkpoints([source], **access.trust)
    if names in ("all", "last"):
        return found if names == "all" else found[-1:]
    for name in _listed(names):
        if name not in [checkpoint.name for checkpoint in found]:
            raise LccpError(f"{source} has no checkpoint {name!r}; it has {', '.join(own.name for own in found)}")
    return [checkpoint for checkpoint in found if checkpoint.name in _listed(names)]


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _own_cases(model: HookedModel, length: int, n_cases: int, seed: int) -> list[Case]:
    """Needles in the bundled language, depth by depth in turn."""
    from lccp_interp.tasks.niah import NiahGrid

    samples = -(-n_cases // len(DEPTHS))
    cases = NiahGrid(lengths=(length,), depths=DEPTHS, samples=samples, seed=seed).build(model.tokenizer)
    return sorted(cases, key=lambda case: (case.sample, case.depth_fraction))[:n_cases]
