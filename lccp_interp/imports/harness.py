"""Results as evaluation harnesses write them: lm-evaluation-harness, HELMET, RULER, OpenCompass.

Each reader takes one file and gives rows with columns as in `PROBES_SCHEMA`, scores on the scale the file has them on.
The layouts are known from the sources of the harnesses:

- `lm-eval`: lm-evaluation-harness 0.4.13 (`evaluator_utils.py`, `result_schema.py`, `evaluation_tracker.py`).
- `helmet`: `eval.py`, `arguments.py` and `scripts/collect_results.py` of princeton-nlp/HELMET, commit 4526dfb.
- `ruler`: `scripts/run.sh` and `scripts/eval/evaluate.py` of NVIDIA/RULER, commit c3f5e3b.
- `opencompass`: `opencompass/summarizers/default.py` of open-compass/opencompass, commit 0946c4e.

A file of another layout is refused with what was looked for and what was found. A score that is no finite number is
left out, and its name is kept in `left_out`. This module refuses to know runs and to rescale anything. Cost: one pass
over the file in Python; HELMET's files hold every answer of the model and may have megabytes.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from lccp_interp.imports.files import brief, csv_rows, read_json, read_text
from lccp_interp.schema import LccpError
from lccp_interp.store import PROBES_SCHEMA


@dataclass(frozen=True)
class Results:
    """Benchmark results of one file.

    `rows` has columns as in `PROBES_SCHEMA`: checkpoints as the file names them (null where it names none), tokens_seen
    null where it does not tell. `left_out` names what is no finite number, each with the reason. `called` is how the
    file names its only checkpoint, where the rows were given another name.
    """

    path: Path
    kind: str
    rows: pl.DataFrame
    left_out: tuple[str, ...] = ()
    called: str | None = None


RULER_PATH = "MODEL/synthetic/LENGTH/pred/summary.csv"

NAMES_THE_MODEL = {
    "lm-eval": "model_name and config.model_args",
    "helmet": "args.model_name_or_path",
    "ruler": f"a path {RULER_PATH}",
}
"""Where a file of each kind says of which model it is; in the others every row or column names one."""


@dataclass
class _Gathered:
    """Rows and left-out scores of a file, while it is read."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, what: str, value: Any, **columns: Any) -> None:
        """Take `value` as a score; leave it out under the name `what` where it is no finite number."""
        number = _finite(value)
        if number is None:
            self.left_out.append(f"{what} ({value if isinstance(value, str) and value else brief(value)})")
        else:
            self.rows.append({**columns, "score": number})

    def results(self, path: Path, kind: str) -> Results:
        if not self.rows:
            left_out = f"; left out: {name_some(self.left_out)}" if self.left_out else ""
            raise LccpError(f"{path}: there is no score in it{left_out}")
        return Results(path, kind, pl.DataFrame(self.rows, schema=PROBES_SCHEMA), tuple(self.left_out))


def _finite(value: Any) -> float | None:
    """A finite number of JSON; None for all else, also for a number in quotes."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def _cell(text: str) -> float | str:
    """A cell of CSV, as a number if it is one."""
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE) else text


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def name_some(names: Sequence[str], most: int = 20) -> str:
    """The names, of many only the first.

    Example:
        >>> name_some(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _refuse(path: Path, what: str, looked_for: str, found: Any) -> LccpError:
    if isinstance(found, Mapping):
        found = f"the keys {name_some([str(key) for key in found], 8)}" if found else "an empty object"
    elif isinstance(found, list):
        found = "a list"
    elif not isinstance(found, str):
        found = brief(found)
    return LccpError(f"{path}: these are no results of {what}: looked for {looked_for}, found {found}")


# lm-evaluation-harness


NO_METRICS = {"name", "alias", "sample_len", "sample_count"}
"""Keys of a task that hold no metric."""

MODEL_ARGS = ("peft", "delta", "pretrained", "model", "path", "engine")
"""Arguments that name the model, in the harness's own order: an adapter before the model it is added to."""


def read_lm_eval(path: Path) -> Results:
    """Results of lm-evaluation-harness 0.4 (`results_*.json`).

    A task in a group gets the outermost group as its benchmark and its own name as its subset; the group's own score
    has no subset, so that nothing stands twice under one name. The filter `none` is not told; another stays in the
    metric's name (`exact_match,strict-match`). Metrics whose name is a number, as of its RULER tasks, are context
    lengths: the number becomes `length`, the metric is `score` (a fraction), and -1 there means that the length was not
    run. n of such a score is told only where one length was run, as the file counts the samples of all.

    Example:
        >>> read_lm_eval(Path("results_2026-11-01T10-00-00.json")).rows   # doctest: +SKIP
    """
    content = read_json(path)
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict) or not all(isinstance(metrics, dict) for metrics in results.values()):
        raise _refuse(path, "lm-evaluation-harness", "the key results with an object of metrics per task", content)
    groups = content.get("groups")
    if isinstance(groups, dict):
        results |= {name: row for name, row in groups.items() if name not in results and isinstance(row, dict)}
    keys = [key for metrics in results.values() for key in metrics if _is_score(key)]
    if not any("," in key for key in keys):
        raise _refuse(
            path,
            "lm-evaluation-harness 0.4 or later",
            'metrics named "metric,filter"',
            f"{name_some(keys, 8) or 'none'}",
        )
    checkpoint = _lm_eval_model(content)
    outermost = _outermost_groups(content.get("group_subtasks"))
    gathered = _Gathered()
    for task, metrics in results.items():
        benchmark, subset = _lm_eval_place(task, metrics, outermost, content)
        n_samples = _entry(content, "n-samples", task, "effective")
        for row in _lm_eval_task(task, metrics, n_samples, gathered.left_out):
            gathered.add(**row, checkpoint=checkpoint, benchmark=benchmark, subset=subset)
    return gathered.results(path, "lm-eval")


