"""Where the random numbers stand: Python's, NumPy's and PyTorch's, taken and put back together."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from gossamer.errors import ArgumentError


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
    """The state of a `random.Random`, or of Python's global one (the module).

    Example:
        >>> own = random.Random(1); before = generator_state(own); drawn = own.random()
        >>> restore_generator(own, before); own.random() == drawn
        True
    """
    version, words, gauss = generator.getstate()
    return {"version": version, "words": np.array(words, dtype=np.int64), "gauss": gauss}


def restore_generator(generator: Any, state: dict[str, Any]) -> None:
    """Puts back what `generator_state` took."""
    generator.setstate((state["version"], tuple(int(w) for w in state["words"]), state["gauss"]))
