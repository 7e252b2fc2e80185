"""A captured graph, with convolutions and linear layers taken together with what follows them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.planes import Add, Concat, Flatten, MaxPool, Mean, Scale

_ATEN = torch.ops.aten
_ACTIVATIONS: Mapping[Any, str] = MappingProxyType(
    {
        _ATEN.relu.default: "relu",
        _ATEN.relu6.default: "relu6",
        _ATEN.silu.default: "silu",
        _ATEN.hardswish.default: "hardswish",
        _ATEN.hardsigmoid.default: "hardsigmoid",
        _ATEN.sigmoid.default: "sigmoid",
    }
)


def fuse(graph: GraphModule) -> list[str]:
    """Replaces each convolution and linear layer, with the normalisation, addition and activation that follow it alone,
    and what else the engine knows.

    Args:
        graph: of ATen operators, as torch.export gives it; it is changed.

    Returns:
        The names of the modules that took their place, in the graph's order.
    """
    names: list[str] = []
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        made = _convolution(graph, node, order) or _linear(graph, node, order)
        if made is not None:
            names.append(_replace(graph, order, *made))
    for node in list(graph.graph.nodes):
        made = next(filter(None, (make(node) for make in _BETWEEN)), None) if node.op == "call_function" else None
        if made is not None:
            names.append(_replace(graph, order, *made))
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    _drop_unused(graph)
    graph.recompile()
    return names


def _replace(
    graph: GraphModule, order: dict[Node, int], module: nn.Module, last: Node, inputs: list[Node], name: str
) -> str:
    name = _free(graph, name)
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(last):
        new = graph.graph.call_module(name, tuple(inputs))
    new.meta.update({key: last.meta[key] for key in ("val",) if key in last.meta})
    last.replace_all_uses_with(new)
    order[new] = order[last]
    return name


def _convolution(graph: GraphModule, node: Node, order: Mapping[Node, int]) -> Any:
    if node.op != "call_function" or node.target not in (_ATEN.conv2d.default, _ATEN.conv2d.padding):
        return None
    x, weight, bias, stride, padding, dilation, groups = _arguments(node, (None, None, None, 1, 0, 1, 1))
    tensor = _constant(graph, weight)
    if isinstance(padding, str) and tensor is not None:
        padding = padding_of(padding, _pair(tensor.shape[2:]), _pair(dilation))
        if padding is None:
            return None
    shift = None if bias is None else _constant(graph, bias)
    if tensor is None or tensor.dtype != torch.float32 or (bias is not None and shift is None):
        return None
    last, (tensor, shift) = _fold_norm(graph, node, tensor, shift)
    last, more, activation, add_last = _followed(last, order)
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation), int(groups))
    module = Layer(tensor, shift, geometry, activation, add_last=add_last)
    return module, last, [x, *more], _layer_name(weight)


def padding_of(padding: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int] | None:
    """A convolution's padding in numbers, (vertical, horizontal); None where it is not the same at both ends.

    Example:
        >>> padding_of("same", (3, 5), (1, 2)), padding_of("same", (2, 2), (1, 1)), padding_of("valid", (3, 3), (1, 1))
        ((1, 4), None, (0, 0))
    """
    if not isinstance(padding, str):
        return _pair(tuple(padding))
    if padding == "valid":
        return 0, 0
    vertical, horizontal = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    return None if vertical % 2 or horizontal % 2 else (vertical // 2, horizontal // 2)


def _followed(last: Node, order: Mapping[Node, int]) -> tuple[Node, list[Node], str, bool]:
    """What follows a layer alone: the last of it, what is added, the activation, and whether that comes first."""
    more: list[Node] = []
    added = _added(last, order)
    if added is not None:
        last, other = added
        more.append(other)
    activated = _activation(last)
    if activated is None:
        return last, more, "none", False
    last, activation = activated
    if more or (added := _added(last, order)) is None:
        return last, more, activation, False
    return added[0], [added[1]], activation, True


def _linear(graph: GraphModule, node: Node, order: Mapping[Node, int]) -> Any:
    if node.op != "call_function" or node.target is not _ATEN.linear.default:
        return None
    x, weight, bias = _arguments(node, (None, None, None))
    tensor = _constant(graph, weight)
    shift = None if bias is None else _constant(graph, bias)
    if tensor is None or tensor.dtype != torch.float32 or tensor.ndim != 2 or (bias is not None and shift is None):
        return None
    last, more, activation, add_last = _followed(node, order)
    return Layer(tensor, shift, None, activation, add_last=add_last), last, [x, *more], _layer_name(weight)


def _max_pool(node: Node) -> Any:
    if node.target is not _ATEN.max_pool2d.default or not _is_image(node.args[0]):
        return None
    x, kernel, stride, padding, dilation, ceil = _arguments(node, (None, None, [], 0, 1, False))
    if _pair(dilation) != (1, 1):
        return None
    module = MaxPool(_pair(kernel), _pair(stride or kernel), _pair(padding), bool(ceil))
    return module, node, [x], node.name


def _mean(node: Node) -> Any:
    x, size = (*node.args, None)[:2]
    if node.target is _ATEN.adaptive_avg_pool2d.default and _is_image(x) and _pair(size) == (1, 1):
        return Mean(), node, [x], node.name
    if node.target is _ATEN.mean.dim and _is_image(x) and not node.kwargs:
        _, axes, keep, _ = _arguments(node, (None, None, False, None))
        if sorted(int(a) % 4 for a in axes or ()) == [2, 3]:
            return Mean(bool(keep)), node, [x], node.name
    return None


def _flatten(node: Node) -> Any:
    x = node.args[0] if node.args else None
    if node.target not in (_ATEN.view.default, _ATEN.reshape.default, _ATEN.flatten.using_ints) or not _is_image(x):
        return None
    before, after = cast(Node, x).meta["val"].shape, node.meta["val"].shape
    if len(after) == 2 and tuple(before[2:]) == (1, 1) and after[1] == before[1]:
        return Flatten(), node, [x], node.name
    return None


def _elementwise(node: Node) -> Any:
    if node.target is _ATEN.add.Tensor and not node.kwargs and len(node.args) == 2:
        a, b = node.args
        same = _is_float(a) and _is_float(b) and _shape(a) == _shape(b) == _shape(node)
        return (Add(), node, [a, b], node.name) if same else None
    if node.target is _ATEN.mul.Tensor and len(node.args) == 2:
        for x, factor in (node.args, node.args[::-1]):
            fits = _is_image(x) and _is_image(factor) and tuple(_shape(factor)[2:]) == (1, 1)
            if fits and tuple(_shape(x)[:2]) == tuple(_shape(factor)[:2]) and _shape(x) == _shape(node):
                return Scale(), node, [x, factor], node.name
    name = _activation_of(node)
    x = node.args[0] if node.args else None
    return (Add(name), node, [x], node.name) if name is not None and _is_float(x) and _shape(x) else None


def _concat(node: Node) -> Any:
    if node.target is not _ATEN.cat.default:
        return None
    parts, axis = (*node.args, 0)[:2]
    if axis in (1, -3) and isinstance(parts, (list, tuple)) and all(map(_is_image, parts)):
        return Concat(), node, list(parts), node.name
    return None


_BETWEEN = (_max_pool, _mean, _flatten, _elementwise, _concat)


def _shape(node: Any) -> Any:
    return getattr(node.meta.get("val"), "shape", ()) if isinstance(node, Node) else ()


def _is_float(node: Any) -> bool:
    return isinstance(node, Node) and getattr(node.meta.get("val"), "dtype", None) == torch.float32


def _is_image(node: Any) -> bool:
    return _is_float(node) and len(_shape(node)) == 4


def _arguments(node: Node, defaults: tuple[Any, ...]) -> list[Any]:
    names = [a.name for a in cast(Any, node.target)._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name, default) for name, default in zip(names, defaults, strict=True)]


def _fold_norm(graph: GraphModule, node: Node, weight: Tensor, bias: Tensor | None) -> tuple[Node, Any]:
    """Takes a BatchNorm that follows alone into the weights: w·γ/√(σ²+ε), (b-μ)·γ/√(σ²+ε)+β. Zeros stay zeros."""
    norm = _only_user(node)
    if norm is None or norm.target is not _ATEN._native_batch_norm_legit_no_training.default:
        return node, (weight, bias)
    scale, shift, mean, variance = (None if a is None else _constant(graph, a) for a in norm.args[1:5])
    item = _only_user(norm)
    is_first = item is not None and item.target is operator.getitem and item.args[1] == 0
    if item is None or not is_first or mean is None or variance is None:
        return node, (weight, bias)
    factor = (variance.double() + float(cast(float, norm.args[6]))).rsqrt()
    factor = factor if scale is None else factor * scale.double()
    offset = -mean.double() if bias is None else bias.double() - mean.double()
    offset = offset * factor if shift is None else offset * factor + shift.double()
    return item, ((weight.double() * factor.view(-1, 1, 1, 1)).float(), offset.float())


def _added(node: Node, order: Mapping[Node, int]) -> tuple[Node, Node] | None:
    """The addition that follows alone, of two tensors of one shape, and the other one."""
    add = _only_user(node)
    if add is None or add.target is not _ATEN.add.Tensor or add.kwargs or len(add.args) != 2:
        return None
    a, b = add.args
    other = b if a is node else a
    if not isinstance(other, Node) or other is node:
        return None
    shapes = [getattr(n.meta.get("val"), "shape", None) for n in (node, other, add)]
    if shapes[0] is None or not shapes[0] == shapes[1] == shapes[2] or other.meta["val"].dtype != torch.float32:
        return None
    return add, other


def _activation(node: Node) -> tuple[Node, str] | None:
    user = _only_user(node)
    name = None if user is None else _activation_of(user)
    return None if user is None or name is None else (user, name)


def _activation_of(node: Node) -> str | None:
    if node.target in _ACTIVATIONS:
        return _ACTIVATIONS[node.target]
    if node.target is _ATEN.hardtanh.default and tuple(node.args[1:]) == (0.0, 6.0):
        return "relu6"
    if node.target is _ATEN.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _constant(graph: GraphModule, node: Any) -> Tensor | None:
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value.detach() if isinstance(value, Tensor) else None


def _layer_name(weight: Node) -> str:
    return str(weight.target).removesuffix(".weight").replace(".", "_")


def _free(graph: GraphModule, name: str) -> str:
    name = f"gossamer_{name}"
    while hasattr(graph, name):
        name += "_"
    return name


def _drop_unused(graph: GraphModule) -> None:
    """Lets go of parameters that nothing reads any more, such as weights that were folded."""
    used = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    ours = tuple(f"{n}." for n, m in graph.named_modules() if isinstance(m, Layer))
    for name, _ in [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]:
        if name in used or name.startswith(ours):
            continue
        *path, leaf = name.split(".")
        holder: nn.Module = graph.get_submodule(".".join(path))
        delattr(holder, leaf)


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, (list, tuple)) else [value]
    return int(first), int(rest[0] if rest else first)
