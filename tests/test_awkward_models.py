"""Networks that are no plain stack of layers: tied, wrapped, compiled, moved in the middle of a run, sparse before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import plain
from gossamer import GRANULARITIES, ArgumentError, SparseTraining, Sparsifier, TargetError
from gossamer.rules.granularity import fits
from gossamer.tickets import Lottery, load_ticket

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)),
        *(nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 3),
    )


CONVS = {"0": 288, "3": 864, "6": 864}
"""The weights of each convolution of the network."""


def images(like: torch.Tensor, channels: int = 4) -> torch.Tensor:
    return torch.randn(6, channels, 6, 6).to(like)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, channels: int = 4) -> None:
    """One step of a user's loop, in which no weight is without a gradient and momentum."""
    optimizer.zero_grad()
    weight = next(model.parameters())
    out = model(images(weight, channels))
    out.float().square().mean().backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def check_zeros(run: SparseTraining) -> None:
    """What is masked is exactly 0, in the weights and in the optimizer's state."""
    for parameter, mask in run.sparsifier.masked_parameters():
        assert not parameter.detach()[~mask].any()
        for value in run.optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert not value[~mask].any()


def train(
    model: nn.Module,
    run: SparseTraining,
    steps: int,
    before_step: Callable[[int], None] = lambda _: None,
    channels: int = 4,
) -> None:
    for i in range(steps):
        before_step(i)
        step(model, run.optimizer, channels)
        run.step()
        check_zeros(run)


def rows(run: SparseTraining) -> dict[str, int]:
    return {r.layer: r.zeros for r in run.report().rows if r.layer in run.targets}


# -- weights that several layers share --------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(x))


def test_a_tied_weight_is_made_sparse_once_and_stays_tied() -> None:
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    run = SparseTraining(Sparsifier(model, layer_type=(nn.Linear, nn.Embedding)), optimizer, 50, "lin", 3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(20)).square().sum().backward()
        optimizer.step()
        run.step()
        check_zeros(run)
    assert model.out.weight is model.words.weight
    assert [(t.name, plain.zeros(t.weight)) for t in run.sparsifier.targets] == [("words", 60)]
    report = run.report()
    assert (report.zeros, sum(r.params for r in report.rows)) == (60, 120)


def test_a_module_that_is_used_twice_is_counted_once() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    run = SparseTraining(Sparsifier(model, context="global"), sgd(model), 50, "lin", 3)
    train(model, run, 3)
    assert rows(run) == {"0": 72}
    assert plain.zeros(shared.weight) == 72


# -- weights that are not there to be masked --------------------------------------------------------------------------


