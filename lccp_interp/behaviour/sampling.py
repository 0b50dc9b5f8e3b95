"""Tokens drawn from a model's logits, the same ones whatever else is being written at the time.

Every sample of an item has random numbers of its own, a pure function of (seed, item, sample): one per token. A token
is drawn by inverting the cumulative distribution over token ids, in float64. Which items are asked, in which order and
in which batches therefore changes nothing. What may change is the last bit of a logit, with the shape of a batch: a
draw that falls within that bit of the border between two tokens can then go either way. In float32 that is rare; in
half precision it is not, and neither is a greedy choice between two tokens that tie.

It refuses to know models. Cost: one softmax per row, a sort where `top_p` is below 1, a binary search per sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lccp_interp.tasks.items import derived_seed


def uniforms(seed: int, item_id: str, sample: int, n: int) -> np.ndarray:
    """The random numbers of one sample of one item, float64 `[n]` in [0, 1); a longer series begins as a shorter one.

    Example:
        >>> bool((uniforms(0, "a", 1, 5)[:2] == uniforms(0, "a", 1, 2)).all())
        True
    """
    return np.random.default_rng(derived_seed("answer", seed, item_id, sample)).random(n)


def cumulative(logits: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """The cumulative distribution over token ids.

    Args:
        logits: float `[row, vocabulary]`; minus infinity is never drawn.
        temperature: above 0; what the logits are divided by.
        top_p: 0 < top_p <= 1; of each row the likeliest tokens are kept that reach this probability together, the lower
            id first among equals (nucleus sampling, arXiv 1904.09751).

    Returns:
        Float64 `[row, vocabulary]`, rising within a row; its last entry is the whole, about 1 (`top_p` or more of it
        where that is below 1). On the logits' device, if that has float64.

    Example:
        >>> logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
        >>> [round(share, 6) for share in cumulative(logits, temperature=1.0)[0].tolist()]
        [0.5, 0.7, 1.0]
        >>> [round(share, 6) for share in cumulative(logits, temperature=1.0, top_p=0.6)[0].tolist()]
        [0.5, 0.5, 0.8]
    """
    if logits.device.type == "mps":
        logits = logits.cpu()
    shares = (logits.double() / temperature).softmax(dim=1)
    if top_p < 1:
        ranked, order = shares.sort(dim=1, descending=True, stable=True)
        before = ranked.cumsum(dim=1) - ranked
        shares = torch.zeros_like(shares).scatter(1, order, ranked.where(before < top_p, 0.0))
    return shares.cumsum(dim=1)


def draw(shares: Tensor, uniforms: Sequence[float]) -> list[int]:
    """The tokens whose stretches of cumulative distributions hold the given numbers.

    Args:
        shares: float64 `[draw, vocabulary]`, of `cumulative`.
        uniforms: one number per row, 0 <= number < 1.

    Example:
        >>> draw(torch.tensor([[0.5, 0.5, 1.0]]).expand(4, 3), [0.0, 0.49, 0.5, 0.99])
        [0, 0, 2, 2]
    """
    shares, whole = shares.contiguous(), shares[:, -1:].contiguous()
    places = torch.tensor(uniforms, dtype=shares.dtype, device=shares.device)[:, None] * whole
    # A product that rounds up to the whole belongs to the last token with a share.
    last = torch.searchsorted(shares, whole)
    return torch.searchsorted(shares, places, right=True).minimum(last)[:, 0].tolist()
