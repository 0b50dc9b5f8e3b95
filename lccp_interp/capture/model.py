"""A checkpoint in memory, with hooks: load it, run it, read the attention rows of its copy events.

`HookedModel` wraps the transformers model and tokenizer of one checkpoint. It knows how to run a prompt with its answer
in one teacher-forced pass and to read rows; it refuses to know what a needle is or how a score is made of rows. Loading
costs the weights; a pass costs a prefill with logits at the answer only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lccp_interp.capture.rows import AttentionCall, RowSink, edit_attention, tap_rows
from lccp_interp.capture.views import OWN, keep_logits, row_reader
from lccp_interp.checkpoints import read_config, verify_folder, weight_files
from lccp_interp.checkpoints.folders import is_pickled
from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class HookedModel:
    """A causal language model with its tokenizer and a tap on its attention, and two other libraries' views of it.

    Example:
        >>> model = load_model("data/trajectory/lccp-1.2M")                             # doctest: +SKIP
        >>> ids = model.tokenizer("Question: who?", return_tensors="pt").input_ids      # doctest: +SKIP
        >>> rows = model.attention_rows(ids, [-1])     # {layer: [batch, head, 1, key]} # doctest: +SKIP
        >>> logits, cache = model.bridge.run_with_cache("Question: who?")               # doctest: +SKIP
        >>> with model.nnsight.trace("Question: who?"):                                 # doctest: +SKIP
        ...     pattern = model.nnsight.model.layers[2].self_attn.output[1].save()
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    cache_fault: str = ""
    """What a self-check found wrong with running a prompt in pieces; then every prompt is run whole."""
    runs_remote_code: bool = False
    """Whether the checkpoint's own Python code makes the model or the tokenizer; off unless asked for."""
    from_pickle: bool = False
    """Whether the weights were pickled; refused unless asked for."""

    @property
    def device(self) -> torch.device:
        """Where inputs go (the embedding's device under a device map)."""
        embedding = self.model.get_input_embeddings()
        # Offloaded weights lie on no device between passes; accelerate's hook knows where they will be.
        hook = getattr(embedding, "_hf_hook", None)
        placed = getattr(hook, "execution_device", None)
        return embedding.weight.device if placed is None else torch.device(placed)

    @property
    def sharing_obstacle(self) -> str:
        """Why this model's prompts cannot be run in pieces behind a cache; empty if they can."""
        return self.cache_fault or state_layers(self.model.config.get_text_config())

    @property
    def shares_prefixes(self) -> bool:
        """Whether a prompt may be run in chunks, and from where it leaves the one before."""
        return not self.sharing_obstacle

    @property
    def n_layers(self) -> int:
        """Number of decoder layers, with or without attention."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def n_heads(self) -> int:
        """Number of query heads per layer."""
        return int(self.model.config.get_text_config().num_attention_heads)

    @property
    def dtype(self) -> str:
        """Name of the weights' dtype, e.g. `float32`."""
        return str(self.model.dtype).removeprefix("torch.")

    @cached_property
    def bridge(self) -> TransformerBridge:
        """TransformerLens' view of these very weights, opened on first use: hooks, caches, patching.

        Its modules are its own, its parameters are the model's: what it hooks or replaces leaves the model as it was,
        gradients and edits of weights meet in both. (But one projection for query, key and value, as GPT-NeoX has it,
        is split by TransformerLens into copies.) Our own edits of attention do not reach it. Do not move it to another
        device; load the model there. Text goes in its way (a beginning of text in front, `prepend_bos=False` for
        none), token ids as they are.

        Raises:
            LccpError: TransformerLens does not support the model type, or reports other attention than the model's.

        Example:
            >>> logits, cache = load_model(path).bridge.run_with_cache("Question: who?")    # doctest: +SKIP
        """
        from lccp_interp.capture.lens import open_bridge

        return open_bridge(self)

    @cached_property
    def nnsight(self) -> TransformersModel:
        """nnsight's view of these very weights, opened on first use; eager attention, so that it sees the weights.

        Modules, parameters and devices as with `bridge`.

        Raises:
            LccpError: nnsight does not support the model type, or reports other attention than the model's.

        Example:
            >>> with load_model(path).nnsight.trace("Question: who?") as tracer:            # doctest: +SKIP
            ...     logits = tracer.result.logits.save()
        """
        from lccp_interp.capture.nnsight_view import open_nnsight

        return open_nnsight(self)

    @torch.inference_mode()
    def answer_logits(
        self,
        input_ids: Tensor,
        n_answer: int,
        sink: RowSink,
        *,
        backend: str = OWN,
        values: RowSink | None = None,
    ) -> Tensor:
        """One teacher-forced pass; logits and attention rows where the last tokens are predicted.

        Args:
            input_ids: Int `[batch, token]`, prompt and answer, all of one length (no padding).
            n_answer: how many of the last tokens are the answer, 1 <= n_answer < tokens.
            sink: receives (layer, float32 `[batch, head, n_answer, key]`) once per attention layer; row t is the
                query position that predicts answer token t, keys are all tokens but the last.
            backend: whose rows, `transformers` (the tap's), `transformer_lens` or `nnsight` (full maps: T x T floats
                per head of a layer).
            values: receives (layer, `[batch, kv_head, key, d_value]`), what the attention is a weighted mean of, right
                after the sink; None for not reading them.

        Returns:
            Float32 logits `[batch, n_answer, vocabulary]` on the output's device.

        Raises:
            LccpError: an unknown backend, or a model that its library does not support.
        """
        # The last token predicts nothing that is asked for, so it is not fed.
        fed = input_ids[:, :-1]
        rows = torch.arange(fed.shape[1] - n_answer, fed.shape[1])
        if backend != OWN:
            return row_reader(self, backend)(fed, rows, n_answer, sink, values=values)

        def told(call: AttentionCall) -> Tensor:
            if values is not None:
                values(call.layer, call.value)
            return call.output

        reading = contextlib.nullcontext() if values is None else edit_attention(self.model, told)
        with reading, tap_rows(self.model, rows, sink):
            output = self.forward(fed, n_answer)
        return output.logits.float()

    def forward(self, input_ids: Tensor, n_logits: int, *, cache: Any = None, use_cache: bool = False) -> Any:
        """One pass of the model itself, with logits at the last `n_logits` positions only.

        Args:
            input_ids: Int `[batch, token]`, on any device.
            n_logits: positions whose logits are wanted, at least 1.
            cache: keys and values of the tokens before, as transformers keeps them; None for none.
            use_cache: whether to hand back keys and values for the next pass.

        Returns:
            The model's output; `.logits` `[batch, n_logits, vocabulary]`, `.past_key_values`.
        """
        options: dict[str, Any] = {"use_cache": use_cache}
        if cache is not None:
            options["past_key_values"] = cache
        options |= keep_logits(self.model, input_ids.shape[1], n_logits)
        output = self.model(input_ids=input_ids.to(self.device), **options)
        output.logits = output.logits[:, -n_logits:]
        return output

    @torch.inference_mode()
    def attention_rows(self, input_ids: Tensor, positions: Sequence[int], *, backend: str = OWN) -> dict[int, Tensor]:
        """Attention weights of some query positions, from every attention layer.

        Args:
            input_ids: Int `[batch, token]`.
            positions: query positions; negative ones count from the end.
            backend: as in `answer_logits`.

        Returns:
            Float32 CPU tensors `[batch, head, position, key]` by true layer index; rows sum to 1 (less the sink's
            share in models with attention sinks).

        Raises:
            IndexError: a position outside the prompt.
            LccpError: an unknown backend, or a model that its library does not support.
        """
        n_tokens = input_ids.shape[1]
        for position in positions:
            if not -n_tokens <= position < n_tokens:
                raise IndexError(f"query position {position} is outside a prompt of {n_tokens} tokens")
        captured: dict[int, Tensor] = {}

        def keep(layer: int, weights: Tensor) -> None:
            captured[layer] = weights.cpu()

        rows = torch.tensor([position % n_tokens for position in positions])
        if backend != OWN:
            row_reader(self, backend)(input_ids, rows, 1, keep)
        else:
            with tap_rows(self.model, rows, keep):
                self.forward(input_ids, 1)
        return dict(sorted(captured.items()))


