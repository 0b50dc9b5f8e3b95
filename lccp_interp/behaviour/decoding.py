"""Write the answers of many prompts together: each prompt is read once, all of its answers go on from there.

Prompts are read one by one, without padding, by the capture's `Prefill`: whole, or each only from where it leaves the
one before it on the walk along their prefix tree. Then the keys and values of several prompts are laid side by side,
padded on the left (an attention mask hides the padding, positions count from each prompt's own beginning), and all
answers of these prompts are written a token a step. Answers of one prompt that have been the same so far are one row,
which splits where they part; a row that nobody goes on from is dropped. Prompts are not batched for reading: a few
hundred tokens keep a device busy, and padding and a mask of the whole cost more than a pass saves (60 prompts of 512 to
1,024 tokens, bundled model, one core: 1.9 s one by one, 2.7 s in padded batches of four or eight).

Where a batch runs out of memory it is split in halves and read again. Models whose past is a state, or whose positions
depend on the longest prompt of a batch, have one prompt at a time; models that cannot go on behind a cache read all
tokens at every step. It refuses to know how answers are graded.

Cost: the prompts' tokens that are new, the keys and values of a batch (at most `batch_tokens` tokens of them, or one
prompt's), one pass per token of the longest answer in it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lccp_interp.behaviour.sampling import cumulative, draw, uniforms
from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.prefill import CHUNK_TOKENS, Prefill, out_of_memory, release_memory
from lccp_interp.schema import Item, LccpError
from lccp_interp.tasks.prefixes import tokens_run, walk_tokens

BATCH_TOKENS = 32_768
"""Tokens whose keys and values a batch holds at most (8B parameters with grouped queries: about 4 GB in bfloat16)."""

WORTH_SHARING = 0.3
"""Share of the prompts' tokens that sharing has to save: its order mixes lengths, which costs padding."""

Sharing = Literal["auto", "on", "off"]
Stopped = Literal["stop", "end", "budget"]


@dataclass
class Stream:
    """One answer in the making.

    Attributes:
        index: of its item in the sequence that was given.
        item: the question.
        sample: its number, 0 and up; None is the greedy answer.
        draws: its random numbers, one per token; none for the greedy answer.
        ids: tokens written so far, with the one that stopped.
        text: what was written, up to a stop string; set when it has stopped.
        stopped: by a `stop` string, an `end` of text, or the `budget`; None while it is being written.
    """

    index: int
    item: Item
    sample: int | None
    draws: np.ndarray
    ids: list[int] = field(default_factory=list)
    text: str = ""
    stopped: Stopped | None = None

    def restart(self) -> None:
        """Forget what was written."""
        self.ids, self.text, self.stopped = [], "", None


def streams_of(items: Sequence[Item], *, greedy: bool, n_samples: int, seed: int) -> list[Stream]:
    """The answers that are to be written: of each item the greedy one (if asked for), then its samples."""
    streams = []
    for index, item in enumerate(items):
        if greedy:
            streams.append(Stream(index, item, None, np.empty(0)))
        streams += [
            Stream(index, item, sample, uniforms(seed, item.item_id, sample, item.max_new_tokens))
            for sample in range(n_samples)
        ]
    return streams


