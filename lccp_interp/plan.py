"""The plan of a study: what it will run and what memory it takes, before anything runs.

Cases are built as the sweep builds them and their tokens counted, case by case and with shared prefixes; memory comes
from `capture.footprint`, which needs a config and no weights. Given the memory of the devices, the plan says whether
the study fits, and if not, what would help. It refuses to guess times: they depend on the machine.

Cost: the tokenizer's work on the haystack, and about a second per length and model.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lccp_interp.capture.footprint import Footprint, footprint, load_config
from lccp_interp.capture.model import HookedModel, folder_name, load_tokenizer
from lccp_interp.capture.prefill import CHUNK_TOKENS
from lccp_interp.checkpoints import TOKENIZER_FILES
from lccp_interp.organism.tokenizer import build_tokenizer
from lccp_interp.schema import Case, LccpError
from lccp_interp.scoring.engine import BATCH_TOKENS, Sharing, null_query, shares
from lccp_interp.scoring.metrics import HeadMetric, check_cases, select_metrics
from lccp_interp.tasks.prefixes import tokens_run, walk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lccp_interp.tasks.grids import CaseGrid

GIB = 2**30
USABLE = 0.95
"""Share of a device's memory that may be planned for; the rest is the driver's, the kernels' and fragmentation's."""

LITTLE_SHARED = 1.2
"""Below this ratio of tokens naive to tokens run, prompts share next to nothing."""

SMALLER_CHUNKS = (1024, 256)
"""Tokens per forward pass that are tried where a study does not fit."""

MAX_LENGTHS = 6
"""Lengths that memory is worked out for, where a grid has more: from the shortest to the longest."""

AXES = {"lengths": "length", "depths": "depth", "distances": "distance", "interferences": "interference"}
"""What a grid's config may vary, and what one value of it is called."""

TEXT_WIDTH = 100
"""Columns of the plan's words."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Memory:
    """The memory of the devices that a study may use.

    Example:
        >>> parse_memory("2x80")
        Memory(n_devices=2, device_bytes=85899345920)
        >>> str(parse_memory("24"))
        'one device of 24 GiB'
    """

    n_devices: int
    device_bytes: int

    def __str__(self) -> str:
        devices = "one device" if self.n_devices == 1 else f"{self.n_devices} devices"
        return f"{devices} of {self.device_bytes / GIB:.4g} GiB"

    def holds(self, n_bytes: int) -> bool:
        """Whether one of the devices has room for that much, and a little left."""
        return n_bytes <= USABLE * self.device_bytes


def parse_memory(text: str) -> Memory:
    """Devices and GiB of each: `80`, `2x80`.

    Raises:
        LccpError: it is no such thing.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(\d+(?:\.\d+)?)\s*(?:GiB|GB|G)?", text.strip(), re.IGNORECASE)
    if not match or not int(match[1] or 1) or not float(match[2]):
        raise LccpError(f"--memory {text!r}: write the GiB of a device, like 80, or devices x GiB, like 2x80")
    return Memory(int(match[1] or 1), int(float(match[2]) * GIB))


def memory_here() -> Memory | None:
    """The GPUs of this machine; None without one."""
    import torch

    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(n_devices)]
    return Memory(n_devices, min(sizes)) if sizes else None


def find_configs(paths: Iterable[str | Path]) -> list[tuple[str, Path]]:
    """(name, folder) of every config.json in `paths`: checkpoint folders, or folders of them. No weights are needed.

    Raises:
        LccpError: no such folder, or no config.json in it nor in a folder of it.
    """
    found: list[tuple[str, Path]] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise LccpError(f"no folder at {path}; give a checkpoint, or a folder that holds its config.json")
        folders = [path] if (path / "config.json").is_file() else sorted(p.parent for p in path.glob("*/config.json"))
        if not folders:
            raise LccpError(f"{path} has no config.json, nor has a folder in it; a plan needs the config, no weights")
        found += [(folder_name(folder), folder) for folder in folders]
    if not found:
        raise LccpError("no checkpoints given; name at least one folder with a config.json")
    return found


