"""Checkpoint folders: whether they are whole, which files are their weights, and what they hash to.

Headers, indexes and sizes are read, and every weight file once for its hash. This module refuses to know where a
folder came from and loads no weights. Pickled weights can run code when they are loaded: they are refused unless they
are asked for, and hashing reads their bytes only.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lccp_interp.schema import Checkpoint, LccpError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
"""Any of these makes a folder one with a tokenizer."""

TOKENIZER_HASHED = (
    *TOKENIZER_FILES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_CONFIG_NOISE = ("transformers_version", "_name_or_path", "use_cache")
"""Config entries that change nothing about what a checkpoint computes."""

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PICKLES = (".bin", ".pt", ".pth")
_MAX_HEADER_BYTES = 100_000_000
"""The safetensors format allows no longer header."""


def verify_folder(path: Path, *, allow_pickle: bool = False) -> None:
    """Check that `path` is a whole checkpoint folder: config, weights of the full size, tokenizer.

    Args:
        path: the folder.
        allow_pickle: whether pickled weights will do where there are no others.

    Raises:
        LccpError: naming the folder, what is missing or broken, and what to do.
    """
    if not path.is_dir():
        raise LccpError(
            f"no checkpoint folder at {path}; give a folder with config.json, *.safetensors and a tokenizer"
        )
    read_config(path)
    for file in weight_files(path, allow_pickle=allow_pickle):
        verify_weights(file)
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
    config = read_json(file, "model config")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise LccpError(f"{file} is no model config; it must be a JSON object with a model_type")
    return config


def read_json(file: Path, what: str) -> Any:
    """The content of a JSON file.

    Raises:
        LccpError: it cannot be read; `what` says what it should be.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LccpError(f"{file} is no {what}: {error}; restore the file") from error


