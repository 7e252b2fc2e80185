"""Filters go for good: as many as asked, the right ones, with all that hangs on them; the optimizer goes along."""

from __future__ import annotations

import math
import pickle
from functools import partial

import fastai.optimizer
import networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from gossamer import (
    CRITERIA,
    ArgumentError,
    Context,
    FileError,
    Pruner,
    Sparsifier,
    StateError,
    TargetError,
    load_pruned,
)
from gossamer.evidence import OF_DATA
from gossamer.pruning.attention import FewerHeads, loosen
from gossamer.pruning.surgery import narrow
from gossamer.storage.states import load_state, save_state

LAYERS = (nn.Conv2d, nn.Linear)


def chain(width: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 1))


BATCH = torch.rand(2, 1, 5, 5)


@given(st.integers(2, 40), st.integers(0, 100))
def test_exactly_as_many_filters_go_as_asked(n, percent):
    model = chain(n)
    Pruner(model, percent, example_inputs=BATCH, exclude="3").prune_model()
    gone = min(math.floor(percent * n / 100 + 0.5), n - 1)
    assert model[0].out_channels == model[1].num_features == model[3].in_channels == n - gone
    assert model(BATCH).shape == (2, 3, 3, 3)


OF_WEIGHTS = [name for name, criterion in CRITERIA.items() if not OF_DATA & set(criterion.needs)]


@pytest.mark.parametrize("criterion", OF_WEIGHTS)
def test_the_same_filters_go_that_masks_would_zero(criterion):
    # Criteria of change have seen none yet, so that all tie and the first positions go.
    model = chain(16)
    twin = pickle.loads(pickle.dumps(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        sparsifier = Sparsifier(twin, "filter", criteria=criterion, exclude="3")
        sparsifier.sparsify_model(40)
        kept = sparsifier.masks["0"].flatten(1).any(1)
        rest = model[0].weight.detach()[kept]
        Pruner(model, 40, criteria=criterion, example_inputs=BATCH, exclude="3").prune_model()
    assert torch.equal(model[0].weight, rest)
    assert torch.equal(model[1].weight, twin[1].weight.detach()[kept].where(torch.tensor(True), torch.tensor(1.0)))


def test_joined_layers_are_judged_together():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return self.last(self.a(x) + self.b(x))

    model = Sum()
    with torch.no_grad():
        model.a.weight.copy_(torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1))
        model.b.weight.copy_(torch.tensor([9.0, 1, 1, 1]).view(4, 1, 1, 1))
    pruner = Pruner(model, {"a": 25}, example_inputs=BATCH)
    pruner.prune_model()  # judged by what was named: a
    assert model.a.weight.flatten().tolist() == [2, 3, 4]
    report = pruner.report()
    assert (report["b"].removed, report["b"].asked) == (1, 0)
    assert report["b"].why == "goes with the channels of 'a'"
    Pruner(model, 30, example_inputs=BATCH).prune_model()  # means 1.5, 2, 2.5
    assert model.a.weight.flatten().tolist() == [3, 4]
    report = Pruner(model, {"a": 0, "b": 100}, example_inputs=BATCH)
    report.prune_model()
    assert "which have another target" in report.report()["b"].why
    assert model.a.out_channels == 1


def test_the_whole_network_competes_in_a_global_context():
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(8.0).view(8, 1, 1, 1) + 0.5)
        model[1].weight.copy_((torch.arange(8.0).view(8, 1, 1, 1) + 100).expand(8, 8, 1, 1))
    Pruner(model, 25, "global", example_inputs=BATCH, exclude="2").prune_model()
    assert (model[0].out_channels, model[1].out_channels) == (4, 8)
    assert model[0].weight.flatten().tolist() == [4.5, 5.5, 6.5, 7.5]
    pruner = Pruner(model, 75, "global", example_inputs=BATCH, exclude="2")
    pruner.prune_model()
    assert (model[0].out_channels, model[1].out_channels) == (1, 2)  # 9 of 12, and one is left of each
    assert [r.removed for r in pruner.report().rows] == [3, 6]
    Pruner(model, 100, "global", example_inputs=BATCH, exclude="2").prune_model()
    assert (model[0].out_channels, model[1].out_channels) == (1, 1)


