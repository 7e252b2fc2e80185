"""Weights into a network, all or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gossamer.errors import ArgumentError, FileError, closest


def load_weights(model: nn.Module, weights: Mapping[str, Any], what: str) -> None:
    """Copies a state_dict into a network in place, so that whoever holds a parameter holds it still.

    Args:
        model: the network.
        weights: name → tensor, on any device.
        what: what the weights are from, for the messages: 'the ticket'.

    Raises:
        ArgumentError: the network is none.
        FileError: a name or a shape differs, or the network is lazy; it is not touched.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> load_weights(net, {"weight": torch.tensor([[2.0]])}, "the example"); net.weight.item()
        2.0
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"weights go into a torch.nn.Module, got {model!r}")
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise FileError(f"the network is lazy and {lazy!r} has no shape yet; run one batch through it first")
    state = model.state_dict()
    check_weights(state, weights, what)
    extra = {n: weights[n] for n, value in state.items() if not isinstance(value, Tensor) and n in weights}
    put_weights(model, weights)
    if extra:  # what a module keeps through get_extra_state
        model.load_state_dict(extra, strict=False)


def check_weights(state: Mapping[str, Any], weights: Mapping[str, Any], what: str) -> None:
    """Makes sure that weights have the names and shapes of a network's state_dict.

    Raises:
        FileError: they have not; the message names the first that differs.

    Example:
        >>> check_weights({"w": torch.ones(2)}, {"w": torch.ones(3)}, "the example")
        Traceback (most recent call last):
        ...
        gossamer.errors.FileError: the example is of another network: 'w' has shape (3,) there and (2,) here
    """
    own = {name for name, value in state.items() if isinstance(value, Tensor)}
    there = {name for name, value in weights.items() if isinstance(value, Tensor) or name in own}
    odd = sorted(own ^ there)  # what modules keep besides tensors is not compared: most files leave it out
    if odd:
        where = "is not in this network" if odd[0] in there else "is missing there"
        raise FileError(f"{what} is of another network: {odd[0]!r} {where}. {closest(odd[0], own)}")
    for name, mine in state.items():
        if name not in own:
            continue
        other = weights[name]
        if not isinstance(other, Tensor) or mine.shape != other.shape:
            shape = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise FileError(
                f"{what} is of another network: {name!r} has shape {shape} there and {tuple(mine.shape)} here"
            )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors in a network's state_dict, without what modules keep besides.

    Example:
        >>> sorted(tensors_of(nn.Linear(2, 2)))
        ['bias', 'weight']
    """
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the tensors in a network's state_dict.

    Example:
        >>> sorted(copy_of(nn.Linear(2, 2)))
        ['bias', 'weight']
    """
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def remember(model: nn.Module) -> Callable[[], None]:
    """A function that puts a network back as it is now: values, shapes, and what its layers say of themselves.

    Args:
        model: the network; its parameters stay the same objects.

    Example:
        >>> net = nn.Linear(3, 1); put_back = remember(net)
        >>> net.weight.data = torch.ones(1, 2); net.in_features = 2
        >>> put_back(); net.weight.shape, net.in_features
        (torch.Size([1, 3]), 3)
    """
    own = ("_parameters", "_buffers", "_modules")
    layers = [
        (m, type(m), {k: v for k, v in vars(m).items() if k not in own}, dict(m._buffers)) for m in model.modules()
    ]
    tensors = [(t, t.data, t.detach().clone(), t.grad) for t in (*model.parameters(), *model.buffers())]

    def put_back() -> None:
        for module, kind, settings, buffers in layers:
            module.__class__ = kind
            vars(module).update(settings)
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, data, values, gradient in tensors:
                tensor.grad = None
                tensor.data = data
                tensor.copy_(values)
                tensor.grad = gradient

    return put_back


def not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter with nan or infinity in it; None where there is none.

    Example:
        >>> net = nn.Linear(1, 1); _ = nn.init.constant_(net.bias, float("nan")); not_finite(net)
        'bias'
    """
    return next((n for n, p in model.named_parameters() if not bool(torch.isfinite(p.detach()).all())), None)


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Writes a state_dict of the same network into it, in place.

    Example:
        >>> net = nn.Linear(1, 1, bias=False); put_weights(net, {"weight": torch.tensor([[2.0]])}); net.weight.item()
        2.0
    """
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.copy_(weights[name])
