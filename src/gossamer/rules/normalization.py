"""How do scores of different layers compare? One layer's scores → scores that compete with those of other layers.

Each is an increasing function of the scores of a layer, so that inside a layer nothing changes; only where layers
compete does it decide which of them gives more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.errors import ArgumentError
from gossamer.registry import Registry
from gossamer.rules.order import stable_order

Normalization = Callable[[Tensor], Tensor]
"""Scores of a layer's units, of any shape → scores of the same shape."""

NORMALIZATIONS: Registry[Normalization] = Registry("normalization")


def _normalization(name: str) -> Callable[[Normalization], Normalization]:
    return lambda func: NORMALIZATIONS.register(name, func)


@_normalization("none")
def normalize_none(scores: Tensor) -> Tensor:
    """s: as they are; layers of small weights give most."""
    return scores


@_normalization("sum")
def normalize_sum(scores: Tensor) -> Tensor:
    """s / Σ|s|: a unit's share of what its layer has (SNIP's own, Lee et al. 2019, with all layers taken as one)."""
    return _divided(scores, scores.abs().sum())


@_normalization("max")
def normalize_max(scores: Tensor) -> Tensor:
    """s / max|s|: relative to the layer's most important unit."""
    return _divided(scores, scores.abs().amax())


@_normalization("mean")
def normalize_mean(scores: Tensor) -> Tensor:
    """s / mean|s|: relative to an average unit of the layer."""
    return _divided(scores, scores.abs().mean())


@_normalization("gaussian")
def normalize_gaussian(scores: Tensor) -> Tensor:
    """(s - mean) / standard deviation: how far from an average unit of the layer, in its own spread."""
    centred = scores - scores.mean()
    return _divided(centred, centred.square().mean().sqrt())


@_normalization("lamp")
def normalize_lamp(scores: Tensor) -> Tensor:
    """s² / Σ t² over all t of the layer that are no smaller (LAMP, Lee et al. 2021, arXiv:2010.07611).

    Of magnitudes, it is the share that a weight has in what would be left. A score below 0 stays as it is, below all
    others.
    """
    wide = torch.float64 if scores.device.type != "mps" else torch.float32
    flat = scores.reshape(-1)
    order = stable_order(flat)
    flat = flat[order]
    squares = flat.to(wide).clamp(min=0).square()
    left = squares.flip(0).cumsum(0).flip(0)
    shares = torch.where(left > 0, squares / left.where(left > 0, 1.0), 0.0).to(scores.dtype)
    shares = torch.where(flat < 0, flat, shares)
    return torch.empty_like(shares).index_copy_(0, order, shares).view(scores.shape)


def _divided(scores: Tensor, by: Tensor) -> Tensor:
    return scores / torch.where(by > 0, by, torch.ones_like(by))


def as_normalization(normalization: Normalization | str) -> Normalization:
    """A normalization from a registered name, or a function of its own.

    Args:
        normalization: the value given.

    Raises:
        ArgumentError: the name is unknown, or it is neither.

    Example:
        >>> as_normalization("max")(torch.tensor([1.0, 4.0]))
        tensor([0.2500, 1.0000])
    """
    if isinstance(normalization, str):
        return NORMALIZATIONS[normalization]
    if not callable(normalization):
        raise ArgumentError(
            f"normalization={normalization!r} is neither a function nor a name; {', '.join(NORMALIZATIONS)} are"
        )
    return normalization