def test_round_to_keeps_multiples():
    model = chain(20)
    pruner = Pruner(model, 50, example_inputs=BATCH, round_to=8)
    pruner.prune_model()
    assert model[0].out_channels == 8
    row = pruner.report()["0"]
    assert (row.asked, row.removed, row.why) == (10, 12, "round_to=8")


def test_grouped_convolutions_and_normalisations_lose_as_many_from_each_block():
    model, batch = networks.Grouped(), torch.rand(1, 3, 8, 8)
    pruner = Pruner(model, 40, example_inputs=batch)
    pruner.prune_model()
    report = pruner.report()
    assert model.conv2.groups == 4
    assert (report["conv1"].asked, report["conv1"].removed) == (6, 4)
    assert (report["conv2"].asked, report["conv2"].removed) == (
        10,
        8,
    )  # 4 groups and 2, so 4 blocks; 16 is nearest to 14
    assert report["conv1"].why == "each of 4 blocks of channels has to lose as many"
    assert tuple(model.conv2.weight.shape) == (16, 3, 3, 3)
    assert report["conv3"].why == "its outputs are the network's"
    model(batch)


def test_halves_that_multiply_each_other_go_in_pairs():
    model, batch = networks.Gated(), torch.rand(1, 3, 4, 4)
    norms = model.conv1.weight.detach().abs().flatten(1).mean(1).view(2, 6).mean(0)
    kept = sorted(norms.argsort()[3:].tolist())
    weight = model.conv1.weight.detach().clone()
    Pruner(model, 50, example_inputs=batch).prune_model()
    assert torch.equal(model.conv1.weight, weight[kept + [k + 6 for k in kept]])
    assert model.conv2.in_channels == 3


@pytest.mark.parametrize("attention", [networks.Attention, networks.SelfAttention])
def test_heads_go_as_a_whole(attention):
    model, batch = networks.Transformer(attention), torch.rand(2, 5, 8)
    exclude = [n for n in ("embed", "fc2", "attention.proj", "attention.dense") if n in dict(model.named_modules())]
    pruner = Pruner(model, 50, example_inputs=batch, layer_type=nn.Linear, exclude=exclude)
    pruner.prune_model()
    part = model.attention
    assert getattr(part, "num_heads", getattr(part, "num_attention_heads", None)) == 2
    assert model.fc1.out_features == 16
    assert model(batch).shape == (2, 2)
    fresh = load_pruned(networks.Transformer(attention), model.state_dict())
    assert torch.equal(fresh(batch), model(batch))


