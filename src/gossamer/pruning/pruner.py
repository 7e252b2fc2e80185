"""Removes filters for good, at once or along a schedule: scores → counts → units, over groups of coupled channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gossamer.errors import ArgumentError, FileError, StateError, TargetError
from gossamer.evidence import OF_DATA, Evidence, widen
from gossamer.pruning.graph import Group, Member, find_groups
from gossamer.pruning.inputs import as_inputs, outputs_of, twin_of
from gossamer.pruning.report import LayerPruning, PruningReport, count_macs, count_params, listed
from gossamer.pruning.surgery import Slice, Surgeon
from gossamer.pruning.trying import tried
from gossamer.rules.allocation import Context, as_context, check_round_to, count, global_counts, round_kept
from gossamer.rules.criteria import Criterion, as_criterion
from gossamer.rules.schedules import Schedule, as_schedule
from gossamer.rules.selection import select
from gossamer.targets import LayerTypes, as_layer_types, as_patterns, match_layers, resolve_sparsity, unwrapped
from gossamer.training import HasState, check_optimizer, checked_steps

_VERSION = 1


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
        context: which filters compete: 'local' (inside each group) or 'global' (across all of them).
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
    ) -> None:
        self.model = unwrapped(model) if isinstance(model, nn.Module) else model
        self.context, self.criterion, self.schedule = as_context(context), as_criterion(criteria), as_schedule(schedule)
        if self.context.m:
            raise ArgumentError(f"context {str(self.context)!r} is for weights; filters compete 'local' or 'global'")
        if isinstance(sparsity, Mapping) and self.context.kind == "global":
            raise ArgumentError("context='global' takes one sparsity for the whole network, got a dict; use 'local'")
        wants = [kind for kind in self.criterion.needs if kind in OF_DATA]
        if wants:
            raise ArgumentError(
                f"criterion {self.criterion.name!r} looks at the network's {wants[0]}, which takes data, and Pruner "
                "gathers none; make filters zero with Sparsifier(model, 'filter', criteria=…, data=…), and remove them "
                "with shrink"
            )
        check_round_to(round_to, self.context)
        check_optimizer(optimizer)
        self.total_steps, self.optimizer, self.round_to = checked_steps(total_steps), optimizer, round_to
        kinds = as_filter_types(layer_type)
        inputs = as_inputs(self.model, example_inputs)
        expected = outputs_of(twin_of(self.model), inputs)
        groups = find_groups(self.model, inputs)
        names = filter_layers(self.model, kinds, groups)
        left_out = {n for pattern in as_patterns(exclude) for n in match_layers(pattern, names, what="exclude")}
        wanted = [n for n in names if n not in left_out]
        if not wanted:
            raise TargetError(f"exclude={exclude!r} leaves no layer to prune, out of {len(names)}; exclude fewer")
        self.sparsity = sparsity
        self.targets: dict[str, Fraction] = resolve_sparsity(sparsity, wanted)
        groups = [_kept_whole(g, left_out) for g in groups]
        self.groups = tried(self.model, groups, inputs, expected, set(self.targets))
        self._surgeon = Surgeon(self.model, self.groups)
        self._weights = {n: weight_of(self.model.get_submodule(n)) for g in self.groups for n in g.layers}
        self._evidence = Evidence(self.criterion, self._weights, seed)
        self._taking = [i for i, g in enumerate(self.groups) if not g.why and any(n in self.targets for n in g.layers)]
        self._asked: dict[int, int] = {}
        self._inputs = inputs
        self._before = count_params(self.model), count_macs(self.model, inputs)
        self._types = {n: type(self.model.get_submodule(n)).__name__ for g in self.groups for n in g.layers}
        self.progress, self.steps_done, self._floor = 0.0, 0, 0.0
        for i in self._taking:  # what a criterion gives is looked at before anything is cut
            self._scores(self.groups[i])

    def prune_model(self) -> nn.Module:
        """Removes all that was asked for, at once.

        Returns:
            The network, which is smaller now.
        """
        self._prune_to(1.0)
        return self.model

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
        went = self._prune_to(self.schedule(position))
        self.steps_done = done
        return went

    def report(self) -> PruningReport:
        """What became of each layer that takes part, and of those that went with it; counted from the network."""
        rows: dict[str, LayerPruning] = {}
        for i, group in enumerate(self.groups):
            if not any(n in self.targets for n in group.layers):
                continue
            for member in group.filters:
                rows[member.name] = self._row(i, group, member, rows.get(member.name))
        order = [n for n, _ in self.model.named_modules() if n in rows]
        sizes = (self._before[0], count_params(self.model), self._before[1], count_macs(self.model, self._inputs))
        return PruningReport(tuple(rows[n] for n in order), *sizes)

    def sparsity_now(self) -> float:
        """Percent of the units that took part which are gone: filters, where joined ones count once."""
        kept = [self._surgeon.kept[i] for i in self._taking]
        units = sum(k.numel() for k in kept)
        return 100 * (1 - sum(int(k.sum()) for k in kept) / units) if units else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Which filters are gone, and how far the run is; weights and optimizer save themselves."""
        kept = {
            f"{i} {g.name}": k.clone() for i, (g, k) in enumerate(zip(self.groups, self._surgeon.kept, strict=True))
        }
        evidence = self._evidence.state_dict()
        asked = {str(i): n for i, n in self._asked.items()}
        counters = {"progress": self.progress, "steps_done": self.steps_done, "floor": self._floor, "asked": asked}
        return {"version": _VERSION, "kept": kept, **counters, "evidence": evidence}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Removes what was gone in the run that gave this state; the weights can be loaded after that.

        Raises:
            FileError: it is of another network, or of a newer version.
        """
        if not isinstance(state, Mapping) or state.get("version") != _VERSION:
            found = state.get("version") if isinstance(state, Mapping) else state
            raise FileError(f"pruning state of version {found!r}; this Gossamer reads version {_VERSION}")
        kept = [state["kept"].get(f"{i} {g.name}") for i, g in enumerate(self.groups)]
        if any(not isinstance(k, Tensor) or k.numel() != g.n_units for k, g in zip(kept, self.groups, strict=True)):
            raise FileError("pruning state of another network; its groups of channels are others than here")
        if any(bool((k & ~now).any()) for k, now in zip(kept, self._surgeon.kept, strict=True)):
            raise FileError("pruning state of a network with filters that are gone here; load it into a fresh Pruner")
        self._cut([k.bool() for k in kept])
        self._evidence.load_state_dict(state["evidence"])
        self.progress, self.steps_done, self._floor = state["progress"], state["steps_done"], state["floor"]
        self._asked = {int(i): n for i, n in state["asked"].items()}

    def restart(self) -> None:
        """Begins another round of training from what is left: filters that are gone stay gone."""
        self.steps_done, self._floor = 0, self.progress

    # -- inside -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prune_to(self, progress: float) -> bool:
        progress = max(progress, self._floor, self.progress)  # what is gone does not come back, whatever the schedule
        if progress == self.progress:
            return False
        goals = self._goals(Fraction(progress))
        units: list[Tensor | None] = [None] * len(self.groups)
        for i, goal in goals.items():
            if goal > self._gone(i):
                units[i] = self._select(self.groups[i], self._surgeon.kept[i], goal)
        self.progress = progress
        if all(u is None for u in units):
            return False
        self._cut(units)
        for name, weight in self._weights.items():
            self._evidence.moved(name, weight)
        return True

    def _cut(self, units: Sequence[Tensor | None]) -> None:
        by_id = {id(w): n for n, w in self._weights.items()}

        def also(parameter: Tensor, cut: Slice) -> None:
            for layers in self._evidence.kept.values():
                name = by_id.get(id(parameter))
                if name is not None:
                    layers[name] = cut(layers[name])

        self._surgeon.cut(units, self.optimizer, also)

    def _gone(self, i: int) -> int:
        return int((~self._surgeon.kept[i]).sum())

    def _goals(self, progress: Fraction) -> dict[int, int]:
        """How many units of each group are to be gone."""
        if self.context.kind == "local":
            self._asked = {
                i: count(self._target(self.groups[i]) * progress, self.groups[i].n_units) for i in self._taking
            }
        else:
            self._asked = self._global_goals(max(self.targets.values()) * progress)
        return {i: max(self._gone(i), self._rounded(self.groups[i], n)) for i, n in self._asked.items()}

    def _target(self, group: Group) -> Fraction:
        """A group whose layers have targets of their own meets them on average."""
        named = [self.targets[n] for n in group.layers if n in self.targets]
        return sum(named, Fraction(0)) / len(named)

    def _global_goals(self, fraction: Fraction) -> dict[int, int]:
        scores: list[Tensor] = []
        for i in self._taking:
            group, kept = self.groups[i], self._surgeon.kept[i]
            own = self._scores(group).cpu().clone()
            for block in range(group.n_blocks):  # the best one of each stays whatever the others score
                inside = torch.nonzero(kept & (group.blocks == block)).flatten()
                own[inside[own[inside].argmax()]] = torch.inf
            own[~kept] = -torch.inf
            scores.append(own)
        spare = sum(self.groups[i].n_blocks for i in self._taking)
        units = sum(s.numel() for s in scores)
        counts = global_counts(min(count(fraction, units), units - spare), scores).tolist() if scores else []
        return dict(zip(self._taking, counts, strict=True))

    def _rounded(self, group: Group, goal: int) -> int:
        multiple = math.lcm(self.round_to or 1, group.n_blocks)
        goal = min(goal, group.n_units - group.n_blocks)
        return goal if multiple == 1 or goal <= 0 else round_kept(goal, group.n_units, multiple)

    def _select(self, group: Group, kept: Tensor, goal: int) -> Tensor:
        scores = self._scores(group).cpu()
        stays = kept.clone()
        for block in range(group.n_blocks):
            inside = group.blocks == block
            stays[inside] = select(scores[inside], kept[inside], goal // group.n_blocks)
        return stays

    def _scores(self, group: Group) -> Tensor:
        """One score a unit: the mean over the weights of all filters that are targets; gone units score 0."""
        first: Tensor | None = None
        for member in group.filters:
            if member.name not in self.targets:
                continue
            weight = self._weights[member.name]
            evidence = {k: widen(t) for k, t in self._evidence.gather(member.name, weight).items()}
            scores = by_filter(self.model.get_submodule(member.name), self.criterion.score(evidence))
            alive = self._surgeon.axes[member.name, member.side]
            place = torch.full((member.size,), -1, dtype=torch.int64)
            place[alive] = torch.arange(int(alive.sum()))
            here = alive[member.index]
            unit, position = member.unit[here].to(scores.device), place[member.index[here]].to(scores.device)
            sums = torch.zeros(group.n_units, 2, dtype=scores.dtype, device=scores.device)
            ones = torch.full_like(position, scores.shape[1], dtype=scores.dtype)
            sums.index_add_(0, unit, torch.stack([scores[position].sum(1), ones], 1))
            first = sums if first is None else first + sums.to(first)
        assert first is not None
        return first[:, 0] / first[:, 1].clamp(min=1)

    def _row(self, i: int, group: Group, member: Member, before: LayerPruning | None) -> LayerPruning:
        name, n = member.name, group.n_units
        per_unit = len(member.index) // n
        gone = int((~self._surgeon.kept[i])[member.unit].sum())
        own = self.targets.get(name)
        asked = count(own * Fraction(self.progress), n) if own is not None else 0
        if self.context.kind == "global" and own is not None and not group.why:
            asked = self._asked.get(i, 0)
        others = [o for o in group.layers if o != name]
        why = ""
        if gone != asked * per_unit:
            why = group.why
            if not why and own is None:
                why = f"goes with the channels of {listed([o for o in others if o in self.targets])}"
            elif not why and own is not None and self.context.kind == "local" and own != self._target(group):
                why = f"its channels are joined with those of {listed(others)}, which have another target"
            elif not why and group.n_blocks > 1:
                why = f"each of {group.n_blocks} blocks of channels has to lose as many"
            elif not why:
                why = f"round_to={self.round_to}" if self.round_to else "a layer keeps one filter at least"
        if before is not None:  # a layer whose filters lie in several groups
            return replace(
                before, kept=before.kept - gone, asked=before.asked + asked * per_unit, why=before.why or why
            )
        size = n * per_unit if group.heads == name else member.size
        return LayerPruning(name, self._types[name], size, size - gone, asked * per_unit, why)


def as_filter_types(layer_type: LayerTypes) -> tuple[type[nn.Module], ...]:
    """Types of layer that have filters, or heads.

    Raises:
        ArgumentError: one of them has none.

    Example:
        >>> as_filter_types((nn.Conv2d, nn.MultiheadAttention))[1].__name__
        'MultiheadAttention'
    """
    given: Any = layer_type
    kinds: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    heads = [k for k in kinds if isinstance(k, type) and issubclass(k, nn.MultiheadAttention)]
    others = [k for k in kinds if k not in heads]
    rest = as_layer_types(others if isinstance(given, (list, tuple)) else given) if others or not heads else ()
    for kind in rest:
        if issubclass(kind, nn.Embedding):
            raise ArgumentError("layer_type Embedding has entries and no filters; use Conv2d, Linear and the like")
    return (*rest, *heads)


def filter_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...], groups: Sequence[Group]) -> list[str]:
    """Names of the layers of some types that the graph knows.

    Raises:
        TargetError: there is none.
    """
    known = {name for group in groups for name in group.layers}
    found = [n for n, m in model.named_modules() if isinstance(m, kinds) and n in known]
    if not found:
        have = sorted({type(m).__name__ for n, m in model.named_modules() if n in known})
        wanted = ", ".join(k.__name__ for k in kinds)
        raise TargetError(
            f"no {wanted} layer of {type(model).__name__} takes part in its forward pass; layers that do: "
            f"layer_type={', '.join(have) or 'none'}"
        )
    return found


def weight_of(module: nn.Module) -> Tensor:
    """The weight that a layer's filters (or an attention's heads) are scored by."""
    weight: Any = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
    return weight


def by_filter(module: nn.Module, scores: Tensor) -> Tensor:
    """Scores of weights, a row a filter (or a head).

    Example:
        >>> by_filter(nn.Conv2d(2, 4, 3), torch.ones(4, 2, 3, 3)).shape
        torch.Size([4, 18])
    """
    if isinstance(module, nn.MultiheadAttention):
        return scores.view(3, module.num_heads, -1).transpose(0, 1).flatten(1)
    if isinstance(module, _ConvNd) and module.transposed:
        return scores.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    return scores.flatten(1)


def _kept_whole(group: Group, left_out: set[str]) -> Group:
    found = [n for n in group.layers if n in left_out]
    if group.why or not found:
        return group
    return replace(group, why=f"{listed(found)} is excluded, and its channels are these")
