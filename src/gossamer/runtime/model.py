"""A network compiled for the CPU: an nn.Module to call, which says what it runs where."""

from __future__ import annotations

import copy
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, Interpreter, Node

from gossamer.errors import ArgumentError, GossamerWarning, StateError
from gossamer.native import native
from gossamer.runtime.fusion import fuse
from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.segment import OPERATORS, Segment, gather

_GRAPHS = 4
"""Captures that a network keeps, beside the first, for inputs that need one of their own."""


@dataclass(frozen=True)
class PlanRow:
    """One row of a plan.

    Args:
        name: the layer's, or the operator's.
        op: what it does.
        runs: 'sparse', 'compiled' (as fast without zeros: pooling, depthwise layers), 'dense' (a layer, in PyTorch) or
            'torch' (anything else).
        why: the reason.
        sparsity: zeros in percent of the weight; None where there is none.
        share: of the time, in percent; None where it was not measured.
    """

    name: str
    op: str
    runs: str
    why: str
    sparsity: float | None
    share: float | None


def compile(model: nn.Module, example_inputs: Any) -> CompiledModel:
    """Compiles a network for inference on the CPU: layers with many zeros run by what is not zero.

    The network is captured with torch.export, BatchNorms are folded, and each convolution and linear layer becomes one
    operator with the addition and the activation that follow it. A layer that would be faster dense runs dense;
    whatever is not known runs in PyTorch.

    Args:
        model: in eval mode, float32, on the CPU. It is not changed.
        example_inputs: a tensor, or a tuple of the arguments; batch and image sizes may change later.

    Returns:
        A module with the same outputs.

    Raises:
        ArgumentError: the network is no module, is in training mode or on a device, or cannot be captured.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
        >>> fast = compile(net, torch.randn(1, 3, 8, 8))
        >>> x = torch.randn(2, 3, 9, 9)
        >>> torch.allclose(fast(x), net(x), atol=1e-6)
        True
    """
    if not isinstance(model, nn.Module):
        hint = "; give learn.model" if hasattr(model, "model") else ""
        raise ArgumentError(f"compile takes a torch.nn.Module, got a {type(model).__name__}{hint}")
    if isinstance(model, CompiledModel):
        raise ArgumentError("the network is compiled already; call it as it is")
    if model.training:
        raise ArgumentError("the network is in training mode; compile(model.eval(), …) compiles it for inference")
    elsewhere = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ArgumentError(f"the network is on {elsewhere}, and this is for a CPU; give model.cpu()")
    if native() is None:
        _say_once_that_nothing_is_compiled()
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return CompiledModel(model, arguments)


@cache
def _say_once_that_nothing_is_compiled() -> None:
    warnings.warn(
        "Gossamer was installed without a C++ compiler, or its compiled part is of another version, so compiled networks "
        "run in PyTorch, no faster; with a compiler: pip install --force-reinstall --no-cache-dir --no-deps gossamer",
        GossamerWarning,
        stacklevel=3,
    )


