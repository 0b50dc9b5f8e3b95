"""Where one head looks while it copies the answer of one case: rows from a model, and a text one can read.

`AttentionReader` runs a case's prompt with its answer, teacher-forced, and keeps the rows of one layer. `read_text`
turns one head's rows into tokens with weights: all of a short prompt, of a long one the surroundings of the needle, of
the positions attended most, and the end. Torch is imported when the first rows are asked for. Cost: a prefill of the
case the first time; for another layer of the same case only its answer tokens; for another head nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lccp_interp.schema import Case, LccpError

if TYPE_CHECKING:
    from lccp_interp.capture.model import HookedModel
    from lccp_interp.capture.prefill import Prefill

WHOLE_TOKENS = 360
"""A prompt of so many tokens is shown whole."""

AROUND_NEEDLE, AROUND_TOP, HEAD_TOKENS, TAIL_TOKENS = 24, 6, 6, 40
SMALLEST_GAP = 6
"""Fewer tokens than this are shown rather than counted."""

N_TOP = 6


class AttentionReader:
    """Attention rows of one layer at a time, of one model or of the checkpoints in a folder.

    Example:
        >>> AttentionReader(None, None).source
        'none'
    """

    def __init__(self, model: HookedModel | None, folder: str | Path | None) -> None:
        """Hold no rows yet.

        Args:
            model: whose attention is shown at every checkpoint.
            folder: of checkpoint folders; each is loaded when it is asked for, and one is held at a time.

        Raises:
            LccpError: both are given, or the folder is not there.
        """
        if model is not None and folder is not None:
            raise LccpError("got model= and checkpoints=: attention comes from one of them; leave one out")
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None and not self._folder.is_dir():
            raise LccpError(f"no folder of checkpoints at {folder}; give the one that holds the run's checkpoints")
        self._model = model
        self._prefill: Prefill | None = None
        self._loaded = ""
        self._held: tuple[tuple[str, str, int], NDArray[np.float32]] | None = None

    @property
    def source(self) -> str:
        """`model`, `folder`, or `none`."""
        return "folder" if self._folder is not None else "none" if self._model is None else "model"

    def rows(self, checkpoint: str, case: Case, layer: int) -> NDArray[np.float32]:
        """Attention of all heads of a layer, `[head, event, key]`; event t predicts answer token t.

        Raises:
            LccpError: no such checkpoint in the folder, a layer without attention, tokens that the model does not have,
                or out of memory.
        """
        prefill = self._open(checkpoint)
        key = (self._loaded, case.case_id, layer)
        if self._held is None or self._held[0] != key:
            self._held = None
            self._held = (key, _layer_rows(prefill, case, layer))
        return self._held[1]

    @property
    def tokenizer(self) -> Any:
        """Of the model that was read last."""
        assert self._model is not None
        return self._model.tokenizer

    @property
    def model_name(self) -> str:
        """Name of the model that was read last; empty before."""
        return "" if self._model is None else self._model.name

    def _open(self, checkpoint: str) -> Prefill:
        from lccp_interp.capture.model import load_model
        from lccp_interp.capture.prefill import Prefill

        if self._folder is not None and self._loaded != checkpoint:
            # The old one goes first: two may not fit.
            self._model, self._prefill, self._held, self._loaded = None, None, None, ""
            self._model = load_model(_find(self._folder, checkpoint))
            self._loaded = checkpoint
        assert self._model is not None
        if self._prefill is None:
            self._prefill = Prefill(self._model)
        return self._prefill


def _find(folder: Path, name: str) -> Path:
    """The checkpoint's folder: of its name, or by what the folder says of itself."""
    if Path(name).name == name and (folder / name / "config.json").is_file():
        return folder / name
    from lccp_interp.checkpoints import find_checkpoints

    found = {checkpoint.name: checkpoint.path for checkpoint in find_checkpoints([folder])}
    if name not in found:
        raise LccpError(f"{folder} has no checkpoint {name!r}; it has {', '.join(found)}")
    return found[name]


def _layer_rows(prefill: Prefill, case: Case, layer: int) -> NDArray[np.float32]:
    model = prefill.model
    ids = case.prompt_ids + case.answer_ids[:-1]
    size = int(model.model.get_input_embeddings().weight.shape[0])
    if max(ids) >= size:
        raise LccpError(
            f"case {case.case_id} holds token {max(ids)}, checkpoint {model.name} knows tokens below {size}: the run "
            "was scored with another tokenizer; pass a model of this run"
        )
    kept: dict[int, NDArray[np.float32]] = {}
    layers: set[int] = set()

    def keep(index: int, weights: Any) -> None:
        layers.add(index)
        if index == layer:
            kept[index] = weights[0].float().cpu().numpy()

    prefill.run(ids, len(case.prompt_ids) - 1, keep)
    if layer not in kept:
        raise LccpError(
            f"layer {layer} of checkpoint {model.name} has no attention; it has in layers "
            f"{', '.join(map(str, sorted(layers)))}"
        )
    return kept[layer]


