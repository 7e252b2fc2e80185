"""SparseGPT: masks and weights are those of the optimal brain surgeon's formula, with every inverse written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plain
from gossamer import ArgumentError, SparseTraining, Sparsifier, TargetError
from gossamer.reconstruction import solve, sparsegpt
from gossamer.rules.allocation import as_context


def surgeon(weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Hassibi & Stork 1993, eq. 5, in float64: columns one by one, the inverse of what is left each time anew."""
    weight, hessian = weight.double().clone(), hessian.double()
    for row, keep in zip(weight, kept, strict=True):
        for j in range(len(row)):
            if not keep[j]:
                inverse = torch.linalg.inv(hessian[j:, j:])
                row[j:] -= row[j] / inverse[0, 0] * inverse[:, 0]
                row[j] = 0
    return weight


def saliencies(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """w_j² / [H⁻¹]_jj, the inverse of what is left at column j."""
    left = [torch.linalg.inv(hessian.double()[j:, j:])[0, 0] for j in range(len(hessian))]
    return weight.double().square() / torch.stack(left)


def layer_8x8() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(200, 8) @ torch.randn(8, 8)
    return torch.randn(8, 8), x.T @ x / 200


@pytest.mark.parametrize("percent", [25, 50, 70])
def test_an_8x8_layer_is_what_the_formula_gives(percent):
    weight, hessian = layer_8x8()
    masked = math.floor(percent * 64 / 100 + 0.5)
    damped = hessian + 1e-6 * hessian.diagonal().mean() * torch.eye(8)
    found, kept = solve(weight[None], hessian[None], masked, as_context("local"), 8, damping=1e-6)
    expected = plain.mask(saliencies(weight, damped).flatten().tolist(), [True] * 64, masked)
    assert kept.flatten().tolist() == expected
    assert torch.allclose(found[0].double(), surgeon(weight, damped, kept[0]), rtol=1e-3, atol=1e-3)
    assert not found[~kept].any()


@pytest.mark.parametrize(("block", "groups"), [(8, 1), (4, 1), (3, 1), (1, 1), (4, 2)])
def test_blocks_of_columns_make_no_difference_to_the_weights(block, groups):
    """Lazy updates are the same updates: against the formula, with whatever masks the blocks chose."""
    weight, hessian = layer_8x8()
    weights, hessians = torch.stack([weight, weight.flip(0) * 2][:groups]), torch.stack([hessian, hessian + 1][:groups])
    found, kept = solve(weights, hessians, 27 * groups, as_context("local"), block, damping=1e-6)
    assert int((~kept).sum()) == 27 * groups
    for i in range(groups):
        damped = hessians[i] + 1e-6 * hessians[i].diagonal().mean() * torch.eye(8)
        assert torch.allclose(found[i].double(), surgeon(weights[i], damped, kept[i]), rtol=1e-3, atol=1e-3)


def test_a_pattern_is_chosen_block_by_block_with_the_weights_as_they_have_become():
    weight, hessian = layer_8x8()
    damped = hessian + 1e-6 * hessian.diagonal().mean() * torch.eye(8)
    found, kept = solve(weight[None], hessian[None], 32, as_context("2:4"), damping=1e-6)
    first = saliencies(weight, damped)[:, :4]
    assert kept[0, :, :4].tolist() == [plain.mask(row, [True] * 4, 2) for row in first.tolist()]
    half = surgeon(weight, damped, torch.cat([kept[0, :, :4], torch.ones(8, 4, dtype=torch.bool)], 1))
    second = saliencies(half, damped)[:, 4:]
    assert kept[0, :, 4:].tolist() == [plain.mask(row, [True] * 4, 2) for row in second.tolist()]
    assert torch.allclose(found[0].double(), surgeon(weight, damped, kept[0]), rtol=1e-3, atol=1e-3)


def test_each_row_gives_its_share_where_outputs_compete():
    weight, hessian = layer_8x8()
    _, kept = solve(weight[None], hessian[None], 40, as_context("output"), 8)
    assert (kept.sum(2) == 3).all()


def trained(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A layer and inputs that are not alike, as after other layers."""
    torch.manual_seed(0)
    if kind == "Linear":
        return nn.Linear(24, 16), torch.randn(400, 24) @ torch.randn(24, 24)
    layer = {
        "Conv2d": nn.Conv2d(8, 12, 3, padding=1),
        "Conv2d grouped": nn.Conv2d(8, 12, 3, groups=2, stride=2),
        "Conv2d depthwise": nn.Conv2d(8, 8, 3, groups=8, padding=1),
        "Conv1d": nn.Conv1d(8, 12, 5, dilation=2),
        "Conv3d": nn.Conv3d(8, 4, (1, 2, 3)),
    }[kind]
    x = torch.randn(16, 8, *[12 if layer.weight.ndim < 5 else 6] * (layer.weight.ndim - 2))
    return layer, torch.einsum("ij,nj...->ni...", torch.randn(8, 8), x)


KINDS = ["Linear", "Conv2d", "Conv2d grouped", "Conv2d depthwise", "Conv1d", "Conv3d"]


@pytest.mark.parametrize("context", ["local", "2:4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_stays_closer_than_with_wanda_or_magnitude(kind, context):
    layer, x = trained(kind)
    if context == "2:4" and kind == "Conv2d depthwise":
        return
    errors = {}
    for how in ("magnitude", "wanda", "sparsegpt"):
        twin = copy.deepcopy(layer)
        rules = Sparsifier(
            twin, context=context, criteria=how.replace("sparsegpt", "wanda"), layer_type=type(layer), data=x
        )
        sparsegpt(rules, 50) if how == "sparsegpt" else rules.sparsify_model(50)
        n = layer.weight.numel()
        assert plain.zeros(twin.weight) == math.floor(n / 2 + 0.5)
        assert torch.equal(twin.weight != 0, rules.masks[""])
        if context == "2:4":
            assert ((twin.weight != 0).movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()
        errors[how] = float((twin(x) - layer(x)).detach().square().mean())
    # Where a filter sees one channel of white noise, there is nothing that could make up for a weight.
    much = 1.0 if kind == "Conv2d depthwise" else 0.9
    assert errors["sparsegpt"] < much * min(errors["wanda"], errors["magnitude"])


@pytest.mark.parametrize("context", ["local", "output"])
@pytest.mark.parametrize("columns", [64, 256])
def test_blocks_of_the_usual_size_beat_wanda_on_wide_layers_too(columns, context):
    errors = {"wanda": 0.0, "sparsegpt": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        layer = nn.Linear(columns, 32, bias=False)
        x = torch.randn(1000, columns) @ torch.randn(columns, columns) * (torch.rand(columns) + 0.1)
        for how in errors:
            twin = copy.deepcopy(layer)
            sparsifier = Sparsifier(twin, context=context, criteria="wanda", layer_type=nn.Linear, data=x)
            sparsegpt(sparsifier, 50) if how == "sparsegpt" else sparsifier.sparsify_model(50)
            errors[how] += float((twin(x) - layer(x)).detach().square().sum())
    assert errors["sparsegpt"] < errors["wanda"]


def test_later_layers_see_what_earlier_ones_have_become():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    x = torch.randn(300, 12)
    twin = copy.deepcopy(model)
    sparsegpt(Sparsifier(model, layer_type=nn.Linear, data=x), 50)
    sparsegpt(Sparsifier(twin[0], layer_type=nn.Linear, data=x), 50)
    assert torch.equal(twin[0].weight, model[0].weight)
    with torch.no_grad():
        seen = F.relu(twin[0](x))
    sparsegpt(Sparsifier(twin[2], layer_type=nn.Linear, data=seen), 50)
    assert torch.allclose(twin[2].weight, model[2].weight, atol=1e-5)


def test_the_masks_are_the_sparsifiers_own_and_training_goes_on_from_them():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(100, 12)
    rules = Sparsifier(model, layer_type=nn.Linear, data=x)
    surface = plain.surface(model)
    sparsegpt(rules, {"0": 50, "2": 75})
    assert plain.surface(model) == surface
    assert [r.zeros for r in rules.report().rows] == [96, 48]
    masks = {n: m.clone() for n, m in rules.masks.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    run = SparseTraining(rules := Sparsifier(model, layer_type=nn.Linear), optimizer, 80, "lin", 4)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        run.step()
        assert not any((rules.masks[n] & ~m).any() for n, m in masks.items())
    assert [r.zeros for r in run.report().rows] == [154, 51]


def test_inputs_that_are_always_zero_and_few_samples_are_no_obstacle():
    layer, x = nn.Linear(16, 8), torch.randn(100, 16)
    x[:, :4] = 0
    sparsegpt(Sparsifier(copy.deepcopy(layer), layer_type=nn.Linear, data=x[:3]), 50)
    sparsegpt(Sparsifier(layer, layer_type=nn.Linear, data=x), 50)
    assert plain.zeros(layer.weight) == 64
    assert torch.isfinite(layer.weight).all()
    assert not layer.weight[:, :4].any(), "what nothing depends on goes first"
    sparsegpt(Sparsifier(dead := nn.Linear(8, 8), layer_type=nn.Linear, data=torch.zeros(3, 8)), 50)
    assert plain.zeros(dead.weight) == 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_solved_in_float32(dtype):
    layer, x = trained("Linear")
    layer, x = layer.to(dtype), x.to(dtype)
    sparsegpt(Sparsifier(layer, layer_type=nn.Linear, data=x), 50)
    assert layer.weight.dtype == dtype
    assert plain.zeros(layer.weight) == 192


X = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda m: sparsegpt(m, 50), ArgumentError, "wrap it"),
        (lambda m: sparsegpt(Sparsifier(m, layer_type=nn.Linear), 50), ArgumentError, "data="),
        (lambda m: sparsegpt(rules(m, granularity="row"), 50), ArgumentError, "'row'"),
        (lambda m: sparsegpt(rules(m, context="global"), 50), ArgumentError, "'global'"),
        (lambda m: sparsegpt(rules(m, context="lamp"), 50), ArgumentError, "'lamp'"),
        (lambda m: sparsegpt(rules(m), 50, block_size=0), ArgumentError, "block_size=0"),
        (lambda m: sparsegpt(rules(m, context="2:4"), 50, block_size=6), ArgumentError, "block_size=6"),
        (lambda m: sparsegpt(rules(m), 50, damping=0), ArgumentError, "damping=0"),
        (lambda m: sparsegpt(rules(m), 101), ArgumentError, "101"),
        (lambda m: sparsegpt(rules(m, data=X * math.nan), 50), TargetError, "nan"),
        (lambda m: (made := rules(m), sparsegpt(made, 50), sparsegpt(made, 60)), ArgumentError, "masks already"),
        (
            lambda m: sparsegpt(Sparsifier(nn.ConvTranspose1d(8, 4, 1), layer_type=nn.ConvTranspose1d, data=X.T), 50),
            TargetError,
            "ConvTranspose1d",
        ),
    ],
)
def test_what_cannot_be_solved_is_refused(make, error, said):
    with pytest.raises(error, match=said):
        make(nn.Linear(8, 4))


def test_a_layer_that_the_data_does_not_reach_is_named_before_another_is_changed():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    before = model["used"].weight.detach().clone()
    with pytest.raises(TargetError, match=r"'other' is not reached.*exclude"):
        sparsegpt(rules(model), 50)
    assert torch.equal(model["used"].weight, before)


def test_frozen_layers_are_left_alone_where_they_are_to_be_skipped():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    sparsegpt(rules(model, skip_frozen=True), 50)
    assert torch.equal(model[0].weight, before)
    assert plain.zeros(model[1].weight) == 32
    sparsegpt(rules(model), {"0": 50})
    assert plain.zeros(model[0].weight) == 32


def rules(model: nn.Module, **arguments) -> Sparsifier:
    return Sparsifier(model, **{"layer_type": nn.Linear, "data": X, **arguments})