KEY_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers (transformers' `layer_types`) whose past is keys and values, which can be cropped to any prefix."""


def state_layers(config: Any) -> str:
    """What in a text config keeps prompts from being run in pieces: layers whose past is a state.

    Example:
        >>> from types import SimpleNamespace
        >>> state_layers(SimpleNamespace(layer_types=["linear_attention", "full_attention"]))
        'its linear_attention layers carry a state that cannot be cropped'
        >>> state_layers(SimpleNamespace(layer_types=["sliding_attention"]))
        ''
    """
    if getattr(config, "keep_window_size", None):
        return "its layers keep the keys that score highest, ties settled by how many there are"
    kinds = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - set(KEY_LAYERS))
    return f"its {', '.join(kinds)} layers carry a state that cannot be cropped" if kinds else ""


def load_model(
    checkpoint: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> HookedModel:
    """Load a checkpoint for capture.

    Args:
        checkpoint: a local folder in Hugging Face form, or a hub id (`organisation/name`).
        device: `auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:1`, `mps`. Not used with a device map.
        dtype: `auto` (float32 on a CPU, else the checkpoint's own), `float32`, `bfloat16`, `float16`.
        device_map: as in transformers (`"auto"` spreads the layers over all devices; needs accelerate).
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: run Python code that the checkpoint brings, where transformers has none of its own for it.
        allow_pickle: take pickled weights (`pytorch_model.bin`) where there are no safetensors. They are read with
            torch's restricted unpickler (`weights_only`).

    Raises:
        LccpError: no such folder, no weights or tokenizer in it, a truncated weight file, an architecture that this
            transformers does not know or whose attention cannot be captured, code or pickles that were not asked for.

    Example:
        >>> load_model("no/such/place/at-all")
        Traceback (most recent call last):
        lccp_interp.schema.LccpError: no checkpoint folder at no/such/place/at-all; ...
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    # The config first: of a model that is no decoder nothing else needs to be right, or read.
    read_architecture(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    pickled = False
    if not _is_hub_id(checkpoint):
        verify_folder(Path(checkpoint), allow_pickle=allow_pickle)
        pickled = is_pickled(weight_files(Path(checkpoint), allow_pickle=allow_pickle))
    placement: Any = device_map
    if device_map is None:
        device, dtype = resolve(device, dtype, checkpoint)
        # Straight to the GPU: the weights of a large model may not fit into the host's memory on the way.
        placement = {"": device} if torch.device(device).type == "cuda" else None
    tokenizer = load_tokenizer(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    before = transformers_logging.get_verbosity()
    # Its tables of missing weights and its bar per checkpoint would tear our one line apart; we report both ourselves.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=DTYPES.get(dtype, "auto"),
            device_map=placement,
            revision=revision,
            # None takes safetensors where there are any.
            use_safetensors=None if allow_pickle else True,
            weights_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises nearly every type on a broken config or file
        raise LccpError(f"checkpoint {checkpoint} cannot be loaded: {one_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(before)
    _refuse_other_weights(checkpoint, type(model).__name__, loading)
    if placement is None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise LccpError(f"device {device!r} cannot be used: {one_line(error)}; try --device cpu") from error
    if kernel := flash_kernel(model.device, model.dtype):
        # Some architectures do without; then transformers' choice stays.
        with contextlib.suppress(ValueError, ImportError):
            model.set_attn_implementation(kernel)
    return HookedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        name=folder_name(checkpoint),
        runs_remote_code=_is_remote(model) or _is_remote(tokenizer),
        from_pickle=pickled,
    )


def _is_remote(thing: object) -> bool:
    """Whether its class comes from a checkpoint; transformers puts such code into a package of this name."""
    return type(thing).__module__.partition(".")[0] == "transformers_modules"


def flash_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """The newest flash attention that is installed and can run there; empty if there is none, which nothing needs.

    Example:
        >>> flash_kernel(torch.device("cpu"), torch.bfloat16)
        ''
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return ""
    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else ""


WITHOUT_ATTENTION = ("linear_attention", "conv", "moe", "dense", "sparse")
"""Kinds of layers (transformers' `layer_types`) that have no attention weights."""


def read_architecture(
    checkpoint: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a checkpoint, if it is of a decoder whose attention may be captured; no weights are read.

    Args:
        checkpoint: a local folder with a config.json, or a hub id.
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: run the code that a checkpoint of unknown type brings. Whether its attention can be captured
            shows only in the self-check then.

    Raises:
        LccpError: no config, a model type that transformers does not know, an encoder-decoder, a model that is no
            language model, one that attends in both directions, or one without attention or outside the attention
            interface.

    Example:
        >>> from lccp_interp.checkpoints import bundled_trajectory
        >>> read_architecture(bundled_trajectory()[-1].path).model_type
        'llama'
    """
    from transformers import AutoConfig

    if not _is_hub_id(checkpoint):
        if not Path(checkpoint).is_dir():
            verify_folder(Path(checkpoint))
        read_config(Path(checkpoint))
    try:
        config = AutoConfig.from_pretrained(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly every type on a broken config
        if "trust_remote_code" in str(error):
            raise LccpError(
                f"checkpoint {checkpoint} brings modelling code of its own (auto_map in its config.json), which is not "
                "run unless asked for; read that code, and if you trust it with all that you may do on this machine, "
                "give --trust-remote-code, or convert the checkpoint to a model type that transformers knows"
            ) from error
        nor_here = f"; nor is there a folder {checkpoint}" if _is_hub_id(checkpoint) else ""
        raise LccpError(f"checkpoint {checkpoint} cannot be loaded: {one_line(error)}{nor_here}") from error
    if _is_remote(config):
        return config
    if obstacle := _architecture_obstacle(config):
        raise LccpError(f"checkpoint {checkpoint} {obstacle}")
    return config


def _architecture_obstacle(config: PreTrainedConfig) -> str:
    """Why attention cannot be captured, as far as a config tells; empty if it may be."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind, decoders = config.model_type, "give a decoder such as Llama, Qwen or HunYuan"
    if config.is_encoder_decoder:
        return f"is an encoder-decoder ({kind}), whose answers do not stand behind their prompt; {decoders}"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"is no text decoder: transformers has no causal language model of type {kind!r}; {decoders}"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", True) is False:
        return f"is an encoder (model_type {kind!r}), which attends in both directions; {decoders}"
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if layers and layers <= set(WITHOUT_ATTENTION):
        return (
            f"is a state-space or recurrent model ({kind}) and has no attention layers, only "
            f"{', '.join(sorted(layers))}: there are no heads to score; give a model with attention"
        )
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not architecture._can_set_attn_implementation():
        return (
            f"({architecture.__name__}) does not route attention through transformers' AttentionInterface: its rows "
            f"cannot be captured; {decoders}"
        )
    return ""


def resolve(device: str, dtype: str, checkpoint: str | Path) -> tuple[str, str]:
    """What `auto` means here: the first GPU, else the CPU; float32 on a CPU, else the checkpoint's own dtype.

    Raises:
        LccpError: an unknown dtype, or a device that this machine does not have.

    Example:
        >>> resolve("cpu", "auto", "anywhere")
        ('cpu', 'float32')
    """
    if dtype not in ("auto", *DTYPES):
        raise LccpError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise LccpError(f"device {device!r} cannot be used: {one_line(error)}; try --device cpu") from error
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise LccpError(
            f"device {device!r} cannot be used: torch sees {torch.cuda.device_count()} CUDA devices; try --device cpu"
        )
    if kind == "meta":
        raise LccpError("device 'meta' holds no numbers and cannot be used; try --device cpu")
    if dtype == "auto" and kind == "cpu":
        dtype = "float32"
    elif dtype == "auto" and not _is_hub_id(checkpoint):
        config = read_config(Path(checkpoint))
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return device, dtype


def folder_name(checkpoint: str | Path) -> str:
    """The name a checkpoint goes by: that of its folder, also where it is given as `.`.

    Example:
        >>> folder_name("runs/step-100/"), folder_name("organisation/name")
        ('step-100', 'name')
    """
    return os.path.basename(os.path.abspath(checkpoint))


def _is_hub_id(checkpoint: str | Path) -> bool:
    text = str(checkpoint)
    return not Path(checkpoint).exists() and text.count("/") == 1 and text[0] not in "./~"


def _refuse_other_weights(checkpoint: str | Path, architecture: str, loading: dict[str, Any]) -> None:
    """transformers fills missing weights with random numbers and drops surplus ones; neither is this checkpoint."""
    for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has surplus"), ("mismatched_keys", "misshapes")):
        names = sorted(str(name) for name in loading.get(kind, ()) if not str(name).endswith("rotary_emb.inv_freq"))
        if names:
            raise LccpError(
                f"checkpoint {checkpoint} {verb} {len(names)} weights of {architecture}: {', '.join(names[:3])}; "
                "config.json and weights do not belong together, copy the checkpoint again"
            )


def load_tokenizer(
    checkpoint: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        LccpError: it is missing or cannot be read, or is code of the checkpoint's own that was not asked for.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        if "trust_remote_code" in str(error):
            raise LccpError(
                f"the tokenizer of {checkpoint} is code of its own (auto_map in its tokenizer_config.json), which is "
                "not run unless asked for; read that code, and if you trust it with all that you may do on this "
                "machine, give --trust-remote-code"
            ) from error
        raise LccpError(f"the tokenizer of {checkpoint} cannot be loaded: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