def head_rows(rows: NDArray[np.float32], head: int, model_name: str) -> NDArray[np.float32]:
    """`[event, key]` of one head.

    Raises:
        LccpError: the model has fewer heads.
    """
    if head >= rows.shape[0]:
        raise LccpError(
            f"checkpoint {model_name} has {rows.shape[0]} heads in a layer, the run has head {head}: pass a model of "
            "this run"
        )
    return rows[head]


def windows(n_tokens: int, needle: tuple[int, int], top: Sequence[int]) -> list[tuple[int, int]]:
    """Which ranges of a prompt's tokens are shown, in order, half-open.

    Args:
        n_tokens: in all.
        needle: its range.
        top: positions attended most.

    Example:
        >>> windows(200, (20, 30), [5])
        [(0, 200)]
        >>> windows(4000, (1000, 1010), [2000])
        [(0, 6), (976, 1034), (1994, 2007), (3960, 4000)]
    """
    if n_tokens <= WHOLE_TOKENS:
        return [(0, n_tokens)]
    wanted = [(0, HEAD_TOKENS), (needle[0] - AROUND_NEEDLE, needle[1] + AROUND_NEEDLE)]
    wanted += [(place - AROUND_TOP, place + AROUND_TOP + 1) for place in top]
    wanted += [(n_tokens - TAIL_TOKENS, n_tokens)]
    merged: list[tuple[int, int]] = []
    for start, end in sorted((max(0, start), min(n_tokens, end)) for start, end in wanted):
        if merged and start - merged[-1][1] < SMALLEST_GAP:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def token_texts(tokenizer: Any, ids: Sequence[int], before: int | None = None) -> list[str]:
    """The text that each token adds behind the one before, with its blanks.

    Args:
        tokenizer: with `decode`.
        ids: of tokens that follow each other.
        before: the token before the first, None at the beginning of a text.

    A token that is part of a character only is shown as the replacement character.
    """
    texts = []
    for token in ids:
        alone = [] if before is None else [before]
        left, both = tokenizer.decode(alone), tokenizer.decode([*alone, token])
        texts.append(both[len(left) :] if both.startswith(left) else tokenizer.decode([token]))
        before = token
    return texts


def read_text(rows: NDArray[np.float32], case: Case, tokenizer: Any, event: int) -> dict[str, Any]:
    """One head's attention as JSON: tokens with weights, and what stands out.

    Args:
        rows: `[event, key]` of the head.
        case: whose rows these are.
        tokenizer: of its model.
        event: which copy event; -1 means the mean over all of them.

    Returns:
        `segments` (start, texts, weights of the tokens shown), `gaps` (tokens and attention left out before each
        segment), `needle` and `source` (ranges), `query` (position that looks; None for the mean), `predicts`, `top`
        (positions attended most), `needle_mass`, `source_mass`, `n_hits` (copy events in which the position attended
        most is in the source and holds the token to copy), `events` (texts of the answer tokens), `n_tokens`.
    """
    ids = case.prompt_ids + case.answer_ids[:-1]
    weights = rows.mean(axis=0) if event < 0 else rows[event]
    order = np.argsort(-weights, kind="stable")[:N_TOP]
    top = [int(place) for place in order if weights[place] > 0]
    segments, gaps, end = [], [], 0
    for start, stop in windows(len(ids), (case.needle.start, case.needle.end), top):
        texts = token_texts(tokenizer, ids[start:stop], ids[start - 1] if start else None)
        segments.append({"start": start, "texts": texts, "weights": _rounded(weights[start:stop])})
        gaps.append([start - end, float(weights[end:start].sum())])
        end = stop
    attended = rows.argmax(axis=1)
    hits = [
        int(place) in case.source and ids[int(place)] == token
        for place, token in zip(attended, case.answer_ids, strict=True)
    ]
    answer = token_texts(tokenizer, case.answer_ids, case.prompt_ids[-1])
    return {
        "segments": segments,
        "gaps": gaps,
        "needle": [case.needle.start, case.needle.end],
        "source": [case.source.start, case.source.end],
        "query": None if event < 0 else len(case.prompt_ids) - 1 + event,
        "predicts": "".join(answer) if event < 0 else answer[event],
        "events": answer,
        "n_tokens": len(ids),
        "n_prompt": len(case.prompt_ids),
        "top": [[place, token_texts(tokenizer, [ids[place]], ids[place - 1] if place else None)[0],
                 float(weights[place])] for place in top],
        "needle_mass": float(weights[case.needle.start : case.needle.end].sum()),
        "source_mass": float(weights[case.source.start : case.source.end].sum()),
        "hits": hits,
        "n_hits": sum(hits),
    }  # fmt: skip


def _rounded(weights: NDArray[np.float32]) -> list[float]:
    return [float(f"{value:.4g}") for value in weights.tolist()]
