"""Graphs of the engine's operators: drawn at random, and as they are in real networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from twins import sparse

from gossamer.runtime.activations import ACTIVATIONS
from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.planes import Add, Concat, Flatten, MaxPool, Mean, Scale
from gossamer.runtime.program import Program
from gossamer.runtime.segment import Segment
from gossamer.runtime.values import Signature


def results(program: Program, inputs: list[Tensor], batches: int = 1, threads: int | None = None) -> list[Tensor]:
    outputs = [torch.empty((o.shape[0] * batches, *o.shape[1:])) for o in program.outputs]
    program.run(inputs, outputs, batches, threads)
    return outputs


class Built:
    """A graph that grows by one operator at a time, and what each of its values is."""

    def __init__(self) -> None:
        self.graph, self.modules = Graph(), dict[str, nn.Module]()
        self.values: list[tuple[Node, Signature]] = []
        self.inputs: list[Signature] = []

    def input(self, shape: tuple[int, ...], is_tokens: bool = False) -> Node:
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["val"] = torch.empty(shape, device="meta")  # as torch.export has it
        self.inputs.append(Signature(shape, is_tokens))
        self.values.append((node, self.inputs[-1]))
        return node

    def add(self, module: nn.Module, *arguments: Node) -> Node:
        name = f"m{len(self.modules)}"
        self.modules[name] = module
        node = self.graph.call_module(name, arguments)
        known = dict(self.values)
        signature = module.signature(*[known[a] for a in arguments])
        assert signature is not None
        self.values.append((node, signature))
        return node

    def segment(self, *returned: Node) -> Segment:
        self.graph.output(returned[0] if len(returned) == 1 else returned)
        return Segment(GraphModule(self.modules, self.graph))


def layer(draw: Any, x: Signature, out: int, seed: int) -> Layer:
    zeros, bias = draw(st.sampled_from([0, 0.5, 0.9, 1])), torch.randn(out) if draw(st.booleans()) else None
    activation, add_last = draw(st.sampled_from(list(ACTIVATIONS))), draw(st.booleans())
    if x.is_tokens:
        weight = sparse((out, x.channels), zeros, seed) / x.channels**0.5
        return Layer(weight, bias, None, activation, add_last=add_last)
    kernel = draw(st.sampled_from([1, 1, 3, 5]))
    stride = draw(st.sampled_from([1, 1, 1, 2]))
    groups = draw(st.sampled_from([g for g in (1, 1, 2, x.channels) if x.channels % g == 0 and out % g == 0]))
    weight = sparse((out, x.channels // groups, kernel, kernel), zeros, seed)
    geometry = Geometry((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    weight = weight / max(1, weight[0].numel()) ** 0.5
    return Layer(weight, bias, geometry, activation, add_last=add_last)


def grow(draw: Any, built: Built, seed: int) -> None:
    """One more operator, on values that there are."""
    node, x = draw(st.sampled_from(built.values))
    same = [n for n, s in built.values if s == x]
    kind = draw(st.sampled_from(["layer", "layer", "add", "pool", "scale", "mean", "flatten", "concat"]))
    if kind == "flatten" and not x.is_tokens and x.pixels == 1:
        built.add(Flatten(), node)
    elif kind == "mean" and not x.is_tokens:
        built.add(Mean(draw(st.booleans())), node)
    elif kind == "pool" and not x.is_tokens and min(x.size) > 1:
        stride = draw(st.integers(1, 2))
        built.add(MaxPool((2, 2), (stride, stride), (0, 0), draw(st.booleans())), node)
    elif kind == "scale" and not x.is_tokens:
        factors = [n for n, s in built.values if s == x.with_channels(x.channels, (1, 1)) and not s.is_tokens]
        built.add(Scale(), node, draw(st.sampled_from(factors or [built.add(Mean(), node)])))
    elif kind == "concat" and not x.is_tokens:
        parts = [n for n, s in built.values if not s.is_tokens and (s.images, s.size) == (x.images, x.size)]
        chosen = draw(st.lists(st.sampled_from(parts), min_size=1, max_size=4))
        if sum(dict(built.values)[n].channels for n in chosen) < 60:
            built.add(Concat(), *chosen)
    elif kind == "add":
        built.add(
            Add(draw(st.sampled_from(["none", "relu", "silu"]))), node, *draw(st.sampled_from([[n] for n in same]))
        )
    else:
        module = layer(draw, x, draw(st.integers(1, 12)), seed)
        result = module.signature(x)
        others = [n for n, s in built.values if s == result]
        more = [draw(st.sampled_from(others))] if others and draw(st.booleans()) else []
        built.add(module, node, *more)


@st.composite
def graphs(draw: Any) -> tuple[Segment, list[Signature]]:
    built = Built()
    images, size = draw(st.integers(1, 9)), draw(st.tuples(st.integers(1, 9), st.integers(1, 17)))
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 3)):
            built.input((images, draw(st.integers(1, 9)), *size))
        else:
            axes = draw(st.lists(st.integers(1, 4), max_size=2))
            built.input((images, *axes, draw(st.integers(1, 9))), is_tokens=True)
    for i in range(draw(st.integers(1, 12))):
        grow(draw, built, i)
    returned = draw(st.lists(st.sampled_from([n for n, _ in built.values]), min_size=1, max_size=4))
    return built.segment(*returned), built.inputs


def conv(i: int, o: int, kernel: int = 1, activation: str = "none", stride: int = 1) -> Layer:
    weight = sparse((o, i, kernel, kernel), 0.5, i + o) / (i * kernel * kernel) ** 0.5
    return Layer(weight, torch.randn(o), Geometry((stride, stride), (kernel // 2, kernel // 2)), activation)


def returned_and_used(b: Built) -> list[Node]:
    x = b.input((2, 4, 6, 6))
    one = b.add(conv(4, 8, 3, "relu"), x)
    return [b.add(conv(8, 4), one), one]


def an_input_returned(b: Built) -> list[Node]:
    x = b.input((2, 4, 6, 6))
    return [x, b.add(conv(4, 8), x), x]


def an_input_of_several(b: Built) -> list[Node]:
    x = b.input((2, 4, 6, 6))
    one, two = b.add(conv(4, 8, 3), x), b.add(conv(4, 8), x)
    return [b.add(Add("relu"), one, two), b.add(Add(), x), b.add(Concat(), x, x)]


def concat_used_twice(b: Built) -> list[Node]:
    x = b.input((2, 4, 6, 6))
    one, two = b.add(conv(4, 8, 3), x), b.add(conv(4, 3), x)
    first, second = b.add(Concat(), one, two), b.add(Concat(), two, one, x)
    return [b.add(conv(11, 5, 3), first), b.add(conv(15, 5), second), b.add(conv(8, 5), one), second]


def concat_of_one_twice(b: Built) -> list[Node]:
    one = b.add(conv(4, 8, 3), b.input((2, 4, 6, 6)))
    return [b.add(conv(16, 4), b.add(Concat(), one, one))]


def concat_nested(b: Built) -> list[Node]:
    x = b.input((9, 4, 6, 6))
    inner = b.add(Concat(), b.add(conv(4, 8), x), x)
    outer = b.add(Concat(), inner, b.add(conv(12, 3, 3), inner))
    return [b.add(conv(27, 5), b.add(Concat(), outer, inner))]


def dense_block(b: Built) -> list[Node]:
    x, channels = b.add(conv(4, 6, 3, "relu"), b.input((1, 4, 7, 7))), 6
    for _ in range(4):
        x = b.add(Concat(), x, b.add(conv(channels, 3, 3, "relu"), x))
        channels += 3
    return [x]


def squeeze_and_excitation(b: Built) -> list[Node]:
    x = b.add(conv(4, 40, 3, "silu"), b.input((3, 4, 9, 9)))
    few = b.add(conv(40, 10, 1, "silu"), b.add(Mean(), x))
    return [b.add(conv(40, 4), b.add(Scale(), x, b.add(conv(10, 40, 1, "sigmoid"), few)))]


def head(b: Built) -> list[Node]:
    x = b.add(Mean(), b.add(conv(4, 40, 3, "relu"), b.input((9, 4, 9, 9))))
    return [b.add(Layer(sparse((7, 40), 0.5)), b.add(Flatten(), x)), b.add(Flatten(), x)]


def an_input_flattened(b: Built) -> list[Node]:
    x = b.input((9, 40, 1, 1))
    return [b.add(Flatten(), x), b.add(Layer(sparse((7, 40), 0.5)), b.add(Flatten(), x))]


def small_and_odd_before_whole(b: Built) -> list[Node]:
    """401 numbers, which fill no line, live beside a value that has to begin at one."""
    x = b.add(conv(8, 8), b.input((1, 8, 4, 4)))
    factor = b.add(conv(401, 8), b.add(conv(8, 401), b.add(Mean(), x)))
    return [b.add(conv(8, 8, 1, "relu"), b.add(Scale(), x, factor))]


def tokens(b: Built) -> list[Node]:
    x = b.input((3, 11, 20), is_tokens=True)
    y = b.add(Layer(sparse((30, 20), 0.5), None, None, "gelu"), x)
    return [b.add(Layer(sparse((20, 30), 0.5), torch.randn(20)), y, x), x]


def tokens_of_four_axes(b: Built) -> list[Node]:
    x = b.input((2, 5, 5, 20), is_tokens=True)
    y = b.add(Layer(sparse((30, 20), 0.5), None, None, "gelu"), x)
    return [b.add(Add(), b.add(Layer(sparse((20, 30), 0.5)), y), x)]


def one_token(b: Built) -> list[Node]:
    x = b.input((20,), is_tokens=True)
    return [b.add(Layer(sparse((20, 20), 0.5)), b.add(Layer(sparse((20, 20), 0.5)), x), x)]


GRAPHS: list[Callable[[Built], list[Node]]] = [
    returned_and_used, an_input_returned, an_input_of_several, concat_used_twice, concat_of_one_twice, concat_nested,
    dense_block, squeeze_and_excitation, head, an_input_flattened, small_and_odd_before_whole, tokens,
    tokens_of_four_axes, one_token,
]  # fmt: skip
