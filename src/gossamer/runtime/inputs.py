"""What a call brings: of which kind its inputs are, and where they belong."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from gossamer.errors import ArgumentError


def arguments_of(model: nn.Module, given: Any) -> tuple[Any, ...]:
    """The arguments of a call, by place.

    Args:
        model: the network.
        given: a tuple of them; or a dict by the names that `forward` has for them; or the only one.

    Raises:
        ArgumentError: an argument can be given by its name alone.

    Example:
        >>> arguments_of(nn.Bilinear(2, 2, 1), {"input2": 2, "input1": 1})
        (1, 2)
    """
    if isinstance(given, tuple):
        return given
    if not isinstance(given, dict) or not given:
        return (given,)
    try:
        bound = inspect.signature(model.forward).bind(**cast("dict[str, Any]", given))
    except (AttributeError, TypeError, ValueError):  # names of the network's own, inside of its one argument
        return (given,)
    if bound.kwargs:
        bound.apply_defaults()  # those that are between
    extra = {name for name in bound.kwargs if name in given}
    if extra:
        names = ", ".join(sorted(extra))
        raise ArgumentError(
            f"{type(model).__name__}.forward takes {names} by name alone; let its forward take them by place"
        )
    return bound.args[: 1 + max(i for i, name in enumerate(bound.arguments) if name in given)]


def kind_of(args: tuple[Any, ...]) -> Any:
    """Shapes and dtypes of tensors, which settle what guards say of them; None where there is anything else."""
    kind: list[Any] = []
    for a in args:
        if not isinstance(a, Tensor):
            return None
        kind += a.shape, a.dtype
    try:
        hash(shown := tuple(kind))
    except TypeError:  # sizes that are symbols
        return None
    return shown


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def key_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a capture is of: the kinds of all tensors, and values of the rest; None where that cannot be said."""
    leaves, spec = tree_flatten((args, kwargs))
    if not all(isinstance(x, (Tensor, *_PLAIN)) for x in leaves):
        return None
    return str(spec), *((x.shape, x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in leaves)


def by_place(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in the order of the network's own, as far as they go without a gap; the others by name."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return bound.args, bound.kwargs


def placed(graph: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments in the order of a graph's inputs, which have the names that the network had for them.

    Raises:
        ArgumentError: too few, too many, or one of another name.
    """
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) + len(kwargs) != len(names) or set(given) != set(names):
        got = ", ".join([f"{len(args)} by place", *kwargs])
        raise ArgumentError(
            f"the network takes {len(names)} inputs, by place or by name: {', '.join(names)}; got {got}"
        )
    return tuple(given[name] for name in names)
