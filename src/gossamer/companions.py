"""What dies with a filter? Its bias, and its scale and shift in the normalisation that follows in the graph.

A masked filter gives a channel of zeros, but a bias would fill it again, and so would the shift of the BatchNorm behind
it. Which BatchNorm that is, is read off the traced graph (torch.fx), never off the order of registration.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from gossamer.errors import GossamerWarning

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
# What leaves every channel where it is, so that the normalisation may lie behind it: modules, functions and methods.
_CHANNELWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.GELU, nn.Mish, nn.Softplus),
    *(nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Upsample),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_CHANNELWISE_NAMES = frozenset(
    (
        *(
            "relu",
            "relu_",
            "relu6",
            "leaky_relu",
            "leaky_relu_",
            "prelu",
            "elu",
            "elu_",
            "selu",
            "celu",
            "silu",
            "gelu",
        ),
        *("gelu", "mish", "softplus", "hardswish", "hardtanh", "hardsigmoid", "sigmoid", "sigmoid_", "tanh", "tanh_"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "interpolate", "contiguous", "clone"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        "boolean_dispatch",  # what torch.nn.functional calls its own max pooling
    )
)


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
        Layer name → parameters of shape (output channels,). A normalisation that sees anything else than that one
        layer's output is left alone.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> [tuple(p.shape) for p in find_companions(net, {"0": net[0]})["0"]]
        [(4,), (4,), (4,)]
    """
    norms = find_norms(model)
    found: dict[str, list[nn.Parameter]] = {}
    for name, layer in layers.items():
        owned: list[Any] = [getattr(layer, "bias", None)]
        for norm in norms.get(layer, ()):
            owned += [norm.weight, norm.bias]
        found[name] = [p for p in owned if isinstance(p, nn.Parameter)]
    return found


def find_norms(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """For each layer, the normalisations that see its output and nothing else.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> find_norms(net)[net[0]] == [net[1]]
        True
    """
    norms: dict[nn.Module, list[nn.Module]] = {}
    for norm, sources in _norm_sources(model).items():
        if len(sources) == 1 and (layer := next(iter(sources))) is not None:
            norms.setdefault(layer, []).append(norm)
    return norms


def _norm_sources(model: nn.Module) -> dict[nn.Module, set[nn.Module | None]]:
    """Normalisation → the layers whose output it sees; None stands for anything else."""
    try:
        # Tracing runs the user's forward, which may keep things on the module: let it do so on a copy. The parameters
        # are shared, so the copy costs no more than the buffers.
        twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        with torch.random.fork_rng(devices=[]):
            graph = _Tracer().trace(twin)
    except Exception:  # the user's forward meets proxies, and may fail on them in any way at all
        if any(isinstance(child, _NORMS) for child in model.children()):
            warnings.warn(
                f"{type(model).__name__} cannot be traced, so which of its layers its own normalisations follow is not "
                "known: their scale and shift stay as they are where a filter is masked",
                GossamerWarning,
                stacklevel=2,
            )
        merged: dict[nn.Module, set[nn.Module | None]] = {}
        for child in model.children():
            for norm, sources in _norm_sources(child).items():
                merged.setdefault(norm, set()).update(sources)
        return merged
    seen: dict[nn.Module, set[nn.Module | None]] = {}
    for node in graph.nodes:
        norm = _module(model, node)
        if isinstance(norm, _NORMS):
            seen.setdefault(norm, set()).add(_source(model, node))
    return seen


def _source(model: nn.Module, norm: fx.Node) -> nn.Module | None:
    node = norm
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        module = _module(model, node)
        if not (isinstance(module, _CHANNELWISE) or _is_channelwise_call(node)):
            return None if isinstance(module, _NORMS) else module
    return None


def _is_channelwise_call(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _CHANNELWISE_NAMES


def _module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None
