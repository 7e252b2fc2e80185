"""How do masks, and what belongs to them, become one flat state of tensors, and come back?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import FileError
from gossamer.layers import Layers
from gossamer.masks import Masks, pack, unpack
from gossamer.moving import Mover
from gossamer.rules.granularity import expand, units_of


def mask_state(layers: Layers, mover: Mover) -> dict[str, Tensor]:
    """Masks, evidence, and how many units of each layer were zero before, as flat tensors.

    Args:
        layers: whose masks.
        mover: that moves them.
    """
    masks = {f"mask/{n}": t for n, t in layers.masks.state_dict().items()}
    shapes = {f"shape/{n}": torch.tensor(m.shape) for n, m in layers.masks.items()}
    floors = {f"floor/{n}": pack(la.zeros) for n, la in layers.items() if la.zeros is not None}
    goal, round_to, which = mover.pooled or (-1, None, 0)
    pooled = {"pooled": torch.tensor([goal, round_to or 0, which])} if mover.pooled is not None else {}
    return {**masks, **shapes, **floors, **pooled, **layers.evidence.state_dict()}


def load_mask_state(state: Mapping[str, Tensor], layers: Layers, mover: Mover, granularity: str) -> None:
    """Puts back what `mask_state` gave, all of it or, where it does not fit, nothing.

    Args:
        state: what it gave.
        layers: whose masks.
        mover: that moves them.
        granularity: its name, for the messages.

    Raises:
        FileError: it is of another network.
    """
    if not isinstance(state, Mapping):
        raise FileError(f"state of a sparsifier must be a dict of tensors, got {state!r}")
    kinds = ("mask/", "shape/", "floor/", "pooled", *(f"{kind}/" for kind in layers.evidence.kept))
    foreign = next((key for key in state if not key.startswith(kinds)), None)
    if foreign is not None:
        raise FileError(f"state of another run: nothing here is called {foreign!r}; use the criterion that it is from")
    for name, mask in layers.masks.items():
        shape: Any = state.get(f"shape/{name}")
        if f"mask/{name}" in state and (not isinstance(shape, Tensor) or shape.tolist() != list(mask.shape)):
            there = tuple(shape.tolist()) if isinstance(shape, Tensor) else shape
            raise FileError(
                f"masks are of another network: layer {name!r} has shape {there} there and {tuple(mask.shape)} here"
            )
    zeros = {
        name: unpack(state[f"floor/{name}"], (layer.n_units,), name)
        for name, layer in layers.items()
        if isinstance(state.get(f"floor/{name}"), Tensor)
    }
    loaded = Masks({t.name: t.weight for t in layers.targets})
    loaded.load_state_dict({n.removeprefix("mask/"): t for n, t in state.items() if n.startswith("mask/")})
    for name, layer in layers.items():
        mask = loaded[name].view(layer.view)
        if not torch.equal(mask, expand(units_of(mask, layer.dims), layer.view)):
            raise FileError(
                f"the mask of layer {name!r} cuts through units of granularity {granularity!r}; use the "
                "granularity that the state is from"
            )
    pooled: list[int] = state["pooled"].tolist() if "pooled" in state else []
    if len(pooled) not in (0, 3):
        raise FileError(f"state of a sparsifier with pooled={pooled!r}, which none has; take another copy")
    layers.evidence.load_state_dict(state)
    layers.masks = loaded
    for name, layer in layers.items():
        layer.masked = layer.n_units - int(torch.count_nonzero(layers.units(layer)))
        layer.zeros = zeros.get(name)
        layer.floor = 0 if layer.zeros is None else int(torch.count_nonzero(layer.zeros))
    mover.forget()
    if pooled:
        mover.pooled = (pooled[0], pooled[1] or None, pooled[2])
