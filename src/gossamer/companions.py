"""What dies with a filter? Its bias, and its scale and shift in the normalisation that follows in the graph.

A masked filter gives a channel of zeros, but a bias would fill it again, and so would the shift of the BatchNorm behind
it. Which BatchNorm that is, is read off the traced graph (torch.fx), never off the order of registration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
# Modules that leave every channel where it is, so that the normalisation may lie behind them.
_CHANNELWISE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6, nn.LeakyReLU)
_CHANNELWISE += (nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU, nn.Tanh)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_container = isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        return not is_container and super().is_leaf_module(m, module_qualified_name)


def find_companions(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """For each layer, the parameters with one entry an output channel that die with it.

    Args:
        model: the network that the layers are part of. Parts that torch.fx cannot trace are searched piece by piece.
        layers: layer name → layer.

    Returns:
        Layer name → parameters of shape (output channels,). A normalisation that several layers feed is left alone.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> [p is q for p, q in zip(find_companions(net, {"0": net[0]})["0"], (net[0].bias, net[1].weight, net[1].bias))]
        [True, True, True]
    """
    feeds = dict(_norm_edges(model))
    feeders: dict[nn.Module, set[nn.Module]] = {}
    for layer, norms in feeds.items():
        for norm in norms:
            feeders.setdefault(norm, set()).add(layer)
    found: dict[str, list[nn.Parameter]] = {}
    for name, layer in layers.items():
        owners = [layer, *(n for n in feeds.get(layer, ()) if feeders[n] == {layer})]
        names = ["bias"] + ["weight", "bias"] * (len(owners) - 1)
        modules = [layer] + [n for n in owners[1:] for _ in range(2)]
        parameters = [getattr(m, p, None) for m, p in zip(modules, names, strict=True)]
        found[name] = [p for p in parameters if isinstance(p, nn.Parameter)]
    return found


def _norm_edges(model: nn.Module) -> Iterable[tuple[nn.Module, list[nn.Module]]]:
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception:  # tracing runs the user's forward on proxies, which may fail in any way at all
        merged: dict[nn.Module, list[nn.Module]] = {}
        for child in model.children():
            for layer, norms in _norm_edges(child):
                merged.setdefault(layer, []).extend(n for n in norms if n not in merged.get(layer, []))
        return merged.items()
    edges: dict[nn.Module, list[nn.Module]] = {}
    for node in graph.nodes:
        layer = _module(model, node)
        if layer is not None and not isinstance(layer, _NORMS + _CHANNELWISE):
            norms = edges.setdefault(layer, [])
            norms.extend(n for n in _norms_behind(model, node) if n not in norms)
    return edges.items()


def _norms_behind(model: nn.Module, node: fx.Node) -> Iterable[nn.Module]:
    for user in node.users:
        module = _module(model, user)
        if isinstance(module, _NORMS):
            yield module
        elif isinstance(module, _CHANNELWISE) or _is_channelwise_call(user):
            yield from _norms_behind(model, user)


def _is_channelwise_call(node: fx.Node) -> bool:
    functions: tuple[Any, ...] = (torch.relu, nn.functional.relu, nn.functional.silu, nn.functional.gelu)
    return node.op == "call_function" and node.target in functions


def _module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None
