"""The callback that turns any `fit` into a sparse one. It translates events; the run below decides."""

from __future__ import annotations

import copy
from collections.abc import Callable as Function
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from fastai.learner import Learner
from torch import Tensor, nn

from gossamer.errors import ArgumentError, FileError, StateError
from gossamer.integrations.fastai.additions import Additions
from gossamer.integrations.fastai.checkpoint import Resume
from gossamer.integrations.fastai.data import BATCHES, calibration_of
from gossamer.integrations.fastai.fit_file import as_path, fit_file
from gossamer.integrations.fastai.followers import Traceless
from gossamer.integrations.fastai.keeper import KeepSparse, drop_keepers
from gossamer.integrations.fastai.place import Place
from gossamer.integrations.fastai.request import request
from gossamer.integrations.fastai.rounds import Rounds
from gossamer.integrations.fastai.span import Span, is_within_fit, only_looks
from gossamer.integrations.fastai.voice import Voice, epoch_line, first_line, warn_of_denser_weights, zeros_line
from gossamer.methods import Exchange, Method, warn_if_nothing_moves
from gossamer.plots import plot_training
from gossamer.report import SparsityReport
from gossamer.rules.allocation import Context
from gossamer.rules.criteria import Criterion
from gossamer.rules.granularity import Granularity, Reduction
from gossamer.rules.normalization import Normalization
from gossamer.rules.schedules import Schedule
from gossamer.targets import LayerTypes, unwrapped
from gossamer.training import SparseTraining


