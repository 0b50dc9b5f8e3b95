"""lm-evaluation-harness on every checkpoint of a run, through its Python API; its results join the run's probes.

For each checkpoint the harness gets the loaded model and writes, under `lm_eval/` in the run folder, its results in its
own format, and the samples it logged; `lccp_interp.imports` reads the results as it reads anybody's. A checkpoint whose
results are there is not evaluated again. This module refuses to know tasks and metrics: they are the harness's. Cost:
one load per checkpoint, and what the tasks cost. Needs the extra `eval`; most tasks need the network once, for their
data.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from lccp_interp.imports import import_probes
from lccp_interp.schema import LccpError
from lccp_interp.store import Run, config_hash, file_stem, replacing
from lccp_interp.sweep import Access, find_run_checkpoints, load_located

if TYPE_CHECKING:
    from lccp_interp.capture.model import HookedModel


def probe_with_lm_eval(
    run: str | Path | Run,
    tasks: Sequence[str],
    *,
    checkpoints: Sequence[str] | None = None,
    folders: Sequence[str | Path] | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    access: Access | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> pl.DataFrame:
    """Run tasks of lm-evaluation-harness on the checkpoints of a run and add the results to it.

    Args:
        run: a run folder; its checkpoints are loaded from where run.json says they are.
        tasks: names of the harness's tasks or groups.
        checkpoints, folders: as in `probe`.
        include_path: folder with task definitions of your own.
        num_fewshot: examples in front of each question; None means each task's own number.
        limit: only so many documents per task, for a trial; it is part of the result's name.
        batch_size: documents per forward pass.
        device, dtype: as in `load_model`.
        access: how checkpoints of a hub, with pickles or code of their own are come by; see `Access`.
        seed: of few-shot examples and sampling.
        progress: told (checkpoints done, checkpoints in all, name).

    Returns:
        The rows of the `probes` table that these tasks gave, scores on the harness's own scales.

    Raises:
        LccpError: lm-eval is not installed, it knows no such task or fails on one, or what `probe` says of checkpoints.
            Finished checkpoints stay.

    Example:
        >>> probe_with_lm_eval("runs/mine", ["niah_single_1"], limit=20)   # doctest: +SKIP
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    if not tasks:
        raise LccpError("--lm-eval names no task; give some, separated by commas (lm-eval ls tasks lists them)")
    chosen = find_run_checkpoints(opened, checkpoints, folders, access)
    options: dict[str, Any] = {"tasks": sorted(tasks), "num_fewshot": num_fewshot, "limit": limit, "seed": seed}
    manager = _task_manager(tasks, include_path)
    rows = []
    for number, checkpoint in enumerate(chosen):
        if progress is not None:
            progress(number, len(chosen), checkpoint.name)
        folder = opened.path / "lm_eval" / file_stem(checkpoint.name)
        path = folder / f"results_{config_hash(options)[:8]}.json"
        if not path.is_file():
            model = load_located(checkpoint, device=device, dtype=dtype, access=access)
            found = _evaluate(model, manager, options, batch_size)
            del model
            found["model_name"] = checkpoint.name
            _write(found, path)
        rows.append(import_probes(opened.path, "lm-eval", path))
    if progress is not None:
        progress(len(chosen), len(chosen), "done")
    return pl.concat(rows)


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LccpError("--lm-eval needs the package lm-eval; install lccp_interp[eval]") from error
    if include_path is not None and not Path(include_path).is_dir():
        raise LccpError(f"no folder of tasks at {include_path}; give the one that holds your task's .yaml files")
    with _quiet():
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists them"
        raise LccpError(f"lm-eval has no task {unknown[0]!r}{hint}")
    return manager


def _evaluate(model: HookedModel, manager: Any, options: dict[str, Any], batch_size: int) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    seed = options["seed"]
    try:
        with _quiet():
            wrapped = HFLM(pretrained=model.model, tokenizer=_with_end(model.tokenizer), batch_size=batch_size)
            found = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=list(options["tasks"]),
                num_fewshot=options["num_fewshot"],
                limit=options["limit"],
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=True,
            )
    except LccpError:
        raise
    except Exception as error:  # tasks are code and data of others
        text = " ".join(str(error).split()) or type(error).__name__
        raise LccpError(f"checkpoint {model.name}: lm-eval failed: {type(error).__name__}: {text[:300]}") from error
    assert isinstance(found, dict)
    return found


def _with_end(tokenizer: Any) -> Any:
    """A copy with an end-of-text token, which the harness asks for; where there is none, the line break."""
    if tokenizer.eos_token_id is not None:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.eos_token = own.convert_ids_to_tokens(own("\n", add_special_tokens=False)["input_ids"][-1])
    return own


def _write(found: dict[str, Any], path: Path) -> None:
    """The samples, one file per task, then the results."""
    for task, samples in found.pop("samples", {}).items():
        lines = [json.dumps(sample, ensure_ascii=False, default=str) for sample in samples]
        with replacing(path.with_name(f"samples_{file_stem(task)}_{path.stem.removeprefix('results_')}.jsonl")) as file:
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with replacing(path) as file:
        file.write_text(json.dumps(found, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Numbers of numpy as numbers, all else that JSON does not know as text."""
    return value.item() if hasattr(value, "item") else str(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log and bars: it writes pages."""
    import logging
    import sys
    import warnings

    import datasets

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stderr(None if sys.stderr is None else _Nowhere()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
            if bars:
                datasets.utils.logging.enable_progress_bar()


class _Nowhere:
    """A stream that forgets."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """Nothing waits to be written."""
