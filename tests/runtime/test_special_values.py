"""nan, infinities, denormals and inputs that are not contiguous, through every operator: as in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import ISAS, chain, error, needs_library

from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.planes import Add, Concat, Flatten, MaxPool, Mean, Scale

pytestmark = needs_library


def dense(*shape: int) -> Tensor:
    """Weights of which none is zero: what meets one that is, is another test's."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5


# An operator, and what it is given; of a tuple, the first has pixels that are special.
OPERATORS: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...]]] = {
    "conv": (Layer(dense(5, 3, 3, 3), dense(5), Geometry(padding=(1, 1)), "relu"), ((2, 3, 9, 14),)),
    "strided": (Layer(dense(5, 3, 3, 3), dense(5), Geometry((2, 2), (1, 1))), ((2, 3, 9, 14),)),
    "small images": (Layer(dense(5, 3, 3, 3), None, Geometry(padding=(1, 1))), ((33, 3, 2, 3),)),
    "grouped": (Layer(dense(6, 2, 3, 3), None, Geometry(padding=(1, 1), groups=3), "hardsigmoid"), ((2, 6, 7, 7),)),
    "pointwise": (Layer(dense(5, 3, 1, 1), dense(5), Geometry(), "relu6"), ((2, 3, 7, 9),)),
    "depthwise": (Layer(dense(5, 1, 3, 3), dense(5), Geometry(padding=(1, 1), groups=5), "relu"), ((2, 5, 9, 14),)),
    "strided depthwise": (Layer(dense(5, 1, 3, 3), None, Geometry((2, 2), (1, 1), groups=5)), ((2, 5, 9, 14),)),
    "residual": (Layer(dense(5, 5, 3, 3), None, Geometry(padding=(1, 1)), "relu"), ((2, 5, 8, 8), (2, 5, 8, 8))),
    "pool": (MaxPool((3, 3), (2, 2), (1, 1)), ((2, 3, 9, 30),)),
    "add": (Add("relu"), ((2, 3, 9, 9), (2, 3, 9, 9))),
    "activation": (Add("sigmoid"), ((2, 3, 9, 9),)),
    "scale": (Scale(), ((2, 3, 9, 9), (2, 3, 1, 1))),
    "mean": (Mean(), ((2, 3, 5, 9),)),
    "concat": (Concat(), ((2, 3, 5, 9), (2, 4, 5, 9))),
    "flatten": (Flatten(), ((9, 20, 1, 1),)),
    "linear": (Layer(dense(5, 20), dense(5), None, "relu"), ((30, 20),)),
    "linear, few": (Layer(dense(5, 20), dense(5), None, "relu"), ((2, 20),)),
}
SPECIAL = {"nan": [torch.nan], "inf": [torch.inf], "-inf": [-torch.inf], "all": [torch.nan, torch.inf, -torch.inf]}


def inputs_of(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def same(operator: nn.Module, inputs: list[Tensor], isa: int, **more: Any) -> None:
    """From PyTorch's memory; and between others, in a program's own."""
    want = operator(*inputs)
    segments = [chain(operator, n_inputs=len(inputs), isa=isa)]
    if want.ndim == inputs[0].ndim:
        segments.append(chain(operator, Add(), n_inputs=len(inputs), isa=isa))
        if len(inputs) == 1:
            segments.append(chain(Add(), operator, Add(), isa=isa))
    for segment in segments:
        assert segment.stages(*inputs) is not None
        got = segment(*inputs)
        assert torch.allclose(got, want, equal_nan=True, **more), f"{got}\n{want}"


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", OPERATORS)
def test_nan_and_infinities_are_met_as_in_pytorch(name: str, special: str, isa: int) -> None:
    operator, shapes = OPERATORS[name]
    for which in range(len(shapes)):
        inputs = inputs_of(shapes)
        flat = inputs[which].view(-1)
        for i, value in enumerate(SPECIAL[special]):
            flat[(len(flat) * (i + 1)) // 4] = value
        flat[-1] = SPECIAL[special][0]
        same(operator, inputs, isa, rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in ("activation", "grouped")])
def test_denormals_are_numbers(name: str, isa: int) -> None:
    operator, shapes = OPERATORS[name]
    if isinstance(operator, Layer):  # a bias would hide them
        operator = Layer(operator.weight, None, operator.geometry, operator.activation)
    inputs = [x * (1e-40 if i == 0 or name != "scale" else 1) for i, x in enumerate(inputs_of(shapes))]
    assert operator(*inputs).abs().max() > 1e-42
    same(operator, inputs, isa, rtol=1e-3, atol=3e-43)


@needs_library
@pytest.mark.parametrize("how", ["channels last", "every second", "turned", "expanded"])
@pytest.mark.parametrize("name", [n for n, (_, shapes) in OPERATORS.items() if len(shapes[0]) == 4])
def test_inputs_that_are_not_contiguous(name: str, how: str) -> None:
    operator, shapes = OPERATORS[name]

    def laid_out(x: Tensor) -> Tensor:
        if how == "channels last":
            return x.to(memory_format=torch.channels_last)
        if how == "every second":
            return torch.stack([x, x + 9], -1).flatten(-2)[..., ::2]
        if how == "turned":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        return x[:1].expand(x.shape)

    inputs = [laid_out(x) for x in inputs_of(shapes)]
    segment = chain(operator, n_inputs=len(inputs))
    assert segment.stages(*inputs) is not None
    assert error(segment(*inputs), operator(*inputs)) < 1e-5
