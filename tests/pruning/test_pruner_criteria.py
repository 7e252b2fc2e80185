"""Filters go by what a criterion looks at: weights, their past, gradients, activations; nothing else is disturbed."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import warnings

import networks
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer import CRITERIA, ArgumentError, GossamerWarning, Pruner, Sparsifier, TargetError
from gossamer.calibration import Calibration
from gossamer.evidence import OF_DATA
from gossamer.pruning.counting import fraction_of
from gossamer.rules.allocation import Context
from gossamer.rules.schedules import SCHEDULES

OF_DATA_NAMES = [name for name, criterion in CRITERIA.items() if OF_DATA & set(criterion.needs)]


class Block(nn.Module):
    """A stem, a depthwise convolution, and a residual sum over both; normalised everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.deep, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.wide, self.norm3 = nn.Conv2d(12, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.back, self.norm4 = nn.Conv2d(20, 12, 1), nn.BatchNorm2d(12)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(12, 3)

    def forward(self, x):
        x = F.relu(self.norm1(self.stem(x)))
        x = F.relu(self.norm2(self.deep(x)))
        x = x + self.norm4(self.back(F.relu(self.norm3(self.wide(x)))))
        return self.head(self.drop(F.relu(x).mean((2, 3))))


def block() -> Block:
    torch.manual_seed(0)
    return networks.seasoned(Block()).train()


def batches(n: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 1, 6, 6, generator=generator), torch.tensor([0, 1, 2, 1])) for _ in range(n)]


LOSS = nn.CrossEntropyLoss()
X = batches()[0][0]


def state_of(model: nn.Module) -> tuple[list[bool], list[torch.Tensor | None], int, list[torch.Tensor]]:
    modes = [m.training for m in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return modes, grads, hooks, [b.clone() for b in model.buffers()]


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():  # criteria of change have seen none, and say so
        warnings.simplefilter("ignore", GossamerWarning)
        yield


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_by_every_criterion_exactly_as_many_filters_go_and_nothing_is_disturbed(criterion, context):
    model = block()
    LOSS(model(X), batches()[0][1]).backward()
    before = state_of(model)
    model.deep.weight.requires_grad_(False)
    numbers = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    optimizer = torch.optim.Adam(model.parameters())
    options = {"data": batches(), "loss_func": LOSS, "example_inputs": X, "optimizer": optimizer}
    with no_warnings():
        pruner = Pruner(model, 40, context, criterion, **options)
        pruner.prune_model()
    kept = {name: len(getattr(model, name).weight) for name in ("stem", "deep", "wide", "back")}
    assert kept["stem"] == kept["deep"] == kept["back"] == model.head.in_features
    gone = 12 - kept["stem"] + 20 - kept["wide"]
    assert gone == (5 + 8 if context == "local" else math.floor(32 * 0.4 + 0.5))
    if context == "local":
        assert (kept["stem"], kept["wide"]) == (7, 12)
    modes, grads, hooks, buffers = state_of(model)
    assert (modes, hooks) == (before[0], before[2])
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == numbers[1:]
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not model.deep.weight.requires_grad
    # Gradients and statistics are those of before, less what went.
    for then, now, parameter in zip(before[1], grads, model.parameters(), strict=True):
        assert now.shape == parameter.shape
        assert set(now.flatten().tolist()) <= set(then.flatten().tolist())
    for then, now in zip(before[3], buffers, strict=True):
        assert set(now.flatten().tolist()) <= set(then.flatten().tolist())
    assert model(X).shape == (4, 3)
    assert not pruner.evidence._gathered


@pytest.mark.parametrize("criterion", OF_DATA_NAMES)
def test_the_same_filters_go_that_masks_would_zero(criterion):
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 4), nn.Flatten())
    twin, options = copy.deepcopy(model), {"data": batches(), "loss_func": LOSS}
    sparsifier = Sparsifier(twin, "filter", criteria=criterion, exclude="3", **options)
    sparsifier.sparsify_model(40)
    kept = sparsifier.masks["0"].flatten(1).any(1)
    rest = model[0].weight.detach()[kept]
    Pruner(model, 40, criteria=criterion, example_inputs=X, exclude="3", **options).prune_model()
    assert torch.equal(model[0].weight, rest)


