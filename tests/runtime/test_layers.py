"""Layers, compiled, beside their twin in PyTorch: shapes, strides, tails, empty rows, instruction sets, threads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from twins import ISAS, chain, check, error, needs_library, sparse, ways

from gossamer import ArgumentError
from gossamer.native import find_library, native
from gossamer.runtime.activations import ACTIVATIONS
from gossamer.runtime.layers import IN_PLACE, OUT_PLACE, Geometry, Layer
from gossamer.runtime.planes import Add
from gossamer.runtime.program import Program
from gossamer.runtime.segment import Segment
from gossamer.runtime.values import Signature

THREADS = st.sampled_from([1, 1, 1, 2, 3])


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def with_residual(layer: Layer, x: Tensor, isa: int) -> None:
    """By itself, and with a residual; from PyTorch's memory, and inside planar memory."""
    more = torch.randn_like(layer(x))
    for wrapped in (False, True):
        inside = [Add()] if wrapped else []
        check(chain(*inside, layer, *inside, isa=isa), x)
    check(chain(layer, n_inputs=2, isa=isa), x, more)
    check(chain(layer, Add(), n_inputs=2, isa=isa), x, more)


@st.composite
def convolutions(draw: Any) -> tuple[Layer, Tensor]:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    channels, out = groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 9))
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    size = draw(st.tuples(st.integers(1, 34), st.integers(1, 70)))
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    weight = sparse((out, channels // groups, *kernel), draw(st.sampled_from([0, 0.5, 0.9, 0.99, 1])), out)
    layer = Layer(
        weight,
        torch.randn(out) if draw(st.booleans()) else None,
        Geometry(stride, padding, dilation, groups),
        draw(st.sampled_from(list(ACTIVATIONS))),
        add_last=draw(st.booleans()),
    )
    return layer, torch.randn(draw(st.sampled_from([1, 2, 5])), channels, *size)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(case=convolutions(), n=THREADS)
def test_any_convolution_is_that_of_pytorch(isa: int, case: tuple[Layer, Tensor], n: int) -> None:
    torch.set_num_threads(n)
    layer, x = case
    assert layer.signature(Signature(tuple(x.shape))) == Signature(tuple(layer(x).shape))
    with_residual(layer, x, isa)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_width_of_an_image(stride: int, isa: int) -> None:
    weight = sparse((5, 3, 3, 3), 0.5)
    for padding in (0, 1):
        for width in range(3, 71):
            layer = Layer(weight, None, Geometry((stride, stride), (padding, padding)), "relu")
            with_residual(layer, torch.randn(1, 3, 3 + width % 6, width), isa)


@st.composite
def convolutions_of_a_few_pixels(draw: Any) -> tuple[Layer, Tensor]:
    """Where much of a kernel meets nothing but padding."""
    groups = draw(st.sampled_from([1, 1, 2, 6]))
    channels, out = groups * draw(st.sampled_from([1, 5, 30])), groups * draw(st.integers(1, 9))
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    stride, dilation = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(1, 4)] * 2))
    padding = draw(st.tuples(st.integers(0, 12), st.integers(0, 12)))
    size = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    weight = sparse((out, channels // groups, *kernel), draw(st.sampled_from([0, 0.5, 0.9])), out)
    layer = Layer(weight, torch.randn(out), Geometry(stride, padding, dilation, groups))
    return layer, torch.randn(draw(st.sampled_from([1, 2, 9])), channels, *size)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(case=convolutions_of_a_few_pixels(), n=THREADS)
def test_any_convolution_of_a_few_pixels_is_that_of_pytorch(isa: int, case: tuple[Layer, Tensor], n: int) -> None:
    torch.set_num_threads(n)
    with_residual(*case, isa)


@needs_library
def test_weights_that_meet_padding_alone_are_left_out() -> None:
    weight = sparse((64, 64, 3, 3), 0.5)
    whole = Layer(weight, None, Geometry(padding=(1, 1)))
    middle = Layer(weight[:, :, 1:2, 1:2].contiguous(), None, Geometry())
    for images in (1, 20):
        pixel = Signature((images, 64, 1, 1))
        assert whole.cost(pixel, 1) == middle.cost(pixel, 1)
        row = Signature((images, 64, 1, 9))
        assert whole.cost(row, 1) == Layer(weight[:, :, 1:2], None, Geometry(padding=(0, 1))).cost(row, 1)
    assert whole.cost(Signature((1, 64, 2, 2)), 1) > 2 * middle.cost(Signature((1, 64, 2, 2)), 1)
    # All of them: what is left is the bias.
    nothing = Layer(torch.randn(5, 3, 2, 2), torch.randn(5), Geometry(padding=(2, 2), dilation=(4, 4)))
    x = torch.randn(1, 3, 1, 1)
    assert torch.equal(chain(nothing)(x), nothing(x))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pixels", [1, 2, 3])
def test_numbers_of_weights_that_are_met_together(pixels: int, isa: int) -> None:
    """Several at a time, the last of which is split to fill up the count, but where that would not be exact."""
    for n in range(1, 14):
        weight = torch.zeros(3, 40, 1, 3)
        weight[0, :n, 0, 0], weight[0, 20 : 20 + n, 0, 2] = torch.randn(n), torch.randn(n)
        weight[1, n, 0, 1] = 2.0**-148  # a quarter of which is none
        weight[2, n, 0, 1] = torch.inf
        layer = Layer(weight, None, Geometry(padding=(0, 1)))
        x = torch.rand(1, 40, 1, 16 * pixels - 2) + 0.5
        got, want = chain(layer, isa=isa)(x), layer(x)
        assert error(got[:, 0], want[:, 0]) < 1e-6
        assert torch.equal(got[0, 1] > 0, want[0, 1] > 0)
        assert got[0, 2].isposinf().all()


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30)
@given(data=st.data())
def test_any_pointwise_layer_is_that_of_pytorch(isa: int, data: st.DataObject) -> None:
    draw = data.draw
    torch.set_num_threads(draw(THREADS))
    channels, out = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    weight = sparse((out, channels, 1, 1), draw(st.sampled_from([0, 0.5, 0.9, 1])), out)
    layer = Layer(weight, torch.randn(out), Geometry(), draw(st.sampled_from(list(ACTIVATIONS))))
    images, size = draw(st.integers(1, 33)), draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    with_residual(layer, torch.randn(images, channels, *size), isa)


# (images, channels, height, width), out channels, kernel, stride, padding, groups
TABLE = [
    ((1, 64, 56, 56), 64, 3, 1, 1, 1),
    ((1, 128, 28, 28), 64, 3, 1, 1, 1),
    ((1, 300, 14, 14), 70, 3, 1, 1, 1),  # several blocks of planes
    ((2, 512, 7, 7), 40, 3, 1, 1, 1),
    ((1, 64, 56, 56), 32, 3, 2, 1, 1),
    ((1, 3, 112, 112), 16, 7, 2, 3, 1),
    ((1, 256, 14, 14), 300, 1, 1, 0, 1),
    ((2, 1200, 14, 14), 20, 1, 1, 0, 1),
    ((1, 64, 15, 15), 32, 1, 2, 0, 1),
    ((33, 5, 7, 7), 6, 3, 1, 1, 1),
    ((33, 70, 1, 1), 40, 1, 1, 0, 1),
    ((1, 48, 30, 30), 48, 3, 1, 1, 48),  # depthwise
    ((1, 48, 31, 29), 48, 5, 2, 2, 48),
    ((3, 6, 9, 50), 12, 3, 1, 1, 6),  # two of a channel
    ((2, 24, 9, 9), 36, 3, 1, 1, 4),
    ((1, 4, 1, 1), 9, 1, 1, 0, 1),  # a single pixel
    ((1, 4, 1, 1), 9, 3, 1, 1, 1),
    ((1, 2, 1, 500), 3, 1, 1, 0, 1),
    ((1, 2, 3, 1000), 3, 3, 1, 1, 1),  # wider than a tile
    ((1, 2, 60, 4), 3, 7, 1, 3, 1),
    ((1, 2, 300, 2), 3, 1, 3, 0, 1),
]


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_layers_of_real_networks_are_those_of_pytorch(row: tuple[Any, ...], isa: int) -> None:
    shape, out, kernel, stride, padding, groups = row
    for zeros in (0.0, 0.9, 1.0):
        weight = sparse((out, shape[1] // groups, kernel, kernel), zeros)
        weight[0] = 0  # an empty row
        weight[-1] = torch.randn_like(weight[-1])  # a full one
        layer = Layer(weight, torch.randn(out), Geometry((stride,) * 2, (padding,) * 2, (1, 1), groups), "relu")
        x = torch.randn(shape)
        for n in (1, 2):
            torch.set_num_threads(n)
            check(chain(layer, n_inputs=2, isa=isa), x, torch.randn_like(layer(x)))
            check(chain(Add("relu"), layer, Add(), isa=isa), x)


@st.composite
def full_depthwise(draw: Any) -> tuple[Layer, Tensor]:
    """3 × 3 weights of which none is zero, in steps of 1 or of 2: mostly, so that its neighbours are met, too."""
    channels, each = draw(st.integers(2, 20)), draw(st.sampled_from([1, 1, 2]))
    step, padding = draw(st.sampled_from([1, 2])), draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    stride = draw(st.sampled_from([(step, step)] * 4 + [(1, 2), (2, 1)]))
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 70)))
    assume(all(n + 2 * p >= 3 for n, p in zip(size, padding, strict=True)))
    weight = torch.randn(channels * each, 1, 3, 3)
    if draw(st.sampled_from([False] * 4 + [True])):
        weight[draw(st.integers(0, channels - 1)), 0, draw(st.integers(0, 2)), draw(st.integers(0, 2))] = 0
    layer = Layer(
        weight,
        torch.randn(channels * each) if draw(st.booleans()) else None,
        Geometry(stride, padding, (1, 1), channels),
        draw(st.sampled_from(list(ACTIVATIONS))),
        add_last=draw(st.booleans()),
    )
    return layer, torch.randn(draw(st.sampled_from([1, 2, 5])), channels, *size)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(case=full_depthwise(), n=THREADS)
