"""Checkpoints: find them, order them by tokens seen, and verify them before anything expensive starts.

A checkpoint is a local folder in Hugging Face form (config.json, *.safetensors, tokenizer). Where its token count
comes from, best first: an explicit table; a `trajectory.json` beside it; the Trainer's `trainer_state.json`; its name
(`lccp-1.2M`, `tokens50B`), or a step in its name times tokens per step. This module reads headers and JSON only; it
refuses to know models and imports no torch. Verifying costs one read of the weight files, for their hash.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lccp_interp.schema import Checkpoint, LccpError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
"""Any of these makes a folder one with a tokenizer."""

_TOKENIZER_HASHED = (
    *TOKENIZER_FILES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_CONFIG_NOISE = ("transformers_version", "_name_or_path", "use_cache")
"""Config entries that change nothing about what a checkpoint computes."""

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TOKENS = re.compile(
    r"(?:tokens?[-_]?(\d+(?:\.\d+)?)([KMBT]?)|(\d+(?:\.\d+)?)([KMBT]?)[-_]?tok(?:en)?s?)(?![a-zA-Z0-9.])", re.IGNORECASE
)
_BARE_COUNT = re.compile(r"(?:^|[-_])(\d+(?:\.\d+)?)([KMBT])$")
_STEP = re.compile(r"(?:step|ckpt|checkpoint|iter)[-_]?0*(\d+)", re.IGNORECASE)


def parse_count(text: str) -> int:
    """A number of tokens as people write it.

    Example:
        >>> parse_count("1.2M"), parse_count("20B"), parse_count("4096")
        (1200000, 20000000000, 4096)

    Raises:
        LccpError: it is no such number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", text.strip().replace("_", "").replace(",", ""), re.IGNORECASE)
    if not match:
        raise LccpError(f"{text!r} is no number of tokens; write it like 4096, 1.2M or 20B")
    return round(float(match[1]) * SUFFIXES[match[2].upper()])


def verify_folder(path: Path) -> None:
    """Check that `path` is a whole checkpoint folder: config, weights of the full size, tokenizer.

    Raises:
        LccpError: naming the folder, what is missing or broken, and what to do.
    """
    if not path.is_dir():
        raise LccpError(
            f"no checkpoint folder at {path}; give a folder with config.json, *.safetensors and a tokenizer"
        )
    read_config(path)
    for file in weight_files(path):
        verify_safetensors(file)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise LccpError(
            f"{path} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); copy it there from the base model"
        )


def read_config(path: Path) -> dict[str, Any]:
    """The model config of a checkpoint folder.

    Raises:
        LccpError: there is none, or it is no JSON object with a model_type.
    """
    file = path / "config.json"
    if not file.is_file():
        raise LccpError(f"{path} is no checkpoint: it has no config.json; write one with model.save_pretrained(...)")
    config = _read_json(file, "model config")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise LccpError(f"{file} is no model config; it must be a JSON object with a model_type")
    return config


