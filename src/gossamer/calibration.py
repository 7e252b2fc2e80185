"""How is a network run on data? As it was before it is afterwards: what is gathered meanwhile, `gathering.py` says.

Nothing stays behind: hooks are taken off, the mode, buffers, gradients and random numbers are put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gossamer.errors import ArgumentError, GossamerError, first_line
from gossamer.randomness import random_state, restore_random_state
from gossamer.rules.criteria import OF_DATA, OF_LOSS, Criterion
from gossamer.targets import unwrapped


@dataclass(frozen=True, eq=False)
class Calibration:
    """Data, and how to run it through a network.

    Args:
        model: the network that is run, all of it.
        batches: an iterable of batches, gone through anew each time, or one batch. A batch is a tuple or list of inputs
            and, last, the target; the inputs alone, or one tensor, will do where there is no loss; or a dict of keyword
            arguments. Inputs that are themselves a tuple are several arguments.
        loss_func: (output, target) → loss; for a dict, (output, dict) → loss. None where no criterion asks for one.

    Raises:
        ArgumentError: no network, no batches, or a loss that cannot be called.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> Calibration(net, (torch.ones(4, 2), torch.ones(4, 1)), nn.MSELoss()).loss_func
        MSELoss()
    """

    model: nn.Module
    batches: Any
    loss_func: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ArgumentError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if isinstance(self.batches, (str, bytes)) or not isinstance(self.batches, (Tensor, Mapping, Iterable)):
            raise ArgumentError(
                f"data={self.batches!r} is no batch and no iterable of batches; give a loader, a list of "
                "(input, target) pairs, or one such pair"
            )
        if isinstance(self.batches, Iterator):
            raise ArgumentError(
                f"data is a {type(self.batches).__name__}, which can be gone through once only; give a list or a loader"
            )
        if self.loss_func is not None and not callable(self.loss_func):
            raise ArgumentError(
                f"loss_func={self.loss_func!r} cannot be called; give (output, target) → loss, such as "
                "nn.CrossEntropyLoss()"
            )

    def __iter__(self) -> Iterator[Any]:
        """The batches, on the network's device."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        several = self.batches
        if isinstance(several, (Tensor, Mapping)) or (
            isinstance(several, (list, tuple)) and any(isinstance(part, Tensor) for part in several)
        ):
            several = [several]
        empty = True
        for batch in several:
            empty = False
            if not isinstance(batch, Sized) or (isinstance(batch, Tensor) and not batch.ndim):
                raise ArgumentError(
                    f"data has a batch {batch!r}; a batch is a tensor, a tuple of inputs and target, or a dict of "
                    "keyword arguments"
                )
            yield pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
        if empty:
            raise ArgumentError("data has no batch in it; give at least one, in a list or a loader")

    def output(self, batch: Any, call: Callable[..., Any] | None = None) -> Any:
        """What the network makes of a batch's inputs; `call` takes the network's place.

        Raises:
            ArgumentError: the network does not run on them.
        """
        args, kwargs = _inputs(batch)
        try:
            return (call or unwrapped(self.model))(*args, **kwargs)
        except (GossamerError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's forward may fail in any way at all
            raise ArgumentError(
                f"{type(self.model).__name__} does not run on data with inputs {_told(args, kwargs)} "
                f"({first_line(error)}); give batches of what it takes"
            ) from error

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch, a 0-d tensor.

        Raises:
            ArgumentError: the network does not run on the batch, it has no target or one that the loss does not take,
                or the loss is no single number, or has no gradient.
        """
        assert self.loss_func is not None
        if not isinstance(batch, Mapping) and (isinstance(batch, Tensor) or len(batch) < 2):
            raise ArgumentError("data has batches without a target, which a loss needs; give (input, target) pairs")
        output, target = self.output(batch), batch if isinstance(batch, Mapping) else batch[-1]
        try:
            loss: Any = self.loss_func(output, target)
        except (GossamerError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's loss as well
            raise ArgumentError(
                f"loss_func does not take output {_shape(output)} and target {_shape(target)} ({first_line(error)}); "
                "give data with the targets that it takes"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ArgumentError(f"loss_func gives {got}, and a criterion needs one number; reduce it with .mean()")
        if not loss.requires_grad:
            raise ArgumentError(
                "loss_func gives a loss without a gradient; compute it from the output it is given, without .detach(), "
                ".item() or torch.no_grad()"
            )
        return loss.reshape(())


def _inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    inputs = tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
    return (tuple(inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)) else inputs), {}


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_shape(v)}" for k, v in cast("Mapping[Any, Any]", value).items()) + "}"
    return f"of type {type(value).__name__}"


def _told(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join([*map(_shape, args), *(f"{k} {_shape(v)}" for k, v in kwargs.items())]) or "that are none"


def as_calibration(model: nn.Module, data: Any, loss_func: Callable[..., Tensor] | None) -> Calibration | None:
    """Data from whatever a user may give: None, batches, or a `Calibration`.

    Args:
        model: the network that batches are run through.
        data: the value given.
        loss_func: (output, target) → loss, or None.

    Raises:
        ArgumentError: a loss that belongs to no data, or data that cannot be used.

    Example:
        >>> as_calibration(nn.Linear(2, 1), None, None)
    """
    if isinstance(data, Calibration):
        if loss_func is not None:
            raise ArgumentError("loss_func beside a Calibration, which has one of its own; leave it out")
        return data
    if data is None:
        if loss_func is not None:
            raise ArgumentError("loss_func without data; give data=, batches of inputs and targets, too")
        return None
    return Calibration(model, data, loss_func)


def check_data(criterion: Criterion, calibration: Calibration | None) -> None:
    """Makes sure that there is the data that a criterion looks at.

    Raises:
        ArgumentError: there is none, or no loss for it.

    Example:
        >>> from gossamer.rules.criteria import as_criterion
        >>> check_data(as_criterion("large_final"), None)
    """
    wants = [kind for kind in criterion.needs if kind in OF_DATA]
    if wants and calibration is None:
        loss = " and loss_func=" if OF_LOSS & set(wants) else ""
        raise ArgumentError(
            f"criterion {criterion.name!r} looks at the network's {wants[0]}, which takes data; give data=, batches of "
            f"inputs{' and targets,' if loss else ''}{loss}"
        )
    if OF_LOSS & set(wants) and calibration is not None and calibration.loss_func is None:
        raise ArgumentError(
            f"criterion {criterion.name!r} looks at the {wants[0]} of a loss; give loss_func=(output, target) → loss"
        )


@contextlib.contextmanager
def undisturbed(model: nn.Module, evaluate: bool) -> Generator[None]:
    """Lets a network run, and leaves its mode, its buffers and the random numbers as they were.

    Args:
        model: the network.
        evaluate: whether it runs in evaluation mode; else in the mode that it is in.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with undisturbed(net, evaluate=False):
        ...     _ = net(torch.randn(4, 2))
        >>> net.training, net.running_mean.tolist()
        (True, [0.0, 0.0])
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    random = random_state()
    if evaluate:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                now = module._buffers.get(name)
                # Replaced, as a running mean is by some; of another shape it is a table that has grown, and stays.
                if now is not buffer and now is not None and now.shape == buffer.shape:
                    module._buffers[name] = buffer
        restore_random_state(random)


@contextlib.contextmanager
def watching(modules: Iterable[nn.Module], look: Callable[[nn.Module, Tensor], None]) -> Generator[None]:
    """Shows the inputs of layers to a function while a network runs; the hooks are gone afterwards.

    Args:
        modules: the layers.
        look: gets a layer and its input.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> with watching([net], lambda module, x: print(x.shape)):
        ...     _ = net(torch.ones(3, 2))
        torch.Size([3, 2])
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            look(module, args[0] if args else kwargs["input"])

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def over_ranks(tensor: Tensor, maximum: bool = False) -> Tensor:
    """The sum of a tensor over all ranks, in place, so that all choose the same masks; or the maximum.

    Example:
        >>> over_ranks(torch.ones(1))
        tensor([1.])
    """
    if n_ranks() > 1:
        torch.distributed.all_reduce(
            tensor, torch.distributed.ReduceOp.MAX if maximum else torch.distributed.ReduceOp.SUM
        )
    return tensor


def n_ranks() -> int:
    """How many processes train together.

    Example:
        >>> n_ranks()
        1
    """
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1
