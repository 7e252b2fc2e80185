"""What do other callbacks carry from epoch to epoch? Numbers, lists, tensors and networks, taken down and put back."""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from fastai.callback.core import TrainEvalCallback
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner, Recorder
from fastcore.foundation import L
from torch import Tensor, nn

from gossamer.errors import GossamerWarning
from gossamer.integrations.fastai.followers import Traceless
from gossamer.randomness import GENERATORS

_FASTAI = ("run", "run_train", "run_valid", "order", "learn")  # what fastai steers a callback by
_OWN = (TrainEvalCallback, ProgressCallback, Recorder)


class _UnknownError(Exception):
    """Something that a file of tensors and numbers does not hold."""


def bystanders(learn: Learner) -> dict[str, Any]:
    """The callbacks that are neither fastai's machinery nor ours, by a name each, also where two are of one class."""
    seen: dict[str, int] = {}
    named: dict[str, Any] = {}
    for cb in learn.cbs:
        # Of ours only the one that saves models has something to keep.
        if isinstance(cb, _OWN) or (isinstance(cb, Traceless) and not isinstance(cb, SaveModelCallback)):
            continue
        seen[cb.name] = seen.get(cb.name, 0) + 1
        named[f"{cb.name} {seen[cb.name]}"] = cb
    return named


def has_state(cb: Any) -> bool:
    """Whether a callback sees to its own state."""
    # On the class: fastai looks up what a callback lacks in the learner, and then in the model.
    return hasattr(type(cb), "state_dict") and hasattr(type(cb), "load_state_dict")


def fingerprints(learn: Learner) -> dict[str, dict[str, str]]:
    """What each callback carries, as a few letters that tell whether it has changed."""
    return {name: {k: _digest(v) for k, v in values.items()} for name, values in _carried(learn).items()}


def changed(learn: Learner, before: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """What has changed since, of what callbacks without a `state_dict` carry.

    Args:
        learn: between two epochs.
        before: `fingerprints` of the callbacks when the fit began.

    Returns:
        Callback → attribute → something that `save_state` can write.
    """
    different = {
        name: {k: v for k, v in values.items() if before.get(name, {}).get(k) != _digest(v)}
        for name, values in _carried(learn).items()
    }
    return {name: values for name, values in different.items() if values}


def put_back(learn: Learner, carried: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives callbacks what `changed` took: in place where they have it, so that whoever else holds it sees it too."""
    device = next((p.device for p in cast(nn.Module, learn.model).parameters()), torch.device("cpu"))
    for name, cb in bystanders(learn).items():
        for key, value in carried.get(name, {}).items():
            if not has_state(cb) and key not in _FASTAI and not hasattr(type(cb), key) and _is_storable(value):
                _put(cb, key, value, device)


def warn_of_the_rest(learn: Learner) -> None:
    """Says what callbacks carry that no checkpoint takes."""
    for name, cb in bystanders(learn).items():
        for key, value in () if has_state(cb) else vars(cb).items():
            if _is_lost(value, learn):
                warnings.warn(
                    f"callback {name.rsplit(' ', 1)[0]!r} holds {key!r} (a {type(value).__name__}), which a checkpoint "
                    "does not take, so a resumed fit starts it anew; give the callback state_dict() and "
                    "load_state_dict() if it matters",
                    GossamerWarning,
                    stacklevel=2,
                )


def _carried(learn: Learner) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    taken = _storages(cast(nn.Module, learn.model))
    for name, cb in bystanders(learn).items():
        values = found.setdefault(name, {})
        for key, value in () if has_state(cb) else vars(cb).items():
            if key not in _FASTAI:
                try:
                    values[key] = _storable(value, taken)
                except _UnknownError:
                    continue
    return found


def _storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def _storable(value: Any, taken: set[int], depth: int = 0) -> Any:
    """A value as a file holds it: numbers, None, tensors, arrays, and lists and dicts of them."""
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Tensor):
        # What is the network's own is in the file already, and what is on its way through it is gone by then.
        if (
            value.is_meta
            or value.grad_fn is not None
            or (value.numel() and value.untyped_storage().data_ptr() in taken)
        ):
            raise _UnknownError
        return value.detach().as_subclass(Tensor)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return value
    if isinstance(value, nn.Module) and not depth and not _storages(value) & taken:
        state = value.state_dict()
        if state and all(isinstance(t, Tensor) for t in state.values()):
            return dict(state)
    if depth < 5 and isinstance(value, Mapping) and all(isinstance(k, (str, int)) for k in cast("Any", value)):
        return {k: _storable(v, taken, depth + 1) for k, v in cast("Any", value).items()}
    if depth < 5 and isinstance(value, (list, tuple, L, deque)):
        items = [_storable(v, taken, depth + 1) for v in cast("Iterable[Any]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise _UnknownError


def _is_storable(value: Any) -> bool:
    try:
        _storable(value, set())
    except _UnknownError:
        return False
    return True


def _is_lost(value: Any, learn: Learner) -> bool:
    if isinstance(value, nn.Module):
        inside = {id(m) for m in cast(nn.Module, learn.model).modules()}
        shared = bool(_storages(value) & _storages(cast(nn.Module, learn.model)))
        return (
            id(value) not in inside and not shared and any(True for _ in value.parameters()) and not _is_storable(value)
        )
    if isinstance(value, (set, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, *GENERATORS)):
        return bool(value) if isinstance(value, set) else True
    if isinstance(value, Mapping):
        value = tuple(cast("Any", value).values())
    return (
        isinstance(value, (list, tuple, L, deque))
        and any(isinstance(v, (float, Tensor, np.ndarray)) for v in cast("Iterable[Any]", value))
        and not _is_storable(tuple(cast("Iterable[Any]", value)))
    )


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=12)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict):
        for key, item in cast("Any", value).items():
            _feed(digest, repr(key))
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        for item in cast("Any", value):
            _feed(digest, item)
    else:
        digest.update(repr(value).encode())


def _put(cb: Any, key: str, value: Any, device: torch.device) -> None:
    now = vars(cb).get(key)
    if isinstance(now, nn.Module):
        if isinstance(value, dict):
            now.load_state_dict(cast("dict[str, Any]", value), strict=False)
        return
    if isinstance(now, Tensor) and isinstance(value, Tensor):
        if now.shape == value.shape and now.dtype == value.dtype:
            with torch.no_grad():
                now.copy_(value)
        else:
            vars(cb)[key] = value.to(now.device)
        return
    value = _on(value, device)
    if isinstance(now, dict) and isinstance(value, dict):
        now.clear()
        now.update(value)
    elif isinstance(now, (list, deque)) and isinstance(value, list):
        now.clear()
        now.extend(cast("list[Any]", value))
    elif isinstance(now, L) and isinstance(value, list):
        vars(cb)[key] = L(value)
    elif now is None or isinstance(now, (bool, int, float, np.generic, tuple, np.ndarray)):
        vars(cb)[key] = value


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _on(v, device) for k, v in cast("Any", value).items()}
    if isinstance(value, (list, tuple)):
        return type(cast("Any", value))(_on(v, device) for v in cast("Any", value))
    return value
