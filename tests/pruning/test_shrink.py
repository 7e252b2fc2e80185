"""What is zero is taken out, and the outputs stay; what cannot go stays, and the report says why."""

from __future__ import annotations

import copy
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn

from gossamer import ArgumentError, Sparsifier, StateError, shrink, shrink_report
from gossamer.pruning.report import count_params

FILTERED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
# name → the share of parameters that may be left at most, once half of each layer's filters were masked
MASKED = {
    "resnet18": 0.47,
    "resnet50": 0.47,
    "mobilenet_v2": 0.33,
    "mobilenet_v3": 0.36,
    "efficientnet_b0": 0.36,
    "densenet121": 0.38,
    "vgg16_bn": 0.30,
    "convnext_tiny": 0.56,
    "vit_b_16": 0.68,
    "unet": 0.27,
}
# the same where only the weights are zero, and biases and shifts still give something
BARE = {"resnet18": 0.8, "mobilenet_v2": 0.4, "densenet121": 0.75, "efficientnet_b0": 0.6, "unet": 0.7}


def difference(a: nn.Module, b: nn.Module, like: torch.Tensor) -> float:
    batch = torch.randn(like.shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return float((a(batch) - b(batch)).abs().max())


def check_rows(masked: nn.Module, small: nn.Module, batch: torch.Tensor) -> None:
    report = shrink_report(masked, batch)
    assert report.params == count_params(small) < report.params_before == count_params(masked)
    for row in report.rows:
        layer = small.get_submodule(row.layer)
        assert row.kept == (layer.out_channels if hasattr(layer, "out_channels") else layer.out_features)
        assert row.why or row.removed == row.asked, row


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_network_gets_small_and_gives_the_same(name):
    model, batch = networks.make(name)
    Sparsifier(model, "filter", layer_type=FILTERED).sparsify_model(50)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small = shrink(model, batch)
    assert difference(model, small, batch) < 1e-4
    assert count_params(small) <= MASKED[name] * count_params(model)
    assert list(small.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    if name in ("resnet18", "mobilenet_v3", "unet"):
        check_rows(model, small, batch)


@pytest.mark.parametrize("name", BARE)
def test_what_biases_and_shifts_still_give_moves_on_to_the_next_layer(name):
    model, batch = networks.make(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight[torch.rand(len(module.weight), generator=generator) < 0.5] = 0
    small = shrink(model, batch)
    assert difference(model, small, batch) < 1e-4
    assert count_params(small) <= BARE[name] * count_params(model)
    if name in ("mobilenet_v2", "unet"):
        check_rows(model, small, batch)


def test_channels_that_a_residual_sum_joins_go_where_all_of_them_are_zero():
    model, batch = networks.make("resnet18")
    joined = ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    norms = ["bn1", "layer1.0.bn2", "layer1.1.bn2"]
    with torch.no_grad():
        for name in joined:
            model.get_submodule(name).weight[:10] = 0
        for name in norms:
            model.get_submodule(name).weight[:10] = model.get_submodule(name).bias[:10] = 0
        model.conv1.weight[10:20] = 0  # only there
    report = shrink_report(model, batch)
    assert [report[name].removed for name in joined] == [10, 10, 10]
    assert report["conv1"].why == (
        "its channels are joined with those of 'layer1.0.conv2', 'layer1.1.conv2', which are not zero there"
    )
    small = shrink(model, batch)
    assert difference(model, small, batch) < 1e-4
    assert small.layer2[0].downsample[0].in_channels == 54


def pair(bias: bool = True, padding: int = 0, mode: str = "zeros", norm: bool = False) -> nn.Sequential:
    """Two convolutions; the first filter of the first gives nothing but its bias, 3."""
    layers = [nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=padding, padding_mode=mode, bias=bias)]
    model = nn.Sequential(*layers, *([nn.BatchNorm2d(2)] if norm else [])).eval()
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0, 3
    return model


@pytest.mark.parametrize(
    ("model", "kept", "why"),
    [
        (pair(), 3, ""),
        (pair(bias=False, norm=True), 3, ""),
        (pair(padding=1, mode="circular"), 3, ""),
        (pair(bias=False), 4, "'2' reads a constant, and has neither a bias nor a BatchNorm to move it to"),
        (pair(padding=1), 4, "'2' reads a constant beside zero padding, which no bias can stand for"),
    ],
    ids=["bias", "norm", "circular", "nowhere", "padding"],
)
def test_a_constant_goes_where_it_is_exact_to_take_it_along(model, kept, why):
    batch = torch.rand(1, 1, 5, 5)
    row = shrink_report(model, batch)["0"]
    assert (row.asked, row.kept, row.why) == (1, kept, why)
    assert difference(model, shrink(model, batch), batch) < 1e-6


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.last = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.last(self.conv(x).mean(1, keepdim=True))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.last(self.conv(x)) / self.conv.out_channels


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize(
    ("model", "shape", "layer", "why"),
    [
        (Mean(), (1, 1, 4, 4), "conv", "what 'last' reads is made of its channels in a way that cannot be followed"),
        (Scaled(), (1, 1, 4, 4), "conv", "without it the outputs change, in a way that the graph does not show"),
        (Normed(), (2, 3), "first", "'norm' normalises over channels, so that one less would change the others"),
        (nn.Sequential(nn.Linear(3, 4)), (2, 3), "0", "its outputs are the network's"),
    ],
    ids=["mean", "scaled", "norm", "output"],
)
def test_what_cannot_go_stays_and_the_report_says_why(model, shape, layer, why):
    with torch.no_grad():
        model.get_submodule(layer).weight[:2] = 0
        model.get_submodule(layer).bias[:2] = 0
    batch = torch.rand(shape)
    row = shrink_report(model, batch)[layer]
    assert (row.asked, row.removed, row.why) == (2, 0, why)
    assert difference(model, shrink(model, batch), batch) == 0


def test_a_layer_keeps_one_filter():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    batch = torch.rand(1, 1, 3, 3)
    row = shrink_report(model, batch)["0"]
    assert (row.asked, row.kept, row.why) == (4, 1, "a layer keeps one filter at least")
    assert difference(model, shrink(model, batch), batch) < 1e-6


def test_groups_of_a_convolution_lose_as_many_each():
    model = nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), nn.Conv2d(8, 4, 1, groups=2), nn.Conv2d(4, 1, 1)).eval()
    with torch.no_grad():
        model[0].weight[[0, 1, 2, 7]] = 0  # three of the first group, one of the second
    batch = torch.rand(1, 1, 3, 3)
    row = shrink_report(model, batch)["0"]
    assert (row.asked, row.removed) == (4, 2)
    assert row.why == "each group of a convolution has to lose as many"
    small = shrink(model, batch)
    assert (small[1].in_channels, tuple(small[1].weight.shape)) == (6, (4, 3, 1, 1))
    assert difference(model, small, batch) < 1e-6


