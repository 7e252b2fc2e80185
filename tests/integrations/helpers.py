"""A small network, real digits and a quiet learner. Gossamer is not imported here: what is saved must load without."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import Learner
from fastai.metrics import accuracy
from sklearn.datasets import load_digits
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 20, 3)
        self.head = nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.head(self.conv3(x).relu().mean((2, 3)))


@lru_cache
def _data() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def image(i: int) -> torch.Tensor:
    return _data()[0][i]


def label(i: int) -> torch.Tensor:
    return _data()[1][i]


def digits(train: int = 112, bs: int = 16, valid: int = 40) -> DataLoaders:
    pairs = list(zip(*_data(), strict=True))
    return DataLoaders.from_dsets(pairs[:train], pairs[-valid:], bs=bs, num_workers=0, device="cpu")


def fastai_digits(train: int = 16, bs: int = 8) -> DataLoaders:
    """The digits as fastai's own data sets, which an export can empty."""
    splits = list(range(train)), list(range(train, train + 8))
    sets = Datasets(list(range(train + 8)), [[image], [label]], splits=splits)
    return sets.dataloaders(bs=bs, num_workers=0, device="cpu")


def say_nothing(*_: Any) -> None: ...


def learner(tmp_path: Path | None = None, dls: DataLoaders | None = None, **kwargs: Any) -> Learner:
    torch.manual_seed(3)
    kwargs.setdefault("metrics", accuracy)
    kwargs.setdefault("loss_func", nn.CrossEntropyLoss())
    learn = Learner(dls or digits(), Net(), path=tmp_path or Path("."), **kwargs)
    learn.logger = say_nothing
    return learn


def quiet(learn: Learner, epochs: int, *callbacks: Callback) -> None:
    with learn.no_bar():
        learn.fit(epochs, 1e-2, cbs=list(callbacks))


class Watch(Callback):
    """Looks at the network right after every step, as the last of all callbacks to be called."""

    order = 1000

    def __init__(self, look: Callable[[Learner], None], event: str = "after_step") -> None:
        self.look = look
        setattr(self, event, self._look)

    def _look(self) -> None:
        self.look(self.learn)

    def __reduce__(self) -> tuple[Any, ...]:
        return Callback, ()  # the test's own, and no part of what a user's learner would write or copy
