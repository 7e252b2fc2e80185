"""Choosing masks takes memory for one layer at a time, however many layers compete."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from gossamer import Sparsifier
from gossamer.all import sparsegpt
from gossamer.gathering import gather
from gossamer.rules.criteria import CRITERIA, OF_DATA
from gossamer.rules.normalization import NORMALIZATIONS
from memory import peak

SIDE = 512
FEW, MANY = 3, 9
PER_WEIGHT = 5
"""Bytes that are there anyway: of a weight and its mask."""


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported():
    """What is imported when first used would count."""
    for name in ("random", "fisher"):
        sparsifier(1, criteria=name).sparsify_model(50)
    sparsegpt(sparsifier(1, context="local"), 50)


def network(n: int, side: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(n) for layer in (nn.Linear(side, side, bias=False), nn.Tanh())])


def sparsifier(n: int, side: int = SIDE, **kwargs) -> Sparsifier:
    data = [(torch.randn(16, side), torch.zeros(16, dtype=torch.long))]
    made = Sparsifier(
        network(n, side),
        layer_type=nn.Linear,
        data=data,
        loss_func=nn.CrossEntropyLoss(),
        **{"context": "global", **kwargs},
    )
    with torch.no_grad():  # so that there is something to see for a criterion that looks back
        for target in made.targets:
            target.weight.grad = torch.randn(side, side)
            target.weight.add_(torch.randn(side, side))
    made.observe()
    for target in made.targets:
        target.weight.grad = None
    return made


def growth(of, side: int = SIDE, counts: tuple[int, int] = (FEW, MANY)) -> float:
    """How many bytes each weight of each further layer costs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        few, many = map(of, counts)
    return (many - few) / ((counts[1] - counts[0]) * side * side)


def selection_peak(n: int, **kwargs) -> int:
    made = sparsifier(n, **kwargs)
    return peak(lambda: made.sparsify_model(50))


def evidence_peak(n: int, name: str) -> int:
    made = sparsifier(n, criteria=name)
    kinds = [kind for kind in CRITERIA[name].needs if kind in OF_DATA]
    there = [*made.model.parameters(), *made.masks.values()]
    there += [tensor for layers in made.evidence.kept.values() for tensor in layers.values()]
    return peak(lambda: ([t.detach() for t in there], gather(made.calibration, made.targets, kinds)))


@pytest.mark.parametrize("name", list(CRITERIA))
def test_a_global_selection_needs_little_beside_what_a_criterion_looks_at(name):
    evidence = growth(lambda n: evidence_peak(n, name))
    assert growth(lambda n: selection_peak(n, criteria=name)) < evidence + 0.9


@pytest.mark.parametrize("context", ["lamp", *[f"global {name}" for name in NORMALIZATIONS]])
def test_scores_that_depend_on_the_whole_layer_are_held_for_one_layer(context):
    kind, _, normalization = context.partition(" ")
    more = {"normalization": normalization} if normalization else {}
    assert growth(lambda n: selection_peak(n, criteria="magnitude", context=kind, **more)) < PER_WEIGHT + 0.9


def test_so_does_selection_that_is_not_compiled(monkeypatch):
    monkeypatch.setattr("gossamer.sweeps.native", lambda: None)
    assert growth(lambda n: selection_peak(n, criteria="magnitude")) < PER_WEIGHT + 0.9


def test_so_do_scores_that_all_tie():
    def tied(n: int) -> int:
        made = sparsifier(n, criteria="random")
        with torch.no_grad():
            for target in made.targets:
                target.weight.fill_(1.0)
        made = Sparsifier(made.model, layer_type=nn.Linear, context="global", criteria="squared_final")
        return peak(lambda: made.sparsify_model(50))

    assert growth(tied) < PER_WEIGHT + 3  # so many candidates as n^(2/3) before it gives up


def test_sparsegpt_holds_the_hessian_of_one_layer():
    side = 192

    def of(n: int) -> int:
        made = sparsifier(n, side, context="local")
        return peak(lambda: sparsegpt(made, 50))

    assert growth(of, side, (2, 4)) < PER_WEIGHT + 0.5
