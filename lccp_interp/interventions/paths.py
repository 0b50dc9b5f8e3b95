"""Path patching: what heads tell the logits directly, without any component behind them.

The heads put out what they put out on another prompt, while every other head, attention and MLP is held at what it was:
only the residual stream and the norms along it carry the change. What differs from the usual logits is the direct
effect of the heads; what ordinary patching does beyond it goes through later components.

What is held are the components of `frozen`; nothing is assumed of their names, of parallel residuals or of norms behind
attention. `circuits` has paths that end in another head. This module refuses to know why a path is asked for.
Cost: three passes, and the outputs of all components on one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lccp_interp.capture.model import HookedModel
from lccp_interp.interventions.frozen import changed_outputs, components
from lccp_interp.interventions.hooks import HeadOutputs, patch_heads


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
    held = components(model, input_ids)
    usual: dict[nn.Module, Any] = {}
    patched: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, output: Any) -> None:
        usual[module] = output

    def note(module: nn.Module, output: Any) -> Any:
        # Held at what it was all the same, so that every layer reads the usual residual stream.
        patched[module] = output
        return usual[module]

    with changed_outputs(held, keep):
        model.forward(input_ids, 1)
    with changed_outputs(held, note), patch_heads(model, outputs, positions):
        model.forward(input_ids, 1)
    with changed_outputs(held, lambda module, output: patched[module]):
        logits: Tensor = model.forward(input_ids, n_logits).logits
    return logits[0].float()
