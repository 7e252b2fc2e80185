"""How many units does each layer keep? Target and scores → a count of masked units for every layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ArgumentError
from gossamer.registry import Registry
from gossamer.rules.densities import Densities, er, erk, uniform_plus

_CHUNK = 1 << 18
_KINDS = ("local", "global", "output", "n:m")


def as_fraction(percent: float, what: str = "sparsity") -> Fraction:
    """A percentage as an exact fraction, read as it is written: 2.3 is 23/1000, not the nearest binary number.

    Args:
        percent: from 0 to 100.
        what: it is, for the message.

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
        raise ArgumentError(f"{what} {percent!r} is no number; give a percentage from 0 to 100") from None
    if not 0 <= value <= 100:
        raise ArgumentError(f"{what} {percent!r} is outside [0, 100]; it is a percentage, so 50 means half")
    return Fraction(repr(value)) / 100


@dataclass(frozen=True)
class Context:
    """Which units compete with which, and how many each layer gives.

    Args:
        kind: 'local' (inside each layer), 'output' (inside each output channel), 'n:m' (inside blocks of m inputs) or
            'global' (across all layers).
        n: units that a block keeps, for 'n:m'.
        m: units in a block, for 'n:m'.
        floor: percent of its units that every layer masks at least, for 'global'.
        ceiling: percent of its units that no layer masks more than, for 'global'. Even at 100 a layer of several units
            keeps one of them, unless the target leaves too few for that.
        normalization: how scores of different layers are made comparable, for 'global': a name, see
            `rules.normalization`; '' where the run decides.
        densities: what gives each layer its own target, for 'local' and 'output': a function of the network's target
            and the layers' shapes, see `rules.densities`; None for the same target everywhere.
        name: what messages call it.

    Raises:
        ArgumentError: another kind, N larger than M, or something that the kind has no use for.

    Example:
        >>> str(as_context("2:4")), str(Context("global", ceiling=95))
        ('2:4', 'global, 0 to 95 %')
    """

    kind: str
    n: int = 0
    m: int = 0
    floor: float = 0
    ceiling: float = 100
    normalization: str = ""
    densities: Densities | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ArgumentError(f"unknown context {self.kind!r}; use one of {', '.join(map(repr, _KINDS))}")
        if self.kind == "n:m" and not 0 < self.n <= self.m:
            raise ArgumentError(
                f"context '{self.n}:{self.m}' keeps {self.n} of every {self.m}; N must be at least 1 and at most M"
            )
        if self.kind != "n:m" and (self.n, self.m) != (0, 0):
            raise ArgumentError(f"context {self.kind!r} has no blocks, got n={self.n} and m={self.m}; leave them out")
        low, high = as_fraction(self.floor, "floor"), as_fraction(self.ceiling, "ceiling")
        if low > high:
            raise ArgumentError(f"context with floor={self.floor} above ceiling={self.ceiling}; exchange them")
        if self.kind != "global" and ((low, high) != (0, 1) or self.normalization):
            raise ArgumentError(
                f"context {self.kind!r} gives every layer its target, so floor, ceiling and normalization have nothing "
                "to do; they are for 'global'"
            )
        if self.densities is not None and (self.kind not in ("local", "output") or not callable(self.densities)):
            raise ArgumentError(
                f"densities={self.densities!r} with context {self.kind!r}; a function that gives each layer its target "
                "goes with 'local' or 'output'"
            )

    @property
    def fraction(self) -> Fraction | None:
        """The sparsity that an N:M pattern means, None for the others.

        Example:
            >>> as_context("1:4").fraction
            Fraction(3, 4)
        """
        return Fraction(self.m - self.n, self.m) if self.m else None

    @property
    def is_pooled(self) -> bool:
        """Whether layers compete with each other.

        Example:
            >>> as_context("lamp").is_pooled, as_context("erk").is_pooled
            (True, False)
        """
        return self.kind == "global"

    @property
    def is_shared(self) -> bool:
        """Whether the target is the network's, and each layer's own follows from it.

        Example:
            >>> as_context("erk").is_shared, as_context("local").is_shared
            (True, False)
        """
        return self.is_pooled or self.densities is not None

    def bounds(self, fraction: Fraction, units: Sequence[int], masked: int) -> tuple[list[int], list[int]]:
        """The least and the most units that each of the competing layers masks.

        Args:
            fraction: of all units, to mask now; a floor above it waits until it is reached.
            units: how many each layer has.
            masked: how many are to be masked in all of them; bounds that would not allow so many give way. In a layer
                so small that no whole number lies between its floor and its ceiling, the floor does.

        Example:
            >>> Context("global", ceiling=50).bounds(Fraction(1, 4), [10, 1], 3)
            ([0, 0], [5, 1])
        """
        low = min(as_fraction(self.floor), fraction)
        high = as_fraction(self.ceiling)
        least = [math.ceil(low * n) for n in units]
        if sum(least) > masked:
            least = [math.floor(low * n) for n in units]
        most = [min(math.floor(high * n), n - 1) if n > 1 else n for n in units]
        if sum(most) < masked:
            most = [max(math.ceil(high * n), 1) for n in units]
        if sum(most) < masked:
            most = list(units)
        return [min(pair) for pair in zip(least, most, strict=True)], most

    def __str__(self) -> str:
        if self.m:
            return f"{self.n}:{self.m}"
        name = self.name or self.kind
        if (self.floor, self.ceiling) == (0, 100):
            return name
        return f"{name}, {self.floor:g} to {self.ceiling:g} %"


CONTEXTS: Registry[Context] = Registry("context", Context)
for _context in (
    Context("local", name="local"),
    Context("global", name="global"),
    Context("output", name="output"),
    Context("global", normalization="lamp", name="lamp"),
    Context("local", densities=er, name="er"),
    Context("local", densities=erk, name="erk"),
    Context("local", densities=uniform_plus, name="uniform_plus"),
):
    CONTEXTS.register(_context.name, _context)


