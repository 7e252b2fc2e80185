"""Zeros that a run let go of are not taken for those of a sparser network that was loaded since."""

from __future__ import annotations

import torch
from torch import nn

from gossamer import SparseTraining, Sparsifier
from loops import network, start


def test_a_stray_zero_or_two_are_not_kept_by_another_round():
    model, _, run = start(schedule="lin", steps=2)
    run.step()
    with torch.no_grad():
        model[4].weight.view(-1)[run.sparsifier.masks["4"].view(-1).nonzero()[0]] = 0
    run.restart()
    assert run.zeros_kept == 0


def test_a_run_that_was_released_is_saved_as_one() -> None:
    model, _, run = start(schedule="lin", steps=1)
    run.step()
    run.release()
    rules = Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear))
    again = SparseTraining(rules, None, 50, "lin", 1, keep_zeros=False)
    again.keep_zeros = True
    again.load_state_dict(run.state_dict())
    for one in (run, again):
        one.restart()
        assert one.zeros_kept == 0
        assert all(bool(mask.all()) for mask in one.sparsifier.masks.values())


def test_zeros_that_were_loaded_after_a_release_are_kept() -> None:
    model, _, run = start(schedule="lin", steps=1)
    run.step()
    run.release()
    model.load_state_dict(network().state_dict())
    Sparsifier(model, criteria="small_final").sparsify_model(40)
    run.restart()
    assert run.zeros_kept == run.report().zeros > 0


def test_what_a_schedule_lets_go_is_not_taken_for_zeros_to_keep() -> None:
    _, _, run = start(schedule=lambda p: 1 - abs(2 * p - 1), steps=4)
    for _ in range(3):
        run.step()
    run.restart()
    assert run.zeros_kept == 0


def test_what_was_freed_and_comes_back_to_zero_by_itself_is_no_reason_to_refuse_another_round() -> None:
    """Rprop steps by fixed lengths, so that weights that grew return to exactly 0, one by one and not in units."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    run = SparseTraining(Sparsifier(model, "kernel"), None, 50, "dsd", total_steps=10)
    weight = model[0].weight.detach()
    for _ in range(10):
        weight += 0.25 * (weight == 0)
        run.step()
    weight += 0.25 * (weight == 0)
    run.hold()
    freed = torch.nonzero(~run._let_go._freed["0"].view(-1)).view(-1)
    assert len(freed) == 108
    weight.view(-1)[freed[::4]] = 0
    run.restart()  # 27 zeros, none of them a whole kernel
    run.move_to(0.6)
    assert run.report().zeros >= 108
