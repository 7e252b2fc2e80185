"""What ResNet-18 takes on disk at each sparsity, and how fast it comes back: Gossamer's file beside torch.save.

Sizes are of the convolutions' weights, in percent of dense float32, header and all. Loading is timed on the whole
network, the file in the page cache, all ways in every round. `torch.save` writes zeros like any number; zip compresses
that file, which is what one would do without a sparse format; sparse_csr is PyTorch's own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import resnet18

from common import alternating, header, median_ratio, quartiles, table
from gossamer import Sparsifier, load, save

PROMISED = {80: 23.1, 90: 12.5, 95: 6.3, 98: 2.5}  # percent of dense float32, at most


def convolutions(sparsity: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The convolutions' weights, and the whole state."""
    torch.manual_seed(0)
    model = resnet18()
    Sparsifier(model).sparsify_model(sparsity)
    state = model.state_dict()
    return {k: v for k, v in state.items() if v.ndim == 4}, state


def zipped(tensors: dict[str, Tensor], folder: Path) -> int:
    torch.save(tensors, folder / "a.pt")
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "a.pt")
    return (folder / "a.zip").stat().st_size


def csr(tensors: dict[str, Tensor], folder: Path) -> int:
    torch.save({k: v.flatten(1).to_sparse_csr() for k, v in tensors.items()}, folder / "csr.pt")
    return (folder / "csr.pt").stat().st_size


def sizes(folder: Path) -> list[list[str]]:
    rows: list[list[str]] = []
    for sparsity, promised in PROMISED.items():
        tensors, _ = convolutions(sparsity)
        dense = sum(t.nbytes for t in tensors.values())
        got = [save(tensors, folder / "a", values=v).stat().st_size for v in (None, "fp16")]
        assert all(torch.equal(a, tensors[k]) for k, a in load(save(tensors, folder / "a")).items())
        torch.save(tensors, folder / "dense.pt")
        got += [(folder / "dense.pt").stat().st_size, zipped(tensors, folder), csr(tensors, folder)]
        shares = [100 * n / dense for n in got]
        verdict = "met" if round(shares[0], 1) <= promised else "MISSED"
        rows.append([f"{sparsity} %", *(f"{s:.2f} %" for s in shares), f"{promised} %", verdict])
    return rows


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return run


def loading(folder: Path, rounds: int) -> list[list[str]]:
    rows: list[list[str]] = []
    for sparsity in PROMISED:
        _, state = convolutions(sparsity)
        ours, theirs, plain = folder / "m.safetensors", folder / "m.pt", folder / "dense.safetensors"
        save(state, ours)
        torch.save(state, theirs)
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, plain)
        jobs = {
            "gossamer": timed(lambda ours=ours: load(ours)),
            "torch.load": timed(lambda theirs=theirs: torch.load(theirs)),
            "read": timed(lambda ours=ours: ours.read_bytes()),
            # Copied, since what is mapped has not been read yet.
            "safetensors": timed(
                lambda plain=plain: {k: v.clone() for k, v in safetensors.torch.load_file(plain).items()}
            ),
        }
        took = alternating(rounds, jobs, warmup=2)
        ratio = median_ratio(took["gossamer"], took["torch.load"])
        low, high = quartiles([a / b for a, b in zip(took["gossamer"], took["torch.load"], strict=True)])
        rate = sum(t.nbytes for t in state.values()) / statistics.median(took["gossamer"]) / 1e9
        rows.append(
            [
                f"{sparsity} %",
                f"{os.path.getsize(ours) / os.path.getsize(theirs):.3f}",
                f"{ratio:.2f}",
                f"{low:.2f}..{high:.2f}",
                f"{median_ratio(took['gossamer'], took['safetensors']):.2f}",
                f"{rate:.1f}",
            ]
        )
    return rows


def main() -> None:
    warnings.filterwarnings("ignore", message="Sparse CSR")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    torch.set_num_threads(1)
    header("Files", "safetensors", "torchvision", peer=False)
    with tempfile.TemporaryDirectory() as folder:
        print("ResNet-18's convolutions on disk, in percent of dense float32:\n")
        names = ("sparsity", "gossamer", "fp16 values", "torch.save", "zip of that", "sparse_csr", "at most", "")
        print(table(names, sizes(Path(folder))), flush=True)
        print("\nLoading the whole network, from the page cache, one thread:\n")
        names = ("sparsity", "file / torch's", "time / torch.load", "quartiles", "time / safetensors", "dense GB/s")
        print(table(names, loading(Path(folder), given.rounds)))


if __name__ == "__main__":
    main()
