"""Which weights live and die together? A rule for cutting a tensor's axes into units.

An axis has a letter: `o` output channel, `i` input channel, `d` `h` `w` the kernel's depth, height and width; a matrix
has `o` and `i`; a transposed convolution lists `i` before `o`, and its groups are an axis `g`. A granularity names the
letters that a unit spans: a filter of a Conv2d spans `i`, `h` and `w`, so there is one unit for each `o`. A block spans
a part of two axes, which are cut into blocks and what is inside them: `O` and `I`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from gossamer.errors import ArgumentError, closest
from gossamer.registry import Registry

SPATIAL = "dhw"


@dataclass(frozen=True)
class Granularity:
    """A set of axes that a unit spans.

    Args:
        name: what messages call it.
        conv: the letters that a unit spans in a convolution; `s` stands for all of the kernel's axes. None where the
            granularity has no meaning for convolutions.
        matrix: the same for Linear (output, input) and Embedding (entry, dimension).
        block: output channels and input channels that a unit takes together, such as (16, 16); None for all or one.

    Raises:
        ArgumentError: a letter that is none of o, i, d, h, w, s, or no letters at all; a block of no positive sizes, or
            of an axis that the unit spans anyway.

    Example:
        >>> pairs = Granularity("pairs", conv="ow", matrix="o")
        >>> pairs.spans("oihw")
        (0, 3)
    """

    name: str
    conv: str | None = None
    matrix: str | None = None
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for letters, allowed in ((self.conv, "oidhws"), (self.matrix, "oi")):
            if not isinstance(letters, (str, type(None))):
                raise ArgumentError(
                    f"granularity {self.name!r} spans {letters!r}; give a string out of {', '.join(allowed)}, or None"
                )
            wrong = set(letters or "") - set(allowed)
            if wrong:
                raise ArgumentError(
                    f"granularity {self.name!r} spans axis {min(wrong)!r}; axes here are {', '.join(allowed)}"
                )
            if self.block is not None and set(letters or "") & set("oi"):
                raise ArgumentError(
                    f"granularity {self.name!r} spans a whole axis out of o and i, and blocks of it; leave one out"
                )
        sizes: object = self.block
        if sizes is not None and not (
            isinstance(sizes, tuple)
            and len(sizes) == 2
            and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
        ):
            raise ArgumentError(
                f"granularity {self.name!r} has a block of {sizes!r}; give output channels and input channels, such as "
                "(16, 16)"
            )

    def spans(self, axes: str) -> tuple[int, ...]:
        """The positions, among a tensor's axes, that a unit spans.

        Args:
            axes: the tensor's axis letters in order, such as 'oihw'.

        Returns:
            Positions in increasing order; none where every weight is a unit.

        Raises:
            ArgumentError: this granularity needs an axis that the tensor lacks.

        Example:
            >>> GRANULARITIES["kernel"].spans("oihw"), GRANULARITIES["weight"].spans("oi")
            ((2, 3), ())
        """
        is_conv = any(a in SPATIAL for a in axes)
        letters = self.conv if is_conv else self.matrix
        if letters is None or set(letters) - set(axes) - {"s"}:
            fitting = [name for name in GRANULARITIES if fits(GRANULARITIES[name], axes)]
            raise ArgumentError(
                f"granularity {self.name!r} does not fit a weight with axes {', '.join(axes)}. "
                f"{closest(self.name, fitting)} All that fit: {', '.join(fitting)}."
            )
        wanted = set(letters) | (set(SPATIAL) if "s" in letters else set()) | ({"g"} if "o" in letters else set())
        return tuple(i for i, a in enumerate(axes) if a in wanted)

    def cut(self, axes: str, view: Sequence[int]) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Axes and lengths of a weight with blocks as axes of their own, and which of these a unit spans.

        Args:
            axes: the tensor's axis letters in order.
            view: their lengths.

        Returns:
            Letters, lengths (of as many elements, in the same order) and the positions that a unit spans.

        Raises:
            ArgumentError: this granularity needs an axis that the tensor lacks, or a channel count does not divide.

        Example:
            >>> as_granularity("2x4").cut("oi", (8, 12))
            ('oOiI', (4, 2, 3, 4), (1, 3))
        """
        dims = self.spans(axes)
        if self.block is None:
            return axes, tuple(view), dims
        sizes = dict(zip("oi", self.block, strict=True))
        letters, lengths = "", list[int]()
        for letter, n in zip(axes, view, strict=True):
            size = sizes.get(letter)
            if size is None:
                letters, lengths = letters + letter, [*lengths, n]
                continue
            if n % size:
                what = "output" if letter == "o" else "input"
                raise ArgumentError(f"{n} {what} channels do not divide into blocks of {size}")
            letters, lengths = letters + letter + letter.upper(), [*lengths, n // size, size]
        spanned = {axes[d] for d in dims} | {"O", "I"}
        return letters, tuple(lengths), tuple(i for i, a in enumerate(letters) if a in spanned)


def fits(granularity: Granularity, axes: str) -> bool:
    """Whether a granularity has a meaning for a tensor with these axes.

    Example:
        >>> fits(GRANULARITIES["column"], "oiw"), fits(GRANULARITIES["row"], "oiw")
        (False, True)
    """
    letters = granularity.conv if any(a in SPATIAL for a in axes) else granularity.matrix
    return letters is not None and not set(letters) - set(axes) - {"s"}


def pool(scores: Tensor, dims: Sequence[int], reduction: Reduction | None = None) -> Tensor:
    """One score a unit: by default the mean over the weights of the unit.

    Args:
        scores: scores of weights, viewed with one axis a letter.
        dims: the axes that a unit spans.
        reduction: how the scores of a unit become one.

    Returns:
        Scores of units; spanned axes have length 1. Where a weight is a unit, its own score.

    Example:
        >>> pool(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), [1])
        tensor([[2.],
                [6.]])
    """
    return (reduction or reduce_mean)(scores, tuple(dims)) if dims else scores


Reduction = Callable[[Tensor, tuple[int, ...]], Tensor]
"""(scores, axes that a unit spans) → one score a unit, the spanned axes kept with length 1."""

REDUCTIONS: Registry[Reduction] = Registry("reduction")


def _reduction(name: str) -> Callable[[Reduction], Reduction]:
    return lambda func: REDUCTIONS.register(name, func)


@_reduction("mean")
def reduce_mean(scores: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean: large units have no advantage over small ones."""
    return scores.mean(dim=dims, keepdim=True)


@_reduction("sum")
def reduce_sum(scores: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum: in a global context, large units count for all their weights."""
    return scores.sum(dim=dims, keepdim=True)


@_reduction("l2")
def reduce_l2(scores: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The root of the sum of squares; of magnitudes, the norm of the unit (Li et al. 2017, arXiv:1608.08710, has
    both).
    """
    return torch.linalg.vector_norm(scores, dim=dims, keepdim=True)


@_reduction("max")
def reduce_max(scores: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest: one weight that matters keeps its unit."""
    return scores.amax(dim=dims, keepdim=True)


def as_reduction(reduction: Reduction | str) -> Reduction:
    """A reduction from a registered name, or a function of its own.

    Args:
        reduction: the value given.

    Raises:
        ArgumentError: the name is unknown, or it is neither.

    Example:
        >>> as_reduction("l2") is reduce_l2
        True
    """
    if isinstance(reduction, str):
        return REDUCTIONS[reduction]
    if not callable(reduction):
        raise ArgumentError(f"reduction={reduction!r} is neither a function nor a name; {', '.join(REDUCTIONS)} are")
    return reduction


def expand(units: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of units → a mask of weights.

    Args:
        units: bool, spanned axes of length 1.
        shape: the weights' shape, one axis a letter.

    Returns:
        A new contiguous bool tensor of that shape.

    Example:
        >>> import torch
        >>> expand(torch.tensor([[True], [False]]), (2, 2)).tolist()
        [[True, True], [False, False]]
    """
    return units.expand(tuple(shape)).contiguous()


def units_of(mask: Tensor, dims: Sequence[int]) -> Tensor:
    """A mask of weights → the mask of units that it came from.

    Args:
        mask: bool, one axis a letter, constant over every unit.
        dims: the axes that a unit spans.

    Returns:
        A view of the mask; spanned axes have length 1.

    Example:
        >>> import torch
        >>> units_of(torch.tensor([[True, True], [False, False]]), [1]).tolist()
        [[True], [False]]
    """
    for dim in dims:
        mask = mask.narrow(dim, 0, 1)
    return mask


GRANULARITIES: Registry[Granularity] = Registry("granularity", Granularity)

_RULES = MappingProxyType(
    {
        # 0 axes
        "weight": ("", ""),
        # 1 axis. 'vector' is the 1-D sub-kernel vector of Mao et al. 2017 (arXiv:1705.08922): a row of a kernel.
        "vector": ("w", "i"),
        "shared_weight": ("o", None),
        "channel": ("i", None),
        "column": ("h", "o"),
        "row": ("w", "i"),
        "depth": ("d", None),
        # 2 axes
        "shared_channel": ("oi", None),
        "shared_column": ("oh", None),
        "shared_row": ("ow", None),
        "vertical_slice": ("ih", None),
        "horizontal_slice": ("iw", None),
        "kernel": ("s", None),
        # 3 axes
        "shared_vertical_slice": ("oih", None),
        "shared_horizontal_slice": ("oiw", None),
        "shared_kernel": ("os", None),
        "filter": ("is", "i"),
        # everything
        "layer": ("ois", "oi"),
    }
)
for _name, (_conv, _matrix) in _RULES.items():
    GRANULARITIES.register(_name, Granularity(_name, _conv, _matrix))
for _o, _i in ((1, 4), (4, 1), (4, 4), (16, 16)):
    GRANULARITIES.register(f"block_{_o}x{_i}", Granularity(f"block_{_o}x{_i}", "", "", (_o, _i)))


def as_granularity(granularity: Granularity | str) -> Granularity:
    """A granularity from a registered name, from the sizes of a block such as '16x16' or '1×4', or itself.

    Args:
        granularity: the value given.

    Raises:
        ArgumentError: the name is unknown, or it is neither.

    Example:
        >>> as_granularity("filter").conv, as_granularity("8x1").block
        ('is', (8, 1))
    """
    if isinstance(granularity, Granularity):
        return granularity
    if isinstance(granularity, str):
        sizes = re.fullmatch(r"(\d+)[x×](\d+)", granularity)
        if sizes is not None:
            block = int(sizes[1]), int(sizes[2])
            return Granularity(f"block_{block[0]}x{block[1]}", "", "", block)
        return GRANULARITIES[granularity]
    raise ArgumentError(f"granularity {granularity!r} is neither a name nor a Granularity; try 'weight' or 'filter'")


def view_of(axes: str, shape: Sequence[int], groups: int = 1) -> tuple[str, tuple[int, ...]]:
    """Axes and shape under which a weight is cut: groups of a transposed convolution get an axis of their own.

    Args:
        axes: letters of the weight's own axes.
        shape: the weight's own shape.
        groups: groups of the convolution.

    Returns:
        Letters and lengths, of as many elements as the weight, in its own order.

    Example:
        >>> view_of("iohw", (8, 2, 3, 3), groups=4)
        ('giohw', (4, 2, 2, 3, 3))
    """
    if groups > 1 and axes.startswith("io"):
        return "g" + axes, (groups, shape[0] // groups, *shape[1:])
    return axes, tuple(shape)


def output_channels(units: Tensor, axes: str, dims: Sequence[int]) -> Tensor | None:
    """Which output channels a mask of units keeps, where a unit is a whole output channel by its rule.

    Args:
        units: bool, spanned axes of length 1.
        axes: letters of those axes.
        dims: the axes that a unit spans.

    Returns:
        bool of shape (output channels,), or None where units are something else.

    Example:
        >>> import torch
        >>> output_channels(torch.tensor([[[[True]]], [[[False]]]]), "oihw", (1, 2, 3)).tolist()
        [True, False]
    """
    if {axes[d] for d in dims} != set(axes) - {"g", "o"}:
        return None
    return units.reshape(-1)
