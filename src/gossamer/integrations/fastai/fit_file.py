"""The file of one fit: read when it starts, written as it goes."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import rank_distrib
from torch import nn

from gossamer.errors import ArgumentError, FileError, GossamerWarning, StateError
from gossamer.integrations.fastai.bystanders import fingerprints, warn_of_the_rest
from gossamer.integrations.fastai.checkpoint import (
    Checkpointer,
    Resume,
    check_rest,
    learner_state,
    restore_rest,
    restore_training,
)
from gossamer.integrations.fastai.followers import is_sparsifier
from gossamer.integrations.fastai.span import Span
from gossamer.storage.states import load_state, save_state
from gossamer.targets import unwrapped
from gossamer.weights import load_weights, not_finite, remember

if TYPE_CHECKING:
    from gossamer.integrations.fastai.callback import SparsifyCallback

KIND = "checkpoint of a fastai fit"


class Owner(Protocol):
    """What is asked of a callback whose fit is kept in a file."""

    @property
    def span(self) -> Span:
        """Which epochs of the schedule this fit is."""
        ...

    @property
    def epoch_now(self) -> int:
        """This fit's epoch, from 0."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run but the weights and the optimizer."""
        ...

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises a FileError where a state is of another run."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        ...

    def reshape(self, state: Mapping[str, Any]) -> None:
        """Gives the network the shapes that it has in a state."""
        ...

    def remember(self) -> Callable[[], None]:
        """A function that puts the run back as it is now, once the network is as it was."""
        ...


def as_epochs(every: int | str) -> int:
    """After every how many epochs a file is written.

    Raises:
        ArgumentError: neither 'epoch' nor a positive whole number.

    Example:
        >>> as_epochs("epoch")
        1
    """
    if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ArgumentError(f"every={every!r} is neither 'epoch' nor a number of epochs, such as every=5")
    return 1 if every == "epoch" else int(every)


def as_path(path: Any, what: str) -> Path | None:
    """A path, if any is given.

    Raises:
        ArgumentError: it is none.

    Example:
        >>> as_path("run.safetensors", "checkpoint").suffix
        '.safetensors'
    """
    if path is not None and not isinstance(path, (str, Path)):
        raise ArgumentError(f"{what}={path!r} is no path; give a str or a pathlib.Path")
    return None if path is None else Path(path)


def fit_file(
    checkpoint: str | Path | None, every: int | str, resume: bool, of: str = "SparsifyCallback"
) -> FitFile | None:
    """The file that a callback's arguments ask for, if any.

    Args:
        checkpoint: its path.
        every: 'epoch', or after every how many epochs it is written.
        resume: whether to go on from it, where it is there.
        of: what kind of callback asks.

    Raises:
        ArgumentError: one that cannot be used, or that has no file to go with.

    Example:
        >>> fit_file(None, "epoch", resume=False) is None
        True
    """
    if resume and checkpoint is None:
        raise ArgumentError("resume=True has nothing to go on from; name the file: checkpoint='run.safetensors'")
    if not isinstance(resume, bool):
        raise ArgumentError(f"resume={resume!r} is neither True nor False")
    path, epochs = as_path(checkpoint, "checkpoint"), as_epochs(every)
    if path is None and epochs > 1:
        raise ArgumentError(f"every={epochs} has no file to write; name it: checkpoint='run.safetensors'")
    return None if path is None else FitFile(path, every, resume, of)


