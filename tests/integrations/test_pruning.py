"""A fastai fit that prunes: by the schedule, exactly, with the optimizer's state; and it leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, OptimWrapper
from torch import nn

from gossamer import ArgumentError, StateError, TargetError
from gossamer.integrations.fastai import PruneCallback, SparsifyCallback


def make_learner(**options) -> Learner:
    torch.manual_seed(0)
    items = [(torch.randn(1, 8, 8), torch.tensor(i % 2)) for i in range(24)]
    dls = DataLoaders.from_dsets(items[:16], items[16:], bs=4, num_workers=0, device="cpu")
    layers = [nn.Conv2d(1, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 8, 3), nn.Flatten(), nn.Linear(128, 2)]
    return Learner(dls, nn.Sequential(*layers), loss_func=nn.CrossEntropyLoss(), **options)


def widths(learn: Learner) -> tuple[int, int, int]:
    return learn.model[0].out_channels, learn.model[3].out_channels, learn.model[5].in_features


def test_a_fit_follows_the_schedule_and_ends_at_the_target(capsys):
    learn = make_learner()
    cb = PruneCallback(50, schedule="lin")
    learn.fit(4, cbs=cb)
    assert widths(learn) == (10, 4, 64)
    assert [round(row["sparsity"], 4) for row in cb.history] == [14.2857, 25.0, 39.2857, 50.0]
    said = capsys.readouterr().out
    assert "Pruning filters until a sparsity of 50%" in said
    assert "Filters gone at the end of epoch 3: 50.00%" in said
    assert "Parameters: 1,946 → 614 (31.6 %)" in said
    assert [type(c).__name__ for c in learn.cbs] == [type(c).__name__ for c in make_learner().cbs]
    assert not learn.metrics


@pytest.mark.parametrize("kind", ["adam", "momentum", "torch"])
def test_what_the_optimizer_knows_goes_along(kind):
    factory = {"momentum": lambda p, lr: SGD(p, lr, mom=0.9)}.get(kind)
    if kind == "torch":
        factory = lambda p, lr: OptimWrapper(p, torch.optim.Adam, lr=lr)  # noqa: E731
    learn = make_learner(**({"opt_func": factory} if factory else {}))
    parameters = list(learn.model.parameters())
    learn.fit(2, cbs=PruneCallback(50, schedule="lin", verbose=False))
    assert all(a is b for a, b in zip(parameters, learn.model.parameters(), strict=True))
    state = getattr(learn.opt, "opt", learn.opt).state
    tensors = [(p, v) for p in parameters for v in state[p].values() if torch.is_tensor(v) and v.ndim]
    assert len(tensors) >= len(parameters)
    assert all(v.shape == p.shape for p, v in tensors)
    learn.fit(1)
    assert widths(learn) == (10, 4, 64)


def test_fine_tune_is_one_schedule_and_a_second_fit_goes_on():
    learn = make_learner(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    cb = PruneCallback(50, schedule="lin", verbose=False)
    seen = []

    class Watch(Callback):
        order = 90

        def after_epoch(self):
            seen.append(self.learn.model[0].out_channels)

    learn.fine_tune(3, cbs=[cb, Watch()])
    assert seen == [17, 15, 12, 10]
    learn.fit(2, cbs=[cb])
    assert widths(learn) == (10, 4, 64)


def test_a_dict_a_context_and_what_a_layer_keeps():
    learn = make_learner()
    learn.fit(1, cbs=PruneCallback({"3": 25}, round_to=2, verbose=False))
    assert widths(learn) == (20, 6, 96)
    learn = make_learner()
    learn.fit(1, cbs=PruneCallback(50, "global", exclude="3", verbose=False))
    assert widths(learn) == (10, 8, 128)
    learn = make_learner()
    learn.model = nn.Sequential(learn.model[:4], *learn.model[4:])
    learn.fit(1, cbs=PruneCallback(50, model=learn.model[0], example_inputs=torch.rand(1, 1, 8, 8), verbose=False))
    # Its own last layer gives its outputs.
    assert (learn.model[0][0].out_channels, learn.model[0][3].out_channels) == (10, 8)


@pytest.mark.filterwarnings("ignore:.*numpy.core is deprecated", "ignore:Saved file doesn")
def test_lr_find_validate_and_predictions_change_nothing(tmp_path):
    learn = make_learner(path=tmp_path)
    cb = PruneCallback(50, verbose=False)
    learn.add_cb(cb)
    learn.validate()
    learn.get_preds()
    assert widths(learn) == (20, 8, 128)
    with learn.no_bar():
        learn.lr_find(num_it=2, show_plot=False, suggest_funcs=())
    assert widths(learn) == (20, 8, 128)
    learn.fit(1)
    assert widths(learn) == (10, 4, 64)
    learn.validate()
    copy.deepcopy(learn)


def test_a_fit_that_is_broken_off_leaves_a_network_that_runs():
    class Stop(Callback):
        order = 50

        def after_batch(self):
            if self.learn.epoch == 1:
                raise KeyboardInterrupt

    learn = make_learner()
    cb = PruneCallback(50, schedule="lin", verbose=False)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[cb, Stop()])
    assert widths(learn)[0] == 14
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, Stop)])
    learn.fit(1, cbs=cb)
    assert widths(learn) == (10, 4, 64)


@pytest.mark.filterwarnings("ignore:.*Disabling autocast", "ignore:.*CUDA is not available", "ignore:.*cuda")
def test_mixed_precision_and_a_copy(tmp_path):
    learn = make_learner(cbs=MixedPrecision(), path=tmp_path)
    learn.fit(1, cbs=PruneCallback(50, verbose=False))
    assert widths(learn) == (10, 4, 64)
    copy.deepcopy(learn)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PruneCallback(101), ArgumentError, "outside"),
        (lambda: PruneCallback({"a": "x"}), ArgumentError, "no number"),
        (lambda: PruneCallback(50, "2:4"), ArgumentError, "is for weights"),
        (lambda: PruneCallback({"0": 5}, "global"), ArgumentError, "needs context='local'"),
        (lambda: PruneCallback(50, schedule="fast"), ArgumentError, "unknown schedule"),
        (lambda: PruneCallback(50, criteria="best"), ArgumentError, "unknown criterion"),
        (lambda: PruneCallback(50, round_to=-1), ArgumentError, "no positive integer"),
        (lambda: PruneCallback(50, layer_type="Conv2d"), ArgumentError, "is a string"),
        (lambda: PruneCallback(50).report(), StateError, "nothing is pruned yet"),
    ],
)
def test_bad_input_is_refused_when_the_callback_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "others", "message"),
    [
        ({"sparsity": {"conv9": 50}}, [], "no layer is called 'conv9'"),
        ({"sparsity": 50, "model": nn.Linear(1, 1)}, [], "is no part of the learner's model"),
        ({"sparsity": 50}, [lambda: SparsifyCallback(50, verbose=False)], "holds masks"),
        ({"sparsity": 50}, [SaveModelCallback], "every_epoch=True"),
        ({"sparsity": 50}, [lambda: PruneCallback(30)], "one PruneCallback in a fit"),
    ],
)
def test_what_does_not_fit_the_learner_is_refused_when_the_fit_begins(options, others, message, tmp_path):
    learn = make_learner(path=tmp_path)
    with pytest.raises((ArgumentError, TargetError), match=message):
        learn.fit(1, cbs=[PruneCallback(verbose=False, **options), *[make() for make in others]])
    assert widths(learn) == (20, 8, 128)
