"""A fit that is killed and goes on in another process is, bit for bit, the fit that was never stopped."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import os
import random
import signal
import sys
import traceback
from collections import deque
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from fastcore.foundation import L
from torch import nn

from gossamer.errors import ArgumentError, FileError, GossamerWarning, StateError
from gossamer.integrations.fastai import SaveSparseModelCallback, SparsifyCallback
from gossamer.storage.states import load_state, save_state
from gossamer.storage.tensors import load_tensors

KIND = "checkpoint of a fastai fit"
PRUNING = ["prune", "prune_data", "prune_tune"]
_DEMONSTRATION = Path(__file__).parents[2] / "benchmarks" / "resume.py"


def demonstration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resume", _DEMONSTRATION)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_a_child(kind: str, folder: Path, kill_at: int, epochs: int) -> tuple[int, dict[str, str]]:
    """Trains in a forked process: what it was killed by, and what it ended with."""
    out = folder / "out.txt"
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            with out.open("w") as file, contextlib.redirect_stdout(file):
                demonstration().train(kind, folder, kill_at, epochs)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status), {}
    assert os.WEXITSTATUS(status) == 0
    return 0, dict(line.split(" ", 1) for line in out.read_text().splitlines() if not line.startswith(" "))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks a process that runs torch")
@pytest.mark.parametrize("kind", ["plain", "adamw", "one_cycle", "fine_tune", "lottery", "change", "busy", *PRUNING])
def test_killed_in_any_epoch_it_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(1))
    torch.optim.AdamW([weight]).step()  # imports much at its first step, which each child would do anew
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    _, want = in_a_child(kind, whole, 0, 4)
    for kill_at in (3, 14, 12):  # in epoch 0, before there is a checkpoint; in epoch 1; in the epoch after that one
        assert in_a_child(kind, broken, kill_at, 4)[0] == signal.SIGKILL
    _, got = in_a_child(kind, broken, 0, 4)
    assert got == want
    lines = [(f / "lines.txt").read_text().replace(str(f), "").splitlines() for f in (whole, broken)]
    rest = [line for line in lines[1] if not line.startswith(("Pruning of", "Pruning filters"))]
    assert rest == lines[0][-len(rest) :]
    ends = ("Sparsity at the end", "Filters gone at the end")
    assert sum(line.startswith(ends) for line in rest) == 2  # of the two epochs that were left


# -- in one process ----------------------------------------------------------------------------------------------------


class Stop(Callback):
    """Breaks off as Ctrl-C does, in the middle of an epoch."""

    order = 1000

    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def after_step(self) -> None:
        if self.epoch == self.at:
            raise KeyboardInterrupt


def learner(width: int = 4) -> Learner:
    module = demonstration()
    torch.manual_seed(2)
    random.seed(2)  # the loader shuffles with it
    pairs = [(torch.randn(1, 8, 8), torch.tensor(i % 2)) for i in range(24)]
    dls = module.DataLoaders.from_dsets(pairs, pairs, bs=8, num_workers=0, device="cpu")
    net = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.Flatten(), nn.Linear(128, 2))
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss())
    learn.logger = lambda *_: None
    return learn


def fit(epochs: int, callback: SparsifyCallback, *more: Callback, learn: Learner | None = None) -> Learner:
    learn = learn or learner()
    with learn.no_bar(), contextlib.suppress(KeyboardInterrupt):
        learn.fit(epochs, 1e-2, cbs=[callback, *more])
    return learn


def rules(path: Path, **changes: Any) -> SparsifyCallback:
    return SparsifyCallback(**{"sparsity": 50, "verbose": False, "checkpoint": path, **changes})


def test_nothing_to_resume_is_a_fit_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.safetensors"
    callback = rules(path, resume=True)
    fit(2, callback)
    assert callback.sparsity_now() == 50
    assert load_state(path, KIND)["epoch"] == 2


def test_a_finished_fit_is_put_back_and_nothing_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    done = fit(2, rules(path))
    steps: list[int] = []

    class Count(Callback):
        def after_step(self) -> None:
            steps.append(1)

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        again = fit(2, rules(path, resume=True, verbose=True), Count())
    assert not steps
    assert "all is done" in out.getvalue()
    assert "Final Sparsity: 50.00%" in out.getvalue()
    for name, tensor in done.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


@pytest.mark.parametrize("done", [1, 2, 3])
def test_it_goes_on_with_fastais_progress_bar(done: int, tmp_path: Path) -> None:
    """The bar of the epochs wants its first value to be 0."""
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), *([Stop(done)] if done < 3 else []))
    learn, out = learner(), io.StringIO()
    learn.logger = print  # fastai's own
    callback = rules(path, resume=True)
    with contextlib.redirect_stdout(out):
        learn.fit(3, 1e-2, cbs=callback)
    assert callback.sparsity_now() == 50
    assert all((f"Epoch {n}/3" in out.getvalue()) == (n > done) for n in (2, 3))


def test_the_history_and_the_recorder_are_whole_after_going_on(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(4, rules(path), Stop(2))
    callback = rules(path, resume=True)
    learn = fit(4, callback)
    assert [row["epoch"] for row in callback.history] == [0, 1, 2, 3]
    assert len(learn.recorder.values) == 4
    assert len(learn.recorder.losses) == len(learn.recorder.lrs) == 12
    assert callback.plot() is not None


def test_the_same_learner_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    whole = fit(3, rules(tmp_path / "whole.safetensors"))
    callback = rules(path, resume=True)
    learn = fit(3, callback, Stop(1))
    callback = rules(path, resume=True)
    fit(3, callback, learn=learn)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, learn.model.state_dict()[name])


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
        fit(2, rules(path))
    assert path.read_bytes() == before


def test_a_second_fit_with_the_same_callback_writes_on(tmp_path: Path) -> None:
    callback = rules(tmp_path / "run.safetensors")
    learn = fit(2, callback)
    fit(3, callback, learn=learn)
    assert load_state(tmp_path / "run.safetensors", KIND)["total"] == 3


@pytest.mark.parametrize(
    ("epochs", "changes", "width", "words"),
    [
        (5, {}, 4, "is of 3 epochs, and this fit is of 5"),
        (3, {"sparsity": 60}, 4, "sparsity is"),
        (3, {"schedule": "lin"}, 4, "schedule is 'one_cycle' there and 'lin' here"),
        (3, {"criteria": "squared_final"}, 4, "criteria is"),
        (3, {}, 6, "another network"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused_and_nothing_changes(
    tmp_path: Path, epochs: int, changes: dict[str, Any], width: int, words: str
) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), Stop(1))
    learn = learner(width)
    before = {n: t.clone() for n, t in learn.model.state_dict().items()}
    with pytest.raises(FileError) as error:
        fit(epochs, rules(path, resume=True, **changes), learn=learn)
    assert words in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())


def test_a_checkpoint_with_another_optimizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), Stop(1))
    learn = learner()
    learn.splitter = lambda net: [list(net[0].parameters()), list(net[2:].parameters())]
    with pytest.raises(FileError, match="parameter groups"):
        fit(3, rules(path, resume=True), learn=learn)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = save_state(tmp_path / "run.safetensors", {"a": 1})
    with pytest.raises(FileError, match="holds a state"):
        fit(2, rules(path, resume=True))


def test_callbacks_of_the_users_own_go_on_too(tmp_path: Path) -> None:
    class Counts(Callback):
        def __init__(self) -> None:
            self.steps, self.patience = 0, 5

        def after_step(self) -> None:
            self.steps += 1

    class Averages(Callback):
        """State that is no number goes through the usual two methods."""

        def before_fit(self) -> None:
            self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}

        def after_step(self) -> None:
            for n, p in self.model.named_parameters():
                self.average[n].lerp_(p.detach(), 0.1)

        def state_dict(self) -> dict[str, Any]:
            return self.average

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.average = state

    def train(path: Path, stop: bool) -> tuple[Counts, Averages]:
        counts, averages = Counts(), Averages()
        fit(4, rules(path, resume=True), counts, averages, *([Stop(2)] if stop else []))
        return counts, averages

    _, want = train(tmp_path / "whole", stop=False)
    train(tmp_path / "broken", stop=True)
    counts, averages = train(tmp_path / "broken", stop=False)
    assert counts.steps == 12
    assert all(torch.equal(t, want.average[n]) for n, t in averages.average.items())


class Carries(Callback):
    """All that an averaging or logging callback may hold, and no state_dict."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.by_epoch: dict[str, Any] = {}
        self.recent: deque[int] = deque([0], maxlen=3)
        self.best: float | None = None
        self.limits, self.pair = torch.zeros(2), (0, 0)
        self.array, self.listed = np.zeros(2), L()

    def before_fit(self) -> None:
        self.ema = copy.deepcopy(self.model)
        self.alias, self.weight = self.losses, self.model[0].weight

    def after_step(self) -> None:
        self.losses.append(float(self.loss.detach()))
        self.recent.append(len(self.losses))
        self.best = min(self.losses)
        self.limits.data[0] += 1  # unseen by the tensor's own count of changes
        self.array[1] += 2
        self.listed.append(3)
        self.pair = (len(self.losses), 1)
        self.first = getattr(self, "first", self.losses[0])
        for mean, now in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            mean.data.lerp_(now.data, 0.3)

    def after_epoch(self) -> None:
        norm = self.model[0].weight.detach().norm()
        self.by_epoch[str(self.epoch)] = {"loss": [float(self.loss.detach())], "norm": norm}


