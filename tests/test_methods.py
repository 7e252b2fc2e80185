"""Methods over the same run: what each does is computed anew in a few lines, and every law holds for each of them."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

import plain
from gossamer import (
    SCHEDULES,
    ArgumentError,
    FileError,
    GossamerWarning,
    Schedule,
    SparseTraining,
    Sparsifier,
    StateError,
)
from gossamer.methods import ACDC, DSD, METHODS, SET, Method, RigL, as_method
from gossamer.rules.selection import select
from test_training import OPTIMIZERS, network, start, train_step

# Runs here are short, and the laws hold for registered methods as they are.
pytestmark = pytest.mark.filterwarnings("ignore:method .* exchanges no weight")

FAST = {"rigl": RigL(every_n_steps=2, end_pct=0.8), "set": SET(every_n_steps=2), "acdc": ACDC(0.2, 0.1, 0.2)}
EVERY = {**METHODS, **FAST, "granet": RigL(every_n_steps=1)}
"""Every registered method, with exchanges often enough for a run of few steps; and RigL along a rising schedule."""


def begin(name: str, steps: int = 12, **rules) -> tuple[nn.Module, torch.optim.Optimizer, SparseTraining]:
    rules.setdefault("schedule", "lin" if name == "granet" else None)
    return start(sparsity=70, steps=steps, method=EVERY[name], **rules)


def go_on(model, optimizer, run, steps) -> None:
    for step in steps:
        train_step(model, optimizer, step)
        run.step()


# -- the laws, for each -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("optimizer", ["SGD, momentum, decay", "AdamW, amsgrad", "Adam, fused"])
@pytest.mark.parametrize("context", ["local", "global", "erk", "output"])
def test_zeros_and_the_state_under_them_stay_exactly_zero(name, optimizer, context):
    model, opt, run = begin(name, optimizer=optimizer, context=context)
    surface = plain.surface(model)
    seen = 0
    for step in range(12):
        train_step(model, opt, step, accumulate=1 + step % 2)
        run.step()
        assert plain.surface(model) == surface
        for target in run.sparsifier.targets:
            gone = ~run.sparsifier.masks[target.name]
            seen += int(gone.sum())
            assert not target.weight[gone].any()
            state = [v for v in opt.state[target.weight].values() if v.shape == target.weight.shape]
            assert state
            assert not any(v[gone].any() for v in state)
    assert seen
    goal = 0 if name == "dsd" else math.floor(0.7 * (72 + 1280) + 0.5)
    assert sum(run.sparsifier.masks.masked(n) for n in "04") == pytest.approx(goal, abs=int(context != "global"))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("context", ["local", "global"])
def test_a_run_that_is_stopped_and_resumed_is_bit_identical(name, context):
    whole, first = (begin(name, optimizer="Adam", context=context) for _ in range(2))
    go_on(*whole, range(12))
    go_on(*first, range(5))
    saved = copy.deepcopy([part.state_dict() for part in first])
    go_on(*first, range(5, 7))  # what happens after saving must not reach the state
    second = begin(name, optimizer="Adam", context=context)
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    go_on(*second, range(5, 12))
    for a, b in zip(whole[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert plain.bits(a) == plain.bits(b)
    assert all(torch.equal(m, second[2].sparsifier.masks[n]) for n, m in whole[2].sparsifier.masks.items())


@pytest.mark.parametrize("name", EVERY)
def test_the_state_of_a_run_by_another_method_is_refused(name):
    state = begin(name)[2].state_dict()
    other = "set" if name != "set" else "rigl"
    with pytest.raises(FileError, match="state of other rules"):
        begin(other)[2].load_state_dict(state)


@pytest.mark.parametrize("name", EVERY)
def test_two_runs_of_one_method_share_nothing(name):
    alone = begin(name, optimizer="Adam")
    go_on(*alone, range(12))
    together = [begin(name, optimizer="Adam") for _ in range(2)]
    for step in range(12):
        for one in together:
            go_on(*one, [step])
    for _, _, run in together:
        assert all(torch.equal(m, run.sparsifier.masks[n]) for n, m in alone[2].sparsifier.masks.items())


# -- what each does ---------------------------------------------------------------------------------------------------


def test_rigl_is_the_papers_algorithm():
    """Evci et al. 2020, algorithm 1, in plain lists: drop by |w|, grow by |∂L/∂w| among all that are then masked."""
    model, optimizer, run = begin("rigl")
    seen: dict[str, tuple[list[float], list[float]]] = {}

    def look(*_: object) -> None:
        for n in "04":
            weight = model[int(n)].weight
            seen[n] = weight.detach().abs().flatten().tolist(), weight.grad.abs().flatten().tolist()

    optimizer.register_step_pre_hook(look)
    moved = 0
    for step in range(1, 13):
        masks = {n: m.flatten().tolist() for n, m in run.sparsifier.masks.items()}
        go_on(model, optimizer, run, [step - 1])
        position = step / 12
        share = 0.3 * (1 + math.cos(math.pi * position / 0.8)) / 2 if step % 2 == 0 and position < 0.8 else 0.0
        for n, kept in masks.items():
            (size, steepness), k = seen[n], math.floor(share * sum(kept) + 0.5)
            left = set(plain.lowest(size, [i for i, is_kept in enumerate(kept) if is_kept], k))
            gone = [i for i, is_kept in enumerate(kept) if not is_kept or i in left]
            still = set(plain.lowest(steepness, gone, len(gone) - k))
            expected = torch.tensor([i not in still for i in range(len(kept))])
            found, weight = run.sparsifier.masks[n].flatten(), model[int(n)].weight.detach()
            assert torch.equal(found, expected), (step, n)
            grown = found & ~torch.tensor(kept)
            assert not weight.flatten()[grown].any(), "new weights start at 0"
            state = optimizer.state[model[int(n)].weight]["momentum_buffer"]
            assert not state.flatten()[grown].any(), "and so does their momentum"
            moved += int(grown.sum())
    assert moved > 50


def test_an_exchange_is_chosen_before_the_step_and_made_after_it():
    """By hand, with a step that turns the order of the weights round."""
    layer = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 1.0, 2.0, 9.0, 9.0, 9.0]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    sparsifier = Sparsifier(layer, criteria=lambda w: w.abs(), layer_type=nn.Linear)
    method = Method("mine", SCHEDULES["constant"], lambda step, _: 1 / 3, initial=lambda w: -w)  # keeps the small ones
    run = SparseTraining(sparsifier, optimizer, 50, total_steps=10, method=method)
    assert layer.weight.tolist() == [[3, 1, 2, 0, 0, 0]]
    layer.weight.grad = torch.tensor([[2.5, -8.0, 0.5, 4.0, -7.0, 6.0]])
    optimizer.step()
    assert layer.weight[0, 1] == 9  # the smallest before the step is the largest after it
    run.step()
    # w = 1 goes, |∂L/∂w| = 8 is the steepest of all that are then masked: it comes back, and keeps its value.
    assert layer.weight.tolist() == [[0.5, 9, 1.5, 0, 0, 0]]
    layer.weight.grad = torch.tensor([[0.0, 0.0, 0.0, 4.0, -7.0, 6.0]])
    optimizer.step()
    run.step()
    assert sparsifier.masks[""].tolist() == [[False, True, True, False, True, False]]
    assert layer.weight[0, 4] == 0
    assert optimizer.state[layer.weight]["momentum_buffer"][0, 4] == 0
    assert optimizer.state[layer.weight]["momentum_buffer"][0, 0] == 0


def test_set_grows_at_random_and_drops_the_smallest():
    model, _, run = begin("set")
    before = {n: m.clone() for n, m in run.sparsifier.masks.items()}
    masks = run.sparsifier.exchanged(0.5, METHODS["set"].grow, step=3)
    again = run.sparsifier.exchanged(0.5, METHODS["set"].grow, step=3)
    other = run.sparsifier.exchanged(0.5, METHODS["set"].grow, step=4)
    for n, mask in before.items():
        kept, weight = int(mask.sum()), model[int(n)].weight.detach()
        half = select(weight.abs(), mask, mask.numel() - kept + math.floor(0.5 * kept + 0.5))
        assert (masks[n] | ~half).all(), "the larger half stays"
        assert int(masks[n].sum()) == kept
        assert torch.equal(masks[n], again[n])
        assert not torch.equal(masks[n], other[n])
        assert torch.equal(mask, run.sparsifier.masks[n]), "nothing is moved yet"


def test_ac_dc_takes_turns_and_chooses_anew():
    _, _, run = outcome = begin("acdc", steps=20)
    sparsities, masks = [], []
    for step in range(20):
        go_on(*outcome, [step])
        sparsities.append(round(run.report().sparsity))
        masks.append(run.sparsifier.masks["4"].clone())
    at = [round(100 * (i + 1) / 20) for i in range(20)]
    expected = [70 if 20 <= p < 30 or 40 <= p < 50 or 60 <= p < 70 or p >= 80 else 0 for p in at]
    assert [s if e else 0 for s, e in zip(sparsities, expected, strict=True)] == expected
    assert all(bool(m.all()) for m, e in zip(masks, expected, strict=True) if not e)
    assert not torch.equal(masks[4], masks[-1])


def test_ac_dc_has_the_papers_phases():
    """Peste et al. 2021: 100 epochs, 10 dense, 5 and 5, a last dense phase of 10, and 15 compressed."""
    schedule = ACDC().schedule
    compressed = [i for i in range(100) if schedule((i + 0.5) / 100) == 1]
    assert compressed == [*(e for i in range(7) for e in range(10 + 10 * i, 15 + 10 * i)), *range(85, 100)]


def test_dsd_ends_dense_and_what_was_masked_grows_from_zero():
    model, optimizer, run = begin("dsd")
    for step in range(7):
        go_on(model, optimizer, run, [step])
    assert run.report().sparsity == pytest.approx(70, abs=0.1)
    gone = ~run.sparsifier.masks["4"]
    go_on(model, optimizer, run, [7])
    assert run.sparsifier.masks.masked("4") == 0
    assert not model[4].weight[gone].any()
    go_on(model, optimizer, run, range(8, 12))
    assert model[4].weight[gone].count_nonzero() > 0.9 * gone.sum()


@pytest.mark.parametrize("name", ["static", "rigl", "set"])
def test_a_method_that_starts_sparse_is_sparse_before_the_first_step(name):
    model, _, run = begin(name)
    assert run.report().zeros == 946  # round(0.7 · 72) + round(0.7 · 1280)
    assert model(torch.zeros(1, 1, 6, 6)).shape == (1, 10)
    later = SparseTraining(Sparsifier(network()), None, 70, method=name, begins=False)
    assert later.report().zeros == 0
    later.begin()
    later.begin()
    assert later.report().zeros == 50


def test_static_masks_never_move():
    model, optimizer, run = begin("static", criteria="random")
    masks = {n: m.clone() for n, m in run.sparsifier.masks.items()}
    assert not torch.equal(
        masks["4"], start(criteria="large_final", method="static", sparsity=70, schedule=None)[2].sparsifier.masks["4"]
    )
    go_on(model, optimizer, run, range(12))
    assert all(torch.equal(m, run.sparsifier.masks[n]) for n, m in masks.items())


def test_a_network_that_is_sparse_already_starts_from_its_zeros():
    model = network()
    ticket = Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear))
    ticket.sparsify_model(70)
    run = SparseTraining(Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear)), None, 70, total_steps=5, method=SET())
    assert all(torch.equal(m, ticket.masks[n]) for n, m in run.sparsifier.masks.items())


def test_masks_move_only_every_so_many_steps_and_at_the_end():
    model, optimizer, run = start(schedule=Schedule(lambda p: p, every_n_steps=4), steps=10)
    seen = []
    for step in range(10):
        train_step(model, optimizer, step)
        run.step()
        assert not model[4].weight[~run.sparsifier.masks["4"]].any()
        seen.append(run.sparsifier.masks.masked("4"))
    assert seen == [0, 0, 0, 256, 256, 256, 256, 512, 512, 640]


def test_an_exchange_goes_with_a_rising_schedule():
    model, optimizer, run = begin("granet")
    grown = 0
    for step in range(12):
        before = run.sparsifier.masks["4"].clone()
        go_on(model, optimizer, run, [step])
        assert run.sparsifier.masks.masked("4") == math.floor(0.7 * 1280 * (step + 1) / 12 + 0.5)
        grown += int((run.sparsifier.masks["4"] & ~before).sum())
    assert grown > 20


@pytest.mark.parametrize("context", ["2:4", "output"])
def test_an_exchange_keeps_a_pattern(context):
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    rules = Sparsifier(model, context=context, layer_type=nn.Linear)
    run = SparseTraining(rules, optimizer, 50, total_steps=10, method=RigL(every_n_steps=1))
    first = rules.masks[""].clone()
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        run.step()
        a_block = rules.masks[""].view(-1, 4 if context == "2:4" else 16).sum(1)
        assert (a_block == (2 if context == "2:4" else 8)).all()
    assert not torch.equal(first, rules.masks[""])


def scaled_run(fused: bool, scale: float, overflows: tuple[int, ...], **rules):
    """Twelve steps under a GradScaler, some of which overflow: the run, -Σ w · ∂L/∂w of the others, all masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    sparsifier = Sparsifier(model, criteria=rules.pop("criteria", "large_final"), layer_type=nn.Linear)
    run = SparseTraining(sparsifier, optimizer, 50, total_steps=12, **rules)
    expected = {"0": torch.zeros(8, 8), "2": torch.zeros(4, 8)}
    seen: list[torch.Tensor] = []
    for step in range(12):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 8)).square().mean() * (math.inf if step in overflows else 1)
        scaler.scale(loss).backward()
        if step not in overflows:
            for name, total in expected.items():
                weight = model.get_submodule(name).weight
                total -= weight.detach() * weight.grad / scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        run.step()
        seen.append(torch.cat([mask.flatten().clone() for mask in run.sparsifier.masks.values()]))
    return run, expected, seen


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_accumulated_knows_no_loss_scale_and_no_overflow(fused):
    run, expected, _ = scaled_run(fused, 2.0**16, (3, 7), criteria="sanh_movement", schedule="one_shot")
    for name, total in expected.items():
        assert torch.allclose(run.sparsifier.evidence.kept["accumulated"][name], total, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_grows_by_gradients_that_have_overflowed(fused):
    method = Method("mine", SCHEDULES["constant"], lambda step, position: 0.5, lambda weight, gradient: gradient.abs())
    _, _, seen = scaled_run(fused, 2.0**16, (3, 7), method=method)
    moved = [not torch.equal(before, after) for before, after in pairwise(seen)]
    assert [step for step, has_moved in enumerate(moved, 1) if not has_moved] == [3, 7]


@pytest.mark.parametrize("fused", [False, True])
def test_growth_beside_the_weights_knows_no_loss_scale(fused):
    def grow(weight, gradient):  # a threshold, so that the scale would decide
        return (gradient.abs() > 0.01).float() + gradient.abs().clamp(max=0.01)

    method = Method("mine", SCHEDULES["constant"], lambda step, position: 0.5, grow)
    ours, plainly = (scaled_run(fused, scale, (), method=method)[2] for scale in (2.0**16, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(ours, plainly, strict=True))


def test_sanhs_movement_sees_every_step_and_is_resumed():
    model, optimizer, run = start(criteria="sanh_movement", schedule="one_shot", steps=6)
    expected = torch.zeros_like(model[4].weight)
    for step in range(3):
        before = model[4].weight.detach().clone()
        train_step(model, optimizer, step)
        expected -= before * model[4].weight.grad
        run.step()
    assert torch.allclose(run.sparsifier.evidence.kept["accumulated"]["4"], expected, atol=1e-7)
    run.move_to(1.0)
    assert run.sparsifier.masks["4"].flatten().tolist() == plain.mask(expected.flatten().tolist(), [True] * 1280, 640)


def test_a_criterion_that_has_seen_no_step_says_so():
    with pytest.warns(GossamerWarning, match="measures change"):
        Sparsifier(network(), criteria="sanh_movement").sparsify_model(50)


# -- protocol and errors ----------------------------------------------------------------------------------------------


def test_a_plain_function_is_a_method():
    model, optimizer, run = start(sparsity=70, schedule=None, method=lambda step, position: 0.2 * (step % 3 == 0))
    assert run.report().zeros == 946
    before = run.sparsifier.masks["4"].clone()
    for step in range(3):
        assert torch.equal(before, run.sparsifier.masks["4"])
        go_on(model, optimizer, run, [step])
    assert not torch.equal(before, run.sparsifier.masks["4"])


def test_the_optimizers_hook_goes_with_the_run_and_no_other_run_has_one():
    _, optimizer, run = start(method=RigL(), schedule=None)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    other = OPTIMIZERS["Adam"](network().parameters())
    run.optimizer = other
    assert not optimizer._optimizer_step_pre_hooks
    assert len(other._optimizer_step_pre_hooks) == 1
    assert not start()[1]._optimizer_step_pre_hooks
    assert pickle.loads(pickle.dumps(other.state_dict()))
    model, optimizer, run = start(method=RigL(every_n_steps=1), schedule=None)
    del run
    train_step(model, optimizer, 0)  # nobody looks any more


def test_gradients_that_nobody_looked_at_are_missed():
    model = network()
    run = SparseTraining(Sparsifier(model), None, 50, total_steps=4, method=RigL(every_n_steps=2))
    run.step()
    with pytest.raises(StateError, match=r"run.before_step\(\)"):
        run.step()
    model(torch.randn(4, 1, 6, 6)).sum().backward()
    run.before_step()
    run.step()


def test_a_gradient_that_is_missing_is_named():
    model = network()
    unused = nn.ModuleList([model, nn.Conv2d(1, 8, 3)])
    optimizer = OPTIMIZERS["Adam"](unused.parameters())
    run = SparseTraining(Sparsifier(unused), optimizer, 50, total_steps=4, method=RigL(every_n_steps=1))
    with pytest.raises(StateError, match=r"'1' has no gradient.*exclude"):
        train_step(model, optimizer, 0)
    del run


@pytest.mark.parametrize("method", [RigL(1.0, 1, 1.0), SET(1.0, 1, 1.0)], ids=lambda m: m.name)
def test_a_frozen_layer_exchanges_nothing_until_it_is_unfrozen(method):
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    sparsifier = Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear))
    run = SparseTraining(sparsifier, optimizer, 50, total_steps=6, method=method)
    frozen, weight, other = sparsifier.masks["0"].clone(), model[0].weight.clone(), sparsifier.masks["4"].clone()
    assert plain.zeros(weight) == 36
    for step in range(3):
        train_step(model, optimizer, step)
        run.step()
    assert torch.equal(sparsifier.masks["0"], frozen)
    assert torch.equal(model[0].weight, weight)
    assert not torch.equal(sparsifier.masks["4"], other)
    model[0].weight.requires_grad_(True)
    train_step(model, optimizer, 3)
    run.step()
    assert not torch.equal(sparsifier.masks["0"], frozen)
    assert plain.zeros(model[0].weight) >= 36


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RigL(fraction=0), "fraction=0"),
        (lambda: RigL(fraction=1.5), "fraction=1.5"),
        (lambda: RigL(every_n_steps=0), "every_n_steps=0"),
        (lambda: RigL(end_pct=True), "end_pct=True"),
        (lambda: SET(initial="radnom"), "random"),
        (lambda: ACDC(0.5, 0.3, 0.4), "no room"),
        (lambda: ACDC(phase_pct=0), "phase_pct=0"),
        (lambda: DSD(0.6, 0.3), "increasing"),
        (lambda: as_method("rigel"), "rigl"),
        (lambda: as_method(3), "method=3"),
        (lambda: as_method("sparsegpt"), r"sparsegpt\(Sparsifier"),
        (lambda: as_method(RigL), r"RigL\(\)"),
        (lambda: Method(""), "name"),
        (lambda: Method("own", schedule="cos"), "schedule='cos'"),
        (lambda: Method("own", exchange=0.3), "exchange=0.3"),
        (lambda: Method("own", exchange=lambda step, position: 2.0), "gives 2.0 at step 1"),
        (lambda: Method("own", grow="movement"), "'initial'"),
        (lambda: SparseTraining(Sparsifier(network(), "filter"), None, 50, method="rigl"), "'filter' is silent"),
        (lambda: SparseTraining(Sparsifier(network()), None, 50, method=RigL(initial="snip")), "data="),
    ],
)
def test_what_a_method_cannot_be_is_refused_early(make, said):
    with pytest.raises(ArgumentError, match=said):
        make()


@pytest.mark.parametrize("method", [ACDC(), DSD(), "static", Method("mine", SCHEDULES["cos"])])
def test_a_method_that_is_a_schedule_takes_no_other(method):
    with pytest.raises(ArgumentError, match="leave out schedule=, or method="):
        SparseTraining(Sparsifier(network()), None, 50, schedule="agp", method=method)
    assert SparseTraining(Sparsifier(network()), None, 50, method=method).schedule == as_method(method).schedule
    for fine in ("rigl", "gradual"):  # exchanges go with any schedule
        assert SparseTraining(Sparsifier(network()), None, 50, schedule="agp", method=fine).schedule.name == "agp"


@pytest.mark.parametrize(
    ("method", "n_steps", "is_short"), [("rigl", 54, True), ("set", 99, True), ("rigl", 150, False)]
)
def test_a_run_in_which_nothing_would_change_places_warns(method, n_steps, is_short, recwarn):
    SparseTraining(Sparsifier(network()), None, 50, total_steps=n_steps, method=method)
    said = [str(w.message) for w in recwarn if issubclass(w.category, GossamerWarning)]
    assert len(said) == is_short
    assert not is_short or f"exchanges no weight in {n_steps} steps" in said[0]
