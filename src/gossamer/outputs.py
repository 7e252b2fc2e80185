"""How far one network's outputs are from another's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def difference(got: Any, want: Any) -> float:
    """The largest difference between two networks' outputs, over the largest output; nan and infinity must agree.

    Args:
        got: tensors or arrays, nested or not.
        want: what they should be.

    Returns:
        From 0; inf where shapes, or the places of what is not finite, differ.

    Example:
        >>> difference([torch.tensor([1.0, 4.0])], torch.tensor([1.0, 5.0]))
        0.2
    """
    ours, theirs = tensors_in(got), tensors_in(want)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double(), b.double()
        finite = torch.isfinite(b)
        if not torch.equal(finite, torch.isfinite(a)) or not torch.equal(
            a[~finite].nan_to_num(), b[~finite].nan_to_num()
        ):
            return float("inf")
        if finite.any():
            largest = b[finite].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            worst = max(worst, float((a - b)[finite].abs().max() / largest))
    return worst


def tensors_in(outputs: Any) -> list[Tensor]:
    """The tensors and arrays among a network's outputs, in order, as tensors.

    Example:
        >>> len(tensors_in({"a": torch.ones(1), "b": (torch.ones(1), None)}))
        2
    """
    leaves, _ = _pytree.tree_flatten(outputs)
    return [torch.as_tensor(leaf) for leaf in leaves if hasattr(leaf, "__array__") or isinstance(leaf, Tensor)]
