"""Compiled masking and selection, against their twins: a few plain lines, and the same moves without the library."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer import sweeps
from gossamer.masks import zero_masked
from gossamer.native import native
from gossamer.rules.criteria import CRITERIA
from gossamer.rules.selection import Hint
from gossamer.sparsifier import Sparsifier
from gossamer.sweeps import Competition, Units, drop
from gossamer.training import SparseTraining

pytestmark = pytest.mark.skipif(native() is None, reason="the library was not built")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
TINY = 2.0**-149
ODD = [0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, TINY, -TINY, 2.0**-126, 2.0**127, -(2.0**127), math.inf, -math.inf]
odd_or_any = st.one_of(st.sampled_from(ODD), st.floats(width=32, allow_nan=False))


def n_instruction_sets() -> int:
    names = iter(range(9))
    return next(i for i in names if native().gossamer_isa(i) is None)


@pytest.fixture(params=range(n_instruction_sets() if native() else 1), ids=lambda i: f"isa{i}")
def _each_instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_BEST", request.param)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def expected(scores: list[torch.Tensor], kept: list[torch.Tensor], need: int) -> list[torch.Tensor]:
    """The masks after the lowest kept scores went, by one stable sort."""
    every = np.concatenate([s.double().numpy() for s in scores])
    alive = np.flatnonzero(np.concatenate([k.numpy() for k in kept]))
    gone = alive[np.argsort(every[alive], kind="stable")[:need]]
    result = torch.cat(kept).clone()
    result[torch.from_numpy(gone)] = False
    return list(result.split([len(k) for k in kept]))


def check(
    weights: list[torch.Tensor], kept: list[torch.Tensor], need: int, hint: Hint | None = None, given: bool = False
) -> Hint | None:
    """Drops, and looks at masks, weights and what was to be zeroed beside them."""
    scores = weights if given else [w.abs() for w in weights]
    wanted = expected(scores, kept, need)
    masks = [k.clone() for k in kept]
    written = [w.clone() for w in weights]
    states = [torch.full_like(w, -1.0) for w in weights]
    layers = [
        Units(w, not given, m, int(m.sum()), [s] if given else [w, s])
        for w, m, s in zip(written, masks, states, strict=True)
    ]
    (done,) = drop([Competition(layers, need, hint)])
    assert done is not None
    assert all(torch.equal(m, e) for m, e in zip(masks, wanted, strict=True))
    assert done.counts == [int((k & ~m).sum()) for k, m in zip(kept, masks, strict=True)]
    for before, after, state, mask in zip(weights, written, states, masks, strict=True):
        if not given:
            wanted_bits = before.view(BITS[before.element_size()]) * mask  # nan is nan, and -0.0 is not 0.0
            assert torch.equal(after.view(wanted_bits.dtype), wanted_bits)
        assert torch.equal(state, -mask.to(state.dtype))
        assert not state[~mask].signbit().any()
    return done.hint


@pytest.mark.usefixtures("_each_instruction_set")
@given(st.lists(st.tuples(odd_or_any, st.booleans()), min_size=1, max_size=200), st.data())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given_scores", [False, True], ids=["magnitudes", "scores"])
def test_the_lowest_of_odd_values_go(dtype, given_scores, units, data):
    weights, kept = torch.tensor([u[0] for u in units]).to(dtype), torch.tensor([u[1] for u in units])
    if given_scores and dtype not in (torch.float32, torch.float64):
        weights = weights.float()
    if not kept.any():
        return
    hint = data.draw(st.none() | st.builds(Hint, odd_or_any, st.floats(0, 1e30)))
    check([weights], [kept], data.draw(st.integers(1, int(kept.sum()))), hint, given_scores)


N = 2 * (1 << 15) + 12_345  # more than one piece for a thread, and more than are all ordered
RNG = np.random.default_rng(7)
LONG = {
    "normal": RNG.standard_normal(N),
    "all equal": np.full(N, 0.5),
    "all zero": np.zeros(N),
    "two values, one rare": (np.arange(N) % 9973 == 0).astype(float),
    "sorted": np.arange(N),
    "sorted downwards": -np.arange(N),
    "few integers": RNG.integers(-3, 4, N),
    "denormals": RNG.integers(0, 50, N) * 1e-45,
    "signed zeros": np.where(RNG.random(N) < 0.5, -0.0, 0.0),
    "huge": RNG.standard_normal(N) * 1e38,
    "some +inf": np.where(RNG.random(N) < 0.3, np.inf, RNG.standard_normal(N)),
    "some -inf": np.where(RNG.random(N) < 0.3, -np.inf, RNG.standard_normal(N)),
    "low only where no sample looks": np.where(np.arange(N) % 2, RNG.random(N) / 9, 1.0),
    "lowest at the very end": np.where(np.arange(N) >= N - 9_000, RNG.random(N) / 9, 1 + RNG.random(N)),
}


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LONG)
def test_a_long_layer_agrees_with_a_stable_sort(kind, dtype):
    weights = torch.from_numpy(LONG[kind]).to(dtype)
    kept = torch.ones(N, dtype=torch.bool)
    for need in (1, N // 2, N):
        check([weights], [kept], need)
    kept[10:60_000:3] = False
    check([weights], [kept], 20_000)
    if dtype in (torch.float32, torch.float64):
        check([weights], [kept], 20_000, given=True)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("kind", LONG)
def test_small_steps_by_hints_agree_with_one_sort(kind):
    weights, hint = torch.from_numpy(LONG[kind]).float(), None
    kept = torch.ones(N, dtype=torch.bool)
    for need in (5, 20_000, 1, 300, 9_000, 77):
        hint = check([weights], [kept], need, hint)
        (kept,) = expected([weights.abs()], [kept], need)


@pytest.mark.usefixtures("_threads")
def test_layers_of_several_dtypes_share_one_threshold():
    weights = [torch.randn(40_000).to(d) for d in DTYPES] + [torch.zeros(0), torch.full((1_000,), -0.25)]
    kept = [torch.rand(len(w)) < 0.8 for w in weights]
    for need in (1, 50_000, int(sum(k.sum() for k in kept))):
        check(weights, kept, need)


def test_competitions_are_held_apart():
    weights = [torch.randn(n) for n in (70_000, 5, 40_000, 1)]
    masks = [torch.ones(len(w), dtype=torch.bool) for w in weights]
    wanted = [expected([w.abs()], [m], len(w) // 2 + 1)[0] for w, m in zip(weights, masks, strict=True)]
    drop([Competition([Units(w, True, m, len(w), [w])], len(w) // 2 + 1) for w, m in zip(weights, masks, strict=True)])
    assert all(torch.equal(m, e) for m, e in zip(masks, wanted, strict=True))


@pytest.mark.parametrize("n", [10, 100_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_never_ranked(n, sign):
    weights = torch.randn(n)
    weights[n // 2 :] = math.copysign(math.nan, sign)
    for is_magnitude in (True, False):
        kept = torch.ones(n, dtype=torch.bool)
        (done,) = drop([Competition([Units(weights, is_magnitude, kept, n, [])], n // 2 + 1)])
        assert done is None
        assert bool(kept.all()), "no mask may have changed"
        (done,) = drop([Competition([Units(weights, is_magnitude, kept, n, [])], n // 2)])
        assert done is not None
        assert kept.tolist() == [False] * (n // 2) + [True] * (n - n // 2)


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 63, 64, 9_000, -1])
@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan, -math.nan])
def test_asked_for_all_or_none_a_magnitude_that_is_no_finite_number_stops_all(odd, place, dtype):
    n = (1 << 15) + 77
    weights = [torch.full((n,), -torch.finfo(dtype).max, dtype=dtype) for _ in range(2)]
    before = [w.clone() for w in weights]
    masks = [torch.ones(n, dtype=torch.bool) for _ in weights]
    units = [Units(w, True, m, n, [w]) for w, m in zip(weights, masks, strict=True)]
    weights[1][place] = odd
    assert drop([Competition([u], 9) for u in units], whole=True) == [None, None]
    assert drop([Competition(units, 9)], whole=True) == [None]
    assert all(bool(m.all()) for m in masks)
    assert torch.equal(weights[0], before[0])
    weights[1][place] = before[1][place]
    assert None not in drop([Competition([u], 9) for u in units], whole=True), "the largest finite number is one"
    assert [int((~m).sum()) for m in masks] == [9, 9]


def test_asked_for_all_or_none_what_lies_otherwise_in_memory_stops_all():
    weights, masks = [torch.ones(24), torch.ones(4, 6).T], [torch.ones(24, dtype=torch.bool) for _ in range(2)]
    competitions = [Competition([Units(w, True, m, 24, [w])], 1) for w, m in zip(weights, masks, strict=True)]
    assert drop(competitions, whole=True) == [None, None]
    assert bool(masks[0].all())
    done = drop(competitions)
    assert done[0] is not None
    assert done[1] is None


@pytest.mark.parametrize(
    "odd",
    [
        torch.ones(4, 6).T,
        torch.ones(1, 6).expand(4, 6),
        torch.ones(23),
        torch.ones(4, 6, dtype=torch.complex128),
        torch.ones(4, 6, device="meta"),
        torch.ones(4, 6).to_sparse(),
    ],
    ids=["transposed", "expanded", "of another size", "complex", "elsewhere", "sparse"],
)
def test_what_lies_otherwise_in_memory_is_left_to_the_twin(odd):
    mask = torch.ones(4, 6, dtype=torch.bool)
    assert not sweeps.zero(mask, [torch.ones(4, 6), odd])
    assert drop([Competition([Units(torch.ones(24), True, mask.view(-1), 24, [odd])], 1)]) == [None]
    assert bool(mask.all())


def test_integers_have_no_magnitudes_to_rank():
    units = Units(torch.ones(4, dtype=torch.int32), True, torch.ones(4, dtype=torch.bool), 4)
    assert drop([Competition([units], 1)]) == [None]


@pytest.mark.usefixtures("_threads", "_each_instruction_set")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 200_003])
def test_zero_sets_masked_elements_to_plus_zero_and_no_others(n, dtype):
    tensor = (torch.randn(n) * 9).to(dtype)
    mask = torch.rand(n) < 0.5
    mask[: n // 2] = True  # whole blocks of what is kept
    wanted = tensor.view(torch.uint8).clone().view(n, tensor.element_size())
    wanted[~mask] = 0
    assert sweeps.zero(mask, [tensor])
    assert torch.equal(tensor.view(torch.uint8).view(n, tensor.element_size()), wanted)


def test_autograd_still_refuses_a_backward_pass_through_what_was_masked_since():
    weight = nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    zero_masked([weight], torch.tensor([True, False, True]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_criterion_that_says_it_is_a_magnitude_is_one():
    weight = torch.tensor([-2.0, -0.0, 3.0])
    said = [c for c in CRITERIA.values() if c.magnitude]
    assert len(said) >= 3
    for criterion in said:
        assert len(criterion.needs) == 1
        assert torch.equal(criterion.score({criterion.needs[0]: weight}), weight.abs())


def squares(weight):
    return weight.square()


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 120, 3, groups=2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter"])
@pytest.mark.parametrize(
    "criteria", ["large_final", "large_init", "movement", squares], ids=lambda c: getattr(c, "__name__", c)
)
def test_a_run_is_the_same_with_the_library_and_without(criteria, granularity, context, dtype, monkeypatch):
    states = []
    for with_library in (True, False):
        with monkeypatch.context() as patch:
            if not with_library:
                patch.setattr(sweeps, "native", lambda: None)
            model = network(dtype)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            sparsifier = Sparsifier(model, granularity, context, criteria)
            run = SparseTraining(sparsifier, optimizer, 70, "lin", total_steps=5)
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.ones(1, 3, 7, 7, dtype=dtype)).sum().backward()
                optimizer.step()
                run.step()
            momenta = [s["momentum_buffer"] for s in optimizer.state.values()]
            states.append([*sparsifier.masks.values(), *model.parameters(), *momenta])
            assert all(not bool(p[~m].any()) for p, m in sparsifier.masked_parameters())
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
