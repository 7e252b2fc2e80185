"""Where do zeros cost least? Cost curves of layers and a budget → how many units each layer masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from gossamer.rules.allocation import as_fraction, count

Line = Sequence[tuple[Fraction, float]]
"""Points of masked weights and what they cost, rising, from (0, 0) on; costs rise ever more steeply."""

_FREE = 1e-12  # costs a weight that differ by less are the same


def hull_of(points: Sequence[tuple[Fraction, float]]) -> list[tuple[Fraction, float]]:
    """The lower convex hull of a cost curve that never falls.

    Args:
        points: masked weights and cost, weights rising.

    Example:
        >>> zero = Fraction(0)
        >>> [int(x) for x, _ in hull_of([(zero, 0.0), (zero + 1, 5.0), (zero + 2, 6.0), (zero + 3, 20.0)])]
        [0, 2, 3]
    """
    hull: list[tuple[Fraction, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[Fraction, float], b: tuple[Fraction, float]) -> float:
    return (b[1] - a[1]) / float(b[0] - a[0])


def cheapest(lines: Mapping[str, Line], budget: int) -> dict[str, Fraction]:
    """Spends a budget where the next weight costs least; where several cost the same, each in proportion.

    Args:
        lines: layer → its cost curve.
        budget: weights to mask in all layers together.

    Returns:
        Layer → masked weights.

    Example:
        >>> line = [(Fraction(0), 0.0), (Fraction(10), 1.0)]
        >>> {n: int(w) for n, w in cheapest({"a": line, "b": line}, 10).items()}
        {'a': 5, 'b': 5}
    """
    segments = sorted(
        (max(_slope(a, b), 0.0), layer, b[0] - a[0])
        for layer, line in lines.items()
        for a, b in itertools.pairwise(line)
    )
    given = dict.fromkeys(lines, Fraction(0))
    left, i = Fraction(budget), 0
    while left > 0 and i < len(segments):
        same = [s for s in segments[i:] if s[0] - segments[i][0] <= _FREE]
        length = sum((s[2] for s in same), Fraction(0))
        share = min(Fraction(1), left / length)
        for _, layer, part in same:
            given[layer] += part * share
        left -= length * share
        i += len(same)
    return given


def whole_units(
    weights: Mapping[str, Fraction],
    size: Mapping[str, tuple[int, int]],
    most: Mapping[str, Fraction | int],
    budget: int,
) -> dict[str, int]:
    """Whole units of each layer: rounded down, then one more where the remainder is largest, while that leads nearer.

    Args:
        weights: layer → masked weights.
        size: layer → weights a unit, units.
        most: layer → most masked weights.
        budget: weights to mask in all layers together.

    Example:
        >>> whole_units({"a": Fraction(3, 2), "b": Fraction(3, 2)}, {"a": (1, 9), "b": (1, 9)}, {"a": 9, "b": 9}, 3)
        {'a': 2, 'b': 1}
    """
    counts = {layer: math.floor(w / size[layer][0]) for layer, w in weights.items()}
    left = budget - sum(counts[layer] * size[layer][0] for layer in counts)
    order = sorted(counts, key=lambda n: weights[n] / size[n][0] - counts[n], reverse=True)
    for layer in [*order, *order]:
        each, n = size[layer]
        if left > 0 and each <= 2 * left and (counts[layer] + 1) * each <= most[layer] and counts[layer] < n:
            counts[layer] += 1
            left -= each
    return counts


def percent_of(masked: int, units: int) -> float:
    """The shortest percentage that means exactly so many units.

    Example:
        >>> percent_of(1, 3), percent_of(73728, 147456)
        (33.0, 50.0)
    """
    for digits in range(17):
        percent = round(100 * masked / units, digits)
        if count(as_fraction(percent), units) == masked:
            return percent
    return 100 * masked / units
