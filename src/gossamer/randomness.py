"""Where the random numbers stand: Python's, NumPy's and PyTorch's, taken and put back together."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from gossamer.errors import ArgumentError

GENERATORS = (random.Random, torch.Generator, np.random.Generator, np.random.RandomState)
"""What draws random numbers of its own."""


def random_state() -> dict[str, Any]:
    """The state of all global generators, as something that `save_state` can write.

    Example:
        >>> before = random_state(); drawn = torch.rand(1); restore_random_state(before)
        >>> bool(torch.rand(1) == drawn)
        True
    """
    state: dict[str, Any] = {"python": generator_state(random), "torch": torch.get_rng_state()}
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state["numpy"] = {"name": name, "keys": np.asarray(keys), "rest": [position, has_gauss, gauss]}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` took; a device that is not there is left out.

    Raises:
        ArgumentError: it is something else.
    """
    check_random_state(state)
    _restore(state)


def _restore(state: dict[str, Any]) -> None:
    restore_generator(random, state["python"])
    torch.set_rng_state(state["torch"])
    np.random.set_state((state["numpy"]["name"], state["numpy"]["keys"], *state["numpy"]["rest"]))
    for device, there in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(there, device)


def check_random_state(state: dict[str, Any]) -> None:
    """Makes sure that something came from `random_state`.

    Raises:
        ArgumentError: it did not.
    """
    kinds = {"python": dict, "numpy": dict, "torch": torch.Tensor}
    lacking = next((name for name, kind in kinds.items() if not isinstance(state.get(name), kind)), None)
    if lacking is not None:
        raise ArgumentError(
            f"no random_state(): it lacks {lacking!r}; give the part of the saved state that it was put in"
        )
    before = random_state()
    try:
        _restore(state)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise ArgumentError(f"a damaged random_state() ({error!r}); take another copy") from None
    finally:
        _restore(before)


def generator_state(generator: Any) -> dict[str, Any]:
    """The state of a `random.Random`, of Python's global one (the module), or of a generator of NumPy or PyTorch.

    Example:
        >>> own = random.Random(1); before = generator_state(own); drawn = own.random()
        >>> restore_generator(own, before); own.random() == drawn
        True
    """
    if isinstance(generator, torch.Generator):
        return {"torch": generator.get_state()}
    if isinstance(generator, np.random.Generator):
        return {"numpy": generator.bit_generator.state}
    if isinstance(generator, np.random.RandomState):
        return {"numpy": generator.get_state(legacy=False)}
    version, words, gauss = generator.getstate()
    return {"version": version, "words": np.array(words, dtype=np.int64), "gauss": gauss}


def restore_generator(generator: Any, state: dict[str, Any]) -> None:
    """Puts back what `generator_state` took.

    Raises:
        KeyError: it is of a generator of another kind.
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(state["torch"])
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state["numpy"]
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state["numpy"])
    else:
        generator.setstate((state["version"], tuple(int(w) for w in state["words"]), state["gauss"]))


def check_generator_state(state: dict[str, Any]) -> None:
    """Makes sure that something came from `generator_state`.

    Raises:
        KeyError: it did not.
        TypeError: nor is it of its kind.

    Example:
        >>> check_generator_state({"torch": torch.Generator().get_state()})
    """
    if "torch" in state:
        restore_generator(torch.Generator(), state)
    elif "numpy" in state:
        kind: Any = getattr(np.random, state["numpy"]["bit_generator"], None)
        if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
            raise TypeError(f"numpy has no generator {state['numpy']['bit_generator']!r}")
        kind().state = state["numpy"]
    else:
        restore_generator(random.Random(), state)