def _lm_eval_task(
    task: str, metrics: Mapping[str, Any], n_samples: Any, left_out: list[str]
) -> Iterator[dict[str, Any]]:
    scores = {key: value for key, value in metrics.items() if _is_score(key)}
    for key, value in scores.items():
        if _length(key) and value == -1:
            left_out.append(f"{task} {key} (-1: not run)")
    scores = {key: value for key, value in scores.items() if not (_length(key) and value == -1)}
    n_lengths = len({_length(key) for key in scores} - {None})
    for key, value in scores.items():
        metric, _, which = key.partition(",")
        length = _length(key)
        name = "score" if length else metric
        n = next((n for n in (_entry(metrics, "sample_count", key), n_samples, metrics.get("sample_len")) if n), None)
        yield {
            "what": f"{task} {key}",
            "value": value,
            "metric": name if which in ("none", "") else f"{name},{which}",
            "length": length,
            "n": _count(n) if not length or n_lengths == 1 else None,
            "stderr": _stderr(metrics.get(f"{metric}_stderr,{which}")),
        }


def _is_score(key: str) -> bool:
    """Whether a key of a task is a metric; groups without a score of their own may have one that is blank."""
    metric = key.partition(",")[0].strip()
    return bool(metric) and metric not in NO_METRICS and not metric.endswith("_stderr")


def _stderr(value: Any) -> float | None:
    """A standard error; None for "N/A" and all else that is none."""
    number = _finite(value)
    return number if number is not None and number >= 0 else None


def _length(key: str) -> int | None:
    metric = key.partition(",")[0]
    return int(metric) if re.fullmatch(r"[1-9]\d{0,17}", metric, re.ASCII) else None


def _entry(content: Any, *keys: str) -> Any:
    """content[key][key]..., None where there is no such thing."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _lm_eval_model(content: Mapping[str, Any]) -> str | None:
    """The model's name, with its revision where one was asked for: several checkpoints may be revisions of one name."""
    arguments = _entry(content, "config", "model_args")
    if isinstance(arguments, str):
        arguments = dict(pair.partition("=")[::2] for pair in arguments.split(","))
    named = (_entry(arguments, key) for key in MODEL_ARGS)
    name = next((name for name in (content.get("model_name"), *named) if isinstance(name, str) and name), None)
    revision = _entry(arguments, "revision")
    return f"{name}@{revision}" if name and isinstance(revision, str) and revision not in ("", "main") else name


def _outermost_groups(group_subtasks: Any) -> dict[str, list[str]]:
    """task or group -> the groups it belongs to that are in no group themselves."""
    children = {
        group: [str(child) for child in listed]
        for group, listed in (group_subtasks.items() if isinstance(group_subtasks, dict) else ())
        if isinstance(listed, list) and listed
    }
    inner = {child for listed in children.values() for child in listed}
    found: dict[str, list[str]] = {}
    for group in children:
        if group in inner:
            continue
        waiting, seen = [group], {group}
        while waiting:
            for child in children.get(waiting.pop(), ()):
                if child not in seen:
                    seen.add(child)
                    waiting.append(child)
        for name in seen:
            found.setdefault(name, []).append(group)
    return found


def _lm_eval_place(
    task: str, metrics: Mapping[str, Any], outermost: Mapping[str, list[str]], content: Mapping[str, Any]
) -> tuple[str, str | None]:
    """(benchmark, subset) of a task."""
    groups = outermost.get(task, [])
    if len(groups) == 1:
        return groups[0], None if task == groups[0] else task
    if not groups and any(_length(key) for key in metrics):
        # Alone or in its group a RULER task is one benchmark; its family is the folder that it was defined in.
        source = _entry(content, "configs", task, "metadata", "config_source")
        family = Path(source).parent.name if isinstance(source, str) else ""
        if family:
            return family, task
    return task, None


