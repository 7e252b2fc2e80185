"""Sparse fits among everything else that people do with a learner: other callbacks, stops, saves, and further fits."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import module_summary
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner, Recorder, ValueMetric
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from helpers import Net, Watch, digits, fastai_digits, learner, quiet
from torch import nn

import plain
from gossamer import ArgumentError, GossamerWarning, StateError
from gossamer.integrations.fastai import KeepSparse, SaveSparseModelCallback, SparsifyCallback
from gossamer.integrations.fastai.guard import Guard
from gossamer.rules.schedules import dsd, lin, one_cycle

pytestmark = [
    # fastai's own: checkpoints without an optimizer, checkpoints read with pickle, mixed precision without CUDA
    pytest.mark.filterwarnings("ignore:.*numpy.core is deprecated"),
    pytest.mark.filterwarnings("ignore:Saved file doesn"),
    pytest.mark.filterwarnings("ignore:.*CUDA"),
]

LAYERS = ("conv1", "conv2", "conv3")
HALF = [36, 576, 1440]
"""Zeros of the three layers at 50 %."""


def zeros(model: nn.Module) -> list[int]:
    return [plain.zeros(model.get_submodule(n).weight) for n in LAYERS]


class Checks(Watch):
    """After every step, and after every epoch: what was masked once is exactly zero, whoever has the masks now."""

    def __init__(self, masks: Callable[[], Any]) -> None:
        super().__init__(self._check)
        self.masks, self.steps = masks, 0

    def _check(self, learn: Learner) -> None:
        for name, mask in self.masks().items():
            assert not learn.model.get_submodule(name).weight[~mask].any(), name
        self.steps += 1

    def after_epoch(self) -> None:
        self._check(self.learn)


def of(callback: SparsifyCallback) -> Checks:
    return Checks(lambda: callback.sparse.sparsifier.masks)


def now(callback: SparsifyCallback) -> Checks:
    """The masks as they are now, which whatever follows must respect."""
    masks = {n: m.clone() for n, m in callback.sparse.sparsifier.masks.items()}
    return Checks(lambda: masks)


def small(tmp_path: Path | None = None, **kwargs: Any) -> Learner:
    return learner(tmp_path, digits(32, 8, 16), **kwargs)


def half(**kwargs: Any) -> SparsifyCallback:
    kwargs = {"schedule": lin.between(0, 0.5), "verbose": False, **kwargs}
    return SparsifyCallback(50, **kwargs)


def scripted(values: list[float]) -> ValueMetric:
    """A metric that is good and bad when the test wants it."""
    feed: Iterator[float] = iter(values)
    return ValueMetric(lambda: next(feed), "scripted")


def states(learn: Learner) -> tuple[Watch, list[dict[str, torch.Tensor]]]:
    """The network as it was at the end of each epoch."""
    seen: list[dict[str, torch.Tensor]] = []
    return Watch(lambda learn: seen.append(copy.deepcopy(learn.model.state_dict())), "after_epoch"), seen


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# -- beside other callbacks -------------------------------------------------------------------------------------------


class Average(Callback):
    """The mean of the parameters after each step since some epoch, as averaging callbacks take it."""

    def __init__(self, since: int) -> None:
        self.since, self.n, self.mean = since, 0, {}

    def after_step(self) -> None:
        if self.epoch < self.since:
            return
        self.n += 1
        for name, parameter in self.model.named_parameters():
            old = self.mean.setdefault(name, torch.zeros_like(parameter))
            self.mean[name] = old + (parameter.detach() - old) / self.n


class Board(Callback):
    """Reads what TensorBoard's and W&B's callbacks read, when they read it."""

    order = Recorder.order + 1

    def before_fit(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def after_epoch(self) -> None:
        recorder = self.recorder
        self.rows.append(dict(zip(recorder.metric_names, recorder.log, strict=False)))
        assert list(recorder.values[-1]) == list(recorder.log[1 : 1 + len(recorder.values[-1])])


def _saved(name: str) -> Callable[[Learner, Any, Path], None]:
    def check(learn: Learner, _: Any, path: Path) -> None:
        saved = torch.load(path / "models" / f"{name}.pth", weights_only=False)
        assert same(saved.get("model", saved), learn.model.state_dict())

    return check


def _every_epoch(learn: Learner, _: Any, path: Path) -> None:
    counted = []
    for epoch in range(4):
        net = Net()
        net.load_state_dict(torch.load(path / "models" / f"model_{epoch}.pth"))
        counted.append(zeros(net))
    assert counted == [[18, 288, 720], HALF, HALF, HALF]


def _stopped(learn: Learner, _: Any, path: Path) -> None:
    assert len(learn.recorder.values) == 3


def _slower(learn: Learner, _: Any, path: Path) -> None:
    assert learn.opt.hypers[-1]["lr"] < 1e-2


def _averaged(_: Learner, callbacks: Any, path: Path) -> None:
    (average,) = callbacks
    assert average.n == 8
    assert [plain.zeros(average.mean[f"{n}.weight"]) for n in LAYERS] == HALF


def _logged(_: Learner, callbacks: Any, path: Path) -> None:
    (logger,) = callbacks
    assert [r["sparsity"] for r in logger.rows] == pytest.approx([25, 50, 50, 50], abs=0.05)
    assert [r["epoch"] for r in logger.rows] == [0, 1, 2, 3]


def _csv(_: Learner, callbacks: Any, path: Path) -> None:
    head, *rows = ((path / "history.csv").read_text()).splitlines()
    column = head.split(",").index("sparsity")
    assert [float(r.split(",")[column]) for r in rows] == pytest.approx([25, 50, 50, 50], abs=0.05)


def _trained(learn: Learner, _: Any, path: Path) -> None:
    assert len(learn.recorder.values) == 4


def best(**kwargs: Any) -> Any:
    return {"monitor": "sparsity", "comp": np.greater, **kwargs}


BESIDE: dict[str, tuple[Callable[[], list[Callback]], Callable[[Learner, Any, Path], None]]] = {
    "save the best": (lambda: [SaveModelCallback(**best())], _saved("model")),
    "save the best with its optimizer": (lambda: [SaveModelCallback(**best(with_opt=True))], _saved("model")),
    "save every epoch": (lambda: [SaveModelCallback(every_epoch=True)], _every_epoch),
    "save at the end": (lambda: [SaveModelCallback(at_end=True, fname="last")], _saved("last")),
    "stop early": (lambda: [EarlyStoppingCallback(**best(patience=1))], _stopped),
    "lower the rate": (lambda: [ReduceLROnPlateau(**best(patience=1))], _slower),
    "accumulate": (lambda: [GradientAccumulation(12)], _trained),
    "clip": (lambda: [GradientClip(0.1)], _trained),
    "mixed precision": (lambda: [MixedPrecision(amp_mode="bf16")], _trained),
    "mix up": (lambda: [MixUp()], _trained),
    "cut and mix": (lambda: [CutMix()], _trained),
    "average": (lambda: [Average(since=2)], _averaged),
    "CSV": (lambda: [CSVLogger()], _csv),
    "log": (lambda: [Board()], _logged),
}


@pytest.mark.parametrize("name", BESIDE)
def test_zeros_stay_and_the_target_is_met_beside(name: str, tmp_path: Path) -> None:
    make, check = BESIDE[name]
    learn, callback, others = small(tmp_path, loss_func=CrossEntropyLossFlat()), half(), make()
    watch = of(callback)
    quiet(learn, 4, callback, watch, *others)
    assert watch.steps >= 8
    assert zeros(learn.model) == HALF
    assert callback.sparse.at_target
    check(learn, others, tmp_path)


def test_everything_beside_it_in_one_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn, callback = small(tmp_path, loss_func=CrossEntropyLossFlat()), half(verbose=True)
    watch, average, logger = of(callback), Average(since=2), Board()
    others = [
        *(SaveModelCallback(**best(with_opt=True)), ReduceLROnPlateau(**best(patience=1))),
        *(EarlyStoppingCallback(**best(patience=5)), GradientAccumulation(12), GradientClip(0.5)),
        *(MixedPrecision(amp_mode="bf16"), MixUp(), CSVLogger(), average, logger, watch),
    ]
    with learn.no_bar():
        learn.fit_one_cycle(4, 1e-2, cbs=[callback, *others])
    assert watch.steps > 8
    assert zeros(learn.model) == HALF
    assert [plain.zeros(average.mean[f"{n}.weight"]) for n in LAYERS] == HALF
    _logged(learn, [logger], tmp_path)
    _csv(learn, [], tmp_path)
    assert "Final Sparsity: 50.00%" in capsys.readouterr().out


def test_progress_bar_and_graph_do_not_mind_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn, callback = small(tmp_path), half(schedule=lin.between(0, 0.4), verbose=True)
    learn.logger = print  # a terminal
    learn.fit(2, 1e-2, cbs=[callback, of(callback), ShowGraphCallback()])
    out = capsys.readouterr().out
    assert zeros(learn.model) == HALF
    assert re.search(r"epoch.*sparsity", out)
    for epoch in (0, 1):  # the epoch's line comes below fastai's row
        row = re.search(rf"\b{epoch} +\d\.\d+ +\d\.\d+ ", out)
        line = out.index(f"Sparsity at the end of epoch {epoch}: 50.00%")
        assert row is not None
        assert row.end() <= line


# -- best checkpoints -------------------------------------------------------------------------------------------------


def test_a_best_epoch_from_before_the_target_is_warned_about_with_the_remedy(tmp_path: Path) -> None:
    learn = small(tmp_path, metrics=[scripted([9, 1, 2, 3])])
    with pytest.warns(GossamerWarning, match="SaveSparseModelCallback"):
        quiet(learn, 4, half(), SaveModelCallback(monitor="scripted", comp=np.greater))


@pytest.mark.parametrize("with_opt", [False, True])
def test_the_best_of_the_epochs_at_the_target_is_what_is_loaded(tmp_path: Path, with_opt: bool) -> None:
    learn, callback = small(tmp_path, metrics=[scripted([9, 2, 4, 3])]), half()
    watch, seen = states(learn)
    keep = SaveSparseModelCallback(monitor="scripted", comp=np.greater, with_opt=with_opt)
    quiet(learn, 4, callback, of(callback), watch, keep)
    assert same(learn.model.state_dict(), seen[2])
    assert not any(same(seen[2], seen[i]) for i in (0, 1, 3))
    assert zeros(learn.model) == HALF
    assert callback.sparse.at_target


def test_every_epoch_and_at_end_of_the_sparse_saver_save_what_they_should(tmp_path: Path) -> None:
    quiet(small(tmp_path), 4, half(), SaveSparseModelCallback(every_epoch=True))
    assert sorted(p.name for p in (tmp_path / "models").glob("*.pth")) == ["model_1.pth", "model_2.pth", "model_3.pth"]
    learn = small(tmp_path)
    quiet(learn, 2, half(schedule=lin), SaveSparseModelCallback(at_end=True, fname="last"))
    _saved("last")(learn, None, tmp_path)


def test_a_schedule_that_leaves_one_epoch_to_choose_from_is_said_before_training(tmp_path: Path) -> None:
    learn, trained = small(tmp_path), []
    note = Watch(lambda _: trained.append(1), "before_batch")
    with pytest.warns(GossamerWarning, match=r"last epoch only.*between") as caught:
        quiet(learn, 2, half(schedule=lin), SaveSparseModelCallback(), note)
    assert len([w for w in caught if w.category is GossamerWarning]) == 1
    assert zeros(learn.model) == HALF
    trained.clear()
    with pytest.warns(GossamerWarning), contextlib.suppress(CancelFitException):
        quiet(small(tmp_path), 2, half(schedule=lin), SaveSparseModelCallback(), Stop("before_epoch", 0, 0), note)
    assert not trained


def test_a_fit_that_never_reaches_the_target_loads_nothing_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    torch.save(Net().state_dict(), tmp_path / "models" / "model.pth")  # of an earlier fit, and not to be loaded
    learn, callback = small(tmp_path), half()
    watch, seen = states(learn)
    with pytest.warns(GossamerWarning, match="no epoch of this fit ended at the target"):
        quiet(learn, 4, callback, watch, SaveSparseModelCallback(), Stop("before_epoch", 1, CancelFitException))
    assert same(learn.model.state_dict(), seen[0])
    assert zeros(learn.model) == [18, 288, 720]


def test_without_anything_sparse_the_sparse_saver_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="add a SparsifyCallback"):
        quiet(small(tmp_path), 1, SaveSparseModelCallback())


def test_the_sparse_saver_works_in_a_dense_fit_after_a_sparse_one(tmp_path: Path) -> None:
    learn, callback = small(tmp_path), half()
    quiet(learn, 2, callback)
    learn.metrics = [scripted([1, 5, 2])]
    watch, seen = states(learn)
    quiet(learn, 3, now(callback), watch, SaveSparseModelCallback(monitor="scripted", comp=np.greater))
    assert same(learn.model.state_dict(), seen[1])
    assert zeros(learn.model) == HALF


# -- around and between fits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["on the learner", "in the fit"])
def test_lr_find_gives_the_weights_back_and_leaves_the_masks(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    learn, callback = small(tmp_path), half(total_epochs=4, verbose=True)
    given = [callback] if where == "in the fit" else []
    if not given:
        learn.add_cb(callback)

    def find() -> None:
        before, masks = copy.deepcopy(learn.model.state_dict()), None
        if callback.sparse is not None:
            masks = {n: m.clone() for n, m in callback.sparse.sparsifier.masks.items()}
        capsys.readouterr()
        with learn.no_bar():
            learn.lr_find(show_plot=False, num_it=6, **({} if masks is None else {"start_lr": 1e-3}))
        assert same(learn.model.state_dict(), before)
        assert capsys.readouterr().out == ""
        if masks is not None:
            assert all(torch.equal(masks[n], m) for n, m in callback.sparse.sparsifier.masks.items())

    find()
    quiet(learn, 1, *given, of(callback))
    assert zeros(learn.model) == [18, 288, 720]
    find()
    quiet(learn, 2, *given, of(callback))
    find()
    quiet(learn, 1, *given, of(callback))
    find()
    assert zeros(learn.model) == HALF
    assert [h["sparsity"] for h in callback.history] == pytest.approx([25, 50, 50, 50], abs=0.05)


def test_lr_find_of_a_sparse_network_searches_among_sparse_networks(tmp_path: Path) -> None:
    learn, callback = small(tmp_path, cbs=half()), None
    callback = learn.sparsify
    quiet(learn, 2)
    watch = now(callback)
    learn.add_cb(watch)
    with learn.no_bar():
        learn.lr_find(show_plot=False, num_it=6)
    assert watch.steps >= 6


@pytest.mark.parametrize("attached", [True, False])
def test_looking_at_the_network_is_silent_and_changes_nothing(
    attached: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    learn, callback, seen = small(), half(verbose=True), []
    if attached:
        learn.add_cb(callback)
        with learn.no_bar():
            learn.validate()
            learn.get_preds()
        assert callback.sparse is None
    learn.remove_cb(learn.progress)  # which fastai itself takes off and puts on anew
    learn.fit(2, 1e-2, cbs=[] if attached else [callback])
    capsys.readouterr()
    before, cbs, metrics = copy.deepcopy(learn.model.state_dict()), list(learn.cbs), list(learn.metrics)
    extra = Watch(lambda _: seen.append(1), "after_batch")
    assert len(learn.validate(cbs=extra)) == 2
    predictions, targets = learn.get_preds(cbs=extra)
    assert learn.get_preds(dl=learn.dls.train, with_loss=True)[0].shape[1] == 10
    learn.validate(ds_idx=0)
    assert seen
    assert len(predictions) == len(targets) == 16
    assert capsys.readouterr().out == ""
    assert same(learn.model.state_dict(), before)
    assert list(learn.cbs) == cbs
    assert list(learn.metrics) == metrics


def test_validation_in_the_middle_of_a_fit_does_not_disturb_it() -> None:
    def look(learn: Learner) -> None:
        if learn.training:
            dl, xb, yb = learn.dl, learn.xb, learn.yb
            learn.validate()
            learn.dl, learn.xb, learn.yb = dl, xb, yb

    learn, callback = small(), half()
    quiet(learn, 2, callback, of(callback), Watch(look, "after_epoch"))
    assert zeros(learn.model) == HALF
    quiet(learn, 1, now(callback))
    assert zeros(learn.model) == HALF


@pytest.mark.parametrize("when", ["before the fit", "in the middle of it"])
def test_entering_the_learner_as_summary_does_is_no_fit(
    when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`with learn:` sends what begins and ends a fit, and holds no lock."""
    path = tmp_path / "run.safetensors"
    learn, callback = small(tmp_path), half(schedule=lin, verbose=True, checkpoint=path, resume=True)
    learn.add_cb(callback)
    looks: list[str] = []

    def look(learn: Learner) -> None:
        if when == "in the middle of it" and learn.epoch == 1 and not looks:
            looks.append(module_summary(learn, torch.randn(8, 1, 8, 8)))

    if when == "before the fit":
        with learn.no_bar():
            looks.append(module_summary(learn, torch.randn(8, 1, 8, 8)))
        assert capsys.readouterr().out == ""
        assert not path.exists()
        assert [m.name for m in learn.metrics] == ["accuracy"]
    quiet(learn, 3, Watch(look, "after_epoch"))
    said = capsys.readouterr().out
    assert "Conv2d" in looks[0]
    assert said.count("Pruning of") == said.count("Final Sparsity") == 1
    assert [row["position"] for row in callback.history] == pytest.approx([1 / 3, 2 / 3, 1])
    assert zeros(learn.model) == HALF


