"""How many units does each group lose? Fractions and scores → a count for every group, as a context says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from gossamer.pruning.graph import Group
from gossamer.rules.allocation import Context, count, round_kept
from gossamer.rules.budget import global_counts
from gossamer.rules.densities import Shape
from gossamer.rules.normalization import as_normalization
from gossamer.targets import Target


def fraction_of(group: Group, fractions: Mapping[str, Fraction]) -> Fraction:
    """A group whose layers have fractions of their own meets them on average."""
    named = [fractions[n] for n in group.layers if n in fractions]
    return sum(named, Fraction(0)) / len(named)


def shared_out(
    groups: Sequence[Group], fractions: Mapping[str, Fraction], context: Context, targets: Mapping[str, Target]
) -> dict[str, Fraction]:
    """The fractions of the layers of groups where a context gives layers their own, by their shapes; else none.

    Args:
        groups: those that take part.
        fractions: layer → the fraction of the network's filters that is to be gone in the end.
        context: one with `densities`, or another.
        targets: the layers; a group counts as one, of the shape of the first.
    """
    if context.densities is None or not groups:
        return {}
    first = [next(targets[n] for n in g.layers if n in targets) for g in groups]
    shapes = [Shape(t.axes, t.view, g.n_units) for t, g in zip(first, groups, strict=True)]
    counts = context.densities(max(fractions.values()), shapes)
    shares = [Fraction(n, g.n_units) for n, g in zip(counts, groups, strict=True)]
    return {n: own for g, own in zip(groups, shares, strict=True) for n in g.layers if n in targets}


class Competition:
    """Groups whose units compete with each other.

    Args:
        groups: the groups.
        kept: bool a unit, for each: whether it is there still.
        context: with a floor, a ceiling and a normalization of scores.
        fraction: of all units, that are to be gone.

    Example:
        >>> groups = [Group((), 4, torch.zeros(4, dtype=torch.int64))] * 2
        >>> kept = [torch.ones(4, dtype=torch.bool)] * 2
        >>> scores = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])]
        >>> Competition(groups, kept, Context("global"), Fraction(1, 2)).counts(scores.__getitem__)
        [3, 1]
        >>> Competition(groups, kept, Context("global", ceiling=50), Fraction(1, 2)).counts(scores.__getitem__)
        [2, 2]
    """

    def __init__(self, groups: Sequence[Group], kept: Sequence[Tensor], context: Context, fraction: Fraction) -> None:
        self._groups, self._kept, self._context = groups, kept, context
        units, gone = [g.n_units for g in groups], [int((~k).sum()) for k in kept]
        least, most = context.bounds(fraction, units, count(fraction, sum(units)))
        # A unit of each block stays whatever the others score, and what is gone does not come back.
        self._most = [max(n, min(m, g.n_units - g.n_blocks)) for n, m, g in zip(gone, most, groups, strict=True)]
        self._least = [min(pair) for pair in zip(least, self._most, strict=True)]
        self.goal = min(count(fraction, sum(units)), sum(self._most))
        """How many units are to be gone, of all groups together."""

    def counts(self, scores: Callable[[int], Tensor]) -> list[int]:
        """How many units of each group are to be gone: the lowest scores of all go.

        Args:
            scores: which group → a score for each of its units.
        """
        normalization = as_normalization(self._context.normalization or "none")
        found: list[Tensor] = []
        for i, kept in enumerate(self._kept):
            own = scores(i).clone()
            own[kept] = normalization(own[kept])
            own[~kept] = -torch.inf
            found.append(own)
        return global_counts(self.goal, found, (self._least, self._most)).tolist() if found else []


def rounded(group: Group, goal: int, round_to: int | None) -> int:
    """As many units as can go: as many from each block, at least one of each left, a multiple of `round_to` kept.

    Example:
        >>> rounded(Group((), 16, torch.arange(16) // 4), 6, None)
        4
    """
    multiple = math.lcm(round_to or 1, group.n_blocks)
    goal = min(goal, group.n_units - group.n_blocks)
    return goal if multiple == 1 or goal <= 0 else round_kept(goal, group.n_units, multiple)


def thin(groups: Sequence[Group], kept: Sequence[Tensor]) -> list[str]:
    """The groups that a competition has left next to nothing, each in words.

    Args:
        groups: those that compete.
        kept: bool a unit, for each.

    Example:
        >>> group = Group((), 16, torch.zeros(16, dtype=torch.int64), layers=("conv",))
        >>> thin([group, group], [torch.arange(16) < 1, torch.ones(16, dtype=torch.bool)])
        ["'conv' keeps 1 of 16"]
    """
    left = [int(k.sum()) for k in kept]
    share = sum(left) / max(1, sum(g.n_units for g in groups))
    return [
        f"{g.layers[0]!r} keeps {n:,} of {g.n_units:,}"
        for g, n in zip(groups, left, strict=True)
        if n < g.n_units and n < (share / 2 if n == 1 else share / 10) * g.n_units
    ]
