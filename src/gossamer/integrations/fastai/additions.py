"""What is on the learner during a fit, beside the callback itself? All of it leaves with the fit."""

from __future__ import annotations

from collections.abc import Callable as Function
from functools import partial
from typing import Any

from fastai.callback.core import Callback
from fastai.learner import Learner

from gossamer.integrations.fastai.checkpoint import Resume
from gossamer.integrations.fastai.followers import Announcer, SparsityMetric, StepWatch
from gossamer.integrations.fastai.guard import Guard


class Additions:
    """What a callback puts on the learner: a guard while it is there itself, the announcer and the column for a fit.

    Args:
        owner: the callback.
    """

    def __init__(self, owner: Callback) -> None:
        self._owner = owner
        self._guard: Guard | None = None

    def guard(self, learn: Learner, on_break: Function[[Learner], None]) -> None:
        """Puts a guard there, unless one is.

        Args:
            learn: on which the callback is now.
            on_break: called with the learner when something is raised inside a fit.
        """
        if self._guard is None:
            self._guard = Guard(learn, partial(on_break, learn))

    def unguard(self) -> None:
        """Takes it away; a second time does no harm."""
        if self._guard is not None:
            self._guard.leave()
            self._guard = None

    def attach(
        self,
        learn: Learner,
        after_epoch: Function[[], None],
        after_fit: Function[[], None],
        count: Function[[], float] | None,
        before_step: Function[[], None] | None = None,
    ) -> None:
        """Puts the others there.

        Args:
            learn: in its `before_fit`.
            after_epoch: as in `Announcer`.
            after_fit: as in `Announcer`.
            count: as in `SparsityMetric`; None for no column.
            before_step: as in `StepWatch`; None where nobody looks at gradients.
        """
        learn.add_cb(Announcer(self._owner, after_epoch, after_fit))
        if before_step is not None:
            learn.add_cb(StepWatch(self._owner, before_step))
        if count is not None:
            learn.metrics = [*learn.metrics, SparsityMetric(count)]

    def leave(self, learn: Learner, count: Function[[], float]) -> None:
        """Takes those away, and whatever else is there for the owner's fit; a second time does no harm."""
        learn.metrics = learn.metrics.filter(lambda m: not isinstance(m, SparsityMetric) or m.count != count)
        ours = [c for c in learn.cbs if getattr(c, "owner", None) is self._owner]
        for resume in (c for c in ours if isinstance(c, Resume)):
            resume.leave()
        learn.remove_cbs(ours)

    # In a copied learner: the copy is not in a fit.
    def __deepcopy__(self, memo: dict[int, Any]) -> Additions:
        return Additions(memo.get(id(self._owner), self._owner))
