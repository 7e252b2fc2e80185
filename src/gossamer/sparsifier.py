"""One shot: the rules, over targets. Targets → evidence → scores → budget → masks → weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from gossamer.companions import find_companions
from gossamer.errors import ArgumentError, FileError, GossamerWarning, TargetError
from gossamer.evidence import Evidence, ScoresOnDemand, widen
from gossamer.masks import Masks, zero_at, zero_masked
from gossamer.report import SparsityReport, report_of
from gossamer.rules.allocation import (
    Context,
    as_context,
    check_round_to,
    check_target,
    count,
    global_counts,
    pooled_counts,
    round_kept,
)
from gossamer.rules.criteria import Criterion, as_criterion
from gossamer.rules.granularity import Granularity, as_granularity, expand, output_channels, pool, units_of
from gossamer.rules.selection import Candidates, Hint, hint_after, nest, select, select_n_m, survey, take
from gossamer.targets import LayerTypes, Target, find_targets, resolve_sparsity

StateOf = Callable[[Tensor], Iterable[Tensor]]
"""Parameter → further tensors of its shape that die with it, such as an optimizer's moments."""


@dataclass
class _Layer:
    """A target on its way through the rules."""

    target: Target
    dims: tuple[int, ...]
    n_units: int
    masked: int | None = 0  # units masked now; None where only the device knows


