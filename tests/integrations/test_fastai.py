"""The callback in real fastai, on the real digits that scikit-learn ships."""

from __future__ import annotations

import contextlib
import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SchedCos, combine_scheds, sched_cos
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, Lookahead, OptimWrapper, RMSProp
from helpers import Net, Watch, digits, learner, quiet
from torch import nn

from gossamer import ArgumentError, GossamerWarning, Schedule, StateError, TargetError
from gossamer.integrations.fastai import KeepSparse, SparsifyCallback
from gossamer.rules.criteria import large_final
from gossamer.rules.schedules import agp, cos, dsd, iterative, lin, one_cycle, one_shot
from gossamer.tickets import load_ticket

PER_LAYER = {"conv1": 30, "conv2": 70, "conv3": 80}


# -- the tutorial's lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "bs"), [(16, 16), (48, 16), (112, 16), (110, 100)])
def test_one_cycle_prints_the_tutorials_lines_with_any_number_of_batches(
    train: int, bs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    learn = learner(dls=digits(train, bs))
    quiet(learn, 5, SparsifyCallback(50, "weight", "local", "large_final", one_cycle))
    out = capsys.readouterr().out.splitlines()
    # 1,152 and 2,880 weights of the two larger layers dominate; counts of whole weights reach the second decimal
    assert out[0] == "Pruning of weight until a sparsity of 50%"
    lines = [line for line in out if line.startswith("Sparsity at")]
    expected = [1.96, 20.07, 45.86, 49.74, 50.00]
    for epoch, (line, percent) in enumerate(zip(lines, expected, strict=True)):
        head, value = line.rsplit(" ", 1)
        assert head == f"Sparsity at the end of epoch {epoch}:"
        assert float(value.rstrip("%")) == pytest.approx(percent, abs=0.03)
    assert "Final Sparsity: 50.00%" in out
    assert "Sparsity Report:" in out
    assert not any(line.startswith("Saving Weights") for line in out)


def test_a_dict_prints_averages_and_leaves_other_layers_dense(capsys: pytest.CaptureFixture[str]) -> None:
    learn = learner()
    callback = SparsifyCallback({"conv2": 70, "conv3": 80}, context="local", schedule=cos)
    quiet(learn, 5, callback)
    out = capsys.readouterr().out
    assert "Pruning of weight until a sparsity of {'conv2': 70, 'conv3': 80}%" in out
    for epoch, p in enumerate([0.0955, 0.3455, 0.6545, 0.9045, 1.0]):
        line = next(s for s in out.splitlines() if s.startswith(f"Sparsity at the end of epoch {epoch}: avg="))
        assert float(line.split("avg=")[1].rstrip("%")) == pytest.approx(75 * p, abs=0.05)
    assert "Final Sparsity: {'conv2': 69.97, 'conv3': 80.0}" in out
    assert [r.zeros for r in callback.report().rows] == [0, 806, 2304]


def test_patterns_name_layers() -> None:
    callback = SparsifyCallback({"conv?": 40, "conv3": 80}, verbose=False)
    quiet(learner(), 1, callback)
    assert [r.zeros for r in callback.report().rows] == [29, 461, 2304]


def test_verbose_false_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet(learner(), 2, SparsifyCallback(50, verbose=False, lth=True, schedule=iterative))
    assert capsys.readouterr().out == ""


def test_sparsity_is_a_column_only_while_the_callback_is_in_the_fit(tmp_path: Path) -> None:
    learn = learner(tmp_path)
    quiet(learn, 2, SparsifyCallback(50, schedule=lin, verbose=False), CSVLogger())
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "accuracy", "sparsity", "time"]
    zeros = sum(int((m.weight == 0).sum()) for m in (learn.model.conv1, learn.model.conv2, learn.model.conv3))
    assert [row[3] for row in learn.recorder.values] == pytest.approx([25.0, 50.0], abs=0.05)
    assert learn.recorder.values[-1][3] == 100 * zeros / 4104
    assert "sparsity" in (tmp_path / "history.csv").read_text().splitlines()[0]
    assert len(learn.validate()) == 2
    quiet(learn, 1)
    assert "sparsity" not in learn.recorder.metric_names


