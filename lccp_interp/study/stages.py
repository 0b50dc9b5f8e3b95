"""Running a study: stage after stage into one run folder, each of which does only what is missing.

Scores of every task, then probes, then the causal check, then figures and report. What the study asked is kept in the
run folder (`study.json`); a study that asks the same in another way is refused with what changed, one that asks more
(checkpoints, tasks, probes) goes on. How the work is done may change at any time. This module refuses to know how a
stage works. Cost: that of its stages.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lccp_interp.checkpoints import bundled_trajectory, find_checkpoints, read_token_table
from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import Run, driving, write_json
from lccp_interp.store.lock import STUDY_FILE
from lccp_interp.study.source import BUNDLED
from lccp_interp.sweep import Access

if TYPE_CHECKING:
    from lccp_interp.study.form import AskProbe, Study
    from lccp_interp.sweep import Execution
    from lccp_interp.tasks.grids import CaseGrid

FREE = ("out", "checkpoints", "execution", "figures", "report", "ablations")
"""Keys that may change between two runs of a study: none of them changes what a number in the tables means. Checkpoints
and ablations are told apart by the run folder itself."""

FIRST = "first"
"""What the first task is called where a change of it is told: its scores are the run's own."""

Progress = Callable[[int, int, str], None]
Bar = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress bar for a stage of this name."""


@dataclass(frozen=True)
class Stage:
    """One step of a study.

    Attributes:
        name: as the progress bar shows it.
        what: in words, for `--dry-run`.
        do: does it.
    """

    name: str
    what: str
    do: Callable[[Progress], Any]


def run_study(
    study: Study,
    *,
    bar: Bar,
    note: Callable[[str], None] = lambda text: None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Run:
    """Do what a study asks and is not done yet.

    Args:
        study: from `read_study` or `check_study`.
        bar: opens a progress bar for a stage.
        note: told in one line what is left out.
        trust_remote_code: as in `load_model`; never from a file.
        allow_pickle: as in `load_model`; never from a file.

    Returns:
        The run, opened for reading.

    Raises:
        LccpError: the run folder holds another study (what differs is named), or what a stage raises. Finished units
            stay, the same call goes on.

    Example:
        >>> import contextlib
        >>> study = read_study("examples/study.yaml")   # doctest: +SKIP
        >>> run = run_study(study, bar=lambda name: contextlib.nullcontext(print))   # doctest: +SKIP
    """
    refuse_other_study(study)
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    refuse_what_cannot_be_asked(study)
    checkpoints = study_checkpoints(study, **trust)
    with driving(study.out):
        refuse_other_study(study)  # who drove it until now may have begun another one
        remember(study)
        for stage in _stages(study, checkpoints, note, trust):
            with bar(stage.name) as progress:
                stage.do(progress)
    return Run.open(study.out)


def planned_stages(
    study: Study, *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> list[tuple[str, str]]:
    """(name, what it does) of every stage of a study, in order; nothing is run.

    Raises:
        LccpError: as `run_study` before its first stage.
    """
    refuse_other_study(study)
    refuse_what_cannot_be_asked(study)
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    checkpoints = study_checkpoints(study, **trust)
    return [(stage.name, stage.what) for stage in _stages(study, checkpoints, lambda text: None, trust)]


def study_checkpoints(study: Study, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> list[Checkpoint]:
    """The checkpoints of a study, in the order of their tokens.

    Raises:
        LccpError: as `find_checkpoints`.
    """
    asked = study.checkpoints
    if BUNDLED in asked.sources:
        if asked.sources != [BUNDLED]:
            raise LccpError(f"checkpoints: {BUNDLED!r} stands alone, got {', '.join(asked.sources)}; keep one of them")
        return bundled_trajectory()
    tokens = asked.tokens
    return find_checkpoints(
        asked.sources,
        tokens=None if isinstance(tokens, str) else tokens,
        table=read_token_table(tokens) if isinstance(tokens, str) else None,
        tokens_per_step=asked.tokens_per_step,
        stage_tokens_before=asked.stage_tokens_before,
        branch=asked.branch,
        cache=asked.cache,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )


def from_base(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints of the last stage, behind the last one before it.

    Example:
        >>> stages = [Checkpoint(str(i), Path(), i, "pretrain" if i < 3 else "lccp") for i in range(5)]
        >>> [checkpoint.name for checkpoint in from_base(stages)]
        ['2', '3', '4']
    """
    earlier = [i for i, checkpoint in enumerate(checkpoints) if checkpoint.stage != checkpoints[-1].stage]
    return list(checkpoints[earlier[-1] if earlier else 0 :])


