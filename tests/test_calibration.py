"""Evidence of data: the numbers are those of a few lines of autograd, and the network is afterwards as it was."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plain
from gossamer import CRITERIA, ArgumentError, GossamerWarning, Sparsifier, TargetError
from gossamer.calibration import Calibration
from gossamer.gathering import gather
from gossamer.layer_inputs import patches
from gossamer.rules.criteria import OF_DATA, OF_LOSS
from gossamer.targets import AXES, find_targets

LAYERS = (nn.Conv2d, nn.Linear)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.bn(self.conv(x)).tanh().flatten(1)))


def batches(n: int = 3, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(n)
    ]


def net(mode: str = "train") -> Net:
    torch.manual_seed(0)
    model = Net().train(mode == "train")
    model.drop.p = 0.0
    return model


def evidence(model: nn.Module, kind: str, data: object = None, layer_type: object = LAYERS) -> dict[str, torch.Tensor]:
    calibration = Calibration(model, batches() if data is None else data, nn.CrossEntropyLoss())
    return gather(calibration, find_targets(model, layer_type), [kind])[kind]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_gradient_is_the_mean_over_the_batches(mode):
    model = net(mode)
    found = evidence(model, "gradient")
    twin = copy.deepcopy(model)
    for x, y in batches():
        (F.cross_entropy(twin(x), y) / 3).backward()
    assert torch.allclose(found["conv"], twin.conv.weight.grad, rtol=1e-4, atol=1e-7)
    assert torch.allclose(found["head"], twin.head.weight.grad, rtol=1e-4, atol=1e-7)


def test_snip_is_the_derivative_by_a_mask_of_ones():
    """Lee et al. 2019, eq. 4: |∂L(c ⊙ w)/∂c| at c = 1, over the sum of all."""
    model = net("eval")
    masks = {n: torch.ones_like(getattr(model, n).weight, requires_grad=True) for n in ("conv", "head")}
    loss = 0
    for x, y in batches():
        out = F.conv2d(x, model.conv.weight * masks["conv"], model.conv.bias)
        out = F.linear(model.bn(out).tanh().flatten(1), model.head.weight * masks["head"], model.head.bias)
        loss = loss + F.cross_entropy(out, y) / 3
    grads = dict(zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True))
    every = torch.cat([grads["conv"].flatten(), grads["head"].flatten()]).abs()
    threshold = every.sort().values[math.floor(0.7 * every.numel() + 0.5)]  # of the first that stays
    sparsifier = Sparsifier(
        model, context="global", criteria="snip", layer_type=LAYERS, data=batches(), loss_func=nn.CrossEntropyLoss()
    )
    sparsifier.sparsify_model(70)
    for name, grad in grads.items():
        assert torch.equal(sparsifier.masks[name], grad.abs() >= threshold), name


def test_grasp_is_the_hessian_times_the_gradient():
    """Wang et al. 2020, eq. 8, with the Hessian written out whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    data = [(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])), (torch.randn(5, 3), torch.tensor([1, 1, 0, 0, 1]))]

    def loss_of(flat: torch.Tensor) -> torch.Tensor:
        first, second = flat[:6].view(2, 3), flat[6:].view(2, 2)
        return sum(
            F.cross_entropy(F.linear(F.linear(x, first, model[0].bias).tanh(), second, model[2].bias), y)
            for x, y in data
        ) / len(data)

    flat = torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()])
    hessian = torch.autograd.functional.hessian(loss_of, flat)
    gradient = torch.autograd.functional.jacobian(loss_of, flat)
    expected = flat * (hessian @ gradient)
    sparsifier = Sparsifier(model, criteria="grasp", layer_type=nn.Linear, data=data, loss_func=nn.CrossEntropyLoss())
    scores = torch.cat([sparsifier._layers.scores(la).flatten() for la in sparsifier._layers.values()])
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-7)


