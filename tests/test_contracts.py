"""What holds for everything that is registered: each criterion, granularity, context and type of layer together."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import plain
from gossamer import CRITERIA, GRANULARITIES, SCHEDULES, GossamerError, Sparsifier
from gossamer.rules.allocation import as_context
from gossamer.rules.granularity import fits
from gossamer.targets import find_targets

CONTEXTS = ["local", "global", "2:4", "1:4"]
DTYPES = [torch.float16, torch.bfloat16]


class Apart(nn.Module):
    """Layers side by side, none of which feeds another."""

    def forward(self, x):
        return x


def network(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers of a kind, between layers that shall not be touched; weights are integers with many ties."""
    layer = plain.LAYERS[kind]()
    other = nn.Linear(5, 5) if not isinstance(layer, nn.Linear) else nn.Conv2d(2, 3, 3)
    model = Apart()
    for name, module in {"norm": nn.BatchNorm2d(6), "a": layer, "other": other, "b": plain.LAYERS[kind]()}.items():
        model.add_module(name, module)
    model.to(dtype)
    for i, parameter in enumerate(model.parameters()):
        plain.set_integers(parameter, seed=i)
    return model


def sparsifier_of(model: nn.Module, granularity: str, context: str, criterion: str) -> Sparsifier:
    sparsifier = Sparsifier(model, granularity, context, criterion, type(model.a))
    # So that criteria of change have something to see; integers again, so that all sums stay exact.
    for i, target in enumerate(sparsifier.targets):
        plain.set_integers(target.weight, seed=10 + i)
    return sparsifier


def is_refused(model: nn.Module, granularity: str, context: str) -> bool:
    (target, _) = find_targets(model, type(model.a))
    if not fits(GRANULARITIES[granularity], target.axes):
        return True
    spanned = {target.axes[d] for d in GRANULARITIES[granularity].spans(target.axes)}
    inputs = 1 if "i" in spanned else target.view[target.axes.index("i")]
    m = as_context(context).m
    return bool(m and inputs % m)


def expected_units(sparsifier: Sparsifier, percent: float) -> dict[str, np.ndarray]:
    """The masks of units by plain stable sorts over numpy arrays."""
    context, scores = as_context(sparsifier.context), {}
    for target in sparsifier.targets:
        evidence = {k: v.double() for k, v in sparsifier.evidence.gather(target.name, target.weight).items()}
        whole = sparsifier.criterion.score(evidence).reshape(target.view).numpy()
        dims = sparsifier.granularity.spans(target.axes)
        scores[target.name] = whole.mean(axis=dims, keepdims=True) if dims else whole
    kept = {n: np.ones(s.shape, dtype=bool) for n, s in scores.items()}
    if context.kind == "global":
        every = np.concatenate([s.ravel() for s in scores.values()])
        gone = np.argsort(every, kind="stable")[: math.floor(percent * len(every) / 100 + 0.5)]
        flat = np.ones(len(every), dtype=bool)
        flat[gone] = False
        parts = np.split(flat, np.cumsum([s.size for s in scores.values()])[:-1])
        return {n: p.reshape(scores[n].shape) for n, p in zip(scores, parts, strict=True)}
    for target in sparsifier.targets:
        s, k = scores[target.name], kept[target.name]
        if context.m:
            axis = target.axes.index("i")
            blocks = np.moveaxis(np.ones_like(k), axis, -1).reshape(-1, context.m)
            for row, keep in zip(np.moveaxis(s, axis, -1).reshape(-1, context.m), blocks, strict=True):
                keep[np.argsort(row, kind="stable")[: context.m - context.n]] = False
            moved = np.moveaxis(k, axis, -1).shape
            kept[target.name] = np.moveaxis(blocks.reshape(moved), -1, axis)
        else:
            k.ravel()[np.argsort(s.ravel(), kind="stable")[: math.floor(percent * s.size / 100 + 0.5)]] = False
    return kept


