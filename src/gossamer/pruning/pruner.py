"""Removes filters for good, at once or along a schedule: scores → counts → units, over groups of coupled channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.calibration import Calibration, as_calibration, check_data
from gossamer.errors import ArgumentError, StateError, TargetError
from gossamer.evidence import Evidence
from gossamer.optimizers import HasState, check_optimizer, checked_steps, gradient_factor, watched
from gossamer.pruning.choosing import Choice, check_context
from gossamer.pruning.counting import shared_out
from gossamer.pruning.filters import as_filter_types, filter_layers, kept_whole
from gossamer.pruning.graph import find_groups
from gossamer.pruning.inputs import as_inputs, outputs_of, twin_of
from gossamer.pruning.report import PruningReport, count_macs, count_params
from gossamer.pruning.rows import rows_of
from gossamer.pruning.scoring import UnitScores
from gossamer.pruning.states import check_state, kept_in, rules_of, state_of
from gossamer.pruning.surgery import Surgeon
from gossamer.pruning.trying import tried
from gossamer.rules.allocation import Context, as_context, check_round_to
from gossamer.rules.criteria import Criterion, as_criterion
from gossamer.rules.schedules import Schedule, as_schedule
from gossamer.targets import LayerTypes, as_patterns, match_layers, resolve_sparsity, unwrapped
from gossamer.warning import warn_of_a_fraction


class Pruner:
    """Removes the least important filters of a network, with all that hangs on them, and leaves it smaller and dense.

    Channels that a residual sum, a product or a depthwise convolution joins live and die together; such a group counts
    as one layer. Of n filters s % are `round(s·n/100)`, halves up; what cannot be met is met as nearly as possible, and
    `report` says why. The network is changed in place: its parameters stay the same objects, and an optimizer's state
    of them is cut too.

    Args:
        model: the network.
        sparsity: percent of filters to remove, or a dict of layer name or pattern → percent (context 'local'); what
            is joined with a layer goes with it.
        context: which filters compete: 'local' (inside each group), 'global' (across all of them), any other registered
            name but 'output', or a `Context`, such as one with a ceiling for each group.
        criteria: how much a filter matters: a registered name, a `Criterion`, or a function; a filter's score is the
            mean over its weights, and over all the filters that go with it.
        example_inputs: one batch of what its forward takes: a tensor, or a tuple. By default an image of 224×224 pixels
            (or a row of features) is made for the first layer.
        schedule: how progress goes from 0 to 1, where `step` is used.
        total_steps: how many optimizer steps the run has; needed where `step` is called without a position.
        optimizer: whose state is cut along; a new one may take its place at any time.
        round_to: round the filters that a group keeps to the nearest multiple of this; never none.
        layer_type: type of layer whose filters are removed, or a tuple of types. nn.MultiheadAttention stands for whole
            heads, and so do Linear layers that are an attention's queries, keys and values.
        exclude: names or patterns of layers that keep all their filters, and with them what is joined with them.
        seed: of the criterion 'random'.
        data: for criteria that look at gradients or activations: batches, see `Calibration`, or a `Calibration` itself
            where the model is part of a larger network. They are gone through whenever filters go, in the network as it
            is then.
        loss_func: (output, target) → loss, for criteria that look at gradients.

    Raises:
        ArgumentError: an argument that cannot be used, or torch-pruning is not installed.
        TargetError: a layer name that matches nothing, or no layer takes part.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> small = Pruner(net, 50, example_inputs=torch.rand(1, 3, 8, 8)).prune_model()
        >>> small[0].weight.shape[0], small[2].weight.shape[1]
        (4, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Mapping[str, float],
        context: str | Context = "local",
        criteria: str | Criterion | Callable[..., Tensor] = "large_final",
        example_inputs: Any = None,
        *,
        schedule: Schedule | str | Callable[..., Any] = "one_cycle",
        total_steps: int | None = None,
        optimizer: HasState | None = None,
        round_to: int | None = None,
        layer_type: LayerTypes = nn.Conv2d,
        exclude: Iterable[str] = (),
        seed: int = 0,
        data: Any = None,
        loss_func: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model = unwrapped(model) if isinstance(model, nn.Module) else model
        self.context, self.criterion, self.schedule = as_context(context), as_criterion(criteria), as_schedule(schedule)
        check_context(self.context, sparsity)
        check_round_to(round_to, self.context)
        self.total_steps, self.round_to, self.seed = checked_steps(total_steps), round_to, seed
        kinds = as_filter_types(layer_type)
        inputs = as_inputs(self.model, example_inputs)  # which looks at the network, too
        check_optimizer(optimizer, self.model)
        self.calibration: Calibration | None = as_calibration(self.model, data, loss_func)
        check_data(self.criterion, self.calibration)
        expected = outputs_of(twin_of(self.model), inputs)
        groups = find_groups(self.model, inputs)
        names = filter_layers(self.model, kinds, groups)
        left_out = {n for pattern in as_patterns(exclude) for n in match_layers(pattern, names, what="exclude")}
        wanted = [n for n in names if n not in left_out]
        if not wanted:
            raise TargetError(f"exclude={exclude!r} leaves no layer to prune, out of {len(names)}; exclude fewer")
        self.sparsity = sparsity
        self.targets: dict[str, Fraction] = resolve_sparsity(sparsity, wanted)
        warn_of_a_fraction(sparsity)
        groups = [kept_whole(g, left_out) for g in groups]
        self.groups = tried(self.model, groups, inputs, expected, set(self.targets))
        self._surgeon = Surgeon(self.model, self.groups)
        taking = [i for i, g in enumerate(self.groups) if not g.why and any(n in self.targets for n in g.layers)]
        judged = [n for i in taking for n in self.groups[i].layers if n in self.targets]
        self._scores = UnitScores(self._surgeon, judged, self.criterion, seed, self.calibration)
        self.targets |= shared_out([self.groups[i] for i in taking], self.targets, self.context, self._scores.targets)
        self._choice = Choice(self._surgeon, taking, self._scores, self.context, round_to)
        self._inputs = inputs
        self._before = count_params(self.model), count_macs(self.model, inputs)
        self._types = {n: type(self.model.get_submodule(n)).__name__ for g in self.groups for n in g.layers}
        self.progress, self.steps_done, self._floor = 0.0, 0, 0.0
        self._has_warned = False
        self._optimizer: HasState | None = None
        self._hook: RemovableHandle | None = None
        self.optimizer = optimizer
        if not (self.evidence.takes_data and self.criterion.elementwise):
            try:
                for i in taking:  # what a criterion gives is looked at before anything is cut
                    self._scores.of(i)
            finally:
                self.evidence.drop()

    @property
    def evidence(self) -> Evidence:
        """What the criterion may look at."""
        return self._scores.evidence

    @property
    def looks_at_gradients(self) -> bool:
        """Whether the run has to see every step's gradients, which it does right before the optimizer's step."""
        return "accumulated" in self.criterion.needs

    @property
    def optimizer(self) -> HasState | None:
        """Whose state is cut along with the filters; a new one may take its place at any time."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: HasState | None) -> None:
        if optimizer is self._optimizer:
            return
        check_optimizer(optimizer, self.model)
        self._optimizer = optimizer
        if self._hook is not None:
            self._hook.remove()
        self._hook = watched(optimizer, self) if self.looks_at_gradients else None

    def prune_model(self, iterations: int = 1) -> nn.Module:
        """Removes all that was asked for, at once.

        Args:
            iterations: in how many rounds, each of which scores anew what is left, and keeps the same share of it
                (SynFlow takes 100).

        Returns:
            The network, which is smaller now.

        Raises:
            ArgumentError: no positive number of rounds, or data that cannot be used.
            TargetError: weights with nan or infinity in them, or data that does not reach a layer.

        Example:
            >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
            >>> xb = torch.rand(1, 3, 8, 8)
            >>> Pruner(net, 75, "global", "synflow", xb, data=xb).prune_model(iterations=10)[0].out_channels
            2
        """
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ArgumentError(f"iterations={iterations!r} is no positive integer; 1 removes all at once")
        for i in range(1, iterations):
            if self.progress < 1:
                self._move({n: 1 - Fraction(float(1 - f) ** (i / iterations)) for n, f in self.targets.items()})
        self._prune_to(1.0)
        return self.model

    def before_step(self) -> None:
        """Looks at the gradients right before the optimizer's step; nothing of the network changes.

        A torch.optim.Optimizer calls it by itself, through its step's pre-hook. Only criteria that add up gradients
        over the steps, as 'sanh_movement' does, need it.
        """
        self._scores.observe(gradient_factor(self.optimizer))

    def step(self, position: float | None = None) -> bool:
        """Follows one step of the optimizer: removes filters up to where the schedule stands.

        Args:
            position: the fraction of training that is done now, in [0, 1]; by default steps done over `total_steps`.

        Returns:
            Whether any filter went.

        Raises:
            StateError: no position, and `total_steps` is not known.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
            >>> pruner = Pruner(net, 50, schedule="lin", total_steps=2, layer_type=nn.Linear)
            >>> [(pruner.step(), net[0].out_features) for _ in range(2)]
            [(True, 6), (True, 4)]
        """
        done = self.steps_done + 1
        if position is None:
            if self.total_steps is None:
                raise StateError(
                    "step() does not know how far training is; give total_steps, epochs × len(loader), to the Pruner, "
                    "or a position to step"
                )
            position = min(1.0, done / self.total_steps)
        is_due = done % self.schedule.every_n_steps == 0 or position >= 1
        went = self.move_to(position) if is_due else False
        self.steps_done = done
        return went

    def move_to(self, position: float) -> bool:
        """Removes filters up to where the schedule stands at a position.

        Args:
            position: fraction of training, in [0, 1].

        Returns:
            Whether any filter went.
        """
        return self._prune_to(self.schedule(position))

    def report(self) -> PruningReport:
        """What became of each layer that takes part, and of those that went with it; counted from the network."""
        asked = {i: self._choice.asked.get(i, 0) for i in self._choice.taking} if self.context.is_pooled else {}
        rows = rows_of(self._surgeon, self._types, self.targets, self.progress, asked, self.round_to)
        sizes = (self._before[0], count_params(self.model), self._before[1], count_macs(self.model, self._inputs))
        return PruningReport(rows, *sizes)

    def sparsity_now(self) -> float:
        """Percent of the units that took part which are gone: filters, where joined ones count once."""
        kept = self._choice.kept
        units = sum(k.numel() for k in kept)
        return 100 * (1 - sum(int(k.sum()) for k in kept) / units) if units else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Which filters are gone, how far the run is, and by which rules; weights and optimizer save themselves."""
        counters = {"progress": self.progress, "steps_done": self.steps_done, "floor": self._floor}
        asked = {str(i): n for i, n in self._choice.asked.items()}
        return state_of(self._surgeon, rules_of(self), {**counters, "asked": asked}, self.evidence.state_dict())

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Makes sure that a state is of a run by these rules, on this network.

        Raises:
            FileError: it is not, or of a newer version, or filters are gone here that the state has.
        """
        check_state(state, self._surgeon, rules_of(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Removes what was gone in the run that gave this state; the weights can be loaded after that.

        Raises:
            FileError: it is of another network, of a run by other rules, or of a newer version; nothing is changed.
        """
        self.check_state(state)
        put_back = self.remember()
        try:
            self._cut(kept_in(state, self._surgeon))
            self.evidence.load_state_dict(state["evidence"])
        except BaseException:
            put_back()
            raise
        self.progress, self.steps_done, self._floor = state["progress"], state["steps_done"], state["floor"]
        self._choice.asked = {int(i): n for i, n in state["asked"].items()}

    def remember(self) -> Callable[[], None]:
        """A function that puts the network and the pruner back as they are now, with the filters that go meanwhile.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
            >>> pruner = Pruner(net, 50, layer_type=nn.Linear); put_back = pruner.remember()
            >>> _ = pruner.prune_model(); put_back(); net[0].out_features
            8
        """
        network = self._surgeon.remember()
        counters = self.progress, self.steps_done, self._floor, dict(self._choice.asked)
        kept = {kind: {n: t.clone() for n, t in layers.items()} for kind, layers in self.evidence.kept.items()}

        def put_back() -> None:
            network()
            self.progress, self.steps_done, self._floor, self._choice.asked = counters
            self.evidence.kept = kept

        return put_back

    def restart(self) -> None:
        """Begins another round of training from what is left: filters that are gone stay gone."""
        self.steps_done, self._floor = 0, self.progress

    # -- inside -------------------------------------------------------------------------------------------------------

    def _prune_to(self, progress: float) -> bool:
        progress = max(progress, self._floor, self.progress)  # what is gone does not come back, whatever the schedule
        if progress == self.progress:
            return False
        share = Fraction(progress)
        went = self._move({n: f * share for n, f in self.targets.items()})
        self.progress = progress
        if progress >= 1:
            self._choice.warn_thin()
        return went

    @torch.no_grad()
    def _move(self, fractions: Mapping[str, Fraction]) -> bool:
        """Removes filters until a fraction of each layer's is gone."""
        if not self._has_warned:
            self._has_warned = True
            self._scores.warn_unchanged()
        units = self._choice.choose(fractions)
        if all(u is None for u in units):
            return False
        self._cut(units)
        for i, left in enumerate(units):
            if left is not None:
                self._scores.moved(i)
        return True

    def _cut(self, units: Sequence[Tensor | None]) -> None:
        self._surgeon.cut(units, self.optimizer, self._scores.cut)
