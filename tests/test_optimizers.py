"""What an optimizer remembers of a weight is found, and dropped."""

from __future__ import annotations

import pytest
import torch

from gossamer.optimizers import forget, optimizer_tensors
from loops import OPTIMIZERS, start, train_step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_the_weights_shape_is_found_and_a_scalar_step_is_not(name):
    model, optimizer, _ = start(name)
    assert optimizer_tensors(None)(model[0].weight) == []
    train_step(model, optimizer, 0)
    weight = model[0].weight
    found = optimizer_tensors(optimizer)(weight)
    expected = [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.shape == weight.shape]
    assert [id(t) for t in found] == [id(t) for t in expected]
    assert found


def test_looking_for_state_makes_none():
    model, optimizer, _ = start("Adam")
    assert optimizer_tensors(optimizer)(model[0].weight) == []
    assert len(optimizer.state) == 0


def test_forgetting_is_as_if_it_had_never_stepped():
    model, optimizer, _ = start("Adam")
    train_step(model, optimizer, 0)
    forget(optimizer, [model[0].weight])
    forget(None, [model[0].weight])
    assert optimizer_tensors(optimizer)(model[0].weight) == []
    assert optimizer_tensors(optimizer)(model[4].weight) != []
    train_step(model, optimizer, 1)
    assert float(optimizer.state[model[0].weight]["step"]) == 1
    assert float(optimizer.state[model[4].weight]["step"]) == 2