def _legacy(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return weight_norm(layer)


def _pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


REFUSED = {
    "weight_norm": (_legacy, "remove_weight_norm"),
    "spectral_norm": (spectral_norm, "remove that first"),
    "parametrized": (parametrizations.weight_norm, "remove_parametrizations"),
    "pruned by torch": (_pruned, "prune.remove"),
    "lazy": (lambda _: nn.LazyConv2d(4, 3, padding=1), "run one batch through the model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_weight_that_cannot_be_masked_is_refused_with_a_remedy_that_works(name: str) -> None:
    wrap, remedy = REFUSED[name]
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), wrap(nn.Conv2d(4, 4, 3, padding=1)))
    with pytest.raises(TargetError, match=remedy):
        Sparsifier(model)
    assert [t.name for t in Sparsifier(model, exclude=["1"]).targets] == ["0"]
    with torch.no_grad():
        model(torch.randn(2, 4, 6, 6))  # the remedy of a lazy layer
    if name == "weight_norm":
        torch.nn.utils.remove_weight_norm(model[1])
    elif name == "spectral_norm":
        torch.nn.utils.remove_spectral_norm(model[1])
    elif name == "parametrized":
        torch.nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    elif name == "pruned by torch":
        prune.remove(model[1], "weight")
    run = SparseTraining(Sparsifier(model, exclude=[]), sgd(model), 60, "lin", 2)
    train(model, run, 2)
    assert rows(run) == {"0": 86, "1": 86}


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*TypedStorage", "ignore:.*deprecated")
def test_a_quantized_network_is_refused_with_a_remedy() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(TargetError, match="make it sparse first and quantize it after"):
        Sparsifier(quantized, layer_type=nn.Linear)
    # and that way round the zeros last
    Sparsifier(model, layer_type=nn.Linear).sparsify_model(50)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert int((quantized[0].weight().dequantize() == 0).sum()) >= 32


# -- wrapped networks -------------------------------------------------------------------------------------------------


class Backend:
    """Compiles nothing, and counts how often it is asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: Any, _: Any) -> Any:
        self.calls += 1
        return module.forward


def compiled(net: nn.Module, backend: Backend, way: str) -> nn.Module:
    if way == "torch.compile(net)":
        return torch.compile(net, backend=backend)
    net.compile(backend=backend)
    return net


WAYS = ["torch.compile(net)", "net.compile()"]


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_a_compiled_network_is_compiled_no_more_often_for_being_made_sparse(way: str, granularity: str) -> None:
    net, backend = network(), Backend()
    model = compiled(net, backend, way)
    run = SparseTraining(Sparsifier(model, granularity), sgd(model), 50, "lin", 6)
    assert list(run.targets) == list(CONVS)
    train(model, run, 1)
    after_one = backend.calls
    assert after_one > 0
    train(model, run, 5)
    assert backend.calls == after_one
    assert rows(run) == {n: size // 2 for n, size in CONVS.items()}
    assert [r.layer for r in run.report().rows] == list(CONVS)
    network().load_state_dict(net.state_dict())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*numpy.core is deprecated")
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_network_in_fastai_is_compiled_no_more_often(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastai")
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    from gossamer.integrations.fastai import SparsifyCallback

    class Count(Callback):
        def after_step(self) -> None:
            seen.append(backend.calls)

    seen: list[int] = []
    net, backend = network(), Backend()
    pairs = [(torch.randn(4, 6, 6), torch.tensor(i % 3)) for i in range(24)]
    dls = DataLoaders.from_dsets(pairs[:16], pairs[16:], bs=4, num_workers=0, device="cpu")
    learn = Learner(dls, compiled(net, backend, way), loss_func=nn.CrossEntropyLoss())
    callback = SparsifyCallback(50, schedule="lin")
    learn.logger = lambda *_: None
    with learn.no_bar():
        learn.fit(3, 1e-2, cbs=[callback, Count()])
    assert seen == [1] * 4 + [2] * 8  # once to train and, after the first epoch, once to validate; as in a dense fit
    assert [(r.layer, r.zeros) for r in callback.report().rows] == [(n, size // 2) for n, size in CONVS.items()]
    assert "_orig_mod" not in capsys.readouterr().out
    network().load_state_dict(net.state_dict())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: compiled(net, Backend(), WAYS[0])])
def test_names_of_a_wrapped_network_and_its_tickets_are_those_of_the_plain_one(wrap: Any, tmp_path: Path) -> None:
    net = network()
    model = wrap(net)
    run = SparseTraining(Sparsifier(model), sgd(model), {"3": 50, "6": 75}, "lin", 4)
    lottery = Lottery(run)
    lottery.snapshot()
    train(model, run, 4)
    assert rows(run) == {"3": 432, "6": 648}
    path = lottery.ticket().save(tmp_path / "ticket.safetensors")
    ticket = load_ticket(path)
    assert set(ticket.weights) == set(net.state_dict())
    fresh = network()
    ticket.apply_to(fresh)
    assert [plain.zeros(fresh[i].weight) for i in (0, 3, 6)] == [0, 432, 648]
    ticket.apply_to(wrap(network()))


# -- networks that change in the middle -------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["local", "global", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_in_the_middle_of_a_run_keeps_zeros_and_counts(dtype: torch.dtype, context: str) -> None:
    model = network()
    run = SparseTraining(Sparsifier(model, context=context), sgd(model), 50, "lin", 6)

    def change(i: int) -> None:
        if i == 3:
            model.to(dtype)
            run.optimizer = sgd(model)

    train(model, run, 6, change)
    assert model[0].weight.dtype == dtype
    assert sum(rows(run).values()) == 1008
    assert context == "global" or rows(run) == {n: size // 2 for n, size in CONVS.items()}


@pytest.mark.parametrize("criterion", ["large_final", "movmag", "updating_movement"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("context", ["local", "global"])
def test_another_device_in_the_middle_of_a_run_keeps_zeros_and_counts(
    device: str, context: str, criterion: str
) -> None:
    model = network()
    run = SparseTraining(Sparsifier(model, context=context, criteria=criterion), sgd(model), 50, "lin", 6)

    def change(i: int) -> None:
        if i in (2, 4):
            model.to(device if i == 2 else "cpu")
            run.optimizer = sgd(model)

    train(model, run, 6, change)
    assert sum(rows(run).values()) == 1008


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter"])
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("when", [0, 3])
def test_channels_last_gives_the_same_masks_and_keeps_zeros(when: int, context: str, granularity: str) -> None:
    def masks(last: bool) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        model = network().double()  # so that a convolution in another order of sums gives the same masks

        def change(i: int) -> None:
            if last and i == when:
                model.to(memory_format=torch.channels_last)

        torch.manual_seed(1)
        if last and when == 0:
            change(0)
        run = SparseTraining(Sparsifier(model, granularity, context), sgd(model), 50, "lin", 6)
        train(model, run, 6, change)
        assert not last or model[3].weight.is_contiguous(memory_format=torch.channels_last)
        return {n: m.clone() for n, m in run.sparsifier.masks.items()}, rows(run)

    (expected, counts), (found, found_counts) = masks(False), masks(True)
    assert found_counts == counts
    assert granularity != "weight" or sum(counts.values()) == 1008
    assert all(torch.equal(expected[n], found[n]) for n in expected)


# -- what surrounds a filter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_masked_filter_silences_its_channel_in_the_norm_behind_it(norm: str) -> None:
    model = network()
    conv, after = (model[0], model[1]) if norm == "batch" else (model[3], model[4])
    with torch.no_grad():
        after.bias.fill_(0.3)
        conv.bias.fill_(0.2)
    run = SparseTraining(Sparsifier(model, "filter"), sgd(model), 50, "lin", 4)
    train(model, run, 4)
    dead = (conv.weight == 0).flatten(1).all(1)
    assert int(dead.sum()) == conv.out_channels // 2
    for parameter in (conv.bias, after.weight, after.bias):
        assert torch.equal(parameter == 0, dead)
    model.eval()
    with torch.no_grad():
        x = model[: 2 if norm == "batch" else 5](torch.randn(2, 4, 6, 6))
    assert not x[:, dead].any()
    assert x[:, ~dead].any()


GROUPED = {
    "grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "depthwise, two for each": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8),
    "transposed, grouped": lambda: nn.ConvTranspose2d(8, 12, 3, groups=2),
    "transposed, depthwise": lambda: nn.ConvTranspose2d(8, 8, 3, groups=8),
}
LETTERS = {"transposed, grouped": "giohw", "transposed, depthwise": "giohw"}


def divides(kind: str, granularity: str) -> bool:
    """Whether the channels of a layer divide into the blocks of a granularity, if it has any."""
    weight, (o, i) = GROUPED[kind]().weight, GRANULARITIES[granularity].block or (1, 1)
    outputs, inputs = weight.shape[1::-1] if kind.startswith("transposed") else weight.shape[:2]
    groups = GROUPED[kind]().groups if kind.startswith("transposed") else 1
    return outputs % o == 0 and inputs // groups % i == 0


FITTING = [
    (k, g) for k in GROUPED for g in GRANULARITIES if fits(GRANULARITIES[g], LETTERS.get(k, "oihw")) and divides(k, g)
]


def dead_units(weight: torch.Tensor, view: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, int]:
    """Units that are zero throughout, and weights that are zero, by looking."""
    parts = (weight.detach() != 0).reshape(view)
    kept = parts.amax(dims) if dims else parts
    return int((~kept).sum()), int((~parts).sum())


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize(("kind", "granularity"), FITTING)
def test_grouped_convolutions_are_masked_to_the_unit(kind: str, granularity: str, context: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(GROUPED[kind]())
    sparsifier = Sparsifier(model, granularity, context, layer_type=type(model[0]))
    run = SparseTraining(sparsifier, sgd(model), 50, "lin", 3)
    train(model, run, 3, channels=8)
    (target,) = run.sparsifier.targets
    _, view, dims = GRANULARITIES[granularity].cut(target.axes, target.view)
    units = target.weight.numel()
    for d in dims:
        units //= view[d]
    dead, zero = dead_units(target.weight, view, dims)
    assert dead == (units + 1) // 2
    assert zero * units == dead * target.weight.numel()


# -- networks that are sparse already ---------------------------------------------------------------------------------


# A layer that is zero as a whole is by promise not taken for sparse, so the granularity 'layer' has nothing to keep.
CUTS = [
    (kind, g)
    for kind, axes in ((nn.Conv2d, "oihw"), (nn.Linear, "oi"))
    for g in GRANULARITIES
    if fits(GRANULARITIES[g], axes) and g != "layer"
]


def two_convs(inputs: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(inputs, 12, 4, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))


def two_linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16))


MAKE = {nn.Conv2d: two_convs, nn.Linear: two_linears}


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize(("kind", "granularity"), [cut for cut in CUTS if cut[1] != "block_16x16"])
def test_zeros_of_a_loaded_network_are_kept_at_every_step_of_a_run_to_a_higher_target(
    kind: type[nn.Module], granularity: str, context: str
) -> None:
    first = MAKE[kind]()
    Sparsifier(first, granularity, context, layer_type=kind).sparsify_model(40)
    model = MAKE[kind]()
    model.load_state_dict(first.state_dict())
    optimizer = sgd(model)
    run = SparseTraining(Sparsifier(model, granularity, context, layer_type=kind), optimizer, 70, "lin", 4)
    was = {t.name: t.weight.detach() == 0 for t in run.sparsifier.targets}
    assert run.zeros_kept == sum(int(z.sum()) for z in was.values()) > 0
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(6, 8) if kind is nn.Linear else torch.randn(6, 8, 6, 6)).square().mean().backward()
        optimizer.step()
        run.step()
        check_zeros(run)
        assert not any(t.weight[was[t.name]].any() for t in run.sparsifier.targets)
    straight = MAKE[kind]()
    Sparsifier(straight, granularity, context, layer_type=kind).sparsify_model(70)
    if context == "local" or granularity == "weight":  # elsewhere units of different sizes make up the same number
        assert sum(rows(run).values()) == sum(plain.zeros(m.weight) for m in straight if isinstance(m, kind))


def test_zeros_of_a_pattern_are_kept_on_the_way_to_a_sparser_one() -> None:
    first = two_convs()
    Sparsifier(first, context="2:4").sparsify_model(50)
    model = two_convs()
    model.load_state_dict(first.state_dict())
    run = SparseTraining(Sparsifier(model, context="1:4"), sgd(model), 75, "lin", 4)
    was = {t.name: t.weight.detach() == 0 for t in run.sparsifier.targets}
    for _ in range(4):
        step(model, run.optimizer, 8)
        run.step()
        check_zeros(run)
        assert not any(t.weight[was[t.name]].any() for t in run.sparsifier.targets)
    for conv in (model[0], model[2]):
        kept = (conv.weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1)
        assert set(kept.tolist()) == {1}


def test_zeros_that_do_not_fit_a_pattern_are_an_error_that_says_how_to_go_on() -> None:
    model = two_convs()
    Sparsifier(model).sparsify_model(30)
    with pytest.raises(ArgumentError, match=r"not spread evenly.*2:4.*keep_zeros=False"):
        SparseTraining(Sparsifier(model, context="2:4"), sgd(model), 50, "lin", 4)
    run = SparseTraining(Sparsifier(model, context="2:4"), sgd(model), 50, "lin", 4, keep_zeros=False)
    train(model, run, 4, channels=8)
    assert set((model[0].weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1).tolist()) == {2}


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
def test_zeros_finer_than_the_granularity_are_an_error_that_says_how_to_go_on(granularity: str) -> None:
    model = two_convs()
    Sparsifier(model).sparsify_model(30)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=rf"zeros inside units of granularity '{granularity}'.*keep_zeros=False"):
        SparseTraining(Sparsifier(model, granularity), sgd(model), 50, "lin", 4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    run = SparseTraining(Sparsifier(model, granularity), sgd(model), 50, "lin", 4, keep_zeros=False)
    train(model, run, 4, channels=8)


@pytest.mark.parametrize("context", ["local", "global"])
def test_a_target_below_the_zeros_that_are_there_is_an_error_with_both_numbers(context: str) -> None:
    model = two_convs()
    Sparsifier(model, context=context).sparsify_model(60)
    with pytest.raises(ArgumentError, match=r"60\.\d\d % zeros.*target of 50 %.*keep_zeros=False"):
        SparseTraining(Sparsifier(model, context=context), sgd(model), 50, "lin", 4)


@pytest.mark.parametrize("context", ["local", "global"])
def test_a_layer_that_is_zero_throughout_is_not_taken_for_a_sparse_one(context: str) -> None:
    model = two_convs()
    nn.init.zeros_(model[2].weight)  # as the last layer of a residual branch begins
    run = SparseTraining(Sparsifier(model, context=context), sgd(model), 30, "lin", 3)
    assert run.zeros_kept == 0
    train(model, run, 3, channels=8)
    assert sum(rows(run).values()) == sum(run.sparsifier.masks.masked(n) for n in run.targets)
    assert plain.zeros(model[2].weight) < model[2].weight.numel()


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter"])
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("target", [0, 50])
def test_a_stray_zero_is_no_obstacle(target: int, context: str, granularity: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 36, 3, padding=1))  # 10,368 weights
    with torch.no_grad():
        model[0].weight.view(-1)[77] = 0
    run = SparseTraining(Sparsifier(model, granularity, context), sgd(model), target, "lin", 2)
    train(model, run, 2, channels=32)
    assert rows(run) == {"0": 5184 if target else 0}


@pytest.mark.parametrize("context", ["local", "global"])
def test_a_run_that_is_stopped_and_resumed_still_keeps_the_zeros_it_began_with(context: str) -> None:
    first = two_convs()
    Sparsifier(first, context=context).sparsify_model(40)
    torch.manual_seed(2)
    run = SparseTraining(Sparsifier(first, context=context), sgd(first), 70, "lin", 6)
    was = {t.name: t.weight.detach() == 0 for t in run.sparsifier.targets}
    step(first, run.optimizer, 8)
    run.step()  # the schedule asks for 12 %, less than the 40 that are there
    state, weights = copy.deepcopy(run.state_dict()), copy.deepcopy(first.state_dict())

    model = two_convs()
    again = SparseTraining(Sparsifier(model, context=context), sgd(model), 70, "lin", 6)
    assert again.zeros_kept == 0
    model.load_state_dict(weights)
    again.load_state_dict(state)
    for _ in range(5):
        step(model, again.optimizer, 8)
        again.step()
        check_zeros(again)
        assert not any(t.weight[was[t.name]].any() for t in again.sparsifier.targets)
    train(first, run, 5, channels=8)
    assert sum(rows(again).values()) == sum(rows(run).values()) == 1680
    # What is let go is let go: the floor is no part of a run that was released.
    again.release()
    step(model, again.optimizer, 8)
    assert not any(int(t.weight.detach()[was[t.name]].count_nonzero()) == 0 for t in again.sparsifier.targets)


def test_layers_that_were_taken_whole_stay_zero_where_a_layer_is_a_unit() -> None:
    net = network()
    Sparsifier(net, "layer").sparsify_model({"3": 100})
    run = SparseTraining(Sparsifier(net, "layer", "global"), None, 50, "lin", total_steps=2)
    assert run.zeros_kept == CONVS["3"]


@pytest.mark.parametrize("context", ["local", "global"])
def test_kept_zeros_stay_when_a_schedule_goes_down_again(context: str) -> None:
    layer = nn.Linear(100, 1, bias=False)
    with torch.no_grad():
        layer.weight[0, 80:] = 0
    run = SparseTraining(
        Sparsifier(layer, context=context, layer_type=nn.Linear), None, 50, lambda p: 1 - abs(2 * p - 1), total_steps=4
    )
    for expected in (25, 50, 25, 20):
        run.step()
        mask = run.sparsifier.masks[""][0]
        assert int((~mask).sum()) == max(20, expected)
        assert not mask[80:].any()
        state, again = run.state_dict(), Sparsifier(layer, context=context, layer_type=nn.Linear)
        again.load_state_dict(state["tensors"])
        assert torch.equal(again.masks[""], run.sparsifier.masks[""])


def test_kept_filters_stay_when_a_global_context_rounds() -> None:
    net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3))
    with torch.no_grad():
        net[0].weight[:5] = 0
    run = SparseTraining(Sparsifier(net, "filter", "global"), None, 30, "lin", total_steps=5, round_to=4)
    for _ in range(5):
        run.step()
        assert not run.sparsifier.masks["0"][:5].any()