class FitFile:
    """Where a callback's fit is kept, and from where it goes on.

    Args:
        path: the file.
        every: 'epoch', or after every how many epochs it is written.
        resume: whether to go on from it, where it is there.
        of: what kind of callback it is; a file of another kind is refused.

    Raises:
        ArgumentError: `every` is neither.
    """

    def __init__(self, path: Path, every: int | str, resume: bool, of: str = "SparsifyCallback") -> None:
        self.path, self.every, self.resume, self.of = path, as_epochs(every), resume, of
        self._fit = 0  # how many fits, or groups of fits that share a schedule, this callback has ended
        self._is_done = False  # whether the file holds a fit that ended, and that this callback has seen to its end
        self._state: dict[str, Any] | None = None
        self._before: dict[str, dict[str, str]] = {}  # what other callbacks carried

    @property
    def has_state(self) -> bool:
        """Whether there is something to go on from."""
        return self._state is not None

    def end(self) -> None:
        """Takes note that a fit has come to its end, so that the next one may write over the file."""
        self._is_done = self._state is None or self._state["fit"] <= self._fit  # else what it holds is still to come
        self._fit += 1

    def look(self, total: int) -> None:
        """Reads the file, if there is one, and makes sure that it can be written.

        Args:
            total: epochs of the fit, or of all the fits that share a schedule.

        Raises:
            StateError: there is one, and nobody said to go on with it.
            FileError: it is of another kind, or of a fit of another length, or cannot be written.
        """
        self._state, name = None, repr(str(self.path))
        if self.path.is_dir():
            raise FileError(f"the checkpoint {name} is a folder; name a file in it")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path.parent).close()
        except OSError as error:
            raise FileError(
                f"the checkpoint {name} cannot be written ({error.strerror}); name a file in a folder of yours"
            ) from None
        if self._is_done or not self.path.exists():
            self._is_done = False
            return
        if not self.resume:
            raise StateError(
                f"the checkpoint {name} is of an earlier fit, which this one would overwrite; say resume=True to go on "
                "with it, or give another name, or delete it"
            )
        state = load_state(self.path, KIND)
        lacking = next(
            (key for key in ("fit", "total", "epoch", "sparse", "others", "learner") if key not in state), None
        )
        if lacking is not None:
            raise FileError(f"the checkpoint {name} lacks {lacking!r}; take another copy")
        of = state.get("callback", "SparsifyCallback")  # which files from before there were others do not say
        if of != self.of:
            raise FileError(
                f"the checkpoint {name} is of a fit with a {of}, and this one has a {self.of}; name another file, or "
                "give the fit the callback that it had"
            )
        for key, at_least in (("fit", 0), ("total", 1), ("epoch", 1)):
            value = state[key]
            good = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
            if not good or (key == "epoch" and value > state["total"]):
                raise FileError(f"the checkpoint {name} has {key} {value!r}, which no fit has; take another copy")
        if state["fit"] < self._fit:  # the fit before this one, which is done
            return
        if state["fit"] == self._fit and state["total"] != total:
            raise FileError(
                f"the checkpoint {name} is of {state['total']} epochs, and this fit is of {total}; fit the same number "
                "of epochs, all of them: those that are done are skipped"
            )
        self._state = state

    def attach(self, callback: Owner, learn: Learner, anew: bool = False) -> str:
        """Puts back what is done, now, so that nothing starts from a network that is about to be replaced.

        Args:
            callback: whose fit it is; its run is made, unless `reshape` makes it.
            learn: which gets the callbacks that skip what is done, and write.
            anew: whether this fit was broken off before, so that its beginning is put back too.

        Returns:
            What to tell the user.

        Raises:
            FileError: the file is of another network, of other rules, or of another optimizer.
        """
        other = next((cb for cb in learn.cbs if isinstance(cb, Checkpointer)), None)
        if other is not None:
            raise ArgumentError(
                f"checkpoint={str(self.path)!r} is one file too many: {str(other.path)!r} holds the whole fit, this "
                "callback's part too; leave checkpoint= out here"
            )
        state, span, here = self._state, callback.span, int(learn.n_epoch)
        done = 0 if state is None else int(state["epoch"]) - span.done
        if state is not None and state["fit"] > self._fit:
            done = here + 1  # a later fit is what the file holds
        skip = max(0, min(here, done))
        restore: Callable[[], None] | None = None
        said = ""
        # What lies beyond this fit is for the next one to put back.
        if state is not None and (0 < done <= here or (done == 0 and anew)):
            self._put_back(callback, learn, state)
            restore = partial(self._restore_rest, callback, learn, state)
            left = "all is done" if span.done + here == span.total else "this fit is done, and the next goes on"
            said = f"Going on from {self.path}: " + (f"epoch {skip} is next" if skip < here else left)
        elif state is not None and done > here:  # what comes between two fits shall not see untrained weights
            self._put_weights_back(callback, learn, state)

        def begin() -> None:
            self._before = {**fingerprints(learn), **self._before}  # as they were before any fit of this file
            warn_of_the_rest(learn)

        mine = cast(Callback, callback)
        learn.add_cb(Resume([mine, *_others(callback, learn)], begin, skip, restore))
        if not rank_distrib():
            learn.add_cb(Checkpointer(mine, self.path, lambda: self._save(callback, learn), self.every))
        return said

    def _put_back(self, callback: Owner, learn: Learner, state: dict[str, Any]) -> None:
        opt, others = cast(Any, learn.opt), _others(callback, learn)
        optimizer = copy.deepcopy(opt.state_dict())

        def put() -> None:
            callback.check_state(state["sparse"])
            for other in others:
                other.prepare(learn)
            if len(state["others"]) != len(others):
                raise FileError(
                    f"the checkpoint {str(self.path)!r} is of a fit with {len(state['others']) + 1} SparsifyCallbacks, "
                    f"and this one has {len(others) + 1}; give all of them"
                )
            for other, there in zip(others, state["others"], strict=True):
                other.check_state(there)
            check_rest(state["learner"])
            callback.reshape(state["sparse"])
            restore_training(learn, state["learner"], self.path)
            callback.load_state_dict(state["sparse"])

        self._all_or_nothing(callback, learn, put, lambda: opt.load_state_dict(optimizer))

    def _put_weights_back(self, callback: Owner, learn: Learner, state: dict[str, Any]) -> None:
        def put() -> None:
            callback.reshape(state["sparse"])
            model = unwrapped(cast(nn.Module, learn.model))
            load_weights(model, state["learner"]["model"], f"the checkpoint {str(self.path)!r}")

        self._all_or_nothing(callback, learn, put)

    def _all_or_nothing(
        self, callback: Owner, learn: Learner, put: Callable[[], None], undo: Callable[[], Any] = lambda: None
    ) -> None:
        """Puts something back; where that fails, all is as it was before.

        Args:
            callback: whose fit it is.
            learn: with the network.
            put: does it.
            undo: for what is neither the network's nor the callback's.

        Raises:
            FileError: it failed.
        """
        name = f"the checkpoint {str(self.path)!r}"
        undo_network, undo_own = remember(unwrapped(cast(nn.Module, learn.model))), callback.remember()
        try:
            put()
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            undo_network()
            undo()
            undo_own()
            if isinstance(error, FileError):
                raise FileError(str(error) if name in str(error) else f"{name}: {error}") from None
            raise FileError(f"{name} is damaged ({error!r}); take another copy") from None

    def _restore_rest(self, callback: Owner, learn: Learner, state: dict[str, Any]) -> None:
        for other, there in zip(_others(callback, learn), state["others"], strict=True):  # they have their runs by now
            other.load_state_dict(there)
        restore_rest(learn, state["learner"])

    def _save(self, callback: Owner, learn: Learner) -> None:
        broken = not_finite(cast(nn.Module, learn.model))
        if broken is not None:
            warnings.warn(
                f"{broken!r} has nan or infinite weights, so the checkpoint {str(self.path)!r} stays as it was before "
                "this epoch; stop, lower the learning rate, and go on from it",
                GossamerWarning,
                stacklevel=2,
            )
            return
        state = {
            "callback": self.of,
            "fit": self._fit,
            "total": callback.span.total,
            "epoch": callback.span.done + callback.epoch_now + 1,
            "sparse": callback.state_dict(),
            "others": [cb.state_dict() for cb in _others(callback, learn)],
            "learner": learner_state(learn, self._before),
        }
        save_state(self.path, state, KIND)


def _others(callback: Owner, learn: Learner) -> list[SparsifyCallback]:
    """The learner's other SparsifyCallbacks, whose state the file holds too."""
    return [cast("SparsifyCallback", cb) for cb in learn.cbs if is_sparsifier(cb) and cb is not callback]
