"""The self-check: proof, on a short random prompt, that the tap tells the truth about a loaded model.

An architecture can be captured only if its attention really runs through the tap, and a checkpoint only if its numbers
are sound. Both are cheap to prove and dear to assume, so a model is checked before its first scoring: the tap changes
nothing, rows are distributions over the past, they equal the model's own eager attention, they are what the fast
kernel's output is made of, and that output reaches the logits. Whether a prompt may be run in pieces behind a cache is
found out too; that is no failure, only slower.

Rows are compared with eager attention over the *same* hidden states (the tap run over eager attention), and the fast
kernel is compared layer by layer with what the rows make of its values. So no error adds up over layers, and limits
hold for deep models too. It refuses to know tasks and scores. Cost: about ten passes over 48 tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lccp_interp.capture.architectures import ARCHITECTURES, named, tiny_model
from lccp_interp.capture.model import (
    DTYPES,
    HookedModel,
    folder_name,
    one_line,
    read_architecture,
    resolve,
    state_layers,
)
from lccp_interp.capture.rows import TAP_NAME, tap_rows
from lccp_interp.capture.verdict import Finding, SelfCheck
from lccp_interp.schema import LccpError

SUM_LIMIT = 1e-5
"""How far a row's sum may be from 1. Rows are computed in float32 whatever the weights are."""

LIMITS = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.004}
"""How far numbers of a dtype may be apart that differ by a rounding or two, as a share of the largest of them.

Measured on random decoders of 24 layers (Llama, Qwen 3 MoE, Gemma 2 and 3, gpt-oss) on a CPU: sdpa's output is at most
5e-7 away from rows x values in float32, 0.004 in bfloat16 and 0.0006 in float16, however sharp the attention.
"""

EAGER_ROUNDINGS = 1.0
"""Eager attention in half precision rounds its logits: its rows may move by this x epsilon x the head's largest logit.

Measured on the same models, with largest logits from 1.4 to 720: by 0.12 to 0.35 x epsilon x the largest logit.
"""

FEED_LIMIT = 1e-6
"""How much the logits must change at least, as a share of the largest, when a layer's attention is silenced."""

SHARING_LIMITS = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""How far a token of a prompt run in pieces may be from the whole prompt's: distance of its numbers by their size."""

NOISE_FACTOR = 4
"""Where rounding alone moves a model's numbers further than a limit, this many times as far is allowed."""

RANDOM_LIMIT = 200_000_000
"""Parameters up to which a model is made of a bare config."""

TINY = 1e-30
"""Stands for nothing where something is divided by it."""

SILENCED_AT_ONCE = 16
"""Layers silenced in one pass, one in each entry of a batch."""


@dataclass
class _Pass:
    """One tapped pass: logits `[token, vocabulary]`, and per layer what the tap saw, float32 on the CPU."""

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: dict[int, Tensor] = field(default_factory=dict)  # [head, query, key]
    largest_logits: dict[int, Tensor] = field(default_factory=dict)  # [head], before the softmax
    output_errors: dict[int, Tensor] = field(default_factory=dict)  # [head], as a share of its largest value
    sinks: set[int] = field(default_factory=set)


def self_check(model: HookedModel, *, n_tokens: int = 48, seed: int = 0) -> SelfCheck:
    """Check a loaded model on a short random prompt.

    Args:
        model: the checkpoint; neither its weights nor its attention implementation are changed.
        n_tokens: tokens of the prompt, at least 8; fewer are used if the model has fewer positions.
        seed: of the prompt.

    Returns:
        Every check's worst error and where it is; `require()` raises if one fails.

    Raises:
        LccpError: the model cannot be run or captured at all.

    Example:
        >>> self_check(load_model("data/trajectory/18-lccp-2.62M")).passed                # doctest: +SKIP
        True
    """
    if n_tokens < 8:
        raise LccpError(f"a self-check needs a prompt of 8 tokens or more, got n_tokens={n_tokens}")
    if model.dtype not in LIMITS:
        raise LccpError(
            f"checkpoint {model.name} runs in {model.dtype}; a self-check knows {', '.join(LIMITS)}: load it with "
            "--dtype float32"
        )
    ids, other = _prompts(model, n_tokens, seed)
    kernel = model.model.config._attn_implementation
    try:
        plain = _logits(model, ids)
        own = _tapped(model, ids)
    except Exception as error:  # whatever a modelling file raises; it is told in one line
        raise LccpError(
            f"checkpoint {model.name} fails on a prompt of {ids.shape[1]} random tokens: {one_line(error)}"
        ) from error
    if not own.rows:
        raise LccpError(
            f"checkpoint {model.name} ({type(model.model).__name__}) has no attention layer, so it has no retrieval "
            "heads; give a model with attention"
        )
    findings = [_finite(model, plain, own)]
    sharing = (False, "not tried, for its logits are no numbers")
    if findings[0].passed:
        noise = _distance(_rounded(model, ids, seed), own, 0, model.dtype)
        findings += [
            _untouched(model, plain, own, noise),
            _sums(own),
            _no_future(own),
            _equal_eager(model, ids),
            _make_output(model, own, kernel),
            _feeds(model, ids, sorted(own.rows)),
        ]
        sharing = _sharing(model, ids, other, own, noise)
    return SelfCheck(
        checkpoint=model.name,
        dtype=model.dtype,
        kernel=kernel,
        n_layers=model.n_layers,
        attention_layers=tuple(sorted(own.rows)),
        findings=tuple(findings),
        shares_prefixes=sharing[0],
        sharing=sharing[1],
    )


