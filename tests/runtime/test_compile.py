"""Compiled networks give what the networks give, whatever is in them."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from real_networks import error, image, sparse_model
from torch import Tensor, nn
from twins import needs_library

from gossamer import ArgumentError, GossamerWarning, Sparsifier, StateError, runtime, save
from gossamer.runtime import CompiledModel
from gossamer.runtime.layers import Layer
from gossamer.runtime.segment import Segment

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export's own


def test_images_of_other_sizes_and_batches_need_no_new_compilation() -> None:
    model = sparse_model("resnet18", 90)
    fast = runtime.compile(model, image())
    with torch.no_grad():
        for shape in ((1, 3, 64, 64), (5, 3, 64, 64), (2, 3, 96, 80), (1, 3, 33, 47)):
            x = torch.randn(shape)
            assert error(fast(x), model(x)) < 1e-5


def test_a_network_with_fixed_shapes_is_compiled_for_them() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).reshape(1, -1)  # one image only

    model = Fixed().eval()
    fast = runtime.compile(model, image(8))
    with torch.no_grad():
        for x in (image(8), image(10), image(8), *(image(n) for n in range(11, 17))):
            assert error(fast(x), model(x)) < 1e-5
    assert len(fast._graphs) <= 4


def test_a_capture_for_one_shape_leaves_the_others_to_the_first() -> None:
    model = sparse_model("resnet18", 90)
    fast = runtime.compile(model, image())
    with torch.no_grad():
        for size in (32, 64, 96, 32, 48):
            x = image(size)
            assert error(fast(x), model(x)) < 1e-5
    assert len(fast._graphs) <= 1  # a map of one pixel is another graph, where PyTorch has it so


class Branch(nn.Module):
    """Looks at the numbers, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.two.register_forward_hook(lambda _, __, y: y + 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        if bool(y.mean() > 0):
            y = self.two(y)
        return self.head(y.mean((2, 3)))


def test_a_network_that_no_graph_can_be_made_of_runs_layer_by_layer() -> None:
    torch.manual_seed(0)
    model = Branch().eval()
    Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(80)
    with pytest.warns(GossamerWarning, match="cannot be captured.*its layers run one by one"):
        fast = runtime.compile(model, image(8))
    with torch.no_grad():
        for x in (image(8) + 5, image(9) - 5):
            assert error(fast(x), model(x)) < 1e-5
    assert [row.name for row in fast.explain()] == ["one", "head"]  # the other one has a hook


def test_what_follows_a_layer_runs_with_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.norm, self.act = nn.BatchNorm2d(8), nn.SiLU()
            self.three, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = (self.norm(self.one(x)) + x).relu()  # residual, then activation
            y = x + self.act(self.two(y))  # activation, then residual
            y = y + 1  # no residual: of another shape
            y = self.three(y) * y.sigmoid().mean()
            return nn.functional.gelu(self.fc(y.mean((2, 3))))

    model = Block().eval()
    fast = runtime.compile(model, torch.randn(2, 8, 9, 9))
    ops = [row.op for row in fast.explain() if row.op.startswith(("conv2d", "linear"))]
    assert ops == ["conv2d + relu", "conv2d + silu", "conv2d", "linear + gelu"]
    convs = [m for m in fast.modules() if isinstance(m, Layer)]
    assert [c.add_last for c in convs[:2]] == [False, True]
    x = torch.randn(3, 8, 9, 9)
    with torch.no_grad():
        assert error(fast(x), model(x)) < 1e-5


def test_a_result_that_two_want_is_not_taken_into_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y, y.relu()

    model = Two().eval()
    with torch.no_grad():
        for got, want in zip(runtime.compile(model, image(8))(image(8)), model(image(8)), strict=True):
            assert got.shape == want.shape
        x = image(8)
        for got, want in zip(runtime.compile(model, x)(x), model(x), strict=True):
            assert error(got, want) < 1e-5


def test_one_layer_used_twice_and_several_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
            return {"a": self.conv(self.conv(x)) * scale, "b": self.conv(y)}

    model = Twice().eval()
    x, y = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 6, 6)
    fast = runtime.compile(model, (x, y))
    with torch.no_grad():
        got, want = fast(x, y), model(x, y)
    assert all(error(got[k], want[k]) < 1e-5 for k in want)


def test_threads_of_the_program_can_share_a_network() -> None:
    model = sparse_model("resnet18", 90)
    fast = runtime.compile(model, image(32))
    inputs = [torch.randn(i + 1, 3, 32, 32) for i in range(3)]
    with torch.no_grad():
        wants = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(15) if error(fast(inputs[i]), wants[i]) > 1e-5)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_plan_says_what_runs_where_and_how_long_it_takes() -> None:
    fast = runtime.compile(sparse_model("resnet18", 90), image())
    rows = fast.explain(image())
    assert sum(row.share for row in rows) == pytest.approx(100, abs=0.01)
    assert rows[0].name == "gossamer_conv1"
    assert rows[0].op == "conv2d + relu"
    assert rows[0].sparsity == pytest.approx(90, abs=0.1)
    text = str(fast)
    assert "gossamer_layer4_1_conv2" in text
    assert "sparse" in text


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (3, "compile takes a torch.nn.Module, got a int"),
        (nn.Conv2d(3, 4, 3), r"in training mode; compile\(model.eval\(\)"),
        (nn.Conv2d(3, 4, 3, device="meta").eval(), "the network is on meta"),
        (CompiledModel.__new__(CompiledModel), "compiled already"),
        (nn.Conv2d(5, 4, 3).eval(), "does not run on the example inputs"),
    ],
)
def test_what_cannot_be_compiled_is_named(model: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        runtime.compile(model, image(8))


def test_a_compiled_network_is_not_trained() -> None:
    fast = runtime.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).eval(), image(8))
    assert fast.eval() is fast
    with pytest.raises(StateError, match="cannot be trained"):
        fast.train()
    with pytest.raises(StateError, match="cannot be pickled"):
        pickle.dumps(fast)
    with pytest.raises(ArgumentError, match="no weights of its own to save"):
        save(fast, "nowhere")
    x = image(8)
    assert torch.equal(fast(x), fast(x))
    assert not fast(x.requires_grad_()).requires_grad


def test_layers_run_dense_where_little_is_zero() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, groups=16)).eval()
    Sparsifier(net).sparsify_model({"0": 15, "1": 80, "2": 20})
    fast = runtime.compile(net, torch.randn(1, 16, 12, 12))
    assert [row.runs for row in fast.explain()] == ["dense", "sparse", "compiled"]


@needs_library
@pytest.mark.parametrize("between", [False, True])
def test_between_operators_of_pytorchs_a_network_runs_on_its_threads(between: bool, tmp_path: Path) -> None:
    middle = [nn.Softmax(-1)] if between else []
    net = nn.Sequential(nn.Linear(256, 256), *middle, nn.Linear(256, 256)).eval()
    Sparsifier(net, layer_type=nn.Linear).sparsify_model(90)
    fast = runtime.compile(net, torch.randn(64, 256))
    for network in (fast, runtime.load(fast.save(tmp_path / "net.gossamer"))):
        segments = [m for m in network.modules() if isinstance(m, Segment)]
        assert len(segments) == 1 + between
        assert [s.team for s in segments] == [between] * len(segments)
