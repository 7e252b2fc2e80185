"""A compiled network in the hands of PyTorch's own compilers: each takes it, or says what to do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_networks import error, image
from torch import nn
from torch.export import Dim

from gossamer import Sparsifier, StateError, runtime
from gossamer.native import native
from gossamer.runtime import CompiledModel

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(sparsity: float, norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32) if norm else nn.Identity(), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)),
    )
    Sparsifier(net, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(sparsity)
    return net.eval()


NETWORKS: list[tuple[str, Callable[[], nn.Module]]] = [
    ("sparse", lambda: small(90)),
    ("dense", lambda: small(0)),
    ("as it is", lambda: small(0, norm=False)),
]


@pytest.mark.parametrize("make", [make for _, make in NETWORKS], ids=[name for name, _ in NETWORKS])
@pytest.mark.parametrize("is_loaded", [False, True], ids=["compiled", "loaded"])
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_takes_it(make: Callable[[], nn.Module], is_loaded: bool, strict: bool, tmp_path: Path) -> None:
    net, x = make(), torch.randn(2, 3, 24, 24)
    fast = runtime.compile(net, x)
    fast = runtime.load(fast.save(tmp_path / "net.gossamer")) if is_loaded else fast
    for again in (False, True):  # and after a call of these shapes, too
        program = torch.export.export(
            fast, (x,), dynamic_shapes=(({0: Dim.AUTO, 2: Dim.AUTO},),), strict=strict
        ).module()
        more = torch.randn(5, 3, 32, 24)
        with torch.no_grad():
            assert error(program(x), net(x)) < 1e-5
            assert error(program(more), net(more)) < 1e-5, again
            assert error(fast(x), net(x)) < 1e-5


def of_pytorch(fast: CompiledModel, **settings: Any) -> Any:
    return torch.compile(fast, **({"backend": "aot_eager"} | settings))


@pytest.mark.parametrize("make", [make for _, make in NETWORKS], ids=[name for name, _ in NETWORKS])
def test_torch_compile_takes_it(make: Callable[[], nn.Module]) -> None:
    net, x = make(), image(24)
    fast = runtime.compile(net, x)
    with torch.no_grad():
        for compiled in (of_pytorch(fast), of_pytorch(nn.Sequential(nn.Identity(), fast)), of_pytorch(fast)):
            for inputs in (x, x, torch.randn(3, 3, 32, 24)):
                assert error(compiled(inputs), net(inputs)) < 1e-5


@pytest.mark.parametrize("make", [make for _, make in NETWORKS[1:]], ids=[name for name, _ in NETWORKS[1:]])
def test_without_sparse_layers_it_is_one_graph(make: Callable[[], nn.Module]) -> None:
    net, x = make(), image(24)
    fast = runtime.compile(net, x)
    with torch.no_grad():
        for _ in range(2):  # and after a call of these shapes, too
            assert error(of_pytorch(fast, fullgraph=True)(x), net(x)) < 1e-5
            torch._dynamo.reset()
            fast(x)


@pytest.mark.skipif(native() is None, reason="without the library a network has no segments of its own")
def test_one_graph_of_a_sparse_network_names_the_way() -> None:
    fast = runtime.compile(small(90), image(24))
    with pytest.raises(Exception, match=r'runs in its own engine; leave fullgraph=True out.*backend="gossamer"'):
        of_pytorch(fast, fullgraph=True)(image(24))


def test_a_trace_takes_it() -> None:
    net = small(90)
    fast, more = runtime.compile(net, image(24)), torch.randn(3, 3, 32, 24)
    fast(image(24))
    with torch.no_grad():
        assert error(torch.jit.trace(fast, image(24))(more), net(more)) < 1e-5


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_names_the_way(way: Callable[[Any], Any]) -> None:
    fast = runtime.compile(small(90), image(24))
    with pytest.raises(StateError, match="cannot be pickled or copied; save it with its save, and load that"):
        way(fast)