def test_metric_false_adds_no_column() -> None:
    learn = learner()
    quiet(learn, 1, SparsifyCallback(50, verbose=False, metric=False))
    assert "sparsity" not in learn.recorder.metric_names


# -- the laws ---------------------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "SGD": partial(SGD, mom=0.9, wd=0.1),
    "SGD l2": partial(SGD, mom=0.9, wd=0.1, decouple_wd=False),
    "Adam": Adam,
    "RMSProp": partial(RMSProp, mom=0.9),
    "Lookahead": lambda p, **kw: Lookahead(Adam(p, **kw), k=3),
    "torch SGD": partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1)),
    "torch AdamW": partial(OptimWrapper, opt=partial(torch.optim.AdamW, amsgrad=True)),
}


def chain_of(groups: Any) -> list[torch.Tensor]:
    return [p for group in groups for p in group]


def slow_of(optimizer: Any) -> Any:
    """What Lookahead remembers beside the state of the optimizer inside."""
    return vars(optimizer).get("slow_weights") or []


@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("context", ["local", "global"])
def test_masked_weights_and_their_state_are_zero_after_every_step(opt: str, context: str) -> None:
    callback = SparsifyCallback(80, context=context, schedule=lin, verbose=False)
    seen: list[float] = []

    def look(learn: Learner) -> None:
        state = getattr(learn.opt, "opt", learn.opt)
        state = getattr(state, "state")  # noqa: B009  (fastai and torch spell the same thing)
        for name, mask in callback.sparse.sparsifier.masks.items():
            weight = learn.model.get_submodule(name).weight
            assert not weight[~mask].any(), name
            for key, value in state[weight].items():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    assert not value[~mask].any(), (name, key)
                    assert value[mask].any()
            for fast, slow in zip(*map(chain_of, (learn.opt.param_lists, slow_of(learn.opt))), strict=False):
                assert fast is not weight or (not slow[~mask].any() and slow[mask].any()), name
        seen.append(callback.sparsity_now())

    quiet(learner(opt_func=OPTIMIZERS[opt]), 2, callback, Watch(look))
    assert len(seen) == 14
    assert seen == sorted(seen)
    if context == "local":
        assert [r.zeros for r in callback.report().rows] == [58, 922, 2304]
    assert callback.report().zeros == (3283 if context == "global" else 3284)


def test_the_masks_stand_at_the_target_even_if_the_last_batch_makes_no_step() -> None:
    callback = SparsifyCallback(50, schedule=lin, verbose=False)
    steps: list[int] = []
    # 7 batches of 16, a step every 32 images: the seventh batch never steps
    quiet(learner(), 2, callback, GradientAccumulation(32), Watch(lambda learn: steps.append(learn.iter)))
    assert 6 not in steps[:3]
    assert [r.zeros for r in callback.report().rows] == [36, 576, 1440]
    assert [h["sparsity"] for h in callback.history] == pytest.approx([25.0, 50.0], abs=0.05)


@pytest.mark.filterwarnings("ignore:.*CUDA")
def test_clipping_and_mixed_precision_keep_zeros() -> None:
    callback = SparsifyCallback(80, schedule=lin, verbose=False)
    zeros: list[int] = []
    quiet(
        learner(),
        2,
        callback,
        GradientClip(0.1),
        MixedPrecision(amp_mode="bf16"),
        Watch(lambda _: zeros.append(callback.report().zeros)),
    )
    assert zeros[-1] == 3284
    assert zeros == sorted(zeros)


def test_nothing_of_ours_is_on_the_model() -> None:
    learn = learner()
    keys = list(learn.model.state_dict())
    before = {n: set(vars(m)) for n, m in learn.model.named_modules()}

    def look(learn: Learner) -> None:
        assert list(learn.model.state_dict()) == keys
        for name, module in learn.model.named_modules():
            assert set(vars(module)) == before[name]
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._buffers)
            assert not any(hooks[:3])
        Net().load_state_dict(learn.model.state_dict())
        Net().load_state_dict(copy.deepcopy(learn.model).state_dict())

    quiet(
        learn, 1, SparsifyCallback(50, granularity="filter", lth=True, schedule=iterative, verbose=False), Watch(look)
    )
    look(learn)


