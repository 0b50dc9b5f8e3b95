"""RULER's own data: the JSONL files that the scripts of NVIDIA/RULER write.

One object per line: `input`, `outputs` and `length`, in newer files also `answer_prefix` (older ones have it at the end
of `input`). A file does not say which task it is of: its name does, or its folder's (`niah_single_1/validation.jsonl`).
`index` is not read: for needle tasks those scripts write the place of the answer there.

This module refuses to know how such data is made. Cost: one pass of the tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lccp_interp.schema import Item, LccpError
from lccp_interp.tasks.pieces import PieceEncoder
from lccp_interp.tasks.ruler.questions import json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUDGETS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""RULER's answer budgets, tokens, by the first part of a task's name."""
OFFICIAL_SUBSETS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip


def read_ruler(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, subset: str | None = None, length: int | None = None
) -> list[Item]:
    """Items of RULER's own data; prompts are the files' text, whole, with the tokenizer's special tokens in front.

    Args:
        path: a JSONL file, or a folder in which (at any depth) such files lie, read in the order of their paths.
        tokenizer: of the model that is asked.
        subset: the task, where neither file nor folder is named after it.
        length: what to file the items under; otherwise the name of a folder around the file that is a multiple of 1000
            or 1024 (RULER's scripts make such), or the smallest power of two that is not below the longest sample.

    Returns:
        Items of the benchmark `RULER`, without evidence, in the order of the files and their lines.

    Raises:
        LccpError: no files, a file whose task is not known, two files of one task and length, or a line without
            `input` and `outputs`, with its number.

    Example:
        >>> items = read_ruler(Path("data/4096"), tokenizer)                                        # doctest: +SKIP
        >>> items[0].item_id, items[0].grader                                                        # doctest: +SKIP
        ('ruler-cwe-4096-0', 'string_match_all')
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise LccpError(f"no RULER data in {path}; give a *.jsonl file or a folder with such files")
    encoder = PieceEncoder(tokenizer)
    items = []
    read: dict[tuple[str, int], Path] = {}
    for file in files:
        found = _read_file(file, encoder, subset or _subset(file), length)
        kind = found[0].subset, found[0].length
        if kind in read:
            # RULER's folder of predictions repeats the samples.
            raise LccpError(f"{file} and {read[kind]} are both of {kind[0]} at {kind[1]} tokens; give one of them")
        read[kind] = file
        items += found
    return items


def _read_file(file: Path, encoder: PieceEncoder, subset: str, length: int | None) -> list[Item]:
    records = json_lines(file, what="RULER data")
    task = subset.split("_")[0]
    if task not in BUDGETS:
        raise LccpError(f"unknown RULER subset {subset!r}; known: {', '.join(OFFICIAL_SUBSETS)}")
    parsed = [_parse(record, f"{file}, line {number}") for number, record in records]
    prompts = [(*encoder.prefix, *encoder.start(prompt)) for prompt, _ in parsed]
    written = [record.get("length") for _, record in records]
    longest = max(
        own if isinstance(own, int) else len(ids) + BUDGETS[task] for own, ids in zip(written, prompts, strict=True)
    )
    filed_under = length or _folder_length(file) or 1 << (longest - 1).bit_length()
    return [
        Item(
            item_id=f"ruler-{subset}-{filed_under}-{index}",
            benchmark="RULER",
            subset=subset,
            length=filed_under,
            prompt_ids=ids,
            references=references,
            target=" " + (references[0] if task == "qa" else ", ".join(references)),
            grader="string_match_part" if task == "qa" else "string_match_all",
            max_new_tokens=BUDGETS[task],
        )
        for index, (ids, (_, references)) in enumerate(zip(prompts, parsed, strict=True))
    ]


def _parse(record: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """Prompt and references of a line."""
    text, outputs, prefix = record.get("input"), record.get("outputs"), record.get("answer_prefix") or ""
    if not isinstance(text, str) or not text.strip() or not isinstance(prefix, str):
        raise LccpError(
            f"{where}: fields 'input' and 'answer_prefix' must be texts, got {text!r:.40} and {prefix!r:.40}"
        )
    good = isinstance(outputs, list) and outputs and all(isinstance(output, str) and output for output in outputs)
    if not good:
        raise LccpError(f"{where}: field 'outputs' must be a list of texts, none empty, got {outputs!r:.60}")
    return text if text.endswith(prefix) else text + prefix, tuple(outputs)  # type: ignore[arg-type]


def _subset(file: Path) -> str:
    for name in (file.stem, file.parent.name):
        if name in OFFICIAL_SUBSETS:
            return name
    raise LccpError(
        f"{file}: neither the file nor its folder is named after a RULER task; name one, known: "
        f"{', '.join(OFFICIAL_SUBSETS)}"
    )


def _folder_length(file: Path) -> int | None:
    numbers = [int(folder.name) for folder in file.absolute().parents if folder.name.isdecimal()]
    return next((number for number in numbers if number and (number % 1000 == 0 or number % 1024 == 0)), None)
