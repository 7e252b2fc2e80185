"""The callback that turns any `fit` into a sparse one. It translates events; the run below decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable as Function
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from fastai.learner import Learner
from torch import Tensor, nn

from gossamer.errors import ArgumentError, FileError, GossamerWarning, StateError
from gossamer.integrations.fastai.checkpoint import Resume
from gossamer.integrations.fastai.fit_file import FitFile, as_epochs
from gossamer.integrations.fastai.followers import Announcer, KeepSparse, SparsityMetric, Traceless
from gossamer.integrations.fastai.guard import Guard
from gossamer.integrations.fastai.span import Span, fine_tune_epochs, is_within_fit, next_span
from gossamer.plots import plot_training
from gossamer.report import SparsityReport
from gossamer.rules.allocation import Context, as_context, as_fraction, check_round_to, check_target
from gossamer.rules.criteria import Criterion, as_criterion
from gossamer.rules.granularity import Granularity, as_granularity
from gossamer.rules.schedules import Schedule, as_schedule
from gossamer.sparsifier import Sparsifier
from gossamer.targets import LayerTypes, Target, as_layer_types, as_patterns, resolve_sparsity, unwrapped
from gossamer.tickets import Lottery
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
        keep_zeros: whether weights that are zero already, as in a network made sparse before, stay zero.
        skip_frozen: leave frozen layers as they are until they are unfrozen; by default they become sparse too.
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
        keep_zeros: bool = True,
        skip_frozen: bool = False,
        total_epochs: int | None = None,
        checkpoint: str | Path | None = None,
        every: int | str = "epoch",
        resume: bool = False,
    ) -> None:
        super().__init__()
        self.sparsity = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
        self.granularity = as_granularity(granularity)
        self.context = as_context(context)
        self.criteria = as_criterion(criteria)
        self.schedule = as_schedule(schedule)
        if isinstance(self.sparsity, dict):
            resolve_sparsity(self.sparsity, ["", *(str(name) for name in self.sparsity)])  # names wait for the network
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
        self.exclude = as_patterns(exclude)
        self.ticket_dir = _as_path(ticket_dir, "ticket_dir")
        self.verbose, self.metric, self.seed = verbose, metric, seed
        self.keep_zeros, self.skip_frozen = keep_zeros, skip_frozen
        if total_epochs is not None and (
            isinstance(total_epochs, bool) or not isinstance(total_epochs, int) or total_epochs < 1
        ):
            raise ArgumentError(f"total_epochs={total_epochs!r} is no number of epochs; give the sum over all fits")
        if resume and checkpoint is None:
            raise ArgumentError("resume=True has nothing to go on from; name the file: checkpoint='run.safetensors'")
        self.total_epochs = total_epochs
        if not isinstance(resume, bool):
            raise ArgumentError(f"resume={resume!r} is neither True nor False")
        file, every = _as_path(checkpoint, "checkpoint"), as_epochs(every)
        if file is None and every > 1:
            raise ArgumentError(f"every={every} has no file to write; name it: checkpoint='run.safetensors'")
        self._file = None if file is None else FitFile(file, every, resume)
        self.history: list[dict[str, float]] = []
        self.tickets: list[Path] = []
        self.sparse: SparseTraining | None = None
        self._part = model
        self._lottery: Lottery | None = None
        self._said: set[str] = set()
        self._reset_epoch()
        self._line = ""
        self._hold_only = self._is_fitting = False
        self.span = Span(1)
        self._left: Span | None = None
        self._call: int | None = None  # of fine_tune, whose two fits share a schedule
        self._is_broken = False  # whether the last fit was, and its file says where to go on
        self._keeper: KeepSparse | None = None
        self.epoch_now, self._batch, self._batches = -1, 0, 1
        self._is_new = True
        self._guard: Guard | None = None
        if model is not None:
            self._build(model)

    # fastai sets `learn` to None when a callback given to `fit` is taken off, also after an exception.
    @property
    def learn(self) -> Learner | None:
        """The learner that the callback is attached to."""
        return self.__dict__.get("_learn")

    @learn.setter
    def learn(self, learn: Learner | None) -> None:
        before, self.__dict__["_learn"] = self.__dict__.get("_learn"), learn
        if learn is not None and any(cb is self for cb in learn.cbs):  # Ctrl-C kept fastai from taking it off
            learn.cbs = learn.cbs.filter(lambda cb: cb is not self)
        if learn is None and before is not None:
            if self._is_fitting:  # something was raised, perhaps between the optimizer's step and ours
                self._give_up(before)
            self._clean_up(before)
            if self.sparse is not None and any(self.sparse.sparsifier.masks.masked(n) for n in self.sparse.targets):
                self._drop_keepers(before)
                self._keeper = KeepSparse(self.sparse, self.verbose)
                before.add_cb(self._keeper)

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
        both, call = fine_tune_epochs(learn) or (None, None)
        # What is left of another call of fine_tune, which was broken off, is not for this one.
        left = self._left if self.total_epochs is not None or call == self._call else None
        self.span, self._call = next_span(left, int(learn.n_epoch), self.total_epochs or both), call
        goes_on = left is not None and self.span.done > 0
        was_broken, self._is_broken = self._is_broken, False
        if self._file is not None and (not goes_on or was_broken):
            self._file.look(self.span.total)
        self._make(model)
        assert self.sparse is not None
        self.sparse.optimizer = learn.opt
        if self._lottery is not None:
            self._lottery.check(self.span.total)
        if any(isinstance(cb, Resume) and cb.restores for cb in learn.cbs):
            self.history = []  # and the rest comes from another callback's file, once all callbacks are there
        elif goes_on:
            self.sparse.keep_new_zeros()
        else:
            self.sparse.restart()
            self.history = []
        self._line = ""
        self.epoch_now, self._batch, self._batches = -1, 0, 1
        self._attach(learn)
        self._is_fitting, self._left = True, None
        said = "" if self._file is None else self._file.attach(self, learn, goes_on and was_broken)
        self._drop_keepers(learn)  # this run has taken over their zeros, or was told not to
        if not goes_on:
            self._say(f"Pruning of {self.granularity.name} until a sparsity of {self.sparsity}%")
        if said:
            self._say(said)
        elif self.sparse.zeros_kept:
            total = sum(m.numel() for m in self.sparse.sparsifier.masks.values())
            self._say_once(
                f"Keeping the {self.sparse.zeros_kept:,} zeros that are there "
                f"({100 * self.sparse.zeros_kept / total:.2f}%); keep_zeros=False would let them grow"
            )

    def before_epoch(self) -> None:
        """Counts the epochs, since validating in the middle of a fit sets the learner's own count to 0."""
        learn = self._learner()
        if not learn.lock.locked():
            self.epoch_now = max(self.epoch_now + 1, int(learn.epoch))

    def before_batch(self) -> None:
        """Counts the batches, for the same reason."""
        self._batch += 1

    def before_train(self) -> None:
        """Rewinds what is due, and saves the weights to rewind to."""
        self._reset_epoch()
        self._batch, self._batches = 0, len(cast(Any, self._learner().dl))
        lottery = self._lottery
        if lottery is None or self._hold_only:
            return
        epoch = self.span.done + self.epoch_now
        if lottery.begin_epoch(epoch):
            self._say(f"Saving Weights at epoch {epoch}")

    def after_step(self) -> None:
        """Moves the masks to where the schedule stands after this step, or holds them where a round is an epoch."""
        if self.sparse is None:
            return
        learn = self._learner()
        self.sparse.optimizer = learn.opt  # learn.export in the middle of a fit makes a new one
        a_round_is_an_epoch = self.lth and not self.schedule.stepwise  # then masks move at its end
        if self._hold_only or a_round_is_an_epoch:
            self.sparse.hold()
            return
        self._move(self.span.position(self.epoch_now, self._batch, self._batches))

    def after_cancel_train(self) -> None:
        """Leaves the masks where the last step put them."""
        self._cancelled = True
        self._hold(self._learner())

    def after_cancel_batch(self) -> None:
        """Zeroes what is masked, in case the optimizer had stepped already."""
        self._hold(self._learner())

    after_cancel_epoch = after_cancel_fit = after_cancel_batch

    def after_train(self) -> None:
        """Makes sure that the masks stand at the epoch's end, also where its last batch made no step."""
        if self.sparse is None or self._hold_only:
            return
        end = self._epoch_end()
        if not self._cancelled and self._position != end:
            self._move(end)
        sparsity = self.sparsity_now()
        epoch = self.epoch_now
        position = max(self._position, self.span.position(epoch)) if self._cancelled else end
        self.history.append({"epoch": self.span.done + epoch, "position": position, "sparsity": sparsity})
        average = "avg=" if isinstance(self.sparsity, dict) else ""
        self._line = f"Sparsity at the end of epoch {epoch}: {average}{sparsity:.2f}%"

    def after_fit(self) -> None:
        """Puts the saved weights back where the supermask network was asked for."""
        if self.sparse is None or not self._is_fitting or self._only_validates:
            return
        self._is_fitting = False
        # A fit that was ended early leaves its other epochs to those that follow; fine_tune has its own plan for them.
        n_epoch, done = int(self._learner().n_epoch), self.epoch_now + 1
        self._left = self.span.after(n_epoch if self.total_epochs is None else done)
        if self._left is None and self._file is not None and done > 0:  # else it was cancelled before it began
            self._file.end()
        if self._left is None and self.reset_end and self._lottery is not None and self._lottery.has_snapshot:
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
        if self._left is not None:  # another fit goes on with the schedule
            self._clean_up(learn)
            return
        report = self.report()
        if any(bool(t.weight.detach()[~m].any()) for t, m in self._masked()):
            warnings.warn(
                f"weights that were loaded after training lack the final masks: {report.sparsity:.2f} % are zero. "
                "A best checkpoint from before the target does that; use SaveSparseModelCallback, which keeps the best "
                "of those at the target",
                GossamerWarning,
                stacklevel=2,
            )
        if isinstance(self.sparsity, dict):
            final = str({r.layer: round(r.sparsity, 2) for r in report.rows if r.layer in self.sparse.targets})
        else:
            final = f"{report.sparsity:.2f}%"
        self._say(f"Final Sparsity: {final}")
        if not self.sparse.at_target:
            self._say(f"The fit ended before its schedule did, so the target of {self.sparsity}% is not reached")
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
            "lottery": None if self._lottery is None else self._lottery.state_dict(),
            "history": [dict(row) for row in self.history],
            "tickets": [str(path) for path in self.tickets],
            "said": sorted(self._said),
            "rewinding": self._rewinding(),
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
        for name, here in self._rewinding().items():
            there = state["rewinding"].get(name)
            if there != here:
                raise FileError(
                    f"the state is of a run with {name}={there!r}, and here it is {here!r}; make the callback as that "
                    "one was"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            FileError: it is of another network, or of a run by other rules.
            StateError: before the first fit.
        """
        self.check_state(state)
        self._run().load_state_dict(state["run"])
        if self._lottery is not None:
            self._lottery.load_state_dict(state["lottery"])
        self.history, self.tickets = list(state["history"]), [Path(path) for path in state["tickets"]]
        self._said = set(state["said"])

    def _rewinding(self) -> dict[str, Any]:
        names = ("lth", "reset_end", "save_tickets", "rewind_epoch")
        return {name: getattr(self, name) for name in names}

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        """Whether other fits are to follow that share the schedule."""
        return self._left is not None

    @property
    def _only_validates(self) -> bool:
        # validate() and get_preds() send fit's outer events too, and hold the learner's lock meanwhile.
        return bool(self._learner().lock.locked())

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
        sparsifier = Sparsifier(
            model,
            self.granularity,
            self.context,
            self.criteria,
            self.layer_type,
            exclude=self.exclude,
            seed=self.seed,
            skip_frozen=self.skip_frozen,
        )
        self.sparse = SparseTraining(
            sparsifier, None, self.sparsity, self.schedule, round_to=self.round_to, keep_zeros=self.keep_zeros
        )
        self.history, self.tickets, self._said, self._lottery = [], [], set(), None
        if self.lth or self.reset_end or self.save_tickets:
            self._lottery = Lottery(self.sparse, self.rewind_epoch)

    def _hold(self, learn: Learner) -> None:
        if self.sparse is not None:
            self.sparse.optimizer = learn.opt
            self.sparse.hold()

    def _move(self, position: float) -> None:
        lottery, run = self._lottery, self._run()
        changed, self._position = run.move_to(position), position
        if not changed or lottery is None or not lottery.ends_round(is_epoch_end=position == self._epoch_end()):
            return
        if self.save_tickets:
            self._save_ticket(lottery)
        if self.lth:
            if lottery.rounds_are_epochs:
                self._say_once(f"{self.schedule.name!r} moves at every batch, so each epoch is one round of pruning")
            lottery.end_round(is_last=position >= 1)

    def _epoch_end(self) -> float:
        return self.span.position(self.epoch_now + 1)

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

    # -- what is on the learner during a fit --------------------------------------------------------------------------

    def _attach(self, learn: Learner) -> None:
        self._guard = Guard(learn, partial(self._break_off, learn))
        learn.add_cb(Announcer(self, self.say_epoch, self.say_end))
        if self.metric:
            learn.metrics = [*learn.metrics, SparsityMetric(self.sparsity_now)]

    def _break_off(self, learn: Learner) -> None:
        """Leaves the masks of the last step, and nothing else of this fit."""
        self._give_up(learn)
        self._clean_up(learn)

    def _give_up(self, learn: Learner) -> None:
        """Leaves the rest of a schedule that fits share to those that follow: a fit was broken off."""
        self._hold(learn)
        self._is_fitting = False
        if self.total_epochs is not None:
            # With a file to go on from, this callback's or another's, the same fit is called again.
            files = [cb._file for cb in learn.cbs if isinstance(cb, SparsifyCallback)] + [self._file]
            self._is_broken = any(file is not None and file.resume for file in files)
            self._left = self.span.after(0 if self._is_broken else max(0, self.epoch_now))
            if self.sparse is not None:
                self.sparse.stay()

    def _clean_up(self, learn: Learner) -> None:
        if self._guard is not None:
            self._guard.leave()
            self._guard = None
        learn.metrics = learn.metrics.filter(
            lambda m: not isinstance(m, SparsityMetric) or m.count != self.sparsity_now
        )
        ours = [c for c in learn.cbs if getattr(c, "owner", None) is self]
        for resume in (c for c in ours if isinstance(c, Resume)):
            resume.leave()
        learn.remove_cbs(ours)

    def _drop_keepers(self, learn: Learner) -> None:
        weights = {id(t.weight) for t in self._run().sparsifier.targets}
        for cb in [c for c in learn.cbs if isinstance(c, KeepSparse)]:
            cb.give_up(weights)

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


def _as_path(path: Any, what: str) -> Path | None:
    if path is not None and not isinstance(path, (str, Path)):
        raise ArgumentError(f"{what}={path!r} is no path; give a str or a pathlib.Path")
    return None if path is None else Path(path)
