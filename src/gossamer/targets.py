"""Which layers take part? Model → named weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from gossamer.errors import ArgumentError, TargetError, closest
from gossamer.rules.allocation import as_fraction
from gossamer.rules.granularity import view_of

AXES: Mapping[type[nn.Module], str] = MappingProxyType(
    {
        nn.Conv1d: "oiw",
        nn.Conv2d: "oihw",
        nn.Conv3d: "oidhw",
        nn.ConvTranspose1d: "iow",
        nn.ConvTranspose2d: "iohw",
        nn.ConvTranspose3d: "iodhw",
        nn.Linear: "oi",
        nn.Embedding: "oi",
    }
)
"""The letters of a weight's axes, by type of layer (subclasses included)."""

LayerTypes = type[nn.Module] | Sequence[type[nn.Module]]


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that takes part.

    Args:
        name: the layer's name in the model, as the report shows it.
        module: the layer.
        axes: letters of the axes that the weight is cut along.
        view: their lengths; the weight's shape, but for grouped transposed convolutions.
        shared_with: other layers that use the same weight.
    """

    name: str
    module: nn.Module
    axes: str
    view: tuple[int, ...]
    shared_with: tuple[nn.Module, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself, looked up anew, so that a model may move or be wrapped in between."""
        return weight_of(self.module)

    @property
    def type(self) -> str:
        """The layer's type as the report shows it."""
        return type(self.module).__name__


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of a layer; of nn.MultiheadAttention that of its queries, keys and values.

    Example:
        >>> weight_of(nn.MultiheadAttention(4, 2)).shape
        torch.Size([12, 4])
    """
    weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile, whose layer names carry no prefix.

    Example:
        >>> unwrapped(nn.DataParallel(nn.Linear(1, 1)))
        Linear(in_features=1, out_features=1, bias=True)
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_targets(model: nn.Module, layer_type: LayerTypes = nn.Conv2d, exclude: Iterable[str] = ()) -> list[Target]:
    """Every weight of the given layer types, in the model's own order, shared weights once.

    Args:
        model: the network, or a part of it; names are relative to it.
        layer_type: a type of layer or a tuple of them, out of `AXES`; subclasses count.
        exclude: names or patterns of layers that are left out.

    Raises:
        ArgumentError: a layer type that has no weight to cut.
        TargetError: nothing is left, a name matches nothing, or a layer's weight cannot be masked as it is.

    Example:
        >>> [t.name for t in find_targets(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))]
        ['0']
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    types = as_layer_types(layer_type)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, types)}
    left_out: set[str] = set()
    for pattern in as_patterns(exclude):
        left_out |= set(match_layers(pattern, layers, what="exclude"))
    users: dict[int, list[nn.Module]] = {}
    for name, module in layers.items():
        if name not in left_out:
            users.setdefault(id(_maskable(name, module)), []).append(module)
    targets: list[Target] = []
    for name, module in layers.items():
        if name in left_out:
            continue
        weight = _maskable(name, module)
        first, *others = users[id(weight)]
        if first is module:
            axes = next(letters for kind, letters in AXES.items() if isinstance(module, kind))
            view = view_of(axes, weight.shape, getattr(module, "groups", 1))
            targets.append(Target(name, module, *view, shared_with=tuple(others)))
    if not targets and left_out:
        raise TargetError(
            f"exclude={exclude!r} leaves no layer to make sparse in {type(model).__name__}, out of "
            f"{len(layers)}; exclude fewer"
        )
    if not targets:
        kinds = ", ".join(t.__name__ for t in types)
        have = sorted({type(m).__name__ for m in model.modules() if isinstance(m, tuple(AXES))})
        quantized = sorted({type(m).__name__ for m in model.modules() if ".quantized" in type(m).__module__})
        if have:
            remedy = f"layers that could be: layer_type={', '.join(have)}"
        elif quantized:
            remedy = f"its layers are quantized ({', '.join(quantized)}), so make it sparse first and quantize it after"
        else:
            remedy = "the model has no layer that could be"
        raise TargetError(f"no {kinds} layer to make sparse in {type(model).__name__}; {remedy}")
    return targets


def as_patterns(exclude: Iterable[str]) -> tuple[str, ...]:
    """Names or patterns of layers, given as one or as several.

    Raises:
        ArgumentError: neither.

    Example:
        >>> as_patterns("head")
        ('head',)
    """
    if isinstance(exclude, str):
        return (exclude,)
    if not isinstance(exclude, Iterable):
        raise ArgumentError(f"exclude={exclude!r} is no layer name or list of them; by default it is ()")
    return tuple(exclude)


def as_layer_types(layer_type: LayerTypes) -> tuple[type[nn.Module], ...]:
    """A tuple of layer types that can take part.

    Raises:
        ArgumentError: one of them has no weight to cut.

    Example:
        >>> as_layer_types(nn.Linear)
        (<class 'torch.nn.modules.linear.Linear'>,)
    """
    if isinstance(layer_type, str):
        raise ArgumentError(f"layer_type={layer_type!r} is a string; give the type itself, such as nn.{layer_type}")
    types = tuple(layer_type) if isinstance(layer_type, Sequence) else (layer_type,)
    known = ", ".join(t.__name__ for t in AXES)
    if not types:
        raise ArgumentError(f"layer_type is empty; use one or several of {known}")
    for kind in types:
        if not isinstance(kind, type) or not issubclass(kind, tuple(AXES)):
            given = getattr(kind, "__name__", repr(kind))
            raise ArgumentError(
                f"layer_type {given} has no weight that can be made sparse; use one or several of {known}"
            )
    return types