def test_heads_of_pytorchs_own_attention_go_and_what_is_left_is_right():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            return self.last(self.attention(x, x, x, need_weights=False)[0])

    model, batch = Model().eval(), torch.rand(2, 5, 16)
    with torch.no_grad():  # heads 0 and 2 give nothing
        weight = model.attention.in_proj_weight.view(3, 4, 4, 16)
        weight[:, [0, 2]] *= 1e-3
        model.attention.out_proj.weight.view(16, 4, 4)[:, [0, 2]] = 0
        expected = model(batch)
    pruner = Pruner(model, 50, example_inputs=batch, layer_type=nn.MultiheadAttention)
    pruner.prune_model()
    assert pruner.report()["attention"].kept == model.attention.num_heads == 2
    torch.testing.assert_close(model(batch), expected)
    fresh = load_pruned(Model().eval(), model.state_dict())
    torch.testing.assert_close(fresh(batch), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_with_all_of_its_heads_is_pytorchs(batch_first, need_weights):
    own = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    q, k = torch.rand(3, 4, 8), torch.rand(3, 4, 8)
    n = 3 if batch_first else 4
    padding = torch.zeros(n, 7 - n, dtype=torch.bool)
    padding[0, -1] = True
    for options in ({}, {"attn_mask": torch.rand(7 - n, 7 - n)}, {"key_padding_mask": padding}):
        expected = own(q, k, k, need_weights=need_weights, **options)
        twin = pickle.loads(pickle.dumps(own))
        loosen(twin)
        assert isinstance(twin, FewerHeads)
        given = twin(q, k, k, need_weights=need_weights, **options)
        torch.testing.assert_close(given[0], expected[0])
        assert (given[1] is None) == (expected[1] is None)
        if need_weights:
            torch.testing.assert_close(given[1], expected[1])
    torch.testing.assert_close(twin(q[0], k[0], k[0])[0], own(q[0], k[0], k[0])[0])


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.Adafactor, partial(torch.optim.SGD, momentum=0.9)])
def test_the_optimizer_remembers_what_it_knew_of_the_filters_that_stay(make):
    model = chain(8)
    optimizer = make(model.parameters())
    groups = [list(g["params"]) for g in optimizer.param_groups]
    model(BATCH).square().sum().backward()
    optimizer.step()
    scores = model[0].weight.detach().abs().flatten(1).mean(1)
    kept = scores.argsort(stable=True)[4:].sort().values
    before = {
        n: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v) and v.ndim}
        for n, p in model.named_parameters()
    }
    old = model(BATCH)  # its graph is alive all the while
    Pruner(model, 50, example_inputs=BATCH, optimizer=optimizer).prune_model()
    for name, parameter in model.named_parameters():
        for key, value in before[name].items():
            axis = 1 if name == "3.weight" else 0
            expected = value if name == "3.bias" else value.index_select(axis, kept)
            assert torch.equal(optimizer.state[parameter][key], expected), (name, key)
    assert all(
        a is b for g, h in zip(optimizer.param_groups, groups, strict=True) for a, b in zip(g["params"], h, strict=True)
    )
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    optimizer.zero_grad()
    model(BATCH).square().sum().backward()
    optimizer.step()
    assert old.shape == (2, 3, 3, 3)


@pytest.mark.parametrize("axis", [0, 1])
def test_what_an_optimizer_keeps_of_rows_and_columns_is_cut_along(axis):
    p = nn.Parameter(torch.rand(4, 3))
    optimizer = torch.optim.Adafactor([p])
    p.square().sum().backward()
    optimizer.step()
    rows, columns = (optimizer.state[p][k].clone() for k in ("row_var", "col_var"))
    narrow(p, lambda t: t.narrow(axis, 1, 1), optimizer)
    assert torch.equal(optimizer.state[p]["row_var"], rows[1:2] if axis == 0 else rows)
    assert torch.equal(optimizer.state[p]["col_var"], columns[:, 1:2] if axis == 1 else columns)
    optimizer.step()


def test_a_tensor_that_is_cut_forgets_its_graph():
    p = nn.Parameter(torch.ones(4))
    alive = (p * 2).sum()
    narrow(p, lambda t: t[:2])
    (p * 3).sum().backward()
    assert p.grad.tolist() == [3, 3]
    assert alive.item() == 8


def test_step_by_step_filters_go_along_the_schedule_and_end_at_the_target():
    torch.manual_seed(0)
    model = chain(20)
    adam = torch.optim.Adam(model.parameters())
    pruner = Pruner(model, 50, criteria="movement", example_inputs=BATCH, schedule="lin", total_steps=5, optimizer=adam)
    widths = []
    for _ in range(6):
        adam.zero_grad()
        model(BATCH).square().sum().backward()
        adam.step()
        pruner.step()
        widths.append(model[0].out_channels)
    assert widths == [18, 16, 14, 12, 10, 10]
    assert pruner.report()["0"].asked == 10


def test_a_schedule_that_comes_down_again_brings_nothing_back():
    model = chain(20)
    pruner = Pruner(model, 50, example_inputs=BATCH, schedule="dsd", total_steps=4)
    widths = [(pruner.step(), model[0].out_channels)[1] for _ in range(4)]
    assert widths == [15, 10, 10, 10]