def test_any_full_depthwise_layer_is_that_of_pytorch(isa: int, case: tuple[Layer, Tensor], n: int) -> None:
    torch.set_num_threads(n)
    with_residual(*case, isa)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_full_depthwise_layer_goes_row_by_row_where_there_are_masks(stride: int, isa: int) -> None:
    weight = torch.randn(16, 1, 3, 3)
    for zeros, words in ((0, "row by row"), (1, "in place" if stride == 2 else "plane by plane")):
        weight[:zeros, 0, 0, 0] = 0
        segment = chain(Layer(weight, None, Geometry((stride,) * 2, (1, 1), (1, 1), 16)), isa=isa)
        [text] = ways(Program(segment.graph, [Signature((1, 16, 14, 14))], 1, isa)).values()
        assert words in text or "avx512" not in text
        assert "row by row" not in text or not zeros


@needs_library
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (28, 28), (45, 46), (60, 61)])  # channels are shared, then pixels
def test_threads_share_channels_or_pixels(size: tuple[int, int], n: int) -> None:
    torch.set_num_threads(n)
    point, depthwise = (
        sparse((36, 24, 1, 1), 0.8),
        Layer(torch.randn(36, 1, 3, 3), None, Geometry((1, 1), (1, 1), (1, 1), 36)),
    )
    segment = chain(Add(), Layer(point, torch.randn(36), Geometry(), "relu"), depthwise, Add())
    check(segment, torch.randn(1, 24, *size))
    check(segment, torch.randn(3, 24, *size))


