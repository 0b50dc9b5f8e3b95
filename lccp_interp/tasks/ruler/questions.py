"""A user's own questions over documents, for RULER-style question answering.

One JSON object per line: `question`, `answers` (or `answer`), and `documents` (or `context`), the texts that answer it;
the documents of the other questions are what distracts. SQuAD and HotpotQA, which RULER uses, are easily brought into
this form. This module refuses to know prompts. Cost: reading the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lccp_interp.schema import LccpError


@dataclass(frozen=True, slots=True)
class UserQuestion:
    """A question, the wordings of its answer, and the documents that it is asked about."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


def read_questions(path: Path) -> list[UserQuestion]:
    """Read a JSONL file of {question, answers | answer, documents | context}, each one text or a list of texts.

    Raises:
        LccpError: no such file, no questions in it, or a line that is none; the message has the line's number.
    """
    found = []
    for number, record in json_lines(path, what="questions"):
        where = f"{path}, line {number}"
        found.append(
            UserQuestion(
                question=_texts(record, ("question",), where)[0],
                answers=_texts(record, ("answers", "answer"), where),
                documents=_texts(record, ("documents", "context"), where),
            )
        )
    return found


def json_lines(path: Path, *, what: str) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with the numbers of their lines; empty lines are skipped.

    Raises:
        LccpError: no such file, nothing in it, bytes that are not UTF-8, or a line that is no JSON object.
    """
    if not path.is_file():
        raise LccpError(f"no {what} at {path}; give a JSONL file")
    try:
        # Not splitlines: JSON strings may hold line separators beyond ASCII.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise LccpError(f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise LccpError(f"{path}, line {number}: not JSON ({error.msg}); write one object per line") from error
        if not isinstance(record, dict):
            raise LccpError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
        records.append((number, record))
    if not records:
        raise LccpError(f"{path} holds no {what}; give a JSONL file with one object per line")
    return records


def _texts(record: dict[str, Any], names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The texts under the first of the names that the record has."""
    known = [name for name in names if name in record]
    if not known:
        raise LccpError(f"{where}: no field {' or '.join(map(repr, names))}, got {', '.join(record) or 'none'}")
    value = record[known[0]]
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
    if not good:
        raise LccpError(f"{where}: field {known[0]!r} must be a text or a list of texts, none empty, got {value!r:.60}")
    return tuple(text.strip() for text in texts)