def _read_json(file: Path, what: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LccpError(f"{file} is no {what}: {error}; restore the file") from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder; with an index, all that it names.

    Raises:
        LccpError: there are none, a shard is missing, or there are only pickles.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        content = _read_json(index, "index of weight shards")
        if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
            raise LccpError(f"{index} is no index of weight shards: it has no weight_map; restore the file")
        names = sorted({str(name) for name in content["weight_map"].values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise LccpError(f"{index} names shard {outside[0]!r}, which is no plain file name; restore the file")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise LccpError(
                f"{path} lacks {len(missing)} of {len(names)} weight shards: {', '.join(missing[:3])}; copy them again"
            )
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        hint = (
            f"it has only pickled weights ({pickles[0]}), which can run code when loaded; convert them to safetensors"
            if pickles
            else "expected model.safetensors"
        )
        raise LccpError(f"{path} has no weights: {hint}")
    return files


def verify_safetensors(file: Path) -> None:
    """Check that a safetensors file is as long as its header says (an interrupted copy is not).

    Raises:
        LccpError: naming the file, the bytes it has and the bytes it should have.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            (n_header,) = struct.unpack("<Q", handle.read(8))
            if n_header > size:
                raise ValueError(f"header of {n_header} bytes in a file of {size}")
            header = json.loads(handle.read(n_header))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        expected = 8 + n_header + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise LccpError(f"{file} is no whole safetensors file ({error}); copy it again") from error
    if size != expected:
        raise LccpError(f"{file} is truncated or damaged: {size} bytes, its header asks for {expected}; copy it again")


def checkpoint_hash(path: Path) -> str:
    """SHA-256 over what a checkpoint computes: its config (LCCP changes the RoPE base there) and its weight files."""
    config = {key: value for key, value in read_config(path).items() if key not in _CONFIG_NOISE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in weight_files(path):
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def tokenizer_hash(path: Path) -> str:
    """SHA-256 over the tokenizer files of a checkpoint folder: folders of equal hash tokenize alike."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_HASHED:
        file = path / name
        if file.is_file():
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def common_tokenizer(checkpoints: Sequence[Checkpoint]) -> str:
    """Hash of the tokenizer that all checkpoints share; spans hold for one tokenizer only.

    Raises:
        LccpError: two checkpoints whose tokenizers differ.
    """
    hashes = {checkpoint.name: tokenizer_hash(checkpoint.path) for checkpoint in checkpoints}
    first, *rest = hashes
    for name in rest:
        if hashes[name] != hashes[first]:
            raise LccpError(
                f"checkpoints {first!r} and {name!r} have different tokenizers; put them into two run folders, "
                "or copy one tokenizer into both if only the files differ"
            )
    return hashes[first]


def bundled_trajectory() -> list[Checkpoint]:
    """The small trained trajectory that ships with the project, from its first checkpoint to its last.

    Raises:
        LccpError: it is missing from this installation.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "data" / "trajectory", package / "organism" / "trajectory"):
        if (folder / "trajectory.json").is_file():
            return find_checkpoints([folder])
    raise LccpError("this installation has no bundled trajectory; train it: lccp organism train --out data/trajectory")


def find_checkpoints(
    paths: Iterable[str | Path],
    *,
    tokens: Mapping[str, int] | None = None,
    tokens_per_step: int | None = None,
) -> list[Checkpoint]:
    """The checkpoints in `paths`, verified, hashed and ordered by tokens seen.

    Args:
        paths: checkpoint folders, or folders of them (with a `trajectory.json` or not).
        tokens: tokens seen by checkpoint name; wins over everything found.
        tokens_per_step: tokens per optimizer step, for names and trainer states that only tell steps.

    Raises:
        LccpError: nothing found, a broken folder, an unknown token count, or two checkpoints of one name or count.
    """
    given = [Path(os.path.abspath(path)) for path in paths]
    found: list[Checkpoint] = []
    for path, absolute in zip(map(Path, paths), given, strict=True):
        if given.count(absolute) > 1:
            raise LccpError(f"checkpoint folder {path} is given twice; name it once")
        found += _in_folder(path, tokens or {}, tokens_per_step)
    if not found:
        raise LccpError("no checkpoints given; name at least one checkpoint folder")
    unknown = [checkpoint for checkpoint in found if checkpoint.tokens_seen < 0]
    if unknown and len(found) == 1:
        found, unknown = [replace(found[0], tokens_seen=0)], []
    if unknown:
        name = unknown[0].name
        raise LccpError(
            f"cannot tell how many tokens checkpoint {name!r} has seen ({len(unknown)} of {len(found)} are unknown); "
            f"say it with --tokens {name}=1.2B, or --tokens-per-step N where names carry steps"
        )
    for stray in sorted(set(tokens or {}) - {checkpoint.name for checkpoint in found}):
        raise LccpError(f"--tokens names {stray!r}; the checkpoints are {', '.join(c.name for c in found)}")
    found.sort(key=lambda checkpoint: (checkpoint.tokens_seen, checkpoint.name))
    refuse_ambiguous(found)
    return found


def refuse_ambiguous(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints that share a name or a token count: their order, and so births and deaths, would mean nothing.

    Args:
        checkpoints: sorted by tokens seen.

    Raises:
        LccpError: naming the pair.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    for name in names:
        if names.count(name) > 1:
            raise LccpError(f"two checkpoints are called {name!r}; rename one folder")
    for one, other in itertools.pairwise(checkpoints):
        if one.tokens_seen == other.tokens_seen:
            raise LccpError(
                f"checkpoints {one.name!r} and {other.name!r} both have {one.tokens_seen} tokens seen; "
                "tell them apart with --tokens NAME=COUNT"
            )


@dataclass(frozen=True)
class _Entry:
    """A line of trajectory.json."""

    name: str
    path: str
    tokens_seen: int
    stage: str = "train"
    stage_tokens: int | None = None


def _in_folder(path: Path, tokens: Mapping[str, int], tokens_per_step: int | None) -> list[Checkpoint]:
    if path.is_dir() and not (path / "config.json").is_file():
        table = path / "trajectory.json"
        if table.is_file():
            return [_checkpoint(path / entry.path, entry, tokens, tokens_per_step) for entry in _entries(table)]
        folders = sorted(child for child in path.iterdir() if (child / "config.json").is_file())
        if not folders:
            raise LccpError(
                f"{path} holds no checkpoint: it has no config.json, nor has a folder in it; give checkpoint folders "
                "in Hugging Face form, or a folder of them"
            )
        return [_checkpoint(folder, None, tokens, tokens_per_step) for folder in folders]
    table = path.parent / "trajectory.json"
    entries = _entries(table) if table.is_file() and path.is_dir() else []
    listed = next((entry for entry in entries if (path.parent / entry.path).resolve() == path.resolve()), None)
    return [_checkpoint(path, listed, tokens, tokens_per_step)]


def _entries(table: Path) -> list[_Entry]:
    content = _read_json(table, "trajectory table")
    try:
        entries = [_entry(item, table.parent) for item in content["checkpoints"]]
    except (ValueError, KeyError, TypeError) as error:
        raise LccpError(
            f"{table} is no trajectory table ({error!r}); each checkpoint needs name, path, tokens_seen"
        ) from error
    if not entries:
        raise LccpError(f"{table} lists no checkpoints; each needs name, path, tokens_seen")
    return entries


def _entry(item: Any, folder: Path) -> _Entry:
    if not isinstance(item["name"], str) or not isinstance(item["path"], str):
        raise TypeError("name and path must be strings")
    if not (folder / item["path"]).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"path {item['path']!r} leaves the folder")
    counts = [item["tokens_seen"], item.get("stage_tokens")]
    for count in counts:
        if isinstance(count, bool) or not (count is None or (isinstance(count, int | float) and 0 <= count < 2**63)):
            raise ValueError(f"{count!r} is no number of tokens")
    return _Entry(
        name=item["name"],
        path=item["path"],
        tokens_seen=int(counts[0]),
        stage=str(item.get("stage", "train")),
        stage_tokens=None if counts[1] is None else int(counts[1]),
    )


def _checkpoint(path: Path, entry: _Entry | None, tokens: Mapping[str, int], tokens_per_step: int | None) -> Checkpoint:
    verify_folder(path)
    # A link keeps its own name: `step-100 -> blobs/abc` is step-100.
    name = entry.name if entry else Path(os.path.abspath(path)).name
    seen = tokens.get(name)
    if seen is None:
        seen = entry.tokens_seen if entry else _tokens_from_folder(path, name, tokens_per_step)
    return Checkpoint(
        name=name,
        path=path,
        tokens_seen=-1 if seen is None else seen,
        stage=entry.stage if entry else "train",
        stage_tokens=entry.stage_tokens if entry else None,
        hash=checkpoint_hash(path),
    )


def _tokens_from_folder(path: Path, name: str, tokens_per_step: int | None) -> int | None:
    """Tokens seen, best source first: the trainer's count, `tokens50B` in the name, steps, a count that ends the name.

    A bare count elsewhere in the name is more likely the model's size (`llama-7B-step100`).
    """
    state_file = path / "trainer_state.json"
    step: int | None = None
    if state_file.is_file():
        state = _read_json(state_file, "trainer state")
        if not isinstance(state, dict):
            raise LccpError(f"{state_file} is no trainer state; it must be a JSON object")
        if seen := int(state.get("num_input_tokens_seen") or 0):
            return seen
        step = state.get("global_step")
    if match := _TOKENS.search(name):
        return parse_count((match[1] or match[3]) + (match[2] or match[4] or ""))
    if step is None and (match := _STEP.search(name)):
        step = int(match[1])
    if step is not None:
        return None if tokens_per_step is None else int(step) * tokens_per_step
    match = _BARE_COUNT.search(name)
    return parse_count(match[1] + match[2]) if match else None
