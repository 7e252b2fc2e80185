"""A convolution or a linear layer with all that follows it, as one operator: its weights, compiled, and its twin."""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.errors import ArgumentError, closest
from gossamer.native import Use, native
from gossamer.runtime.activations import ACTIVATIONS
from gossamer.runtime.values import Signature

_PLANS = 16
"""Plans that a layer keeps, one a shape and number of threads; the one that was used longest ago goes first."""

IN_PLACE, OUT_PLACE, BY_CHANNELS = 1, 2, 4
"""Whether the input, and what is written, lie in whole vectors, image after image; whether threads share channels where
planes are small."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution meets its input, (vertical, horizontal)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Layer(nn.Module):
    """y = activation(layer(x) + residual), or activation(layer(x)) + residual. The twin is plain PyTorch.

    Args:
        weight: [out channels, in channels of a group, height, width], or [out features, in features]; float32.
        bias: one an out channel, or None.
        geometry: of a convolution; None for a linear layer.
        activation: a name out of `ACTIVATIONS`.
        add_last: whether the residual is added after the activation.
        is_sparse: whether it is run by what is not zero; if not, PyTorch runs it.

    Raises:
        ArgumentError: the weight does not fit the geometry, or there is no such activation.

    Example:
        >>> weight = torch.zeros(4, 3, 3, 3); weight[:, 0, 1, 1] = 2.0
        >>> Layer(weight, None, Geometry(padding=(1, 1)), "relu")(torch.ones(1, 3, 5, 5)).unique()
        tensor([2.])
        >>> Layer(torch.eye(4)[:2], torch.ones(2))(torch.arange(4.0)).tolist()
        [1.0, 2.0]
    """

    kind = "layer"
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        geometry: Geometry | None = None,
        activation: str = "none",
        *,
        add_last: bool = False,
        is_sparse: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ArgumentError(f"unknown activation {activation!r}. {closest(activation, ACTIVATIONS)}")
        if geometry is None and weight.ndim != 2:
            raise ArgumentError(f"a weight of shape {tuple(weight.shape)}; a linear layer's has two axes")
        if geometry is not None and (weight.ndim != 4 or weight.shape[0] % geometry.groups):
            raise ArgumentError(
                f"a weight of shape {tuple(weight.shape)} in {geometry.groups} groups; it is [out channels, in "
                "channels of a group, height, width], and groups divide the out channels"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ArgumentError(f"a bias of shape {tuple(bias.shape)} for {weight.shape[0]} channels")
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())
        self.geometry, self.activation, self.add_last, self.is_sparse = geometry, activation, add_last, is_sparse
        self.expected: float | None = None  # of the dense time, by what `choice` knows
        self.is_measured = False  # whether that was measured
        self._layer: Handle | None = None
        self._plans: OrderedDict[tuple[int, ...], Handle] = OrderedDict()
        self._lock = threading.Lock()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[images, in channels, height, width], or […, in features] → the same with the out channels."""
        g = self.geometry
        if g is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = F.conv2d(x, self.weight, self.bias, g.stride, g.padding, g.dilation, g.groups)
        if residual is not None and not self.add_last:
            y = y + residual
        y = ACTIVATIONS[self.activation](y)
        return y + residual if residual is not None and self.add_last else y

    def signature(self, x: Signature, residual: Signature | None = None) -> Signature | None:
        """Of the result; None where the kernel cannot give it."""
        g = self.geometry or Geometry()
        if x.is_tokens != (self.geometry is None) or x.channels != self.weight.shape[1] * g.groups:
            return None
        if x.dtype != self.weight.dtype:
            return None
        kernel = self.weight.shape[2:] or (1, 1)
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.size, g.padding, g.dilation, kernel, g.stride, strict=True)
        ]
        result = x.with_channels(len(self.weight), size)
        return result if min(size) > 0 and (residual is None or residual == result) else None

    @property
    def sparsity(self) -> float:
        """Zeros in percent of the weight."""
        return 100 * (1 - int(torch.count_nonzero(self.weight)) / max(1, self.weight.numel()))

    @property
    def is_pointwise(self) -> bool:
        """Whether each pixel, or token, is met by itself."""
        g = self.geometry
        return g is None or (
            tuple(self.weight.shape[2:]) == (1, 1) and g.stride == (1, 1) and g.padding == (0, 0) and g.groups == 1
        )

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel meets one input channel alone."""
        return self.geometry is not None and self.geometry.groups > 1 and self.weight.shape[1] == 1

    def extra_repr(self) -> str:
        """What it does, in short."""
        shape = "×".join(map(str, self.weight.shape))
        where = f", stride={self.geometry.stride}, padding={self.geometry.padding}" if self.geometry else ""
        return (
            f"{shape}{where}, {self.activation}, {self.sparsity:.1f} % zeros, {'sparse' if self.is_sparse else 'dense'}"
        )

    # -- compiled -----------------------------------------------------------------------------------------------------

    def plan(self, x: Signature, threads: int, direct: int = 0, isa: int = -1) -> Handle | None:
        """How the compiled kernels run it on an input; None where they cannot. Whoever holds it keeps it.

        Args:
            x: the input.
            threads: how many share it.
            direct: `IN_PLACE`, `OUT_PLACE` and `BY_CHANNELS`, added.
            isa: which of the machine's instruction sets, best first; -1 for what suits the layer.
        """
        key = (x.images, *x.size, threads, direct, isa)
        with self._lock:
            plan = self._plans.pop(key, None)
            if plan is None:
                why = ctypes.c_char_p()
                use = Use(x.images, *x.size, threads, isa, direct, 0)
                pointer = native().gossamer_plan_new(self._native().pointer, ctypes.byref(use), ctypes.byref(why))
                if not pointer:
                    return None
                plan = Handle(pointer, native().gossamer_plan_free, self._layer)
            self._plans[key] = plan
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
            return plan

    def cost(self, x: Signature, threads: int, direct: int = 0, isa: int = -1) -> float | None:
        """What a plan would be expected to take, without making it; None where there can be none."""
        why, use = ctypes.c_char_p(), Use(x.images, *x.size, threads, isa, direct, 1)
        pointer = native().gossamer_plan_new(self._native().pointer, ctypes.byref(use), ctypes.byref(why))
        if not pointer:
            return None
        return float(native().gossamer_plan_cost(Handle(pointer, native().gossamer_plan_free).pointer))

    def dense_cost(self, x: Signature) -> float:
        """What PyTorch is expected to take, in the units of a plan's cost."""
        use = Use(x.images, *x.size, 1, -1, 0, 0)
        return float(native().gossamer_dense_cost(self._native().pointer, ctypes.byref(use)))

    def _native(self) -> Handle:
        if self._layer is None:
            g = self.geometry or Geometry()
            sizes = (*self.weight.shape, 1, 1)[:4]
            shape = (*sizes, g.groups, *g.stride, *g.padding, *g.dilation)
            weight = self.weight.contiguous()  # whatever layout the network was brought into since
            pointer = native().gossamer_layer_new(
                weight.data_ptr(),
                None if self.bias is None else self.bias.data_ptr(),
                (ctypes.c_int32 * len(shape))(*shape),
            )
            if not pointer:
                raise MemoryError("not enough memory for a sparse layer")
            self._layer = Handle(pointer, native().gossamer_layer_free)
        return self._layer

    # A copied or pickled network makes its own.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer": None, "_plans": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def _apply(self, fn: Any, recurse: bool = True) -> Layer:
        super()._apply(fn, recurse)  # moved, or cast: what was compiled is of the old weights
        self._layer, self._plans = None, OrderedDict()
        return self


class Handle:
    """What the library made, freed when nobody holds it any more."""

    def __init__(self, pointer: int, free: Callable[[int], None], keeps: Handle | None = None) -> None:
        self.pointer, self._free, self._keeps = pointer, free, keeps

    def __del__(self) -> None:
        self._free(self.pointer)
