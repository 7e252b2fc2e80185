"""The callback that makes a network smaller while fastai trains it. It translates events; the pruner decides."""

from __future__ import annotations

from collections.abc import Callable as Function
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner
from torch import Tensor, nn

from gossamer.errors import ArgumentError, FileError, StateError
from gossamer.integrations.fastai.additions import Additions
from gossamer.integrations.fastai.data import BATCHES, TrainingBatches, as_data, calibration_of
from gossamer.integrations.fastai.fit_file import fit_file
from gossamer.integrations.fastai.followers import Traceless, is_sparsifier
from gossamer.integrations.fastai.keeper import KeepSparse
from gossamer.integrations.fastai.place import Place
from gossamer.integrations.fastai.span import Span, is_within_fit, only_looks
from gossamer.pruning.choosing import check_context
from gossamer.pruning.filters import as_filter_types
from gossamer.pruning.pruner import Pruner
from gossamer.pruning.report import PruningReport
from gossamer.rules.allocation import Context, as_context, check_round_to
from gossamer.rules.criteria import OF_DATA, Criterion, as_criterion
from gossamer.rules.schedules import Schedule, as_schedule
from gossamer.targets import LayerTypes, as_patterns, resolve_sparsity, unwrapped


class PruneCallback(Traceless):
    """Removes filters of a network for good while fastai trains it, so that it is smaller, dense and faster.

    After every optimizer step as many filters are gone as the schedule says, with all that hangs on them; what the
    optimizer remembers of the others stays, and so do its parameter groups. At the end the filters that are left are
    exactly those of the target, but where `report` says why not. What is gone stays gone: a second fit with the same
    callback goes on from there, and `learn.fine_tune` is one schedule over both of its phases.

    Args:
        sparsity: percent of filters to remove in the end, or a dict of layer name or pattern → percent (context
            'local').
        context: which filters compete: 'local' (inside each group of joined layers), 'global' (across all), any other
            registered name but 'output', or a `Context`.
        criteria: what matters: a registered name, a `Criterion`, or a function such as `lambda w: w.abs()`.
        schedule: how sparsity grows: 'one_cycle', a `Schedule`, any fastai annealer, or a function of position.
        model: the part of the learner's model to work on; by default all of it. Layer names are relative to it, and
            `example_inputs` are what it takes.
        round_to: round the filters that a layer keeps to the nearest multiple of this, never none.
        layer_type: type of layer whose filters go, or a tuple of types; nn.MultiheadAttention stands for heads.
        exclude: names or patterns of layers that keep all their filters.
        example_inputs: what the network takes: a tensor or a tuple; by default the first two items of a batch.
        verbose: whether to print what happens.
        metric: whether the percentage of filters that are gone is a column of fastai's table.
        seed: of the criterion 'random'.
        data: for criteria that look at gradients or activations: how many batches of the learner's training data, or
            batches of your own (see `Calibration`). They are gone through whenever filters go.
        checkpoint: a file that takes the whole state of the fit, safetensors and JSON, from which it can go on.
        every: 'epoch', or a number: after every how many epochs the checkpoint is written; after the last anyway.
        resume: go on from the checkpoint where there is one; the call stays as it was, with all its epochs, and so does
            the network, which is made as it was before any of its filters went.

    Raises:
        ArgumentError: an argument that cannot be used, when the callback is made or, where it depends on the network,
            when `fit` starts.
        TargetError: a layer name that matches nothing.

    Example:
        >>> cb = PruneCallback(sparsity=50, context="global", schedule="agp", round_to=8)
        >>> cb.schedule.name
        'agp'
    """

    run_valid = False
    order = -4

    def __init__(
        self,
        sparsity: float | Mapping[str, float],
        context: str | Context = "local",
        criteria: str | Criterion | Function[..., Tensor] = "large_final",
        schedule: str | Schedule | Function[..., Any] = "one_cycle",
        model: nn.Module | None = None,
        round_to: int | None = None,
        layer_type: LayerTypes = nn.Conv2d,
        *,
        exclude: Iterable[str] = (),
        example_inputs: Any = None,
        verbose: bool = True,
        metric: bool = True,
        seed: int = 0,
        data: Any = BATCHES,
        checkpoint: str | Path | None = None,
        every: int | str = "epoch",
        resume: bool = False,
    ) -> None:
        super().__init__()
        self.sparsity = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
        self.context, self.criteria, self.schedule = as_context(context), as_criterion(criteria), as_schedule(schedule)
        if isinstance(self.sparsity, dict):
            resolve_sparsity(self.sparsity, ["", *(str(name) for name in self.sparsity)])  # names wait for the network
        check_context(self.context, self.sparsity)
        check_round_to(round_to, self.context)
        self.round_to, self.layer_type, self.exclude = round_to, as_filter_types(layer_type), as_patterns(exclude)
        self.example_inputs, self.verbose, self.metric, self.seed = example_inputs, verbose, metric, seed
        self.data = as_data(data)
        self.file = fit_file(checkpoint, every, resume, "PruneCallback")
        self.place = Place(total_epochs=None)
        self.pruner: Pruner | None = None
        self.history: list[dict[str, float]] = []
        self._part = model
        self._is_fitting = self._is_skipped = False
        self._additions = Additions(self)

    # fastai sets `learn` to None when a callback given to `fit` is taken off, also after an exception.
    @property
    def learn(self) -> Learner | None:
        """The learner that the callback is attached to."""
        return self.__dict__.get("_learn")

    @learn.setter
    def learn(self, learn: Learner | None) -> None:
        before, self.__dict__["_learn"] = self.__dict__.get("_learn"), learn
        if learn is not None:
            self._additions.guard(learn, self._break_off)
        elif before is not None:
            self._additions.unguard()
            self._break_off(before)

    # -- events -------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Looks at whether the fit can prune, goes on from a file where there is one, and says what is about to be."""
        learn = self._learner()
        if only_looks(learn):  # perhaps a callback of this very fit
            if not is_within_fit(learn):
                self._break_off(learn)
            return
        self._is_fitting = False
        if hasattr(learn, "lr_finder"):  # which puts the weights of before back
            return
        self._check(learn)
        if isinstance(self.sparsity, dict) and self.pruner is None:  # a wrong name is found before the bar is drawn
            layers = [n for n, m in self._network(learn).named_modules() if isinstance(m, self.layer_type)]
            resolve_sparsity(self.sparsity, layers)
        self._clean_up(learn)
        self._additions.guard(learn, self._break_off)  # on a copied learner there is none yet
        goes_on, was_broken = self.place.enter(learn)
        if self.file is not None and (not goes_on or was_broken):
            self.file.look(self.span.total)
        if self.pruner is not None and self.pruner.model is not self._network(learn):
            self.pruner = None
        if not goes_on:
            self.history = []
            if self.pruner is not None:
                self.pruner.restart()
        self._additions.attach(
            learn,
            after_epoch=self._say_epoch,
            after_fit=self._end,
            count=self.sparsity_now if self.metric else None,
            before_step=self._look if "accumulated" in self.criteria.needs else None,
        )
        self._is_fitting = True
        self.place.begin()
        said = ""
        if self.file is not None:
            if self.file.has_state and self.pruner is None:
                self._build(next(iter(TrainingBatches(self._learner, 1)))[0])
            said = self.file.attach(self, learn, goes_on and was_broken)
        if not goes_on:
            self._say(f"Pruning filters until a sparsity of {self.sparsity}%")
        if said:
            self._say(said)

    def before_epoch(self) -> None:
        """Counts the epochs, since validating in the middle of a fit sets the learner's own count to 0."""
        learn = self._learner()
        if not only_looks(learn):
            self.place.begin_epoch(int(learn.epoch))

    def before_train(self) -> None:
        """Counts the batches anew."""
        self.place.begin_train(len(cast(Any, self._learner().dl)))

    def before_batch(self) -> None:
        """Counts the batch, and follows the network's channels when it meets the first one."""
        if not self._is_fitting:
            return
        self.place.begin_batch()
        if self.pruner is None:
            self._build(cast(Any, self._learner()).xb)

    def after_step(self) -> None:
        """Removes the filters that the schedule says."""
        is_skipped, self._is_skipped = self._is_skipped, False
        if self._is_fitting and self.pruner is not None and not is_skipped:
            self._prune(self.place.now, self.pruner.step)

    def after_cancel_step(self) -> None:
        """Takes note that the optimizer has made no step, as where mixed precision overflows."""
        self._is_skipped = True

    def _look(self) -> None:
        """Shows the pruner the gradients, right before the optimizer's step."""
        if self._is_fitting and self.pruner is not None:
            self.pruner.before_step()

    def after_cancel_train(self) -> None:
        """Leaves the network as the last step did."""
        self.place.is_cancelled = True

    def after_train(self) -> None:
        """Makes sure that the epoch's end is met, also where its last batch made no step."""
        if not self._is_fitting or self.pruner is None:
            return
        place = self.place
        is_due = self.schedule.every_n_steps == 1 or place.epoch_end == 1  # else filters go at their own steps only
        if not place.is_cancelled and place.position != place.epoch_end and is_due:
            self._prune(place.epoch_end, self.pruner.move_to)
        self.history.append({"position": place.reached, "sparsity": self.sparsity_now()})

    def after_fit(self) -> None:
        """Leaves the rest of a schedule that two phases of `fine_tune` share to the second."""
        learn = self._learner()
        if not self._is_fitting or only_looks(learn):
            return
        is_done = self.place.end(int(learn.n_epoch))
        if is_done and self.file is not None and self.place.epoch >= 0:  # else it was cancelled before it began
            self.file.end()

    # -- what a user asks ---------------------------------------------------------------------------------------------

    def report(self) -> PruningReport:
        """What became of each layer, and of the network's size.

        Raises:
            StateError: before the first batch of the first fit.
        """
        return self._pruner().report()

    def sparsity_now(self) -> float:
        """Percent of filters that are gone, of those that take part; joined ones count once."""
        return 0.0 if self.pruner is None else self.pruner.sparsity_now()

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run but the weights and the optimizer, which save themselves.

        Raises:
            StateError: before the first batch of the first fit.
        """
        return {"pruner": self._pruner().state_dict(), "history": [dict(row) for row in self.history]}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Makes sure that a state is of a run on this network, by these rules.

        Raises:
            FileError: it is not.
            StateError: before the first batch of the first fit.
        """
        self._pruner().check_state(state["pruner"])
        if not isinstance(state["history"], list) or not all(isinstance(row, dict) for row in state["history"]):
            raise FileError(f"the state has history {state['history']!r}, which no run has; take another copy")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave; filters that are gone there go here.

        Raises:
            FileError: it is of another network, or of a run by other rules.
            StateError: before the first batch of the first fit.
        """
        self.check_state(state)
        self._pruner().load_state_dict(state["pruner"])
        self.history = list(state["history"])

    def reshape(self, state: Mapping[str, Any]) -> None:
        """Cuts the network as it is in a state, so that its weights fit in."""
        pruner = self._pruner()
        pruner.optimizer = cast(Any, self._learner()).opt
        pruner.load_state_dict(state["pruner"])

    def remember(self) -> Function[[], None]:
        """A function that puts the network's filters and the run back as they are now."""
        pruner, history = self._pruner().remember(), self.history

        def put_back() -> None:
            pruner()
            self.history = history

        return put_back

    @property
    def span(self) -> Span:
        """Which epochs of the schedule this fit is, or the last one was."""
        return self.place.span

    @property
    def epoch_now(self) -> int:
        """This fit's epoch, from 0."""
        return self.place.epoch

    # -- inside -------------------------------------------------------------------------------------------------------

    def _pruner(self) -> Pruner:
        if self.pruner is None:
            raise StateError("nothing is pruned yet: this callback has not been in a fit")
        return self.pruner

    def _learner(self) -> Learner:
        learn = self.learn
        assert learn is not None
        return learn

    def _check(self, learn: Learner) -> None:
        for cb in learn.cbs:
            if is_sparsifier(cb) or isinstance(cb, KeepSparse):
                raise ArgumentError(
                    f"{type(cb).__name__} holds masks of the filters' present shapes, which pruning changes; prune in "
                    "a fit of its own, after learn.keep_sparse.release()"
                )
            if isinstance(cb, SaveModelCallback) and not cast(Any, cb).every_epoch:
                raise ArgumentError(
                    "SaveModelCallback loads the best weights at the end of the fit, which may be of a larger network; "
                    "add it to a fit that follows, or give it every_epoch=True"
                )
            if isinstance(cb, PruneCallback) and cb is not self:
                raise ArgumentError("one PruneCallback in a fit, please: give one dict of layer name → percent")

    def _network(self, learn: Learner) -> nn.Module:
        whole = cast(nn.Module, learn.model)
        model: Any = unwrapped(self._part if self._part is not None else whole)
        if self._part is not None and not any(m is model for m in whole.modules()):
            raise ArgumentError(
                f"model={type(self._part).__name__} is no part of the learner's model, so training would not reach it; "
                "give a part of it, such as model=learn.model[0]"
            )
        return model

    def _build(self, batch: Any) -> None:
        learn = self._learner()
        inputs = self.example_inputs
        if inputs is None:
            inputs = tuple(x[:2] if isinstance(x, Tensor) and x.ndim else x for x in batch)
        inputs = tuple(
            x.as_subclass(Tensor) if isinstance(x, Tensor) else x
            for x in (inputs if isinstance(inputs, (tuple, list)) else (inputs,))
        )
        takes_data = any(kind in OF_DATA for kind in self.criteria.needs)
        self.pruner = Pruner(
            self._network(learn),
            self.sparsity,
            self.context,
            self.criteria,
            inputs,
            schedule=self.schedule,
            round_to=self.round_to,
            layer_type=self.layer_type,
            exclude=self.exclude,
            seed=self.seed,
            data=calibration_of(self._learner, self.data) if takes_data else None,
        )

    def _prune(self, position: float, prune: Function[[float], bool]) -> None:
        self._pruner().optimizer = cast(Any, self._learner()).opt
        prune(position)
        self.place.position = position

    def _say_epoch(self) -> None:
        if self._is_fitting and self.pruner is not None:
            self._say(f"Filters gone at the end of epoch {self.place.epoch}: {self.sparsity_now():.2f}%")

    def _end(self) -> None:
        learn = self._learner()
        if not self._is_fitting or only_looks(learn):
            return
        if self.place.left is None and self.pruner is not None:
            self._say(str(self.report()))
        self._break_off(learn)

    def _break_off(self, learn: Learner) -> None:
        self._is_fitting = False
        self._clean_up(learn)

    def _clean_up(self, learn: Learner) -> None:
        self._additions.leave(learn, self.sparsity_now)

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text)
