"""Which heads: written by people, held by a model, refused where a model does not have them.

It knows configs and numbers of heads; it refuses to know weights, and imports no torch by itself. It costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Head = tuple[int, int]
"""(true layer index, query head)."""


def parse_heads(text: str) -> list[Head]:
    """Heads written as `layer-head`, separated by commas or blanks.

    Raises:
        LccpError: something else, or a head written twice.

    Example:
        >>> parse_heads("2-2, 3-3")
        [(2, 2), (3, 3)]
    """
    heads = []
    for item in text.replace(",", " ").split():
        match = re.fullmatch(r"(\d+)-(\d+)", item)
        if match is None:
            raise LccpError(f"{item!r} is no head; write layer-head, several separated by commas, like 2-2,3-3")
        heads.append((int(match[1]), int(match[2])))
    if not heads:
        raise LccpError("no heads are named; write layer-head, several separated by commas, like 2-2,3-3")
    if twice := sorted({head for head in heads if heads.count(head) > 1}):
        raise LccpError(f"heads are named twice: {head_text(twice)}; name each once")
    return heads


def head_text(heads: Sequence[Head], separator: str = ", ") -> str:
    """The heads as people write them.

    Example:
        >>> head_text([(2, 2), (3, 3)], " ")
        '2-2 3-3'
    """
    return separator.join(f"{layer}-{head}" for layer, head in heads)


def known_heads(config: PreTrainedConfig) -> list[Head]:
    """Every head that a model of this config has, in layers with attention only.

    Example:
        >>> from lccp_interp.capture.architectures import named, tiny_config
        >>> known_heads(tiny_config(named("llama")))[:5]
        [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    """
    from lccp_interp.capture.model import WITHOUT_ATTENTION

    inner: Any = config.get_text_config()
    kinds = getattr(inner, "layer_types", None) or ["full_attention"] * int(inner.num_hidden_layers)
    layers = [layer for layer, kind in enumerate(kinds) if kind not in WITHOUT_ATTENTION]
    return [(layer, head) for layer in layers for head in range(int(inner.num_attention_heads))]


def check_heads(heads: Sequence[Head], known: Sequence[Head], where: str) -> None:
    """Refuse heads that a model does not have.

    Raises:
        LccpError: the heads that are not there, and what there is.

    Example:
        >>> check_heads([(9, 0)], [(0, 0), (0, 1), (2, 0), (2, 1)], "step-1")
        Traceback (most recent call last):
        lccp_interp.schema.LccpError: step-1 has no heads 9-0: it has heads 0-1 in layers 0, 2; ...
    """
    if not heads:
        raise LccpError(f"no heads to change in {where}; name at least one as (layer, head)")
    strangers = [head for head in heads if head not in set(known)]
    if not strangers:
        return
    layers = sorted({layer for layer, _ in known})
    gapless = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    shown = f"{layers[0]}-{layers[-1]}" if gapless else ", ".join(map(str, layers))
    few, more = head_text(strangers[:8]), f" and {len(strangers) - 8} more" if len(strangers) > 8 else ""
    raise LccpError(
        f"{where} has no heads {few}{more}: it has heads 0-{max(head for _, head in known)} in layers {shown}; name "
        "others as layer-head, both counted from 0, or make a list from this model's own scores"
    )
