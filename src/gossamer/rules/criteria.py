"""How much does each weight matter? Evidence → scores of the weight's shape; the lowest scores go first.

A criterion is a plain function. It declares the evidence that it needs by the names of its parameters, so a user's
own is written the same way: `lambda w: w.abs()`, or `def mine(weight, initial): ...`.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ArgumentError, closest
from gossamer.registry import Registry

EVIDENCE = MappingProxyType(
    {
        "weight": "the weight as it is now",
        "initial": "the weight as it was when the run began",
        "previous": "the weight as it was when the masks last moved",
        "noise": "uniform random numbers in [0, 1), the same for a layer all through a run",
        "accumulated": "-Σ w · ∂L/∂w over the steps of training so far, each with the weight that the gradient is of",
        "gradient": "∂L/∂w, the mean over the batches of the data, the network in the mode that it is in",
        "gradient_squared": "(∂L/∂w)², the mean over the single samples of the data, in evaluation mode",
        "hessian_gradient": "H·g: the Hessian of the loss times its gradient, the network in the mode that it is in",
        "flow": "∂R/∂|w|, where R sums the outputs for an input of ones and every parameter is its magnitude",
        "input_norm": "√Σx² over all inputs x that the weight is multiplied with, in evaluation mode",
        "input_mean": "the mean of |x| over these inputs",
        "input_max": "the largest |x| among these inputs",
    }
)
"""What a criterion may look at, each of the weight's shape, in float32 or wider."""

OF_LOSS = frozenset({"gradient", "gradient_squared", "hessian_gradient"})
"""Evidence that takes data, and a loss."""

OF_DATA = OF_LOSS | {"flow", "input_norm", "input_mean", "input_max"}
"""Evidence that takes data: gathered when masks move, dropped when they have moved."""


@dataclass(frozen=True)
class Criterion:
    """A scoring function, with the evidence that it needs.

    Args:
        func: evidence tensors → scores of the same shape. One parameter of any name gets the weight; otherwise every
            parameter without a default is named after the evidence it wants (see `EVIDENCE`).
        name: what messages call it; the function's own name if not given.
        elementwise: whether each score depends on its own position only, so that it may be computed piece by piece.
        magnitude: whether the score is the absolute value of the one evidence that it needs, and nothing else, so that
            it may be read off the bits.

    Raises:
        ArgumentError: no function, or one that asks for evidence that does not exist.

    Example:
        >>> gap = Criterion(lambda weight, initial: weight - initial, name="gap")
        >>> gap.needs
        ('weight', 'initial')
    """

    func: Callable[..., Tensor]
    name: str = ""
    elementwise: bool = False
    magnitude: bool = False
    needs: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if not callable(self.func):
            raise ArgumentError(
                f"a criterion needs a function, got {self.func!r}; pass weight → scores or a name such as 'large_final'"
            )
        if not self.name:
            own = getattr(self.func, "__name__", type(self.func).__name__)
            object.__setattr__(self, "name", "custom" if own == "<lambda>" else own)
        object.__setattr__(self, "needs", _needs(self.func, self.name))

    def __call__(self, *args: Tensor, **evidence: Tensor) -> Tensor:
        """Scores from evidence, by position or by name.

        Example:
            >>> large_final(torch.tensor([-3.0, 1.0]))
            tensor([3., 1.])
        """
        return self.func(*args, **evidence)

    def __reduce__(self) -> tuple[Any, ...]:
        # A registered one hides its function from pickle behind its own name, so it travels by that name.
        if CRITERIA.get(self.name) is self:
            return as_criterion, (self.name,)
        return Criterion, (self.func, self.name, self.elementwise, self.magnitude)

    def score(self, evidence: dict[str, Tensor]) -> Tensor:
        """Scores from a dict that holds at least what the criterion needs.

        Args:
            evidence: name → tensor; all of one shape.

        Returns:
            Scores in float32 or wider, of the weight's shape.

        Raises:
            ArgumentError: the function gives no tensor, one of another shape, complex numbers or nan.

        Example:
            >>> small_final.score({"weight": torch.tensor([-3.0, 1.0])})
            tensor([-3., -1.])
        """
        arguments = [evidence[name] for name in self.needs]
        if not self.elementwise:  # a function of the user's own: `w.abs_()` shall not write into the network
            arguments = [t.clone() for t in arguments]
        scores: Any = self.func(*arguments)
        shape = arguments[0].shape
        if not isinstance(scores, Tensor) or scores.shape != shape:
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else reprlib.repr(scores)
            raise ArgumentError(
                f"criterion {self.name!r} gives {got} for a weight of shape {tuple(shape)}; "
                "it must give one score a weight"
            )
        scores = scores.detach()
        if scores.is_complex():
            raise ArgumentError(
                f"criterion {self.name!r} gives scores of {scores.dtype}, which have no order; give real ones, such as "
                "scores.abs()"
            )
        # Elementwise scores are looked at where they are compared; on a GPU a look would wait for the device.
        if not self.elementwise and scores.device.type == "cpu" and bool(scores.isnan().any()):
            raise ArgumentError(
                f"criterion {self.name!r} gives nan for a weight of shape {tuple(shape)}; check the weights for nan, "
                "or the criterion's own arithmetic"
            )
        return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()


