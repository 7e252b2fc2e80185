"""Which filters take part? Types of layer → names of layers, each with the weight that its filters are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gossamer.errors import ArgumentError, TargetError
from gossamer.pruning.graph import Group
from gossamer.pruning.report import listed
from gossamer.rules.granularity import view_of
from gossamer.targets import AXES, LayerTypes, Target, as_layer_types, weight_of


def as_filter_types(layer_type: LayerTypes) -> tuple[type[nn.Module], ...]:
    """Types of layer that have filters, or heads.

    Raises:
        ArgumentError: one of them has none.

    Example:
        >>> as_filter_types((nn.Conv2d, nn.MultiheadAttention))[1].__name__
        'MultiheadAttention'
    """
    given: Any = layer_type
    kinds: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    heads = [k for k in kinds if isinstance(k, type) and issubclass(k, nn.MultiheadAttention)]
    others = [k for k in kinds if k not in heads]
    rest = as_layer_types(others if isinstance(given, (list, tuple)) else given) if others or not heads else ()
    for kind in rest:
        if issubclass(kind, nn.Embedding):
            raise ArgumentError("layer_type Embedding has entries and no filters; use Conv2d, Linear and the like")
    return (*rest, *heads)


def filter_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...], groups: Sequence[Group]) -> list[str]:
    """Names of the layers of some types that the graph knows.

    Raises:
        TargetError: there is none.
    """
    known = {name for group in groups for name in group.layers}
    found = [n for n, m in model.named_modules() if isinstance(m, kinds) and n in known]
    if not found:
        have = sorted({type(m).__name__ for n, m in model.named_modules() if n in known})
        wanted = ", ".join(k.__name__ for k in kinds)
        raise TargetError(
            f"no {wanted} layer of {type(model).__name__} takes part in its forward pass; layers that do: "
            f"layer_type={', '.join(have) or 'none'}"
        )
    return found


def filter_target(name: str, module: nn.Module) -> Target:
    """A layer as what gathers evidence takes it; of attention, the queries, keys and values.

    Example:
        >>> filter_target("0", nn.Conv2d(4, 8, 3, groups=2)).view
        (8, 2, 3, 3)
    """
    shape, groups = weight_of(module).shape, getattr(module, "groups", 1)
    axes = next((letters for kind, letters in AXES.items() if isinstance(module, kind)), "oi")
    return Target(name, module, *view_of(axes, shape, groups))


def by_filter(module: nn.Module, scores: Tensor) -> Tensor:
    """Scores of weights, a row a filter (or a head).

    Example:
        >>> import torch
        >>> by_filter(nn.Conv2d(2, 4, 3), torch.ones(4, 2, 3, 3)).shape
        torch.Size([4, 18])
    """
    if isinstance(module, nn.MultiheadAttention):
        return scores.view(3, module.num_heads, -1).transpose(0, 1).flatten(1)
    if isinstance(module, _ConvNd) and module.transposed:
        return scores.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    return scores.flatten(1)


def kept_whole(group: Group, left_out: set[str]) -> Group:
    """The group, marked where one of its layers is left out."""
    found = [n for n in group.layers if n in left_out]
    if group.why or not found:
        return group
    return replace(group, why=f"{listed(found)} is excluded, and its channels are these")