def test_a_run_goes_on_from_its_state(tmp_path):
    def begin():
        torch.manual_seed(0)
        model = chain(12)
        options = {"criteria": "movmag", "schedule": "lin", "total_steps": 4, "example_inputs": BATCH}
        return model, Pruner(model, 50, **options)

    def train(model, pruner, steps):
        for i in range(steps):
            with torch.no_grad():
                for j, p in enumerate(model.parameters()):
                    p += 0.1 * torch.sin(torch.arange(p.numel(), dtype=torch.float) * (i + j + 1)).view(p.shape)
            pruner.step()

    model, pruner = begin()
    train(model, pruner, 2)
    save_state(tmp_path / "run.safetensors", {"run": pruner.state_dict(), "model": model.state_dict()})
    train(model, pruner, 2)
    other, resumed = begin()
    state = load_state(tmp_path / "run.safetensors")
    resumed.load_state_dict(state["run"])
    other.load_state_dict(state["model"])
    train(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other[0].out_channels == 6
    with pytest.raises(FileError, match="another network"):
        Pruner(chain(9), 50, example_inputs=BATCH).load_state_dict(state["run"])
    with pytest.raises(FileError, match="version 7"):
        resumed.load_state_dict({"version": 7})


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3", "densenet121", "convnext_tiny", "unet"])
def test_known_networks_lose_half_of_every_layer_and_come_back_from_their_weights(name):
    model, batch = networks.make(name)
    pruner = Pruner(model, 50, example_inputs=batch)
    assert pruner.prune_model() is model
    report = pruner.report()
    assert all(r.removed == math.floor(r.filters / 2 + 0.5) for r in report.rows if r.type == "Conv2d" and not r.why)
    assert {r.layer for r in report.rows if r.why and r.asked} <= {"head"}
    assert report.params < 0.75 * report.params_before
    assert report.macs < 0.6 * report.macs_before
    torch.manual_seed(1)
    fresh = load_pruned(networks.NETWORKS[name][0]().eval(), model.state_dict())
    assert torch.equal(fresh(batch), model(batch))


def test_a_vision_transformer_loses_heads_and_hidden_units():
    torch.manual_seed(0)
    model = VisionTransformer(image_size=32, patch_size=16, num_layers=4, num_heads=12, hidden_dim=768, mlp_dim=3072)
    batch = torch.rand(2, 3, 32, 32)
    pruner = Pruner(model, 50, example_inputs=batch, layer_type=(nn.Linear, nn.MultiheadAttention))
    pruner.prune_model()
    report = pruner.report()
    assert report["encoder.layers.encoder_layer_3.self_attention"].kept == 6
    assert report["encoder.layers.encoder_layer_3.mlp.0"].kept == 1536
    left = report["encoder.layers.encoder_layer_3.mlp.3"]
    assert (left.kept, left.why[:44]) == (768, "the network does not run with fewer channels")
    assert model(batch).shape == (2, 1000)


def foreign(make):
    """An optimizer of another network."""
    return make(list(nn.Linear(2, 1).parameters()), lr=0.1)


def test_an_optimizer_of_another_network_does_not_take_the_place_of_the_own():
    model = chain()
    own = torch.optim.SGD(model.parameters())
    pruner = Pruner(model, 50, example_inputs=BATCH, optimizer=own)
    with pytest.raises(ArgumentError, match="holds no parameter of Sequential"):
        pruner.optimizer = foreign(torch.optim.SGD)
    assert pruner.optimizer is own


@pytest.mark.parametrize("make", [torch.optim.SGD, fastai.optimizer.SGD, fastai.optimizer.ranger])
def test_an_optimizer_of_a_part_of_the_network_will_do(make):
    model = chain()
    optimizer = make(list(model[0].parameters()), lr=0.1)
    assert Pruner(model, 50, example_inputs=BATCH, optimizer=optimizer).optimizer is optimizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 101}, "outside \\[0, 100\\]"),
        ({"sparsity": {"conv9": 50}}, "no layer is called 'conv9'"),
        ({"sparsity": {}}, "is an empty dict"),
        ({"context": "2:4"}, "is for weights"),
        ({"context": "output"}, "is for weights"),
        ({"context": "erk", "sparsity": {"0": 50}}, "takes one sparsity"),
        ({"context": Context("global", ceiling=40)}, "lies outside floor=0 and ceiling=40"),
        ({"context": "global", "sparsity": {"0": 50}}, "takes one sparsity"),
        ({"criteria": "magnitud"}, "unknown criterion"),
        ({"schedule": "cosine"}, "unknown schedule"),
        ({"round_to": 0}, "no positive integer"),
        ({"layer_type": nn.Embedding}, "has entries and no filters"),
        ({"layer_type": nn.ReLU}, "has no weight"),
        ({"layer_type": nn.Conv3d}, "no Conv3d layer of Sequential takes part"),
        ({"exclude": "*"}, "leaves no layer to prune"),
        ({"exclude": "9"}, "no layer is called '9'"),
        ({"example_inputs": torch.rand(1, 2, 5, 5)}, "does not run on example_inputs"),
        ({"example_inputs": {"x": 1}}, "is a dict"),
        ({"example_inputs": torch.rand(0, 1, 5, 5)}, "hold nothing"),
        ({"optimizer": "adam"}, "adam"),
        ({"optimizer": foreign(torch.optim.Adam)}, "a Adam, holds no parameter of Sequential"),
        ({"optimizer": foreign(fastai.optimizer.Adam)}, "holds no parameter of Sequential"),
        ({"optimizer": foreign(partial(fastai.optimizer.OptimWrapper, opt=torch.optim.SGD))}, "a SGD, holds no"),
        ({"optimizer": foreign(fastai.optimizer.ranger)}, "holds no parameter of Sequential"),
        ({"optimizer": foreign(torch.optim.LBFGS)}, "as one row"),
        ({"total_steps": 0}, "no positive integer"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(options, message):
    model = chain()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((ArgumentError, TargetError), match=message):
        Pruner(model, **{"sparsity": 50, "example_inputs": BATCH, **options})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_without_a_position_needs_to_know_the_steps():
    with pytest.raises(StateError, match="give total_steps"):
        Pruner(chain(), 50, example_inputs=BATCH).step()


def test_shared_weights_stay_and_the_report_says_why():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.last(F.relu(self.b(F.relu(self.a(x)))))

    model = Tied()
    pruner = Pruner(model, 50, example_inputs=torch.rand(2, 4), layer_type=nn.Linear)
    pruner.prune_model()
    assert pruner.report()["a"].why == "'a' shares a weight: 'a', 'b'"
    assert model.a.out_features == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), "'0.bias' is missing there"),
        (lambda s: s.update({"9": torch.ones(1)}), "'9' is not in this network"),
        (lambda s: s.update({"0.bias": torch.ones(99)}), "pruning makes shapes smaller only"),
    ],
)
def test_weights_of_another_network_are_refused(change, message):
    state = chain().state_dict()
    change(state)
    with pytest.raises(FileError, match=message):
        load_pruned(chain(), state)
    with pytest.raises(ArgumentError, match="Module, got"):
        load_pruned("net", state)


def test_the_report_speaks(capsys):
    model = chain(8)
    pruner = Pruner(model, 50, example_inputs=BATCH)
    pruner.prune_model()
    report = pruner.report()
    text = str(report)
    assert "0                    Conv2d                      8        4            4        4" in text
    assert "its outputs are the network's" in text
    assert "Parameters: 123 → 63 (51.2 %)" in text
    assert report.to_dict()["layers"][0]["removed"] == 4
    assert "<td>Conv2d</td>" in report._repr_html_()
    assert list(report.to_dataframe()["kept"]) == [4, 3]
    assert [r.layer for r in report.left] == ["3"]
    with pytest.raises(TargetError, match="no layer is called '7'"):
        report["7"]
    assert capsys.readouterr().out == ""
