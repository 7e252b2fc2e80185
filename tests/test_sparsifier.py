"""One shot: exact on every size, tie, dtype and device, and what peers get wrong (each such row is a test)."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn

import plain
from gossamer import (
    ArgumentError,
    Context,
    FileError,
    GossamerWarning,
    Granularity,
    SparseTraining,
    Sparsifier,
    TargetError,
)
from gossamer.rules.selection import _CHUNK

DEVICES = ["cpu"] + [
    d for d, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there
]


def linear(*shape: int) -> Sparsifier:
    return Sparsifier(nn.Linear(*reversed(shape), bias=False), layer_type=nn.Linear)


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "zeros"), [(1, 1), (2, 1), (4, 2), (5, 3), (10, 5)])
def test_half_of_a_few_weights_is_half_of_them(n, zeros):
    sparsifier = linear(1, n)
    sparsifier.sparsify_model(50)
    assert plain.zeros(sparsifier.model.weight) == zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("percent", [0, 1.2, 33.3, 50, 99.9, 100])
def test_constant_weights_are_masked_to_the_count(percent, dtype):
    layer = nn.Conv2d(4, 12, 3, bias=False).to(dtype)
    nn.init.constant_(layer.weight, 0.1)
    Sparsifier(layer).sparsify_model(percent)
    expected = math.floor(percent * 432 / 100 + 0.5)
    assert plain.zeros(layer.weight) == expected
    assert not layer.weight.flatten()[:expected].any(), "ties break by position, the first position first"


def test_integer_ties_are_masked_to_the_count():
    layer = nn.Linear(8, 9, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(72).view(9, 8) % 4 + 1)
    Sparsifier(layer, layer_type=nn.Linear).sparsify_model(37.5)
    assert plain.zeros(layer.weight) == 27


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("fill", ["normal", "equal", "two values", "half", "sparse already"])
def test_layers_of_more_than_a_chunk_are_exact(fill, context):
    model = nn.Sequential(nn.Linear(700, 800, bias=False), nn.Linear(800, 300, bias=False))
    assert model[0].weight.numel() > 2 * _CHUNK
    with torch.no_grad():
        for layer in model:
            if fill == "equal":
                layer.weight.fill_(0.5)
            elif fill == "two values":
                layer.weight.copy_(torch.randint(0, 2, layer.weight.shape))
            elif fill == "sparse already":
                layer.weight.mul_(torch.rand(layer.weight.shape) < 0.5)
    if fill == "half":
        model.half()
    scores = [layer.weight.detach().abs().float().numpy().ravel() for layer in model]
    sparsifier = Sparsifier(model, "weight", context, layer_type=nn.Linear)
    for percent in (20, 21, 73.21):  # the second by the first's hint
        thin = fill == "equal" and context == "global" and percent > 70
        with pytest.warns(GossamerWarning, match="nearly empty") if thin else contextlib.nullcontext():
            sparsifier.sparsify_model(percent)
        if context == "local":
            gone = [np.argsort(s, kind="stable")[: math.floor(percent * s.size / 100 + 0.5)] for s in scores]
        else:
            every = np.concatenate(scores)
            # Equal weights go layer by layer, but for one that the first layer keeps.
            order, n = np.argsort(every, kind="stable"), math.floor(percent * every.size / 100 + 0.5)
            if set(order[:n]) >= set(range(scores[0].size)):
                order = np.delete(order, np.flatnonzero(order < scores[0].size)[-1])
            lowest = order[:n]
            gone = [lowest[lowest < scores[0].size], lowest[lowest >= scores[0].size] - scores[0].size]
        for layer, name, here in zip(model, "01", gone, strict=True):
            assert np.array_equal(np.flatnonzero(~sparsifier.masks[name].numpy().ravel()), np.sort(here)), percent
            assert not layer.weight.detach().view(-1)[torch.from_numpy(here)].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("context", ["local", "global", "2:4"])
@pytest.mark.parametrize("granularity", ["weight", "kernel"])
def test_every_device_gives_the_masks_of_the_cpu(device, context, granularity):
    def masks_on(where: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)).to(where)
        sparsifier = Sparsifier(model, granularity, context)
        sparsifier.sparsify_model(50)
        assert all(m.device.type == where for m in sparsifier.masks.values())
        return sparsifier.masks.state_dict()

    expected, got = masks_on("cpu"), masks_on(device)
    assert all(torch.equal(expected[n], got[n].cpu()) for n in expected)


@pytest.mark.parametrize("context", ["local", "global"])
def test_weights_in_channels_last_are_masked_where_they_lie(context):
    torch.manual_seed(3)
    first = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 8, 3))
    second = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 8, 3))
    second.load_state_dict(first.state_dict())
    second = second.to(memory_format=torch.channels_last)
    for model in (first, second):
        sparsifier = Sparsifier(model, "weight", context)
        for percent in (30, 60):
            sparsifier.sparsify_model(percent)
    assert second[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert sum(plain.zeros(m.weight) for m in second) == round(0.6 * 2 * 432)


def test_nothing_but_exact_zero_is_written_and_nothing_else_touched():
    layer = nn.Linear(10, 10)
    before = layer.weight.detach().clone()
    bias = layer.bias.detach().clone()
    Sparsifier(layer, layer_type=nn.Linear).sparsify_model(50)
    gone = layer.weight == 0
    assert not torch.signbit(layer.weight[gone]).any(), "a product would leave -0"
    assert torch.equal(layer.weight[~gone], before[~gone])
    assert torch.equal(layer.bias, bias)
    assert float(before[gone].abs().max()) <= float(before[~gone].abs().min())


# -- which and how many -----------------------------------------------------------------------------------------------


def test_a_dict_names_layers_and_leaves_the_others_as_they_are():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    sparsifier = Sparsifier(model, layer_type=nn.Linear)
    sparsifier.sparsify_model({"0": 30, "[12]": 60})
    assert [r.zeros for r in sparsifier.report().rows] == [30, 60, 60]
    sparsifier.sparsify_model({"0": 40})
    assert [r.zeros for r in sparsifier.report().rows] == [40, 60, 60]


def test_one_layer_can_be_asked_for_by_name_or_itself():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    sparsifier = Sparsifier(model, layer_type=nn.Linear)
    sparsifier.sparsify_layer("1", 25)
    sparsifier.sparsify_layer(model[0], 10)
    assert [r.zeros for r in sparsifier.report().rows] == [10, 25]
    with pytest.raises(TargetError, match="0, 1"):
        sparsifier.sparsify_layer(nn.Linear(10, 10), 10)
    with pytest.raises(TargetError, match="0, 1"):
        sparsifier.sparsify_layer("2", 10)


@pytest.mark.parametrize("how", ["layer", "model", "dict"])
def test_a_target_of_nothing_masks_nothing(how):
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(4, 4)), layer_type=nn.Linear)
    sparsifier.sparsify_model(50)
    if how == "layer":
        sparsifier.sparsify_layer("0", 0)
    else:
        sparsifier.sparsify_model(0 if how == "model" else {"0": 0})
    assert sparsifier.masks.masked("0") == 0


def test_an_unknown_layer_is_an_error_that_names_the_closest_and_does_nothing():
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(2, 2, 3))
    before = model.conv1.weight.detach().clone()
    with pytest.raises(TargetError, match=r"'convv1'.*conv1"):
        Sparsifier(model).sparsify_model({"convv1": 50})
    assert torch.equal(model.conv1.weight, before)


def test_a_tied_weight_counts_once_and_stays_tied():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    sparsifier = Sparsifier(model, layer_type=(nn.Embedding, nn.Linear))
    sparsifier.sparsify_model(50)
    assert (sparsifier.report().params, sparsifier.report().zeros) == (40, 20)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("name", ["Conv3d", "Embedding"])
def test_layers_that_others_refuse_work(name):
    layer = plain.LAYERS[name]()
    Sparsifier(layer, layer_type=type(layer)).sparsify_model(50)
    assert plain.zeros(layer.weight) == layer.weight.numel() // 2


@pytest.mark.parametrize(
    ("percent", "round_to", "kept"), [(50, 8, 8), (40, 8, 8), (20, 8, 16), (100, 8, 8), (0, 8, 16), (60, 4, 8)]
)
@pytest.mark.filterwarnings("ignore:round_to=8 leaves every layer dense")
def test_kept_filters_are_rounded_to_the_nearest_multiple(percent, round_to, kept):
    conv = nn.Conv2d(3, 16, 3)
    Sparsifier(conv, "filter").sparsify_model(percent, round_to=round_to)
    assert int(conv.weight.detach().flatten(1).any(1).sum()) == kept


def test_in_a_global_context_each_layer_is_rounded():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3))
    Sparsifier(model, "filter", "global").sparsify_model(50, round_to=8)
    kept = [int(c.weight.detach().flatten(1).any(1).sum()) for c in model]
    assert all(k % 8 == 0 and k > 0 for k in kept)


def test_a_granularity_and_a_criterion_of_ones_own_work():
    conv = nn.Conv2d(2, 4, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(72.0).view(4, 2, 3, 3))
    Sparsifier(conv, Granularity("pairs", conv="ow"), criteria=lambda w: -w).sparsify_model(50)
    rows = conv.weight.detach().permute(1, 2, 0, 3).reshape(6, 12)
    assert rows.any(1).tolist() == [True] * 3 + [False] * 3, "the highest go by this criterion"


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "4:8"])
@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(16, 6), lambda: nn.Conv2d(8, 6, 3), lambda: nn.ConvTranspose2d(8, 6, 3)]
)
def test_every_block_keeps_n_of_m_inputs(layer, pattern):
    layer = layer()
    n, m = map(int, pattern.split(":"))
    Sparsifier(layer, "weight", pattern, layer_type=type(layer)).sparsify_model(100 * (m - n) / m)
    axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    blocks = layer.weight.detach().movedim(axis, -1).reshape(-1, m)
    assert (blocks != 0).sum(1).tolist() == [n] * len(blocks)


# -- filters and what dies with them ----------------------------------------------------------------------------------


class Crossed(nn.Module):
    """Registered conv1, conv2, bn1, bn2; each BatchNorm runs behind the other's namesake."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn1(self.conv2(torch.relu(self.bn2(self.conv1(x)))))


