"""A stable order is the one that a plain sort of pairs gives, for every kind of float."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.rules.order import order_keys, stable_order

ODD = [0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), math.inf, -math.inf, 2.0**127]
scores = st.lists(st.one_of(st.sampled_from(ODD), st.floats(width=32, allow_nan=False)), max_size=40)


@given(scores, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_positions_come_by_score_and_then_by_place(values, dtype):
    given_scores = torch.tensor(values, dtype=torch.float32).to(dtype)
    expected = sorted(range(len(values)), key=lambda i: (given_scores[i].item(), i))
    assert stable_order(given_scores).tolist() == expected


@given(scores, st.booleans())
def test_keys_compare_as_the_scores_do(values, wide):
    given_scores = torch.tensor(values, dtype=torch.float64 if wide else torch.float32)
    keys = [key % 2 ** (64 if wide else 32) for key in order_keys(given_scores, wide).tolist()]
    for a, x in zip(keys, given_scores.tolist(), strict=True):
        for b, y in zip(keys, given_scores.tolist(), strict=True):
            assert (a < b) == (x < y)
            assert (a == b) == (x == y)


@pytest.mark.parametrize("n", [0, 1, 300_000])
def test_long_scores_with_many_ties_agree_with_torch(n):
    given_scores = torch.randint(-50, 50, (n,)).float()
    assert torch.equal(stable_order(given_scores), torch.argsort(given_scores, stable=True))
