"""A gradual run in a plain PyTorch loop: zeros stay zero, masks end at the target, the model stays the user's."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import nn

import plain
from gossamer import (
    CRITERIA,
    SCHEDULES,
    ArgumentError,
    GossamerWarning,
    Schedule,
    SparseTraining,
    Sparsifier,
    StateError,
    TargetError,
)
from loops import OPTIMIZERS, network, start, train_step

# -- zeros stay zero --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", [{}, {"accumulate": 3}, {"autocast": True}], ids=["plain", "accumulated", "autocast"])
@pytest.mark.parametrize(
    "rules", [{}, {"context": "global"}, {"granularity": "filter"}], ids=["local", "global", "filter"]
)
def test_zeros_and_the_optimizers_state_under_them_stay_exactly_zero(name, how, rules):
    model, optimizer, run = start(name, 60, **rules)
    seen = 0
    for step in range(6):
        train_step(model, optimizer, step, **how)
        run.step()
        for target in run.sparsifier.targets:
            gone = ~run.sparsifier.masks[target.name]
            assert not target.weight[gone].any()
            state = [v for v in optimizer.state[target.weight].values() if v.shape == target.weight.shape]
            assert state, "this optimizer is here for its state"
            assert not any(v[gone].any() for v in state)
            seen += int(gone.sum())
    assert seen
    if rules.get("granularity") == "filter":
        dead = ~model[0].weight.detach().flatten(1).any(1)
        for companion in (model[0].bias, model[1].weight, model[1].bias):
            state = [v for v in optimizer.state[companion].values() if v.shape == companion.shape]
            assert not any(v[dead].any() for v in [companion, *state])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_zeros_stay_zero_whatever_the_weights_are_made_of(dtype):
    model = nn.Linear(16, 16).to(dtype)
    optimizer = OPTIMIZERS["AdamW, amsgrad"](model.parameters())
    run = SparseTraining(Sparsifier(model, layer_type=nn.Linear), optimizer, 75, "lin", 4)
    for step in range(1, 5):
        optimizer.zero_grad()
        model(torch.randn(3, 16, dtype=dtype)).square().sum().backward()
        optimizer.step()
        run.step()
        assert plain.zeros(model.weight) == 48 * step
        assert not any(v[model.weight == 0].any() for v in optimizer.state[model.weight].values() if v.ndim)


def test_sparse_gradients_of_an_embedding_are_no_obstacle():
    model = nn.Embedding(20, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    run = SparseTraining(Sparsifier(model, layer_type=nn.Embedding), optimizer, 50, "lin", 3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(0, 20, (6,))).square().sum().backward()
        optimizer.step()
        run.step()
    assert plain.zeros(model.weight) == 40
    assert all(
        not v[model.weight == 0].any() for v in optimizer.state[model.weight].values() if isinstance(v, torch.Tensor)
    )


def test_what_is_not_masked_trains_as_if_nothing_were_there():
    model, optimizer, run = start("Adam", 0)
    twin = network()
    twin_optimizer = OPTIMIZERS["Adam"](twin.parameters())
    for step in range(4):
        train_step(model, optimizer, step)
        run.step()
        train_step(twin, twin_optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_hold_masks_again_without_moving():
    model, optimizer, run = start()
    train_step(model, optimizer, 0)
    run.move_to(0.6)
    masks = {n: m.clone() for n, m in run.sparsifier.masks.items()}
    train_step(model, optimizer, 1)
    run.hold()
    assert all(torch.equal(m, run.sparsifier.masks[n]) for n, m in masks.items())
    assert not model[0].weight[~masks["0"]].any()
    assert not optimizer.state[model[0].weight]["momentum_buffer"][~masks["0"]].any()


def test_another_optimizer_may_take_the_place():
    model, optimizer, run = start()
    train_step(model, optimizer, 0)
    run.step()
    run.optimizer = other = OPTIMIZERS["Adam"](model.parameters())
    train_step(model, other, 1)
    run.move_to(1.0)
    assert not other.state[model[0].weight]["exp_avg"][model[0].weight == 0].any()


def test_a_run_works_without_an_optimizer():
    model = network()
    run = SparseTraining(Sparsifier(model), None, 50, "lin", 2)
    run.step()
    run.step()
    assert run.report().zeros == 36


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 49])
def test_after_the_last_step_the_masks_stand_exactly_at_the_target(schedule, context, steps):
    for sparsity in (0, 2.3, 50, 99.9, 100):
        model = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 5, bias=False))
        run = SparseTraining(Sparsifier(model, context=context, layer_type=nn.Linear), None, sparsity, schedule, steps)
        for _ in range(steps):
            with torch.no_grad():
                for layer in model:
                    layer.weight.add_(torch.randn(layer.weight.shape))
            run.step()
        goal = 0 if schedule == "dsd" else sparsity
        parts = [81, 45] if context == "local" else [126]
        expected = sum(math.floor(goal * n / 100 + 0.5) for n in parts)
        assert run.report().zeros == (expected if goal else run.report().zeros)
        assert sum(run.sparsifier.masks.masked(n) for n in "01") == expected


@pytest.mark.parametrize("epochs_of", [1, 3, 8, 13])
def test_at_the_end_of_each_epoch_the_masks_stand_where_the_schedule_does(epochs_of):
    model, _, run = start(sparsity=50, steps=5 * epochs_of)
    model[4].weight.data.normal_()
    shown = []
    for step in range(5 * epochs_of):
        run.step()
        if (step + 1) % epochs_of == 0:
            shown.append([r.zeros for r in run.report().rows])
    one_cycle = [(1 + math.exp(-8)) / (1 + math.exp(6 - 14 * e / 5)) for e in range(1, 6)]
    assert shown == [[math.floor(0.5 * p * n + 0.5) for n in (72, 1280)] for p in one_cycle]


def test_a_dict_of_targets_is_met_layer_by_layer():
    model, _, run = start(sparsity={"0": 25, "4": 80}, schedule="cos", steps=3)
    for _ in range(3):
        run.step()
    assert [plain.zeros(model[i].weight) for i in (0, 4)] == [18, 1024]


def test_a_pattern_is_met_in_every_block():
    model, optimizer, run = start(sparsity=50, steps=4, layer_type=nn.Linear, context="2:4")
    for step in range(4):
        train_step(model, optimizer, step)
        run.step()
    assert ((model[4].weight != 0).view(-1, 4).sum(1) == 2).all()


def test_kept_filters_are_rounded_in_a_run():
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    run = SparseTraining(Sparsifier(model, "filter"), None, 40, "lin", 10, round_to=8)
    kept = []
    for _ in range(10):
        run.step()
        kept.append(int(model[0].weight.detach().flatten(1).any(1).sum()))
    assert set(kept) == {16, 8}
    assert kept == sorted(kept, reverse=True)


def test_masks_only_grow_along_a_rising_schedule():
    model, optimizer, run = start(steps=8)
    before = {n: m.clone() for n, m in run.sparsifier.masks.items()}
    for step in range(8):
        train_step(model, optimizer, step)
        run.step()
        assert not any((m & ~before[n]).any() for n, m in run.sparsifier.masks.items())
        before = {n: m.clone() for n, m in run.sparsifier.masks.items()}


def test_step_says_whether_progress_changed():
    _, _, run = start(schedule=Schedule(lambda p: p, start_pct=0.5), steps=4)
    assert [run.step() for _ in range(4)] == [False, False, True, True]
    assert not run.move_to(1.0)


def test_a_second_round_goes_on_from_the_first_and_never_back():
    model, optimizer, run = start(schedule="lin", steps=4)
    for step in range(4):
        train_step(model, optimizer, step)
        run.step()
    run.restart(2)
    for step in range(2):
        train_step(model, optimizer, step)
        run.step()
        assert [r.zeros for r in run.report().rows] == [36, 640]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("context", ["local", "global"])
def test_another_round_keeps_the_zeros_that_came_in_between(context: str, keep: bool):
    model, optimizer, _ = start(steps=4)
    run = SparseTraining(Sparsifier(model, context=context), optimizer, 80, "lin", 4, keep_zeros=keep)
    run.step()
    masks = {n: m.clone() for n, m in run.sparsifier.masks.items()}
    Sparsifier(model, context=context).sparsify_model(50)
    was = {t.name: t.weight.detach() == 0 for t in run.sparsifier.targets}
    total = sum(int(z.sum()) for z in was.values())
    run.restart()
    assert run.zeros_kept == (total if keep else 0)
    for step in range(4):
        train_step(model, optimizer, step)
        run.step()
        # What the run had masked stays masked either way.
        assert all(bool((m | ~run.sparsifier.masks[n]).all()) for n, m in masks.items())
        regrown = sum(int(t.weight[was[t.name]].count_nonzero()) for t in run.sparsifier.targets)
        assert regrown == 0 if keep else step > 0 or regrown > 0
    assert run.sparsifier.report().sparsity == pytest.approx(80, abs=1)


def test_release_ends_the_masking():
    model, _, run = start(schedule="lin", steps=2)
    run.step()
    run.step()
    run.release()
    with torch.no_grad():
        for layer in (model[0], model[4]):
            layer.weight.fill_(1)
    run.hold()
    assert run.report().zeros == 0


# -- said early and clearly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"sparsity": 101}, ArgumentError, "101"),
        ({"sparsity": {"nope": 50}}, TargetError, "nope"),
        ({"schedule": "one_cycl"}, ArgumentError, "one_cycle"),
        ({"schedule": lambda a, b: a}, ArgumentError, "2 arguments"),
        ({"total_steps": 0}, ArgumentError, "total_steps=0"),
        ({"total_steps": 2.5}, ArgumentError, "total_steps=2.5"),
        ({"total_steps": True}, ArgumentError, "total_steps=True"),
        ({"total_steps": "ten"}, ArgumentError, "total_steps='ten'"),
        ({"total_steps": math.nan}, ArgumentError, "total_steps=nan"),
        ({"total_steps": math.inf}, ArgumentError, "total_steps=inf"),
        ({"round_to": 0}, ArgumentError, "round_to=0"),
        ({"sparsifier": nn.Linear(2, 2)}, ArgumentError, "Sparsifier"),
    ],
)
def test_a_bad_argument_raises_in_the_constructor(arguments, error, said):
    given = {"sparsifier": Sparsifier(network()), "optimizer": None, "sparsity": 50, "total_steps": 3, **arguments}
    with pytest.raises(error, match=said):
        SparseTraining(**given)


def test_weights_of_nan_are_refused_in_the_constructor():
    model = network()
    nn.init.constant_(model[0].weight, math.nan)
    with pytest.raises(TargetError, match="nan"):
        SparseTraining(Sparsifier(model), None, 50, "lin", 3)


def test_a_bad_number_of_steps_is_refused_for_another_round_too():
    _, _, run = start()
    with pytest.raises(ArgumentError, match="total_steps=0"):
        run.restart(0)


def test_steps_beyond_the_last_hold_the_masks():
    net, _, run = start(steps=1)
    run.step()
    before = run.report().zeros
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert not run.step()
    assert run.report().zeros == before > 0


def test_a_step_without_a_position_needs_a_number_of_steps():
    run = start(steps=None)[2]
    with pytest.raises(StateError, match="position"):
        run.step()
    assert run.steps_done == 0


# -- the model stays the user's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules", [{}, {"granularity": "filter"}, {"context": "global", "criteria": "updating_movmag"}], ids=str
)
def test_nothing_is_added_to_the_model_at_any_time(rules):
    model = network()
    before, ids = plain.surface(model), [id(p) for p in model.parameters()]
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    run = SparseTraining(Sparsifier(model, **rules), optimizer, 50, "lin", 3)
    assert plain.surface(model) == before
    for step in range(3):
        train_step(model, optimizer, step)
        run.step()
        assert plain.surface(model) == before
        network().load_state_dict(model.state_dict())
        copy.deepcopy(model)
    run.release()
    assert plain.surface(model) == before
    assert [id(p) for p in model.parameters()] == ids


def bytes_held(root: object, not_counted: set[int]) -> int:
    """Bytes of every tensor storage and array reachable from an object, but for those not counted."""
    total, seen, todo = 0, set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, nn.Module, torch.optim.Optimizer, str, bytes, int, float)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            if storage.data_ptr() not in not_counted:
                not_counted = not_counted | {storage.data_ptr()}
                total += storage.nbytes()
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += item
        elif hasattr(item, "nbytes"):
            total += item.nbytes
        else:
            todo += vars(item).values() if hasattr(item, "__dict__") else []
            todo += [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
    return total


@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize(
    ("criterion", "copies"), [("large_final", 0), ("random", 0), ("movement", 1), ("updating_movmag", 1)]
)
def test_a_run_holds_the_masks_and_what_its_criterion_looks_back_at(criterion, copies, context):
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 100))
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    run = SparseTraining(Sparsifier(model, "weight", context, criterion, nn.Linear), optimizer, 50, "lin", 4)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 300)).square().sum().backward()
        optimizer.step()
        run.step()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for state in optimizer.state.values():
        own |= {v.untyped_storage().data_ptr() for v in state.values()}
    n = sum(layer.weight.numel() for layer in model)
    assert bytes_held(run, own) == n * (1 + 4 * copies)


def test_two_runs_share_nothing():
    def whole(interleaved: bool) -> list[torch.Tensor]:
        runs = [
            start("Adam", s, "cos", 5, criteria=c, context=x)
            for s, c, x in ((30, "movement", "local"), (80, "random", "global"))
        ]
        order = (
            [(i, s) for s in range(5) for i in (0, 1)] if interleaved else [(i, s) for i in (0, 1) for s in range(5)]
        )
        for i, step in order:
            model, optimizer, run = runs[i]
            train_step(model, optimizer, step)
            run.step()
        return [p.detach() for model, _, _ in runs for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(whole(True), whole(False), strict=True))


# -- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("context", ["local", "global"])
def test_a_run_that_is_stopped_and_resumed_is_bit_identical(criterion, context):
    def go_on(model, optimizer, run, steps):
        for step in steps:
            train_step(model, optimizer, step)
            run.step()

    whole = start("Adam", 70, "agp", 8, criteria=criterion, context=context)
    go_on(*whole, range(8))
    first = start("Adam", 70, "agp", 8, criteria=criterion, context=context)
    go_on(*first, range(4))
    saved = copy.deepcopy([part.state_dict() for part in first])
    go_on(*first, range(4, 6))  # what happens after saving must not reach the state
    second = start("Adam", 70, "agp", 8, criteria=criterion, context=context)
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    go_on(*second, range(4, 8))
    for a, b in zip(whole[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert plain.bits(a) == plain.bits(b)
    assert whole[2].steps_done == second[2].steps_done == 8
    assert whole[2].state_dict()["tensors"].keys() == second[2].state_dict()["tensors"].keys()


def test_a_second_round_that_is_resumed_never_goes_back_either():
    model, _, run = start(schedule="lin", steps=2)
    run.step()
    run.step()
    run.restart(4)
    again = start(schedule="lin", steps=2)
    again[0].load_state_dict(model.state_dict())
    again[2].load_state_dict(run.state_dict())
    again[2].step()
    assert [again[2].sparsifier.masks.masked(n) for n in "04"] == [36, 640]
    assert again[2].total_steps == 4


def test_a_state_holds_plain_values_and_its_own_tensors():
    model, optimizer, run = start(steps=3, criteria="movement")
    train_step(model, optimizer, 0)
    run.step()
    state = run.state_dict()
    assert all(isinstance(v, (int, float, dict)) for v in state.values())
    before = {n: t.clone() for n, t in state["tensors"].items()}
    train_step(model, optimizer, 1)
    run.step()
    assert all(torch.equal(t, state["tensors"][n]) for n, t in before.items())


def test_a_criterion_of_change_warns_once_where_nothing_has_changed():
    _, _, run = start(criteria="movement")
    with pytest.warns(GossamerWarning, match="measures change"):
        run.step()
    run.step()
    assert run.report().zeros > 0


# -- broken off inside a step ------------------------------------------------------------------------------------------


class AtLine:
    """Raises what Ctrl-C does at the nth line that runs in the files that move masks."""

    FILES = ("moving.py", "layers.py", "masks.py", "training.py")

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.endswith(self.FILES) or "gossamer" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize(
    ("granularity", "context", "schedule"),
    [
        ("weight", "local", "one_shot"),
        ("weight", "global", "one_shot"),
        ("filter", "local", "lin"),
        ("weight", "2:4", "lin"),
    ],
)
def test_a_move_that_is_broken_off_anywhere_leaves_zeros_and_a_run_that_reaches_its_target(
    granularity: str, context: str, schedule: str
) -> None:
    n, whole = 0, False
    while not whole:
        n += 1 if n < 30 else 3  # the first lines are those before anything has moved
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        rules = Sparsifier(model, granularity, context, layer_type=nn.Linear)
        run = SparseTraining(rules, optimizer, 50, schedule, total_steps=2)
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        sys.settrace(AtLine(n))
        try:
            run.move_to(1.0)
            whole = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert whole or not run.at_target or run.report().sparsity == 50
        for parameter, mask in rules.masked_parameters():
            assert not parameter.detach()[~mask].any(), n
            assert not optimizer.state[parameter]["momentum_buffer"][~mask].any(), n
        run.restart()
        run.step()
        run.step()
        assert run.at_target
        assert [rules.masks.masked(t.name) for t in rules.targets] == [96, 96] or context == "global", n
        assert run.report().zeros == 192, n
    assert n > 60


@pytest.mark.parametrize("context", ["local", "global"])
def test_a_move_that_fails_for_nan_can_be_made_once_the_weights_are_good(context: str) -> None:
    model, optimizer, _ = start()
    good = copy.deepcopy(model.state_dict())
    run = SparseTraining(Sparsifier(model, context=context, layer_type=nn.Linear), optimizer, 50, "one_shot", 2)
    with torch.no_grad():
        model[4].weight.fill_(math.nan)
    with pytest.raises(TargetError, match="nan"):
        run.move_to(1.0)
    assert not run.at_target
    model.load_state_dict(good)
    run.move_to(1.0)
    assert run.report().sparsity == 50


@pytest.mark.parametrize("schedule", ["lin", "constant"])
def test_a_run_that_leaves_a_layer_nearly_empty_says_so_once(schedule):
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)

    def two_rounds() -> None:
        run = SparseTraining(Sparsifier(model, context="global", layer_type=nn.Linear), None, 60, schedule, 5)
        for _ in range(2):
            for _ in range(5):
                run.step()
            run.restart()

    with pytest.warns(GossamerWarning, match="'0' keeps 1 of 10,000") as caught:
        two_rounds()
    assert len(caught) == 1
