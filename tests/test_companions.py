"""What dies with a filter? Found in the graph; and looking for it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer import GossamerWarning, Sparsifier
from gossamer.companions import find_companions


def found(model: nn.Module, *names: str) -> dict[str, list[str]]:
    """Names of the layers → names of the parameters that die with them."""
    known = {id(p): n for n, p in model.named_parameters()}
    result = find_companions(model, {n: model.get_submodule(n) for n in names})
    return {layer: [known[id(p)] for p in parameters] for layer, parameters in result.items()}


class Crossed(nn.Module):
    """Registered in the order conv1, conv2, bn1, bn2; run in another."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Swapped(Crossed):
    def forward(self, x):
        return self.bn1(self.conv2(F.relu(self.bn2(self.conv1(x)))))


def test_a_norm_belongs_to_the_convolution_that_feeds_it_not_to_the_next_registered():
    assert found(Crossed(), "conv1", "conv2") == {
        "conv1": ["conv1.bias", "bn1.weight", "bn1.bias"],
        "conv2": ["bn2.weight", "bn2.bias"],
    }
    assert found(Swapped(), "conv1", "conv2") == {
        "conv1": ["conv1.bias", "bn2.weight", "bn2.bias"],
        "conv2": ["bn1.weight", "bn1.bias"],
    }


def test_activations_and_dropout_do_not_hide_a_norm():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(), nn.GroupNorm(2, 4))
    assert found(model, "0") == {"0": ["0.bias", "3.weight", "3.bias"]}


def test_what_mixes_channels_or_places_hides_a_norm():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert found(model, "0") == {"0": ["0.bias"]}
    assert found(nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.BatchNorm1d(4)), "0") == {"0": ["0.bias"]}


def test_a_norm_without_parameters_has_none_that_die():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False))
    assert found(model, "0") == {"0": []}


def test_a_norm_that_several_layers_feed_is_left_alone():
    class Shared(Crossed):
        def forward(self, x):
            return self.bn1(self.conv2(self.bn1(self.conv1(x))))

    assert found(Shared(), "conv1", "conv2") == {"conv1": ["conv1.bias"], "conv2": []}


def test_a_norm_that_also_sees_something_else_is_left_alone():
    class Residual(Crossed):
        def forward(self, x):
            y = self.bn1(self.conv1(x))
            return self.bn1(x + y)

    assert found(Residual(), "conv1") == {"conv1": ["conv1.bias"]}


def test_a_norm_behind_a_sum_is_left_alone():
    class Sum(Crossed):
        def forward(self, x):
            return self.bn1(self.conv1(x) + x)

    assert found(Sum(), "conv1") == {"conv1": ["conv1.bias"]}


def test_a_part_that_cannot_be_traced_does_not_hide_the_others():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            if x.sum() > 0:
                raise ValueError
            return self.head(self.body(x).mean((2, 3)))

    assert found(Untraceable(), "body.0", "head") == {
        "body.0": ["body.0.bias", "body.1.weight", "body.1.bias"],
        "head": ["head.bias"],
    }


def test_a_layer_alone_has_its_bias():
    assert found(nn.Conv2d(1, 4, 3), "") == {"": ["bias"]}


class Talkative(nn.Module):
    """A forward that leaves traces of its own: an activation kept, a counter, a buffer, random numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.calls, self.seen = 0, []
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        self.features = self.conv(x)
        self.seen.append(self.features)
        return self.bn(self.features) + torch.rand(1)


def test_looking_leaves_no_trace_on_a_model_whose_forward_keeps_things():
    model = Talkative()
    attributes, buffers = set(vars(model)), set(model.state_dict())
    random_numbers = torch.get_rng_state()
    assert found(model, "conv") == {"conv": ["conv.bias", "bn.weight", "bn.bias"]}
    assert set(vars(model)) == attributes
    assert set(model.state_dict()) == buffers
    assert (model.calls, len(model.seen), float(model.steps)) == (0, 0, 0.0)
    assert torch.equal(torch.get_rng_state(), random_numbers)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(F.max_pool2d(F.leaky_relu(self.conv(x)), 2))


class Undecided(Functional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "between", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.PReLU(), nn.Mish(), nn.Upsample(scale_factor=2)]
)
def test_a_norm_is_found_behind_whatever_leaves_channels_in_their_place(between: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), between, nn.BatchNorm2d(4))
    found = find_companions(net, {"0": net[0]})["0"]
    assert [id(p) for p in found] == [id(p) for p in (net[0].bias, net[2].weight, net[2].bias)]


def test_a_norm_is_found_behind_functions_too() -> None:
    net = Functional()
    assert len(find_companions(net, {"conv": net.conv})["conv"]) == 3


def test_a_model_that_cannot_be_traced_is_said_to_keep_its_norms() -> None:
    net = Undecided()
    with pytest.warns(GossamerWarning, match="Undecided cannot be traced"):
        found = find_companions(net, {"conv": net.conv})
    assert [id(p) for p in found["conv"]] == [id(net.conv.bias)]


def test_every_user_of_a_shared_weight_falls_silent() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net[2].weight = net[0].weight
    Sparsifier(net, "filter").sparsify_model(50)
    dead = (net[0].weight == 0).flatten(1).all(1)
    assert int(dead.sum()) == 2
    for parameter in (net[0].bias, net[1].weight, net[1].bias, net[2].bias, net[3].weight, net[3].bias):
        assert not parameter[dead].any()
