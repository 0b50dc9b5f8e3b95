"""The probe: every checkpoint of a run fine-tuned lightly, asked, graded; what came of it stands beside the heads.

The unit of work is a checkpoint. Its results (`probes/`) and every text it wrote (`generations/`) are parts of the run
folder; a checkpoint whose parts exist is skipped, so a probe may be interrupted and repeated. A checkpoint whose
fine-tuning diverges is put on record with its loss, and the others go on. This module joins mixture, fine-tuning and
evaluation; it refuses to know how any of them works. Cost per checkpoint: one load, the fine-tuning, and k + 1 answers
per item.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from lccp_interp.behaviour.mixture import (
    DEFAULT_TASKS,
    Length,
    build_mixture,
    find_tasks,
    read_official,
    source_digest,
    split_source,
)
from lccp_interp.behaviour.sft import SftDiverged, SftRecipe, fine_tune
from lccp_interp.schema import Checkpoint, Item, LccpError
from lccp_interp.store import (
    PROBES_SCHEMA,
    Run,
    append_probes,
    config_hash,
    editing,
    file_stem,
    is_whole,
    part_name,
    provenance,
    write_json,
    write_part,
)
from lccp_interp.sweep import CASES_PER_SHARD, Access, find_run_checkpoints, load_located, score_like

if TYPE_CHECKING:
    from lccp_interp.capture.model import HookedModel

Progress = Callable[[int, int, str], None]
"""Told (tokens done, tokens in all, what is going on)."""

TRAINING_COST = 3
"""A training token takes about as long as so many tokens that are only read: forward, and twice that backward."""


@dataclass(frozen=True)
class ProbeStudy:
    """What every checkpoint is asked, and how it is prepared for it.

    Attributes:
        name: of the study in the run folder; its metrics bear it (`sft pass@3`).
        tasks: as in `find_tasks`; may be empty where there is official data.
        data: official data to ask too, `ruler:PATH` or `mrcr:PATH`, all of it; never trained on.
        lengths: tokens, or bands: 1024, "512-1024" or a `Length`.
        samples: items per task and length.
        train_samples: training items per task and length.
        sft: how each checkpoint is fine-tuned; None asks the checkpoints as they are.
        k: sampled answers per item; 0 for the greedy one only.
        temperature: of the samples, above 0.
        chat: whether prompts stand in the tokenizer's chat template.
        material: `english`, `organism` or `auto`.
        seed: of items, samples and fine-tuning.
    """

    name: str = "sft"
    tasks: tuple[str, ...] = DEFAULT_TASKS
    data: tuple[str, ...] = ()
    lengths: tuple[Length, ...] = (Length(512, 1024),)  # numbers and texts are read as such
    samples: int = 20
    train_samples: int = 12
    sft: SftRecipe | None = field(default_factory=SftRecipe)
    k: int = 3
    temperature: float = 0.7
    chat: bool = False
    material: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        read = tuple(one if isinstance(one, Length) else Length.parse(str(one)) for one in self.lengths)
        object.__setattr__(self, "lengths", read)
        if not self.name.strip():
            raise LccpError("a probe needs a name, like sft")
        if not (self.tasks or self.data) or not self.lengths:
            raise LccpError("a probe needs at least one task and one length (--tasks longbio --lengths 512-1024)")
        if self.k < 0 or self.temperature <= 0:
            raise LccpError(
                f"k must be 0 or more and the temperature above 0, got {self.k} and {self.temperature:g}; "
                "--k 0 asks for the greedy answer only"
            )
        if self.sft is not None and self.train_samples < 1:
            raise LccpError(
                f"train_samples must be at least 1, got {self.train_samples}; leave out --sft to train none"
            )
        if self.sft is not None and not self.tasks:
            raise LccpError("there is nothing to fine-tune on: official data is never trained on; name --tasks too")
        find_tasks(self.tasks)
        for source in self.data:
            split_source(source)

    def config(self) -> dict[str, Any]:
        """The study as plain JSON values; equal studies have equal configs."""
        return {
            **asdict(self),
            "tasks": ["-".join(task) for task in find_tasks(self.tasks)],
            "data": {
                split_source(source)[0] + ":" + split_source(source)[1].name: source_digest(source)
                for source in self.data
            },
            "lengths": [str(length) for length in self.lengths],
            "sft": None if self.sft is None else self.sft.config(),
            "train_samples": None if self.sft is None else self.train_samples,
        }


def probe(
    run: str | Path | Run,
    study: ProbeStudy | None = None,
    *,
    checkpoints: Sequence[str] | None = None,
    folders: Sequence[str | Path] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    access: Access | None = None,
    keep: bool = False,
    heads: bool = False,
    retry: bool = False,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Ask every checkpoint of a run, after light fine-tuning, and add the results to the run.

    Args:
        run: a run folder; its checkpoints are loaded from where run.json says they are.
        study: what is asked; None means the default study.
        checkpoints: only these (names in the run); None means all.
        folders: where the checkpoints are now, if not where run.json says: folders of checkpoints, matched by name.
        device, dtype: as in `load_model`.
        access: how checkpoints of a hub, with pickles or code of their own are come by; see `Access`.
        keep: keep what fine-tuning made, under `sft/STUDY/CHECKPOINT` in the run.
        heads: score the heads of every fine-tuned checkpoint too, on the run's own cases, into the run folder
            `sft/STUDY/heads` in the run (`head_run`); `dynamics.paired_heads` says which were born and died across.
        retry: fine-tune again where it diverged before.
        progress: told (tokens done, tokens in all, message).

    Returns:
        The study's rows of the `probes` table, for the checkpoints asked for: metrics `NAME greedy`, `NAME pass@k` (and
        `NAME best@k` where grades are graded), score 0..1, n items, standard error.

    Raises:
        LccpError: a run whose study of this name is another one, checkpoints that are not there or have other weights,
            tokenizers that differ, or what tasks and loading raise. Finished checkpoints stay.

    Example:
        >>> probe("runs/demo", ProbeStudy(tasks=("longbio",)))   # doctest: +SKIP
    """
    from lccp_interp.capture.model import load_tokenizer
    from lccp_interp.tasks.items import PromptWriter

    opened = run if isinstance(run, Run) else Run.open(run)
    study = study or ProbeStudy()
    chosen = find_run_checkpoints(opened, checkpoints, folders, access)
    work = [_Unit(opened, study, checkpoint) for checkpoint in chosen]
    report = progress or (lambda done, total, message: None)
    report(0, 0, "building items")
    if heads and study.sft is None:
        raise LccpError(
            "heads are scored behind fine-tuning; before it the run has them: add --sft, or leave out --heads"
        )
    trusted = access is not None and access.trust_remote_code
    writer = PromptWriter(load_tokenizer(chosen[0].path, trust_remote_code=trusted), chat=study.chat)
    items, training = _items(writer, study)
    _record(opened, study, items, training)
    cost = _Cost(items, training, study, opened if heads else None)
    open_units = [
        unit
        for unit in work
        if not (unit.is_done and (unit.heads_done or not heads)) and (retry or unit.failure is None)
    ]
    total, done = cost.per_checkpoint * len(work), cost.per_checkpoint * (len(work) - len(open_units))
    report(done, total, "starting" if done == 0 else "resuming")
    for unit in open_units:
        begun = done

        def advance(part: int, name: str = unit.checkpoint.name, start: int = begun) -> None:
            report(start + part, total, name)

        advance(0)
        model = load_located(unit.checkpoint, device=device, dtype=dtype, access=access)
        unit.run(model, items, training, cost, advance, keep=keep, heads=heads)
        done = begun + cost.per_checkpoint
        del model
    report(total, total, "done")
    names = [checkpoint.name for checkpoint in chosen]
    return results(Run.open(opened.path), study.name).filter(pl.col("checkpoint").is_in(names))


