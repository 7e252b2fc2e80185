"""The functions behind a layer, in every instruction set, beside PyTorch's in double precision."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from twins import ISAS, chain, needs_library

from gossamer.runtime.activations import ACTIVATIONS, CODES
from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.planes import Add

HEADER = Path(__file__).parents[2] / "src" / "native" / "float32" / "kernels.h"
X = torch.cat(
    [
        torch.linspace(-30, 30, 20_001),
        torch.tensor([-3e38, -1e30, -100.0, 100.0, 1e30, -1e-30, 0.0, -0.0, 1e-42, -1e-42]),
    ]
)


def test_each_has_the_number_that_the_library_gives_it() -> None:
    found = re.search(r"enum Activation : int32_t \{ (.*), N_ACTIVATIONS \};", HEADER.read_text())
    assert found is not None
    assert [name.lower() for name in found[1].split(", ")] == list(ACTIVATIONS)
    assert list(CODES.values()) == list(range(len(ACTIVATIONS)))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("how", ["tile", "in place", "depthwise", "tokens", "alone"])
def test_they_are_those_of_pytorch_wherever_they_are_curved(activation: str, isa: int, how: str) -> None:
    x = X.view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1)
    if how == "tile":
        segment = chain(Layer(one, None, Geometry(), activation), isa=isa)
    elif how == "in place":
        segment = chain(Add(), Layer(one, None, Geometry(), activation), Add(), isa=isa)
    elif how == "depthwise":
        x = x.expand(1, 2, 1, -1)
        segment = chain(Layer(one.repeat(2, 1, 1, 1), None, Geometry(groups=2), activation), isa=isa)
    elif how == "tokens":
        x = X[:1000]
        segment = chain(Layer(torch.eye(1000), None, None, activation), isa=isa)
    else:
        segment = chain(Add(activation), isa=isa)
    assert segment.stages(x) is not None
    want = ACTIVATIONS[activation](x.double()).float()  # PyTorch's own gelu is off by 8e-7
    assert torch.allclose(segment(x), want, rtol=2e-6, atol=4e-7)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_reach_what_depends_on_them(activation: str, isa: int) -> None:
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0], weight[1, 1] = 1.0, 1.0
    segment = chain(Layer(weight, None, Geometry(padding=(1, 1)), activation), isa=isa)
    x = torch.randn(1, 2, 8, 8)
    x[0, 0, 4, 4] = torch.nan
    got = segment(x)
    assert torch.equal(got[0, 0].isnan(), segment.graph(x)[0, 0].isnan())
    assert not got[0, 1].isnan().any()  # where PyTorch's 0 · nan is nan, a weight that is not there is not
    x[0, 0, 4, 4] = torch.inf
    got, want = segment(x)[0, 0], segment.graph(x)[0, 0]
    plain = want.isfinite()  # PyTorch's gelu of infinity is nan; ours is infinity
    assert torch.allclose(got[plain], want[plain], rtol=1e-5, atol=1e-6)
    assert not got[~plain].isfinite().any()


# What they tend to; PyTorch's own silu and gelu give nan for some of these, and which depends on its version.
LIMITS = {
    "none": (-torch.inf, torch.inf), "relu": (0, torch.inf), "relu6": (0, 6), "silu": (0, torch.inf),
    "gelu": (torch.nan, torch.inf), "gelu_tanh": (torch.nan, torch.inf), "hardswish": (torch.nan, torch.inf),
    "hardsigmoid": (0, 1), "sigmoid": (0, 1),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_they_give_for_the_infinities(activation: str, isa: int) -> None:
    x = torch.tensor([-torch.inf, torch.inf, torch.nan] * 20)
    got = chain(Add(activation), isa=isa)(x.view(1, 1, 3, 20))
    want = torch.tensor([*LIMITS[activation], torch.nan] * 20).view(1, 1, 3, 20)
    assert torch.allclose(got, want, atol=1e-30, equal_nan=True)
