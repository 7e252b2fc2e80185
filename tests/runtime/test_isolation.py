"""Compiling leaves no trace, and what is done to a network later is not seen; whatever the network gives."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from real_networks import error, image
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer import GossamerWarning, Sparsifier, StateError, runtime


def sparse(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    Sparsifier(net, layer_type=nn.Conv2d).sparsify_model(90)
    return net.eval()


class Locked(nn.Module):
    """Cannot be copied, for its lock; one of its layers is in a list, another one has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.one, self.two, self.norm = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 4)
        self.parts, self.again = [self.one, self.two], self.head
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            x = self.parts[1](self.parts[0](x).relu())
        return self.again(self.norm(x).mean((2, 3)))


class LockedBranch(Locked):
    """And cannot be captured."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x * 2 if float(x.sum()) > 1e9 else x)


@pytest.mark.parametrize("make", [Locked, LockedBranch])
def test_later_changes_of_a_network_that_cannot_be_copied_are_not_seen(make: type[nn.Module]) -> None:
    net, inputs = sparse(make()), (image(20), torch.randn(3, 3, 24, 20))
    with torch.no_grad():
        wants = [net(x) for x in inputs]
        calls = net.calls.item()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = runtime.compile(net, image(20))
        assert net.calls.item() == calls
        assert net.one.weight.requires_grad
        for p in net.parameters():
            p.add_(1)
        net.norm.running_mean.add_(1)
        for x, want in zip(inputs, wants, strict=True):
            assert error(fast(x), want) < 1e-5


class Draws(nn.Module):
    """Drops values out, in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.5, training=True)


class DrawsBranch(Draws):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if float(x.sum()) > 1e9 else x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [Draws, DrawsBranch])
def test_compiling_draws_no_random_numbers(make: type[nn.Module]) -> None:
    net, x = sparse(make()), image(20)
    before = torch.get_rng_state()
    runtime.compile(net, x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore")
def test_dropout_in_training_mode_draws_as_in_pytorch() -> None:
    net, x = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 4)).train(), torch.randn(4, 8)
    torch._dynamo.reset()
    fast = torch.compile(net, backend="gossamer")
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            want = [net(x), net(x)]
            torch.manual_seed(seed)
            assert all(torch.equal(fast(x), w) for w in want)
    torch._dynamo.reset()


class Pair(NamedTuple):
    maps: Tensor
    side: int


@dataclasses.dataclass
class Known:
    maps: Tensor
    side: int = 3
    hidden: Tensor | None = None


@dataclasses.dataclass
class Unknown:
    maps: Tensor


torch.export.register_dataclass(Known, serialized_type_name="gossamer.tests.Known")


class Gives(nn.Module):
    def __init__(self, give: Any) -> None:
        super().__init__()
        self.one, self.two, self.give = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), give

    def forward(self, x: Tensor) -> Any:
        return self.give(x, self.two(self.one(x).relu()))


def parts(value: Any) -> Any:
    """Tensors as their shapes and a rounded sum, the rest as it is."""
    if isinstance(value, Tensor):
        return tuple(value.shape), round(float(value.double().sum()), 2)
    if dataclasses.is_dataclass(value):
        return type(value), parts(vars(value))
    if isinstance(value, dict):
        return type(value), {k: parts(v) for k, v in value.items()}
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return type(value), [parts(v) for v in value]
    return value


@pytest.mark.parametrize(
    "give",
    [
        lambda x, y: y.shape[2],
        lambda x, y: 3,
        lambda x, y: None,
        lambda x, y: (y, None),
        lambda x, y: (y, y.numel(), y.shape[0] / 2, y.shape[2] > 25, "words", 2.5),
        lambda x, y: [y, [None, [x]]],
        lambda x, y: OrderedDict(a=y, b=x),
        lambda x, y: Pair(y, y.shape[2]),
        lambda x, y: Known(y, y.shape[2]),
        lambda x, y: (y, {"none": None, "device": y.shape[0]}),
    ],
)
def test_what_a_network_gives_keeps_its_form(give: Any) -> None:
    net = sparse(Gives(give))
    fast = runtime.compile(net, image(24))
    with torch.no_grad():
        for x in (image(24), torch.randn(3, 3, 30, 30)):
            for _ in range(2):
                assert parts(fast(x)) == parts(net(x))


def test_a_class_that_torch_export_does_not_know_is_named() -> None:
    net, x = sparse(Gives(lambda x, y: Unknown(y))), image(24)
    with pytest.warns(GossamerWarning, match=r"of the class Unknown, .*torch\.export\.register_dataclass\(Unknown\)"):
        fast = runtime.compile(net, x)
    with torch.no_grad():
        assert error(fast(x).maps, net(x).maps) < 1e-5


def test_a_class_that_no_file_can_hold_is_named(tmp_path: Path) -> None:
    fast = runtime.compile(sparse(Gives(lambda x, y: Known(y))), image(24))
    with pytest.raises(StateError, match="gives, or has as a constant, a Known, which no file can hold; let it give"):
        fast.save(tmp_path / "net.gossamer")
