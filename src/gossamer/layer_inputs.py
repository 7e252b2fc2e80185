"""What are the weights of a layer multiplied with? Statistics of its inputs, and the inputs as a matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.calibration import Calibration, over_ranks, undisturbed, watching
from gossamer.errors import TargetError
from gossamer.evidence import widen
from gossamer.targets import Target


def input_statistics(calibration: Calibration, targets: Sequence[Target], kind: str) -> dict[str, Tensor]:
    """A statistic of all inputs that each weight is multiplied with.

    Args:
        calibration: the data and the network.
        targets: the layers.
        kind: 'input_norm' √Σx², 'input_mean' the mean of |x|, or 'input_max' the maximum of |x|.

    Returns:
        Layer name → tensor of the weight's shape, float32 or wider.

    Raises:
        TargetError: the data does not reach a layer.
    """
    owners = {id(m): t for t in targets for m in (t.module, *t.shared_with)}
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def look(module: nn.Module, x: Tensor) -> None:
        name = owners[id(module)].name
        found, n = _statistic(module, x, kind)
        if name not in sums:
            sums[name], counts[name] = found, n
        else:
            sums[name] = torch.maximum(sums[name], found) if kind == "input_max" else sums[name] + found
            counts[name] = counts[name] + n

    modules = [m for t in targets for m in (t.module, *t.shared_with)]
    with undisturbed(calibration.model, evaluate=True), torch.no_grad(), watching(modules, look):
        for batch in calibration:
            calibration.output(batch)
    result: dict[str, Tensor] = {}
    for target in targets:
        if target.name not in sums:
            raise TargetError(
                f"layer {target.name!r} is not reached by the data, so nothing is known of its inputs; leave it out "
                f"with exclude=[{target.name!r}]"
            )
        total = over_ranks(sums[target.name], maximum=kind == "input_max")
        if kind == "input_norm":
            total = total.sqrt()
        elif kind == "input_mean":
            total = total / over_ranks(counts[target.name])
        result[target.name] = total.expand(target.weight.shape)  # a view, a few values long
    return result


def _statistic(module: nn.Module, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Σx², Σ|x| or max|x| in a shape that expands to the weight's, and how many inputs there were."""

    def reduce(values: Tensor, dims: tuple[int, ...]) -> Tensor:
        values = widen(values)
        if kind == "input_norm":
            return values.square().sum(dims)
        return values.abs().amax(dims) if kind == "input_max" else values.abs().sum(dims)

    if isinstance(module, nn.Embedding):  # one-hot inputs, of which only the ones count
        counts = torch.bincount(x.reshape(-1), minlength=module.num_embeddings).to(torch.float32)
        found = (counts > 0).float() if kind == "input_max" else counts
        return found[:, None], counts.sum()
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return reduce(rows, (0,)), torch.tensor(float(len(rows)), device=x.device)
    assert isinstance(module, nn.modules.conv._ConvNd)
    if x.ndim == module.weight.ndim - 1:  # without an axis of samples
        x = x[None]
    if module.transposed:
        per_channel = reduce(x, (0, *range(2, x.ndim)))
        n = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        return per_channel.view(-1, *[1] * (x.ndim - 1)), n
    taps = [reduce(tap, (0, *range(2, x.ndim))) for tap in _taps(module, x)]
    found = torch.stack(taps, 1).view(module.groups, 1, -1, *module.kernel_size)  # group, output, input, kernel
    outputs = module.out_channels // module.groups
    tap = next(_taps(module, x))
    n = torch.tensor(float(tap.numel() // tap.shape[1]), device=x.device)
    return found.expand(-1, outputs, *found.shape[2:]).reshape(module.weight.shape), n


def _taps(module: Any, x: Tensor) -> Iterator[Tensor]:
    """For each place in a convolution's kernel, what it sees: samples × channels × output positions."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(x.shape[2:], module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    for place in torch.cartesian_prod(*[torch.arange(k) for k in module.kernel_size]).reshape(-1, len(sizes)).tolist():
        tap = x
        for i, (p, d, s, n) in enumerate(zip(place, module.dilation, module.stride, sizes, strict=True)):
            tap = tap[(slice(None),) * (2 + i) + (slice(p * d, p * d + s * (n - 1) + 1, s),)]
        yield tap


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """What the rows of a layer's weight are multiplied with, as one matrix a group.

    Args:
        module: a Linear, or a convolution that is not transposed.
        x: its input.

    Returns:
        groups × positions × columns, float32; the columns go over the kernel's places first, then over the inputs.

    Example:
        >>> patches(nn.Conv1d(1, 1, 2, bias=False), torch.tensor([[[1.0, 2.0, 3.0]]])).tolist()
        [[[1.0, 2.0], [2.0, 3.0]]]
    """
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).float()
    assert isinstance(module, nn.modules.conv._ConvNd)
    if x.ndim == module.weight.ndim - 1:
        x = x[None]
    taps = torch.stack(list(_taps(module, x)), 1).float()  # samples × places × channels × positions
    samples, places, channels = taps.shape[:3]
    taps = taps.reshape(samples, places, module.groups, channels // module.groups, -1)
    return taps.permute(2, 0, 4, 1, 3).reshape(module.groups, -1, places * (channels // module.groups))