def test_a_callback_that_goes_to_another_learner_leaves_its_keeper_with_the_first() -> None:
    first, second, callback = small(), small(), half()
    first.add_cb(callback)
    quiet(first, 2)
    second.add_cb(callback)
    assert not hasattr(first, "sparsify")
    assert first.keep_sparse.sparse is callback.sparse
    quiet(second, 2)
    quiet(first, 1)
    assert zeros(first.model) == zeros(second.model) == HALF


def test_predict_works_beside_a_callback_and_after_it(tmp_path: Path) -> None:
    learn = learner(tmp_path, fastai_digits(), loss_func=CrossEntropyLossFlat(), cbs=half())
    quiet(learn, 2)
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar():
        _, index, probabilities = learn.predict(3)
    assert probabilities.shape == (10,)
    assert int(index) == int(probabilities.argmax())
    assert same(learn.model.state_dict(), before)


def split(model: Net) -> list[list[nn.Parameter]]:
    parts = [(model.conv1, model.bn1), (model.conv2, model.bn2), (model.conv3, model.head)]
    return [[p for m in part for p in m.parameters()] for part in parts]


@pytest.mark.parametrize("context", ["local", "global"])
def test_frozen_layers_become_sparse_too_unless_they_are_skipped(context: str) -> None:
    learn, callback = small(splitter=split), half(context=context)
    learn.freeze()
    quiet(learn, 2, callback, of(callback))
    assert not learn.model.conv1.weight.requires_grad
    assert sum(zeros(learn.model)) == 2052
    assert context == "global" or zeros(learn.model) == HALF

    learn, callback = small(splitter=split), half(context=context, skip_frozen=True, total_epochs=4)
    learn.freeze()
    before = learn.model.conv2.weight.detach().clone()
    quiet(learn, 2, callback, of(callback))
    assert zeros(learn.model) == [0, 0, 1440]
    assert torch.equal(learn.model.conv2.weight, before)
    learn.unfreeze()
    quiet(learn, 2, callback, of(callback))
    assert sum(zeros(learn.model)) == 2052
    assert context == "global" or zeros(learn.model) == HALF


