"""Which channels live and die together? Network → groups of coupled channels, from torch-pruning's dependency graph.

A unit is one channel with everything that has to go with it: the filters that produce it (several, where a residual sum
joins them), its entry in each normalisation, and the inputs of the layers that read it. What is kept here are plain
indices into the layers as they are now; nothing of torch-pruning's is held on to.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from gossamer.errors import ArgumentError, first_line
from gossamer.pruning.attention import head_count, heads_of
from gossamer.pruning.inputs import tensors_in, twin_of

OUT, IN, BOTH, HEADS = "out", "in", "both", "heads"
"""Sides of a layer that channels are cut from: what it gives, what it reads, one axis for both, or attention heads."""

_ONE_AXIS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.PReLU, nn.Embedding, nn.MultiheadAttention)


@dataclass(frozen=True, eq=False)
class Member:
    """One side of a layer (or a parameter) that channels of a group lie on.

    Args:
        name: of the layer or the parameter.
        side: `OUT`, `IN`, `BOTH` or `HEADS`.
        index: int64, positions on that side.
        unit: int64, the unit that each position belongs to.
        size: how many positions that side has.
    """

    name: str
    side: str
    index: Tensor
    unit: Tensor
    size: int


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that have to be cut from several layers at once.

    Args:
        members: where they lie.
        n_units: how many units there are.
        blocks: int64, one a unit: as many units have to go from each block as from any other (grouped convolutions).
        why: why the group cannot be cut at all; empty where it can.
        heads: the module whose number of heads is the number of units; empty where there is none.
        layers: every layer whose filters (or heads) these channels are, depthwise convolutions too.
    """

    members: tuple[Member, ...]
    n_units: int
    blocks: Tensor
    why: str = ""
    heads: str = ""
    layers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The first layer that gives these channels."""
        return self.producers[0] if self.producers else self.members[0].name

    @property
    def producers(self) -> list[str]:
        """The layers whose filters (or heads) these channels are."""
        return [m.name for m in self.members if m.side in (OUT, HEADS)]

    @property
    def filters(self) -> list[Member]:
        """The members that are filters of a layer (or heads), and not what a layer reads."""
        return [m for m in self.members if m.side != IN and m.name in self.layers]

    @property
    def n_blocks(self) -> int:
        """How many blocks there are; 1 where units are free."""
        return int(self.blocks.max()) + 1


def is_depthwise(module: nn.Module | None) -> bool:
    """Whether each filter of a convolution reads one channel, and each channel is read by one filter.

    Example:
        >>> is_depthwise(nn.Conv2d(8, 8, 3, groups=8)), is_depthwise(nn.Conv2d(8, 16, 3, groups=8))
        (True, False)
    """
    return isinstance(module, _ConvNd) and 1 < module.groups == module.out_channels == module.in_channels


def find_groups(model: nn.Module, inputs: Sequence[Any]) -> list[Group]:
    """The groups of coupled channels of a network, in the network's order.

    Args:
        model: the network; it is not touched.
        inputs: arguments of a forward pass.

    Returns:
        Groups; those of filters first, then the heads of every nn.MultiheadAttention.

    Raises:
        ArgumentError: torch-pruning is not installed, or cannot trace the network.
    """
    try:
        import torch_pruning as tp
    except ImportError:
        raise ArgumentError(
            "structured pruning needs torch-pruning; install it with: pip install 'gossamer[pruning]'"
        ) from None
    twin = twin_of(model)
    for parameter in twin.parameters():  # the graph is read off autograd's, which frozen layers take no part in
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forward: Any = _outputs
            graph = tp.DependencyGraph().build_dependency(twin, inputs, forward_fn=forward, verbose=False)
            groups = _Reader(twin, graph).groups()
    except Exception as error:  # user's forward and somebody else's tracer
        raise ArgumentError(
            f"the channels of {type(model).__name__} cannot be followed ({type(error).__name__}: {first_line(error)}), "
            "as where a view shuffles them; prune parts that have none of that inside one by one, such as a branch of "
            "a block, each with inputs of its own"
        ) from error
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(groups, key=lambda g: order.get(g.name, len(order)))


def _outputs(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    # Once more element by element, or a layer that gives an output itself would not be seen to.
    return [t * 1 for t in tensors_in(model(*inputs)) if t.requires_grad]


class _Reader:
    """Turns torch-pruning's groups into ours."""

    def __init__(self, twin: nn.Module, graph: Any) -> None:
        self.twin, self.graph = twin, graph
        self.modules = dict(twin.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.order = {name: i for i, name in enumerate(self.modules)}
        kinds = {type(module).__name__ for module in graph.module2node}
        self.has_parts = not kinds.isdisjoint(("_SplitOp", "_UnbindOp", "_SliceOp"))
        self.parameters = {p: name for name, p in twin.named_parameters()}
        users: dict[int, set[str]] = {}
        for name, module in twin.named_modules(remove_duplicate=False):
            for parameter in module._parameters.values():
                if parameter is not None:
                    users.setdefault(id(parameter), set()).add(name)
        self.shared = {i: sorted(names) for i, names in users.items() if len(names) > 1}

    def groups(self) -> list[Group]:
        found: list[Group] = []
        seen: set[str] = set()
        for module, node in list(self.graph.module2node.items()):
            name = self.names.get(module) if isinstance(module, nn.Module) else None
            if name is None or name in seen or not isinstance(module, (_ConvNd, nn.Linear)) or is_depthwise(module):
                continue
            del node
            group = self._group(module)
            seen.update(group.producers)
            found.append(group)
        found += [_heads_group(n, m) for n, m in self.modules.items() if isinstance(m, nn.MultiheadAttention)]
        return found

    def _query(self, module: nn.Module, index: Sequence[int]) -> tuple[list[Any], bool]:
        prune = self.graph.get_pruner_of_module(module).prune_out_channels
        group = self.graph.get_pruning_group(module, prune, list(index))
        items = [(self._place(item.dep), item.idxs, item.root_idxs) for item in group.items]
        is_output = any("Output" in type(item.dep.target.module).__name__ for item in group.items)
        return [item for item in items if item[0] is not None], is_output

    def _place(self, dep: Any) -> tuple[str, str] | None:
        target = dep.target.module
        if isinstance(target, nn.Parameter):
            return (self.parameters[target], BOTH) if target in self.parameters else None
        name = self.names.get(target)
        if name is None:
            return None
        if isinstance(target, _ONE_AXIS) or is_depthwise(target):
            return name, BOTH
        if not isinstance(target, (_ConvNd, nn.Linear)):
            return None
        return name, OUT if self.graph.is_out_channel_pruning_fn(dep.handler) else IN

    def _group(self, module: nn.Module) -> Group:
        n = int(self.graph.get_out_channels(module))
        items, is_output = self._query(module, range(n))
        places = _merged(items)
        units = list(range(n))
        # A product of two halves, as in a gated unit, couples channels of one layer; one asked for alone shows it.
        if self.has_parts and any(
            _merged(self._query(module, [i])[0]) != _of_root(places, i) for i in {0, n // 2, n - 1}
        ):
            single = [_merged(self._query(module, [i])[0]) for i in range(n)]
            units = _joined([{(place, j) for place, pairs in one.items() for j, _ in pairs} for one in single])
            places = {}
            for root, one in enumerate(single):
                for place, pairs in one.items():
                    places.setdefault(place, set()).update((j, root) for j, _ in pairs)
        elif any(len({j for j, _ in pairs}) < len(pairs) for pairs in places.values()):
            single = [{(place, j) for place, pairs in _of_root(places, i).items() for j, _ in pairs} for i in range(n)]
            units = _joined(single)
        places = {place: {(j, units[root]) for j, root in pairs} for place, pairs in places.items()}
        members = tuple(self._member(place, sorted(places[place])) for place in sorted(places, key=self._rank))
        n_units = 1 + max(int(m.unit.max()) for m in members)
        group = Group(members, n_units, torch.zeros(n_units, dtype=torch.int64))
        group = self._with_heads(group)
        if not group.heads:
            group = self._with_blocks(group)
        why = "its outputs are the network's" if is_output else self._why(members)
        layers = tuple(
            m.name for m in members if m.side == OUT or (m.side == BOTH and is_depthwise(self.modules.get(m.name)))
        )
        return replace(group, why=why or group.why, layers=layers)

    def _rank(self, place: tuple[str, str]) -> tuple[int, str]:
        return self.order.get(place[0], len(self.order)), place[1]

    def _member(self, place: tuple[str, str], pairs: Sequence[tuple[int, int]]) -> Member:
        index, unit = (torch.tensor([p[i] for p in pairs], dtype=torch.int64) for i in (0, 1))
        return Member(*place, index, unit, self._size(*place))

    def _size(self, name: str, side: str) -> int:
        module = self.modules.get(name)
        if module is None:  # a parameter by itself: its last axis longer than one, as torch-pruning cuts it
            shape = self.twin.get_parameter(name).shape
            return next((s for s in reversed(shape) if s > 1), 1)
        return axis_size(module, side)

    def _why(self, members: Iterable[Member]) -> str:
        for member in members:
            if int(member.index.max()) >= member.size:
                return f"what {member.name!r} reads is made of its channels in a way that cannot be followed"
            module = self.modules.get(member.name)
            parameters = self.twin.get_parameter(member.name) if module is None else None
            own = [parameters] if module is None else list(module._parameters.values())
            for parameter in own:
                if parameter is not None and id(parameter) in self.shared:
                    return f"{member.name!r} shares a weight: {', '.join(map(repr, self.shared[id(parameter)]))}"
            if module is not None and isinstance(module, (_ConvNd, nn.Linear)):
                if not isinstance(module._parameters.get("weight"), nn.Parameter):
                    return f"the weight of {member.name!r} is computed from others; remove the parametrization first"
                if isinstance(module, _ConvNd) and module.transposed and module.groups > 1 and not is_depthwise(module):
                    return f"{member.name!r} is a transposed convolution in groups"
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
                return f"{member.name!r} normalises over several axes"
            if isinstance(module, nn.MultiheadAttention) and not heads_of(module):
                return f"{member.name!r} has keys or values of another width"
        return ""

    def _with_heads(self, group: Group) -> Group:
        """Units of whole heads, where the filters are the queries, keys and values of an attention module."""
        for name in group.producers:
            parent = name.rpartition(".")[0]
            heads = head_count(self.modules[parent]) if parent in self.modules else None
            reads = [m for m in group.members if m.side == IN]
            inside = all(m.name.rpartition(".")[0] == parent for m in reads) and len(reads) == 1
            if heads and inside and isinstance(self.modules[name], nn.Linear) and group.n_units % heads[1] == 0:
                width = group.n_units // heads[1]
                members = tuple(replace(m, unit=m.unit // width) for m in group.members)
                return Group(members, heads[1], torch.zeros(heads[1], dtype=torch.int64), heads=parent)
        return group

    def _with_blocks(self, group: Group) -> Group:
        keys: list[Tensor] = []
        for member in group.members:
            module = self.modules.get(member.name)
            parts = 1
            if isinstance(module, _ConvNd) and member.side != BOTH:
                parts = module.groups
            elif isinstance(module, nn.GroupNorm):
                parts = module.num_groups
            if parts > 1:
                key = torch.full((group.n_units,), -1, dtype=torch.int64)
                key[member.unit] = member.index // (member.size // parts)
                keys.append(key)
        if not keys:
            return group
        _, blocks, sizes = torch.unique(torch.stack(keys, 1), dim=0, return_inverse=True, return_counts=True)
        if int(sizes.min()) != int(sizes.max()):
            return replace(group, why="its channels lie on blocks of different sizes")
        if int(sizes[0]) < 2:
            return replace(group, why="each group of a convolution or normalisation has one channel only")
        return replace(group, blocks=blocks)


def _heads_group(name: str, module: nn.MultiheadAttention) -> Group:
    n = heads_of(module)
    unit = torch.arange(max(n, 1))
    why = "" if n else f"{name!r} has keys or values of another width"
    return Group((Member(name, HEADS, unit, unit, max(n, 1)),), max(n, 1), torch.zeros_like(unit), why, name, (name,))


def _merged(items: Iterable[Any]) -> dict[tuple[str, str], set[tuple[int, int]]]:
    """Place → pairs of position and root; items of torch-pruning name a place several times."""
    places: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for place, index, roots in items:
        places.setdefault(place, set()).update(zip(index, roots, strict=True))
    return places


def _of_root(
    places: Mapping[tuple[str, str], set[tuple[int, int]]], root: int
) -> dict[tuple[str, str], set[tuple[int, int]]]:
    parts = {place: {(j, r) for j, r in pairs if r == root} for place, pairs in places.items()}
    return {place: pairs for place, pairs in parts.items() if pairs}


def _joined(sets: Sequence[set[Any]]) -> list[int]:
    """A number for each set, the same one where sets share an element, counted from 0 in order."""
    owner: dict[Any, int] = {}
    parent = list(range(len(sets)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, elements in enumerate(sets):
        for element in elements:
            if element in owner:
                a, b = sorted((root(owner[element]), root(i)))
                parent[b] = a
            owner[element] = i
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(sets))]


def axis_size(module: nn.Module, side: str) -> int:
    """How many channels one side of a layer has.

    Example:
        >>> axis_size(nn.Conv2d(3, 8, 1), OUT), axis_size(nn.LayerNorm(5), BOTH)
        (8, 5)
    """
    if isinstance(module, _ConvNd):
        return module.in_channels if side == IN else module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features if side == IN else module.out_features
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads if side == HEADS else module.embed_dim
    assert isinstance(module, (_BatchNorm, _InstanceNorm))
    return module.num_features
