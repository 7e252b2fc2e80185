"""Which zeros are there already? They are masked from the start, so that none grows back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from gossamer.errors import ArgumentError
from gossamer.layers import Layer, Layers
from gossamer.moving import rounded
from gossamer.rules.allocation import Context, count
from gossamer.rules.granularity import expand


def keep_zeros(
    layers: Layers, context: Context, granularity: str, fractions: Mapping[str, Fraction], round_to: int | None = None
) -> int:
    """Masks the units that are zero already.

    A layer that is zero throughout, as some are when they are made, is not taken for a sparse one, unless it is a unit.

    Args:
        layers: whose masks are all True yet.
        context: which units will compete.
        granularity: its name, for the messages.
        fractions: what the layers are to reach.
        round_to: as in `Mover.move`.

    Returns:
        How many weights that is.

    Raises:
        ArgumentError: a target lies below what is there, or the zeros do not fit the granularity or an N:M pattern.
    """
    found: dict[str, tuple[Tensor, int]] = {}
    for name, layer in layers.items():
        weight = layer.target.weight.detach()
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        if not zeros or (zeros == weight.numel() and layer.n_units > 1):
            continue
        kept = (weight != 0).contiguous().view(layer.target.view)
        kept = kept.amax(layer.dims, keepdim=True) if layer.dims else kept
        masked = layer.n_units - int(torch.count_nonzero(kept))
        inside = zeros - masked * (weight.numel() // layer.n_units)
        if inside * 1000 > weight.numel():  # a stray zero or two make no sparse network
            raise ArgumentError(
                f"layer {name!r} has {inside} zeros inside units of granularity {granularity!r} that are "
                "not zero as a whole, and training would let them grow back; say keep_zeros=False, or use the "
                "granularity that they were made with"
            )
        if masked:
            found[name] = kept, masked
    sizes = {name: (masked, layers[name].n_units) for name, (_, masked) in found.items()}
    if context.kind == "global":
        units = sum(layer.n_units for layer in layers.values())
        fraction = max(fractions.values())
        if _over(
            {"": (sum(masked for masked, _ in sizes.values()), units)}, {"": count(fraction, units)}, {"": fraction}
        ):
            found = {}
    else:
        goals = {
            name: rounded(count(f, layers[name].n_units), layers[name], round_to)
            for name, f in fractions.items()
            if name in sizes
        }
        for name in _over(sizes, goals, fractions):
            del found[name]
    if context.m:
        for name, (kept, _) in found.items():
            _check_blocks(layers[name], kept, context)
    for name, (kept, masked) in found.items():
        layer = layers[name]
        layer.masked = layer.floor = masked
        layer.zeros = ~kept
        layers.masks.replace(name, expand(kept, layer.target.view).view(layer.target.weight.shape))
    return sum(layers.masks.masked(name) for name in found)


def _over(
    zeros: Mapping[str, tuple[int, int]], goals: Mapping[str, int], fractions: Mapping[str, Fraction]
) -> list[str]:
    """Layers with a stray zero or two above their goal, which may grow; an error where there are more than that."""
    over = {name: 100 * zeros[name][0] / zeros[name][1] for name, goal in goals.items() if zeros[name][0] > goal}
    many = {name: percent for name, percent in over.items() if zeros[name][0] * 1000 > zeros[name][1]}
    if many:
        worst = max(many, key=lambda name: many[name])
        where = f"layer {worst!r}" if worst else "the network"
        raise ArgumentError(
            f"{where} has {many[worst]:.2f} % zeros already, and a target of {float(100 * fractions[worst]):g} % would "
            f"let some grow back; ask for at least {math.ceil(100 * many[worst]) / 100:.2f}, or say keep_zeros=False"
        )
    return list(over)


def _check_blocks(layer: Layer, kept: Tensor, context: Context) -> None:
    blocks = kept.movedim(layer.target.axes.index("i"), -1).reshape(-1, context.m).sum(1)
    if int(blocks.max() - blocks.min()) > 1:
        raise ArgumentError(
            f"layer {layer.target.name!r} has zeros that are not spread evenly over blocks of {context.m}, so "
            f"context '{context}' would let some grow back; say keep_zeros=False, or use context='local'"
        )