def _maskable(name: str, module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if parametrize.is_parametrized(module, "weight"):
        raise TargetError(
            f"layer {name!r}: its weight is computed by a parametrization, so zeros in it would not last; call "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first, or exclude=[{name!r}]"
        )
    if isinstance(weight, Tensor) and is_lazy(weight):
        raise TargetError(f"layer {name!r} is lazy and has no weight yet; run one batch through the model first")
    if not isinstance(weight, nn.Parameter):
        raise TargetError(
            f"layer {name!r}: its weight is no parameter but computed from others (weight_norm, spectral_norm or "
            f"torch.nn.utils.prune); remove that first (remove_weight_norm, prune.remove), or exclude=[{name!r}]"
        )
    if not weight.is_floating_point():
        raise TargetError(
            f"layer {name!r} has a weight of {weight.dtype}; only floating-point weights can be masked, "
            f"so exclude=[{name!r}]"
        )
    if getattr(type(weight), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None):
        raise TargetError(
            f"layer {name!r} has a weight of type {type(weight).__name__}, as quantization and sharding leave it; "
            f"masks need the plain tensor, so make the network sparse before that, or exclude=[{name!r}]"
        )
    unusable = next((what for what, is_so in _unusable(weight) if is_so), None)
    if unusable is not None:
        raise TargetError(
            f"layer {name!r} has a weight {unusable}, which cannot be masked; make it an ordinary dense tensor first, "
            f"or exclude=[{name!r}]"
        )
    axes = next(letters for kind, letters in AXES.items() if isinstance(module, kind))
    if weight.ndim != len(axes):
        raise TargetError(
            f"layer {name!r} has a weight of shape {tuple(weight.shape)}, and a {type(module).__name__} has one of "
            f"{len(axes)} axes; exclude=[{name!r}]"
        )
    if weight.numel() == 0:
        raise TargetError(f"layer {name!r} has an empty weight of shape {tuple(weight.shape)}; exclude=[{name!r}]")
    return weight


def _unusable(weight: Tensor) -> Iterable[tuple[str, bool]]:
    return (
        ("on the meta device, without any numbers", weight.device.type == "meta"),
        (f"of layout {weight.layout} (sparse)", weight.layout != torch.strided),
        (f"of {weight.dtype}", weight.dtype.itemsize == 1),
    )


def match_layers(pattern: str, layers: Iterable[str], what: str = "sparsity") -> list[str]:
    """The layer names that a name or pattern stands for.

    Args:
        pattern: an exact name, or one with the wildcards `*`, `?` and `[…]`; `*` spans dots too.
        layers: every layer name.
        what: the argument that the pattern came in, for the message.

    Raises:
        TargetError: it matches nothing; the closest names are listed.

    Example:
        >>> match_layers("0.*.conv?", ["0.1.conv1", "0.1.conv2", "0.1.fc"])
        ['0.1.conv1', '0.1.conv2']
    """
    names = list(layers)
    if not isinstance(pattern, str):
        raise ArgumentError(f"{what}: layer name {pattern!r} is no string")
    found = [pattern] if pattern in names else [n for n in names if fnmatch.fnmatchcase(n, pattern)]
    if not found:
        raise TargetError(f"{what}: no layer is called {pattern!r}. {closest(pattern, names)}")
    return found


def resolve_sparsity(
    sparsity: float | Mapping[str, float], layers: Iterable[str], what: str = "sparsity"
) -> dict[str, Fraction]:
    """A target for every layer.

    Args:
        sparsity: a percentage for all layers, or a dict of layer name or pattern → percentage. An exact name beats
            a pattern.
        layers: every layer name.
        what: the argument that it came in, for the messages.

    Returns:
        Layer name → fraction of units to mask, for every layer that has a target, in the order of `layers`.

    Raises:
        ArgumentError: no percentage, an empty dict, or two patterns that give one layer different targets.
        TargetError: a name that matches nothing.

    Example:
        >>> resolve_sparsity({"a*": 30}, ["a1", "b"])
        {'a1': Fraction(3, 10)}
    """
    names = list(layers)
    if not isinstance(sparsity, Mapping):
        return dict.fromkeys(names, as_fraction(sparsity))
    if not sparsity:
        raise ArgumentError(f"{what} is an empty dict; give layer name → percentage, or one number for all layers")
    given: dict[str, tuple[str, Fraction]] = {}
    for pattern, percent in sparsity.items():
        fraction = as_fraction(percent)
        for name in match_layers(pattern, names, what):
            before = given.get(name)
            if before is not None and before[0] == name:
                continue
            if before is not None and pattern != name and before[1] != fraction:
                raise ArgumentError(
                    f"{what}: layer {name!r} matches {before[0]!r} ({float(before[1] * 100):g} %) and {pattern!r} "
                    f"({float(fraction * 100):g} %); name the layer itself, or narrow a pattern"
                )
            given[name] = (pattern, fraction)
    return {name: given[name][1] for name in names if name in given}