def test_what_callbacks_carry_goes_on_too_numbers_lists_tensors_and_averages(tmp_path: Path) -> None:
    def train(path: Path, stop: bool) -> Carries:
        carries = Carries()
        fit(4, rules(path, resume=True), carries, *([Stop(2)] if stop else []))
        return carries

    want = train(tmp_path / "whole", stop=False)
    train(tmp_path / "broken", stop=True)
    got = train(tmp_path / "broken", stop=False)
    for name in ("losses", "by_epoch", "recent", "best", "pair", "first"):
        assert getattr(got, name) == getattr(want, name), name
    assert (list(got.listed), got.array.tolist(), got.limits.tolist()) == ([3] * 12, [0, 24], [12, 0])
    assert all(torch.equal(a, b) for a, b in zip(got.ema.parameters(), want.ema.parameters(), strict=True))
    assert got.alias is got.losses
    assert type(got.recent) is deque
    assert got.weight is not None
    assert not any(
        "weight" in key for key in load_state(tmp_path / "broken", KIND)["learner"]["callbacks"]["carries 1"]
    )


@pytest.mark.parametrize("held", [{1, 2}, random.Random(1), [torch.ones(1), "x"]])
def test_what_a_checkpoint_cannot_take_from_a_callback_is_said(tmp_path: Path, held: Any) -> None:
    class Holds(Callback):
        def __init__(self) -> None:
            self.held, self.name_of_a_file, self.nothing = held, "x", [1, 2]

    with pytest.warns(GossamerWarning, match=r"'holds' holds 'held' \(a .*state_dict") as said:
        fit(1, rules(tmp_path / "run"), Holds())
    assert len(said) == 1