def test_each_norm_follows_the_filters_of_its_own_convolution():
    model = Crossed()
    for norm in (model.bn1, model.bn2):
        nn.init.ones_(norm.bias)
    Sparsifier(model, "filter").sparsify_model(50)
    for conv, norm in ((model.conv1, model.bn2), (model.conv2, model.bn1)):
        alive = conv.weight.detach().flatten(1).any(1)
        assert int(alive.sum()) == 4
        for companion in (conv.bias, norm.weight, norm.bias):
            assert torch.equal(companion != 0, alive)


def test_a_masked_filter_gives_a_channel_of_zeros():
    model = Crossed().train()
    Sparsifier(model, "filter").sparsify_model(50)
    for mode in (model.train(), model.eval()):
        out = mode(torch.randn(4, 1, 6, 6))
        dead = ~model.conv2.weight.detach().flatten(1).any(1)
        assert int(dead.sum()) == 4
        assert not out[:, dead].any()


@pytest.mark.parametrize("granularity", ["weight", "kernel", "channel", "layer"])
def test_other_granularities_leave_bias_and_norm_alone(granularity):
    model = Crossed()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "conv" not in n or "bias" in n}
    Sparsifier(model, granularity).sparsify_model(50)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_a_transposed_convolution_take_their_own_bias(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    Sparsifier(layer, "filter", layer_type=nn.ConvTranspose2d).sparsify_model(50)
    out = layer(torch.randn(2, 4, 5, 5)).detach()
    dead = layer.bias.detach() == 0
    assert int(dead.sum()) == 3
    assert not out[:, dead].any()


# -- said early and clearly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["movement", "movmag", "magnitude_increase", "updating_movement"])
def test_change_measured_on_unchanged_weights_is_exact_and_warned_about(criterion):
    layer = nn.Linear(10, 10)
    sparsifier = Sparsifier(layer, criteria=criterion, layer_type=nn.Linear)
    with pytest.warns(GossamerWarning, match=criterion) as warned:
        sparsifier.sparsify_model(50)
    assert plain.zeros(layer.weight) == 50
    assert not layer.weight[:5].any(), "the first positions"
    assert warned[0].filename == __file__, "the warning points at the user's line"


def test_no_warning_once_a_weight_has_changed():
    layer = nn.Linear(10, 10)
    sparsifier = Sparsifier(layer, criteria="movement", layer_type=nn.Linear)
    with torch.no_grad():
        layer.weight[0, 0] += 1
    sparsifier.sparsify_model(50)
    assert layer.weight[0, 0] != 0


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_weights_that_no_criterion_can_rank_are_refused(odd):
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[1, 1] = odd
    with pytest.raises(TargetError, match="nan or infinite"):
        Sparsifier(layer, layer_type=nn.Linear).sparsify_model(50)


@pytest.mark.parametrize(
    ("context", "sparsity"),
    [
        *((context, sparsity) for context in ("local", "output") for sparsity in (50, {"0": 50}, {"2": 50, "*": 25})),
        ("global", 50),
        ("global", {"2": 50, "*": 25}),
        ("2:4", 50),
    ],
    ids=str,
)
@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("criteria", ["large_final", "random", "large_init"])
@pytest.mark.parametrize("strides", ["as usual", "transposed"])
def test_weights_that_no_criterion_can_rank_are_named_before_any_mask_moves(strides, criteria, bad, context, sparsity):
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    if strides == "transposed":
        net[2].weight.data = net[2].weight.data.T
    sparsifier = Sparsifier(net, context=context, criteria=criteria, layer_type=nn.Linear)
    with torch.no_grad():
        net[bad].weight[7, 7] = math.inf
    before = [layer.weight.detach().clone() for layer in net]
    with pytest.raises(TargetError, match=f"layer '{bad}' has nan or infinite weights"):
        sparsifier.sparsify_model(sparsity)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(net, before, strict=True))
    assert all(bool(mask.all()) for mask in sparsifier.masks.values())