def test_freezing_unfreezing_and_discriminative_rates_go_with_one_callback() -> None:
    learn, callback = small(splitter=split), half(total_epochs=4)
    learn.freeze()
    quiet(learn, 1, callback, of(callback))
    learn.unfreeze()
    with learn.no_bar():
        learn.fit_one_cycle(2, slice(1e-4, 1e-2), cbs=[callback, of(callback)])
    learn.freeze_to(1)
    with learn.no_bar():
        learn.fit_flat_cos(1, slice(1e-4, 1e-2), cbs=[callback, of(callback)])
    assert zeros(learn.model) == HALF


def test_a_second_fit_with_the_same_callback_never_falls_below_what_was_reached() -> None:
    learn, callback = small(), SparsifyCallback(50, schedule=one_cycle, verbose=False)
    stop = Stop("after_batch", 1, CancelFitException)
    quiet(learn, 3, callback, stop)
    reached = callback.report().zeros
    assert 0 < reached < 2052
    least: list[int] = []
    watch = Watch(lambda _: least.append(callback.report().zeros))
    quiet(learn, 3, callback, now(callback), of(callback), watch)
    assert min(least) >= reached
    assert least == sorted(least)
    assert zeros(learn.model) == HALF


def percents(out: str) -> list[str]:
    return [line.rsplit(" ", 1)[1] for line in out.splitlines() if line.startswith("Sparsity at the end")]


