"""How far along are we? Fraction of training → progress, both from 0 to 1."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gossamer.errors import ArgumentError
from gossamer.registry import Registry
from gossamer.rules.curves import (
    Exponential,
    Polynomial,
    Steps,
    sched_agp,
    sched_constant,
    sched_cosine,
    sched_dsd,
    sched_iterative,
    sched_linear,
    sched_one_shot,
    sched_onecycle,
)

_GRIDS = (100, 1000)  # at how many positions a schedule is tried when it is made
_SLACK = 1e-6  # rounding that a schedule may leave [0, 1] by
_SNAP = 1e-9  # rounding that it may miss 0 or 1 by, which would cost a weight


@dataclass(frozen=True)
class Schedule:
    """A progress curve between two fractions of training.

    Up to `start_pct` the progress is 0; from there to `end_pct` it follows `func`, stretched to that interval; after
    `end_pct` it stays at `func(1)`. The value is immutable and can serve any number of runs.

    Args:
        func: the curve. Either one argument, position in [0, 1] → progress in [0, 1], or fastai's three,
            `(start, end, pos)`, called with start 0 and end 1.
        start_pct: fraction of training at which the curve starts, in [0, 1).
        end_pct: fraction of training at which it ends, in (start_pct, 1].
        stepwise: whether the curve is flat but for a few jumps; a lottery ticket rewinds at each of them. By
            default the curve is looked at.
        name: what messages and plots call it; the function's own name if not given.
        every_n_steps: after every how many optimizer steps masks move; at the end of training they do in any case.
        immediate: whether masks are there before the first step, so that the progress at the start is the curve's own
            and not 0.

    Raises:
        ArgumentError: the interval is empty or outside [0, 1], `every_n_steps` is no positive integer, the function
            takes another number of arguments, or it fails, or gives something that is no finite number in [0, 1].

    Example:
        >>> late = Schedule(lambda pos: pos, start_pct=0.5)
        >>> [late(p) for p in (0.25, 0.75, 1.0)]
        [0.0, 0.5, 1.0]
    """

    func: Callable[..., Any]
    start_pct: float = 0.0
    end_pct: float = 1.0
    stepwise: bool | None = None
    name: str = ""
    every_n_steps: int = 1
    immediate: bool = False
    _arity: int = field(init=False, repr=False, compare=False, default=1)

    def __post_init__(self) -> None:
        if not callable(self.func):
            raise ArgumentError(
                f"a schedule needs a function, got {self.func!r}; pass position → progress, or a name such as "
                "'one_cycle'"
            )
        for label, value in (("start_pct", self.start_pct), ("end_pct", self.end_pct)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ArgumentError(f"{label}={value!r} is not a fraction of training; use a number from 0 to 1")
        if self.start_pct >= self.end_pct:
            raise ArgumentError(
                f"start_pct={self.start_pct} is not before end_pct={self.end_pct}; the schedule would have no length"
            )
        if isinstance(self.every_n_steps, bool) or not isinstance(self.every_n_steps, int) or self.every_n_steps < 1:
            raise ArgumentError(
                f"every_n_steps={self.every_n_steps!r} is no positive integer; masks move after every so many steps of "
                "the optimizer, 1 for each"
            )
        if not self.name:
            own = getattr(self.func, "__name__", "") or type(self.func).__name__
            object.__setattr__(self, "name", "custom" if own.startswith(("<", "_")) else own)
        object.__setattr__(self, "_arity", _arity(self.func))
        coarse, fine = (len({self._at(i / n) for i in range(n + 1)}) for n in _GRIDS)
        if self.stepwise is None:
            # A step function shows no new values to a closer look; a ramp with a plateau does.
            object.__setattr__(self, "stepwise", fine <= coarse <= _GRIDS[0] // 3)

    def __call__(self, fraction: float) -> float:
        """Progress at a fraction of training.

        Args:
            fraction: how much of training is done, in [0, 1].

        Returns:
            The progress, in [0, 1].

        Raises:
            ArgumentError: the fraction is outside [0, 1].

        Example:
            >>> lin(0.25)
            0.25
        """
        if isinstance(fraction, bool) or not 0 <= _number(fraction) <= 1:
            raise ArgumentError(
                f"fraction of training {fraction!r} is outside [0, 1]; give steps done over steps in all"
            )
        if fraction <= self.start_pct and not self.immediate:  # the weights of that very moment are still dense ones
            return 0.0
        if fraction < self.start_pct:
            return 0.0
        return self._at(min(1.0, (fraction - self.start_pct) / (self.end_pct - self.start_pct)))

    def between(self, start_pct: float, end_pct: float) -> Schedule:
        """The same curve over another part of training.

        Example:
            >>> cos.between(0.5, 1.0)(0.5)
            0.0
        """
        return replace(self, start_pct=start_pct, end_pct=end_pct)

    def every(self, n_steps: int) -> Schedule:
        """The same curve, followed by masks that move after every so many optimizer steps only.

        Example:
            >>> cos.every(100).every_n_steps
            100
        """
        return replace(self, every_n_steps=n_steps)

    def _at(self, pos: float) -> float:
        try:
            value = self.func(pos) if self._arity == 1 else self.func(0.0, 1.0, pos)
        except Exception as error:  # the user's function, which may fail in any way at all
            raise ArgumentError(
                f"schedule {self.name!r} raises {type(error).__name__}: {error} at position {pos:g}; it must give one "
                "number from 0 to 1 at every position from 0 to 1"
            ) from error
        progress = _number(value)
        if math.isnan(progress):
            raise ArgumentError(
                f"schedule {self.name!r} gives {value!r} at position {pos:g}; it must give one number from 0 to 1"
            )
        if not -_SLACK <= progress <= 1 + _SLACK:
            raise ArgumentError(
                f"schedule {self.name!r} gives {progress:g} at position {pos:g}; progress runs from 0 to 1 and is "
                "multiplied with the target sparsity"
            )
        if progress < _SNAP:
            return 0.0
        return progress if progress < 1 - _SNAP else 1.0


def _number(value: Any) -> float:
    """A float, or nan for what is no number; a string is none, whatever it spells."""
    try:
        return math.nan if isinstance(value, (str, bytes, bytearray)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last from a tensor of several
        return math.nan


def _arity(func: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if required <= 1 and (positional or any(p.kind is p.VAR_POSITIONAL for p in parameters)):
        return 1
    if required == 3:
        return 3
    raise ArgumentError(
        f"schedule function {getattr(func, '__name__', func)!r} takes {required} arguments; it must take one (pos) or "
        "three (start, end, pos); an annealer factory must be called first, as in SchedCos(0, 1)"
    )


SCHEDULES: Registry[Schedule] = Registry("schedule", Schedule)


def as_schedule(schedule: Schedule | str | Callable[..., Any]) -> Schedule:
    """A schedule from whatever a user may give: a schedule, a registered name or a plain function.

    Args:
        schedule: the value given.

    Raises:
        ArgumentError: the name is unknown, or the function is no schedule (see `Schedule`).

    Example:
        >>> as_schedule("cos") is cos
        True
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, str):
        return SCHEDULES[schedule]
    return Schedule(schedule)


