"""How many units does each layer keep? Target and scores → a count of masked units for every layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ArgumentError

_CONTEXTS = "use 'local', 'global' or a pattern N:M such as '2:4'"


@dataclass(frozen=True)
class Context:
    """Which units compete with which.

    Args:
        kind: 'local' (inside each layer), 'global' (across all layers) or 'n:m' (inside blocks of m inputs).
        n: units that a block keeps, for 'n:m'.
        m: units in a block, for 'n:m'.

    Raises:
        ArgumentError: another kind, or N is not smaller than M.

    Example:
        >>> as_context("2:4")
        Context(kind='n:m', n=2, m=4)
    """

    kind: str
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("local", "global", "n:m"):
            raise ArgumentError(f"unknown context {self.kind!r}; {_CONTEXTS}")
        if self.kind == "n:m" and not 0 < self.n < self.m:
            raise ArgumentError(
                f"context '{self.n}:{self.m}' keeps {self.n} of every {self.m}; N must be at least 1 and less than M"
            )
        if self.kind != "n:m" and (self.n, self.m) != (0, 0):
            raise ArgumentError(f"context {self.kind!r} has no blocks, got n={self.n} and m={self.m}; leave them out")

    @property
    def fraction(self) -> Fraction | None:
        """The sparsity that an N:M pattern means, None for the others.

        Example:
            >>> as_context("1:4").fraction
            Fraction(3, 4)
        """
        return Fraction(self.m - self.n, self.m) if self.m else None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else self.kind


def as_context(context: Context | str) -> Context:
    """A context from 'local', 'global' or an N:M pattern such as '2:4'.

    Args:
        context: the value given.

    Raises:
        ArgumentError: it is none of these, or N is not smaller than M.

    Example:
        >>> as_context("global").kind
        'global'
    """
    if isinstance(context, Context):
        return context
    if context in ("local", "global"):
        return Context(context)
    pattern = re.fullmatch(r"(\d+):(\d+)", context) if isinstance(context, str) else None
    if pattern is None:
        raise ArgumentError(f"unknown context {context!r}; {_CONTEXTS}")
    return Context("n:m", int(pattern[1]), int(pattern[2]))


def as_fraction(percent: float) -> Fraction:
    """A percentage as an exact fraction, read as it is written: 2.3 is 23/1000, not the nearest binary number.

    Args:
        percent: from 0 to 100.

    Raises:
        ArgumentError: no number, or outside [0, 100].

    Example:
        >>> as_fraction(2.3)
        Fraction(23, 1000)
    """
    try:
        if isinstance(percent, (bool, str, bytes, bytearray)):  # float() would read the last three
            raise TypeError
        value = float(percent)
    except OverflowError:  # an integer beyond all floats
        value = math.inf
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several
        raise ArgumentError(f"sparsity {percent!r} is no number; give a percentage from 0 to 100") from None
    if not 0 <= value <= 100:
        raise ArgumentError(f"sparsity {percent!r} is outside [0, 100]; it is a percentage, so 50 means half")
    return Fraction(repr(value)) / 100


def count(fraction: Fraction | float, n: int) -> int:
    """How many of n units a fraction is: round(fraction·n), halves up.

    Args:
        fraction: share of units to mask, in [0, 1].
        n: number of units.

    Example:
        >>> count(as_fraction(50), 5), count(as_fraction(29), 50), count(as_fraction(70), 294912)
        (3, 15, 206438)
    """
    return math.floor(Fraction(fraction) * n + Fraction(1, 2))


def round_kept(masked: int, n: int, multiple: int) -> int:
    """Masks as many units as leave the nearest multiple kept (halves up), never none and never more than there are.

    Args:
        masked: how many of the units the target masks.
        n: number of units.
        multiple: what the number of kept units shall be a multiple of.

    Returns:
        The number of units to mask. A dense layer stays dense.

    Example:
        >>> round_kept(8, 16, 8), round_kept(3, 16, 8), round_kept(16, 16, 8), round_kept(2, 4, 8)
        (8, 0, 8, 0)
    """
    if masked == 0:
        return 0
    kept = (2 * (n - masked) + multiple) // (2 * multiple) * multiple
    return n - min(max(kept, multiple), n)


def check_round_to(round_to: int | None, context: Context) -> None:
    """Makes sure that kept units can be rounded to a multiple.

    Raises:
        ArgumentError: no positive integer, or a context in which rounding would break the pattern.

    Example:
        >>> check_round_to(8, as_context("local"))
    """
    if round_to is None:
        return
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ArgumentError(f"round_to={round_to!r} is no positive integer; None rounds nothing")
    if context.m:
        raise ArgumentError(f"round_to={round_to} would break the pattern {context}; use round_to=None")


def check_target(fraction: Fraction, context: Context) -> None:
    """Makes sure that a context can meet a target.

    Raises:
        ArgumentError: an N:M pattern means another sparsity.

    Example:
        >>> check_target(as_fraction(50), as_context("2:4"))
    """
    pattern = context.fraction
    if pattern is not None and fraction not in (0, pattern):
        raise ArgumentError(
            f"context '{context}' masks {float(pattern * 100):g} % of every layer, got sparsity "
            f"{float(fraction * 100):g}; pass sparsity={float(pattern * 100):g}"
        )


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


def global_counts(masked: int, scores: Sequence[Tensor]) -> Tensor:
    """The same split found by counting alone: no sort, no copy to the host, memory that does not grow with the model.

    Floats order like the integers that their bits spell, so 32 halvings of the integers (64 where a score is float64),
    each one count over every layer, end at the threshold exactly.

    Args:
        masked: units to mask in all layers together.
        scores: for each layer, a score for every unit; float32 or float64, no nan.

    Returns:
        int64, one count a layer, on the scores' device.

    Example:
        >>> global_counts(2, [torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.3])]).tolist()
        [1, 1]
    """
    wide = any(s.dtype == torch.float64 for s in scores)
    keys = [_order_keys(s, wide) for s in scores]
    ends = torch.iinfo(keys[0].dtype)
    low = torch.full((), ends.min, dtype=torch.int64, device=keys[0].device)
    high = torch.full_like(low, ends.max)
    for _ in range(ends.bits):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, of numbers whose sum may not fit
        enough = torch.stack([(k <= middle).sum() for k in keys]).sum() >= masked
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    below = torch.stack([(k < high).sum() for k in keys])
    ties = torch.stack([(k == high).sum() for k in keys])
    before = ties.cumsum(0) - ties
    return below + torch.minimum((masked - below.sum() - before).clamp(min=0), ties)


def _order_keys(scores: Tensor, wide: bool) -> Tensor:
    # Positive floats order like their bits; negative ones the other way round. Adding 0 makes -0.0 equal 0.0.
    floats, ints = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    bits = (scores.reshape(-1).to(floats) + 0.0).view(ints)
    return torch.where(bits >= 0, bits, bits ^ torch.iinfo(ints).max)