def test_two_callbacks_share_nothing() -> None:
    first, second = (SparsifyCallback(s, schedule=one_cycle, verbose=False) for s in (30, 90))
    quiet(learner(), 1, first)
    quiet(learner(), 1, second)
    assert (first.report().zeros, second.report().zeros) == (1232, 3694)


def test_filter_granularity_silences_the_channel() -> None:
    learn = learner()
    quiet(learn, 1, SparsifyCallback(50, granularity="filter", schedule=lin, verbose=False))
    net = learn.model.eval()
    dead = (net.conv2.weight == 0).flatten(1).all(1)
    assert int(dead.sum()) == 8
    for parameter in (net.conv2.bias, net.bn2.weight, net.bn2.bias):
        assert torch.equal(parameter == 0, dead)
    x = net.bn1(net.conv1(torch.rand(2, 1, 8, 8))).relu()
    assert not net.bn2(net.conv2(x))[:, dead].any()


def test_round_to_and_submodule_and_layer_type() -> None:
    learn = learner()
    quiet(
        learn,
        1,
        SparsifyCallback(60, granularity="filter", round_to=8, schedule=lin, verbose=False, exclude=["conv1", "conv3"]),
    )
    assert int((learn.model.conv2.weight != 0).flatten(1).any(1).sum()) == 8
    learn = learner()
    callback = SparsifyCallback(50, model=learn.model.conv2, verbose=False)
    quiet(learn, 1, callback)
    assert [(r.layer, r.zeros) for r in callback.report().rows] == [("", 576)]
    learn = learner()
    callback = SparsifyCallback(50, layer_type=(nn.Conv2d, nn.Linear), verbose=False)
    quiet(learn, 1, callback)
    assert [r.zeros for r in callback.report().rows] == [36, 576, 1440, 100]


def test_n_m_pattern_holds_in_the_trained_network() -> None:
    learn = learner()
    quiet(learn, 2, SparsifyCallback(50, context="2:4", schedule=cos, exclude="conv1", verbose=False))
    kept = (learn.model.conv3.weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1)
    assert set(kept.tolist()) == {2}


# -- schedules and criteria as users give them ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        "agp",
        agp,
        one_shot,
        lin,
        Schedule(sched_cos, 0.2, 0.8),
        sched_cos,
        SchedCos(0, 1),
        combine_scheds([0.3, 0.7], [SchedCos(0, 0.5), SchedCos(0.5, 1)]),
        lambda pos: pos**2,
        lambda start, end, pos: start + (end - start) * pos,
    ],
)
def test_any_schedule_ends_exactly_at_the_target(schedule: Any) -> None:
    callback = SparsifyCallback(50, schedule=schedule, verbose=False)
    quiet(learner(), 2, callback)
    assert [r.zeros for r in callback.report().rows] == [36, 576, 1440]


def test_dsd_ends_dense_again() -> None:
    callback = SparsifyCallback(50, schedule=dsd, verbose=False)
    most: list[float] = []
    quiet(learner(), 2, callback, Watch(lambda _: most.append(callback.sparsity_now())))
    assert max(most) == pytest.approx(50, abs=0.05)
    assert callback.sparse.sparsifier.masks.masked("conv3") == 0


@pytest.mark.parametrize("criteria", ["magnitude", "movmag", "updating_movement", "random", lambda w: w.abs()])
def test_any_criterion_trains(criteria: Any) -> None:
    callback = SparsifyCallback(50, criteria=criteria, verbose=False)
    quiet(learner(), 1, callback)
    assert [r.zeros for r in callback.report().rows] == [36, 576, 1440]


# -- lottery tickets --------------------------------------------------------------------------------------------------


def test_lth_rewinds_at_every_step_of_a_stepwise_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    learn = learner()
    start = copy.deepcopy(learn.model.state_dict())
    callback = SparsifyCallback(60, schedule=iterative, lth=True)
    rewound: list[float] = []

    def look(learn: Learner) -> None:
        masks = callback.sparse.sparsifier.masks
        same = all(
            torch.equal(learn.model.state_dict()[f"{n}.weight"], start[f"{n}.weight"] * m) for n, m in masks.items()
        )
        if same:
            rewound.append(callback.sparsity_now())
            assert torch.equal(learn.model.head.weight, start["head.weight"])
            assert torch.equal(learn.model.bn1.running_mean, start["bn1.running_mean"])
            state = learn.opt.state[learn.model.conv2.weight]
            assert not [k for k, v in state.items() if isinstance(v, torch.Tensor)]

    quiet(learn, 5, callback, Watch(look))
    assert rewound == pytest.approx([20, 40, 60], abs=0.1)
    assert not torch.equal(learn.model.head.weight, start["head.weight"])
    assert capsys.readouterr().out.count("Saving Weights at epoch 0") == 1


