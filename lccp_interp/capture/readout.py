"""From a head's values to the logit of a token: the linear way out of an attention layer, found and proved.

What attention on a key adds to the logit of token y, per unit of attention, is u_y^T W_O v: v the key's value, W_O the
head's slice of the layer's output projection, u_y the unembedding of y. `LogitReader` finds these in a model by what
they do, not by their names: W_O is the linear module in the attention module that is given the heads' outputs as they
are, and the final norm is the module that hands the unembedding its input. A short pass proves both, and that a head's
output is its weights times its values. Where something stands between them (a gate, a norm) it refuses by name.

u_y is the unembedding's row times the final norm's weight, and where that norm subtracts the mean, less its mean. Left
out: the norm's division (one positive number per position, for all heads and layers), biases, norms behind the output
projection, scales and soft-caps of residual stream and logits. It refuses to know what is scored. Cost: a pass over a
few tokens to make it; per layer `[event, head, d_head]` times `[key, d_head]` in float32, never `[head, key, token]`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.rows import AttentionCall, edit_attention, tap_rows
from lccp_interp.schema import LccpError

PROOF_TOKENS = 8
HINT = "leave out the metrics that read values (locos, dla)"


@dataclass(frozen=True)
class LogitReader:
    """What is needed to read values as logits.

    Attributes:
        projections: the output projection of each attention layer, by true layer index.
        unembedding: `[token, d_model]`, on its own device, in the model's dtype.
        gain: float32 `[d_model]`, what the final norm multiplies with.
        centred: whether the final norm subtracts the mean.

    Example:
        >>> from lccp_interp.capture.model import load_model
        >>> from lccp_interp.checkpoints import bundled_trajectory
        >>> reader = LogitReader.of(load_model(bundled_trajectory()[-1].path))
        >>> values = torch.zeros(4, 10, 16)                  # key heads, keys, d_head
        >>> reader.gains(2, values, torch.tensor([5, 6])).shape
        torch.Size([8, 2, 10])
    """

    projections: dict[int, nn.Module]
    unembedding: Tensor
    gain: Tensor
    centred: bool

    @classmethod
    def of(cls, model: HookedModel) -> LogitReader:
        """The reader of a model.

        Raises:
            LccpError: something other than a linear projection stands between heads and residual stream, or between
                residual stream and logits; or weights that are not in memory.
        """
        head = model.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            kind = "none" if head is None else type(head).__name__
            raise LccpError(f"{model.name}: expected a linear unembedding, got {kind}; {HINT}")
        spy = _Spy(model, head)
        with spy.watching(), torch.inference_mode():
            n_tokens = min(PROOF_TOKENS, head.weight.shape[0])
            with edit_attention(model.model, spy.see), tap_rows(model.model, torch.arange(n_tokens), spy.keep):
                model.forward(torch.arange(n_tokens)[None], 1)
            gain, centred = _linear_part(spy.final_norm(), head.weight.shape[1])
        for module in (head, *spy.projections.values()):
            if module.weight.is_meta:
                raise LccpError(f"{model.name}: weights of {type(module).__name__} are offloaded; {HINT}")
        return cls(spy.projections, head.weight, gain, centred)

    @torch.inference_mode()
    def gains(self, layer: int, values: Tensor, token_ids: Tensor) -> Tensor:
        """What a whole unit of each head's attention on a key would add to the logits of some tokens.

        Args:
            layer: true index of an attention layer.
            values: `[kv_head, key, d_value]` of one sequence, any dtype.
            token_ids: Int `[event]`, the token whose logit each event is about.

        Returns:
            Float32 `[head, event, key]` on the values' device; divide by the final residual's norm for true logits.
        """
        device = values.device
        direction = self.unembedding[token_ids.to(self.unembedding.device)].float().to(device) * self.gain.to(device)
        if self.centred:
            direction = direction - direction.mean(dim=-1, keepdim=True)
        read = direction @ _matrix(self.projections[layer]).to(device).float()  # [event, head * d_value]
        n_kv_heads, _, d_value = values.shape
        n_heads = read.shape[-1] // d_value
        per_head = read.reshape(-1, n_kv_heads, n_heads // n_kv_heads, d_value)
        return torch.einsum("egrd,gkd->grek", per_head, values.float()).reshape(n_heads, len(token_ids), -1)


def _matrix(projection: nn.Module) -> Tensor:
    """W_O `[d_model, head * d_value]`; GPT-2's `Conv1D` keeps it transposed."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(projection, Conv1D) else weight


