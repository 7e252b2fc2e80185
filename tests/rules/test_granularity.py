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
    Granularity,
    as_granularity,
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
