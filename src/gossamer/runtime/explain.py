"""What runs where in a compiled network, why, and for how long: rows, and a table of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from gossamer.native import native
from gossamer.runtime.choice import GAIN, WORTH
from gossamer.runtime.layers import Layer
from gossamer.runtime.segment import OPERATORS, Segment

_ROUNDS = 5

LAYER = "gossamer_layer"
"""In a network that keeps its own code, the name of what computes a layer, in that layer."""


@dataclass(frozen=True)
class PlanRow:
    """One row of a plan.

    Args:
        name: the layer's, or the operator's.
        op: what it does.
        runs: 'sparse', 'compiled' (no weights, or depthwise: as fast without zeros), 'dense' (a layer, in PyTorch) or
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


def rows_of(graph: nn.Module, args: tuple[Any, ...]) -> list[PlanRow]:
    """One row a layer or operator, in order; with shares of the time where there are inputs."""
    if not isinstance(graph, GraphModule):
        segments = [(n, m) for n, m in graph.named_modules() if isinstance(m, Segment)]
        rows = [_row(n.removesuffix(f".{LAYER}"), s.operator, None) for n, s in segments]
        return [_declined(row) for row in rows] if native() is None else rows
    shares, declined = _shares(graph, args) if args else ({}, set[str]())
    rows = list[PlanRow]()
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Segment):
            is_declined = node.name in declined or native() is None
            for name, operator in module.operators():
                row = _row(name, operator, shares.get(name, 0.0) if args and not is_declined else None)
                rows.append(_declined(row) if is_declined else row)
            if is_declined:
                share = shares.get(node.name)
                rows.append(PlanRow(node.name, "all of these", "torch", "by PyTorch", None, share))
            elif args:
                around = sum(shares.get(n, 0.0) for n in (node.name, *module.copies()))
                rows.append(PlanRow(node.name, "copies, and the call", "compiled", "between layouts", None, around))
        elif isinstance(module, Layer):
            rows.append(_row(str(node.target), module, shares.get(node.name)))
        elif isinstance(module, OPERATORS):  # with no sparse layer beside it
            kind, share = type(module).__name__, shares.get(node.name)
            rows.append(PlanRow(str(node.target), kind, "torch", "no sparse layer beside it", None, share))
        elif _is_shown(node, module):
            rows.append(PlanRow(node.name, str(node.target), "torch", "no kernel", None, shares.get(node.name)))
    return rows


def _is_shown(node: Node, module: nn.Module | None) -> bool:
    """Whether a plan has a row for what a node does."""
    if module is not None:
        return isinstance(module, (Segment, *OPERATORS))
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)


def table_of(rows: Sequence[PlanRow]) -> str:
    """Rows as text."""
    width = max([len(r.name) for r in rows] + [5])
    op = max([len(r.op) for r in rows] + [8])
    lines = [f"{'Layer':<{width}}  {'Runs':<8} {'Zeros':>7} {'Time':>7}  {'Operator':<{op}}  Why"]
    lines.append("-" * (len(lines[0]) + 20))
    for r in rows:
        zeros = "" if r.sparsity is None else f"{r.sparsity:.1f}%"
        share = "" if r.share is None else f"{r.share:.1f}%"
        lines.append(f"{r.name:<{width}}  {r.runs:<8} {zeros:>7} {share:>7}  {r.op:<{op}}  {r.why}".rstrip())
    return "\n".join(lines)


def _row(name: str, module: nn.Module, share: float | None) -> PlanRow:
    if not isinstance(module, Layer):
        return PlanRow(name, type(module).__name__, "compiled", "no weights", None, share)
    kind = "linear" if module.geometry is None else "conv2d"
    if module.activation != "none":
        kind += f" + {module.activation}"
    runs = "dense" if not module.is_sparse else "compiled" if module.is_depthwise else "sparse"
    if module.is_depthwise and module.is_sparse:
        why = "a kernel for depthwise layers"
    elif module.expected is not None:
        why = f"{module.expected:.2f} of the dense time {'measured' if module.is_measured else 'expected'}"
        if module.is_sparse and module.expected >= 1 and not module.is_measured:
            why += ", less than a way to PyTorch and back"
        if not module.is_sparse and module.expected < GAIN:
            why += ", but a call of the engine takes longer"
    elif not module.is_sparse:
        why = "few zeros, or a shape without a kernel"
    else:
        why = f"{WORTH:g} % zeros or more"
    return PlanRow(name, kind, runs, why, module.sparsity, share)


def _declined(row: PlanRow) -> PlanRow:
    why = "for inputs like these: faster so, or no kernel" if row.sparsity is not None else row.why
    if native() is None:
        why = "Gossamer was installed without a C++ compiler"
    return replace(row, runs="dense" if row.sparsity is not None else "torch", why=why)


class _Timer(Interpreter):
    """Runs a graph node by node, and takes the time of each."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.seconds: dict[str, float] = {}
        self.declined: set[str] = set()

    def run_node(self, n: Node) -> Any:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if not _is_shown(n, module):  # the capture's guards, and sizes: calls of a kind that is known go without
            return super().run_node(n)
        began = time.perf_counter()
        if isinstance(module, Segment):
            args, _ = self.fetch_args_kwargs_from_env(n)
            result, steps = module.timed(*args)
            if not steps:
                self.declined.add(n.name)
        else:
            result, steps = super().run_node(n), []
        took = time.perf_counter() - began
        for name, seconds in steps:
            self._add(name, seconds)
        self._add(n.name, took - sum(seconds for _, seconds in steps))
        return result

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def _shares(graph: GraphModule, args: tuple[Any, ...]) -> tuple[dict[str, float], set[str]]:
    """Percent of the time by name; and the segments that PyTorch ran."""
    timer = _Timer(graph)
    with torch.no_grad():
        graph(*args)
        for _ in range(_ROUNDS):
            timer.run(*args)
    total = sum(timer.seconds.values())
    return {name: 100 * seconds / total for name, seconds in timer.seconds.items()}, timer.declined
