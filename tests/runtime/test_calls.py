"""A compiled network is called as its network was, whatever the arguments, and stays what it was compiled from."""

from __future__ import annotations

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from real_networks import error, image
from torch import Tensor, nn

from gossamer import Sparsifier, runtime
from gossamer.errors import ArgumentError, GossamerWarning
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
        self.conv = nn.Conv2d(3, 32, 3)

    def forward(self, x: Any) -> Any:
        first, second = (x["a"], x["b"]) if isinstance(x, dict) else x
        return {"sum": self.conv(first) + self.conv(second), "all": [first, (self.conv(second), 3)]}


@pytest.mark.parametrize("make", [lambda x: [x, x + 1], lambda x: {"a": x, "b": x + 1}, lambda x: (x, x + 1)])
def test_lists_and_dicts_of_tensors_may_go_in(make: Any) -> None:
    net = sparse(Nested())
    fast = runtime.compile(net, (make(image(24)),))
    for x in (image(24), torch.randn(2, 3, 9, 9), torch.randn(2, 3, 9, 9)):
        with torch.no_grad():
            got, want = fast(make(x)), net(make(x))
        assert error(got["sum"], want["sum"]) < 1e-5
        assert error(got["all"][1][0], want["all"][1][0]) < 1e-5
        assert got["all"][1][1] == 3
    assert len(fast._graphs) == 1


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(512, 512)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, named: bool = False) -> Any:
        y = self.fc(x) * scale
        y = y if mask is None else y * mask
        return {"y": y} if named else (y,)


def test_arguments_that_the_example_lacked_are_captured_once() -> None:
    net = sparse(Optional())
    fast, x = runtime.compile(net, torch.randn(16, 512)), torch.randn(16, 512)
    with torch.no_grad():
        for factor in (1.0, 2.0, 3.0):
            mask = torch.full((16, 1), factor)
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
    fast = runtime.compile(net, ([image(24), image(24)],))
    with torch.no_grad():
        for side in range(9, 18):
            x = image(side)
            assert error(fast([x, x])["sum"], net([x, x])["sum"]) < 1e-5
    assert len(fast._graphs) == 4


class Sums(nn.Module):
    """Three layers that the engine takes, an operator that it has no kernel for, and a dense layer with two results."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32) if norm else nn.Identity()
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        a = torch.tanh(self.norm(self.first(x)).relu() + self.second(torch.relu(self.first(y))))
        return {"rows": self.last(a.mean((2, 3))), "sides": (a.shape[2], [a.amax(), self.last(a.mean((2, 3))).relu()])}


@pytest.mark.parametrize("sparsity", [0, 90])
def test_the_short_way_gives_what_the_checked_one_gives(sparsity: float) -> None:
    net = sparse(Sums(), sparsity)
    fast = runtime.compile(net, (image(24), image(24)))
    with torch.no_grad():
        for x in (image(24), image(40), torch.randn(3, 3, 24, 24), image(24)):
            first, second, want = fast(x, x + 1), fast(x, x + 1), net(x, x + 1)
            for got in (first, second):
                assert error(got["rows"], want["rows"]) < 1e-5
                assert got["sides"][0] == want["sides"][0]
                assert error(got["sides"][1][0], want["sides"][1][0]) < 1e-5
                assert error(got["sides"][1][1], want["sides"][1][1]) < 1e-5
    assert len(fast._ways) == 3  # each of which went through the guards once
    with pytest.raises(Exception, match="size"):
        fast(image(24), image(25))


def test_the_short_way_is_not_taken_by_what_the_guards_would_stop() -> None:
    net = sparse(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)))
    fast, x = runtime.compile(net, image(24)), image(24)
    fast(x)
    assert fast._ways
    with torch.no_grad():
        assert error(fast.double()(x.double()), net.double()(x.double())) < 1e-5  # the weights are other ones now
        more = torch.randn(2, 3, 24, 24).double()
        assert error(fast(input=more), net(input=more)) < 1e-5


class Keyed(nn.Module):
    """Results in a dict whose keys are no words that code could have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Any:
        return {torch.float32: self.fc(x), (1, 2): self.fc(x).relu()}


