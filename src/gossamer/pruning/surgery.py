"""Cuts channels out of layers, in place: parameters stay the same objects, with all that an optimizer knows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from gossamer.optimizers import HasState, optimizer_tensors
from gossamer.pruning.attention import head_count, heads_of, loosen, set_heads
from gossamer.pruning.graph import BOTH, HEADS, IN, OUT, Group, is_depthwise
from gossamer.weights import remember

Slice = Callable[[Tensor], Tensor]
"""A tensor of a parameter's shape → what is left of it."""


class Surgeon:
    """Cuts units out of a network, again and again, and keeps count of where the others lie.

    Args:
        model: the network, changed in place.
        groups: its groups of coupled channels, as they were before the first cut.

    Example:
        >>> from gossamer.pruning.graph import find_groups
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
        >>> surgeon = Surgeon(net, find_groups(net, (torch.ones(1, 1, 2, 2),)))
        >>> surgeon.cut([torch.tensor([True, False, True, True]), None]); net[1].weight.shape
        torch.Size([2, 3, 1, 1])
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model, self.groups = model, groups
        self.kept = [torch.ones(g.n_units, dtype=torch.bool) for g in groups]
        # Positions are counted on the axes as they were at first, whatever other groups cut from them meanwhile.
        self.axes = {(m.name, m.side): torch.ones(m.size, dtype=torch.bool) for g in groups for m in g.members}

    def cut(
        self,
        units: Sequence[Tensor | None],
        optimizer: HasState | None = None,
        also: Callable[[Tensor, Slice], None] = lambda *_: None,
    ) -> None:
        """Leaves the given units, and cuts all others.

        Args:
            units: for each group, bool over its first units, True = stays; None leaves it as it is. What is gone stays.
            optimizer: whose state is cut along with the parameters.
            also: called with each parameter that is cut, before it is, and the slice that does it.
        """
        before = {axis: alive.clone() for axis, alive in self.axes.items()}
        for i, (group, wanted) in enumerate(zip(self.groups, units, strict=True)):
            if wanted is None:
                continue
            self.kept[i] &= wanted.cpu()
            for member in group.members:
                self.axes[member.name, member.side][member.index[~self.kept[i][member.unit]]] = False
        heads = [g.heads for g, wanted in zip(self.groups, units, strict=True) if g.heads and wanted is not None]
        counts = {g.heads: int(kept.sum()) for g, kept in zip(self.groups, self.kept, strict=True) if g.heads in heads}
        for (name, side), alive in self.axes.items():
            keep = alive[before[name, side]]
            if not bool(keep.all()):
                self._cut_side(name, side, torch.nonzero(keep).flatten(), optimizer, also)
        for name, after in counts.items():
            _write_heads(self.model.get_submodule(name), self._first_group(name), after)

    def remember(self) -> Callable[[], None]:
        """A function that puts the network back as it is now, the shapes too, and the count of what is left."""
        network = remember(self.model)
        kept, axes = [k.clone() for k in self.kept], {axis: alive.clone() for axis, alive in self.axes.items()}

        def put_back() -> None:
            network()
            self.kept, self.axes = kept, axes

        return put_back

    def _first_group(self, heads: str) -> Group:
        return next(g for g in self.groups if g.heads == heads)

    def _cut_side(self, name: str, side: str, keep: Tensor, optimizer: HasState | None, also: Any) -> None:
        parent, _, leaf = name.rpartition(".")
        if leaf in self.model.get_submodule(parent)._parameters:
            parameter = self.model.get_parameter(name)
            axis = next(a for a in reversed(range(parameter.ndim)) if parameter.shape[a] > 1)
            narrow(parameter, _along(axis, keep), optimizer, also)
            return
        module = self.model.get_submodule(name)
        for parameter, cut in slices_of(module, side, keep):
            narrow(parameter, cut, optimizer, also)
        _write_sizes(module, side, keep)


def narrow(parameter: nn.Parameter, cut: Slice, optimizer: HasState | None = None, also: Any = lambda *_: None) -> None:
    """Cuts a parameter, its gradient and an optimizer's state of it; object, param group and key stay.

    Args:
        parameter: what to cut.
        cut: tensor → what is left of it.
        optimizer: a torch.optim.Optimizer or a fastai one; None where there is none.
        also: called with the parameter and the slice, before it is cut.

    Example:
        >>> p = nn.Parameter(torch.ones(3)); sgd = torch.optim.SGD([p], lr=1.0, momentum=0.9)
        >>> p.sum().backward(); sgd.step(); narrow(p, lambda t: t[:2], sgd)
        >>> p.shape, sgd.state[p]["momentum_buffer"].shape
        (torch.Size([2]), torch.Size([2]))
    """
    also(parameter, cut)
    shape = parameter.shape
    with torch.no_grad():
        whole = {id(tensor): tensor for tensor in optimizer_tensors(optimizer)(parameter)}
        for tensor in whole.values():
            tensor.data = cut(tensor)
        state: Mapping[Tensor, Any] = {} if optimizer is None else getattr(optimizer, "opt", optimizer).state
        entries: MutableMapping[str, Any] = state.get(parameter, {})
        for key, value in entries.items():
            if isinstance(value, Tensor) and id(value) not in whole and is_along(value, shape):
                entries[key] = cut_along(value, shape, cut)
        gradient = parameter.grad
        parameter.grad = None
        smaller = cut(parameter.data)
        # While a graph of before is alive, autograd hands out its node for the parameter again, with the old shape; it
        # makes a new one where the type of the data has changed in between.
        parameter.data = smaller.new_empty(0, dtype=torch.float64 if smaller.dtype != torch.float64 else torch.float32)
        parameter.data = smaller
        if gradient is not None:
            parameter.grad = cut(gradient)


def is_along(value: Tensor, shape: torch.Size) -> bool:
    """Whether a tensor has a parameter's axes, whole or, as the factors that Adafactor keeps, one long.

    Example:
        >>> shape = torch.Size((4, 3))
        >>> [is_along(torch.ones(s), shape) for s in [(4, 3), (4, 1), (1, 3), (3,), ()]]
        [True, True, True, False, False]
    """
    return value.ndim == len(shape) > 0 and all(n in (1, of) for n, of in zip(value.shape, shape, strict=True))


def cut_along(value: Tensor, shape: torch.Size, cut: Slice) -> Tensor:
    """What is left of a tensor with a parameter's axes; those that are one long stay so.

    Example:
        >>> cut_along(torch.tensor([[1.0], [2.0], [3.0]]), torch.Size((3, 2)), lambda t: t[1:])
        tensor([[2.],
                [3.]])
    """
    left = cut(value.expand(shape))
    for axis, n in enumerate(value.shape):
        left = left.narrow(axis, 0, min(n, left.shape[axis]) if n < shape[axis] else left.shape[axis])
    return left.contiguous()


def _along(axis: int, keep: Tensor) -> Slice:
    return lambda t: t.index_select(axis, keep.to(t.device)).contiguous()


def _in_groups(keep: Tensor, groups: int, size: int) -> Slice:
    """The inputs of a convolution in groups: as many from each, though not the same ones."""
    per_group = keep.view(groups, -1) % (size // groups)

    def cut(t: Tensor) -> Tensor:
        parts = t.unflatten(0, (groups, -1))
        return torch.cat([p.index_select(1, k.to(t.device)) for p, k in zip(parts, per_group, strict=True)])

    return cut


def slices_of(module: nn.Module, side: str, keep: Tensor) -> Iterable[tuple[nn.Parameter, Slice]]:
    """The parameters of a layer that lie along one of its sides, and how to cut each.

    Args:
        module: the layer.
        side: `OUT`, `IN`, `BOTH` or `HEADS`.
        keep: int64, the positions that stay, increasing.
    """
    own = {n: p for n, p in module._parameters.items() if p is not None}
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention_slices(module, side, keep)
    elif isinstance(module, nn.Embedding):
        yield own["weight"], _along(1, keep)
    elif side == IN:
        if isinstance(module, _ConvNd) and module.groups > 1:
            yield own["weight"], _in_groups(keep, module.groups, module.in_channels)
        else:
            yield own["weight"], _along(0 if isinstance(module, _ConvNd) and module.transposed else 1, keep)
    else:
        flipped = isinstance(module, _ConvNd) and module.transposed and side == OUT
        for name in ("weight", "bias"):
            if name in own and not (isinstance(module, nn.PReLU) and module.num_parameters == 1):
                yield own[name], _along(1 if flipped and name == "weight" else 0, keep)


def _attention_slices(module: nn.MultiheadAttention, side: str, keep: Tensor) -> Iterable[tuple[nn.Parameter, Slice]]:
    whole: Any = module  # which is typed as if none of its parameters were ever missing
    weight, bias, out = whole.in_proj_weight, whole.in_proj_bias, whole.out_proj
    if side == BOTH:
        yield weight, _along(1, keep)
        yield out.weight, _along(0, keep)
        if out.bias is not None:
            yield out.bias, _along(0, keep)
        return
    columns = (keep[:, None] * module.head_dim + torch.arange(module.head_dim)).flatten()
    inner = module.num_heads * module.head_dim
    rows = torch.cat([columns + i * inner for i in range(3)])
    yield weight, _along(0, rows)
    if bias is not None:
        yield bias, _along(0, rows)
    yield out.weight, _along(1, columns)


def _write_sizes(module: nn.Module, side: str, keep: Tensor) -> None:
    """What a layer says of its own size."""
    n = len(keep)
    if isinstance(module, nn.MultiheadAttention):
        loosen(module)
        if side == HEADS:
            module.num_heads = n
            module.out_proj.in_features = n * module.head_dim
        else:
            module.embed_dim = module.kdim = module.vdim = module.out_proj.out_features = n
    elif isinstance(module, _ConvNd):
        if is_depthwise(module):
            module.in_channels = module.out_channels = module.groups = n
        elif side == IN:
            module.in_channels = n
        else:
            module.out_channels = n
    elif isinstance(module, nn.Linear):
        if side == IN:
            module.in_features = n
        else:
            module.out_features = n
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = n
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (n,)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = n
    elif isinstance(module, nn.PReLU):
        module.num_parameters = n
    elif isinstance(module, (_BatchNorm, _InstanceNorm)):
        module.num_features = n
        for name in ("running_mean", "running_var"):
            buffer = module._buffers.get(name)
            if buffer is not None:
                module._buffers[name] = buffer.index_select(0, keep.to(buffer.device))


def _write_heads(module: nn.Module, group: Group, after: int) -> None:
    if isinstance(module, nn.MultiheadAttention) and heads_of(module):
        return  # which keeps its own numbers
    width = max(len(m.index) for m in group.members if m.side == IN) // group.n_units
    known = head_count(module)
    if known is not None:
        set_heads(module, known[1], after, width)