def planning_tokenizer(
    folders: Sequence[Path], tokenizer: Path | None = None
) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    """A tokenizer to count with, and a note if it is not the checkpoints' own.

    Args:
        folders: of the checkpoints; the first with a tokenizer is asked.
        tokenizer: a folder whose tokenizer is taken instead.

    Raises:
        LccpError: a tokenizer that cannot be loaded.
    """
    own = [folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES)]
    if tokenizer is not None or own:
        return load_tokenizer(tokenizer or own[0]), ()
    from transformers import PreTrainedTokenizerFast

    note = (
        "no tokenizer there: the bundled language's stands in. Lengths are exact under any; what prompts share and how "
        "many tokens an answer has may differ a little, and a haystack that is too short shows only under the "
        "checkpoint's own (--tokenizer FOLDER)"
    )
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer()), (note,)


@dataclass(frozen=True)
class ModelPlan:
    """What a study takes on checkpoints of one size.

    Attributes:
        checkpoints: their names.
        footprints: memory at each of the study's lengths.
        tokens_shared: tokens run per checkpoint, what prompts have in common once.
        verdict: in words, whether the longest length fits, and if not, what to try.
        fits: the same, yes or no; None where no memory is known.
        notes: what else to know before running it.
    """

    checkpoints: tuple[str, ...]
    footprints: tuple[Footprint, ...]
    tokens_shared: int
    verdict: str
    fits: bool | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a study will run, and what memory it takes.

    Attributes:
        task: of the grid.
        axes: how many values the grid has of what it varies, by name; their product is the number of cases.
        lengths: total lengths that memory is worked out for, tokens, rising.
        metrics: head metrics that are planned for.
        n_cases: cases per checkpoint.
        tokens_naive: tokens per checkpoint, were every case run alone.
        memory: of the devices; None if unknown.
        models: one per size of model.
        notes: what else to know about the study.
    """

    task: str
    axes: dict[str, int]
    lengths: tuple[int, ...]
    metrics: tuple[str, ...]
    n_cases: int
    tokens_naive: int
    memory: Memory | None
    models: tuple[ModelPlan, ...]
    notes: tuple[str, ...] = field(default=())

    def as_record(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        record = asdict(self)
        for model, entry in zip(self.models, record["models"], strict=True):
            for one, footprint_entry in zip(model.footprints, entry["footprints"], strict=True):
                footprint_entry["total_bytes"] = one.total_bytes
        plain: dict[str, Any] = json.loads(json.dumps(record))
        return plain

    def rows(self) -> list[dict[str, Any]]:
        """One flat record per model and length, memory in GiB."""
        return [
            {
                "model": model.checkpoints[0],
                "checkpoints": len(model.checkpoints),
                "cases": self.n_cases,
                "tokens_naive": self.tokens_naive,
                "tokens_shared": model.tokens_shared,
                **self._memory_row(one),
            }
            for model in self.models
            for one in model.footprints
        ]

    def _memory_row(self, one: Footprint) -> dict[str, Any]:
        row: dict[str, Any] = {
            "length": one.n_tokens,
            "weights_gib": one.weight_bytes / GIB,
            "kv_cache_gib": one.cache_bytes / GIB,
            "working_gib": one.working_bytes / GIB,
            "total_gib": one.total_bytes / GIB,
        }
        if self.memory is not None:
            fullest = one.on_devices(self.memory.n_devices)
            if self.memory.n_devices > 1:
                row["fullest_device_gib"] = fullest / GIB
            row["fits"] = "yes" if self.memory.holds(fullest) else "no"
        return row

    def text(self) -> str:
        """The plan for people."""
        facts = [("study", self._study()), ("lengths", f"{', '.join(f'{n:,}' for n in self.lengths)} tokens")]
        facts += [("note", note) for note in self.notes]
        for model in self.models:
            facts += [("", ""), *self._model(model)]
        lines = []
        for key, value in facts:
            wrapped = textwrap.wrap(value, TEXT_WIDTH) if len(value) > TEXT_WIDTH else [value]
            lines += [f"{key if at == 0 else '':<13}{line}".rstrip() for at, line in enumerate(wrapped)]
        return "\n".join(lines)

    def _study(self) -> str:
        product = " x ".join(_counted(n, name) for name, n in self.axes.items())
        return f"{self.task}, {_counted(self.n_cases, 'case')} per checkpoint = {product}"

    def _model(self, model: ModelPlan) -> Iterable[tuple[str, str]]:
        longest = max(model.footprints, key=lambda one: one.n_tokens)
        n = len(model.checkpoints)
        yield "model", f"{_counted(n, 'checkpoint')}: {_shortened(model.checkpoints)}"
        active = longest.n_active_parameters
        parameters = f"{_rounded(longest.n_parameters)} parameters"
        if active is not None and active < longest.n_parameters:
            parameters += f" ({_rounded(active)} active per token)"
        yield "", f"{longest.model_type}, {parameters}, {longest.n_layers} layers"
        yield "tokens", f"{self.tokens_naive:,} naive, every case run alone"
        fewer = f"{self.tokens_naive / model.tokens_shared:.2f} times fewer"
        yield "", f"{model.tokens_shared:,} shared, common beginnings run once ({fewer})"
        if n > 1:
            yield "", f"x {n} checkpoints: {n * self.tokens_naive:,} naive, {n * model.tokens_shared:,} shared"
        how = f"in {longest.dtype}, {longest.chunk_tokens:,} tokens a pass, {longest.n_rows} attention rows read"
        yield "memory, GiB", how
        yield from (("", line) for line in self._memory_table(model))
        yield "verdict", model.verdict
        yield from (("note", note) for note in model.notes)

    def _memory_table(self, model: ModelPlan) -> list[str]:
        names = {
            "length": "length", "weights_gib": "weights", "kv_cache_gib": "KV cache",
            "working_gib": "working", "total_gib": "total", "fullest_device_gib": "fullest device", "fits": "fits",
        }  # fmt: skip
        rows = [self._memory_row(one) for one in model.footprints]
        table = [[names[key] for key in rows[0]]]
        table += [[_cell(value) for value in row.values()] for row in rows]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]


def plan_study(
    grid: CaseGrid,
    tokenizer: PreTrainedTokenizerBase,
    configs: Sequence[tuple[str, Any]],
    *,
    metrics: Sequence[str] | Mapping[str, Any] = ("retrieval",),
    cases_per_shard: int = 64,
    dtype: str = "auto",
    chunk_tokens: int = CHUNK_TOKENS,
    sharing: Sharing = "auto",
    n_rows: int | None = None,
    memory: Memory | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Plan:
    """Work out what a study runs and takes, without any weights.

    Args:
        grid: the study's questions, of any task.
        tokenizer: of the checkpoints; lengths are exact under any tokenizer, what prompts share hardly depends on it.
        configs: (name, transformers config or folder with a config.json) of every checkpoint.
        metrics: as in `score`; those that read the question or the values take more memory, those that ask without a
            question more tokens.
        cases_per_shard: cases per unit of work; prefixes are shared within one.
        dtype: `auto` for the config's own, `float32`, `bfloat16`, `float16`.
        chunk_tokens: tokens per forward pass of a long prompt.
        sharing: whether prompts share prefixes, as in `score_cases`.
        n_rows: attention rows read per prompt; None for what the metrics read of the longest answer or question.
        memory: of the devices; None if unknown, then there is no verdict.
        notes: what the plan should say besides its own notes.
        progress: told (steps done, steps in all, message).

    Raises:
        LccpError: any mistake of input.

    Example:
        >>> print(plan_study(grid, tokenizer, [("a", "a/folder")], metrics=["retrieval"]).text())   # doctest: +SKIP
    """
    report = progress or (lambda done, total, message: None)
    groups = _by_size([(name, _loaded(config)) for name, config in configs])
    chosen = select_metrics(metrics)
    report(0, 0, "building cases")
    cases = grid.build(tokenizer)
    check_cases(cases, chosen)
    lengths = _lengths(cases)
    steps = 1 + len(groups) * len(lengths)
    shards = [cases[start : start + cases_per_shard] for start in range(0, len(cases), cases_per_shard)]
    naive = sum(visit.fed for shard in shards for visit in walk(shard))
    # Asked without a question behind its own context, or, where a model cannot go on from a cache, behind another pass.
    asked_again = [null_query(tokenizer, case) for case in cases] if _calibrated(chosen) else []
    settings: dict[str, Any] = {
        "chunk_tokens": chunk_tokens,
        "batch_tokens": BATCH_TOKENS,
        "n_rows": n_rows or max(_rows_read(case, chosen) for case in cases),
    }
    models = []
    for index, (names, config) in enumerate(groups):
        footprints = []
        for step, length in enumerate(lengths, start=1 + index * len(lengths)):
            report(step, steps, f"{names[0]} at {length:,}")
            one = footprint(config, dtype=dtype if dtype != "auto" else _own_dtype(config), n_tokens=length, **settings)
            footprints.append(_with_values(one, config, chosen, cases))
        fits, verdict = _verdict(config, footprints, settings, memory)
        shared = _tokens_shared(config, shards, sharing)
        again = sum(len(ids) if footprints[0].obstacle else len(ids) - start for ids, start in asked_again)
        models.append(
            ModelPlan(names, tuple(footprints), shared + again, verdict, fits, tuple(_model_notes(config, footprints)))
        )
    report(steps, steps, "done")
    naive += sum(len(ids) for ids, _ in asked_again)
    return Plan(
        task=str(grid.config()["task"]),
        axes=_axes(grid),
        lengths=lengths,
        metrics=tuple(chosen),
        n_cases=len(cases),
        tokens_naive=naive,
        memory=memory,
        models=tuple(models),
        notes=(*notes, *_study_notes(grid, naive, min(model.tokens_shared for model in models), sharing)),
    )


def _lengths(cases: Sequence[Case]) -> tuple[int, ...]:
    """Total lengths of the cases, rising; some of them with the longest, where there are many."""
    found = sorted({case.length for case in cases})
    if len(found) <= MAX_LENGTHS:
        return tuple(found)
    return tuple(found[round(at * (len(found) - 1) / (MAX_LENGTHS - 1))] for at in range(MAX_LENGTHS))


def _axes(grid: CaseGrid) -> dict[str, int]:
    """What a grid varies, in the order of its config; needles and samples are what is left of its cases."""
    config = grid.config()
    axes = {name: len(config[key]) for key, name in AXES.items() if isinstance(config.get(key), list)}
    samples = int(config.get("samples", 1))
    product = math.prod(axes.values()) * samples
    if "needles" in config and product:
        axes["needle"] = grid.n_cases // product
    return {**axes, "sample": samples}


def _calibrated(metrics: Mapping[str, HeadMetric]) -> bool:
    return any(metric.needs_null_query for metric in metrics.values())


def _rows_read(case: Case, metrics: Mapping[str, HeadMetric]) -> int:
    """Rows from the first that a metric reads to the prompt's end."""
    first = len(case.prompt_ids) - 1
    if case.question is not None and any(metric.rows == "question" for metric in metrics.values()):
        first = min(first, case.question.start)
    return len(case.prompt_ids) - 1 + len(case.answer_ids) - first


