"""Which layers stay denser? The network's target and the layers' shapes → a count of masked units for every layer.

Each gives counts that sum to exactly the network's own, and leaves every layer something while there is enough for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from gossamer.errors import ArgumentError

_KERNEL = "dhw"
_LAST_CEILING = Fraction(4, 5)


@dataclass(frozen=True)
class Shape:
    """What a layer is like, for those that give layers different targets.

    Args:
        axes: letters of its weight's axes (see `rules.granularity`).
        lengths: their lengths.
        units: how many units it has.

    Example:
        >>> Shape("oihw", (16, 3, 3, 3), units=432).is_conv
        True
    """

    axes: str
    lengths: tuple[int, ...]
    units: int

    @property
    def is_conv(self) -> bool:
        """Whether the weight has kernel axes."""
        return any(a in _KERNEL for a in self.axes)

    def length(self, letters: str) -> int:
        """The product of the lengths of some axes; 1 where there are none of these."""
        return math.prod(n for a, n in zip(self.axes, self.lengths, strict=True) if a in letters)


Densities = Callable[[Fraction, Sequence[Shape]], list[int]]
"""(fraction of all units to mask, shapes of the layers in order) → units to mask in each."""


def er(fraction: Fraction, shapes: Sequence[Shape]) -> list[int]:
    """Erdős-Rényi: density in proportion to (in + out) / (in · out) (Mocanu et al. 2018, arXiv:1707.04780).

    Args:
        fraction: of all units, to mask.
        shapes: of the layers.

    Example:
        >>> er(Fraction(1, 2), [Shape("oi", (10, 10), 100), Shape("oi", (30, 10), 300)])
        [33, 167]
    """
    raw = [Fraction(s.length("gi") + s.length("o"), s.length("gi") * s.length("o")) for s in shapes]
    return _in_proportion(raw, fraction, shapes)


def erk(fraction: Fraction, shapes: Sequence[Shape]) -> list[int]:
    """Erdős-Rényi-Kernel: as `er`, with the kernel's height and width among both (Evci et al. 2020, arXiv:1911.11134).

    Args:
        fraction: of all units, to mask.
        shapes: of the layers.

    Example:
        >>> erk(Fraction(1, 2), [Shape("oihw", (8, 4, 3, 3), 288), Shape("oihw", (8, 8, 1, 1), 64)])
        [176, 0]
    """
    raw: list[Fraction] = []
    for shape in shapes:
        kernel = [n for a, n in zip(shape.axes, shape.lengths, strict=True) if a in _KERNEL]
        inputs, outputs = shape.length("gi"), shape.length("o")
        raw.append(Fraction(inputs + outputs + sum(kernel), inputs * outputs * math.prod(kernel)))
    return _in_proportion(raw, fraction, shapes)


def uniform_plus(fraction: Fraction, shapes: Sequence[Shape]) -> list[int]:
    """The same everywhere, but the first convolution dense and the last Linear at most 80 % (Gale et al. 2019,
    arXiv:1902.09574).

    The others make up for it, so that the network meets its target.

    Args:
        fraction: of all units, to mask.
        shapes: of the layers.

    Raises:
        ArgumentError: the others cannot make up for it.

    Example:
        >>> uniform_plus(Fraction(1, 2), [Shape("ow", (4, 9), 36), Shape("oi", (8, 9), 72), Shape("oi", (4, 9), 36)])
        [0, 48, 24]
    """
    budget = _rounded(fraction * sum(s.units for s in shapes))
    first = next((i for i, s in enumerate(shapes) if s.is_conv), None)
    last = next((i for i in range(len(shapes) - 1, -1, -1) if not shapes[i].is_conv), None)
    most = [Fraction(s.units) for s in shapes]
    if first is not None:
        most[first] = Fraction(0)
    if last is not None:
        most[last] = Fraction(math.floor(_LAST_CEILING * shapes[last].units))
    if budget > sum(most):
        total = sum(s.units for s in shapes)
        raise ArgumentError(
            f"context 'uniform_plus' keeps the first convolution dense and a fifth of the last Linear, which leaves at "
            f"most {math.floor(10000 * sum(most) / total) / 100:g} % of this network to mask, and "
            f"{float(100 * fraction):g} is asked for; use 'local' or 'erk'"
        )
    wanted = _filled([Fraction(int(m > 0)) for m in most], most, Fraction(budget), shapes)
    return _whole(wanted, budget, [math.floor(m) for m in most])


def _in_proportion(raw: Sequence[Fraction], fraction: Fraction, shapes: Sequence[Shape]) -> list[int]:
    """Densities in proportion to `raw`, none above 1, as many units kept as the network keeps."""
    total = sum(s.units for s in shapes)
    kept = total - _rounded(fraction * total)
    real = _filled(raw, [Fraction(s.units) for s in shapes], Fraction(kept), shapes)
    whole = _whole(real, kept, [s.units for s in shapes])
    if kept >= len(shapes):  # a layer that keeps nothing cuts the network
        for i in [i for i, n in enumerate(whole) if n == 0]:
            donor = max(range(len(whole)), key=lambda j: (whole[j], -j))
            whole[donor] -= 1
            whole[i] = 1
    return [s.units - n for s, n in zip(shapes, whole, strict=True)]


def _filled(
    raw: Sequence[Fraction], most: Sequence[Fraction], budget: Fraction, shapes: Sequence[Shape]
) -> list[Fraction]:
    """Spreads a budget in proportion to raw · units; what a layer cannot take goes to the others."""
    full: set[int] = set()
    while True:
        others = [i for i in range(len(shapes)) if i not in full]
        weight = sum((raw[i] * shapes[i].units for i in others), Fraction(0))
        scale = (budget - sum((most[i] for i in full), Fraction(0))) / weight if weight else Fraction(0)
        over = [i for i in others if scale * raw[i] * shapes[i].units > most[i]]
        if not over:
            return [most[i] if i in full else scale * raw[i] * shapes[i].units for i in range(len(shapes))]
        full |= set(over)


def _whole(real: Sequence[Fraction], total: int, most: Sequence[int]) -> list[int]:
    """Whole numbers that sum to a total: what is left after rounding down goes to the largest remainders, in order."""
    whole = [math.floor(x) for x in real]
    order = sorted(range(len(real)), key=lambda i: (whole[i] - real[i], i))
    left = total - sum(whole)
    while left > 0:
        for i in order:
            if left > 0 and whole[i] < most[i]:
                whole[i] += 1
                left -= 1
    return whole


def _rounded(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))
