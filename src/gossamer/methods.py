"""How do masks move, but for how much is masked? Methods: a schedule of their own, and weights that change places.

A method says two things, and each may be left out: how sparse the network is when (a schedule), and after which steps
what share of the kept weights makes room for others (a function of the step). All else is the run's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gossamer.errors import ArgumentError, GossamerWarning
from gossamer.registry import Registry
from gossamer.rules.criteria import Criterion, as_criterion
from gossamer.rules.schedules import SCHEDULES, Schedule, as_schedule, constant, steps

Exchange = Callable[[int, float], float]
"""(step of the optimizer, counted from 1; fraction of training that it ends) → share of the kept units to exchange."""

_CHECKED = 100  # positions at which a function of the user's own is tried


def steepest_gradient(gradient: Tensor) -> Tensor:
    """|∂L/∂w|: the weights that the loss would change fastest with (Evci et al. 2020, arXiv:1911.11134)."""
    return gradient.abs()


STEEPEST = Criterion(steepest_gradient, name="gradient", elementwise=True)


@dataclass(frozen=True)
class Method:
    """How a run's masks move. An immutable value that any number of runs can share.

    Args:
        name: what messages and reports call it.
        schedule: how sparse the network is when, unless the run is given a schedule; None for the run's own default.
        exchange: after which steps what share of each layer's kept units makes room for as many others; None for never.
        grow: by what those others are chosen, the highest scores first: 'gradient', a criterion's name, a `Criterion`
            or a function; of the step's gradient, the weight and noise.
        initial: by what the first masks are chosen, where the schedule starts sparse; None for the run's criterion. A
            network with zeros starts from those.

    Raises:
        ArgumentError: an argument that cannot be used.

    Example:
        >>> mine = Method("mine", exchange=lambda step, position: 0.1 if step % 50 == 0 else 0.0, grow="random")
        >>> mine.share(50, 0.5), mine.share(51, 0.5)
        (0.1, 0.0)
    """

    name: str
    schedule: Schedule | None = None
    exchange: Exchange | None = None
    grow: Any = STEEPEST
    initial: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ArgumentError(f"a method is called {self.name!r}; give it a name")
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise ArgumentError(f"method {self.name!r} has schedule={self.schedule!r}; give a Schedule, or None")
        if self.exchange is not None and not callable(self.exchange):
            raise ArgumentError(
                f"method {self.name!r} has exchange={self.exchange!r}; give a function (step, position) → share of the "
                "kept units, or None"
            )
        grow = STEEPEST if self.grow == "gradient" else as_criterion(self.grow)
        object.__setattr__(self, "grow", grow)
        odd = next((kind for kind in grow.needs if kind not in ("weight", "gradient", "noise")), None)
        if odd is not None:
            raise ArgumentError(
                f"method {self.name!r} grows by {grow.name!r}, which looks at {odd!r}; at a step there are weight, "
                "gradient and noise"
            )
        if self.initial is not None:
            object.__setattr__(self, "initial", as_criterion(self.initial))
        if self.exchange is not None:
            for i in range(1, _CHECKED + 1):
                self.share(i, i / _CHECKED)

    def share(self, step: int, position: float) -> float:
        """The share of each layer's kept units that changes places after a step.

        Args:
            step: of the optimizer, counted from 1.
            position: the fraction of training that is done then.

        Raises:
            ArgumentError: the function gives something else than a number from 0 to 1.
        """
        if self.exchange is None:
            return 0.0
        share: Any = self.exchange(step, position)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ArgumentError(
                f"method {self.name!r} gives {share!r} at step {step}, position {position:g}; it must give a share of "
                "the kept units, from 0 to 1"
            )
        return float(share)


@dataclass(frozen=True)
class CosineDecay:
    """A share that falls along half a cosine: fraction · (1 + cos(π · position / end_pct)) / 2, at every so many steps.

    Args:
        fraction: of the kept units, at the start of training.
        every_n_steps: how many steps of the optimizer lie between two exchanges.
        end_pct: fraction of training from which on nothing is exchanged any more.

    Raises:
        ArgumentError: an argument that cannot be used.

    Example:
        >>> decay = CosineDecay(0.3, every_n_steps=100, end_pct=0.8)
        >>> [round(decay(step, step / 1000), 2) for step in (100, 150, 400, 800)]
        [0.29, 0.0, 0.15, 0.0]
    """

    fraction: float
    every_n_steps: int
    end_pct: float

    def __post_init__(self) -> None:
        for label, value in (("fraction", self.fraction), ("end_pct", self.end_pct)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ArgumentError(f"{label}={value!r} is no number above 0 and up to 1")
        every: object = self.every_n_steps
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every_n_steps={every!r} is no positive integer; weights change places every so often")

    def __call__(self, step: int, position: float) -> float:
        """The share at a step."""
        if step % self.every_n_steps or position >= self.end_pct:
            return 0.0
        return self.fraction * (1 + math.cos(math.pi * position / self.end_pct)) / 2


def RigL(
    fraction: float = 0.3,
    every_n_steps: int = 100,
    end_pct: float = 0.75,
    *,
    initial: str | Criterion | Callable[..., Tensor] = "random",
) -> Method:
    """Sparse from the first step on; weights of steepest gradient take the places of the smallest (Evci et al. 2020).

    Constant sparsity, of whatever the context gives each layer ('erk' in the paper); what goes is decided by the run's
    criterion, which is magnitude by default. New weights start at 0, and so does what the optimizer remembers of them.
    The gradient is read right before the optimizer's step, where it lies, and never copied. arXiv:1911.11134.

    Args:
        fraction: of a layer's kept weights, how many change places at first; it falls along half a cosine.
        every_n_steps: how many steps of the optimizer lie between two exchanges.
        end_pct: fraction of training from which on nothing is exchanged any more.
        initial: by what the first masks are chosen.

    Raises:
        ArgumentError: an argument that cannot be used.

    Example:
        >>> RigL(every_n_steps=10).share(10, 0.0)
        0.3
    """
    return Method("rigl", constant, CosineDecay(fraction, every_n_steps, end_pct), STEEPEST, initial)


def SET(
    fraction: float = 0.3,
    every_n_steps: int = 100,
    end_pct: float = 0.75,
    *,
    initial: str | Criterion | Callable[..., Tensor] = "random",
) -> Method:
    """As `RigL`, but those that grow are chosen at random (sparse evolutionary training, Mocanu et al. 2018).

    arXiv:1707.04780. The share falls as RigL's does, where the paper keeps it.

    Args:
        fraction: as in `RigL`.
        every_n_steps: as in `RigL`.
        end_pct: as in `RigL`.
        initial: as in `RigL`.

    Raises:
        ArgumentError: as in `RigL`.

    Example:
        >>> SET().grow.name
        'random'
    """
    return Method("set", constant, CosineDecay(fraction, every_n_steps, end_pct), "random", initial)


def ACDC(warmup_pct: float = 0.1, phase_pct: float = 0.05, last_pct: float = 0.15) -> Method:
    """Compressed and decompressed phases take turns; the last one is compressed (AC/DC, Peste et al. 2021).

    At each compression masks are chosen anew among all weights. arXiv:2106.12379; the defaults are its 100 epochs on
    ImageNet: 10 dense, then 5 and 5, a last dense phase of what is left over, and 15 compressed.

    Args:
        warmup_pct: fraction of training before the first compression.
        phase_pct: fraction of training that a phase takes.
        last_pct: fraction of training that the last, compressed phase takes.

    Raises:
        ArgumentError: no fractions of training, or too little is left for one phase of each kind.

    Example:
        >>> [ACDC().schedule(p) for p in (0.05, 0.12, 0.17, 0.84, 0.9)]
        [0.0, 1.0, 0.0, 0.0, 1.0]
    """
    for label, value in (("warmup_pct", warmup_pct), ("phase_pct", phase_pct), ("last_pct", last_pct)):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not 0 < value < 1:
            raise ArgumentError(f"{label}={value!r} is no fraction of training; give a number between 0 and 1")
    pairs = math.floor((1 - warmup_pct - last_pct) / (2 * phase_pct) + 1e-9)
    if pairs < 1:
        raise ArgumentError(
            f"warmup_pct={warmup_pct} and last_pct={last_pct} leave no room for two phases of phase_pct={phase_pct}; "
            "make one of them shorter"
        )
    at = [warmup_pct + i * phase_pct for i in range(2 * pairs)]
    schedule = steps(*at, 1 - last_pct, values=[*(1.0, 0.0) * pairs, 1.0])
    return Method("acdc", replace(schedule, name="acdc"))


def DSD(sparse_from: float = 1 / 3, sparse_to: float = 2 / 3) -> Method:
    """Dense, sparse, dense, each for a while: the network ends dense (Han et al. 2017, arXiv:1607.04381).

    Args:
        sparse_from: fraction of training at which it becomes sparse.
        sparse_to: fraction of training at which the masks are let go, and what they masked grows from 0.

    Raises:
        ArgumentError: no fractions of training, in this order.

    Example:
        >>> [DSD().schedule(p) for p in (0.3, 0.5, 0.7)]
        [0.0, 1.0, 0.0]
    """
    return Method("dsd", replace(steps(sparse_from, sparse_to, values=(1.0, 0.0)), name="dense, sparse, dense"))


def warn_if_nothing_moves(method: Method, total_steps: int | None, stacklevel: int = 3) -> None:
    """Warns of a run that is too short for any weight to change places.

    Args:
        method: of the run.
        total_steps: of the optimizer, in all; None where that is not known.
        stacklevel: of the warning.

    Example:
        >>> warn_if_nothing_moves(RigL(every_n_steps=10), 50)
    """
    if method.exchange is None or not total_steps:
        return
    if not any(method.share(step, step / total_steps) for step in range(1, total_steps + 1)):
        warnings.warn(
            f"method {method.name!r} exchanges no weight in {total_steps:,} steps, and the masks stay as they are "
            f"first; give it a smaller every_n_steps, such as {max(1, total_steps // 30)}",
            GossamerWarning,
            stacklevel=stacklevel,
        )


METHODS: Registry[Method] = Registry("method", Method)
gradual = METHODS.register("gradual", Method("gradual"))
METHODS.register("static", Method("static", constant))
METHODS.register("rigl", RigL())
METHODS.register("set", SET())
METHODS.register("acdc", ACDC())
METHODS.register("dsd", DSD())


def as_method(method: Method | str | Exchange | None) -> Method:
    """A method from a registered name, from a function (step, position) → share of kept units to exchange, or itself.

    Args:
        method: the value given; None for gradual pruning.

    Raises:
        ArgumentError: it is none of these.

    Example:
        >>> as_method("rigl") == RigL(), as_method(None).name
        (True, 'gradual')
    """
    if method is None:
        return gradual
    if isinstance(method, Method):
        return method
    if method == "sparsegpt":
        raise ArgumentError(
            "method='sparsegpt' is no way to train: it makes a network sparse at once, after training; "
            "sparsegpt(Sparsifier(model, data=batches), 50)"
        )
    if isinstance(method, str):
        return METHODS[method]
    if not callable(method):
        raise ArgumentError(f"method={method!r} is neither a method nor a name; {', '.join(METHODS)} are known")
    if method in (RigL, SET, ACDC, DSD):
        name = getattr(method, "__name__", "")
        raise ArgumentError(f"method={name} is not called yet; write {name}()")
    own = getattr(method, "__name__", type(method).__name__)
    return Method("custom" if own == "<lambda>" else own, constant, method, initial="random")


def schedule_of(schedule: Schedule | str | Callable[..., Any] | None, method: Method) -> Schedule:
    """The schedule of a run: the one given, or else the method's own, or else 'one_cycle'.

    Raises:
        ArgumentError: the method is nothing but its schedule, which another one would take away.

    Example:
        >>> schedule_of(None, as_method("rigl")).name
        'constant'
    """
    if schedule is not None:
        if method.schedule not in (None, schedule) and method.exchange is None:
            raise ArgumentError(
                f"method {method.name!r} is a schedule of its own, {method.schedule.name!r}, and does nothing under "
                "another one; leave out schedule=, or method="
            )
        return as_schedule(schedule)
    return method.schedule if method.schedule is not None else SCHEDULES["one_cycle"]
