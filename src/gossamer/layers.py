"""Targets, cut into units, with their masks: what is read from the weights, and what is written to them."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.companions import find_companions
from gossamer.errors import ArgumentError, TargetError
from gossamer.evidence import Evidence, LastScores, Look, ScoresOnDemand, WholeScores, widen
from gossamer.masks import Masks, zero_at, zero_masked
from gossamer.rules.criteria import OF_DATA, Criterion
from gossamer.rules.granularity import REDUCTIONS, Granularity, Reduction, expand, output_channels, pool, units_of
from gossamer.rules.normalization import Normalization
from gossamer.rules.selection import Candidates, Hint, Scores, settle, take
from gossamer.sweeps import Competition, Units
from gossamer.targets import Target

StateOf = Callable[[Tensor], Iterable[Tensor]]
"""Parameter → further tensors of its shape that die with it, such as an optimizer's moments."""


@dataclass
class Layer:
    """A target on its way through the rules.

    Args:
        target: whose weight it is.
        axes: letters of the axes that the weight is cut along, blocks as axes of their own.
        view: their lengths.
        dims: which of these axes a unit spans.
        n_units: how many units there are.
        masked: how many of them are masked; None where only the device knows.
        floor: how many were zero before, and stay so whatever the schedule says.
        zeros: which these are, one bool a unit; None where there are none.
    """

    target: Target
    axes: str
    view: tuple[int, ...]
    dims: tuple[int, ...]
    n_units: int
    masked: int | None = 0
    floor: int = 0
    zeros: Tensor | None = None


