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

import gossamer
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
