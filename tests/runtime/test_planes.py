"""What runs between layers, in every instruction set, beside its twin in PyTorch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from twins import ISAS, chain, error, needs_library

from gossamer.runtime.activations import ACTIVATIONS
from gossamer.runtime.planes import Add, Concat, Flatten, MaxPool, Mean, Scale
from gossamer.runtime.segment import Segment
from gossamer.runtime.values import Signature

pytestmark = needs_library
IMAGES = st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 30), st.integers(1, 30))


def inside(operator: nn.Module, n_inputs: int, isa: int) -> Segment:
    """With its inputs, and what it gives, in the memory of a program."""
    graph = Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(n_inputs)]
    copies = [graph.call_module("copy", (x,)) for x in inputs]
    value = graph.call_module("operator", tuple(copies))
    graph.output(graph.call_module("copy", (value,)))
    segment = Segment(GraphModule({"copy": Add(), "operator": operator}, graph))
    segment._isa = isa
    return segment


def both(operator: nn.Module, *inputs: Tensor, tolerance: float = 0.0) -> None:
    """From PyTorch's memory to PyTorch's memory, and inside a program's own."""
    want = operator(*inputs)
    signature = operator.signature(*[Signature(tuple(x.shape)) for x in inputs])
    assert signature.shape == want.shape
    for isa in ISAS:
        for segment in (chain(operator, n_inputs=len(inputs), isa=isa), inside(operator, len(inputs), isa)):
            assert segment.stages(*inputs) is not None
            got = segment(*inputs)
            assert torch.equal(got.isnan(), want.isnan())
            assert error(got.nan_to_num(9e9), want.nan_to_num(9e9)) <= tolerance


@st.composite
def pools(draw: Any) -> tuple[MaxPool, Tensor]:
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)))
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = draw(st.tuples(st.integers(1, 30), st.integers(1, 70)))
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    x = torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 20)), *size)
    x[x > 2] = torch.nan
    x[x < -2] = -torch.inf
    return MaxPool(kernel, stride, padding, draw(st.booleans())), x


@settings(max_examples=100)
@given(case=pools())
def test_pooling_is_that_of_pytorch(case: tuple[MaxPool, Tensor]) -> None:
    both(*case)


@given(shape=IMAGES, activation=st.sampled_from(list(ACTIVATIONS)))
def test_additions_and_activations(shape: tuple[int, ...], activation: str) -> None:
    both(Add(), torch.randn(shape), torch.randn(shape))
    both(Add(activation), torch.randn(shape), torch.randn(shape), tolerance=2e-6)
    both(Add(activation), torch.randn(shape), tolerance=2e-6)


@given(shape=IMAGES)
def test_scales(shape: tuple[int, ...]) -> None:
    both(Scale(), torch.randn(shape), torch.randn(*shape[:2], 1, 1))


@given(shape=IMAGES, keep=st.booleans())
def test_means(shape: tuple[int, ...], keep: bool) -> None:
    both(Mean(keep), torch.randn(shape) + 1, tolerance=1e-6)


def test_the_mean_of_many_pixels_is_as_exact_as_pytorchs() -> None:
    x = torch.rand(2, 3, 500, 500)
    exact = x.double().mean((2, 3), keepdim=True).float()
    for isa in ISAS:
        assert error(chain(Mean(), isa=isa)(x), exact) < 2e-6


@given(shape=IMAGES, channels=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_concatenations(shape: tuple[int, ...], channels: list[int]) -> None:
    both(Concat(), *[torch.randn(shape[0], c, *shape[2:]) for c in channels])


@given(images=st.integers(1, 33), channels=st.integers(1, 70))
def test_flattening_images_of_one_pixel(images: int, channels: int) -> None:
    both(Flatten(), torch.randn(images, channels, 1, 1))


@given(images=st.integers(1, 70), features=st.integers(1, 70))
def test_tokens_are_added_as_they_lie(images: int, features: int) -> None:
    for shape in ((images, features), (images, 3, features)):
        both_tokens(Add("relu"), torch.randn(shape), torch.randn(shape))


def both_tokens(operator: nn.Module, *inputs: Tensor) -> None:
    for isa in ISAS:
        for segment in (chain(operator, n_inputs=len(inputs), isa=isa), inside(operator, len(inputs), isa)):
            segment._tokens = [True] * len(inputs)
            assert segment.stages(*inputs) is not None
            assert torch.equal(segment(*inputs), operator(*inputs))


@pytest.mark.parametrize(
    ("operator", "shapes"),
    [
        (MaxPool((3, 3), (1, 1), (0, 0)), [(1, 2, 2, 5)]),  # smaller than the window
        (Add(), [(2, 3, 4, 4), (1, 3, 4, 4)]),
        (Scale(), [(2, 3, 4, 4), (2, 3, 4, 1)]),
        (Scale(), [(2, 3, 4, 4), (1, 3, 1, 1)]),
        (Flatten(), [(2, 3, 4, 1)]),
        (Concat(), [(2, 3, 4, 4), (2, 3, 4, 5)]),
        (Concat(), [(2, 3, 4, 4), (1, 3, 4, 4)]),
    ],
)
def test_what_has_no_kernel_is_left_to_pytorch(operator: Any, shapes: list[tuple[int, ...]]) -> None:
    inputs = [torch.randn(s) for s in shapes]
    assert operator.signature(*[Signature(s) for s in shapes]) is None
    segment = chain(operator, n_inputs=len(inputs))
    assert segment.stages(*inputs) is None
    try:
        want = operator(*inputs)
    except RuntimeError as wrong:
        with pytest.raises(RuntimeError, match=re.escape(str(wrong)[:40])):
            segment(*inputs)
    else:
        assert torch.equal(segment(*inputs), want)
