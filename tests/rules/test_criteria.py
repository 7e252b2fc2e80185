"""How much does each weight matter? Every criterion against a formula written out here."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from gossamer.errors import ArgumentError
from gossamer.rules.criteria import CRITERIA, EVIDENCE, OF_DATA, OF_LOSS, Criterion, as_criterion

#   weight now, at the beginning, when the masks last moved → score, worked out by hand
W, W0, W1 = [-3.0, 0.5, 2.0, 0.0], [1.0, -0.5, 4.0, 2.0], [-2.0, 0.5, -1.0, 0.0]
TABLE = {
    "random": (("noise",), [0.125, 0.875, 0.5, 0.5]),
    "large_final": (("weight",), [3.0, 0.5, 2.0, 0.0]),
    "magnitude": (("weight",), [3.0, 0.5, 2.0, 0.0]),
    "squared_final": (("weight",), [9.0, 0.25, 4.0, 0.0]),
    "small_final": (("weight",), [-3.0, -0.5, -2.0, 0.0]),
    "large_init": (("initial",), [1.0, 0.5, 4.0, 2.0]),
    "small_init": (("initial",), [-1.0, -0.5, -4.0, -2.0]),
    "large_init_large_final": (("weight", "initial"), [1.0, 0.5, 2.0, 0.0]),
    "small_init_small_final": (("weight", "initial"), [-3.0, -0.5, -4.0, -2.0]),
    "magnitude_increase": (("weight", "initial"), [2.0, 0.0, -2.0, -2.0]),
    "movement": (("weight", "initial"), [4.0, 1.0, 2.0, 2.0]),
    "movmag": (("weight", "initial"), [12.0, 0.5, 4.0, 0.0]),
    "updating_magnitude_increase": (("weight", "previous"), [1.0, 0.0, 1.0, 0.0]),
    "updating_movement": (("weight", "previous"), [1.0, 0.0, 3.0, 0.0]),
    "updating_movmag": (("weight", "previous"), [3.0, 0.0, 6.0, 0.0]),
    "taylor": (("weight", "gradient"), [6.0, 2.0, 1.0, 0.0]),
    "taylor_squared": (("weight", "gradient"), [36.0, 4.0, 1.0, 0.0]),
    "snip": (("weight", "gradient"), [6.0, 2.0, 1.0, 0.0]),
    "grasp": (("weight", "hessian_gradient"), [3.0, 0.5, -4.0, 0.0]),
    "synflow": (("weight", "flow"), [3.0, 1.5, 2.0, 0.0]),
    "fisher": (("weight", "gradient_squared"), [4.5, 0.5, 4.0, 0.0]),
    "sanh_movement": (("accumulated",), [-1.0, 0.0, 2.0, 0.5]),
    "wanda": (("weight", "input_norm"), [12.0, 0.5, 6.0, 0.0]),
    "wanda_l1": (("weight", "input_mean"), [3.0, 0.25, 4.0, 0.0]),
    "wanda_max": (("weight", "input_max"), [9.0, 1.0, 4.0, 0.0]),
}


def evidence() -> dict[str, torch.Tensor]:
    values = {
        "weight": W,
        "initial": W0,
        "previous": W1,
        "noise": [0.125, 0.875, 0.5, 0.5],
        "accumulated": [-1.0, 0.0, 2.0, 0.5],
        "gradient": [2.0, -4.0, 0.5, 7.0],
        "gradient_squared": [1.0, 4.0, 2.0, 3.0],
        "hessian_gradient": [-1.0, 1.0, -2.0, 5.0],
        "flow": [1.0, 3.0, 1.0, 2.0],
        "input_norm": [4.0, 1.0, 3.0, 2.0],
        "input_mean": [1.0, 0.5, 2.0, 1.0],
        "input_max": [3.0, 2.0, 2.0, 1.0],
    }
    assert set(values) == set(EVIDENCE)
    return {name: torch.tensor(v) for name, v in values.items()}


def test_the_table_below_names_every_criterion():
    assert set(CRITERIA) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_scores_are_those_of_the_formula(name):
    needs, expected = TABLE[name]
    assert CRITERIA[name].needs == needs
    assert CRITERIA[name].score(evidence()).tolist() == expected


@pytest.mark.parametrize("name", CRITERIA)
def test_scoring_leaves_the_evidence_as_it_is(name):
    given, before = evidence(), evidence()
    CRITERIA[name].score(given)
    assert all(torch.equal(given[k], before[k]) for k in given)


@pytest.mark.parametrize("name", [n for n, c in CRITERIA.items() if c.elementwise])
def test_an_elementwise_criterion_gives_a_slice_the_scores_of_the_whole(name):
    given = {k: torch.randn(101) for k in EVIDENCE}
    part = slice(13, 57)
    whole, sliced = CRITERIA[name].score(given), CRITERIA[name].score({k: v[part] for k, v in given.items()})
    assert torch.equal(whole[part], sliced)


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_are_documented_values_that_cannot_change(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        CRITERIA[name].func = abs
    assert CRITERIA[name].func.__doc__


def test_a_users_own_function_is_a_criterion():
    own = as_criterion(lambda w: w.abs())
    assert own.needs == ("weight",)
    assert own.name == "custom"
    assert not own.elementwise, "nothing is known about it, so it must see the weight whole"
    assert own.score(evidence()).tolist() == [3.0, 0.5, 2.0, 0.0]


def test_a_users_own_function_may_compute_in_place_and_the_weights_stay():
    given = evidence()
    before = {name: tensor.clone() for name, tensor in given.items()}
    assert as_criterion(lambda weight, initial: weight.sub_(initial).abs_()).score(given).tolist() == [
        4.0,
        1.0,
        2.0,
        2.0,
    ]
    assert all(torch.equal(given[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("func", "words"), [(lambda w: w.log(), "gives nan"), (lambda w: w + 1j, "torch.complex64, which have no order")]
)
def test_scores_without_an_order_are_refused(func, words):
    with pytest.raises(ArgumentError, match=f"criterion 'custom' .*{words}"):
        as_criterion(func).score(evidence())


def test_a_criterion_asks_for_evidence_by_the_names_of_its_parameters():
    def gap(initial, weight, power=2):
        return (weight - initial) ** power

    assert as_criterion(gap).needs == ("initial", "weight")
    assert as_criterion(gap).name == "gap"
    assert as_criterion(gap).score(evidence()).tolist() == [16.0, 1.0, 4.0, 4.0]
    assert as_criterion(lambda initial: initial).needs == ("initial",)
    assert as_criterion(functools.partial(gap, power=1)).needs == ("initial", "weight")
    assert as_criterion(torch.abs).needs == ("weight",)


def test_names_and_criteria_pass_through():
    assert as_criterion("movement") is CRITERIA["movement"]
    assert as_criterion(CRITERIA["movement"]) is CRITERIA["movement"]


def test_an_unknown_name_is_answered_with_the_closest():
    with pytest.raises(ArgumentError, match=r"large_finl.*large_final"):
        as_criterion("large_finl")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (3, "3"),
        (None, "None"),
        (lambda weight, gradent: weight, "gradent.*gradient"),
        (lambda: 1, "no argument"),
        (lambda a, b: a, "'a'"),
    ],
)
def test_what_cannot_be_a_criterion_is_refused_early(bad, said):
    with pytest.raises(ArgumentError, match=said):
        as_criterion(bad)


@pytest.mark.parametrize("func", [lambda w: w.sum(), lambda w: w[:1], lambda w: 3.0, lambda w: None])
def test_scores_of_another_shape_are_refused(func):
    with pytest.raises(ArgumentError, match="one score a weight"):
        as_criterion(func).score(evidence())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_scores_are_widened_to_float32(dtype):
    assert Criterion(lambda w: w.to(dtype)).score(evidence()).dtype == torch.float32


def test_double_precision_is_kept():
    assert CRITERIA["large_final"].score({"weight": torch.ones(2, dtype=torch.float64)}).dtype == torch.float64


def test_scores_carry_no_gradient():
    weight = torch.ones(2, requires_grad=True)
    assert not as_criterion("large_final").score({"weight": weight}).requires_grad


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_says_what_has_to_be_given_for_it(name):
    needs, said = set(CRITERIA[name].needs), CRITERIA[name].func.__doc__
    assert ("Takes data" in said) == bool(needs & OF_DATA)
    assert ("and a loss" in said) == bool(needs & OF_LOSS)
    assert ("training steps" in said) == ("accumulated" in needs)
