"""fastai: one callback that turns any `fit` into a sparse one. It translates events; the run below decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable as Function
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from fastai.callback.core import Callback
from fastai.learner import Learner, Metric
from torch import Tensor, nn

from gossamer.errors import ArgumentError, GossamerWarning, StateError
from gossamer.plots import plot_training
from gossamer.report import SparsityReport
from gossamer.rules.allocation import Context, as_context, as_fraction, check_round_to, check_target
from gossamer.rules.criteria import Criterion, as_criterion
from gossamer.rules.granularity import Granularity, as_granularity
from gossamer.rules.schedules import Schedule, as_schedule
from gossamer.sparsifier import Sparsifier
from gossamer.targets import LayerTypes, Target, as_layer_types
from gossamer.tickets import Lottery
from gossamer.training import SparseTraining


class SparsityMetric(Metric):
    """Percent of exact zeros among the weights that take part, as a column of fastai's table.

    Args:
        callback: the callback whose network is counted.
    """

    def __init__(self, callback: SparsifyCallback) -> None:
        self._callback = callback

    def reset(self) -> None:
        """Nothing to forget: the weights are counted when the value is read."""

    def accumulate(self, learn: Learner) -> None:
        """Nothing to gather."""

    @property
    def value(self) -> float:
        """Percent, as the epoch's printed line has it."""
        return self._callback.sparsity_now()

    @property
    def name(self) -> str:
        """The column's name."""
        return "sparsity"


class _Announcer(Callback):
    """Speaks for a SparsifyCallback once all others have acted: fastai's row is out, a best checkpoint is loaded."""

    order = 70
    run_valid = False

    def __init__(self, speaker: SparsifyCallback) -> None:
        self._speaker = speaker

    def after_epoch(self) -> None:
        self._speaker.say_epoch()

    def after_fit(self) -> None:
        self._speaker.say_end()