def results(run: Run, name: str) -> pl.DataFrame:
    """The rows of a study in the `probes` table, by tokens.

    Example:
        >>> results(Run.open("runs/demo"), "sft").columns[:3]   # doctest: +SKIP
        ['checkpoint', 'tokens_seen', 'benchmark']
    """
    return (
        run.probes.filter(pl.col("metric").str.starts_with(f"{name} "))
        .collect()
        .sort("tokens_seen", "benchmark", "subset", "length", "metric", maintain_order=True)
    )


def failures(run: Run, name: str) -> dict[str, str]:
    """Checkpoints whose fine-tuning in study `name` failed, with the reason."""
    found = {}
    for checkpoint in run.checkpoints["name"]:
        path = _failure_path(run, name, checkpoint)
        if path.is_file():
            found[checkpoint] = str(json.loads(path.read_text(encoding="utf-8"))["error"])
    return found


def head_run(run: Run, name: str) -> Path:
    """Where the heads behind the fine-tuning of study `name` are: a run folder over the same cases."""
    return run.path / "sft" / file_stem(name) / "heads"


def _failure_path(run: Run, name: str, checkpoint: str) -> Path:
    return run.path / "probes" / f"{file_stem(f'{name}-{checkpoint}')}.failed.json"


class _Cost:
    """Work in tokens read, for progress."""

    def __init__(
        self, items: Sequence[Item], training: Sequence[Item], study: ProbeStudy, scored_again: Run | None
    ) -> None:
        self.reading = sum(len(item.prompt_ids) for item in items)
        epochs = study.sft.epochs if study.sft is not None else 0.0
        self.training = round(TRAINING_COST * epochs * sum(len(item.prompt_ids) for item in training))
        self.heads = int(scored_again.cases["length"].sum()) if scored_again is not None else 0
        self.per_checkpoint = self.reading + self.training + self.heads