def test_lth_takes_lookaheads_slow_weights_back_too() -> None:
    """Else the next of its steps would bring the trained weights back."""
    learn = learner(opt_func=OPTIMIZERS["Lookahead"])
    callback = SparsifyCallback(50, schedule=lin, lth=True, verbose=False)
    began: dict[str, torch.Tensor] = {}
    checked: list[bool] = []

    def look(learn: Any) -> None:
        if not began:
            began.update({n: p.detach().clone() for n, p in learn.model.named_parameters()})
            return
        slow = dict(zip(map(id, chain_of(learn.opt.param_lists)), chain_of(slow_of(learn.opt)), strict=True))
        masks = {f"{n}.weight": m for n, m in callback.sparse.sparsifier.masks.items()}
        for name, parameter in learn.model.named_parameters():
            assert torch.equal(slow[id(parameter)], began[name] * masks.get(name, 1)), name
        checked.append(True)

    quiet(learn, 3, callback, Watch(look, "before_train"))
    assert len(checked) == 2


def test_lth_with_a_smooth_schedule_makes_each_epoch_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    learn = learner()
    start = copy.deepcopy(learn.model.state_dict())
    callback = SparsifyCallback(50, schedule=lin, lth=True)
    moved: list[float] = []
    fresh: list[bool] = []

    def before_batch(learn: Learner) -> None:
        if learn.training and learn.iter == 0:
            masks = callback.sparse.sparsifier.masks
            fresh.append(torch.equal(learn.model.conv3.weight, start["conv3.weight"] * masks["conv3"]))

    quiet(
        learn,
        4,
        callback,
        Watch(lambda _: moved.append(callback.sparsity_now())),
        Watch(before_batch, "before_batch"),
    )
    assert fresh == [True] * 4
    assert len(set(moved)) == 4  # 0, 12.5, 25, 37.5 while training; 50 at the very end
    assert callback.sparsity_now() == 50
    assert not torch.equal(learn.model.head.weight, start["head.weight"]), "the last round is not rewound"
    assert capsys.readouterr().out.count("each epoch is one round") == 1


def test_rewind_epoch_saves_and_restores_the_weights_of_that_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    learn = learner()
    at_two: dict[str, torch.Tensor] = {}
    callback = SparsifyCallback(50, schedule=one_shot, lth=True, rewind_epoch=2)

    def keep(learn: Learner) -> None:
        if learn.epoch == 2:
            at_two.update(copy.deepcopy(learn.model.state_dict()))

    rewound: list[bool] = []

    def look(learn: Learner) -> None:
        if at_two:
            rewound.append(
                torch.equal(
                    learn.model.conv3.weight, at_two["conv3.weight"] * callback.sparse.sparsifier.masks["conv3"]
                )
            )

    quiet(learn, 4, callback, Watch(keep, "before_train"), Watch(look))
    assert rewound.count(True) == 1
    assert "Saving Weights at epoch 2" in capsys.readouterr().out


def test_rewind_epoch_after_pruning_starts_is_an_error_that_says_how() -> None:
    with pytest.raises(ArgumentError, match=r"rewind_epoch=2 of 5 comes after pruning starts.*between\(0.4, 1\)"):
        quiet(learner(), 5, SparsifyCallback(50, schedule=cos, lth=True, rewind_epoch=2, verbose=False))
    quiet(learner(), 5, SparsifyCallback(50, schedule=cos.between(0.4, 1), lth=True, rewind_epoch=2, verbose=False))
    with pytest.raises(ArgumentError, match="rewind_epoch=5 is not in a fit of 5 epochs"):
        quiet(learner(), 5, SparsifyCallback(50, schedule=cos, lth=True, rewind_epoch=5, verbose=False))


