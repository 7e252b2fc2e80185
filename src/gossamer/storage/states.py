"""A state – nested dicts and lists of tensors, numbers and strings – as one safetensors file, without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ArgumentError, FileError
from gossamer.storage.tensors import load_tensors, save_tensors

_FORMAT, _VERSION = "gossamer-state", 1
_PLAIN = (bool, int, float, str)


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any], kind: str = "state") -> Path:
    """Writes a state to a safetensors file, whole or not at all.

    Whatever `state_dict()` of a network, of an optimizer or of a run gives can be part of it: dicts, lists, tuples,
    tensors, numbers, strings and None, nested at will. Numbers come back exactly, and so do tensors, bit for bit.

    Args:
        path: the file.
        state: what to write.
        kind: what it is, checked by `load_state`.

    Returns:
        The path.

    Raises:
        ArgumentError: something in it is none of these; the message says where it is.

    Example:
        >>> import tempfile
        >>> path = save_state(Path(tempfile.mkdtemp()) / "run.safetensors", {"epoch": 3, "model": {"w": torch.ones(2)}})
        >>> load_state(path)["model"]["w"]
        tensor([1., 1.])
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "state", tensors)
    return save_tensors(
        path, tensors, {"format": _FORMAT, "version": str(_VERSION), "kind": kind, "tree": json.dumps(tree)}
    )


def load_state(path: str | os.PathLike[str], kind: str = "state") -> dict[str, Any]:
    """Reads what `save_state` wrote; nothing is unpickled, nothing is run.

    Args:
        path: the file.
        kind: what it must be.

    Returns:
        The state, its tensors on the CPU.

    Raises:
        FileError: no such file, not a whole one, of another kind, or of a newer version.
    """
    tensors, metadata = load_tensors(path)
    name = repr(os.fspath(path))
    if metadata.get("format") != _FORMAT:
        raise FileError(f"{name} is a safetensors file, but holds no state; states come from save_state")
    if metadata.get("version") != str(_VERSION):
        raise FileError(
            f"{name} is a state of version {metadata.get('version')}; this Gossamer reads version {_VERSION}, so "
            "install a newer one"
        )
    if metadata.get("kind") != kind:
        raise FileError(f"{name} holds a {metadata.get('kind')}, and a {kind} is needed; give another file")
    try:
        state = _unflatten(json.loads(metadata["tree"]), tensors)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileError(f"{name} has a header that does not fit its tensors ({error!r}); take another copy") from None
    if not isinstance(state, dict):
        raise FileError(f"{name} holds no dict at its top; take another copy")
    return cast("dict[str, Any]", state)


def _flatten(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {"t": key}
    if isinstance(value, np.ndarray):
        key = str(len(tensors))
        try:
            tensors[key] = torch.from_numpy(np.ascontiguousarray(value))
        except TypeError:
            raise ArgumentError(f"{where} is an array of {value.dtype}, which safetensors cannot hold") from None
        return {"n": key}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        pairs = [(_key(k, where), _flatten(v, f"{where}[{k!r}]", tensors)) for k, v in mapping.items()]
        return {"d": pairs}
    if isinstance(value, Sequence):
        items = [_flatten(v, f"{where}[{i}]", tensors) for i, v in enumerate(cast("Sequence[Any]", value))]
        return {"u": items} if isinstance(value, tuple) else items
    raise ArgumentError(
        f"{where} is a {type(value).__name__}, which a state file cannot hold; it takes dicts, lists, tuples, tensors, "
        "arrays, numbers, strings and None"
    )


def _key(key: Any, where: str) -> str | int:
    if isinstance(key, (str, int)) and not isinstance(key, bool):
        return key
    raise ArgumentError(f"{where} has the key {key!r}; keys are strings or whole numbers")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unflatten(item, tensors) for item in cast("list[Any]", tree)]
    if not isinstance(tree, dict):
        return tree
    ((tag, content),) = cast("dict[str, Any]", tree).items()
    readers: dict[str, Callable[[Any], Any]] = {
        "t": lambda key: tensors[key],
        "n": lambda key: tensors[key].numpy(),
        "u": lambda items: tuple(_unflatten(item, tensors) for item in items),
        "d": lambda pairs: {key: _unflatten(item, tensors) for key, item in pairs},
    }
    return readers[tag](content)
