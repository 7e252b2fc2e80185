"""Which weights live and die together? Every granularity cut against a table of axes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ArgumentError
from gossamer.rules.granularity import (
    GRANULARITIES,
    REDUCTIONS,
    Granularity,
    as_granularity,
    as_reduction,
    expand,
    fits,
    output_channels,
    pool,
    units_of,
    view_of,
)

AXES = ["oihw", "oiw", "oidhw", "iohw", "giohw", "oi"]
# The letters that a unit spans, by the weight's axes; None where the granularity has no meaning there.
#                             oihw    oiw    oidhw    iohw    giohw    oi
TABLE = {
    "weight":                ("",     "",    "",      "",     "",      ""),
    "vector":                ("w",    "w",   "w",     "w",    "w",     "i"),
    "shared_weight":         ("o",    "o",   "o",     "o",    "go",    None),
    "channel":               ("i",    "i",   "i",     "i",    "i",     None),
    "column":                ("h",    None,  "h",     "h",    "h",     "o"),
    "row":                   ("w",    "w",   "w",     "w",    "w",     "i"),
    "depth":                 (None,   None,  "d",     None,   None,    None),
    "shared_channel":        ("oi",   "oi",  "oi",    "io",   "gio",   None),
    "shared_column":         ("oh",   None,  "oh",    "oh",   "goh",   None),
    "shared_row":            ("ow",   "ow",  "ow",    "ow",   "gow",   None),
    "vertical_slice":        ("ih",   None,  "ih",    "ih",   "ih",    None),
    "horizontal_slice":      ("iw",   "iw",  "iw",    "iw",   "iw",    None),
    "kernel":                ("hw",   "w",   "dhw",   "hw",   "hw",    None),
    "shared_vertical_slice": ("oih",  None,  "oih",   "ioh",  "gioh",  None),
    "shared_horizontal_slice": ("oiw", "oiw", "oiw",  "iow",  "giow",  None),
    "shared_kernel":         ("ohw",  "ow",  "odhw",  "ohw",  "gohw",  None),
    "filter":                ("ihw",  "iw",  "idhw",  "ihw",  "ihw",   "i"),
    "layer":                 ("oihw", "oiw", "oidhw", "iohw", "giohw", "oi"),
    # Blocks span parts of axes: see below.
    **dict.fromkeys(("block_1x4", "block_4x1", "block_4x4", "block_16x16"), ("",) * 6),
}  # fmt: skip


def test_the_table_names_every_granularity():
    assert set(GRANULARITIES) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_unit_spans_the_axes_in_the_table(name):
    for axes, letters in zip(AXES, TABLE[name], strict=True):
        if letters is None:
            assert not fits(GRANULARITIES[name], axes)
            with pytest.raises(ArgumentError, match=f"{name}.*weight"):
                GRANULARITIES[name].spans(axes)
        else:
            assert fits(GRANULARITIES[name], axes)
            assert {axes[d] for d in GRANULARITIES[name].spans(axes)} == set(letters)
            assert sorted(GRANULARITIES[name].spans(axes)) == list(GRANULARITIES[name].spans(axes))


def test_a_granularity_of_ones_own_is_a_rule_for_axes():
    own = Granularity("pairs", conv="ow", matrix="o")
    assert own.spans("oihw") == (0, 3)
    assert own.spans("oi") == (0,)
    assert as_granularity(own) is own
    with pytest.raises(dataclasses.FrozenInstanceError):
        own.conv = "i"


@pytest.mark.parametrize(
    ("conv", "matrix", "letter"), [("oz", "", "z"), ("", "w", "w"), (None, "s", "s"), ("g", "", "g")]
)
def test_an_axis_that_does_not_exist_is_refused_early(conv, matrix, letter):
    with pytest.raises(ArgumentError, match=f"'{letter}'"):
        Granularity("own", conv, matrix)


@pytest.mark.parametrize("bad", ["wieght", "Filter", 3, None])
def test_what_is_no_granularity_is_refused_with_a_remedy(bad):
    with pytest.raises(ArgumentError, match=r"weight|filter"):
        as_granularity(bad)


@st.composite
def cuts(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    return shape, sorted(draw(st.sets(st.integers(0, len(shape) - 1))))


@given(cuts())
def test_units_expand_to_weights_and_back(cut):
    shape, dims = cut
    units = torch.rand([1 if i in dims else n for i, n in enumerate(shape)]) < 0.5
    mask = expand(units, shape)
    assert list(mask.shape) == shape
    assert mask.is_contiguous()
    assert torch.equal(units_of(mask, dims), units)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in shape]).view(-1, len(shape)).tolist():
        assert mask[tuple(index)] == units[tuple(0 if i in dims else j for i, j in enumerate(index))]


@given(cuts())
def test_a_units_score_is_the_mean_over_its_weights(cut):
    shape, dims = cut
    scores = torch.randint(-5, 6, shape).double()
    pooled = pool(scores, dims)
    assert list(pooled.shape) == [1 if i in dims else n for i, n in enumerate(shape)]
    total = scores
    for dim in dims:
        total = total.sum(dim, keepdim=True)
    assert torch.allclose(pooled, total / (scores.numel() // pooled.numel()), rtol=1e-12, atol=0)


def test_groups_of_a_transposed_convolution_get_an_axis_of_their_own():
    assert view_of("iohw", (8, 3, 2, 2), groups=4) == ("giohw", (4, 2, 3, 2, 2))
    assert view_of("iohw", (8, 3, 2, 2), groups=1) == ("iohw", (8, 3, 2, 2))
    assert view_of("oihw", (8, 3, 2, 2), groups=4) == ("oihw", (8, 3, 2, 2))


def test_filters_are_output_channels_in_the_layers_own_order():
    filters = GRANULARITIES["filter"]
    kept = torch.tensor([True, False, True, False, False, True])
    assert torch.equal(output_channels(kept.view(6, 1, 1, 1), "oihw", filters.spans("oihw")), kept)
    assert torch.equal(output_channels(kept.view(1, 6, 1, 1), "iohw", filters.spans("iohw")), kept)
    assert torch.equal(output_channels(kept.view(2, 1, 3, 1, 1), "giohw", filters.spans("giohw")), kept)
    assert output_channels(kept.view(6, 1, 1, 1), "oihw", (0, 2, 3)) is None
    assert output_channels(kept.view(6, 1), "oi", ()) is None


@pytest.mark.parametrize(
    ("block", "axes", "view", "expected"),
    [
        ((1, 4), "oi", (6, 8), ("oOiI", (6, 1, 2, 4), (1, 3))),
        ((4, 1), "oi", (8, 6), ("oOiI", (2, 4, 6, 1), (1, 3))),
        ((16, 16), "oihw", (32, 16, 3, 3), ("oOiIhw", (2, 16, 1, 16, 3, 3), (1, 3))),
        ((2, 4), "iow", (8, 6, 3), ("iIoOw", (2, 4, 3, 2, 3), (1, 3))),
        ((2, 2), "giohw", (2, 4, 6, 1, 1), ("giIoOhw", (2, 2, 2, 3, 2, 1, 1), (2, 4))),
    ],
)
def test_a_block_is_a_part_of_two_axes(block, axes, view, expected):
    assert as_granularity(f"{block[0]}x{block[1]}").cut(axes, view) == expected
    assert as_granularity(f"{block[0]}×{block[1]}").cut(axes, view) == expected


@pytest.mark.parametrize("name", GRANULARITIES)
def test_without_blocks_a_cut_is_what_a_unit_spans(name):
    rule = GRANULARITIES[name]
    if rule.block is None and fits(rule, "oihw"):
        assert rule.cut("oihw", (4, 3, 2, 2)) == ("oihw", (4, 3, 2, 2), rule.spans("oihw"))


def test_a_block_that_does_not_divide_a_layer_is_refused():
    with pytest.raises(ArgumentError, match="6 output channels do not divide into blocks of 4"):
        as_granularity("4x1").cut("oi", (6, 8))
    with pytest.raises(ArgumentError, match="6 input channels do not divide into blocks of 4"):
        as_granularity("1x4").cut("oi", (8, 6))


@pytest.mark.parametrize("block", [(0, 4), (4,), 4, "4x4", (True, 2), (2.0, 2)])
def test_a_block_that_is_none_is_refused_early(block):
    with pytest.raises(ArgumentError, match="block"):
        Granularity("own", "", "", block)
    with pytest.raises(ArgumentError, match="whole axis"):
        Granularity("own", "i", "", (4, 4))


def test_reductions_are_those_of_their_formulas():
    scores = torch.tensor([[3.0, -4.0], [1.0, 2.0]])
    table = {"mean": [-0.5, 1.5], "sum": [-1.0, 3.0], "l2": [5.0, 5.0**0.5], "max": [3.0, 2.0]}
    assert set(REDUCTIONS) == set(table)
    for name, expected in table.items():
        pooled = pool(scores, [1], as_reduction(name))
        assert pooled.shape == (2, 1)
        assert pooled.flatten().tolist() == pytest.approx(expected)
        assert torch.equal(pool(scores, [], as_reduction(name)), scores), "a weight is its own unit"
    own = pool(scores, [1], as_reduction(lambda s, dims: s.amin(dims, keepdim=True)))
    assert own.flatten().tolist() == [-4.0, 1.0]
    for bad in ("medain", 3, None):
        with pytest.raises(ArgumentError, match="mean"):
            as_reduction(bad)
