"""ONNX: the same outputs in onnxruntime, zeros that are still zeros, and a file whole or not at all."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from gossamer import ArgumentError, Sparsifier, StateError, export, runtime
from gossamer.export import export_onnx
from gossamer.outputs import difference


def small() -> nn.Module:
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 5),
    )
    Sparsifier(net, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(90)
    return net.eval()


class Two(nn.Module):
    """Two inputs, one of them of whole numbers, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(10, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.words(ids) + x
        return found, self.linear(found)


def test_onnxruntime_computes_the_same_at_any_batch_size(tmp_path: Path) -> None:
    net = small()
    done = export_onnx(net, torch.randn(1, 3, 16, 16), tmp_path / "net.onnx")
    assert done.batch
    assert done.difference is not None
    assert done.difference < 1e-5
    assert done.nbytes == done.path.stat().st_size
    session = ort.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            assert difference(session.run(None, {session.get_inputs()[0].name: x.numpy()}), net(x)) < 1e-5
    assert [f.name for f in tmp_path.iterdir()] == ["net.onnx"]


def test_zeros_are_written_as_zeros(tmp_path: Path) -> None:
    path = export_onnx(small(), torch.randn(1, 3, 16, 16), tmp_path / "net.onnx").path
    weights = [numpy_helper.to_array(i) for i in onnx.load(str(path)).graph.initializer if len(i.dims) > 1]
    assert {w.shape: int(np.count_nonzero(w)) for w in weights if w.size > 16} == {(16, 3, 3, 3): 43, (5, 16): 8}


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    done = export_onnx(Two().eval(), (torch.tensor([[1, 2]]), torch.randn(1, 2, 4)), tmp_path / "two.onnx")
    assert done.difference is not None
    assert done.difference < 1e-5


class Named(Two):
    """Arguments that are mostly given by name."""

    def forward(self, ids: Tensor, mask: Tensor | None = None, shift: Tensor | None = None, *, factor: Any = 1) -> Any:
        y = self.linear(self.words(ids)) * factor
        y = y if mask is None else y * mask[..., None]
        return {"y": y if shift is None else y + shift[..., None], "none": None}


class Batch(Two):
    def forward(self, batch: Any, more: Any = None) -> Tensor:
        return self.words(batch["ids"]) * batch["mask"][..., None] + sum(more or [torch.zeros(1)])[..., None]


IDS, MASK = torch.tensor([[1, 2, 3]]), torch.rand(1, 3)


@pytest.mark.parametrize(
    ("net", "examples", "names"),
    [
        (Named(), {"mask": MASK, "ids": IDS}, ["ids", "mask"]),
        (Named(), {"shift": MASK, "ids": IDS}, ["ids", "shift"]),
        (Batch(), ({"ids": IDS, "mask": MASK},), ["batch_ids", "batch_mask"]),
        (Batch(), ({"ids": IDS, "mask": MASK}, [MASK, MASK]), ["batch_ids", "batch_mask", "more_0", "more_1"]),
    ],
)
def test_arguments_by_name_and_tensors_in_dicts(
    net: nn.Module, examples: Any, names: list[str], tmp_path: Path
) -> None:
    done = export_onnx(net.eval(), examples, tmp_path / "net.onnx")
    assert [i.name for i in onnx.load(str(done.path)).graph.input] == names
    assert done.batch
    assert done.difference is not None
    assert done.difference < 1e-5


def test_an_argument_by_name_alone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"Named\.forward takes factor by name alone"):
        export_onnx(Named().eval(), {"ids": IDS, "factor": MASK}, tmp_path / "net.onnx")


def test_a_compiled_network_is_written_as_its_reference(tmp_path: Path) -> None:
    fast = runtime.compile(Named().eval(), {"ids": IDS, "mask": MASK})
    with torch.no_grad():
        assert fast(ids=IDS, mask=MASK)["y"].shape == (1, 3, 4)
    done = export_onnx(fast, (IDS, MASK), tmp_path / "net.onnx")
    assert done.difference is not None
    assert done.difference < 1e-5


def test_large_weights_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_ONE_FILE", 100)
    net = nn.Linear(64, 64).eval()
    done = export_onnx(net, torch.randn(2, 64), tmp_path / "net.onnx")
    files = sorted(f.name for f in tmp_path.iterdir())
    assert files == ["net.onnx", "net.onnx.data"]
    assert done.nbytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    session = ort.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 64)
    assert difference(session.run(None, {session.get_inputs()[0].name: x.numpy()}), net(x).detach()) < 1e-5


def test_nothing_is_written_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("before")
    monkeypatch.setattr(export, "difference", lambda got, want: difference(got, want) + 0.5)
    with pytest.raises(StateError, match="differ from PyTorch's by 5"):
        export_onnx(small(), torch.randn(1, 3, 16, 16), path)
    assert path.read_text() == "before"
    assert [f.name for f in tmp_path.iterdir()] == ["net.onnx"]


def test_a_missing_exporter_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "onnxscript":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ArgumentError, match="writing ONNX needs onnxscript; install with: pip install onnx onnxscript"):
        export_onnx(small(), torch.randn(1, 3, 16, 16), tmp_path / "net.onnx")


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize(
    ("net", "where", "words"),
    [
        (nn.Linear(2, 2).train(), "net.onnx", "training mode"),
        (nn.Linear(2, 2).eval(), "nowhere/net.onnx", "no place for a file"),
        (Branches().eval(), "net.onnx", "cannot be written as ONNX"),
    ],
)
def test_bad_input(net: nn.Module, where: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=words):
        export_onnx(net, torch.randn(1, 2), tmp_path / where)
    assert list(tmp_path.iterdir()) == []


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("got", "want", "off"),
    [
        ([1.0, 4.0], [1.0, 5.0], 0.2),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([NAN, 1.0], [1.0, 1.0], INF),
        ([1.0], [1.0, 1.0], INF),
        ([], [], 0.0),
        ([0.0], [0.0], 0.0),
    ],
)
def test_how_far_outputs_are_off(got: list[float], want: list[float], off: float) -> None:
    answer: Any = {"logits": torch.tensor(want), "none": None}
    assert difference([np.asarray(got, np.float32)], answer) == pytest.approx(off)


class Silent(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class Picky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("too short")


@pytest.mark.parametrize(
    ("net", "error", "words"),
    [
        (Silent(), StateError, "onnxruntime does not read what was exported"),
        (Picky(), ArgumentError, "cannot be written as ONNX: too short"),
    ],
)
def test_what_onnx_cannot_say_is_one_line(net: nn.Module, error: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        export_onnx(net.eval(), torch.ones(2, 3), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
