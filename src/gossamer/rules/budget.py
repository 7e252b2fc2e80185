"""How does one budget split over layers that compete? By the scores of all their units, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gossamer.rules.order import order_keys

_CHUNK = 1 << 18
_BITS = 11
"""That a histogram is over."""


def pooled_counts(masked: int, settled: Sequence[int], scores: Sequence[Tensor]) -> tuple[list[int], float]:
    """Splits a budget over layers that compete: the lowest scores of all go, ties in the order of the layers.

    Args:
        masked: units to mask in all layers together.
        settled: for each layer, units that surely go.
        scores: for each layer, scores of the units that may go, in order of position. With `settled`, they cover the
            `masked` lowest of all layers.

    Returns:
        For each layer, how many units go; and the highest score that goes (nan where only settled ones do).

    Example:
        >>> pooled_counts(3, [0, 1], [torch.tensor([0.5, 0.75]), torch.tensor([0.25, 0.5])])
        ([1, 2], 0.5)
    """
    budget = masked - sum(settled)
    if budget <= 0:
        return list(settled), math.nan
    arrays = [s.numpy() for s in scores]
    threshold = np.partition(np.concatenate(arrays), budget - 1)[budget - 1]
    below = [int(np.count_nonzero(s < threshold)) for s in arrays]
    ties = budget - sum(below)
    counts: list[int] = []
    for n, low, s in zip(settled, below, arrays, strict=True):
        here = min(ties, int(np.count_nonzero(s == threshold)))
        ties -= here
        counts.append(n + low + here)
    return counts, float(threshold)


class Slices(Protocol):
    """Scores of a layer's units, flat: a 1-D tensor, or something that computes slices when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Tensor: ...


def global_counts(
    masked: int, scores: Sequence[Slices], bounds: tuple[Sequence[int], Sequence[int]] | None = None
) -> Tensor:
    """The same split found by counting alone: no sort, no copy to the host, memory that does not grow with the model.

    Floats order like the integers that their bits spell. A histogram of every layer's leading 11 bits says in which bin
    the threshold lies, one of the next 11 bits where in that bin, and after three (six where a score is float64) the
    threshold is known exactly.

    Args:
        masked: units to mask in all layers together.
        scores: for each layer, a score for every unit, flat; float32 or float64, no nan. Each is gone through a few
            times, one layer after the other.
        bounds: the least and the most units that each layer masks; their sums lie below and above `masked`.

    Returns:
        int64, one count a layer, on the scores' device.

    Example:
        >>> global_counts(2, [torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.3])]).tolist()
        [1, 1]
        >>> global_counts(2, [torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])], ([0, 0], [1, 2])).tolist()
        [1, 1]
    """
    samples = [s[0:1] for s in scores]
    device, wide = samples[0].device, any(s.dtype == torch.float64 for s in samples)
    chunk = _CHUNK if device.type == "cpu" else max(len(s) for s in scores)
    limits = [torch.tensor(b, dtype=torch.int64, device=device) for b in bounds or ()]
    below = torch.zeros(len(scores), dtype=torch.int64, device=device)  # units whose leading bits are lower
    prefix = torch.zeros((), dtype=torch.int64, device=device)  # those bits of the threshold
    ties, left = below, 64 if wide else 32
    while left:
        width = min(_BITS, left)
        counts = torch.stack(
            [
                sum(
                    (
                        _histogram(order_keys(layer[start : start + chunk], wide), prefix, left, width)
                        for start in range(0, len(layer), chunk)
                    ),
                    torch.zeros(1 << width, dtype=torch.int64, device=device),
                )
                for layer in scores
            ]
        )
        up_to = below[:, None] + counts.cumsum(1)
        here = up_to if bounds is None else up_to.clamp(*(limit[:, None] for limit in limits))
        digit = (here.sum(0) < masked).sum().clamp(max=(1 << width) - 1)
        ties = counts.index_select(1, digit.view(1)).squeeze(1)
        below = up_to.index_select(1, digit.view(1)).squeeze(1) - ties
        prefix, left = prefix << width | digit, left - width
    all_ties = below + ties
    if bounds is not None:
        below, all_ties = below.clamp(*limits), all_ties.clamp(*limits)
    ties = all_ties - below
    before = ties.cumsum(0) - ties
    return below + torch.minimum((masked - below.sum() - before).clamp(min=0), ties)


def _histogram(keys: Tensor, prefix: Tensor, left: int, width: int) -> Tensor:
    """How many keys have each value in the leading `width` of the `left` bits behind a prefix; [2^width], int64."""
    bins, bits = 1 << width, 8 * keys.element_size()
    digits = (keys >> (left - width)) & (bins - 1)
    if left < bits:
        digits = digits.where((keys >> left) & ((1 << (bits - left)) - 1) == prefix, bins)
    if keys.device.type == "cpu":
        return torch.bincount(digits, minlength=bins + 1)[:bins]
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=keys.device)  # where bincount would wait for the device
    return counts.scatter_add_(0, digits.to(torch.int64), torch.ones_like(digits, dtype=torch.int64))[:bins]