class Layers(Mapping[str, Layer]):
    """The layers that take part, by name, with their masks and what a criterion may look at.

    Args:
        model: the network that the targets are of.
        targets: the weights.
        granularity: how they are cut.
        m: length of the blocks that units compete in along the inputs; 0 for none.
        criterion: says how much a unit matters.
        seed: of the criterion 'random'.
        reduction: how the scores of a unit's weights become one; by default their mean.
        normalization: what makes scores of different layers comparable; None where layers do not compete.
        look: gathers evidence of data (see `Evidence`).

    Raises:
        TargetError: a layer cannot be cut that way.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        granularity: Granularity,
        m: int,
        criterion: Criterion,
        seed: int = 0,
        *,
        reduction: Reduction | None = None,
        normalization: Normalization | None = None,
        look: Look | None = None,
    ) -> None:
        self.targets, self.criterion = targets, criterion
        self.reduction, self.normalization = reduction, normalization
        self._layers = {t.name: self._cut(t, granularity, m) for t in targets}
        weights = {t.name: t.weight for t in targets}
        self.masks = Masks(weights)
        self.evidence = Evidence(criterion, weights, seed, look)
        self._companions = self._find_companions(model)

    def __getitem__(self, name: str) -> Layer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def _cut(self, target: Target, granularity: Granularity, m: int) -> Layer:
        try:
            axes, view, dims = granularity.cut(target.axes, target.view)
        except ArgumentError as error:
            remedy = "" if "fit" in str(error) else f"; leave it out with exclude=[{target.name!r}]"
            raise TargetError(f"layer {target.name!r} ({target.type}): {error}{remedy}") from None
        shape = [1 if i in dims else n for i, n in enumerate(view)]
        layer = Layer(target, axes, view, dims, int(torch.Size(shape).numel()))
        inputs = shape[axes.index("i")]
        if m and inputs % m:
            way = "" if granularity.name == "weight" else "take granularity='weight', or "
            raise TargetError(
                f"layer {target.name!r}: {inputs} units along its inputs do not divide into blocks of {m}, as the "
                f"context needs; {way}leave it dense with exclude=[{target.name!r}]"
            )
        return layer

    @contextlib.contextmanager
    def scored_by(self, criterion: Criterion | None) -> Generator[None]:
        """Lets another criterion score for a while; None for the one that there is."""
        if criterion is None:
            yield
            return
        own = self.criterion, self.evidence
        weights = {t.name: t.weight for t in self.targets}
        self.criterion, self.evidence = criterion, Evidence(criterion, weights, own[1].seed, own[1].look)
        try:
            yield
        finally:
            self.criterion, self.evidence = own

    def units(self, layer: Layer) -> Tensor:
        """The mask, one bool a unit."""
        mask = self.masks.on(layer.target.name, layer.target.weight.device)
        return units_of(mask.view(layer.view), layer.dims)

    def scores(self, layer: Layer) -> Tensor:
        """How much each unit matters, in the shape of the weight's view, cut."""
        name, weight = layer.target.name, layer.target.weight
        evidence = {k: widen(t) for k, t in self.evidence.gather(name, weight).items()}
        scores = pool(self.criterion.score(evidence).reshape(layer.view), layer.dims, self.reduction)
        if layer.dims:
            self._check_scores(layer, scores, "reduction")
        if self.normalization is not None:
            scores = self.normalization(scores)
            self._check_scores(layer, scores, "normalization")
        # On a GPU a look would wait for the device.
        if scores.device.type == "cpu" and bool(scores.isnan().any()):
            raise ArgumentError(
                f"layer {name!r} gets scores of nan by criterion {self.criterion.name!r}; check the weights for nan, "
                "or the criterion's own arithmetic, or that of a reduction or a normalization"
            )
        if layer.zeros is None:
            return scores
        return scores.masked_fill(layer.zeros.to(scores.device).view(scores.shape), -torch.inf)

    def _check_scores(self, layer: Layer, scores: Any, what: str) -> None:
        if not isinstance(scores, Tensor) or scores.numel() != layer.n_units:
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else reprlib.repr(scores)
            raise ArgumentError(
                f"{what} gives {got} for layer {layer.target.name!r}, which has {layer.n_units} units; it must give "
                "one score a unit"
            )

    def flat_scores(self, layer: Layer, last: LastScores | None = None) -> Tensor | WholeScores | ScoresOnDemand:
        """The same, flat; slice by slice where that will do, and for single weights not before they are asked for.

        Args:
            layer: of these.
            last: what holds those of one of the layers that compete.
        """
        if layer.dims:  # as many as there are units
            return self.scores(layer).reshape(-1)
        if self._comes_in_slices(layer):
            return ScoresOnDemand(self.criterion, self.evidence.gather(layer.target.name, layer.target.weight))
        return WholeScores(lambda: self.scores(layer).reshape(-1), layer.n_units, last or LastScores())

    def _comes_in_slices(self, layer: Layer) -> bool:
        # What is made for a layer, such as noise, would be held for all layers.
        is_there = not {"noise", *OF_DATA}.intersection(self.criterion.needs)
        return self.criterion.elementwise and self.normalization is None and layer.zeros is None and is_there

    def to_drop(
        self,
        layers: Sequence[Layer],
        need: int,
        hint: Hint | None,
        state_of: StateOf,
        least: Sequence[int] = (),
    ) -> Competition | None:
        """Layers that compete, for `sweeps.drop`; None where their scores have to be computed piece by piece.

        Args:
            layers: of which it is known how many units are masked.
            need: how many units are to go, in all together.
            hint: from the last time.
            state_of: further tensors to zero where the weights are.
            least: how many units each layer must keep; by default none.
        """
        units: list[Units] = []
        for layer, keeps in zip(layers, least or [0] * len(layers), strict=True):
            name, weight = layer.target.name, layer.target.weight
            n_kept = layer.n_units - (layer.masked or 0)
            if self.is_read_from_bits(layer):
                (scored,) = self.evidence.gather(name, weight).values()
                mask = self.masks.on(name, weight.device)
                units.append(Units(scored, True, mask, n_kept, [weight, *state_of(weight)], keeps))
            elif layer.dims or (len(layers) == 1 and not self._comes_in_slices(layer)):
                self.apply(layer, state_of)
                kept = self.units(layer).reshape(-1).clone()
                units.append(Units(self.scores(layer).reshape(-1), False, kept, n_kept, (), keeps))
            else:
                return None
        return Competition(units, need, hint)

    @property
    def _is_known(self) -> bool:
        """Whether what gives scores is the package's own."""
        return self.criterion.elementwise and self.reduction in (None, *REDUCTIONS.values())

    @property
    def come_from_weights(self) -> bool:
        """Whether weights are ranked as they are, so that who ranks them sees what `check_weights` looks for."""
        own = self._is_known and self.criterion.needs == ("weight",)
        return own and all(self.is_read_from_bits(layer) for layer in self.values())

    def is_read_from_bits(self, layer: Layer) -> bool:
        """Whether a layer's scores are the magnitudes of single weights, which need not be computed to be compared."""
        return self.criterion.magnitude and not layer.dims and self.normalization is None

    def dropped(self, layers: Sequence[Layer], competition: Competition, state_of: StateOf) -> None:
        """Puts masks of units that were dropped in place."""
        for layer, units in zip(layers, competition.layers, strict=True):
            if not units.is_magnitude:
                self.replace(layer, units.kept, state_of)

    @property
    def has_companions(self) -> bool:
        """Whether something else dies with a unit."""
        return any(self._companions.values())

    def drop(self, layer: Layer, scores: Scores, candidates: Candidates, need: int, state_of: StateOf) -> Hint | None:
        """Masks the candidates that go, and zeroes them; a hint for the next time."""
        goes, hint = take(candidates, need)
        weight, positions = layer.target.weight, candidates.positions
        tensors = [weight, *state_of(weight)]
        flat = self.masks[layer.target.name].view(-1)
        if layer.dims:
            flat = self.units(layer).reshape(-1).clone()
        settle(scores, flat, candidates.lower)
        # NumPy writes at positions faster than torch, and choosing from them first would take longer than writing all.
        flat.numpy()[positions.numpy()] = ~goes.numpy()
        if layer.dims:
            self.replace(layer, flat, state_of)
        elif not candidates.n_settled and all(t.is_contiguous() for t in tensors):
            zero_at(tensors, positions[goes])
        else:
            zero_masked(tensors, self.masks[layer.target.name])
        return hint

    def replace(self, layer: Layer, units: Tensor, state_of: StateOf) -> None:
        """Puts another mask in place, one bool a unit, and zeroes what it masks."""
        target = layer.target
        cut = [1 if i in layer.dims else n for i, n in enumerate(layer.view)]
        self.masks.replace(target.name, expand(units.reshape(cut), layer.view).view(target.weight.shape))
        zero_masked([target.weight, *state_of(target.weight)], self.masks[target.name])

    def apply(self, layer: Layer, state_of: StateOf) -> None:
        """Zeroes what is masked."""
        if layer.masked == 0:
            return
        weight = layer.target.weight
        zero_masked([weight, *state_of(weight)], self.masks.on(layer.target.name, weight.device))

    def masked_companions(self, without: Collection[str] = ()) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Biases and normalisations whose channels die with the layers' filters, with their masks."""
        for name, parameters in self._companions.items():
            if name in without:
                continue
            layer = self[name]
            channels = output_channels(self.units(layer), layer.axes, layer.dims)
            if channels is not None and layer.masked != 0:
                for parameter in parameters:
                    yield parameter, channels.contiguous()

    def apply_companions(self, state_of: StateOf, without: Collection[str] = ()) -> None:
        """Zeroes those."""
        for parameter, channels in self.masked_companions(without):
            zero_masked([parameter, *state_of(parameter)], channels)

    def _find_companions(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        whole = [la.target for la in self.values() if {la.axes[d] for d in la.dims} == set(la.axes) - {"g", "o"}]
        if not whole:
            return {}
        # A weight may serve several layers, and each has a bias and a normalisation of its own.
        users = {t.name: (t.module, *t.shared_with) for t in whole if not isinstance(t.module, nn.Embedding)}
        modules = {f"{i} {name}": m for name, ms in users.items() for i, m in enumerate(ms)}
        parts = find_companions(model, modules)
        return {name: [p for i in range(len(ms)) for p in parts[f"{i} {name}"]] for name, ms in users.items()}

    def check_weights(self, without: Collection[str] = ()) -> None:
        """Makes sure that scores can be compared.

        Args:
            without: layers of which only the shape is looked at.

        Raises:
            TargetError: a weight is nan or infinite, or of another shape than its mask.
            ArgumentError: the criterion gives something else than scores.
        """
        for target in self.targets:
            weight, mask = target.weight.detach(), self.masks[target.name]
            if weight.shape != mask.shape:
                raise TargetError(
                    f"layer {target.name!r} has a weight of shape {tuple(weight.shape)} now, and its mask is of "
                    f"{tuple(mask.shape)}; make a new Sparsifier after changing layers"
                )
            if target.name in without:
                continue
            # A sum is finite only where all its terms are, and takes a fraction of the time that looking at each takes.
            total = weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))
            if not bool(torch.isfinite(total)) and not bool(torch.isfinite(weight).all()):
                raise TargetError(
                    f"layer {target.name!r} has nan or infinite weights, which no criterion can rank; "
                    "restore a checkpoint from before, or lower the learning rate"
                )
        if not self._is_known:  # a function of the user's own may fail at any layer
            try:
                for layer in self.values():
                    self.scores(layer)
            finally:
                self.evidence.drop()