def chosen_names(checkpoints: Sequence[Checkpoint], which: Any) -> list[str]:
    """Names of the checkpoints that a stage is about.

    Args:
        checkpoints: by tokens.
        which: `all` (from the base on), `last`, `ends` (the base and the last), so many evenly from the base to the
            last, or names.

    Raises:
        LccpError: a name that is not there.

    Example:
        >>> ten = [Checkpoint(str(i), Path(), i) for i in range(10)]
        >>> chosen_names(ten, 4), chosen_names(ten, "ends"), chosen_names(ten, ["3"])
        (['0', '3', '6', '9'], ['0', '9'], ['3'])
    """
    later = from_base(checkpoints)
    if isinstance(which, list):
        known = [checkpoint.name for checkpoint in checkpoints]
        for name in which:
            if name not in known:
                raise LccpError(f"no checkpoint {name!r}; the study has {', '.join(known)}")
        return [name for name in known if name in which]
    counts = {"all": len(later), "ends": min(2, len(later)), "last": 1}
    n = which if isinstance(which, int) else counts[which]
    if n == 1:
        return [later[-1].name]
    n = min(n, len(later))
    return [later[round(i * (len(later) - 1) / max(1, n - 1))].name for i in range(n)]


def refuse_what_cannot_be_asked(study: Study) -> None:
    """Refuse what would come to light only when a task's turn comes, perhaps days later.

    Raises:
        LccpError: options of an execution that do not go together, an unknown metric, or texts that are not there.
    """
    from lccp_interp.scoring.metrics import select_metrics

    execution_of(study, {})
    for task in study.tasks:
        select_metrics(task.metrics or study.metrics)
        grid_of_task(task, study.seed)
    needed = {"lm_eval": "eval"} if any(probe.probe == "lm-eval" for probe in study.probes) else {}
    if any(probe.probe == "ask" and probe.sft for probe in study.probes):
        needed["trl"] = "train"
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise LccpError(
                f"a probe of this study needs the package {package}; install lccp_interp[{extra}], "
                "or take the probe out"
            )


def refuse_other_study(study: Study) -> None:
    """Refuse a study whose run folder holds results of one that asked something else.

    What was asked and never begun binds nobody: a mistake in it may be mended.

    Raises:
        LccpError: naming every key that differs, with both values.
    """
    path = Path(study.out) / STUDY_FILE
    if not path.is_file():
        return
    try:
        fixed = _fixed(json.loads(path.read_text(encoding="utf-8"))["study"])
        begun = {key: value for key, value in fixed.items() if _is_begun(Path(study.out), key)}
        changes = [*_changes(begun, _fixed(study.model_dump(mode="json")))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LccpError(f"{path} cannot be read ({error!r}); restore it, or choose another out") from error
    if changes:
        raise LccpError(
            f"{study.out} holds another study, so that results would mix: {'; '.join(changes)}; "
            "choose another out, or take the change back"
        )


def _is_begun(out: Path, key: str) -> bool:
    """Whether the run folder holds anything of a part of a study, by its key in `_fixed`."""
    kind, _, name = key.partition(".")
    if kind == "tasks" and name != FIRST:
        return (out / name / "run.json").is_file()
    if not (out / "run.json").is_file():
        return False
    return kind != "probes" or name in {one["name"] for one in Run.open(out).manifest.get("probe_studies", [])}


def remember(study: Study) -> None:
    """Keep in the run folder what was asked, when it was first asked and when it was last changed."""
    path = Path(study.out) / STUDY_FILE
    asked = study.model_dump(mode="json")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"begun": now}
    if held.get("study") != asked:
        write_json(path, {**held, "changed": now, "study": asked})