def random_model(folder: str | Path, *, seed: int = 0, device: str = "auto", dtype: str = "auto") -> HookedModel:
    """An architecture with random weights, to see whether it can be captured; it has no tokenizer.

    Args:
        folder: holds a config.json; needs no weights and no tokenizer. A hub id will do, too, and so will a model type
            out of the table of architectures (`llama`), which gives a tiny model.
        seed: of the weights; torch's global generator is left as it was.
        device: as in `load_model`.
        dtype: as in `load_model`.

    Raises:
        LccpError: no such config, an architecture that cannot be captured, or one of more than `RANDOM_LIMIT`
            parameters.

    Example:
        >>> from lccp_interp.checkpoints import bundled_trajectory
        >>> self_check(random_model(bundled_trajectory()[-1].path)).passed
        True
        >>> self_check(random_model("hunyuan_v1_moe")).passed
        True
    """
    from transformers import AutoModelForCausalLM

    if not Path(folder).exists() and str(folder) in {row.model_type for row in ARCHITECTURES}:
        row = named(str(folder))
        device, dtype = resolve(device, "float32" if dtype == "auto" else dtype, folder)
        tiny = tiny_model(row, seed=seed).to(device=device, dtype=DTYPES[dtype])
        return HookedModel(model=tiny, tokenizer=None, name=f"tiny random {row.title}")
    config = read_architecture(folder)
    device, dtype = resolve(device, dtype, folder)
    try:
        with torch.device("meta"):
            n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if n_parameters > RANDOM_LIMIT:
            raise LccpError(
                f"{folder} asks for {n_parameters / 1e6:,.0f}M parameters, random weights are made up to "
                f"{RANDOM_LIMIT / 1e6:,.0f}M; make num_hidden_layers, hidden_size or vocab_size smaller in a copy "
                "of its config.json"
            )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    # As a trained model's: activations keep their size, and attention is uneven.
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    except LccpError:
        raise
    except Exception as error:  # whatever a modelling file raises on its config
        raise LccpError(f"{folder} gives no model: {one_line(error)}; look at its config.json") from error
    model = model.eval().to(device=device, dtype=DTYPES.get(dtype, torch.float32))
    return HookedModel(model=model, tokenizer=None, name=folder_name(folder))


