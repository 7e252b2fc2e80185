"""How much memory tensors and arrays take at the most, exactly, whatever the allocator makes of it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watching(TorchDispatchMode):
    """Counts the bytes of the storages that are alive after each operation, and NumPy's with them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._look([args, kwargs, out])
        return out

    def _look(self, *values: object) -> None:
        for key, (reference, size) in list(self.alive.items()):
            if reference.expired():
                self.now -= size
                del self.alive[key]
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now + tracemalloc.get_traced_memory()[0])


def peak(work: Callable[[], object]) -> int:
    """The most bytes that tensors that `work` touches, and arrays that it makes, take at once."""
    with _Watching():
        torch.ones(1).numpy()  # PyTorch imports much when it is first watched, which would count
    tracemalloc.start()
    try:
        with _Watching() as watching:
            work()
        return watching.peak
    finally:
        tracemalloc.stop()
