"""Which units stay? The few plain lines, the readable one and the fast one must agree on everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import plain
from gossamer.errors import ArgumentError
from gossamer.rules import selection
from gossamer.rules.budget import pooled_counts
from gossamer.rules.selection import Hint, exchange, grows, hint_after, nest, select, select_n_m, settle, survey, take

# Few values make ties; the odd ones are where float comparison, sampling or arithmetic on brackets could go wrong.
TINY = 2.0**-149
ODD = [0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, TINY, -TINY, 2.0**-126, 2.0**127, -(2.0**127), math.inf, -math.inf]
odd_or_any = st.one_of(st.sampled_from(ODD), st.floats(width=32, allow_nan=False))


@st.composite
def layers(draw, min_layers=1, max_layers=1, values=odd_or_any):
    """Scores and masks of a few layers, and a number of units to mask in all together."""
    scores, kept = [], []
    for _ in range(draw(st.integers(min_layers, max_layers))):
        scores.append(draw(st.lists(values, min_size=1, max_size=30)))
        kept.append(draw(st.lists(st.booleans(), min_size=len(scores[-1]), max_size=len(scores[-1]))))
    masked = draw(st.integers(0, sum(map(len, scores))))
    return scores, kept, masked


def drop(
    scores: torch.Tensor, kept: torch.Tensor, need: int, hint: Hint | None = None
) -> tuple[torch.Tensor, Hint | None]:
    """The fast path, whole: the mask after `need` more units went."""
    (candidates,) = survey([scores], [kept], need, hint)
    goes, hint = take(candidates, need)
    result = kept.clone()
    settle(scores, result, candidates.lower)
    result[candidates.positions[goes]] = False
    return result, hint


@pytest.mark.parametrize(
    ("scores", "kept", "masked", "expected"),
    [
        ([3, 1, 2, 4], [1, 1, 1, 1], 2, [1, 0, 0, 1]),
        ([3, 1, 2, 4], [1, 1, 1, 1], 0, [1, 1, 1, 1]),
        ([3, 1, 2, 4], [1, 1, 1, 1], 4, [0, 0, 0, 0]),
        ([1, 1, 1, 1], [1, 1, 1, 1], 2, [0, 0, 1, 1]),  # ties: the first positions go
        ([-1, 0, -2, 5], [1, 1, 1, 1], 2, [0, 1, 0, 1]),
        ([9, 1, 2, 4], [0, 1, 1, 1], 2, [0, 0, 1, 1]),  # grows around what is masked, however high its score
        ([9, 1, 2, 4], [0, 0, 0, 1], 1, [1, 0, 1, 1]),  # shrinks inside what is masked, the lowest stays masked
        ([0, 0, 0, 4], [0, 0, 0, 1], 1, [0, 1, 1, 1]),
        ([math.inf, math.inf, -math.inf, 0], [1, 1, 1, 1], 3, [0, 1, 0, 0]),
    ],
)
def test_a_mask_is_the_one_in_the_table(scores, kept, masked, expected):
    scores, kept = torch.tensor(scores, dtype=torch.float32), torch.tensor(kept, dtype=torch.bool)
    assert select(scores, kept, masked).int().tolist() == expected
    assert select(scores, kept, torch.tensor(masked)).int().tolist() == expected


@given(layers())
def test_select_agrees_with_a_plain_sort(case):
    (scores,), (kept,), masked = case
    got = select(torch.tensor(scores), torch.tensor(kept), masked)
    assert got.tolist() == plain.mask(scores, kept, masked)


@given(layers())
def test_the_fast_path_agrees_with_a_plain_sort(case):
    (scores,), (kept,), masked = case
    need = min(masked, sum(kept))
    got, _ = drop(torch.tensor(scores), torch.tensor(kept), need)
    assert got.tolist() == plain.mask(scores, kept, len(kept) - sum(kept) + need)


@given(layers(), st.floats(-1e3, 1e3), st.floats(1e-30, 1e30))
def test_a_hint_never_changes_the_result(case, threshold, density):
    (scores,), (kept,), masked = case
    need = min(masked, sum(kept))
    scores, kept = torch.tensor(scores), torch.tensor(kept)
    assert torch.equal(drop(scores, kept, need, Hint(threshold, density))[0], drop(scores, kept, need)[0])


@given(layers(1, 4))
def test_layers_that_compete_share_one_threshold(case):
    scores, kept, masked = case
    need = min(masked, sum(map(sum, kept)))
    found = survey([torch.tensor(s) for s in scores], [torch.tensor(k) for k in kept], need)
    inside = sum(len(c.positions) for c in found)
    assert sum(c.n_settled for c in found) <= need <= sum(c.n_settled for c in found) + inside
    for layer, candidates in zip(scores, found, strict=True):
        assert candidates.scores.tolist() == [layer[i] for i in candidates.positions.tolist()]


@given(layers(), st.integers(0, 30))
def test_masks_are_nested_whichever_way_they_move(case, further):
    (scores,), (kept,), masked = case
    scores, kept = torch.tensor(scores), torch.tensor(kept)
    first = select(scores, kept, masked)
    second = select(scores.flip(0), first, min(further, len(scores)))
    assert not (first & ~second).any() or not (second & ~first).any()


@given(st.integers(1, 5), st.integers(2, 6), st.data())
def test_n_m_agrees_with_brute_force_over_every_block(blocks, m, data):
    scores = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=blocks * m, max_size=blocks * m))
    masked = data.draw(st.integers(0, blocks * m))
    got = select_n_m(torch.tensor(scores).view(1, -1), torch.ones(1, blocks * m, dtype=torch.bool), masked, m)
    base, extra = divmod(masked, blocks)
    gone, following = set(), []
    for b in range(blocks):
        ranked = plain.lowest(scores, range(b * m, (b + 1) * m), m)
        gone |= set(ranked[:base])
        following += [ranked[base]] if base < m else []
    gone |= set(plain.lowest(scores, following, extra))
    assert got.flatten().tolist() == [i not in gone for i in range(blocks * m)]


@given(st.integers(1, 4), st.integers(2, 5), st.data())
def test_n_m_masks_are_nested_and_even_on_the_way(blocks, m, data):
    kept = torch.ones(blocks, m, dtype=torch.bool)
    for _ in range(4):
        masked = data.draw(st.integers(0, blocks * m))
        scores = torch.tensor(data.draw(st.lists(odd_or_any, min_size=blocks * m, max_size=blocks * m))).view(blocks, m)
        after = select_n_m(scores, kept, masked, m)
        assert int((~after).sum()) == masked
        a_block = (~after).sum(1)
        assert int(a_block.max() - a_block.min()) <= 1
        assert not (after & ~kept).any() or not (kept & ~after).any()
        kept = after


def test_nested_scores_put_what_is_masked_first_and_last():
    scores, kept = torch.tensor([math.inf, 2.0, -math.inf]), torch.tensor([True, False, True])
    assert nest(scores, kept, True).argsort().tolist() == [1, 2, 0]
    assert nest(scores, kept, False).argsort(stable=True).tolist()[0] == 1
    assert bool(grows(kept, 1))
    assert not bool(grows(kept, 0))


N = (1 << 18) + 12_345  # two chunks, and far over the sample's size
RNG = np.random.default_rng(7)
LONG = {
    "normal": RNG.standard_normal(N),
    "all equal": np.full(N, 0.5),
    "all zero": np.zeros(N),
    "two values": RNG.integers(0, 2, N),
    "two values, one rare": (np.arange(N) % 9973 == 0).astype(float),
    "sorted": np.arange(N),
    "sorted downwards": -np.arange(N),
    "sawtooth": np.arange(N) % 9,
    "sawtooth of the stride": np.arange(N) % 17,
    "few integers": RNG.integers(-3, 4, N),
    "denormals": RNG.integers(0, 50, N) * 1e-45,
    "signed zeros": np.where(RNG.random(N) < 0.5, -0.0, 0.0),
    "huge": RNG.standard_normal(N) * 1e38,
    "some +inf": np.where(RNG.random(N) < 0.3, np.inf, RNG.standard_normal(N)),
    "some -inf": np.where(RNG.random(N) < 0.3, -np.inf, RNG.standard_normal(N)),
    "low only where no sample looks": np.where(np.arange(N) % 2, -RNG.random(N), 1.0),
    "lowest at the very end": np.where(np.arange(N) >= N - 40_000, -RNG.random(N), RNG.random(N)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", LONG)
def test_a_long_layer_agrees_with_a_stable_sort(kind, dtype):
    scores = torch.from_numpy(LONG[kind]).to(dtype)
    kept = torch.ones(N, dtype=torch.bool)
    kept[10:60_000:3] = False
    order = np.flatnonzero(kept.numpy())
    order = order[np.argsort(scores.numpy()[order], kind="stable")]
    for need in (1, 40_000, len(order) // 2, len(order) - 1, len(order)):
        expected = kept.clone()
        expected[torch.from_numpy(order[:need])] = False
        got, _ = drop(scores, kept, need)
        assert torch.equal(got, expected), need


@pytest.mark.parametrize("kind", LONG)
def test_a_long_run_of_small_steps_agrees_with_one_sort(kind):
    scores = torch.from_numpy(LONG[kind]).float()
    kept, hint = torch.ones(N, dtype=torch.bool), None
    steps = [5, 20_000, 0, 1, 300, 45_000, 77]
    for need in steps:
        if need:
            kept, hint = drop(scores, kept, need, hint)
    gone = np.argsort(scores.numpy(), kind="stable")[: sum(steps)]
    assert np.array_equal(np.sort(gone), np.flatnonzero(~kept.numpy()))


@pytest.mark.parametrize(
    "n", [1, 2, 2 * selection._SAMPLE, 2 * selection._SAMPLE + 1, selection._CHUNK, selection._CHUNK + 1]
)
def test_the_sizes_at_which_the_fast_path_changes_gear_are_exact(n):
    scores = torch.randint(0, 100, (n,)).float()
    for need in {1, n // 3, n // 2, n} - {0}:
        got, _ = drop(scores, torch.ones(n, dtype=torch.bool), need)
        assert torch.equal(got, select(scores, torch.ones(n, dtype=torch.bool), need))


def test_long_layers_that_compete_agree_with_one_sort_of_all():
    parts = [torch.randn(50_000), torch.randint(-2, 3, (300_000,)).float(), torch.full((1_000,), -0.25)]
    kept = [torch.rand(len(p)) < 0.8 for p in parts]
    need = 106_000  # the threshold lies where scores are continuous, so that the first bracket will do
    found = survey(parts, kept, need)
    assert any(c.n_settled for c in found), "the bracket should have a lower end here"
    every, alive = torch.cat(parts).numpy(), np.flatnonzero(torch.cat(kept).numpy())
    gone = alive[np.argsort(every[alive], kind="stable")[:need]]
    start = 0
    for part, keep, candidates in zip(parts, kept, found, strict=True):
        here = gone[(gone >= start) & (gone < start + len(part))] - start
        goes, _ = take(candidates, len(here))
        result = keep.clone()
        result[candidates.positions[goes]] = False
        settle(part, result, candidates.lower)
        assert np.array_equal(np.sort(here), np.flatnonzero((keep & ~result).numpy()))
        start += len(part)


def test_a_layer_of_lower_precision_loses_no_candidate_to_rounding():
    few = torch.ones(10)  # lower than all others, by less than float32 can tell
    many = 1 + 1e-13 * torch.arange(1, 90_001, dtype=torch.float64)
    found = survey([few, many], [torch.ones(len(s), dtype=torch.bool) for s in (few, many)], 9_000)
    assert pooled_counts(9_000, [c.n_settled for c in found], [c.scores for c in found])[0] == [10, 8_990]


@pytest.mark.parametrize("n", [10, 100_000])
def test_scores_of_nan_are_refused_when_they_would_have_to_be_ranked(n):
    scores = torch.randn(n)
    scores[n // 2 :] = math.nan
    with pytest.raises(ArgumentError, match="nan"):
        survey([scores], [torch.ones(n, dtype=torch.bool)], n // 2 + 1)


@pytest.mark.parametrize(
    ("upper", "threshold", "left"),
    [
        (math.inf, 1.0, 5),  # an open bracket says nothing about density
        (2.0, 1.0, 0),
        (1.0, 1.0, 5),
        (2.0, math.nan, 5),
        (2.0, -math.inf, 5),  # a span without end has no density either
        (1.5e308, -1.5e308, 5),
    ],
)
def test_there_is_no_hint_where_nothing_can_be_said(upper, threshold, left):
    assert hint_after(upper, threshold, left) is None


def test_scores_of_minus_infinity_do_not_upset_the_next_step():
    # log|w| of weights that are 0: the threshold of the first step is -inf, and its bracket has a finite end.
    n = 100_000
    scores = torch.rand(n)
    scores[torch.randperm(n)[:30_000]] = -math.inf
    kept, hint = drop(scores, torch.ones(n, dtype=torch.bool), 29_990)
    kept, _ = drop(scores, kept, 1_000, hint)
    assert int((~kept).sum()) == 30_990
    assert not kept[scores == -math.inf].any()


@given(layers(), st.data())
def test_an_exchange_drops_the_lowest_and_grows_the_highest(case, data):
    scores, kept, _ = case
    drop, keep = scores[0], kept[0]
    grow = data.draw(st.lists(odd_or_any, min_size=len(drop), max_size=len(drop)))
    n = data.draw(st.integers(0, sum(keep)))
    found = exchange(torch.tensor(keep), torch.tensor(drop), torch.tensor(grow), keep.count(False), n).tolist()
    left = set(plain.lowest(drop, [i for i, k in enumerate(keep) if k], n))
    gone = [i for i, k in enumerate(keep) if not k or i in left]
    still = plain.lowest(grow, gone, len(gone) - n)  # the highest come, so the lowest stay masked
    assert found == [i not in still for i in range(len(keep))]
    assert sum(found) == sum(keep)
    masked = torch.tensor(keep.count(False))
    assert (
        found == exchange(torch.tensor(keep), torch.tensor(drop), torch.tensor(grow), masked, masked * 0 + n).tolist()
    )


@given(st.integers(1, 5), st.sampled_from([2, 4, 40]), st.data())
def test_an_exchange_keeps_a_pattern(blocks, m, data):
    values = st.lists(st.integers(-3, 3), min_size=m * blocks, max_size=m * blocks)
    drop, grow = (torch.tensor(data.draw(values), dtype=torch.float32).view(blocks, m) for _ in range(2))
    kept = select_n_m(drop.flip(0), torch.ones(blocks, m, dtype=torch.bool), blocks * m // 2, m)
    n = data.draw(st.integers(0, blocks * m // 2))
    after = exchange(kept, drop, grow, blocks * m // 2, n, m)
    assert (after.sum(1) == m // 2).all()
    assert int((kept & ~after).sum()) <= n


@pytest.mark.parametrize("m", [8, 33, 100])
def test_long_blocks_are_ranked_as_short_ones_are(m):
    scores = torch.randint(-5, 6, (7, m)).float()
    keep = select_n_m(scores, torch.ones(7, m, dtype=torch.bool), 7 * (m // 3), m)
    for row, kept in zip(scores.tolist(), keep.tolist(), strict=True):
        gone = plain.lowest(row, range(m), m // 3)
        assert kept == [i not in gone for i in range(m)]
