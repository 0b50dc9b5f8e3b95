"""Prefill: run prompts one after another, in chunks, each only from where it leaves the one before.

`Prefill` keeps the keys and values of the last prompt. The next one crops them to the common prefix and runs the rest,
so a set of prompts in the order of its prefix tree (`tasks.prefixes.walk`) costs each shared beginning once, and
decoding costs one token a step. Long prompts go in chunks, which bounds the activations; only the last chunk makes
logits and rows. Out of memory, a prompt is tried again in smaller chunks. It refuses to know what the prompts are.

Cost: the tokens that are new, and the cache of one sequence: keys and values of every attention layer at full length
(sliding layers too, for a cache that has dropped its oldest keys cannot be cropped). Layers that carry a state instead
of keys (linear attention, convolutions) cannot be cropped: their prompts are run whole, and only decoding extends them.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.rows import RowSink, tap_rows
from lccp_interp.schema import LccpError
from lccp_interp.tasks.prefixes import common_prefix

CHUNK_TOKENS = 4096
"""Tokens per forward pass of a long prompt: enough to keep a GPU busy, few enough for 64K prompts of large models."""

SMALLEST_CHUNK = 64
"""Below this many tokens a pass is no smaller than the weights' own needs; running out of memory is then final."""


class Prefill:
    """The keys and values of one sequence, kept from one prompt to the next.

    Example:
        >>> model = load_model("data/trajectory/lccp-1.2M")                             # doctest: +SKIP
        >>> prefill = Prefill(model)                                                    # doctest: +SKIP
        >>> logits = prefill.run([5, 7, 9, 4], 3, print)    # reads four tokens         # doctest: +SKIP
        >>> logits = prefill.run([5, 7, 9, 2], 3, print)    # reads one                 # doctest: +SKIP
    """

    def __init__(self, model: HookedModel, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        """Hold no tokens yet.

        Args:
            model: the checkpoint, loaded.
            chunk_tokens: tokens per forward pass, at least 1.
        """
        if chunk_tokens < 1:
            raise LccpError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        self.model = model
        self.chunk_tokens = chunk_tokens
        self._held = np.empty(0, dtype=np.int64)
        self._cache: Any = None

    def forget(self) -> None:
        """Drop the cache and its memory."""
        self._held, self._cache = self._held[:0], None

    def past(self) -> Any:
        """What the model remembers of the prompt that was run last, for going on from it elsewhere.

        Returns:
            Keys and values of each layer (None for a layer without), which nothing here changes afterwards; or, of a
            model whose layers carry a state, its cache, which this object forgets.
        """
        cache = self._cache
        if self.model.sharing_obstacle:
            self.forget()
            return cache
        return [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]

    @torch.inference_mode()
    def run(self, ids: Sequence[int], rows_from: int, sink: RowSink | None) -> Tensor:
        """Logits and attention rows of a prompt's last positions.

        Args:
            ids: the prompt's tokens.
            rows_from: first position asked for, 0 <= rows_from < len(ids).
            sink: receives (layer, float32 `[1, head, len(ids) - rows_from, len(ids)]`) once per attention layer (again,
                if memory ran out and the prompt is run once more); None reads no rows.

        Returns:
            Float32 logits `[len(ids) - rows_from, vocabulary]`.

        Raises:
            LccpError: out of memory even in the smallest chunks; IndexError: `rows_from` outside the prompt.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        if not 0 <= rows_from < len(wanted):
            raise IndexError(f"row {rows_from} is outside a prompt of {len(wanted)} tokens")
        while True:
            try:
                return self._run(wanted, rows_from, sink)
            except BaseException as error:
                self.forget()  # half a chunk may be in it
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            # Outside the handler: the traceback held the failed pass's tensors.
            self._shrink(len(wanted), reason)

    def _shrink(self, n_tokens: int, reason: str) -> None:
        release_memory()
        chunk = min(self.chunk_tokens, n_tokens)
        if chunk <= SMALLEST_CHUNK or not self.model.shares_prefixes:
            how = f"in chunks of {chunk} tokens" if self.model.shares_prefixes else "and its layers allow no chunks"
            raise LccpError(
                f"checkpoint {self.model.name}: out of memory on {n_tokens} tokens, {how} ({reason}); try --dtype "
                "bfloat16, --device-map auto, another --device, or shorter --lengths"
            )
        self.chunk_tokens = max(SMALLEST_CHUNK, chunk // 2)

    def _run(self, wanted: np.ndarray, rows_from: int, sink: RowSink | None) -> Tensor:
        start = self._keep(wanted, rows_from)
        chunk = self.chunk_tokens if self.model.shares_prefixes else len(wanted)
        # All rows pass in the last chunk, whatever their number.
        last = max(start, min(rows_from, len(wanted) - chunk))
        for begin in range(start, last, chunk):
            self._feed(wanted[begin : min(begin + chunk, last)], None, None, 1)
        self._held = wanted[:last]
        n_rows = len(wanted) - rows_from
        rows = None if sink is None else torch.arange(rows_from - last, len(wanted) - last)
        logits = self._feed(wanted[last:], rows, sink, n_rows)
        self._held = wanted
        return logits[0].float()

    def _keep(self, wanted: np.ndarray, rows_from: int) -> int:
        """Crop the cache to what the prompt shares with it; returns how many tokens that is."""
        n_common = min(common_prefix(self._held, wanted), rows_from)
        goes_on = n_common == len(self._held) and len(wanted) - n_common == 1
        if self.model.cache_fault or (self.model.sharing_obstacle and not goes_on):
            # A state can be carried on by a token, not taken back; a cache that was found wrong is not used at all.
            n_common = 0
        if self._cache is None or n_common == 0:
            self.forget()
            # Without a config every layer keeps all its keys, also a sliding one, and can be cropped.
            self._cache = DynamicCache() if self.model.shares_prefixes else None
            return 0
        if surplus := len(self._held) - n_common:
            self._cache.crop(-surplus)
            self._held = self._held[:n_common]
        return n_common

    def _feed(self, ids: np.ndarray, rows: Tensor | None, sink: RowSink | None, n_logits: int) -> Tensor:
        with tap_rows(self.model.model, rows, sink or _no_sink):
            output = self.model.forward(torch.from_numpy(ids)[None], n_logits, cache=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return output.logits


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the host, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "DefaultCPUAllocator: can't allocate memory" in text or "out of memory" in text.lower()


def release_memory() -> None:
    """Give back what a failed pass has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _no_sink(layer: int, weights: Tensor) -> None:
    raise AssertionError("rows were captured though none were asked for")
