"""How many units go? Counts are exact, and every way of splitting a budget gives the same split."""

from __future__ import annotations

import dataclasses
import math
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import plain
from gossamer.errors import ArgumentError
from gossamer.rules.allocation import (
    Context,
    as_context,
    as_fraction,
    check_target,
    count,
    round_kept,
)
from gossamer.rules.budget import global_counts, pooled_counts

ODD = [0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**127, -(2.0**127), math.inf, -math.inf]
scores_of_layers = st.lists(
    st.lists(st.one_of(st.sampled_from(ODD), st.floats(width=32, allow_nan=False)), min_size=1, max_size=20),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize(
    ("percent", "n", "expected"),
    [
        (50, 2, 1),
        (50, 4, 2),
        (50, 10, 5),
        (50, 5, 3),  # halves up, where Python's round gives 2
        (50, 1, 1),
        (0, 7, 0),
        (100, 7, 7),
        (29, 50, 15),  # 14.5; in floats 0.29 * 50 is 14.499999999999998
        (2.3, 1000, 23),
        (0.1, 500, 1),
        (57.5, 20, 12),
        (1e-5, 10, 0),
        (33.3, 10, 3),
        (99.9, 500, 500),
        (50, 147_456, 73_728),
        (70, 294_912, 206_438),
        (80, 1_179_648, 943_718),
    ],
)
def test_a_count_is_rounded_halves_up(percent, n, expected):
    assert count(as_fraction(percent), n) == expected


@given(st.integers(0, 100_000), st.integers(1, 10_000_000))
def test_a_count_is_what_decimal_arithmetic_says(thousandths, n):
    percent = Decimal(thousandths) / 1000
    expected = int((percent * n / 100).quantize(Decimal(1), ROUND_HALF_UP))
    assert count(as_fraction(float(percent)), n) == expected


@pytest.mark.parametrize("percent", [-1, 100.1, math.nan, math.inf, "50", None, True, [50]])
def test_what_is_no_percentage_is_refused_by_name(percent):
    with pytest.raises(ArgumentError) as error:
        as_fraction(percent)
    assert repr(percent) in str(error.value)
    assert "percentage" in str(error.value)


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_kept_units_are_the_nearest_multiple(n, multiple, data):
    masked = data.draw(st.integers(0, n))
    kept = n - round_kept(masked, n, multiple)
    assert 0 < kept <= n
    if masked == 0:
        assert kept == n
        return
    reachable = list(range(multiple, n + 1, multiple)) or [n]
    if n % multiple and n - masked > reachable[-1]:
        # Between the last multiple and all of them: the nearest multiple may be more than there are.
        assert kept in (reachable[-1], n)
    else:
        assert abs(kept - (n - masked)) == min(abs(m - (n - masked)) for m in reachable)


@pytest.mark.parametrize(
    ("masked", "n", "multiple", "expected"),
    [(8, 16, 8, 8), (16, 16, 8, 8), (3, 16, 8, 0), (4, 16, 8, 0), (5, 16, 8, 8), (2, 4, 8, 0), (7, 10, 1, 7)],
)
def test_rounding_keeps_what_the_table_says(masked, n, multiple, expected):
    assert round_kept(masked, n, multiple) == expected


@given(scores_of_layers, st.data())
def test_three_ways_to_split_a_budget_agree(layers, data):
    masked = data.draw(st.integers(0, sum(map(len, layers))))
    tensors = [torch.tensor(layer) for layer in layers]
    expected = plain.split(masked, layers)
    assert global_counts(masked, tensors).tolist() == expected
    assert pooled_counts(masked, [0] * len(layers), tensors)[0] == expected


@given(scores_of_layers, st.data())
def test_settled_units_come_off_the_budget(layers, data):
    settled = [data.draw(st.integers(0, 3)) for _ in layers]
    budget = data.draw(st.integers(0, sum(map(len, layers))))
    got, threshold = pooled_counts(sum(settled) + budget, settled, [torch.tensor(layer) for layer in layers])
    assert got == [s + n for s, n in zip(settled, plain.split(budget, layers), strict=True)]
    if budget:
        assert threshold == sorted(s for layer in layers for s in layer)[budget - 1]
    else:
        assert math.isnan(threshold)


def test_a_layer_without_candidates_gets_what_is_settled():
    assert pooled_counts(3, [1, 0], [torch.empty(0), torch.tensor([2.0, 1.0, 3.0])]) == ([1, 2], 2.0)


def test_global_counts_split_a_large_tie_in_the_order_of_the_layers():
    layers = [torch.zeros(1000), torch.zeros(5000), torch.ones(10)]
    assert global_counts(1500, layers).tolist() == [1000, 500, 0]
    assert pooled_counts(1500, [0, 0, 0], layers)[0] == [1000, 500, 0]


def test_scores_in_double_precision_are_not_mixed_up():
    # Neighbours that float32 cannot tell apart: the lower of the two must go.
    layers = [torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
    assert pooled_counts(1, [0, 0], layers)[0] == [0, 1]


@pytest.mark.parametrize(("name", "kind"), [("local", "local"), ("global", "global"), ("2:4", "n:m"), ("1:16", "n:m")])
def test_contexts_are_read_from_their_names(name, kind):
    context = as_context(name)
    assert context.kind == kind
    assert str(context) == name
    assert as_context(context) is context


@given(st.integers(1, 30), st.integers(2, 31))
def test_a_pattern_means_a_sparsity(n, m):
    assume(n <= m)
    assert as_context(f"{n}:{m}").fraction == Fraction(m - n, m)


def test_only_patterns_mean_a_sparsity_by_themselves():
    assert as_context("local").fraction is None
    assert as_context("global").fraction is None


@pytest.mark.parametrize("bad", ["5:4", "0:4", "2:", "locl", "", "2:4:8", " 2:4", None, 3])
def test_a_context_that_is_none_is_refused_early(bad):
    with pytest.raises(ArgumentError, match="context"):
        as_context(bad)


def test_contexts_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Context("local").kind = "global"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counting_tells_apart_what_the_dtype_does(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    layers = [1 + step * torch.arange(0, 20, 2, dtype=dtype), 1 + step * torch.arange(1, 21, 2, dtype=dtype)]
    for masked in range(21):
        assert global_counts(masked, layers).tolist() == [(masked + 1) // 2, masked // 2]


def test_counting_spans_the_whole_range_of_float64() -> None:
    most = torch.finfo(torch.float64).max
    layers = [torch.tensor([-most, 0.0, most], dtype=torch.float64), torch.tensor([-math.inf, math.inf])]
    assert [global_counts(n, layers).tolist() for n in range(6)] == [[0, 0], [0, 1], [1, 1], [2, 1], [3, 1], [3, 2]]


@given(scores_of_layers, st.data())
def test_bounds_hold_and_the_rest_is_shared_as_without_them(layers, data):
    least = [data.draw(st.integers(0, len(s))) for s in layers]
    most = [data.draw(st.integers(low, len(s))) for low, s in zip(least, layers, strict=True)]
    masked = data.draw(st.integers(sum(least), sum(most)))
    tensors = [torch.tensor(s, dtype=torch.float32) for s in layers]
    found = global_counts(masked, tensors, (least, most)).tolist()
    assert found == plain.bounded_split(masked, [t.tolist() for t in tensors], least, most)


@pytest.mark.parametrize(
    ("context", "fraction", "units", "masked", "expected"),
    [
        (Context("global"), Fraction(1, 2), [10, 1], 5, ([0, 0], [9, 1])),
        (Context("global"), Fraction(1), [10, 1], 11, ([0, 0], [10, 1])),  # nobody is left out at 100 %
        (Context("global", floor=20, ceiling=75), Fraction(1, 2), [10, 8], 9, ([2, 2], [7, 6])),
        (Context("global", floor=20), Fraction(1, 10), [10, 8], 2, ([1, 1], [9, 7])),  # not reached yet
        (Context("global", ceiling=50), Fraction(1, 2), [3, 3], 3, ([0, 0], [2, 2])),  # 1 + 1 would be one too few
        (
            Context("global", floor=40, ceiling=50),
            Fraction(9, 20),
            [3, 97],
            45,
            ([1, 39], [1, 48]),
        ),  # none in 1.2 to 1.5
    ],
)
def test_bounds_give_way_to_the_count(context, fraction, units, masked, expected):
    assert context.bounds(fraction, units, masked) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "global", "floor": 60, "ceiling": 40}, "floor=60"),
        ({"kind": "global", "floor": 101}, "floor 101"),
        ({"kind": "global", "ceiling": "high"}, "ceiling 'high'"),
        ({"kind": "local", "floor": 10}, "floor"),
        ({"kind": "local", "normalization": "lamp"}, "normalization"),
        ({"kind": "global", "densities": lambda f, s: []}, "densities"),
        ({"kind": "local", "densities": 3}, "densities=3"),
    ],
)
def test_what_a_context_has_no_use_for_is_refused_early(arguments, said):
    with pytest.raises(ArgumentError, match=said):
        Context(**arguments)


def test_a_target_outside_floor_and_ceiling_is_refused():
    for percent in (10, 96):
        with pytest.raises(ArgumentError, match="outside floor=20 and ceiling=95"):
            check_target(as_fraction(percent), Context("global", floor=20, ceiling=95))
    check_target(as_fraction(0), Context("global", floor=20))
