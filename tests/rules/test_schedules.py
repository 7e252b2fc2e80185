"""How far along are we? Curves from 0 to 1, at any place in training, from any function."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ArgumentError
from gossamer.rules.schedules import SCHEDULES, Schedule, as_schedule, exponential, polynomial, steps

# Progress at 0, 1/4, 1/2, 3/4 and 1 of training, from the papers' formulas.
TABLE = {
    "one_shot": [0, 0, 0, 1, 1],  # its start is still dense, and the first moment after is not
    "iterative": [0, 1 / 3, 2 / 3, 1, 1],
    "agp": [0, 1 - (15 / 16) ** 3, 1 - (5 / 8) ** 3, 1 - (5 / 16) ** 3, 1],
    "one_cycle": [0, *((1 + math.exp(-8)) / (1 + math.exp(6 - 14 * p)) for p in (0.25, 0.5, 0.75, 1))],
    "cos": [0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1],
    "lin": [0, 0.25, 0.5, 0.75, 1],
    "dsd": [0, 0.5, 1, 0.5, 0],
    "polynomial": [0, 1 - (3 / 4) ** 2, 1 - (1 / 2) ** 2, 1 - (1 / 4) ** 2, 1],
    "exponential": [0, *((1 - math.exp(-5 * p)) / (1 - math.exp(-5)) for p in (0.25, 0.5, 0.75)), 1],
    "steps": [0, 1 / 3, 2 / 3, 1, 1],
    "constant": [1, 1, 1, 1, 1],
}


def test_the_table_names_every_schedule():
    assert set(SCHEDULES) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_progress_is_that_of_the_formula(name):
    assert [SCHEDULES[name](i / 4) for i in range(5)] == pytest.approx(TABLE[name], abs=1e-12)


@pytest.mark.parametrize("name", TABLE)
def test_the_last_moment_is_exact(name):
    assert SCHEDULES[name](1.0) == (0.0 if name == "dsd" else 1.0)


def test_five_epochs_stand_where_the_tutorial_has_them():
    one_cycle, cos = SCHEDULES["one_cycle"], SCHEDULES["cos"]
    assert [round(50 * one_cycle((e + 1) / 5), 2) for e in range(5)] == [1.96, 20.07, 45.86, 49.74, 50.00]
    assert [round(57.5 * cos((e + 1) / 5), 2) for e in range(5)] == [5.49, 19.87, 37.63, 52.01, 57.50]


@given(st.sampled_from(sorted(TABLE)), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_curve_can_lie_anywhere_in_training(name, a, b, at):
    start, end = min(a, b), max(a, b)
    if start == end:
        return
    moved = SCHEDULES[name].between(start, end)
    assert 0 <= moved(at) <= 1
    assert moved(1.0) == SCHEDULES[name](1.0)
    assert moved(end) == moved(1.0)
    if at <= start and not (moved.immediate and at == start):
        assert moved(at) == 0


@given(st.sampled_from(sorted(set(TABLE) - {"dsd"})), st.floats(0, 1), st.floats(0, 1))
def test_progress_never_goes_back_but_where_it_should(name, a, b):
    assert SCHEDULES[name](min(a, b)) <= SCHEDULES[name](max(a, b))


def test_a_function_of_three_arguments_gets_start_end_and_position():
    seen = []

    def annealer(start, end, pos):
        seen.append((start, end))
        return start + (end - start) * pos**2

    assert Schedule(annealer)(0.5) == 0.25
    assert set(seen) == {(0.0, 1.0)}


def test_a_callable_object_is_a_schedule():
    class Annealer:
        def __call__(self, pos):
            return pos**3

    assert as_schedule(Annealer())(0.5) == 0.125
    assert as_schedule(Annealer()).name == "Annealer"


def test_a_default_does_not_count_as_an_argument():
    assert as_schedule(lambda pos, power=2: pos**power)(0.5) == 0.25


def test_names_and_schedules_pass_through():
    assert as_schedule("cos") is SCHEDULES["cos"]
    assert as_schedule(SCHEDULES["cos"]) is SCHEDULES["cos"]
    with pytest.raises(ArgumentError, match=r"one_cycl'.*one_cycle"):
        as_schedule("one_cycl")


@pytest.mark.parametrize(
    ("name", "stepwise"),
    [
        ("one_shot", True),
        ("iterative", True),
        ("agp", False),
        ("one_cycle", False),
        ("cos", False),
        ("lin", False),
        ("steps", True),
    ],
)
def test_a_schedule_knows_whether_it_has_steps(name, stepwise):
    assert SCHEDULES[name].stepwise is stepwise
    assert SCHEDULES[name].between(0.1, 0.9).stepwise is stepwise


def test_steps_can_be_declared():
    assert Schedule(lambda pos: pos, stepwise=True).stepwise is True


@pytest.mark.parametrize(
    "arguments",
    [
        {"start_pct": 0.5, "end_pct": 0.5},
        {"start_pct": 0.9, "end_pct": 0.1},
        {"start_pct": -0.1},
        {"end_pct": 1.1},
        {"start_pct": math.nan},
        {"start_pct": True},
        {"end_pct": "1"},
    ],
)
def test_an_interval_that_is_none_is_refused_early(arguments):
    with pytest.raises(ArgumentError, match=r"start_pct|end_pct"):
        Schedule(lambda pos: pos, **arguments)


@pytest.mark.parametrize(
    ("func", "said"),
    [
        (0.5, "0.5"),
        (lambda a, b: a, "2 arguments"),
        (lambda: 1, "0 arguments"),
        (lambda pos: 2 * pos, "progress runs from 0 to 1"),
        (lambda pos: -pos, "progress runs from 0 to 1"),
        (lambda pos: math.nan, "nan"),
        (lambda pos: None, "None"),
    ],
)
def test_a_function_that_is_no_schedule_is_refused_early(func, said):
    with pytest.raises(ArgumentError, match=said):
        Schedule(func)


def test_rounding_beyond_the_ends_is_forgiven():
    assert Schedule(lambda pos: pos * (1 + 1e-9))(1.0) == 1.0
    assert Schedule(lambda pos: pos - 1e-9)(0.0) == 0.0


@pytest.mark.parametrize("position", [-0.01, 1.01, math.nan])
def test_a_position_outside_training_is_refused(position):
    with pytest.raises(ArgumentError, match="outside"):
        SCHEDULES["lin"](position)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_cannot_be_changed(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEDULES[name].start_pct = 0.3


def test_a_schedule_that_ends_a_rounding_error_below_one_ends_at_one() -> None:
    assert 0.7 + 0.2 + 0.1 < 1
    assert Schedule(lambda pos: 0.7 * pos + 0.2 * pos + 0.1 * pos)(1.0) == 1.0


@pytest.mark.parametrize(
    ("func", "stepwise"),
    [
        (lambda pos: 1.0, True),
        (lambda pos: float(pos >= 0.5), True),
        (lambda pos: math.ceil(10 * pos) / 10, True),
        (lambda pos: pos, False),
        (lambda pos: min(1.0, 4 * pos), False),
        (lambda pos: max(0.0, 5 * pos - 4), False),
    ],
)
def test_a_step_function_is_told_from_a_ramp_with_a_plateau(func, stepwise) -> None:
    assert Schedule(func).stepwise is stepwise


@given(st.floats(0.1, 9), st.floats(0, 1))
def test_a_polynomial_has_any_exponent_and_agp_is_the_cubic(power, at):
    assert polynomial(power)(at) == pytest.approx(1 - (1 - at) ** power if at else 0, abs=1e-8)
    assert polynomial(3, 0.2)(at) == SCHEDULES["agp"](at)
    assert polynomial(power, 0.2, 0.7)(0.7) == 1


@given(st.floats(-30, 30), st.floats(0, 1))
def test_an_exponential_has_any_rate(rate, at):
    if abs(rate) > 1e-3:
        expected = (1 - math.exp(-rate * at)) / (1 - math.exp(-rate))
        assert exponential(rate)(at) == pytest.approx(expected, abs=1e-6)


def test_steps_jump_at_the_given_fractions():
    three = steps(0.1, 0.5, 1.0)
    assert [three(p) for p in (0, 0.09, 0.1, 0.49, 0.5, 0.99, 1.0)] == pytest.approx(
        [0, 0, *[1 / 3] * 2, *[2 / 3] * 2, 1]
    )
    back = steps(1 / 3, 2 / 3, values=(1, 0))
    assert [back(i / 6) for i in range(7)] == [0, 0, 1, 1, 0, 0, 0]
    assert steps(*(i / 49 for i in range(1, 50)))(7 / 49) == pytest.approx(7 / 49), "whatever the rounding"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: polynomial(0), "power=0"),
        (lambda: polynomial("3"), "power='3'"),
        (lambda: polynomial(math.inf), "power=inf"),
        (lambda: exponential(0), "rate=0"),
        (lambda: exponential(math.nan), "rate=nan"),
        (lambda: steps(), "steps at"),
        (lambda: steps(0.5, 0.5), "increasing"),
        (lambda: steps(0.0, 0.5), "above 0"),
        (lambda: steps(0.5, 1.5), "1.5"),
        (lambda: steps(0.5, values=(1.0, 1.0)), "one value each"),
        (lambda: steps(0.5, values=(2.0,)), "2.0"),
        (lambda: SCHEDULES["cos"].every(0), "every_n_steps=0"),
        (lambda: SCHEDULES["cos"].every(1.5), "every_n_steps=1.5"),
        (lambda: SCHEDULES["cos"].every(True), "every_n_steps=True"),
    ],
)
def test_what_a_schedule_cannot_be_made_of_is_refused_early(make, said):
    with pytest.raises(ArgumentError, match=said):
        make()


def test_only_an_immediate_schedule_starts_sparse():
    assert [name for name, schedule in SCHEDULES.items() if schedule(0.0) > 0] == ["constant"]
    assert SCHEDULES["constant"].between(0.5, 1.0)(0.25) == 0
