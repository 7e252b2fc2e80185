"""A network compiled for the CPU: an nn.Module to call, which says what it runs where."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, Interpreter, Node

from gossamer.errors import ArgumentError, GossamerWarning, StateError
from gossamer.native import native
from gossamer.runtime.fusion import fuse
from gossamer.runtime.operators import Convolution, Linear


@dataclass(frozen=True)
class PlanRow:
    """One row of a plan.

    Args:
        name: the layer's, or the operator's.
        op: what it does.
        runs: 'sparse', 'dense' (a layer, in PyTorch), 'compiled' (without weights) or 'torch' (anything else).
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
    if model.training:
        raise ArgumentError("the network is in training mode; compile(model.eval(), …) compiles it for inference")
    elsewhere = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ArgumentError(f"the network is on {elsewhere}, and this is for a CPU; give model.cpu()")
    if native() is None:
        warnings.warn(
            "Gossamer was installed without a C++ compiler, so compiled networks run in PyTorch, no faster; install a "
            "compiler, and Gossamer anew",
            GossamerWarning,
            stacklevel=2,
        )
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return CompiledModel(model, arguments)


class CompiledModel(nn.Module):
    """What `compile` gives.

    Args:
        model: the network; kept, to be captured anew for inputs of a kind that the first capture does not cover.
        arguments: example inputs.
    """

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.graph = _captured(model, arguments)
        self.layers = fuse(self.graph)
        for name in self.layers:
            conv = _conv_of(self.graph.get_submodule(name))
            if conv is not None:
                conv.is_sparse = runs_sparse(conv)
        self.training = False

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
            return self.graph(*args, **kwargs)

    def explain(self, *args: Any) -> list[PlanRow]:
        """What runs where, why, and at what sparsity.

        Args:
            args: inputs; where they are given, each row has its share of the time.

        Returns:
            One row a layer or operator, in order.
        """
        shares = _shares(self.graph, args) if args else {}
        rows: list[PlanRow] = []
        for node in self.graph.graph.nodes:
            if node.op == "call_module" and str(node.target) in self.layers:
                rows.append(_row(str(node.target), self.graph.get_submodule(str(node.target)), shares.get(node.name)))
            elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                rows.append(PlanRow(node.name, str(node.target), "torch", "no kernel", None, shares.get(node.name)))
        return rows


def _conv_of(layer: nn.Module) -> Convolution | None:
    conv = layer.conv if isinstance(layer, Linear) else layer
    return conv if isinstance(conv, Convolution) else None


def _row(name: str, layer: nn.Module, share: float | None) -> PlanRow:
    conv = _conv_of(layer)
    if conv is None:
        return PlanRow(name, type(layer).__name__, "compiled", "no weights", None, share)
    kind = "linear" if isinstance(layer, Linear) else "conv2d"
    if conv.activation != "none":
        kind += f" + {conv.activation}"
    why = f"{conv.sparsity:.1f} % zeros"
    return PlanRow(name, kind, "sparse" if conv.is_sparse else "dense", why, conv.sparsity, share)


def runs_sparse(conv: Convolution) -> bool:
    """Whether a layer is faster by its non-zero weights than dense, by what both cost on average."""
    if conv.weight[0].numel() < 16:  # depthwise, and other layers of little to leave out
        return False
    return conv.sparsity >= _WORTH


_WORTH = 40.0
"""Percent of zeros from which on a layer runs sparse. Dense kernels need no offsets, and reuse what they load."""


def _captured(model: nn.Module, arguments: tuple[Any, ...]) -> GraphModule:
    # A batch of one would be taken for a constant, so it is captured with two.
    doubled = tuple(
        a.repeat(2, *[1] * (a.ndim - 1)) if isinstance(a, Tensor) and a.ndim and len(a) == 1 else a for a in arguments
    )
    for given, shapes in ((doubled, _dynamic(doubled)), (arguments, None)):
        try:
            with torch.no_grad():
                program: ExportedProgram = export(model, given, dynamic_shapes=shapes, strict=False)
                graph: Any = program.run_decompositions({}).module()
        except Exception as error:
            if shapes is None:
                words = str(error).splitlines()[0]
                raise ArgumentError(f"the network cannot be captured by torch.export: {words}") from error
        else:
            return graph
    raise AssertionError


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
