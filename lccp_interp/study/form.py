"""The form of a study: every key that a study file may hold, its type, its range and its default.

The models are the same as the arguments of the calls that do the work (`score_grid`, `probe`, `probe_corpora`,
`ablate_heads`), and are checked before anything starts. Unknown keys are refused. Nothing in a form names code: no
functions, no modules, no remote code, no pickles; those are for whoever types the command. This module refuses to know
files and how a study is run; it imports no torch. Cost: milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lccp_interp.checkpoints import parse_bytes, parse_count
from lccp_interp.schema import LccpError


def _told(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What raises our error raises one that pydantic collects with the others."""

    def reader(value: Any) -> Any:
        try:
            return read(value)
        except LccpError as error:
            raise ValueError(str(error)) from error

    return reader


def _count(value: Any) -> Any:
    return parse_count(value) if isinstance(value, str) else value


def _on_or_off(value: Any) -> Any:
    """YAML reads a bare `on` as true."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _size(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


def _asked(names: list[str]) -> list[str]:
    from lccp_interp.behaviour.mixture import find_tasks

    find_tasks(names)
    return names


def _band(value: Any) -> str:
    from lccp_interp.behaviour.mixture import Length

    return str(Length.parse(str(value)))


Count = Annotated[int, BeforeValidator(_told(_count))]
"""Tokens: 4096, 1.2M or 20B."""

Bytes = Annotated[int, BeforeValidator(_told(_size))]
"""Room on a disk: 40GB, 500M or 1.5T."""

Band = Annotated[str, BeforeValidator(_told(_band))]
"""Tokens, or a band of them: 1024 or 512-1024."""

FIGURE_FORMATS: tuple[Literal["pdf", "svg", "png", "html", "tex", "csv", "md"], ...] = (
    "pdf", "svg", "png", "html", "tex", "csv", "md",
)  # fmt: skip

Which = Literal["all", "last", "ends"] | Annotated[int, Field(ge=1)] | list[str]
"""Checkpoints: all of them, the last, the base and the last, so many evenly from the base on, or names."""


SlurmOption = Literal[
    "cluster", "partition", "account", "qos", "constraint", "reservation", "time", "timeout_min", "mem_gb",
    "cpus_per_task", "gpus_per_node", "gres", "exclude", "nodelist", "slurm_array_parallelism",
]  # fmt: skip
"""What a study file may ask of SLURM: room and time, and no command of its own."""

SlurmValue = Annotated[str, Field(pattern=r"^[\x20-\x7e]+$")] | int
"""It becomes a line of a script: a line break in it would begin a command."""

OWN_FOLDERS = (
    "scores", "outcomes", "probes", "generations", "corpora", "lm_eval", "ablations", "imported", "sft", "figures",
    "slurm", "first",
)  # fmt: skip
"""Names that a task may not have: folders that a run has anyway, and what the first task is called."""


class Form(BaseModel):
    """What all parts of a study share: keys that are not known are refused, nothing is changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Trajectory(Form):
    """Where the checkpoints are, and how many tokens each has seen."""

    sources: list[str] = Field(min_length=1)
    tokens: dict[str, Count] | str | None = None
    tokens_per_step: Count | dict[str, Count] | None = None
    stage_tokens_before: dict[str, Count] | None = None
    branch: str | None = None
    cache: str | None = None
    disk_budget: Bytes | None = None


