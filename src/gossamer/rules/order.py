"""In what order do scores come? Floats as integers that compare alike, and a stable order by them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_PLACES = 32
"""Bits for a position."""


def order_keys(scores: Tensor, wide: bool) -> Tensor:
    """Integers whose bits, read without a sign, are in the order of the scores; equal where these are.

    Args:
        scores: floating, no nan.
        wide: whether as int64, of float64, rather than as int32, of float32.

    Returns:
        Flat, on the scores' device.

    Example:
        >>> a, b, c = order_keys(torch.tensor([-1.0, -0.0, 0.0]), wide=False).view(torch.uint32).tolist()
        >>> a < b == c
        True
    """
    # Positive floats order like their bits; negative ones the other way round. Adding 0 makes -0.0 equal 0.0.
    floats, ints = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    bits = (scores.reshape(-1).to(floats) + 0.0).view(ints)
    return torch.where(bits >= 0, bits ^ torch.iinfo(ints).min, ~bits)


def stable_order(scores: Tensor) -> Tensor:
    """Positions in the order of the scores, ties by position.

    Args:
        scores: flat, floating, no nan.

    Returns:
        int64, on the scores' device.

    Example:
        >>> stable_order(torch.tensor([2.0, 1.0, -1.0, 1.0])).tolist()
        [2, 1, 3, 0]
    """
    if scores.device.type != "cpu" or scores.dtype == torch.float64 or len(scores) >= 1 << _PLACES:
        return torch.argsort(scores, stable=True)
    # Score and position in one integer: NumPy sorts such ten times as fast as torch sorts floats stably.
    keys = order_keys(scores, wide=False).numpy().view(np.uint32).astype(np.uint64) << _PLACES
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    keys &= (1 << _PLACES) - 1
    return torch.from_numpy(keys.view(np.int64))
