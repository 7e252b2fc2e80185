"""What a call brings: of which kind its inputs are, and where they belong."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


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