class CompiledModel(nn.Module):
    """What `compile` gives.

    Args:
        model: the network; kept, to be captured anew for inputs that the first capture does not cover.
        arguments: example inputs.
    """

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is no part of this one
        self._graphs: OrderedDict[Any, nn.Module] = OrderedDict()
        self.training = False
        with torch.no_grad():
            try:
                self.graph = _graph_of(model, arguments)
            except _NotCapturedError as error:
                try:
                    model(*arguments)
                except Exception as wrong:
                    raise ArgumentError(f"the network does not run on the example inputs: {wrong}") from wrong
                warnings.warn(
                    f"the network cannot be captured by torch.export ({error}), so its layers run one by one, without "
                    "what follows them",
                    GossamerWarning,
                    stacklevel=4,
                )
                self.graph = _replaced(model)

    is_compiled = True

    def __reduce__(self) -> Any:
        raise StateError(
            "a compiled network cannot be pickled or copied; keep the network that it was made from, and compile that"
        )

    def train(self, mode: bool = True) -> CompiledModel:
        """It is compiled for inference and stays so.

        Raises:
            StateError: `mode` is True.
        """
        if mode:
            raise StateError("a compiled network cannot be trained; train the one that it was made from")
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives."""
        with torch.no_grad():
            key = tuple(a.shape if isinstance(a, Tensor) else a for a in (*args, *sorted(kwargs.items())))
            if key not in self._graphs:
                try:
                    return self.graph(*args, **kwargs)
                except AssertionError:  # the capture's guards: these inputs are of another kind
                    pass
            return self._graph_for(key, args, kwargs)(*args, **kwargs)

    def _graph_for(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
        graph = self._graphs.get(key)
        if graph is None:
            try:
                graph = _graph_of(self._model[0], args, kwargs)
            except _NotCapturedError:
                graph = self._model[0]
            self._graphs[key] = graph
            while len(self._graphs) > _GRAPHS:
                self._graphs.popitem(last=False)
        return graph

    def __str__(self) -> str:
        return _table(self.explain())

    def explain(self, *args: Any) -> list[PlanRow]:
        """What runs where, why, and at what sparsity.

        Args:
            args: inputs; where they are given, each row has its share of the time.

        Returns:
            One row a layer or operator, in order.
        """
        graph = self.graph
        if not isinstance(graph, GraphModule):
            return [_row(n, s.graph.operator, None) for n, s in graph.named_modules() if isinstance(s, Segment)]
        shares = _shares(graph, args) if args else {}
        rows: list[PlanRow] = []
        for node in graph.graph.nodes:
            module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, Segment):
                for inner in module.graph.graph.nodes:
                    if inner.op == "call_module":
                        name = str(inner.target)
                        rows.append(
                            _row(name, module.graph.get_submodule(name), shares.get(name, 0.0) if args else None)
                        )
            elif isinstance(module, OPERATORS):
                rows.append(_row(str(node.target), module, shares.get(node.name)))
            elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                rows.append(PlanRow(node.name, str(node.target), "torch", "no kernel", None, shares.get(node.name)))
        return rows


def _table(rows: Sequence[PlanRow]) -> str:
    width = max([len(r.name) for r in rows] + [5])
    lines = [f"{'Layer':<{width}}  {'Runs':<8} {'Zeros':>7} {'Time':>7}  Operator"]
    lines.append("-" * len(lines[0]))
    for r in rows:
        zeros = "" if r.sparsity is None else f"{r.sparsity:.1f}%"
        share = "" if r.share is None else f"{r.share:.1f}%"
        lines.append(f"{r.name:<{width}}  {r.runs:<8} {zeros:>7} {share:>7}  {r.op}")
    return "\n".join(lines)


def _row(name: str, module: nn.Module, share: float | None) -> PlanRow:
    if not isinstance(module, Layer):
        return PlanRow(name, type(module).__name__, "compiled", "no weights", None, share)
    kind = "linear" if module.geometry is None else "conv2d"
    if module.activation != "none":
        kind += f" + {module.activation}"
    runs, why = "sparse", f"{_WORTH:g} % zeros or more"
    if not module.is_sparse:
        runs, why = "dense", f"less than {_WORTH:g} % zeros, or few weights a channel"
    elif module.sparsity < _WORTH:
        runs, why = "compiled", "a kernel for depthwise layers"
    return PlanRow(name, kind, runs, why, module.sparsity, share)


def runs_sparse(layer: Layer) -> bool:
    """Whether a layer is faster by its non-zero weights than dense, by what both cost on average."""
    if layer.is_depthwise:  # a kernel of its own, which is no slower where nothing is zero
        return True
    return layer.weight[0].numel() >= 16 and layer.sparsity >= _WORTH


_WORTH = 40.0
"""Percent of zeros from which on a layer runs sparse. Dense kernels need no offsets, and reuse what they load."""


class _NotCapturedError(Exception):
    """torch.export could not make a graph of the network."""


def _graph_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> GraphModule:
    graph = _captured(model, args, kwargs or {})
    fuse(graph)
    for module in graph.modules():
        if isinstance(module, Layer):
            module.is_sparse = runs_sparse(module)
    gather(graph)
    return graph


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    # A batch of one would be taken for a constant, so it is captured with two.
    doubled = tuple(
        a.repeat(2, *[1] * (a.ndim - 1)) if isinstance(a, Tensor) and a.ndim and len(a) == 1 else a for a in args
    )
    failed = ""
    for given, shapes in ((doubled, _dynamic(doubled)), (args, None)):
        try:
            program: ExportedProgram = export(
                model, given, kwargs, dynamic_shapes=None if kwargs else shapes, strict=False
            )
            graph: Any = program.run_decompositions({}).module()
        except Exception as error:  # anything at all, from anywhere in PyTorch or the network
            failed = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            return graph
    raise _NotCapturedError(failed)


def _replaced(model: nn.Module) -> nn.Module:
    """A copy of a network with its layers replaced one by one; it keeps its own code, hooks and all."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        layer = _layer_of(module)
        if layer is None or not name:
            continue
        where, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(where), leaf, layer)
    return model


def _two(sizes: Sequence[int]) -> tuple[int, int]:
    vertical, horizontal = sizes
    return vertical, horizontal


def _layer_of(module: nn.Module) -> nn.Module | None:
    if module._forward_hooks or module._forward_pre_hooks or any(p.dtype != torch.float32 for p in module.parameters()):
        return None
    if type(module) is nn.Linear:
        layer = Layer(module.weight, module.bias)
    elif type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        padding: Any = module.padding
        geometry = Geometry(_two(module.stride), _two(padding), _two(module.dilation), module.groups)
        layer = Layer(module.weight, module.bias, geometry)
    else:
        return None
    return Segment.of(layer) if runs_sparse(layer) else None


def _dynamic(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        {axis: Dim.AUTO for axis in range(a.ndim) if axis != 1 or a.ndim == 2} if isinstance(a, Tensor) else None
        for a in arguments
    )


class _Timer(Interpreter):
    """Runs a graph node by node, and takes the time of each."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.seconds: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        began = time.perf_counter()
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, Segment):
            args, _ = self.fetch_args_kwargs_from_env(n)
            result, steps = module.timed(*args)
            for name, seconds in steps:
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.seconds[n.name] = (
                self.seconds.get(n.name, 0.0) + time.perf_counter() - began - sum(t for _, t in steps)
            )
            return result
        result = super().run_node(n)
        self.seconds[n.name] = self.seconds.get(n.name, 0.0) + time.perf_counter() - began
        return result


def _shares(graph: GraphModule, args: tuple[Any, ...]) -> dict[str, float]:
    timer = _Timer(graph)
    with torch.no_grad():
        graph(*args)
        for _ in range(5):
            timer.run(*args)
    total = sum(timer.seconds.values())
    return {name: 100 * seconds / total for name, seconds in timer.seconds.items()}
