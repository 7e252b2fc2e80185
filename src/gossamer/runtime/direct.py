"""The shortest way through a captured network, for inputs of a kind that went through it before."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils._pytree import TreeSpec, tree_unflatten

from gossamer.runtime.activations import ACTIVATIONS
from gossamer.runtime.layers import Layer
from gossamer.runtime.planes import Add


def direct(graph: GraphModule) -> GraphModule | None:
    """A graph that does what a graph does and checks nothing; None where it takes or gives unusual containers.

    In a network of a few small layers, what torch.export wraps a graph in takes longer than the layers.

    Args:
        graph: as `capture` gives it, or a part of that. Its weights are taken as they are now.

    Example:
        >>> import torch
        >>> from gossamer.runtime.capture import capture
        >>> graph = capture(torch.nn.Linear(2, 2).eval(), (torch.ones(3, 2),))
        >>> torch.equal(direct(graph)(torch.ones(5, 2)), graph(torch.ones(5, 2)))
        True
    """
    info = getattr(graph.graph._codegen, "pytree_info", None)
    if info is not None and not (_is_flat(info.in_spec) and _is_usual(info.out_spec)):
        return None
    new, values, root = Graph(), dict[Node, Any](), dict[str, Any]()
    for node in graph.graph.nodes:
        if node.op == "output":
            result: Any = map_arg(node.args[0], values.__getitem__)
            new.output(result if info is None else tree_unflatten(list(result), info.out_spec))
        elif node.op != "call_module" or node.users:  # no guard
            values[node] = _copied(graph, new, node, values, root)
    made = GraphModule(root, new)
    new.eliminate_dead_code()  # sizes that only guards wanted
    made.recompile()
    return made


def _is_flat(spec: TreeSpec) -> bool:
    args, kwargs = spec.children()
    return not kwargs.num_children and all(s.is_leaf() for s in args.children())


def _is_usual(spec: TreeSpec) -> bool:
    if spec.is_leaf():
        return True
    is_written = spec.type is not dict or all(type(k) in (str, int, bool) for k in spec.context)  # keys become code
    return spec.type in (tuple, list, dict) and is_written and all(_is_usual(s) for s in spec.children())


def _copied(graph: GraphModule, new: Graph, node: Node, values: dict[Node, Any], root: dict[str, Any]) -> Any:
    if node.op == "call_function":
        return _simpler(new, node, values)
    if node.op not in ("call_module", "get_attr"):
        return new.node_copy(node, values.__getitem__)
    target = str(node.target)
    value = operator.attrgetter(target)(graph)
    inputs = [values[a] for a in node.args if isinstance(a, Node)]
    if isinstance(value, Layer):
        return _inlined(new, value, inputs, root)
    if isinstance(value, Add):
        is_ours = len(inputs) == 2 or _is_fresh(node.args[0])
        total = new.call_function(operator.add, tuple(inputs)) if len(inputs) == 2 else inputs[0]
        return _activated(new, value.activation, total, is_ours=is_ours)
    root[target] = value
    return new.node_copy(node, values.__getitem__)


_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def _simpler(new: Graph, node: Node, values: dict[Node, Any]) -> Any:
    """A BatchNorm as networks call it, which is faster than what a capture makes of it; anything else as it is."""
    if node.target is _NORM and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users):
        x, weight, bias, mean, variance, momentum, eps = map_arg(node.args, values.__getitem__)
        return (new.call_function(F.batch_norm, (x, mean, variance, weight, bias, False, momentum, eps)),)
    of = values.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    if isinstance(of, tuple):
        return of[0]
    return new.node_copy(node, values.__getitem__)


def _is_fresh(node: Any) -> bool:
    """Whether nobody else has, or wants, what a node gives: the result of a BatchNorm."""
    return (
        isinstance(node, Node)
        and node.target is operator.getitem
        and isinstance(node.args[0], Node)
        and node.args[0].target is _NORM
        and len(node.users) == 1
        and len(node.args[0].users) == 1
    )


_IN_PLACE = ("relu", "relu6", "silu", "hardswish", "hardsigmoid")


def _activated(new: Graph, activation: str, y: Node, *, is_ours: bool = True) -> Node:
    if activation == "none":
        return y
    # Into new memory a function takes twice as long.
    return new.call_function(
        ACTIVATIONS[activation], (y,), {"inplace": True} if is_ours and activation in _IN_PLACE else {}
    )


def _inlined(new: Graph, layer: Layer, inputs: list[Node], root: dict[str, Any]) -> Node:
    """What the layer's own `forward` does, without a call of a module."""

    def weight(value: Any, kind: str) -> Node:
        name = f"gossamer__{kind}_{len(root)}"  # which no parameter of the network's own has
        root[name] = value
        return new.get_attr(name)

    g = layer.geometry
    x, residual = inputs[0], inputs[1] if len(inputs) > 1 else None
    parts = (x, weight(layer.weight, "weight"), None if layer.bias is None else weight(layer.bias, "bias"))
    if g is None:
        y = new.call_function(F.linear, parts)
    else:
        y = new.call_function(F.conv2d, (*parts, g.stride, g.padding, g.dilation, g.groups))
    if residual is not None and not layer.add_last:
        y = new.call_function(operator.iadd, (y, residual))
    y = _activated(new, layer.activation, y)
    return new.call_function(operator.iadd, (y, residual)) if residual is not None and layer.add_last else y
