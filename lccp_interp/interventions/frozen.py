"""One prompt's usual pass, kept, and passes that are held at it: what reaches a layer from a head and nothing between.

A component is what adds to the residual stream: a layer's submodule with weights that is no norm (its attention, its
MLP, its experts). With all components held at what they put out in the usual pass, a change in one head reaches later
layers by the residual stream only, and they hear it through their own norms and projections. So nothing is assumed of
names, of fused or grouped projections, of norms on queries and keys, of rotary positions, of parallel residuals or of
norms behind attention: query, key and value are read where the model hands them to its attention function.

It refuses to know why heads are changed. Cost: the outputs of all components and the queries, keys and values of all
layers on one prompt stay in memory; a held pass runs no component but the attentions that are asked about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.rows import AttentionCall, edit_attention
from lccp_interp.interventions.heads import Head, check_heads, known_heads
from lccp_interp.schema import LccpError

Change = Mapping[Head, Tensor]
"""What some heads put out instead, `[token, d_head]` each, before the output projection."""

QueryKeyValue = tuple[Tensor, Tensor, Tensor]
"""What a layer's attention is given: query `[batch, head, token, d]`, key and value `[batch, kv_head, token, d]`."""


@dataclass(frozen=True)
class Frozen:
    """The usual pass of one prompt.

    Attributes:
        model: the checkpoint, loaded.
        input_ids: Int64 `[1, token]`.
        calls: each attention layer's call, by true layer index.
        outputs: what each component put out.

    Example:
        >>> frozen = Frozen.of(model, ids)                                          # doctest: +SKIP
        >>> query, key, value = frozen.inputs_under([{(0, 1): other}], [2])[2]      # doctest: +SKIP
    """

    model: HookedModel
    input_ids: Tensor
    calls: Mapping[int, AttentionCall]
    outputs: Mapping[nn.Module, Any]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: HookedModel, input_ids: Tensor) -> Frozen:
        """Run a prompt `[1, token]` once and keep what its components put out.

        Raises:
            LccpError: layers that hold their attention in no list of layers, or a component that a pass runs not
                exactly once.
        """
        held = components(model, input_ids)
        calls: dict[int, AttentionCall] = {}
        outputs: dict[nn.Module, Any] = {}

        def see(call: AttentionCall) -> Tensor:
            calls[call.layer] = call
            return call.output

        def keep(module: nn.Module, output: Any) -> None:
            if module in outputs:
                raise _not_held(model, module, "more than once")
            outputs[module] = output

        with edit_attention(model.model, see), changed_outputs(held, keep):
            model.forward(input_ids, 1)
        for module in held:
            if module not in outputs:
                raise _not_held(model, module, "never")
        return cls(model, input_ids, calls, outputs)

    @torch.inference_mode()
    def inputs_under(self, changes: Sequence[Change], layers: Collection[int]) -> dict[int, QueryKeyValue]:
        """What layers are given where heads put out something else and nothing between hears of it.

        Args:
            changes: one per sequence of the batch; the heads of one do not hear of each other either.
            layers: true indices of attention layers.

        Returns:
            By layer, query, key and value of a batch as long as `changes`. The keys that a layer's attention may see
            are the usual ones: take them from `calls`.

        Raises:
            LccpError: a head that the model does not have, outputs of another shape, or layers that a held component
                keeps from hearing of the residual stream.
        """
        n = len(changes)
        senders = {head for change in changes for head in change}
        where = f"checkpoint {self.model.name} ({type(self.model.model).__name__})"
        check_heads(sorted(senders), known_heads(self.model.model.config), where)
        patched = self._held_pass(n, {layer for layer, _ in senders}, {}, lambda call: self._patched(call, changes))
        found: dict[int, QueryKeyValue] = {}

        def read(call: AttentionCall) -> Tensor:
            found[call.layer] = (call.query, call.key, call.value)
            return call.output

        self._held_pass(n, set(layers), patched, read)
        for layer in layers:
            if any(earlier < layer for earlier, _ in senders):
                self._prove_heard(layer, found[layer], patched)
        return found

    def _prove_heard(self, layer: int, given: QueryKeyValue, patched: Mapping[nn.Module, Any]) -> None:
        """Refuse a model of which a layer reads something that is held in place of the residual stream."""
        call = self.calls[layer]
        usual = (call.query, call.key, call.value)
        if any(not torch.equal(own, part.expand_as(own)) for own, part in zip(given, usual, strict=True)):
            return
        earlier = {module: output for module, output in patched.items() if not contains(module, call.module)}
        if any(
            not _same(output, self._repeated(self.outputs[module], len(given[0]))) for module, output in earlier.items()
        ):
            raise LccpError(
                f"checkpoint {self.model.name} ({type(self.model.model).__name__}): layer {layer} hears nothing of "
                "earlier heads while components are held, so what feeds its heads cannot be measured; use patch_heads"
            )

    def _repeated(self, output: Any, n: int) -> Any:
        """A component's output for `n` copies of the prompt, be it `[1, token, d]` or `[token, d]`."""
        if isinstance(output, tuple | list):
            return type(output)(self._repeated(part, n) for part in output)
        if not isinstance(output, Tensor) or output.ndim == 0:
            return output
        if output.shape[0] == 1:
            return output.expand(n, *output.shape[1:])
        flat = output.shape[0] == self.input_ids.shape[1]
        return output.repeat(n, *(1 for _ in output.shape[1:])) if flat else output

    def _patched(self, call: AttentionCall, changes: Sequence[Change]) -> Tensor:
        """The layer's usual output, with what is changed in it in each sequence."""
        output = call.output.clone()
        for index, change in enumerate(changes):
            for (layer, head), own in change.items():
                if layer != call.layer:
                    continue
                if own.shape != output.shape[1::2]:
                    raise LccpError(
                        f"head {layer}-{head} puts out [token, number] {list(output.shape[1::2])}, got "
                        f"{list(own.shape)}; take it from a prompt as long, of this model"
                    )
                output[index, :, head] = own.to(output)
        return output

    def _held_pass(
        self,
        n: int,
        layers: Collection[int],
        patched: Mapping[nn.Module, Any],
        edit: Callable[[AttentionCall], Tensor],
    ) -> dict[nn.Module, Any]:
        """Run `n` copies of the prompt with every component held: at `patched`, or else at what it usually puts out.

        Only the components that hold the attention of `layers` are run, under `edit`, and what they put out is handed
        back; all layers read the residual stream of the held outputs.
        """
        # Where layers use another layer's keys, that one has to make them.
        shared = getattr(self.model.model.config.get_text_config(), "num_kv_shared_layers", None)
        attentions = [call.module for layer, call in self.calls.items() if shared or layer in layers]
        run = [module for module in self.outputs if any(contains(module, own) for own in attentions)]
        held = {module: patched.get(module, self._repeated(output, n)) for module, output in self.outputs.items()}
        found: dict[nn.Module, Any] = {}

        def note(module: nn.Module, output: Any) -> Any:
            found[module] = output
            return held[module]

        skipped = {module: output for module, output in held.items() if module not in run}
        with _skipped(skipped), edit_attention(self.model.model, edit), changed_outputs(run, note):
            self.model.forward(self.input_ids.expand(n, -1), 1)
        return found


