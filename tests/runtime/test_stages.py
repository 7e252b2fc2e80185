"""How many images go through a segment at a time changes nothing but the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import GRAPHS, Built, conv, graphs, results
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from twins import ISAS, chain, error, needs_library, sparse

from gossamer.runtime import stages
from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.planes import Add, MaxPool, Mean
from gossamer.runtime.program import Program
from gossamer.runtime.segment import Segment
from gossamer.runtime.stages import Stage, make_stages, run_stages
from gossamer.runtime.values import Signature

pytestmark = needs_library


def same(segment: Segment, ways: list[Stage], inputs: list[Tensor]) -> None:
    seconds: list[tuple[str, float]] = []
    want = segment.graph(*inputs)
    for got in (segment._given(run_stages(ways, inputs)), segment._given(run_stages(ways, inputs, seconds))):
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        for ours, theirs in pairs:
            assert error(ours, theirs) < 1e-5
    assert all(t >= 0 for _, t in seconds)


def can_be_parted(signatures: list[Signature]) -> bool:
    return all(len(s.shape) > 1 and s.shape[0] == signatures[0].shape[0] for s in signatures)


@settings(max_examples=150)
@given(case=graphs(), data=st.data())
def test_any_number_of_images_at_a_time(case: tuple[Segment, list[Signature]], data: st.DataObject) -> None:
    segment, signatures = case
    if not can_be_parted(signatures):
        return
    threads, n = data.draw(st.sampled_from([1, 1, 2])), signatures[0].shape[0]
    stage = stages._stage(segment.graph, signatures, data.draw(st.integers(1, n)), threads, data.draw(ISA))
    same(segment, [stage], [torch.randn(s.shape) for s in signatures])


@settings(max_examples=150)
@given(case=graphs(), data=st.data())
def test_any_graph_in_two(case: tuple[Segment, list[Signature]], data: st.DataObject) -> None:
    """Wherever it may be cut in two, each with its own number of images at a time."""
    segment, signatures = case
    cuts = list(stages._cuts(segment.graph))
    if not cuts or not can_be_parted(signatures):
        return
    n, isa = signatures[0].shape[0], data.draw(ISA)
    first, second = stages._split(segment.graph, data.draw(st.sampled_from(cuts)))
    one = stages._stage(first, signatures, data.draw(st.integers(1, n)), 1, isa)
    between = [stages._of(o, n) for o in one.program.outputs]
    same(
        segment,
        [one, stages._stage(second, between, data.draw(st.integers(1, n)), 1, isa)],
        [torch.randn(s.shape) for s in signatures],
    )


ISA = st.sampled_from([-1, *ISAS])


@pytest.mark.parametrize("make", GRAPHS, ids=lambda f: f.__name__)
def test_graphs_of_real_networks_in_two(make: Any) -> None:
    built = Built()
    segment = built.segment(*make(built))
    if not can_be_parted(built.inputs):
        return
    n = built.inputs[0].shape[0]
    for cut in stages._cuts(segment.graph):
        first, second = stages._split(segment.graph, cut)
        one = stages._stage(first, built.inputs, 1, 2, -1)
        between = [stages._of(o, n) for o in one.program.outputs]
        same(segment, [one, stages._stage(second, between, n, 2, -1)], [torch.randn(s.shape) for s in built.inputs])


def test_inputs_that_are_used_in_another_order() -> None:
    built = Built()
    x, y = built.input((4, 3, 6, 6)), built.input((4, 3, 6, 6))
    first = built.add(conv(3, 3, 3), y, x)
    segment = built.segment(built.add(conv(3, 3), built.add(conv(3, 3), first)))
    cuts = list(stages._cuts(segment.graph))
    assert cuts
    for cut in cuts:
        one, two = (
            stages._stage(g, v, 2, 1, -1)
            for g, v in zip(
                stages._split(segment.graph, cut), ([*built.inputs], [Signature((4, 3, 6, 6))]), strict=True
            )
        )
        same(segment, [one, two], [torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)])


def test_a_graph_is_cut_only_where_one_value_is_all_that_is_needed_later() -> None:
    built = Built()
    x = built.input((4, 3, 6, 6))
    one = built.add(conv(3, 3), x)
    two = built.add(conv(3, 3), one)
    three = built.add(Add(), two, one)  # until here one is needed
    four = built.add(conv(3, 3), three)
    five = built.add(conv(3, 3), four, x)  # and until here the input
    six = built.add(conv(3, 3), five)
    segment = built.segment(built.add(Add("relu"), six))
    assert [n.name for n in stages._cuts(segment.graph)] == [five.name, six.name]
    both = Built()
    x = both.input((4, 3, 6, 6))
    one = both.add(conv(3, 3), x)
    assert not list(stages._cuts(both.segment(both.add(conv(3, 3), one), one).graph))


def big_then_small() -> list[nn.Module]:
    """Large images and few weights, then small images and many."""
    return [
        conv(16, 32, 3, "relu"), conv(32, 32, 3, "relu"), MaxPool((8, 8), (8, 8), (0, 0)), conv(32, 256, 3, "relu"),
        conv(256, 256, 3, "relu"), conv(256, 256, 3, "relu"), Mean(False), Layer(sparse((10, 256), 0.5)),
    ]  # fmt: skip


def test_large_images_go_through_a_few_at_a_time() -> None:
    segment, x = chain(*big_then_small()), torch.randn(16, 16, 64, 64)
    ways = make_stages(segment.graph, [Signature(tuple(x.shape))], 1)
    assert ways[0].times > 1
    same(segment, ways, [x])
    assert len(make_stages(segment.graph, [Signature((1, 16, 64, 64))], 1)) == 1


def test_batches_that_would_lie_in_memory_go_through_a_few_at_a_time() -> None:
    wide, narrow = sparse((64, 256, 1, 1), 0.9), sparse((256, 64, 1, 1), 0.9)
    graph = chain(*[Layer(w, None, Geometry()) for w in (wide, narrow) * 2]).graph
    ways = make_stages(graph, [Signature((64, 256, 56, 56))], 1)
    assert max(way.program.inputs[0].shape[0] for way in ways) <= 4


def test_tokens_go_through_together_since_each_turn_reads_all_weights() -> None:
    up, down = sparse((3072, 768), 0.9), sparse((768, 3072), 0.9)
    [stage] = make_stages(chain(Layer(up), Layer(down)).graph, [Signature((128, 768), is_tokens=True)], 1)
    assert stage.program.inputs[0].shape[0] >= 64


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("images", [2, 3, 7, 17])
def test_batches_that_do_not_go_up(images: int, threads: int) -> None:
    segment = chain(conv(3, 8, 3, "relu"), MaxPool((2, 2), (2, 2), (0, 0)), conv(8, 4), Mean(False))
    x = torch.randn(images, 3, 12, 12)
    for size in range(1, images + 1):
        stage = stages._stage(segment.graph, [Signature(tuple(x.shape))], size, threads, -1)
        assert stage.times * size + (0 if stage.rest is None else stage.rest.inputs[0].shape[0]) == images
        same(segment, [stage], [x])


def test_a_program_run_over_several_batches() -> None:
    segment = chain(conv(3, 8, 3, "relu"), conv(8, 4))
    program = Program(segment.graph, [Signature((2, 3, 7, 7))], 1)
    for batches in (1, 2, 5, 1):
        for threads in (1, 2, 3):
            x = torch.randn(2 * batches, 3, 7, 7)
            [got] = results(program, [x], batches, threads)
            assert error(got, segment.graph(x)) < 1e-5
    assert len(program._kept) == 1


def test_inputs_of_different_first_axes_go_through_at_once() -> None:
    segment = chain(Layer(torch.randn(4, 6)), n_inputs=2)
    ways = make_stages(segment.graph, [Signature((8, 6), True), Signature((8, 4), True)], 1)
    same(segment, ways, [torch.randn(8, 6), torch.randn(8, 4)])
    one = chain(Layer(torch.randn(4, 6)))
    same(one, make_stages(one.graph, [Signature((6,), True)], 1), [torch.randn(6)])