# channels, out channels, kernel, stride, padding, height, width
SMALL = [
    (7, 9, 3, 1, 1, 7, 7),
    (7, 9, 3, 2, 1, 5, 6),
    (5, 6, 1, 1, 0, 3, 3),
    (5, 6, 1, 2, 0, 4, 4),
    (3, 4, 3, 1, 1, 1, 1),
]


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("row", SMALL, ids=str)
def test_batches_from_1_to_33(row: tuple[int, ...], isa: int) -> None:
    channels, out, kernel, stride, padding, *size = row
    geometry = Geometry((stride,) * 2, (padding,) * 2)
    layer = Layer(sparse((out, channels, kernel, kernel), 0.6), torch.randn(out), geometry, "relu")
    alone, inside = chain(layer, isa=isa), chain(Add(), layer, Add(), isa=isa)
    for images in range(1, 34):
        x = torch.randn(images, channels, *size)
        check(alone, x)
        check(inside, x)


def texts(segment: Segment, x: Tensor) -> list[str]:
    """How the layers go about it where all images go through at once."""
    return list(ways(Program(segment.graph, [Signature(tuple(x.shape), x.ndim != 4)], 1)).values())


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_a_number_stands_for_the_instruction_set_of_that_name(isa: int) -> None:
    layer = Layer(sparse((8, 8, 3, 3), 0.5), None, Geometry())
    [text] = ways(Program(chain(layer).graph, [Signature((1, 8, 6, 6))], 1, isa)).values()
    assert text.split(",")[0] == native().gossamer_isa(isa).decode()


