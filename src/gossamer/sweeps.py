"""Masking and selection in few passes over the weights, compiled.

Each function says that it could not where the library was not built, or where tensors do not lie in memory as it needs
them; whoever calls has the twin at hand: `zero_masked`, and `survey` with `take` in rules/selection.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from gossamer.native import Group, Sweep, native
from gossamer.rules.selection import Hint, hint_after

_SIZES = frozenset((1, 2, 4, 8))
# As src/native/gossamer.h numbers them.
_MAGNITUDES = MappingProxyType({torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3})
_SCORES = MappingProxyType({torch.float32: 4, torch.float64: 5})
_BEST = 0  # instruction set


@dataclass(frozen=True)
class Units:
    """The units of a layer, on their way through a compiled selection.

    Args:
        scores: one a unit, or where they are magnitudes, the weights themselves.
        is_magnitude: whether the scores are the absolute values of what `scores` holds.
        kept: bool, one a unit; written to.
        n_kept: how many of these are True.
        tensors: with one element a unit, to be zero where the mask is False. The weights may be among them.
        least: how many units are to be kept.
    """

    scores: Tensor
    is_magnitude: bool
    kept: Tensor
    n_kept: int
    tensors: Sequence[Tensor] = ()
    least: int = 0


def zero(kept: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Sets tensors to zero where a mask is False, in place, if it can.

    Args:
        kept: bool.
        tensors: of the mask's shape.

    Returns:
        Whether it did.

    Example:
        >>> weight = torch.tensor([1.0, 2.0])
        >>> zero(torch.tensor([False, True]), [weight]) in (True, False)
        True
    """
    library = native()
    if library is None or not _are_plain(kept, tensors):
        return False
    if library.gossamer_zero(_sweep(kept, tensors), torch.get_num_threads(), _BEST):
        return False
    _note_written(tensors)
    return True


@dataclass(frozen=True)
class Competition:
    """Layers that compete for what is to be masked.

    Args:
        layers: the layers' units; ties go in their order, and by position.
        need: how many units shall go, in all layers together; at least 1.
        hint: from the last time, where there was one.
    """

    layers: Sequence[Units]
    need: int
    hint: Hint | None = None


@dataclass(frozen=True)
class Dropped:
    """What went in a competition.

    Args:
        counts: for each layer, how many units.
        hint: for the next time; None where nothing can be said.
    """

    counts: list[int]
    hint: Hint | None


def drop(competitions: Sequence[Competition], whole: bool = False) -> list[Dropped | None]:
    """Masks the lowest kept units in each competition, and zeroes what is masked.

    Args:
        competitions: no layer is in two of them.
        whole: nothing is done where something cannot be, or where a magnitude is nan or infinite.

    Returns:
        What went in each; None where it could not be done: then no mask has changed there.

    Example:
        >>> kept = torch.tensor([True, True, True])
        >>> (done,) = drop([Competition([Units(torch.tensor([3.0, 1.0, 1.0]), False, kept, 3)], need=1)])
        >>> done is None or kept.tolist() == [True, False, True]
        True
    """
    library = native()
    if library is None:
        return [None] * len(competitions)
    fitting = [i for i, c in enumerate(competitions) if all(_fits(layer) for layer in c.layers)]
    if whole and len(fitting) < len(competitions):
        return [None] * len(competitions)
    groups = (Group * len(fitting))(*(_group_of(competitions[i]) for i in fitting))
    library.gossamer_drop(groups, len(fitting), torch.get_num_threads(), _BEST, whole)
    done: list[Dropped | None] = [None] * len(competitions)
    for i, group in zip(fitting, groups, strict=True):
        for layer in competitions[i].layers:
            _note_written(layer.tensors)
        if not group.failed:
            counts = [group.layers[k].n_masked for k in range(group.n_layers)]
            done[i] = Dropped(counts, hint_after(group.upper, group.threshold, group.left))
    return done


def _group_of(competition: Competition) -> Group:
    layers, hint = competition.layers, competition.hint
    sweeps = (Sweep * len(layers))(*(_sweep_of(layer) for layer in layers))
    below = math.nan if hint is None else hint.below(competition.need)
    return Group(sweeps, len(layers), competition.need, below)


def _fits(layer: Units) -> bool:
    kinds = _MAGNITUDES if layer.is_magnitude else _SCORES
    return layer.scores.dtype in kinds and _are_plain(layer.kept, (layer.scores, *layer.tensors))


def _are_plain(kept: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether all are on the CPU, of a length, contiguous, and no more than their memory."""
    n = kept.numel()
    for tensor in (kept, *tensors):
        plain = tensor.detach()  # of a parameter, a tensor; of a subclass that is more than its memory, still that
        if type(plain) is not Tensor or plain.device.type != "cpu" or plain.layout is not torch.strided:
            return False
        if plain.numel() != n or not plain.is_contiguous() or plain.element_size() not in _SIZES or plain.is_neg():
            return False
    return True


def _sweep_of(layer: Units) -> Sweep:
    sweep = _sweep(layer.kept, layer.tensors)
    sweep.n_kept, sweep.least = layer.n_kept, layer.least
    sweep.kind = (_MAGNITUDES if layer.is_magnitude else _SCORES)[layer.scores.dtype]
    sweep.scores = layer.scores.data_ptr()
    return sweep


def _sweep(kept: Tensor, tensors: Sequence[Tensor]) -> Sweep:
    count, n = len(tensors), kept.numel()
    data = (c_void_p * count)(*[t.data_ptr() for t in tensors])
    sizes = (c_int32 * count)(*[t.element_size() for t in tensors])
    return Sweep(kept.data_ptr(), n, n, data, sizes, count)


def _note_written(tensors: Sequence[Tensor]) -> None:
    # Autograd does not see the writing, and shall still refuse a backward pass through a weight as it was before.
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
