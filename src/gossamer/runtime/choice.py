"""Which layers run by their weights that are not zero, and which dense: by what both should take, or by a trial."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from gossamer.native import native
from gossamer.runtime.capture import copied
from gossamer.runtime.layers import IN_PLACE, OUT_PLACE, Layer
from gossamer.runtime.program import DoesNotFitError, dense_call
from gossamer.runtime.segment import Segment, gather, signature_of
from gossamer.runtime.values import FEW

WORTH = 40.0
"""Percent of zeros from which on a layer runs sparse where nothing is known of its inputs."""

_LEAST = 20.0
"""Percent of zeros below which a layer is taken for a dense one."""

GAIN = 0.9
"""Of the dense time, what a sparse layer may be expected to take: the estimates are no better than that."""

_BACK, _BACK_WITH_THREADS = 75_000.0, 500_000.0
"""What it costs to go from the engine to PyTorch for a layer, and back. Threads of its own spin on for a while."""

_ROUNDS = 7
_MARGIN = 0.9
"""What a trial must gain over the expected way to overrule it: machines are noisy."""


def choose(graph: GraphModule, args: tuple[Any, ...], *, tune: bool = False) -> None:
    """Settles `is_sparse`, and `expected`, of every layer of a graph.

    Args:
        graph: as `capture` gives it.
        args: example inputs; the choice is made for their shapes.
        tune: whether each layer is tried both ways on this machine.
    """
    if native() is None:
        for module in graph.modules():
            if isinstance(module, Layer):
                module.is_sparse = runs_sparse(module)
        return
    choice = _Choice(graph, tune)
    with torch.no_grad():
        choice.run(*args)
        _stay(choice.costs)
        _leave(graph, args)


def runs_sparse(layer: Layer) -> bool:
    """Whether a layer is faster by its non-zero weights than dense, whatever its inputs."""
    if layer.is_depthwise:  # a kernel of its own, which is no slower where nothing is zero
        return True
    return layer.weight[0].numel() >= 16 and layer.sparsity >= WORTH


class _Choice(Interpreter):
    """Runs a graph, and looks at what reaches each layer."""

    def __init__(self, graph: GraphModule, tune: bool) -> None:
        super().__init__(graph)
        self._tune = tune
        self.costs: dict[Layer, tuple[float, float] | None] = {}

    def run_node(self, n: Node) -> Any:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, Layer) and module not in self.costs:
            inputs, _ = self.fetch_args_kwargs_from_env(n)
            self.costs[module] = _settle(module, tuple(inputs), self._tune)
        return super().run_node(n)


def _stay(costs: Mapping[Layer, tuple[float, float] | None]) -> None:
    """Keeps the last dense layers of a network sparse, too, where going back to PyTorch for them would take longer."""
    dense = [(layer, cost) for layer, cost in costs.items() if not layer.is_sparse]
    fixed = any(cost is None or layer.is_measured or layer.sparsity < WORTH for layer, cost in dense)
    if len(dense) == len(costs) or fixed:
        return
    longer = sum(cost[0] - cost[1] for _, cost in dense if cost is not None)
    is_alone = torch.get_num_threads() == 1 or native().gossamer_has_team()
    if longer < (_BACK if is_alone else _BACK_WITH_THREADS):
        for layer, _ in dense:
            layer.is_sparse = True


def _leave(graph: GraphModule, args: tuple[Any, ...]) -> None:
    """Leaves to PyTorch what gains less than a call of the engine takes: small layers that stand alone."""
    gathered = copied(graph)
    gather(gathered)
    _Calls(gathered).run(*args)


class _Calls(Interpreter):
    """Runs a graph with segments, and makes those dense that its inputs are too few for."""

    def run_node(self, n: Node) -> Any:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        result = super().run_node(n)
        if isinstance(module, Segment):
            inputs, _ = self.fetch_args_kwargs_from_env(n)
            if module.stages(*inputs) is None:
                for _, operator in module.operators():
                    if isinstance(operator, Layer):
                        operator.is_sparse = False
        return result


def _settle(layer: Layer, inputs: tuple[Tensor, ...], tune: bool) -> tuple[float, float] | None:
    """What it should take sparse, and dense; None where there is no choice."""
    if layer.sparsity < _LEAST and not layer.is_depthwise:
        layer.is_sparse, layer.expected = False, None
        return None
    try:
        value = signature_of(inputs[0], layer.geometry is None)
    except DoesNotFitError:  # an image without a batch
        layer.is_sparse, layer.expected = False, None
        return None
    direct = IN_PLACE + OUT_PLACE if layer.is_pointwise and value.images * value.pixels >= FEW else 0
    sparse = layer.cost(value, 1, direct)
    if sparse is None:
        layer.is_sparse, layer.expected = False, None
        return None
    dense = layer.dense_cost(value) + dense_call(layer)  # one that runs sparse is called together with others
    layer.expected = sparse / dense
    # A depthwise layer that ran in PyTorch would also take apart what is around it.
    layer.is_sparse = layer.expected < GAIN or layer.is_depthwise
    if tune:
        measured = _tried(layer, inputs)
        if measured is not None and (measured < _MARGIN if not layer.is_sparse else measured * _MARGIN > 1):
            layer.is_sparse = not layer.is_sparse
        if measured is not None:
            layer.expected, layer.is_measured = measured, True
    return sparse, dense


def _tried(layer: Layer, inputs: tuple[Tensor, ...]) -> float | None:
    """The time of the sparse kernel over that of PyTorch: the median of some rounds, side by side."""
    segment = Segment.of(layer, len(inputs))
    if segment.stages(*inputs) is None:
        return None
    ratios: list[float] = []
    for _ in range(_ROUNDS):
        seconds = sum(took for name, took in segment.timed(*inputs)[1] if name == "operator")
        layer(*inputs)
        began = time.perf_counter()
        layer(*inputs)
        ratios.append(seconds / (time.perf_counter() - began))
    return statistics.median(ratios)
