"""Lottery tickets: the masks of a trained network on the weights that it began with.

Frankle & Carbin 2019 (arXiv:1803.03635); rewinding to a later moment than the first: Frankle et al. 2020
(arXiv:1912.05671); masks alone as a network ("supermask"): Zhou et al. 2019 (arXiv:1905.01067).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ArgumentError, FileError, StateError
from gossamer.masks import pack, unpack, zero_masked
from gossamer.optimizers import forget
from gossamer.sparsifier import Sparsifier
from gossamer.storage.tensors import load_tensors, save_tensors
from gossamer.targets import unwrapped
from gossamer.training import SparseTraining
from gossamer.weights import check_weights, copy_of, load_weights, put_weights, tensors_of

_FORMAT, _VERSION = "gossamer-ticket", 1


@dataclass(frozen=True, repr=False)
class Ticket:
    """A sparse network at the weights it was rewound to.

    Args:
        weights: the network's state_dict, zero where the masks are False.
        masks: layer name → bool, True = kept.
        epoch: the epoch at whose start the weights were saved.

    Example:
        >>> ticket = Ticket({"weight": torch.tensor([[0.0, 1.0]])}, {"": torch.tensor([[False, True]])}, epoch=0)
        >>> ticket.sparsity
        50.0
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    epoch: int = 0

    @property
    def sparsity(self) -> float:
        """Zeros among the weights that have masks, in percent, counted."""
        self._check()
        total = sum(m.numel() for m in self.masks.values())
        zeros = sum(m.numel() - int(torch.count_nonzero(self.weights[_key(n)])) for n, m in self.masks.items())
        return 100 * zeros / total

    def __repr__(self) -> str:
        masks = self.masks.values()
        kept, total = sum(int(torch.count_nonzero(m)) for m in masks), sum(m.numel() for m in masks)
        return f"Ticket({kept:,} of {total:,} weights in {len(masks)} layers, of epoch {self.epoch})"

    def _check(self) -> None:
        if not self.masks:
            raise ArgumentError("a ticket without a mask has no sparsity; give masks, layer name → bool")
        lacking = next((name for name in self.masks if _key(name) not in self.weights), None)
        if lacking is not None:
            raise ArgumentError(f"layer {lacking!r} has a mask but no weight {_key(lacking)!r}; give both")

    @property
    def filename(self) -> str:
        """The name that `save` gives it in a folder."""
        return f"ticket_{self.sparsity:.2f}.safetensors"

    def apply_to(self, model: nn.Module) -> None:
        """Puts the ticket's weights into a network.

        Args:
            model: of the same architecture as the one the ticket is from.

        Raises:
            FileError: a name or a shape differs; the network is not touched.

        Example:
            >>> net = nn.Linear(2, 1, bias=False)
            >>> Ticket({"weight": torch.tensor([[0.0, 1.0]])}, {"": torch.tensor([[False, True]])}).apply_to(net)
            >>> net.weight.tolist()
            [[0.0, 1.0]]
        """
        load_weights(unwrapped(model), self.weights, "the ticket")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the ticket to a safetensors file, whole or not at all.

        Args:
            path: a file, or a folder that is there or ends in a separator, in which the file is named after the
                sparsity: `ticket_50.00.safetensors`; where another ticket has that name, `ticket_50.00_2.safetensors`.

        Returns:
            The file's path.
        """
        folder = os.fspath(path).endswith(os.sep) or Path(path).is_dir()
        tensors = {f"weight/{n}": t for n, t in self.weights.items()}
        tensors |= {f"mask/{n}": pack(m) for n, m in self.masks.items()}
        layers = {n: {"shape": list(m.shape), "kept": int(torch.count_nonzero(m))} for n, m in self.masks.items()}
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "sparsity": f"{self.sparsity:.4f}",
            "epoch": str(self.epoch),
            "layers": json.dumps(layers),
        }
        return save_tensors(self._free_name(Path(path)) if folder else path, tensors, metadata)

    def _free_name(self, folder: Path) -> Path:
        path, number = folder / self.filename, 2
        while path.exists() and not self._is_in(path):  # a fit that is resumed writes the same tickets again
            path = folder / f"{Path(self.filename).stem}_{number}.safetensors"
            number += 1
        return path

    def _is_in(self, path: Path) -> bool:
        try:
            other = load_ticket(path)
        except FileError:
            return False
        return self.epoch == other.epoch and all(
            mine.keys() == there.keys() and all(torch.equal(t.cpu(), there[n]) for n, t in mine.items())
            for mine, there in ((self.weights, other.weights), (self.masks, other.masks))
        )


def load_ticket(path: str | os.PathLike[str]) -> Ticket:
    """Reads a ticket that `Ticket.save` wrote.

    Args:
        path: the file.

    Returns:
        The ticket, on the CPU.

    Raises:
        FileError: no such file, not a whole one, not a ticket, of a newer version, or one whose masks and weights do
            not fit each other.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise FileError(f"{os.fspath(path)!r} is a safetensors file, but no ticket; tickets come from Ticket.save")
    if metadata.get("version") != str(_VERSION):
        raise FileError(
            f"{os.fspath(path)!r} is a ticket of version {metadata.get('version')}; this Gossamer reads version "
            f"{_VERSION}, so install a newer one"
        )
    weights = {n.removeprefix("weight/"): t for n, t in tensors.items() if n.startswith("weight/")}
    masks: dict[str, Tensor] = {}
    for name, packed in tensors.items():
        if not name.startswith("mask/"):
            continue
        layer = name.removeprefix("mask/")
        if _key(layer) not in weights:
            raise FileError(f"{os.fspath(path)!r}: layer {layer!r} has a mask but no weight; take another copy")
        masks[layer] = unpack(packed, weights[_key(layer)].shape, layer)
        if not weights[_key(layer)].is_floating_point():
            kind = weights[_key(layer)].dtype
            raise FileError(f"{os.fspath(path)!r}: the weight of layer {layer!r} is of {kind}; take another copy")
        if bool(weights[_key(layer)][~masks[layer]].any()):
            raise FileError(f"{os.fspath(path)!r}: layer {layer!r} has weights under its mask; take another copy")
    if not masks:
        raise FileError(f"{os.fspath(path)!r} is a ticket without a mask; take another copy")
    try:
        epoch = int(metadata.get("epoch", ""))
    except ValueError:
        raise FileError(
            f"{os.fspath(path)!r}: epoch {metadata.get('epoch')!r} is no number; take another copy"
        ) from None
    return Ticket(weights, masks, epoch)


