"""The command: what it prints, what it leaves, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import gossamer
from gossamer import runtime
from gossamer.cli import main
from gossamer.demo import layer_targets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = load_digits()
    for i in range(24):
        path = tmp_path / "images" / str(data.target[i] % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15).astype(np.uint8)).convert("RGB").save(path)
    return tmp_path / "images"


def test_the_demo_trains_three_times_on_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--data", str(folder), "--epochs", "1", "--sparsity", "60", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    dense, uniform, per_layer = json.loads((out / "demo.json").read_text())
    assert dense["sparsity"] == 0
    assert uniform["sparsity"] == pytest.approx(60, abs=0.01)
    assert 60 < per_layer["sparsity"] < 90
    assert dense["nonzero"] > uniform["nonzero"] > per_layer["nonzero"]
    assert "Pruning of weight until a sparsity of 60%" in printed
    assert "Final Sparsity: 60.00%" in printed
    assert printed.count("Sparsity Report:") == 2
    assert f"Saved {out / 'demo.png'}" in printed
    payments = printed.split("What it pays, on this machine")[1].splitlines()[4:7]
    assert [line.split()[0] for line in payments] == ["dense", "60", "per"]
    assert [row["engine"] for row in (dense, uniform, per_layer)] == ["PyTorch", "Gossamer", "Gossamer"]
    assert dense["file_bytes"] > uniform["file_bytes"] > per_layer["file_bytes"]
    for row, line in zip((dense, uniform, per_layer), payments, strict=True):
        assert (out / row["file"]).stat().st_size == row["file_bytes"]
        assert set(row["ms_an_image"]) == {"64", "224"}
        assert f"{row['accuracy']:.2%}" in line  # what the engine computes is what fastai computed
    weights = gossamer.load(out / uniform["file"])
    assert sum(int((w == 0).sum()) for n, w in weights.items() if w.ndim == 4) == round(uniform["sparsity"] * 111669.12)
    with Image.open(out / "demo.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "neither mnist nor pets nor a folder"),
        (["--sparsity", "150"], "outside [0, 100]"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("gossamer: ")
    assert error.count("\n") == 1


def test_a_folder_without_classes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "one folder of images for each class" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("arguments", [["demo", "--epochs", "0"], [], ["nothing"]])
def test_bad_usage_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: gossamer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--rounds", "x", "n"], "--rounds: 'x' is no whole number; give one such as 5"),
        (["bench", "--threads", "1.5", "n"], "--threads: '1.5' is no whole number"),
        (["bench", "--rounds", "0", "n"], "--rounds: 0 is less than 1; give a whole number from 1 on"),
        (["demo", "--epochs", "x"], "--epochs: 'x' is no whole number"),
        (["demo", "--seed", "x"], "--seed: 'x' is no whole number"),
        (["demo", "--sparsity", "half"], "--sparsity: 'half' is no number; give a percentage from 0 to 100"),
    ],
)
def test_options_say_what_they_take(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def test_help_and_version_need_no_fastai() -> None:
    code = (
        "import sys; from gossamer.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert 'fastai' not in sys.modules"
    )
    for argument in ("--version", "--help"):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (gossamer.__version__ in done.stdout) or ("demo" in done.stdout)


def test_targets_spread_around_the_sparsity() -> None:
    assert list(layer_targets(50).values()) == [30, 50, 70, 80]
    assert list(layer_targets(95).values()) == [75, 95, 99, 99]
    assert list(layer_targets(0).values()) == [0, 0, 20, 30]


def test_size_prints_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = gossamer.save({"w": torch.eye(64)}, tmp_path / "w.safetensors")
    assert main(["size", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:4] == ["w", "64×64", "gaps", "98.44%"]
    assert main(["size", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"][0]["zeros"] == 4032
    assert main(["size", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("gossamer: there is no file")


PROGRAM = """
import torch
from torch import nn
from gossamer import Sparsifier

def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()).eval()
    Sparsifier(net).sparsify_model(80)
    return net, torch.randn(1, 3, 10, 10)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cli_networks.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_networks", raising=False)
    return tmp_path


def test_bench_prints_a_table_and_draws_it(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "cli_networks:network", "--engines", "onnxruntime", "--threads", "1", "--rounds", "1"]
    assert main([*words, "--plot", "bench.png"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[1].startswith("cli_networks:network: float32 1×3×10×10; 1 thread; 80.05 % zeros; ")
    assert [line.split()[0] for line in lines[6:9]] == ["eager", "onnxruntime", "gossamer"]
    assert "preparing onnxruntime" in printed.err
    with Image.open(program / "bench.png") as picture:
        assert picture.size[0] > 500


def test_bench_as_json_is_json_alone(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "cli_networks:network", "--engines", "eager", "--int8", "--rounds", "2", "--shape", "2,3,12,12"]
    assert main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [e["engine"] for e in values["engines"]] == ["eager", "onnxruntime int8", "openvino int8", "gossamer"]
    assert values["inputs"] == ["float32 2×3×12×12"]
    assert len(values["engines"][1]["seconds"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "nowhere.gossamer"], "no file that is there, and not of the form module:factory"),
        (["bench", "cli_networks:network", "--engines", "onnx"], "Closest: onnxruntime"),
        (["bench", "cli_networks:network", "--plot", "bench.xyz"], "no picture ends so"),
        (["bench", "cli_networks:network", "--plot", "nowhere/bench.png"], "there is no folder 'nowhere'"),
        (["export", "cli_networks:network", "--onnx", "nowhere/net.onnx"], "no place for a file"),
        (["export", "torch.nn:ReLU", "--onnx", "net.onnx"], "say what goes in with --shape"),
    ],
)
def test_bench_and_export_say_what_is_wrong(
    words: list[str], said: str, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.splitlines()[-1].startswith("gossamer: ")


def test_export_writes_onnx_and_says_how_far_it_is_off(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--onnx", "net.onnx", "cli_networks:network"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"Wrote net.onnx: {(program / 'net.onnx').stat().st_size:,} bytes, for any batch size"
    assert second.startswith("onnxruntime's outputs differ from PyTorch's by at most ")


def test_bench_and_export_take_a_compiled_networks_file(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    gossamer.Sparsifier(net).sparsify_model(80)
    runtime.compile(net, torch.randn(1, 3, 10, 10)).save("net.gossamer")
    assert main(["bench", "net.gossamer", "--engines", "onnxruntime", "--rounds", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["sparse_bytes"] == (program / "net.gossamer").stat().st_size
    assert all(e["difference"] < 1e-5 for e in values["engines"])
    assert main(["export", "net.gossamer", "--onnx", "net.onnx"]) == 0
    assert "differ from PyTorch's by at most" in capsys.readouterr().out
