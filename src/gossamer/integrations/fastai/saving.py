"""The best model among those that are as sparse as they should be."""

from __future__ import annotations

import warnings
from typing import Any, cast

from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner

from gossamer.errors import GossamerWarning, StateError
from gossamer.integrations.fastai.followers import Traceless, is_sparsifier
from gossamer.integrations.fastai.keeper import KeepSparse


class SaveSparseModelCallback(Traceless, SaveModelCallback):
    """fastai's SaveModelCallback, for a sparse fit: an epoch counts only when the masks stand at the target.

    Without it the best epoch is often an early one, in which the network is still nearly dense. Takes the same
    arguments: `monitor`, `comp`, `min_delta`, `fname`, `every_epoch`, `at_end`, `with_opt`, `reset_on_fit`.

    Raises:
        StateError: when the fit starts, if nothing makes or keeps the network sparse.

    Example:
        >>> SaveSparseModelCallback(monitor="accuracy").monitor
        'accuracy'
    """

    def before_fit(self) -> None:
        """Finds the masks, and warns where the schedule leaves only the last epoch to choose from."""
        super().before_fit()
        if not self.run:
            return
        learn = cast(Learner, self.learn)
        self._sources: list[Any] = [cb for cb in learn.cbs if isinstance(cb, KeepSparse) or is_sparsifier(cb)]
        if not self._sources:
            raise StateError(
                "SaveSparseModelCallback found nothing that makes the network sparse; add a SparsifyCallback to the fit"
            )
        self._saved = False
        source: Any = next((cb for cb in self._sources if is_sparsifier(cb)), None)
        if source is not None and not self.at_end and learn.n_epoch > 1:
            schedule, span = source.schedule, source.span
            reached = [e for e in range(learn.n_epoch) if schedule(span.position(e + 1)) == schedule(1.0)]
            if reached == [learn.n_epoch - 1]:
                warnings.warn(
                    f"schedule {schedule.name!r} reaches its target in the last epoch only, so that is the only one to "
                    "save; end it sooner, as in schedule=one_cycle.between(0, 0.7)",
                    GossamerWarning,
                    stacklevel=2,
                )

    def after_epoch(self) -> None:
        """Lets fastai decide, once the target is reached."""
        if all(cb.sparse.at_target for cb in self._sources):
            super().after_epoch()

    def after_fit(self, **kwargs: Any) -> None:
        """Loads the best of these, where there is one."""
        if self.at_end or self._saved:
            super().after_fit(**kwargs)
        elif not self.every_epoch and not any(is_sparsifier(cb) and cb.goes_on for cb in self._sources):
            warnings.warn(
                "no epoch of this fit ended at the target sparsity, so no model was saved and none is loaded; train "
                "longer, or end the schedule sooner",
                GossamerWarning,
                stacklevel=2,
            )

    def _save(self, name: str) -> None:
        super()._save(name)
        self._saved = True
