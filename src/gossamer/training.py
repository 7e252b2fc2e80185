"""And then? A sparsifier, a schedule and an optimizer, step by step, in any training loop."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from numbers import Integral
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gossamer.errors import ArgumentError, FileError, StateError
from gossamer.keeping import has_zeros_beside
from gossamer.masks import pack, unpack
from gossamer.methods import Exchange, Method, as_method, gradual
from gossamer.report import SparsityReport
from gossamer.rules.criteria import CRITERIA, EVIDENCE, Criterion
from gossamer.rules.granularity import REDUCTIONS
from gossamer.rules.normalization import NORMALIZATIONS
from gossamer.rules.schedules import SCHEDULES, Schedule, as_schedule
from gossamer.sparsifier import Sparsifier

_VERSION = 1


class HasState(Protocol):
    """What is asked of an optimizer: per-parameter state, as torch.optim and fastai keep it."""

    @property
    def state(self) -> Any: ...


def optimizer_tensors(optimizer: HasState | None) -> Callable[[Tensor], list[Tensor]]:
    """Where to find what an optimizer remembers of each weight of a parameter.

    Args:
        optimizer: a torch.optim.Optimizer, a fastai Optimizer or OptimWrapper, or None.

    Returns:
        Parameter → its floating-point state tensors of its own shape (momentum, moments, the slow weights of
        Lookahead); a scalar step is none.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> adam = torch.optim.Adam([p]); p.sum().backward(); adam.step()
        >>> len(optimizer_tensors(adam)(p))
        2
    """
    if optimizer is None:
        return lambda _: []
    state: Mapping[Tensor, Mapping[str, Any]] = getattr(optimizer, "opt", optimizer).state
    slow = dict(_slow_weights(optimizer))

    def tensors_of(parameter: Tensor) -> list[Tensor]:
        entries = [*(state[parameter].values() if parameter in state else ()), slow.get(parameter)]
        return [
            v
            for v in entries
            if isinstance(v, Tensor) and v.shape == parameter.shape and v.is_floating_point() and v.ndim
        ]

    return tensors_of


def _slow_weights(optimizer: HasState) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters with the averages that fastai's Lookahead keeps of them, and writes back every few steps."""
    # In vars, since Lookahead passes on to the optimizer inside whatever is asked of it.
    groups: Iterable[Iterable[Tensor]] | None = getattr(optimizer, "__dict__", {}).get("slow_weights")
    if groups is not None:
        for fast_group, slow_group in zip(cast(Any, optimizer).param_lists, groups, strict=True):
            yield from zip(fast_group, slow_group, strict=True)


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
        self.keep_zeros = keep_zeros and self.method.exchange is None
        self._from_zeros = keep_zeros
        # False where something was masked that no longer is, and is zero still. Empty where nothing was let go.
        self._let_go: dict[str, Tensor] = {}
        self._freed: dict[str, Tensor] = {}  # the same, also of what has grown since, and may come to zero by itself
        self._released_at: dict[str, int] = {}  # how often each weight had been written to when it was released
        self.zeros_kept = sparsifier.keep_zeros(self.targets, round_to, self.fixed) if self.keep_zeros else 0
        self.steps_done = 0
        self.progress = 0.0
        self._floor = 0.0
        self._warned = False
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
            self._hook = None
        if self.looks_at_gradients and isinstance(optimizer, torch.optim.Optimizer):
            self._hook = optimizer.register_step_pre_hook(partial(_before_step, weakref.ref(self)))

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
        self.sparsifier.observe()
        if self.method.exchange is None or not self.progress:
            return
        step, seed = self.steps_done + 1, self.sparsifier.evidence.seed
        share = self.method.share(step, self._position(position))
        if share:
            self._exchanged = self.sparsifier.exchanged(share, self.method.grow, step, seed)

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
        self._note_grown()
        progress = self.schedule(position)
        if progress >= self._floor:
            self._floor = 0.0  # the schedule has caught up, and leads from here on, down again too
        progress, before = max(self._floor, progress), self.progress
        changed = progress != before
        try:
            self.progress = progress
            if changed and (progress < before or (self.round_to is not None and self.sparsifier.context.is_pooled)):
                self._note_let_go()  # what this move frees is zero until the next step
            if changed and not self._warned:
                self._warned = True
                self.sparsifier.warn_unchanged(self.targets)
            state_of = optimizer_tensors(self.optimizer)
            self.sparsifier.move(self.fractions(), self.round_to, state_of, self.fixed)
        except BaseException:  # not all masks are there, so that the next move must not take them for moved
            self.progress = before
            raise
        return changed

    @torch.no_grad()
    def hold(self, without: Collection[str] = ()) -> None:
        """Applies the masks where they stand, to the weights and to the optimizer's state.

        Args:
            without: layers that are left alone.
        """
        self._note_grown()
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
            if not self._let_go or has_zeros_beside(targets, masks, self._freed):
                self._keep_zeros()
            elif has_zeros_beside(targets, masks, self._let_go) or any(
                self._released_at.get(t.name, _version(t.weight)) != _version(t.weight) for t in targets
            ):
                # Trained, and then loaded as they were before; or weights that nothing reaches, in units as they come.
                with contextlib.suppress(ArgumentError):
                    self._keep_zeros()
        self._let_go, self._freed, self._released_at = {}, {}, {}

    def _keep_zeros(self) -> None:
        kept = self.sparsifier.keep_zeros(self.targets, self.round_to, self.fixed)
        self.zeros_kept = kept or self.zeros_kept

    @property
    def at_target(self) -> bool:
        """Whether the masks stand where the schedule ends."""
        return self.progress == self.schedule(1.0)

    def release(self) -> None:
        """Lets go of the masks: from now on every weight may grow again."""
        self._note_let_go()
        self._released_at = {t.name: _version(t.weight) for t in self.sparsifier.targets}
        self.sparsifier.release()
        self.progress, self._floor, self.zeros_kept = 0.0, 0.0, 0

    def _note_let_go(self) -> None:
        for name, mask in self.sparsifier.masks.items():
            for noted in (self._let_go, self._freed):
                before = noted.get(name)
                noted[name] = mask.clone() if before is None else before.to(mask.device) & mask

    @torch.no_grad()
    def _note_grown(self) -> None:
        for target in self.sparsifier.targets if self._let_go else ():
            if target.name in self._let_go:
                mask = self._let_go[target.name].to(target.weight.device)
                self._let_go[target.name] = mask | (target.weight != 0)

    def report(self) -> SparsityReport:
        """What is sparse now, counted from the weights."""
        return self.sparsifier.report()

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run but the weights and the optimizer, which save themselves.

        Returns:
            'version', counters, progress, and 'tensors': masks (packed) and evidence by name.
        """
        return {
            "version": _VERSION,
            "steps_done": self.steps_done,
            "total_steps": self.total_steps,
            "progress": self.progress,
            "floor": self._floor,
            "rules": self._rules(),
            "let_go": {name: pack(mask) for name, mask in self._let_go.items()},
            "freed": {name: pack(mask) for name, mask in self._freed.items()},
            "tensors": self.sparsifier.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave; the run goes on exactly where that one was.

        Raises:
            FileError: a newer version, masks of another network, or a run by other rules.
        """
        self.check_state(state)
        masks = self.sparsifier.masks
        foreign = next((name for name in (*state["let_go"], *state["freed"]) if name not in masks), None)
        if foreign is not None:
            raise FileError(f"run state of another network: there is no layer {foreign!r}")
        let_go, freed = (
            {n: unpack(t, masks[n].shape, n).to(masks[n].device) for n, t in state[key].items()}
            for key in ("let_go", "freed")
        )
        self.sparsifier.load_state_dict(state["tensors"])
        self._let_go, self._freed, self._released_at = let_go, freed, {}
        self.steps_done, self.total_steps = state["steps_done"], state["total_steps"]
        self.progress, self._floor = state["progress"], state["floor"]

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Makes sure that a state is of a run by these rules.

        Raises:
            FileError: it is not, or of a newer version.
        """
        if not isinstance(state, Mapping):
            raise FileError(f"run state must be a dict, got {state!r}; take what state_dict() gave")
        if state.get("version") != _VERSION:
            raise FileError(f"run state of version {state.get('version')!r}; this Gossamer reads version {_VERSION}")
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise FileError(f"run state without {missing[0]!r}; it is no state_dict of a SparseTraining")
        for key, fits in _FITS.items():
            if not fits(state[key]):
                raise FileError(f"run state with {key}={state[key]!r}, which no run has; take another copy")
        for rule, here in self._rules().items():
            there = state["rules"].get(rule)
            if there != here:
                raise FileError(
                    f"run state of other rules: {rule} is {there!r} there and {here!r} here; make the run as "
                    "that one was"
                )

    def _rules(self) -> dict[str, Any]:
        sparsifier = self.sparsifier
        return {
            "granularity": sparsifier.granularity.name,
            "context": str(sparsifier.context),
            "criteria": sparsifier.criterion.name,
            "criteria on an example": example_scores(sparsifier.criterion),
            "schedule": self.schedule.name,
            "schedule at each tenth": [round(self.schedule(i / 10), 6) for i in range(11)],
            "round_to": self.round_to,
            "total_steps": self._made_for,
            "skip_frozen": sparsifier.skip_frozen,
            "seed": sparsifier.evidence.seed if "noise" in sparsifier.criterion.needs else None,
            "sparsity": {name: f"{float(100 * fraction):.6g} %" for name, fraction in self.targets.items()},
            # None where it is as by default, as in states from before there was a choice.
            "every_n_steps": self.schedule.every_n_steps if self.schedule.every_n_steps > 1 else None,
            "fixed": sorted(self.fixed) or None,
            "reduction": _name_of(sparsifier.reduction, "mean", REDUCTIONS),
            "normalization": _name_of(sparsifier.normalization, "none", NORMALIZATIONS),
            "method": None if self.method == gradual else _method_rules(self.method),
        }


def example_scores(criterion: Criterion) -> list[float] | None:
    """What tells two criteria of one name apart: a user's own is known by its name only, '<lambda>' for many.

    Example:
        >>> example_scores(CRITERIA["large_final"])[:2]
        [1.0, 0.714286]
    """
    weight = torch.linspace(-1.0, 1.0, 8)
    evidence = {kind: weight.roll(i) / (i + 1) for i, kind in enumerate(EVIDENCE)}
    evidence |= {"weight": weight, "initial": weight.flip(0) / 2, "previous": weight / 3, "noise": weight.abs()}
    try:
        return [round(float(score), 6) for score in criterion.score(evidence)]
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError):  # it wants a weight of more axes
        return None


def _name_of(rule: Any, default: str, rules: Mapping[str, Any]) -> str | None:
    name = next((name for name, known in rules.items() if known is rule), getattr(rule, "__name__", "custom"))
    return None if name == default else name


def _method_rules(method: Method) -> dict[str, Any]:
    shares = [round(method.share(step, step / 1000), 6) for step in range(1, 1001)]
    return {
        "name": method.name,
        "grow": method.grow.name,
        "initial": None if method.initial is None else method.initial.name,
        "exchanges of a thousand steps": [[i + 1, share] for i, share in enumerate(shares) if share][:50],
    }


def schedule_of(schedule: Schedule | str | Callable[..., Any] | None, method: Method) -> Schedule:
    """The schedule of a run: the one given, or else the method's own, or else 'one_cycle'.

    Example:
        >>> schedule_of(None, as_method("rigl")).name
        'constant'
    """
    if schedule is not None:
        return as_schedule(schedule)
    return method.schedule if method.schedule is not None else SCHEDULES["one_cycle"]


def _check_method(method: Method, sparsifier: Sparsifier) -> None:
    if method.initial is not None:
        sparsifier.check_criterion(method.initial)
    if method.exchange is not None and sparsifier.has_companions:
        raise ArgumentError(
            f"method {method.name!r} lets units grow back, and a masked {sparsifier.granularity.name!r} is silent with "
            "its bias and normalisation, so that it has no gradient to grow by; use a granularity inside filters, such "
            "as 'weight' or 'kernel'"
        )


def _before_step(run: weakref.ref[SparseTraining], *_: Any) -> None:
    alive = run()
    if alive is not None:
        alive.before_step()


def checked_steps(total_steps: int | None) -> int | None:
    """A number of optimizer steps, or None.

    Raises:
        ArgumentError: it is no positive integer.

    Example:
        >>> checked_steps(3)
        3
    """
    if total_steps is None:
        return None
    if isinstance(total_steps, bool) or not isinstance(total_steps, Integral) or total_steps < 1:
        raise ArgumentError(
            f"total_steps={total_steps!r} is no positive integer; give the optimizer steps of the whole training, "
            "epochs × len(loader)"
        )
    return int(total_steps)


def _version(weight: Tensor) -> int:
    """How often a tensor was written to in place."""
    return -1 if weight.is_inference() else weight._version


def check_optimizer(optimizer: HasState | None) -> None:
    """Makes sure that there is an optimizer, torch's or fastai's, or none.

    Raises:
        ArgumentError: it is something else.

    Example:
        >>> check_optimizer(None)
    """
    if optimizer is None or isinstance(getattr(getattr(optimizer, "opt", optimizer), "state", None), Mapping):
        return
    given = repr(optimizer) if isinstance(optimizer, str) else f"a {type(optimizer).__name__}"
    raise ArgumentError(
        f"optimizer is {given}, which has no state to keep zero; give the torch.optim.Optimizer itself, or None"
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _are_masks(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(m, Tensor) for m in cast("Any", value).values())


_FITS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "steps_done": _is_count,
        "total_steps": lambda n: n is None or _is_count(n),
        "progress": _is_fraction,
        "floor": _is_fraction,
        "rules": lambda rules: isinstance(rules, Mapping),
        "tensors": lambda tensors: isinstance(tensors, Mapping),
        "let_go": _are_masks,
        "freed": _are_masks,
    }
)


def forget(optimizer: HasState | None, parameters: Iterable[Tensor]) -> None:
    """Drops what an optimizer remembers of parameters, as if it had never stepped.

    Args:
        optimizer: as in `optimizer_tensors`.
        parameters: whose moments and step counts go. Settings that fastai keeps beside them stay. The slow weights of
            Lookahead become what the parameters are now.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> adam = torch.optim.Adam([p]); p.sum().backward(); adam.step(); forget(adam, [p])
        >>> optimizer_tensors(adam)(p)
        []
    """
    if optimizer is None:
        return
    inner = getattr(optimizer, "opt", optimizer)
    settings: Iterable[str] = getattr(inner, "_keep_on_clear", ())
    slow = dict(_slow_weights(optimizer))
    for parameter in parameters:
        if parameter in slow:
            slow[parameter].copy_(parameter.detach())
        if parameter in inner.state:
            entries = inner.state[parameter]
            inner.state[parameter] = {k: entries[k] for k in settings if k in entries}