def test_a_product_with_zero_lets_its_other_factor_go():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 3, padding=1)

        def forward(self, x):
            return self.last(self.a(x) * torch.sigmoid(self.b(x)))

    model, batch = Gate().eval(), torch.rand(1, 1, 4, 4)
    with torch.no_grad():
        model.a.weight[:2] = model.a.bias[:2] = 0
    small = shrink(model, batch)
    assert (small.a.out_channels, small.b.out_channels, small.last.in_channels) == (2, 2, 2)
    assert difference(model, small, batch) < 1e-6
    assert shrink_report(model, batch)["b"].why == "goes with the channels of 'a'"
    with torch.no_grad():  # the other way round a channel is halved, and no constant
        model = Gate().eval()
        model.b.weight[:2] = model.b.bias[:2] = 0
    assert shrink(model, batch).b.out_channels == 4


def test_in_place_the_optimizer_goes_along_and_training_goes_on():
    model, batch = networks.make("unet")
    model.train()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(batch).square().mean().backward()
    adam.step()
    Sparsifier(model, "filter", layer_type=FILTERED).sparsify_model(50)
    parameters = list(model.parameters())
    assert shrink(model, batch, optimizer=adam, inplace=True) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(adam.state[p]["exp_avg"].shape == p.shape for p in parameters)
    assert model.training
    adam.zero_grad()
    model(batch).square().mean().backward()
    adam.step()


def test_dense_networks_stay_as_they_are():
    model, batch = networks.make("unet")
    small = shrink(model, batch)
    assert all(torch.equal(t, small.state_dict()[n]) for n, t in model.state_dict().items())


def test_an_image_is_guessed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=8)).eval()
    Sparsifier(model, "filter").sparsify_model(50)
    assert shrink(model)[0].out_channels == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: shrink(m, x, optimizer=torch.optim.SGD(m.parameters(), lr=1.0)), "add inplace=True"),
        (
            lambda m, x: shrink(m, x, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters()), inplace=True),
            "holds no parameter of",
        ),
        (lambda m, x: shrink(m, x[:, :2]), "does not run on example_inputs of shape"),
        (lambda m, x: shrink(m, "image"), "is a str; give a tensor"),
        (lambda m, x: shrink(m, [1, 2]), "holds no tensor"),
        (lambda m, x: shrink("net", x), "model must be a torch.nn.Module, got str"),
        (lambda m, x: shrink(nn.Sequential(nn.LazyConv2d(4, 3)), x), "is lazy and has no shape yet"),
        (lambda m, x: shrink(nn.Sequential(nn.Embedding(3, 3))), "cannot be guessed"),
    ],
)
def test_bad_input_is_refused(call, message):
    model, batch = networks.make("unet")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ArgumentError, StateError), match=message):
        call(model, batch)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class Shuffles(nn.Module):
    """Channels that a view shuffles, which torch-pruning does not follow: ShuffleNetV2's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, groups=24)
        self.branch = nn.Sequential(nn.Conv2d(48, 8, 1), nn.ReLU(), nn.Conv2d(8, 24, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = torch.cat([self.two(x), x[:, :, 1:-1, 1:-1]], 1)
        n, c, h, w = x.shape
        return self.branch(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w))


def test_channels_that_cannot_be_followed_name_a_way_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Shuffles().eval()
    with torch.no_grad():
        net.branch[0].weight[:3] = 0
        net.branch[0].bias[:3] = 0

    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    with monkeypatch.context() as patch:
        patch.setattr("torch_pruning.DependencyGraph.build_dependency", fails)
        with pytest.raises(ArgumentError, match=r"division by zero\), as where a view shuffles them; prune parts"):
            shrink(net, torch.randn(1, 3, 8, 8))
    assert shrink(net.branch, torch.randn(1, 48, 6, 6))[0].out_channels == 5