# HELMET


JUDGED = "-gpt4eval_o.json"
THINKING_TOKENS = 32768
"""HELMET adds them to the length in `args` where the model may think; the file's name has the length without them."""


def read_helmet(path: Path) -> Results:
    """Results of HELMET: a file of one data set at one length, with `args` and `averaged_metrics`.

    The benchmark is `helmet`, the subset the data set, the length `input_max_length`. HELMET gives percent but for
    metrics of GPT-4, whose n it does not tell; lengths of prompts and answers (`*_len`) are no metrics. A `.json.score`
    (of ALCE the only one with its metrics) is read with the `.json` beside it, which says what it is of.

    Example:
        >>> read_helmet(Path("json_kv_eval_..._in8192_size100_..._42.json")).rows   # doctest: +SKIP
    """
    is_score = path.name.endswith(".json.score")
    whole_path = path.with_suffix("") if is_score else path
    if is_score and not whole_path.is_file():
        raise LccpError(
            f"{path} says nothing of model and length; put {whole_path.name} beside it, which has them under args"
        )
    content = read_json(whole_path)
    arguments = _entry(content, "args")
    averages = read_json(path) if is_score else _entry(content, "averaged_metrics")
    if not isinstance(arguments, dict) or not isinstance(averages, dict):
        raise _refuse(whole_path, "HELMET", "the keys args, averaged_metrics", content)
    dataset = arguments.get("datasets")
    if not isinstance(dataset, str) or not dataset:
        raise _refuse(whole_path, "HELMET", "args with the key datasets", arguments)
    model = arguments.get("model_name_or_path")
    place = {
        "checkpoint": model if isinstance(model, str) and model else None,
        "benchmark": "helmet",
        "subset": dataset,
        "length": _helmet_length(whole_path, arguments),
    }
    gathered = _Gathered()
    for metric, value in averages.items():
        if "_len" in metric or metric == "length":
            continue  # of prompts and answers: no score
        scored = _entry(content, "metrics", metric)
        if is_score and scored is None:
            scored = _entry(content, "data")  # what is scored afterwards is scored over all answers
        n = len(scored) if isinstance(scored, list) else None
        gathered.add(f"{dataset} {metric}", value, **place, metric=metric, n=n)
    return gathered.results(path, "helmet")


def _helmet_length(path: Path, arguments: Mapping[str, Any]) -> int:
    told = arguments.get("input_max_length")
    if isinstance(told, bool) or not re.fullmatch(r"[1-9]\d{0,17}", str(told), re.ASCII):
        raise LccpError(f"{path}: args.input_max_length: expected a whole number of tokens, got {brief(told)}")
    length = int(str(told)) - (THINKING_TOKENS if arguments.get("thinking") is True else 0)
    named = re.search(r"_in(\d{1,18})_size", path.name, re.ASCII)
    if named and int(named[1]) != length:
        raise LccpError(f"{path}: the name says {named[1]} tokens, args.input_max_length {length}; mend the wrong one")
    return length