@needs_library
def test_small_images_share_a_tile_and_pointwise_layers_are_run_in_place() -> None:
    conv = Layer(sparse((64, 64, 3, 3), 0.9), None, Geometry(padding=(1, 1)))
    for isa in ISAS:
        program = Program(chain(conv).graph, [Signature((16, 64, 6, 6))], 1, isa)
        [text] = ways(program).values()
        assert int(text.split(" images")[0].split(", ")[1]) > 1, text
    point = Layer(sparse((64, 64, 1, 1), 0.9), None, Geometry())
    for images, where in ((1, "in place"), (8, "in place")):
        [text] = texts(chain(Add(), point, Add()), torch.randn(images, 64, 14, 14))
        assert where in text
    for layer, x, words in (
        (Layer(sparse((64, 1, 3, 3), 0.5), None, Geometry(groups=64)), torch.randn(1, 64, 9, 9), "plane by plane"),
        (Layer(sparse((64, 64), 0.5)), torch.randn(7, 64), "weight by weight"),
        (Layer(sparse((64, 64), 0.5)), torch.randn(8, 64), "in place"),
    ):
        [text] = texts(chain(layer), x)
        assert words in text


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [(), (1,), (7,), (8,), (3, 50), (2, 3, 11), (33, 1, 1)])
@pytest.mark.parametrize("zeros", [0.0, 0.9, 1.0])
def test_linear_layers_are_those_of_pytorch(tokens: tuple[int, ...], zeros: float, isa: int) -> None:
    first, second = (sparse((37, 50), zeros), sparse((70, 37), zeros, 1))
    x = torch.randn(*tokens, 50)
    for activation in ACTIVATIONS:
        for add_last in (False, True):
            layer = Layer(first, torch.randn(37), None, activation, add_last=add_last)
            with_residual(layer, x, isa)
    check(chain(Layer(first, torch.randn(37), None, "gelu"), Layer(second), isa=isa), x)


@needs_library
def test_without_a_number_nothing_is_run() -> None:
    assert chain(Layer(torch.ones(3, 2)))(torch.ones(0, 2)).shape == (0, 3)
    conv = chain(Layer(torch.ones(6, 4, 3, 3), None, Geometry(padding=(1, 1))))
    assert conv(torch.empty(0, 4, 9, 9)).shape == (0, 6, 9, 9)


