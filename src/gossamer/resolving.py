"""What is each layer to reach? A target, spread over the layers and checked against them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from fractions import Fraction

from torch import nn

from gossamer.errors import ArgumentError, GossamerWarning, TargetError
from gossamer.layers import Layers
from gossamer.moving import rounded
from gossamer.rules.allocation import Context, as_fraction, check_round_to, check_target, count
from gossamer.rules.densities import Shape
from gossamer.targets import AXES, match_layers, resolve_sparsity


def resolve(
    sparsity: float | Mapping[str, float],
    round_to: int | None,
    model: nn.Module,
    layers: Layers,
    context: Context,
    granularity: str,
) -> dict[str, Fraction]:
    """Checks a target and spreads it over layers.

    Args:
        sparsity: as in `Sparsifier.sparsify_model`.
        round_to: as in `Sparsifier.sparsify_model`.
        model: the network, for the messages.
        layers: those that take part.
        context: which units compete.
        granularity: its name, for the messages.

    Returns:
        Layer name → fraction of its units to mask, for every layer that has a target.

    Raises:
        ArgumentError: a target that cannot be used or met in this context.
        TargetError: a layer name that matches nothing.
    """
    if isinstance(sparsity, Mapping) and context.is_shared and "*" not in sparsity:
        raise ArgumentError(
            f"context='{context}' shares one target between the layers, got a dict without it; add '*' for "
            f"what the layers that it does not name reach together, such as {{…, '*': 90}}, or use context='local'"
        )
    for name in sparsity if isinstance(sparsity, Mapping) else ():
        other = dict(model.named_modules()).get(name)
        if other is not None and name not in layers:
            kind = type(other).__name__
            remedy = f"add its type with layer_type=(…, {kind}) and see that it is not excluded"
            if not isinstance(other, tuple(AXES)):
                remedy = "that has no weight to mask; name a layer that has one"
            raise TargetError(f"sparsity: layer {name!r} takes no part; it is a {kind}: {remedy}")
    fixed = fixed_layers(sparsity, layers, context)
    if isinstance(sparsity, Mapping) and context.is_shared:
        named = {pattern: percent for pattern, percent in sparsity.items() if pattern != "*"}
        fractions = dict.fromkeys(layers, as_fraction(sparsity["*"]))
        fractions |= resolve_sparsity(named, layers) if named else {}
    else:
        fractions = resolve_sparsity(sparsity, layers)
    for is_fixed, fraction in dict.fromkeys((name in fixed, fraction) for name, fraction in fractions.items()):
        check_target(fraction, Context("local") if is_fixed else context)
    shared = [name for name in fractions if name not in fixed]
    if context.densities is not None and shared:
        shapes = [Shape(la.target.axes, la.target.view, la.n_units) for la in map(layers.get, shared) if la]
        masked = context.densities(fractions[shared[0]], shapes)
        _check_densities(masked, shapes, fractions[shared[0]], context)
        fractions |= {n: Fraction(k, s.units) for n, k, s in zip(shared, masked, shapes, strict=True)}
    check_round_to(round_to, context)
    most = max(layers[name].n_units for name in fractions)
    if round_to is not None and round_to > most:
        raise ArgumentError(
            f"round_to={round_to} is more than any layer with a target has ({most} units of granularity "
            f"{granularity!r}), so nothing would be masked; use at most {most}"
        )
    counts = [(count(f, layers[name].n_units), layers[name]) for name, f in fractions.items()]
    asked = sum(n for n, _ in counts)
    if context.kind == "local" and asked and not any(rounded(n, la, round_to) for n, la in counts):
        warnings.warn(
            f"round_to={round_to} leaves every layer dense: at this sparsity the nearest multiple keeps all of "
            "its units; use a smaller round_to or a higher sparsity",
            GossamerWarning,
            stacklevel=4,
        )
    return fractions


def fixed_layers(sparsity: float | Mapping[str, float], layers: Iterable[str], context: Context) -> frozenset[str]:
    """The layers that a target names one by one where the others share one.

    Args:
        sparsity: as in `Sparsifier.sparsify_model`.
        layers: the names of those that take part.
        context: which units compete.

    Example:
        >>> fixed_layers({"1": 50, "*": 80}, ["0", "1"], Context("global"))
        frozenset({'1'})
    """
    if not isinstance(sparsity, Mapping) or not context.is_shared:
        return frozenset()
    return frozenset(n for p in sparsity if p != "*" for n in match_layers(p, layers))


def _check_densities(masked: list[int], shapes: list[Shape], fraction: Fraction, context: Context) -> None:
    goal = count(fraction, sum(s.units for s in shapes))
    good = isinstance(masked, list) and len(masked) == len(shapes) and all(isinstance(n, int) for n in masked)
    if not good or sum(masked) != goal or any(not 0 <= n <= s.units for n, s in zip(masked, shapes, strict=True)):
        raise ArgumentError(
            f"context '{context}' gives its layers {masked!r} units to mask, and they are to be {len(shapes)} whole "
            f"numbers that sum to {goal}, each between 0 and the layer's own"
        )
