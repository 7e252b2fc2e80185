"""What runs between layers, in the engine: pooling, sums, scaling, concatenation. Each has its twin in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.runtime.activations import ACTIVATIONS
from gossamer.runtime.values import Signature


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

    kind = "max_pool"

    def __init__(
        self, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], ceil: bool = False
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.ceil = kernel, stride, padding, ceil

    def forward(self, x: Tensor) -> Tensor:
        """[images, channels, height, width] → the same with fewer pixels."""
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, 1, self.ceil)

    def signature(self, x: Signature) -> Signature | None:
        """Of the result; None where the kernel cannot give it."""
        size = [self._size(*each) for each in zip(x.size, self.kernel, self.stride, self.padding, strict=True)]
        return x.with_channels(x.channels, size) if min(size) > 0 else None

    def _size(self, n: int, kernel: int, stride: int, padding: int) -> int:
        size = (n + 2 * padding - kernel + (stride - 1 if self.ceil else 0)) // stride + 1
        return size - 1 if self.ceil and (size - 1) * stride >= n + padding else size


class Add(nn.Module):
    """y = activation(a + b), of one shape; or activation(a).

    Example:
        >>> Add("relu")(torch.tensor([-2.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor([0., 2.])
    """

    kind = "add"

    def __init__(self, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """Elementwise."""
        return ACTIVATIONS[self.activation](a if b is None else a + b)

    def signature(self, a: Signature, b: Signature | None = None) -> Signature | None:
        """Of the result; None where the kernel cannot give it."""
        return a if b is None or a == b else None


class Scale(nn.Module):
    """Each channel of each image times a number of its own, as squeeze-and-excitation has it.

    Example:
        >>> Scale()(torch.ones(1, 2, 1, 3), torch.tensor([2.0, 3.0]).view(1, 2, 1, 1)).flatten().tolist()
        [2.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    """

    kind = "scale"

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        """[images, channels, height, width], [images, channels, 1, 1]."""
        return x * factor

    def signature(self, x: Signature, factor: Signature) -> Signature | None:
        """Of the result; None where the kernel cannot give it."""
        fits = factor.size == (1, 1) and (x.images, x.channels) == (factor.images, factor.channels)
        return x if fits and not x.is_tokens and not factor.is_tokens else None


class Mean(nn.Module):
    """The mean over an image's pixels.

    Args:
        keep: whether height and width stay, as 1.

    Example:
        >>> Mean()(torch.arange(4.0).view(1, 1, 2, 2)).item()
        1.5
    """

    kind = "mean"

    def __init__(self, keep: bool = True) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        """[images, channels, height, width] → [images, channels, 1, 1] or [images, channels]."""
        return x.mean((2, 3), keepdim=self.keep)

    def signature(self, x: Signature) -> Signature | None:
        """Of the result; None where the kernel cannot give it."""
        if self.keep:
            return x.with_channels(x.channels, (1, 1))
        return Signature((x.images, x.channels), True, x.dtype)


class Flatten(nn.Module):
    """[images, channels, 1, 1] → [images, channels], which moves nothing.

    Example:
        >>> Flatten()(torch.ones(2, 3, 1, 1)).shape
        torch.Size([2, 3])
    """

    kind = "flatten"

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers."""
        return x.flatten(1)

    def signature(self, x: Signature) -> Signature | None:
        """Of the result; None where it would be of pixels, too."""
        return Signature((x.images, x.channels), True, x.dtype) if x.pixels == 1 else None


class Concat(nn.Module):
    """Channels behind channels.

    Example:
        >>> Concat()(torch.ones(1, 2, 1, 1), torch.zeros(1, 1, 1, 1)).flatten().tolist()
        [1.0, 1.0, 0.0]
    """

    kind = "concat"

    def forward(self, *parts: Tensor) -> Tensor:
        """Each [images, channels, height, width]."""
        return torch.cat(parts, 1)

    def signature(self, *parts: Signature) -> Signature | None:
        """Of the result; None where the kernel cannot give it."""
        first = parts[0]
        same = all(not p.is_tokens and (p.images, p.size) == (first.images, first.size) for p in parts)
        return first.with_channels(sum(p.channels for p in parts)) if same else None
