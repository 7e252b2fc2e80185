"""What may a criterion look at? Only what it asks for is kept, and it is what it is called."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import ArgumentError, StateError
from gossamer.evidence import Evidence, ScoresOnDemand, StepEvidence, widen
from gossamer.rules.criteria import CRITERIA, EVIDENCE, Criterion


def start(needs: tuple[str, ...], weight: torch.Tensor, seed: int = 0) -> Evidence:
    funcs = {
        ("weight",): lambda weight: weight,
        ("noise",): lambda noise: noise,
        ("weight", "initial", "previous"): lambda weight, initial, previous: weight,
    }
    return Evidence(Criterion(funcs[needs]), {"a": weight}, seed)


@pytest.mark.parametrize("name", CRITERIA)
def test_only_what_looks_back_keeps_a_copy(name):
    evidence = Evidence(CRITERIA[name], {"a": torch.ones(3), "b": torch.ones(2)})
    backward = {"initial", "previous", "accumulated"} & set(CRITERIA[name].needs)
    assert set(evidence.kept) == backward
    assert set(evidence.state_dict()) == {f"{kind}/{layer}" for kind in backward for layer in "ab"}


def test_initial_stays_and_previous_follows_the_masks():
    weight = torch.tensor([1.0, 2.0])
    evidence = start(("weight", "initial", "previous"), weight)
    weight += 1
    evidence.moved("a", weight)
    weight += 1
    assert {k: v.tolist() for k, v in evidence.gather("a", weight).items()} == {
        "weight": [3.0, 4.0],
        "initial": [1.0, 2.0],
        "previous": [2.0, 3.0],
    }


def test_noise_depends_on_the_name_and_the_seed_and_on_nothing_else():
    weight = torch.ones(50)
    noise = start(("noise",), weight).gather("a", weight)["noise"]
    torch.rand(3)  # whatever else draws random numbers
    again = Evidence(CRITERIA["random"], {"b": weight, "a": weight})
    assert torch.equal(again.gather("a", weight)["noise"], noise)
    assert not torch.equal(again.gather("b", weight)["noise"], noise)
    assert not torch.equal(start(("noise",), weight, seed=1).gather("a", weight)["noise"], noise)
    assert 0 <= float(noise.min()) <= float(noise.max()) < 1


def test_noise_leaves_the_users_random_numbers_alone():
    before = torch.get_rng_state()
    start(("noise",), torch.ones(5)).gather("a", torch.ones(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_evidence_goes_where_the_weight_is():
    evidence = start(("weight", "initial", "previous"), torch.ones(2))
    moved = torch.ones(2, device="meta")
    assert {t.device.type for t in evidence.gather("a", moved).values()} == {"meta"}


def test_unchanged_is_said_only_of_criteria_of_change():
    weight = torch.randn(3)
    both = start(("weight", "initial", "previous"), weight)
    assert both.unchanged("a", weight)
    assert not both.unchanged("a", weight + 1)
    assert not start(("weight",), weight).unchanged("a", weight)
    assert not Evidence(CRITERIA["large_init"], {"a": weight}).unchanged("a", weight)


def test_evidence_comes_back_from_its_state():
    weight = torch.randn(3)
    first = start(("weight", "initial", "previous"), weight)
    first.moved("a", weight * 2)
    second = start(("weight", "initial", "previous"), torch.zeros(3))
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(v, second.gather("a", weight)[k]) for k, v in first.gather("a", weight).items())


def test_a_state_is_a_copy():
    evidence = start(("weight", "initial", "previous"), torch.ones(2))
    evidence.state_dict()["initial/a"].zero_()
    assert evidence.gather("a", torch.ones(2))["initial"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", [n for n, c in CRITERIA.items() if c.elementwise])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_scores_on_demand_are_the_scores(name, dtype):
    given = {k: torch.randn(7, 11).to(dtype) for k in EVIDENCE}
    lazy = ScoresOnDemand(CRITERIA[name], {k: given[k] for k in CRITERIA[name].needs})
    whole = CRITERIA[name].score({k: widen(v) for k, v in given.items()}).reshape(-1)
    assert len(lazy) == 77
    assert torch.equal(lazy[5:60], whole[5:60])
    assert torch.equal(lazy[slice(None, None, 7)], whole[::7])


def test_half_precision_is_widened_before_arithmetic_makes_ties():
    # In float16 both of these products are 0.
    weight = torch.tensor([1e-4, 2e-4], dtype=torch.float16)
    low, high = ScoresOnDemand(CRITERIA["squared_final"], {"weight": weight})[0:2].tolist()
    assert 0 < low < high


def test_what_is_accumulated_is_the_sum_over_the_steps():
    """Sanh et al. 2020: S = -Σ w · ∂L/∂w, each with the weight of that very step."""
    weight, expected = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5])), torch.zeros(3)
    evidence = Evidence(CRITERIA["sanh_movement"], {"a": weight})
    for step in range(3):
        weight.grad = torch.tensor([step - 1.0, 2.0, -3.0])
        expected -= weight.detach() * weight.grad
        evidence.observe({"a": weight})
        with torch.no_grad():
            weight.sub_(0.1 * weight.grad)
    weight.grad = None
    evidence.observe({"a": weight})
    assert torch.equal(evidence.gather("a", weight)["accumulated"], expected)


def test_noise_of_a_step_is_that_steps_own():
    weight = torch.nn.Parameter(torch.ones(50))
    first, same, other = (StepEvidence(CRITERIA["random"], 0, step).gather("a", weight)["noise"] for step in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    with pytest.raises(StateError, match="'a' has no gradient"):
        StepEvidence(Criterion(lambda gradient: gradient), 0, 1).gather("a", weight)
    with pytest.raises(ArgumentError, match="'initial'"):
        StepEvidence(CRITERIA["large_init"], 0, 1)