def test_reset_end_gives_the_supermask_network() -> None:
    learn = learner()
    start = copy.deepcopy(learn.model.state_dict())
    callback = SparsifyCallback(50, reset_end=True, verbose=False)
    quiet(learn, 2, callback)
    masks = callback.sparse.sparsifier.masks
    for name, tensor in learn.model.state_dict().items():
        mask = masks.get(name.removesuffix(".weight"))
        assert torch.equal(tensor, start[name] if mask is None else start[name] * mask), name


@pytest.mark.parametrize(("schedule", "percents"), [(iterative, [16.67, 33.33, 50]), (lin, [25, 50])])
def test_tickets_hold_what_their_names_say(tmp_path: Path, schedule: Schedule, percents: list[float]) -> None:
    learn = learner(tmp_path)
    start = copy.deepcopy(learn.model.state_dict())
    callback = SparsifyCallback(50, schedule=schedule, lth=True, save_tickets=True, verbose=False)
    quiet(learn, 2, callback)
    files = sorted((tmp_path / "models").glob("*.safetensors"))
    assert files == sorted(callback.tickets)
    assert [float(f.stem.split("_")[1]) for f in files] == pytest.approx(percents, abs=0.03)
    for file in files:
        ticket = load_ticket(file)
        net = Net()
        ticket.apply_to(net)
        zeros = sum(int((c.weight == 0).sum()) for c in (net.conv1, net.conv2, net.conv3))
        assert file.name == f"ticket_{100 * zeros / 4104:.2f}.safetensors"
        assert torch.equal(net.conv3.weight, start["conv3.weight"] * ticket.masks["conv3"])


def test_ticket_dir_is_the_users(tmp_path: Path) -> None:
    callback = SparsifyCallback(50, save_tickets=True, schedule=one_shot, ticket_dir=tmp_path / "mine", verbose=False)
    quiet(learner(tmp_path / "other"), 2, callback)
    assert [p.parent for p in callback.tickets] == [tmp_path / "mine"]


# -- around the fit ---------------------------------------------------------------------------------------------------


def test_a_second_fit_goes_on_and_never_back(capsys: pytest.CaptureFixture[str]) -> None:
    learn, callback = learner(), SparsifyCallback(50, schedule=lin)
    quiet(learn, 2, callback)
    capsys.readouterr()
    quiet(learn, 2, callback)
    out = capsys.readouterr().out
    assert "Sparsity at the end of epoch 0: 50.00%" in out
    callback.release()
    quiet(learn, 1)
    assert callback.report().zeros < 1000  # a weight that sees only the digits' empty border has no gradient to grow by


def test_start_epoch_stands_where_that_epoch_does() -> None:
    learn, callback = learner(), SparsifyCallback(50, schedule=lin, verbose=False)
    with learn.no_bar():
        learn.fit(4, 1e-2, cbs=[callback], start_epoch=2)
    assert [(h["epoch"], round(h["sparsity"], 1)) for h in callback.history] == [(2, 37.5), (3, 50.0)]
    with pytest.raises(StateError, match="weights of epoch 0 were never saved"), learn.no_bar():
        learn.fit(4, 1e-2, cbs=[SparsifyCallback(50, schedule=lin, lth=True, verbose=False)], start_epoch=2)


@pytest.mark.filterwarnings("ignore:.*numpy.core is deprecated", "ignore:Saved file doesn")
def test_save_model_validate_get_preds_and_lr_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn = learner(tmp_path)
    callback = SparsifyCallback(50, schedule=lin)
    learn.add_cb(callback)
    with learn.no_bar():
        learn.lr_find(show_plot=False, num_it=5)
        assert callback.sparse is None
        learn.fit(1, 1e-2, cbs=SaveModelCallback())
        capsys.readouterr()
        learn.validate()
        learn.get_preds()
        learn.lr_find(show_plot=False, num_it=5)
        assert capsys.readouterr().out == ""
    assert callback.report().zeros == 2052
    learn.load("model")
    assert callback.report().zeros == 2052


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, CancelFitException, CancelTrainException])
def test_an_interrupt_leaves_the_masks_of_the_last_step_and_a_callback_that_goes_on(error: type[BaseException]) -> None:
    learn, callback = learner(), SparsifyCallback(50, schedule=lin, verbose=False)
    at: list[int] = []

    def stop(learn: Learner) -> None:
        if learn.training and learn.epoch == 1 and learn.iter == 2:
            at.append(callback.report().zeros)
            raise error("stopped by the test")

    with contextlib.suppress(KeyboardInterrupt, RuntimeError):
        quiet(learn, 2, callback, Watch(stop, "after_pred"))
    assert callback.report().zeros == at[0]
    assert len(learn.metrics) == 1
    quiet(learn, 2, callback)
    assert callback.report().zeros == 2052