def test_buffers_that_are_not_saved_and_generators_of_the_data_go_on(tmp_path: Path) -> None:
    class Seen(nn.Module):
        """Counts, and remembers as much as it has seen; neither is in its state_dict."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(()), persistent=False)
            self.register_buffer("means", torch.zeros(0), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.n += 1
                self.means = torch.cat([self.means, x.detach().mean()[None]])
            return x + 0.01 * self.n

    class Draws:
        def __init__(self, pairs: Any) -> None:
            self.pairs = list(pairs)
            self.python, self.new, self.old = random.Random(1), np.random.default_rng(1), np.random.RandomState(1)
            self.torch = torch.Generator().manual_seed(1)

        def __len__(self) -> int:
            return len(self.pairs)

        def __getitem__(self, i: int) -> Any:
            x, y = self.pairs[i]
            noise = self.python.random() + self.new.random() + self.old.rand()
            return x + 0.1 * noise + 0.1 * torch.rand(1, generator=self.torch).item(), y

    def train(path: Path, stop: bool) -> Learner:
        learn = learner()
        learn.model.add_module("seen", Seen())
        pairs = [learn.dls.train.dataset[i] for i in range(24)]
        learn.dls = demonstration().DataLoaders.from_dsets(Draws(pairs), pairs, bs=8, num_workers=0, device="cpu")
        learn.dls.train.rng = random.Random(3)
        return fit(4, rules(path, resume=True), *([Stop(2)] if stop else []), learn=learn)

    want = train(tmp_path / "whole", stop=False)
    train(tmp_path / "broken", stop=True)
    got = train(tmp_path / "broken", stop=False)
    assert all(torch.equal(t, want.model.state_dict()[n]) for n, t in got.model.state_dict().items())
    assert got.model.seen.n == 12
    assert torch.equal(got.model.seen.means, want.model.seen.means)
    assert "seen.n" not in got.model.state_dict()


def test_a_callback_that_did_not_change_keeps_what_it_was_made_with(tmp_path: Path) -> None:
    class Patient(Callback):
        def __init__(self, patience: int) -> None:
            self.patience = patience

    path = tmp_path / "run.safetensors"
    fit(3, rules(path), Patient(1), Stop(1))
    patient = Patient(7)
    fit(3, rules(path, resume=True), patient)
    assert patient.patience == 7


def test_other_loaders_are_warned_about(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), Stop(1))
    learn = learner()
    learn.dls.loaders.append(learn.dls.loaders[1])
    with pytest.warns(GossamerWarning, match="data loaders"):
        fit(3, rules(path, resume=True), learn=learn)


def test_nothing_in_a_checkpoint_needs_pickle_and_masks_are_packed(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    learn = fit(1, rules(path))
    tensors, metadata = load_tensors(path)
    assert metadata["kind"] == "checkpoint of a fastai fit"
    weights = sum(p.numel() * p.element_size() for p in learn.model.parameters())
    assert sum(t.numel() * t.element_size() for t in tensors.values()) < 3.2 * weights + 30_000  # Adam, masks, random


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "batch"])
def test_every_is_an_epoch_or_a_number_of_them(bad: Any) -> None:
    with pytest.raises(ArgumentError, match="every="):
        SparsifyCallback(50, checkpoint="x", every=bad)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (Adam, SGD),
        (SGD, Adam),
        (Adam, partial(OptimWrapper, opt=torch.optim.AdamW)),
        (partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=torch.optim.SGD)),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused_before_anything_changes(
    tmp_path: Path, first: Any, then: Any
) -> None:
    path = tmp_path / "run.safetensors"
    learn = learner()
    learn.opt_func = first
    fit(3, rules(path), Stop(1), learn=learn)
    learn = learner()
    learn.opt_func = then
    before = {n: t.clone() for n, t in learn.model.state_dict().items()}
    with pytest.raises(FileError, match="with the optimizer"):
        fit(3, rules(path, resume=True), learn=learn)
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())


@pytest.mark.parametrize(
    "changes", [{"criteria": "random", "seed": 1}, {"skip_frozen": True}, {"save_tickets": True}, {"lth": True}]
)
def test_other_arguments_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path, criteria=changes.get("criteria", "large_final")), Stop(1))
    with pytest.raises(FileError, match=r"seed is|skip_frozen is|save_tickets=False|lth=False"):
        fit(3, rules(path, resume=True, **changes))


# -- what a notebook does ----------------------------------------------------------------------------------------------


def test_the_same_callback_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    whole = fit(4, rules(tmp_path / "whole.safetensors"))
    callback = rules(tmp_path / "run.safetensors", resume=True)
    learn = fit(4, callback, Stop(2))
    fit(4, callback, learn=learn)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, learn.model.state_dict()[name])


def test_the_same_callback_does_not_overwrite_what_was_interrupted(tmp_path: Path) -> None:
    callback = rules(tmp_path / "run.safetensors")
    learn = fit(4, callback, Stop(2))
    with pytest.raises(StateError, match="say resume=True"):
        fit(4, callback, learn=learn)


@pytest.mark.parametrize("lengths", [(2, 2), (2, 3)])
@pytest.mark.parametrize("stop", [(0, 1), (1, 1)])
def test_two_fits_that_share_a_callback_and_a_file_go_on_when_the_script_runs_again(
    tmp_path: Path, lengths: tuple[int, int], stop: tuple[int, int]
) -> None:
    def script(path: Path, stop_in: int = -1) -> Learner:
        callback, learn = rules(path, resume=True), learner()
        for number, epochs in enumerate(lengths):
            more = [Stop(stop[1])] if number == stop_in else []
            fit(epochs, callback, *more, learn=learn)
            if more:
                break
        return learn

    whole = script(tmp_path / "whole")
    script(tmp_path / "broken", stop_in=stop[0])
    again = script(tmp_path / "broken")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_one_schedule_over_two_fits_needs_no_resume_in_one_process(tmp_path: Path) -> None:
    callback, learn = rules(tmp_path / "run.safetensors", total_epochs=4), learner()
    fit(2, callback, learn=learn)
    fit(2, callback, learn=learn)
    assert callback.sparsity_now() == 50


def test_a_fit_with_other_functions_of_the_same_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path, criteria=lambda w: w.abs(), schedule=lambda p: p), Stop(1))
    with pytest.raises(FileError, match="criteria on an example"):
        fit(3, rules(path, resume=True, criteria=lambda w: -w.abs(), schedule=lambda p: p))
    with pytest.raises(FileError, match="schedule at each tenth"):
        fit(3, rules(path, resume=True, criteria=lambda w: w.abs(), schedule=lambda p: p * p))


def test_another_batch_size_or_frozen_layers_are_warned_about(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), Stop(1))
    learn = learner()
    learn.dls.train.bs = 4
    with pytest.warns(GossamerWarning, match="batches an epoch = 3, and here it is 6"):
        fit(3, rules(path, resume=True), learn=learn)


def test_weights_that_are_nan_do_not_replace_a_checkpoint(tmp_path: Path) -> None:
    class Diverge(Callback):
        def after_train(self) -> None:
            if self.epoch == 3:
                with torch.no_grad():
                    self.model[0].bias.fill_(torch.nan)

    path = tmp_path / "run.safetensors"
    with pytest.warns(GossamerWarning, match=r"'0.bias' has nan"):
        fit(4, rules(path), Diverge())
    assert load_state(path, KIND)["epoch"] == 3


def test_one_file_is_enough_for_two_callbacks(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"one file too many.*a\.safetensors' holds the whole fit"):
        fit(1, rules(tmp_path / "a.safetensors"), rules(tmp_path / "b.safetensors", layer_type=nn.Linear))


def test_a_place_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        fit(1, rules(tmp_path / "file" / "run.safetensors"))


def test_an_early_end_says_that_the_target_is_not_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Enough(Callback):
        def after_epoch(self) -> None:
            if self.epoch == 1:
                raise CancelFitException

    fit(4, rules(tmp_path / "run.safetensors", verbose=True), Enough())
    assert "so the target of 50% is not reached" in capsys.readouterr().out
    fit(2, rules(tmp_path / "other.safetensors", verbose=True))
    assert "not reached" not in capsys.readouterr().out


def test_going_on_says_only_what_is_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.safetensors"
    learn = fit(4, rules(path), Stop(2))
    capsys.readouterr()
    fit(4, rules(path, resume=True, verbose=True), learn=learn)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Pruning of weight until a sparsity of 50%", f"Going on from {path}: epoch 2 is next"]
    assert not any("since an earlier fit" in line or "Keeping the" in line for line in lines)


# -- what reviewers broke --------------------------------------------------------------------------------------------


class InBetween(Callback):
    """Validates in the middle of a fit, which sets fastai's own count of epochs to 0."""

    def __init__(self, event: str) -> None:
        setattr(self, event, lambda: None if self.learn.lock.locked() else self.learn.validate())


