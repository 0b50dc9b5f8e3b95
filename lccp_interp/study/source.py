"""A study file: read, checked against its form, every mistake named with its line.

YAML is read with the safe loader, which knows texts, numbers, lists and mappings and runs nothing; a key that stands
twice is refused. Paths are those of the file: relative ones begin at its folder. What is wrong is told all at once, a
line each: where, what was got, what is allowed, and what was probably meant. This module refuses to know how a study is
run. Cost: milliseconds.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from lccp_interp.study.form import Study

MAX_TOLD = 12
"""Mistakes told at once."""

BUNDLED = "bundled"
"""As a source of checkpoints: the trajectory that ships with the project."""

Where = tuple[str | int, ...]


def read_study(path: str | Path, *, out: str | Path | None = None) -> Study:
    """The study of a file.

    Args:
        path: YAML or JSON.
        out: the run folder, instead of the file's own.

    Returns:
        The study, checked, its paths made absolute.

    Raises:
        LccpError: no such file, no YAML, or everything in it that does not fit the form, line by line.

    Example:
        >>> read_study("examples/study.yaml").tasks[0].task   # doctest: +SKIP
        'niah'
    """
    path = Path(path)
    content, lines = _parse(path)
    study = check_study(content, where=str(path), lines=lines)
    return _located(study, path.resolve().parent, out)


def check_study(content: Mapping[str, Any], *, where: str = "study", lines: Mapping[Where, int] | None = None) -> Study:
    """A study from plain values, such as a parsed file or a dict of one's own.

    Args:
        content: as in `Study`.
        where: named in errors.
        lines: the line of every key, where there is a file.

    Raises:
        LccpError: everything that does not fit the form.

    Example:
        >>> check_study({"out": "runs/a", "checkpoints": "ckpts", "tasks": [{"task": "niah"}]}).checkpoints.sources
        ['ckpts']
    """
    from pydantic import ValidationError

    from lccp_interp.study.form import Study

    # A heading of which all is commented out asks for what is usual.
    content = {key: value for key, value in content.items() if value is not None or key not in Study.model_fields}
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        told = _told(error, content, where, lines or {})
        more = "" if len(told) <= MAX_TOLD else f"\n... and {len(told) - MAX_TOLD} more"
        raise LccpError("\n".join(told[:MAX_TOLD]) + more) from error


def _parse(path: Path) -> tuple[dict[str, Any], dict[Where, int]]:
    """The file's values, and the line of each key and item."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise LccpError(f"study file {path}: {reason}; write a commented one with `lccp init {path}`") from error
    lines: dict[Where, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            _lines(node, (), lines, path)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise LccpError(f"{place}: no YAML: {getattr(error, 'problem', None) or error}; mend the line") from error
    except RecursionError as error:
        raise LccpError(f"{path}: nested too deeply, or a part of itself; write it out") from error
    if not isinstance(content, dict):
        raise LccpError(f"{path} holds no study: expected keys like out, checkpoints, tasks (`lccp init` writes one)")
    return content, lines


def _lines(node: Any, at: Where, lines: dict[Where, int], path: Path) -> None:
    import yaml

    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise LccpError(f"{path}:{key.start_mark.line + 1}: a key has to be a plain text; mend the line")
            name = key.value
            if (*at, name) in lines:
                raise LccpError(
                    f"{path}:{key.start_mark.line + 1}: {name!r} stands twice, first in line {lines[*at, name]}; "
                    "keep one"
                )
            lines[*at, name] = key.start_mark.line + 1
            _lines(value, (*at, name), lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[*at, index] = value.start_mark.line + 1
            _lines(value, (*at, index), lines, path)


def _told(error: Any, content: Mapping[str, Any], where: str, lines: Mapping[Where, int]) -> list[str]:
    """One line per mistake, in the order of the file; of the alternatives of one value the first tells for all."""
    found: dict[Where, tuple[int, str]] = {}
    for mistake in error.errors(include_url=False):
        at = _in_file(mistake["loc"], content, is_missing=mistake["type"] == "missing")
        line = next((lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in lines), 0)
        place = f"{where}:{line}" if line else where
        words = _in_words(mistake, at, content)
        if at in found and mistake["type"] != "extra_forbidden":
            continue
        found[at] = (line, f"{place}: {_dotted(at)}{words}")
    # Where one alternative was meant and has a mistake inside, that the value is none of the others is no news.
    deepest = [one for at, one in found.items() if not any(other[: len(at)] == at != other for other in found)]
    return [text for _, text in sorted(deepest, key=lambda one: one[0])]


def _in_file(loc: Sequence[str | int], content: Any, *, is_missing: bool) -> Where:
    """Where pydantic's place is in the file: without the names of types and alternatives that it puts between."""
    at: Where = ()
    inside = content
    for number, part in enumerate(loc):
        if isinstance(inside, Mapping) and (part in inside or (is_missing and number == len(loc) - 1)):
            at, inside = (*at, part), inside.get(part)
        elif isinstance(inside, list) and isinstance(part, int) and part < len(inside):
            at, inside = (*at, part), inside[part]
    return at


def _dotted(at: Where) -> str:
    text = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in at).lstrip(".")
    return f"{text}: " if text else ""


def _in_words(mistake: Mapping[str, Any], at: Where, content: Any) -> str:
    """What is wrong, and what is allowed."""
    kind, got = mistake["type"], mistake.get("input")
    context = mistake.get("ctx") or {}
    if kind == "missing":
        return "is missing; give it"
    if kind == "extra_forbidden":
        known = _known_keys(at[:-1], content)
        near = difflib.get_close_matches(str(at[-1]), known, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key; {meant}known: {', '.join(known)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = str(context.get("discriminator", "task")).strip("'")
        allowed = context.get("expected_tags") or _tags(tag)
        given = f"got {context['tag']!r}" if "tag" in context else f"it has no {tag!r}"
        return f"{given}; {tag} is one of {allowed}"
    if kind == "literal_error":
        return f"got {got!r}; allowed: {context.get('expected', '')}"
    if kind == "value_error":
        return str(context.get("error", mistake["msg"]))
    return f"got {got!r}; {mistake['msg'][:1].lower()}{mistake['msg'][1:]}"


def _tags(tag: str) -> str:
    from lccp_interp.study import form

    union = {"task": form.AnyTask, "probe": form.AnyProbe}[tag]
    return ", ".join(repr(next(iter(get_args(model.model_fields[tag].annotation)))) for model in _models(union))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _known_keys(at: Where, content: Any) -> list[str]:
    """The keys that the form knows where `at` is."""
    from lccp_interp.study.form import Study

    models: list[type[BaseModel]] = [Study]
    inside = content
    for part in at:
        inside = inside[part]
        if isinstance(part, str):
            models = [one for model in models if part in model.model_fields
                      for one in _models(model.model_fields[part].rebuild_annotation())]  # fmt: skip
    for tag in ("task", "probe"):
        if isinstance(inside, Mapping) and tag in inside:
            models = [one for one in models if inside[tag] in get_args(one.model_fields[tag].annotation)] or models
    return [name for model in models for name in model.model_fields]


def _located(study: Study, folder: Path, out: str | Path | None) -> Study:
    """The study with paths of its own folder made absolute, and with another run folder where one was asked for."""

    def place(text: str) -> str:
        return str(folder / os.path.expanduser(text))

    def source(text: str) -> str:
        return text if text == BUNDLED or not _is_path(text, folder) else place(text)

    trajectory = study.checkpoints
    tokens = place(trajectory.tokens) if isinstance(trajectory.tokens, str) else trajectory.tokens
    trajectory = trajectory.model_copy(
        update={
            "sources": [source(text) for text in trajectory.sources],
            "tokens": tokens,
            "cache": None if trajectory.cache is None else place(trajectory.cache),
        }
    )
    tasks = [
        task.model_copy(
            update={
                name: place(value)
                for name in ("needles", "haystack")
                if (value := getattr(task, name, None)) is not None
            }
        )
        for task in study.tasks
    ]
    probes = [_located_probe(probe, place, folder) for probe in study.probes]
    run = place(study.out) if out is None else str(Path(out).absolute())
    return study.model_copy(
        update={"out": os.path.normpath(run), "checkpoints": trajectory, "tasks": tasks, "probes": probes}
    )


def _located_probe(probe: Any, place: Any, folder: Path) -> Any:
    if hasattr(probe, "corpora"):
        from lccp_interp.tasks.corpus import ORGANISM_KINDS

        return probe.model_copy(
            update={"corpora": [text if text in ORGANISM_KINDS else place(text) for text in probe.corpora]}
        )
    if getattr(probe, "data", None):
        pairs = [text.partition(":") for text in probe.data]
        return probe.model_copy(update={"data": [f"{kind}{colon}{place(rest)}" for kind, colon, rest in pairs]})
    return probe


def _is_path(text: str, folder: Path) -> bool:
    """Whether a source is a folder or a pattern of folders beside the study, rather than a repository of a hub."""
    if text.startswith("hf://"):
        return False
    if not text or text.startswith((".", "/", "~")) or any(folder.glob(text)):
        return True
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", text) is None
