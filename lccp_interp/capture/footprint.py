"""Footprint: the memory that a checkpoint and its longest prompt take, before any weight is read.

The model is built from its config on torch's meta device, where tensors have shapes but no numbers, and the real
`Prefill` runs a prompt through it while the sizes of all living tensors are added up. So nothing here is a formula:
latent attention, sliding layers, experts and hybrid layers count as what transformers makes of them. What it cannot
see are a kernel's own scratch space, fragmentation and the driver's share; leave some room. It refuses to know
devices: what is small enough is said elsewhere.

Cost: no memory worth the name, and seconds for the largest models: passes are run, but nothing is computed.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lccp_interp.capture.model import DTYPES, HookedModel, one_line, read_architecture
from lccp_interp.capture.prefill import CHUNK_TOKENS, Prefill
from lccp_interp.schema import LccpError

WHOLE_TOKENS = 2048
"""Prompts that are run whole (linear attention goes token by token) are measured up to here and continued."""

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "experts_per_token")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Footprint:
    """Bytes that one checkpoint and one prompt take.

    Attributes:
        model_type: as in config.json.
        dtype: of weights, cache and activations.
        n_parameters: all weights, tied ones once.
        n_active_parameters: those that a token passes through; None where the config does not say how many experts do.
        n_layers: decoder layers.
        n_tokens: length of the prompt.
        chunk_tokens: tokens per forward pass; all of the prompt where it cannot be run in pieces.
        n_rows: attention rows read in the last pass.
        weight_bytes: of all weights.
        layer_weight_bytes: of the largest decoder layer.
        cache_bytes: keys and values (and states) of the whole prompt.
        working_bytes: the most that a forward pass holds beside weights and cache.
        obstacle: why the prompt cannot be run in pieces or share a beginning with others; empty if it can.

    Example:
        >>> one = Footprint("llama", "bfloat16", 10, 10, 2, 100, 100, 1, 20, 8, 400, 50, "")
        >>> one.total_bytes, one.on_devices(2)
        (470, 262)
    """

    model_type: str
    dtype: str
    n_parameters: int
    n_active_parameters: int | None
    n_layers: int
    n_tokens: int
    chunk_tokens: int
    n_rows: int
    weight_bytes: int
    layer_weight_bytes: int
    cache_bytes: int
    working_bytes: int
    obstacle: str

    @property
    def total_bytes(self) -> int:
        """All of it on one device."""
        return self.on_devices(1)

    def on_devices(self, n_devices: int) -> int:
        """Bytes on the fullest of `n_devices` that share the layers out evenly.

        Layers are not cut. Embedding, output layer and the working memory of a pass are taken to lie on one device,
        which is the worst case.
        """
        share = -(-self.n_layers // n_devices)
        layers = min(share * self.layer_weight_bytes, self.weight_bytes)
        rest = max(0, self.weight_bytes - self.n_layers * self.layer_weight_bytes)
        if n_devices == 1:
            layers, rest = self.weight_bytes, 0
        return layers + rest + self.cache_bytes * share // self.n_layers + self.working_bytes


def footprint(
    config: Any,
    *,
    dtype: str,
    n_tokens: int,
    chunk_tokens: int = CHUNK_TOKENS,
    batch_tokens: int = 0,
    n_rows: int = 16,
) -> Footprint:
    """What a checkpoint takes while its rows are read from a prompt.

    Args:
        config: a transformers config, or a folder with a config.json; weights are not needed.
        dtype: `float32`, `bfloat16` or `float16`.
        n_tokens: length of the prompt, at least 1.
        chunk_tokens: tokens per forward pass of a long prompt, at least 1.
        batch_tokens: tokens per forward pass of short prompts that are run together; 0 if each is run alone.
        n_rows: attention rows read at the prompt's end, 1 <= n_rows <= n_tokens.

    Raises:
        LccpError: an unknown dtype, no usable config, or a model whose attention cannot be captured.

    Example:
        >>> footprint("data/trajectory/lccp-1.2M", dtype="float32", n_tokens=4096).cache_bytes    # doctest: +SKIP
    """
    if dtype not in DTYPES:
        raise LccpError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not 1 <= n_rows <= n_tokens:
        raise LccpError(f"{n_rows} attention rows cannot be read from a prompt of {n_tokens} tokens; ask for 1 or more")
    if chunk_tokens < 1:
        raise LccpError(f"chunk_tokens must be at least 1, got {chunk_tokens}; the usual number is {CHUNK_TOKENS}")
    config = load_config(config) if isinstance(config, (str, Path)) else config
    shape = _Passes(n_tokens, chunk_tokens, max(1, batch_tokens // n_tokens), n_rows)
    try:
        return _measure(config, dtype, shape)
    except LccpError:
        raise
    except Exception as error:  # a model's code can fail in any way where numbers are missing
        raise LccpError(
            f"a {config.model_type} of this config cannot be run without its weights ({type(error).__name__}: "
            f"{one_line(error)}); check config.json, or try a short study with `lccp score`"
        ) from error


def load_config(folder: str | Path) -> Any:
    """The transformers config of a folder; weights and tokenizer are not needed.

    Raises:
        LccpError: it has none, or one of a model that cannot be captured; see `read_architecture`.
    """
    with _silent():
        return read_architecture(folder)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' remarks on configs: what they mean for a plan is said by the plan."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


class _LivingTensors(TorchDispatchMode):
    """Adds up the bytes of tensors that are alive, the model's own left out, and remembers their peak."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Held, for a model may replace a buffer of its own (rotary frequencies), and another tensor take its address.
        self._own = [tensor.untyped_storage() for tensor in itertools.chain(model.parameters(), model.buffers())]
        self._known = {storage._cdata for storage in self._own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # The models ask for numbers to learn whether nothing is masked, whether positions are beyond those of their
            # training, which expert is next. Yes, and the second, are answers that hold or change no size.
            return True if args[0].dtype == torch.bool else 1
        # In inference mode operations come whole; what they make on the way counts too.
        with self:
            output = func.decompose(*args, **(kwargs or {}))
        if output is not NotImplemented:
            return output
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += n_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, n_bytes)

    def _release(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.now -= n_bytes


class _FastKernels(TorchFunctionMode):
    """Where a real device has a fused kernel, or numbers to look at, and the meta device none: count what comes out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _attention_output(*args, **(kwargs or {}))
        if func in (Tensor.nonzero, torch.nonzero):
            return _all_places(*args, **(kwargs or {}))
        if func is torch.where and len(args) == 1:
            return _all_places(args[0], as_tuple=True)
        if func in (getattr(nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)):
            rows, weights = args[:2]
            return rows.new_empty((rows.shape[0], weights.shape[-1]))
        return func(*args, **(kwargs or {}))


def _all_places(tensor: Tensor, *, as_tuple: bool = False) -> Tensor | tuple[Tensor, ...]:
    """The places of nonzero numbers, were there no zeros: at most as many."""
    places = tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.long)
    return places.unbind(1) if as_tuple else places


def _attention_output(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    if attn_mask is not None:
        # Kernels add masks to the logits, and turn those of yes and no into numbers first.
        attn_mask.to(query.dtype)
    return output


@dataclass(frozen=True)
class _Passes:
    """How prompts are run: one in chunks, or some together."""

    n_tokens: int
    chunk_tokens: int
    n_together: int
    n_rows: int


def _measure(config: Any, dtype: str, shape: _Passes) -> Footprint:
    model = _without_weights(config, DTYPES[dtype])
    hooked = HookedModel(model=model, tokenizer=None, name=config.model_type)
    chunk = min(shape.chunk_tokens, shape.n_tokens) if hooked.shares_prefixes else shape.n_tokens
    if not hooked.shares_prefixes and shape.n_tokens > WHOLE_TOKENS:
        cache_bytes, peak_bytes = _continued(hooked, shape)
    else:
        cache_bytes, peak_bytes = _run_alone(hooked, shape, chunk)
    if shape.n_together > 1:
        peak_bytes = max(peak_bytes, _run_together(hooked, shape))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Footprint(
        model_type=config.model_type,
        dtype=dtype,
        n_parameters=n_parameters,
        n_active_parameters=_active_parameters(model),
        n_layers=hooked.n_layers,
        n_tokens=shape.n_tokens,
        chunk_tokens=chunk,
        n_rows=shape.n_rows,
        weight_bytes=n_parameters * DTYPES[dtype].itemsize,
        layer_weight_bytes=_largest_layer(model, hooked.n_layers) * DTYPES[dtype].itemsize,
        cache_bytes=cache_bytes,
        working_bytes=peak_bytes - cache_bytes,
        obstacle=hooked.sharing_obstacle,
    )


def _run_alone(hooked: HookedModel, shape: _Passes, chunk: int) -> tuple[int, int]:
    """Bytes of a prompt's cache, and of all that lives at once while the last chunk is run."""
    ids = np.zeros(shape.n_tokens, dtype=np.int64).tolist()
    with _LivingTensors(hooked.model) as living, _FastKernels():
        # The chunks before the last hold less; one pass stands for them all.
        prefill = Prefill(hooked, chunk_tokens=shape.n_tokens)
        if chunk < shape.n_tokens:
            prefill.run(ids[:-chunk], shape.n_tokens - chunk - 1, None)
            prefill.chunk_tokens = chunk
        living.peak = living.now
        prefill.run(ids, shape.n_tokens - shape.n_rows, _no_reduction)
        held, peak = living.now, living.peak
        prefill.forget()
        # What that has given back was the cache; rotary frequencies may have been made anew and stay.
        return held - living.now, peak


def _continued(hooked: HookedModel, shape: _Passes) -> tuple[int, int]:
    """`_run_alone` of a long prompt that is run whole: two shorter ones, continued in a straight line."""
    short, long = WHOLE_TOKENS // 2, WHOLE_TOKENS
    at_short, at_long = (_run_alone(hooked, replace(shape, n_tokens=n), n) for n in (short, long))
    steps = (shape.n_tokens - long) / (long - short)
    cache_bytes, peak_bytes = (round(b + steps * (b - a)) for a, b in zip(at_short, at_long, strict=True))
    return cache_bytes, peak_bytes


def _run_together(hooked: HookedModel, shape: _Passes) -> int:
    """Bytes of all that lives at once while a batch of prompts is run."""
    with _LivingTensors(hooked.model) as living, _FastKernels():
        ids = torch.zeros((shape.n_together, shape.n_tokens + 1), dtype=torch.long, device="meta")
        hooked.answer_logits(ids, shape.n_rows, _no_reduction)
        return living.peak


def _no_reduction(layer: int, weights: Tensor) -> None:
    """Rows are reduced to a number per head; that is nothing beside the rows themselves."""


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    with _silent(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _active_parameters(model: Any) -> int | None:
    """Parameters that one token passes through: all but the experts that are not chosen for it."""
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    if not routed:
        return total
    config = model.config.get_text_config()
    chosen, of = (_mean_entry(config, names) for names in (_EXPERTS_PER_TOKEN, _EXPERTS))
    return None if chosen is None or not of else total - routed + round(routed * min(1.0, chosen / of))


def _mean_entry(config: Any, names: Sequence[str]) -> float | None:
    """The first of the entries that the config has; the mean where it has one per layer."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (int, list)) and not isinstance(value, bool):
            return float(np.mean(value))
    return None


def _largest_layer(model: Any, n_layers: int) -> int:
    """Parameters of the largest decoder layer."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    if not stacks:
        return sum(parameter.numel() for parameter in model.parameters()) // n_layers
    return max(sum(parameter.numel() for parameter in layer.parameters()) for layer in stacks[0])
