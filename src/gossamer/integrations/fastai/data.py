"""Data for criteria that look at gradients or activations: a few batches of the learner's own, or the user's."""

from __future__ import annotations

from collections.abc import Callable as Function
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

from fastai.learner import Learner
from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.errors import ArgumentError
from gossamer.integrations.fastai.checkpoint import loader_state, restore_loader
from gossamer.randomness import random_state, restore_random_state
from gossamer.targets import unwrapped

BATCHES = 4
"""How many batches of the training data are looked at, unless the user says."""


class TrainingBatches:
    """The first batches of a pass over the training data, drawn anew each time, and no random number is used up.

    Args:
        learner: gives the learner.
        n: how many batches.
    """

    def __init__(self, learner: Function[[], Learner], n: int) -> None:
        self._learner, self._n = learner, n

    def __iter__(self) -> Iterator[Any]:
        learn = self._learner()
        loader: Any = learn.dls.train
        before, own = random_state(), loader_state(loader)
        try:
            # A loader of its own, since the other may be in the middle of an epoch; in this process.
            other = loader.new(num_workers=0) if hasattr(loader, "new") else loader
            for batch in islice(iter(other), self._n):
                parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
                n_inputs = getattr(learn.dls, "n_inp", 1 if len(parts) == 1 else len(parts) - 1)
                yield (parts[:n_inputs], parts[n_inputs:])
        finally:
            restore_loader(loader, own)
            restore_random_state(before)


def calibration_of(learner: Function[[], Learner], data: Any) -> Calibration:
    """Data for the criteria of a learner's network, with the learner's own loss.

    Args:
        learner: gives the learner.
        data: how many batches of its training data, or batches as `Calibration` takes them.

    Raises:
        ArgumentError: neither.
    """
    network = unwrapped(cast(nn.Module, learner().model))

    def loss_func(output: Any, target: Any) -> Tensor:
        targets = target if isinstance(target, (tuple, list)) else (target,)
        return learner().loss_func(output, *targets)

    if isinstance(data, Calibration):
        return data
    return Calibration(network, TrainingBatches(learner, data) if isinstance(data, int) else data, loss_func)


def as_data(data: Any) -> Any:
    """Makes sure that a number of batches is one; everything else waits for the network.

    Raises:
        ArgumentError: it is not.

    Example:
        >>> as_data(8)
        8
    """
    if isinstance(data, bool) or data is None or (isinstance(data, int) and data < 1):
        raise ArgumentError(
            f"data={data!r} is neither a number of batches nor batches; by default it is {BATCHES}, of the training set"
        )
    return data
