"""Every kernel against its twin in PyTorch: shapes, strides, tails, empty rows, instruction sets, threads."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import ArgumentError
from gossamer.native import find_library, native
from gossamer.runtime.operators import ACTIVATIONS, Convolution, Geometry, Linear, MaxPool

needs_library = pytest.mark.skipif(native() is None, reason="the compiled library was not built")
ISAS = [i for i in range(4) if native() is not None and native().gossamer_isa(i)]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sparse(shape: tuple[int, ...], zeros: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill(torch.rand(shape, generator=generator) < zeros, 0)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-3)) if want.numel() else 0.0


def check(conv: Convolution, x: Tensor, residual: bool = False) -> None:
    want = conv.reference(x)
    more = torch.randn_like(want) if residual else None
    got, want = conv(x, more), conv.reference(x, more)
    assert not got.isnan().any()
    assert error(got, want) < 1e-5


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_convolution_is_that_of_pytorch(isa: int, data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    channels, out = groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 9))
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    size = draw(st.tuples(st.integers(1, 34), st.integers(1, 70)))
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    torch.set_num_threads(draw(st.integers(1, 3)))
    weight = sparse((out, channels // groups, *kernel), draw(st.sampled_from([0, 0.5, 0.9, 0.99, 1])), out)
    bias = torch.randn(out) if draw(st.booleans()) else None
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    geometry = Geometry(stride, padding, dilation, groups)
    conv = Convolution(weight, bias, geometry, activation, add_last=draw(st.booleans()))
    conv._isa = isa
    check(conv, torch.randn(draw(st.sampled_from([1, 2, 5])), channels, *size), draw(st.booleans()))


# (images, channels, height, width), out channels, kernel, stride, padding, groups
TABLE = [
    ((1, 64, 56, 56), 64, 3, 1, 1, 1),
    ((1, 128, 28, 28), 128, 3, 1, 1, 1),
    ((1, 300, 14, 14), 70, 3, 1, 1, 1),  # several blocks of planes
    ((2, 512, 7, 7), 40, 3, 1, 1, 1),
    ((1, 64, 56, 56), 32, 3, 2, 1, 1),
    ((1, 3, 224, 224), 16, 7, 2, 3, 1),
    ((1, 256, 14, 14), 300, 1, 1, 0, 1),
    ((1, 64, 15, 15), 32, 1, 2, 0, 1),
    ((33, 5, 7, 7), 6, 3, 1, 1, 1),
    ((1, 48, 30, 30), 48, 3, 1, 1, 48),  # depthwise
    ((1, 48, 31, 29), 48, 5, 2, 2, 48),
    ((1, 4, 1, 1), 9, 1, 1, 0, 1),  # a single pixel
    ((1, 4, 1, 1), 9, 3, 1, 1, 1),
    ((1, 2, 1, 500), 3, 1, 1, 0, 1),
    ((1, 2, 3, 1000), 3, 3, 1, 1, 1),  # wider than a tile
    ((1, 2, 60, 4), 3, 7, 1, 3, 1),
]


@needs_library
@pytest.mark.parametrize("zeros", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_layers_of_real_networks_are_those_of_pytorch(row: tuple[Any, ...], isa: int, zeros: float) -> None:
    shape, out, kernel, stride, padding, groups = row
    weight = sparse((out, shape[1] // groups, kernel, kernel), zeros)
    weight[0] = 0  # an empty row
    weight[-1] = torch.randn_like(weight[-1])  # a full one
    geometry = Geometry((stride, stride), (padding, padding), (1, 1), groups)
    conv = Convolution(weight, torch.randn(out), geometry, "relu")
    conv._isa = isa
    for n in (1, 2):
        torch.set_num_threads(n)
        check(conv, torch.randn(shape), residual=True)


@needs_library
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_pytorch_wherever_they_are_curved(activation: str) -> None:
    conv = Convolution(torch.ones(1, 1, 1, 1), None, Geometry(), activation)
    x = torch.cat([torch.linspace(-30, 30, 20_001), torch.tensor([-1e30, -100.0, 100.0, 1e30, -1e-30, 0.0, -0.0])])
    want = ACTIVATIONS[activation](x.double()).float()  # PyTorch's own gelu is off by 8e-7
    assert torch.allclose(conv(x.view(1, 1, 1, -1)).flatten(), want, rtol=2e-6, atol=4e-7)


@needs_library
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_reach_what_depends_on_them(activation: str) -> None:
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0], weight[1, 1] = 1.0, 1.0
    conv = Convolution(weight, None, Geometry(padding=(1, 1)), activation)
    x = torch.randn(1, 2, 8, 8)
    x[0, 0, 4, 4] = torch.nan
    got = conv(x)
    assert torch.equal(got[0, 0].isnan(), conv.reference(x)[0, 0].isnan())
    assert not got[0, 1].isnan().any()  # where PyTorch's 0 · nan is nan, a weight that is not there is not
    x[0, 0, 4, 4] = torch.inf
    got, want = conv(x)[0, 0], conv.reference(x)[0, 0]
    plain = want.isfinite()  # PyTorch's gelu of infinity is nan; ours is infinity
    assert torch.allclose(got[plain], want[plain], rtol=1e-5, atol=1e-6)
    assert not got[~plain].isfinite().any()


@needs_library
def test_weights_that_are_nan_or_tiny_are_weights() -> None:
    weight = torch.zeros(3, 1, 1, 1)
    weight[0], weight[1] = torch.nan, 1e-42
    got = Convolution(weight)(torch.full((1, 1, 1, 9), 1e10))
    assert got[0, 0].isnan().all()
    assert torch.allclose(got[0, 1], torch.tensor(1e-32), rtol=1e-2)
    assert not got[0, 2].any()


@needs_library
@pytest.mark.parametrize("how", ["channels last", "sliced", "turned", "expanded"])
def test_inputs_in_any_layout_are_read_right(how: str) -> None:
    conv = Convolution(sparse((6, 4, 3, 3), 0.7), None, Geometry(padding=(1, 1)))
    x = {
        "channels last": torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last),
        "sliced": torch.randn(4, 8, 9, 18)[::2, ::2, :, ::2],
        "turned": torch.randn(2, 4, 9, 9).transpose(2, 3),
        "expanded": torch.randn(1, 4, 9, 1).expand(2, 4, 9, 9),
    }[how]
    check(conv, x)
    assert conv(torch.empty(0, 4, 9, 9)).shape == (0, 6, 9, 9)


@needs_library
def test_two_threads_of_the_program_can_call_one_layer() -> None:
    torch.set_num_threads(2)
    conv = Convolution(sparse((32, 16, 3, 3), 0.8), None, Geometry(padding=(1, 1)), "relu")
    inputs = [torch.randn(1 + i % 3, 16, 10 + i, 12) for i in range(8)]
    wants = [conv.reference(x) for x in inputs]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(150):
            k = (i * (seed + 1)) % 8
            if error(conv(inputs[k]), wants[k]) > 1e-5:
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_library
def test_plans_are_bounded_and_follow_the_number_of_threads() -> None:
    conv = Convolution(sparse((4, 4, 3, 3), 0.5))
    for size in range(3, 40):
        check(conv, torch.randn(1, 4, size, size))
    assert len(conv._plans) == 16
    torch.set_num_threads(2)
    conv(torch.randn(1, 4, 39, 39))
    assert [key[3] for key in conv._plans][-1] == 2


@needs_library
def test_a_copy_and_a_cast_are_layers_of_their_own() -> None:
    conv = Convolution(sparse((4, 4, 3, 3), 0.5))
    x = torch.randn(1, 4, 8, 8)
    want = conv(x)
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(twin(x), want)
        assert twin._layer.pointer != conv._layer.pointer
    assert error(conv.double()(x.double()).float(), want) < 1e-5
    assert conv.float()(x).dtype == torch.float32


@needs_library
def test_what_needs_a_gradient_gets_one() -> None:
    conv = Convolution(sparse((4, 4, 3, 3), 0.5))
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None


@needs_library
@pytest.mark.parametrize("tokens", [(), (1,), (7,), (8,), (3, 50), (2, 3, 11), (0,)])
@pytest.mark.parametrize("zeros", [0.0, 0.9, 1.0])
def test_linear_layers_are_those_of_pytorch(tokens: tuple[int, ...], zeros: float) -> None:
    for activation in ACTIVATIONS:
        linear = Linear(sparse((37, 50), zeros), torch.randn(37), activation)
        x = torch.randn(*tokens, 50)
        assert error(linear(x), linear.reference(x)) < 1e-5


@needs_library
def test_between_linear_layers_nothing_is_copied() -> None:
    first, second = Linear(sparse((40, 30), 0.8)), Linear(sparse((20, 40), 0.8))
    y = first(torch.randn(4, 25, 30))
    assert y.flatten(0, 1).t().is_contiguous()
    assert error(second(y), second.reference(y)) < 1e-5


@needs_library
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pooling_is_that_of_pytorch(data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = draw(st.tuples(st.integers(5, 30), st.integers(5, 30)))
    pool = MaxPool(kernel, stride, (padding[0], padding[1]), draw(st.booleans()))
    x = torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 20)), *size)
    x[x > 2] = torch.nan
    x[x < -2] = -torch.inf
    assert torch.equal(pool(x).nan_to_num(nan=9e9), pool.reference(x).nan_to_num(nan=9e9))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Convolution(torch.ones(2, 2)), r"a weight of shape \(2, 2\)"),
        (lambda: Convolution(torch.ones(3, 2, 1, 1), None, Geometry(groups=2)), "groups divide the out channels"),
        (lambda: Convolution(torch.ones(3, 2, 1, 1), torch.ones(2)), r"a bias of shape \(2,\) for 3 channels"),
        (lambda: Convolution(torch.ones(3, 2, 1, 1), None, Geometry(), "relo"), r"'relo'.*Closest: relu"),
        (lambda: Linear(torch.ones(3)), "a linear layer's has two axes"),
        (lambda: Linear(torch.ones(3, 2))(torch.ones(4, 5)), "an input of 5 features, and the layer has 2"),
    ],
)
def test_what_does_not_fit_is_named(make: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make()


@needs_library
def test_inputs_that_do_not_fit_are_named() -> None:
    conv = Convolution(sparse((4, 4, 3, 3), 0.5))
    with pytest.raises(ArgumentError, match="an input of 3 channels, and the layer has 4"):
        conv(torch.randn(1, 3, 8, 8))
    with pytest.raises(ArgumentError, match="smaller than the kernel"):
        conv(torch.randn(1, 4, 2, 8))


def test_a_file_that_is_no_library_is_none(tmp_path: Any) -> None:
    (tmp_path / "_native.so").write_bytes(b"no library")
    assert find_library([str(tmp_path)]) is None
