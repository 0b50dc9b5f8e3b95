"""A model in training, left as it was found: whatever runs inside this context, training goes on as if it had not.

Put back afterwards, also after an exception: the mode (train or eval) of every submodule, the states of the random
generators (Python, NumPy, torch on the CPU and on every GPU in use), the attention implementation, what rotary
embeddings remember of the longest sequence, hooks, autocast's cache of cast weights, the shards of FSDP. Gradients are
never touched, for nothing inside is recorded. It refuses to know what runs inside. Cost: a walk over the submodules.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lccp_interp.capture.rows import KERNELS

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
"""Where torch keeps a module's hooks."""

HOOKED_FLAG = "_output_capturing_hooks_installed"
"""transformers hooks a model when attention maps are first asked for (a self-check does), and notes that here."""

CLONED_NUMBERS = 1 << 20
"""Buffers of up to so many numbers are copied; larger ones (masks made once) are nobody's memory."""


@contextlib.contextmanager
def undisturbed(whole: nn.Module, model: PreTrainedModel) -> Iterator[None]:
    """Within this context `whole` is in eval mode; afterwards it and the random generators are as before.

    Args:
        whole: what is trained, with its wrappers.
        model: the transformers model in it, whose attention implementation becomes `sdpa` inside if it is one that
            rows cannot be captured over (`flex_attention`, say).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_generators())
        stack.enter_context(_modes(whole))
        stack.enter_context(_memories(whole))
        stack.enter_context(_hooks(whole))
        stack.enter_context(_attention(model))
        stack.enter_context(_autocast_cache())
        stack.enter_context(_shards(whole))
        yield


@contextlib.contextmanager
def _generators() -> Iterator[None]:
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy = np.random.get_state()  # noqa: NPY002  # the one that data pipelines draw from
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextlib.contextmanager
def _modes(whole: nn.Module) -> Iterator[None]:
    """Each submodule's own flag: parts of a model may be frozen in eval mode while the rest trains."""
    modes = [(module, module.training) for module in whole.modules()]
    whole.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _memories(whole: nn.Module) -> Iterator[None]:
    """What modules remember beside their parameters: dynamic rotary embeddings keep the longest sequence they saw."""
    kept: list[tuple[nn.Module, dict[str, Any], dict[str, tuple[Tensor, Tensor | None]]]] = []
    for module in whole.modules():
        names = module._non_persistent_buffers_set
        if not names:
            continue
        plain = {
            name: value
            for name, value in vars(module).items()
            if name != "training" and isinstance(value, int | float | Tensor)
        }
        buffers = {
            name: (buffer, buffer.detach().clone() if buffer.numel() <= CLONED_NUMBERS else None)
            for name in names
            if (buffer := module._buffers.get(name)) is not None
        }
        kept.append((module, plain, buffers))
    try:
        yield
    finally:
        for module, plain, buffers in kept:
            vars(module).update(plain)
            for name, (buffer, copy) in buffers.items():
                if copy is not None and not torch.equal(buffer, copy):
                    with torch.no_grad():
                        buffer.copy_(copy)
                module._buffers[name] = buffer


@contextlib.contextmanager
def _hooks(whole: nn.Module) -> Iterator[None]:
    """Hooks that were hung up inside are taken down."""
    before = [
        (module, [set(getattr(module, name)) for name in HOOKS], HOOKED_FLAG in vars(module))
        for module in whole.modules()
    ]
    try:
        yield
    finally:
        for module, known, was_hooked in before:
            for name, ids in zip(HOOKS, known, strict=True):
                held = getattr(module, name)
                for new in set(held) - ids:
                    del held[new]
            if not was_hooked:
                vars(module).pop(HOOKED_FLAG, None)


@contextlib.contextmanager
def _attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    if before in KERNELS:
        # The tap puts these back itself.
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _autocast_cache() -> Iterator[None]:
    """No cast weights are kept inside: made without gradients, they would cut those of the pass around."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(before)


@contextlib.contextmanager
def _shards(whole: nn.Module) -> Iterator[None]:
    """Parameters that a pass has gathered are let go again.

    FSDP keeps those of the outermost module for the backward pass; here none follows, so that the optimizer's step
    would be lost on the copies, and gradients, which belong to the shards, would be out of sight.
    """
    try:
        yield
    finally:
        if torch.distributed.is_available():
            from torch.distributed.fsdp import FSDPModule

            for module in whole.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
