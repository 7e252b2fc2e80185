"""Operators of a graph taken together: which, on what inputs they are compiled, and when PyTorch runs them."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, symbolic_trace
from twins import chain, check, error, needs_library, sparse

from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.planes import Add, Concat, Flatten, Mean
from gossamer.runtime.segment import Segment, gather, is_plain

pytestmark = needs_library


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def conv(i: int, o: int, **more: Any) -> Layer:
    return Layer(sparse((o, i, 3, 3), 0.7), torch.randn(o), Geometry(padding=(1, 1)), "relu", **more)


def test_what_pytorch_has_to_run() -> None:
    x = torch.randn(2, 3)
    assert is_plain(x)
    assert not is_plain(x.double())
    assert not is_plain(x.to("meta"))
    assert not is_plain(x.to_sparse())
    assert not is_plain(torch.randn(3, dtype=torch.cfloat).conj().imag)
    wanted = torch.randn(2, 3, requires_grad=True)
    assert not is_plain(wanted)
    with torch.no_grad():
        assert is_plain(wanted)


def test_where_a_gradient_is_wanted_there_is_one() -> None:
    segment = chain(conv(4, 4), Add("silu"))
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    segment(x).sum().backward()
    got = x.grad
    x.grad = None
    segment.graph(x).sum().backward()
    assert got is not None
    assert torch.equal(got, x.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_element_types_run_in_pytorch(dtype: torch.dtype) -> None:
    segment = chain(conv(4, 4)).to(dtype)
    x = torch.randn(1, 4, 8, 8, dtype=dtype)
    assert torch.equal(segment(x), segment.graph(x))
    assert segment(x).dtype == dtype


def test_sparse_tensors_are_what_they_were() -> None:
    segment = chain(Layer(torch.randn(3, 4)))
    x = torch.eye(4)[:2]
    assert error(segment(x.to_sparse()), segment(x)) < 1e-6


@pytest.mark.parametrize("form", ["one", "tuple of one", "twice", "list"])
def test_what_is_returned_is_returned_in_the_same_form(form: str) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_module("a", (x,))
    graph.output({"one": y, "tuple of one": (y,), "twice": (y, y, x), "list": [y, x]}[form])
    segment = Segment(GraphModule({"a": conv(3, 5)}, graph))
    image = torch.randn(2, 3, 6, 6)
    for got, want in ((segment(image), segment.graph(image)), (segment.timed(image)[0], segment.graph(image))):
        if form == "one":
            assert error(got, want) < 1e-5
            continue
        assert len(got) == len(want)
        assert all(error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))


def test_programs_are_bounded_and_follow_the_number_of_threads() -> None:
    segment = chain(conv(4, 4), conv(4, 4))
    for size in range(1, 30):
        check(segment, torch.randn(1, 4, size, size))
    assert len(segment._kept) == 16
    x = torch.randn(1, 4, 29, 29)
    one = segment.stages(x)
    assert segment.stages(x) is one
    torch.set_num_threads(2)
    two = segment.stages(x)
    assert two is not None
    assert two is not one
    assert [s.threads for s in two] == [2]
    assert error(segment(x), segment.graph(x)) < 1e-5


@pytest.mark.parametrize("team", [False, True], ids=["own threads", "the team's"])
@pytest.mark.parametrize("images", [1, 3, 9])
def test_the_number_of_threads_changes_no_number(team: bool, images: int) -> None:
    segment = chain(conv(8, 16), conv(16, 16), Mean())
    segment.team = team
    x = torch.randn(images, 8, 20, 20)
    one = segment(x)
    for n in (2, 3, 70):
        torch.set_num_threads(n)
        assert torch.allclose(segment(x), one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("team", [False, True], ids=["own threads", "the team's"])
def test_a_program_is_not_dropped_under_whoever_runs_it(team: bool) -> None:
    """More shapes than are kept, from several threads at once."""
    torch.set_num_threads(2)
    segment = chain(conv(4, 8), conv(8, 4))
    segment.team = team
    inputs = [torch.randn(1 + i % 3, 4, 4 + i, 9) for i in range(40)]
    wants = [segment.graph(x) for x in inputs]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(80):
            k = i * (2 * seed + 1) % len(inputs)
            if error(segment(inputs[k]), wants[k]) > 1e-5:
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """OpenMP's are not there any more, and whoever asks OpenMP for them waits for ever."""
    code = """
import os, torch
from gossamer.native import native
from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.segment import Segment
torch.set_num_threads(2)
weight = torch.randn(64, 64, 3, 3); weight[:, 8:] = 0
segment, x = Segment.of(Layer(weight, None, Geometry()), team=True), torch.randn(1, 64, 32, 32)
want = segment(x)
child = os.fork()
if child == 0:
    os._exit(0 if segment(x).numpy().tobytes() == want.numpy().tobytes() and not native().gossamer_has_team() else 1)
print(os.waitpid(child, 0)[1], torch.equal(segment(x), want))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "0 True\n", done.stderr


@pytest.mark.skipif(
    sys.platform != "linux" or "backend: OpenMP" not in torch.__config__.parallel_info(), reason="no such threads"
)
def test_pytorchs_threads_are_found_where_it_has_them() -> None:
    threads = "import os, torch; torch.set_num_threads(2); torch.ones(1 << 20).sum()"
    run = """
