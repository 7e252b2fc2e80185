"""Every method, criterion of data and context through the callback: at the target, zeros exact, resumed bit by bit."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from helpers import Net, Watch, digits, learner, quiet
from torch import nn

import plain
from gossamer import CRITERIA, ArgumentError, GossamerWarning, Schedule
from gossamer.integrations.fastai import SparsifyCallback
from gossamer.integrations.fastai.data import TrainingBatches
from gossamer.methods import ACDC, DSD, SET, RigL
from gossamer.rules.criteria import OF_DATA
from gossamer.training import SparseTraining

METHODS = {
    "rigl": RigL(every_n_steps=2),
    "set": SET(every_n_steps=2),
    "acdc": ACDC(0.2, 0.1, 0.2),
    "dsd": DSD(),
    "static": "static",
    "granet": RigL(every_n_steps=3),
}
OPTIMIZERS = {"fastai's": {}, "torch's": {"opt_func": lambda p, **k: OptimWrapper(p, torch.optim.AdamW, **k)}}


def rules(method: str, **changes: Any) -> SparsifyCallback:
    schedule = "lin" if method == "granet" else None
    return SparsifyCallback(
        **{"sparsity": 70, "schedule": schedule, "method": METHODS[method], "verbose": False, **changes}
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_after_every_step_zeros_are_exact_and_at_the_end_the_target_is_met(method, optimizer):
    learn, callback = learner(**OPTIMIZERS[optimizer]), rules(method)
    moved: set[bytes] = set()

    def look(learn: Learner) -> None:
        for target in callback.sparse.sparsifier.targets:
            gone = ~callback.sparse.sparsifier.masks[target.name]
            assert not target.weight[gone].any()
            moved.add(gone.numpy().tobytes())
            opt = getattr(learn.opt, "opt", learn.opt)
            state = [v for v in opt.state[target.weight].values() if getattr(v, "shape", None) == gone.shape]
            assert not any(v[gone].any() for v in state)

    quiet(learn, 3, callback, Watch(look))
    # 72, 1,152 and 2,880 weights
    expected = [0, 0, 0] if method == "dsd" else [50, 806, 2016]
    assert [callback.sparse.sparsifier.masks.masked(n) for n in callback.sparse.targets] == expected
    assert len(moved) == 3 if method == "static" else len(moved) > 5
    if method != "dsd":  # where some stay zero, since no gradient reaches them
        assert callback.history[-1]["sparsity"] == pytest.approx(70, abs=0.5)


class Stop(Callback):
    order = 1000

    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def after_step(self) -> None:
        if self.epoch == self.at:
            raise KeyboardInterrupt


def fresh() -> Learner:
    torch.manual_seed(2)
    random.seed(2)  # the loader shuffles with it
    learn = Learner(digits(train=64), Net(), loss_func=nn.CrossEntropyLoss())
    learn.logger = lambda *_: None
    return learn


def fit(callback: SparsifyCallback, *more: Callback) -> Learner:
    learn = fresh()
    with learn.no_bar(), contextlib.suppress(KeyboardInterrupt):
        learn.fit(4, 1e-2, cbs=[callback, *more])
    return learn


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_that_is_broken_off_and_resumed_is_bit_identical(method, tmp_path: Path):
    whole = fit(rules(method, checkpoint=tmp_path / "whole.safetensors"))
    fit(rules(method, checkpoint=tmp_path / "run.safetensors"), Stop(2))
    callback = rules(method, checkpoint=tmp_path / "run.safetensors", resume=True)
    resumed = fit(callback)
    for name, tensor in whole.model.state_dict().items():
        assert plain.bits(tensor) == plain.bits(resumed.model.state_dict()[name]), name
    assert len(callback.history) == 4


@pytest.mark.parametrize("criterion", [n for n, c in CRITERIA.items() if OF_DATA & set(c.needs)] + ["sanh_movement"])
def test_a_criterion_of_data_gets_it_from_the_callbacks_own_loader_and_is_resumed(criterion, tmp_path: Path):
    schedule = Schedule(lambda p: p, every_n_steps=2)

    def callback(**more: Any) -> SparsifyCallback:
        return SparsifyCallback(
            60,
            criteria=criterion,
            schedule=schedule,
            data=2,
            verbose=False,
            checkpoint=tmp_path / "run.safetensors",
            **more,
        )

    surface = plain.surface(Net())
    whole = fit(callback())
    assert plain.surface(whole.model) == surface
    (tmp_path / "run.safetensors").unlink()
    fit(callback(), Stop(1))
    resumed = fit(again := callback(resume=True))
    assert all(plain.bits(t) == plain.bits(resumed.model.state_dict()[n]) for n, t in whole.model.state_dict().items())
    assert [r.zeros for r in again.report().rows[:3]] == [43, 691, 1728]


def test_looking_at_data_uses_up_no_random_numbers_and_no_batch():
    """In the middle of an epoch, after every step: the fit goes on as if nobody had looked."""
    weights: list[list[torch.Tensor]] = []
    for looks in (False, True):
        learn = fresh()
        found: list[Any] = []
        batches = TrainingBatches(lambda learn=learn: learn, 2)
        watch = Watch(lambda _, b=batches, f=found, looks=looks: f.extend(b) if looks else None)
        with learn.no_bar():
            learn.fit(2, 1e-2, cbs=[watch])
        weights.append(list(learn.model.state_dict().values()))
        assert len(found) == (16 if looks else 0)
    assert all(isinstance(x, torch.Tensor) and x.shape == (16, 1, 8, 8) for ((x,), (y,)) in found)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_data_of_ones_own_and_the_whole_networks_loss_for_a_part():
    learn = learner()
    batches = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))]
    callback = SparsifyCallback(
        50, criteria="taylor", schedule="constant", model=learn.model.conv2, data=batches, verbose=False
    )
    quiet(learn, 1, callback)
    assert [r.zeros for r in callback.report().rows] == [576]


@pytest.mark.filterwarnings("ignore:method .* exchanges no weight")
def test_a_method_that_starts_sparse_is_sparse_before_the_first_batch():
    seen: list[float] = []
    callback = SparsifyCallback(90, context="erk", method="rigl", verbose=False)
    quiet(learner(), 1, callback, Watch(lambda _: seen.append(callback.sparsity_now()), "before_batch"))
    assert {round(s) for s in seen} == {90}


@pytest.mark.parametrize(
    "more",
    [[GradientAccumulation(32)], [GradientClip(0.1)]],
    ids=["accumulate", "clip"],
)
def test_gradients_are_looked_at_right_before_the_step(more, monkeypatch):
    """Unscaled, clipped, and only where the optimizer steps: as they are when it does."""
    learn = learner()
    callback = SparsifyCallback(70, method=RigL(every_n_steps=1), verbose=False)
    looked: list[float] = []
    stepped: list[float] = []

    def norm() -> float:
        return float(torch.stack([p.grad.norm() for p in learn.model.parameters()]).norm())

    class Spy(Callback):
        order = 13

        def before_step(self) -> None:
            stepped.append(norm())

    real = SparseTraining.before_step

    def spy(run: SparseTraining, position: float | None = None) -> None:
        looked.append(norm())
        real(run, position)

    monkeypatch.setattr(SparseTraining, "before_step", spy)
    quiet(learn, 1, callback, Spy(), *more)
    assert looked == stepped
    assert len(looked) == (3 if isinstance(more[0], GradientAccumulation) else 7)
    if isinstance(more[0], GradientClip):
        assert max(looked) <= 0.1001


def test_masks_move_only_every_so_many_steps_and_stand_at_the_target_in_the_end():
    callback = SparsifyCallback(50, schedule=Schedule(lambda p: p, every_n_steps=5), verbose=False)
    seen: list[int] = []
    quiet(learner(), 2, callback, Watch(lambda _: seen.append(callback.sparse.sparsifier.masks.masked("conv2"))))
    at = [math_round(576 * (i + 1) / 14) for i in range(14)]
    assert seen == [0] * 4 + [at[4]] * 5 + [at[9]] * 4 + [576]
    assert callback.history[0]["sparsity"] == pytest.approx(50 * 5 / 14, abs=0.1)


def math_round(x: float) -> int:
    return int(x + 0.5)


def test_a_dict_with_a_star_fixes_layers_and_lets_the_others_compete():
    callback = SparsifyCallback({"conv1": 25, "*": 80}, context="global", verbose=False)
    quiet(learner(), 1, callback)
    masked = {n: callback.sparse.sparsifier.masks.masked(n) for n in callback.sparse.targets}
    assert masked["conv1"] == 18
    assert masked["conv2"] + masked["conv3"] == math_round(0.8 * (1152 + 2880))


def test_what_is_said_names_the_method_and_that_the_fit_is_too_short_for_it():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.warns(GossamerWarning, match="'set' exchanges no weight in"):
        quiet(learner(), 1, SparsifyCallback(80, method="set"))
    assert out.getvalue().startswith("Training by method 'set' with weight at a sparsity of 80%")
    assert "Final Sparsity: 80.0" in out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "rigel"}, "rigl"),
        ({"method": RigL}, r"RigL\(\)"),
        ({"method": RigL(), "lth": True}, "lth=True"),
        ({"data": 0}, "data=0"),
        ({"data": None}, "data=None"),
        ({"reduction": "mode"}, "'mode'"),
        ({"normalization": "lapm"}, "lamp"),
        ({"sparsity": {"conv1": 50}, "context": "erk"}, r"add '\*'"),
        ({"sparsity": {"conv1": 50, "*": 120}, "context": "erk"}, "120"),
    ],
)
def test_a_bad_argument_raises_when_the_callback_is_made(arguments, said):
    with pytest.raises(ArgumentError, match=said):
        SparsifyCallback(**{"sparsity": 50, **arguments})


@pytest.mark.parametrize(
    ("granularity", "context", "said"), [("filter", "erk", 1), ("weight", "erk", 0), ("filter", "local", 0)]
)
def test_a_target_of_units_of_different_sizes_is_said_to_be_one(granularity, context, said, capsys):
    images = [(torch.randn(3, 8, 8), torch.tensor(i % 2)) for i in range(16)]
    dls = DataLoaders.from_dsets(images[:8], images[8:], bs=4, num_workers=0, device="cpu")
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Conv2d(10, 30, 3), nn.Flatten(), nn.Linear(480, 2))
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=SparsifyCallback(50, granularity=granularity, context=context))
    assert capsys.readouterr().out.count("The 50% asked for count units of granularity 'filter'") == said
