"""How do scores of different layers compare? Each against its formula, and none changes a layer's order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ArgumentError
from gossamer.rules.normalization import NORMALIZATIONS, as_normalization

S = [3.0, -1.0, 2.0, 2.0]
TABLE = {
    "none": S,
    "sum": [3 / 8, -1 / 8, 2 / 8, 2 / 8],
    "max": [1.0, -1 / 3, 2 / 3, 2 / 3],
    "mean": [1.5, -0.5, 1.0, 1.0],
    "gaussian": [1.5 / 1.5, -2.5 / 1.5, 0.5 / 1.5, 0.5 / 1.5],  # mean 1.5, mean square of the rest 2.25
    # 9/9; below zero as it is; 4/(4+4+9) for the first of two equal ones, 4/(4+9) for the second.
    "lamp": [1.0, -1.0, 4 / 17, 4 / 13],
}


def test_the_table_names_every_normalization():
    assert set(NORMALIZATIONS) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_scores_are_those_of_the_formula(name):
    scores = torch.tensor(S).view(2, 2)
    found = NORMALIZATIONS[name](scores)
    assert found.shape == (2, 2)
    assert found.flatten().tolist() == pytest.approx(TABLE[name], rel=1e-6)
    assert scores.flatten().tolist() == S


@pytest.mark.parametrize("name", TABLE)
@given(scores=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30))
def test_the_order_inside_a_layer_stays(name, scores):
    before = torch.tensor(scores)
    after = NORMALIZATIONS[name](before)
    assert torch.isfinite(after).all()
    order = before.argsort(stable=True)
    assert (after[order].diff() >= 0).all()


@pytest.mark.parametrize("name", TABLE)
def test_a_layer_of_zeros_is_no_obstacle(name):
    assert NORMALIZATIONS[name](torch.zeros(5)).tolist() == [0.0] * 5


def test_a_function_is_a_normalization_and_an_unknown_name_is_none():
    own = lambda scores: scores / 2  # noqa: E731
    assert as_normalization(own) is own
    assert as_normalization("lamp") is NORMALIZATIONS["lamp"]
    for bad in ("lapm", 3, None):
        with pytest.raises(ArgumentError, match="lamp"):
            as_normalization(bad)