@pytest.mark.parametrize("freeze_epochs", [1, 2])
@pytest.mark.parametrize("where", ["on the learner", "in the call"])
def test_fine_tune_is_one_schedule_over_both_phases(
    freeze_epochs: int, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = SparsifyCallback(50, schedule=one_cycle)
    quiet(small(), 3 + freeze_epochs, one)
    whole = capsys.readouterr().out
    learn, callback = small(splitter=split), SparsifyCallback(50, schedule=one_cycle)
    given: dict[str, Any] = {"cbs": [callback, of(callback)]}
    if where == "on the learner":
        learn.add_cbs(given.pop("cbs"))
    with learn.no_bar():
        learn.fine_tune(3, 1e-2, freeze_epochs=freeze_epochs, **given)
    out = capsys.readouterr().out
    assert len(percents(out)) == 3 + freeze_epochs
    assert percents(out) == percents(whole)
    assert out.count("Pruning of weight until") == 1
    assert out.count("Final Sparsity: 50.00%") == 1
    assert out.count("Sparsity Report") == 1
    assert "masked since an earlier fit" not in out
    assert zeros(learn.model) == HALF
    assert [h["epoch"] for h in callback.history] == list(range(3 + freeze_epochs))


def test_total_epochs_is_one_schedule_over_several_fits(capsys: pytest.CaptureFixture[str]) -> None:
    quiet(small(), 4, SparsifyCallback(50, schedule=one_cycle))
    whole = capsys.readouterr().out
    learn, callback = small(), SparsifyCallback(50, schedule=one_cycle, total_epochs=4)
    for epochs in (1, 2, 1):
        quiet(learn, epochs, callback, of(callback))
    out = capsys.readouterr().out
    assert percents(out) == percents(whole)
    assert out.count("Pruning of weight until") == out.count("Final Sparsity: 50.00%") == 1
    assert zeros(learn.model) == HALF


def test_a_fit_that_is_too_long_for_total_epochs_is_refused_before_training() -> None:
    learn, callback = small(), half(total_epochs=3)
    quiet(learn, 2, callback)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ArgumentError, match=r"a fit of 2 epochs.*total_epochs=3, of which 2 are done; fit 1"):
        quiet(learn, 2, callback)
    assert same(learn.model.state_dict(), before)
    with pytest.raises(ArgumentError, match="a fit of 4 epochs"):
        quiet(small(), 4, half(total_epochs=3))


