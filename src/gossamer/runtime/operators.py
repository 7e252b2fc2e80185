"""A convolution or a linear layer with all that follows it, as one operator: compiled, and its PyTorch twin."""

from __future__ import annotations

import ctypes
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.errors import ArgumentError, closest
from gossamer.native import Step, native

_PLANS = 16
"""Plans that a layer keeps, one a shape and number of threads; the one that was used longest ago goes first."""

_FEW = 8
"""Tokens below which a vector would be mostly empty."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {  # in the order of src/native/kernels.h
        "none": lambda x: x,
        "relu": F.relu,
        "relu6": F.relu6,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "sigmoid": torch.sigmoid,
    }
)
"""What may follow a layer, by name."""

_CODES: Mapping[str, int] = MappingProxyType({name: i for i, name in enumerate(ACTIVATIONS)})


@dataclass(frozen=True)
class Geometry:
    """How a convolution meets its input, (vertical, horizontal)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Convolution(nn.Module):
    """y = activation(conv2d(x, weight) + bias + residual), on a CPU, by the weights that are not zero.

    Without the compiled library, for other dtypes and on other devices, it is PyTorch's convolution and what follows.

    Args:
        weight: [out channels, in channels / groups, height, width], float32.
        bias: [out channels], or None.
        geometry: stride, padding, dilation, groups.
        activation: a name out of `ACTIVATIONS`.
        add_last: whether the residual is added after the activation.
        is_sparse: whether the compiled kernels run it; else PyTorch's dense ones do.

    Raises:
        ArgumentError: shapes that do not fit each other, or an unknown activation.

    Example:
        >>> weight = torch.zeros(4, 3, 3, 3); weight[:, 0, 1, 1] = 2.0
        >>> conv = Convolution(weight, None, Geometry(padding=(1, 1)), "relu")
        >>> conv(torch.ones(1, 3, 5, 5)).unique()
        tensor([2.])
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        geometry: Geometry = Geometry(),
        activation: str = "none",
        *,
        add_last: bool = False,
        is_sparse: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ArgumentError(f"unknown activation {activation!r}. {closest(activation, ACTIVATIONS)}")
        if weight.ndim != 4 or weight.shape[0] % geometry.groups:
            raise ArgumentError(
                f"a weight of shape {tuple(weight.shape)} in {geometry.groups} groups; it is [out channels, in "
                "channels of a group, height, width], and groups divide the out channels"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ArgumentError(f"a bias of shape {tuple(bias.shape)} for {weight.shape[0]} channels")
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())
        self.geometry, self.activation, self.add_last, self.is_sparse = geometry, activation, add_last, is_sparse
        self._isa = 0  # the best that there is
        self._layer: _Handle | None = None
        self._plans: OrderedDict[tuple[int, ...], _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[images, in channels, height, width] → [images, out channels, out height, out width].

        Args:
            x: the input.
            residual: what is added, of the output's shape.
        """
        if not self._fits(x) or (residual is not None and not self._fits(residual)):
            return self.reference(x, residual)
        return self._compiled(x, residual)

    def reference(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same in PyTorch."""
        g = self.geometry
        y = F.conv2d(x, self.weight, self.bias, g.stride, g.padding, g.dilation, g.groups)
        if residual is not None and not self.add_last:
            y = y + residual
        y = ACTIVATIONS[self.activation](y)
        return y + residual if residual is not None and self.add_last else y

    @property
    def sparsity(self) -> float:
        """Zeros in percent of the weight."""
        return 100 * (1 - int(torch.count_nonzero(self.weight)) / max(1, self.weight.numel()))

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel meets one input channel alone."""
        return self.geometry.groups > 1 and self.weight.shape[1] == 1

    def extra_repr(self) -> str:
        """What it does, in short."""
        g = self.geometry
        shape = "×".join(map(str, self.weight.shape))
        kernel = "sparse" if self.is_sparse else "dense"
        return (
            f"{shape}, stride={g.stride}, padding={g.padding}, {self.activation}, {self.sparsity:.1f} % zeros, {kernel}"
        )

    # -- compiled -----------------------------------------------------------------------------------------------------

    def _fits(self, x: Tensor) -> bool:
        return self.is_sparse and is_plain(x) and is_plain(self.weight) and x.ndim == 4 and native() is not None

    def _compiled(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = x.contiguous()
        images, channels, height, width = x.shape
        g, (out, of_group, *kernel) = self.geometry, self.weight.shape
        if channels != of_group * g.groups:
            raise ArgumentError(f"an input of {channels} channels, and the layer has {of_group * g.groups}")
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip((height, width), g.padding, g.dilation, kernel, g.stride, strict=True)
        ]
        if min(sizes) < 1:
            raise ArgumentError(f"an input of {height}×{width}, which is smaller than the kernel")
        y = x.new_empty((images, out, *sizes))
        if not y.numel():
            return y
        if residual is not None:
            residual = residual.expand_as(y).contiguous()
        threads = torch.get_num_threads()
        plan = self._plan(images, height, width, threads)
        if plan is None:
            return self.reference(x, residual)
        step = Step(
            plan.pointer,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            y.data_ptr(),
            images,
            _CODES[self.activation],
            int(self.add_last),
        )
        if native().gossamer_run(ctypes.byref(step), 1, threads):
            raise MemoryError("not enough memory for the scratch of a sparse layer")
        return y

    def _plan(self, images: int, height: int, width: int, threads: int) -> _Handle | None:
        """The plan for a shape; None where the compiled kernels cannot run it. Whoever holds it keeps it."""
        key = (images, height, width, threads)
        with self._lock:
            plan = self._plans.pop(key, None)
            if plan is None:
                why = ctypes.c_char_p()
                pointer = native().gossamer_plan_new(
                    self._native_layer().pointer, images, height, width, threads, self._isa, ctypes.byref(why)
                )
                if not pointer:
                    return None
                plan = _Handle(pointer, native().gossamer_plan_free, self._layer)
            self._plans[key] = plan
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
            return plan

    def _native_layer(self) -> _Handle:
        if self._layer is None:
            g = self.geometry
            shape = (*self.weight.shape, g.groups, *g.stride, *g.padding, *g.dilation)
            pointer = native().gossamer_layer_new(
                self.weight.data_ptr(),
                None if self.bias is None else self.bias.data_ptr(),
                (ctypes.c_int32 * len(shape))(*shape),
            )
            if not pointer:
                raise MemoryError("not enough memory for a sparse layer")
            self._layer = _Handle(pointer, native().gossamer_layer_free)
        return self._layer

    # A copied or pickled network makes its own.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer": None, "_plans": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def _apply(self, fn: Any, recurse: bool = True) -> Convolution:
        super()._apply(fn, recurse)  # moved, or cast: what was compiled is of the old weights
        self._layer, self._plans = None, OrderedDict()
        return self


class Linear(nn.Module):
    """y = activation(x weightᵀ + bias), by the weights that are not zero: a convolution of one pixel a token.

    Tokens lie along the vectors, so the input is turned and so is the output, without a copy: as a view. From one
    linear layer to the next nothing is copied at all.

    Args:
        weight: [out features, in features], float32.
        bias: [out features], or None.
        activation: a name out of `ACTIVATIONS`.
        is_sparse: as in `Convolution`.

    Example:
        >>> linear = Linear(torch.eye(4)[:2], torch.ones(2), "relu")
        >>> linear(torch.arange(4.0).expand(3, 4))
        tensor([[1., 2.],
                [1., 2.],
                [1., 2.]])
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, activation: str = "none", *, is_sparse: bool = True
    ) -> None:
        super().__init__()
        if weight.ndim != 2:
            raise ArgumentError(f"a weight of shape {tuple(weight.shape)}; a linear layer's has two axes")
        self.conv = Convolution(weight[:, :, None, None], bias, Geometry(), activation, is_sparse=is_sparse)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in features] → […, out features]; where it was compiled, a view of features by tokens."""
        out, features = self.conv.weight.shape[:2]
        tokens = math.prod(x.shape[:-1])
        if x.shape[-1] != features:
            raise ArgumentError(f"an input of {x.shape[-1]} features, and the layer has {features}")
        if not tokens or not self.conv._fits(x.new_empty((0, 0, 0, 0))):
            return self.reference(x)
        if tokens < _FEW:
            return self._few(x.reshape(tokens, features).contiguous()).reshape(*x.shape[:-1], out)
        turned = x.reshape(tokens, features).t()
        y = self.conv(turned.reshape(1, features, 1, tokens))
        return y.view(out, tokens).t().reshape(*x.shape[:-1], out)

    def _few(self, x: Tensor) -> Tensor:
        y = x.new_empty((len(x), len(self.conv.weight)))
        layer, code = self.conv._native_layer(), _CODES[self.conv.activation]
        native().gossamer_run_tokens(layer.pointer, x.data_ptr(), y.data_ptr(), len(x), code, torch.get_num_threads())
        return y

    def reference(self, x: Tensor) -> Tensor:
        """The same in PyTorch."""
        return ACTIVATIONS[self.conv.activation](F.linear(x, self.conv.weight.flatten(1), self.conv.bias))

    @property
    def sparsity(self) -> float:
        """Zeros in percent of the weight."""
        return self.conv.sparsity


class MaxPool(nn.Module):
    """max_pool2d on a CPU, without dilation.

    Args:
        kernel: its size, (vertical, horizontal).
        stride: from window to window.
        padding: beyond each edge, of minus infinity.
        ceil: whether windows that stick out at the end count.

    Example:
        >>> MaxPool((2, 2), (2, 2), (0, 0))(torch.arange(16.0).view(1, 1, 4, 4)).flatten().tolist()
        [5.0, 7.0, 13.0, 15.0]
    """

    def __init__(
        self, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], ceil: bool = False
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.ceil = kernel, stride, padding, ceil

    def forward(self, x: Tensor) -> Tensor:
        """[images, channels, height, width] → the same with fewer pixels."""
        if not is_plain(x) or x.ndim != 4 or native() is None or not x.numel():
            return self.reference(x)
        x = x.contiguous()
        size = tuple(x.shape[2:])
        out = tuple(map(self._size, size, self.kernel, self.stride, self.padding))
        if min(out) < 1:
            return self.reference(x)  # which says what is wrong
        y = x.new_empty((*x.shape[:2], *out))
        numbers = (*size, *out, *self.kernel, *self.stride, *self.padding)
        shape = (ctypes.c_int32 * len(numbers))(*numbers)
        planes = x.shape[0] * x.shape[1]
        if native().gossamer_max_pool(x.data_ptr(), y.data_ptr(), planes, shape, torch.get_num_threads()):
            raise MemoryError("not enough memory for a row")
        return y

    def reference(self, x: Tensor) -> Tensor:
        """The same in PyTorch."""
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, 1, self.ceil)

    def _size(self, n: int, kernel: int, stride: int, padding: int) -> int:
        size = (n + 2 * padding - kernel + (stride - 1 if self.ceil else 0)) // stride + 1
        return size - 1 if self.ceil and (size - 1) * stride >= n + padding else size


def is_plain(x: Tensor) -> bool:
    """Whether the compiled kernels can read a tensor: float32, on the CPU, and nobody asks for its gradient."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)


class _Handle:
    """What the library made, freed when nobody holds it any more."""

    def __init__(self, pointer: int, free: Callable[[int], None], keeps: _Handle | None = None) -> None:
        self.pointer, self._free, self._keeps = pointer, free, keeps

    def __del__(self) -> None:
        self._free(self.pointer)
