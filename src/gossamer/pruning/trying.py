"""Does a network run with fewer channels? Tried on a copy, before anything is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ArgumentError
from gossamer.pruning.graph import Group
from gossamer.pruning.inputs import outputs_of, twin_of
from gossamer.pruning.surgery import Surgeon


def tried(
    model: nn.Module, groups: Sequence[Group], inputs: Sequence[Any], expected: Sequence[Tensor], targets: set[str]
) -> list[Group]:
    """The groups, those marked without which the network does not run, or gives outputs of another shape.

    Args:
        model: the network; a copy is tried.
        groups: its groups of coupled channels.
        inputs: arguments of a forward pass.
        expected: what it gives for them.
        targets: names of the layers that are to be pruned.

    Raises:
        ArgumentError: single groups can be cut, but not all of them together.
    """
    touched = [i for i, g in enumerate(groups) if not g.why and not targets.isdisjoint(g.layers)]
    small = [i for i in touched if groups[i].n_units <= groups[i].n_blocks]
    tried = [replace(g, why="it has one filter only") if i in small else g for i, g in enumerate(groups)]
    touched = [i for i in touched if i not in small]
    if not _why_not(model, tried, touched, inputs, expected):
        return tried
    for i in touched:
        why = _why_not(model, tried, [i], inputs, expected)
        if why:
            tried[i] = replace(tried[i], why=why)
    fine = [i for i in touched if not tried[i].why]
    why = _why_not(model, tried, fine, inputs, expected)
    if why:
        raise ArgumentError(
            f"{type(model).__name__} cannot be pruned: with fewer channels in all of its layers, {why}; exclude some, "
            "or give layer_type"
        )
    return tried


def _why_not(
    model: nn.Module, groups: Sequence[Group], which: Sequence[int], inputs: Sequence[Any], expected: Sequence[Tensor]
) -> str:
    twin = twin_of(model)
    units: list[Tensor | None] = [None] * len(groups)
    for i in which:
        stays = torch.ones(groups[i].n_units, dtype=torch.bool)
        for block in range(groups[i].n_blocks):
            stays[torch.nonzero(groups[i].blocks == block)[-1]] = False
        units[i] = stays
    try:
        Surgeon(twin, groups).cut(units)
        given = outputs_of(twin, inputs)
    except (ArgumentError, RuntimeError, IndexError) as error:
        first = str(error.__cause__ or error).strip().splitlines()
        return f"the network does not run with fewer channels there ({first[0] if first else type(error).__name__})"
    if [t.shape for t in given] != [t.shape for t in expected]:
        return "its outputs are the network's"
    return ""
