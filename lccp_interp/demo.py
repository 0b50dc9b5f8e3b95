"""The demo: the whole study on the bundled trajectory, as `lccp demo` runs it.

Stage after stage joins one run folder: head scores of all checkpoints, then (unless in a hurry) the interference grid,
corpus perplexity and the probe after light fine-tuning on fewer of them. Each stage is a call that a study of one's own
would make; the constants below are all that is special. Interrupted, it goes on where it was. It refuses to know what
comes out. Cost: about three minutes for the heads on two cores, about as much again for the rest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from lccp_interp.checkpoints import bundled_trajectory
from lccp_interp.schema import Checkpoint
from lccp_interp.store import Run

Progress = Callable[[int, int, str], None]
Bar = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress bar for a stage of this name."""

DISTANCES, INTERFERENCES = (64, 256, 1024), (0, 128, 512, 1024, 2048)
CORPORA, CORPUS_LENGTH, CORPUS_DOCUMENTS = ("questions", "repeats", "stories"), 2048, 4
PROBE_TASKS = ("longbio", "ruler-niah_single_2", "ruler-niah_multikey_1", "ruler-qa", "mrcr")
PROBE_LENGTHS = "512-1024"
N_PROBED, N_INTERFERED = 8, 4
"""Checkpoints from the base to the last that are probed, and asked over interference: evenly spread."""


def run_demo(
    out: str | Path,
    *,
    samples: int = 4,
    seed: int = 0,
    device: str = "auto",
    quick: bool = False,
    bar: Bar,
    note: Callable[[str], None] = lambda text: None,
) -> Run:
    """Score and probe the bundled trajectory into the run folder `out`.

    Args:
        out: the run folder, made or resumed.
        samples: needles, with a haystack each, per length and depth.
        seed: of needles, haystacks, items and fine-tuning.
        device: as in `load_model`.
        quick: head scores only.
        bar: opens a progress bar for a stage.
        note: told in one line what is left out.

    Returns:
        The run, opened for reading.

    Raises:
        LccpError: as the stages' own calls.

    Example:
        >>> import contextlib
        >>> run = run_demo("runs/demo", bar=lambda name: contextlib.nullcontext(print))   # doctest: +SKIP
    """
    from lccp_interp.sweep import score

    checkpoints = bundled_trajectory()
    with bar("scoring") as progress:
        run = score(checkpoints, out, samples=samples, seed=seed, device=device, progress=progress)
    if quick:
        return run
    later = from_base(checkpoints)
    _interference(run, spread(later, N_INTERFERED), samples, seed, device, bar)
    _corpora(run, later, seed, device, bar)
    _probe(run, spread(later, N_PROBED), seed, device, bar, note)
    return Run.open(out)


def _interference(run: Run, checkpoints: list[Checkpoint], samples: int, seed: int, device: str, bar: Bar) -> None:
    from lccp_interp.dynamics.tables import INTERFERENCE_FOLDER
    from lccp_interp.sweep import Execution, score_grid
    from lccp_interp.tasks.interference import InterferenceGrid

    grid = InterferenceGrid(distances=DISTANCES, interferences=INTERFERENCES, samples=samples, seed=seed)
    with bar("interference") as progress:
        score_grid(
            checkpoints,
            run.path / INTERFERENCE_FOLDER,
            grid,
            metrics=["retrieval"],
            execution=Execution(device=device),
            progress=progress,
        )


def _corpora(run: Run, checkpoints: list[Checkpoint], seed: int, device: str, bar: Bar) -> None:
    from lccp_interp.behaviour.corpora import probe_corpora

    with bar("reading") as progress:
        probe_corpora(
            run,
            CORPORA,
            length=CORPUS_LENGTH,
            documents=CORPUS_DOCUMENTS,
            checkpoints=[checkpoint.name for checkpoint in checkpoints],
            folders=[checkpoint.path for checkpoint in checkpoints],
            device=device,
            seed=seed,
            progress=progress,
        )


def _probe(
    run: Run, checkpoints: list[Checkpoint], seed: int, device: str, bar: Bar, note: Callable[[str], None]
) -> None:
    from lccp_interp.behaviour.mixture import Length
    from lccp_interp.behaviour.probe import ProbeStudy, probe
    from lccp_interp.behaviour.sft import SftRecipe

    if importlib.util.find_spec("trl") is None:
        note("without fine-tuning: the packages trl, peft and datasets are missing (install lccp_interp[train])")
        return
    study = ProbeStudy(tasks=PROBE_TASKS, lengths=(Length.parse(PROBE_LENGTHS),), sft=SftRecipe(seed=seed), seed=seed)
    folders = [checkpoint.path for checkpoint in checkpoints]
    names = [checkpoint.name for checkpoint in checkpoints]
    with bar("probing") as progress:
        probe(run, study, checkpoints=names, folders=folders, device=device, progress=progress)
    with bar("heads after") as progress:
        ends = [names[0], names[-1]]
        probe(run, study, checkpoints=ends, folders=folders, device=device, heads=True, progress=progress)


def from_base(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints of the last stage, behind the last one before it.

    Example:
        >>> stages = [Checkpoint(str(i), Path(), i, "pretrain" if i < 3 else "lccp") for i in range(5)]
        >>> [checkpoint.name for checkpoint in from_base(stages)]
        ['2', '3', '4']
    """
    earlier = [i for i, checkpoint in enumerate(checkpoints) if checkpoint.stage != checkpoints[-1].stage]
    return checkpoints[earlier[-1] if earlier else 0 :]


def spread(checkpoints: list[Checkpoint], n: int) -> list[Checkpoint]:
    """`n` of the checkpoints, evenly over their order, with the first and the last.

    Example:
        >>> [checkpoint.name for checkpoint in spread([Checkpoint(str(i), Path(), i) for i in range(10)], 4)]
        ['0', '3', '6', '9']
    """
    if len(checkpoints) <= n:
        return checkpoints
    return [checkpoints[round(i * (len(checkpoints) - 1) / (n - 1))] for i in range(n)]
