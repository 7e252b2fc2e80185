"""Which units stay? Scores and a count → a mask that masks exactly that many.

Masks are nested: as a layer gets sparser, what is masked stays masked, and the lowest scores of what is kept join it;
as it gets denser, what is kept stays kept. Ties break by position, the first position first.

`select` says it in a few lines and runs on any device without a copy to the host. On a CPU the same result comes from
`survey` and `take`: counting finds a narrow bracket around the threshold, and only what lies inside is ordered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ArgumentError
from gossamer.rules.order import stable_order

_CHUNK = 1 << 18  # units looked at together: small enough that a chunk's temporaries are recycled, not mapped anew
_SAMPLE = 1 << 12
_SHORT = 32  # units in a row, up to which comparing each with each is quicker than sorting
_SMALL = 1 << 15  # with fewer units than this, ordering all of them is quicker than looking for a bracket


class Scores(Protocol):
    """Scores of a layer's units, flat; a 1-D tensor is one, and so is something that computes slices when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Tensor: ...


def select(scores: Tensor, kept: Tensor, masked: int | Tensor) -> Tensor:
    """The mask that masks exactly so many units, nested in (or around) the mask that there is.

    Args:
        scores: one a unit, any shape, floating, no nan; the lowest go first.
        kept: bool of the same shape, the mask that there is.
        masked: how many units the new mask masks; an int, or a 0-d tensor on the same device.

    Returns:
        bool of the same shape, True = kept.

    Example:
        >>> select(torch.tensor([3.0, 1.0, 1.0, 2.0]), torch.ones(4, dtype=torch.bool), 1).tolist()
        [True, False, True, True]
    """
    flat, keep = scores.reshape(-1), kept.reshape(-1)
    rank = torch.empty_like(keep, dtype=torch.int64)
    rank[stable_order(nest(flat, keep, grows(keep, masked)))] = torch.arange(len(flat), device=flat.device)
    return (rank >= masked).view(kept.shape)


def nest(scores: Tensor, kept: Tensor, grows: bool | Tensor) -> Tensor:
    """Scores whose lowest units form a nested mask.

    What is masked gets -inf where the mask grows, what is kept gets +inf where it shrinks; every other score is finite.

    Args:
        scores: flat, one a unit.
        kept: bool, flat.
        grows: whether the new mask masks at least as many units; a bool, or a 0-d tensor on the same device.

    Returns:
        Scores of the same shape.

    Example:
        >>> nest(torch.tensor([3.0, 1.0]), torch.tensor([False, True]), True).tolist()
        [-inf, 1.0]
    """
    bound = torch.finfo(scores.dtype).max
    finite = scores.clamp(-bound, bound)
    # Kept units stand out where the mask shrinks, masked ones where it grows.
    outside = torch.where(kept, math.inf, -math.inf).to(scores.dtype)
    return torch.where(kept == grows, finite, outside)


def grows(kept: Tensor, masked: int | Tensor) -> Tensor:
    """Whether a mask of `masked` units masks at least as many as there are now; a 0-d bool on the mask's device.

    Example:
        >>> bool(grows(torch.tensor([True, False]), 1))
        True
    """
    return kept.numel() - kept.sum() <= masked


def select_n_m(scores: Tensor, kept: Tensor, masked: int, m: int) -> Tensor:
    """The mask that masks exactly so many units, spread evenly over blocks of m.

    Every block masks `masked // blocks` of its units, and the blocks whose next score is lowest one more.

    Args:
        scores: one a unit; consecutive units of the last axis form blocks.
        kept: bool of the same shape, the mask that there is.
        masked: how many units the new mask masks.
        m: units in a block; divides the length of the last axis.

    Returns:
        bool of the same shape, True = kept.

    Example:
        >>> select_n_m(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4, dtype=torch.bool), 2, 4).tolist()
        [[False, False, True, True]]
    """
    nested = nest(scores.reshape(-1), kept.reshape(-1), grows(kept, masked)).view(-1, m)
    base, extra = divmod(masked, nested.shape[0])
    rank = _ranks(nested)
    keep = rank >= base
    if extra:
        at_base = rank == base  # one a block, so the sum is that one's score
        order = stable_order(torch.where(at_base, nested, 0.0).sum(1))
        chosen = torch.zeros_like(at_base[:, 0])
        chosen[order[:extra]] = True
        keep &= ~(at_base & chosen[:, None])
    return keep.view(kept.shape)