class Task(Form):
    """What every task over needles has."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")
    checkpoints: Which = "all"
    samples: int = Field(default=4, ge=1)
    metrics: list[str] | None = Field(default=None, min_length=1)


class Texts(Task):
    """Where needles and haystacks come from; without any, from the bundled language."""

    needles: str | None = None
    haystack: str | None = None
    prompt: str | None = None
    chat: bool = False


class NiahTask(Texts):
    """Needle in a haystack, by length and depth."""

    task: Literal["niah"]
    lengths: list[Count] = Field(default=[256, 512, 1024, 2048, 4096], min_length=1)
    depths: list[Annotated[float, Field(ge=0, le=100)]] = Field(default=[0, 25, 50, 75, 100], min_length=1)


class InterferenceTask(Texts):
    """Needles by their distance to the question and the text before them."""

    task: Literal["interference"]
    distances: list[Count] = Field(default=[256, 1024], min_length=1)
    interferences: list[Count] = Field(default=[0, 256, 512, 1024, 2048], min_length=1)


class LongBioTask(Task):
    """Facts of made-up biographies, by length and depth."""

    task: Literal["longbio"]
    lengths: list[Count] = Field(default=[256, 512, 1024, 2048, 4096], min_length=1)
    depths: list[Annotated[float, Field(ge=0, le=100)]] = Field(default=[0, 25, 50, 75, 100], min_length=1)


AnyTask = Annotated[NiahTask | InterferenceTask | LongBioTask, Field(discriminator="task")]


class Sft(Form):
    """Light fine-tuning before the questions; see `SftRecipe`."""

    epochs: float = Field(default=2.0, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=8, ge=1)
    method: Literal["auto", "full", "lora"] = "auto"
    lora_rank: int = Field(default=16, ge=1)


class AskProbe(Form):
    """Questions over long prompts, after light fine-tuning unless `sft` is off; see `ProbeStudy`."""

    probe: Literal["ask"]
    name: str | None = None
    checkpoints: Which = "all"
    tasks: Annotated[list[str], AfterValidator(_told(_asked))] = ["longbio", "ruler", "mrcr"]
    data: list[str] = []
    lengths: list[Band] = Field(min_length=1)
    samples: int = Field(default=20, ge=1)
    train_samples: int = Field(default=12, ge=1)
    k: int = Field(default=3, ge=0)
    temperature: float = Field(default=0.7, gt=0)
    chat: bool = False
    material: Literal["auto", "english", "organism"] = "auto"
    sft: Sft | bool = True
    heads: Which | None = None
    keep: bool = False

    @model_validator(mode="after")
    def _has_what_is_kept(self) -> AskProbe:
        if not self.sft and (self.keep or self.heads is not None):
            raise ValueError("heads and keep are about what fine-tuning made; take sft: true, or leave them out")
        return self

    @property
    def own_name(self) -> str:
        """Its name in the run folder."""
        return self.name or ("sft" if self.sft else "base")


class CorpusProbe(Form):
    """Perplexity of long documents; see `probe_corpora`."""

    probe: Literal["corpus"]
    checkpoints: Which = "all"
    corpora: list[str] = Field(min_length=1)
    length: Count | None = None
    documents: int = Field(default=8, ge=1)


class HarnessProbe(Form):
    """Tasks of lm-evaluation-harness, its own ones only; see `probe_with_lm_eval`."""

    probe: Literal["lm-eval"]
    checkpoints: Which = "all"
    tasks: list[str] = Field(min_length=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=1, ge=1)


AnyProbe = Annotated[AskProbe | CorpusProbe | HarnessProbe, Field(discriminator="probe")]


class Ablation(Form):
    """The causal check: answers without the best heads, and without random ones; see `ablate_heads`."""

    checkpoints: Which = "last"
    kind: Literal["zero", "mean", "resample", "blind"] = "zero"
    k: list[Annotated[int, Field(ge=1)]] | None = None
    each: bool = False
    length: Count | None = None
    n_cases: int = Field(default=20, ge=1)
    n_draws: int = Field(default=10, ge=1)
    metric: str = "retrieval"


class Figures(Form):
    """Figures and tables of the run; see `draw_figures`."""

    length: Count | None = None
    formats: list[Literal["pdf", "svg", "png", "html", "tex", "csv", "md"]] = list(FIGURE_FORMATS)
    columns: Literal[1, 2] | None = None


class ExecutionForm(Form):
    """Where and how the work is done; may be changed at any time. See `Execution`."""

    device: str = "auto"
    device_map: str | None = None
    sharing: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = "auto"
    chunk_tokens: int = Field(default=4096, ge=1)
    self_check: bool = True
    executor: Literal["here", "pool", "ray", "slurm"] = "here"
    workers: int | None = Field(default=None, ge=1)
    cpus_per_worker: int | None = Field(default=None, ge=1)
    gpus_per_worker: float | None = Field(default=None, ge=0)
    threads: int | None = Field(default=None, ge=1)
    slurm: dict[SlurmOption, SlurmValue] = {}


class Study(Form):
    """A whole study.

    Example:
        >>> study = Study(out="runs/a", checkpoints={"sources": ["ckpts"]}, tasks=[{"task": "niah", "lengths": ["4K"]}])
        >>> study.tasks[0].lengths, study.folder(0), study.mode
        ([4000], '', 'teacher_forced')
    """

    out: str
    checkpoints: Trajectory
    tasks: list[AnyTask] = Field(min_length=1)
    metrics: list[str] = Field(default=["retrieval", "wu", "copy", "needle_mass"], min_length=1)
    mode: Literal["teacher_forced", "generate"] = "teacher_forced"
    backend: Literal["transformers", "transformer_lens", "nnsight"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0
    probes: list[AnyProbe] = []
    ablations: list[Ablation] = []
    figures: Figures | bool = True
    report: bool = True
    execution: ExecutionForm = ExecutionForm()

    @field_validator("checkpoints", mode="before")
    @classmethod
    def _sources_alone(cls, value: Any) -> Any:
        """`checkpoints: folder` and a list of sources stand for themselves."""
        if isinstance(value, str):
            return {"sources": [value]}
        return {"sources": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _names_differ(self) -> Study:
        for kind, names in (("tasks", self._task_names()), ("probes", self._probe_names())):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"two {kind} are called {twice!r}; give one of them a name of its own")
        return self

    @model_validator(mode="after")
    def _lengths_are_there(self) -> Study:
        """What is drawn, and what heads are removed at, is of the first task; better said now than after days."""
        asked = [("figures", self.figures.length)] if isinstance(self.figures, Figures) else []
        asked += [("ablations", ablation.length) for ablation in self.ablations]
        lengths = getattr(self.tasks[0], "lengths", None)
        for where, length in asked:
            if length is not None and length not in (lengths or ()):
                known = ", ".join(map(str, lengths)) if lengths else "none"
                raise ValueError(f"{where}: length {length} is not among those of the first task: {known}")
        return self

    def _task_names(self) -> list[str]:
        return [self.folder(at) for at in range(1, len(self.tasks))]

    def _probe_names(self) -> list[str]:
        return [probe.own_name for probe in self.probes if isinstance(probe, AskProbe)]

    @model_validator(mode="after")
    def _names_are_free(self) -> Study:
        taken = next((name for name in self._task_names() if name in OWN_FOLDERS), None)
        if taken is not None:
            raise ValueError(f"a task is called {taken!r}, as something else in a run folder is; give it another name")
        return self

    def folder(self, at: int) -> str:
        """Where the `at`-th task's scores are: the first's in the run folder itself, the others' in a folder of it."""
        task = self.tasks[at]
        return "" if at == 0 else task.name or task.task
