"""A network from what a command line can say: a compiled network's file, or a function that makes one."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import runtime
from gossamer.errors import ArgumentError, closest, first_line
from gossamer.runtime import CompiledModel
from gossamer.runtime.inputs import arguments_of

_FACTORY = re.compile(r"[\w.]+:[\w.]+")


@dataclass(frozen=True)
class Source:
    """A network, and what goes in.

    Args:
        model: as it is, in eval mode; or compiled, from a file.
        examples: the arguments.
    """

    model: nn.Module | CompiledModel
    examples: tuple[Any, ...]

    @property
    def plain(self) -> nn.Module:
        """The network in plain PyTorch."""
        return self.model.reference() if isinstance(self.model, CompiledModel) else self.model


def network_from(text: str, shapes: Sequence[str] = ()) -> Source:
    """The network that a word names.

    Args:
        text: a file that `fast.save(path)` wrote; or 'module:factory', imported from the working directory, which gives
            a module, or a module and example inputs: a tensor, several, or a dict by the names of its arguments.
        shapes: of the inputs, such as '1,3,224,224', one an input; needed where there are no example inputs.

    Returns:
        The network and its inputs. With shapes, examples are repeated or cut to them; where there is none, numbers are
        drawn from N(0, 1).

    Raises:
        ArgumentError: no such file, module or factory; no network; inputs that cannot be made.
        FileError: a file that holds no compiled network.

    Example:
        >>> source = network_from("torch.nn:ReLU", ["2,3"])
        >>> source.model, source.examples[0].shape
        (ReLU(), torch.Size([2, 3]))
    """
    sizes = [_shape(shape) for shape in shapes]
    if os.path.exists(text):
        if text.endswith(".py"):
            raise ArgumentError(f"{text!r} is a program; name a function in it, as in '{_module(text)}:make_network'")
        fast = runtime.load(text)
        return Source(fast, _shaped(fast.examples, sizes))
    if not _FACTORY.fullmatch(text):
        raise ArgumentError(
            f"{text!r} is no file that is there, and not of the form module:factory; give a file that fast.save(path) "
            "wrote, or for instance torchvision.models:resnet18 with --shape 1,3,224,224"
        )
    made = _made(text)
    given: tuple[Any, ...] = ()
    if isinstance(made, tuple | list) and len(made) == 2:
        made, inputs = made
        given = tuple(inputs) if isinstance(inputs, list) else arguments_of(made, inputs)
    if not isinstance(made, nn.Module):
        hint = "; give its .model" if hasattr(made, "model") else ""
        raise ArgumentError(
            f"{text} gives a {type(made).__name__}, not a torch.nn.Module, nor one with example inputs{hint}"
        )
    if not given and not sizes:
        raise ArgumentError(
            f"{text} gives no example inputs; say what goes in with --shape, such as --shape 1,3,224,224, or let it "
            "give (module, example inputs)"
        )
    return Source(made if isinstance(made, CompiledModel) else made.eval().cpu(), _shaped(given, sizes))


def _made(text: str) -> Any:
    module, _, path = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ArgumentError(f"{text}: importing {module} failed: {error}") from error
        raise ArgumentError(f"{text}: there is no module {error.name!r} here, nor installed") from None
    except Exception as error:
        raise ArgumentError(f"{text}: importing {module} failed: {type(error).__name__}: {error}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            near = closest(name, (n for n in dir(found) if not n.startswith("_")))
            raise ArgumentError(f"{text}: {getattr(found, '__name__', module)} has no {name!r}. {near}")
        found = getattr(found, name)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise ArgumentError(
            f"{text} was called without arguments and failed: {type(error).__name__}: {first_line(error)}"
        ) from error


def _module(path: str) -> str:
    return os.path.relpath(path).removesuffix(".py").replace(os.sep, ".")


def _shape(text: str) -> tuple[int, ...]:
    parts = re.split(r"[,x×]", text.strip("()[] "))
    if not all(p.strip().isdigit() and int(p) for p in parts):
        raise ArgumentError(f"--shape {text}: give positive numbers with commas between, such as 1,3,224,224")
    return tuple(int(p) for p in parts)


def _shaped(examples: tuple[Any, ...], shapes: Sequence[tuple[int, ...]]) -> tuple[Any, ...]:
    """Examples of other shapes: with the values that they have, since not every number is an input."""
    if not shapes:
        return examples
    if not examples:
        return tuple(torch.randn(shape) for shape in shapes)
    tensors = [i for i, e in enumerate(examples) if isinstance(e, Tensor)]
    if len(shapes) != len(tensors):
        raise ArgumentError(
            f"--shape was given {len(shapes)} times, and the network has {len(tensors)} inputs; give one each"
        )
    shaped = list(examples)
    for i, shape in zip(tensors, shapes, strict=True):
        flat = examples[i].flatten()
        shaped[i] = flat.repeat(-(-math.prod(shape) // max(len(flat), 1)))[: math.prod(shape)].reshape(shape)
    return tuple(shaped)