def _needs(func: Callable[..., Any], name: str) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):
        return ("weight",)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    wanted = [p.name for p in positional if p.default is p.empty] or [p.name for p in positional[:1]]
    if len(wanted) == 1 and wanted[0] not in EVIDENCE:
        return ("weight",)
    unknown = [n for n in wanted if n not in EVIDENCE]
    if unknown or not wanted:
        what = f"asks for {unknown[0]!r}" if unknown else "takes no argument"
        hint = closest(unknown[0], EVIDENCE) if unknown else f"Known: {', '.join(EVIDENCE)}."
        raise ArgumentError(f"criterion {name!r} {what}, which is no evidence that a run gathers. {hint}")
    return tuple(wanted)


CRITERIA: Registry[Criterion] = Registry("criterion", Criterion)

_MOVES_WEIGHTS = ("sparsegpt", "obc", "obs")
"""What users may look for here, and find in `reconstruction.py`."""


def as_criterion(criterion: Criterion | str | Callable[..., Tensor]) -> Criterion:
    """A criterion from whatever a user may give: a criterion, a registered name or a plain function.

    Args:
        criterion: the value given.

    Raises:
        ArgumentError: the name is unknown, or the function is no criterion (see `Criterion`).

    Example:
        >>> as_criterion("magnitude").name
        'magnitude'
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        if criterion.lower() in _MOVES_WEIGHTS and criterion not in CRITERIA:
            raise ArgumentError(
                f"{criterion!r} moves the weights that stay too, which no criterion does; call "
                "gossamer.sparsegpt(Sparsifier(model, data=...), sparsity)"
            )
        return CRITERIA[criterion]
    return Criterion(criterion)


def _elementwise(func: Callable[..., Tensor], magnitude: bool = False) -> Criterion:
    name = func.__name__
    return CRITERIA.register(name, Criterion(func, name=name, elementwise=True, magnitude=magnitude))


def _magnitude(func: Callable[..., Tensor]) -> Criterion:
    return _elementwise(func, magnitude=True)


@_elementwise
def random(noise: Tensor) -> Tensor:
    """Chance: the same number for a weight all through a run (the control of every pruning paper)."""
    return noise


@_magnitude
def large_final(weight: Tensor) -> Tensor:
    """|w|: keep the large weights (Han et al. 2015; Zhou et al. 2019, arXiv:1905.01067)."""
    return weight.abs()


magnitude = CRITERIA.register(
    "magnitude", Criterion(large_final.func, name="magnitude", elementwise=True, magnitude=True)
)


@_elementwise
def squared_final(weight: Tensor) -> Tensor:
    """w²: as `large_final` for single weights; over a unit the mean of squares, so that large ones count more."""
    return weight.square()


@_elementwise
def small_final(weight: Tensor) -> Tensor:
    """-|w|: keep the small weights (Zhou et al. 2019)."""
    return weight.abs().neg_()


@_magnitude
def large_init(initial: Tensor) -> Tensor:
    """|w₀|: keep the weights that began large (Zhou et al. 2019)."""
    return initial.abs()


@_elementwise
def small_init(initial: Tensor) -> Tensor:
    """-|w₀|: keep the weights that began small (Zhou et al. 2019)."""
    return initial.abs().neg_()


@_elementwise
def large_init_large_final(weight: Tensor, initial: Tensor) -> Tensor:
    """min(|w|, |w₀|): keep the weights that are large and began large (Zhou et al. 2019, α = 1)."""
    return torch.minimum(weight.abs(), initial.abs())


@_elementwise
def small_init_small_final(weight: Tensor, initial: Tensor) -> Tensor:
    """-max(|w|, |w₀|): keep the weights that are small and began small (Zhou et al. 2019, α = 1)."""
    return torch.maximum(weight.abs(), initial.abs()).neg_()


@_elementwise
def magnitude_increase(weight: Tensor, initial: Tensor) -> Tensor:
    """|w| - |w₀|: keep the weights that grew (Zhou et al. 2019, α = 1)."""
    return weight.abs().sub_(initial.abs())


@_elementwise
def movement(weight: Tensor, initial: Tensor) -> Tensor:
    """|w - w₀|: keep the weights that moved far (Zhou et al. 2019)."""
    return (weight - initial).abs_()


@_elementwise
def movmag(weight: Tensor, initial: Tensor) -> Tensor:
    """|w · (w - w₀)|: keep the weights that are large and moved far (movement × magnitude, after Zhou et al. 2019)."""
    return (weight - initial).mul_(weight).abs_()


@_elementwise
def updating_magnitude_increase(weight: Tensor, previous: Tensor) -> Tensor:
    """|w| - |w'|: as `magnitude_increase`, since the masks last moved."""
    return weight.abs().sub_(previous.abs())


