"""What a value in a compiled network is: its axes, its element type, and where it lies in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_LINE = 64
"""Bytes of a cache line, and of the widest vector."""

FEW = 8
"""Tokens, or pixels, below which a vector would be mostly empty: their kernel reads and writes any layout."""


@dataclass(frozen=True)
class Signature:
    """The axes of a value: images of channels, or tokens of features, which are images of one pixel.

    Args:
        shape: PyTorch's: [images, channels, height, width], or [..., features] where `is_tokens`.
        is_tokens: whether the last axis is the channels.
        dtype: of an element.

    Example:
        >>> s = Signature((2, 50, 768), is_tokens=True)
        >>> s.images, s.channels, s.pixels
        (100, 768, 1)
    """

    shape: tuple[int, ...]
    is_tokens: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def images(self) -> int:
        """Images, or tokens."""
        return math.prod(self.shape[:-1]) if self.is_tokens else self.shape[0]

    @property
    def channels(self) -> int:
        """Channels, or features."""
        return self.shape[-1] if self.is_tokens else self.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return (1, 1) if self.is_tokens else (self.shape[2], self.shape[3])

    @property
    def pixels(self) -> int:
        """Height times width."""
        return math.prod(self.size)

    def with_channels(self, channels: int, size: Sequence[int] | None = None) -> Signature:
        """The same with other channels, and for images another size."""
        if self.is_tokens:
            return Signature((*self.shape[:-1], channels), True, self.dtype)
        return Signature((self.shape[0], channels, *(self.size if size is None else size)), False, self.dtype)


@dataclass(frozen=True)
class Layout:
    """How far apart channels and images lie, in elements; the rows of an image follow each other.

    Example:
        >>> as_torch(Signature((2, 3, 4, 5)))
        Layout(channel=20, image=60)
        >>> planar(Signature((2, 3, 4, 5)))
        Layout(channel=48, image=20)
    """

    channel: int
    image: int


def as_torch(value: Signature) -> Layout:
    """A contiguous tensor's."""
    if value.is_tokens:
        return Layout(1, value.channels)
    return Layout(value.pixels, value.channels * value.pixels)


def planar(value: Signature) -> Layout:
    """Channel after channel, each with all images in whole lines of the cache: what vectors run along.

    An odd number of lines, so that neighbours do not compete for the same places in the cache. A few numbers a channel
    are packed.
    """
    if value.images * value.pixels < FEW:
        return Layout(value.images * value.pixels, value.pixels)
    line = _LINE // value.dtype.itemsize
    lines = in_lines(value.images * value.pixels, value.dtype) // line
    return Layout(line * (lines | 1), value.pixels)


def in_lines(n: int, dtype: torch.dtype) -> int:
    """So many elements, and as many more as fill the last line of the cache: what follows them begins at a line.

    Example:
        >>> in_lines(17, torch.float32)
        32
    """
    line = _LINE // dtype.itemsize
    return -(-n // line) * line


def arrange(sizes: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Where each of some values lies in one piece of memory, so that those that live at once do not overlap.

    Args:
        sizes: of each, in elements.
        spans: the first and the last step in which each is used.

    Returns:
        Where each begins, and how much there is in all. The largest are placed first, each as low as it fits.

    Example:
        >>> arrange([4, 2, 4], [(0, 1), (1, 2), (2, 3)])
        ([0, 4, 0], 6)
    """
    places = [0] * len(sizes)
    placed: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], spans[i])):
        at = 0
        together = [j for j in placed if spans[j][0] <= spans[i][1] and spans[i][0] <= spans[j][1]]
        for j in sorted(together, key=lambda j: places[j]):
            if at + sizes[i] <= places[j]:
                break
            at = max(at, places[j] + sizes[j])
        places[i] = at
        placed.append(i)
    return places, max((places[i] + sizes[i] for i in range(len(sizes))), default=0)
