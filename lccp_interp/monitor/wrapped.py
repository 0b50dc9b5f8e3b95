"""The transformers model inside what is trained: under data parallelism, sharding, compilation and adapters.

- Under DDP (and `torch.compile`, and plain) the inner model is run itself, so that no collective of the training is
  disturbed; every rank scores its share of the cases and the results are gathered.
- Under FSDP (1 and 2) and whatever else splits parameters over ranks, passes go through the outermost wrapper, which
  gathers them; every rank runs the same cases, and the first one keeps the results.
- Adapters of PEFT that live in the modules (LoRA and the like) stay active: what is scored is what is trained.

Passes run without gradients but not in torch's inference mode, whose tensors a wrapper might keep and training could
not use. This module refuses to know what is scored. Cost: nothing beside the passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.views import keep_logits
from lccp_interp.schema import LccpError

MAX_WRAPPERS = 8


@dataclass(frozen=True)
class TrainedModel(HookedModel):
    """A `HookedModel` over a model in training.

    `run` is what a forward pass goes through, None for the model itself.
    """

    run: Callable[..., Any] | None = None
    is_sharded: bool = False

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        for parameter in self.model.parameters():
            return parameter.device
        return torch.device("cpu")

    def forward(self, input_ids: Tensor, n_logits: int, *, cache: Any = None, use_cache: bool = False) -> Any:
        """As `HookedModel.forward`, through the wrappers that need it, recording nothing."""
        options: dict[str, Any] = {"use_cache": use_cache}
        if cache is not None:
            options["past_key_values"] = cache
        options |= keep_logits(self.model, input_ids.shape[1], n_logits)
        with torch.inference_mode(False), torch.no_grad():
            # A copy made here is an ordinary tensor, whatever mode the caller is in.
            output = (self.run or self.model)(input_ids=input_ids.clone().to(self.device), **options)
        output.logits = output.logits[:, -n_logits:]
        return output


def trained_model(whole: nn.Module, tokenizer: Any, name: str) -> TrainedModel:
    """What is trained, ready for capture.

    Args:
        whole: a transformers model, or one in the wrappers of DDP, FSDP, `torch.compile` or PEFT.
        tokenizer: of the model.
        name: for messages.

    Raises:
        LccpError: no transformers model in it, or an adapter that is not in the modules (prompt tuning).
    """
    inner = unwrap(whole)
    sharded = is_sharded(whole)
    return TrainedModel(inner, tokenizer, name, run=whole if sharded else None, is_sharded=sharded)


def unwrap(whole: nn.Module) -> PreTrainedModel:
    """The transformers model in its wrappers.

    Raises:
        LccpError: there is none, or an adapter writes into the prompt.
    """
    module: Any = whole
    for _ in range(MAX_WRAPPERS):
        if isinstance(module, PreTrainedModel):
            return module
        if hasattr(module, "get_base_model"):
            for config in getattr(module, "peft_config", {}).values():
                if getattr(config, "is_prompt_learning", False):
                    raise LccpError(
                        f"{type(config).__name__} puts tokens of its own in front of the prompt, so that positions are "
                        "not those of the case; adapters in the modules (LoRA) can be watched"
                    )
            module = module.get_base_model()
            continue
        inner = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    raise LccpError(
        f"{type(whole).__name__} holds no transformers model that could be watched; give the model that is trained, "
        "with or without its wrappers"
    )


def is_sharded(whole: nn.Module) -> bool:
    """Whether a pass of the model takes all ranks, because its parameters lie on several."""
    from torch.distributed.tensor import DTensor

    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in whole.parameters()):
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in whole.modules())


@contextlib.contextmanager
def full_precision(model: PreTrainedModel) -> Iterator[None]:
    """Within this context passes compute in the dtype of the weights, without autocast, also accelerate's.

    accelerate puts autocast around the model's own `forward` and keeps that as `_original_forward`.
    """
    own = vars(model)
    patched, original = own.get("forward"), own.get("_original_forward")
    if patched is not None and original is not None:
        own["forward"] = original
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        if patched is not None and original is not None:
            own["forward"] = patched


@dataclass(frozen=True)
class Ranks:
    """The processes of a training and which one this is; 1 of 1 where nothing is distributed."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """Those of torch's default process group."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of `items`; the parts of all ranks are all of them, once."""
        return items[self.rank :: self.size]

    def from_first(self, item: Any) -> Any:
        """What the first rank has, on every rank. All ranks have to call it."""
        if self.size == 1:
            return item
        held = [item]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    def gather(self, item: Any) -> list[Any]:
        """What every rank has, on every rank, in order. All ranks have to call it."""
        if self.size == 1:
            return [item]
        held: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(held, item)
        return held