def find_helmet(folder: Path) -> list[Path]:
    """HELMET's files under `folder`, of each the one that has its metrics: as judged by GPT-4 where it was, ALCE's
    `.json.score`."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        judged = path.with_name(path.name.removesuffix(".json") + JUDGED)
        content = None if judged.is_file() else _json_or_none(path)
        if isinstance(content, dict) and {"args", "averaged_metrics"} <= content.keys():
            score = path.with_name(f"{path.name}.score")
            of_alce = "alce" in str(_entry(content, "args", "datasets"))
            found.append(score if of_alce and score.is_file() else path)
    return found


def _json_or_none(path: Path) -> Any:
    try:
        return read_json(path)
    except LccpError:
        return None  # other files may lie in the folder


# RULER


def read_ruler(path: Path, length: int | None = None) -> Results:
    """Results of RULER: a `summary.csv` with the rows Tasks, Score, Nulls.

    Model and length stand in the path only, MODEL/synthetic/LENGTH/pred/summary.csv. The benchmark is `ruler`, the
    subset the task, the metric `score_percent`, as RULER's metrics are percent; n is the number of predictions in Nulls
    (those that are empty count as answers, as in RULER).

    Args:
        path: the file.
        length: in tokens, where the path does not tell it.

    Example:
        >>> read_ruler(Path("out/step-100/synthetic/4096/pred/summary.csv")).rows   # doctest: +SKIP
    """
    table = _ruler_table(path)
    model, told = _ruler_path(path)
    if told is None and length is None:
        raise LccpError(f"{path} does not tell the context length (looked for a path {RULER_PATH}); say --length N")
    if told is not None and length is not None and told != length:
        raise LccpError(f"{path}: the folder says {told} tokens, --length {length}; leave out --length")
    gathered = _Gathered()
    nulls = table.get("Nulls", [""] * len(table["Tasks"]))
    for task, score, empty in zip(table["Tasks"], table["Score"], nulls, strict=True):
        counted = re.fullmatch(r"\d+/([1-9]\d{0,8})", empty, re.ASCII)
        gathered.add(
            f"{task} score",
            _cell(score),
            checkpoint=model,
            benchmark="ruler",
            subset=task,
            length=told or length,
            metric="score_percent",
            n=int(counted[1]) if counted else None,
        )
    return gathered.results(path, "ruler")


def _ruler_table(path: Path) -> dict[str, list[str]]:
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(read_text(path).splitlines(), strict=True) if row]
    except csv.Error as error:
        raise LccpError(f"{path}: no CSV ({error}); give the file as RULER wrote it") from None
    table = {row[0]: row[1:] for row in rows}
    if not {"Tasks", "Score"} <= table.keys():
        found = "lines that begin with " + name_some([brief(label) for label in table], 5)
        raise _refuse(path, "RULER", "lines that begin with Tasks, Score, Nulls", found)
    tasks = table["Tasks"]
    for label in ("Score", "Nulls"):
        if label in table and len(table[label]) != len(tasks):
            raise LccpError(
                f"{path}: {len(tasks)} Tasks, but {len(table[label])} {label}; give the file as RULER wrote it"
            )
    if len(set(tasks)) < len(tasks) or "" in tasks:
        raise LccpError(f"{path}: expected each task's name once under Tasks, got {', '.join(tasks)}")
    return table


def _ruler_path(path: Path) -> tuple[str | None, int | None]:
    """(model, length in tokens) of a path as in `RULER_PATH`; None for what it does not tell."""
    parts = Path(os.path.abspath(path)).parts
    match parts[-5:]:
        case model, "synthetic", length, "pred", _:
            return model, int(length) if re.fullmatch(r"[1-9]\d{0,17}", length, re.ASCII) else None
        case _, _, length, "pred", _ if re.fullmatch(r"[1-9]\d{0,17}", length, re.ASCII):
            return None, int(length)
    return None, None


def find_ruler(folder: Path) -> list[Path]:
    """RULER's summaries under `folder`; of a single task only where there is none of all tasks beside it."""
    found = [path for path in sorted(folder.rglob("summary*.csv")) if re.fullmatch(r"summary(-.+)?\.csv", path.name)]
    whole = {path.parent for path in found if path.name == "summary.csv"}
    return [path for path in found if path.name == "summary.csv" or path.parent not in whole]


# OpenCompass


OPENCOMPASS_COLUMNS = ("dataset", "version", "metric", "mode")


def read_opencompass(path: Path) -> Results:
    """Results of OpenCompass: `summary_*.csv` with a line per data set and metric, and a column per model.

    The benchmark is the data set. A dash means that it was not run. The file has neither n nor standard errors.

    Example:
        >>> read_opencompass(Path("summary_20261101_100000.csv")).rows   # doctest: +SKIP
    """
    gathered = _Gathered()
    for line, row in csv_rows(path, required=OPENCOMPASS_COLUMNS):
        models = [name for name in row if name not in OPENCOMPASS_COLUMNS]
        if not models or "" in models:
            raise LccpError(
                f"{path}: expected a column per model after {', '.join(OPENCOMPASS_COLUMNS)}, got {', '.join(row)}"
            )
        if all(row[model] == "-" for model in models):
            gathered.left_out.append(f"{row['dataset']} (-: not run)")
            continue
        if not row["dataset"] or not row["metric"]:
            raise LccpError(f"{path} line {line}: expected the name of a data set and of a metric, got {brief(row)}")
        for model in models:
            gathered.add(
                f"{row['dataset']} {row['metric']} of {model}",
                _cell(row[model]),
                checkpoint=model,
                benchmark=row["dataset"],
                metric=row["metric"],
            )
    return gathered.results(path, "opencompass")


def find_lm_eval(folder: Path) -> list[Path]:
    """lm-evaluation-harness's files under `folder`."""
    return sorted(folder.rglob("results*.json"))


HARNESS_READERS: dict[str, Callable[[Path], Results]] = {
    "lm-eval": read_lm_eval,
    "helmet": read_helmet,
    "ruler": read_ruler,
    "opencompass": read_opencompass,
}
FINDERS: dict[str, tuple[Callable[[Path], list[Path]], str]] = {
    "lm-eval": (find_lm_eval, "results*.json"),
    "helmet": (find_helmet, "*.json with args and averaged_metrics"),
    "ruler": (find_ruler, RULER_PATH),
}
"""Kinds whose results may be a folder: what finds its files, and how that is told."""