@needs_library
def test_weights_that_are_nan_or_tiny_are_weights() -> None:
    weight = torch.zeros(3, 1, 1, 1)
    weight[0], weight[1] = torch.nan, 1e-42
    for isa in ISAS:
        for inside in ([], [Add()]):
            segment = chain(*inside, Layer(weight, None, Geometry()), *inside, isa=isa)
            for pixels in (3, 9):
                got = segment(torch.full((1, 1, 1, pixels), 1e10))
                assert got[0, 0].isnan().all()
                assert torch.allclose(got[0, 1], torch.tensor(1e-32), rtol=1e-2)
                assert not got[0, 2].any()


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_denormal_inputs_are_numbers(isa: int) -> None:
    conv = Layer(sparse((4, 3, 3, 3), 0.5) * 4096, None, Geometry(padding=(1, 1)))
    x = torch.randn(2, 3, 9, 9) * 1e-41
    got, want = chain(conv, isa=isa)(x), conv(x)
    assert want.abs().max() > 0
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-43)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_where_it_is_met(isa: int) -> None:
    """Neighbours in a tile, which images and rows share, do not see it."""
    conv = Layer(torch.randn(5, 3, 3, 3), torch.randn(5), Geometry(padding=(1, 1)), "relu")
    point = Layer(torch.randn(5, 3, 1, 1), None, Geometry())
    for layer in (conv, point):
        for images, size in ((9, 3), (2, 14), (1, 60)):
            x = torch.randn(images, 3, size, size)
            x[images // 2, :, size // 2, size - 1] = torch.nan
            x[0, :, 0, 0] = torch.inf
            for inside in ([], [Add()]):
                got, want = chain(*inside, layer, *inside, isa=isa)(x), layer(x)
                assert torch.allclose(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@needs_library
@pytest.mark.parametrize("how", ["channels last", "sliced", "turned", "expanded", "negated"])
def test_inputs_in_any_layout_are_read_right(how: str) -> None:
    x = {
        "channels last": torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last),
        "sliced": torch.randn(4, 8, 9, 18)[::2, ::2, :, ::2],
        "turned": torch.randn(2, 4, 9, 9).transpose(2, 3),
        "expanded": torch.randn(1, 4, 9, 1).expand(2, 4, 9, 9),
        "negated": torch.view_as_complex(torch.randn(2, 4, 9, 9, 2)).conj().imag,
    }[how]
    for zeros in (0.7, 0.0):
        conv = chain(Layer(sparse((6, 4, 3, 3), zeros), None, Geometry(padding=(1, 1))))
        assert error(conv(x), conv.graph(x)) < 1e-5
    tokens = x.permute(0, 2, 3, 1)
    linear = chain(Layer(sparse((6, 4), 0.5)))
    assert error(linear(tokens), linear.graph(tokens)) < 1e-5
    assert error(linear(tokens[0, 0]), linear.graph(tokens[0, 0])) < 1e-5


@needs_library
def test_plans_are_bounded_and_follow_the_number_of_threads() -> None:
    layer = Layer(sparse((4, 4, 3, 3), 0.5), None, Geometry())
    segment = Segment.of(layer)
    for size in range(3, 40):
        check(segment, torch.randn(1, 4, size, size))
    assert len(layer._plans) == 16
    torch.set_num_threads(2)
    check(segment, torch.randn(1, 4, 39, 39))
    assert next(reversed(layer._plans))[3] == 2
    check(segment, torch.randn(1, 4, 3, 3))  # one that was dropped


@needs_library
def test_a_plan_is_made_once() -> None:
    layer = Layer(sparse((8, 8, 1, 1), 0.5), None, Geometry())
    x = Signature((2, 8, 6, 6))
    assert layer.plan(x, 1) is layer.plan(x, 1)
    assert layer.plan(x, 1, IN_PLACE + OUT_PLACE) is not layer.plan(x, 1)
    assert layer.plan(x, 1, isa=len(ISAS)) is None  # there is no such instruction set


@needs_library
def test_a_copy_and_a_cast_are_layers_of_their_own() -> None:
    segment = Segment.of(Layer(sparse((4, 4, 3, 3), 0.5), None, Geometry()))
    x = torch.randn(1, 4, 8, 8)
    want = segment(x)
    pointer = segment.graph.operator._layer.pointer
    for twin in (copy.deepcopy(segment), pickle.loads(pickle.dumps(segment))):
        assert torch.equal(twin(x), want)
        assert twin.graph.operator._layer.pointer != pointer
    assert error(segment.double()(x.double()).float(), want) < 1e-5
    with pytest.raises(RuntimeError):  # as in PyTorch
        segment(x)
    assert segment.float()(x).dtype == torch.float32
    assert torch.equal(segment(x), want)
    turned = segment.to(memory_format=torch.channels_last)
    assert not turned.graph.operator.weight.is_contiguous()
    assert torch.equal(turned(x), want)


@needs_library
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (Layer(torch.ones(2, 3, 1, 300), None, Geometry()), torch.randn(1, 3, 4, 400)),  # wider than a tile
        (Layer(torch.ones(2, 3, 1, 2), None, Geometry(dilation=(1, 280))), torch.randn(1, 3, 4, 400)),
        (Layer(torch.ones(2, 1, 1, 1), None, Geometry()), torch.randn(1, 9, 9)),  # no batch
    ],
)
def test_what_has_no_kernel_runs_in_pytorch(layer: Layer, x: Tensor) -> None:
    segment = Segment.of(layer)
    assert segment.stages(x) is None
    assert torch.equal(segment(x), layer(x))


