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
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lccp_interp.schema import Checkpoint, LccpError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"(?:^|[^a-zA-Z0-9.])(?:tokens?[-_]?)?(\d+(?:\.\d+)?)([KMBT])(?:[-_]?tok(?:en)?s?)?(?![a-zA-Z0-9])")
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
    config = path / "config.json"
    if not config.is_file():
        raise LccpError(f"{path} is no checkpoint: it has no config.json; write one with model.save_pretrained(...)")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise LccpError(f"{config} is no model config ({error!r}); it must be JSON with a model_type") from error
    if not isinstance(model_type, str):
        raise LccpError(f"{config}: model_type must be a string, got {model_type!r}")
    weights = weight_files(path)
    for file in weights:
        verify_safetensors(file)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise LccpError(
            f"{path} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); copy it there from the base model"
        )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder; with an index, all that it names.

    Raises:
        LccpError: there are none, a shard is missing, or there are only pickles.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise LccpError(f"{path} lacks {len(missing)} of {len(names)} weight shards: {', '.join(missing[:3])}")
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
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            (n_header,) = struct.unpack("<Q", handle.read(8))
            if n_header > size:
                raise ValueError(f"header of {n_header} bytes in a file of {size}")
            header = json.loads(handle.read(n_header))
        expected = (
            8 + n_header + max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
        )
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise LccpError(f"{file} is no whole safetensors file ({error}); copy it again") from error
    if size != expected:
        raise LccpError(f"{file} is truncated or damaged: {size} bytes, its header asks for {expected}; copy it again")


def weights_hash(path: Path) -> str:
    """SHA-256 over the weight files of a checkpoint folder, in the order of their names."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def tokenizer_hash(path: Path) -> str:
    """SHA-256 over the tokenizer files of a checkpoint folder: equal hashes tokenize alike."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = path / name
        if file.is_file():
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


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
    found: list[Checkpoint] = []
    for path in map(Path, paths):
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
    for one, other in itertools.pairwise(found):
        if one.tokens_seen == other.tokens_seen:
            raise LccpError(
                f"checkpoints {one.name!r} and {other.name!r} both have {one.tokens_seen} tokens seen; "
                "tell them apart with --tokens NAME=COUNT"
            )
    names = [checkpoint.name for checkpoint in found]
    for name in names:
        if names.count(name) > 1:
            raise LccpError(f"two checkpoints are called {name!r}; rename one folder")
    return found


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise LccpError(
            f"no checkpoint folder at {path}; give a folder with config.json, *.safetensors and a tokenizer"
        )


def _in_folder(path: Path, tokens: Mapping[str, int], tokens_per_step: int | None) -> list[Checkpoint]:
    if not path.is_dir():
        raise LccpError(
            f"no checkpoint folder at {path}; give a folder with config.json, *.safetensors and a tokenizer"
        )
    if (path / "config.json").is_file():
        return [_checkpoint(path, _listed(path), tokens, tokens_per_step)]
    table = path / "trajectory.json"
    if table.is_file():
        return [_checkpoint(path / str(entry["path"]), entry, tokens, tokens_per_step) for entry in _entries(table)]
    folders = sorted(child for child in path.iterdir() if (child / "config.json").is_file())
    if not folders:
        raise LccpError(
            f"{path} holds no checkpoint: no config.json in it nor in its folders; give checkpoint folders in Hugging "
            "Face form, or a folder of them"
        )
    return [_checkpoint(folder, None, tokens, tokens_per_step) for folder in folders]


def _entries(table: Path) -> Sequence[Mapping[str, object]]:
    try:
        entries = json.loads(table.read_text(encoding="utf-8"))["checkpoints"]
        for entry in entries:
            if not isinstance(entry["name"], str) or not isinstance(entry["path"], str):
                raise TypeError("name and path must be strings")
            if int(entry["tokens_seen"]) < 0:
                raise ValueError(f"tokens_seen of {entry['name']} is negative")
            inside = (table.parent / entry["path"]).resolve()
            if not inside.is_relative_to(table.parent.resolve()):
                raise ValueError(f"path {entry['path']!r} leaves the folder")
    except (ValueError, KeyError, TypeError) as error:
        raise LccpError(
            f"{table} is no trajectory table ({error!r}); each checkpoint needs name, path, tokens_seen"
        ) from error
    return list(entries)


def _listed(path: Path) -> Mapping[str, object] | None:
    table = path.parent / "trajectory.json"
    if not table.is_file():
        return None
    return next(
        (entry for entry in _entries(table) if (path.parent / str(entry["path"])).resolve() == path.resolve()), None
    )


def _checkpoint(
    path: Path, entry: Mapping[str, object] | None, tokens: Mapping[str, int], tokens_per_step: int | None
) -> Checkpoint:
    verify_folder(path)
    name = str(entry["name"]) if entry else path.resolve().name
    seen = tokens.get(name)
    if seen is None and entry is not None:
        seen = int(str(entry["tokens_seen"]))
    if seen is None:
        seen = _tokens_from_folder(path, tokens_per_step)
    stage_tokens = entry.get("stage_tokens") if entry else None
    return Checkpoint(
        name=name,
        path=path,
        tokens_seen=-1 if seen is None else seen,
        stage=str(entry.get("stage", "train")) if entry else "train",
        stage_tokens=None if stage_tokens is None else int(str(stage_tokens)),
        hash=weights_hash(path),
    )


def _tokens_from_folder(path: Path, tokens_per_step: int | None) -> int | None:
    state_file = path / "trainer_state.json"
    step: int | None = None
    if state_file.is_file():
        state = json.loads(state_file.read_text(encoding="utf-8"))
        if seen := int(state.get("num_input_tokens_seen") or 0):
            return seen
        step = state.get("global_step")
    if match := _COUNT.search(path.resolve().name):
        return parse_count(match[1] + match[2])
    if step is None and (match := _STEP.search(path.resolve().name)):
        step = int(match[1])
    return None if step is None or tokens_per_step is None else step * tokens_per_step
