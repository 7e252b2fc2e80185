"""A network that no graph could be made of: its own code runs, and its layers compute by the engine, one by one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gossamer.runtime.choice import runs_sparse
from gossamer.runtime.explain import LAYER
from gossamer.runtime.fusion import padding_of
from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.segment import Segment


def own(model: nn.Module) -> nn.Module:
    """A copy, whose weights and mode nobody changes; the network itself where nothing of it can be copied."""
    for copied in (copy.deepcopy, _twin):
        with contextlib.suppress(Exception):  # anything at all, from anywhere in the network
            return copied(model).requires_grad_(False)  # a trace takes no constants that want gradients
    return model


def _twin(model: nn.Module) -> nn.Module:
    """A copy of a network, of which whatever cannot be copied, such as a lock, is shared."""
    twins: dict[int, Any] = {}  # by what they are twins of, as deepcopy keeps them
    kept: list[Any] = []  # whose places in memory no other object may take while this lasts
    for tensor in (*model.parameters(), *model.buffers()):
        value = tensor.detach().clone()
        twins[id(tensor)] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
    for module in model.modules():
        twins[id(module)] = module.__new__(type(module))
    for module in model.modules():
        state = twins[id(module)].__dict__
        for name, value in module.__dict__.items():
            memo = dict(twins)
            try:
                state[name] = copy.deepcopy(value, memo)
            except Exception:
                state[name] = value
            else:
                twins.update(memo)
                kept.append(memo)
    return twins[id(model)]


def replaced(model: nn.Module) -> nn.Module:
    """A copy of a network whose layers compute by the engine, one by one; it keeps its own code, hooks and all.

    The layers stay what they are, since the network's code may read their weights and sizes.
    """
    model = own(model)
    for module in list(model.modules()):
        segment = _layer_of(module)
        if segment is not None:
            module.add_module(LAYER, segment)
            module.forward = segment.forward
    return model


def _two(sizes: Sequence[int]) -> tuple[int, int]:
    vertical, horizontal = sizes
    return vertical, horizontal


def _layer_of(module: nn.Module) -> nn.Module | None:
    if module._forward_hooks or module._forward_pre_hooks or any(p.dtype != torch.float32 for p in module.parameters()):
        return None
    if type(module) is nn.Linear:
        layer = Layer(module.weight, module.bias)
    elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
        padding = padding_of(module.padding, _two(module.kernel_size), _two(module.dilation))
        if padding is None:
            return None
        geometry = Geometry(_two(module.stride), padding, _two(module.dilation), module.groups)
        layer = Layer(module.weight, module.bias, geometry)
    else:
        return None
    return Segment.of(layer, declines=True, team=True) if runs_sparse(layer) else None
