"""A compiled network is called as its network was, whatever the arguments, and stays what it was compiled from."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from real_networks import error, image
from torch import Tensor, nn

from gossamer import Sparsifier, runtime
from gossamer.errors import GossamerWarning
from gossamer.native import native


def sparse(net: nn.Module, sparsity: float = 90) -> nn.Module:
    torch.manual_seed(0)
    Sparsifier(net, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(sparsity)
    return net.eval()


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 16, 5)
    )


def test_later_changes_of_the_network_are_not_seen() -> None:
    net = sparse(small(), 50)
    fast, x, three = runtime.compile(net, image(8)), image(8), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        want, want_three = net(x), net(three)
        for p in net.parameters():
            p.add_(1)
        net.train()
        net(three)
    assert error(fast(x), want) < 1e-5
    assert error(fast(three), want_three) < 1e-5


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x)


def test_the_network_is_not_changed_by_being_compiled() -> None:
    net = Counting().eval()
    fast = runtime.compile(net, torch.randn(2, 8))
    fast(torch.randn(2, 8))
    assert net.calls.item() == 0


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Any) -> Any:
        first, second = (x["a"], x["b"]) if isinstance(x, dict) else x
        return {"sum": self.conv(first) + self.conv(second), "all": [first, (self.conv(second), 3)]}


@pytest.mark.parametrize("make", [lambda x: [x, x + 1], lambda x: {"a": x, "b": x + 1}, lambda x: (x, x + 1)])
def test_lists_and_dicts_of_tensors_may_go_in(make: Any) -> None:
    net = sparse(Nested())
    fast = runtime.compile(net, (make(image(8)),))
    for x in (image(8), torch.randn(2, 3, 9, 9), torch.randn(2, 3, 9, 9)):
        with torch.no_grad():
            got, want = fast(make(x)), net(make(x))
        assert error(got["sum"], want["sum"]) < 1e-5
        assert error(got["all"][1][0], want["all"][1][0]) < 1e-5
        assert got["all"][1][1] == 3
    assert len(fast._graphs) == 1


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, named: bool = False) -> Any:
        y = self.fc(x) * scale
        y = y if mask is None else y * mask
        return {"y": y} if named else (y,)


def test_arguments_that_the_example_lacked_are_captured_once() -> None:
    net = sparse(Optional())
    fast, x = runtime.compile(net, torch.randn(2, 16)), torch.randn(2, 16)
    with torch.no_grad():
        for factor in (1.0, 2.0, 3.0):
            mask = torch.full((2, 1), factor)
            assert error(fast(x, mask=mask)[0], net(x, mask=mask)[0]) < 1e-5
        assert len(fast._graphs) == 1
        assert error(fast(x=x)[0], net(x)[0]) < 1e-5
        assert len(fast._graphs) == 1
        assert error(fast(x, scale=2.0)[0], net(x, scale=2.0)[0]) < 1e-5
        assert error(fast(x, mask, 3.0, named=True)["y"], net(x, mask, 3.0, named=True)["y"]) < 1e-5
    with pytest.raises(TypeError, match="colour"):
        fast(x, colour=1)


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.float())  # of which a capture of float32 knows nothing


def test_a_dtype_that_the_network_takes_is_taken() -> None:
    net = sparse(Bytes())
    fast, x = runtime.compile(net, image(8)), torch.randint(0, 255, (1, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        assert error(fast(x), net(x)) < 1e-5
        assert error(fast(x.double()), net(x.double())) < 1e-5


def test_sizes_that_need_captures_without_end_run_in_pytorch() -> None:
    net = sparse(Nested())
    fast = runtime.compile(net, ([image(8), image(8)],))
    with torch.no_grad():
        for side in range(9, 18):
            x = image(side)
            assert error(fast([x, x])["sum"], net([x, x])["sum"]) < 1e-5
    assert len(fast._graphs) == 4


@pytest.mark.parametrize("shape", [(3, 20, 20), (1, 20, 20)])
def test_an_image_without_a_batch(shape: tuple[int, ...]) -> None:
    net = sparse(nn.Sequential(nn.Conv2d(shape[0], 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)))
    alone = runtime.compile(net, torch.randn(shape))
    batch = runtime.compile(net, torch.randn(1, *shape))
    x = torch.randn(shape)
    with torch.no_grad():
        for fast in (alone, batch):
            assert error(fast(x), net(x)) < 1e-5
            assert error(fast(x[None]), net(x[None])) < 1e-5


@pytest.mark.parametrize(
    ("kernel", "dilation", "runs"), [(3, 1, "sparse"), ((5, 3), (1, 2), "sparse"), (4, 1, "torch")]
)
def test_padding_by_word(kernel: Any, dilation: Any, runs: str) -> None:
    net = sparse(nn.Sequential(*[nn.Conv2d(32, 32, kernel, padding=p, dilation=dilation) for p in ("same", "valid")]))
    x = torch.randn(1, 32, 20, 20)
    fast = runtime.compile(net, x)
    assert [row.runs for row in fast.explain()] == [runs, "sparse"]
    with torch.no_grad():
        assert error(fast(x), net(x)) < 1e-5


class Reads(nn.Module):
    """Cannot be captured, and looks at its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.same, self.out = nn.Linear(32, 32), nn.Conv2d(1, 1, 3, padding="same"), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 0:
            x = x * 2
        x = x.to(self.fc.weight.dtype).view(-1, self.fc.in_features)
        return nn.functional.linear(self.fc(x), self.out.weight, self.out.bias)


def test_a_network_that_reads_its_layers_runs_layer_by_layer() -> None:
    net, x = sparse(Reads()), torch.randn(4, 32)
    with pytest.warns(GossamerWarning, match="its layers run one by one"):
        fast = runtime.compile(net, x)
    assert [row.name for row in fast.explain()] == ["fc", "out"]
    with torch.no_grad():
        assert error(fast(x), net(x)) < 1e-5
    assert type(net.fc) is nn.Linear
    assert list(net.fc.children()) == []


def test_who_only_looks_at_what_is_computed_sees_pytorch() -> None:
    net = sparse(nn.Sequential(nn.Conv2d(3, 8, 3)))
    fast, some = runtime.compile(net, image(8)), torch.randn(4, 1, 3, 8, 8)
    with torch.no_grad():
        assert error(torch.vmap(fast.graph)(some), torch.vmap(net)(some)) < 1e-5


@pytest.mark.skipif(native() is None or not sys.platform.startswith("linux"), reason="the compiled library's threads")
def test_where_no_thread_can_be_made_one_does_all() -> None:
    code = """
import resource, torch
from torch import nn
from gossamer.runtime.layers import Layer, Geometry
from gossamer.runtime.segment import Segment
weight = torch.randn(64, 64, 3, 3); weight[:, 8:] = 0
segment, x = Segment.of(Layer(weight, None, Geometry())), torch.randn(1, 64, 32, 32)
torch.set_num_threads(1)
want = segment(x)
segment(x)
torch.set_num_threads(3)
stages = segment.stages(x)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
program, out = stages[0].program, torch.zeros_like(want)
program.run([x], [out], 1, 1)  # its memory is there
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (size + 2 * 2**20, hard))  # a thread's stack takes 8 MiB
program.run([x], [out], 1, 3)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
print(torch.allclose(out, want, atol=1e-4))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "True\n", done.stderr