@needs_library
@pytest.mark.parametrize("kernel", [(1, 65), (40, 1), (3, 200)])
def test_large_kernels(kernel: tuple[int, int]) -> None:
    for isa in ISAS:
        layer = Layer(sparse((3, 2, *kernel), 0.9), None, Geometry(padding=(kernel[0] // 2, kernel[1] // 2)))
        segment, x = chain(layer, isa=isa), torch.randn(1, 2, 45, 210)
        assert error(segment(x), layer(x)) < 1e-5


@needs_library
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Layer(torch.ones(4, 4, 3, 3), None, Geometry()), (1, 3, 8, 8)),
        (Layer(torch.ones(4, 4, 3, 3), None, Geometry()), (1, 4, 2, 8)),
        (Layer(torch.ones(3, 2)), (4, 5)),
    ],
)
def test_inputs_that_do_not_fit_are_named_by_pytorch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"to have 4 channels|Kernel size|cannot be multiplied"):
        Segment.of(layer)(torch.randn(shape))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Layer(torch.ones(2, 2), None, Geometry()), r"a weight of shape \(2, 2\) in 1 groups"),
        (lambda: Layer(torch.ones(3, 2, 1, 1), None, Geometry(groups=2)), "groups divide the out channels"),
        (lambda: Layer(torch.ones(3, 2, 1, 1), torch.ones(2), Geometry()), r"a bias of shape \(2,\) for 3 channels"),
        (lambda: Layer(torch.ones(3, 2, 1, 1), None, Geometry(), "relo"), r"'relo'.*Closest: relu"),
        (lambda: Layer(torch.ones(3)), r"a weight of shape \(3,\); a linear layer's has two axes"),
        (lambda: Layer(torch.ones(3, 2, 1, 1)), "a linear layer's has two axes"),
    ],
)
def test_what_does_not_fit_is_named(make: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make()


def test_what_a_layer_says_of_itself() -> None:
    weight = torch.zeros(4, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    conv = Layer(weight, None, Geometry(groups=4), "silu")
    assert conv.is_depthwise
    assert not conv.is_pointwise
    assert conv.sparsity == pytest.approx(100 * 8 / 9)
    assert "4×1×3×3" in str(conv)
    assert "88.9 % zeros, sparse" in str(conv)
    assert Layer(torch.ones(3, 2)).is_pointwise
    assert not Layer(torch.ones(3, 2, 1, 1), None, Geometry(stride=(2, 1))).is_pointwise


def test_a_file_that_is_no_library_is_none(tmp_path: Any) -> None:
    (tmp_path / "_native.so").write_bytes(b"no library")
    assert find_library([str(tmp_path)]) is None