@pytest.mark.parametrize("event", ["before_epoch", "before_train", "before_batch", "after_batch", "after_epoch"])
def test_validating_in_the_middle_moves_neither_schedule_nor_checkpoint(tmp_path: Path, event: str) -> None:
    callback = rules(tmp_path / "run.safetensors")
    fit(3, callback, InBetween(event))
    plain = rules(tmp_path / "plain.safetensors")
    fit(3, plain)
    assert [row["sparsity"] for row in callback.history] == [row["sparsity"] for row in plain.history]
    assert load_state(tmp_path / "run.safetensors", KIND)["epoch"] == 3


def test_an_optimizer_that_keeps_more_than_moments_goes_on(tmp_path: Path) -> None:
    def train(path: Path, *more: Callback) -> Learner:
        learn = learner()
        learn.opt_func = ranger
        return fit(4, rules(path, resume=True), *more, learn=learn)

    whole = train(tmp_path / "whole")
    train(tmp_path / "broken", Stop(2))
    again = train(tmp_path / "broken")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_two_callbacks_of_one_class_each_go_on_with_their_own(tmp_path: Path) -> None:
    class Counts(Callback):
        def __init__(self, by: int) -> None:
            self.total, self.by = 0, by

        def after_step(self) -> None:
            self.total += self.by

    path, first, second = tmp_path / "run.safetensors", Counts(1), Counts(100)
    fit(4, rules(path, resume=True), first, second, Stop(2))
    first, second = Counts(1), Counts(100)
    fit(4, rules(path, resume=True), first, second)
    assert (first.total, second.total) == (12, 1200)


