"""How many units does each round of a search for tickets mask? A share of those that are left, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch

from gossamer.errors import ArgumentError
from gossamer.rules.allocation import count
from gossamer.sparsifier import Sparsifier
from gossamer.targets import match_layers, resolve_sparsity


def shares_of(sparsifier: Sparsifier, rate: float, rates: Mapping[str, float]) -> dict[str, Fraction]:
    """The fraction of its surviving units that each round masks in a layer.

    Args:
        sparsifier: whose layers.
        rate: percent, for the layers that `rates` does not name.
        rates: layer name or pattern → percent.

    Raises:
        ArgumentError: a percentage that is not above 0 and below 100.
        TargetError: a name that matches nothing.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> shares_of(Sparsifier(net, layer_type=nn.Linear), 20, {"1": 10})
        {'0': Fraction(1, 5), '1': Fraction(1, 10)}
    """
    if not isinstance(rates, Mapping):
        raise ArgumentError(f"rates={rates!r} is no dict; give layer name → percent, or rate alone")
    names = [t.name for t in sparsifier.targets]
    shares = dict.fromkeys(names, _share("rate", rate))
    for pattern, percent in rates.items():
        match_layers(pattern, names, what="rates")
        _share(f"rates[{pattern!r}]", percent)
    return {**shares, **(resolve_sparsity(rates, names, "rates") if rates else {})}


def after_rounds(shares: Mapping[str, Fraction], rounds: int) -> dict[str, Fraction]:
    """The fraction of all units that is masked when each of several rounds has masked its share of the rest.

    Example:
        >>> after_rounds({"0": Fraction(1, 5)}, 2)
        {'0': Fraction(9, 25)}
    """
    return {name: 1 - (1 - share) ** rounds for name, share in shares.items()}


def check_counts(sparsifier: Sparsifier, shares: Mapping[str, Fraction], rounds: int) -> None:
    """Makes sure that the rounds mask something, and no layer wholly.

    Args:
        sparsifier: whose layers; in a global context they count as one.
        shares: from `shares_of`.
        rounds: how many.

    Raises:
        ArgumentError: they do not; the message says which layer, and how many rounds it stands.
    """
    units = {name: unit_shape(sparsifier, name).numel() for name in shares}
    if sparsifier.context.is_pooled:
        units, shares = {"": sum(units.values())}, {"": next(iter(shares.values()))}
    most: dict[str, int] = {}  # rounds that leave something
    for name, n in units.items():
        left = (k for k in range(rounds) if count(after_rounds(shares, k + 1)[name], n) == n)
        most[name] = next(left, rounds)
    name = min(most, key=lambda n: most[n])
    if most[name] < rounds:
        which = "all layers" if sparsifier.context.is_pooled else f"layer {name!r}"
        fewer = f"use at most {most[name]} rounds, or a lower rate" if most[name] else "use a lower rate"
        raise ArgumentError(
            f"rounds={rounds} at {float(shares[name] * 100):g} % each would mask all {units[name]} units of {which}; "
            f"{fewer} there, or leave layers out with exclude"
        )
    if not any(count(f, units[name]) for name, f in after_rounds(shares, rounds).items()):
        raise ArgumentError(
            f"rounds={rounds} at these rates mask nothing, since layers have {max(units.values())} units at most; use "
            "a higher rate"
        )


def unit_shape(sparsifier: Sparsifier, layer: str) -> torch.Size:
    """The shape of a layer's units: its weight's, with 1 along the axes that a unit spans.

    Example:
        >>> from torch import nn
        >>> unit_shape(Sparsifier(nn.Sequential(nn.Conv2d(3, 8, 5)), "filter"), "0")
        torch.Size([8, 1, 1, 1])
    """
    target = next(t for t in sparsifier.targets if t.name == layer)
    _, view, dims = sparsifier.granularity.cut(target.axes, target.view)
    return torch.Size(1 if i in dims else n for i, n in enumerate(view))


def _share(name: str, percent: float) -> Fraction:
    if isinstance(percent, bool) or not isinstance(percent, (int, float)) or not 0 < percent < 100:
        raise ArgumentError(
            f"{name}={percent!r} cannot be used; give the percent of the surviving units that a round masks, above 0 "
            "and below 100"
        )
    return Fraction(repr(percent)) / 100
