"""The callback that makes a network smaller while fastai trains it. It translates events; the pruner decides."""

from __future__ import annotations

from collections.abc import Callable as Function
from collections.abc import Iterable, Mapping
from typing import Any, cast

from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner, Metric
from torch import Tensor, nn

from gossamer.errors import ArgumentError, StateError
from gossamer.integrations.fastai.followers import Announcer, SparsityMetric, Traceless, is_sparsifier
from gossamer.integrations.fastai.keeper import KeepSparse
from gossamer.integrations.fastai.span import Span, fine_tune_epochs, is_within_fit, next_span
from gossamer.pruning.filters import as_filter_types
from gossamer.pruning.pruner import Pruner
from gossamer.pruning.report import PruningReport
from gossamer.rules.allocation import Context, as_context, as_fraction, check_round_to
from gossamer.rules.criteria import Criterion, as_criterion
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
        context: which filters compete: 'local' (inside each group of joined layers) or 'global' (across all).
        criteria: what matters: 'large_final', a `Criterion`, or a function such as `lambda w: w.abs()`.
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
    ) -> None:
        super().__init__()
        self.sparsity = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
        self.context, self.criteria, self.schedule = as_context(context), as_criterion(criteria), as_schedule(schedule)
        if isinstance(self.sparsity, dict):
            resolve_sparsity(self.sparsity, ["", *(str(name) for name in self.sparsity)])  # names wait for the network
            if self.context.kind == "global":
                raise ArgumentError("a sparsity for each layer needs context='local'; with 'global' give one number")
        else:
            as_fraction(self.sparsity)
        if self.context.m:
            raise ArgumentError(f"context {str(self.context)!r} is for weights; filters compete 'local' or 'global'")
        check_round_to(round_to, self.context)
        self.round_to, self.layer_type, self.exclude = round_to, as_filter_types(layer_type), as_patterns(exclude)
        self.example_inputs, self.verbose, self.metric, self.seed = example_inputs, verbose, metric, seed
        self.pruner: Pruner | None = None
        self.history: list[dict[str, float]] = []
        self.span = Span(1)
        self._part = model
        self._left: Span | None = None
        self._call: int | None = None
        self._is_fitting = self._is_begun = False
        self._epoch, self._batch, self._batches = -1, 0, 1
        self._metric: Metric | None = None

    # fastai sets `learn` to None when a callback given to `fit` is taken off, also after an exception.
    @property
    def learn(self) -> Learner | None:
        """The learner that the callback is attached to."""
        return self.__dict__.get("_learn")

    @learn.setter
    def learn(self, learn: Learner | None) -> None:
        before, self.__dict__["_learn"] = self.__dict__.get("_learn"), learn
        if learn is None and before is not None:
            self._clean_up(before)

    # -- events -------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Looks at whether the fit can prune, and says what it is about to do."""
        learn = self._learner()
        if learn.lock.locked():  # somebody validates, perhaps a callback of this very fit
            if not is_within_fit(learn):
                self._is_fitting = False
            return
        self._is_fitting = False
        if hasattr(learn, "lr_finder"):  # which puts the weights of before back
            return
        self._check(learn)
        self._clean_up(learn)
        both, call = fine_tune_epochs(learn) or (None, None)
        left = self._left if call is not None and call == self._call else None
        self.span, self._call = next_span(left, int(learn.n_epoch), both), call
        self._left, self._epoch, self._is_fitting = None, -1, True
        model = self._network(learn)
        if self.pruner is not None and self.pruner.model is not model:
            self.pruner = None
        if left is None:
            self.history = []
            self._is_begun = False
            self._say(f"Pruning filters until a sparsity of {self.sparsity}%")
        learn.add_cb(Announcer(self, self._say_epoch, self._say_end))
        if self.metric:
            self._metric = SparsityMetric(self.sparsity_now)
            learn.metrics = [*learn.metrics, self._metric]

    def before_epoch(self) -> None:
        """Counts the epochs, since validating in the middle of a fit sets the learner's own count to 0."""
        learn = self._learner()
        if not learn.lock.locked():
            self._epoch = max(self._epoch + 1, int(learn.epoch))

    def before_train(self) -> None:
        """Counts the batches anew."""
        self._batch, self._batches = 0, len(cast(Any, self._learner().dl))

    def before_batch(self) -> None:
        """Counts the batch, and follows the network's channels when it meets the first one."""
        if not self._is_fitting:
            return
        self._batch += 1
        if self.pruner is None:
            self._build()
        if not self._is_begun:
            assert self.pruner is not None
            self.pruner.restart()
            self._is_begun = True

    def after_step(self) -> None:
        """Removes the filters that the schedule says."""
        if self._is_fitting and self.pruner is not None:
            self._prune(self.span.position(self._epoch, self._batch, self._batches))

    def after_train(self) -> None:
        """Makes sure that the epoch's end is met, also where its last batch made no step."""
        if not self._is_fitting or self.pruner is None:
            return
        end = self.span.position(self._epoch + 1)
        if self._batch >= self._batches:
            self._prune(end)
        position = self.span.position(self._epoch, self._batch, self._batches)
        self.history.append({"position": position, "sparsity": self.sparsity_now()})

    def after_fit(self) -> None:
        """Leaves the rest of a schedule that two phases of `fine_tune` share to the second."""
        if self._is_fitting:
            self._left = self.span.after(int(self._learner().n_epoch))

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

    def _build(self) -> None:
        learn = self._learner()
        inputs = self.example_inputs
        if inputs is None:
            inputs = tuple(x[:2] if isinstance(x, Tensor) and x.ndim else x for x in cast(Any, learn).xb)
        inputs = tuple(
            x.as_subclass(Tensor) if isinstance(x, Tensor) else x
            for x in (inputs if isinstance(inputs, (tuple, list)) else (inputs,))
        )
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
        )

    def _prune(self, position: float) -> None:
        pruner = self._pruner()
        pruner.optimizer = cast(Any, self._learner()).opt
        pruner.step(position)

    def _say_epoch(self) -> None:
        if self._is_fitting and self.pruner is not None:
            self._say(f"Filters gone at the end of epoch {self._epoch}: {self.sparsity_now():.2f}%")

    def _say_end(self) -> None:
        if not self._is_fitting or self.pruner is None:
            return
        learn = self._learner()
        if self._left is None:
            self._say(str(self.report()))
        self._is_fitting = False
        self._clean_up(learn)

    def _clean_up(self, learn: Learner) -> None:
        if self._metric is not None:
            mine = self._metric
            learn.metrics = learn.metrics.filter(lambda m: m is not mine)
            self._metric = None
        learn.remove_cbs([c for c in learn.cbs if getattr(c, "owner", None) is self])

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text)
