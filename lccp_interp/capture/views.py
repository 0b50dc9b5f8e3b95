"""Views: one model seen by other libraries, over the same weights, and held to the same attention.

A library that hooks a model wraps its modules, replaces them and chooses their attention kernel. Every view therefore
gets modules of its own, whose parameters and buffers are those of the model: nothing is copied, and nothing that a view
does to modules, configs or kernels reaches the model. A view is proven before it is handed out: on a short prompt its
attention has to be that of the tap. This module knows backends by name; it refuses to know how a library is asked
(`lens`, `nnsight_view`). Cost of a view: one tree of modules without weights, and two passes over 24 tokens.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lccp_interp.capture.rows import AttentionCall, RowSink, edit_attention
from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lccp_interp.capture.model import HookedModel

OWN = "transformers"
LIBRARIES = {"transformer_lens": "TransformerLens", "nnsight": "nnsight"}
"""Backends beside our own, and the names by which people know them."""

BACKENDS = (OWN, *LIBRARIES)

PROOF_TOKENS = 24
FLOAT_LIMIT = 1e-3
"""Largest difference of attention weights in float32: a wrong mask, norm or rotation makes a hundred times as much."""
HALF_LIMIT = 0.05
"""The same in half precision, where a library rounds the weights themselves."""


class RowReader(Protocol):
    """One pass of a view: rows to `sink`, values to `values`, logits of the last tokens back."""

    def __call__(
        self, ids: Tensor, rows: Tensor, n_logits: int, sink: RowSink, *, values: RowSink | None = None
    ) -> Tensor:
        """Run tokens `[batch, token]`, all of one length; rows `[event]` are query positions.

        The sink is told (layer, float32 `[batch, head, event, key]`) once per attention layer, as by `rows.tap_rows`;
        right after it `values` (layer, `[batch, kv_head, key, d_value]`): what the attention is a weighted mean of.
        Returns float32 logits `[batch, n_logits, vocabulary]`.
        """
        ...


def check_backend(backend: str) -> str:
    """The backend's name, if there is such a backend.

    Raises:
        LccpError: there is none; the known ones are listed and the nearest is suggested.

    Example:
        >>> check_backend("nnsite")
        Traceback (most recent call last):
        lccp_interp.schema.LccpError: unknown backend 'nnsite'; known: transformers, ...; did you mean 'nnsight'?
    """
    if backend not in BACKENDS:
        near = difflib.get_close_matches(backend, BACKENDS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise LccpError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}{hint}")
    return backend


def row_reader(model: HookedModel, backend: str) -> RowReader:
    """How to read rows of `model` through one of `LIBRARIES`; opens the view, if that has not been done yet.

    Raises:
        LccpError: an unknown backend, or a model that the library does not support.
    """
    if check_backend(backend) == "transformer_lens":
        from lccp_interp.capture.lens import read_rows as through_lens

        return partial(through_lens, model.bridge)
    if backend == "nnsight":
        from lccp_interp.capture.nnsight_view import read_rows as through_nnsight

        return partial(through_nnsight, model.nnsight)
    raise LccpError(f"backend {OWN!r} is no view; call the model's own methods")


def share_weights(model: HookedModel) -> PreTrainedModel:
    """The transformers model once more, running eager attention, over the very same parameters and buffers.

    What is done to its modules (hooks, wrappers, kernels, configs) leaves the model as it was; what is written *into*
    a parameter or buffer is written into the model's.

    Raises:
        LccpError: weights that lie on no device between passes, or no eager attention.

    Example:
        >>> twin = share_weights(load_model("data/trajectory/lccp-1.2M"))               # doctest: +SKIP
    """
    tensors = list(chain(model.model.parameters(), model.model.buffers()))
    if any(tensor.is_meta for tensor in tensors):
        raise LccpError(
            f"checkpoint {model.name} is offloaded in part: its weights lie on no device and cannot be shared with "
            f"another library; load it without a device map, or use backend {OWN!r}"
        )
    # A view may be opened in the middle of a pass without gradients, and asked for some later.
    with torch.inference_mode(False):
        twin = copy.deepcopy(model.model, {id(tensor): tensor for tensor in tensors})
    try:
        twin.set_attn_implementation("eager")
    except (ValueError, ImportError) as error:
        raise LccpError(
            f"model type {twin.config.model_type!r} has no eager attention, without which no library sees attention "
            f"weights ({' '.join(str(error).split())}); use backend {OWN!r}"
        ) from error
    return twin


def own_tokenizer(model: HookedModel) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer for a library to set up; one that knows no padding pads with its first token.

    Padding is masked, so that any token will do; the libraries would make one up that the model has no vector for.
    """
    tokenizer = copy.deepcopy(model.tokenizer)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def keep_logits(model: Any, n_tokens: int, n_logits: int) -> dict[str, Tensor]:
    """What to tell a model's forward so that it makes logits at the last positions only; nothing, if it cannot.

    Example:
        >>> class Tiny:
        ...     def forward(self, input_ids, logits_to_keep=0): ...
        >>> keep_logits(Tiny(), 5, 2)
        {'logits_to_keep': tensor([3, 4])}
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    # Positions, not their number: told a number, some models let their last layers skip all other queries.
    return {"logits_to_keep": torch.arange(n_tokens - n_logits, n_tokens)}


def unsupported(model: HookedModel, backend: str, reason: str) -> LccpError:
    """The error for a model that a library does not support: which library, which model, why, and what to do."""
    config = model.model.config
    others = [name for name in BACKENDS if name not in (backend, "transformer_lens")]
    return LccpError(
        f"checkpoint {model.name}: {LIBRARIES[backend]} does not support model type {config.model_type!r} "
        f"({type(model.model).__name__}): {reason}; use backend {' or '.join(map(repr, others))}"
    )


def prove(model: HookedModel, backend: str, read: RowReader) -> None:
    """Hold a view's attention against the tap's on a short prompt.

    In half precision only the first attention layer is compared: those after it see what two kernels rounded apart.

    Raises:
        LccpError: the library cannot run the model, leaves out layers, or reports other attention.
    """
    ids = _proof_ids(model)
    own = model.attention_rows(ids, range(PROOF_TOKENS))
    seen: dict[int, Tensor] = {}

    def keep(layer: int, weights: Tensor) -> None:
        seen[layer] = weights.cpu()

    try:
        with torch.no_grad():
            read(ids, torch.arange(PROOF_TOKENS), 1, keep)
    except LccpError:
        raise
    except Exception as error:  # a library's own failure may be of any type
        text = " ".join(str(error).split())[:300]
        raise unsupported(model, backend, f"it fails with {type(error).__name__}: {text}") from error
    if sorted(seen) != sorted(own):
        raise unsupported(model, backend, f"it reports layers {sorted(seen)} where attention is in {sorted(own)}")
    exact = model.dtype == "float32"
    limit = FLOAT_LIMIT if exact else HALF_LIMIT
    for layer in sorted(own) if exact else [min(own)]:
        apart = float((seen[layer] - own[layer]).abs().max())
        if not apart <= limit:
            raise unsupported(model, backend, f"its attention is off by {apart:.2g} (limit {limit:g}) in layer {layer}")


def prove_values(model: HookedModel, backend: str) -> None:
    """Hold the values that a view shows against those that the model's attention is given, on a short prompt.

    Raises:
        LccpError: the library shows none, or others.
    """
    ids, read = _proof_ids(model), row_reader(model, backend)
    own: dict[int, Tensor] = {}
    seen: dict[int, Tensor] = {}

    def keep_own(call: AttentionCall) -> Tensor:
        own[call.layer] = call.value.cpu()
        return call.output

    def keep(layer: int, values: Tensor) -> None:
        seen[layer] = values.cpu()

    hint = "leave out the metrics that read values (locos, dla)"
    with torch.inference_mode():
        with edit_attention(model.model, keep_own):
            model.forward(ids, 1)
        try:
            read(ids, torch.arange(PROOF_TOKENS), 1, lambda layer, weights: None, values=keep)
        except Exception as error:  # a library's own failure may be of any type
            text = " ".join(str(error).split())[:300]
            raise unsupported(
                model, backend, f"its values are not found ({type(error).__name__}: {text}); {hint}"
            ) from error
    for layer in sorted(own) if model.dtype == "float32" else [min(own)]:
        mine, theirs = own[layer].float(), seen[layer].float()
        limit = (FLOAT_LIMIT if model.dtype == "float32" else HALF_LIMIT) * float(mine.abs().max())
        if mine.shape != theirs.shape or not float((mine - theirs).abs().max()) <= limit:
            raise unsupported(model, backend, f"it shows other values in layer {layer}; {hint}")


def _proof_ids(model: HookedModel) -> Tensor:
    size = int(model.model.config.get_text_config().vocab_size)
    return torch.randint(0, size, (1, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
