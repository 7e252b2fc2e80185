"""One shot: the rules, over targets. Targets → evidence → scores → budget → masks → weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.calibration import as_calibration, check_data
from gossamer.errors import ArgumentError, TargetError
from gossamer.evidence import Evidence, StepEvidence
from gossamer.gathering import gather
from gossamer.keeping import keep_zeros
from gossamer.layers import Layers, StateOf
from gossamer.mask_state import load_mask_state, mask_state
from gossamer.masks import Masks
from gossamer.moving import Mover
from gossamer.report import SparsityReport, report_of
from gossamer.resolving import fixed_layers, resolve
from gossamer.rules.allocation import Context, as_context
from gossamer.rules.criteria import Criterion, as_criterion
from gossamer.rules.granularity import Granularity, Reduction, as_granularity, as_reduction, units_of
from gossamer.rules.normalization import Normalization, as_normalization, normalize_none
from gossamer.targets import LayerTypes, find_targets, unwrapped
from gossamer.warning import warn_of_a_fraction, warn_thin, warn_unchanged


class Sparsifier:
    """Sets the least important weights of a network to exact zero, and keeps the masks.

    Args:
        model: the network, or a part of it. Nothing is added to it, ever.
        granularity: which weights live and die together: a registered name ('weight', 'kernel', 'filter', …), the sizes
            of a block ('16x16') or a `Granularity`.
        context: which units compete: a registered name ('local', inside each layer; 'global', across all; 'output',
            'erk', 'lamp', …), an N:M pattern ('2:4') or a `Context`.
        criteria: how much a weight matters: a registered name, a `Criterion`, or a function (`lambda w: w.abs()`).
        layer_type: type of layer that takes part, or a tuple of types.
        exclude: names or patterns of layers that do not.
        seed: of the criterion 'random'.
        skip_frozen: leave the masks of layers whose weights are frozen (`requires_grad` is False) as they are; by
            default frozen layers become sparse too. Looked at anew each time, so an unfrozen layer joins in.
        reduction: how the scores of a unit's weights become one: 'mean', 'sum', 'l2', 'max', or a function.
        normalization: how scores of different layers are made comparable where layers compete: 'none', 'sum', 'max',
            'mean', 'gaussian', 'lamp', or a function. Inside a layer it changes nothing.
        data: for criteria that look at gradients or activations: batches, see `Calibration`, or a `Calibration` itself
            where the model is part of a larger network. They are gone through whenever masks move.
        loss_func: (output, target) → loss, for criteria that look at gradients.

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
        skip_frozen: bool = False,
        reduction: str | Reduction = "mean",
        normalization: str | Normalization = "none",
        data: Any = None,
        loss_func: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model = unwrapped(model) if isinstance(model, nn.Module) else model
        self.skip_frozen = skip_frozen
        self.granularity = as_granularity(granularity)
        self.context = as_context(context)
        self.criterion = as_criterion(criteria)
        self.targets = find_targets(self.model, layer_type, exclude)
        self.reduction, self.normalization = as_reduction(reduction), as_normalization(normalization)
        if self.context.normalization:
            self.normalization = as_normalization(self.context.normalization)
        self.calibration = as_calibration(self.model, data, loss_func)
        check_data(self.criterion, self.calibration)
        self._layers = Layers(
            self.model,
            self.targets,
            self.granularity,
            self.context.m,
            self.criterion,
            seed,
            reduction=self.reduction,
            normalization=self.normalization
            if self.context.is_pooled and self.normalization is not normalize_none
            else None,
            look=None if self.calibration is None else partial(gather, self.calibration, self.targets),
        )
        self._mover = Mover(self._layers, self.context, skip_frozen)

    @property
    def masks(self) -> Masks:
        """One bool a weight, True = kept, by layer."""
        return self._layers.masks

    @property
    def evidence(self) -> Evidence:
        """What the criterion may look at."""
        return self._layers.evidence

    def sparsify_model(
        self, sparsity: float | Mapping[str, float], round_to: int | None = None, iterations: int = 1
    ) -> None:
        """Makes every layer as sparse as asked, at once.

        Args:
            sparsity: percent of units to mask, or a dict of layer name or pattern → percent (layers that it does not
                name stay as they are). Where the target is the network's ('global', 'erk', …), the dict fixes the
                layers that it names, and '*' is what the others reach together.
            round_to: round the units that a layer keeps to the nearest multiple of this; never none.
            iterations: in how many rounds, each of which scores anew and keeps the same share of what is left
                (SynFlow takes 100).

        Raises:
            ArgumentError: a target that cannot be used or met in this context.
            TargetError: a layer name that matches nothing, or weights with nan or infinity in them.

        Example:
            >>> conv = nn.Conv2d(3, 16, 3)
            >>> Sparsifier(nn.Sequential(conv), "filter").sparsify_model(40, round_to=8)
            >>> int((conv.weight.flatten(1) != 0).any(1).sum())
            8
        """
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ArgumentError(f"iterations={iterations!r} is no positive integer; 1 masks all at once")
        fractions, fixed = self.resolve(sparsity, round_to), self.fixed_layers(sparsity)
        warn_of_a_fraction(sparsity)
        self.warn_unchanged(fractions)
        for i in range(1, iterations + 1):
            share = {
                n: f if i == iterations else 1 - Fraction(float(1 - f) ** (i / iterations))
                for n, f in fractions.items()
            }
            self.move(share, round_to, fixed=fixed, check=i == 1)
        self.warn_thin()

    def warn_thin(self) -> None:
        """Warns where competing layers have left one of them next to nothing."""
        warn_thin(self._layers, self.context, self.granularity.name)

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
        if self.context.is_shared:
            raise ArgumentError(
                f"sparsify_layer cannot make one layer compete with all others, as context='{self.context}' means; use "
                "context='local', or sparsify_model"
            )
        if isinstance(layer, str):
            name = layer
        else:
            weight = getattr(layer, "weight", None)
            found = next((t.name for t in self.targets if weight is not None and t.weight is weight), None)
            if found is None:
                raise TargetError(
                    f"the layer {layer!r} takes no part here; those that do: {', '.join(t.name for t in self.targets)}"
                )
            name = found
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
        return resolve(sparsity, round_to, self.model, self._layers, self.context, self.granularity.name)

    def fixed_layers(self, sparsity: float | Mapping[str, float]) -> frozenset[str]:
        """The layers that a target names one by one where the others share one.

        Args:
            sparsity: as in `sparsify_model`.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            >>> Sparsifier(net, context="global", layer_type=nn.Linear).fixed_layers({"1": 50, "*": 80})
            frozenset({'1'})
        """
        return fixed_layers(sparsity, self._layers, self.context)

    def check_weights(self) -> None:
        """Makes sure that scores can be compared.

        Raises:
            TargetError: a weight is nan or infinite, or of another shape than its mask.
            ArgumentError: the criterion gives something else than scores.
        """
        self._layers.check_weights()

    def warn_unchanged(self, layers: Iterable[str]) -> None:
        """Warns where the criterion measures change and some of these layers have not changed, so that scores tie."""
        warn_unchanged({n: self._layers[n] for n in layers}, self.evidence, self.criterion.name)

    def keep_zeros(
        self, fractions: Mapping[str, Fraction], round_to: int | None = None, fixed: Collection[str] = ()
    ) -> int:
        """Masks the units that are zero already, beside those that are masked: they stay zero, whatever is asked for.

        A layer that is zero throughout, as some are when they are made, is not taken for a sparse one.

        Args:
            fractions: what the layers are to reach, as `resolve` gives it.
            round_to: as in `sparsify_model`.
            fixed: as `fixed_layers` gives it.

        Returns:
            How many weights the layers have masked in which any were found.

        Raises:
            ArgumentError: a target lies below what is there, or the zeros do not fit the granularity or an N:M pattern.

        Example:
            >>> layer = nn.Linear(4, 1, bias=False)
            >>> Sparsifier(layer, layer_type=nn.Linear).sparsify_model(50)
            >>> sparsifier = Sparsifier(layer, layer_type=nn.Linear)
            >>> sparsifier.keep_zeros(sparsifier.resolve(75))
            2
        """
        n = keep_zeros(self._layers, self.context, self.granularity.name, fractions, round_to, fixed)
        if n:
            self._mover.forget()
        return n

    def move(
        self,
        fractions: Mapping[str, Fraction],
        round_to: int | None = None,
        state_of: StateOf = lambda _: (),
        fixed: Collection[str] = (),
        by: Criterion | None = None,
        check: bool = False,
    ) -> None:
        """Moves the masks to a fraction of each layer's units, exactly, and applies them.

        Args:
            fractions: layer name → fraction of units to mask; layers that it lacks are only masked again.
            round_to: as in `sparsify_model`.
            state_of: further tensors to zero where the weights are.
            fixed: as `fixed_layers` gives it.
            by: another criterion, for this once.
            check: make sure first that scores can be compared, as `check_weights` does.

        Raises:
            TargetError: see `check_weights`.
        """
        with self._layers.scored_by(by):
            self._mover.move(fractions, round_to, state_of, fixed, check)

    def exchanged(
        self, fraction: float, grow: Criterion, step: int, seed: int = 0, factor: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Masks in which the least important of the kept units have made room for others; `exchange` puts them there.

        Args:
            fraction: of each layer's kept units, how many go.
            grow: by what others come, the highest scores first; looks at gradients, weights or noise.
            step: which step it is, for the noise.
            seed: of the noise.
            factor: what gradients are multiplied with, 0-d; None for 1.

        Returns:
            Layer name → bool, one a unit.

        Raises:
            ArgumentError: what grows is asked to be chosen by something that a step does not have.
            StateError: a layer has no gradient, and that is asked for.
        """
        return self._mover.exchanged(fraction, grow, StepEvidence(grow, seed, step, factor))

    def exchange(self, masks: Mapping[str, Tensor], state_of: StateOf = lambda _: ()) -> None:
        """Puts masks in place that `exchanged` gave; what they let grow starts at zero, and so does its state.

        Args:
            masks: layer name → bool, one a unit.
            state_of: further tensors to zero where the weights are.
        """
        self._mover.replace(masks, state_of)

    def observe(self, factor: Tensor | None = None) -> None:
        """Looks at the gradients of one step, right before the optimizer makes it.

        Args:
            factor: what gradients are multiplied with, 0-d; 0 where the step will do nothing. None for 1.
        """
        self.evidence.observe({t.name: t.weight for t in self.targets}, factor)

    def check_criterion(self, criterion: Criterion) -> None:
        """Makes sure that there is data for another criterion.

        Raises:
            ArgumentError: there is not.
        """
        check_data(criterion, self.calibration)

    def put_mask(self, layer: str, mask: Tensor) -> None:
        """Puts a mask of single weights in place, and zeroes what it masks.

        Args:
            layer: its name.
            mask: bool, True = kept, of the weight's shape; constant over every unit.
        """
        own = self._layers[layer]
        units = units_of(mask.view(own.view), own.dims)
        self._layers.replace(own, units, lambda _: ())
        own.masked = own.n_units - int(torch.count_nonzero(units))
        self._mover.forget()

    @property
    def has_companions(self) -> bool:
        """Whether biases and normalisations die with the units."""
        return self._layers.has_companions

    def apply(self, state_of: StateOf = lambda _: (), without: Collection[str] = ()) -> None:
        """Zeroes what the masks mask, in the weights and in further tensors; the masks stay as they are.

        Args:
            state_of: further tensors to zero where the weights are.
            without: layers that are left alone.
        """
        for name, layer in self._layers.items():
            if name not in without:
                self._layers.apply(layer, state_of)
        self._layers.apply_companions(state_of, without)

    def masked_parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter that has a mask, with it: the weights, and what dies with their filters."""
        for target in self.targets:
            yield target.weight, self.masks.on(target.name, target.weight.device)
        yield from self._layers.masked_companions()

    def state_dict(self) -> dict[str, Tensor]:
        """Masks, evidence, and how many units of each layer were zero before, as flat tensors."""
        return mask_state(self._layers, self._mover)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            FileError: it is of another network.
        """
        load_mask_state(state, self._layers, self._mover, self.granularity.name)

    def release(self) -> None:
        """Lets go: masks are all True again, and weights may grow where they were masked."""
        for name, layer in self._layers.items():
            self.masks[name].fill_(True)
            layer.masked = layer.floor = 0
            layer.zeros = None
        self._mover.forget()