def _ranks(rows: Tensor) -> Tensor:
    """Each entry's place in its row's order, ties by position."""
    if rows.shape[1] > _SHORT:
        order = torch.argsort(rows, dim=1, stable=True)
        places = torch.arange(rows.shape[1], device=rows.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, places)
    rank = torch.zeros_like(rows, dtype=torch.int16)
    for j in range(rows.shape[1]):  # m compares beat a sort of millions of short rows
        other = rows[:, j : j + 1]
        rank[:, :j] += other < rows[:, :j]
        rank[:, j + 1 :] += other <= rows[:, j + 1 :]
    return rank


def exchange(kept: Tensor, drop: Tensor, grow: Tensor, masked: int | Tensor, n: int | Tensor, m: int = 0) -> Tensor:
    """Masks the n lowest of the kept units, and lets the n highest of all that are then masked grow.

    A unit that was just masked may come back, as in RigL's own code, and has then never been gone.

    Args:
        kept: bool, the mask that there is.
        drop: scores by which kept units go; the lowest first.
        grow: scores by which masked units come back; the highest first.
        masked: how many units are masked now; an int, or a 0-d tensor on the same device (with blocks an int).
        n: how many to exchange; the same.
        m: units in a block, which lie along the last axis and each keep as many as before; 0 for no blocks.

    Returns:
        bool of the same shape, with as many kept.

    Example:
        >>> kept, scores = torch.tensor([True, True, False, False]), torch.tensor([2.0, 1.0, 0.0, 0.0])
        >>> exchange(kept, scores, torch.tensor([0.0, 0.0, 5.0, 7.0]), 2, 1).tolist()
        [True, False, False, True]
    """
    if not m:
        return select(grow, select(drop, kept, masked + n), masked)
    return select_n_m(grow, select_n_m(drop, kept, int(masked + n), m), int(masked), m)


@dataclass(frozen=True)
class Candidates:
    """The units of one layer that may go, when the mask grows.

    Args:
        lower: the bracket's lower end, below which kept units surely go.
        n_settled: how many these are.
        positions: int64, increasing: units inside the bracket.
        scores: their scores.
        upper: the bracket's upper end.
    """

    lower: float
    n_settled: int
    positions: Tensor
    scores: Tensor
    upper: float


@dataclass(frozen=True)
class Hint:
    """Where the threshold was, and how far apart the scores just above it are on average."""

    threshold: float
    spacing: float

    def below(self, need: int) -> float:
        """A score that the next `need` units very likely lie below.

        Example:
            >>> Hint(threshold=1.0, spacing=0.01).below(0) > 1.0
            True
        """
        return self.threshold + (1.5 * need + 4 * math.sqrt(need) + 32) * self.spacing


def survey(
    scores: Sequence[Scores], kept: Sequence[Tensor], need: int, hint: Hint | None = None, bounded: bool = False
) -> list[Candidates]:
    """Finds, in layers that compete, candidates among which the `need` lowest kept units surely are. CPU.

    Args:
        scores: for each layer, scores of its units; no nan.
        kept: for each layer, bool, flat.
        need: how many kept units shall go, in all layers together; at most as many as are kept.
        hint: from the last selection, where there was one.
        bounded: whether to hold no more candidates than about n^(2/3) of n units.

    Returns:
        Candidates, one a layer. With `bounded`, an empty list where scores tie so often that more would be needed.

    Raises:
        ArgumentError: there are fewer kept units with a number for a score than needed.

    Example:
        >>> survey([torch.tensor([3.0, 1.0])], [torch.tensor([True, True])], 1)[0].positions.tolist()
        [0, 1]
    """
    total = sum(len(s) for s in scores)
    most = _SMALL + int(20 * total ** (2 / 3)) if bounded else total  # a bracket of 16 sigmas has 16 n^(2/3)
    if hint is not None and (not bounded or 2 * need <= most):
        found = _scan(scores, kept, -math.inf, hint.below(need), most)
        if found.layers and found.n_inside >= need:
            return found.layers
    n_kept = [int(np.count_nonzero(k.numpy())) for k in kept]
    # Where all is kept, which is where one shot starts, there is nothing to leave out.
    still = [None if n == len(k) else k for n, k in zip(n_kept, kept, strict=True)]
    for low, high in _brackets(scores, still, need / max(1, sum(n_kept))):
        found = _scan(scores, still, low, high, most)
        if found.n_settled <= need <= found.n_settled + found.n_inside:
            return found.layers
    raise ArgumentError(
        f"cannot choose {need} units: some scores are nan. Check the weights for nan, or the criterion's own arithmetic"
    )