def test_odd_keys_of_a_result() -> None:
    net = sparse(Keyed())
    fast, x = runtime.compile(net, torch.randn(16, 512)), torch.randn(16, 512)
    with torch.no_grad():
        for _ in range(3):
            assert error(fast(x)[(1, 2)], net(x)[(1, 2)]) < 1e-5
            assert error(fast(x)[torch.float32], net(x)[torch.float32]) < 1e-5


def test_threads_that_bring_more_kinds_than_are_kept() -> None:
    net = sparse(nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 8)))
    fast = runtime.compile(net, torch.randn(16, 512))
    inputs = [torch.randn(n, 512) for n in range(1, 100)]

    def call(first: int) -> float:
        with torch.no_grad():
            return max(error(fast(x), net(x)) for x in inputs[first:] + inputs[:first])

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(call, [0, 20, 40, 60])) < 1e-5


def test_what_runs_as_it_is_can_be_traced_and_wants_no_gradients() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    fast, x = runtime.compile(net, torch.randn(1, 8)), torch.randn(3, 8)
    assert net[0].weight.requires_grad, "a copy was frozen"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(fast, x)
    assert torch.equal(traced(x), net(x))


def test_more_kinds_of_inputs_than_are_kept() -> None:
    net = sparse(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)))
    fast = runtime.compile(net, torch.randn(16, 512))
    with torch.no_grad():
        for n in (*range(1, 80), 3):
            x = torch.randn(n, 512)
            assert error(fast(x), net(x)) < 1e-5
    assert 0 < len(fast._ways) <= 64


def test_a_network_of_which_nothing_is_ours_is_called_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    fast, x = runtime.compile(net, torch.randn(1, 8)), torch.randn(3, 8)
    assert torch.equal(fast(x), net(x)), "the same operators"
    assert not fast(x).requires_grad
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(torch.randn(3, 9))
    with torch.no_grad():
        want = net.double()(x.double())
        assert error(fast.double()(x.double()), want) < 1e-12


def test_a_part_that_is_compiled_already_is_named() -> None:
    inside = runtime.compile(sparse(nn.Sequential(nn.Linear(512, 512))), torch.randn(1, 512))
    with pytest.raises(ArgumentError, match="its part '1' is compiled already"):
        runtime.compile(nn.Sequential(nn.ReLU(), inside).eval(), torch.randn(1, 512))


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
        assert error(torch.vmap(fast.network)(some), torch.vmap(net)(some)) < 1e-5


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


class Uncopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc(x))

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


def test_training_a_network_that_cannot_be_copied_does_not_bring_dropout_back() -> None:
    net, x = Uncopied().eval(), torch.ones(4, 8)
    fast = runtime.compile(net, x)
    want = fast(x)
    net.train()
    assert torch.equal(fast(x), want)


@pytest.mark.parametrize("sparsity", [0, 90])
def test_compiling_runs_leave_no_trace_in_what_a_network_counts(sparsity: float) -> None:
    class Wide(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(512, 512)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc(x) * 0 + self.calls

    x = torch.ones(16, 512)
    fast = runtime.compile(sparse(Wide(), sparsity), x)
    assert [fast(x)[0, 0].item() for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["weight_1", "weight_2"])
def test_a_parameter_whose_name_the_short_way_might_take(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big, self.small = nn.Linear(512, 512), nn.Linear(512, 64)
            self.register_parameter(name, nn.Parameter(torch.full((64, 512), 3.0)))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.big(x), self.small(x).cumsum(-1) @ getattr(self, name)

    net, x = Named(), torch.randn(16, 512)
    net.big = sparse(net.big)
    net.eval()
    fast = runtime.compile(net, x)
    assert {r.runs for r in fast.explain()} >= {"sparse", "dense"}
    with torch.no_grad():
        for _ in range(3):
            for got, want in zip(fast(x), net(x), strict=True):
                assert error(got, want) < 1e-5