def test_what_a_callback_counted_in_an_earlier_fit_is_not_lost(tmp_path: Path) -> None:
    class Counts(Callback):
        def __init__(self) -> None:
            self.total = 0

        def after_step(self) -> None:
            self.total += 1

    def script(path: Path, stop: bool) -> int:
        callback, counts, learn = rules(path, resume=True), Counts(), learner()
        fit(2, callback, counts, learn=learn)
        fit(2, callback, counts, *([Stop(1)] if stop else []), learn=learn)
        return counts.total

    script(tmp_path / "run", stop=True)
    assert script(tmp_path / "run", stop=False) == 12


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
        *("fit", "total", "epoch", "sparse", "learner", "sparse.run", "sparse.run.tensors", "sparse.history"),
        *("sparse.tickets", "sparse.said", "sparse.rewinding", "learner.model", "learner.gradients"),
        *("learner.optimizer", "learner.optimizer.state", "learner.optimizer.hypers", "learner.callbacks"),
        *("learner.states", "learner.loaders", "learner.random", "learner.random.torch", "learner.recorder"),
    ],
)
def test_a_mangled_checkpoint_is_a_file_error_and_nothing_changes(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), Stop(1))
    state = load_state(path, KIND)
    if key == "learner.recorder" and value is None:
        return  # a learner need not have one
    mangle(state, key, value)
    save_state(path, state, KIND)
    learn = learner()
    before = {n: t.clone() for n, t in learn.model.state_dict().items()}
    with pytest.raises(FileError):
        fit(3, rules(path, resume=True), learn=learn)
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*numpy.core is deprecated")
def test_a_checkpoint_sets_counters_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), SaveModelCallback(fname=str(tmp_path / "mine")), Stop(1))
    state = load_state(path, KIND)
    state["learner"]["callbacks"].setdefault("save_model 1", {})
    state["learner"]["callbacks"]["save_model 1"] |= {"fname": str(tmp_path / "theirs"), "order": -3}
    save_state(path, state, KIND)
    saver = SaveModelCallback(fname=str(tmp_path / "mine"))
    fit(3, rules(path, resume=True), saver)
    assert (saver.fname, saver.order) == (str(tmp_path / "mine"), SaveModelCallback.order)


