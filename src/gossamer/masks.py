"""Masks: one bool tensor a weight, True = kept, held outside the modules; applied, counted, packed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gossamer import sweeps
from gossamer.errors import FileError, closest

_CHUNK = 1 << 18
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Masks(Mapping[str, Tensor]):
    """A bool mask for every layer that takes part, by the layer's name.

    Args:
        weights: layer name → weight; every mask starts all True, on the weight's device.

    Example:
        >>> masks = Masks({"a": torch.ones(2, 2)})
        >>> masks["a"][0, 0] = False
        >>> masks.masked("a")
        1
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._masks = {name: torch.ones(w.shape, dtype=torch.bool, device=w.device) for name, w in weights.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def on(self, name: str, device: torch.device) -> Tensor:
        """A layer's mask on a device; it moves there for good, as the model has."""
        mask = self._masks[name]
        if mask.device != device:
            mask = self._masks[name] = mask.to(device)
        return mask

    def replace(self, name: str, mask: Tensor) -> None:
        """Puts another mask of the same shape in place of a layer's."""
        self._masks[name] = mask

    def masked(self, name: str) -> int:
        """How many weights of a layer are masked."""
        mask = self._masks[name]
        return mask.numel() - int(torch.count_nonzero(mask))

    def state_dict(self) -> dict[str, Tensor]:
        """All masks, eight to a byte: layer name → uint8 (first weight in the highest bit)."""
        return {name: pack(mask) for name, mask in self._masks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes masks back; all or none.

        Raises:
            FileError: layers or sizes are those of another network.
        """
        if set(state) != set(self._masks):
            odd = sorted(set(state) ^ set(self._masks))[0]
            where = "is missing in this network" if odd in state else "has no mask in the file"
            raise FileError(f"masks are of another network: layer {odd!r} {where}. {closest(odd, self._masks)}")
        for name, packed in state.items():
            if not isinstance(packed, Tensor):
                raise FileError(f"mask of {name!r} is a {type(packed).__name__} and no tensor; take another copy")
        loaded = {name: unpack(state[name], mask.shape, name).to(mask.device) for name, mask in self._masks.items()}
        self._masks = loaded


def pack(mask: Tensor) -> Tensor:
    """A bool tensor, eight to a byte.

    Example:
        >>> pack(torch.tensor([True, False, True]))
        tensor([160], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack(packed: Tensor, shape: Sequence[int], name: str = "mask") -> Tensor:
    """The bool tensor of a shape that was packed.

    Raises:
        FileError: the number of bytes is not that of the shape.

    Example:
        >>> unpack(torch.tensor([160], dtype=torch.uint8), (3,)).tolist()
        [True, False, True]
    """
    n = int(np.prod(tuple(shape), dtype=np.int64))
    if packed.dtype != torch.uint8 or packed.numel() != (n + 7) // 8:
        raise FileError(
            f"mask of {name!r} holds {packed.numel()} bytes of {packed.dtype}; shape {tuple(shape)} takes "
            f"{(n + 7) // 8} of torch.uint8"
        )
    bits = np.unpackbits(packed.cpu().numpy().reshape(-1), count=n)
    return torch.from_numpy(bits.view(np.bool_)).reshape(tuple(shape))


def zero_masked(tensors: Iterable[Tensor], mask: Tensor) -> None:
    """Sets tensors to exactly +0 wherever the mask is False, in place, be there nan or infinity.

    The bits of a weight, as an integer, times the mask's 1 or 0: one rounding-free pass that serves every dtype, and no
    -0 as a product of floats would leave.

    Args:
        tensors: floating, each of the mask's shape and on its device.
        mask: bool.

    Example:
        >>> weight = torch.tensor([-1.0, 2.0])
        >>> zero_masked([weight], torch.tensor([False, True]))
        >>> weight
        tensor([0., 2.])
    """
    tensors = list(tensors)
    if sweeps.zero(mask, tensors):
        return
    bits = [t.detach().view(_BITS[t.element_size()]) for t in tensors]
    if mask.device.type == "cpu" and mask.is_contiguous() and all(t.is_contiguous() for t in bits):
        flat_mask, bits = mask.view(-1), [t.view(-1) for t in bits]
        chunk = _CHUNK * torch.get_num_threads()  # a piece a thread, small enough that the next tensor finds it cached
        for start in range(0, mask.numel(), chunk):
            part = slice(start, start + chunk)
            for tensor in bits:
                tensor[part].mul_(flat_mask[part])
    else:
        for tensor in bits:
            tensor.mul_(mask)


def zero_at(tensors: Iterable[Tensor], positions: Tensor) -> None:
    """Sets tensors to zero at flat positions, in place.

    Args:
        tensors: contiguous.
        positions: int64, into the flattened tensors.

    Example:
        >>> weight = torch.ones(2, 2)
        >>> zero_at([weight], torch.tensor([3]))
        >>> weight[1, 1]
        tensor(0.)
    """
    for tensor in tensors:
        tensor.detach().view(-1)[positions] = 0
