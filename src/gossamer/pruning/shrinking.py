"""Takes out of a network the filters that are zero already, where nothing that it computes changes.

A zeroed filter gives a channel that holds one number, whatever goes in: 0, or what a bias or the shift of a
normalisation makes of it. Where every layer that reads the channel reads 0 there, it can go. Where they read another
number, what they would add up is moved into their bias, or into the mean of the BatchNorm behind them; behind zero
padding that would not be exact, so there the channel stays, and the report says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gossamer.companions import find_norms
from gossamer.errors import ArgumentError, StateError
from gossamer.optimizers import HasState, check_optimizer
from gossamer.pruning.constants import Reading, constant_inputs
from gossamer.pruning.graph import HEADS, IN, OUT, Group, Member, find_groups
from gossamer.pruning.inputs import as_inputs, outputs_of, twin_of
from gossamer.pruning.report import LayerPruning, PruningReport, count_macs, count_params, listed
from gossamer.pruning.surgery import Surgeon

_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class _Plan:
    """What can go, unit by unit: `why` holds a reason for each unit of a group that stays."""

    groups: Sequence[Group]
    kept: Sequence[Tensor]
    why: Sequence[Sequence[str]]
    folds: Sequence[_Fold]


@dataclass(frozen=True, eq=False)
class _Fold:
    """What a reader adds up from channels that hold a constant: goes into its bias, or off the mean behind it."""

    reader: str
    norm: str
    shift: Tensor


def shrink(
    model: nn.Module, example_inputs: Any = None, *, optimizer: HasState | None = None, inplace: bool = False
) -> nn.Module:
    """A network without the filters that are zero, as `granularity='filter'` leaves them, and with the same outputs.

    In evaluation mode the outputs are those of the network as it was, up to rounding; that is tried on the example and
    on random inputs before anything is given back. `shrink_report` says what goes, what stays and why.

    Args:
        model: the network.
        example_inputs: one batch of what its forward takes: a tensor, or a tuple. By default an image of 224×224 pixels
            (or a row of features) is made for the first layer.
        optimizer: of a network that is shrunk in place: its state is cut too.
        inplace: change the network itself, and not a copy; its parameters stay the same objects.

    Returns:
        The smaller network: `model` itself where it is changed in place.

    Raises:
        ArgumentError: the network does not run on the inputs, its channels cannot be followed, or an optimizer is given
            for a copy.
        StateError: the smaller network would give other outputs.

    Example:
        >>> from gossamer import Sparsifier
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> Sparsifier(net, "filter", exclude="3").sparsify_model(50)
        >>> small = shrink(net, torch.rand(1, 3, 8, 8))
        >>> small[0].weight.shape[0], small[3].weight.shape[1]
        (4, 4)
    """
    if optimizer is not None and not inplace:
        raise ArgumentError("an optimizer holds the parameters of the network itself, not of a copy; add inplace=True")
    inputs = as_inputs(model, example_inputs)
    check_optimizer(optimizer, model)
    plan = _checked(model, _plan(model, inputs), inputs)
    small = model if inplace else copy.deepcopy(model)
    _carry_out(small, plan, optimizer)
    return small


def shrink_report(model: nn.Module, example_inputs: Any = None) -> PruningReport:
    """What `shrink` takes out, what it leaves, and why, without a change of the network.

    Args:
        model: the network.
        example_inputs: as in `shrink`.

    Raises:
        ArgumentError: as in `shrink`.
        StateError: as in `shrink`.

    Example:
        >>> from gossamer import Sparsifier
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> Sparsifier(net, "filter").sparsify_model(50)
        >>> for row in shrink_report(net, torch.rand(1, 3, 8, 8)).rows:
        ...     print(row.layer, row.filters, row.kept, row.why)
        0 8 4
        2 4 4 its outputs are the network's
    """
    inputs = as_inputs(model, example_inputs)
    plan = _checked(model, _plan(model, inputs), inputs)
    small = copy.deepcopy(model)
    _carry_out(small, plan)
    sizes = (count_params(model), count_params(small), count_macs(model, inputs), count_macs(small, inputs))
    return PruningReport(_rows(model, plan), *sizes)


def _carry_out(model: nn.Module, plan: _Plan, optimizer: HasState | None = None) -> None:
    with torch.no_grad():
        for fold in plan.folds:
            target = model.get_submodule(fold.norm or fold.reader)
            if fold.norm:
                mean: Any = target.running_mean
                mean -= fold.shift.to(mean)
            else:
                bias: Any = target.bias
                bias += fold.shift.to(bias)
    Surgeon(model, plan.groups).cut(plan.kept, optimizer)


# -- what can go ------------------------------------------------------------------------------------------------------


def _plan(model: nn.Module, inputs: Sequence[Any]) -> _Plan:
    outputs_of(twin_of(model), inputs)  # an input that does not fit is said before anything else
    groups = find_groups(model, inputs)
    readers = {
        m.name for g in groups for m in g.members if m.side == IN
    }  # what is read through a normalisation is seen behind it
    twin = twin_of(model)
    modules = dict(twin.named_modules())
    readings = constant_inputs(twin, {name: modules[name] for name in readers}, inputs)
    names = {module: name for name, module in modules.items()}
    norms = {
        names[layer]: names[found[0]]
        for layer, found in find_norms(twin).items()
        if len(found) == 1 and isinstance(found[0], _BatchNorm) and found[0].running_mean is not None
    }
    judge = _Judge(modules, readings, norms)
    kept, why = zip(*[judge.units(group) for group in groups], strict=True) if groups else ((), ())
    return _Plan(groups, kept, why, judge.folds(groups, kept))


class _Judge:
    """Says of each unit whether it can go, and if not, why."""

    def __init__(
        self, modules: Mapping[str, nn.Module], readings: Mapping[str, Reading], norms: Mapping[str, str]
    ) -> None:
        self.modules, self.readings, self.norms = modules, readings, norms
        self._known: dict[tuple[int, str], list[bool]] = {}

    def units(self, group: Group) -> tuple[Tensor, list[str]]:
        """Which units stay, and a reason for each of them; empty where a unit goes, or nothing of it is zero."""
        n = group.n_units
        reason = group.why or self._why_none(group)
        if reason:
            return torch.ones(n, dtype=torch.bool), [reason] * n
        why = [""] * n
        for member in group.members:
            if member.side == IN:
                for unit, text in self._read(member, group).items():
                    why[unit] = why[unit] or text
        gone = torch.tensor([not text for text in why])
        for block in range(group.n_blocks):  # a layer without any channel does not run
            inside = group.blocks == block
            if bool(gone[inside].all()):
                last = int(torch.nonzero(inside)[-1])
                gone[last], why[last] = False, "a layer keeps one filter at least"
        if group.n_blocks > 1:
            most = min(int(gone[group.blocks == block].sum()) for block in range(group.n_blocks))
            for block in range(group.n_blocks):
                for unit in torch.nonzero(gone & (group.blocks == block)).flatten().tolist()[most:]:
                    gone[unit], why[unit] = False, "each group of a convolution has to lose as many"
        return ~gone, why

    def _why_none(self, group: Group) -> str:
        for member in group.members:
            module = self.modules.get(member.name)
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                return f"{member.name!r} normalises over channels, so that one less would change the others"
            if isinstance(module, nn.MultiheadAttention):
                return f"{member.name!r} is attention, whose heads are not told apart by filters"
        if group.heads:
            return f"the heads of {group.heads!r} go as a whole"
        return ""

    def _read(self, member: Member, group: Group) -> dict[int, str]:
        """The units that a reader cannot do without."""
        reading = self.readings.get(member.name)
        if reading is None:
            return dict.fromkeys(range(group.n_units), f"{member.name!r} was not run on the example")
        alive = ~reading.constant[member.index]
        found: dict[int, str] = {}
        units = torch.zeros(group.n_units, dtype=torch.bool)
        units[member.unit[alive]] = True
        if bool(units.any()):
            found = {u: self._why_alive(zeros, member.name) for u, zeros in self._zeros(group, units)}
        filled = ~alive & (reading.value[member.index] != 0)
        cannot = self._why_no_fold(member.name)
        if cannot:
            found.update(dict.fromkeys(member.unit[filled].unique().tolist(), cannot))
        return found

    def _zeros(self, group: Group, units: Tensor) -> Iterator[tuple[int, Mapping[str, bool]]]:
        """For each of some units, which of its filters are zero."""
        columns = {m.name: self._zero_units(group, m) for m in group.members if m.side == OUT}
        for unit in torch.nonzero(units).flatten().tolist():
            yield unit, {name: column[unit] for name, column in columns.items()}

    def _zero_units(self, group: Group, member: Member) -> list[bool]:
        key = (id(group), member.name)
        if key not in self._known:
            alive = torch.zeros(group.n_units, dtype=torch.bool)
            alive[member.unit[~zero_filters(self.modules[member.name])[member.index]]] = True
            self._known[key] = (~alive).tolist()
        return self._known[key]

    def _why_alive(self, zeros: Mapping[str, bool], reader: str) -> str:
        others = [name for name, is_zero in zeros.items() if not is_zero]
        if others and any(zeros.values()):
            return f"its channels are joined with those of {listed(others)}, which are not zero there"
        return f"what {reader!r} reads there is no constant: where zero padding meets a bias, the edges differ"

    def _why_no_fold(self, reader: str) -> str:
        module = self.modules[reader]
        if isinstance(module, _ConvNd):
            if module.transposed:
                return f"{reader!r} reads a constant that a bias cannot stand for: it is a transposed convolution"
            if any(module._reversed_padding_repeated_twice) and module.padding_mode == "zeros":
                return f"{reader!r} reads a constant beside zero padding, which no bias can stand for"
        if module.bias is None and reader not in self.norms:
            return f"{reader!r} reads a constant, and has neither a bias nor a BatchNorm to move it to"
        return ""

    def folds(self, groups: Sequence[Group], kept: Sequence[Tensor]) -> list[_Fold]:
        """What readers would add up from the channels that go."""
        found: list[_Fold] = []
        for group, stays in zip(groups, kept, strict=True):
            for member in group.members:
                gone = member.index[~stays[member.unit]]
                if member.side == IN and len(gone) and bool((self.readings[member.name].value[gone] != 0).any()):
                    module: Any = self.modules[member.name]
                    values = torch.zeros_like(self.readings[member.name].value)
                    values[gone] = self.readings[member.name].value[gone]
                    norm = "" if module.bias is not None else self.norms[member.name]
                    shift = _sum_of(module, values)
                    found.append(_Fold(member.name, norm, shift))
        return found


def _sum_of(module: Any, values: Tensor) -> Tensor:
    """What a layer gives for constant inputs, without its bias: one number a filter."""
    weight = module.weight.detach()
    if isinstance(module, nn.Linear):
        return weight @ values.to(weight)
    taps = weight.flatten(2).sum(2).unflatten(0, (module.groups, -1))
    return (taps @ values.to(weight).view(module.groups, -1, 1)).flatten()


def zero_filters(module: nn.Module) -> Tensor:
    """Which filters of a convolution or Linear layer are zero: bool, one a filter.

    Example:
        >>> layer = nn.Linear(2, 2); _ = nn.init.zeros_(layer.weight[0]); zero_filters(layer).tolist()
        [True, False]
    """
    own: Any = module.weight
    weight: Tensor = own.detach()
    if isinstance(module, _ConvNd) and module.transposed:
        groups = module.groups
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return (weight == 0).flatten(1).all(1).cpu()


# -- whether it is so -------------------------------------------------------------------------------------------------


def _checked(model: nn.Module, plan: _Plan, inputs: Sequence[Any]) -> _Plan:
    """The plan, without groups whose channels do something that their graph does not show."""
    if _is_same(model, plan, inputs):
        return plan
    fine = [
        bool(kept.all()) or _is_same(model, _only(plan, lambda j, i=i: j == i), inputs)
        for i, kept in enumerate(plan.kept)
    ]
    fewer = _only(plan, lambda i: fine[i])
    if all(fine) or not _is_same(model, fewer, inputs):
        raise StateError(
            "the network gives other outputs without its zero filters, though no single layer does; its forward uses "
            "channels in a way that cannot be followed, so leave it as it is"
        )
    return fewer


def _only(plan: _Plan, wanted: Callable[[int], bool]) -> _Plan:
    kept = [k if wanted(i) else torch.ones_like(k) for i, k in enumerate(plan.kept)]
    said = "without it the outputs change, in a way that the graph does not show"
    why = [w if wanted(i) else [t or said for t in w] for i, w in enumerate(plan.why)]
    readers = {m.name for i, g in enumerate(plan.groups) if wanted(i) for m in g.members}
    return replace(plan, kept=kept, why=why, folds=[f for f in plan.folds if f.reader in readers])


def _is_same(model: nn.Module, plan: _Plan, inputs: Sequence[Any]) -> bool:
    whole, small = twin_of(model), twin_of(model)
    _carry_out(small, plan)
    generator = torch.Generator().manual_seed(1)
    noise = [
        torch.randn(i.shape, generator=generator).to(i) if isinstance(i, Tensor) and i.is_floating_point() else i
        for i in inputs
    ]
    for batch in (inputs, noise):
        expected = outputs_of(whole, batch)
        try:
            given = outputs_of(small, batch)
        except ArgumentError:
            return False
        for a, b in zip(expected, given, strict=True):
            if a.shape != b.shape:
                return False
            if a.numel() and not float((a - b).abs().max()) <= _TOLERANCE * max(1.0, float(a.abs().max())):
                return False
    return True


# -- what is said -----------------------------------------------------------------------------------------------------


def _rows(model: nn.Module, plan: _Plan) -> tuple[LayerPruning, ...]:
    modules = dict(model.named_modules())
    rows: dict[str, LayerPruning] = {}
    for group, kept, why in zip(plan.groups, plan.kept, plan.why, strict=True):
        for member in group.filters:
            if member.side == HEADS:
                continue
            module = modules[member.name]
            zero, stays = zero_filters(module), kept[member.unit]
            reasons: list[str] = [str(why[u]) for u in member.unit[zero[member.index] & stays].tolist() if why[u]]
            before = rows.get(member.name)
            gone = int((~stays).sum()) + (before.removed if before else 0)
            text = max(sorted(set(reasons)), key=reasons.count) if reasons else (before.why if before else "")
            asked = int(zero.sum())
            if gone > asked and not text:
                others = [name for name in group.layers if name != member.name]
                text = f"goes with the channels of {listed(others)}" if others else "nothing that reads it changes"
            rows[member.name] = LayerPruning(
                member.name, type(module).__name__, member.size, member.size - gone, asked, text
            )
    for name, module in modules.items():
        if isinstance(module, (_ConvNd, nn.Linear)) and name not in rows and isinstance(module.weight, nn.Parameter):
            size, asked = module.weight.shape[0], int(zero_filters(module).sum())
            rows[name] = LayerPruning(name, type(module).__name__, size, size, asked, "it is no part of the graph")
    return tuple(rows[name] for name in modules if name in rows)