class _Spy:
    """Watches one pass: which module is given each layer's head outputs, and which makes the unembedding's input."""

    def __init__(self, model: HookedModel, head: nn.Linear) -> None:
        self._model, self._head = model, head
        self._weights: dict[int, Tensor] = {}
        self._call: AttentionCall | None = None
        self._attentions: dict[int, nn.Module] = {}
        self._last: list[tuple[nn.Module, Tensor]] = []
        self._unembedded: Tensor | None = None
        self.projections: dict[int, Any] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every module without children, for as long as the context; then all layers are checked."""
        leaves = [module for module in self._model.model.modules() if not any(True for _ in module.children())]
        hooks = [leaf.register_forward_hook(self._after) for leaf in leaves]
        hooks.append(self._head.register_forward_pre_hook(self._before_unembedding))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def keep(self, layer: int, weights: Tensor) -> None:
        """The sink: rows of the layer whose call comes next."""
        self._weights[layer] = weights

    def see(self, call: AttentionCall) -> Tensor:
        """The edit, which changes nothing."""
        weights, kind = self._weights.pop(call.layer), type(call.module).__name__
        values = call.value.repeat_interleave(weights.shape[1] // call.value.shape[1], dim=1)
        made = (weights @ values.float()).transpose(1, 2)
        if made.shape != call.output.shape or not _close(made, call.output):
            raise LccpError(
                f"{self._model.name}: {kind} (layer {call.layer}) makes more of its values than their weighted mean; "
                f"{HINT}"
            )
        self._call, self._attentions[call.layer] = call, call.module
        return call.output

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        given = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        call = self._call
        if call is not None and given is not None and isinstance(module, nn.Linear | Conv1D):
            heads = call.output.flatten(2)
            owned = any(module is own for own in call.module.modules())
            if owned and given.numel() == heads.numel() and _close(given.reshape(heads.shape), heads):
                self.projections[call.layer] = module
                self._call = None
        if module is self._head or given is None or not isinstance(output, Tensor):
            return
        if output.shape == given.shape and output.shape[-1] == self._head.weight.shape[1]:
            # Of the last few only: the final norm is among them, and outputs of large models are large.
            self._last = [*self._last[-3:], (module, output)]

    def _before_unembedding(self, module: nn.Module, inputs: Any) -> None:
        self._unembedded = inputs[0]

    def final_norm(self) -> nn.Module:
        """The module whose output the unembedding was given; every layer has a projection by then.

        Raises:
            LccpError: there is none, or a layer has no output projection that is given the heads as they are.
        """
        for layer, attention in self._attentions.items():
            if layer not in self.projections:
                raise LccpError(
                    f"{self._model.name}: {type(attention).__name__} (layer {layer}) has no linear module that is "
                    f"given the heads' outputs as they are (a gate or a norm stands between?); {HINT}"
                )
        for module, output in reversed(self._last):
            if self._unembedded is not None and _close(output[:, -1], self._unembedded[:, -1]):
                return module
        raise LccpError(f"{self._model.name}: no final norm hands the unembedding its input; {HINT}")


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-4 if other.dtype == torch.float32 else 2e-2
    scale = float(other.float().abs().nan_to_num().max())
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _linear_part(norm: nn.Module, d_model: int) -> tuple[Tensor, bool]:
    """What a norm multiplies each number with, and whether it subtracts their mean first.

    Read off its outputs, so that a weight kept as 1 + w, or none, is right too: of +1 and -1 in turn mean and square
    are known, and the difference between an input and its negative is free of the bias.

    Raises:
        LccpError: an odd `d_model`, of which there are no such numbers.
    """
    if d_model % 2:
        raise LccpError(f"{type(norm).__name__} over an odd number ({d_model}) of channels cannot be read; {HINT}")
    some = next(norm.parameters(), None)
    signs = torch.ones(1, 1, d_model)
    signs[..., 1::2] = -1
    if some is not None:
        signs = signs.to(device=some.device, dtype=some.dtype)
    up, down, moved = norm(signs), norm(-signs), norm(signs + 1)
    gain = ((up - down) / 2 * signs).float().reshape(-1)
    # A mean of 1 beside signs of 1 leaves a norm that does not subtract it sqrt(2) apart.
    return gain, _close(moved, up)