def _register(name: str, func: Callable[[float], float], start_pct: float = 0.0) -> Schedule:
    return SCHEDULES.register(name, Schedule(func, start_pct=start_pct, name=name))


def polynomial(power: float = 2.0, start_pct: float = 0.0, end_pct: float = 1.0) -> Schedule:
    """A polynomial of any exponent, 1 - (1 - pos)^power (Zhu & Gupta 2017, arXiv:1710.01878).

    Args:
        power: the exponent.
        start_pct: fraction of training at which the curve starts.
        end_pct: fraction at which it ends.

    Raises:
        ArgumentError: see `Polynomial` and `Schedule`.

    Example:
        >>> polynomial(3)(0.5) == agp.between(0, 1)(0.5)
        True
    """
    return Schedule(Polynomial(power), start_pct, end_pct, name=f"polynomial({power:g})")


def exponential(rate: float = 5.0, start_pct: float = 0.0, end_pct: float = 1.0) -> Schedule:
    """An exponential curve, (1 - e^(-rate·pos)) / (1 - e^(-rate)).

    Args:
        rate: how fast it is at first; a negative one is slow at first.
        start_pct: fraction of training at which the curve starts.
        end_pct: fraction at which it ends.

    Raises:
        ArgumentError: see `Exponential` and `Schedule`.

    Example:
        >>> exponential(-5)(0.5) < 0.5 < exponential(5)(0.5)
        True
    """
    return Schedule(Exponential(rate), start_pct, end_pct, name=f"exponential({rate:g})")


def steps(*at: float, values: Sequence[float] | None = None) -> Schedule:
    """Jumps at given fractions of training.

    Args:
        at: the fractions, increasing, each in (0, 1].
        values: the progress from each of them on; by default equal steps up to 1.

    Raises:
        ArgumentError: see `Steps`.

    Example:
        >>> [steps(0.3, 0.6)(p) for p in (0.2, 0.3, 0.6)]
        [0.0, 0.5, 1.0]
    """
    if values is None:
        values = [(i + 1) / len(at) for i in range(len(at))]
    return Schedule(Steps(tuple(at), tuple(values)), stepwise=True, name="steps")


one_shot = _register("one_shot", sched_one_shot, start_pct=0.5)
iterative = _register("iterative", sched_iterative, start_pct=0.2)
agp = _register("agp", sched_agp, start_pct=0.2)
one_cycle = _register("one_cycle", sched_onecycle)
cos = _register("cos", sched_cosine)
lin = _register("lin", sched_linear)
dsd = _register("dsd", sched_dsd)
SCHEDULES.register("polynomial", Schedule(Polynomial(2.0), name="polynomial"))
SCHEDULES.register("exponential", Schedule(Exponential(5.0), name="exponential"))
SCHEDULES.register("steps", Schedule(Steps((0.25, 0.5, 0.75), (1 / 3, 2 / 3, 1.0)), stepwise=True, name="steps"))
constant = SCHEDULES.register("constant", Schedule(sched_constant, stepwise=False, name="constant", immediate=True))