def check(model: nn.Module, sparsifier: Sparsifier, percent: float) -> None:
    """Sparsifies, and looks at everything that must hold afterwards."""
    units = expected_units(sparsifier, percent)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparsifier.sparsify_model(percent)
    for target in sparsifier.targets:
        mask = torch.from_numpy(units[target.name]).expand(target.view).reshape(target.weight.shape)
        assert torch.equal(sparsifier.masks[target.name], mask), (sparsifier.criterion.name, target.name)
        old = before[f"{target.name}.weight"]
        assert target.weight.shape == old.shape
        assert target.weight.dtype == old.dtype
        assert torch.equal(target.weight, torch.where(mask, old, torch.zeros_like(old)))
        # The number of masked units, from the definition and not from the code's own count.
        if as_context(sparsifier.context).kind == "local":
            assert int((~units[target.name]).sum()) == math.floor(percent * units[target.name].size / 100 + 0.5)
    if as_context(sparsifier.context).kind == "global":
        n = sum(u.size for u in units.values())
        assert sum(int((~u).sum()) for u in units.values()) == math.floor(percent * n / 100 + 0.5)
    for name, parameter in model.named_parameters():
        if name.startswith(("norm", "other")):
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("context", ["local", "global", "2:4"])
@pytest.mark.parametrize("kind", plain.LAYERS)
def test_every_criterion_masks_exactly_what_a_plain_sort_does(kind, context, granularity):
    if is_refused(network(kind), granularity, context):
        with pytest.raises(GossamerError, match="layer 'a'") as error:
            Sparsifier(network(kind), granularity, context, layer_type=type(network(kind).a))
        assert any(word in str(error.value) for word in ("All that fit", "exclude")), "a remedy belongs to it"
        return
    fraction = as_context(context).fraction
    percent = 37.5 if fraction is None else float(100 * fraction)
    # Everything meets everything in the local context; in the others criteria take turns, so that every two still meet.
    turn = list(GRANULARITIES).index(granularity) + list(plain.LAYERS).index(kind)
    for i, criterion in enumerate(CRITERIA):
        if context != "local" and (i + turn) % 4:
            continue
        model = network(kind)
        sparsifier = sparsifier_of(model, granularity, context, criterion)
        check(model, sparsifier, percent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", plain.LAYERS)
def test_every_dtype_is_exact(kind, context, dtype):
    fraction = as_context(context).fraction
    for granularity in GRANULARITIES:
        if not is_refused(network(kind), granularity, context):
            model = network(kind, dtype)
            sparsifier = sparsifier_of(model, granularity, context, "large_final")
            check(model, sparsifier, 50 if fraction is None else float(100 * fraction))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("context", ["local", "global", "2:4"])
def test_the_same_weights_give_the_same_masks(context, criterion):
    masks = []
    for _ in range(2):
        sparsifier = sparsifier_of(network("Conv2d"), "weight", context, criterion)
        torch.rand(5)  # whatever else draws random numbers in between
        sparsifier.sparsify_model(50)
        masks.append(sparsifier.masks.state_dict())
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_masks_are_nested_as_sparsity_grows_and_shrinks(criterion, context):
    sparsifier = sparsifier_of(network("Conv2d"), "kernel", context, criterion)
    before = {n: m.clone() for n, m in sparsifier.masks.items()}
    for percent in (10, 35, 80, 60, 100, 0):
        with torch.no_grad():
            for target in sparsifier.targets:  # or there is nothing to see for criteria of change
                target.weight.add_(torch.arange(target.weight.numel()).view(target.weight.shape) % 5)
        sparsifier.sparsify_model(percent)
        grown = [bool((before[n] & ~m).any()) for n, m in sparsifier.masks.items()]
        shrunk = [bool((m & ~before[n]).any()) for n, m in sparsifier.masks.items()]
        assert not (any(grown) and any(shrunk)), percent
        before = {n: m.clone() for n, m in sparsifier.masks.items()}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("context", ["local", "global"])
def test_the_memory_layout_of_a_weight_makes_no_difference(context, criterion):
    """Moved step by step: what lies otherwise in memory takes the slow path, and must end at the same masks."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 8, 3)).to(memory_format=layout)
        for i in (0, 1):
            plain.set_integers(model[i].weight, seed=i)
        sparsifier = Sparsifier(model, "weight", context, criterion)
        for step, thirds in enumerate((1, 1, 2, 2, 3)):
            for i in (0, 1):
                noise = torch.empty(model[i].weight.shape)
                plain.set_integers(noise, seed=100 + 10 * step + i)
                with torch.no_grad():
                    model[i].weight += noise
            sparsifier.move(dict.fromkeys(("0", "1"), Fraction(thirds, 4)))
        assert model[0].weight.is_contiguous(memory_format=layout)
        results.append(sparsifier.masks.state_dict())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("rules", [CRITERIA, GRANULARITIES, SCHEDULES], ids=lambda r: r.kind)
def test_every_registered_rule_survives_pickle(rules) -> None:
    for name in rules:
        again = pickle.loads(pickle.dumps(rules[name]))
        assert again == rules[name], name