@dataclass(frozen=True)
class _Unit:
    """One checkpoint's part of a study."""

    in_run: Run
    study: ProbeStudy
    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        return f"{self.study.name}-{self.checkpoint.name}"

    @property
    def generations(self) -> Path:
        return self.in_run.path / "generations" / f"{file_stem(self.name)}.parquet"

    @property
    def is_done(self) -> bool:
        return is_whole(self.in_run.path / "probes" / f"{file_stem(self.name)}.parquet") and is_whole(self.generations)

    @property
    def heads_done(self) -> bool:
        folder = head_run(self.in_run, self.study.name)
        n_shards = -(-self.in_run.cases.height // CASES_PER_SHARD)
        parts = [part_name(self.checkpoint.name, shard) for shard in range(n_shards)]
        return all(is_whole(folder / table / part) for table in ("scores", "outcomes") for part in parts)

    @property
    def failure(self) -> Path | None:
        path = _failure_path(self.in_run, self.study.name, self.checkpoint.name)
        return path if path.is_file() else None

    def run(
        self,
        model: HookedModel,
        items: Sequence[Item],
        training: Sequence[Item],
        cost: _Cost,
        advance: Callable[[int], None],
        *,
        keep: bool,
        heads: bool,
    ) -> None:
        """Fine-tune, ask, grade and write what is missing."""
        study, checkpoint = self.study, self.checkpoint
        began = time.monotonic()
        record: dict[str, Any] = {"checkpoint": checkpoint.name, "study": study.name, "device": str(model.device)}
        if study.sft is not None:
            kept = self.in_run.path / "sft" / file_stem(study.name) / file_stem(checkpoint.name) if keep else None
            try:
                tuned = fine_tune(
                    model,
                    training,
                    study.sft,
                    keep=kept,
                    on_step=lambda step, steps: advance(cost.training * step // steps),
                )
            except SftDiverged as error:
                failed = {**record, "error": str(error), "loss_nats": repr(error.loss_nats)}
                write_json(_failure_path(self.in_run, study.name, checkpoint.name), failed)
                return
            model = tuned.model
            record |= {"recipe": tuned.recipe.config(), "losses_nats": list(tuned.losses_nats)}
        if not self.is_done:
            self._ask(model, items, record, began, lambda read: advance(cost.training + min(read, cost.reading)))
        if heads:
            before = cost.training + cost.reading
            change = f"probe {study.name} {config_hash(study.config())[:12]}"
            score_like(
                self.in_run,
                model,
                checkpoint,
                head_run(self.in_run, study.name),
                change=change,
                progress=lambda done, total, message: advance(before + min(done, cost.heads)),
            )
        if failed_before := self.failure:
            failed_before.unlink()

    def _ask(
        self,
        model: HookedModel,
        items: Sequence[Item],
        record: dict[str, Any],
        began: float,
        advance: Callable[[int], None],
    ) -> None:
        from lccp_interp.behaviour.evaluate import answer_items, answers_frame, summarise

        study, checkpoint = self.study, self.checkpoint
        read = 0

        def on_item(n_tokens: int) -> None:
            nonlocal read
            read += n_tokens
            advance(read)

        answers = answer_items(
            model, items, n_samples=study.k, temperature=study.temperature, seed=study.seed, on_item=on_item
        )
        record["seconds"] = round(time.monotonic() - began, 1)
        texts = answers_frame(answers, items).with_columns(
            checkpoint=pl.lit(checkpoint.name), tokens_seen=pl.lit(checkpoint.tokens_seen), study=pl.lit(study.name)
        )
        write_part(texts, self.generations, metadata={"execution": json.dumps(record)})
        rows = summarise(answers, items, k=study.k).with_columns(
            checkpoint=pl.lit(checkpoint.name),
            tokens_seen=pl.lit(checkpoint.tokens_seen),
            metric=pl.lit(f"{study.name} ") + pl.col("metric"),
        )
        # Last: that it exists says that the checkpoint is done.
        append_probes(
            self.in_run.path, self.name, rows.select(pl.col(name).cast(kind) for name, kind in PROBES_SCHEMA.items())
        )


def _items(writer: Any, study: ProbeStudy) -> tuple[list[Item], list[Item]]:
    options: dict[str, Any] = {"seed": study.seed, "material": study.material}
    tasks = find_tasks(study.tasks)
    items = build_mixture(writer, tasks, study.lengths, samples=study.samples, split="eval", **options)
    longest = max(length.high for length in study.lengths)
    for source in study.data:
        items += read_official(source, writer.tokenizer, max_length=longest)
    if study.sft is None:
        return items, []
    return items, build_mixture(writer, tasks, study.lengths, samples=study.train_samples, split="train", **options)


def _record(run: Run, study: ProbeStudy, items: Sequence[Item], training: Sequence[Item]) -> None:
    """Enter the study in run.json, once; another one of the same name is refused."""
    with editing(run.path) as manifest:
        studies = manifest.setdefault("probe_studies", [])
        config = study.config()
        for old in studies:
            if old["name"] != study.name:
                continue
            differing = [key for key in config if old["config"].get(key) != config[key]]
            if differing:
                raise LccpError(
                    f"{run.path} holds another probe named {study.name!r}: {', '.join(differing)} differ "
                    f"({differing[0]}: there {json.dumps(old['config'].get(differing[0]))}, asked "
                    f"{json.dumps(config[differing[0]])}); choose another --name, or repeat its options"
                )
            return
        tokens = [sum(len(item.prompt_ids) for item in group) for group in (items, training)]
        studies.append(
            {
                "name": study.name,
                "config": config,
                "config_hash": config_hash(config),
                "n_items": len(items),
                "item_tokens": tokens[0],
                "n_training_items": len(training),
                "training_tokens": tokens[1],
                **provenance(),
            }
        )
