"""The model as TransformerLens sees it: a `TransformerBridge` over the same weights.

    model = load_model(path)
    logits, cache = model.bridge.run_with_cache("Question: who?")
    cache["blocks.2.attn.hook_pattern"]

The bridge replaces the modules that it wraps, so it gets some of its own (`views.share_weights`). This module knows
how a bridge is booted and where it shows its patterns; it refuses to know what is done with it. Cost: a bridge computes
every layer's T x T pattern; reading rows keeps one layer's at a time.
"""

from __future__ import annotations

import logging
import re
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lccp_interp.capture.rows import RowSink
from lccp_interp.capture.views import keep_logits, own_tokenizer, prove, share_weights, unsupported

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lccp_interp.capture.model import HookedModel

_PATTERN = re.compile(r"blocks\.(\d+)\.\w+\.hook_pattern")


def open_bridge(model: HookedModel) -> TransformerBridge:
    """A bridge over the weights of `model`, as `TransformerBridge.boot_transformers(hf_model=...)` would build it.

    HunYuan's mixture of experts, which TransformerLens 4 does not know, is added to what it knows.

    Raises:
        LccpError: TransformerLens does not support the model type, or reports other attention than the model's.

    Example:
        >>> bridge = open_bridge(load_model("data/trajectory/lccp-1.2M"))               # doctest: +SKIP
    """
    build = _builder()
    twin = share_weights(model)
    architecture = type(twin).__name__

    def boot() -> TransformerBridge:
        with torch.inference_mode(False):
            return build(
                twin, architecture, hf_config=twin.config, tokenizer=own_tokenizer(model), model_name=model.name
            )

    try:
        try:
            bridge = boot()
        except ValueError as error:
            if "Unsupported architecture" not in str(error) or architecture not in _ADDED:
                raise
            _ADDED[architecture]()
            bridge = boot()
    except Exception as error:  # adapters fail in whatever way their model differs from what they expect
        unknown = "Unsupported architecture" in str(error)
        text = "it has no adapter for it" if unknown else f"it cannot be booted ({' '.join(str(error).split())[:300]})"
        raise unsupported(model, "transformer_lens", text) from error
    if model.tokenizer.bos_token is None:
        # It would put one in front that it has made up, and the model has no vector for.
        bridge.cfg.default_prepend_bos = False
    prove(model, "transformer_lens", partial(read_rows, bridge))
    return bridge


def pattern_points(bridge: TransformerBridge) -> dict[str, int]:
    """Names of the hook points that show attention patterns, and the layers they belong to.

    Example:
        >>> pattern_points(load_model("data/trajectory/lccp-1.2M").bridge)              # doctest: +SKIP
        {'blocks.0.attn.hook_pattern': 0, 'blocks.1.attn.hook_pattern': 1, ...}
    """
    return {name: int(match[1]) for name in bridge.hook_dict if (match := _PATTERN.fullmatch(name))}


def read_rows(
    bridge: TransformerBridge,
    ids: Tensor,
    rows: Tensor,
    n_logits: int,
    sink: RowSink,
    *,
    values: RowSink | None = None,
) -> Tensor:
    """One pass of the bridge that hands the patterns' rows to `sink`, layer by layer.

    Args:
        bridge: of the model.
        ids: Int `[batch, token]`, all of one length (no padding).
        rows: Int `[event]`, query positions.
        n_logits: at how many of the last tokens logits are wanted.
        sink: receives (layer, float32 `[batch, head, event, key]`) once per layer.
        values: receives (layer, `[batch, kv_head, key, d_value]`) right after the sink.

    Returns:
        Float32 logits `[batch, n_logits, vocabulary]`.
    """
    held: dict[int, Tensor] = {}

    def hold(layer: int, value: Tensor, hook: Any) -> None:
        # Latent attention shows its values by head, all others by token.
        held[layer] = value.transpose(1, 2) if value.shape[1] == ids.shape[1] else value

    def hand_over(layer: int, pattern: Tensor, hook: Any) -> None:
        sink(layer, pattern[:, :, rows.to(pattern.device)].float())
        if values is not None:
            values(layer, held.pop(layer))

    points = pattern_points(bridge)
    hooks: list[tuple[str, Any]] = [(name, partial(hand_over, layer)) for name, layer in points.items()]
    if values is not None:
        hooks += [(name.removesuffix("pattern") + "v", partial(hold, layer)) for name, layer in points.items()]
    fed = ids.to(bridge.cfg.device)
    logits = bridge.run_with_hooks(
        fed,
        fwd_hooks=hooks,
        return_type="logits",
        # Spelt out, for a token that happens to be the tokenizer's padding would be taken for padding.
        attention_mask=torch.ones_like(fed),
        use_cache=False,
        **keep_logits(bridge.original_model, ids.shape[1], n_logits),
    )
    return logits[:, -n_logits:].float()


def _builder() -> Any:
    """TransformerLens' function that builds a bridge, without what importing it does to warnings and logs."""
    log = logging.getLogger("transformers")
    level = log.level
    with warnings.catch_warnings():
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    log.setLevel(level)
    return build_bridge_from_module


def _add_hunyuan_moe() -> None:
    """Tell TransformerLens of HunYuan's mixture of experts: the dense model's blocks with a router in each."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.generalized_components import MoEBridge, MoERouterBridge
    from transformer_lens.model_bridge.supported_architectures import hunyuan_v1_dense

    class HunYuanMoEV1ArchitectureAdapter(hunyuan_v1_dense.HunYuanDenseV1ArchitectureAdapter):
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            router = MoERouterBridge(name="gate")
            experts = MoEBridge(name="mlp", config=self.cfg, submodules={"gate": router})
            self.component_mapping["blocks"].submodules["mlp"] = experts

    ArchitectureAdapterFactory.register_adapter("HunYuanMoEV1ForCausalLM", HunYuanMoEV1ArchitectureAdapter)


_ADDED = {"HunYuanMoEV1ForCausalLM": _add_hunyuan_moe}
"""Architectures that TransformerLens learns from us, if it does not know them itself."""
