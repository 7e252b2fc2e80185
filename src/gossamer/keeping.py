"""Which zeros are there already? They are masked from the start, so that none grows back."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from gossamer.errors import ArgumentError
from gossamer.layers import Layer, Layers
from gossamer.moving import rounded
from gossamer.rules.allocation import Context, count
from gossamer.rules.granularity import expand
from gossamer.targets import Target


def keep_zeros(
    layers: Layers,
    context: Context,
    granularity: str,
    fractions: Mapping[str, Fraction],
    round_to: int | None = None,
    fixed: Collection[str] = (),
) -> int:
    """Masks the units that are zero already, beside those that are masked.

    A layer that is zero throughout, as some are when they are made, is not taken for a sparse one, unless it is a unit.
    Where masks are in place already, a stray zero or two that they do not mask are left alone.

    Args:
        layers: whose masks grow.
        context: which units will compete.
        granularity: its name, for the messages.
        fractions: what the layers are to reach.
        round_to: as in `Mover.move`.
        fixed: as in `Mover.move`.

    Returns:
        How many weights the layers have masked in which any were found; 0 where there are none.

    Raises:
        ArgumentError: a target lies below what is there, or the zeros do not fit the granularity or an N:M pattern.
    """
    found: dict[str, tuple[Tensor, int]] = {}
    before = {name: layer.n_units - int(torch.count_nonzero(layers.units(layer))) for name, layer in layers.items()}
    for name, layer in layers.items():
        weight = layer.target.weight.detach()
        alive = (weight != 0) & layers.masks.on(name, weight.device)
        zeros = weight.numel() - int(torch.count_nonzero(alive))
        more = zeros - before[name] * (weight.numel() // layer.n_units)
        if _is_stray(more, weight.numel()) if before[name] else not more:
            continue
        if not torch.count_nonzero(weight) and layer.n_units > 1:
            continue
        kept = alive.contiguous().view(layer.view)
        kept = kept.amax(layer.dims, keepdim=True) if layer.dims else kept
        masked = layer.n_units - int(torch.count_nonzero(kept))
        inside = zeros - masked * (weight.numel() // layer.n_units)
        if not _is_stray(inside, weight.numel()):
            raise ArgumentError(
                f"layer {name!r} has {inside} zeros inside units of granularity {granularity!r} that are "
                "not zero as a whole, and training would let them grow back; say keep_zeros=False, or use the "
                "granularity that they were made with"
            )
        if masked > before[name]:
            found[name] = kept, masked
    sizes = {name: (masked, layers[name].n_units) for name, (_, masked) in found.items()}
    pooled = [name for name in layers if name not in fixed] if context.is_pooled else []
    if pooled:
        units = sum(layers[name].n_units for name in pooled)
        fraction = max(f for name, f in fractions.items() if name in pooled)
        masked = sum(sizes[name][0] if name in sizes else before[name] for name in pooled)
        if found and _over({"": (masked, units)}, {"": count(fraction, units)}, {"": fraction}, any(before.values())):
            found = {name: zeros for name, zeros in found.items() if name not in pooled}
    goals = {
        name: rounded(count(f, layers[name].n_units), layers[name], round_to)
        for name, f in fractions.items()
        if name in sizes and name not in pooled
    }
    for name in _over(sizes, goals, fractions, any(before.values())):
        del found[name]
    if context.m:
        for name, (kept, _) in found.items():
            _check_blocks(layers[name], kept, context)
    for name, (kept, masked) in found.items():
        layer = layers[name]
        layer.masked = layer.floor = masked
        layer.zeros = ~kept
        layers.masks.replace(name, expand(kept, layer.view).view(layer.target.weight.shape))
    return sum(layers.masks.masked(name) for name in found)


def has_zeros_beside(targets: Iterable[Target], *masks: Mapping[str, Tensor]) -> bool:
    """Whether a layer has zeros, more than a stray one or two, where all masks keep.

    Args:
        targets: the layers.
        masks: layer name → bool, True = kept.

    Example:
        >>> from gossamer.targets import find_targets
        >>> layer = torch.nn.Linear(2, 1); _ = torch.nn.init.zeros_(layer.weight)
        >>> has_zeros_beside(find_targets(layer, torch.nn.Linear), {"": torch.tensor([[True, False]])})
        True
    """
    for target in targets:
        zeros = target.weight.detach() == 0
        for several in masks:
            zeros &= several[target.name].to(zeros.device)
        if not _is_stray(int(zeros.sum()), zeros.numel()):
            return True
    return False


def _is_stray(zeros: int, size: int) -> bool:
    """Whether so few zeros make no sparse network."""
    return zeros * 1000 <= size


def _over(
    zeros: Mapping[str, tuple[int, int]], goals: Mapping[str, int], fractions: Mapping[str, Fraction], are_masked: bool
) -> list[str]:
    """Layers with a stray zero or two above their goal, which may grow; an error where there are more than that."""
    over = {name: 100 * zeros[name][0] / zeros[name][1] for name, goal in goals.items() if zeros[name][0] > goal}
    many = {name: percent for name, percent in over.items() if not _is_stray(zeros[name][0], zeros[name][1])}
    if many:
        worst = max(many, key=lambda name: many[name])
        where = f"layer {worst!r}" if worst else "the network"
        among = " together with what this run masks" if are_masked else ""
        other = "; a network that was loaded wants a new callback, or run" if are_masked else ""
        raise ArgumentError(
            f"{where} has {many[worst]:.2f} % zeros already{among}, and a target of "
            f"{float(100 * fractions[worst]):g} % would let some grow back; ask for at least "
            f"{math.ceil(100 * many[worst]) / 100:.2f}, or say keep_zeros=False{other}"
        )
    return list(over)


def _check_blocks(layer: Layer, kept: Tensor, context: Context) -> None:
    blocks = kept.movedim(layer.axes.index("i"), -1).reshape(-1, context.m).sum(1)
    if int(blocks.max() - blocks.min()) > 1:
        raise ArgumentError(
            f"layer {layer.target.name!r} has zeros that are not spread evenly over blocks of {context.m}, so "
            f"context '{context}' would let some grow back; say keep_zeros=False, or use context='local'"
        )
