"""How a sparse tensor becomes bytes and comes back: a bit for each element, or a byte for each gap between values."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import FileError
from gossamer.native import native

_LONGEST = 255
"""A gap byte of this value stands for so many zeros and no value after them."""

_BITS: Mapping[int, torch.dtype] = MappingProxyType({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64})
"""What an element of so many bytes is compared with zero as, so that -0.0 and nan stay what they are."""


@dataclass(frozen=True)
class Encoded:
    """A tensor without its zeros.

    Args:
        kind: 'bits' or 'gaps'.
        index: where the values are, uint8, 1-d.
        values: all that are not zero, in row-major order, 1-d.
    """

    kind: str
    index: Tensor
    values: Tensor


def encode(tensor: Tensor) -> Encoded:
    """Leaves the zeros of a tensor out, in the smaller of two ways. Bit-exact: -0.0 counts as a value.

    'bits' holds one bit for each element, set where there is a value, lowest bit first. 'gaps' holds one byte for each
    value: how many zeros precede it since the last one. 255 stands for 255 zeros and no value; so does every full 255
    of the zeros after the last value. (Gap coding as in Han et al. 2016, Deep Compression, with 8 bits.)

    Args:
        tensor: of any shape and any dtype of 1, 2, 4 or 8 bytes an element, on the CPU.

    Returns:
        The smaller encoding; 'bits' where both are the same.

    Example:
        >>> encode(torch.tensor([0.0, 0.0, 3.0, 0.0])).values
        tensor([3.])
        >>> encode(torch.cat([torch.zeros(300), torch.ones(1)])).index.tolist()
        [255, 45]
    """
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    alive = bits != 0
    positions = np.flatnonzero(alive.numpy())
    values = bits[alive].view(tensor.dtype)
    n_bits = -(-len(flat) // 8)
    if n_bits <= len(positions):  # gaps take a byte for each value at least
        return Encoded("bits", _bits(alive), values)
    index = _gaps(positions, len(flat))
    return Encoded("gaps", index, values) if len(index) < n_bits else Encoded("bits", _bits(alive), values)


def decode(encoded: Encoded, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor again, on the CPU.

    Nothing is taken on trust: the index must have exactly the values and cover exactly the elements that it says, and
    is looked at before memory is asked for. It can cover at most 255 elements a byte.

    Args:
        encoded: what `encode` gave; its values may be of another floating-point dtype.
        shape: of the tensor.
        dtype: of the tensor.

    Returns:
        The tensor.

    Raises:
        FileError: the parts do not fit each other, or the shape.

    Example:
        >>> decode(encode(torch.tensor([0, 7, 0])), (3,), torch.int64)
        tensor([0, 7, 0])
    """
    n = 1
    for size in shape:
        n *= size
    index, values = encoded.index, encoded.values
    if index.dtype != torch.uint8 or index.ndim != 1 or values.ndim != 1:
        raise FileError(f"an index of {index.dtype} and {index.ndim} axes, values of {values.ndim} axes")
    read = _Native(native(), index, n) if native() is not None else _Plain(index, n)
    count = read.count_bits() if encoded.kind == "bits" else read.count_gaps()
    if count != len(values):
        raise FileError(f"an index of {count} values, and {len(values)} of them")
    # A cast to the same dtype may make another nan of one.
    values = (values if values.dtype == dtype else values.to(dtype)).contiguous()
    tensor = torch.empty(shape, dtype=dtype)
    bits = _BITS[tensor.element_size()]
    (read.expand_bits if encoded.kind == "bits" else read.expand_gaps)(values.view(bits), tensor.view(-1).view(bits))
    return tensor


def _bits(alive: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(alive.numpy(), bitorder="little"))


def _gaps(positions: np.ndarray, n: int) -> Tensor:
    gaps = np.diff(positions, prepend=-1) - 1
    longest = gaps // _LONGEST
    after = n - 1 - (int(positions[-1]) if len(positions) else -1)
    index = np.full(len(gaps) + int(longest.sum()) + after // _LONGEST, _LONGEST, np.uint8)
    index[np.cumsum(longest + 1) - 1] = gaps % _LONGEST
    return torch.from_numpy(index)


class _Plain:
    """Reads an index in NumPy: what the compiled functions do, in a few plain lines."""

    def __init__(self, index: Tensor, n: int) -> None:
        self.index, self.n = index.numpy(), n

    def count_bits(self) -> int:
        _check_bits(len(self.index), self.n)
        flags = np.unpackbits(self.index, bitorder="little")
        if flags[self.n :].any():
            raise FileError(f"bits that are set beyond {self.n} elements")
        return int(np.count_nonzero(flags))

    def expand_bits(self, values: Tensor, out: Tensor) -> None:
        positions = np.flatnonzero(np.unpackbits(self.index, count=self.n, bitorder="little"))
        out.zero_().numpy()[positions] = values.numpy()

    def _ends(self) -> np.ndarray:
        return np.cumsum(self.index.astype(np.int64) + (self.index != _LONGEST))

    def count_gaps(self) -> int:
        ends = self._ends()
        _check_gaps(int(ends[-1]) if len(ends) else 0, self.n)
        return int(np.count_nonzero(self.index != _LONGEST))

    def expand_gaps(self, values: Tensor, out: Tensor) -> None:
        out.zero_().numpy()[self._ends()[self.index != _LONGEST] - 1] = values.numpy()


class _Native:
    """The same, compiled."""

    def __init__(self, library: Any, index: Tensor, n: int) -> None:
        self.library, self.index, self.n = library, index.contiguous(), n

    def count_bits(self) -> int:
        _check_bits(len(self.index), self.n)
        count = self.library.gossamer_count_bits(self.index.data_ptr(), self.n)
        if count < 0:
            raise FileError(f"bits that are set beyond {self.n} elements")
        return count

    def expand_bits(self, values: Tensor, out: Tensor) -> None:
        size = out.element_size()
        self.library.gossamer_expand_bits(
            self.index.data_ptr(), self.n, values.data_ptr(), len(values), out.data_ptr(), size
        )

    def count_gaps(self) -> int:
        covered = ctypes.c_int64()
        count = self.library.gossamer_count_gaps(self.index.data_ptr(), len(self.index), ctypes.byref(covered))
        _check_gaps(covered.value, self.n)
        return count

    def expand_gaps(self, values: Tensor, out: Tensor) -> None:
        self.library.gossamer_expand_gaps(
            self.index.data_ptr(), len(self.index), self.n, values.data_ptr(), out.data_ptr(), out.element_size()
        )


def _check_bits(length: int, n: int) -> None:
    if length != -(-n // 8):
        raise FileError(f"{length} bytes of bits for {n} elements")


def _check_gaps(covered: int, n: int) -> None:
    if not 0 <= n - covered < _LONGEST:
        raise FileError(f"gaps that cover {covered} of {n} elements")
