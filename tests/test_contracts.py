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
from gossamer.methods import METHODS
from gossamer.rules.allocation import CONTEXTS, as_context
from gossamer.rules.criteria import OF_DATA
from gossamer.rules.densities import Shape
from gossamer.rules.granularity import REDUCTIONS, fits
from gossamer.rules.normalization import NORMALIZATIONS
from gossamer.targets import AXES, find_targets

PATTERNS = ["2:4", "1:4"]
DTYPES = [torch.float16, torch.bfloat16]


class Apart(nn.Module):
    """Layers side by side, none of which feeds another; each has an input of its own."""

    def forward(self, x):
        outputs = [layer(plain.input_for(layer)) for layer in self.children() if type(layer) in AXES]
        return torch.cat([out.flatten(1) for out in outputs], 1)


def loss_of(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Curved, so that there is a Hessian, and with small whole numbers for gradients."""
    return (out * y[:, None]).sum() + out.square().sum() / 2


DATA = [(torch.zeros(2, 1), torch.tensor([1.0, -1.0]))]


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
    sparsifier = Sparsifier(model, granularity, context, criterion, type(model.a), data=DATA, loss_func=loss_of)
    # So that criteria of change have something to see; integers again, so that all sums stay exact.
    for i, target in enumerate(sparsifier.targets):
        plain.set_integers(target.weight, seed=10 + i)
        target.weight.grad = torch.ones_like(target.weight)
    sparsifier.observe()
    return sparsifier


def is_refused(model: nn.Module, granularity: str, context: str) -> bool:
    (target, _) = find_targets(model, type(model.a))
    if not fits(GRANULARITIES[granularity], target.axes):
        return True
    o, i = GRANULARITIES[granularity].block or (1, 1)
    if target.view[target.axes.index("o")] % o or target.view[target.axes.index("i")] % i:
        return True
    spanned = {target.axes[d] for d in GRANULARITIES[granularity].spans(target.axes)}
    inputs = 1 if "i" in spanned else target.view[target.axes.index("i")] // i
    m = as_context(context).m
    return bool(m and inputs % m)


def cut_of(sparsifier: Sparsifier, target) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Axes, lengths and spanned axes, blocks as axes of their own; written out for blocks, whose cut is under test."""
    o, i = sparsifier.granularity.block or (0, 0)
    if not o:
        return target.axes, target.view, sparsifier.granularity.spans(target.axes)
    axes, view = "", []
    for letter, n in zip(target.axes, target.view, strict=True):
        size = {"o": o, "i": i}.get(letter)
        axes += letter if size is None else letter + letter.upper()
        view += [n] if size is None else [n // size, size]
    return axes, tuple(view), tuple(d for d, letter in enumerate(axes) if letter.isupper())


def expected_units(sparsifier: Sparsifier, percent: float) -> dict[str, np.ndarray]:
    """The masks of units by plain stable sorts over numpy arrays."""
    context, scores = sparsifier.context, {}
    of_data = bool(OF_DATA & set(sparsifier.criterion.needs))
    for target in sparsifier.targets:
        _, view, dims = cut_of(sparsifier, target)
        if (
            of_data or context.normalization
        ):  # roots and quotients, which are rounded: their values are tested elsewhere
            layer = sparsifier._layers[target.name]
            scores[target.name] = sparsifier._layers.scores(layer).double().numpy()
            continue
        evidence = {k: v.double() for k, v in sparsifier.evidence.gather(target.name, target.weight).items()}
        whole = sparsifier.criterion.score(evidence).reshape(view).numpy()
        scores[target.name] = whole.mean(axis=dims, keepdims=True) if dims else whole
    kept = {n: np.ones(s.shape, dtype=bool) for n, s in scores.items()}
    sizes = [s.size for s in scores.values()]
    goal = math.floor(percent * sum(sizes) / 100 + 0.5)
    if context.is_pooled:
        most = [n - 1 if n > 1 else 1 for n in sizes]  # no layer is emptied, where that can be
        most = sizes if sum(most) < goal else most
        flat = [s.ravel().tolist() for s in scores.values()]
        for name, n in zip(scores, plain.bounded_split(goal, flat, [0] * len(flat), most), strict=True):
            kept[name].ravel()[np.argsort(scores[name].ravel(), kind="stable")[:n]] = False
        return kept
    counts = [math.floor(percent * n / 100 + 0.5) for n in sizes]
    if context.densities is not None:
        shapes = [Shape(t.axes, t.view, n) for t, n in zip(sparsifier.targets, sizes, strict=True)]
        counts = context.densities(Fraction(percent) / 100, shapes)
        assert sum(counts) == goal
    for target, count in zip(sparsifier.targets, counts, strict=True):
        s, k = scores[target.name], kept[target.name]
        axes = cut_of(sparsifier, target)[0]
        if context.m:
            moved = np.moveaxis(s, axes.index("i"), -1)
            kept[target.name] = np.moveaxis(in_rows(moved, context.m, count).reshape(moved.shape), -1, axes.index("i"))
        elif context.kind == "output":
            outputs = [d for d, letter in enumerate(axes) if letter in "go"]
            moved = np.moveaxis(s, outputs, range(len(outputs)))
            length = s.size // math.prod(s.shape[d] for d in outputs)
            kept[target.name] = np.moveaxis(
                in_rows(moved, length, count).reshape(moved.shape), range(len(outputs)), outputs
            )
        else:
            k.ravel()[np.argsort(s.ravel(), kind="stable")[:count]] = False
    return kept


def in_rows(scores: np.ndarray, length: int, count: int) -> np.ndarray:
    """Rows that mask the same number each, and the rows whose next score is lowest one more."""
    rows = scores.reshape(-1, length)
    keep = np.ones(rows.shape, dtype=bool)
    base, extra = divmod(count, len(rows))
    orders = [np.argsort(row, kind="stable") for row in rows]
    for row, order in zip(keep, orders, strict=True):
        row[order[:base]] = False
    if extra:
        following = [row[order[base]] for row, order in zip(rows, orders, strict=True)]
        for i in np.argsort(following, kind="stable")[:extra]:
            keep[i, orders[i][base]] = False
    return keep


def check(model: nn.Module, sparsifier: Sparsifier, percent: float) -> None:
    """Sparsifies, and looks at everything that must hold afterwards."""
    units = expected_units(sparsifier, percent)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparsifier.sparsify_model(percent)
    for target in sparsifier.targets:
        view = cut_of(sparsifier, target)[1]
        mask = torch.from_numpy(units[target.name]).expand(view).reshape(target.weight.shape)
        assert torch.equal(sparsifier.masks[target.name], mask), (sparsifier.criterion.name, target.name)
        old = before[f"{target.name}.weight"]
        assert target.weight.shape == old.shape
        assert target.weight.dtype == old.dtype
        assert torch.equal(target.weight, torch.where(mask, old, torch.zeros_like(old)))
        # The number of masked units, from the definition and not from the code's own count.
        if not sparsifier.context.is_shared:
            assert int((~units[target.name]).sum()) == math.floor(percent * units[target.name].size / 100 + 0.5)
    if sparsifier.context.is_shared:
        n = sum(u.size for u in units.values())
        assert sum(int((~u).sum()) for u in units.values()) == math.floor(percent * n / 100 + 0.5)
    for name, parameter in model.named_parameters():
        if name.startswith(("norm", "other")):
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("context", [*CONTEXTS, "2:4"])
@pytest.mark.parametrize("kind", plain.LAYERS)
def test_every_criterion_masks_exactly_what_a_plain_sort_does(kind, context, granularity):
    if is_refused(network(kind), granularity, context):
        with pytest.raises(GossamerError, match="layer 'a'") as error:
            Sparsifier(network(kind), granularity, context, layer_type=type(network(kind).a))
        assert any(word in str(error.value) for word in ("All that fit", "exclude")), "a remedy belongs to it"
        return
    fraction = as_context(context).fraction
    percent = 37.5 if fraction is None else float(100 * fraction)
    # Everything meets everything in the local context, but for criteria that take data: those take turns, as all do in
    # the other contexts, so that every two still meet.
    turn = list(GRANULARITIES).index(granularity) + list(plain.LAYERS).index(kind)
    if refused := refusal_of_shares(kind, granularity, context, percent):
        with pytest.raises(GossamerError, match=refused):
            sparsifier_of(network(kind), granularity, context, "magnitude").sparsify_model(percent)
        return
    for i, criterion in enumerate(CRITERIA):
        if (i + turn) % (8 if context != "local" else 4 if OF_DATA & set(CRITERIA[criterion].needs) else 1):
            continue
        model = network(kind)
        sparsifier = sparsifier_of(model, granularity, context, criterion)
        check(model, sparsifier, percent)


def refusal_of_shares(kind: str, granularity: str, context: str, percent: float) -> str | None:
    """Where the layers that uniform_plus leaves cannot make up for the one that it keeps dense."""
    model = network(kind)
    (first, second) = (la.n_units for la in Sparsifier(model, granularity, layer_type=type(model.a))._layers.values())
    goal = math.floor(percent * (first + second) / 100 + 0.5)
    is_conv = not isinstance(model.a, (nn.Linear, nn.Embedding))
    most = second if is_conv else first + math.floor(second * 4 / 5)
    return "'uniform_plus'.*use 'local' or 'erk'" if context == "uniform_plus" and goal > most else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [*CONTEXTS, *PATTERNS])
@pytest.mark.parametrize("kind", plain.LAYERS)
def test_every_dtype_is_exact(kind, context, dtype):
    fraction = as_context(context).fraction
    percent = 50 if fraction is None else float(100 * fraction)
    for granularity in GRANULARITIES:
        if is_refused(network(kind), granularity, context):
            continue
        if not refusal_of_shares(kind, granularity, context, percent):
            model = network(kind, dtype)
            sparsifier = sparsifier_of(model, granularity, context, "large_final")
            check(model, sparsifier, percent)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("context", [*CONTEXTS, "2:4"])
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


def linear_loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (out.flatten(1).sum(1) * y).sum()


# Sums over inputs come in another order in another layout, so that only whole numbers give the same bits.
@pytest.mark.parametrize("criterion", [n for n, c in CRITERIA.items() if not {"hessian_gradient"} & set(c.needs)])
@pytest.mark.parametrize("context", ["local", "global"])
def test_the_memory_layout_of_a_weight_makes_no_difference(context, criterion):
    """Moved step by step: what lies otherwise in memory takes the slow path, and must end at the same masks."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.Conv2d(6, 8, 3, bias=False)).to(memory_format=layout)
        for i in (0, 1):
            plain.set_integers(model[i].weight, seed=i)
        data = [(plain.input_for(nn.Conv2d(8, 6, 4)), torch.tensor([1.0, -1.0]))]
        sparsifier = Sparsifier(model, "weight", context, criterion, data=data, loss_func=linear_loss)
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


@pytest.mark.parametrize(
    "rules",
    [CRITERIA, GRANULARITIES, SCHEDULES, CONTEXTS, METHODS, REDUCTIONS, NORMALIZATIONS],
    ids=lambda r: r.kind,
)
def test_every_registered_rule_survives_pickle(rules) -> None:
    for name in rules:
        again = pickle.loads(pickle.dumps(rules[name]))
        assert again == rules[name], name