from gossamer.native import native
from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.segment import Segment
weight = torch.randn(64, 64, 3, 3); weight[:, 8:] = 0
for team in (True, False):
    segment = Segment.of(Layer(weight, None, Geometry()), team=team)
    before = len(os.listdir("/proc/self/task"))
    segment(torch.randn(1, 64, 32, 32))
    print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", threads + run], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["0", "1"], done.stderr


def test_copies_make_programs_of_their_own() -> None:
    segment, x = chain(conv(4, 8), Mean(False), Layer(sparse((3, 8), 0.5))), torch.randn(3, 4, 6, 6)
    want = segment(x)
    for twin in (copy.deepcopy(segment), pickle.loads(pickle.dumps(segment))):
        assert not twin._kept
        assert torch.equal(twin(x), want)
        assert twin.stages(x) is not segment.stages(x)
    assert not segment.float()._kept  # what is compiled is of the weights before
    assert torch.equal(segment(x), want)


class Net(nn.Module):
    """As it is once layers have been taken together: operators, and PyTorch's own between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = conv(3, 8), conv(8, 8), conv(8, 8)
        self.add, self.dense = Add("relu"), conv(8, 8, is_sparse=False)
        self.mean, self.flat, self.fc, self.alone = Mean(), Flatten(), Layer(sparse((4, 8), 0.5)), Add("relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x)
        y = self.add(self.two(y), y)
        y = torch.softmax(y, 1)  # not the engine's
        z = self.alone(y)  # one of the engine's, without a layer
        z = self.dense(z)
        return self.fc(self.flat(self.mean(self.three(z)))), y


class Traced(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, Net)


def test_operators_that_follow_each_other_are_gathered() -> None:
    net = Net()
    graph = GraphModule(net, Traced().trace(net))
    x = torch.randn(2, 3, 9, 9)
    want = net(x)
    gather(graph)
    segments = [m for m in graph.modules() if isinstance(m, Segment)]
    inside = [[str(n.target) for n in s.graph.graph.nodes if n.op == "call_module"] for s in segments]
    assert sorted(inside) == [["one", "two", "add"], ["three", "mean", "flat", "fc"]]
    outside = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    assert {"alone", "dense"} <= set(outside)  # by themselves they gain nothing
    for got, expected in zip(graph(x), want, strict=True):
        assert error(got, expected) < 1e-5


def test_a_segment_that_would_wait_for_itself_is_two() -> None:
    """one → softmax → cat, one → cat: one and cat are not one segment, since softmax is between them."""

    class Round(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.cat = conv(3, 8), conv(16, 8), Concat()

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return self.two(self.cat(y, torch.softmax(y, 1)))

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return not isinstance(m, Round)

    net, x = Round(), torch.randn(2, 3, 9, 9)
    graph = GraphModule(net, Leaves().trace(net))
    gather(graph)
    assert sum(isinstance(m, Segment) for m in graph.modules()) == 2
    assert error(graph(x), net(x)) < 1e-5


def test_which_inputs_are_tokens_is_told_by_what_happens_to_them() -> None:
    linear, image = Layer(torch.ones(4, 4)), conv(4, 4)
    assert chain(linear)._tokens == [True]
    assert chain(linear, n_inputs=2)._tokens == [True, True]
    assert chain(Add(), Add(), linear, n_inputs=2)._tokens == [True, True]
    assert chain(linear, Add())._tokens == [True]
    assert chain(image, n_inputs=2)._tokens == [False, False]
    assert chain(image, Mean(False), linear)._tokens == [False]
    assert chain(Mean(False), Add())._tokens == [False]
    assert chain(Concat(), n_inputs=3)._tokens == [False] * 3
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_module("add", (graph.call_module("mean", (x,)), y)))
    segment = Segment(GraphModule({"mean": Mean(False), "add": Add()}, graph))
    assert segment._tokens == [False, True]  # what is added to a mean without pixels has none either
    check(segment, torch.randn(3, 4, 5, 5), torch.randn(3, 4))


def test_a_graph_of_none_of_the_engines_operators_is_as_it_was() -> None:
    net = symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    x = torch.randn(1, 3, 8, 8)
    before = net(x)
    gather(net)
    assert not any(isinstance(m, Segment) for m in net.modules())
    assert torch.equal(net(x), before)