def test_synflow_is_the_flow_of_ones_through_magnitudes():
    """Tanaka et al. 2020, eq. 2 for a network of two layers: R = 1ᵀ |W₂| |W₁| 1, written out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    first, second = (model[i].weight.detach().abs() for i in (0, 2))
    sparsifier = Sparsifier(model, criteria="synflow", layer_type=nn.Linear, data=torch.randn(7, 3))
    scores = {n: sparsifier._layers.scores(la) for n, la in sparsifier._layers.items()}
    assert torch.allclose(scores["0"].float(), first * second.sum(0)[:, None])
    assert torch.allclose(scores["2"].float(), second * first.sum(1)[None, :])
    # Each layer carries the whole flow: its scores sum to R.
    assert float(scores["0"].sum()) == pytest.approx(float(scores["2"].sum()))


def test_iterations_score_anew_each_time_so_that_no_layer_collapses():
    """Tanaka et al. 2020, section 6: at once, a layer is emptied; in many rounds, the flow is shared out anew."""

    def masks(iterations: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 10, bias=False))
        own = Sparsifier(model, context="global", criteria="synflow", layer_type=nn.Linear, data=torch.ones(1, 20))
        own.sparsify_model(95, iterations=iterations)
        assert sum(plain.zeros(model[i].weight) for i in (0, 2)) == 855
        return list(own.masks.values())

    with pytest.warns(GossamerWarning, match="'0' keeps 1 of 600"):
        masks(1)
    assert min(int(m.sum()) for m in masks(20)) > 5


def test_fisher_is_the_mean_square_of_the_single_gradients():
    model = net("eval")
    found = evidence(model, "gradient_squared")
    expected = torch.zeros_like(model.conv.weight)
    for x, y in batches():
        for i in range(len(x)):
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), [model.conv.weight])
            expected += grad**2 / 12
    assert torch.allclose(found["conv"], expected, rtol=1e-4)


CONVS = {
    "plain": lambda: nn.Conv2d(4, 6, (2, 3)),
    "strided, dilated": lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), dilation=(1, 2)),
    "padded": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2)),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2),
    "3d": lambda: nn.Conv3d(4, 6, (1, 2, 3)),
}


@pytest.mark.parametrize("name", CONVS)
def test_a_convolutions_inputs_are_those_that_each_weight_sees(name):
    """By one-hot weights: with a single 1 in the kernel, the output is what that weight is multiplied with."""
    torch.manual_seed(0)
    layer = CONVS[name]()
    x = torch.randn(2, 4, *[9] * (layer.weight.ndim - 2))
    found = {k: evidence(layer, k, x, type(layer))[""] for k in ("input_norm", "input_mean", "input_max")}
    columns = patches(layer, x)
    assert columns.shape[0] == layer.groups
    for index in torch.cartesian_prod(*[torch.arange(n) for n in layer.weight.shape]).tolist()[::7]:
        probe = copy.deepcopy(layer)
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        with torch.no_grad():
            probe.weight[tuple(index)] = 1
            seen = probe(x)[:, index[0]]
        at = tuple(index)
        assert float(found["input_norm"][at]) == pytest.approx(float(seen.norm()), rel=1e-5)
        assert float(found["input_mean"][at]) == pytest.approx(float(seen.abs().mean()), rel=1e-5)
        assert float(found["input_max"][at]) == pytest.approx(float(seen.abs().max()), rel=1e-5)
        group, place = index[0] // (layer.out_channels // layer.groups), layer.weight[0, 0].numel()
        tap = int(np.ravel_multi_index(index[2:], layer.kernel_size))
        column = columns[group, :, tap * layer.weight.shape[1] + index[1]]
        assert place * layer.weight.shape[1] == columns.shape[2]
        assert torch.allclose(column.sort().values, seen.flatten().sort().values)


def test_a_linear_layers_inputs_may_have_any_number_of_axes():
    layer = nn.Linear(5, 3)
    x = torch.randn(2, 7, 5)
    assert torch.allclose(evidence(layer, "input_norm", x, nn.Linear)[""][1], x.flatten(0, 1).norm(dim=0))
    assert torch.allclose(
        evidence(layer, "input_norm", [(x[:1],), (x[1:],)], nn.Linear)[""],
        evidence(layer, "input_norm", x, nn.Linear)[""],
    )


def test_what_an_embedding_sees_are_its_entries():
    layer = nn.Embedding(4, 2)
    tokens = torch.tensor([[0, 1, 1], [1, 3, 1]])
    assert evidence(layer, "input_norm", tokens, nn.Embedding)[""].tolist() == [[1, 1], [2, 2], [0, 0], [1, 1]]
    assert evidence(layer, "input_mean", tokens, nn.Embedding)[""][1].tolist() == pytest.approx([4 / 6] * 2)
    assert evidence(layer, "input_max", tokens, nn.Embedding)[""][2].tolist() == [0, 0]


def test_a_layer_that_is_used_twice_sees_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)
            self.two = nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(self.one(x)))

    model, x = Twice(), torch.randn(4, 3)
    first = model.one(x)
    expected = torch.cat([x, first, model.one(first)]).norm(dim=0)
    assert torch.allclose(evidence(model, "input_norm", x, nn.Linear)["one"][0], expected)
    assert evidence(model, "flow", x, nn.Linear)["one"].shape == (3, 3)


def test_wanda_competes_inside_each_output():
    """Sun et al. 2024, section 3: |W| · ‖X‖₂, the lowest of every row go."""
    torch.manual_seed(0)
    layer, x = nn.Linear(10, 6), torch.randn(50, 10) * torch.arange(1, 11)
    scores = layer.weight.detach().abs() * x.norm(dim=0)
    Sparsifier(layer, context="output", criteria="wanda", layer_type=nn.Linear, data=x).sparsify_model(60)
    for row, weight in zip(scores.tolist(), layer.weight.detach(), strict=True):
        assert (weight == 0).nonzero().flatten().tolist() == sorted(plain.lowest(row, range(10), 6))


# -- the network is afterwards as it was -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", sorted(OF_DATA))
def test_the_network_and_the_random_numbers_are_left_alone(kind, mode):
    model = Net().train(mode == "train")
    model.bn.eval()  # a mode of its own
    model.head.weight.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    before, surface = copy.deepcopy(model.state_dict()), plain.surface(model)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    state = torch.get_rng_state(), random.getstate()
    evidence(model, kind)
    assert plain.surface(model) == surface
    assert (model.training, model.bn.training) == (mode == "train", False)
    assert all(plain.bits(v) == plain.bits(before[n]) for n, v in model.state_dict().items())
    assert not model.head.weight.requires_grad
    assert model.head.weight.grad is None
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


@pytest.mark.parametrize("kind", sorted(OF_DATA))
def test_evidence_is_the_same_where_gradients_are_switched_off(kind):
    expected = evidence(net("eval"), kind)
    model, data = net("eval"), batches()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            found = evidence(model, kind, data)
        assert all(plain.bits(found[name]) == plain.bits(tensor) for name, tensor in expected.items())


def test_a_network_is_put_back_also_where_the_loss_fails():
    model = Net()
    surface = plain.surface(model)

    def failing(*_: object) -> torch.Tensor:
        raise RuntimeError("the user's own")

    for kind in OF_LOSS:
        with pytest.raises(ArgumentError, match="the user's own"):
            gather(Calibration(model, batches(), failing), find_targets(model, LAYERS), [kind])
    assert model.training
    assert plain.surface(model) == surface


@pytest.mark.parametrize("kind", sorted(OF_DATA - {"flow"}))  # which runs a copy of the state
def test_a_buffer_that_is_replaced_rather_than_written_to_is_put_back(kind):
    class Averaging(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(4))
            self.register_buffer("longest", torch.zeros(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.average = 0.9 * self.average + x.detach().mean((0, 1, 2))
            if len(self.longest) < len(x):  # what has grown stays, as another forward may count on it
                self.longest = torch.zeros(len(x))
            return super().forward(x)

    model = Averaging()
    before = model.average
    evidence(model, kind)
    assert model.average is before
    assert not model.average.any()
    assert len(model.longest) > 0


@pytest.mark.parametrize("criterion", [n for n, c in CRITERIA.items() if OF_DATA & set(c.needs)])
def test_nothing_of_the_data_is_kept(criterion):
    model = net()
    sparsifier = Sparsifier(
        model, criteria=criterion, layer_type=LAYERS, data=batches(), loss_func=nn.CrossEntropyLoss()
    )
    sparsifier.sparsify_model(50)
    assert sparsifier.evidence._gathered is None
    assert sparsifier.evidence.kept == {}
    assert vars(CRITERIA[criterion]).keys() == {"func", "name", "elementwise", "magnitude", "needs"}


def test_evidence_is_gathered_once_a_move_and_only_where_masks_move():
    class Counted:
        reads = 0

        def __iter__(self):
            Counted.reads += 1
            return iter(batches())

    model, data = net(), Counted()
    sparsifier = Sparsifier(model, criteria="taylor", layer_type=LAYERS, data=data, loss_func=nn.CrossEntropyLoss())
    sparsifier.sparsify_model(50)
    assert Counted.reads == 1
    sparsifier.sparsify_model(50)
    assert Counted.reads == 1
    sparsifier.sparsify_model(60)
    assert Counted.reads == 2


def test_what_runs_through_the_network_runs_through_masked_weights():
    model = net("eval")
    sparsifier = Sparsifier(model, criteria="wanda", layer_type=LAYERS, data=batches())
    sparsifier.sparsify_model(50)
    masks = {n: m.clone() for n, m in sparsifier.masks.items()}
    with torch.no_grad():
        for layer in (model.conv, model.head):
            layer.weight.add_(1)  # as an optimizer might
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.conv.weight.mul_(masks["conv"])
        twin.head.weight.mul_(masks["head"])
    expected = evidence(twin, "input_norm")["head"]
    sparsifier.sparsify_model(75)
    scores = (twin.head.weight.detach().abs() * expected).flatten().tolist()
    assert sparsifier.masks["head"].flatten().tolist() == plain.mask(scores, masks["head"].flatten().tolist(), 36)


# -- ways to give data ------------------------------------------------------------------------------------------------


def test_batches_come_in_many_shapes():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.head(a + b)

    model, a, b, y = Pair(), torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    target = find_targets(model, nn.Linear)
    several = [
        Calibration(model, [(a, b, y)], nn.CrossEntropyLoss()),
        Calibration(model, (a, b, y), nn.CrossEntropyLoss()),
        Calibration(model, [((a, b), y)], nn.CrossEntropyLoss()),
        Calibration(model, {"a": a, "b": b}, lambda out, batch: F.cross_entropy(out, y + 0 * batch["a"][:, 0].long())),
    ]
    grads = [gather(c, target, ["gradient"])["gradient"]["head"] for c in several]
    assert all(torch.equal(g, grads[0]) for g in grads)
    loader = torch.utils.data.DataLoader(list(zip(a + b, y, strict=True)), batch_size=4)
    plain_net = model.head
    found = gather(
        Calibration(plain_net, loader, nn.CrossEntropyLoss()), find_targets(plain_net, nn.Linear), ["gradient"]
    )
    assert torch.allclose(found["gradient"][""], grads[0])


def test_a_part_of_a_network_is_scored_with_the_whole():
    model = net("eval")
    whole = Sparsifier(model, criteria="snip", data=batches(), loss_func=nn.CrossEntropyLoss())
    part = Sparsifier(model.conv, criteria="snip", data=Calibration(model, batches(), nn.CrossEntropyLoss()))
    assert torch.equal(whole._layers.scores(whole._layers["conv"]), part._layers.scores(part._layers[""]))


def test_a_layer_that_the_data_does_not_reach_is_named():
    model = net()
    model.unused = nn.Linear(2, 2)
    for kind in sorted(OF_DATA):
        with pytest.raises(TargetError, match=r"'unused'.*exclude=\['unused'\]"):
            evidence(model, kind)


def test_half_precision_is_summed_in_float32():
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    x = torch.randn(600, 3).to(torch.bfloat16)
    found = evidence(layer, "input_norm", x, nn.Linear)[""]
    assert found.dtype == torch.float32
    assert torch.allclose(found[0], x.float().norm(dim=0))


@pytest.mark.parametrize("kind", list(AXES), ids=lambda k: k.__name__)
def test_every_type_of_layer_has_evidence_of_its_weights_shape(kind):
    layer = next(make() for make in plain.LAYERS.values() if type(make()) is kind)
    x = plain.input_for(layer)
    data = [(x, torch.zeros(()))]
    calibration = Calibration(layer, data, lambda out, _: out.square().sum())
    for name, found in gather(calibration, find_targets(layer, kind), sorted(OF_DATA)).items():
        assert found[""].shape == layer.weight.shape, name
        assert found[""].any(), name
