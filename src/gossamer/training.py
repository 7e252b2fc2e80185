"""And then? A sparsifier, a schedule and an optimizer, step by step, in any training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gossamer.errors import ArgumentError, StateError
from gossamer.keeping import has_zeros_beside
from gossamer.letting_go import LetGo
from gossamer.methods import Exchange, Method, as_method, schedule_of, warn_if_nothing_moves
from gossamer.optimizers import (
    HasState,
    check_optimizer,
    checked_steps,
    gradient_factor,
    optimizer_tensors,
    watched,
)
from gossamer.report import SparsityReport
from gossamer.rules.criteria import CRITERIA
from gossamer.rules.schedules import Schedule
from gossamer.run_rules import VERSION, check_run_state, rules_of
from gossamer.sparsifier import Sparsifier


class SparseTraining:
    """A gradual run: moves the masks along a schedule, and keeps zero what is masked.

    Call `step` after every step of the optimizer; from then on the masked weights and the optimizer's state under the
    masks are exactly 0, and after the last step every layer stands exactly at its target.

    Args:
        sparsifier: says which weights, and how they are chosen.
        optimizer: whose state is kept zero under the masks; None where there is none.
        sparsity: percent to reach, or a dict of layer name or pattern → percent.
        schedule: how progress goes from 0 to 1: a registered name, a `Schedule`, or a function; by default the method's
            own, or 'one_cycle'.
        total_steps: how many optimizer steps the run has; needed where `step` is called without a position.
        round_to: round the units that a layer keeps to the nearest multiple of this.
        keep_zeros: whether units that are zero already, as in a network that was made sparse before, stay zero from
            the first step on; `restart` looks for more of them. A layer that is zero throughout is not taken for a
            sparse one. With a method that lets weights grow they may grow too, and the first masks are chosen there.
        method: how masks move, but for how much: a registered name, what `RigL`, `SET`, `ACDC` or `DSD` give, a
            `Method`, or a function (step, position) → share of the kept units to exchange.
        begins: whether masks that belong before the first step ('constant', and so 'static', 'rigl', 'set') are put in
            place now; else `begin` does it.

    Raises:
        ArgumentError: an argument that cannot be used, a target below the zeros that are there, or a method that lets
            units grow which have no gradient while they are masked.
        TargetError: a layer name that matches nothing, or weights with nan.

    Example:
        >>> net = torch.nn.Linear(8, 4)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> run = SparseTraining(Sparsifier(net, layer_type=torch.nn.Linear), sgd, 50, "lin", total_steps=4)
        >>> for _ in range(4):
        ...     sgd.zero_grad(); net(torch.ones(1, 8)).sum().backward(); sgd.step(); moved = run.step()
        >>> run.report().zeros
        16
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        optimizer: HasState | None,
        sparsity: float | Mapping[str, float],
        schedule: Schedule | str | Callable[..., Any] | None = None,
        total_steps: int | None = None,
        *,
        round_to: int | None = None,
        keep_zeros: bool = True,
        method: Method | str | Exchange | None = None,
        begins: bool = True,
    ) -> None:
        if not isinstance(sparsifier, Sparsifier):
            raise ArgumentError(
                f"the first argument is a Sparsifier, got {type(sparsifier).__name__}; wrap it: Sparsifier(model)"
            )
        check_optimizer(optimizer)
        self.sparsifier = sparsifier
        self.method = as_method(method)
        self.schedule = schedule_of(schedule, self.method)
        self.targets, self.fixed = sparsifier.resolve(sparsity, round_to), sparsifier.fixed_layers(sparsity)
        _check_method(self.method, sparsifier)
        sparsifier.check_weights()
        self.round_to = round_to
        self.total_steps = self._made_for = checked_steps(total_steps)
        warn_if_nothing_moves(self.method, self.total_steps)
        self.keep_zeros = keep_zeros and self.method.exchange is None
        self._from_zeros = keep_zeros
        self._let_go = LetGo()
        self.zeros_kept = sparsifier.keep_zeros(self.targets, round_to, self.fixed) if self.keep_zeros else 0
        self.steps_done = 0
        self.progress = 0.0
        self._floor = 0.0
        self._warned = self._warned_thin = False
        self._exchanged: dict[str, Tensor] = {}  # masks that the coming step's exchange ends at
        self._has_looked = False
        self._optimizer: HasState | None = None
        self._hook: RemovableHandle | None = None
        self.optimizer = optimizer
        if begins:
            self.begin()

    @property
    def optimizer(self) -> HasState | None:
        """Whose state is kept zero under the masks; a new one may take its place at any time."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: HasState | None) -> None:
        if optimizer is self._optimizer:
            return
        self._optimizer = optimizer
        if self._hook is not None:
            self._hook.remove()
        self._hook = watched(optimizer, self) if self.looks_at_gradients else None

    @property
    def looks_at_gradients(self) -> bool:
        """Whether the run has to see every step's gradients, which it does right before the optimizer's step."""
        return self.method.exchange is not None or "accumulated" in self.sparsifier.criterion.needs

    @torch.no_grad()
    def begin(self) -> None:
        """Puts masks in place before the first step, where the schedule starts sparse; else does nothing."""
        progress, before = self.schedule(0.0), self.progress
        if progress <= before:
            return
        # A network that is sparse already starts from its zeros, whose magnitudes are the lowest.
        is_sparse = self._from_zeros and not self.keep_zeros and has_zeros_beside(self.sparsifier.targets)
        by = CRITERIA["large_final"] if is_sparse else self.method.initial
        self.progress = progress
        try:
            state_of = optimizer_tensors(self.optimizer)
            self.sparsifier.move(self.fractions(), self.round_to, state_of, self.fixed, by)
        except BaseException:
            self.progress = before
            raise
        self._warn_thin()

    @torch.no_grad()
    def before_step(self, position: float | None = None) -> None:
        """Looks at the gradients right before the optimizer's step; nothing of the network changes.

        A torch.optim.Optimizer calls it by itself, through its step's pre-hook. Only runs that look at gradients need
        it.

        Args:
            position: as in `step`.

        Raises:
            StateError: no position, and `total_steps` is not known; or a layer has no gradient.
        """
        self._has_looked = True
        self._exchanged = {}
        factor = gradient_factor(self.optimizer)
        self.sparsifier.observe(factor)
        if self.method.exchange is None or not self.progress:
            return
        step, seed = self.steps_done + 1, self.sparsifier.evidence.seed
        share = self.method.share(step, self._position(position))
        if share and (factor is None or bool(factor)):  # what has overflowed says nothing, and its step is left out
            self._exchanged = self.sparsifier.exchanged(share, self.method.grow, step, seed, factor)

    def _position(self, position: float | None) -> float:
        if position is not None:
            return position
        if self.total_steps is None:
            raise StateError(
                "step() does not know how far training is; give total_steps, epochs × len(loader), to the run, or "
                "a position to step"
            )
        return min(1.0, (self.steps_done + 1) / self.total_steps)

    def step(self, position: float | None = None) -> bool:
        """Follows one step of the optimizer: moves the masks to where the schedule stands, and applies them.

        Args:
            position: the fraction of training that is done now, in [0, 1]; by default steps done over `total_steps`.

        Returns:
            Whether progress changed. Steps beyond the last hold the masks at the target.

        Raises:
            StateError: no position, and `total_steps` is not known; or weights are to change places, and nobody has
                looked at the gradients.
        """
        done, position = self.steps_done + 1, self._position(position)
        if not self._has_looked and self.progress and self.method.share(done, position):
            raise StateError(
                f"method {self.method.name!r} looks at the gradients before the optimizer's step, and was not called "
                "there; give the run the torch.optim.Optimizer that steps, or call run.before_step() right before it"
            )
        self._exchange()
        if done % self.schedule.every_n_steps and position < 1:
            self.hold()
            moved = False
        else:
            moved = self.move_to(position)
        self.steps_done = done
        return moved

    @torch.no_grad()
    def _exchange(self) -> None:
        masks, self._exchanged = self._exchanged, {}
        if masks:
            self.sparsifier.exchange(masks, optimizer_tensors(self.optimizer))

    @torch.no_grad()
    def move_to(self, position: float) -> bool:
        """Moves the masks to where the schedule stands at a position, and applies them.

        Args:
            position: fraction of training, in [0, 1].

        Returns:
            Whether progress changed.
        """
        self._let_go.note_grown(self.sparsifier.targets)
        progress = self.schedule(position)
        if progress >= self._floor:
            self._floor = 0.0  # the schedule has caught up, and leads from here on, down again too
        progress, before = max(self._floor, progress), self.progress
        changed = progress != before
        try:
            self.progress = progress
            if changed and (progress < before or (self.round_to is not None and self.sparsifier.context.is_pooled)):
                self._let_go.note(self.sparsifier.masks)  # what this move frees is zero until the next step
            if changed and not self._warned:
                self._warned = True
                self.sparsifier.warn_unchanged(self.targets)
            state_of = optimizer_tensors(self.optimizer)
            self.sparsifier.move(self.fractions(), self.round_to, state_of, self.fixed)
        except BaseException:  # not all masks are there, so that the next move must not take them for moved
            self.progress = before
            raise
        if changed:
            self._warn_thin()
        return changed

    def _warn_thin(self) -> None:
        """Once, where the run first stands at its target."""
        if self.at_target and not self._warned_thin:
            self._warned_thin = True
            self.sparsifier.warn_thin()

    @torch.no_grad()
    def hold(self, without: Collection[str] = ()) -> None:
        """Applies the masks where they stand, to the weights and to the optimizer's state.

        Args:
            without: layers that are left alone.
        """
        self._let_go.note_grown(self.sparsifier.targets)
        self.sparsifier.apply(optimizer_tensors(self.optimizer), without)

    def fractions(self) -> dict[str, Fraction]:
        """The fraction of units that each layer masks at the present progress."""
        progress = Fraction(self.progress)
        return {name: target * progress for name, target in self.targets.items()}

    def restart(self, total_steps: int | None = None) -> None:
        """Begins another round of training from the masks that there are: sparsity goes on from here, never back.

        Args:
            total_steps: of the new round; by default as many as before.

        Raises:
            ArgumentError: no positive number of steps, or a target below the zeros that are there.
        """
        total_steps = checked_steps(total_steps)
        self.keep_new_zeros()
        self.stay()
        self.steps_done = 0
        self.total_steps = total_steps if total_steps is not None else self.total_steps

    def stay(self) -> None:
        """Keeps sparsity from falling below what it is now, until the schedule has caught up."""
        self._floor = self.progress

    def keep_new_zeros(self) -> None:
        """Masks zeros beside the masks too, as in a sparser network that was loaded since; `restart` does it.

        A run that was made with keep_zeros=False does not; nor does one that has let go of its zeros since it last
        started, unless there are others beside them, or the weights were written to since it was released.

        Raises:
            ArgumentError: a target below the zeros that are there.
        """
        if self.keep_zeros:
            targets, masks = self.sparsifier.targets, self.sparsifier.masks
            if self._let_go.has_others(targets, masks):
                self._keep_zeros()
            elif self._let_go.may_have_others(targets, masks):
                # Trained, and then loaded as they were before; or weights that nothing reaches, in units as they come.
                with contextlib.suppress(ArgumentError):
                    self._keep_zeros()
        self._let_go.forget()

    def _keep_zeros(self) -> None:
        kept = self.sparsifier.keep_zeros(self.targets, self.round_to, self.fixed)
        self.zeros_kept = kept or self.zeros_kept

    @property
    def at_target(self) -> bool:
        """Whether the masks stand where the schedule ends."""
        return self.progress == self.schedule(1.0)

    def release(self) -> None:
        """Lets go of the masks: from now on every weight may grow again."""
        self._let_go.note(self.sparsifier.masks)
        self._let_go.note_release(self.sparsifier.targets)
        self.sparsifier.release()
        self.progress, self._floor, self.zeros_kept = 0.0, 0.0, 0

    def report(self) -> SparsityReport:
        """What is sparse now, counted from the weights."""
        return self.sparsifier.report()

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run but the weights and the optimizer, which save themselves.

        Returns:
            'version', counters, progress, and 'tensors': masks (packed) and evidence by name.
        """
        return {
            "version": VERSION,
            "steps_done": self.steps_done,
            "total_steps": self.total_steps,
            "progress": self.progress,
            "floor": self._floor,
            "rules": self._rules(),
            **self._let_go.state_dict(),
            "tensors": self.sparsifier.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave; the run goes on exactly where that one was.

        Raises:
            FileError: a newer version, masks of another network, or a run by other rules.
        """
        self.check_state(state)
        let_go = LetGo.read(state, self.sparsifier.masks)
        self.sparsifier.load_state_dict(state["tensors"])
        self._let_go = let_go
        self.steps_done, self.total_steps = state["steps_done"], state["total_steps"]
        self.progress, self._floor = state["progress"], state["floor"]

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Makes sure that a state is of a run by these rules.

        Raises:
            FileError: it is not, or of a newer version.
        """
        check_run_state(state, self.state_dict(), self._rules())

    def _rules(self) -> dict[str, Any]:
        made_for = self.targets, self.fixed, self.round_to, self._made_for
        return rules_of(self.sparsifier, self.schedule, self.method, *made_for)


def _check_method(method: Method, sparsifier: Sparsifier) -> None:
    if method.initial is not None:
        sparsifier.check_criterion(method.initial)
    if method.exchange is not None and sparsifier.has_companions:
        raise ArgumentError(
            f"method {method.name!r} lets units grow back, and a masked {sparsifier.granularity.name!r} is silent with "
            "its bias and normalisation, so that it has no gradient to grow by; use a granularity inside filters, such "
            "as 'weight' or 'kernel'"
        )
