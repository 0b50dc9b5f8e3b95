"""The model as nnsight sees it: a `TransformersModel` over the same weights, running eager attention.

    model = load_model(path)
    with model.nnsight.trace("Question: who?"):
        pattern = model.nnsight.model.layers[2].self_attn.output[1].save()

With any kernel but eager, nnsight's attention outputs are silently None; the view runs eager, and reading rows refuses
what does not. This module knows where transformers says that a model's attention comes out; it refuses to know what is
done with it. Cost: every layer's T x T map; reading rows keeps one layer's at a time.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lccp_interp.capture.rows import RowSink
from lccp_interp.capture.views import keep_logits, own_tokenizer, prove, share_weights, unsupported
from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from nnsight import TransformersModel

    from lccp_interp.capture.model import HookedModel


def open_nnsight(model: HookedModel) -> TransformersModel:
    """nnsight's view of the weights of `model`.

    Raises:
        LccpError: nnsight does not support the model type, or reports other attention than the model's.

    Example:
        >>> view = open_nnsight(load_model("data/trajectory/lccp-1.2M"))                # doctest: +SKIP
    """
    with warnings.catch_warnings():
        from nnsight import TransformersModel

    twin = share_weights(model)
    if not attention_outputs(twin):
        raise unsupported(model, "nnsight", "transformers does not say which of its modules give attention weights")
    # Left alone, its pipeline would move the shared weights to the first GPU.
    placed = {} if getattr(twin, "hf_device_map", None) else {"device": twin.device}
    try:
        with torch.inference_mode(False):
            view = TransformersModel(twin, tokenizer=own_tokenizer(model), task="text-generation", **placed)
    except Exception as error:  # a pipeline fails in whatever way its model differs from what it expects
        reason = f"it cannot be opened ({' '.join(str(error).split())[:300]})"
        raise unsupported(model, "nnsight", reason) from error
    prove(model, "nnsight", partial(read_rows, view))
    return view


def attention_outputs(model: Any) -> dict[str, tuple[int, int]]:
    """Paths of the modules that give attention weights: their layer, and which of their outputs the weights are.

    Read from transformers' own `_can_record_outputs`; in order of the layers.

    Example:
        >>> from lccp_interp.capture.architectures import named, tiny_model
        >>> attention_outputs(tiny_model(named("gpt_neox")))["gpt_neox.layers.2.attention"]
        (2, 1)
    """
    from transformers import PreTrainedModel
    from transformers.utils.output_capturing import OutputRecorder

    found = {}
    for part in model.modules():
        specs = (getattr(part, "_can_record_outputs", None) or {}) if isinstance(part, PreTrainedModel) else {}
        given = specs.get("attentions", ())
        for spec in given if isinstance(given, (list, tuple)) else [given]:
            recorded = spec if isinstance(spec, OutputRecorder) else OutputRecorder(spec, index=1)
            for path, module in model.named_modules():
                if isinstance(module, recorded.target_class) and getattr(module, "layer_idx", None) is not None:
                    found[path] = int(module.layer_idx), recorded.index
    return dict(sorted(found.items(), key=lambda item: item[1]))


def read_rows(
    view: TransformersModel,
    ids: Tensor,
    rows: Tensor,
    n_logits: int,
    sink: RowSink,
    *,
    values: RowSink | None = None,
) -> Tensor:
    """One pass of nnsight's that hands the attention's rows to `sink`, layer by layer.

    Args:
        view: of the model.
        ids: Int `[batch, token]`, all of one length (no padding).
        rows: Int `[event]`, query positions.
        n_logits: at how many of the last tokens logits are wanted.
        sink: receives (layer, float32 `[batch, head, event, key]`) once per layer.
        values: receives (layer, `[batch, kv_head, key, d_value]`) right after the sink.

    Returns:
        Float32 logits `[batch, n_logits, vocabulary]`.

    Raises:
        LccpError: the view runs another attention than eager.
    """
    model = view._module
    outputs = attention_outputs(model)

    def hand_over(layer: int, weights: Tensor | None, value: Tensor | None) -> None:
        if weights is None:
            raise LccpError(
                f"nnsight sees no attention weights in layer {layer}: its view runs "
                f"{model.config._attn_implementation!r} attention; call "
                "model.nnsight._module.set_attn_implementation('eager')"
            )
        sink(layer, weights[:, :, rows.to(weights.device)].float())
        if values is not None and value is not None:
            values(layer, value)

    fed = ids.to(model.get_input_embeddings().weight.device)
    inputs = {"input_ids": fed, "attention_mask": torch.ones_like(fed)}
    options = keep_logits(model, ids.shape[1], n_logits)
    logits: list[Tensor] = []
    with view.trace(inputs, use_cache=False, **options):
        for path, (layer, index) in outputs.items():
            attention = view.get(path)
            value = None
            if values is not None:
                # The call of the attention function (its name's first use is an assignment): module, query, key, value.
                value = attention.source.attention_interface_1.inputs[0][3]
            hand_over(layer, attention.output[index], value)
        logits.append(view.output.logits)
    return logits[0][:, -n_logits:].float()
