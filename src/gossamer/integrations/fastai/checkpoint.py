"""A whole fastai fit in one file, and back: what a run that was stopped needs to go on as if it had not been."""

from __future__ import annotations

import warnings
from collections.abc import Callable as Function
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from fastai.callback import core
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, Recorder
from fastcore.foundation import L
from torch import Tensor, nn

from gossamer.errors import FileError, GossamerWarning
from gossamer.integrations.fastai.bystanders import bystanders, changed, has_state, put_back
from gossamer.integrations.fastai.followers import Traceless
from gossamer.integrations.fastai.span import only_looks
from gossamer.randomness import (
    GENERATORS,
    check_generator_state,
    check_random_state,
    generator_state,
    random_state,
    restore_generator,
    restore_random_state,
)
from gossamer.targets import unwrapped
from gossamer.weights import check_weights, load_weights

_HOLDERS = ("", "sampler", "batch_sampler", "batch_sampler.sampler", "dataset")
"""Where a data loader, or what it is made of, may have random numbers of its own."""


def learner_state(learn: Learner, before: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Everything of a fit at the end of an epoch, but for the sparse run.

    Args:
        learn: between two epochs.
        before: `fingerprints` of the callbacks when the fit began; what has changed since is part of the state.

    Returns:
        Nested dicts that `save_state` can write.
    """
    model = unwrapped(cast(nn.Module, learn.model))
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "other_buffers": _other_buffers(model),
        # What accumulation carries over from one epoch to the next; else gradients are gone by now, or zero.
        # Those that are zero are only named: fastai's optimizers step what has a gradient at all, and momentum goes on.
        "gradients": {
            n: p.grad if bool(p.grad.any()) else None for n, p in model.named_parameters() if p.grad is not None
        },
        "optimizer": cast(Any, learn).opt.state_dict(),
        "optimizer_kind": _kind(learn.opt),
        "callbacks": changed(learn, before),
        "states": {name: cb.state_dict() for name, cb in bystanders(learn).items() if has_state(cb)},
        "loaders": [loader_state(dl) for dl in learn.dls.loaders],
        "set_up": _set_up(learn),
        "train_iter": int(cast(Any, learn).train_iter),
        "random": random_state(),
    }
    if _scaler(learn) is not None:
        state["scaler"] = _scaler(learn).state_dict()
    recorder = next((cb for cb in learn.cbs if isinstance(cb, Recorder)), None)
    if recorder is not None:
        smooth = recorder.smooth_loss
        losses = [float(v) for v in recorder.losses]
        state["recorder"] = {
            "lrs": np.array(recorder.lrs, dtype=np.float64),
            "losses": torch.tensor(losses, dtype=torch.float64),
            "iters": list(recorder.iters),
            "values": [list(row) for row in recorder.values],
            "smooth": {"count": smooth.count, "val": smooth.val},
        }
    return state


def restore_training(learn: Learner, state: dict[str, Any], path: Path) -> None:
    """Puts weights and optimizer back; all or nothing.

    Args:
        learn: in the `before_fit` of the fit that goes on.
        state: of `learner_state`.
        path: of the file, for the messages.

    Raises:
        FileError: they are of another network, or of an optimizer with other groups.
    """
    model, opt = unwrapped(cast(nn.Module, learn.model)), cast(Any, learn.opt)
    what = f"the checkpoint {str(path)!r}"
    check_weights(model.state_dict(), state["model"], what)
    saved = state["optimizer"]
    groups = [len(group) for group in opt.param_lists]
    if "hypers" in saved:  # fastai's own; torch's say which parameters are in which group
        same = [type(group) for group in saved["hypers"]] == [dict] * len(groups) and len(saved["state"]) == sum(groups)
    else:
        same = [len(g["params"]) for g in saved.get("param_groups", [])] == groups
    if state["optimizer_kind"] != _kind(opt):
        raise FileError(
            f"{what} is of a fit with the optimizer {state['optimizer_kind']}, and this one has {_kind(opt)}; use the "
            "opt_func that it was made with"
        )
    if not same:
        raise FileError(
            f"{what} is of a fit with another optimizer, or other parameter groups; use the opt_func and the splitter "
            "that it was made with"
        )
    for name, here in _set_up(learn).items():
        there = state["set_up"].get(name)
        if there != here:
            warnings.warn(
                f"{what} is of a fit with {name} = {there}, and here it is {here}: training goes on, but not as it was",
                GossamerWarning,
                stacklevel=2,
            )
    load_weights(model, state["model"], what)
    _put_other_buffers(model, state.get("other_buffers", {}))
    if "hypers" in saved:
        parameters = [p for group in opt.param_lists for p in group]
        saved = {
            **saved,  # Lookahead has a count, and slow weights
            "hypers": L(saved["hypers"]),
            "state": [
                {k: v.to(p.device) if isinstance(v, Tensor) and v.ndim else v for k, v in entries.items()}
                for p, entries in zip(parameters, saved["state"], strict=True)
            ],
        }
        if saved.get("slow_weights") is not None:
            groups = zip(opt.param_lists, saved["slow_weights"], strict=True)
            saved["slow_weights"] = L(L(s.to(p.device) for p, s in zip(*pair, strict=True)) for pair in groups)
    opt.load_state_dict(saved)
    for name, parameter in model.named_parameters():  # an interrupt leaves gradients behind
        there, gradient = name in state["gradients"], state["gradients"].get(name)
        parameter.grad = gradient.to(parameter.device) if gradient is not None else None
        if there and gradient is None:
            parameter.grad = torch.zeros_like(parameter)


def check_rest(state: dict[str, Any]) -> None:
    """Makes sure that what `restore_rest` will put back is all there.

    Raises:
        KeyError: something is missing.
        TypeError: something is of another kind.
    """
    kinds = {"callbacks": dict, "states": dict, "loaders": list, "train_iter": int, "random": dict, "gradients": dict}
    for key, kind in kinds.items():
        if not isinstance(state[key], kind):
            raise TypeError(f"{key} is a {type(state[key]).__name__}")
    check_random_state(state["random"])
    for saved in state["loaders"]:
        for there in saved.values():
            check_generator_state(there)
    if "recorder" in state:
        for key in ("lrs", "losses", "iters", "values", "smooth"):
            state["recorder"][key]


def restore_rest(learn: Learner, state: dict[str, Any]) -> None:
    """Puts back what must stand still until the next epoch begins: random numbers, counters, what was recorded."""
    _restore_callbacks(learn, state)
    # fastai looks at one item of the data, once a process, before it splits the first batch: that draws random numbers.
    getattr(learn.dls, "n_inp", None)
    loaders = learn.dls.loaders
    if len(loaders) != len(state["loaders"]):
        warnings.warn(
            f"the checkpoint is of {len(state['loaders'])} data loaders and there are {len(loaders)}, so batches may "
            "come in another order; make the DataLoaders as they were",
            GossamerWarning,
            stacklevel=2,
        )
    for loader, saved in zip(loaders, state["loaders"], strict=False):
        restore_loader(loader, saved)
    restore_random_state(state["random"])


def _restore_callbacks(learn: Learner, state: dict[str, Any]) -> None:
    cast(Any, learn).train_iter = state["train_iter"]
    put_back(learn, state["callbacks"])
    for name, cb in bystanders(learn).items():
        if name in state["states"] and has_state(cb):
            cb.load_state_dict(state["states"][name])
    if "scaler" in state and _scaler(learn) is not None:
        _scaler(learn).load_state_dict(state["scaler"])
    recorder = next((cb for cb in learn.cbs if isinstance(cb, Recorder)), None)
    if recorder is not None and "recorder" in state:
        saved = state["recorder"]
        recorder.lrs, recorder.iters = saved["lrs"].tolist(), list(saved["iters"])
        recorder.losses = list(saved["losses"].float().unbind())
        recorder.values = [L(row) for row in saved["values"]]
        recorder.smooth_loss.count, recorder.smooth_loss.val = saved["smooth"]["count"], saved["smooth"]["val"]


class Resume(Traceless):
    """Skips the epochs that a checkpoint has done, as if they were not there, and then puts the rest back.

    Other callbacks see nothing of the skipped epochs: no row in the table, no file saved a second time.

    Args:
        owners: the callback whose fit it is, and the others that make it sparse.
        begin: called when the first epoch begins, before any callback has seen it.
        skip: epochs of this fit that are done.
        restore: called when the first epoch that is not done begins, or when the fit ends, if that was all of it.
    """

    order = -100

    def __init__(
        self,
        owners: Sequence[Callback],
        begin: Function[[], None],
        skip: int = 0,
        restore: Function[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.owner, self._owners = owners[0], owners
        self._begin, self._skip, self._restore = begin, skip, restore
        self._stopped: list[Callback] = []
        self._begun, self._epoch = False, -1

    @property
    def restores(self) -> bool:
        """Whether something is still to be put back."""
        return self._restore is not None

    def before_epoch(self) -> None:
        """Skips, or starts."""
        learn = cast(Learner, self.learn)
        if only_looks(learn):
            return
        self._epoch += 1
        if not self._begun:
            self._begun = True
            self._begin()
            if self._skip:
                self._stopped = [cb for cb in learn.cbs if cb is not self and cb.run]
        if self._epoch < self._skip:
            if self._epoch == 0:
                self._begin_bars(learn)
            self._set_running(False)
            for owner in self._owners:
                cast(Any, owner).place.epoch = self._epoch  # they do not see it begin
            raise cast(Any, core).CancelEpochException
        self._go_on()

    def after_fit(self) -> None:
        """Lets the others see the end of a fit that was skipped whole."""
        if not only_looks(cast(Learner, self.learn)):
            self._go_on()

    def _go_on(self) -> None:
        self._set_running(True)
        self._stopped = []
        if self._restore is not None:
            self._restore()
            self._restore = None

    @staticmethod
    def _begin_bars(learn: Learner) -> None:
        # fastprogress takes its clock at 0, and a bar whose first value is another one raises.
        for cb in learn.cbs:
            if isinstance(cb, ProgressCallback) and hasattr(cb, "mbar"):
                cast(Any, cb).mbar.update(0)

    def leave(self) -> None:
        """Lets the others run again, where a fit was broken off while it skipped."""
        self._set_running(True)
        self._stopped = []

    def _set_running(self, running: bool) -> None:
        for cb in self._stopped:
            cb.run = running


class Checkpointer(Traceless):
    """Writes the fit's state at the end of an epoch, once every other callback has seen it.

    Args:
        owner: the callback whose fit it is.
        path: the file.
        save: writes it.
        every: after every how many epochs; after the last in any case.
    """

    order = 10_000
    run_valid = False

    def __init__(self, owner: Callback, path: Path, save: Function[[], None], every: int) -> None:
        super().__init__()
        self.owner = owner
        self.path, self._save, self._every = path, save, every

    def after_epoch(self) -> None:
        """Saves, when it is time."""
        learn, done = cast(Any, self.learn), cast(Any, self.owner).epoch_now + 1
        if not only_looks(cast(Learner, self.learn)) and (done % self._every == 0 or done == learn.n_epoch):
            self._save()


def _other_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a network keeps and does not save, as where they can be computed anew."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _put_other_buffers(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, now in _other_buffers(model).items():
        there = buffers.get(name)
        if not isinstance(there, Tensor):
            continue
        if now.shape == there.shape and now.dtype == there.dtype:
            now.copy_(there)
        else:  # one that grows with what it has seen
            holder, _, last = name.rpartition(".")
            model.get_submodule(holder).register_buffer(last, there.to(now.device), persistent=False)


def _set_up(learn: Learner) -> dict[str, Any]:
    return {
        "batches an epoch": len(learn.dls.train),
        "parameters that are not frozen": sum(p.requires_grad for p in cast(nn.Module, learn.model).parameters()),
    }


def _scaler(learn: Learner) -> Any:
    return vars(learn).get("scaler")  # what a learner lacks, fastai looks up in the model


def _kind(opt: Any) -> str:
    inner = getattr(opt, "opt", None)
    if isinstance(inner, torch.optim.Optimizer):
        return f"torch.optim.{type(inner).__name__}"
    steps = [getattr(step, "__name__", type(step).__name__) for step in getattr(opt, "cbs", [])]
    return f"{type(opt).__name__}({', '.join(steps)})"


def loader_state(loader: Any) -> dict[str, Any]:
    return {where: generator_state(generator) for where, generator in _generators(loader).items()}


def restore_loader(loader: Any, state: dict[str, Any]) -> None:
    for where, generator in _generators(loader).items():
        if where in state:
            restore_generator(generator, state[where])


def _generators(loader: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for where in _HOLDERS:
        holder = loader
        for step in where.split(".") if where else ():
            holder = getattr(holder, step, None)
        for name, value in getattr(holder, "__dict__", {}).items():
            if isinstance(value, GENERATORS) and not any(value is other for other in found.values()):
                found[f"{where}.{name}".strip(".")] = value
    return found
