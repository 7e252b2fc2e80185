"""Kill a fit with SIGKILL in the middle of epochs, resume it in new processes, and compare with one never stopped.

Compared bit by bit, out of two processes that share nothing but their seed: weights, masks, the optimizer's state, what
the recorder holds, and the lines that were printed. The network trains on scikit-learn's digits, on one CPU thread.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import Learner  # from here, it has fine_tune
from fastai.callback.tracker import ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastcore.foundation import L
from sklearn.datasets import load_digits
from torch import nn

from gossamer.integrations.fastai import PruneCallback, SparsifyCallback
from gossamer.rules.schedules import iterative

KINDS = ("plain", "adamw", "one_cycle", "fine_tune", "lottery", "change", "busy", "prune", "prune_data", "prune_tune")


class Noise:
    """A data set that draws random numbers, as augmentation does."""

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.pairs[i]
        return x + 0.1 * torch.randn_like(x) + 0.05 * random.random() + 0.05 * float(np.random.rand()), y


class KillAt(Callback):
    """Kills the process after so many batches, as a power cut would."""

    order = 1000
    run_valid = False

    def __init__(self, batch: int) -> None:
        self.left = itertools.count(batch - 1, -1)  # a number would be taken for progress, and go on with the rest

    def after_batch(self) -> None:
        if next(self.left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def recorded() -> Iterator[io.StringIO]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        yield text


def train(kind: str, folder: Path, kill_at: int, epochs: int) -> None:
    """One process: trains, or goes on training, and prints digests of all that it ends with."""
    torch.set_num_threads(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    pairs = list(zip(x, torch.tensor(data.target), strict=True))
    dls = DataLoaders.from_dsets(Noise(pairs[:320]), pairs[320:420], bs=32, num_workers=0, device="cpu")
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10)),
    )
    options: dict[str, Any] = {}
    if kind in ("adamw", "prune_tune"):
        options["opt_func"] = lambda params, **kwargs: OptimWrapper(params, torch.optim.AdamW)
    if kind in ("fine_tune", "one_cycle", "prune_tune"):
        options["splitter"] = lambda model: [list(part.parameters()) for part in model]
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=folder, **options)
    rules: dict[str, Any] = {"sparsity": 80}
    if kind == "lottery":
        rules |= {"lth": True, "rewind_epoch": 1, "schedule": iterative.between(0.3, 0.9), "save_tickets": True}
    if kind == "change":
        rules |= {"criteria": "updating_movmag", "context": "global"}
    if kind == "adamw":
        rules |= {"granularity": "filter", "schedule": "cos"}
    file: dict[str, Any] = {"checkpoint": folder / "run.safetensors", "resume": True}
    if kind.startswith("prune"):
        rules = {"sparsity": 50, "schedule": "agp"}
        if kind == "prune_data":  # batches are drawn anew whenever filters go
            rules |= {"context": "global", "criteria": "taylor", "data": 2}
        if kind == "prune_tune":
            rules |= {"criteria": "movmag"}
    sparse = (PruneCallback if kind.startswith("prune") else SparsifyCallback)(**rules, **file)
    callbacks: list[Callback] = [sparse]
    if kill_at:
        callbacks.append(KillAt(kill_at))
    if kind == "busy":
        callbacks += [MixUp(), GradientAccumulation(80), ReduceLROnPlateau(patience=0), SaveModelCallback("accuracy")]
    with recorded() as text, learn.no_bar():
        learn.logger = lambda row: print([round(v, 6) if isinstance(v, float) else v for v in list(row)[:-1]])
        if kind in ("fine_tune", "prune_tune"):
            learn.fine_tune(epochs - 2, freeze_epochs=2, cbs=callbacks)
        elif kind == "one_cycle":
            learn.fit_one_cycle(epochs, 1e-2, cbs=callbacks)
        else:
            learn.fit(epochs, 1e-2, cbs=callbacks)
    if isinstance(sparse, PruneCallback):
        masks = sparse.state_dict()["pruner"]["kept"]
    else:
        assert sparse.sparse is not None
        masks = dict(sparse.sparse.sparsifier.masks)
    recorder = learn.recorder
    print("weights", digest(learn.model.state_dict()))
    print("masks", digest(masks))
    print("optimizer", digest(learn.opt.state_dict()))
    print("recorder", digest([[float(v) for v in recorder.losses], list(map(float, recorder.lrs)), recorder.iters]))
    print("values", digest([list(row) for row in recorder.values]))
    print("random", digest([torch.rand(3), np.random.rand(3).tolist(), random.random()]))
    lines = [line for line in text.getvalue().splitlines() if not line.startswith("Going on")]
    (folder / "lines.txt").write_text("\n".join(lines))
    print("sparsity", f"{sparse.sparsity_now():.4f}")


def digest(value: Any) -> str:
    """A hash of tensors and numbers, nested, by their bits."""
    total = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            total.update(str((item.dtype, tuple(item.shape))).encode())
            total.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key, inner in item.items():
                total.update(str(key).encode())
                add(inner)
        elif isinstance(item, (list, tuple, L)):
            for inner in item:
                add(inner)
        else:
            total.update(repr(float(item) if isinstance(item, (int, float, np.generic)) else item).encode())

    add(value)
    return total.hexdigest()[:16]


def child(kind: str, folder: Path, kill_at: int, epochs: int) -> tuple[int, str]:
    command = [sys.executable, __file__, "--child", kind, str(folder), str(kill_at), str(epochs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{kind}: {done.stderr[-3000:]}")
    return done.returncode, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which the process is killed")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, folder, kill_at, epochs = options.child
        train(kind, Path(folder), int(kill_at), int(epochs))
        return
    chance = random.Random(options.seed)
    print("| fit | killed after batches | weights | masks | optimizer | recorder | values | random | printed lines |")
    print("|---|---|---|---|---|---|---|---|---|")
    failed = False
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            _, whole = child(kind, Path(one), 0, options.epochs)
            kills: list[int] = []
            for _ in range(3):
                kills.append(chance.randint(1, 25))
                code, out = child(kind, Path(other), kills[-1], options.epochs)
                if code == 0:
                    break
            else:
                _, out = child(kind, Path(other), 0, options.epochs)
            want, got = (dict(line.split() for line in text.splitlines()) for text in (whole, out))
            lines = [(Path(f) / "lines.txt").read_text().replace(f, "").splitlines() for f in (one, other)]
            # What a process prints after it went on must be how the whole run's output ends; the first line is its own.
            rest = [line for line in lines[1] if not line.startswith(("Pruning of", "Pruning filters"))]
            same = {name: want[name] == got[name] for name in want}
            same["lines"] = bool(rest) and lines[0][-len(rest) :] == rest
            failed |= not all(same.values())
            names = ("weights", "masks", "optimizer", "recorder", "values", "random", "lines")
            marks = " | ".join("same" if same[name] else "DIFFERENT" for name in names)
            print(f"| {kind} | {', '.join(map(str, kills))} | {marks} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