@dataclass(frozen=True)
class _Call:
    """What an attention layer was called with."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float

    @property
    def layer(self) -> int:
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @property
    def has_sink(self) -> bool:
        return any("sink" in name for name, _ in self.module.named_parameters())

    def heads(self, tensor: Tensor) -> Tensor:
        """Keys or values of the first entry for every query head, float32 `[head, key, d]` on the CPU."""
        shared = self.query.shape[1] // tensor.shape[1]
        return tensor[0].float().cpu().repeat_interleave(shared, dim=0)


@contextlib.contextmanager
def _around_tap(change: Callable[[_Call, Tensor], Tensor]) -> Iterator[None]:
    """Within this context every tapped attention returns `change(call, output)` instead of its output.

    `call` has its query `[batch, head, query, d]`, key and value `[batch, kv_head, key, d]` and scaling; output is
    `[batch, query, head, d]`.
    """
    tap = ALL_ATTENTION_FUNCTIONS[TAP_NAME]

    def changed(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = tap(module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return change(_Call(module, query, key, value, scaling), output), weights

    AttentionInterface.register(TAP_NAME, changed)
    try:
        yield
    finally:
        AttentionInterface.register(TAP_NAME, tap)


@contextlib.contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _prompts(model: HookedModel, n_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two random prompts `[1, token]` that begin alike, of ordinary tokens only."""
    config = model.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    n_tokens = min(n_tokens, positions) if isinstance(positions, int) and positions > 0 else n_tokens
    n_known = min(config.vocab_size, model.model.get_input_embeddings().weight.shape[0])
    # An image's or a pad's token means something else than itself.
    special = {value for key, value in model.model.config.to_dict().items() if "token_id" in key and _is_int(value)}
    ordinary = torch.tensor([token for token in range(n_known) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    ids, other = ordinary[torch.randint(len(ordinary), (2, 1, n_tokens), generator=generator)]
    other[:, : n_tokens // 3] = ids[:, : n_tokens // 3]
    return ids.to(model.device), other.to(model.device)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@torch.inference_mode()
def _logits(model: HookedModel, ids: Tensor) -> Tensor:
    return model.model(input_ids=ids, use_cache=False).logits[0].float().cpu()


@torch.inference_mode()
def _tapped(model: HookedModel, ids: Tensor, cache: Any = None) -> _Pass:
    """One pass with the rows of all tokens in `ids`, behind `cache` if there is one."""
    seen = _Pass()

    def keep(layer: int, weights: Tensor) -> None:
        seen.rows[layer] = weights[0].cpu()

    def compare(call: _Call, output: Tensor) -> Tensor:
        rows, values = seen.rows[call.layer], call.heads(call.value)
        made, got = rows @ values, output[0].float().cpu().transpose(0, 1)
        if call.has_sink:
            seen.sinks.add(call.layer)
            # Some eager functions report rows before the sink has taken its share of each; then it is found here.
            share = (made * got).sum(-1, keepdim=True) / made.square().sum(-1, keepdim=True).clamp(min=TINY)
            made = made * share.clamp(0, 1)
        largest = values.abs().amax((-2, -1)).clamp(min=TINY)
        seen.output_errors[call.layer] = (made - got).abs().amax((-2, -1)) / largest
        logits = call.query[0].float().cpu() @ call.heads(call.key).transpose(-2, -1) * call.scaling
        seen.largest_logits[call.layer] = logits.masked_fill(rows == 0, 0).abs().amax((-2, -1))
        return output

    with tap_rows(model.model, torch.arange(ids.shape[1]), keep), _around_tap(compare):
        output = model.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    seen.logits = output.logits[0].float().cpu()
    return seen


def _rounded(model: HookedModel, ids: Tensor, seed: int) -> _Pass:
    """A pass whose token embeddings are off by one rounding: how far rounding alone carries this model."""
    generator = torch.Generator().manual_seed(seed)

    def jitter(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + signs * torch.finfo(output.dtype).eps)

    hook = model.model.get_input_embeddings().register_forward_hook(jitter)
    try:
        return _tapped(model, ids)
    finally:
        hook.remove()


def _rounding_limits(own: _Pass, dtype: str) -> dict[int, Tensor]:
    """How far eager attention may round, per layer `[head]`."""
    epsilon = torch.finfo(DTYPES[dtype]).eps
    return {
        layer: (EAGER_ROUNDINGS * epsilon * largest.double()).clamp(min=LIMITS[dtype])
        for layer, largest in own.largest_logits.items()
    }


def _per_head(name: str, errors: dict[int, Tensor], limits: dict[int, Tensor], good: str, bad: str) -> Finding:
    """A finding about errors per layer `[head]`, at the place where its limit is missed most or held least."""
    excess = {layer: (error - limits[layer]).nan_to_num(nan=math.inf) for layer, error in errors.items()}
    layer = max(sorted(excess), key=lambda index: float(excess[index].max()))
    head = int(excess[layer].argmax())
    error, limit = float(errors[layer][head]), float(limits[layer][head])
    if error == 0:
        return Finding(name, True, 0.0, limit, None, None, good)
    return Finding(name, error <= limit, error, limit, layer, head, good if error <= limit else bad)


def _same(limit: float, errors: dict[int, Tensor]) -> dict[int, Tensor]:
    return {layer: torch.full_like(error, limit, dtype=torch.float64) for layer, error in errors.items()}


def _finite(model: HookedModel, plain: Tensor, own: _Pass) -> Finding:
    bad = int((~plain.isfinite()).sum())
    if not bad:
        return Finding("logits are finite", True, 0.0, 0.0, None, None, "every logit is a number")
    broken = {layer: ~(rows.sum((-2, -1)) + own.output_errors[layer]).isfinite() for layer, rows in own.rows.items()}
    layer = next((layer for layer in sorted(broken) if broken[layer].any()), None)
    head = None if layer is None else int(broken[layer].int().argmax())
    weights = next((name for name, p in model.model.named_parameters() if not _is_sound(p)), None)
    if weights is not None:
        advice = f"{weights} holds NaN or infinite numbers; copy the checkpoint again, or give an earlier one"
    elif model.dtype == "float32":
        advice = "its weights are numbers, but too large; give an earlier checkpoint"
    else:
        advice = f"its weights are numbers, but {model.dtype} overflows; try --dtype float32"
    text = f"{bad} of {plain.numel()} logits are NaN or infinite: {advice}"
    return Finding("logits are finite", False, math.nan, 0.0, layer, head, text)


def _is_sound(parameter: Tensor) -> bool:
    """Whether all its numbers are finite; offloaded ones cannot be looked at here."""
    return parameter.device.type == "meta" or bool(parameter.isfinite().all())


def _untouched(model: HookedModel, plain: Tensor, own: _Pass, noise: float) -> Finding:
    error = _difference(own.logits[None], plain[None], model.dtype)
    limit = max(LIMITS[model.dtype], NOISE_FACTOR * noise)
    text = "the tap leaves the logits as they are"
    if not error <= limit:
        text = (
            "the tap changes the logits: this architecture asks more of its attention than the tap passes on; "
            "it cannot be captured"
        )
    return Finding("logits stay as they are", error <= limit, error, limit, None, None, text)


def _sums(own: _Pass) -> Finding:
    errors = {}
    for layer, rows in own.rows.items():
        excess = rows.sum(-1) - 1
        # A sink takes its share of a row, so there a sum may be anything up to 1.
        errors[layer] = (excess.clamp(min=0) if layer in own.sinks else excess.abs()).amax(-1)
    good = "rows sum to at most 1, the rest is the sink's" if own.sinks else "rows sum to 1"
    bad = "rows do not sum to 1: the model's eager attention is no softmax; it cannot be captured"
    return _per_head("rows sum to 1", errors, _same(SUM_LIMIT, errors), good, bad)


def _no_future(own: _Pass) -> Finding:
    errors = {layer: rows.triu(1).abs().amax((-2, -1)) for layer, rows in own.rows.items()}
    bad = "rows see tokens that come after their query; give a decoder, whose tokens see only what stands before them"
    return _per_head("rows see no future", errors, _same(0.0, errors), "rows see nothing after their query", bad)


@torch.inference_mode()
def _equal_eager(model: HookedModel, ids: Tensor) -> Finding:
    """The tap over eager attention against what eager attention itself reports."""
    with _eager(model.model):
        reported = model.model(input_ids=ids, use_cache=False, output_attentions=True).attentions or ()
        tapped = _tapped(model, ids)
    # Layers without attention report nothing, or numbers of another shape.
    maps = [full for full in reported if full is not None and full.shape[-2:] == (ids.shape[1], ids.shape[1])]
    if len(maps) != len(tapped.rows):
        text = (
            f"eager attention reports {len(maps)} layers of attention, the tap {len(tapped.rows)}: rows cannot be "
            "compared; the architecture cannot be captured"
        )
        return Finding("rows equal eager", False, math.nan, LIMITS[model.dtype], None, None, text)
    errors = {
        layer: (tapped.rows[layer] - full[0].float().cpu()).abs().amax((-2, -1))
        for layer, full in zip(sorted(tapped.rows), maps, strict=True)
    }
    bad = "rows differ from the model's own eager attention; the architecture cannot be captured"
    limits = _rounding_limits(tapped, model.dtype)
    return _per_head("rows equal eager", errors, limits, "rows equal the model's own eager attention", bad)


def _make_output(model: HookedModel, own: _Pass, kernel: str) -> Finding:
    """What the kernel returned against the rows times its values, in every layer for itself."""
    errors = own.output_errors
    limits = _rounding_limits(own, model.dtype) if kernel == "eager" else _same(LIMITS[model.dtype], errors)
    bad = (
        f"the output of kernel {kernel!r} is not what the rows make of the values: the model's eager attention and "
        "its kernel disagree; try --dtype float32, or another release of transformers"
    )
    return _per_head("rows make the output", errors, limits, "rows x values are the kernel's output", bad)


@torch.inference_mode()
def _feeds(model: HookedModel, ids: Tensor, layers: list[int]) -> Finding:
    """Silence the attention of one layer at a time, each in its own entry of a batch, and look at the logits.

    The first and the last entry are left alone; what they differ by is the noise of running in a batch.
    """
    changes: dict[int, float] = {}
    noise = 0.0
    for start in range(0, len(layers), SILENCED_AT_ONCE):
        entry = {layer: index + 1 for index, layer in enumerate(layers[start : start + SILENCED_AT_ONCE])}

        def silence(call: _Call, output: Tensor, entry: dict[int, int] = entry) -> Tensor:
            if call.layer in entry:
                output = output.clone()
                output[entry[call.layer]] = 0
            return output

        batch = ids.expand(len(entry) + 2, -1)
        with tap_rows(model.model, None, lambda layer, weights: None), _around_tap(silence):
            logits = model.forward(batch, 1).logits[:, -1].float().cpu()
        differences = (logits - logits[0]).abs().amax(-1) / logits[0].abs().max().clamp(min=TINY)
        noise = max(noise, float(differences[-1]))
        changes |= {layer: float(differences[index]) for layer, index in entry.items()}
    layer = min(changes, key=lambda index: changes[index])
    limit = max(FEED_LIMIT, NOISE_FACTOR * noise)
    passed = changes[layer] >= limit
    text = (
        "the tapped output reaches the logits"
        if passed
        else (
            "silencing the tapped attention leaves the logits as they are: its output is not used, or the layer's "
            "output projection is zero; look at its weights, the heads of this layer do nothing"
        )
    )
    return Finding("output feeds the logits", passed, changes[layer], limit, layer, None, text, at_least=True)


@torch.inference_mode()
def _sharing(model: HookedModel, ids: Tensor, other: Tensor, own: _Pass, noise: float) -> tuple[bool, str]:
    """Whether a prompt may be run in pieces behind a cache, and the cache cropped for another continuation."""
    from transformers import DynamicCache

    if obstacle := state_layers(model.model.config.get_text_config()):
        return False, obstacle
    n_tokens = ids.shape[1]
    kept, cut = n_tokens // 3, 2 * n_tokens // 3
    limit = max(SHARING_LIMITS[model.dtype], min(NOISE_FACTOR * noise, 0.5))
    try:
        cache = DynamicCache()
        with tap_rows(model.model, None, lambda layer, weights: None):
            model.model(input_ids=ids[:, :cut], past_key_values=cache, use_cache=True)
        errors = [_distance(_tapped(model, ids[:, cut:], cache), own, cut, model.dtype)]
        cache.crop(kept - n_tokens)
        errors.append(_distance(_tapped(model, other[:, kept:], cache), _tapped(model, other), kept, model.dtype))
    except Exception as error:  # a cache of its own kind may raise anything, and no more than speed is lost
        return False, f"it cannot be run in pieces: {one_line(error)}"
    for distance, what in zip(errors, ("in two pieces", "behind a cropped cache"), strict=True):
        if not distance <= limit:
            return False, f"a prompt run {what} gives other numbers (by {distance:.2g}, limit {limit:.2g})"
    return True, f"a prompt in pieces gives the numbers of the whole (to {max(errors):.1g})"


def _distance(piece: _Pass, whole: _Pass, start: int, dtype: str) -> float:
    """Largest relative difference of the logits, or of any layer's rows, from token `start` on."""
    layers = [_difference(piece.rows[layer], rows[:, start:], dtype) for layer, rows in whole.rows.items()]
    return max(_difference(piece.logits[None], whole.logits[None, start:], dtype), *layers)


def _difference(ones: Tensor, others: Tensor, dtype: str) -> float:
    """Distance of `[*, token, number]` as a share of their size, per token: the worst, in half precision the median.

    Rounding in half precision sends some tokens to other experts or keys; what is wrong is wrong for most of them.
    """
    sizes = others.square().sum((0, 2)).sqrt()
    per_token = (ones - others).square().sum((0, 2)).sqrt() / sizes.clamp(min=TINY)
    return float(per_token.max() if dtype == "float32" else per_token.median())