def test_taylor_is_what_autograd_says_of_the_network():
    model = block()
    twin = copy.deepcopy(model)
    layers = twin.stem, twin.deep, twin.back
    model.drop.p = twin.drop.p = 0.0
    # One score a channel: the mean of |w·∂L/∂w| over the weights of the three filters that are joined in it.
    grads = [torch.autograd.grad(LOSS(twin(x), y), [m.weight for m in layers]) for x, y in batches()]
    parts = [(m.weight * (a + b) / 2).abs().flatten(1) for m, a, b in zip(layers, *grads, strict=True)]
    scores = sum(p.sum(1) for p in parts) / sum(p.shape[1] for p in parts)
    kept = scores.argsort()[3:].sort().values
    rest = model.stem.weight.detach()[kept], model.deep.weight.detach()[kept]
    Pruner(model, 25, "local", "taylor", X, exclude="wide", data=batches(), loss_func=LOSS).prune_model()
    assert torch.equal(model.stem.weight, rest[0])
    assert torch.equal(model.deep.weight, rest[1])


def test_wanda_is_what_the_layers_read():
    model = block()
    twin, seen = copy.deepcopy(model).eval(), []
    handle = twin.wide.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for x, _ in batches():
        twin(x)
    handle.remove()
    # ‖x‖ of what each of the kernel's nine places sees, over all batches and positions.
    x = torch.cat(seen)
    columns = F.unfold(x, 3, padding=1)
    norms = columns.square().sum((0, 2)).sqrt()
    scores = (twin.wide.weight.abs().flatten(1) * norms).mean(1)
    kept = scores.argsort()[10:].sort().values
    rest = model.wide.weight.detach()[kept]
    Pruner(model, {"wide": 50}, "local", "wanda", X, data=batches()).prune_model()
    assert torch.equal(model.wide.weight, rest)


def test_evidence_is_of_the_network_as_it_is_and_gathered_only_when_filters_go():
    model, passes = block(), []

    class Counted:
        def __iter__(self):
            passes.append((len(model.stem.weight), len(model.wide.weight)))
            return iter(batches())

    for context, expected in [("local", 3), ("global", 3)]:
        model, passes = block(), []
        pruner = Pruner(model, 50, context, "taylor", X, schedule="lin", total_steps=40, data=Counted(), loss_func=LOSS)
        assert not passes
        went = sum(pruner.step() for _ in range(40))
        assert len(passes) == went >= expected  # once each time, and not at steps where no filter is due
        assert passes == sorted(passes, reverse=True)
        assert passes[0] == (12, 20)
        assert passes[-1] != (12, 20)
        assert went < 40


def test_a_schedule_that_moves_every_few_steps_is_followed():
    model = block()
    pruner = Pruner(model, 50, example_inputs=X, schedule=SCHEDULES["lin"].every(4), total_steps=10)
    widths = []
    for _ in range(10):
        pruner.step()
        widths.append(len(model.wide.weight))
    assert widths == [20, 20, 20, 16, 16, 16, 16, 12, 12, 10]


def test_synaptic_flow_in_many_rounds_is_not_that_of_one():
    one, many, context = block(), block(), Context("global", normalization="sum")
    Pruner(one, 70, context, "synflow", X, data=X).prune_model()
    pruner = Pruner(many, 70, context, "synflow", X, data=X)
    pruner.prune_model(iterations=20)
    gone = [sum(r.removed for r in pruner.report().rows if r.layer in ("stem", "wide"))]
    assert gone == [math.floor(32 * 0.7 + 0.5)]
    assert abs(len(one.stem.weight) - len(one.wide.weight)) > abs(len(many.stem.weight) - len(many.wide.weight))
    for bad in (0, True, 1.5):
        with pytest.raises(ArgumentError, match="iterations="):
            pruner.prune_model(iterations=bad)


@pytest.mark.parametrize("iterations", [2, 7])
def test_rounds_end_exactly_at_the_targets_of_each_layer(iterations):
    model = block()
    Pruner(model, {"wide": 35, "stem": 25, "deep": 25, "back": 25}, example_inputs=X).prune_model(iterations)
    assert (len(model.wide.weight), len(model.stem.weight)) == (13, 9)


def test_gradients_over_the_steps_are_added_up_and_cut_along():
    model = block()
    model.drop.p = 0.0
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruner(model, 25, "local", "sanh_movement", X, optimizer=sgd, exclude="wide")
    total = [torch.zeros_like(m.weight) for m in (model.stem, model.deep, model.back)]
    for x, y in batches():
        sgd.zero_grad()
        LOSS(model(x), y).backward()
        for t, m in zip(total, (model.stem, model.deep, model.back), strict=True):
            t -= m.weight.detach() * m.weight.grad
        sgd.step()
    scores = sum(t.flatten(1).sum(1) for t in total) / sum(t[0].numel() for t in total)
    kept = scores.argsort()[3:].sort().values
    rest = model.stem.weight.detach()[kept]
    pruner.prune_model()
    assert torch.equal(model.stem.weight, rest)
    torch.testing.assert_close(pruner.evidence.kept["accumulated"]["stem"], total[0][kept])


