"""A fit that prunes, kept in a file: what goes on, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import contextlib
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, OptimWrapper, ranger
from torch import nn

from gossamer import ArgumentError, Context, FileError, GossamerWarning, StateError
from gossamer.integrations.fastai import PruneCallback, SparsifyCallback
from gossamer.rules.schedules import SCHEDULES
from gossamer.storage.states import load_state, save_state

KIND = "checkpoint of a fastai fit"


class Stop(Callback):
    """Breaks off as Ctrl-C does, in the middle of an epoch."""

    order = 1000

    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def after_step(self) -> None:
        if self.epoch == self.at:
            raise KeyboardInterrupt


def learner(width: int = 8, **options: Any) -> Learner:
    torch.manual_seed(2)
    random.seed(2)  # the loader shuffles with it
    pairs = [(torch.randn(1, 8, 8), torch.tensor(i % 2)) for i in range(24)]
    dls = DataLoaders.from_dsets(pairs, pairs, bs=8, num_workers=0, device="cpu")
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1)),
        nn.Sequential(nn.Conv2d(width, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2)),
    )
    options = {"splitter": lambda m: [list(part.parameters()) for part in m], **options}
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss(), **options)
    learn.logger = lambda *_: None
    return learn


def fit(epochs: int, callback: Callback, *more: Callback, learn: Learner | None = None) -> Learner:
    learn = learn or learner()
    with learn.no_bar(), contextlib.suppress(KeyboardInterrupt):
        learn.fit(epochs, 1e-2, cbs=[callback, *more])
    return learn


def rules(path: Path, **changes: Any) -> PruneCallback:
    return PruneCallback(
        **{"sparsity": 50, "schedule": "lin", "verbose": False, "checkpoint": path, "resume": True, **changes}
    )


def widths(learn: Learner) -> tuple[int, int]:
    return learn.model[0][0].out_channels, learn.model[1][0].out_channels


def bits(learn: Learner) -> list[torch.Tensor]:
    """Weights, buffers, and all that the optimizer has of them."""
    found = [t.clone() for t in learn.model.state_dict().values()]
    inner = getattr(learn.opt, "opt", learn.opt)
    for p in learn.model.parameters():
        found += [v.clone() for v in inner.state[p].values() if torch.is_tensor(v)]
    return found


def same(one: Learner, other: Learner) -> bool:
    a, b = bits(one), bits(other)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


OPTIMIZERS = {
    "adam": {},
    "momentum": {"opt_func": partial(SGD, mom=0.9)},
    "lookahead": {"opt_func": ranger},
    "torch": {"opt_func": partial(OptimWrapper, opt=torch.optim.AdamW)},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 2, 3])
def test_a_fit_that_was_broken_off_goes_on_with_the_same_bits(optimizer: str, stop: int, tmp_path: Path) -> None:
    def run(name: str, *more: Callback) -> tuple[PruneCallback, Learner]:
        callback = rules(tmp_path / name)
        return callback, fit(4, callback, *more, learn=learner(**OPTIMIZERS[optimizer]))

    callback, whole = run("whole")
    run("broken", Stop(stop))
    again, learn = run("broken")
    assert widths(learn) == (4, 6)
    assert same(learn, whole)
    assert again.history == callback.history
    assert len(learn.recorder.losses) == 12
    assert str(again.report()) == str(callback.report())


@pytest.mark.parametrize(
    "changes",
    [
        {"criteria": "sanh_movement"},
        {"criteria": "updating_movmag", "context": "global"},
        {"criteria": "wanda", "data": 1},
        {"criteria": "grasp", "context": Context("global", ceiling=75), "schedule": "agp"},
        {"criteria": "taylor", "round_to": 3},
        {"schedule": SCHEDULES["lin"].every(2)},
        {"sparsity": {"1.0": 50}, "criteria": "random", "seed": 3},
    ],
)
def test_whatever_chooses_the_filters_goes_on_with_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(4, rules(tmp_path / "whole", **changes))
    fit(4, rules(tmp_path / "broken", **changes), Stop(2))
    assert same(fit(4, rules(tmp_path / "broken", **changes)), whole)


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_both_phases_of_fine_tune_go_on(stop: int, tmp_path: Path) -> None:
    class StopAt(Callback):
        order = 1000

        def __init__(self, at: int) -> None:
            self.left = iter(range(at * 3 + 2))

        def after_step(self) -> None:
            if next(self.left, None) is None:
                raise KeyboardInterrupt

    def run(name: str, *more: Callback) -> Learner:
        learn = learner()
        with learn.no_bar(), contextlib.suppress(KeyboardInterrupt):
            learn.fine_tune(2, 1e-2, freeze_epochs=2, cbs=[rules(tmp_path / name), *more])
        return learn

    whole = run("whole")
    run("broken", StopAt(stop))
    learn = run("broken")
    assert widths(learn) == (4, 6)
    assert same(learn, whole)


def test_a_finished_fit_is_put_back_and_nothing_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.safetensors"
    done = fit(2, rules(path))
    steps: list[int] = []

    class Count(Callback):
        def after_step(self) -> None:
            steps.append(1)

    capsys.readouterr()
    again = fit(2, rules(path, verbose=True), Count())
    said = capsys.readouterr().out
    assert not steps
    assert f"Going on from {path}: all is done" in said
    assert "Pruning Report:" in said
    assert same(again, done)


@pytest.mark.parametrize("stop", [(0, 1), (1, 1)])
def test_two_fits_that_share_a_callback_and_a_file_go_on_when_the_script_runs_again(
    stop: tuple[int, int], tmp_path: Path
) -> None:
    def script(path: Path, stop_in: int = -1) -> Learner:
        callback, learn = rules(path), learner()
        for number in range(2):
            more = [Stop(stop[1])] if number == stop_in else []
            fit(2, callback, *more, learn=learn)
            if more:
                break
        return learn

    whole = script(tmp_path / "whole")
    script(tmp_path / "broken", stop_in=stop[0])
    assert same(script(tmp_path / "broken"), whole)


def test_every_so_many_epochs_and_after_the_last(tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(Callback):
        order = 20_000  # after everybody else

        def after_epoch(self) -> None:
            path = tmp_path / "run.safetensors"
            seen.append(load_state(path, KIND)["epoch"] if path.exists() else 0)

    fit(5, rules(tmp_path / "run.safetensors", every=2), Look())
    assert seen == [0, 2, 2, 4, 5]


def test_an_earlier_run_is_not_overwritten_by_mistake(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(2, rules(path), Stop(1))
    before = path.read_bytes()
    with pytest.raises(StateError, match="say resume=True"):
        fit(2, rules(path, resume=False))
    assert path.read_bytes() == before


def unchanged(learn: Learner, before: list[torch.Tensor]) -> bool:
    now = list(learn.model.state_dict().values())
    return widths(learn)[1] == 12 and all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


@pytest.mark.parametrize(
    ("epochs", "changes", "options", "words"),
    [
        (5, {}, {}, "is of 3 epochs, and this fit is of 5"),
        (3, {"sparsity": 60}, {}, "sparsity is"),
        (3, {"schedule": "agp"}, {}, "schedule is 'lin' there and 'agp' here"),
        (3, {"criteria": "squared_final"}, {}, "criteria is 'large_final' there"),
        (3, {"context": "global"}, {}, "context is 'local' there"),
        (3, {"exclude": "0.0"}, {}, "sparsity is"),
        (3, {}, {"width": 6}, "another network; its groups of channels"),
        (3, {}, {"opt_func": SGD}, "with the optimizer"),
        (3, {}, {"splitter": lambda m: [list(m.parameters())]}, "parameter groups"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused_and_nothing_changes(
    epochs: int, changes: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), Stop(2))
    learn = learner(**options)
    before, modules = [t.clone() for t in learn.model.state_dict().values()], str(learn.model)
    with pytest.raises(FileError) as error:
        fit(epochs, rules(path, **changes), learn=learn)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert unchanged(learn, before)
    assert str(learn.model) == modules


def test_a_file_of_another_callback_is_refused_both_ways(tmp_path: Path) -> None:
    pruned, sparse = tmp_path / "pruned", tmp_path / "sparse"
    fit(3, rules(pruned), Stop(2))
    fit(3, SparsifyCallback(50, verbose=False, checkpoint=sparse), Stop(2))
    with pytest.raises(FileError, match="is of a fit with a SparsifyCallback, and this one has a PruneCallback"):
        fit(3, rules(sparse))
    with pytest.raises(FileError, match="is of a fit with a PruneCallback, and this one has a SparsifyCallback"):
        fit(3, SparsifyCallback(50, verbose=False, checkpoint=pruned, resume=True))


def mangle(state: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for step in path:
        state = state[step]
    if value is None:
        del state[last]
    else:
        state[last] = value


@pytest.mark.parametrize("value", [None, "x", 3.5])
@pytest.mark.parametrize(
    "key",
    [
        *("sparse", "learner", "sparse.pruner", "sparse.history", "sparse.pruner.kept", "sparse.pruner.progress"),
        *("sparse.pruner.asked", "sparse.pruner.rules", "sparse.pruner.evidence", "learner.model", "learner.gradients"),
        *("learner.optimizer", "learner.optimizer.state", "learner.optimizer.hypers", "learner.random"),
    ],
)
def test_a_mangled_checkpoint_is_a_file_error_and_nothing_changes(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), Stop(2))
    state = load_state(path, KIND)
    mangle(state, key, value)
    save_state(path, state, KIND)
    learn = learner()
    before, modules = [t.clone() for t in learn.model.state_dict().values()], str(learn.model)
    with pytest.raises(FileError):
        fit(3, rules(path), learn=learn)
    assert unchanged(learn, before)
    assert str(learn.model) == modules
    callback = rules(tmp_path / "other")  # and it trains as if nothing had been
    assert same(fit(3, callback, learn=learn), fit(3, rules(tmp_path / "third")))


def test_a_refusal_after_the_cut_brings_the_filters_back_for_the_same_callback_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    whole = fit(3, rules(tmp_path / "whole"))
    fit(3, rules(path), Stop(2))
    good = load_state(path, KIND)
    mangled = load_state(path, KIND)
    mangled["learner"]["optimizer"]["hypers"] = 3.5  # which is looked at once the network has its new shapes
    save_state(path, mangled, KIND)
    callback, learn = rules(path), learner()
    with pytest.raises(FileError):
        fit(3, callback, learn=learn)
    assert (widths(learn), callback.sparsity_now()) == ((8, 12), 0)
    save_state(path, good, KIND)
    assert same(fit(3, callback, learn=learn), whole)


def test_after_a_refusal_the_pruner_of_an_earlier_fit_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), Stop(2))
    state = load_state(path, KIND)
    state["fit"] = 1
    state["learner"]["optimizer"]["hypers"] = 3
    callback, learn = rules(tmp_path / "own.safetensors"), learner()
    fit(2, callback, learn=learn)
    before, gone = bits(learn), callback.sparsity_now()
    save_state(tmp_path / "own.safetensors", state, KIND)
    callback.file._is_done = False
    with pytest.raises(FileError):
        fit(3, callback, learn=learn)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(learn), strict=True))
    assert callback.sparsity_now() == gone
    assert widths(learn) == (4, 6)


def test_filters_that_are_gone_do_not_come_back_and_the_error_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    callback = rules(path)
    learn = fit(3, callback, Stop(2))
    fewer = widths(learn)
    with pytest.raises(FileError, match="make the network anew"):
        fit(3, callback, learn=learn)
    assert widths(learn) == fewer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": True}, "nothing to go on from"),
        ({"checkpoint": 3}, "is no path"),
        ({"checkpoint": "x", "every": 0}, "every="),
        ({"every": 5}, "has no file to write"),
        ({"data": 0}, "data=0"),
        ({"context": "output"}, "is for weights"),
    ],
)
def test_bad_input_is_refused_when_the_callback_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PruneCallback(50, **options)


# -- criteria that look at data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "looks",
    [
        lambda weight, gradient: weight.abs(),
        lambda weight, gradient_squared: weight.abs(),
        lambda weight, hessian_gradient: weight.abs(),
        lambda weight, flow: weight.abs(),
        lambda weight, input_norm: weight.abs(),
    ],
)
def test_a_fit_that_looks_at_its_data_is_undisturbed(looks: Any) -> None:
    """One that gathers evidence and goes by magnitude all the same is, bit for bit, one that gathers none."""
    seen: list[tuple[bool, int]] = []

    class Watch(Callback):
        order = 90

        def after_step(self) -> None:
            seen.append((self.model.training, sum(len(m._forward_pre_hooks) for m in self.model.modules())))

    options = {"schedule": "lin", "verbose": False}
    plain = fit(2, PruneCallback(50, criteria=lambda w: w.abs(), **options))
    looked = fit(2, PruneCallback(50, criteria=looks, data=2, **options), Watch())
    assert same(plain, looked)
    assert set(seen) == {(True, 0)}


def test_taylor_in_a_fit_is_autograds_with_the_learners_own_loss() -> None:
    learn = learner()
    pairs, rest = [], []
    x = torch.stack([learn.dls.train.dataset[i][0] for i in range(8)])
    y = torch.stack([learn.dls.train.dataset[i][1] for i in range(8)])

    class Look(Callback):
        order = -5  # right before the filters go

        def after_step(self) -> None:
            if not pairs:
                state = torch.get_rng_state()
                weight = self.model[1][0].weight
                buffers = [b.clone() for b in self.model.buffers()]
                (gradient,) = torch.autograd.grad(self.learn.loss_func(self.model(x), y), weight)
                for b, was in zip(self.model.buffers(), buffers, strict=True):
                    b.copy_(was)
                torch.set_rng_state(state)
                scores = (weight * gradient).abs().flatten(1).mean(1)
                rest.append(weight.detach()[scores.argsort()[6:].sort().values].clone())
                pairs.append(1)

    class After(Callback):
        order = -3

        def after_step(self) -> None:
            if len(rest) == 1:
                rest.append(self.model[1][0].weight.detach().clone())

    learn.model[0][3].p = 0.0
    options = {"criteria": "taylor", "schedule": lambda _: 1.0, "exclude": "0.0", "data": [(x, y)]}
    fit(1, PruneCallback(50, verbose=False, **options), Look(), After(), learn=learn)
    assert torch.equal(*rest)


def test_a_layer_that_is_left_with_next_to_nothing_is_named_in_a_fit() -> None:
    learn = learner(width=30)
    with torch.no_grad():
        learn.model[0][0].weight *= 1e-3
    with pytest.warns(GossamerWarning, match="'0.0' keeps 1 of 30 filters"):
        fit(1, PruneCallback(70, "global", verbose=False), learn=learn)
    assert sum(widths(learn)) == 13