@pytest.mark.parametrize("masked", [True, False], ids=["under the mask", "kept"])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize("context", ["local", "global"])
def test_where_weights_are_refused_nothing_is_masked_again_either(context, granularity, masked):
    """As after loading a dense checkpoint in which something is wrong."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sparsifier = Sparsifier(net, granularity, context, layer_type=nn.Linear)
    sparsifier.sparsify_model(30)
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    with torch.no_grad():
        for layer in net:
            layer.weight.normal_()
        at = (masks["1"] != masked).nonzero()[0]
        net[1].weight[tuple(at)] = math.nan
    before = [layer.weight.detach().clone() for layer in net]
    with pytest.raises(TargetError, match="layer '1' has nan or infinite weights"):
        sparsifier.sparsify_model(70)
    assert all(torch.equal(a.weight.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(net, before, strict=True))
    assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("change", [lambda w: w.t().contiguous(), lambda w: w.reshape(-1)], ids=["turned", "flat"])
def test_a_weight_of_another_shape_than_its_mask_is_refused(change, context):
    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    sparsifier = Sparsifier(net, context=context, layer_type=nn.Linear)
    net[0].weight.data = change(net[0].weight.data)
    before = net[1].weight.detach().clone()
    with pytest.raises(TargetError, match="layer '0' has a weight of shape"):
        sparsifier.sparsify_model(70)
    assert torch.equal(net[1].weight, before)
    assert bool(net[0].weight.all())


@pytest.mark.parametrize(
    "arguments",
    [
        {"granularity": "wieght"},
        {"context": "glocal"},
        {"context": "4:2"},
        {"criteria": "large_finl"},
        {"criteria": 3},
        {"layer_type": nn.ReLU},
        {"layer_type": nn.Linear, "granularity": "kernel"},
        {"layer_type": nn.Embedding},
        {"exclude": ["nope"]},
        {"context": "2:4", "granularity": "filter"},
        {"context": "2:5"},
    ],
    ids=str,
)
def test_a_bad_argument_raises_in_the_constructor(arguments):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    with pytest.raises((ArgumentError, TargetError)):
        Sparsifier(model, **arguments)


@pytest.mark.parametrize(
    ("context", "sparsity", "round_to", "said"),
    [
        ("local", 101, None, "101"),
        ("local", -1, None, "-1"),
        ("global", {"0": 50}, None, "dict"),
        ("2:4", 60, None, "50"),
        ("2:4", 50, 4, "round_to"),
        ("local", 50, 0, "round_to=0"),
        ("local", 50, 2.5, "round_to=2.5"),
        ("local", 50, True, "round_to=True"),
        ("local", 50, 10_000, "round_to=10000"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused_and_changes_nothing(context, sparsity, round_to, said):
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    before = model[0].weight.detach().clone()
    with pytest.raises(ArgumentError, match=said):
        Sparsifier(model, "weight", context).sparsify_model(sparsity, round_to)
    assert torch.equal(model[0].weight, before)


def test_one_layer_cannot_compete_alone():
    with pytest.raises(ArgumentError, match="global"):
        Sparsifier(nn.Sequential(nn.Conv2d(4, 4, 3)), context="global").sparsify_layer("0", 50)


# -- the model stays the user's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_nothing_is_added_to_the_model(granularity):
    model = Crossed()
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    keys = list(model.state_dict())
    sparsifier = Sparsifier(model, granularity)
    sparsifier.sparsify_model(50)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_two_sparsifiers_share_nothing():
    first, second = linear(10, 10), linear(10, 10)
    first.sparsify_model(50)
    assert second.report().zeros == 0
    assert second.masks.masked("") == 0


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("criterion", ["large_final", "movement", "updating_movement", "random"])
def test_masks_and_evidence_come_back(criterion, context):
    def new() -> Sparsifier:
        torch.manual_seed(5)
        return Sparsifier(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), "weight", context, criterion, nn.Linear)

    first, second = new(), new()
    for s in (first, second):
        for target in s.targets:
            plain.set_integers(target.weight, seed=3)
    first.sparsify_model(30)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for s in (first, second):
        with torch.no_grad():
            for target in s.targets:
                target.weight.add_(torch.arange(81.0).view(9, 9) % 7)
        s.sparsify_model(60)
    assert all(torch.equal(first.masks[n], second.masks[n]) for n in first.masks)


def test_a_state_of_another_network_criterion_or_granularity_is_refused():
    state = Sparsifier(nn.Sequential(nn.Conv2d(4, 4, 3))).state_dict()
    with pytest.raises(FileError):
        Sparsifier(nn.Sequential(nn.Conv2d(4, 5, 3))).load_state_dict(state)
    with pytest.raises(FileError):
        Sparsifier(nn.Sequential(nn.Conv2d(4, 4, 3)), criteria="movement").load_state_dict(state)


def test_masks_that_cut_through_units_are_refused():
    weights = Sparsifier(nn.Sequential(nn.Conv2d(4, 4, 3)))
    weights.sparsify_model(50)
    with pytest.raises(FileError):
        Sparsifier(nn.Sequential(nn.Conv2d(4, 4, 3)), "filter").load_state_dict(weights.state_dict())


def test_release_lets_every_weight_grow_again():
    sparsifier = linear(10, 10)
    sparsifier.sparsify_model(50)
    sparsifier.release()
    with torch.no_grad():
        sparsifier.model.weight.fill_(1)
    sparsifier.apply()
    assert plain.zeros(sparsifier.model.weight) == 0
    sparsifier.sparsify_model(20)
    assert plain.zeros(sparsifier.model.weight) == 20


def test_apply_zeroes_what_has_come_back():
    sparsifier = linear(10, 10)
    sparsifier.sparsify_model(50)
    mask = sparsifier.masks[""].clone()
    with torch.no_grad():
        sparsifier.model.weight.add_(1)
    sparsifier.apply()
    assert torch.equal(sparsifier.model.weight != 0, mask)


def test_printing_prints_the_report(capsys):
    sparsifier = linear(4, 4)
    sparsifier.sparsify_model(50)
    sparsifier.print_sparsity()
    assert capsys.readouterr().out.strip() == str(sparsifier.report())


def test_one_layer_cannot_compete_alone_in_a_global_context():
    with pytest.raises(ArgumentError, match="sparsify_layer cannot make one layer compete"):
        Sparsifier(nn.Linear(4, 4), context="global", layer_type=nn.Linear).sparsify_layer("", 50)


def test_a_list_of_layer_types_is_as_good_as_a_tuple():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))
    assert len(Sparsifier(net, layer_type=[nn.Conv2d, nn.Linear]).targets) == 2


# -- contexts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Linear(64, 32), nn.Conv2d(64, 32, 3)], ids=["Linear", "Conv2d"])
def test_2_of_4_is_laid_out_as_torchs_semi_structured_tensors_want_it(layer):
    """A convolution as the matrix that NHWC kernels multiply with: the inputs last."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    layer = layer.half()
    Sparsifier(layer, context="2:4", layer_type=type(layer)).sparsify_model(50)
    weight = layer.weight.detach()
    matrix = weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).reshape(32, -1).contiguous()
    values, meta = conversions.sparse_semi_structured_from_dense_cutlass(matrix)
    assert values.numel() == matrix.numel() // 2
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(values, meta), matrix)