def weight_files(path: Path, *, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a checkpoint folder, in the order of their names; with an index, all that it names.

    Raises:
        LccpError: there are none, a shard is missing, there are only pickles and they are not allowed, or two sets of
            weights.
    """
    present = {file.name for file in path.iterdir() if file.is_file()} if path.is_dir() else set()
    names = weight_names(present, lambda name: read_json(path / name, "index of weight shards"), str(path))
    if SAFETENSORS in present and SAFETENSORS not in names:
        raise LccpError(
            f"{path} has two sets of weights: {SAFETENSORS}, and the shards of {SAFETENSORS_INDEX}; delete one of them"
        )
    if is_pickled(names) and not allow_pickle:
        raise LccpError(f"{path} has no weights: {pickle_refusal(names)}")
    return [path / name for name in names]


def weight_names(present: Collection[str], read_index: Callable[[str], Any], where: str) -> list[str]:
    """Which of the files of a checkpoint are its weights: safetensors where there are any, else pickles.

    Args:
        present: names of the files that are there, in a folder or on a hub.
        read_index: gives the parsed content of an index of shards by its file name.
        where: what to call the place in an error.

    Raises:
        LccpError: there are none, an index is broken, names what is no plain file name, or a shard that is missing.

    Example:
        >>> weight_names({"config.json", "model.safetensors", "pytorch_model.bin"}, {}.get, "here")
        ['model.safetensors']
    """
    for index, single in ((SAFETENSORS_INDEX, SAFETENSORS), (PICKLE_INDEX, PICKLE)):
        if index in present:
            return _shard_names(present, read_index(index), f"{where}/{index}", where)
        if single in present:
            return [single]
        if single == SAFETENSORS and (files := sorted(name for name in present if name.endswith(".safetensors"))):
            return files
    pickles = sorted(name for name in present if name.endswith(_PICKLES))
    hint = (
        f"it has only pickled weights ({pickles[0]}), which can run code when loaded; convert them to safetensors"
        if pickles
        else f"expected {SAFETENSORS}"
    )
    raise LccpError(f"{where} has no weights: {hint}")


def _shard_names(present: Collection[str], index: Any, file: str, where: str) -> list[str]:
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise LccpError(f"{file} is no index of weight shards: it has no weight_map; restore the file")
    names = sorted({str(name) for name in index["weight_map"].values()})
    if outside := [name for name in names if not is_plain_name(name)]:
        raise LccpError(f"{file} names shard {outside[0]!r}, which is no plain file name; restore the file")
    if missing := [name for name in names if name not in present]:
        raise LccpError(
            f"{where} lacks {len(missing)} of {len(names)} weight shards: {', '.join(missing[:3])}; copy them again"
        )
    return names


def is_plain_name(name: str) -> bool:
    """Whether a name from a file or a hub may name a file in a folder of ours.

    Example:
        >>> [is_plain_name(name) for name in ("model-00001.bin", "../model.bin", "a/b", "..", "C:\\\\b", "")]
        [True, False, False, False, False, False]
    """
    printable = name.isprintable() and not any(character in name for character in "/\\:")
    return bool(name) and printable and not name.startswith(".")


def is_pickled(names: Iterable[str | Path]) -> bool:
    """Whether weight files are pickles."""
    return any(str(name).endswith(_PICKLES) for name in names)


def pickle_refusal(names: Sequence[str]) -> str:
    """Why pickles are not loaded, and what to do."""
    return (
        f"it has only pickled weights ({names[0]}), which can run code when loaded; convert them to safetensors, or "
        "give --allow-pickle if you trust where they come from"
    )


def verify_weights(file: Path) -> None:
    """Check that a weight file is whole, as far as its format tells.

    Raises:
        LccpError: naming the file and what it lacks.
    """
    if file.name.endswith(_PICKLES):
        with open(file, "rb") as handle:
            zipped = handle.read(2) == b"PK"
        # torch writes a zip file, whose directory stands at its end.
        if zipped and not zipfile.is_zipfile(file):
            raise LccpError(f"{file} is truncated or damaged: its directory of tensors is missing; copy it again")
        return
    verify_safetensors(file)


def verify_safetensors(file: Path) -> None:
    """Check that a safetensors file is as long as its header says (an interrupted copy is not).

    Raises:
        LccpError: naming the file, the bytes it has and the bytes it should have.
    """
    try:
        size = file.stat().st_size
        expected = safetensors_bytes(file, size)
    except (OSError, ValueError) as error:
        raise LccpError(f"{file} is no whole safetensors file ({error}); copy it again") from error
    if size != expected:
        raise LccpError(f"{file} is truncated or damaged: {size} bytes, its header asks for {expected}; copy it again")


def safetensors_bytes(file: Path, size: int) -> int | None:
    """Bytes that a safetensors file should have by its header; None if the header is not whole yet.

    Args:
        file: the file, or the beginning of one that is `size` bytes long in the end.
        size: bytes of the whole file.

    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        with open(file, "rb") as handle:
            (n_header,) = struct.unpack("<Q", handle.read(8))
            if n_header > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"header of {n_header} bytes in a file of {size}")
            text = handle.read(n_header)
        if len(text) < n_header:
            return None
        header = json.loads(text)
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return 8 + int(n_header) + int(max(ends, default=0))
    except (KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def checkpoint_hash(path: Path) -> str:
    """SHA-256 over what a checkpoint computes: its config (LCCP changes the RoPE base there) and its weight files.

    The weights enter by the SHA-256 of each file, in the order of their names, so that a hub's listing gives the same
    hash as the folder it becomes.
    """
    return combined_hash(read_config(path), [file_sha256(file) for file in weight_files(path, allow_pickle=True)])


def combined_hash(config: Mapping[str, Any], weights: Sequence[str]) -> str:
    """The hash of a checkpoint with this config and weight files of these SHA-256, in the order of their names.

    Example:
        >>> one = combined_hash({"model_type": "llama", "use_cache": True}, ["ab", "cd"])
        >>> one == combined_hash({"model_type": "llama"}, ["ab", "cd"])
        True
        >>> one == combined_hash({"model_type": "llama"}, ["ab"])
        False
    """
    meant = {key: value for key, value in config.items() if key not in _CONFIG_NOISE}
    return hashlib.sha256(json.dumps([meant, list(weights)], sort_keys=True).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tokenizer_hash(path: Path) -> str:
    """SHA-256 over the tokenizer files of a checkpoint folder: folders of equal hash tokenize alike."""
    digest = hashlib.sha256()
    for name in TOKENIZER_HASHED:
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