def _with_values(one: Footprint, config: Any, metrics: Mapping[str, HeadMetric], cases: Sequence[Case]) -> Footprint:
    """Working memory with what a layer's values come to as logits: float32 `[head, event, key]`, and the values."""
    if not any(metric.needs_values for metric in metrics.values()):
        return one
    text = config.get_text_config()
    events = max(len(case.answer_ids) for case in cases)
    n_heads = int(text.num_attention_heads)
    d_head = int(getattr(text, "head_dim", None) or text.hidden_size // n_heads)
    n_kv_heads = int(getattr(text, "num_key_value_heads", None) or n_heads)
    more = 4 * one.n_tokens * (n_heads * events + n_kv_heads * d_head)
    return replace(one, working_bytes=one.working_bytes + more)


def _loaded(config: Any) -> Any:
    return load_config(config) if isinstance(config, (str, Path)) else config


def _own_dtype(config: Any) -> str:
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(own or "float32").removeprefix("torch.")


def _by_size(configs: Sequence[tuple[str, Any]]) -> list[tuple[tuple[str, ...], Any]]:
    """Checkpoints whose configs differ in nothing that takes memory, together; continual training changes positions."""
    groups: dict[str, tuple[list[str], Any]] = {}
    for name, config in configs:
        entries = _without_positions(config.to_dict())
        key = json.dumps(entries, sort_keys=True, default=str)
        groups.setdefault(key, ([], config))[0].append(name)
    return [(tuple(names), config) for names, config in groups.values()]


def _without_positions(entries: Mapping[str, Any]) -> dict[str, Any]:
    noise = ("_name_or_path", "transformers_version", "max_position_embeddings")
    kept = {key: value for key, value in entries.items() if key not in noise and not str(key).startswith("rope")}
    return {key: _without_positions(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _tokens_shared(config: Any, shards: Sequence[Sequence[Case]], sharing: Sharing) -> int:
    """Tokens that the engine runs, shard by shard."""
    model = HookedModel(model=SimpleNamespace(config=config), tokenizer=None, name=config.model_type)
    total = 0
    for shard in shards:
        visits = walk(shard)
        along_tree = model.shares_prefixes and shares(model, shard, sharing)
        total += tokens_run(visits) if along_tree else sum(visit.fed for visit in visits)
    return total


def _verdict(
    config: Any, footprints: Sequence[Footprint], settings: Mapping[str, Any], memory: Memory | None
) -> tuple[bool | None, str]:
    """Whether the longest prompt fits, in one bit and in words."""
    longest = max(footprints, key=lambda one: one.n_tokens)
    if memory is None:
        return None, "give the GiB of your devices to see whether it fits: --memory 80, or --memory 2x80"
    for n_devices in range(1, memory.n_devices + 1):
        need = longest.on_devices(n_devices)
        if memory.holds(need) and n_devices == 1:
            return True, f"fits on one device of {memory.device_bytes / GIB:.4g} GiB: {_size(need)} are needed"
        if memory.holds(need):
            used = Memory(n_devices, memory.device_bytes)
            return True, f"fits on {used} with --device-map auto: {_size(need)} on the fullest"
    need = longest.on_devices(memory.n_devices)
    usable = int(USABLE * memory.device_bytes)
    where = "are needed" if memory.n_devices == 1 else f"on the fullest of {memory.n_devices}"
    advice = list(_advice(config, footprints, settings, memory))
    advice = advice or ["a smaller model; --device-map auto leaves what does not fit in host memory, which is slow"]
    return False, (
        f"does not fit on {memory}: {_size(need)} {where}, {_size(usable)} may be planned for; "
        f"try {'; or '.join(advice)}"
    )


def _advice(config: Any, footprints: Sequence[Footprint], settings: Mapping[str, Any], memory: Memory) -> Iterable[str]:
    """Changes each of which would make the longest prompt fit, or the longest length that does."""
    longest = max(footprints, key=lambda one: one.n_tokens)

    def fits(**changes: Any) -> bool:
        options = {"dtype": longest.dtype, "n_tokens": longest.n_tokens, **settings, **changes}
        return memory.holds(footprint(config, **options).on_devices(memory.n_devices))

    spread = " with --device-map auto" if memory.n_devices > 1 else ""
    if longest.dtype == "float32" and fits(dtype="bfloat16"):
        yield f"--dtype bfloat16{spread}"
    chunks = [chunk for chunk in SMALLER_CHUNKS if chunk < longest.chunk_tokens and not longest.obstacle]
    if chunk := next((chunk for chunk in chunks if fits(chunk_tokens=chunk)), None):
        yield f"--chunk-tokens {chunk}{spread}"
    more = range(memory.n_devices + 1, longest.n_layers + 1)
    if n_devices := next((n for n in more if memory.holds(longest.on_devices(n))), None):
        yield f"{Memory(n_devices, memory.device_bytes)} with --device-map auto"
    short = [one.n_tokens for one in footprints if memory.holds(one.on_devices(memory.n_devices))]
    if short:
        yield f"lengths up to {max(short):,}{spread}"


def _model_notes(config: Any, footprints: Sequence[Footprint]) -> Iterable[str]:
    longest = max(footprints, key=lambda one: one.n_tokens)
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit < longest.n_tokens:
        yield (
            f"the model is made for {limit:,} positions (max_position_embeddings); "
            f"{longest.n_tokens:,} tokens are extrapolation"
        )
    if longest.obstacle:
        yield f"{longest.obstacle}: prompts are run whole, and share nothing"
    if getattr(config, "quantization_config", None):
        yield f"the config's quantization is not counted: weights are planned as {longest.dtype}"


def _study_notes(grid: CaseGrid, naive: int, shared: int, sharing: Sharing) -> Iterable[str]:
    config = grid.config()
    if naive < LITTLE_SHARED * shared and config.get("needles") == "organism" and sharing != "off":
        yield (
            "prompts share little: in the bundled language every sample and depth has a needle and a haystack of its "
            "own; with --needles and --haystack all depths share one text"
        )


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / 2**20:.1f} MiB"


def _rounded(n: int) -> str:
    """A count as people say it: 80.4B, 2.6M."""
    for suffix, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.1f}{suffix}"
    return str(n)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if value >= 0.01 else "<0.01"
    return f"{value:,}" if isinstance(value, int) else str(value)