def test_the_keeper_holds_through_a_validation_in_the_middle_and_through_cancelled_steps(tmp_path: Path) -> None:
    class Cancel(Callback):
        order = -50  # between the optimizer's step and the keeper's

        def after_step(self) -> None:
            raise CancelFitException

    callback = SparsifyCallback(50, verbose=False)
    learn = fit(1, callback)
    masks = callback.sparse.sparsifier.masks
    for other in (InBetween("after_epoch"), InBetween("before_epoch"), Cancel()):
        with learn.no_bar():
            learn.fit(2, 1e-2, cbs=other)
        for target in callback.sparse.sparsifier.targets:
            assert not target.weight.detach()[~masks[target.name]].any()


def test_an_early_end_leaves_its_epochs_to_the_fits_that_follow(tmp_path: Path) -> None:
    class Enough(Callback):
        def after_epoch(self) -> None:
            raise CancelFitException

    callback, learn = SparsifyCallback(50, total_epochs=4, verbose=False), learner()
    fit(3, callback, Enough(), learn=learn)
    fit(3, callback, learn=learn)
    assert callback.sparsity_now() == 50


def test_a_refused_checkpoint_leaves_the_keeper_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(3, rules(path), Stop(1))
    learn = fit(1, SparsifyCallback(50, verbose=False))
    keeper = learn.keep_sparse
    with pytest.raises(FileError):
        fit(3, rules(path, resume=True, sparsity=70, keep_zeros=False), learn=learn)
    assert keeper in learn.cbs


