"""What the tests of the engine share: sparse weights, and a compiled graph beside its twin in PyTorch."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from gossamer.native import native
from gossamer.runtime.program import Program
from gossamer.runtime.segment import Segment

needs_library = pytest.mark.skipif(native() is None, reason="the compiled library was not built")
ISAS = [i for i in range(4) if native() is not None and native().gossamer_isa(i)]


def sparse(shape: tuple[int, ...], zeros: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill(torch.rand(shape, generator=generator) < zeros, 0)


def error(got: Tensor, want: Tensor) -> float:
    """max |Δ| / max |y|."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-3)) if want.numel() else 0.0


def chain(*operators: nn.Module, n_inputs: int = 1, isa: int = -1) -> Segment:
    """Operators one after the other; the first has all of the inputs."""
    graph = Graph()
    value: Any = [graph.placeholder(f"x{i}") for i in range(n_inputs)]
    for i, _ in enumerate(operators):
        value = [graph.call_module(str(i), tuple(value))]
    graph.output(value[0])
    segment = Segment(GraphModule({str(i): m for i, m in enumerate(operators)}, graph))
    segment._isa = isa
    return segment


def check(segment: Segment, *inputs: Tensor, tolerance: float = 1e-5) -> None:
    """Compiled, and what the twin gives."""
    assert segment.stages(*inputs) is not None
    got, want = segment(*inputs), segment.graph(*inputs)
    assert not got.isnan().any()
    assert error(got, want) <= tolerance


def ways(program: Program) -> dict[str, str]:
    """How each layer's kernel goes about it, in words."""
    found: dict[str, str] = {}
    plans = iter(program._plans)
    for name, step in zip(program.names, program._steps, strict=True):
        if step.plan:
            text = ctypes.create_string_buffer(160)
            native().gossamer_plan_text(next(plans).pointer, text, len(text))
            found[name] = text.value.decode()
    return found
