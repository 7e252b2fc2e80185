"""One schedule over several fits: which epochs of the whole a fit is."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

from fastai.callback.schedule import Learner  # by this its fine_tune is there

from gossamer.errors import ArgumentError


@dataclass(frozen=True)
class Span:
    """Epochs that a schedule covers, and how many of them earlier fits have done.

    Args:
        total: epochs of the whole.
        done: of these, before this fit.

    Example:
        >>> Span(total=6, done=1).position(epochs=2)
        0.5
    """

    total: int
    done: int = 0

    def position(self, epochs: int, batch: int = 0, batches: int = 1) -> float:
        """The fraction of the whole that is done, after so many epochs of this fit and batches of the next one."""
        # Whole numbers first: the last batch of an epoch must give the epoch's end and nothing next to it.
        return ((self.done + epochs) * batches + batch) / (self.total * batches)

    def after(self, epochs: int) -> Span | None:
        """What the next fit is of, or None where the whole is done."""
        return Span(self.total, self.done + epochs) if self.done + epochs < self.total else None


def next_span(last: Span | None, n_epoch: int, total: int | None) -> Span:
    """The span that a fit of so many epochs is of.

    Args:
        last: what is left of an earlier one.
        n_epoch: of this fit.
        total: of the whole, where several fits share a schedule; None for a fit by itself.

    Raises:
        ArgumentError: the fit is longer than what is left.

    Example:
        >>> next_span(Span(6, 1), 5, 6)
        Span(total=6, done=1)
    """
    if total is None:
        return Span(max(1, n_epoch))
    span = last if last is not None and last.total == total else Span(total)
    if span.done + n_epoch > total:
        raise ArgumentError(
            f"a fit of {n_epoch} epochs does not fit into a schedule of total_epochs={total}, of which {span.done} are "
            f"done; fit {total - span.done}, or give a larger total_epochs"
        )
    return span


def fine_tune_epochs(learn: Learner) -> tuple[int, int] | None:
    """The epochs of both phases, and which call it is, where `learn.fine_tune` is what called this fit; else None.

    fastai passes on to the fits nothing that would say so, hence the look at the calling frames.
    """
    frame = _calling(learn, cast(Any, Learner).fine_tune)
    if frame is None:
        return None
    return int(frame.f_locals["freeze_epochs"]) + int(frame.f_locals["epochs"]), id(frame)


def is_within_fit(learn: Learner) -> bool:
    """Whether `learn.fit` is running, as where a callback of a fit validates or predicts on its own account."""
    return _calling(learn, Learner.fit) is not None


def only_looks(learn: Learner) -> bool:
    """Whether an event that a fit sends is somebody's who looks at the network: validate, get_preds, summary.

    They send a fit's outer events too. Most hold the learner's lock meanwhile; `summary` and its like only enter the
    learner, as in `with learn:`.
    """
    return bool(learn.lock.locked()) or any(
        _calling(learn, f) is not None for f in (Learner.__enter__, Learner.__exit__)
    )


def _calling(learn: Learner, function: Any) -> FrameType | None:
    code = inspect.unwrap(function).__code__
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and not (frame.f_code is code and frame.f_locals.get("self") is learn):
        frame = frame.f_back
    return frame