def settle(scores: Scores, kept: Tensor, lower: float) -> None:
    """Masks the kept units that score lower than a bracket, in place. CPU.

    Args:
        scores: of a layer's units.
        kept: bool, flat.
        lower: the bracket's lower end.

    Example:
        >>> kept = torch.tensor([True, True])
        >>> settle(torch.tensor([3.0, 1.0]), kept, lower=2.0); kept.tolist()
        [True, False]
    """
    if lower == -math.inf:
        return
    flags = kept.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(scores), _CHUNK):
            part = slice(start, min(start + _CHUNK, len(scores)))
            values = scores[part].numpy()
            flags[part] &= ~np.less(values, values.dtype.type(lower))


def _brackets(scores: Sequence[Scores], kept: Sequence[Tensor | None], q: float) -> list[tuple[float, float]]:
    """Where the q-quantile of the kept scores probably, almost surely and surely lies; kept None = all."""
    total = sum(len(s) for s in scores)
    if total <= _SMALL:
        return [(-math.inf, math.inf)]
    # A sample of n^(2/3) leaves about as many candidates; an odd stride that 3 does not divide meets every kernel tap.
    stride = max(1, int(total / max(_SAMPLE, total ** (2 / 3)))) | 1
    stride += 2 if stride % 3 == 0 else 0
    every = slice(None, None, stride)
    parts: list[np.ndarray] = []
    for layer_scores, keep in zip(scores, kept, strict=True):
        part = layer_scores[every].numpy()
        # A copy, since a view would hold on to all scores of the layer.
        parts.append(part.copy() if keep is None else part[keep[every].numpy()])
    sample = np.concatenate(parts)
    # A bound of nan would bound nothing. NumPy sorts floats many times as fast as torch, which carries positions along.
    sample = np.sort(sample[~np.isnan(sample)])
    if not len(sample):
        return [(-math.inf, math.inf)]
    spread = math.sqrt(len(sample) * q * (1 - q))
    brackets: list[tuple[float, float]] = []
    for sigmas in (3, 16):
        first, last = (round(q * len(sample) + sign * (sigmas * spread + 8)) for sign in (-1, 1))
        low = float(sample[first]) if first >= 0 else -math.inf
        high = float(sample[last]) if last < len(sample) else math.inf
        brackets.append((low, high))
    return [*brackets, (-math.inf, math.inf)]


@dataclass
class _Found:
    """What a scan found: how many units in all layers, and which; no layers where those are too many to hold."""

    layers: list[Candidates]
    n_settled: int = 0
    n_inside: int = 0


def _scan(scores: Sequence[Scores], kept: Sequence[Tensor | None], low: float, high: float, most: int) -> _Found:
    """One pass over the scores: [low, high) are candidates, below low is settled. A compiled helper can do it here."""
    found = _Found([])
    # NumPy compares floats into bools three times as fast as torch does. Its scalars warn where they overflow to inf,
    # and some builds where they meet a nan; an infinite end is what is meant, and nan is to compare false.
    with np.errstate(over="ignore", invalid="ignore"):
        for s, k in zip(scores, kept, strict=True):
            _scan_layer(found, s, k, low, high, most)
    if found.n_inside > most:
        found.layers = []
    return found


