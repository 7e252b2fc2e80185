"""A state is taken by a run of the same rules, and by no other."""

from __future__ import annotations

import pytest
from torch import nn

from gossamer import SET, FileError, RigL
from loops import start


def test_a_state_of_another_version_or_network_is_refused():
    _, _, run = start()
    with pytest.raises(FileError, match="99"):
        run.load_state_dict({**run.state_dict(), "version": 99})
    with pytest.raises(FileError):
        start(layer_type=nn.Conv2d)[2].load_state_dict(run.state_dict())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"sparsity": 60}, "sparsity"),
        ({"schedule": "cos"}, "schedule is 'one_cycle' there and 'cos' here"),
        ({"granularity": "filter", "layer_type": nn.Conv2d}, "granularity"),
        ({"context": "global"}, "context"),
        ({"criteria": "random"}, "criteria"),
    ],
)
def test_the_state_of_a_run_by_other_rules_is_refused(other, words):
    state = start()[2].state_dict()
    with pytest.raises(FileError, match=words):
        start(**other)[2].load_state_dict(state)


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        (
            RigL(every_n_steps=2),
            RigL(every_n_steps=3),
            r"exchanges .* of method is \[2, .* \[3, ",
        ),
        (RigL(every_n_steps=2), SET(every_n_steps=2), "name of method is 'rigl' there and 'set' here"),
        (RigL(every_n_steps=2), None, "method is 'rigl' there and None here"),
    ],
)
def test_of_two_methods_only_what_differs_is_told(there, here, words):
    state = start(method=there)[2].state_dict()
    with pytest.raises(FileError, match=words) as error:
        start(method=here)[2].load_state_dict(state)
    assert len(str(error.value)) < 250


def test_a_state_with_something_missing_is_refused():
    with pytest.raises(FileError, match="without 'steps_done'"):
        start()[2].load_state_dict({"version": 1})