@pytest.mark.filterwarnings("ignore:.*numpy.core is deprecated", "ignore:Saved file doesn")
def test_a_best_checkpoint_from_before_the_target_is_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn, callback = learner(tmp_path), SparsifyCallback(50, schedule=lin)
    early = SaveModelCallback(monitor="sparsity", comp=np.less)
    with pytest.warns(GossamerWarning, match=r"12\.50 % are zero.*best checkpoint"):
        quiet(learn, 4, callback, early)
    assert "Final Sparsity: 12.50%" in capsys.readouterr().out


def test_two_callbacks_have_a_column_each() -> None:
    learn = learner()
    quiet(
        learn,
        1,
        SparsifyCallback({"conv2": 50}, verbose=False),
        SparsifyCallback({"conv3": 80}, verbose=False),
    )
    assert list(learn.recorder.metric_names).count("sparsity") == 2
    assert list(learn.recorder.values[-1][3:]) == pytest.approx([50, 80], abs=0.05)


def test_an_interrupted_fit_leaves_no_column_and_no_helper_on_the_learner() -> None:
    def stop(_: Learner) -> None:
        raise KeyboardInterrupt

    learn = learner()
    callbacks = len(learn.cbs)
    with contextlib.suppress(KeyboardInterrupt):
        quiet(learn, 1, SparsifyCallback(50, verbose=False), Watch(stop))
    learn.remove_cb(KeepSparse)
    assert (len(learn.metrics), len(learn.cbs)) == (1, callbacks)
    learn = learner(cbs=SparsifyCallback(50, verbose=False))
    with contextlib.suppress(KeyboardInterrupt):
        quiet(learn, 1, Watch(stop))
    assert len(learn.validate()) == 2


def test_a_pickled_callback_is_a_plain_one_and_a_copied_one_works_on(tmp_path: Path) -> None:
    learn = learner(tmp_path, cbs=SparsifyCallback(50, schedule=lin, verbose=False))
    quiet(learn, 1)
    # What is exported must load where Gossamer is not, so nothing of it is in the file.
    pickled = pickle.dumps(learn.sparsify)
    assert b"gossamer" not in pickled
    assert type(pickle.loads(pickled)) is Callback
    twin = copy.deepcopy(learn)
    assert twin.sparsify.criteria is large_final
    assert twin.sparsify.sparse.sparsifier.masks.masked("conv3") == 1440
    before = learn.model.conv3.weight.detach().clone()
    quiet(twin, 1, Watch(lambda learn: _assert_masked(learn, twin.sparsify)))
    assert twin.sparsify.report().zeros == 2052
    assert not torch.equal(twin.model.conv3.weight, before)
    assert torch.equal(learn.model.conv3.weight, before)  # the copy has a network of its own


def _assert_masked(learn: Learner, callback: SparsifyCallback) -> None:
    for name, mask in callback.sparse.sparsifier.masks.items():
        assert not learn.model.get_submodule(name).weight[~mask].any(), name


def test_dsd_that_was_interrupted_ends_dense_in_the_next_fit() -> None:
    def stop(learn: Learner) -> None:
        if learn.epoch == 1:
            raise CancelFitException

    learn, callback = learner(), SparsifyCallback(50, schedule=dsd, verbose=False)
    quiet(learn, 2, callback, Watch(stop, "after_batch"))
    assert callback.sparsity_now() > 45
    quiet(learn, 2, callback)
    assert callback.sparse.sparsifier.masks.masked("conv3") == 0


