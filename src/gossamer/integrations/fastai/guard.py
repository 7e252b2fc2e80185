"""What to do when a fit is broken off by Ctrl-C or an error, of which fastai tells no callback."""

from __future__ import annotations

from collections.abc import Callable as Function
from typing import Any

from fastai.callback import core
from fastai.learner import Learner

_CANCEL_FIT: Any = vars(core)["CancelFitException"]
_METHOD = "_with_events"  # what runs a fit, or an epoch of it, with the events before and after


class Guard:
    """Stands before the learner's `_with_events`, and calls a function when something is raised inside a fit.

    One that comes when the fit has begun sees its epochs only.

    Args:
        learn: the learner; it gets an attribute, until `leave`.
        on_break: called before what was raised goes on its way.
    """

    def __init__(self, learn: Learner, on_break: Function[[], None]) -> None:
        self._learn, self._on_break, self._is_on = learn, on_break, True
        self._own: Any = vars(learn).get(_METHOD)  # the guard of another callback, or what the user put there
        self._inner: Any = getattr(learn, _METHOD)
        vars(learn)[_METHOD] = self

    def __call__(self, f: Any, event_type: str, *args: Any, **kwargs: Any) -> None:
        try:
            self._inner(f, event_type, *args, **kwargs)
        except BaseException as error:
            # A fit that is cancelled in an epoch is the only case that fastai still tells every callback of.
            is_told = event_type == "epoch" and isinstance(error, _CANCEL_FIT)
            if self._is_on and event_type in ("fit", "epoch") and not is_told:
                self._on_break()
            raise

    def leave(self) -> None:
        """Steps aside; whoever came later stays."""
        self._is_on = False
        if vars(self._learn).get(_METHOD) is not self:
            return
        own = self._own
        while isinstance(own, Guard) and not own._is_on:  # it left before, and could not take itself away
            own = own._own
        if own is None:
            del vars(self._learn)[_METHOD]
        else:
            vars(self._learn)[_METHOD] = own

    # In a pickled or copied learner it is the method itself, so that nothing of Gossamer is in the file.
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._learn, _METHOD)
