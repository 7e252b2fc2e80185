"""How the images of a batch go through a segment: how many at a time, so that what is between steps stays in the cache.

A few images at a time go through all of the first layers, whose images are large, and then many through the last, whose
weights are. With several threads each takes images of its own, or all share each step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from gossamer.runtime.program import Program, estimate, returns_of
from gossamer.runtime.values import Signature


@dataclass
class Stage:
    """A part of a segment, and how it is run.

    Args:
        program: for some images at a time.
        times: how often.
        rest: for what is left then, if anything.
        threads: how many take images.
    """

    program: Program
    times: int
    rest: Program | None
    threads: int

    def run(self, inputs: Sequence[Tensor], seconds: list[tuple[str, float]] | None = None) -> list[Tensor]:
        """The outputs for contiguous inputs; `seconds` gets what each step took."""
        if self.rest is None and self.times == 1:
            outputs = [inputs[0].new_empty(o.shape) for o in self.program.outputs]
            _run(self.program, inputs, outputs, 1, self.threads, seconds)
            return outputs
        outputs = [inputs[0].new_empty((len(inputs[0]), *o.shape[1:])) for o in self.program.outputs]
        whole = self.times * self.program.inputs[0].shape[0]
        _run(self.program, [x[:whole] for x in inputs], [y[:whole] for y in outputs], self.times, self.threads, seconds)
        if self.rest is not None:
            _run(self.rest, [x[whole:] for x in inputs], [y[whole:] for y in outputs], 1, self.threads, seconds)
        return outputs


def _run(
    program: Program,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    times: int,
    threads: int,
    seconds: list[tuple[str, float]] | None,
) -> None:
    if seconds is None:
        return program.run(inputs, outputs, times, threads)
    took = (ctypes.c_double * len(program.names))()
    for i in range(times):  # one after the other, so that each can be timed
        part = [x.chunk(times)[i] for x in inputs], [y.chunk(times)[i] for y in outputs]
        program.run(*part, 1, threads, took)
        seconds += zip(program.names, took, strict=True)
    return None


def run_stages(
    stages: Sequence[Stage], inputs: Sequence[Tensor], seconds: list[tuple[str, float]] | None = None
) -> list[Tensor]:
    """What a segment gives, each result once."""
    given = [x.contiguous() for x in inputs]
    for stage in stages:
        given = stage.run(given, seconds)
    return given


def make_stages(
    graph: GraphModule, inputs: Sequence[Signature], threads: int, isa: int = -1, team: bool = False
) -> list[Stage]:
    """The way that is expected to take least.

    Args:
        graph: of a segment.
        inputs: of its placeholders.
        threads: that there are.
        isa: the instruction set's number; -1 for what suits each step.
        team: whether the threads are PyTorch's own, where they can be had.

    Raises:
        DoesNotFitError: some operator has no kernel for these shapes.
    """
    n = inputs[0].shape[0]
    together = all(len(x.shape) > 1 and x.shape[0] == n for x in inputs)
    if n == 1 or not together:
        return [_stage(graph, inputs, n, threads, isa, team)]
    sizes = sorted({n, *(s for s in (1, 2, 4, 8, 16, 32, 64) if s < n)})
    costs = {size: _costs(graph, inputs, size, threads, isa) for size in sizes}
    names = list(costs[n])
    totals = {size: [0.0] for size in sizes}
    for size in sizes:
        for name in names:
            totals[size].append(totals[size][-1] + costs[size].get(name, 0.0))

    def best(begin: int, end: int) -> tuple[float, int]:
        return min((totals[size][end] - totals[size][begin], -size) for size in sizes)

    whole = best(0, len(names))
    cuts = [(names.index(str(node.target)) + 1, node) for node in _cuts(graph) if str(node.target) in names]
    found = min(
        (
            (best(0, at)[0] + best(at, len(names))[0] + _CUT * len(names), at, node)
            for at, node in cuts
            if at < len(names)
        ),
        key=lambda each: each[:2],
        default=None,
    )
    if found is None or found[0] >= whole[0]:
        return [_stage(graph, inputs, -whole[1], threads, isa, team)]
    _, at, node = found
    first, second = _split(graph, node)
    one = _stage(first, inputs, -best(0, at)[1], threads, isa, team)
    between = [replace(o, shape=(n, *o.shape[1:])) for o in one.program.outputs]
    return [one, _stage(second, between, -best(at, len(names))[1], threads, isa, team)]


_CUT = 2000.0
"""What it costs an operator that a value between two stages is written as PyTorch has it."""


def _costs(graph: GraphModule, inputs: Sequence[Signature], size: int, threads: int, isa: int) -> dict[str, float]:
    n = inputs[0].shape[0]
    return estimate(graph, [_of(x, size) for x in inputs], threads, -(-n // size), isa)


def _stage(
    graph: GraphModule, inputs: Sequence[Signature], size: int, threads: int, isa: int, team: bool = False
) -> Stage:
    n = inputs[0].shape[0]
    shared = threads if size >= n else 1
    rest = Program(graph, [_of(x, n % size) for x in inputs], threads, isa, team) if n % size else None
    some = [_of(x, size) for x in inputs] if size < n else inputs
    return Stage(Program(graph, some, shared, isa, team), n // size, rest, threads)


def _of(value: Signature, size: int) -> Signature:
    return replace(value, shape=(size, *value.shape[1:]))


def _cuts(graph: GraphModule) -> Iterator[Node]:
    """Operators after which nothing but their result is needed any more."""
    if len(set(returns_of(graph))) > 1:
        return
    nodes = list(graph.graph.nodes)
    last = {node: max((nodes.index(user) for user in node.users), default=i) for i, node in enumerate(nodes)}
    reach = -1
    for i, node in enumerate(nodes):
        if node.op == "call_module" and reach <= i and last[node] > i and nodes[last[node]].op != "output":
            yield node
        reach = max(reach, last[node])


def _split(graph: GraphModule, after: Node) -> tuple[GraphModule, GraphModule]:
    """What is up to an operator, of all of the graph's inputs in their order, and what goes on from its result."""
    nodes = list(graph.graph.nodes)
    at = nodes.index(after) + 1
    first, second, made = Graph(), Graph(), dict[Node, Node]()
    for node in nodes[:at]:
        made[node] = first.node_copy(node, made.__getitem__)
    first.output(made[after])
    made = {after: second.placeholder(after.name)}
    for node in nodes[at:]:
        made[node] = second.node_copy(node, made.__getitem__)
    return GraphModule(graph, first), GraphModule(graph, second)
