"""Processes that train together, each with data of its own, choose the same masks and keep the same weights."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from gossamer import CRITERIA, SparseTraining, Sparsifier
from gossamer.methods import METHODS, SET, RigL
from gossamer.reconstruction import sparsegpt

RANKS = 2
FAST = {**METHODS, "rigl": RigL(every_n_steps=2, end_pct=0.8), "set": SET(every_n_steps=2)}

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="PyTorch is built without gloo"
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 1, 6, 6, generator=generator), torch.randint(0, 10, (6,), generator=generator)


def sparsifier(model: nn.Module, rank: int, **rules) -> Sparsifier:
    data = [batch(rank, 1000), batch(rank, 1001)]
    return Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear), data=data, loss_func=nn.CrossEntropyLoss(), **rules)


def one_shot(rank: int, name: str) -> nn.Module:
    model = network()
    if name == "sparsegpt":
        sparsegpt(sparsifier(model, rank), 50)
    else:
        sparsifier(model, rank, criteria=name, context="global").sparsify_model(50)
    return model


def trained(rank: int, name: str) -> nn.Module:
    """As a user's loop does it, with a criterion of data where the method takes one."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criteria = "taylor" if name in ("gradual", "acdc", "dsd") else "magnitude"
    run = SparseTraining(sparsifier(model, rank, criteria=criteria), optimizer, 70, None, 8, method=FAST[name])
    for step in range(8):
        optimizer.zero_grad()
        x, y = batch(rank, step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        run.step()
    return model


def agreed(model: nn.Module, rank: int) -> tuple[bool, int]:
    """Whether all processes have the same weights, and how many of them are zero."""
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    others = [torch.empty_like(weights) for _ in range(RANKS)]
    distributed.all_gather(others, weights)
    return all(torch.equal(weights, other) for other in others), int((weights == 0).sum())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=120)
    )
    found: dict[str, tuple[bool, int]] = {}
    make: list[tuple[Callable[[int, str], nn.Module], str]] = [(one_shot, name) for name in [*CRITERIA, "sparsegpt"]]
    make += [(trained, name) for name in METHODS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for how, name in make:
            found[name] = agreed(how(rank, name), rank)
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, tuple[bool, int]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return json.loads((folder / "found").read_text())


@pytest.mark.parametrize("name", [*CRITERIA, "sparsegpt", *METHODS])
def test_every_process_has_the_same_weights_and_zeros(name, found):
    same, zeros = found[name]
    assert same
    assert zeros > 0 or name == "dsd"  # which ends dense


def test_the_data_of_the_processes_differs():
    assert not torch.equal(batch(0, 1000)[0], batch(1, 1000)[0])