def padding_obstacle(model: HookedModel) -> str:
    """Why this model's prompts cannot stand side by side with padding; empty if they can.

    Example:
        >>> padding_obstacle(load_model("data/trajectory/18-lccp-2.62M"))    # doctest: +SKIP
        ''
    """
    if model.sharing_obstacle:
        return model.sharing_obstacle
    if "position_ids" not in inspect.signature(model.model.forward).parameters:
        return "it takes no positions from outside"
    rope = getattr(model.model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if scaled := sorted({"dynamic", "longrope"} & kinds):
        return f"its rotary positions ({scaled[0]}) depend on the longest prompt of a batch"
    return ""


class Writer:
    """Writes answers with one model."""

    def __init__(
        self,
        model: HookedModel,
        *,
        temperature: float,
        top_p: float,
        batch_tokens: int = BATCH_TOKENS,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        """Arguments as in `evaluate.answer_items`; `chunk_tokens` as in `Prefill`."""
        self.model = model
        self.temperature, self.top_p = temperature, top_p
        self.batch_tokens, self.chunk_tokens = batch_tokens, chunk_tokens
        self._prompts = Prefill(model, chunk_tokens=chunk_tokens)
        self._ends = _ends(model)
        self._pads = not padding_obstacle(model)

    def write(
        self, streams: Sequence[Stream], *, sharing: Sharing, on_done: Callable[[Sequence[Stream]], None]
    ) -> None:
        """Write every stream to its end; `on_done` gets each batch when it is finished.

        Raises:
            LccpError: NaN logits, naming checkpoint and item; out of memory on a single answer.
        """
        by_item: dict[int, list[Stream]] = {}
        for stream in streams:
            by_item.setdefault(stream.index, []).append(stream)
        items = {index: own[0].item for index, own in by_item.items()}
        order, shared = self._order(items, sharing)
        waiting: list[list[Stream]] = []
        for index in order:
            if waiting and not self._fits([*waiting, by_item[index]]):
                self._batch([stream for own in waiting for stream in own], shared, on_done)
                waiting = []
            waiting.append(by_item[index])
        if waiting:
            self._batch([stream for own in waiting for stream in own], shared, on_done)
        self._prompts.forget()

    def _order(self, items: dict[int, Item], sharing: Sharing) -> tuple[list[int], bool]:
        """In which order to read the items, and whether each goes on from the one before."""
        indices = list(items)
        by_length = sorted(indices, key=lambda index: len(items[index].prompt_ids))
        if len(items) < 2:
            return by_length, False
        prompts = [items[index].prompt_ids for index in indices]
        visits = walk_tokens(prompts, [len(prompt) for prompt in prompts])
        n_tokens = sum(visit.fed for visit in visits)
        worth = n_tokens - tokens_run(visits) > WORTH_SHARING * n_tokens
        if obstacle := padding_obstacle(self.model):
            whole = worth and sharing != "off" and not self.model.shares_prefixes
            warnings.warn(
                f"checkpoint {self.model.name}: {obstacle}, so answers are written one prompt at a time"
                + (f", and {n_tokens:,} tokens are read where {tokens_run(visits):,} would do" if whole else ""),
                stacklevel=4,
            )
        if self.model.shares_prefixes and (sharing == "on" or (sharing == "auto" and worth)):
            return [indices[visit.index] for visit in visits], True
        return by_length, False

    def _fits(self, groups: Sequence[Sequence[Stream]]) -> bool:
        """Whether a batch may hold the streams of these items."""
        width = max(len(own[0].item.prompt_ids) + own[0].item.max_new_tokens for own in groups)
        return self._pads and width * sum(map(len, groups)) <= self.batch_tokens

    def _batch(self, streams: list[Stream], shared: bool, on_done: Callable[[Sequence[Stream]], None]) -> None:
        """Write some streams together; in halves, if that does not fit."""
        try:
            self._write_together(streams, shared)
        except (RuntimeError, MemoryError, LccpError) as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            on_done(streams)
            return
        # Outside the handler: the traceback held the failed pass's tensors.
        self._prompts.forget()
        self._prompts.chunk_tokens = self.chunk_tokens
        release_memory()
        if len(streams) == 1:
            item = streams[0].item
            raise LccpError(
                f"checkpoint {self.model.name}, item {item.item_id}: out of memory on one answer of up to "
                f"{item.max_new_tokens} tokens to a prompt of {len(item.prompt_ids)} ({reason}); try --dtype bfloat16, "
                "--device-map auto, another --device, or shorter --lengths"
            )
        self.batch_tokens //= 2
        for stream in streams:
            stream.restart()
        half = len(streams) // 2
        self._batch(streams[:half], shared, on_done)
        self._batch(streams[half:], shared, on_done)

    @torch.inference_mode()
    def _write_together(self, streams: list[Stream], shared: bool) -> None:
        indices = list(dict.fromkeys(stream.index for stream in streams))
        items = {stream.index: stream.item for stream in streams}
        pasts, logits = [], []
        for index in indices:
            logits.append(self._prompts.run(items[index].prompt_ids, len(items[index].prompt_ids) - 1, None))
            pasts.append(self._prompts.past())
            if not shared:
                self._prompts.forget()
        room = max(item.max_new_tokens for item in items.values())
        rows = self._rows([items[index] for index in indices], pasts, room)
        self._go_on(rows, [(stream, indices.index(stream.index)) for stream in streams], torch.cat(logits))

    def _rows(self, items: Sequence[Item], pasts: list[Any], room: int) -> _Rows:
        if self.model.cache_fault:
            return _RereadRows(self.model, [item.prompt_ids for item in items])
        lengths = [len(item.prompt_ids) for item in items]
        if self.model.sharing_obstacle:
            return _CachedRows(self.model, pasts[0], lengths, room)
        return _CachedRows(self.model, _side_by_side(pasts, lengths, room), lengths, room)

    def _go_on(self, rows: _Rows, going: list[tuple[Stream, int]], logits: Tensor) -> None:
        """Write on until every stream has stopped; `going` says which row each goes on from."""
        while True:
            tokens = self._choose(going, logits.float())
            # A row of the next step for each different token behind a row of this one.
            next_rows: dict[tuple[int, int], int] = {}
            kept = []
            for (stream, row), token in zip(going, tokens, strict=True):
                self._add(stream, token)
                if stream.stopped is None:
                    kept.append((stream, next_rows.setdefault((row, token), len(next_rows))))
            if not kept:
                return
            going = kept
            logits = rows.step([row for row, _ in next_rows], [token for _, token in next_rows])

    def _choose(self, going: Sequence[tuple[Stream, int]], logits: Tensor) -> list[int]:
        """The next token of each stream; the first of equals where the greatest logits tie."""
        if logits.isnan().any():
            bad = next(stream for stream, row in going if logits[row].isnan().any())
            half = self.model.dtype != "float32"
            advice = f"try --dtype float32 ({self.model.dtype} now)" if half else "its weights are broken"
            raise LccpError(
                f"checkpoint {self.model.name}, item {bad.item.item_id}: logits are NaN behind {len(bad.ids)} tokens "
                f"of the answer; {advice}"
            )
        tokens: list[int] = logits.argmax(dim=1)[[row for _, row in going]].tolist()
        sampled = [place for place, (stream, _) in enumerate(going) if stream.sample is not None]
        if sampled:
            shares = cumulative(logits, temperature=self.temperature, top_p=self.top_p)
            numbers = [float(going[place][0].draws[len(going[place][0].ids)]) for place in sampled]
            drawn = draw(shares[[going[place][1] for place in sampled]], numbers)
            for place, token in zip(sampled, drawn, strict=True):
                tokens[place] = token
        return tokens

    def _add(self, stream: Stream, token: int) -> None:
        """Write one token; stop at a stop string, an end of text, or the budget, whichever comes first."""
        stream.ids.append(token)
        item = stream.item
        tail = self._text(stream.ids[-_reach(item.stop) :]) if item.stop else ""
        if any(stop in tail for stop in item.stop):
            text = self._text(stream.ids)
            if cuts := [text.index(stop) for stop in item.stop if stop in text]:
                stream.text, stream.stopped = text[: min(cuts)], "stop"
                return
        if token in self._ends:
            stream.stopped = "end"
        elif len(stream.ids) == item.max_new_tokens:
            stream.stopped = "budget"
        if stream.stopped:
            stream.text = self._text(stream.ids)

    def _text(self, ids: Sequence[int]) -> str:
        decoded = self.model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)


def _reach(stops: Sequence[str]) -> int:
    """How many of the last tokens may hold a stop string that the last one has completed.

    A token has at least a byte; some more, for tokenizers that drop a blank where a text begins.
    """
    return max(len(stop.encode()) for stop in stops) + 4


def _ends(model: HookedModel) -> set[int]:
    """Tokens that end a text, as tokenizer and generation config have them."""
    configured = getattr(model.model.generation_config, "eos_token_id", None)
    ends = {model.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return {int(end) for end in ends if end is not None}


class _Rows(Protocol):
    """Sequences that are written together."""

    def step(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Go on with `tokens`, each behind the row in `parents`, any number of them; logits `[token, vocabulary]`."""


class _RereadRows:
    """Rows of a model that cannot go on behind a cache: all tokens are read at every step."""

    def __init__(self, model: HookedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.ids = torch.tensor([list(prompt) for prompt in prompts])

    def step(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self.ids = torch.cat([self.ids[list(parents)], torch.tensor(tokens)[:, None]], dim=1)
        return self.model.forward(self.ids, 1).logits[:, -1]


class _CachedRows:
    """Rows that go on behind their keys and values, or behind their state."""

    def __init__(self, model: HookedModel, cache: Any, lengths: Sequence[int], room: int) -> None:
        self.model, self.cache = model, cache
        self.n_rows, self.n_keys = len(lengths), max(lengths)
        self.padded = min(lengths) < self.n_keys
        self.positions = torch.tensor(lengths, device=model.device)[:, None]
        keys = torch.arange(self.n_keys + room, device=model.device)
        self.mask = (keys >= self.n_keys - self.positions).long()

    def step(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        if list(parents) != list(range(self.n_rows)):
            chosen = torch.tensor(parents, device=self.model.device)
            self.cache.reorder_cache(chosen)
            self.mask, self.positions, self.n_rows = self.mask[chosen], self.positions[chosen], len(parents)
        self.n_keys += 1
        padding: dict[str, Any] = {}
        if self.padded:
            padding = {"attention_mask": self.mask[:, : self.n_keys], "position_ids": self.positions}
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        output = self.model.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **padding)
        self.cache = output.past_key_values
        self.positions = self.positions + 1
        return output.logits[:, -1]


class _RoomyLayer(DynamicLayer):
    """Keys and values of several prompts, with room for what is to be written: a step copies none of them."""

    def __init__(self, pasts: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int], room: int) -> None:
        super().__init__()
        self.lazy_initialization(*pasts[0])
        self._n_keys = max(lengths)
        self._stores = [self._store([past[which] for past in pasts], lengths, room) for which in (0, 1)]
        self._look()

    def _store(self, parts: Sequence[Tensor], lengths: Sequence[int], room: int) -> Tensor:
        shape = (len(parts), *parts[0].shape[1:-2], self._n_keys + room, parts[0].shape[-1])
        store = parts[0].new_zeros(shape)
        for row, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            store[row, ..., self._n_keys - length : self._n_keys, :] = part[0]
        return store

    def _look(self) -> None:
        self.keys, self.values = (store[..., : self._n_keys, :] for store in self._stores)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin, self._n_keys = self._n_keys, self._n_keys + key_states.shape[-2]
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[..., begin : self._n_keys, :] = states
        self._look()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._stores = [store.index_select(0, beam_idx.to(store.device)) for store in self._stores]
        self._look()


def _side_by_side(pasts: list[Any], lengths: Sequence[int], room: int) -> DynamicCache:
    """One cache of several prompts' pasts, padded on the left; layer by layer, so that little is held twice."""
    cache = DynamicCache()
    for layer in range(len(pasts[0])):
        if pasts[0][layer] is None:
            cache.layers.append(DynamicLayer())  # takes its keys from another layer
            continue
        cache.layers.append(_RoomyLayer([past[layer] for past in pasts], lengths, room))
        for past in pasts:
            past[layer] = None
    return cache
