"""Weights go into a network all or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gossamer.errors import ArgumentError, FileError
from gossamer.weights import load_weights


def test_parameters_stay_the_same_objects() -> None:
    net, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other(torch.randn(4, 3))
    weight = net.weight
    load_weights(net, other.state_dict(), "the example")
    assert net.weight is weight
    assert torch.equal(net.running_mean, other.running_mean)
    assert int(net.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"weight": torch.zeros(2, 3)}, "'bias' is missing there"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "x": torch.zeros(1)}, "'x' is not in this network"),
        ({"bias": torch.zeros(2), "weight": torch.zeros(3, 2)}, "(3, 2) there and (2, 3) here"),
        ({"bias": torch.zeros(2), "weight": 3}, "'weight' has shape int there"),
    ],
)
def test_of_another_network_nothing_is_taken(weights: dict[str, Any], words: str) -> None:
    net = nn.Linear(3, 2)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(FileError) as error:
        load_weights(net, weights, "the example")
    assert words in str(error.value)
    assert "the example" in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_what_a_module_keeps_besides_tensors_is_taken_too() -> None:
    class Counts(nn.Linear):
        count = 0

        def get_extra_state(self) -> Any:
            return {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    net, other = Counts(2, 2), Counts(2, 2)
    other.count = 3
    load_weights(net, other.state_dict(), "the example")
    assert net.count == 3
    assert torch.equal(net.weight, other.weight)


def test_no_network_at_all() -> None:
    with pytest.raises(ArgumentError, match="'net'"):
        load_weights("net", {}, "the example")  # pyright: ignore[reportArgumentType]
