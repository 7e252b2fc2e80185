"""How many units does each layer keep? Target and scores → a count of masked units for every layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gossamer.errors import ArgumentError
from gossamer.registry import Registry
from gossamer.rules.densities import Densities, er, erk, uniform_plus

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
    share = Fraction(fraction)
    return (2 * share.numerator * n + share.denominator) // (2 * share.denominator)


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
