"""What the command line may call a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer import ArgumentError
from gossamer.sources import network_from

PROGRAM = """
import torch
from torch import nn

network = nn.ReLU()
number = 5
def plain(): return nn.Linear(4, 2).train()
def with_input(): return nn.Linear(4, 2), torch.ones(3, 4)
def with_inputs(): return nn.Bilinear(4, 5, 2), (torch.arange(4.0).view(1, 4), torch.zeros(1, 5))
def by_name(): return nn.Bilinear(4, 5, 2), {"input2": torch.zeros(1, 5), "input1": torch.ones(1, 4)}
def needs(width): return nn.Linear(width, 2)
def fails(): raise RuntimeError("no weights here")
class inner:
    make = staticmethod(plain)
class learner:
    model = nn.ReLU()
"""


@pytest.fixture(autouse=True)
def _program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(PROGRAM)
    (tmp_path / "broken_networks.py").write_text("import no_such_thing_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_networks", "broken_networks"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_factory_a_network_and_what_is_inside_another() -> None:
    for text in ("my_networks:plain", "my_networks:inner.make"):
        source = network_from(text, ["2,4"])
        assert isinstance(source.model, nn.Linear)
        assert not source.model.training
        assert source.plain is source.model
        assert source.examples[0].shape == (2, 4)
    assert isinstance(network_from("my_networks:network", ["1x4"]).model, nn.ReLU)


def test_example_inputs_come_with_it_and_keep_their_values_in_another_shape() -> None:
    assert network_from("my_networks:with_input").examples[0].equal(torch.ones(3, 4))
    assert network_from("my_networks:with_input", ["5,4"]).examples[0].equal(torch.ones(5, 4))
    assert [e.shape[1] for e in network_from("my_networks:by_name").examples] == [4, 5]
    first, second = network_from("my_networks:with_inputs", ["2,4", "2,5"]).examples
    assert first.tolist() == [[0, 1, 2, 3]] * 2
    assert second.shape == (2, 5)


@pytest.mark.parametrize(
    ("text", "shapes", "words"),
    [
        ("nowhere.gossamer", [], "no file that is there, and not of the form module:factory"),
        ("my_networks.py", [], "name a function in it, as in 'my_networks:make_network'"),
        ("no_networks:plain", [], "no module 'no_networks'"),
        ("broken_networks:plain", [], "importing broken_networks failed: No module named 'no_such_thing_at_all'"),
        ("my_networks:plane", [], "has no 'plane'. Closest: plain"),
        ("my_networks:plain", [], "say what goes in with --shape"),
        ("my_networks:number", [], "gives a int, not a torch.nn.Module"),
        ("my_networks:learner", [], "give its .model"),
        ("my_networks:needs", [], "without arguments and failed: TypeError"),
        ("my_networks:fails", [], "RuntimeError: no weights here"),
        ("my_networks:plain", ["1,a"], "positive numbers with commas"),
        ("my_networks:plain", ["0,4"], "positive numbers with commas"),
        ("my_networks:with_inputs", ["1,4"], "given 1 times, and the network has 2 inputs"),
    ],
)
def test_bad_input(text: str, shapes: list[str], words: str) -> None:
    with pytest.raises(ArgumentError) as error:
        network_from(text, shapes)
    assert words in str(error.value)
