"""Example inputs: given, or guessed from the network's first layer; and a network run on them, undisturbed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gossamer.errors import ArgumentError

_PIXELS = 224  # what most image networks are made for
_CONVS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def as_inputs(model: nn.Module, example_inputs: Any = None) -> tuple[Any, ...]:
    """Arguments of a forward pass, on the network's device.

    Args:
        model: the network.
        example_inputs: a tensor, or several of them; None guesses one from the first layer: an image of 224×224 pixels
            with as many channels as the first convolution takes, or a row of the first Linear layer's features.

    Raises:
        ArgumentError: the network is none or lazy, the input is empty, or it cannot be guessed.

    Example:
        >>> as_inputs(nn.Linear(3, 1))[0].shape
        torch.Size([2, 3])
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ArgumentError(f"{lazy!r} is lazy and has no shape yet; run one batch through the network first")
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if isinstance(example_inputs, (Mapping, str, bytes)):
        raise ArgumentError(
            f"example_inputs={example_inputs!r} is a {type(example_inputs).__name__}; give a tensor, or a tuple of "
            "what forward takes, in order"
        )
    if example_inputs is None:
        return (_guess(model).to(device),)
    given = tuple(example_inputs) if isinstance(example_inputs, Sequence) else (example_inputs,)
    if not any(isinstance(item, Tensor) for item in given):
        kind = type(example_inputs).__name__
        raise ArgumentError(
            f"example_inputs, a {kind}, holds no tensor; give one batch, such as xb[:2], or torch.from_numpy(…)"
        )
    empty = next((item for item in given if isinstance(item, Tensor) and not item.numel()), None)
    if empty is not None:
        raise ArgumentError(
            f"example_inputs of shape {tuple(empty.shape)} hold nothing; give one batch with an example in it, such as "
            "xb[:2]"
        )
    return tuple(item.detach().to(device) if isinstance(item, Tensor) else item for item in given)


def _guess(model: nn.Module) -> Tensor:
    for module in model.modules():
        for kind, dims in _CONVS.items():
            if isinstance(module, kind):
                return torch.rand(2, module.in_channels, *[_PIXELS if dims < 3 else 32] * dims, generator=_generator())
        if isinstance(module, nn.Linear):
            return torch.rand(2, module.in_features, generator=_generator())
    raise ArgumentError(
        f"what {type(model).__name__} takes cannot be guessed, as it begins with no convolution or Linear layer; give "
        "example_inputs, such as one batch"
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def twin_of(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, to try things on."""
    return copy.deepcopy(model).eval()


def outputs_of(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """Every tensor that a network gives for inputs, without gradients and without a change of the random numbers.

    Raises:
        ArgumentError: the forward pass fails on them.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return tensors_in(model(*inputs))
    except Exception as error:  # the user's forward may fail in any way at all
        shapes = ", ".join(str(tuple(i.shape)) if isinstance(i, Tensor) else repr(i) for i in inputs)
        raise ArgumentError(
            f"{type(model).__name__} does not run on example_inputs of shape {shapes} ({type(error).__name__}: {error})"
            "; give example_inputs that it takes, such as one batch"
        ) from error


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an output: alone, in a list, tuple, dict or dataclass-like mapping.

    Example:
        >>> len(tensors_in({"a": torch.ones(1), "b": [torch.ones(2)]}))
        2
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item)]
    return []