def _fixed(study: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change, by key; tasks and probes by their names, so that more may be added."""
    fixed = {key: value for key, value in study.items() if key not in (*FREE, "tasks", "probes")}
    for at, task in enumerate(study["tasks"]):
        fixed[f"tasks.{task['name'] or task['task'] if at else FIRST}"] = {
            k: v for k, v in task.items() if k != "checkpoints"
        }
    for probe in study["probes"]:
        asked = {key: value for key, value in probe.items() if key not in ("checkpoints", "heads", "keep")}
        # Corpora and the harness's tasks are told apart in the run folder itself.
        if probe["probe"] == "ask":
            fixed[f"probes.{probe['name'] or ('sft' if probe['sft'] else 'base')}"] = asked
    return fixed


def _changes(held: Mapping[str, Any], asked: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """What differs, a phrase each; keys that only one of both has are additions (or were taken out) at the top."""
    for key in held:
        if key not in asked:
            if at:
                yield f"{at}{key} was {json.dumps(held[key])} and is gone"
            continue
        one, other = held[key], asked[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _changes(one, other, f"{at}{key}.")
        elif one != other:
            yield f"{at}{key} was {json.dumps(one)} and is now {json.dumps(other)}"
    if at:
        for key in asked:
            if key not in held:
                yield f"{at}{key} is new: {json.dumps(asked[key])}"


def _stages(
    study: Study, checkpoints: list[Checkpoint], note: Callable[[str], None], trust: Mapping[str, Any]
) -> Iterator[Stage]:
    access = Access(disk_budget_bytes=study.checkpoints.disk_budget, **trust)
    where = {"device": study.execution.device, "dtype": study.dtype, "access": access}

    def located(which: Any) -> dict[str, Any]:
        # Where they are is in the run, since they were scored just now.
        return {"checkpoints": chosen_names(checkpoints, which)}

    for at in range(len(study.tasks)):
        yield _score_stage(study, at, checkpoints, trust)
    for probe in study.probes:
        common = {**where, **located(probe.checkpoints)}
        names = common["checkpoints"]
        if probe.probe == "corpus":
            yield Stage(
                "reading",
                f"perplexity of {', '.join(map(str, probe.corpora))} on {len(names)} checkpoints",
                partial(_corpora, study, probe, common),
            )
        elif probe.probe == "lm-eval":
            yield Stage(
                "lm-eval",
                f"{', '.join(probe.tasks)} on {len(names)} checkpoints",
                partial(_harness, study, probe, common),
            )
        else:
            behind = None if probe.heads is None else {**where, **located(probe.heads)}
            yield from _ask_stages(study, probe, common, behind)
    for ablation in study.ablations:
        common = {**where, **located(ablation.checkpoints)}
        options = ablation.model_dump(exclude={"checkpoints"})
        yield Stage(
            "removing heads",
            f"{ablation.kind} ablation of the best heads on {len(common['checkpoints'])} checkpoints",
            partial(_ablate, study, options, common),
        )
    if study.tasks[0].task != "niah" and (study.figures or study.report):
        # Both are about one grid of lengths and depths over training.
        note(f"without figures and report: they are of a first task niah, here it is {study.tasks[0].task}")
        return
    if study.figures:
        yield Stage("figures", f"figures into {Path(study.out) / 'figures'}", partial(_figures, study))
    if study.report:
        yield Stage("report", f"report into {Path(study.out) / 'report.html'}", partial(_report, study))


def execution_of(study: Study, trust: Mapping[str, Any]) -> Execution:
    """The study's way of working, as the sweep takes it."""
    from lccp_interp.sweep import Execution

    options = study.execution.model_dump()
    return Execution(
        **options,
        cache=study.checkpoints.cache,
        disk_budget_bytes=study.checkpoints.disk_budget,
        **trust,
    )


def grid_of_task(task: Any, seed: int) -> CaseGrid:
    """The grid of cases that a task of a study describes.

    Raises:
        LccpError: texts that are not there, or values that do not go together.
    """
    from lccp_interp.tasks.haystack import read_haystack
    from lccp_interp.tasks.needles import PAPER_PROMPT, read_needles

    if task.task == "longbio":
        from lccp_interp.tasks.longbio import LongBioGrid

        return LongBioGrid(lengths=tuple(task.lengths), depths=tuple(task.depths), samples=task.samples, seed=seed)
    texts: dict[str, Any] = {
        "samples": task.samples,
        "needles": None if task.needles is None else read_needles(Path(task.needles)),
        "haystack": None if task.haystack is None else read_haystack(Path(task.haystack)),
        "prompt": PAPER_PROMPT if task.prompt is None else task.prompt,
        "chat": task.chat,
        "seed": seed,
    }
    if task.task == "interference":
        from lccp_interp.tasks.interference import InterferenceGrid

        return InterferenceGrid(distances=tuple(task.distances), interferences=tuple(task.interferences), **texts)
    from lccp_interp.tasks.niah import NiahGrid

    return NiahGrid(lengths=tuple(task.lengths), depths=tuple(task.depths), **texts)


def _score_stage(study: Study, at: int, checkpoints: list[Checkpoint], trust: Mapping[str, Any]) -> Stage:
    task, folder = study.tasks[at], study.folder(at)
    names = (
        chosen_names(checkpoints, task.checkpoints)
        if at or task.checkpoints != "all"
        else [c.name for c in checkpoints]
    )
    chosen = [checkpoint for checkpoint in checkpoints if checkpoint.name in names]

    def do(progress: Progress) -> None:
        from lccp_interp.sweep import score_grid

        score_grid(
            chosen,
            Path(study.out) / folder,
            grid_of_task(task, study.seed),
            metrics=task.metrics or study.metrics,
            mode=study.mode,
            backend=study.backend,
            dtype=study.dtype,
            execution=execution_of(study, trust),
            progress=progress,
        )

    return Stage(folder or "scoring", f"{task.task}: {len(chosen)} checkpoints, {task.samples} samples", do)


def _ask_stages(
    study: Study,
    probe: AskProbe,
    common: Mapping[str, Any],
    behind: Mapping[str, Any] | None,
) -> Iterator[Stage]:
    how = "after light fine-tuning" if probe.sft else "as they are"
    yield Stage(
        "probing",
        f"{', '.join(probe.tasks)} on {len(common['checkpoints'])} checkpoints {how}",
        partial(_ask, study, probe, common),
    )
    if behind is not None and probe.sft:
        yield Stage(
            "heads after",
            f"heads behind fine-tuning on {len(behind['checkpoints'])} checkpoints",
            partial(_ask, study, probe, behind, heads=True),
        )


def _ask(study: Study, probe: AskProbe, common: Mapping[str, Any], progress: Progress, **options: Any) -> None:
    from lccp_interp.behaviour.mixture import Length
    from lccp_interp.behaviour.probe import ProbeStudy
    from lccp_interp.behaviour.probe import probe as ask
    from lccp_interp.behaviour.sft import SftRecipe

    recipe = None
    if probe.sft:
        recipe = SftRecipe(seed=study.seed, **({} if probe.sft is True else probe.sft.model_dump()))
    asked = ProbeStudy(
        name=probe.own_name,
        tasks=tuple(probe.tasks),
        data=tuple(probe.data),
        lengths=tuple(Length.parse(length) for length in probe.lengths),
        samples=probe.samples,
        train_samples=probe.train_samples,
        sft=recipe,
        k=probe.k,
        temperature=probe.temperature,
        chat=probe.chat,
        material=probe.material,
        seed=study.seed,
    )
    ask(study.out, asked, keep=probe.keep, progress=progress, **common, **options)


def _corpora(study: Study, probe: Any, common: Mapping[str, Any], progress: Progress) -> None:
    from lccp_interp.behaviour.corpora import probe_corpora

    options = {"length": probe.length, "documents": probe.documents, "seed": study.seed}
    probe_corpora(study.out, probe.corpora, progress=progress, **options, **common)


def _harness(study: Study, probe: Any, common: Mapping[str, Any], progress: Progress) -> None:
    from lccp_interp.behaviour.harness import probe_with_lm_eval

    options = {name: getattr(probe, name) for name in ("num_fewshot", "limit", "batch_size")}
    probe_with_lm_eval(study.out, probe.tasks, seed=study.seed, progress=progress, **options, **common)


def _ablate(study: Study, options: Mapping[str, Any], common: Mapping[str, Any], progress: Progress) -> None:
    from lccp_interp.interventions.causal import ablate_heads

    ablate_heads(study.out, seed=study.seed, progress=progress, **options, **common)


def _figures(study: Study, progress: Progress) -> None:
    from lccp_interp.figures import draw_figures

    progress(0, 1, "drawing")
    asked = study.figures
    options = {} if isinstance(asked, bool) else asked.model_dump()
    draw_figures(Run.open(study.out), Path(study.out) / "figures", **options)
    progress(1, 1, "drawn")


def _report(study: Study, progress: Progress) -> None:
    from lccp_interp.report import write_report

    progress(0, 1, "writing")
    write_report(Run.open(study.out), None, length=None if isinstance(study.figures, bool) else study.figures.length)
    progress(1, 1, "written")
