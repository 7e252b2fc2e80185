"""torch.compile(model, backend="gossamer")."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer import Sparsifier
from gossamer.runtime import model as runtime_model
from gossamer.runtime.layers import Layer

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x)).relu()
        return self.head(self.two(x).mean((2, 3)))


def sparse() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    Sparsifier(net).sparsify_model(80)
    return net


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every graph that is made, so that a test can see that one was."""
    made: list[Any] = []
    real = runtime_model._gathered

    def watched(*args: Any) -> Any:
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(runtime_model, "_gathered", watched)
    return made


def test_pytorchs_own_door_leads_to_the_engine(compiled: list[Any]) -> None:
    assert "gossamer" in torch._dynamo.list_backends()
    net = sparse()
    fast = torch.compile(net, backend="gossamer")
    with torch.no_grad():
        for shape in ((2, 3, 12, 12), (2, 3, 12, 12), (5, 3, 12, 12), (5, 3, 20, 16)):
            x = torch.randn(shape)
            assert error(fast(x), net(x)) < 1e-5
    convs = [m for m in compiled[0].modules() if isinstance(m, Layer) and m.geometry is not None]
    assert [c.is_sparse for c in convs[:2]] == [True, True]
    assert convs[0].activation == "relu"  # and the normalisation is folded


def test_settings_that_there_are_not_are_named() -> None:
    with pytest.raises(Exception, match="has no mode='max-autotune'"), torch.no_grad():
        torch.compile(sparse(), backend="gossamer", mode="max-autotune")(torch.randn(1, 3, 9, 9))


def test_weights_that_change_are_seen() -> None:
    net, x = sparse(), torch.randn(2, 3, 12, 12)
    fast = torch.compile(net, backend="gossamer")
    with torch.no_grad():
        before = fast(x)
        net.one.weight.mul_(2)
        net.norm.running_mean.add_(1)
        after = fast(x)
        assert error(after, net(x)) < 1e-5
    assert not torch.equal(before, after)


def test_where_gradients_are_wanted_there_are_gradients() -> None:
    net, x = sparse().train(), torch.randn(2, 3, 12, 12)
    fast = torch.compile(net, backend="gossamer")
    fast(x).square().mean().backward()
    got = net.one.weight.grad.clone()
    net.zero_grad()
    net(x).square().mean().backward()
    assert error(got, net.one.weight.grad) < 1e-4


def test_two_networks_of_one_make_keep_their_own_weights() -> None:
    one, two = sparse(), sparse()
    with torch.no_grad():
        for p in two.parameters():
            p.mul_(1.5)
        x = torch.randn(2, 3, 12, 12)
        for net in (one, two, one):
            fast = torch.compile(net, backend="gossamer")
            assert error(fast(x), net(x)) < 1e-5


def test_a_graph_that_breaks_runs_in_its_parts() -> None:
    class Breaks(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.one(x)).relu()
            if bool(x.mean() > 0):
                x = x + 1
            return self.head(self.two(x).mean((2, 3)))

    torch.manual_seed(0)
    net, x = Breaks().eval(), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert error(torch.compile(net, backend="gossamer")(x), net(x)) < 1e-5


def test_training_mode_without_gradients_updates_statistics_once_a_call() -> None:
    net = sparse().train()
    twin, x = copy.deepcopy(net), torch.randn(8, 3, 12, 12)
    fast = torch.compile(net, backend="gossamer")
    with torch.no_grad():
        for _ in range(3):
            assert error(fast(x), twin(x)) < 1e-5
            assert error(net.norm.running_mean, twin.norm.running_mean) < 1e-5
        assert net.norm.num_batches_tracked == 3
        assert error(fast.eval()(x), twin.eval()(x)) < 1e-5


def test_statistics_that_training_mode_has_moved_are_seen() -> None:
    # PyTorch writes them without counting it, and with no parameter changed.
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    fast, x = torch.compile(net, backend="gossamer"), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        before = fast(x)
        for shift in (3.0, -5.0):
            net.train()
            net(x + shift)
            net.eval()
            assert error(fast(x), net(x)) < 1e-5
        assert error(before, net(x)) > 1e-2
        net[1].running_mean.fill_(torch.nan)  # which equals nothing, and is no reason to compile at each call
        assert fast(x).isnan().all()