def test_the_saver_finds_the_schedule_beside_a_keeper_and_waits_for_the_last_phase(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    learn = learner()
    learn.path = tmp_path
    fit(1, SparsifyCallback(50, model=learn.model[0], verbose=False), learn=learn)
    late = SparsifyCallback(50, model=learn.model[2], schedule="one_shot", total_epochs=2, verbose=False)
    for _ in range(2):
        fit(1, late, SaveSparseModelCallback(), learn=learn)
    assert not [w for w in recwarn if issubclass(w.category, GossamerWarning)]


# -- what a second review broke ----------------------------------------------------------------------------------------


def same_model(one: Learner, other: Learner) -> bool:
    there = other.model.state_dict()
    return all(torch.equal(tensor, there[name]) for name, tensor in one.model.state_dict().items())


@pytest.mark.parametrize("stop", [(0, 1), (1, 0), (1, 2)])
@pytest.mark.parametrize("again", ["the script", "the call"])
def test_one_schedule_over_two_fits_goes_on_where_it_was_broken_off(
    again: str, stop: tuple[int, int], tmp_path: Path
) -> None:
    def script(path: Path, *stops: Callback, start: int = 0, callback: Any = None, learn: Any = None) -> Any:
        callback = callback or rules(path, sparsity=80, total_epochs=6, resume=True)
        learn = learn or learner()
        with learn.no_bar():
            for i in range(start, 2):
                learn.fit(3, 1e-2, cbs=[callback, *(s for s in stops if i == stop[0])])
        return callback, learn

    whole, want = script(tmp_path / "whole.safetensors")
    callback, learn = rules(tmp_path / "a.safetensors", sparsity=80, total_epochs=6, resume=True), learner()
    with pytest.raises(KeyboardInterrupt):
        script(tmp_path / "a.safetensors", Stop(stop[1]), callback=callback, learn=learn)
    if again == "the call":  # as in a notebook
        _, got = script(tmp_path / "a.safetensors", start=stop[0], callback=callback, learn=learn)
    else:
        callback, got = script(tmp_path / "a.safetensors")
    assert same_model(got, want)
    assert callback.history == whole.history


def test_one_schedule_over_two_fits_goes_on_without_a_file_too() -> None:
    callback, learn = SparsifyCallback(80, schedule="lin", total_epochs=6, verbose=False), learner()
    fit(3, callback, learn=learn)
    fit(3, callback, Stop(1), learn=learn)  # breaks off in epoch 4 of 6
    fit(2, callback, learn=learn)
    assert callback.sparse.at_target
    assert callback.history[-1]["epoch"] == 5


@pytest.mark.parametrize("where", ["first", "second"])
@pytest.mark.parametrize("stop", [1, 3])
def test_one_file_holds_what_every_callback_does(where: str, stop: int, tmp_path: Path) -> None:
    def both(path: Path, resume: bool = False) -> list[SparsifyCallback]:
        file = {"checkpoint": path, "resume": resume}
        convs = SparsifyCallback(60, verbose=False, **file if where == "first" else {})
        linear = SparsifyCallback(
            40, layer_type=nn.Linear, schedule="lin", verbose=False, **file if where == "second" else {}
        )
        return [convs, linear]

    want = both(tmp_path / "whole.safetensors")
    whole = fit(5, *want)
    fit(5, *both(tmp_path / "a.safetensors"), Stop(stop))
    callbacks = both(tmp_path / "a.safetensors", resume=True)
    assert same_model(fit(5, *callbacks), whole)
    assert [cb.history for cb in callbacks] == [cb.history for cb in want]
    with pytest.raises(FileError, match="a fit with 2 SparsifyCallbacks, and this one has 1"):
        fit(5, both(tmp_path / "a.safetensors", resume=True)[where == "second"])


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_rounded_global_masks_that_hold_still_hold_after_going_on(granularity: str, tmp_path: Path) -> None:
    def make(name: str, **more: Any) -> SparsifyCallback:
        rest: dict[str, Any] = {"context": "global", "granularity": granularity, "round_to": 3, **more}
        return rules(tmp_path / name, schedule="iterative", **rest)

    whole = fit(6, make("whole"))
    for stop in (2, 4):
        fit(6, make("a", resume=True), Stop(stop))
    assert same_model(fit(6, make("a", resume=True)), whole)


def test_a_layer_that_rests_goes_on_as_it_was(tmp_path: Path) -> None:
    class Resting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rest, self.head = nn.Conv2d(1, 8, 3), nn.Linear(2, 2), nn.Linear(288, 2)
            self.seen = nn.Buffer(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += self.training
            x = self.head(self.conv(x).flatten(1))
            return x + self.rest(x) if self.seen <= 4 else x  # in the first epoch, and a step of the next

    def make() -> Learner:
        learn = learner()
        torch.manual_seed(5)
        learn.model = Resting()
        return learn

    whole = fit(4, rules(tmp_path / "whole"), learn=make())
    before = make().model.rest.weight
    assert not torch.equal(before, whole.model.rest.weight)
    fit(4, rules(tmp_path / "a"), Stop(3), learn=make())
    assert same_model(fit(4, rules(tmp_path / "a", resume=True), learn=make()), whole)


def test_what_a_network_calls_its_scaler_is_no_gradient_scaler(tmp_path: Path) -> None:
    learn = learner()
    learn.model.scaler = nn.Parameter(torch.ones(1))
    fit(1, rules(tmp_path / "a"), learn=learn)
    assert (tmp_path / "a").exists()


class TimeIsUp(Callback):
    def after_epoch(self) -> None:
        if self.epoch == 1:
            raise CancelFitException


def test_a_fit_that_was_cancelled_goes_on_when_the_script_runs_again(tmp_path: Path) -> None:
    whole = fit(4, rules(tmp_path / "whole"))
    fit(4, rules(tmp_path / "a", resume=True), TimeIsUp())
    assert same_model(fit(4, rules(tmp_path / "a", resume=True)), whole)


def test_a_fit_that_was_cancelled_is_over_with_a_file_as_without(tmp_path: Path) -> None:
    trained: list[Learner] = []
    for file in ({}, {"checkpoint": tmp_path / "a", "resume": True}):
        callback, learn = SparsifyCallback(60, total_epochs=6, schedule="lin", verbose=False, **file), learner()
        fit(3, callback, TimeIsUp(), learn=learn)
        fit(4, callback, learn=learn)
        assert callback.sparse.at_target
        trained.append(learn)
    assert same_model(*trained)


def test_a_fit_that_was_cancelled_before_it_began_leaves_the_file_to_the_next(tmp_path: Path) -> None:
    class NotYet(Callback):
        order = -3

        def before_fit(self) -> None:
            raise CancelFitException

    whole = fit(4, rules(tmp_path / "whole"))
    callback, learn = rules(tmp_path / "a", resume=True), learner()
    fit(4, callback, Stop(2), learn=learn)
    fit(4, callback, NotYet(), learn=learn)
    fit(4, callback, learn=learn)
    assert same_model(learn, whole)


def test_two_callbacks_that_share_schedule_and_file_go_on_together(tmp_path: Path) -> None:
    def script(name: str, stop: bool) -> Learner:
        convs = rules(tmp_path / name, total_epochs=6, resume=True)
        linear = SparsifyCallback(40, layer_type=nn.Linear, total_epochs=6, verbose=False)
        learn = learner()
        fit(2, convs, linear, learn=learn)
        if stop:
            fit(4, convs, linear, Stop(2), learn=learn)
        return fit(4, convs, linear, learn=learn)

    assert same_model(script("a", True), script("whole", False))


@pytest.mark.parametrize("where", ["first", "second"])
def test_two_callbacks_on_the_same_layers_go_on(where: str, tmp_path: Path) -> None:
    def both(name: str, sparsity: float = 25) -> list[SparsifyCallback]:
        file = {"checkpoint": tmp_path / name, "resume": True}
        weights = SparsifyCallback(50, verbose=False, **file if where == "first" else {})
        filters = SparsifyCallback(sparsity, "filter", verbose=False, **file if where == "second" else {})
        return [weights, filters]

    whole = fit(4, *both("whole"))
    fit(4, *both("a"), Stop(2))
    learn = learner()
    before = {n: t.clone() for n, t in learn.model.state_dict().items()}
    with pytest.raises(FileError, match="of other rules: sparsity"):
        fit(4, *both("a", 50), learn=learn)
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())
    assert same_model(fit(4, *both("a")), whole)


def test_sparsity_does_not_fall_where_a_fit_was_broken_off() -> None:
    seen: list[float] = []

    class Watch(Callback):
        order = 100

        def after_step(self) -> None:
            seen.append(callback.sparsity_now())

    callback, learn = SparsifyCallback(80, schedule="lin", total_epochs=4, verbose=False), learner()
    fit(2, callback, Watch(), Stop(1), learn=learn)
    fit(3, callback, Watch(), learn=learn)
    assert seen == sorted(seen)
    assert callback.sparse.at_target


def test_a_broken_fine_tune_leaves_nothing_to_the_next() -> None:
    class Fails(Callback):
        order = -50

        def before_fit(self) -> None:
            if self.n_epoch == 2:
                raise ZeroDivisionError("phase two")

    callback, learn = SparsifyCallback(50, verbose=False), learner()
    with learn.no_bar():
        with pytest.raises(ZeroDivisionError):
            learn.fine_tune(2, cbs=[callback, Fails()])
        learn.fine_tune(2, cbs=callback)
    assert callback.sparse.at_target


def test_one_file_by_two_names_is_still_one_file_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="one file too many"):
        fit(1, rules(Path("a")), rules(tmp_path / "a", layer_type=nn.Linear))


@pytest.mark.parametrize("place", [("random", "python", "words"), ("random", "numpy", "keys"), ("loaders", 0, "rng")])
def test_damaged_random_numbers_are_found_before_anything_changes(place: tuple[Any, ...], tmp_path: Path) -> None:
    path = tmp_path / "a"
    fit(2, rules(path), Stop(1))
    state = load_state(path, KIND)
    part = state["learner"]
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = {"version": 3} if place[-1] == "rng" else [1, 2]
    save_state(path, state, KIND)
    learn = learner()
    before = {n: t.clone() for n, t in learn.model.state_dict().items()}
    with pytest.raises(FileError, match="damaged"):
        fit(2, rules(path, resume=True), learn=learn)
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())
