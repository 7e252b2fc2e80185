"""What shapes can progress have? Curves over [0, 1], which schedules stretch over a part of training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gossamer.errors import ArgumentError


def sched_one_shot(pos: float) -> float:
    """All at once: 1 from the first moment.

    Example:
        >>> sched_one_shot(0.0)
        1.0
    """
    del pos
    return 1.0


def sched_iterative(pos: float, n_steps: int = 3) -> float:
    """Equal steps: ceil(n·pos) / n, as iterative pruning does (Han et al. 2015, arXiv:1506.02626).

    Example:
        >>> [round(sched_iterative(p), 2) for p in (0.0, 0.2, 0.5, 1.0)]
        [0.0, 0.33, 0.67, 1.0]
    """
    return math.ceil(pos * n_steps - 1e-9) / n_steps


def sched_agp(pos: float) -> float:
    """Fast, then slower: 1 - (1 - pos)³ (automated gradual pruning, Zhu & Gupta 2017, arXiv:1710.01878).

    Example:
        >>> sched_agp(0.5)
        0.875
    """
    return 1 - (1 - pos) ** 3


def sched_onecycle(pos: float, alpha: float = 14.0, beta: float = 6.0) -> float:
    """Slow, fast, slow: (1 + e^(-α+β)) / (1 + e^(-α·pos+β)), a logistic curve (Hubens et al. 2021, arXiv:2107.02086).

    Example:
        >>> [round(50 * sched_onecycle(p), 2) for p in (0.2, 0.4, 0.6, 0.8, 1.0)]
        [1.96, 20.07, 45.86, 49.74, 50.0]
    """
    return (1 + math.exp(-alpha + beta)) / (1 + math.exp(-alpha * pos + beta))


def sched_cosine(pos: float) -> float:
    """Half a cosine wave: (1 - cos(π·pos)) / 2.

    Example:
        >>> sched_cosine(1.0)
        1.0
    """
    return (1 - math.cos(math.pi * pos)) / 2


def sched_linear(pos: float) -> float:
    """A straight line.

    Example:
        >>> sched_linear(0.3)
        0.3
    """
    return pos


def sched_dsd(pos: float) -> float:
    """Dense, sparse, dense: half a cosine up, half a cosine down (Han et al. 2017, arXiv:1607.04381).

    Example:
        >>> [round(sched_dsd(p), 2) for p in (0.0, 0.5, 1.0)]
        [0.0, 1.0, 0.0]
    """
    return (1 - math.cos(2 * math.pi * pos)) / 2


def sched_constant(pos: float) -> float:
    """The whole target before the first step, and all through training: static sparsity, as of pruning at the start.

    Example:
        >>> sched_constant(0.0)
        1.0
    """
    del pos
    return 1.0


@dataclass(frozen=True)
class Polynomial:
    """Fast, then slower: 1 - (1 - pos)^power, here with power 2 (Zhu & Gupta 2017, arXiv:1710.01878; `agp` is the
    cubic).

    Args:
        power: the exponent; 1 is a straight line.

    Raises:
        ArgumentError: no positive number.

    Example:
        >>> Polynomial(2)(0.5)
        0.75
    """

    power: float

    def __post_init__(self) -> None:
        if isinstance(self.power, bool) or not isinstance(self.power, (int, float)) or not 0 < self.power < math.inf:
            raise ArgumentError(f"power={self.power!r} is no positive number; 3 gives the cubic of 'agp'")

    def __call__(self, pos: float) -> float:
        """Progress at a position."""
        return 1 - (1 - pos) ** self.power


@dataclass(frozen=True)
class Exponential:
    """Fast, then slower: (1 - e^(-rate·pos)) / (1 - e^(-rate)), here with rate 5; a negative rate is slow at first.

    Args:
        rate: how fast.

    Raises:
        ArgumentError: zero, too large to compute with, or no number.

    Example:
        >>> round(Exponential(5)(0.2), 3)
        0.636
    """

    rate: float

    def __post_init__(self) -> None:
        good = not isinstance(self.rate, bool) and isinstance(self.rate, (int, float))
        if not good or not 0 < abs(self.rate) <= 100:
            raise ArgumentError(f"rate={self.rate!r} is not between -100 and 100, or is 0, which would be 'lin'; try 5")

    def __call__(self, pos: float) -> float:
        """Progress at a position."""
        return math.expm1(-self.rate * pos) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Steps:
    """Jumps at given fractions, here to thirds at 1/4, 1/2 and 3/4; flat in between.

    Args:
        at: fractions of training, increasing, each in (0, 1].
        values: the progress from each of them on.

    Raises:
        ArgumentError: no fractions, or in another order, or another number of values, or one outside [0, 1].

    Example:
        >>> two = Steps((0.25, 0.5), (0.5, 1.0))
        >>> [two(p) for p in (0.2, 0.25, 0.4, 0.9)]
        [0.0, 0.5, 0.5, 1.0]
    """

    at: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        for label, numbers in (("at", self.at), ("values", self.values)):
            wrong = [x for x in numbers if isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 <= x <= 1]
            if wrong:
                raise ArgumentError(f"steps: {label} has {wrong[0]!r}; each is a number from 0 to 1")
        if not self.at or self.at[0] == 0 or any(a >= b for a, b in zip(self.at, self.at[1:], strict=False)):
            raise ArgumentError(f"steps at {self.at!r}; give fractions of training, increasing, each above 0")
        if len(self.at) != len(self.values):
            raise ArgumentError(f"steps at {len(self.at)} fractions and with {len(self.values)} values; one value each")

    def __call__(self, pos: float) -> float:
        """Progress at a position."""
        taken = [v for a, v in zip(self.at, self.values, strict=True) if pos >= a - 1e-9]
        return taken[-1] if taken else 0.0
