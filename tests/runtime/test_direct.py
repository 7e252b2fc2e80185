"""The short way through a network: in place where nobody else sees it, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from real_networks import error, image
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer import runtime
from gossamer.runtime.capture import capture
from gossamer.runtime.direct import direct


class Dense(nn.Module):
    """As DenseNet has it, whose BatchNorms cannot be folded: they come before a layer, and after what others want."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (3, 8, 11))
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 8, 1), nn.Conv2d(8, 8, 1)
        self.act = act

    def forward(self, x: Tensor) -> Any:
        y = self.first(self.act(self.norms[0](self.act(x))))  # nobody changes the input
        z = self.norms[1](y)
        both = torch.cat([z, x], 1)
        w = self.second(self.act(self.norms[2](both)))
        kept = self.act(z)  # of which `both` has a part
        return y, z, self.act(w + kept), self.act(self.last(w)) + w, self.act(self.last(kept) + w)


@pytest.mark.parametrize("act", [F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.gelu, torch.sigmoid])
def test_nothing_is_changed_that_somebody_sees(act: Any) -> None:
    torch.manual_seed(0)
    net, x = Dense(act).eval(), torch.randn(2, 3, 12, 12)
    before, fast = x.clone(), runtime.compile(net, image(12))
    with torch.no_grad():
        for _ in range(3):  # the first through the guards
            for got, want in zip(fast(x), net(x), strict=True):
                assert error(got, want) < 1e-5
    assert fast._ways
    assert torch.equal(x, before)


def test_dense_layers_take_no_more_memory_and_functions_than_in_pytorch() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Hardswish())
    way = direct(capture(net.eval(), (image(8),)))
    assert way is not None
    calls = [(n.target, n.kwargs.get("inplace")) for n in way.graph.nodes if n.op == "call_function"]
    assert calls == [
        *((F.batch_norm, None), (F.relu, True), (F.conv2d, None), (F.relu, True)),
        *((F.batch_norm, None), (F.hardswish, True)),
    ]
