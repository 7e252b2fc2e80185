"""Where do the masks go next? Fractions → counts → units, layer by layer or over all of them, and onto the weights."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from gossamer.errors import ArgumentError
from gossamer.evidence import LastScores, ScoresOnDemand, StepEvidence, WholeScores, widen
from gossamer.layers import Layer, Layers, StateOf
from gossamer.rules.allocation import Context, count, round_kept
from gossamer.rules.budget import global_counts, pooled_counts
from gossamer.rules.criteria import Criterion
from gossamer.rules.granularity import pool
from gossamer.rules.selection import Candidates, Hint, exchange, hint_after, nest, select, select_n_m, survey
from gossamer.sweeps import Competition, drop


class Mover:
    """Moves the masks of layers to what a context gives each of them.

    Args:
        layers: whose masks.
        context: which units compete.
        skip_frozen: whether masks of frozen layers stay as they are.
    """

    def __init__(self, layers: Layers, context: Context, skip_frozen: bool = False) -> None:
        self.layers, self.context, self.skip_frozen = layers, context, skip_frozen
        self.forget()

    def forget(self) -> None:
        """Takes the masks as they are now for what the next move starts from."""
        self._hints: dict[str, Hint | None] = {}
        self.pooled: tuple[int, int | None, int] | None = None  # a global context's goal, rounding, which layers

    def move(
        self,
        fractions: Mapping[str, Fraction],
        round_to: int | None,
        state_of: StateOf,
        fixed: Collection[str] = (),
        check: bool = False,
    ) -> None:
        """Moves the masks to a fraction of each layer's units, exactly, and applies them.

        Args:
            fractions: layer name → fraction of units to mask; layers that it lacks are only masked again.
            round_to: round the units that a layer keeps to the nearest multiple of this.
            state_of: further tensors to zero where the weights are.
            fixed: layers that stand at their own fraction where the others compete.
            check: make sure, before anything is changed, that scores can be compared.

        Raises:
            TargetError: asked to check, and a weight is nan or infinite, or of another shape than its mask.
        """
        self.layers.evidence.drop()
        is_seen = check and self._is_seen(fixed)
        if check and not is_seen:
            self.layers.check_weights()
        try:
            self._move(fractions, round_to, state_of, fixed, is_seen)
        except BaseException:  # Ctrl-C may strike between a mask and its count, or its weights
            self._recover(state_of)
            raise
        finally:
            self.layers.evidence.drop()

    def _is_seen(self, fixed: Collection[str]) -> bool:
        """Whether what ranks weights looks at all of them, and can say what it saw before it has changed any."""
        is_dense = all(layer.masked == 0 for layer in self.layers.values())  # else it would zero what is masked first
        at_once = not (self.context.is_pooled and fixed)
        return is_dense and at_once and self.layers.come_from_weights

    def _recover(self, state_of: StateOf) -> None:
        self.forget()
        for layer in self.layers.values():
            layer.masked = layer.n_units - int(torch.count_nonzero(self.layers.units(layer)))
            with contextlib.suppress(RuntimeError):  # where a weight has another shape now, which was raised already
                self.layers.apply(layer, state_of)
        with contextlib.suppress(RuntimeError):
            self.layers.apply_companions(state_of)

    def _move(
        self,
        fractions: Mapping[str, Fraction],
        round_to: int | None,
        state_of: StateOf,
        fixed: Collection[str],
        check: bool,
    ) -> None:
        pooled = [n for n in self.layers if n not in fixed] if self.context.is_pooled else []
        alone = [n for n in self.layers if n not in pooled]
        if self.layers.evidence.takes_data:  # what runs through the network runs through masked weights
            for layer in self.layers.values():
                self.layers.apply(layer, state_of)
            self.layers.apply_companions(state_of)
        changed = self._move_local(alone, fractions, round_to, state_of, check) if alone else {}
        if pooled:
            fraction = max((f for name, f in fractions.items() if name in pooled), default=Fraction(0))
            changed |= self._move_global([self.layers[n] for n in pooled], fraction, round_to, state_of, check)
        for name, flag in changed.items():
            self.layers.evidence.moved(name, self.layers[name].target.weight, flag)
        self.layers.apply_companions(state_of)

    def _is_fast(self, layer: Layer) -> bool:
        return layer.target.weight.device.type == "cpu" and not self._has_blocks

    @property
    def _has_blocks(self) -> bool:
        return self.context.kind in ("n:m", "output")

    def _is_frozen(self, layer: Layer) -> bool:
        return self.skip_frozen and not layer.target.weight.requires_grad

    def _move_local(
        self,
        names: Sequence[str],
        fractions: Mapping[str, Fraction],
        round_to: int | None,
        state_of: StateOf,
        check: bool,
    ) -> dict[str, bool | Tensor]:
        moving: list[tuple[Layer, int]] = []
        still: list[Layer] = []
        for name in names:
            layer = self.layers[name]
            goal = layer.masked
            if name in fractions and not self._is_frozen(layer):
                goal = max(layer.floor, rounded(count(fractions[name], layer.n_units), layer, round_to))
            if goal is None or goal == layer.masked:
                still.append(layer)
            else:
                moving.append((layer, goal))
        # Those whose scores need no memory all at once, the others one by one.
        small = [self._grows_fast(*move) and self.layers.is_read_from_bits(move[0]) for move in moving]
        at_once = [move for move, is_small in zip(moving, small, strict=True) if is_small]
        if check:
            self.layers.check_weights(without={layer.target.name for layer, _ in at_once})
        self._move_layers(at_once, state_of, check)
        for layer in still:
            self.layers.apply(layer, state_of)
        for move, is_small in zip(moving, small, strict=True):
            if not is_small:
                self._move_layers([move], state_of)
        return {layer.target.name: True for layer, _ in moving}

    def _grows_fast(self, layer: Layer, goal: int) -> bool:
        return layer.masked is not None and goal > layer.masked and self._is_fast(layer)

    def _move_layers(self, moves: Sequence[tuple[Layer, int]], state_of: StateOf, check: bool = False) -> None:
        competitions: dict[str, Competition] = {}
        for layer, goal in moves:
            if self._grows_fast(layer, goal):
                hint = self._hints.get(layer.target.name)
                ready = self.layers.to_drop([layer], goal - (layer.masked or 0), hint, state_of)
                if ready is not None:
                    competitions[layer.target.name] = ready
        done = dict(zip(competitions, drop(list(competitions.values()), whole=check), strict=True))
        if check and None in done.values():
            self.layers.check_weights()
        for layer, goal in moves:
            name = layer.target.name
            dropped = done.get(name)
            if dropped is not None:
                self.layers.dropped([layer], competitions[name], state_of)
                self._hints[name] = dropped.hint
                layer.masked = goal
            else:
                self._move_layer(layer, goal, state_of)

    def _move_layer(self, layer: Layer, goal: int, state_of: StateOf) -> None:
        """The plain way, and the twin of the compiled one."""
        name = layer.target.name
        need = goal - layer.masked if layer.masked is not None else 0
        self.layers.apply(layer, state_of)
        if need > 0 and self._is_fast(layer):
            kept = self.layers.units(layer).reshape(-1)
            scores = self.layers.flat_scores(layer)
            found = self._survey([scores], [kept], need, self._hints.get(name))
            self._hints[name] = self.layers.drop(layer, scores, found[0], need, state_of)
        else:
            self.layers.replace(layer, self._select(layer, self.layers.scores(layer), goal), state_of)
        layer.masked = goal

    def _survey(
        self,
        scores: Sequence[Tensor | WholeScores | ScoresOnDemand],
        kept: Sequence[Tensor],
        need: int,
        hint: Hint | None,
        bounded: bool = False,
    ) -> list[Candidates]:
        try:
            return survey(scores, kept, need, hint, bounded)
        except ArgumentError:
            self.layers.check_weights()  # which can say in which layer the numbers went wrong
            raise

    def _move_global(
        self, competing: Sequence[Layer], fraction: Fraction, round_to: int | None, state_of: StateOf, check: bool
    ) -> dict[str, bool | Tensor]:
        layers = [layer for layer in competing if not self._is_frozen(layer)]
        goal = max(count(fraction, sum(la.n_units for la in layers)), sum(la.floor for la in layers))
        now = [layer.masked for layer in layers]
        known = [n for n in now if n is not None]
        need = goal - sum(known)
        fast = len(known) == len(now) and all(self._is_fast(layer) for layer in layers)
        fast = fast and need >= 0 and round_to is None
        asked = goal, round_to, zlib.crc32("\n".join(layer.target.name for layer in layers).encode())
        goes_on = bool(layers) and asked != self.pooled
        if layers:
            self.pooled = asked
        bounds = self._bounds(layers, fraction, goal) if layers else ([], [])
        ready, done = None, None
        if goes_on and fast and need and all(low <= n for low, n in zip(bounds[0], known, strict=True)):
            least = [layer.n_units - most for layer, most in zip(layers, bounds[1], strict=True)]
            ready = self.layers.to_drop(layers, need, self._hints.get(""), state_of, least)
        if check:
            self.layers.check_weights(without=() if ready is None else {layer.target.name for layer in layers})
        if ready is not None:
            (done,) = drop([ready], whole=check)
            if check and done is None:
                self.layers.check_weights()
        for layer in competing:
            if done is None or self._is_frozen(layer):  # the others have been masked on the way
                self.layers.apply(layer, state_of)
        if not goes_on or (fast and not need):
            return {}
        counts: list[int] | None = None
        if ready is not None and done is not None:
            self.layers.dropped(layers, ready, state_of)
            counts, self._hints[""] = done.counts, done.hint
        elif fast:
            counts = self._drop_global(layers, known, need, bounds, state_of)
        if counts is None:
            return self._select_global(layers, goal, fraction, round_to, state_of)
        for layer, here in zip(layers, counts, strict=True):
            layer.masked = (layer.masked or 0) + here
        return {layer.target.name: True for layer, here in zip(layers, counts, strict=True) if here}

    def _drop_global(
        self,
        layers: Sequence[Layer],
        known: Sequence[int],
        need: int,
        bounds: tuple[Sequence[int], Sequence[int]],
        state_of: StateOf,
    ) -> list[int] | None:
        """The twin of the compiled way.

        None, and nothing done, where a layer would mask more or less than it may, or where too many scores tie.
        """
        kept = [self.layers.units(layer).reshape(-1) for layer in layers]
        last = LastScores()
        scores = [self.layers.flat_scores(layer, last) for layer in layers]
        found = self._survey(scores, kept, need, self._hints.get(""), bounded=True)
        if not found:
            return None
        counts, threshold = pooled_counts(need, [c.n_settled for c in found], [c.scores for c in found])
        if any(
            not low <= n + here <= high for low, n, here, high in zip(bounds[0], known, counts, bounds[1], strict=True)
        ):
            return None
        for layer, whole, candidates, here in zip(layers, scores, found, counts, strict=True):
            if here:
                self.layers.drop(layer, whole, candidates, here, state_of)
        left = sum(c.n_settled + len(c.scores) for c in found) - need
        self._hints[""] = hint_after(found[0].upper, threshold, left)
        return counts

    def _bounds(self, layers: Sequence[Layer], fraction: Fraction, goal: int) -> tuple[list[int], list[int]]:
        least, most = self.context.bounds(fraction, [layer.n_units for layer in layers], goal)
        return least, [max(n, layer.floor, layer.masked or 0) for n, layer in zip(most, layers, strict=True)]

    def _select_global(
        self, layers: Sequence[Layer], goal: int, fraction: Fraction, round_to: int | None, state_of: StateOf
    ) -> dict[str, bool | Tensor]:
        """The plain way, and the device's: counts by counting, then the layers one by one; nothing is copied back."""
        # Slice by slice where that will do, so that the scores of one layer at a time are all that is ever held.
        on_cpu, last = all(layer.target.weight.device.type == "cpu" for layer in layers), LastScores()
        scores = [self.layers.flat_scores(la, last) if on_cpu else self.layers.scores(la).reshape(-1) for la in layers]
        nested: list[Tensor | Nested | WholeScores | ScoresOnDemand] = list(scores)
        if round_to is None:  # else rounding has moved the masks off the goal, and the scores alone decide
            units = sum(layer.n_units for layer in layers)
            kept = [self.layers.units(layer).reshape(-1) for layer in layers]
            more = units - torch.stack([k.sum() for k in kept]).sum() <= goal
            nested = [
                nest(s, k, more) if isinstance(s, Tensor) else Nested(s, k, more)
                for s, k in zip(scores, kept, strict=True)
            ]
            del kept
        counts = global_counts(goal, nested, self._bounds(layers, fraction, goal))
        del nested  # with which the masks go that are replaced
        changed: dict[str, bool | Tensor] = {}
        for i, layer in enumerate(layers):
            masked: int | Tensor = counts[i]
            layer.masked = None
            if round_to is not None or self._is_fast(layer):
                masked = layer.masked = max(layer.floor, rounded(int(counts[i]), layer, round_to))
            whole, before = scores[i], self.layers.units(layer)
            units = self._select(layer, whole if isinstance(whole, Tensor) else whole[:], masked)
            changed[layer.target.name] = (units != before).any()
            self.layers.replace(layer, units, state_of)
        return changed

    def _select(self, layer: Layer, scores: Tensor, goal: int | Tensor) -> Tensor:
        units = self.layers.units(layer)
        if not self._has_blocks:
            return select(scores.reshape(units.shape), units, goal)
        blocks, back, m = self._blocks(layer)
        return back(select_n_m(blocks(scores), blocks(units), int(goal), m))

    def _blocks(self, layer: Layer) -> tuple[Reshape, Reshape, int]:
        """How units are laid out so that those of a block lie side by side, the way back, and how long a block is."""
        if self.context.m:  # along the inputs: bring that axis last
            axis = layer.axes.index("i")
            return (lambda t: t.movedim(axis, -1)), (lambda t: t.movedim(-1, axis)), self.context.m
        # An output channel is a block: bring its axes first.
        outputs = [i for i, a in enumerate(layer.axes) if a in "go"]
        first = list(range(len(outputs)))
        shape = [1 if i in layer.dims else n for i, n in enumerate(layer.view)]
        m = layer.n_units // int(torch.Size([shape[i] for i in outputs]).numel())
        return (lambda t: t.movedim(outputs, first)), (lambda t: t.movedim(first, outputs)), m

    def exchanged(self, fraction: float, grow: Criterion, evidence: StepEvidence) -> dict[str, Tensor]:
        """Masks of units after the least important of the kept ones have made room for others; nothing is moved yet.

        Args:
            fraction: of each layer's kept units, how many go; rounded to the nearest number.
            grow: by what others come: the highest scores first.
            evidence: what that looks at.

        Returns:
            Layer name → bool, one a unit, for every layer that has masked units and is not frozen.
        """
        masks: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            # What grows in a frozen layer would stay at zero, and RigL has no gradient to choose it by.
            if layer.masked == 0 or not layer.target.weight.requires_grad:
                continue
            units = self.layers.units(layer)
            found = {k: widen(t) for k, t in evidence.gather(name, layer.target.weight).items()}
            scores = pool(grow.score(found).reshape(layer.view), layer.dims, self.layers.reduction)
            masked: int | Tensor = units.numel() - units.sum() if layer.masked is None else layer.masked
            n = (layer.n_units - masked) * fraction + 0.5
            n = n.long() if isinstance(n, Tensor) else int(n)
            drop = self.layers.scores(layer)
            if self._has_blocks:
                blocks, back, m = self._blocks(layer)
                masks[name] = back(exchange(blocks(units), blocks(drop), blocks(scores), masked, n, m))
            else:
                masks[name] = exchange(units, drop, scores, masked, n)
        self.layers.evidence.drop()
        return masks

    def replace(self, masks: Mapping[str, Tensor], state_of: StateOf) -> None:
        """Puts other masks in place, with as many units kept; what they let grow starts at zero, with fresh state.

        Args:
            masks: layer name → bool, one a unit.
            state_of: further tensors to zero where the weights are.
        """
        try:
            for name, layer in self.layers.items():
                self.layers.apply(layer, state_of)  # what grows was masked until now, and may have moved since
                if name in masks:
                    self.layers.replace(layer, masks[name], state_of)
        except BaseException:
            self._recover(state_of)
            raise
        self._hints = {}
        for name in masks:
            self.layers.evidence.moved(name, self.layers[name].target.weight)
        self.layers.apply_companions(state_of)


Reshape = Callable[[Tensor], Tensor]


class Nested:
    """Scores as `rules.selection.nest` gives them, slice by slice.

    Args:
        scores: flat, computed when asked.
        kept: bool, flat.
        grows: as in `nest`.
    """

    def __init__(self, scores: WholeScores | ScoresOnDemand, kept: Tensor, grows: Tensor) -> None:
        self._scores, self._kept, self._grows = scores, kept, grows

    def __len__(self) -> int:
        return len(self._scores)

    def __getitem__(self, index: slice, /) -> Tensor:
        return nest(self._scores[index], self._kept[index], self._grows)


def rounded(masked: int, layer: Layer, round_to: int | None) -> int:
    """Units to mask so that what a layer keeps is the nearest multiple."""
    return masked if round_to is None else round_kept(masked, layer.n_units, round_to)
