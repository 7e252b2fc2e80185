"""Where do the masks go next? Fractions → counts → units, layer by layer or over all of them, and onto the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from gossamer.errors import ArgumentError
from gossamer.evidence import ScoresOnDemand
from gossamer.layers import Layer, Layers, StateOf
from gossamer.rules.allocation import Context, count, global_counts, pooled_counts, round_kept
from gossamer.rules.selection import Candidates, Hint, hint_after, nest, select, select_n_m, survey
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
        self.pooled: tuple[int, int | None, int] | None = None  # a global context's goal, rounding, number of layers

    def move(self, fractions: Mapping[str, Fraction], round_to: int | None, state_of: StateOf) -> None:
        """Moves the masks to a fraction of each layer's units, exactly, and applies them.

        Args:
            fractions: layer name → fraction of units to mask; layers that it lacks are only masked again.
            round_to: round the units that a layer keeps to the nearest multiple of this.
            state_of: further tensors to zero where the weights are.
        """
        try:
            self._move(fractions, round_to, state_of)
        except BaseException:  # Ctrl-C may strike between a mask and its count, or its weights
            self._recover(state_of)
            raise

    def _recover(self, state_of: StateOf) -> None:
        self.forget()
        for layer in self.layers.values():
            layer.masked = layer.n_units - int(torch.count_nonzero(self.layers.units(layer)))
            with contextlib.suppress(RuntimeError):  # where a weight has another shape now, which was raised already
                self.layers.apply(layer, state_of)
        with contextlib.suppress(RuntimeError):
            self.layers.apply_companions(state_of)

    def _move(self, fractions: Mapping[str, Fraction], round_to: int | None, state_of: StateOf) -> None:
        changed: dict[str, bool | Tensor] = {}
        if self.context.kind == "global":
            changed = self._move_global(max(fractions.values(), default=Fraction(0)), round_to, state_of)
        else:
            changed = self._move_local(fractions, round_to, state_of)
        for name, flag in changed.items():
            self.layers.evidence.moved(name, self.layers[name].target.weight, flag)
        self.layers.apply_companions(state_of)

    def _is_fast(self, layer: Layer) -> bool:
        return layer.target.weight.device.type == "cpu" and not self.context.m

    def _is_frozen(self, layer: Layer) -> bool:
        return self.skip_frozen and not layer.target.weight.requires_grad

    def _move_local(
        self, fractions: Mapping[str, Fraction], round_to: int | None, state_of: StateOf
    ) -> dict[str, bool | Tensor]:
        moving: list[tuple[Layer, int]] = []
        for name, layer in self.layers.items():
            goal = layer.masked
            if name in fractions and not self._is_frozen(layer):
                goal = max(layer.floor, rounded(count(fractions[name], layer.n_units), layer, round_to))
            if goal is None or goal == layer.masked:
                self.layers.apply(layer, state_of)
            else:
                moving.append((layer, goal))
        # Those whose scores need no memory all at once, the others one by one.
        small = [self._grows_fast(*move) and self.layers.is_read_from_bits(move[0]) for move in moving]
        self._move_layers([move for move, is_small in zip(moving, small, strict=True) if is_small], state_of)
        for move, is_small in zip(moving, small, strict=True):
            if not is_small:
                self._move_layers([move], state_of)
        return {layer.target.name: True for layer, _ in moving}

    def _grows_fast(self, layer: Layer, goal: int) -> bool:
        return layer.masked is not None and goal > layer.masked and self._is_fast(layer)

    def _move_layers(self, moves: Sequence[tuple[Layer, int]], state_of: StateOf) -> None:
        competitions: dict[str, Competition] = {}
        for layer, goal in moves:
            if self._grows_fast(layer, goal):
                hint = self._hints.get(layer.target.name)
                ready = self.layers.to_drop([layer], goal - (layer.masked or 0), hint, state_of)
                if ready is not None:
                    competitions[layer.target.name] = ready
        done = dict(zip(competitions, drop(list(competitions.values())), strict=True))
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
            found = self._survey([self.layers.flat_scores(layer)], [kept], need, self._hints.get(name))
            self._hints[name] = self.layers.drop(layer, found[0], need, state_of)
        else:
            self.layers.replace(layer, self._select(layer, self.layers.scores(layer), goal), state_of)
        layer.masked = goal

    def _survey(
        self, scores: Sequence[Tensor | ScoresOnDemand], kept: Sequence[Tensor], need: int, hint: Hint | None
    ) -> list[Candidates]:
        try:
            return survey(scores, kept, need, hint)
        except ArgumentError:
            self.layers.check_weights()  # which can say in which layer the numbers went wrong
            raise

    def _move_global(self, fraction: Fraction, round_to: int | None, state_of: StateOf) -> dict[str, bool | Tensor]:
        layers = [layer for layer in self.layers.values() if not self._is_frozen(layer)]
        goal = max(count(fraction, sum(la.n_units for la in layers)), sum(la.floor for la in layers))
        now = [layer.masked for layer in layers]
        known = [n for n in now if n is not None]
        need = goal - sum(known)
        fast = len(known) == len(now) and all(self._is_fast(layer) for layer in layers)
        fast = fast and need >= 0 and round_to is None
        goes_on = bool(layers) and (goal, round_to, len(layers)) != self.pooled
        if layers:
            self.pooled = (goal, round_to, len(layers))
        ready, done = None, None
        if goes_on and fast and need:
            ready = self.layers.to_drop(layers, need, self._hints.get(""), state_of)
        if ready is not None:
            (done,) = drop([ready])
        for layer in self.layers.values():
            if done is None or self._is_frozen(layer):  # the others have been masked on the way
                self.layers.apply(layer, state_of)
        if not goes_on or (fast and not need):
            return {}
        if not fast:
            return self._select_global(layers, goal, round_to, state_of)
        if ready is not None and done is not None:
            self.layers.dropped(layers, ready, state_of)
            counts, self._hints[""] = done.counts, done.hint
        else:
            counts = self._drop_global(layers, need, state_of)
        for layer, here in zip(layers, counts, strict=True):
            layer.masked = (layer.masked or 0) + here
        return {layer.target.name: True for layer, here in zip(layers, counts, strict=True) if here}

    def _drop_global(self, layers: Sequence[Layer], need: int, state_of: StateOf) -> list[int]:
        """The twin of the compiled way."""
        kept = [self.layers.units(layer).reshape(-1) for layer in layers]
        found = self._survey([self.layers.flat_scores(layer) for layer in layers], kept, need, self._hints.get(""))
        counts, threshold = pooled_counts(need, [c.n_settled for c in found], [c.scores for c in found])
        for layer, candidates, here in zip(layers, found, counts, strict=True):
            if here:
                self.layers.drop(layer, candidates, here, state_of)
        left = sum(c.n_settled + len(c.scores) for c in found) - need
        self._hints[""] = hint_after(found[0].upper, threshold, left)
        return counts

    def _select_global(
        self, layers: Sequence[Layer], goal: int, round_to: int | None, state_of: StateOf
    ) -> dict[str, bool | Tensor]:
        """The plain way, and the device's: counts by counting, then the layers one by one; nothing is copied back."""
        scores = [self.layers.scores(layer) for layer in layers]
        nested = scores
        if round_to is None:  # else rounding has moved the masks off the goal, and the scores alone decide
            kept = [self.layers.units(layer) for layer in layers]
            units = sum(layer.n_units for layer in layers)
            more = units - torch.stack([k.sum() for k in kept]).sum() <= goal
            nested = [nest(s, k, more) for s, k in zip(scores, kept, strict=True)]
        counts = global_counts(goal, nested)
        changed: dict[str, bool | Tensor] = {}
        for i, layer in enumerate(layers):
            masked: int | Tensor = counts[i]
            layer.masked = None
            if round_to is not None or self._is_fast(layer):
                masked = layer.masked = max(layer.floor, rounded(int(counts[i]), layer, round_to))
            units = self._select(layer, scores[i], masked)
            changed[layer.target.name] = (units != self.layers.units(layer)).any()
            self.layers.replace(layer, units, state_of)
        return changed

    def _select(self, layer: Layer, scores: Tensor, goal: int | Tensor) -> Tensor:
        units = self.layers.units(layer)
        if not self.context.m:
            return select(scores, units, goal)
        # Blocks run along the inputs: bring that axis last, choose, and bring it back.
        axis = layer.target.axes.index("i")
        chosen = select_n_m(scores.movedim(axis, -1), units.movedim(axis, -1), int(goal), self.context.m)
        return chosen.movedim(-1, axis)


def rounded(masked: int, layer: Layer, round_to: int | None) -> int:
    """Units to mask so that what a layer keeps is the nearest multiple."""
    return masked if round_to is None else round_kept(masked, layer.n_units, round_to)
