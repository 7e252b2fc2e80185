"""Where in its schedule is a fit? Epochs and batches are counted, and fits that share a schedule follow each other."""

from __future__ import annotations

from fastai.learner import Learner

from gossamer.errors import ArgumentError
from gossamer.integrations.fastai.span import Span, fine_tune_epochs, next_span


class Place:
    """How far the fit of a callback is, as a fraction of its schedule.

    Args:
        total_epochs: epochs of the whole schedule, where several fits share it; None where each fit has its own.

    Raises:
        ArgumentError: that is no number of epochs.

    Example:
        >>> place = Place(total_epochs=None); place.span = Span(total=2); place.begin()
        >>> place.begin_epoch(0); place.begin_train(batches=4); place.begin_batch()
        >>> place.now, place.epoch_end
        (0.125, 0.5)
    """

    def __init__(self, total_epochs: int | None) -> None:
        if total_epochs is not None and (
            isinstance(total_epochs, bool) or not isinstance(total_epochs, int) or total_epochs < 1
        ):
            raise ArgumentError(f"total_epochs={total_epochs!r} is no number of epochs; give the sum over all fits")
        self.total_epochs = total_epochs
        self.span = Span(1)
        self.left: Span | None = None  # what other fits are to do of the schedule
        self.is_broken = False  # whether the last fit was, and a file says where to go on
        self._call: int | None = None  # of fine_tune, whose two fits share a schedule
        self.begin_train(1)
        self.begin()

    def enter(self, learn: Learner) -> tuple[bool, bool]:
        """Finds out which epochs of the schedule a fit is.

        Args:
            learn: in its `before_fit`.

        Returns:
            Whether it goes on with the schedule of fits before it, and whether the last of them was broken off.

        Raises:
            ArgumentError: it is longer than what is left.
        """
        both, call = fine_tune_epochs(learn) or (None, None)
        # What is left of another call of fine_tune, which was broken off, is not for this one.
        left = self.left if self.total_epochs is not None or call == self._call else None
        self.span, self._call = next_span(left, int(learn.n_epoch), self.total_epochs or both), call
        was_broken, self.is_broken = self.is_broken, False
        return left is not None and self.span.done > 0, was_broken

    def begin(self) -> None:
        """Counts this fit's epochs from its first one."""
        self.epoch, self._batch, self._batches = -1, 0, 1
        self.left = None

    def begin_epoch(self, epoch: int) -> None:
        """Counts an epoch.

        Args:
            epoch: by the learner's count, which starts over when somebody validates in the middle of a fit.
        """
        self.epoch = max(self.epoch + 1, epoch)

    def begin_train(self, batches: int) -> None:
        """Counts the batches of an epoch from its first one."""
        self._batch, self._batches = 0, batches
        self.position, self.is_cancelled = -1.0, False

    def begin_batch(self) -> None:
        """Counts a batch."""
        self._batch += 1

    @property
    def epoch_of_all(self) -> int:
        """This epoch, counted over all fits that share the schedule."""
        return self.span.done + self.epoch

    @property
    def now(self) -> float:
        """The fraction of the schedule that is done with this batch."""
        return self.span.position(self.epoch, self._batch, self._batches)

    @property
    def epoch_end(self) -> float:
        """The fraction that is done with this epoch."""
        return self.span.position(self.epoch + 1)

    @property
    def reached(self) -> float:
        """Where this epoch ended: at its end or, where it was cancelled, at its last step."""
        return max(self.position, self.span.position(self.epoch)) if self.is_cancelled else self.epoch_end

    def end(self, n_epoch: int) -> bool:
        """Takes note that a fit has come to its end.

        Args:
            n_epoch: that it was to have.

        Returns:
            Whether all of the schedule is done.
        """
        # A fit that was ended early leaves its other epochs to those that follow; fine_tune has its own plan for them.
        self.left = self.span.after(n_epoch if self.total_epochs is None else self.epoch + 1)
        return self.left is None

    def break_off(self, has_file: bool) -> bool:
        """Takes note that a fit was broken off, and leaves the rest to those that follow, where fits share a schedule.

        Args:
            has_file: whether a file says where to go on, so that the same fit is called again.

        Returns:
            Whether fits share it.
        """
        if self.total_epochs is None:
            return False
        self.is_broken = has_file
        self.left = self.span.after(0 if has_file else max(0, self.epoch))
        return True
