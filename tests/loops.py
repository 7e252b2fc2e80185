"""A user's training loop, and a run in it, as several tests begin with."""

from __future__ import annotations

import torch
from torch import nn

from gossamer import SparseTraining, Sparsifier

OPTIMIZERS = {
    "SGD, momentum, decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, one tensor at a time": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "RMSprop, momentum": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, *, accumulate: int = 1, autocast: bool = False
) -> None:
    """What a user's loop does between two calls of ours."""
    optimizer.zero_grad()
    for part in range(accumulate):
        x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(100 * seed + part))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().mean() - model(x).float()[:, 0].mean()
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def start(
    optimizer="SGD, momentum, decay",
    sparsity=50,
    schedule="one_cycle",
    steps=6,
    *,
    layer_type=(nn.Conv2d, nn.Linear),
    method=None,
    **rules,
) -> tuple[nn.Module, torch.optim.Optimizer, SparseTraining]:
    model = network()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(9))
    data = {"data": [(x, torch.tensor([0, 1, 2, 3]))], "loss_func": nn.CrossEntropyLoss()}
    sparsifier = Sparsifier(model, layer_type=layer_type, **data, **rules)
    return model, optimizer, SparseTraining(sparsifier, optimizer, sparsity, schedule, steps, method=method)