def test_n_of_n_is_dense():
    layer = nn.Linear(8, 4)
    Sparsifier(layer, context="4:4", layer_type=nn.Linear).sparsify_model(0)
    assert plain.zeros(layer.weight) == 0
    with pytest.raises(ArgumentError, match="masks 0 %"):
        Sparsifier(layer, context="4:4", layer_type=nn.Linear).sparsify_model(50)


def three() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 30), nn.Linear(30, 10))
    with torch.no_grad():
        for layer, scale in zip(model, (1.0, 0.01, 3.0), strict=True):
            layer.weight.mul_(scale)
    return model


@pytest.mark.parametrize("granularity", ["weight", "row"])
@pytest.mark.parametrize("steps", [1, 7])
def test_floor_and_ceiling_hold_and_the_count_is_exact(granularity, steps):
    model = three()
    sparsifier = Sparsifier(model, granularity, Context("global", floor=20, ceiling=70), layer_type=nn.Linear)
    for step in range(1, steps + 1):
        sparsifier.sparsify_model(50 - 3 * (steps - step))
    masked = [int((~sparsifier._layers.units(la)).sum()) for la in sparsifier._layers.values()]
    units = [la.n_units for la in sparsifier._layers.values()]
    assert sum(masked) == math.floor(sum(units) / 2 + 0.5)
    assert all(0.2 * n <= k <= 0.7 * n for k, n in zip(masked, units, strict=True))
    assert masked[1] == math.floor(0.7 * units[1]), "the layer of small weights gives all it may"