def test_criteria_of_change_that_have_seen_none_say_so():
    with pytest.warns(GossamerWarning, match=r"'movement' measures change, and .* the first filters go"):
        Pruner(block(), 50, criteria="movement", example_inputs=X).prune_model()


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "grasp", "synflow"])
def test_heads_go_by_gradients(criterion):
    torch.manual_seed(0)
    model, x, y = Heads(), torch.randn(4, 5, 16), torch.tensor([0, 1, 2, 0])
    options = {"layer_type": nn.MultiheadAttention, "data": (x, y), "loss_func": LOSS}
    if criterion == "taylor":
        weight = model.attention.in_proj_weight
        (gradient,) = torch.autograd.grad(LOSS(model(x), y), weight)
        scores = (weight * gradient).abs().view(3, 4, -1).mean((0, 2))
        rest = weight.detach().view(3, 4, 4, 16)[:, scores.argsort()[2:].sort().values]
    pruner = Pruner(model, 25, criteria=criterion, example_inputs=x, **options)
    pruner.prune_model()
    assert model.attention.num_heads == 3
    pruner = Pruner(model, 33, criteria=criterion, example_inputs=x, **options)
    pruner.prune_model()  # of one that has lost heads already
    assert (model.attention.num_heads, model(x).shape) == (2, (4, 3))
    if criterion == "taylor":
        torch.manual_seed(0)
        model = Heads()
        Pruner(model, 50, criteria=criterion, example_inputs=x, **options).prune_model()
        assert torch.equal(model.attention.in_proj_weight, rest.reshape(24, 16))


def test_heads_have_no_inputs_of_their_own():
    x = torch.randn(4, 5, 16)
    with pytest.raises(ArgumentError, match=r"'attention' is an attention, which reads queries.*such as 'taylor'"):
        Pruner(Heads(), 25, criteria="wanda", example_inputs=x, layer_type=nn.MultiheadAttention, data=x)


def test_a_part_is_judged_by_the_loss_of_the_whole():
    torch.manual_seed(0)
    part = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    whole = nn.Sequential(part, nn.Flatten(), nn.Linear(16, 3))
    data = Calibration(whole, batches(), LOSS)
    gradients = [torch.autograd.grad(LOSS(whole(x), y), part[0].weight)[0] for x, y in batches()]
    scores = (part[0].weight * sum(gradients) / 2).abs().flatten(1).mean(1)
    rest = part[0].weight.detach()[scores.argsort()[4:].sort().values]
    Pruner(part, 50, criteria="taylor", example_inputs=X, data=data).prune_model()
    assert torch.equal(part[0].weight, rest)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"criteria": "taylor"}, ArgumentError, "which takes data; give data=.* and loss_func="),
        ({"criteria": "taylor", "data": batches()}, ArgumentError, "give loss_func="),
        ({"criteria": "wanda"}, ArgumentError, "give data=, batches of inputs$"),
        ({"loss_func": LOSS}, ArgumentError, "loss_func without data"),
        ({"criteria": "wanda", "data": 3}, ArgumentError, "is no batch"),
    ],
)
def test_data_that_is_not_there_is_an_error_before_anything_changes(options, error, message):
    model = block()
    with pytest.raises(error, match=message):
        Pruner(model, 50, example_inputs=X, **options)
    assert len(model.wide.weight) == 20


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "no batch in it"), ([X], "without a target"), ([(X * torch.inf, torch.tensor([0, 1, 2, 1]))], "nan or inf")],
)
def test_data_that_is_no_use_is_an_error_and_nothing_goes(data, message):
    model = block()
    pruner = Pruner(model, 50, criteria="taylor", example_inputs=X, data=data, loss_func=LOSS)
    with pytest.raises((ArgumentError, TargetError), match=message):
        pruner.prune_model()
    assert (len(model.wide.weight), pruner.progress, model.training) == (20, 0.0, True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), block().parameters(), strict=True))


def test_weights_that_are_nan_are_an_error_and_nothing_goes():
    model = block()
    with torch.no_grad():
        model.wide.weight[0, 0] = torch.nan
    with pytest.raises(TargetError, match="'wide' has nan"):
        Pruner(model, 50, example_inputs=X)
    model = block()
    pruner = Pruner(model, 50, example_inputs=X)
    with torch.no_grad():
        model.back.weight[0, 0] = torch.nan
    with pytest.raises(TargetError, match="'back' has nan"):
        pruner.prune_model()
    assert len(model.wide.weight) == 20