def test_a_ramp_with_a_plateau_is_no_step() -> None:
    rewound: list[int] = []
    callback = SparsifyCallback(50, schedule=lambda p: min(1.0, 4 * p), lth=True, verbose=False)
    start: dict[str, torch.Tensor] = {}

    def look(learn: Learner) -> None:
        mask = callback.sparse.sparsifier.masks["conv3"]
        if mask.all() or not torch.equal(learn.model.conv3.weight, start["conv3.weight"] * mask):
            return
        rewound.append(learn.epoch)

    learn = learner()
    start.update(copy.deepcopy(learn.model.state_dict()))
    quiet(learn, 4, callback, Watch(look))
    assert rewound == []


# -- errors come early ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": 120}, "outside"),
        ({"sparsity": "50"}, "no number"),
        ({"sparsity": {"conv1": -1}}, "outside"),
        ({"sparsity": {"conv1": 30}, "context": "global"}, "context='local'"),
        ({"granularity": "filtr"}, "Closest: filter"),
        ({"context": "glob"}, "unknown context"),
        ({"context": "4:2"}, "at most M"),
        ({"criteria": "large_finl"}, "Closest: large_final"),
        ({"criteria": 3}, "needs a function"),
        ({"criteria": lambda weight, gradent: weight}, "gradent"),
        ({"schedule": "onecycle"}, "Closest: one_cycle"),
        ({"schedule": SchedCos(0, 50)}, "runs from 0 to 1"),
        ({"schedule": SchedCos}, "called first"),
        ({"rewind_epoch": -1}, "count from 0"),
        ({"rewind_epoch": 1}, "add lth=True"),
        ({"round_to": 0}, "no positive integer"),
        ({"round_to": 8, "context": "2:4"}, "break the pattern 2:4"),
        ({"context": "2:4", "sparsity": 40}, "pass sparsity=50"),
        ({"layer_type": nn.ReLU}, "no weight"),
        ({"layer_type": "Linear"}, "such as nn.Linear"),
    ],
)
def test_a_bad_argument_raises_where_it_is_given(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        SparsifyCallback(**{"sparsity": 50, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": {"conv9": 50}}, "no layer is called 'conv9'. Closest: conv"),
        ({"context": "2:4"}, "exclude=\\['conv1'\\]"),
        ({"round_to": 16, "sparsity": {"conv1": 50}, "granularity": "filter"}, "use at most 8"),
        ({"model": Net()}, "no part of the learner's model"),
        ({"layer_type": nn.Conv3d}, "no Conv3d layer"),
        ({"exclude": "nothing"}, "no layer is called 'nothing'"),
    ],
)
def test_what_depends_on_the_network_raises_before_the_first_batch(arguments: dict[str, Any], words: str) -> None:
    learn = learner()
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises((ArgumentError, TargetError), match=words):
        quiet(learn, 1, SparsifyCallback(**{"sparsity": 50, "verbose": False, **arguments}))
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())


def test_a_fraction_where_a_percentage_belongs_is_pointed_out() -> None:
    with pytest.warns(GossamerWarning, match="50 means half"):
        SparsifyCallback(0.5)


def test_rounding_that_leaves_everything_dense_is_pointed_out() -> None:
    learn = learner()
    callback = SparsifyCallback(50, "filter", round_to=16, exclude=["conv1", "conv3"], verbose=False)
    with pytest.warns(GossamerWarning, match="round_to=16 leaves every layer dense"):
        quiet(learn, 1, callback)
    assert callback.report().zeros == 0


def test_a_layer_of_another_type_is_named_with_its_type() -> None:
    with pytest.raises(TargetError, match="'head' takes no part; it is a Linear"):
        quiet(learner(), 1, SparsifyCallback({"head": 50}, verbose=False))


def test_the_plot_asks_for_the_average_over_layers_as_the_dots_count_it() -> None:
    from matplotlib.figure import Figure

    callback = SparsifyCallback({"conv?": 40, "conv3": 80}, schedule=lin, verbose=False)
    quiet(learner(), 1, callback)
    asked, counted = callback.plot(Figure().subplots()).lines
    assert asked.get_ydata()[-1] == pytest.approx(160 / 3)
    assert counted.get_ydata()[-1] == pytest.approx(160 / 3, abs=0.2)


def test_plot_and_report_before_a_fit_say_what_is_missing() -> None:
    with pytest.raises(StateError, match="has not been in a fit"):
        SparsifyCallback(50).report()