def test_no_layer_is_emptied_while_others_have_something_to_give():
    model = three()
    with pytest.warns(GossamerWarning, match="'1' keeps 1 of 600"):
        Sparsifier(model, context="global", layer_type=nn.Linear).sparsify_model(60)
    assert sum(plain.zeros(layer.weight) for layer in model) == 900
    Sparsifier(model, context="global", layer_type=nn.Linear).sparsify_model(100)
    assert sum(plain.zeros(layer.weight) for layer in model) == 1500


@pytest.mark.parametrize("round_to", [None, 3])
def test_other_layers_may_compete_the_next_time_for_as_many_units(round_to):
    model = nn.Sequential(*[nn.Linear(20, 20, bias=False) for _ in range(3)])
    sparsifier = Sparsifier(model, context="global", layer_type=nn.Linear)
    sparsifier.sparsify_model({"0": 30, "*": 80}, round_to)
    sparsifier.sparsify_model({"1": 90, "*": 80}, round_to)
    zeros = [plain.zeros(layer.weight) for layer in model]
    assert abs(zeros[0] + zeros[2] - 640) <= (0 if round_to is None else round_to)


def test_another_layer_may_be_frozen_the_next_time():
    model = nn.Sequential(*[nn.Linear(20, 20, bias=False) for _ in range(3)])
    sparsifier = Sparsifier(model, context="global", layer_type=nn.Linear, skip_frozen=True)
    for frozen in (0, 1):
        for i, layer in enumerate(model):
            layer.requires_grad_(i != frozen)
        sparsifier.sparsify_model(50)
        assert sum(plain.zeros(layer.weight) for i, layer in enumerate(model) if i != frozen) == 400