@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelFitException])
def test_an_interrupted_first_phase_does_not_confuse_the_next_fit(
    error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    learn, callback = small(splitter=split), SparsifyCallback(50, schedule=lin)
    stop = Stop("after_batch", 0, error)
    with contextlib.suppress(KeyboardInterrupt), learn.no_bar():
        learn.fine_tune(2, 1e-2, freeze_epochs=2, cbs=[callback, stop])
    if error is KeyboardInterrupt:
        assert 0 < callback.report().zeros < 300
    capsys.readouterr()
    learn.unfreeze()
    quiet(learn, 2, callback, of(callback))
    assert zeros(learn.model) == HALF
    out = capsys.readouterr().out
    assert [float(p.rstrip("%")) for p in percents(out)][-1] == 50
    if error is KeyboardInterrupt:
        assert percents(out) == ["25.00%", "50.00%"]
    assert out.count("Final Sparsity: 50.00%") == 1
    with learn.no_bar():
        learn.fine_tune(1, 1e-2, cbs=[callback, of(callback)])
    assert zeros(learn.model) == HALF


# -- after a sparse fit -----------------------------------------------------------------------------------------------


def _whole(learn: Learner, callback: SparsifyCallback) -> None:
    quiet(learn, 2, callback)


def _ctrl_c(learn: Learner, callback: SparsifyCallback) -> None:
    with pytest.raises(KeyboardInterrupt):
        quiet(learn, 4, callback, Stop("after_pred", 2, KeyboardInterrupt))


def _removed(learn: Learner, callback: SparsifyCallback) -> None:
    learn.add_cb(callback)
    quiet(learn, 2)
    learn.remove_cb(callback)


ENDS = {"a whole fit": _whole, "Ctrl-C": _ctrl_c, "remove_cb": _removed}


@pytest.mark.parametrize("end", ENDS)
def test_dense_fits_keep_the_masks_and_say_so_once(end: str, capsys: pytest.CaptureFixture[str]) -> None:
    learn, callback = small(), half(verbose=True)
    ENDS[end](learn, callback)
    assert zeros(learn.model) == HALF
    assert isinstance(learn.keep_sparse, KeepSparse)
    capsys.readouterr()
    before = learn.model.conv3.weight.detach().clone()
    for _ in range(2):
        quiet(learn, 1, now(callback))
    line = "2,052 weights (50.00%) are masked since an earlier fit and stay zero"
    out = capsys.readouterr().out
    assert out.count("masked since") == out.count(line) == 1
    assert "learn.keep_sparse.release()" in out
    assert zeros(learn.model) == HALF
    assert not torch.equal(before, learn.model.conv3.weight)


@pytest.mark.parametrize("how", ["keeper", "callback"])
def test_release_lets_weights_grow_and_takes_the_keeper_off(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    learn, callback = small(), half()
    quiet(learn, 2, callback)
    (learn.keep_sparse if how == "keeper" else callback).release()
    assert not any(isinstance(cb, KeepSparse) for cb in learn.cbs)
    assert not hasattr(learn, "keep_sparse")
    quiet(learn, 1)
    assert sum(zeros(learn.model)) < 1000  # a weight whose input is never anything but 0 has no gradient to grow by
    assert "masked since" not in capsys.readouterr().out


def test_a_second_callback_with_a_higher_target_takes_over(capsys: pytest.CaptureFixture[str]) -> None:
    learn, first = small(), half()
    quiet(learn, 2, first)
    capsys.readouterr()
    second = SparsifyCallback(80, schedule=lin)
    quiet(learn, 2, second, now(first), of(second))
    keepers = [cb for cb in learn.cbs if isinstance(cb, KeepSparse)]
    assert [k.sparse for k in keepers] == [second.sparse]
    assert zeros(learn.model) == [58, 922, 2304]
    assert all(bool((first.sparse.sparsifier.masks[n] | ~m).all()) for n, m in second.sparse.sparsifier.masks.items())
    out = capsys.readouterr().out
    assert out.count("Keeping the 2,052 zeros that are there (50.00%)") == 1
    assert "masked since" not in out


def test_a_second_callback_with_a_lower_target_is_an_error_with_both_numbers() -> None:
    learn, first = small(), half()
    quiet(learn, 2, first)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ArgumentError, match=r"50\.00 % zeros.*target of 30 %"):
        quiet(learn, 2, SparsifyCallback(30, verbose=False))
    assert same(learn.model.state_dict(), before)
    quiet(learn, 1, now(first))  # and the masks are still kept
    assert zeros(learn.model) == HALF


def test_keep_zeros_false_starts_afresh() -> None:
    learn, first = small(), half()
    quiet(learn, 2, first)
    second = SparsifyCallback(30, schedule=lin, keep_zeros=False, verbose=False)
    quiet(learn, 2, second, of(second))
    assert second.sparse.zeros_kept == 0
    assert [second.sparse.sparsifier.masks.masked(n) for n in LAYERS] == [22, 346, 864]
    assert plain.zeros(learn.model.conv3.weight) < 1000  # 1,440 before


def test_a_sparse_checkpoint_in_a_new_learner_keeps_its_zeros_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, first = small(tmp_path), half()
    quiet(old, 2, first)
    old.save("sparse")
    learn = small(tmp_path)
    learn.load("sparse", with_opt=False)
    capsys.readouterr()
    second = SparsifyCallback(80, schedule=lin)
    quiet(learn, 2, second, now(first), of(second))
    lines = [s for s in capsys.readouterr().out.splitlines() if "Keeping" in s]
    assert lines == ["Keeping the 2,052 zeros that are there (50.00%); keep_zeros=False would let them grow"]
    assert zeros(learn.model) == [58, 922, 2304]


def _load_sparser(learn: Learner, percent: float, path: Path) -> None:
    """By hand, between two fits: the same network, made sparser elsewhere."""
    other = small(path)
    other.model.load_state_dict(learn.model.state_dict())
    quiet(other, 1, SparsifyCallback(percent, schedule=lin, verbose=False))
    learn.model.load_state_dict(other.model.state_dict())


def test_the_same_callback_keeps_the_zeros_of_a_sparser_network_that_was_loaded_since(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn, callback = small(), SparsifyCallback(80, schedule=lin, total_epochs=8)
    quiet(learn, 2, callback)  # 20 %
    _load_sparser(learn, 50, tmp_path)
    assert zeros(learn.model) == HALF
    was = {n: getattr(learn.model, n).weight.detach() == 0 for n in LAYERS}
    quiet(learn, 2, callback)  # the schedule goes on to 40 %: neither does it go back, nor do zeros grow
    assert zeros(learn.model) == HALF
    quiet(learn, 4, callback)
    assert zeros(learn.model) == [58, 922, 2304]
    assert not any(bool(getattr(learn.model, n).weight[z].any()) for n, z in was.items())
    assert capsys.readouterr().out.count("Keeping the 2,052 zeros that are there (50.00%)") == 1


def test_the_same_callback_refuses_a_loaded_network_that_is_sparser_than_its_target(tmp_path: Path) -> None:
    learn, callback = small(), half()
    quiet(learn, 2, callback)
    _load_sparser(learn, 70, tmp_path)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ArgumentError, match=r"70\.\d\d % zeros.*target of 50 %.*70\.\d\d.*keep_zeros=False"):
        quiet(learn, 1, callback)
    assert same(learn.model.state_dict(), before)


def test_what_was_released_is_not_taken_for_zeros_to_keep() -> None:
    learn, callback = small(), half(schedule=lin)
    quiet(learn, 2, callback)
    callback.release()
    masked: list[int] = []
    quiet(learn, 1, callback, Watch(lambda _: masked.append(callback.sparse.sparsifier.masks.masked("conv3"))))
    assert masked == [360, 720, 1080, HALF[2]]
    assert zeros(learn.model) == HALF


@pytest.mark.parametrize("fit_between", [True, False])
def test_a_sparse_network_that_is_loaded_after_a_release_keeps_its_zeros(
    fit_between: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn, callback = small(tmp_path), half(schedule=lin, verbose=True)
    quiet(learn, 2, callback)
    learn.save("sparse")
    was = {n: getattr(learn.model, n).weight.detach() == 0 for n in LAYERS}
    callback.release()
    if fit_between:
        quiet(learn, 1)
        assert sum(zeros(learn.model)) < 1000  # what no gradient reaches has not grown
    learn.load("sparse")
    capsys.readouterr()
    kept: list[bool] = []
    watch = Watch(
        lambda learn: kept.append(all(bool((getattr(learn.model, n).weight == 0)[z].all()) for n, z in was.items()))
    )
    quiet(learn, 2, callback, watch)
    assert all(kept)
    assert len(kept) == 8
    assert "Keeping the 2,052 zeros" in capsys.readouterr().out


def test_what_no_gradient_reached_after_a_release_need_not_fit_the_units(tmp_path: Path) -> None:
    learn = small(tmp_path)
    with torch.no_grad():
        learn.model.conv3.weight[:5] = 0.01
        learn.model.conv3.bias[:5] = -100.0  # filters that are never active
    callback = half(granularity="channel", schedule=lin)
    quiet(learn, 2, callback)
    callback.release()
    quiet(learn, 1)
    assert plain.zeros(learn.model.conv3.weight) > 100
    quiet(learn, 1, callback)
    assert callback.sparse.at_target


def test_a_schedule_that_went_down_keeps_the_zeros_of_its_own_earlier_file(tmp_path: Path) -> None:
    learn, callback = small(tmp_path), half(schedule=dsd)
    peak = Watch(lambda learn: learn.save("peak") if learn.epoch == 3 else None, "after_epoch")
    quiet(learn, 6, callback, peak)
    assert sum(zeros(learn.model)) < 1000
    learn.load("peak")
    was = {n: getattr(learn.model, n).weight.detach() == 0 for n in LAYERS}
    assert sum(int(z.sum()) for z in was.values()) > 1500
    held: list[bool] = []
    watch = Watch(
        lambda learn: held.append(all(bool((getattr(learn.model, n).weight == 0)[z].all()) for n, z in was.items()))
    )
    quiet(learn, 1, callback, watch)
    assert all(held)


def test_removing_one_of_two_callbacks_leaves_the_name_to_the_other() -> None:
    learn = small()
    first, second = (
        SparsifyCallback(50, layer_type=kind, schedule=lin, verbose=False) for kind in (nn.Conv2d, nn.Linear)
    )
    learn.add_cbs([first, second])
    assert learn.sparsify is second
    learn.remove_cb(second)
    assert learn.sparsify is first
    quiet(learn, 1, second)
    assert learn.sparsify is first
    learn.remove_cb(first)
    assert not hasattr(learn, "sparsify")
    learn.add_cb(second)
    assert learn.sparsify is second
    assert second.name == "sparsify"


def test_two_keepers_let_go_together_and_the_name_stays_with_the_one_that_is_left() -> None:
    learn = small()
    first, second = (
        SparsifyCallback(50, layer_type=kind, schedule=lin, verbose=False) for kind in (nn.Conv2d, nn.Linear)
    )
    quiet(learn, 1, first, second)
    assert len([cb for cb in learn.cbs if isinstance(cb, KeepSparse)]) == 2
    second.release()
    assert learn.keep_sparse.sparse is first.sparse
    quiet(learn, 1, second)
    learn.keep_sparse.release()
    assert not hasattr(learn, "keep_sparse")
    quiet(learn, 1)
    assert sum(zeros(learn.model)) < 1000
    assert plain.zeros(learn.model.head.weight) < 50


def test_a_new_callback_goes_by_the_zeros_of_a_network_that_was_loaded_not_by_the_keepers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = small(tmp_path)
    with torch.no_grad():
        for parameter in other.model.parameters():  # so that other weights are the smallest
            parameter.add_(0.3 * torch.randn_like(parameter))
    quiet(other, 1, half(schedule=lin))
    learn = small(tmp_path)
    quiet(learn, 2, half())
    learn.model.load_state_dict(other.model.state_dict())
    was = {n: getattr(learn.model, n).weight.detach() == 0 for n in LAYERS}
    quiet(learn, 1, half())
    assert all(torch.equal(getattr(learn.model, n).weight == 0, z) for n, z in was.items())


def test_a_callback_that_ctrl_c_kept_on_the_learner_is_in_the_next_fit_once() -> None:
    learn, callback = small(), half(schedule=lin)
    learn.add_cb(callback)
    quiet(learn, 1, callback)
    assert not any(cb is callback for cb in learn.cbs)
    assert zeros(learn.model) == HALF


@pytest.mark.parametrize(
    "event",
    ["before_fit", "before_epoch", "before_train", "after_train", "after_validate", "after_epoch", "after_fit"],
)
@pytest.mark.parametrize("who", ["callback", "keeper"])
def test_ctrl_c_anywhere_in_an_epoch_leaves_no_trace_on_the_learner(who: str, event: str) -> None:
    learn, callback = small(), half()
    if who == "keeper":
        quiet(learn, 1, callback)
    else:
        learn.add_cb(callback)
    metrics, names = list(learn.metrics), sorted(cb.name for cb in learn.cbs)

    def stop(_: Learner) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(learn, 2, Watch(stop, event))
    assert list(learn.metrics) == metrics
    assert sorted(cb.name for cb in learn.cbs) == names
    if who == "callback":
        learn.remove_cb(callback)  # which takes its guard along
    elif event == "before_fit":
        learn.validate()  # the keeper's came too late to see this, and leaves with the next call
    assert "_with_events" not in vars(learn)


def test_what_a_user_put_in_the_guards_place_is_put_back_and_was_used() -> None:
    learn, callback, seen = small(), half(), []
    own = learn._with_events

    def counted(f: Any, event: str, *args: Any) -> None:
        seen.append(event)
        own(f, event, *args)

    learn._with_events = counted
    learn.add_cb(callback)
    quiet(learn, 1)
    assert seen.count("fit") == seen.count("epoch") == 1
    assert seen.count("batch") == 6
    learn.remove_cb(callback)
    quiet(learn, 1)  # the keeper stands there too, and leaves
    assert vars(learn)["_with_events"] is counted


def test_a_metric_with_numbers_of_its_own_is_left_alone() -> None:
    class Odd(ValueMetric):
        count = np.ones(3)

    learn = small(metrics=[Odd(lambda: 1.0, "odd")])
    quiet(learn, 1, half())
    assert [m.name for m in learn.metrics] == ["odd"]


def test_lr_find_gives_a_loaded_network_back_as_it_was_loaded(tmp_path: Path) -> None:
    learn = small(tmp_path)
    quiet(learn, 2, half())
    learn.model.load_state_dict({n: t.clone() for n, t in small(tmp_path).model.state_dict().items()})
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar():
        learn.lr_find(num_it=20, show_plot=False)
    assert same(learn.model.state_dict(), before)


@pytest.mark.parametrize("who", ["callback", "keeper"])
def test_a_cancel_that_fastai_does_not_catch_leaves_zeros_and_no_trace(who: str) -> None:
    learn, callback = small(), half()
    quiet(learn, 1, callback)

    class Cancel(Callback):
        order = -5

        def after_step(self) -> None:
            raise CancelValidException

    with pytest.raises(CancelValidException):
        quiet(learn, 1, Cancel(), *([callback] if who == "callback" else []))
    assert zeros(learn.model) == HALF
    assert "_with_events" not in vars(learn)


def test_a_model_around_the_same_layers_keeps_their_zeros() -> None:
    learn, callback = small(), half()
    quiet(learn, 2, callback)
    learn.model = nn.Sequential(*[getattr(learn.model, n) for n in LAYERS], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learn.create_opt()
    counts: list[list[int]] = []
    quiet(learn, 1, Watch(lambda learn: counts.append([plain.zeros(learn.model[i].weight) for i in range(3)])))
    assert counts == [HALF] * 4


def test_a_learner_with_another_model_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    learn, callback = small(), half()
    quiet(learn, 2, callback)
    torch.manual_seed(5)
    old, learn.model, learn.opt = learn.model, Net(), None
    sparse = copy.deepcopy(old.state_dict())
    twin = Learner(digits(32, 8, 16), copy.deepcopy(learn.model), loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    twin.logger = helpers.say_nothing
    capsys.readouterr()
    for each in (learn, twin):
        torch.manual_seed(1)
        each.dls.train.rng = random.Random(1)
        quiet(each, 1)
    assert same(learn.model.state_dict(), twin.model.state_dict())
    assert same(old.state_dict(), sparse)
    assert capsys.readouterr().out == ""


def test_a_keeper_that_waits_for_its_network_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    learn, callback = small(), half(verbose=True)
    quiet(learn, 2, callback)
    old, learn.model, learn.opt = learn.model, Net(), None
    capsys.readouterr()
    quiet(learn, 1)
    said = capsys.readouterr().out
    assert "another network" in said
    assert "release()" in said
    quiet(learn, 1)
    assert capsys.readouterr().out == ""
    learn.model, learn.opt = old, None
    quiet(learn, 1)
    assert "2,052 weights (50.00%) are masked since an earlier fit" in capsys.readouterr().out
    assert zeros(learn.model) == HALF


def test_the_keeper_also_zeroes_what_was_loaded_in_between(tmp_path: Path) -> None:
    learn, callback = small(tmp_path), half()
    learn.save("dense")
    quiet(learn, 2, callback)
    learn.load("dense")
    quiet(learn, 1, now(callback))
    assert zeros(learn.model) == HALF


# -- stops ------------------------------------------------------------------------------------------------------------


class Stop(Callback):
    """Raises once, at an event of an epoch."""

    def __init__(self, event: str, epoch: int, error: Any, order: int = 1000, at_batch: int = 1) -> None:
        self.order, self.error, self.raised = order, error, False
        self.at = epoch, at_batch
        self.per_batch = event in PER_BATCH
        self.outer = event in ("before_fit", "after_fit")
        setattr(self, event, self._stop)

    def _stop(self) -> None:
        learn = self.learn
        due = self.outer or learn.epoch == self.at[0]
        if self.per_batch:
            due = due and learn.training and learn.iter == self.at[1]
        if due and not self.raised:
            self.raised = True
            raise (self.error or CancelFitException)("stopped by the test")


PER_BATCH = [
    *("before_batch", "after_pred", "after_loss", "before_backward", "after_backward", "before_step", "after_step"),
    "after_batch",
]
EVENTS = [
    *("before_fit", "before_epoch", "before_train", *PER_BATCH, "after_train", "before_validate", "after_validate"),
    *("after_epoch", "after_fit"),
]
# Where fastai itself catches each; anywhere else it ends the fit as any other error does.
CAUGHT = {
    CancelFitException: EVENTS[:-1],
    CancelEpochException: EVENTS[1:-2],
    CancelTrainException: ["before_train", *PER_BATCH],
    CancelBatchException: PER_BATCH[:-1],
}
STOPS = [
    (event, error, order)
    for event in EVENTS
    for error in (KeyboardInterrupt, RuntimeError, *CAUGHT)
    for order in (-50, 1000)
    if event in CAUGHT.get(error, EVENTS)
]


@pytest.fixture(scope="module")
def two_batches() -> Any:
    return digits(8, 4, 4)


@pytest.mark.parametrize(("event", "error", "order"), STOPS)
def test_a_stop_leaves_the_last_steps_masks_no_trace_and_a_callback_that_goes_on(
    two_batches: Any, event: str, error: type[BaseException], order: int
) -> None:
    learn, callback = learner(dls=two_batches), half(schedule=lin)
    learn.remove_cb(learn.progress)  # which fastai itself takes off and puts on anew
    cbs, metrics, surface = list(learn.cbs), list(learn.metrics), plain.surface(learn.model)
    finished: list[list[int]] = [[0, 0, 0]]

    def count(_: Learner) -> None:
        finished.append([callback.sparse.sparsifier.masks.masked(n) for n in LAYERS])

    def look(learn: Learner) -> None:
        for name, mask in callback.sparse.sparsifier.masks.items():
            assert not learn.model.get_submodule(name).weight[~mask].any(), name

    step, epoch, validated = Watch(count), Watch(count, "after_train"), Watch(look, "before_validate")
    step.order = epoch.order = -3  # right after the callback, before whatever stops the fit
    # fastai's recorder has nothing to print for a first epoch that never begins, so there the second one is stopped.
    stop = Stop(event, int(event == "before_epoch"), error, order)
    with contextlib.suppress(KeyboardInterrupt, RuntimeError):
        learn.fit(2, 1e-2, cbs=[callback, step, epoch, validated, stop])
    assert stop.raised

    if callback.sparse is not None:
        masks = callback.sparse.sparsifier.masks
        assert [masks.masked(n) for n in LAYERS] == finished[-1]
        look(learn)
    assert plain.surface(learn.model) == surface
    assert [cb for cb in learn.cbs if not isinstance(cb, KeepSparse)] == cbs
    assert len(learn.cbs) - len(cbs) == (1 if any(finished[-1]) else 0)
    assert list(learn.metrics) == metrics

    learn.fit(1, 1e-2, cbs=[callback, of(callback)])
    assert zeros(learn.model) == HALF
    assert callback.sparse.at_target
    assert plain.surface(learn.model) == surface


# -- the model stays the user's ---------------------------------------------------------------------------------------


READ = """
import pickle, sys, warnings
from pathlib import Path
sys.modules["gossamer"] = None
warnings.simplefilter("ignore")
import torch
from fastai.learner import load_learner
import helpers

def state(path):
    if path.suffix == ".pkl":
        return load_learner(path).model.state_dict()
    if path.suffix == ".pickle":
        found = pickle.loads(path.read_bytes())
        return getattr(found, "model", found).state_dict()
    found = torch.load(path, weights_only=path.suffix == ".pt")
    return found.get("model", found)

folder = Path(sys.argv[1])
for path in sorted(folder.rglob("*.p*")):
    event = path.stem.split("-")[0]
    if path.is_dir() or path.suffix == ".txt" or path.stem.endswith("expected"):
        continue
    try:
        expected, found = torch.load(folder / f"{event}-expected.pt"), state(path)
        same = list(expected) == list(found) and all(torch.equal(expected[k], found[k]) for k in expected)
        helpers.Net().load_state_dict(found)
        print(path.name, "same" if same else "differs")
    except BaseException as error:
        print(path.name, type(error).__name__, error)
"""

EVENTS_TO_SAVE = ["before_fit", "after_step", "after_epoch", "after_fit"]
WAYS = ["save", "state", "copy", "pickle", "export", "learner"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], SparsifyCallback, Learner]:
    """Files of every kind from every moment of one fit, read where there is no Gossamer."""
    folder = tmp_path_factory.mktemp("written")
    torch.manual_seed(0)
    learn = learner(folder, fastai_digits(), loss_func=CrossEntropyLossFlat())
    callback = half(granularity="filter")

    def write(learn: Learner) -> None:
        event = learn.watching
        if event == "after_step" and (learn.epoch, learn.iter) != (0, 1):
            return
        if event == "after_epoch" and learn.epoch != 0:
            return
        model = learn.model
        torch.save({k: v.clone() for k, v in model.state_dict().items()}, folder / f"{event}-expected.pt")
        learn.save(f"{event}-save", with_opt=True)
        torch.save(model.state_dict(), folder / f"{event}-state.pt")
        (folder / f"{event}-copy.pickle").write_bytes(pickle.dumps(copy.deepcopy(model)))
        (folder / f"{event}-pickle.pickle").write_bytes(pickle.dumps(model))
        if event != "after_step":  # in the middle of a batch torch refuses to copy the loss, and so fastai the learner
            (folder / f"{event}-learner.pickle").write_bytes(pickle.dumps(copy.deepcopy(learn)))
        # fastai's export ends the batch as if the fit were over; who calls it there puts this back.
        kept = {k: getattr(learn, k, None) for k in ("dl", "xb", "yb", "pred", "loss")}
        learn.export(f"{event}-export.pkl")
        for name, value in kept.items():
            setattr(learn, name, value)

    def at(event: str) -> Watch:
        def look(learn: Learner) -> None:
            learn.watching = event
            write(learn)
            del learn.watching

        return Watch(look, event)

    quiet(learn, 4, callback, of(callback), *(at(e) for e in EVENTS_TO_SAVE))
    here = Path(helpers.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)],
        env={**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split(" ", 1) for line in done.stdout.splitlines()), callback, learn


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("event", EVENTS_TO_SAVE)
def test_what_is_written_in_a_fit_loads_without_gossamer_and_is_the_same(written: Any, event: str, way: str) -> None:
    if (event, way) == ("after_step", "learner"):
        pytest.skip("torch copies no tensor that the loss was computed from, so fastai copies no learner there")
    found = {name.rsplit(".", 1)[0]: said for name, said in written[0].items()}
    assert found[f"{event}-{way}"] == "same"


def test_training_goes_on_after_an_export_in_the_middle_of_a_fit(written: Any) -> None:
    _, callback, learn = written
    assert [r.zeros for r in callback.report().rows] == HALF
    assert len(learn.recorder.values) == 4
    for name, mask in callback.sparse.sparsifier.masks.items():
        weight = learn.model.get_submodule(name).weight
        assert not weight[~mask].any()
        for value in learn.opt.state[weight].values():  # that of the optimizer which the last export made
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                assert not value[~mask].any()


def test_a_learner_exported_beside_the_sparse_saver_holds_nothing_of_gossamer(tmp_path: Path) -> None:
    learn = learner(tmp_path, fastai_digits(), loss_func=CrossEntropyLossFlat())
    learn.add_cbs([half(), SaveSparseModelCallback()])
    learn.export()
    assert b"gossamer" not in _whole_file(tmp_path / "export.pkl")


def _whole_file(path: Path) -> bytes:
    with zipfile.ZipFile(path) as parts:
        return b"".join(parts.read(name) for name in parts.namelist())


def test_a_learner_exported_beside_the_callback_and_after_it_holds_nothing_of_gossamer(tmp_path: Path) -> None:
    learn = learner(tmp_path, fastai_digits(), loss_func=CrossEntropyLossFlat(), cbs=half())
    learn.export("before.pkl")
    quiet(learn, 2)
    learn.export("after.pkl")
    learn.remove_cb(learn.sparsify)
    assert hasattr(learn, "keep_sparse")
    learn.export("kept.pkl")
    for name in ("before", "after", "kept"):
        assert b"gossamer" not in _whole_file(tmp_path / f"{name}.pkl"), name


def test_a_learner_copied_in_a_fit_trains_on_with_one_column() -> None:
    learn, callback, copies = small(), half(), []
    watch = Watch(lambda learn: copies.append(copy.deepcopy(learn)) if learn.epoch == 0 else None, "after_epoch")
    quiet(learn, 4, callback, watch)
    (twin,) = copies
    quiet(twin, 2)
    assert list(twin.recorder.metric_names).count("sparsity") == 1
    assert zeros(twin.model) == HALF
    assert zeros(learn.model) == HALF


# -- what else a fit meets ---------------------------------------------------------------------------------------------


def test_a_callback_that_predicts_in_the_middle_of_a_fit_disturbs_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def look(learn: Learner) -> None:
        for _ in range(2):
            learn.get_preds(inner=True)

    learn, callback = small(), half(verbose=True)
    quiet(learn, 2, callback, Watch(look, "after_epoch"))
    out = capsys.readouterr().out
    assert out.count("Sparsity at the end of epoch") == 2
    assert out.count("Final Sparsity: 50.00%") == 1
    assert callback.sparsity_now() == 50


def test_masks_of_layers_that_a_new_callback_does_not_see_to_stay_with_the_keeper() -> None:
    learn = small()
    quiet(learn, 1, half(layer_type=(nn.Conv2d, nn.Linear)))
    zeros = int((learn.model.head.weight == 0).sum())
    quiet(learn, 2, SparsifyCallback(70, verbose=False))
    assert int((learn.model.head.weight == 0).sum()) == zeros > 0
    quiet(learn, 1)
    assert int((learn.model.head.weight == 0).sum()) == zeros


def test_zeros_that_a_new_callback_lets_grow_are_not_masked_again_by_the_keeper_of_a_part() -> None:
    learn = small()
    quiet(learn, 1, half(model=learn.model.conv3))
    quiet(learn, 1, SparsifyCallback(0, keep_zeros=False, verbose=False))
    grown = int((learn.model.conv3.weight != 0).sum())
    quiet(learn, 1)
    assert int((learn.model.conv3.weight != 0).sum()) >= grown > learn.model.conv3.weight.numel() // 2


def test_after_an_interrupt_with_the_callback_on_the_learner_validation_sees_zeros() -> None:
    def stop(_: Learner) -> None:
        raise KeyboardInterrupt

    watch = Watch(stop)
    watch.order = -50  # between the optimizer's step and ours
    learn, callback = small(), half(schedule=lin)
    learn.add_cb(callback)
    quiet(learn, 1)
    with contextlib.suppress(KeyboardInterrupt):
        quiet(learn, 1, watch)
    learn.validate()
    for target in callback.sparse.sparsifier.targets:
        assert not target.weight.detach()[~callback.sparse.sparsifier.masks[target.name]].any()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("when", ["sparse", "dense"])
def test_an_interrupt_leaves_zeros_and_no_trace_at_once_with_the_callback_on_the_learner(
    error: type[BaseException], when: str, tmp_path: Path
) -> None:
    def stop(_: Learner) -> None:
        raise error("stopped")

    watch = Watch(stop)
    watch.order = -50  # between the optimizer's step and ours
    learn, callback = small(tmp_path), half(schedule=lin)
    learn.add_cb(callback)
    quiet(learn, 1)
    if when == "dense":
        learn.remove_cb(callback)
    metrics, callbacks = list(learn.metrics), [type(cb) for cb in learn.cbs]
    with contextlib.suppress(error):
        quiet(learn, 1, watch)
    for target in callback.sparse.sparsifier.targets:
        assert not target.weight.detach()[~callback.sparse.sparsifier.masks[target.name]].any()
    if when == "sparse":
        assert "_do_epoch" not in vars(learn)
        assert (list(learn.metrics), [type(cb) for cb in learn.cbs]) == (metrics, callbacks)
    quiet(learn, 1)
    assert "_do_epoch" not in vars(learn)
    assert callback.sparsity_now() == 50


def test_two_guards_leave_in_any_order() -> None:
    learn = small()
    broken: list[str] = []
    first, second = Guard(learn, lambda: broken.append("first")), Guard(learn, lambda: broken.append("second"))
    first.leave()
    with pytest.raises(AttributeError):
        learn._with_events(learn._do_epoch, "epoch", CancelEpochException)  # no fit, so no epoch
    assert broken == ["second"]
    second.leave()
    assert "_with_events" not in vars(learn)
