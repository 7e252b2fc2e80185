"""Where zeros are put: targets from each layer's sensitivity, against the same for all, against one global threshold.

A small ResNet is trained dense on Fashion-MNIST. Each layer's sensitivity is measured by the loss on training images
that the training did not see, and turned into a target for each layer. From the same dense weights three runs follow,
alike but for where the zeros go: that dict, the same sparsity everywhere, and a global context. All end with as many
zeros, up to the rounding of single layers, and that is counted. Accuracy is that of the test images.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from accuracy import Batches, Results, Split, fit, load, small_resnet, spread
from common import header, table
from gossamer import sensitivity
from gossamer.integrations.fastai import SparsifyCallback

TRIED = (30, 50, 60, 70, 80, 85, 90, 93, 95, 97, 98, 99)
WAYS = ("sensitivity", "uniform", "global")


def minus_loss(split: Split) -> Any:
    """A score: minus the mean loss over some images."""

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> float:
        model.eval()
        losses = [F.cross_entropy(model(x), y, reduction="sum") for x, y in Batches(split)]
        return -float(sum(losses)) / len(split[1])

    return evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="Fashion-MNIST's four idx .gz files; else MNIST")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[80, 90, 95], metavar="PERCENT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of the dense training")
    parser.add_argument("--fine-tune", type=int, default=3, help="epochs of each sparse training")
    parser.add_argument("--train", type=int, metavar="N", help="training images to use; by default all")
    parser.add_argument("--test", type=int, metavar="N", help="test images to use; by default all")
    parser.add_argument("--held-out", type=int, default=2000, metavar="N", help="of these, for the measurement alone")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep every run, and go on from there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the first seed's heat map")
    options = parser.parse_args()
    header("Where zeros are put", "torch", "fastai", peer=False)
    name, train, test = load(options.data)
    if options.train:
        train = (train[0][: options.train], train[1][: options.train])
    if options.test:
        test = (test[0][: options.test], test[1][: options.test])
    held = (train[0][-options.held_out :], train[1][-options.held_out :])
    train = (train[0][: -options.held_out], train[1][: -options.held_out])
    print(f"- data: {name}; {len(train[1]):,} images to train, {len(held[1]):,} to measure")
    print(
        f"- dense {options.epochs} epochs, then {options.fine_tune} sparse (agp); {options.seeds} seeds\n", flush=True
    )
    settings = {"data": name, "train": len(train[1]), "held": len(held[1])}
    settings |= {"epochs": options.epochs, "fine_tune": options.fine_tune}
    results, start = Results(options.out, settings), time.perf_counter()
    for seed in range(options.seeds):
        keys = [f"{way}/{s:g}/{seed}" for s in options.sparsities for way in WAYS]
        if all(key in results.runs for key in [*keys, f"dense/0/{seed}"]):
            continue
        torch.manual_seed(seed)
        dense = small_resnet()
        score = fit(dense, (train, test), options.epochs, 1e-2, seed)
        results.add(f"dense/0/{seed}", {"accuracy": score, "zeros": 0, "targets": {}})
        began = time.perf_counter()
        found = sensitivity(dense, minus_loss(held), TRIED, progress=False)
        print(f"  dense seed {seed}: {score:.2f} %; measured {len(found.rows)} in {time.perf_counter() - began:.0f} s")
        if options.plot and not seed:
            found.plot().figure.savefig(options.plot, dpi=150)
        for sparsity in options.sparsities:
            targets = found.to_targets(sparsity)
            for way in WAYS:
                key = f"{way}/{sparsity:g}/{seed}"
                if key in results.runs:
                    continue
                model = copy.deepcopy(dense)
                target: Any = targets if way == "sensitivity" else sparsity
                context = "global" if way == "global" else "local"
                cb = SparsifyCallback(target, context=context, schedule="agp", verbose=False, metric=False)
                score = fit(model, (train, test), options.fine_tune, 5e-3, seed, [cb])
                zeros = cb.report().zeros
                results.add(key, {"accuracy": score, "zeros": zeros, "targets": targets})
                print(f"  {key}: {score:.2f} %, {zeros:,} zeros ({time.perf_counter() - start:.0f} s)", flush=True)
    print("\n" + summary(results, options.sparsities, options.seeds))


def summary(results: Results, sparsities: list[float], seeds: int) -> str:
    """A row a way and sparsity; gaps are over the same seeds."""
    rows: list[list[str]] = []
    for sparsity, way in [(0.0, "dense"), *((s, way) for s in sparsities for way in WAYS)]:
        runs = [results.runs[f"{way}/{sparsity:g}/{seed}"] for seed in range(seeds)]
        scores = [r["accuracy"] for r in runs]
        gap = ""
        if sparsity and way != "uniform":
            base = [results.runs[f"uniform/{sparsity:g}/{seed}"]["accuracy"] for seed in range(seeds)]
            gap = f"{statistics.mean(a - b for a, b in zip(scores, base, strict=True)):+.2f}"
        zeros = " / ".join(sorted({f"{r['zeros']:,}" for r in runs}))
        mean = statistics.mean(scores)
        rows.append([way, f"{sparsity:g}", f"{mean:.2f}", f"{spread(scores):.2f}", gap, zeros])
    return table(["zeros put by", "sparsity %", "accuracy %", "std", "- uniform", "zeros"], rows)


if __name__ == "__main__":
    main()
