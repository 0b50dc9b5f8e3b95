"""Path patching: what heads tell the logits directly, without any component behind them.

The heads put out what they put out on another prompt, while every other head, attention and MLP is held at what it was:
only the residual stream and the norms along it carry the change. What differs from the usual logits is the direct
effect of the heads; what ordinary patching does beyond it goes through later components.

Which submodules of a layer are held is read off the layer: those with weights that are no norm. So nothing is assumed
of their names, of parallel residuals or of norms behind attention. This module refuses to know why a path is asked for.
Cost: three passes, and the outputs of all components on one prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.rows import AttentionCall, edit_attention
from lccp_interp.interventions.hooks import HeadOutputs, patch_heads
from lccp_interp.schema import LccpError


@torch.inference_mode()
def patch_paths(
    model: HookedModel,
    input_ids: Tensor,
    outputs: HeadOutputs,
    positions: Sequence[int] | None = None,
    *,
    n_logits: int = 1,
) -> Tensor:
    """Logits of a prompt where heads put out what they do on another one and only the logits hear of it.

    Args:
        model: the checkpoint, loaded.
        input_ids: Int `[1, token]`, the prompt that is run (the corrupted one).
        outputs: `[token, d_head]` per head, from `head_outputs` on the other prompt (the clean one). Heads of several
            layers do not hear of each other either.
        positions: as in `patch_heads`.
        n_logits: last positions whose logits are wanted.

    Returns:
        Float32 logits `[n_logits, vocabulary]`.

    Raises:
        LccpError: what `patch_heads` raises, or layers that hold their attention in no list of layers.

    Example:
        >>> clean = head_outputs(model, clean_ids, [(2, 2)])            # doctest: +SKIP
        >>> logits = patch_paths(model, corrupted_ids, clean)           # doctest: +SKIP
    """
    held = _components(model, input_ids)
    usual: dict[nn.Module, Any] = {}
    patched: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, output: Any) -> None:
        usual[module] = output

    def note(module: nn.Module, output: Any) -> Any:
        # Held at what it was all the same, so that every layer reads the usual residual stream.
        patched[module] = output
        return usual[module]

    with _after(held, keep):
        model.forward(input_ids, 1)
    with _after(held, note), patch_heads(model, outputs, positions):
        model.forward(input_ids, 1)
    with _after(held, lambda module, output: patched[module]):
        logits: Tensor = model.forward(input_ids, n_logits).logits
    return logits[0].float()


@contextlib.contextmanager
def _after(modules: Sequence[nn.Module], change: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
    """Within this context each module's output is `change(module, output)`, or stays where that is None."""
    handles = [
        module.register_forward_hook(lambda module, inputs, output: change(module, output)) for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _components(model: HookedModel, input_ids: Tensor) -> list[nn.Module]:
    """What adds to the residual stream in each layer: its submodules with weights, without norms."""
    attentions: list[nn.Module] = []

    def see(call: AttentionCall) -> Tensor:
        attentions.append(call.module)
        return call.output

    with edit_attention(model.model, see):
        model.forward(input_ids[:, :1], 1)
    for layers in model.model.modules():
        if isinstance(layers, nn.ModuleList) and attentions and _contains(layers, attentions[0]):
            components = [child for layer in layers for child in layer.children() if _adds(child)]
            if all(any(_contains(child, attention) for child in components) for attention in attentions):
                return components
    raise LccpError(
        f"checkpoint {model.name} ({type(model.model).__name__}) keeps its attention in no list of layers: what stands "
        "behind a head cannot be held; use patch_heads, which holds nothing"
    )


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(own is part for own in module.modules())


def _adds(module: nn.Module) -> bool:
    return "norm" not in type(module).__name__.lower() and next(module.parameters(), None) is not None