class Sparsifier:
    """Sets the least important weights of a network to exact zero, and keeps the masks.

    Args:
        model: the network, or a part of it. Nothing is added to it, ever.
        granularity: which weights live and die together: a registered name ('weight', 'kernel', 'filter', …) or a
            `Granularity`.
        context: which units compete: 'local' (inside each layer), 'global' (across all), or an N:M pattern ('2:4').
        criteria: how much a weight matters: a registered name, a `Criterion`, or a function (`lambda w: w.abs()`).
        layer_type: type of layer that takes part, or a tuple of types.
        exclude: names or patterns of layers that do not.
        seed: of the criterion 'random'.

    Raises:
        ArgumentError: an argument that cannot be used.
        TargetError: no layer takes part, or one cannot be masked or cut that way.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> Sparsifier(layer, layer_type=nn.Linear).sparsify_model(50)
        >>> int((layer.weight == 0).sum())
        4
    """

    def __init__(
        self,
        model: nn.Module,
        granularity: str | Granularity = "weight",
        context: str | Context = "local",
        criteria: str | Criterion | Callable[..., Tensor] = "large_final",
        layer_type: LayerTypes = nn.Conv2d,
        *,
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        self.model = model
        self.granularity = as_granularity(granularity)
        self.context = as_context(context)
        self.criterion = as_criterion(criteria)
        self.targets = find_targets(model, layer_type, exclude)
        self._layers = {t.name: self._cut(t) for t in self.targets}
        weights = {t.name: t.weight for t in self.targets}
        self.masks = Masks(weights)
        self.evidence = Evidence(self.criterion, weights, seed)
        self._companions = self._find_companions()
        self._hints: dict[str, Hint | None] = {}
        self._pooled: tuple[int, int | None] = (0, None)  # the goal of a global context, and its rounding

    def sparsify_model(self, sparsity: float | Mapping[str, float], round_to: int | None = None) -> None:
        """Makes every layer as sparse as asked, at once.

        Args:
            sparsity: percent of units to mask, or a dict of layer name or pattern → percent (layers that it does not
                name stay as they are). A global context takes one number.
            round_to: round the units that a layer keeps to the nearest multiple of this; never none.

        Raises:
            ArgumentError: a target that cannot be used or met in this context.
            TargetError: a layer name that matches nothing, or weights with nan or infinity in them.

        Example:
            >>> conv = nn.Conv2d(3, 16, 3)
            >>> Sparsifier(nn.Sequential(conv), "filter").sparsify_model(40, round_to=8)
            >>> int((conv.weight.flatten(1) != 0).any(1).sum())
            8
        """
        fractions = self.resolve(sparsity, round_to)
        self.check_weights()
        self.warn_unchanged(fractions)
        self.move(fractions, round_to)

    def sparsify_layer(self, layer: str | nn.Module, sparsity: float, round_to: int | None = None) -> None:
        """Makes one layer as sparse as asked, at once.

        Args:
            layer: the layer, or its name.
            sparsity: percent of its units to mask.
            round_to: as in `sparsify_model`.

        Raises:
            ArgumentError: the context is global, in which one layer cannot compete alone.
            TargetError: the layer takes no part.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            >>> sparsifier = Sparsifier(net, layer_type=nn.Linear)
            >>> sparsifier.sparsify_layer("1", 25)
            >>> [r.zeros for r in sparsifier.report().rows]
            [0, 4]
        """
        if self.context.kind == "global":
            raise ArgumentError(
                "sparsify_layer cannot make one layer compete with all others, as context='global' means; use "
                "context='local', or sparsify_model"
            )
        if isinstance(layer, str):
            name = layer
        else:
            weight = getattr(layer, "weight", None)
            name = next((t.name for t in self.targets if weight is not None and t.weight is weight), "")
            if not name:
                raise TargetError(
                    f"the layer {layer!r} takes no part here; those that do: {', '.join(t.name for t in self.targets)}"
                )
        self.sparsify_model({name: sparsity}, round_to)

    def report(self) -> SparsityReport:
        """What is sparse now, counted from the weights."""
        return report_of(self.targets)

    def print_sparsity(self) -> None:
        """Prints the report."""
        print(self.report())

    def resolve(self, sparsity: float | Mapping[str, float], round_to: int | None = None) -> dict[str, Fraction]:
        """Checks a target and spreads it over the layers, without doing anything.

        Args:
            sparsity: as in `sparsify_model`.
            round_to: as in `sparsify_model`.

        Returns:
            Layer name → fraction of its units to mask, for every layer that has a target.

        Raises:
            ArgumentError: see `sparsify_model`.
            TargetError: see `sparsify_model`.
        """
        if isinstance(sparsity, Mapping) and self.context.kind == "global":
            raise ArgumentError(
                "context='global' takes one sparsity for the whole network, got a dict; use context='local' for a "
                "target a layer"
            )
        for name in sparsity if isinstance(sparsity, Mapping) else ():
            other = dict(self.model.named_modules()).get(name)
            if other is not None and name not in self._layers:
                kind = type(other).__name__
                raise TargetError(
                    f"sparsity: layer {name!r} takes no part; it is a {kind}. Add its type with layer_type=(…, {kind}) "
                    "and see that it is not excluded"
                )
        fractions = resolve_sparsity(sparsity, self._layers)
        for fraction in fractions.values():
            check_target(fraction, self.context)
        check_round_to(round_to, self.context)
        most = max(self._layers[name].n_units for name in fractions)
        if round_to is not None and round_to > most:
            raise ArgumentError(
                f"round_to={round_to} is more than any layer with a target has ({most} units of granularity "
                f"{self.granularity.name!r}), so nothing would be masked; use at most {most}"
            )
        counts = [(count(f, self._layers[name].n_units), self._layers[name]) for name, f in fractions.items()]
        asked = sum(n for n, _ in counts)
        if self.context.kind == "local" and asked and not any(self._rounded(n, la, round_to) for n, la in counts):
            warnings.warn(
                f"round_to={round_to} leaves every layer dense: at this sparsity the nearest multiple keeps all of "
                "its units; use a smaller round_to or a higher sparsity",
                GossamerWarning,
                stacklevel=3,
            )
        return fractions

    def check_weights(self) -> None:
        """Makes sure that scores can be compared.

        Raises:
            TargetError: a weight is nan or infinite.
        """
        for target in self.targets:
            weight = target.weight.detach()
            # A sum is finite only where all its terms are, and takes a fraction of the time that looking at each takes.
            total = weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))
            if not bool(torch.isfinite(total)) and not bool(torch.isfinite(weight).all()):
                raise TargetError(
                    f"layer {target.name!r} has nan or infinite weights, which no criterion can rank; "
                    "restore a checkpoint from before, or lower the learning rate"
                )

    def warn_unchanged(self, layers: Iterable[str]) -> None:
        """Warns where the criterion measures change and some of these layers have not changed, so that scores tie."""
        still = [n for n in layers if self.evidence.unchanged(n, self._layers[n].target.weight)]
        if still:
            warnings.warn(
                f"criterion {self.criterion.name!r} measures change, and the weights of {', '.join(still)} have not "
                "changed: all their scores tie, and the first positions are masked",
                GossamerWarning,
                stacklevel=3,
            )

    def move(
        self, fractions: Mapping[str, Fraction], round_to: int | None = None, state_of: StateOf = lambda _: ()
    ) -> None:
        """Moves the masks to a fraction of each layer's units, exactly, and applies them.

        Args:
            fractions: layer name → fraction of units to mask; layers that it lacks are only masked again.
            round_to: as in `sparsify_model`.
            state_of: further tensors to zero where the weights are.
        """
        changed: dict[str, bool | Tensor] = {}
        if self.context.kind == "global":
            changed = self._move_global(max(fractions.values(), default=Fraction(0)), round_to, state_of)
        else:
            for name, layer in self._layers.items():
                self._apply(layer, state_of)
                if name not in fractions:
                    continue
                goal = self._rounded(count(fractions[name], layer.n_units), layer, round_to)
                if goal != layer.masked:
                    self._move_layer(layer, goal, state_of)
                    changed[name] = True
        for name, flag in changed.items():
            self.evidence.moved(name, self._layers[name].target.weight, flag)
        self._apply_companions(state_of)

    def apply(self, state_of: StateOf = lambda _: ()) -> None:
        """Zeroes what the masks mask, in the weights and in further tensors; the masks stay as they are."""
        for layer in self._layers.values():
            self._apply(layer, state_of)
        self._apply_companions(state_of)

    def masked_parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter that has a mask, with it: the weights, and what dies with their filters."""
        for target in self.targets:
            yield target.weight, self.masks.on(target.name, target.weight.device)
        yield from self._masked_companions()

    def state_dict(self) -> dict[str, Tensor]:
        """Masks and evidence, as flat tensors."""
        masks = {f"mask/{n}": t for n, t in self.masks.state_dict().items()}
        return {**masks, **self.evidence.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            FileError: it is of another network.
        """
        loaded = Masks({t.name: t.weight for t in self.targets})
        loaded.load_state_dict({n.removeprefix("mask/"): t for n, t in state.items() if n.startswith("mask/")})
        for name, layer in self._layers.items():
            mask = loaded[name].view(layer.target.view)
            if not torch.equal(mask, expand(units_of(mask, layer.dims), layer.target.view)):
                raise FileError(
                    f"the mask of layer {name!r} cuts through units of granularity {self.granularity.name!r}; use the "
                    "granularity that the state is from"
                )
        self.evidence.load_state_dict(state)
        self.masks, self._hints = loaded, {}
        for layer in self._layers.values():
            layer.masked = layer.n_units - int(torch.count_nonzero(self._units(layer)))
        self._pooled = (sum(layer.masked or 0 for layer in self._layers.values()), None)

    def release(self) -> None:
        """Lets go: masks are all True again, and weights may grow where they were masked."""
        for name, layer in self._layers.items():
            self.masks[name].fill_(True)
            layer.masked = 0
        self._hints = {}
        self._pooled = (0, None)

    # -- cutting ------------------------------------------------------------------------------------------------------

    def _cut(self, target: Target) -> _Layer:
        try:
            dims = self.granularity.spans(target.axes)
        except ArgumentError as error:
            raise TargetError(f"layer {target.name!r} ({target.type}): {error}") from None
        shape = [1 if i in dims else n for i, n in enumerate(target.view)]
        layer = _Layer(target, dims, int(torch.Size(shape).numel()))
        inputs = shape[target.axes.index("i")]
        if self.context.m and inputs % self.context.m:
            raise TargetError(
                f"layer {target.name!r}: {inputs} units along its inputs do not divide into blocks of "
                f"{self.context.m}, as context '{self.context}' needs; leave it dense with exclude=[{target.name!r}]"
            )
        return layer

    def _units(self, layer: _Layer) -> Tensor:
        mask = self.masks.on(layer.target.name, layer.target.weight.device)
        return units_of(mask.view(layer.target.view), layer.dims)

    def _scores(self, layer: _Layer) -> Tensor:
        name, weight = layer.target.name, layer.target.weight
        evidence = {k: widen(t) for k, t in self.evidence.gather(name, weight).items()}
        return pool(self.criterion.score(evidence).reshape(layer.target.view), layer.dims)

    def _rounded(self, masked: int, layer: _Layer, round_to: int | None) -> int:
        return masked if round_to is None else round_kept(masked, layer.n_units, round_to)

    # -- moving -------------------------------------------------------------------------------------------------------

    def _is_fast(self, layer: _Layer) -> bool:
        return layer.target.weight.device.type == "cpu" and not self.context.m

    def _flat_scores(self, layer: _Layer) -> Tensor | ScoresOnDemand:
        if not layer.dims and self.criterion.elementwise:
            return ScoresOnDemand(self.criterion, self.evidence.gather(layer.target.name, layer.target.weight))
        return self._scores(layer).reshape(-1)

    def _move_layer(self, layer: _Layer, goal: int, state_of: StateOf) -> None:
        name = layer.target.name
        need = goal - layer.masked if layer.masked is not None else 0
        if need > 0 and self._is_fast(layer):
            found = survey([self._flat_scores(layer)], [self._units(layer).reshape(-1)], need, self._hints.get(name))
            self._hints[name] = self._drop(layer, found[0], need, state_of)
        else:
            self._replace(layer, self._select(layer, self._scores(layer), goal), state_of)
        layer.masked = goal

    def _move_global(self, fraction: Fraction, round_to: int | None, state_of: StateOf) -> dict[str, bool | Tensor]:
        layers = list(self._layers.values())
        for layer in layers:
            self._apply(layer, state_of)
        goal = count(fraction, sum(layer.n_units for layer in layers))
        now = [layer.masked for layer in layers]
        known = [n for n in now if n is not None]
        fast = len(known) == len(now) and all(self._is_fast(layer) for layer in layers)
        if (goal, round_to) == self._pooled:
            return {}
        self._pooled = (goal, round_to)
        if not fast or goal < sum(known) or round_to is not None:
            return self._select_global(layers, goal, round_to, state_of)
        need = goal - sum(known)
        kept = [self._units(layer).reshape(-1) for layer in layers]
        found = survey([self._flat_scores(layer) for layer in layers], kept, need, self._hints.get(""))
        counts, threshold = pooled_counts(need, [c.n_settled for c in found], [c.scores for c in found])
        for layer, candidates, here in zip(layers, found, counts, strict=True):
            if here:
                self._drop(layer, candidates, here, state_of)
                layer.masked = (layer.masked or 0) + here
        left = sum(c.n_settled + len(c.scores) for c in found) - need
        self._hints[""] = hint_after(found[0].upper, threshold, left)
        return {layer.target.name: True for layer, here in zip(layers, counts, strict=True) if here}

    def _select_global(
        self, layers: Sequence[_Layer], goal: int, round_to: int | None, state_of: StateOf
    ) -> dict[str, bool | Tensor]:
        """The plain way, and the device's: counts by counting, then the layers one by one; nothing is copied back."""
        scores = [self._scores(layer) for layer in layers]
        nested = scores
        if round_to is None:  # else rounding has moved the masks off the goal, and the scores alone decide
            kept = [self._units(layer) for layer in layers]
            units = sum(layer.n_units for layer in layers)
            more = units - torch.stack([k.sum() for k in kept]).sum() <= goal
            nested = [nest(s, k, more) for s, k in zip(scores, kept, strict=True)]
        counts = global_counts(goal, nested)
        changed: dict[str, bool | Tensor] = {}
        for i, layer in enumerate(layers):
            masked: int | Tensor = counts[i]
            layer.masked = None
            if round_to is not None or self._is_fast(layer):
                masked = layer.masked = self._rounded(int(counts[i]), layer, round_to)
            units = self._select(layer, scores[i], masked)
            changed[layer.target.name] = (units != self._units(layer)).any()
            self._replace(layer, units, state_of)
        return changed

    def _select(self, layer: _Layer, scores: Tensor, goal: int | Tensor) -> Tensor:
        units = self._units(layer)
        if not self.context.m:
            return select(scores, units, goal)
        # Blocks run along the inputs: bring that axis last, choose, and bring it back.
        axis = layer.target.axes.index("i")
        chosen = select_n_m(scores.movedim(axis, -1), units.movedim(axis, -1), int(goal), self.context.m)
        return chosen.movedim(-1, axis)

    # -- writing ------------------------------------------------------------------------------------------------------

    def _drop(self, layer: _Layer, candidates: Candidates, need: int, state_of: StateOf) -> Hint | None:
        goes, hint = take(candidates, need)
        weight, positions = layer.target.weight, candidates.positions
        tensors = [weight, *state_of(weight)]
        flat = self.masks[layer.target.name].view(-1)
        if layer.dims:
            flat = self._units(layer).reshape(-1).clone()
        if candidates.settled is not None:
            flat ^= candidates.settled  # all of which were kept, as the candidates were
        # NumPy writes at positions faster than torch, and choosing from them first would take longer than writing all.
        flat.numpy()[positions.numpy()] = ~goes.numpy()
        if layer.dims:
            self._replace(layer, flat, state_of)
        elif candidates.settled is None and all(t.is_contiguous() for t in tensors):
            zero_at(tensors, positions[goes])
        else:
            zero_masked(tensors, self.masks[layer.target.name])
        return hint

    def _replace(self, layer: _Layer, units: Tensor, state_of: StateOf) -> None:
        target = layer.target
        cut = [1 if i in layer.dims else n for i, n in enumerate(target.view)]
        self.masks.replace(target.name, expand(units.reshape(cut), target.view).view(target.weight.shape))
        zero_masked([target.weight, *state_of(target.weight)], self.masks[target.name])

    def _apply(self, layer: _Layer, state_of: StateOf) -> None:
        if layer.masked == 0:
            return
        weight = layer.target.weight
        zero_masked([weight, *state_of(weight)], self.masks.on(layer.target.name, weight.device))

    # -- companions ---------------------------------------------------------------------------------------------------

    def _find_companions(self) -> dict[str, list[nn.Parameter]]:
        whole = [t for t in self.targets if {t.axes[d] for d in self._layers[t.name].dims} == set(t.axes) - {"g", "o"}]
        if not whole:
            return {}
        # A weight may serve several layers, and each has a bias and a normalisation of its own.
        users = {t.name: (t.module, *t.shared_with) for t in whole if not isinstance(t.module, nn.Embedding)}
        modules = {f"{i} {name}": m for name, ms in users.items() for i, m in enumerate(ms)}
        parts = find_companions(self.model, modules)
        return {name: [p for i in range(len(ms)) for p in parts[f"{i} {name}"]] for name, ms in users.items()}

    def _masked_companions(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, parameters in self._companions.items():
            layer = self._layers[name]
            channels = output_channels(self._units(layer), layer.target.axes, layer.dims)
            if channels is not None and layer.masked != 0:
                for parameter in parameters:
                    yield parameter, channels.contiguous()

    def _apply_companions(self, state_of: StateOf) -> None:
        for parameter, channels in self._masked_companions():
            zero_masked([parameter, *state_of(parameter)], channels)