class SparsifyCallback(Traceless):
    """Makes a network sparse while fastai trains it.

    After every optimizer step the masks stand where the schedule says, the masked weights are exactly 0 and so is what
    the optimizer remembers of them; at the end of each epoch the masks stand at exactly that epoch's end, whatever the
    number of batches.

    After the fit `learn.keep_sparse` stays on the learner and keeps zero what is masked, until `release()`. A second
    fit with the same callback goes on from the masks that there are. `learn.fine_tune` is one schedule over both of its
    phases.

    Args:
        sparsity: percent of units to mask in the end, or a dict of layer name or pattern → percent; where layers share
            a target ('global', 'erk', …), '*' in the dict is what those that it does not name reach together.
        granularity: what lives and dies together: 'weight', 'vector', 'kernel', 'filter', … or a `Granularity`.
        context: which units compete: 'local', 'global', 'erk', 'lamp', 'output', an N:M pattern such as '2:4', or a
            `Context`.
        criteria: what matters: 'large_final', a `Criterion`, or a function such as `lambda w: w.abs()`.
        schedule: how sparsity grows: a registered name, a `Schedule`, any fastai annealer, or a function of position;
            by default the method's own, or 'one_cycle'.
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
        keep_zeros: whether weights that are zero already, as in a network made sparse before, stay zero.
        skip_frozen: leave frozen layers as they are until they are unfrozen; by default they become sparse too.
        method: how masks move, but for how much: 'gradual', 'static', 'rigl', 'set', 'acdc', 'dsd', what `RigL(…)` and
            the like give, a `Method`, or a function (step, position) → share of the kept units to exchange.
        reduction: how the scores of a unit's weights become one: 'mean', 'sum', 'l2', 'max', or a function.
        normalization: how scores of different layers are made comparable where layers compete: 'none', 'sum', 'max',
            'mean', 'gaussian', 'lamp', or a function.
        data: for criteria that look at gradients or activations: how many batches of the learner's training data, or
            batches of your own (see `Calibration`). They are gone through whenever masks move.
        total_epochs: epochs of the whole schedule, where several fits share it; by default each fit has its own.
        checkpoint: a file that takes the whole state of the fit, safetensors and JSON, from which it can go on.
        every: 'epoch', or a number: after every how many epochs the checkpoint is written; after the last anyway.
        resume: go on from the checkpoint where there is one; the call stays as it was, with all its epochs.

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
    makes_sparse = True
    # Before callbacks that read the weights (averages, loggers), after fastai's own TrainEvalCallback.
    order = -4

    def __init__(
        self,
        sparsity: float | Mapping[str, float],
        granularity: str | Granularity = "weight",
        context: str | Context = "local",
        criteria: str | Criterion | Function[..., Tensor] = "large_final",
        schedule: str | Schedule | Function[..., Any] | None = None,
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
        keep_zeros: bool = True,
        skip_frozen: bool = False,
        method: Method | str | Exchange | None = None,
        reduction: str | Reduction = "mean",
        normalization: str | Normalization = "none",
        data: Any = BATCHES,
        total_epochs: int | None = None,
        checkpoint: str | Path | None = None,
        every: int | str = "epoch",
        resume: bool = False,
    ) -> None:
        self.asked = asked = request(locals())  # which reads the arguments above by their names
        super().__init__()
        self.sparsity, self.granularity, self.context = asked.sparsity, asked.granularity, asked.context
        self.criteria, self.schedule, self.seed = asked.criteria, asked.schedule, asked.seed
        self.lth, self.rewind_epoch = asked.lth, asked.rewind_epoch
        self.reset_end, self.save_tickets = asked.reset_end, asked.save_tickets
        self.round_to, self.layer_type, self.exclude = asked.round_to, asked.layer_type, asked.exclude
        self.keep_zeros, self.skip_frozen = asked.keep_zeros, asked.skip_frozen
        self.ticket_dir, self.verbose, self.metric = as_path(ticket_dir, "ticket_dir"), verbose, metric
        self.place, self.total_epochs = Place(total_epochs), total_epochs
        self.file = fit_file(checkpoint, every, resume)
        self.history: list[dict[str, float]] = []
        self.sparse: SparseTraining | None = None
        self._part, self._is_new = model, True
        self._rounds: Rounds | None = None
        self._voice = Voice(verbose)
        self._additions = Additions(self)
        self._keeper: KeepSparse | None = None
        self._hold_only = self._is_fitting = self._leaves_name = self._is_skipped = False
        if model is not None and not asked.takes_data:
            self._build(model)

    # fastai sets `learn` to None when a callback given to `fit` is taken off, also after an exception.
    @property
    def learn(self) -> Learner | None:
        """The learner that the callback is attached to."""
        return self.__dict__.get("_learn")

    @learn.setter
    def learn(self, learn: Learner | None) -> None:
        before = self.__dict__.get("_learn")
        if learn is not None and before is not None and before is not learn:
            before.remove_cb(self)  # one callback is on one learner
        self.__dict__["_learn"] = learn
        if learn is not None:
            self._leaves_name = False
            learn.cbs = learn.cbs.filter(lambda cb: cb is not self)  # Ctrl-C may have kept fastai from taking it off
            self._additions.guard(learn, self._break_off)
        elif before is not None:
            self._additions.unguard()
            if self._is_fitting:  # something was raised, perhaps between the optimizer's step and ours
                self._give_up(before)
            self._clean_up(before)
            if self.sparse is not None and any(self.sparse.sparsifier.masks.masked(n) for n in self.sparse.targets):
                drop_keepers(before, self.sparse)
                self._keeper = KeepSparse(self.sparse, self.verbose)
                before.add_cb(self._keeper)
            for other in (cb for cb in before.cbs if isinstance(cb, SparsifyCallback) and cb is not self):
                self._leaves_name = True  # fastai takes the name off the learner, and the other needs it
                setattr(before, other.name, other)

    @property
    def name(self) -> str:
        """What the learner calls it; where there are several of them, that is the last one's."""
        return "" if self._leaves_name else "sparsify"

    # -- events -------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Makes the run, or goes on with the one that there is."""
        learn = self._learner()
        if self._only_validates and is_within_fit(learn):
            return  # a callback of this very fit looks at something
        if self._is_fitting:  # still: the last fit was broken off, perhaps between the optimizer's step and ours
            self._give_up(learn)
        if self._only_validates:
            self._clean_up(learn)  # what a fit that was interrupted left behind
            return
        self._hold_only = hasattr(learn, "lr_finder")
        if hasattr(learn, "non_native_mixed_precision"):
            raise StateError(
                "to_non_native_fp16() keeps a second copy of the weights that masks would not reach; use to_fp16()"
            )
        model = self._network(learn)
        if self._hold_only:
            if self.sparse is not None:
                self.sparse.optimizer = learn.opt
            return
        self._clean_up(learn)
        self._additions.guard(learn, self._break_off)  # on a copied learner there is none yet
        goes_on, was_broken = self.place.enter(learn)
        if self.file is not None and (not goes_on or was_broken):
            self.file.look(self.span.total)
        self._make(model)
        run = self._run()
        run.optimizer = learn.opt
        if self._rounds is not None:
            self._rounds.check(self.span.total)
        if any(isinstance(cb, Resume) and cb.restores for cb in learn.cbs):
            self.history = []  # and the rest comes from another callback's file, once all callbacks are there
        elif goes_on:
            run.keep_new_zeros()
        else:
            run.restart()
            self.history = []
        self._voice.line = ""
        self._additions.attach(
            learn,
            after_epoch=self._voice.say_line,
            after_fit=self._end,
            count=self.sparsity_now if self.metric else None,
            before_step=self._look if run.looks_at_gradients else None,
        )
        self._is_fitting = True
        self.place.begin()
        said = "" if self.file is None else self.file.attach(self, learn, goes_on and was_broken)
        if self.asked.takes_data:
            cast(nn.Module, learn.model).train()  # as it is about to be, whatever it was last used for
        run.begin()
        drop_keepers(learn, run)  # this run has taken over their zeros, or was told not to
        if not goes_on:
            warn_if_nothing_moves(self.asked.method, self.span.total * len(cast(Any, learn.dls).train), stacklevel=2)
            self._voice.say(first_line(self.asked.method.name, self.granularity.name, self.sparsity))
        if said:
            self._voice.say(said)
        elif run.zeros_kept:
            self._voice.say_once(zeros_line(run.zeros_kept, sum(m.numel() for m in run.sparsifier.masks.values())))

    def before_epoch(self) -> None:
        """Counts the epochs, since validating in the middle of a fit sets the learner's own count to 0."""
        learn = self._learner()
        if not only_looks(learn):
            self.place.begin_epoch(int(learn.epoch))

    def before_batch(self) -> None:
        """Counts the batches, for the same reason."""
        self.place.begin_batch()

    def before_train(self) -> None:
        """Rewinds what is due, and saves the weights to rewind to."""
        self.place.begin_train(len(cast(Any, self._learner().dl)))
        if self._rounds is not None and not self._hold_only:
            self._rounds.begin_epoch(self.place.epoch_of_all)

    def after_step(self) -> None:
        """Moves the masks to where the schedule stands after this step, or holds them where a round is an epoch."""
        if self.sparse is None:
            return
        self.sparse.optimizer = self._learner().opt  # learn.export in the middle of a fit makes a new one
        is_skipped, self._is_skipped = self._is_skipped, False
        if self._hold_only or self.asked.moves_at_epochs or is_skipped:
            self.sparse.hold()
            return
        self._move(self.place.now, self.sparse.step)

    def after_cancel_step(self) -> None:
        """Takes note that the optimizer has made no step, as where mixed precision overflows."""
        self._is_skipped = True

    def _look(self) -> None:
        """Shows the run the gradients, right before the optimizer's step."""
        if self.sparse is not None and not self._hold_only:
            self.sparse.before_step(self.place.now)

    def after_cancel_train(self) -> None:
        """Leaves the masks where the last step put them."""
        self.place.is_cancelled = True
        self._hold(self._learner())

    def after_cancel_batch(self) -> None:
        """Zeroes what is masked, in case the optimizer had stepped already."""
        self._hold(self._learner())

    after_cancel_epoch = after_cancel_fit = after_cancel_batch

    def after_train(self) -> None:
        """Makes sure that the masks stand at the epoch's end, also where its last batch made no step."""
        if self.sparse is None or self._hold_only:
            return
        place = self.place
        is_due = self.schedule.every_n_steps == 1 or place.epoch_end == 1  # else masks move at their own steps only
        if not place.is_cancelled and place.position != place.epoch_end and is_due:
            self._move(place.epoch_end, self.sparse.move_to)
        sparsity = self.sparsity_now()
        self.history.append({"epoch": place.epoch_of_all, "position": place.reached, "sparsity": sparsity})
        self._voice.line = epoch_line(place.epoch, sparsity, self.asked.is_per_layer)

    def after_fit(self) -> None:
        """Puts the saved weights back where the supermask network was asked for."""
        if self.sparse is None or not self._is_fitting or self._only_validates:
            return
        self._is_fitting = False
        is_done = self.place.end(int(self._learner().n_epoch))
        if is_done and self.file is not None and self.place.epoch >= 0:  # else it was cancelled before it began
            self.file.end()
        if is_done and self._rounds is not None:
            self._rounds.end()

    def _end(self) -> None:
        """Says what the fit came to, counted from the weights that it leaves, and ends its additions."""
        if self._only_validates or self.sparse is None:
            return
        if not self.goes_on:
            report, run = self.report(), self.sparse
            masks = run.sparsifier.masks
            if any(bool(t.weight.detach()[~masks.on(t.name, t.weight.device)].any()) for t in run.sparsifier.targets):
                warn_of_denser_weights(report.sparsity)
            rules = run.sparsifier
            unit = rules.granularity.name if rules.context.is_shared and rules.granularity.name != "weight" else ""
            self._voice.say_end(self.sparsity, report, run.targets, run.at_target, unit)
        self._clean_up(self._learner())

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
        if self._keeper is not None:
            self._keeper.leave()
            self._keeper = None

    def plot(self, ax: Any = None) -> Any:
        """Draws sparsity over training: what the schedule asked for, and what was counted.

        Returns:
            The matplotlib axes.
        """
        # Over layers and not over the dict's entries, since a pattern may stand for many: as the counted average is.
        targets = self._run().targets.values()
        return plot_training(self.history, self.schedule, float(100 * sum(targets) / len(targets)), ax)

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run but the weights and the optimizer, which save themselves.

        Raises:
            StateError: before the first fit.
        """
        return {
            "run": self._run().state_dict(),
            **({} if self._rounds is None else self._rounds.state_dict()),
            "history": [dict(row) for row in self.history],
            "said": sorted(self._voice.said),
            "rewinding": self.asked.rewinding,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Makes sure that a state is of a run by these rules.

        Raises:
            FileError: it is not.
            StateError: before the first fit.
        """
        self._run().check_state(state["run"])
        for key, kind in (("history", dict), ("tickets", str), ("said", str)):
            if not isinstance(state[key], list) or not all(isinstance(item, kind) for item in state[key]):
                raise FileError(f"the state has {key} {state[key]!r}, which no run has; take another copy")
        self.asked.check_rewinding(state["rewinding"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            FileError: it is of another network, or of a run by other rules.
            StateError: before the first fit.
        """
        self.check_state(state)
        self._run().load_state_dict(state["run"])
        if self._rounds is not None:
            self._rounds.load_state_dict(state)
        self.history, self._voice.said = list(state["history"]), set(state["said"])

    def remember(self) -> Function[[], None]:
        """A function that puts the run back as it is now; the weights are somebody else's."""
        state = copy.deepcopy(self.state_dict())
        return lambda: self.load_state_dict(state)

    def reshape(self, state: Mapping[str, Any]) -> None:
        """Leaves the network's shapes as they are: masks change none."""

    @property
    def tickets(self) -> list[Path]:
        """The files that the tickets of this run were saved to."""
        return [] if self._rounds is None else self._rounds.tickets

    @property
    def span(self) -> Span:
        """Which epochs of the schedule this fit is, or the last one was."""
        return self.place.span

    @property
    def epoch_now(self) -> int:
        """This fit's epoch, from 0."""
        return self.place.epoch

    @property
    def goes_on(self) -> bool:
        """Whether other fits are to follow that share the schedule."""
        return self.place.left is not None

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _only_validates(self) -> bool:
        return only_looks(self._learner())

    def _learner(self) -> Learner:
        learn = self.learn
        assert learn is not None
        return learn

    def _run(self) -> SparseTraining:
        if self.sparse is None:
            raise StateError("nothing is sparse yet: this callback has not been in a fit")
        return self.sparse

    def prepare(self, learn: Learner) -> None:
        """Makes the run, if it is not there yet, before another callback's file puts the network's weights back."""
        self._make(self._network(learn))

    def _network(self, learn: Learner) -> nn.Module:
        model: Any = unwrapped(self._part if self._part is not None else cast(nn.Module, learn.model))
        if self._part is not None and not any(m is model for m in cast(nn.Module, learn.model).modules()):
            raise ArgumentError(
                f"model={type(self._part).__name__} is no part of the learner's model, so training would not reach it; "
                "give a part of it, such as model=learn.model[0]"
            )
        return model

    def _make(self, model: nn.Module) -> None:
        if self._is_new or self.sparse is None or self.sparse.sparsifier.model is not model:
            self._build(model)  # anew, if it was built for a part: that may have been loaded since
            self._is_new = False

    def _build(self, model: nn.Module) -> None:
        data = calibration_of(self._learner, self.asked.data) if self.asked.takes_data else None
        self.sparse = self.asked.run_on(model, data)
        self._rounds = Rounds(self.asked, self.sparse, self._voice)
        self.history, self._voice.said = [], set()

    def _hold(self, learn: Learner) -> None:
        if self.sparse is not None:
            self.sparse.optimizer = learn.opt
            self.sparse.hold()

    def _move(self, position: float, move: Function[[float], bool]) -> None:
        changed, self.place.position = move(position), position
        if changed and self._rounds is not None:
            learn = self._learner()
            self._rounds.moved(self.place, self.ticket_dir or Path(learn.path) / learn.model_dir)

    def _break_off(self, learn: Learner) -> None:
        """Leaves the masks of the last step, and nothing else of this fit."""
        self._hold(learn)
        if self._is_fitting:
            self._give_up(learn)
        self._clean_up(learn)

    def _give_up(self, learn: Learner) -> None:
        """Leaves the rest of a schedule that fits share to those that follow: a fit was broken off."""
        self._hold(learn)
        self._is_fitting = False
        # With a file to go on from, this callback's or another's, the same fit is called again.
        files = [cb.file for cb in learn.cbs if isinstance(cb, SparsifyCallback)] + [self.file]
        shared = self.place.break_off(has_file=any(file is not None and file.resume for file in files))
        if shared and self.sparse is not None:
            self.sparse.stay()

    def _clean_up(self, learn: Learner) -> None:
        self._additions.leave(learn, self.sparsity_now)
