"""A piece of a network as one call of the compiled library: steps, and where every value between them lies."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from gossamer.native import Run, Step, Value, View, native
from gossamer.runtime.activations import CODES
from gossamer.runtime.layers import BY_CHANNELS, IN_PLACE, OUT_PLACE, Handle, Layer
from gossamer.runtime.planes import Add, Concat, Flatten, MaxPool
from gossamer.runtime.values import FEW, Layout, Signature, arrange, as_torch, in_lines, planar

_KINDS = {"layer": 0, "max_pool": 1, "add": 2, "scale": 3, "mean": 4, "copy": 5}  # GossamerKind
_PAGE = 1024  # floats, which threads that write do not share


class DoesNotFitError(Exception):
    """The compiled kernels cannot run this on inputs of these shapes."""


@dataclass
class _Place:
    """Where a value lies: in a buffer that the caller gives, or in the program's own memory."""

    value: Signature
    layout: Layout
    buffer: int | None  # None: own memory
    parent: _Place | None = None  # of whose memory it is a part
    shift: int = 0  # where in that, in elements
    at: int = 0

    @property
    def root(self) -> _Place:
        return self if self.parent is None else self.parent.root

    @property
    def is_planar(self) -> bool:
        return self.buffer is None

    @property
    def is_whole(self) -> bool:
        """Whether each channel is whole vectors."""
        return self.is_planar and self.value.images * self.value.pixels >= FEW

    def native(self) -> Value:
        at, place = 0, self
        while place.parent is not None:
            at, place = at + place.shift, place.parent
        return Value(place.buffer or 0, 0, at + place.at, View(self.layout.channel, self.layout.image))


@dataclass
class _Step:
    kind: str
    a: _Place
    b: _Place | None
    out: _Place
    module: nn.Module | None
    name: str
    shared: int = 0  # BY_CHANNELS in a graph with depthwise layers, which take channel by channel

    @property
    def places(self) -> list[_Place]:
        return [p for p in (self.a, self.b, self.out) if p is not None]

    @property
    def is_together(self) -> bool:
        """Whether all that it reads and writes is planar."""
        return all(p.is_planar for p in self.places)

    @property
    def direct(self) -> int:
        return (
            (IN_PLACE if self.a.is_whole else 0)
            + (OUT_PLACE if self.is_together and self.out.is_whole else 0)
            + self.shared
        )


class Program:
    """What runs a graph of the engine's operators on inputs of given shapes.

    Args:
        graph: whose nodes are all operators of the engine.
        inputs: of the placeholders.
        threads: how many share each step.
        isa: which of the machine's instruction sets, best first; -1 for what suits each step.
        team: whether these are PyTorch's own, where they can be had.

    Raises:
        DoesNotFitError: some operator has no kernel for these shapes.
    """

    def __init__(
        self, graph: GraphModule, inputs: Sequence[Signature], threads: int, isa: int = -1, team: bool = False
    ) -> None:
        self.inputs, self.threads, self.team, self._isa = tuple(inputs), threads, team, isa
        self._plans: list[Handle] = []
        steps, self.outputs = _lower(graph, inputs)
        self.names = [s.name for s in steps]
        self.memory = _arrange(steps)
        self._steps = (Step * len(steps))(*[self._native(s) for s in steps])
        self._kept: list[_Call] = []

    def run(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        batches: int = 1,
        threads: int | None = None,
        seconds: Any = None,
    ) -> None:
        """Runs on contiguous tensors. Threads of the caller's may run it at once.

        Args:
            inputs: one a placeholder, of `batches` times its images.
            outputs: likewise; they are written.
            batches: how often, each time on the next part of each tensor.
            threads: how many take batches.
            seconds: an array of doubles, one a step, for what each takes.
        """
        threads = threads or self.threads
        try:
            call = self._kept.pop()  # of nobody else from now on
        except IndexError:
            call = _Call(self)
        call.run.batches, call.run.threads, call.run.seconds = batches, threads, seconds
        call.give(min(threads, batches), inputs, outputs)
        failed = native().gossamer_run(call.reference)
        self._kept.append(call)
        if failed:
            raise MemoryError("not enough memory for the scratch of a sparse layer")

    def _native(self, step: _Step) -> Step:
        a, out = step.a.value, step.out.value
        together = step.is_together
        images, size, out_size = a.images, a.size, out.size
        if step.kind in ("add", "copy") and together:  # one run of numbers a channel
            images, size = 1, (1, a.images * a.pixels)
        result = Step(
            None,
            step.a.native(),
            Value(-1, 0, 0, View(0, 0)) if step.b is None else step.b.native(),
            step.out.native(),
            images,
            a.channels,
            *size,
            *out_size,
        )
        result.kind = _KINDS[step.kind]
        result.isa = max(0, self._isa)
        module = step.module
        if isinstance(module, (Layer, Add)):
            result.activation = CODES[module.activation]
        if isinstance(module, MaxPool):
            result.window = (ctypes.c_int32 * 6)(*module.kernel, *module.stride, *module.padding)
        if isinstance(module, Layer):
            result.add_last = int(module.add_last)
            plan = module.plan(a, self.threads, step.direct, self._isa)
            if plan is None:
                raise DoesNotFitError(step.name)
            self._plans.append(plan)
            result.plan = plan.pointer
        return result