def _scan_layer(found: _Found, scores: Scores, kept: Tensor | None, low: float, high: float, most: int) -> None:
    n, keep = len(scores), None if kept is None else kept.numpy()
    # An open bracket takes +inf too.
    compare = np.less if high < math.inf else np.less_equal
    buffer = np.zeros(-(-min(n, _CHUNK) // 8) * 8, np.bool_)
    below = np.empty(min(n, _CHUNK), np.bool_)
    positions: list[np.ndarray] = []
    inside_scores: list[np.ndarray] = []
    n_settled = 0
    for start in range(0, n, _CHUNK):
        part = slice(start, min(start + _CHUNK, n))
        values = scores[part].numpy()
        inside = compare(values, _no_lower(values.dtype, high), out=buffer[: len(values)])
        if keep is not None:
            inside &= keep[part]
        if low > -math.inf:
            under = np.less(values, values.dtype.type(low), out=below[: len(values)])
            if keep is not None:
                under &= keep[part]
            n_settled += int(np.count_nonzero(under))
            inside ^= under
        buffer[len(values) :] = False
        here = _positions(buffer)
        found.n_inside += len(here)
        if found.n_inside > most:
            found.layers, positions, inside_scores = [], [], []  # and go on counting
            continue
        inside_scores.append(values[here])
        here += start
        positions.append(here)
    found.n_settled += n_settled
    if found.n_inside <= most:
        at, values = np.concatenate(positions), np.concatenate(inside_scores)
        found.layers.append(Candidates(low, n_settled, torch.from_numpy(at), torch.from_numpy(values), high))


def _no_lower(dtype: np.dtype, end: float) -> np.generic:
    """A bracket's upper end in a layer's own dtype; rounded down, as float64 is to float32, it would leave some out."""
    rounded = dtype.type(end)
    return np.nextafter(rounded, dtype.type(math.inf)) if float(rounded) < end else rounded


def _positions(flags: np.ndarray) -> np.ndarray:
    """Where a bool array of whole words is True: words with any first, since few have, then inside those."""
    words = flags.view(np.uint64)
    some = np.flatnonzero(words != 0)
    inner = np.flatnonzero(words[some].view(np.bool_))
    some <<= 3
    positions = some[inner >> 3]
    inner &= 7
    positions += inner
    return positions


def take(candidates: Candidates, count: int) -> tuple[Tensor, Hint | None]:
    """Which candidates go so that, with the settled ones, exactly `count` units do. CPU.

    Args:
        candidates: of one layer.
        count: units to go; from `n_settled` to that plus the number of candidates.

    Returns:
        bool, one a candidate, True = goes, and a hint for the next time (None where nothing can be said).

    Example:
        >>> found = survey([torch.tensor([3.0, 1.0, 1.0])], [torch.tensor([True, True, True])], 1)
        >>> found[0].positions[take(found[0], 1)[0]].tolist()
        [1]
    """
    scores, need = candidates.scores, count - candidates.n_settled
    if need <= 0 or need >= len(scores):
        return torch.full((len(scores),), need > 0, dtype=torch.bool), None
    values = scores.numpy()
    threshold = np.partition(values, need - 1)[need - 1]
    goes = values < threshold
    ties = np.flatnonzero(values == threshold)[: need - int(np.count_nonzero(goes))]
    goes[ties] = True
    return torch.from_numpy(goes), hint_after(candidates.upper, float(threshold), len(scores) - need)


def hint_after(upper: float, threshold: float, left: int) -> Hint | None:
    """A hint from the candidates that were left above the threshold.

    Args:
        upper: the bracket's upper end.
        threshold: the highest score that went.
        left: how many candidates lie between the two.

    Returns:
        The hint, or None where the bracket was open or nothing was left.

    Example:
        >>> hint_after(upper=2.0, threshold=1.0, left=50).spacing
        0.02
    """
    span = upper - threshold
    if left <= 0 or not math.isfinite(threshold) or not math.isfinite(span) or span <= 0:
        return None
    return Hint(threshold, span / left)