class SparsifyCallback(Callback):
    """Makes a network sparse while fastai trains it.

    After every optimizer step the masks stand where the schedule says, the masked weights are exactly 0 and so is what
    the optimizer remembers of them; at the end of each epoch the masks stand at exactly that epoch's end, whatever the
    number of batches.

    Args:
        sparsity: percent of units to mask in the end, or a dict of layer name or pattern → percent (context 'local').
        granularity: what lives and dies together: 'weight', 'vector', 'kernel', 'filter', … or a `Granularity`.
        context: which units compete: 'local', 'global', or an N:M pattern such as '2:4'.
        criteria: what matters: 'large_final', a `Criterion`, or a function such as `lambda w: w.abs()`.
        schedule: how sparsity grows: 'one_cycle', a `Schedule`, any fastai annealer, or a function of position.
        lth: rewind the surviving weights after each round of pruning (lottery ticket). A round is a step of a schedule
            with steps; with any other schedule it is an epoch. What follows the last round trains on.
        rewind_epoch: the epoch at whose start the weights are saved, to rewind to; pruning must start after it.
        reset_end: after training, put the saved weights back under the final masks (the supermask network).
        save_tickets: write the ticket of every round to a file.
        model: the part of the learner's model to work on; by default all of it. Layer names are relative to it.
        round_to: round the units that a layer keeps to the nearest multiple of this, never none.
        layer_type: type of layer that takes part, or a tuple of types.
        exclude: names or patterns of layers that do not.
        ticket_dir: where tickets go; by default `learn.path/learn.model_dir`.
        verbose: whether to print what happens.
        metric: whether sparsity is a column of fastai's table.
        seed: of the criterion 'random'.

    Raises:
        ArgumentError: an argument that cannot be used, when the callback is made or, where it depends on the network,
            when `fit` starts.
        TargetError: a layer name that matches nothing, or a layer that cannot be masked.

    Example:
        >>> sp_cb = SparsifyCallback(sparsity=50, granularity="weight", context="local", schedule="one_cycle")
        >>> round(sp_cb.schedule(0.4), 4)
        0.4014
    """

    run_valid = False
    # Before callbacks that read the weights (averages, loggers), after fastai's own TrainEvalCallback.
    order = -4

    def __init__(
        self,
        sparsity: float | Mapping[str, float],
        granularity: str | Granularity = "weight",
        context: str | Context = "local",
        criteria: str | Criterion | Function[..., Tensor] = "large_final",
        schedule: str | Schedule | Function[..., Any] = "one_cycle",
        lth: bool = False,
        rewind_epoch: int = 0,
        reset_end: bool = False,
        save_tickets: bool = False,
        model: nn.Module | None = None,
        round_to: int | None = None,
        layer_type: LayerTypes = nn.Conv2d,
        *,
        exclude: Iterable[str] = (),
        ticket_dir: str | Path | None = None,
        verbose: bool = True,
        metric: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sparsity = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
        self.granularity = as_granularity(granularity)
        self.context = as_context(context)
        self.criteria = as_criterion(criteria)
        self.schedule = as_schedule(schedule)
        for percent in self.sparsity.values() if isinstance(self.sparsity, dict) else [self.sparsity]:
            check_target(as_fraction(percent), self.context)
        check_round_to(round_to, self.context)
        most = max(self.sparsity.values(), default=0) if isinstance(self.sparsity, dict) else self.sparsity
        if 0 < most < 1:
            warnings.warn(
                f"sparsity={self.sparsity} is less than one percent; it is a percentage, so 50 means half",
                GossamerWarning,
                stacklevel=2,
            )
        if isinstance(self.sparsity, dict) and self.context.kind == "global":
            raise ArgumentError("a sparsity for each layer needs context='local'; with 'global' give one number")
        if isinstance(rewind_epoch, bool) or not isinstance(rewind_epoch, int) or rewind_epoch < 0:
            raise ArgumentError(f"rewind_epoch={rewind_epoch!r} is no epoch; epochs count from 0")
        if rewind_epoch and not (lth or reset_end or save_tickets):
            raise ArgumentError(
                f"rewind_epoch={rewind_epoch} has nothing to rewind; add lth=True, reset_end=True or save_tickets=True"
            )
        self.lth, self.rewind_epoch, self.reset_end, self.save_tickets = lth, rewind_epoch, reset_end, save_tickets
        self.round_to, self.layer_type = round_to, as_layer_types(layer_type)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.ticket_dir = None if ticket_dir is None else Path(ticket_dir)
        self.verbose, self.metric, self.seed = verbose, metric, seed
        self.history: list[dict[str, float]] = []
        self.tickets: list[Path] = []
        self.sparse: SparseTraining | None = None
        self._part = model
        self._lottery: Lottery | None = None
        self._said: set[str] = set()
        self._reset_epoch()
        self._line = ""
        self._rewind_due = False
        self._hold_only = False
        if model is not None:
            self._build(model)

    # fastai sets `learn` to None when a callback given to `fit` is taken off, also after an exception.
    @property
    def learn(self) -> Learner | None:
        """The learner that the callback is attached to."""
        return self.__dict__.get("_learn")

    @learn.setter
    def learn(self, learn: Learner | None) -> None:
        if learn is None and self.learn is not None:
            self._clean_up(self.learn)
        self.__dict__["_learn"] = learn

    # -- events -------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Makes the run, or goes on with the one that there is."""
        learn = self._learner()
        if self._only_validates:
            self._clean_up(learn)  # what a fit that was interrupted left behind
            return
        self._hold_only = hasattr(learn, "lr_finder")
        if hasattr(learn, "non_native_mixed_precision"):
            raise StateError(
                "to_non_native_fp16() keeps a second copy of the weights that masks would not reach; use to_fp16()"
            )
        model: Any = self._part if self._part is not None else learn.model
        if self._part is not None and not any(m is self._part for m in cast(nn.Module, learn.model).modules()):
            raise ArgumentError(
                f"model={type(self._part).__name__} is no part of the learner's model, so training would not reach it; "
                "give a part of it, such as model=learn.model[0]"
            )
        if self.sparse is None or self.sparse.sparsifier.model is not model:
            if self._hold_only:
                return
            self._build(model)
        assert self.sparse is not None
        self.sparse.optimizer = learn.opt
        if self._hold_only:
            return
        self._check_rewind(learn)
        self.sparse.restart()
        self._line, self._rewind_due = "", False
        self._clean_up(learn)
        learn.add_cb(_Announcer(self))
        if self.metric:
            learn.metrics = [*learn.metrics, SparsityMetric(self)]
        self._say(f"Pruning of {self.granularity.name} until a sparsity of {self.sparsity}%")

    def before_train(self) -> None:
        """Rewinds what is due, and saves the weights to rewind to."""
        self._reset_epoch()
        lottery = self._lottery
        if lottery is None or self._hold_only:
            return
        epoch = int(self._learner().epoch)
        if self._rewind_due:
            lottery.rewind()
            self._rewind_due = False
        if not lottery.has_snapshot:
            if epoch > self.rewind_epoch:
                raise StateError(
                    f"training starts at epoch {epoch}, and the weights of epoch {self.rewind_epoch} were never saved; "
                    f"use rewind_epoch={epoch}, or the callback that saw that epoch"
                )
            if epoch == self.rewind_epoch:
                lottery.snapshot(epoch)
                self._say(f"Saving Weights at epoch {epoch}")

    def after_step(self) -> None:
        """Moves the masks to where the schedule stands after this step, or holds them where a round is an epoch."""
        if self.sparse is None:
            return
        learn = self._learner()
        if self._hold_only or self._rounds_are_epochs:
            self.sparse.hold()
            return
        # Whole numbers first: the last batch of epoch e must give (e + 1) / n_epoch and nothing next to it.
        self._move((learn.epoch * learn.n_iter + learn.iter + 1) / (learn.n_epoch * learn.n_iter))

    def after_cancel_train(self) -> None:
        """Leaves the masks where the last step put them."""
        self._cancelled = True

    def after_train(self) -> None:
        """Makes sure that the masks stand at the epoch's end, also where its last batch made no step."""
        if self.sparse is None or self._hold_only:
            return
        learn, end = self._learner(), self._epoch_end()
        if not self._cancelled and self._position != end:
            self._move(end)
        sparsity = self.sparsity_now()
        position = max(self._position, learn.epoch / learn.n_epoch) if self._cancelled else end
        self.history.append({"epoch": learn.epoch, "position": position, "sparsity": sparsity})
        average = "avg=" if isinstance(self.sparsity, dict) else ""
        self._line = f"Sparsity at the end of epoch {learn.epoch}: {average}{sparsity:.2f}%"

    def after_fit(self) -> None:
        """Puts the saved weights back where the supermask network was asked for."""
        if self.sparse is None or self._hold_only or self._only_validates:
            return
        if self.reset_end and self._lottery is not None and self._lottery.has_snapshot:
            self._lottery.rewind()
            self._say(f"Weights reset to those of epoch {self._lottery.epoch}")

    # -- what is said -------------------------------------------------------------------------------------------------

    def say_epoch(self) -> None:
        """Prints the epoch's line, once fastai has printed its row."""
        if self._line:
            self._say(self._line)
        self._line = ""

    def say_end(self) -> None:
        """Prints the final lines, counted from the weights that the fit leaves, and ends the fit's own additions."""
        learn = self._learner()
        if self._only_validates or self.sparse is None:
            return
        report = self.report()
        if any(bool(t.weight.detach()[~m].any()) for t, m in self._masked()):
            warnings.warn(
                f"weights that were loaded after training lack the final masks: {report.sparsity:.2f} % are zero. "
                "A best checkpoint from before the target does that; save each epoch and pick a later one, or drop the "
                "callback that loads it",
                GossamerWarning,
                stacklevel=2,
            )
        if isinstance(self.sparsity, dict):
            final = str({r.layer: round(r.sparsity, 2) for r in report.rows if r.layer in self.sparse.targets})
        else:
            final = f"{report.sparsity:.2f}%"
        self._say(f"Final Sparsity: {final}")
        self._say(str(report))
        self._clean_up(learn)

    # -- what a user asks ---------------------------------------------------------------------------------------------

    def report(self) -> SparsityReport:
        """What is sparse now, counted from the weights.

        Raises:
            StateError: before the first fit.
        """
        return self._run().report()

    def sparsity_now(self) -> float:
        """Percent of zeros now: of all weights that take part or, with a dict, the average over the layers it names."""
        run = self._run()
        if isinstance(self.sparsity, dict):
            named = [r.sparsity for r in run.report().rows if r.layer in run.targets]
            return sum(named) / len(named)
        return run.report().sparsity

    def release(self) -> None:
        """Lets go of the masks: from now on every weight may grow again.

        Raises:
            StateError: before the first fit.
        """
        self._run().release()

    def plot(self, ax: Any = None) -> Any:
        """Draws sparsity over training: what the schedule asked for, and what was counted.

        Returns:
            The matplotlib axes.
        """
        # Over layers and not over the dict's entries, since a pattern may stand for many: as the counted average is.
        targets = self._run().targets.values()
        return plot_training(self.history, self.schedule, float(100 * sum(targets) / len(targets)), ax)

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _only_validates(self) -> bool:
        # validate() and get_preds() send fit's outer events too, and hold the learner's lock meanwhile.
        return bool(self._learner().lock.locked())

    @property
    def _rounds_are_epochs(self) -> bool:
        return self.lth and not self.schedule.stepwise

    def _learner(self) -> Learner:
        learn = self.learn
        assert learn is not None
        return learn

    def _run(self) -> SparseTraining:
        if self.sparse is None:
            raise StateError("nothing is sparse yet: this callback has not been in a fit")
        return self.sparse

    def _build(self, model: nn.Module) -> None:
        sparsifier = Sparsifier(
            model,
            self.granularity,
            self.context,
            self.criteria,
            self.layer_type,
            exclude=self.exclude,
            seed=self.seed,
        )
        self.sparse = SparseTraining(sparsifier, None, self.sparsity, self.schedule, round_to=self.round_to)
        self.history, self.tickets, self._said, self._lottery = [], [], set(), None
        if self.lth or self.reset_end or self.save_tickets:
            self._lottery = Lottery(self.sparse)

    def _check_rewind(self, learn: Learner) -> None:
        if self._lottery is None or self._lottery.has_snapshot:
            return
        if self.rewind_epoch >= learn.n_epoch:
            raise ArgumentError(
                f"rewind_epoch={self.rewind_epoch} is not in a fit of {learn.n_epoch} epochs, which count from 0"
            )
        start = self.rewind_epoch / learn.n_epoch
        if self.schedule(start) > 0:
            raise ArgumentError(
                f"rewind_epoch={self.rewind_epoch} of {learn.n_epoch} comes after pruning starts (schedule "
                f"{self.schedule.name!r} starts at {self.schedule.start_pct:.0%} of training); start it later, as in "
                f"schedule={self.schedule.name}.between({start:g}, 1)"
            )

    def _move(self, position: float) -> None:
        run, lottery = self._run(), self._lottery
        changed = run.move_to(position)
        self._position = position
        if not changed or lottery is None or not lottery.has_snapshot:
            return
        is_round = self.schedule.stepwise or position == self._epoch_end()
        if not is_round:
            return
        if self.save_tickets:
            self._save_ticket(lottery)
        if self.lth and position < 1:  # after the last round nothing would train the rewound weights
            if self._rounds_are_epochs:
                self._rewind_due = True  # once the epoch's network has been validated
                self._say_once(f"{self.schedule.name!r} moves at every batch, so each epoch is one round of pruning")
            else:
                lottery.rewind()

    def _epoch_end(self) -> float:
        learn = self._learner()
        return (learn.epoch + 1) / learn.n_epoch

    def _save_ticket(self, lottery: Lottery) -> None:
        learn = self._learner()
        folder = self.ticket_dir if self.ticket_dir is not None else Path(learn.path) / learn.model_dir
        folder.mkdir(parents=True, exist_ok=True)
        path = lottery.ticket().save(folder)
        self.tickets.append(path)
        self._say(f"Saving ticket {path}")

    def _masked(self) -> list[tuple[Target, Tensor]]:
        sparsifier = self._run().sparsifier
        return [(t, sparsifier.masks.on(t.name, t.weight.device)) for t in sparsifier.targets]

    def _clean_up(self, learn: Learner) -> None:
        learn.metrics = learn.metrics.filter(lambda m: getattr(m, "_callback", None) is not self)
        learn.remove_cbs([c for c in learn.cbs if isinstance(c, _Announcer) and c._speaker is self])

    def _reset_epoch(self) -> None:
        self._position = -1.0
        self._cancelled = False

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)
