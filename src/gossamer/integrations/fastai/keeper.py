"""Who keeps zero what is masked, once a sparse fit is over? A keeper, on the learner until it is released."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import cast

from fastai.learner import Learner
from torch import nn

from gossamer.integrations.fastai.followers import Traceless, is_sparsifier
from gossamer.integrations.fastai.guard import Guard
from gossamer.integrations.fastai.span import is_within_fit, only_looks
from gossamer.integrations.fastai.voice import Voice
from gossamer.training import SparseTraining


class KeepSparse(Traceless):
    """Stays on the learner after a sparse fit, so that masked weights stay zero in whatever fit comes next.

    It is put there by `SparsifyCallback`, as `learn.keep_sparse`, and goes with `release()`.

    Args:
        run: whose masks are kept.
        verbose: whether to say so, once.
    """

    order = -4
    run_valid = False

    def __init__(self, run: SparseTraining, verbose: bool = True) -> None:
        super().__init__()
        self.sparse, self._voice = run, Voice(verbose)
        self._without: set[str] = set()
        self._idle = False
        self._guard: Guard | None = None

    def before_fit(self) -> None:
        """Applies the masks to what may have been loaded in between, and says once that they hold."""
        learn = cast(Learner, self.learn)
        if only_looks(learn):  # perhaps in the middle of a fit
            if not is_within_fit(learn):
                self._drop_guard()  # of a fit that was broken off before it began
            return
        is_replaced = self._is_replaced(learn)
        self._idle = is_replaced or self._is_for_callback(learn)
        is_alone = not any(map(is_sparsifier, learn.cbs))
        if is_replaced and is_alone:
            self._voice.say_once(
                "The learner has another network than the one that an earlier fit made sparse, so nothing is kept "
                "zero; learn.keep_sparse waits for that one, and learn.keep_sparse.release() takes it off"
            )
        if self._idle:
            return
        # Not where a callback is about to take over, by the zeros that are there now; nor before lr_find has saved the
        # weights that it will put back.
        takes_over = not hasattr(learn, "lr_finder") and is_alone
        if takes_over:
            self._hold(learn)
        self._drop_guard()
        self._guard = Guard(learn, partial(self._break_off, learn))
        if takes_over:
            masks = self.sparse.sparsifier.masks
            names = [name for name in masks if name not in self._without]
            zeros, total = sum(masks.masked(n) for n in names), sum(masks[n].numel() for n in names)
            self._voice.say_once(
                f"{zeros:,} weights ({100 * zeros / total:.2f}%) are masked since an earlier fit and stay zero; "
                "learn.keep_sparse.release() would let them grow",
                topic="kept",
            )

    def after_fit(self) -> None:
        """The fit has come to its end."""
        if not only_looks(cast(Learner, self.learn)):
            self._drop_guard()

    def after_step(self) -> None:
        """Zeroes what is masked."""
        if not self._idle:
            self._hold(cast(Learner, self.learn))

    # The optimizer may have stepped already when another callback cancels.
    after_cancel_batch = after_cancel_train = after_cancel_epoch = after_cancel_fit = after_step

    def release(self) -> None:
        """Lets go of the masks, its own and those of every other keeper on the learner, and leaves it."""
        for keeper in [self] if self.learn is None else _keepers(cast(Learner, self.learn)):
            keeper.sparse.release()
            keeper.leave()

    def give_up(self, weights: Collection[int]) -> None:
        """Leaves layers to another callback, and the learner if none is left.

        Args:
            weights: ids of the weights that it sees to.
        """
        self._without |= {t.name for t in self.sparse.sparsifier.targets if id(t.weight) in weights}
        masks = self.sparse.sparsifier.masks
        if not any(masks.masked(name) for name in masks if name not in self._without):
            self.leave()
        elif not self._idle:
            self._hold(cast(Learner, self.learn))

    def leave(self) -> None:
        """Leaves the learner."""
        self._drop_guard()
        if self.learn is None:
            return
        learn = cast(Learner, self.learn)
        learn.remove_cb(self)
        for keeper in _keepers(learn)[-1:]:  # fastai took the name off the learner, and another keeper needs it
            setattr(learn, keeper.name, keeper)

    def _break_off(self, learn: Learner) -> None:
        self._hold(learn)
        self._drop_guard()

    def _drop_guard(self) -> None:
        if self._guard is not None:
            self._guard.leave()
            self._guard = None

    def _hold(self, learn: Learner) -> None:
        self.sparse.optimizer = learn.opt
        self.sparse.hold(self._without)

    def _is_for_callback(self, learn: Learner) -> bool:
        """Whether the callback itself sees to the masks."""
        return any(is_sparsifier(cb) and cb.sparse is self.sparse for cb in learn.cbs)

    def _is_replaced(self, learn: Learner) -> bool:
        """Whether the learner has another network now."""
        inside = {id(p) for p in cast(nn.Module, learn.model).parameters()}
        return not any(id(t.weight) in inside for t in self.sparse.sparsifier.targets)


def drop_keepers(learn: Learner, run: SparseTraining) -> None:
    """Takes off what keeps the weights of a run that sees to them itself."""
    weights = {id(t.weight) for t in run.sparsifier.targets}
    for keeper in _keepers(learn):
        keeper.give_up(weights)


def _keepers(learn: Learner) -> list[KeepSparse]:
    return [cb for cb in learn.cbs if isinstance(cb, KeepSparse)]