@pytest.mark.parametrize("context", ["global", "lamp", "erk", "uniform_plus"])
def test_a_dict_fixes_layers_and_a_star_is_for_the_others(context):
    model = three()
    sparsifier = Sparsifier(model, context=context, layer_type=nn.Linear)
    sparsifier.sparsify_model({"1": 25, "*": 70})
    zeros = [plain.zeros(layer.weight) for layer in model]
    assert zeros[1] == 150
    assert zeros[0] + zeros[2] == 630
    run = SparseTraining(
        Sparsifier(model := three(), context=context, layer_type=nn.Linear), None, {"1": 25, "*": 70}, "lin", 5
    )
    for _ in range(5):
        run.step()
    assert [plain.zeros(layer.weight) for layer in model] == zeros


@pytest.mark.parametrize("normalization", ["sum", "max", "mean", "gaussian", "lamp"])
def test_a_normalization_makes_layers_of_other_scales_alike(normalization):
    model = three()
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight.T * 0.01)
    rules = Sparsifier(model, context="global", normalization=normalization, layer_type=nn.Linear, exclude=["2"])
    rules.sparsify_model(50)
    assert [row.zeros for row in rules.report().rows] == [300, 300]


def test_lamp_is_the_papers_score():
    """Lee et al. 2021, eq. 4, over flattened weights sorted by magnitude, the lowest of all layers first."""
    model = three()
    every = []
    for i, layer in enumerate(model):
        weight = layer.weight.detach().double().flatten()
        order = weight.abs().argsort(stable=True)
        for place, j in enumerate(order.tolist()):
            every.append((float(weight[j] ** 2 / weight[order[place:]].square().sum()), i, j))
    gone = {(i, j) for _, i, j in sorted(every)[:900]}
    Sparsifier(model, context="lamp", layer_type=nn.Linear).sparsify_model(60)
    for i, layer in enumerate(model):
        expected = [(i, j) in gone for j in range(layer.weight.numel())]
        assert (layer.weight == 0).flatten().tolist() == expected


def test_a_reduction_decides_which_units_go():
    layer = nn.Linear(3, 2, bias=False)
    for reduction, gone in (("mean", 0), ("max", 1), ("sum", 0), ("l2", 1)):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[4.0, 0.5, 0.5], [2.0, 2.0, 1.5]]))
        Sparsifier(layer, "row", reduction=reduction, layer_type=nn.Linear).sparsify_model(50)
        assert not layer.weight[gone].any(), reduction
        assert layer.weight[1 - gone].all(), reduction