class Lottery:
    """The rewinding that turns a sparse run into a search for tickets.

    Args:
        run: the run whose masks and network it works on. Only the part of the network that the run's sparsifier was
            given is ever saved or rewound.
        rewind_epoch: the epoch at whose start `begin_epoch` takes the snapshot.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> run = SparseTraining(Sparsifier(net, layer_type=nn.Linear), None, 50, "one_shot", total_steps=2)
        >>> lottery = Lottery(run); lottery.snapshot(epoch=0)
        >>> [run.step() for _ in range(2)]
        [False, True]
        >>> lottery.rewind(); lottery.ticket().sparsity
        50.0
    """

    def __init__(self, run: SparseTraining, rewind_epoch: int = 0) -> None:
        if not isinstance(run, SparseTraining):
            raise ArgumentError(
                f"a Lottery works on a SparseTraining, got a {type(run).__name__}; make one: "
                "SparseTraining(sparsifier, …)"
            )
        self.run = run
        self.epoch = 0
        self.rewind_epoch = rewind_epoch
        self._is_due = False
        self._weights: dict[str, Tensor] = {}

    @property
    def has_snapshot(self) -> bool:
        """Whether there are weights to go back to."""
        return bool(self._weights)

    @property
    def rounds_are_epochs(self) -> bool:
        """Whether a round of pruning is an epoch, since the schedule moves at every batch, and not one of its steps."""
        return not self.run.schedule.stepwise

    def check(self, epochs: int) -> None:
        """Makes sure that the snapshot will be taken before pruning starts.

        Args:
            epochs: of the whole training.

        Raises:
            ArgumentError: it would not.
        """
        if self.has_snapshot:
            return
        schedule, rewind = self.run.schedule, self.rewind_epoch
        if rewind >= epochs:
            raise ArgumentError(f"rewind_epoch={rewind} is not in a fit of {epochs} epochs, which count from 0")
        if schedule(rewind / epochs) > 0:
            raise ArgumentError(
                f"rewind_epoch={rewind} of {epochs} comes after pruning starts (schedule {schedule.name!r} starts at "
                f"{schedule.start_pct:.0%} of training); start it later, as in schedule={schedule.name}.between("
                f"{rewind / epochs:g}, 1)"
            )

    def begin_epoch(self, epoch: int) -> bool:
        """Rewinds where the last round left that to do, and takes the snapshot when it is time.

        Returns:
            Whether the snapshot was taken.

        Raises:
            StateError: the epoch whose weights it should be is over.
        """
        if self._is_due:
            self.rewind()
        if self.has_snapshot or epoch < self.rewind_epoch:
            return False
        if epoch > self.rewind_epoch:
            raise StateError(
                f"training starts at epoch {epoch}, and the weights of epoch {self.rewind_epoch} were never saved; use "
                f"rewind_epoch={epoch}, or the callback that saw that epoch"
            )
        self.snapshot(epoch)
        return True

    def ends_round(self, is_epoch_end: bool) -> bool:
        """Whether a move of the masks, at an epoch's end or before it, was the last of a round."""
        return self.has_snapshot and (is_epoch_end or not self.rounds_are_epochs)

    def end_round(self, is_last: bool) -> None:
        """Rewinds after a round; where rounds are epochs, once the next begins, so that the trained network is seen.

        Args:
            is_last: whether training ends here, so that nothing would train the rewound weights.
        """
        if is_last:
            return
        if self.rounds_are_epochs:
            self._is_due = True
        else:
            self.rewind()

    def snapshot(self, epoch: int = 0) -> None:
        """Saves the network as it is, to go back to.

        Args:
            epoch: the epoch that starts now.
        """
        self.epoch = epoch
        self._weights = copy_of(self.run.sparsifier.model)

    def rewind(self) -> None:
        """Takes the whole network back to the snapshot: weights, biases, normalisation and its running statistics.

        What the masks mask stays zero, and the optimizer forgets what it remembers of the network's parameters.

        Raises:
            StateError: there is no snapshot.
        """
        self._need_snapshot()
        self._is_due = True  # Ctrl-C in the midst leaves the rest to the next epoch
        model = self.run.sparsifier.model
        try:
            put_weights(model, self._weights)
            forget(self.run.optimizer, model.parameters())
        finally:
            self.run.hold()
        self._is_due = False

    def ticket(self) -> Ticket:
        """The masks as they are now, on the weights of the snapshot.

        Raises:
            StateError: there is no snapshot.
        """
        self._need_snapshot()
        return ticket_of(self.run.sparsifier, self._weights, self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """The snapshot, its epoch, and whether there is something to rewind when the next epoch begins."""
        return {"epoch": self.epoch, "is_due": self._is_due, "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            FileError: the weights are of another network.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("weights"), Mapping):
            raise FileError(
                f"state of a lottery must be a dict with weights, got {state!r}; take what state_dict() gave"
            )
        own, weights = tensors_of(self.run.sparsifier.model), state["weights"]
        if weights:
            check_weights(own, weights, "the snapshot to rewind to")
        self.epoch, self._is_due = int(state["epoch"]), bool(state["is_due"])
        self._weights = {n: t.to(own[n].device) for n, t in weights.items()}

    def _need_snapshot(self) -> None:
        if not self._weights:
            raise StateError("no weights were saved to go back to; call snapshot() before pruning starts")


def ticket_of(sparsifier: Sparsifier, weights: Mapping[str, Tensor], epoch: int = 0) -> Ticket:
    """A sparsifier's masks as they are now, on other weights of its network.

    Args:
        sparsifier: whose masks, and what dies with its filters; they are copied.
        weights: a state_dict of its model; they are copied.
        epoch: at whose start they were saved.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> sparsifier = Sparsifier(net, layer_type=nn.Linear)
        >>> ticket_of(sparsifier, {"weight": torch.tensor([[3.0, 4.0]])}).weights["weight"].tolist()
        [[3.0, 4.0]]
    """
    copies = {n: t.detach().clone() for n, t in weights.items()}
    masked = {id(p): m for p, m in sparsifier.masked_parameters()}
    for name, parameter in sparsifier.model.named_parameters(remove_duplicate=False):
        if id(parameter) in masked:
            zero_masked([copies[name]], masked[id(parameter)].to(copies[name].device))
    return Ticket(copies, {n: m.clone() for n, m in sparsifier.masks.items()}, epoch)


def _key(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"