class _Call:
    """What a call of the compiled library reads, and its memory. Small networks take less time than making these."""

    def __init__(self, program: Program) -> None:
        self._size = -(-program.memory // _PAGE) * _PAGE
        given = [math.prod(s.shape) for s in (*program.inputs, *program.outputs)]
        self._buffers = (ctypes.c_void_p * (1 + len(given)))()
        self._strides = (ctypes.c_int64 * len(self._buffers))(self._size, *given)
        steps = program._steps
        self.run = Run(
            ctypes.addressof(steps), len(steps), self._buffers, self._strides, len(self._buffers), 1, 1, 0, None
        )
        self.run.team = program.team
        self.reference = ctypes.byref(self.run)
        self._memory = torch.empty(0)

    def give(self, workers: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Memory for as many threads, and the tensors."""
        buffers = self._buffers
        if len(self._memory) < self._size * workers + _PAGE:
            self._memory = torch.zeros(self._size * workers + _PAGE)
            start = self._memory.data_ptr()
            buffers[0] = start + -start % 64
        for i, x in enumerate((*inputs, *outputs), 1):
            buffers[i] = x.data_ptr()


def estimate(
    graph: GraphModule, inputs: Sequence[Signature], threads: int, batches: int = 1, isa: int = -1
) -> dict[str, float]:
    """What each operator of a graph is expected to take, by its name, in the units of a plan's cost.

    Args:
        graph: as `Program` takes it.
        inputs: of one batch.
        threads: how many share each step, or the batches where there are several.
        batches: how many there are.
        isa: the instruction set's number; -1 for the best.

    Raises:
        DoesNotFitError: some operator has no kernel for these shapes.
    """
    steps, _ = _lower(graph, inputs)
    shared = threads if batches == 1 else 1
    times = 1 / threads if batches == 1 else -(-batches // threads)  # of what one thread would take
    cache = native().gossamer_cache()
    costs: dict[str, float] = {}
    for step in steps:
        lines = [p.value.images * p.value.channels * p.value.pixels * p.value.dtype.itemsize / 64 for p in step.places]
        cost = 4 * sum(lines)
        if isinstance(step.module, Layer):
            found = step.module.cost(step.a.value, shared, step.direct, isa)
            if found is None:
                raise DoesNotFitError(step.name)
            cost = found
        if 64 * sum(lines) > _FRESH * cache * shared:  # what was written a step before has left the cache
            cost += (_AWAY_IN_ORDER if step.a.value.is_tokens else _AWAY) * sum(lines)
        if 64 * sum(lines) > _NEAR * cache:
            cost += _MEMORY * sum(lines)
        costs[step.name] = costs.get(step.name, 0.0) + cost * times + (_MEET if shared > 1 else 0)
    return costs


def layer_costs(graph: GraphModule, inputs: Sequence[Signature], isa: int = -1) -> tuple[float, float]:
    """What a graph's layers are expected to take with one thread: in one call of the engine, and dense in PyTorch.

    Raises:
        DoesNotFitError: some operator has no kernel for these shapes.
    """
    sparse, dense = _CALL, 0.0
    for step in _lower(graph, inputs)[0]:
        module = step.module
        if isinstance(module, Layer):
            cost = module.cost(step.a.value, 1, step.direct, isa)
            if cost is None:
                raise DoesNotFitError(step.name)
            sparse += cost
            dense += module.dense_cost(step.a.value) + dense_call(module)
    return sparse, dense


def dense_call(layer: Layer) -> float:
    """What it costs to call PyTorch for a layer, before anything is computed, in the units of a plan's cost."""
    return _CALL_LINEAR if layer.geometry is None else _CALL_CONV


_CALL, _CALL_LINEAR, _CALL_CONV = 60_000.0, 20_000.0, 45_000.0
"""What it costs to call the engine, and PyTorch for a layer, before anything is computed: some millionths of a second,
as measured on an Emerald Rapids and a Zen 4. It is what small layers cost."""


_AWAY = 24.0
"""What a line costs that comes from beyond the second-level cache, or goes there: as fitted on an Emerald Rapids."""

_AWAY_IN_ORDER = 6.0
"""The same where lines are read one after the other, which the processor sees and goes ahead; on a Zen 4."""

_NEAR, _MEMORY = 8, 60.0
"""What is larger than so many second-level caches comes from memory, and what a line of it costs more; on a Zen 4."""

_FRESH = 0.75
"""Of the second-level cache, how much of a step before is there still."""

_MEET = 4000.0
"""What it costs that threads wait for each other after a step."""


def _arrange(steps: Sequence[_Step]) -> int:
    """Gives each value between steps its place, and says how much there is in all."""
    spans: dict[int, tuple[_Place, list[int]]] = {}
    for i, step in enumerate(steps):
        for place in step.places:
            if place.root.is_planar:
                spans.setdefault(id(place.root), (place.root, []))[1].append(i)
    own = [place for place, _ in spans.values()]
    sizes = [in_lines(p.layout.channel * p.value.channels, p.value.dtype) for p in own]
    at, size = arrange(sizes, [(min(used), max(used)) for _, used in spans.values()])
    for place, where in zip(own, at, strict=True):
        place.at = where
    return size


def _lower(graph: GraphModule, inputs: Sequence[Signature]) -> tuple[list[_Step], list[Signature]]:
    """Steps for a graph, with every value placed; and what it gives."""
    modules = {n: graph.get_submodule(str(n.target)) for n in graph.graph.nodes if n.op == "call_module"}
    values = _signatures(graph, modules, inputs)
    wanted = _wanted_planar(modules, values)
    returns = returns_of(graph)
    buffers, places, steps = count(1), dict[Node, _Place](), list[_Step]()

    def own(value: Signature) -> _Place:
        return _Place(value, planar(value), None)

    def copied(place: _Place, name: str) -> _Place:
        to = own(place.value)
        steps.append(_Step("copy", place, None, to, None, name))
        return to

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            places[node] = _Place(values[node], as_torch(values[node]), next(buffers))
    outside = {n: _Place(values[n], as_torch(values[n]), next(buffers)) for n in returns}
    inside = _parts(modules, values, returns)  # of a concatenation, which are written where they belong
    for node, module in modules.items():
        # A copy of an input is made where it is first wanted.
        arguments = [a for a in node.args if isinstance(a, Node)]
        for a in arguments:
            if a in wanted and not places[a].is_planar and (node, a) in wanted[a]:
                places[a] = copied(places[a], a.name)
        given = [places[a] for a in arguments]
        if isinstance(module, Flatten):
            places[node] = _Place(values[node], given[0].layout, given[0].buffer, given[0])
            if node in outside:
                steps.append(_Step("copy", places[node], None, outside[node], None, node.name))
            continue
        if isinstance(module, Concat):
            place = places.get(node) or own(values[node])
            at = 0
            for a, part in zip(arguments, given, strict=True):
                if part.root is not place.root or inside.get(a) != (node, at):
                    to = _Place(part.value, place.layout, place.buffer, place, at * place.layout.channel)
                    steps.append(_Step("copy", part, None, to, None, node.name))
                at += part.value.channels
        else:
            if node in inside:
                whole, at = inside[node]
                if whole not in places:
                    places[whole] = own(values[whole])
                place = _Place(
                    values[node], places[whole].layout, None, places[whole], at * places[whole].layout.channel
                )
            elif node in outside and _writes_anywhere(module, values[node]) and set(node.users) <= {output_of(graph)}:
                place = outside[node]
            else:
                place = own(values[node])
            b = given[1] if len(given) > 1 else None
            steps.append(_Step(str(module.kind), given[0], b, place, module, str(node.target)))
        places[node] = place
        if node in outside and place is not outside[node]:
            steps.append(_Step("copy", place, None, outside[node], None, node.name))
    for node in returns:
        if node.op == "placeholder":
            steps.append(_Step("copy", places[node], None, outside[node], None, node.name))
    if any(isinstance(module, Layer) and module.is_depthwise for module in modules.values()):
        for step in steps:
            step.shared = BY_CHANNELS
    return steps, [values[n] for n in returns]


def output_of(graph: GraphModule) -> Node:
    """The node that says what a graph returns."""
    return next(n for n in graph.graph.nodes if n.op == "output")


def returns_of(graph: GraphModule) -> list[Node]:
    """What a graph returns, each once."""
    returned: Any = output_of(graph).args[0]
    return list(dict.fromkeys(returned if isinstance(returned, (tuple, list)) else [returned]))


def _signatures(graph: GraphModule, modules: dict[Node, Any], inputs: Sequence[Signature]) -> dict[Node, Signature]:
    values: dict[Node, Signature] = {}
    given = iter(inputs)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "call_module":
            result = modules[node].signature(*[values[a] for a in node.args if isinstance(a, Node)])
            if result is None:
                raise DoesNotFitError(node.name)
            values[node] = result
    return values


def _wanted_planar(modules: dict[Node, Any], values: dict[Node, Signature]) -> dict[Node, set[tuple[Node, Node]]]:
    """Inputs that are better copied first, so that vectors run along them, by who wants them so."""
    wanted: dict[Node, set[tuple[Node, Node]]] = {}
    for node, module in modules.items():
        for a in node.args:
            if not isinstance(a, Node) or a.op != "placeholder":
                continue
            many = values[a].images * values[a].pixels >= FEW
            if (isinstance(module, Layer) and module.is_pointwise and many) or (values[a].is_tokens and many):
                wanted.setdefault(a, set()).add((node, a))
    return wanted


def _writes_anywhere(module: nn.Module, value: Signature) -> bool:
    """Whether an operator may write in PyTorch's own layout as fast: not where that is token after token."""
    return not value.is_tokens or (value.images < FEW and isinstance(module, Layer))


def _parts(
    modules: dict[Node, Any], values: dict[Node, Signature], returns: Sequence[Node]
) -> dict[Node, tuple[Node, int]]:
    """Values that are written straight into a concatenation: each into one only, at that channel."""
    parts: dict[Node, tuple[Node, int]] = {}
    for node, module in modules.items():
        if not isinstance(module, Concat):
            continue
        at = 0
        arguments = [a for a in node.args if isinstance(a, Node)]
        for a in arguments:
            is_ours = a in modules and not isinstance(modules[a], (Concat, Flatten))
            if is_ours and a not in parts and a not in returns and arguments.count(a) == 1:
                parts[a] = (node, at)
            at += values[a].channels
    return parts
