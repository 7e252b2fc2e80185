"""A network as a graph of the engine's operators and of PyTorch's, by torch.export."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram, export
from torch.fx import Graph, GraphModule, Node

from gossamer.errors import first_line
from gossamer.runtime.fusion import fuse


class NotCapturedError(Exception):
    """torch.export could not make a graph of the network."""


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> GraphModule:
    """A graph whose layers are operators of the engine, each of them with what follows it.

    Args:
        model: in eval mode.
        args: example inputs; sizes may change later where the network allows it.
        kwargs: further ones; with these, sizes are fixed.

    Raises:
        NotCapturedError: it cannot be done; the message says why.
    """
    # A batch of one would be taken for a constant, so it is captured with two.
    doubled = tuple(
        a.repeat(2, *[1] * (a.ndim - 1)) if isinstance(a, Tensor) and a.ndim and len(a) == 1 else a for a in args
    )
    failed = ""
    for given, shapes in ((doubled, _dynamic(doubled)), (args, None)):
        try:
            program: ExportedProgram = export(
                model, given, dict(kwargs or {}), dynamic_shapes=None if kwargs else shapes, strict=False
            )
            graph: Any = program.run_decompositions({}).module()
        except Exception as error:  # anything at all, from anywhere in PyTorch or the network
            failed = _reason(error)
        else:
            fuse(graph)
            return graph
    raise NotCapturedError(failed)


_UNKNOWN = re.compile(r"Found <class '([^']+)'> in output, which is not a known type")


def _reason(error: Exception) -> str:
    unknown = _UNKNOWN.match(str(error))
    if unknown is None:
        return first_line(error)
    name = unknown[1].rpartition(".")[2]
    return (
        f"its output is of the class {name}, which torch.export does not know: let it give tensors and numbers, in "
        f"tuples, lists or dicts; or, where it is a dataclass, call torch.export.register_dataclass({name}) before"
    )


def written(graph: GraphModule) -> list[Tensor]:
    """What of a network's own a call of its graph changes: counters, running statistics in training mode.

    Args:
        graph: as `capture` gives it.
    """
    changed = [n.args[0] for n in graph.graph.nodes if _is_call_of(n, lambda f: f._schema.is_mutable) and n.args]
    return [operator.attrgetter(str(n.target))(graph) for n in changed if isinstance(n, Node) and n.op == "get_attr"]


def is_steady(graph: GraphModule) -> bool:
    """Whether a graph gives the same each time: it changes nothing, and draws no random numbers."""
    return not written(graph) and not any(
        _is_call_of(n, lambda f: torch.Tag.nondeterministic_seeded in f.tags) for n in graph.graph.nodes
    )


def _is_call_of(node: Node, kind: Callable[[OpOverload], bool]) -> bool:
    return node.op == "call_function" and isinstance(node.target, OpOverload) and kind(node.target)


def copied(graph: GraphModule) -> GraphModule:
    """The same graph over the same modules, to be changed by itself."""
    new = Graph()
    values: dict[Node, Node] = {}
    result = new.graph_copy(graph.graph, values)
    new.output(result)
    new.set_codegen(graph.graph._codegen)
    return GraphModule(graph, new)


def _dynamic(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        {axis: Dim.AUTO for axis in range(a.ndim) if axis != 1 or a.ndim == 2} if isinstance(a, Tensor) else None
        for a in arguments
    )
