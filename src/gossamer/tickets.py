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

import torch
from torch import Tensor, nn

from gossamer.errors import FileError, StateError, closest
from gossamer.masks import pack, unpack, zero_masked
from gossamer.storage.tensors import load_tensors, save_tensors
from gossamer.training import SparseTraining, forget

_FORMAT, _VERSION = "gossamer-ticket", 1


@dataclass(frozen=True)
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
        total = sum(m.numel() for m in self.masks.values())
        zeros = sum(m.numel() - int(torch.count_nonzero(self.weights[_key(n)])) for n, m in self.masks.items())
        return 100 * zeros / total

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
        state = model.state_dict()
        odd = sorted(set(state) ^ set(self.weights))
        if odd:
            where = "is not in this network" if odd[0] in self.weights else "is not in the ticket"
            raise FileError(f"the ticket is of another network: {odd[0]!r} {where}. {closest(odd[0], state)}")
        for name, tensor in state.items():
            if tensor.shape != self.weights[name].shape:
                raise FileError(
                    f"the ticket is of another network: {name!r} has shape {tuple(self.weights[name].shape)} there and "
                    f"{tuple(tensor.shape)} here"
                )
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(self.weights[name])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the ticket to a safetensors file, whole or not at all.

        Args:
            path: a file, or a folder that is there or ends in a separator, in which the file is named after the
                sparsity: `ticket_50.00.safetensors`.

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
        return save_tensors(Path(path) / self.filename if folder else path, tensors, metadata)


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

    Example:
        >>> from gossamer.sparsifier import Sparsifier
        >>> net = nn.Linear(4, 2)
        >>> run = SparseTraining(Sparsifier(net, layer_type=nn.Linear), None, 50, "one_shot", total_steps=2)
        >>> lottery = Lottery(run); lottery.snapshot(epoch=0)
        >>> [run.step() for _ in range(2)]
        [False, True]
        >>> lottery.rewind(); lottery.ticket().sparsity
        50.0
    """

    def __init__(self, run: SparseTraining) -> None:
        self.run = run
        self.epoch = 0
        self._weights: dict[str, Tensor] = {}

    @property
    def has_snapshot(self) -> bool:
        """Whether there are weights to go back to."""
        return bool(self._weights)

    def snapshot(self, epoch: int = 0) -> None:
        """Saves the network as it is, to go back to.

        Args:
            epoch: the epoch that starts now.
        """
        self.epoch = epoch
        self._weights = {n: t.detach().clone() for n, t in self.run.sparsifier.model.state_dict().items()}

    def rewind(self) -> None:
        """Takes the whole network back to the snapshot: weights, biases, normalisation and its running statistics.

        What the masks mask stays zero, and the optimizer forgets what it remembers of the network's parameters.

        Raises:
            StateError: there is no snapshot.
        """
        self._need_snapshot()
        model = self.run.sparsifier.model
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(self._weights[name])
        forget(self.run.optimizer, model.parameters())
        self.run.hold()

    def ticket(self) -> Ticket:
        """The masks as they are now, on the weights of the snapshot.

        Raises:
            StateError: there is no snapshot.
        """
        self._need_snapshot()
        weights = {n: t.clone() for n, t in self._weights.items()}
        masks = {n: m.clone() for n, m in self.run.sparsifier.masks.items()}
        sparsifier = self.run.sparsifier
        masked = {id(p): m for p, m in sparsifier.masked_parameters()}
        for name, parameter in sparsifier.model.named_parameters(remove_duplicate=False):
            if id(parameter) in masked:
                zero_masked([weights[name]], masked[id(parameter)])
        return Ticket(weights, masks, self.epoch)

    def _need_snapshot(self) -> None:
        if not self._weights:
            raise StateError("no weights were saved to go back to; call snapshot() before pruning starts")


def _key(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"
