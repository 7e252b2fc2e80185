"""What goes with a SparsifyCallback in the learner: the column, and the voice after all others."""

from __future__ import annotations

import copy
from collections.abc import Callable as Function
from functools import partial
from typing import Any

from fastai.callback.core import Callback
from fastai.learner import Learner, Metric, ValueMetric

from gossamer.integrations.fastai.guard import Guard


class Traceless(Callback):
    """A callback of which an exported learner holds nothing, so that it loads where Gossamer is not."""

    makes_sparse = False
    owner: Callback | None = None  # whose fit it belongs to, and ends with

    def __reduce__(self) -> tuple[Any, ...]:
        return Callback, ()

    # copy would go through __reduce__ too; a copied learner is to work on as the first does.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            # The copy is not in a fit.
            twin.__dict__[name] = None if isinstance(value, Guard) else copy.deepcopy(value, memo)
        return twin


def is_sparsifier(cb: Callback) -> bool:
    """Whether a callback is a SparsifyCallback."""
    # On the class: fastai looks up what a callback lacks in the learner, and then in the model.
    return bool(getattr(type(cb), "makes_sparse", False))


class SparsityMetric(Metric):
    """Percent of exact zeros among the weights that take part, as a column of fastai's table.

    Args:
        count: gives the percentage.
    """

    def __init__(self, count: Function[[], float]) -> None:
        self.count = count

    def reset(self) -> None:
        """Nothing to forget: the weights are counted when the value is read."""

    def accumulate(self, learn: Learner) -> None:
        """Nothing to gather."""

    @property
    def value(self) -> float:
        """Percent, as the epoch's printed line has it."""
        return self.count()

    @property
    def name(self) -> str:
        """The column's name."""
        return "sparsity"

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsityMetric:
        return SparsityMetric(copy.deepcopy(self.count, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        # In an exported learner: the number that it was exported with, from fastai's own classes.
        return ValueMetric, (partial(float, self.value), self.name)


class StepWatch(Traceless):
    """Looks at the gradients right before the optimizer's step: unscaled and clipped, and only where there is a step.

    Args:
        owner: the callback that it looks for.
        before_step: called then.
    """

    order = 12  # after mixed precision (10), which cancels a step that overflows, and clipping (11)
    run_valid = False

    def __init__(self, owner: Callback, before_step: Function[[], None]) -> None:
        super().__init__()
        self.owner = owner
        self._before_step = before_step

    def before_step(self) -> None:
        """The gradients are there."""
        self._before_step()


class Announcer(Traceless):
    """Acts once all others have acted: fastai's row is out, a best checkpoint is loaded.

    Args:
        owner: the callback that it speaks for.
        after_epoch: called at the end of each epoch.
        after_fit: called at the end of a fit that was not broken off.
    """

    order = 70
    run_valid = False

    def __init__(self, owner: Callback, after_epoch: Function[[], None], after_fit: Function[[], None]) -> None:
        super().__init__()
        self.owner = owner
        self._after_epoch, self._after_fit = after_epoch, after_fit

    def after_epoch(self) -> None:
        """The epoch's own line."""
        self._after_epoch()

    def after_fit(self) -> None:
        """The fit's last lines."""
        self._after_fit()