def as_context(context: Context | str) -> Context:
    """A context from a registered name, or from an N:M pattern such as '2:4'.

    Args:
        context: the value given.

    Raises:
        ArgumentError: it is none of these, or N is larger than M.

    Example:
        >>> as_context("global").kind
        'global'
    """
    if isinstance(context, Context):
        return context
    if isinstance(context, str) and context in CONTEXTS:
        return CONTEXTS[context]
    pattern = re.fullmatch(r"(\d+):(\d+)", context) if isinstance(context, str) else None
    if pattern is None:
        raise ArgumentError(
            f"unknown context {context!r}; use {', '.join(map(repr, CONTEXTS))}, or a pattern N:M such as '2:4'"
        )
    return Context("n:m", int(pattern[1]), int(pattern[2]))


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
        ArgumentError: an N:M pattern means another sparsity, or it lies outside a floor and a ceiling.

    Example:
        >>> check_target(as_fraction(50), as_context("2:4"))
    """
    pattern = context.fraction
    if pattern is not None and fraction not in (0, pattern):
        raise ArgumentError(
            f"context '{context}' masks {float(pattern * 100):g} % of every layer, got sparsity "
            f"{float(fraction * 100):g}; pass sparsity={float(pattern * 100):g}"
        )
    if fraction and not as_fraction(context.floor) <= fraction <= as_fraction(context.ceiling):
        raise ArgumentError(
            f"sparsity {float(fraction * 100):g} lies outside floor={context.floor} and ceiling={context.ceiling} of "
            "the context, which every layer keeps to; widen them"
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


class Slices(Protocol):
    """Scores of a layer's units, flat: a 1-D tensor, or something that computes slices when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Tensor: ...


def global_counts(
    masked: int, scores: Sequence[Slices], bounds: tuple[Sequence[int], Sequence[int]] | None = None
) -> Tensor:
    """The same split found by counting alone: no sort, no copy to the host, memory that does not grow with the model.

    Floats order like the integers that their bits spell. A histogram of every layer's leading 11 bits says in which bin
    the threshold lies, one of the next 11 bits where in that bin, and after three (six where a score is float64) the
    threshold is known exactly.

    Args:
        masked: units to mask in all layers together.
        scores: for each layer, a score for every unit, flat; float32 or float64, no nan. Each is gone through a few
            times, one layer after the other.
        bounds: the least and the most units that each layer masks; their sums lie below and above `masked`.

    Returns:
        int64, one count a layer, on the scores' device.

    Example:
        >>> global_counts(2, [torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.3])]).tolist()
        [1, 1]
        >>> global_counts(2, [torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])], ([0, 0], [1, 2])).tolist()
        [1, 1]
    """
    samples = [s[0:1] for s in scores]
    device, wide = samples[0].device, any(s.dtype == torch.float64 for s in samples)
    chunk = _CHUNK if device.type == "cpu" else max(len(s) for s in scores)
    limits = [torch.tensor(b, dtype=torch.int64, device=device) for b in bounds or ()]
    below = torch.zeros(len(scores), dtype=torch.int64, device=device)  # units whose leading bits are lower
    prefix = torch.zeros((), dtype=torch.int64, device=device)  # those bits of the threshold
    ties, left = below, 64 if wide else 32
    while left:
        width = min(_BITS, left)
        counts = torch.stack(
            [
                sum(
                    (
                        _histogram(_order_keys(layer[start : start + chunk], wide), prefix, left, width)
                        for start in range(0, len(layer), chunk)
                    ),
                    torch.zeros(1 << width, dtype=torch.int64, device=device),
                )
                for layer in scores
            ]
        )
        up_to = below[:, None] + counts.cumsum(1)
        here = up_to if bounds is None else up_to.clamp(*(limit[:, None] for limit in limits))
        digit = (here.sum(0) < masked).sum().clamp(max=(1 << width) - 1)
        ties = counts.index_select(1, digit.view(1)).squeeze(1)
        below = up_to.index_select(1, digit.view(1)).squeeze(1) - ties
        prefix, left = prefix << width | digit, left - width
    all_ties = below + ties
    if bounds is not None:
        below, all_ties = below.clamp(*limits), all_ties.clamp(*limits)
    ties = all_ties - below
    before = ties.cumsum(0) - ties
    return below + torch.minimum((masked - below.sum() - before).clamp(min=0), ties)


_BITS = 11
"""That a histogram is over."""


def _histogram(keys: Tensor, prefix: Tensor, left: int, width: int) -> Tensor:
    """How many keys have each value in the leading `width` of the `left` bits behind a prefix; [2^width], int64."""
    bins, bits = 1 << width, 8 * keys.element_size()
    digits = (keys >> (left - width)) & (bins - 1)
    if left < bits:
        digits = digits.where((keys >> left) & ((1 << (bits - left)) - 1) == prefix, bins)
    if keys.device.type == "cpu":
        return torch.bincount(digits, minlength=bins + 1)[:bins]
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=keys.device)  # where bincount would wait for the device
    return counts.scatter_add_(0, digits.to(torch.int64), torch.ones_like(digits, dtype=torch.int64))[:bins]


def _order_keys(scores: Tensor, wide: bool) -> Tensor:
    # Positive floats order like their bits; negative ones the other way round. Adding 0 makes -0.0 equal 0.0.
    floats, ints = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    bits = (scores.reshape(-1).to(floats) + 0.0).view(ints)
    return torch.where(bits >= 0, bits ^ torch.iinfo(ints).min, ~bits)  # in the order of numbers without a sign
