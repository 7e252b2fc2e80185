"""Operators of the engine that follow each other, taken together as one module of a graph."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from gossamer.native import native
from gossamer.runtime.direct import direct
from gossamer.runtime.layers import Layer
from gossamer.runtime.planes import Add, Concat, Flatten, MaxPool, Mean, Scale
from gossamer.runtime.program import DoesNotFitError, layer_costs, output_of, returns_of
from gossamer.runtime.stages import Stage, make_stages, run_stages
from gossamer.runtime.values import Signature

OPERATORS = (Layer, MaxPool, Add, Scale, Mean, Flatten, Concat)
"""What the engine runs."""

_KEPT = 16
"""Ways of running that a segment keeps, one for each shapes and number of threads."""


class Segment(nn.Module):
    """Runs a graph of operators in one call of the compiled library; where that does not fit, one by one in PyTorch.

    Args:
        graph: each of its nodes one of `OPERATORS`.
        declines: whether PyTorch runs it where the inputs are of shapes for which its layers should be faster dense.
        team: whether it runs between operators of PyTorch's, and so on the same threads where they can be had: those
            wait for the next operator without leaving the processor to others.

    Example:
        >>> segment = Segment.of(Layer(torch.eye(3), None, None, "relu"))
        >>> segment(torch.tensor([[-1.0, 0.0, 2.0]]))
        tensor([[0., 0., 2.]])
    """

    def __init__(self, graph: GraphModule, *, declines: bool = False, team: bool = False) -> None:
        super().__init__()
        self.graph, self.declines, self.team = graph, declines, team
        self._tokens = _tokens(graph)
        self._order = _order(graph)
        self._isa = -1  # the best that there is
        self._kept: OrderedDict[Any, list[Stage] | None] = OrderedDict()
        self._lock = threading.Lock()
        self._direct: tuple[Any] | None = None

    @classmethod
    def of(cls, operator: nn.Module, n_inputs: int = 1, *, declines: bool = False, team: bool = False) -> Segment:
        """One operator by itself."""
        graph = Graph()
        inputs = tuple(graph.placeholder(f"x{i}") for i in range(n_inputs))
        graph.output(graph.call_module("operator", inputs))
        return cls(GraphModule({"operator": operator}, graph), declines=declines, team=team)

    def operators(self) -> list[tuple[str, nn.Module]]:
        """Name and operator, in order."""
        return [(str(n.target), self.graph.get_submodule(str(n.target))) for n in _calls(self.graph)]

    def copies(self) -> list[str]:
        """Names of the steps that only move values, beside those of the operators."""
        operators = {str(n.target) for n in _calls(self.graph)}  # which mostly are called as their nodes are
        return [n.name for n in self.graph.graph.nodes if n.name not in operators]

    @property
    def operator(self) -> nn.Module:
        """The first one."""
        return self.operators()[0][1]

    def forward(self, *inputs: Tensor) -> Any:
        """What the graph gives."""
        stages = self.stages(*inputs)
        return self._declined(inputs) if stages is None else self._given(run_stages(stages, inputs))

    def _declined(self, inputs: Sequence[Tensor]) -> Any:
        found = self._direct
        if found is None:
            self._direct = found = (
                direct(self.graph) or self.graph,
            )  # in a tuple, so that it is no part of this module
        return found[0](*inputs)

    def timed(self, *inputs: Tensor) -> tuple[Any, list[tuple[str, float]]]:
        """What the graph gives, and the seconds of each step by the name of its operator."""
        stages, seconds = self.stages(*inputs), list[tuple[str, float]]()
        if stages is None:
            return self.graph(*inputs), seconds
        return self._given(run_stages(stages, inputs, seconds)), seconds

    def _given(self, results: Sequence[Tensor]) -> Any:
        """The results of a program, each of which is there once, as the graph returns them."""
        order = self._order
        return results[order] if isinstance(order, int) else tuple(results[i] for i in order)

    def stages(self, *inputs: Tensor) -> list[Stage] | None:
        """What runs inputs of these shapes; None where PyTorch has to."""
        if native() is None or not all(is_plain(x) and x.numel() and _is_real(x) for x in inputs):
            return None
        threads = torch.get_num_threads()
        key = (threads, *(x.shape for x in inputs))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            try:
                values = [signature_of(x, tokens) for x, tokens in zip(inputs, self._tokens, strict=True)]
                is_slower = self.declines and self._is_slower(values)
                stages = None if is_slower else make_stages(self.graph, values, threads, self._isa, self.team)
            except DoesNotFitError:
                stages = None
            self._kept[key] = stages
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return stages

    def _is_slower(self, values: Sequence[Signature]) -> bool:
        # What is sparse was chosen for the shapes of an example; these may be far from those.
        if any(isinstance(m, Layer) and m.is_measured for _, m in self.operators()):
            return False
        sparse, dense = layer_costs(self.graph, values, self._isa)
        return sparse > dense

    # Copied and pickled networks make their own.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_lock": None, "_direct": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def _apply(self, fn: Any, recurse: bool = True) -> Segment:
        super()._apply(fn, recurse)
        self._kept, self._direct = OrderedDict(), None
        return self


def is_plain(x: Tensor) -> bool:
    """Whether the compiled kernels can read a tensor: float32, on the CPU, and nobody asks for its gradient."""
    is_here = x.dtype == torch.float32 and x.device.type == "cpu" and x.layout == torch.strided and not x.is_neg()
    return is_here and not (torch.is_grad_enabled() and x.requires_grad)


def _is_real(x: Tensor) -> bool:
    """Whether its numbers are there: not where torch.export, vmap or a trace only looks at what would be computed."""
    try:
        return x.data_ptr() != 0 and not cast(Any, torch.jit).is_tracing()
    except RuntimeError:
        return False


def gather(graph: GraphModule) -> None:
    """Takes the operators of a graph that follow each other together as segments, where a sparse layer is among them.

    Args:
        graph: with operators of the engine as modules; it is changed.
    """
    partitioner = CapabilityBasedPartitioner(
        graph, _Supported(), allows_single_node_partition=True, skip_horizontal_fusion=True
    )
    partitions = [
        p
        for p in partitioner.propose_partitions()
        if any(isinstance(m, Layer) and m.is_sparse for m in (_module(graph, n) for n in p.nodes))
    ]
    partitioner.fuse_partitions(partitions, prefix="gossamer_segment_")
    segments = [name for name, _ in graph.named_children() if name.startswith("gossamer_segment_")]
    own = {*segments, "_guards_fn"}  # the latter is torch.export's look at the inputs
    team = any(n.op.startswith("call") and str(n.target) not in own for n in graph.graph.nodes)
    for name in segments:
        module = graph.get_submodule(name)
        assert isinstance(module, GraphModule)
        setattr(graph, name, Segment(module, declines=True, team=team))
    graph.delete_all_unused_submodules()
    graph.recompile()


class _Supported(OperatorSupportBase):
    def is_node_supported(self, submodules: Mapping[str, nn.Module], node: Node) -> bool:
        module = submodules.get(str(node.target)) if node.op == "call_module" else None
        return isinstance(module, OPERATORS) and (not isinstance(module, Layer) or module.is_sparse)


def _module(graph: GraphModule, node: Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _calls(graph: GraphModule) -> list[Node]:
    return [n for n in graph.graph.nodes if n.op == "call_module"]


def _tokens(graph: GraphModule) -> list[bool]:
    """Which inputs are tokens of features, and not images of channels, by what happens to them."""
    known: dict[Node, bool] = {}
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.ndim != 4:
            known[node] = True
        module = _module(graph, node)
        if isinstance(module, Layer):
            known.update(dict.fromkeys([node, *_inputs(node)], module.geometry is None))
        elif module is not None and not isinstance(module, Add):
            known.update(dict.fromkeys(_inputs(node), False))
            known[node] = isinstance(module, Flatten) or (isinstance(module, Mean) and not module.keep)
    while True:  # additions pass on what is known of one of their sides
        before = len(known)
        for node in graph.graph.nodes:
            if isinstance(_module(graph, node), Add):
                sides = [node, *_inputs(node)]
                for kind in {known[n] for n in sides if n in known}:
                    known.update({n: kind for n in sides if n not in known})
        if len(known) == before:
            return [known.get(n, False) for n in graph.graph.nodes if n.op == "placeholder"]


def _order(graph: GraphModule) -> int | list[int]:
    """Which of a program's results is returned where."""
    returned: Any = output_of(graph).args[0]
    results = returns_of(graph)
    return [results.index(n) for n in returned] if isinstance(returned, (tuple, list)) else results.index(returned)


def _inputs(node: Node) -> list[Node]:
    return [a for a in node.args if isinstance(a, Node)]


def signature_of(x: Tensor, is_tokens: bool) -> Signature:
    """What a tensor is to the engine.

    Raises:
        DoesNotFitError: it has axes that no operator takes.
    """
    if x.ndim == 4 and not is_tokens:
        return Signature(tuple(x.shape))
    if x.ndim >= 1 and is_tokens:
        return Signature(tuple(x.shape), True)
    raise DoesNotFitError(f"an input of {x.ndim} axes")
