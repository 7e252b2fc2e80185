"""What does an optimizer remember of a weight? And how many steps does it make?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.errors import ArgumentError


class HasState(Protocol):
    """What is asked of an optimizer: per-parameter state, as torch.optim and fastai keep it."""

    @property
    def state(self) -> Any: ...


class LooksAtSteps(Protocol):
    """What wants to see the gradients of a step before they are used."""

    def before_step(self) -> None: ...


def watched(optimizer: HasState | None, run: LooksAtSteps) -> RemovableHandle | None:
    """Has an optimizer of PyTorch's call a run's `before_step` right before each step, for as long as the run is there.

    Args:
        optimizer: another one than PyTorch's is not watched; whoever steps it calls `before_step`.
        run: it is not kept alive.

    Returns:
        What ends it; None where nothing is watched.

    Example:
        >>> watched(None, None) is None
        True
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    there = weakref.ref(run)

    def before(*_: Any) -> None:
        alive = there()
        if alive is not None:
            alive.before_step()

    return optimizer.register_step_pre_hook(before)


def optimizer_tensors(optimizer: HasState | None) -> Callable[[Tensor], list[Tensor]]:
    """Where to find what an optimizer remembers of each weight of a parameter.

    Args:
        optimizer: a torch.optim.Optimizer, a fastai Optimizer or OptimWrapper, or None.

    Returns:
        Parameter → its floating-point state tensors of its own shape (momentum, moments, the slow weights of
        Lookahead); a scalar step is none.

    Example:
        >>> import torch
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


def check_optimizer(optimizer: HasState | None, model: nn.Module | None = None) -> None:
    """Makes sure that there is an optimizer, torch's or fastai's, or none.

    Args:
        optimizer: what was given for one.
        model: the network that is to be cut, of which it has to hold some parameter; None where none is cut.

    Raises:
        ArgumentError: it is something else, holds the parameters of another network, or cannot be cut along.

    Example:
        >>> check_optimizer(None)
        >>> net, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> check_optimizer(torch.optim.SGD(net.parameters()), net)
        >>> check_optimizer(torch.optim.SGD(other.parameters()), net)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        gossamer.errors.ArgumentError: optimizer, a SGD, holds no parameter of Linear; give the one that trains it, ...
    """
    if optimizer is None:
        return
    inner: Any = getattr(optimizer, "opt", optimizer)
    if not isinstance(getattr(inner, "state", None), Mapping):
        given = repr(optimizer) if isinstance(optimizer, str) else f"a {type(optimizer).__name__}"
        raise ArgumentError(
            f"optimizer is {given}, which has no state to keep zero; give the torch.optim.Optimizer itself, or None"
        )
    if model is None:
        return
    if isinstance(inner, torch.optim.LBFGS):
        raise ArgumentError(
            "optimizer is an LBFGS, which remembers all parameters as one row, so that nothing can be cut out; use "
            "another, or None, and make it anew when filters are gone"
        )
    groups = getattr(inner, "param_groups", None)  # torch's; fastai's has lists
    lists: Iterable[Iterable[Tensor]] | None = (
        getattr(inner, "param_lists", None) if groups is None else [g["params"] for g in groups]
    )
    own = {id(p) for p in model.parameters()}
    if lists is not None and own.isdisjoint(id(p) for params in lists for p in params):
        raise ArgumentError(
            f"optimizer, a {type(inner).__name__}, holds no parameter of {type(model).__name__}; give the one that "
            "trains it, made from its parameters(), or None"
        )


def gradient_factor(optimizer: HasState | None) -> Tensor | None:
    """What gradients are to be multiplied with right before a step that itself undoes a GradScaler's scale.

    A fused optimizer gets scaled gradients, which may have overflowed, and the scale beside them; the others get them
    unscaled, and are not called at all after an overflow.

    Args:
        optimizer: that is about to step.

    Returns:
        A 0-d tensor: 1 over the scale, or 0 where the step will do nothing; None where gradients are as they should be.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
        >>> gradient_factor(sgd)
        >>> sgd.grad_scale, sgd.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        >>> gradient_factor(sgd)
        tensor(0.2500)
    """
    inner = getattr(optimizer, "opt", optimizer)
    scale: Tensor | None = getattr(inner, "grad_scale", None)
    overflow: Tensor | None = getattr(inner, "found_inf", None)
    if overflow is None:
        return None
    factor = torch.ones_like(overflow) if scale is None else scale.reciprocal()
    return torch.where(overflow.to(factor.device) > 0, 0.0, factor)


def forget(optimizer: HasState | None, parameters: Iterable[Tensor]) -> None:
    """Drops what an optimizer remembers of parameters, as if it had never stepped.

    Args:
        optimizer: as in `optimizer_tensors`.
        parameters: whose moments and step counts go. Settings that fastai keeps beside them stay. The slow weights of
            Lookahead become what the parameters are now.

    Example:
        >>> import torch
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