# -- contexts ----------------------------------------------------------------------------------------------------------


def slanted() -> nn.Sequential:
    """A network whose last layer has much the smallest weights."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 20, 3), nn.ReLU(), nn.Conv2d(20, 20, 1), nn.ReLU(), nn.Conv2d(20, 40, 1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Conv2d(40, 2, 1))
    with torch.no_grad():
        net[4].weight *= 1e-3
    return net


def widths(net: nn.Sequential) -> list[int]:
    return [net[i].out_channels for i in (0, 2, 4)]


def test_a_layer_that_is_left_with_next_to_nothing_is_named_and_a_ceiling_bounds_it():
    net = slanted()
    with pytest.warns(GossamerWarning, match=r"nearly empty: '4' keeps 1 of 40 filters; .*ceiling=75"):
        Pruner(net, 50, "global", example_inputs=X, exclude="6").prune_model()
    assert widths(net)[2] == 1
    assert sum(widths(net)) == 40
    for context, least in ((Context("global", ceiling=75), 10), (Context("global", ceiling=60), 16)):
        net = slanted()
        Pruner(net, 50, context, example_inputs=X, exclude="6").prune_model()
        assert widths(net)[2] == least
        assert sum(widths(net)) == 40


def test_a_floor_takes_from_every_layer():
    net = slanted()
    Pruner(net, 50, Context("global", floor=30, ceiling=90), example_inputs=X, exclude="6").prune_model()
    assert max(widths(net)[:2]) <= 14
    assert sum(widths(net)) == 40


def test_scores_are_made_comparable_as_the_context_says():
    plain, mean, lamp = slanted(), slanted(), slanted()
    Pruner(mean, 50, Context("global", normalization="mean"), example_inputs=X, exclude="6").prune_model()
    Pruner(lamp, 50, "lamp", example_inputs=X, exclude="6").prune_model()
    assert sum(widths(mean)) == sum(widths(lamp)) == 40
    assert widths(mean)[2] > 10
    assert widths(lamp)[2] > 10
    # The same counts as masks of whole filters have.
    for net, context in ((mean, Context("global", normalization="mean")), (lamp, "lamp")):
        twin = copy.deepcopy(plain)
        sparsifier = Sparsifier(twin, "filter", context, exclude="6")
        sparsifier.sparsify_model(50)
        assert [int(sparsifier.masks[str(i)].flatten(1).any(1).sum()) for i in (0, 2, 4)] == widths(net)


@pytest.mark.parametrize("context", ["er", "erk", "uniform_plus"])
def test_layers_get_their_shares_by_shape_as_masks_of_whole_filters_do(context):
    net = slanted()
    twin = copy.deepcopy(net)
    sparsifier = Sparsifier(twin, "filter", context, exclude="6")
    sparsifier.sparsify_model(40)
    pruner = Pruner(net, 40, context, example_inputs=X, exclude="6")
    pruner.prune_model()
    kept = [sparsifier.masks[str(i)].flatten(1).any(1) for i in (0, 2, 4)]
    assert widths(net) == [int(k.sum()) for k in kept]
    assert sum(widths(net)) == 48
    assert all(row.asked == row.removed for row in pruner.report().rows)
    assert torch.equal(net[0].weight, slanted()[0].weight[kept[0]])


def test_joined_layers_have_one_share():
    pruner = Pruner(block(), 50, "erk", example_inputs=X)
    pruner.prune_model()
    stem = next(g for g in pruner.groups if "stem" in g.layers)
    assert {pruner.targets[n] for n in stem.layers} == {fraction_of(stem, pruner.targets)}
    assert 12 + 20 - len(pruner.model.stem.weight) - len(pruner.model.wide.weight) == 16


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_are_added_up_know_no_loss_scale_and_no_overflow(fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=100)
    x = torch.randn(16, 8)
    pruner = Pruner(model, 50, "local", "sanh_movement", x, optimizer=optimizer, layer_type=nn.Linear)
    total = torch.zeros(8, 8)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean() * (math.inf if step == 2 else 1)).backward()
        if step != 2:
            total -= model[0].weight.detach() * model[0].weight.grad / scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
    assert torch.allclose(pruner.evidence.kept["accumulated"]["0"], total, rtol=1e-4, atol=1e-7)
