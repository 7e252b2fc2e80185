"""How a sparse tensor becomes bytes and comes back: a bit for each element, or a byte for each gap between values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import FileError

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

    @property
    def nbytes(self) -> int:
        """Bytes of both parts."""
        return self.index.nbytes + self.values.nbytes


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
    positions = (_read_bits if encoded.kind == "bits" else _read_gaps)(index.numpy(), n)
    if len(positions) != len(values):
        raise FileError(f"an index of {len(positions)} values, and {len(values)} of them")
    tensor = torch.zeros(shape, dtype=dtype)
    # Written as bits, since a cast to the same dtype may make another nan of one.
    exact = values.dtype == dtype
    bits = _BITS[tensor.element_size()]
    flat: Any = (tensor.view(-1).view(bits)).numpy()
    flat[positions] = (values.view(bits) if exact else values.to(dtype).view(bits)).numpy()
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


def _read_bits(index: np.ndarray, n: int) -> np.ndarray:
    if len(index) != -(-n // 8):
        raise FileError(f"{len(index)} bytes of bits for {n} elements")
    flags = np.unpackbits(index, bitorder="little")
    if flags[n:].any():
        raise FileError(f"bits that are set beyond {n} elements")
    return np.flatnonzero(flags[:n])


def _read_gaps(index: np.ndarray, n: int) -> np.ndarray:
    has_value = index != _LONGEST
    ends = np.cumsum(index.astype(np.int64) + has_value)
    covered = int(ends[-1]) if len(ends) else 0
    if not 0 <= n - covered < _LONGEST:
        raise FileError(f"gaps that cover {covered} of {n} elements")
    return ends[has_value] - 1