@contextlib.contextmanager
def changed_outputs(modules: Sequence[nn.Module], change: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
    """Within this context each module's output is `change(module, output)`, or stays where that is None."""
    handles = [
        module.register_forward_hook(lambda module, inputs, output: change(module, output)) for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _skipped(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Within this context modules hand back these outputs and compute nothing."""
    before = {module: module.__dict__.get("forward") for module in outputs}
    try:
        for module, output in outputs.items():
            module.forward = lambda *args, _output=output, **kwargs: _output
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return not isinstance(one, tuple | list) or all(_same(*pair) for pair in zip(one, other, strict=True))


def _not_held(model: HookedModel, module: nn.Module, how_often: str) -> LccpError:
    return LccpError(
        f"checkpoint {model.name} ({type(model.model).__name__}) runs {type(module).__name__}, which adds to the "
        f"residual stream, {how_often} in a pass: it cannot be held; use patch_heads, which holds nothing"
    )


def components(model: HookedModel, input_ids: Tensor) -> list[nn.Module]:
    """What adds to the residual stream: the submodules with weights of every layer, without norms.

    Raises:
        LccpError: as `layer_components`.
    """
    return [module for layer in layer_components(model, input_ids) for module in layer]


def layer_components(model: HookedModel, input_ids: Tensor) -> list[list[nn.Module]]:
    """What adds to the residual stream in each layer: its submodules with weights, without norms.

    Raises:
        LccpError: layers that hold their attention in no list of layers.
    """
    attentions: list[nn.Module] = []

    def see(call: AttentionCall) -> Tensor:
        attentions.append(call.module)
        return call.output

    with edit_attention(model.model, see):
        model.forward(input_ids[:, :1], 1)
    for layers in model.model.modules():
        if isinstance(layers, nn.ModuleList) and attentions and contains(layers, attentions[0]):
            found = [[child for child in layer.children() if _adds(child)] for layer in layers]
            flat = [child for layer in found for child in layer]
            if all(any(contains(child, attention) for child in flat) for attention in attentions):
                return found
    raise LccpError(
        f"checkpoint {model.name} ({type(model.model).__name__}) keeps its attention in no list of layers: what stands "
        "behind a head cannot be held; use patch_heads, which holds nothing"
    )


def contains(module: nn.Module, part: nn.Module) -> bool:
    """Whether `part` is a module or one of its submodules."""
    return any(own is part for own in module.modules())


def _adds(module: nn.Module) -> bool:
    return "norm" not in type(module).__name__.lower() and next(module.parameters(), None) is not None
