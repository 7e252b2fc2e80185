"""Where values lie in memory."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.runtime.values import FEW, Signature, arrange, as_torch, in_lines, planar

SIZES = st.integers(0, 40)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 33), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)).map(Signature),
    st.lists(st.integers(1, 9), max_size=3).flatmap(
        lambda s: st.integers(1, 70).map(lambda c: Signature((*s, c), is_tokens=True))
    ),
)


@given(spans=st.lists(st.tuples(SIZES, st.integers(0, 12), st.integers(0, 5)), max_size=14))
def test_what_lives_at_once_never_overlaps(spans: list[tuple[int, int, int]]) -> None:
    sizes, lives = [s for s, _, _ in spans], [(first, first + more) for _, first, more in spans]
    places, all_of_it = arrange(sizes, lives)
    assert len(places) == len(sizes)
    assert all(at >= 0 and at + size <= all_of_it for at, size in zip(places, sizes, strict=True))
    for i, (at, size, (first, last)) in enumerate(zip(places, sizes, lives, strict=True)):
        for other, more, (begins, ends) in list(zip(places, sizes, lives, strict=True))[:i]:
            if size and more and first <= ends and begins <= last:
                assert at + size <= other or other + more <= at
    most = max((sum(s for s, (a, b) in zip(sizes, lives, strict=True) if a <= t <= b) for t in range(20)), default=0)
    assert most <= all_of_it <= sum(sizes)


def test_values_one_after_the_other_share_their_memory() -> None:
    chain = [(i, i + 1) for i in range(10)]
    assert arrange([16] * 10, chain) == ([0, 16] * 5, 32)


@given(value=SHAPES)
def test_pytorchs_layout_is_that_of_a_contiguous_tensor(value: Signature) -> None:
    x, layout = torch.empty(value.shape), as_torch(value)
    if value.is_tokens:
        x = x.view(-1, value.channels, 1, 1)
    assert (x.shape[0], x.shape[1]) == (value.images, value.channels)
    assert tuple(x.shape[2:]) == value.size
    if value.images > 1:
        assert x.stride(0) == layout.image
    if value.channels > 1:
        assert x.stride(1) == layout.channel


@given(value=SHAPES)
def test_channels_in_planar_memory_begin_at_lines_and_do_not_overlap(value: Signature) -> None:
    layout, n = planar(value), value.images * value.pixels
    assert layout.image == value.pixels  # images follow each other
    assert layout.channel >= n
    if n >= FEW:
        assert layout.channel % 16 == 0
        assert layout.channel // 16 % 2 == 1  # an odd number of lines
        assert layout.channel < n + 32
    else:
        assert layout.channel == n


@given(n=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float16, torch.uint8]))
def test_lines_of_the_cache_are_filled(n: int, dtype: torch.dtype) -> None:
    whole = in_lines(n, dtype) * dtype.itemsize
    assert whole % 64 == 0
    assert 0 <= whole - n * dtype.itemsize < 64


def test_channels_and_sizes_can_be_changed() -> None:
    image, tokens = Signature((2, 3, 4, 5)), Signature((2, 7, 3), is_tokens=True)
    assert image.with_channels(6).shape == (2, 6, 4, 5)
    assert image.with_channels(6, [1, 2]).shape == (2, 6, 1, 2)
    assert tokens.with_channels(6).shape == (2, 7, 6)
    assert (image.images, image.channels, image.size, image.pixels) == (2, 3, (4, 5), 20)
    assert (tokens.images, tokens.channels, tokens.size, tokens.pixels) == (14, 3, (1, 1), 1)
    assert Signature((5,), is_tokens=True).images == 1
