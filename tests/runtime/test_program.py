"""Graphs of operators as programs of the compiled library, beside the same graphs in PyTorch."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from graphs import GRAPHS, Built, concat_nested, conv, dense_block, graphs, results
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node
from twins import ISAS, chain, error, needs_library, ways

from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.planes import Add, MaxPool
from gossamer.runtime.program import DoesNotFitError, Program, estimate
from gossamer.runtime.segment import Segment
from gossamer.runtime.values import FEW, Signature

pytestmark = needs_library


@settings(max_examples=250)
@given(case=graphs(), isa=st.sampled_from([-1, *ISAS]), threads=st.sampled_from([1, 1, 1, 2]))
def test_any_graph_is_that_of_pytorch(case: tuple[Segment, list[Signature]], isa: int, threads: int) -> None:
    segment, signatures = case
    program = Program(segment.graph, signatures, threads, isa)
    # The second run finds what the first one left in the program's memory.
    results(program, [torch.full(s.shape, torch.nan) for s in signatures])
    assert len(program._kept) == 1
    for _ in range(2):
        inputs = [torch.randn(s.shape) for s in signatures]
        before = [x.clone() for x in inputs]
        got, want = segment._given(results(program, inputs)), segment.graph(*inputs)
        assert isinstance(got, tuple) == isinstance(want, tuple)
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        for ours, theirs in pairs:
            assert ours.is_contiguous()
            assert error(ours, theirs) < 1e-5
        assert all(torch.equal(x, b) for x, b in zip(inputs, before, strict=True))


@settings(max_examples=100)
@given(case=graphs())
def test_values_in_a_programs_memory_begin_at_lines(case: tuple[Segment, list[Signature]]) -> None:
    segment, signatures = case
    program = Program(segment.graph, signatures, 1)
    for step in program._steps:
        values = [v for v in (step.a, step.b, step.out) if v.buffer == 0]
        for value in values:
            assert 0 <= value.at < max(1, program.memory)
            if value.view.channel % 16 == 0 and value.view.channel >= FEW:
                assert value.at % 16 == 0


@pytest.mark.parametrize("make", GRAPHS, ids=lambda f: f.__name__)
def test_graphs_of_real_networks(make: Callable[[Built], list[Node]]) -> None:
    built = Built()
    returned = make(built)
    segment = built.segment(*returned)
    for isa in ISAS:
        for threads in (1, 2):
            program = Program(segment.graph, built.inputs, threads, isa)
            for _ in range(2):
                inputs = [torch.randn(s.shape) for s in built.inputs]
                got, want = segment._given(results(program, inputs)), segment.graph(*inputs)
                for ours, theirs in zip(got, want, strict=True) if len(returned) > 1 else [(got, want)]:
                    assert error(ours, theirs) < 1e-5


def test_parts_of_a_concatenation_are_written_where_they_belong() -> None:
    built = Built()
    program = Program(built.segment(*dense_block(built)).graph, built.inputs, 1)
    kinds = [s.kind for s in program._steps]
    # The first is nested in all others, and copied from one to the next; what is new in each is not.
    assert kinds.count(5) == 3 + 1
    assert kinds.count(0) == 5


def test_memory_is_shared_by_what_does_not_live_at_once() -> None:
    x = Signature((1, 16, 20, 20))
    sizes = [Program(chain(*[conv(16, 16, 3) for _ in range(n)]).graph, [x], 1).memory for n in (3, 12)]
    assert sizes[0] == sizes[1]


def test_what_does_not_fit_is_no_program() -> None:
    segment = chain(conv(4, 8, 3), conv(7, 8, 3))
    with pytest.raises(DoesNotFitError):
        Program(segment.graph, [Signature((1, 4, 6, 6))], 1)
    wide = chain(Layer(torch.ones(1, 1, 1, 300), None, Geometry()))
    with pytest.raises(DoesNotFitError):
        Program(wide.graph, [Signature((1, 1, 1, 400))], 1)


def test_each_layer_says_how_it_is_run_and_each_step_how_long() -> None:
    segment = chain(conv(16, 16, 3, "relu"), MaxPool((2, 2), (2, 2), (0, 0)), conv(16, 16))
    x = torch.randn(2, 16, 12, 12)
    program = Program(segment.graph, [Signature(tuple(x.shape))], 1)
    assert list(ways(program)) == ["0", "2"]
    costs = estimate(segment.graph, program.inputs, 1)
    assert list(costs) == ["0", "1", "2"]
    assert all(cost > 0 for cost in costs.values())
    got, times = segment.timed(x)
    assert error(got, segment.graph(x)) < 1e-5
    assert [name for name, _ in times] == ["0", "1", "2"]
    assert all(0 <= t < 60 for _, t in times)
    assert sum(t for _, t in times) > 0


def test_threads_of_the_program_have_memory_of_their_own() -> None:
    built = Built()
    segment = built.segment(*concat_nested(built))
    program = Program(segment.graph, built.inputs, 2)
    inputs = [torch.randn(9, 4, 6, 6) for _ in range(8)]
    wants = [segment.graph(x) for x in inputs]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(60):
            k = i * (seed + 1) % 8
            if error(results(program, [inputs[k]])[0], wants[k]) > 1e-5:
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert 1 <= len(program._kept) <= 4


def test_results_are_new_each_time() -> None:
    segment, x = chain(conv(4, 4, 3), Add()), torch.randn(2, 4, 6, 6)
    first = segment(x)
    kept = first.clone()
    second: Tensor = segment(x + 1)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)


def test_python_goes_on_while_a_program_runs() -> None:
    """Python never takes its lock away from a thread here, so that another one runs only where a run gives it up."""
    x = torch.randn(64, 16, 30, 30)
    segment = chain(conv(16, 16, 3), conv(16, 16, 3))
    program = Program(segment.graph, [Signature(tuple(x.shape))], 1)
    outputs = [torch.empty(o.shape) for o in program.outputs]
    program.run([x], outputs)  # takes its memory, which is PyTorch's work
    count, stop, started = [0], [False], threading.Event()

    def other() -> None:
        while not stop[0]:
            count[0] += 1
            started.set()
            time.sleep(0)  # gives the lock back

    before = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    started.wait()
    sys.setswitchinterval(1e3)
    try:
        first = count[0]
        for _ in range(200):
            program.run([x], outputs)
            if count[0] > first:
                break
        moved = count[0] > first
    finally:
        stop[0] = True
        sys.setswitchinterval(before)
        thread.join()
    assert moved
