"""What to do when an epoch is broken off by Ctrl-C or an error, of which fastai tells no callback."""

from __future__ import annotations

from collections.abc import Callable as Function
from typing import Any

from fastai.learner import Learner


class Guard:
    """Stands before the learner's `_do_epoch`, and calls a function when something is raised in it.

    Args:
        learn: the learner; it gets an attribute, until `leave`.
        on_break: called before what was raised goes on its way.
    """

    def __init__(self, learn: Learner, on_break: Function[[], None]) -> None:
        self._learn, self._on_break, self._is_on = learn, on_break, True
        self._inner: Any = learn._do_epoch  # the method, or the guard of another callback
        vars(learn)["_do_epoch"] = self

    def __call__(self) -> None:
        try:
            self._inner()
        except BaseException:
            if self._is_on:
                self._on_break()
            raise

    def leave(self) -> None:
        """Steps aside; whoever came later stays."""
        self._is_on = False
        if vars(self._learn).get("_do_epoch") is self:
            del vars(self._learn)["_do_epoch"]
            if isinstance(self._inner, Guard) and self._inner._is_on:
                vars(self._learn)["_do_epoch"] = self._inner

    # In a pickled or copied learner it is the method itself, so that nothing of Gossamer is in the file.
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._learn, "_do_epoch")
