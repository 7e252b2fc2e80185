"""What a search for tickets keeps on disk, so that it can go on: one file, written anew after each round."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import FileError
from gossamer.sparsifier import Sparsifier
from gossamer.storage.tensors import load_tensors, save_tensors, write_whole
from gossamer.tickets import Ticket

_FORMAT, _VERSION = "gossamer-ticket-search", 1
_SCORES = "gossamer-ticket-comparisons"
_ROW = ("remaining", "round", "score", "steps")


@dataclass(frozen=True)
class Saved:
    """Where a search stands after a round.

    Args:
        rows: one a round, as JSON can hold them.
        rewind: the weights that each round goes back to.
        trained: the weights at the end of the last round.
        state: of the sparsifier, then.
        masks: one dict a round, layer name → mask, eight to a byte.
    """

    rows: list[dict[str, Any]]
    rewind: dict[str, Tensor]
    trained: dict[str, Tensor]
    state: dict[str, Tensor]
    masks: list[dict[str, Tensor]]


class Record:
    """The files of a search.

    Args:
        folder: where they are; made when the first is written.
        settings: what a search must agree in to go on from them, from `settings_of`.

    Raises:
        FileError: the folder is a file.

    Example:
        >>> import tempfile
        >>> record = Record(Path(tempfile.mkdtemp()), {"rate": "20"})
        >>> record.load(rounds=3) is None
        True
        >>> row, part = {"round": 0, "remaining": 100.0, "score": 0.5, "steps": 9}, {"0": torch.ones(1)}
        >>> record.save(Saved([row], part, part, part, [part]))
        >>> record.load(rounds=3).rows[0]["score"]
        0.5
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        if folder.exists() and not folder.is_dir():
            raise FileError(f"folder={str(folder)!r} is a file; name a folder, which need not be there yet")
        self.folder = folder
        self.path = folder / "search.safetensors"
        self._scores = folder / "comparisons.json"
        self.settings = settings

    def save_ticket(self, round: int, ticket: Ticket) -> None:
        """Writes the ticket of a round as `ticket_03.safetensors`."""
        ticket.save(self.folder / f"ticket_{round:02}.safetensors")

    def save(self, saved: Saved) -> None:
        """Writes where the search stands, whole or not at all."""
        parts = {"rewind": saved.rewind, "trained": saved.trained, "state": saved.state}
        parts |= {f"masks {i}": masks for i, masks in enumerate(saved.masks)}
        tensors = {f"{part}/{name}": t for part, group in parts.items() for name, t in group.items()}
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "settings": json.dumps(self.settings),
            "rows": json.dumps(saved.rows),
        }
        save_tensors(self.path, tensors, metadata)

    def save_scores(self, scores: Mapping[str, float]) -> None:
        """Writes what comparisons came to, whole or not at all."""
        content = {"format": _SCORES, "version": _VERSION, "settings": self.settings, "scores": dict(scores)}
        write_whole(self._scores, json.dumps(content, indent=1).encode())

    def load_scores(self) -> dict[str, float]:
        """What comparisons came to before: what was trained → its score; empty where there were none.

        Raises:
            FileError: they are of another search, or the file is not whole.
        """
        if not self._scores.exists():
            return {}
        try:
            content: Any = json.loads(self._scores.read_bytes())
            if content["format"] != _SCORES or content["version"] != _VERSION:
                raise ValueError
            settings, scores = dict(content["settings"]), dict(content["scores"])
            if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in scores.values()):
                raise ValueError
        except (KeyError, TypeError, ValueError, RecursionError):
            raise FileError(
                f"{str(self._scores)!r} holds no comparisons of version {_VERSION}; take another copy, or delete it "
                "and train them again"
            ) from None
        difference = _difference(settings, self.settings)
        if difference:
            raise FileError(f"{str(self._scores)!r} is of another search: {difference}. Give another folder")
        return scores

    def load(self, rounds: int) -> Saved | None:
        """Where the search stood when it was last saved; None where it has not begun.

        Args:
            rounds: how many it shall have; more than there are is fine.

        Raises:
            FileError: it is another search, or the file is not whole.
        """
        if not self.path.exists():
            return None
        tensors, metadata = load_tensors(self.path)
        if metadata.get("format") != _FORMAT or metadata.get("version") != str(_VERSION):
            raise FileError(
                f"{str(self.path)!r} is no search of version {_VERSION}, which this Gossamer reads; give another folder"
            )
        try:
            settings: dict[str, Any] = json.loads(metadata["settings"])
            rows: list[dict[str, Any]] = json.loads(metadata["rows"])
            if not isinstance(settings, dict) or not rows or any(tuple(sorted(row)) != _ROW for row in rows):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise FileError(f"{str(self.path)!r} does not say what search it is; take another copy") from None
        difference = _difference(settings, self.settings)
        if not difference and len(rows) > rounds + 1:
            raise FileError(
                f"the folder {str(self.folder)!r} has {len(rows) - 1} rounds of this search already, more than "
                f"rounds={rounds}; ask for {len(rows) - 1} or more, or give another folder"
            )
        if difference:
            raise FileError(
                f"the folder {str(self.folder)!r} holds another search: {difference}. Give what that one was started "
                "with, or another folder"
            )
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            groups.setdefault(part, {})[name] = tensor
        lacking = [part for part in ("rewind", "trained", "state") if part not in groups]
        lacking += [f"masks {i}" for i in range(len(rows)) if f"masks {i}" not in groups]
        if lacking:
            raise FileError(f"{str(self.path)!r} lacks its {lacking[0]}; take another copy")
        masks = [groups[f"masks {i}"] for i in range(len(rows))]
        return Saved(rows, groups.get("rewind", {}), groups.get("trained", {}), groups.get("state", {}), masks)


def settings_of(sparsifier: Sparsifier, shares: Mapping[str, Fraction], rest: Mapping[str, Any]) -> dict[str, Any]:
    """What two searches must agree in for one to go on from the other's files, as JSON can hold it.

    Args:
        sparsifier: of the network as it begins.
        shares: layer name → fraction that a round masks.
        rest: further settings by name.

    Example:
        >>> settings = settings_of(Sparsifier(nn.Linear(2, 1), layer_type=nn.Linear), {"": Fraction(1, 5)}, {})
        >>> settings["rate"], settings["network"]["bias"]
        ({'': '20 %'}, 'torch.float32 (1,)')
    """
    return {
        "network": {n: f"{t.dtype} {tuple(t.shape)}" for n, t in _tensors(sparsifier.model).items()},
        "granularity": sparsifier.granularity.name,
        "context": str(sparsifier.context),
        "criteria": sparsifier.criterion.name,
        "rate": {name: f"{float(share * 100):g} %" for name, share in shares.items()},
        **rest,
        "weights": fingerprint(sparsifier.model),
    }


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the tensors in a network's state_dict.

    Example:
        >>> fingerprint(nn.ReLU())[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    for key, mine in here.items():
        other = there.get(key)
        if other == mine:
            continue
        if key == "weights":
            return "its network began with other weights, so seed the random numbers before the network is built"
        if isinstance(mine, dict) and isinstance(other, dict):
            name = min(n for n in {*mine, *other} if mine.get(n) != other.get(n))
            return f"{key} of {name!r} is {other.get(name, 'missing')} there and {mine.get(name, 'missing')} here"
        return f"{key} is {other!r} there and {mine!r} here"
    return ""