@_elementwise
def updating_movement(weight: Tensor, previous: Tensor) -> Tensor:
    """|w - w'|: as `movement`, since the masks last moved."""
    return (weight - previous).abs_()


@_elementwise
def updating_movmag(weight: Tensor, previous: Tensor) -> Tensor:
    """|w · (w - w')|: as `movmag`, since the masks last moved."""
    return (weight - previous).mul_(weight).abs_()


@_elementwise
def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w · ∂L/∂w|: to first order, the change of the loss if the weight goes (Molchanov et al. 2019,
    arXiv:1906.10771).

    Takes data and a loss.
    """
    return (weight * gradient).abs_()


@_elementwise
def taylor_squared(weight: Tensor, gradient: Tensor) -> Tensor:
    """(w · ∂L/∂w)²: as `taylor` for single weights; over a unit, the paper's sum of squares (Molchanov et al. 2019).

    Takes data and a loss.
    """
    return (weight * gradient).square_()


@_elementwise
def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w · ∂L/∂w| before training, global, with `schedule='constant'` (SNIP, Lee et al. 2019, arXiv:1810.02340).

    Takes data and a loss.
    """
    return (weight * gradient).abs_()


@_elementwise
def grasp(weight: Tensor, hessian_gradient: Tensor) -> Tensor:
    """w · (H·g): keep what the gradient's flow rests on (GraSP, Wang et al. 2020, arXiv:2002.07376; its S with the
    sign turned).

    Takes data and a loss.
    """
    return weight * hessian_gradient


@_elementwise
def synflow(weight: Tensor, flow: Tensor) -> Tensor:
    """|w| · ∂R/∂|w|: the synaptic flow through a weight, of ones through magnitudes (SynFlow, Tanaka et al. 2020,
    arXiv:2006.05467).

    Takes data, of which only the shape counts.
    """
    return weight.abs() * flow


@_elementwise
def fisher(weight: Tensor, gradient_squared: Tensor) -> Tensor:
    """w² · E[(∂L/∂w)²] / 2: optimal brain damage with the empirical Fisher matrix's diagonal (LeCun et al. 1990).

    Takes data and a loss.
    """
    return weight.square().mul_(gradient_squared).mul_(0.5)


@_elementwise
def sanh_movement(accumulated: Tensor) -> Tensor:
    """-Σ w · ∂L/∂w over the steps: keep weights that training moves away from zero (movement pruning, Sanh et al.
    2020, arXiv:2005.07683).

    Takes training steps.
    """
    return accumulated


@_elementwise
def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|w| · ‖x‖₂: magnitude times the norm of its inputs, meant for context `'output'` (Wanda, Sun et al. 2024,
    arXiv:2306.11695).

    Takes data.
    """
    return weight.abs() * input_norm


@_elementwise
def wanda_l1(weight: Tensor, input_mean: Tensor) -> Tensor:
    """|w| · mean|x|: as `wanda`, with the mean magnitude of the inputs.

    Takes data.
    """
    return weight.abs() * input_mean


@_elementwise
def wanda_max(weight: Tensor, input_max: Tensor) -> Tensor:
    """|w| · max|x|: as `wanda`, with the largest input.

    Takes data.
    """
    return weight.abs() * input_max
